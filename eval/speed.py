"""How long ours takes beside what a user would pick instead, and how far both are from what the machine can do.

    python -m eval.speed                                   all of it: at full size on CUDA, reduced on a CPU
    python -m eval.speed step --size full --repeats 3      one step of the sampler
    python -m eval.speed write train                       captions, and steps of training

    step     the U-Net, a batch of 2 as guidance has it; ours also with pose and garment encoder
    tryon    photos to PNG files, a batch of pictures of one person: Paint-by-Example, ours also StableVITON
    decode   latent to picture
    write    a caption of 64 tokens after a prompt of 64 embeddings; in float32 both have to write the same tokens
    embed    pictures to what search compares: ViT, Q-Former, projection
    search   the first 10 of a catalogue; beside it one product of the query with all that is stored (`eval.search_speed`
             tells more)
    train    a step with AdamW: the U-Net's, and LoRA's in the LLM; layers are computed again in the backward pass in both
    cost     ours for more pictures and for more steps: is it a straight line?

Both take turns in the same run, with random weights: only ratios within a run mean something. Ours is what `infer.py` runs,
"compiled" with --compile. Peers are as they come ("diffusers"), and with the settings that their documentation recommends
(channels last and compiled, a static cache). Columns:

    s        the median          each   of it for one picture, token, sample
    x        how many times as fast as the peer as it comes: the median of the rounds' ratios
    floor    the longer of what it computes (counted by torch of ours) at the speed of a large matrix product, and what it reads
             at least (its weights, as often as there is a step) at the speed of a large copy, both measured here
    share    floor / s           CPU s  what all threads worked: says more where others work, too
    GiB      in training, the most that is held at a time
"""

import argparse
import gc
import statistics
import sys
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from unittest import mock

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from eval import workloads
from eval.ledger import Ledger
from eval.sizes import SIZES, Size
from eval.timing import Call, Ceilings, Round, ceilings, machine, measure, median
from eval.workloads import Place, Workload, photo, picture_files
from unifashion import Parser, UserError, cpu, fast, training, tryon
from unifashion.preprocess import read_image
from unifashion.stableviton import StableVITON
from weights.load import load_unifashion

DOCS = Path(__file__).parent.parent / "docs"


@contextmanager
def settings(name: str) -> Iterator[None]:
    """What is not called compiled is not, though it may share a network; and peers run without what `cpu.py` tells a CPU."""
    with ExitStack() as stack:
        if "compiled" not in name:
            stack.enter_context(torch.compiler.set_stance("force_eager"))
            call = lambda recorded, *args: recorded.function(*args)  # noqa: E731
            stack.enter_context(mock.patch.object(fast.Recorded, "__call__", call))
        if not name.startswith("ours"):
            as_it_was = {
                "scaled_dot_product_attention": cpu.ATTENTION,
                "conv2d": cpu.CONV,
                "linear": cpu.LINEAR,
            }
            stack.enter_context(mock.patch.multiple(F, **as_it_was))
        yield


@torch.no_grad()
def bf16_psnr(device: torch.device) -> float:
    """PSNR of what weights/tiny decodes in bfloat16 from the latent of docs/person.png, to what it decodes in float32."""
    pictures = []
    for dtype in (torch.float32, torch.bfloat16):
        model = load_unifashion("tiny", device=device, dtype=dtype)
        picture = tryon.unet_picture(read_image(DOCS / "person.png"), model.cfg)[None].to(device)
        latent = model.vae.float().encode(picture).to(dtype)
        pictures.append(model.vae.to(dtype).decode(latent).float().clamp(-1, 1))
    error = (pictures[0] - pictures[1]).square().mean()
    return float(10 * torch.log10(4 / error))


def peak(call: Call, held: list[Tensor], device: torch.device) -> int:
    """The most bytes that one step has, with what it holds: of CUDA's allocator, or the sum of what is alive."""
    if device.type == "cuda":
        others = torch.cuda.memory_allocated() - sum(x.numel() * x.element_size() for x in held)
        torch.cuda.reset_peak_memory_stats()
        call()
        return torch.cuda.max_memory_allocated() - others
    with Ledger(held) as ledger:
        call()
    return ledger.peak


# more of the same


def cost(size: Size, place: Place, repeats: int) -> None:
    """Print what more pictures, and more steps, take, and how far each is from a straight line."""
    cfg = size.dressed
    model = fast.in_order(place.fill(partial(StableVITON, cfg)))
    if place.compiles:
        fast.compile_drawing(model, lambda note: None)
    photos = [photo(cfg.picture, seed) for seed in range(3)]
    with tempfile.TemporaryDirectory() as folder:
        for name, numbers in (("pictures", size.counts), ("steps", size.steps)):
            calls = {}
            for n in numbers:
                b, steps = (n, size.steps[0]) if name == "pictures" else (1, n)
                calls[f"ours, compiled: {n}"] = partial(
                    picture_files, model, photos, Path(folder), b, steps, "dpm++"
                )
            rounds = measure(calls, repeats, place.device, settings)
            seconds = [median(found).seconds for found in rounds.values()]
            off = straightness(numbers, seconds)
            told = ", ".join(f"{n}: {s:.3g} s" for n, s in zip(numbers, seconds, strict=True))
            print(f"{name:<10}{told}; a straight line to {100 * off:.1f} %", flush=True)


def straightness(numbers: tuple[int, ...], seconds: list[float]) -> float:
    """The largest relative distance of any from the line that is nearest to all, in relative squares."""
    n, s = np.array(numbers, dtype=float), np.array(seconds)
    fit, *_ = np.linalg.lstsq(np.stack([1 / s, n / s], 1), np.ones(len(s)), rcond=None)
    return float(np.abs((fit[0] + fit[1] * n) / s - 1).max())


# the table

WORKLOADS = {
    "step": workloads.steps,
    "tryon": workloads.tryons,
    "decode": workloads.decodings,
    "write": workloads.writings,
    "embed": workloads.embeddings,
    "search": workloads.searches,
    "train": workloads.trainings,
}
HEAD = f"{'':<36}{'':<36}{'s':>9}{'each':>10}{'x':>7}{'floor':>10}{'share':>7}{'CPU s':>9}{'GiB':>8}"


def rows(work: Workload, place: Place, most: Ceilings, repeats: int) -> str:
    """A line for each who does it."""
    rounds = measure(work.calls, repeats, place.device, settings)
    peer = next((who for who in work.calls if not who.startswith("ours")), None)
    floor = max(work.flops / most.flops, work.bytes / most.bytes)
    lines = []
    for who, found in rounds.items():
        seconds, cpu_seconds = median(found)
        line = f"{work.name:<36}{who:<36}{seconds:>9.4g}{seconds / work.n:>10.3g}"
        line += f"{times_as_fast(found, rounds[peer]):>7.2f}" if peer else f"{'-':>7}"
        line += f"{floor:>10.3g}{100 * floor / seconds:>6.0f}%{cpu_seconds:>9.4g}"
        if work.held:
            with settings(who):
                line += f"{peak(work.calls[who], work.held[who], place.device) / 2**30:>8.3f}"
        lines.append(line)
    return "\n".join(lines)


def times_as_fast(found: list[Round], peer: list[Round]) -> float:
    """The median of each round's ratio: what else the machine did in a round, both had to bear."""
    return statistics.median(b.seconds / a.seconds for a, b in zip(found, peer, strict=True))


def main(argv: list[str] | None = None) -> None:
    parser = Parser(description=__doc__)
    parser.add_argument("what", nargs="*", choices=[*WORKLOADS, "cost", []], help="default: all")
    parser.add_argument("--size", choices=SIZES, help="default: full on CUDA, reduced on a CPU")
    parser.add_argument("--repeats", type=int, default=5, help="timed rounds; medians are told")
    parser.add_argument("--device", default="auto", help="auto | cpu | cuda")
    parser.add_argument(
        "--dtype", choices=["auto", "fp32", "bf16"], default="auto", help="auto: bf16 on CUDA"
    )
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, help="default: on CUDA")
    args = parser.parse_args(argv)
    if args.repeats < 1:
        raise UserError(f"--repeats is {args.repeats}, must be at least 1")
    device = training.pick_device(args.device)
    dtype = training.compute_dtype(device, args.dtype)
    cuda = device.type == "cuda"
    if not cuda and dtype == torch.bfloat16 and not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        print(
            "note: this CPU has no instructions for bfloat16: peers take several times as long as ours",
            file=sys.stderr,
        )
    place = Place(device, dtype, cuda if args.compile is None else args.compile)
    name = args.size or ("full" if cuda else "reduced")
    cpu.fast_malloc()
    cpu.float32_where_faster(device, dtype)
    fast.repeatable()  # as infer.py
    torch.manual_seed(0)
    with torch.no_grad():
        most = ceilings(device, dtype)
        print(f"{machine(device, dtype)}; {name} size")
        print(f"the most: {most.flops / 1e12:.3g} TFLOP/s, {most.bytes / 1e9:.3g} GB/s\n\n{HEAD}", flush=True)
        for what in args.what or [*WORKLOADS, "cost"]:
            if what == "cost":
                cost(SIZES[name], place, args.repeats)
            else:
                for work in WORKLOADS[what](SIZES[name], place):
                    print(rows(work, place, most, args.repeats), flush=True)
                del work  # and its networks
            if what == "decode" and dtype == torch.bfloat16:
                print(f"the shipped VAE in bf16: {bf16_psnr(device):.1f} dB from its pictures in fp32")
            gc.collect()
            torch._dynamo.reset()


if __name__ == "__main__":
    training.run(main)
