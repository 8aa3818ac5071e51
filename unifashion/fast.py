"""What makes a finished model faster and leaves its results as they are, to rounding: order in memory, compiling, CUDA's graphs.

What is fast in itself is where it is written: fused attention in every component, keys and values of a context once per
picture, guidance as one batch, the LLM's static cache. What a CPU has to be told is in `cpu.py`.
"""

import os
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from functools import wraps
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map_only

from unifashion import UserError

# Kernels that were compiled are kept here from run to run, in the user's home; /tmp, where torch keeps them, is emptied
CACHE = ".cache/unifashion/kernels"


def repeatable() -> None:
    """Same seed, same machine: same bytes, as far as kernels are not chosen by their time (`compile_drawing`); and fp32 means fp32."""
    torch.backends.cudnn.deterministic = True
    torch.backends.cudnn.allow_tf32 = False


def in_order(model: nn.Module) -> nn.Module:
    """
    On CUDA channels last, in what draws: cuDNN's convolutions in bfloat16 read pixels, not channels, one after the other. On a
    CPU it made no difference that could be measured (`eval/speed.md`).
    """
    return model.to(memory_format=torch.channels_last) if on_cuda(model) else model


def on_cuda(model: nn.Module) -> bool:
    return next(model.parameters()).is_cuda


def compile_drawing(model: nn.Module, tell: Callable[[str], None]) -> None:
    """
    Compile what `Denoiser.sample` runs at every step as one graph, which CUDA records and replays, and the VAE's decoder.

    tell  is given a line after the first call of each, which compiles it: minutes, and less where the kernels are kept

    The first call raises UserError where torch cannot compile, as without a C++ compiler.
    """
    kept = _keep_kernels()
    model.network = _timed(torch.compile(model.network, dynamic=False), "the U-Net", kept, tell)
    if on_cuda(model):
        model.network = Recorded(model.network)
    model.vae.decode = _timed(torch.compile(model.vae.decode, dynamic=False), "the VAE", kept, tell)


def compile_writing(model: nn.Module, tell: Callable[[str], None]) -> None:
    """
    As `compile_drawing`, of the LLM's step; the prompt, which is read once, is read as it is written. A second size of the batch,
    or of the cache, compiles it once more, for all sizes.
    """
    llama = model.llama
    llama.step = _timed(torch.compile(llama.step), "the LLM's step", _keep_kernels(), tell)
    if on_cuda(llama):
        llama.record = Recorded


class Recorded:
    """
    A function whose kernels are recorded as a CUDA graph, and from then on launched as one: of the thousand of a step many are done
    before Python has asked for the next.

    function  of tensors, in lists, too, and None -> a tensor. It runs twice for each set of shapes, without waiting for the device;
              what else it reads or writes, weights or the LLM's cache, has to stay where it is

    A graph reads and writes the places that it was recorded with, so that inputs are copied there, and results from there.
    """

    def __init__(self, function: Callable[..., Tensor]) -> None:
        self.function = function
        self.graphs: dict[tuple, tuple[torch.cuda.CUDAGraph, list[Tensor], Tensor]] = {}

    def __call__(self, *args) -> Tensor:
        leaves, structure = tree_flatten(args)
        kind = structure, *((x.shape, x.dtype) if isinstance(x, Tensor) else x for x in leaves)
        if kind not in self.graphs:
            self.graphs[kind] = self.record(args)
        graph, places, result = self.graphs[kind]
        for place, x in zip(places, tensors(leaves), strict=True):
            place.copy_(x)
        graph.replay()
        return result.clone()

    def record(self, args: tuple) -> tuple[torch.cuda.CUDAGraph, list[Tensor], Tensor]:
        """-> a graph, the places that it reads, and the one that it writes."""
        args = tree_map_only(Tensor, torch.clone, args)
        graph, side = torch.cuda.CUDAGraph(), torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        # Libraries choose kernels and take memory at their first call, which may not be recorded.
        with torch.cuda.stream(side):
            self.function(*args)
        torch.cuda.current_stream().wait_stream(side)
        with torch.cuda.graph(graph):
            result = self.function(*args)
        return graph, tensors(tree_leaves(args)), result


def tensors(leaves: list) -> list[Tensor]:
    return [x for x in leaves if isinstance(x, Tensor)]


def _keep_kernels() -> str:
    """-> where they are kept: where the user says, in the home, or, if there is none to write to, where torch keeps them."""
    with suppress(OSError, RuntimeError):
        place = Path.home() / CACHE
        place.mkdir(parents=True, exist_ok=True)
        if os.access(place, os.W_OK):
            os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(place))
    return os.environ.get("TORCHINDUCTOR_CACHE_DIR", tempfile.gettempdir())


def _timed(function: Callable, name: str, kept: str, tell: Callable[[str], None]) -> Callable:
    """`function`, of whose first call the time is told."""
    from torch._dynamo.exc import BackendCompilerFailed  # a second, which others need not wait for
    from torch._inductor.exc import InductorError

    told = False

    @wraps(function)
    def call(*args, **kwargs):
        nonlocal told
        start = time.perf_counter()
        try:
            result = function(*args, **kwargs)
        except (BackendCompilerFailed, InductorError) as error:
            why = " ".join(str(error).split("\n")[:2])
            raise UserError(f"torch cannot compile {name} here ({why}): leave out --compile") from None
        if not told:
            told = True
            tell(f"compiled {name} in {time.perf_counter() - start:.0f} s; the kernels are kept in {kept}")
        return result

    return call
