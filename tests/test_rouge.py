"""ROUGE-L against pycocoevalcap 1.2 and Google's rouge_score (captions.json), and its subsequences against the usual table."""

import json
import random
from functools import cache

import numpy as np
import pytest

from eval.metrics import rouge as module
from eval.metrics.ptb import ptb_words
from eval.metrics.rouge import common_subsequence, google_rouge_l, rouge_l
from tests.faults import plant
from tests.goldens import GOLDEN

GOLD = json.loads((GOLDEN / "captions.json").read_text())
CORPORA = {
    "one reference": (GOLD["coco"], GOLD["fameville_like"]),
    "several": (GOLD["multi"]["coco"], GOLD["multi"]["fameville_like"]),
}


@pytest.mark.parametrize("name", CORPORA)
def test_captions_score_as_in_the_originals(name):
    same_as_the_originals(*CORPORA[name])


@pytest.mark.parametrize("part", [GOLD, GOLD["multi"]], ids=CORPORA)
def test_so_they_do_through_our_words(part):
    texts = [(part["hyps"][key][0], part["refs"][key]) for key in part["refs"]]
    scores = [rouge_l(ptb_words(h), [ptb_words(r) for r in refs]) for h, refs in texts]
    assert abs(np.mean(scores) - part["coco"]["ROUGE_L"]) < 1e-9


@pytest.mark.parametrize(
    ("target", "old", "new"),
    [
        ("rouge_l", "beta: float = 1.2", "beta: float = 1.0"),
        ("rouge_l", "max(common) / len(caption)", "sum(common) / len(caption)"),
        ("rouge_l", "recall = max(", "recall = min("),
        ("rouge_l", "(recall + beta**2 * precision)", "(precision + beta**2 * recall)"),
        ("google_rouge_l", "beta=1.0", "beta=1.2"),
        (
            "google_rouge_l",
            "max(rouge_l(caption, [reference], beta=1.0) for reference in references)",
            "rouge_l(caption, references, beta=1.0)",
        ),
        ("common_subsequence", "ends + matches | ends - matches", "ends - matches"),
        ("common_subsequence", "| 1 << j", ""),
    ],
)
def test_a_wrong_line_is_noticed(target, old, new, monkeypatch):
    plant(monkeypatch, module, target, old, new)
    monkeypatch.setitem(globals(), target, getattr(module, target))
    with pytest.raises(AssertionError):
        for pair in CORPORA.values():
            same_as_the_originals(*pair)


def test_figures_that_can_be_had_by_head():
    def score(*texts: str, of=rouge_l) -> float:
        caption, *references = map(str.split, texts)
        return of(caption, references)

    assert score("a b c", "a b c") == score("a b c", "a b c", of=google_rouge_l) == 1
    p, r = 2 / 3, 2 / 4  # a ... c, gaps allowed
    assert score("a x c", "a b c d") == pytest.approx(2.44 * p * r / (r + 1.44 * p))
    assert score("a x c", "a b c d", of=google_rouge_l) == pytest.approx(2 * p * r / (p + r))
    assert score("c b a", "a b c", of=google_rouge_l) == pytest.approx(1 / 3)  # the order counts
    # The precision of one reference and the recall of another; Google's takes the better of the two.
    assert score("a b c d", "a b c d x x x x", "a") == 1
    assert score("a b c d", "a b c d x x x x", "a", of=google_rouge_l) == pytest.approx(2 / 3)
    assert score("", "a") == score("a", "") == score("", "") == score("a", "b") == 0
    assert score("", "a", of=google_rouge_l) == 0


def test_subsequences_are_the_longest():
    rng = random.Random(0)
    for _ in range(300):
        a, b = (rng.choices("abcde", k=rng.randrange(90)) for _ in range(2))

        @cache
        def longest(i: int, j: int, a=a, b=b) -> int:
            if 0 in (i, j):
                return 0
            if a[i - 1] == b[j - 1]:
                return longest(i - 1, j - 1) + 1
            return max(longest(i - 1, j), longest(i, j - 1))

        assert common_subsequence(a, b) == common_subsequence(b, a) == longest(len(a), len(b))


# Helpers


def same_as_the_originals(coco: dict, fame_vil: dict) -> None:
    refs, hyps = coco["tokenized_refs"], coco["tokenized_hyps"]
    pairs = [(hyps[key][0].split(), [ref.split() for ref in refs[key]]) for key in refs]
    np.testing.assert_allclose([rouge_l(*pair) for pair in pairs], coco["ROUGE_L_per"], atol=1e-9)
    np.testing.assert_allclose(
        [google_rouge_l(*pair) for pair in pairs], fame_vil["rougeL_f1_per"], atol=1e-9
    )
    assert abs(np.mean([rouge_l(*pair) for pair in pairs]) - coco["ROUGE_L"]) < 1e-9
    assert abs(np.mean([google_rouge_l(*pair) for pair in pairs]) - fame_vil["rougeL_f1_mean"]) < 1e-9
