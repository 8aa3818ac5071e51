"""StableVITON's garment encoder: a second U-Net encoder sees the garment, and nine attention blocks carry it over.

hint (b,4,64,48), the latent of the cloth photo or the sketch --zero conv--> + first features of (x_t, t, context) -->
encoder --> features --> before decoder blocks 3..11:  h = h + zero_conv(attend(h, features)) + control_conv(features)

It reads x_t and t, as the original does, so it runs at every sampler step. Original layout: StableVITON `control_model.*`,
`model.diffusion_model.warp_flow_blks.*`, `model.diffusion_model.warp_zero_convs.*`. The last term is not StableVITON's: a
zero convolution in ControlNet's manner, here into the stream as the attention is. Attention has to learn where to look
before it can carry a pattern, which from nothing takes many times as long as what is added in its place.
"""

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
        self.control_convs = nn.ModuleList(
            nn.Conv2d(source, target, 1) for target, (source, _) in zip(targets, sources, strict=True)
        )
        # attention, where the U-Net itself has some: nine of nine in FULL
        self.attends = [level in cfg.attention_levels for _, level in sources]
        pairs = [(t, s) for t, (s, _), attend in zip(targets, sources, self.attends, strict=True) if attend]
        self.blocks = nn.ModuleList(SpatialTransformer(t, s, cfg.heads, cfg.groups) for t, s in pairs)
        self.zero_convs = nn.ModuleList(nn.Conv2d(t, t, 1) for t, _ in pairs)
        self.control_convs.apply(zero)
        self.zero_convs.apply(zero)

    @property
    def untrained(self) -> bool:
        """Whether it does not touch the U-Net yet."""
        return not any(p.any() for p in [*self.zero_convs.parameters(), *self.control_convs.parameters()])

    def start_from(self, encoder: Encoder, time_embed: TimeEmbed) -> None:
        """Begin as the U-Net's own encoder, as ControlNet's branch does."""
        self.encoder.load_state_dict(encoder.state_dict())
        self.time_embed.load_state_dict(time_embed.state_dict())

    def context(self, context: Tensor) -> list[KV]:
        """context (b,t,context_dim) -> what `forward` wants, computed once per image."""
        return project_context(self.encoder, context)

    def forward(
        self, x: Tensor, t: Tensor, context: list[KV], hint: Tensor, style: Tensor | None = None
    ) -> list[Tensor]:
        """
        x     (b,13,y,x), as the U-Net's        t  (b,) timesteps
        hint  (b,4,y,x) scaled latent of the garment
        style (b,time_dim), as the U-Net's
        ->    the nine features that `inject` reads, finest first: (b,320,64,48), ... (b,1280,16,12). The encoder's
              coarsest blocks and its middle, which `inject` does not read, are in the file and are not run.
        """
        emb = self.time_embed(t) if style is None else self.time_embed(t) + style
        return self.encoder.down(x, emb, iter(context), self.hint_in(hint), len(self.control_convs))

    def inject(self, features: list[Tensor], keep_hint: Tensor | None, i: int, h: Tensor) -> Tensor:
        """h (b,c,y,x), the input of decoder block i -> with the garment; where keep_hint (b,) is 0, h as it was."""
        if i < self.first:
            return h
        j = i - self.first
        source = features[-1 - j]
        residual = self.control_convs[j](source)
        if self.attends[j]:
            n = sum(self.attends[:j])
            block = self.blocks[n]
            kv = block.attn2.kv(source.flatten(2).transpose(1, 2))
            residual = residual + self.zero_convs[n](block(h, kv))
        return h + (residual if keep_hint is None else residual * keep_hint[:, None, None, None])
