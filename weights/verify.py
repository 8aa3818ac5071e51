"""What is in weights/files, whether it is what was published, and which commands it is enough for.

    python -m weights.verify
    python -m weights.verify DIR

Of each file its size; its sha256 where that is published, or else the checksums in torch's zip files and in what
`weights.convert` wrote; and whether every
tensor has a name and a shape that our network of full size has a place for (of Inception the names, and how many numbers): no number is loaded for that
(but eva_vit_g.pth is read: files of its kind cannot be mapped). Exit code 2 if a file is damaged or another one.
"""

import math
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn
from tqdm import tqdm

from unifashion import Parser, UserError, training
from unifashion.clip import CLIP, L14, L14_336, ImageTower
from unifashion.config import FULL
from unifashion.llama import Llama
from unifashion.llava import LLAVA_7B, LLaVA
from unifashion.qformer import QFormer
from unifashion.stableviton import PUBLISHED, StableVITON
from unifashion.tokenizers import SentencePiece, WordPiece
from unifashion.unet import UNet
from unifashion.vae import VAE
from unifashion.vit import ViT
from weights import exemplar, inception, llava
from weights.clip import CLIPS, clip_files
from weights.containers import check_sums, read_checkpoint, read_folder
from weights.convert import check_converted, source_sha256
from weights.files import FILES, USES, find
from weights.llama import llamas, without_appended
from weights.load import check_learned, folder_of, learned_file, sha256
from weights.qformer import QFORMERS, VITS
from weights.rename import Checkpoint, Layouts, blank, load_into, load_layout, rename
from weights.unet import UNETS
from weights.vae import VAES


def opened(path: Path) -> Checkpoint:
    """The tensors without their numbers."""
    file = read_folder(path) if path.is_dir() else read_checkpoint(path)
    return {key: torch.empty_like(x, device="meta") for key, x in file.items()}


def fits(path: Path, *parts: tuple[Callable[[], nn.Module], Layouts]) -> set[torch.dtype]:
    """-> the types of the tensors. Raises UserError if the file is not what the parts want, each by its layouts."""
    file = opened(path)
    for make, layouts in parts:
        load_layout(blank(make), file, layouts)
    return {x.dtype for x in file.values()}


def blip2(path: Path) -> set[torch.dtype]:
    return fits(path, (lambda: ViT(FULL.vit), VITS), (lambda: QFormer(FULL.qformer), QFORMERS))


def llava_15(path: Path) -> set[torch.dtype]:
    return fits(path, (lambda: LLaVA(LLAVA_7B), llava.llavas(FULL.llama.vocab_size))) | pieces(path)


def liuhaotian(path: Path) -> set[torch.dtype]:
    file, model = opened(path), blank(lambda: LLaVA(LLAVA_7B))
    rest = nn.ModuleDict({"projector": model.projector, "llama": model.llama})
    load_into(rest, without_appended(FULL.llama.vocab_size, file), llava.ORIGINAL)
    return {x.dtype for x in file.values()} | pieces(path)


def tower(path: Path) -> set[torch.dtype]:
    file = opened(found(path, *llava.TOWER_FILES))
    load_into(blank(lambda: ImageTower(L14_336.image)), file, llava.TOWER)
    return {x.dtype for x in file.values()}


def vicuna(path: Path) -> set[torch.dtype]:
    return fits(path, (lambda: Llama(FULL.llama), llamas(FULL.llama.vocab_size))) | pieces(path)


def pieces(folder: Path) -> set[torch.dtype]:
    n, wanted = len(SentencePiece(found(folder, "tokenizer.model"))), FULL.llama.vocab_size
    if n != wanted:
        raise UserError(f"tokenizer.model has {n} pieces, not {wanted}")
    return set()


def words(path: Path) -> set[torch.dtype]:
    n, wanted = len(WordPiece(path)), FULL.qformer.vocab_size
    if n != wanted:
        raise UserError(f"{path.name} has {n} pieces, not {wanted}")
    return set()


def whole(name: str, path: Path) -> set[torch.dtype]:
    model, table = blank(lambda: StableVITON(PUBLISHED[name])), exemplar.FILES[name][1]
    file = opened(path)
    with torch.device("meta"):
        load_into(model, exemplar.as_ours(file, model), table)
    return {x.dtype for x in file.values()}


def trained(path: Path) -> set[torch.dtype]:
    """Of StableVITON, too, that its garment encoder does something: what its training starts from has the same names."""
    dtypes = whole("stableviton", path)
    if not any(x.any() for name, x in read_checkpoint(path).items() if ".warp_zero_convs." in name):
        raise UserError(
            f"{path} is not stableviton: its garment encoder is untrained, as in VITONHD_PBE_pose.ckpt"
        )
    return dtypes


def paint_by_example(path: Path) -> set[torch.dtype]:
    name, model = path.name, blank(lambda: StableVITON(PUBLISHED["paint-by-example"]))
    path = exemplar.published_file(name, path.parent)
    if path.is_file():
        return whole(name, path)
    dtypes = fits(path / "unet", (lambda: UNet(PUBLISHED[name].unet), UNETS))
    dtypes |= fits(path / "vae", (lambda: VAE(PUBLISHED[name].vae), VAES))
    exemplar.load_image_encoder(path / "image_encoder", model.image, model.exemplar)
    return dtypes


def clip(path: Path) -> set[torch.dtype]:
    return fits(clip_files(path)[0], (lambda: CLIP(L14), CLIPS))


def inception_names(path: Path) -> set[torch.dtype]:
    file = opened(path)
    ours = rename(file, inception.INCEPTION)
    if sum(x.numel() for x in ours.values() if x.is_floating_point()) != inception.NUMBERS:
        raise UserError(f"{path} is not FID's Inception: not as many numbers")
    return {x.dtype for x in file.values()}


def unifashion(path: Path) -> set[torch.dtype]:
    path = learned_file("full", path.parent)
    file = opened(path)
    check_learned(path, file, "full")
    return {x.dtype for x in file.values() if x.is_floating_point()}


def found(folder: Path, *names: str) -> Path:
    path = find(folder, *names)
    if path is None:
        raise UserError(f"{names[-1]} is missing")
    return path


# Who complains if a file or folder is not what it is named, and tells its types
CHECKS: dict[str, Callable[[Path], set[torch.dtype]]] = {
    "eva_vit_g.pth": lambda path: fits(path, (lambda: ViT(FULL.vit), VITS)),
    "blip2_pretrained.pth": lambda path: fits(path, (lambda: QFormer(FULL.qformer), QFORMERS)),
    "bert_vocab.txt": words,
    "blip2-itm-vit-g/": blip2,
    "llava-1.5-7b-hf/": llava_15,
    "llava-v1.5-7b/": liuhaotian,
    "clip-vit-large-patch14-336/": tower,
    "vicuna-7b-v1.5/": vicuna,
    "VITONHD.ckpt": trained,
    "VITONHD_PBE_pose.ckpt": lambda path: whole("stableviton", path),
    "VITONHD_VAE_finetuning.ckpt": lambda path: fits(path, (lambda: VAE(FULL.vae), VAES)),
    "paint-by-example/": paint_by_example,
    "clip-vit-large-patch14/": clip,
    "pt_inception-2015-12-05-6726825d.pth": inception_names,
    "tuned_clip_best.pt": blip2,
    "unifashion/": unifashion,
}
# Another name that the same may have
ALSO = {"pt_inception-2015-12-05-6726825d.pth": inception.FILES}


def files_of(path: Path) -> list[Path]:
    return sorted(x for x in path.rglob("*") if x.is_file()) if path.is_dir() else [path]


def check_numbers(file: Path) -> str | None:
    """-> the sha256 of what `file` was converted from, if it was. Raises UserError if its numbers are not what it says of them."""
    source = source_sha256(file)
    if source:
        check_converted(file)
    else:
        check_sums(file)
    return source


def look(folder: Path, name: str) -> tuple[bool | None, str]:
    """-> whether `name` is good, None if it is not there, and a line about it."""
    known = FILES[name]
    try:
        path = find(folder, *ALSO.get(name, (name,)))
        if path is None:
            return None, f"missing      {known.source}"
        if path.is_dir() != name.endswith("/"):
            raise UserError("a folder, not a file" if path.is_dir() else "a file, not a folder")
        size = sum(file.stat().st_size for file in files_of(path))
        told = [f"{size:,} bytes"]
        dtypes = CHECKS[name](path)
        if dtypes:
            told.append(f"fits ({', '.join(sorted(str(x).removeprefix('torch.') for x in dtypes))})")
        if path.name == name and known.sha256 and size == known.size:
            if sha256(path) != known.sha256:
                raise UserError("its sha256 is not the published one: damaged, or another file")
            told.append("sha256 as published")
        else:
            sources = {check_numbers(file) for file in files_of(path)} - {None}
            if sources:
                told.append("as it was converted")
            if sources and known.sha256:
                told[-1] += (
                    " from the published file"
                    if sources == {known.sha256}
                    else " from another edition than the published one"
                )
            if not sources and (path.name != name.rstrip("/") or (known.exact and size != known.size)):
                told.append(f"another edition than the published one of {known.size:,} bytes")
    except (UserError, OSError) as error:
        return False, f"NOT GOOD     {' '.join(str(error).splitlines())}"
    return True, f"good         {', '.join(told)}"


def main(argv: list[str] | None = None) -> int:
    parser = Parser(description=__doc__.split("\n")[0])
    parser.add_argument("folder", nargs="?", type=Path, metavar="DIR", help="default: weights/files")
    try:
        folder = folder_of("full", parser.parse_args(argv).folder)
    except UserError as error:
        print("weights.verify:", " ".join(str(error).splitlines()), file=sys.stderr)
        return 2
    good, lines = {}, []  # of the files that are there: whether they are good
    for name in tqdm(FILES, "looking", unit="file", leave=False, disable=None):
        fine, line = look(folder, name)
        lines.append(f"{name:37}{line}")
        if fine is not None:
            good[name] = fine
    print(f"{folder}\n", *lines, "", sep="\n")
    for use, sets in USES.items():
        print(f"{use:45}{state(sets, good)}")
    return 0 if all(good.values()) else 2


def state(sets: tuple[tuple[str, ...], ...], good: dict[str, bool]) -> str:
    """Of a use: what is said of the files that it would take, the first set that is there."""
    least = min(sets, key=lambda files: weight([name for name in files if name not in good]))
    lacking = [name for name in least if name not in good]
    if lacking:
        return f"needs {' and '.join(lacking)} ({weight(lacking) / 1e9:.1f} GB)"
    taken = next(files for files in sets if all(name in good for name in files))
    bad = [name for name in taken if not good[name]]
    return f"takes {bad[0]}, which is not good" if bad else "ready"


def weight(names: list[str]) -> float:
    """Bytes to get; what was never seen is no advice."""
    return sum(FILES[name].size or math.inf for name in names)


if __name__ == "__main__":
    training.run(lambda: sys.exit(main()))
