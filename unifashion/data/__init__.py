"""Datasets, each in its original on-disk format: one file per dataset."""

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
