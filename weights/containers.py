"""Checkpoint files of every kind that the originals are published in -> {original name: tensor}, mapped, nothing run.

    safetensors                   a file, or the shards of a folder
    torch zip                     flat, or within "state_dict" (Lightning, with its optimizer), "model" (LAVIS), a class's name
    torch, before zip             the same, read whole: it cannot be mapped
    TorchScript                   OpenAI's CLIP: a program and its tensors, of which the tensors alone are read

A pickle is a program, too: it may ask for tensors, and for the few names in INERT, which do nothing here. Anything else is
refused before it runs, and the refusal names it.
"""

import io
import os
import pickle
import pickletools
import re
import warnings
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import IO

import torch
from safetensors.torch import load_file
from torch import Tensor

from unifashion import UserError


class _Inert:
    """Stands for the few classes that checkpoints hold beside their tensors: keeps nothing, does nothing."""

    def __init__(self, *args: object) -> None:
        pass

    def __setstate__(self, state: object) -> None:
        pass


INERT = [
    (_Inert, name)
    for name in (
        "pytorch_lightning.callbacks.model_checkpoint.ModelCheckpoint",  # sd-v1-4.ckpt, Paint-by-Example's model.ckpt
        "numpy.core.multiarray.scalar",  # its best score so far
        "numpy._core.multiarray.scalar",
        "numpy.dtype",
        "_codecs.encode",
    )
]
# Where the tensors are, if not at the top: Lightning, LAVIS, and the classes that UniFashion's authors save under their names
WRAPPERS = ("state_dict", "model", "Blip2QformerCirCls", "Blip2QformerCirRerank")
# How a download that went wrong begins
NO_CHECKPOINTS = {
    rb"$": "empty: the download did not begin",
    rb"version https://git-lfs": "a git-lfs pointer, not the file it stands for: `git lfs pull` gets that",
    rb"\s*<(!doctype|html|\?xml)": "a web page, not a checkpoint: that address shows a page about the file, or asks to log in",
    rb"invalid username|unauthorized|access to|repository not found|entry not found|\{\"(error|message)": "a server's answer, not a checkpoint: it was not given out",
    rb"\0{64}": "zeros, not a checkpoint: the download had the place and did not fill it",
}


# Of the files in a folder: transformers', diffusers', open_clip's
STEMS = ("model", "pytorch_model", "diffusion_pytorch_model", "open_clip_model", "open_clip_pytorch_model")
ENDINGS = ("safetensors", "bin", "ckpt")


def read_checkpoint(path: str | Path) -> dict[str, Tensor]:
    """
    {original name: tensor} on the CPU. Safetensors and zip files are mapped, not read: what is not used costs no memory.

    Raises UserError, in one line that names the file, if it is not there, damaged, no checkpoint, or asks to run something.
    """
    path = Path(path)
    if not os.path.isfile(path):
        raise UserError(f"{path}: {'is not a file' if os.path.exists(path) else 'no such file'}")
    try:
        _check_beginning(path)
        if path.suffix == ".safetensors":
            return load_file(path)
        zipped = zipfile.is_zipfile(path)
        if zipped:
            _check_stored(path)
        if zipped and any(name.endswith("/constants.pkl") for name in zipfile.ZipFile(path).namelist()):
            return _read_torchscript(path)
        with torch.serialization.safe_globals(INERT), warnings.catch_warnings(action="ignore"):
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=zipped)
    except UserError:
        raise
    except PermissionError as error:
        raise UserError(f"{path}: {error.strerror}") from None
    except Exception as error:  # bytes that are cut anywhere fail in a dozen ways
        if asked := re.search(r"GLOBAL (\S+)", str(error)):
            raise _refusal(path, asked[1]) from None
        if "Unsupported operand" in str(error):
            raise UserError(f"{path}: {_unreadable(path, zipped)}") from None
        if "Cannot allocate memory" in str(error):  # Linux maps no file that is larger than memory and swap
            size = os.path.getsize(path) / 1e9
            raise UserError(f"{path}: there is too little memory to map its {size:.1f} GB") from None
        raise UserError(f"{path}: damaged, cut short, or not a checkpoint ({_reason(error)})") from None
    for wrapper in WRAPPERS:
        if isinstance(content, dict) and isinstance(content.get(wrapper), dict):
            content = content[wrapper]
    if not isinstance(content, dict) or not content:
        raise UserError(f"{path}: holds no table of tensors")
    for name, tensor in content.items():
        if not isinstance(name, str) or not isinstance(tensor, Tensor):
            raise UserError(
                f"{path}: holds {name}, a {type(tensor).__name__}, where named tensors were expected"
            )
    return dict(content)


def read_folder(folder: Path) -> dict[str, Tensor]:
    """As `read_checkpoint`, of all shards in `folder`. Raises UserError for a tensor that is in two of them, too."""
    merged: dict[str, Tensor] = {}
    for shard in shards_of(folder):
        tensors = read_checkpoint(shard)
        if twice := sorted(merged.keys() & tensors.keys()):
            raise UserError(f"{shard}: {twice[0]} is in an earlier file, too")
        merged |= tensors
    return merged


def shards_of(folder: Path) -> list[Path]:
    """
    model.safetensors, or model-00001-of-00003.safetensors and so on, or the like: STEMS and ENDINGS, the first that is whole.
    Raises UserError if there is none, which says what one of several misses.
    """
    if not folder.is_dir():
        raise UserError(f"{folder} is missing, or not a folder")
    if not os.access(folder, os.R_OK | os.X_OK):
        raise UserError(f"{folder}: Permission denied")
    missing: list[str] = []
    for stem in STEMS:
        for ending in ENDINGS:
            if (whole := folder / f"{stem}.{ending}").is_file():
                return [whole]
            numbered = rf"{stem}-\d+-of-(\d+)\.{ending}"
            counts = {m[1] for p in folder.iterdir() if (m := re.fullmatch(numbered, p.name))}
            for n in sorted(counts, reverse=True):
                names = [f"{stem}-{i:05}-of-{n}.{ending}" for i in range(1, int(n) + 1)]
                lost = [name for name in names if not (folder / name).is_file()]
                if not lost:
                    return [folder / name for name in names]
                missing += lost
    if missing:
        raise UserError(f"{folder / missing[0]} is missing")
    raise UserError(f"{folder} holds no weights: neither model*.safetensors nor pytorch_model*.bin")


def _check_stored(path: Path) -> None:
    """Raise UserError for a zip file that was packed again: what is mapped of it would be its compressed bytes, taken for numbers."""
    with zipfile.ZipFile(path) as file:
        for record in file.infolist():
            mapped = "/data/" in record.filename or record.filename.endswith(".pkl")
            if mapped and record.compress_type != zipfile.ZIP_STORED:
                raise UserError(
                    f"{path}: its record {record.filename} is compressed, as torch writes none: get the original"
                )


def check_sums(path: Path) -> None:
    """Raise UserError for a zip file, as torch writes them, whose records are not what their checksums say."""
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as records:
            if bad := records.testzip():
                raise UserError(f"{path}: damaged: its record {bad} is not what its checksum says")


def _check_beginning(path: Path) -> None:
    with open(path, "rb") as file:
        beginning = file.read(64)
    for start, what in NO_CHECKPOINTS.items():
        if re.match(start, beginning, re.IGNORECASE):
            raise UserError(f"{path}: is {what}")


def _refusal(path: Path, asked: str) -> UserError:
    return UserError(f"{path}: refused, its pickle asks for {asked}, no tensor needs it")


def _unreadable(path: Path, zipped: bool) -> str:
    """What is said of a pickle that torch does not read without running it: if it asks for anything, what."""
    told, asked = "refused, its pickle is of a protocol that is not read without running it", []
    with suppress(Exception), zipfile.ZipFile(path) if zipped else open(path, "rb") as file:
        if zipped:
            pickles = file.open(next(name for name in file.namelist() if name.endswith("data.pkl")))
        else:
            pickles = file  # torch's old files are five, and then the numbers
        for _ in range(1 if zipped else 4):  # where there are fewer, those before are known
            asked += _globals(pickles)
    if asked := [name for name in asked if not name.startswith(("torch.", "collections.OrderedDict"))]:
        told += f", and asks for {asked[0]}"
    return f"{told}: save it again by torch.save, as it does by itself"


def _globals(file: IO[bytes]) -> Iterator[str]:
    """What a pickle of protocol 4 or 5 asks for, which two words before name, or the memo's copies of them."""
    words, memo, before = [], [], None
    for operation, word, _ in pickletools.genops(file):
        if operation.name == "MEMOIZE":
            memo.append(before)
        if operation.name in ("BINGET", "LONG_BINGET"):
            word = memo[word]
        before = word if isinstance(word, str) else None
        words += [before] if before else []
        if operation.name == "STACK_GLOBAL":
            yield ".".join(words[-2:])


def _reason(error: Exception) -> str:
    """The first sentence: torch's messages go on for a paragraph."""
    return re.split(r"\.\s|\n", str(error).strip())[0] or type(error).__name__


# TorchScript

STORAGES = {
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "BoolStorage": torch.bool,
}


class _Module:
    """A module of a TorchScript program, reduced to its attributes."""

    def __setstate__(self, state: dict) -> None:
        self.__dict__.update(state)

    def tensors(self, prefix: str = "") -> dict[str, Tensor]:
        found: dict[str, Tensor] = {}
        for name, value in vars(self).items():
            if isinstance(value, Tensor):
                found[prefix + name] = value
            elif isinstance(value, _Module):
                # not value.tensors: a pickle may name an attribute so
                found |= _Module.tensors(value, f"{prefix}{name}.")
        return found


class _Modules(pickle.Unpickler):
    """data.pkl of a TorchScript archive. `torch.jit.load` would compile the program beside it, and run its __setstate__."""

    def __init__(self, path: Path, reader: "torch._C.PyTorchFileReader") -> None:
        super().__init__(io.BytesIO(reader.get_record("data.pkl")))
        self.path, self.reader = path, reader
        with zipfile.ZipFile(path) as file:  # its names begin with the archive's own
            self.sizes = {x.filename.partition("/")[2]: x.file_size for x in file.infolist()}
        self.whole = torch.UntypedStorage.from_file(str(path), shared=False, nbytes=path.stat().st_size)

    def find_class(self, module: str, name: str) -> Callable | torch.dtype:
        if module == "__torch__" or module.startswith("__torch__."):
            return _Module
        if module == "torch" and name in STORAGES:
            return STORAGES[name]
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            return _Rebuild()
        if (module, name) == ("collections", "OrderedDict"):
            return OrderedDict
        if module == "torch.jit._pickle":  # lists of numbers
            return _Inert
        raise _refusal(self.path, f"{module}.{name}")

    def persistent_load(self, known: tuple) -> Tensor:
        """("storage", its type, its record's name, device, numbers) -> the record as a flat tensor."""
        _, dtype, record, _, n = known
        start, size = self.reader.get_record_offset(f"data/{record}"), n * dtype.itemsize
        if size != self.sizes[f"data/{record}"]:
            raise UserError(f"{self.path}: damaged, cut short, or not a checkpoint (record {record})")
        return torch.empty(0, dtype=dtype).set_(self.whole[start : start + size])


class _Rebuild:
    """A flat record -> the tensor. Not a function: a pickle could set its attributes."""

    __slots__ = ()

    def __call__(self, flat: Tensor, offset: int, size: tuple, stride: tuple, *rest: object) -> Tensor:
        return flat.as_strided(size, stride, offset)

    def __setstate__(self, state: object) -> None:
        raise ValueError("a tensor has no state")


def _read_torchscript(path: Path) -> dict[str, Tensor]:
    reader = torch._C.PyTorchFileReader(str(path))
    root = _Modules(path, reader).load()
    if not isinstance(root, _Module):
        raise UserError(f"{path}: holds a {type(root).__name__}, where a TorchScript module was expected")
    return _Module.tensors(root)
