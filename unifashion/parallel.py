"""One process or several: who is who, what they tell each other, and what is cut into shards.

`torchrun --nproc-per-node N train_phase1.py ...` starts N processes, each with its share of every batch. What is written
here makes their steps those of one process with the whole batch:

    a loss that compares samples (ITC)     every process has all samples (`gather`) and computes the same loss
    a loss that is a mean over samples     every process has the mean over its own; the mean of these is the loss
    gradients                              `average`, after backward: what is exact for both

DistributedDataParallel hides this behind one backward pass a step. Here each loss has its own, since each is clipped on its own
(`training.clipped_backward`), so the averaging is written out. With one process everything here is the identity.
"""

import os
import sys
import time
from collections.abc import Iterable
from contextlib import suppress
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor, nn

from unifashion import UserError

_notes: dist.Store | None = None  # what the processes leave for each other beside the collectives


def join(device: torch.device) -> torch.device:
    """Meet the other processes, if torchrun started this one. -> the device of this process, its own GPU if there are any."""
    if "WORLD_SIZE" not in os.environ:
        return device
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    if not dist.is_initialized():
        meet()
        # Imported later, as torch itself does, its functions' defaults would keep the group and gloo's threads to the end of
        # the process, which aborts if one of them lets go of a tensor only then.
        from torch.distributed.nn import functional  # noqa: F401

        # Flags go over the CPU: to ask for them waits for no GPU.
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
        dist.init_process_group(backend, store=_notes, rank=rank, world_size=world)
    return device


def meet() -> None:
    """Reach the store in which the processes that torchrun started leave notes: what goes wrong before `join` is told once, too."""
    global _notes
    if "WORLD_SIZE" in os.environ and _notes is None:
        _notes, *_ = next(dist.rendezvous("env://"))


def sharded(x: Tensor) -> bool:
    """Whether x is a DTensor, of which here is a shard. To import the class would take half as long as to import torch."""
    return hasattr(x, "full_tensor")


def leave() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()
        time.sleep(0.1)  # shards' cached meshes keep the group all the same: let its threads let go


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def world() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def barrier(error: UserError | None = None) -> None:
    """Wait for all processes. An error of any is raised in every one: none is left waiting for one that is gone."""
    errors = [error and str(error)]
    if world() > 1:
        errors *= world()
        dist.all_gather_object(errors, errors[0])
    for told in filter(None, errors):
        raise UserError(told)


def print_error_once(error: str) -> None:
    """
    Print what ends the run, in the first process that meets an error. The others wait until it has printed, since torchrun
    ends all processes as soon as one has left.
    """
    first = _notes is None
    with suppress(RuntimeError):  # of a store that is gone, with the process that kept it and told
        if _notes is not None:
            first = _notes.add("errors", 1) == 1
            if not first:
                _notes.wait(["told"], timedelta(seconds=10))
    if first:  # the first process's progress bar may still stand on the line
        print("\n" * (rank() > 0) + error, file=sys.stderr, flush=True)
        if _notes is not None:
            _notes.set("told", "")


def another_failed() -> bool:
    """Whether another process has printed an error: then what fails here now is only that the other is gone."""
    with suppress(RuntimeError):
        return _notes is not None and _notes.add("errors", 0) > 0
    return True  # the one that kept the notes is gone, too


def share(batch: int) -> int:
    """How many samples of a batch this process has. Raises UserError unless all have the same number."""
    if batch % world():
        raise UserError(f"a batch of {batch} does not divide among {world()} processes")
    return batch // world()


def val_batch(batch: int, n: int) -> int:
    """How many of n held-out samples each process evaluates at a time, at most its share of a batch. UserError if that is none."""
    if n < world():
        raise UserError(f"{n} samples are held out, too few for {world()} processes")
    return min(batch, n) // world()


def local_rows(x: Tensor) -> Tensor:
    """x (b,...), the batch of all processes -> the rows (b/world,...) of this one."""
    return x.chunk(world())[rank()]


def rank_seed(seed: int) -> int:
    """A seed of this process, for dropout: `seed` itself in the first, or only, process."""
    return seed + (rank() << 33)


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        parts = [torch.empty_like(x) for _ in range(world())]
        dist.all_gather(parts, x.contiguous())
        return torch.cat(parts)

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:
        # Each process computed the whole loss, and `average` will divide by their number: so this is the sum.
        grad = grad.clone(memory_format=torch.contiguous_format)  # it may be another's, too
        dist.all_reduce(grad)
        return local_rows(grad)


def gather(x: Tensor) -> Tensor:
    """x (b,...) -> that of all processes (world b,...), in their order, with gradient."""
    if world() == 1:
        return x
    if x.dtype == torch.bool:  # gloo has no collectives on bool
        return _Gather.apply(x.to(torch.uint8)).bool()
    return _Gather.apply(x)


def broadcast_(tensors: Iterable[Tensor]) -> None:
    """In place, the first process's values in all: random initialisation is equal by its seed only on equal devices."""
    if world() > 1:
        for x in tensors:
            plain = x.detach().contiguous()
            dist.broadcast(plain, 0)
            x.data.copy_(plain)


def average(tensors: list[Tensor]) -> None:
    """In place, the mean over the processes. Shards are left: their reduction was part of the backward pass."""
    tensors = [x for x in tensors if not sharded(x)]
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
    plain, shards = [], []
    for x in tensors:
        (shards if sharded(x) else plain).append(local(x))
    total = torch.stack(torch._foreach_norm(plain)).square().sum() if plain else 0.0
    if shards:
        squares = torch.stack(torch._foreach_norm(shards)).square().sum()
        dist.all_reduce(squares)
        total = total + squares
    return total**0.5


def any_process(flag: bool) -> bool:
    """Whether `flag` is True in any process."""
    if world() == 1:
        return flag
    flag = torch.tensor(float(flag))
    dist.all_reduce(flag, dist.ReduceOp.MAX)
    return bool(flag)


def max_over_processes(n: int) -> int:
    if world() == 1:
        return n
    n = torch.tensor(n)
    dist.all_reduce(n, dist.ReduceOp.MAX)
    return int(n)


def whole(x: Tensor) -> Tensor:
    """A tensor as one process would have it. With shards, every process must ask."""
    return x.full_tensor() if sharded(x) else x


def local(x: Tensor) -> Tensor:
    """The shard that is here, or x."""
    return x.to_local() if sharded(x) else x


def like(x: Tensor, target: Tensor) -> Tensor:
    """A whole tensor, placed, typed and cut as `target` is."""
    if not sharded(target):
        return torch.empty_like(target).copy_(x)  # in its memory format, too
    from torch.distributed.tensor import distribute_tensor

    x = x.to(target.device, target.dtype)
    return distribute_tensor(x, target.device_mesh, target.placements)


def shard(units: Iterable[nn.Module]) -> None:
    """
    Cut the parameters of each module among the processes (FSDP2): it is whole only while it runs.

    None of `units` may be within another: their parts are also called from outside of the networks' forward (keys and values
    of a context, embeddings, logits), which FSDP's usual one root would not see. LoRA's matrices stay whole in every process:
    they are small, and of another type than what is frozen.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

    mesh = None
    for unit in units:
        device = next(unit.parameters()).device
        mesh = mesh or init_device_mesh(device.type, (world(),))
        lora = {p for name, p in unit.named_parameters() if name.endswith((".lora_a", ".lora_b"))}
        cut = fully_shard(unit, mesh=mesh, reshard_after_forward=True, ignored_params=lora)
        if device.type == "cpu":  # gloo cannot average, only sum
            cut.set_force_sum_reduction_for_comms(True)
        if hasattr(unit, "kv"):  # keys and values of a context, computed once, outside of forward
            register_fsdp_forward_method(unit, "kv")
