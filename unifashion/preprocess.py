"""Pictures to tensors and back: reading, padding, resizing, normalising, masks, pasting, writing. No networks.

Sizes follow their owners: (width, height) for Pillow images, (h, w) for tensors.
"""

import math
import os
import warnings
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from unifashion import UserError

MAX_PIXELS = 178_000_000  # the size at which Pillow too calls a file a decompression bomb

CLIP_MEAN = torch.tensor([0.48145466, 0.4578275, 0.40821073]).view(3, 1, 1)
CLIP_STD = torch.tensor([0.26862954, 0.26130258, 0.27577711]).view(3, 1, 1)

# Fractions (x0, y0, x1, y1) of the picture: neck to hips and both arms of a person photographed from the knees or the
# hips up, as in VITON-HD. Set on seven such photographs: it spares the face in six and holds the hem in all.
TORSO_BOX = (0.12, 0.27, 0.88, 0.86)


# Reading


def read_image(path: str | Path, background: str = "white") -> Image.Image:
    """The picture at `path` as 8-bit RGB: upright (EXIF), first frame, transparency laid on `background`.

    Raises UserError, naming the file, for what is missing, unreadable, empty, truncated, no image, or has more than
    `MAX_PIXELS` pixels (told from the header, before decoding).
    """
    path = Path(path)
    if not os.path.isfile(path):
        raise UserError(f"{path}: {'not a file' if os.path.exists(path) else 'no such file'}")
    if os.path.getsize(path) == 0:
        raise UserError(f"{path}: the file is empty")
    try:
        with warnings.catch_warnings():
            # Pillow warns of large pictures and of odd metadata: both are fine.
            warnings.simplefilter("ignore")
            with Image.open(path) as image:
                if image.width * image.height > MAX_PIXELS:
                    raise Image.DecompressionBombError
                image.load()
                try:
                    upright = ImageOps.exif_transpose(image)
                except Exception:  # the pixels are sound, what is said about them is not
                    upright = image
                return _to_rgb(upright, background)
    except Image.DecompressionBombError as error:
        raise UserError(f"{path}: more than {MAX_PIXELS // 10**6} megapixels, not read") from error
    except UnidentifiedImageError as error:
        raise UserError(f"{path}: not an image in a known format") from error
    except Exception as error:  # a damaged file can make a decoder raise almost anything
        raise UserError(f"{path}: cannot be read as an image ({error})") from error


def _to_rgb(image: Image.Image, background: str) -> Image.Image:
    if image.mode.startswith("I") or image.mode == "F":
        # Pillow's own conversion clips at 255: nearly all of a 16-bit picture would turn white.
        values, top = np.asarray(image).astype(np.float32), 1 if image.mode == "F" else 65535
        if not (values.min() >= 0 and values.max() <= top):
            raise ValueError(f"pixel values outside 0..{top}")
        image = Image.fromarray((values * (255 / top)).round().astype(np.uint8))
    if image.has_transparency_data:
        image, profile = image.convert("RGBA"), image.info.get("icc_profile")
        image = Image.alpha_composite(Image.new("RGBA", image.size, background), image)
        image.info["icc_profile"] = profile
    return image.convert("RGB")


# What the Q-Former's image tower reads


def qformer_image(image: Image.Image, size: int = 224, ratio: float = 1.0, fill: int = 255) -> Tensor:
    """RGB image -> (3,size,size) float32, normalised with CLIP's mean and standard deviation.

    The short side is padded with `fill` (0..255) until long / short is `ratio`, resized to `size` (bicubic), and the
    middle cut out. Ratio 1 on white shows the whole garment; ratio 1.25 on black is `targetpad_transform` of the
    official code (src/data_utils.py), which cuts a tenth off either end of a tall picture.
    """
    image = _bounded(image)
    short, long = min(image.size), max(image.size)
    if long / short >= ratio:
        # Truncated to whole pixels on both sides, as the official code does: up to 2 pixels short of the ratio.
        x, y = (int(max((long / ratio - side) / 2, 0)) for side in image.size)
        image = ImageOps.expand(image, (x, y, x, y), fill=(fill, fill, fill))
    return _middle(image, size)


def _bounded(image: Image.Image) -> Image.Image:
    """A panorama padded to a square would not fit in memory."""
    if max(image.size) > 8192:
        image = image.copy()
        image.thumbnail((8192, 8192))
    return image


def _middle(image: Image.Image, size: int) -> Tensor:
    short = min(image.size)
    image = image.resize(tuple(size * side // short for side in image.size), Image.Resampling.BICUBIC)
    left, top = (round((side - size) / 2) for side in image.size)
    return _for_clip(image.crop((left, top, left + size, top + size)))


def _for_clip(image: Image.Image) -> Tensor:
    return (torch.from_numpy(np.array(image)).permute(2, 0, 1) / 255 - CLIP_MEAN) / CLIP_STD


# What CLIP's own image tower reads


def clip_image(image: Image.Image, size: int = 224) -> Tensor:
    """RGB image -> (3,size,size) float32, normalised with CLIP's mean and standard deviation, as OpenAI's `preprocess` does it.

    The short side is resized to `size` (bicubic) and the middle cut out: the ends of a tall picture are not seen. Raises
    UserError for a strip so long and thin that the resized one would be enormous.
    """
    if size**2 * max(image.size) > MAX_PIXELS * min(image.size):
        raise UserError(f"a picture of {image.width}x{image.height} pixels is too long and thin")
    return _middle(image, size)


def llava_image(image: Image.Image, size: int = 336) -> Tensor:
    """RGB image -> (3,size,size) float32, normalised with CLIP's mean and standard deviation, as LLaVA-1.5 reads it.

    All of it is seen: padded to a square with CLIP's mean colour, which is 0 afterwards but for the rounding (`expand2square`
    of the official code, image_aspect_ratio "pad"), and resized (bicubic).
    """
    mean = tuple(int(255 * level) for level in CLIP_MEAN.flatten().tolist())
    square, _ = pad_to_ratio(_bounded(image), 1, mean)
    return _middle(square, size)


# What BLIP-2 reads, and CLIP's image tower in Paint-by-Example and in StableVITON: the whole picture, squashed to a square


def squashed_image(image: Image.Image, size: int = 224) -> Tensor:
    """RGB image -> (3,size,size) float32, normalised with CLIP's mean and deviation, as BLIP-2 and Paint-by-Example do it: bicubic."""
    return _for_clip(image.resize((size, size), Image.Resampling.BICUBIC))


def squashed_pixels(pixels: Tensor, size: int = 224) -> Tensor:
    """(3,h,w) in [-1,1], from `unet_image` -> (3,size,size), normalised likewise, as StableVITON does it: not from the picture
    but from what its VAE reads, bilinear without antialiasing."""
    pixels = F.interpolate(pixels[None], (size, size), mode="bilinear", align_corners=False)[0]
    return ((pixels + 1) / 2 - CLIP_MEAN) / CLIP_STD


# What the U-Net side reads (StableVITON's dataset.py)


def unet_image(image: Image.Image, size: tuple[int, int]) -> Tensor:
    """RGB image -> (3,h,w) float32 in [-1,1], squashed to `size` = (h, w): bring it to the ratio first (`pad_to_ratio`)."""
    return _resize(image, size) / 127.5 - 1


def keep_mask(mask: Image.Image, size: tuple[int, int]) -> Tensor:
    """L image, white = repaint -> (1,h,w) float32 in [0,1], 1 = keep, 0 = repaint, with soft edges from the resizing."""
    return (255 - _resize(_binary(mask), size)) / 255


def latent_mask(keep: Tensor, factor: int) -> Tensor:
    """Keep mask (1,h,w) -> (1,h/factor,w/factor), bilinear without antialiasing, not binarised (Paint-by-Example)."""
    size = (keep.shape[1] // factor, keep.shape[2] // factor)
    return F.interpolate(keep[None], size, mode="bilinear", align_corners=False)[0]


def _resize(image: Image.Image, size: tuple[int, int]) -> Tensor:
    """RGB or L image -> (c,h,w) float32 of whole levels 0..255.

    To half the size (VITON-HD's 1024x768 to 512x384) and up: bilinear on the four nearest pixels, in OpenCV's own
    fixed-point arithmetic, since that is what StableVITON was trained on. Smaller still, that would skip pixels and
    make fabrics shimmer: Pillow's antialiased bilinear then.
    """
    height, width = size
    if image.height > 2 * height or image.width > 2 * width:
        image = image.resize((width, height), Image.Resampling.BILINEAR)
    pixels = np.array(image, dtype=np.int32).reshape(image.height, image.width, -1)
    low, high, w_low, w_high = _neighbours(image.width, width)
    rows = (pixels[:, low] * w_low[:, None] + pixels[:, high] * w_high[:, None]) >> 4
    low, high, w_low, w_high = _neighbours(image.height, height)
    levels = (rows[low] * w_low[:, None, None] >> 16) + (rows[high] * w_high[:, None, None] >> 16) + 2 >> 2
    return torch.from_numpy(levels).permute(2, 0, 1).float()


def _neighbours(source: int, target: int) -> tuple[np.ndarray, ...]:
    """For each of `target` pixels: the two pixels of `source` around its centre, and their weights in units of 1/2048."""
    centre = ((np.arange(target) + 0.5) * (source / target) - 0.5).astype(np.float32)
    low = np.floor(centre)
    w_high = np.rint((centre - low) * 2048).astype(np.int32)
    low, high = (np.clip(index, 0, source - 1).astype(np.int32) for index in (low, low + 1))
    return low, high, 2048 - w_high, w_high


# Any aspect ratio through a 3:4 network and back


def pad_to_ratio(
    image: Image.Image, ratio: float = 3 / 4, fill: int | tuple[int, ...] = 255
) -> tuple[Image.Image, tuple[int, int, int, int]]:
    """RGB or L image -> the image centred on a canvas of width / height = `ratio`, and the box it takes there.

    `fill` is a level 0..255, or one of each band; a mask wants 0 (nothing to repaint there). The box is (x0, y0, x1, y1) in canvas pixels.
    Raises UserError for a strip so long and thin that the canvas would be enormous.
    """
    width, height = (
        max(image.width, round(image.height * ratio)),
        max(image.height, round(image.width / ratio)),
    )
    if width * height > 4 * MAX_PIXELS:
        raise UserError(f"a picture of {image.width}x{image.height} pixels is too long and thin")
    x, y = (width - image.width) // 2, (height - image.height) // 2
    colour = fill if isinstance(fill, tuple) else (fill,) * len(image.getbands())
    canvas = Image.new(image.mode, (width, height), colour)
    canvas.paste(image, (x, y))
    return canvas, (x, y, x + image.width, y + image.height)


def crop_back(image: Image.Image, box: tuple[int, int, int, int], canvas: tuple[int, int]) -> Image.Image:
    """Undo `pad_to_ratio`: what a network made of a canvas of (width, height) `canvas`, at any scale -> the box of it.

    The result has the size of the image that was padded, and its pixels lie where they lay there. Bicubic; at scale 1
    the pixels are unchanged.
    """
    region = tuple(
        edge * side / whole for edge, side, whole in zip(box, image.size * 2, canvas * 2, strict=True)
    )
    return image.resize((box[2] - box[0], box[3] - box[1]), Image.Resampling.BICUBIC, box=region)


# Masks for try-on: L images of the person's (width, height), 255 = repaint, 0 = keep


def mask_from_file(path: str | Path, size: tuple[int, int]) -> Image.Image:
    """The mask at `path`, white = repaint, black or transparent = keep, brought to `size`.

    Raises UserError for an aspect ratio more than 2 % off, for nothing to repaint and for nothing to keep.
    """
    mask = read_image(path, background="black").convert("L")
    if abs(mask.width * size[1] / (mask.height * size[0]) - 1) > 0.02:
        raise UserError(
            f"{path}: a mask of {mask.width}x{mask.height} does not fit a picture of {size[0]}x{size[1]}"
        )
    return _checked(_binary(mask.resize(size, Image.Resampling.BILINEAR)), f"{path}: the mask")


def mask_from_box(box: tuple[int, int, int, int], size: tuple[int, int]) -> Image.Image:
    """A mask that repaints the pixels x0 <= x < x1, y0 <= y < y1. Raises UserError when they are not a part of `size`."""
    x0, y0, x1, y1 = box
    name = f"the box {x0},{y0},{x1},{y1}"
    if x0 >= x1 or y0 >= y1:
        raise UserError(f"{name} is empty: give left,top,right,bottom")
    if x0 < 0 or y0 < 0 or x1 > size[0] or y1 > size[1]:
        raise UserError(f"{name} is not inside the picture of {size[0]}x{size[1]} pixels")
    mask = Image.new("L", size, 0)
    mask.paste(255, box)
    return _checked(mask, name)


def torso_mask(size: tuple[int, int]) -> Image.Image:
    """The mask used when none is given: `TORSO_BOX` of the picture."""
    x0, y0, x1, y1 = (fraction * side for fraction, side in zip(TORSO_BOX, size * 2, strict=True))
    return mask_from_box((math.floor(x0), math.floor(y0), math.ceil(x1), math.ceil(y1)), size)


def _binary(mask: Image.Image) -> Image.Image:
    return mask.point(lambda level: 255 if level >= 128 else 0)


def _checked(mask: Image.Image, name: str) -> Image.Image:
    low, high = mask.getextrema()
    if high == 0:
        raise UserError(f"{name} is all black: nothing to repaint (white = repaint)")
    if low == 255:
        raise UserError(
            f"{name} covers the whole picture: nothing of the person would be kept (white = repaint)"
        )
    return mask


# Results


def to_uint8(pixels: Tensor) -> np.ndarray:
    """(3,h,w) in [-1,1], clamped -> (h,w,3) uint8, to the nearest level.

    The inverse of x / 127.5 - 1, exact on all 256 levels. StableVITON truncates: half a level darker on average.
    """
    levels = ((pixels.detach().float().clamp(-1, 1) + 1) * 127.5).round()
    return levels.to(torch.uint8).permute(1, 2, 0).cpu().numpy()


def paste(person: np.ndarray, generated: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """`generated` where `mask` is 255, the `person`'s own pixels elsewhere, bit for bit.

    person, generated (h,w,3) and mask (h,w), all uint8 -> (h,w,3). A hard edge, unlike StableVITON's `--repaint`: its
    soft mask also changes pixels that the user asked to keep.
    """
    if not person.shape == generated.shape == (*mask.shape, 3):
        raise ValueError(f"shapes differ: {person.shape}, {generated.shape}, {mask.shape}")
    return np.where(mask[..., None] == 255, generated, person)


def check_png_path(path: str | Path) -> None:
    """Raise UserError unless a PNG can be written at `path`: worth asking before minutes of sampling."""
    path = Path(path)
    try:
        os.stat(path)
    except FileNotFoundError:
        pass
    except OSError as error:  # a name that is too long
        raise UserError(f"{path}: {error.strerror}") from None
    if path.suffix.lower() != ".png":
        raise UserError(f"{path}: pictures are written as PNG, give a name that ends in .png")
    if path.is_dir():
        raise UserError(f"{path}: is a folder")
    if not path.parent.is_dir():
        raise UserError(f"{path}: there is no folder {path.parent}")
    if not os.access(path.parent, os.W_OK):
        raise UserError(f"{path}: the folder {path.parent} cannot be written to")


def save_png(image: Image.Image, path: str | Path) -> None:
    """Write `image` at `path` whole or not at all: under a temporary name beside it, then renamed.

    Raises UserError as `check_png_path` does, and when the writing itself fails.
    """
    check_png_path(path)
    temporary = Path(path).with_name(f".{os.getpid()}.png.tmp")
    try:
        image.save(temporary, "PNG")
        os.replace(temporary, path)
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error.strerror or error})") from error
    finally:
        temporary.unlink(missing_ok=True)
