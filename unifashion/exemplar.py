"""What the picture of a garment tells the U-Nets of Paint-by-Example (arXiv 2211.13227) and StableVITON: one token of context.

    pooled (b,1024), CLIP's class token -> 5 pre-norm blocks (b,1,1024) -> norm -> Linear -> context (b,1,768)

Original layout: `cond_stage_model.mapper`, `cond_stage_model.final_ln` and `proj_out` of both.
"""

from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True)
class ExemplarConfig:
    dim: int = 1024  # of CLIP's class token
    depth: int = 5
    context_dim: int = 768


class Attention(nn.Module):
    """One head."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.q = nn.Linear(dim, dim)
        self.k = nn.Linear(dim, dim)
        self.v = nn.Linear(dim, dim)
        self.out = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        # There is one token, whose weight is 1: what comes out is v, and q and k of the files make no difference. They are
        # computed nevertheless, as in the originals.
        return self.out(F.scaled_dot_product_attention(self.q(x), self.k(x), self.v(x)))


class MLP(nn.Module):
    """With the exact GELU, where the CLIP before it has the quick one."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, 4 * dim)
        self.fc2 = nn.Linear(4 * dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x), approximate="none"))


class Block(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=1e-5)
        self.attn = Attention(dim)
        self.norm2 = nn.LayerNorm(dim, eps=1e-5)
        self.mlp = MLP(dim)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class Exemplar(nn.Module):
    def __init__(self, cfg: ExemplarConfig) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block(cfg.dim) for _ in range(cfg.depth))
        self.norm = nn.LayerNorm(cfg.dim, eps=1e-5)
        self.proj = nn.Linear(cfg.dim, cfg.context_dim)

    def embed(self, pooled: Tensor) -> Tensor:
        """pooled (b,dim), the class token of `clip.ImageTower.pooled` -> (b,1,dim), normalised."""
        x = pooled[:, None]
        for block in self.blocks:
            x = block(x)
        return self.norm(x)

    def forward(self, pooled: Tensor) -> Tensor:
        """pooled (b,dim) -> context (b,1,context_dim)."""
        return self.proj(self.embed(pooled))
