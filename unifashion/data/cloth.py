"""Garments of ToyFashion: cut in body units, placed by a `Body`, so that cloth is the same flat and worn.

The texture is a function of body units: the flat product shot and the person show the same cloth with the same phase.
"""

from dataclasses import dataclass, field

import numpy as np
from PIL import Image

from unifashion.data.body import FOREARM, UPPER_ARM, Body
from unifashion.data.drawing import Canvas, apply, binary, bone, ellipse, limb, smooth

PALETTE = {
    "red": (206, 38, 44),
    "orange": (244, 128, 24),
    "yellow": (250, 210, 50),
    "green": (52, 150, 62),
    "teal": (20, 160, 165),
    "blue": (38, 84, 200),
    "purple": (124, 58, 172),
    "pink": (248, 140, 186),
    "brown": (116, 70, 38),
    "black": (36, 36, 40),
    "grey": (136, 138, 142),
    "white": (248, 248, 246),
}
# Half the garment's width at height v, one curve for every length: shorter garments lie inside longer ones.
SILHOUETTE = {
    "t-shirt": ((8, 12.4), (12, 12.2), (21, 11.6), (33, 12.8), (44, 13.6)),
    "shirt": ((8, 12.5), (12, 12.2), (21, 11.5), (33, 13.0), (44, 13.9)),
    "sweater": ((8, 13.2), (12, 13.2), (21, 13.4), (33, 13.7), (44, 14.2)),
    "jacket": ((8, 13.2), (12, 13.1), (21, 12.9), (33, 14.2), (44, 15.4)),
    "dress": ((8, 11.9), (12, 11.6), (20, 9.9), (27, 12.4), (33, 14.2), (50, 17.5), (74, 21.5)),
}
SLEEVE_RADII = {  # at the shoulder, the elbow and the wrist
    "t-shirt": (4.5, 4.1, 3.4),
    "shirt": (4.4, 4.0, 3.2),
    "sweater": (4.9, 4.7, 3.9),
    "jacket": (4.9, 4.5, 3.9),
    "dress": (4.2, 3.7, 2.9),
}
PARSE_LABEL = {"t-shirt": 5, "shirt": 5, "sweater": 5, "jacket": 7, "dress": 6}  # of image-parse-v3
HEM = {"cropped": 24.5, "regular": 33.5, "long": 42.5, "mini": 50.0, "midi": 62.0, "maxi": 74.0}
SMOOTH_SILHOUETTE = {name: smooth(points) for name, points in SILHOUETTE.items()}


@dataclass(frozen=True)
class Garment:
    """One garment by name: see `unifashion.data.toy.ATTRIBUTES` for the values."""

    category: str
    colour: str
    second: str
    pattern: str
    sleeve: str
    neckline: str
    length: str


@dataclass
class Piece:
    """One piece of cloth: outline polygons in picture units, texture frames, and what is sewn on it."""

    torso: bool
    outlines: list[np.ndarray]
    frames: list[np.ndarray]  # one, or two in a long sleeve: upper arm and forearm
    lines: list[tuple[np.ndarray, float, float]] = field(default_factory=list)  # polyline, width, tone
    patches: list[tuple[np.ndarray, object]] = field(default_factory=list)  # polygon, tone (float) or colour
    dots: list[np.ndarray] = field(default_factory=list)  # polygons in the colour of buttons
    ribs: list[np.ndarray] = field(default_factory=list)  # polygons of ribbed knit


def width(category: str, v) -> np.ndarray:
    """Half the garment's width (body units) at height v."""
    curve = SMOOTH_SILHOUETTE[category]
    return np.interp(v, curve[:, 0], curve[:, 1])


def neckline_curve(neckline: str) -> np.ndarray:
    """The front neckline from the right neck point to the left, body units."""
    if neckline == "round":
        t = np.linspace(np.pi, 0, 20)
        return np.stack([6.0 * np.cos(t), -0.8 + 6.2 * np.sin(t)], 1)
    if neckline == "v":
        return np.array([(-5.6, -0.8), (0, 12.5), (5.6, -0.8)])
    return np.array([(-6.8, -0.5), (-6.4, 7.8), (6.4, 7.8), (6.8, -0.5)])


def torso_piece(g: Garment, body: Body) -> Piece:
    """Front panel with everything that tells the category; cut in body units, placed by the torso's frame."""
    hem, neck = HEM[g.length], neckline_curve(g.neckline)
    n, bottom = neck[-1], neck[:, 1].max()
    if g.sleeve == "sleeveless":
        strap = max(n[0] + 3.0, 9.8)
        edge = [
            (strap, 0.9),
            (strap - 0.2, 5),
            (width(g.category, 11) - 1, 10.2),
            (width(g.category, 12.5), 12.8),
        ]
    else:
        edge = [(9.5, 0.6), (13.2, 2.4), (14.4, 5.0), (13.4, 9.0), (width(g.category, 12), 12)]
    shoulder = np.concatenate([[n], smooth(edge)])
    v = np.linspace(13.2, hem, 24)
    side = np.stack([width(g.category, v), v], 1)
    if g.category == "sweater":
        side[:, 0] -= np.clip((v - hem + 4) / 4, 0, 1) * 0.9  # the ribbing pulls the hem in
    t = np.linspace(1, -1, 17)[1:-1]
    drop = {"shirt": 1.6 - 4.2 * np.abs(t) ** 3, "dress": 1.6 * (1 - t**2)}.get(g.category, 0.7 * (1 - t**2))
    hem_curve = np.stack([t * side[-1, 0], hem + drop], 1)
    if g.category == "shirt":
        side[-1, 1] -= 2.4
    right = np.concatenate([shoulder, side])
    outline = np.concatenate([right, hem_curve, right[::-1] * (-1, 1), neck[1:-1]])
    piece = Piece(True, [outline], [body.torso])
    bands = {"t-shirt": 1.5, "shirt": 1.0, "sweater": 2.2, "jacket": 1.2, "dress": 1.1}
    piece.lines.append((neck, bands[g.category] * 2, 0.80))  # centred on the edge: half of it is cut away
    across = np.linspace(-1, 1, 17)
    if g.category == "t-shirt":
        stitches = np.stack([across * (width("t-shirt", hem) - 0.6), hem - 2 + 0.7 * (1 - across**2)], 1)
        piece.lines.append((stitches, 0.7, 0.8))
    elif g.category == "shirt":
        end = hem + 1.6
        piece.patches.append((np.array([(-1.7, bottom), (1.7, bottom), (1.7, end), (-1.7, end)]), 1.06))
        piece.lines += [(np.array([(x, bottom - 0.5), (x, end)]), 0.6, 0.66) for x in (-1.8, 1.8)]
        piece.dots += [ellipse(0, y, 0.95, 0.95) for y in np.arange(bottom + 2.6, end - 1.5, 6.2)]
        for s in (-1, 1):
            a, b = n * (s, 1) + (s * 1.6, 1.2), n * (s, 1) + (-s * 1.2, -2.0)
            tip = np.array([s * (n[0] * 0.72 + 1.2), 6.4])
            inner = np.array([s * n[0] * 0.42, 3.4 if g.neckline != "square" else 2.6])
            flap = np.array([b, a, tip, inner])
            piece.outlines.append(flap)
            piece.patches.append((flap, 1.08))
            piece.lines.append((np.concatenate([flap, flap[:1]]), 0.6, 0.6))
    elif g.category == "sweater":
        t = np.linspace(-1, 1, 17)
        low = np.stack([t * 14.5, hem + 1 + 0 * t], 1)
        top = np.stack([t * 14.5, hem - 4.2 + 0.7 * (1 - t**2)], 1)
        piece.ribs.append(np.concatenate([top, low[::-1]]))
        piece.lines.append((top, 0.7, 0.7))
    elif g.category == "jacket":
        wedge = np.array([(-0.9, bottom - 0.6), (0.9, bottom - 0.6), (2.9, hem + 1), (-2.9, hem + 1)])
        lining = (78, 82, 92) if g.colour in ("white", "yellow", "pink", "grey") else (236, 236, 232)
        piece.patches.append((wedge, lining))
        piece.lines += [(np.array([(s * 1.1, bottom - 0.8), (s * 3.3, hem + 1)]), 1.1, 0.58) for s in (-1, 1)]
        y = min(25.5, hem - 8.0)
        for s in (-1, 1):
            piece.lines.append((np.array([(s * 9.6, y - 0.5), (s * 6.6, y + 5.0)]), 1.3, 0.5))
            a, b = n * (s, 1) + (s * 1.8, 1.0), n * (s, 1) + (-s * 0.6, -2.6)
            stand = np.array([a, b, (s * n[0] * 0.62, min(4.5, bottom - 1))])
            piece.outlines.append(stand)
            piece.patches.append((stand, 0.86))
        low = np.stack([across * 15, hem - 2.2 + 0.7 * (1 - across**2)], 1)
        piece.patches.append((np.concatenate([low, low[::-1] + (0, 5)]), 0.84))
        piece.patches.append((wedge[[3, 2]].repeat(2, 0) + [(0, -3.4), (0, 0), (0, 0), (0, -3.4)], lining))
    else:
        seam = np.stack([across * 11, 20 + 0.6 * (1 - across**2)], 1)
        piece.patches.append((np.concatenate([seam + (0, -1.3), (seam + (0, 1.3))[::-1]]), 0.66))
    for name in ("outlines", "dots", "ribs"):
        setattr(piece, name, [apply(body.torso, p) for p in getattr(piece, name)])
    piece.lines = [(apply(body.torso, p), w * body.scale, tone) for p, w, tone in piece.lines]
    piece.patches = [(apply(body.torso, p), tone) for p, tone in piece.patches]
    return piece


def sleeve_piece(g: Garment, body: Body, side: int) -> Piece:
    """One sleeve along the arm of `side`; cuffs are told apart by category."""
    k = body.scale
    r0, r1, r2 = (k * r for r in SLEEVE_RADII[g.category])
    shoulder, elbow, wrist = body.arm[side]
    frames = [bone(shoulder, elbow, k), bone(elbow, wrist, k)]
    if g.sleeve == "short":
        end, r = shoulder + 0.56 * (elbow - shoulder), r0 + 0.35 * k
        piece = Piece(False, [limb(shoulder, end, r0, r, round_end=False)], frames[:1])
        frame, length, r = frames[0], 0.56 * UPPER_ARM, r / k
    else:
        end = elbow + 0.96 * (wrist - elbow)
        outlines = [limb(shoulder, elbow, r0, r1), limb(elbow, end, r1, r2, round_end=False)]
        piece = Piece(False, outlines, frames)
        frame, length, r = frames[1], 0.96 * FOREARM, r2 / k
    band = {"t-shirt": 1.6, "shirt": 2.6, "sweater": 3.4, "jacket": 2.4, "dress": 1.2}[g.category]
    top, low = length - band, length + 1
    cuff = apply(frame, [(-r - 1, top), (r + 1, top), (r + 1, low), (-r - 1, low)])
    if g.category == "sweater":
        piece.ribs.append(cuff)
    elif g.category in ("jacket", "shirt"):
        piece.patches.append((cuff, 0.84 if g.category == "jacket" else 1.06))
    piece.lines.append((cuff[:2], 0.7 * k, 0.68))
    return piece


def pieces_of(g: Garment, body: Body) -> list:
    """Torso first, then the sleeves that lie over it."""
    sleeves = [] if g.sleeve == "sleeveless" else [sleeve_piece(g, body, side) for side in (0, 1)]
    return [torso_piece(g, body), *sleeves]


def pattern_cover(pattern: str, u: np.ndarray, v: np.ndarray, sharp: float) -> np.ndarray:
    """How much of each pixel the second colour covers, in [0,1]; u, v in body units, `sharp` pixels per unit.

    The periods (10-12 units) and marks (3-6 units) are wide enough to be seen at a quarter of the size.
    """

    def band(x: np.ndarray, period: float, mark: float) -> np.ndarray:
        return mark / 2 - np.abs((x + period / 2) % period - period / 2)

    if pattern == "plain":
        return np.zeros_like(u)
    if pattern == "striped":
        inside = band(v - 6, 10.4, 3.8)
    elif pattern == "pinstriped":
        inside = band(u - 5.3, 10.6, 3.6)
    elif pattern == "dotted":
        row = np.round((v - 3) / 9.2)
        inside = 2.9 - np.hypot((u + 5.4 * (row % 2) + 5.4) % 10.8 - 5.4, v - 3 - 9.2 * row)
    elif pattern == "checked":
        inside = np.maximum(band(u - 6, 12, 2.6), band(v - 5, 12, 2.6))
    else:
        inside = band(v + 0.75 * np.abs((u + 7) % 14 - 7), 10.6, 3.8) * 0.8
    return np.clip(0.5 + inside * sharp, 0, 1)


def paint_cloth(canvas: Canvas, g: Garment, piece: Piece, shadow: float) -> None:
    """Cloth with its pattern, folds, light and sewn details; `shadow` is the strength of its contact shadow."""
    cover, label = canvas.cover(piece.outlines), PARSE_LABEL[g.category]
    canvas.shade(1 - shadow, np.clip(canvas.soft(cover, 1.3, (0.7, 1.2)) - cover, 0, 1) * canvas.shadow_room)
    uv = canvas.local(piece.frames[0])
    if len(piece.frames) > 1:  # a long sleeve bends: nearer to the forearm's bone, it follows the forearm
        fore = canvas.local(piece.frames[1])
        to_upper = np.hypot(uv[..., 0], np.maximum(uv[..., 1] - UPPER_ARM, 0))
        nearer = np.hypot(fore[..., 0], np.minimum(fore[..., 1], 0)) < to_upper
        uv = np.where(nearer[..., None], fore + np.float32((0, UPPER_ARM)), uv)
    u, v = uv[..., 0], uv[..., 1]
    marks = pattern_cover(g.pattern, u, v, canvas.ratio)[..., None]
    colour = np.array(PALETTE[g.colour]) * (1 - marks) + np.array(PALETTE[g.second]) * marks
    if piece.torso:
        t = np.clip(u / width(g.category, v), -1, 1)
        folds = 0.035 * np.cos(0.9 * np.abs(u) + 0.35 * v) * np.clip((v - 12) / 8, 0, 1) * (1 - np.abs(t))
        if g.category == "dress":  # the skirt falls in folds that open towards the hem
            folds += 0.075 * np.cos(t * 11) * np.clip((v - 21) / 14, 0, 1)
    else:
        t = np.clip(u / SLEEVE_RADII[g.category][1], -1, 1)
        folds = 0.05 * np.cos(0.8 * (v - UPPER_ARM)) * np.clip(1 - np.abs(v - UPPER_ARM) / 6, 0, 1)
    inner = np.clip(2 * canvas.soft(cover, 1.1) - 1, 0, 1)
    light = (1.02 - 0.05 * t - 0.07 * t**2 + folds) * (0.80 + 0.20 * inner)
    sheen = 14 * np.clip(0.7 - np.abs(t + 0.35), 0, 1)  # keeps folds visible on black
    shaded = colour * light[..., None] + sheen[..., None] * (1 - colour / 255)
    canvas.paint(np.clip(shaded, 0, 255), cover, label, cloth=True)
    for polygon in piece.ribs:
        stripes = 0.5 + 0.5 * np.cos(u * 2 * np.pi / 2.2)
        canvas.shade(0.86, canvas.cover([polygon]) * cover * (0.35 + 0.65 * stripes))
    for polygon, tone in piece.patches:
        inside = canvas.cover([polygon]) * cover
        if isinstance(tone, tuple):
            canvas.paint(np.array(tone) * light[..., None], inside, label, cloth=True)
        else:
            canvas.shade(tone, inside)
    for line, line_width, tone in piece.lines:
        canvas.shade(tone, canvas.cover([], [(line, line_width)]) * cover)
    if piece.dots:
        buttons = (70, 62, 60) if sum(PALETTE[g.colour]) > 420 else (244, 240, 232)
        canvas.paint(buttons, canvas.cover(piece.dots) * cover, label, cloth=True)


def product_body(view: int) -> Body:
    """0 front, as a centred person stands; 1 slightly turned, larger, shifted; 2 a closer crop."""
    if view == 1:
        return Body(scale=1.12, build=0.92, lean=-5.0, shift=(2.5, 3.0), arms=((24.0, 18.0), (12.0, 10.0)))
    if view == 2:
        return Body(scale=1.45, shift=(0.0, 13.0), arms=((17.0, 13.0), (17.0, 13.0)))
    return Body()


def draw_product(g: Garment, view: int = 0, size: tuple[int, int] = (128, 96)) -> dict[str, Image.Image]:
    """The flat garment on a light ground: {"image": RGB, "mask": L, 255 = garment}; size is (height, width)."""
    canvas, body = Canvas(size), product_body(view)
    glow = np.clip(1 - np.hypot(canvas.xy[..., 0] - 40, canvas.xy[..., 1] - 50) / 110, 0, 1)
    canvas.rgb[:] = np.array((222, 224, 228)) + np.array((24, 23, 21)) * glow[..., None]
    pieces = pieces_of(g, body)
    everything = canvas.cover([outline for piece in pieces for outline in piece.outlines])
    canvas.shade(0.72, canvas.soft(everything, 2.2, (1.4, 2.2)))
    back = [(-6.2, -1.2), (-3.5, -2.4), (3.5, -2.4), (6.2, -1.2), *neckline_curve(g.neckline)[::-1]]
    inside = canvas.cover([apply(body.torso, back)])
    canvas.paint(np.array(PALETTE[g.colour]) * 0.62 + 8, inside, cloth=True)
    canvas.shade(0.78, inside * canvas.soft(everything, 1.2, (0, 1.6)))
    for piece in pieces:
        paint_cloth(canvas, g, piece, shadow=0.3)
    return {"image": canvas.image(), "mask": binary(canvas.garment > 0.5)}


def sketch_pieces(canvas: Canvas, pieces: list, occluders: list = ()) -> Image.Image:
    """Bright lines on black: outlines and sewn details, no colour and no pattern. `occluders` hide what lies behind.

    Later pieces hide earlier ones: each is stroked twice as wide as wanted, then its inside is cleared.
    """
    lines = np.zeros((canvas.h, canvas.w), np.float32)
    for piece in pieces:
        closed = [np.concatenate([p, p[:1]]) for p in piece.outlines]
        inside = canvas.cover(piece.outlines)
        lines = np.maximum(lines, canvas.cover([], [(p, 2.0) for p in closed])) * (1 - inside)
        sewn = [(p, 0.9) for p, _, _ in piece.lines[1 if piece.torso else 0 :]]
        sewn += [(np.concatenate([p, p[:1]]), 0.9) for p, _ in piece.patches] + [(p, 0.9) for p in piece.dots]
        rib_lines = []
        for u in np.arange(-14.3, 15, 2.2) if piece.ribs else ():
            rib_lines.append((apply(piece.frames[-1], [(u, -10), (u, 100)]), 0.7))
        lines = np.maximum(lines, canvas.cover([], sewn) * inside)
        if piece.ribs:
            lines = np.maximum(lines, canvas.cover([], rib_lines) * canvas.cover(piece.ribs) * inside)
    if occluders:
        lines *= 1 - canvas.cover(occluders)
    return Image.fromarray((255 * lines).astype(np.uint8))


def draw_sketch(g: Garment, size: tuple[int, int] = (128, 96)) -> Image.Image:
    """The in-shop sketch (L, bright edges on black), pixel-aligned with `draw_product(g, 0)`."""
    return sketch_pieces(Canvas(size), pieces_of(g, Body()))
