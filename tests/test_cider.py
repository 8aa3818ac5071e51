"""CIDEr-D against pycocoevalcap 1.2 (captions.json), and against the definition, in loops, on random texts."""

import json
import math
from collections import Counter

import numpy as np
import pytest

from eval.metrics import cider as module
from eval.metrics.cider import cider_d
from eval.metrics.ptb import ptb_words
from tests.faults import plant
from tests.goldens import GOLDEN

GOLD = json.loads((GOLDEN / "captions.json").read_text())
CORPORA = {"one reference": GOLD["coco"], "several": GOLD["multi"]["coco"]}


@pytest.mark.parametrize("name", CORPORA)
def test_captions_score_as_in_pycocoevalcap(name):
    same_as_the_original(CORPORA[name])


@pytest.mark.parametrize("part", [GOLD, GOLD["multi"]], ids=CORPORA)
def test_so_they_do_through_our_words(part):
    captions = [ptb_words(part["hyps"][key][0]) for key in part["refs"]]
    references = [[ptb_words(text) for text in texts] for texts in part["refs"].values()]
    assert abs(cider_d(captions, references).mean() - part["coco"]["CIDEr"]) < 1e-9


@pytest.mark.parametrize(
    ("target", "old", "new"),
    [
        ("cider_d", "sigma: float = 6.0", "sigma: float = 5.0"),
        ("cider_d", "/ (2 * sigma**2)", "/ sigma**2"),
        ("cider_d", "return 10 * ", "return "),
        ("cider_d", ", b) / each", ", b)"),
        ("cider_d", "range(1, N + 1)", "range(1, N)"),
        ("cider_d", "inside = at + n - 1 < end_of[at]", "inside = at + n - 1 < len(words)"),
        ("cosines", "np.minimum(ours, theirs) * theirs", "ours * theirs"),
        ("cosines", "np.log(b) - ", "np.log(b + 1) - "),
        ("cosines", "np.maximum(having, 1)", "(having + 1)"),
        ("cosines", "np.unique(picture * kinds + gram[of_reference]) % kinds", "gram[of_reference]"),
        ("cosines", "norm[owner] * norm[b:]", "norm[b:] * norm[b:]"),
        ("cosines", "times * (", "1 * ("),
    ],
)
def test_a_wrong_line_is_noticed(target, old, new, monkeypatch):
    plant(monkeypatch, module, target, old, new)
    with pytest.raises(AssertionError):
        for corpus in CORPORA.values():
            same_as_the_original(corpus)
        test_it_is_the_definitions()


def test_it_is_the_definitions():
    rng = np.random.default_rng(0)
    common = 1 / np.arange(1, 13)

    def text(most: int) -> list[str]:
        return list(rng.choice([*"abcdefghijkl"], rng.integers(0, most), p=common / common.sum()))

    captions = [text(30) for _ in range(60)]
    references = [[text(30) for _ in range(rng.integers(1, 4))] for _ in range(60)]
    np.testing.assert_allclose(
        module.cider_d(captions, references), by_loops(captions, references), atol=1e-12
    )


def test_figures_that_can_be_had_by_head():
    texts = [text.split() for text in ("a b c d e", "f g h i j", "k l m n o")]
    assert cider_d(texts, [[t] for t in texts]) == pytest.approx([10, 10, 10])
    assert cider_d(texts[::-1], [[t] for t in texts]) == pytest.approx([0, 10, 0])
    assert cider_d(texts[:1], [texts[:1]]).tolist() == [0]  # alone nothing is rare
    assert cider_d([["a"]] * 2, [[["a"]]] * 2).tolist() == [0, 0]  # nor what all have
    # A shorter text has fewer n-grams; one of three words has none of four.
    assert cider_d([[*"abc"], ["f"]], [[[*"abc"]], [["g"]]]) == pytest.approx([7.5, 0])
    # What is said twice does not count twice, but makes the vector longer, and the text longer by a word.
    said = cider_d([["a", "a"], ["f"]], [[["a"]], [["g"]]])
    assert said == pytest.approx([10 / 4 * 0.5 * math.exp(-1 / 72), 0])
    # Of several references the mean.
    assert cider_d([["a"], ["f"]], [[["a"], ["b"]], [["g"]]]) == pytest.approx([1.25, 0])


def test_texts_without_words_score_nothing():
    assert cider_d([[], ["a"], []], [[["a"]], [[]], [[]]]).tolist() == [0, 0, 0]
    assert cider_d([[]], [[[]]]).tolist() == [0]


def test_a_caption_without_a_reference_is_refused():
    for references in ([], [[]], [[["a"]], [["b"]]]):
        with pytest.raises(ValueError, match="reference"):
            cider_d([["a"]], references)


# Helpers


def same_as_the_original(corpus: dict) -> None:
    refs, hyps = corpus["tokenized_refs"], corpus["tokenized_hyps"]
    captions = [hyps[key][0].split() for key in refs]
    scores = module.cider_d(captions, [[text.split() for text in texts] for texts in refs.values()])
    np.testing.assert_allclose(scores, corpus["CIDEr_per"], atol=1e-9)
    assert abs(scores.mean() - corpus["CIDEr"]) < 1e-9


def by_loops(captions: list[list[str]], references: list[list[list[str]]]) -> list[float]:
    def grams(text: list[str], n: int) -> Counter:
        return Counter(tuple(text[i : i + n]) for i in range(len(text) - n + 1))

    scores = []
    for caption, group in zip(captions, references, strict=True):
        total = 0.0
        for reference in group:
            for n in (1, 2, 3, 4):
                having = Counter(g for texts in references for g in {g for t in texts for g in grams(t, n)})
                c, r = (
                    {g: k * math.log(len(captions) / max(1, having[g])) for g, k in grams(t, n).items()}
                    for t in (caption, reference)
                )
                dot = sum(min(c.get(g, 0), weight) * weight for g, weight in r.items())
                if dot:
                    dot /= math.hypot(*c.values()) * math.hypot(*r.values())
                total += dot * math.exp(-((len(caption) - len(reference)) ** 2) / 72) / 4
        scores.append(10 * total / len(group))
    return scores
