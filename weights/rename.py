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

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from unifashion import UserError

Table = dict[str, str | None]
Checkpoint = dict[str, Tensor]
M = TypeVar("M", bound=nn.Module)


class Layout(NamedTuple):
    """How files of one kind are read: a table, and before it what differs in the numbers' arrangement, which a table cannot say."""

    table: Table
    transform: Callable[[Checkpoint], Checkpoint] = dict


# {a name that only files of one kind have: how they are read}
Layouts = dict[str, Layout]


def blank(make: Callable[[], M]) -> M:
    """What `make` gives, on the meta device: names and shapes, for `load_into` to fill."""
    with torch.device("meta"), _NothingDrawn():
        return make()


class _NothingDrawn(TorchFunctionMode):
    """`torch.nn.init` does nothing: drawing no numbers on the meta device took two thirds of the time."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if getattr(func, "__module__", "") == "torch.nn.init":
            return kwargs["tensor"]
        return func(*args, **(kwargs or {}))


def under(prefix: str, our_prefix: str, rows: Table) -> Table:
    """The rows of a sub-table, each name behind its prefix."""
    return {prefix + original: None if ours is None else our_prefix + ours for original, ours in rows.items()}


def only(our_prefix: str, rows: Table) -> Table:
    """The rows of one part of a file that holds several; those of the others are left out."""
    return {
        original: ours.removeprefix(our_prefix) if ours and ours.startswith(our_prefix) else None
        for original, ours in rows.items()
    }


def fused(original: str, ours: str) -> Table:
    """The rows of what `thirds` makes of one tensor; # in `ours` stands for q, k and v."""
    return {f"{original}[{part}]": ours.replace("#", part) for part in "qkv"}


def thirds(name: str, tensor: Tensor) -> Checkpoint:
    """A fused projection (3 dim, ...) -> NAME[q], NAME[k], NAME[v], views. Raises UserError if it has no thirds."""
    if not tensor.ndim or len(tensor) % 3:
        raise UserError(f"{name}: shape {tuple(tensor.shape)} does not divide into q, k and v")
    return {f"{name}[{part}]": third for part, third in zip("qkv", tensor.chunk(3), strict=True)}


def rename(checkpoint: dict[str, Tensor], table: Table) -> dict[str, Tensor]:
    """The tensors of `checkpoint` (not copied) under our names; UserError if table and checkpoint differ in anything."""
    originals, dead = _match(list(checkpoint), table)
    _refuse_dead(dead)
    return {ours: checkpoint[original] for ours, original in originals.items()}


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
    originals, dead = _match(list(checkpoint), table)
    wanted = module.state_dict()
    if missing := [name for name in wanted if name not in originals]:
        ours, shape = missing[0], tuple(wanted[missing[0]].shape)
        lacks = _origin(ours, table, set(checkpoint))
        raise UserError(f"the checkpoint lacks {lacks}, for {ours} {shape}{_and_more(missing)}")
    _refuse_dead(dead)
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


def load_layout(
    module: nn.Module,
    checkpoint: Checkpoint,
    layouts: Layouts,
    dtype: torch.dtype | None = None,
    device: str | torch.device | None = None,
) -> None:
    """As `load_into`, by the one of `layouts` that the names in `checkpoint` are of. Raises UserError if they are of none."""
    table, transform = layout_of(checkpoint, layouts)
    ready = [transform(checkpoint)]
    del checkpoint
    load_into(
        module, ready.pop(), table, dtype, device
    )  # which frees tensor by tensor what nobody else keeps


def layout_of(checkpoint: Checkpoint, layouts: Layouts) -> Layout:
    """The first of `layouts` whose name is in `checkpoint`; UserError if there is none."""
    for name, layout in layouts.items():
        if name in checkpoint:
            return layout
    known = ", ".join(layouts)
    first = next(iter(checkpoint), "nothing")
    raise UserError(f"its names ({first}, ...) are of no layout that is known here: none of {known} is there")


@contextmanager
def naming(path: Path, otherwise: str) -> Iterator[None]:
    """What is wrong with the tensors of a file gets the file's name, and `otherwise`, if it does not begin with it."""
    try:
        yield
    except UserError as error:
        told = str(error)
        raise UserError(told if told.startswith(str(path)) else f"{path} {otherwise}: {told}") from None


def _match(names: list[str], table: Table) -> tuple[dict[str, str], list[str]]:
    """-> {our name: original name}, one for one, and the rows that nothing in the file has the name of."""
    rows = [row for row, ours in table.items() if ours is not None]
    ignored = _finder([row for row, ours in table.items() if ours is None])
    find = _finder(rows)
    hits = {
        name: [(row, _fill(table[row], match)) for row, match in find(name)]
        for name in names
        if not ignored(name)
    }
    if unknown := [name for name, found in hits.items() if not found]:
        raise UserError(f"{unknown[0]}: no row of the table names it{_and_more(unknown)}")
    if doubtful := [name for name, found in hits.items() if len(found) > 1]:
        several = " and ".join(row for row, _ in hits[doubtful[0]])
        raise UserError(f"{doubtful[0]}: the rows {several} all name it{_and_more(doubtful)}")
    originals: dict[str, str] = {}
    for name, [(_, ours)] in hits.items():
        if ours in originals:
            raise UserError(f"{originals[ours]} and {name} would both become {ours}")
        originals[ours] = name
    return originals, sorted(set(rows) - {found[0][0] for found in hits.values()})


def _refuse_dead(rows: list[str]) -> None:
    if rows:
        raise UserError(f"{rows[0]}: nothing in the checkpoint has the name of this row{_and_more(rows)}")


def _origin(name: str, table: Table, there: set[str]) -> str:
    """The original of our `name`: a row that would give it, read backwards; of several one whose place `there` is not empty."""
    rows = [(row, _pattern(ours).fullmatch(name)) for row, ours in table.items() if ours is not None]
    found = [_fill(row, match) for row, match in rows if match]
    places = {other.rpartition(".")[0] for other in there}
    near = [original for original in found if original.rpartition(".")[0] in places]
    return (near or found or ["what no row of the table names"])[0]


def _finder(rows: list[str]) -> Callable[[str], list[tuple[str, re.Match]]]:
    """-> a function that gives the rows which name a tensor. By how rows start, few are tried: 2,000 names times 150 rows are slow."""
    starts: dict[str, list[str]] = {}
    for row in rows:
        starts.setdefault(re.split(r"[#*]", row)[0], []).append(row)
    lengths = sorted({len(start) for start in starts})

    def find(name: str) -> list[tuple[str, re.Match]]:
        near = [row for n in lengths if n <= len(name) for row in starts.get(name[:n], ())]
        return [(row, match) for row in near if (match := _pattern(row).fullmatch(name))]

    return find


@cache
def _pattern(row: str) -> re.Pattern:
    return re.compile(re.escape(row).replace(r"\#", r"(\d+)").replace(r"\*", "(.+)"))


def _fill(ours: str, match: re.Match) -> str:
    """Our name with the numbers and the rest that its original has."""
    parts = re.split(r"[#*]", ours)
    gaps = [*match.groups(), ""]
    return "".join(text for pair in zip(parts, gaps, strict=True) for text in pair)


def _and_more(names: list[str]) -> str:
    return f" (and {len(names) - 1} more like it)" if len(names) > 1 else ""
