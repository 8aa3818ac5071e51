"""UniFashion: wires the parts, and owns what is between them: the adapters and the null context.

picture (b,3,224,224) --see--> (b,257,1408) --Q-Former, text or none--> Z (b,32,768) --image adapter--> context (b,32,768)
agnostic, mask, pose  --scene--> (b,9,64,48);  cloth photo or sketch --VAE--> hint (b,4,64,48)
noise (b,4,64,48), scene, context, hint --sample--> latent --VAE--> picture (b,3,512,384)      (`denoiser`)

Z (b,32,768) --text adapter--> soft prompt (b,32,4096) within the words of the template --write--> tokens of a caption
"""

import torch
from torch import Tensor, nn

from unifashion.blocks import GEGLU, Attention, ResBlock, zero
from unifashion.config import UniFashionConfig
from unifashion.denoiser import Denoiser
from unifashion.diffusion import alphas_cumprod, eps_loss
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


class UniFashion(Denoiser):
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

    # Not the null context's, which the half that writes has not.
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

    def blank_scene(self, b: int) -> Tensor:
        """Everything to repaint, nothing known: the scene of phase 1, (b,9,y,x)."""
        y, x = self.cfg.picture
        with torch.no_grad():
            grey = self.vae.encode(self.null_context.new_zeros(1, 3, y, x)).expand(b, -1, -1, -1)
        return self.scene(grey, torch.zeros_like(grey[:, :1]))

    def q2i(self, predicted: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """Eq. 7, the mean over (b,4,y,x). Where the U-Net predicts v, v's squared error: eps - eps' = sqrt(a_t) (v - v')."""
        loss = eps_loss(predicted, noise)
        if self.cfg.prediction == "v":
            loss = loss / alphas_cumprod(t.device)[t].to(loss.dtype)
        return loss.mean()


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
