"""Trainings one after the other, in this process or, where torchrun starts this file, in several that work together.

    torchrun --standalone --nproc-per-node 2 -m tests.several PLACE '[["1 align", "two", 10, ["--shard"], ["double"]]]'

A job is what `small_runs.run` takes: what, the run's name, steps, flags; and some of HOOKS. It leaves RUN/seen.json: of every
step the losses, the norms of their gradients, and how much of what is cut into shards is in this process.
"""

import json
import os
import subprocess
import sys
import time
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from torch import Tensor

import train_phase1
import train_phase2
from tests import small_runs
from unifashion import UserError, feed, parallel, runs, training

ROOT = Path(__file__).parent.parent
Job = tuple[str, str, int, list[str], list[str]]


def train(place: Path, jobs: list[Job]) -> None:
    torch.set_num_threads(1)
    for what, name, steps, flags, hooks in jobs:
        seen: dict[str, list] = {"losses": [], "norms": [], "kept": []}
        with pytest.MonkeyPatch.context() as patch:
            small_runs.shrink(patch)
            patch.setattr(runs, "git_commit", lambda: "unknown")  # another may be made meanwhile
            write_down(patch, seen)
            for hook in hooks:
                HOOKS[hook](patch)
            with small_runs.stopped_after(steps // 2) if "half" in hooks else nullcontext():
                small_runs.run(what, place, name, steps, *flags)
        if parallel.rank() == 0:
            (place / name / "seen.json").write_text(json.dumps(seen))


def write_down(patch: pytest.MonkeyPatch, seen: dict[str, list]) -> None:
    see, backward, cut = runs.NaNWatch.see, training.clipped_backward, parallel.shard

    def seeing(watch, step, task, losses, norms, index):
        see(watch, step, task, losses, norms, index)
        seen["losses"].append({f"{task} {name}": float(parallel.mean(x)) for name, x in losses.items()})

    def going_back(*args):
        norms = backward(*args)
        seen["norms"].append(norms.tolist())
        return norms

    def cutting(units):
        cut(units)
        whole = [p for unit in units for name, p in unit.named_parameters() if "lora" not in name]
        seen["kept"] = [sum(parallel.local(p).numel() for p in whole) / sum(p.numel() for p in whole)]

    patch.setattr(runs.NaNWatch, "see", seeing)
    patch.setattr(training, "clipped_backward", going_back)
    patch.setattr(parallel, "shard", cutting)


def in_double(patch: pytest.MonkeyPatch) -> None:
    """Model and batches in float64: but for a mean at the end of some losses, nothing is rounded to more than 1e-16."""

    def wide(batch: dict[str, Tensor]) -> dict[str, Tensor]:
        return {k: v.double() if v.is_floating_point() else v for k, v in batch.items()}

    stream = feed.stream
    patch.setattr(feed, "stream", lambda a, b, encode, *rest: stream(a, b, lambda x: encode(wide(x)), *rest))
    for module in (train_phase1, train_phase2):
        load = module.load_public
        patch.setattr(module, "load_public", lambda *args, load=load, **kw: load(*args, **kw).double())


def with_checkpointing(patch: pytest.MonkeyPatch) -> None:
    """What the full size always does."""
    mode = training.train_mode
    patch.setattr(
        training, "train_mode", lambda model, *rest: (training.checkpointing(model), mode(model, *rest))
    )


def slowly(patch: pytest.MonkeyPatch) -> None:
    """At the rate of the full size."""
    for module in (train_phase1, train_phase2):
        slow = {part: {**of, "lr": 2e-5} for part, of in module.DEFAULTS["tiny"].items()}
        patch.setitem(module.DEFAULTS, "tiny", slow)


def again(patch: pytest.MonkeyPatch) -> None:
    """A checkpoint that was loaded is saved once more, as RUN/again, before the run goes on."""
    load = runs.load_checkpoint

    def loading(folder, *rest):
        state = load(folder, *rest)
        model, optimizer, parameters, ema = rest
        runs.save_checkpoint(
            folder.with_name("again"), model, state["modules"], optimizer, parameters, ema, state
        )
        return state

    patch.setattr(runs, "load_checkpoint", loading)


def nan_in_the_second(patch: pytest.MonkeyPatch) -> None:
    """Of the second process a loss is nan in the third step, and it is the first to leave the loop."""
    backward, check, steps = training.clipped_backward, runs.NaNWatch.check, []

    def going_back(losses, parameters, share):
        steps.append(len(steps))
        if steps[-1] == 2 and parallel.rank() == 1:
            losses |= {k: x * float("nan") for k, x in losses.items()}
        return backward(losses, parameters, share)

    def checking(watch):
        try:
            check(watch)
        except UserError:
            time.sleep(1.5 * (parallel.rank() == 0))
            raise

    patch.setattr(training, "clipped_backward", going_back)
    patch.setattr(runs.NaNWatch, "check", checking)


def late(_: pytest.MonkeyPatch) -> None:
    """Whoever has an error to tell takes a while to: to the end of this process, which outlives the patches."""
    parallel.print = lambda *args, **kwargs: (time.sleep(1.5), print(*args, **kwargs))


HOOKS = {
    "double": in_double,
    "checkpointing": with_checkpointing,
    "slowly": slowly,
    "again": again,
    "nan": nan_in_the_second,
    "late": late,
    "half": lambda patch: None,  # stopped after half of its steps
}


def torchrun(place: Path, jobs: list[Job]) -> list[str]:
    """The command for two processes."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    return [*command, "-m", "tests.several", str(place), json.dumps(jobs)]


def in_two(place: Path, jobs: list[Job]) -> subprocess.CompletedProcess:
    return subprocess.run(torchrun(place, jobs), cwd=ROOT, capture_output=True, text=True)


if __name__ == "__main__":
    training.run(lambda: train(Path(sys.argv[1]), json.loads(sys.argv[2])))
    threads = [comm.read_text().strip() for comm in Path("/proc/self/task").glob("*/comm")]
    Path(sys.argv[1], f"process {os.environ['RANK']} came to its end").write_text(" ".join(threads))
