"""From files to a model: the public weights of a preset, and what UniFashion learned on top of them.

            public                                                                     learned
    TINY    vit, vae, llama.safetensors (stand-ins, made by pretrain.py)               model.safetensors
    FULL    eva_vit_g.pth, blip2_pretrained.pth, StableVITON's .ckpt, Vicuna's folder  unifashion/model.safetensors

and the tokenizers: bert_vocab.txt, the Q-Former's, and the LLM's, which lies beside it. FULL is built on the meta device
and filled part by part, each tensor cast and moved on its own: there are never two copies of the model in memory. A model
that draws needs no files of the LLM, one that writes none of the U-Net (`UniFashion`).
"""

import hashlib
import os
from collections.abc import Iterable
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor, nn

from unifashion import UserError, lora, seen
from unifashion.blocks import zero
from unifashion.config import PRESETS
from unifashion.model import HALVES, UniFashion
from unifashion.runs import part_of
from unifashion.tokenizers import SentencePiece, WordPiece
from weights.containers import read_checkpoint, read_folder
from weights.files import find, source_of
from weights.garment import STABLEVITON, load_stableviton
from weights.llama import llamas
from weights.qformer import QFORMERS, VITS
from weights.rename import Layout, Layouts, blank, load_into, load_layout, naming, only
from weights.vae import VAES

HERE = Path(__file__).parent
FOLDERS = {"tiny": HERE / "tiny", "full": HERE / "files"}
LEARNED = {"tiny": "model.safetensors", "full": "unifashion/model.safetensors"}
# Those that have a file of their own; FULL's U-Net, garment encoder and null context are in TRYON.
PUBLIC_PARTS = {"tiny": ("vit", "vae", "llama"), "full": ("vit", "vae", "qformer", "llama")}

EVA, BLIP2, VOCAB = "eva_vit_g.pth", "blip2_pretrained.pth", "bert_vocab.txt"
# These hold ViT and Q-Former: Hugging Face's port of the two above, and what UniFashion's own scripts save
BLIP2_WHOLE = ("blip2-itm-vit-g", "tuned_clip_best.pt")
# The first that is there: PBE_pose is what StableVITON's own training started from.
TRYON = ("VITONHD_PBE_pose.ckpt", "VITONHD.ckpt")
TRYON_VAE = "VITONHD_VAE_finetuning.ckpt"  # without it, the VAE inside TRYON
# Folders of shards, the first that is there; LLaVA fine-tuned all of its Vicuna.
LLMS = ("vicuna-7b-v1.5", "llava-v1.5-7b", "llava-1.5-7b-hf")
WORDS = {"tiny": "llama_tokenizer.model", "full": "tokenizer.model"}  # of FULL in the LLM's folder
VAE_INSIDE: Layouts = {"first_stage_model.quant_conv.weight": Layout(only("vae.", STABLEVITON))}


def folder_of(preset: str, folder: Path | None = None) -> Path:
    """Where the weights of a preset are. Raises UserError for a preset or a folder that does not exist."""
    if preset not in PRESETS:
        raise UserError(f"unknown preset {preset!r}: it is one of {', '.join(PRESETS)}")
    if folder is not None and not folder.is_dir():
        raise UserError(f"{folder}: there is no such folder of weights")
    if folder is not None and not os.access(folder, os.R_OK | os.X_OK):
        raise UserError(f"{folder}: Permission denied")
    return folder or FOLDERS[preset]


def default_preset(folder: Path | None = None) -> str:
    """Full if `folder` (without it, weights/files) holds a trained full model, else tiny. Loading tells what else is missing."""
    return "full" if ((folder or FOLDERS["full"]) / LEARNED["full"]).exists() else "tiny"


def wanted(preset: str, folder: Path, *names: str) -> Path:
    """The first of `names` that is in `folder` (`find`). Raises UserError, which says where to get it, if none is."""
    if path := find(folder, *names):
        return path
    source = "it is part of the repository, where weights/tiny/README.md says how it was made"
    if preset == "full":
        source = f"{source_of(names[0])} (`python -m weights.verify` tells what else)"
    raise UserError(f"{folder / names[0]} is missing: {source}")


def learned_file(preset: str, folder: Path | None = None) -> Path:
    """The trained model of a preset. Raises UserError if it, or the folder, is missing."""
    return wanted(preset, folder_of(preset, folder), LEARNED[preset])


def tokenizer(preset: str, folder: Path | None = None) -> WordPiece:
    """The Q-Former's tokenizer. Raises UserError if its vocabulary is missing, damaged, or too large for the preset."""
    path = wanted(preset, folder_of(preset, folder), VOCAB)
    words, rows = WordPiece(path), PRESETS[preset].qformer.vocab_size
    # A vocabulary that is cut short would number [DEC] wrongly. TINY has rows to spare, for words of later texts.
    if len(words) > rows or (preset == "full" and len(words) < rows):
        raise UserError(f"{path} does not fit the preset {preset}: {len(words)} pieces, {rows} in the model")
    return words


def llm_tokenizer(preset: str, folder: Path | None = None) -> SentencePiece:
    """The LLM's tokenizer. Raises UserError if it is missing, damaged, or of another size than the LLM's vocabulary."""
    folder = folder_of(preset, folder)
    if preset == "full":
        folder = wanted(preset, folder, *LLMS)
    path = folder / WORDS[preset]
    if not path.is_file():
        source = "it is published beside the weights" if preset == "full" else "it is part of the repository"
        raise UserError(f"{path} is missing: {source}")
    words, rows = SentencePiece(path), PRESETS[preset].llama.vocab_size
    if len(words) != rows:
        raise UserError(f"{path} does not fit the preset {preset}: {len(words)} pieces, {rows} in the LLM")
    return words


def check_public(preset: str, folder: Path | None, draws: bool, writes: bool) -> None:
    """Raise UserError if a file is missing that `load_public` would read."""
    folder, model = folder_of(preset, folder), _blank(preset, draws, writes)
    if preset == "full" and draws:
        wanted(preset, folder, *TRYON)
    _public_files(preset, folder, [part for part in PUBLIC_PARTS[preset] if hasattr(model, part)])


def load_public(
    preset: str,
    folder: Path | None = None,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
    draws: bool = True,
    writes: bool = False,
    llm_dtype: torch.dtype | None = None,
) -> UniFashion:
    """
    The model as it is before UniFashion's own training. What no public file holds is random: in FULL the image and text
    adapters, in TINY all but ViT, VAE and LLM; the style adapter is zero, and so is what LoRA adds to the LLM.

    draws, writes  which halves it has
    llm_dtype      of the LLM's frozen weights, if not `dtype`

    Raises UserError for a file that is missing, damaged, or of another preset.
    """
    folder = folder_of(preset, folder)
    path = wanted(preset, folder, *TRYON) if preset == "full" and draws else None
    model = _blank(preset, draws, writes)
    files = _public_files(preset, folder, [part for part in PUBLIC_PARTS[preset] if hasattr(model, part)])
    if preset == "tiny":
        model = UniFashion(PRESETS[preset], draws, writes).to(device, dtype)
    if path:
        with naming(path, f"does not fit the preset {preset}"):
            model.null_context = load_stableviton(path, model.unet, model.garment, model.vae, dtype, device)
    if preset == "full":
        for name in ("image_adapter", "style_adapter", "text_adapter"):  # ours, in no public file
            if hasattr(model, name):
                getattr(model, name).to_empty(device=device).to(dtype).reset_parameters()
        if draws:
            zero(model.style_adapter)
    _fill(model, files, preset, device, dtype, llm_dtype or dtype)
    if writes:
        lora.inject(model.llama, model.cfg.lora)
    return model.eval()  # what learns is set to training by whoever trains it


def load_unifashion(
    preset: str,
    folder: Path | None = None,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
    draws: bool = True,
    writes: bool = False,
) -> UniFashion:
    """
    The trained model, or the halves of it that are wanted, ready for inference: LoRA is merged. Public files are read only
    for parts that training left as they were: ViT, VAE, LLM, and perhaps FULL's Q-Former. Raises UserError as
    `load_public`, and for a model whose training is not finished.
    """
    path, folder = learned_file(preset, folder), folder_of(preset, folder)
    _check_frozen_hashes(path, folder)
    model = _blank(preset, draws, writes)
    learned, _ = seen.apart(read_checkpoint(path), path)  # the record is for evaluations
    found = check_finished(path, learned, preset, draws, writes)
    files = _public_files(preset, folder, [part for part, _ in model.named_children() if part not in found])
    for name, tensor in learned.items():
        if _is_of(name, draws, writes) and not tensor.isfinite().all():
            raise UserError(f"{path}: {name} is not finite: the run that wrote it diverged, or it is damaged")
    adapter = {k: v for k, v in learned.items() if part_of(k) == "lora" and writes}
    own = {k: v for k, v in learned.items() if part_of(k) != "lora" and _is_of(k, draws, writes)}
    with naming(path, f"does not fit the preset {preset}"):
        _fill_learned(model, own, found, draws, dtype, device)
    _fill(model, files, preset, device, dtype, dtype)
    if writes:
        with naming(path, f"does not fit the preset {preset}"):
            _fill_adapter(model, adapter)
        lora.merge(model.llama)
    return model.eval().requires_grad_(False)


def check_learned(path: Path, tensors: dict[str, Tensor], preset: str) -> None:
    """Raise UserError unless `tensors`, which may be on the meta device, are what `path` must hold: a whole trained model."""
    learned, _ = seen.apart(tensors, path)
    found, model = check_finished(path, learned, preset, True, True), _blank(preset, True, True)
    with naming(path, f"does not fit the preset {preset}"):
        _fill_learned(model, {k: v for k, v in learned.items() if part_of(k) != "lora"}, found, True)
        _fill_adapter(model, {k: v for k, v in learned.items() if part_of(k) == "lora"})


def _is_of(name: str, draws: bool, writes: bool) -> bool:
    """Whether a learned tensor belongs to the halves that are wanted."""
    return not any(
        part_of(name) in HALVES[half] for half, have in (("draws", draws), ("writes", writes)) if not have
    )


def _fill_learned(
    model: UniFashion,
    own: dict[str, Tensor],
    found: set[str],
    draws: bool,
    dtype: torch.dtype | None = None,
    device: str | torch.device | None = None,
) -> None:
    """Of a model on the meta device the parts that were trained as a whole."""
    parts = nn.ModuleDict({name: part for name, part in model.named_children() if name in found})
    if draws:
        parts.register_parameter("null_context", model.null_context)
    load_into(parts, own, {"*": "*"}, dtype=dtype, device=device)
    if draws:
        model.null_context = parts.null_context


def _fill_adapter(model: UniFashion, adapter: dict[str, Tensor]) -> None:
    lora.inject(model.llama, model.cfg.lora)
    lora.load_adapter(model.llama, {k.removeprefix("llama."): v for k, v in adapter.items()})


def check_finished(
    path: Path, learned: dict[str, Tensor], preset: str, draws: bool = True, writes: bool = False
) -> set[str]:
    """-> the parts that `learned`, read from `path`, holds. Raises UserError unless public files hold the others wanted."""
    found = {part_of(name) for name in learned}
    needed = [name for name, _ in _blank(preset, draws, writes).named_children()]
    needed += ["null_context"] * draws + ["lora"] * writes
    if lacking := [part for part in needed if part not in {*found, *PUBLIC_PARTS[preset]}]:
        raise UserError(f"{path} holds no {lacking[0]}: its training is not finished")
    return found


def captioner(preset: str, folder: Path | None = None) -> str:
    """Who writes captions: the preset, and the beginning of the hash of its trained file. Raises UserError for what is missing."""
    by = f"unifashion {preset} {sha256(learned_file(preset, folder))[:12]}"
    if preset == "full":  # whose LLM is one of several
        by += f" {wanted(preset, folder_of(preset, folder), *LLMS).name}"
    return by


def sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def frozen_hashes(preset: str, folder: Path | None = None) -> dict[str, str]:
    """{name: sha256} of the frozen files that a tiny model is trained with. Of full size nothing is noted yet."""
    if preset != "tiny":
        return {}
    names = [*(f"{part}.safetensors" for part in PUBLIC_PARTS[preset]), VOCAB, WORDS[preset]]
    paths = [folder_of(preset, folder) / name for name in names]
    return {path.name: sha256(path) for path in paths if path.is_file()}


def _check_frozen_hashes(path: Path, folder: Path) -> None:
    """Raise UserError if the model was trained with other files than those beside it, where it says with which."""
    try:
        with safe_open(path, "pt") as file:
            company = file.metadata() or {}
    except Exception:  # damaged: read_checkpoint will say how
        return
    for name, digest in company.items():
        if (folder / name).is_file() and sha256(folder / name) != digest:
            raise UserError(
                f"{folder / name} is damaged, or not the one {path} was trained with: take both from one place"
            )


def _blank(preset: str, draws: bool, writes: bool) -> UniFashion:
    return blank(lambda: UniFashion(PRESETS[preset], draws, writes))


def _public_files(preset: str, folder: Path, parts: Iterable[str]) -> dict[str, Path]:
    """{part: its file or folder}; what is missing is told before gigabytes of the rest are read."""
    if preset == "tiny":
        return {part: wanted(preset, folder, f"{part}.safetensors") for part in parts}
    parts = list(parts)
    # ViT and Q-Former from one place, the first that has what is needed of them
    places = [
        {part: place[part] for part in place if part in parts}
        for place in (
            {"vit": EVA, "qformer": BLIP2},
            *(dict.fromkeys(("vit", "qformer"), x) for x in BLIP2_WHOLE),
        )
    ]
    blip2 = next((x for x in places if all(find(folder, name) for name in x.values())), places[0])
    choices = {part: (name,) for part, name in blip2.items()} | {"vae": (TRYON_VAE, *TRYON), "llama": LLMS}
    return {part: wanted(preset, folder, *choices[part]) for part in parts}


def _fill(
    model: UniFashion,
    files: dict[str, Path],
    preset: str,
    device: str | torch.device,
    dtype: torch.dtype,
    llm_dtype: torch.dtype,
) -> None:
    layouts = {"vit": VITS, "qformer": QFORMERS, "vae": VAES | VAE_INSIDE}
    layouts["llama"] = llamas(model.cfg.llama.vocab_size)
    for part, path in files.items():
        module, to = getattr(model, part), llm_dtype if part == "llama" else dtype
        read = read_folder if path.is_dir() else read_checkpoint
        with naming(
            path, f"does not fit the preset {preset}"
        ):  # no name for the checkpoint: load_into frees it tensor by tensor
            if preset == "tiny":
                load_into(module, read(path), {"*": "*"}, dtype=to, device=device)
            else:
                load_layout(module, read(path), layouts[part], dtype=to, device=device)
