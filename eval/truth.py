"""What is known of ToyFashion's garments, because they were drawn: the truth that evaluations hold against a model."""

from dataclasses import replace

from torch.utils.data import Dataset

from unifashion import UserError
from unifashion.data import toy
from unifashion.data.texts import named
from unifashion.data.toy import Garment

ATTRIBUTES = tuple(toy.ATTRIBUTES)
Said = dict[str, set[str]]  # attribute -> the values that a text names, or that are true


def seen_in_training(rows: list[dict], garments: list[Garment]) -> int:
    """How many of the garments have a combination of attributes that training has, be it in `rows` or in the training data
    of other parts, which are the combinations that `toy.split_of` gives to train: 0, or it is no test."""
    seen = {tuple(row["garment"][k] for k in toy.COMBINATION) for row in rows}
    ours = [tuple(getattr(g, k) for k in toy.COMBINATION) for g in garments]
    return sum(c in seen or toy.split_of(g) == "train" for c, g in zip(ours, garments, strict=True))


def garments_of(rows: list[dict], style: str, data: Dataset, picks: list[int]) -> list[Garment]:
    """The garments of the pictures `picks`; rows are the world's, whose order the products of every part have.

    Raises UserError if it is not so: a text that is not true of its garment tells.
    """
    names = sorted(set(data.products))
    if len(names) == len(rows):
        known = {name: Garment(**row["garment"]) for name, row in zip(names, rows, strict=True)}
        garments = [known[data.products[i]] for i in picks]
        said = [named(data[i]["text"], style) for i in picks]
        if all(s[k] <= truth(g)[k] for s, g in zip(said, garments, strict=True) for k in ATTRIBUTES):
            return garments
    raise UserError(f"{style} has other garments than the ToyFashion that it is part of: draw it anew")


def truth(g: Garment) -> Said:
    return {k: set() if k == "second" and g.pattern == "plain" else {getattr(g, k)} for k in ATTRIBUTES}


def look(g: Garment) -> Garment:
    """Equal for garments that cannot be told apart: the second colour of a plain one is nowhere."""
    return replace(g, second=g.colour) if g.pattern == "plain" else g


def distinct(garments: list[Garment], samples: int) -> list[int]:
    """Indices of the first garments, `samples` at most, of which none looks like another."""
    first: dict[Garment, int] = {}
    for i, g in enumerate(garments):
        first.setdefault(look(g), i)
    return list(first.values())[:samples]
