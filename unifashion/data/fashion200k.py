"""Fashion200K in its original form: `labels/{dress,jacket,pants,skirt,top}_{split}_detect_all.txt` and `women/`.

A label line is `women/<category>/<kind>/<product>/<product>_<view>.jpeg<TAB>detection score<TAB>caption`.
"""

from pathlib import Path

from unifashion import UserError
from unifashion.data import absent, open_image, read_lines, refuse_repeated


class Fashion200K:
    """Items {"image": RGB, "text": caption, "path": relative to root, "product": folder name shared by its views}.

    `products` has the product of each item. Raises UserError if the labels or the pictures are missing, if a label is
    damaged, without a caption, or there twice.
    """

    SOURCE = "ask for it at github.com/xthan/fashion-200k (labels and women.tar.gz, unpacked here)"

    def __init__(self, root: str | Path, split: str = "train") -> None:
        self.root = Path(root)
        # A Mac leaves others: ._dress_...
        files = sorted(self.root.glob(f"labels/[!.]*_{split}_detect_all.txt"))
        if not files or not (self.root / "women").is_dir():
            raise UserError(
                f"{self.root} lacks labels/*_{split}_detect_all.txt or women/: {self.SOURCE}, or use --data toy."
            )
        lines = [line.rstrip("\r").split("\t") for file in files for line in read_lines(file)]
        broken = next((line for line in lines if len(line) != 3 or not all(s.strip() for s in line)), None)
        if broken:
            raise UserError(f"{self.root}/labels: a line is not path<TAB>score<TAB>caption: {broken}")
        refuse_repeated(self.root / "labels", (path for path, *_ in lines))
        self.rows = [(path, text) for path, _, text in lines]
        self.products = [Path(path).parent.name for path, _ in self.rows]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict:
        path, text = self.rows[index]
        image = open_image(self.root / path)
        return {"image": image, "text": text, "path": path, "product": self.products[index]}

    def missing(self) -> list[str]:
        """The pictures that the labels name and that are not there, relative to the root."""
        return absent(self.root, ([path] for path, _ in self.rows))
