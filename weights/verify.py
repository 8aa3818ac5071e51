"""What is in weights/files, whether it is what was published, and which commands it is enough for.

    python -m weights.verify
    python -m weights.verify DIR

Of each file its size, its sha256 where that is published, and whether every tensor has a name and a shape that our network of
full size has a place for: no number is loaded for that (but eva_vit_g.pth is read: files of its kind cannot be mapped). Exit
code 2 if a file is damaged or another one.
"""

import sys
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn
from tqdm import tqdm

from unifashion import Parser, UserError
from unifashion.clip import CLIP, L14, L14_336
from unifashion.config import FULL
from unifashion.llama import Llama
from unifashion.llava import LLAVA_7B, LLaVA
from unifashion.qformer import QFormer
from unifashion.stableviton import PUBLISHED, StableVITON
from unifashion.tokenizers import SentencePiece, WordPiece
from unifashion.unet import UNet
from unifashion.vae import VAE
from unifashion.vit import ViT
from weights import exemplar
from weights.clip import CLIPS
from weights.containers import read_checkpoint, read_folder
from weights.files import FILES, USES
from weights.inception import INCEPTION
from weights.llama import llamas
from weights.llava import ORIGINAL, llavas
from weights.load import folder_of, sha256
from weights.qformer import QFORMERS, VITS
from weights.rename import Checkpoint, Layouts, load_into, load_layout, rename
from weights.unet import UNETS
from weights.vae import VAES


def fits(file: Checkpoint, make: Callable[[], nn.Module], layouts: Layouts) -> None:
    with torch.device("meta"):
        module = make()
    load_layout(module, file, layouts)


def blip2(file: Checkpoint) -> None:
    fits(file, lambda: ViT(FULL.vit), VITS)
    fits(file, lambda: QFormer(FULL.qformer), QFORMERS)


def whole(name: str, file: Checkpoint) -> None:
    _, table = exemplar.FILES[name]
    with torch.device("meta"):
        model = StableVITON(PUBLISHED[name])
        file = exemplar.as_ours(file, model)
    load_into(model, file, table)


def liuhaotian(file: Checkpoint) -> None:
    with torch.device("meta"):
        model = LLaVA(LLAVA_7B)
    load_into(nn.ModuleDict({"projector": model.projector, "llama": model.llama}), file, ORIGINAL)


def image_encoder(file: Checkpoint) -> None:
    with torch.device("meta"):
        model = StableVITON(PUBLISHED["paint-by-example"])
    parts = nn.ModuleDict({"image": model.image, "exemplar": model.exemplar})
    parts.register_parameter("null_context", model.null_context)
    load_into(parts, file, exemplar.DIFFUSERS)


# A file, or a folder of shards, and who complains if it is not what it is named
CHECKS: dict[str, Callable[[Checkpoint], object]] = {
    "eva_vit_g.pth": lambda file: fits(file, lambda: ViT(FULL.vit), VITS),
    "blip2_pretrained.pth": lambda file: fits(file, lambda: QFormer(FULL.qformer), QFORMERS),
    "blip2-itm-vit-g/": blip2,
    "tuned_clip_best.pt": blip2,
    "llava-1.5-7b-hf/": lambda file: fits(file, lambda: LLaVA(LLAVA_7B), llavas(FULL.llama.vocab_size)),
    "llava-v1.5-7b/": liuhaotian,
    "clip-vit-large-patch14-336/": lambda file: fits(file, lambda: CLIP(L14_336), CLIPS),
    "vicuna-7b-v1.5/": lambda file: fits(file, lambda: Llama(FULL.llama), llamas(FULL.llama.vocab_size)),
    "VITONHD.ckpt": lambda file: whole("stableviton", file),
    "VITONHD_PBE_pose.ckpt": lambda file: whole("stableviton", file),
    "VITONHD_VAE_finetuning.ckpt": lambda file: fits(file, lambda: VAE(FULL.vae), VAES),
    "paint-by-example/": lambda file: whole("paint-by-example", file),
    "paint-by-example/unet/": lambda file: fits(
        file, lambda: UNet(PUBLISHED["paint-by-example"].unet), UNETS
    ),
    "paint-by-example/vae/": lambda file: fits(file, lambda: VAE(FULL.vae), VAES),
    "paint-by-example/image_encoder/": image_encoder,
    "clip-vit-large-patch14/": lambda file: fits(file, lambda: CLIP(L14), CLIPS),
    "pt_inception-2015-12-05-6726825d.pth": lambda file: rename(file, INCEPTION),
}
# A text of pieces: how it is read, and how many there are
PIECES = {
    "bert_vocab.txt": (WordPiece, lambda: FULL.qformer.vocab_size),
    "vicuna-7b-v1.5/tokenizer.model": (SentencePiece, lambda: FULL.llama.vocab_size),
    "llava-v1.5-7b/tokenizer.model": (SentencePiece, lambda: FULL.llama.vocab_size),
    "llava-1.5-7b-hf/tokenizer.model": (SentencePiece, lambda: FULL.llama.vocab_size),
}


def place_of(folder: Path, name: str) -> Path | None:
    """Where the file or folder `name` is, or what `weights.convert` has made of it; None if it is not there."""
    for path in (folder / name, (folder / name).with_suffix(".safetensors")):
        if path.is_dir() if name.endswith("/") else path.is_file():
            return path
    return None


def parts_of(folder: Path, name: str) -> list[str]:
    """What there is to check of `name`: itself, its tokenizer, or diffusers' three folders."""
    parts = [part for part in CHECKS if part.startswith(name) and part != name and (folder / part).is_dir()]
    words = [part for part in PIECES if part.startswith(name)]
    return parts or [*[part for part in (name,) if part in CHECKS], *words]


def check(folder: Path, name: str) -> None:
    """Raise UserError for a part of `name`, which is there, that is missing, damaged, or not what it is named."""
    for part in parts_of(folder, name):
        path = place_of(folder, part)
        if path is None:
            raise UserError(f"{part} is missing")
        if part in PIECES:
            read, wanted = PIECES[part]
            if len(read(path)) != wanted():
                raise UserError(f"{part} has {len(read(path))} pieces, not {wanted()}")
            continue
        file = read_folder(path) if path.is_dir() else read_checkpoint(path)
        file = {key: torch.empty_like(x, device="meta") for key, x in file.items()}
        CHECKS[part](file)


def size_of(path: Path) -> int:
    files = [x for x in path.rglob("*") if x.is_file()] if path.is_dir() else [path]
    return sum(x.stat().st_size for x in files)


def look(folder: Path, name: str) -> tuple[bool, str]:
    """-> whether `name` is there and good, and a line about it."""
    path, known = place_of(folder, name), FILES[name]
    if path is None:
        return False, f"missing      {known.source}"
    size = size_of(path)
    told = [f"{size:,} bytes"]
    converted = path.suffix != (folder / name).suffix
    try:
        if known.exact and not converted and size != known.size:
            raise UserError(f"{size:,} bytes, not {known.size:,}: cut short, or another file")
        check(folder, name)
    except UserError as error:
        return False, f"NOT GOOD     {' '.join(str(error).splitlines())}"
    if known.sha256 and not converted:
        if sha256(path) != known.sha256:
            return False, "NOT GOOD     its sha256 is not the published one: damaged, or another file"
        told.append("sha256 as published")
    if name in CHECKS:
        told.append("names and shapes fit")
    return True, f"good         {', '.join(told)}"


def main(argv: list[str] | None = None) -> int:
    parser = Parser(description=__doc__.split("\n")[0])
    parser.add_argument("folder", nargs="?", type=Path, metavar="DIR", help="default: weights/files")
    try:
        folder = folder_of("full", parser.parse_args(argv).folder)
    except UserError as error:
        print("weights.verify:", " ".join(str(error).splitlines()), file=sys.stderr)
        return 2
    good, lines = set(), []
    for name in tqdm(FILES, "looking", unit="file", leave=False):
        fine, line = look(folder, name)
        lines.append(f"{name:37}{line}")
        good |= {name} if fine else set()
    print(f"{folder}\n", *lines, "", sep="\n")
    for use, sets in USES.items():
        lacking = min(([name for name in files if name not in good] for files in sets), key=weight)
        needs = f"needs {' and '.join(lacking)} ({weight(lacking) / 1e9:.1f} GB)" if lacking else "ready"
        print(f"{use:45}{needs}")
    return 2 if any("NOT GOOD" in line for line in lines) else 0


def weight(names: list[str]) -> int:
    return sum(FILES[name].size for name in names)


if __name__ == "__main__":
    sys.exit(main())
