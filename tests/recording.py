"""CUDA's recorded graphs on a CPU: what is launched while one is recorded is done again, in the same places, when it is replayed."""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

# Of what is not allowed while CUDA records: to wait for a number, or for as many as there are, and to copy from the host.
FORBIDDEN = ("_local_scalar_dense", "nonzero", "masked_select", "unique", "equal", "bincount", "lift_fresh")


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
        name = str(func.overloadpacket).removeprefix("aten.")
        by_mask = name == "index" and any(i is not None and i.dtype == torch.bool for i in args[1])
        assert not by_mask and not name.startswith(FORBIDDEN), f"{name} is not allowed while CUDA records"
        out = func(*args, **kwargs or {})
        self.graph.launched.append((func, args, kwargs or {}, tensors(out)))
        return out


class Stream:
    def wait_stream(self, other: "Stream") -> None:
        pass


@contextmanager
def recording(graph: Graph) -> Iterator[None]:
    with Recorder(graph):
        yield


def simulate(monkeypatch: pytest.MonkeyPatch) -> None:
    """Until the test ends a CPU records and replays."""
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "current_stream", Stream)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: nullcontext())
    monkeypatch.setattr(torch.cuda, "graph", recording)


def tensors(tree: Any) -> list[Tensor]:
    return [x for x in tree_leaves(tree) if isinstance(x, Tensor)]
