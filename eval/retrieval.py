"""Search by text, and from a picture to its text: on FashionGen's validation split, or on ToyFashion's held-out garments.

    python -m eval.retrieval --data fashiongen=PATH              real data, beside the published rows: `eval.gallery`
    python -m unifashion.data.toy --out data/toy-search --seed 1 --train 0 --val 0 --test 2000
    python -m eval.retrieval --data toy=data/toy-search

FashionGen: all pictures and all products, once everything against everything, once among 100 of the same sub-category; a file
that lacks rows, texts or pictures gets no figure, for among fewer candidates it would be better. ToyFashion's own shop has the
same layout: fashiongen=data/toy/fashiongen.

ToyFashion's candidates: one picture each of --samples garments that all look different (category, colour, pattern, its second colour,
sleeve, neckline, length), of attribute combinations that training never saw. Every picture's own text is a query against
all pictures, and every picture against all texts. Right is every pair of which the text is true (`texts.named`): texts of
the styles fashiongen, the default, and fashioniq-cap name every attribute, so that there is one; fashion200k's leave some out.

    R@K    %   of the queries with a right answer among the first K; a tie is a miss (`eval.metrics.recall`)

Beside the model: its own scores with the texts given to other products, and chance. Intervals: 95 %, bootstrap over garments,
of FashionGen over products, or over the queries that were drawn. Every report has the verdict of `eval.guard`.
"""

import argparse
import time
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from eval import guard
from eval.captioning import draw
from eval.embed import cut_texts, embed_pictures, embed_texts
from eval.gallery import (
    AT,
    COLUMNS,
    DRAWS,
    NEGATIVES,
    QUERIES,
    Figures,
    Gallery,
    among_figures,
    check_rows,
    full_figures,
)
from eval.metrics.recall import hits, ranks
from eval.report import (
    Fingerprint,
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
from unifashion.data.fashiongen import FashionGen
from unifashion.data.readers import READERS, in_toy
from unifashion.data.texts import named
from unifashion.search import text_to_image
from unifashion.seen import world_of
from weights.load import learned_file

PAPER = (71.41, 93.69, 97.47, 71.44, 93.79, 97.51, 87.55)  # Table 1, on FashionGen, and its mean
FAME_VIL = (62.86, 87.38, 93.52, 65.94, 91.92, 97.22, 83.14)  # its Table 1
FAME_VIL_FULL = 70.00  # the mean of six, in its Table 4; nothing more is published


# What is searched


def true_pairs(said: list[Said], truths: list[Said]) -> Tensor:
    """What n texts name, and what is true of m garments -> (n,m) bool: everything that the text names is true."""
    values = [(k, value) for k in ATTRIBUTES for value in toy.ATTRIBUTES[k]]
    claims = torch.tensor([[value in s[k] for k, value in values] for s in said]).float()
    false = torch.tensor([[value not in t[k] for k, value in values] for t in truths]).float()
    return claims @ false.T == 0


def whole(data: FashionGen, world: Path | None) -> tuple[Tensor, list[int]]:
    """-> of each row the number of its product (n,), and of each product its first row.

    world   the ToyFashion that the file is a part of

    Raises UserError if rows or texts are missing.
    """
    check_rows(data, world)
    if silent := [i for i, text in enumerate(data.texts) if not text]:
        raise UserError(f"{data.file}: {len(silent)} rows have no text, row {silent[0]} for one")
    first: dict[str, int] = {}
    for i, name in enumerate(data.products):
        first.setdefault(name, i)
    if len(first) < 2:
        raise UserError(f"{data.file} has fewer than 2 products")
    number = {name: k for k, name in enumerate(first)}
    return torch.tensor([number[name] for name in data.products]), list(first.values())


# How it is judged


def judge(scores: Tensor, right: Tensor, seed: int) -> dict[str, dict[str, list[float]]]:
    """
    scores (n,n), rows texts and columns pictures, the pairs on the diagonal; right (n,n) bool -> {row: {column: figure}}
    """
    order = shuffled(range(len(scores)), seed)
    found = {"ours": hits_of(scores, right), "texts shuffled": hits_of(scores[order], right)}
    figures = {row: shares(of) for row, of in found.items()}
    lucky = [chance(answers.sum(1), len(scores), k) for answers in (right, right.T) for k in AT]
    figures["chance"] = {k: [x] for k, x in zip((*COLUMNS, "mean"), [*lucky, np.mean(lucky)], strict=True)}
    return figures


def hits_of(scores: Tensor, right: Tensor) -> np.ndarray:
    """-> (n,6) for the text and the picture of each pair whether a right answer is among the first 1, 5, 10."""
    both = ranks(scores, right), ranks(scores.T, right.T)
    return torch.cat([hits(r, AT) for r in both], 1).numpy()


def shares(found: np.ndarray) -> dict[str, list[float]]:
    """found (n,6), `hits_of` -> of each column and of their mean the figure in %, with its interval."""
    percent = 100 * resampled(found) / len(found)
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


def gallery_table(figures: dict[str, Figures], pictures: int, products: int, drawn: bool) -> str:
    """FashionGen: our rows and the published ones, protocol by protocol."""
    columns = (*COLUMNS, "mean")
    published = {
        "full gallery": {"FAME-ViL": [*[""] * 6, FAME_VIL_FULL]},
        "random-100": {"UniFashion, Table 1": PAPER, "FAME-ViL, Table 1": FAME_VIL},
    }
    lines = []
    for protocol, rows in figures.items():
        lines.append(f"\n{protocol:<28}" + "".join(f"{k:>21}" for k in columns))
        lines += [
            f"{row:<28}" + "".join(f"{cell(shown[k]):>21}" for k in columns) for row, shown in rows.items()
        ]
        lines += [f"{row:<28}" + "".join(f"{x:>21}" for x in of) for row, of in published[protocol].items()]
    return "\n".join(
        [
            *lines,
            f"full gallery, protocol of ours and FAME-ViL's: all {products} texts and all {pictures} pictures; a text finds any picture "
            "of its product, a picture its product's text.",
            f"random-100, protocol of ours and FAME-ViL's: {min(QUERIES, products)} texts and {min(QUERIES, pictures)} pictures drawn by lot, each among 1 right answer and {NEGATIVES} wrong "
            f"ones of its sub-category (where it has fewer, others fill up), the mean of {DRAWS} draws. Ties are misses here; "
            "FAME-ViL takes the order that topk gives them, and its draws are not seeded.",
            "UniFashion's: 100 random candidates of the same category, as the paper has it; in its code fixed blocks of 100 rows, in a "
            "file that was never published. So it cannot be measured here, and its "
            "row, of 100 candidates, is not of this test.",
            *[
                "These pictures are drawn: they say nothing about photographs, and the published rows are of others."
            ]
            * drawn,
        ]
    )


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser(description=__doc__)
    add = parser.add_argument
    add(
        "--data",
        required=True,
        metavar="NAME[=PATH]",
        help="toy | fashiongen, in data/NAME if no PATH is given",
    )
    add("--split", choices=["val", "test"], help="of toy (default test); FashionGen has val")
    add("--samples", type=int, help="garments of toy (default 1500, or all that differ)")
    add("--style", choices=list(READERS), help="of toy's texts (default fashiongen)")
    common_arguments(parser)
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    args, began = parse(argv), time.perf_counter()
    name, path = training.name_and_path(args.data, ("toy", "fashiongen"))
    check_arguments(args)
    if name == "fashiongen":
        if args.split == "test" or args.samples is not None or args.style not in (None, name):
            raise UserError(
                "FashionGen is searched whole, and has the split val: leave --split, --samples and --style out"
            )
        return fashiongen(path, argv, args, began)
    args.split, args.style = args.split or "test", args.style or "fashiongen"
    args.samples = 1500 if args.samples is None else args.samples
    if args.samples < 2:
        raise UserError("--samples must be at least 2")
    toyfashion(training.toy_folder(path), argv, args, began)


def fashiongen(path: Path, argv: list[str] | None, args: argparse.Namespace, began: float) -> None:
    data, world = FashionGen(path, "validation"), world_of(path)
    product, first = whole(data, world)
    texts, kinds = [data.texts[i] for i in first], [data.subcategories[i] for i in first]
    verdict = guard.verdict(
        learned_file(args.preset, args.weights),
        path,
        "fashiongen",
        [data.products[i] for i in first],
        "val",
    )
    numbers = {kind: k for k, kind in enumerate(dict.fromkeys(kinds))}

    model, words = load(args)
    fingerprint = Fingerprint()
    rows = fingerprint.of(data)
    images = embed_pictures(
        model, lambda i: rows[i]["image"], len(data), args.batch_size, "pictures", args.quiet
    )
    g = Gallery(
        embed_texts(model, words, texts, args.batch_size),
        images,
        product,
        torch.tensor([numbers[kind] for kind in kinds]),
    )
    figures = {"full gallery": full_figures(g, args.seed), "random-100": among_figures(g, args.seed)}

    others = {product[i].item() for i, text in enumerate(data.texts) if text != texts[product[i]]}
    most = model.cfg.qformer.max_text
    report = about_run("eval.retrieval", argv, args, model, began)
    report |= {"toyfashion": read_json(world / "toy.json")} if world else {}
    report |= {
        "split": "validation",
        "pictures": len(data),
        "products": len(texts),
        "products of several texts": f"{len(others)}, of which the first is taken",
        "sub-categories": len(numbers),
        f"texts cut at {most} tokens": cut_texts(words, texts, most),
        "data sha256": str(fingerprint),
        **verdict.lines(),
    }
    if args.out:
        save_json({**report, "figures": figures}, args.out)
    print(*(f"{k:<28}{value}" for k, value in report.items()), sep="\n")
    print(gallery_table(figures, len(data), len(texts), drawn=world is not None))


def toyfashion(world: Path, argv: list[str] | None, args: argparse.Namespace, began: float) -> None:
    model, words = load(args)
    folder = in_toy(world, args.style, args.quiet)
    data: Dataset = READERS[args.style](folder, args.split)
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
    model_file = learned_file(args.preset, args.weights)
    verdict = guard.verdict(model_file, folder, args.style, data.products, args.split)

    fingerprint = Fingerprint()
    rows = fingerprint.of(data)
    texts = [data[i]["text"] for i in picks]
    images = embed_pictures(
        model, lambda i: rows[picks[i]]["image"], len(picks), args.batch_size, "pictures", args.quiet
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
        "data sha256": str(fingerprint),
        **verdict.lines(),
    }
    if args.out:
        save_json({**report, "figures": figures}, args.out)
    print(*(f"{k:<28}{value}" for k, value in report.items()), sep="\n")
    print(table(args.style, len(garments), figures))


if __name__ == "__main__":
    training.run(main)
