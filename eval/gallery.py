"""FashionGen's two protocols of search, both ways: every picture has the text of its product, which its other pictures share.

    full gallery    every text against all pictures, and every picture against all texts (FAME-ViL's r@k_general)
    random-100      1000 texts, then 1000 pictures, drawn by lot, each against a right answer and 100 wrong ones of the same
                    sub-category (where it has fewer, others fill up), all drawn by lot, too; five times (FAME-ViL's r@k_kaleido)

A text is answered by any picture of its product, a picture by its product's text. A tie is a miss. Scores are float32 and
never all there at once: a block of queries is ranked, then the next.
"""

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from eval.metrics.recall import hits, ranks
from eval.report import chance, interval, resampled, shuffled
from unifashion import UserError
from unifashion.data import toy
from unifashion.data.fashiongen import FashionGen
from unifashion.search import text_to_image

AT = (1, 5, 10)
WAYS = ("text to image", "image to text")
COLUMNS = tuple(f"{way} R@{k}" for way in WAYS for k in AT)
BLOCK = 256  # queries that are ranked at a time
DRAWS, QUERIES, NEGATIVES = 5, 1000, 100
ROWS = 32_528  # of FashionGen's validation split
Figures = dict[str, dict[str, list[float]]]  # row -> column -> figure, and its interval


@dataclass(frozen=True)
class Gallery:
    """
    texts (p,d)      one a product
    images (n,q,d)
    product (n,)     of each picture the number of its product, int64
    kind (p,)        of each product the number of its sub-category, int64
    """

    texts: Tensor
    images: Tensor
    product: Tensor
    kind: Tensor

    def shuffled(self, seed: int) -> "Gallery":
        """Every product with another's text."""
        return replace(self, texts=self.texts[shuffled(range(len(self.texts)), seed)])


def check_rows(data: FashionGen, world: Path | None) -> None:
    """Raise UserError if validation is not whole; world: the ToyFashion that the file is a part of."""
    rows = 3 * len(toy.read_rows(world, "val")) if world else ROWS
    if len(data) != rows:
        raise UserError(
            f"{data.file} has {len(data)} rows, not {rows}, and of others the figures would be others: {data.SOURCE}"
        )


# Full gallery


def full(g: Gallery) -> tuple[Tensor, Tensor]:
    """-> ranks of the best right answer, of each text (p,) and of each picture (n,), on the CPU."""
    device = g.images.device
    of, products = g.product.to(device), torch.arange(len(g.texts), device=device)
    of_texts, of_images = [], []
    for i in range(0, len(g.texts), BLOCK):
        scores = text_to_image(g.texts[i : i + BLOCK], g.images)
        of_texts.append(ranks(scores, products[i : i + BLOCK, None] == of))
    for i in range(0, len(g.images), BLOCK):
        scores = text_to_image(g.texts, g.images[i : i + BLOCK]).T
        of_images.append(ranks(scores, of[i : i + BLOCK, None] == products))
    return torch.cat(of_texts).cpu(), torch.cat(of_images).cpu()


def full_figures(g: Gallery, seed: int) -> Figures:
    """Ours, with the texts shuffled, and chance. Intervals: 95 %, bootstrap over products, each with all its pictures."""
    n, p = len(g.images), len(g.texts)
    views = torch.bincount(g.product, minlength=p)
    found = {"ours": full(g), "texts shuffled": full(g.shuffled(seed))}
    figures = {row: _of_products(*of, g.product, views) for row, of in found.items()}
    lucky = [chance(views, n, k) for k in AT] + [chance(torch.ones(1), p, k) for k in AT]
    return figures | {"chance": _with_mean(lucky)}


def _of_products(
    of_texts: Tensor, of_images: Tensor, product: Tensor, views: Tensor
) -> dict[str, list[float]]:
    text_hits, image_hits = hits(of_texts, AT), hits(of_images, AT)
    of_views = torch.zeros(len(views), len(AT), dtype=torch.float64).index_add_(0, product, image_hits)
    counts = torch.stack([torch.ones(len(views)), views], 1)
    sums = resampled(torch.cat([text_hits, of_views, counts], 1).numpy())
    k = len(AT)
    percent = 100 * np.concatenate([sums[:, :k] / sums[:, -2:-1], sums[:, k : 2 * k] / sums[:, -1:]], 1)
    return _intervals(percent)


# Random-100


def draw(
    asks: np.ndarray, answers: np.ndarray, ask_kinds: np.ndarray, answer_kinds: np.ndarray,
    rng: np.random.RandomState, queries: int, negatives: int,
) -> tuple[np.ndarray, np.ndarray]:  # fmt: skip
    """
    asks, answers  the product of each possible query, and of each possible candidate
    kinds          their sub-categories

    -> the queries drawn (b,), and their candidates (b,1+negatives), the right one first. Where a sub-category has too few,
    others fill up; -1 where those are too few, too. The order of draws is the golden's: queries; then for each the right one, the
    wrong ones.
    """
    chosen = rng.permutation(len(asks))[:queries]
    candidates = np.full((len(chosen), 1 + negatives), -1)
    for row, i in zip(candidates, chosen, strict=True):
        right = answers == asks[i]
        same = answer_kinds == ask_kinds[i]
        mine = np.flatnonzero(right)
        row[0] = mine[rng.randint(len(mine))]
        wrong = rng.permutation(np.flatnonzero(same & ~right))[:negatives]
        if len(wrong) < negatives:
            others = rng.permutation(np.flatnonzero(~same))[: negatives - len(wrong)]
            wrong = np.concatenate([wrong, others])
        row[1 : 1 + len(wrong)] = wrong
    return chosen, candidates


def among(
    g: Gallery, way: str, seed: int, draws: int = DRAWS, queries: int = QUERIES, negatives: int = NEGATIVES
) -> tuple[Tensor, Tensor, Tensor]:
    """-> of each query that is drawn (draws,b) the rank of its right answer, among how many, and its number, on the CPU."""
    rng = np.random.RandomState(seed)
    texts, images = np.arange(len(g.texts)), g.product.numpy()
    kinds = g.kind.numpy(), g.kind[g.product].numpy()
    sides = (texts, images, *kinds) if way == WAYS[0] else (images, texts, *kinds[::-1])
    found, sizes, asked = [], [], []
    for _ in range(draws):
        chosen, candidates = draw(*sides, rng, queries, negatives)
        scores = torch.full(candidates.shape, -torch.inf, device=g.images.device)  # which never competes
        for row, i, of in zip(scores, chosen.tolist(), torch.from_numpy(candidates), strict=True):
            of = of[of >= 0].to(g.images.device)
            one = slice(i, i + 1)
            if way == WAYS[0]:
                row[: len(of)] = text_to_image(g.texts[one], g.images[of])[0]
            else:
                row[: len(of)] = text_to_image(g.texts[of], g.images[one])[:, 0]
        right = torch.zeros(candidates.shape, dtype=torch.bool, device=scores.device)
        right[:, 0] = True
        found.append(ranks(scores, right).cpu())
        sizes.append(torch.from_numpy((candidates >= 0).sum(1)))
        asked.append(torch.from_numpy(chosen))
    return torch.stack(found), torch.stack(sizes), torch.stack(asked)


def among_figures(g: Gallery, seed: int) -> Figures:
    """Ours, their standard deviation over the draws, with the texts shuffled, and chance. Intervals: bootstrap over queries."""
    found = {"ours": g, "texts shuffled": g.shuffled(seed)}
    of = {row: [among(gallery, way, seed) for way in WAYS] for row, gallery in found.items()}
    figures, spread = {}, []
    for row, ways in of.items():
        of_ways = [hits(r, AT) for r, _, _ in ways]  # (draws,b,3)
        shares = [_shares(h, asked) for h, (_, _, asked) in zip(of_ways, ways, strict=True)]
        figures[row] = _intervals(np.concatenate(shares, 1))
        if row == "ours":
            each = 100 * torch.cat([h.mean(1) for h in of_ways], 1)  # (draws,6)
            spread = torch.cat([each, each.mean(1, keepdim=True)], 1).std(0).tolist()
    sizes = [size.double() for _, size, _ in of["ours"]]
    lucky = [100 * (k / n).clamp(max=1).mean().item() for n in sizes for k in AT]
    columns = (*COLUMNS, "mean")
    return {
        "ours": figures["ours"],
        "spread of the draws": {k: [x] for k, x in zip(columns, spread, strict=True)},
        "texts shuffled": figures["texts shuffled"],
        "chance": _with_mean(lucky),
    }


def _shares(found: Tensor, asked: Tensor) -> np.ndarray:
    """found (draws,b,3), `hits` of the queries `asked` (draws,b), some of them drawn more than once -> (1+times,3) in %"""
    _, of = asked.flatten().unique(return_inverse=True)
    told = torch.cat([found, torch.ones_like(found[..., :1])], -1).flatten(0, 1)
    sums = resampled(torch.zeros(int(of.max()) + 1, 4, dtype=told.dtype).index_add_(0, of, told).numpy())
    return 100 * sums[:, :3] / sums[:, 3:]


def _intervals(percent: np.ndarray) -> dict[str, list[float]]:
    """(1+times,6) -> of each column and of their mean the figure with its interval."""
    named = {k: interval(percent[:, i]) for i, k in enumerate(COLUMNS)}
    return named | {"mean": interval(percent.mean(1))}


def _with_mean(figures: list[float]) -> dict[str, list[float]]:
    return {k: [x] for k, x in zip((*COLUMNS, "mean"), [*figures, float(np.mean(figures))], strict=True)}
