"""CLIP-S of pictures and their texts: how near CLIP sees them to each other.

    a pair                    100 cos(image, text)                      `pair_scores`, of which confidence intervals are made
    CLIP-S, the papers'       max(mean of the pairs, 0)                 `clip_s`, number for number as torchmetrics computes it

The papers' 28 to 31 are of this scale; CLIPScore as Hessel et al. (2021) defined it is the mean of 2.5 max(cos, 0). Model, crop and text length belong to the number: here ViT-L/14, torchmetrics'
default, which sees the middle square of a picture and 77 tokens. (MGD's own code takes OpenCLIP's ViT-H/14 and the inpainted
box.) Pairs that are clipped before their mean is taken give a third number, which nobody means.
"""

from collections.abc import Sequence
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader
from tqdm import tqdm

from unifashion.clip import CLIP
from unifashion.preprocess import clip_image, read_image
from unifashion.tokenizers import CLIPTokenizer


@torch.no_grad()
def pair_scores(
    model: CLIP,
    tokenizer: CLIPTokenizer,
    pictures: Sequence[Path | Image.Image],
    texts: Sequence[str],
    batch: int = 64,
    workers: int = 0,
    quiet: bool = False,
) -> Tensor:
    """n pictures, and n texts in their order -> (n,) from -100 to 100, on the CPU, computed where the model is.

    `workers` processes read pictures while others are looked at; without any, one after the other. Raises UserError for a
    picture that cannot be read (from a worker as `training.run` expects it), ValueError for different counts and for none.
    """
    if len(pictures) != len(texts) or not texts:
        raise ValueError(f"{len(pictures)} pictures and {len(texts)} texts, wanted as many of both, and some")
    weight, cfg = model.image_proj.weight, model.cfg
    reader = DataLoader(
        pictures, batch, num_workers=workers, collate_fn=partial(_pixels, size=cfg.image.image_size)
    )
    scores = []
    with tqdm(total=len(texts), desc="CLIP-S", unit="pair", disable=quiet) as bar:
        for start, pixels in zip(range(0, len(texts), batch), reader, strict=True):
            ids = tokenizer.encode(texts[start : start + batch], cfg.text.max_positions)
            images = model.encode_image(pixels.to(weight.device, weight.dtype))
            scores.append(100 * cosines(images, model.encode_text(ids.to(weight.device))))
            bar.update(len(ids))
    return torch.cat(scores).cpu()


def cosines(images: Tensor, texts: Tensor) -> Tensor:
    """images (n,d) and texts (n,d), of any length -> (n,), row by row, in float32 at least."""
    wide = torch.promote_types(images.dtype, torch.float32)
    return (F.normalize(images.to(wide), dim=-1) * F.normalize(texts.to(wide), dim=-1)).sum(-1)


def clip_s(scores: Tensor) -> float:
    """`pair_scores` (n,) -> CLIP-S, from 0 to 100. The mean is clipped at 0, not the pairs."""
    return max(scores.double().mean().item(), 0.0)


def _pixels(pictures: list[Path | Image.Image], size: int) -> Tensor:
    return torch.stack(
        [clip_image(p if isinstance(p, Image.Image) else read_image(p), size) for p in pictures]
    )
