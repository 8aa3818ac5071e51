"""CUDA's recorded graphs on a CPU: what is launched while one is recorded is done again, in the same places, when it is replayed."""

from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

WAITING = ("_local_scalar_dense", "nonzero", "masked_select", "unique", "equal", "bincount")


def waits(operator: Any, args: tuple) -> bool:
    """Whether a program must wait for it: its result, or its shape, only the device knows."""
    name = str(operator.overloadpacket).removeprefix("aten.")
    by_mask = name == "index" and any(i is not None and i.dtype == torch.bool for i in args[1])
    return by_mask or name.startswith(WAITING)


class Graph:
    """In the place of torch.cuda.CUDAGraph."""

    def __init__(self) -> None:
        self.launched: list[tuple[Any, tuple, dict, list[Tensor]]] = []

    def replay(self) -> None:
        for operator, args, kwargs, results in self.launched:
            for place, x in zip(results, tensors(operator(*args, **kwargs)), strict=True):
                place.copy_(x)


class Recorder(TorchDispatchMode):
    def __init__(self, graph: Graph) -> None:
        super().__init__()
        self.graph = graph

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        # Nor may anything be copied from the host.
        allowed = not waits(func, args) and str(func.overloadpacket) != "aten.lift_fresh"
        assert allowed, f"{func.overloadpacket} is not allowed while CUDA records"
        out = func(*args, **kwargs or {})
        self.graph.launched.append((func, args, kwargs or {}, tensors(out)))
        return out


class Stream:
    def wait_stream(self, other: "Stream") -> None:
        pass


def simulate(monkeypatch: pytest.MonkeyPatch) -> None:
    """Until the test ends a CPU records and replays."""
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "current_stream", Stream)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: nullcontext())
    monkeypatch.setattr(torch.cuda, "graph", Recorder)


def tensors(tree: Any) -> list[Tensor]:
    return [x for x in tree_leaves(tree) if isinstance(x, Tensor)]
