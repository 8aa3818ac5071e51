"""Llama in Hugging Face's layout, Vicuna-7B v1.5 or LLaVA-1.5's language model -> `unifashion.llama.Llama`."""

import sys
from pathlib import Path

from torch import Tensor

from weights.containers import read_folder
from weights.rename import Table, under

# fmt: off
LAYER: Table = {
    # original                          ours
    "input_layernorm.weight":           "attn_norm.weight",
    "self_attn.q_proj.weight":          "attn.q.weight",
    "self_attn.k_proj.weight":          "attn.k.weight",
    "self_attn.v_proj.weight":          "attn.v.weight",
    "self_attn.o_proj.weight":          "attn.o.weight",
    "post_attention_layernorm.weight":  "mlp_norm.weight",  # its name notwithstanding, it is before the MLP
    "mlp.gate_proj.weight":             "mlp.gate.weight",
    "mlp.up_proj.weight":               "mlp.up.weight",
    "mlp.down_proj.weight":             "mlp.down.weight",
    "self_attn.rotary_emb.inv_freq":    None,  # the speeds of rotation as a tensor: `rotations` computes them
}

LLAMA: Table = {
    "model.embed_tokens.weight":  "embed.weight",
    **under("model.layers.#.",    "layers.#.", LAYER),
    "model.norm.weight":          "norm.weight",
    "lm_head.weight":             "lm_head.weight",
    "model.mm_projector.*":       None,  # LLaVA's own way from its picture to its tokens
}
# fmt: on

# fmt: off
LLAVA_HF: Table = {  # llava-1.5-7b-hf: the whole of LLaVA
    **under("language_model.",     "",       {row: ours for row, ours in LLAMA.items() if "mm_projector" not in row}),
    "vision_tower.*":              None,  # its CLIP
    "multi_modal_projector.*":     None,  # and its way from there to tokens
}
# fmt: on

# Rows that transformers appended for <image> and <pad>: random, never trained.
APPENDED = 64


def read_llama(folder: Path, table: Table, vocab_size: int) -> dict[str, Tensor]:
    """
    {original name: tensor} of all shards in `folder`: model-00001-of-00003.safetensors, ..., or pytorch_model-*.bin.

    An embedding of 32064 rows is cut to the 32000 of the tokenizer, with a note on stderr. Raises UserError for a shard that
    is missing or damaged, and for a tensor that is in two.
    """
    merged = read_folder(folder)
    for name in merged:
        if (
            table.get(name) in ("embed.weight", "lm_head.weight")
            and len(merged[name]) == vocab_size + APPENDED
        ):
            print(
                f"note: {name} in {folder} cut from {len(merged[name])} rows to {vocab_size}", file=sys.stderr
            )
            merged[name] = merged[name][:vocab_size]
    return merged
