"""Stable Diffusion's autoencoder.

image (b,3,y,x) in [-1,1] --encoder--> mean, logvar (b,4,y/8,x/8) --sample * scale--> latent --/ scale, decoder--> image

Original layout: CompVis `first_stage_model.*`. Every GroupNorm has eps 1e-6, not PyTorch's 1e-5: a port that takes the
default loads without a complaint and is wrong by 1e-4.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn


@dataclass(frozen=True)
class VAEConfig:
    channels: int = 128
    channel_mult: tuple[int, ...] = (1, 2, 4, 4)
    res_blocks: int = 2  # per level of the encoder; the decoder has one more
    latent_channels: int = 4
    groups: int = 32  # of every GroupNorm; one channel a group would forget the colour of a picture
    scale: float = 0.18215  # 1 / standard deviation of the latents

    @property
    def factor(self) -> int:
        """Pixels per latent cell, along each side."""
        return 2 ** (len(self.channel_mult) - 1)


def norm(channels: int, groups: int) -> nn.GroupNorm:
    return nn.GroupNorm(groups, channels, eps=1e-6)


class ResBlock(nn.Module):
    def __init__(self, c_in: int, c_out: int, groups: int) -> None:
        super().__init__()
        self.norm1 = norm(c_in, groups)
        self.conv1 = nn.Conv2d(c_in, c_out, 3, padding=1)
        self.norm2 = norm(c_out, groups)
        self.conv2 = nn.Conv2d(c_out, c_out, 3, padding=1)
        self.shortcut = nn.Conv2d(c_in, c_out, 1) if c_in != c_out else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x)))
        h = self.conv2(F.silu(self.norm2(h)))
        return self.shortcut(x) + h


class Attention(nn.Module):
    """One head over all positions; its projections are 1x1 convolutions in the original file."""

    def __init__(self, c: int, groups: int) -> None:
        super().__init__()
        self.norm = norm(c, groups)
        self.q = nn.Conv2d(c, c, 1)
        self.k = nn.Conv2d(c, c, 1)
        self.v = nn.Conv2d(c, c, 1)
        self.out = nn.Conv2d(c, c, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        q, k, v = (rearrange(project(h), "b c y x -> b 1 (y x) c") for project in (self.q, self.k, self.v))
        h = F.scaled_dot_product_attention(q, k, v)
        return x + self.out(rearrange(h, "b 1 (y x) c -> b c y x", y=x.shape[2]))


class Downsample(nn.Module):
    def __init__(self, c: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(c, c, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.pad(x, (0, 1, 0, 1)))  # asymmetric: right and bottom only


class Upsample(nn.Module):
    def __init__(self, c: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(c, c, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.interpolate(x, scale_factor=2, mode="nearest"))


class Level(nn.Module):
    """The res blocks of one resolution, then the way to the next one, if there is a next."""

    def __init__(self, c_in: int, c_out: int, blocks: int, groups: int, resample: nn.Module | None) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(ResBlock(c_in if i == 0 else c_out, c_out, groups) for i in range(blocks))
        self.resample = resample if resample is not None else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return self.resample(x)


class Middle(nn.Sequential):
    def __init__(self, c: int, groups: int) -> None:
        super().__init__(ResBlock(c, c, groups), Attention(c, groups), ResBlock(c, c, groups))


class Encoder(nn.Module):
    def __init__(self, cfg: VAEConfig) -> None:
        super().__init__()
        widths = [cfg.channels * m for m in cfg.channel_mult]
        last = len(widths) - 1
        self.conv_in = nn.Conv2d(3, cfg.channels, 3, padding=1)
        self.levels = nn.ModuleList(
            Level(widths[max(i - 1, 0)], c, cfg.res_blocks, cfg.groups, Downsample(c) if i < last else None)
            for i, c in enumerate(widths)
        )
        self.middle = Middle(widths[-1], cfg.groups)
        self.norm_out = norm(widths[-1], cfg.groups)
        self.conv_out = nn.Conv2d(widths[-1], 2 * cfg.latent_channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv_in(x)
        for level in self.levels:
            x = level(x)
        return self.conv_out(F.silu(self.norm_out(self.middle(x))))


class Decoder(nn.Module):
    """`levels[0]` is the finest, as in the original file: the forward walks them backwards."""

    def __init__(self, cfg: VAEConfig) -> None:
        super().__init__()
        widths = [cfg.channels * m for m in cfg.channel_mult]
        last = len(widths) - 1
        self.conv_in = nn.Conv2d(cfg.latent_channels, widths[-1], 3, padding=1)
        self.middle = Middle(widths[-1], cfg.groups)
        self.levels = nn.ModuleList(
            Level(widths[min(i + 1, last)], c, cfg.res_blocks + 1, cfg.groups, Upsample(c) if i > 0 else None)
            for i, c in enumerate(widths)
        )
        self.norm_out = norm(widths[0], cfg.groups)
        self.conv_out = nn.Conv2d(widths[0], 3, 3, padding=1)

    def forward(self, z: Tensor) -> Tensor:
        x = self.middle(self.conv_in(z))
        for level in reversed(self.levels):
            x = level(x)
        return self.conv_out(F.silu(self.norm_out(x)))


class VAE(nn.Module):
    def __init__(self, cfg: VAEConfig) -> None:
        super().__init__()
        self.cfg = cfg
        self.encoder = Encoder(cfg)
        self.decoder = Decoder(cfg)
        self.quant_conv = nn.Conv2d(2 * cfg.latent_channels, 2 * cfg.latent_channels, 1)
        self.post_quant_conv = nn.Conv2d(cfg.latent_channels, cfg.latent_channels, 1)

    def moments(self, image: Tensor) -> tuple[Tensor, Tensor]:
        """image (b,3,y,x) in [-1,1] -> mean and log variance (b,4,y/f,x/f) of the unscaled latent."""
        mean, logvar = self.quant_conv(self.encoder(image)).chunk(2, dim=1)
        return mean, logvar.clamp(-30.0, 20.0)

    def sample(self, mean: Tensor, logvar: Tensor, noise: Tensor) -> Tensor:
        """`moments` and noise ~ N(0,1), (b,4,y,x) each -> scaled latent (b,4,y,x)."""
        return (mean + torch.exp(0.5 * logvar) * noise) * self.cfg.scale

    def encode(self, image: Tensor) -> Tensor:
        """image (b,3,y,x) in [-1,1] -> scaled latent (b,4,y/f,x/f), the mean."""
        return self.moments(image)[0] * self.cfg.scale

    def decode(self, latent: Tensor) -> Tensor:
        """scaled latent (b,4,y,x) -> image (b,3,y*f,x*f), about [-1,1] (not clamped)."""
        return self.decoder(self.post_quant_conv(latent / self.cfg.scale))


def kl_divergence(mean: Tensor, logvar: Tensor) -> Tensor:
    """KL(N(mean, exp(logvar)) || N(0,1)), summed over all but the batch: (b,)."""
    return 0.5 * (mean**2 + logvar.exp() - 1.0 - logvar).flatten(1).sum(1)
