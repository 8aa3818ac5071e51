"""FID's InceptionV3 against pytorch-fid's (golden `inception`), and the table that reads its published weights.

The golden: pytorch-fid 0.3.0's `fid_inception_v3` (torchvision 0.29.1's Inception3 with its patches) in float64, with the
weights that `numbers` makes from each tensor's name, on uniform pictures of -1..1: `RandomState(0)`, 2 of 107x131, small but
of two pixels at the end each way, and not square; `RandomState(1)`, 1 of 299x299. Of every block the first picture's every
32nd channel is kept, in which each branch has some; of the mean everything.
"""

import re
import zlib
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from eval.metrics import inception as module
from eval.metrics.inception import InceptionV3
from tests import goldens
from tests.faults import plant
from tests.parity import assert_parity, swap
from tests.published import published
from unifashion import UserError
from weights import inception as table
from weights.inception import FILES, INCEPTION, load_inception
from weights.rename import Table, load_into

BLOCKS = ["5b", "5c", "5d", "6a", "6b", "6c", "6d", "6e", "7a", "7b", "7c"]


def test_every_block_equals_pytorch_fid():
    compare(network())


def test_a_picture_of_full_size_equals_pytorch_fid():
    assert_parity(network()(pictures(1, 1, 299, 299)), goldens.load("inception").outputs["pool3_299"])


def test_the_network_is_the_published_file():
    for whole in (True, False):  # pytorch-fid's edition, and torch-fidelity's, which has no counters
        names = {k: v for k, v in published("pt_inception_2015_12_05").items() if whole or "batches" not in k}
        assert len(names) == (566 if whole else 472)
        with torch.device("meta"):
            ours = InceptionV3()
        load_into(ours, names, INCEPTION)
        assert sum(t.numel() for t in ours.state_dict().values()) + 1008 * 2049 == 23_885_392


@pytest.mark.parametrize("name", FILES)
def test_a_file_is_loaded(name: str, tmp_path: Path):
    torch.save({k: v.float() for k, v in weights().items()}, tmp_path / name)
    ours = InceptionV3()
    load_inception(ours, tmp_path)
    with torch.no_grad():
        assert_parity(
            ours(pictures(0, 2, 107, 131).float()), goldens.load("inception").outputs["pool3"], 1e-4
        )


def test_a_missing_file_is_told_with_where_to_get_it(tmp_path: Path):
    with pytest.raises(UserError, match=re.escape(f"{tmp_path / FILES[0]} is missing") + ".*github.*pytorch"):
        load_inception(InceptionV3(), tmp_path)


def test_a_damaged_file_and_another_network_are_refused(tmp_path: Path):
    path, ours = tmp_path / FILES[0], InceptionV3()
    path.write_bytes(b"PK\3\4 not all of it")
    with pytest.raises(UserError, match=re.escape(str(path)) + ": damaged"):
        load_inception(ours, tmp_path)
    torchvisions = weights() | {"AuxLogits.conv0.conv.weight": torch.zeros(128, 768, 1, 1)}
    torch.save(torchvisions, path)
    with pytest.raises(UserError, match="not FID's Inception: AuxLogits.conv0.conv.weight: no row"):
        load_inception(ours, tmp_path)
    torch.save({k: v for k, v in weights().items() if k != "Mixed_6c.branch_pool.bn.bias"}, path)
    with pytest.raises(
        UserError, match="not FID's Inception: the checkpoint lacks Mixed_6c.branch_pool.bn.bias"
    ):
        load_inception(ours, tmp_path)


CODE_FAULTS = {
    "the padding's zeros counted": ("one_step", "count_include_pad=False", "count_include_pad=True"),
    "a mean in the last block": ("BLOCKS", 'e("max")]', 'e("mean")]'),
    "a maximum in the block before, too": ("BLOCKS", 'e("mean"), ', 'e("max"), '),
    "PyTorch's eps": ("Norm.forward", "eps=1e-3", "eps=1e-5"),
    "eps ten times": ("Norm.forward", "eps=1e-3", "eps=1e-2"),
    "no ReLU": ("Convolution.forward", "F.relu(self.norm(self.conv(x)))", "self.norm(self.conv(x))"),
    "statistics of the batch": ("Norm.forward", "self.bias, eps", "self.bias, training=True, eps"),
    "no bias": ("Norm.forward", "self.bias, eps", "None, eps"),
    "the fork the other way round": ("e", "3x3, 384 1x3 | 384 3x1", "3x3, 384 3x1 | 384 1x3"),
    "rows and columns of a long kernel": ("c", "{inner} 1x7, 192 7x1", "{inner} 7x1, 192 1x7"),
    "a stem that pads": ("STEM", "80 1x1, 192 3x3/1", "80 1x1, 192 3x3"),
}  # fmt: skip

TABLE_FAULTS = {
    "asymmetric kernels exchanged": ("blocks.4.2.1.", "blocks.4.2.3."),
    "blocks of one shape exchanged": ("blocks.5.", "blocks.6."),
    "weight and bias of the norm": ("0.norm.weight", "0.norm.bias"),
    "branches of one shape exchanged": ("blocks.7.0.0.", "blocks.7.3.1."),
}


@pytest.mark.parametrize("fault", CODE_FAULTS)
def test_parity_notices(fault: str, monkeypatch: pytest.MonkeyPatch):
    plant(monkeypatch, module, *CODE_FAULTS[fault])
    with pytest.raises((AssertionError, UserError), match="max difference|is not|: shape .* in the model"):
        compare(network())


@pytest.mark.parametrize("fault", TABLE_FAULTS)
def test_parity_notices_in_the_table(fault: str):
    with pytest.raises(AssertionError, match="max difference"):
        compare(network(swap(INCEPTION, *TABLE_FAULTS[fault])))


# helpers


@torch.no_grad()
def compare(ours: InceptionV3) -> None:
    golden, x = goldens.load("inception"), pictures(0, 2, 107, 131)
    h = ours.stem(x)
    for name, block in zip(BLOCKS, ours.blocks, strict=True):
        h = block(h)
        assert_parity(h[:1, ::32], golden.outputs[f"Mixed_{name}"])
    assert_parity(ours(x), golden.outputs["pool3"])


def network(rows: Table = table.INCEPTION) -> InceptionV3:
    ours = module.InceptionV3().double()
    load_into(ours, weights(), rows)
    return ours


@cache
def weights() -> dict[str, Tensor]:
    return {
        name: torch.zeros((), dtype=torch.int64) if "batches" in name else numbers(name, tuple(t.shape))
        for name, t in published("pt_inception_2015_12_05").items()
    }


def numbers(name: str, shape: tuple[int, ...]) -> Tensor:
    noise = np.random.RandomState(zlib.crc32(name.encode())).standard_normal(shape)
    if name.endswith("running_var"):
        noise = 1 + 0.25 * np.abs(noise)
    elif len(shape) == 4:
        noise = noise * (2 / np.prod(shape[1:])) ** 0.5
    elif name.endswith("bn.weight"):
        noise = 1 + 0.25 * noise
    else:
        noise = 0.2 * noise
    return torch.from_numpy(noise)


def pictures(seed: int, *shape: int) -> Tensor:
    return torch.from_numpy(np.random.RandomState(seed).uniform(-1, 1, (shape[0], 3, *shape[1:])))
