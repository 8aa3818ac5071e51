"""Paint-by-Example and StableVITON whole -> `unifashion.stableviton.StableVITON`.

    VITONHD.ckpt                                      StableVITON as published: garment encoder, pose
    paint-by-example/model.ckpt                       Paint-by-Example, CompVis' layout
    paint-by-example/{unet,vae,image_encoder}/        the same, diffusers' layout

What sees the garment, image tower and exemplar, is in both under the same names; diffusers has it in a file of its own.
"""

from pathlib import Path

import torch
from torch import Tensor, nn

from unifashion import UserError
from unifashion.clip import ImageTower
from unifashion.exemplar import Exemplar
from unifashion.stableviton import PUBLISHED, StableVITON
from weights.clip import HF_IMAGE
from weights.containers import read_checkpoint, read_folder
from weights.files import find, source_of
from weights.garment import NETWORKS, SCHEDULE, with_control_convs
from weights.rename import Table, blank, fused, load_into, load_layout, naming, thirds, under
from weights.unet import PREFIX, UNET, UNETS
from weights.vae import VAE, VAES

# fmt: off
BLOCK: Table = {  # as `unfused` leaves it
    # original            ours
    "ln_1.*":             "norm1.*",
    **fused("attn.c_qkv.weight", "attn.#.weight"),
    **fused("attn.c_qkv.bias",   "attn.#.bias"),
    "attn.c_proj.*":      "attn.out.*",
    "ln_2.*":             "norm2.*",
    "mlp.c_fc.*":         "mlp.fc1.*",
    "mlp.c_proj.*":       "mlp.fc2.*",
}
EXEMPLAR: Table = {  # CompVis
    **under("cond_stage_model.transformer.vision_model.",  "image.", HF_IMAGE),
    **under("cond_stage_model.mapper.resblocks.#.",        "exemplar.blocks.#.", BLOCK),
    "cond_stage_model.final_ln.*":                         "exemplar.norm.*",
    "proj_out.*":                                          "exemplar.proj.*",
    "learnable_vector":                                    "null_context",
}

DIFFUSERS_BLOCK: Table = {
    "norm1.*":            "norm1.*",
    "attn1.to_q.*":       "attn.q.*",
    "attn1.to_k.*":       "attn.k.*",
    "attn1.to_v.*":       "attn.v.*",
    "attn1.to_out.0.*":   "attn.out.*",
    "norm3.*":            "norm2.*",  # a norm2 would be that of a second attention, which there is not
    "ff.net.0.proj.*":    "mlp.fc1.*",
    "ff.net.2.*":         "mlp.fc2.*",
}
DIFFUSERS: Table = {  # image_encoder/
    **under("model.vision_model.",  "image.", HF_IMAGE),
    **under("mapper.blocks.#.",     "exemplar.blocks.#.", DIFFUSERS_BLOCK),
    "final_layer_norm.*":           "exemplar.norm.*",
    "proj_out.*":                   "exemplar.proj.*",
    "uncond_vector":                "null_context",
}

STABLEVITON: Table = {**NETWORKS, **EXEMPLAR}
PAINT_BY_EXAMPLE: Table = {
    **under(PREFIX,                "unet.", UNET),
    **under("first_stage_model.",  "vae.", VAE),
    **EXEMPLAR,
    **SCHEDULE,
}
# fmt: on

FILES = {  # name of the model: its file, and the table that reads it
    # Not VITONHD_PBE_pose.ckpt, which has the same names: StableVITON's training starts from it. Its garment encoder does
    # nothing yet, so that it would draw as Paint-by-Example does, under StableVITON's name.
    "stableviton": ("VITONHD.ckpt", STABLEVITON),
    "paint-by-example": ("paint-by-example/model.ckpt", PAINT_BY_EXAMPLE),
}


PARTS = ("unet", "vae", "image_encoder")  # diffusers' folders


def unfused(checkpoint: dict[str, Tensor]) -> dict[str, Tensor]:
    """CompVis' tensors with c_qkv as q, k and v, which it holds one after the other, since there is one head.

    Views: nothing is copied. Raises UserError for what does not divide into three.
    """
    tensors = {}
    for name, tensor in checkpoint.items():
        if ".attn.c_qkv." in name:
            tensors |= thirds(name, tensor)
        else:
            tensors[name] = tensor
    return tensors


def published_file(name: str, folder: Path) -> Path:
    """Its file in `folder`, or of Paint-by-Example the folder of diffusers' three. Raises UserError, which says where to get it."""
    file, _ = FILES[name]
    path = find(folder, file)
    if path and path.is_dir():
        raise UserError(f"{path} is a folder, not the file of this name")
    if path is None and name == "paint-by-example" and (folder / name / PARTS[0]).is_dir():
        if missing := [part for part in PARTS if not (folder / name / part).is_dir()]:
            raise UserError(f"{folder / name / missing[0]} is missing: {source_of(name)}")
        path = folder / name
    if path is None:
        raise UserError(f"{folder / file} is missing: {source_of(file)}")
    return path


def load_published(
    name: str,
    folder: Path,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
) -> StableVITON:
    """
    One of `PUBLISHED`, whole and frozen, from its file in `folder`: the VAE, too, is that of the file, as in its own inference.

    Raises UserError, which says where to get it, for a file that is missing, and for one that is damaged or another model's.
    """
    path, table = published_file(name, folder), FILES[name][1]
    model = blank(lambda: StableVITON(PUBLISHED[name]))
    if path.is_dir():
        _load_diffusers(path, model, dtype, device)
    else:
        with naming(
            path, f"is not {name}"
        ):  # no name for the checkpoint: load_into frees it tensor by tensor
            load_into(model, as_ours(read_checkpoint(path), model), table, dtype, device)
    if model.cfg.dresses and model.garment.untrained:
        raise UserError(
            f"{path} is not {name}: its garment encoder is untrained, as in VITONHD_PBE_pose.ckpt"
        )
    return model.eval().requires_grad_(False)


def as_ours(checkpoint: dict[str, Tensor], model: StableVITON) -> dict[str, Tensor]:
    """A whole file as its table reads it: `unfused`, and for StableVITON `with_control_convs`."""
    checkpoint = unfused(checkpoint)
    return with_control_convs(checkpoint, model.garment) if model.cfg.dresses else checkpoint


def _load_diffusers(folder: Path, model: StableVITON, dtype: torch.dtype, device: str | torch.device) -> None:
    otherwise = "is not paint-by-example"
    for part, module, layouts in (("unet", model.unet, UNETS), ("vae", model.vae, VAES)):
        with naming(folder / part, otherwise):
            load_layout(module, read_folder(folder / part), layouts, dtype, device)
    part = folder / "image_encoder"
    with naming(part, otherwise):
        model.null_context = load_image_encoder(part, model.image, model.exemplar, dtype, device)


def load_image_encoder(
    folder: Path,
    image: ImageTower,
    exemplar: Exemplar,
    dtype: torch.dtype | None = None,
    device: str | torch.device | None = None,
) -> nn.Parameter:
    """
    Fill both, which may be on the meta device, from diffusers' folder `image_encoder` -> its uncond_vector
    (1,1,context_dim), the null context. UserError if the file holds anything that DIFFUSERS does not name, or lacks anything.
    """
    parts = nn.ModuleDict({"image": image, "exemplar": exemplar})
    null = torch.empty(1, 1, exemplar.proj.out_features, device="meta")
    parts.register_parameter("null_context", nn.Parameter(null))
    load_into(parts, read_folder(folder), DIFFUSERS, dtype, device)
    return parts.null_context
