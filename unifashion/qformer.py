"""BLIP-2's Q-Former: 32 learned queries read an image, and a text if there is one, in a BERT-base with cross-attention.

    queries + image          Z_I = Q-Former(I, q)             Eq. 2: `forward(image)`
    text alone               Z_C = Q-Former(C)                Eq. 2: `forward(ids=..., mask=...)`
    queries + text + image   Z_R = Q-Former(I_R, t, q)        Eq. 9, ITM: `forward(image, ids, mask)`, bidirectional

    [queries | text] --self-attention--> queries --cross-attention to the image, in every second layer--> queries
                                         queries --query_mlp-->, text --text_mlp-->

Post-norm throughout, as BERT is. Original layout: LAVIS `blip2_pretrained.pth`.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint


@dataclass(frozen=True)
class QFormerConfig:
    vocab_size: int = 30523  # BERT's 30522 and [DEC]
    max_positions: int = 512
    max_text: int = 64  # tokens, as the official code cuts them
    queries: int = 32
    dim: int = 768
    depth: int = 12
    heads: int = 12
    mlp_dim: int = 3072
    cross_every: int = 2  # cross-attention in layers 0, 2, 4, ...
    vision_dim: int = 1408
    embed_dim: int = 256  # the space in which image and text are compared
    dropout: float = 0.1

    def __post_init__(self) -> None:
        if self.dim % self.heads:
            raise ValueError(f"dim {self.dim} does not divide into {self.heads} heads")
        if self.max_text > self.max_positions:
            raise ValueError(f"max_text {self.max_text} is more than max_positions {self.max_positions}")


class Attention(nn.Module):
    """x attends to `source` (itself, or the image), then dropout, residual and norm."""

    def __init__(self, dim: int, source_dim: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.heads, self.dropout = heads, dropout
        self.q = nn.Linear(dim, dim)
        self.k = nn.Linear(source_dim, dim)
        self.v = nn.Linear(source_dim, dim)
        self.out = nn.Linear(dim, dim)
        self.norm = nn.LayerNorm(dim, eps=1e-12)

    def forward(self, x: Tensor, source: Tensor, mask: Tensor | None = None) -> Tensor:
        q, k, v = (
            rearrange(project, "b n (h d) -> b h n d", h=self.heads)
            for project in (self.q(x), self.k(source), self.v(source))
        )
        p = self.dropout if self.training else 0.0
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=p)
        y = self.out(rearrange(y, "b h n d -> b n (h d)"))
        return self.norm(x + F.dropout(y, self.dropout, self.training))


class MLP(nn.Module):
    def __init__(self, cfg: QFormerConfig) -> None:
        super().__init__()
        self.dropout = cfg.dropout
        self.fc1 = nn.Linear(cfg.dim, cfg.mlp_dim)
        self.fc2 = nn.Linear(cfg.mlp_dim, cfg.dim)
        self.norm = nn.LayerNorm(cfg.dim, eps=1e-12)

    def forward(self, x: Tensor) -> Tensor:
        y = self.fc2(F.gelu(self.fc1(x), approximate="none"))
        return self.norm(x + F.dropout(y, self.dropout, self.training))


class Layer(nn.Module):
    def __init__(self, cfg: QFormerConfig, cross: bool) -> None:
        super().__init__()
        self.attn = Attention(cfg.dim, cfg.dim, cfg.heads, cfg.dropout)
        self.cross = Attention(cfg.dim, cfg.vision_dim, cfg.heads, cfg.dropout) if cross else None
        self.query_mlp = MLP(cfg)
        self.text_mlp = MLP(cfg)

    def forward(self, x: Tensor, n_queries: int, image: Tensor | None, mask: Tensor | None) -> Tensor:
        x = self.attn(x, x, mask)
        queries, text = x[:, :n_queries], x[:, n_queries:]
        if n_queries and self.cross is not None:
            queries = self.cross(queries, image)
        parts = [self.query_mlp(queries)] if n_queries else []
        parts += [self.text_mlp(text)] if text.shape[1] else []
        return torch.cat(parts, dim=1)


class QFormer(nn.Module):
    def __init__(self, cfg: QFormerConfig) -> None:
        super().__init__()
        self.cfg = cfg
        self.checkpointing = False  # in training, layers are computed again in the backward pass: less memory
        self.ln_vision = nn.LayerNorm(cfg.vision_dim, eps=1e-5)
        self.query_tokens = nn.Parameter(torch.zeros(1, cfg.queries, cfg.dim))
        self.word_embeddings = nn.Embedding(cfg.vocab_size, cfg.dim)
        self.position_embeddings = nn.Embedding(cfg.max_positions, cfg.dim)
        self.embed_norm = nn.LayerNorm(cfg.dim, eps=1e-12)  # queries and text share it
        self.layers = nn.ModuleList(Layer(cfg, cross=i % cfg.cross_every == 0) for i in range(cfg.depth))
        self.vision_proj = nn.Linear(cfg.dim, cfg.embed_dim)
        self.text_proj = nn.Linear(cfg.dim, cfg.embed_dim)
        self.itm_head = nn.Linear(cfg.dim, 2)  # logits of (no match, match)
        self.temp = nn.Parameter(torch.tensor(0.07))
        self.apply(_init_bert)
        nn.init.normal_(self.query_tokens, std=0.02)

    def forward(
        self,
        image: Tensor | None = None,
        ids: Tensor | None = None,
        mask: Tensor | None = None,
        queries: Tensor | None = None,
    ) -> tuple[Tensor | None, Tensor | None]:
        """
        image    (b,n,vision_dim), after `ln_vision`; without it there are no queries
        ids      (b,t) int64, and mask (b,t) bool, True where there is a token
        queries  (b,q,dim) to use in place of the learned query tokens; only with an image
        ->       Z (b,q,dim) and text (b,t,dim), each None where its input is

        Raises ValueError for neither image nor text, for a text without its mask, and for queries without an image.
        """
        if (image is None and (ids is None or queries is not None)) or (ids is None) != (mask is None):
            raise ValueError(
                "wanted an image, or a text with its mask, or both; and queries only with an image"
            )
        parts = []
        if image is not None:
            parts.append(self.query_tokens.expand(len(image), -1, -1) if queries is None else queries)
        if ids is not None:  # text positions start at 0, with queries before it or not
            parts.append(self.word_embeddings(ids) + self.position_embeddings.weight[: ids.shape[1]])
        n_queries = parts[0].shape[1] if image is not None else 0
        x = self.embed_norm(torch.cat(parts, dim=1))
        x = F.dropout(x, self.cfg.dropout, self.training)
        if mask is not None:
            # everyone sees all queries and the real tokens
            visible = F.pad(mask.bool(), (n_queries, 0), value=True)
            mask = rearrange(visible, "b k -> b 1 1 k")
        for layer in self.layers:
            if self.checkpointing and torch.is_grad_enabled():
                x = checkpoint(layer, x, n_queries, image, mask, use_reentrant=False)
            else:
                x = layer(x, n_queries, image, mask)
        return (x[:, :n_queries] if n_queries else None), (x[:, n_queries:] if ids is not None else None)

    def embed_image(self, z: Tensor) -> Tensor:
        """Z (b,q,dim) -> unit vectors (b,q,embed_dim)."""
        return _unit(self.vision_proj, z)

    def embed_text(self, text: Tensor) -> Tensor:
        """Text outputs (b,t,dim) -> the unit vector of [CLS] (b,embed_dim)."""
        return _unit(self.text_proj, text[:, 0])


def _unit(proj: nn.Linear, x: Tensor) -> Tensor:
    """In float32 at least, whatever autocast says: ranks and contrastive losses do not survive bfloat16's ties."""
    wide = torch.promote_types(proj.weight.dtype, torch.float32)
    with torch.autocast(x.device.type, enabled=False):
        return F.normalize(F.linear(x.to(wide), proj.weight.to(wide), proj.bias.to(wide)), dim=-1)


def _init_bert(module: nn.Module) -> None:
    if isinstance(module, nn.Linear | nn.Embedding):
        nn.init.normal_(module.weight, std=0.02)
    if isinstance(module, nn.Linear):
        nn.init.zeros_(module.bias)
