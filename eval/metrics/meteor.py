"""METEOR 1.5 (Denkowski and Lavie, 2014): words in common with a reference, be they equal, of one stem, synonyms or paraphrases.

    counts(captions, references)  by the reference jar of pycocoevalcap, where it and Java are: what matches what, of each pair
    meteor(counted)               the score of one pair, or of a sum of pairs, which is the corpus's: number for number the jar's

Matching takes WordNet and 62 MB of paraphrases, which are not here: without Java or pycocoevalcap nothing is measured. The
score is the paper's formula with the jar's values for English (`-l en`):

    p, r    weighted matches of the caption's, of the reference's words / their number; a content word counts delta, a
            function word 1 - delta, a match as much as its kind is worth
    F       p r / (alpha p + (1 - alpha) r)
    score   F (1 - gamma (chunks / matches)^beta), a chunk being matches in a row in both texts
"""

import importlib.util
import re
import shutil
import subprocess
from pathlib import Path

import numpy as np

from unifashion import UserError

ALPHA, BETA, GAMMA, DELTA = 0.85, 0.2, 0.6, 0.75
WORTH = np.array([1.0, 0.6, 0.8, 0.6])  # exact, stem, synonym, paraphrase
# Figures with a point whatever the user's language is: "0,38" would be none.
JAVA = "java -Duser.country=US -Duser.language=en -Dfile.encoding=UTF-8 -Xmx2G -jar meteor-1.5.jar - - -stdio -l en -norm"
STATISTICS = 23


def counts(
    captions: list[list[str]], references: list[list[list[str]]], seconds: float = 0
) -> np.ndarray | None:
    """
    Words of b captions, and of one or more references each -> (b,23), or None without Java or pycocoevalcap.

    Of each pair, the reference being the one that scores best: words of caption and reference, function words of both;
    for each kind of match content words of both, function words of both; chunks (see `unbroken`), matched words of both.

    seconds   the most that it may take; 0 is a minute and 50 ms a pair

    Raises UserError if Java fails or takes longer.
    """
    folder = jar_folder()
    if folder is None:
        return None
    lines = [
        " ||| ".join(("SCORE", *map(plain, group), plain(caption)))
        for caption, group in zip(captions, references, strict=True)
    ]
    seconds = seconds or 60 + 0.05 * len(lines)
    try:
        done = subprocess.run(
            JAVA.split(),
            cwd=folder,
            input="".join(line + "\n" for line in lines),
            capture_output=True,
            encoding="utf-8",
            errors="replace",
            timeout=seconds,
        )
    except subprocess.TimeoutExpired:
        raise UserError(f"METEOR's jar has not finished {len(lines)} captions in {seconds:.0f} s") from None
    except OSError as error:
        raise UserError(f"METEOR's jar cannot be run: java: {error.strerror}") from None
    try:
        if done.returncode:
            raise ValueError
        table = [[float(x) for x in line.split()] for line in done.stdout.splitlines()]
        counted = np.array(table).reshape(len(lines), STATISTICS)
    except ValueError:
        last = (done.stderr.strip() or done.stdout.strip() or "nothing said").splitlines()[-1]
        raise UserError(f"METEOR's jar failed, java ended with code {done.returncode}: {last}") from None
    return unbroken(counted)


def unbroken(counted: np.ndarray) -> np.ndarray:
    """What the jar prints of each pair, (b,23), the one chunk of a caption that matches its whole reference not counted.

    The jar does so when it scores: such a pair gets 1, and pays nothing in a sum.
    """
    whole = (counted[:, 20] == 1) & (counted[:, 21:] == counted[:, :2]).all(1)
    return np.where(whole[:, None] & (np.arange(STATISTICS) == 20), 0, counted)


def meteor(counted: np.ndarray) -> np.ndarray:
    """counted (...,23), `counts` or their sum -> (...,) from 0 to 1."""
    words, functions = counted[..., :2], counted[..., 2:4]
    chunks, matched = counted[..., 20], counted[..., 21:].mean(-1)
    kinds = counted[..., 4:20].reshape(*counted.shape[:-1], 4, 2, 2)  # match, content or function, its text
    weighted = np.einsum("...mfs,m,f->...s", kinds, WORTH, (DELTA, 1 - DELTA))
    total = DELTA * (words - functions) + (1 - DELTA) * functions
    p, r = np.moveaxis(weighted / np.where(total == 0, 1, total), -1, 0)
    f = p * r / np.where(p * r == 0, 1, ALPHA * p + (1 - ALPHA) * r)
    return f * (1 - GAMMA * (chunks / np.where(matched == 0, 1, matched)) ** BETA)


def jar_folder() -> Path | None:
    """Where the jar and its paraphrases are, or None; imports nothing."""
    package = importlib.util.find_spec("pycocoevalcap")
    if shutil.which("java") is None or package is None or not package.submodule_search_locations:
        return None
    folder = Path(package.submodule_search_locations[0]) / "meteor"
    files = ("meteor-1.5.jar", "data/paraphrase-en.gz")
    return folder if all((folder / name).is_file() for name in files) else None


def plain(words: list[str]) -> str:
    """Words on one line that has none of the signs which part texts there."""
    return " ".join(re.sub(r"\|{3,}", " ", " ".join(words)).split())
