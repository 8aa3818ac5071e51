"""How large the networks are that `eval.speed` times, and how much they are given to do."""

from dataclasses import dataclass, replace

from unifashion.blocks import UNetConfig
from unifashion.clip import ImageConfig
from unifashion.config import FULL, TINY, UniFashionConfig
from unifashion.exemplar import ExemplarConfig
from unifashion.llama import LlamaConfig
from unifashion.qformer import QFormerConfig
from unifashion.stableviton import PUBLISHED, StableVITONConfig
from unifashion.vae import VAEConfig
from unifashion.vit import ViTConfig


@dataclass(frozen=True)
class Size:
    dressed: StableVITONConfig  # 13 channels and garment encoder
    fashion: UniFashionConfig
    pictures: tuple[int, ...] = (1, 8)  # drawn at a time
    samplers: tuple[tuple[str, int], ...] = (("plms", 50), ("dpm++", 20))
    captions: tuple[int, ...] = (1, 16)  # written at a time
    seen: int = 64  # pictures embedded at a time
    gallery: int = 100_000
    tokens: int = 64
    rows: tuple[int, int] = (8, 192)  # samples and tokens of a step of LoRA
    scenes: int = 8  # samples of a step of the U-Net
    counts: tuple[int, ...] = (1, 2, 4, 8, 16)
    steps: tuple[int, ...] = (10, 20, 50, 100)

    @property
    def plain(self) -> StableVITONConfig:
        """9 channels, as Paint-by-Example."""
        unet = replace(self.dressed.unet, in_channels=9)
        return replace(self.dressed, unet=unet, dresses=False, guidance=5.0)


def smaller(
    unet: UNetConfig, vae: VAEConfig, dim: int, picture: tuple[int, int], fashion: UniFashionConfig, **how
) -> Size:
    image = ImageConfig(dim=dim, heads=4, mlp_dim=4 * dim)
    exemplar = ExemplarConfig(dim=dim, context_dim=unet.context_dim)
    dressed = StableVITONConfig(vae=vae, unet=unet, picture=picture, image=image, exemplar=exemplar)
    return Size(dressed, fashion, **how)


SIZES = {
    "full": Size(PUBLISHED["stableviton"], FULL),
    "reduced": smaller(
        UNetConfig(channels=64),
        VAEConfig(channels=32),
        256,
        (256, 192),
        replace(
            FULL,
            vit=ViTConfig(dim=512, depth=12, heads=8, mlp_dim=2048),
            qformer=QFormerConfig(dim=384, depth=6, heads=6, mlp_dim=1536, vision_dim=512),
            llama=LlamaConfig(dim=1024, depth=12, heads=16, mlp_dim=2816, context=512),
            lora=replace(FULL.lora, rank=32, alpha=64.0),
        ),
        pictures=(1, 4),
        captions=(1, 8),
        seen=8,
        gallery=10_000,
        rows=(2, 96),
        scenes=2,
        counts=(1, 2, 4, 8),
        steps=(10, 20, 40),
    ),
    # Of no meaning: for the tests
    "tiny": smaller(
        UNetConfig(
            channels=32, channel_mult=(1, 1), attention_levels=(0, 1), res_blocks=1, heads=4, groups=8
        ),
        VAEConfig(channels=16, channel_mult=(1, 1), res_blocks=1, groups=4),
        16,
        (32, 24),
        TINY,
        pictures=(1, 2),
        samplers=(("plms", 3), ("dpm++", 2)),
        captions=(1, 3),
        seen=2,
        gallery=500,
        tokens=8,
        rows=(2, 12),
        scenes=2,
        counts=(1, 2),
        steps=(2, 4),
    ),
}
