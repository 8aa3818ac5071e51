"""The record of what a model was trained on: what is in it, and that it goes with the weights wherever they go."""

import shutil
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from tests.small_runs import assert_same, learned, run
from unifashion import UserError, seen
from unifashion.data import toy
from unifashion.data.fashion200k import Fashion200K
from unifashion.data.fashiongen import FashionGen
from unifashion.data.fashioniq import FashionIQ, FashionIQCap
from unifashion.data.mgd import MGD
from unifashion.data.readers import in_toy, open_mgd
from unifashion.data.toy import Garment
from unifashion.data.vitonhd import VITONHD
from unifashion.seen import HELD_OUT, UNKNOWN, Record, hashes, items, read_record, record, remember, world_of
from weights.load import load_unifashion
from weights.tiny import pretrain

pytestmark = pytest.mark.usefixtures("one_thread")
FILE = "model.safetensors"


# What is in it


def test_items_are_what_the_samples_show(made, tmp_path):
    world = made / "toy"
    iq = FashionIQ(in_toy(world, "fashioniq"), "train")
    shown = {name for i in range(len(iq)) for name in (iq[i]["reference_id"], iq[i]["target_id"])}
    assert items(iq) == ("fashioniq", list(dict.fromkeys(items(iq)[1]))) and set(items(iq)[1]) == shown
    for reader, folder, namespace in (
        (FashionIQCap, "fashioniq-cap", "fashioniq"),
        (FashionGen, "fashiongen", "fashiongen"),
        (Fashion200K, "fashion200k", "fashion200k"),
    ):
        data = reader(in_toy(world, folder), "train")
        assert items(data) == (namespace, list(dict.fromkeys(data[i]["product"] for i in range(len(data)))))
    for data in (VITONHD(world / "vitonhd", "test", False), MGD(world / "vitonhd", "test", False)):
        every = {x for i in range(len(data)) for x in (data[i]["person_id"], data[i]["cloth_id"])}
        assert items(data)[0] == "vitonhd" and set(items(data)[1]) == every
    assert items(open_mgd(world / "dresscode", "train"))[0] == "dresscode"


def test_of_toyfashion_combinations_count_and_all_that_train_may_have(made, tmp_path):
    world = made / "toy"
    every = [FashionGen(world / "fashiongen"), FashionIQ(world / "fashioniq"), MGD(world / "vitonhd")]
    found = record(every)
    assert set(found) == {"seen.toy", f"chosen.{HELD_OUT}"}
    known = Record({"toy": found["seen.toy"]}, (), True)
    for split in ("train", "val", "test"):
        drawn_ = [seen.combination(Garment(**row["garment"])) for row in toy.read_rows(world, split)]
        assert known.has("toy", drawn_).tolist() == [split == "train"] * len(drawn_)
    assert 0.8 < len(found["seen.toy"]) / (5 * 12 * 6 * 3 * 3 * 3) < 0.9
    other = Path(
        shutil.copytree(world, tmp_path / "other", ignore=shutil.ignore_patterns("images", "*.jpeg"))
    )
    (other / "attributes_train.jsonl").write_text((other / "attributes_test.jsonl").read_text())
    more = record([FashionGen(other / "fashiongen")])["seen.toy"]  # whose train has what is test's
    assert len(more) > len(found["seen.toy"])


def test_a_folder_is_a_worlds_also_where_only_its_pictures_are(made, tmp_path, monkeypatch):
    world = (made / "toy").resolve()
    monkeypatch.chdir(world / "fashioniq")
    (tmp_path / "ours").mkdir()
    (tmp_path / "ours/images").symlink_to(world / "fashioniq/images")
    (tmp_path / "link").symlink_to(world / "fashiongen")
    for folder in (world / "vitonhd", tmp_path / "link", tmp_path / "ours", Path(), "."):
        assert world_of(folder) == world
    assert world_of(tmp_path) is None and world_of(world) is None


def test_elsewhere_ids_count_each_once(made, tmp_path):
    folder = Path(shutil.copytree(made / "toy/fashioniq", tmp_path / "fashioniq"))
    iq, cap = FashionIQ(folder), FashionIQCap(folder)
    found = record([iq, cap])
    assert set(found) == {"seen.fashioniq", f"chosen.{HELD_OUT}"}
    ids = set(items(iq)[1]) | set(items(cap)[1])
    assert len(found["seen.fashioniq"]) == len(ids) and (found["seen.fashioniq"].diff() > 0).all()
    known = Record({"fashioniq": found["seen.fashioniq"]}, (), True)
    assert known.has("fashioniq", [*ids]).all() and not known.has("fashioniq", ["B0", ""]).any()
    assert not known.has("fashiongen", [*ids]).any() and known.has("fashiongen", []).tolist() == []


def test_hashes_are_int64_and_differ():
    names = [f"B{i:09d}" for i in range(20_000)]
    h = hashes(names)
    assert h.dtype == torch.int64 and len(h.unique()) == len(names) and torch.equal(h, hashes(names))
    assert (h < 0).any() and hashes([]).dtype == torch.int64


def test_what_is_learned_later_is_added_and_an_unknown_past_stays_unknown(made, tmp_path):
    folder = Path(shutil.copytree(made / "toy/fashioniq", tmp_path / "fashioniq"))
    old = {
        "seen.fashioniq": hashes(["x"]),
        "unet.a": torch.ones(1),
        UNKNOWN: seen.nothing(),
        "chosen.y": seen.nothing(),
    }
    new = remember(old, [FashionIQ(folder), FashionGen(made / "toy/fashiongen")])
    assert new.keys() == {*old, "seen.toy", f"chosen.{HELD_OUT}"} and new["unet.a"] is old["unet.a"]
    assert torch.isin(hashes(["x"]), new["seen.fashioniq"]).all() and len(new["seen.fashioniq"]) > 10
    again = remember(new, [FashionIQ(folder), FashionGen(made / "toy/fashiongen")])
    assert_same({k: v for k, v in new.items()}, again)


# Where it goes


def test_it_goes_from_run_to_run_and_into_the_shipped_file(place, monkeypatch):
    """From phase 1 through --init, --resume and `ship`; what phase 1 alone has seen is in it at the end, too."""
    folder = Path(shutil.copytree(place / "toy/fashioniq", place / "real"))
    only = ["--data", f"fashioniq-cap={folder}"]  # said last, it counts: not toy
    run("1 align", place, "first", 1, *only)
    first = read_record(place / "first/last" / FILE)
    assert first.whole and first.chosen == (HELD_OUT,) and set(first.seen) == {"fashioniq"}
    assert_same(raw(place / "first", "best"), raw(place / "first"))

    start = load_file(place / "phase1.safetensors")
    save_file(start | record_of(place / "first"), place / "all.safetensors")  # with all that phase 1 learns
    run("2 tryon", place, "second", 2, "--init", str(place / "all.safetensors"))
    second = read_record(place / "second/last" / FILE)
    assert second.whole and set(second.seen) == {"fashioniq", "toy"}
    assert torch.equal(second.seen["fashioniq"], first.seen["fashioniq"])
    run("2 tryon", place, "second", 2, "--resume", "--steps", "3")
    assert_same(record_of(place / "second"), record_of(place / "second", "best"))
    assert read_record(place / "second/last" / FILE).seen.keys() == second.seen.keys()

    weights = Path(shutil.copytree(place / "weights", place / "own"))
    monkeypatch.setattr(pretrain, "HERE", weights)
    pretrain.main(["ship", "--init", str(place / "second")])
    assert_same(
        record_of(place / "second", "best"),
        {k: v for k, v in load_file(weights / FILE).items() if seen.is_record(k)},
    )
    with_, without = load_unifashion("tiny", weights), Path(shutil.copytree(weights, place / "bare"))
    weights_alone, _ = seen.apart(load_file(weights / FILE), weights)
    save_file(weights_alone, without / FILE)
    assert_same(with_.state_dict(), load_unifashion("tiny", without).state_dict())


@pytest.mark.parametrize("what", ["1 align", "1 generate", "2 mixed"])
def test_every_stage_says_what_it_was_trained_on(what, place):
    run(what, place, "run", 4)
    found = read_record(place / "run/best" / FILE)
    assert set(found.seen) == {"toy"} and found.chosen == (HELD_OUT,)
    assert found.whole == (what == "1 align")  # the others start from a file without a record
    assert ("and what is not told" in found.told()) == (what != "1 align")


def test_a_run_from_before_there_were_records_stays_unknown(place):
    run("1 align", place, "old", 1)
    path = place / "old/last" / FILE
    save_file(learned(place / "old"), path)
    run("1 align", place, "old", 1, "--resume", "--steps", "2")
    assert not read_record(path).whole and set(read_record(path).seen) == {"toy"}


def test_a_file_without_a_record_says_so(place):
    found = read_record(place / "phase1.safetensors")
    assert found == Record({}, (), False) and found.told() == "nothing that it tells"


@pytest.mark.parametrize(
    ("name", "tensor"),
    [("seen.toy", torch.ones(3)), ("seen.toy", torch.ones(3, 2).long()), ("chosen.toy val", torch.ones(3).long())],
)  # fmt: skip
def test_a_record_that_is_none_is_refused_wherever_it_is_read(name, tensor, place):
    path = place / "odd.safetensors"
    save_file(load_file(place / "phase1.safetensors") | {name: tensor}, path)
    with pytest.raises(UserError, match=f"odd.safetensors: {name} is .*, no record of a training"):
        read_record(path)
    with pytest.raises(UserError, match="no record of a training"):
        run("1 generate", place, "run", 1, "--init", str(path))
    with pytest.raises(UserError, match="not a whole safetensors file"):
        path.write_bytes(path.read_bytes()[:100])
        read_record(path)


def test_only_a_record_is_let_through(place):
    """Loading is as strict as it was: a tensor of another name is refused."""
    for name in ("seen", "sane.toy", "chosen", "unseen.toy"):
        save_file(load_file(place / "phase1.safetensors") | {name: seen.nothing()}, place / "odd.safetensors")
        with pytest.raises(UserError, match=f"{name} is not a tensor of this preset's model"):
            run("1 generate", place, "run", 1, "--init", str(place / "odd.safetensors"))


def test_a_record_is_put_into_a_file_that_has_none_and_no_weight_changes(place, monkeypatch, capsys):
    monkeypatch.setattr(pretrain, "HERE", place)
    before, beside = load_file(place / "phase1.safetensors"), {"vit.safetensors": "0"}
    save_file(before, place / FILE, beside)
    pretrain.main(["record", "--data", str(place / "toy")])
    after, found = seen.apart(load_file(place / FILE), place)
    assert_same(before, after)
    assert read_record(place / FILE).whole
    assert set(found) == {"seen.toy", f"chosen.{HELD_OUT}", "chosen.toy test of seed 0"}
    with safe_open(place / FILE, "pt") as file:
        assert file.metadata() == beside
    assert "was trained on" in capsys.readouterr().out and not (place / "model.new").exists()
    once = (place / FILE).read_bytes()
    with pytest.raises(UserError, match=f"{FILE} says already what it was trained on: "):
        pretrain.main(["record", "--data", str(place / "toy")])
    assert (place / FILE).read_bytes() == once


# Helpers


def raw(folder: Path, which: str = "last") -> dict[str, torch.Tensor]:
    return load_file(folder / which / FILE)


def record_of(folder: Path, which: str = "last") -> dict[str, torch.Tensor]:
    return {k: v for k, v in raw(folder, which).items() if seen.is_record(k)}
