"""What a CPU without bfloat16 instructions computes in float32, against torch's own kernels."""

import pytest
import torch
import torch.nn.functional as F

from unifashion import cpu

CPU = torch.device("cpu")


@pytest.fixture
def old(monkeypatch: pytest.MonkeyPatch) -> None:
    """A CPU without AVX512."""
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: False)


def operands() -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(0)
    return tuple(
        torch.randn(shape, generator=generator).bfloat16()
        for shape in ((2, 6, 8, 8), (6, 6, 3, 3), (6,), (40, 6), (6, 6))
    )


def test_convolutions_and_products_are_those_of_float32_rounded_once(old):
    x, conv, bias, rows, matrix = operands()
    own = F.conv2d(x, conv, bias, padding=1), F.linear(rows, matrix, bias)
    cpu.float32_where_faster(CPU, torch.bfloat16)
    ours = F.conv2d(x, conv, bias, padding=1), F.linear(rows, matrix, bias)
    exact = (
        F.conv2d(x.double(), conv.double(), bias.double(), padding=1),
        rows.double() @ matrix.double().T + bias,
    )
    for y, theirs, true in zip(ours, own, exact, strict=True):
        assert y.dtype == torch.bfloat16
        assert torch.equal(y, true.float().bfloat16())
        assert (theirs - y).abs().max() < 0.1 * y.abs().max()
    assert torch.equal(F.conv2d(x, conv), F.conv2d(x.float(), conv.float()).bfloat16())  # without a bias


@pytest.mark.parametrize(("stride", "padding"), [(1, 1), (2, 0), (2, 1), ((2, 1), (0, 2)), (1, 0)])
@pytest.mark.parametrize("band", [1, 300, 700])
def test_in_bands_it_is_the_same_picture(old, monkeypatch, band, stride, padding):
    x, conv, bias, *_ = operands()
    cpu.float32_where_faster(CPU, torch.bfloat16)
    whole = F.conv2d(x, conv, bias, stride, padding)
    monkeypatch.setattr(cpu, "BAND", band)
    with torch.no_grad():
        bands = F.conv2d(x, conv, bias, stride, padding)
    assert bands.shape == whole.shape and bands.dtype == whole.dtype
    assert (bands - whole).abs().max() <= 2**-8 * whole.abs().max()


def test_under_autocast_too_and_gradients_pass(old):
    cpu.float32_where_faster(CPU, torch.bfloat16)
    x, conv, bias, rows, matrix = (x.float().requires_grad_() for x in operands())
    with torch.autocast("cpu", torch.bfloat16):
        y, z = F.conv2d(x, conv, bias), F.linear(rows, matrix, bias)
    assert y.dtype == z.dtype == torch.bfloat16
    (y.float().sum() + z.float().sum()).backward()
    for p in (x, conv, bias, rows, matrix):
        assert p.grad.dtype == torch.float32 and p.grad.any()


def test_what_is_not_in_bfloat16_and_one_token_a_row_is_as_it_was(old):
    own = F.conv2d, F.linear
    cpu.float32_where_faster(CPU, torch.float32)
    cpu.float32_where_faster(torch.device("cuda"), torch.bfloat16)
    assert (F.conv2d, F.linear) == own
    cpu.float32_where_faster(CPU, torch.bfloat16)
    x, conv, _, rows, matrix = operands()
    assert torch.equal(F.conv2d(x.double(), conv.double()), own[0](x.double(), conv.double()))
    token = rows[:, None]
    assert torch.equal(F.linear(token, matrix), own[1](token, matrix))
    assert torch.equal(F.linear(rows[:1], matrix), F.linear(rows, matrix)[:1])  # however many there are


def test_a_cpu_with_avx512_keeps_its_own(monkeypatch):
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: True)
    own = F.conv2d, F.linear
    cpu.float32_where_faster(CPU, torch.bfloat16)
    assert (F.conv2d, F.linear) == own
