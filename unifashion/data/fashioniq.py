"""Fashion-IQ's pictures with the captions of Fashion-IQ-Cap, as released with UniFashion.

`next_llava.{split}.{dress,shirt,toptee}.caption.json`: a list of {"image": id, "caption": text, "text_guidance": text}.
`images/{id}.png` (or .jpg): Fashion-IQ's pictures. Of the original only the split val was ever released.
"""

import json
from pathlib import Path

from unifashion import UserError
from unifashion.data import open_image

CATEGORIES = ("dress", "shirt", "toptee")
FIELDS = ("image", "caption", "text_guidance")


class FashionIQCap:
    """Items {"image": RGB, "text": caption, "path": relative to root, "product": id, "category", "text_guidance"}.

    The text is the caption on one line, without the "**" that some have. All three categories, one after the other;
    `products` has the id of each item. Raises UserError if captions or pictures are missing or damaged.
    """

    def __init__(self, root: str | Path, split: str = "train") -> None:
        self.root = Path(root)
        files = {name: self.root / f"next_llava.{split}.{name}.caption.json" for name in CATEGORIES}
        missing = [file.name for file in files.values() if not file.is_file()]
        if missing and split == "train":
            raise UserError(
                f"{self.root} lacks {', '.join(missing)}: Fashion-IQ-Cap's train captions were never released, "
                "only val; or use --data toy."
            )
        if missing or not (self.root / "images").is_dir():
            raise UserError(
                f"{self.root} lacks {', '.join(missing) or 'images/'}: get the captions at github.com/xiangyu-mm/UniFashion "
                "(dataset/) and the pictures as github.com/XiaoxiaoGuo/fashion-iq says, or use --data toy."
            )
        self.rows = [(name, row) for name, file in files.items() for row in read_captions(file)]
        self.products = [row["image"] for _, row in self.rows]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict:
        category, row = self.rows[index]
        path = f"images/{row['image']}.png"
        if not (self.root / path).exists() and (self.root / path).with_suffix(".jpg").exists():
            path = f"images/{row['image']}.jpg"
        return {
            "image": open_image(self.root / path),
            "text": row["caption"],
            "path": path,
            "product": row["image"],
            "category": category,
            "text_guidance": row["text_guidance"],
        }


def read_captions(file: Path) -> list[dict]:
    """The rows of a file of captions, each caption on one line. Raises UserError, naming file and row, if one is not so."""
    try:
        rows = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{file}: not whole JSON ({error})") from None
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
    return clean
