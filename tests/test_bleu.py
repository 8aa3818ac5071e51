"""BLEU against pycocoevalcap 1.2 (captions.json), and our word splitter against PTBTokenizer where they agree."""

import json

import numpy as np
import pytest

from eval.metrics import bleu as module
from eval.metrics.bleu import bleu, counts, words
from tests.faults import plant
from tests.goldens import GOLDEN

GOLD = json.loads((GOLDEN / "captions.json").read_text())
CORPORA = {"one reference": GOLD["coco"], "several": GOLD["multi"]["coco"]}
BEYOND_US = ("It's a v-neck, striped top", "[1] {set}")  # brackets, # and @


@pytest.mark.parametrize("name", CORPORA)
def test_a_corpus_scores_as_in_pycocoevalcap(name):
    same_as_the_original(CORPORA[name])


@pytest.mark.parametrize(
    ("target", "old", "new"),
    [
        ("counts", "most |=", "most +="),  # of several references: their sum, not the most
        ("counts", "own & most", "own"),
        ("counts", "(abs(len(reference) - h), len(reference))", "(len(reference), len(reference))"),
        ("counts", "[*matches, *total, h, r]", "[*matches, *total, r, h]"),
        ("counts", "for n in range(1, N + 1)", "for n in range(2, N + 2)"),
        ("bleu", "** (1 / np.arange(1, N + 1))", ""),
        ("bleu", "total + SMALL", "total + 1e-15"),
        ("bleu", "np.minimum(0, 1 - (r + SMALL) / (h + TINY))", "0"),
        ("bleu", "np.minimum(0, 1 - (r + SMALL) / (h + TINY))", "1 - (r + SMALL) / (h + TINY)"),
    ],
)
def test_a_wrong_line_is_noticed(target, old, new, monkeypatch):
    plant(monkeypatch, module, target, old, new)
    monkeypatch.setitem(globals(), target, getattr(module, target))
    with pytest.raises(AssertionError):
        for corpus in CORPORA.values():
            same_as_the_original(corpus)
        test_figures_that_can_be_had_by_head()


def test_perfection_is_the_originals():
    refs = [words_of(texts) for texts in GOLD["coco"]["tokenized_refs"].values()]
    assert bleu(sum(counts(ref[0], ref) for ref in refs))[3] == pytest.approx(
        GOLD["identical"]["Bleu_4"], abs=1e-9
    )


def test_figures_that_can_be_had_by_head():
    def score(caption: str, *references: str) -> tuple[list[int], np.ndarray]:
        counted = counts(caption.split(), [reference.split() for reference in references])
        return counted.astype(int).tolist(), bleu(counted)

    counted, scores = score("a b c d e", "a b c d f")
    assert counted == [4, 3, 2, 1, 5, 4, 3, 2, 5, 5]
    assert scores == pytest.approx([0.8, 0.6**0.5, 0.4 ** (1 / 3), 0.2**0.25])
    assert score("a b", "a b c d")[1][0] == pytest.approx(np.exp(1 - 4 / 2))  # shorter: a penalty
    assert score("a b c d e", "a b c d")[1][0] == pytest.approx(0.8)  # longer: no reward
    assert score("a a a", "a b", "a a")[0][0] == 2  # as often as one reference has it, not all together
    assert score("a b c d", "a b c d e", "a")[1] == pytest.approx(
        [np.exp(1 - 5 / 4)] * 4
    )  # the nearest length
    assert score("x y", "x", "x y z")[0][-2:] == [2, 1]  # equally near: the shorter


def test_nothing_at_all_scores_nothing():
    assert (bleu(counts([], [["a"]])) == 0).all()
    assert (bleu(np.zeros(10)) < 1e-5).all()
    assert (bleu(counts(["x"], [["a"]])) < 1e-5).all()


def test_many_sums_are_scored_at_once():
    pairs = [(words(h), [words(r)]) for h, r in zip(*(flat(GOLD[k]) for k in ("hyps", "refs")), strict=True)]
    each = np.stack([counts(*pair) for pair in pairs])
    draws = np.random.default_rng(0).integers(0, 3, (7, len(pairs)))
    together = bleu(draws @ each)
    for weights, scores in zip(draws, together, strict=True):
        repeated = [each[i] for i, times in enumerate(weights) for _ in range(times)]
        assert np.array_equal(scores, bleu(np.sum(repeated, axis=0)))


@pytest.mark.parametrize("case", GOLD["tokenizer_cases"], ids=lambda case: ascii(case["in"][:20]))
def test_words_are_ptbs_but_for_brackets_and_signs(case):
    assert (words(case["in"]) == case["out"].split()) == (not case["in"].startswith(BEYOND_US))


def test_whole_captions_are_split_as_ptb_does():
    for kind in ("refs", "hyps"):
        for key, texts in GOLD[kind].items():
            assert [words(text) for text in texts] == words_of(GOLD["coco"][f"tokenized_{kind}"][key])


def test_words_of_strange_texts():
    assert words("") == words(" .,;:!?()- -- ...") == []
    assert words("Long-Sleeve V-neck dress.") == ["long-sleeve", "v-neck", "dress"]
    assert words("red/blue tee — no-one's\u2028top") == ["red/blue", "tee", "no-one", "'s", "top"]
    assert words("\ufffd") == []


# Helpers


def same_as_the_original(corpus: dict) -> None:
    refs, hyps = corpus["tokenized_refs"], corpus["tokenized_hyps"]
    each = np.stack([counts(hyps[key][0].split(), words_of(refs[key])) for key in refs])
    for n in range(4):
        assert abs(bleu(each.sum(0))[n] - corpus[f"Bleu_{n + 1}"]) < 1e-9
        np.testing.assert_allclose(bleu(each)[:, n], corpus[f"Bleu_{n + 1}_per"], rtol=1e-9, atol=1e-12)


def words_of(texts: list[str]) -> list[list[str]]:
    return [text.split() for text in texts]


def flat(texts: dict[str, list[str]]) -> list[str]:
    return [text for group in texts.values() for text in group]
