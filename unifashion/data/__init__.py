"""Datasets, each in its original on-disk format: one file per dataset."""

import json
import os
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

from PIL import Image

from unifashion import UserError


def open_image(path: Path, mode: str = "RGB") -> Image.Image:
    """A picture of a data set. Raises UserError, with its path, if it is missing or damaged."""
    try:
        with Image.open(path) as image:
            return image.convert(mode)
    except Exception as error:  # a damaged file can make a decoder raise almost anything
        raise UserError(f"{path}: cannot be read as an image ({error})") from None


def read_json(path: Path):
    """What a JSON file holds. Raises UserError if it is cut short, not JSON, or names a key twice in one object."""

    def once(pairs: list[tuple]) -> dict:
        refuse_repeated(path, (key for key, _ in pairs))
        return dict(pairs)

    try:
        return json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=once)
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: not whole JSON ({error})") from None


def read_lines(path: Path) -> list[tuple[int, str]]:
    """The lines of a text file that have something, with their numbers. Raises UserError if it cannot be read or is not UTF-8."""
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
        return [(i, line) for i, line in enumerate(lines, 1) if line.strip()]
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None
    except ValueError as error:
        raise UserError(f"{path}: not text in UTF-8 ({error})") from None


def refuse_repeated(path: Path, ids: Iterable) -> None:
    """Raises UserError if `path`, from which the ids are, has one of them twice."""
    repeated = [name for name, count in Counter(ids).items() if count > 1]
    if repeated:
        more = f", and {len(repeated) - 1} more" if len(repeated) > 1 else ""
        raise UserError(f"{path}: {repeated[0]} is there twice{more}")


def absent(root: Path, rows: Iterable[Iterable[str]], endings: tuple[str, ...] = ("",)) -> list[str]:
    """
    For each of `rows` that lacks a file, the first that it lacks, with the first ending.

    rows  the paths of an item's files, relative to `root`; each may have any of `endings`

    Each folder is listed once: to ask for 300,000 files one by one takes minutes on a network's disk.
    """
    listed: dict[str, set[str]] = {}

    def is_there(path: str) -> bool:
        folder, _, name = path.rpartition("/")
        if folder not in listed:
            try:
                with os.scandir(root / folder) as entries:
                    listed[folder] = {entry.name for entry in entries if entry.is_file()}
            except (FileNotFoundError, NotADirectoryError):
                listed[folder] = set()
        return any(name + ending in listed[folder] for ending in endings)

    firsts = (next((path for path in row if not is_there(path)), None) for row in rows)
    return [path + endings[0] for path in firsts if path is not None]
