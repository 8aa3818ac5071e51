"""From files to a model: the public weights of a preset, and what UniFashion learned on top of them."""

from pathlib import Path

import torch

from unifashion import UserError
from unifashion.config import PRESETS
from unifashion.model import UniFashion
from unifashion.tokenizers import WordPiece
from unifashion.training import load_learned
from weights.rename import load_into, read_checkpoint

HERE = Path(__file__).parent
FOLDERS = {"tiny": HERE / "tiny", "full": HERE / "files"}


def folder_of(preset: str, folder: Path | None = None) -> Path:
    """Where the weights of a preset are; raises UserError for a preset that does not exist."""
    if preset not in PRESETS:
        raise UserError(f"unknown preset {preset!r}: it is one of {', '.join(PRESETS)}")
    return folder or FOLDERS[preset]


def wanted(folder: Path, name: str) -> Path:
    path = folder / name
    if not path.exists():
        raise UserError(f"{path} is missing: weights/README.md says where to get it and where to put it")
    return path


def tokenizer(preset: str, folder: Path | None = None) -> WordPiece:
    """The Q-Former's tokenizer."""
    return WordPiece(wanted(folder_of(preset, folder), "bert_vocab.txt"))


def load_public(preset: str, folder: Path | None = None) -> UniFashion:
    """
    The model as it is before UniFashion's own training, on the CPU in float32.

    TINY: the stand-ins made by weights/tiny/pretrain.py (ViT and VAE); the rest is random.
    """
    folder = folder_of(preset, folder)
    model = UniFashion(PRESETS[preset])
    for part in ("vit", "vae"):
        load_into(getattr(model, part), read_checkpoint(wanted(folder, f"{part}.safetensors")), {"*": "*"})
    return model.float()


def load_unifashion(
    preset: str, folder: Path | None = None, device: str = "cpu", dtype: torch.dtype = torch.float32
) -> UniFashion:
    """The whole trained model, ready for inference."""
    folder = folder_of(preset, folder)
    model = load_public(preset, folder)
    found = load_learned(model, wanted(folder, "model.safetensors"))
    for module in ("qformer", "image_adapter", "null_context", "unet", "garment"):
        if module not in found:
            raise UserError(f"{folder / 'model.safetensors'} holds no {module}: its training is not finished")
    return model.to(device, dtype).eval().requires_grad_(False)
