"""ToyFashion: a drawn world of garments and persons, written in the layouts of six data sets.

    python -m unifashion.data.toy --out data/toy

Everything follows from (version, seed): the same settings give the same bytes, whatever the number of processes.
Whole combinations of (category, colour, pattern, sleeve, neckline, length) belong to one split only, so that test
garments are never seen in training. Because the world is drawn, the truth is known.

    toy.json                        version, seed, counts, difficulty, picture size
    attributes_{train,val,test}.jsonl    the truth: one row a cloth and the person who owns it
    fashion200k/                    labels/*_detect_all.txt and women/: three views a garment, a caption each
    vitonhd/                        VITON-HD, with MGD's captions.json, im_sketch/ and im_sketch_unpaired/ and
                                    UniFashion's in-shop sketches in cloth-sketch/. Ours: the split val; and in val and
                                    test, truth/<person>_<cloth>.png, the same person drawn in the other cloth, and
                                    truth-mask/ of the same name, where it shows that cloth
    fashiongen/                     FashionGen's HDF5 files: three views on a white square, title and description.
                                    Left out where h5py is not installed
    fashioniq/                      Fashion-IQ's image_splits/, images/, one view a garment on a white square, and captions/,
                                    the triplets, in test with their targets; and Fashion-IQ-Cap's captions, of all splits
    dresscode/                      Dress Code with MGD's captions and sketches: dresses, tops and what is worn below, on a
                                    tenth as many persons, of its own

In train the two shops have garments of their own, twice and four times as many as the world, as every shop has; in val
and test they show the world's, whose truth is known, in its order. Their ids are running numbers.

Worlds of version 1 that were drawn before fashiongen/, fashioniq/, its captions/ or dresscode/ existed get them from `ensure` or `part`.
"""

import json
import os
import shutil
import signal
import sys
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm import tqdm

from unifashion import Parser, UserError
from unifashion.data import read_json, read_lines
from unifashion.data.body import Person, draw_pose
from unifashion.data.cloth import PALETTE, Garment, draw_product, draw_sketch
from unifashion.data.figure import draw_person
from unifashion.data.shops import add_parts, part
from unifashion.data.texts import caption, chunks
from unifashion.data.world import (
    ATTRIBUTES,
    COMBINATION,
    DRESS_LENGTHS,
    SECOND,
    SPLITS,
    TOP_LENGTHS,
    lab,
    main_colour,
    sample_garment,
    sample_person,
    split_of,
    stream,
)  # fmt: skip

__all__ = [
    "ATTRIBUTES", "COMBINATION", "DRESS_LENGTHS", "PALETTE", "SECOND", "SPLITS", "TOP_LENGTHS", "VERSION", "Garment", "Person",
    "caption", "chunks", "draw_person", "draw_pose", "draw_product", "draw_sketch", "ensure", "lab", "main_colour", "part",
    "sample_garment", "sample_person", "split_of",
]  # fmt: skip
VERSION = 1
COUNTS = {"train": 8000, "val": 400, "test": 1000}


def item(seed: int, difficulty: float, split: str, index: int) -> tuple[Garment, Person]:
    return sample_garment(stream(seed, split, index, 0), split), sample_person(
        stream(seed, split, index, 1), difficulty
    )


def product_path(g: Garment, cloth: str) -> str:
    kind = {"jacket": "jackets/casual_jackets", "dress": "dresses/casual_dresses"}.get(
        g.category, f"tops/{g.category}s"
    )
    return f"women/{kind}/{90000000 + int(cloth)}"


def label_file(g: Garment, split: str) -> str:
    kind = g.category if g.category in ("jacket", "dress") else "top"
    return f"{kind}_{split}_detect_all.txt"


def save(image: Image.Image, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path, **({"quality": 97, "subsampling": 0} if path.suffix in (".jpg", ".jpeg") else {}))


def write_item(job: tuple) -> dict:
    """Draw and write one cloth and the person who owns it; returns its row of `attributes_<split>.jsonl`."""
    root, seed, difficulty, split, index, number, other_index, other_number, size = job
    g, person = item(seed, difficulty, split, index)
    name = f"{number:05d}_00"
    text = stream(seed, split, index, 2)
    product = product_path(g, f"{number:05d}")
    captions = [caption(g, text) for _ in range(3)]
    viton = Path(root, "vitonhd", split)
    for view in range(3):
        shot = draw_product(g, view, size)
        save(shot["image"], Path(root, "fashion200k", product, f"{Path(product).name}_{view}.jpeg"))
        if view == 0:
            save(shot["image"], viton / "cloth" / f"{name}.jpg")
            save(shot["mask"], viton / "cloth-mask" / f"{name}.jpg")
    save(draw_sketch(g, size), viton / "cloth-sketch" / f"{name}.png")
    worn = draw_person(person, g, size)
    save(worn["image"], viton / "image" / f"{name}.jpg")
    save(worn["agnostic"], viton / "agnostic-v3.2" / f"{name}.jpg")
    save(worn["mask"], viton / "agnostic-mask" / f"{name}_mask.png")
    save(worn["pose"], viton / "image-densepose" / f"{name}.jpg")
    save(worn["parse"], viton / "image-parse-v3" / f"{name}.png")
    save(worn["sketch"], viton / "im_sketch" / f"{name}.png")
    body = {"person_id": [-1], "pose_keypoints_2d": [round(float(x), 3) for x in worn["keypoints"].ravel()]}
    for limb in ("face", "hand_left", "hand_right"):
        body[f"{limb}_keypoints_2d"] = []
    path = viton / "openpose_json" / f"{name}_keypoints.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"version": 1.3, "people": [body]}))
    other = f"{other_number:05d}_00"
    if split != "train":  # the true answer of unpaired try-on
        answer = draw_person(person, item(seed, difficulty, split, other_index)[0], size)
        save(answer["image"], viton / "truth" / f"{name}_{other}.png")
        save(answer["garment"], viton / "truth-mask" / f"{name}_{other}.png")
        save(answer["sketch"], viton / "im_sketch_unpaired" / f"{name}_{other}.png")
    return {
        "id": name,
        "unpaired_cloth": other,
        "product": product,
        "label_file": label_file(g, split),
        "captions": captions,
        "chunks": chunks(g, text),
        "garment": asdict(g),
        "person": asdict(person),
    }


def jobs_of(root: Path, seed: int, difficulty: float, counts: dict, size: tuple[int, int]) -> list[tuple]:
    """One job an item, over all splits; cloth numbers are unique over the splits, as in VITON-HD."""
    jobs, start = [], 0
    for split in SPLITS:
        count = counts[split]
        partner = np.arange(count)
        if split != "train":  # one big cycle: everybody gets somebody else's cloth
            order = np.random.default_rng([seed, SPLITS.index(split)]).permutation(count)
            partner[order] = np.roll(order, 1)
        for i in range(count):
            j = int(partner[i])
            jobs.append((str(root), seed, difficulty, split, i, start + i, j, start + j, size))
        start += count
    return jobs


def write_tables(root: Path, rows: dict[str, list[dict]]) -> None:
    """Pair lists, labels, MGD's captions and the attributes, from the rows of `write_item`."""
    labels: dict[str, list[str]] = {
        f"{k}_{s}_detect_all.txt": [] for k in ("top", "jacket", "dress") for s in SPLITS
    }
    for split, items in rows.items():
        pairs = [f"{row['id']}.jpg {row['unpaired_cloth']}.jpg\n" for row in items]
        (root / "vitonhd" / f"{split}_pairs.txt").write_text("".join(pairs))
        (root / f"attributes_{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in items))
        for row in items:
            path = f"{row['product']}/{Path(row['product']).name}"
            labels[row["label_file"]] += [f"{path}_{v}.jpeg\t0.99\t{row['captions'][v]}\n" for v in range(3)]
    (root / "fashion200k" / "labels").mkdir(parents=True, exist_ok=True)
    for name, lines in labels.items():
        (root / "fashion200k" / "labels" / name).write_text("".join(lines))
    captions = {row["id"][:5]: row["chunks"] for items in rows.values() for row in items}
    (root / "vitonhd" / "captions.json").write_text(json.dumps(captions))


def read_rows(root: Path, split: str) -> list[dict]:
    """The truth of a split, a row a cloth and the person who owns it. Raises UserError if it cannot be read."""
    path, rows = root / f"attributes_{split}.jsonl", []
    for i, line in read_lines(path):
        try:
            rows.append(json.loads(line))
        except ValueError as error:
            raise UserError(f"{path}: line {i} is not whole JSON ({error})") from None
    return rows


def ensure(
    root: str | Path,
    seed: int = 0,
    difficulty: float = 1.0,
    train: int = COUNTS["train"],
    val: int = COUNTS["val"],
    test: int = COUNTS["test"],
    size: tuple[int, int] = (128, 96),
    workers: int = 2,
    quiet: bool = False,
) -> Path:
    """Draw the world under `root` unless it is there already; returns `root`.

    It is drawn beside `root` and renamed at the end, so a folder with this name is always complete. Only what is in
    `shops.PARTS` may be missing: that is added where it can be, else a note on stderr says why not.
    Raises UserError if `root` holds a world of other settings, or something else.
    """
    root = Path(root).resolve()
    if root.exists() and not root.is_dir():
        raise UserError(f"{root} is a file: ToyFashion wants a folder")
    counts = {"train": train, "val": val, "test": test}
    settings = {"version": VERSION, "seed": seed, "difficulty": difficulty, "counts": counts}
    settings["size"] = list(size)
    if (root / "toy.json").is_file():
        found = read_json(root / "toy.json")
        if found == settings:
            add_parts(root, quiet, workers)
            return root
        raise UserError(
            f"{root} holds a ToyFashion of other settings ({found}, wanted {settings}): name another folder."
        )
    if root.exists() and any(root.iterdir()):
        raise UserError(f"{root} exists and is not a ToyFashion folder; name another folder.")
    if 1 in (val, test) or min(counts.values()) < 0:
        raise UserError("--val and --test need 2 items or more: everybody is paired with another's cloth.")
    if seed < 0:
        raise UserError(f"--seed is {seed}, must be 0 or more")
    if max(counts.values()) > 99_999:
        raise UserError("a split of more than 99999 items: MGD's captions go by five digits")
    temporary = root.with_name(f"{root.name}.part-{os.getpid()}")
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        (temporary / "vitonhd").mkdir(parents=True)
    except OSError as error:
        raise UserError(f"{root} cannot be made: {error}") from None
    jobs = jobs_of(temporary, seed, difficulty, counts, size)
    rows: dict[str, list[dict]] = {split: [] for split in SPLITS}
    try:
        with ProcessPoolExecutor(max(1, workers)) as pool:
            try:
                results = pool.map(write_item, jobs, chunksize=16)
                results = tqdm(results, "drawing ToyFashion", len(jobs), disable=quiet)
                for job, row in zip(jobs, results, strict=True):
                    rows[job[3]].append(row)
            except BaseException:
                pool.shutdown(cancel_futures=True)
                raise
        write_tables(temporary, rows)
        (temporary / "toy.json").write_text(json.dumps(settings))
        add_parts(temporary, quiet, workers)
        try:
            if root.exists():
                root.rmdir()
            temporary.rename(root)
        except OSError:  # another process was faster, as under torchrun
            if not (root / "toy.json").is_file():
                raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return root


def main() -> None:
    parser = Parser(
        description="Draw ToyFashion in the layouts of Fashion200K, VITON-HD, MGD, FashionGen, Fashion-IQ and Dress Code."
    )
    parser.add_argument("--out", default="data/toy", help="folder to write")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--difficulty", type=float, default=1.0, help="pose variation; 1.0 is version 1")
    for split, count in COUNTS.items():
        parser.add_argument(
            f"--{split}", type=int, default=count, help=f"garments and persons in {split} ({count})"
        )
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--quiet", action="store_true", help="no progress bar")
    try:
        args = vars(parser.parse_args())
        print(f"ToyFashion version {VERSION} is in {ensure(args.pop('out'), **args)}")
    except (UserError, OSError) as error:  # a full disk
        print("unifashion.data.toy:", " ".join(str(error).splitlines()), file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        sys.exit(130)


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # as Ctrl-C: what was drawn so far is removed
    main()
