"""What the U-Net and the garment encoder are both made of: the garment encoder is a second copy of the U-Net's encoder.

Original layout: CompVis `model.diffusion_model.*`. GroupNorms have eps 1e-5 in the res blocks and 1e-6 in the transformers.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

KV = tuple[Tensor, Tensor]  # keys and values of a context, each (b,h,t,d)


@dataclass(frozen=True)
class UNetConfig:
    in_channels: int = 13  # [noisy latent 4 | agnostic latent 4 | keep mask 1 | pose latent 4]; also 4 and 9
    out_channels: int = 4
    channels: int = 320
    channel_mult: tuple[int, ...] = (1, 2, 4, 4)
    attention_levels: tuple[int, ...] = (0, 1, 2)
    res_blocks: int = 2
    heads: int = 8
    groups: int = 32  # of every GroupNorm
    context_dim: int = 768

    def __post_init__(self) -> None:
        if not set(self.attention_levels) <= set(range(len(self.channel_mult))):
            raise ValueError(
                f"attention_levels {self.attention_levels}: there are {len(self.channel_mult)} levels"
            )
        for c in self.widths:
            if c % self.groups or c % self.heads:
                raise ValueError(
                    f"width {c} does not divide into {self.groups} groups and {self.heads} heads"
                )

    @property
    def widths(self) -> list[int]:
        return [self.channels * m for m in self.channel_mult]

    @property
    def time_dim(self) -> int:
        return 4 * self.channels

    @property
    def skips(self) -> list[tuple[int, int]]:
        """(width, level) of what each encoder block hands over: 12 of them in FULL."""
        skips, c = [(self.channels, 0)], self.channels
        for level, c in enumerate(self.widths):
            skips += [(c, level)] * self.res_blocks
            if level < len(self.widths) - 1:
                skips.append((c, level + 1))
        return skips


def timestep_embedding(t: Tensor, dim: int) -> Tensor:
    """t (b,) -> (b,dim) = [cos | sin]; in float32 whatever the model's type, as every original computes it."""
    freqs = torch.exp(
        -math.log(10000) * torch.arange(dim // 2, dtype=torch.float32, device=t.device) / (dim // 2)
    )
    angles = t.float()[:, None] * freqs
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


class TimeEmbed(nn.Module):
    def __init__(self, cfg: UNetConfig) -> None:
        super().__init__()
        self.fc1 = nn.Linear(cfg.channels, cfg.time_dim)
        self.fc2 = nn.Linear(cfg.time_dim, cfg.time_dim)

    def forward(self, t: Tensor) -> Tensor:
        sinusoid = timestep_embedding(t, self.fc1.in_features).to(self.fc1.weight.dtype)
        return self.fc2(F.silu(self.fc1(sinusoid)))


class ResBlock(nn.Module):
    def __init__(self, c_in: int, c_out: int, time_dim: int, groups: int) -> None:
        super().__init__()
        self.norm1 = nn.GroupNorm(groups, c_in, eps=1e-5)
        self.conv1 = nn.Conv2d(c_in, c_out, 3, padding=1)
        self.time = nn.Linear(time_dim, c_out)
        self.norm2 = nn.GroupNorm(groups, c_out, eps=1e-5)
        self.conv2 = nn.Conv2d(c_out, c_out, 3, padding=1)
        self.shortcut = nn.Conv2d(c_in, c_out, 1) if c_in != c_out else nn.Identity()
        zero(self.conv2)

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x)))
        h = h + self.time(F.silu(emb))[:, :, None, None]
        h = self.conv2(F.silu(self.norm2(h)))
        return self.shortcut(x) + h


class Attention(nn.Module):
    def __init__(self, dim: int, source_dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.q = nn.Linear(dim, dim, bias=False)
        self.k = nn.Linear(source_dim, dim, bias=False)
        self.v = nn.Linear(source_dim, dim, bias=False)
        self.out = nn.Linear(dim, dim)

    def kv(self, source: Tensor) -> KV:
        """source (b,t,source_dim) -> keys and values; those of a context are the same at every sampler step."""
        k, v = (rearrange(p, "b t (h d) -> b h t d", h=self.heads) for p in (self.k(source), self.v(source)))
        return k, v

    def forward(self, x: Tensor, kv: KV) -> Tensor:
        q = rearrange(self.q(x), "b n (h d) -> b h n d", h=self.heads)
        return self.out(rearrange(F.scaled_dot_product_attention(q, *kv), "b h n d -> b n (h d)"))


class GEGLU(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.proj = nn.Linear(dim, 8 * dim)
        self.out = nn.Linear(4 * dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        value, gate = self.proj(x).chunk(2, dim=-1)
        return self.out(value * F.gelu(gate, approximate="none"))


class SpatialTransformer(nn.Module):
    """Positions attend to each other, then to a context: the Q-Former's output, or the garment's features."""

    def __init__(self, dim: int, context_dim: int, heads: int, groups: int) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(groups, dim, eps=1e-6)
        self.proj_in = nn.Conv2d(dim, dim, 1)
        self.norm1 = nn.LayerNorm(dim, eps=1e-5)
        self.attn1 = Attention(dim, dim, heads)
        self.norm2 = nn.LayerNorm(dim, eps=1e-5)
        self.attn2 = Attention(dim, context_dim, heads)
        self.norm3 = nn.LayerNorm(dim, eps=1e-5)
        self.ff = GEGLU(dim)
        self.proj_out = nn.Conv2d(dim, dim, 1)
        zero(self.proj_out)

    def forward(self, x: Tensor, context: KV) -> Tensor:
        h = rearrange(self.proj_in(self.norm(x)), "b c y x -> b (y x) c")
        y = self.norm1(h)
        h = h + self.attn1(y, self.attn1.kv(y))
        h = h + self.attn2(self.norm2(h), context)
        h = h + self.ff(self.norm3(h))
        return x + self.proj_out(rearrange(h, "b (y x) c -> b c y x", y=x.shape[2]))


class Downsample(nn.Module):
    def __init__(self, c: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(c, c, 3, stride=2, padding=1)  # symmetric, unlike the VAE's

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x)


class Upsample(nn.Module):
    def __init__(self, c: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(c, c, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.interpolate(x, scale_factor=2, mode="nearest"))


class UNetBlock(nn.Module):
    """A res block, attention on some levels, and in the decoder sometimes the way up to the next level."""

    def __init__(self, cfg: UNetConfig, c_in: int, c_out: int, level: int, up: bool = False) -> None:
        super().__init__()
        attends = level in cfg.attention_levels
        self.res = ResBlock(c_in, c_out, cfg.time_dim, cfg.groups)
        self.attend = SpatialTransformer(c_out, cfg.context_dim, cfg.heads, cfg.groups) if attends else None
        self.up = Upsample(c_out) if up else nn.Identity()
        self.checkpointing = False  # in training, compute it again in the backward pass: less memory

    def forward(self, x: Tensor, emb: Tensor, context: Iterator[KV]) -> Tensor:
        kv = next(context) if self.attend is not None else None
        if self.checkpointing and torch.is_grad_enabled():
            return checkpoint(self._forward, x, emb, kv, use_reentrant=False)
        return self._forward(x, emb, kv)

    def _forward(self, x: Tensor, emb: Tensor, kv: KV | None) -> Tensor:
        x = self.res(x, emb)
        if self.attend is not None:
            x = self.attend(x, kv)
        return self.up(x)


class Encoder(nn.Module):
    """The way down and the middle. In FULL: (b,13,64,48) -> 12 skips from (b,320,64,48) to (b,1280,8,6), and the middle."""

    def __init__(self, cfg: UNetConfig) -> None:
        super().__init__()
        blocks: list[nn.Module] = [nn.Conv2d(cfg.in_channels, cfg.channels, 3, padding=1)]
        c = cfg.channels
        for level, width in enumerate(cfg.widths):
            for _ in range(cfg.res_blocks):
                blocks.append(UNetBlock(cfg, c, width, level))
                c = width
            if level < len(cfg.widths) - 1:
                blocks.append(Downsample(c))
        self.blocks = nn.ModuleList(blocks)
        self.middle_in = ResBlock(c, c, cfg.time_dim, cfg.groups)
        self.middle_attend = SpatialTransformer(c, cfg.context_dim, cfg.heads, cfg.groups)
        self.middle_out = ResBlock(c, c, cfg.time_dim, cfg.groups)

    def down(
        self,
        x: Tensor,
        emb: Tensor,
        context: Iterator[KV],
        hint: Tensor | float = 0.0,
        stop: int | None = None,
    ) -> list[Tensor]:
        """`hint` is added after the first convolution. -> what every block (before `stop`) hands over."""
        skips = [self.blocks[0](x) + hint]
        for block in self.blocks[1:stop]:
            x = skips[-1]
            skips.append(block(x, emb, context) if isinstance(block, UNetBlock) else block(x))
        return skips

    def middle(self, x: Tensor, emb: Tensor, context: Iterator[KV]) -> Tensor:
        x = self.middle_in(x, emb)
        x = self.middle_attend(x, next(context))
        return self.middle_out(x, emb)


def project_context(net: nn.Module, context: Tensor) -> list[KV]:
    """context (b,t,context_dim) -> keys and values for each transformer of `net`, in the order of its forward."""
    return [m.attn2.kv(context) for m in net.modules() if isinstance(m, SpatialTransformer)]


def zero(module: nn.Module) -> None:
    """Zero-initialise: the block starts as the identity."""
    for p in module.parameters():
        nn.init.zeros_(p)
