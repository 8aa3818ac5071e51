"""What composed search is measured on: pools of pictures, the queries that search them, and the captions of their pictures."""

from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from eval import leaks
from eval.truth import garments_of, look, seen_in_training
from unifashion import UserError
from unifashion.data import toy
from unifashion.data.fashioniq import FashionIQ, FashionIQCap, Triplet, absent_pictures, joined, picture_path
from unifashion.seen import items, read_record, world_of
from weights.load import sha256

ORIGINAL, VAL = "original", "VAL"  # kinds of pools
WHOLE = {
    "dress": (2017, 3817),
    "shirt": (2038, 6346),
    "toptee": (1961, 5373),
}  # queries and pictures of Fashion-IQ's val


@dataclass
class Pool:
    """Pictures, and the queries that search among them: `right` (b,n) bool, what each may find.

    kinds  of each kind of pool which pictures (n,) bool it has: the original one all
    """

    name: str
    ids: list[str]
    rows: list[Triplet]
    right: Tensor
    kinds: dict[str, Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.kinds = {ORIGINAL: torch.ones(len(self.ids), dtype=torch.bool), **self.kinds}

    @property
    def texts(self) -> list[str]:
        return [joined(row.captions) for row in self.rows]

    def of(self, kind: str, asked: Tensor) -> "Pool":
        """The pool of another kind, and of its queries those `asked` (b,) bool."""
        keep = self.kinds[kind]
        ids = [name for name, kept in zip(self.ids, keep.tolist(), strict=True) if kept]
        rows = [row for row, kept in zip(self.rows, asked.tolist(), strict=True) if kept]
        return Pool(self.name, ids, rows, self.right[asked][:, keep])


def pools_of(data: FashionIQ) -> list[Pool]:
    """Fashion-IQ's own: two pools a category, one right answer a query. Raises UserError for a category without a query."""
    pools = []
    for name, ids in data.pools.items():
        rows = [row for row in data.rows if row.category == name]
        if not rows:
            raise UserError(f"{data.root}: there are no queries of {name}")
        targets = np.array([row.target for row in rows])
        asked = {name for row in rows for name in (row.reference, row.target)}
        inner = {VAL: torch.tensor([name in asked for name in ids])}
        pools.append(Pool(name, ids, rows, torch.from_numpy(targets[:, None] == np.array(ids)), inner))
    return pools


def check_whole(data: FashionIQ) -> None:
    """Raise UserError unless val has the published queries and pictures; a part of a ToyFashion has its own."""
    for name, sizes in () if world_of(data.root) else WHOLE.items():
        found = sum(row.category == name for row in data.rows), len(data.pools[name])
        if found != sizes:
            raise UserError(
                f"{data.root}: {name} has {found[0]} queries and {found[1]} pictures, not {sizes[0]} and {sizes[1]}, and of others "
                f"the figures would be others: {data.SOURCE}"
            )


def one_pool(data: FashionIQ, looks: dict[str, object]) -> Pool:
    """All categories together, and right is whatever looks like the target; looks: id -> what is equal for twins."""
    ids = [name for pool in data.pools.values() for name in pool]
    numbers: dict[object, int] = {}
    seen = {name: numbers.setdefault(looks[name], len(numbers)) for name in ids}
    targets, everything = (
        torch.tensor([seen[name] for name in names]) for names in ([row.target for row in data.rows], ids)
    )
    return Pool("all", ids, data.rows, targets[:, None] == everything)


def seen_targets(data: FashionIQ, model: Path) -> tuple[set[str], str]:
    """Targets of the queries that training has seen, and who says so: the model, or, where it has no record, the data's own train."""
    targets, record = list(dict.fromkeys(row.target for row in data.rows)), read_record(model)
    known = record.has("fashioniq", targets).tolist()
    seen = {name for name, is_known in zip(targets, known, strict=True) if is_known}
    if record.whole:
        return seen, "the model's record"
    try:
        _, train = items(FashionIQ(data.root, "train", pictures=False))
    except UserError:
        return seen, "nobody for sure: there is neither a whole record nor a train split"
    return seen | (set(targets) & set(train)), "the train split here, for want of a whole record"


def toy_pool(world: Path, data: FashionIQ, split: str) -> Pool:
    """`one_pool` of ToyFashion. Raises UserError if its garments are not the world's, or training has seen them."""
    known = FashionIQCap(data.root, split)
    garments = garments_of(toy.read_rows(world, split), "fashioniq-cap", known, list(range(len(known))))
    if seen := seen_in_training(toy.read_rows(world, "train"), garments):
        raise UserError(
            f"{seen} of {len(garments)} garments have a combination of attributes that training has seen: this is no test"
        )
    return one_pool(data, dict(zip(known.products, map(look, garments), strict=True)))


def check_pictures(data: FashionIQ, pools: list[Pool]) -> None:
    """Raise UserError if pictures are missing, or are none: among fewer candidates the figures would be better."""
    names = sorted({name for pool in pools for name in pool.ids})
    if gone := absent_pictures(data.root, ([name] for name in names)):
        raise UserError(
            f"{data.root} lacks {len(gone)} of {len(names)} pictures, {gone[0]} for one, and among fewer the figures would be "
            "better than they are: github.com/XiaoxiaoGuo/fashion-iq says how to get them"
        )
    paths = [data.root / picture_path(data.root, name) for name in names]
    if broken := [str(path.relative_to(data.root)) for path in paths if not is_picture(path)]:
        raise UserError(
            f"{data.root}: {len(broken)} of {len(paths)} pictures are damaged: {', '.join(broken)}"
        )


def check_captions(data: FashionIQ, pool: Pool, rows: list[dict]) -> None:
    """Raise UserError for captions of other pictures of the same names, such as every ToyFashion's: their files note what they are of."""
    paths = [data.root / picture_path(data.root, name) for name in pool.ids]
    others = [
        f"{path.relative_to(data.root)}"
        for path, row in zip(paths, rows, strict=True)
        if row.get("sha256") and row["sha256"] != sha256(path)
    ]
    if others:
        raise UserError(
            f"{len(others)} of {len(paths)} captions of the pool {pool.name} were written of another file of that name, "
            f"{others[0]} for one, says its sha256: write them anew"
        )


def is_picture(path: Path) -> bool:
    """Whether the file begins as a picture does, which is known at once; pixels are read later."""
    try:
        with Image.open(path):
            return True
    except Exception:  # a damaged file can make a decoder raise almost anything
        return False


def captions_of(files: list[Path], pool: Pool) -> list[dict]:
    """The rows of the files, one for each picture of the pool, in its order; of several styles that of fashioniq-cap.

    Of files that caption the same picture the one named after the pool counts, else the first: Fashion-IQ-Cap has a file a
    category, and 121 pictures are in two. Raises UserError for a picture without a caption, or with two in one file.
    """
    of: dict[str, dict[str | None, dict]] = {name: {} for name in pool.ids}
    for file in sorted(files, key=lambda file: f".{pool.name}." not in file.name):
        styles: dict[str, set[str | None]] = {name: set() for name in pool.ids}
        for row in leaks.read_rows(file):
            name, style = Path(row["image"]).stem, row.get("style")
            if name not in styles or not row["caption"].strip():
                continue
            if style in styles[name]:
                raise UserError(f"{file}: {row['image']} has two captions")
            styles[name].add(style)
            of[name].setdefault(style, row)
    if lacking := [name for name, rows in of.items() if not rows]:
        raise UserError(
            f"{', '.join(map(str, files))}: {len(lacking)} of {len(of)} pictures of the pool {pool.name} have no caption, "
            f"or an empty one, {lacking[0]} for one: infer.py caption --style fashioniq-cap writes them"
        )
    return [rows.get("fashioniq-cap", next(iter(rows.values()))) for rows in of.values()]
