"""Pencil and brush of ToyFashion: smooth shapes as polygons, and a canvas that covers, shades and paints.

*Picture units* are pixels of a 128x96 (height x width) picture. Shapes are drawn at four times the size and averaged;
colour and light are smooth functions of the pixel.
"""

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

SUPERSAMPLE = 4


def affine(origin: tuple, angle: float, scale_u: float, scale_v: float) -> np.ndarray:
    """(2,3) map: scale, turn by `angle` degrees (positive swings +v towards -x, so the head leans to the right)."""
    c, s = np.cos(np.radians(angle)), np.sin(np.radians(angle))
    return np.array([[c * scale_u, -s * scale_v, origin[0]], [s * scale_u, c * scale_v, origin[1]]])


def apply(matrix: np.ndarray, points) -> np.ndarray:
    """Points (..., 2) through a (2,3) affine map."""
    return np.asarray(points, float) @ matrix[:, :2].T + matrix[:, 2]


def direction(angle: float) -> np.ndarray:
    return np.array([np.sin(np.radians(angle)), np.cos(np.radians(angle))])


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


def binary(mask: np.ndarray) -> Image.Image:
    return Image.fromarray(mask.astype(np.uint8) * 255)


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
            points = (line * scale - 0.5).ravel().tolist()
            draw.line(points, fill=255, width=round(line_width * scale), joint="curve")
        return np.asarray(picture.reduce(SUPERSAMPLE), np.float32) / 255

    def local(self, frame: np.ndarray) -> np.ndarray:
        """(h,w,2) coordinates of every pixel in a frame's own units."""
        turn = np.linalg.inv(frame[:, :2]).astype(np.float32)
        return self.xy @ turn.T - turn @ frame[:, 2].astype(np.float32)

    def soft(self, cover: np.ndarray, radius: float, shift: tuple = (0, 0)) -> np.ndarray:
        """A cover blurred by `radius` units and moved: contact shadows and rounded edges."""
        grey = Image.fromarray((cover * 255).astype(np.uint8))
        blurred = grey.filter(ImageFilter.GaussianBlur(radius * self.ratio))
        if shift == (0, 0):
            return np.asarray(blurred, np.float32) / 255
        back = (1, 0, -shift[0] * self.ratio, 0, 1, -shift[1] * self.ratio)  # from the result to the source
        moved = blurred.transform(blurred.size, Image.Transform.AFFINE, back, Image.Resampling.BILINEAR)
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
