"""How long ours takes, beside diffusers, transformers and a plain product, taking turns in the same run.

    python -m eval.speed [--repeats 5] [--device cpu]          one step of the sampler
    python -m eval.speed write [--repeats 5] [--device cpu]    a caption
    python -m eval.speed search [--repeats 5] [--device cpu]   a search: 1,000 pictures to the most that fit into memory

A step:

    ours, with the garment    U-Net with 13 input channels, garment encoder, nine attention blocks in the decoder
    ours, the U-Net alone     the same without a garment: the same work as diffusers'
    diffusers                 UNet2DConditionModel with 9 input channels, as in Paint-by-Example

All of FULL's width with random weights in bfloat16; latents 64 x 48, 32 context tokens, a batch of 2 as guidance has it.
Ours gets its context as keys and values, as in sampling, where they are made once per picture. Only ratios within a run
mean something. "CPU s" is what all threads of this process worked: on a CPU that others use too it says more than time on
the clock; on CUDA it is the cost of starting the kernels.

A caption: 64 tokens, greedily, after a prompt of 64 embeddings, by a Llama of 12 layers and width 1024 with the same random
weights in both, in batches of 1 and 8; in float32, on CUDA in bfloat16. In float32 both have to write the same tokens.

A search: `Catalog.find` of the first 10 in catalogues of random unit vectors, in files as `infer.py index` writes them, which
an untimed round brings into memory. Beside it `torch.mv` of all that is stored for the pictures, as it is stored (float16),
with the query: it reads the same bytes and says nothing of an order. "ratio" is of times on the clock, "CPU" of CPU s. Memory
is the whole process's peak in three searches, Python and torch included, less the catalogue's file, which is mapped. "open"
and "check" are what `infer.py search` does before: reading items.jsonl, and, if it has not seen this file before, its hash.
"""

import platform
import resource
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from unifashion import Parser, UserError, cpu, training
from unifashion.blocks import UNetConfig
from unifashion.catalog import VERSION, Catalog, write
from unifashion.config import FULL, TINY
from unifashion.garment import GarmentEncoder
from unifashion.llama import Llama, LlamaConfig, generate
from unifashion.unet import UNet
from weights.llama import LLAMA
from weights.rename import load_into

CPU = torch.device("cpu")
BATCH, TOKENS = 2, 32
KINDS = ("text", "picture", "both")  # of what is looked for
WRITER = LlamaConfig(dim=1024, depth=12, heads=16, mlp_dim=2816, context=512)
Step = Callable[[], Tensor]


def diffusers_unet(cfg: UNetConfig) -> nn.Module:
    """UNet2DConditionModel as wide as `cfg` and with as many attention blocks."""
    try:
        from diffusers import UNet2DConditionModel
    except ImportError:
        raise UserError(
            "eval.speed compares with diffusers, which is not installed: pip install diffusers"
        ) from None
    attends = [level in cfg.attention_levels for level in range(len(cfg.widths))]
    return UNet2DConditionModel(
        in_channels=cfg.in_channels,
        out_channels=cfg.out_channels,
        block_out_channels=tuple(cfg.widths),
        layers_per_block=cfg.res_blocks,
        norm_num_groups=cfg.groups,
        cross_attention_dim=cfg.context_dim,
        attention_head_dim=cfg.heads,  # the number of heads, in spite of its name
        down_block_types=tuple("CrossAttnDownBlock2D" if yes else "DownBlock2D" for yes in attends),
        up_block_types=tuple("CrossAttnUpBlock2D" if yes else "UpBlock2D" for yes in reversed(attends)),
    )


@torch.no_grad()
def random_weights(make: Callable[[], nn.Module], device: torch.device) -> nn.Module:
    """A network in bfloat16 filled with one repeated pattern: a billion true random numbers would take longer than the test."""
    with torch.device("meta"):
        net = make().bfloat16().eval().requires_grad_(False)
    net.to_empty(device=device)
    pattern = (
        (0.02 * torch.randn(2**20 - 3, generator=torch.Generator().manual_seed(0))).bfloat16().to(device)
    )
    for p in net.parameters():
        p.copy_(pattern.repeat(p.numel() // len(pattern) + 1)[: p.numel()].view_as(p))
    return net


def steps_of(cfg: UNetConfig, latent: tuple[int, int], device: torch.device) -> dict[str, Step]:
    """Name -> one call for the predicted noise (2,4,y,x)."""
    nine = replace(cfg, in_channels=9)
    net, garment = (random_weights(partial(kind, cfg), device) for kind in (UNet, GarmentEncoder))
    theirs = random_weights(partial(diffusers_unet, nine), device)

    def draw(*shape: int) -> Tensor:
        return torch.randn(BATCH, *shape).to(device, torch.bfloat16)

    x, hint, context = draw(cfg.in_channels, *latent), draw(4, *latent), draw(TOKENS, cfg.context_dim)
    t = torch.full((BATCH,), 981, device=device)
    for_net, for_garment = net.context(context), garment.context(context)

    def dressed() -> Tensor:
        return net(x, t, for_net, partial(garment.inject, garment(x, t, for_garment, hint), None))

    return {
        "ours, with the garment": dressed,
        "ours, the U-Net alone": lambda: net(x, t, for_net),
        "diffusers": lambda: theirs(x[:, :9], t, context).sample,
    }


def writers_of(cfg: LlamaConfig, b: int, tokens: int, device: torch.device) -> dict[str, Step]:
    """Name -> one generation: token ids (b,tokens)."""
    try:
        import transformers
    except ImportError:
        raise UserError(
            "eval.speed compares with transformers, which is not installed: pip install transformers"
        ) from None
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    like = transformers.LlamaConfig(
        vocab_size=cfg.vocab_size,
        hidden_size=cfg.dim,
        intermediate_size=cfg.mlp_dim,
        num_hidden_layers=cfg.depth,
        num_attention_heads=cfg.heads,
        max_position_embeddings=cfg.context,
        rms_norm_eps=cfg.eps,
        attn_implementation="sdpa",
        pad_token_id=0,
        eos_token_id=None,  # both write on to the last token
    )
    theirs = transformers.LlamaForCausalLM(like).to(device, dtype).eval()
    with torch.device("meta"):
        ours = Llama(cfg).eval()
    load_into(ours, theirs.state_dict(), LLAMA)
    prompt = (0.02 * torch.randn(b, 64, cfg.dim)).to(device, dtype)
    mask = torch.ones(b, 64, dtype=torch.bool, device=device)
    asked = {"max_new_tokens": tokens, "do_sample": False, "use_cache": True}
    return {
        "ours": lambda: generate(ours, prompt, mask, tokens, eos=-1),
        "transformers": lambda: theirs.generate(inputs_embeds=prompt, attention_mask=mask.long(), **asked),
    }


class Round(NamedTuple):
    seconds: float
    cpu_seconds: float  # of all threads


@torch.no_grad()
def multiply_adds(cfg: UNetConfig, latent: tuple[int, int]) -> dict[str, int]:
    """Of each step; counted on the meta device, because on a CPU the counter does not see fused attention."""
    work = {}
    for name, step in steps_of(cfg, latent, torch.device("meta")).items():
        with FlopCounterMode(display=False) as counter:
            step()
        work[name] = counter.get_total_flops() // 2
    return work


@torch.no_grad()
def measure(steps: dict[str, Step], repeats: int, device: torch.device) -> dict[str, list[Round]]:
    """The times of each step, round by round; a first round warms up and is not timed."""
    rounds: dict[str, list[Round]] = {name: [] for name in steps}
    for name, step in steps.items():
        if not step().isfinite().all():
            raise RuntimeError(f"{name} gives numbers that are not finite: its time would mean nothing")
    for _ in range(repeats):
        for name, step in steps.items():
            start, cpu_start = time.perf_counter(), time.process_time()
            step()
            cpu_seconds = time.process_time() - cpu_start  # before the wait, which on CUDA is a busy one
            if device.type == "cuda":
                torch.cuda.synchronize()
            rounds[name].append(Round(time.perf_counter() - start, cpu_seconds))
            print(f"{name}: {rounds[name][-1].seconds:.4g} s", file=sys.stderr, flush=True)
    return rounds


def report(work: dict[str, int], rounds: dict[str, list[Round]]) -> str:
    """A row for each step: medians, each also as a ratio to diffusers' median, and every time on the clock."""
    median = {
        name: [statistics.median(times) for times in zip(*found, strict=True)]
        for name, found in rounds.items()
    }
    lines = [
        f"{f'one step, batch {BATCH}':<24}{'GMAC':>8}{'s':>9}{'ratio':>7}{'CPU s':>9}{'ratio':>7}   all, s"
    ]
    for name, found in rounds.items():
        row = f"{name:<24}{work[name] / 1e9:>8.4g}"
        for ours, theirs in zip(median[name], median["diffusers"], strict=True):
            row += f"{ours:>9.4g}{ours / theirs:>7.2f}"
        lines.append(f"{row}   {' '.join(f'{r.seconds:.4g}' for r in found)}")
    return "\n".join(lines)


def report_writing(tokens: int, found: dict[int, dict[str, list[Round]]]) -> str:
    """found: batch -> name -> rounds. A row for each batch and name: tokens a second at the median, ratio to transformers'."""
    lines = [f"{'batch':<7}{'':<14}{'s':>8}{'tokens/s':>10}{'ratio':>7}   all, s"]
    for b, rounds in found.items():
        rate = {
            name: b * tokens / statistics.median(r.seconds for r in times) for name, times in rounds.items()
        }
        for name, times in rounds.items():
            row = f"{b:<7}{name:<14}{b * tokens / rate[name]:>8.3f}{rate[name]:>10.1f}"
            row += f"{rate[name] / rate['transformers']:>7.2f}"
            lines.append(f"{row}   {' '.join(f'{r.seconds:.3f}' for r in times)}")
    return "\n".join(lines)


def random_catalog(folder: Path, n: int, shape: tuple[int, int]) -> Catalog:
    """n pictures, with captions, as (q,d) unit vectors."""
    q, d = shape

    def pieces() -> Iterator[np.ndarray]:
        for width in (q, 1):  # pictures, then captions
            for start in range(0, n, 512):
                piece = torch.randn(min(512, n - start), width, d, generator=generator)
                yield F.normalize(piece, dim=-1).half().numpy()

    generator = torch.Generator().manual_seed(n)
    items = ({"path": f"{i // 1000}/{i}.jpg", "sha256": f"{i:064x}", "caption": "a dress"} for i in range(n))
    write(folder, {"catalogue": VERSION}, {"images": [n, q, d], "captions": [n, d]}, pieces(), items)
    return Catalog(folder)


def searches_of(catalog: Catalog, device: torch.device) -> dict[str, Step]:
    """Name -> one search, and after each the plain product of the same bytes."""
    n, q, d = catalog.images.shape
    images, captions = catalog.images, catalog.captions
    text = F.normalize(torch.randn(d), dim=-1).half()
    picture = F.normalize(torch.randn(q, d), dim=-1).half()

    def find(query: Tensor, composed: bool) -> Tensor:
        return torch.tensor([x["score"] for x in catalog.find(query, 10, composed, device)])

    rows, wide = images.view(n * q, d), images.view(n, q * d)
    return {
        "text": lambda: find(text, False),
        "text, product": lambda: torch.mv(rows, text),
        "picture": lambda: find(picture, False),
        "picture, product": lambda: torch.mv(wide, picture.flatten()),
        "both": lambda: find(text, True),
        "both, product": lambda: (torch.mv(captions, text), torch.mv(rows, text))[1],
    }


def most_that_fit(folder: Path, bytes_each: int) -> int:
    """How many pictures take three quarters of the memory, and of the disk, that nobody uses."""
    free = {line.split(":")[0]: line.split()[1] for line in Path("/proc/meminfo").read_text().splitlines()}
    room = min(int(free["MemAvailable"]) * 1024, shutil.disk_usage(folder).free)
    return int(0.75 * room / bytes_each / 1000) * 1000


def time_searches(sizes: list[int], shape: tuple[int, int], repeats: int, device: torch.device) -> None:
    """Print a row for each number of pictures and kind of query."""
    print(f"{'pictures':>9}  {'query':<9}{'MB':>8}{'s':>9}{'product, s':>12}{'ratio':>7}{'CPU':>7}{'us/picture':>12}"
          f"{'MB above':>10}{'open, s':>9}{'check, s':>10}")  # fmt: skip
    for n in sizes:
        with tempfile.TemporaryDirectory() as folder:
            start = time.perf_counter()
            catalog = random_catalog(Path(folder), n, shape)
            print(f"{n} pictures drawn in {time.perf_counter() - start:.0f} s", file=sys.stderr)
            start = time.perf_counter()
            Catalog(Path(folder))
            opened = time.perf_counter()
            catalog.verify(quiet=True)
            checked = time.perf_counter()
            steps, size = searches_of(catalog, device), catalog.file.stat().st_size
            forget_peak()
            for kind in KINDS:
                steps[kind]()
            above = (peak_memory(CPU) - size) / 1e6
            rounds = measure(steps, repeats if n > 50_000 else 9 * repeats, device)
            for kind in KINDS:
                found = rounds[kind], rounds[f"{kind}, product"]
                ours, plain = (statistics.median(r.seconds for r in times) for times in found)
                cpu, cpu_plain = (statistics.median(r.cpu_seconds for r in times) for times in found)
                print(
                    f"{n:>9}  {kind:<9}{size / 1e6:>8.0f}{ours:>9.4f}{plain:>12.4f}{ours / plain:>7.2f}"
                    f"{cpu / cpu_plain:>7.2f}{1e6 * ours / n:>12.2f}{above:>10.0f}"
                    f"{opened - start:>9.2f}{checked - opened:>10.2f}",
                    flush=True,
                )


def machine(device: torch.device, dtype: torch.dtype) -> str:
    if device.type == "cuda":
        what = torch.cuda.get_device_name()
    else:
        cpuinfo = Path("/proc/cpuinfo")
        names = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
        model = next(
            (line.split(": ")[1] for line in names if line.startswith("model name")), platform.processor()
        )
        what = f"{model}, {torch.get_num_threads()} threads"
    return f"{what}; torch {torch.__version__}; {str(dtype).removeprefix('torch.')}"


def peak_memory(device: torch.device) -> int:
    """Bytes: of the GPU where there is one, else of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated()
    if Path("/proc/self/status").exists():  # what `forget_peak` forgets
        status = dict(line.split(":") for line in Path("/proc/self/status").read_text().splitlines())
        return int(status["VmHWM"].split()[0]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def forget_peak() -> None:
    """This process's peak is what it has now."""
    Path("/proc/self/clear_refs").write_text("5")


def main(argv: list[str] | None = None) -> None:
    parser = Parser(description=__doc__)
    parser.add_argument("what", nargs="?", choices=["draw", "write", "search"], default="draw")
    parser.add_argument("--repeats", type=int, default=5, help="timed rounds; medians are reported")
    parser.add_argument("--device", default="auto", help="auto | cpu | cuda")
    parser.add_argument(
        "--tiny", action="store_true", help="the TINY preset: seconds instead of minutes, no meaning"
    )
    args = parser.parse_args(argv)
    if args.repeats < 1:
        raise UserError(f"--repeats is {args.repeats}, must be at least 1")
    device = training.pick_device(args.device)
    cpu.fast_malloc()
    preset = TINY if args.tiny else FULL
    torch.manual_seed(0)
    if args.what == "search":
        print(machine(device, torch.float16), flush=True)
        cfg = preset.qformer
        most = most_that_fit(Path(tempfile.gettempdir()), 2 * (cfg.queries + 1) * cfg.embed_dim)
        sizes = [1000, 2000] if args.tiny else [n for n in (1000, 10_000, 100_000) if n < most] + [most]
        return time_searches(sizes, (cfg.queries, cfg.embed_dim), args.repeats, device)
    if args.what == "write":
        dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        print(machine(device, dtype), flush=True)
        cfg, tokens, found = (TINY.llama if args.tiny else WRITER), 8 if args.tiny else 64, {}
        for b in (1, 8):
            steps = writers_of(cfg, b, tokens, device)
            if dtype == torch.float32:
                if not torch.equal(*(step() for step in steps.values())):
                    raise RuntimeError("the two write different tokens: their times would mean nothing")
                print(f"batch {b}: the same tokens", flush=True)
            found[b] = measure(steps, args.repeats, device)
        return print(report_writing(tokens, found))
    print(machine(device, torch.bfloat16), flush=True)
    work = multiply_adds(preset.unet, preset.latent)
    print(report(work, measure(steps_of(preset.unet, preset.latent, device), args.repeats, device)))
    print(f"peak memory {peak_memory(device) / 2**30:.1f} GiB, all three networks loaded")


if __name__ == "__main__":
    training.run(main)
