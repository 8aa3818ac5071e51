"""What test files share through pytest."""

from collections.abc import Iterator

import pytest
import torch


@pytest.fixture(autouse=True)
def fused_attention() -> Iterator[None]:
    """What trains in bfloat16 turns it off for its process, which here is that of the other tests, too."""
    yield
    torch.backends.cuda.enable_flash_sdp(True)


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """Small networks gain nothing by more threads, and wait for them on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
