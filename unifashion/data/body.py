"""Persons of ToyFashion without their clothes: attributes, where the limbs are, pose picture and keypoints.

*Body units*: the origin is the base of the neck, u to the right, v down, and one unit is one picture unit on a
standard person. A `Body` places torso, arms and legs, whose frames map body units to picture units.
"""

from dataclasses import dataclass, field

import numpy as np
from PIL import Image

from unifashion.data.drawing import Canvas, affine, apply, bone, direction, ellipse, limb, smooth

SKIN = (
    (252, 226, 207), (244, 208, 180), (232, 188, 152), (214, 164, 124),
    (190, 136, 96), (160, 108, 74), (124, 82, 56), (88, 58, 42),
)  # fmt: skip
HAIR_COLOURS = (
    (34, 28, 28), (62, 42, 32), (98, 64, 40), (142, 92, 52),
    (196, 152, 92), (226, 196, 136), (158, 66, 40), (150, 148, 150),
)  # fmt: skip
TROUSERS = (
    (44, 52, 76), (70, 98, 144), (34, 34, 38), (196, 178, 146),
    (96, 100, 82), (108, 106, 110), (224, 220, 212), (112, 66, 58),
)  # fmt: skip
SHOE_COLOURS = ((240, 240, 238), (40, 38, 40), (128, 82, 52), (184, 52, 50), (64, 92, 150))
WALLS = (
    ((232, 222, 208), (244, 238, 228)), ((206, 220, 226), (232, 240, 242)), ((222, 212, 226), (240, 234, 242)),
    ((212, 224, 206), (236, 242, 230)), ((236, 210, 200), (248, 232, 224)), ((200, 204, 212), (228, 230, 234)),
    ((226, 214, 178), (244, 236, 212)), ((184, 204, 206), (216, 228, 228)),
)  # fmt: skip
FLOORS = ((206, 178, 146), (186, 178, 170), (160, 132, 106), (216, 206, 194), (150, 154, 160))
BOTTOMS = ("slim", "straight", "wide", "cropped", "skirt")
HAIRSTYLES = ("short", "side", "bob", "bun", "ponytail", "afro", "curly", "buzz")
PROPS = ("none", "plant", "lamp", "frame", "stool")
UPPER_ARM, FOREARM = 18.5, 16.5
# Half the face's outline, chin to crown, in the head's units.
HEAD = np.array([(0, -5.2), (2.6, -6.0), (4.8, -8.6), (5.8, -12.6), (5.6, -16.6), (3.6, -20.2), (0, -21.4)])


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


def body_of(person: Person) -> Body:
    """The body of a person, as posed."""
    return Body(person.scale, person.build, person.lean, person.shift, person.arms, person.stance)


def torso_skin(body: Body) -> np.ndarray:
    """Neck, shoulders and trunk, picture units."""
    right = [
        (3.5, -7),
        (3.7, -2.2),
        (8.5, 0.9),
        (13, 3.4),
        (13.4, 7),
        (11, 12),
        (9.2, 21),
        (10.4, 29),
        (10, 36),
    ]
    return apply(body.torso, np.concatenate([smooth(right), smooth(right)[::-1] * (-1, 1)]))


def hip_block(body: Body) -> np.ndarray:
    """Waistband to crotch, picture units."""
    outline = [(-9.6, 26), (-11.6, 32), (-11.8, 37), (0, 42), (11.8, 37), (11.6, 32), (9.6, 26)]
    return apply(body.torso, smooth(outline))


def forearm(body: Body, side: int) -> np.ndarray:
    """Elbow to wrist, picture units."""
    _, elbow, wrist = body.arm[side]
    return limb(elbow, wrist, 2.9 * body.scale, 2.1 * body.scale)


def hand_shapes(body: Body, side: int) -> list[np.ndarray]:
    """Palm and thumb, picture units; hands are in front of everything and never covered."""
    _, elbow, wrist = body.arm[side]
    frame = bone(wrist, wrist + (wrist - elbow), body.scale)
    inward = 1 if side == 0 else -1
    palm = smooth([(-1.9, -0.8), (-2.3, 2.4), (-1.7, 6.0), (0, 7.0), (1.7, 6.0), (2.3, 2.4), (1.9, -0.8)])
    thumb = limb((inward * -1.6, 1.0), (inward * -3.0, 4.2), 1.0, 0.8)
    return [apply(frame, palm), apply(frame, thumb)]


def head_frame(body: Body) -> np.ndarray:
    """The head's own frame: the torso's, a little larger and set down on a shorter neck."""
    return np.column_stack([body.torso[:, :2] * 1.08, apply(body.torso, (0, 1.5))])


def head_outline() -> np.ndarray:
    """The face in the head's units (see `head_frame`)."""
    return smooth(np.concatenate([HEAD, HEAD[-2:0:-1] * (-1, 1)]), closed=True)


def pose_parts(body: Body) -> list[tuple[list[np.ndarray], np.ndarray, tuple[float, float, float]]]:
    """Back to front: (polygons, frame, (from u, v from, v to)) of 14 parts; u is symmetric about 0, body units."""
    k, parts = body.scale, []
    for side in (0, 1):
        hip, knee, ankle = body.leg[side]
        foot = ellipse(*(ankle + (0, 1.6 * k)), 3.6 * k, 4.4 * k)
        parts.append(([limb(knee, ankle, 4.4 * k, 2.6 * k)], bone(knee, ankle, k), (5.0, -4.0, 26.0)))
        parts.append(([foot], affine(ankle, 0, k, k), (4.0, -3.0, 6.0)))
        parts.append(([limb(hip, knee, 6.2 * k, 4.4 * k)], bone(hip, knee, k), (7.0, -6.0, 30.0)))
    parts.append(([torso_skin(body), hip_block(body)], body.torso, (15.0, -7.0, 42.0)))
    for side in (0, 1):
        shoulder, elbow, wrist = body.arm[side]
        upper = limb(shoulder, elbow, 3.5 * k, 2.9 * k)
        parts.append(([upper], bone(shoulder, elbow, k), (4.0, -4.0, 22.0)))
        parts.append(([forearm(body, side)], bone(elbow, wrist, k), (4.0, -3.0, 19.0)))
        hand = bone(wrist, wrist + (wrist - elbow), k)
        parts.append((hand_shapes(body, side), hand, (4.5, -2.0, 8.0)))
    parts.append(([apply(head_frame(body), head_outline())], head_frame(body), (6.5, -22.0, -5.0)))
    return parts


# One hue per part in `pose_parts` order (right leg, foot, thigh; left; torso; right arm, forearm, hand; left; head):
# parts that touch are far apart on the wheel of 14.
POSE_HUES = np.array([0, 4, 8, 13, 6, 10, 12, 1, 5, 9, 3, 7, 11, 2]) / 14


def draw_pose(person: Person, size: tuple[int, int] = (128, 96)) -> Image.Image:
    """A drawn DensePose picture (RGB, black ground), a function of the person alone, with hard edges.

    In HSV the hue names the part, the value rises 0.5 to 1 along it (v) and the saturation 0.45 to 1 across it (u),
    so that a pixel tells where on the body it lies.
    """
    canvas = Canvas(size)
    parts = pose_parts(body_of(person))
    for (polygons, frame, (half, start, end)), hue in zip(parts, POSE_HUES, strict=True):
        inside = canvas.cover(polygons) > 0.5
        u, v = ((canvas.xy[inside] - frame[:, 2]) @ np.linalg.inv(frame[:, :2]).T).T
        across = 0.45 + 0.55 * np.clip((u / half + 1) / 2, 0, 1)
        along = 0.5 + 0.5 * np.clip((v - start) / (end - start), 0, 1)
        # The hue's red, green, blue.
        pure = np.clip(np.abs((6 * hue + np.array([0, 4, 2])) % 6 - 3) - 1, 0, 1)
        canvas.rgb[inside] = 255 * along[:, None] * (1 - across[:, None] * (1 - pure))
    return canvas.image()


def keypoints(body: Body) -> np.ndarray:
    """(25,3): OpenPose BODY25 joints as x, y in picture units and confidence 1; right and left are the person's own."""
    (shoulder_r, elbow_r, wrist_r), (shoulder_l, elbow_l, wrist_l) = body.arm
    (hip_r, knee_r, ankle_r), (hip_l, knee_l, ankle_l) = body.leg
    neck, pelvis = apply(body.torso, [(0, 1.5), (0, 36)])
    face = [(0, -10.4), (-2.5, -12.9), (2.5, -12.9), (-5.8, -12.6), (5.8, -12.6)]
    nose, eye_r, eye_l, ear_r, ear_l = apply(head_frame(body), face)
    points = [nose, neck, shoulder_r, elbow_r, wrist_r, shoulder_l, elbow_l, wrist_l, pelvis]
    points += [hip_r, knee_r, ankle_r, hip_l, knee_l, ankle_l, eye_r, eye_l, ear_r, ear_l]
    for side, ankle in ((1, ankle_l), (-1, ankle_r)):  # big toe, small toe, heel
        points += [ankle + body.scale * np.array(p) for p in ((side * 1.0, 5.0), (side * 3.4, 4.2), (0, 2.0))]
    return np.concatenate([np.array(points), np.ones((25, 1))], 1)
