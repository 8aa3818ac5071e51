"""A run that is killed, at whatever moment: its checkpoints are whole, its best is there, and it goes on as if it had not been."""

import json
import multiprocessing
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from tests.several import ROOT, train
from tests.small_runs import assert_same
from unifashion import UserError, runs, sheets, training

pytestmark = pytest.mark.usefixtures("one_thread")

VALS = [3.0, 1.0, 2.0, 0.5, 4.0]  # of the evaluations of `small`
START = 5  # of what is done to files, what `start_run` does: four leftovers removed, config.json renamed
MOMENTS = (
    "best.new/model.safetensors",
    "last.new/model.safetensors",
    "last.new/optimizer.safetensors",
    "last.new/state.json",
)
FILES = ("model.safetensors", "optimizer.safetensors")


class Killed(BaseException):
    pass


@contextmanager
def killed_at(n: int) -> Iterator[list[str]]:
    """Within, what a save does to files is cut short at the n-th time: half is written, half is removed. -> all so far."""
    done: list[str] = []

    def dies(what: str) -> bool:
        done.append(what)
        return len(done) == n + 1

    def counted(what: str, do: Callable, half: Callable) -> Callable:
        def doing(*args, **kw):
            if dies(what):
                half(*args)
                raise Killed
            return do(*args, **kw)

        return doing

    def half_a_file(tensors: dict, path: Path) -> None:
        save_file(tensors, path)
        os.truncate(path, path.stat().st_size // 2)

    def half_a_folder(path: Path, **kw) -> None:
        if path.exists():
            next(path.iterdir()).unlink()

    save_file, rename, remove = runs.save_file, os.replace, runs.shutil.rmtree
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runs, "save_file", counted("write", save_file, half_a_file))
        patch.setattr(runs.os, "replace", counted("rename", rename, lambda *_: None))
        patch.setattr(runs.shutil, "rmtree", counted("remove", remove, half_a_folder))
        yield done


def small(out: Path, resume: bool = False) -> None:
    """A training of five steps, each with an evaluation: what the scripts call, of a model with one matrix."""
    runs.start_run(out, {"steps": len(VALS)}, resume)
    torch.manual_seed(0)
    model = nn.ModuleDict({"adapter": nn.Linear(3, 2)})
    parameters = dict(model.named_parameters())
    optimizer = torch.optim.AdamW(parameters.values(), lr=0.1)
    ema = training.EMA(parameters)
    state = {"step": 0, "best": float("inf"), "modules": []}
    if resume:
        state |= runs.load_checkpoint(out / "last", model, optimizer, parameters, ema)
    for step in range(state["step"], len(VALS)):
        generator = training.seeded("step", step)
        model["adapter"](torch.randn(4, 3, generator=generator)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        ema.update()
        state["step"] = step + 1
        runs.save_evaluated(out, VALS[step], model, ["adapter"], optimizer, parameters, ema, state)


def assert_sound(out: Path, every: int) -> int:
    """What must be true of a folder whenever a run was killed in it. -> the step that it goes on from."""
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    vals = {row["step"] + 1: row["val"] for row in rows if "val" in row}
    for name in ("last", "best"):
        folder = runs._intact(out / name)
        if not folder.exists():
            # before its first save is done: one evaluation, logged again by every run that was killed in it
            assert name == "last" or not (out / "last").exists()
            assert set(vals) <= {every}
            continue
        state = json.loads((folder / "state.json").read_text())
        for file in FILES:
            tensors = load_file(folder / file)
            assert tensors and all(x.isfinite().all() for x in tensors.values())
        if name == "best":
            assert (
                state["best"] == vals[state["step"]] == min(v for s, v in vals.items() if s <= state["step"])
            )
            # a better one may have been measured, and its save cut short: then it is measured again
            assert all(v >= state["best"] for s, v in vals.items() if s < max(vals))
    last = runs._intact(out / "last")
    step = json.loads((last / "state.json").read_text())["step"] if last.exists() else 0
    assert step >= max(vals, default=0) - every, "more is lost than the steps since the last save"
    return step


def assert_as_if_never_killed(whole: Path, killed: Path) -> None:
    for name in ("last", "best"):
        for file in FILES:
            assert_same(load_file(whole / name / file), load_file(killed / name / file))
        a, b = (json.loads((run / name / "state.json").read_text()) for run in (whole, killed))
        assert a == b
    assert not [p.name for p in killed.iterdir() if p.suffix in (".new", ".old")]


@pytest.fixture
def whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(runs, "git_commit", lambda: "unknown")  # takes longer than all the rest
    monkeypatch.setattr(sheets, "draw_curves", lambda *_: None)
    small(tmp_path / "whole")
    return tmp_path / "whole"


def test_killed_at_any_point_of_any_save_a_run_goes_on_as_if_it_had_not_been(whole, tmp_path):
    with killed_at(10_000) as done:
        small(tmp_path / "counted")
    assert done[-7:] == ["remove", "write", "write", "remove", "rename", "rename", "remove"]
    assert len(done) == START + 8 * 7 - 2  # three of five are the best so far; the first two replace nothing
    for n in range(START, len(done)):
        out = tmp_path / str(n)
        with killed_at(n), pytest.raises(Killed):
            small(out)
        assert_sound(out, 1)
        small(out, resume=True)
        assert_as_if_never_killed(whole, out)


def test_killed_again_and_again_a_run_comes_to_its_end(whole, tmp_path):
    kills, dice = 0, random.Random(0)
    for i in range(20):
        out, step = tmp_path / str(i), 0
        while True:
            try:
                with killed_at(dice.randrange(30)):
                    small(out, resume=(out / "config.json").exists())
                break
            except Killed:
                kills += 1
                now = assert_sound(out, 1) if (out / "metrics.jsonl").exists() else 0
                assert now >= step
                step = now
        assert_as_if_never_killed(whole, out)
    assert kills > 40


@pytest.mark.parametrize(
    ("at", "steps", "after"), [(7, [1], [4.0, 3.5, 3.1, 4.0, 4.0]), (21, [2, 1], [3.0, 1.5, 2.0, 1.2, 4.0])]
)
def test_a_best_that_was_saved_when_last_was_not_is_not_written_over_by_a_worse(
    at, steps, after, tmp_path, monkeypatch
):
    """Such a run may go on otherwise than it began: in other processes, with other evaluations."""
    out = tmp_path / "run"
    with killed_at(START + at), pytest.raises(Killed):  # of the evaluation best is saved, last half
        small(out)
    states = [json.loads(path.read_text()) for path in sorted(out.glob("[bl]*[et]/state.json"))]
    assert [state["step"] for state in states] == steps
    monkeypatch.setattr("tests.test_kill.VALS", after)
    small(out, resume=True)
    assert json.loads((out / "best/state.json").read_text())["best"] == states[0]["best"] < min(after[1:])


def test_a_lock_goes_with_its_process_though_those_that_read_pictures_live_on(tmp_path):
    text = f"""if True:
        import os, pathlib, time
        from unifashion import runs
        runs.lock(pathlib.Path({str(tmp_path)!r}))
        if reader := os.fork():
            print(reader, flush=True)
        time.sleep(60)
    """
    process = subprocess.Popen([sys.executable, "-c", text], cwd=ROOT, stdout=subprocess.PIPE)
    reader = int(process.stdout.readline())
    try:
        with pytest.raises(UserError, match="is in use by another process"):
            runs.lock(tmp_path)
        process.kill()
        process.wait()
        os.kill(reader, 0)  # it lives
        runs.lock(tmp_path)
    finally:
        process.kill()
        os.kill(reader, signal.SIGKILL)


def is_new(path: Path, since: float) -> bool:
    try:
        return path.stat().st_mtime > since
    except OSError:
        return False


@pytest.mark.slow
@pytest.mark.parametrize(
    ("what", "steps", "every", "kills"),
    [("1 align", 180, 3, 14), ("2 tryon", 24, 2, 6)],
    ids=["align", "tryon"],
)
def test_kill_9_at_random_moments_costs_the_steps_since_the_last_save(what, steps, every, kills, place):
    """Half of the moments are drawn evenly over a run's first seconds; half lie in a save, which is short."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(
        ["tests.several", "torch._refs", "torch._dynamo"]
    )  # a process starts in no time
    dice, out, step = random.Random(4), place / "killed", 0
    flags = ["--eval-every", str(every), "--workers", "0"]
    began = time.time()
    train(place, [(what, "whole", steps, flags, [])])
    longest = (time.time() - began) / kills  # so that a fast machine does not come to the end
    for i in range(kills):
        resume = ["--resume"] if (out / "config.json").exists() else []
        run = context.Process(target=train, args=(place, [(what, "killed", steps, [*flags, *resume], [])]))
        began = time.time()
        run.start()
        at, last = out / dice.choice(MOMENTS), out / MOMENTS[-1]
        if i + 1 == kills:
            at = last = out / "last/state.json"  # however slow the machine is, one save was whole
        while i % 2 and run.is_alive() and not (is_new(at, began) or is_new(last, began)):
            time.sleep(0.0005)
        time.sleep(dice.uniform(0, 0.003 if i % 2 else longest))
        assert run.is_alive(), "it came to its end before it was killed: give it more steps"
        run.kill()
        run.join()
        assert run.exitcode == -signal.SIGKILL
        now = assert_sound(out, every) if (out / "metrics.jsonl").exists() else 0
        left = sorted(p.name for p in out.iterdir() if p.suffix in (".new", ".old")) if out.exists() else []
        print(f"killed at {now} of {steps} steps, {left}")
        assert now >= step
        step = now
    assert 0 < step < steps
    train(place, [(what, "killed", steps, [*flags, "--resume"], [])])
    assert_as_if_never_killed(place / "whole", out)
