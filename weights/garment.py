"""StableVITON's checkpoints: the garment encoder, and how the whole file is read (VITONHD.ckpt, VITONHD_PBE_pose.ckpt).

    model.diffusion_model.*    U-Net 686 tensors; warp_flow_blks, warp_zero_convs 252: the garment encoder's attention
    control_model.*            garment encoder 300
    first_stage_model.*        VAE 248 (VITONHD_VAE_finetuning.ckpt has a better one)
    learnable_vector           what the networks saw for "no condition": may start our null context

The rest is left out, row by row, with its reason. `weights.exemplar` reads it, too, where StableVITON itself is wanted.
"""

from pathlib import Path

import torch
from torch import Tensor, nn

import weights.vae
from unifashion.garment import GarmentEncoder
from unifashion.unet import UNet
from unifashion.vae import VAE
from weights.containers import read_checkpoint
from weights.rename import Table, load_into, under
from weights.unet import ENCODER, PREFIX, TRANSFORMER, UNET

# fmt: off
GARMENT: Table = {
    # original                                          ours
    **under("control_model.",                           "", ENCODER),
    "control_model.cond_first_block.0.*":               "hint_in.*",
    **under("model.diffusion_model.warp_flow_blks.#.",  "blocks.#.", TRANSFORMER),
    "model.diffusion_model.warp_zero_convs.#.*":        "zero_convs.#.*",
    "control_convs.#.*":                                "control_convs.#.*",  # ours alone: `with_control_convs` adds them
}
SCHEDULE: Table = {  # the noise schedule, as buffers: diffusion.py computes it
    "betas":                                            None,
    "alphas_cumprod":                                   None,
    "alphas_cumprod_prev":                              None,
    "sqrt_alphas_cumprod":                              None,
    "sqrt_one_minus_alphas_cumprod":                    None,
    "log_one_minus_alphas_cumprod":                     None,
    "sqrt_recip_alphas_cumprod":                        None,
    "sqrt_recipm1_alphas_cumprod":                      None,
    "posterior_variance":                               None,
    "posterior_log_variance_clipped":                   None,
    "posterior_mean_coef1":                             None,
    "posterior_mean_coef2":                             None,
}
NETWORKS: Table = {  # all but what sees the garment for the context
    **under(PREFIX,                                     "unet.", UNET),
    **under("",                                         "garment.", GARMENT),
    **under("first_stage_model.",                       "vae.", weights.vae.VAE),
    "lastzc.*":                                         None,  # the original makes this 1x1 convolution and never calls it
    "logvar":                                           None,  # weights of the loss per timestep, all zero: not learnt
    **SCHEDULE,
}
STABLEVITON: Table = {  # as UniFashion starts from it; `weights.exemplar` reads the whole
    **NETWORKS,
    "learnable_vector":                                 "null_context",
    "cond_stage_model.*":                               None,  # Paint-by-Example's image encoder: our context is the Q-Former's
    "proj_out.*":                                       None,  # ... and its projection to the context
}
# fmt: on


def with_control_convs(checkpoint: dict[str, Tensor], garment: GarmentEncoder) -> dict[str, Tensor]:
    """The checkpoint, and zeros for the one thing that StableVITON's garment encoder has not: ours starts as the original."""
    fresh = garment.control_convs.named_parameters(prefix="control_convs")
    return {**{name: torch.zeros(p.shape) for name, p in fresh}, **checkpoint}


def load_stableviton(
    path: str | Path,
    unet: UNet,
    garment: GarmentEncoder,
    vae: VAE,
    dtype: torch.dtype | None = None,
    device: str | torch.device | None = None,
) -> nn.Parameter:
    """
    Fill the three modules, which may be on the meta device, from the file -> its learnable_vector (1,1,context_dim).

    That vector is what Paint-by-Example and StableVITON were trained to see when there is no condition: it may start
    our `UniFashion.null_context`. UserError if the file holds anything that STABLEVITON does not name, or lacks anything.
    """
    parts = nn.ModuleDict({"unet": unet, "garment": garment, "vae": vae})
    null = torch.empty(1, 1, unet.cfg.context_dim, device="meta")
    parts.register_parameter("null_context", nn.Parameter(null))
    # no name for the checkpoint: load_into frees it tensor by tensor
    load_into(
        parts, with_control_convs(read_checkpoint(path), garment), STABLEVITON, dtype=dtype, device=device
    )
    return parts.null_context
