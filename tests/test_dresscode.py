"""The reader of MGD on Dress Code, on a drawn folder, on MGD's own samples, and on what may be wrong."""

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from unifashion import UserError
from unifashion.data import toy
from unifashion.data.dresscode import PART_COLOURS, DressCode, part_colours
from unifashion.data.mgd import MGD
from unifashion.data.mgd_mask import DRESSCODE, mgd_masks
from unifashion.data.readers import open_mgd
from unifashion.data.toy_dresscode import write_dresscode

SAMPLES = Path(os.environ.get("UNIFASHION_SAMPLES", "/nonexistent"), "viton_multimodal/dresscode")


@pytest.mark.parametrize("paired", [True, False])
def test_an_item_has_each_picture_from_its_file(root, paired):
    data = DressCode(root, "test", paired)
    for i, (category, person, cloth) in enumerate(data.rows):
        item, number = data[i], person[:6]
        assert (item["person_id"], item["cloth_id"]) == (person, cloth) == data.pairs[i]
        assert (number == cloth[:6]) == paired
        sketch = f"im_sketch/{cloth}" if paired else f"im_sketch_unpaired/{person}_{cloth}"
        for key, path in (
            ("person", f"images/{person}.jpg"),
            ("cloth", f"images/{cloth}.jpg"),
            ("pose", f"dense/{number}_5.png"),
            ("sketch", f"{sketch}.png"),
        ):
            assert np.array_equal(np.asarray(item[key]), np.asarray(Image.open(root / category / path))), key
        captions = {}
        for name in ("fine", "coarse"):
            captions |= json.loads((root / f"{name}_captions.json").read_text())
        assert item["text"] == ", ".join(captions[cloth[:6]])
        assert {item[k].size for k in ("person", "mask", "pose", "cloth", "sketch")} == {(96, 128)}
        assert item["mask"].mode == item["sketch"].mode == "L"


def test_the_mask_is_mgds(root):
    data = DressCode(root, "train")
    for i, (category, person, _) in enumerate(data.rows):
        item, number = data[i], person[:6]
        parse = Image.open(root / category / f"label_maps/{number}_4.png")
        joints = np.array(
            json.loads((root / category / f"keypoints/{number}_2.json").read_text())["keypoints"]
        )
        wanted = mgd_masks(parse, joints, (512, 384), DRESSCODE[category]).repaint
        mask = np.asarray(item["mask"])
        shrunk = Image.fromarray(wanted).resize((96, 128), Image.Resampling.NEAREST)
        assert np.array_equal(mask > 0, np.asarray(shrunk)) and set(np.unique(mask)) == {0, 255}


def test_items_have_the_keys_of_mgd_and_the_folder_tells_which_it_is(root, world):
    dress, viton = open_mgd(root, "test"), open_mgd(world / "vitonhd", "test")
    assert type(dress) is DressCode and type(viton) is MGD
    assert set(dress[0]) == set(viton[0]) and dress.pairs[0] and viton.pairs[0]
    assert open_mgd(root, "test", paired=False).pairs != dress.pairs
    with pytest.raises(UserError, match="VITON-HD is incomplete"):
        open_mgd(world, "test")


def test_bare_part_numbers_get_colours_and_coloured_maps_stay():
    numbers = np.arange(25, dtype=np.uint8).reshape(5, 5)
    palette = Image.fromarray(numbers, "P")
    palette.putpalette([v for i in range(256) for v in (i, i, i)])
    for bare in (Image.fromarray(numbers), palette):
        coloured = np.asarray(part_colours(bare.convert("RGB")))
        assert len(np.unique(coloured.reshape(-1, 3), axis=0)) == 25 and (coloured[0, 0] == 0).all()
    assert (
        np.abs(PART_COLOURS[1:, None] - PART_COLOURS[None, 1:]).sum(-1)[~np.eye(24, dtype=bool)].min() > 0.1
    )
    picture = Image.new("RGB", (4, 4), (0, 90, 255))
    assert part_colours(picture) is picture


def test_clothes_without_captions_are_left_out_and_named(copy):
    data = DressCode(copy, "train")
    gone = data.rows[1][2]
    for name in ("fine", "coarse"):
        file = copy / f"{name}_captions.json"
        file.write_text(json.dumps({k: v for k, v in json.loads(file.read_text()).items() if k != gone[:6]}))
    left = DressCode(copy, "train")
    assert (
        left.missing() == [f"a caption of {gone}"]
        and left.uncaptioned == [gone]
        and len(left) == len(data) - 1
        and gone not in [c for _, c in left.pairs]
    )
    for name in ("fine", "coarse"):
        (copy / f"{name}_captions.json").write_text("{}")
    with pytest.raises(UserError, match="no cloth of train_pairs.txt has a caption"):
        DressCode(copy, "train")


@pytest.mark.parametrize(
    "path",
    [
        "dresses/train_pairs.txt",
        "upper_body/images",
        "lower_body/keypoints",
        "dresses/label_maps",
        "dresses/dense",
        "dresses/im_sketch",
        "fine_captions.json",
        "coarse_captions.json",
        "lower_body",
    ],
)
def test_what_is_missing_is_named_with_where_to_get_it(copy, path):
    target = copy / path
    shutil.rmtree(target) if target.is_dir() else target.unlink()
    with pytest.raises(
        UserError, match=f"lacks [^:]*{path}.*github.com/aimagelab/dress-code.*multimodal-garment-designer"
    ):
        DressCode(copy, "train")


@pytest.mark.parametrize(
    "name",
    ["images/{}_0.jpg", "images/{}_1.jpg", "keypoints/{}_2.json", "label_maps/{}_4.png", "dense/{}_5.png"],
)
def test_missing_files_of_the_rows_are_listed(copy, name):
    data = DressCode(copy, "train")
    assert data.missing() == []
    category, person, _ = data.rows[-1]
    path = f"{category}/{name.format(person[:6])}"
    (copy / path).unlink()
    assert data.missing() == [path]
    with pytest.raises(UserError, match=f"{copy / path}: cannot be read"):
        data[len(data) - 1]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"keypoints": [[1, 2, 3, 4]]}', "not the joints of a person"),
        ('{"keypoints": "none"}', "not the joints of a person"),
        ('{"people": []}', "not the joints of a person: None"),
        ('{"keypoints": [[1, 2', "not whole JSON"),
        ("[]", "not the joints"),
    ],
)
def test_broken_joints_are_named(copy, text, message):
    data = DressCode(copy, "train")
    category, person, _ = data.rows[0]
    file = copy / category / f"keypoints/{person[:6]}_2.json"
    file.write_text(text)
    with pytest.raises(UserError, match=f"^{file}: {message}") as caught:
        data[0]
    assert "\n" not in str(caught.value)


def test_a_map_of_labels_that_shows_nothing_to_repaint_is_named(copy):
    data = DressCode(copy, "train")
    i = next(i for i, row in enumerate(data.rows) if row[0] == "lower_body")
    file = copy / "lower_body" / f"label_maps/{data.rows[i][1][:6]}_4.png"
    Image.new("L", (96, 128)).save(file)
    with pytest.raises(UserError, match=f"{file}: no garment and no arms to repaint"):
        data[i]


def test_labels_may_be_grey_or_with_a_palette(copy):
    data = DressCode(copy, "train")
    before = np.asarray(data[0]["mask"])
    file = copy / data.rows[0][0] / f"label_maps/{data.rows[0][1][:6]}_4.png"
    picture = Image.open(file)
    assert picture.mode == "P"
    Image.fromarray(np.asarray(picture)).save(file)
    assert Image.open(file).mode == "L" and np.array_equal(np.asarray(data[0]["mask"]), before)


def test_a_person_or_a_caption_that_is_there_twice_is_named(copy):
    captions = copy / "fine_captions.json"
    text = captions.read_text()
    captions.write_text(text.replace("{", '{"000000": ["a"], ', 1))
    with pytest.raises(UserError, match="fine_captions.json: 000000 is there twice"):
        DressCode(copy, "train")
    captions.write_text(text)
    pairs = copy / "dresses/train_pairs.txt"
    pairs.write_text(pairs.read_text() * 2)
    with pytest.raises(UserError, match="dresses/train_pairs.txt: 000000_0.jpg is there twice"):
        DressCode(copy, "train")


@pytest.mark.skipif(not SAMPLES.is_dir(), reason="needs MGD's samples: set UNIFASHION_SAMPLES")
@pytest.mark.parametrize("paired", [True, False])
def test_mgds_own_samples_are_read(tmp_path, paired):
    # MGD gives out neither densepose's maps nor the shops' pictures: those are Dress Code's, and stood in for here
    root = Path(shutil.copytree(SAMPLES, tmp_path / "dresscode"))
    for category in DRESSCODE:
        (root / category).chmod(0o755)
        (root / category / "images").chmod(0o755)
        (root / category / "dense").mkdir()
        for file in (root / category / "keypoints").iterdir():
            Image.new("L", (768, 1024), 3).save(root / category / f"dense/{file.stem[:6]}_5.png")
    data = DressCode(root, "test", paired)
    assert len(data) == 4 and {row[0] for row in data.rows} == set(DRESSCODE) and data.uncaptioned == []
    gone = data.missing()
    assert gone == [f"{category}/images/{cloth}.jpg" for category, _, cloth in data.rows]
    for path in gone:
        Image.new("RGB", (768, 1024)).save(root / path)
    for item in (data[i] for i in range(len(data))):
        assert item["person"].size == item["mask"].size == item["sketch"].size == (768, 1024)
        assert 0.1 < (np.asarray(item["mask"]) > 0).mean() < 0.75 and len(item["text"].split(", ")) >= 3
        assert item["pose"].getpixel((0, 0)) != (0, 0, 0)


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("dresscode")
    settings = {"seed": 1, "difficulty": 1.0, "size": (128, 96)}
    write_dresscode(folder, settings, {"train": [{}] * 60, "val": [], "test": [{}] * 60}, map)
    return folder


@pytest.fixture
def copy(root, tmp_path) -> Path:
    return Path(shutil.copytree(root, tmp_path / "dresscode"))


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    return toy.ensure(tmp_path_factory.mktemp("world") / "toy", train=2, val=0, test=2, quiet=True)
