"""Names and shapes of the published checkpoints (tests/manifests/NAME.txt, a line each: name, then its sizes)."""

from pathlib import Path

import torch
from torch import Tensor

MANIFESTS = Path(__file__).parent / "manifests"


def published(name: str) -> dict[str, Tensor]:
    """{original name: a tensor of its shape on the meta device}: what `read_checkpoint` would give, without the numbers."""
    lines = (line.split() for line in (MANIFESTS / f"{name}.txt").read_text().splitlines())
    return {key: torch.empty([int(size) for size in shape], device="meta") for key, *shape in lines}
