"""CLIP's tokenizer: against OpenAI's own (tokenizer_clip.json, in its real vocabulary), and against transformers' on wild text."""

import gzip
import json
import os
import random
import unicodedata
from pathlib import Path

import pytest
import regex
import torch
from transformers import CLIPTokenizer as Theirs

from tests.goldens import GOLDEN
from tests.merges import PAIRS, VOCAB_SIZE, write_merges
from unifashion import UserError
from unifashion.tokenizers import CLIPTokenizer, _word_pattern, clip_clean

GOLD = json.loads((GOLDEN / "tokenizer_clip.json").read_text())
SAMPLES = Path(os.environ.get("UNIFASHION_SAMPLES", "/nonexistent"))
needs_samples = pytest.mark.skipif(
    not SAMPLES.is_dir(), reason="needs OpenAI's vocabulary: set UNIFASHION_SAMPLES"
)

# the real vocabulary


@needs_samples
@pytest.mark.parametrize("case", GOLD["cases"], ids=lambda case: ascii(case["text"][:24]))
def test_ids_equal_openais(case: dict, real: CLIPTokenizer):
    assert [real.ids[piece] for piece in real.tokenize(case["text"])] == case["ids"]
    assert real.encode([case["text"]], max_length=20).tolist() == [case["tokenize20"]]


@needs_samples
def test_the_vocabulary_has_the_published_size_and_ends(real: CLIPTokenizer):
    assert len(real) == GOLD["vocab_size"] == 49408
    assert real.encode([""], 2).tolist() == [[GOLD["sot"], GOLD["eot"]]]


@needs_samples
def test_hugging_faces_edition_gives_the_same_ids(real: CLIPTokenizer, tmp_path: Path):
    lines = gzip.decompress((SAMPLES / "tokenizers" / "bpe_simple_vocab_16e6.txt.gz").read_bytes()).split(
        b"\n"
    )
    (tmp_path / "merges.txt").write_bytes(b"\n".join([b"#version: 0.2", *lines[1:48895]]) + b"\n")
    assert CLIPTokenizer(tmp_path / "merges.txt").ids == real.ids


@needs_samples
def test_every_fashioniq_caption_equals_transformers(real: CLIPTokenizer):
    captions = set()
    for file in sorted((SAMPLES / "fashioniq" / "captions").glob("*.val.json")):
        captions.update(caption for row in json.loads(file.read_text()) for caption in row["captions"])
    assert len(captions) > 5000
    captions = sorted(captions)
    straight = [
        caption.replace("’", "'") for caption in captions
    ]  # in one, which transformers leaves as it is
    assert real.encode(captions).tolist() == as_openai_pads(transformers_of(real), straight)


# a vocabulary of our own


def test_wild_text_equals_transformers(small: CLIPTokenizer):
    rng = random.Random(0)  # nothing that ftfy would mend, which transformers does not
    alphabet = ["red ", "dress", " shirt", "black", "caf", "'s", "'LL", "é", "e\u0301", "É", "İ", "ß", "ſ", "日本", "ば", "\u0928\u094d",
                "0", "7", "½", "²", "Ⅳ", "٣", "𝟘", "👗", "_", "-", "--", "...", "!!", "#", "$19.99", " ", "  ", "\t", "\n", "\u200b", "\xad"]  # fmt: skip
    texts = ["".join(rng.choices(alphabet, k=rng.randrange(20))) for _ in range(500)]
    assert small.encode(texts).tolist() == as_openai_pads(transformers_of(small), texts)


def test_words_are_cut_at_every_character_as_by_the_original_pattern():
    original = regex.compile(
        r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+",
        regex.IGNORECASE,
    )
    # Of the letters without case, most of them Chinese and Korean, every 50th. Not U+0345, a mark: to `regex`, where case
    # is ignored, it is a letter, since its capital is iota.
    categories = {c: unicodedata.category(c) for c in map(chr, range(0x110000)) if c != "\u0345"}
    known = [c for c, kind in categories.items() if kind not in ("Cn", "Cs", "Cc", "Co", "Lo")]
    known += [c for c, kind in categories.items() if kind == "Lo"][::50]
    text = "".join(f"a{c}{c}1!{c} " for c in known) + "<|endoftext|>'s don't_'re'D <|startoftext|"
    assert _word_pattern().findall(text) == original.findall(text)


def test_pieces_are_merged_in_the_order_they_were_learned(small: CLIPTokenizer):
    assert small.tokenize("Red  dress\n") == ["red</w>", "dress</w>"]
    assert small.tokenize("dred") == ["dr", "e", "d</w>"]  # d r was learned before r e, though red is a piece
    assert small.tokenize("oooooo") == ["oooo", "oo</w>"]


def test_shapes_and_types_do_not_depend_on_the_texts(small: CLIPTokenizer):
    for texts in ([""], ["red", "red dress " * 60], []):
        ids = small.encode(texts)
        assert ids.shape == (len(texts), 77) and ids.dtype == torch.int64


def test_a_long_text_loses_its_last_pieces_and_keeps_its_end(small: CLIPTokenizer):
    ids = small.encode(["red " * 75, "red " * 76, "red"])
    assert torch.equal(ids[0], ids[1]) and (ids[:2, -1] == len(small) - 1).all()
    assert ids[2, 2] == len(small) - 1 and (ids[2, 3:] == 0).all()
    assert ids.argmax(1).tolist() == [76, 76, 2]  # where the text tower looks


# what OpenAI lets ftfy do: every right side is ftfy 6.3.1's

MENDED = {
    "“smart” ‘quotes’": "\"smart\" 'quotes'",
    "women\xe2\x80\x99s black dress": "women's black dress",  # MGD's captions have twelve like it
    "cafÃ© â€œquotedâ€\x9d ðŸ˜€": 'café "quoted" 😀',
    "women\x92s": "women's",  # Windows' quote in a Latin-1 string, as FashionGen's are
    "ﬁne ﬀ ĳ ŉ Ǆ": "fine ff ij 'n dž",
    "ｈａｌｆ１２３　ﾊﾞ": "half123 バ",
    "cafe\u0301": "café",
    "a\x00b\x07\x7f\ufeffc\u200b\xad": "abc\u200b\xad",
    "\ud83d\ude00 \ud800 x": "😀 \ufffd x",
    "&ldquo;x&rdquo; &amp;amp; &eacute;": '"x" & é',
    "&amp;lt;b&amp;gt; &lt;i&gt;": "<b> <i>",
    " a\u2028b\x85c\xa0 d\u3000": "a b…c d",
    "CAFÉ™ Ça â la Ñ €5": "café™ ça â la ñ €5",  # and what is meant stays
}


@pytest.mark.parametrize("text", MENDED, ids=ascii)
def test_texts_are_mended_as_ftfy_does(text: str):
    assert clip_clean(text) == MENDED[text]


def test_no_text_is_too_odd(small: CLIPTokenizer):
    rng = random.Random(0)
    texts = ["".join(chr(rng.randrange(0x110000)) for _ in range(30)) for _ in range(100)]
    texts += ["".join(chr(rng.randrange(0x100)) for _ in range(30)) for _ in range(100)]
    assert small.encode(texts).shape == (200, 77)


# wrong files


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "cannot read the vocabulary"),
        (b"", "not CLIP's vocabulary"),
        (b"d r\ne s\n", "not CLIP's vocabulary"),
        (b"\xff\xfe", "cannot read the vocabulary"),
        (gzip.compress("\n".join(["#version: 0.2", *PAIRS]).encode())[:-20], "cannot read the vocabulary"),
        ("\n".join(["#version: 0.2", *PAIRS[:-1]]).encode(), "cut short"),
        ("\n".join(["#version: 0.2", *PAIRS[:-1], ""]).encode(), "cut short"),
        ("\n".join(["#version: 0.2", *PAIRS[:-1], "re"]).encode(), "cut short"),
        ("\n".join(["#version: 0.2", "d r x", *PAIRS[1:]]).encode(), "damaged: line 2 is no pair"),
        ("\n".join(["#version: 0.2", *PAIRS[:2], "en s</w>", *PAIRS[3:]]).encode(), "line 4, en s</w>, does not fit"),
        ("\n".join(["#version: 0.2", *PAIRS[:2], *PAIRS]).encode(), "line 4, d r, does not fit"),
        ("\r\n".join(["#version: 0.2", *PAIRS]).encode(), "line 2, d r\r, does not fit"),
    ],
)  # fmt: skip
def test_a_wrong_vocabulary_file_is_the_users_error(tmp_path: Path, content: bytes | None, message: str):
    path = tmp_path / "merges.txt"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError) as error:
        CLIPTokenizer(path, VOCAB_SIZE)
    assert message in str(error.value) and str(path) in str(error.value)


# helpers


@pytest.fixture(scope="module")
def real() -> CLIPTokenizer:
    return CLIPTokenizer(SAMPLES / "tokenizers" / "bpe_simple_vocab_16e6.txt.gz")


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> CLIPTokenizer:
    return CLIPTokenizer(write_merges(tmp_path_factory.mktemp("clip") / "merges.txt"), VOCAB_SIZE)


def transformers_of(ours: CLIPTokenizer) -> Theirs:
    return Theirs(vocab=ours.ids, merges=list(ours.ranks))


def as_openai_pads(theirs: Theirs, texts: list[str]) -> list[list[int]]:
    """Their ids, with zeros behind the text, where they repeat its end."""
    rows = theirs(texts, truncation=True, max_length=77)["input_ids"]
    return [row + [0] * (77 - len(row)) for row in rows]
