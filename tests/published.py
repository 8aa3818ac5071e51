"""Names, types and shapes of the published checkpoints (tests/manifests/NAME.txt, a line each: name, type, then its sizes)."""

from pathlib import Path

import torch
from torch import Tensor

MANIFESTS = Path(__file__).parent / "manifests"
DTYPES = {
    "f32": torch.float32,
    "f16": torch.float16,
    "bf16": torch.bfloat16,
    "i64": torch.int64,
    "i32": torch.int32,
}


def published(name: str, under: str = "") -> dict[str, Tensor]:
    """
    {original name: a tensor of its type and shape on the meta device}: what `read_checkpoint` would give, without the
    numbers. With `under`, those alone that begin so, without it.
    """
    lines = (line.split() for line in (MANIFESTS / f"{name}.txt").read_text().splitlines())
    return {
        key.removeprefix(under): torch.empty(
            [int(size) for size in shape], dtype=DTYPES[dtype], device="meta"
        )
        for key, dtype, *shape in lines
        if key.startswith(under)
    }
