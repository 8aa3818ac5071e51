"""BLEU against pycocoevalcap 1.2 and FAME-ViL's nmt_bleu (captions.json)."""

import json

import numpy as np
import pytest

from eval.metrics import bleu as module
from eval.metrics.bleu import bleu, counts, nmt_bleu
from eval.metrics.ptb import ptb_words
from tests.faults import plant
from tests.goldens import GOLDEN

GOLD = json.loads((GOLDEN / "captions.json").read_text())
CORPORA = {"one reference": GOLD["coco"], "several": GOLD["multi"]["coco"]}
FAME_VIL = {"one reference": GOLD["fameville_like"], "several": GOLD["multi"]["fameville_like"]}


@pytest.mark.parametrize("name", CORPORA)
def test_a_corpus_scores_as_in_pycocoevalcap(name):
    same_as_the_original(CORPORA[name])


@pytest.mark.parametrize("name", CORPORA)
def test_a_corpus_scores_as_fame_vil_measures(name):
    same_as_fame_vils(name)


@pytest.mark.parametrize("part", [GOLD, GOLD["multi"]], ids=CORPORA)
def test_so_it_does_through_our_words(part):
    texts = [(part["hyps"][key][0], part["refs"][key]) for key in part["refs"]]
    each = np.stack([counts(ptb_words(h), [ptb_words(r) for r in refs]) for h, refs in texts])
    for n in range(4):
        assert abs(bleu(each.sum(0))[n] - part["coco"][f"Bleu_{n + 1}"]) < 1e-9


@pytest.mark.parametrize(
    ("target", "old", "new"),
    [
        ("counts", "most |=", "most +="),  # of several references: their sum, not the most
        ("counts", "own & most", "own"),
        ("counts", "(abs(length - h), length)", "(abs(length - h), -length)"),
        ("counts", "if shortest else min(lengths,", "if True else min(lengths,"),
        ("counts", "if shortest else min(lengths,", "if False else min(lengths,"),
        ("counts", "[*matches, *total, h, r]", "[*matches, *total, r, h]"),
        ("counts", "for n in range(1, N + 1)", "for n in range(2, N + 2)"),
        ("bleu", "** (1 / np.arange(1, N + 1))", ""),
        ("bleu", "total + SMALL", "total + 1e-15"),
        ("bleu", "np.minimum(0, 1 - (r + SMALL) / (h + TINY))", "0"),
        ("bleu", "np.minimum(0, 1 - (r + SMALL) / (h + TINY))", "1 - (r + SMALL) / (h + TINY)"),
        (
            "nmt_bleu",
            "np.log(matches / np.maximum(total, 1))",
            "np.log((matches + 1) / np.maximum(total + 1, 1))",
        ),
        ("nmt_bleu", "np.minimum(0, 1 - r / np.maximum(h, 1))[..., 0]", "0"),
        ("nmt_bleu", ".mean(-1)", ".sum(-1)"),
    ],
)
def test_a_wrong_line_is_noticed(target, old, new, monkeypatch):
    plant(monkeypatch, module, target, old, new)
    monkeypatch.setitem(globals(), target, getattr(module, target))
    with pytest.raises(AssertionError):
        for corpus in CORPORA.values():
            same_as_the_original(corpus)
        for name in CORPORA:
            same_as_fame_vils(name)
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
    far = [[*"abcde"], [*"abc"], ["a"]]
    assert [counts([*"abcd"], far, shortest)[-1] for shortest in (False, True)] == [3, 1]
    assert nmt_bleu(counts([*"abcd"], far[:1])) == pytest.approx(np.exp(1 - 5 / 4))
    assert nmt_bleu(counts([*"abcde"], [[*"abcdf"]])) == pytest.approx(0.2**0.25)


def test_nothing_at_all_scores_nothing():
    assert (bleu(counts([], [["a"]])) == 0).all()
    assert (bleu(np.zeros(10)) < 1e-5).all()
    assert (bleu(counts(["x"], [["a"]])) < 1e-5).all()
    for counted in (counts([], [["a"]]), np.zeros(10), counts(["a", "b"], [["a", "b"]])):
        assert nmt_bleu(counted) == 0  # no match of four words


def test_many_sums_are_scored_at_once():
    pairs = [
        (ptb_words(h), [ptb_words(r)])
        for h, r in zip(*(flat(GOLD[k]) for k in ("hyps", "refs")), strict=True)
    ]
    each = np.stack([counts(*pair) for pair in pairs])
    draws = np.random.default_rng(0).integers(0, 3, (7, len(pairs)))
    together = bleu(draws @ each)
    for weights, scores in zip(draws, together, strict=True):
        repeated = [each[i] for i, times in enumerate(weights) for _ in range(times)]
        assert np.array_equal(scores, bleu(np.sum(repeated, axis=0)))


# Helpers


def same_as_the_original(corpus: dict) -> None:
    refs, hyps = corpus["tokenized_refs"], corpus["tokenized_hyps"]
    each = np.stack([counts(hyps[key][0].split(), words_of(refs[key])) for key in refs])
    for n in range(4):
        assert abs(bleu(each.sum(0))[n] - corpus[f"Bleu_{n + 1}"]) < 1e-9
        np.testing.assert_allclose(bleu(each)[:, n], corpus[f"Bleu_{n + 1}_per"], rtol=1e-9, atol=1e-12)


def same_as_fame_vils(name: str) -> None:
    refs, hyps = CORPORA[name]["tokenized_refs"], CORPORA[name]["tokenized_hyps"]
    summed = sum(counts(hyps[key][0].split(), words_of(refs[key]), shortest=True) for key in refs)
    assert abs(nmt_bleu(summed) - FAME_VIL[name]["bleu4_nmt"]) < 1e-9
    np.testing.assert_allclose(summed[:4] / summed[4:8], FAME_VIL[name]["bleu_precisions"], atol=1e-9)
    h, r = summed[8:]
    assert abs(np.exp(min(0, 1 - r / h)) - FAME_VIL[name]["brevity_penalty"]) < 1e-9


def words_of(texts: list[str]) -> list[list[str]]:
    return [text.split() for text in texts]


def flat(texts: dict[str, list[str]]) -> list[str]:
    return [text for group in texts.values() for text in group]
