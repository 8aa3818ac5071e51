"""BLIP-2's first stage -> `unifashion.qformer.QFormer` and `unifashion.vit.ViT`.

LAVIS           blip2_pretrained.pth      the Q-Former alone (the ViT is in eva_vit_g.pth, `vit.py`)
Hugging Face    blip2-itm-vit-g           both; no temperature, and none of BERT's language head
UniFashion      tuned_clip_best.pt        both, as the authors' scripts save them: {"epoch", "Blip2QformerCirCls": {...}}
"""

import torch

from weights.rename import Checkpoint, Layout, Layouts, Table, only, under
from weights.vit import HF_VIT, VIT, without_key_bias

# fmt: off
ATTENTION: Table = {
    # original             ours
    "self.query.*":        "q.*",
    "self.key.*":          "k.*",
    "self.value.*":        "v.*",
    "output.dense.*":      "out.*",
    "output.LayerNorm.*":  "norm.*",
}
HF_ATTENTION: Table = {row.replace("self.", "attention."): ours for row, ours in ATTENTION.items()}

MLPS: Table = {
    "intermediate_query.dense.*": "query_mlp.fc1.*",
    "output_query.dense.*":       "query_mlp.fc2.*",
    "output_query.LayerNorm.*":   "query_mlp.norm.*",
    "intermediate.dense.*":       "text_mlp.fc1.*",
    "output.dense.*":             "text_mlp.fc2.*",
    "output.LayerNorm.*":         "text_mlp.norm.*",
}

LAYER: Table = {
    **under("attention.",        "attn.",   ATTENTION),
    **under("crossattention.",   "cross.",  ATTENTION),  # the keys and values of the image, in every second layer
    **MLPS,
}
HF_LAYER: Table = {
    **under("attention.",        "attn.",   HF_ATTENTION),
    **under("crossattention.",   "cross.",  HF_ATTENTION),
    **MLPS,
}

QFORMER: Table = {
    "ln_vision.*":                                     "ln_vision.*",
    "query_tokens":                                    "query_tokens",
    "Qformer.bert.embeddings.word_embeddings.*":       "word_embeddings.*",
    "Qformer.bert.embeddings.position_embeddings.*":   "position_embeddings.*",
    "Qformer.bert.embeddings.LayerNorm.*":             "embed_norm.*",
    **under("Qformer.bert.encoder.layer.#.",           "layers.#.", LAYER),
    "vision_proj.*":                                   "vision_proj.*",
    "text_proj.*":                                     "text_proj.*",
    "itm_head.*":                                      "itm_head.*",
    "temp":                                            "temp",
    "Qformer.bert.embeddings.position_ids":            None,  # 0, 1, 2, ... as a tensor
    "Qformer.cls.predictions.*":                       None,  # BERT's language head: UniFashion's captions are the LLM's
}

HF_BLIP2: Table = {
    **under("vision_model.",                           "vit.", HF_VIT),
    # Its class computes this norm with eps 1e-6, LAVIS, where it was trained, and ours with 1e-5.
    "vision_model.post_layernorm.*":                   "qformer.ln_vision.*",
    "query_tokens":                                    "qformer.query_tokens",
    "embeddings.word_embeddings.*":                    "qformer.word_embeddings.*",
    "embeddings.position_embeddings.*":                "qformer.position_embeddings.*",
    "qformer.layernorm.*":                             "qformer.embed_norm.*",
    **under("qformer.encoder.layer.#.",                "qformer.layers.#.", HF_LAYER),
    "vision_projection.*":                             "qformer.vision_proj.*",
    "text_projection.*":                               "qformer.text_proj.*",
    "itm_head.*":                                      "qformer.itm_head.*",
    "temp":                                            "qformer.temp",  # `with_temperature` adds it
}

OFFICIAL: Table = {
    **under("visual_encoder.",                         "vit.", VIT),
    **under("",                                        "qformer.", QFORMER),
    "query_proj.*":                                    None,  # made and never called
    "caption_proj.*":                                  None,  # made and never called
    "prompt_tokens":                                   None,  # a second set of queries for pictures with a text: ours has one set
}
# fmt: on


def with_temperature(checkpoint: Checkpoint) -> Checkpoint:
    """Hugging Face's port lacks the temperature: BLIP-2's initial one. It scales the losses; no rank depends on it."""
    return {"temp": torch.tensor(0.07), **checkpoint}


def from_port(checkpoint: Checkpoint) -> Checkpoint:
    return with_temperature(without_key_bias(checkpoint))


PORT, OURS = "vision_model.embeddings.class_embedding", "visual_encoder.cls_token"
VITS: Layouts = {
    "cls_token": Layout(VIT),
    PORT: Layout(only("vit.", HF_BLIP2), from_port),
    OURS: Layout(only("vit.", OFFICIAL)),
}
QFORMERS: Layouts = {
    PORT: Layout(only("qformer.", HF_BLIP2), from_port),
    OURS: Layout(only("qformer.", OFFICIAL)),
    "Qformer.bert.embeddings.word_embeddings.weight": Layout(QFORMER),
}
