"""What captions score against their references in the four metrics of fashion's papers, in %, with 95 % intervals.

    BLEU-4, METEOR, ROUGE-L, CIDEr (which is CIDEr-D)   as pycocoevalcap 1.2 has them, of whole texts in PTBTokenizer's words

An interval is a bootstrap over pictures: BLEU's and METEOR's statistics are drawn and summed, ROUGE-L's and CIDEr's scores
drawn and averaged, an n-gram's rarity being that in all references. METEOR needs Java and pycocoevalcap: `[meteor]`; without
them it is None, which means not measured.

Papers measure in other ways, which give other numbers for the same captions:

    `as_released`    UniFashion's src/metric.py: 100 characters of each text, the caption in its reference's place; no CIDEr
    `as_fame_vil`    FAME-ViL's cap_general: BLEU without guards, Google's ROUGE-L. It has its texts back from CLIP's 77 tokens,
                     and words of a CoreNLP server of unknown version: here they are the words of our own line
"""

from collections.abc import Sequence

import numpy as np

from eval.metrics.bleu import bleu, nmt_bleu
from eval.metrics.bleu import counts as bleu_counts
from eval.metrics.cider import cider_d
from eval.metrics.meteor import counts as meteor_counts
from eval.metrics.meteor import meteor
from eval.metrics.ptb import ptb_words
from eval.metrics.rouge import google_rouge_l, rouge_l
from eval.report import interval, resampled

METRICS = ("BLEU-4", "METEOR", "ROUGE-L", "CIDEr")
PAPER = {"BLEU-4": 35.53, "METEOR": 29.32, "ROUGE-L": 54.59, "CIDEr": 169.5}  # FashionGen, Table 2
Texts = Sequence[str]
Figure = list[float | None]  # in %, and the ends of its interval


def bleu4(captions: Texts, references: Texts) -> Figure:
    """One reference a caption, here as below."""
    return interval(100 * bleu(resampled(counted(captions, references)))[:, 3])


def scores(rows: dict[str, tuple[Texts, Texts]]) -> dict[str, dict[str, Figure | None]]:
    """Captions and references of each row -> {row: {metric: figure}}; METEOR's jar runs once for all."""
    pairs = [words(*texts) for texts in rows.values()]
    captions, references = (sum((pair[i] for pair in pairs), []) for i in (0, 1))
    matches = meteor_counts(captions, references)
    ends = np.cumsum([len(pair[0]) for pair in pairs])[:-1]
    of_rows = [None] * len(pairs) if matches is None else np.split(matches, ends)
    return {
        row: {
            "BLEU-4": bleu4(*rows[row]),
            "METEOR": None if of_row is None else interval(100 * meteor(resampled(of_row))),
            "ROUGE-L": mean([rouge_l(*pair) for pair in zip(*words_of_row, strict=True)]),
            "CIDEr": mean(cider_d(*words_of_row)),
        }
        for row, words_of_row, of_row in zip(rows, pairs, of_rows, strict=True)
    }


def as_released(captions: Texts, references: Texts) -> tuple[Texts, Texts]:
    return [text[:100] for text in references], [text[:100] for text in captions]


def as_fame_vil(captions: Texts, references: Texts) -> dict[str, Figure]:
    """The two that differ; METEOR and CIDEr are those of `scores`."""
    pairs = zip(*words(captions, references), strict=True)
    return {
        "BLEU-4": interval(100 * nmt_bleu(resampled(counted(captions, references, shortest=True)))),
        "ROUGE-L": mean([google_rouge_l(*pair) for pair in pairs]),
    }


def beside_the_paper(captions: Texts, references: Texts) -> str:
    """FashionGen's captioning: ours, ours measured in two other ways, and the published row."""
    whole, released = "ours, whole texts", "ours, as released"
    ours = scores({whole: (captions, references), released: as_released(captions, references)})
    del ours[released]["CIDEr"]
    ours["ours, FAME-ViL's way"] = ours[whole] | as_fame_vil(captions, references)
    lines = [
        "\n" + line("FashionGen", METRICS),
        *(line(name, [cell(row.get(metric, [])) for metric in METRICS]) for name, row in ours.items()),
        line("UniFashion, Table 2", map(str, PAPER.values())),
        "protocol of ours: whole texts, pycocoevalcap's metrics. As released: src/metric.py cuts both texts to 100 characters and takes the one",
        "for the other; it has no CIDEr. FAME-ViL's way: BLEU without guards, ROUGE-L as Google's. METEOR needs",
        "Java and pycocoevalcap. Intervals: 95 %, bootstrap over pictures.",
        f"protocol of the paper's: which pictures it took is not said. These are {len(captions)} products of validation, a picture each.",
    ]
    return "\n".join(lines)


def line(name: str, cells: Sequence[str]) -> str:
    return f"{name:<24}" + "".join(f" {text:>21}" for text in cells)


def cell(figure: Figure | None) -> str:
    """None: not measured. Empty, or of nothing: a dash."""
    if figure is None:
        return "not measured"
    return "-" if not figure or figure[0] is None else "{:.1f} [{:.1f}, {:.1f}]".format(*figure)


def words(captions: Texts, references: Texts) -> tuple[list[list[str]], list[list[list[str]]]]:
    return [ptb_words(text) for text in captions], [[ptb_words(text)] for text in references]


def counted(captions: Texts, references: Texts, shortest: bool = False) -> np.ndarray:
    pairs = zip(*words(captions, references), strict=True)
    return np.stack([bleu_counts(*pair, shortest=shortest) for pair in pairs])


def mean(values: Sequence[float]) -> Figure:
    return interval(100 * resampled(np.asarray(values)) / len(values))
