"""UniFashion: wires the parts, and owns what is between them: the adapters and the null context.

picture (b,3,224,224) --see--> (b,257,1408) --Q-Former, text or none--> Z (b,32,768) --image adapter--> context (b,32,768)
agnostic, mask, pose  --scene--> (b,9,64,48);  cloth photo or sketch --VAE--> hint (b,4,64,48)
noise (b,4,64,48), scene, context, hint --sample--> latent --VAE--> picture (b,3,512,384)

Z (b,32,768) --text adapter--> soft prompt (b,32,4096) within the words of the template --write--> tokens of a caption
"""

from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor, nn

from unifashion.blocks import GEGLU, Attention, ResBlock, zero
from unifashion.config import UniFashionConfig
from unifashion.diffusion import ALPHAS, SAMPLERS, alphas_cumprod, eps_loss, guided, v_to_eps
from unifashion.garment import GarmentEncoder
from unifashion.llama import Llama, generate
from unifashion.qformer import QFormer
from unifashion.unet import UNet
from unifashion.vae import VAE
from unifashion.vit import ViT

HALVES = {  # parts, by the half that has them; "lora" is what LoRA adds to the LLM
    "draws": ("image_adapter", "style_adapter", "null_context", "vae", "unet", "garment"),
    "writes": ("text_adapter", "llama", "lora"),
}


class UniFashion(nn.Module):
    """
    draws   with image adapter, VAE, U-Net and garment encoder
    writes  with text adapter and LLM; LoRA is put into it once its base weights are there

    Only composed search learns with both halves (Eq. 11 and 12), and the halves of FULL are 2 and 7 billion parameters. ViT and Q-Former are in each.
    """

    def __init__(self, cfg: UniFashionConfig, draws: bool = True, writes: bool = False) -> None:
        super().__init__()
        self.cfg = cfg
        # What training has learned so far of the half that is not here, and the record of what it was trained on (`seen`)
        self.carried: dict[str, Tensor] = {}
        self.vit = ViT(cfg.vit)
        self.qformer = QFormer(cfg.qformer)
        if draws:
            self.image_adapter = nn.Linear(cfg.qformer.dim, cfg.unet.context_dim)
            self.style_adapter = nn.Linear(cfg.unet.context_dim, cfg.unet.time_dim)
            zero(self.style_adapter)
            self.null_context = nn.Parameter(torch.zeros(1, 1, cfg.unet.context_dim))
            self.vae = VAE(cfg.vae)
            self.unet = UNet(cfg.unet)
            self.garment = GarmentEncoder(cfg.unet, cfg.vae.latent_channels)
        if writes:
            self.text_adapter = nn.Linear(cfg.qformer.dim, cfg.llama.dim)
            self.llama = Llama(cfg.llama)

    @property
    def device(self) -> torch.device:
        return self.qformer.query_tokens.device

    @property
    def dtype(self) -> torch.dtype:
        return self.qformer.query_tokens.dtype

    def shards(self) -> list[nn.Module]:
        """What --shard cuts among the processes, most of the LLM and of what draws: modules, none within another."""
        units: list[nn.Module] = []
        if hasattr(self, "llama"):
            units += [*self.llama.layers, self.llama.embed, self.llama.lm_head]
        if hasattr(self, "unet"):
            blocks = (ResBlock, Attention, GEGLU)
            units += [m for net in (self.unet, self.garment) for m in net.modules() if isinstance(m, blocks)]
        return units

    def see(self, picture: Tensor) -> Tensor:
        """picture (b,3,224,224) normalised as CLIP's -> (b,257,1408), what the Q-Former attends to. The ViT is frozen."""
        with torch.no_grad():
            features = self.vit(picture.to(self.dtype))
        return self.qformer.ln_vision(features)

    def soft_prompt(self, z: Tensor, before: Tensor, after: Tensor) -> Tensor:
        """
        z (b,32,768) between the words of the template (`tokenizers.prompt`) -> embeddings (b,p+32+r,4096).

        before (p,) and after (b,r) token ids; right of the template, `after` may go on with an answer and with padding
        """
        words = self.llama.embed
        soft = self.text_adapter(z)
        return torch.cat([words(before).expand(len(z), -1, -1), soft, words(after)], dim=1)

    def predict_words(self, z: Tensor, before: Tensor, after: Tensor) -> Tensor:
        """As `soft_prompt` -> logits (b,r,vocab) of each token of `after`, from z and the tokens before it (Eq. 6)."""
        hidden = self.llama(self.soft_prompt(z, before, after))
        return self.llama.logits(hidden[:, -after.shape[1] - 1 : -1])

    def write(
        self,
        z: Tensor,
        before: Tensor,
        after: Tensor,
        max_tokens: int,
        eos: int,
        beams: int = 1,
    ) -> Tensor:
        """As `soft_prompt`, with one template for all -> the caption's token ids (b,max_tokens), filled up with `eos`."""
        prompt = self.soft_prompt(z, before, after)
        mask = torch.ones(prompt.shape[:2], dtype=torch.bool, device=prompt.device)
        return generate(self.llama, prompt, mask, max_tokens, eos, beams)

    def context(self, seen: Tensor, ids: Tensor | None = None, mask: Tensor | None = None) -> Tensor:
        """seen (b,257,1408) from `see`, with a text (b,t) or without -> context (b,32,768) for the U-Net."""
        z, _ = self.qformer(seen, ids, mask)
        return self.image_adapter(z)

    def style(self, context: Tensor) -> Tensor:
        """
        context (b,q,context_dim) -> (b,time_dim), what every res block of the U-Net and the garment encoder is told of it.

        Not in the paper. TINY has cross-attention at one coarse level only; what it says of a pattern or a second colour takes
        far longer to reach the fine ones, which have to draw it. It starts at zero: published U-Nets draw as they did.
        """
        return self.style_adapter(context.mean(1))

    def drop_context(self, context: Tensor, keep_context: Tensor) -> Tensor:
        """keep_context (b,) bool -> the context, with the null vector in place of every token where it is False."""
        return torch.where(keep_context[:, None, None], context, self.null_context.to(context.dtype))

    def scene(self, agnostic: Tensor, keep: Tensor, pose: Tensor | None = None) -> Tensor:
        """
        What the U-Net reads beside the noisy latent, in the order of StableVITON.

        agnostic  (b,4,y,x) scaled latent of the person with the region to repaint in grey
        keep      (b,1,y,x) in [0,1], 1 = keep, 0 = repaint
        pose      (b,4,y,x) scaled latent of the densepose picture; without it, the null pose
        """
        return torch.cat([agnostic, keep, torch.zeros_like(agnostic) if pose is None else pose], dim=1)

    def blank_scene(self, b: int) -> Tensor:
        """Everything to repaint, nothing known: the scene of phase 1, (b,9,y,x)."""
        y, x = self.cfg.picture
        with torch.no_grad():
            grey = self.vae.encode(self.null_context.new_zeros(1, 3, y, x)).expand(b, -1, -1, -1)
        return self.scene(grey, torch.zeros_like(grey[:, :1]))

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
        unet_in = torch.cat([x, scene], dim=1)
        inject = None
        style = self.style(context)
        if hint is not None:
            features = self.garment(unet_in, t, self.garment.context(context), hint, style)
            inject = partial(self.garment.inject, features, keep_hint)
        out = self.unet(unet_in, t, self.unet.context(context), inject, style)
        if self.cfg.prediction == "eps":
            return out
        # In bfloat16, 1 - a_t would be 0 where there is little noise.
        wide = torch.promote_types(x.dtype, torch.float32)
        a = alphas_cumprod(x.device)[t].to(wide)[:, None, None, None]
        return v_to_eps(out.to(wide), x.to(wide), a)

    def q2i(self, predicted: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """Eq. 7, the mean over (b,4,y,x). Where the U-Net predicts v, v's squared error: eps - eps' = sqrt(a_t) (v - v')."""
        loss = eps_loss(predicted, noise)
        if self.cfg.prediction == "v":
            loss = loss / alphas_cumprod(t.device)[t].to(loss.dtype)
        return loss.mean()

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
            inject = None
            if hint is not None:
                features = self.garment(unet_in, at, for_garment, hint, style)
                inject = partial(self.garment.inject, features, None)
            out = self.unet(unet_in, at, for_unet, inject, style).to(noise.dtype)
            out = guided(*out.chunk(2), guidance) if both else out
            return out if self.cfg.prediction == "eps" else v_to_eps(out, x, ALPHAS[t])

        yield from SAMPLERS[sampler](eps, noise, steps)


@torch.no_grad()
def start_adapter(adapter: nn.Linear, z: Tensor, std: float = 1.0, floor: float = 0.01) -> None:
    """
    Initialise an adapter so that over z (b,q,dim), some outputs of the Q-Former, it whitens: mean 0, variance std^2.

    Nearly all of Z is the same for every picture (after ITM, of sketches 98 %); what tells them apart is in directions of
    little variance, which a plain random layer leaves little. Variances below `floor` times their mean are not blown up.
    """
    flat = z.flatten(0, -2).double()
    mean = flat.mean(0)
    variance, axes = torch.linalg.eigh((flat - mean).T @ (flat - mean) / len(flat))
    least = floor * variance.mean() + 1e-6
    turn = nn.init.orthogonal_(torch.empty_like(adapter.weight)).double()
    # Where it has more outputs than inputs, the variance is spread over more dims.
    turn *= max(1.0, adapter.out_features / adapter.in_features) ** 0.5
    weight = std * turn @ axes @ torch.diag((variance + least).rsqrt()) @ axes.T
    adapter.weight.copy_(weight)
    adapter.bias.copy_(-weight @ mean)
