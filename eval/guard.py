"""The leak guard: is an evaluation clean? One verdict, which every report carries.

    clean        nothing speaks against it
    NOT CLEAN    and why
    unknown      what cannot be told, where nothing speaks against the rest

Three questions. Were captions that help a search written without the queries at hand (`eval.leaks`)? Has training seen what is
evaluated, as the model's file records it (`unifashion.seen`)? And was anything chosen, a checkpoint or a setting, on the
split that is reported? What training has seen of ToyFashion is also known without a record, since `toy.split_of` gives a
combination of attributes to the same split of every world, and there it is not told but refused: another world is drawn in minutes.

What the guard cannot see: the same picture under another id, or in another data set; what the public files (EVA-CLIP, BLIP-2, Vicuna,
Stable Diffusion) were trained on; what a captioner was trained on, whose name alone is reported; that somebody looked at the reported
figures and then changed a setting that has no flag, or kept the better of two runs; a leak into few captions, or in other words.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from eval.leaks import FOUND_CANDIDATES, Leak
from unifashion import UserError
from unifashion.config import PRESETS
from unifashion.data import toy
from unifashion.data.toy import Garment
from unifashion.seen import Record, combination, read_record, world_of

# On what the presets' settings were chosen (weights/tiny/README.md); nobody has chosen FULL's.
SETTINGS: dict[str, dict[str, str | None]] = {"tiny": {"guidance": "toy val of seed 0"}, "full": {}}
NO_MODEL = "of the model that made it nothing is known"
NO_RECORD = "the model file does not say what it was trained on"
NOT_WHOLE = "the model file does not say all that it was trained on"
NOT_CHOSEN = "the model file does not say on what its checkpoint was chosen"


@dataclass(frozen=True)
class Verdict:
    against: tuple[str, ...]
    unknown: tuple[str, ...]
    trained_on: str

    def __str__(self) -> str:
        told = [f"NOT CLEAN: {'; '.join(self.against)}"] * bool(self.against)
        told += [f"unknown: {'; '.join(self.unknown)}"] * bool(self.unknown)
        return ". ".join(told) or "clean"

    def lines(self) -> dict[str, str]:
        """What a report says of it."""
        return {"trained on": self.trained_on, "verdict": str(self)}


def verdict(
    model: Path | None,
    root: Path,
    namespace: str,
    ids: Sequence[str],
    split: str,
    captions: dict[str, Leak] | None = None,
    settings: dict[str, str | None] | None = None,
) -> Verdict:
    """
    model      its model.safetensors; None where only what it made is known
    root       where the evaluated data set is; part of a ToyFashion, its split's garments are what is looked at
    namespace  the data set's, of `unifashion.seen`, and ids of all in it that is evaluated
    captions   of each pool that is searched by captions what `leaks.check` found
    settings   of each that was chosen, on what: {"guidance": "toy val of seed 0"}; None if nobody knows

    Raises UserError for garments of ToyFashion that training has seen.
    """
    reported = f"{namespace} {split}"
    if world := world_of(root):
        reported = f"toy {split}"
        rows = toy.read_rows(world, split)
        namespace, ids = "toy", [combination(Garment(**row["garment"])) for row in rows]
    record = Record({}, (), False) if model is None else read_record(model)
    findings = (
        of_captions(captions or {}),
        of_training(record, namespace, ids),
        of_selection(record, settings or {}, reported),
    )
    against, unknown = (
        tuple(reason for found in of for reason in found) for of in zip(*findings, strict=True)
    )
    return Verdict(against, (NO_MODEL,) if model is None else unknown, record.told())


Findings = tuple[list[str], list[str]]  # against, unknown


def of_captions(checked: dict[str, Leak]) -> Findings:
    leaky = [
        f"captions of {name} were written with the queries' texts at hand: {'; '.join(leak.reasons)}"
        for name, leak in checked.items()
        if leak.reasons
    ]
    few = [name for name, x in checked.items() if not x.reasons and x.candidates < FOUND_CANDIDATES]
    return leaky, [f"captions of {', '.join(few)}: too few to tell whether they leak"] * bool(few)


def of_training(record: Record, namespace: str, items: Sequence[str]) -> Findings:
    seen = int(record.has(namespace, list(items)).sum())
    if namespace == "toy":
        if seen:
            raise UserError(
                f"{seen} of {len(items)} garments have a combination of attributes that the model's record names: this is no test"
            )
        return [], []  # nor is it unknown without a record
    known = f"{seen} of {len(items)} items of {namespace} are in the training data"
    if namespace == "fashioniq" and seen:
        known += " (Fashion-IQ itself shows 143 of val's targets in train, under other categories' triplets)"
    unknown = NOT_WHOLE if record.seen else NO_RECORD
    return [known] * bool(seen), [unknown] * (not record.whole)


def chosen_on(preset: str, guidance: float) -> dict[str, str | None]:
    """`verdict`'s settings: the preset's guidance, or one that was given by hand."""
    return SETTINGS[preset] if guidance == PRESETS[preset].guidance else {"guidance": None}


def of_selection(record: Record, settings: dict[str, str | None], reported: str) -> Findings:
    chosen = [("checkpoint", on) for on in record.chosen] + list(settings.items())
    against = [
        f"{what} was chosen on {on}, which is what is reported" for what, on in chosen if on == reported
    ]
    against += [
        f"{what} was chosen on {on}, and what is reported has the same combinations of attributes"
        for what, on in chosen
        if on and on.startswith(f"{reported} of seed ")  # ToyFashion: every world's split is of the same
    ]
    by_hand = [f"{what} was given by hand, chosen on what is not told" for what, on in chosen if on is None]
    return against, [NOT_CHOSEN] * (not record.chosen) + by_hand
