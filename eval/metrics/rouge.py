"""ROUGE-L of a caption (Lin, 2004): words in common with its reference in the same order, gaps allowed.

    l = longest common subsequence, p = l / words of the caption, r = l / words of the reference

    rouge_l         (1 + b²) p r / (r + b² p), b = 1.2, the largest p and the largest r of any references, as pycocoevalcap 1.2
    google_rouge_l  2 p r / (p + r) of the best reference, as FAME-ViL's rouge_score

A corpus's is the mean of its captions'.
"""


def rouge_l(caption: list[str], references: list[list[str]], beta: float = 1.2) -> float:
    """Words -> 0 to 1; 0 where there are no words. beta above 1 asks more of the recall."""
    common = [common_subsequence(caption, reference) for reference in references]
    if not any(common):
        return 0.0
    precision = max(common) / len(caption)
    recall = max(n / max(1, len(reference)) for n, reference in zip(common, references, strict=True))
    return (1 + beta**2) * precision * recall / (recall + beta**2 * precision)


def google_rouge_l(caption: list[str], references: list[list[str]]) -> float:
    return max(rouge_l(caption, [reference], beta=1.0) for reference in references)


def common_subsequence(a: list[str], b: list[str]) -> int:
    """Length of the longest sequence of words that both have, in time len(a), bit-parallel (Hyyrö, 2004).

    Bit j of `ends` is 0 where the table's row of the usual dynamic program rises at b[j]: the row's zeros are its length.
    """
    places: dict[str, int] = {}
    for j, word in enumerate(b):
        places[word] = places.get(word, 0) | 1 << j
    full = (1 << len(b)) - 1
    ends = full
    for word in a:
        matches = ends & places.get(word, 0)
        ends = (ends + matches | ends - matches) & full
    return len(b) - ends.bit_count()
