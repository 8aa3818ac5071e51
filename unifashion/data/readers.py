"""The data sets that have texts of their pictures, by the name that also stands for the style of these texts."""

from collections.abc import Callable
from pathlib import Path

from torch.utils.data import Dataset

from unifashion.data import toy
from unifashion.data.fashion200k import Fashion200K
from unifashion.data.fashiongen import FashionGen
from unifashion.data.fashioniq import FashionIQCap

READERS: dict[str, Callable[[Path, str], Dataset]] = {
    "fashion200k": Fashion200K,
    "fashiongen": FashionGen,
    "fashioniq-cap": FashionIQCap,
}


def in_toy(world: Path, name: str, quiet: bool = False) -> Path:
    """Where the ToyFashion at `world` has the data set `name`; drawn if it is missing."""
    return toy.part(world, name.removesuffix("-cap"), quiet)
