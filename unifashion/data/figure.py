"""Draw ToyFashion's pictures from `unifashion.data.drawing`'s shapes: product shots, persons and all derived maps.

Everything outside a person's repaint mask is a function of the `Person` alone, and so is the mask: the same person in
any two garments differs only inside it.
"""

from dataclasses import replace

import numpy as np
from PIL import Image, ImageFilter

from unifashion.data import drawing as d
from unifashion.data.drawing import Body, Canvas, Garment, Person, apply, body_of, ellipse, limb, smooth

# image-parse-v3 of VITON-HD; left and right are the person's own
HAIR, UPPER, DRESS, COAT, PANTS, NECK, SKIRT, FACE = 2, 5, 6, 7, 9, 10, 12, 13
ARMS, LEGS, SHOES = (15, 14), (17, 16), (19, 18)  # (right, left)
PARSE_COLOURS = [
    (0, 0, 0), (128, 0, 0), (255, 0, 0), (0, 85, 0), (170, 0, 51), (255, 85, 0), (0, 0, 85), (0, 119, 221),
    (85, 85, 0), (0, 85, 85), (85, 51, 0), (52, 86, 128), (0, 128, 0), (0, 0, 255), (51, 170, 221), (0, 255, 255),
    (85, 255, 170), (170, 255, 85), (255, 255, 0), (255, 170, 0),
]  # fmt: skip
BOTTOMS = ("slim", "straight", "wide", "cropped", "skirt")
HAIRSTYLES = ("short", "side", "bob", "bun", "ponytail", "afro", "curly", "buzz")
PROPS = ("none", "plant", "lamp", "frame", "stool")
GREY = 128  # the agnostic picture's fill


# ---------------------------------------------------------------------------------------------- product shots


def product_body(view: int) -> Body:
    """0 front, as a centred person stands; 1 slightly turned, larger, shifted; 2 a closer crop."""
    if view == 1:
        return Body(scale=1.12, build=0.92, lean=-5.0, shift=(2.5, 3.0), arms=((24.0, 18.0), (12.0, 10.0)))
    if view == 2:
        return Body(scale=1.45, shift=(0.0, 13.0), arms=((17.0, 13.0), (17.0, 13.0)))
    return Body()


def pieces_of(g: Garment, body: Body) -> list:
    """Torso first, then the sleeves that lie over it."""
    sleeves = [] if g.sleeve == "sleeveless" else [d.sleeve_piece(g, body, side) for side in (0, 1)]
    return [d.torso_piece(g, body), *sleeves]


def draw_product(g: Garment, view: int = 0, size: tuple[int, int] = (128, 96)) -> dict[str, Image.Image]:
    """The flat garment on a light ground: {"image": RGB, "mask": L, 255 = garment}; size is (height, width)."""
    canvas, body = Canvas(size), product_body(view)
    glow = np.clip(1 - np.hypot(canvas.xy[..., 0] - 40, canvas.xy[..., 1] - 50) / 110, 0, 1)
    canvas.rgb[:] = np.array((222, 224, 228)) + np.array((24, 23, 21)) * glow[..., None]
    pieces = pieces_of(g, body)
    everything = canvas.cover([outline for piece in pieces for outline in piece.outlines])
    canvas.shade(0.72, canvas.soft(everything, 2.2, (1.4, 2.2)))
    back = [(-6.2, -1.2), (-3.5, -2.4), (3.5, -2.4), (6.2, -1.2), *d.neckline_curve(g.neckline)[::-1]]
    inside = canvas.cover([apply(body.torso, back)])
    canvas.paint(np.array(d.PALETTE[g.colour]) * 0.62 + 8, inside, cloth=True)
    canvas.shade(0.78, inside * canvas.soft(everything, 1.2, (0, 1.6)))
    for piece in pieces:
        d.paint_cloth(canvas, g, piece, d_label(g), shadow=0.3)
    return {"image": canvas.image(), "mask": binary(canvas.garment > 0.5)}


def d_label(g: Garment) -> int:
    return {"dress": DRESS, "jacket": COAT}.get(g.category, UPPER)


def binary(mask: np.ndarray) -> Image.Image:
    return Image.fromarray(mask.astype(np.uint8) * 255)


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


# ---------------------------------------------------------------------------------------------- persons


def skin_of(person: Person) -> np.ndarray:
    return np.array(d.SKIN[person.skin], np.float32)


def hand_shapes(body: Body, side: int) -> list[np.ndarray]:
    _, elbow, wrist = body.arm[side]
    frame = d.bone(wrist, wrist + (wrist - elbow), body.scale)
    inward = 1 if side == 0 else -1
    palm = smooth([(-1.9, -0.8), (-2.3, 2.4), (-1.7, 6.0), (0, 7.0), (1.7, 6.0), (2.3, 2.4), (1.9, -0.8)])
    thumb = limb((inward * -1.6, 1.0), (inward * -3.0, 4.2), 1.0, 0.8)
    return [apply(frame, palm), apply(frame, thumb)]


def forearm(body: Body, side: int) -> np.ndarray:
    _, elbow, wrist = body.arm[side]
    return limb(elbow, wrist, 2.9 * body.scale, 2.1 * body.scale)


def leg_radii(person: Person) -> tuple[float, float, float]:
    return {"slim": (6.4, 4.4, 3.4), "wide": (6.6, 6.0, 6.6)}.get(person.bottom, (6.6, 5.2, 4.7))


def paint_room(canvas: Canvas, person: Person, mask: np.ndarray) -> None:
    """Wall, floor and at most one prop, which stays out of the mask so that nothing hidden has to be guessed."""
    x, y = canvas.xy[..., 0:1], canvas.xy[..., 1:2]
    low, high = (np.array(c, np.float32) for c in d.WALLS[person.wall])
    glow = np.exp(-(((x - 30) / 60) ** 2) - ((y - 30) / 70) ** 2)
    canvas.rgb[:] = low + (high - low) * glow
    top = person.floor_height
    floor = np.array(d.FLOORS[person.floor]) * (0.86 + 0.16 * np.clip((y - top) / (128 - top), 0, 1))
    canvas.paint(floor, canvas.cover([np.array([(0, top), (96, top), (96, 128), (0, 128)])]))
    canvas.paint(high, canvas.cover([], [(np.array([(-2, top - 0.8), (98, top - 0.8)]), 1.6)]))
    shapes = prop_shapes(person)
    cover = canvas.cover([polygon for polygon, _ in shapes])
    if not (cover * mask).any():
        canvas.shade(0.85, canvas.soft(cover, 2.0, (1.5, 1.5)) * (1 - mask))
        for polygon, colour in shapes:
            d.paint_rounded(canvas, colour, [polygon], 0)


def prop_shapes(person: Person) -> list[tuple[np.ndarray, tuple[int, int, int]]]:
    """One prop near the picture's edge, as (polygon, colour) in picture units."""
    base = person.floor_height + 5
    if person.prop == "plant":
        pot = [(-5, -10), (5, -10), (4, 0), (-4, 0)]
        leaves = [
            (limb((0, -10), (x, y), 0.7, 2.4), (86, 136, 92))
            for x, y in ((-7, -24), (0, -30), (6, -25), (-3, -28))
        ]
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
    k, r = body.scale, leg_radii(person)
    colour = d.TROUSERS[person.bottom_colour]
    for side, (_, knee, ankle) in enumerate(body.leg):
        out = -1 if side == 0 else 1
        d.paint_rounded(canvas, skin_of(person), [limb(knee, ankle, 3.6 * k, 2.3 * k)], LEGS[side])
        toe = [
            (-2.6, -3.2),
            (-3.3, 1.5),
            (-2.9 + out, 5.0),
            (out * 1.2, 6.2),
            (2.9 + out, 5.0),
            (3.3, 1.5),
            (2.6, -3.2),
        ]
        shoe = smooth(np.array(toe) * k + ankle, closed=True)
        d.paint_rounded(canvas, d.SHOES[person.shoes], [shoe], SHOES[side], 0.3)
        sole = shoe[shoe[:, 1] > ankle[1] + 3.8 * k]
        canvas.shade(0.55, canvas.cover([], [(sole, 0.9)]))
    if person.bottom == "skirt":
        t = np.linspace(1, -1, 15)[:, None]
        hem = np.concatenate([t * 11.5, 81 + 1.2 * (1 - t**2)], 1)
        pelvis = np.array(body.leg[0][0] + body.leg[1][0]) / 2 - (0, k)
        side = smooth([(9.8, 26), (12.2, 34), (12.4, 50), (11.5, 81)])
        outline = np.concatenate([side, hem[1:-1], side[::-1] * (-1, 1)])
        outline = (outline - (0, 36)) * (k * person.build, k) + pelvis
        d.paint_rounded(canvas, colour, [outline], SKIRT)
        return
    shapes = [hip_block(body)]
    for hip, knee, ankle in body.leg:
        end = knee + (0.80 if person.bottom == "cropped" else 1.0) * (ankle - knee)
        shapes += [limb(hip, knee, r[0] * k, r[1] * k), limb(knee, end, r[1] * k, r[2] * k, round_end=False)]
    d.paint_rounded(canvas, colour, shapes, PANTS)
    crease = np.array([(0, 36), (0, 46)])
    canvas.shade(0.75, canvas.cover([], [(apply(body.torso, crease), 0.8)]))


def hip_block(body: Body) -> np.ndarray:
    return apply(
        body.torso, smooth([(-9.6, 26), (-11.6, 32), (-11.8, 37), (0, 42), (11.8, 37), (11.6, 32), (9.6, 26)])
    )


def torso_skin(body: Body) -> np.ndarray:
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


HEAD = np.array([(0, -5.2), (2.6, -6.0), (4.8, -8.6), (5.8, -12.6), (5.6, -16.6), (3.6, -20.2), (0, -21.4)])


def head_outline() -> np.ndarray:
    return smooth(np.concatenate([HEAD, HEAD[-2:0:-1] * (-1, 1)]), closed=True)


def hair_back(style: str) -> list[np.ndarray]:
    """Hair behind the head, body units; none of it falls below the chin."""
    if style == "bob":
        return [
            smooth(
                [
                    (-7.6, -6.2),
                    (-8.0, -13),
                    (-6, -21),
                    (0, -23.6),
                    (6, -21),
                    (8.0, -13),
                    (7.6, -6.2),
                    (0, -8),
                ],
                True,
            )
        ]
    if style == "bun":
        return [ellipse(0, -23.6, 3.5, 2.9)]
    if style == "ponytail":
        return [
            smooth([(3, -22), (8, -21.5), (10.8, -15), (10.0, -7.2), (8.4, -9), (7.6, -15), (4, -18)], True)
        ]
    if style == "afro":
        return [ellipse(0, -16.2, 9.6, 9.0)]
    if style == "curly":
        spots = [
            (-6.4, -11),
            (-7, -15),
            (-5.6, -19.4),
            (-2.2, -22.2),
            (2.2, -22.2),
            (5.6, -19.4),
            (7, -15),
            (6.4, -11),
        ]
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


def head_frame(body: Body) -> np.ndarray:
    """The head's own frame: the torso's, a little larger and set down on a shorter neck."""
    return np.column_stack([body.torso[:, :2] * 1.08, apply(body.torso, (0, 1.5))])


def paint_head(canvas: Canvas, person: Person, body: Body) -> None:
    at = head_frame(body)
    skin, hair = skin_of(person), np.array(d.HAIR[person.hair_colour], np.float32)

    def place(polygons: list) -> list[np.ndarray]:
        return [apply(at, p) for p in polygons]

    d.paint_rounded(canvas, skin * 0.96, place([ellipse(s * 5.8, -12.6, 1.2, 1.9) for s in (-1, 1)]), FACE)
    face = d.paint_rounded(canvas, skin, place([head_outline()]), FACE, 0.16)
    cheeks = canvas.soft(canvas.cover(place([ellipse(s * 3.3, -9.8, 1.5, 1.1) for s in (-1, 1)])), 0.9)
    canvas.paint(skin * (1.0, 0.74, 0.72), 0.45 * cheeks * face)
    canvas.paint(
        hair * 0.85,
        canvas.cover(
            [],
            [
                (apply(at, smooth([(s * 1.3, -14.9), (s * 2.5, -15.5), (s * 3.7, -14.8)])), 0.75)
                for s in (-1, 1)
            ],
        ),
    )
    canvas.paint(
        0.6 * np.array((244, 240, 236)) + 0.4 * skin,
        canvas.cover(place([ellipse(s * 2.45, -12.8, 1.15, 0.7) for s in (-1, 1)])),
    )
    canvas.paint((44, 32, 30), canvas.cover(place([ellipse(s * 2.35, -12.8, 0.75, 0.8) for s in (-1, 1)])))
    canvas.shade(
        0.8, canvas.cover([], [(apply(at, smooth([(0.1, -12.4), (0.7, -10.2), (-0.3, -9.9)])), 0.6)])
    )
    lips = apply(at, smooth([(-1.7, -8.0), (0, -7.3), (1.7, -8.0)]))
    canvas.paint(skin * (0.82, 0.5, 0.5) + (14, 0, 4), canvas.cover([], [(lips, 0.95)]))
    cover = d.paint_rounded(canvas, hair, place(hair_front(person.hair)), HAIR, 0.35)
    shine = canvas.soft(canvas.cover(place([ellipse(-2.4, -20.4, 2.4, 1.0)])), 0.8)
    canvas.paint(hair + 60, 0.45 * shine * cover)


def garment_envelope(body: Body) -> list[np.ndarray]:
    """Outlines of everything any garment can cover on this body."""
    outlines = []
    for category in d.SILHOUETTE:
        g = Garment(
            category, "grey", "black", "plain", "long", "round", "maxi" if category == "dress" else "long"
        )
        pieces = [d.torso_piece(replace(g, neckline=neckline), body) for neckline in ("round", "v", "square")]
        pieces += [
            d.sleeve_piece(replace(g, sleeve=s), body, side) for s in ("short", "long") for side in (0, 1)
        ]
        outlines += [outline for piece in pieces for outline in piece.outlines]
    right = [
        (4.2, -3.6),
        (4.4, -1.5),
        (8.5, 0.2),
        (13, 2.4),
    ]  # and the neck and shoulders a neckline leaves bare
    outlines.append(apply(body.torso, np.concatenate([right, np.array(right)[::-1] * (-1, 1)])))
    return outlines


def repaint_mask(person: Person, canvas: Canvas) -> np.ndarray:
    """(h,w) bool, True = repaint: what any garment may cover on this person, dilated, without hands and head."""
    body = body_of(person)
    wide = canvas.cover(garment_envelope(body)) > 0
    size = 2 * round(2 * canvas.ratio) + 1
    wide = np.asarray(binary(wide).filter(ImageFilter.MaxFilter(size))) > 0
    front = canvas.cover(
        [*hand_shapes(body, 0), *hand_shapes(body, 1), apply(head_frame(body), head_outline())]
    )
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
        d.paint_rounded(canvas, np.array(d.HAIR[person.hair_colour]) * 0.9, back, HAIR, 0.35)
    neck = d.paint_rounded(canvas, skin, [torso_skin(body)], NECK)
    chin = canvas.soft(canvas.cover([apply(head_frame(body), head_outline())]), 1.0, (0.4, 2.2))
    canvas.shade(0.82, chin * neck)
    paint_legs(canvas, person, body)
    arms = []
    for side, (shoulder, elbow, _) in enumerate(body.arm):
        arms.append(
            canvas.cover(
                [limb(shoulder, elbow, 3.5 * k, 2.9 * k), forearm(body, side), *hand_shapes(body, side)]
            )
        )
        canvas.paint(d.rounded(canvas, skin, arms[side]), arms[side], ARMS[side])
    canvas.shadow_room = mask
    torso, *sleeves = pieces_of(g, body)
    d.paint_cloth(canvas, g, torso, d_label(g), shadow=0.3)
    occluders = []
    for side in (0, 1):
        arm = d.rounded(
            canvas, skin, arms[side]
        )  # forearm and hand come in front of the torso, shaded as one arm
        if g.sleeve != "long":
            canvas.paint(arm, canvas.cover([forearm(body, side)]), ARMS[side])
            occluders.append(forearm(body, side))
        if sleeves:
            d.paint_cloth(canvas, g, sleeves[side], d_label(g), shadow=0.25)
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


def pose_parts(body: Body) -> list[tuple[list[np.ndarray], np.ndarray, tuple[float, float, float]]]:
    """Back to front: (polygons, frame, (from u, v from, v to)) of 14 parts; u is symmetric about 0, body units."""
    k, parts = body.scale, []
    for side in (0, 1):
        hip, knee, ankle = body.leg[side]
        foot = ellipse(*(ankle + (0, 1.6 * k)), 3.6 * k, 4.4 * k)
        parts.append(([limb(knee, ankle, 4.4 * k, 2.6 * k)], d.bone(knee, ankle, k), (5.0, -4.0, 26.0)))
        parts.append(([foot], d.affine(ankle, 0, k, k), (4.0, -3.0, 6.0)))
        parts.append(([limb(hip, knee, 6.2 * k, 4.4 * k)], d.bone(hip, knee, k), (7.0, -6.0, 30.0)))
    parts.append(([torso_skin(body), hip_block(body)], body.torso, (15.0, -7.0, 42.0)))
    for side in (0, 1):
        shoulder, elbow, wrist = body.arm[side]
        parts.append(
            ([limb(shoulder, elbow, 3.5 * k, 2.9 * k)], d.bone(shoulder, elbow, k), (4.0, -4.0, 22.0))
        )
        parts.append(([forearm(body, side)], d.bone(elbow, wrist, k), (4.0, -3.0, 19.0)))
        hand = d.bone(wrist, wrist + (wrist - elbow), k)
        parts.append((hand_shapes(body, side), hand, (4.5, -2.0, 8.0)))
    parts.append(([apply(head_frame(body), head_outline())], head_frame(body), (6.5, -22.0, -5.0)))
    return parts


# One hue per part in `pose_parts` order (right leg, foot, thigh; left; torso; right arm, forearm, hand; left; head):
# parts that touch are far apart on the wheel of 14.
POSE_HUES = np.array([0, 4, 8, 2, 6, 10, 12, 1, 5, 9, 3, 7, 11, 13]) / 14


def draw_pose(person: Person, size: tuple[int, int] = (128, 96)) -> Image.Image:
    """A drawn DensePose picture (RGB, black ground), a function of the person alone, with hard edges.

    In HSV the hue names the part, the value rises 0.5 to 1 along it (v) and the saturation 0.45 to 1 across it (u),
    so that a pixel tells where on the body it lies.
    """
    canvas = Canvas(size)
    for (polygons, frame, (half, start, end)), hue in zip(
        pose_parts(body_of(person)), POSE_HUES, strict=True
    ):
        inside = canvas.cover(polygons) > 0.5
        u, v = ((canvas.xy[inside] - frame[:, 2]) @ np.linalg.inv(frame[:, :2]).T).T
        across = 0.45 + 0.55 * np.clip((u / half + 1) / 2, 0, 1)
        along = 0.5 + 0.5 * np.clip((v - start) / (end - start), 0, 1)
        pure = np.clip(
            np.abs((hue * 6 + np.array([0, 4, 2])) % 6 - 3) - 1, 0, 1
        )  # the hue's red, green, blue
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
