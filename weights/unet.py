"""Stable Diffusion's U-Net: SD v1.4 (4 channels), Paint-by-Example (9), StableVITON (13), in CompVis' layout or diffusers'.

CompVis' names are relative to `model.diffusion_model.` in all three files; only the first convolution's shape tells them apart.
It does not tell SD-inpainting's 9 channels from Paint-by-Example's: the same shapes in another order, with the mask inverted.
CompVis counts its blocks flat, `input_blocks.0` to `11` and `output_blocks.0` to `11`, and so do we; diffusers counts them by
level. No tensor differs.
"""

from weights.rename import Layout, Layouts, Table, under

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

DIFFUSERS_RES_BLOCK: Table = {
    "norm1.*":                              "norm1.*",
    "conv1.*":                              "conv1.*",
    "time_emb_proj.*":                      "time.*",
    "norm2.*":                              "norm2.*",
    "conv2.*":                              "conv2.*",
}
DIFFUSERS_SHORTCUT: Table = {
    "conv_shortcut.*":                      "shortcut.*",
}
LEVELS, RES_BLOCKS = 4, 2


def diffusers() -> Table:
    rows: Table = {
        "time_embedding.linear_1.*":        "time_embed.fc1.*",
        "time_embedding.linear_2.*":        "time_embed.fc2.*",
        "conv_in.*":                        "encoder.blocks.0.*",
        **under("mid_block.resnets.0.",     "encoder.middle_in.", DIFFUSERS_RES_BLOCK),
        **under("mid_block.attentions.0.",  "encoder.middle_attend.", TRANSFORMER),
        **under("mid_block.resnets.1.",     "encoder.middle_out.", DIFFUSERS_RES_BLOCK),
        "conv_norm_out.*":                  "norm_out.*",
        "conv_out.*":                       "conv_out.*",
    }
    for level in range(LEVELS):  # down: from the finest
        first = 1 + level * (RES_BLOCKS + 1)
        for i in range(RES_BLOCKS):
            theirs, ours = f"down_blocks.{level}.", f"encoder.blocks.{first + i}."
            wider = i == 0 and level in (1, 2)
            res = DIFFUSERS_RES_BLOCK | (DIFFUSERS_SHORTCUT if wider else {})
            rows |= under(f"{theirs}resnets.{i}.", f"{ours}res.", res)
            if level < LEVELS - 1:  # the coarsest has no attention
                rows |= under(f"{theirs}attentions.{i}.", f"{ours}attend.", TRANSFORMER)
        if level < LEVELS - 1:
            rows[f"down_blocks.{level}.downsamplers.0.conv.*"] = f"encoder.blocks.{first + RES_BLOCKS}.conv.*"
    for level in range(LEVELS):  # up: from the coarsest
        first = level * (RES_BLOCKS + 1)
        for i in range(RES_BLOCKS + 1):
            theirs, ours = f"up_blocks.{level}.", f"decoder.{first + i}."
            rows |= under(f"{theirs}resnets.{i}.", f"{ours}res.", DIFFUSERS_RES_BLOCK | DIFFUSERS_SHORTCUT)
            if level > 0:
                rows |= under(f"{theirs}attentions.{i}.", f"{ours}attend.", TRANSFORMER)
        if level < LEVELS - 1:
            rows[f"up_blocks.{level}.upsamplers.0.conv.*"] = f"decoder.{first + RES_BLOCKS}.up.conv.*"
    return rows
# fmt: on


UNETS: Layouts = {
    "input_blocks.0.0.weight": Layout(UNET),
    "down_blocks.0.resnets.0.norm1.weight": Layout(diffusers()),
}
