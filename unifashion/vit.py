"""EVA-CLIP ViT-g/14, the frozen eye of UniFashion.

image (b,3,224,224) -> patches (b,256,1408) -> [cls | patches] + positions (b,257,1408) -> 39 pre-norm blocks -> (b,257,1408)

Of EVA's 40 blocks BLIP-2 uses `blocks.0` to `blocks.38`, unnormalised (`ln_vision` belongs to the Q-Former); that the published
file still has the last one is inferred from its size. Original layout: LAVIS `eva_vit_g.pth`.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn


@dataclass(frozen=True)
class ViTConfig:
    image_size: tuple[int, int] = (224, 224)  # y, x
    patch_size: int = 14
    dim: int = 1408
    depth: int = 39
    heads: int = 16
    mlp_dim: int = 6144  # int(1408 * 4.3637)

    def __post_init__(self) -> None:
        if any(side % self.patch_size for side in self.image_size):
            raise ValueError(f"image_size {self.image_size} does not divide by patch_size {self.patch_size}")
        if self.dim % self.heads:
            raise ValueError(f"dim {self.dim} does not divide into {self.heads} heads")

    @property
    def tokens(self) -> int:
        """Patches and the class token: 257 at 224 pixels."""
        return 1 + self.image_size[0] * self.image_size[1] // self.patch_size**2


class Attention(nn.Module):
    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(dim, 3 * dim, bias=False)
        self.q_bias = nn.Parameter(torch.zeros(dim))  # EVA's keys have no bias
        self.v_bias = nn.Parameter(torch.zeros(dim))
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        bias = torch.cat([self.q_bias, torch.zeros_like(self.q_bias), self.v_bias])
        qkv = F.linear(x, self.qkv.weight, bias)
        q, k, v = rearrange(qkv, "b n (three h d) -> three b h n d", three=3, h=self.heads)
        x = F.scaled_dot_product_attention(q, k, v)
        return self.proj(rearrange(x, "b h n d -> b n (h d)"))


class Block(nn.Module):
    def __init__(self, cfg: ViTConfig) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(cfg.dim, eps=1e-6)
        self.attn = Attention(cfg.dim, cfg.heads)
        self.norm2 = nn.LayerNorm(cfg.dim, eps=1e-6)
        self.mlp = nn.Sequential(
            nn.Linear(cfg.dim, cfg.mlp_dim),
            nn.GELU(approximate="none"),
            nn.Linear(cfg.mlp_dim, cfg.dim),
        )

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class ViT(nn.Module):
    def __init__(self, cfg: ViTConfig) -> None:
        super().__init__()
        self.patch_embed = nn.Conv2d(3, cfg.dim, cfg.patch_size, stride=cfg.patch_size)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, cfg.dim))
        self.pos_embed = nn.Parameter(torch.zeros(1, cfg.tokens, cfg.dim))
        self.blocks = nn.ModuleList(Block(cfg) for _ in range(cfg.depth))
        nn.init.trunc_normal_(self.cls_token, std=0.02)
        nn.init.trunc_normal_(self.pos_embed, std=0.02)

    def forward(self, image: Tensor) -> Tensor:
        """image (b,3,y,x), normalised with CLIP's mean and std -> features (b,n,dim), the class token first."""
        x = rearrange(self.patch_embed(image), "b d y x -> b (y x) d")
        x = torch.cat([self.cls_token.expand(len(x), -1, -1), x], dim=1) + self.pos_embed
        for block in self.blocks:
            x = block(x)
        return x
