"""The caption evaluation against captions whose figures are known: truths, lies, silence, chatter; and the command itself."""

import io
import json
import re
import shutil
import subprocess
import sys
from argparse import Namespace
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import sentencepiece
import torch
from safetensors.torch import save_file

import unifashion.caption
from eval import captioning, captions, generation
from eval.captioning import READERS, WRITERS, Case, count, draw, judge, shares
from eval.report import shuffled
from eval.truth import ATTRIBUTES, truth
from tests.parity import randomise
from tests.rooms import ROOT, SMALL
from tests.worlds import world_of
from unifashion import UserError, lora, runs
from unifashion.caption import Caption, write_captions
from unifashion.config import PRESETS
from unifashion.data import toy
from unifashion.data.texts import WORDS, flat, named
from unifashion.data.toy import Garment
from unifashion.llama import LlamaConfig
from unifashion.lora import LoRAConfig
from unifashion.model import UniFashion, start_adapter
from unifashion.preprocess import qformer_image
from unifashion.tokenizers import SentencePiece
from weights.load import llm_tokenizer, load_unifashion

pytestmark = pytest.mark.usefixtures("one_thread", "without_jar")

RED_SHIRT = Garment("shirt", "red", "white", "dotted", "short", "v", "regular")
BLUE_GOWN = Garment("dress", "blue", "red", "plain", "long", "round", "midi")
SHORT = "fashion200k"


# Precision and coverage


def test_figures_that_can_be_had_by_head():
    figures = judged(
        [
            # named: category 1 true, colour 1 true, second 1 false, pattern 1 true, sleeve 1 false
            (
                "red shirt with blue dots, long sleeves",
                "red shirt with white dots and short sleeves",
                RED_SHIRT,
            ),
            # category 1 false, colour 2 of which 1 true; plain has no second colour
            ("blue and green tee", "blue midi gown", BLUE_GOWN),
        ]
    )
    wanted = {  # named, precision, asked, coverage
        "category": (2, 50, 2, 50),
        "colour": (3, 200 / 3, 2, 100),
        "second": (1, 0, 1, 0),
        "pattern": (1, 100, 1, 100),
        "sleeve": (1, 0, 1, 0),
        "neckline": (0, None, 0, None),
        "length": (0, None, 1, 0),
        "all": (8, 50, 8, 50),
    }
    for k, (name, precision, asked, coverage) in wanted.items():
        assert (figures[k]["named"], figures[k]["asked"]) == (name, asked), k
        assert figures[k]["precision"][0] == pytest.approx(precision, abs=1e-4), k
        assert figures[k]["coverage"][0] == pytest.approx(coverage, abs=1e-4), k


def test_what_nobody_asked_for_counts_for_precision_alone():
    figures = judged([("red shirt, long sleeves, v-neck", "shirt", RED_SHIRT)] * 2)
    assert figures["sleeve"] == {**none(), "named": 2, "precision": [0, 0, 0]}
    assert figures["neckline"] == {**none(), "named": 2, "precision": [100, 100, 100]}
    assert figures["all"]["asked"] == 2 and figures["all"]["coverage"] == [100, 100, 100]


def test_a_second_colour_is_false_of_a_plain_garment():
    figures = judged([("blue gown with red dots", "blue gown", BLUE_GOWN)] * 2)
    assert figures["second"] == {**none(), "named": 2, "precision": [0, 0, 0]}


def test_the_truth_counts_and_not_what_the_reference_says():
    figures = judged([("green tee", "green tee", BLUE_GOWN), ("blue gown", "green tee", BLUE_GOWN)])
    assert figures["category"]["precision"][0] == figures["category"]["coverage"][0] == 50


@pytest.mark.parametrize("style", READERS)
def test_a_truth_teller_gets_full_marks(style):
    figures = judge(style, *spoken(lambda g, reference: reference))["attributes"]["captions"]
    for k in (*ATTRIBUTES, "all"):
        assert figures[k]["named"] == figures[k]["asked"] > 50, k
        assert figures[k]["precision"] == figures[k]["coverage"] == [100, 100, 100], k


@pytest.mark.parametrize("style", READERS)
def test_a_liar_gets_nothing(style):
    def lie(g: Garment, _: str) -> str:
        values = {k: list(v) for k, v in toy.ATTRIBUTES.items()}
        other = {k: v[(v.index(getattr(g, k)) + 1) % len(v)] for k, v in values.items()}
        if other["colour"] == other["second"]:
            other["second"] = next(v for v in values["second"] if v not in (g.second, other["colour"]))
        return WRITERS[style](Garment(**other), np.random.default_rng(0))

    figures = judge(style, *spoken(lie))["attributes"]["captions"]
    for k in (*ATTRIBUTES, "all"):
        assert figures[k]["named"] > 50 and figures[k]["precision"] == [0, 0, 0], k
        assert figures[k]["asked"] > 50 and figures[k]["coverage"] == [0, 0, 0], k


@pytest.mark.parametrize("style", READERS)
def test_silence_covers_nothing_and_claims_nothing(style):
    result = judge(style, *spoken(lambda g, _: "and the , ."))
    for figures in result["attributes"]["captions"].values():
        assert figures["named"] == 0 and figures["precision"] == [None, None, None]
        assert figures["coverage"] == [0, 0, 0]
    assert all(figure[0] < 0.01 for figure in result["BLEU-4"]["captions"].values())


def test_who_names_every_value_pays_with_precision():
    everything = " , ".join(flat([list(v.values()) for v in WORDS["fashiongen"].values()]))
    figures = judge("fashiongen", *spoken(lambda g, _: everything))["attributes"]["captions"]
    for k, values in toy.ATTRIBUTES.items():
        if k != "second":
            assert figures[k]["coverage"] == [100, 100, 100]
            assert figures[k]["precision"][0] == pytest.approx(100 / len(values), abs=1e-3)


@pytest.mark.parametrize("style", READERS)
def test_the_controls_of_a_truth_teller(style):
    """Others' captions are as good as chance; the truth in other words names no falsehood, but not the same words."""
    result = judge(style, *spoken(lambda g, reference: reference))
    others, anew, common = (
        result["attributes"][row] for row in ("of other pictures", "the truth, anew", "most frequent")
    )
    chance = {"category": 20, "colour": 100 / 12, "pattern": 100 / 6, "sleeve": 100 / 3, "neckline": 100 / 3}
    for k, percent in chance.items():
        for figures in (others[k], common[k]):
            assert figures["precision"][0] == pytest.approx(percent, abs=11), k
        assert others[k]["named"] == result["attributes"]["captions"][k]["named"]
    assert common["category"]["named"] == 200 and common["category"]["asked"] == others["category"]["asked"]
    assert all(figures["precision"] == [100, 100, 100] for figures in anew.values())
    if style == SHORT:  # which leaves a fifth of the details out, each time others
        assert 70 < anew["sleeve"]["coverage"][0] < 90
    else:
        assert anew["all"]["coverage"] == [100, 100, 100]
    own = {row: figures[style] for row, figures in result["BLEU-4"].items()}
    assert own["captions"][0] == pytest.approx(100, abs=1e-4)
    assert own["of other pictures"][2] < own["the truth, anew"][1] < own["the truth, anew"][2] < 60
    assert all(own["captions"][0] > 3 * f[0] for k, f in result["BLEU-4"]["captions"].items() if k != style)


def test_shuffling_and_writing_anew_follow_the_seed():
    spoke = spoken(lambda g, reference: reference)[:-1]
    a, b, c = (judge("fashiongen", *spoke, seed) for seed in (0, 0, 1))
    assert a == b
    for row in ("of other pictures", "the truth, anew"):
        assert a["BLEU-4"][row] != c["BLEU-4"][row]


def test_the_most_frequent_values_are_counted_where_they_are_true():
    plain = replace(RED_SHIRT, pattern="plain", second="green")
    common = captioning.most_frequent([truth(g) for g in (RED_SHIRT, plain, plain, BLUE_GOWN)])
    assert common == {k: {v} for k, v in vars(plain).items()} | {"second": {"white"}}


def test_intervals_are_over_pictures_and_have_the_width_of_theory():
    n, p = 400, 0.8
    texts = ["red shirt" if i < p * n else "blue shirt" for i in range(n)]
    figures = judged([(text, "red shirt", RED_SHIRT) for text in texts])
    half = 196 * np.sqrt(p * (1 - p) / n)
    for value, low, high in (figures["colour"]["precision"], figures["colour"]["coverage"]):
        assert value == 80 and abs(low - (80 - half)) < 0.5 and abs(high - (80 + half)) < 0.5
    _, low, high = figures["all"]["precision"]  # two values a picture are not two pictures
    assert abs((high - low) - half) < 0.5


# Against the references


def test_the_four_metrics_are_of_a_styles_own_references():
    result = judge(SHORT, *spoken(lambda g, reference: reference))
    own = result["own"]
    assert list(own) == list(result["BLEU-4"])
    for row, figures in own.items():
        assert list(figures) == ["BLEU-4", "METEOR", "ROUGE-L", "CIDEr"]
        assert figures["BLEU-4"] == result["BLEU-4"][row][SHORT] and figures["METEOR"] is None
        assert all(low <= value <= high for value, low, high in map(figures.get, ("ROUGE-L", "CIDEr")))
    assert own["captions"]["ROUGE-L"] == [100, 100, 100] and own["captions"]["CIDEr"][0] > 500
    for metric in ("BLEU-4", "ROUGE-L", "CIDEr"):
        assert own["of other pictures"][metric][2] < own["the truth, anew"][metric][1], metric
        assert own["the truth, anew"][metric][2] < own["captions"][metric][1], metric


def test_the_style_that_is_not_followed_is_told():
    cases, *rest = spoken(lambda g, reference: reference)
    told = "nearest to another style's references"
    assert told not in captioning.table(SHORT, cases[SHORT], 1.0, judge(SHORT, cases, *rest))
    long = [a._replace(caption=b.caption) for a, b in zip(cases[SHORT], cases["fashiongen"], strict=True)]
    swapped = cases | {SHORT: long}
    assert told in captioning.table(SHORT, long, 1.0, judge(SHORT, swapped, *rest))
    figures = judge(
        SHORT, cases, *rest
    )  # no four words in a row are anyone's: what is left of BLEU tells nothing
    figures["BLEU-4"]["captions"] |= {SHORT: [1e-9, 0.0, 1e-8], "fashiongen": [2e-9, 0.0, 2e-8]}
    assert told not in captioning.table(SHORT, cases[SHORT], 1.0, figures)


# What is captioned


def test_a_draw_takes_a_product_once_and_any_of_its_pictures():
    products = [f"p{i // 3}" for i in range(30)]
    draws = [draw(products, 6, seed) for seed in range(60)]
    assert draws[3] == draw(products, 6, 3) and len(set(map(tuple, draws))) == 60
    assert all(len({products[i] for i in picks}) == 6 for picks in draws)
    assert {i for picks in draws for i in picks} == set(range(30))  # whichever view
    assert draw(products, 3, 0) == draws[0][:3]
    assert sorted(products[i] for i in draw(products, 500, 0)) == sorted(set(products))


def test_data_sets_with_the_same_garments_give_the_same_draw():
    many, one = [f"p{i // 3}" for i in range(30)], [f"B{i}" for i in range(10)]
    backwards = many[::-1]
    first, second, third = ([x[i][1:] for i in draw(x, 6, 5)] for x in (many, one, backwards))
    assert first == second == third


def test_shuffling_gives_nobody_an_equal_look():
    looks = [*"aabbcdefgh"]
    for seed in range(20):
        order = shuffled(looks, seed)
        assert sorted(order) == list(range(10)) and all(looks[i] != looks[j] for i, j in enumerate(order))
    assert len({tuple(shuffled(looks, seed)) for seed in range(20)}) > 15
    with pytest.raises(UserError, match="alike"):
        shuffled([*"aaab"], 0)


def test_plain_garments_that_differ_in_a_colour_nobody_sees_are_alike():
    cases, garments, common, _ = spoken(lambda g, reference: reference)
    few = {style: of[:4] for style, of in cases.items()}
    alike = [replace(RED_SHIRT, pattern="plain", second=second) for second in ("white", "blue", "green")]
    with pytest.raises(UserError, match="alike"):
        judge(SHORT, few, [*alike, BLUE_GOWN], common, 0)
    judge(SHORT, few, [*alike[:2], BLUE_GOWN, RED_SHIRT], common, 0)


@pytest.mark.parametrize("style", READERS)
@pytest.mark.parametrize("split", ["val", "test"])
def test_a_pictures_garment_is_the_one_of_its_row(style, split, world):
    data = READERS[style](toy.part(world, style.removesuffix("-cap"), True), split)
    rows = toy.read_rows(world, split)
    garments = captioning.garments_of(rows, style, data, range(len(data)))
    pictures = len(data) // len(rows)  # of a garment
    assert Counter(garments) == Counter({Garment(**row["garment"]): pictures for row in rows})
    backwards = {i: g for i, g in zip(range(len(data))[::-1], garments[::-1], strict=True)}
    assert captioning.garments_of(rows, style, data, [3, 1]) == [backwards[3], backwards[1]]
    with pytest.raises(UserError, match=f"{style} has other garments"):
        captioning.garments_of(rows[::-1], style, data, range(len(data)))
    with pytest.raises(UserError, match=f"{style} has other garments"):
        captioning.garments_of(rows[:-1], style, data, [0])


def test_garments_of_combinations_that_training_has_are_seen(world):
    test, train = (toy.read_rows(world, split) for split in ("test", "train"))
    unseen, known = ([Garment(**row["garment"]) for row in rows] for rows in (test, train))
    assert generation.seen_in_training(train, unseen) == 0
    assert generation.seen_in_training(train, [*unseen, *known[:3]]) == 3
    assert generation.seen_in_training([*train, test[4]], unseen) == 1
    assert generation.seen_in_training([], known[:2]) == 2  # other parts may train on them
    second = next(c for c in toy.PALETTE if c not in (known[0].second, known[0].colour))
    assert (
        generation.seen_in_training(train, [replace(known[0], second=second)]) == 1
    )  # not in the combination


def test_pictures_are_captioned_as_infer_does(world, weights):
    model, words = loaded(weights)
    data = READERS["fashiongen"](toy.part(world, "fashiongen", True), "test")
    args = Namespace(batch_size=2, max_tokens=12, beams=1, quiet=True)
    cases, seconds = captioning.write(model, words, data, [4, 0, 8], "fashiongen", args)
    assert seconds > 0 and [case.picture for case in cases] == ["test/4", "test/0", "test/8"]
    for case, i in zip(cases, (4, 0, 8), strict=True):
        picture = qformer_image(data[i]["image"], model.cfg.vit.image_size[0])
        (alone,) = write_captions(model, words, [picture], "fashiongen", 12)
        assert case.caption == alone and case.reference == data[i]["text"]
    assert len({case.caption.text for case in cases}) > 1  # the picture matters


# The command


def test_the_command_prints_what_a_reader_needs_and_repeats(command, tmp_path):
    out, figures = tmp_path / "captions.jsonl", tmp_path / "captioning.json"
    printed = command("--captions", out, "--out", figures, "--show", "2")
    report = dict(line.split(maxsplit=1) for line in printed.splitlines()[:4])
    assert report["command"].startswith("python -m eval.captioning --data toy=")
    assert re.search(r"seen in training +0\n", printed) and re.search(r"split +test\n", printed)
    assert re.search(r"qformer sha256 +[0-9a-f]{64}\n", printed)
    assert re.search(r"data sha256 +[0-9a-f]{64}\ntrained on .*\nverdict +unknown: ", printed)
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert [row["style"] for row in rows] == [style for style in READERS for _ in range(6)]
    for style in READERS:
        own = [row for row in rows if row["style"] == style]
        assert f"\n{style}: 6 pictures, " in printed and f"{style} (own)" in printed
        assert (
            own[1]["caption"] in printed
            and own[1]["reference"] in printed
            and own[2]["picture"] not in printed
        )
        assert len({row["picture"] for row in own}) == 6
        assert all(0 < row["tokens"] <= 10 and (row["whole"] or row["tokens"] == 10) for row in own)
    for row in ("captions", "of other pictures", "the truth, anew"):
        assert (
            len(re.findall(rf"^{row} ", printed, re.MULTILINE)) == 3 * 4
        )  # the four metrics, BLEU against all styles, precision, coverage
    assert len(re.findall("^most frequent ", printed, re.MULTILINE)) == 3 * 2
    assert list(tmp_path.glob("*.new")) == []
    saved = json.loads(figures.read_text())
    assert saved["command"] == printed.split("\n")[0].split(maxsplit=1)[1] and list(saved["results"]) == list(
        READERS
    )
    bleu4 = saved["results"]["fashiongen"]["own"]["captions"]["BLEU-4"]
    assert re.search(rf"^captions +{bleu4[0]:.1f} ", printed.split("\nfashiongen: ")[1], re.MULTILINE)

    same = command("--captions", tmp_path / "again.jsonl", "--show", "2", "--batch-size", "4")
    assert figures_of(same) == figures_of(printed)
    other = command("--seed", "1", "--show", "2")
    assert figures_of(other) != figures_of(printed)


def test_the_command_gives_a_truth_teller_full_marks(command, monkeypatch):
    write = captioning.write

    def honest(*args) -> tuple[list[Case], float]:
        cases, seconds = write(*args)
        return [case._replace(caption=Caption(case.reference, 5, True)) for case in cases], seconds

    monkeypatch.setattr(captioning, "write", honest)
    printed = command()
    assert printed.count("6 pictures, 100.0 % of the captions ended by themselves, 5.0 tokens each, ") == 3
    assert "nearest to another style" not in printed
    blocks = re.findall(r"(?:precision|coverage) .*\n.* how many .*\ncaptions (.*)\n", printed)
    assert len(blocks) == 6 and all(block.split()[-3:] == ["100.0", "[100.0,", "100.0]"] for block in blocks)
    assert len(re.findall(r"BLEU-4 against .*\ncaptions .*\b100\.0 \[100\.0, 100\.0\]", printed)) == 3
    full = r"100\.0 \[100\.0, 100\.0\]"
    assert len(re.findall(rf"METEOR .*\ncaptions +{full} +not measured +{full} +\d+\.\d \[", printed)) == 3


def test_styles_splits_and_beams_can_be_chosen(command, tmp_path):
    out = tmp_path / "captions.jsonl"
    flags = ("--styles", "fashioniq-cap", SHORT, "--split", "val", "--show", "0", "--captions", out)
    printed = command(*flags, "--beams", "3")
    assert (
        "search                      3 beams" in printed and "fashiongen" not in printed.split("\n\n", 1)[1]
    )
    beams = out.read_text()
    assert [json.loads(line)["style"] for line in beams.splitlines()] == [SHORT] * 4 + ["fashioniq-cap"] * 4
    assert "search                      greedy" in command(*flags)
    assert out.read_text() != beams
    assert "dtype                       bf16" in command(*flags, "--dtype", "bf16")


def test_fashiongen_itself_is_set_beside_the_paper(command, world):
    printed = command("--data", f"fashiongen={toy.part(world, 'fashiongen', True)}")
    assert re.search(r"split +validation\n", printed) and "fashiongen: 4 pictures, " in printed
    assert re.search(r"UniFashion, Table 2 +35\.53 +29\.32 +54\.59 +169\.5\n", printed)
    figure = r" +\d+\.\d \[\d+\.\d, \d+\.\d\]"
    for row in ("ours, whole texts", "ours, FAME-ViL's way"):
        assert re.search(f"\n{row}{figure} +not measured{figure}{figure}\n", printed)
    assert re.search(f"\nours, as released{figure} +not measured{figure} +-\n", printed)
    assert "100 characters" in printed
    assert "precision" not in printed and "toyfashion" not in printed and "the truth" not in printed
    assert re.search("^of other pictures ", printed, re.MULTILINE)


@pytest.mark.parametrize(
    ("flags", "told"),
    {
        "--samples 1": "--samples must be at least 2",
        "--batch-size 0": "--batch-size at least 1",
        "--max-tokens 0": "--max-tokens is 0, must be 1 to",
        "--beams 0": "--beams is 0, must be 1 to 32",
        "--beams 1000": "--beams is 1000, must be 1 to 32",
        "--seed -1": "--seed is -1, must be 0 or more",
        "--show -1": "--show 0 or more",
        "--styles vogue": "--styles: invalid choice: 'vogue'",
        "--styles": "--styles: expected at least one argument",
        "--captions no/folder.jsonl": "no/folder.jsonl cannot be written",
        "--out no/folder.json": "no/folder.json cannot be written",
        "--out .": ". cannot be written",
        "--data vitonhd": "unknown data set 'vitonhd'",
        "--data fashiongen --split test": "FashionGen has the split val and captions of its own style",
        "--data fashiongen --styles fashion200k": "FashionGen has the split val and captions of its own style",
        "--device tpu": "unknown device 'tpu'",
        "--split train": "--split: invalid choice: 'train'",
    }.items(),
)
def test_wrong_input_is_refused_before_any_work(command, flags, told, monkeypatch):
    monkeypatch.setattr(captioning, "load_unifashion", lambda *_, **__: pytest.fail("work was begun"))
    with pytest.raises(UserError, match=re.escape(told)):
        command(*flags.split())


def test_a_fashiongen_that_is_not_whole_is_refused(command, world, tmp_path, monkeypatch):
    monkeypatch.setattr(captioning, "write", lambda *_: pytest.fail("work was begun"))
    folder = shutil.copytree(toy.part(world, "fashiongen", True), tmp_path / "real")
    with pytest.raises(UserError, match="has 12 rows, not 32528"):
        command("--data", f"fashiongen={folder}")


def test_a_damaged_picture_leaves_no_figure(command, world, tmp_path, capsys):
    broken = copy_of(world, tmp_path / "broken")
    for file in sorted((broken / SHORT / "women").rglob("*.jpeg")):
        file.write_bytes(b"no picture")
    with pytest.raises(UserError, match="cannot be read as an image"):
        command("--data", f"toy={broken}", "--styles", SHORT, "--out", tmp_path / "out.json")
    assert capsys.readouterr().out == "" and not (tmp_path / "out.json").exists()


def test_captions_too_long_for_the_llm_are_refused(command, monkeypatch):
    monkeypatch.setattr(captioning, "load_unifashion", lambda *_, **__: pytest.fail("work was begun"))
    with pytest.raises(UserError, match=r"^--max-tokens is 160, must be 1 to \d+: the rest"):
        command("--max-tokens", "160")


def test_garments_that_training_saw_are_no_test(command, world, tmp_path, monkeypatch):
    monkeypatch.setattr(captioning, "write", lambda *_: pytest.fail("work was begun"))
    seen = copy_of(world, tmp_path / "seen")
    test = (seen / "attributes_test.jsonl").read_text().splitlines()
    with open(seen / "attributes_train.jsonl", "a") as file:
        file.write("\n".join(test[3:5]) + "\n")
    with pytest.raises(UserError, match="^2 of 12 garments have a combination .* training has seen"):
        command("--data", f"toy={seen}", "--samples", "500")


def test_parts_of_different_garments_are_refused(command, world, tmp_path):
    mixed = copy_of(world, tmp_path / "mixed")
    shutil.rmtree(mixed / "fashioniq")
    (mixed / "fashioniq").symlink_to(
        world_of(tmp_path / "other", "fashioniq", seed=1, train=2, val=2, test=12) / "fashioniq"
    )
    with pytest.raises(UserError, match="^fashioniq-cap has other garments"):
        command("--data", f"toy={mixed}", "--samples", "500")
    command("--data", f"toy={mixed}", "--styles", SHORT, "--samples", "2")


def test_captions_outlive_what_fails_behind_them(command, tmp_path, monkeypatch):
    monkeypatch.setattr(
        captioning, "judge", lambda *_: (_ for _ in ()).throw(UserError("METEOR's jar failed"))
    )
    with pytest.raises(UserError, match="jar"):
        command("--captions", tmp_path / "captions.jsonl")
    assert len((tmp_path / "captions.jsonl").read_text().splitlines()) == 3 * 6


def test_what_cannot_be_written_leaves_the_old_file(tmp_path, monkeypatch):
    out = tmp_path / "captions.jsonl"
    out.write_text("old")
    monkeypatch.setattr(Path, "replace", lambda *_: pytest.fail("renamed"))
    with pytest.raises(AttributeError):
        captioning.save({SHORT: [None]}, out)
    assert out.read_text() == "old"


def test_the_users_error_is_one_line_and_code_2():
    command = [sys.executable, "-m", "eval.captioning", "--data", "toy", "--samples", "1"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("eval.captioning: --samples") and done.stderr.count("\n") == 1


def test_captions_are_written_by_the_one_function_of_infer():
    assert captioning.write_captions is unifashion.caption.write_captions


# Helpers


def judged(texts: list[tuple[str, str, Garment]]) -> dict[str, dict]:
    """(caption, reference, garment) in Fashion200K's manner -> precision and coverage."""
    said, asked = ([named(text, SHORT) for text in of] for of in list(zip(*texts, strict=True))[:2])
    return shares(count(said, [truth(g) for *_, g in texts], asked))


def none() -> dict:
    nothing = [None, None, None]
    return {"named": 0, "precision": nothing, "asked": 0, "coverage": nothing}


def spoken(say) -> tuple[dict[str, list[Case]], list[Garment], dict, int]:
    """Arguments of `judge`: 200 garments, each with a reference in every style and the caption say(garment, reference)."""
    rng = np.random.default_rng(3)
    garments = [toy.sample_garment(rng) for _ in range(200)]
    cases = {}
    for style, writer in WRITERS.items():
        references = [writer(g, rng) for g in garments]
        captions = [Caption(say(g, text), 9, True) for g, text in zip(garments, references, strict=True)]
        cases[style] = [Case("", text, c) for text, c in zip(references, captions, strict=True)]
    common = captioning.most_frequent([truth(toy.sample_garment(rng)) for _ in range(500)])
    return cases, garments, common, 0


def figures_of(printed: str) -> str:
    """What is printed of the styles, without speeds."""
    return re.sub(r"\d+ tokens/s", "", printed.split("\n\n", 1)[1])


def copy_of(world: Path, folder: Path) -> Path:
    """The world without persons, its own to spoil."""
    return Path(shutil.copytree(world, folder, ignore=shutil.ignore_patterns("vitonhd")))


@pytest.fixture
def without_jar(monkeypatch):
    """METEOR's jar takes seconds to begin, and is tests/test_meteor.py's."""
    monkeypatch.setattr(captions, "meteor_counts", lambda *_: None)


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("captioning") / "toy"
    return world_of(folder, "fashiongen", "fashioniq", train=24, val=4, test=12, workers=1)


@pytest.fixture(scope="module")
def weights(tmp_path_factory, world) -> Path:
    """A folder of random weights of a preset "tiny" that is smaller still, of the half that writes."""
    patch, folder = pytest.MonkeyPatch(), tmp_path_factory.mktemp("weights")
    (folder / "llama_tokenizer.model").write_bytes(small_tokenizer())
    rows = len(SentencePiece(folder / "llama_tokenizer.model"))
    llama = LlamaConfig(vocab_size=rows, dim=32, depth=2, heads=2, mlp_dim=48, context=160)
    cfg = replace(SMALL, llama=llama, lora=LoRAConfig(rank=2, alpha=4.0, dropout=0.0))
    patch.setitem(PRESETS, "tiny", cfg)
    model = randomise(UniFashion(cfg, draws=False, writes=True), 0)
    # What tells these pictures apart must be louder than what they have in common.
    data = READERS[SHORT](world / SHORT, "test")
    pictures = torch.stack([qformer_image(data[i]["image"], 28) for i in range(0, len(data), 2)])
    start_adapter(model.text_adapter, model.qformer(model.see(pictures))[0])
    for part in ("vit", "llama"):
        save_file(contiguous(getattr(model, part).float().state_dict()), folder / f"{part}.safetensors")
    lora.inject(model.llama, cfg.lora)
    for i, tensor in enumerate(lora.adapter_state(model.llama).values()):
        tensor.copy_(0.1 * torch.randn(tensor.shape, generator=torch.Generator().manual_seed(i)))
    learned = runs.learned_state(model.float(), ["qformer", "text_adapter", "lora"])
    save_file(contiguous(learned), folder / "model.safetensors")
    yield folder
    patch.undo()


def contiguous(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: tensor.contiguous() for name, tensor in state.items()}


def small_tokenizer() -> bytes:
    """A SentencePiece model with Llama's settings, of a few captions."""
    rng, model = np.random.default_rng(0), io.BytesIO()
    texts = [write(toy.sample_garment(rng), rng) for write in WRITERS.values() for _ in range(60)]
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([*texts, "USER: <Img> </Img> Assistant:"]),
        model_writer=model,
        model_type="bpe",
        vocab_size=400,
        byte_fallback=True,
        split_digits=True,
        allow_whitespace_only_pieces=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        hard_vocab_limit=False,
        minloglevel=2,
    )
    return model.getvalue()


def loaded(weights: Path) -> tuple[UniFashion, SentencePiece]:
    model = load_unifashion("tiny", weights, draws=False, writes=True)
    return model, llm_tokenizer("tiny", weights)


@pytest.fixture
def command(world, weights, capsys):
    """Run the command on a few garments -> what it prints."""

    def run(*flags: object) -> str:
        few = f"--data toy={world} --weights {weights} --samples 6 --max-tokens 10 --device cpu --quiet"
        captioning.main([*few.split(), *map(str, flags)])
        return capsys.readouterr().out

    return run
