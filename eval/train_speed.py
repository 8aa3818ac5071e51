"""Memory and throughput of one training step of every stage of phase 1 and every task of phase 2.

    python -m eval.train_speed                          FULL: measured on a GPU, computed without one
    python -m eval.train_speed --preset tiny            measured, on a CPU, too
    python -m eval.train_speed --stage cir --batch-size 64 --json

The step is the scripts' own: their batch, their frozen half, losses, clipped_backward, AdamW and EMA, autocast and checkpointing.
Weights and pictures are random. Captions are as long as they may be, 128 tokens: what real ones take is less. A model of phase 2
has both halves, the moments of all that learns and the EMA of what draws, as in `--task all`. To read pictures takes no time here.

Memory has a column for what is there between the steps, and one for the highest mark in each part of a step: the frozen half, the
losses, their backward pass, the optimiser.

    measured   on CUDA, torch.cuda.max_memory_allocated; on a CPU, the sum of the tensors that are alive, and no FLOPs
    computed   the same step with tensors that have no contents (FakeTensorMode), the sum of those that would be alive: with
               CUDA's fused attention, its norms in float32 under autocast, its AdamW. Neither the scratch of single kernels nor
               what the allocator cannot use is in it. Of time nothing is said.
"""

import gc
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode

import train_phase1
import train_phase2
from eval.ledger import Ledger
from eval.timing import machine
from unifashion import Parser, UserError, cpu, feed, lora, training
from unifashion.config import PRESETS, UniFashionConfig
from unifashion.model import UniFashion
from unifashion.samples import CONDITIONS

STAGES = {  # name here -> phase, name in its script
    "align": (1, "align"),
    "caption": (1, "caption"),
    "generate": (1, "generate"),
    "retrieval": (2, "retrieval"),
    "cir": (2, "cir"),
    "caption2": (2, "caption"),
    "tryon": (2, "tryon"),
}
COMPARES = ("align", "retrieval", "cir")  # the samples of a batch
TEMPLATE = 8, 32  # tokens left and right of the soft prompt: no template of Llama's pieces has more
CARD = 80e9
MOMENTS = ("encode", "losses", "backward", "update")
GIB = 2**30

Batch = dict[str, Tensor]


def default_batch(stage: str, preset: str) -> int:
    phase, name = STAGES[stage]
    return (train_phase1, train_phase2)[phase - 1].DEFAULTS[preset][name]["batch_size"]


def random_batch(stage: str, cfg: UniFashionConfig, b: int) -> Batch:
    """What a DataLoader gives for the stage, on the CPU: `samples.Pairs`, Answers, Triplets, Scenes, collated."""

    def picture(*before: int) -> Tensor:
        return torch.randn(b, *before, 3, *cfg.vit.image_size)

    def drawn(*before: int) -> Tensor:
        return torch.rand(b, *before, 3, *cfg.picture) * 2 - 1

    def text(*before: int) -> Batch:
        shape = (b, *before, cfg.qformer.max_text)
        return {
            "ids": torch.randint(5, cfg.qformer.vocab_size, shape),
            "mask": torch.ones(shape, dtype=torch.bool),
        }

    def answer() -> Batch:
        before, after = TEMPLATE
        shape = (b, after + cfg.max_caption)
        return {
            "before": torch.randint(3, cfg.llama.vocab_size, (b, before)),
            "after": torch.randint(3, cfg.llama.vocab_size, shape),
            "answer": (torch.arange(shape[1]) >= after).expand(shape).clone(),
        }

    batch = {"index": torch.arange(b)}
    if stage in ("align", "retrieval", "generate"):
        batch |= {"picture": picture(), **text(), "product": torch.arange(b)}
    if stage == "generate":
        batch |= {"x0": drawn()}
    if stage in ("caption", "caption2"):
        batch |= {"picture": picture(), **answer()}
    if stage == "cir":
        ways, caption = text(4), text()
        batch |= {"pictures": picture(2), "ways": ways["ids"], "ways_mask": ways["mask"], **answer()}
        batch |= {"caption_ids": caption["ids"], "caption_mask": caption["mask"], "x0": drawn()}
        batch |= {"target_id": torch.arange(b)}
    if stage == "tryon":
        batch |= {name: drawn() for name in ("person", "agnostic", "pose")}
        batch |= {"keep": torch.rand(b, 1, *cfg.latent), "hints": drawn(2), "pictures": picture(2), **text()}
        batch |= {"odds": torch.tensor([list(CONDITIONS.values())]).expand(b, -1).clone()}
    return batch


@torch.no_grad()
def random_model(
    cfg: UniFashionConfig, draws: bool, writes: bool, device: torch.device, llm_dtype: torch.dtype
) -> UniFashion:
    """As `load_public` gives it, LoRA injected, but with random numbers."""
    with torch.device("meta"):
        model = UniFashion(cfg, draws, writes)
    for name, p in list(model.named_parameters()):
        owner, _, leaf = name.rpartition(".")
        dtype = llm_dtype if owner.startswith("llama") else p.dtype
        order = torch.channels_last if p.ndim == 4 else torch.contiguous_format  # as both scripts have it
        x = torch.empty(p.shape, dtype=dtype, device=device, memory_format=order)
        if p.ndim > 1:
            x.normal_(std=0.02)
        else:
            x.fill_(0.07 if name == "qformer.temp" else float("norm" in owner and leaf == "weight"))
        setattr(model.get_submodule(owner), leaf, nn.Parameter(x))
    if writes:
        lora.inject(model.llama, cfg.lora)
    return model


@dataclass
class Setup:
    """A stage just before a step in the middle of its run."""

    stage: str
    model: UniFashion
    batch: Batch  # on the CPU
    encode: Callable[[UniFashion, Batch], Batch]
    losses: Callable[..., Batch]
    parameters: dict[str, nn.Parameter]  # those of which the optimiser knows
    learning: list[nn.Parameter]  # those that learn in this step
    optimizer: torch.optim.AdamW
    ema: training.EMA | None
    device: torch.device
    dtype: str

    def at_rest(self) -> list[Tensor]:
        """What is on the device between two steps."""
        moments = [x for state in self.optimizer.state.values() for x in state.values()]
        return [*self.model.parameters(), *moments, *(self.ema.average.values() if self.ema else ())]


def prepare(
    stage: str,
    cfg: UniFashionConfig,
    b: int,
    device: torch.device,
    dtype: str = "auto",
    checkpointing: bool = True,
) -> Setup:
    """As the scripts do it, up to their loop; dtype as their --dtype."""
    phase, name = STAGES[stage]
    draws, writes = phase == 2 or name == "generate", phase == 2 or name == "caption"
    model = random_model(cfg, draws, writes, device, training.compute_dtype(device, dtype))
    if checkpointing:
        training.checkpointing(model)
    if phase == 1:
        encode, losses = train_phase1.STAGES[name]
        parameters = training.set_trainable(model, train_phase1.TRAINABLE[name])
        diffusion = parameters if draws else {}
        groups, learning = [parameters], list(parameters.values())
    else:
        _, encode, losses = train_phase2.TASKS[name]
        patterns = {p for part in train_phase2.TRAINABLE.values() for p in part}
        parameters = training.set_trainable(model, sorted(patterns))
        diffusion = {k: p for k, p in parameters.items() if not k.startswith("qformer.")}
        qformer = {k: p for k, p in parameters.items() if k not in diffusion}
        groups, learning = [qformer, diffusion], list((parameters if name == "tryon" else qformer).values())
    training.train_mode(model, parameters)
    optimizer = torch.optim.AdamW([{"params": list(group.values())} for group in groups], lr=1e-6, fused=True)
    for p in parameters.values():
        p.grad = torch.zeros_like(p)
    optimizer.step()  # of no effect, but now the moments are there
    optimizer.zero_grad(set_to_none=True)
    for p in diffusion.values() if phase == 2 else ():
        p.requires_grad_(name == "tryon")
    ema = training.EMA(diffusion) if diffusion else None
    batch = random_batch(stage, cfg, b)
    return Setup(
        stage, model, batch, encode, losses, parameters, learning, optimizer, ema, device, dtype
    )  # fmt: skip


def step(s: Setup) -> Iterator[str]:
    """One step, as in the scripts' loops. Yields MOMENTS, each when it is over."""
    with training.autocast(s.device, s.dtype):
        moved = {k: v if k in feed.ON_CPU else v.to(s.device, copy=True) for k, v in s.batch.items()}
        batch = s.encode(s.model, moved)
        del moved
        yield "encode"
        rng = training.BatchRNG(s.stage, 0, 0, len(batch["index"]), s.device)
        parts = s.losses(s.model, batch, rng, 1.0)
        yield "losses"
    training.clipped_backward(parts, s.learning, 1.0)
    yield "backward"
    s.optimizer.step()
    s.optimizer.zero_grad(set_to_none=True)
    if s.ema is not None and STAGES[s.stage][1] in ("generate", "tryon"):
        s.ema.update()
    yield "update"


def like_cuda() -> dict[str, Callable[..., Tensor]]:
    """For tensors without contents, which call themselves the CPU's: functions of F that on CUDA keep other things in memory."""
    layer_norm, group_norm = F.layer_norm, F.group_norm

    def wide(x: Tensor) -> Tensor:
        return x.float() if torch.is_autocast_enabled("cpu") else x

    def attention(q, k, v, attn_mask=None, dropout_p=0.0, is_causal=False):
        if torch.is_autocast_enabled("cpu"):
            q, k, v = (x.to(torch.get_autocast_dtype("cpu")) for x in (q, k, v))
        if attn_mask is not None and attn_mask.dtype == torch.bool:
            attn_mask = torch.zeros_like(attn_mask, dtype=q.dtype).masked_fill(~attn_mask, -torch.inf)
        if attn_mask is not None:
            attn_mask = attn_mask.to(q.dtype).expand(*q.shape[:3], k.shape[2])
        learns = torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v))
        fused = torch.ops.aten._scaled_dot_product_efficient_attention
        return fused(q, k, v, attn_mask, learns, dropout_p, is_causal)[0]

    return {
        "scaled_dot_product_attention": attention,
        "layer_norm": lambda x, *more: layer_norm(wide(x), *more),
        "group_norm": lambda x, *more: group_norm(wide(x), *more),
        "dropout": lambda x, p, training: torch.native_dropout(x, p, True)[0] if p and training else x,
    }


@dataclass
class Row:
    stage: str
    batch: int
    measured: bool
    learns: int = 0  # parameters, in this step
    frozen: int = 0
    rest: int = 0  # bytes between the steps
    peaks: dict[str, int] = field(default_factory=dict)  # moment -> bytes
    seconds: float | None = None  # a step
    cpu_seconds: float | None = (
        None  # of all threads: says more where others work, too; on CUDA, to start the kernels
    )
    flops: int | None = None
    failed: str = ""

    @property
    def peak(self) -> int:
        return max(self.peaks.values(), default=0)

    def about(self, s: Setup) -> None:
        self.learns = sum(p.numel() for p in s.learning)
        self.frozen = sum(p.numel() for p in s.model.parameters()) - self.learns
        storages = {x.untyped_storage()._cdata: x.untyped_storage().nbytes() for x in s.at_rest()}
        self.rest = sum(storages.values())


def tracked(s: Setup, row: Row) -> None:
    """One step under a Ledger, into row.peaks and row.flops."""
    with Ledger(s.at_rest()) as ledger:
        for moment in step(s):
            row.peaks[moment], ledger.peak = ledger.peak, ledger.live
    # The CPU's fused attention is not in the counter's table: the sum would be too small.
    row.flops = ledger.flops if not (row.measured and s.device.type == "cpu") else None


def compute(stage: str, cfg: UniFashionConfig, b: int, checkpointing: bool = True) -> Row:
    """The step on an imagined CUDA device, in bfloat16."""
    row = Row(stage, b, measured=False)
    with ExitStack() as stack:
        stack.enter_context(FakeTensorMode())
        for name, function in like_cuda().items():
            stack.enter_context(mock.patch.object(F, name, function))
        cpu = torch.device("cpu")
        s = prepare(stage, cfg, b, cpu, "bf16", checkpointing)
        row.about(s)
        tracked(s, row)
    return row


def measure(
    stage: str,
    cfg: UniFashionConfig,
    b: int,
    device: torch.device,
    checkpointing: bool,
    steps: int,
    dtype: str = "auto",
) -> Row:
    """The step itself, `steps` times after one that is not timed, on a GPU two."""
    row, cuda = Row(stage, b, measured=True), device.type == "cuda"
    try:
        s = prepare(stage, cfg, b, device, dtype, checkpointing)
        row.about(s)
        tracked(s, row)
        if cuda:
            torch.cuda.reset_peak_memory_stats()
            for moment in step(s):  # the allocator counts as the CPU asks: there is nothing to wait for
                row.peaks[moment] = torch.cuda.max_memory_allocated()
                torch.cuda.reset_peak_memory_stats()
        seconds, cpu_seconds = [], []
        for _ in range(steps):
            if cuda:
                torch.cuda.synchronize()
            start, cpu_start = time.perf_counter(), time.process_time()
            for _ in step(s):
                pass
            cpu_seconds.append(time.process_time() - cpu_start)
            if cuda:
                torch.cuda.synchronize()
            seconds.append(time.perf_counter() - start)
        row.seconds, row.cpu_seconds = statistics.median(seconds), statistics.median(cpu_seconds)
    except torch.cuda.OutOfMemoryError:
        row.failed = (
            f"out of memory: more than the {torch.cuda.mem_get_info()[1] / GIB:.0f} GiB of this device"
        )
    return row


def report(rows: list[Row]) -> str:
    """A line for each, and whether all fit a card of 80 GB."""
    columns = ["learn M", "frozen M", "rest", *MOMENTS, "peak GiB", "TFLOP", "CPU s", "s/step", "samples/s"]
    lines = [f"{'stage':<10}{'batch':>6}" + "".join(f"{c:>10}" for c in columns)]
    for r in rows:
        line = f"{r.stage:<10}{r.batch:>6}{r.learns / 1e6:>10.1f}{r.frozen / 1e6:>10.1f}"
        if r.failed:
            lines.append(f"{line}  {r.failed}")
            continue
        sizes = (r.rest, *(r.peaks[m] for m in MOMENTS), r.peak)
        line += "".join(f"{size / GIB:>10.1f}" if size > GIB else f"{size / GIB:>10.3f}" for size in sizes)
        line += f"{r.flops / 1e12:>10.4g}" if r.flops else f"{'-':>10}"
        if r.seconds is None:
            line += f"{'not measured':>30}"
        else:
            line += f"{r.cpu_seconds:>10.3f}{r.seconds:>10.3f}{r.batch / r.seconds:>10.1f}"
        lines.append(f"{line}  {'measured' if r.measured else 'computed'}")
    big = [r.stage for r in rows if r.failed or r.peak > CARD]
    fits = "too small for " + ", ".join(big) if big else "enough for every line"
    lines.append(f"A card of 80 GB has {CARD / GIB:.1f} GiB: {fits}.")
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> None:
    parser = Parser(description=__doc__)
    parser.add_argument("--stage", nargs="+", choices=list(STAGES), default=list(STAGES), help="default: all")
    parser.add_argument("--preset", choices=list(PRESETS), default="full", help="default %(default)s")
    parser.add_argument("--batch-size", type=int, help="default: the scripts' for each stage")
    parser.add_argument(
        "--device", default="auto", help="auto | cpu | cuda; the full size on cpu is computed"
    )
    parser.add_argument(
        "--dtype", choices=["auto", "fp32", "bf16"], default="auto", help="as the scripts'; computed is bf16"
    )
    parser.add_argument("--steps", type=int, default=3, help="timed steps; the median is reported")
    parser.add_argument(
        "--json", action="store_true", help="a line of JSON for each stage, in bytes, not a table"
    )
    args = parser.parse_args(argv)
    if args.steps < 1:
        raise UserError(f"--steps is {args.steps}, must be at least 1")
    if args.batch_size is not None and args.batch_size < 1:
        raise UserError(f"--batch-size is {args.batch_size}, must be at least 1")
    if args.batch_size == 1 and (first := [x for x in args.stage if x in COMPARES]):
        raise UserError(f"--batch-size is 1: {first[0]} compares the samples of a batch, 2 at least")
    device = training.pick_device(args.device)
    cpu.fast_malloc()
    torch.manual_seed(0)
    full, cfg = args.preset == "full", PRESETS[args.preset]
    computes = full and device.type == "cpu"
    if computes and args.dtype == "fp32":
        raise UserError("--dtype is fp32: what is computed, without a GPU, is bf16")
    if not computes:
        cpu.float32_where_faster(device, training.compute_dtype(device, args.dtype))
    told = "no GPU: computed" if computes else machine(device, training.compute_dtype(device, args.dtype))
    print(told, file=sys.stderr if args.json else sys.stdout, flush=True)
    rows = []
    for stage in args.stage:
        b = args.batch_size or default_batch(stage, args.preset)
        print(f"{stage} ...", file=sys.stderr, flush=True)
        if computes:
            rows.append(compute(stage, cfg, b))
        else:
            rows.append(measure(stage, cfg, b, device, full, args.steps, args.dtype))
        if args.json:
            print(json.dumps(asdict(rows[-1]) | {"peak": rows[-1].peak}), flush=True)
        gc.collect()  # what an exception's traceback held, too
        if device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
    if not args.json:
        print(report(rows))


if __name__ == "__main__":
    training.run(main)
