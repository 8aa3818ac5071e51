"""A folder of pictures -> a catalogue (`catalog.py`), as `infer.py index` makes it and brings it up to date.

    a picture's stamp --known, or it is read--> its hash --known, or it is embedded into CATALOG/*.part--> its row
    the rows of all, by path, from the old catalogue and the parts --> the new catalogue

A picture is known by its content: moved or copied it is not embedded again. A file is only read if its stamp (size, times of
the last writing and of the last change, inode) is not that of the last time. *.part hold what has been embedded and is not in
the catalogue yet, so that a run that was killed goes on.

Batches always have the same size, blank pictures filling up the last: what a network makes of a picture is then the same bits
whatever it shares its batch with, so that a run that was killed, or a catalogue that grew, ends as one made at once.
"""

import fcntl
import hashlib
import json
import os
import stat
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from unifashion import UserError
from unifashion.caption import PICTURES, write_captions
from unifashion.catalog import EMBEDDINGS, ITEMS, LOCAL, Catalog, Stamp, check_same, naming, stamp, write
from unifashion.model import UniFashion
from unifashion.preprocess import read_image
from unifashion.search import image_embeddings, text_embeddings
from unifashion.tokenizers import SentencePiece, WordPiece, blip_caption

BATCH = 16  # pictures that are embedded at a time
READERS = 4  # threads: at full size a GPU wants more pictures than one decodes
PART, PART_ITEMS = "embeddings.part", "items.part"
OTHERWISE = "name another --out, or delete it"


class File(NamedTuple):
    path: str  # from the folder of pictures
    stamp: Stamp


# Which pictures


def pictures_under(folder: Path) -> tuple[list[File], list[str]]:
    """
    -> the pictures in a folder and in the folders within it, sorted by the bytes of their paths, and what was skipped, and why.

    Hidden files and folders are left out. Links are followed, but each real folder is looked into once, if it can be under its
    real name. Raises UserError for a folder that cannot be looked into, and for one without a picture.
    """
    if not os.path.isdir(folder):
        raise UserError(f"{folder}: {'not a folder' if os.path.exists(folder) else 'no such folder'}")
    files: list[File] = []
    skipped: list[str] = []
    known: set[tuple[int, int]] = set()
    folders, links = deque([""]), deque()
    while folders or links:
        inner = folders.popleft() if folders else links.popleft()
        try:
            status = os.stat(folder / inner)
            if (status.st_dev, status.st_ino) in known:
                continue
            known.add((status.st_dev, status.st_ino))
            with os.scandir(folder / inner) as found:
                entries = sorted(found, key=lambda entry: os.fsencode(entry.name))
        except OSError as error:
            if not inner:
                raise UserError(f"{folder}: {error.strerror}") from None
            skipped.append(f"{folder / inner}: {error.strerror}")
            continue
        for entry in entries:
            path = os.path.join(inner, entry.name)
            if entry.name[0] == ".":
                continue
            try:
                if entry.is_dir():
                    (links if entry.is_symlink() else folders).append(path)
                elif Path(path).suffix.lower() in PICTURES:
                    status = entry.stat()
                    if stat.S_ISREG(status.st_mode):
                        files.append(File(path, stamp(status)))
                    else:
                        skipped.append(f"{folder / path}: not a file")
            except OSError as error:  # a link to nothing, to itself, or into a folder that is forbidden
                skipped.append(f"{folder / path}: {error.strerror}")
    if not files:
        raise UserError("; ".join([f"{folder}: no pictures in it", *skipped[:3]]))
    return sorted(files, key=lambda file: os.fsencode(file.path)), skipped


# What the model says of them


@torch.no_grad()
def embed(
    model: UniFashion, pictures: list[Tensor], words: WordPiece, llm: SentencePiece | None, style: str
) -> tuple[np.ndarray, list[str]]:
    """
    pictures  each (3,224,224), from `preprocess.qformer_image`, `BATCH` at most
    llm       the tokenizer of a model that writes, for captions in the manner of `style`
    -> their records (b,32*256), or with captions (b,33*256), float16, and their captions

    Raises UserError for numbers that are not finite.
    """
    n = len(pictures)
    pictures = pictures + [torch.zeros_like(pictures[0])] * (BATCH - n)
    vectors = image_embeddings(model, torch.stack(pictures).to(model.device)).flatten(1)
    captions = []
    if llm is not None:
        captions = [one.text for one in write_captions(model, llm, pictures, style)]
        ids, mask = words.encode([blip_caption(text) for text in captions], model.cfg.qformer.max_text)
        texts = text_embeddings(model, ids.to(model.device), mask.to(model.device))
        vectors = torch.cat([vectors, texts], 1)
    if not vectors.isfinite().all():
        raise UserError("the numbers overflow: a file of weights is damaged")
    return vectors[:n].half().cpu().numpy(), captions[:n]


# What has been embedded and is not in the catalogue yet


class Part:
    """embeddings.part, a record a picture, and items.part: a line that says by what, then one a picture."""

    def __init__(self, folder: Path, about: dict[str, str], numbers: int) -> None:
        self.vectors, self.lines = folder / PART, folder / PART_ITEMS
        self.about, self.numbers, self.whole = about, numbers, 0
        self.items: list[dict] = []
        data = self.lines.read_bytes() if self.lines.is_file() else b""
        lines = data.split(b"\n")[:-1]  # without what a kill cut short
        try:
            begun_with, *items = map(json.loads, lines) if lines else [about]
            texts = ["path", "sha256"] + ["caption"] * bool(begun_with["captions"])
            kinds = dict.fromkeys(texts, str) | {"stamp": list}
            if not all(isinstance(item[k], kind) for item in items for k, kind in kinds.items()):
                raise ValueError
        except (ValueError, KeyError, TypeError, RecursionError):
            raise UserError(f"{self.lines} is damaged: delete {folder} and index anew") from None
        check_same(folder, begun_with, about, OTHERWISE)
        # A record is on the disk before its line is written.
        there = self.vectors.stat().st_size // (2 * numbers) if self.vectors.is_file() else 0
        self.items = items[:there]
        self.whole = sum(len(line) + 1 for line in lines[: len(self.items) + 1])

    def __len__(self) -> int:
        return len(self.items)

    def add(self, records: np.ndarray, items: list[dict]) -> None:
        with open(self.vectors, "ab") as file:
            file.truncate(len(self) * 2 * self.numbers)
            file.write(records.tobytes())
            file.flush()
            os.fsync(file.fileno())
        lines = [] if self.whole else [self.about]
        data = b"".join(json.dumps(x).encode() + b"\n" for x in lines + items)
        with open(self.lines, "ab") as file:
            file.truncate(self.whole)
            file.write(data)
        self.whole += len(data)
        self.items += items

    def records(self) -> np.ndarray:
        """(m,numbers), in the file."""
        if not self.items:
            return np.empty((0, self.numbers), np.float16)
        return np.memmap(self.vectors, np.float16, "r", shape=(len(self), self.numbers))

    def remove(self) -> None:
        self.lines.unlink(missing_ok=True)
        self.vectors.unlink(missing_ok=True)


# All together


def check_out(out: Path) -> None:
    """Raise UserError unless a catalogue can be at `out`: worth asking before a model is loaded."""
    with naming(out, "written"):
        names = set(os.listdir(out)) if out.exists() else set()
    if names and not names & {EMBEDDINGS, PART}:  # whose other files may have names like ours
        raise UserError(f"{out} is a folder of other things: --out wants a catalogue, or a name that is free")
    there = out if out.exists() else out.absolute().parent
    if not there.is_dir() or not os.access(there, os.W_OK):
        raise UserError(f"{out} cannot be written: --out wants a name in a folder that exists")


@contextmanager
def locked(out: Path) -> Iterator[None]:
    """The folder, made if need be, for this run alone; a new one in which nothing has been written is removed."""
    out.mkdir(exist_ok=True)
    folder = os.open(out, os.O_RDONLY)
    try:
        fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(folder)
        raise UserError(f"{out} is being written by another run") from None
    try:
        yield
    finally:
        if not os.listdir(out):
            out.rmdir()
        os.close(folder)


class Report(NamedTuple):
    pictures: int
    new: int  # of these, those that the old catalogue had not, or had with another content
    embedded: int
    dropped: int  # paths that the old catalogue had, and that are no more
    skipped: list[str]  # and why


Prepare = Callable[[Image.Image], Tensor]
Embed = Callable[[list[Tensor]], tuple[np.ndarray, list[str]]]


def index(
    folder: Path,
    out: Path,
    about: dict[str, str],
    shape: tuple[int, int],
    prepare: Prepare,
    embed_batch: Embed,
    quiet: bool = False,
) -> Report:
    """
    The catalogue `out` of the pictures under `folder`, made or brought up to date.

    about        what it is made with: the header's metadata, but for the hashes (`Catalog`)
    shape        (q,d) of what is kept of a picture
    prepare      a photo, RGB -> the picture (3,y,x) that `embed_batch` is given
    embed_batch  `embed`, but for its first argument alone

    Raises UserError where there is no picture, and for a catalogue that was made with something else, or is damaged.
    """
    files, skipped = pictures_under(folder)
    check_out(out)
    with naming(out, "written"), locked(out):
        old = _old(out, about, quiet)
        part = Part(out, about, shape[0] * shape[1] + shape[1] * bool(about["captions"]))
        begun, items = len(part), []
        before = {item["path"]: item for item in old.items()} if old else {}
        rows = {item["sha256"]: row for row, item in enumerate([*before.values(), *part.items])}
        known = _known(out) | {item["path"]: (item["stamp"], item["sha256"]) for item in part.items}
        batch: list[tuple[File, str, Tensor]] = []
        with (
            ThreadPoolExecutor(READERS) as pool,
            tqdm(total=len(files), desc="indexing", unit="picture", disable=quiet) as bar,
        ):
            for file, found in ahead(pool, partial(look, folder, prepare, known, rows), files, 2 * BATCH):
                bar.update()
                if isinstance(found, str):
                    skipped.append(found)
                    continue
                sha, picture = found
                items.append((file, sha))
                if sha not in rows:
                    rows[sha] = len(before) + len(part) + len(batch)
                    batch.append((file, sha, picture))
                if len(batch) == BATCH:
                    _add(part, batch, embed_batch)
            _add(part, batch, embed_batch)
        if not items:
            raise UserError("; ".join([f"{folder}: none of its pictures can be read", *skipped[:3]]))
        found = [(file.path, sha) for file, sha in items]
        if found != [(path, item["sha256"]) for path, item in before.items()]:
            _write(out, about, shape, old, part, found, [rows[sha] for _, sha in found])
        _write_local(out, folder, items)
        part.remove()
        for name in (EMBEDDINGS, ITEMS):  # of a run that was killed, whose pictures are no more
            (out / f"{name}.new").unlink(missing_ok=True)
    kept = sum(before[path]["sha256"] == sha for path, sha in found if path in before)
    dropped = len(before.keys() - dict(found).keys())
    return Report(len(found), len(found) - kept, len(part) - begun, dropped, skipped)


def look(
    folder: Path, prepare: Prepare, known: dict[str, tuple[Stamp, str]], rows: dict[str, int], file: File
) -> tuple[File, tuple[str, Tensor | None] | str]:
    """-> the file, and its hash and, if it has no row, the picture, prepared; or what is wrong with it."""
    path = folder / file.path
    before, sha = known.get(file.path, (None, ""))
    if before == file.stamp and sha in rows:
        return file, (sha, None)
    try:
        file = File(file.path, stamp(os.stat(path)))  # hours may have passed since it was listed
        with open(path, "rb") as opened:
            sha = hashlib.file_digest(opened, "sha256").hexdigest()
        picture = None if sha in rows else prepare(read_image(path))
        if stamp(os.stat(path)) != file.stamp:
            return file, f"{path}: changed while it was read"
    except UserError as error:
        return file, str(error)
    except OSError as error:
        return file, f"{path}: {error.strerror or error}"
    return file, (sha, picture)


def ahead(pool: ThreadPoolExecutor, do: Callable, todo: list, most: int) -> Iterator:
    """do(x) for each of todo, in this order, `most` of them under way at a time."""
    under_way = deque()
    for x in todo:
        under_way.append(pool.submit(do, x))
        if len(under_way) == most:
            yield under_way.popleft().result()
    while under_way:
        yield under_way.popleft().result()


def _add(part: Part, batch: list[tuple[File, str, Tensor]], embed_batch: Embed) -> None:
    """Embed the batch, if there is one, and empty it."""
    if batch:
        records, captions = embed_batch([picture for _, _, picture in batch])
        items = [{"path": file.path, "sha256": sha, "stamp": file.stamp} for file, sha, _ in batch]
        for item, caption in zip(items, captions):  # noqa: B905 - there may be none
            item["caption"] = caption
        part.add(records, items)
        batch.clear()


def _old(out: Path, about: dict[str, str], quiet: bool) -> Catalog | None:
    if not (out / EMBEDDINGS).exists():
        return None
    old = Catalog(out)
    check_same(out, old.about, about, OTHERWISE)
    old.verify(quiet)
    os.replace(old.items_file, out / ITEMS)  # if it was killed between the two renames
    return old


def _write(
    out: Path,
    about: dict[str, str],
    shape: tuple[int, int],
    old: Catalog | None,
    part: Part,
    found: list[tuple[str, str]],
    rows: list[int],
) -> None:
    """The catalogue of the (path, hash) `found`; rows: where each is, in the old catalogue, or beyond its end in the part."""
    q, d = shape
    first, records = len(old) if old else 0, part.records()
    shapes = {"images": [len(rows), q, d]}
    stores = [(old.images.flatten(1).numpy() if old else records, records[:, : q * d])]
    captions: list[str] = []
    if about["captions"]:
        shapes["captions"] = [len(rows), d]
        stores.append((old.captions.numpy() if old else records, records[:, q * d :]))
        captions = [item["caption"] for item in [*(old.items() if old else []), *part.items]]

    def pieces() -> Iterator[np.ndarray]:
        for before, new in stores:
            for start in range(0, len(rows), 1024):
                some = rows[start : start + 1024]
                yield np.stack([before[row] if row < first else new[row - first] for row in some])

    def items() -> Iterator[dict]:
        for (path, sha), row in zip(found, rows, strict=True):
            yield {"path": path, "sha256": sha} | ({"caption": captions[row]} if captions else {})

    write(out, about, shapes, pieces(), items())


def _known(out: Path) -> dict[str, tuple[Stamp, str]]:
    """{path: stamp and hash} of local.jsonl; of one that is damaged, nothing: then files are read again."""
    try:
        lines = (out / LOCAL).read_bytes().splitlines()[1:]
        return {row["path"]: (row["stamp"], row["sha256"]) for row in map(json.loads, lines)}
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return {}


def _write_local(out: Path, folder: Path, items: list[tuple[File, str]]) -> None:
    new = out / f"{LOCAL}.new"
    with open(new, "w") as file:
        there = os.path.relpath(os.path.realpath(folder), os.path.realpath(out))
        file.write(json.dumps({"images": there}) + "\n")
        for one, sha in items:
            file.write(json.dumps({"path": one.path, "stamp": one.stamp, "sha256": sha}) + "\n")
    os.replace(new, out / LOCAL)
