"""ToyFashion's Dress Code: what is drawn is what the layout says, and MGD's mask hides the garment it is to hide."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from unifashion.data import toy
from unifashion.data.body import TROUSERS
from unifashion.data.cloth import draw_product
from unifashion.data.dresscode import DressCode
from unifashion.data.figure import draw_person
from unifashion.data.mgd_mask import DRESSCODE
from unifashion.data.texts import named
from unifashion.data.toy_dresscode import (
    BOTTOM_COLOURS,
    BOTTOM_WORDS,
    LABELS,
    bottom_product,
    bottom_sketch,
    dressed_in,
    wearer,
    write_dresscode,
)
from unifashion.data.world import split_of

OWN = {"dresses": (7,), "upper_body": (4,), "lower_body": (5, 6)}  # labels of the garment


@pytest.mark.parametrize("split", toy.SPLITS)
def test_each_category_has_its_kind_of_garment_of_the_splits_own(root, split):
    data = DressCode(root, split)
    assert len(data) == 3 * {"train": 3, "val": 2, "test": 2}[split]
    assert data.uncaptioned == [] == data.missing()
    for i, (category, person, cloth) in enumerate(data.rows):
        _, g, _ = wearer(0, 1.0, split, category, int(person[:6]))
        assert person[:6] == cloth[:6] and split_of(g) == split
        assert (g.category == "dress") == (category == "dresses")
        item = data[i]
        shot = draw_product(g)["image"] if category != "lower_body" else None
        if shot:
            assert close(item["cloth"], shot)
            said = named(item["text"], "fashion200k")
            assert said["category"] == {g.category} and said["colour"] == {g.colour}
        else:
            p = wearer(0, 1.0, split, category, int(person[:6]))[0]
            assert BOTTOM_COLOURS[p.bottom_colour] in item["text"]
            assert any(word in item["text"] for word in BOTTOM_WORDS[p.bottom])


def test_ids_are_of_one_category_and_one_split(root):
    ids = [person for split in toy.SPLITS for _, person, _ in DressCode(root, split).rows]
    assert len(set(ids)) == len(ids) and sorted(ids) == [f"{i:06d}_0" for i in range(len(ids))]
    fine, coarse = (json.loads((root / f"{name}_captions.json").read_text()) for name in ("fine", "coarse"))
    assert not set(fine) & set(coarse) and len(fine) + len(coarse) == len(ids)


@pytest.mark.parametrize("split", ["val", "test"])
def test_unpaired_everybody_gets_anothers_and_the_sketch_shows_it_on_them(root, split):
    data = DressCode(root, split, paired=False)
    by_category = {c: [r for r in data.rows if r[0] == c] for c in DRESSCODE}
    for category, rows in by_category.items():
        assert sorted(p[:6] for _, p, _ in rows) == sorted(c[:6] for _, _, c in rows)
        for _, p, c in rows:
            assert p[:6] != c[:6]
            person, g, _ = wearer(0, 1.0, split, category, int(p[:6]))
            other = wearer(0, 1.0, split, category, int(c[:6]))[:2]
            worn = draw_person(*dressed_in(person, g, other, category))
            wanted = bottom_sketch(np.asarray(worn["parse"])) if category == "lower_body" else worn["sketch"]
            stored = Image.open(root / category / f"im_sketch_unpaired/{p}_{c}.png")
            assert np.array_equal(np.asarray(stored), np.asarray(wanted)) and np.asarray(stored).any()


def test_the_mask_hides_the_garment_and_keeps_face_hands_and_shoes(root):
    for split in toy.SPLITS:
        data = DressCode(root, split)
        for i, (category, person, _) in enumerate(data.rows):
            item, number = data[i], person[:6]
            label = np.asarray(Image.open(root / category / f"label_maps/{number}_4.png"))
            mask = np.asarray(item["mask"]) > 0
            assert mask[np.isin(label, OWN[category])].mean() > 0.97, (category, number)
            assert not mask[np.isin(label, (2, 9, 10))].any()
            if category == "lower_body":
                assert not mask[np.isin(label, (4, 11, 14, 15))].any()
            if category == "upper_body":
                assert not mask[np.isin(label, (5, 6))].any()
            assert 0.05 < mask.mean() < 0.6


def test_labels_and_joints_lie_where_the_person_is(root):
    data = DressCode(root, "train")
    for category, person, _ in data.rows:
        number = person[:6]
        label = np.asarray(Image.open(root / category / f"label_maps/{number}_4.png"))
        assert set(np.unique(label)) <= {0, *LABELS.values()} and set(OWN[category]) & set(np.unique(label))
        joints = np.array(
            json.loads((root / category / f"keypoints/{number}_2.json").read_text())["keypoints"]
        )
        assert joints.shape == (18, 4) and joints[:, 3].tolist() == list(range(18))
        x, y = (joints[:, :2] / 4).astype(int).T  # drawn at 128x96, told in 512x384
        assert label[y[0], x[0]] == label[y[14], x[14]] == 11  # nose, right eye
        own, _, _ = wearer(0, 1.0, "train", category, int(number))
        assert (5 in label) <= (own.bottom == "skirt") and (6 in label) <= (own.bottom != "skirt")
        across = np.arange(label.shape[1])[None].repeat(len(label), 0)
        for left, right in ((9, 10), (12, 13), (14, 15)):  # the person's own: right is left in the picture
            if left in label and right in label:
                assert across[label == left].mean() > across[label == right].mean()
        assert {9, 10, 14, 15} <= set(np.unique(label))
        assert x[2] < x[5] and x[8] < x[11] and (y[8] > y[2]) and (y[10] > y[9] > y[8])


def test_what_is_worn_below_is_laid_flat_in_its_colour():
    for seed in range(6):
        person = toy.sample_person(np.random.default_rng(seed))
        for cut in BOTTOM_WORDS:
            shot = np.asarray(bottom_product(replace(person, bottom=cut), (128, 96))).astype(int)
            inside = (shot < 250).any(-1)
            rows = np.flatnonzero(inside.any(1))
            assert 20 < np.ptp(rows) < 70 and abs(rows.mean() - 64) < 6
            assert not shot[[0, -1]].min() < 255


def test_the_colours_of_what_is_worn_below_are_called_by_their_names():
    assert len(TROUSERS) == len(BOTTOM_COLOURS)
    for colour, name in zip(TROUSERS, BOTTOM_COLOURS, strict=True):
        if name in toy.PALETTE:
            assert toy.main_colour(np.full((2, 2, 3), colour), np.ones((2, 2))) in (name, "grey"), name


def close(a: Image.Image, b: Image.Image) -> bool:
    """The same but for what JPEG changes."""
    return np.abs(np.asarray(a).astype(int) - np.asarray(b).astype(int)).mean() < 2


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("dresscode")
    settings = {"seed": 0, "difficulty": 1.0, "size": (128, 96)}
    write_dresscode(folder, settings, {"train": [{}] * 90, "val": [{}] * 20, "test": [{}] * 60}, map)
    return folder
