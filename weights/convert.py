"""Pickled checkpoints -> safetensors: the same names and numbers, which no program can hide in and which open at once.

    python -m weights.convert weights/files/eva_vit_g.pth weights/files/VITONHD.ckpt

writes eva_vit_g.safetensors and VITONHD.safetensors beside them. Whatever reads the original reads these in its place (of shards,
once all are converted), so that the original may be deleted. What Lightning keeps beside the tensors, such as the optimizer's moments, is left behind. Tensors that
the file has under two names are written twice. The metadata has the source's name and sha256.
"""

import os
import shutil
import sys
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import save_file
from tqdm import tqdm

from unifashion import Parser, UserError
from weights.containers import read_checkpoint
from weights.load import sha256


def convert(path: Path) -> Path:
    """
    -> the file written, `path` with .safetensors. Raises UserError as `read_checkpoint`, for a file that is there already, and
    where nothing can be written.
    """
    out = path.with_suffix(".safetensors")
    if out == path:
        raise UserError(f"{path}: is safetensors already")
    if out.exists():
        raise UserError(f"{out} is there already: move it away first")
    tensors, seen = read_checkpoint(path), set()
    for name, x in tensors.items():
        place = x.untyped_storage().data_ptr()
        # safetensors holds what is contiguous, and a place in memory once
        tensors[name] = x.clone() if place in seen and x.numel() else x.contiguous()
        seen.add(place)
    source = {"format": "pt", "source": path.name, "sha256": sha256(path)}
    part = out.with_name(f".{out.name}.{os.getpid()}.part")
    try:
        save_file(tensors, part, metadata=source)
        shutil.copymode(path, part)
        part.replace(out)
    except (OSError, SafetensorError) as error:
        raise UserError(f"{out} cannot be written: {error}") from None
    finally:
        part.unlink(missing_ok=True)
    return out


def main(argv: list[str] | None = None) -> int:
    parser = Parser(description=__doc__.split("\n")[0])
    parser.add_argument("files", nargs="+", type=Path, metavar="FILE", help="a .pth, .pt, .ckpt or .bin")
    try:
        args = parser.parse_args(argv)
        for path in tqdm(args.files, "converting", unit="file", disable=len(args.files) < 2):
            print(convert(path))
    except UserError as error:
        print("weights.convert:", " ".join(str(error).splitlines()), file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
