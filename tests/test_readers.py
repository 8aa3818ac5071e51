"""The readers of Fashion200K, VITON-HD and MGD against a small drawn world in their original layouts."""

import json
import os
import shutil
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from unifashion import UserError
from unifashion.data import toy
from unifashion.data.fashion200k import Fashion200K
from unifashion.data.mgd import MGD
from unifashion.data.vitonhd import FOLDERS, VITONHD


def test_fashion200k_gives_each_view_with_its_own_caption(root):
    data = Fashion200K(root / "fashion200k", "train")
    captions = {
        f"{r['product']}/{Path(r['product']).name}_{v}.jpeg": c
        for r in rows(root)
        for v, c in enumerate(r["captions"])
    }
    assert len(data) == len(captions) == 18
    for item in (data[i] for i in range(len(data))):
        assert item["text"] == captions[item["path"]]
        assert item["product"] == item["path"].split("/")[-2] and item["path"].startswith("women/")
        stored = Image.open(root / "fashion200k" / item["path"])
        assert item["image"].mode == "RGB" and np.array_equal(np.asarray(item["image"]), np.asarray(stored))


def test_fashion200k_keeps_splits_apart(root):
    train, test = (Fashion200K(root / "fashion200k", split) for split in ("train", "test"))
    assert not {path for path, _ in train.rows} & {path for path, _ in test.rows}


def test_captions_with_letters_beyond_ascii_are_read(copy):
    label = copy / "fashion200k/labels/top_train_detect_all.txt"
    label.write_text("women/a/1/1_0.jpeg\t0.9\tcafé-au-lait blouse\n", encoding="utf-8")
    assert ("women/a/1/1_0.jpeg", "café-au-lait blouse") in Fashion200K(copy / "fashion200k").rows


def test_vitonhd_pairs_by_the_first_column_and_unpairs_by_the_second(root):
    lines = [line.split() for line in (root / "vitonhd/test_pairs.txt").read_text().splitlines()]
    paired, unpaired = VITONHD(root / "vitonhd", "test"), VITONHD(root / "vitonhd", "test", paired=False)
    assert len(paired) == len(unpaired) == len(lines)
    for i, (person, cloth) in enumerate(lines):
        a, b = paired[i], unpaired[i]
        assert f"{a['person_id']}.jpg" == f"{b['person_id']}.jpg" == f"{a['cloth_id']}.jpg" == person
        assert f"{b['cloth_id']}.jpg" == cloth != person
        shot = Image.open(root / "vitonhd/test/cloth" / cloth)
        assert np.array_equal(np.asarray(b["cloth"]), np.asarray(shot))


@pytest.mark.parametrize(
    ("key", "path"),
    [
        ("person", "image/{}.jpg"),
        ("agnostic", "agnostic-v3.2/{}.jpg"),
        ("pose", "image-densepose/{}.jpg"),
        ("cloth", "cloth/{}.jpg"),
    ],
)
def test_vitonhd_reads_each_picture_from_its_folder(root, key, path):
    item = VITONHD(root / "vitonhd", "train")[1]
    stored = Image.open(root / "vitonhd/train" / path.format(item["person_id"]))
    assert np.array_equal(np.asarray(item[key]), np.asarray(stored))


def test_the_mask_is_white_where_the_agnostic_picture_is_grey(root):
    item = VITONHD(root / "vitonhd", "train")[0]
    mask, agnostic, person = (np.asarray(item[key]).astype(int) for key in ("mask", "agnostic", "person"))
    assert item["mask"].mode == "L" and set(np.unique(mask)) == {0, 255}
    assert np.abs(agnostic[mask == 255] - 128).mean() < 1
    assert np.abs(agnostic[mask == 0] - person[mask == 0]).mean() < 2


def test_soft_masks_are_cut_at_128(copy):
    name = VITONHD(copy / "vitonhd", "train").pairs[0][0]
    Image.fromarray(np.array([[0, 127, 128, 255]], np.uint8)).save(
        copy / f"vitonhd/train/agnostic-mask/{name}_mask.png"
    )
    assert np.asarray(VITONHD(copy / "vitonhd", "train")[0]["mask"]).tolist() == [[0, 0, 255, 255]]


def test_mgd_adds_the_text_of_the_cloth_and_its_in_shop_sketch(root):
    chunks = json.loads((root / "vitonhd/captions.json").read_text())
    data = MGD(root / "vitonhd", "test", paired=False)
    for item in (data[i] for i in range(len(data))):
        assert item["text"] == ", ".join(chunks[item["cloth_id"][:5]])
        stored = Image.open(root / f"vitonhd/test/cloth-sketch/{item['cloth_id']}.png")
        assert item["sketch"].mode == "L" and np.array_equal(np.asarray(item["sketch"]), np.asarray(stored))
        assert set(item) == set(VITONHD(root / "vitonhd", "test")[0]) | {"sketch", "text"}


@pytest.mark.parametrize("paired", [True, False])
def test_mgd_falls_back_to_the_sketches_on_the_person(copy, paired):
    shutil.rmtree(copy / "vitonhd/test/cloth-sketch")
    item = MGD(copy / "vitonhd", "test", paired)[0]
    person, cloth = item["person_id"], item["cloth_id"]
    path = f"im_sketch/{person}.png" if paired else f"im_sketch_unpaired/{person}_{cloth}.png"
    stored = Image.open(copy / "vitonhd/test" / path)
    assert np.array_equal(np.asarray(item["sketch"]), np.asarray(stored))


@pytest.mark.parametrize("folder", FOLDERS)
def test_a_missing_folder_of_vitonhd_is_named(copy, folder):
    shutil.rmtree(copy / "vitonhd/train" / folder)
    with pytest.raises(UserError, match=f"{folder}.*shadow2496"):
        VITONHD(copy / "vitonhd", "train")


@pytest.mark.parametrize("reader", [Fashion200K, VITONHD, MGD])
def test_an_empty_folder_is_refused_with_where_to_get_the_data(tmp_path, reader):
    with pytest.raises(UserError, match="github.com.*--data toy"):
        reader(tmp_path, "train")


def test_mgd_without_annotations_says_where_they_are(copy):
    (copy / "vitonhd/captions.json").unlink()
    with pytest.raises(UserError, match="captions.json.*aimagelab"):
        MGD(copy / "vitonhd", "train")


def test_captions_that_are_cut_short_are_named(copy):
    captions = copy / "vitonhd/captions.json"
    captions.write_text(captions.read_text()[:-9])
    with pytest.raises(UserError, match="captions.json: not whole JSON"):
        MGD(copy / "vitonhd", "train")


@pytest.mark.parametrize("harm", ["cut", "flipped", "renamed", "enormous"])
def test_a_damaged_picture_is_named_whatever_the_damage(copy, harm):
    data = MGD(copy / "vitonhd", "train")
    path = copy / "vitonhd/train/cloth-sketch" / f"{data.photos.pairs[1][1]}.png"
    whole = path.read_bytes()
    size = struct.pack(">2I", 60000, 60000)
    enormous = whole[:16] + size + whole[24:29] + struct.pack(">I", zlib.crc32(b"IHDR" + size + whole[24:29]))
    made = {
        "cut": whole[: len(whole) // 2],
        "flipped": whole[:30] + bytes(255 - b for b in whole[30:60]) + whole[60:],
        "renamed": b"<html>",
        "enormous": enormous + whole[33:],
    }
    path.write_bytes(made[harm])
    with pytest.raises(UserError, match=f"{path}: cannot be read as an image"):
        data[1]


def test_a_cloth_without_a_caption_is_named(copy):
    captions = json.loads((copy / "vitonhd/captions.json").read_text())
    cloth = VITONHD(copy / "vitonhd", "train").pairs[2][1]
    del captions[cloth[:5]]
    (copy / "vitonhd/captions.json").write_text(json.dumps(captions))
    with pytest.raises(UserError, match=cloth):
        MGD(copy / "vitonhd", "train")


@pytest.mark.parametrize(
    ("path", "line", "reader"),
    [
        ("vitonhd/train_pairs.txt", "only_one.jpg", lambda root: VITONHD(root / "vitonhd")),
        (
            "fashion200k/labels/top_train_detect_all.txt",
            "no tabs here",
            lambda root: Fashion200K(root / "fashion200k"),
        ),
    ],
)
def test_a_broken_line_is_quoted(copy, path, line, reader):
    (copy / path).write_text(line + "\n")
    with pytest.raises(UserError, match=line.split(".")[0]):
        reader(copy)


def test_reading_leaves_no_file_open(root):
    data = MGD(root / "vitonhd", "train")
    before = len(os.listdir("/proc/self/fd"))
    items = [data[i] for i in range(len(data))]
    assert len(items) == 6 and len(os.listdir("/proc/self/fd")) == before


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("readers") / "toy"
    return toy.ensure(folder, train=6, val=0, test=4, quiet=True)


@pytest.fixture
def copy(root, tmp_path) -> Path:
    return Path(shutil.copytree(root, tmp_path / "toy"))


def rows(root: Path, split: str = "train") -> list[dict]:
    return [json.loads(line) for line in (root / f"attributes_{split}.jsonl").read_text().splitlines()]
