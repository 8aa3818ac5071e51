"""What draws, in UniFashion and in the published models it starts from: the U-Net with what it reads, called once or sampled.

agnostic, mask, pose --scene--> (b,9,64,48);  noise (b,4,64,48), scene, context, hint --sample--> latent (b,4,64,48)
"""

from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor, nn

from unifashion.blocks import KV
from unifashion.config import DenoiserConfig
from unifashion.diffusion import ALPHAS, SAMPLERS, alphas_cumprod, guided, v_to_eps
from unifashion.garment import GarmentEncoder
from unifashion.unet import UNet
from unifashion.vae import VAE


class Denoiser(nn.Module):
    """A subclass makes the parts, and the context in its own way."""

    cfg: DenoiserConfig
    vae: VAE
    unet: UNet
    garment: GarmentEncoder  # Paint-by-Example has none: it is given no hint
    null_context: nn.Parameter  # (1,1,context_dim), for no context

    @property
    def device(self) -> torch.device:
        return self.null_context.device

    @property
    def dtype(self) -> torch.dtype:
        return self.null_context.dtype

    def style(self, context: Tensor) -> Tensor | None:
        """context (b,q,context_dim) -> what is added to the timestep's embedding (b,time_dim): in published models nothing."""
        return None

    def scene(self, agnostic: Tensor, keep: Tensor, pose: Tensor | None = None) -> Tensor:
        """
        What the U-Net reads beside the noisy latent, in the order of Paint-by-Example and StableVITON.

        agnostic  (b,4,y,x) scaled latent of the person with the region to repaint in grey
        keep      (b,1,y,x) in [0,1], 1 = keep, 0 = repaint
        pose      (b,4,y,x) scaled latent of the densepose picture; without it, the null pose. Paint-by-Example's reads none
        """
        poses = [torch.zeros_like(agnostic) if pose is None else pose] if self.cfg.posed else []
        return torch.cat([agnostic, keep, *poses], dim=1)

    def network(
        self,
        x: Tensor,
        t: Tensor,
        for_unet: list[KV],
        for_garment: list[KV],
        hint: Tensor | None,
        style: Tensor | None,
        keep_hint: Tensor | None = None,
    ) -> Tensor:
        """The garment encoder, if there is a hint, and the U-Net: all that runs at every step. x (b,13,y,x) -> (b,4,y,x)."""
        inject = None
        if hint is not None:
            features = self.garment(x, t, for_garment, hint, style)
            inject = partial(self.garment.inject, features, keep_hint)
        return self.unet(x, t, for_unet, inject, style)

    def predict_noise(
        self,
        x: Tensor,
        t: Tensor,
        scene: Tensor,
        context: Tensor,
        hint: Tensor | None = None,
        keep_hint: Tensor | None = None,
    ) -> Tensor:
        """
        One call of the network, as in training.

        x (b,4,y,x) noisy latent, t (b,) timesteps, scene (b,9,y,x), context (b,q,context_dim),
        hint (b,4,y,x) scaled latent of the garment, keep_hint (b,) 1 or 0: with the garment, or without -> eps (b,4,y,x)
        """
        unet_in, style = torch.cat([x, scene], dim=1), self.style(context)
        for_unet = self.unet.context(context)
        for_garment = self.garment.context(context) if hint is not None else []
        out = self.network(unet_in, t, for_unet, for_garment, hint, style, keep_hint)
        if self.cfg.prediction == "eps":
            return out
        # In bfloat16, 1 - a_t would be 0 where there is little noise.
        wide = torch.promote_types(x.dtype, torch.float32)
        a = alphas_cumprod(x.device)[t].to(wide)[:, None, None, None]
        return v_to_eps(out.to(wide), x.to(wide), a)

    @torch.no_grad()
    def sample(
        self,
        noise: Tensor,
        scene: Tensor,
        context: Tensor,
        hint: Tensor | None = None,
        steps: int = 50,
        sampler: str = "plms",
        guidance: float = 1.0,
    ) -> Iterator[Tensor]:
        """
        noise (b,4,y,x) ~ N(0,1), float32; the rest as in `predict_noise` -> the latent (b,4,y,x) after each step.

        Guidance other than 1 runs a batch of two: with the context, and with the null context; scene and hint stay.
        """
        dtype, both = self.dtype, guidance != 1.0
        if both:
            context = torch.cat([context, self.null_context.expand_as(context)])
            scene = torch.cat([scene, scene])
            hint = torch.cat([hint, hint]) if hint is not None else None
        for_unet = self.unet.context(context)  # once per picture, not once per step
        for_garment = self.garment.context(context) if hint is not None else []
        style = self.style(context)

        def eps(x: Tensor, t: int) -> Tensor:
            pair = torch.cat([x, x] if both else [x]).to(dtype)
            unet_in = torch.cat([pair, scene], dim=1)
            at = torch.full((len(unet_in),), t, device=x.device)
            out = self.network(unet_in, at, for_unet, for_garment, hint, style).to(noise.dtype)
            out = guided(*out.chunk(2), guidance) if both else out
            return out if self.cfg.prediction == "eps" else v_to_eps(out, x, ALPHAS[t])

        yield from SAMPLERS[sampler](eps, noise, steps)
