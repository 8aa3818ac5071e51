"""VITON-HD in its original form: `{split}_pairs.txt` and `{split}/{image,agnostic-v3.2,agnostic-mask,...}`."""

from pathlib import Path

from PIL import Image

from unifashion import UserError
from unifashion.data import open_image

FOLDERS = ("image", "agnostic-v3.2", "agnostic-mask", "image-densepose", "cloth")


class VITONHD:
    """Items of PIL images, all of one size: {"person_id", "cloth_id", "person", "agnostic", "mask", "pose", "cloth"}.

    Ids are file names without suffix ("00000_00"). The mask is L, 255 = repaint, 0 = keep (VITON-HD's sense, the
    opposite of the network's keep mask). paired: the person's own cloth (the first column of the pair list); else the
    second column. Raises UserError if files of the layout are missing.
    """

    def __init__(self, root: str | Path, split: str = "train", paired: bool = True) -> None:
        self.root, self.folder = Path(root), Path(root, split)
        pairs = self.root / f"{split}_pairs.txt"
        missing = [
            str(path) for path in (pairs, *(self.folder / name for name in FOLDERS)) if not path.exists()
        ]
        if missing:
            raise UserError(
                f"VITON-HD is incomplete, missing {', '.join(missing)}: download it from "
                "github.com/shadow2496/VITON-HD (zip, unpacked here), or use --data toy."
            )
        rows = [line.split() for line in pairs.read_text(encoding="utf-8").splitlines() if line.strip()]
        broken = next((row for row in rows if len(row) != 2), None)
        if broken:
            raise UserError(f"{pairs}: a line is not 'person.jpg cloth.jpg': {' '.join(broken)}")
        self.pairs = [(Path(person).stem, Path(person if paired else cloth).stem) for person, cloth in rows]

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, index: int) -> dict:
        person, cloth = self.pairs[index]
        mask = self.open(f"agnostic-mask/{person}_mask.png", "L").point(lambda grey: 255 * (grey >= 128))
        return {
            "person_id": person,
            "cloth_id": cloth,
            "person": self.open(f"image/{person}.jpg"),
            "agnostic": self.open(f"agnostic-v3.2/{person}.jpg"),
            "mask": mask,
            "pose": self.open(f"image-densepose/{person}.jpg"),
            "cloth": self.open(f"cloth/{cloth}.jpg"),
        }

    def open(self, path: str, mode: str = "RGB") -> Image.Image:
        return open_image(self.folder / path, mode)
