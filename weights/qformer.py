"""LAVIS `blip2_pretrained.pth` -> `unifashion.qformer.QFormer`."""

from weights.rename import Table, under

# fmt: off
ATTENTION: Table = {
    # original             ours
    "self.query.*":        "q.*",
    "self.key.*":          "k.*",
    "self.value.*":        "v.*",
    "output.dense.*":      "out.*",
    "output.LayerNorm.*":  "norm.*",
}

LAYER: Table = {
    **under("attention.",        "attn.",   ATTENTION),
    **under("crossattention.",   "cross.",  ATTENTION),  # the keys and values of the image, in every second layer
    "intermediate_query.dense.*": "query_mlp.fc1.*",
    "output_query.dense.*":       "query_mlp.fc2.*",
    "output_query.LayerNorm.*":   "query_mlp.norm.*",
    "intermediate.dense.*":       "text_mlp.fc1.*",
    "output.dense.*":             "text_mlp.fc2.*",
    "output.LayerNorm.*":         "text_mlp.norm.*",
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
    "Qformer.cls.*":                                   None,  # BERT's language head: UniFashion's captions are the LLM's
}
# fmt: on
