"""Ranks and recall against the notes' own code (recall.json)."""

import json

import numpy as np
import pytest
import torch

from eval.metrics import recall as module
from eval.metrics.recall import hits, ranks
from tests.faults import plant
from tests.goldens import GOLDEN

GOLD = json.loads((GOLDEN / "recall.json").read_text())


def recall(ranked: torch.Tensor, at: tuple[int, ...]) -> dict[int, float]:
    return dict(zip(at, (100 * hits(ranked, at).mean(0)).tolist(), strict=True))


def test_a_small_gallery_with_several_pictures_of_a_product_equals_the_notes():
    gold = GOLD["tiny_full"]
    sim = torch.tensor(gold["sim_text_x_image"])
    same = torch.tensor(gold["text_product"])[:, None] == torch.tensor(gold["image_product"])
    assert recall(ranks(sim, same), (1, 2, 3)) == wanted(gold["t2i"])
    assert recall(ranks(sim.T, same.T), (1, 2, 3)) == wanted(gold["i2t"])


def test_a_full_gallery_equals_the_notes():
    gold = GOLD["random_full"]
    rng = np.random.RandomState(7)
    product = np.repeat(np.arange(60), 3)
    text = rng.randn(60, 16)
    images = text[product] + 1.6 * rng.randn(180, 16)
    sim = torch.from_numpy(unit(text) @ unit(images).T)
    assert sim.sum().item() == pytest.approx(gold["checksum"], abs=1e-9)
    same = torch.arange(60)[:, None] == torch.from_numpy(product)
    both = [recall(ranks(sim, same), (1, 5, 10)), recall(ranks(sim.T, same.T), (1, 5, 10))]
    assert both == [wanted(gold["t2i"]), wanted(gold["i2t"])]
    assert sum(sum(r.values()) for r in both) / 6 == pytest.approx(gold["mean_of_6"])


def test_blocks_and_fashioniq_equal_the_notes():
    rng = np.random.RandomState(7)
    rng.randn(60, 16), rng.randn(180, 16)
    blocks = [torch.from_numpy(rng.randn(10, 10) + 1.5 * np.eye(10)) for _ in range(3)]
    places = torch.cat([ranks(block, torch.eye(10, dtype=torch.bool)) for block in blocks])
    assert recall(places, (1, 5, 10)) == wanted(GOLD["block"]["result"])
    scores = torch.from_numpy(rng.randn(40, 200))
    target = 7 * torch.arange(40) % 200
    scores[torch.arange(40), target] += 1.5
    places = ranks(scores, target[:, None] == torch.arange(200))
    assert recall(places, (10, 50)) == wanted(GOLD["fiq"]["result"])


def test_a_tie_is_a_miss():
    gold = GOLD["ties"]
    right = torch.arange(3)[None] == gold["target"]
    assert recall(ranks(torch.tensor(gold["sim"]), right), (1,)) == {1: gold["pessimistic_R@1"]}
    constant, right = torch.zeros(5, 20), torch.eye(5, 20, dtype=torch.bool)
    assert ranks(constant, right).tolist() == [20] * 5
    assert recall(ranks(constant, right), (1, 10, 20)) == {1: 0, 10: 0, 20: 100}


def test_right_answers_do_not_stand_before_each_other():
    scores = torch.tensor([[0.9, 0.8, 0.7, 0.7, 0.1]])
    for right, place in (([1, 0, 0, 0, 0], 1), ([1, 1, 0, 0, 0], 1), ([0, 1, 1, 1, 0], 2), ([0, 0, 1, 1, 0], 3),
                         ([0, 0, 1, 0, 0], 4), ([0, 0, 0, 0, 1], 5), ([1, 1, 1, 1, 1], 1)):  # fmt: skip
        assert ranks(scores, torch.tensor([right]).bool()).tolist() == [place], right


def test_what_is_not_a_number_is_never_a_hit():
    nan = torch.nan
    right = torch.tensor([[True, False, False]])
    assert ranks(torch.tensor([[nan, 0.1, 0.2]]), right).tolist() == [3]
    assert ranks(torch.tensor([[0.5, nan, 0.2]]), right).tolist() == [2]
    assert ranks(torch.tensor([[nan, nan, nan]]), right).tolist() == [3]
    assert ranks(torch.tensor([[-torch.inf, 0.1, -torch.inf]]), right).tolist() == [3]


def test_a_query_without_a_right_answer_is_an_error():
    with pytest.raises(ValueError, match="query 1 has no right answer"):
        ranks(torch.zeros(3, 2), torch.tensor([[True, False], [False, False], [True, True]]))


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("~(scores < best)", "(scores > best)"),
        ("1 + (~right", "(~right"),
        ("~right & ~(", "~("),
        (".amax(1", ".amin(1"),
    ],
)
def test_a_wrong_line_is_noticed(old, new, monkeypatch):
    plant(monkeypatch, module, "ranks", old, new)
    monkeypatch.setitem(globals(), "ranks", module.ranks)
    with pytest.raises(AssertionError):
        test_a_small_gallery_with_several_pictures_of_a_product_equals_the_notes()
        test_a_tie_is_a_miss()
        test_right_answers_do_not_stand_before_each_other()


# Helpers


def wanted(gold: dict[str, float]) -> dict[int, float]:
    return {int(k.removeprefix("R@")): pytest.approx(value, abs=1e-9) for k, value in gold.items()}


def unit(x: np.ndarray) -> np.ndarray:
    return x / np.linalg.norm(x, axis=1, keepdims=True)
