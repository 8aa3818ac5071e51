"""Stable Diffusion's U-Net with 4, 9 or 13 input channels.

x (b,13,64,48), t (b,), context (b,32,768) -> eps (b,4,64,48), or v if it was trained to predict that

    9 channels: Paint-by-Example   [noisy latent 4 | masked-image latent 4 | keep mask 1]
   13 channels: StableVITON        the same, and [pose latent 4]
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from unifashion.blocks import KV, Encoder, TimeEmbed, UNetBlock, UNetConfig, project_context, zero


class UNet(nn.Module):
    def __init__(self, cfg: UNetConfig) -> None:
        super().__init__()
        self.cfg = cfg
        self.time_embed = TimeEmbed(cfg)
        self.encoder = Encoder(cfg)
        skips, blocks, c = list(cfg.skips), [], cfg.widths[-1]
        for level, width in reversed(list(enumerate(cfg.widths))):
            for i in range(cfg.res_blocks + 1):
                up = level > 0 and i == cfg.res_blocks
                skip = skips.pop()[0]
                blocks.append(UNetBlock(cfg, c + skip, width, level, up))
                c = width
        self.decoder = nn.ModuleList(blocks)
        self.norm_out = nn.GroupNorm(cfg.groups, c, eps=1e-5)
        self.conv_out = nn.Conv2d(c, cfg.out_channels, 3, padding=1)
        zero(self.conv_out)

    def context(self, context: Tensor) -> list[KV]:
        """context (b,t,context_dim) -> what `forward` wants: computed once per image, not once per step."""
        return project_context(self, context)

    def forward(
        self,
        x: Tensor,
        t: Tensor,
        context: list[KV],
        inject: Callable[[int, Tensor], Tensor] | None = None,
        style: Tensor | None = None,
    ) -> Tensor:
        """
        x        (b,in_channels,y,x) latent cells; y and x divide by 2 ** (levels - 1)
        t        (b,) timesteps, 0 to 999
        context  from `self.context`
        inject   (decoder block, its input before the skip) -> that input with the garment in it
        style    (b,time_dim), added to the timestep's embedding, which every res block reads: not SD's, but unCLIP's and SDXL's
        ->       the prediction (b,out_channels,y,x): eps, or v where the preset says so (UniFashionConfig.prediction)
        """
        emb = self.time_embed(t) if style is None else self.time_embed(t) + style
        context_kv = iter(context)
        skips = self.encoder.down(x, emb, context_kv)
        x = self.encoder.middle(skips[-1], emb, context_kv)
        for i, block in enumerate(self.decoder):
            if inject is not None:
                x = inject(i, x)
            x = block(torch.cat([x, skips.pop()], dim=1), emb, context_kv)
        return self.conv_out(F.silu(self.norm_out(x)))
