"""Search by text, and from a picture to its text, on ToyFashion's held-out garments.

    python -m unifashion.data.toy --out data/toy-search --seed 1 --train 0 --val 0 --test 2000
    python -m eval.retrieval --data toy=data/toy-search

Candidates: one picture each of --samples garments that all look different (category, colour, pattern, its second colour,
sleeve, neckline, length), of attribute combinations that training never saw. Every picture's own text is a query against
all pictures, and every picture against all texts. Right is every pair of which the text is true (`texts.named`): texts of
the styles fashiongen, the default, and fashioniq-cap name every attribute, so that there is one; fashion200k's leave some out.

    R@K    %   of the queries with a right answer among the first K; a tie is a miss (`eval.metrics.recall`)

Beside the model: its own scores with the texts given to other pictures, and chance. Intervals: 95 %, bootstrap over garments.
"""

import argparse
import time

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from eval.captioning import draw
from eval.embed import cut_texts, embed_pictures, embed_texts
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
from eval.truth import ATTRIBUTES, Said, distinct, garments_of, seen_in_training, truth
from unifashion import Parser, UserError, training
from unifashion.data import read_json, toy
from unifashion.data.readers import READERS, in_toy
from unifashion.data.texts import named
from unifashion.search import text_to_image

AT = (1, 5, 10)
COLUMNS = tuple(f"{way} R@{k}" for way in ("text to image", "image to text") for k in AT)
PAPER = (71.41, 93.69, 97.47, 71.44, 93.79, 97.51, 87.55)  # Table 1, on FashionGen, and its mean


# What is searched


def true_pairs(said: list[Said], truths: list[Said]) -> Tensor:
    """What n texts name, and what is true of m garments -> (n,m) bool: everything that the text names is true."""
    values = [(k, value) for k in ATTRIBUTES for value in toy.ATTRIBUTES[k]]
    claims = torch.tensor([[value in s[k] for k, value in values] for s in said]).float()
    false = torch.tensor([[value not in t[k] for k, value in values] for t in truths]).float()
    return claims @ false.T == 0


# What the model says


# How it is judged


def judge(scores: Tensor, right: Tensor, seed: int) -> dict[str, dict[str, list[float]]]:
    """
    scores (n,n), rows texts and columns pictures, the pairs on the diagonal; right (n,n) bool -> {row: {column: figure}}
    """
    order = shuffled(range(len(scores)), seed)
    hits = {"ours": hits_of(scores, right), "texts shuffled": hits_of(scores[order], right)}
    figures = {row: shares(hit) for row, hit in hits.items()}
    lucky = [chance(answers.sum(1), len(scores), k) for answers in (right, right.T) for k in AT]
    figures["chance"] = {k: [x] for k, x in zip((*COLUMNS, "mean"), [*lucky, np.mean(lucky)], strict=True)}
    return figures


def hits_of(scores: Tensor, right: Tensor) -> np.ndarray:
    """-> (n,6) for the text and the picture of each pair whether a right answer is among the first 1, 5, 10."""
    both = ranks(scores, right), ranks(scores.T, right.T)
    return np.stack([(r <= k).double().numpy() for r in both for k in AT], 1)


def shares(hits: np.ndarray) -> dict[str, list[float]]:
    """hits (n,6) -> of each column and of their mean the figure in %, with its interval."""
    percent = 100 * resampled(hits) / len(hits)
    named_ = {k: interval(percent[:, i]) for i, k in enumerate(COLUMNS)}
    return named_ | {"mean": interval(percent.mean(1))}


# How it is told


def table(style: str, n: int, figures: dict[str, dict[str, list[float]]]) -> str:
    """Our rows, the paper's, and in what the protocols differ."""
    columns = (*COLUMNS, "mean")
    lines = [f"\n{f'{n} garments, {style}':<28}" + "".join(f"{k:>21}" for k in columns)]
    for row, shown in figures.items():
        lines.append(f"{row:<28}" + "".join(f"{cell(shown[k]):>21}" for k in columns))
    lines += [
        f"{'UniFashion, Table 1':<28}" + "".join(f"{x:>21}" for x in PAPER),
        f"protocol of ours: drawn pictures, all {n} are candidates; it says nothing about photographs.",
        "protocol of the paper's: FashionGen, each query among 100 candidates. The two cannot be compared.",
    ]
    return "\n".join(lines)


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser(description=__doc__)
    add = parser.add_argument
    add("--data", required=True, metavar="toy[=PATH]", help="ToyFashion, in data/toy if no PATH is given")
    add("--split", choices=["val", "test"], default="test", help="default %(default)s")
    add("--samples", type=int, default=1500, help="garments (default %(default)s, or all that differ)")
    add("--style", choices=list(READERS), default="fashiongen", help="of the texts (default %(default)s)")
    common_arguments(parser)
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    args, began = parse(argv), time.perf_counter()
    name, path = training.name_and_path(args.data, ("toy",))
    check_arguments(args)
    if args.samples < 2:
        raise UserError("--samples must be at least 2")
    model, words = load(args)
    world = training.toy_folder(path)
    data: Dataset = READERS[args.style](in_toy(world, args.style, args.quiet), args.split)
    picks = draw(data.products, len(data), args.seed)
    garments = garments_of(toy.read_rows(world, args.split), args.style, data, picks)
    kept = distinct(garments, args.samples)
    if len(kept) < 2:
        raise UserError(f"{args.data}: the split {args.split} has fewer than 2 garments that differ")
    picks, garments = [picks[i] for i in kept], [garments[i] for i in kept]
    if seen := seen_in_training(toy.read_rows(world, "train"), garments):
        raise UserError(
            f"{seen} of {len(garments)} garments have a combination of attributes that training has seen: this is no test"
        )

    texts = [data[i]["text"] for i in picks]
    images = embed_pictures(
        model, lambda i: data[picks[i]]["image"], len(picks), args.batch_size, "pictures", args.quiet
    )
    scores = text_to_image(embed_texts(model, words, texts, args.batch_size), images).cpu()
    right = true_pairs([named(text, args.style) for text in texts], [truth(g) for g in garments])
    figures = judge(scores, right, args.seed)

    most = model.cfg.qformer.max_text
    report = about_run("eval.retrieval", argv, args, model, began) | {
        "toyfashion": read_json(world / "toy.json"),
        "split": args.split,
        "style": args.style,
        "garments": len(garments),
        "seen in training": seen,
        "right answers a text": round(right.sum(1).double().mean().item(), 2),
        f"texts cut at {most} tokens": cut_texts(words, texts, most),
    }
    print(*(f"{k:<28}{value}" for k, value in report.items()), sep="\n")
    print(table(args.style, len(garments), figures))
    if args.out:
        save_json({**report, "figures": figures}, args.out)


if __name__ == "__main__":
    training.run(main)
