"""What a try-on starts from: pictures -> tensors. Training, `infer.py` and `eval` all make them here, so they are the same."""

from PIL import Image
from torch import Tensor

from unifashion.config import UniFashionConfig
from unifashion.preprocess import keep_mask, latent_mask, pad_to_ratio, qformer_image, unet_image

GREY = (128, 128, 128)  # of the hole, as in VITON-HD's agnostic pictures


def unet_picture(image: Image.Image, cfg: UniFashionConfig, fill: int = 255) -> Tensor:
    """RGB of any shape -> (3,512,384) in [-1,1] for the VAE, padded to 3:4 with `fill`."""
    return unet_image(pad_to_ratio(image, cfg.picture[1] / cfg.picture[0], fill)[0], cfg.picture)


def person_tensors(
    person: Image.Image, mask: Image.Image, pose: Image.Image | None, cfg: UniFashionConfig
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
