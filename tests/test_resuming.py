"""Runs of both training scripts that stop and go on: the same bit for bit, whatever stopped them."""

import errno
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import train_phase1
import train_phase2
from tests.cases import others_slow
from tests.small_runs import (
    DROPPING,
    PHASE1,
    RUNS,
    arguments,
    assert_same,
    learned,
    metrics,
    moments,
    run,
    state,
    stopped_after,
)
from unifashion import UserError, feed, runs, training
from unifashion.config import PRESETS
from weights.tiny import pretrain

pytestmark = pytest.mark.usefixtures("one_thread")

ROOT = Path(__file__).parent.parent
WRITES, DRAWS = {"text_adapter", "lora"}, {"image_adapter", "style_adapter", "null_context", "unet"}

LONG = pytest.param("2 mixed", marks=pytest.mark.slow)

SHOWN = {  # by an evaluation: captions, pictures, what is found
    "1 align": "txt",
    "1 caption": "txt",
    "1 generate": "png",
    "2 retrieval": "retrieval.txt",
    "2 cir": "cir.txt",
    "2 caption": "caption.txt",
    "2 tryon": "tryon.png",
    "2 mixed": "retrieval.txt cir.txt caption.txt tryon.png",
}


@pytest.mark.parametrize("what", others_slow(RUNS, "1 caption", "1 generate", "2 retrieval"))
def test_two_steps_and_a_resumed_two_are_four_steps_bit_for_bit(what, place):
    run(what, place, "whole", 4)
    # the schedule follows the number of steps, so the interrupted run asks for four as well and is stopped after two
    with stopped_after(2):
        run(what, place, "parts", 4)
    assert state(place / "parts")["step"] == 2
    run(what, place, "parts", 4, "--resume")
    assert_same_runs(place)
    shown = {path.name for path in (place / "whole/samples").iterdir() if path.stat().st_size}
    assert shown == {f"000004.{ending}" for ending in SHOWN[what].split()}


def test_without_captions_composed_queries_show_what_they_find(place):
    run("2 cir", place, "run", 1, "--without", "itg,q2i,caption")
    told = (place / "run/samples/000001.cir.txt").read_text().splitlines()[1::3]
    assert told and all(line.startswith("-> another's (") for line in told)


@pytest.mark.parametrize(
    ("what", "more"),
    [
        ("1 caption", []),
        ("2 retrieval", ["--accumulate", "2"]),
        *(
            pytest.param(what, more, marks=pytest.mark.slow)
            for what, more in [
                ("1 align", []),
                ("1 align", ["--cache", "--accumulate", "2"]),
                ("1 caption", ["--cache", "--dtype", "bf16", "--accumulate", "2"]),
                ("2 mixed", ["--cache", "--dtype", "bf16", "--accumulate", "2", "--freeze-diffusion"]),
            ]
        ),
    ],
)
def test_a_run_with_dropout_resumes_bit_for_bit(what, more, place, monkeypatch):
    monkeypatch.setattr(feed, "come_again", lambda *_: True)  # in longer runs they do
    monkeypatch.setitem(PRESETS, "tiny", DROPPING)
    run(what, place, "whole", 4, *more)
    with stopped_after(3):
        run(what, place, "parts", 4, *more)
    run(what, place, "parts", 4, *more, "--resume")
    assert_same_runs(place)


@pytest.mark.parametrize("what", ["1 align", "2 mixed"])
def test_every_batch_has_random_numbers_of_its_own(what, place, monkeypatch):
    """And dropout of its own: both are keyed by how many batches came before, of all tasks."""
    drawn, seeds, born, seeding = [], [], training.BatchRNG.__init__, torch.manual_seed
    monkeypatch.setattr(training.BatchRNG, "__init__", lambda *key: (drawn.append(key[1:4]), born(*key))[1])
    monkeypatch.setattr(torch, "manual_seed", lambda seed: (seeds.append(seed), seeding(seed))[1])
    run(what, place, "run", 4, "--accumulate", "2", "--seed", "7")
    learns = [key for key in drawn if not key[0].startswith("val ")]
    assert [step for _, _, step in learns] == list(range(8)) and {seed for _, seed, _ in learns} == {7}
    assert len({what for what, _, _ in learns}) == (4 if what == "2 mixed" else 1)
    assert seeds[-8:] == [7 + step for step in range(8)]


@pytest.mark.parametrize("what", ["1 caption", LONG])
def test_a_run_killed_before_its_first_checkpoint_starts_again_as_it_was_asked(what, place):
    init = learned_once(place, what)
    run(what, place, "whole", 4, *init)
    shutil.copytree(place / "whole", place / "parts")
    for folder in ("last", "best"):
        shutil.rmtree(place / "parts" / folder)
    (place / "parts/metrics.jsonl").unlink()
    run(what, place, "parts", 8, "--resume")  # neither --init nor --steps is said again
    assert_same_runs(place)


def test_what_a_run_started_from_is_not_needed_once_it_has_saved(place):
    init = learned_once(place, "1 caption")
    run("1 caption", place, "on", 1, *init)
    shutil.rmtree(init[-1])
    run("1 caption", place, "on", 1, "--resume", "--steps", "2")
    assert state(place / "on")["step"] == 2
    assert json.loads((place / "on/config.json").read_text())["init"] == init[-1]


def test_what_is_asked_of_a_run_that_goes_on_is_what_was_asked_before(place):
    run("1 generate", place, "run", 2)
    config = (place / "run/config.json").read_text()
    for flags, told in (
        (["--lr", "0.5"], "lr 0.001, not 0.5"),
        (["--batch-size", "3"], "batch-size 4, not 3"),
        (["--seed", "1"], "seed 0, not 1"),
        (["--accumulate", "2"], "accumulate 1, not 2"),
        (["--dtype", "bf16"], "dtype auto, not bf16"),
        (["--cache"], "cache False, not True"),
    ):
        with pytest.raises(UserError, match=f"was started with {told}: repeat its flags"):
            run("1 generate", place, "run", 3, "--resume", *flags)
    with pytest.raises(UserError, match="with lr 0.001, not 0.5; seed 0, not 1: repeat its flags"):
        run("1 generate", place, "run", 3, "--resume", "--lr", "0.5", "--seed", "1")
    with pytest.raises(UserError, match="was started with stage generate, not align: repeat"):
        run("1 align", place, "run", 3, "--resume")
    with pytest.raises(UserError, match="was started with stage generate, not phase2"):
        run("2 tryon", place, "run", 3, "--resume")
    with pytest.raises(UserError, match="has done 2 steps already, more than the 1 of --steps"):
        run("1 generate", place, "run", 1, "--resume", "--steps", "1")
    with pytest.raises(
        UserError, match="was started with init .*align.safetensors, not .*phase1.safetensors"
    ):
        run("1 generate", place, "run", 3, "--resume", "--init", str(place / "phase1.safetensors"))
    assert (place / "run/config.json").read_text() == config
    (place / "run/config.json").write_text(re.sub('"samples": [0-9]+', '"samples": 7', config))
    with pytest.raises(UserError, match="was started with 7 samples, now there are [0-9]+$"):
        run("1 generate", place, "run", 3, "--resume")
    (place / "run/config.json").write_text(config)
    with pytest.raises(UserError, match="nothing to resume"):
        run("1 align", place, "mistyped", 1, "--resume")
    assert not (place / "mistyped").exists()


def test_a_default_that_is_said_is_no_other_flag(place):
    run("2 cir", place, "run", 1, "--without", "itg,q2i")
    run("2 cir", place, "run", 1, "--without", "itg,q2i", "--resume", "--lr", "0.001", "--batch-size", "4")
    with pytest.raises(UserError, match="was started with cir lr 0.001, not 0.5: repeat"):
        run("2 cir", place, "run", 1, "--without", "itg,q2i", "--resume", "--lr", "0.5")


def test_a_run_of_phase_2_goes_on_with_its_own_tasks_and_parts(place):
    run("2 cir", place, "run", 1, "--without", "itg,q2i")
    for what, flags, told in (
        ("2 caption", ["--without", "itg,q2i"], r"task \['cir'\], not \['caption'\]"),
        ("2 mixed", ["--without", "itg,q2i"], r"task \['cir'\], not \['retrieval', 'cir', 'caption', 'tryon'\]"),
        ("2 cir", ["--without", "itg"], r"without \['itg', 'q2i'\], not \['itg'\]"),
        ("2 cir", ["--without", "itg,q2i", "--freeze-diffusion"], "freeze-diffusion False, not True"),
        ("1 align", [], "stage phase2, not align"),
    ):  # fmt: skip
        with pytest.raises(UserError, match=f"was started with {told}"):
            run(what, place, "run", 4, "--resume", *flags)
    run("2 cir", place, "run", 1, "--resume", "--without", "itg,q2i")


@pytest.mark.parametrize(("what", "sign"), [("1 align", signal.SIGINT), ("2 retrieval", signal.SIGTERM)])
def test_a_signal_finishes_the_step_saves_and_is_no_failure(what, sign, place, monkeypatch, capsys):
    before = {s: signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)}
    backward, count = training.clipped_backward, iter(range(1, 100))

    def asked(*args):
        if next(count) == 2:
            os.kill(os.getpid(), sign)
        return backward(*args)

    monkeypatch.setattr(training, "clipped_backward", asked)
    try:
        training.run(lambda: run(what, place, "run", 5))  # an exit code other than 0 would be raised
    finally:
        for s, handler in before.items():
            signal.signal(s, handler)
    assert state(place / "run")["step"] == 2
    assert f"stopped, {place}/run is saved: --resume goes on" in capsys.readouterr().err
    assert not any("val" in row for row in metrics(place / "run"))  # to be stopped is no evaluation
    assert [row["step"] for row in metrics(place / "run")] == [0, 1]
    run(what, place, "run", 5, "--resume")
    assert state(place / "run")["step"] == 5


@pytest.mark.parametrize("sign", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_asks_for_the_end_and_a_second_one_is_obeyed_at_once(sign):
    before = {s: signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)}
    try:
        stop = training.Stop()
        assert {
            s: signal.getsignal(s) for s in before
        } == before  # what takes long before a loop ends at once
        stop.install()
        assert not stop.asked
        os.kill(os.getpid(), sign)
        assert stop.asked and signal.getsignal(sign) == signal.SIG_DFL
    finally:
        for s, handler in before.items():
            signal.signal(s, handler)


def test_a_signal_that_comes_while_the_processes_agree_is_for_the_next_step(monkeypatch):
    stop = training.Stop()

    def any_process(flag: bool) -> bool:
        """All have sent what they know; the signal comes while they wait for one another."""
        stop.asked = True
        return flag

    monkeypatch.setattr(training.parallel, "any_process", any_process)
    assert [stop.asked_anywhere() for _ in range(2)] == [False, True]


def test_a_full_disk_is_one_line_wherever_it_was_met_and_other_failures_are_not_hidden(capsys):
    def write(number: int) -> None:
        raise OSError(number, "what the system says", "metrics.jsonl")

    for number in (errno.ENOSPC, errno.EDQUOT):
        with pytest.raises(SystemExit) as left:
            training.run(lambda number=number: write(number))
        told = capsys.readouterr().err
        assert left.value.code == 2 and told.count("\n") == 1 and "the disk is full" in told
    with pytest.raises(PermissionError):
        training.run(lambda: write(errno.EACCES))


@pytest.mark.slow
@pytest.mark.parametrize("moment", ["last step", "evaluation"])
def test_stopped_at_the_end_of_a_stage_the_next_does_not_begin(moment, place, monkeypatch, capsys):
    monkeypatch.setitem(
        train_phase1.DEFAULTS,
        "tiny",
        {k: {**v, "steps": 1} for k, v in train_phase1.DEFAULTS["tiny"].items()},
    )
    everything = [a if a != "align" else "all" for a in arguments("1 align", place, "all")]
    asks, part = (training, "clipped_backward") if moment == "last step" else (runs, "save_evaluated")
    does = getattr(asks, part)

    def asked(*args):
        os.kill(os.getpid(), signal.SIGTERM)
        return does(*args)

    before = {s: signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)}
    try:
        with monkeypatch.context() as patch:
            patch.setattr(asks, part, asked)
            train_phase1.main(everything)
    finally:
        for s, handler in before.items():
            signal.signal(s, handler)
    assert (place / "all/align/best").exists() and not (place / "all/caption").exists()
    assert "align is saved: --resume goes on" in capsys.readouterr().err
    train_phase1.main([*everything, "--resume"])
    assert [state(place / "all" / stage)["step"] for stage in PHASE1] == [1, 1, 1]
    (place / "all").rename(place / "moved")
    moved = [str(place / "moved") if a == str(place / "all") else a for a in everything]
    train_phase1.main([*moved, "--resume"])  # done, wherever it lies


@pytest.mark.slow
@pytest.mark.parametrize("sign", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_to_the_whole_group_is_for_the_process_that_trains(sign, place):
    """As a terminal sends Ctrl-C, `timeout` and schedulers SIGTERM: the processes that read must not die of it before their data are used."""
    place.joinpath("go.py").write_text(
        f"import sys; sys.path.insert(0, {str(ROOT)!r})\n"
        "import pytest, train_phase1; from pathlib import Path\n"
        "from tests.small_runs import arguments, shrink; from unifashion import training\n"
        "patch = pytest.MonkeyPatch(); shrink(patch)\n"
        "flags = ['--workers', '2', '--steps', '100000']\n"
        "training.run(lambda: train_phase1.main(arguments('1 align', Path('.'), 'run', *flags)))\n"
    )
    with open(place / "told", "w") as told:
        run = subprocess.Popen(
            [sys.executable, "go.py"], cwd=place, stdout=told, stderr=told, start_new_session=True
        )
        try:
            while not (place / "run/metrics.jsonl").exists():
                assert run.poll() is None, (place / "told").read_text()
                time.sleep(0.2)
            os.killpg(run.pid, sign)
            assert run.wait(60) == 0, (place / "told").read_text()
        finally:
            run.poll() is None and os.killpg(run.pid, signal.SIGKILL)
    assert "stopped, run is saved" in (place / "told").read_text() and state(place / "run")["step"] > 0


@pytest.mark.slow
@pytest.mark.parametrize("error", ["UserError", "AssertionError"])
def test_an_error_in_a_process_that_reads_ends_the_run(error, place):
    """Where these processes heed no first SIGTERM, Python would wait for them for ever."""
    place.joinpath("go.py").write_text(
        f"import sys; sys.path.insert(0, {str(ROOT)!r})\n"
        "import pytest, train_phase1, unifashion; from pathlib import Path\n"
        "from tests.small_runs import arguments, shrink; from unifashion import samples, training\n"
        "patch = pytest.MonkeyPatch(); shrink(patch)\n"
        "def fails(*_): raise getattr(unifashion, 'UserError', None)('no picture') if "
        f"{error == 'UserError'} else AssertionError('a bug')\n"
        "samples.Pairs.__getitem__ = fails\n"
        "training.run(lambda: train_phase1.main(arguments('1 align', Path('.'), 'run', '--workers', '3')))\n"
    )
    done = subprocess.run([sys.executable, "go.py"], cwd=place, capture_output=True, text=True, timeout=100)
    assert done.returncode == (2 if error == "UserError" else 1), done.stderr
    assert "no picture" in done.stderr if error == "UserError" else "a bug" in done.stderr


def test_a_mistyped_init_is_told_before_a_model_is_loaded(place, monkeypatch):
    for module, what in ((train_phase1, "1 align"), (train_phase2, "2 cir")):
        monkeypatch.setattr(module, "load_public", lambda *_, **__: pytest.fail("loaded"))
        with pytest.raises(UserError, match="nowhere is neither a run folder nor"):
            module.main(arguments(what, place, "run", "--init", "nowhere"))


def test_stopped_before_its_first_step_it_says_so_in_one_line(capsys):
    def main() -> None:
        raise KeyboardInterrupt

    with pytest.raises(SystemExit) as left:
        training.run(main)
    assert left.value.code == 130 and capsys.readouterr().err.endswith(": stopped\n")


@pytest.mark.slow
def test_stopped_in_one_stage_the_next_does_not_begin_and_goes_on_when_asked(place, monkeypatch):
    steps = {stage: {**of, "steps": 2} for stage, of in train_phase1.DEFAULTS["tiny"].items()}
    monkeypatch.setitem(train_phase1.DEFAULTS, "tiny", steps)
    everything = [a if a != "align" else "all" for a in arguments("1 align", place, "all")]
    (place / "all/caption/samples").mkdir(parents=True)
    with pytest.raises(UserError, match="all/caption is not empty"):
        train_phase1.main(everything)
    assert not (place / "all/align").exists()  # told before the first stage has trained
    shutil.rmtree(place / "all")
    with stopped_after(1):
        train_phase1.main(everything)
    assert state(place / "all/align")["step"] == 1 and not (place / "all/caption").exists()
    with pytest.raises(UserError, match="all/align was started with init None, not other"):
        train_phase1.main([*everything, "--resume", "--init", "other"])
    train_phase1.main([*everything, "--resume"])
    assert [state(place / "all" / stage)["step"] for stage in PHASE1] == [2, 2, 2]
    (place / "all/align/skipped.txt").write_text("what could not be read\n")
    train_phase1.main([*everything, "--resume"])
    assert (place / "all/align/skipped.txt").exists()  # nothing was read again
    parts = {runs.part_of(name) for name in learned(place / "all/generate")}
    assert parts == {"qformer", *WRITES, *DRAWS}  # all of it, from each of the three


@pytest.mark.parametrize("part", ["vae", "vit", "llama"])
def test_the_stand_ins_resume_bit_for_bit(part, place, monkeypatch):
    monkeypatch.setattr(pretrain, "HERE", place)
    monkeypatch.setattr(pretrain, "report_vae", lambda *_: None)
    (place / "llama_tokenizer.model").symlink_to(place / "weights/llama_tokenizer.model")

    def go(name: str, *more: str) -> None:
        rest = ["--out", str(place / name), "--workers", "0", "--batch-size", "4", "--steps", "4", *more]
        pretrain.main([part, "--data", str(place / "toy"), *rest])

    go("whole")
    with stopped_after(2):
        go("parts")
    go("parts", "--resume")
    assert_same(learned(place / "whole"), learned(place / "parts"))


@pytest.mark.parametrize("at", [1, 2])
def test_a_stand_in_that_diverges_between_two_looks_is_not_saved(at, place, monkeypatch):
    """The gradient is no number at step 1, at which nobody looks; or at 2 itself, whose loss still is one."""
    monkeypatch.setattr(pretrain, "HERE", place)
    (place / "llama_tokenizer.model").symlink_to(place / "weights/llama_tokenizer.model")
    clip, steps = torch.nn.utils.clip_grad_norm_, iter(range(8))

    def spoil(parameters, most):
        parameters = list(parameters)
        if next(steps) == at:
            parameters[0].grad.fill_(float("nan"))
        return clip(parameters, most)

    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", spoil)
    flags = ["--workers", "0", "--batch-size", "4", "--steps", "8", "--eval-every", "3"]
    with pytest.raises(UserError, match="is nan at step 2: the run diverged"):
        pretrain.main(["llama", "--data", str(place / "toy"), "--out", str(place / "run"), *flags])
    assert not (place / "run/last").exists()


# Helpers


def assert_same_runs(place: Path) -> None:
    """The runs whole and parts have learned and measured the same, bit for bit."""
    whole, parts = place / "whole", place / "parts"
    assert_same(learned(whole), learned(parts))
    assert_same(learned(whole, "best"), learned(parts, "best"))
    assert_same(moments(whole), moments(parts))
    assert {**state(whole), "commit": ""} == {**state(parts), "commit": ""}
    measured = [[row for row in metrics(d) if any(k.startswith("val") for k in row)] for d in (whole, parts)]
    assert measured[0] == measured[1] and len([row for row in measured[0] if "val" in row]) == 1


def learned_once(place: Path, what: str) -> list[str]:
    """--init and a run folder to start `what` from."""
    run("1 align", place, "first", 1)
    if what == "2 mixed":  # with all of phase 1
        shutil.copy(place / "phase1.safetensors", place / "first/last/model.safetensors")
    return ["--init", str(place / "first")]
