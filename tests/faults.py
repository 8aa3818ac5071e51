"""Planted faults: a parity test is worth something only if a wrong line breaks it."""

from pathlib import Path
from types import ModuleType

import pytest


def plant(patch: pytest.MonkeyPatch, module: ModuleType, target: str, old: str, new: str) -> None:
    """Until the test ends `target`, a function or "Class.method" of `module`, runs with `old` replaced by `new`.

    `old` must stand once in the module's source: a fault that no longer fits the code is an error, not a pass.
    """
    source = Path(module.__file__).read_text()
    assert source.count(old) == 1, f"{module.__name__} has {source.count(old)} times: {old}"
    wrong = ModuleType(module.__name__)
    exec(compile(source.replace(old, new), module.__file__, "exec"), wrong.__dict__)
    place, made = module, wrong
    *path, name = target.split(".")
    for part in path:
        place, made = getattr(place, part), getattr(made, part)
    patch.setattr(place, name, getattr(made, name))
