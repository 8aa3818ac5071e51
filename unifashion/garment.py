"""StableVITON's garment encoder: a second U-Net encoder sees the garment, and nine attention blocks carry it over.

hint (b,4,64,48), the latent of the cloth photo or the sketch --zero conv--> + first features of (x_t, t, context) -->
encoder --> features --> before decoder blocks 3..11:  h = h + zero_conv(attend(h, features))

It reads x_t and t, as the original does, so it runs at every sampler step. Original layout: StableVITON `control_model.*`,
`model.diffusion_model.warp_flow_blks.*`, `model.diffusion_model.warp_zero_convs.*`.
"""

import torch
from torch import Tensor, nn

from unifashion.blocks import KV, Encoder, SpatialTransformer, TimeEmbed, UNetConfig, project_context, zero


class GarmentEncoder(nn.Module):
    def __init__(self, cfg: UNetConfig, hint_channels: int = 4) -> None:
        super().__init__()
        self.time_embed = TimeEmbed(cfg)
        self.encoder = Encoder(cfg)
        self.hint_in = nn.Conv2d(hint_channels, cfg.channels, 3, padding=1)
        zero(self.hint_in)
        # decoder block i of n gets the encoder's block n-1-i, the one of its own resolution; the coarsest level gets none
        self.first = cfg.res_blocks + 1
        sources = cfg.skips[::-1][self.first :]
        widths = [width for width in reversed(cfg.widths) for _ in range(cfg.res_blocks + 1)]
        # a block's input is as wide as the output of the block before it
        targets = widths[self.first - 1 : -1]
        self.blocks = nn.ModuleList(
            SpatialTransformer(target, source, cfg.heads, cfg.groups)
            for target, (source, _) in zip(targets, sources, strict=True)
        )
        self.zero_convs = nn.ModuleList(nn.Conv2d(target, target, 1) for target in targets)
        self.zero_convs.apply(zero)
        for block in self.blocks:
            look_at_own_place(block)

    @property
    def untrained(self) -> bool:
        """Whether it does not touch the U-Net yet."""
        return not any(p.any() for p in self.zero_convs.parameters())

    def start_from(self, encoder: Encoder, time_embed: TimeEmbed) -> None:
        """Begin as the U-Net's own encoder, as ControlNet's branch does."""
        self.encoder.load_state_dict(encoder.state_dict())
        self.time_embed.load_state_dict(time_embed.state_dict())

    def context(self, context: Tensor) -> list[KV]:
        """context (b,t,context_dim) -> what `forward` wants, computed once per image."""
        return project_context(self.encoder, context)

    def forward(self, x: Tensor, t: Tensor, context: list[KV], hint: Tensor) -> list[Tensor]:
        """
        x     (b,13,y,x), as the U-Net's        t  (b,) timesteps
        hint  (b,4,y,x) scaled latent of the garment
        ->    the nine features that `inject` reads, finest first: (b,320,64,48), ... (b,1280,16,12). The encoder's
              coarsest blocks and its middle, which no attention block reads, are in the file and are not run.
        """
        return self.encoder.down(x, self.time_embed(t), iter(context), self.hint_in(hint), len(self.blocks))

    def inject(self, features: list[Tensor], keep_hint: Tensor | None, i: int, h: Tensor) -> Tensor:
        """h (b,c,y,x), the input of decoder block i -> with the garment; where keep_hint (b,) is 0, h as it was."""
        if i < self.first:
            return h
        block = self.blocks[i - self.first]
        source = features[-1 - (i - self.first)].flatten(2).transpose(1, 2)
        residual = self.zero_convs[i - self.first](block(h, block.attn2.kv(source)))
        return h + (residual if keep_hint is None else residual * keep_hint[:, None, None, None])


@torch.no_grad()
def look_at_own_place(block: SpatialTransformer) -> None:
    """
    Initialise `block` so that a query finds the key with the features most like its own, and takes what is there.

    The U-Net and a garment encoder that starts as its copy see the same x_t, so that tends to be the query's own place:
    attention starts as a copy from there, and learns to look elsewhere. From random projections, and against proj_out = 0,
    a U-Net trained from nothing takes far longer to see that the garment is worth a look. Loaded weights overwrite all this.
    """
    attend = block.attn2
    for proj in (block.proj_in, block.proj_out):  # proj_out need not start at 0: zero_convs, behind it, do
        nn.init.dirac_(proj.weight)
        nn.init.zeros_(proj.bias)
    nn.init.orthogonal_(attend.q.weight, gain=3)
    attend.k.weight.copy_(attend.q.weight[:, : attend.k.in_features])
    nn.init.eye_(attend.v.weight)
    nn.init.eye_(attend.out.weight).mul_(16)  # the zero convolution has to find it in a sum with the input
    nn.init.zeros_(attend.out.bias)
