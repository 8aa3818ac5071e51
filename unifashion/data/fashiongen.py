"""FashionGen in its original form: `fashiongen_256_256_{train,validation}.h5`, one row a picture.

Datasets of a file: `input_image` (N,S,S,3) uint8, and (N,1) each `input_name`, `input_description`, `input_category`,
`input_subcategory` (bytes in ISO-8859-1), `input_productID`, and others that are not read here. The pictures of a
product lie one after the other and share its texts.
"""

import os
import re
from pathlib import Path
from types import ModuleType

import numpy as np
from PIL import Image

from unifashion import UserError

TEXTS = ("name", "description", "category", "subcategory", "productID")


def need_h5py() -> ModuleType:
    """The module h5py, which only FashionGen needs. Raises UserError if it is not installed."""
    try:
        import h5py
    except ImportError:
        raise UserError("FashionGen is in HDF5, which needs h5py: pip install h5py") from None
    return h5py


class FashionGen:
    """Items {"image": RGB, "text": "name. description", "path": "split/row", "product", "category", "subcategory"}.

    The split is "train", "validation" (or "val"), for ToyFashion also "test". `products` has the product of each item.
    Raises UserError if h5py or the file is missing, or the file is not what it should be, and for an item without text.
    """

    SOURCE = "ask for it at fashion-gen.com"

    def __init__(self, root: str | Path, split: str = "train") -> None:
        self.root, self.split = Path(root), "validation" if split == "val" else split
        self.file = Path(root, f"fashiongen_256_256_{self.split}.h5")
        self.opened = None  # (process, h5py.File)
        if not self.file.is_file():
            raise UserError(f"{self.file} is missing: {self.SOURCE}, or use --data toy.")
        try:
            self._read_texts()
        except UserError:
            raise
        except Exception as error:  # of a file that was downloaded in part HDF5 raises many kinds
            raise UserError(f"{self.file}: cannot be read, or cut short ({error}): {self.SOURCE}") from None

    def _read_texts(self) -> None:
        with self.open() as file:
            missing = [key for key in ("image", *TEXTS) if f"input_{key}" not in file]
            if missing:
                raise UserError(f"{self.file} lacks {', '.join(f'input_{key}' for key in missing)}")
            pictures = file["input_image"]
            if not hasattr(pictures, "dtype"):
                raise UserError(f"{self.file}: input_image is a group, not pictures")
            if pictures.dtype != np.uint8 or pictures.ndim != 4 or pictures.shape[3] != 3:
                raise UserError(
                    f"{self.file}: input_image is {pictures.dtype}{pictures.shape}, not uint8 (N,S,S,3)"
                )
            columns = {key: self.strings(file[f"input_{key}"]) for key in TEXTS}
            sizes = {"image": len(pictures)} | {key: len(column) for key, column in columns.items()}
            if len(set(sizes.values())) > 1:
                raise UserError(f"{self.file}: numbers of rows differ: {sizes}")
        names, descriptions, self.categories, self.subcategories, self.products = columns.values()
        self.texts = [". ".join(filter(None, of)) for of in zip(names, descriptions, strict=True)]

    def __len__(self) -> int:
        return len(self.texts)

    def __getitem__(self, index: int) -> dict:
        row = range(len(self))[index]
        if not self.texts[row]:
            raise UserError(f"{self.file}: row {row} has neither name nor description")
        # A file that was opened before a fork must not be read after it: each process opens its own.
        if self.opened is None or self.opened[0] != os.getpid():
            self.opened = None  # closed first: HDF5 would give back what is open already
            self.opened = (os.getpid(), self.open())
        try:
            pixels = self.opened[1]["input_image"][row]
        except Exception as error:  # as a decoder of pictures may, HDF5 raises many kinds
            raise UserError(f"{self.file}: the picture of row {row} cannot be read ({error})") from None
        return {
            "image": Image.fromarray(pixels),
            "text": self.texts[row],
            "path": f"{self.split}/{row}",
            "product": self.products[row],
            "category": self.categories[row],
            "subcategory": self.subcategories[row],
        }

    def missing(self) -> list[str]:
        """No picture: all are in the one file, whose rows are counted when it is opened."""
        return []

    def __getstate__(self) -> dict:
        return self.__dict__ | {"opened": None}  # an open file cannot go to another process

    def open(self):
        """The file as h5py.File, to read. Raises UserError if it is not whole HDF5."""
        h5py = need_h5py()
        try:
            return h5py.File(self.file, "r")
        except OSError as error:
            raise UserError(
                f"{self.file}: cannot be opened, or cut short, or not HDF5 ({error}): {self.SOURCE}"
            ) from None

    def strings(self, column) -> list[str]:
        """A dataset (N,1) or (N,) of bytes or numbers as N texts: without mark-up (<br>), white space made single blanks."""
        try:
            values = column[()].reshape(len(column)).tolist()
        except Exception as error:
            raise UserError(f"{self.file}: {column.name[1:]} cannot be read ({error})") from None
        texts = (value.decode("iso-8859-1") if isinstance(value, bytes) else str(value) for value in values)
        return [" ".join(re.sub("<[^<>]*>", " ", text).split()) for text in texts]
