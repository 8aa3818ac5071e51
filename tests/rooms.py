"""A folder to stand in for tests of infer.py: pictures, the weights of a small random model, and the command itself."""

import io
import struct
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageDraw
from safetensors.torch import save_file

import infer
from tests.parity import randomise
from unifashion.blocks import UNetConfig
from unifashion.config import PRESETS, UniFashionConfig
from unifashion.model import UniFashion
from unifashion.qformer import QFormerConfig
from unifashion.tokenizers import WordPiece, build_vocab
from unifashion.vae import VAEConfig
from unifashion.vit import ViTConfig

ROOT = Path(infer.__file__).parent
BAD_FILES = {
    "absent.png": "no such file",
    "folder.png": "not a file",
    "empty.png": "the file is empty",
    "letter.png": "not an image",
    "cut.jpg": "cannot be read as an image",
    "bomb.png": "more than 178 megapixels",
}
# Small enough that a try-on takes a third of a second, and of the tiny preset's kind: 3:4, every part there.
SMALL = UniFashionConfig(
    vit=ViTConfig(image_size=(28, 28), patch_size=14, dim=32, depth=2, heads=4, mlp_dim=48),
    qformer=QFormerConfig(
        400, 16, 12, queries=3, dim=24, depth=2, heads=4, mlp_dim=40, vision_dim=32, embed_dim=8
    ),
    vae=VAEConfig(channels=32, channel_mult=(1, 1, 2), res_blocks=1),
    unet=UNetConfig(
        channels=32, channel_mult=(1, 2, 2), attention_levels=(1,), res_blocks=1, heads=4, context_dim=40
    ),
    picture=(64, 48),
)


def furnish(room: Path, weights: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Stand in `room`, with a person, a cloth and weights; the tiny preset is SMALL until the test ends."""
    monkeypatch.setitem(PRESETS, "tiny", SMALL)
    monkeypatch.chdir(room)
    (room / "weights").symlink_to(weights)
    photo(room / "person.png", (90, 120), 1)
    photo(room / "cloth.png", (60, 80), 2)
    return room


def write_weights(folder: Path, cfg: UniFashionConfig) -> Path:
    """Random weights, none of them zero, in the files of the tiny preset -> folder."""
    state = randomise(UniFashion(cfg), 0).float().state_dict()
    for part in ("vit", "vae"):
        own = {k.removeprefix(f"{part}."): v for k, v in state.items() if k.startswith(f"{part}.")}
        save_file(own, folder / f"{part}.safetensors")
    save_file({k: v for k, v in state.items() if k[:4] not in ("vit.", "vae.")}, folder / "model.safetensors")
    (folder / "bert_vocab.txt").write_text("\n".join(build_vocab(["a red dress"])) + "\n")
    assert len(WordPiece(folder / "bert_vocab.txt")) <= cfg.qformer.vocab_size
    return folder


def tryon(
    room: Path, *argv: str, out: str = "out.png", preset: str | None = "tiny", quiet: bool = True
) -> int:
    """Run the command in the room with 2 steps; what argv does not name is the room's own."""
    given = [*argv]
    given += [] if "--person" in argv else ["--person", "person.png"]
    given += [] if "--cloth" in argv or "--sketch" in argv else ["--cloth", "cloth.png"]
    given += [] if "--steps" in argv else ["--steps", "2"]
    given += ["--preset", preset] if preset else []
    given += ["--quiet"] if quiet else []
    return infer.main(["tryon", *given, "--weights", str(room / "weights"), "--device", "cpu", "--out", out])


def command(*argv: object) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "infer.py", "tryon", *map(str, argv)], cwd=ROOT, capture_output=True, text=True
    )


def photo(path: Path, size: tuple[int, int], seed: int) -> Image.Image:
    """Coloured clouds, written without loss."""
    clouds = np.random.default_rng(seed).integers(0, 256, (5, 4, 3), dtype=np.uint8)
    image = Image.fromarray(clouds).resize(size, Image.Resampling.BICUBIC)
    image.save(path)
    return image


def lines(path: Path, size: tuple[int, int]) -> Image.Image:
    """A sketch, bright on black."""
    image = Image.new("L", size)
    draw = ImageDraw.Draw(image)
    draw.polygon(
        [(size[0] * x, size[1] * y) for x, y in ((0.3, 0.1), (0.7, 0.1), (0.9, 0.9), (0.1, 0.9))], outline=255
    )
    image.save(path)
    return image


def ellipse(path: Path, size: tuple[int, int]) -> Image.Image:
    """A mask: white = repaint."""
    image = Image.new("L", size)
    ImageDraw.Draw(image).ellipse((size[0] // 6, size[1] // 6, size[0] * 5 // 6, size[1] * 5 // 6), fill=255)
    image.save(path)
    return image


def pixels(path: Path) -> np.ndarray:
    with Image.open(path) as image:
        assert (image.format, image.mode) == ("PNG", "RGB")
        return np.array(image)


def write_bad_files(room: Path) -> None:
    """What BAD_FILES names, and whole.png, in the room."""
    (room / "folder.png").mkdir()
    (room / "empty.png").touch()
    (room / "letter.png").write_text("Dear Sir or Madam")
    jpeg = io.BytesIO()
    photo(room / "whole.png", (90, 120), 1).save(jpeg, "JPEG")
    (room / "cut.jpg").write_bytes(jpeg.getvalue()[: len(jpeg.getvalue()) // 2])
    header = b"IHDR" + struct.pack(">IIBBBBB", 60000, 60000, 8, 2, 0, 0, 0)
    start = b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + header + struct.pack(">I", zlib.crc32(header))
    (room / "bomb.png").write_bytes(start + struct.pack(">I", 9) + b"IDAT")
