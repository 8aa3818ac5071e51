"""MGD on Dress Code: three folders of the original, `dresses/`, `upper_body/`, `lower_body/`, each with MGD's sketches beside

    images/<id>_0.jpg, <id>_1.jpg      the person, the garment in the shop
    keypoints/<id>_2.json              {"keypoints": 18 of [x, y, confidence, index]}, in pixels of 384x512
    label_maps/<id>_4.png              the labels of `mgd_mask.DRESSCODE`
    dense/<id>_5.png                   densepose's body parts
    im_sketch/<id>_1.png               the garment's lines as worn, bright on black
    im_sketch_unpaired/<id>_0_<cloth id>_1.png
    train_pairs.txt, test_pairs_{paired,unpaired}.txt        "<id>_0.jpg <cloth id>_1.jpg"

and at the top `fine_captions.json` and `coarse_captions.json`: id -> noun chunks, each of other garments.
"""

import colorsys
from pathlib import Path

import numpy as np
from PIL import Image

from unifashion import UserError
from unifashion.data import absent, open_image, read_json
from unifashion.data.mgd import read_chunks
from unifashion.data.mgd_mask import DRESSCODE, check_joints, read_mask
from unifashion.data.vitonhd import read_pairs

FRAME = (512, 384)  # (h,w) in whose pixels joints are told
PARTS = 24  # of densepose
# One hue a part, those of neighbours far apart; 0 is the black ground.
PART_COLOURS = np.array(
    [(0, 0, 0), *(colorsys.hsv_to_rgb(part * 7 % PARTS / PARTS, 0.8, 1) for part in range(PARTS))]
)


class DressCode:
    """Items as `MGD` has them: {"person_id", "cloth_id", "person", "mask", "pose", "cloth", "sketch", "text"}.

    Ids are file names without suffix ("052012_0", "052012_1"). The mask is MGD's (`mgd_mask`); the pose is
    the map of body parts in colours; the text is the garment's noun chunks, ", "-joined.

    rows        (category, person's id, cloth's id) of each item, all three categories, one after the other
    pairs       their ids alone; products the clothes' ids
    uncaptioned ids of clothes without a caption, whose rows are left out, as MGD does: 12 of 53,792

    Raises UserError if files of the layout are missing or damaged.
    """

    SOURCE = (
        "ask for it at github.com/aimagelab/dress-code, get MGD's sketches and captions at "
        "github.com/aimagelab/multimodal-garment-designer"
    )

    def __init__(self, root: str | Path, split: str = "train", paired: bool = True) -> None:
        self.root = Path(root)
        order = "paired" if paired else "unpaired"
        pairs = "train_pairs.txt" if split == "train" and paired else f"{split}_pairs_{order}.txt"
        self.sketches = "im_sketch" if paired else "im_sketch_unpaired"
        folders = ("images", "keypoints", "label_maps", "dense", self.sketches)
        wanted = [f"{category}/{name}" for category in DRESSCODE for name in (pairs, *folders)]
        wanted += ["fine_captions.json", "coarse_captions.json"]
        lacks = [path for path in wanted if not (self.root / path).exists()]
        if lacks:
            raise UserError(
                f"Dress Code is incomplete, {self.root} lacks {', '.join(lacks)}: {self.SOURCE}, or use --data toy."
            )
        self.captions = {
            k: v
            for name in ("fine", "coarse")
            for k, v in read_chunks(self.root / f"{name}_captions.json").items()
        }
        rows = [
            (category, *pair) for category in DRESSCODE for pair in read_pairs(self.root / category / pairs)
        ]
        self.rows = [row for row in rows if row[2].split("_")[0] in self.captions]
        self.uncaptioned = [row[2] for row in rows if row[2].split("_")[0] not in self.captions]
        if not self.rows:
            raise UserError(
                f"{self.root}: no cloth of {pairs} has a caption in fine_ or coarse_captions.json"
            )
        self.pairs = [(person, cloth) for _, person, cloth in self.rows]
        self.products = [cloth for _, cloth in self.pairs]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict:
        category, person, cloth = self.rows[index]
        path = {key: self.root / name for key, name in self.paths(*self.rows[index]).items()}
        picture = open_image(path["person"])
        joints = read_joints(path["joints"])
        return {
            "person_id": person,
            "cloth_id": cloth,
            "person": picture,
            "mask": read_mask(picture, path["labels"], joints, FRAME, DRESSCODE[category]),
            "pose": part_colours(open_image(path["pose"])).resize(picture.size, Image.Resampling.NEAREST),
            "cloth": open_image(path["cloth"]),
            "sketch": open_image(path["sketch"], "L"),
            "text": ", ".join(self.captions[cloth.split("_")[0]]),
        }

    def paths(self, category: str, person: str, cloth: str) -> dict[str, str]:
        """Where an item's files are, relative to the root."""
        number = person.removesuffix("_0")
        sketch = cloth if self.sketches == "im_sketch" else f"{person}_{cloth}"
        names = {
            "person": f"images/{person}.jpg",
            "labels": f"label_maps/{number}_4.png",
            "joints": f"keypoints/{number}_2.json",
            "pose": f"dense/{number}_5.png",
            "cloth": f"images/{cloth}.jpg",
            "sketch": f"{self.sketches}/{sketch}.png",
        }
        return {key: f"{category}/{name}" for key, name in names.items()}

    def missing(self) -> list[str]:
        """Of each pair that lacks a file, the first that is not there, relative to the root; and the `uncaptioned`."""
        told = [f"a caption of {cloth}" for cloth in self.uncaptioned]
        return [*absent(self.root, (self.paths(*row).values() for row in self.rows)), *told]


def part_colours(dense: Image.Image) -> Image.Image:
    """RGB: a picture of bare part numbers, which is almost black, gets a colour for each; another stays as it is."""
    values = np.asarray(dense)
    if values.max() > PARTS:
        return dense
    return Image.fromarray((PART_COLOURS[values[..., 0]] * 255).round().astype(np.uint8))


def read_joints(file: Path) -> np.ndarray:
    """(18,4): x, y in pixels of 384x512, confidence, index; unknown ones below 0. Raises UserError if it is not so."""
    found = read_json(file)
    return check_joints(file, found.get("keypoints") if isinstance(found, dict) else None)
