"""Stable Diffusion's autoencoder -> `unifashion.vae.VAE`, from CompVis' layout or diffusers', old names or new.

In CompVis' whole checkpoints the names stand behind `first_stage_model.`; StableVITON's `VITONHD_VAE_finetuning.ckpt` has
them bare. Both number the decoder's levels from the finest, and so do we; diffusers numbers them from the coarsest.
"""

from weights.rename import Checkpoint, Layout, Layouts, Table, under

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

LEVELS = 4


def diffusers(q: str, k: str, v: str, out: str) -> Table:
    """The rows of diffusers' layout, whose attention has had two sets of names. Its matrices are read by `as_convolutions`."""
    middle: Table = {
        **under("resnets.0.",              "0.", RES_BLOCK),
        "attentions.0.group_norm.*":       "1.norm.*",
        f"attentions.0.{q}.*":             "1.q.*",
        f"attentions.0.{k}.*":             "1.k.*",
        f"attentions.0.{v}.*":             "1.v.*",
        f"attentions.0.{out}.*":           "1.out.*",
        **under("resnets.1.",              "2.", RES_BLOCK),
    }
    rows: Table = {
        "encoder.conv_in.*":                                     "encoder.conv_in.*",
        **under("encoder.down_blocks.#.resnets.#.",              "encoder.levels.#.blocks.#.", RES_BLOCK),
        "encoder.down_blocks.#.resnets.#.conv_shortcut.*":       "encoder.levels.#.blocks.#.shortcut.*",
        "encoder.down_blocks.#.downsamplers.0.conv.*":           "encoder.levels.#.resample.conv.*",
        **under("encoder.mid_block.",                            "encoder.middle.", middle),
        "encoder.conv_norm_out.*":                               "encoder.norm_out.*",
        "encoder.conv_out.*":                                    "encoder.conv_out.*",
        "quant_conv.*":                                          "quant_conv.*",
        "post_quant_conv.*":                                     "post_quant_conv.*",
        "decoder.conv_in.*":                                     "decoder.conv_in.*",
        **under("decoder.mid_block.",                            "decoder.middle.", middle),
        "decoder.conv_norm_out.*":                               "decoder.norm_out.*",
        "decoder.conv_out.*":                                    "decoder.conv_out.*",
    }
    for i in range(LEVELS):  # from the coarsest
        theirs, ours = f"decoder.up_blocks.{i}.", f"decoder.levels.{LEVELS - 1 - i}."
        rows |= under(f"{theirs}resnets.#.", f"{ours}blocks.#.", RES_BLOCK)
        if i >= LEVELS - 2:  # where the width changes
            rows[f"{theirs}resnets.#.conv_shortcut.*"] = f"{ours}blocks.#.shortcut.*"
        if i < LEVELS - 1:
            rows[f"{theirs}upsamplers.0.conv.*"] = f"{ours}resample.conv.*"
    return rows


NEW_NAMES = diffusers("to_q", "to_k", "to_v", "to_out.0")
OLD_NAMES = diffusers("query", "key", "value", "proj_attn")  # of files from before diffusers 0.15
# fmt: on


def as_convolutions(checkpoint: Checkpoint) -> Checkpoint:
    """diffusers' four attention matrices (c,c) as the 1x1 convolutions (c,c,1,1) that they were trained as: views."""
    return {
        name: x[:, :, None, None] if ".attentions.0." in name and x.ndim == 2 else x
        for name, x in checkpoint.items()
    }


VAES: Layouts = {
    "decoder.mid.attn_1.q.weight": Layout(VAE),
    "decoder.mid_block.attentions.0.to_q.weight": Layout(NEW_NAMES, as_convolutions),
    "decoder.mid_block.attentions.0.query.weight": Layout(OLD_NAMES, as_convolutions),
}
