"""Llama in Hugging Face's layout, Vicuna-7B v1.5 or LLaVA-1.5's language model -> `unifashion.llama.Llama`."""

from functools import partial

from weights.rename import Checkpoint, Layout, Layouts, Table, under

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


def llamas(vocab_size: int) -> Layouts:
    """How an LLM of so many tokens is read."""
    cut = partial(without_appended, vocab_size)
    return {
        "model.embed_tokens.weight": Layout(LLAMA, cut),
        "language_model.model.embed_tokens.weight": Layout(LLAVA_HF, cut),
        "model.language_model.embed_tokens.weight": Layout(LLAVA_HF_5, cut),
    }


def without_appended(vocab_size: int, checkpoint: Checkpoint) -> Checkpoint:
    """An embedding of 32064 rows, and such a head, cut to the 32000 of the tokenizer: views."""
    rows, ends = (vocab_size + APPENDED,), ("embed_tokens.weight", "lm_head.weight")
    return {
        name: x[:vocab_size] if name.endswith(ends) and x.shape[:1] == rows else x
        for name, x in checkpoint.items()
    }
