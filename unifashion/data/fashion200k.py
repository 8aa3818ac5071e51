"""Fashion200K in its original form: `labels/{dress,jacket,pants,skirt,top}_{split}_detect_all.txt` and `women/`.

A label line is `women/<category>/<kind>/<product>/<product>_<view>.jpeg<TAB>detection score<TAB>caption`.
"""

from pathlib import Path

from unifashion import UserError
from unifashion.data import absent, open_image, read_lines, refuse_repeated


class Fashion200K:
    """Items {"image": RGB, "text": caption, "path": relative to root, "product": folder name shared by its views}.

    `products` has the product of each item. A line without a caption is left out; `missing` tells it. Raises UserError if
    labels (those of a split, of a category that others have) or pictures are missing, if a label is damaged, or there twice.
    """

    SOURCE = "ask for it at github.com/xthan/fashion-200k (labels and women.tar.gz, unpacked here)"

    def __init__(self, root: str | Path, split: str = "train") -> None:
        self.root = Path(root)
        # A Mac leaves others: ._dress_...
        categories = {path.name.split("_")[0] for path in self.root.glob("labels/[!.]*_detect_all.txt")}
        files = [self.root / f"labels/{name}_{split}_detect_all.txt" for name in sorted(categories)]
        lacks = [f"labels/{file.name}" for file in files if not file.is_file()]
        lacks = lacks if files else [f"labels/*_{split}_detect_all.txt"]
        lacks += [] if (self.root / "women").is_dir() else ["women/"]
        if lacks:
            raise UserError(f"{self.root} lacks {', '.join(lacks)}: {self.SOURCE}, or use --data toy.")
        rows = [row for file in files for row in read_labels(file)]
        refuse_repeated(self.root / "labels", (path for path, _ in rows))
        self.rows = [(path, text) for path, text in rows if text.strip()]
        self.uncaptioned = [path for path, text in rows if not text.strip()]
        self.products = [Path(path).parent.name for path, _ in self.rows]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict:
        path, text = self.rows[index]
        image = open_image(self.root / path)
        return {"image": image, "text": text, "path": path, "product": self.products[index]}

    def missing(self) -> list[str]:
        """The pictures that the labels name and that are not there, relative to the root; and lines without a caption."""
        told = [f"a caption of {path}" for path in self.uncaptioned]
        return [*absent(self.root, ([path] for path, _ in self.rows)), *told]


def read_labels(file: Path) -> list[tuple[str, str]]:
    """The (path, caption) of each line. Raises UserError, naming file and line, if one has not three columns or no path."""
    rows = []
    for i, line in read_lines(file):
        path, *rest = line.rstrip("\r").split("\t")
        if len(rest) != 2 or not path.strip():
            raise UserError(f"{file}: line {i} is not path<TAB>score<TAB>caption: {line[:100]}")
        rows.append((path, rest[1]))
    return rows
