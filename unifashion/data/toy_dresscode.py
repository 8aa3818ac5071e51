"""ToyFashion's Dress Code, with MGD's annotations: tops, dresses and what is worn below, a tenth as many persons as the world has.

The layout is that of `unifashion.data.dresscode`, and `val` is as `test`. Persons and garments are its own; a garment of val or
test has a combination of attributes that training never has. Of what is worn below nothing is held out: five cuts, eight
colours. The pose is the same picture as in vitonhd/, in colours.
"""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
from PIL import Image, ImageFilter

from unifashion.data.body import Body, Person
from unifashion.data.cloth import Garment, draw_product
from unifashion.data.drawing import Canvas, binary
from unifashion.data.figure import PANTS, PARSE_COLOURS, SKIRT, draw_person, paint_legs
from unifashion.data.mgd_mask import DRESSCODE
from unifashion.data.texts import choose, chunks
from unifashion.data.world import SPLITS, sample_garment, sample_person, stream

# image-parse-v3's labels, as ToyFashion draws them -> Dress Code's
LABELS = {2: 2, 5: 4, 6: 7, 7: 4, 9: 6, 10: 11, 12: 5, 13: 11, 14: 14, 15: 15, 16: 12, 17: 13, 18: 9, 19: 10}
BOTTOM_COLOURS = ("navy", "blue", "black", "beige", "olive", "grey", "white", "brown")  # of body.TROUSERS
BOTTOM_WORDS = {
    "slim": ("slim trousers", "skinny trousers"),
    "straight": ("straight trousers", "classic trousers"),
    "wide": ("wide trousers", "wide-leg trousers"),
    "cropped": ("cropped trousers", "ankle trousers"),
    "skirt": ("straight skirt", "midi skirt"),
}


def wearer(
    seed: int, difficulty: float, split: str, category: str, number: int
) -> tuple[Person, Garment, np.random.Generator]:
    """A person, the dress or the top, and the random numbers that are left for words."""
    rng = stream(seed, split, number, 9)
    g = sample_garment(rng, split)
    while (g.category == "dress") != (category == "dresses"):
        g = sample_garment(rng, split)
    return sample_person(rng, difficulty), g, rng


def bottom_chunks(person: Person, rng: np.random.Generator) -> list[str]:
    """MGD's three noun chunks of what a person wears below."""
    colour, words = BOTTOM_COLOURS[person.bottom_colour], BOTTOM_WORDS[person.bottom]
    noun = words[0].split()[-1]
    return [f"{colour} {choose(rng, words)}", f"plain {colour} {noun}", choose(rng, words)]


def bottom_product(person: Person, size: tuple[int, int]) -> Image.Image:
    """What a person wears below, laid flat on white, in the middle."""
    canvas = Canvas(size)
    canvas.rgb[:] = 255
    paint_legs(canvas, person, Body())
    shown = np.isin(canvas.labels, (PANTS, SKIRT))
    canvas.rgb[~shown] = 255
    rows = np.flatnonzero(shown.any(1))
    canvas.rgb = np.roll(canvas.rgb, size[0] // 2 - int(rows.mean()), axis=0)
    return canvas.image()


def bottom_sketch(parse: np.ndarray) -> Image.Image:
    """The outline of what is worn below, bright on black, as far as it is seen."""
    worn = binary(np.isin(parse, (PANTS, SKIRT)))
    inner = np.asarray(worn.filter(ImageFilter.MinFilter(3)))
    return Image.fromarray(np.asarray(worn) - inner)


def dressed_in(
    person: Person, g: Garment, other: tuple[Person, Garment], category: str
) -> tuple[Person, Garment]:
    """The person in another's garment of this category."""
    if category == "lower_body":
        return replace(person, bottom=other[0].bottom, bottom_colour=other[0].bottom_colour), g
    return person, other[1]


def write_wearer(job: tuple) -> tuple[str, list[str]]:
    """Draw and write one person and the garment; returns its id and noun chunks."""
    folder, category, split, number, partner, seed, difficulty, size = job
    folder, name = Path(folder, category), f"{number:06d}"
    person, g, rng = wearer(seed, difficulty, split, category, number)
    below = category == "lower_body"
    worn = draw_person(person, g, size)
    parse = np.asarray(worn["parse"])
    worn["image"].save(folder / f"images/{name}_0.jpg", quality=97, subsampling=0)
    shot = bottom_product(person, size) if below else draw_product(g, 0, size)["image"]
    shot.save(folder / f"images/{name}_1.jpg", quality=97, subsampling=0)
    table = np.zeros(256, np.uint8)
    table[list(LABELS)] = list(LABELS.values())
    labels = Image.fromarray(table[parse], "P")
    labels.putpalette([channel for colour in PARSE_COLOURS for channel in colour])
    labels.save(folder / f"label_maps/{name}_4.png")
    joints = np.delete(worn["keypoints"], 8, axis=0)[:18] * (384 / size[1], 512 / size[0], 1)
    rows = [[*map(float, joint.round(1)), float(i)] for i, joint in enumerate(joints)]
    (folder / f"keypoints/{name}_2.json").write_text(json.dumps({"keypoints": rows}))
    worn["pose"].save(folder / f"dense/{name}_5.png")
    sketch = bottom_sketch(parse) if below else worn["sketch"]
    sketch.save(folder / f"im_sketch/{name}_1.png")
    if split != "train":
        other = wearer(seed, difficulty, split, category, partner)[:2]
        worn = draw_person(*dressed_in(person, g, other, category), size)
        sketch = bottom_sketch(np.asarray(worn["parse"])) if below else worn["sketch"]
        sketch.save(folder / f"im_sketch_unpaired/{name}_0_{partner:06d}_1.png")
    return name, bottom_chunks(person, rng) if below else chunks(g, rng)


def write_dresscode(folder: Path, settings: dict, rows: dict[str, list[dict]], draw: Callable) -> None:
    """Dress Code in `folder`."""
    for category in DRESSCODE:
        for name in ("images", "keypoints", "label_maps", "dense", "im_sketch", "im_sketch_unpaired"):
            (folder / category / name).mkdir(parents=True)
    jobs, first = [], 0
    for category in DRESSCODE:
        for split in SPLITS:
            n = max(2, len(rows[split]) // 30) if rows[split] else 0
            numbers = range(first, first + n)
            partners = [*numbers[1:], *numbers[:1]]  # everybody gets somebody else's
            pairs = {
                "paired": zip(numbers, numbers, strict=True),
                "unpaired": zip(numbers, partners, strict=True),
            }
            for order, of in pairs.items():
                lines = "".join(f"{person:06d}_0.jpg\t{cloth:06d}_1.jpg\n" for person, cloth in of)
                if split != "train":
                    (folder / category / f"{split}_pairs_{order}.txt").write_text(lines)
                elif order == "paired":
                    (folder / category / "train_pairs.txt").write_text(lines)
            own = (settings["seed"], settings["difficulty"], settings["size"])
            jobs += [
                (str(folder), category, split, i, j, *own) for i, j in zip(numbers, partners, strict=True)
            ]
            first += n
    captions = list(draw(write_wearer, jobs))
    for i, name in enumerate(("fine", "coarse")):
        some = {number: texts for number, texts in captions if int(number) % 2 == i}
        (folder / f"{name}_captions.json").write_text(json.dumps(some))
