"""Stable Diffusion's U-Net in CompVis' layout: SD v1.4 (4 channels), Paint-by-Example (9), StableVITON (13).

The names are relative to `model.diffusion_model.` in all three files; only the first convolution's shape tells them apart.
It does not tell SD-inpainting's 9 channels from Paint-by-Example's: the same shapes in another order, with the mask inverted.
CompVis counts its blocks flat, `input_blocks.0` to `11` and `output_blocks.0` to `11`, and so do we.
"""

from weights.rename import Table, under

PREFIX = "model.diffusion_model."

# fmt: off
RES_BLOCK: Table = {
    # original                              ours
    "in_layers.0.*":                        "norm1.*",
    "in_layers.2.*":                        "conv1.*",
    "emb_layers.1.*":                       "time.*",
    "out_layers.0.*":                       "norm2.*",
    "out_layers.3.*":                       "conv2.*",
}
SHORTCUT: Table = {  # where a res block changes the width; the middle's do not
    "skip_connection.*":                    "shortcut.*",
}
TRANSFORMER: Table = {
    "norm.*":                               "norm.*",
    "proj_in.*":                            "proj_in.*",
    "transformer_blocks.0.norm1.*":         "norm1.*",
    "transformer_blocks.0.attn1.to_q.*":    "attn1.q.*",
    "transformer_blocks.0.attn1.to_k.*":    "attn1.k.*",
    "transformer_blocks.0.attn1.to_v.*":    "attn1.v.*",
    "transformer_blocks.0.attn1.to_out.0.*": "attn1.out.*",
    "transformer_blocks.0.norm2.*":         "norm2.*",
    "transformer_blocks.0.attn2.to_q.*":    "attn2.q.*",
    "transformer_blocks.0.attn2.to_k.*":    "attn2.k.*",
    "transformer_blocks.0.attn2.to_v.*":    "attn2.v.*",
    "transformer_blocks.0.attn2.to_out.0.*": "attn2.out.*",
    "transformer_blocks.0.norm3.*":         "norm3.*",
    "transformer_blocks.0.ff.net.0.proj.*": "ff.proj.*",
    "transformer_blocks.0.ff.net.2.*":      "ff.out.*",
    "proj_out.*":                           "proj_out.*",
}
ENCODER: Table = {  # StableVITON's garment encoder is a second one
    "time_embed.0.*":                       "time_embed.fc1.*",
    "time_embed.2.*":                       "time_embed.fc2.*",
    "input_blocks.0.0.*":                   "encoder.blocks.0.*",
    **under("input_blocks.#.0.",            "encoder.blocks.#.res.", RES_BLOCK | SHORTCUT),
    **under("input_blocks.#.1.",            "encoder.blocks.#.attend.", TRANSFORMER),
    "input_blocks.#.0.op.*":                "encoder.blocks.#.conv.*",
    **under("middle_block.0.",              "encoder.middle_in.", RES_BLOCK),
    **under("middle_block.1.",              "encoder.middle_attend.", TRANSFORMER),
    **under("middle_block.2.",              "encoder.middle_out.", RES_BLOCK),
}
UNET: Table = {
    **ENCODER,
    **under("output_blocks.#.0.",           "decoder.#.res.", RES_BLOCK | SHORTCUT),
    **under("output_blocks.#.1.",           "decoder.#.attend.", TRANSFORMER),
    "output_blocks.#.1.conv.*":             "decoder.#.up.conv.*",  # on the coarsest level, which has no attention
    "output_blocks.#.2.conv.*":             "decoder.#.up.conv.*",
    "out.0.*":                              "norm_out.*",
    "out.2.*":                              "conv_out.*",
}
# fmt: on
