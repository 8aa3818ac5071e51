"""Captions in the manners of three data sets: like their references, and true of ToyFashion's garments?

    python -m eval.captioning --data toy --out captioning.json --captions captions.jsonl
    python -m eval.captioning --data fashiongen=PATH              real data, beside the paper's row

Of each style one picture each of --samples garments, the same in all styles, of attribute combinations that training never
saw; captions are written by `unifashion.caption`, as `infer.py caption` does. Then, in %:

    BLEU-4, METEOR, ROUGE-L, CIDEr    see eval/captions.py, against each picture's one reference; BLEU-4 also against the
                  references of the other styles, which are what those data sets say of the same garments
    precision     of the attribute values that the captions name (`texts.named`), those that are true of the garment
    coverage      of the attributes that a picture's reference names, those of which its caption names the true value:
                  a caption that names every value has it all, at the price of its precision

Beside the captions: those of other pictures, shuffled between the garments; the truth, written anew by ToyFashion in the
same style with its own choice of words and details, which is what a perfect captioner can be expected to reach; and the
most frequent values of training, whatever the picture. Intervals: 95 %, bootstrap over pictures (of no width where all
agree).
"""

import argparse
import json
import os
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch.utils.data import Dataset
from tqdm import tqdm

from eval import guard
from eval.captions import METRICS, beside_the_paper, bleu4, cell, line, scores
from eval.gallery import check_rows
from eval.report import Fingerprint, about_run, interval, resampled, save_json, shuffled
from eval.truth import ATTRIBUTES, Said, garments_of, look, seen_in_training, truth
from unifashion import Parser, UserError, cpu, training
from unifashion.caption import Caption, check_search, write_captions
from unifashion.config import PRESETS
from unifashion.data import read_json, toy
from unifashion.data.readers import READERS, in_toy
from unifashion.data.texts import WRITERS, named
from unifashion.data.toy import Garment
from unifashion.model import UniFashion
from unifashion.preprocess import qformer_image
from unifashion.seen import world_of
from unifashion.tokenizers import SentencePiece
from weights.load import learned_file, llm_tokenizer, load_unifashion


class Case(NamedTuple):
    """A picture of a garment, and the text that its data set has for it."""

    picture: str
    reference: str
    caption: Caption


# What is captioned


def draw(products: Sequence[str], samples: int | None, seed: int) -> list[int]:
    """The product of each picture -> indices: one picture each of `samples` products, or of all (None), in random order.

    Data sets with as many pictures of the same products, whatever they call them, give the same.
    """
    pictures: dict[str, list[int]] = {}
    for i, product in enumerate(products):
        pictures.setdefault(product, []).append(i)
    names, generator = sorted(pictures), training.seeded("captioning", seed)
    order = torch.randperm(len(names), generator=generator).tolist()
    views = torch.rand(len(names), generator=generator).tolist()
    return [pictures[names[k]][int(views[k] * len(pictures[names[k]]))] for k in order[:samples]]


def write(
    model: UniFashion,
    llm_words: SentencePiece,
    data: Dataset,
    picks: list[int],
    style: str,
    args: argparse.Namespace,
) -> tuple[list[Case], float]:
    """Captions of the pictures `picks`, and the seconds that they took, reading pictures not counted."""
    cases, seconds = [], 0.0
    bar = tqdm(total=len(picks), desc=style, disable=args.quiet)
    for start in range(0, len(picks), args.batch_size):
        items = [data[i] for i in picks[start : start + args.batch_size]]
        pictures = [qformer_image(x["image"], model.cfg.vit.image_size[0]) for x in items]
        began = time.perf_counter()
        written = write_captions(model, llm_words, pictures, style, args.max_tokens, args.beams)
        seconds += time.perf_counter() - began
        for item, made in zip(items, written, strict=True):
            cases.append(Case(item["path"], item["text"], made))
        bar.update(len(items))
    bar.close()
    return cases, seconds


# How it is judged


def most_frequent(truths: list[Said]) -> Said:
    """Of each attribute the value that most garments have: what can be said without looking."""
    tallies = {k: Counter(value for said in truths for value in sorted(said[k])) for k in ATTRIBUTES}
    return {k: {value for value, _ in tally.most_common(1)} for k, tally in tallies.items()}


def count(said: list[Said], truths: list[Said], references: list[Said]) -> np.ndarray:
    """-> (n,7,4) of each picture and attribute: values named, those that are true, whether it is asked, and told truly.

    Asked is what the reference names; its own value there is not looked at.
    """
    rows = [
        [
            (len(s[k]), len(s[k] & true[k]), bool(asked[k]), bool(asked[k]) and bool(s[k] & true[k]))
            for k in ATTRIBUTES
        ]
        for s, true, asked in zip(said, truths, references, strict=True)
    ]
    return np.array(rows, float)


def shares(counted: np.ndarray) -> dict[str, dict]:
    """`count`'s (n,7,4) -> precision and coverage in %, of each attribute and of all together, and of how many."""
    counted = np.concatenate([counted, counted.sum(1, keepdims=True)], axis=1)
    sums = resampled(counted)
    with np.errstate(invalid="ignore"):  # of nothing there is no share: nan
        precision, coverage = 100 * sums[..., 1] / sums[..., 0], 100 * sums[..., 3] / sums[..., 2]
    return {
        k: {
            "named": int(sums[0, i, 0]),
            "precision": interval(precision[:, i]),
            "asked": int(sums[0, i, 2]),
            "coverage": interval(coverage[:, i]),
        }
        for i, k in enumerate((*ATTRIBUTES, "all"))
    }


def judge(
    style: str, cases: dict[str, list[Case]], garments: list[Garment] | None, common: Said, seed: int
) -> dict[str, dict]:
    """
    -> {"BLEU-4": {row: {style: figure}}, "own": {row: {metric: figure}}, "attributes": {row: `shares`}}

    cases     of every style, in one order of garments
    garments  in that order; without them, in real data, nothing is known but the references
    common    what can be said without looking
    """
    own = cases[style]
    texts = {"captions": [case.caption.text for case in own]}
    looks = [case.reference for case in own]
    if garments is not None:
        looks = [look(g) for g in garments]
    texts["of other pictures"] = [texts["captions"][i] for i in shuffled(looks, seed)]
    if garments is not None:
        rng = np.random.default_rng([seed, list(WRITERS).index(style)])
        texts["the truth, anew"] = [WRITERS[style](g, rng) for g in garments]
    references = {name: [case.reference for case in others] for name, others in cases.items()}
    result = {
        "BLEU-4": {
            row: {k: bleu4(said, refs) for k, refs in references.items()} for row, said in texts.items()
        },
        "own": scores({row: (said, references[style]) for row, said in texts.items()}),
    }
    if garments is None:
        return result
    truths, asked = [truth(g) for g in garments], [named(text, style) for text in references[style]]
    said = {row: [named(text, style) for text in made] for row, made in texts.items()}
    said["most frequent"] = [common] * len(own)
    return result | {"attributes": {row: shares(count(s, truths, asked)) for row, s in said.items()}}


# How it is told


def table(style: str, cases: list[Case], seconds: float, result: dict) -> str:
    """One style's figures as text."""
    made = [case.caption for case in cases]
    tokens = sum(c.tokens for c in made)
    lines = [
        f"\n{style}: {len(made)} pictures, {100 * sum(c.whole for c in made) / len(made):.1f} % of the captions ended by "
        f"themselves, {tokens / len(made):.1f} tokens each, {tokens / seconds:.0f} tokens/s"
    ]
    lines.append(line("against its own", METRICS))
    lines += [line(row, map(cell, figures.values())) for row, figures in result["own"].items()]
    against = result["BLEU-4"]
    lines.append(line("BLEU-4 against", [f"{k} (own)" if k == style else k for k in against["captions"]]))
    lines += [line(row, map(cell, figures.values())) for row, figures in against.items()]
    nearest = max(against["captions"].values(), key=lambda figure: figure[0])
    if nearest[1] > against["captions"][style][2]:  # more than chance may do
        lines.append("the captions are nearest to another style's references: they do not follow their own")
    for kind, of in (("precision", "named"), ("coverage", "asked")):
        for row, shown in result.get("attributes", {}).items():
            if row == "captions":
                lines.append(line(kind, shown))
                lines.append(line(f"{of}, how many", [str(figures[of]) for figures in shown.values()]))
            lines.append(line(row, [cell(figures[kind]) for figures in shown.values()]))
    return "\n".join(lines)


def save(cases: dict[str, list[Case]], path: Path) -> None:
    """A line for each picture; the file is there whole or not at all."""
    lines = [
        {
            "style": style,
            "picture": case.picture,
            "reference": case.reference,
            "caption": case.caption.text,
            "tokens": case.caption.tokens,
            "whole": case.caption.whole,
        }
        for style, of_style in cases.items()
        for case in of_style
    ]
    new = path.with_name(f"{path.name}.new")
    new.write_text("".join(json.dumps(line) + "\n" for line in lines))
    new.replace(path)


def check_arguments(args: argparse.Namespace, name: str) -> None:
    """Raise UserError for what cannot be, before minutes of work."""
    if name == "fashiongen" and (args.split == "test" or args.styles not in (None, ["fashiongen"])):
        raise UserError(
            "FashionGen has the split val and captions of its own style: leave --split and --styles out"
        )
    few = args.samples is not None and args.samples < 2
    if few or args.batch_size < 1 or args.show < 0:
        raise UserError("--samples must be at least 2, --batch-size at least 1, --show 0 or more")
    if args.seed < 0:
        raise UserError(f"--seed is {args.seed}, must be 0 or more")
    for flag, out in (("--out", args.out), ("--captions", args.captions)):
        if out and (out.is_dir() or not os.access(out.parent, os.W_OK)):
            raise UserError(f"{out} cannot be written: {flag} wants a file in a folder that exists")


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser(description=__doc__)
    add = parser.add_argument
    add(
        "--data",
        required=True,
        metavar="NAME[=PATH]",
        help="toy | fashiongen, in data/NAME if no PATH is given",
    )
    add("--split", choices=["val", "test"], help="default test; FashionGen has val")
    add(
        "--samples",
        type=int,
        help="pictures, each of another product (default: of toy 500, of fashiongen all products)",
    )
    add("--styles", nargs="+", choices=list(READERS), help="of toy (default: all three)")
    add("--beams", type=int, default=1, help="1 is greedy (default %(default)s)")
    add("--max-tokens", type=int, default=128, help="of a caption (default %(default)s)")
    add("--preset", choices=list(PRESETS), default="tiny", help="default %(default)s")
    add("--weights", type=Path, help="folder of the weights (default: the preset's own)")
    add("--batch-size", type=int, default=50, help="default %(default)s")
    add(
        "--seed",
        type=int,
        default=0,
        help="of what is drawn, shuffled and written anew (default %(default)s)",
    )
    add("--device", default="auto", help="auto | cpu | cuda")
    add("--dtype", choices=["auto", "fp32", "bf16"], default="auto", help="auto: bf16 on CUDA, else fp32")
    add(
        "--show",
        type=int,
        default=3,
        metavar="N",
        help="print the first captions of each style (default %(default)s)",
    )
    add("--out", type=Path, metavar="JSON", help="write every figure here")
    add("--captions", type=Path, metavar="JSONL", help="write every picture's reference and caption here")
    add("--quiet", action="store_true", help="no progress bars")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    args, began = parse(argv), time.perf_counter()
    name, path = training.name_and_path(args.data, ("toy", "fashiongen"))
    check_arguments(args, name)
    cpu.fast_malloc()
    device = training.pick_device(args.device)
    dtype = training.compute_dtype(device, args.dtype)
    cpu.float32_where_faster(device, dtype)
    llm_words = llm_tokenizer(args.preset, args.weights)
    styles = [style for style in READERS if style in (args.styles or READERS)]
    styles = ["fashiongen"] if name == "fashiongen" else styles
    for style in styles:
        check_search(PRESETS[args.preset], llm_words, style, args.max_tokens, args.beams)
    model = load_unifashion(args.preset, args.weights, device, dtype, draws=False, writes=True)

    garments, common, about = None, {}, {}
    if name == "toy":
        world, split = training.toy_folder(path), args.split or "test"
        folders = {style: in_toy(world, style, args.quiet) for style in styles}
        train, rows = toy.read_rows(world, "train"), toy.read_rows(world, split)
        about["toyfashion"] = read_json(world / "toy.json")
    else:
        split, folders = "validation", {"fashiongen": path}
    data = {style: READERS[style](folder, split) for style, folder in folders.items()}
    if name == "fashiongen":
        check_rows(data[name], world_of(path))
    samples = 500 if args.samples is None and name == "toy" else args.samples
    picks = {style: draw(part.products, samples, args.seed) for style, part in data.items()}
    if min(map(len, picks.values())) < 2:
        raise UserError(f"{args.data}: the split {split} has fewer than 2 products")
    if name == "toy":
        garments = [garments_of(rows, style, data[style], picks[style]) for style in styles][0]
        about["seen in training"] = seen_in_training(train, garments)
        if about["seen in training"]:
            raise UserError(
                f"{about['seen in training']} of {len(garments)} garments have a combination of attributes that training "
                "has seen: this is no test"
            )
        common = most_frequent([truth(Garment(**row["garment"])) for row in train])

    ids = [data[styles[0]].products[i] for i in picks[styles[0]]]
    verdict = guard.verdict(
        learned_file(args.preset, args.weights),
        folders[styles[0]],
        "fashiongen",
        ids,
        "val" if split == "validation" else split,
    )

    cases, seconds, fingerprint = {}, {}, Fingerprint()
    for style in styles:
        read = fingerprint.of(data[style])
        cases[style], seconds[style] = write(model, llm_words, read, picks[style], style, args)
    if args.captions:
        save(cases, args.captions)
    results = {style: judge(style, cases, garments, common, args.seed) for style in styles}
    report = about_run("eval.captioning", argv, args, model, began) | {
        **about,
        "split": split,
        "pictures of a style": len(next(iter(cases.values()))),
        "search": f"{args.beams} beams" if args.beams > 1 else "greedy",
        "most tokens": args.max_tokens,
        "data sha256": str(fingerprint),
        **verdict.lines(),
    }
    if args.out:
        save_json({**report, "results": results}, args.out)
    print(*(f"{k:<28}{value}" for k, value in report.items()), sep="\n")
    for style in styles:
        print(table(style, cases[style], seconds[style], results[style]))
        for case in cases[style][: args.show]:
            print(f"  {case.picture}\n    reference  {case.reference}\n    caption    {case.caption.text}")
    if name == "fashiongen":
        of_data = cases["fashiongen"]
        print(beside_the_paper([case.caption.text for case in of_data], [case.reference for case in of_data]))


if __name__ == "__main__":
    training.run(main)
