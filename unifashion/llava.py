"""LLaVA-1.5 (arXiv 2310.03744): wires CLIP's image tower, a projector and a Llama that was tuned to answer questions on pictures.

    picture (b,3,336,336) --CLIP L/14, up to its last block, patches alone--> (b,576,1024) --projector--> soft tokens (b,576,4096)
    "... USER: " | soft tokens | "\\n(question) ASSISTANT:" --write--> tokens of the answer

It needs no training of ours: `infer.py caption --model llava` describes garments on day one, and annotates Fashion-IQ's training
pictures as appendix C of UniFashion does. Original layouts: llava-hf's, and liuhaotian's with CLIP beside it (weights/llava.py).
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from unifashion.clip import ImageConfig, ImageTower
from unifashion.llama import Llama, LlamaConfig, generate


@dataclass(frozen=True)
class LLaVAConfig:
    image: ImageConfig = ImageConfig(image_size=336)
    llama: LlamaConfig = LlamaConfig()

    @property
    def patches(self) -> int:
        """Soft tokens of a picture: 576."""
        return self.image.tokens - 1


LLAVA_7B = LLaVAConfig()  # llava-1.5-7b, as published


class Projector(nn.Module):
    """From CLIP's width to the LLM's, patch by patch."""

    def __init__(self, image_dim: int, dim: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(image_dim, dim)
        self.fc2 = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x)))


class LLaVA(nn.Module):
    def __init__(self, cfg: LLaVAConfig) -> None:
        super().__init__()
        self.cfg = cfg
        self.image = ImageTower(cfg.image)
        self.projector = Projector(cfg.image.dim, cfg.llama.dim)
        self.llama = Llama(cfg.llama)

    @property
    def device(self) -> torch.device:
        return self.image.cls_token.device

    @property
    def dtype(self) -> torch.dtype:
        return self.image.cls_token.dtype

    def see(self, picture: Tensor) -> Tensor:
        """picture (b,3,336,336) from `preprocess.llava_image` -> soft tokens (b,576,4096), row by row of its patches.

        CLIP's last block, and its norm behind it, prepare the class token for a comparison with texts: they are not used.
        """
        patches = self.image(picture.to(self.dtype), skip_last=1)[:, 1:]
        return self.projector(patches)

    def soft_prompt(self, seen: Tensor, before: Tensor, after: Tensor) -> Tensor:
        """
        seen (b,576,4096) from `see` in place of the prompt's <image> -> embeddings (b,p+576+r,4096).

        before (p,) and after (b,r) token ids, from `tokenizers.llava_prompt`
        """
        words = self.llama.embed
        return torch.cat([words(before).expand(len(seen), -1, -1), seen, words(after)], dim=1)

    def write(
        self,
        seen: Tensor,
        before: Tensor,
        after: Tensor,
        max_tokens: int,
        eos: int,
        beams: int = 1,
    ) -> Tensor:
        """As `soft_prompt`, with one question for all -> the answer's token ids (b,max_tokens), filled up with `eos`."""
        prompt = self.soft_prompt(seen, before, after)
        mask = torch.ones(prompt.shape[:2], dtype=torch.bool, device=prompt.device)
        return generate(self.llama, prompt, mask, max_tokens, eos, beams)
