"""The leak guard: each kind of leak is planted and must be seen, and a clean evaluation must be called clean."""

import dataclasses
import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from eval import captioning, composed, gallery, generation, guard, leaks, pools, retrieval
from eval.guard import verdict
from eval.leaks import Leak
from eval.report import Fingerprint
from tests.rooms import SMALL, write_weights
from tests.worlds import world_of
from unifashion import UserError, seen
from unifashion.config import PRESETS
from unifashion.data import toy
from unifashion.data.fashiongen import FashionGen
from unifashion.data.fashioniq import FashionIQ, FashionIQCap
from unifashion.data.toy import Garment
from unifashion.seen import HELD_OUT, UNKNOWN, hashes

pytestmark = pytest.mark.usefixtures("one_thread")

CLEAN_TOY = {"seen.toy": hashes(["of train"]), f"chosen.{HELD_OUT}": seen.nothing()}
NO_LEAK = Leak(5000, 100, 0, 5, 9, 0.3, 1, 6, 0.5, 0, 0, ())


# The function


def test_where_nothing_speaks_against_it_an_evaluation_is_clean(tmp_path):
    model = write(tmp_path, {"seen.fashioniq": hashes(["a", "b"]), f"chosen.{HELD_OUT}": seen.nothing()})
    found = verdict(
        model, tmp_path, "fashioniq", ["c", "d"], "val", {"dress": NO_LEAK}, {"guidance": "toy val"}
    )
    assert str(found) == "clean"
    assert found.lines() == {"trained on": "2 of fashioniq", "verdict": "clean"}
    assert str(verdict(model, tmp_path, "fashiongen", ["a"], "val")) == "clean"  # an id of another data set


def test_an_item_that_training_has_seen_is_caught(tmp_path):
    model = write(tmp_path, {"seen.fashiongen": hashes(["a", "b"]), f"chosen.{HELD_OUT}": seen.nothing()})
    found = verdict(model, tmp_path, "fashiongen", ["x", "b", "y"], "val")
    assert str(found) == "NOT CLEAN: 1 of 3 items of fashiongen are in the training data"
    model = write(tmp_path, {"seen.fashioniq": hashes(["b"]), f"chosen.{HELD_OUT}": seen.nothing()})
    assert "Fashion-IQ itself shows 143 of val's targets" in str(
        verdict(model, tmp_path, "fashioniq", ["b"], "val")
    )


def test_captions_that_know_the_queries_are_caught(tmp_path):
    model = write(tmp_path, CLEAN_TOY)
    for reason in ("12 of 60 have a text_guidance", "by the query's text alone BM25 puts 60.5 % ..."):
        leaky = dataclasses.replace(NO_LEAK, reasons=(reason,))
        told = str(verdict(model, tmp_path, "fashioniq", [], "val", {"dress": leaky, "shirt": NO_LEAK}))
        assert told == f"NOT CLEAN: captions of dress were written with the queries' texts at hand: {reason}"
    few = dataclasses.replace(NO_LEAK, candidates=30)
    told = str(verdict(model, tmp_path, "fashioniq", [], "val", {"all": few}))
    assert told == "unknown: captions of all: too few to tell whether they leak"


def test_what_was_chosen_on_the_reported_split_is_caught(tmp_path):
    model = write(tmp_path, {"seen.fashioniq": hashes(["a"]), "chosen.fashioniq val": seen.nothing()})
    told = str(verdict(model, tmp_path, "fashioniq", ["b"], "val"))
    assert told == "NOT CLEAN: checkpoint was chosen on fashioniq val, which is what is reported"
    assert str(verdict(model, tmp_path, "fashiongen", ["b"], "val")) == "clean"  # it was chosen on another
    settings = {"guidance": "vitonhd test"}
    told = str(verdict(model, tmp_path, "vitonhd", ["b"], "test", settings=settings))
    assert told == "NOT CLEAN: guidance was chosen on vitonhd test, which is what is reported"
    assert str(verdict(model, tmp_path, "vitonhd", ["b"], "val", settings=settings)) == "clean"
    by_hand = guard.chosen_on("tiny", 4.5)  # on what, nobody knows
    told = str(verdict(model, tmp_path, "vitonhd", ["b"], "test", settings=by_hand))
    assert told == "unknown: guidance was given by hand, chosen on what is not told"


def test_what_is_not_recorded_is_unknown_and_what_is_known_is_told_all_the_same(tmp_path):
    told = str(verdict(write(tmp_path, {}), tmp_path, "fashioniq", ["a"], "val"))
    assert told == f"unknown: {guard.NO_RECORD}; {guard.NOT_CHOSEN}"
    part = {"seen.fashioniq": hashes(["a"]), UNKNOWN: seen.nothing(), f"chosen.{HELD_OUT}": seen.nothing()}
    model = write(tmp_path, part)
    assert str(verdict(model, tmp_path, "fashiongen", ["a"], "val")) == f"unknown: {guard.NOT_WHOLE}"
    told = str(verdict(model, tmp_path, "fashioniq", ["a", "b"], "val"))
    assert told.startswith("NOT CLEAN: 1 of 2 items") and told.endswith(f". unknown: {guard.NOT_WHOLE}")


def test_toyfashion_is_judged_by_its_combinations_whatever_its_ids(world, tmp_path):
    for record in (CLEAN_TOY, {f"chosen.{HELD_OUT}": seen.nothing()}):  # without one `toy.split_of` decides
        for folder in ("fashioniq", "fashiongen", "vitonhd"):
            assert (
                str(verdict(write(tmp_path, record), world / folder, "fashioniq", ["B000000000"], "test"))
                == "clean"
            )
    rows = toy.read_rows(world, "test")
    own = hashes([seen.combination(Garment(**rows[0]["garment"]))])
    with pytest.raises(UserError, match=r"^\d+ of 12 garments have a combination .* this is no test"):
        verdict(write(tmp_path, {"seen.toy": own}), world / "fashioniq", "fashioniq", [], "test")
    assert "unknown" in str(
        verdict(write(tmp_path, {"seen.toy": own}), world / "fashioniq", "fashioniq", [], "val")
    )


def test_what_was_chosen_on_a_split_of_one_toyfashion_was_chosen_on_that_of_every_other(world, tmp_path):
    """`toy.split_of` gives a combination to the same split of every world, so that another seed's garments are no others."""
    copy = tmp_path / "world"
    copy.mkdir()
    shutil.copy(world / "attributes_test.jsonl", copy)
    settings = json.loads((world / "toy.json").read_text())
    model = write(tmp_path, CLEAN_TOY | {"chosen.toy test of seed 3": seen.nothing()})
    for seed in (3, 4):
        (copy / "toy.json").write_text(json.dumps(settings | {"seed": seed}))
        told = str(verdict(model, copy / "vitonhd", "vitonhd", [], "test"))
        assert told == (
            "NOT CLEAN: checkpoint was chosen on toy test of seed 3, and what is reported has the same combinations of attributes"
        )
    shutil.copy(world / "attributes_val.jsonl", copy)
    assert str(verdict(model, copy / "vitonhd", "vitonhd", [], "val")) == "clean"


def test_of_pictures_that_were_there_the_model_is_unknown(tmp_path):
    told = str(verdict(None, tmp_path, "vitonhd", ["a"], "test", settings={"guidance": "toy val"}))
    assert told == f"unknown: {guard.NO_MODEL}"


# What it is told by, in each command


COMMANDS = {
    "retrieval": (retrieval, "toy"),
    "retrieval of FashionGen": (retrieval, "fashiongen"),
    "composed": (composed, "toy"),
    "composed of Fashion-IQ": (composed, "fashioniq"),
    "captioning": (captioning, "toy"),
    "generation": (generation, "toy"),
}


@pytest.mark.parametrize(
    "name", ["retrieval", "retrieval of FashionGen", "composed", "composed of Fashion-IQ"]
)
def test_every_report_carries_its_verdict_and_what_it_was_of(name, evaluate, weights, tmp_path):
    """Printed and in JSON; the same data have the same fingerprint."""
    put(weights, CLEAN_TOY)
    told, saved = evaluate(name)
    assert (
        told["verdict"] == saved["verdict"] == "clean"
        and told["trained on"] == saved["trained on"] == "1 of toy"
    )
    assert re.fullmatch("[0-9a-f]{64}", saved["data sha256"]) and told["data sha256"] == saved["data sha256"]
    assert {"command", "commit", "seed", "qformer sha256", "model sha256"} <= saved.keys()
    put(weights, {})
    again, _ = evaluate(name, "--seed", "1", "--batch-size", "7")
    assert again["verdict"].startswith(f"unknown: {guard.NOT_CHOSEN}")  # the order is the seed's in some
    if "of" in name:
        assert again["data sha256"] == saved["data sha256"]


@pytest.mark.parametrize("name", COMMANDS)
def test_garments_that_the_models_record_names_are_no_test(name, evaluate, weights, world):
    split = "val" if "of" in name else "test"
    rows = toy.read_rows(world, split)
    put(weights, {"seen.toy": hashes([seen.combination(Garment(**rows[3]["garment"]))])})
    with pytest.raises(
        UserError, match=r"of \d+ garments have a combination of attributes that the model's record names"
    ):
        evaluate(name)


def test_of_real_data_what_training_has_seen_is_told_in_the_report(
    evaluate, weights, world, tmp_path, monkeypatch
):
    """FashionGen's rows as if they were real: 3 of 30 products."""
    folder = Path(shutil.copytree(world / "fashiongen", tmp_path / "real"))
    data = FashionGen(folder, "validation")
    monkeypatch.setattr(gallery, "ROWS", len(data))
    put(weights, {"seen.fashiongen": hashes(data.products[:9]), f"chosen.{HELD_OUT}": seen.nothing()})
    told, saved = evaluate("retrieval of FashionGen", "--data", f"fashiongen={folder}")
    assert (
        saved["verdict"]
        == "NOT CLEAN: 3 of 30 items of fashiongen are in the training data"
        == told["verdict"]
    )
    put(weights, {"seen.fashiongen": hashes(["x"]), "chosen.fashiongen val": seen.nothing()})
    told, _ = evaluate("retrieval of FashionGen", "--data", f"fashiongen={folder}")
    assert told["verdict"] == "NOT CLEAN: checkpoint was chosen on fashiongen val, which is what is reported"


def test_of_fashioniq_queries_of_seen_targets_are_told_and_the_figures_without_them(
    evaluate, weights, world, tmp_path, monkeypatch
):
    monkeypatch.setattr(pools, "WHOLE", {})  # as if these were all
    folder = Path(shutil.copytree(world / "fashioniq", tmp_path / "real"))
    data = FashionIQ(folder, "val", pictures=False)
    known = [next(row.target for row in data.rows if row.category == c) for c in data.pools][1:]
    put(weights, {"seen.fashioniq": hashes(known), f"chosen.{HELD_OUT}": seen.nothing()})
    told, saved = evaluate("composed of Fashion-IQ", "--data", f"fashioniq={folder}")
    assert told["verdict"].startswith(
        "NOT CLEAN: 2 of 30 items of fashioniq are in the training data (Fashion-IQ itself"
    )
    assert told["queries of seen targets"] == "{'dress': 0, 'shirt': 1, 'toptee': 1}, says the model's record"
    assert list(saved["other pools"]) == ["VAL", "original, new targets alone", "VAL, new targets alone"]
    put(weights, {})  # then the train split at hand tells
    rows = json.loads((folder / "captions/cap.dress.train.json").read_text())
    pool = json.loads((folder / "image_splits/split.dress.train.json").read_text())
    (folder / "image_splits/split.dress.train.json").write_text(json.dumps([*pool, known[0]]))
    (folder / "captions/cap.dress.train.json").write_text(
        json.dumps([*rows, rows[0] | {"candidate": known[0]}])
    )
    told, _ = evaluate("composed of Fashion-IQ", "--data", f"fashioniq={folder}")
    assert told["verdict"] == f"unknown: {guard.NO_RECORD}; {guard.NOT_CHOSEN}"
    assert told["queries of seen targets"].startswith(
        "{'dress': 0, 'shirt': 1, 'toptee': 0}, says the train split here"
    )


@pytest.mark.parametrize("guided", [True, False])
def test_leaky_captions_that_are_allowed_are_told(guided, evaluate, weights, world, tmp_path, monkeypatch):
    """By their guidance, and by BM25 alone, which knows enough of few here."""
    monkeypatch.setattr(leaks, "FOUND_CANDIDATES", 5)
    put(weights, CLEAN_TOY)
    data, cap = FashionIQ(world / "fashioniq", "test"), FashionIQCap(world / "fashioniq", "test")
    texts = {row.target: " ".join(row.captions) for row in data.rows}
    rows = [
        {"image": row["image"], "caption": texts.get(row["image"], f"nothing {i}")}
        for i, (_, row) in enumerate(cap.rows)
    ]
    rows[0] |= {"text_guidance": "is red"} if guided else {}
    file = tmp_path / "captions.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(UserError, match="queries' texts at hand"):
        evaluate("composed", "--captions", file)
    told, saved = evaluate("composed", "--captions", file, "--allow-leaky-captions")
    assert told["verdict"].startswith(
        "NOT CLEAN: captions of all were written with the queries' texts at hand: "
    )
    assert ("text_guidance" in told["verdict"]) == guided and "BM25" in told["verdict"]
    assert saved["verdict"] == told["verdict"]


def test_a_guidance_that_was_chosen_on_val_is_told_there(evaluate, weights):
    """The preset's is: on test that is clean, on val it is not."""
    assert guard.chosen_on("tiny", PRESETS["tiny"].guidance) == {"guidance": "toy val of seed 0"}
    with pytest.raises(UserError, match="settings are chosen on val and reported on test"):
        evaluate("generation", "--split", "test", "--guidances", "1,2")


# What it was of


def test_a_fingerprint_is_of_pixels_texts_and_their_borders():
    a, b = Image.new("RGB", (2, 3), "red"), Image.new("RGB", (3, 2), "red")

    def of(*things: object) -> str:
        fingerprint = Fingerprint()
        for thing in things:
            assert fingerprint.add(thing) is thing
        return str(fingerprint)

    assert of(a, "x") == of(a.copy(), "x")
    every = [of(a), of(b), of(a.convert("L")), of(Image.new("RGB", (2, 3), "blue")), of("ab", "c"), of("a", "bc"),
             of(["a", "b"]), of("a", "b"), of(b"xy", b"z"), of(b"x", b"yz"), of([["a"], ["b"]]), of({"a": "b"}), of({"b": "a"}), of(None), of()]  # fmt: skip
    assert len(set(every)) == len(every)
    assert of({"a": 1, "b": 2}) == of({"b": 2, "a": 1})  # whatever the order of its keys


def test_another_pixel_of_what_is_searched_is_another_fingerprint(
    evaluate, weights, world, tmp_path, monkeypatch
):
    monkeypatch.setattr(pools, "WHOLE", {})  # as if these were all
    put(weights, {})
    folder = Path(shutil.copytree(world / "fashioniq", tmp_path / "real"))
    _, before = evaluate("composed of Fashion-IQ", "--data", f"fashioniq={folder}")
    name = FashionIQ(folder, "val").pools["toptee"][-1]
    picture = Image.open(folder / f"images/{name}.png").convert("RGB")
    picture.putpixel((0, 0), (1, 2, 3))
    picture.save(folder / f"images/{name}.png")
    _, after = evaluate("composed of Fashion-IQ", "--data", f"fashioniq={folder}")
    assert before["data sha256"] != after["data sha256"] and before["model sha256"] == after["model sha256"]


# Helpers


def write(folder: Path, record: dict[str, torch.Tensor]) -> Path:
    save_file({"qformer.x": torch.ones(2), **record}, folder / "model.safetensors")
    return folder / "model.safetensors"


def put(weights: Path, record: dict[str, torch.Tensor]) -> None:
    """The record in the place of the one that is there."""
    path = weights / "model.safetensors"
    save_file(seen.apart(load_file(path), path)[0] | record, path)


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("guard") / "toy"
    return world_of(
        folder, "fashiongen", "fashioniq", "fashioniq/captions", train=3, val=30, test=12, workers=1
    )


@pytest.fixture(scope="module")
def weights(tmp_path_factory) -> Path:
    patch = pytest.MonkeyPatch()
    patch.setitem(PRESETS, "tiny", SMALL)
    yield write_weights(tmp_path_factory.mktemp("weights"), SMALL)
    patch.undo()


@pytest.fixture
def evaluate(world, weights, capsys, tmp_path, monkeypatch):
    """A command by its name -> the lines of its report, and its JSON."""
    for module in (captioning, generation):  # the guard speaks before a model is needed
        monkeypatch.setattr(module, "load_unifashion", lambda *_, **__: None)
    monkeypatch.setattr(captioning, "llm_tokenizer", lambda *_: None)
    monkeypatch.setattr(captioning, "check_search", lambda *_: None)

    def run(name: str, *flags: object) -> tuple[dict[str, str], dict]:
        module, data = COMMANDS[name]
        out = tmp_path / "report.json"
        given = [] if "--data" in flags else ["--data", f"{data}={world if data == 'toy' else world / data}"]
        given += ["--weights", weights, "--device", "cpu", "--quiet", "--out", out, *flags]
        module.main([str(x) for x in given])
        printed = capsys.readouterr().out
        return dict(re.findall(r"^(\S.*?) {2,}(.*)$", printed, re.MULTILINE)), json.loads(out.read_text())

    return run
