"""MGD's annotations on top of VITON-HD: `captions.json` (5-digit cloth id -> 3 noun chunks) and garment sketches."""

from pathlib import Path

from unifashion import UserError
from unifashion.data import absent, read_json
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
        self.captions = read_chunks(captions)
        absent_one = next((cloth for _, cloth in self.photos.pairs if cloth[:5] not in self.captions), None)
        if absent_one:
            raise UserError(f"{captions} has no caption for cloth {absent_one}")

    def __len__(self) -> int:
        return len(self.photos)

    def __getitem__(self, index: int) -> dict:
        item = self.photos[index]
        person, cloth = item["person_id"], item["cloth_id"]
        sketch = self.photos.open(self.sketch_of(person, cloth), "L")
        return {**item, "sketch": sketch, "text": ", ".join(self.captions[cloth[:5]])}

    def sketch_of(self, person: str, cloth: str) -> str:
        """Where the sketch is, relative to the split's folder."""
        if self.in_shop:
            return f"cloth-sketch/{cloth}.png"
        return f"im_sketch/{person}.png" if self.paired else f"im_sketch_unpaired/{person}_{cloth}.png"

    def missing(self) -> list[str]:
        """The pictures that the pairs name and that are not there, relative to the root: photos, then sketches."""
        split = self.photos.folder.name
        sketches = (f"{split}/{self.sketch_of(*pair)}" for pair in self.photos.pairs)
        return self.photos.missing() + absent(self.photos.root, sketches)


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
