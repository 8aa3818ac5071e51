"""Use the trained model.

    python infer.py tryon --person person.jpg --cloth cloth.jpg --out out.png
    python infer.py tryon --person person.jpg --sketch sketch.png --text "red, long sleeves, v-neck" --out out.png
    python infer.py tryon --model stableviton --person person.jpg --pose densepose.png --cloth cloth.jpg --out out.png
    python infer.py caption --image cloth.jpg another.jpg --style fashion200k
    python infer.py caption --image fashioniq/images --style fashioniq-cap --out fashioniq/captions.jsonl
    python infer.py caption --image fashioniq/images --model llava --keywords keywords.txt --out captions.jsonl
    python infer.py index --images photos --out catalog
    python infer.py search --catalog catalog --image cloth.jpg --text "is red" --sheet found.png

and, with --model, published models that need none of our training: BLIP-2 to index and search, LLaVA to caption, StableVITON
and Paint-by-Example to try on.

Exit codes: 0 done; 2 the input is wrong: one line says what, and nothing is written (of many
captions, or pictures that are indexed, those that were done are kept for the next run); 130 stopped
by Ctrl-C; 1 a bug.
What needs torch is imported where it is used, so that `--help` and a mistyped flag answer at once.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

from unifashion import Parser, UserError, exit_if_unread, flags

if TYPE_CHECKING:
    from collections.abc import Callable

    import torch
    from PIL import Image

    from unifashion.caption import Caption
    from unifashion.config import UniFashionConfig

BATCH = 16  # pictures whose captions are written at a time


def tryon(args: argparse.Namespace) -> None:
    """Dress the person of one picture in the garment of another, or of a sketch, with a text or without."""
    flags.check_tryon(args)
    published = args.model != "unifashion"

    from unifashion import fast, preprocess
    from unifashion.diffusion import timesteps
    from unifashion.stableviton import PUBLISHED
    from unifashion.tryon import draw, pasted, read_inputs, read_mask, result_paths
    from weights.exemplar import load_published
    from weights.load import folder_of, load_unifashion, tokenizer

    outs = result_paths(args)
    notes: list[str] = []  # what was decided for the user
    cfg, device, dtype = settle(args, notes)
    cfg = PUBLISHED[args.model] if published else cfg
    folder = folder_of(args.preset, args.weights)
    if args.guidance is None:
        args.guidance = cfg.guidance

    person = preprocess.read_image(args.person)
    mask, mask_source = read_mask(args, person.size, notes)
    if args.steps * (1000 // args.steps) < 900 and args.sampler != "dpm++":
        first = timesteps(args.steps)[0]
        notes.append(
            f"--steps {args.steps} starts at timestep {first} of 999, 333 or 500 steps start in more noise"
        )
    canvas, box = preprocess.pad_to_ratio(person, cfg.picture[1] / cfg.picture[0])
    words = None if published else tokenizer(args.preset, args.weights)
    inputs = read_inputs(args, person, mask, cfg, words, notes)

    start = time.perf_counter()
    if published:
        model = load_published(args.model, folder, device, dtype)
    else:
        model = load_unifashion(args.preset, args.weights, device, dtype)
    fast.in_order(model)
    loaded = time.perf_counter()
    tell(args, notes)
    if args.compile:
        fast.compile_drawing(model, lambda note: tell(args, [note]))
    pictures = draw(model, inputs, args)
    drawn = time.perf_counter()
    for path, picture in zip(outs, pictures, strict=True):
        preprocess.save_png(pasted(picture, person, mask, box, canvas.size), path)

    settings = ("model", "preset", "device", "dtype", "compile", "seed", "sampler", "steps", "guidance")
    used = {"out": [str(path) for path in outs], "weights": str(folder), "mask": mask_source}
    used |= {name: getattr(args, name) for name in settings}
    used |= {"seconds_loading": round(loaded - start, 2), "seconds_sampling": round(drawn - loaded, 2)}
    if args.json:
        print(json.dumps({**used, "notes": notes}))
    elif not args.quiet:
        for name, value in used.items():
            print(f"{name.replace('_', ' '):17}", " ".join(value) if name == "out" else value)


def caption(args: argparse.Namespace) -> None:
    """Describe garments in the manner of one of the data sets: short, professional or detailed."""
    from functools import partial

    from unifashion import caption as captions
    from unifashion import fast, llava
    from weights.llava import llava_captioner, llava_tokenizer, load_llava
    from weights.load import captioner, llm_tokenizer, load_unifashion

    notes: list[str] = []
    keywords: tuple[str, ...] = ()
    if args.keywords and args.model != "llava":
        raise UserError("--keywords is for --model llava: UniFashion knows the instructions of Table 7 alone")
    cfg, device, dtype = settle(args, notes)
    if args.model == "llava":
        keywords = captions.read_keywords(args.keywords) if args.keywords else ()
        cfg, words = llava.LLAVA_7B, llava_tokenizer(args.weights)
        by, load = llava_captioner(args.weights, keywords), load_llava
    else:
        words, by = llm_tokenizer(args.preset, args.weights), captioner(args.preset, args.weights)
        load = partial(load_unifashion, args.preset, draws=False, writes=True)
    captions.check_search(cfg, words, args.style, args.max_tokens, args.beams, keywords)
    by += f" beams {args.beams}" * (args.beams > 1)
    job = captions.Job(args.image, args.style, by, args.max_tokens, args.out, args.quiet)
    print(*(f"skipped: {plain(why)}\n" for why in job.skipped.values()), sep="", end="", file=sys.stderr)
    notes += job.notes()

    model = load(args.weights, device, dtype) if job.todo else None
    tell(args, notes)
    if args.compile and model:
        fast.compile_writing(model, lambda note: tell(args, [note]))

    def write(pictures: list[torch.Tensor]) -> list[Caption]:
        search = args.max_tokens, args.beams
        return captions.write_captions(model, words, pictures, args.style, *search, keywords)

    for batch in job.work(max(1, BATCH // args.beams), partial(captions.read_picture, cfg), write):
        for path in batch if job.file is None and not args.json else []:
            text = " ".join(job.rows[path]["caption"].split())  # on one line, whatever the LLM writes
            print(f"{path}: " * (len(job.rows) > 1) + text, flush=True)
    written = [job.rows[path] for path in job.todo]
    tokens = sum(row["tokens"] for row in written)
    used = {
        "tokens": tokens,
        "seconds": round(job.seconds, 2),
        "tokens_per_second": round(tokens / max(job.seconds, 1e-9), 1),
        "cut": sum(not row["whole"] for row in written),
    }
    if empty := [row["image"] for row in written if not row["caption"].strip()]:
        print(f"note: {len(empty)} of the captions are empty, that of {empty[0]} for one", file=sys.stderr)
    if args.json:
        rows = [row if job.file is None else job.file.of(row) for row in job.rows.values()]
        used |= {"skipped": [*job.skipped.values()], "device": args.device, "dtype": args.dtype}
        print(json.dumps({"captions": rows, **used, "notes": notes}))
    elif not written and not args.quiet:
        print("no new captions", file=sys.stderr)
    elif not args.quiet:
        cut = f"; {used['cut']} cut at --max-tokens {args.max_tokens}" * (used["cut"] > 0)
        cut += f"; written to {args.out}" * (job.file is not None)
        print(
            f"{tokens} tokens in {job.seconds:.2f} s, {used['tokens_per_second']} a second{cut}",
            file=sys.stderr,
        )


def index(args: argparse.Namespace) -> None:
    """Make a catalogue of the pictures in a folder, and in the folders within it, for search; or bring one up to date."""
    from functools import partial

    from unifashion import indexing
    from unifashion.caption import check_search
    from unifashion.catalog import VERSION
    from unifashion.search import qformer_hash
    from weights.load import captioner, llm_tokenizer, tokenizer

    if args.captions and args.model == "blip2":
        raise UserError("--model blip2 writes no --captions")
    notes: list[str] = []
    cfg, device, dtype = settle(args, notes)
    indexing.pictures_under(args.images)  # to complain now, rather than when the model is loaded
    indexing.check_out(args.out)
    words, llm = tokenizer(args.preset, args.weights), None
    if args.captions:
        llm = llm_tokenizer(args.preset, args.weights)
        check_search(cfg, llm, args.captions, max_tokens=128, beams=1)
    tell(args, notes)

    start = time.perf_counter()
    model = retriever(args, device, dtype, writes=bool(args.captions))
    about = {"catalogue": VERSION, "preset": args.preset, "qformer sha256": qformer_hash(model)}
    about |= {"dtype": args.dtype, "captions": args.captions or "", "captioner": ""}
    if args.captions:
        about["captioner"] = captioner(args.preset, args.weights)
    see = partial(indexing.embed, model, words=words, llm=llm, style=args.captions)
    shape = cfg.qformer.queries, cfg.qformer.embed_dim
    done = indexing.index(args.images, args.out, about, shape, preparation(args, cfg), see, args.quiet)
    print(*(f"skipped: {plain(why)}\n" for why in done.skipped), sep="", end="", file=sys.stderr)
    used = {"catalog": str(args.out), **done._asdict(), "device": args.device, **about}
    used |= {"seconds": round(time.perf_counter() - start, 2), "notes": notes}
    if args.json:
        print(json.dumps(used))
    elif not args.quiet:
        told = f"{done.pictures} pictures in {args.out}: {done.new} new, {done.dropped} dropped"
        print(told + f"; {len(done.skipped)} skipped" * bool(done.skipped), file=sys.stderr)


def search(args: argparse.Namespace) -> None:
    """Find pictures of a catalogue by a text, by a picture, or by a picture and what is to be different."""
    if args.text is None and args.image is None:
        raise UserError("say what is looked for: --text, --image, or both")
    if args.top < 1:
        raise UserError(f"--top is {args.top}, must be at least 1")

    from unifashion import preprocess
    from unifashion.catalog import Catalog, check_same
    from unifashion.search import qformer_hash, query_embedding
    from unifashion.tokenizers import read_query
    from weights.load import tokenizer

    notes: list[str] = []
    cfg, device, dtype = settle(args, notes)
    if args.sheet:
        preprocess.check_png_path(args.sheet)
        both = args.image and args.sheet.exists() and os.path.exists(args.image)
        if both and args.sheet.samefile(args.image):
            raise UserError(f"{args.sheet} is the picture that is looked for: give --sheet another name")
    catalog = Catalog(args.catalog)
    otherwise = "search with the model that made it, or index the pictures anew with this one"
    check_same(args.catalog, catalog.about, {"preset": args.preset}, otherwise)
    picture = preprocess.read_image(args.image) if args.image else None
    text = None
    if args.text is not None:
        words = tokenizer(args.preset, args.weights)
        *text, told = read_query(words, args.text, cfg.qformer.max_text, args.preset == "tiny")
        notes += told
    if args.top > len(catalog):
        notes.append(f"--top is {args.top}, and there are {len(catalog)} pictures: these are all")
    if picture and text and args.model == "blip2":
        notes.append("BLIP-2 was not trained on a picture and what is to be different: these are a guess")
    elif picture and text and catalog.captions is None:
        notes.append("the catalogue has no captions: pictures alone are compared")
    catalog.verify(args.quiet)

    model = retriever(args, device, dtype)
    check_same(args.catalog, catalog.about, {"qformer sha256": qformer_hash(model)}, otherwise)
    start = time.perf_counter()
    query = query_embedding(model, picture and preparation(args, cfg)(picture), text)
    found = catalog.find(query, args.top, bool(picture and text), device)
    seconds = time.perf_counter() - start
    if args.sheet:
        notes += catalog.save_sheet(args.text or "", picture, found, args.sheet)
    tell(args, notes)
    if args.json:
        used = {
            "catalog": str(args.catalog),
            "pictures": len(catalog),
            "images": str(catalog.pictures() or ""),
        }
        used |= {"text": args.text, "image": args.image and str(args.image), "device": args.device}
        used |= {"seconds": round(seconds, 4), "notes": notes}
        return print(json.dumps({"found": found, **used}))
    for one in found:
        caption = f"  {plain(one['caption'])}" if "caption" in one else ""
        print(f"{one['rank']:>3}  {one['score']:.4f}  {plain(one['path'])}{caption}")


def retriever(args: argparse.Namespace, device: torch.device, dtype: torch.dtype, writes: bool = False):
    """UniFashion without what draws; or BLIP-2 as published, which it starts from, and which it is without its training."""
    from weights.load import load_public, load_unifashion

    load = load_public if args.model == "blip2" else load_unifashion
    return load(args.preset, args.weights, device, dtype, draws=False, writes=writes).requires_grad_(False)


def preparation(args: argparse.Namespace, cfg: UniFashionConfig) -> Callable[[Image.Image], torch.Tensor]:
    """A photo -> what the model reads of it: UniFashion all of it, padded, BLIP-2 all of it, squashed."""
    from functools import partial

    from unifashion.preprocess import qformer_image, squashed_image

    return partial(squashed_image if args.model == "blip2" else qformer_image, size=cfg.vit.image_size[0])


def tell(args: argparse.Namespace, notes: list[str]) -> None:
    if not args.quiet:
        print(*(f"note: {plain(note)}\n" for note in notes), sep="", end="", file=sys.stderr)


def plain(text: str) -> str:
    """On one line, whatever is in a name or a caption."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


def settle(args: argparse.Namespace, notes: list[str]) -> tuple[UniFashionConfig, torch.device, torch.dtype]:
    """Preset, device and dtype: what the user left open is decided, in `args` too, and noted."""
    import torch

    from unifashion import cpu, fast
    from unifashion.config import PRESETS
    from unifashion.training import compute_dtype, pick_device
    from weights.load import default_preset, folder_of

    if args.preset is None:
        args.preset = default_preset(args.weights)
        holds = "holds a" if args.preset == "full" else "holds no"
        knows = ", and tiny knows only drawn garments" * (args.preset == "tiny")
        where = args.weights or folder_of("full")
        notes.append(f"preset {args.preset}: {where} {holds} trained full model{knows}")
    folder_of(args.preset, args.weights)  # complains about one that there is not
    device = pick_device(args.device)
    dtype = compute_dtype(device, args.dtype)
    if args.preset == "tiny" and args.model == "unifashion":
        cpu.fast_malloc()  # of large tensors it keeps what fits no others: half a gigabyte of StableVITON's 5
    cpu.float32_where_faster(device, dtype)
    args.device, args.dtype = device.type, "bf16" if dtype == torch.bfloat16 else "fp32"
    fast.repeatable()
    return PRESETS[args.preset], device, dtype


def common_arguments(parser: argparse.ArgumentParser) -> None:
    g = parser.add_argument_group("model and place")
    g.add_argument(
        "--preset", choices=["tiny", "full"], help="default: full if its trained file is there, else tiny"
    )
    g.add_argument("--weights", type=Path, metavar="DIR", help="default: weights/files (full), weights/tiny")
    g.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto")
    g.add_argument("--dtype", choices=["auto", "fp32", "bf16"], default="auto", help="auto: bf16 on CUDA")
    g.add_argument("--quiet", action="store_true", help="no notes, no progress and no report, except --json")
    g.add_argument("--json", action="store_true", help="the report as one JSON object on stdout")


def compile_argument(parser: argparse.ArgumentParser) -> None:
    help_ = "what runs at every step: minutes before the first one, seconds in later runs, and steps that are faster"
    parser.add_argument("--compile", action="store_true", help=help_)


def model_argument(parser: argparse.ArgumentParser, name: str, what: str) -> None:
    help_ = f"{name} is {what}: it needs none of our training (default %(default)s)"
    parser.add_argument("--model", choices=["unifashion", name], default="unifashion", help=help_)


def parse(argv: list[str] | None) -> argparse.Namespace:
    top = Parser(prog="infer.py", description="Use the trained model.")
    commands = top.add_subparsers(dest="command", metavar="COMMAND", required=True)

    p = commands.add_parser("tryon", help=tryon.__doc__, description=tryon.__doc__)
    p.set_defaults(run=tryon)
    flags.tryon(p)
    compile_argument(p)
    common_arguments(p)

    p = commands.add_parser("caption", help=caption.__doc__, description=caption.__doc__)
    p.set_defaults(run=caption)
    p.add_argument(
        "--image",
        type=Path,
        nargs="+",
        required=True,
        help="photos of garments, best on white; of a folder all that lie in it, not in its folders, but for broken ones, "
        "which are skipped and named",
    )
    p.add_argument(
        "--style",
        default="fashiongen",
        help="fashion200k, which is short, fashiongen, professional, or fashioniq-cap, detailed (default %(default)s)",
    )
    model_argument(p, "llava", "LLaVA-1.5-7B as published")
    help_ = "a word a line, of which llava is to use those that match the picture (unifashion.data.keywords)"
    p.add_argument("--keywords", type=Path, metavar="FILE", help=help_)
    p.add_argument("--beams", type=int, default=1, help="1 is greedy (default %(default)s)")
    p.add_argument("--max-tokens", type=int, default=128, help="of a caption (default %(default)s)")
    p.add_argument(
        "--out",
        type=Path,
        help="a .jsonl, a line a picture, until all are done beside it as .part; pictures whose caption is in either "
        "are left out (default: the terminal)",
    )
    compile_argument(p)
    common_arguments(p)

    p = commands.add_parser("index", help=index.__doc__, description=index.__doc__)
    p.set_defaults(run=index)
    help_ = "folder of pictures, and of folders of pictures; broken ones are skipped and named"
    p.add_argument("--images", type=Path, required=True, help=help_)
    help_ = "the catalogue, a folder; what is in it already is not embedded again, what is no more is dropped"
    p.add_argument("--out", type=Path, required=True, help=help_)
    model_argument(p, "blip2", "BLIP-2 as published")
    help_ = "write a caption of each picture, too, which composed search reads (default style fashiongen)"
    p.add_argument("--captions", nargs="?", const="fashiongen", metavar="STYLE", help=help_)
    common_arguments(p)

    p = commands.add_parser("search", help=search.__doc__, description=search.__doc__)
    p.set_defaults(run=search)
    p.add_argument("--catalog", type=Path, required=True, help="what index has made, with the same model")
    model_argument(p, "blip2", "BLIP-2 as published")
    p.add_argument("--text", help="what is looked for, or, with --image, what is to be different")
    p.add_argument("--image", type=Path, help="a picture like those that are looked for")
    p.add_argument("--top", type=int, default=10, help="how many are told (default %(default)s)")
    p.add_argument("--sheet", type=Path, help="a .png: what was asked for and what was found, with scores")
    common_arguments(p)
    args = top.parse_args(argv)
    if args.model != "unifashion":
        if args.preset == "tiny":
            raise UserError(f"--model {args.model} has no preset tiny: it was published in one size")
        args.preset = "full"
    return args


def main(argv: list[str] | None = None) -> int:
    for stream in (sys.stdout, sys.stderr):  # a terminal that is not UTF-8 shows what it lacks as \u2019
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
    try:
        args = parse(argv)
        args.run(args)
        sys.stdout.flush()  # while a reader that has left is looked for
    except UserError as error:
        print("infer.py:", plain(" ".join(str(error).splitlines())), file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("infer.py: stopped", file=sys.stderr)
        return 130
    except BrokenPipeError:
        exit_if_unread()
        raise  # another pipe's: a bug
    return 0


if __name__ == "__main__":
    # Threads sleep while they wait for each other, rather than keep cores busy: beside other work on two cores a try-on of TINY
    # took 5 s instead of 26 to 190, with nothing beside it 3.7 instead of 2.9. Read when torch is loaded.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    sys.exit(main())
