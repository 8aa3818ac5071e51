"""What makes a finished model faster and leaves its results as they are, to rounding: order in memory, and compiling.

What is fast in itself is where it is written: fused attention in every component, keys and values of a context once per
picture, guidance as one batch, the LLM's static cache. What a CPU has to be told is in `cpu.py`.
"""

import os
import time
from collections.abc import Callable
from functools import wraps
from pathlib import Path

import torch
from torch import nn

# Kernels that were compiled are kept here from run to run; /tmp, where torch keeps them, is emptied
CACHE = Path("~/.cache/unifashion/kernels").expanduser()


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
    """
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(CACHE))
    network = torch.compile(model.network, mode="reduce-overhead", dynamic=False)

    def step(*args):
        return network(*args).clone()  # a recorded graph gives every result in the same place

    model.network = _timed(step, "the U-Net", tell)
    model.vae.decode = _timed(torch.compile(model.vae.decode, dynamic=False), "the VAE", tell)


def compile_writing(model: nn.Module, tell: Callable[[str], None]) -> None:
    """Compile the LLM: once for the prompt, twice for the steps, the second time for any number of tokens before them."""
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(CACHE))
    model.llama.forward = _timed(torch.compile(model.llama.forward), "the LLM's prompt", tell)


def _timed(function: Callable, name: str, tell: Callable[[str], None]) -> Callable:
    """`function`, of whose first call the time is told."""
    told = False

    @wraps(function)
    def call(*args, **kwargs):
        nonlocal told
        start = time.perf_counter()
        result = function(*args, **kwargs)
        if not told:
            told = True
            kept = os.environ["TORCHINDUCTOR_CACHE_DIR"]
            tell(f"compiled {name} in {time.perf_counter() - start:.0f} s; the kernels are kept in {kept}")
        return result

    return call
