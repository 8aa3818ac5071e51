"""VITON-HD in its original form: `{split}_pairs.txt` and `{split}/{image,agnostic-mask,image-densepose,cloth}`.

Its agnostic-v3.2, the persons with a grey hole, are not read: `tryon.person_tensors` cuts the hole that the mask says.
"""

from pathlib import Path

from PIL import Image

from unifashion import UserError
from unifashion.data import absent, open_image, read_lines, refuse_repeated

FOLDERS = ("image", "agnostic-mask", "image-densepose", "cloth")


def read_pairs(file: Path) -> list[tuple[str, str]]:
    """The ids of a pair list's lines, "person.jpg cloth.jpg". Raises UserError for another line, or a person who is there twice."""
    rows = [line.split() for _, line in read_lines(file)]
    broken = next((row for row in rows if len(row) != 2), None)
    if broken:
        raise UserError(f"{file}: a line is not 'person.jpg cloth.jpg': {' '.join(broken)}")
    refuse_repeated(file, (person for person, _ in rows))
    return [(Path(person).stem, Path(cloth).stem) for person, cloth in rows]


class VITONHD:
    """Items of PIL images: {"person_id", "cloth_id", "person", "mask", "pose", "cloth"}.

    Ids are file names without suffix ("00000_00"). The mask is L, 255 = repaint, 0 = keep (VITON-HD's sense, the
    opposite of the network's keep mask). paired: the person's own cloth (the first column of the pair list); else the
    second column. `pairs` has the ids of person and cloth of each item, `products` those of the cloth. Raises UserError if
    files of the layout are missing, and for an item whose mask is of another size than its person.

    folders: those that are read; of what is in others items have nothing.
    """

    SOURCE = "download it from github.com/shadow2496/VITON-HD (zip, unpacked here)"

    def __init__(
        self, root: str | Path, split: str = "train", paired: bool = True, folders: tuple[str, ...] = FOLDERS
    ) -> None:
        self.root, self.folder, self.folders = Path(root), Path(root, split), folders
        pairs = self.root / f"{split}_pairs.txt"
        lacks = [
            str(path) for path in (pairs, *(self.folder / name for name in folders)) if not path.exists()
        ]
        if lacks:
            raise UserError(
                f"VITON-HD is incomplete, missing {', '.join(lacks)}: {self.SOURCE}, or use --data toy."
            )
        self.pairs = [(person, person if paired else cloth) for person, cloth in read_pairs(pairs)]
        self.products = [cloth for _, cloth in self.pairs]

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, index: int) -> dict:
        person, cloth = self.pairs[index]
        paths = self.paths(person, cloth)
        item = {"person_id": person, "cloth_id": cloth}
        item |= {key: self.open(path, "L" if key == "mask" else "RGB") for key, path in paths.items()}
        if "mask" in item:
            item["mask"] = item["mask"].point(lambda grey: 255 * (grey >= 128))
            if (mask := item["mask"].size) != (size := item["person"].size):
                raise UserError(f"{self.folder / paths['mask']}: is of {mask} pixels, its person of {size}")
        return item

    def open(self, path: str, mode: str = "RGB") -> Image.Image:
        return open_image(self.folder / path, mode)

    def paths(self, person: str, cloth: str) -> dict[str, str]:
        """Where an item's pictures are, relative to the split's folder."""
        every = {
            "person": f"image/{person}.jpg",
            "mask": f"agnostic-mask/{person}_mask.png",
            "pose": f"image-densepose/{person}.jpg",
            "cloth": f"cloth/{cloth}.jpg",
        }
        return {key: path for key, path in every.items() if path.split("/")[0] in self.folders}

    def missing(self) -> list[str]:
        """Of each pair that lacks a picture, the first that is not there, relative to the root."""
        split = self.folder.name
        return absent(
            self.root, ([f"{split}/{p}" for p in self.paths(*pair).values()] for pair in self.pairs)
        )
