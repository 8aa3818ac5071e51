"""What ToyFashion says about a garment: Fashion200K captions, MGD's noun chunks, and a full description."""

import numpy as np

from unifashion.data.cloth import Garment

CATEGORY_WORDS = {
    "t-shirt": ("t-shirt", "tee"),
    "shirt": ("shirt", "button-up shirt"),
    "sweater": ("sweater", "knit jumper"),
    "jacket": ("jacket", "open jacket"),
    "dress": ("dress", "gown"),
}
PATTERN_WORDS = {  # as an adjective, as a noun
    "striped": (("striped", "horizontally striped"), ("stripes", "horizontal stripes")),
    "pinstriped": (("pinstriped", "vertically striped"), ("pinstripes", "vertical stripes")),
    "dotted": (("dotted", "polka-dot"), ("dots", "polka dots")),
    "checked": (("checked", "plaid"), ("checks", "a plaid pattern")),
    "chevron": (("chevron", "zigzag"), ("chevrons", "zigzags")),
}
SLEEVE_WORDS = {
    "sleeveless": (("sleeveless",), ("no sleeves",)),
    "short": (("short-sleeve", "short-sleeved"), ("short sleeves",)),
    "long": (("long-sleeve", "long-sleeved"), ("long sleeves",)),
}
NECK_WORDS = {
    "round": (("round-neck", "crew-neck"), ("a round neckline",)),
    "v": (("v-neck",), ("a v-neck", "a v neckline")),
    "square": (("square-neck",), ("a square neckline",)),
}
LENGTH_WORDS = {
    "cropped": ("cropped", "short-cut"),
    "regular": ("regular-length", "hip-length"),
    "long": ("longline", "long"),
    "mini": ("mini",),
    "midi": ("midi", "knee-length"),
    "maxi": ("maxi", "floor-length"),
}


def choose(rng: np.random.Generator, words) -> str:
    return words[int(rng.integers(len(words)))]


def join_and(parts: list[str]) -> str:
    return " and ".join(filter(None, [", ".join(parts[:-1]), *parts[-1:]]))


def caption(g: Garment, rng: np.random.Generator, keep: float = 0.8) -> str:
    """A Fashion200K caption, "red striped short-sleeve v-neck dress": always colour, pattern (with the second colour)
    and category; sleeve, neckline and length each with probability `keep`. Wording varies."""
    sleeve, neck, length = (rng.random(3) < keep).tolist()
    noun = choose(rng, CATEGORY_WORDS[g.category])
    before, after = [g.colour], []
    if g.pattern != "plain":
        adjectives, nouns = PATTERN_WORDS[g.pattern]
        if rng.random() < 0.5:
            before = [
                choose(rng, (f"{g.colour} and {g.second}", f"{g.colour}/{g.second}")),
                choose(rng, adjectives),
            ]
        else:
            after.append(f"{g.second} {choose(rng, nouns).removeprefix('a ')}")
    elif rng.random() < 0.4:
        before.append(choose(rng, ("plain", "solid")))
    adjectives = [choose(rng, LENGTH_WORDS[g.length])] if length else []
    for wanted, (words, phrases) in ((sleeve, SLEEVE_WORDS[g.sleeve]), (neck, NECK_WORDS[g.neckline])):
        if wanted:
            if rng.random() < 0.65:
                adjectives.append(choose(rng, words))
            else:
                after.append(choose(rng, phrases))
    adjectives = [adjectives[i] for i in rng.permutation(len(adjectives))]
    words = [*adjectives, *before] if rng.random() < 0.3 else [*before, *adjectives]
    return " ".join([*words, noun]) + (" with " + join_and(after) if after else "")


def chunks(g: Garment, rng: np.random.Generator, keep: float = 0.8) -> list[str]:
    """MGD's three noun chunks; joined they say at least what `caption` says."""
    noun = choose(rng, CATEGORY_WORDS[g.category])
    sleeve, neck, length = (rng.random(3) < keep).tolist()
    front = f"{choose(rng, LENGTH_WORDS[g.length])} " if length else ""
    first = f"{front}{g.colour} {noun}"
    if g.pattern == "plain":
        second = choose(
            rng, (f"plain {g.colour} fabric", f"solid {g.colour} {noun}", f"{g.colour} plain cloth")
        )
    else:
        adjectives, nouns = PATTERN_WORDS[g.pattern]
        marks = choose(rng, nouns).removeprefix("a ")
        options = (
            f"{g.colour} {noun} with {g.second} {marks}",
            f"{g.second} {marks}",
            f"{g.second} {marks} on {g.colour}",
        )
        second = choose(rng, (*options, f"{g.colour} and {g.second} {choose(rng, adjectives)} {noun}"))
    details = [choose(rng, SLEEVE_WORDS[g.sleeve][1])] if sleeve else []
    details += [choose(rng, NECK_WORDS[g.neckline][1])] if neck else []
    return [first, second, join_and(details) if details else choose(rng, (noun, f"{g.colour} garment"))]
