"""CLIP (arXiv 2103.00020): an image tower and a text tower whose outputs are compared by their cosine.

    image (b,3,224,224) -> [cls | patches] + positions -> norm -> 24 pre-norm blocks (b,257,1024) -> norm of cls -> (b,768)
    ids (b,77)          -> tokens + positions          ->         12 causal blocks   (b,77,768) -> norm, at EOT -> (b,768)

CLIP-S takes both (`encode_image`, `encode_text`). Paint-by-Example takes the class token before the projection
(`ImageTower.pooled`), LLaVA the patches before the last block (`ImageTower(image, skip_last=1)[:, 1:]`), Stable Diffusion
the whole text (`TextTower`). Original layout: OpenAI's and open_clip's `ViT-L-14`, Hugging Face's `CLIPModel`.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn


@dataclass(frozen=True)
class ImageConfig:
    image_size: int = 224
    patch_size: int = 14
    dim: int = 1024
    depth: int = 24
    heads: int = 16
    mlp_dim: int = 4096

    def __post_init__(self) -> None:
        if self.image_size % self.patch_size:
            raise ValueError(f"image_size {self.image_size} does not divide by patch_size {self.patch_size}")
        if self.dim % self.heads:
            raise ValueError(f"dim {self.dim} does not divide into {self.heads} heads")

    @property
    def tokens(self) -> int:
        """Patches and the class token: 257 in L/14."""
        return 1 + (self.image_size // self.patch_size) ** 2


@dataclass(frozen=True)
class TextConfig:
    vocab_size: int = 49408
    max_positions: int = 77
    dim: int = 768
    depth: int = 12
    heads: int = 12
    mlp_dim: int = 3072

    def __post_init__(self) -> None:
        if self.dim % self.heads:
            raise ValueError(f"dim {self.dim} does not divide into {self.heads} heads")


@dataclass(frozen=True)
class CLIPConfig:
    image: ImageConfig = ImageConfig()
    text: TextConfig = TextConfig()
    embed_dim: int = 768  # the space in which image and text are compared


L14 = CLIPConfig()
L14_336 = CLIPConfig(ImageConfig(image_size=336))
B16 = CLIPConfig(
    ImageConfig(patch_size=16, dim=768, depth=12, heads=12, mlp_dim=3072),
    TextConfig(dim=512, heads=8, mlp_dim=2048),
    embed_dim=512,
)


class Attention(nn.Module):
    def __init__(self, dim: int, heads: int, causal: bool) -> None:
        super().__init__()
        self.heads, self.causal = heads, causal
        self.q = nn.Linear(dim, dim)
        self.k = nn.Linear(dim, dim)
        self.v = nn.Linear(dim, dim)
        self.out = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (rearrange(p(x), "b n (h d) -> b h n d", h=self.heads) for p in (self.q, self.k, self.v))
        x = F.scaled_dot_product_attention(q, k, v, is_causal=self.causal)
        return self.out(rearrange(x, "b h n d -> b n (h d)"))


class MLP(nn.Module):
    """With quick GELU, x sigmoid(1.702 x), with which all of OpenAI's weights were trained."""

    def __init__(self, dim: int, mlp_dim: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, mlp_dim)
        self.fc2 = nn.Linear(mlp_dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        x = self.fc1(x)
        return self.fc2(x * torch.sigmoid(1.702 * x))


class Block(nn.Module):
    def __init__(self, dim: int, heads: int, mlp_dim: int, causal: bool) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=1e-5)
        self.attn = Attention(dim, heads, causal)
        self.norm2 = nn.LayerNorm(dim, eps=1e-5)
        self.mlp = MLP(dim, mlp_dim)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class ImageTower(nn.Module):
    def __init__(self, cfg: ImageConfig) -> None:
        super().__init__()
        self.patch_embed = nn.Conv2d(3, cfg.dim, cfg.patch_size, stride=cfg.patch_size, bias=False)
        self.cls_token = nn.Parameter(torch.zeros(cfg.dim))
        self.pos_embed = nn.Parameter(torch.zeros(cfg.tokens, cfg.dim))
        self.norm_pre = nn.LayerNorm(cfg.dim, eps=1e-5)
        self.blocks = nn.ModuleList(
            Block(cfg.dim, cfg.heads, cfg.mlp_dim, causal=False) for _ in range(cfg.depth)
        )
        self.norm_post = nn.LayerNorm(cfg.dim, eps=1e-5)  # of the class token alone
        nn.init.normal_(self.cls_token, std=0.02)
        nn.init.normal_(self.pos_embed, std=0.02)

    def forward(self, image: Tensor, skip_last: int = 0) -> Tensor:
        """
        image      (b,3,y,x), normalised with CLIP's mean and std (`preprocess.clip_image`)
        skip_last  so many of the last blocks are left out: with 1, what Hugging Face calls hidden_states[-2]
        ->         (b,n,dim), the class token first, not normalised
        """
        x = rearrange(self.patch_embed(image), "b d y x -> b (y x) d")
        x = torch.cat([self.cls_token.expand(len(x), 1, -1), x], dim=1)
        x = self.norm_pre(x + self.pos_embed)
        for block in self.blocks[: len(self.blocks) - skip_last]:
            x = block(x)
        return x

    def pooled(self, image: Tensor) -> Tensor:
        """image as above -> the normalised class token (b,dim)."""
        return self.norm_post(self(image)[:, 0])


class TextTower(nn.Module):
    def __init__(self, cfg: TextConfig) -> None:
        super().__init__()
        self.word_embeddings = nn.Embedding(cfg.vocab_size, cfg.dim)
        self.pos_embed = nn.Parameter(torch.zeros(cfg.max_positions, cfg.dim))
        self.blocks = nn.ModuleList(
            Block(cfg.dim, cfg.heads, cfg.mlp_dim, causal=True) for _ in range(cfg.depth)
        )
        self.norm = nn.LayerNorm(cfg.dim, eps=1e-5)
        nn.init.normal_(self.word_embeddings.weight, std=0.02)
        nn.init.normal_(self.pos_embed, std=0.01)

    def forward(self, ids: Tensor) -> Tensor:
        """ids (b,t) int64, t at most 77, as `tokenizers.CLIPTokenizer` makes them -> (b,t,dim), normalised.

        There is no padding mask: padding is behind the text, where no token of it looks.
        """
        x = self.word_embeddings(ids) + self.pos_embed[: ids.shape[1]]
        for block in self.blocks:
            x = block(x)
        return self.norm(x)

    def pooled(self, ids: Tensor) -> Tensor:
        """ids as above -> the output at the end of the text (b,dim)."""
        end = ids.argmax(dim=1)  # <|endoftext|> is the highest id, and of several the first counts
        return self(ids)[torch.arange(len(ids), device=ids.device), end]


class CLIP(nn.Module):
    def __init__(self, cfg: CLIPConfig) -> None:
        super().__init__()
        self.cfg = cfg
        self.image = ImageTower(cfg.image)
        self.text = TextTower(cfg.text)
        self.image_proj = nn.Linear(cfg.image.dim, cfg.embed_dim, bias=False)
        self.text_proj = nn.Linear(cfg.text.dim, cfg.embed_dim, bias=False)
        self.logit_scale = nn.Parameter(torch.tensor(1 / 0.07).log())  # of the cosines, as a logarithm

    def encode_image(self, image: Tensor) -> Tensor:
        """image (b,3,y,x), normalised with CLIP's mean and std -> (b,embed_dim), of any length."""
        return self.image_proj(self.image.pooled(image))

    def encode_text(self, ids: Tensor) -> Tensor:
        """ids (b,t) int64 -> (b,embed_dim), of any length."""
        return self.text_proj(self.text.pooled(ids))

    def forward(self, image: Tensor, ids: Tensor) -> Tensor:
        """image (b,3,y,x) and ids (n,t) -> scaled cosines (b,n), the logits of CLIP's contrastive loss."""
        image, text = (F.normalize(x, dim=-1) for x in (self.encode_image(image), self.encode_text(ids)))
        return self.logit_scale.exp() * image @ text.T
