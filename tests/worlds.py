"""Small worlds of ToyFashion, with the parts alone that a test reads."""

from pathlib import Path

import pytest

from unifashion.data import shops, toy


def world_of(folder: Path, *parts: str, **settings) -> Path:
    """As `toy.ensure`, with these of `shops.PARTS`."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shops, "PARTS", {name: shops.PARTS[name] for name in parts})
        return toy.ensure(folder, quiet=True, **settings)
