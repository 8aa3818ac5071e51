"""Both training scripts against what they promise: what learns, what is carried on, what is refused."""

import argparse
import json
import re
import shutil
from functools import partialmethod

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

import train_phase1
import train_phase2
from tests.cases import others_slow
from tests.small_runs import (
    DROPPING,
    MINI,
    RUNS,
    arguments,
    assert_same,
    learned,
    load_public,
    metrics,
    moments,
    run,
    state,
)
from unifashion import UserError, cpu, llama, lora, parallel, runs, seen, sheets, training
from unifashion.config import FULL, PRESETS
from unifashion.garment import GarmentEncoder
from unifashion.model import UniFashion, start_adapter
from unifashion.unet import UNet
from weights.tiny import pretrain

pytestmark = pytest.mark.usefixtures("one_thread")

WRITES, DRAWS = {"text_adapter", "lora"}, {"image_adapter", "style_adapter", "null_context", "unet"}

# What learns


@pytest.mark.parametrize("what", others_slow(RUNS, "1 align", "1 generate", "2 mixed"))
def test_the_table_at_the_top_says_what_learns(what, place, watched):
    phase, part = what.split()
    run(what, place, "run", 4, *([] if part == "mixed" else ["--lr", "0.01"]))
    table = train_phase1.TRAINABLE if phase == "1" else train_phase2.TRAINABLE
    patterns = {p for name in (table if part == "mixed" else [part]) for p in table[name]}
    model, before, graded = watched["model"], watched["before"], watched["graded"]
    learn = training.set_trainable(model, sorted(patterns))
    optimizer = moments(place / "run")
    after, end = learned(place / "run"), model.state_dict()
    for name, tensor in before.items():
        if name not in learn:
            assert name not in graded, f"{name} is frozen and has a gradient"
            assert f"{name}:exp_avg" not in optimizer, f"{name} is frozen and has an optimizer state"
            assert torch.equal(end[name], tensor), f"{name} is frozen and moved"
            assert name not in after or torch.equal(after[name], tensor), f"{name} is frozen and moved"
        elif not any(name.startswith(p) for p in never_read(what, model)):
            assert name in graded and f"{name}:exp_avg" in optimizer, f"{name} gets no gradient"
            assert name in after
    assert {runs.part_of(name) for name in before} - {runs.part_of(name) for name in after} <= {
        "vit", "vae", "llama", "garment"
    }  # fmt: skip
    assert watched["eyes"] > 0  # ViT and VAE did run, always without grad


def test_in_a_mixed_run_each_task_moves_its_own_parts_at_its_own_rate(place, watched):
    """The rate of what draws falls at the end, that of the Q-Former rises and falls, that of its temperature less high."""
    run("2 mixed", place, "run", 8)
    assert len(watched["moved"]) == 8
    for task, parts in watched["moved"]:
        assert parts == ({"qformer", *DRAWS, "garment"} if task == "tryon" else {"qformer"}), task
    assert {task for task, _ in watched["moved"]} == set(train_phase2.TASKS)
    share = [training.cosine(step, 8, 1) for step in range(8)]
    qformer, temperature, diffusion = zip(*watched["rates"], strict=True)
    assert qformer == pytest.approx([1e-3 * x for x in share]) and temperature == pytest.approx(
        [2e-5 * x for x in share]
    )
    assert diffusion == pytest.approx([1e-3] * 7 + [0.5e-3])


@pytest.mark.parametrize("what", ["2 retrieval", "2 cir", "2 caption"])
def test_without_tryon_steps_the_unet_stays_as_it_was_bit_for_bit(what, place):
    run(what, place, "run", 2, "--lr", "0.01")
    start, after = load_file(place / "phase1.safetensors"), learned(place / "run")
    assert_same(*({k: v for k, v in x.items() if runs.part_of(k) != "qformer"} for x in (start, after)))
    assert not torch.equal(after["qformer.query_tokens"], start["qformer.query_tokens"])


def test_a_frozen_unet_stays_as_it_was_and_the_rest_learns(place):
    run("2 mixed", place, "run", 4, "--freeze-diffusion")
    start, after = load_file(place / "phase1.safetensors"), learned(place / "run")
    moved = {runs.part_of(k) for k in start if not torch.equal(start[k], after[k])}
    assert moved == {"qformer", "image_adapter", "style_adapter", "null_context"}
    assert any(k.startswith("garment.") and v.any() for k, v in after.items())
    assert not any(k.startswith("unet.") for k in moments(place / "run"))


@pytest.mark.parametrize(
    ("without", "logged"),
    [
        ("itg,q2i,caption", {"ITC", "ITM"}),
        ("q2i,caption", {"ITC", "ITM", "ITG"}),
        ("q2i", {"ITC", "ITM", "ITG", "ITC caption"}),
        ("", {"ITC", "ITM", "ITG", "ITC caption", "q2I"}),
    ],
)
def test_parts_that_are_left_out_are_neither_learned_nor_loaded(without, logged, place, watched):
    run("2 cir", place, "run", 1, *(["--without", without] if without else []))
    known = {k.removeprefix("cir ") for k in metrics(place / "run")[0]} & {
        *logged,
        "ITG",
        "q2I",
        "ITC caption",
    }
    assert known == logged
    assert hasattr(watched["model"], "llama") == ("ITG" in logged)
    assert hasattr(watched["model"], "unet") == ("q2I" in logged)
    assert len(learned(place / "run")) == len(
        load_file(place / "phase1.safetensors")
    )  # what is not here is carried


def test_what_is_frozen_drops_nothing_out():
    model = UniFashion(DROPPING)
    seen = torch.randn(2, 4, MINI.vit.dim)
    training.train_mode(model, training.set_trainable(model, train_phase1.TRAINABLE["generate"]))
    assert torch.equal(model.qformer(seen)[0], model.qformer(seen)[0]) and model.unet.training
    training.train_mode(model, training.set_trainable(model, train_phase1.TRAINABLE["align"]))
    assert not torch.equal(model.qformer(seen)[0], model.qformer(seen)[0]) and not model.vit.training
    model = UniFashion(DROPPING, draws=False, writes=True)
    lora.inject(model.llama, DROPPING.lora)
    for name, p in model.llama.named_parameters():
        if name.endswith("lora_b"):
            torch.nn.init.normal_(p)
    words = torch.randn(1, 3, MINI.llama.dim)
    training.train_mode(model, training.set_trainable(model, train_phase1.TRAINABLE["caption"]))
    assert torch.equal(model.qformer(seen)[0], model.qformer(seen)[0])
    assert not torch.equal(model.llama(words), model.llama(words))
    training.train_mode(model, training.set_trainable(model, train_phase2.TRAINABLE["caption"]))
    assert not torch.equal(model.qformer(seen)[0], model.qformer(seen)[0])
    assert torch.equal(model.llama(words), model.llama(words))


def test_each_task_has_its_share_of_every_stretch_of_the_run():
    steps = {"retrieval": 10, "cir": 30, "caption": 5, "tryon": 55}
    mix = train_phase2.Mix(steps)
    turns = [mix.next() for _ in range(100)]
    assert {task: turns.count(task) for task in steps} == steps
    for n in range(1, 101):
        for task, share in steps.items():
            assert abs(turns[:n].count(task) - share * n / 100) < len(steps) / 2, (task, n)
    assert [train_phase2.Mix({"cir": 3}).next() for _ in range(3)] == ["cir"] * 3


def test_the_learning_rate_rises_then_falls_as_half_a_cosine():
    values = [training.cosine(step, 110, warmup=10) for step in (0, 4, 9, 10, 60, 85, 110)]
    assert values == pytest.approx([0.1, 0.5, 1.0, 1.0, 0.5, 0.5 * (1 - 0.5**0.5), 0.0])


def test_the_temperature_learns_at_the_official_rate_however_fast_the_rest(place, groups):
    run("1 align", place, "align", 1, "--lr", "0.01")
    assert [(len(g["params"]) == 1, g["peak"]) for g in groups] == [(False, 0.01), (True, 2e-5)]
    groups.clear()
    run("2 cir", place, "cir", 1, "--lr", "0.01")
    assert [(len(g["params"]), g["peak"]) for g in groups[1:]] == [(1, 2e-5), (0, 1e-3)]
    assert groups[0]["peak"] == 0.01


@pytest.mark.parametrize("what", ["1 align", "1 caption", "1 generate"])
def test_in_phase_1_the_rate_follows_a_cosine_but_of_what_draws(what, place, watched):
    run(what, place, "run", 4)
    share = [1.0 if what == "1 generate" else training.cosine(step, 4, 1) for step in range(4)]
    assert [rates[0] for rates in watched["rates"]] == pytest.approx([1e-3 * x for x in share])


def test_the_rate_of_what_draws_is_the_papers_and_stays_but_for_tinys_end():
    assert train_phase2.DECAY["full"] == 0
    assert [training.linear_decay(step, 4, 0.0) for step in range(4)] == [1.0] * 4
    assert [training.linear_decay(step, 8, 0.5) for step in range(8)] == [1.0] * 5 + [0.75, 0.5, 0.25]


def test_at_full_size_negatives_are_hard_from_the_first_step_and_in_tiny_from_half_the_run():
    assert training.CURRICULUM == {"full": 0.0, "tiny": 0.5}
    assert [training.hardness(step, 8, 0.0) for step in range(8)] == [1.0] * 8
    assert [training.hardness(step, 8, 0.5) for step in range(8)] == [
        0.0,
        0.25,
        0.5,
        0.75,
        1.0,
        1.0,
        1.0,
        1.0,
    ]


def test_accumulated_batches_count_by_their_mean(place, monkeypatch):
    given, apart = [], training.clipped_backward

    def noted(losses, parameters, share):
        given.append((share, any(p.grad is not None and p.grad.any() for p in parameters)))
        return apart(losses, parameters, share)

    monkeypatch.setattr(training, "clipped_backward", noted)
    run("1 align", place, "run", 2, "--accumulate", "2")
    assert given == [(0.5, False), (0.5, True)] * 2  # a second batch's gradient is added to the first's


@pytest.mark.parametrize("data", ["vitonhd=toy/vitonhd", "mgd=toy/dresscode", "mgd=toy/vitonhd"])
def test_persons_of_each_data_set_are_learned_from(data, place, monkeypatch):
    monkeypatch.chdir(place)
    module = train_phase2
    words = [data if word.startswith("toy=") else word for word in arguments("2 tryon", place, "run")]
    module.main([*words, "--batch-size", "2"])
    assert state(place / "run")["step"] == 1 and metrics(place / "run")[0]["tryon q2I"] > 0


def test_progress_is_told_with_losses_speed_and_the_time_that_is_left(place, capsys):
    run("1 align", place, "run", 2)
    told = capsys.readouterr().err
    assert re.search(r"2/2 \[[0-9:]+<00:00, .*(it/s|s/it), ITC=[0-9.]+, ITM=[0-9.]+\]", told), told


def test_the_defaults_of_the_full_size_are_the_papers_or_the_official_codes():
    """Appendix B: batches and rates; notes/upstream.md 2.2: epochs, weight decay, betas, eps, warm-up (1.5 epochs)."""
    one, two = train_phase1.DEFAULTS["full"], train_phase2.DEFAULTS["full"]
    assert one["align"] == {"batch_size": 128, "lr": 2e-5, "epochs": 10, "steps": None}
    assert one["caption"] == two["caption"] == {"batch_size": 32, "lr": 2e-5, "epochs": 2, "steps": None}
    assert one["generate"] == two["tryon"] == {"batch_size": 32, "lr": 1e-4, "epochs": None, "steps": 360_000}
    assert two["cir"] == {"batch_size": 128, "lr": 2e-5, "epochs": 15, "steps": None}
    assert (
        train_phase1.ADAMW["align"]
        == training.ADAMW["qformer"]
        == {"weight_decay": 0.05, "betas": (0.9, 0.98), "eps": 1e-7}
    )
    assert train_phase1.ADAMW["caption"] == {"weight_decay": 0.0, "betas": (0.9, 0.99)}
    assert train_phase1.ADAMW["generate"] == training.ADAMW["diffusion"]
    assert training.ADAMW["diffusion"] == {"weight_decay": 0.01, "betas": (0.9, 0.999)}
    assert train_phase1.WARMUP["full"] == {"align": 1.5 / 10, "caption": 0.03, "generate": None}
    assert train_phase2.WARMUP["full"] == 1.5 / 15


def test_the_text_adapter_learns_at_a_tenth_of_the_rate_of_lora(place, groups):
    run("1 caption", place, "rates", 1, "--lr", "0.01")
    shapes = [{tuple(p.shape) for p in g["params"]} for g in groups]
    wide, dim = MINI.llama.dim, MINI.qformer.dim
    assert shapes[1:] == [{(wide, dim)}, {(wide,)}] and len(groups[0]["params"]) == 2 * 7 * MINI.llama.depth
    assert [g["peak"] for g in groups] == [0.01, 0.001, 0.001]


@pytest.mark.parametrize(
    ("device", "dtype", "wide"), [("cpu", "bf16", True), ("cpu", "fp32", False), ("cuda", "bf16", False)]
)
def test_only_in_bfloat16_on_a_cpu_does_attention_learn_in_float32(device, dtype, wide):
    q, k, v = (torch.randn(2, 3, 5, 4, generator=training.seeded("attention", i)) for i in range(3))
    mask = (torch.arange(5) < 4).expand(5, 5)
    fused = F.scaled_dot_product_attention
    exact = fused(q, k, v, mask)
    cpu.float32_where_faster(torch.device(device), training.compute_dtype(torch.device(device), dtype))
    with torch.autocast("cpu", torch.bfloat16):
        seen, bias = [], torch.where(mask, 0.0, -torch.inf)
        for attn_mask in (mask, bias.bfloat16()):
            seen.append(F.scaled_dot_product_attention(q, k, v, attn_mask))
        with torch.no_grad():
            frozen = F.scaled_dot_product_attention(q, k, v, mask)
    assert frozen.dtype == torch.bfloat16  # what does not learn is as it was
    for y in seen:
        assert (y - exact).abs().max() < 1e-6 if wide else y.dtype == torch.bfloat16
    q, k, v = (x.double() for x in (q, k, v))  # of what is wider already nothing is lost
    assert torch.equal(F.scaled_dot_product_attention(q, k, v, mask), fused(q, k, v, mask))


@pytest.mark.slow
@pytest.mark.parametrize("what", ["2 tryon"])
def test_compiled_a_run_learns_the_same_and_goes_on_without(what, place, monkeypatch):
    """Without inductor's code for CPUs, which is refused: what is traced, and its gradients, are the same for every backend."""
    compiles, seen = torch.nn.Module.compile, []
    monkeypatch.setattr(training, "check_compile", lambda device: seen.append(device))
    monkeypatch.setattr(torch.nn.Module, "compile", partialmethod(compiles, backend="aot_eager"))
    for name, flags in (("plain", []), ("compiled", ["--compile"])):
        run(what, place, name, 2, "--eval-every", "1", *flags)
    for one, other in zip(*(metrics(place / name) for name in ("plain", "compiled")), strict=True):
        assert one.keys() == other.keys()
        told = [k for k in one if k.split()[-1] in ("q2I", "val")]
        assert all(one[k] == pytest.approx(other[k], abs=1e-3) for k in told), (one, other)
    assert seen and learned(place / "plain").keys() == learned(place / "compiled").keys()
    run(what, place, "compiled", 3, "--resume", "--steps", "3")
    assert state(place / "compiled")["step"] == 3


@pytest.mark.parametrize("what", ["1 generate", "2 tryon"])
def test_what_draws_is_compiled_and_evaluations_run_as_it_is_written(what, place, monkeypatch):
    eagerly, asked, compiled = training.eagerly, [], []
    monkeypatch.setattr(training, "eagerly", lambda flag: (asked.append(flag), eagerly(False))[1])
    monkeypatch.setattr(training, "check_compile", lambda device: None)
    monkeypatch.setattr(training, "compile_parts", lambda *parts: compiled.extend(map(type, parts)))
    run(what, place, "plain", 1)
    assert not compiled and not any(asked)
    run(what, place, "compiled", 1, "--compile")
    assert compiled == ([UNet] if what == "1 generate" else [UNet, GarmentEncoder]) and asked[-1] is True
    with eagerly(True):  # what is compiled is not even looked at
        broken = torch.compile(lambda x: x + 1, backend=lambda *_: pytest.fail("compiled"))
        assert broken(torch.ones(1)) == 2


def test_what_starts_random_is_that_of_the_first_process(monkeypatch):
    monkeypatch.setattr(parallel, "world", lambda: 2)
    monkeypatch.setattr(parallel.dist, "broadcast", lambda x, source: x.fill_(5.0 + source))
    layer = torch.nn.Conv2d(2, 3, 3).to(memory_format=torch.channels_last)
    parallel.broadcast_(layer.parameters())
    assert all((p == 5).all() for p in layer.parameters())


@pytest.mark.parametrize("what", ["1 generate", "2 tryon"])
def test_a_fresh_run_starts_from_the_first_process_and_a_resumed_one_from_its_checkpoint(
    what, place, monkeypatch
):
    sent = []
    monkeypatch.setattr(parallel, "broadcast_", lambda tensors: sent.append(len(list(tensors))))
    run(what, place, "run", 1)
    run(what, place, "run", 1, "--resume", "--steps", "2")
    assert sent[0] > 100 and sent[1] == 0


def test_nothing_is_compiled_on_a_cpu():
    with pytest.raises(
        UserError, match="^--compile is for CUDA: on a CPU it is slower in fp32 and computes wrong "
    ):
        training.check_compile(torch.device("cpu"))
    training.check_compile(torch.device("cuda"))


@pytest.mark.parametrize(
    ("flags", "samples", "steps"),
    [
        ({"epochs": 3}, 100, 30),
        ({"epochs": 3, "accumulate": 2}, 100, 15),
        ({"epochs": 1}, 109, 10),
        ({"steps": 7}, 100, 7),
        ({}, 100, 100),
    ],
)
def test_epochs_are_so_many_steps(flags, samples, steps):
    args = argparse.Namespace(**{"steps": None, "epochs": None, "accumulate": 1, **flags})
    hparams = {"batch_size": 10, "epochs": 10, "steps": None}
    assert training.planned_steps(args, hparams, samples, {}) == steps
    before = {"steps": 5}
    assert training.planned_steps(args, hparams, samples, before) == (
        steps if flags.keys() & {"steps", "epochs"} else 5
    )


@pytest.mark.parametrize("phase", ["phase 1", "phase 2"])
def test_layers_that_are_computed_again_learn_the_same(phase, place, monkeypatch):
    """As FULL does, with dropout: its preset is DROPPING here, and its files are tiny's."""
    module, what = {"phase 1": (train_phase1, "1 caption"), "phase 2": (train_phase2, "2 cir")}[phase]
    monkeypatch.setitem(PRESETS, "tiny", DROPPING)
    monkeypatch.setitem(PRESETS, "full", DROPPING)
    monkeypatch.setitem(module.DEFAULTS, "full", module.DEFAULTS["tiny"])
    monkeypatch.setitem(training.CURRICULUM, "full", training.CURRICULUM["tiny"])
    for name in ("load_public", "llm_tokenizer", "tokenizer"):
        real = getattr(module, name)
        monkeypatch.setattr(module, name, lambda _, *a, real=real, **kw: real("tiny", *a, **kw))
    again, recomputed = [], llama.checkpoint
    monkeypatch.setattr(llama, "checkpoint", lambda *a, **kw: (again.append(1), recomputed(*a, **kw))[1])
    run(what, place, "whole", 2)
    assert not again
    run(what, place, "parts", 2, "--preset", "full", "--steps", "2")
    assert len(again) == 2 * MINI.llama.depth  # not where there is no gradient
    assert_same(learned(place / "whole"), learned(place / "parts"))


def test_the_full_size_learns_to_write_on_a_gpu_of_80_gb():
    """Stage caption at FULL on the meta device: no GPU runs this test, it adds up what one would hold at the worst moment."""
    b, cfg, bf16, fp32 = train_phase1.DEFAULTS["full"]["caption"]["batch_size"], FULL, 2, 4
    with torch.device("meta"):
        model = UniFashion(cfg, draws=False, writes=True)
        lora.inject(model.llama, cfg.lora)
    learn = training.set_trainable(model, train_phase1.TRAINABLE["caption"])
    numbers = {"learns": sum(p.numel() for p in learn.values())}
    for part in ("vit", "qformer", "llama"):
        numbers[part] = sum(p.numel() for p in getattr(model, part).parameters() if not p.requires_grad)
    assert b == 32 and 6.7e9 < numbers["llama"] < 6.8e9 and 3.1e8 < numbers["learns"] < 3.3e8

    # 64: more tokens than the longest template has around picture and answer, which is 40 in Llama's pieces
    t = 64 + cfg.qformer.queries + cfg.max_caption
    saved: dict[int, torch.Tensor] = {}

    def keep(x: torch.Tensor) -> torch.Tensor:
        if not isinstance(x, torch.nn.Parameter):
            saved[id(x)] = x
        return x

    layer = model.llama.layers[0].bfloat16().train()  # as autocast computes, LoRA's dropout and all
    with torch.device("meta"):
        x = torch.empty(b, t, cfg.llama.dim, dtype=torch.bfloat16, requires_grad=True)
        angles = torch.empty(1, 1, t, cfg.llama.dim // cfg.llama.heads)
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
            layer(x, (angles, angles), None)
    needs = {
        "LLM, frozen": bf16 * numbers["llama"],
        "ViT and Q-Former, frozen": fp32 * (numbers["vit"] + numbers["qformer"]),
        # itself, and autocast's copy; its gradient and the clipped one; AdamW's moments and temporaries
        "what learns": numbers["learns"] * (fp32 + bf16 + 2 * fp32 + 2 * fp32 + 2 * fp32),
        "inputs of the layers": cfg.llama.depth * x.nbytes,
        # what one layer keeps while it is computed again, and as much for its gradients
        "one layer": 2 * sum(x.nbytes for x in saved.values()),
        # in bfloat16, in float32, their log-softmax, and the gradients of these
        "logits": b * t * cfg.llama.vocab_size * 2 * (bf16 + fp32 + fp32),
    }
    total = sum(needs.values())
    told = ", ".join(f"{what} {size / 1e9:.1f}" for what, size in needs.items())
    assert 2e10 < total < 8e10, f"{total / 1e9:.1f} GB: {told}"
    assert sum(x.nbytes for x in saved.values()) > 10 * x.nbytes, f"{len(saved)} tensors are not one layer's"


# What is begun with, and carried on


def test_what_was_learned_before_is_carried_over(place):
    run("1 align", place, "first", 1, "--lr", "0.01")
    run("1 generate", place, "second", 1, "--init", str(place / "first"))
    first, second = learned(place / "first"), learned(place / "second")
    assert_same(first, {name: second[name] for name in first})
    assert any(name.startswith("unet.") for name in second)


def test_to_learn_to_write_leaves_all_the_rest_as_it_was_bit_for_bit(place):
    given = load_file(place / "phase1.safetensors")
    given = {k: v for k, v in given.items() if runs.part_of(k) not in WRITES}
    save_file(given, place / "draws.safetensors")
    run("1 caption", place, "run", 2, "--lr", "0.01", "--init", str(place / "draws.safetensors"))
    after = learned(place / "run")
    assert_same(given, {name: after[name] for name in given})
    assert {runs.part_of(name) for name in after.keys() - given.keys()} == WRITES
    assert not (place / "run/samples/000002.png").exists()
    written = (place / "run/samples/000002.txt").read_text().splitlines()
    assert len(written) >= 5 and all(line.startswith("-> ") for line in written[1::3])  # two, a blank between


@pytest.mark.parametrize("what", ["1 align", "1 generate", "2 retrieval"])
def test_what_was_learned_to_write_is_carried_through_what_cannot_write(what, place):
    run("1 caption", place, "writes", 1, "--lr", "0.01", "--init", str(place / "phase1.safetensors"))
    first = learned(place / "writes")
    run(what, place, "draws", 1, "--init", str(place / "writes"))
    shutil.rmtree(place / "writes")
    run(what, place, "draws", 1, "--resume", "--steps", "2")
    for folder in ("last", "best"):
        later = learned(place / "draws", folder)
        assert_same(*({k: v for k, v in x.items() if runs.part_of(k) in WRITES} for x in (first, later)))
        assert later.keys() == first.keys()
    # and from there to learn on: nothing starts anew
    run("1 caption", place, "again", 1, "--lr", "1e-9", "--init", str(place / "draws"))
    again = learned(place / "again")
    assert all(torch.allclose(again[k], first[k], atol=1e-6) for k in first if runs.part_of(k) in WRITES)


def test_phase_2_learns_to_draw_from_what_phase_1_learned_and_the_garment_begins_as_the_unet(place, watched):
    run("2 tryon", place, "first", 4, "--lr", "0.01")
    first, before = learned(place / "first"), watched["before"]
    start = load_file(place / "phase1.safetensors")
    assert_same({k: before[k] for k in start if k in before}, {k: start[k] for k in start if k in before})
    for name in ("encoder.blocks.1.res.conv1.weight", "time_embed.fc1.weight"):
        if f"unet.{name}" in before:
            assert torch.equal(before[f"garment.{name}"], before[f"unet.{name}"])
    run("2 tryon", place, "second", 1, "--lr", "1e-9", "--init", str(place / "first"))  # not started again
    second, name = learned(place / "second"), "encoder.blocks.1.res.conv1.weight"
    torch.testing.assert_close(second[f"garment.{name}"], first[f"garment.{name}"], atol=1e-6, rtol=0)
    assert (second[f"garment.{name}"] - second[f"unet.{name}"]).abs().max() > 1e-3


@pytest.mark.parametrize(
    ("what", "lacks", "told"),
    [
        ("2 retrieval", "qformer", "a trained qformer: --init wants a run of train_phase1.py, stage align"),
        ("2 cir", "text_adapter", "a trained text_adapter: --init wants a run of train_phase1.py, stage caption"),
        ("2 caption", "text_adapter", "a trained text_adapter: --init wants a run of train_phase1.py, stage cap"),
        ("2 cir", "image_adapter", "a trained image_adapter: --init wants a run of train_phase1.py, stage gen"),
        ("2 tryon", "image_adapter", "a trained image_adapter: --init wants a run of train_phase1.py, stage gen"),
        ("1 caption", "qformer", "--init wants a run of stage align or later"),
        ("1 generate", "qformer", "--init wants a run of stage align or later"),
    ],
)  # fmt: skip
def test_what_was_not_learned_yet_is_asked_for(what, lacks, told, place):
    given = load_file(place / "phase1.safetensors")
    save_file({k: v for k, v in given.items() if runs.part_of(k) != lacks}, place / "lacks.safetensors")
    with pytest.raises(UserError, match=told):
        run(what, place, "run", 1, "--init", str(place / "lacks.safetensors"))
    assert not (place / "run").exists()
    if what == "2 cir":  # unless it is left out
        run(what, place, "run", 1, "--init", str(place / "lacks.safetensors"), "--without", "itg,q2i")


@pytest.mark.parametrize(
    ("harm", "told"),
    [
        (
            lambda t: t.update({"unet.bogus": torch.ones(2)}),
            "unet.bogus is not a tensor of this preset's model",
        ),
        (lambda t: t["unet.conv_out.weight"].fill_(float("nan")), "unet.conv_out.weight is not finite"),
        (lambda t: t.pop("unet.conv_out.weight"), "unet.conv_out.weight is missing"),
        (lambda t: t.update({"unet.conv_out.bias": torch.ones(7)}), "unet.conv_out.bias has shape"),
    ],
    ids=["unknown", "not finite", "missing", "another shape"],
)
def test_what_is_only_carried_is_looked_at_all_the_same(harm, told, place):
    tensors = load_file(place / "phase1.safetensors")
    harm(tensors)
    save_file(tensors, place / "harmed.safetensors")
    with pytest.raises(UserError, match=told):
        run("1 caption", place, "writes", 1, "--init", str(place / "harmed.safetensors"))
    assert not (place / "writes").exists()


def test_what_a_later_stage_lacks_is_told_before_the_first_has_trained(place):
    shutil.copytree(place / "weights", place / "own")
    (place / "own/llama.safetensors").unlink()
    everything = [a if a != "align" else "all" for a in arguments("1 align", place, "all")]
    with pytest.raises(UserError, match="llama.safetensors is missing"):
        train_phase1.main([*everything, "--weights", str(place / "own")])
    assert not (place / "all").exists()


def test_before_its_first_step_a_run_predicts_as_the_llm_without_lora(place):
    model = load_public(place, draws=False, writes=True)
    base = llama.Llama(MINI.llama)
    base.load_state_dict(load_file(place / "weights/llama.safetensors"))
    ids, z = torch.arange(5, 25)[None], torch.randn(1, MINI.qformer.queries, MINI.qformer.dim)
    training.train_mode(model, training.set_trainable(model, train_phase1.TRAINABLE["caption"]))
    ours = model.predict_words(z, ids[0, :3], ids)
    model.llama = base
    assert torch.equal(model.predict_words(z, ids[0, :3], ids), ours)


@pytest.mark.parametrize(("dim", "wide"), [(24, 24), (24, 128), (24, 12)])
def test_soft_prompts_start_as_large_as_words(dim, wide):
    torch.manual_seed(0)
    z = torch.randn(200, 4, dim) @ torch.diag(torch.linspace(1.0, 4.0, dim)) + 3
    adapter = torch.nn.Linear(dim, wide)
    start_adapter(adapter, z, 0.02)
    soft = adapter(z).detach().flatten(0, 1)
    assert soft.std().item() == pytest.approx(0.02, rel=0.05)
    torch.testing.assert_close(soft.mean(0), torch.zeros(wide), atol=1e-5, rtol=0)


@pytest.mark.parametrize("what", ["1 caption", "1 generate"])
def test_an_adapter_starts_from_what_the_frozen_qformer_says_without_dropout(what, place, monkeypatch):
    started, real = [], train_phase1.start_adapter
    monkeypatch.setattr(
        train_phase1, "start_adapter", lambda *a, **kw: (started.append(a[1]), real(*a, **kw))[1]
    )
    for name, cfg in (("dropping", DROPPING), ("plain", MINI)):
        monkeypatch.setitem(PRESETS, "tiny", cfg)
        run(what, place, name, 1)
    assert torch.equal(*started)


@pytest.mark.parametrize("what", ["1 caption", "1 generate"])
def test_an_adapter_that_nothing_has_trained_starts_from_its_data_and_a_trained_one_stays(
    what, place, monkeypatch
):
    started, real = [], train_phase1.start_adapter
    monkeypatch.setattr(
        train_phase1, "start_adapter", lambda *a, **kw: (started.append((*a, kw)), real(*a, **kw))[1]
    )
    run(what, place, "new", 1, "--lr", "1e-9")
    [(adapter, z, *rest)] = started
    assert z.shape == (8 * 4, MINI.qformer.queries, MINI.qformer.dim)
    if what == "1 caption":
        words = load_file(place / "weights/llama.safetensors")["embed.weight"]
        assert rest == [pytest.approx(words.std().item(), rel=1e-3), {"floor": 1e-4}]
    run(what, place, "second", 1, "--lr", "1e-9", "--seed", "1", "--init", str(place / "new"))
    assert len(started) == 1
    new, second = learned(place / "new"), learned(place / "second")
    name = "text_adapter" if what == "1 caption" else "image_adapter"
    for k in (f"{name}.weight", f"{name}.bias"):
        torch.testing.assert_close(second[k], new[k], atol=1e-6, rtol=0)


def test_only_a_run_with_the_shipped_frozen_files_is_shipped_with_the_curves_of_its_own_past(
    place, monkeypatch, capsys
):
    monkeypatch.setattr(pretrain, "HERE", place / "weights")
    drawn = []
    monkeypatch.setattr(sheets, "draw_curves", lambda chain, path: drawn.append([run.name for run in chain]))
    run("1 generate", place, "a", 1, "--init", str(place / "phase1.safetensors"))
    run("2 tryon", place, "b", 1, "--init", str(place / "a"))
    weights = place / "own"
    shutil.copytree(place / "weights", weights)
    monkeypatch.setattr(pretrain, "HERE", weights)
    drawn.clear()
    pretrain.main(["ship", "--init", str(place / "b")])
    assert drawn == [["a", "b"]]
    assert f"losses.png is without the curves of {place}/phase1.safetensors" in capsys.readouterr().err
    whole, record = seen.apart(load_file(weights / "model.safetensors"), weights)
    assert record  # tests/test_seen.py holds it to what it should be
    assert {"qformer", "garment", *WRITES, *DRAWS} == {runs.part_of(name) for name in whole}
    assert_same(whole, {name: x.half() for name, x in learned(place / "b", "best").items()})
    shipped = (weights / "model.safetensors").read_bytes()
    with pytest.raises(UserError, match="holds no garment: its training is not finished"):
        pretrain.main(["ship", "--init", str(place / "a")])
    run("1 generate", place, "mute", 1)
    with pytest.raises(UserError, match="holds no (garment|text_adapter): its training is not finished"):
        pretrain.main(["ship", "--init", str(place / "mute")])
    assert (weights / "model.safetensors").read_bytes() == shipped
    told = (place / "b/last/state.json").read_text()
    (place / "b/last/state.json").write_text(told.replace('"step": 1', '"step": 0'))
    with pytest.raises(UserError, match="was stopped at step 0 of 1: --resume goes on"):
        pretrain.main(["ship", "--init", str(place / "b")])
    (place / "b/last/state.json").write_text(told)
    (place / "a").rename(place / "gone")
    pretrain.main(["ship", "--init", str(place / "b")])
    assert drawn[-1] == ["b"]
    (weights / "bert_vocab.txt").write_text("[PAD]\n")
    with pytest.raises(UserError, match="was trained with another bert_vocab.txt"):
        pretrain.main(["ship", "--init", str(place / "b")])


# What chooses the best


def test_the_best_is_the_one_with_the_lowest_loss_on_what_was_held_out(place, monkeypatch):
    values, calls, saved = [3.0, 1.0, 1.5, 2.0], [], []
    encode, loss_of = train_phase1.STAGES["align"]
    save = runs.save_checkpoint

    def losses_of(model, batch, rng, hardness):
        if model.qformer.training:
            return loss_of(model, batch, rng, hardness)
        calls.append(1)  # an evaluation: so many batches
        return {"ITC": torch.tensor(values[state_of_run()])}

    def noted(folder, *rest):
        saved.append((folder.name, rest[-1]["step"]))
        save(folder, *rest)

    def state_of_run() -> int:
        return len({step for _, step in saved})

    monkeypatch.setitem(train_phase1.STAGES, "align", (encode, losses_of))
    monkeypatch.setattr(runs, "save_checkpoint", noted)
    run("1 align", place, "best", 4, "--eval-every", "1")
    assert saved == [("best", 1), ("last", 1), ("best", 2), ("last", 2), ("last", 3), ("last", 4)]
    assert state(place / "best")["best"] == 1.0
    assert (place / "best/losses.png").exists()


def test_each_task_counts_by_its_own_scale_when_the_best_of_all_is_chosen(place):
    run("2 mixed", place, "run", 4)
    rows = {k: v for row in metrics(place / "run") for k, v in row.items() if k.startswith("val")}
    assert rows.keys() == {"val", *(f"val {task}" for task in train_phase2.TASKS)}
    product = torch.tensor([rows[f"val {task}"] for task in train_phase2.TASKS], dtype=torch.float64).prod()
    assert rows["val"] == pytest.approx(product.item() ** 0.25, rel=1e-9)


@pytest.mark.parametrize("what", RUNS[:-1])
def test_no_sample_that_is_learned_from_is_among_those_that_choose_the_best(what, place, monkeypatch):
    phase, part = what.split()
    table = train_phase1.STAGES if phase == "1" else train_phase2.TASKS
    seen, learning = {True: set(), False: set()}, [True]
    *rest, encode, loss_of = table[part]

    def note(model, batch):
        picture = batch["person" if part == "tryon" else "pictures" if part == "cir" else "picture"]
        picture = picture[:, 1] if part == "cir" else picture  # targets are held out, references may be both
        seen[learning[0]] |= {tuple(x.flatten()[::97].tolist()) for x in picture}
        return encode(model, batch)

    monkeypatch.setitem(table, part, (*rest, note, loss_of))
    train_mode, averaged = training.train_mode, training.averaged
    monkeypatch.setattr(training, "averaged", lambda ema: (learning.__setitem__(0, False), averaged(ema))[1])
    monkeypatch.setattr(training, "train_mode", lambda *a: (learning.__setitem__(0, True), train_mode(*a))[1])
    run(what, place, "apart", 4)
    assert len(seen[True]) > 4 and seen[False] and not seen[True] & seen[False]


# What is refused


@pytest.mark.parametrize(
    ("script", "flags", "told"),
    [
        (1, ["--data", "imagenet"], "unknown data set 'imagenet': it is one of toy, "),
        (1, ["--data", "toy", "fashioniq"], "unknown data set 'fashioniq': it is one of toy, fashion200k"),
        (1, ["--data", "toy", "--steps", "0"], "--steps is 0"),
        (1, ["--data", "toy", "--steps", "5", "--epochs", "1"], "not both"),
        (1, ["--data", "toy", "--stage", "all", "--lr", "0.1"], "name one with --stage"),
        (1, ["--data", "toy", "--device", "abacus"], "unknown device"),
        (1, ["--data", "toy", "--workers", "-1"], "--workers is -1"),
        (1, ["--data", "toy", "--seed", "-1"], "--seed is -1"),
        (1, ["--data", "toy", "--accumulate", "0"], "must be at least 1"),
        (1, ["--data", "toy", "--stage", "all", "--resume"], "nothing to resume"),
        (1, ["--data", "fashion200k=nowhere", "--stage", "align"], "lacks labels"),
        (1, ["--data", "toy", "--stage", "align", "--init", "nowhere"], "neither a run folder"),
        (1, ["--data", "toy", "--stage", "generate", "--steps", "1"], "--init wants a run of stage align"),
        (1, ["--data", "toy", "--stage", "caption", "--steps", "1"], "--init wants a run of stage align"),
        (1, ["--data", "toy", "fashiongen", "--stage", "caption"], "--data names fashiongen twice"),
        (1, ["--data", "fashiongen", "--stage", "align"], "fashiongen_256_256_train.h5 is missing"),
        (1, ["--data", "fashioniq-cap=nowhere", "--stage", "caption"], "nowhere lacks next_llava.train"),
        (1, ["--data", "toy", "--stage", "align", "--batch-size", "1"], "--batch-size is 1"),
        (1, ["--data", "toy", "--stage", "align", "--batch-size", "10000"], "fewer than one batch of 10000"),
        (1, ["--data", "toy", "--stage", "align", "--lr", "nan"], "--lr is nan"),
        (1, ["--data", "toy", "--stage", "align", "--lr", "inf"], "--lr is inf"),
        (1, ["--data", "toy", "--step", "5"], "unrecognized arguments: --step 5"),
        (1, ["--data", "toy", "--device", "cpu", "--compile"], "--compile is for CUDA"),
        (2, ["--data", "toy", "--device", "cpu", "--compile"], "--compile is for CUDA"),
        (2, ["--data", "toy", "--lr", "0.1"], "name one with --task"),
        (2, ["--data", "toy", "--task", "cir", "tryon", "--steps", "4"], "name one with --task"),
        (2, ["--data", "fashion200k=TOY/fashion200k", "--task", "cir"], "--task cir wants data: one of toy, fashioniq"),
        (2, ["--data", "toy", "--without", "itm"], "--without itm: it is some of itg,q2i,caption"),
        (2, ["--data", "toy", "--task", "cir", "--batch-size", "1"], "--batch-size is 1: cir compares"),
        (2, ["--data", "toy", "--task", "retrieval", "--batch-size", "1"], "--batch-size is 1: retrieval compares"),
        (2, ["--data", "toy", "--task", "tryon"], "no file holds a trained qformer: --init wants a run"),
        (2, ["--data", "vitonhd=nowhere", "--task", "tryon"], "VITON-HD is incomplete"),
        (2, ["--data", "mgd=nowhere", "--task", "tryon"], "nowhere is missing: .*garment-designer.*dress-code"),
        (2, ["--data", "toy", "--resume"], "nothing to resume"),
    ],
)  # fmt: skip
def test_wrong_arguments_are_one_line(script, flags, told, place, monkeypatch):
    common = ["--preset", "tiny", "--weights", str(place / "weights"), "--out", str(place / "wrong")]
    flags = [f"toy={place / 'toy'}" if a == "toy" else a.replace("TOY", str(place / "toy")) for a in flags]
    with pytest.raises(UserError, match=told) as error:
        (train_phase1 if script == 1 else train_phase2).main([*flags, *common])
    assert "\n" not in str(error.value)
    assert not (place / "wrong").exists()


def test_tasks_without_data_are_named_and_the_others_learn(place, capsys, monkeypatch):
    data = [f"{name}={place / 'toy' / name}" for name in ("fashion200k", "fashioniq")]
    out, start = place / "run", place / "phase1.safetensors"
    given = ["--preset", "tiny", "--weights", str(place / "weights"), "--init", str(start), "--workers", "0"]
    train_phase2.main(["--data", *data, *given, "--out", str(out)])
    assert "without tryon: --data names nothing for it" in capsys.readouterr().err
    assert json.loads((out / "config.json").read_text())["task"] == ["retrieval", "cir", "caption"]


def test_targets_without_captions_are_left_out_or_captions_are_left_out(place):
    shutil.copytree(place / "toy/fashioniq", place / "iq")
    for file in (place / "iq").glob("next_llava.train*"):
        file.unlink()
    given = arguments("2 cir", place, "run", "--data", f"fashioniq={place / 'iq'}")
    with pytest.raises(
        UserError, match="no target of fashioniq has a caption: make them with infer.py caption"
    ):
        train_phase2.main(given)
    train_phase2.main([*given, "--without", "itg,caption"])
    assert metrics(place / "run")[0].keys() >= {"cir ITC", "cir ITM", "cir q2I"}


@pytest.mark.parametrize("workers", ["0", "1"])
def test_damaged_pictures_of_the_data_are_one_line_even_from_a_worker(workers, place, capsys):
    damaged = place / "damaged"
    shutil.copytree(place / "toy", damaged)
    for path in damaged.glob("vitonhd/train/cloth/*"):
        path.write_bytes(path.read_bytes()[:300])
    given = arguments("2 tryon", place, "run", "--data", f"toy={damaged}", "--workers", workers)
    with pytest.raises(SystemExit) as left:
        training.run(lambda: train_phase2.main(given))
    told = [line for line in capsys.readouterr().err.splitlines() if "missing or broken" in line]
    assert left.value.code == 2 and len(told) == 1
    assert f"{damaged}/vitonhd/train/cloth/" in told[0] and "cannot be read as an image" in told[0]
    assert "--allow-missing" in told[0]


def test_no_world_is_drawn_where_a_path_was_mistyped(place, tmp_path):
    with pytest.raises(UserError, match="typo holds no ToyFashion: python -m unifashion.data.toy --out"):
        training.toy_folder(place / "typo")
    assert not (place / "typo").exists()


def test_a_world_whose_settings_are_cut_short_is_told_before_any_work(tmp_path):
    (tmp_path / "toy.json").write_text('{"version": 1')
    with pytest.raises(UserError, match="toy.json: not whole JSON"):
        training.toy_folder(tmp_path)


# Helpers


def never_read(what: str, model: UniFashion) -> set[str]:
    """Of what learns, what no loss of these reads."""
    if what in ("1 align", "1 caption", "1 generate", "2 retrieval", "2 cir"):
        return set()
    unread = {"garment.encoder.middle"}  # nothing reads the coarsest features: they are not even computed
    if what != "2 caption":
        unread |= {f"garment.encoder.blocks.{i}." for i in range(len(model.garment.control_convs), 99)}
    if what == "2 mixed":
        return unread
    last = MINI.qformer.depth - 1  # in whose text nobody is interested: the queries have read it before
    unread |= {
        f"qformer.{k}" for k in ("vision_proj", "text_proj", "itm_head", "temp", f"layers.{last}.text_mlp")
    }
    if what == "2 caption":  # from the picture alone
        unread |= {f"qformer.{k}" for k in ("word_embeddings", "position_embeddings")}
        unread |= {f"qformer.layers.{i}.text_mlp" for i in range(MINI.qformer.depth)}
    return unread


@pytest.fixture
def watched(monkeypatch) -> dict:
    """Of a run, while it goes on: its model, what it was at first, what has had a gradient, and what moved at which step."""
    seen: dict = {"graded": set(), "moved": [], "rates": [], "eyes": 0}
    turns: list[str] = []
    started, stepped, turned = training.train_mode, torch.optim.AdamW.step, train_phase2.Mix.next

    def looks(module, given, made):
        assert not torch.is_grad_enabled()
        seen["eyes"] += 1

    def begin(model, parameters):
        if "model" not in seen:
            seen["model"] = model
            seen["before"] = {k: v.clone() for k, v in model.state_dict().items()}
            for part in (model.vit, getattr(model, "vae", model.vit)):
                for module in part.modules():
                    module.register_forward_hook(looks)
        return started(model, parameters)

    def step(optimizer, *a, **kw):
        model = seen["model"]
        seen["graded"] |= {name for name, p in model.named_parameters() if p.grad is not None}
        before = {k: v.clone() for k, v in model.state_dict().items()}
        out = stepped(optimizer, *a, **kw)
        moved = {runs.part_of(k) for k, v in model.state_dict().items() if not torch.equal(v, before[k])}
        seen["moved"].append((turns[-1] if turns else "", moved))
        seen["rates"].append([group["lr"] for group in optimizer.param_groups])
        return out

    def turn(mix):
        turns.append(turned(mix))
        return turns[-1]

    monkeypatch.setattr(training, "train_mode", begin)
    monkeypatch.setattr(torch.optim.AdamW, "step", step)
    monkeypatch.setattr(train_phase2.Mix, "next", turn)
    return seen


@pytest.fixture
def groups(monkeypatch) -> list[dict]:
    """The parameter groups of the optimisers that are made."""
    groups, born = [], torch.optim.AdamW.__init__

    def noted(optimizer, given, **kw):
        born(optimizer, given, **kw)
        groups.extend(optimizer.param_groups)

    monkeypatch.setattr(torch.optim.AdamW, "__init__", noted)
    return groups
