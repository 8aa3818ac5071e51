"""What torch does slowly on a CPU unless it is told. Each holds for the rest of the process."""

import ctypes

import torch
import torch.nn.functional as F
from torch import Tensor

ATTENTION, CONV, LINEAR = F.scaled_dot_product_attention, F.conv2d, F.linear
BAND = 2**23  # numbers of a picture that are float32 at a time, 32 MB


def float32_where_faster(device: torch.device, dtype: torch.dtype) -> None:
    """
    Compute some of what a network in bfloat16, or under autocast to it, does on a CPU in float32, and round the result.

    attention with a gradient        the fused kernel's backward pass takes 3 to 7 times as long in bfloat16, and the plain one,
                                     which writes all weights out, twice as long
    convolutions, matrix products    on a CPU without AVX512 oneDNN has none in bfloat16, and torch's own take 8 to 250 times as
                                     long. Weights are cast layer by layer: in memory they stay bfloat16
    """
    if device.type != "cpu" or dtype != torch.bfloat16:
        return
    F.scaled_dot_product_attention = _attention
    if not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        F.conv2d, F.linear = _conv, _linear


def _attention(q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor | None = None, **how) -> Tensor:
    if not torch.is_grad_enabled():
        return ATTENTION(q, k, v, attn_mask, **how)
    wide = torch.promote_types(q.dtype, torch.float32)
    if attn_mask is not None and attn_mask.is_floating_point():
        attn_mask = attn_mask.to(wide)
    with torch.autocast("cpu", enabled=False):
        return ATTENTION(q.to(wide), k.to(wide), v.to(wide), attn_mask, **how).to(q.dtype)


def _narrow(x: Tensor) -> bool:
    return x.dtype == torch.bfloat16 or (x.dtype == torch.float32 and torch.is_autocast_enabled("cpu"))


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    # For one token a row, as an LLM writes, casting the matrix takes longer than the product.
    if not _narrow(x) or (x.ndim > 2 and x.shape[-2] == 1):
        return LINEAR(x, weight, bias)
    with torch.autocast("cpu", enabled=False):
        return LINEAR(x.float(), weight.float(), bias if bias is None else bias.float()).bfloat16()


def _conv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: int | tuple[int, int] = 1,
    padding: int | tuple[int, int] = 0,
    dilation: int | tuple[int, int] = 1,
    groups: int = 1,
) -> Tensor:
    """Without a gradient in bands of rows: float32 copies of a whole picture in the VAE would take half a gigabyte."""
    if not _narrow(x) or groups > 1 or _pair(dilation) != (1, 1):
        return CONV(x, weight, bias, stride, padding, dilation, groups)
    wide, shift = weight.float(), bias if bias is None else bias.float()
    with torch.autocast("cpu", enabled=False):
        if torch.is_grad_enabled() or x.numel() <= BAND:
            return CONV(x.float(), wide, shift, stride, padding).bfloat16()
        (sy, sx), (py, px), (b, _, h, w), (c, _, ky, kx) = (
            _pair(stride),
            _pair(padding),
            x.shape,
            weight.shape,
        )
        y = torch.empty(b, c, (h + 2 * py - ky) // sy + 1, (w + 2 * px - kx) // sx + 1, dtype=torch.bfloat16)
        rows = max(1, y.shape[2] * BAND // x.numel())
        for start in range(0, y.shape[2], rows):
            out = y[:, :, start : start + rows]
            top = start * sy - py
            bottom = top + (out.shape[2] - 1) * sy + ky
            band = F.pad(x[:, :, max(top, 0) : bottom].float(), (0, 0, max(-top, 0), max(bottom - h, 0)))
            out.copy_(CONV(band, wide, shift, (sy, sx), (0, px)))
        return y


def _pair(x: int | tuple[int, int]) -> tuple[int, int]:
    return (x, x) if isinstance(x, int) else tuple(x)


def fast_malloc() -> None:
    """Let glibc keep its memory: giving it back and faulting it in again made a small training step up to 9x slower."""
    try:
        libc = ctypes.CDLL("libc.so.6")
    except OSError:
        return  # not glibc
    m_trim_threshold, m_top_pad, m_mmap_max = -1, -2, -4
    libc.mallopt(m_mmap_max, 0)
    libc.mallopt(m_trim_threshold, 2**31 - 1)
    libc.mallopt(m_top_pad, 1 << 29)
