"""Both training scripts against what they promise: what learns, what resumes, what a killed run leaves behind."""

import argparse
import json
import os
import shutil
import signal
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

import train_phase1
import train_phase2
from tests.parity import randomise
from unifashion import UserError, diffusion, llama, lora, losses, runs, training
from unifashion.config import FULL, PRESETS, TINY
from unifashion.data import toy
from unifashion.model import UniFashion, start_adapter
from unifashion.tokenizers import INSTRUCTIONS, build_vocab, prompt
from weights.load import FOLDERS, llm_tokenizer
from weights.tiny import pretrain

STAGES = {"align": train_phase1, "caption": train_phase1, "generate": train_phase1, "tryon": train_phase2}


@pytest.mark.parametrize("stage", STAGES)
def test_two_steps_and_a_resumed_two_are_four_steps_bit_for_bit(stage, place):
    run(stage, place, "whole", "--steps", "4")
    # the schedule follows the number of steps, so the interrupted run asks for four as well and is stopped after two
    with stopped_after(2):
        run(stage, place, "parts", "--steps", "4")
    assert state(place / "parts")["step"] == 2
    run(stage, place, "parts", "--steps", "4", "--resume")
    for file in ("model.safetensors", "optimizer.safetensors"):
        whole, parts = load_file(place / "whole/last" / file), load_file(place / "parts/last" / file)
        assert whole.keys() == parts.keys()
        for name in whole:
            assert torch.equal(whole[name], parts[name]), name
    whole, parts = (place / d for d in ("whole", "parts"))
    assert (whole / "best/model.safetensors").read_bytes() == (parts / "best/model.safetensors").read_bytes()
    measured = [[row for row in read_metrics(d) if "val" in row] for d in (whole, parts)]
    assert len(measured[0]) == 1 and measured[0] == measured[1]  # to be stopped is no evaluation


@pytest.mark.parametrize("stage", ["align", "caption"])
@pytest.mark.parametrize(
    "more",
    [["--cache", "--dtype", "bf16"], ["--cache"], ["--accumulate", "2"], []],
    ids=["bf16", "cache", "accumulate", "plain"],
)
def test_a_run_with_dropout_resumes_bit_for_bit(more, stage, place, monkeypatch):
    monkeypatch.setitem(PRESETS, "tiny", DROPPING)
    run(stage, place, "whole", "--steps", "3", *more)
    with stopped_after(1):
        run(stage, place, "parts", "--steps", "3", *more)
    run(stage, place, "parts", "--steps", "3", *more, "--resume")
    whole, parts = (load_file(place / d / "last/model.safetensors") for d in ("whole", "parts"))
    assert all(torch.equal(whole[name], parts[name]) for name in whole)


def test_what_is_frozen_drops_nothing_out():
    model = UniFashion(DROPPING)
    training.train_mode(model, training.set_trainable(model, train_phase2.TRAINABLE["tryon"]))
    seen = torch.randn(2, 4, TINY.vit.dim)
    assert torch.equal(model.qformer(seen)[0], model.qformer(seen)[0]) and model.garment.training
    training.train_mode(model, training.set_trainable(model, train_phase1.TRAINABLE["align"]))
    assert not torch.equal(model.qformer(seen)[0], model.qformer(seen)[0]) and not model.vit.training
    model = UniFashion(DROPPING, draws=False, writes=True)
    lora.inject(model.llama, DROPPING.lora)
    for name, p in model.llama.named_parameters():
        if name.endswith("lora_b"):
            torch.nn.init.normal_(p)
    training.train_mode(model, training.set_trainable(model, train_phase1.TRAINABLE["caption"]))
    words = torch.randn(1, 3, TINY.llama.dim)
    assert torch.equal(model.qformer(seen)[0], model.qformer(seen)[0])
    assert not torch.equal(model.llama(words), model.llama(words))


def test_a_run_that_goes_on_keeps_what_it_was_given_and_refuses_other_flags(place):
    run("align", place, "first", "--steps", "1")
    run("generate", place, "second", "--steps", "1", "--init", str(place / "first"))
    run("generate", place, "second", "--steps", "2", "--resume")  # --init is not said again
    assert any(k.startswith("qformer.") for k in load_file(place / "second/last/model.safetensors"))
    config = (place / "second/config.json").read_text()
    for flags, told in (
        (["--lr", "0.5"], "lr"),
        (["--batch-size", "3"], "batch-size"),
        (["--seed", "1"], "seed"),
    ):
        with pytest.raises(UserError, match=f"was started with {told}"):
            run("generate", place, "second", "--steps", "3", "--resume", *flags)
    with pytest.raises(UserError, match="was started with"):
        run("align", place, "second", "--steps", "3", "--resume")
    with pytest.raises(UserError, match="was started with stage generate, not tryon"):
        run("tryon", place, "second", "--steps", "2", "--resume")
    with pytest.raises(UserError, match="has done 2 steps already, more than the 1 of --steps"):
        run("generate", place, "second", "--steps", "1", "--resume")
    assert (place / "second/config.json").read_text() == config
    with pytest.raises(UserError, match="nothing to resume"):
        run("align", place, "mistyped", "--steps", "1", "--resume")
    assert not (place / "mistyped").exists()


@pytest.mark.parametrize("stage", ["align", "caption"])
def test_a_run_killed_before_its_first_checkpoint_starts_again(stage, place):
    run(stage, place, "whole", "--steps", "1")
    shutil.copytree(place / "whole", place / "killed")
    for folder in ("last", "best"):
        shutil.rmtree(place / "killed" / folder)
    run(stage, place, "killed", "--steps", "1", "--resume")
    a, b = (load_file(place / d / "last/model.safetensors") for d in ("whole", "killed"))
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_stopped_in_one_stage_the_next_does_not_begin_and_goes_on_when_asked(place, monkeypatch):
    stages = {k: {**v, "steps": 2, "epochs": None, "batch_size": 4} for k, v in train_phase1.DEFAULTS.items()}
    monkeypatch.setattr(train_phase1, "DEFAULTS", stages)
    data = ["--data", f"toy={place / 'toy'}", "--preset", "tiny", "--weights", str(place / "weights")]
    everything = [*data, "--out", str(place / "all"), "--workers", "0"]
    with stopped_after(1):
        train_phase1.main(everything)
    assert state(place / "all/align")["step"] == 1 and not (place / "all/caption").exists()
    train_phase1.main([*everything, "--resume"])
    assert [state(place / "all" / stage)["step"] for stage in train_phase1.STAGES] == [2, 2, 2]
    learned = load_file(place / "all/generate/last/model.safetensors")  # all of it, from each of the three
    parts = {runs.part_of(name) for name in learned}
    assert parts == {
        "qformer", "text_adapter", "lora", "image_adapter", "style_adapter", "null_context", "unet"
    }  # fmt: skip


def test_the_best_is_the_one_with_the_lowest_loss_on_what_was_held_out(place, monkeypatch):
    values, calls, saved = [3.0, 1.0, 1.5, 2.0], [], []
    encode, loss_of = train_phase1.STAGES["align"]
    save = runs.save_checkpoint

    def losses_of(model, batch, seed, step, progress):
        if progress < 1.0:
            return loss_of(model, batch, seed, step, progress)
        calls.append(step)  # an evaluation: four batches
        return {"itc": torch.tensor(values[(len(calls) - 1) // 4])}

    def noted(folder, *rest):
        saved.append((folder.name, rest[-1]["step"]))
        save(folder, *rest)

    monkeypatch.setitem(train_phase1.STAGES, "align", (encode, losses_of))
    monkeypatch.setattr(runs, "save_checkpoint", noted)
    run("align", place, "best", "--steps", "4", "--eval-every", "1")
    assert saved == [("best", 1), ("last", 1), ("best", 2), ("last", 2), ("last", 3), ("last", 4)]
    assert state(place / "best")["best"] == 1.0
    assert (place / "best/losses.png").exists()


def test_a_run_that_diverges_ends_in_one_line_and_leaves_what_was_sound(place, monkeypatch):
    encode, loss_of = train_phase1.STAGES["align"]

    def nan_later(model, batch, seed, step, progress):
        parts = loss_of(model, batch, seed, step, progress)
        return {name: loss * (float("nan") if step == 20 else 1.0) for name, loss in parts.items()}

    monkeypatch.setitem(train_phase1.STAGES, "align", (encode, nan_later))
    with pytest.raises(UserError, match="itc is nan at step 20: the run diverged"):
        run("align", place, "wild", "--steps", "30", "--eval-every", "15")
    assert state(place / "wild")["step"] == 15
    tensors = load_file(place / "wild/last/model.safetensors")
    assert all(t.isfinite().all() for t in tensors.values())
    tensors["qformer.query_tokens"][:] = float("nan")
    save_file(tensors, place / "nan.safetensors")
    with pytest.raises(UserError, match="qformer.query_tokens is not finite"):
        run("generate", place, "after", "--steps", "1", "--init", str(place / "nan.safetensors"))


@pytest.mark.parametrize("stage", STAGES)
def test_no_sample_that_is_learned_from_is_among_those_that_choose_the_best(stage, place, monkeypatch):
    module, seen = STAGES[stage], {True: set(), False: set()}
    tasks = module.TASKS if stage == "tryon" else module.STAGES
    encode, loss_of = tasks[stage]
    learning = []

    def note(model, batch):
        picture = batch["person" if stage == "tryon" else "picture"]
        seen[bool(learning)] |= {tuple(x.flatten()[::97].tolist()) for x in picture}
        return encode(model, batch)

    monkeypatch.setitem(tasks, stage, (note, loss_of))
    real = training.averaged  # evaluations happen inside

    def during(ema):
        learning.clear()
        return real(ema)

    monkeypatch.setattr(training, "averaged", during)
    zero_grad = torch.optim.AdamW.zero_grad

    def stepped(optimizer, **kw):
        zero_grad(optimizer, **kw)
        learning.append(1)

    learning.append(1)
    monkeypatch.setattr(torch.optim.AdamW, "zero_grad", stepped)
    run(stage, place, "apart", "--steps", "6", "--eval-every", "6")
    assert seen[True] and seen[False] and not seen[True] & seen[False]


def test_negatives_harden_and_the_temperature_keeps_its_bounds(monkeypatch):
    model, hardness = UniFashion(TINY), []
    batch = {"features": torch.randn(4, 3, TINY.vit.dim), "ids": torch.arange(4)[:, None].repeat(1, 4)}
    batch |= {"mask": torch.ones(4, 4), "product": torch.arange(4)}
    real = losses.hard_negatives
    monkeypatch.setattr(
        losses, "hard_negatives", lambda sim, *rest: (hardness.append(sim.abs().max()), real(sim, *rest))[1]
    )
    for progress in (0.0, 0.25, 0.5, 1.0):
        train_phase1.align_losses(model, batch, 0, 0, progress)
    torch.testing.assert_close(torch.stack(hardness) / hardness[-1], torch.tensor([0.0, 0.5, 1.0, 1.0]))
    for wild, kept in ((9.0, 0.5), (-1.0, 0.001)):
        model.qformer.temp.data.fill_(wild)
        train_phase1.align_losses(model, batch, 0, 0, 1.0)
        assert model.qformer.temp.item() == pytest.approx(kept)


def test_a_run_needs_no_git(place, monkeypatch):
    monkeypatch.setenv("PATH", "/nonexistent")
    run("align", place, "archive", "--steps", "1")
    assert state(place / "archive")["commit"] == "unknown"


@pytest.mark.parametrize("stage", ["caption", "generate"])
def test_a_run_that_goes_on_remembers_what_it_started_from_and_how_long_it_is(stage, place):
    run("align", place, "first", "--steps", "1")
    run(stage, place, "whole", "--steps", "2", "--init", str(place / "first"))
    run(stage, place, "killed", "--steps", "2", "--init", str(place / "first"))
    for folder in ("last", "best"):  # before its first checkpoint
        shutil.rmtree(place / "killed" / folder)
    run(stage, place, "killed", "--resume")
    whole, killed = (load_file(place / d / "last/model.safetensors") for d in ("whole", "killed"))
    assert whole.keys() == killed.keys() and all(torch.equal(whole[name], killed[name]) for name in whole)
    assert state(place / "killed")["step"] == 2
    shutil.rmtree(place / "first")  # not needed any more
    run(stage, place, "killed", "--steps", "3", "--resume")
    assert json.loads((place / "killed/config.json").read_text())["init"] == str(place / "first")


def test_only_a_run_with_the_shipped_frozen_files_is_shipped_with_the_curves_of_its_own_past(
    place, monkeypatch
):
    monkeypatch.setattr(pretrain, "HERE", place / "weights")
    drawn = []
    monkeypatch.setattr(runs, "draw_curves", lambda chain, path: drawn.append([run.name for run in chain]))
    run("caption", place, "a", "--steps", "1")
    run("tryon", place, "b", "--steps", "1", "--init", str(place / "a"))
    weights = place / "own"
    shutil.copytree(place / "weights", weights)
    monkeypatch.setattr(pretrain, "HERE", weights)
    drawn.clear()
    pretrain.main(["ship", "--init", str(place / "b")])
    assert drawn == [["a", "b"]]
    caption, whole = load_file(place / "a/best/model.safetensors"), load_file(weights / "model.safetensors")
    assert any(
        runs.part_of(name) == "lora" for name in caption
    )  # carried through the try-on's run, and shipped
    assert all(torch.equal(whole[name], tensor.half()) for name, tensor in caption.items())
    shipped = (weights / "model.safetensors").read_bytes()
    run("generate", place, "half", "--steps", "1", "--init", str(place / "a"))
    with pytest.raises(UserError, match="holds no garment: its training is not finished"):
        pretrain.main(["ship", "--init", str(place / "half")])
    run("tryon", place, "mute", "--steps", "1")
    with pytest.raises(UserError, match="holds no text_adapter: its training is not finished"):
        pretrain.main(["ship", "--init", str(place / "mute")])
    assert (weights / "model.safetensors").read_bytes() == shipped
    (place / "a").rename(place / "gone")
    pretrain.main(["ship", "--init", str(place / "b")])
    assert drawn[-1] == ["b"]
    (weights / "bert_vocab.txt").write_text("[PAD]\n")
    with pytest.raises(UserError, match="was trained with another bert_vocab.txt"):
        pretrain.main(["ship", "--init", str(place / "b")])


@pytest.mark.parametrize("stage", STAGES)
def test_the_table_at_the_top_says_what_learns(stage, place):
    draws = stage != "caption"
    before = load_public(place, draws, not draws)
    run(stage, place, "learns", "--steps", "1", "--lr", "0.01")
    after = load_file(place / "learns/last/model.safetensors")
    learned = training.set_trainable(load_public(place, draws, not draws), STAGES[stage].TRAINABLE[stage])
    never_read = {"garment.encoder.middle"}  # nothing reads the coarsest features: they are not even computed
    if draws:
        never_read |= {f"garment.encoder.blocks.{i}." for i in range(len(before.garment.control_convs), 8)}
    optimizer = load_file(place / "learns/last/optimizer.safetensors")
    for name, tensor in before.state_dict().items():
        moments = f"{name}:exp_avg" in optimizer
        if name not in learned:
            assert not moments, f"{name} is frozen and has an optimizer state"
            assert name not in after or torch.equal(after[name], tensor), f"{name} is frozen and moved"
        elif not any(name.startswith(p) for p in never_read):
            assert moments, f"{name} gets no gradient"


def test_an_average_of_the_weights_is_saved_and_the_raw_ones_beside_it(place):
    run("tryon", place, "ema", "--steps", "3", "--lr", "0.01")
    averaged = load_file(place / "ema/last/model.safetensors")
    raw = load_file(place / "ema/last/optimizer.safetensors")
    name = "unet.conv_out.weight"  # which starts at zero
    assert 0 < averaged[name].norm() < 0.97 * raw[f"{name}:raw"].norm()


def test_the_average_follows_as_its_decay_says():
    p = torch.nn.Parameter(torch.zeros(1))
    ema, expected = training.EMA({"p": p}, decay=0.3), 0.0
    for n, value in enumerate((1.0, 5.0, -2.0, 4.0), start=1):
        p.data.fill_(value)
        ema.update()
        decay = min(0.3, (1 + n) / (10 + n))
        expected = decay * expected + (1 - decay) * value
    with training.averaged(ema):
        assert p.item() == pytest.approx(expected)
    assert p.item() == 4.0


def test_what_was_learned_before_is_carried_over(place):
    run("align", place, "first", "--steps", "1", "--lr", "0.01")
    run("generate", place, "second", "--steps", "1", "--init", str(place / "first"))
    first, second = (load_file(place / d / "last/model.safetensors") for d in ("first", "second"))
    assert all(torch.equal(second[name], tensor) for name, tensor in first.items())
    assert any(name.startswith("unet.") for name in second)


def test_to_learn_to_write_leaves_all_the_rest_as_it_was_bit_for_bit(place, monkeypatch):
    init = all_that_draws(place)
    models, loaded = [], train_phase1.load_public

    def noted(*args, **kw):
        models.append(loaded(*args, **kw))
        models.append({k: v.clone() for k, v in models[0].state_dict().items()})
        return models[0]

    monkeypatch.setattr(train_phase1, "load_public", noted)
    run("caption", place, "writes", "--steps", "2", "--lr", "0.01", "--init", str(init))
    model, before = models
    given, after = load_file(init), load_file(place / "writes/last/model.safetensors")
    new = {name for name in after if name not in given}
    assert {runs.part_of(name) for name in new} == {"text_adapter", "lora"}
    assert new == {k for k in before if runs.part_of(k) in ("text_adapter", "lora")}
    assert given.keys() <= after.keys()
    assert all(torch.equal(after[name], tensor) for name, tensor in given.items())
    for name, tensor in model.state_dict().items():  # the LLM's own weights and the ViT among them
        was = given.get(name, before[name])
        assert torch.equal(tensor, was) != (name in new), name
    assert not (place / "writes/samples/000002.png").exists()
    written = (place / "writes/samples/000002.txt").read_text().splitlines()
    assert len(written) >= 5 and all(
        line.startswith("-> ") for line in written[1::3]
    )  # two, and a blank between


@pytest.mark.parametrize("stage", ["align", "generate"])  # tryon: where a run is shipped
def test_what_was_learned_to_write_is_carried_through_what_cannot_write(stage, place):
    run("caption", place, "writes", "--steps", "1", "--lr", "0.01")
    run(stage, place, "draws", "--steps", "1", "--init", str(place / "writes"))
    shutil.move(place / "writes", place / "gone")
    run(stage, place, "draws", "--steps", "2", "--resume")
    first = load_file(place / "gone/last/model.safetensors")
    for folder in ("last", "best"):
        later = load_file(place / "draws" / folder / "model.safetensors")
        writing = {k for k in first if runs.part_of(k) in ("text_adapter", "lora")}
        assert writing == {k for k in later if runs.part_of(k) in ("text_adapter", "lora")} and writing
        assert all(torch.equal(later[k], first[k]) for k in writing)
    # and from there to learn on: nothing starts anew
    run("caption", place, "again", "--steps", "1", "--lr", "1e-9", "--init", str(place / "draws"))
    again = load_file(place / "again/last/model.safetensors")
    assert all(torch.allclose(again[k], first[k], atol=1e-6) for k in writing)
    assert again.keys() == later.keys()


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
    run("generate", place, "draws", "--steps", "1")
    tensors = load_file(place / "draws/last/model.safetensors")
    harm(tensors)
    save_file(tensors, place / "harmed.safetensors")
    with pytest.raises(UserError, match=told):
        run("caption", place, "writes", "--steps", "1", "--init", str(place / "harmed.safetensors"))
    assert not (place / "writes").exists()


def test_what_a_later_stage_lacks_is_told_before_the_first_has_trained(place):
    shutil.copytree(place / "weights", place / "own")
    (place / "own/llama.safetensors").unlink()
    data = ["--data", f"toy={place / 'toy'}", "--preset", "tiny", "--weights", str(place / "own")]
    with pytest.raises(UserError, match="llama.safetensors is missing"):
        train_phase1.main([*data, "--out", str(place / "all"), "--workers", "0"])
    assert not (place / "all").exists()


def test_layers_that_are_computed_again_learn_the_same(place, monkeypatch):
    """As FULL does, with dropout: its preset is DROPPING here, and its files are tiny's."""
    monkeypatch.setitem(PRESETS, "tiny", DROPPING)
    monkeypatch.setitem(PRESETS, "full", DROPPING)
    for name in ("load_public", "llm_tokenizer"):
        real = getattr(train_phase1, name)
        monkeypatch.setattr(train_phase1, name, lambda _, *a, real=real, **kw: real("tiny", *a, **kw))
    again, recomputed = [], llama.checkpoint
    monkeypatch.setattr(llama, "checkpoint", lambda *a, **kw: (again.append(1), recomputed(*a, **kw))[1])
    run("caption", place, "kept", "--steps", "2", "--lr", "0.01")
    assert not again
    run("caption", place, "again", "--steps", "2", "--lr", "0.01", "--preset", "full")
    assert len(again) == 2 * TINY.llama.depth  # not where there is no gradient
    a, b = (load_file(place / d / "last/model.safetensors") for d in ("kept", "again"))
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_before_its_first_step_a_run_predicts_as_the_llm_without_lora(place):
    model = load_public(place, draws=False, writes=True)
    base = llama.Llama(TINY.llama)
    base.load_state_dict(load_file(place / "weights/llama.safetensors"))
    ids, z = torch.arange(5, 25)[None], torch.randn(1, TINY.qformer.queries, TINY.qformer.dim)
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


def test_a_text_adapter_that_nothing_has_trained_starts_from_its_data_and_a_trained_one_stays(
    place, monkeypatch
):
    started, real = [], train_phase1.start_adapter
    monkeypatch.setattr(
        train_phase1, "start_adapter", lambda *a, **kw: (started.append((*a, kw)), real(*a, **kw))[1]
    )
    run("caption", place, "new", "--steps", "1", "--lr", "1e-9")
    [(adapter, z, std, floor)] = started
    assert floor == {"floor": 1e-4}
    words = load_file(place / "weights/llama.safetensors")["embed.weight"]
    assert std == pytest.approx(words.std().item(), rel=1e-3) and z.shape[1:] == (16, 128)
    run(
        "caption",
        place,
        "second",
        "--steps",
        "1",
        "--lr",
        "1e-9",
        "--seed",
        "1",
        "--init",
        str(place / "new"),
    )
    assert len(started) == 1
    new, second = (load_file(place / d / "last/model.safetensors") for d in ("new", "second"))
    for name in ("text_adapter.weight", "text_adapter.bias", "llama.layers.0.attn.q.lora_a"):
        torch.testing.assert_close(second[name], new[name], atol=1e-6, rtol=0)


def test_toy_stands_for_the_texts_of_three_shops_to_write_and_of_one_to_compare_and_draw(place):
    toy_world = place / "toy"
    short = ["fashion200k"]
    for stage, names in (("align", short), ("generate", short), ("caption", list(INSTRUCTIONS))):
        data = train_phase1.open_data([f"toy={toy_world}"], stage)
        assert list(data) == names
        assert all(len(part) == len(part.products) > 0 for part in data.values())
    apart = [f"{name}={toy_world / name.removesuffix('-cap')}" for name in INSTRUCTIONS]
    for stage in train_phase1.STAGES:  # a real data set is what it is in every stage
        assert list(train_phase1.open_data(apart, stage)) == list(INSTRUCTIONS)
        assert list(train_phase1.open_data(apart[1:], stage)) == list(INSTRUCTIONS)[1:]
    for twice in ([apart[0], apart[0]], [f"toy={toy_world}", apart[0]], [apart[0], f"toy={toy_world}"]):
        with pytest.raises(UserError, match="^--data names fashion200k twice .toy stands for [^\n]*$"):
            train_phase1.open_data(twice, "align")
    with pytest.raises(UserError, match="^unknown data set 'farfetch': it is one of toy, fashion200k, "):
        train_phase1.open_data(["farfetch"], "caption")


def test_every_sample_is_asked_for_in_its_own_style_and_answers_with_its_own_text(place):
    words = llm_tokenizer("tiny", place / "weights")
    data = train_phase1.open_data([f"toy={place / 'toy'}"], "caption")
    samples = train_phase1.Answers(data, TINY, words)
    assert len(samples) == sum(map(len, data.values()))
    first, picked = 0, {}
    for style, part in data.items():
        for i in (0, len(part) - 1):
            sample = samples[first + i]
            start = int(sample["answer"].int().argmax())
            assert sample["ids"][:start].tolist() == prompt(words, style)[1]
            own = sample["ids"][sample["answer"]].tolist()
            assert words.decode(own) == part[i]["text"] and own[-1] == words.eos  # toy's texts are not cut
            picked[style] = start
        first += len(part)
    assert len(set(picked.values())) == 3  # templates of three lengths


def test_the_full_size_learns_to_write_on_a_gpu_of_80_gb():
    """Stage caption at FULL on the meta device: no GPU runs this test, it adds up what one would hold at the worst moment."""
    b, cfg, bf16, fp32 = train_phase1.DEFAULTS["caption"]["batch_size"], FULL, 2, 4
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


@pytest.mark.parametrize("stage", ["generate", "tryon"])
def test_an_adapter_that_nothing_has_trained_starts_from_its_data_and_a_trained_one_stays(stage, place):
    run(stage, place, "new", "--steps", "1", "--lr", "1e-9")
    adapters = [load_file(place / "new/last/model.safetensors")["image_adapter.weight"]]
    run(stage, place, "second", "--steps", "1", "--lr", "1e-9", "--seed", "1", "--init", str(place / "new"))
    adapters.append(load_file(place / "second/last/model.safetensors")["image_adapter.weight"])
    torch.testing.assert_close(*adapters, atol=1e-6, rtol=0)
    untouched = load_public(place).image_adapter.weight
    assert adapters[0].norm() > 3 * untouched.norm()


@pytest.mark.parametrize("stage", ["generate", "tryon"])
def test_a_run_resumed_before_its_first_checkpoint_starts_as_the_first_did(stage, place):
    for name, more in (("whole", []), ("killed", ["--resume"])):
        if more:
            (place / name).mkdir()
            shutil.copy(place / "whole/config.json", place / name)
        run(stage, place, name, "--steps", "1", *more)
    whole, killed = (load_file(place / d / "last/model.safetensors") for d in ("whole", "killed"))
    assert all(torch.equal(whole[name], killed[name]) for name in whole)
    if stage == "tryon":  # and the garment's encoder began as the U-Net's
        ours, theirs = (whole[f"{part}.encoder.blocks.0.weight"] for part in ("garment", "unet"))
        torch.testing.assert_close(ours, theirs, atol=1e-2, rtol=0)


def test_a_garment_encoder_that_was_trained_is_not_started_again(place):
    run("tryon", place, "first", "--steps", "3", "--lr", "0.01")
    run("tryon", place, "second", "--steps", "1", "--lr", "1e-9", "--init", str(place / "first"))
    first, second = (load_file(place / d / "last/model.safetensors") for d in ("first", "second"))
    name = "encoder.blocks.1.res.conv1.weight"
    torch.testing.assert_close(second[f"garment.{name}"], first[f"garment.{name}"], atol=1e-6, rtol=0)
    assert (second[f"garment.{name}"] - second[f"unet.{name}"]).abs().max() > 1e-3


def test_a_run_killed_while_it_saves_can_be_resumed(place):
    run("align", place, "killed", "--steps", "1")
    last = place / "killed/last"
    last.rename(last.with_name("last.old"))  # between the two renames of save_checkpoint
    (place / "killed/last.new").mkdir()
    run("align", place, "killed", "--steps", "2", "--resume")
    assert state(place / "killed")["step"] == 2
    assert [row["step"] for row in read_metrics(place / "killed") if "itc" in row] == [
        0,
        1,
    ]  # it did not start again


def test_the_cache_changes_nothing_but_float16_rounding(place):
    model = load_public(place).eval()
    words = train_phase2.tokenizer("tiny", place / "weights")
    scenes = train_phase2.Scenes(train_phase2.open_data([f"toy={place / 'toy'}"]), TINY, words)
    order = [[3, 1], [0, 3]]
    plain, cached = (
        list(training.batches(scenes, iter(order), lambda b: train_phase2.encode_tryon(model, b), cache))
        for cache in (False, True)
    )
    for a, b in zip(plain, cached, strict=True):
        assert a.keys() == b.keys()
        for k in a:
            torch.testing.assert_close(a[k], b[k], atol=4e-3, rtol=2e-3)
    assert not torch.allclose(*plain[0]["mean"], atol=0.1)  # samples are told apart


@pytest.mark.parametrize("dropped", [None, *train_phase2.DROP])
def test_each_condition_is_dropped_as_often_as_the_table_says(dropped, monkeypatch):
    """What is dropped for certain cannot change the loss; what is never dropped does."""
    for name in train_phase2.DROP:
        monkeypatch.setitem(train_phase2.DROP, name, float(name == dropped))
    model, batch = randomise(UniFashion(TINY), 0).float(), encoded(3)
    other = encoded(4)
    before = train_phase2.tryon_losses(model, batch, 0, 0, 0.0)["q2I"]
    for name, key in {"context": "z", "pose": "pose", "hint": "hints"}.items():
        after = train_phase2.tryon_losses(model, batch | {key: other[key]}, 0, 0, 0.0)["q2I"]
        assert torch.equal(before, after) == (name == dropped), name


@pytest.mark.parametrize("chosen", range(4))
def test_context_and_hint_are_of_the_one_condition_that_was_drawn(chosen, monkeypatch):
    monkeypatch.setattr(train_phase2, "DROP", dict.fromkeys(train_phase2.DROP, 0.0))
    model, batch, other = randomise(UniFashion(TINY), 0).float(), encoded(3), encoded(4)
    batch["odds"] = torch.eye(4)[chosen].expand(2, 4)
    before = train_phase2.tryon_losses(model, batch, 0, 0, 0.0)["q2I"]
    for key in ("z", "hints"):
        for i in range(4):
            changed = batch[key].clone()
            changed[:, i] = other[key][:, i]
            after = train_phase2.tryon_losses(model, batch | {key: changed}, 0, 0, 0.0)["q2I"]
            assert torch.equal(before, after) == (i != chosen), (key, i)


@pytest.mark.parametrize("task", ["generate", "tryon"])
def test_q2i_learns_the_noise_that_was_added_and_drops_as_often_as_it_says(task, monkeypatch):
    """x_t is the latent of the picture, noised as t says with the noise that is asked for; the rates are the table's."""
    model, n = UniFashion(TINY), 2000
    torch.nn.init.normal_(model.null_context)
    (y, x), q = (2, 2), TINY.qformer
    batch = {"mean": torch.randn(n, 4, y, x), "logvar": torch.full((n, 4, y, x), -30.0)}
    asked, given = [], []
    monkeypatch.setattr(model, "predict_noise", lambda *a: (asked.append(a), torch.zeros(n, 4, y, x))[1])
    monkeypatch.setattr(model, "q2i", lambda *a: (given.append(a), torch.zeros(()))[1])
    if task == "tryon":
        batch |= {
            "agnostic": torch.ones(n, 4, y, x),
            "keep": torch.ones(n, 1, y, x),
            "pose": torch.ones(n, 4, y, x),
        }
        batch |= {
            "z": torch.randn(n, 4, 2, q.dim),
            "hints": torch.randn(n, 4, 4, y, x),
            "odds": torch.ones(n, 4),
        }
        train_phase2.tryon_losses(model, batch, 0, 0, 0.0)
        _, _, scene, context, _, keep_hint = asked[0]
        rates = dict(train_phase2.DROP)
        assert 1 - keep_hint.mean().item() == pytest.approx(rates["hint"], abs=0.03)
        assert (scene[:, 5:] == 0).all((1, 2, 3)).float().mean().item() == pytest.approx(
            rates["pose"], abs=0.03
        )
    else:
        batch |= {"z": torch.randn(n, 2, q.dim)}
        train_phase1.generate_losses(model, batch, 0, 0, 0.0)
        context, rates = asked[0][3], {"context": 0.2}
    null = (context == model.null_context).all((1, 2)).float().mean().item()
    assert null == pytest.approx(rates["context"], abs=0.04)
    noised, t = asked[0][:2]
    _, noise, t_of_loss = given[0]
    assert torch.equal(t, t_of_loss) and t.min() < 20 and t.max() > 979 and abs(t.float().mean() - 499.5) < 30
    signal = diffusion.alphas_cumprod()[t].sqrt()[:, None, None, None]
    expected = signal * batch["mean"] * TINY.vae.scale + (1 - signal**2).sqrt() * noise
    torch.testing.assert_close(noised, expected.float(), atol=1e-5, rtol=0)
    assert noise.std().item() == pytest.approx(1, abs=0.02)
    batch["logvar"] = torch.full((n, 4, y, x), 2 * np.log(5.0), dtype=torch.float32)
    batch["mean"] = torch.zeros(n, 4, y, x)
    getattr(train_phase2 if task == "tryon" else train_phase1, f"{task}_losses")(model, batch, 0, 0, 0.0)
    drawn = asked[1][0] - (1 - signal**2).sqrt() * given[1][1]  # what is left is a draw of the VAE's own
    early = t < 300
    spread = (drawn / signal)[early].std().item()
    assert spread == pytest.approx(5 * TINY.vae.scale, rel=0.05)


def test_itm_reads_matches_then_wrong_texts_then_wrong_images(monkeypatch):
    model, b = UniFashion(TINY), 5
    features = torch.randn(b, 3, TINY.vit.dim)
    ids = torch.arange(b)[:, None].repeat(1, 4)
    batch = {
        "features": features,
        "ids": ids,
        "mask": torch.ones(b, 4),
        "product": torch.tensor([0, 1, 2, 3, 3]),
    }
    passes = []
    model.qformer.register_forward_pre_hook(lambda _, given: passes.append(given))
    train_phase1.align_losses(model, batch, 0, 0, 1.0)
    image, text, _ = passes[-1]
    seen = model.qformer.ln_vision(features)
    shown = [next(j for j in range(b) if torch.equal(x, seen[j])) for x in image]
    said, product = text[:, 0].tolist(), batch["product"].tolist()
    assert shown[: 2 * b] == [*range(b)] * 2 and said[:b] == said[2 * b :] == [*range(b)]
    assert all(product[i] != product[j] for i, j in zip(shown[b:], said[b:], strict=True))


@pytest.mark.parametrize("sign", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_asks_for_the_end_and_a_second_one_is_obeyed_at_once(sign):
    before = {s: signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)}
    try:
        stop = training.Stop()
        assert not stop.asked
        os.kill(os.getpid(), sign)
        assert stop.asked and signal.getsignal(sign) == signal.SIG_DFL
    finally:
        for s, handler in before.items():
            signal.signal(s, handler)


def test_the_learning_rate_rises_then_falls_as_half_a_cosine():
    values = [training.cosine(step, 110, warmup=10) for step in (0, 4, 9, 10, 60, 85, 110)]
    assert values == pytest.approx([0.1, 0.5, 1.0, 1.0, 0.5, 0.5 * (1 - 0.5**0.5), 0.0])


@pytest.fixture
def groups(monkeypatch) -> list[dict]:
    """The parameter groups of the optimisers that are made."""
    groups, born = [], torch.optim.AdamW.__init__

    def noted(optimizer, given, **kw):
        born(optimizer, given, **kw)
        groups.extend(optimizer.param_groups)

    monkeypatch.setattr(torch.optim.AdamW, "__init__", noted)
    return groups


@pytest.mark.parametrize(
    ("device", "dtype", "fused"), [("cpu", "bf16", False), ("cpu", "fp32", True), ("cuda", "bf16", True)]
)
def test_only_in_bfloat16_on_a_cpu_is_attention_plain(device, dtype, fused):
    training.plain_attention(torch.device(device), dtype)
    assert torch.backends.cuda.flash_sdp_enabled() == fused


def test_the_temperature_learns_at_the_official_rate_however_fast_the_rest(place, groups):
    run("align", place, "rates", "--steps", "1", "--lr", "0.01")
    assert [(len(g["params"]) == 1, g["peak"]) for g in groups] == [(False, 0.01), (True, 2e-5)]


def test_the_text_adapter_learns_at_a_tenth_of_the_rate_of_lora(place, groups):
    run("caption", place, "rates of caption", "--steps", "1", "--lr", "0.01")
    shapes = [{tuple(p.shape) for p in g["params"]} for g in groups]
    wide, dim = TINY.llama.dim, TINY.qformer.dim
    assert shapes[1:] == [{(wide, dim)}, {(wide,)}] and len(groups[0]["params"]) == 2 * 7 * TINY.llama.depth
    assert [g["peak"] for g in groups] == [0.01, 0.001, 0.001]


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


def test_every_sample_is_seen_once_an_epoch_whatever_the_start():
    order = list(training.batch_order(10, 3, seed=1, start=0, stop=6))
    assert len({i for batch in order[:3] for i in batch}) == 9
    assert order[4:] == list(training.batch_order(10, 3, seed=1, start=4, stop=6))
    assert order[:3] != order[3:6]


def test_held_out_products_are_whole():
    names = [f"p{i // 3}" for i in range(300)]
    kept, held = training.held_out(names, every=10)
    assert held and not {names[i] for i in kept} & {names[i] for i in held}
    assert sorted(kept + held) == list(range(300))


def test_hard_negatives_are_alike_and_never_belong_together():
    sim = torch.eye(6)
    sim[0, 3] = sim[3, 0] = 0.9
    same = torch.eye(6, dtype=torch.bool)
    same[1, 2] = same[2, 1] = True
    sim[1, 2] = sim[2, 1] = 0.99
    for seed in range(50):
        text, image = losses.hard_negatives(sim, torch.tensor(0.05), same, training.seeded(seed))
        for chosen in (text, image):
            assert not same[torch.arange(6), chosen].any()
            assert chosen[0] == 3 and chosen[3] == 0


def test_hard_negatives_survive_a_batch_that_all_belongs_together():
    same = torch.ones(4, 4, dtype=torch.bool)
    text, _ = losses.hard_negatives(torch.eye(4), torch.tensor(0.07), same, training.seeded(0))
    assert (text != torch.arange(4)).all()


def test_itm_is_low_only_when_matches_and_mismatches_are_told_apart():
    yes, no = torch.tensor([[-5.0, 5.0]]), torch.tensor([[5.0, -5.0]])
    right = losses.itm(yes.repeat(3, 1), no.repeat(6, 1))
    assert right < 1e-3
    assert losses.itm(no.repeat(3, 1), yes.repeat(6, 1)) > 5


def test_a_dropped_context_is_the_null_vector_for_that_sample_only():
    model = UniFashion(TINY)
    torch.nn.init.normal_(model.null_context)
    context = torch.randn(3, 4, TINY.unet.context_dim)
    dropped = model.drop_context(context, torch.tensor([True, False, True]))
    assert torch.equal(dropped[0], context[0]) and torch.equal(dropped[2], context[2])
    assert torch.equal(dropped[1], model.null_context[0].expand(4, -1))


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--data", "imagenet"], "unknown data set"),
        (["--data", "toy", "--steps", "0"], "--steps is 0"),
        (["--data", "toy", "--steps", "5", "--epochs", "1"], "not both"),
        (["--data", "toy", "--stage", "all", "--lr", "0.1"], "name one with --stage"),
        (["--data", "toy", "--device", "abacus"], "unknown device"),
        (["--data", "toy", "--workers", "-1"], "--workers is -1"),
        (["--data", "toy", "--seed", "-1"], "--seed is -1"),
        (["--data", "toy", "--stage", "all", "--resume"], "nothing to resume"),
        (["--data", "fashion200k=nowhere", "--stage", "align"], "lacks labels"),
        (
            ["--data", "toy", "--stage", "align", "--init", "nowhere", "--batch-size", "4"],
            "neither a run folder",
        ),
        (
            ["--data", "toy", "--stage", "generate", "--batch-size", "4", "--steps", "1"],
            "--init wants a run of stage align",
        ),
        (
            ["--data", "toy", "--stage", "caption", "--batch-size", "4", "--steps", "1"],
            "--init wants a run of stage align",
        ),
        (["--data", "toy", "fashiongen", "--stage", "caption"], "--data names fashiongen twice"),
        (["--data", "toy", "fashiongen", "--stage", "align"], "fashiongen_256_256_train.h5 is missing"),
        (["--data", "fashioniq", "--stage", "caption"], "unknown data set 'fashioniq'.*fashioniq-cap"),
        (["--data", "fashioniq-cap=nowhere", "--stage", "caption"], "nowhere lacks next_llava.train"),
        (["--data", "toy", "--stage", "align", "--batch-size", "1"], "--batch-size is 1"),
        (["--data", "toy", "--stage", "align", "--lr", "nan"], "--lr is nan"),
        (["--data", "toy", "--stage", "align", "--lr", "inf"], "--lr is inf"),
        (["--data", "toy", "--step", "5"], "unrecognized arguments: --step 5"),
    ],
)
def test_wrong_arguments_are_one_line(arguments, told, place):
    common = ["--preset", "tiny", "--weights", str(place / "weights"), "--out", str(place / "wrong")]
    arguments = [a.replace("toy", f"toy={place / 'toy'}") if a == "toy" else a for a in arguments]
    with pytest.raises(UserError, match=told):
        train_phase1.main([*arguments, *common])
    assert not (place / "wrong").exists()


def test_a_tiny_try_on_wants_a_qformer_that_was_trained(place):
    data = ["--data", f"toy={place / 'toy'}", "--preset", "tiny", "--weights", str(place / "weights")]
    with pytest.raises(UserError, match="no file holds a Q-Former: --init wants a run"):
        train_phase2.main([*data, "--out", str(place / "wrong"), *SMALL, "--steps", "1"])
    assert not (place / "wrong").exists()


def test_a_run_folder_that_cannot_be_made_is_one_line(place):
    (place / "file").write_text("")
    with pytest.raises(UserError, match="file is not a folder that can be written"):
        run("align", place, "file/run", "--steps", "1")


@pytest.mark.parametrize("workers", ["0", "1"])
def test_a_damaged_picture_of_the_data_is_one_line_even_from_a_worker(workers, place, capsys):
    damaged = place / "damaged"
    shutil.copytree(place / "toy", damaged)
    for path in damaged.glob("vitonhd/train/cloth/*"):
        path.write_bytes(path.read_bytes()[:300])
    data = ["--data", f"toy={damaged}", "--preset", "tiny", "--weights", str(place / "weights")]
    rest = [
        "--init",
        str(place / "start.safetensors"),
        "--out",
        str(place / "out"),
        *SMALL,
        "--workers",
        workers,
        "--steps",
        "1",
    ]
    with pytest.raises(SystemExit) as left:
        training.run(lambda: train_phase2.main([*data, *rest]))
    told = capsys.readouterr().err.splitlines()
    assert left.value.code == 2 and len(told) == 1
    assert f"{damaged}/vitonhd/train/cloth/" in told[0] and "cannot be read as an image" in told[0]


def test_stopped_before_its_first_step_it_says_so_in_one_line(capsys):
    def main() -> None:
        raise KeyboardInterrupt

    with pytest.raises(SystemExit) as left:
        training.run(main)
    assert left.value.code == 130 and capsys.readouterr().err.endswith(": stopped\n")


def test_no_world_is_drawn_where_a_path_was_mistyped(place):
    with pytest.raises(UserError, match="typo holds no ToyFashion: python -m unifashion.data.toy --out"):
        training.toy_folder(place / "typo")
    assert not (place / "typo").exists()


def test_a_used_run_folder_is_not_written_over(place):
    run("align", place, "used", "--steps", "1")
    with pytest.raises(UserError, match="--resume"):
        run("align", place, "used", "--steps", "1")


@pytest.mark.parametrize("part", ["vae", "vit", "llama"])
def test_the_stand_ins_resume_bit_for_bit(part, place, monkeypatch):
    monkeypatch.setattr(pretrain, "HERE", place)
    (place / "llama_tokenizer.model").symlink_to(place / "weights/llama_tokenizer.model")

    def go(name: str, *more: str) -> None:
        pretrain.main(
            [
                part,
                "--data",
                str(place / "toy"),
                "--out",
                str(place / name),
                *SMALL[:2],
                "--steps",
                "4",
                *more,
            ]
        )

    go("pre")
    with stopped_after(2):
        go("pre2")
    go("pre2", "--resume")
    a, b = (load_file(place / d / "last/model.safetensors") for d in ("pre", "pre2"))
    assert all(torch.equal(a[name], b[name]) for name in a)


# ---------------------------------------------------------------------------------------------- helpers

SMALL = ["--workers", "0", "--batch-size", "4", "--eval-every", "100"]
DROPPING = replace(
    TINY, qformer=replace(TINY.qformer, dropout=0.1), lora=replace(TINY.lora, dropout=0.1), max_caption=24
)


def run(stage: str, place: Path, name: str, *more: str) -> None:
    flag = "--task" if stage == "tryon" else "--stage"
    data = ["--data", f"toy={place / 'toy'}", "--preset", "tiny", "--weights", str(place / "weights")]
    if stage != "align" and not {"--init", "--resume"} & {*more}:
        data += ["--init", str(place / "start.safetensors")]
    STAGES[stage].main([*data, flag, stage, "--out", str(place / name), *SMALL, *more])


def all_that_draws(place: Path) -> Path:
    """A run's model.safetensors with everything that stages align, generate and tryon learn."""
    model = randomise(UniFashion(TINY), 3).float()
    tensors = {k: v for k, v in model.state_dict().items() if k[:4] not in ("vit.", "vae.")}
    save_file(tensors, place / "draws.safetensors")
    return place / "draws.safetensors"


def state(folder: Path) -> dict:
    return json.loads((folder / "last/state.json").read_text())


def read_metrics(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def load_public(place: Path, draws: bool = True, writes: bool = False) -> UniFashion:
    torch.manual_seed(0)
    return train_phase1.load_public("tiny", place / "weights", draws=draws, writes=writes)


def encoded(seed: int) -> dict[str, torch.Tensor]:
    """Stands for `encode_tryon`: two samples of random latents."""
    made, (y, x), q = torch.Generator().manual_seed(seed), TINY.latent, TINY.qformer
    shapes = {
        "mean": (4, y, x),
        "logvar": (4, y, x),
        "agnostic": (4, y, x),
        "keep": (1, y, x),
        "pose": (4, y, x),
    }
    shapes |= {"z": (4, q.queries, q.dim), "hints": (4, 4, y, x)}
    batch = {name: torch.randn(2, *shape, generator=made) for name, shape in shapes.items()}
    return batch | {"odds": torch.ones(2, 4)}


class stopped_after:
    """Within, a run is asked to stop after so many steps, as by Ctrl-C: it must leave with a shell's code for that."""

    def __init__(self, steps: int) -> None:
        self.steps = steps

    def __enter__(self) -> None:
        self.patch = pytest.MonkeyPatch()
        asked: list[training.Stop] = []
        born = training.Stop.__init__
        self.patch.setattr(training.Stop, "__init__", lambda stop: (born(stop), asked.append(stop), None)[2])
        zero_grad, count = torch.optim.AdamW.zero_grad, iter(range(1, 1000))

        def counted(optimizer: torch.optim.AdamW, **kw: bool) -> None:
            zero_grad(optimizer, **kw)
            if next(count) == self.steps:
                asked[-1].asked = True

        self.patch.setattr(torch.optim.AdamW, "zero_grad", counted)

    def __exit__(self, kind: type | None, error: BaseException | None, _: object) -> bool:
        self.patch.undo()
        assert error is not None, "the run was not stopped"
        return kind is SystemExit and error.code == 130


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small ToyFashion, and stand-ins with random weights."""
    place = tmp_path_factory.mktemp("training")
    toy.ensure(place / "toy", train=12, val=2, test=2, workers=1, quiet=True)
    (place / "weights").mkdir()
    torch.manual_seed(0)
    model = UniFashion(TINY, writes=True)
    for part in ("vit", "vae", "llama"):
        tensors = getattr(model, part).state_dict()
        save_file({k: v.contiguous() for k, v in tensors.items()}, place / "weights" / f"{part}.safetensors")
    start = {f"qformer.{k}": v.contiguous() for k, v in model.qformer.state_dict().items()}
    save_file(start, place / "start.safetensors")
    vocab = build_vocab(["red dress with white dots and long sleeves"])
    (place / "weights/bert_vocab.txt").write_text("\n".join(vocab) + "\n")
    shutil.copy(FOLDERS["tiny"] / "llama_tokenizer.model", place / "weights")
    return place


@pytest.fixture
def place(made: Path, tmp_path: Path) -> Iterator[Path]:
    for name in ("toy", "weights", "start.safetensors"):
        (tmp_path / name).symlink_to(made / name)
    yield tmp_path
    shutil.rmtree(tmp_path)


def test_curves_show_each_loss_where_it_was(tmp_path):
    run = tmp_path / "align"
    run.mkdir()
    for step in range(0, 100, 2):
        runs.log_line(run, step=step, itc=8.0 - step / 13, lr=1e-3, norms=[1.0], seconds=3.0)
    runs.log_line(run, step=98, val=4.0)
    runs.draw_curves([run, run], tmp_path / "losses.png")
    with Image.open(tmp_path / "losses.png") as image:
        panel = np.asarray(image.convert("RGB").crop((0, 0, image.width // 2, image.height))).astype(int)
        assert np.array_equal(panel, np.asarray(image.convert("RGB"))[:, image.width // 2 :])
    ys, xs = np.nonzero(panel[40:, :, 2] - panel[40:, :, 0] > 100)  # itc is blue, and falls
    assert np.corrcoef(xs, ys)[0, 1] > 0.99 and np.ptp(xs) > 300 and np.ptp(ys) > 150
    ys, xs = np.nonzero(
        panel[40:, :, 0] - panel[40:, :, 2] > 100
    )  # val is red, one dot, half way up at the end
    assert np.ptp(xs) < 8 and abs(xs.mean() - 425) < 4 and abs(ys.mean() - 115) < 15
