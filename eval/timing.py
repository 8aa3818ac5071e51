"""How calls are timed and told: in turns, in one process, at their medians; and the most that the machine does, measured beside."""

import platform
import resource
import statistics
import sys
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

CPU = torch.device("cpu")
Call = Callable[[], Tensor]


class Round(NamedTuple):
    seconds: float
    cpu_seconds: float  # of all threads


def measure(
    calls: dict[str, Call],
    repeats: int,
    device: torch.device,
    within: Callable[[str], AbstractContextManager],
) -> dict[str, list[Round]]:
    """
    The times of each call, round by round, each within the context that its name has. A first round, which warms up and is not
    timed, has to give finite numbers; of what is compiled for CUDA it is three, since peers record graphs in the second.
    """
    rounds: dict[str, list[Round]] = {name: [] for name in calls}
    for name, call in calls.items():
        with within(name):
            start = time.perf_counter()
            if not call().isfinite().all():
                raise RuntimeError(f"{name} gives numbers that are not finite: its time would mean nothing")
            print(f"{name}: {time.perf_counter() - start:.4g} s the first time", file=sys.stderr, flush=True)
            for _ in range(2 if device.type == "cuda" and "compiled" in name else 0):
                call()
    for _ in range(repeats):
        for name, call in calls.items():
            with within(name):
                start, cpu_start = time.perf_counter(), time.process_time()
                call()
                cpu_seconds = time.process_time() - cpu_start  # before the wait, which on CUDA is a busy one
                if device.type == "cuda":
                    torch.cuda.synchronize()
                rounds[name].append(Round(time.perf_counter() - start, cpu_seconds))
            print(f"{name}: {rounds[name][-1].seconds:.4g} s", file=sys.stderr, flush=True)
    return rounds


def median(rounds: list[Round]) -> Round:
    return Round(*(statistics.median(times) for times in zip(*rounds, strict=True)))


class Ceilings(NamedTuple):
    flops: float  # a second, of one large matrix product, multiply-adds counted twice
    bytes: float  # a second, read and written, of one large copy


def ceilings(device: torch.device, dtype: torch.dtype) -> Ceilings:
    """The best of five of each; of a product as ours are computed, who know what is slow on a CPU (`cpu.py`)."""
    cuda = device.type == "cuda"
    n, size = (8192, 2**30) if cuda else (2048, 2**28)
    a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
    source, target = (torch.ones(size // 4, device=device) for _ in range(2))
    best = []
    for call in (lambda: F.linear(a, b), lambda: target.copy_(source)):
        found = measure({"ceiling": lambda call=call: call()[:1]}, 5, device, lambda name: torch.no_grad())
        best.append(min(r.seconds for r in found["ceiling"]))
    return Ceilings(2 * n**3 / best[0], 2 * size / best[1])


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
