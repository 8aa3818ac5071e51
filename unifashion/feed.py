"""From a data set to batches: what is held out, in which order samples come, what is kept of them, what is left out.

An order is a function of (seed, epoch) alone, over the batches of all processes, so that a run that is resumed, and one on
another number of processes, sees the same batches.
"""

import itertools
import signal
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from unifashion import UserError, parallel
from unifashion.training import seeded, send

GROUP = 16  # samples that are encoded together for the cache
GRAIN = 8  # texts are cut to a multiple of so many tokens: few shapes, little padding


def held_out(names: list[str], every: int = 40) -> tuple[list[int], list[int]]:
    """Sample indices for training, and those held out to choose `best` by: whole products, one in `every`."""
    hold = [zlib.crc32(name.encode()) % every == 0 for name in names]
    if sum(hold) < 2:  # a very small data set
        few = sorted(set(names))[-2:]
        hold = [name in few for name in names]
    return [i for i, h in enumerate(hold) if not h], [i for i, h in enumerate(hold) if h]


def batch_order(n: int, batch: int, seed: int, start: int, stop: int) -> Iterator[list[int]]:
    """The sample indices of steps start..stop-1: a new permutation every epoch, the last short batch left out."""
    if n < batch:
        raise UserError(f"the data set has {n} samples, fewer than one batch of {batch}")
    per_epoch = n // batch
    order: Tensor | None = None
    for step in range(start, stop):
        epoch, i = divmod(step, per_epoch)
        if order is None or i == 0:
            order = torch.randperm(n, generator=seeded("order", seed, epoch))
        yield order[i * batch : (i + 1) * batch].tolist()


class Readable(Dataset):
    """
    The samples `indices` of `data`, or all, with their index; in place of one that cannot be read, the next of these that can.

    What was replaced is a line of `log` (RUN/skipped.txt, of phase 2 skipped.TASK.txt), once; a run that goes on begins it anew,
    since pictures may have been mended. More than 1 % of the samples stop the run, unless `allow`: UserError. A process that
    reads (a DataLoader's worker) knows of the others by the log.
    """

    def __init__(self, data: Dataset, log: Path, allow: bool, indices: list[int] | None = None) -> None:
        self.data, self.log, self.allow = data, log, allow
        self.indices = list(range(len(data))) if indices is None else indices

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, i: int) -> dict[str, Tensor]:
        for j in range(len(self)):
            at = self.indices[(i + j) % len(self)]
            try:
                return {**self.data[at], "index": torch.tensor(at)}
            except UserError as error:
                self._skip(at, str(error))
        raise UserError("not one sample can be read")

    def _skip(self, i: int, why: str) -> None:
        line = f"{i}\t{' '.join(why.split())}"
        try:
            known = set(self.log.read_text().splitlines()) if self.log.exists() else set()
            if line not in known:
                self.log.parent.mkdir(parents=True, exist_ok=True)
                with open(self.log, "a") as file:
                    file.write(line + "\n")
        except OSError as error:  # of one in a process that reads only the words would arrive
            raise UserError(f"{self.log} cannot be written ({error.strerror})") from None
        bad = {line.partition("\t")[0] for line in known | {line}}
        check_share(len(bad), len(self.data), f"{why}; {self.log} names all", self.allow)


def check_share(bad: int, of: int, example: str, allow: bool) -> None:
    """Raise UserError if more than 1 % of the samples are missing or broken."""
    if bad > 0.01 * of and not allow:
        raise UserError(
            f"{bad} of {of} samples are missing or broken, more than 1 % (say --allow-missing to go on): {example}"
        )


def batches(
    samples: Dataset,
    order: Iterator[list[int]],
    encode: Callable[[dict[str, Tensor]], dict[str, Tensor]],
    cache: dict[str, Tensor] | None = None,
    workers: int = 0,
) -> Iterator[dict[str, Tensor]]:
    """
    `samples[i]`, a dict of tensors, collated and passed through the frozen networks by `encode`, for each batch of `order`,
    of which this process takes its share.

    cache  an empty dict: what `encode` says of a sample is kept there, in float16, and the sample is read only once. Right
           where nothing is augmented and the features fit. Samples are then encoded in fixed groups, so that a resumed run
           computes the same bits.
    """
    mine = (parallel.local_rows(torch.tensor(indices)).tolist() for indices in order)

    def read(batches: Iterator[list[int]]) -> DataLoader:
        return DataLoader(samples, batch_sampler=batches, num_workers=workers, worker_init_fn=_ignore_signals)

    if cache is None:
        for batch in read(mine):
            yield encode(shorten(batch))
        return
    known = cache.setdefault("known", torch.zeros(len(samples), dtype=torch.bool))
    mine, ahead = itertools.tee(mine)
    groups, loaded = _new_groups(ahead, known.clone()), None
    del ahead  # once nothing is new, nobody looks ahead, and `mine` need not be remembered
    for indices in mine:
        rows = torch.tensor(indices)
        for first in sorted({i // GROUP * GROUP for i in rows[~known[rows]].tolist()}):
            if loaded is None:  # no process reads where all is known already
                loaded = iter(read(groups))
            features = encode(next(loaded))
            for name, x in features.items():
                x = x.to("cpu", torch.float16 if x.is_floating_point() else x.dtype)
                if x.is_floating_point() and not x.isfinite().all():
                    raise UserError(f"{name} is too large for the cache's float16: leave --cache out")
                if name not in cache:  # pages that no sample has come to yet take no memory
                    cache[name] = torch.empty(len(samples), *x.shape[1:], dtype=x.dtype)
                cache[name][first : first + GROUP] = x
            known[first : first + GROUP] = True
        kept = {name: x[rows] for name, x in cache.items() if name != "known"}
        yield shorten({name: x.float() if x.is_floating_point() else x for name, x in kept.items()})


def _new_groups(batches: Iterator[list[int]], known: Tensor) -> Iterator[list[int]]:
    """The groups that have to be read for `batches`, each once, in the order in which they are wanted. `known` (n,) is changed."""
    for rows in map(torch.tensor, batches):
        for first in sorted({i // GROUP * GROUP for i in rows[~known[rows]].tolist()}):
            known[first : first + GROUP] = True
            yield list(range(first, min(first + GROUP, len(known))))
        if known.all():
            return


def _ignore_signals(_: int) -> None:
    """A process that reads: what asks the whole group to stop (Ctrl-C, `timeout`, a scheduler) is for the one that trains."""

    def once(*_) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)  # the second is from the one that trains

    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, once)


def come_again(draws: int, samples: int) -> bool:
    """Whether a cache pays: it encodes whole groups, and so soon all samples, though a short run draws but a few."""
    return draws > samples


ON_CPU = ("index", "odds")  # is looked at on the CPU: to fetch it from the device would wait for the device


def stream(
    samples: Dataset,
    order: Iterator[list[int]],
    encode: Callable[[dict[str, Tensor]], dict[str, Tensor]],
    device: torch.device,
    cache: dict[str, Tensor] | None = None,
    workers: int = 0,
) -> Iterator[dict[str, Tensor]]:
    """`batches`, on the device but for ON_CPU."""

    def move(batch: dict[str, Tensor]) -> dict[str, Tensor]:
        return {k: v if k in ON_CPU else send(v, device) for k, v in batch.items()}

    return map(move, batches(samples, order, lambda batch: encode(move(batch)), cache, workers))


# The Q-Former's texts, and which of their tokens are real.
TEXT_MASKS = {"ids": "mask", "ways": "ways_mask", "caption_ids": "caption_mask"}


def shorten(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """
    Cut texts to the longest of the batch, rounded up to a multiple of GRAIN. Of the LLM's "after" (b,t) the real tokens end where
    "answer" (b,t) does; of the Q-Former's texts TEXT_MASKS tells.

    The Q-Former's are equally long in every process, since losses gather them. On the CPU: it looks at the numbers.
    """

    def cut(names: tuple[str, ...], longest: int) -> dict[str, Tensor]:
        t = -(-longest // GRAIN) * GRAIN
        return {name: batch[name][..., :t] for name in names}

    shorter = dict(batch)
    if "answer" in batch:
        shorter |= cut(("after", "answer"), longest(batch["answer"]))
    for text, real in TEXT_MASKS.items():
        if text in batch:
            shorter |= cut((text, real), parallel.max_over_processes(longest(batch[real])))
    return shorter


def longest(real: Tensor) -> int:
    """real (...,t) bool -> how many columns there are up to the last True of any row"""
    return int((real * torch.arange(1, real.shape[-1] + 1)).max())
