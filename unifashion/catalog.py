"""A catalogue of pictures that can be searched: its files, how they are read, and how new ones take their place.

    CATALOG/embeddings.safetensors   images (n,32,256) and, of one with captions, captions (n,256): unit vectors, float16
            items.jsonl              a line each, in the same order: {"path", "sha256"} and, of one with captions, "caption"
            local.jsonl              what holds on this machine: where the pictures lie, and the stamps of their files
            checked.json             the stamp of an embeddings.safetensors that search has found undamaged

The first two are the catalogue. They depend on the pictures and the model alone, bit for bit. Paths are from the folder of
pictures, sorted by their bytes; what of a name is not UTF-8 is kept as Python keeps it, a lone surrogate ("\\udcff"), so that
`os.fsencode(json.loads(line)["path"])` are the bytes of the name. The other two only save work, and may be deleted.

The header's metadata name what made it and hold two hashes: of items.jsonl, and of itself and all that follows. So the two
files belong together or are refused. Both are written under other names, then renamed, embeddings first: between the two
renames the items that belong to them lie in items.jsonl.new, where they are found.

float16: half the disk, and on CPUs a search in half the time. Of the tiny model's 1,500 garments of ToyFashion it changes scores
by 4e-5 (root mean square; at most 2e-4), and no recall and no first place.
"""

import hashlib
import json
import math
import os
import struct
import warnings
from array import array
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from unifashion import UserError
from unifashion.preprocess import read_image, save_png
from unifashion.search import best
from unifashion.sheets import found_sheet, shrunk

VERSION = "1"
EMBEDDINGS, ITEMS, LOCAL, CHECKED = "embeddings.safetensors", "items.jsonl", "local.jsonl", "checked.json"
UNKNOWN = "0" * 64  # in place of the hash, where that is computed
SHOWN = 100  # pictures on a sheet, at most
Stamp = list[int]


def stamp(status: os.stat_result) -> Stamp:
    """What changes whenever a file does: who writes to one can set its time back, but not that of its last change (ctime)."""
    return [status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino]


class Catalog:
    """
    about     the header's metadata: "catalogue" (its version), "preset", "qformer sha256", "dtype", "captions" (their style or
              nothing), "captioner", "items", "sha256"
    images    (n,q,d), captions (n,d) or None: float16, not in memory but in the file (mmap)

    It stays the catalogue that was opened, whatever `write` puts in its place: both files are held, not read again by name.

    Raises UserError for a folder that is no catalogue, and for one that is cut short, or put together from two. What else
    was changed within `embeddings.safetensors`, `verify` finds.
    """

    def __init__(self, folder: Path) -> None:
        self.folder, self.file = folder, folder / EMBEDDINGS
        if not os.path.isfile(self.file):
            begun = os.path.exists(folder / "items.part")
            what = "its indexing has not come to its end" if begun else "infer.py index makes one"
            raise UserError(f"{folder} is no catalogue: there is no {EMBEDDINGS} in it; {what}")
        with naming(self.file, "read"), open(self.file, "rb") as file:
            self.stamp = stamp(os.fstat(file.fileno()))
            self.about, shapes, self.start = self._read_header(file)
            arrays = np.memmap(file, np.float16, "r", self.start)
            self.items_file, self.lines, self.starts = self._find_items()
        self.images = _tensor(arrays[: math.prod(shapes["images"])], shapes["images"])
        self.captions = None
        if "captions" in shapes:
            self.captions = _tensor(arrays[self.images.numel() :], shapes["captions"])

    def __len__(self) -> int:
        return len(self.images)

    def _read_header(self, file: BinaryIO) -> tuple[dict[str, str], dict[str, list[int]], int]:
        """-> metadata, shapes, and where the numbers start."""
        size = self.stamp[0]
        raw = file.read(8)
        raw += file.read(min(struct.unpack("<Q", raw)[0], 2**20)) if len(raw) == 8 else b""
        try:
            found = json.loads(raw[8:])
            about = found.pop("__metadata__")
            shapes = {name: found[name]["shape"] for name in found}
            if not all(type(x) is int and x >= 0 for shape in shapes.values() for x in shape):
                raise ValueError("a shape of other numbers")
            size -= len(raw) + 2 * sum(map(math.prod, shapes.values()))
            whole = raw == header(about, shapes) and size == 0 and {"items", "sha256"} <= about.keys()
            whole = whole and all(isinstance(value, str) for value in about.values())
            n, _, _ = shapes["images"]
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            about, whole = {}, False
        if about and about.get("catalogue") != VERSION:
            raise UserError(f"{self.folder} is a catalogue of another version of this program: index anew")
        if not whole:
            raise UserError(f"{self.file} is damaged, or no catalogue's: delete {self.folder} and index anew")
        if not n:
            raise UserError(f"{self.folder} is a catalogue of no pictures")
        return about, shapes, len(raw)

    def _find_items(self) -> tuple[Path, np.ndarray, array]:
        """-> the file whose lines belong to the embeddings, its bytes, and where each line starts."""
        for file in (self.folder / ITEMS, self.folder / f"{ITEMS}.new"):
            if file.is_file():
                digest, starts, at = hashlib.sha256(), array("q"), 0
                with open(file, "rb") as lines:
                    for line in lines:
                        digest.update(line)
                        starts.append(at)
                        at += len(line)
                    if digest.hexdigest() == self.about["items"]:
                        return file, np.memmap(lines, np.uint8, "r"), starts
        self._check_still_there(self.file.stat())
        there = "is not the one" if (self.folder / ITEMS).is_file() else "is missing, or not the one"
        raise UserError(
            f"{self.folder / ITEMS} {there} that was written with {EMBEDDINGS}: delete {self.folder} and index anew"
        )

    def items(self) -> Iterator[dict]:
        return map(self.item, range(len(self.starts)))

    def item(self, i: int) -> dict:
        end = self.starts[i + 1] if i + 1 < len(self.starts) else len(self.lines)
        return json.loads(self.lines[self.starts[i] : end].tobytes())

    def verify(self, quiet: bool) -> None:
        """Raise UserError if a bit of the file is not as it was written. All of it is read only if it has changed since it was last."""
        checked = self.folder / CHECKED
        try:
            if json.loads(checked.read_text()) == self.stamp:
                return
        except (OSError, ValueError, RecursionError):
            pass
        digest = hashlib.sha256(header(self.about | {"sha256": UNKNOWN}, self._shapes()))
        size = self.stamp[0]
        with (
            naming(self.file, "read"),
            open(self.file, "rb") as file,
            tqdm(
                total=size, desc="checking", unit="B", unit_scale=True, disable=quiet or size < 2**28
            ) as bar,
        ):
            self._check_still_there(os.fstat(file.fileno()))
            file.seek(self.start)
            while chunk := file.read(2**22):
                digest.update(chunk)
                bar.update(len(chunk))
        if digest.hexdigest() != self.about["sha256"]:
            raise UserError(f"{self.file} is damaged, or was edited: delete {self.folder} and index anew")
        with suppress(OSError):  # a catalogue that cannot be written to is read each time
            checked.write_text(json.dumps(self.stamp))

    def _check_still_there(self, status: os.stat_result) -> None:
        if stamp(status) != self.stamp:
            raise UserError(f"{self.folder} was brought up to date while it was read: try again")

    def _shapes(self) -> dict[str, list[int]]:
        arrays = {"images": self.images, "captions": self.captions}
        return {name: list(x.shape) for name, x in arrays.items() if x is not None}

    def pictures(self) -> Path | None:
        """The folder of the pictures, as far as is known here."""
        try:
            with open(self.folder / LOCAL) as file:
                return Path(
                    os.path.normpath(
                        os.path.realpath(self.folder) + "/" + json.loads(file.readline())["images"]
                    )
                )
        except (OSError, ValueError, KeyError, TypeError, RecursionError):
            return None

    def find(self, query: Tensor, top: int, composed: bool, device: torch.device) -> list[dict]:
        """The items nearest to a query (`search.best`), each with its rank and score; composed: the captions count, too."""
        query = query.to(self.images.dtype)  # as the pictures' are: scores are exact
        captions = self.captions if composed else None
        scores, rows = best(query, self.images, top, captions, device=device)
        return [
            {"rank": rank, "score": score, **self.item(row)}
            for rank, (score, row) in enumerate(zip(scores.tolist(), rows.tolist(), strict=True), 1)
        ]

    def save_sheet(self, text: str, picture: Image.Image | None, found: list[dict], path: Path) -> list[str]:
        """Write a PNG of what was asked for and of what `find` found -> what the user should be told of it."""
        there, shown, notes = self.pictures(), [], [f"{path} shows what was found"]
        if len(found) > SHOWN:
            notes = [f"{path} shows the first {SHOWN} of what was found"]
        for item in found[:SHOWN]:
            image = None
            try:
                if there is None:
                    raise UserError(f"{item['path']}: where the pictures lie is not known: index them again")
                # Small at once: a hundred photographs are gigabytes.
                image = shrunk(read_image(there / item["path"]))
            except UserError as error:
                notes.append(f"{error}; the sheet shows a grey box")
            shown.append((f"{item['rank']}   {item['score']:.4f}\n{item['path']}", image))
        save_png(found_sheet((f"looked for: {text}" if text else "looked for", picture), shown), path)
        return notes


def check_same(folder: Path, about: dict[str, str], wanted: dict[str, str], else_: str) -> None:
    """Raise UserError for what of `wanted` a catalogue was not made with."""
    for key, value in wanted.items():
        if about.get(key) != value:
            had, has = (x[:24] or "none" for x in (about.get(key, ""), value))
            raise UserError(f"{folder} was made with {key} {had}, not {has}: {else_}")


def _tensor(numbers: np.ndarray, shape: list[int]) -> Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that nothing may be written there: nothing is
        return torch.from_numpy(numbers.reshape(shape))


# Writing


def header(about: dict[str, str], shapes: dict[str, list[int]]) -> bytes:
    """The header of the file, https://huggingface.co/docs/safetensors: its length, and as JSON what follows it."""
    entries, end = {"__metadata__": about}, 0
    for name, shape in shapes.items():
        start, end = end, end + 2 * math.prod(shape)
        entries[name] = {"dtype": "F16", "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(entries).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text


def write(
    folder: Path,
    about: dict[str, str],
    shapes: dict[str, list[int]],
    arrays: Iterable[np.ndarray],
    items: Iterable[dict],
) -> None:
    """
    A catalogue in the place of the folder's old one: whenever it is killed, one of the two is there whole.

    arrays  all numbers, float16, in the order of `shapes`, in pieces: they need not fit into memory
    """
    new = {name: folder / f"{name}.new" for name in (EMBEDDINGS, ITEMS)}
    try:
        digest = hashlib.sha256()
        with written(new[ITEMS]) as file:
            for item in items:
                line = json.dumps(item).encode() + b"\n"
                digest.update(line)
                file.write(line)
        about = about | {"items": digest.hexdigest(), "sha256": UNKNOWN}
        digest = hashlib.sha256(header(about, shapes))
        with written(new[EMBEDDINGS]) as file:
            file.write(header(about, shapes))
            for piece in arrays:
                digest.update(piece)
                file.write(piece)
            file.seek(0)
            file.write(header(about | {"sha256": digest.hexdigest()}, shapes))
    except OSError:  # on a full disk half a catalogue would be in the way
        for file in new.values():
            file.unlink(missing_ok=True)
        raise
    for name in (EMBEDDINGS, ITEMS):
        os.replace(new[name], folder / name)


@contextmanager
def written(path: Path):
    """A new file that is on the disk when this ends."""
    with open(path, "wb") as file:
        yield file
        file.flush()
        os.fsync(file.fileno())


@contextmanager
def naming(path: Path, done: str) -> Iterator[None]:
    """A disk that is full or fails, a folder that is gone or forbidden."""
    try:
        yield
    except OSError as error:
        raise UserError(f"{path} cannot be {done}: {error.strerror or error}") from None
