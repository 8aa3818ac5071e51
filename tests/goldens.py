"""Reference tensors: outputs of the original implementations on tiny random weights (tests/golden/*.safetensors)."""

import json
from pathlib import Path
from typing import NamedTuple

from safetensors import safe_open
from torch import Tensor

GOLDEN = Path(__file__).parent / "golden"


class Golden(NamedTuple):
    weights: dict[str, Tensor]  # original checkpoint key -> tensor, float64
    inputs: dict[str, Tensor]  # floating inputs float64, ids and pixels in their integer type
    outputs: dict[str, Tensor]  # as stored: float64, float32 where the reference ran in it
    config: dict
    strings: dict


def load(name: str) -> Golden:
    """Read case `name`, all its parts merged.

    Weights and inputs are stored on coarse grids (float8 to float32) to stay small. The cast to float64 is exact: these
    are the very numbers the float64 reference used, so agreement to 1e-9 can be asked for.
    """
    with safe_open(GOLDEN / f"{name}.safetensors", "pt") as file:
        meta = file.metadata()
    groups: dict[str, dict[str, Tensor]] = {"weights": {}, "in": {}, "out": {}}
    for part in json.loads(meta.get("parts", f'["{name}.safetensors"]')):
        with safe_open(GOLDEN / part, "pt") as file:
            for key in file.keys():  # noqa: SIM118 - a safe_open handle cannot be iterated
                group, _, rest = key.partition("/")
                tensor = file.get_tensor(key)
                groups[group][rest] = (
                    tensor.double() if group != "out" and tensor.is_floating_point() else tensor
                )
    return Golden(
        groups["weights"],
        groups["in"],
        groups["out"],
        json.loads(meta["config"]),
        json.loads(meta["strings"]),
    )
