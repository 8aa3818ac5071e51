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

BODY: Table = {
    "embed_tokens.weight":              "embed.weight",
    **under("layers.#.",                "layers.#.", LAYER),
    "norm.weight":                      "norm.weight",
}

HEAD: Table = {
    "lm_head.weight":                   "lm_head.weight",
}

LLAMA: Table = {
    **under("model.",                   "", BODY),
    **HEAD,
    "model.mm_projector.*":             None,  # LLaVA's own way from its picture to its tokens
}

LLAVA_HF: Table = {  # llava-1.5-7b-hf: the whole of LLaVA
    **under("language_model.model.",    "", BODY),
    **under("language_model.",          "", HEAD),
    "vision_tower.*":                   None,  # its CLIP
    "multi_modal_projector.*":          None,  # and its way from there to tokens
}

LLAVA_HF_5: Table = {  # the same, as transformers 5 names it
    **under("model.language_model.",    "", BODY),
    **HEAD,
    "model.vision_tower.*":             None,
    "model.multi_modal_projector.*":    None,
}
# fmt: on

# Rows that transformers appended for <image> and <pad>: random, never trained.
APPENDED = 64


def edition(folder: Path, tables: tuple[Table, ...]) -> Table:
    """
    The one of `tables` that has the word embeddings under the name by which the files in `folder` hold them: LLaVA's names were
    changed. If none has, the first, which then says what it misses. Raises UserError as `read_llama`.
    """
    if len(tables) > 1:
        names = {name for shard in shards_of(folder) for name in read_checkpoint(shard)}
        for table in tables:
            if any(_kind(ours) == "embed.weight" and row in names for row, ours in table.items()):
                return table
    return tables[0]


def _kind(ours: str | None) -> str:
    """Our name as a Llama has it, which in a table of all of LLaVA is one part."""
    return (ours or "").removeprefix("llama.")


def read_llama(folder: Path, table: Table, vocab_size: int) -> dict[str, Tensor]:
    """
    {original name: tensor} of all shards in `folder`: model-00001-of-00003.safetensors, ..., or pytorch_model-*.bin.

    An embedding of 32064 rows is cut to the 32000 of the tokenizer, with a note on stderr. Raises UserError for a shard that
    is missing or damaged, and for a tensor that is in two.
    """
    merged = read_folder(folder)
    for name in merged:
        if (
            _kind(table.get(name)) in ("embed.weight", "lm_head.weight")
            and len(merged[name]) == vocab_size + APPENDED
        ):
            print(
                f"note: {name} in {folder} cut from {len(merged[name])} rows to {vocab_size}", file=sys.stderr
            )
            merged[name] = merged[name][:vocab_size]
    return merged
