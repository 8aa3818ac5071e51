"""Every data set that `--data` names: how it is opened, and where ToyFashion has it."""

from collections.abc import Callable
from pathlib import Path

from torch.utils.data import Dataset

from unifashion import UserError
from unifashion.data import toy
from unifashion.data.dresscode import DressCode
from unifashion.data.fashion200k import Fashion200K
from unifashion.data.fashiongen import FashionGen
from unifashion.data.fashioniq import FashionIQ, FashionIQCap
from unifashion.data.mgd import MGD
from unifashion.data.mgd_mask import DRESSCODE
from unifashion.data.vitonhd import VITONHD


def open_mgd(root: str | Path, split: str = "train", paired: bool = True) -> MGD | DressCode:
    """MGD's annotations on Dress Code if the folder has one of its three categories, else on VITON-HD."""
    if not Path(root).is_dir():
        raise UserError(
            f"{root} is missing: for VITON-HD {MGD.SOURCE}; for Dress Code {DressCode.SOURCE}; or use --data toy."
        )
    dresscode = any(Path(root, category).is_dir() for category in DRESSCODE)
    return (DressCode if dresscode else MGD)(root, split, paired)


# Those that have texts of their pictures, by the name that also stands for the style of these texts
READERS: dict[str, Callable[[Path, str], Dataset]] = {
    "fashion200k": Fashion200K,
    "fashiongen": FashionGen,
    "fashioniq-cap": FashionIQCap,
}
DATA_SETS: dict[str, Callable[[Path, str], Dataset]] = {
    **READERS,
    "fashioniq": FashionIQ,
    "vitonhd": VITONHD,
    "mgd": open_mgd,
}
TOY_FOLDERS = {
    "fashioniq-cap": "fashioniq",
    "mgd": "vitonhd",
}  # of those that are not called as the data set is


def in_toy(world: Path, name: str, quiet: bool = False) -> Path:
    """Where the ToyFashion at `world` has the data set `name`; drawn if it is missing. (MGD is in dresscode/, too.)"""
    return toy.part(world, TOY_FOLDERS.get(name, name), quiet)
