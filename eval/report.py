"""What every evaluation says of itself: how it came about, and how sure its figures are.

Intervals are 95 %, by bootstrap: the cases are drawn again with replacement, a thousand times.
"""

import argparse
import hashlib
import json
import os
import shlex
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from unifashion import Parser, UserError, cpu, runs, training
from unifashion.config import PRESETS
from unifashion.model import UniFashion
from unifashion.search import qformer_hash
from unifashion.tokenizers import WordPiece
from weights.load import learned_file, load_unifashion, sha256, tokenizer

# How sure it is


def resampled(values: np.ndarray, times: int = 1000) -> np.ndarray:
    """values (n,...) -> (1+times,...): the sum over all pictures, then over as many drawn with replacement."""
    n = len(values)
    draws = np.random.default_rng(0).multinomial(n, np.full(n, 1 / n), times)
    return np.tensordot(np.concatenate([np.ones((1, n)), draws]), values, 1)


def interval(figure: np.ndarray) -> list[float | None]:
    """(1 + times,) -> the figure and the ends of its 95 % interval; None where nothing was asked."""
    ends = [np.nan] * 2 if np.isnan(figure[0]) else np.nanpercentile(figure[1:], (2.5, 97.5))
    return [None if np.isnan(x) else round(float(x), 4) + 0.0 for x in (figure[0], *ends)]


def cell(figure: Sequence[float]) -> str:
    """A figure with its interval, or alone; nothing for none."""
    if not figure:
        return ""
    return "{:.1f} [{:.1f}, {:.1f}]".format(*figure) if len(figure) == 3 else f"{figure[0]:.1f}"


def shuffled(looks: Sequence, seed: int) -> list[int]:
    """For every look another one, each taken once, that is not equal. Raises UserError if there is no such order."""
    for attempt in range(1000):
        order = torch.randperm(len(looks), generator=training.seeded("shuffled", seed, attempt)).tolist()
        if all(looks[i] != looks[j] for i, j in enumerate(order)):
            return order
    raise UserError(f"{len(looks)} cases are too much alike to shuffle them: take more")


def chance(right: Tensor, n: int, k: int) -> float:
    """R@K in % of a random order of n candidates, `right` (b,) of them right for each query."""
    missed = torch.ones(len(right), dtype=torch.float64)
    for i in range(min(k, n)):
        missed *= (n - right.double() - i).clamp(min=0) / (n - i)
    return 100 * (1 - missed.mean().item())


# How it came about


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


class Fingerprint:
    """sha256 over what is evaluated, in the order in which it is read: ids and texts, and the pixels of pictures."""

    def __init__(self) -> None:
        self.sha = hashlib.sha256()

    def add(self, thing):
        """-> the thing: a picture, a file's bytes, a text, a number, nothing, or a list, a tuple or a dict of such"""
        if isinstance(thing, Image.Image):
            self.sha.update(f"{thing.mode} {thing.size}".encode() + thing.tobytes())
        elif isinstance(thing, bytes):
            self.sha.update(f"{len(thing)} ".encode() + thing)
        elif isinstance(thing, (list, tuple)):
            self.sha.update(f"[{len(thing)}]".encode())
            for part in thing:
                self.add(part)
        elif isinstance(thing, dict):
            self.add(sorted(thing))
            self.add([thing[key] for key in sorted(thing)])
        else:  # its length first: "ab", "c" are not "a", "bc"
            text = str(thing).encode(errors="surrogateescape")
            self.sha.update(f"{len(text)} ".encode() + text)
        return thing

    def of(self, data: Dataset) -> "Watched":
        """The data set, whose items are added as they are read."""
        return Watched(data, self)

    def __str__(self) -> str:
        return self.sha.hexdigest()


class Watched:
    def __init__(self, data: Dataset, fingerprint: Fingerprint) -> None:
        self.data, self.fingerprint = data, fingerprint

    def __getitem__(self, i: int) -> dict:
        return self.fingerprint.add(self.data[i])


def save_json(report: dict, path: Path) -> None:
    """The file is there whole or not at all."""
    new = path.with_name(f"{path.name}.new")
    new.write_text(json.dumps(report, indent=1) + "\n")
    new.replace(path)


# How it is asked for


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


def check_arguments(args: argparse.Namespace) -> None:
    """Raise UserError for what cannot be, before minutes of work."""
    if args.batch_size < 1 or args.seed < 0:
        raise UserError("--batch-size must be at least 1, --seed 0 or more")
    if args.out and (args.out.is_dir() or not os.access(args.out.parent, os.W_OK)):
        raise UserError(f"{args.out} cannot be written: --out wants a file in a folder that exists")


def load(args: argparse.Namespace) -> tuple[UniFashion, WordPiece]:
    cpu.fast_malloc()
    device = training.pick_device(args.device)
    dtype = training.compute_dtype(device, args.dtype)
    cpu.float32_where_faster(device, dtype)
    words = tokenizer(args.preset, args.weights)
    return load_unifashion(args.preset, args.weights, device, dtype, draws=False), words
