"""WordPiece against the original BertTokenizer + [DEC] (tokenizer_bert.json), and against transformers on wild text."""

import json
import os
import random
from pathlib import Path

import pytest
import torch
from transformers import BertTokenizer

from tests.goldens import GOLDEN
from unifashion import UserError
from unifashion.tokenizers import SPECIALS, WordPiece, blip_caption, build_vocab, read_query

GOLD = json.loads((GOLDEN / "tokenizer_bert.json").read_text())
SAMPLES = Path(os.environ.get("UNIFASHION_SAMPLES", "/nonexistent"))


@pytest.mark.parametrize("case", GOLD["cases"], ids=lambda case: ascii(case["text"][:24]))
def test_tokens_ids_and_cleaning_equal_the_original(case, tokenizer):
    assert tokenizer.tokenize(case["text"]) == case["tokens"]
    ids, mask = tokenizer.encode([case["text"]])
    assert ids[mask].tolist() == case["ids"]
    assert blip_caption(case["text"]) == case["blip_caption"]
    ids, mask = tokenizer.encode([case["blip_caption"]])
    assert ids[mask].tolist() == case["blip_caption_ids"]


@pytest.mark.parametrize("case", GOLD["cases"], ids=lambda case: ascii(case["text"][:24]))
def test_padding_and_truncation_equal_the_original(case, tokenizer):
    ids, mask = tokenizer.encode([case["text"]], max_length=16)
    assert ids.tolist() == [case["padded16_ids"]]
    assert mask.int().tolist() == [case["padded16_mask"]]
    assert tokenizer.is_cut(case["text"], max_length=16) == (len(case["ids"]) > 16)


def test_wild_unicode_equals_transformers(tokenizer, theirs):
    rng = random.Random(0)
    # No capital sigma: at the end of a word the original (Python) makes it ς, transformers 5 (Rust) σ. Golden "ΑΒς".
    alphabet = "aàßİıéñ dress red ς \u00c5\u212bÇ\u00ad\u200b\u00a0\u3000\u2028\t\n-–…“$€^|<日本服ばガ한\uf900ａ①\u0344ﬁ👗\x00\ufffd.,'"
    texts = ["".join(rng.choices(alphabet, k=rng.randrange(40))) for _ in range(500)]
    for text in texts:
        assert tokenizer.tokenize(text) == theirs.tokenize(text), ascii(text)


@pytest.mark.skipif(not SAMPLES.is_dir(), reason="needs the sample annotations: set UNIFASHION_SAMPLES")
def test_every_fashioniq_caption_in_berts_own_vocabulary_equals_transformers():
    path = SAMPLES / "tokenizers" / "bert_vocab.txt"
    ours = WordPiece(path)
    assert len(ours) == 30523 and ours.ids["[DEC]"] == 30522
    theirs = BertTokenizer(vocab=dict(zip(ours.tokens[:-1], range(30522), strict=True)), do_lower_case=True)
    captions = set()
    for file in sorted((SAMPLES / "fashioniq" / "captions").glob("*.val.json")):
        captions.update(caption for row in json.loads(file.read_text()) for caption in row["captions"])
    assert len(captions) > 5000
    captions = sorted(captions)
    ids, mask = ours.encode(captions)
    expected = theirs(captions, padding="max_length", truncation=True, max_length=64, return_tensors="pt")
    assert torch.equal(ids, expected["input_ids"])
    assert torch.equal(mask, expected["attention_mask"].bool())


def test_shapes_and_types_do_not_depend_on_the_texts(tokenizer):
    for texts in ([""], ["red", "red dress " * 60], []):
        ids, mask = tokenizer.encode(texts)
        assert ids.shape == mask.shape == (len(texts), 64)
        assert (ids.dtype, mask.dtype) == (torch.int64, torch.bool)


def test_a_text_of_exactly_max_length_is_not_cut(tokenizer):
    assert not tokenizer.is_cut("red " * 62) and tokenizer.is_cut("red " * 63)
    ids, _ = tokenizer.encode(["red " * 62, "red " * 63])
    assert torch.equal(ids[0], ids[1]) and ids[1, -1] == tokenizer.ids["[SEP]"]


def test_a_word_of_more_than_a_hundred_characters_is_unknown(tokenizer):
    assert tokenizer.tokenize("a" * 100) == ["aa"] + ["##aa"] * 49
    assert tokenizer.tokenize("a" * 101) == ["[UNK]"]


def test_a_caption_is_cut_at_fifty_words():
    assert blip_caption("Red " * 51) == " ".join(["red"] * 50)


def test_the_user_is_told_what_is_read_of_a_long_query(tokenizer):
    """Words are cut first; 50 are at times more than 62 tokens, and at times fewer."""
    for text, reads, told in (
        ("red " * 50, 50, []),
        ("red " * 51, 50, ["--text is too long: the model reads its first 50 words"]),
        ("zigzagged " * 51, 62, ["--text is too long: the model reads its first 62 tokens"]),
    ):
        ids, mask, notes = read_query(tokenizer, text, 64)
        assert (mask.sum() - 2, notes) == (reads, told)


def test_a_caption_loses_the_marks_of_the_original_and_no_other():
    assert blip_caption("a.b!c\"d(e)f*g#h:i;j~k,l'm-n?o/p&q") == "a b c d e f g h i j k,l'm-n?o/p&q"


def test_a_built_vocabulary_keeps_its_words_whole_and_breaks_others_into_pieces(tmp_path):
    vocab = build_vocab(["A red dress, café style", "red V-neck 日本"])
    assert vocab[:5] == SPECIALS and len(vocab) == len(set(vocab))
    assert vocab[-5:] == [
        "cafe",
        "dress",
        "neck",
        "red",
        "style",
    ]  # sorted: the order of the texts says nothing
    assert not {"##-", "##,", "##日"} & set(vocab)  # these are always words of their own
    path = tmp_path / "vocab.txt"
    path.write_text("\n".join(vocab), encoding="utf-8")
    tokenizer = WordPiece(path)
    assert tokenizer.ids["[DEC]"] == len(vocab) == len(tokenizer) - 1
    assert tokenizer.tokenize("red CAFE v-neck 日") == ["red", "cafe", "v", "-", "neck", "日"]
    assert tokenizer.tokenize("Zebra_9!") == ["z", "##e", "##b", "##r", "##a", "_", "9", "!"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "cannot read"),
        (b"\xff\xfe", "cannot read"),
        (b"red\ndress\n", "lacks [PAD] [UNK]"),
        ("\n".join([*SPECIALS, "red", "red"]).encode(), "twice"),
    ],
)
def test_a_wrong_vocabulary_file_is_the_users_error(tmp_path, content, message):
    path = tmp_path / "vocab.txt"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError) as error:
        WordPiece(path)
    assert message in str(error.value) and str(path) in str(error.value)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory) -> WordPiece:
    path = tmp_path_factory.mktemp("bert") / "vocab.txt"
    path.write_text("\n".join(GOLD["vocab"]) + "\n", encoding="utf-8")
    tokenizer = WordPiece(path)
    assert tokenizer.ids["[DEC]"] == GOLD["dec_id"]
    return tokenizer


@pytest.fixture(scope="module")
def theirs() -> BertTokenizer:
    vocab = {token: index for index, token in enumerate(GOLD["vocab"])}
    return BertTokenizer(vocab=vocab, do_lower_case=True)
