"""The four metrics with their intervals, and the other ways to measure, against captions.json and by hand."""

import json
import re

import numpy as np
import pytest

from eval import captions as module
from eval.captions import METRICS, as_fame_vil, as_released, beside_the_paper, bleu4, cell, scores
from eval.metrics.meteor import meteor
from tests.goldens import GOLDEN

GOLD = json.loads((GOLDEN / "captions.json").read_text())
HYPS, REFS = ([text for group in GOLD[k].values() for text in group] for k in ("hyps", "refs"))
IN_GOLD = {"BLEU-4": "Bleu_4", "ROUGE-L": "ROUGE_L", "CIDEr": "CIDEr", "METEOR": "METEOR"}
WITHOUT_JAR = ("BLEU-4", "ROUGE-L", "CIDEr")


@pytest.fixture(autouse=True)
def jar(monkeypatch) -> list[int]:
    """A jar that finds half the words matched, in a chunk: what it is asked, how many pairs at a time."""
    asked = []

    def counts(captions: list[list[str]], references: list[list[list[str]]]) -> np.ndarray:
        asked.append(len(captions))
        rows = [
            [len(c), len(r[0]), 0, 0, len(c) / 2, len(r[0]) / 2, *[0] * 14, 1, len(c) / 2, len(r[0]) / 2]
            for c, r in zip(captions, references, strict=True)
        ]
        return np.array(rows)

    monkeypatch.setattr(module, "meteor_counts", counts)
    return asked


# Figures


def test_whole_texts_score_as_in_pycocoevalcap():
    (figures,) = scores({"ours": (HYPS, REFS)}).values()
    assert tuple(figures) == METRICS
    for metric in WITHOUT_JAR:
        assert figures[metric][0] == pytest.approx(100 * GOLD["coco"][IN_GOLD[metric]], abs=1e-4)


@pytest.mark.parametrize(
    ("texts", "gold"),
    [
        (as_released(HYPS, REFS), GOLD["unifashion_metric_py"]),
        (as_released(HYPS, REFS)[::-1], GOLD["cut_to_100_chars_not_swapped"]),
        ((REFS, REFS), GOLD["identical"]),
        ((REFS[:1] * 2, REFS[:1] * 2), GOLD["single_identical_pair"]),
    ],
)
def test_so_do_other_texts(texts, gold):
    (figures,) = scores({"ours": texts}).values()
    for metric in WITHOUT_JAR:
        if IN_GOLD[metric] in gold:
            assert figures[metric][0] == pytest.approx(100 * gold[IN_GOLD[metric]], abs=1e-4), metric


def test_fame_vils_way_scores_as_its_metrics():
    figures, gold = as_fame_vil(HYPS, REFS), GOLD["fameville_like"]
    assert figures["BLEU-4"][0] == pytest.approx(100 * gold["bleu4_nmt"], abs=1e-4)
    assert figures["ROUGE-L"][0] == pytest.approx(100 * gold["rougeL_f1_mean"], abs=1e-4)
    assert set(figures) == {"BLEU-4", "ROUGE-L"}
    assert gold["cider"] == GOLD["coco"]["CIDEr"] and gold["meteor"] == GOLD["coco"]["METEOR"]


def test_bleu_is_of_the_corpus_in_percent():
    score, low, high = bleu4(["A b, c d e."] * 20, ["a b c d f"] * 20)
    assert score == pytest.approx(100 * 0.2**0.25, abs=1e-3) and low == high == score
    score, low, high = bleu4(["a b c d"] * 10 + ["x y z v"] * 10, ["a b c d"] * 20)
    assert score == pytest.approx(50, abs=1e-3) and low < 40 and high > 60


def test_rows_are_scored_apart_and_the_jar_asked_once(jar):
    rows = {"a": (HYPS, REFS), "b": (REFS[:3], REFS[:3]), "c": (HYPS[::-1], REFS)}
    together = scores(rows)
    assert jar == [13]
    assert together == {name: scores({name: row})[name] for name, row in rows.items()}


def test_intervals_have_the_width_of_theory():
    n, p = 400, 0.7
    captions = ["a b c d" if i < p * n else "x y z v" for i in range(n)]
    value, low, high = scores({"": (captions, ["a b c d"] * n)})[""]["ROUGE-L"]
    half = 196 * np.sqrt(p * (1 - p) / n)
    assert value == pytest.approx(70) and abs(low - (70 - half)) < 0.5 and abs(high - (70 + half)) < 0.5


def test_meteors_interval_is_of_the_summed_matches(monkeypatch):
    statistics = np.random.default_rng(0).integers(1, 9, (50, 23)).astype(float)
    monkeypatch.setattr(module, "meteor_counts", lambda *_: statistics)
    value, low, high = scores({"": (["a"] * 50, ["a"] * 50)})[""]["METEOR"]
    assert value == pytest.approx(100 * meteor(statistics.sum(0)), abs=1e-4) and low < value < high


def test_without_the_jar_meteor_is_not_measured(monkeypatch):
    monkeypatch.setattr(module, "meteor_counts", lambda *_: None)
    rows = scores({"a": (HYPS, REFS), "b": (REFS, REFS)})
    assert [row["METEOR"] for row in rows.values()] == [None, None] and rows["b"]["ROUGE-L"] == [100] * 3
    assert beside_the_paper(HYPS, REFS).count("not measured") == 3


def test_captions_without_words_score_nothing():
    figures = scores({"": (["", ". ,"], ["a b c d", "e"])})[""]
    assert all(figures[metric] == [0, 0, 0] for metric in WITHOUT_JAR)


# How it is told


def test_the_papers_row_stands_below_ours():
    lines = beside_the_paper(HYPS, REFS).splitlines()
    assert lines[1].split() == ["FashionGen", *METRICS]
    assert [re.split("  +", line)[0] for line in lines[2:6]] == [
        "ours, whole texts",
        "ours, as released",
        "ours, FAME-ViL's way",
        "UniFashion, Table 2",
    ]
    assert lines[5].split()[-4:] == ["35.53", "29.32", "54.59", "169.5"]
    whole, released, fame_vil = (re.split("  +", line)[1:] for line in lines[2:5])
    assert [text.split()[0] for text in whole[::2]] == ["41.1", "56.0"] and whole[3].startswith("386.1 [")
    assert [text.split()[0] for text in released[::2]] == ["40.3", "53.3"] and released[3] == "-"
    assert [text.split()[0] for text in fame_vil[::2]] == ["41.1", "56.4"]
    assert fame_vil[1::2] == whole[1::2]
    assert any("5 products" in line for line in lines[6:])


def test_cells():
    assert [cell(x) for x in (None, [], [None] * 3, [1.25, 0.0, 9.96])] == [
        "not measured",
        "-",
        "-",
        "1.2 [0.0, 10.0]",
    ]
