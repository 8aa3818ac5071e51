"""Persons dressed by the model, for evaluations: items of a data set -> tensors -> pictures of the persons' own size.

    person of item i, garment of item j --read--> tensors --draw--> person i in garment j, before pasting

`read` needs no model and may run in threads; `draw` takes many at a time. Both see the person with a hole where the mask is:
what was worn there cannot reach the result.
"""

from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import default_collate

from unifashion import UserError, training
from unifashion.config import UniFashionConfig
from unifashion.data.mgd import MGD
from unifashion.data.vitonhd import VITONHD
from unifashion.model import UniFashion
from unifashion.preprocess import crop_back, pad_to_ratio, to_uint8
from unifashion.tokenizers import WordPiece, blip_caption
from unifashion.tryon import garment_tensors, person_tensors, unet_picture

Box = tuple[int, int, int, int]


class Setting(NamedTuple):
    sampler: str
    steps: int
    guidance: float

    def __str__(self) -> str:
        return f"{self.sampler} {self.steps}, guidance {self.guidance:g}"


class Canvas(NamedTuple):
    """Where a picture lies on the 3:4 canvas that the network draws: box (x0, y0, x1, y1) in a canvas of (width, height)."""

    box: Box
    size: tuple[int, int]


class Input(NamedTuple):
    tensors: dict[str, Tensor]  # of `tryon`, FULL sizes there; of no condition without the garment's
    text: str | None
    canvas: Canvas


def read(data: VITONHD | MGD, i: int, j: int, condition: str | None, cfg: UniFashionConfig) -> Input:
    """The person of item i and the garment of item j. condition: "cloth", "sketch+text", or None for neither."""
    item = data[i]
    tensors = person_tensors(item["person"], item["mask"], item["pose"], cfg)
    text, canvas = None, canvas_of(item["person"], cfg)
    if condition is not None:
        garment, drawn = item if i == j else data[j], condition == "sketch+text"
        text = garment["text"] if drawn else None
        tensors |= garment_tensors(
            garment["sketch"].convert("RGB") if drawn else garment["cloth"], drawn, cfg
        )
    return Input(tensors, text, canvas)


@torch.no_grad()
def draw(
    model: UniFashion, words: WordPiece, inputs: list[Input], s: Setting, seed: int, indices: list[int]
) -> list[np.ndarray]:
    """
    Inputs of one condition -> (h,w,3) uint8 each, of its person's size.

    The noise is a function of (seed, index): the same for all conditions, settings and batch sizes. Raises UserError if the
    numbers overflow.
    """
    x = {k: v.to(model.null_context) for k, v in default_collate([i.tensors for i in inputs]).items()}
    scene = model.scene(model.vae.encode(x["agnostic"]), x["keep"], model.vae.encode(x["pose"]))
    if "hint" in x:
        texts = [blip_caption(i.text) for i in inputs if i.text is not None]
        ids = words.encode(texts, model.cfg.qformer.max_text) if texts else ()
        context = model.context(model.see(x["picture"]), *(t.to(model.device) for t in ids))
        hint, guidance = model.vae.encode(x["hint"]), s.guidance
    else:  # null context and no garment; between twice the same, guidance is nothing
        context, hint, guidance = model.null_context.expand(len(inputs), -1, -1), None, 1.0
    shape, seeds = (model.cfg.vae.latent_channels, *model.cfg.latent), [("eval", seed, i) for i in indices]
    noise = torch.stack([torch.randn(shape, generator=training.seeded(*key)) for key in seeds])
    *_, latent = model.sample(noise.to(model.device), scene, context, hint, s.steps, s.sampler, guidance)
    if not latent.isfinite().all():
        raise UserError("the numbers overflow: --guidance is too high, or a file of weights is damaged")
    return decode(model, latent, [i.canvas for i in inputs])


@torch.no_grad()
def through_vae(model: UniFashion, pictures: list[Image.Image]) -> list[np.ndarray]:
    """Pictures as their own latents show them: what no output can be expected to beat."""
    x = torch.stack([unet_picture(picture, model.cfg) for picture in pictures]).to(model.null_context)
    return decode(model, model.vae.encode(x), [canvas_of(picture, model.cfg) for picture in pictures])


def decode(model: UniFashion, latent: Tensor, canvases: list[Canvas]) -> list[np.ndarray]:
    """Latents (b,4,y,x) -> pictures (h,w,3) uint8, each of the size that its canvas has room for."""
    drawn = [Image.fromarray(to_uint8(x)) for x in model.vae.decode(latent.to(model.null_context))]
    return [np.asarray(crop_back(x, *canvas)) for x, canvas in zip(drawn, canvases, strict=True)]


def canvas_of(picture: Image.Image, cfg: UniFashionConfig) -> Canvas:
    canvas, box = pad_to_ratio(picture, cfg.picture[1] / cfg.picture[0])
    return Canvas(box, canvas.size)
