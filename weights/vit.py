"""LAVIS `eva_vit_g.pth` -> `unifashion.vit.ViT`."""

from weights.rename import Table

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
# fmt: on
