"""What both training scripts need and neither should own: flags, seeds, schedules, gradients, EMA.

Nothing random is carried from step to step: order, noise, timesteps and drops are functions of (seed, step, sample), so a
run that is resumed is the run that was not interrupted, bit for bit, and the number of processes changes none of them.
"""

import argparse
import errno
import hashlib
import math
import multiprocessing
import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from fnmatch import fnmatchcase
from pathlib import Path

import torch
from torch import Tensor, nn

from unifashion import UserError, exit_if_unread, parallel, program
from unifashion.config import PRESETS
from unifashion.data import read_json, toy

# AdamW of the Q-Former is the official code's, that of the diffusion side the paper's appendix B.
ADAMW = {
    "qformer": {"weight_decay": 0.05, "betas": (0.9, 0.98), "eps": 1e-7},
    "diffusion": {"weight_decay": 0.01, "betas": (0.9, 0.999)},
}
# Share of the steps over which ITM's negatives go from uniform to hard: what learns from nothing cannot tell hard ones apart.
CURRICULUM = {"full": 0.0, "tiny": 0.5}
TEMPERATURE_LR = 2e-5  # at most: a faster temperature sharpens ITC until its gradient drowns ITM's


def common_arguments(parser: argparse.ArgumentParser, defaults: dict[str, dict[str, dict]]) -> None:
    """The flags of both scripts. `defaults` {preset: {stage: {...}}}: flags that mean another thing in each are None here."""

    def each(key: str) -> str:
        told = []
        for preset, stages in defaults.items():
            values = [f"{stage} {d[key]}" for stage, d in stages.items() if d.get(key) is not None]
            told += [f"{preset}: {', '.join(values)}"] if values else []
        return f"default {'; '.join(told)}" if told else "no default"

    g = parser.add_argument_group("model and place")
    g.add_argument("--preset", choices=list(PRESETS), default="full", help="default %(default)s")
    g.add_argument("--weights", type=Path, help="folder of the public weights (default: the preset's own)")
    g.add_argument(
        "--init", type=Path, help="run folder (its last/ is taken), or model.safetensors, to start from"
    )
    g.add_argument("--out", type=Path, default=Path("runs/latest"), help="run folder (default %(default)s)")
    g.add_argument("--resume", action="store_true", help="go on with the run in --out")
    g.add_argument("--device", default="auto", help="auto | cpu | cuda")
    g.add_argument(
        "--dtype", choices=["auto", "fp32", "bf16"], default="auto", help="autocast; auto: bf16 on CUDA"
    )
    g.add_argument(
        "--workers",
        type=int,
        default=min(4, os.cpu_count() or 1),
        help="processes that read pictures (default 4, or as many as there are cores)",
    )
    g.add_argument(
        "--cache",
        action="store_true",
        help="where samples come more than once, keep what the frozen networks say of them in memory, in float16",
    )
    g.add_argument(
        "--shard",
        action="store_true",
        help="under torchrun: cut the LLM and the U-Net among the processes (FSDP2)",
    )
    g.add_argument(
        "--compile",
        action="store_true",
        help="torch.compile for the U-Net and the garment encoder: minutes before the first step; CUDA alone",
    )
    g.add_argument(
        "--allow-missing", action="store_true", help="go on though more than 1%% of the pictures are missing"
    )
    g = parser.add_argument_group(
        "optimisation, a single stage or task at a time",
        "The defaults of full are the paper's (appendix B), else the official code's.",
    )
    g.add_argument("--steps", type=int, help=each("steps"))
    g.add_argument("--epochs", type=int, help=f"instead of --steps; {each('epochs')}")
    g.add_argument("--batch-size", type=int, help=f"of all processes together; {each('batch_size')}")
    g.add_argument("--lr", type=float, help=each("lr"))
    g = parser.add_argument_group("run")
    g.add_argument(
        "--accumulate",
        type=int,
        default=1,
        help="batches per optimiser step, the gradient of each clipped on its own (default %(default)s)",
    )
    g.add_argument("--seed", type=int, default=0, help="default %(default)s")
    g.add_argument(
        "--eval-every",
        type=int,
        default=500,
        help="steps between evaluations, each of which saves (default %(default)s)",
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
        if value is not None and not 0 < value < math.inf:
            raise UserError(f"{name} is {value}, must be a positive number")
        if value is not None and len(stages) > 1:
            raise UserError(
                f"{name} means something else in each of {', '.join(stages)}: name one with {flag}"
            )
    if args.accumulate < 1 or args.eval_every < 1:
        raise UserError("--accumulate and --eval-every must be at least 1")
    if args.workers < 0:
        raise UserError(f"--workers is {args.workers}, must be 0 or more")
    if not 0 <= args.seed < 2**32:
        raise UserError(f"--seed is {args.seed}, must be 0 to {2**32 - 1}")


def name_and_path(name: str, known: tuple[str, ...]) -> tuple[str, Path]:
    """NAME or NAME=PATH; without a path the data set is looked for in data/NAME."""
    name, _, path = name.partition("=")
    if name not in known:
        raise UserError(f"unknown data set {name!r}: it is one of {', '.join(known)}")
    return name, Path(path) if path else Path("data") / name


def toy_folder(path: Path) -> Path:
    """The ToyFashion at `path`, whatever its settings; in data/toy, version 1 is drawn if there is none. Raises UserError if it is missing elsewhere, or damaged."""
    if not (path / "toy.json").is_file() and path != Path("data/toy"):
        raise UserError(f"{path} holds no ToyFashion: python -m unifashion.data.toy --out {path} draws it")
    if not (path / "toy.json").is_file():
        print(f"{path} is not there: drawing ToyFashion, minutes of both cores, once", file=sys.stderr)
        toy.ensure(path)
    read_json(path / "toy.json")
    return path


def pick_device(name: str) -> torch.device:
    if name not in ("auto", "cpu", "cuda"):
        raise UserError(f"unknown device {name!r}: it is auto, cpu or cuda")
    if name == "cuda" and not torch.cuda.is_available():
        raise UserError("there is no CUDA device here: leave --device out, or say --device cpu")
    return torch.device("cuda" if name != "cpu" and torch.cuda.is_available() else "cpu")


def compute_dtype(device: torch.device, dtype: str) -> torch.dtype:
    bf16 = dtype == "bf16" or (dtype == "auto" and device.type == "cuda")
    return torch.bfloat16 if bf16 else torch.float32


def autocast(device: torch.device, dtype: str) -> torch.autocast:
    enabled = compute_dtype(device, dtype) == torch.bfloat16
    return torch.autocast(device.type, torch.bfloat16, enabled=enabled)


def run(main: Callable[[], None]) -> None:
    """Run a script's main: what the user got wrong is one line on stderr and exit code 2."""
    try:
        main()
        sys.stdout.flush()  # while a reader that has left is looked for
    except UserError as error:  # from a DataLoader's worker it comes with the worker's traceback before it
        told = str(error).strip().rpartition("\nunifashion.UserError: ")[2].splitlines()
        parallel.print_error_once(f"{program()}: {' '.join(told)}")
        sys.exit(2)
    except RuntimeError:  # of several processes one is gone, and has said why
        if not parallel.another_failed():
            raise
        sys.exit(2)
    except BrokenPipeError:
        exit_if_unread()
        raise  # another pipe's: a bug
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        parallel.print_error_once(f"{program()}: the disk is full. What was saved before is whole")
        sys.exit(2)
    except KeyboardInterrupt:
        print(f"{program()}: stopped", file=sys.stderr)
        sys.exit(130)
    finally:
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch's handler would complain of what follows
        for worker in multiprocessing.active_children():
            worker.kill()  # they ignore the first SIGTERM (`feed._ignore_signals`)
        parallel.leave()


class BatchRNG:
    """
    The random numbers of one batch, keyed by (purpose, seed, step). They are made for the batch of all processes, and each takes
    its rows: how many processes there are changes none of them.
    """

    def __init__(
        self, purpose: str, seed: int, step: int, b: int, device: torch.device | str = "cpu"
    ) -> None:
        """b: samples of this process"""
        self.generator = seeded(purpose, seed, step)
        self.b, self.device = b * parallel.world(), device

    def _local(self, x: Tensor) -> Tensor:
        return send(parallel.local_rows(x), self.device)

    def normal(self, *shape: int) -> Tensor:
        """(b,*shape) ~ N(0,1)"""
        return self._local(torch.randn(self.b, *shape, generator=self.generator))

    def timesteps(self, n: int) -> Tensor:
        """(b,) whole numbers 0 to n-1"""
        return self._local(torch.randint(0, n, (self.b,), generator=self.generator))

    def keep(self, drop: float) -> Tensor:
        """(b,) bool, False with probability `drop`"""
        return self._local(torch.rand(self.b, generator=self.generator) >= drop)

    def categorical(self, odds: Tensor) -> Tensor:
        """odds (b,n), unnormalised, on the CPU -> (b,) one of n for each row"""
        u = parallel.local_rows(torch.rand(self.b, generator=self.generator))
        bounds = odds.cumsum(1)
        of = (u[:, None] * bounds[:, -1:] >= bounds).sum(1).clamp(max=odds.shape[1] - 1)
        return send(of, self.device)


def send(x: Tensor, device: torch.device | str) -> Tensor:
    """To the device. A GPU fetches it while the CPU goes on: from memory that is not pinned, the CPU would wait for the GPU."""
    if x.is_cpu and torch.device(device).type == "cuda":
        return x.pin_memory().to(device, non_blocking=True)
    return x.to(device)


def seeded(*key: int | str) -> torch.Generator:
    """A generator on the CPU that depends on the key alone."""
    digest = hashlib.sha256(repr(key).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)


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


def train_mode(model: nn.Module, parameters: dict[str, nn.Parameter]) -> None:
    """Training mode for modules of which something learns. Frozen ones stay in eval mode: their dropout would blur the others."""
    learning = {name.split(".")[0] for name in parameters}
    for name, module in model.named_children():
        module.train(name in learning)


def override(defaults: dict, args: argparse.Namespace) -> dict:
    """`defaults`, with the value of each flag that was given."""
    return {k: v if getattr(args, k, None) is None else getattr(args, k) for k, v in defaults.items()}


def planned_steps(args: argparse.Namespace, hparams: dict, samples: int, before: dict) -> int:
    """
    --steps, or --epochs over so many samples, or what the run that goes on was asked for `before`, or the default.

    Raises UserError where that comes to nothing.
    """
    batch, epochs = hparams["batch_size"], args.epochs or hparams["epochs"]
    if samples < batch:
        raise UserError(f"the data set has {samples} samples, fewer than one batch of {batch}")
    if before and not (args.steps or args.epochs):
        return before["steps"]
    steps = args.steps or (epochs * samples // (batch * args.accumulate) if epochs else hparams["steps"])
    if not steps:
        raise UserError(f"{epochs} epochs of {samples} samples are less than one step: say --steps")
    return steps


def cosine(step: int, steps: int, warmup: int) -> float:
    """The factor of the learning rate: linear from 1/warmup to 1 over `warmup` steps, then a half cosine to 0."""
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))


def linear_decay(step: int, steps: int, decay: float) -> float:
    """The factor of the learning rate: 1, then linear towards 0 over the last fraction `decay` of the steps; 0: constant."""
    return min(1.0, (steps - step) / max(1, steps * decay))


def hardness(step: int, steps: int, share: float) -> float:
    """Of ITM's negatives: 0 to 1 over the first `share` of the steps; share 0: 1 from the first step on."""
    return min(1.0, step / (steps * share)) if share else 1.0


def clipped_backward(losses: dict[str, Tensor], parameters: list[nn.Parameter], share: float) -> Tensor:
    """
    Add each loss's gradient to `.grad`, averaged over the processes, clipped to norm 1 on its own and times `share`.
    -> the norms before (losses,). `losses` are detached: the activations of each are let go once it is done.

    One clip for all would starve a loss: at the start ITC's gradient is a hundred times ITM's, whose task is the slower.
    """
    norms = []
    for i, name in enumerate(losses):
        before = [p.grad for p in parameters]
        for p in parameters:
            p.grad = None
        losses[name].backward(retain_graph=i + 1 < len(losses))
        losses[name] = losses[name].detach()
        grads = [p.grad for p in parameters if p.grad is not None]
        parallel.average(grads)
        norm = parallel.norm(grads)
        scale = share * (1.0 / (norm + 1e-6)).clamp(max=1.0)
        for p, sum_of_others in zip(parameters, before, strict=True):
            if p.grad is not None:
                p.grad.mul_(scale)
            if sum_of_others is not None:
                p.grad = sum_of_others if p.grad is None else sum_of_others.add_(p.grad)
        norms.append(norm)
    return torch.stack(norms)


def checkpointing(model: nn.Module) -> None:
    """Have every part that can do so compute its activations again in the backward pass: less memory, a third more time."""
    for module in model.modules():
        if hasattr(module, "checkpointing"):
            module.checkpointing = True


def check_compile(device: torch.device) -> None:
    """Raises UserError where --compile would gain nothing, or have a run learn something else."""
    # By torch 2.13 TINY's step of try-on takes .77 s compiled, .64 s not (float32, two cores), after 4 minutes of compiling; in
    # bf16 the gradients are wrong: their cosine with those in float32 is .92 to .95, that of eager ones .999.
    if device.type == "cpu":
        raise UserError(
            "--compile is for CUDA: on a CPU it is slower in fp32 and computes wrong gradients in bf16"
        )


def compile_parts(*parts: nn.Module) -> None:
    """Have `parts` compiled when they first train, a kernel for each shape of batch."""
    for part in parts:
        part.compile(dynamic=False)


def eagerly(compiled: bool) -> AbstractContextManager:
    """Within, what was compiled runs as it is written: evaluations have other shapes, and are short."""
    return torch.compiler.set_stance("force_eager") if compiled else nullcontext()


class EMA:
    """An exponential moving average of parameters; its early steps average over fewer (decay (1+n)/(10+n))."""

    def __init__(self, parameters: dict[str, nn.Parameter], decay: float = 0.9999) -> None:
        self.parameters, self.decay, self.n = parameters, decay, 0
        self.average = {name: p.detach().clone() for name, p in parameters.items()}

    @torch.no_grad()
    def update(self) -> None:
        self.n += 1
        weight = 1 - min(self.decay, (1 + self.n) / (10 + self.n))
        averages, raw = ([parallel.local(x) for x in y.values()] for y in (self.average, self.parameters))
        torch._foreach_lerp_(averages, raw, weight)

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


class Stop:
    """
    After `install`, Ctrl-C and SIGTERM set `asked`: the loop finishes its step, saves and leaves. A second signal kills at once;
    not under torchrun, which passes on what a cluster's scheduler may have sent to every process already (it kills after 30
    seconds, --shutdown-timeout).
    """

    def __init__(self) -> None:
        self.asked = False

    def install(self) -> None:
        for s in (signal.SIGINT, signal.SIGTERM):
            signal.signal(s, self._ask)

    def _ask(self, signum: int, _: object) -> None:
        self.asked = True
        if parallel.world() == 1:
            signal.signal(signum, signal.SIG_DFL)

    def asked_anywhere(self) -> bool:
        """Whether it was asked of any process: all leave after the same step. What comes while they agree is for the next step."""
        return parallel.any_process(self.asked)
