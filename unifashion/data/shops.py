"""ToyFashion's shops: FashionGen's HDF5 files, and Fashion-IQ's pictures and triplets with the captions of Fashion-IQ-Cap.

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
from unifashion.data.modifications import modification
from unifashion.data.texts import choose, detailed, professional
from unifashion.data.toy_dresscode import write_dresscode
from unifashion.data.world import ATTRIBUTES, SPLITS, sample_garment, stream

# FashionGen's category and subcategory: one of each, so that test has the 101 products of one subcategory that
# retrieval among 100 others takes.
SHOP_CATEGORIES = {
    "t-shirt": ("TOPS", "T-SHIRTS"),
    "shirt": ("TOPS", "BLOUSES"),
    "sweater": ("SWEATERS", "PULLOVERS"),
    "jacket": ("JACKETS & COATS", "BLAZERS"),
    "dress": ("DRESSES", "DRESSES"),
}


# The stream of a shop's own training garments, and how many times as many as the world's they are.
OWN = {"fashiongen": (5, 2), "fashioniq": (6, 4)}


def garments_of(shop: str, settings: dict, rows: dict[str, list[dict]]) -> dict[str, list[Garment]]:
    """What a shop has, by split: in val and test the world's own garments, in train others."""
    purpose, times = OWN[shop]
    garments = {split: [Garment(**row["garment"]) for row in rows[split]] for split in SPLITS}
    n = times * len(rows["train"])
    own = [sample_garment(stream(settings["seed"], "train", i, purpose), "train") for i in range(n)]
    return garments | {"train": own}


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


def write_fashiongen(folder: Path, settings: dict, rows: dict[str, list[dict]], draw: Callable) -> None:
    """FashionGen's files in `folder`, three consecutive rows a garment. Raises UserError if h5py is not installed."""
    h5py, garments = need_h5py(), garments_of("fashiongen", settings, rows)
    number = 90_000_000
    shown = [
        (g, view, settings["size"]) for own in map(garments.get, SPLITS) for g in own for view in range(3)
    ]
    views = draw(square, shown)
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
            for i in range(len(pictures)):
                pictures[i] = np.asarray(next(views))


KINDS = ("dress", "shirt", "toptee")  # Fashion-IQ's categories
TRIPLETS = 16_000  # of training at most
# Of the triplets; the others ask for two. With more changes, the text alone would find most targets.
ONE_CHANGE = 1 / 3


def kind_of(g: Garment) -> str:
    return g.category if g.category in KINDS else "toptee"


def references(seed: int, split: str, garments: list[Garment]) -> list[int | None]:
    """For each garment the index of another, of its kind, beside which it can be described: it looks much alike, not wholly.

    One attribute differs, or two, else as few as there are: then neither the reference nor the text alone tells the target.
    None where there is nothing else of the kind. In train only the first 16,000 get one.
    """
    if not garments:
        return []
    looks = np.array([[ATTRIBUTES[name].index(value) for name, value in vars(g).items()] for g in garments])
    names = list(Garment.__dataclass_fields__)
    second, plain = names.index("second"), ATTRIBUTES["pattern"].index("plain")
    kinds = np.array([kind_of(g) for g in garments])
    members = {kind: np.flatnonzero(kinds == kind) for kind in KINDS}
    found: list[int | None] = []
    for i in range(min(len(garments), TRIPLETS if split == "train" else len(garments))):
        rng = stream(seed, split, i, 7)
        same = members[kinds[i]]
        other = looks[same] != looks[i]
        other[:, second] &= looks[i, names.index("pattern")] != plain  # else it is not to be seen
        count = other.sum(1)
        wanted = 1 if rng.random() < ONE_CHANGE else 2
        if not (count == wanted).any():
            wanted = count[count > 0].min(initial=len(names))
        near = same[count == wanted]
        found.append(int(near[int(rng.integers(len(near)))]) if len(near) else None)
    return found


def write_triplets(folder: Path, settings: dict, rows: dict[str, list[dict]], draw: Callable) -> None:
    """Fashion-IQ's captions in `folder`: of each picture as target, beside a reference, by two annotators.

    The split test has targets, which the original keeps to itself.
    """
    garments, seed, first = garments_of("fashioniq", settings, rows), settings["seed"], 0
    for split in SPLITS:
        triplets: dict[str, list[dict]] = {kind: [] for kind in KINDS}
        for i, j in enumerate(references(seed, split, garments[split])):
            if j is None:
                continue
            reference, target = garments[split][j], garments[split][i]
            captions = modification(reference, target, stream(seed, split, i, 8))
            names = {"target": f"B0{first + i:08d}", "candidate": f"B0{first + j:08d}"}
            triplets[kind_of(target)].append(names | {"captions": captions})
        first += len(garments[split])
        for kind, items in triplets.items():
            (folder / f"cap.{kind}.{split}.json").write_text(json.dumps(items, indent=4))


def write_fashioniq(folder: Path, settings: dict, rows: dict[str, list[dict]], draw: Callable) -> None:
    """Fashion-IQ's pictures and splits in `folder`, and Fashion-IQ-Cap's captions."""
    (folder / "image_splits").mkdir()
    (folder / "images").mkdir()
    garments, number = garments_of("fashioniq", settings, rows), 0
    shown = [(g, i % 3, settings["size"]) for own in map(garments.get, SPLITS) for i, g in enumerate(own)]
    views = draw(square, shown)
    for split in SPLITS:
        captions: dict[str, list[dict]] = {kind: [] for kind in KINDS}
        for i, g in enumerate(garments[split]):
            text = "\n" + detailed(g, stream(settings["seed"], split, i, 4))
            captions[kind_of(g)].append({"image": f"B0{number:08d}", "caption": text, "text_guidance": ""})
            next(views).save(folder / "images" / f"B0{number:08d}.png")
            number += 1
        for kind, items in captions.items():
            names = [item["image"] for item in items]
            (folder / "image_splits" / f"split.{kind}.{split}.json").write_text(json.dumps(names, indent=4))
            (folder / f"next_llava.{split}.{kind}.caption.json").write_text(json.dumps(items, indent=4))


# Folders of a world that may be missing, and who writes them: those within another come after it.
PARTS: dict[str, Callable] = {
    "fashiongen": write_fashiongen,
    "fashioniq": write_fashioniq,
    "fashioniq/captions": write_triplets,
    "dresscode": write_dresscode,
}
SLAB = 1024  # pictures asked for at a time


def drawn(pool: Executor, work: Callable, jobs: Iterable[tuple]) -> Iterator:
    """`work` of each job, in their order, at most SLAB ahead of who takes them: memory stays small."""
    jobs = iter(jobs)
    while slab := list(islice(jobs, SLAB)):
        yield from pool.map(work, slab, chunksize=16)


def part(root: str | Path, name: str, quiet: bool = False, workers: int = 2) -> Path:
    """The folder `name` (the first word of a key of `PARTS`) of the world at `root`; what is missing of it is drawn.

    Of shops it shows in val and test the garments of the world, in train others. It is made under another name and renamed.
    Raises UserError if h5py is missing for fashiongen, or `root` holds no world or cannot be written to.
    """
    for path in PARTS:
        if path.split("/")[0] == name and not Path(root, path).is_dir():
            draw_part(Path(root), path, quiet, workers)
    return Path(root, name)  # the readers of others say what they lack


def draw_part(root: Path, name: str, quiet: bool, workers: int) -> None:
    if not (root / "toy.json").is_file():
        raise UserError(f"{root} holds no ToyFashion: python -m unifashion.data.toy --out {root} draws it")
    if name == "fashiongen":
        need_h5py()
    temporary = root / f"{name}.part-{os.getpid()}"
    pool = ProcessPoolExecutor(max(1, workers))

    def draw(work: Callable, jobs: list[tuple]) -> Iterator:
        with tqdm(desc=f"drawing {name}", total=len(jobs), disable=quiet) as bar:
            for picture in drawn(pool, work, jobs):
                bar.update()
                yield picture

    try:
        settings = json.loads((root / "toy.json").read_text())
        lines = {split: (root / f"attributes_{split}.jsonl").read_text().splitlines() for split in SPLITS}
        rows = {split: [json.loads(line) for line in lines[split]] for split in SPLITS}
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir()
        PARTS[name](temporary, settings, rows, draw)
        temporary.rename(root / name)
    except (OSError, ValueError) as error:
        if not (root / name).is_dir():  # else another process was faster
            raise UserError(f"{root / name} cannot be made: {error}") from None
    finally:
        pool.shutdown(cancel_futures=True)  # else what stops the writer waits for all that was asked for
        shutil.rmtree(temporary, ignore_errors=True)


def add_parts(root: Path, quiet: bool, workers: int) -> None:
    """Every part, as far as it can be drawn here: without one of them a world is of use all the same."""
    for name in dict.fromkeys(path.split("/")[0] for path in PARTS):
        try:
            part(root, name, quiet, workers)
        except UserError as error:
            print(f"ToyFashion without {name}/: {error}", file=sys.stderr)
