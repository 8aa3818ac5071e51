"""The readers of Fashion200K, VITON-HD, MGD, FashionGen and Fashion-IQ-Cap against a small drawn world in their original layouts."""

import json
import os
import pickle
import shutil
import struct
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from torch.utils.data import DataLoader, get_worker_info

from unifashion import UserError
from unifashion.data import toy
from unifashion.data.fashion200k import Fashion200K
from unifashion.data.fashiongen import FashionGen
from unifashion.data.fashioniq import FashionIQCap
from unifashion.data.mgd import MGD
from unifashion.data.mgd_mask import VITONHD as RULES
from unifashion.data.mgd_mask import mgd_masks
from unifashion.data.readers import DATA_SETS, READERS, in_toy, open_mgd
from unifashion.data.vitonhd import FOLDERS, VITONHD

SAMPLES = Path(os.environ.get("UNIFASHION_SAMPLES", "/nonexistent"), "fashioniq_cap")


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


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("women/a/1/1_0.jpeg\t0.9", "top_train_detect_all.txt: line 3 is not path<TAB>score<TAB>caption"),
        ("\t0.9\ta blouse", "top_train_detect_all.txt: line 3 is not path<TAB>score<TAB>caption"),
        ("women/a/1/1_0.jpeg\t0.9\ta blouse", "labels: women/a/1/1_0.jpeg is there twice"),
    ],
    ids=["no caption", "no path", "twice"],
)
def test_a_damaged_label_of_fashion200k_is_named(copy, line, message):
    label = copy / "fashion200k/labels/top_train_detect_all.txt"
    label.write_text(f"women/a/1/1_0.jpeg\t0.9\ta blouse\n\n{line}\n")
    with pytest.raises(UserError, match=message):
        Fashion200K(copy / "fashion200k")


def test_an_empty_caption_of_fashion200k_is_left_out_and_told(copy):
    label = copy / "fashion200k/labels/top_train_detect_all.txt"
    before = Fashion200K(copy / "fashion200k")
    label.write_text(f"women/a/1/1_0.jpeg\t0.9\t \n{label.read_text()}")
    data = Fashion200K(copy / "fashion200k")
    assert data.rows == before.rows and before.missing() == []
    assert data.missing() == ["a caption of women/a/1/1_0.jpeg"]


def test_fashion200k_with_the_labels_of_one_category_half_there_is_refused(copy):
    (copy / "fashion200k/labels/top_train_detect_all.txt").unlink()
    with pytest.raises(UserError, match="lacks labels/top_train_detect_all.txt: .*xthan/fashion-200k"):
        Fashion200K(copy / "fashion200k")


def test_what_a_mac_leaves_beside_labels_is_none(copy):
    before = Fashion200K(copy / "fashion200k").rows
    (copy / "fashion200k/labels/._top_train_detect_all.txt").write_bytes(b"\0\5\x16\7\xb0")
    assert Fashion200K(copy / "fashion200k").rows == before


@pytest.mark.parametrize(
    ("path", "reader"),
    [
        ("fashion200k/labels/top_train_detect_all.txt", lambda root: Fashion200K(root / "fashion200k")),
        ("vitonhd/train_pairs.txt", lambda root: VITONHD(root / "vitonhd")),
    ],
    ids=["labels", "pairs"],
)
def test_a_list_that_is_cut_within_a_letter_is_named(copy, path, reader):
    (copy / path).write_bytes("a.jpg\t0.9\tcaf\u00e9".encode()[:-1])
    with pytest.raises(UserError, match=f"{path}: not text in UTF-8"):
        reader(copy)


@pytest.mark.parametrize("split", ["train", "validation", "test"])
def test_fashiongen_gives_each_view_with_title_and_description(fashiongen, split):
    data = FashionGen(fashiongen / "fashiongen", split)
    first, n = {"train": (0, 12), "validation": (12, 2), "test": (14, 2)}[split]
    assert len(data) == 3 * n == len(data.products)
    with h5_file(fashiongen, split, "r") as file:
        for i, item in enumerate(data[i] for i in range(len(data))):
            product = str(90_000_000 + first + i // 3)
            assert item["path"] == f"{split}/{i}" and item["product"] == data.products[i] == product
            assert item["image"].mode == "RGB"
            assert np.array_equal(np.asarray(item["image"]), file["input_image"][i])
            name, description = (file[f"input_{key}"][i][0].decode() for key in ("name", "description"))
            assert item["text"] == f"{name}. {description}"
            assert item["category"].encode() == file["input_category"][i][0]
            assert item["subcategory"].encode() == file["input_subcategory"][i][0]
    assert data[-1]["path"] == f"{split}/{len(data) - 1}"
    with pytest.raises(IndexError):
        data[len(data)]


def test_fashiongens_split_val_is_validation(fashiongen):
    data = FashionGen(fashiongen / "fashiongen", "val")
    assert (
        data[0]["path"] == "validation/0" and data.texts == FashionGen(data.file.parent, "validation").texts
    )


def test_fashiongen_goes_to_workers_after_it_was_read(fashiongen):
    data = FashionGen(fashiongen / "fashiongen", "train")
    here = [np.asarray(data[i]["image"]) for i in range(len(data))]
    opened = data.opened[1]
    for context in ("fork", "spawn"):
        loader = DataLoader(
            data, batch_size=1, num_workers=2, collate_fn=only, multiprocessing_context=context
        )
        there = list(loader)
        assert all(np.array_equal(a, b["image"]) and b["own"] for a, b in zip(here, there, strict=True))
    assert data.opened[1] is opened and np.array_equal(np.asarray(data[0]["image"]), here[0])
    assert pickle.loads(pickle.dumps(data)).opened is None


def test_mark_up_in_fashiongens_texts_is_gone_and_words_stay_apart(fashiongen_copy):
    with h5_file(fashiongen_copy) as file:
        n = len(file["input_image"])
        put(file, "input_name", [[b"<b>Skirt</b>"]] * n)
        put(file, "input_description", [[b"In black.<br>Fits 3 < 4 &amp; 5.<br />\n<br/>Tonal."]] * n)
    assert set(FashionGen(fashiongen_copy / "fashiongen").texts) == {
        "Skirt. In black. Fits 3 < 4 &amp; 5. Tonal."
    }


def test_fashiongens_strings_are_latin_1_on_one_line_and_its_ids_of_any_type(fashiongen_copy):
    with h5_file(fashiongen_copy) as file:
        n = len(file["input_image"])
        put(file, "input_name", [["Pull  c\xf4tel\xe9".encode("iso-8859-1")]] * n)
        put(file, "input_description", [[b"\r\nTonal\xa0stitching.\n"]] * n)
        put(file, "input_productID", np.array([b"7a"] * n))
    item = FashionGen(fashiongen_copy / "fashiongen")[1]
    assert item["text"] == "Pull c\xf4tel\xe9. Tonal stitching." and item["product"] == "7a"


@pytest.mark.parametrize("key", ["image", "name", "description", "category", "subcategory", "productID"])
def test_what_fashiongen_lacks_is_named(fashiongen_copy, key):
    with h5_file(fashiongen_copy) as file:
        del file[f"input_{key}"]
    with pytest.raises(UserError, match=f"train.h5 lacks input_{key}"):
        FashionGen(fashiongen_copy / "fashiongen")


def test_columns_of_fashiongen_that_do_not_fit_are_refused(fashiongen_copy):
    with h5_file(fashiongen_copy) as file:
        put(file, "input_name", file["input_name"][:-1])
    with pytest.raises(UserError, match="numbers of rows differ: .*'image': 36, 'name': 35"):
        FashionGen(fashiongen_copy / "fashiongen")
    with h5_file(fashiongen_copy) as file:
        put(file, "input_image", np.zeros((36, 8, 8), np.uint8))
    with pytest.raises(UserError, match="input_image is uint8.*not uint8"):
        FashionGen(fashiongen_copy / "fashiongen")


def test_a_row_of_fashiongen_without_a_word_is_named_and_one_with_a_name_alone_is_read(fashiongen_copy):
    with h5_file(fashiongen_copy) as file:
        for key in ("name", "description"):
            values = file[f"input_{key}"][()]
            values[3] = b" "
            if key == "description":
                values[5] = b""
            put(file, f"input_{key}", values)
    data = FashionGen(fashiongen_copy / "fashiongen")
    with pytest.raises(UserError, match="train.h5: row 3 has neither name nor description"):
        data[3]
    assert data[5]["text"] and not data[5]["text"].endswith(". ")


def test_an_error_of_hdf5_of_any_kind_names_the_file(fashiongen, monkeypatch):
    def fails(*_):
        raise RuntimeError("unable to get group info (addr overflow)")

    monkeypatch.setattr(FashionGen, "strings", fails)
    with pytest.raises(UserError, match="train.h5: cannot be read, or cut short .*addr overflow"):
        FashionGen(fashiongen / "fashiongen")


@pytest.mark.parametrize("harm", ["cut", "renamed", "empty"])
def test_a_damaged_file_of_fashiongen_is_named(fashiongen_copy, harm):
    path = fashiongen_copy / "fashiongen/fashiongen_256_256_train.h5"
    whole = path.read_bytes()
    path.write_bytes({"cut": whole[:-100], "renamed": b"<html>" * 100, "empty": b""}[harm])
    with pytest.raises(UserError, match=f"{path}: cannot be opened, or cut short, or not HDF5"):
        FashionGen(fashiongen_copy / "fashiongen")


def test_a_damaged_picture_of_fashiongen_is_named_and_the_others_are_read(fashiongen_copy):
    with h5_file(fashiongen_copy, mode="r") as file:
        chunk = file["input_image"].id.get_chunk_info(4)
    with open(fashiongen_copy / "fashiongen/fashiongen_256_256_train.h5", "r+b") as file:
        file.seek(chunk.byte_offset)
        file.write(bytes(chunk.size))
    data = FashionGen(fashiongen_copy / "fashiongen")
    with pytest.raises(UserError, match="train.h5: the picture of row 4 cannot be read"):
        data[4]
    assert data[3]["path"] == "train/3" and data[5]["path"] == "train/5"


def test_fashiongen_says_where_it_is_asked_for_and_that_it_needs_h5py(fashiongen, tmp_path, monkeypatch):
    with pytest.raises(UserError, match="validation.h5 is missing: .*fashion-gen.com.*--data toy"):
        FashionGen(tmp_path, "val")
    monkeypatch.setitem(sys.modules, "h5py", None)
    with pytest.raises(UserError, match="pip install h5py"):
        FashionGen(fashiongen / "fashiongen")


def test_fashioniq_gives_each_picture_with_its_caption(root):
    seen = set()
    for split, n in (("train", 24), ("val", 0), ("test", 4)):
        data = FashionIQCap(root / "fashioniq", split)
        assert len(data) == n == len(data.products)
        captions = {}
        for kind in ("dress", "shirt", "toptee"):
            file = root / f"fashioniq/next_llava.{split}.{kind}.caption.json"
            captions |= {row["image"]: (kind, row["caption"]) for row in json.loads(file.read_text())}
        for i, item in enumerate(data[i] for i in range(n)):
            assert item["product"] == data.products[i] and item["path"] == f"images/{item['product']}.png"
            assert (item["category"], "\n" + item["text"]) == captions[item["product"]]
            stored = Image.open(root / "fashioniq" / item["path"])
            assert np.array_equal(np.asarray(item["image"]), np.asarray(stored))
            assert item["image"].mode == "RGB" and item["text_guidance"] == ""
            seen.add(item["product"])
    assert len(seen) == 28


def test_captions_of_fashioniq_lose_their_stars_and_line_breaks_and_pictures_may_be_jpegs(copy):
    data = FashionIQCap(copy / "fashioniq")
    category, row = data.rows[0]
    file = copy / f"fashioniq/next_llava.train.{category}.caption.json"
    items = json.loads(file.read_text())
    items[0]["caption"] = "\n\nThe top is a **red** one.\n\nIt is **plain**.\n"
    file.write_text(json.dumps(items))
    picture = copy / f"fashioniq/images/{row['image']}.png"
    Image.open(picture).save(picture.with_suffix(".jpg"))
    picture.unlink()
    item = FashionIQCap(copy / "fashioniq")[0]
    assert item["text"] == "The top is a red one. It is plain." and item["path"].endswith(".jpg")
    picture.with_suffix(".jpg").unlink()
    with pytest.raises(UserError, match=f"{row['image']}.png: cannot be read"):
        data[0]


@pytest.mark.parametrize(
    ("harm", "message"),
    [
        (lambda text: text[:-9], "not whole JSON"),
        (lambda text: "{}", "not a list"),
        (lambda text: '["B0"]', "row 0 has not the texts"),
        (lambda text: text.replace('"caption"', '"captions"'), "row 0 has not the texts image, caption"),
        (
            lambda text: text.replace('"text_guidance": ""', '"text_guidance": null'),
            "row 0 has not the texts",
        ),
        (lambda text: '[{"image": "B0", "caption": "\\n** **", "text_guidance": ""}]', "row 0 has an empty"),
    ],
)
def test_broken_captions_of_fashioniq_are_named_with_their_row(copy, harm, message):
    file = copy / "fashioniq/next_llava.train.toptee.caption.json"
    file.write_text(harm(file.read_text()))
    with pytest.raises(UserError, match=f"{file}: {message}"):
        FashionIQCap(copy / "fashioniq")


def test_where_train_captions_were_not_released_ours_are_learned_from(copy):
    root = copy / "fashioniq"
    for file in root.glob("next_llava.train.*"):
        file.unlink()
    pools = {
        s: json.loads((root / f"image_splits/split.dress.{s}.json").read_text()) for s in ("train", "val")
    }
    rows = [
        {"image": f"images/{name}.png", "caption": f"A {name}."} for pool in pools.values() for name in pool
    ]
    (root / "captions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    shutil.copy(root / "image_splits/split.dress.train.json", root / "image_splits/split.shirt.train.json")
    both = pools["train"].pop()  # as 811 of the real ones, of train and of val in another category
    file = root / "image_splits/split.toptee.val.json"
    file.write_text(json.dumps([*json.loads(file.read_text()), both]))
    data = FashionIQCap(root)
    assert data.products == pools["train"]  # not val's, and those of two categories once
    toptee = json.loads((root / "image_splits/split.toptee.train.json").read_text())
    assert data.uncaptioned == toptee and data.missing() == [f"a caption of {name}" for name in toptee]
    item = data[0]
    assert (
        item["text"] == f"A {data.products[0]}." and item["category"] == "dress" and item["image"].size[0] > 1
    )

    file.unlink()  # without which it is not known what is evaluated on
    with pytest.raises(UserError, match="split.toptee.val.json: cannot be read"):
        FashionIQCap(root)


def test_fashioniq_says_that_train_captions_were_never_released_and_where_the_rest_is(copy):
    for file in (copy / "fashioniq").glob("next_llava.*.shirt.*"):
        file.unlink()
    with pytest.raises(UserError, match="lacks next_llava.train.shirt.caption.json: .*never released"):
        FashionIQCap(copy / "fashioniq", "train")
    with pytest.raises(UserError, match="lacks next_llava.test.shirt.*github.com.*--data toy"):
        FashionIQCap(copy / "fashioniq", "test")


def test_fashioniq_without_pictures_is_refused(copy):
    shutil.rmtree(copy / "fashioniq/images")
    with pytest.raises(UserError, match="lacks images/: .*fashion-iq"):
        FashionIQCap(copy / "fashioniq", "train")


@pytest.mark.skipif(not SAMPLES.is_dir(), reason="needs the sample annotations: set UNIFASHION_SAMPLES")
def test_the_released_captions_of_fashioniq_are_read(tmp_path):
    for file in SAMPLES.glob("next_llava.val.*.json"):
        (tmp_path / file.name).symlink_to(file)
    (tmp_path / "images").mkdir()
    data = FashionIQCap(tmp_path, "val")
    Image.new("RGB", (5, 7)).save(tmp_path / f"images/{data.products[0]}.png")
    assert len(data) == 3817 + 6346 + 5373 and data.products[0] == "B009PMCJLW"
    assert all(
        "**" not in row["caption"] and row["caption"] == row["caption"].strip() for _, row in data.rows
    )
    item = data[0]
    assert item["category"] == "dress" and item["text"].startswith("The dress is a fitted, knee-length")


@pytest.mark.parametrize("reader", [Fashion200K, FashionGen, FashionIQCap])
def test_products_are_those_of_the_items(request, reader):
    root = request.getfixturevalue("fashiongen" if reader is FashionGen else "root")
    data = reader(root / {Fashion200K: "fashion200k", FashionGen: "fashiongen"}.get(reader, "fashioniq"))
    assert data.products == [data[i]["product"] for i in range(len(data))]


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
    stored = Image.open(root / f"vitonhd/train/agnostic-v3.2/{item['person_id']}.jpg")
    mask, agnostic, person = (np.asarray(x).astype(int) for x in (item["mask"], stored, item["person"]))
    assert item["mask"].mode == "L" and set(np.unique(mask)) == {0, 255}
    assert np.abs(agnostic[mask == 255] - 128).mean() < 1
    assert np.abs(agnostic[mask == 0] - person[mask == 0]).mean() < 2


def test_soft_masks_are_cut_at_128(copy):
    name = VITONHD(copy / "vitonhd", "train").pairs[0][0]
    soft = Image.fromarray(np.array([[0, 127], [128, 255]], np.uint8))
    soft = soft.resize(VITONHD(copy / "vitonhd", "train")[0]["person"].size, Image.Resampling.NEAREST)
    soft.save(copy / f"vitonhd/train/agnostic-mask/{name}_mask.png")
    mask = np.asarray(VITONHD(copy / "vitonhd", "train")[0]["mask"])
    half = len(mask) // 2
    assert (mask[:half] == 0).all() and (mask[half:] == 255).all()


def test_a_mask_of_another_size_than_its_person_is_named(copy):
    name = VITONHD(copy / "vitonhd", "train").pairs[0][0]
    Image.new("L", (5, 7)).save(copy / f"vitonhd/train/agnostic-mask/{name}_mask.png")
    with pytest.raises(UserError, match=rf"{name}_mask.png: is of \(5, 7\) pixels, its person of \("):
        VITONHD(copy / "vitonhd", "train")[0]


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


def test_mgd_makes_the_mask_itself_where_viton_hds_is_not_there(copy):
    before = MGD(copy / "vitonhd", "train")[0]
    shutil.rmtree(copy / "vitonhd/train/agnostic-mask")
    data = MGD(copy / "vitonhd", "train")
    item, folder = data[0], copy / "vitonhd/train"
    assert set(item) == set(before) and data.missing() == []
    parse = Image.open(folder / f"image-parse-v3/{item['person_id']}.png")
    people = json.loads((folder / f"openpose_json/{item['person_id']}_keypoints.json").read_text())["people"]
    joints = np.reshape(people[0]["pose_keypoints_2d"], (25, 3))
    wanted = Image.fromarray(mgd_masks(parse, joints, (128, 96), RULES).repaint).resize(
        (96, 128), Image.Resampling.NEAREST
    )
    mask = np.asarray(item["mask"])
    assert np.array_equal(mask > 0, np.asarray(wanted)) and not np.array_equal(
        mask, np.asarray(before["mask"])
    )
    assert mask[np.isin(np.asarray(parse), (5, 6, 7))].mean() > 250
    joints_file = folder / f"openpose_json/{item['person_id']}_keypoints.json"
    joints_file.write_text('{"people": []}')
    with pytest.raises(UserError, match=f"{joints_file}: not the joints of a person"):
        data[0]
    joints_file.unlink()
    assert data.missing() == [str(joints_file.relative_to(copy / "vitonhd"))]
    shutil.rmtree(folder / "openpose_json")
    with pytest.raises(UserError, match="openpose_json.*shadow2496"):
        MGD(copy / "vitonhd", "train")


def test_pairs_are_the_ids_of_the_items(root):
    for data in (MGD(root / "vitonhd", "test", paired=False), VITONHD(root / "vitonhd", "test")):
        ids = [(item["person_id"], item["cloth_id"]) for item in (data[i] for i in range(len(data)))]
        assert data.pairs == ids


def test_every_data_set_that_can_be_named_is_in_a_toy_world(fashiongen):
    assert list(DATA_SETS) == ["fashion200k", "fashiongen", "fashioniq-cap", "fashioniq", "vitonhd", "mgd"]
    assert READERS.items() <= DATA_SETS.items()
    for name, reader in DATA_SETS.items():
        data = reader(in_toy(fashiongen, name), "train")
        assert len(data) > 0 and isinstance(data[0], dict) and data.missing() == []
        if name in READERS:
            assert {"image", "text", "product"} <= set(data[0]) and len(data.products) == len(data)
    assert len(open_mgd(in_toy(fashiongen, "dresscode"), "train")) == 6


@pytest.mark.parametrize("folder", FOLDERS)
def test_a_missing_folder_of_vitonhd_is_named(copy, folder):
    shutil.rmtree(copy / "vitonhd/train" / folder)
    with pytest.raises(UserError, match=f"{folder}.*shadow2496"):
        VITONHD(copy / "vitonhd", "train")


@pytest.mark.parametrize("reader", [Fashion200K, VITONHD, MGD, FashionIQCap])
def test_an_empty_folder_is_refused_with_where_to_get_the_data(tmp_path, reader):
    with pytest.raises(UserError, match="github.com.*--data toy"):
        reader(tmp_path, "test")


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


def test_nothing_is_missing_from_what_was_drawn(root, fashiongen):
    for data in (*every_reader(root), FashionGen(fashiongen / "fashiongen")):
        assert data.missing() == []


@pytest.mark.parametrize("i", range(4))
def test_missing_pictures_are_listed_in_the_order_of_the_rows(copy, i):
    name, gone = MISSING[i]
    data = every_reader(copy)[i]
    first, last = sorted(copy.glob(f"{name}/{gone}"))[::2][:2]
    assert data.missing() == []
    for path in (last, first):
        path.unlink()
    (last.with_name("unnamed.txt")).write_text("no row names this")
    folder = copy / name.split("/")[0]
    assert sorted(data.missing()) == sorted(str(path.relative_to(folder)) for path in (first, last))


def test_the_missing_come_in_the_rows_order_with_whole_folders(copy):
    paths = [path for path, _ in Fashion200K(copy / "fashion200k").rows]
    for path in (paths[4], paths[1]):
        (copy / "fashion200k" / path).unlink()
    assert Fashion200K(copy / "fashion200k").missing() == [paths[1], paths[4]]
    data = MGD(copy / "vitonhd", "test", paired=False)
    shutil.rmtree(copy / "vitonhd/test/cloth")
    assert data.missing() == [f"test/cloth/{cloth}.jpg" for _, cloth in data.photos.pairs]
    (copy / "vitonhd/test/cloth").mkdir()
    assert len(data.missing()) == 4
    (copy / "vitonhd/test/cloth" / f"{data.photos.pairs[0][1]}.jpg").symlink_to("nowhere.jpg")
    assert len(data.missing()) == 4  # a link to nothing is no picture
    shutil.rmtree(copy / "vitonhd/test/image")
    assert len(data.missing()) == 4  # who lacks several files counts once


def test_a_person_who_is_there_twice_is_named(copy):
    pairs = copy / "vitonhd/test_pairs.txt"
    lines = pairs.read_text().splitlines()
    pairs.write_text("\n".join([*lines, lines[1]]))
    person = lines[1].split()[0]
    with pytest.raises(UserError, match=f"^{pairs}: {person} is there twice$"):
        VITONHD(copy / "vitonhd", "test")
    pairs.write_text("\n".join([*lines, *lines]))
    with pytest.raises(UserError, match="is there twice, and 3 more$"):
        MGD(copy / "vitonhd", "test")


def test_a_picture_captioned_twice_is_named(copy):
    file = copy / "fashioniq/next_llava.train.toptee.caption.json"
    items = json.loads(file.read_text())
    file.write_text(json.dumps([*items, items[2]]))
    with pytest.raises(UserError, match=f"^{file}: {items[2]['image']} is there twice$"):
        FashionIQCap(copy / "fashioniq")


@pytest.mark.parametrize(
    ("harm", "message"),
    [
        (lambda text: text.replace("{", '{"00001": ["a"], ', 1), "00001 is there twice"),
        (lambda text: json.dumps(json.loads(text) | {"00002": []}), "cloth 00002 has no texts"),
        (
            lambda text: json.dumps(json.loads(text) | {"00002": ["a", " "]}),
            "cloth 00002 has no texts, or an empty",
        ),
        (lambda text: json.dumps(json.loads(text) | {"00002": "red"}), "cloth 00002 has no texts"),
        (lambda text: "[]", "not an object"),
    ],
)
def test_captions_of_mgd_that_are_not_texts_are_named(copy, harm, message):
    captions = copy / "vitonhd/captions.json"
    captions.write_text(harm(captions.read_text()))
    with pytest.raises(UserError, match=f"^{captions}: {message}"):
        MGD(copy / "vitonhd", "train")


# A folder of each of `every_reader`, and the pictures there of which the first and the third go
MISSING = [
    ("fashion200k/women", "*/*/*/*.jpeg"),
    ("fashioniq/images", "B00000000[0-9].png"),
    ("vitonhd/train", "agnostic-mask/*"),
    ("vitonhd/train", "cloth-sketch/*"),
]


def every_reader(root: Path) -> list:
    """Fashion200K, FashionIQCap, VITONHD, MGD of train; FashionIQ and DressCode have files of tests of their own."""
    return [
        Fashion200K(root / "fashion200k"),
        FashionIQCap(root / "fashioniq"),
        VITONHD(root / "vitonhd"),
        MGD(root / "vitonhd"),
    ]


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("readers") / "toy"
    return toy.ensure(folder, train=6, val=0, test=4, quiet=True)


@pytest.fixture
def copy(root, tmp_path) -> Path:
    return Path(shutil.copytree(root, tmp_path / "toy"))


@pytest.fixture(scope="module")
def fashiongen(tmp_path_factory) -> Path:
    pytest.importorskip("h5py")
    return toy.ensure(tmp_path_factory.mktemp("gen") / "toy", train=6, val=2, test=2, quiet=True)


@pytest.fixture
def fashiongen_copy(fashiongen, tmp_path) -> Path:
    shutil.copytree(fashiongen / "fashiongen", tmp_path / "fashiongen")
    return tmp_path


def h5_file(root: Path, split: str = "train", mode: str = "r+"):
    import h5py

    return h5py.File(root / f"fashiongen/fashiongen_256_256_{split}.h5", mode)


def put(file, key: str, values) -> None:
    del file[key]
    file[key] = values


def only(batch: list) -> dict:
    return batch[0] | {"own": get_worker_info().dataset.opened[0] == os.getpid()}


def rows(root: Path, split: str = "train") -> list[dict]:
    return [json.loads(line) for line in (root / f"attributes_{split}.jsonl").read_text().splitlines()]
