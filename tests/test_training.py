"""Both training scripts against what they promise: what learns, what resumes, what a killed run leaves behind."""

import json
import shutil
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
from unifashion import UserError, losses, runs, training
from unifashion.config import PRESETS, TINY
from unifashion.data import toy
from unifashion.model import UniFashion
from unifashion.tokenizers import build_vocab
from weights.tiny import pretrain

STAGES = {"align": train_phase1, "generate": train_phase1, "tryon": train_phase2}


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


@pytest.mark.parametrize(
    "more", [["--cache"], ["--accumulate", "2"], []], ids=["cache", "accumulate", "plain"]
)
def test_a_run_with_dropout_resumes_bit_for_bit(more, place, monkeypatch):
    monkeypatch.setitem(PRESETS, "tiny", replace(TINY, qformer=replace(TINY.qformer, dropout=0.1)))
    run("align", place, "whole", "--steps", "3", *more)
    with stopped_after(1):
        run("align", place, "parts", "--steps", "3", *more)
    run("align", place, "parts", "--steps", "3", *more, "--resume")
    whole, parts = (load_file(place / d / "last/model.safetensors") for d in ("whole", "parts"))
    assert all(torch.equal(whole[name], parts[name]) for name in whole)


def test_what_is_frozen_drops_nothing_out(monkeypatch):
    cfg = replace(TINY, qformer=replace(TINY.qformer, dropout=0.1))
    model = UniFashion(cfg)
    training.train_mode(model, training.set_trainable(model, train_phase2.TRAINABLE["tryon"]))
    seen = torch.randn(2, 4, TINY.vit.dim)
    assert torch.equal(model.qformer(seen)[0], model.qformer(seen)[0]) and model.garment.training
    training.train_mode(model, training.set_trainable(model, train_phase1.TRAINABLE["align"]))
    assert not torch.equal(model.qformer(seen)[0], model.qformer(seen)[0]) and not model.vit.training


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
    assert (place / "second/config.json").read_text() == config
    with pytest.raises(UserError, match="nothing to resume"):
        run("align", place, "mistyped", "--steps", "1", "--resume")
    assert not (place / "mistyped").exists()


def test_a_run_killed_before_its_first_checkpoint_starts_again(place):
    run("align", place, "whole", "--steps", "1")
    shutil.copytree(place / "whole", place / "killed")
    for folder in ("last", "best"):
        shutil.rmtree(place / "killed" / folder)
    run("align", place, "killed", "--steps", "1", "--resume")
    a, b = (load_file(place / d / "last/model.safetensors") for d in ("whole", "killed"))
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_stopped_in_one_stage_the_next_does_not_begin_and_goes_on_when_asked(place, monkeypatch):
    stages = {k: {**v, "steps": 2, "epochs": None, "batch_size": 4} for k, v in train_phase1.DEFAULTS.items()}
    monkeypatch.setattr(train_phase1, "DEFAULTS", stages)
    data = ["--data", f"toy={place / 'toy'}", "--preset", "tiny", "--weights", str(place / "weights")]
    everything = [*data, "--out", str(place / "all"), "--workers", "0"]
    with stopped_after(1):
        train_phase1.main(everything)
    assert state(place / "all/align")["step"] == 1 and not (place / "all/generate").exists()
    train_phase1.main([*everything, "--resume"])
    assert state(place / "all/align")["step"] == state(place / "all/generate")["step"] == 2


def test_the_best_is_the_one_with_the_lowest_loss_on_what_was_held_out(place, monkeypatch):
    values, calls, saved = [3.0, 1.0, float("nan"), 2.0], [], []
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
    assert (place / "best/losses.png").exists()  # drawn in spite of nan


@pytest.mark.parametrize("stage", STAGES)
def test_the_table_at_the_top_says_what_learns(stage, place):
    before = load_public(place)
    run(stage, place, "learns", "--steps", "1", "--lr", "0.01")
    after = load_file(place / "learns/last/model.safetensors")
    learned = training.set_trainable(UniFashion(TINY), STAGES[stage].TRAINABLE[stage])
    never_read = {
        "garment.encoder.middle",  # no attention block reads the coarsest features: they are not even computed
        *(f"garment.encoder.blocks.{i}." for i in range(5, 8)),
    }
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


def test_a_run_killed_while_it_saves_can_be_resumed(place):
    run("align", place, "killed", "--steps", "1")
    last = place / "killed/last"
    last.rename(last.with_name("last.old"))  # between the two renames of save_checkpoint
    (place / "killed/last.new").mkdir()
    run("align", place, "killed", "--steps", "2", "--resume")
    assert state(place / "killed")["step"] == 2


def test_the_cache_changes_nothing_but_float16_rounding(place):
    model = load_public(place).eval()
    words = train_phase2.tokenizer("tiny", place / "weights")
    scenes = train_phase2.Scenes(train_phase2.open_data([f"toy={place / 'toy'}"]), model, words)
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
        (["--data", "fashion200k=nowhere", "--stage", "align"], "lacks labels"),
        (["--data", "toy", "--stage", "align", "--init", "nowhere"], "neither a run folder"),
    ],
)
def test_wrong_arguments_are_one_line(arguments, told, place):
    common = ["--preset", "tiny", "--weights", str(place / "weights"), "--out", str(place / "wrong")]
    arguments = [a.replace("toy", f"toy={place / 'toy'}") if a == "toy" else a for a in arguments]
    with pytest.raises(UserError, match=told):
        train_phase1.main([*arguments, *common])


def test_a_used_run_folder_is_not_written_over(place):
    run("align", place, "used", "--steps", "1")
    with pytest.raises(UserError, match="--resume"):
        run("align", place, "used", "--steps", "1")


@pytest.mark.parametrize("part", ["vae", "vit"])
def test_the_stand_ins_resume_bit_for_bit(part, place, monkeypatch):
    monkeypatch.setattr(pretrain, "HERE", place)

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


def run(stage: str, place: Path, name: str, *more: str) -> None:
    flag = "--task" if stage == "tryon" else "--stage"
    data = ["--data", f"toy={place / 'toy'}", "--preset", "tiny", "--weights", str(place / "weights")]
    STAGES[stage].main([*data, flag, stage, "--out", str(place / name), *SMALL, *more])


def state(folder: Path) -> dict:
    return json.loads((folder / "last/state.json").read_text())


def read_metrics(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def load_public(place: Path) -> UniFashion:
    torch.manual_seed(0)
    return train_phase1.load_public("tiny", place / "weights")


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
    """Within, a run is asked to stop after so many steps, as by Ctrl-C."""

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

    def __exit__(self, *_: object) -> None:
        self.patch.undo()


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small ToyFashion, and stand-ins with random weights."""
    place = tmp_path_factory.mktemp("training")
    toy.ensure(place / "toy", train=12, val=2, test=2, workers=1, quiet=True)
    (place / "weights").mkdir()
    torch.manual_seed(0)
    model = UniFashion(TINY)
    for part in ("vit", "vae"):
        tensors = getattr(model, part).state_dict()
        save_file({k: v.contiguous() for k, v in tensors.items()}, place / "weights" / f"{part}.safetensors")
    vocab = build_vocab(["red dress with white dots and long sleeves"])
    (place / "weights/bert_vocab.txt").write_text("\n".join(vocab) + "\n")
    return place


@pytest.fixture
def place(made: Path, tmp_path: Path) -> Iterator[Path]:
    for name in ("toy", "weights"):
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
