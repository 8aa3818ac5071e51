"""What a run shows a person: sheets of pictures, captions, the curves of its losses."""

import json
import math
import unicodedata
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from unifashion import losses, parallel
from unifashion.model import UniFashion
from unifashion.tokenizers import SentencePiece, WordPiece

COLOURS = ("#1f77b4", "#d62728", "#2ca02c", "#9467bd", "#ff7f0e", "#17becf")  # of curves
CELL = 200  # pixels, of what was found


def save_sheet(rows: list[Tensor], path: Path) -> None:
    """rows of pictures, each (b,3,y,x) in [-1,1] -> one PNG, a row of pictures for each."""
    if parallel.rank() > 0:
        return
    sheet = torch.cat([torch.cat(list(row.float().cpu()), dim=2) for row in rows], dim=1)
    pixels = ((sheet.clamp(-1, 1) + 1) * 127.5).round().byte().permute(1, 2, 0)
    Image.fromarray(np.ascontiguousarray(pixels.numpy())).save(path)


@torch.no_grad()
def save_captions(
    model: UniFashion, words: SentencePiece, z: Tensor, batch: dict[str, Tensor], path: Path
) -> None:
    """For each Z of a batch the text that was to be learned, and below what the model writes after the same instruction."""
    lines = []
    for one, before, ids, answer in zip(z, *(batch[k] for k in ("before", "after", "answer")), strict=True):
        start = int(answer.int().argmax())
        written = model.write(one[None], before, ids[None, :start], model.cfg.max_caption, words.eos)[0]
        lines += [words.decode(ids[answer].tolist()), "-> " + words.decode(written.tolist()), ""]
    if parallel.rank() == 0:
        path.write_text("\n".join(lines), encoding="utf-8")


@torch.no_grad()
def save_matches(model: UniFashion, words: WordPiece, batch: dict[str, Tensor], path: Path) -> None:
    """For each query of a batch the text of the picture that it finds among the batch's, and how alike they are.

    A query is a picture's own text, or, of `samples.Triplets`, a reference and what is to be changed; where these have no captions
    only whether it finds its own target.
    """
    qformer, features = model.qformer, batch["features"]
    if "ways" in batch:
        reference, target = qformer.ln_vision(features).unbind(1)
        asked = batch["ways"][:, 0]
        _, text = qformer(reference, asked, batch["ways_mask"][:, 0])
        z, _ = qformer(target)
        shown = batch.get("caption_ids")
    else:
        asked = shown = batch["ids"]
        _, text = qformer(ids=asked, mask=batch["mask"])
        z, _ = qformer(qformer.ln_vision(features))
    sim = losses.similarity(qformer.embed_image(z), qformer.embed_text(text))
    read = lambda ids: " ".join(words.tokens[i] for i in ids.tolist() if i).replace(" ##", "")  # noqa: E731
    lines = []
    for i, (value, best) in enumerate(zip(*(x.tolist() for x in sim.max(0)), strict=True)):
        found = read(shown[best]) if shown is not None else "another's"
        lines.append(f"{read(asked[i])}\n-> {found} ({value:.2f}{', its own' * (best == i)})\n")
    if parallel.rank() == 0:
        path.write_text("\n".join(lines), encoding="utf-8")


def found_sheet(
    asked: tuple[str, Image.Image | None], found: list[tuple[str, Image.Image | None]]
) -> Image.Image:
    """
    What was asked for, framed, then what was found, a caption of two lines below each; a grey box where a picture is missing.

    Of a caption too long for its line the beginning is left out: a name ends a path. What was asked for is shown whole where
    it has the room, over as many lines as fit: 12, or below a picture 2.
    Letters that Pillow's own font lacks lose their accents, or are shown as "?".
    """
    cell, below, across = CELL, 40, 6
    cells = [asked, *found]
    across = min(across, len(cells))
    sheet = Image.new("RGB", (across * cell, -(-len(cells) // across) * (cell + below)), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(14)
    for i, (text, picture) in enumerate(cells):
        x, y = i % across * cell, i // across * (cell + below)
        if picture is None and i:
            draw.rectangle((x + 6, y + 6, x + cell - 7, y + cell - 7), fill="lightgrey")
        elif picture is not None:
            small = shrunk(picture)
            sheet.paste(small, (x + (cell - small.width) // 2, y + (cell - small.height) // 2))
        if i:
            top, lines = y + cell, [_fitting(line, font, cell - 12) for line in text.split("\n", 1)]
        else:
            top = y + (6 if picture is None else cell)
            lines = _wrapped(text, font, cell - 12, 12 if picture is None else 2)
        for row, line in enumerate(lines):
            draw.text((x + 6, top + 18 * row), line, "black", font)
    draw.rectangle((0, 0, cell - 1, cell + below - 1), outline="black")
    return sheet


def shrunk(picture: Image.Image) -> Image.Image:
    """As it is shown on `found_sheet`: its long side fills the cell, and of the thinnest strip a line is left."""
    side = CELL - 12
    return picture.resize(tuple(max(1, round(side * x / max(picture.size))) for x in picture.size))


def _wrapped(text: str, font: ImageFont.FreeTypeFont, width: int, most: int) -> list[str]:
    """Lines of whole words, or of a longer word's pieces; of more than `most` the rest is left out."""
    lines = [""]
    for word in _drawable(text[:1000], font).split():
        if font.getlength(f"{lines[-1]} {word}".strip()) <= width:
            lines[-1] = f"{lines[-1]} {word}".strip()
            continue
        lines += [""] if lines[-1] else []
        for c in word:
            if font.getlength(lines[-1] + c) > width:
                lines.append("")
            lines[-1] += c
    if len(lines) > most:
        lines = lines[:most]
        while font.getlength(lines[-1] + "...") > width:
            lines[-1] = lines[-1][:-1]
        lines[-1] += "..."
    return lines


def _fitting(text: str, font: ImageFont.FreeTypeFont, width: int) -> str:
    """What of a line can be drawn, and has room: the beginning of a longer one is left out."""
    shown = _drawable(text[-200:], font)
    if len(text) <= 200 and font.getlength(shown) <= width:
        return shown
    while shown and font.getlength("..." + shown) > width:
        shown = shown[1:]
    return "..." + shown


def _drawable(text: str, font: ImageFont.FreeTypeFont) -> str:
    nothing = bytes(font.getmask("\U0010ffff"))

    def drawn(c: str) -> str:
        plain = unicodedata.normalize("NFD", c)[0]  # without its accent
        known = (x for x in (c, plain) if x == " " or (x.isprintable() and bytes(font.getmask(x)) != nothing))
        return next(known, "?")

    return "".join(map(drawn, unicodedata.normalize("NFC", text)))


def draw_curves(runs: list[Path], path: Path) -> None:
    """
    metrics.jsonl of `runs` -> one PNG, a panel each, or for each task of a run that has several: every loss over the steps as
    a running mean, `val` as dots.
    """
    panels = [
        _panel(f"{run.name} {task}", log) for run in runs for task, log in _tasks(_read_log(run)).items()
    ]
    columns, (width, height) = min(4, len(panels)), panels[0].size
    sheet = Image.new("RGB", (columns * width, -(-len(panels) // columns) * height), "white")
    for i, panel in enumerate(panels):
        sheet.paste(panel, (i % columns * width, i // columns * height))
    sheet.save(path)


def _read_log(run: Path) -> list[dict[str, float]]:
    """The losses of metrics.jsonl: not the line that a kill cut short, no nan, no lr."""
    log = []
    for line in (run / "metrics.jsonl").read_text().splitlines():
        try:
            row = json.loads(line)
        except json.JSONDecodeError:
            continue
        numbers = {k: v for k, v in row.items() if isinstance(v, int | float) and math.isfinite(v)}
        log.append({k: v for k, v in numbers.items() if k not in ("lr", "lr draws", "seconds")})
    return log


def _tasks(log: list[dict[str, float]]) -> dict[str, list[dict]]:
    """By task, where names are "cir ITC" and "val cir": then "ITC" and "val" of "cir". Where they are not, of ""."""
    tasks: dict[str, list[dict]] = {}
    for row in log:
        for name, value in row.items():
            first, _, last = name.partition(" ")
            task, short = (last, "val") if first == "val" else (first, last) if last else ("", name)
            if name != "step":
                tasks.setdefault(task, []).append({"step": row["step"], short: value})
    return tasks or {"": []}


def _panel(name: str, log: list[dict], size: tuple[int, int] = (880, 560)) -> Image.Image:
    image = Image.new("RGB", size, "white")  # twice the size that it is shown in: smooth lines
    draw, font = ImageDraw.Draw(image), ImageFont.load_default(26)
    left, top, right, bottom = 90, 60, size[0] - 30, size[1] - 50
    names = dict.fromkeys(k for row in log for k in row if k != "step")
    curves = {k: {row["step"]: row[k] for row in log if k in row} for k in names}
    last = max((max(curve) for curve in curves.values()), default=1)
    high = 1.1 * max((np.percentile(list(curve.values()), 98) for curve in curves.values()), default=1.0)
    at = lambda x, y: (left + (right - left) * x / max(1, last), bottom - (bottom - top) * min(y / high, 1))  # noqa: E731
    draw.rectangle((left, top, right, bottom), outline="grey")
    draw.text((left, 15), name, "black", font)
    draw.text((right, bottom + 10), str(last), "black", font, anchor="ra")
    for y in (0, high / 2, high):
        draw.text((left - 10, at(0, y)[1]), f"{y:.2g}", "black", font, anchor="rm")
    for i, (k, curve) in enumerate(curves.items()):
        colour, mean, smooth = COLOURS[i % len(COLOURS)], None, []
        for x, y in sorted(curve.items()):
            mean = y if mean is None else mean + (y - mean) / 5
            smooth.append(at(x, mean))
            if k == "val":
                px, py = at(x, y)
                draw.ellipse((px - 5, py - 5, px + 5, py + 5), fill=colour)
        if k != "val":
            draw.line(smooth, colour, 3)
        draw.text((right - 10 - 170 * (i % 3), 2 + 28 * (i // 3)), k, colour, font, anchor="ra")
    return image.resize((size[0] // 2, size[1] // 2), Image.Resampling.LANCZOS)
