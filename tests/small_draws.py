"""A model that draws at once and badly: random weights for a preset "tiny" that is smaller still."""

from dataclasses import replace
from pathlib import Path

import pytest
from safetensors.torch import save_file

from tests.parity import randomise
from unifashion import runs
from unifashion.config import PRESETS, TINY
from unifashion.data import toy
from unifashion.model import UniFashion
from unifashion.tokenizers import build_vocab


def write_weights(folder: Path, patch: pytest.MonkeyPatch) -> Path:
    """Until `patch` is undone, the preset "tiny" reads 128x96 pictures at 64x48; `folder` gets its weights -> folder."""
    cfg = replace(
        TINY,
        vit=replace(TINY.vit, image_size=(64, 64), patch_size=16, depth=1),
        qformer=replace(TINY.qformer, depth=2, queries=4),
        unet=replace(TINY.unet, channel_mult=(1, 2, 2)),
        picture=(64, 48),
    )
    patch.setitem(PRESETS, "tiny", cfg)
    model = randomise(UniFashion(cfg), 0).float()
    for part in ("vit", "vae"):
        save_file(
            {k: v.contiguous() for k, v in getattr(model, part).state_dict().items()},
            folder / f"{part}.safetensors",
        )
    learned = runs.learned_state(
        model, ["qformer", "image_adapter", "style_adapter", "null_context", "unet", "garment"]
    )
    save_file({k: v.contiguous() for k, v in learned.items()}, folder / "model.safetensors")
    vocab = build_vocab([" ".join(toy.PALETTE)])
    (folder / "bert_vocab.txt").write_text("\n".join(vocab) + "\n")
    return folder
