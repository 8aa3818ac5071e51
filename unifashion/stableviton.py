"""StableVITON (arXiv 2312.01725) and Paint-by-Example (arXiv 2211.13227) as published: try-on before any training of ours.

cloth photo (b,3,224,224) --CLIP, class token--> (b,1024) --exemplar--> context (b,1,768)
agnostic, mask, pose --scene--> (b,9,64,48);  cloth photo --VAE--> hint (b,4,64,48)
noise (b,4,64,48), scene, context, hint --sample--> latent --VAE--> picture (b,3,512,384)      (`denoiser`)

Paint-by-Example, from which StableVITON started, is the same without pose and hint: its scene is (b,5,64,48).
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from unifashion.blocks import UNetConfig
from unifashion.clip import L14, ImageConfig, ImageTower
from unifashion.config import DenoiserConfig
from unifashion.denoiser import Denoiser
from unifashion.exemplar import Exemplar, ExemplarConfig
from unifashion.garment import GarmentEncoder
from unifashion.unet import UNet
from unifashion.vae import VAE


@dataclass(frozen=True)
class StableVITONConfig(DenoiserConfig):
    dresses: bool = True  # StableVITON: with garment encoder and pose. False: Paint-by-Example
    image: ImageConfig = L14.image
    exemplar: ExemplarConfig = ExemplarConfig()
    guidance: float = 1.0  # StableVITON's inference.py has none, in Paint-by-Example's test.sh it is 5

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.exemplar.dim != self.image.dim:
            raise ValueError(f"exemplar.dim is {self.exemplar.dim}, image.dim is {self.image.dim}")
        if self.exemplar.context_dim != self.unet.context_dim:
            raise ValueError(
                f"exemplar.context_dim is {self.exemplar.context_dim}, unet.context_dim is {self.unet.context_dim}"
            )

    @property
    def posed(self) -> bool:
        return self.dresses


PUBLISHED = {
    "stableviton": StableVITONConfig(),
    "paint-by-example": StableVITONConfig(unet=UNetConfig(in_channels=9), dresses=False, guidance=5.0),
}


class StableVITON(Denoiser):
    def __init__(self, cfg: StableVITONConfig) -> None:
        super().__init__()
        self.cfg = cfg
        self.image = ImageTower(cfg.image)
        self.exemplar = Exemplar(cfg.exemplar)
        self.null_context = nn.Parameter(torch.zeros(1, 1, cfg.unet.context_dim))
        self.vae = VAE(cfg.vae)
        self.unet = UNet(cfg.unet)
        if cfg.dresses:
            self.garment = GarmentEncoder(cfg.unet, cfg.vae.latent_channels)

    def see(self, picture: Tensor) -> Tensor:
        """picture (b,3,224,224) normalised as CLIP's (`preprocess.squashed_pixels`, `squashed_image`) -> (b,1024)."""
        return self.image.pooled(picture.to(self.dtype))

    def context(self, seen: Tensor) -> Tensor:
        """seen (b,1024) from `see` -> context (b,1,768) for the U-Net and the garment encoder."""
        return self.exemplar(seen)
