"""MGD's repaint mask, of a map of labels and of joints: the garment and the arms, filled up to a box, without what stays.

As `src/datasets/{vitonhd,dresscode}.py` of Multimodal Garment Designer make it, at 512x384. VITON-HD's labels are those of
image-parse-v3, Dress Code's those of its label_maps, which are others.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

from unifashion import UserError
from unifashion.data import open_image

SIZE = (512, 384)  # (h,w) at which MGD makes it
ARMS = (14, 15)  # left, right: the same in both tables
# Joints among OpenPose's BODY25 and its older 18 alike: right, left
SHOULDERS, ELBOWS, WRISTS = (2, 5), (3, 6), (4, 7)


@dataclass(frozen=True)
class Rules:
    """Labels of what is repainted and of what stays, for one kind of garment."""

    garment: tuple[int, ...]
    fixed: tuple[int, ...]
    head: tuple[int, ...]  # stays, too
    arms: bool = True  # whether the garment may cover arms: they are repainted, hands stay
    neck: bool = False  # whether the head ends above the shoulders, so that the neck is repainted
    grow: int = 0  # pixels by which what is repainted grows
    arm_width: float = 90 / 512  # of the picture's height


VITONHD = Rules(garment=(5, 6, 7), fixed=(1, 2, 18, 19, 9, 12), head=(1, 2, 4, 13))
ALWAYS = (1, 2, 3, 9, 10, 16, 17)  # hat, hair, sunglasses, shoes, bag, scarf
HEAD = (1, 2, 3, 11)
DRESSCODE = {
    "dresses": Rules((7, 12, 13), ALWAYS, HEAD, neck=True, grow=10, arm_width=45 / 512),
    "upper_body": Rules((4,), (*ALWAYS, 5, 6), HEAD, neck=True, grow=10, arm_width=45 / 512),
    # The original forgets skirts (5): a wearer's would stay in the picture.
    "lower_body": Rules((5, 6, 12, 13), (*ALWAYS, 4, *ARMS), HEAD, arms=False, grow=10, arm_width=45 / 512),
}


class Masks(NamedTuple):
    """(h,w) bool each. `repaint` is the mask; before the box was filled it was `region`; `hands` is what is left of the arms."""

    repaint: np.ndarray
    region: np.ndarray
    hands: np.ndarray


def known(joint: np.ndarray) -> bool:
    return joint[0] > 1 or joint[1] > 1


def arm_band(joints: np.ndarray, size: tuple[int, int], width: int) -> np.ndarray:
    """(h,w) bool: a thick line from wrist to wrist over elbows and shoulders, without the joints of an arm that are unknown.

    If both arms are, the left one's joints are taken as they are, as in the original.
    """
    (shoulder_r, shoulder_l), (elbow_r, elbow_l), (wrist_r, wrist_l) = (
        joints[list(pair)] for pair in (SHOULDERS, ELBOWS, WRISTS)
    )
    right, left = [elbow_r, wrist_r], [wrist_l, elbow_l]
    if not known(wrist_r):
        right = [elbow_r] if known(elbow_r) else []
    elif not known(wrist_l):
        left = [elbow_l] if known(elbow_l) else []
    line = np.concatenate([*left, shoulder_l, shoulder_r, *right])
    picture = Image.new("L", size[::-1])
    points = line.clip(min=0).astype(int).tolist()
    ImageDraw.Draw(picture).line(points, "white", width, "curve")
    return np.asarray(picture) > 0


def above_shoulders(joints: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """(h,w) bool: higher than 20/512 of the height above the line through the shoulders. Everything if one is unknown."""
    (x0, y0), (x1, y1) = joints[list(SHOULDERS)]
    rows, columns = np.mgrid[: size[0], : size[1]]
    if not (known(joints[2]) and known(joints[5])) or x0 == x1:
        return np.ones(size, bool)
    line = y0 + (y1 - y0) / (x1 - x0) * (columns - x0)
    return rows < (line - 20 * (size[0] / 512)).astype(int)


def mgd_masks(
    parse: Image.Image, joints: np.ndarray, frame: tuple[int, int], rules: Rules, size: tuple[int, int] = SIZE
) -> Masks:
    """
    parse   labels, L or P, of any size
    joints  (n,2 or more) x, y, ... in pixels of a picture of the size `frame` (h,w); unknown ones are 0, or less
    """
    h, w = size
    label = np.asarray(parse.resize((w, h), Image.Resampling.NEAREST))
    joints = np.asarray(joints, float)[:, :2] * (w / frame[1], h / frame[0])
    region, fixed = np.isin(label, rules.garment), np.isin(label, rules.fixed)
    head = np.isin(label, rules.head)
    arms = arm_band(joints, size, int(rules.arm_width * h))
    hands = np.isin(label, ARMS) & ~arms
    if rules.arms:
        region, fixed = region | arms, fixed | hands
    if rules.neck:
        neck = head & ~above_shoulders(joints, size)
        region, head = region | neck, head & ~neck
    if rules.grow:
        grown = Image.fromarray(region.astype(np.uint8)).filter(ImageFilter.MaxFilter(2 * rules.grow + 1))
        region = np.asarray(grown) > 0
    fixed = fixed | head
    region = region & ~fixed
    box = np.zeros(size, bool)
    if region.any():
        rows, columns = (np.flatnonzero(region.any(axis)) for axis in (1, 0))
        box[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1] = True
    return Masks(box & ~fixed, region, hands)


def read_mask(
    person: Image.Image, labels: Path, joints: np.ndarray, frame: tuple[int, int], rules: Rules
) -> Image.Image:
    """L, 255 = repaint, of the person's size.

    Raises UserError if the picture of labels is damaged or shows nothing to repaint.
    """
    repaint = mgd_masks(open_image(labels, "P"), joints, frame, rules).repaint
    if not repaint.any():
        raise UserError(f"{labels}: no garment and no arms to repaint")
    return Image.fromarray(repaint.astype(np.uint8) * 255).resize(person.size, Image.Resampling.NEAREST)


def check_joints(file: Path, joints) -> np.ndarray:
    """(n,2 or more) of a list of lists or of numbers in threes. Raises UserError if it is not a person's arms and more."""
    try:
        rows = np.array(joints, float)
        rows = rows.reshape(-1, 3) if rows.ndim == 1 else rows
        if len(rows) >= 8 and rows.shape[1] >= 2 and np.isfinite(rows).all():
            return rows
    except (TypeError, ValueError):
        pass
    raise UserError(f"{file}: not the joints of a person: {str(joints)[:100]}")
