"""ToyFashion against its promises: one mask a person, a reachable true answer, visible attributes, separate splits."""

import errno
import hashlib
import json
import multiprocessing
import os
import shutil
import subprocess
import sys
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace
from itertools import product
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.cases import others_slow
from unifashion import UserError
from unifashion.data import shops, toy
from unifashion.data.body import POSE_HUES, Body, body_of, pose_parts
from unifashion.data.cloth import pattern_cover
from unifashion.data.drawing import apply
from unifashion.data.fashioniq import joined
from unifashion.data.modifications import changes, differences
from unifashion.data.texts import (
    CATEGORY_WORDS,
    LENGTH_WORDS,
    NECK_WORDS,
    PATTERN_WORDS,
    SLEEVE_WORDS,
    caption,
    chunks,
    named,
)


def add_all(root: Path) -> None:
    for name, workers in (
        ("dresscode", 1),
        ("fashioniq", 1),
        ("fashiongen", 3),
    ):  # neither order nor processes of `ensure`
        assert toy.part(root, name, quiet=True, workers=workers) == root / name


ROOT = Path(__file__).parents[1]
SMALL = {"train": 12, "val": 4, "test": 8, "quiet": True}
FEW = {"train": 2, "val": 2, "test": 2, "quiet": True}  # where a test draws worlds of its own
GREY_KNIT = toy.Garment("sweater", "grey", "yellow", "striped", "long", "v", "regular")


@pytest.mark.parametrize("difficulty", others_slow([1.0, 2.0], 2.0))
def test_a_person_in_any_garment_has_one_mask_and_changes_only_inside_it(difficulty):
    for seed, person in enumerate(persons(4, difficulty)):
        worn = [toy.draw_person(person, g) for g in (*extreme_garments(), *garments(4, seed))]
        mask = array(worn[0]["mask"])
        assert set(np.unique(mask)) == {0, 255}
        for one in worn:
            assert np.array_equal(array(one["mask"]), mask)
            assert not array(one["garment"])[mask == 0].any()
            assert np.array_equal(array(one["image"])[mask == 0], array(worn[0]["image"])[mask == 0])


def test_the_mask_spares_hair_face_hands_shoes_and_shows_the_trousers():
    for person in persons(40, 1.0):
        worn = toy.draw_person(person, GREY_KNIT)
        mask, parse = array(worn["mask"]) > 0, array(worn["parse"])
        assert not mask[parse == 2].any()
        assert mask[parse == 13].mean() < 0.05
        assert not mask[np.isin(parse, (18, 19))].any()
        assert not mask[np.isin(parse, (14, 15))].all()  # long sleeves: what is left of the arms are hands
        assert (np.isin(parse, (9, 12)) & ~mask).sum() >= 25
        assert 0.2 < mask.mean() < 0.45


@pytest.mark.slow
def test_no_prop_reaches_under_the_mask():
    for prop in ("plant", "lamp", "frame", "stool"):
        shown = 0
        for person in persons(12, 2.0):
            with_prop, without = (toy.draw_person(replace(person, prop=p), GREY_KNIT) for p in (prop, "none"))
            differs = (array(with_prop["image"]) != array(without["image"])).any(-1)
            shown += differs.any()
            assert not differs[array(without["mask"]) > 0].any()
        assert shown > 0


def test_the_agnostic_picture_is_the_person_with_a_grey_hole():
    worn = toy.draw_person(persons(1)[0], GREY_KNIT)
    mask, image, agnostic = (array(worn[name]) for name in ("mask", "image", "agnostic"))
    assert (agnostic[mask > 0] == 128).all()
    assert np.array_equal(agnostic[mask == 0], image[mask == 0])


@pytest.mark.parametrize("pattern", toy.ATTRIBUTES["pattern"])
def test_the_cloth_on_the_person_is_the_cloth_of_the_product_shot(pattern):
    # the same point of the torso, through each picture's own frame, has the same nearest colour
    g = toy.Garment("sweater", "blue", "yellow", pattern, "long", "round", "long")
    flat, points = array(toy.draw_product(g)["image"]), torso_points()
    for person in persons(5, 1.0):
        person = replace(person, arms=((30.0, 30.0), (30.0, 30.0)))  # off the torso
        worn = array(toy.draw_person(person, g)["image"])
        a = nearest_of(colours_at(flat, Body(), points), ("blue", "yellow"))
        b = nearest_of(colours_at(worn, body_of(person), points), ("blue", "yellow"))
        assert (a == b).mean() > 0.93


def test_the_main_colour_covers_clearly_more_than_half():
    v, u = np.mgrid[-60:60:0.25, -60:60:0.25]
    for pattern in toy.ATTRIBUTES["pattern"][1:]:
        assert 0.2 < pattern_cover(pattern, u, v, 1.0).mean() < 0.44


def test_the_palette_rule_names_the_main_colour():
    right = 0
    for i, (g, person) in enumerate(zip(garments(100, 7), persons(100), strict=True)):
        shot = toy.draw_product(g) if i % 2 else toy.draw_person(person, g)
        right += (
            toy.main_colour(array(shot["image"]), array(shot["mask" if i % 2 else "garment"]) > 0) == g.colour
        )
    assert right >= 99


@pytest.mark.parametrize("pattern", toy.ATTRIBUTES["pattern"][1:])
def test_patterns_survive_a_quarter_of_the_size(pattern):
    # along the line from the main to the second colour, 1 is the full contrast
    g = toy.Garment("dress", "blue", "yellow", pattern, "long", "round", "maxi")
    shots = [toy.draw_product(x) for x in (g, replace(g, pattern="plain"))]
    small, plain = (np.asarray(s["image"].reduce(4), float) for s in shots)
    inside = array(shots[0]["mask"].reduce(4)) == 255
    axis = np.subtract(toy.PALETTE["yellow"], toy.PALETTE["blue"])
    marks = ((small - plain)[inside] @ axis) / (axis @ axis)
    assert np.percentile(marks, 92) - np.percentile(marks, 8) > 0.5


def test_garments_that_differ_in_one_attribute_look_different():
    for name, values in toy.ATTRIBUTES.items():
        values = toy.TOP_LENGTHS if name == "length" else tuple(v for v in values if v != "dress")
        variants = [replace(GREY_KNIT, **{name: value}) for value in values]
        shots = [array(toy.draw_product(g)["image"]).astype(int) for g in variants]
        assert min(np.abs(a - b).sum() for i, a in enumerate(shots) for b in shots[:i]) > 10_000, name


def test_sketches_show_shape_but_neither_colour_nor_pattern():
    g = toy.Garment("jacket", "red", "white", "checked", "short", "square", "regular")
    sketch = array(toy.draw_sketch(g))
    assert np.array_equal(
        sketch, array(toy.draw_sketch(replace(g, colour="white", pattern="plain", second="black")))
    )
    assert not np.array_equal(sketch, array(toy.draw_sketch(replace(g, neckline="v"))))
    assert 0.01 < (sketch > 127).mean() < 0.15 and np.median(sketch) == 0
    assert not sketch[~grow(array(toy.draw_product(g)["mask"]) > 0, 3)].any()


def test_the_pose_picture_tells_part_and_place():
    person = persons(1)[0]
    pose, parts = array(toy.draw_pose(person)) / 255, pose_parts(body_of(person))
    torso = np.array([(-6, 12), (6, 12), (-6, 28), (6, 28)])  # right and left chest, right and left hip
    hue, saturation, value = hsv(colours_at(pose, body_of(person), torso))
    assert np.allclose(hue, POSE_HUES[6], atol=0.01)
    assert (saturation[[1, 3]] > saturation[[0, 2]] + 0.15).all()
    assert (value[2:] > value[:2] + 0.15).all()
    assert len(set(POSE_HUES)) == len(parts) == 14
    hues, _, _ = hsv(pose[pose.max(-1) > 0])
    assert np.abs((hues[:, None] - POSE_HUES + 0.5) % 1 - 0.5).min(1).max() < 0.02


def test_keypoints_lie_on_the_person():
    for person in persons(10):
        worn = toy.draw_person(person, replace(GREY_KNIT, sleeve="sleeveless"))
        parse, (x, y) = array(worn["parse"]), worn["keypoints"][:, :2].astype(int).T
        labels = parse[y, x]
        assert labels[0] == labels[15] == labels[16] == 13
        assert (labels[[3, 4]] == 15).all() and (labels[[6, 7]] == 14).all()  # right elbow, wrist; left ones
        assert labels[22] == 18 + 1 and labels[19] == 18  # big toes
        assert x[4] < x[7] and x[9] < x[12]  # the person's right is left in the picture


def test_second_colours_differ_clearly_from_the_first():
    for first, seconds in toy.SECOND.items():
        assert first not in seconds and len(seconds) >= 5
        for second in seconds:
            assert np.linalg.norm(toy.lab(toy.PALETTE[first]) - toy.lab(toy.PALETTE[second])) >= 48


def test_splits_own_whole_combinations_in_the_promised_shares():
    tops = product(
        *(toy.ATTRIBUTES[n] for n in ("category", "colour", "pattern", "sleeve", "neckline")), range(3)
    )
    owners = Counter()
    for category, colour, pattern, sleeve, neckline, i in tops:
        length = (toy.DRESS_LENGTHS if category == "dress" else toy.TOP_LENGTHS)[i]
        g = toy.Garment(category, colour, "black", pattern, sleeve, neckline, length)
        owners[toy.split_of(g)] += 1
        assert toy.split_of(g) == toy.split_of(replace(g, second="white"))
    shares = {split: owners[split] / sum(owners.values()) for split in toy.SPLITS}
    assert shares == pytest.approx({"train": 0.85, "val": 0.05, "test": 0.10}, abs=0.01)


def test_no_combination_of_val_or_test_is_written_to_train(world):
    seen = {split: {combination(row) for row in rows(world, split)} for split in toy.SPLITS}
    for split in toy.SPLITS:
        assert {toy.split_of(toy.Garment(**row["garment"])) for row in rows(world, split)} == {split}
    assert not seen["train"] & (seen["val"] | seen["test"]) and not seen["val"] & seen["test"]


def test_the_true_answer_is_the_same_person_in_the_paired_cloth(world):
    by_id = {row["id"]: row for row in rows(world, "test")}
    pairs = [line.split() for line in (world / "vitonhd/test_pairs.txt").read_text().splitlines()]
    assert sorted(p for p, _ in pairs) == sorted(c for _, c in pairs)
    for person, cloth in ([Path(name).stem for name in pair] for pair in pairs):
        assert person != cloth
        drawn = toy.draw_person(person_of(by_id[person]), toy.Garment(**by_id[cloth]["garment"]))
        truth = Image.open(world / f"vitonhd/test/truth/{person}_{cloth}.png")
        assert np.array_equal(array(truth), array(drawn["image"]))
        garment = Image.open(world / f"vitonhd/test/truth-mask/{person}_{cloth}.png")
        assert np.array_equal(array(garment), array(drawn["garment"]))


@pytest.mark.slow
def test_the_same_settings_give_the_same_bytes_whatever_the_processes(tmp_path):
    one, two, other = (
        contents(toy.ensure(tmp_path / name, **FEW, workers=workers, seed=seed))
        for name, workers, seed in (("one", 1, 0), ("two", 2, 0), ("other", 2, 1))
    )
    assert one == two != other


def test_a_complete_world_is_reused_and_another_is_refused(world):
    before = {path: path.stat().st_mtime_ns for path in world.rglob("*")}
    toy.ensure(world, **SMALL)
    assert before == {path: path.stat().st_mtime_ns for path in world.rglob("*")}
    with pytest.raises(UserError, match="other settings"):
        toy.ensure(world, **{**SMALL, "seed": 5})


def test_a_seed_below_zero_is_refused_and_leaves_nothing(tmp_path):
    with pytest.raises(UserError, match="--seed is -1"):
        toy.ensure(tmp_path / "world", **SMALL, seed=-1)
    assert not list(tmp_path.iterdir())


def test_a_foreign_folder_is_refused_and_untouched(tmp_path):
    (tmp_path / "holiday.txt").write_text("mine")
    with pytest.raises(UserError, match="not a ToyFashion folder"):
        toy.ensure(tmp_path, **SMALL)
    assert [path.name for path in tmp_path.iterdir()] == ["holiday.txt"]


@pytest.mark.slow
def test_of_two_that_draw_the_same_world_the_faster_one_is_taken(tmp_path, monkeypatch):
    """As the processes of torchrun do at first use."""
    writes, settings = toy.write_tables, FEW

    def slower(*args: object) -> None:
        monkeypatch.setattr(toy, "write_tables", writes)
        with monkeypatch.context() as patch:
            patch.setattr(toy.os, "getpid", lambda: 1)
            toy.ensure(tmp_path / "toy", **settings)
        writes(*args)

    monkeypatch.setattr(toy, "write_tables", slower)
    assert toy.ensure(tmp_path / "toy", **settings) == tmp_path / "toy"
    assert [path.name for path in tmp_path.iterdir()] == ["toy"] and (tmp_path / "toy/toy.json").is_file()


def test_a_full_disk_is_one_line(tmp_path, monkeypatch, capsys):
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(toy, "write_tables", full)
    monkeypatch.setattr(
        sys, "argv", ["toy", "--out", str(tmp_path / "toy"), "--train", "1", "--val", "0", "--test", "0"]
    )
    with pytest.raises(SystemExit) as left:
        toy.main()
    told = capsys.readouterr().err.splitlines()
    assert left.value.code == 2 and told[-1] == "unifashion.data.toy: [Errno 28] No space left on device"
    assert list(tmp_path.iterdir()) == []


def test_an_interrupted_drawing_leaves_no_folder(tmp_path, monkeypatch):
    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(toy, "write_tables", stop)
    with pytest.raises(KeyboardInterrupt):
        toy.ensure(tmp_path / "toy", train=1, val=0, test=0, quiet=True)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_a_drawing_that_is_told_to_end_leaves_no_folder(tmp_path):
    command = [sys.executable, "-m", "unifashion.data.toy", "--out", str(tmp_path / "toy"), "--quiet"]
    drawing = subprocess.Popen(command, stderr=subprocess.PIPE)
    while not (found := list(tmp_path.glob("*/*/*/*/*.jpg"))) and drawing.poll() is None:
        time.sleep(0.1)
    drawing.terminate()
    _, told = drawing.communicate(timeout=300)
    assert found and drawing.returncode == 143 and told == b""
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["fashiongen", "fashioniq"])
def test_the_parts_show_in_val_and_test_the_worlds_garments_with_the_truth_in_words(world, name):
    shown = READ[name](world)
    for split in ("val", "test"):
        assert len(shown[split]) == len(rows(world, split))
        for i, (row, (_, text, views)) in enumerate(zip(rows(world, split), shown[split], strict=True)):
            assert named(text, STYLES[name]) == truth(row)
            check_views(views, toy.Garment(**row["garment"]), i)


@pytest.mark.parametrize(("name", "times"), [("fashiongen", 2), ("fashioniq", 4)])
def test_the_parts_have_in_train_garments_of_their_own_that_belong_to_train(world, name, times):
    shown = READ[name](world)["train"]
    assert len(shown) == times * SMALL["train"]
    own = [garment_said(text, STYLES[name]) for _, text, _ in shown]
    held = {combination(row) for split in ("val", "test") for row in rows(world, split)}
    for i, (g, (_, _, views)) in enumerate(zip(own, shown, strict=True)):
        assert toy.split_of(g) == "train" and looks(g) not in held
        check_views(views, g, i)
    assert len(set(map(looks, own))) > 0.9 * len(own)
    worlds = [combination(row) for row in rows(world, "train")]
    assert not any(looks(g) == w for g, w in zip(own, worlds, strict=False))


def test_the_parts_differ_from_one_another_in_train(world):
    pytest.importorskip("h5py")
    gen, iq = ([garment_said(text, STYLES[n]) for _, text, _ in READ[n](world)["train"]] for n in READ)
    assert not any(looks(a) == looks(b) for a, b in zip(gen, iq, strict=False))


@pytest.mark.parametrize("name", ["fashiongen", "fashioniq"])
def test_ids_of_the_parts_are_running_numbers_over_the_splits(world, name):
    ids = [number for shown in READ[name](world).values() for number, _, _ in shown]
    first = {"fashiongen": 90_000_000, "fashioniq": 0}[name]
    assert ids == list(range(first, first + len(ids)))


def test_fashiongen_has_the_columns_of_the_original(world):
    h5py = pytest.importorskip("h5py")
    for split, n in (("train", 24), ("validation", 4), ("test", 8)):
        with h5py.File(world / f"fashiongen/fashiongen_256_256_{split}.h5") as file:
            table = {key: file[key][()] for key in file}
        assert set(table) == FASHIONGEN_KEYS
        pictures = table.pop("input_image")
        assert pictures.shape == (3 * n, 128, 128, 3) and pictures.dtype == np.uint8
        assert {column.shape for column in table.values()} == {(3 * n, 1)}
        assert all(text.isupper() for (text,) in table["input_category"].astype(str))
        assert table["input_pose"][:, 0].tolist() == [b"id_gridfs_1", b"id_gridfs_2", b"id_gridfs_3"] * n


def test_fashioniq_lists_every_picture_once_under_the_kind_of_its_garment(world):
    folder, seen = world / "fashioniq", []
    for split, kind in product(toy.SPLITS, ("dress", "shirt", "toptee")):
        items = json.loads((folder / f"next_llava.{split}.{kind}.caption.json").read_text())
        names = json.loads((folder / f"image_splits/split.{kind}.{split}.json").read_text())
        assert [item["image"] for item in items] == names
        for item in items:
            (category,) = named(item["caption"], "fashioniq-cap")["category"]
            assert kind == (category if category in ("dress", "shirt") else "toptee")
            assert item["text_guidance"] == "" and item["caption"][0] == "\n"
        seen += [f"{name}.png" for name in names]
    assert len(set(seen)) == len(seen)
    assert sorted(seen) == sorted(path.name for path in (folder / "images").iterdir())


def test_triplets_compare_garments_of_a_kind_and_split_and_say_what_differs(world):
    folder, shown = world / "fashioniq", READ["fashioniq"](world)
    for split in toy.SPLITS:
        worn = {f"B0{number:08d}": garment_said(text, "fashioniq-cap") for number, text, _ in shown[split]}
        if split != "train":  # the texts say no second colour of plain garments: nobody sees it
            assert len(worn) == len(rows(world, split))
        targets = []
        for kind in ("dress", "shirt", "toptee"):
            pool = json.loads((folder / f"image_splits/split.{kind}.{split}.json").read_text())
            for row in json.loads((folder / f"captions/cap.{kind}.{split}.json").read_text()):
                assert {row["target"], row["candidate"]} <= set(pool)
                target, reference = worn[row["target"]], worn[row["candidate"]]
                said, before = changes(joined(row["captions"]))
                assert set(said) == set(differences(reference, target)) and all(row["captions"])
                assert all(values == {getattr(target, name)} for name, values in said.items())
                assert all(values == {getattr(reference, name)} for name, values in before.items())
                targets.append(row["target"])
            if len(pool) > 2:  # everybody's turn to be a target, unless it is alone or has only twins
                assert set(pool) <= set(targets)
        assert len(set(targets)) == len(targets)


def test_a_reference_looks_much_like_its_target_in_large_splits_and_in_small_ones():
    differing = {}
    for split, n in (("train", 1500), ("test", 600)):
        rng = np.random.default_rng(n)
        some = [toy.sample_garment(rng) for _ in range(n)]
        found = shops.references(0, split, some)
        assert len(found) == n and not any(i == j for i, j in enumerate(found))
        assert all(shops.kind_of(some[i]) == shops.kind_of(some[j]) for i, j in enumerate(found))
        counts = [len(differences(some[j], some[i])) for i, j in enumerate(found)]
        differing[split] = np.bincount(counts, minlength=8)[:8] / n
        assert min(counts) >= 1 and 0.1 < differing[split][1] < shops.ONE_CHANGE + 0.05
        assert differing[split][3:].sum() < 0.1  # more changes would let the text alone find the target
        assert len(set(found)) > n / 3
    assert np.abs(differing["train"] - differing["test"]).max() < 0.1
    assert shops.references(0, "test", some) == found != shops.references(1, "test", some)


def test_training_has_a_limited_number_of_triplets(monkeypatch):
    monkeypatch.setattr(shops, "TRIPLETS", 5)
    some = garments(30)
    assert len(shops.references(0, "train", some)) == 5 and len(shops.references(0, "val", some)) == 30
    twins = [replace(some[0], pattern="plain", second=second) for second in ("white", "red")]
    assert shops.references(0, "val", twins) == [None, None] and shops.references(0, "val", []) == []


def test_a_world_with_fashioniq_but_without_triplets_gets_them_and_nothing_else(world, tmp_path):
    old = Path(shutil.copytree(world / "fashioniq", tmp_path / "old/fashioniq")).parent
    for path in [world / "toy.json", *world.glob("attributes_*")]:
        shutil.copy(path, old)
    before = contents(world / "fashioniq")
    times = {path: path.stat().st_mtime_ns for path in old.rglob("*.png")}
    shutil.rmtree(old / "fashioniq/captions")
    assert toy.part(old, "fashioniq", quiet=True) == old / "fashioniq"
    assert contents(old / "fashioniq") == before
    assert times == {path: path.stat().st_mtime_ns for path in old.rglob("*.png")}
    toy.part(old, "fashioniq", quiet=True)
    assert contents(old / "fashioniq") == before


@pytest.mark.slow
@pytest.mark.parametrize("add", [lambda root: toy.ensure(root, **SMALL), add_all], ids=["ensure", "part"])
def test_a_world_from_before_gets_the_new_folders_and_keeps_its_bytes(world, tmp_path, add):
    pytest.importorskip("h5py")
    old = copy_without_parts(world, tmp_path)
    before = {path: path.stat().st_mtime_ns for path in old.rglob("*") if path.is_file()}
    add(old)
    assert contents(old) == contents(world)
    assert all(path.stat().st_mtime_ns == time for path, time in before.items())


@pytest.mark.slow
def test_without_h5py_only_fashiongen_is_left_out_and_a_note_says_how_to_get_it(
    world, tmp_path, monkeypatch, capsys
):
    pytest.importorskip("h5py")
    with monkeypatch.context() as gone:
        gone.setitem(sys.modules, "h5py", None)
        made = toy.ensure(tmp_path / "toy", **SMALL)
        assert capsys.readouterr().err == (
            "ToyFashion without fashiongen/: FashionGen is in HDF5, which needs h5py: pip install h5py\n"
        )
        with pytest.raises(UserError, match="pip install h5py"):
            toy.part(made, "fashiongen")
        assert capsys.readouterr().err == ""
        assert sorted(contents(made)) == [
            p for p in sorted(contents(world)) if not p.startswith("fashiongen")
        ]
    toy.ensure(made, **SMALL)
    assert contents(made) == contents(world) and capsys.readouterr().err == ""


@pytest.mark.parametrize("where", ["drawing", "writing"])
@pytest.mark.parametrize("name", ["fashiongen", "fashioniq"])
def test_an_interrupted_part_leaves_nothing_and_is_drawn_again(world, tmp_path, monkeypatch, name, where):
    pytest.importorskip("h5py")
    old = copy_without_parts(world, tmp_path)
    before, draw_product = contents(old), toy.draw_product
    last = toy.Garment(**rows(world, "test")[-1]["garment"])

    def stop_drawing(g: toy.Garment, *args):
        if g == last:
            raise KeyboardInterrupt
        return draw_product(g, *args)

    class StopWriting(toy.tqdm):
        def update(self, n: int = 1) -> None:
            self.taken = getattr(self, "taken", 0) + n
            if self.taken > 30:
                raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        if where == "drawing":  # in a worker, which has the patch by its fork
            patch.setattr(shops, "draw_product", stop_drawing)
        else:
            patch.setattr(shops, "tqdm", StopWriting)
        with pytest.raises(KeyboardInterrupt):
            toy.part(old, name, quiet=True)
    assert contents(old) == before and not list(old.glob("fashion*part*"))
    toy.part(old, name, quiet=True)
    assert contents(old).items() <= contents(world).items() and (old / name).is_dir()


def test_what_stops_a_part_does_not_wait_for_the_pictures_it_asked_for(world, tmp_path, monkeypatch):
    old, drawn = copy_without_parts(world, tmp_path), multiprocessing.Value("i", 0)

    def slow(g: toy.Garment, view: int, size: list[int]) -> dict:
        with drawn:
            drawn.value += 1
        time.sleep(0.005)
        return {"image": Image.new("RGB", size[::-1])}

    def full(*_: object) -> None:
        raise OSError("no space left")

    monkeypatch.setattr(shops, "draw_product", slow)
    monkeypatch.setattr(Image.Image, "save", full)
    monkeypatch.setitem(shops.OWN, "fashioniq", (6, 100))
    with pytest.raises(UserError, match="fashioniq cannot be made: no space left"):
        toy.part(old, "fashioniq", quiet=True)
    assert 1 <= drawn.value < 900  # of 1024 that were asked for: a few chunks were under way
    assert not list(old.glob("fashioniq*")) and not multiprocessing.active_children()


def test_pictures_are_asked_for_a_slab_at_a_time_and_come_in_order(monkeypatch):
    asked, views = [], [(g, i % 3, (128, 96)) for i, g in enumerate(garments(7))]
    monkeypatch.setattr(shops, "SLAB", 3)
    with ThreadPoolExecutor(2) as pool:
        pictures = shops.drawn(pool, shops.square, (asked.append(view) or view for view in views))
        for i, picture in enumerate(pictures):
            assert len(asked) == min(7, i // 3 * 3 + 3)
            assert picture.tobytes() == shops.square(views[i]).tobytes()
    assert asked == views


def test_a_killed_drawing_leaves_nothing_under_the_final_name(world, tmp_path):
    old = copy_without_parts(world, tmp_path)
    program = (
        "import os, sys\n"
        "from PIL import Image\n"
        "from unifashion.data import toy\n"
        "Image.Image.save = lambda *_: os.kill(0, 9)\n"  # the process group: drawing processes too
        "toy.part(sys.argv[1], 'fashioniq', quiet=True)\n"
    )
    ran = subprocess.run([sys.executable, "-c", program, old], cwd=ROOT, start_new_session=True)
    assert ran.returncode == -9 and not (old / "fashioniq").exists()
    toy.part(old, "fashioniq", quiet=True)
    made, wanted = contents(old / "fashioniq"), contents(world / "fashioniq")
    assert made == wanted


def test_a_part_that_is_not_drawn_here_is_left_to_its_reader(tmp_path):
    assert toy.part(tmp_path, "fashion200k") == tmp_path / "fashion200k"


def test_a_world_whose_truth_is_cut_short_is_one_line(world, tmp_path):
    old = copy_without_parts(world, tmp_path)
    (old / "toy.json").write_text('{"version": 1, "se')
    with pytest.raises(UserError, match=r"fashioniq cannot be made: [^\n]+$"):
        toy.part(old, "fashioniq", quiet=True)


def test_a_part_wants_a_world_and_names_what_stops_it(world, tmp_path):
    with pytest.raises(UserError, match="holds no ToyFashion"):
        toy.part(tmp_path, "fashioniq")
    old = copy_without_parts(world, tmp_path)
    (old / "attributes_val.jsonl").unlink()
    with pytest.raises(UserError, match="fashioniq cannot be made: .*attributes_val.jsonl"):
        toy.part(old, "fashioniq", quiet=True)
    assert not list(old.glob("fashioniq*"))


@pytest.mark.parametrize("write", [toy.caption, lambda g, rng: ", ".join(toy.chunks(g, rng))])
def test_texts_say_colour_pattern_and_category_always_and_the_rest_mostly(write):
    rng, said, n = np.random.default_rng(0), Counter(), 1500
    for g in garments(n, 3):
        text = write(g, rng)
        assert g.colour in text and any(word in text for word in CATEGORY_WORDS[g.category]), text
        if g.pattern != "plain":
            words = [word.removeprefix("a ") for group in PATTERN_WORDS[g.pattern] for word in group]
            assert g.second in text and any(word in text for word in words), text
        said["sleeve"] += any(word in text for group in SLEEVE_WORDS[g.sleeve] for word in group)
        said["neckline"] += any(word in text for group in NECK_WORDS[g.neckline] for word in group)
        said["length"] += any(f"{word} " in text.replace("long-sl", "") for word in LENGTH_WORDS[g.length])
    assert {name: count / n for name, count in said.items()} == pytest.approx(
        {"sleeve": 0.8, "neckline": 0.8, "length": 0.8}, abs=0.04
    )


def test_version_1_stays_as_it_is():
    # numbers are published on version 1: whoever changes these must raise VERSION
    g, person = toy.item(0, 1.0, "test", 3)
    assert toy.VERSION == 1
    assert asdict(g) == GARMENT_3
    assert person.arms == ARMS_3
    thumbnail = toy.draw_person(person, g)["image"].resize((3, 4), Image.Resampling.BOX)
    assert np.abs(array(thumbnail).astype(int)[..., 1] - THUMBNAIL_3).max() <= 1
    flat = toy.draw_product(g)["image"].resize((3, 4), Image.Resampling.BOX)
    assert np.abs(array(flat).astype(int)[..., 1] - FLAT_3).max() <= 1
    rng = np.random.default_rng(0)
    some = [toy.sample_garment(rng) for _ in range(300)]
    said = "\n".join(", ".join([caption(g, rng), *chunks(g, rng)]) for g in some)
    assert hashlib.sha256(said.encode()).hexdigest()[:16] == "188dcf2bb43d4d2e"


# Test item 3 of seed 0, and the green channel of its pictures at 3x4 pixels.
GARMENT_3 = {
    "category": "t-shirt",
    "colour": "grey",
    "second": "yellow",
    "pattern": "striped",
    "sleeve": "sleeveless",
    "neckline": "v",
    "length": "cropped",
}
ARMS_3 = ((41.756, -48.391), (10.622, 0.439))
THUMBNAIL_3 = [[238, 183, 230], [196, 122, 229], [230, 90, 211], [192, 108, 176]]
FLAT_3 = [[238, 228, 236], [242, 187, 238], [239, 240, 236], [233, 234, 231]]


FASHIONGEN_KEYS = {"index", "index_2"} | {
    f"input_{key}"
    for key in (
        "brand", "category", "composition", "concat_description", "department", "description", "gender", "image",
        "msrpUSD", "name", "pose", "productID", "season", "subcategory",
    )
}  # fmt: skip


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    return toy.ensure(tmp_path_factory.mktemp("toy") / "world", **SMALL)


def array(image: Image.Image) -> np.ndarray:
    return np.asarray(image)


def garments(n: int, seed: int = 0) -> list[toy.Garment]:
    rng = np.random.default_rng(seed)
    return [toy.sample_garment(rng) for _ in range(n)]


def extreme_garments() -> list[toy.Garment]:
    """The longest and widest of each category, in every neckline and sleeve."""
    return [
        toy.Garment(
            category, "red", "white", "dotted", sleeve, neckline, "maxi" if category == "dress" else "long"
        )
        for category in toy.ATTRIBUTES["category"]
        for sleeve, neckline in zip(toy.ATTRIBUTES["sleeve"], toy.ATTRIBUTES["neckline"], strict=True)
    ]


def persons(n: int, difficulty: float = 1.0) -> list[toy.Person]:
    rng = np.random.default_rng(11)
    return [toy.sample_person(rng, difficulty) for _ in range(n)]


def person_of(row: dict) -> toy.Person:
    fields = {k: tuple(v) if isinstance(v, list) else v for k, v in row["person"].items()}
    return toy.Person(**fields)


def torso_points() -> np.ndarray:
    u, v = np.meshgrid(np.arange(-9, 9.1, 1.0), np.arange(11, 36, 1.0))
    return np.stack([u.ravel(), v.ravel()], 1)


def colours_at(picture: np.ndarray, body: Body, points: np.ndarray) -> np.ndarray:
    """Colours of body points, bilinear, from a 128x96 picture."""
    x, y = (apply(body.torso, points) - 0.5).T
    i, j = np.floor(y).astype(int), np.floor(x).astype(int)
    a, b = (y - i)[:, None], (x - j)[:, None]
    upper = picture[i, j] * (1 - b) + picture[i, j + 1] * b
    return upper * (1 - a) + (picture[i + 1, j] * (1 - b) + picture[i + 1, j + 1] * b) * a


def nearest_of(colours: np.ndarray, names: tuple[str, ...]) -> np.ndarray:
    table = np.array([toy.PALETTE[name] for name in names])
    return np.linalg.norm(colours[:, None] - table, axis=-1).argmin(1)


def hsv(rgb: np.ndarray) -> np.ndarray:
    """(3,n) hue, saturation, value in [0,1] of colours (n,3) in [0,1]."""
    high, low = rgb.max(1), rgb.min(1)
    r, g, b = rgb.T
    spread = np.where(high > low, high - low, 1)
    sector = np.where(
        high == r, (g - b) / spread % 6, np.where(high == g, (b - r) / spread + 2, (r - g) / spread + 4)
    )
    return np.stack([sector / 6, (high - low) / high, high])


def grow(mask: np.ndarray, steps: int) -> np.ndarray:
    for _ in range(steps):
        padded = np.pad(mask, 1)
        mask = mask | padded[:-2, 1:-1] | padded[2:, 1:-1] | padded[1:-1, :-2] | padded[1:-1, 2:]
    return mask


def rows(world: Path, split: str) -> list[dict]:
    return [json.loads(line) for line in (world / f"attributes_{split}.jsonl").read_text().splitlines()]


def combination(row: dict) -> tuple:
    return tuple(row["garment"][name] for name in toy.COMBINATION)


def contents(root: Path) -> dict[str, bytes]:
    return {
        path.relative_to(root).as_posix(): path.read_bytes() for path in root.rglob("*") if path.is_file()
    }


def truth(row: dict) -> dict[str, set[str]]:
    values = {name: {value} for name, value in row["garment"].items()}
    return values | ({"second": set()} if row["garment"]["pattern"] == "plain" else {})


Shown = dict[
    str, list[tuple[int, str, list[np.ndarray]]]
]  # split -> (number, text, pictures) of each garment


def read_fashiongen(world: Path) -> Shown:
    h5py = pytest.importorskip("h5py")
    shown: Shown = {}
    for split, name in zip(toy.SPLITS, ("train", "validation", "test"), strict=True):
        with h5py.File(world / f"fashiongen/fashiongen_256_256_{name}.h5") as file:
            ids, titles, texts, pictures = (
                file[f"input_{key}"][()] for key in ("productID", "name", "description", "image")
            )
        said = [f"{a.decode()}. {b.decode()}" for a, b in zip(titles[:, 0], texts[:, 0], strict=True)]
        assert (ids.reshape(-1, 3) == ids[::3]).all() and said == [
            text for text in said[::3] for _ in range(3)
        ]
        shown[split] = [(int(ids[i, 0]), said[i], list(pictures[i : i + 3])) for i in range(0, len(said), 3)]
    return shown


def read_fashioniq(world: Path) -> Shown:
    folder, shown = world / "fashioniq", {}
    for split in toy.SPLITS:
        files = (folder / f"next_llava.{split}.{kind}.caption.json" for kind in ("dress", "shirt", "toptee"))
        items = sorted(
            (item["image"], item["caption"]) for file in files for item in json.loads(file.read_text())
        )
        assert all(name == f"B0{int(name[2:]):08d}" for name, _ in items)
        shown[split] = [
            (int(name[2:]), text, [array(Image.open(folder / f"images/{name}.png"))]) for name, text in items
        ]
    return shown


READ = {"fashiongen": read_fashiongen, "fashioniq": read_fashioniq}
STYLES = {"fashiongen": "fashiongen", "fashioniq": "fashioniq-cap"}


def check_views(views: list[np.ndarray], g: toy.Garment, index: int) -> None:
    """All three views, or the one whose turn it is, on a white square."""
    for i, view in enumerate(views):
        shot = array(toy.draw_product(g, i if len(views) == 3 else index % 3)["image"])
        assert view.shape == (128, 128, 3) and np.array_equal(view[:, 16:-16], shot)
        assert (view[:, :16] == 255).all() and (view[:, -16:] == 255).all()


def garment_said(text: str, style: str) -> toy.Garment:
    """The garment of a text that names every attribute once; no one sees the second colour of a plain one."""
    said = named(text, style)
    if said["pattern"] == {"plain"}:
        said["second"] = {"black"}
    assert all(len(values) == 1 for values in said.values()), text
    return toy.Garment(**{name: value for name, (value,) in said.items()})


def looks(g: toy.Garment) -> tuple:
    return tuple(getattr(g, name) for name in toy.COMBINATION)


def copy_without_parts(world: Path, folder: Path) -> Path:
    ignore = shutil.ignore_patterns("fashiongen", "fashioniq", "dresscode")
    return Path(shutil.copytree(world, folder / "old", ignore=ignore))
