"""The two presets. FULL is the published network; TINY is the same code with smaller numbers."""

from dataclasses import dataclass

from unifashion.blocks import UNetConfig
from unifashion.llama import LlamaConfig
from unifashion.lora import LoRAConfig
from unifashion.qformer import QFormerConfig
from unifashion.vae import VAEConfig
from unifashion.vit import ViTConfig


@dataclass(frozen=True)
class DenoiserConfig:
    """Of every model that draws: ours, and the published ones (`unifashion.stableviton`)."""

    vae: VAEConfig = VAEConfig()
    unet: UNetConfig = UNetConfig()
    picture: tuple[int, int] = (512, 384)  # y, x of what the U-Net side reads and draws
    # what the U-Net's output means: eps (Eq. 7, all published files), or v as in SD 2
    prediction: str = "eps"
    guidance: float = (
        2.0  # classifier-free guidance; FULL's is not measured: its training has not been done here
    )

    def __post_init__(self) -> None:
        if self.prediction not in ("eps", "v"):
            raise ValueError(f"prediction is {self.prediction!r}, must be eps or v")
        latent, mask, pose = 2 * self.vae.latent_channels, 1, self.vae.latent_channels * self.posed
        if self.unet.in_channels != latent + mask + pose:
            raise ValueError(f"unet.in_channels is {self.unet.in_channels}, wanted {latent + mask + pose}")
        if self.unet.out_channels != self.vae.latent_channels:
            raise ValueError("unet.out_channels must equal vae.latent_channels")
        cell = self.vae.factor * 2 ** (len(self.unet.channel_mult) - 1)
        if any(side % cell for side in self.picture):
            raise ValueError(
                f"picture {self.picture} does not divide by {cell}: the U-Net's skips would not match"
            )

    @property
    def posed(self) -> bool:
        """Whether the U-Net reads a pose."""
        return True

    @property
    def latent(self) -> tuple[int, int]:
        """y, x of the latent: (64, 48) in FULL."""
        return self.picture[0] // self.vae.factor, self.picture[1] // self.vae.factor


@dataclass(frozen=True)
class UniFashionConfig(DenoiserConfig):
    vit: ViTConfig = ViTConfig()
    qformer: QFormerConfig = QFormerConfig()
    llama: LlamaConfig = LlamaConfig()
    lora: LoRAConfig = LoRAConfig()  # appendix B
    max_caption: int = 128  # tokens of a caption in training, its end included

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.qformer.vision_dim != self.vit.dim:
            raise ValueError(f"qformer.vision_dim is {self.qformer.vision_dim}, vit.dim is {self.vit.dim}")
        if self.vit.image_size[0] != self.vit.image_size[1]:
            raise ValueError(f"the Q-Former's picture is square, vit.image_size is {self.vit.image_size}")


# The published sizes are the defaults of ViTConfig, QFormerConfig, VAEConfig, UNetConfig and LlamaConfig.
FULL = UniFashionConfig()

TINY = UniFashionConfig(
    vit=ViTConfig(image_size=(128, 128), patch_size=8, dim=128, depth=4, heads=4, mlp_dim=512),
    qformer=QFormerConfig(
        vocab_size=512,
        max_positions=64,
        max_text=64,
        queries=16,
        dim=128,
        depth=4,
        heads=4,
        mlp_dim=384,
        vision_dim=128,
        embed_dim=64,
        dropout=0.0,
    ),
    vae=VAEConfig(channels=32, channel_mult=(1, 1, 2), res_blocks=1, groups=8, scale=0.65714),
    unet=UNetConfig(
        channels=64,
        channel_mult=(1, 1, 1, 1),
        attention_levels=(2,),
        res_blocks=1,
        heads=4,
        groups=8,
        context_dim=128,
    ),
    llama=LlamaConfig(vocab_size=1024, dim=192, depth=4, heads=6, mlp_dim=512, context=256),
    lora=LoRAConfig(rank=32, alpha=64.0, dropout=0.0),
    max_caption=64,
    picture=(128, 96),
    # At t=980 an error in eps is 13 times as large in x_0: from nothing, eps needs more training than a tiny preset gets.
    prediction="v",
    guidance=2.5,
)

PRESETS = {"full": FULL, "tiny": TINY}
