"""Folders of made pictures, one for each pair of person and garment: made once and kept, or found, whoever made them.

    FOLDER/paired/PERSON_CLOTH.png, unpaired/, shuffled/      persons, not pasted, of the persons' own size
    FOLDER/vae/PERSON.png                                     persons through the VAE
    FOLDER/settings.json                                      what they were made with
    FOLDER/lock                                               held while a process works here

A picture is there whole or not at all. What was stopped goes on where it was, in the same batches, and so ends with the same
pictures.
"""

import json
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TypeVar

import numpy as np
from PIL import Image
from tqdm import tqdm

from unifashion import UserError, runs
from unifashion.caption import pictures_of
from unifashion.data import read_json
from unifashion.preprocess import paste, read_image

T = TypeVar("T")
SETTINGS = "settings.json"
NAMED = 5  # of what is missing so many are told by name


@dataclass
class Found(Sequence):
    """The pictures of files, none of which is open before it is asked for."""

    files: list[Path]

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, i: int) -> Image.Image:
        return read_image(self.files[i])


@dataclass
class Pasted(Found):
    """
    The same with the persons' own pixels outside the masks, as `infer.py` pastes them.

    people  items with "person" and "mask". A picture of another size is brought to its person's (bicubic); asking for it raises
            UserError, if its ratio is more than 2 % off.
    """

    people: Sequence[dict]

    def __getitem__(self, i: int) -> Image.Image:
        item, made = self.people[i], super().__getitem__(i)
        size = item["person"].size
        if made.size != size:
            if abs(made.width * size[1] / (made.height * size[0]) - 1) > 0.02:
                raise UserError(f"{self.files[i]}: {made.size} pixels do not fit a person of {size}")
            made = made.resize(size, Image.Resampling.BICUBIC)
        person, mask = np.asarray(item["person"]), np.asarray(item["mask"])
        return Image.fromarray(paste(person, np.asarray(made), mask))


def openers(pictures: Sequence[Image.Image]) -> list[Callable[[], Image.Image]]:
    """As `eval.metrics.fid.features` takes them, to open several at a time."""
    return [partial(pictures.__getitem__, i) for i in range(len(pictures))]


# Making


def begin(folder: Path, settings: dict) -> None:
    """
    Take `folder` for pictures that are made with `settings`, be it empty or begun with the same.

    Raises UserError, having written nothing there, if it holds anything else, or another process is at work in it.
    """
    settings = json.loads(json.dumps(settings))
    file = folder / SETTINGS
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{folder} is a file: --keep wants a folder")
    if file.is_file():
        before = read_json(file)
        other = [
            f"{k} {before.get(k)}, not {settings.get(k)}"
            for k in sorted(before.keys() | settings.keys())
            if before.get(k) != settings.get(k)
        ]
        if other:
            raise UserError(
                f"{folder} was begun with {'; '.join(other)}: ask for the same, or name another --keep"
            )
    elif folder.is_dir() and {path.name for path in folder.iterdir()} - {"lock", f".{SETTINGS}.tmp"}:
        raise UserError(f"{folder} is not empty, and holds no pictures of this command: name another --keep")
    try:
        runs.lock(folder)
        if not file.is_file():
            _renamed(file, lambda new: new.write_text(json.dumps(settings, indent=1) + "\n"))
    except UserError as error:
        raise UserError(str(error).replace("--out", "--keep")) from None
    except OSError as error:
        raise UserError(f"{folder} cannot be written ({error.strerror}): name another --keep") from None


def make(
    folder: Path,
    names: list[str],
    read: Callable[[int], T],
    draw: Callable[[list[T], list[int]], list[np.ndarray]],
    batch: int,
    quiet: bool,
) -> list[Path]:
    """
    The pictures `folder/NAME.png`, those that are not there yet made now -> their paths, in the order of `names`.

    read  a picture's number -> what it is made from; in threads, while the batch before is drawn
    draw  what `read` gave for numbers, and the numbers -> pictures (h,w,3) uint8

    A batch is always of the same numbers, however often the work was stopped: floating-point sums depend on it.
    """
    folder.mkdir(exist_ok=True)
    files = [folder / f"{name}.png" for name in names]
    there = {entry.name for entry in os.scandir(folder)}
    batches = [list(range(i, min(i + batch, len(files)))) for i in range(0, len(files), batch)]
    todo = [numbers for numbers in batches if any(files[i].name not in there for i in numbers)]
    bar = tqdm(total=len(files), desc=folder.name, unit="picture", disable=quiet)
    bar.update(len(files) - sum(map(len, todo)))
    with bar, ThreadPoolExecutor() as pool:
        saving: list[Future] = []
        for numbers, inputs in _ahead(pool, todo, read):
            pictures = draw(inputs, numbers)
            for done in saving:  # of the batch before: raises what went wrong, and bounds what is in memory
                done.result()
            saving = [pool.submit(_save, x, files[i]) for i, x in zip(numbers, pictures, strict=True)]
            bar.update(len(numbers))
        for done in saving:
            done.result()
    return files


def _ahead(
    pool: ThreadPoolExecutor, todo: list[list[int]], read: Callable[[int], T]
) -> Iterator[tuple[list[int], list[T]]]:
    """Batches of numbers, each with what was read for it while the one before was worked on."""
    coming: list[Future] = []
    for k, numbers in enumerate(todo):
        now = coming or [pool.submit(read, i) for i in numbers]
        coming = [pool.submit(read, i) for i in todo[k + 1]] if k + 1 < len(todo) else []
        yield numbers, [future.result() for future in now]


def _save(picture: np.ndarray, path: Path) -> None:
    # Little compression takes a third of the time, and a tenth more room.
    _renamed(path, lambda new: Image.fromarray(picture).save(new, "PNG", compress_level=1))


def _renamed(path: Path, write: Callable[[Path], object]) -> None:
    """`write` at a temporary name, then rename: of what is killed in between a hidden file is left, and overwritten."""
    new = path.with_name(f".{path.name}.tmp")
    write(new)
    new.replace(path)


# Finding


def files_of(folder: Path, pairs: list[tuple[str, str]]) -> list[Path]:
    """
    A picture of each pair (person, cloth), in their order: PERSON_CLOTH or PERSON, of any format.

    Raises UserError, with names, if any is missing or belongs to no pair: it would be another test.
    """
    there: dict[str, Path] = {}
    twice: list[str] = []
    for path in pictures_of([folder]):
        if there.setdefault(path.stem, path) != path:
            twice.append(path.name)
    files, lacking = [], []
    for person, cloth in pairs:
        name = f"{person}_{cloth}" if f"{person}_{cloth}" in there else person
        if name in there:
            files.append(there.pop(name))
        else:
            lacking.append(f"{person}_{cloth}")
    strange = sorted([path.name for path in there.values()] + twice)
    if lacking or strange:
        told = f"{folder} holds {len(files) + len(strange)} pictures for {len(pairs)} pairs"
        told += f"; missing: {_some(lacking)}" if lacking else ""
        told += f"; of no pair: {_some(strange)}" if strange else ""
        raise UserError(told)
    return files


def _some(names: list[str]) -> str:
    more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
    return ", ".join(names[:NAMED]) + more
