"""Load original checkpoints strictly, through tables that a person can check by eye.

    file --read_checkpoint--> {original name: tensor} --rename, by a table--> {our name: tensor} --load_into--> module

A table has two columns: the original name, and ours or None.

    "blocks.#.norm1.*":    "blocks.#.norm1.*",     # = a layer number, the same on both sides; several may stand in a row
    "patch_embed.proj.*":  "patch_embed.*",        * at the end = the rest of the name
    "head.*":              None,                   left out on purpose; the row's comment says why

Nothing is ever skipped in silence. Rows with None are taken out first (so that "blocks.39.*": None may stand beside
"blocks.#.norm1.*"), and a file need not have them: editions of a file differ in what we leave out. Then every name in the
file must match exactly one row, every row must match a name, no two names may become the same, and the result must be
what the module has, name for name and shape for shape.
"""

import os
import re
import zipfile
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from unifashion import UserError

Table = dict[str, str | None]


def under(prefix: str, our_prefix: str, rows: Table) -> Table:
    """The rows of a sub-table, each name behind its prefix."""
    return {prefix + original: None if ours is None else our_prefix + ours for original, ours in rows.items()}


def rename(checkpoint: dict[str, Tensor], table: Table) -> dict[str, Tensor]:
    """The tensors of `checkpoint` (not copied) under our names; UserError if table and checkpoint differ in anything."""
    return {ours: checkpoint[original] for ours, original in _match(list(checkpoint), table).items()}


def load_into(
    module: nn.Module,
    checkpoint: dict[str, Tensor],
    table: Table,
    dtype: torch.dtype | None = None,
    device: str | torch.device | None = None,
) -> None:
    """
    Fill every parameter and buffer of `module`, which may be on the meta device, from `checkpoint`.

    dtype    of floating tensors; without it the module's own
    device   without it the module's own, or the checkpoint's if the module is on the meta device

    A file with several components fills an `nn.ModuleDict` of them by one table that is the union of theirs, each
    `under("model.diffusion_model.", "unet.", UNET)`: so every name in the file is accounted for.

    Tensors that need no cast are taken over, not copied. Casts go tensor by tensor: if the caller keeps no reference
    (`load_into(module, read_checkpoint(path), table)`) each original is freed as soon as its cast is made.
    Raises UserError, in one line that names the tensor.
    """
    originals = _match(list(checkpoint), table)
    wanted = module.state_dict()
    if missing := [name for name in wanted if name not in originals]:
        shape = tuple(wanted[missing[0]].shape)
        raise UserError(f"the checkpoint has nothing for {missing[0]} {shape}{_and_more(missing)}")
    if extra := [original for ours, original in originals.items() if ours not in wanted]:
        raise UserError(f"{extra[0]}: the model has no such layer{_and_more(extra)}")
    tensors = {ours: checkpoint[original] for ours, original in originals.items()}
    del checkpoint
    if wrong := [name for name in wanted if wanted[name].shape != tensors[name].shape]:
        theirs, ours = tuple(tensors[wrong[0]].shape), tuple(wanted[wrong[0]].shape)
        raise UserError(
            f"{originals[wrong[0]]}: shape {theirs} in the file, {ours} in the model ({wrong[0]}){_and_more(wrong)}"
        )
    for name, tensor in tensors.items():
        # A quantised copy has the same names and shapes.
        if tensor.is_floating_point() != wanted[name].is_floating_point():
            raise UserError(
                f"{originals[name]}: {tensor.dtype} in the file, {wanted[name].dtype} in the model"
            )
        to_dtype = (dtype or wanted[name].dtype) if tensor.is_floating_point() else tensor.dtype
        to_device = device or (tensor.device if wanted[name].is_meta else wanted[name].device)
        tensors[name] = tensor.to(to_device, to_dtype)
    module.load_state_dict(tensors, strict=True, assign=True)


def _match(names: list[str], table: Table) -> dict[str, str]:
    """-> {our name: original name}, one for one."""
    ignored = [_pattern(row) for row, ours in table.items() if ours is None]
    rows = {row: (_pattern(row), ours) for row, ours in table.items() if ours is not None}
    hits: dict[str, list[tuple[str, str]]] = {
        name: [
            (row, _fill(ours, m)) for row, (pattern, ours) in rows.items() if (m := pattern.fullmatch(name))
        ]
        for name in names
        if not any(pattern.fullmatch(name) for pattern in ignored)
    }
    if unknown := [name for name, found in hits.items() if not found]:
        raise UserError(f"{unknown[0]}: no row of the table names it{_and_more(unknown)}")
    if doubtful := [name for name, found in hits.items() if len(found) > 1]:
        several = " and ".join(row for row, _ in hits[doubtful[0]])
        raise UserError(f"{doubtful[0]}: the rows {several} all name it{_and_more(doubtful)}")
    if dead := sorted(rows.keys() - {found[0][0] for found in hits.values()}):
        raise UserError(f"{dead[0]}: nothing in the checkpoint has the name of this row{_and_more(dead)}")
    originals: dict[str, str] = {}
    for name, [(_, ours)] in hits.items():
        if ours in originals:
            raise UserError(f"{originals[ours]} and {name} would both become {ours}")
        originals[ours] = name
    return originals


def _pattern(row: str) -> re.Pattern:
    return re.compile(re.escape(row).replace(r"\#", r"(\d+)").replace(r"\*", "(.+)"))


def _fill(ours: str, match: re.Match) -> str:
    """Our name with the numbers and the rest that its original has."""
    parts = re.split(r"[#*]", ours)
    gaps = [*match.groups(), ""]
    return "".join(text for pair in zip(parts, gaps, strict=True) for text in pair)


def _and_more(names: list[str]) -> str:
    return f" (and {len(names) - 1} more like it)" if len(names) > 1 else ""


class _Inert:
    """Stands for the few classes that training checkpoints hold beside their tensors: keeps nothing, does nothing."""

    def __init__(self, *args: object) -> None:
        pass

    def __setstate__(self, state: object) -> None:
        pass


INERT = [
    (_Inert, name)
    for name in (
        "pytorch_lightning.callbacks.model_checkpoint.ModelCheckpoint",  # sd-v1-4.ckpt, Paint-by-Example's model.ckpt
        "numpy.core.multiarray.scalar",  # its best score so far
        "numpy._core.multiarray.scalar",
        "numpy.dtype",
        "_codecs.encode",
    )
]


def read_checkpoint(path: str | Path) -> dict[str, Tensor]:
    """
    {original name: tensor} on the CPU: safetensors, or a torch file, zip or legacy, flat or within "state_dict" or "model".

    Safetensors and zip files are mapped, not read: what is not used costs no memory. A pickle may ask for tensors and for
    the names in INERT only: anything else is refused before it runs. UserError, in one line that names the file.
    """
    path = Path(path)
    if not os.path.isfile(path):
        raise UserError(f"{path}: {'is not a file' if os.path.exists(path) else 'no such file'}")
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        with torch.serialization.safe_globals(INERT):
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except Exception as error:  # bytes that are cut anywhere fail in a dozen ways
        if asked := re.search(r"GLOBAL (\S+)", str(error)):
            raise UserError(f"{path}: refused, its pickle asks for {asked[1]}, no tensor needs it") from None
        raise UserError(f"{path}: damaged, cut short, or not a checkpoint ({_reason(error)})") from None
    for wrapper in ("state_dict", "model"):
        if isinstance(content, dict) and isinstance(content.get(wrapper), dict):
            content = content[wrapper]
    if not isinstance(content, dict) or not content:
        raise UserError(f"{path}: holds no table of tensors")
    for name, tensor in content.items():
        if not isinstance(name, str) or not isinstance(tensor, Tensor):
            raise UserError(
                f"{path}: holds {name}, a {type(tensor).__name__}, where named tensors were expected"
            )
    return dict(content)


def _reason(error: Exception) -> str:
    """The first sentence: torch's messages go on for a paragraph."""
    return re.split(r"\.\s|\n", str(error).strip())[0] or type(error).__name__
