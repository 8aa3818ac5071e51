"""Composed search: a reference picture and what is to be changed, against all pictures of a pool.

    python -m eval.composed --data toy                           ToyFashion's held-out garments
    python -m eval.composed --data fashioniq=PATH                real data, beside the paper's row

                     s = max_q(e_cls . Z_T) + w (e_cls . Z_C), w = 1        with --captions, else the first term alone

Fashion-IQ: every query of val, its two texts joined as "C1 and c2", in the pool of its category (image_splits). ToyFashion:
the same files, but one pool of all pictures of the split; its truth is known, and whatever looks like the target is right.
Nowhere is the reference taken out of the pool, as in Fashion-IQ's own protocol: it is a wrong answer.

    R@K    %   of the queries with a right answer among the first K; a tie is a miss (`eval.metrics.recall`)

Captions of the pool (`infer.py caption`) must be written from the pictures alone: those that know the queries are refused
(`eval.leaks`). Beside the model: each term alone; the reference alone, once as its picture's own embedding against the others'
(mean over aligned queries), once with an empty text in place of the change; the text alone, once as a caption's embedding,
once with a white picture as its reference; the texts given to other references; and chance. Controls that have a query
have the captions' term, too, if there is one. Intervals: 95 %, bootstrap over queries.
"""

import argparse
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from eval import leaks
from eval.embed import cut_texts, embed_composed, embed_pictures, embed_texts
from eval.leaks import Leak
from eval.metrics.recall import ranks
from eval.report import (
    about_run,
    cell,
    chance,
    check_arguments,
    common_arguments,
    interval,
    load,
    resampled,
    save_json,
    shuffled,
)
from eval.truth import garments_of, look, seen_in_training
from unifashion import Parser, UserError, training
from unifashion.data import read_json, toy
from unifashion.data.fashioniq import FashionIQ, FashionIQCap, Triplet, absent_pictures, joined, picture_path
from unifashion.data.readers import in_toy
from unifashion.model import UniFashion
from unifashion.search import composed_scores, image_to_image, text_to_text
from unifashion.tokenizers import WordPiece

AT = (10, 50)
COMPOSED, NO_CAPTIONS, NO_IMAGES = "composed", "without captions", "captions alone"
PICTURE, EMPTY = "reference picture", "reference, empty text"
TEXT, WHITE, SHUFFLED = "text alone", "text, white reference", "texts shuffled"
CONTROLS = ((PICTURE, EMPTY), (TEXT, WHITE))  # of one half of a query; of each pair the better counts
PAPER = {  # Table 4: R@10, R@50, their mean, over the three categories
    "UniFashion, Table 4": (58.93, 76.93, 67.93),
    "the same, w/o captions": (55.27, 74.80, 65.04),
    "the same, w/o images": (40.12, 56.33, 48.22),
}
PROTOCOL = "protocol: drawn pictures, one pool of all; it says nothing about photographs."
PROTOCOL_OF_THE_PAPER = (
    "protocol of ours: all queries of val in the pools of image_splits; a tie is a miss. Of the paper's: the same pools, the last "
    "1 or 2 queries of each category dropped, captions that were written with the queries' texts at hand (eval.leaks). Fashion-IQ itself shows 143 of val's targets in train, "
    "under other categories' triplets."
)
Figure = list[float | None]


@dataclass
class Pool:
    """Pictures, and the queries that search among them: `right` (b,n) bool, what each may find."""

    name: str
    ids: list[str]
    rows: list[Triplet]
    right: Tensor

    @property
    def texts(self) -> list[str]:
        return [joined(row.captions) for row in self.rows]


# What is searched


def pools_of(data: FashionIQ) -> list[Pool]:
    """Fashion-IQ's own: a pool a category, one right answer a query. Raises UserError for a category without a query."""
    pools = []
    for name, ids in data.pools.items():
        rows = [row for row in data.rows if row.category == name]
        if not rows:
            raise UserError(f"{data.root}: there are no queries of {name}")
        targets = np.array([row.target for row in rows])
        pools.append(Pool(name, ids, rows, torch.from_numpy(targets[:, None] == np.array(ids))))
    return pools


def one_pool(data: FashionIQ, looks: dict[str, object]) -> Pool:
    """All categories together, and right is whatever looks like the target; looks: id -> what is equal for twins."""
    ids = [name for pool in data.pools.values() for name in pool]
    numbers: dict[object, int] = {}
    seen = {name: numbers.setdefault(looks[name], len(numbers)) for name in ids}
    targets, everything = (
        torch.tensor([seen[name] for name in names]) for names in ([row.target for row in data.rows], ids)
    )
    return Pool("all", ids, data.rows, targets[:, None] == everything)


def toy_pool(world: Path, data: FashionIQ, split: str) -> Pool:
    """`one_pool` of ToyFashion. Raises UserError if its garments are not the world's, or training has seen them."""
    known = FashionIQCap(data.root, split)
    garments = garments_of(toy.read_rows(world, split), "fashioniq-cap", known, list(range(len(known))))
    if seen := seen_in_training(toy.read_rows(world, "train"), garments):
        raise UserError(
            f"{seen} of {len(garments)} garments have a combination of attributes that training has seen: this is no test"
        )
    return one_pool(data, dict(zip(known.products, map(look, garments), strict=True)))


def check_pictures(data: FashionIQ, pools: list[Pool]) -> None:
    """Raise UserError if pictures are missing, or are none: among fewer candidates the figures would be better."""
    names = sorted({name for pool in pools for name in pool.ids})
    if gone := absent_pictures(data.root, ([name] for name in names)):
        raise UserError(
            f"{data.root} lacks {len(gone)} of {len(names)} pictures, {gone[0]} for one, and among fewer the figures would be "
            "better than they are: github.com/XiaoxiaoGuo/fashion-iq says how to get them"
        )
    paths = [data.root / picture_path(data.root, name) for name in names]
    if broken := [str(path.relative_to(data.root)) for path in paths if not is_picture(path)]:
        raise UserError(
            f"{data.root}: {len(broken)} of {len(paths)} pictures are damaged: {', '.join(broken)}"
        )


def is_picture(path: Path) -> bool:
    """Whether the file begins as a picture does, which is known at once; pixels are read later."""
    try:
        with Image.open(path):
            return True
    except Exception:  # a damaged file can make a decoder raise almost anything
        return False


def captions_of(files: list[Path], pool: Pool) -> list[dict]:
    """The rows of the files, one for each picture of the pool, in its order; of several styles that of fashioniq-cap.

    Of files that caption the same picture the one named after the pool counts, else the first: Fashion-IQ-Cap has a file a
    category, and 121 pictures are in two. Raises UserError for a picture without a caption, or with two in one file.
    """
    of: dict[str, dict[str | None, dict]] = {name: {} for name in pool.ids}
    for file in sorted(files, key=lambda file: f".{pool.name}." not in file.name):
        styles: dict[str, set[str | None]] = {name: set() for name in pool.ids}
        for row in leaks.read_rows(file):
            name, style = Path(row["image"]).stem, row.get("style")
            if name not in styles or not row["caption"].strip():
                continue
            if style in styles[name]:
                raise UserError(f"{file}: {row['image']} has two captions")
            styles[name].add(style)
            of[name].setdefault(style, row)
    if lacking := [name for name, rows in of.items() if not rows]:
        raise UserError(
            f"{', '.join(map(str, files))}: {len(lacking)} of {len(of)} pictures of the pool {pool.name} have no caption, "
            f"or an empty one, {lacking[0]} for one: infer.py caption --style fashioniq-cap writes them"
        )
    return [rows.get("fashioniq-cap", next(iter(rows.values()))) for rows in of.values()]


# What the model says


def search(
    model: UniFashion, words: WordPiece, data: FashionIQ, pool: Pool, captions: list[str] | None, args: argparse.Namespace
) -> dict[str, Tensor]:  # fmt: skip
    """captions, if any, in the order of the pool -> {row of the table: ranks (b,) of the best right answer}"""
    size, quiet = args.batch_size, args.quiet
    references, texts = [row.reference for row in pool.rows], pool.texts

    def reference(i: int) -> Image.Image:
        return data.open(references[i])

    def white(i: int) -> Image.Image:
        return Image.new("RGB", (256, 256), "white")

    def embed(of: list[str], what: str, open_: Callable[[int], Image.Image] = reference) -> Tensor:
        return embed_composed(model, words, open_, of, size, f"{pool.name}, {what}", quiet)

    images = embed_pictures(
        model, lambda i: data.open(pool.ids[i]), len(pool.ids), size, f"{pool.name}, pool", quiet
    )
    z_c = None if captions is None else embed_texts(model, words, captions, size)
    e_cls = embed(texts, "queries")
    place = {name: i for i, name in enumerate(pool.ids)}
    others = [texts[i] for i in shuffled(range(len(texts)), args.seed)]
    scores = {COMPOSED: composed_scores(e_cls, images, z_c)}
    if z_c is not None:
        scores |= {NO_CAPTIONS: composed_scores(e_cls, images), NO_IMAGES: text_to_text(e_cls, z_c)}
    scores |= {
        PICTURE: image_to_image(images[[place[name] for name in references]], images),
        EMPTY: composed_scores(embed([""] * len(texts), EMPTY), images, z_c),
        TEXT: composed_scores(embed_texts(model, words, texts, size), images, z_c),
        WHITE: composed_scores(embed(texts, WHITE, white), images, z_c),
        SHUFFLED: composed_scores(embed(others, SHUFFLED), images, z_c),
    }
    return {row: ranks(of.cpu(), pool.right) for row, of in scores.items()}


# How it is judged


def recalls(ranked: Tensor) -> np.ndarray:
    """ranks (b,) -> (1+times,3): R@10, R@50 and their mean in %, of all queries, then of as many drawn with replacement."""
    hits = torch.stack([ranked <= k for k in AT], 1).double().numpy()
    both = 100 * resampled(hits) / len(hits)
    return np.concatenate([both, both.mean(1, keepdims=True)], 1)


def judge(found: dict[str, dict[str, Tensor]], pools: list[Pool]) -> dict[str, dict]:
    """
    found  {pool: `search`'s ranks}
    ->     {"recall": {row: {pool: figures}}, "controls": the better of each of CONTROLS, "differences": {name: figures}}

    figures: [R@10, R@50, mean], each with its interval; the pool "mean" is the mean over pools.
    """

    def shown(values: np.ndarray) -> list[Figure]:
        return [interval(column) for column in values.T]

    drawn = {
        row: {name: recalls(of[row]) for name, of in found.items()} for row in next(iter(found.values()))
    }
    means = {row: np.mean(list(of.values()), axis=0) for row, of in drawn.items()}
    table = {
        row: {name: shown(v) for name, v in of.items()} | {"mean": shown(means[row])}
        for row, of in drawn.items()
    }
    lucky = {p.name: [chance(p.right.sum(1), len(p.ids), k) for k in AT] for p in pools}
    lucky["mean"] = np.mean(list(lucky.values()), axis=0).tolist()
    table["chance"] = {name: [[a], [b], [(a + b) / 2]] for name, (a, b) in lucky.items()}
    controls = [max(pair, key=lambda row: means[row][0, 0]) for pair in CONTROLS]
    less = {f"composed less {row}": shown(means[COMPOSED] - means[row]) for row in controls}
    return {"recall": table, "controls": controls, "differences": less}


# How it is told


def table(result: dict[str, dict], paper: bool) -> str:
    """A row a way of searching, three columns a pool, and what composing is worth."""

    def line(name: str, figures: Sequence[Figure]) -> str:
        return f"{name:<38}" + "".join(f"{cell(figure):>22}" for figure in figures)

    rows = result["recall"]
    pools = list(rows[COMPOSED]) if len(rows[COMPOSED]) > 2 else ["mean"]  # of one pool the mean is that pool
    kinds = [f"R@{k}" for k in AT] + ["mean"]
    heads = [kind if len(pools) == 1 else f"{pool} {kind}" for pool in pools for kind in kinds]
    lines = [f"\n{'':<38}" + "".join(f"{head:>22}" for head in heads)]
    lines += [line(row, [figure for pool in pools for figure in of[pool]]) for row, of in rows.items()]
    if paper:
        skipped = " " * 22 * 3 * (len(pools) - 1)
        lines += [f"{k:<38}{skipped}" + "".join(f"{x:>22.2f}" for x in of) for k, of in PAPER.items()]
    skipped = 3 * (len(pools) - 1)
    lines += [line(k, [[]] * skipped + of) for k, of in result["differences"].items()]
    return "\n".join(lines)


def verdict(checked: dict[str, Leak]) -> str:
    """What the leak guard says of the captions."""
    leaky = {name: "; ".join(leak.reasons) for name, leak in checked.items() if leak.reasons}
    if leaky:
        return "LEAKY, and allowed: " + ". ".join(f"{name}: {reasons}" for name, reasons in leaky.items())
    return "none found. " + ". ".join(f"{name}: {leak.figures()}" for name, leak in checked.items())


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser(description=__doc__)
    add = parser.add_argument
    add(
        "--data",
        required=True,
        metavar="NAME[=PATH]",
        help="toy | fashioniq, in data/NAME if no PATH is given",
    )
    add("--split", choices=["val", "test"], help="default: of toy test, of fashioniq val")
    add(
        "--captions", type=Path, nargs="+", metavar="FILE", help="of all pictures of the pools, jsonl or json"
    )
    add("--allow-leaky-captions", action="store_true", help="use captions that know the queries, and say so")
    common_arguments(parser)
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    args, began = parse(argv), time.perf_counter()
    name, path = training.name_and_path(args.data, ("toy", "fashioniq"))
    check_arguments(args)
    if name == "fashioniq" and args.split == "test":
        raise UserError("Fashion-IQ's test has no published targets: leave --split out")
    split = args.split or ("test" if name == "toy" else "val")
    world = training.toy_folder(path) if name == "toy" else None
    folder = in_toy(world, "fashioniq", args.quiet) if world else path
    data = FashionIQ(folder, split, pictures=False)  # captions that leak are refused without a picture
    pools = [toy_pool(world, data, split)] if world else pools_of(data)
    captions: dict[str, list[dict]] = {}
    verdicts: dict[str, Leak] = {}
    for pool in pools if args.captions else []:
        rows = captions[pool.name] = captions_of(args.captions, pool)
        asked = [(text, row.target) for text, row in zip(pool.texts, pool.rows, strict=True)]
        verdicts[pool.name] = leaks.check(rows, asked, pool.ids, args.allow_leaky_captions)
    check_pictures(data, pools)

    model, words = load(args)
    found = {}
    for pool in pools:
        texts = [row["caption"] for row in captions[pool.name]] if captions else None
        found[pool.name] = search(model, words, data, pool, texts, args)
    result = judge(found, pools)

    report = about_run("eval.composed", argv, args, model, began)
    report |= {"toyfashion": read_json(world / "toy.json")} if world else {}
    report |= {
        "split": split,
        "queries": {pool.name: len(pool.rows) for pool in pools},
        "candidates": {pool.name: len(pool.ids) for pool in pools},
        "right answers a query": {p.name: round(p.right.sum(1).double().mean().item(), 2) for p in pools},
        "reference": "stays in the pool, as a wrong answer",
        "captions": " ".join(map(str, args.captions)) if args.captions else "none: the pictures' term alone",
    }
    if captions:
        most, rows = model.cfg.qformer.max_text, [row for of in captions.values() for row in of]
        cut = cut_texts(words, [row["caption"] for row in rows], most)
        report[f"captions cut at {most} tokens"] = f"{cut} of {len(rows)}"
        report["captions by"] = ", ".join(sorted({str(row.get("model", "unknown")) for row in rows}))
        report["leaks"] = verdict(verdicts)
    print(*(f"{k:<28}{value}" for k, value in report.items()), sep="\n")
    print(table(result, paper=world is None))
    print(PROTOCOL if world else PROTOCOL_OF_THE_PAPER)
    if args.out:
        save_json({**report, **result, "leak": {k: asdict(v) for k, v in verdicts.items()}}, args.out)


if __name__ == "__main__":
    training.run(main)
