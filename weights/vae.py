"""Stable Diffusion's autoencoder, CompVis layout -> `unifashion.vae.VAE`.

In whole checkpoints the names stand behind `first_stage_model.` (`under` puts it there); StableVITON's
`VITONHD_VAE_finetuning.ckpt` has them bare. Both number the decoder's levels from the finest, and so do we.
"""

from weights.rename import Table, under

# fmt: off
RES_BLOCK: Table = {
    # original    ours
    "norm1.*":    "norm1.*",
    "conv1.*":    "conv1.*",
    "norm2.*":    "norm2.*",
    "conv2.*":    "conv2.*",
}

MIDDLE: Table = {
    **under("block_1.",  "0.", RES_BLOCK),
    "attn_1.norm.*":     "1.norm.*",
    "attn_1.q.*":        "1.q.*",
    "attn_1.k.*":        "1.k.*",
    "attn_1.v.*":        "1.v.*",
    "attn_1.proj_out.*": "1.out.*",
    **under("block_2.",  "2.", RES_BLOCK),
}

VAE: Table = {
    "encoder.conv_in.*":                       "encoder.conv_in.*",
    **under("encoder.down.#.block.#.",         "encoder.levels.#.blocks.#.", RES_BLOCK),
    "encoder.down.#.block.#.nin_shortcut.*":   "encoder.levels.#.blocks.#.shortcut.*",  # where the width changes
    "encoder.down.#.downsample.conv.*":        "encoder.levels.#.resample.conv.*",
    **under("encoder.mid.",                    "encoder.middle.", MIDDLE),
    "encoder.norm_out.*":                      "encoder.norm_out.*",
    "encoder.conv_out.*":                      "encoder.conv_out.*",
    "quant_conv.*":                            "quant_conv.*",
    "post_quant_conv.*":                       "post_quant_conv.*",
    "decoder.conv_in.*":                       "decoder.conv_in.*",
    **under("decoder.mid.",                    "decoder.middle.", MIDDLE),
    **under("decoder.up.#.block.#.",           "decoder.levels.#.blocks.#.", RES_BLOCK),
    "decoder.up.#.block.#.nin_shortcut.*":     "decoder.levels.#.blocks.#.shortcut.*",
    "decoder.up.#.upsample.conv.*":            "decoder.levels.#.resample.conv.*",
    "decoder.norm_out.*":                      "decoder.norm_out.*",
    "decoder.conv_out.*":                      "decoder.conv_out.*",
    "loss.*":                                  None,  # LPIPS, with which StableVITON's decoder was fine-tuned
}
# fmt: on
