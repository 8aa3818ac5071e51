"""BLEU-1 to 4 of a corpus (Papineni et al., 2002), number for number as pycocoevalcap 1.2 computes it.

    geometric mean of the n-gram precisions, n = 1..4, times exp(1 - r/h) where the captions are shorter than the references

Everything is summed over the corpus before it is divided: `counts` of each caption, `bleu` of their sum. A caption's n-gram
counts as often as the one reference that has it most often, r adds up the reference length nearest to each caption's. The
two guards are pycocoevalcap's: with them no match at all is nearly 0, and perfection not quite 1 (0.99999999997).
"""

import re
from collections import Counter

import numpy as np

N = 4
TINY, SMALL = 1e-15, 1e-9
WORD = re.compile(
    r"(?:[^\W\d_]\.){2,}"  # a.p.c.
    r"|\w+?(?=n't\b)|n't\b|'(?:s|re|ve|ll|d|m)\b"  # does n't, it 's
    r"|\w+(?:[-./]\w+)*"  # v-neck, 45.50, navy/white
    r"|[&%$|]"
)


def words(text: str) -> list[str]:
    """
    Lower-case words, punctuation dropped: "A v-neck, in red." -> a v-neck in red.

    Not PTBTokenizer, which is Java, but alike in what captions are made of. It differs in brackets, which PTBTokenizer keeps
    as words (-lrb-), in # and @, and in a slash that joins nothing ("w/ lace"); there its BLEU would be another.
    """
    return WORD.findall(text.lower().replace("’", "'"))


def counts(caption: list[str], references: list[list[str]]) -> np.ndarray:
    """Of one caption: matches of n = 1..4, n-grams of n = 1..4, its length, the nearest reference's length -> (10,)."""
    matches, total = [], []
    for n in range(1, N + 1):
        most = Counter()  # n-gram -> how often the reference has it that has it most often
        for reference in references:
            most |= ngrams(reference, n)
        own = ngrams(caption, n)
        matches.append((own & most).total())
        total.append(own.total())
    h = len(caption)
    r = min((abs(len(reference) - h), len(reference)) for reference in references)[1]
    return np.array([*matches, *total, h, r], float)


def ngrams(sentence: list[str], n: int) -> Counter:
    return Counter(tuple(sentence[i : i + n]) for i in range(len(sentence) - n + 1))


def bleu(counted: np.ndarray) -> np.ndarray:
    """counted (...,10), `counts` or their sum -> BLEU-1..4 (...,4), from 0 to 1."""
    matches, total, h, r = np.split(counted, (N, 2 * N, 2 * N + 1), axis=-1)
    precision = np.cumprod((matches + TINY) / (total + SMALL), axis=-1) ** (1 / np.arange(1, N + 1))
    return precision * np.exp(np.minimum(0, 1 - (r + SMALL) / (h + TINY)))
