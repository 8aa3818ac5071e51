"""ToyFashion's shops: FashionGen's HDF5 files, and Fashion-IQ's pictures with the captions of Fashion-IQ-Cap.

In train they have garments of their own, twice and four times as many as the world, as every shop has; in val and test they
show the world's, whose truth is known.
"""

import json
import os
import shutil
import sys
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Executor, ProcessPoolExecutor
from itertools import islice
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps
from tqdm import tqdm

from unifashion import UserError
from unifashion.data.cloth import Garment, draw_product
from unifashion.data.fashiongen import need_h5py
from unifashion.data.texts import choose, detailed, professional
from unifashion.data.world import SPLITS, sample_garment, stream

# FashionGen's category and subcategory: one of each, so that test has the 101 products of one subcategory that
# retrieval among 100 others takes.
SHOP_CATEGORIES = {
    "t-shirt": ("TOPS", "T-SHIRTS"),
    "shirt": ("TOPS", "BLOUSES"),
    "sweater": ("SWEATERS", "PULLOVERS"),
    "jacket": ("JACKETS & COATS", "BLAZERS"),
    "dress": ("DRESSES", "DRESSES"),
}


def garments_of(
    seed: int, rows: dict[str, list[dict]], split: str, purpose: int, times: int
) -> list[Garment]:
    """The garments of a part: in val and test the world's own; in train others, `times` as many, of `purpose`'s stream."""
    if split != "train":
        return [Garment(**row["garment"]) for row in rows[split]]
    n = times * len(rows["train"])
    return [sample_garment(stream(seed, "train", i, purpose), "train") for i in range(n)]


def square(job: tuple[Garment, int, tuple[int, int]]) -> Image.Image:
    """A view of a garment, centred on a white square."""
    shot = draw_product(*job)["image"]
    return ImageOps.pad(shot, (max(shot.size), max(shot.size)), color="white")


def shop_entry(g: Garment, number: int, rng: np.random.Generator) -> dict:
    """What FashionGen's row says of a garment, whatever the view."""
    title, description = professional(g, rng)
    category, subcategory = SHOP_CATEGORIES[g.category]
    return {
        "brand": choose(rng, ("Toy Atelier", "Maison Pillow", "Studio Seed")),
        "category": category,
        "composition": choose(rng, ("100% cotton.", "100% wool.", "55% linen, 45% cotton.")),
        "concat_description": f"{title} {description}",
        "department": "CLOTHING",
        "description": description,
        "gender": "Women",
        "msrpUSD": np.float32(rng.integers(50, 900)),
        "name": title,
        "productID": np.int32(number),
        "season": choose(rng, ("SS2016", "FW2016", "SS2017", "FW2017")),
        "subcategory": subcategory,
    }


def write_fashiongen(
    folder: Path, settings: dict, garments: dict[str, list[Garment]], draw: Callable
) -> None:
    """FashionGen's files in `folder`, three consecutive rows a garment. Raises UserError if h5py is not installed."""
    h5py = need_h5py()
    number = 90_000_000
    for split, name in zip(SPLITS, ("train", "validation", "test"), strict=True):
        if not garments[split]:
            continue
        entries = [
            shop_entry(g, number + i, stream(settings["seed"], split, i, 3))
            for i, g in enumerate(garments[split])
        ]
        number += len(entries)
        columns = {f"input_{key}": [e[key] for e in entries for _ in range(3)] for key in entries[0]}
        columns["input_pose"] = [f"id_gridfs_{view + 1}" for _ in entries for view in range(3)]
        columns["index"] = columns["index_2"] = list(range(3 * len(entries)))
        side = max(settings["size"])
        with h5py.File(folder / f"fashiongen_256_256_{name}.h5", "w") as file:
            for key, column in columns.items():
                if isinstance(column[0], str):
                    column = [text.encode("iso-8859-1") for text in column]
                file.create_dataset(key, data=np.array(column)[:, None], track_times=False)
            pictures = file.create_dataset(
                "input_image",
                (3 * len(entries), side, side, 3),
                np.uint8,
                chunks=(1, side, side, 3),
                compression="gzip",
                compression_opts=1,
                track_times=False,
            )
            for i, picture in enumerate(draw((g, view) for g in garments[split] for view in range(3))):
                pictures[i] = np.asarray(picture)


def write_fashioniq(folder: Path, settings: dict, garments: dict[str, list[Garment]], draw: Callable) -> None:
    """Fashion-IQ's pictures and splits in `folder`, and Fashion-IQ-Cap's captions."""
    (folder / "image_splits").mkdir()
    (folder / "images").mkdir()
    number = 0
    for split in SPLITS:
        captions: dict[str, list[dict]] = {"dress": [], "shirt": [], "toptee": []}
        views = draw((g, i % 3) for i, g in enumerate(garments[split]))
        for i, (g, picture) in enumerate(zip(garments[split], views, strict=True)):
            text = "\n" + detailed(g, stream(settings["seed"], split, i, 4))
            kind = g.category if g.category in captions else "toptee"
            captions[kind].append({"image": f"B0{number:08d}", "caption": text, "text_guidance": ""})
            picture.save(folder / "images" / f"B0{number:08d}.png")
            number += 1
        for kind, items in captions.items():
            names = [item["image"] for item in items]
            (folder / "image_splits" / f"split.{kind}.{split}.json").write_text(json.dumps(names, indent=4))
            (folder / f"next_llava.{split}.{kind}.caption.json").write_text(json.dumps(items, indent=4))


# Writer, pictures a garment, the stream of its training garments, and how many times as many as the world's own.
PARTS = {"fashiongen": (write_fashiongen, 3, 5, 2), "fashioniq": (write_fashioniq, 1, 6, 4)}
SLAB = 1024  # pictures asked for at a time


def drawn(
    pool: Executor, views: Iterable[tuple[Garment, int]], size: tuple[int, int]
) -> Iterator[Image.Image]:
    """`square` of each (garment, view), in their order, at most SLAB ahead of who takes them: memory stays small."""
    jobs = ((g, view, size) for g, view in views)
    while slab := list(islice(jobs, SLAB)):
        yield from pool.map(square, slab, chunksize=16)


def part(root: str | Path, name: str, quiet: bool = False, workers: int = 2) -> Path:
    """The folder `name` ("fashiongen" or "fashioniq") of the world at `root`; if it is missing, it is drawn.

    In val and test it shows the garments of the world, in train others. It is made under another name and renamed.
    Raises UserError if h5py is missing for fashiongen, or `root` holds no world or cannot be written to.
    """
    root = Path(root)
    if (root / name).is_dir() or name not in PARTS:  # the readers of the others say what they lack
        return root / name
    if not (root / "toy.json").is_file():
        raise UserError(f"{root} holds no ToyFashion: python -m unifashion.data.toy --out {root} draws it")
    if name == "fashiongen":
        need_h5py()
    temporary = root / f"{name}.part-{os.getpid()}"
    pool = ProcessPoolExecutor(max(1, workers))
    try:
        settings = json.loads((root / "toy.json").read_text())
        lines = {split: (root / f"attributes_{split}.jsonl").read_text().splitlines() for split in SPLITS}
        rows = {split: [json.loads(line) for line in lines[split]] for split in SPLITS}
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir()
        write, views, purpose, times = PARTS[name]
        garments = {s: garments_of(settings["seed"], rows, s, purpose, times) for s in SPLITS}
        total = views * sum(map(len, garments.values()))
        with tqdm(desc=f"drawing {name}", total=total, disable=quiet) as bar:

            def draw(shown: Iterable[tuple[Garment, int]]) -> Iterator[Image.Image]:
                for picture in drawn(pool, shown, settings["size"]):
                    bar.update()
                    yield picture

            write(temporary, settings, garments, draw)
        temporary.rename(root / name)
    except (OSError, ValueError) as error:
        if not (root / name).is_dir():  # else another process was faster
            raise UserError(f"{root / name} cannot be made: {error}") from None
    finally:
        pool.shutdown(cancel_futures=True)  # else what stops the writer waits for all that was asked for
        shutil.rmtree(temporary, ignore_errors=True)
    return root / name


def add_parts(root: Path, quiet: bool, workers: int) -> None:
    """Both parts, as far as they can be drawn here: without one of them a world is of use all the same."""
    for name in PARTS:
        try:
            part(root, name, quiet, workers)
        except UserError as error:
            print(f"ToyFashion without {name}/: {error}", file=sys.stderr)
