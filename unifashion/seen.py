"""What a model says of its own training, in its own file, so that an evaluation can tell whether it is a test.

    seen.<namespace>    int64 (n,), sorted: hashes of the ids of all that its training data show
    seen.unknown        empty: it went on from a file without a record, so that the rest is not all
    chosen.<on what>    empty: on what its checkpoints were chosen

A namespace is where equal ids are of equal pictures:

    namespace     data sets                     ids
    fashiongen    FashionGen                    products
    fashion200k   Fashion200K                   products
    fashioniq     Fashion-IQ, Fashion-IQ-Cap    pictures, be they references or targets
    vitonhd       VITON-HD, MGD on it           persons and clothes
    dresscode     MGD on Dress Code             persons and clothes
    toy           all of ToyFashion             combinations of attributes (`toy.COMBINATION`)

ToyFashion's ids say nothing, since every world numbers its own pictures: what must be new in a test are combinations. All that
`toy.split_of` gives to train count as seen, drawn or not. What is held out to choose `best` by is a part of the training data
here. Of what the public files were trained on nothing is known.
"""

import hashlib
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from itertools import product
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor
from torch.utils.data import Dataset

from unifashion import UserError
from unifashion.data import toy
from unifashion.data.dresscode import DressCode
from unifashion.data.fashion200k import Fashion200K
from unifashion.data.fashiongen import FashionGen
from unifashion.data.fashioniq import FashionIQ, FashionIQCap
from unifashion.data.toy import Garment

SEEN, CHOSEN = "seen.", "chosen."
UNKNOWN = f"{SEEN}unknown"
HELD_OUT = "a held-out part of the training data"


# What training leaves


def remember(carried: dict[str, Tensor], parts: Iterable[Dataset]) -> dict[str, Tensor]:
    """What a model carries, its record extended by what it learns from now: opened training splits."""
    new = record(parts)
    before = {name: old for name, old in carried.items() if is_record(name)}
    return carried | new | {k: torch.cat([old, new.get(k, old)]).unique() for k, old in before.items()}


def record(parts: Iterable[Dataset]) -> dict[str, Tensor]:
    """Opened training splits -> the tensors of a record."""
    ids: dict[str, set[str]] = defaultdict(set)
    for data in parts:
        if world := world_of(data.root):
            ids["toy"].update(train_combinations(world))
        else:
            namespace, own = items(data)
            ids[namespace].update(own)
    return {f"{SEEN}{k}": hashes(of).unique() for k, of in ids.items()} | {f"{CHOSEN}{HELD_OUT}": nothing()}


def apart(tensors: dict[str, Tensor], path: Path) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """A file's tensors -> its weights, and its record. Raises UserError for a record that is none."""
    weights = {k: v for k, v in tensors.items() if not is_record(k)}
    of = {k: v for k, v in tensors.items() if is_record(k)}
    for name, x in of.items():
        if x.dtype != torch.int64 or x.ndim != 1 or (name.startswith(CHOSEN) and len(x)):
            raise UserError(f"{path}: {name} is {x.dtype} {tuple(x.shape)}, no record of a training")
    return weights, of


def is_record(name: str) -> bool:
    return name.startswith((SEEN, CHOSEN))


def nothing() -> Tensor:
    return torch.empty(0, dtype=torch.int64)


# What is shown


def items(data: Dataset) -> tuple[str, list[str]]:
    """An opened data set, not ToyFashion's -> namespace, and the ids of all that its samples show, each once."""
    if isinstance(data, FashionIQ):
        ids = [name for row in data.rows for name in (row.reference, row.target) if name]
        return "fashioniq", list(dict.fromkeys(ids))
    namespaces = {FashionIQCap: "fashioniq", FashionGen: "fashiongen", Fashion200K: "fashion200k"}
    if type(data) in namespaces:
        return namespaces[type(data)], list(dict.fromkeys(data.products))
    namespace = "dresscode" if isinstance(data, DressCode) else "vitonhd"
    return namespace, list(dict.fromkeys(name for pair in data.pairs for name in pair))


def combination(g: Garment) -> str:
    """The id of a garment of ToyFashion."""
    return "/".join(getattr(g, name) for name in toy.COMBINATION)


def train_combinations(world: Path) -> list[str]:
    """All that `toy.split_of` gives to train, and what the world has in train, should that be others."""
    drawn = (combination(Garment(**row["garment"])) for row in toy.read_rows(world, "train"))
    return [*_every_of_train(), *drawn]


@cache  # some eight thousand hashes
def _every_of_train() -> tuple[str, ...]:
    every = (
        Garment(**dict(zip(toy.COMBINATION, values, strict=True)), second="white")
        for values in product(*(toy.ATTRIBUTES[name] for name in toy.COMBINATION))
    )
    return tuple(combination(g) for g in every if exists(g) and toy.split_of(g) == "train")


def exists(g: Garment) -> bool:
    return (g.category == "dress") == (g.length in toy.DRESS_LENGTHS)


def world_of(root: Path) -> Path | None:
    """The ToyFashion that a data set's folder is a part of, or its pictures are (`images` may be a link), if it is one."""
    above = (Path(root).resolve().parent, Path(root, "images").resolve().parent.parent)
    return next((world for world in above if (world / "toy.json").is_file()), None)


def hashes(ids: Iterable[str]) -> Tensor:
    """-> (n,) int64, in their order."""
    digests = (hashlib.blake2b(name.encode(errors="surrogateescape"), digest_size=8) for name in ids)
    return torch.tensor([int.from_bytes(d.digest(), "big", signed=True) for d in digests], dtype=torch.int64)


# What an evaluation asks


@dataclass(frozen=True)
class Record:
    """`seen` by namespace, `chosen` on what; whole: it names all training data of ours. Without a record all are empty."""

    seen: dict[str, Tensor]
    chosen: tuple[str, ...]
    whole: bool

    def has(self, namespace: str, ids: list[str]) -> Tensor:
        """-> (n,) bool, which of the items training has seen, as far as the record knows."""
        return torch.isin(hashes(ids), self.seen.get(namespace, nothing()))

    def told(self) -> str:
        of = ", ".join(f"{len(x)} of {name}" for name, x in self.seen.items())
        return (of or "nothing that it tells") + ", and what is not told" * (bool(of) and not self.whole)


def read_record(path: Path) -> Record:
    """Of a model.safetensors; the weights are not read. Raises UserError if it is not whole, or the record is none."""
    try:
        with safe_open(path, "pt") as file:
            found = {name: file.get_tensor(name) for name in file.keys() if is_record(name)}  # noqa: SIM118
    except Exception as error:  # safetensors raises its own type for a truncated file
        raise UserError(f"{path}: not a whole safetensors file ({error})") from None
    _, found = apart(found, path)
    seen = {name.removeprefix(SEEN): x for name, x in found.items() if name.startswith(SEEN)}
    chosen = tuple(sorted(name.removeprefix(CHOSEN) for name in found if name.startswith(CHOSEN)))
    whole = bool(seen) and "unknown" not in seen
    return Record({k: x for k, x in seen.items() if k != "unknown"}, chosen, whole)
