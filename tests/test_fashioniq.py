"""Fashion-IQ's triplets: the real annotations whole, a small folder as its authors give it out, and what may be wrong with it."""

import json
import os
from pathlib import Path

import pytest
from PIL import Image

from unifashion import UserError
from unifashion.data.fashioniq import CATEGORIES, FashionIQ, joined

SAMPLES = Path(os.environ.get("UNIFASHION_SAMPLES", "/nonexistent"), "fashioniq")
needs_samples = pytest.mark.skipif(
    not SAMPLES.is_dir(), reason="needs the sample annotations: set UNIFASHION_SAMPLES"
)


@needs_samples
@pytest.mark.parametrize(
    ("split", "triplets", "pools"),
    [
        ("train", (5985, 5988, 6027), (11452, 19036, 16121)),
        ("val", (2017, 2038, 1961), (3817, 6346, 5373)),
        ("test", (2024, 2038, 2056), (3818, 6346, 5374)),
    ],
)
def test_the_real_annotations_are_read_whole(split, triplets, pools):
    data = FashionIQ(SAMPLES, split, pictures=False)
    assert tuple(sum(row.category == c for row in data.rows) for c in CATEGORIES) == triplets
    assert tuple(len(data.pools[c]) for c in CATEGORIES) == pools
    assert len(data) == len(data.products) == sum(triplets)
    assert all((row.target is None) == (split == "test") for row in data.rows)
    assert all(joined(row.captions, way).strip() for row in data.rows for way in range(4))
    assert data.captions == {} and data.captioned == []
    # the pictures are not among the samples: every row lacks its reference
    assert data.missing() == [f"images/{row.reference}.png" for row in data.rows]


@needs_samples
def test_the_real_annotations_without_pictures_are_refused_where_these_are_needed():
    with pytest.raises(UserError, match="lacks images/: .*github.com/XiaoxiaoGuo/fashion-iq"):
        FashionIQ(SAMPLES, "val")


def test_a_triplet_has_its_pictures_and_texts(root):
    data = FashionIQ(root, "val")
    first, last = data[0], data[len(data) - 1]
    assert len(data) == 6 and [row.category for row in data.rows[::2]] == list(CATEGORIES)
    assert first["reference_id"] == "D0" and first["target_id"] == "D1" and first["category"] == "dress"
    assert first["captions"] == ("is Red.", "has dots") and first["caption"] is None
    assert first["reference"].getpixel((0, 0)) == colour("D0")
    assert first["target"].getpixel((0, 0)) == colour("D1") and first["target"].mode == "RGB"
    assert last["category"] == "toptee" and data.products[0] == "D1"
    assert data.pools["dress"] == ["D0", "D1", "D2"] and data.open("D2").getpixel((0, 0)) == colour("D2")


def test_a_triplet_of_test_has_no_target(root):
    item = FashionIQ(root, "test")[0]
    assert item["target"] is item["target_id"] is item["caption"] is None and item["reference_id"] == "D0"


def test_pictures_may_be_jpegs(root):
    Image.open(root / "images/D1.png").save(root / "images/D1.jpg")
    (root / "images/D1.png").unlink()
    data = FashionIQ(root, "val")
    assert data.missing() == [] and data.open("D1").mode == "RGB"


@pytest.mark.parametrize(
    ("captions", "texts"),
    [
        (("is Red. ", "?has dots,"), ("Is red and has dots", "Has dots and is Red", "Is red", "Has dots")),
        (("", "has DOTS"), ("Has dots",) * 4),
        (("is red", " . "), ("Is red",) * 4),
    ],
)
def test_two_captions_are_joined_as_the_original_does(captions, texts):
    assert tuple(joined(captions, way) for way in range(4)) == texts
    assert joined(captions) == texts[0]


def test_captions_of_training_are_fashioniq_caps_and_those_of_evaluation_are_not(root):
    for split in ("train", "val"):
        rows = [{"image": "D1", "caption": "\nA **red**\ndress.", "text_guidance": ""}]
        (root / f"next_llava.{split}.dress.caption.json").write_text(json.dumps(rows))
    train, val = (FashionIQ(root, split) for split in ("train", "val"))
    assert train.captions == {"D1": "A red dress."} and train.captioned == [0]
    assert train[0]["caption"] == "A red dress." and train[1]["caption"] is None
    assert val.captions == {} and val.captioned == []


def test_our_own_captions_come_first_and_in_every_split(root):
    (root / "next_llava.train.dress.caption.json").write_text(
        json.dumps([{"image": "D1", "caption": "Other.", "text_guidance": ""}])
    )
    lines = [
        {"image": "somewhere/images/D1.png", "caption": "Short.", "style": "fashion200k", "model": "m"},
        {"image": "somewhere/images/D1.png", "caption": "A long\none.", "style": "fashioniq-cap"},
        {"image": "S2", "caption": "A shirt.", "sha256": "00"},
    ]
    (root / "captions.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    for split in ("train", "val"):
        data = FashionIQ(root, split)
        assert data.captions == {"D1": "A long one.", "S2": "A shirt."}
        assert data.captioned == [0, 3] and data[0]["caption"] == "A long one."


def test_a_picture_of_which_the_llm_had_nothing_to_say_has_no_caption(root):
    (root / "captions.jsonl").write_text(
        '{"image": "D0", "caption": "One."}\n\n{"image": "D1", "caption": " ** "}\n'
    )
    data = FashionIQ(root, "train")
    assert data.captions == {"D0": "One."} and 0 not in data.captioned


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"image": "D1", "capt', "line 2 is not whole JSON"),
        ('{"image": "D1"}', "line 2 has not the texts image, caption"),
        ('{"image": "", "caption": "Two."}', "line 2 has an empty image"),
        ('{"image": "x/D0.jpg", "caption": "Again."}', "line 2 captions D0 a second time"),
        ("[1]", "line 2 has not"),
    ],
)
def test_broken_lines_of_our_captions_are_named(root, line, message):
    (root / "captions.jsonl").write_text('{"image": "D0", "caption": "One."}\n' + line + "\n")
    with pytest.raises(UserError, match=f"captions.jsonl: {message}"):
        FashionIQ(root, "train")


@pytest.mark.parametrize(
    ("path", "harm", "message"),
    [
        ("captions/cap.shirt.val.json", lambda t: t[:-9], "not whole JSON"),
        ("captions/cap.shirt.val.json", lambda t: "{}", "not a list of triplets"),
        ("captions/cap.shirt.val.json", lambda t: "[3]", "row 0 has not candidate, target and two captions"),
        ("captions/cap.shirt.val.json", lambda t: t.replace('"candidate"', '"reference"'), "row 0 has not"),
        ("captions/cap.shirt.val.json", lambda t: t.replace('"target"', '"goal"'), "row 0 has not"),
        ("captions/cap.shirt.val.json", lambda t: t.replace(', "has dots"', ""), "row 0 has not"),
        ("captions/cap.shirt.val.json", lambda t: t.replace('"has dots"', "null"), "row 0 has not"),
        (
            "captions/cap.shirt.val.json",
            lambda t: t.replace("is Red.", " .").replace("has dots", ""),
            "row 0 has two empty captions",
        ),
        ("captions/cap.shirt.val.json", lambda t: t.replace("S0", "X7"), "X7 is not in split.shirt.val.json"),
        ("captions/cap.shirt.val.json", lambda t: t.replace("S1", "D1"), "D1 is not in split.shirt.val.json"),
        ("captions/cap.shirt.val.json", lambda t: json.dumps(json.loads(t)[:1] * 2), "S0 -> S1.*twice"),
        ("image_splits/split.shirt.val.json", lambda t: t[:-3], "not whole JSON"),
        ("image_splits/split.shirt.val.json", lambda t: '{"S0": 1}', "not a list of ids"),
        ("image_splits/split.shirt.val.json", lambda t: '["S0", ""]', "not a list of ids"),
        ("image_splits/split.shirt.val.json", lambda t: t.replace("S2", "S0"), "S0 is there twice"),
    ],
)
def test_what_is_wrong_with_a_file_is_one_line_that_names_it(root, path, harm, message):
    file = root / path
    file.write_text(harm(file.read_text()))
    with pytest.raises(UserError, match=f"^{file}: .*{message}") as caught:
        FashionIQ(root, "val")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("path", ["captions/cap.shirt.val.json", "image_splits/split.dress.val.json"])
def test_a_missing_file_is_named_with_where_to_get_it(root, path):
    (root / path).unlink()
    with pytest.raises(UserError, match=f"lacks {path}: .*github.com/XiaoxiaoGuo/fashion-iq.*--data toy"):
        FashionIQ(root, "val")


def test_missing_pictures_are_listed_in_order_and_damaged_ones_named(root):
    for name in ("S1", "D0"):
        (root / f"images/{name}.png").unlink()
    (root / "images/D2.png").write_bytes(b"<html>")
    data = FashionIQ(root, "val")
    # each row that lacks one; of D2 only what it holds is wrong
    assert data.missing() == ["images/D0.png", "images/S1.png", "images/S1.png"]
    with pytest.raises(UserError, match="images/D2.png: cannot be read as an image"):
        data[1]
    with pytest.raises(UserError, match="images/D0.png: cannot be read as an image"):
        data[0]


@pytest.fixture
def root(tmp_path) -> Path:
    """Two triplets a category over three pictures, the same in every split; test without targets."""
    for folder in ("captions", "image_splits", "images"):
        (tmp_path / folder).mkdir()
    for kind in CATEGORIES:
        names = [f"{kind[0].upper()}{i}" for i in range(3)]
        for name in names:
            Image.new("RGB", (4, 6), colour(name)).save(tmp_path / f"images/{name}.png")
        triplets = [
            {"target": names[1], "candidate": names[0], "captions": ["is Red.", "has dots"]},
            {"target": names[2], "candidate": names[1], "captions": ["is longer", "is much longer"]},
        ]
        for split in ("train", "val", "test"):
            for row in triplets if split == "test" else ():
                del row["target"]
            (tmp_path / f"captions/cap.{kind}.{split}.json").write_text(json.dumps(triplets))
            (tmp_path / f"image_splits/split.{kind}.{split}.json").write_text(json.dumps(names))
    return tmp_path


def colour(name: str) -> tuple[int, int, int]:
    return ord(name[0]), 40 * int(name[1]), 7
