"""A small judge of ToyFashion pictures: which garment a person wears, and which pixels are garment.

    person (b,3,128,96) --middle rows--> (b,3,96,96) --CNN--> logits of six attributes, garment mask

It is trained on true renders of the training split and kept under runs/judge. The main colour is not among its
attributes: that has a rule of its own, `unifashion.data.toy.main_colour`. `score` puts both together for one picture.
"""

import hashlib
import inspect
import os
import re
import sys
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from tqdm import tqdm

from unifashion import UserError, feed, training
from unifashion.data import open_image, toy
from unifashion.data.texts import PATTERN_WORDS

ATTRIBUTES = ("category", "pattern", "second", "sleeve", "neckline", "length")
COLUMNS = ("colour", *ATTRIBUTES, "IoU", "PSNR")
HEIGHT, WIDTH = 128, 96
ROWS = slice(16, 112)  # no garment reaches higher or lower
GARMENT_LABELS = (5, 6, 7)  # upper, dress and coat of VITON-HD's image-parse-v3
STEPS, BATCH, LR = 1300, 32, 2e-3


def conv(c_in: int, c_out: int, stride: int = 1) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(c_in, c_out, 3, stride, padding=1, bias=False), nn.BatchNorm2d(c_out), nn.ReLU()
    )


class Judge(nn.Module):
    """An encoder with a linear head for each attribute; a decoder with skips, and the picture itself, for the mask."""

    def __init__(self) -> None:
        super().__init__()
        self.down = nn.ModuleList(
            [
                nn.Sequential(nn.PixelUnshuffle(2), conv(12, 32), conv(32, 32)),
                nn.Sequential(conv(32, 64, 2), conv(64, 64)),
                nn.Sequential(conv(64, 96, 2), conv(96, 96)),
                conv(96, 128, 2),
            ]
        )
        self.heads = nn.ModuleDict({k: nn.Linear(128 * 6 * 6, len(toy.ATTRIBUTES[k])) for k in ATTRIBUTES})
        self.up = nn.ModuleList([conv(128 + 96, 64), conv(64 + 64, 32), conv(32 + 32, 16)])
        self.fine = nn.Sequential(nn.Conv2d(16, 32, 3, padding=1), nn.PixelShuffle(2))
        self.mask = nn.Sequential(conv(8 + 3, 16), nn.Conv2d(16, 1, 3, padding=1))

    def forward(self, x: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        """x (b,3,96,96) in [-1,1] -> logits (b,values) of each attribute, logits (b,96,96) of the garment mask."""
        picture, skips = x, []
        for block in self.down:
            x = block(x)
            skips.append(x)
        flat = F.dropout(x.flatten(1), 0.2, self.training)
        for block, skip in zip(self.up, skips[-2::-1], strict=True):
            x = block(torch.cat([F.interpolate(x, scale_factor=2), skip], dim=1))
        mask = self.mask(torch.cat([self.fine(x), picture], dim=1))
        return {k: head(flat) for k, head in self.heads.items()}, mask[:, 0]

    @torch.no_grad()
    def read(self, pictures: np.ndarray) -> tuple[list[dict[str, str]], np.ndarray]:
        """Persons (b,h,w,3) uint8 of any size -> each one's attributes by name, and garment masks (b,h,w) bool."""
        size = pictures.shape[1:3]
        x = torch.from_numpy(pictures).permute(0, 3, 1, 2).float() / 127.5 - 1
        if size != (HEIGHT, WIDTH):
            x = F.interpolate(x, (HEIGHT, WIDTH), mode="bilinear", antialias=True)
        logits, middle = self(x[:, :, ROWS])
        mask = F.pad(middle, (0, 0, ROWS.start, HEIGHT - ROWS.stop), value=-20.0)
        if size != (HEIGHT, WIDTH):
            mask = F.interpolate(mask[:, None], size, mode="bilinear")[:, 0]
        values = {k: [toy.ATTRIBUTES[k][i] for i in v.argmax(1).tolist()] for k, v in logits.items()}
        names = [{k: values[k][i] for k in ATTRIBUTES} for i in range(len(pictures))]
        return names, (mask > 0).numpy()


def open_picture(path: Path, mode: str, resample: Image.Resampling) -> np.ndarray:
    image = open_image(path, mode)
    return np.asarray(image.resize((WIDTH, HEIGHT), resample) if image.size != (WIDTH, HEIGHT) else image)


def read_training_set(world: Path, quiet: bool) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """The training split's persons (n,96,96,3) uint8, garment masks (n,96,96) bool, attributes (n,), -100 = no second."""
    rows = toy.read_rows(world, "train")
    if not rows:
        raise UserError(
            f"{world} has nothing to train on, from which the judge learns: draw a world with --train"
        )
    folder = world / "vitonhd" / "train"
    pictures = np.empty((len(rows), ROWS.stop - ROWS.start, WIDTH, 3), np.uint8)
    masks = np.empty(pictures.shape[:3], bool)
    for i, row in enumerate(tqdm(rows, "reading persons for the judge", disable=quiet)):
        person = open_picture(folder / "image" / f"{row['id']}.jpg", "RGB", Image.Resampling.BOX)
        labels = open_picture(folder / "image-parse-v3" / f"{row['id']}.png", "P", Image.Resampling.NEAREST)
        pictures[i], masks[i] = person[ROWS], np.isin(labels, GARMENT_LABELS)[ROWS]
    targets = {k: torch.tensor([toy.ATTRIBUTES[k].index(r["garment"][k]) for r in rows]) for k in ATTRIBUTES}
    plain = torch.tensor([row["garment"]["pattern"] == "plain" for row in rows])
    targets["second"][plain] = -100
    return torch.from_numpy(pictures), torch.from_numpy(masks), targets


def soften(x: Tensor, dice: torch.Generator) -> Tensor:
    """Blur on half of (b,3,y,x), and grain: a network's pictures are softer than renders, and no other garments for it."""
    blur, grain = torch.rand(2, len(x), 1, 1, 1, generator=dice)
    blur = (2 * blur - 1).clamp(min=0)
    soft = F.avg_pool2d(F.pad(x, (1, 1, 1, 1), mode="replicate"), 3, 1)
    return torch.lerp(x, soft, blur) + 0.03 * grain * torch.randn(x.shape, generator=dice)


def train(world: Path, steps: int, quiet: bool) -> Judge:
    """Cross-entropy of the attributes and of the mask, on true renders of the training split alone."""
    pictures, masks, targets = read_training_set(world, quiet)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)  # weights and dropout; all else has its own generator
        judge = Judge().train()
        optimizer = torch.optim.AdamW(judge.parameters(), LR, weight_decay=0.02)
        order = feed.batch_order(len(pictures), min(BATCH, len(pictures)), 0, 0, steps)
        bar = tqdm(order, "training the judge", steps, mininterval=1, disable=quiet)
        for step, batch in enumerate(bar):
            for group in optimizer.param_groups:
                group["lr"] = LR * training.cosine(step, steps, warmup=min(50, steps))
            dice = training.seeded("judge", step)
            x = pictures[batch].permute(0, 3, 1, 2).float() / 127.5 - 1
            wanted = masks[batch].float()
            if torch.rand((), generator=dice) < 0.5:  # a mirrored garment has the same attributes
                x, wanted = x.flip(-1), wanted.flip(-1)
            logits, mask = judge(soften(x, dice))
            named = sum(F.cross_entropy(logits[k], targets[k][batch], ignore_index=-100) for k in ATTRIBUTES)
            covered = F.binary_cross_entropy_with_logits(mask, wanted)
            (named + 10 * covered).backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            if step % 10 == 0:
                bar.set_postfix(attributes=f"{named.item():.3f}", mask=f"{covered.item():.4f}")
    return judge.eval()


def fingerprint(world: Path, steps: int) -> str:
    """What the judge follows from: the steps of its training, the world's settings and first pictures, and this file."""
    code = inspect.getsource(sys.modules[__name__])
    h = hashlib.sha256(f"{steps} {(world / 'toy.json').read_text()} {code}".encode())
    for path in sorted((world / "vitonhd" / "train" / "image").glob("*"))[:16]:
        h.update(path.read_bytes())
    return h.hexdigest()[:16]


def trained_judge(world: Path, folder: Path, steps: int = STEPS, quiet: bool = False) -> tuple[Judge, str]:
    """The judge of this world, trained now unless `folder` has it -> (judge, fingerprint)."""
    key = fingerprint(world, steps)
    path = folder / f"{key}.safetensors"
    if path.exists():
        judge = Judge().eval()
        judge.load_state_dict(load_file(path))
        return judge, key
    judge = train(world, steps, quiet)
    folder.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{os.getpid()}.tmp")
    save_file(judge.state_dict(), temporary)
    temporary.replace(path)
    return judge, key


def told(condition: str, g: toy.Garment, text: str) -> set[str]:
    """
    The attributes of `g` that a condition tells, the colour among them.

    "cloth", a photo: all, the second colour only where there is a pattern. "sketch+text": category, sleeve, neckline and
    length are drawn; colours and pattern count where `text` has a word for them.
    """
    if condition == "cloth":
        return {"colour", *ATTRIBUTES} - ({"second"} if g.pattern == "plain" else set())
    words = [("plain", "solid")] if g.pattern == "plain" else PATTERN_WORDS[g.pattern]
    phrases = {
        "colour": [g.colour],
        "pattern": [phrase for kind in words for phrase in kind],
        "second": [] if g.pattern == "plain" else [g.second],
    }
    said = {
        k for k, v in phrases.items() if any(re.search(rf"\b{re.escape(phrase)}\b", text) for phrase in v)
    }
    return said | {"category", "sleeve", "neckline", "length"}


def score(
    picture: np.ndarray,
    truth: np.ndarray,
    garment: np.ndarray,
    g: toy.Garment,
    read: dict[str, str],
    found: np.ndarray,
) -> list[float]:
    """
    One picture's COLUMNS: 0 or 1 for colour and attributes, IoU in [0,1], PSNR in dB, 99 for an exact copy.

    picture, truth (h,w,3) uint8; garment (h,w) bool, the pixels of the true garment `g`; read, found from `Judge.read`.
    """
    error = np.square(picture[garment].astype(float) - truth[garment]).mean()
    psnr = min(99.0, 10 * np.log10(255**2 / max(error, 1e-9)))
    iou = (found & garment).sum() / (found | garment).sum()
    right = [read[k] == getattr(g, k) for k in ATTRIBUTES]
    return [float(x) for x in (toy.main_colour(picture, garment) == g.colour, *right, iou, psnr)]
