"""What `eval.miniature` measured -> the paper's Tables 1 to 5 and its claims, as Markdown: mean ± standard deviation over seeds.

A claim is a difference between two rows, taken seed by seed. It is called supported, or contradicted, if the 95 % interval of
its mean over the seeds (Student's t, n - 1 degrees of freedom) leaves out 0; else it is not decided, and that is said. A claim
that there is no difference is supported if the interval lies within MARGIN of 0, contradicted if it lies outside.
"""

import math
from collections.abc import Callable, Sequence

import numpy as np

PHASE1, FULL = "generate", "diff"
NAMES = {  # of runs, in the rows of Table 5
    PHASE1: "phase 1 alone",
    "base": "Base",
    "llm": "Base+LLM",
    "llm-cap": "Base+LLM w/ cap",
    "q2i": "the same and Eq. 12, no try-on",
    FULL: "Base+LLM+diff.",
}
T95 = {
    2: 12.706,
    3: 4.303,
    4: 3.182,
    5: 2.776,
    6: 2.571,
    7: 2.447,
    8: 2.365,
    9: 2.306,
    10: 2.262,
}  # Student's, two-sided, of n seeds
MARGIN = 1.0  # points: what counts as no difference
WAYS = tuple(f"{way} R@{k}" for way in ("text to image", "image to text") for k in (1, 5, 10))
CAPTION_METRICS = ("BLEU-4", "METEOR", "ROUGE-L", "CIDEr")
Results = dict[int, dict[str, dict[str, dict]]]  # seed -> run -> "retrieval" ... -> the evaluation's JSON
Get = Callable[[dict[str, dict]], float | None]  # a run's evaluations -> one figure


def over_seeds(results: Results, run: str, get: Get) -> list[float]:
    """The figure of each seed that has it, in the order of seeds."""
    found = [get(runs[run]) for _, runs in sorted(results.items()) if run in runs]
    return [x for x in found if x is not None]


def cell(values: Sequence[float], digits: int = 1) -> str:
    if not values:
        return "-"
    spread = f" ± {np.std(values, ddof=1):.{digits}f}" if len(values) > 1 else ""
    return f"{np.mean(values):.{digits}f}{spread}"


def markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = ["| " + " | ".join(row) + " |" for row in (head, ["---"] * len(head), *rows)]
    return "\n".join(lines)


# One figure of one run


def searched(row: str, column: str) -> Get:
    return lambda run: run["retrieval"]["figures"][row][column][0] if "retrieval" in run else None


def composed(row: str, column: int = 2) -> Get:
    """column: R@10, R@50, their mean"""
    return lambda run: run["composed"]["recall"][row]["mean"][column][0] if "composed" in run else None


def written(row: str, metric: str) -> Get:
    def get(run: dict) -> float | None:
        figure = (
            run.get("captioning", {}).get("results", {}).get("fashiongen", {}).get("own", {}).get(row, {})
        )
        return figure[metric][0] if figure.get(metric) else None

    return get


def true_captions(row: str, kind: str) -> Get:
    def get(run: dict) -> float | None:
        if "captioning" not in run:
            return None
        return run["captioning"]["results"]["fashiongen"]["attributes"][row]["all"][kind][0]

    return get


def drawn(condition: str, row: str, column: str) -> Get:
    def get(run: dict) -> float | None:
        if "generation" not in run:
            return None
        figure = run["generation"]["results"][condition]["rows"][row].get(column)
        return figure[0] if isinstance(figure, list) else figure

    return get


# The paper's tables


def table1(results: Results) -> str:
    rows = []
    for run in (PHASE1, FULL):
        rows.append(
            [
                NAMES[run].replace("Base+LLM+diff.", "UniFashion"),
                *(cell(over_seeds(results, run, searched("ours", k))) for k in (*WAYS, "mean")),
            ]
        )
    for row in ("texts shuffled", "chance"):
        rows.append([row, *(cell(over_seeds(results, FULL, searched(row, k))) for k in (*WAYS, "mean"))])
    return markdown(["%", *WAYS, "mean"], rows)


def table2(results: Results) -> str:
    kinds = ("precision", "coverage")

    def row(name: str, run: str, of: str) -> list[str]:
        found = (over_seeds(results, run, written(of, m)) for m in CAPTION_METRICS)
        scores = [cell(values) if values else "not measured" for values in found]
        return [name, *scores, *(cell(over_seeds(results, run, true_captions(of, k))) for k in kinds)]

    rows = [row(NAMES[PHASE1], PHASE1, "captions"), row("UniFashion", FULL, "captions")]
    rows += [
        row("of other pictures", FULL, "of other pictures"),
        row("the truth, anew: ceiling", FULL, "the truth, anew"),
    ]
    return markdown(["", *CAPTION_METRICS, *(f"attributes, {k} %" for k in kinds)], rows)


def table3(results: Results) -> str:
    columns = {
        "Fréchet": "Frechet (judge)",
        "KID": "KID x1000 (judge)",
        "colour %": "colour",
        "attributes %": "attributes",
        "IoU": "IoU",
        "PSNR dB": "PSNR",
    }
    rows = {
        "UniFashion": "output",
        "the truth through the VAE: ceiling": "truth through the VAE",
        "garments shuffled": "garments shuffled",
        "no condition": "no condition",
        "person unchanged": "person unchanged",
    }
    told = []
    for condition, name in (("cloth", "try-on"), ("sketch+text", "design")):
        for heading, row in rows.items():
            found = {k: over_seeds(results, FULL, drawn(condition, row, k)) for k in columns.values()}
            told.append([f"{name}: {heading}", *(cell(v, 3 if k == "IoU" else 1) for k, v in found.items())])
    return markdown(["", *columns], told)


def table4(results: Results) -> str:
    rows = {
        "UniFashion w/o cap": "without captions",
        "UniFashion w/o img": "captions alone",
        "UniFashion": "composed",
        "reference picture alone": "reference picture",
        "reference, empty text": "reference, empty text",
        "text alone": "text alone",
        "text, white reference": "text, white reference",
        "texts shuffled": "texts shuffled",
        "chance": "chance",
    }
    told = [
        [name, *(cell(over_seeds(results, FULL, composed(row, k))) for k in range(3))]
        for name, row in rows.items()
    ]
    return markdown(["%", "R@10", "R@50", "mean"], told)


def table5(results: Results) -> str:
    rows = []
    for run, name in NAMES.items():
        cells = [over_seeds(results, run, searched("ours", "mean"))]
        cells += [over_seeds(results, run, composed(row)) for row in ("without captions", "composed")]
        cells += [over_seeds(results, run, written("captions", "BLEU-4"))]
        cells += [over_seeds(results, run, true_captions("captions", "precision"))]
        cells += [
            over_seeds(results, run, drawn("sketch+text", "output", k))
            for k in ("Frechet (judge)", "attributes")
        ]
        rows.append([name, *map(cell, cells)])
    heads = [
        "",
        "CMR",
        "CIR, w/o captions",
        "CIR, with captions",
        "FIC: BLEU-4",
        "FIC: true attributes %",
        "FIG: Fréchet, design",
        "FIG: true attributes %",
    ]
    return markdown(heads, rows)


# The paper's claims


Claim = tuple[str, int, str, Get, str, Get]


def claims() -> list[Claim]:
    """
    (what is claimed, +1 for more, -1 for less, 0 for neither; the run that has it, its figure; the run that has it not, its figure)
    """
    plain, with_captions = composed("without captions"), composed("composed")
    cmr = searched("ours", "mean")
    bleu, true = written("captions", "BLEU-4"), true_captions("captions", "precision")
    return [
        ("The LLM (Eq. 11, ITG, and captions as a task) helps composed search", 1, "llm", plain, "base", plain),
        ("Captions, generated, help composed search: trained with and searched with, against neither", 1, "llm-cap", with_captions, "llm", plain),
        ("... searched with alone, the same model", 1, "llm-cap", with_captions, "llm-cap", plain),
        ("... trained with alone (Eq. 10's caption term), searched without", 1, "llm-cap", plain, "llm", plain),
        ("The diffusion model (Eq. 12, q2I, and try-on as a task) helps composed search", 1, FULL, with_captions, "llm-cap", with_captions),
        ("... searched without captions", 1, FULL, plain, "llm-cap", plain),
        ("... Eq. 12 by itself, with as many steps as without it", 1, "q2i", with_captions, "llm-cap", with_captions),
        ("... try-on as a task, on top of Eq. 12", 1, FULL, with_captions, "q2i", with_captions),
        ("All of it helps composed search", 1, FULL, with_captions, "base", plain),
        ("Search by text stays as it is with new modules (the paper: 87.38 to 87.55)", 0, FULL, cmr, "base", cmr),
        ("Not the paper's: phase 2 costs search by text some of what phase 1 had", -1, "base", cmr, PHASE1, cmr),
        ("The diffusion model costs captioning quality (the paper: BLEU-4 36.21 to 35.53)", -1, FULL, bleu, "llm-cap", bleu),
        ("... measured by true attributes", -1, FULL, true, "llm-cap", true),
        ("Not the paper's: the LLM's objectives keep captioning quality that Base loses: BLEU-4", 1, "llm", bleu, "base", bleu),
        ("... measured by true attributes", 1, "llm", true, "base", true),
    ]  # fmt: skip


def judged(values: Sequence[float], expected: int) -> list[str]:
    """Differences, one a seed -> their mean with its interval, and what it says of a claim that expects `expected`."""
    n = len(values)
    if n < 2:
        return ["-", "not decided: fewer than two seeds"]
    mean, half = float(np.mean(values)), T95[n] * float(np.std(values, ddof=1)) / math.sqrt(n)
    above = 0 if expected else MARGIN
    found = 1 if mean - half > above else -1 if mean + half < -above else 0
    if expected == 0 and not found:
        here = "supported" if abs(mean) + half <= MARGIN else "not decided"
    else:
        here = "supported" if found == expected else "contradicted" if found else "not decided"
    return [f"{mean:+.1f} [{mean - half:+.1f}, {mean + half:+.1f}]", here]


def claim_table(results: Results) -> str:
    rows = []
    for said, expected, one, get, other, get_other in claims():
        pairs = [
            (get(runs[one]), get_other(runs[other]))
            for _, runs in sorted(results.items())
            if one in runs and other in runs
        ]
        rows.append([said, *judged([a - b for a, b in pairs if a is not None and b is not None], expected)])
    return markdown(["claim", "difference in points, its 95 % interval over seeds", "here"], rows)


# All together

TABLES = (
    (
        "Table 1: search by text, and from a picture to its text",
        table1,
        "Each query among the garments of the world to search in that all look different, at most 1,500; a tie is a miss. The paper's, FashionGen: 71.41, 93.69, 97.47; 71.44, "
        "93.79, 97.51; mean 87.55, each query among 100 candidates: the two cannot be compared.",
    ),
    (
        "Table 2: captions, in FashionGen's style",
        table2,
        "The paper's: 35.53, 29.32, 54.59, 169.5. True attributes are known because the garments were drawn.",
    ),
    (
        "Table 3: try-on, and design from sketch and text, unpaired",
        table3,
        "The paper's: try-on FID 8.42, KID .67; design 12.43, 3.74, CLIP-S 31.29. Here the truth is known, the same person drawn in "
        "the other garment; Fréchet distance and KID x 1000 are of the judge's features (`eval.generation`), not Inception's. They see "
        "whether pictures look drawn by the same hand, not whether they show what was asked for: even the person unchanged looks right to them. Whether "
        "the garment is right is told by colour, attributes, IoU and PSNR.",
    ),
    (
        "Table 4: composed search",
        table4,
        "One pool of all pictures of the world to search in, whatever looks like the target is right. Captions: by this seed's "
        "captioner of phase 1. The paper's, Fashion-IQ: w/o captions 55.27, 74.80, 65.04; w/o images 40.12, 56.33, 48.22; all 58.93, 76.93, 67.93.",
    ),
    (
        "Table 5: what each part adds",
        table5,
        "The paper's CMR, CIR, FIC, FID: 87.38, 64.76; 87.49, 65.04, 36.21; 87.49, 66.83, 36.21; 87.55, 67.93, 35.53, 12.43. "
        "Its CIR is, so it seems, without captions in the first two rows, with them in the last two. CMR is the mean of Table 1.\n\n"
        "Phase 1 alone: `align`, `caption`, `generate`. Base: `retrieval` and `cir` by Eq. 5 and 9; its captions are written by phase 1's "
        "adapter and LoRA, which stay as they were, from a Q-Former that has moved. +LLM: also Eq. 11's ITG in `cir`, and the task "
        "`caption`. w/ cap: also Eq. 10's captions in `cir`. Then Eq. 12, q2I, in `cir`; and with the task `tryon` all of UniFashion. "
        "Each row's tasks keep their steps, so a row with a task more is trained longer. True attributes: of those that a caption names, "
        "or a picture shows, how many are the garment's.",
    ),
)


def report(results: Results, about: dict[str, str], pictures: dict[int, str]) -> str:
    """pictures: seed -> where what it drew lies"""
    parts = ["# The paper in miniature", *(f"- {name}: {value}" for name, value in about.items())]
    text = "\n".join([parts[0], "", *parts[1:]])
    for title, table, note in TABLES:
        text += f"\n\n## {title}\n\n{table(results)}\n\n{note}"
        if table is table3:
            text += "".join(f"\n\n![Drawn with seed {k}]({v})" for k, v in pictures.items()) + f"\n\n{SHEETS}"
    return f"{text}\n\n## The paper's claims, here\n\n{claim_table(results)}\n\n{CLAIMS}\n"


SHEETS = "Rows: person, mask, cloth, sketch; dressed from the cloth photo, from sketch and text; the truth."


CLAIMS = f"""\
"Supported" and "contradicted": the interval of the mean difference over the seeds (Student's t) leaves out 0, on the side that
the claim expects or on the other; of a claim that nothing changes, it lies within {MARGIN:.0f} point of 0, or outside. "Not decided":
neither, and nothing is claimed: with three seeds intervals are wide, and this is no sign that there is no difference. Differences
are taken seed by seed, from the same phase 1. A seed is another training: data, pictures that are searched, and the frozen ViT,
VAE and LLM are the same in all; the dtype of training may differ between seeds, not within one. A run that has a task more has its
steps and its data more, too: that a row is better is told, not which of the three makes it so. Each interval is of 95 % by itself:
among fifteen, and these share their runs, one that misses the truth is about as likely as none. All is drawn: it says nothing about
photographs."""
