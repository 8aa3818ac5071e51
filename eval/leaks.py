"""Were captions of candidates written with the queries' own texts at hand? Then they are refused for evaluation.

    python -m eval.leaks --captions next_llava.val.dress.caption.json [FILE...] --data fashioniq=PATH

Search by caption is a test only if a caption is written from its picture alone. The captions released with UniFashion are
not: each target's was prompted with the query that is to find it, which stands beside it as `text_guidance`. Three signs,
each of which suffices:

    guided   rows with a `text_guidance`
    found    queries whose target's caption BM25 (k1 1.2, b 0.75) puts among the best 0.5 % of all candidates' by the
             query's text alone: more than 40 % more of them than with the queries shuffled
    copied   queries that share with their target's caption, and with that of no other candidate, three words in a row:
             more than 5 %

"More" is 95 % sure: the lower end of Wilson's interval. `found` takes 200 candidates and `copied` 500: in fewer, what is true
of one garment alone is said in words that are its alone. R@10 and R@50 of BM25 are told beside them.

How far the text alone goes is told at the end, as a search engine would have it: BM25 without Lucene's 33 stop words, a word of a
query counted once, mean of the categories. On the released captions R@10 is 55.3 and R@50 68.0: at R@10 what the paper's own
system reaches without captions (55.27), and no picture was looked at.

Why not "better than with shuffled queries", as the design has it: an honest caption says what its picture shows, a query what
its target has, and so both say "red" of a red dress. The limits lie between what was measured of both sides, in %:

                                                    R@10     found    copied
    released, val: dress                              55        61        22
                   shirt                              50        59        19
                   toptee                             58        66        21
      two fifths of their words dropped          35 - 40   43 - 48    8 - 10
      their words in another order               50 - 58   59 - 66         1
      of a quarter of the targets alone          14 - 16   16 - 18    6 -  7
    two people, of each other                           4    6 -  8         1
      where both say seven words and more         6 - 10   12 - 17    1 -  2
    ToyFashion, 2000 test garments, its queries       24        24         0
      in the captions' phrases, four attributes       26        26         0
                                all six               40        40         0

The two people are Fashion-IQ's annotators: one's text of a triplet is the query, the other's is taken for the target's caption,
in pools as large. Both have seen both pictures and were asked the same question, so that no captioner who sees the target alone
should come nearer. ToyFashion is the other extreme: queries that name many attributes of the target and nothing else, in the
last lines in the very phrases of the captions. What no sign tells: a leak into few captions, and texts that are rewritten in other words.
"""

import argparse
import json
import math
import re
from collections import Counter, defaultdict
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from unifashion import Parser, UserError, training
from unifashion.data.fashioniq import CATEGORIES, FashionIQ, joined

FOUND, COPIED = 40.0, 5.0  # %: more is a leak
FOUND_CANDIDATES, COPIED_CANDIDATES = 200, 500  # in fewer, honest captions have these signs too
RUN = 3  # words in a row
STOP_WORDS = frozenset(
    [
        "a",
        "an",
        "and",
        "are",
        "as",
        "at",
        "be",
        "but",
        "by",
        "for",
        "if",
        "in",
        "into",
        "is",
        "it",
        "no",
        "not",
        "of",
        "on",
        "or",
        "such",
        "that",
        "the",
        "their",
        "then",
        "there",
        "these",
        "they",
        "this",
        "to",
        "was",
        "will",
        "with",
    ]
)  # Lucene's, of English


@dataclass(frozen=True)
class Leak:
    """What `check` found; shares in %. No reasons: nothing to be said against these captions."""

    candidates: int  # that have a caption
    queries: int  # of their targets
    guided: int  # candidates with a row that has a text_guidance
    recall10: float  # of BM25, from the query's text to the captions
    recall50: float
    shuffled10: float  # the same with every query for another one's target
    shuffled50: float
    found: float
    found_shuffled: float
    copied: float
    copied_shuffled: float
    reasons: tuple[str, ...]

    def figures(self) -> str:
        signs = {"found": FOUND_CANDIDATES, "copied": COPIED_CANDIDATES}
        unknown = [name for name, least in signs.items() if self.candidates < least]
        few = f" (too few to judge by {' or '.join(unknown)})" * bool(unknown)
        return (
            f"{self.queries} queries, {self.candidates} candidates{few}, {self.guided} of them with text_guidance; BM25 R@10 "
            f"{self.recall10:.1f} R@50 {self.recall50:.1f} (shuffled {self.shuffled10:.1f}, {self.shuffled50:.1f}); "
            f"found {self.found:.1f} (shuffled {self.found_shuffled:.1f}); copied {self.copied:.1f} (shuffled {self.copied_shuffled:.1f})"
        )


def check(rows: list[dict], queries: list[tuple[str, str]], pool: list[str], allow: bool = False) -> Leak:
    """
    rows     of the file of captions: {"image": id, or path whose stem it is, "caption", maybe "text_guidance"}; those of
             images that are not in the pool are not looked at, nor are candidates without a caption
    queries  (text, id of the target)
    pool     ids of all candidates

    Raises UserError if there are no captions of these candidates, and, unless `allow`, if they leak.
    """
    texts: dict[str, list[str]] = {name: [] for name in pool}
    guided = set()
    for row in rows:
        name = Path(row["image"]).stem
        if name in texts:
            texts[name].append(row["caption"])
            if str(row.get("text_guidance") or "").strip():  # whatever it is: a list of two, too
                guided.add(name)
    if not any(texts.values()):
        raise UserError(f"the captions are of none of the {len(pool)} candidates")
    pool = [name for name in pool if words(" ".join(texts[name]))]  # of others nothing is said
    captions = [words(" ".join(texts[name])) for name in pool]
    place = {name: i for i, name in enumerate(pool)}
    asked = [(words(text), place[target]) for text, target in queries if target in place]
    if not asked:
        raise UserError("no query has its target among the captioned candidates: there is nothing to check")
    asks, targets = [ask for ask, _ in asked], np.array([i for _, i in asked])
    order = np.random.default_rng(0).permutation(len(targets))
    others = np.empty_like(targets)  # everyone's but the own
    others[order] = targets[np.roll(order, 1)]

    ranks, shuffled = bm25_ranks(captions, asks, targets, others)
    copies = copied(captions, asks, targets), copied(captions, asks, others)
    best = max(1, len(pool) // 200)

    def share(hits: np.ndarray) -> float:
        return 100 * float(hits.mean())

    figures = {
        "recall10": share(ranks < 10),
        "recall50": share(ranks < 50),
        "shuffled10": share(shuffled < 10),
        "shuffled50": share(shuffled < 50),
        "found": share(ranks < best),
        "found_shuffled": share(shuffled < best),
        "copied": share(copies[0]),
        "copied_shuffled": share(copies[1]),
    }
    reasons = []
    if guided:
        reasons.append(f"{len(guided)} of {len(pool)} have a text_guidance")
    if len(pool) >= FOUND_CANDIDATES and surely(ranks < best) > figures["found_shuffled"] + FOUND:
        reasons.append(
            f"by the query's text alone BM25 puts {figures['found']:.1f} % of the targets' captions among the best 0.5 % "
            f"({figures['found_shuffled']:.1f} % with shuffled queries; honest ones stay within {FOUND:.0f} of that), "
            f"R@10 {figures['recall10']:.1f}, R@50 {figures['recall50']:.1f}"
        )
    if len(pool) >= COPIED_CANDIDATES and surely(copies[0]) > figures["copied_shuffled"] + COPIED:
        reasons.append(
            f"{figures['copied']:.1f} % of the queries share {RUN} words in a row with their target's caption and no other "
            f"({figures['copied_shuffled']:.1f} % when shuffled; honest: up to {COPIED:.0f})"
        )
    if reasons and not allow:
        raise UserError(
            f"these captions were written with the queries' texts at hand, so that a search by them is no test: {'; '.join(reasons)}. "
            "Write captions from the pictures alone (infer.py caption), or give --allow-leaky-captions"
        )
    return Leak(len(pool), len(asked), len(guided), **figures, reasons=tuple(reasons))


def text_alone(rows: list[dict], queries: list[tuple[str, str]], pool: list[str]) -> tuple[float, float]:
    """R@10 and R@50 in %: BM25 from the queries' texts to the captions, without stop words. A target without a caption is missed."""
    texts = {name: "" for name in pool}
    for row in rows:
        if (name := Path(row["image"]).stem) in texts:
            texts[name] += f" {row['caption']}"
    captions = [[w for w in words(text) if w not in STOP_WORDS] for text in texts.values()]
    asks = [sorted({*words(text)} - STOP_WORDS) for text, _ in queries]
    place = {name: i for i, name in enumerate(texts)}
    (found,) = bm25_ranks(captions, asks, np.array([place[target] for _, target in queries]))
    return 100 * float((found < 10).mean()), 100 * float((found < 50).mean())


def own_file(files: dict[Path, list[dict]], category: str) -> list[dict]:
    """Of several files the rows of the one that is named after the category, as `eval.pools.captions_of` does; else of all."""
    own = [rows for file, rows in files.items() if f".{category}." in file.name]
    return [row for rows in own or files.values() for row in rows]


def words(text: str) -> list[str]:
    return re.findall("[a-z0-9]+", text.lower())


def bm25_ranks(
    captions: list[list[str]], asks: list[list[str]], *targets: np.ndarray, k1: float = 1.2, b: float = 0.75
) -> list[np.ndarray]:
    """The rank (n,) from 0 up of each query's target, for each `targets` (n,), places in `captions`.

    A tie is lost: whoever scores as much comes first.
    """
    lengths = np.array([len(caption) for caption in captions])
    relative = 1 - b + b * lengths / lengths.mean()
    found: dict[str, list[tuple[int, int]]] = defaultdict(list)
    for i, caption in enumerate(captions):
        for word, count in Counter(caption).items():
            found[word].append((i, count))
    postings = {}
    for word, places in found.items():
        i, count = np.array(places).T
        rarity = math.log(1 + (len(captions) - len(i) + 0.5) / (len(i) + 0.5))
        postings[word] = i, rarity * count * (k1 + 1) / (count + k1 * relative[i])
    ranks = [np.empty(len(asks), int) for _ in targets]
    for n, ask in enumerate(asks):
        scores = np.zeros(len(captions))
        for word in ask:
            if word in postings:
                i, weight = postings[word]
                scores[i] += weight
        for rank, target in zip(ranks, targets, strict=True):
            rank[n] = (scores >= scores[target[n]]).sum() - 1
    return ranks


def copied(captions: list[list[str]], asks: list[list[str]], targets: np.ndarray) -> np.ndarray:
    """(n,) whether a query has RUN words in a row that its target's caption has, and no other caption."""
    owners = Counter(run for caption in captions for run in runs_of(caption))
    return np.array(
        [
            any(owners[run] == 1 for run in runs_of(ask) & runs_of(captions[i]))
            for ask, i in zip(asks, targets, strict=True)
        ]
    )


def runs_of(text: list[str]) -> set[tuple[str, ...]]:
    return {tuple(text[i : i + RUN]) for i in range(len(text) - RUN + 1)}


def surely(hits: np.ndarray, z: float = 1.96) -> float:
    """The lower end of Wilson's 95 % interval of a share, in %: of few cases even all are not much."""
    n, p = len(hits), float(hits.mean())
    return (
        100 * (p + z * z / (2 * n) - z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))) / (1 + z * z / n)
    )


def read_rows(file: Path) -> list[dict]:
    """The rows of a file of captions: a JSON list, as released, or a JSON object a line, as `infer.py caption` writes.

    Raises UserError if it cannot be read, or a row has not the texts image and caption.
    """
    try:
        text = file.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise UserError(f"{file} cannot be read: {error}") from None
    try:
        if text.lstrip().startswith("["):
            rows = json.loads(text)
        else:
            rows = [json.loads(line) for line in text.split("\n") if line.strip()]
    except (ValueError, RecursionError) as error:
        raise UserError(f"{file} is no file of captions: {error}") from None
    for i, row in enumerate(rows):
        if not isinstance(row, dict) or not all(
            isinstance(row.get(key), str) for key in ("image", "caption")
        ):
            raise UserError(f"{file}: row {i} has not the texts image and caption: {str(row)[:100]}")
    return rows


def parse(argv: list[str] | None) -> argparse.Namespace:
    p = Parser(description=__doc__)
    p.add_argument("--captions", type=Path, nargs="+", required=True, metavar="FILE", help="json or jsonl")
    p.add_argument(
        "--data", required=True, metavar="fashioniq[=PATH]", help="with captions/ and image_splits/"
    )
    p.add_argument("--split", choices=["val", "test"], default="val", help="default %(default)s")
    p.add_argument("--allow-leaky-captions", action="store_true", help="print the figures and exit with 0")
    args = p.parse_args(argv)
    name, _, path = args.data.partition("=")
    if name != "fashioniq":
        raise UserError(f"--data is {args.data}, must be fashioniq or fashioniq=PATH")
    args.root = Path(path or "data/fashioniq")
    return args


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    files = {file: read_rows(file) for file in args.captions}
    known = {Path(row["image"]).stem for rows in files.values() for row in rows}
    data = FashionIQ(args.root, args.split, pictures=False)
    checked: dict[str, Leak] = {}
    alone = []
    for category in CATEGORIES:
        if known.intersection(data.pools[category]):
            asked = [(joined(x.captions), x.target) for x in data.rows if x.category == category]
            if not asked:
                print(f"{category}: no query asks for it")
                continue
            rows = own_file(files, category)
            checked[category] = check(rows, asked, data.pools[category], allow=True)
            print(f"{category}: {checked[category].figures()}", flush=True)
            alone.append(text_alone(rows, asked, data.pools[category]))
    if not checked:
        raise UserError(f"the captions are of no picture of {args.root}, split {args.split}")
    each = ", ".join(f"{k} {a:.2f} {b:.2f}" for k, (a, b) in zip(checked, alone, strict=True))
    ten, fifty = np.mean(alone, axis=0)
    print(f"text alone, mean of {len(alone)}: R@10 {ten:.2f} R@50 {fifty:.2f} ({each})", flush=True)
    leaks = [f"{category}: {'; '.join(x.reasons)}" for category, x in checked.items() if x.reasons]
    if leaks and not args.allow_leaky_captions:
        raise UserError(f"refused: {'. '.join(leaks)}")
    unknown = [name for name, x in checked.items() if x.candidates < FOUND_CANDIDATES]
    few = f", but {', '.join(unknown)} cannot be judged by so few" * bool(unknown)
    print("they leak, and that is allowed" if leaks else "no leak found" + few)


if __name__ == "__main__":
    training.run(main)
