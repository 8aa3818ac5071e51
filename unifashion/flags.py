"""The flags of `infer.py tryon` and what is wrong with them, without torch: a mistyped one is told at once."""

import argparse
import math
from pathlib import Path

from unifashion import UserError


def tryon(p: argparse.ArgumentParser) -> None:
    p.add_argument("--person", type=Path, required=True, help="photo of a person, from the hips up or whole")
    garment = p.add_mutually_exclusive_group(required=True)
    garment.add_argument("--cloth", type=Path, help="photo of the garment, best on white")
    garment.add_argument("--sketch", type=Path, help="line drawing of the garment")
    p.add_argument("--text", help="what the garment is like, with --cloth or --sketch")
    where = p.add_mutually_exclusive_group()
    where.add_argument(
        "--mask",
        type=Path,
        help="picture as large as the person's: white = repaint, the garment and the arms",
    )
    where.add_argument("--box", type=four_numbers, metavar="x0,y0,x1,y1", help="in pixels (default: torso)")
    p.add_argument("--pose", type=Path, help="densepose picture of the person (default: none)")
    p.add_argument(
        "--model",
        choices=["unifashion", "stableviton", "paint-by-example"],
        default="unifashion",
        help="the last two are published, need none of our training, and read a --cloth only (default %(default)s)",
    )
    p.add_argument("--steps", type=int, default=50, help="2 to 500 (default %(default)s)")
    p.add_argument("--sampler", choices=["plms", "ddim", "dpm++"], default="plms", help="default %(default)s")
    p.add_argument(
        "--guidance",
        type=float,
        help="of the context, garment and text as the Q-Former reads them: 1 is none (default: the model's)",
    )
    p.add_argument("--seed", type=int, default=0, help="default %(default)s")
    p.add_argument(
        "--num", type=int, default=1, help="how many: out.png, out-1.png, ... (default %(default)s)"
    )
    p.add_argument("--out", type=Path, required=True, help="a .png; it gets the person's size")


def check_tryon(args: argparse.Namespace) -> None:
    """Raise UserError for numbers out of range, and for what a published model does not read."""
    if not 2 <= args.steps <= 500:
        raise UserError(f"--steps is {args.steps}, must be 2 to 500")
    if args.guidance is not None and not (args.guidance >= 0 and math.isfinite(args.guidance)):
        raise UserError(f"--guidance is {args.guidance}, must be a number from 0 up")
    if not 1 <= args.num <= 64:
        raise UserError(f"--num is {args.num}, must be 1 to 64: they run as one batch")
    if args.model != "unifashion":
        if args.sketch or args.text is not None:
            raise UserError(
                f"--model {args.model} reads photos of garments only: --cloth, no --sketch and no --text"
            )
        if args.pose and args.model == "paint-by-example":
            raise UserError("--model paint-by-example reads no --pose")


def four_numbers(text: str) -> tuple[int, ...]:
    try:
        x0, y0, x1, y1 = (int(part) for part in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not four whole numbers x0,y0,x1,y1") from None
    return x0, y0, x1, y1
