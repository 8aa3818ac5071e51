"""CIDEr-D of captions (Vedantam et al., 2015), number for number what pycocoevalcap 1.2 calls CIDEr.

    of each n = 1..4   a text's n-grams as a vector, their counts times log(captions / captions whose references have it)
    similarity         of caption c and reference r:  sum min(c, r) r / (|c| |r|) * exp(-(words of c - words of r)² / 2 sigma²)
    score              10 * its mean over n and over the references

From 0 to 10; fashion's papers print 100 times that (169.5 is 1.695). How rare an n-gram is comes from the references that
are passed in: another set of pictures, another score, and of a single picture always 0. A corpus's is the mean of its
captions', which a bootstrap draws from with the rarity of the whole.
"""

from itertools import chain

import numpy as np

N = 4


def cider_d(captions: list[list[str]], references: list[list[list[str]]], sigma: float = 6.0) -> np.ndarray:
    """Words of b captions, and of one or more references each -> (b,) float64. Raises ValueError if one has no reference."""
    each = np.array([len(group) for group in references])
    if len(captions) != len(each) or not each.all():
        raise ValueError("each caption needs a reference")
    b = len(captions)
    texts = [*captions, *chain.from_iterable(references)]
    owner = np.repeat(np.arange(b), each)  # of each reference: its caption
    ids: dict[str, int] = {}
    words = np.array([ids.setdefault(word, len(ids)) for text in texts for word in text], dtype=np.int64)
    lengths = np.array([len(text) for text in texts])
    text_of, end_of = np.repeat(np.arange(len(texts)), lengths), np.repeat(lengths.cumsum(), lengths)

    at, gram = np.arange(len(words)), words  # where n-grams begin, and which they are
    likeness = np.zeros(len(owner))
    for n in range(1, N + 1):
        if n > 1:  # each grows by the word behind it, where its text has one
            inside = at + n - 1 < end_of[at]
            at, gram = at[inside], gram[inside]
            gram = np.unique(gram * len(ids) + words[at + n - 1], return_inverse=True)[1]
        likeness += cosines(text_of[at], gram, b, owner)
    apart = lengths[owner] - lengths[b:]
    likeness *= np.exp(-(apart**2) / (2 * sigma**2)) / N
    return 10 * np.bincount(owner, likeness, b) / each


def cosines(text: np.ndarray, gram: np.ndarray, b: int, owner: np.ndarray) -> np.ndarray:
    """Of every reference to its caption, the caption's counts clipped to the reference's -> (references,).

    text, gram  of every n-gram there is: in which text it stands, and which it is; texts 0 to b-1 are the captions
    owner       of each reference: its caption
    """
    kinds = int(gram.max(initial=0)) + 1
    keys, times = np.unique(text * kinds + gram, return_counts=True)
    text, gram = np.divmod(keys, kinds)
    of_reference = text >= b
    picture = owner[text[of_reference] - b]
    having = np.bincount(np.unique(picture * kinds + gram[of_reference]) % kinds, minlength=kinds)
    weight = times * (np.log(b) - np.log(np.maximum(having, 1)))[gram]
    norm = np.sqrt(np.bincount(text, weight**2, b + len(owner)))

    wanted, theirs = picture * kinds + gram[of_reference], weight[of_reference]
    place = np.searchsorted(keys, wanted)  # what the caption has of the reference's n-gram: keys are sorted
    ours = np.where(keys[place] == wanted, weight[place], 0)
    dot = np.bincount(text[of_reference] - b, np.minimum(ours, theirs) * theirs, len(owner))
    return dot / np.maximum(norm[owner] * norm[b:], np.finfo(float).tiny)  # without a vector, dot is 0
