"""Fashion-IQ in its original form, and the captions of its pictures, Fashion-IQ-Cap, as released with UniFashion.

`captions/cap.{dress,shirt,toptee}.{split}.json`: a list of {"target": id, "candidate": id of the reference, "captions": [2]};
in the split test without targets, which were never published (ToyFashion's test has them).
`image_splits/split.{category}.{split}.json`: the ids of a category's pictures, among which its targets are searched.
`images/{id}.png` (or .jpg): the pictures.
`next_llava.{split}.{category}.caption.json`: a list of {"image": id, "caption": text, "text_guidance": text}; of the original
only the split val was ever released.
`captions.jsonl`: ours, what `infer.py caption --style fashioniq-cap --image images/* --out captions.jsonl` writes.
"""

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from unifashion import UserError
from unifashion.data import absent, open_image, read_json, read_lines, refuse_repeated

CATEGORIES = ("dress", "shirt", "toptee")
FIELDS = ("image", "caption", "text_guidance")
WAYS = 4  # in which the two captions of a triplet are joined


@dataclass(frozen=True)
class Triplet:
    """What two annotators say the target is, or has, that the reference has not. One of their captions may be empty."""

    category: str
    reference: str
    target: str | None  # None in the original's split test
    captions: tuple[str, str]


class FashionIQ:
    """Items {"reference", "target": RGB, "captions": (2), "reference_id", "target_id", "category", "caption"}.

    "caption" is the target's own, None if there is none; where targets are kept secret, in the original's split test,
    "target", "target_id" and "caption" are None.

    rows       all three categories' triplets, one after the other
    products   the target's id of each row
    pools      category -> ids of all its pictures
    captions   id -> its picture's caption, from captions.jsonl; without that file, but in training only, from
               Fashion-IQ-Cap's files: its val captions were written with the queries' texts at hand
    captioned  indices of the rows whose target has a caption

    Raises UserError if a file is missing or damaged; images/ may be missing if `pictures` is false.
    """

    SOURCE = "get Fashion-IQ's captions and image_splits, and its pictures as images/, as github.com/XiaoxiaoGuo/fashion-iq says"

    def __init__(self, root: str | Path, split: str = "train", pictures: bool = True) -> None:
        self.root = Path(root)
        files = {name: self.root / f"captions/cap.{name}.{split}.json" for name in CATEGORIES}
        splits = {name: self.root / f"image_splits/split.{name}.{split}.json" for name in CATEGORIES}
        lacks = [
            str(f.relative_to(self.root)) for f in (*files.values(), *splits.values()) if not f.is_file()
        ]
        if pictures and not (self.root / "images").is_dir():
            lacks.append("images/")
        if lacks:
            raise UserError(f"{self.root} lacks {', '.join(lacks)}: {self.SOURCE}, or use --data toy.")
        self.pools = {name: read_pool(file) for name, file in splits.items()}
        self.rows = [row for name, file in files.items() for row in read_triplets(file, name, split)]
        for name, pool in self.pools.items():
            known = set(pool)
            for row in self.rows:
                strange = {row.reference, row.target or row.reference} - known
                if row.category == name and strange:
                    raise UserError(f"{files[name]}: {min(strange)} is not in {splits[name].name}")
        self.products = [row.target or "" for row in self.rows]
        self.captions = self.read_own_captions(split)
        self.captioned = [i for i, row in enumerate(self.rows) if row.target in self.captions]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict:
        row = self.rows[index]
        return {
            "reference": self.open(row.reference),
            "target": self.open(row.target) if row.target else None,
            "captions": row.captions,
            "reference_id": row.reference,
            "target_id": row.target,
            "category": row.category,
            "caption": self.captions.get(row.target),
        }

    def open(self, name: str) -> Image.Image:
        """The picture of an id, RGB."""
        return open_image(self.root / picture_path(self.root, name))

    def missing(self) -> list[str]:
        """Of each row that lacks a picture, the first that is not there, relative to the root."""
        return absent_pictures(self.root, ((row.reference, row.target or row.reference) for row in self.rows))

    def read_own_captions(self, split: str) -> dict[str, str]:
        file = self.root / "captions.jsonl"
        if file.is_file():
            return read_jsonl_captions(file)
        if split != "train":
            return {}
        files = [self.root / f"next_llava.train.{name}.caption.json" for name in CATEGORIES]
        return {row["image"]: row["caption"] for f in files if f.is_file() for row in read_captions(f)}


class FashionIQCap:
    """Items {"image": RGB, "text": caption, "path": relative to root, "product": id, "category", "text_guidance"}.

    The text is the caption on one line, without the "**" that some have. In train, where nothing was released, they are those of
    our captions.jsonl, if it is there; `uncaptioned` has the ids that it lacks. All three categories, one after the
    other; `products` has the id of each item. Raises UserError if captions or pictures are missing or damaged.
    """

    SOURCE = (
        "get the captions at github.com/xiangyu-mm/UniFashion (dataset/) and the pictures as "
        "github.com/XiaoxiaoGuo/fashion-iq says"
    )

    def __init__(self, root: str | Path, split: str = "train") -> None:
        self.root = Path(root)
        files = {name: self.root / f"next_llava.{split}.{name}.caption.json" for name in CATEGORIES}
        lacks = [file.name for file in files.values() if not file.is_file()]
        own = bool(lacks) and split == "train" and (self.root / "captions.jsonl").is_file()
        if lacks and split == "train" and not own:
            raise UserError(
                f"{self.root} lacks {', '.join(lacks)}: Fashion-IQ-Cap's train captions were never released, "
                "only val; infer.py caption writes others (captions.jsonl); or use --data toy."
            )
        if (lacks and not own) or not (self.root / "images").is_dir():
            raise UserError(
                f"{self.root} lacks {', '.join(lacks if not own else []) or 'images/'}: {self.SOURCE}, or use --data toy."
            )
        self.uncaptioned: list[str] = []
        if own:
            self.rows, self.uncaptioned = own_rows(self.root)
        else:
            self.rows = [(name, row) for name, file in files.items() for row in read_captions(file)]
        self.products = [row["image"] for _, row in self.rows]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict:
        category, row = self.rows[index]
        path = picture_path(self.root, row["image"])
        return {
            "image": open_image(self.root / path),
            "text": row["caption"],
            "path": path,
            "product": row["image"],
            "category": category,
            "text_guidance": row["text_guidance"],
        }

    def missing(self) -> list[str]:
        """The pictures that the rows name and that are not there, relative to the root; and the `uncaptioned`."""
        told = [f"a caption of {name}" for name in self.uncaptioned]
        return [*absent_pictures(self.root, ([name] for name in self.products)), *told]


def joined(captions: tuple[str, str], way: int = 0) -> str:
    """A triplet's two captions as one text: 0 "C1 and c2", 1 "C2 and c1", 2 "C1", 3 "C2". An empty one is left out.

    The original trains on all four and evaluates on the first; its capitals are Python's: the rest becomes small.
    """
    first, second = (caption.strip(".?, ") for caption in captions)
    chosen = [(first, second), (second, first), (first,), (second,)][way]
    chosen = [text for text in chosen if text] or [first or second]
    return " and ".join([chosen[0].capitalize(), *chosen[1:]])


def picture_path(root: Path, name: str) -> str:
    """Where the picture of an id is, relative to the root: as .png, which the original says, or as .jpg."""
    path = f"images/{name}.png"
    jpeg = f"images/{name}.jpg"
    return jpeg if not (root / path).exists() and (root / jpeg).exists() else path


def absent_pictures(root: Path, rows: Iterable[Iterable[str]]) -> list[str]:
    """Of each row of ids that lacks a picture, the first that is not there."""
    return absent(root, ([f"images/{name}" for name in row] for row in rows), (".png", ".jpg"))


def read_pool(file: Path) -> list[str]:
    """The ids of `image_splits/`. Raises UserError if they are not whole, or one is there twice."""
    names = read_json(file)
    if not isinstance(names, list) or not all(isinstance(n, str) and n for n in names):
        raise UserError(f"{file}: not a list of ids")
    refuse_repeated(file, names)
    return names


def read_triplets(file: Path, category: str, split: str) -> list[Triplet]:
    """The rows of `captions/`. Raises UserError, naming file and row, if one is not as it should be."""
    rows = read_json(file)
    if not isinstance(rows, list):
        raise UserError(f"{file}: not a list of triplets")
    triplets = []
    for i, row in enumerate(rows):
        captions = row.get("captions") if isinstance(row, dict) else None
        ids = (
            ("candidate",)
            if captions and split == "test" and "target" not in row
            else ("candidate", "target")
        )
        if (
            not isinstance(captions, list)
            or len(captions) != 2
            or not all(isinstance(text, str) for text in captions)
            or not all(isinstance(row.get(name), str) and row[name] for name in ids)
        ):
            raise UserError(f"{file}: row {i} has not {', '.join(ids)} and two captions: {str(row)[:100]}")
        if not joined(captions).strip():
            raise UserError(f"{file}: row {i} has two empty captions: {str(row)[:100]}")
        triplets.append(Triplet(category, row["candidate"], row.get("target"), tuple(captions)))
    if split != "test":  # there a query may be asked twice
        refuse_repeated(file, (f"{t.reference} -> {t.target} {t.captions}" for t in triplets))
    return triplets


def read_captions(file: Path) -> list[dict]:
    """The rows of a file of captions, each caption on one line. Raises UserError, naming file and row, if one is not so."""
    rows = read_json(file)
    if not isinstance(rows, list):
        raise UserError(f"{file}: not a list of captions")
    clean = []
    for i, row in enumerate(rows):
        if not isinstance(row, dict) or not all(isinstance(row.get(field), str) for field in FIELDS):
            raise UserError(f"{file}: row {i} has not the texts {', '.join(FIELDS)}: {str(row)[:100]}")
        caption = " ".join(row["caption"].replace("**", "").split())
        if not caption or not row["image"]:
            raise UserError(f"{file}: row {i} has an empty caption or image: {str(row)[:100]}")
        clean.append(row | {"caption": caption})
    refuse_repeated(file, (row["image"] for row in clean))
    return clean


def own_rows(root: Path) -> tuple[list[tuple[str, dict]], list[str]]:
    """
    captions.jsonl as (category, row of Fashion-IQ-Cap), of pictures of the split train alone, each once; and the ids of those
    that it lacks. 811 of Fashion-IQ's are in val's or test's pool of another category, too, and left out: what is evaluated on
    is not learned from. Raises UserError if one of the nine lists of `image_splits/` cannot be read.
    """

    def pool(category: str, split: str) -> list[str]:
        return read_pool(root / f"image_splits/split.{category}.{split}.json")

    captions = read_jsonl_captions(root / "captions.jsonl")
    evaluated = {name for c in CATEGORIES for split in ("val", "test") for name in pool(c, split)}
    category: dict[str, str] = {}
    for c in CATEGORIES:
        for name in pool(c, "train"):
            if name not in evaluated:
                category.setdefault(name, c)
    rows = [
        (c, {"image": name, "caption": captions[name], "text_guidance": ""})
        for name, c in category.items()
        if name in captions
    ]
    return rows, [name for name in category if name not in captions]


def read_jsonl_captions(file: Path) -> dict[str, str]:
    """Picture id -> caption on one line, from lines {"image": path or id, "caption", ...}; of several styles fashioniq-cap.

    An empty caption, when the LLM had nothing to say, is none. Raises UserError, naming file and line, if a line is not as
    it should be, or two caption a picture in one style.
    """
    found: dict[str, dict[str, str]] = {}
    for i, line in read_lines(file):
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise UserError(f"{file}: line {i} is not whole JSON ({error})") from None
        if not isinstance(row, dict) or not all(isinstance(row.get(key), str) for key in FIELDS[:2]):
            raise UserError(f"{file}: line {i} has not the texts image, caption: {line[:100]}")
        name, caption = Path(row["image"]).stem, " ".join(row["caption"].replace("**", "").split())
        if not name:
            raise UserError(f"{file}: line {i} has an empty image: {line[:100]}")
        if not caption:
            continue
        styles = found.setdefault(name, {})
        if row.get("style") in styles:
            raise UserError(f"{file}: line {i} captions {name} a second time")
        styles[row.get("style")] = caption
    return {name: styles.get("fashioniq-cap", next(iter(styles.values()))) for name, styles in found.items()}
