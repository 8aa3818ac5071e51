"""FashionGen's two protocols against the notes' golden, against loops in plain Python, and where they must tell apart."""

import json

import numpy as np
import pytest
import torch

from eval import gallery as module
from eval.gallery import AT, COLUMNS, WAYS, Gallery, among, among_figures, draw, full, full_figures
from eval.report import chance
from tests.faults import plant
from tests.goldens import GOLDEN

pytestmark = pytest.mark.usefixtures("one_thread")
GOLD = json.loads((GOLDEN / "recall.json").read_text())


# Against the golden


def test_the_full_gallery_equals_the_golden():
    figures, gold = full_figures(golden(), 0)["ours"], GOLD["random_full"]
    wanted = [gold[way][f"R@{k}"] for way in ("t2i", "i2t") for k in AT]
    assert [figures[k][0] for k in COLUMNS] == pytest.approx(wanted, abs=1e-4)
    assert figures["mean"][0] == pytest.approx(gold["mean_of_6"], abs=1e-4)
    exact = [100 * (r <= k).double().mean().item() for r in full(golden()) for k in AT]
    assert exact == pytest.approx(wanted, abs=1e-12)


def test_draws_of_the_same_sub_category_equal_the_golden():
    """Its own number of queries and negatives, of four sub-categories; the same functions, the same random numbers."""
    gold = GOLD["random_same_subcategory"]
    for way, name, negatives in ((WAYS[0], "t2i", 20), (WAYS[1], "i2t", 10)):
        found, sizes, asked = among(golden(), way, 0, queries=50, negatives=negatives)
        assert found.shape == asked.shape == (5, 50) and (sizes == 1 + negatives).all()
        for k in AT:
            assert 100 * (found <= k).double().mean().item() == pytest.approx(gold[name][f"R@{k}"], abs=1e-12)


# Against what can be counted by hand


def test_the_full_gallery_equals_a_loop(monkeypatch):
    g = random(7, (3, 1, 2, 4, 1, 1, 5), kinds=3)
    sim = torch.einsum("pd,nqd->pnq", g.texts, g.images).amax(-1)
    texts = [1 + sum(sim[p, n] >= max(sim[p, m] for m in range(17) if g.product[m] == p)
                     for n in range(17) if g.product[n] != p) for p in range(7)]  # fmt: skip
    images = [
        1 + sum(sim[p, n] >= sim[g.product[n], n] for p in range(7) if p != g.product[n]) for n in range(17)
    ]
    for block in (1, 4, 256):
        monkeypatch.setattr(module, "BLOCK", block)
        of_texts, of_images = full(g)
        assert of_texts.tolist() == texts and of_images.tolist() == images


def test_a_products_pictures_are_as_many_queries_and_any_of_them_answers():
    """One product has three pictures, of which its text finds but one."""
    texts = torch.eye(3)
    images = torch.stack([texts[0], texts[1], texts[1], texts[1], texts[2]])[:, None]
    g = Gallery(texts, images, torch.tensor([0, 0, 0, 1, 2]), torch.zeros(3).long())
    figures = full_figures(g, 0)["ours"]
    assert figures["text to image R@1"][0] == pytest.approx(
        200 / 3, abs=1e-3
    )  # 1 ties with 0's other pictures
    assert figures["image to text R@1"][0] == 60  # of five pictures three


def test_a_model_that_says_nothing_gets_nothing_and_a_perfect_one_everything():
    n = 60
    perfect = Gallery(torch.eye(n), torch.eye(n).repeat_interleave(2, 0)[:, None], torch.arange(n).repeat_interleave(2),
                      torch.zeros(n).long())  # fmt: skip
    dumb = Gallery(torch.ones(n, 4), torch.ones(2 * n, 1, 4), perfect.product, perfect.kind)
    for of in (full_figures, among_figures):
        assert all(figure == [100, 100, 100] for figure in of(perfect, 0)["ours"].values())
        assert all(figure == [0, 0, 0] for figure in of(dumb, 0)["ours"].values())
        assert of(perfect, 0)["texts shuffled"]["text to image R@1"][0] < 5


def test_candidates_are_the_sub_categorys_own_first_and_never_another_right_answer():
    rng = np.random.RandomState(0)
    answers, kinds = np.repeat(np.arange(9), 3), np.repeat([0, 0, 0, 0, 0, 0, 0, 1, 1], 3)
    asks, ask_kinds = np.arange(9), kinds[::3]
    for negatives, filled in ((18, 0), (20, 2)):
        queries, rows = draw(asks, answers, ask_kinds, kinds, rng, 9, negatives)
        assert sorted(queries) == [*range(9)] and rows.shape == (9, 1 + negatives)
        for q, row in zip(queries, rows, strict=True):
            assert answers[row[0]] == q and not (answers[row[1:]] == q).any() and len({*row}) == len(row)
            if q < 7:  # of 18 others of its sub-category
                assert (kinds[row[1:19]] == 0).all() and (kinds[row[19:]] == 1).sum() == filled
            else:
                assert (kinds[row[1:4]] == 1).all() and (kinds[row[4:]] == 0).all()  # three, then others
    queries, rows = draw(asks, answers, ask_kinds, kinds, rng, 4, 40)
    assert len(queries) == 4 and ((rows >= 0).sum(1) == 25).all()  # of all there are
    first = {
        draw(asks, answers, ask_kinds, kinds, np.random.RandomState(s), 9, 5)[1][:, 0].tobytes()
        for s in range(9)
    }
    assert len(first) > 5  # the right one is drawn, too


def test_what_is_missing_among_the_candidates_never_competes():
    g = random(5, (1, 1, 1, 1, 1), kinds=1)
    g = Gallery(-g.texts.abs(), g.images.abs(), g.product, g.kind)  # every score is negative
    found, sizes, _ = among(g, WAYS[0], 0, draws=1)
    assert (sizes == 5).all() and found.max() <= 5
    figures = among_figures(g, 0)
    assert figures["chance"]["text to image R@1"][0] == pytest.approx(20)
    assert figures["chance"]["text to image R@5"][0] == figures["ours"]["image to text R@10"][0] == 100


def test_scores_among_candidates_are_those_of_the_whole():
    g = random(30, (2,) * 30, kinds=2)
    sim = torch.einsum("pd,nqd->pnq", g.texts, g.images).amax(-1)
    for way, scores in zip(WAYS, (sim, sim.T), strict=True):
        rng, texts = np.random.RandomState(3), np.arange(30)
        sides = (texts, g.product.numpy(), g.kind.numpy(), g.kind[g.product].numpy())
        sides = sides if way == WAYS[0] else (sides[1], sides[0], sides[3], sides[2])
        found, _, asked = among(g, way, 3, draws=2, queries=20, negatives=8)
        for draw_ in range(2):
            queries, rows = draw(*sides, rng, 20, 8)
            assert asked[draw_].tolist() == queries.tolist()
            own = [
                1 + int((scores[q, row[1:]] >= scores[q, row[0]]).sum())
                for q, row in zip(queries, rows, strict=True)
            ]
            assert found[draw_].tolist() == own


# How sure it is


def test_intervals_are_over_products_and_as_wide_as_theory():
    """Four views of each of 400 products, all four hits or none: as few cases as products."""
    n = 400
    texts, product = torch.eye(n), torch.arange(n).repeat_interleave(4)
    images = torch.eye(n)[product]
    images[product % 4 == 0] *= -1  # a quarter of the products is wrong
    figures = full_figures(Gallery(texts, images[:, None], product, torch.zeros(n).long()), 0)["ours"]
    half = 196 * np.sqrt(0.75 * 0.25 / n)
    for way in WAYS:
        figure, low, high = figures[f"{way} R@1"]
        assert figure == 75 and abs(low - (75 - half)) < 1 and abs(high - (75 + half)) < 1


def test_queries_that_are_drawn_again_are_no_more_cases():
    n = 400
    texts = torch.eye(n)
    images = texts.clone()
    images[::4] *= -1
    g = Gallery(texts, images[:, None], torch.arange(n), torch.zeros(n).long())
    figure, low, high = among_figures(g, 0)["ours"]["text to image R@1"]  # every query, five times
    half = 196 * np.sqrt(0.75 * 0.25 / n)
    assert figure == 75 and abs(low - (75 - half)) < 1 and abs(high - (75 + half)) < 1


def test_the_spread_is_that_of_the_draws_and_chance_is_that_of_a_random_order():
    g = random(200, (1,) * 200, kinds=1)
    figures = among_figures(g, 0)
    for way in WAYS:
        each = [(r <= 1).double().mean().item() * 100 for r in among(g, way, 0)[0]]
        assert figures["spread of the draws"][f"{way} R@1"] == [pytest.approx(np.std(each, ddof=1))]
        assert figures["chance"][f"{way} R@5"] == [pytest.approx(500 / 101)]
        assert full_figures(g, 0)["chance"][f"{way} R@5"] == [pytest.approx(2.5)]
    assert chance(torch.tensor([3]), 40, 5) == pytest.approx(
        100 * (1 - 37 * 36 * 35 * 34 * 33 / (40 * 39 * 38 * 37 * 36))
    )


@pytest.mark.parametrize(
    ("name", "old", "new"),
    [
        ("draw", "same & ~right", "same"),
        ("draw", "np.flatnonzero(~same)", "np.flatnonzero(same & ~right)"),
        ("draw", "answer_kinds == ask_kinds[i]", "answer_kinds == answer_kinds[i]"),
        ("among", "-torch.inf", "0.0"),
        ("full", "== products", "!= products"),
        ("_of_products", "sums[:, -1:]", "sums[:, -2:-1]"),
    ],
)
def test_a_wrong_line_is_noticed(name, old, new, monkeypatch):
    plant(monkeypatch, module, name, old, new)
    for known in ("draw", "among", "full"):
        monkeypatch.setitem(globals(), known, getattr(module, known))
    with pytest.raises((AssertionError, ValueError)):
        test_the_full_gallery_equals_the_golden()
        test_draws_of_the_same_sub_category_equal_the_golden()
        test_candidates_are_the_sub_categorys_own_first_and_never_another_right_answer()
        test_what_is_missing_among_the_candidates_never_competes()


# Helpers


def golden() -> Gallery:
    rng = np.random.RandomState(7)
    product = np.repeat(np.arange(60), 3)
    texts = rng.randn(60, 16)
    images = texts[product] + 1.6 * rng.randn(180, 16)
    texts, images = (x / np.linalg.norm(x, axis=1, keepdims=True) for x in (texts, images))
    assert (texts @ images.T).sum() == pytest.approx(GOLD["random_full"]["checksum"], abs=1e-9)
    of = (texts, images[:, None], product, np.arange(60) % 4)
    return Gallery(*map(torch.from_numpy, of))


def random(products: int, views: tuple[int, ...], kinds: int) -> Gallery:
    rng = torch.Generator().manual_seed(products)
    product = torch.arange(products).repeat_interleave(torch.tensor(views))
    texts = torch.randn(products, 6, generator=rng)
    images = torch.randn(len(product), 3, 6, generator=rng)
    return Gallery(texts, images, product, torch.arange(products) % kinds)
