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
import json
import os
import shlex
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset
from tqdm import tqdm

from eval.captioning import ATTRIBUTES, Said, draw, garments_of, resampled, shuffled, truth
from eval.generation import interval, qformer_hash, seen_in_training
from eval.metrics.recall import ranks
from unifashion import Parser, UserError, runs, training
from unifashion.config import PRESETS
from unifashion.data import read_json, toy
from unifashion.data.readers import READERS, in_toy
from unifashion.data.texts import named
from unifashion.data.toy import Garment
from unifashion.model import UniFashion
from unifashion.preprocess import qformer_image
from unifashion.search import image_embeddings, text_embeddings, text_to_image
from unifashion.tokenizers import WordPiece, blip_caption
from weights.load import learned_file, load_unifashion, sha256, tokenizer

AT = (1, 5, 10)
COLUMNS = tuple(f"{way} R@{k}" for way in ("text to image", "image to text") for k in AT)
PAPER = (71.41, 93.69, 97.47, 71.44, 93.79, 97.51, 87.55)  # Table 1, on FashionGen, and its mean


# What is searched


def look(g: Garment) -> Garment:
    """Equal for garments that cannot be told apart: the second colour of a plain one is nowhere."""
    return replace(g, second=g.colour) if g.pattern == "plain" else g


def distinct(garments: list[Garment], samples: int) -> list[int]:
    """Indices of the first garments, `samples` at most, of which none looks like another."""
    first: dict[Garment, int] = {}
    for i, g in enumerate(garments):
        first.setdefault(look(g), i)
    return list(first.values())[:samples]


def true_pairs(said: list[Said], truths: list[Said]) -> Tensor:
    """What n texts name, and what is true of m garments -> (n,m) bool: everything that the text names is true."""
    values = [(k, value) for k in ATTRIBUTES for value in toy.ATTRIBUTES[k]]
    claims = torch.tensor([[value in s[k] for k, value in values] for s in said]).float()
    false = torch.tensor([[value not in t[k] for k, value in values] for t in truths]).float()
    return claims @ false.T == 0


# What the model says


def batches(n: int, size: int, name: str, quiet: bool) -> list[range]:
    """range(n) in pieces of `size`, with a progress bar."""
    pieces = [range(start, min(start + size, n)) for start in range(0, n, size)]
    return tqdm(pieces, desc=name, disable=quiet)


@torch.no_grad()
def embed_pictures(
    model: UniFashion, open_: Callable[[int], Image.Image], n: int, batch: int, name: str, quiet: bool
) -> Tensor:
    """n pictures, opened a batch at a time -> (n,32,256), on the model's device."""
    made = []
    for piece in batches(n, batch, name, quiet):
        made.append(image_embeddings(model, read_pictures(model, open_, piece)))
    return checked(torch.cat(made))


@torch.no_grad()
def embed_texts(model: UniFashion, words: WordPiece, texts: list[str], batch: int) -> Tensor:
    """-> (n,256), on the model's device."""
    made = []
    for piece in batches(len(texts), batch, "texts", quiet=True):
        made.append(text_embeddings(model, *read_texts(model, words, [texts[i] for i in piece])))
    return checked(torch.cat(made))


def read_pictures(model: UniFashion, open_: Callable[[int], Image.Image], piece: Sequence[int]) -> Tensor:
    side = model.cfg.vit.image_size[0]
    return torch.stack([qformer_image(open_(i), side) for i in piece]).to(model.device)


def read_texts(model: UniFashion, words: WordPiece, texts: list[str]) -> tuple[Tensor, Tensor]:
    ids, mask = words.encode([blip_caption(text) for text in texts], model.cfg.qformer.max_text)
    return ids.to(model.device), mask.to(model.device)


def cut_texts(words: WordPiece, texts: list[str], most: int) -> int:
    """How many of the texts the model does not read to their end."""
    whole = [blip_caption(text, max_words=len(text)) for text in texts]
    return sum(words.is_cut(w, most) or blip_caption(w) != w for w in whole)


def checked(embeddings: Tensor) -> Tensor:
    if not embeddings.isfinite().all():
        raise UserError("the numbers overflow: a file of weights is damaged")
    return embeddings


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


def chance(right: Tensor, n: int, k: int) -> float:
    """R@K in % of a random order of n candidates, `right` (b,) of them right for each query."""
    missed = torch.ones(len(right), dtype=torch.float64)
    for i in range(min(k, n)):
        missed *= (n - right - i).clamp(min=0) / (n - i)
    return 100 * (1 - missed.mean().item())


# How it is told


def cell(figure: Sequence[float]) -> str:
    """A figure with its interval, or alone; nothing for none."""
    if not figure:
        return ""
    return "{:.1f} [{:.1f}, {:.1f}]".format(*figure) if len(figure) == 3 else f"{figure[0]:.1f}"


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


def save_json(report: dict, path: Path) -> None:
    """The file is there whole or not at all."""
    new = path.with_name(f"{path.name}.new")
    new.write_text(json.dumps(report, indent=1) + "\n")
    new.replace(path)


def check_arguments(args: argparse.Namespace) -> None:
    """Raise UserError for what cannot be, before minutes of work."""
    if args.batch_size < 1 or args.seed < 0:
        raise UserError("--batch-size must be at least 1, --seed 0 or more")
    if args.out and (args.out.is_dir() or not os.access(args.out.parent, os.W_OK)):
        raise UserError(f"{args.out} cannot be written: --out wants a file in a folder that exists")


def common_arguments(parser: Parser) -> None:
    """The flags of all searches that are measured."""
    add = parser.add_argument
    add("--preset", choices=list(PRESETS), default="tiny", help="default %(default)s")
    add("--weights", type=Path, help="folder of the weights (default: the preset's own)")
    add("--batch-size", type=int, default=50, help="default %(default)s")
    add("--seed", type=int, default=0, help="of what is drawn and shuffled (default %(default)s)")
    add("--device", default="auto", help="auto | cpu | cuda")
    add("--dtype", choices=["auto", "fp32", "bf16"], default="auto", help="auto: bf16 on CUDA, else fp32")
    add("--out", type=Path, metavar="JSON", help="write every figure here")
    add("--quiet", action="store_true", help="no progress bars")


def load(args: argparse.Namespace) -> tuple[UniFashion, WordPiece]:
    training.fast_malloc()
    device = training.pick_device(args.device)
    dtype = training.compute_dtype(device, args.dtype)
    words = tokenizer(args.preset, args.weights)
    return load_unifashion(args.preset, args.weights, device, dtype, draws=False), words


def about_run(
    command: str, argv: list[str] | None, args: argparse.Namespace, model: UniFashion, began: float
) -> dict:
    """What a report says of how it came about."""
    return {
        "command": shlex.join(["python", "-m", command, *(sys.argv[1:] if argv is None else argv)]),
        "commit": runs.git_commit(),
        "preset": args.preset,
        "seed": args.seed,
        "dtype": "bf16" if model.dtype == torch.bfloat16 else "fp32",
        "device": model.device.type,
        "torch": torch.__version__,
        "qformer sha256": qformer_hash(model),
        "model sha256": sha256(learned_file(args.preset, args.weights)),
        "seconds": round(time.perf_counter() - began, 1),
    }


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
