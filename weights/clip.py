"""CLIP in Hugging Face's layout, or in OpenAI's and open_clip's -> `unifashion.clip.CLIP`."""

from pathlib import Path

import torch
from torch import Tensor

from unifashion import UserError
from unifashion.clip import CLIP, L14, CLIPConfig
from unifashion.tokenizers import CLIPTokenizer
from weights.containers import read_checkpoint
from weights.files import find, source_of
from weights.rename import Layout, Layouts, Table, blank, fused, load_layout, naming, thirds, under

FOLDER = Path(__file__).parent / "files" / "clip-vit-large-patch14"

# fmt: off
HF_BLOCK: Table = {
    # original               ours
    "layer_norm1.*":         "norm1.*",
    "self_attn.q_proj.*":    "attn.q.*",
    "self_attn.k_proj.*":    "attn.k.*",
    "self_attn.v_proj.*":    "attn.v.*",
    "self_attn.out_proj.*":  "attn.out.*",
    "layer_norm2.*":         "norm2.*",
    "mlp.fc1.*":             "mlp.fc1.*",
    "mlp.fc2.*":             "mlp.fc2.*",
}

HF_IMAGE: Table = {  # of an `ImageTower`
    "embeddings.class_embedding":            "cls_token",
    "embeddings.patch_embedding.*":          "patch_embed.*",
    "embeddings.position_embedding.weight":  "pos_embed",
    "pre_layrnorm.*":                        "norm_pre.*",  # their spelling
    **under("encoder.layers.#.",             "blocks.#.", HF_BLOCK),
    "post_layernorm.*":                      "norm_post.*",
    "embeddings.position_ids":               None,  # 0, 1, 2, ... as a tensor
}

HF_TEXT: Table = {  # of a `TextTower`
    "embeddings.token_embedding.*":          "word_embeddings.*",
    "embeddings.position_embedding.weight":  "pos_embed",
    **under("encoder.layers.#.",             "blocks.#.", HF_BLOCK),
    "final_layer_norm.*":                    "norm.*",
    "embeddings.position_ids":               None,
}

HF: Table = {
    **under("vision_model.",     "image.", HF_IMAGE),
    **under("text_model.",       "text.", HF_TEXT),
    "visual_projection.weight":  "image_proj.weight",
    "text_projection.weight":    "text_proj.weight",
    "logit_scale":               "logit_scale",
}

OPENAI_BLOCK: Table = {  # as `unfused` leaves it
    "ln_1.*":             "norm1.*",
    **fused("attn.in_proj_weight", "attn.#.weight"),
    **fused("attn.in_proj_bias",   "attn.#.bias"),
    "attn.out_proj.*":    "attn.out.*",
    "ln_2.*":             "norm2.*",
    "mlp.c_fc.*":         "mlp.fc1.*",
    "mlp.c_proj.*":       "mlp.fc2.*",
}

OPENAI: Table = {
    "visual.class_embedding":                      "image.cls_token",
    "visual.conv1.*":                              "image.patch_embed.*",
    "visual.positional_embedding":                 "image.pos_embed",
    "visual.ln_pre.*":                             "image.norm_pre.*",
    **under("visual.transformer.resblocks.#.",     "image.blocks.#.", OPENAI_BLOCK),
    "visual.ln_post.*":                            "image.norm_post.*",
    "visual.proj.T":                               "image_proj.weight",
    "token_embedding.*":                           "text.word_embeddings.*",
    "positional_embedding":                        "text.pos_embed",
    **under("transformer.resblocks.#.",            "text.blocks.#.", OPENAI_BLOCK),
    "ln_final.*":                                  "text.norm.*",
    "text_projection.T":                           "text_proj.weight",
    "logit_scale":                                 "logit_scale",
    "input_resolution":                            None,  # numbers beside the tensors, in OpenAI's own archive
    "context_length":                              None,
    "vocab_size":                                  None,
    "transformer.resblocks.#.attn_mask":           None,  # and the causal mask, which its program has in every block
}
# fmt: on

# The first that is there: Hugging Face's two editions, open_clip's two, OpenAI's own
FILES = (
    "model.safetensors",
    "pytorch_model.bin",
    "open_clip_model.safetensors",
    "open_clip_pytorch_model.bin",
    "ViT-L-14.pt",
)
# The same merges, in Hugging Face's edition and in OpenAI's.
WORDS = ("merges.txt", "bpe_simple_vocab_16e6.txt.gz")


def unfused(checkpoint: dict[str, Tensor]) -> dict[str, Tensor]:
    """OpenAI's tensors with in_proj as q, k and v, and with proj.T for the two projections, which they apply from the right.

    Views: nothing is copied. Hugging Face's stay as they are. Raises UserError for what does not divide into three.
    """
    tensors = {}
    for name, tensor in checkpoint.items():
        if ".attn.in_proj_" in name:
            tensors |= thirds(name, tensor)
        elif name in ("visual.proj", "text_projection"):
            tensors[f"{name}.T"] = tensor.T
        else:
            tensors[name] = tensor
    return tensors


CLIPS: Layouts = {
    "visual_projection.weight": Layout(HF),
    "visual.proj": Layout(OPENAI, unfused),
}


def load_clip(
    folder: Path = FOLDER,
    cfg: CLIPConfig = L14,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
) -> tuple[CLIP, CLIPTokenizer]:
    """Both towers, frozen, and their tokenizer. Raises UserError, which says where to get it, for what is missing or damaged."""
    path, words = clip_files(folder)
    tokenizer = CLIPTokenizer(words, cfg.text.vocab_size)
    model = blank(lambda: CLIP(cfg))
    with naming(path, "is not the CLIP that was expected"):  # no name for the checkpoint: load_into frees it
        load_layout(model, read_checkpoint(path), CLIPS, dtype=dtype, device=device)
    return model.eval().requires_grad_(False), tokenizer


def clip_files(folder: Path = FOLDER) -> tuple[Path, Path]:
    """-> the tensors and the merges. Raises UserError, which says where to get it, for what is missing."""
    found = []
    for names in (FILES, WORDS):
        path = find(folder, *names)
        if path is None:
            raise UserError(f"{folder / names[0]} is missing: {source_of(FOLDER.name)} into {folder}")
        found.append(path)
    return found[0], found[1]
