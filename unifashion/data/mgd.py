"""MGD's annotations on top of VITON-HD: `captions.json` (5-digit cloth id -> 3 noun chunks) and garment sketches."""

import json
from pathlib import Path

from unifashion import UserError
from unifashion.data.vitonhd import VITONHD


class MGD:
    """Items of `VITONHD` and {"sketch": L, bright edges on black, "text": the cloth's three noun chunks, ", "-joined}.

    The sketch is UniFashion's in-shop one where `{split}/cloth-sketch/` exists, else MGD's on the person:
    `im_sketch/<person>.png` when paired, `im_sketch_unpaired/<person>_<cloth>.png` otherwise.
    Raises UserError if captions or sketches are missing.
    """

    def __init__(self, root: str | Path, split: str = "train", paired: bool = True) -> None:
        self.photos, self.paired = VITONHD(root, split, paired), paired
        captions = Path(root, "captions.json")
        self.in_shop = (self.photos.folder / "cloth-sketch").is_dir()
        sketches = self.photos.folder / ("im_sketch" if paired else "im_sketch_unpaired")
        if not captions.is_file() or not (self.in_shop or sketches.is_dir()):
            raise UserError(
                f"{root} lacks MGD's annotations ({captions.name}, {split}/{sketches.name}): get the VITON-HD archive at "
                "github.com/aimagelab/multimodal-garment-designer and unpack it here, or use --data toy."
            )
        try:
            self.captions = json.loads(captions.read_text(encoding="utf-8"))
        except ValueError as error:
            raise UserError(f"{captions}: not whole JSON ({error})") from None
        absent = next((cloth for _, cloth in self.photos.pairs if cloth[:5] not in self.captions), None)
        if absent:
            raise UserError(f"{captions} has no caption for cloth {absent}")

    def __len__(self) -> int:
        return len(self.photos)

    def __getitem__(self, index: int) -> dict:
        item = self.photos[index]
        person, cloth = item["person_id"], item["cloth_id"]
        if self.in_shop:
            sketch = f"cloth-sketch/{cloth}.png"
        else:
            sketch = f"im_sketch/{person}.png" if self.paired else f"im_sketch_unpaired/{person}_{cloth}.png"
        text = ", ".join(self.captions[cloth[:5]])
        return {**item, "sketch": self.photos.open(sketch, "L"), "text": text}
