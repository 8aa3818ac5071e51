"""What there is in ToyFashion: attributes, which split owns a combination of them, and how garments and persons are drawn by lot."""

import hashlib

import numpy as np

from unifashion.data.body import (
    BOTTOMS,
    FLOORS,
    HAIR_COLOURS,
    HAIRSTYLES,
    PROPS,
    SHOE_COLOURS,
    SKIN,
    TROUSERS,
    WALLS,
    Person,
)  # fmt: skip
from unifashion.data.cloth import PALETTE, Garment

SPLITS = ("train", "val", "test")
ATTRIBUTES = {
    "category": ("t-shirt", "shirt", "sweater", "jacket", "dress"),
    "colour": tuple(PALETTE),
    "second": tuple(PALETTE),
    "pattern": ("plain", "striped", "pinstriped", "dotted", "checked", "chevron"),
    "sleeve": ("sleeveless", "short", "long"),
    "neckline": ("round", "v", "square"),
    "length": ("cropped", "regular", "long", "mini", "midi", "maxi"),
}
TOP_LENGTHS, DRESS_LENGTHS = ATTRIBUTES["length"][:3], ATTRIBUTES["length"][3:]
COMBINATION = ("category", "colour", "pattern", "sleeve", "neckline", "length")


def lab(rgb) -> np.ndarray:
    """CIELAB (D65) of sRGB (..., 3) in 0..255."""
    x = np.asarray(rgb, float) / 255
    x = np.where(x > 0.04045, ((x + 0.055) / 1.055) ** 2.4, x / 12.92)
    xyz = x @ np.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]]).T
    f = xyz / (0.9505, 1.0, 1.089)
    f = np.where(f > 0.008856, np.cbrt(f), 7.787 * f + 16 / 116)
    return np.stack([116 * f[..., 1] - 16, 500 * (f[..., 0] - f[..., 1]), 200 * (f[..., 1] - f[..., 2])], -1)


PALETTE_LAB = lab(list(PALETTE.values()))
# A second colour must differ clearly from the first: at least 48 CIELAB units.
SECOND = {
    a: tuple(b for j, b in enumerate(PALETTE) if np.linalg.norm(PALETTE_LAB[i] - PALETTE_LAB[j]) >= 48)
    for i, a in enumerate(PALETTE)
}


def main_colour(image: np.ndarray, mask: np.ndarray) -> str:
    """The palette's name for most of a garment: each pixel votes for its nearest entry.

    image (h,w,3) 0..255, mask (h,w) true on the garment. Distance in CIELAB with lightness at half weight, because
    light and folds change lightness most.
    """
    pixels = lab(image[np.asarray(mask, bool)])
    distance = np.linalg.norm((pixels[:, None] - PALETTE_LAB) * (0.5, 1, 1), axis=-1)
    return list(PALETTE)[np.bincount(distance.argmin(1), minlength=len(PALETTE)).argmax()]


def split_of(g: Garment) -> str:
    """The split that owns this combination of attributes: 85 % train, 5 % val, 10 % test."""
    key = "/".join(getattr(g, name) for name in COMBINATION)
    bucket = int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "big") % 100
    return "train" if bucket < 85 else "val" if bucket < 90 else "test"


def sample_garment(rng: np.random.Generator, split: str | None = None) -> Garment:
    """A garment, each attribute uniform; with `split`, one of that split's combinations."""
    while True:
        pick = {
            name: str(rng.choice(ATTRIBUTES[name]))
            for name in ("category", "colour", "pattern", "sleeve", "neckline")
        }
        pick["second"] = str(rng.choice(SECOND[pick["colour"]]))
        pick["length"] = str(rng.choice(DRESS_LENGTHS if pick["category"] == "dress" else TOP_LENGTHS))
        g = Garment(**pick)
        if split is None or split_of(g) == split:
            return g


def sample_person(rng: np.random.Generator, difficulty: float = 1.0) -> Person:
    """A person; `difficulty` widens pose and build (0 = everyone stands alike) around version 1's 1.0."""

    def wide(centre: float, half: float, low: float = -1e9, high: float = 1e9) -> float:
        return round(float(np.clip(centre + difficulty * half * rng.uniform(-1, 1), low, high)), 3)

    def arm() -> tuple[float, float]:
        if rng.random() < 0.2 * min(difficulty, 2):  # a hand on the hip
            return wide(46, 5, 35, 60), wide(-44, 7, -60, -30)
        upper = wide(19, 11, 4, 55)
        return upper, round(float(np.clip(upper + difficulty * rng.uniform(-16, 8), -30, 60)), 3)

    def index(table) -> int:
        return int(rng.integers(len(table)))

    return Person(
        skin=index(SKIN),
        hair=str(rng.choice(HAIRSTYLES)),
        hair_colour=index(HAIR_COLOURS),
        arms=(arm(), arm()),
        lean=wide(0, 3.5, -12, 12),
        shift=(wide(0, 3.5, -8, 8), wide(0, 0.8, -1.5, 1.5)),
        scale=wide(1.0, 0.04, 0.88, 1.05),
        build=wide(1.0, 0.06, 0.85, 1.15),
        stance=wide(0.6, 0.6, 0, 2.5),
        bottom=str(rng.choice(BOTTOMS)),
        bottom_colour=index(TROUSERS),
        shoes=index(SHOE_COLOURS),
        wall=index(WALLS),
        floor=index(FLOORS),
        floor_height=wide(110, 3.5, 104, 118),
        prop=str(rng.choice(PROPS)),
        prop_right=bool(rng.random() < 0.5),
    )


def stream(seed: int, split: str, index: int, purpose: int) -> np.random.Generator:
    """The random numbers of one item and one purpose, independent of all others.

    Purposes: 0 garment, 1 person, 2 short texts, 3 FashionGen's row, 4 Fashion-IQ-Cap's caption; 5 and 6 the training
    garments of these two; 7 a triplet's reference and 8 its captions; 9 Dress Code's person and garment.
    """
    return np.random.default_rng([seed, SPLITS.index(split), index, purpose])
