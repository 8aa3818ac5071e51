"""The try-on evaluation against pictures whose figures are known: truths, wrong garments, broken and leaking outputs."""

import json
import shutil
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
import torch

from eval import captioning, generation, judge
from eval.generation import (
    CONDITIONS,
    FRECHET,
    KID,
    Cases,
    Row,
    Setting,
    compare,
    distances,
    figures_of,
    measure,
    overheard,
    try_on,
)
from eval.judge import ATTRIBUTES, COLUMNS, score, told
from eval.metrics.fid import fid, kid_of_pairs
from eval.report import interval, save_json
from tests.small_draws import write_weights
from tests.worlds import world_of
from unifashion import UserError, feed, objectives, runs
from unifashion.config import PRESETS
from unifashion.data import toy
from unifashion.data.mgd import MGD
from unifashion.model import UniFashion
from unifashion.samples import Scenes
from unifashion.search import qformer_hash
from unifashion.tokenizers import WordPiece
from weights.load import load_unifashion, tokenizer

RED_SHIRT = toy.Garment("shirt", "red", "white", "dotted", "short", "v", "regular")
SAMPLES = 8


# Figures


def test_the_truth_gets_full_marks(cases, oracle):
    row = measure(lambda indices: [cases.truth(i)[0] for i in indices], cases, oracle, 4, "truth")
    for condition in CONDITIONS:
        figures = compare({"truth": row}, cases, condition)["rows"]["truth"]
        assert figures["colour"] == figures["attributes"] == [100, 100, 100]
        assert figures["IoU"] == [1, 1, 1] and figures["PSNR"] == [99, 99, 99]
        assert figures["changed"] == 0


def test_perfect_pictures_of_the_wrong_garment_score_near_chance(cases, oracle, drawn):
    others = cases.shuffled(0)
    rows = {
        "unchanged": measure(lambda indices: [cases.person(i)[0] for i in indices], cases, oracle, 4, "unchanged"),
        "shuffled": measure(lambda indices: [drawn(i, cases.garments[others[i]])[0] for i in indices], cases, oracle, 4, ""),
    }  # fmt: skip
    for condition in CONDITIONS:
        for figures in compare(rows, cases, condition)["rows"].values():
            assert figures["colour"][0] <= 30
            assert 10 <= figures["attributes"][0] <= 50
            assert figures["IoU"][0] < 0.8 and figures["PSNR"][0] < 15


def test_a_broken_output_loses_its_figures(cases, oracle):
    def make(spoil):
        return lambda indices: [spoil(cases.truth(i)[0].astype(int), i) for i in indices]

    noise = np.random.default_rng(0).integers(-40, 41, (128, 96, 3))
    spoils = {
        "tinted": lambda x, i: np.roll(x, 1, axis=2).astype(np.uint8),
        "noisy": lambda x, i: np.clip(x + noise, 0, 255).astype(np.uint8),
        "late": lambda x, i: cases.truth((i + 1) % len(cases))[0],
    }
    rows = {name: measure(make(spoil), cases, oracle, 4, name) for name, spoil in spoils.items()}
    figures = compare(rows, cases, "cloth")["rows"]
    assert figures["tinted"]["colour"][0] < 60 and figures["tinted"]["PSNR"][0] < 20
    assert 18 < figures["noisy"]["PSNR"][0] < 23 and figures["noisy"]["attributes"][0] == 100
    assert figures["late"]["attributes"][0] < 60 and figures["late"]["PSNR"][0] < 15


def test_a_score_looks_at_the_true_garment_only():
    truth = np.full((8, 8, 3), 250, np.uint8)
    garment = np.zeros((8, 8), bool)
    garment[2:6, 2:6] = True
    truth[garment] = toy.PALETTE["red"]
    picture = truth.copy()
    picture[garment] += 20
    picture[~garment] = 0
    found = np.roll(garment, 1, axis=0)  # 12 of 16 pixels in common, 20 together
    read = {k: getattr(RED_SHIRT, k) for k in ATTRIBUTES}
    values = dict(zip(COLUMNS, score(picture, truth, garment, RED_SHIRT, read, found), strict=True))
    assert values["PSNR"] == pytest.approx(20 * np.log10(255 / 20))
    assert values["IoU"] == 12 / 20
    assert [values[k] for k in ("colour", *ATTRIBUTES)] == [1] * 7
    for k in ATTRIBUTES:
        wrong = next(v for v in toy.ATTRIBUTES[k] if v != read[k])
        other = dict(
            zip(COLUMNS, score(picture, truth, garment, RED_SHIRT, {**read, k: wrong}, found), strict=True)
        )
        assert [name for name in COLUMNS if other[name] != values[name]] == [k]
    assert score(truth, truth, garment, RED_SHIRT, read, ~garment)[0] == 1
    assert score(truth, truth, garment, replace(RED_SHIRT, colour="blue"), read, garment)[0] == 0


def test_pixels_changed_outside_the_mask_are_counted(cases, oracle, monkeypatch):
    noise = lambda indices: [np.full((128, 96, 3), i, np.uint8) for i in indices]  # noqa: E731
    assert measure(noise, cases, oracle, 4, "pasted").changed == 0
    monkeypatch.setattr(generation, "paste", lambda person, generated, mask: generated)
    row = measure(noise, cases, oracle, 4, "not pasted")
    people = [cases.person(i) for i in range(len(cases))]
    assert (
        row.changed
        == sum(((p != i).any(-1) & (mask == 0)).sum() for i, (p, mask) in enumerate(people))
        > 10_000
    )


def test_only_the_first_pictures_are_kept_and_batches_do_not_matter(cases, oracle, monkeypatch):
    monkeypatch.setattr(generation, "ON_SHEET", 5)
    make = lambda indices: [cases.truth((i * 3) % len(cases))[0] for i in indices]  # noqa: E731
    rows = [measure(make, cases, oracle, batch, "") for batch in (1, 4, len(cases))]
    for row in rows:
        assert len(row.first) == 5
        assert np.array_equal(row.first, rows[0].first) and np.array_equal(row.values, rows[0].values)


def test_a_photo_tells_everything_and_a_text_what_it_has_words_for():
    everything = {"colour", *ATTRIBUTES}
    shape = {"category", "sleeve", "neckline", "length"}
    plain = replace(RED_SHIRT, pattern="plain")
    assert told("cloth", RED_SHIRT, "") == everything
    assert told("cloth", plain, "") == everything - {"second"}
    for text, words in {
        "": set(),
        "red shirt, white polka dots": {"colour", "pattern", "second"},
        "red shirt, dotted": {"colour", "pattern"},
        "coloured whitest dotty shirt": set(),  # no word of its own
        "white shirt": {"second"},
    }.items():
        assert told("sketch+text", RED_SHIRT, text) == shape | words
    assert told("sketch+text", plain, "red shirt, solid red shirt") == shape | {"colour", "pattern"}
    assert told("sketch+text", plain, "white shirt") == shape
    assert told("sketch+text", replace(RED_SHIRT, pattern="checked"), "plaid pattern") == shape | {"pattern"}


def test_every_toy_text_tells_colour_and_pattern(cases):
    for g, text in zip(cases.garments, cases.texts, strict=True):
        assert told("sketch+text", g, text) == told("cloth", g, text)


def test_figures_are_means_over_the_cases_that_are_asked():
    rng = np.random.default_rng(1)
    values, asked = rng.random((50, len(COLUMNS))), rng.random((50, len(COLUMNS))) < 0.6
    asked[:, COLUMNS.index("second")] = False
    figures = figures_of(values, asked)
    for i, k in enumerate(COLUMNS):
        mean = values[asked[:, i], i].mean() if asked[:, i].any() else np.nan
        np.testing.assert_allclose(figures[k][0], mean * (1 if k in ("IoU", "PSNR") else 100))
    assert interval(figures["second"]) == [None, None, None]
    five = [figures[k][0] for k in ATTRIBUTES if k != "second"]
    assert figures["attributes"][0] == pytest.approx(np.mean(five))


def test_intervals_have_the_width_of_theory():
    n, p = 400, 0.8
    values = np.repeat((np.arange(n) < p * n)[:, None], len(COLUMNS), axis=1).astype(float)
    value, low, high = interval(figures_of(values, np.ones_like(values, bool))["colour"])
    half = 196 * np.sqrt(p * (1 - p) / n)
    assert value == 80 and abs(low - (80 - half)) < 0.5 and abs(high - (80 + half)) < 0.5


def test_differences_are_between_the_same_cases(cases):
    rng = np.random.default_rng(2)
    values = rng.random((len(cases), len(COLUMNS)))
    rows = [Row(values - shift, 0, 0.0, []) for shift in (0.0, 0.1, 0.2)]
    result = compare(
        dict(zip(("output", generation.CEILING, generation.SHUFFLED), rows, strict=True)), cases, "cloth"
    )
    for name, shift in ((generation.CEILING, 0.1), (generation.SHUFFLED, 0.2)):
        difference = result["differences"][f"output less {name}"]
        np.testing.assert_allclose(difference["PSNR"], [shift] * 3, atol=1e-3)
        np.testing.assert_allclose(difference["colour"], [100 * shift] * 3, atol=1e-3)


def test_distances_are_fids_and_kids_on_what_the_judges_encoder_sees(cases, learned):
    def row(spoil) -> Row:
        with overheard(learned) as features:
            made = measure(lambda indices: [spoil(cases.truth(i)[0]) for i in indices], cases, learned, 3, "")
        return replace(made, features=np.concatenate(features))

    truth = row(lambda x: x)
    people = [cases.person(i) for i in range(len(cases))]
    shown = [generation.paste(p, cases.truth(i)[0], mask) for i, (p, mask) in enumerate(people)]
    x = torch.from_numpy(np.stack(shown)).permute(0, 3, 1, 2)[:, :, judge.ROWS].float() / 127.5 - 1
    with torch.no_grad():
        for block in learned.down:
            x = block(x)
    np.testing.assert_allclose(truth.features, x.mean((2, 3)), rtol=1e-4, atol=1e-5)
    assert truth.features.shape == (len(cases), 128) and not learned.down[-1]._forward_hooks
    assert distances(truth, truth) == {FRECHET: 0, KID: [0, 0, 0]}

    dark, darker = row(lambda x: x // 2), row(lambda x: x // 8)
    found = distances(dark, truth)
    assert found[FRECHET] == pytest.approx(fid(dark.features, truth.features, quiet=True), abs=1e-4)
    kid = kid_of_pairs(dark.features, truth.features, quiet=True)
    assert found[KID] == pytest.approx([1000 * v for v in kid], abs=1e-4)
    assert 0 < found[FRECHET] < distances(darker, truth)[FRECHET]
    two = [Row(r.values, 0, 0.0, [], r.features[:2]) for r in (dark, truth)]
    assert distances(*two)[KID] is None and distances(*two)[FRECHET] > 0
    rows = dict.fromkeys(("output", generation.CEILING, generation.SHUFFLED), two[0]) | {"truth": two[1]}
    result = compare(rows, cases, "cloth")
    assert result["rows"]["output"][FRECHET] == distances(*two)[FRECHET]


# Cases and their controls


def test_the_test_garments_are_unseen_and_not_the_persons_own(world, cases):
    train = toy.read_rows(world, "train")
    assert generation.seen_in_training(train, cases.garments) == 0
    assert all(person != cloth for person, cloth in cases.pairs)
    garments = [toy.Garment(**train[0]["garment"]), *cases.garments[1:]]
    assert generation.seen_in_training(train, garments) == generation.seen_in_training([], garments) == 1


def test_shuffling_gives_every_case_a_garment_that_looks_different(cases):
    orders = [cases.shuffled(seed) for seed in range(20)]
    assert cases.shuffled(3) == orders[3] and len(set(map(tuple, orders))) > 15
    for order in orders:
        assert sorted(order) == list(range(len(cases)))
        assert all(cases.garments[i] != cases.garments[j] for i, j in enumerate(order))


def test_plain_garments_that_differ_in_a_colour_nobody_sees_are_alike(world):
    cases = Cases(world, "test", 4)
    a, b = (replace(RED_SHIRT, pattern="plain", second=second) for second in ("white", "blue"))
    cases.garments = [a, b, RED_SHIRT, replace(RED_SHIRT, second="blue")]
    for seed in range(10):
        order = cases.shuffled(seed)
        assert {order[0], order[1]} == {2, 3}
    cases.garments = [a, b, a, b]
    with pytest.raises(UserError, match="alike"):
        cases.shuffled(0)


# What the model is given


@pytest.mark.parametrize("condition", CONDITIONS)
def test_the_model_is_given_what_training_gives_it(condition, world, model, words, cases, monkeypatch):
    given = recorded(monkeypatch)
    try_on(model, words, cases, condition, Setting("ddim", 2, 1.5), 0, list(range(SAMPLES)), [1, 4])
    scenes = Scenes({"mgd": cases.data}, model.cfg, words)
    batch = torch.utils.data.default_collate([scenes[1], scenes[4]])
    wanted = objectives.encode_tryon(model, batch)
    drawn, reads = (torch.full((2,), name in condition) for name in ("sketch", "text"))
    z = objectives.z_of_condition(model, wanted, drawn.long(), reads)
    noise, scene, context, hint, *setting = given[0]
    torch.testing.assert_close(scene, model.scene(wanted["agnostic"], wanted["keep"], wanted["pose"]))
    torch.testing.assert_close(context, model.image_adapter(z))
    torch.testing.assert_close(hint, wanted["hints"][:, int(drawn[0])])
    assert setting == [2, "ddim", 1.5]


def test_numbers_that_overflow_are_not_scored(model, words, cases):
    with pytest.raises(UserError, match="the numbers overflow"):
        try_on(model, words, cases, "cloth", Setting("ddim", 2, 1e38), 0, list(range(SAMPLES)), [0])


def test_shuffling_changes_the_garment_and_nothing_else(model, words, cases, monkeypatch):
    given, setting, own = recorded(monkeypatch), Setting("ddim", 2, 1.5), list(range(SAMPLES))
    others = cases.shuffled(0)
    for condition in CONDITIONS:
        given.clear()
        a = try_on(model, words, cases, condition, setting, 0, own, [0, 1])
        b = try_on(model, words, cases, condition, setting, 0, others, [0, 1])
        swapped = try_on(model, words, cases, condition, setting, 0, own, [others[0], others[1]])
        for x, y, z in zip(given[0][:2], given[1][:2], given[2][:2], strict=True):  # noise and scene
            assert torch.equal(x, y) and not torch.equal(x, z)
        for x, y, z in zip(given[0][2:4], given[1][2:4], given[2][2:4], strict=True):  # context and hint
            assert torch.equal(y, z) and not torch.allclose(x, y, atol=1e-3)
        assert all((p != q).any() for p, q in zip(a, b, strict=True))
        assert len(swapped) == 2


def test_no_condition_is_null_context_without_garment_or_guidance(model, words, cases, monkeypatch):
    given = recorded(monkeypatch)
    a = try_on(model, words, cases, None, Setting("ddim", 2, 3.0), 0, list(range(SAMPLES)), [0])
    b = try_on(model, words, cases, None, Setting("ddim", 2, 3.0), 0, cases.shuffled(0), [0])
    assert np.array_equal(a, b)
    _, _, context, hint, *_, guidance = given[0]
    assert torch.equal(context, model.null_context) and hint is None and guidance == 1


def test_noise_follows_seed_and_case_alone(model, words, cases, monkeypatch):
    given, own = recorded(monkeypatch), list(range(SAMPLES))
    plain, other = Setting("ddim", 2, 1.5), Setting("plms", 3, 2.0)
    try_on(model, words, cases, "cloth", plain, 0, own, [0, 1, 2])
    try_on(model, words, cases, "sketch+text", other, 0, own, [2])
    try_on(model, words, cases, "cloth", plain, 1, own, [0, 1, 2])
    first, alone, seeded = (call[0] for call in given)
    assert torch.equal(first[2], alone[0])
    assert not torch.equal(first[0], first[1]) and not torch.equal(first, seeded)


def test_batches_change_no_picture(model, words, cases):
    setting, own = Setting("plms", 3, 2.0), list(range(SAMPLES))
    together = try_on(model, words, cases, "cloth", setting, 0, own, [0, 1, 2])
    assert np.array_equal(together, try_on(model, words, cases, "cloth", setting, 0, own, [0, 1, 2]))
    alone = [try_on(model, words, cases, "cloth", setting, 0, own, [i])[0] for i in range(3)]
    assert np.abs(np.subtract(together, alone, dtype=int)).max() <= 1


@pytest.mark.parametrize("condition", CONDITIONS)
def test_neither_the_truth_nor_the_old_garment_can_reach_an_output(
    condition, world, model, words, tmp_path, monkeypatch
):
    setting, own = Setting("ddim", 2, 1.5), list(range(SAMPLES))
    folder = tmp_path / "world"
    shutil.copytree(world, folder, ignore=shutil.ignore_patterns("fashion200k", "train", "val"))
    cases, test = Cases(folder, "test", SAMPLES), folder / "vitonhd" / "test"
    before = try_on(model, words, cases, condition, setting, 0, own, [0, 1])
    for name in ("truth", "truth-mask", "im_sketch_unpaired", "im_sketch", "image-parse-v3", "openpose_json"):
        shutil.rmtree(test / name)
    (folder / "attributes_test.jsonl").unlink()
    read = MGD.__getitem__

    def in_black(data: MGD, i: int) -> dict:
        item = read(data, i)
        item["person"].paste((0, 0, 0), mask=item["mask"])
        return item

    monkeypatch.setattr(MGD, "__getitem__", in_black)
    assert (np.asarray(cases.data[0]["person"]) == 0).mean() > 0.2
    assert np.array_equal(before, try_on(model, words, cases, condition, setting, 0, own, [0, 1]))


def test_garments_that_training_saw_are_no_test(command, monkeypatch):
    monkeypatch.setattr(generation, "seen_in_training", lambda rows, garments: 3)
    with pytest.raises(UserError, match="^3 of 4 garments have a combination .* this is no test"):
        command()


def test_a_cloth_of_which_the_truth_is_not_told_is_named(world, tmp_path):
    folder = shutil.copytree(world, tmp_path / "toy")
    rows = folder / "attributes_test.jsonl"
    first, *rest = rows.read_text().splitlines(keepends=True)
    rows.write_text("".join(rest))
    with pytest.raises(UserError, match=f"attributes_test.jsonl lacks {json.loads(first)['id']}: draw"):
        Cases(folder, "test", 500)


# The judge


@pytest.mark.parametrize(
    ("rows", "message"), [("", "nothing to train on"), ('\n{"id"', "train.jsonl: line 2 is not whole JSON")]
)
def test_a_world_without_whole_training_rows_has_no_judge(rows, message, tmp_path):
    (tmp_path / "toy.json").write_text("{}")
    (tmp_path / "attributes_train.jsonl").write_text(rows)
    with pytest.raises(UserError, match=message):
        judge.trained_judge(tmp_path, tmp_path / "judges", 1, True)


def test_the_judge_learns_attributes_and_masks(learned, world):
    pictures, masks, rows = training_pictures(world)
    read, found = learned.read(pictures)
    for k in ATTRIBUTES:
        asked = [i for i, g in enumerate(rows) if k != "second" or g["pattern"] != "plain"]
        assert np.mean([read[i][k] == rows[i][k] for i in asked]) > 0.8, k
    assert ((found & masks).sum((1, 2)) / (found | masks).sum((1, 2))).mean() > 0.8


def test_the_judge_is_not_taught_a_second_colour_that_nobody_sees(world):
    _, _, targets = judge.read_training_set(world, True)
    for i, g in enumerate(row["garment"] for row in toy.read_rows(world, "train")):
        unseen = g["pattern"] == "plain"
        wanted = {k: toy.ATTRIBUTES[k].index(g[k]) for k in ATTRIBUTES} | ({"second": -100} if unseen else {})
        assert {k: int(v[i]) for k, v in targets.items()} == wanted


def test_the_judge_reads_pictures_of_any_size(learned, world):
    pictures, masks, _ = training_pictures(world)
    large, large_masks = (x.repeat(2, axis=1).repeat(2, axis=2) for x in (pictures, masks))
    read, found = learned.read(large)
    assert found.shape == large.shape[:3]
    assert ((found & large_masks).sum((1, 2)) / (found | large_masks).sum((1, 2))).mean() > 0.75
    small = learned.read(pictures)[0]
    assert np.mean([a[k] == b[k] for a, b in zip(read, small, strict=True) for k in ATTRIBUTES]) > 0.8


def test_the_judge_reads_the_training_split_alone(world, tmp_path):
    folder = tmp_path / "world"
    shutil.copytree(
        world, folder, ignore=shutil.ignore_patterns("test", "val", "*_test.jsonl", "*_val.jsonl")
    )
    (a, key_a), (b, key_b) = (judge.trained_judge(w, tmp_path / w.name, 2, True) for w in (world, folder))
    assert key_a == key_b
    assert all(
        torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True)
    )


def test_a_trained_judge_is_kept_until_what_made_it_changes(world, tmp_path, monkeypatch):
    first, key = judge.trained_judge(world, tmp_path / "judges", 1, True)
    monkeypatch.setattr(feed, "batch_order", lambda *_: pytest.fail("trained again"))
    again, same = judge.trained_judge(world, tmp_path / "judges", 1, True)
    assert key == same and torch.equal(first.heads["category"].weight, again.heads["category"].weight)
    monkeypatch.undo()
    other = tmp_path / "world"
    shutil.copytree(world, other, ignore=shutil.ignore_patterns("fashion200k", "test", "val"))
    picture = sorted((other / "vitonhd" / "train" / "image").iterdir())[0]
    shutil.copy(sorted(picture.parent.iterdir())[1], picture)
    assert len({key, judge.fingerprint(world, 2), judge.fingerprint(other, 1)}) == 3


# The command


@pytest.mark.slow
def test_the_report_holds_what_a_reader_needs_and_repeats(command, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(runs, "git_commit", lambda: "a commit")  # others may commit meanwhile
    first = command("--seed", "3", "--sheet", str(tmp_path / "sheet.png"))
    printed = capsys.readouterr().out
    assert first["command"].startswith("python -m eval.generation --data toy=")
    assert (
        first["split"] == "test"
        and first["samples"] == 4
        and first["seed"] == 3
        and first["preset"] == "tiny"
    )
    assert first["settings"] == [{"sampler": "plms", "steps": 2, "guidance": PRESETS["tiny"].guidance}]
    assert first["toyfashion"]["version"] == toy.VERSION and first["seen in training"] == 0
    assert first["commit"] == "a commit" and first["torch"] == torch.__version__
    assert len(first["qformer sha256"]) == 64 and first["qformer sha256"] in printed
    assert (
        first["verdict"].startswith("unknown: ") and first["verdict"] in printed
    )  # these weights have no record
    assert len(first["data sha256"]) == 64 and first["data sha256"] in printed
    assert first["palette rule on the truth"] >= 99 and set(ATTRIBUTES) < set(first["judge on the truth"])
    names = [
        "output",
        "truth through the VAE",
        "truth",
        "garments shuffled",
        "no condition",
        "person unchanged",
    ]
    for condition in CONDITIONS:
        rows = first["results"][condition]["rows"]
        assert list(rows) == names and all(name in printed for name in names)
        kinds = {"colour", "attributes", *ATTRIBUTES, "IoU", "PSNR", FRECHET, KID, "changed", "seconds"}
        assert kinds == set(rows["output"]) and all(kind in printed for kind in kinds - {"seconds"})
        assert rows["truth"][FRECHET] == 0 and rows["truth"][KID] == [0, 0, 0]
        assert all(rows[name][FRECHET] >= 0 for name in names)  # of a judge that has learned next to nothing
        assert rows["truth"]["PSNR"] == [99, 99, 99] and rows["truth"]["colour"][0] == 100
        assert all(row["changed"] == 0 for row in rows.values())
        assert len({str(rows[name]["PSNR"]) for name in names}) == 6  # no row is another's
        assert len(first["results"][condition]["differences"]) == 2
    assert (tmp_path / "sheet.png").stat().st_size > 10_000
    again, other = command("--seed", "3"), command("--seed", "4")
    assert timeless(first) == timeless(again) != timeless(other)


def test_a_grid_measures_every_setting_without_controls(command):
    rows = command("--grid", "ddim:2,dpm++:3", "--guidance", "2")["results"]["cloth"]["rows"]
    assert list(rows) == ["ddim 2, guidance 2", "dpm++ 3, guidance 2", "truth through the VAE", "truth"]
    assert rows["ddim 2, guidance 2"]["PSNR"] != rows["dpm++ 3, guidance 2"]["PSNR"]


def test_guidance_is_chosen_on_val(command):
    report = command("--guidances", "1,2.5", "--sampler", "ddim")
    rows = report["results"]["sketch+text"]["rows"]
    assert report["split"] == "val" and report["samples"] == 3  # all there are
    assert "guidance was chosen on toy val of seed 0, and what is reported has the same" in report["verdict"]
    assert list(rows)[:2] == ["ddim 2, guidance 1", "ddim 2, guidance 2.5"]
    assert rows["ddim 2, guidance 1"]["PSNR"] != rows["ddim 2, guidance 2.5"]["PSNR"]
    with pytest.raises(UserError, match="val"):
        command("--guidances", "1,2", "--split", "test")


@pytest.mark.parametrize(
    "flags",
    ["--steps 1", "--steps 501", "--guidance -1", "--guidance nan", "--grid plms", "--grid euler:20", "--guidances a",
     "--samples 1", "--samples 0", "--batch-size 0", "--keep kept", "--generated made", "--judge-steps 0", "--sheet sheet.jpg", "--out no/folder.json", "--data vitonhd"],
)  # fmt: skip
def test_wrong_input_is_refused_before_any_work(command, flags, monkeypatch):
    monkeypatch.setattr(generation, "Cases", lambda *_: pytest.fail("work was begun"))
    with pytest.raises(UserError):
        command(*flags.split())


def test_a_report_that_cannot_be_written_leaves_the_old_one(tmp_path, monkeypatch):
    """`eval.miniature` takes a report that is there for whole."""
    out = tmp_path / "report.json"
    out.write_text("old")
    with pytest.raises(TypeError):
        save_json({"no JSON": object()}, out)
    monkeypatch.setattr(Path, "write_text", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        save_json({}, out)
    assert out.read_text() == "old"
    assert generation.save_json is captioning.save_json is save_json


def test_the_q_formers_hash_ignores_dtype_and_all_other_weights(weights, model):
    wanted = qformer_hash(model)
    other = load_unifashion("tiny", weights, dtype=torch.bfloat16)
    other.image_adapter.weight.mul_(2)
    assert qformer_hash(other) == wanted
    for name, tensor in other.qformer.state_dict().items():
        before = tensor.clone()
        tensor.view(-1)[-1] += 1
        assert qformer_hash(other) != wanted, name
        tensor.copy_(before)
    assert qformer_hash(other) == wanted


# Helpers


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("eval") / "toy"
    return world_of(folder, train=10, val=3, test=SAMPLES, workers=1)


@pytest.fixture(scope="module")
def cases(world) -> Cases:
    return Cases(world, "test", 500)


@pytest.fixture(scope="module")
def drawn(world):
    """(case, garment) -> the case's person drawn in it, and the garment's pixels."""
    rows = {row["id"]: row["person"] for row in toy.read_rows(world, "test")}
    people = [rows[person] for person, _ in Cases(world, "test", 500).pairs]
    kept = {}

    def draw(i: int, g: toy.Garment) -> tuple[np.ndarray, np.ndarray]:
        if (i, g) not in kept:
            worn = toy.draw_person(toy.Person(**people[i]), g)
            kept[i, g] = np.asarray(worn["image"]), np.asarray(worn["garment"]) > 0
        return kept[i, g]

    return draw


@pytest.fixture(scope="module")
def oracle(world, cases, drawn) -> "Oracle":
    others, own = cases.shuffled(0), Cases(world, "test", 500)
    rows = {row["id"]: toy.Garment(**row["garment"]) for row in toy.read_rows(world, "test")}
    known = []
    for i, (person, _) in enumerate(own.pairs):
        known += [(*drawn(i, g), g) for g in (rows[person], cases.garments[i], cases.garments[others[i]])]
    return Oracle(known)


class Oracle:
    """A judge without error: it knows every picture there is, and takes a new one for the nearest."""

    def __init__(self, known: list[tuple[np.ndarray, np.ndarray, toy.Garment]]) -> None:
        self.pictures = np.stack([picture for picture, _, _ in known]).astype(np.float32)
        self.known = known

    def read(self, pictures: np.ndarray) -> tuple[list[dict[str, str]], np.ndarray]:
        nearest = [np.abs(self.pictures - picture).mean((1, 2, 3)).argmin() for picture in pictures]
        return [asdict(self.known[k][2]) for k in nearest], np.stack([self.known[k][1] for k in nearest])


@pytest.fixture(scope="module")
def weights(tmp_path_factory) -> Iterator[Path]:
    patch = pytest.MonkeyPatch()
    yield write_weights(tmp_path_factory.mktemp("weights"), patch)
    patch.undo()


@pytest.fixture(scope="module")
def model(weights) -> UniFashion:
    return load_unifashion("tiny", weights)


@pytest.fixture(scope="module")
def words(weights) -> WordPiece:
    return tokenizer("tiny", weights)


@pytest.fixture(scope="module")
def learned(world) -> judge.Judge:
    return judge.train(world, 40, True)


@pytest.fixture
def command(world, weights, tmp_path_factory, tmp_path):
    """Run the command on a few cases with few steps -> its JSON."""

    def run(*flags: str) -> dict:
        judges, out = tmp_path_factory.getbasetemp() / "judges", tmp_path / "report.json"
        few = f"--data toy={world} --weights {weights} --samples 4 --steps 2 --judge {judges} --judge-steps 1 --quiet"
        generation.main([*few.split(), "--device", "cpu", "--out", str(out), *flags])
        return json.loads(out.read_text())

    return run


def recorded(monkeypatch: pytest.MonkeyPatch) -> list[tuple]:
    """The arguments of every call of `UniFashion.sample` from now on."""
    calls, sample = [], UniFashion.sample

    def listen(self, *args):
        calls.append(args)
        return sample(self, *args)

    monkeypatch.setattr(UniFashion, "sample", listen)
    return calls


def timeless(report: dict) -> str:
    """A report without its times and its command."""
    for result in report["results"].values():
        for row in result["rows"].values():
            row.pop("seconds")
    return json.dumps({k: v for k, v in report.items() if k not in ("seconds", "command", "seed")})


def training_pictures(world: Path) -> tuple[np.ndarray, np.ndarray, list[dict]]:
    """The training persons of a small world, redrawn: pictures, garment masks, attributes."""
    rows = toy.read_rows(world, "train")
    worn = [toy.draw_person(toy.Person(**row["person"]), toy.Garment(**row["garment"])) for row in rows]
    pictures, masks = (np.stack([np.asarray(w[k]) for w in worn]) for k in ("image", "garment"))
    return pictures, masks > 0, [row["garment"] for row in rows]
