"""Planted faults: a parity test is worth something only if a wrong line breaks it."""

from pathlib import Path
from types import FunctionType, ModuleType

import pytest


def plant(patch: pytest.MonkeyPatch, module: ModuleType, target: str, old: str, new: str) -> None:
    """Until the test ends `target`, a function, "Class.method" or value of `module`, is made with `new` for `old`.

    `old` must stand once in the module's source: a fault that no longer fits the code is an error, not a pass.
    """
    source = Path(module.__file__).read_text()
    assert source.count(old) == 1, f"{module.__name__} has {source.count(old)} times: {old}"
    wrong = ModuleType(module.__name__)
    wrong.__file__ = module.__file__
    exec(compile(source.replace(old, new), module.__file__, "exec"), wrong.__dict__)
    place, made = module, wrong
    *path, name = target.split(".")
    for part in path:
        place, made = getattr(place, part), getattr(made, part)
    made = getattr(made, name)
    made = getattr(made, "__wrapped__", made)  # torch.no_grad's wrapper would keep the names of `wrong`
    if isinstance(made, FunctionType):  # its names are the true module's: only this one thing is wrong
        made = FunctionType(made.__code__, vars(module), name, made.__defaults__)
    patch.setattr(place, name, made)
