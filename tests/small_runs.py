"""What tests that train share: a small model, a small world, and runs of both scripts in it."""

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import train_phase1
import train_phase2
from tests.parity import randomise
from unifashion import lora, runs, seen, training
from unifashion.blocks import UNetConfig
from unifashion.config import PRESETS, TINY
from unifashion.data import toy
from unifashion.llama import LlamaConfig
from unifashion.lora import LoRAConfig
from unifashion.model import UniFashion
from unifashion.qformer import QFormerConfig
from unifashion.tokenizers import build_vocab
from unifashion.vae import VAEConfig
from unifashion.vit import ViTConfig
from weights.load import FOLDERS

# Of the tiny preset's kind, every part there, and a step takes a hundredth of a second.
MINI = replace(
    TINY,
    vit=ViTConfig(image_size=(28, 28), patch_size=14, dim=32, depth=2, heads=4, mlp_dim=48),
    qformer=QFormerConfig(
        200, 32, 32, queries=3, dim=24, depth=2, heads=4, mlp_dim=40, vision_dim=32, embed_dim=8, dropout=0.0
    ),
    vae=VAEConfig(channels=16, channel_mult=(1, 1, 2), res_blocks=1, groups=8),
    unet=UNetConfig(
        channels=16, channel_mult=(1, 1, 2), attention_levels=(1,), res_blocks=1, heads=4, groups=8, context_dim=20
    ),
    llama=LlamaConfig(1024, dim=32, depth=2, heads=4, mlp_dim=48, context=256),
    lora=LoRAConfig(rank=4, alpha=8.0, dropout=0.0),
    max_caption=24,
    picture=(64, 48),
)  # fmt: skip
DROPPING = replace(MINI, qformer=replace(MINI.qformer, dropout=0.1), lora=replace(MINI.lora, dropout=0.1))

PHASE1, PHASE2 = tuple(train_phase1.STAGES), tuple(train_phase2.TASKS)
# What is trained, by a name: a stage of phase 1, a task of phase 2 or, "mixed", all of them.
RUNS = tuple(f"1 {stage}" for stage in PHASE1) + tuple(f"2 {task}" for task in PHASE2) + ("2 mixed",)


def furnish(place: Path) -> Path:
    """A ToyFashion, frozen files with random weights, and, to start from, all that phase 1 learns -> place."""
    toy.ensure(place / "toy", train=12, val=2, test=2, workers=1, quiet=True, size=(64, 48))
    (place / "weights").mkdir()
    model = UniFashion(MINI, writes=True)
    lora.inject(model.llama, MINI.lora)
    state = {k: v.contiguous() for k, v in randomise(model, 0).float().state_dict().items()}
    state["qformer.temp"] = torch.tensor(0.07)
    for part in ("vit", "vae", "llama"):
        own = {k.removeprefix(f"{part}."): v for k, v in state.items() if runs.part_of(k) == part}
        save_file(own, place / "weights" / f"{part}.safetensors")
    learned = {k: v for k, v in state.items() if runs.part_of(k) not in ("vit", "vae", "llama", "garment")}
    save_file(learned, place / "phase1.safetensors")
    aligned = {k: v for k, v in learned.items() if runs.part_of(k) == "qformer"}
    save_file(aligned, place / "align.safetensors")
    vocab = build_vocab(["red dress with white dots and long sleeves"])
    (place / "weights/bert_vocab.txt").write_text("\n".join(vocab) + "\n")
    shutil.copy(FOLDERS["tiny"] / "llama_tokenizer.model", place / "weights")
    return place


def shrink(monkeypatch: pytest.MonkeyPatch) -> None:
    """Until the test ends the tiny preset is MINI, trained in batches of four."""
    monkeypatch.setitem(PRESETS, "tiny", MINI)
    for module in (train_phase1, train_phase2):
        of = {"batch_size": 4, "lr": 1e-3, "epochs": None, "steps": 1}
        monkeypatch.setitem(module.DEFAULTS, "tiny", {part: of for part in module.DEFAULTS["tiny"]})


def arguments(what: str, place: Path, name: str, *more: str) -> list[str]:
    phase, part = what.split()
    start = {"1 align": None, "1 all": None, "1 caption": "align", "1 generate": "align"}.get(what, "phase1")
    words = ["--data", f"toy={place / 'toy'}", "--preset", "tiny", "--weights", str(place / "weights")]
    words += ["--out", str(place / name), "--workers", "0", "--eval-every", "100"]
    if part != "mixed":
        words += ["--stage" if phase == "1" else "--task", part]
    if start and not {"--init", "--resume"} & {*more}:
        words += ["--init", str(place / f"{start}.safetensors")]
    return [*words, *more]


def run(what: str, place: Path, name: str, steps: int, *more: str) -> None:
    """Train `what`, of RUNS, in place/name for so many steps, of all tasks together."""
    module = train_phase1 if what[0] == "1" else train_phase2
    tiny = module.DEFAULTS["tiny"]
    each = steps // (len(tiny) if what == "2 mixed" else 1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(module.DEFAULTS, "tiny", {part: {**of, "steps": each} for part, of in tiny.items()})
        module.main(arguments(what, place, name, *more))


def state(folder: Path) -> dict:
    return json.loads((folder / "last/state.json").read_text())


def metrics(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def learned(folder: Path, which: str = "last") -> dict[str, Tensor]:
    """The weights of a run, without the record of its training."""
    path = folder / which / "model.safetensors"
    return seen.apart(load_file(path), path)[0]


def moments(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "last/optimizer.safetensors")


def assert_same(a: dict[str, Tensor], b: dict[str, Tensor]) -> None:
    """Bit for bit."""
    assert a.keys() == b.keys() and a
    assert [name for name in a if not torch.equal(a[name], b[name])] == []


def load_public(place: Path, draws: bool = True, writes: bool = False) -> UniFashion:
    torch.manual_seed(0)
    return train_phase1.load_public("tiny", place / "weights", draws=draws, writes=writes)


@contextmanager
def stopped_after(steps: int) -> Iterator[None]:
    """Within, a run is asked to stop after so many steps, as by Ctrl-C."""
    asked: list[training.Stop] = []
    born, zero_grad, count = training.Stop.__init__, torch.optim.AdamW.zero_grad, iter(range(1, 1000))

    def counted(optimizer: torch.optim.AdamW, **kw: bool) -> None:
        zero_grad(optimizer, **kw)
        if next(count) == steps:
            asked[-1].asked = True

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training.Stop, "__init__", lambda stop: (born(stop), asked.append(stop), None)[2])
        patch.setattr(torch.optim.AdamW, "zero_grad", counted)
        yield
    assert asked[-1].asked, "the run was not stopped"
