"""Draw ToyFashion: garments, and persons wearing them, from attributes alone (Pillow shapes, NumPy shading).

Coordinates: *picture units* are pixels of a 128x96 (height x width) picture. *Body units* are the same length on a
standard person: the origin is the base of the neck, u to the right, v down. A garment is cut in body units and placed
by a `Body`, flat (product shot) or a person's, so its texture is the same cloth with the same phase on both.
Shapes are drawn at four times the size and averaged; colour, pattern and light are smooth functions per pixel.
"""

from dataclasses import dataclass, field

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

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
SUPERSAMPLE = 4
UPPER_ARM, FOREARM = 18.5, 16.5
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
HEM = {"cropped": 24.5, "regular": 33.5, "long": 42.5, "mini": 50.0, "midi": 62.0, "maxi": 74.0}
SKIN = (
    (252, 226, 207), (244, 208, 180), (232, 188, 152), (214, 164, 124),
    (190, 136, 96), (160, 108, 74), (124, 82, 56), (88, 58, 42),
)  # fmt: skip
HAIR = (
    (34, 28, 28),
    (62, 42, 32),
    (98, 64, 40),
    (142, 92, 52),
    (196, 152, 92),
    (226, 196, 136),
    (158, 66, 40),
    (150, 148, 150),
)
TROUSERS = (
    (44, 52, 76),
    (70, 98, 144),
    (34, 34, 38),
    (196, 178, 146),
    (96, 100, 82),
    (108, 106, 110),
    (224, 220, 212),
    (112, 66, 58),
)
SHOES = ((240, 240, 238), (40, 38, 40), (128, 82, 52), (184, 52, 50), (64, 92, 150))
WALLS = (
    ((232, 222, 208), (244, 238, 228)), ((206, 220, 226), (232, 240, 242)), ((222, 212, 226), (240, 234, 242)),
    ((212, 224, 206), (236, 242, 230)), ((236, 210, 200), (248, 232, 224)), ((200, 204, 212), (228, 230, 234)),
    ((226, 214, 178), (244, 236, 212)), ((184, 204, 206), (216, 228, 228)),
)  # fmt: skip
FLOORS = ((206, 178, 146), (186, 178, 170), (160, 132, 106), (216, 206, 194), (150, 154, 160))


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


@dataclass(frozen=True)
class Person:
    """One person in one place: everything but the garment. Indices are into the tables of this module.

    `arms`: degrees outwards from hanging, (upper, fore) of the right arm (left in the picture), then of the left.
    """

    skin: int
    hair: str
    hair_colour: int
    arms: tuple[tuple[float, float], tuple[float, float]]
    lean: float
    shift: tuple[float, float]
    scale: float
    build: float
    stance: float
    bottom: str
    bottom_colour: int
    shoes: int
    wall: int
    floor: int
    floor_height: float
    prop: str
    prop_right: bool


def affine(origin: tuple, angle: float, scale_u: float, scale_v: float) -> np.ndarray:
    """(2,3) map: scale, turn by `angle` degrees (positive swings +v towards -x, so the head leans to the right)."""
    c, s = np.cos(np.radians(angle)), np.sin(np.radians(angle))
    return np.array([[c * scale_u, -s * scale_v, origin[0]], [s * scale_u, c * scale_v, origin[1]]])


def apply(matrix: np.ndarray, points) -> np.ndarray:
    """Points (..., 2) through a (2,3) affine map."""
    return np.asarray(points, float) @ matrix[:, :2].T + matrix[:, 2]


@dataclass
class Body:
    """Where torso, arms and legs are, in picture units. Side 0 is the person's right, left in the picture."""

    scale: float = 1.0
    build: float = 1.0
    lean: float = 0.0
    shift: tuple[float, float] = (0.0, 0.0)
    arms: tuple = ((17.0, 13.0), (17.0, 13.0))
    stance: float = 0.0
    torso: np.ndarray = field(init=False)
    arm: list = field(init=False)  # two of (shoulder, elbow, wrist)
    leg: list = field(init=False)  # two of (hip, knee, ankle)

    def __post_init__(self) -> None:
        k = self.scale
        pelvis = np.array([48 + self.shift[0], 29.5 + 36 + self.shift[1]])  # the body leans about its pelvis
        turn = affine((0, 0), self.lean, k * self.build, k)
        self.torso = np.column_stack([turn[:, :2], pelvis + turn[:, :2] @ (0, -36)])
        self.arm, self.leg = [], []
        for side, (upper, fore) in zip((-1, 1), self.arms, strict=True):
            shoulder = apply(self.torso, (side * 12.0, 6.0))
            elbow = shoulder + k * UPPER_ARM * direction(side * upper)
            self.arm.append((shoulder, elbow, elbow + k * FOREARM * direction(side * fore)))
            legs = np.array([(5.7, 1.0), (6.2 + self.stance, 27.0), (6.6 + 2 * self.stance, 50.0)])
            self.leg.append(tuple(pelvis + k * legs * (side, 1)))


def direction(angle: float) -> np.ndarray:
    return np.array([np.sin(np.radians(angle)), np.cos(np.radians(angle))])


def body_of(person: Person) -> Body:
    return Body(person.scale, person.build, person.lean, person.shift, person.arms, person.stance)


# ---------------------------------------------------------------------------------------------- shapes


def smooth(points, closed: bool = False, steps: int = 6) -> np.ndarray:
    """Catmull-Rom curve through `points` (n,2)."""
    p = np.asarray(points, float)
    p = np.concatenate([p[-1:], p, p[:2]]) if closed else np.concatenate([p[:1], p, p[-1:]])
    t = np.linspace(0, 1, steps, endpoint=False)[:, None, None]
    a, b, c, d = p[:-3], p[1:-2], p[2:-1], p[3:]
    curve = b + 0.5 * t * (c - a + t * (2 * a - 5 * b + 4 * c - d + t * (3 * (b - c) + d - a)))
    curve = curve.swapaxes(0, 1).reshape(-1, 2)
    return curve if closed else np.concatenate([curve, p[-2:-1]])


def ellipse(x: float, y: float, rx: float, ry: float) -> np.ndarray:
    t = np.linspace(0, 2 * np.pi, 28, endpoint=False)
    return np.stack([x + rx * np.cos(t), y + ry * np.sin(t)], 1)


def limb(a, b, ra: float, rb: float, round_end: bool = True) -> np.ndarray:
    """A tapered bone from a to b with a round start and a round or flat end."""
    a, b = np.asarray(a), np.asarray(b)
    angle = np.arctan2(*(b - a)[::-1])
    arc = np.linspace(np.pi / 2, 3 * np.pi / 2, 12) + angle
    start = a + ra * np.stack([np.cos(arc), np.sin(arc)], 1)
    arc = (np.linspace(-np.pi / 2, np.pi / 2, 12) if round_end else np.array([-np.pi / 2, np.pi / 2])) + angle
    return np.concatenate([start, b + rb * np.stack([np.cos(arc), np.sin(arc)], 1)])


def bone(a, b, scale: float) -> np.ndarray:
    """The affine frame of a limb: v runs along it from a, u across."""
    d = np.asarray(b) - np.asarray(a)
    return affine(a, np.degrees(np.arctan2(-d[0], d[1])), scale, scale)


def width(category: str, v) -> np.ndarray:
    """Half the garment's width (body units) at height v."""
    curve = SMOOTH_SILHOUETTE[category]
    return np.interp(v, curve[:, 0], curve[:, 1])


SMOOTH_SILHOUETTE = {name: smooth(points) for name, points in SILHOUETTE.items()}


def neckline_curve(neckline: str) -> np.ndarray:
    """The front neckline from the right neck point to the left, body units."""
    if neckline == "round":
        t = np.linspace(np.pi, 0, 20)
        return np.stack([6.0 * np.cos(t), -0.8 + 6.2 * np.sin(t)], 1)
    if neckline == "v":
        return np.array([(-5.6, -0.8), (0, 12.5), (5.6, -0.8)])
    return np.array([(-6.8, -0.5), (-6.4, 7.8), (6.4, 7.8), (6.8, -0.5)])


# ---------------------------------------------------------------------------------------------- garments


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


def torso_piece(g: Garment, body: Body) -> Piece:
    """Front panel with everything that tells the category; cut in body units, placed by the torso's frame."""
    hem, neck = HEM[g.length], neckline_curve(g.neckline)
    n, bottom = neck[-1], neck[:, 1].max()
    if g.sleeve == "sleeveless":
        strap = max(n[0] + 3.0, 9.8)
        armhole = [
            (strap, 0.9),
            (strap - 0.2, 5.0),
            (width(g.category, 11) - 1.0, 10.2),
            (width(g.category, 12.5), 12.8),
        ]
        shoulder = np.concatenate([[n], smooth(armhole)])
    else:
        shoulder = np.concatenate(
            [[n], smooth([(9.5, 0.6), (13.2, 2.4), (14.4, 5.0), (13.4, 9.0), (width(g.category, 12), 12)])]
        )
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
    piece.lines.append(
        (neck, bands[g.category] * 2, 0.80)
    )  # drawn centred on the edge: half of it is cut away
    across = np.linspace(-1, 1, 17)
    if g.category == "t-shirt":
        piece.lines.append(
            (np.stack([across * (width("t-shirt", hem) - 0.6), hem - 2 + 0.7 * (1 - across**2)], 1), 0.7, 0.8)
        )
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
            stand = np.array(
                [
                    n * (s, 1) + (s * 1.8, 1.0),
                    n * (s, 1) + (-s * 0.6, -2.6),
                    (s * n[0] * 0.62, min(4.5, bottom - 1)),
                ]
            )
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
        piece = Piece(
            False, [limb(shoulder, elbow, r0, r1), limb(elbow, end, r1, r2, round_end=False)], frames
        )
        frame, length, r = frames[1], 0.96 * FOREARM, r2 / k
    band = {"t-shirt": 1.6, "shirt": 2.6, "sweater": 3.4, "jacket": 2.4, "dress": 1.2}[g.category]
    cuff = apply(
        frame, [(-r - 1, length - band), (r + 1, length - band), (r + 1, length + 1), (-r - 1, length + 1)]
    )
    if g.category == "sweater":
        piece.ribs.append(cuff)
    elif g.category in ("jacket", "shirt"):
        piece.patches.append((cuff, 0.84 if g.category == "jacket" else 1.06))
    piece.lines.append((cuff[:2], 0.7 * k, 0.68))
    return piece


def pattern_cover(pattern: str, u: np.ndarray, v: np.ndarray, sharp: float) -> np.ndarray:
    """How much of each pixel the second colour covers, in [0,1]; u, v in body units, `sharp` pixels per unit.

    The periods (10-12 units) and marks (3-6 units) are wide enough to be seen at a quarter of the size.
    """

    def band(x: np.ndarray, period: float, mark: float) -> np.ndarray:
        return mark / 2 - np.abs((x + period / 2) % period - period / 2)

    if pattern == "plain":
        return np.zeros_like(u)
    if pattern == "striped":
        inside = band(v - 6, 10.4, 4.2)
    elif pattern == "pinstriped":
        inside = band(u - 5.3, 10.6, 3.6)
    elif pattern == "dotted":
        row = np.round((v - 3) / 9.2)
        inside = 3.1 - np.hypot((u + 5.4 * (row % 2) + 5.4) % 10.8 - 5.4, v - 3 - 9.2 * row)
    elif pattern == "checked":
        inside = np.maximum(band(u - 6, 12, 2.7), band(v - 5, 12, 2.7))
    else:
        inside = band(v + 0.75 * np.abs((u + 7) % 14 - 7), 10.6, 4.4) * 0.8
    return np.clip(0.5 + inside * sharp, 0, 1)


# ---------------------------------------------------------------------------------------------- painting


class Canvas:
    """A float picture (h,w,3) in 0..255 being painted, with the garment's share and the label of each pixel."""

    def __init__(self, size: tuple[int, int]) -> None:
        self.h, self.w = size
        self.ratio = self.h / 128  # pixels per picture unit
        y, x = np.mgrid[: self.h, : self.w]
        self.xy = (np.stack([x + 0.5, y + 0.5], -1) / self.ratio).astype(np.float32)
        self.rgb = np.zeros((self.h, self.w, 3), np.float32)
        self.shadow_room = 1.0  # where the garment's contact shadow may fall
        self.garment = np.zeros((self.h, self.w), np.float32)
        self.labels = np.zeros((self.h, self.w), np.uint8)

    def cover(self, polygons: list, lines: list = ()) -> np.ndarray:
        """Share (h,w) in [0,1] of each pixel inside any polygon or on any (polyline, width)."""
        scale = self.ratio * SUPERSAMPLE
        picture = Image.new("L", (self.w * SUPERSAMPLE, self.h * SUPERSAMPLE))
        draw = ImageDraw.Draw(picture)
        for polygon in polygons:
            draw.polygon((polygon * scale - 0.5).ravel().tolist(), fill=255)
        for line, line_width in lines:
            draw.line(
                (line * scale - 0.5).ravel().tolist(),
                fill=255,
                width=round(line_width * scale),
                joint="curve",
            )
        return np.asarray(picture.reduce(SUPERSAMPLE), np.float32) / 255

    def local(self, frame: np.ndarray) -> np.ndarray:
        """(h,w,2) coordinates of every pixel in a frame's own units."""
        turn = np.linalg.inv(frame[:, :2]).astype(np.float32)
        return self.xy @ turn.T - turn @ frame[:, 2].astype(np.float32)

    def soft(self, cover: np.ndarray, radius: float, shift: tuple = (0, 0)) -> np.ndarray:
        """A cover blurred by `radius` units and moved: contact shadows and rounded edges."""
        blurred = Image.fromarray((cover * 255).astype(np.uint8)).filter(
            ImageFilter.GaussianBlur(radius * self.ratio)
        )
        if shift == (0, 0):
            return np.asarray(blurred, np.float32) / 255
        moved = blurred.transform(
            blurred.size,
            Image.Transform.AFFINE,
            (1, 0, -shift[0] * self.ratio, 0, 1, -shift[1] * self.ratio),
            Image.Resampling.BILINEAR,
        )
        return np.asarray(moved, np.float32) / 255

    def paint(self, colour, cover: np.ndarray, label: int | None = None, cloth: bool = False) -> None:
        """Lay `colour` ((3,) or (h,w,3)) over the picture where `cover`; `cloth` marks it as the garment."""
        self.rgb += (np.asarray(colour, np.float32) - self.rgb) * cover[..., None]
        self.garment += (float(cloth) - self.garment) * cover
        if label is not None:
            self.labels[cover > 0.5] = label

    def shade(self, tone: float, cover: np.ndarray) -> None:
        """Multiply what is there by `tone` where `cover`."""
        self.rgb *= (1 + (tone - 1) * cover)[..., None]

    def image(self) -> Image.Image:
        return Image.fromarray(np.clip(self.rgb + 0.5, 0, 255).astype(np.uint8))


def rounded(canvas: Canvas, colour, cover: np.ndarray, depth: float = 0.24) -> np.ndarray:
    """(h,w,3): `colour` darkened by up to `depth` towards the rim of `cover`, most at the lower right."""
    inner = np.clip(2 * canvas.soft(cover, 1.6, (0.6, 0.4)) - 1, 0, 1)
    return np.asarray(colour, np.float32) * (1 + depth * (inner - 0.85))[..., None]


def paint_rounded(canvas: Canvas, colour, polygons: list, label: int, depth: float = 0.24) -> np.ndarray:
    """Skin, hair, trousers: a flat colour with a darker rim and light from the upper left."""
    cover = canvas.cover(polygons)
    canvas.paint(rounded(canvas, colour, cover, depth), cover, label)
    return cover


def paint_cloth(canvas: Canvas, g: Garment, piece: Piece, label: int, shadow: float) -> None:
    """Cloth with its pattern, folds, light and sewn details; `shadow` is the strength of its contact shadow."""
    cover = canvas.cover(piece.outlines)
    canvas.shade(1 - shadow, np.clip(canvas.soft(cover, 1.3, (0.7, 1.2)) - cover, 0, 1) * canvas.shadow_room)
    uv = canvas.local(piece.frames[0])
    if (
        len(piece.frames) > 1
    ):  # a long sleeve bends: nearer to the forearm's bone, the cloth follows the forearm
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
        pale = sum(PALETTE[g.colour]) > 420
        canvas.paint(
            (70, 62, 60) if pale else (244, 240, 232), canvas.cover(piece.dots) * cover, label, cloth=True
        )
