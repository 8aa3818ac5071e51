"""LoRA (arXiv 2106.09685): a frozen matrix learns through a low-rank product beside it.

y = W x + alpha / rank * B A dropout(x)        A (rank,in) random, B (out,rank) zero: nothing changes before training

inject(llama, cfg)    beside every linear layer of the decoder but lm_head, once the base weights are loaded
merge, unmerge        B A into W and out again: merged, it costs no time
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from unifashion import UserError


@dataclass(frozen=True)
class LoRAConfig:
    rank: int = 128
    alpha: float = 256.0
    dropout: float = 0.05

    def __post_init__(self) -> None:
        if self.rank < 1 or not 0 <= self.dropout < 1:
            raise ValueError(f"rank {self.rank} must be at least 1, dropout {self.dropout} within [0,1)")


class LoRALinear(nn.Module):
    """`base`, a linear layer without bias, whose weight it takes over, with A and B beside it in float32."""

    def __init__(self, base: nn.Linear, cfg: LoRAConfig) -> None:
        super().__init__()
        if base.bias is not None:
            raise ValueError("a linear layer with a bias: Llama has none")
        self.scale, self.dropout, self.merged = cfg.alpha / cfg.rank, cfg.dropout, False
        self.weight = base.weight
        like = {"device": base.weight.device, "dtype": torch.promote_types(base.weight.dtype, torch.float32)}
        self.lora_a = nn.Parameter(torch.empty(cfg.rank, base.in_features, **like))
        self.lora_b = nn.Parameter(torch.zeros(base.out_features, cfg.rank, **like))
        nn.init.kaiming_uniform_(self.lora_a, a=5**0.5)
        self.train(base.training)

    def forward(self, x: Tensor) -> Tensor:
        """x (...,in) -> (...,out): W x + alpha / rank * B A x, computed in x's dtype, whatever that of A and B."""
        y = F.linear(x, self.weight)
        if self.merged:
            return y
        x = F.dropout(x, self.dropout, self.training)
        return y + self.scale * F.linear(F.linear(x, self.lora_a.to(x.dtype)), self.lora_b.to(x.dtype))


def inject(llama: nn.Module, cfg: LoRAConfig) -> None:
    """Replace the linear layers in `llama.layers`: their weights keep names and values. Raises ValueError if it was done."""
    if any(_adapted(llama)):
        raise ValueError("LoRA is there already")
    layers = [(name, m) for name, m in llama.layers.named_modules() if isinstance(m, nn.Linear)]
    for name, linear in layers:
        parent, _, leaf = name.rpartition(".")
        setattr(llama.layers.get_submodule(parent), leaf, LoRALinear(linear, cfg))


@torch.no_grad()
def merge(llama: nn.Module) -> None:
    """W <- W + alpha / rank * B A, added in float32 and rounded once. A and B stay."""
    _add(llama, 1.0)


@torch.no_grad()
def unmerge(llama: nn.Module) -> None:
    """Undo `merge`, up to the rounding of W's dtype."""
    _add(llama, -1.0)


def adapter_state(llama: nn.Module) -> dict[str, Tensor]:
    """Exactly the adapter's tensors: {"layers.0.attn.q.lora_a": (rank,in), "layers.0.attn.q.lora_b": (out,rank), ...}."""
    return {name: x for name, x in llama.state_dict().items() if name.endswith((".lora_a", ".lora_b"))}


def load_adapter(llama: nn.Module, tensors: dict[str, Tensor]) -> None:
    """Copy what `adapter_state` gave into `llama`. Raises UserError, naming the tensor, unless names and shapes are the same."""
    if any(m.merged for m in _adapted(llama)):
        raise ValueError("LoRA is merged: what is within W would stay there")
    own = adapter_state(llama)
    if odd := sorted(own.keys() ^ tensors.keys()):
        kind = "is missing" if odd[0] in own else "is no matrix of this adapter"
        raise UserError(f"{odd[0]} {kind} ({len(odd)} such)")
    for name, tensor in tensors.items():
        if tensor.shape != own[name].shape:
            raise UserError(f"{name}: shape {tuple(tensor.shape)}, wanted {tuple(own[name].shape)}")
    for name, tensor in tensors.items():
        own[name].copy_(tensor)


def _adapted(llama: nn.Module) -> Iterator[LoRALinear]:
    return (m for m in llama.modules() if isinstance(m, LoRALinear))


def _add(llama: nn.Module, sign: float) -> None:
    for m in _adapted(llama):
        if m.merged == (sign > 0):
            raise ValueError("LoRA is merged already" if m.merged else "LoRA is not merged")
        wide = torch.promote_types(m.weight.dtype, torch.float32)
        product = m.lora_b.to(wide) @ m.lora_a.to(wide)
        m.weight.copy_(m.weight.to(wide) + sign * m.scale * product)
        m.merged = sign > 0
