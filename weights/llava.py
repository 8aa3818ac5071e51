"""LLaVA-1.5-7B as it is published -> `unifashion.llava.LLaVA`.

llava-1.5-7b-hf/    all of it, in shards; transformers 5 has other names for the same tensors
llava-v1.5-7b/      liuhaotian's own: LLM and projector in shards; its image tower is CLIP's, as OpenAI published it,
                    clip-vit-large-patch14-336/
"""

import hashlib
from functools import partial
from pathlib import Path

import torch
from torch import nn

from unifashion import UserError, llava
from unifashion.llava import LLaVA
from unifashion.tokenizers import SentencePiece
from weights.clip import HF_IMAGE
from weights.containers import read_checkpoint, read_folder, shards_of
from weights.files import find, source_of
from weights.llama import BODY, HEAD, without_appended
from weights.load import folder_of
from weights.rename import Layout, Layouts, Table, blank, load_into, load_layout, naming, under

# fmt: off
HF: Table = {
    # original                                  ours
    **under("vision_tower.vision_model.",       "image.", HF_IMAGE),
    "multi_modal_projector.linear_1.*":         "projector.fc1.*",
    "multi_modal_projector.linear_2.*":         "projector.fc2.*",
    **under("language_model.model.",            "llama.", BODY),
    **under("language_model.",                  "llama.", HEAD),
}

HF_5: Table = {
    **under("model.vision_tower.",              "image.", HF_IMAGE),
    "model.multi_modal_projector.linear_1.*":   "projector.fc1.*",
    "model.multi_modal_projector.linear_2.*":   "projector.fc2.*",
    **under("model.language_model.",            "llama.", BODY),
    **under("",                                 "llama.", HEAD),
}

HF_4_52: Table = {  # transformers 4.52 and a while after
    row.replace("model.vision_tower.", "model.vision_tower.vision_model."): ours for row, ours in HF_5.items()
}

ORIGINAL: Table = {  # all but the image tower
    "model.mm_projector.0.*":                   "projector.fc1.*",
    "model.mm_projector.2.*":                   "projector.fc2.*",  # 1 is the GELU
    **under("model.",                           "llama.", BODY),
    **under("",                                 "llama.", HEAD),
}

TOWER: Table = {  # of CLIP's own file, the image tower alone
    **under("vision_model.",                    "", HF_IMAGE),
    "text_model.*":                             None,  # LLaVA does not compare pictures with texts
    "visual_projection.weight":                 None,  # the way to where they are compared
    "text_projection.weight":                   None,
    "logit_scale":                              None,
}
# fmt: on

# The first that is there; the second has no image tower.
FOLDERS = "llava-1.5-7b-hf", "llava-v1.5-7b"
TOWER_FOLDER = "clip-vit-large-patch14-336"
TOWER_FILES = ("model.safetensors", "pytorch_model.bin")


def llavas(vocab_size: int) -> Layouts:
    """How the whole of LLaVA is read, with an LLM of so many tokens."""
    cut = partial(without_appended, vocab_size)
    return {
        "vision_tower.vision_model.embeddings.class_embedding": Layout(HF, cut),
        "model.vision_tower.embeddings.class_embedding": Layout(HF_5, cut),
        "model.vision_tower.vision_model.embeddings.class_embedding": Layout(HF_4_52, cut),
    }


def llava_files(folder: Path | None = None) -> tuple[Path, list[Path]]:
    """
    The folder of LLaVA in `folder` (without it, weights/files), and all its files of weights, CLIP's last if it is apart.

    Raises UserError, which says where to get it, for what is missing.
    """
    folder = folder_of("full", folder)
    place = next((folder / name for name in FOLDERS if (folder / name).is_dir()), None)
    if place is None:
        name = FOLDERS[0]
        raise UserError(f"{folder / name} is missing: {source_of(name)}")
    files = shards_of(place)
    if place.name == FOLDERS[1]:
        tower = find(folder / TOWER_FOLDER, *TOWER_FILES)
        if tower is None:
            raise UserError(
                f"{folder / TOWER_FOLDER / TOWER_FILES[1]} is missing: {place.name} has no image tower of its own, "
                f"{source_of(TOWER_FOLDER)}"
            )
        files.append(tower)
    return place, files


def load_llava(
    folder: Path | None = None,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
) -> LLaVA:
    """
    LLaVA-1.5-7B, ready for inference, from whichever of its layouts is in `folder`. Cast and moved tensor by tensor: there are
    never two copies in memory. Raises UserError for a file that is missing, damaged, or another network's.
    """
    place, files = llava_files(folder)
    model = blank(lambda: LLaVA(llava.LLAVA_7B))
    rows, otherwise = model.cfg.llama.vocab_size, "is not the LLaVA-1.5-7B that was expected"
    with naming(place, otherwise):  # no names for the checkpoints: load_into frees them tensor by tensor
        if place.name == FOLDERS[0]:
            load_layout(model, read_folder(place), llavas(rows), dtype=dtype, device=device)
        else:
            rest = nn.ModuleDict({"projector": model.projector, "llama": model.llama})
            load_into(rest, without_appended(rows, read_folder(place)), ORIGINAL, dtype=dtype, device=device)
    if place.name != FOLDERS[0]:
        with naming(files[-1], "is not the CLIP that was expected"):
            load_into(model.image, read_checkpoint(files[-1]), TOWER, dtype=dtype, device=device)
    return model.eval().requires_grad_(False)


def llava_tokenizer(folder: Path | None = None) -> SentencePiece:
    """Vicuna's tokenizer, beside the weights. Raises UserError if it is missing, damaged, or of another size than the vocabulary."""
    place, _ = llava_files(folder)
    path, rows = place / "tokenizer.model", llava.LLAVA_7B.llama.vocab_size
    if not path.is_file():
        raise UserError(f"{path} is missing: it is published beside the weights")
    words = SentencePiece(path)
    if len(words) != rows:
        raise UserError(f"{path} does not fit {place.name}: {len(words)} pieces, {rows} in the LLM")
    return words


def llava_captioner(folder: Path | None = None, keywords: tuple[str, ...] = ()) -> str:
    """
    Who writes captions: the layout, the beginning of a hash of its weights, and one of the key words.

    To read 14 GB for a name would take longer than many a caption. Of each file the size and samples of its bytes are hashed
    (`_sample`): weights that were trained on, cut short or exchanged have another name; one number that was changed by hand may not.
    """
    place, files = llava_files(folder)
    digest = hashlib.sha256()
    for path in files:
        digest.update(_sample(path))
    by = f"{place.name} {digest.hexdigest()[:12]}"
    if keywords:
        listed = "\n".join(keywords).encode()
        by += f" keywords {hashlib.sha256(listed).hexdigest()[:12]}"
    return by


def _sample(path: Path, places: int = 256, width: int = 4096) -> bytes:
    """The size of a file and `width` bytes of it at so many places, evenly spread: the first are its beginning, the last its end."""
    size = path.stat().st_size
    parts = [str(size).encode()]
    with open(path, "rb") as file:
        for i in range(places):
            file.seek(max(0, size - width) * i // (places - 1))
            parts.append(file.read(width))
    return b"".join(parts)
