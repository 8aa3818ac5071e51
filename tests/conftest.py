"""What test files share through pytest."""

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

if "PYTEST_XDIST_WORKER" in os.environ:  # workers that each want all cores wait for each other
    torch.set_num_threads(1)
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # of the processes that tests start


@pytest.fixture(autouse=True)
def torchs_own() -> Iterator[None]:
    """What computes in bfloat16 on a CPU replaces some for its process, which here is that of the other tests, too."""
    own = F.scaled_dot_product_attention, F.conv2d, F.linear
    yield
    F.scaled_dot_product_attention, F.conv2d, F.linear = own


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """Small networks gain nothing by more threads, and wait for them on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from tests.small_runs import furnish  # only for tests that ask for it: it imports both training scripts

    return furnish(tmp_path_factory.mktemp("made"))


@pytest.fixture
def place(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """What `small_runs.furnish` made, in a folder of the test's own; until it ends the tiny preset is MINI."""
    from tests.small_runs import shrink

    shrink(monkeypatch)
    for thing in made.iterdir():
        (tmp_path / thing.name).symlink_to(thing)
    yield tmp_path
    shutil.rmtree(tmp_path)
