"""MGD's annotations on top of VITON-HD: `captions.json` (5-digit cloth id -> 3 noun chunks) and garment sketches."""

from pathlib import Path

import numpy as np

from unifashion import UserError
from unifashion.data import absent, read_json
from unifashion.data.mgd_mask import VITONHD as RULES
from unifashion.data.mgd_mask import check_joints, read_mask
from unifashion.data.vitonhd import FOLDERS, VITONHD


class MGD:
    """Items of `VITONHD` and {"sketch": L, bright edges on black, "text": the cloth's three noun chunks, ", "-joined}.

    The sketch is UniFashion's in-shop one where `{split}/cloth-sketch/` exists, else MGD's on the person:
    `im_sketch/<person>.png` when paired, `im_sketch_unpaired/<person>_<cloth>.png` otherwise. The mask is VITON-HD's; in a
    folder without `agnostic-mask/` it is MGD's, of `image-parse-v3/` and `openpose_json/`.
    `pairs` and `products` are VITON-HD's. Raises UserError if captions or sketches are missing.
    """

    SOURCE = "get the VITON-HD archive at github.com/aimagelab/multimodal-garment-designer and unpack it here"

    def __init__(self, root: str | Path, split: str = "train", paired: bool = True) -> None:
        self.root, folder = Path(root), Path(root, split)
        self.own_mask = (folder / "image-parse-v3").is_dir() and not (folder / "agnostic-mask").is_dir()
        folders = FOLDERS
        if self.own_mask:
            folders = ("image", "image-densepose", "cloth", "image-parse-v3", "openpose_json")
        self.photos, self.paired = VITONHD(root, split, paired, folders), paired
        self.pairs, self.products = self.photos.pairs, self.photos.products
        captions = Path(root, "captions.json")
        self.in_shop = (folder / "cloth-sketch").is_dir()
        sketches = folder / ("im_sketch" if paired else "im_sketch_unpaired")
        if not captions.is_file() or not (self.in_shop or sketches.is_dir()):
            raise UserError(
                f"{root} lacks MGD's annotations ({captions.name}, {split}/{sketches.name}): {self.SOURCE}, or use --data toy."
            )
        self.captions = read_chunks(captions)
        untold = next((cloth for _, cloth in self.pairs if cloth[:5] not in self.captions), None)
        if untold:
            raise UserError(f"{captions} has no caption for cloth {untold}")

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, index: int) -> dict:
        item = self.photos[index]
        person, cloth = item["person_id"], item["cloth_id"]
        if self.own_mask:
            labels, joints = (self.photos.folder / path for path in self.mask_sources(person))
            size = item["person"].size[::-1]
            item["mask"] = read_mask(item["person"], labels, read_openpose(joints), size, RULES)
        sketch = self.photos.open(self.sketch_of(person, cloth), "L")
        return {**item, "sketch": sketch, "text": ", ".join(self.captions[cloth[:5]])}

    def sketch_of(self, person: str, cloth: str) -> str:
        """Where the sketch is, relative to the split's folder."""
        if self.in_shop:
            return f"cloth-sketch/{cloth}.png"
        return f"im_sketch/{person}.png" if self.paired else f"im_sketch_unpaired/{person}_{cloth}.png"

    def mask_sources(self, person: str) -> list[str]:
        """What the person's mask is made of, where VITON-HD's own is not there, relative to the split's folder."""
        return [f"image-parse-v3/{person}.png", f"openpose_json/{person}_keypoints.json"] * self.own_mask

    def missing(self) -> list[str]:
        """Of each pair that lacks a file, the first that is not there, relative to the root."""

        def files(person: str, cloth: str) -> list[str]:
            photos = self.photos.paths(person, cloth).values()
            return [*photos, self.sketch_of(person, cloth), *self.mask_sources(person)]

        split = self.photos.folder.name
        return absent(self.photos.root, ([f"{split}/{p}" for p in files(*pair)] for pair in self.pairs))


def read_chunks(file: Path) -> dict[str, list[str]]:
    """Cloth number -> its noun chunks. Raises UserError if the file is damaged, or a cloth has none, or is there twice."""
    found = read_json(file)
    if not isinstance(found, dict):
        raise UserError(f"{file}: not an object of cloth -> texts")
    for cloth, texts in found.items():
        whole = isinstance(texts, list) and texts and all(isinstance(t, str) and t.strip() for t in texts)
        if not whole:
            raise UserError(f"{file}: cloth {cloth} has no texts, or an empty one: {str(texts)[:100]}")
    return found


def read_openpose(file: Path) -> np.ndarray:
    """(25,3): x, y in the picture's pixels and confidence of the one person of OpenPose's JSON."""
    found = read_json(file)
    try:
        joints = found["people"][0]["pose_keypoints_2d"]
    except (KeyError, IndexError, TypeError):
        joints = None
    return check_joints(file, joints)
