"""Captions in three manners, and Fashion-IQ's texts of two garments: they say what they must, and what reads them finds it."""

import hashlib
import re
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest

from unifashion.data import toy
from unifashion.data.fashioniq import joined
from unifashion.data.modifications import (
    adjectives,
    change_phrases,
    changes,
    differences,
    modification,
    noun_phrases,
)
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


def test_two_annotators_name_every_difference_and_nothing_else():
    seen = Counter()
    for reference, target, captions in modified(2000):
        wanted = {name: {getattr(target, name)} for name in differences(reference, target)}
        own = [changes(text)[0] for text in captions]
        said, before = changes(joined(captions))
        assert own[0] and own[1], captions
        assert said == wanted and all(x.items() <= wanted.items() for x in own), (wanted, captions)
        assert all(values == {getattr(reference, name)} for name, values in before.items()), captions
        seen[len(wanted), own[0] == said, own[1] == said] += 1
    assert seen[1, True, True] > 100 and sum(seen[1, a, b] for a, b in ((True, False), (False, True))) == 0
    assert sum(n for (k, a, b), n in seen.items() if k > 2 and not a and not b) > 500


def test_what_differs_is_what_can_be_seen():
    plain = toy.Garment("shirt", "red", "blue", "plain", "long", "v", "long")
    striped = replace(plain, pattern="striped")
    assert differences(plain, replace(plain, second="white")) == []
    assert set(differences(plain, striped)) == {"pattern", "second"}  # its blue was not to be seen before
    assert differences(striped, plain) == differences(striped, replace(plain, second="white")) == ["pattern"]
    assert differences(striped, replace(striped, second="white")) == ["second"]
    assert set(differences(plain, replace(striped, sleeve="short", colour="grey"))) == {
        "pattern", "second", "sleeve", "colour"
    }  # fmt: skip
    with pytest.raises(ValueError, match="nothing differs"):
        modification(plain, replace(plain, second="white"), np.random.default_rng(0))


def test_every_phrase_of_a_difference_has_one_meaning():
    values = {name: list(table) for name, table in WORDS["fashion200k"].items()} | {
        "second": list(toy.PALETTE)
    }
    g, phrases = toy.Garment("shirt", "red", "blue", "plain", "long", "v", "long"), []
    for attribute, options in values.items():
        for value in options:
            own = adjectives(replace(g, **{attribute: value}), attribute)
            if attribute not in ("category", "colour", "length"):
                own += noun_phrases(replace(g, **{attribute: value}), attribute)
            assert own, (attribute, value)
            phrases += [(phrase, {attribute: value}) for phrase in own]
    assert len({phrase for phrase, _ in phrases}) == len(phrases)
    assert all(change_phrases()[phrase.removeprefix("a ")] == meaning for phrase, meaning in phrases)


def test_planted_errors_in_a_modification_are_read():
    assert changes("is blue instead of red and has long sleeves") == (
        {"colour": {"blue"}, "sleeve": {"long"}},
        {"colour": {"red"}},
    )
    assert changes("It is green and is grey.")[0] == {"colour": {"green", "grey"}}
    assert changes("has pink dots")[0] == {"second": {"pink"}, "pattern": {"dotted"}}
    with pytest.raises(KeyError):
        changes("is nicer")


def test_modifications_are_short_varied_and_in_few_words():
    texts = [text for _, _, captions in modified(2000) for text in captions]
    assert np.percentile([len(text.split()) for text in texts], 95) <= 15
    assert len({word for text in texts for word in tokens(text).split()}) <= 90
    starts = Counter(text.split()[0] for text in texts)
    assert all(starts[word] > 20 for word in ("is", "has", "it", "Is", "Has", "It"))
    assert len(set(texts)) > 0.5 * len(texts)
    again = [text for _, _, captions in modified(2000) for text in captions]
    assert again == texts


def test_version_1_of_the_modifications_stays_as_it_is():
    said = "\n".join(text for _, _, captions in modified(300) for text in captions)
    assert hashlib.sha256(said.encode()).hexdigest()[:16] == "3432d09cf436c756"


def modified(n: int) -> list[tuple[toy.Garment, toy.Garment, tuple[str, str]]]:
    """Pairs of one kind that share some attributes, and what is said of the second."""
    rng, made = np.random.default_rng(4), []
    for reference, target in zip(garments(n), garments(n + 1)[1:], strict=True):
        shared = [
            name for name in ("colour", "pattern", "second", "sleeve", "neckline") if rng.random() < 0.6
        ]
        shared += (
            ["category", "length"]
            if (reference.length in toy.TOP_LENGTHS) != (target.length in toy.TOP_LENGTHS)
            else []
        )
        target = replace(target, **{name: getattr(reference, name) for name in shared})
        if target.second in toy.SECOND[target.colour] and differences(reference, target):
            made.append((reference, target, modification(reference, target, rng)))
    return made


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
