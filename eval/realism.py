"""How near made pictures of persons are to photographs of the same persons, and to their texts: FID, KID and CLIP-S together.

What cannot be measured, for want of a network or of pictures, is left out: a figure is there only if it is one.
"""

import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image

from eval.folders import openers
from eval.metrics.clip_score import clip_s, pair_scores
from eval.metrics.fid import features, fid, fid_floor, kid, kid_interval, kid_of_pairs, kid_subsets
from eval.metrics.inception import InceptionV3
from eval.report import interval, resampled
from unifashion import UserError
from unifashion.clip import CLIP
from unifashion.tokenizers import CLIPTokenizer
from weights.clip import FILES as CLIPS
from weights.clip import FOLDER as CLIP_L14
from weights.clip import load_clip
from weights.inception import FILES, load_inception
from weights.load import FOLDERS, sha256
from weights.rename import blank

INCEPTION = FOLDERS["full"]
FIGURES = FID, KID, PAIRS, SUBSETS, CLIP_S = (
    "FID",
    "KID x1000",
    "KID x1000, pairs",
    "KID x1000, subsets",
    "CLIP-S",
)
DRAWS, LARGEST = 100, 1000  # subsets, and pictures in each
Figure = list[float]  # [value]; [value, low, high]; of subsets [mean, deviation]


class Networks(NamedTuple):
    inception: InceptionV3 | None
    clip: tuple[CLIP, CLIPTokenizer] | None
    hashes: dict[str, str]  # "inception sha256", "clip sha256": of the files
    lacking: dict[str, str]  # what cannot be measured -> why


def load_networks(name: str) -> Networks:
    """What measures, each if its file is there. Raises UserError if then nothing can be measured."""
    lacking, hashes = {}, {}

    def note(what: str, folder: Path, names: Iterable[str]) -> None:
        hashes[f"{what} sha256"] = sha256(next(folder / x for x in names if (folder / x).is_file()))

    inception, clip = blank(InceptionV3).requires_grad_(False), None
    try:
        load_inception(inception, INCEPTION)
        note("inception", INCEPTION, FILES)
    except UserError as error:
        inception, lacking["FID, KID"] = None, str(error)
    if name == "mgd":
        try:
            clip = load_clip(CLIP_L14)
            note("clip", CLIP_L14, CLIPS)
        except UserError as error:
            lacking["CLIP-S"] = str(error)
    if inception is None and clip is None:
        raise UserError("nothing can be measured: " + "; ".join(lacking.values()))
    return Networks(inception, clip, hashes, lacking)


class Measuring:
    """The figures of pictures against photographs, `people`, of the same persons in the same order."""

    def __init__(
        self, networks: Networks, people: Sequence[Image.Image], device: torch.device, quiet: bool
    ) -> None:
        self.networks, self.device, self.quiet = networks, device, quiet
        self.workers = min(8, os.cpu_count() or 1) if device.type == "cuda" else 0
        if networks.clip:
            networks.clip[0].to(device)
        self.reference = self.features(people)
        self.size = min(LARGEST, len(people) // 2)

    def features(self, pictures: Sequence[Image.Image]) -> np.ndarray | None:
        if self.networks.inception is None:
            return None
        return features(openers(pictures), self.networks.inception, device=self.device, quiet=self.quiet)

    def apart(self, found: np.ndarray | None) -> dict[str, Figure]:
        """FID and KID of `features`; KID by pairs needs 3 pictures, its subsets 4."""
        if found is None:
            return {}
        n, a, b = len(found), found, self.reference
        figures = {FID: rounded(fid(a, b, quiet=True)), KID: rounded(1000 * kid(a, b, self.quiet))}
        if n > 2:
            figures[PAIRS] = rounded(*(1000 * x for x in kid_of_pairs(a, b, self.quiet)))
        if n > 3:
            drawn = kid_subsets(a, b, DRAWS, self.size, quiet=self.quiet)
            figures[SUBSETS] = rounded(*(1000 * x for x in drawn))
        return figures

    def halves(self, seed: int) -> dict[str, Figure]:
        if self.reference is None or len(self.reference) < 6:
            return {}
        of = np.random.default_rng(seed).permutation(len(self.reference))
        a, b = (self.reference[half] for half in np.array_split(of, 2))
        apart = (1000 * x for x in kid_interval(a, b, self.quiet))
        return {FID: rounded(fid_floor(self.reference, seed)), KID: rounded(*apart)}

    def clip_s(self, pictures: Sequence[Image.Image], texts: list[str] | None) -> dict[str, Figure]:
        if self.networks.clip is None or texts is None:
            return {}
        scores = pair_scores(
            *self.networks.clip, pictures, texts, workers=self.workers, quiet=self.quiet
        ).double()
        _, *ends = interval(resampled(scores.numpy()).clip(min=0) / len(texts))
        return {CLIP_S: [*rounded(clip_s(scores)), *ends]}


def rounded(*figure: float) -> list[float]:
    return [round(x, 4) + 0.0 for x in figure]
