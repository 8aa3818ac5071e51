"""Try-on from files to files: what is read and how, drawing, and pasting what was drawn into the photograph.

The tensors that a try-on starts from are made here for training, `infer.py` and `eval`, so they are the same.
"""

import argparse
import os
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps, ImageStat
from torch import Tensor
from tqdm import tqdm

from unifashion import UserError
from unifashion.config import DenoiserConfig, UniFashionConfig
from unifashion.model import UniFashion
from unifashion.preprocess import (
    check_png_path,
    crop_back,
    keep_mask,
    latent_mask,
    mask_from_box,
    mask_from_file,
    pad_to_ratio,
    paste,
    qformer_image,
    read_image,
    squashed_image,
    squashed_pixels,
    to_uint8,
    torso_mask,
    unet_image,
)
from unifashion.stableviton import StableVITON, StableVITONConfig
from unifashion.tokenizers import WordPiece, read_query
from unifashion.training import seeded

GREY = (128, 128, 128)  # of the hole, as in VITON-HD's agnostic pictures


def unet_picture(image: Image.Image, cfg: DenoiserConfig, fill: int = 255) -> Tensor:
    """RGB of any shape -> (3,512,384) in [-1,1] for the VAE, padded to 3:4 with `fill`."""
    return unet_image(pad_to_ratio(image, cfg.picture[1] / cfg.picture[0], fill)[0], cfg.picture)


def person_tensors(
    person: Image.Image, mask: Image.Image, pose: Image.Image | None, cfg: DenoiserConfig
) -> dict[str, Tensor]:
    """
    What is known of the person (FULL sizes). Pictures of other shapes than 3:4 are padded, and the padding is kept.

    person, pose  RGB; mask  L, 255 = repaint; all of one size
    -> agnostic   (3,512,384) in [-1,1], the person with a grey hole
       keep       (1,64,48) in [0,1], 1 = keep, 0 = repaint
       pose       (3,512,384) in [-1,1], the densepose picture; only if given
    """
    # The hole is cut before anything is resized: afterwards its edge would show the garment that was worn.
    agnostic = Image.composite(
        Image.new("RGB", person.size, GREY), person, mask.point(lambda x: 255 * (x >= 128))
    )
    keep = keep_mask(pad_to_ratio(mask, cfg.picture[1] / cfg.picture[0], fill=0)[0], cfg.picture)
    tensors = {
        "agnostic": unet_picture(agnostic, cfg),
        "keep": latent_mask(keep, cfg.vae.factor),
    }
    if pose is not None:
        tensors["pose"] = unet_picture(pose, cfg, fill=0)
    return tensors


def garment_tensors(garment: Image.Image, is_sketch: bool, cfg: UniFashionConfig) -> dict[str, Tensor]:
    """
    One garment as the garment encoder and as the Q-Former see it: whole, padded with the white around a photo, or with the
    black around a drawing (a sketch, bright lines on black).

    garment RGB -> hint (3,512,384) in [-1,1], picture (3,224,224) with CLIP's mean and deviation
    """
    fill = 0 if is_sketch else 255
    return {
        "hint": unet_picture(garment, cfg, fill),
        "picture": qformer_image(garment, cfg.vit.image_size[0], fill=fill),
    }


def exemplar_tensors(cloth: Image.Image, cfg: StableVITONConfig) -> dict[str, Tensor]:
    """
    A cloth photo as the published models see it, each in the way of its own code; only that StableVITON's squashes to 3:4
    what is padded here.

    cloth RGB -> picture (3,224,224) with CLIP's mean and deviation, and in StableVITON hint (3,512,384) in [-1,1]
    """
    if not cfg.dresses:
        return {"picture": squashed_image(cloth, cfg.image.image_size)}
    hint = unet_picture(cloth, cfg)
    return {"hint": hint, "picture": squashed_pixels(hint, cfg.image.image_size)}


# What `infer.py tryon` was given, and what it makes of it


def result_paths(args: argparse.Namespace) -> list[Path]:
    """out.png, out-1.png, out-2.png, ...: all of them can be written, none of them is an input."""
    outs = [args.out, *(args.out.with_stem(f"{args.out.stem}-{i}") for i in range(1, args.num))]
    inputs = (args.person, args.cloth, args.sketch, args.mask, args.pose)
    for out in outs:
        check_png_path(out)
        if out.exists() and any(path and os.path.exists(path) and out.samefile(path) for path in inputs):
            raise UserError(f"{out} is an input and would be overwritten: give --out another name")
    return outs


def read_mask(args: argparse.Namespace, size: tuple[int, int], notes: list[str]) -> tuple[Image.Image, str]:
    """-> the mask, L, of the person's (width, height), 255 = repaint; and where it is from."""
    if args.mask is not None:
        return mask_from_file(args.mask, size), str(args.mask)
    if args.box is not None:
        return mask_from_box(args.box, size), "box " + ",".join(map(str, args.box))
    mask = torso_mask(size)
    source = "torso box " + ",".join(map(str, mask.getbbox()))
    notes.append(f"no --mask and no --box: the {source} is repainted")
    return mask, source


def read_inputs(
    args: argparse.Namespace,
    person: Image.Image,
    mask: Image.Image,
    cfg: UniFashionConfig | StableVITONConfig,
    words: WordPiece | None,
    notes: list[str],
) -> dict[str, Tensor]:
    """
    `person_tensors`, and of the garment `garment_tensors` or, for a published model, `exemplar_tensors`, of what is asked for,
    and of a text ids and text_mask (t,): a batch of one. Only a text, which published models do not read, needs `words`.
    """
    if args.cloth:
        garment = read_image(args.cloth)
    else:  # lines on glass may be dark or bright: on the ground that shows them better
        grounds = [read_image(args.sketch, ground).convert("L") for ground in ("white", "black")]
        garment = max(grounds, key=lambda x: ImageStat.Stat(x).stddev[0])
        if len(set(garment.getextrema())) == 1:
            raise UserError(f"{args.sketch}: a sketch without a line in it")
        if ImageStat.Stat(garment).mean[0] > 127.5:
            garment = ImageOps.invert(garment)
            notes.append(
                f"{args.sketch} is dark on white: inverted, since the model knows sketches bright on black"
            )
        garment = garment.convert("RGB")
    pose = None
    if args.pose:
        pose = read_image(args.pose, background="black")
        if abs(pose.width * mask.height / (pose.height * mask.width) - 1) > 0.02:  # as masks
            sizes = f"{pose.width}x{pose.height} does not fit a person of {mask.width}x{mask.height}"
            raise UserError(f"{args.pose}: a pose of {sizes}")
        pose = pose.resize(mask.size)
    inputs = person_tensors(person, mask, pose, cfg)
    if isinstance(cfg, StableVITONConfig):
        inputs |= exemplar_tensors(garment, cfg)
        if cfg.posed and pose is None:
            notes.append("no --pose: in training StableVITON always had one, without it it may draw worse")
    else:
        inputs |= garment_tensors(garment, args.sketch is not None, cfg)
    inputs = {name: x[None] for name, x in inputs.items()}
    if args.text is not None:
        ids, mask, told = read_query(words, args.text, cfg.qformer.max_text, args.preset == "tiny")
        inputs["ids"], inputs["text_mask"] = ids, mask
        notes += told
    return inputs


def encode(
    model: UniFashion | StableVITON, inputs: dict[str, Tensor]
) -> tuple[Tensor, Tensor, Tensor | None]:
    """-> scene (1,9,y,x), context (1,32,768) and hint (1,4,y,x), as `objectives.tryon` has them; of Paint-by-Example no hint."""
    dtype = model.dtype
    x = {k: v.to(model.device, dtype if v.is_floating_point() else None) for k, v in inputs.items()}
    pose, hint = (model.vae.encode(x[name]) if name in x else None for name in ("pose", "hint"))
    scene = model.scene(model.vae.encode(x["agnostic"]), x["keep"], pose)
    text = [x[name] for name in ("ids", "text_mask") if name in x]
    return scene, model.context(model.see(x["picture"]), *text), hint


def draw(
    model: UniFashion | StableVITON, inputs: dict[str, Tensor], args: argparse.Namespace
) -> list[Tensor]:
    """
    `args.num` pictures (3,y,x), about [-1,1], float32 on the CPU. The noise of picture i is seeded by (seed, i).

    It is pure noise for every model. StableVITON's own inference starts from the person's latent in it, 7 % of it (t = 999):
    of the garment that is to be replaced, too.
    """
    shape = (model.cfg.vae.latent_channels, *model.cfg.latent)
    noise = torch.stack(
        [torch.randn(shape, generator=seeded("tryon", args.seed, i)) for i in range(args.num)]
    )
    conditions = [x if x is None else x.expand(args.num, *x.shape[1:]) for x in encode(model, inputs)]
    latents = model.sample(noise.to(model.device), *conditions, args.steps, args.sampler, args.guidance)
    # The last latent is all we need; to look at one in between would wait for the device at every step.
    *_, latent = tqdm(latents, total=args.steps, desc="sampling", unit="step", disable=args.quiet)
    if not latent.isfinite().all():
        raise UserError("the numbers overflow: --guidance is too high, or a file of weights is damaged")
    # One at a time: at full size the decoder needs more memory than the sampler.
    return [model.vae.decode(z[None].to(model.dtype))[0].float().cpu() for z in latent]


def pasted(
    picture: Tensor,
    person: Image.Image,
    mask: Image.Image,
    box: tuple[int, int, int, int],
    canvas: tuple[int, int],
) -> Image.Image:
    """What the network drew of the whole canvas -> the person, at its own size, with it where the mask is white."""
    drawn = crop_back(Image.fromarray(to_uint8(picture)), box, canvas)
    result = Image.fromarray(paste(np.array(person), np.array(drawn), np.array(mask)))
    profile = person.info.get("icc_profile") or b""
    if profile[16:20] == b"RGB ":  # without it, a phone's photograph would change its colours
        result.info["icc_profile"] = profile
    return result
