"""Captions in three manners: they say what they must, and `named` reads from them exactly what they say."""

import hashlib
import re
from collections import Counter

import numpy as np
import pytest

from unifashion.data import toy
from unifashion.data.texts import WORDS, caption, chunks, detailed, flat, named, professional, reader, tokens

WRITERS = {
    "fashion200k": caption,
    "fashiongen": lambda g, rng: ". ".join(professional(g, rng)),
    "fashioniq-cap": detailed,
}
NEW = ("fashiongen", "fashioniq-cap")


@pytest.mark.parametrize("style", WRITERS)
def test_a_caption_names_only_truths(style):
    for g, text in written(style, 1500):
        assert all(values <= truth(g)[name] for name, values in named(text, style).items()), text


@pytest.mark.parametrize("style", WRITERS)
def test_a_caption_that_says_everything_is_read_whole(style):
    write = WRITERS[style] if style in NEW else lambda g, rng: caption(g, rng, keep=1.0)
    for g, text in written(style, 1500, write):
        read, true = named(text, style), truth(g)
        if style not in NEW and g.pattern == "plain":  # Fashion200K's captions often leave it out
            read["pattern"] = true["pattern"] = set()
        assert read == true, text


@pytest.mark.parametrize("style", NEW)
def test_a_description_alone_names_everything_too(style):
    rng = np.random.default_rng(5)
    for g in garments(500):
        text = professional(g, rng)[1] if style == "fashiongen" else detailed(g, rng)
        assert named(text, style) == truth(g), text


@pytest.mark.parametrize("style", WRITERS)
@pytest.mark.parametrize("attribute", WORDS["fashiongen"] | {"second": ()})
def test_a_planted_error_is_found_and_nothing_else_changes(style, attribute):
    rng, planted = np.random.default_rng(2), 0
    for g, text in written(style, 400):
        before = named(text, style)
        if not before[attribute] or (attribute == "pattern" and g.pattern == "plain"):
            continue
        table = WORDS[style]["colour" if attribute == "second" else attribute]
        others = set(table) - {"plain", getattr(g, attribute)} - {g.colour, g.second}
        other = str(rng.choice(sorted(others)))
        wrong = swap(text, table[getattr(g, attribute)], table[other])
        assert named(wrong, style) == before | {attribute: {other}}, (text, wrong)
        planted += 1
    assert planted > 200


@pytest.mark.parametrize("style", WRITERS)
def test_no_phrase_has_two_meanings(style):
    phrases = [
        tokens(p).removeprefix(" a ").strip() for v in WORDS[style].values() for p in flat(list(v.values()))
    ]
    repeated = [phrase for phrase, count in Counter(phrases).items() if count > 1]
    assert repeated == ["v neck"] * (style == "fashion200k")  # adjective and noun of one value
    assert len(reader(style)[1]) == len(set(phrases))


def test_the_three_manners_have_their_own_words():
    for attribute in ("pattern", "sleeve", "neckline", "length"):
        for value in WORDS["fashion200k"][attribute]:
            sets = [set(flat(WORDS[style][attribute][value])) for style in WRITERS]
            assert sum(map(len, sets)) == len(set.union(*sets)), (attribute, value)
            assert all(len(phrases) >= 2 for phrases in sets[1:])


@pytest.mark.parametrize(
    ("style", "words", "vocabulary", "orders"),
    [("fashiongen", (18, 33), 135, 3), ("fashioniq-cap", (20, 36), 135, 4)],
)
def test_captions_are_short_ascii_of_few_words_and_of_many_orders(style, words, vocabulary, orders):
    texts = written(style, 3000)
    lengths = [len(text.split()) for _, text in texts]
    assert words[0] <= np.percentile(lengths, 2) and np.percentile(lengths, 98) <= words[1]
    assert len({word for _, text in texts for word in tokens(text).split()}) <= vocabulary
    assert all(text.isascii() for _, text in texts)
    pattern, meanings, _ = reader(style)
    seen = Counter(tuple(meanings[hit[0]][0] for hit in pattern.finditer(tokens(text))) for _, text in texts)
    assert len([order for order, count in seen.items() if count > 30]) >= orders


def test_titles_are_in_title_case_and_descriptions_in_sentences():
    rng = np.random.default_rng(1)
    for g in garments(200):
        title, description = professional(g, rng)
        assert title == title.title() and not title.endswith(".") and len(title.split()) <= 7
        assert all(part[0].isupper() for part in description.split(". ")) and description.endswith(".")


@pytest.mark.parametrize(
    ("text", "style", "expected"),
    [
        ("red/blue striped tee", "fashion200k", {"colour": "red", "second": "blue", "pattern": "striped", "category": "t-shirt"}),
        ("RED TEE WITH BLUE STRIPES", "fashion200k", {"colour": "red", "second": "blue", "pattern": "striped", "category": "t-shirt"}),
        ("blue dots on red", "fashion200k", {"colour": "red", "second": "blue", "pattern": "dotted"}),
        ("red and blue gown", "fashion200k", {"colour": "red blue", "category": "dress"}),
        ("plain red/blue gown", "fashion200k", {"colour": "red blue", "category": "dress", "pattern": "plain"}),
        ("long red gown", "fashion200k", {"length": "long", "colour": "red", "category": "dress"}),
        ("long sleeved red gown", "fashion200k", {"sleeve": "long", "colour": "red", "category": "dress"}),
        ("short-cut tee, short sleeves", "fashion200k", {"length": "cropped", "sleeve": "short", "category": "t-shirt"}),
        ("longline long-sleeve shirt", "fashion200k", {"length": "long", "sleeve": "long", "category": "shirt"}),
        ("vertically striped shirt", "fashion200k", {"pattern": "pinstriped", "category": "shirt"}),
        ("red red striped dotted", "fashion200k", {"colour": "red", "pattern": "striped dotted"}),
        ("redder shirts, longish", "fashion200k", {}),
        ("", "fashion200k", {}),
        ("Spots in ivory. Pullover in", "fashiongen", {"pattern": "dotted", "second": "white", "category": "sweater"}),
        ("frock in ivory. bands", "fashiongen", {"pattern": "striped", "colour": "white", "category": "dress"}),
        ("It is red with no pattern in blue", "fashioniq-cap", {"pattern": "plain", "colour": "red blue"}),
    ],
)  # fmt: skip
def test_what_odd_texts_name(text, style, expected):
    assert {k: " ".join(sorted(v)) for k, v in named(text, style).items() if v} == {
        k: " ".join(sorted(v.split())) for k, v in expected.items()
    }


def test_the_chunks_of_mgd_are_read_too():
    rng = np.random.default_rng(3)
    for g in garments(500):
        text = ", ".join(chunks(g, rng))
        assert all(values <= truth(g)[name] for name, values in named(text, "fashion200k").items()), text


@pytest.mark.parametrize(
    ("style", "digest"), [("fashiongen", "7d3d8228d16ae074"), ("fashioniq-cap", "6fa2f3e9a29c670e")]
)
def test_version_1_of_the_texts_stays_as_it_is(style, digest):
    said = "\n".join(text for _, text in written(style, 300))
    assert hashlib.sha256(said.encode()).hexdigest()[:16] == digest


def garments(n: int) -> list[toy.Garment]:
    rng = np.random.default_rng(7)
    return [toy.sample_garment(rng) for _ in range(n)]


def written(style: str, n: int, write=None) -> list[tuple[toy.Garment, str]]:
    rng = np.random.default_rng(0)
    return [(g, (write or WRITERS[style])(g, rng)) for g in garments(n)]


def truth(g: toy.Garment) -> dict[str, set[str]]:
    values = {name: {getattr(g, name)} for name in toy.ATTRIBUTES}
    return values | ({"second": set()} if g.pattern == "plain" else {})


def swap(text: str, phrases: tuple, others: tuple) -> str:
    """`text` with each phrase of one value replaced by its counterpart (adjective, noun) among another value's."""
    kinds = zip(phrases, others, strict=True) if isinstance(phrases[0], tuple) else [(phrases, others)]
    counterpart = {
        a.removeprefix("a "): b[i % len(b)].removeprefix("a ")
        for a_kind, b in kinds
        for i, a in enumerate(a_kind)
    }
    longest = "|".join(re.escape(a) for a in sorted(counterpart, key=len, reverse=True))
    phrase = re.compile(rf"(?<![\w-])({longest})(?![\w-]| sleeves)", re.IGNORECASE)
    return phrase.sub(lambda hit: counterpart[hit[0].lower()], text)
