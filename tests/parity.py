"""How a parity test compares: every number random, float64, agreement to 1e-10.

A reference with its own initialisation proves nothing: its norms are 1 and its biases 0, so that a table which swaps two
norms differs by exactly 0 (and transformers' BLIP-2 starts with a standard deviation of 1e-10, so that anything agrees).
"""

from typing import TypeVar

import torch
from torch import Tensor, nn

from weights.rename import Table

Module = TypeVar("Module", bound=nn.Module)


def randomise(module: Module, seed: int) -> Module:
    """Everything a checkpoint of `module` holds becomes random, zero-initialised layers too -> it, in float64 and eval mode."""
    generator = torch.Generator().manual_seed(seed)
    module = module.double().eval()
    for name, tensor in module.state_dict().items():
        if not tensor.is_floating_point():
            continue
        owner, _, leaf = name.rpartition(".")
        noise = torch.randn(tensor.shape, generator=generator, dtype=torch.float64)
        if (
            tensor.ndim > 1
            and leaf.endswith("weight")
            and not isinstance(module.get_submodule(owner), nn.Embedding)
        ):
            noise = noise / (tensor[0].numel() ** 0.5)  # a matrix keeps the scale of what passes through
        elif tensor.ndim > 1:
            noise = 0.45 * noise  # embeddings and learned tokens
        elif leaf == "running_var":
            noise = 1 + 0.25 * noise.abs()
        elif leaf.endswith("weight"):
            noise = 1 + 0.25 * noise  # norms
        else:
            noise = 0.2 * noise  # biases
        tensor.copy_(noise)
    return module


def assert_parity(ours: Tensor, theirs: Tensor, atol: float = 1e-10) -> None:
    """Same shape, the same numbers to `atol`, and numbers that could have shown a difference."""
    ours, theirs = ours.detach().double(), theirs.detach().double()
    assert ours.shape == theirs.shape, f"{tuple(ours.shape)} is not {tuple(theirs.shape)}"
    assert theirs.abs().max() > 1e-2, "the reference is near zero: anything would agree"
    assert theirs.numel() == 1 or theirs.std() > 1e-2, (
        "the reference is nearly constant: anything would agree"
    )
    difference = (ours - theirs).abs().max().item()  # nan fails too
    assert difference <= atol, f"max difference {difference:.1e}, allowed {atol:.0e}"


def swap(table: Table, a: str, b: str) -> Table:
    """A planted fault: the table with `a` and `b` exchanged in our column."""
    return {row: ours and ours.replace(a, "?").replace(b, a).replace("?", b) for row, ours in table.items()}
