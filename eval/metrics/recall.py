"""Recall@K: how often a right answer is among the first K.

A tie is a miss: a right answer stands behind every wrong one that scores as it does, so that a model which gives everything
the same score gets nothing. (UniFashion's code, as SPRC's, leaves ties to an unstable sort.) A query may have several
right answers, and the best of them counts.
"""

from collections.abc import Sequence

import torch
from torch import Tensor


def ranks(scores: Tensor, right: Tensor) -> Tensor:
    """
    scores (b,n) of n candidates for each query, right (b,n) bool -> (b,) the place of the best right one, 1 is first.

    A score that is nan stands before every right one. Raises ValueError for a query without a right answer.
    """
    if not right.any(1).all():
        raise ValueError(f"query {int(right.any(1).int().argmin())} has no right answer")
    best = scores.masked_fill(~right, -torch.inf).amax(1, keepdim=True)
    return 1 + (~right & ~(scores < best)).sum(1)


def hits(ranked: Tensor, at: Sequence[int]) -> Tensor:
    """ranks (...) -> (...,K) float64, 1 where a rank is at most each K of `at`: their mean over queries is Recall@K."""
    return torch.stack([ranked <= k for k in at], -1).double()
