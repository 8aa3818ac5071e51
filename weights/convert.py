"""Pickled checkpoints -> safetensors: the same names and numbers, which no program can hide in and which open at once.

    python -m weights.convert weights/files/eva_vit_g.pth weights/files/VITONHD.ckpt

writes eva_vit_g.safetensors and VITONHD.safetensors beside them. Once the original is deleted, whatever reads it reads these (of
shards, once all are converted). What Lightning keeps beside the tensors, such as the optimizer's moments, is left behind. Tensors
that the file has under two names are written twice. The metadata has the source's name and sha256, and one of the numbers, by
which `weights.verify` tells later damage. What was converted before is not converted again.
"""

import hashlib
import shutil
import sys
from contextlib import suppress
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from tqdm import tqdm

from unifashion import Parser, UserError, training
from weights.containers import check_sums, read_checkpoint
from weights.files import FILES
from weights.load import sha256


def convert(path: Path) -> Path:
    """
    -> the file written, `path` with .safetensors. Raises UserError as `read_checkpoint`, for a file that is damaged or that
    another one is already in the place of, and where nothing can be written.
    """
    out = path.with_suffix(".safetensors")
    if out == path:
        raise UserError(f"{path}: is safetensors already")
    tensors, seen = read_checkpoint(path), set()
    for name, x in tensors.items():
        if x.layout != torch.strided or x.is_quantized or x.is_meta or x.is_complex():
            raise UserError(f"{path}: {name} is a tensor of a kind that safetensors does not hold")
    digest, known = sha256(path), FILES.get(path.name)
    if out.exists():
        if source_sha256(out) == digest:
            return out
        raise UserError(f"{out} is there already, and not made of {path.name}: move it away first")
    if known and known.sha256 and path.stat().st_size == known.size and digest != known.sha256:
        raise UserError(f"{path}: its sha256 is not the published one: damaged, or another file")
    check_sums(path)
    for name, x in tensors.items():
        place = x.untyped_storage().data_ptr()
        # safetensors holds what is contiguous, and a place in memory once
        tensors[name] = (
            x.clone(memory_format=torch.contiguous_format) if place in seen and x.numel() else x.contiguous()
        )
        seen.add(place)
    source = {"format": "pt", "source": path.name, "sha256": digest, "numbers": sha256_of(tensors)}
    part = out.with_name(f".{out.name}.part")  # a folder: safetensors has temporary files of its own
    shutil.rmtree(part, ignore_errors=True)
    try:
        part.mkdir()
        save_file(tensors, part / out.name, metadata=source)
        shutil.copymode(path, part / out.name)
        (part / out.name).replace(out)
    except (OSError, SafetensorError) as error:
        raise UserError(f"{out} cannot be written: {error}") from None
    finally:
        shutil.rmtree(part, ignore_errors=True)
    return out


def source_sha256(path: Path) -> str | None:
    """Of what `path` was made by `convert`; None if it was not."""
    return _metadata(path).get("sha256")


def check_converted(path: Path) -> None:
    """Raise UserError if the numbers are not those that `convert` wrote."""
    if _metadata(path).get("numbers") != sha256_of(read_checkpoint(path)):
        raise UserError(f"{path}: damaged: its numbers are not those that were converted")


def sha256_of(tensors: dict[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for name in sorted(tensors):
        digest.update(name.encode())
        digest.update(tensors[name].contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


def _metadata(path: Path) -> dict[str, str]:
    if path.suffix != ".safetensors" or not path.is_file():
        return {}
    with suppress(SafetensorError), safe_open(path, "pt") as file:
        metadata = file.metadata() or {}
        return metadata if "source" in metadata else {}
    return {}


def main(argv: list[str] | None = None) -> int:
    parser = Parser(description=__doc__.split("\n")[0])
    parser.add_argument("files", nargs="+", type=Path, metavar="FILE", help="a .pth, .pt, .ckpt or .bin")
    code = 0
    try:
        args = parser.parse_args(argv)
    except UserError as error:
        return _told(error)
    for path in tqdm(args.files, "converting", unit="file", disable=len(args.files) < 2 or None):
        try:
            tqdm.write(str(convert(path)))
        except (UserError, PermissionError) as error:  # of one: the others are converted all the same
            code = _told(error)
    return code


def _told(error: Exception) -> int:
    print("weights.convert:", " ".join(str(error).splitlines()), file=sys.stderr)
    return 2


if __name__ == "__main__":
    training.run(lambda: sys.exit(main()))
