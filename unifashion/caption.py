"""Pictures -> captions, as `infer.py caption` and `eval.captioning` write them, and the file that keeps them."""

import fcntl
import json
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from unifashion import UserError
from unifashion.config import UniFashionConfig
from unifashion.model import UniFashion
from unifashion.tokenizers import SentencePiece, prompt

PICTURES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff")


class Caption(NamedTuple):
    text: str
    tokens: int  # its end counted, where the model came to it
    whole: bool  # it ended by itself


@torch.no_grad()
def write_captions(
    model: UniFashion,
    words: SentencePiece,
    pictures: list[Tensor],
    style: str,
    max_tokens: int = 128,
    beams: int = 1,
) -> list[Caption]:
    """
    model     with what writes (`UniFashion(cfg, writes=True)`, `load_unifashion(..., writes=True)`)
    pictures  each (3,224,224), from `preprocess.qformer_image`
    style     a key of `tokenizers.INSTRUCTIONS`

    Raises UserError where what the Q-Former says is not finite.
    """
    before, after = (torch.tensor(ids, device=model.device) for ids in prompt(words, style))
    z, _ = model.qformer(model.see(torch.stack(pictures).to(model.device)))
    if not z.isfinite().all():
        raise UserError("the numbers overflow: a file of weights is damaged")
    ids = model.write(z, before, after.expand(len(z), -1), max_tokens, words.eos, beams)
    captions = []
    for row in ids.tolist():
        whole = words.eos in row
        end = row.index(words.eos) if whole else len(row)
        captions.append(Caption(words.decode(row[:end]).strip(), end + whole, whole))
    return captions


def check_search(
    cfg: UniFashionConfig, words: SentencePiece, style: str, max_tokens: int, beams: int
) -> None:
    """Raise UserError for a style that there is not, and for numbers that `write_captions` cannot take."""
    before, after = prompt(words, style)
    most = cfg.llama.context - len(before) - cfg.qformer.queries - len(after)
    if not 1 <= max_tokens <= most:
        raise UserError(f"--max-tokens is {max_tokens}, must be 1 to {most}: the rest is the prompt's")
    if not 1 <= beams <= 32:
        raise UserError(f"--beams is {beams}, must be 1 to 32")


def pictures_of(given: list[Path]) -> dict[Path, bool]:
    """Files, and for a folder the pictures in it, by name -> each once, in this order, and whether it was named itself.

    A folder's own folders are not looked into, nor its hidden files. Raises UserError for a folder without a picture.
    """
    pictures: dict[Path, bool] = {}
    for path in given:
        if not os.path.isdir(path):
            pictures[path] = True
            continue
        try:
            with os.scandir(path) as entries:
                files = sorted(entry.name for entry in entries if not entry.is_dir())
        except OSError as error:
            raise UserError(f"{path}: {error.strerror}") from None
        found = [name for name in files if name[0] != "." and Path(name).suffix.lower() in PICTURES]
        if not found:
            raise UserError(f"{path}: not a file, and no folder of pictures")
        for name in found:
            pictures.setdefault(path / name, False)
    return pictures


class CaptionFile:
    """
    A file of captions, one JSON object a line: image, style, model, sha256 (of the picture), caption, tokens, whole.

    What is written goes to FILE.part first, a batch at a time, so that a run that was killed goes on; `finish` makes FILE.
    Raises UserError for a file that is none, and for one whose captions are by another model.
    """

    FIELDS = dict.fromkeys(("image", "style", "model", "sha256", "caption"), str) | {
        "tokens": int,
        "whole": bool,
    }

    def __init__(self, path: Path, model: str) -> None:
        self.path, self.part = path, Path(f"{path}.part")
        for file in (path, self.part, self._new(path)):
            if not self._can_be_written(file):
                raise UserError(f"{file} cannot be written: --out wants a file in a folder that exists")
        self.model, self.lock = model, None
        self._load()

    def _load(self) -> None:
        self.rows: dict[tuple, dict] = {}
        for file in (self.path, self.part):
            for row in self.read(file):
                if row["model"] != self.model:
                    raise UserError(
                        f"{file} holds captions by {row['model']}, not {self.model}: give --out another name"
                    )
                self.rows[self.key(row)] = row
        # Of .part's bytes, the lines that are whole: what a kill cut short is written over.
        self.whole = self.part.read_bytes().rfind(b"\n") + 1 if self.part.is_file() else 0

    @staticmethod
    def key(row: dict) -> tuple:
        return row["image"], row["style"]

    def read(self, file: Path) -> list[dict]:
        lines = file.read_bytes().split(b"\n") if file.is_file() else []
        rows = []
        for i, line in enumerate(lines):
            if not line.strip() or (file == self.part and i + 1 == len(lines)):  # cut short by the kill
                continue
            try:
                row = json.loads(line)
                if not all(isinstance(row[k], kind) for k, kind in self.FIELDS.items()):
                    raise ValueError
            except (ValueError, KeyError, TypeError, RecursionError):
                raise UserError(
                    f"{file} is no file of captions (line {i + 1}): give --out another name"
                ) from None
            rows.append(row)
        return rows

    def has(self, row: dict, max_tokens: int) -> bool:
        """Whether the picture, unchanged, has a caption of this style, whole or of as many tokens as it may have."""
        known = self.rows.get(self.key(row), {})
        return known.get("sha256") == row["sha256"] and (known["whole"] or known["tokens"] >= max_tokens)

    def of(self, row: dict) -> dict:
        return self.rows[self.key(row)]

    def add(self, rows: list[dict]) -> None:
        if self.lock is None:
            self._begin()
        self.rows |= {self.key(row): row for row in rows}
        data = self._lines(rows)
        with self._naming_errors(), open(self.part, "ab") as file:
            file.truncate(self.whole)
            file.write(data)
        self.whole += len(data)

    def _begin(self) -> None:
        """From here on no other run writes here; what one has written in the meantime is kept."""
        with self._naming_errors():
            self.lock = open(self.part, "ab")  # noqa: SIM115 - it is closed with the process
            try:
                fcntl.flock(self.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise UserError(f"{self.path} is being written by another run") from None
        self._load()

    def finish(self) -> None:
        if self.part.is_file():  # or nothing has been added
            if self.lock is None:  # it may be another run's, which still adds to it
                self._begin()
            with self._naming_errors():
                self._new(self.path).write_bytes(self._lines(list(self.rows.values())))
                self._new(self.path).replace(self.path)
                self.part.unlink()

    @staticmethod
    def _lines(rows: list[dict]) -> bytes:
        return "".join(json.dumps(row) + "\n" for row in rows).encode()

    @staticmethod
    def _new(file: Path) -> Path:
        return Path(f"{file}.new")

    @staticmethod
    def _can_be_written(file: Path) -> bool:
        there = file.absolute().parent
        try:
            regular = stat.S_ISREG(os.stat(file).st_mode) and os.access(file, os.R_OK | os.W_OK)
        except (FileNotFoundError, NotADirectoryError):
            regular = True
        except OSError as error:  # a name that is too long
            raise UserError(f"{file} cannot be written: {error.strerror}") from None
        return regular and there.is_dir() and os.access(there, os.W_OK)

    @contextmanager
    def _naming_errors(self) -> Iterator[None]:
        """A disk that is full, a folder that is gone."""
        try:
            yield
        except OSError as error:
            raise UserError(f"{self.path} cannot be written: {error.strerror or error}") from None
