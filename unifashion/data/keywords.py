"""Key words of garments, from what Fashion-IQ's annotators say of its training pictures (appendix C, figure 4).

    python -m unifashion.data.keywords --data PATH --out keywords.txt
    python -m unifashion.data.keywords --data PATH --out keywords.txt --category dress --picture keywords.png

PATH is Fashion-IQ's folder; `captions/cap.*.train.json` alone is read, no text of an evaluation. keywords.txt has a word a line,
a tab, and the number of captions that use it in any form, the most frequent first. The picture draws them as large as they
are frequent.

A caption says what a garment has that another has not: "is longer and has darker stripes". Its words are taken back to
their roots (long, dark, stripe) by the rules of `root`, and words without a garment in them (is, has, more, than) are left out.

The paper gave the list to LLaVA, which follows instructions, to choose from: `infer.py caption --model llava --keywords FILE`.
Our own captioner knows the instructions of Table 7 alone, and takes no list: of what the tiny one claims of 64 garments 95 % is true, but 72 % with five
such words in its instruction, and 44 % with twenty.
"""

import argparse
import math
import os
import re
import sys
from collections import Counter
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from unifashion import Parser, UserError
from unifashion.data.fashioniq import CATEGORIES, read_triplets
from unifashion.preprocess import check_png_path, save_png

GRAMMAR = """
a about above across again all also am an and any are around as at be been being below between both but by can comes could did
didn do does doesn don either else ever every for from get gets go goes going got had has hasn have having he her here his how
if in into is isn it its just like made make me mostly much my near of off on one or out over own see seen she so some that the
their them then there these they this those three through to too two under up very was we were what when where which while who
will with without would you your
"""
COMPARISON = """
another better bit desired different differently exact exactly few fewer identical instead item least left less lesser little
look looking looks lot many more most neither no none nor not nothing only other overall please product provided rather right
same say saying says show shown shows similar slightly somewhat still than thing unlike want
"""
STOP = frozenset((GRAMMAR + COMPARISON).split())
# What the rules would take apart, or miss. Two spellings are one word.
ROOTS = {
    "children": "child", "christmas": "christmas", "clothing": "clothing", "colour": "color", "coloured": "color",
    "colourful": "colorful", "designer": "designer", "evening": "evening", "feet": "foot", "flower": "flower",
    "gray": "grey", "grayer": "grey", "jeans": "jeans", "leaves": "leaf", "leggings": "leggings", "letter": "letter",
    "men": "man", "mens": "man", "pants": "pants", "shiner": "shiny", "shorts": "shorts", "shoulder": "shoulder",
    "sports": "sport", "sunglasses": "sunglasses", "sweater": "sweater", "ties": "tie", "trousers": "trousers",
    "tshirt": "t-shirt", "upper": "upper", "v-neckline": "v-neck", "vneck": "v-neck", "wolves": "wolf",
    "women": "woman", "womens": "woman", "zipper": "zipper",
}  # fmt: skip


def words(caption: str) -> list[str]:
    """Small, without hyphens, but for t-shirt and v-neck, and what is written so: "T shirt", "V neckline"."""
    text = re.sub(r"\b([tuv])[ -](shirt|neck)", r"\1-\2", caption.lower())
    return re.findall(r"\b[tuv]-(?:shirt|neck)[a-z]*|[a-z]{2,}", text)


def singular(word: str) -> str:
    if word.endswith("ies") and len(word) > 4:
        return word[:-3] + "y"
    if word.endswith(("sses", "shes", "ches", "xes")):
        return word[:-2]
    if word.endswith("s") and not word.endswith(("ss", "us", "is")) and len(word) > 3:
        return word[:-1]
    return word


def stems(word: str, ending: str) -> list[str]:
    """What may have got the ending: dark(er), large(r), shin(y -> ier), big(ger)."""
    stem = word.removesuffix(ending)
    if stem == word or len(stem) < 2:
        return []
    doubled = len(stem) > 2 and stem[-1] == stem[-2]
    return [stem, stem + "e", *([stem[:-1] + "y"] * stem.endswith("i")), *([stem[:-1]] * doubled)]


def root(word: str, counts: Counter) -> str:
    """The word that `word` is a form of; `counts` are those of singular words in all captions, and tell what is a word at all.

    -er, -est    a comparative, if there is the plain word: longer is long, but sheer is not she
    -ed, -ing    of a word that is used at least as often: striped is stripe, but fitted (413) is not fit (130)
    """
    if word in ROOTS:
        return ROOTS[word]
    word = singular(word)
    if word in ROOTS:
        return ROOTS[word]
    for ending, least in (("er", 1), ("est", 1), ("ed", counts[word]), ("ing", counts[word])):
        known = [stem for stem in stems(word, ending) if counts[stem] >= least and len(stem) > 2]
        if known:
            stem = max(known, key=counts.__getitem__)
            return ROOTS.get(stem, stem)
    return word


def key_words(captions: list[str]) -> list[tuple[str, int]]:
    """(root, number of captions that use it in any form), the most frequent first, then by the alphabet."""
    used = [{word for word in words(caption) if word not in STOP} for caption in captions]
    counts = Counter(word for caption in used for word in {singular(word) for word in caption})
    roots = Counter(name for caption in used for name in {root(word, counts) for word in caption} - STOP)
    return sorted(roots.items(), key=lambda item: (-item[1], item[0]))


def training_captions(data: Path, categories: tuple[str, ...]) -> list[str]:
    """Both captions of every training triplet. Raises UserError if a file is missing or damaged."""
    files = {name: data / f"captions/cap.{name}.train.json" for name in categories}
    missing = [file.name for file in files.values() if not file.is_file()]
    if missing:
        raise UserError(
            f"{data}/captions lacks {', '.join(missing)}: get Fashion-IQ's captions at github.com/XiaoxiaoGuo/fashion-iq"
        )
    triplets = [row for name, file in files.items() for row in read_triplets(file, name, "train")]
    return [caption for row in triplets for caption in row.captions]


def draw(found: list[tuple[str, int]], size: tuple[int, int] = (960, 600)) -> Image.Image:
    """Words on white, the most frequent in the middle and the others around it, their areas as their counts.

    All are drawn smaller until the last one finds a place.
    """
    colours = ("#1f3b73", "#8c2d4b", "#2f6b4f", "#a8641a", "#5b3f8c")
    for largest in range(size[1] // 4, 8, -4):
        picture = Image.new("RGB", size, "white")
        pen = ImageDraw.Draw(picture)
        taken: list[tuple[float, float, float, float]] = []
        for i, (word, count) in enumerate(found):
            font = ImageFont.load_default(max(8, largest * math.sqrt(count / found[0][1])))
            box = pen.textbbox((0, 0), word, font)
            place = free_place(box[2] - box[0] + 6, box[3] - box[1] + 6, taken, size)
            if place is None:
                break
            taken.append(place)
            pen.text((place[0] + 3 - box[0], place[1] + 3 - box[1]), word, colours[i % len(colours)], font)
        else:
            return picture
    raise UserError(f"{len(found)} words are too many for a picture: take a smaller --top")


def free_place(
    width: float, height: float, taken: list[tuple], size: tuple[int, int]
) -> tuple[float, float, float, float] | None:
    """The first box on a spiral from the middle that is in the picture and over none that is taken."""
    for step in range(4000):
        angle, far = 0.1 * step, 0.012 * step
        x = size[0] / 2 + size[0] / 60 * far * math.cos(angle) - width / 2
        y = size[1] / 2 + size[1] / 60 * far * math.sin(angle) - height / 2
        box = (x, y, x + width, y + height)
        inside = x >= 0 and y >= 0 and box[2] <= size[0] and box[3] <= size[1]
        if inside and all(box[2] <= a or c <= box[0] or box[3] <= b or d <= box[1] for a, b, c, d in taken):
            return box
    return None


def write(found: list[tuple[str, int]], out: Path) -> None:
    """Whole or not at all. Raises UserError if it cannot be written."""
    temporary = out.with_name(f".{os.getpid()}.keywords.tmp")
    try:
        temporary.write_text("".join(f"{word}\t{count}\n" for word, count in found))
        os.replace(temporary, out)
    except OSError as error:
        raise UserError(f"{out}: cannot be written ({error.strerror})") from None
    finally:
        temporary.unlink(missing_ok=True)


def parse(argv: list[str] | None) -> argparse.Namespace:
    p = Parser(description=__doc__)
    p.add_argument(
        "--data", type=Path, required=True, metavar="PATH", help="Fashion-IQ's folder, with captions/"
    )
    p.add_argument(
        "--category", choices=CATEGORIES, help="default: all three; the paper's picture is of dresses"
    )
    p.add_argument("--top", type=int, default=40, help="how many words (default %(default)s)")
    p.add_argument("--out", type=Path, required=True, metavar="FILE", help="a word a line, and its count")
    p.add_argument("--picture", type=Path, metavar="PNG", help="the words, as large as they are frequent")
    args = p.parse_args(argv)
    if args.top < 1:
        raise UserError(f"--top is {args.top}, must be 1 or more")
    return args


def main(argv: list[str] | None = None) -> int:
    try:
        args = parse(argv)
        if args.picture:
            check_png_path(args.picture)
        if args.out.is_dir() or not args.out.parent.is_dir():
            raise UserError(f"--out {args.out}: must be a file in a folder that exists")
        captions = training_captions(args.data, (args.category,) if args.category else CATEGORIES)
        found = key_words(captions)[: args.top]
        if not found:
            raise UserError(f"{args.data}: no captions with a word that tells anything")
        picture = draw(found) if args.picture else None
        write(found, args.out)
        if picture:
            save_png(picture, args.picture)
    except UserError as error:
        print("keywords:", " ".join(str(error).splitlines()), file=sys.stderr)
        return 2
    print(f"{args.out}: {len(found)} words of {len(captions)} captions, from {found[0][0]} to {found[-1][0]}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
