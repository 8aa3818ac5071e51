"""eval/train_speed.py: its step is the scripts' step, its sums are the allocator's, what it prints is what it found."""

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch.optim import adam

import train_phase1
import train_phase2
from eval import train_speed
from tests.small_runs import DROPPING, MINI, run, shrink
from unifashion import UserError, feed, objectives, training
from unifashion.config import FULL, TINY

pytestmark = pytest.mark.usefixtures("one_thread")

CPU = torch.device("cpu")
STAGES = list(train_speed.STAGES)


def real(stage: str) -> train_speed.Setup:
    torch.manual_seed(0)
    return train_speed.prepare(stage, MINI, 4, CPU)


# The step is the scripts' step


@pytest.fixture(scope="module")
def scripts(made: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, dict]]:
    """Of each stage, as train_phase1.py and train_phase2.py run it: the raw batch, what learns, the optimiser's groups, the EMA."""
    seen: dict[str, dict] = {}
    place = tmp_path_factory.mktemp("place")
    for thing in made.iterdir():
        (place / thing.name).symlink_to(thing)
    with pytest.MonkeyPatch.context() as patch:
        shrink(patch)
        spied = {"optimizer": None, "ema": None}

        def watch(stage: str, encode, loss):
            def encoding(model, batch):
                if torch.is_grad_enabled() and "batch" not in seen[stage]:
                    seen[stage]["batch"] = dict(batch)
                return encode(model, batch)

            def losing(model, batch, rng, hardness, **more):
                parts = loss(model, batch, rng, hardness, **more)
                if torch.is_grad_enabled():
                    seen[stage] |= {"losses": set(parts), "moved": {k: v.dtype for k, v in batch.items()}}
                    spied["stage"] = stage
                return parts

            seen[stage] = {}
            return encoding, losing

        def apart(parts, parameters, share, old=training.clipped_backward):
            found = seen[spied["stage"]]
            found["learns"] = sum(p.numel() for p in parameters)
            groups = spied["optimizer"].param_groups
            found["groups"] = sum(p.numel() for g in groups for p in g["params"])
            ema = spied["ema"]
            found["ema"] = sum(x.numel() for x in ema.average.values()) if ema else 0
            return old(parts, parameters, share)

        class AdamW(torch.optim.AdamW):
            def __init__(self, *args, **more):
                super().__init__(*args, **more)
                spied.update(optimizer=self, ema=None)

        class EMA(training.EMA):
            def __init__(self, *args):
                super().__init__(*args)
                spied["ema"] = self

        patch.setattr(torch.optim, "AdamW", AdamW)
        patch.setattr(training, "EMA", EMA)
        patch.setattr(training, "clipped_backward", apart)
        for stage, (phase, name) in train_speed.STAGES.items():
            if phase == 1:
                patch.setitem(train_phase1.STAGES, name, watch(stage, *train_phase1.STAGES[name]))
            else:
                data, encode, loss = train_phase2.TASKS[name]
                if stage == "cir":  # which the script takes from objectives
                    encode, composed = watch(stage, encode, objectives.composed)
                    patch.setattr(objectives, "composed", composed)
                    patch.setitem(train_phase2.TASKS, name, (data, encode, composed))
                else:
                    patch.setitem(train_phase2.TASKS, name, (data, *watch(stage, encode, loss)))
        for stage in ("align", "caption", "generate"):
            run(f"1 {stage}", place, stage, 1)
        run("2 mixed", place, "mixed", 4)
    yield seen


@pytest.mark.slow
@pytest.mark.parametrize("stage", STAGES)
def test_a_random_batch_is_of_the_kind_that_the_data_sets_give(stage, scripts):
    theirs, ours = scripts[stage]["batch"], train_speed.random_batch(stage, MINI, 4)
    assert {k: v.dtype for k, v in ours.items()} == {k: v.dtype for k, v in theirs.items()}
    for name, x in ours.items():
        if name in (
            "before",
            "after",
            "answer",
            *feed.TEXT_MASKS,
            *feed.TEXT_MASKS.values(),
        ):  # as long as may be
            assert x.shape[:-1] == theirs[name].shape[:-1] and x.shape[-1] >= theirs[name].shape[-1]
        else:
            assert x.shape == theirs[name].shape, name


@pytest.mark.slow
@pytest.mark.parametrize("stage", STAGES)
def test_the_same_learns_the_same_has_moments_and_an_average_as_in_the_scripts(stage, scripts):
    theirs, s = scripts[stage], real(stage)
    assert sum(p.numel() for p in s.learning) == theirs["learns"]
    assert sum(p.numel() for g in s.optimizer.param_groups for p in g["params"]) == theirs["groups"]
    assert (
        sum(x.numel() for x in s.ema.average.values()) * (s.ema is not None) == theirs["ema"]
        if s.ema
        else True
    )
    assert (s.ema is None) == (theirs["ema"] == 0)
    assert all(s.optimizer.state[p]["exp_avg"].shape == p.shape for p in s.parameters.values())
    assert all(p.requires_grad for p in s.learning)
    learns = {id(p) for p in s.learning}
    assert not any(p.requires_grad for p in s.model.parameters() if id(p) not in learns)
    with mock.patch.object(training, "clipped_backward", wraps=training.clipped_backward) as apart:
        before = {k: p.detach().clone() for k, p in s.model.named_parameters()}
        assert tuple(train_speed.step(s)) == train_speed.MOMENTS
    assert set(apart.call_args[0][0]) == theirs["losses"]
    changed = {k for k, p in s.model.named_parameters() if not torch.equal(p, before[k])}
    assert changed and changed <= {k for k, p in s.model.named_parameters() if id(p) in learns}
    assert all(p.grad is None for p in s.model.parameters())


def test_under_autocast_only_the_frozen_llm_is_in_bfloat16():
    model = train_speed.prepare("caption2", MINI, 2, CPU, "bf16").model
    low = {name for name, p in model.named_parameters() if p.dtype == torch.bfloat16}
    frozen = {name for name, _ in model.llama.named_parameters() if not name.endswith(("lora_a", "lora_b"))}
    assert low == {f"llama.{name}" for name in frozen}


# The sums


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["caption", "cir", "tryon"])
def test_without_contents_the_sums_are_those_of_real_tensors(stage):
    rows = [train_speed.Row(stage, 4, measured=True) for _ in range(2)]
    train_speed.tracked(real(stage), rows[0])
    with FakeTensorMode():
        train_speed.tracked(real(stage), rows[1])
    for moment in train_speed.MOMENTS:
        assert rows[0].peaks[moment] == pytest.approx(rows[1].peaks[moment], rel=1e-3), moment


@pytest.mark.parametrize("stage", ["align", "cir", "tryon"])
def test_the_sums_are_those_of_the_allocator(stage):
    s, row = real(stage), train_speed.Row(stage, 4, measured=True)
    row.about(s)
    train_speed.tracked(s, row)
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
    ) as profile:
        list(train_speed.step(s))
    total = highest = 0
    for event in sorted(profile.profiler.kineto_results.events(), key=lambda e: e.start_ns()):
        if event.name() == "[memory]":
            total += event.nbytes()
            highest = max(highest, total)
    ours = row.peak - row.rest
    assert 0.98 * ours < highest < 1.25 * ours  # it sees what the CPU's convolutions need for themselves, too


def test_what_a_step_keeps_for_its_backward_pass_is_what_autograd_says():
    torch.manual_seed(0)
    s = train_speed.prepare("align", MINI, 4, CPU, checkpointing=False)
    saved: dict[int, Tensor] = {}

    def keep(x: Tensor) -> Tensor:
        saved[x.untyped_storage().data_ptr()] = x
        return x

    rest = {x.untyped_storage().data_ptr() for x in s.at_rest()}
    with (
        torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x),
        train_speed.Ledger(s.at_rest()) as ledger,
    ):
        start, moments = ledger.live, train_speed.step(s)
        assert next(moments) == "encode"
        encoded = ledger.live - start
        assert next(moments) == "losses"
        kept = ledger.live - start - encoded
    features = 4 * 5 * 32 * 4
    assert encoded > features
    assert kept == pytest.approx(
        sum(x.untyped_storage().nbytes() for p, x in saved.items() if p not in rest), rel=0.05
    )


def test_the_ledger_forgets_what_is_let_go():
    a = torch.zeros(1000)
    with train_speed.Ledger([a, a.view(10, 100)]) as ledger:
        assert ledger.live == 4000
        b = a + 1
        c = b.view(10, 100)[0]
        assert ledger.live == ledger.peak == 8000
        del b
        assert ledger.live == 8000  # c is part of it
        del c
        a.add_(1)
        assert (ledger.live, ledger.peak) == (4000, 8000)
        torch.zeros(10, 20) @ torch.zeros(20, 30)
        assert ledger.flops == 2 * 10 * 20 * 30


def kept_by(function, *shapes: tuple[int, ...], dtype=torch.bfloat16) -> list[Tensor]:
    """What the backward pass of `function` keeps, in a computation for CUDA under autocast, of inputs of these shapes."""
    kept = []
    with FakeTensorMode(), torch.autocast("cpu", torch.bfloat16), pytest.MonkeyPatch.context() as patch:
        for name, instead in train_speed.like_cuda().items():
            patch.setattr(F, name, instead)
        inputs = [torch.empty(shape, dtype=dtype, requires_grad=True) for shape in shapes]
        with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
            out = function(*inputs)
            out.sum().backward()
    assert all(x.grad.shape == x.shape for x in inputs)
    return [out, *kept]


def test_attention_norms_and_dropout_keep_what_they_keep_on_cuda():
    heads, one = (2, 8, 300, 64), 2 * 8 * 300 * 64 * 2
    masked = {"attn_mask": None}
    for more in ({}, {"is_causal": True}, {"dropout_p": 0.1}, masked):

        def attend(q, k, v, more=more):
            if more is masked:
                more = {"attn_mask": torch.ones(2, 1, 1, 300, dtype=torch.bool)}
            return F.scaled_dot_product_attention(q, k, v, **more)

        _, *kept = kept_by(attend, heads, heads, heads)
        storages = {x.untyped_storage()._cdata: x.untyped_storage().nbytes() for x in kept}
        assert (
            4 * one <= sum(storages.values()) < 4.2 * one
        )  # queries, keys, values, output; nothing is 300 x 300
    out, x, *_ = kept_by(lambda x: F.layer_norm(x, (64,)), (10, 64))
    assert out.dtype == x.dtype == torch.float32
    out, x, *_ = kept_by(lambda x: F.group_norm(x, 4), (2, 8, 5, 5))
    assert out.dtype == x.dtype == torch.float32
    out, *kept = kept_by(lambda x: F.dropout(x, 0.5, True), (10, 64))
    assert out.dtype == torch.bfloat16 and [x.dtype for x in kept] == [torch.bool]
    assert kept_by(lambda x: F.dropout(x, 0.5, False), (10, 64))[1:] == []


@pytest.mark.slow
def test_a_step_is_computed_with_dropout_and_recomputation():
    row = train_speed.compute("cir", DROPPING, 4)
    assert (
        row.peak > row.rest > 4 * row.learns and row.flops > 1e6 and row.seconds is None and not row.measured
    )
    assert row.rest < row.peaks["update"] < row.peaks["losses"]  # each of its own moment


@pytest.mark.slow
def test_recomputation_saves_memory_and_costs_work():
    cfg = replace(MINI, qformer=replace(MINI.qformer, depth=6))
    plain, less = (train_speed.compute("align", cfg, 16, checkpointing=how) for how in (False, True))
    assert less.peak - less.rest < 0.7 * (plain.peak - plain.rest)
    assert 1.2 * plain.flops < less.flops < 1.4 * plain.flops


def test_nothing_is_left_behind_by_a_computation():
    before = F.scaled_dot_product_attention, F.dropout, F.layer_norm, adam._get_value
    train_speed.compute("caption", MINI, 2)
    assert before == (F.scaled_dot_product_attention, F.dropout, F.layer_norm, adam._get_value)
    assert type(torch.zeros(1)) is Tensor


# What is printed


def test_the_table_has_a_line_for_each_stage(capsys, monkeypatch):
    shrink(monkeypatch)
    train_speed.main(["--preset", "tiny", "--device", "cpu", "--steps", "1", "--stage", "align", "tryon"])
    machine, head, *lines, fits = capsys.readouterr().out.splitlines()
    assert "torch" in machine and head.split()[:3] == ["stage", "batch", "learn"]
    assert [line.split()[:2] for line in lines] == [["align", "4"], ["tryon", "4"]]
    for line in lines:
        *_, cpu, seconds, rate, how = line.split()
        assert (
            how == "measured" and float(cpu) > 0 and float(rate) == pytest.approx(4 / float(seconds), rel=0.1)
        )
    assert fits == "A card of 80 GB has 74.5 GiB: enough for every line."


def test_a_dtype_is_that_of_the_scripts(capsys, monkeypatch):
    shrink(monkeypatch)
    seen, autocast = [], training.autocast
    monkeypatch.setattr(training, "autocast", lambda *a: (seen.append(a[1]), autocast(*a))[1])
    flags = ["--preset", "tiny", "--device", "cpu", "--steps", "1", "--stage", "tryon", "--dtype", "bf16"]
    train_speed.main(flags)
    assert set(seen) == {"bf16"} and "bfloat16" in capsys.readouterr().out.splitlines()[0]


def test_json_has_bytes(capsys, monkeypatch):
    shrink(monkeypatch)
    train_speed.main(
        [
            "--preset",
            "tiny",
            "--device",
            "cpu",
            "--steps",
            "1",
            "--stage",
            "caption2",
            "--json",
            "--batch-size",
            "3",
        ]
    )
    row = json.loads(capsys.readouterr().out)
    assert row["stage"] == "caption2" and row["batch"] == 3 and row["measured"] and row["flops"] is None
    assert row["peak"] == max(row["peaks"].values()) > row["rest"] > 4 * (row["learns"] + row["frozen"])


def test_what_does_not_fit_is_named():
    peaks = dict.fromkeys(train_speed.MOMENTS, 50 * 2**30)
    small = train_speed.Row("align", 128, False, 10**6, 10**9, 40 * 2**30, peaks, flops=10**15)
    big = replace(small, stage="cir", peaks={**peaks, "losses": 75 * 2**30})
    none = train_speed.Row("tryon", 32, True, failed="out of memory: more than the 78 GiB of this device")
    _, *lines, fits = train_speed.report([small, big, none]).splitlines()
    assert lines[0].split() == [
        "align",
        "128",
        "1.0",
        "1000.0",
        "40.0",
        *["50.0"] * 5,
        "1000",
        "not",
        "measured",
        "computed",
    ]
    assert lines[1].split()[5:10] == ["50.0", "75.0", "50.0", "50.0", "75.0"]
    assert lines[2].endswith("out of memory: more than the 78 GiB of this device")
    assert fits.endswith("too small for cir, tryon.")


def test_a_device_that_is_too_small_is_a_line_of_the_table(monkeypatch):
    def full(*_, **__):
        raise torch.cuda.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(train_speed, "prepare", full)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (0, 78 * 2**30))
    row = train_speed.measure("cir", TINY, 2, CPU, False, 1)
    assert row.failed == "out of memory: more than the 78 GiB of this device"


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        (["--steps", "0"], "--steps is 0"),
        (["--batch-size", "0"], "--batch-size is 0"),
        (["--batch-size", "1"], "align compares the samples of a batch, 2 at least"),
        (["--stage", "caption", "cir", "--batch-size", "1"], "cir compares"),
        (["--stage", "walk"], "walk"),
        (["--preset", "huge"], "huge"),
        (["--device", "abacus"], "unknown device"),
        (["--device", "cpu", "--dtype", "fp32"], "--dtype is fp32: what is computed"),
    ],
)
def test_bad_arguments_are_one_line(flags, told):
    with pytest.raises(UserError, match=told) as error:
        train_speed.main(flags)
    assert "\n" not in str(error.value)


# FULL


@pytest.mark.full  # minutes
def test_every_stage_of_the_full_size_fits_a_card_of_80_gb():
    rows = {x: train_speed.compute(x, FULL, train_speed.default_batch(x, "full")) for x in STAGES}
    assert all(row.peak < 0.9 * train_speed.CARD for row in rows.values()), train_speed.report(
        list(rows.values())
    )
    # LLM in bfloat16; ViT, VAE, LoRA; what draws with moments and average, the Q-Former with moments
    both = 2 * 6.74e9 + 4 * (986e6 + 84e6 + 324e6) + 16 * 1396e6 + 12 * 186e6
    assert rows["cir"].rest == rows["tryon"].rest == pytest.approx(both, rel=0.01)
    assert rows["caption"].learns == pytest.approx(323e6, rel=0.01)
    assert rows["align"].flops == pytest.approx(116e12, rel=0.02)


@pytest.mark.gpu
@pytest.mark.parametrize("stage", STAGES)
def test_on_a_gpu_computed_is_measured(stage):
    cfg = replace(TINY, qformer=replace(TINY.qformer, dropout=0.1))
    b = train_speed.default_batch(stage, "tiny")
    found = train_speed.measure(stage, cfg, b, torch.device("cuda"), True, 1)
    computed = train_speed.compute(stage, cfg, b)
    assert found.rest == computed.rest and found.seconds > 0
    assert found.peak == pytest.approx(computed.peak, rel=0.25)
