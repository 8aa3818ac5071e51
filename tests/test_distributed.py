"""Two processes (gloo) against one that has the whole batch: the same losses, gradients, weights, checkpoints, answers.

In float64, where a difference is a mistake: what float32 rounds away after the first step, AdamW makes as large as the rate
where a gradient is next to nothing, and small random networks tell such weights apart. In float32 the losses are compared at
the full size's rate.
"""

import json
import os
import re
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.several import ROOT, in_two, torchrun, train
from tests.small_runs import PHASE1, assert_same, learned, moments, state
from unifashion import runs

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("one_thread")]

STEPS = 6
MIXED = 8  # two of each task
CUT = ["1 caption", "1 generate", "2 cir", "2 tryon"]  # with something to cut into shards
JOBS = {  # run: what, steps, hooks
    **{what: (what, STEPS, ["double"]) for what in ("1 align", *CUT)},
    "mixed": ("2 mixed", MIXED, ["double"]),
    "checkpointing": ("2 mixed", MIXED, ["double"]),  # one process without, two with
    "float32": ("2 mixed", MIXED, ["slowly"]),
    "bfloat16": ("1 caption", STEPS, ["slowly"]),
}
HALF = ("2 mixed", "half", MIXED, [], ["double", "half"])


def job(name: str, prefix: str, *flags: str) -> tuple:
    what, steps, hooks = JOBS[name]
    hooks = [*hooks, "checkpointing"] if name == "checkpointing" and prefix != "one" else hooks
    flags = [*flags, "--dtype", "bf16"] if name == "bfloat16" else [*flags]
    return what, f"{prefix} {name}", steps, flags, hooks


@pytest.fixture(scope="module")
def ran(made: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every one of JOBS by one process, by two, and by two with shards; and runs that change hands halfway."""
    place = tmp_path_factory.mktemp("several")
    for thing in made.iterdir():
        (place / thing.name).symlink_to(thing)
    threads = torch.get_num_threads()
    what, _, steps, _, hooks = HALF
    half = (what, "one half", steps, [], hooks)
    train(place, [*(job(name, "one") for name in JOBS if name != "checkpointing"), half])
    shutil.copytree(place / "one half", place / "one then two")
    shutil.copytree(place / "one half", place / "one then shards")
    told = in_two(
        place,
        [
            *(job(name, "two") for name in JOBS if name not in ("checkpointing", "bfloat16")),
            *(job(name, "shards", "--shard") for name in JOBS if name != "1 align"),
            (what, "one then two", steps, ["--resume"], ["double", "again"]),
            (what, "one then shards", steps, ["--resume", "--shard"], ["double", "again"]),
            (what, "shards half", steps, ["--shard"], hooks),
        ],
    )
    assert told.returncode == 0, told.stderr
    shutil.copytree(place / "shards half", place / "shards then one")
    train(place, [(what, "shards then one", steps, ["--resume"], ["double", "again"])])
    torch.set_num_threads(threads)
    return place


PAIRS = [(prefix, name) for name in JOBS for prefix in ("two", "shards")]
PAIRS = [
    pair
    for pair in PAIRS
    if pair not in [("shards", "1 align"), ("two", "checkpointing"), ("two", "bfloat16")]
]


def seen(ran: Path, name: str) -> dict[str, list]:
    name = "one mixed" if name == "one checkpointing" else name
    return json.loads((ran / name / "seen.json").read_text())


@pytest.mark.parametrize(("prefix", "name"), PAIRS)
def test_two_processes_follow_one_in_every_loss_and_every_gradients_norm(prefix, name, ran):
    one, two = seen(ran, f"one {name}"), seen(ran, f"{prefix} {name}")
    steps = MIXED if JOBS[name][0] == "2 mixed" else STEPS
    assert len(one["losses"]) == len(two["losses"]) == steps
    tolerance, of_norms = {"bfloat16": (2e-2, 1e-1), "float32": (1e-5, 1e-3)}.get(name, (1e-5, 1e-6))
    for a, b, norms_a, norms_b in zip(one["losses"], two["losses"], one["norms"], two["norms"], strict=True):
        assert b == pytest.approx(a, abs=tolerance)  # the same names, too
        assert norms_b == pytest.approx(norms_a, rel=of_norms)
    names = {loss for losses in one["losses"] for loss in losses}
    if name == "mixed":
        assert names == {
            "retrieval ITC", "retrieval ITM", "cir ITC", "cir ITC caption", "cir ITM", "cir ITG", "cir q2I",
            "caption ITG", "tryon q2I",
        }  # fmt: skip
    # half of what is cut is here: but for what does not divide
    assert two["kept"] == (pytest.approx([0.5], abs=0.03) if prefix == "shards" else [])


@pytest.mark.parametrize(("prefix", "name"), [p for p in PAIRS if "float" not in p[1]])
def test_in_float64_two_processes_learn_what_one_does(prefix, name, ran):
    one = "one mixed" if name == "checkpointing" else f"one {name}"
    assert_close(ran, one, f"{prefix} {name}")


def assert_close(ran: Path, one: str, two: str) -> None:
    for read, tolerance in ((learned, 1e-8), (moments, 1e-8)):
        a, b = read(ran / one), read(ran / two)
        assert a.keys() == b.keys() and a
        off = {k: float((a[k] - b[k]).abs().max()) for k in a}
        assert {k: x for k, x in off.items() if x > tolerance} == {}


def test_in_float32_weights_differ_only_where_a_gradient_is_rounding(ran):
    """Softmax does not see a bias of the keys: its gradient is 0 and what rounding leaves, which AdamW takes for a direction."""
    one, rate = learned(ran / "one float32"), 2e-5
    for prefix in ("two", "shards"):
        two = learned(ran / f"{prefix} float32")
        off = {k: float((one[k] - two[k]).abs().max()) for k in one}
        assert max(off.values()) < 2 * MIXED * rate
        assert max(x for k, x in off.items() if not k.endswith("k.bias")) < rate


@pytest.mark.parametrize("name", ["one then two", "one then shards", "shards then one"])
def test_a_checkpoint_of_one_process_is_that_of_several(name, ran):
    """Loaded and saved again it is the same to the last bit; and the run that goes on follows one that did not stop."""
    before = name.split()[0] + " half"
    for file in ("model.safetensors", "optimizer.safetensors"):
        assert_same(load_file(ran / before / "last" / file), load_file(ran / name / "again" / file))
    assert state(ran / name)["step"] == MIXED
    assert_close(ran, "one mixed", name)
    whole, parts = seen(ran, "one mixed")["losses"], seen(ran, before)["losses"] + seen(ran, name)["losses"]
    assert all(b == pytest.approx(a, abs=1e-5) for a, b in zip(whole, parts, strict=True))


# What ends


def lines(stderr: str) -> list[str]:
    """What our scripts have said, without progress bars and torchrun's own report."""
    assert "Traceback" not in stderr.split("torch/distributed/elastic")[0], stderr
    return [line for line in stderr.splitlines() if line.startswith("tests.several:")]


@pytest.fixture
def room(made: Path, tmp_path: Path) -> Path:
    for thing in made.iterdir():
        (tmp_path / thing.name).symlink_to(thing)
    return tmp_path


@pytest.mark.parametrize(
    ("flags", "hooks", "says"),
    [
        (["--accumulate", "0"], ["late"], "--accumulate and --eval-every must be at least 1"),
        (["--batch-size", "3"], [], "a batch of 3 does not divide among 2 processes"),
        ([], [], "is in use by another process"),
        ([], ["nan"], "is nan at step 2: the run diverged. .*nan.1.json has its samples"),
    ],
    ids=["flag", "batch", "lock", "nan"],
)
def test_what_is_wrong_is_told_in_one_line_by_all_processes_together(flags, hooks, says, room):
    if says.startswith("is in use"):
        runs.lock(room / "wrong")
    told = in_two(room, [("1 align", "wrong", 4, flags, hooks)])
    (line,) = lines(told.stderr)
    assert re.search(says, line), line
    assert "exitcode  : 2" in told.stderr  # torchrun may end the other before it has left by itself
    assert not (room / "wrong/last").exists()


def test_two_processes_go_on_with_phase_1_as_a_whole(room):
    for flags in ([], ["--resume"]):
        told = in_two(room, [("1 all", "all", 2, flags, [])])
        assert told.returncode == 0, told.stderr
    assert [state(room / "all" / stage)["step"] for stage in PHASE1] == [2, 2, 2]
    for rank in range(2):  # a thread of gloo's that outlives its group may abort the process
        assert "gloo" not in (room / f"process {rank} came to its end").read_text()


def test_torchrun_stopped_by_sigterm_all_processes_save_and_leave(room):
    with open(room / "told", "w") as told:
        run = subprocess.Popen(
            torchrun(room, [("1 align", "long", 100_000, [], [])]),
            cwd=ROOT,
            stderr=told,
            start_new_session=True,
        )
        try:
            while not (room / "long/metrics.jsonl").exists():
                assert run.poll() is None, (room / "told").read_text()
                time.sleep(0.2)
            run.send_signal(signal.SIGTERM)
            run.wait(60)
        finally:
            run.poll() is None and os.killpg(run.pid, signal.SIGKILL)
    assert (room / "process 0 came to its end").exists() and (room / "process 1 came to its end").exists()
    assert (room / "told").read_text().count("stopped, ") == 1
    assert state(room / "long")["step"] > 0 and not (room / "long/best").exists()
    tensors = learned(room / "long")
    assert tensors and all(x.isfinite().all() for x in tensors.values())
