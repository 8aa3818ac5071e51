"""Persons of ToyFashion wearing a garment in a room: the picture and all that VITON-HD and MGD store beside it.

Everything outside a person's repaint mask is a function of the `Person` alone, and so is the mask: the same person in
any two garments differs only inside it.
"""

from dataclasses import replace

import numpy as np
from PIL import Image, ImageFilter

from unifashion.data.body import (
    FLOORS,
    HAIR_COLOURS,
    SHOE_COLOURS,
    SKIN,
    TROUSERS,
    WALLS,
    Body,
    Person,
    body_of,
    draw_pose,
    forearm,
    hand_shapes,
    head_frame,
    head_outline,
    hip_block,
    keypoints,
    torso_skin,
)  # fmt: skip
from unifashion.data.cloth import (
    SILHOUETTE,
    Garment,
    paint_cloth,
    pieces_of,
    sketch_pieces,
    sleeve_piece,
    torso_piece,
)
from unifashion.data.drawing import Canvas, apply, binary, ellipse, limb, paint_rounded, rounded, smooth

# Labels of VITON-HD's image-parse-v3 (the garment's are in cloth.py); left and right are the person's own.
HAIR, PANTS, NECK, SKIRT, FACE = 2, 9, 10, 12, 13
ARMS, LEGS, SHOES = (15, 14), (17, 16), (19, 18)  # (right, left)
PARSE_COLOURS = [
    (0, 0, 0), (128, 0, 0), (255, 0, 0), (0, 85, 0), (170, 0, 51), (255, 85, 0), (0, 0, 85), (0, 119, 221),
    (85, 85, 0), (0, 85, 85), (85, 51, 0), (52, 86, 128), (0, 128, 0), (0, 0, 255), (51, 170, 221), (0, 255, 255),
    (85, 255, 170), (170, 255, 85), (255, 255, 0), (255, 170, 0),
]  # fmt: skip
GREY = 128  # the agnostic picture's fill


def skin_of(person: Person) -> np.ndarray:
    """The person's skin colour (3,)."""
    return np.array(SKIN[person.skin], np.float32)


def leg_radii(person: Person) -> tuple[float, float, float]:
    """Of the trousers, at hip, knee and ankle; they show below the mask, so that the cut can be told there."""
    return {"slim": (6.4, 4.4, 3.4), "wide": (6.6, 6.0, 6.6)}.get(person.bottom, (6.6, 5.2, 4.7))


def paint_room(canvas: Canvas, person: Person, mask: np.ndarray) -> None:
    """Wall, floor and at most one prop, which stays out of the mask so that nothing hidden has to be guessed."""
    x, y = canvas.xy[..., 0:1], canvas.xy[..., 1:2]
    low, high = (np.array(c, np.float32) for c in WALLS[person.wall])
    glow = np.exp(-(((x - 30) / 60) ** 2) - ((y - 30) / 70) ** 2)
    canvas.rgb[:] = low + (high - low) * glow
    top = person.floor_height
    floor = np.array(FLOORS[person.floor]) * (0.86 + 0.16 * np.clip((y - top) / (128 - top), 0, 1))
    canvas.paint(floor, canvas.cover([np.array([(0, top), (96, top), (96, 128), (0, 128)])]))
    canvas.paint(high, canvas.cover([], [(np.array([(-2, top - 0.8), (98, top - 0.8)]), 1.6)]))
    shapes = prop_shapes(person)
    cover = canvas.cover([polygon for polygon, _ in shapes])
    if not (cover * mask).any():
        canvas.shade(0.85, canvas.soft(cover, 2.0, (1.5, 1.5)) * (1 - mask))
        for polygon, colour in shapes:
            paint_rounded(canvas, colour, [polygon], 0)


def prop_shapes(person: Person) -> list[tuple[np.ndarray, tuple[int, int, int]]]:
    """One prop near the picture's edge, as (polygon, colour) in picture units."""
    base = person.floor_height + 5
    if person.prop == "plant":
        pot = [(-5, -10), (5, -10), (4, 0), (-4, 0)]
        tips = ((-7, -24), (0, -30), (6, -25), (-3, -28))
        leaves = [(limb((0, -10), tip, 0.7, 2.4), (86, 136, 92)) for tip in tips]
        shapes = [*leaves, (np.array(pot, float), (190, 118, 86))]
    elif person.prop == "lamp":
        shade = [(-3.5, -62), (3.5, -62), (6.5, -50), (-6.5, -50)]
        shapes = [(limb((0, 0), (0, -50), 0.7, 0.7), (90, 84, 80)), (ellipse(0, 0, 5, 1.3), (90, 84, 80))]
        shapes.append((np.array(shade, float), (250, 232, 190)))
    elif person.prop == "frame":
        box = np.array([(-9, -100), (9, -100), (9, -76), (-9, -76)], float)
        shapes = [(box, (120, 92, 70)), (box * (0.8, 0.82) + (0, -15.8), (238, 232, 220))]
        shapes.append((ellipse(0, -88, 4, 5), (196, 132, 112)))
    elif person.prop == "stool":
        legs = [(limb((x, -18), (x * 1.4, 1), 0.9, 0.8), (134, 98, 66)) for x in (-4, 4)]
        shapes = [*legs, (ellipse(0, -18.5, 7, 2), (168, 126, 88))]
    else:
        shapes = []
    centre = (84.0 if person.prop_right else 12.0, base)
    return [(polygon + centre, colour) for polygon, colour in shapes]


def paint_legs(canvas: Canvas, person: Person, body: Body) -> None:
    """Shins, shoes, and trousers or a long skirt over them; both reach below the mask."""
    k, r = body.scale, leg_radii(person)
    colour = TROUSERS[person.bottom_colour]
    for side, (_, knee, ankle) in enumerate(body.leg):
        out = -1 if side == 0 else 1
        paint_rounded(canvas, skin_of(person), [limb(knee, ankle, 3.6 * k, 2.3 * k)], LEGS[side])
        toe = [(-2.9 + out, 5.0), (out * 1.2, 6.2), (2.9 + out, 5.0)]
        toe = [(-2.6, -3.2), (-3.3, 1.5), *toe, (3.3, 1.5), (2.6, -3.2)]
        shoe = smooth(np.array(toe) * k + ankle, closed=True)
        paint_rounded(canvas, SHOE_COLOURS[person.shoes], [shoe], SHOES[side], 0.3)
        sole = shoe[shoe[:, 1] > ankle[1] + 3.8 * k]
        canvas.shade(0.55, canvas.cover([], [(sole, 0.9)]))
    if person.bottom == "skirt":
        t = np.linspace(1, -1, 15)[:, None]
        hem = np.concatenate([t * 11.5, 81 + 1.2 * (1 - t**2)], 1)
        pelvis = np.array(body.leg[0][0] + body.leg[1][0]) / 2 - (0, k)
        side = smooth([(9.8, 26), (12.2, 34), (12.4, 50), (11.5, 81)])
        outline = np.concatenate([side, hem[1:-1], side[::-1] * (-1, 1)])
        outline = (outline - (0, 36)) * (k * person.build, k) + pelvis
        paint_rounded(canvas, colour, [outline], SKIRT)
        return
    shapes = [hip_block(body)]
    for hip, knee, ankle in body.leg:
        end = knee + (0.80 if person.bottom == "cropped" else 1.0) * (ankle - knee)
        shapes += [limb(hip, knee, r[0] * k, r[1] * k), limb(knee, end, r[1] * k, r[2] * k, round_end=False)]
    paint_rounded(canvas, colour, shapes, PANTS)
    crease = np.array([(0, 36), (0, 46)])
    canvas.shade(0.75, canvas.cover([], [(apply(body.torso, crease), 0.8)]))


def hair_back(style: str) -> list[np.ndarray]:
    """Hair behind the head, body units; none of it falls below the chin."""
    if style == "bob":
        half = [(-7.2, -7.6), (-8.0, -13), (-6, -21), (0, -23.6)]
        return [smooth([*half, *[(-x, y) for x, y in half[2::-1]], (0, -9)], closed=True)]
    if style == "bun":
        return [ellipse(0, -23.6, 3.5, 2.9)]
    if style == "ponytail":
        tail = [(3, -22), (8, -21.5), (10.8, -15), (10.0, -7.2), (8.4, -9), (7.6, -15), (4, -18)]
        return [smooth(tail, closed=True)]
    if style == "afro":
        return [ellipse(0, -16.2, 9.6, 9.0)]
    if style == "curly":
        half = [(6.4, -11), (7, -15), (5.6, -19.4), (2.2, -22.2)]
        spots = [*half, *[(-x, y) for x, y in half]]
        return [ellipse(x, y, 2.9, 2.9) for x, y in spots]
    return []


def hair_front(style: str) -> list[np.ndarray]:
    """Hair over the forehead, body units."""
    cap = [(-6.3, -12.5), (-6.5, -17), (-4.4, -21.4), (0, -23.2), (4.4, -21.4), (6.5, -17), (6.3, -12.5)]
    fringe = {
        "short": [(5.2, -15.5), (3.0, -17.6), (0, -18.2), (-3.0, -17.6), (-5.2, -15.5)],
        "side": [(5.4, -14.8), (3.6, -16.6), (-1.2, -17.4), (-3.4, -19.6), (-5.3, -15.2)],
        "bob": [(5.0, -12.2), (4.4, -16.2), (0, -16.8), (-4.4, -16.2), (-5.0, -12.2)],
        "bun": [(5.3, -15.2), (2.5, -19.2), (0, -19.9), (-2.5, -19.2), (-5.3, -15.2)],
        "ponytail": [(5.3, -14.6), (4.0, -17.6), (-1.6, -19.6), (-4.4, -17.0), (-5.3, -14.6)],
        "afro": [(5.4, -15.0), (3.2, -18.2), (0, -18.8), (-3.2, -18.2), (-5.4, -15.0)],
        "curly": [(5.3, -14.6), (3.2, -17.2), (1.0, -16.6), (-1.2, -17.8), (-3.6, -16.6), (-5.3, -14.6)],
        "buzz": [(5.4, -16.0), (3.2, -18.8), (0, -19.4), (-3.2, -18.8), (-5.4, -16.0)],
    }[style]
    if style == "buzz":
        cap = [(-5.9, -14.0), (-5.9, -17), (-4.0, -20.6), (0, -21.9), (4.0, -20.6), (5.9, -17), (5.9, -14.0)]
    return [np.concatenate([smooth(cap), smooth(fringe)])]


def paint_head(canvas: Canvas, person: Person, body: Body) -> None:
    """Face, features, and the hair in front."""
    at = head_frame(body)
    skin, hair = skin_of(person), np.array(HAIR_COLOURS[person.hair_colour], np.float32)

    def place(polygons: list) -> list[np.ndarray]:
        return [apply(at, p) for p in polygons]

    paint_rounded(canvas, skin * 0.96, place([ellipse(s * 5.8, -12.6, 1.2, 1.9) for s in (-1, 1)]), FACE)
    face = paint_rounded(canvas, skin, place([head_outline()]), FACE, 0.16)
    cheeks = canvas.soft(canvas.cover(place([ellipse(s * 3.3, -9.8, 1.5, 1.1) for s in (-1, 1)])), 0.9)
    canvas.paint(skin * (1.0, 0.74, 0.72), 0.45 * cheeks * face)
    brows = place([smooth([(s * 1.3, -14.9), (s * 2.5, -15.5), (s * 3.7, -14.8)]) for s in (-1, 1)])
    canvas.paint(hair * 0.85, canvas.cover([], [(brow, 0.75) for brow in brows]))
    eyes = canvas.cover(place([ellipse(s * 2.45, -12.8, 1.15, 0.7) for s in (-1, 1)]))
    canvas.paint(0.6 * np.array((244, 240, 236)) + 0.4 * skin, eyes)
    canvas.paint((44, 32, 30), canvas.cover(place([ellipse(s * 2.35, -12.8, 0.75, 0.8) for s in (-1, 1)])))
    nose = apply(at, smooth([(0.1, -12.4), (0.7, -10.2), (-0.3, -9.9)]))
    canvas.shade(0.8, canvas.cover([], [(nose, 0.6)]))
    lips = apply(at, smooth([(-1.7, -8.0), (0, -7.3), (1.7, -8.0)]))
    canvas.paint(skin * (0.82, 0.5, 0.5) + (14, 0, 4), canvas.cover([], [(lips, 0.95)]))
    cover = paint_rounded(canvas, hair, place(hair_front(person.hair)), HAIR, 0.35)
    shine = canvas.soft(canvas.cover(place([ellipse(-2.4, -20.4, 2.4, 1.0)])), 0.8)
    canvas.paint(hair + 60, 0.45 * shine * cover)


def garment_envelope(body: Body) -> list[np.ndarray]:
    """Outlines of everything any garment can cover on this body."""
    outlines = []
    for category in SILHOUETTE:
        longest = "maxi" if category == "dress" else "long"
        g = Garment(category, "grey", "black", "plain", "long", "round", longest)
        pieces = [torso_piece(replace(g, neckline=neckline), body) for neckline in ("round", "v", "square")]
        for sleeve in ("short", "long"):
            pieces += [sleeve_piece(replace(g, sleeve=sleeve), body, side) for side in (0, 1)]
        outlines += [outline for piece in pieces for outline in piece.outlines]
    # and the neck and the shoulders that necklines leave bare
    right = [(4.2, -3.6), (4.4, -1.5), (8.5, 0.2), (13, 2.4)]
    outlines.append(apply(body.torso, np.concatenate([right, np.array(right)[::-1] * (-1, 1)])))
    return outlines


def repaint_mask(person: Person, canvas: Canvas) -> np.ndarray:
    """(h,w) bool, True = repaint: what any garment may cover on this person, dilated, without hands and head."""
    body = body_of(person)
    wide = canvas.cover(garment_envelope(body)) > 0
    size = 2 * round(2 * canvas.ratio) + 1
    wide = np.asarray(binary(wide).filter(ImageFilter.MaxFilter(size))) > 0
    head = apply(head_frame(body), head_outline())
    front = canvas.cover([*hand_shapes(body, 0), *hand_shapes(body, 1), head])
    return wide & (front < 0.999)


def draw_person(person: Person, g: Garment, size: tuple[int, int] = (128, 96)) -> dict:
    """A person in a garment, and everything VITON-HD and MGD store beside the picture. `size` is (height, width).

    Returns PIL images and one array: "image" RGB; "mask" L, 255 = repaint (hard, the person's alone); "agnostic" RGB,
    the image with the mask filled grey 128; "pose" RGB (see `draw_pose`); "parse" P (labels of image-parse-v3);
    "sketch" L, the worn garment's lines bright on black; "garment" L, 255 = visible garment; "keypoints" (25,3)
    OpenPose BODY25 x, y in pixels, confidence.
    """
    canvas, body = Canvas(size), body_of(person)
    mask = repaint_mask(person, canvas)
    paint_room(canvas, person, mask)
    k, skin = body.scale, skin_of(person)
    feet = (body.leg[0][2] + body.leg[1][2]) / 2 + (0, 5.0 * k)
    canvas.shade(0.72, canvas.soft(canvas.cover([ellipse(*feet, 16, 2.6)]), 1.8))
    back = [apply(head_frame(body), p) for p in hair_back(person.hair)]
    if back:
        paint_rounded(canvas, np.array(HAIR_COLOURS[person.hair_colour]) * 0.9, back, HAIR, 0.35)
    neck = paint_rounded(canvas, skin, [torso_skin(body)], NECK)
    chin = canvas.soft(canvas.cover([apply(head_frame(body), head_outline())]), 1.0, (0.4, 2.2))
    canvas.shade(0.82, chin * neck)
    paint_legs(canvas, person, body)
    arms = []
    for side, (shoulder, elbow, _) in enumerate(body.arm):
        upper = limb(shoulder, elbow, 3.5 * k, 2.9 * k)
        arms.append(canvas.cover([upper, forearm(body, side), *hand_shapes(body, side)]))
        canvas.paint(rounded(canvas, skin, arms[side]), arms[side], ARMS[side])
    canvas.shadow_room = mask
    torso, *sleeves = pieces_of(g, body)
    paint_cloth(canvas, g, torso, shadow=0.3)
    occluders = []
    for side in (0, 1):
        arm = rounded(canvas, skin, arms[side])  # forearm and hand come in front again, shaded as one arm
        if g.sleeve != "long":
            canvas.paint(arm, canvas.cover([forearm(body, side)]), ARMS[side])
            occluders.append(forearm(body, side))
        if sleeves:
            paint_cloth(canvas, g, sleeves[side], shadow=0.25)
        canvas.paint(arm, canvas.cover(hand_shapes(body, side)), ARMS[side])
        occluders += hand_shapes(body, side)
    paint_head(canvas, person, body)
    occluders.append(apply(head_frame(body), head_outline()))
    image = canvas.image()
    agnostic = np.where(mask[..., None], np.uint8(GREY), np.asarray(image))
    parse = Image.fromarray(canvas.labels, "P")
    parse.putpalette([channel for colour in PARSE_COLOURS for channel in colour])
    return {
        "image": image,
        "mask": binary(mask),
        "agnostic": Image.fromarray(agnostic),
        "pose": draw_pose(person, size),
        "parse": parse,
        "sketch": sketch_pieces(canvas, [torso, *sleeves], occluders),
        "garment": binary(canvas.garment > 0.5),
        "keypoints": keypoints(body) * (canvas.ratio, canvas.ratio, 1),
    }
