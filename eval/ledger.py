"""What a piece of work holds in memory and computes, by watching every operation: no device needs to be asked."""

import weakref

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry


class Ledger(TorchDispatchMode):
    """While it is on: the bytes of the tensors that are alive, with or without contents, their highest mark, and FLOPs."""

    def __init__(self, known: list[Tensor]) -> None:
        super().__init__()
        self.live = self.peak = self.flops = 0
        self.known: dict[int, weakref.ref] = {}
        for x in known:
            self.see(x)

    def see(self, x: object) -> None:
        if not isinstance(x, Tensor):
            return
        storage = x.untyped_storage()  # which views share, and which autograd keeps alive as Python does
        key, size = storage._cdata, storage.nbytes()
        if key not in self.known:
            self.known[key] = weakref.ref(storage, lambda _: self.gone(key, size))
            self.live += size
            self.peak = max(self.peak, self.live)

    def gone(self, key: int, size: int) -> None:
        del self.known[key]
        self.live -= size

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if count := flop_registry.get(func.overloadpacket):
            self.flops += count(*args, **(kwargs or {}), out_val=out)
        for x in tree_leaves(out):
            self.see(x)
        return out
