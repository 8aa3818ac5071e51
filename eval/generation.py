"""Try-on and design, measured: on drawn data against the known truth, on real data as a distance from real pictures.

    python -m eval.generation --data toy --out generation.json --sheet sheet.png
    python -m eval.generation --data toy --grid plms:50,plms:25,dpm++:20,ddim:10     samplers and steps, side by side, on val
    python -m eval.generation --data toy --guidances 1,1.5,2,3                       to choose the guidance, on val
    python -m eval.generation --data vitonhd=PATH --keep made/tryon                  FID and KID, paired and unpaired
    python -m eval.generation --data mgd=PATH --keep made/design                     from sketch and text; CLIP-S, too
    python -m eval.generation --data vitonhd=PATH --generated FOLDER                 pictures that are there, of any model

Of VITON-HD and MGD `eval.photos` tells the figures; the rest is ToyFashion's, where the same person drawn in the other
garment is known. Every person gets another's garment, of an attribute combination that training never saw, once from the
cloth photo, once from sketch and text. Pictures are pasted outside the mask as `infer.py` does, then compared with the truth:

    colour        %   main colour by ToyFashion's palette rule, on the true garment's pixels
    attributes    %   mean of category, pattern, second colour, sleeve, neckline and length as `eval.judge` reads them,
                      each over the cases whose condition tells it (`eval.judge.told`)
    IoU               garment pixels, found by the judge, against the true garment's
    PSNR          dB  on the true garment's pixels, mean over pictures (an exact copy counts as 99)
    KID, Frechet      all pictures against all truths, as the judge's encoder sees them: KID's and FID's formulas on the mean of
                      its last block (128), since Inception knows photographs. A Frechet distance has no interval
                      (`eval.metrics.fid`); what two halves of the truths are apart is told beside it
    changed           pixels outside the mask that are not the person's, in all pictures together: 0 by construction here,
                      where the mask pastes them; what `infer.py` writes is held to it by tests/test_infer.py

Beside the outputs: the truth, the truth through the VAE (the ceiling), and three controls: the garments shuffled between
cases, no condition at all (null context, no garment), and the person unchanged. Intervals: 95 %, bootstrap over cases (of
no width where all cases agree: 500 of 500 still leaves room for about 0.7 %), KID's by the jackknife.
"""

import argparse
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from itertools import product
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

from eval import guard, photos
from eval import judge as judging
from eval.judge import ATTRIBUTES, COLUMNS, Judge
from eval.metrics.fid import fid, fid_floor, kid_of_pairs
from eval.report import Fingerprint, about_run, interval, resampled, save_json, shuffled
from eval.sampling import Setting, draw, read, through_vae
from eval.truth import look, seen_in_training
from unifashion import Parser, UserError, cpu, sheets, training
from unifashion.config import PRESETS
from unifashion.data import read_json, toy
from unifashion.data.mgd import MGD
from unifashion.diffusion import SAMPLERS
from unifashion.model import UniFashion
from unifashion.preprocess import check_png_path, paste
from unifashion.tokenizers import WordPiece
from weights.load import learned_file, load_unifashion, tokenizer

CONDITIONS = ("cloth", "sketch+text")
MAIN = ("colour", "attributes", "IoU", "PSNR")
CEILING, SHUFFLED = "truth through the VAE", "garments shuffled"
FRECHET, KID = "Frechet (judge)", "KID x1000 (judge)"
ON_SHEET = 8
Make = Callable[[list[int]], list[np.ndarray]]  # indices of cases -> their pictures


class Cases:
    """The first `samples` unpaired cases of a split. What a model may see is in `data`; `truth` is for scoring alone."""

    def __init__(self, world: Path, split: str, samples: int) -> None:
        self.world, self.data = world, MGD(world / "vitonhd", split, paired=False)
        self.pairs = self.data.photos.pairs[:samples]
        owned = {row["id"]: toy.Garment(**row["garment"]) for row in toy.read_rows(world, split)}
        if lost := [cloth for _, cloth in self.pairs if cloth not in owned]:
            raise UserError(f"{world}/attributes_{split}.jsonl lacks {lost[0]}: draw this world anew")
        self.garments = [owned[cloth] for _, cloth in self.pairs]
        self.texts = [", ".join(self.data.captions[cloth[:5]]) for _, cloth in self.pairs]

    def __len__(self) -> int:
        return len(self.pairs)

    def person(self, i: int) -> tuple[np.ndarray, np.ndarray]:
        """Picture (h,w,3) and mask (h,w), 255 = repaint, both uint8."""
        item = self.data[i]
        return np.asarray(item["person"]), np.asarray(item["mask"])

    def truth(self, i: int) -> tuple[np.ndarray, np.ndarray]:
        """The person in the wanted garment (h,w,3) uint8, and that garment's pixels (h,w) bool."""
        name = "{}_{}.png".format(*self.pairs[i])
        open_ = self.data.photos.open
        return np.asarray(open_(f"truth/{name}")), np.asarray(open_(f"truth-mask/{name}", "L")) >= 128

    def shuffled(self, seed: int) -> list[int]:
        """For every case another one, each taken once, whose garment looks different. Raises UserError if none is."""
        return shuffled([look(g) for g in self.garments], seed)


def try_on(
    model: UniFashion, words: WordPiece, cases: Cases, condition: str | None, s: Setting, seed: int, of: list[int],
    indices: list[int],
) -> list[np.ndarray]:  # fmt: skip
    """
    The persons of cases `indices`, person i in the garment of case `of[i]`, before pasting: (h,w,3) uint8 each.

    condition   "cloth", "sketch+text", or None: null context and no garment
    """
    inputs = [read(cases.data, i, of[i], condition, model.cfg) for i in indices]
    return draw(model, words, inputs, s, seed, indices)


@dataclass
class Row:
    """What was measured on one kind of picture. `values` (n,9): the judge's COLUMNS of each case."""

    values: np.ndarray
    changed: int
    seconds: float  # per picture, without judging
    first: list[np.ndarray]
    features: np.ndarray | None = None  # (n,128), `overheard`


def measure(make: Make, cases: Cases, judge: Judge, batch: int, name: str, quiet: bool = True) -> Row:
    """Make the pictures of all cases, batch after batch, paste and score them; only the first few are kept."""
    values, changed, seconds, first = [], 0, 0.0, []
    bar = tqdm(total=len(cases), desc=name, disable=quiet)
    for start in range(0, len(cases), batch):
        indices = list(range(start, min(start + batch, len(cases))))
        began = time.perf_counter()
        made = make(indices)
        seconds += time.perf_counter() - began
        people = [cases.person(i) for i in indices]
        pictures = [paste(person, x, mask) for x, (person, mask) in zip(made, people, strict=True)]
        read, found = judge.read(np.stack(pictures))
        for i, picture, names, pixels in zip(indices, pictures, read, found, strict=True):
            values.append(judging.score(picture, *cases.truth(i), cases.garments[i], names, pixels))
        for picture, (person, mask) in zip(pictures, people, strict=True):
            changed += int(((picture != person).any(-1) & (mask != 255)).sum())
        first += pictures[: max(0, ON_SHEET - len(first))]
        bar.update(len(indices))
    bar.close()
    return Row(np.array(values), changed, seconds / len(cases), first)


@contextmanager
def overheard(judge: Judge) -> Iterator[list[np.ndarray]]:
    """What the judge's encoder sees in the pictures that it reads meanwhile: the means of its last block's channels, (b,128)."""
    found: list[np.ndarray] = []
    hook = judge.down[-1].register_forward_hook(lambda *call: found.append(call[-1].mean((2, 3)).numpy()))
    try:
        yield found
    finally:
        hook.remove()


def distances(row: Row, truth: Row) -> dict[str, float | list[float] | None]:
    """FID's and KID's formulas on the judge's features, of persons against the same persons. KID needs 3 of them."""
    a, b = row.features, truth.features
    kid = [round(1000 * x, 4) + 0.0 for x in kid_of_pairs(a, b, quiet=True)] if len(a) > 2 else None
    return {FRECHET: round(fid(a, b, quiet=True), 4) + 0.0, KID: kid}


def figures_of(values: np.ndarray, asked: np.ndarray) -> dict[str, np.ndarray]:
    """
    values, asked (n,9), a value counting where `asked` -> for each figure (1 + times,), as `report.resampled` draws them: by n
    alone, so that figures of two rows may be subtracted.
    """
    with np.errstate(invalid="ignore"):  # an attribute that no drawn case is asked for has no figure: nan
        means = resampled(np.where(asked, values, 0)) / resampled(asked)
        figures = {k: means[:, i] * (1 if k in ("IoU", "PSNR") else 100) for i, k in enumerate(COLUMNS)}
        six = np.stack([figures[k] for k in ATTRIBUTES])
        return figures | {"attributes": np.nansum(six, 0) / np.isfinite(six).sum(0)}


def compare(rows: dict[str, Row], cases: Cases, condition: str) -> dict[str, dict]:
    """Rows by name -> {"rows": {name: figures}, "differences": the output less its ceiling, less its shuffled control}."""
    told = [judging.told(condition, *pair) for pair in zip(cases.garments, cases.texts, strict=True)]
    asked = np.array([[k in ("IoU", "PSNR") or k in attributes for k in COLUMNS] for attributes in told])
    figures = {name: figures_of(row.values, asked) for name, row in rows.items()}
    shown = {name: {k: interval(v) for k, v in f.items()} for name, f in figures.items()}
    for name, row in rows.items():
        shown[name] |= {"changed": row.changed, "seconds": round(row.seconds, 4)}
        if row.features is not None:
            shown[name] |= distances(row, rows["truth"])
    less = {
        f"output less {name}": {k: interval(figures["output"][k] - figures[name][k]) for k in MAIN}
        for name in ((CEILING, SHUFFLED) if "output" in rows else ())
    }
    return {"rows": shown, "differences": less}


def table(condition: str, result: dict) -> str:
    """One condition's rows as text: the main figures with their intervals, then the single attributes."""

    def cell(figure: list[float | None], digits: int) -> str:
        return "-" if figure[0] is None else "{:.{d}f} [{:.{d}f}, {:.{d}f}]".format(*figure, d=digits)

    heads = [f"{k:>24}" for k in (*MAIN, KID)] + [f"{FRECHET:>17}"]
    heads += [f"{k:>10}" for k in (*ATTRIBUTES, "changed", "s/picture")]
    lines = [f"\n{condition:<33}" + "".join(heads)]
    for name, figures in {**result["rows"], **result["differences"]}.items():
        cells = [f"{cell(figures[k], 3 if k == 'IoU' else 1):>24}" for k in MAIN]
        if name in result["rows"]:
            cells += [f"{cell(figures[KID] or [None], 2):>24}", f"{figures[FRECHET]:>17.3f}"]
            cells += [
                f"{'-' if figures[k][0] is None else format(figures[k][0], '.1f'):>10}" for k in ATTRIBUTES
            ]
            cells += [f"{figures['changed']:>10}", f"{figures['seconds']:>10.3f}"]
        lines.append(f"{name:<33}" + "".join(cells))
    return "\n".join(lines)


def save_sheet(cases: Cases, outputs: list[list[np.ndarray]], path: Path) -> None:
    """The first cases as columns: person, mask, cloth, sketch, then `outputs`, a row each."""
    items = [cases.data[i] for i in range(min(ON_SHEET, len(cases)))]
    rows = [[item[k].convert("RGB") for item in items] for k in ("person", "mask", "cloth", "sketch")]
    pixels = [torch.from_numpy(np.stack([np.asarray(x) for x in row])) for row in (*rows, *outputs)]
    sheets.save_sheet([row.permute(0, 3, 1, 2) / 127.5 - 1 for row in pixels], path)


def settings_of(args: argparse.Namespace) -> list[Setting]:
    """One setting, or every pair of --grid and --guidances."""
    try:
        pairs = [pair.split(":") for pair in (args.grid or f"{args.sampler}:{args.steps}").split(",")]
        samplers = [(sampler, int(steps)) for sampler, steps in pairs]
        guidances = [float(g) for g in args.guidances.split(",")] if args.guidances else [args.guidance]
    except ValueError:
        raise UserError("--grid wants sampler:steps,sampler:steps; --guidances numbers: 1,1.5,2") from None
    return [Setting(sampler, steps, guidance) for sampler, steps in samplers for guidance in guidances]


def check_arguments(args: argparse.Namespace, settings: list[Setting]) -> None:
    """Raise UserError for what cannot be, before minutes of work."""
    for s in settings:
        if s.sampler not in SAMPLERS or not 2 <= s.steps <= 500 or not 0 <= s.guidance < float("inf"):
            raise UserError(f"{s}: wanted {' or '.join(SAMPLERS)}, 2 to 500 steps, a guidance from 0 up")
    if (args.grid or args.guidances) and args.split == "test":
        raise UserError("settings are chosen on val and reported on test: leave --split test out")
    if (args.samples is not None and args.samples < 2) or args.batch_size < 1 or args.judge_steps < 1:
        raise UserError("--samples must be at least 2, --batch-size and --judge-steps at least 1")
    if args.sheet:
        check_png_path(args.sheet)
    if args.out and (args.out.is_dir() or not os.access(args.out.parent, os.W_OK)):
        raise UserError(f"{args.out}: is a folder, or its folder cannot be written")


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser(description=__doc__)
    add = parser.add_argument
    add(
        "--data",
        required=True,
        metavar="NAME[=PATH]",
        help="toy | vitonhd | mgd, in data/NAME if no PATH is given",
    )
    add("--split", choices=["val", "test"], help="default test; val with --grid and --guidances")
    add("--samples", type=int, help="cases, the first ones (default: of toy 500, else all)")
    add("--preset", choices=list(PRESETS), default="tiny")
    add("--weights", type=Path, help="folder of the weights (default: the preset's own)")
    add("--sampler", choices=list(SAMPLERS), default="plms")
    add("--steps", type=int, default=50)
    add("--guidance", type=float, help="default: the preset's")
    add("--grid", metavar="SAMPLER:STEPS,...", help="measure each of these, without controls")
    add("--guidances", metavar="G,...", help="measure each of these, without controls")
    add("--batch-size", type=int, default=16)
    add("--seed", type=int, default=0)
    add("--device", default="auto", help="auto | cpu | cuda")
    add("--dtype", choices=["auto", "fp32", "bf16"], default="auto", help="auto: bf16 on CUDA, else fp32")
    add("--keep", type=Path, metavar="FOLDER", help="not of toy: pictures are made here, or go on to be")
    add("--generated", type=Path, metavar="FOLDER", help="not of toy: measure paired/ and unpaired/ in it")
    add("--judge", type=Path, default=Path("runs/judge"), help="where trained judges are kept (%(default)s)")
    add("--judge-steps", type=int, default=judging.STEPS, help="training steps of the judge (%(default)s)")
    add("--out", type=Path, metavar="JSON", help="write every figure here")
    add("--sheet", type=Path, metavar="PNG", help="write the first cases here, as pictures")
    add("--quiet", action="store_true", help="no progress bars")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    args, began = parse(argv), time.perf_counter()
    name, path = training.name_and_path(args.data, ("toy", "vitonhd", "mgd"))
    args.guidance = PRESETS[args.preset].guidance if args.guidance is None else args.guidance
    settings, controls = settings_of(args), not (args.grid or args.guidances)
    check_arguments(args, settings)
    if name != "toy":
        return photos.evaluate(name, path, settings[0], args, argv, began)
    if args.keep or args.generated:
        raise UserError(
            "--keep and --generated are of vitonhd and mgd: ToyFashion's pictures are made and forgotten"
        )
    cpu.fast_malloc()
    device = training.pick_device(args.device)
    dtype = training.compute_dtype(device, args.dtype)
    cpu.float32_where_faster(device, dtype)
    model = load_unifashion(args.preset, args.weights, device, dtype)
    words = tokenizer(args.preset, args.weights)
    world = training.toy_folder(path)
    split = args.split or ("test" if controls else "val")
    cases = Cases(world, split, args.samples or 500)
    if seen := seen_in_training(toy.read_rows(world, "train"), cases.garments):
        raise UserError(
            f"{seen} of {len(cases)} garments have a combination of attributes that training has seen: this is no test"
        )
    verdict = guard.verdict(
        learned_file(args.preset, args.weights),
        cases.data.root,
        "vitonhd",
        [],
        split,
        settings=guard.chosen_on(args.preset, args.guidance),
    )
    fingerprint = Fingerprint()
    for i in range(len(cases)):
        fingerprint.add(cases.data[i])
    judge, judge_key = judging.trained_judge(world, args.judge, args.judge_steps, args.quiet)

    def measured(name: str, make: Make) -> Row:
        with overheard(judge) as features:
            row = measure(make, cases, judge, args.batch_size, name, args.quiet)
        return replace(row, features=np.concatenate(features))

    def output(name: str, condition: str | None, s: Setting, of: list[int]) -> Row:
        return measured(name, partial(try_on, model, words, cases, condition, s, args.seed, of))

    own = list(range(len(cases)))
    rows: dict[str, dict[str, Row]] = {condition: {} for condition in CONDITIONS}
    for condition, s in product(CONDITIONS, settings):
        rows[condition]["output" if controls else str(s)] = output(f"{condition}, {s}", condition, s, own)
    truth = measured("truth", lambda indices: [cases.truth(i)[0] for i in indices])
    ceiling = measured(
        CEILING, lambda of: through_vae(model, [Image.fromarray(cases.truth(i)[0]) for i in of])
    )
    for condition in CONDITIONS:
        rows[condition] |= {CEILING: ceiling, "truth": truth}
    if controls:
        others, s = cases.shuffled(args.seed), settings[0]
        for condition in CONDITIONS:
            rows[condition][SHUFFLED] = output(f"{condition}, {SHUFFLED}", condition, s, others)
        nothing = output("no condition", None, s, own)
        unchanged = measured("person unchanged", lambda indices: [cases.person(i)[0] for i in indices])
        for condition in CONDITIONS:
            rows[condition] |= {"no condition": nothing, "person unchanged": unchanged}
    results = {condition: compare(rows[condition], cases, condition) for condition in CONDITIONS}

    on_truth = {k: results["cloth"]["rows"]["truth"][k][0] for k in COLUMNS}
    report = about_run("eval.generation", argv, args, model, began) | {
        "toyfashion": read_json(world / "toy.json"),
        "split": split,
        "samples": len(cases),
        "seen in training": seen,
        "settings": [s._asdict() for s in settings],
        "data sha256": str(fingerprint),
        **verdict.lines(),
        "palette rule on the truth": on_truth["colour"],
        "judge on the truth": {"fingerprint": judge_key, **{k: on_truth[k] for k in (*ATTRIBUTES, "IoU")}},
        f"{FRECHET}, two halves": round(fid_floor(truth.features), 4) if len(cases) > 3 else None,
    }
    if args.out:
        save_json({**report, "results": results}, args.out)
    if args.sheet:
        made = [next(iter(rows[condition].values())).first for condition in CONDITIONS]
        save_sheet(cases, [*made, truth.first], args.sheet)
    print(*(f"{name:<28}{value}" for name, value in report.items()), sep="\n")
    if on_truth["colour"] < 99:
        print("the palette rule is below 99 % on the truth: do not trust the colours")
    print(*(table(condition, results[condition]) for condition in CONDITIONS), sep="\n")


if __name__ == "__main__":
    training.run(main)
