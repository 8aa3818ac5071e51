"""Pictures -> captions, as `infer.py caption` and `eval.captioning` write them, and the file that keeps them."""

import fcntl
import hashlib
import json
import os
import re
import stat
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

from unifashion import UserError
from unifashion.config import UniFashionConfig
from unifashion.llava import LLaVA, LLaVAConfig
from unifashion.model import UniFashion
from unifashion.preprocess import llava_image, qformer_image, read_image
from unifashion.tokenizers import SentencePiece, llava_prompt, prompt

PICTURES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff")
# A key word, or two or three that belong together: "t-shirt", "off the shoulder", "3/4 sleeve"
KEYWORD = re.compile(r"[^\W_][\w '’&/-]{0,39}")


class Caption(NamedTuple):
    text: str
    tokens: int  # its end counted, where the model came to it
    whole: bool  # it ended by itself


@torch.no_grad()
def write_captions(
    model: UniFashion | LLaVA,
    words: SentencePiece,
    pictures: list[Tensor],
    style: str,
    max_tokens: int = 128,
    beams: int = 1,
    keywords: tuple[str, ...] = (),
) -> list[Caption]:
    """
    model     with what writes (`UniFashion(cfg, writes=True)`, `load_unifashion(..., writes=True)`), or LLaVA
    pictures  each from `read_picture`: (3,224,224), LLaVA's (3,336,336)
    style     a key of `tokenizers.INSTRUCTIONS`
    keywords  from which LLaVA is to choose

    Raises UserError where what the Q-Former, or LLaVA's projector, says is not finite.
    """
    before, _, after = frame(model.cfg, words, style, keywords)
    before, after = (torch.tensor(ids, device=model.device) for ids in (before, after))
    z = model.see(torch.stack(pictures).to(model.device))
    if isinstance(model, UniFashion):
        z, _ = model.qformer(z)
    if not z.isfinite().all():
        raise UserError("the numbers overflow: a file of weights is damaged")
    ids = model.write(z, before, after.expand(len(z), -1), max_tokens, words.eos, beams)
    captions = []
    for row in ids.tolist():
        whole = words.eos in row
        end = row.index(words.eos) if whole else len(row)
        captions.append(Caption(words.decode(row[:end]).strip(), end + whole, whole))
    return captions


def frame(
    cfg: UniFashionConfig | LLaVAConfig, words: SentencePiece, style: str, keywords: tuple[str, ...] = ()
) -> tuple[list[int], int, list[int]]:
    """The ids before a picture, how many tokens it takes itself, and the ids after it. Raises UserError for an unknown style."""
    if isinstance(cfg, LLaVAConfig):
        before, after = llava_prompt(words, style, keywords)
        return before, cfg.patches, after
    before, after = prompt(words, style)
    return before, cfg.qformer.queries, after


def read_picture(cfg: UniFashionConfig | LLaVAConfig, path: Path) -> Tensor:
    """The picture at `path` as that model sees it. Raises UserError as `preprocess.read_image`."""
    if isinstance(cfg, LLaVAConfig):
        return llava_image(read_image(path), cfg.image.image_size)
    return qformer_image(read_image(path), cfg.vit.image_size[0])


def check_search(
    cfg: UniFashionConfig | LLaVAConfig,
    words: SentencePiece,
    style: str,
    max_tokens: int,
    beams: int,
    keywords: tuple[str, ...] = (),
) -> None:
    """Raise UserError for a style that there is not, and for what `write_captions` cannot take."""
    before, picture, after = frame(cfg, words, style, keywords)
    most = cfg.llama.context - len(before) - picture - len(after)
    if most < 1:
        raise UserError(
            f"{len(keywords)} key words are too many: the LLM reads {cfg.llama.context} tokens at most, the picture's {picture} included"
        )
    if not 1 <= max_tokens <= most:
        raise UserError(f"--max-tokens is {max_tokens}, must be 1 to {most}: the rest is the prompt's")
    if not 1 <= beams <= 32:
        raise UserError(f"--beams is {beams}, must be 1 to 32")


def read_keywords(path: Path) -> tuple[str, ...]:
    """
    The words in a file, a word a line, in its order; what follows a tab is left out, as the counts of `unifashion.data.keywords`.

    Raises UserError for a file that is missing, empty, far too long, no text, or has something else than words in it.
    """
    if not os.path.isfile(path):
        raise UserError(f"--keywords {path}: {'not a file' if os.path.exists(path) else 'no such file'}")
    if os.path.getsize(path) > 2**16:
        raise UserError(
            f"--keywords {path}: a list of key words has a word a line, this is far too long for one"
        )
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except OSError as error:
        raise UserError(f"--keywords {path}: {error.strerror}") from None
    except UnicodeDecodeError:
        raise UserError(f"--keywords {path}: no text in UTF-8") from None
    found = [line.split("\t")[0].strip() for line in lines]
    if wrong := [i for i, word in enumerate(found, start=1) if word and not KEYWORD.fullmatch(word)]:
        raise UserError(
            f"--keywords {path}: line {wrong[0]} is no word, a list of key words has a word a line"
        )
    if not any(found):
        raise UserError(f"--keywords {path}: there is no word in it")
    return tuple(dict.fromkeys(word for word in found if word))


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


class Job:
    """
    Pictures to be described in one style, by one model.

    rows     {path: its row of the file}, of every picture that can be read
    todo     those of them that have no caption yet
    skipped  {path: why it cannot be read}, of folders, whose other pictures need not wait for them
    file     where captions are kept, if they are
    seconds  that writing has taken, reading pictures not counted

    Raises UserError as `pictures_of` and `CaptionFile`, and, of all at once, for pictures that were named themselves and cannot
    be read, or if none can.
    """

    def __init__(
        self, given: list[Path], style: str, by: str, max_tokens: int, out: Path | None, quiet: bool
    ) -> None:
        named = pictures_of(given)
        # Beside a file pictures are told from there: however the command is said, a picture has one name.
        told = {path: os.path.relpath(path, out.parent) if out else str(path) for path in named}
        rows = {path: {"image": told[path], "style": style, "model": by} for path in named}
        self.file = CaptionFile(out, by) if out else None
        self.todo: list[Path] = []
        self.skipped: dict[Path, str] = {}
        self.seconds, self.quiet = 0.0, quiet
        bad: list[str] = []
        for path, row in tqdm(rows.items(), "looking", unit="picture", disable=quiet or len(rows) < 50):
            try:
                row["sha256"] = _sha256(path) if os.path.isfile(path) else ""
                if self.file is None or not self.file.has(row, max_tokens):
                    read_image(path)  # to complain now, of all at once, rather than after an hour
                    self.todo.append(path)
            except (UserError, OSError) as error:  # of a disk, too
                if named[path]:
                    bad.append(str(error))
                else:
                    self.skipped[path] = str(error)
        if bad or len(self.skipped) == len(rows):
            raise UserError("; ".join(bad or self.skipped.values()))
        self.rows = {path: row for path, row in rows.items() if path not in self.skipped}

    def notes(self) -> list[str]:
        notes, n, left = [], len(self.rows), len(self.rows) - len(self.todo)
        if self.skipped:
            notes.append(
                f"{len(self.skipped)} of {n + len(self.skipped)} pictures cannot be read and are skipped"
            )
        if left:
            notes.append(f"{left} of {n} pictures have their caption in {self.file.path}")
        return notes

    def work(
        self, size: int, read: Callable[[Path], Tensor], write: Callable[[list[Tensor]], list[Caption]]
    ) -> Iterator[list[Path]]:
        """Describe `size` pictures at a time -> their paths; their rows have a caption then, and are in the file."""
        with tqdm(total=len(self.todo), desc="captions", unit="picture", disable=self.quiet) as bar:
            for i in range(0, len(self.todo), size):
                batch = self.todo[i : i + size]
                pictures = [read(path) for path in batch]
                start = time.perf_counter()
                found = write(pictures)
                self.seconds += time.perf_counter() - start
                for path, one in zip(batch, found, strict=True):
                    self.rows[path] |= {"caption": one.text, "tokens": one.tokens, "whole": one.whole}
                if self.file is not None:
                    self.file.add([self.rows[path] for path in batch])
                bar.clear()  # for what is printed
                yield batch
                bar.update(len(batch))
        if self.file is not None:
            self.file.finish()


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


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
