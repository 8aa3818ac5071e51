"""BLEU-1 to 4 of a corpus (Papineni et al., 2002), number for number as pycocoevalcap 1.2 computes it.

    counts(caption, references)  of each caption; sum them, of all or of a bootstrap's draw; bleu(sum)

    geometric mean of the n-gram precisions, n = 1..4, times exp(1 - r/h) where the captions are shorter than the references

Everything is summed over the corpus before it is divided: `counts` of each caption, `bleu` of their sum. A caption's n-gram
counts as often as the one reference that has it most often, r adds up the reference length nearest to each caption's. The
two guards are pycocoevalcap's: with them no match at all is nearly 0, and perfection not quite 1 (0.99999999997).
"""

from collections import Counter

import numpy as np

N = 4
TINY, SMALL = 1e-15, 1e-9


def counts(caption: list[str], references: list[list[str]], shortest: bool = False) -> np.ndarray:
    """Words of one caption: matches of n = 1..4, n-grams of n = 1..4, its length, a reference's -> (10,).

    The reference's length is the nearest one, the shorter of equally near ones; or the shortest, which `nmt_bleu` wants.
    """
    matches, total = [], []
    for n in range(1, N + 1):
        most = Counter()  # n-gram -> how often the reference has it that has it most often
        for reference in references:
            most |= ngrams(reference, n)
        own = ngrams(caption, n)
        matches.append((own & most).total())
        total.append(own.total())
    h = len(caption)
    lengths = [len(reference) for reference in references]
    r = min(lengths) if shortest else min(lengths, key=lambda length: (abs(length - h), length))
    return np.array([*matches, *total, h, r], float)


def ngrams(sentence: list[str], n: int) -> Counter:
    return Counter(tuple(sentence[i : i + n]) for i in range(len(sentence) - n + 1))


def bleu(counted: np.ndarray) -> np.ndarray:
    """counted (...,10), `counts` or their sum -> BLEU-1..4 (...,4), from 0 to 1."""
    matches, total, h, r = np.split(counted, (N, 2 * N, 2 * N + 1), axis=-1)
    precision = np.cumprod((matches + TINY) / (total + SMALL), axis=-1) ** (1 / np.arange(1, N + 1))
    return precision * np.exp(np.minimum(0, 1 - (r + SMALL) / (h + TINY)))


def nmt_bleu(counted: np.ndarray) -> np.ndarray:
    """counted (...,10), `counts` with the shortest references or their sum -> BLEU-4 (...,); 0 if any n has no match."""
    matches, total, h, r = np.split(counted, (N, 2 * N, 2 * N + 1), axis=-1)
    with np.errstate(divide="ignore"):  # log 0 is -inf, exp of that 0
        precision = np.log(matches / np.maximum(total, 1)).mean(-1)
        return np.exp(precision + np.minimum(0, 1 - r / np.maximum(h, 1))[..., 0])
