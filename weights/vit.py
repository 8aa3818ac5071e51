"""EVA-CLIP's ViT-g in BLIP-2 -> `unifashion.vit.ViT`: LAVIS `eva_vit_g.pth`, Hugging Face's port, UniFashion's own .pt."""

import torch

from unifashion import UserError
from weights.rename import Checkpoint, Table, thirds

# fmt: off
VIT: Table = {
    # original                     ours
    "cls_token":                   "cls_token",
    "pos_embed":                   "pos_embed",
    "patch_embed.proj.*":          "patch_embed.*",
    "blocks.#.norm1.*":            "blocks.#.norm1.*",
    "blocks.#.attn.qkv.weight":    "blocks.#.attn.qkv.weight",
    "blocks.#.attn.q_bias":        "blocks.#.attn.q_bias",
    "blocks.#.attn.v_bias":        "blocks.#.attn.v_bias",  # keys have no bias
    "blocks.#.attn.proj.*":        "blocks.#.attn.proj.*",
    "blocks.#.norm2.*":            "blocks.#.norm2.*",
    "blocks.#.mlp.fc1.*":          "blocks.#.mlp.0.*",
    "blocks.#.mlp.fc2.*":          "blocks.#.mlp.2.*",
    # The file's size says that it holds a 40th block and a head; these names for them are likely, not confirmed.
    "blocks.39.*":                 None,  # BLIP-2 reads the output of the 39th block
    "norm.*":                      None,  # and reads it unnormalised: `ln_vision` is in the Q-Former's file
    "head.*":                      None,  # EVA-CLIP's projection to its own text space
}

HF_VIT: Table = {  # as `without_key_bias` leaves it
    "embeddings.class_embedding":             "cls_token",
    "embeddings.position_embedding":          "pos_embed",
    "embeddings.patch_embedding.*":           "patch_embed.*",
    "encoder.layers.#.layer_norm1.*":         "blocks.#.norm1.*",
    "encoder.layers.#.self_attn.qkv.weight":  "blocks.#.attn.qkv.weight",
    "encoder.layers.#.self_attn.qkv.bias[q]": "blocks.#.attn.q_bias",
    "encoder.layers.#.self_attn.qkv.bias[v]": "blocks.#.attn.v_bias",
    "encoder.layers.#.self_attn.projection.*": "blocks.#.attn.proj.*",
    "encoder.layers.#.layer_norm2.*":         "blocks.#.norm2.*",
    "encoder.layers.#.mlp.fc1.*":             "blocks.#.mlp.0.*",
    "encoder.layers.#.mlp.fc2.*":             "blocks.#.mlp.2.*",
}
# fmt: on


def without_key_bias(checkpoint: Checkpoint) -> Checkpoint:
    """Hugging Face's one bias of q, k and v, (3*dim,), as EVA's two of q and v. UserError unless that of the keys is 0."""
    tensors: Checkpoint = {}
    for name, bias in checkpoint.items():
        if not name.endswith("self_attn.qkv.bias"):
            tensors[name] = bias
            continue
        parts = thirds(name, bias)
        keys = parts.pop(f"{name}[k]")
        if not bias.is_meta and torch.any(keys):
            raise UserError(f"{name}: its keys have a bias, EVA-CLIP's have none")
        tensors |= parts
    return tensors
