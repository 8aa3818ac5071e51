"""The evaluation of search by text against scores whose recall is known; and the command itself."""

import json
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from itertools import product
from math import comb
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch

from eval import gallery, report, retrieval
from eval.captioning import draw
from eval.embed import embed_pictures, embed_texts
from eval.report import chance
from eval.retrieval import COLUMNS, judge, true_pairs
from eval.truth import distinct, garments_of, look, truth
from tests.rooms import ROOT, SMALL, write_weights
from tests.worlds import world_of
from unifashion import UserError
from unifashion.config import PRESETS
from unifashion.data import toy
from unifashion.data.fashiongen import FashionGen
from unifashion.data.readers import READERS
from unifashion.data.texts import WRITERS, named
from unifashion.data.toy import Garment
from unifashion.preprocess import qformer_image
from unifashion.search import image_embeddings, qformer_hash, text_embeddings
from unifashion.tokenizers import WordPiece, blip_caption
from weights.load import load_unifashion, tokenizer

pytestmark = pytest.mark.usefixtures("one_thread")

RED_SHIRT = Garment("shirt", "red", "white", "dotted", "short", "v", "regular")
PLAIN = replace(RED_SHIRT, pattern="plain")


# What is searched


def test_candidates_all_look_different_and_the_first_of_a_look_is_taken():
    other = replace(PLAIN, second="blue")  # of a colour that nobody sees
    garments = [
        PLAIN,
        RED_SHIRT,
        other,
        replace(RED_SHIRT, second="blue"),
        RED_SHIRT,
        replace(PLAIN, colour="blue"),
    ]
    assert look(PLAIN) == look(other) != look(RED_SHIRT)
    assert distinct(garments, 99) == [0, 1, 3, 5]
    assert distinct(garments, 2) == [0, 1]


def test_a_pair_is_right_where_all_that_the_text_names_is_true():
    garments = [RED_SHIRT, replace(RED_SHIRT, sleeve="long"), PLAIN, replace(RED_SHIRT, second="blue")]
    texts = {
        "red shirt": [1, 1, 1, 1],
        "red shirt with white dots": [1, 1, 0, 0],
        "red shirt with white dots and short sleeves": [1, 0, 0, 0],
        "solid red shirt": [0, 0, 1, 0],
        "blue shirt": [0, 0, 0, 0],
        "of no colour": [1, 1, 1, 1],
    }
    said = [named(text, "fashion200k") for text in texts]
    assert true_pairs(said, [truth(g) for g in garments]).int().tolist() == list(texts.values())


@pytest.mark.parametrize("style", READERS)
def test_pairs_are_right_as_sets_have_it_and_long_texts_fit_one_garment_alone(style):
    rng = np.random.default_rng(1)
    garments = list(dict.fromkeys(look(toy.sample_garment(rng)) for _ in range(120)))
    said = [named(WRITERS[style](g, rng), style) for g in garments]
    truths = [truth(g) for g in garments]
    right = true_pairs(said, truths)
    for i, j in product(range(len(garments)), repeat=2):
        assert right[i, j].item() == all(said[i][k] <= truths[j][k] for k in toy.ATTRIBUTES)
    assert right.diagonal().all()
    if style != "fashion200k":
        assert right.sum() == len(garments)


# What the model says


def test_batches_change_nothing_and_pictures_stay_in_order(world, weights):
    model, words = load_unifashion("tiny", weights, draws=False), tokenizer("tiny", weights)
    data = READERS["fashion200k"](world / "fashion200k", "test")
    pictures = torch.stack([qformer_image(data[i]["image"], 28) for i in range(5)])
    texts = ["A red dress!", "a dress", "red", "is: red", "b"]
    for batch in (1, 2, 5, 50):
        made = embed_pictures(model, lambda i: data[i]["image"], 5, batch, "", True)
        assert torch.allclose(made, image_embeddings(model, pictures), atol=1e-5)
        ids, mask = words.encode([blip_caption(text) for text in texts], 12)
        made = embed_texts(model, words, texts, batch)
        assert torch.allclose(made, text_embeddings(model, ids, mask), atol=1e-5)
    assert (made[0] - made[1]).abs().max() > 1e-3


def test_texts_that_are_not_read_to_their_end_are_counted(tmp_path):
    vocab = tmp_path / "vocab.txt"
    vocab.write_text("[PAD]\n[UNK]\n[CLS]\n[SEP]\n[MASK]\na\nb\n")
    words = WordPiece(vocab)
    assert retrieval.cut_texts(words, ["a b a b", "a b a b a", "a! b. a", "a " * 51], 6) == 2
    assert (
        retrieval.cut_texts(words, ["a " * 50, "a " * 51], 64) == 1
    )  # of more than 50 words BLIP-2 reads none


def test_what_overflows_is_told(world, weights):
    model, words = load_unifashion("tiny", weights, draws=False), tokenizer("tiny", weights)
    model.qformer.text_proj.weight.fill_(torch.inf)
    with pytest.raises(UserError, match="^the numbers overflow"):
        embed_texts(model, words, ["red"], 1)


# How it is judged


def test_a_perfect_model_gets_full_marks_and_its_control_none():
    figures = judge(torch.eye(40), torch.eye(40).bool(), 0)
    assert all(figures["ours"][k] == [100, 100, 100] for k in (*COLUMNS, "mean"))
    assert figures["texts shuffled"]["text to image R@1"] == [0, 0, 0]
    assert figures["chance"]["image to text R@10"] == [pytest.approx(25)]


def test_a_model_that_says_nothing_gets_nothing():
    figures = judge(torch.zeros(40, 40), torch.eye(40).bool(), 0)
    assert all(figures["ours"][k] == [0, 0, 0] for k in COLUMNS)


def test_the_two_directions_are_told_apart():
    """A text that every picture likes best: each text still finds its own picture, but no picture its text."""
    scores = torch.eye(20)
    scores[3] += 5
    figures = judge(scores, torch.eye(20).bool(), 0)["ours"]
    assert figures["text to image R@1"][0] == 100 and figures["image to text R@1"][0] == 5
    assert figures["image to text R@5"][0] == 100
    assert figures["mean"][0] == pytest.approx((5 * 100 + 5) / 6, abs=1e-3)


def test_any_true_picture_counts():
    right = torch.eye(4).bool()
    right[0, 1] = True  # text 0 is true of picture 1, too, but text 1 not of picture 0
    scores = torch.eye(4)
    scores[0] = torch.tensor([0.5, 0.9, 0.1, 0.2])
    figures = judge(scores, right, 0)["ours"]
    assert figures["text to image R@1"][0] == 100 and figures["image to text R@1"][0] == 100
    assert judge(scores, torch.eye(4).bool(), 0)["ours"]["text to image R@1"][0] == 75


def test_intervals_have_the_width_of_theory():
    n = 400
    scores = torch.eye(n)
    scores[torch.arange(0, n, 4), torch.arange(0, n, 4)] = -1  # a quarter is wrong
    figure, low, high = judge(scores, torch.eye(n).bool(), 0)["ours"]["text to image R@1"]
    half = 196 * np.sqrt(0.75 * 0.25 / n)
    assert figure == 75 and abs(low - (75 - half)) < 1 and abs(high - (75 + half)) < 1


@pytest.mark.parametrize(("n", "right", "k"), [(20, 1, 1), (20, 3, 5), (20, 20, 1), (5, 1, 10), (100, 2, 10)])
def test_chance_is_that_of_a_random_order(n, right, k):
    missed = comb(n - right, k) / comb(n, k) if k <= n else 0
    assert chance(torch.tensor([right, right]), n, k) == pytest.approx(100 * (1 - missed))
    assert chance(torch.tensor([right, n]), n, k) == pytest.approx(100 * (1 - missed / 2))


# The command


def test_the_command_prints_what_a_reader_needs_and_repeats(command, weights, tmp_path):
    printed = command("--out", tmp_path / "figures.json")
    report = dict(re.findall(r"^(\S.*?) {2,}(.*)$", printed, re.MULTILINE))
    assert report["command"].startswith("python -m eval.retrieval --data toy=")
    assert report["seen in training"] == "0" and report["style"] == "fashiongen"
    assert report["right answers a text"] == "1.0"
    model = load_unifashion("tiny", weights, draws=False)
    assert report["qformer sha256"] == qformer_hash(model)
    for told in (
        "text to image R@1 ",
        "image to text R@10",
        "ours ",
        "texts shuffled",
        "chance",
        "drawn pictures",
    ):
        assert told in printed
    assert re.search(
        r"UniFashion, Table 1 +71\.41 +93\.69 +97\.47 +71\.44 +93\.79 +97\.51 +87\.55\n", printed
    )
    saved = json.loads((tmp_path / "figures.json").read_text())
    assert saved["garments"] == int(report["garments"]) == 12 and len(saved["figures"]["ours"]) == 7
    assert [p.name for p in tmp_path.iterdir()] == ["figures.json"]

    assert figures_of(command("--batch-size", "5")) == figures_of(printed)
    half = command("--dtype", "bf16", "--samples", "6")
    assert qformer_hash(model) in half and "6 garments, fashiongen" in half and "bf16" in half


def test_what_is_searched_are_the_garments_own_pictures_and_texts(command, world, monkeypatch):
    seen = {}

    def embed(model, open_, n, *_):
        seen["pictures"] = [np.asarray(open_(i)) for i in range(n)]
        return torch.zeros(n, 3, 8)

    monkeypatch.setattr(retrieval, "embed_pictures", embed)
    monkeypatch.setattr(retrieval, "embed_texts", lambda m, w, texts, b: seen.setdefault("texts", texts))
    monkeypatch.setattr(retrieval, "text_to_image", lambda text, images: torch.eye(len(text)))
    printed = command("--style", "fashioniq-cap", "--seed", "3")
    data = READERS["fashioniq-cap"](toy.part(world, "fashioniq", True), "test")
    picks = draw(data.products, 12, 3)
    garments = garments_of(toy.read_rows(world, "test"), "fashioniq-cap", data, picks)
    picks = [picks[i] for i in distinct(garments, 1500)]
    assert seen["texts"] == [data[i]["text"] for i in picks]
    for i, picture in zip(picks, seen["pictures"], strict=True):
        assert np.array_equal(np.asarray(data[i]["image"]), picture)
    assert re.search(r"^ours( +100\.0 \[100\.0, 100\.0\]){7}$", printed, re.MULTILINE)


def test_garments_that_training_saw_are_no_test(command, monkeypatch):
    monkeypatch.setattr(retrieval, "seen_in_training", lambda rows, garments: 3)
    monkeypatch.setattr(retrieval, "embed_pictures", lambda *_: pytest.fail("work was begun"))
    with pytest.raises(UserError, match="^3 of 12 garments have a combination .* this is no test"):
        command()


@pytest.mark.parametrize(
    "flags",
    ["--samples 1", "--batch-size 0", "--seed -1", "--style vogue", "--out no/folder.json", "--out .", "--data fashion200k",
     "--device tpu", "--split train", "--data fashiongen --split test", "--data fashiongen --samples 9",
     "--data fashiongen --style fashiongen --samples 9", "--data fashiongen=nowhere"],
)  # fmt: skip
def test_wrong_input_is_refused_before_any_work(command, flags, monkeypatch):
    monkeypatch.setattr(report, "load_unifashion", lambda *_, **__: pytest.fail("work was begun"))
    with pytest.raises(UserError):
        command(*flags.split())


def test_what_cannot_be_written_leaves_the_old_file(tmp_path, monkeypatch):
    out = tmp_path / "figures.json"
    out.write_text("old")
    monkeypatch.setattr(Path, "replace", lambda *_: pytest.fail("renamed"))
    with pytest.raises(TypeError):
        retrieval.save_json({"a": object()}, out)
    assert out.read_text() == "old"


def test_the_users_error_is_one_line_and_code_2():
    command = [sys.executable, "-m", "eval.retrieval", "--data", "toy", "--samples", "1"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("eval.retrieval: --samples") and done.stderr.count("\n") == 1


# FashionGen


def test_fashiongen_is_searched_by_both_protocols_beside_the_published_rows(command, world, tmp_path):
    printed = command("--data", f"fashiongen={world / 'fashiongen'}", "--out", tmp_path / "figures.json")
    told = dict(re.findall(r"^(\S.*?) {2,}(.*)$", printed, re.MULTILINE))
    assert (told["pictures"], told["products"], told["split"]) == ("12", "4", "validation")
    assert told["products of several texts"].startswith("0,") and "toyfashion" in told
    assert re.search(r"^FAME-ViL +70\.0$", printed, re.MULTILINE)
    assert re.search(r"^UniFashion, Table 1 +71\.41 .* 87\.55$", printed, re.MULTILINE)
    assert re.search(r"^FAME-ViL, Table 1 +62\.86 .* 83\.14$", printed, re.MULTILINE)
    assert "in a file that was never published" in printed and "say nothing about photographs" in printed
    saved = json.loads((tmp_path / "figures.json").read_text())
    assert list(saved["figures"]) == ["full gallery", "random-100"]
    for rows in saved["figures"].values():
        assert {"ours", "texts shuffled", "chance"} <= rows.keys()
        assert all(row.keys() == {*COLUMNS, "mean"} for row in rows.values())
    again = command("--data", f"fashiongen={world / 'fashiongen'}", "--batch-size", "5")
    assert figures_of(again) == figures_of(printed)


def test_what_is_searched_in_fashiongen_are_a_products_text_and_all_its_pictures(command, world, monkeypatch):
    seen = {}

    def embed(model, open_, n, *_):
        seen["pictures"] = [np.asarray(open_(i)) for i in range(n)]
        return torch.eye(4).repeat_interleave(3, 0)[:, None]  # three views of each

    monkeypatch.setattr(retrieval, "embed_pictures", embed)
    monkeypatch.setattr(
        retrieval, "embed_texts", lambda m, w, texts, b: seen.setdefault("texts", texts) and torch.eye(4)
    )
    printed = command("--data", f"fashiongen={world / 'fashiongen'}")
    data = FashionGen(world / "fashiongen", "validation")
    assert seen["texts"] == [data.texts[i] for i in (0, 3, 6, 9)] and len({*seen["texts"]}) == 4
    assert all(np.array_equal(np.asarray(data[i]["image"]), seen["pictures"][i]) for i in range(12))
    assert len(re.findall(r"^ours( +100\.0 \[100\.0, 100\.0\]){7}$", printed, re.MULTILINE)) == 2


def test_a_fashiongen_that_is_not_whole_gets_no_figure(command, world, tmp_path, monkeypatch, capsys):
    """Cut rows, a row without a text, a picture that cannot be read."""
    folder = tmp_path / "real"

    def copied(change) -> Path:
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(world / "fashiongen", folder)
        with h5py.File(folder / "fashiongen_256_256_validation.h5", "r+") as file:
            change(file)
        return folder

    def refused(match: str) -> None:
        with pytest.raises(UserError, match=match):
            command("--data", f"fashiongen={folder}")
        assert "ours" not in capsys.readouterr().out

    copied(lambda file: None)
    refused("has 12 rows, not 32528")
    monkeypatch.setattr(gallery, "ROWS", 12)
    command("--data", f"fashiongen={folder}")

    def silence(file) -> None:
        for column in ("name", "description"):
            file[f"input_{column}"][5] = b""

    copied(silence)
    refused("1 rows have no text, row 5 for one")

    def shorten(file) -> None:
        for key in list(file):
            rows = file[key][:9]
            del file[key]
            file[key] = rows

    copied(shorten)
    refused("has 9 rows, not 12")
    copied(lambda file: None)
    path = folder / "fashiongen_256_256_validation.h5"
    with h5py.File(path) as file:
        chunk = file["input_image"].id.get_chunk_info(7)
    raw = bytearray(path.read_bytes())
    raw[chunk.byte_offset : chunk.byte_offset + chunk.size] = bytes(chunk.size)
    path.write_bytes(raw)
    refused("the picture of row 7 cannot be read")


def test_a_world_whose_fashiongen_has_other_garments_than_it_is_refused(command, world, tmp_path):
    ours = tmp_path / "toy"
    shutil.copytree(world / "fashiongen", ours / "fashiongen")
    for name in ("toy.json", "attributes_train.jsonl"):
        shutil.copy(world / name, ours)
    lines = (world / "attributes_val.jsonl").read_text().splitlines(keepends=True)
    (ours / "attributes_val.jsonl").write_text("".join(lines[:3]))
    with pytest.raises(UserError, match="has 12 rows, not 9"):
        command("--data", f"fashiongen={ours / 'fashiongen'}")


# Helpers


def figures_of(printed: str) -> str:
    return printed.split("\n\n", 1)[1]


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("retrieval") / "toy"
    return world_of(folder, "fashiongen", "fashioniq", train=3, val=4, test=12, workers=1)


@pytest.fixture(scope="module")
def weights(tmp_path_factory) -> Path:
    """A folder of random weights of a preset "tiny" that is smaller still."""
    patch = pytest.MonkeyPatch()
    patch.setitem(PRESETS, "tiny", SMALL)
    yield write_weights(tmp_path_factory.mktemp("weights"), SMALL)
    patch.undo()


@pytest.fixture
def command(world, weights, capsys):
    def run(*flags: object) -> str:
        given = [] if "--data" in flags else ["--data", f"toy={world}"]
        given += ["--weights", weights, "--device", "cpu", "--quiet", *flags]
        retrieval.main([str(x) for x in given])
        return capsys.readouterr().out

    return run
