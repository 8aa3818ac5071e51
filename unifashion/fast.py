"""What makes a finished model faster and leaves its results as they are, to rounding: order in memory, and compiling.

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
from torch import nn

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
    cuda = next(model.parameters()).is_cuda
    return model.to(memory_format=torch.channels_last) if cuda else model


def compile_drawing(model: nn.Module, tell: Callable[[str], None]) -> None:
    """
    Compile what `Denoiser.sample` runs at every step as one graph, on CUDA one that is recorded and replayed, and the VAE's decoder.

    tell  is given a line after the first call of each, which compiles it: minutes, and less where the kernels are kept

    The first call raises UserError where torch cannot compile, as without a C++ compiler.
    """
    kept = _keep_kernels()
    network = torch.compile(model.network, mode="reduce-overhead", dynamic=False)

    def step(*args):
        return network(*args).clone()  # a recorded graph gives every result in the same place

    model.network = _timed(step, "the U-Net", kept, tell)
    model.vae.decode = _timed(torch.compile(model.vae.decode, dynamic=False), "the VAE", kept, tell)


def compile_writing(model: nn.Module, tell: Callable[[str], None]) -> None:
    """As `compile_drawing`, of the LLM: once for the prompt, twice for the steps, then for any number of tokens before them."""
    model.llama.forward = _timed(
        torch.compile(model.llama.forward), "the LLM's prompt", _keep_kernels(), tell
    )


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
