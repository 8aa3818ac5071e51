"""One process or several: who is who, what they tell each other, and what is cut into shards.

`torchrun --nproc-per-node N train_phase1.py ...` starts N processes, each with its share of every batch. What is written
here makes their steps those of one process with the whole batch:

    a loss that compares samples (ITC)     every process has all samples (`gather`) and computes the same loss
    a loss that is a mean over samples     every process has the mean over its own; the mean of these is the loss
    gradients                              `average`, after backward: what is exact for both

DistributedDataParallel hides this behind one backward pass a step. Here each loss has its own, since each is clipped on its own
(`training.backward_apart`), so the averaging is written out. With one process everything here is the identity.
"""

import os
from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, distribute_tensor

from unifashion import UserError


def join(device: torch.device) -> torch.device:
    """Meet the other processes, if torchrun started this one. -> the device of this process, its own GPU if there are any."""
    if "WORLD_SIZE" not in os.environ:
        return device
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    if not dist.is_initialized():
        # Flags go over the CPU: to ask for them waits for no GPU.
        dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo")
    return device


def leave() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def world() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def barrier() -> None:
    if world() > 1:
        dist.barrier()


def share(batch: int) -> int:
    """How many samples of a batch this process has. Raises UserError unless all have the same number."""
    if batch % world():
        raise UserError(f"a batch of {batch} does not divide among {world()} processes")
    return batch // world()


def own(x: Tensor) -> Tensor:
    """x (b,...) of all processes -> the rows (b/world,...) of this one."""
    return x.chunk(world())[rank()]


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        parts = [torch.empty_like(x) for _ in range(world())]
        dist.all_gather(parts, x.contiguous())
        return torch.cat(parts)

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:
        # Each process computed the whole loss, and `average` will divide by their number: so this is the sum.
        grad = grad.contiguous()
        dist.all_reduce(grad)
        return own(grad)


def gather(x: Tensor) -> Tensor:
    """x (b,...) -> that of all processes (world b,...), in their order, with gradient."""
    if world() == 1:
        return x
    if x.dtype == torch.bool:  # gloo has no collectives on bool
        return _Gather.apply(x.to(torch.uint8)).bool()
    return _Gather.apply(x)


def average(tensors: list[Tensor]) -> None:
    """In place, the mean over the processes. Shards are left: their reduction was part of the backward pass."""
    tensors = [x for x in tensors if not isinstance(x, DTensor)]
    if world() == 1 or not tensors:
        return
    flat = torch.cat([x.flatten() for x in tensors])  # one message instead of hundreds
    dist.all_reduce(flat)
    flat /= world()
    for x, mean in zip(tensors, flat.split([x.numel() for x in tensors]), strict=True):
        x.copy_(mean.view_as(x))


def mean(x: Tensor) -> Tensor:
    """x, the same shape in every process -> the mean over them, detached."""
    x = x.detach().clone()
    if world() > 1:
        dist.all_reduce(x)
        x /= world()
    return x


def norm(tensors: Iterable[Tensor]) -> Tensor:
    """The norm of all of them as one vector, the same in every process; shards count as the whole they are of."""
    squares, sharded = [], []
    for x in tensors:
        (sharded if isinstance(x, DTensor) else squares).append(x)
    total = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(squares))) ** 2 if squares else 0.0
    if sharded:
        local = torch.stack(torch._foreach_norm([x.to_local() for x in sharded])) ** 2
        local = local.sum()
        dist.all_reduce(local)
        total = total + local
    return total**0.5


def anywhere(asked: bool) -> bool:
    """Whether any process says so."""
    if world() == 1:
        return asked
    flag = torch.tensor(float(asked))
    dist.all_reduce(flag, dist.ReduceOp.MAX)
    return bool(flag)


def whole(x: Tensor) -> Tensor:
    """A tensor as one process would have it. With shards, every process must ask."""
    return x.full_tensor() if isinstance(x, DTensor) else x


def local(x: Tensor) -> Tensor:
    """The shard that is here, or x."""
    return x.to_local() if isinstance(x, DTensor) else x


def like(x: Tensor, target: Tensor) -> Tensor:
    """A whole tensor, placed, typed and cut as `target` is."""
    x = x.to(target.device, target.dtype)
    return distribute_tensor(x, target.device_mesh, target.placements) if isinstance(target, DTensor) else x


def shard(units: Iterable[nn.Module], methods: tuple[str, ...] = ()) -> None:
    """
    Cut the parameters of each module among the processes (FSDP2): it is whole only while it runs.

    None of `units` may be within another: their parts are also called from outside of the networks' forward (keys and values
    of a context, embeddings, logits), which FSDP's usual one root would not see. `methods` are those other than forward that
    units are called by. LoRA's matrices stay whole in every process: they are small, and of another type than what is frozen.
    """
    for unit in units:
        lora = {p for name, p in unit.named_parameters() if name.endswith((".lora_a", ".lora_b"))}
        sharded = fully_shard(unit, reshard_after_forward=True, ignored_params=lora)
        if next(unit.parameters()).device.type == "cpu":  # gloo cannot average, only sum
            sharded.set_force_sum_reduction_for_comms(True)
        for name in methods:
            if hasattr(unit, name):
                register_fsdp_forward_method(unit, name)
