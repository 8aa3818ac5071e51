"""What both training scripts need and neither should own: the run folder, resuming, seeds, frozen features, schedules.

    RUN/config.json     what was asked
    RUN/metrics.jsonl   one line a log step
    RUN/samples/        pictures
    RUN/losses.png      the curves of metrics.jsonl
    RUN/last/, best/    model.safetensors      everything learned so far, under our module names; EMA where there is one
                        optimizer.safetensors  AdamW's moments, and the raw weights of what has an EMA
                        state.json             step, best loss, git commit

Nothing random is carried from step to step: order, noise, timesteps and drops are functions of (seed, step, sample), so a
run that is resumed is the run that was not interrupted, bit for bit.
"""

import argparse
import ctypes
import hashlib
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from fnmatch import fnmatchcase
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from unifashion import UserError
from unifashion.config import PRESETS
from unifashion.data import toy


def common_arguments(parser: argparse.ArgumentParser, defaults: dict[str, dict]) -> None:
    """The flags of both scripts. Those that mean something else in each stage are None here and take its default."""

    def each(key: str) -> str:
        return "default " + ", ".join(
            f"{stage} {d[key]}" for stage, d in defaults.items() if d[key] is not None
        )

    g = parser.add_argument_group("model and place")
    g.add_argument("--preset", choices=list(PRESETS), default="full")
    g.add_argument("--weights", type=Path, help="folder of the public weights (default: the preset's own)")
    g.add_argument("--init", type=Path, help="run folder, or model.safetensors, to start from")
    g.add_argument("--out", type=Path, default=Path("runs/latest"), help="run folder (default %(default)s)")
    g.add_argument("--resume", action="store_true", help="go on with the run in --out")
    g.add_argument("--device", default="auto", help="auto | cpu | cuda")
    g.add_argument(
        "--dtype", choices=["auto", "fp32", "bf16"], default="auto", help="autocast; auto: bf16 on CUDA"
    )
    g.add_argument(
        "--workers", type=int, default=4, help="processes that read pictures (default %(default)s)"
    )
    g.add_argument(
        "--cache", action="store_true", help="keep the frozen networks' output of every sample in memory"
    )
    g = parser.add_argument_group("optimisation, a single stage or task at a time")
    g.add_argument("--steps", type=int, help=each("steps"))
    g.add_argument("--epochs", type=int, help=f"instead of --steps; {each('epochs')}")
    g.add_argument("--batch-size", type=int, help=each("batch_size"))
    g.add_argument("--lr", type=float, help=each("lr"))
    g = parser.add_argument_group("run")
    g.add_argument(
        "--accumulate", type=int, default=1, help="batches per optimiser step (default %(default)s)"
    )
    g.add_argument("--seed", type=int, default=0)
    g.add_argument(
        "--eval-every", type=int, default=500, help="steps between evaluations, each of which saves"
    )


def check_arguments(args: argparse.Namespace, stages: list[str], flag: str) -> None:
    if args.steps and args.epochs:
        raise UserError("give --steps or --epochs, not both")
    per_stage = {
        "--steps": args.steps,
        "--epochs": args.epochs,
        "--batch-size": args.batch_size,
        "--lr": args.lr,
    }
    for name, value in per_stage.items():
        if value is not None and value <= 0:
            raise UserError(f"{name} is {value}, must be positive")
        if value is not None and len(stages) > 1:
            raise UserError(
                f"{name} means something else in each of {', '.join(stages)}: name one with {flag}"
            )
    if args.accumulate < 1 or args.eval_every < 1:
        raise UserError("--accumulate and --eval-every must be at least 1")


def name_and_path(name: str, known: tuple[str, ...]) -> tuple[str, Path]:
    """NAME or NAME=PATH; without a path the data set is looked for in data/NAME."""
    name, _, path = name.partition("=")
    if name not in known:
        raise UserError(f"unknown data set {name!r}: it is one of {', '.join(known)}")
    return name, Path(path) if path else Path("data") / name


def toy_folder(path: Path) -> Path:
    """The ToyFashion at `path`, whatever its settings; version 1 is drawn there if there is none."""
    return path if (path / "toy.json").is_file() else toy.ensure(path)


def pick_device(name: str) -> torch.device:
    if name not in ("auto", "cpu", "cuda"):
        raise UserError(f"unknown device {name!r}: it is auto, cpu or cuda")
    if name == "cuda" and not torch.cuda.is_available():
        raise UserError("there is no CUDA device here: leave --device out, or say --device cpu")
    return torch.device("cuda" if name != "cpu" and torch.cuda.is_available() else "cpu")


def autocast(device: torch.device, dtype: str) -> torch.autocast:
    bf16 = dtype == "bf16" or (dtype == "auto" and device.type == "cuda")
    return torch.autocast(device.type, torch.bfloat16, enabled=bf16)


def run(main: Callable[[], None]) -> None:
    """Run a script's main: what the user got wrong is one line on stderr and exit code 2."""
    try:
        main()
    except UserError as error:
        print(f"{Path(sys.argv[0]).name}: {error}", file=sys.stderr)
        sys.exit(2)


def held_out(names: list[str], every: int = 40) -> tuple[list[int], list[int]]:
    """Sample indices for training, and those held out to choose `best` by: whole products, one in `every`."""
    hold = [zlib.crc32(name.encode()) % every == 0 for name in names]
    if not any(hold):  # a very small data set
        hold = [name == names[-1] for name in names]
    return [i for i, h in enumerate(hold) if not h], [i for i, h in enumerate(hold) if h]


def start_run(out: Path, config: dict, resume: bool) -> None:
    if out.exists() and any(out.iterdir()) and not resume:
        raise UserError(f"{out} is not empty: say --resume to go on with it, or name another --out")
    out.mkdir(parents=True, exist_ok=True)
    (out / "samples").mkdir(exist_ok=True)
    (out / "config.json").write_text(json.dumps(config, indent=1, default=str))


def save_sheet(rows: list[Tensor], path: Path) -> None:
    """rows of pictures, each (b,3,y,x) in [-1,1] -> one PNG, a row of pictures for each."""
    sheet = torch.cat([torch.cat(list(row.float().cpu()), dim=2) for row in rows], dim=1)
    pixels = ((sheet.clamp(-1, 1) + 1) * 127.5).round().byte().permute(1, 2, 0)
    Image.fromarray(np.ascontiguousarray(pixels.numpy())).save(path)


def draw_curves(runs: list[Path], path: Path) -> None:
    """metrics.jsonl of `runs` -> one PNG, a panel each: every loss over the steps as a running mean, `val` as dots."""
    logs = [[json.loads(row) for row in (run / "metrics.jsonl").read_text().splitlines()] for run in runs]
    panels = [_panel(run.name, log) for run, log in zip(runs, logs, strict=True)]
    sheet = Image.new("RGB", (sum(p.width for p in panels), panels[0].height))
    for i, panel in enumerate(panels):
        sheet.paste(panel, (i * panel.width, 0))
    sheet.save(path)


def _panel(name: str, log: list[dict], size: tuple[int, int] = (880, 560)) -> Image.Image:
    image = Image.new("RGB", size, "white")  # twice the size that it is shown in: smooth lines
    draw, font = ImageDraw.Draw(image), ImageFont.load_default(26)
    left, top, right, bottom = 90, 60, size[0] - 30, size[1] - 50
    no_loss = ("step", "lr", "norms", "seconds")
    curves = {
        k: {row["step"]: row[k] for row in log if k in row} for row in log for k in row if k not in no_loss
    }
    last = max(max(curve) for curve in curves.values())
    high = 1.1 * max(np.percentile(list(curve.values()), 98) for curve in curves.values())
    at = lambda x, y: (left + (right - left) * x / max(1, last), bottom - (bottom - top) * min(y / high, 1))  # noqa: E731
    draw.rectangle((left, top, right, bottom), outline="grey")
    draw.text((left, 15), name, "black", font)
    draw.text((right, bottom + 10), str(last), "black", font, anchor="ra")
    for y in (0, high / 2, high):
        draw.text((left - 10, at(0, y)[1]), f"{y:.2g}", "black", font, anchor="rm")
    for i, (k, curve) in enumerate(curves.items()):
        colour, mean, smooth = ("#1f77b4", "#d62728", "#2ca02c", "#9467bd")[i % 4], None, []
        for x, y in sorted(curve.items()):
            mean = y if mean is None else mean + (y - mean) / 5
            smooth.append(at(x, mean))
            if k == "val":
                px, py = at(x, y)
                draw.ellipse((px - 5, py - 5, px + 5, py + 5), fill=colour)
        if k != "val":
            draw.line(smooth, colour, 3)
        draw.text((right - 10 - 150 * i, 15), k, colour, font, anchor="ra")
    return image.resize((size[0] // 2, size[1] // 2), Image.Resampling.LANCZOS)


def seeded(*key: int | str) -> torch.Generator:
    """A generator on the CPU that depends on the key alone."""
    digest = hashlib.sha256(repr(key).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)


def batch_order(n: int, batch: int, seed: int, start: int, stop: int) -> Iterator[list[int]]:
    """The sample indices of steps start..stop-1: a new permutation every epoch, the last short batch left out."""
    if n < batch:
        raise UserError(f"the data set has {n} samples, fewer than one batch of {batch}")
    per_epoch = n // batch
    order: Tensor | None = None
    for step in range(start, stop):
        epoch, i = divmod(step, per_epoch)
        if order is None or i == 0:
            order = torch.randperm(n, generator=seeded("order", seed, epoch))
        yield order[i * batch : (i + 1) * batch].tolist()


def batches(
    samples: Dataset,
    order: Iterator[list[int]],
    encode: Callable[[dict[str, Tensor]], dict[str, Tensor]],
    cache: bool,
    workers: int = 0,
) -> Iterator[dict[str, Tensor]]:
    """
    `samples[i]`, a dict of tensors, collated and passed through the frozen networks by `encode`, for each batch of `order`.

    With `cache`, what `encode` says of a sample is kept in memory in float16, and the sample is read only once: right
    where nothing is augmented and the features fit. Samples are then encoded in fixed groups, so that a resumed run
    computes the same bits.
    """
    if not cache:
        order = list(order)
        for batch in DataLoader(samples, batch_sampler=order, num_workers=workers):
            yield encode(batch)
        return
    kept: dict[int, dict[str, Tensor]] = {}
    group = 16
    for indices in order:
        for first in sorted({i // group * group for i in indices if i not in kept}):
            members = list(range(first, min(first + group, len(samples))))
            features = encode(torch.utils.data.default_collate([samples[i] for i in members]))
            for j, i in enumerate(members):
                kept[i] = {k: _shrink(v[j]) for k, v in features.items()}
        rows = [kept[i] for i in indices]
        yield {k: _grow(torch.stack([row[k] for row in rows])) for k in rows[0]}


def _shrink(x: Tensor) -> Tensor:
    return x.to(torch.float16, copy=True) if x.is_floating_point() else x.clone()


def _grow(x: Tensor) -> Tensor:
    return x.float() if x.is_floating_point() else x


def set_trainable(model: nn.Module, patterns: list[str]) -> dict[str, nn.Parameter]:
    """Freeze everything but the parameters whose names match a pattern (`qformer.*`); each pattern must match some."""
    chosen = {}
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(any(fnmatchcase(name, p) for p in patterns))
        if parameter.requires_grad:
            chosen[name] = parameter
    for p in patterns:
        if not any(fnmatchcase(name, p) for name in chosen):
            raise ValueError(f"no parameter matches {p}")
    return chosen


def cosine(step: int, steps: int, warmup: int) -> float:
    """The factor of the learning rate: linear from 0 over `warmup` steps, then a half cosine to 0."""
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))


def backward_apart(losses: dict[str, Tensor], parameters: list[nn.Parameter], share: float) -> Tensor:
    """
    Add each loss's gradient to `.grad`, clipped to norm 1 on its own and times `share`; returns the norms before (losses,).

    One clip for all would starve a loss: at the start ITC's gradient is a hundred times ITM's, whose task is the slower.
    """
    norms = []
    for loss in losses.values():
        grads = torch.autograd.grad(loss, parameters, retain_graph=True, allow_unused=True)
        used = [(p, g) for p, g in zip(parameters, grads, strict=True) if g is not None]
        norm = torch.linalg.vector_norm(torch.stack([torch.linalg.vector_norm(g) for _, g in used]))
        scale = share * (1.0 / (norm + 1e-6)).clamp(max=1.0)
        for p, g in used:
            p.grad = g * scale if p.grad is None else p.grad + g * scale
        norms.append(norm)
    return torch.stack(norms)


class EMA:
    """An exponential moving average of parameters; its early steps average over fewer (decay (1+n)/(10+n))."""

    def __init__(self, parameters: dict[str, nn.Parameter], decay: float = 0.9999) -> None:
        self.parameters, self.decay, self.n = parameters, decay, 0
        self.average = {name: p.detach().clone() for name, p in parameters.items()}

    @torch.no_grad()
    def update(self) -> None:
        self.n += 1
        weight = 1 - min(self.decay, (1 + self.n) / (10 + self.n))
        torch._foreach_lerp_(list(self.average.values()), list(self.parameters.values()), weight)

    def swap(self) -> None:
        """Exchange the average and the raw weights; twice is nothing."""
        for name, p in self.parameters.items():
            raw = p.data.clone()
            p.data.copy_(self.average[name])
            self.average[name].copy_(raw)


@contextmanager
def averaged(ema: EMA | None) -> Iterator[None]:
    """Within, the model has its averaged weights."""
    if ema is not None:
        ema.swap()
    yield
    if ema is not None:
        ema.swap()


def model_file(path: Path) -> Path:
    """--init: a run folder stands for its last checkpoint."""
    for candidate in (path, path / "last" / "model.safetensors", path / "model.safetensors"):
        if candidate.is_file():
            return candidate
    raise UserError(f"{path} is neither a run folder nor a model.safetensors")


def learned_state(model: nn.Module, modules: list[str]) -> dict[str, Tensor]:
    """The tensors of the named top-level modules or parameters, under our names."""
    prefixes = tuple(f"{m}." for m in modules)
    return {k: v for k, v in model.state_dict().items() if k in modules or k.startswith(prefixes)}


def save_checkpoint(
    folder: Path,
    model: nn.Module,
    modules: list[str],
    optimizer: torch.optim.AdamW,
    parameters: dict[str, nn.Parameter],
    ema: EMA | None,
    state: dict,
) -> None:
    """Write `folder` whole or not at all: a killed run finds the one before."""
    new, old = folder.with_name(folder.name + ".new"), folder.with_name(folder.name + ".old")
    shutil.rmtree(new, ignore_errors=True)
    new.mkdir(parents=True)
    moments: dict[str, Tensor] = {}
    for name, p in parameters.items():
        moments |= {f"{name}:{k}": v for k, v in optimizer.state.get(p, {}).items()}
    if ema is not None:
        moments |= {f"{name}:raw": p.detach() for name, p in parameters.items()}
        ema.swap()
    save_file(
        {k: v.contiguous() for k, v in learned_state(model, modules).items()}, new / "model.safetensors"
    )
    if ema is not None:
        ema.swap()
    save_file({k: v.contiguous() for k, v in moments.items()}, new / "optimizer.safetensors")
    (new / "state.json").write_text(
        json.dumps({**state, "modules": modules, "commit": git_commit()}, indent=1)
    )
    shutil.rmtree(old, ignore_errors=True)
    if folder.exists():
        os.replace(folder, old)
    os.replace(new, folder)
    shutil.rmtree(old, ignore_errors=True)


def load_checkpoint(
    folder: Path,
    model: nn.Module,
    optimizer: torch.optim.AdamW,
    parameters: dict[str, nn.Parameter],
    ema: EMA | None,
) -> dict:
    """Put everything back where `save_checkpoint` found it. -> its state."""
    if not folder.exists() and folder.with_name(folder.name + ".old").exists():  # killed between two renames
        os.replace(folder.with_name(folder.name + ".old"), folder)
    if not folder.exists():
        raise UserError(f"nothing to resume: {folder} is not there")
    state = json.loads((folder / "state.json").read_text())
    load_learned(model, folder / "model.safetensors")
    moments = load_file(folder / "optimizer.safetensors")
    for name, p in parameters.items():
        if ema is not None:
            ema.average[name].copy_(p.data)
            p.data.copy_(moments.pop(f"{name}:raw"))
        keys = [k for k in ("step", "exp_avg", "exp_avg_sq") if f"{name}:{k}" in moments]
        if keys:
            optimizer.state[p] = {k: moments.pop(f"{name}:{k}") for k in keys}
    if moments:
        raise UserError(
            f"{folder}: {next(iter(moments))} belongs to no trained parameter; was --stage another?"
        )
    if ema is not None:
        ema.n = state["step"]
    return state


def load_learned(model: nn.Module, path: Path) -> list[str]:
    """Load a `model.safetensors`: each top-level module is in it wholly or not at all. -> the modules found."""
    try:
        tensors = load_file(path)
    except Exception as error:  # safetensors raises its own type for a truncated file
        raise UserError(f"{path}: not a whole safetensors file ({error})") from None
    own = model.state_dict()
    modules = sorted({k.split(".")[0] for k in tensors})
    wanted = learned_state(model, modules)
    for k, v in tensors.items():
        if k not in own:
            raise UserError(f"{path}: {k} is not a tensor of this preset's model")
        if own[k].shape != v.shape:
            raise UserError(
                f"{path}: {k} has shape {tuple(v.shape)}, this preset wants {tuple(own[k].shape)}"
            )
    missing = sorted(wanted.keys() - tensors.keys())
    if missing:
        raise UserError(f"{path}: {missing[0]} is missing")
    with torch.no_grad():
        for k, v in tensors.items():
            own[k].copy_(v)
    return modules


def git_commit() -> str:
    asked = subprocess.run(
        ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"],
        capture_output=True,
        text=True,
    )
    return asked.stdout.strip() or "unknown"


def log_line(run: Path, **values: float | int | str) -> None:
    with open(run / "metrics.jsonl", "a") as f:
        f.write(json.dumps(values) + "\n")


class Stop:
    """Ctrl-C and SIGTERM ask for the end: the loop finishes its step, saves and leaves."""

    def __init__(self) -> None:
        self.asked = False
        for s in (signal.SIGINT, signal.SIGTERM):
            signal.signal(s, self._ask)

    def _ask(self, *_: object) -> None:
        self.asked = True


def fast_malloc() -> None:
    """Let glibc keep its memory: giving it back and faulting it in again made a small training step up to 9x slower."""
    try:
        libc = ctypes.CDLL("libc.so.6")
    except OSError:
        return  # not glibc
    m_trim_threshold, m_top_pad, m_mmap_max = -1, -2, -4
    libc.mallopt(m_mmap_max, 0)
    libc.mallopt(m_trim_threshold, 2**31 - 1)
    libc.mallopt(m_top_pad, 1 << 29)
