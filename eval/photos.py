"""Try-on on VITON-HD and design on MGD's annotations: how far made pictures are from real ones, and from their texts.

    FID         to the persons' photographs; beside it what two halves of these are apart, its floor
    KID x1000   of all pictures; then without a picture's own pair (`eval.metrics.fid.kid_of_pairs`), with its interval; then
                mean and deviation of random subsets, which is what papers print
    CLIP-S      of MGD: to the text that was asked for, torchmetrics' convention, with its interval

Two settings: paired, where each person is to wear what is worn already, and unpaired, where it is another's: the paper's
Table 3. In each, pictures as `infer.py` writes them, the persons' own pixels pasted outside the mask ("repaint" of StableVITON
and CatVTON), and the same without that: it flatters FID by up to a third. Controls:

    garments shuffled        the persons in garments that neither setting asks for. FID hardly minds: it does not see what was
                             asked for, only CLIP-S does
    texts shuffled           CLIP-S of the pictures with others' texts
    persons unchanged        0 by construction, since they are the reference: FID thinks best of a model that does nothing. In
                             the paired setting they are the truth, and their CLIP-S is what a text and its photograph have
    persons through the VAE  what no output can be expected to beat
    two halves of the persons

Intervals are 95 %: KID's by the jackknife, CLIP-S's by bootstrap over pictures. FID has none, for the reason that
`eval.metrics.fid` gives. Dress Code, which MGD also annotates, is not evaluated.
"""

import argparse
import hashlib
import json
import shlex
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch

from eval import guard
from eval.folders import SETTINGS, Found, Pasted, begin, files_of, make
from eval.metrics.fid import caution
from eval.realism import DRAWS, FIGURES, SUBSETS, Figure, Measuring, Networks, load_networks
from eval.report import Fingerprint, about_run, save_json, shuffled
from eval.sampling import Setting, draw, read, through_vae
from unifashion import UserError, cpu, runs, training
from unifashion.data import read_json
from unifashion.data.mgd import MGD
from unifashion.data.mgd_mask import DRESSCODE
from unifashion.data.vitonhd import VITONHD
from unifashion.model import UniFashion
from unifashion.seen import world_of
from unifashion.tokenizers import WordPiece
from weights.load import learned_file, load_unifashion, sha256, tokenizer

CONDITIONS = {"vitonhd": "cloth", "mgd": "sketch+text"}
PAIRINGS = ("paired", "unpaired")
WITH, WITHOUT = "with repaint", "without repaint"
GARMENTS, TEXTS, SAME = "garments shuffled", "texts shuffled", "persons unchanged"
CEILING, HALVES = "persons through the VAE", "two halves of the persons"
ROWS = (
    *(f"outputs, {how}" for how in (WITH, WITHOUT)),
    GARMENTS,
    TEXTS,
    SAME,
    *(f"{CEILING}, {how}" for how in (WITH, WITHOUT)),
    HALVES,
)
PAIRS = 2032  # in VITON-HD's test
PAPER = {  # Table 3, unpaired: FID, KID x1000, CLIP-S
    "vitonhd": {
        "UniFashion": (8.42, 0.67),
        "StableVITON": (8.23, 0.49),
        "GP-VTON": (13.07, 4.66),
        "Paint-by-Example": (11.94, 3.85),
        "VITON-HD": (12.12, 3.23),
    },
    "mgd": {
        "UniFashion": (12.43, 3.74, 31.29),
        "MGD": (12.81, 3.86, 30.75),
        "SDEdit": (15.12, 5.67, 28.61),
    },
}
PROTOCOL = """protocol of ours: reference: {persons} of {split}; pictures are seen at their own size, of ours their person's, to which they
are enlarged (bicubic); clean-fid's resize; TensorFlow's Inception of 2015; with repaint: outside the mask the person's own pixels;
KID of all pictures, the same with no picture against its own pair, and of {subsets} subsets of {size}, seed 2020; CLIP-S: 100 cos, CLIP ViT-L/14, the
middle square of the picture, the text's first 77 tokens{drawn}"""
PROTOCOL_OF_THE_PAPER = """protocol of the paper: unpaired, 512x384, CLIP-S by torchmetrics; it tells neither library nor resize of FID, nor the reference, nor
whether it repaints, and its code computes none of them. The same StableVITON has a FID of 8.20 to 9.59 in four papers."""


@dataclass
class Asked:
    """Persons and the garments they are to wear: person i that of item of[i]."""

    data: VITONHD | MGD
    of: list[int]

    @property
    def pairs(self) -> list[tuple[str, str]]:
        return [(self.data.pairs[i][0], self.data.pairs[j][1]) for i, j in enumerate(self.of)]

    @property
    def texts(self) -> list[str] | None:
        """Of the garments; VITON-HD has none."""
        if isinstance(self.data, VITONHD):
            return None
        return [", ".join(self.data.captions[cloth[:5]]) for _, cloth in self.pairs]


# What is asked for


def read_asked(name: str, path: Path, split: str, samples: int | None) -> dict[str, Asked]:
    """The two settings. Raises UserError if any file of either is missing: of fewer pictures, FID would be another test's."""
    if any(Path(path, category).is_dir() for category in DRESSCODE):
        raise UserError(f"{path} is Dress Code: only MGD's annotations of VITON-HD are evaluated")
    asked = {}
    for pairing in PAIRINGS:
        data = (VITONHD if name == "vitonhd" else MGD)(path, split, paired=pairing == "paired")
        if gone := data.missing():
            raise UserError(
                f"{path} lacks files of {len(gone)} of {len(data)} {pairing} pairs, {gone[0]} for one: it must be whole"
            )
        if split == "test" and len(data) != PAIRS and not world_of(path):
            raise UserError(f"{path} has {len(data)} {pairing} pairs in test, not {PAIRS}: it must be whole")
        asked[pairing] = Asked(data, list(range(min(len(data), samples or len(data)))))
    return asked


def others(asked: dict[str, Asked], seed: int) -> Asked:
    """Every person with a garment of the unpaired setting, each taken once, that neither setting asks for."""
    paired, unpaired = (asked[pairing] for pairing in PAIRINGS)
    worn, wanted = ([cloth for _, cloth in x.pairs] for x in (paired, unpaired))
    for attempt in range(1000):
        of = torch.randperm(len(worn), generator=training.seeded("shuffled", seed, attempt)).tolist()
        if all(wanted[j] not in (worn[i], wanted[i]) for i, j in enumerate(of)):
            return Asked(unpaired.data, of)
    raise UserError(f"{len(worn)} persons have too few garments to shuffle them: take more --samples")


def photos_of(data: VITONHD | MGD) -> VITONHD:
    return data.photos if isinstance(data, MGD) else data


def persons(asked: Asked) -> Found:
    """The photographs: the reference."""
    folder = photos_of(asked.data).folder / "image"
    return Found([folder / f"{person}.jpg" for person, _ in asked.pairs])


def persons_and_masks(data: VITONHD | MGD) -> VITONHD | MGD:
    """The same items with no more in them than pasting needs, where the mask is a file of its own."""
    photos = photos_of(data)
    if "agnostic-mask" not in photos.folders:
        return data
    return VITONHD(photos.root, photos.folder.name, folders=("image", "agnostic-mask"))


# Made


def make_all(
    model: UniFashion, words: WordPiece, asked: dict[str, Asked], condition: str, s: Setting, args: argparse.Namespace
) -> dict[str, list[Path]]:  # fmt: skip
    """All that is asked for, and the persons through the VAE, in folders of --keep -> their files."""
    files = {}
    for pairing, of in asked.items():
        files[pairing] = make(
            args.keep / pairing,
            ["_".join(pair) for pair in of.pairs],
            lambda i, of=of: read(of.data, i, of.of[i], condition, model.cfg),
            lambda inputs, indices: draw(model, words, inputs, s, args.seed, indices),
            args.batch_size,
            args.quiet,
        )
    people = persons(asked["paired"])
    files["vae"] = make(
        args.keep / "vae",
        [person for person, _ in asked["paired"].pairs],
        people.__getitem__,
        lambda pictures, _: through_vae(model, pictures),
        args.batch_size,
        args.quiet,
    )
    return files


# Measured


def measure(
    measuring: Measuring, asked: dict[str, Asked], files: dict[str, list[Path]], wrong: dict[str, list[str]], seed: int
) -> dict[str, dict[str, dict[str, Figure]]]:  # fmt: skip
    """
    files of what there is, by setting, "shuffled" and "vae"; wrong: others' texts, by setting
    -> {setting: {row: {figure: [value], [value, low, high] or, of subsets, [mean, deviation]}}}, nothing for what is not there
    """
    people, items = persons(asked["paired"]), persons_and_masks(asked["paired"].data)
    made = {name: {WITH: Pasted(of, items), WITHOUT: Found(of)} for name, of in files.items()}
    shared: dict[str, dict[str, Figure]] = {SAME: measuring.apart(measuring.reference)}
    if "shuffled" in made:
        shared[GARMENTS] = measuring.apart(measuring.features(made["shuffled"][WITH]))
    for how, pictures in made.get("vae", {}).items():
        shared[f"{CEILING}, {how}"] = measuring.apart(measuring.features(pictures))
    shared[HALVES] = measuring.halves(seed)

    results = {}
    for pairing in [pairing for pairing in PAIRINGS if pairing in made]:
        texts, rows = asked[pairing].texts, {}
        for how, pictures in made[pairing].items():
            rows[f"outputs, {how}"] = measuring.apart(measuring.features(pictures))
            rows[f"outputs, {how}"] |= measuring.clip_s(pictures, texts)
        if "shuffled" in made:
            rows[GARMENTS] = shared[GARMENTS] | measuring.clip_s(made["shuffled"][WITH], texts)
        if pairing in wrong:
            rows[TEXTS] = measuring.clip_s(made[pairing][WITH], wrong[pairing])
        rows[SAME] = shared[SAME] | measuring.clip_s(people, texts)
        results[pairing] = shared | rows
    return {pairing: {row: rows[row] for row in ROWS if row in rows} for pairing, rows in results.items()}


# Told


def table(name: str, pairing: str, rows: dict[str, dict[str, Figure]], paper: bool) -> str:
    """One setting's rows as text, the paper's below them where it has any."""

    def cell(k: str, figure: Figure | None) -> str:
        if figure is None:
            return "-"
        if k == SUBSETS:
            return "{:.2f} +- {:.2f}".format(*figure)
        return "{:.2f} [{:.2f}, {:.2f}]".format(*figure) if len(figure) == 3 else f"{figure[0]:.2f}"

    lines = [f"\n{pairing:<42}" + "".join(f"{k:>26}" for k in FIGURES)]
    lines += [
        f"{row:<42}" + "".join(f"{cell(k, of.get(k)):>26}" for k in FIGURES) for row, of in rows.items()
    ]
    if paper and pairing == "unpaired":
        for row, of in PAPER[name].items():
            cells = [f"{of[0]:.2f}", "", "", f"{of[1]:.2f}", f"{of[2]:.2f}" if len(of) > 2 else "-"]
            lines.append(f"{f'{row}, Table 3':<42}" + "".join(f"{x:>26}" for x in cells))
    return "\n".join(lines)


def about_found(args: argparse.Namespace, argv: list[str] | None, began: float) -> dict:
    """As `report.about_run`, of pictures that were there."""
    made_with = args.generated / SETTINGS
    return {
        "command": shlex.join(["python", "-m", "eval.generation", *(sys.argv[1:] if argv is None else argv)]),
        "commit": runs.git_commit(),
        "seed": args.seed,
        "torch": torch.__version__,
        "made with": read_json(made_with) if made_with.is_file() else "unknown: pictures that were there",
        "seconds": round(time.perf_counter() - began, 1),
    }


def check_arguments(args: argparse.Namespace, name: str) -> None:
    """Raise UserError for what cannot be, before hours of work."""
    if args.grid or args.guidances or args.sheet:
        raise UserError(f"--grid, --guidances and --sheet are of toy: {name} has no truth to choose by")
    if bool(args.keep) == bool(args.generated):
        raise UserError(
            f"{name} wants --keep FOLDER, to make pictures there, or --generated FOLDER, to measure some"
        )
    if args.seed < 0:
        raise UserError("--seed must be 0 or more")


def evaluate(
    name: str, path: Path, s: Setting, args: argparse.Namespace, argv: list[str] | None, began: float
) -> None:
    """The command, of data set `name` ("vitonhd" or "mgd") at `path`."""
    check_arguments(args, name)
    split = args.split or "test"
    asked = read_asked(name, path, split, args.samples)
    warning = caution(len(asked["paired"].of), len(asked["paired"].of))
    files = {}
    if args.generated:
        there = [pairing for pairing in PAIRINGS if (args.generated / pairing).is_dir()]
        if not there:
            raise UserError(f"{args.generated} has neither paired/ nor unpaired/ in it")
        files = {pairing: files_of(args.generated / pairing, asked[pairing].pairs) for pairing in there}
    # What the controls need is asked for before the work, too.
    wrong = {k: shuffled(x.texts, args.seed) for k, x in asked.items() if x.texts}
    wrong = {k: [asked[k].texts[i] for i in order] for k, order in wrong.items()}
    model_file = learned_file(args.preset, args.weights) if args.keep else None
    ids = sorted({name for of in asked.values() for pair in of.pairs for name in pair})
    verdict = guard.verdict(
        model_file, path, "vitonhd", ids, split, settings=guard.chosen_on(args.preset, args.guidance)
    )
    to_make = {**asked, "shuffled": others(asked, args.seed)} if args.keep else {}
    networks = load_networks(name)
    device = training.pick_device(args.device)
    dtype = training.compute_dtype(device, args.dtype)
    cpu.float32_where_faster(device, dtype)
    if args.keep:
        words = tokenizer(args.preset, args.weights)
        begin(args.keep, settings_of(name, split, asked, s, args, device, dtype))
    if warning:
        print(f"warning: {warning}", file=sys.stderr)

    cpu.fast_malloc()
    measuring = Measuring(networks, persons(asked["paired"]), device, args.quiet)
    if args.keep:
        model = load_unifashion(args.preset, args.weights, device, dtype)
        files = make_all(model, words, to_make, CONDITIONS[name], s, args)
        about = about_run("eval.generation", argv, args, model, began) | {
            "setting": f"{s}; from {CONDITIONS[name]} and DensePose"
        }
    else:
        about = about_found(args, argv, began)
    results = measure(measuring, asked, files, wrong if networks.clip else {}, args.seed)

    about |= {"data sha256": str(fingerprint(asked)), **verdict.lines()}
    tell(name, path, split, asked, args, about, networks, measuring.size, results, began)


def tell(
    name: str, path: Path, split: str, asked: dict[str, Asked], args: argparse.Namespace, about: dict, networks: Networks,
    size: int, results: dict[str, dict[str, dict[str, Figure]]], began: float,
) -> None:  # fmt: skip
    """Print the report, and write it to --out."""
    n, whole = len(asked["paired"].of), len(asked["paired"].data)
    world = world_of(path)
    drawn = world is not None
    report = about | ({"toyfashion": read_json(world / "toy.json")} if drawn else {})
    report |= {
        "data": f"{name}={path}",
        "split": split,
        "pairs": f"{n} of {whole}",
        "pairs sha256": pairs_hash(asked),
        "pictures": str(args.keep or args.generated),
        **networks.hashes,
        "caution": caution(n, n) or "none",
        "seconds": round(time.perf_counter() - began, 1),
    }
    told = PROTOCOL.format(
        persons=f"all {n} persons" if n == whole else f"the first {n} of {whole} persons",
        split=split,
        subsets=DRAWS,
        size=size,
        drawn=". Drawn pictures: Inception and CLIP know photographs, the figures say nothing of them"
        * drawn,
    )
    if args.out:
        paper = {} if drawn else {k: list(v) for k, v in PAPER[name].items()}
        of_file = {"not measured": networks.lacking, "protocol": told, "paper, unpaired": paper}
        save_json({**report, **of_file, "results": results}, args.out)
    print(*(f"{k:<28}{v}" for k, v in report.items()), sep="\n")
    print(*(table(name, pairing, rows, paper=not drawn) for pairing, rows in results.items()), sep="\n")
    print(*(f"{figure}: not measured: {why}" for figure, why in networks.lacking.items()), sep="\n")
    print(told, *([] if drawn else [PROTOCOL_OF_THE_PAPER]), sep="\n")


def settings_of(
    name: str, split: str, asked: dict[str, Asked], s: Setting, args: argparse.Namespace,
    device: torch.device, dtype: torch.dtype,
) -> dict:  # fmt: skip
    """What every picture in a folder depends on: with anything else, it is another folder's."""
    return {
        "data": name,
        "split": split,
        "pairs sha256": pairs_hash(asked),
        "preset": args.preset,
        "model sha256": sha256(learned_file(args.preset, args.weights)),
        **s._asdict(),
        "seed": args.seed,
        "device": device.type,
        "dtype": str(dtype).removeprefix("torch."),
        "batch size": args.batch_size,
    }


def fingerprint(asked: dict[str, Asked]) -> Fingerprint:
    """Of who is to wear what, the texts, and the files of persons, masks, poses, clothes and sketches."""
    found, files = Fingerprint(), {}
    for of in asked.values():
        found.add([of.pairs, of.texts])
        photos = photos_of(of.data)
        for pair in of.pairs:
            paths = [*photos.paths(*pair).values()]
            if isinstance(of.data, MGD):
                paths += [of.data.sketch_of(*pair), *of.data.mask_sources(pair[0])]
            files |= dict.fromkeys(photos.folder / path for path in paths)
    for path in files:
        found.add(path.read_bytes())
    return found


def pairs_hash(asked: dict[str, Asked]) -> str:
    """sha256 of who is to wear what, and of the texts."""
    told = [[asked[pairing].pairs, asked[pairing].texts] for pairing in PAIRINGS]
    return hashlib.sha256(json.dumps(told).encode()).hexdigest()
