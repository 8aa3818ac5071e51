"""What two annotators say of one garment beside another, as Fashion-IQ's do, in Fashion200K's words; and what such a text says.

`modification` writes it, `changes` reads it.
"""

import re
from dataclasses import asdict, replace
from functools import cache

import numpy as np

from unifashion.data.cloth import PALETTE, Garment
from unifashion.data.texts import (
    CATEGORY_WORDS,
    LENGTH_WORDS,
    NECK_WORDS,
    PATTERN_WORDS,
    SLEEVE_WORDS,
    WORDS,
    choose,
    sentence,
    with_article,
)  # fmt: skip

ACCENTS = ("accents", "details")  # what a second colour is called where the pattern is not what differs


def differences(reference: Garment, target: Garment) -> list[str]:
    """The attributes that are to be seen in the target and are others in the reference. No one sees a plain one's second colour."""
    names = [name for name in asdict(target) if getattr(target, name) != getattr(reference, name)]
    if reference.pattern == "plain" != target.pattern and "second" not in names:
        names.append("second")
    return [name for name in names if name != "second" or target.pattern != "plain"]


def noun_phrases(g: Garment, attribute: str) -> list[str]:
    """What a garment has, or with "a " what it is, by one attribute: "short sleeves", "a tee"; of sleeves and patterns."""
    if attribute == "second":
        return [f"{g.second} {word}" for word in ACCENTS]
    if attribute == "pattern":
        return list(PATTERN_WORDS[g.pattern][1]) or ["no pattern"]
    return list({"sleeve": SLEEVE_WORDS[g.sleeve], "neckline": NECK_WORDS[g.neckline]}[attribute][1])


def adjectives(g: Garment, attribute: str) -> list[str]:
    """What a garment is, by one attribute: "blue", "knee-length", "short-sleeved", "a tee"."""
    return {
        "category": [with_article(noun) for noun in CATEGORY_WORDS[g.category]],
        "colour": [g.colour],
        "second": [],
        "pattern": list(PATTERN_WORDS[g.pattern][0]),
        "sleeve": [word for word in SLEEVE_WORDS[g.sleeve][0] if word.endswith(("d", "less"))],
        "neckline": [],
        "length": list(LENGTH_WORDS[g.length]),
    }[attribute]


def clause(reference: Garment, target: Garment, attribute: str, rng: np.random.Generator) -> str:
    """One difference, "is blue", "has long sleeves instead of short sleeves"; of "pattern" with the second colour if that
    differs, too."""
    verb = "is" if attribute in ("category", "colour", "length") else "has"
    if attribute in ("pattern", "sleeve") and rng.random() < 0.5:
        verb = "is"
    phrases = adjectives if verb == "is" else noun_phrases
    said = choose(rng, phrases(target, attribute))
    if attribute == "pattern" and "second" in differences(reference, target):
        if verb == "has":
            article = "a " if said.startswith("a ") else ""
            return f"has {article}{target.second} {said.removeprefix('a ')}"
        return f"is {said} with {target.second}"
    if rng.random() < 0.2 and phrases(reference, attribute):
        said += choose(rng, (" instead of ", " rather than ")) + choose(rng, phrases(reference, attribute))
    return f"{verb} {said}"


def modification(reference: Garment, target: Garment, rng: np.random.Generator) -> tuple[str, str]:
    """What two annotators of Fashion-IQ say of the target beside the reference: together every difference, nothing else.

    Raises ValueError if nothing differs.
    """
    found = differences(reference, target)
    if not found:
        raise ValueError("nothing differs that can be seen")
    if "pattern" in found and "second" in found:  # named together
        found.remove("second")
    found = [found[i] for i in rng.permutation(len(found))]
    cut = int(rng.integers(1, max(len(found), 2)))
    shares = [found[:cut], found[cut:] or found]
    for own, other in (shares, shares[::-1]):
        if own != found and rng.random() < 0.25:  # what the other saw first
            own.append(other[0])
    captions = []
    for share in shares:
        text = " and ".join(clause(reference, target, name, rng) for name in share)
        text = choose(rng, ("", "", "", "it ")) + text
        captions.append(sentence(text) if rng.random() < 0.2 else text)
    return captions[0], captions[1]


@cache
def change_phrases() -> dict[str, dict[str, str]]:
    """Every phrase of `modification` after "is" or "has", without article -> what it says: {attribute: value}."""
    base = Garment("dress", "red", "blue", "plain", "short", "v", "midi")
    meanings = {}
    values = {"second": list(PALETTE)} | {name: list(table) for name, table in WORDS["fashion200k"].items()}
    for attribute, options in values.items():
        for value in options:
            g = replace(base, **{attribute: value})
            nouns = (
                noun_phrases(g, attribute) if attribute in ("second", "pattern", "sleeve", "neckline") else []
            )
            for phrase in (*adjectives(g, attribute), *nouns):
                meanings[phrase.removeprefix("a ")] = {attribute: value}
            for second in PALETTE if attribute == "pattern" and value != "plain" else ():
                both = {"pattern": value, "second": second}
                meanings |= {f"{second} {noun.removeprefix('a ')}": both for noun in nouns}
                meanings |= {f"{word} with {second}": both for word in adjectives(g, attribute)}
    return meanings


def changes(text: str) -> tuple[dict[str, set[str]], dict[str, set[str]]]:
    """What a text of `modification`, or both of its texts joined, says of the target, and what of the reference, by attribute.

    Raises KeyError for a phrase that is none of `modification`'s.
    """
    target: dict[str, set[str]] = {}
    reference: dict[str, set[str]] = {}
    for part in text.lower().rstrip(".").split(" and "):
        said, *before = re.split(" instead of | rather than ", re.sub(r"^(it )?(is|has) ", "", part.strip()))
        for phrases, found in (([said], target), (before, reference)):
            for phrase in phrases:
                for attribute, value in change_phrases()[phrase.removeprefix("a ")].items():
                    found.setdefault(attribute, set()).add(value)
    return target, reference
