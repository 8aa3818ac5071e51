"""The evaluation of composed search against ranks that are known; its pools, captions and controls; and the command itself."""

import hashlib
import json
import os
import re
import shutil
from argparse import Namespace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from eval import composed, pools, report
from eval.composed import (
    COMPOSED,
    EMPTY,
    NO_CAPTIONS,
    NO_IMAGES,
    PICTURE,
    SHUFFLED,
    TEXT,
    WHITE,
    judge,
    judge_all,
)
from eval.pools import ORIGINAL, VAL, Pool, captions_of
from eval.report import Fingerprint, shuffled
from eval.truth import look
from tests.goldens import GOLDEN
from tests.rooms import SMALL, write_weights
from tests.worlds import world_of
from unifashion import UserError, seen
from unifashion.config import PRESETS
from unifashion.data import toy
from unifashion.data.fashioniq import CATEGORIES, FashionIQ, FashionIQCap, Triplet, joined
from unifashion.preprocess import qformer_image
from unifashion.search import qformer_hash
from unifashion.tokenizers import blip_caption
from weights.load import load_unifashion, tokenizer

pytestmark = pytest.mark.usefixtures("one_thread")

GOLD = json.loads((GOLDEN / "recall.json").read_text())
SAMPLES = Path(os.environ.get("UNIFASHION_SAMPLES", "/nonexistent"))


# What is searched


def test_a_pool_of_fashioniq_is_its_category_with_the_reference_in_it():
    dress, shirt = pools.pools_of(small_data())
    assert (dress.name, dress.ids, shirt.name, shirt.ids) == ("dress", ["a", "b", "c"], "shirt", ["d", "e"])
    assert dress.right.int().tolist() == [[0, 1, 0], [1, 0, 0]] and shirt.right.int().tolist() == [[0, 1]]
    assert [row.reference for row in dress.rows] == ["a", "c"]
    assert dress.texts == ["Is red and has a bow", "Is longer and is blue"]  # "C1 and c2"
    assert dress.kinds[ORIGINAL].all() and dress.kinds[VAL].tolist() == [True, True, True]
    without = small_data()
    without.rows = without.rows[:1]
    inner = pools.pools_of(SimpleNamespace(**vars(without) | {"pools": {"dress": ["a", "b", "c"]}}))[0]
    assert inner.kinds[VAL].tolist() == [True, True, False]  # nobody asks from or for c
    narrow = inner.of(VAL, torch.tensor([True]))
    assert narrow.ids == ["a", "b"] and narrow.right.int().tolist() == [[0, 1]]
    with pytest.raises(UserError, match="there are no queries of shirt"):
        pools.pools_of(without)


def test_in_one_pool_whatever_looks_like_the_target_is_right():
    pool = pools.one_pool(small_data(), {"a": 7, "b": 8, "c": 9, "d": 8, "e": 7})
    assert pool.ids == [*"abcde"] and len(pool.rows) == 3
    assert pool.right.int().tolist() == [[0, 1, 0, 1, 0], [1, 0, 0, 0, 1], [1, 0, 0, 0, 1]]


def test_twins_in_toyfashion_are_those_of_the_worlds_truth(world):
    data = FashionIQ(world / "fashioniq", "test")
    pool = pools.toy_pool(world, data, "test")
    rows = [toy.Garment(**row["garment"]) for row in toy.read_rows(world, "test")]
    of = dict(zip(sorted(pool.ids), rows, strict=True))  # ids are running numbers, in the world's order
    assert len(pool.ids) == 30 and len(pool.rows) > 20
    for i, row in enumerate(pool.rows):
        for j, name in enumerate(pool.ids):
            assert pool.right[i, j].item() == (look(of[name]) == look(of[row.target]))
    assert not pool.right[:, :].all(1).any() and pool.right.any(1).all()


def test_garments_that_training_saw_are_no_test(world, monkeypatch):
    monkeypatch.setattr(pools, "seen_in_training", lambda rows, garments: 3)
    with pytest.raises(UserError, match="^3 of 30 garments have a combination .* this is no test"):
        pools.toy_pool(world, FashionIQ(world / "fashioniq", "test"), "test")


# Captions


def test_a_caption_is_found_by_its_pictures_name_in_lines_and_in_lists(tmp_path):
    pool = Pool("dress", ["a", "b"], [], torch.zeros(0, 2))
    lines = write(
        tmp_path / "x.jsonl", [caption("some/folder/b.png", "B"), caption("a", "A"), caption("z", "Z")]
    )
    assert [row["caption"] for row in captions_of([lines], pool)] == ["A", "B"]
    listed = tmp_path / "x.json"
    listed.write_text(json.dumps([caption("b", "\nB"), caption("a", "A") | {"text_guidance": "is red"}]))
    rows = captions_of([listed], pool)
    assert [row["caption"] for row in rows] == ["A", "\nB"] and rows[0]["text_guidance"] == "is red"


def test_of_several_styles_the_detailed_one_is_taken_and_of_several_files_the_pools_own(tmp_path):
    pool = Pool("dress", ["a"], [], torch.zeros(0, 1))
    short, long = (caption("a", style) | {"style": style} for style in ("fashion200k", "fashioniq-cap"))
    for rows in ([short, long], [long, short]):
        assert captions_of([write(tmp_path / "x.jsonl", rows)], pool) == [long]
    assert captions_of([write(tmp_path / "x.jsonl", [short])], pool) == [short]
    files = [
        write(tmp_path / f"val.{kind}.jsonl", [caption("a", kind)]) for kind in ("shirt", "dress", "toptee")
    ]
    assert captions_of(files, pool) == [caption("a", "dress")]
    assert captions_of(files[::2], pool) == [caption("a", "shirt")]


@pytest.mark.parametrize(
    ("rows", "told"),
    [
        ([("a", "A")], "1 of 2 pictures of the pool dress have no caption, or an empty one, b for one"),
        (
            [("a", "A"), ("b", " \n")],
            "1 of 2 pictures of the pool dress have no caption, or an empty one, b for one",
        ),
        ([("a", "A"), ("b", "B"), ("x/b.png", "C")], "x/b.png has two captions"),
    ],
)
def test_captions_that_do_not_fit_the_pool_are_refused(rows, told, tmp_path):
    file = write(tmp_path / "x.jsonl", [caption(*row) for row in rows])
    with pytest.raises(UserError, match=told):
        captions_of([file], Pool("dress", ["a", "b"], [], torch.zeros(0, 2)))


def test_captions_of_other_pictures_of_the_same_names_are_refused(tmp_path):
    """Every ToyFashion numbers its pictures from 0."""
    (tmp_path / "images").mkdir()
    for name in ("a", "b"):
        (tmp_path / f"images/{name}.png").write_bytes(name.encode())
    data, pool = Namespace(root=tmp_path), Pool("dress", ["a", "b"], [], torch.zeros(0, 2))
    rows = [caption(name, "x") | {"sha256": hashlib.sha256(name.encode()).hexdigest()} for name in ("a", "b")]
    pools.check_captions(data, pool, rows)
    pools.check_captions(data, pool, [rows[0], caption("b", "x")])  # the released ones note nothing
    told = (
        "^1 of 2 captions of the pool dress were written of another file of that name, images/b.png for one"
    )
    with pytest.raises(UserError, match=told):
        pools.check_captions(data, pool, [rows[0], rows[0]])


def test_all_damaged_pictures_of_a_pool_are_named_at_once(tmp_path):
    (tmp_path / "images").mkdir()
    Image.new("RGB", (3, 4)).save(tmp_path / "images/a.png")
    for name in ("b.png", "c.jpg"):
        (tmp_path / "images" / name).write_text("<html>")
    searched = [Pool("all", ["a", "b", "c"], [], torch.zeros(0, 3))]
    with pytest.raises(UserError, match="2 of 3 pictures are damaged: images/b.png, images/c.jpg"):
        pools.check_pictures(SimpleNamespace(root=tmp_path), searched)


# What the model says


def test_every_row_of_the_table_is_what_it_says(world, weights):
    model, words = load_unifashion("tiny", weights, draws=False), tokenizer("tiny", weights)
    data = FashionIQ(world / "fashioniq", "test")
    pool = pools.toy_pool(world, data, "test")
    captions = [f"{'abcdefghij'[i % 10]} red dress" for i in range(len(pool.ids))]
    args = Namespace(batch_size=7, quiet=True, seed=0)
    found = composed.search(model, words, data, pool, captions, args, Fingerprint())["original"]

    former, of = model.qformer, {name: i for i, name in enumerate(pool.ids)}

    def see(names: list[str]) -> torch.Tensor:
        return model.see(torch.stack([qformer_image(data.open(name), 28) for name in names]))

    def text_of(texts: list[str]) -> tuple[torch.Tensor, torch.Tensor]:
        return words.encode([blip_caption(text) for text in texts], 12)

    def rank(scores: np.ndarray) -> list[int]:
        places = []
        for score, right in zip(scores, pool.right.numpy(), strict=True):
            places.append(1 + int((score[~right] >= score[right].max()).sum()))
        return places

    references = [row.reference for row in pool.rows]
    texts = [joined(row.captions, 0) for row in pool.rows]
    z_t = former.embed_image(former(see(pool.ids))[0])
    z_c = former.embed_text(former(None, *text_of(captions))[1])

    blank = torch.stack([qformer_image(Image.new("RGB", (9, 9), "white"), 28)] * len(references))
    white = model.see(blank)

    def fused(texts: list[str], seen: torch.Tensor | None = None) -> torch.Tensor:
        seen = see(references) if seen is None else seen
        return former.embed_text(former(seen, *text_of(texts))[1])

    def pictures_term(query: torch.Tensor) -> torch.Tensor:
        return torch.stack([(z_t @ q).amax(-1) for q in query])

    def both(query: torch.Tensor) -> torch.Tensor:
        return pictures_term(query) + query @ z_c.T

    e_cls = fused(texts)
    own = z_t[[of[name] for name in references]]
    wanted = {
        COMPOSED: both(e_cls),
        NO_CAPTIONS: pictures_term(e_cls),
        NO_IMAGES: e_cls @ z_c.T,
        PICTURE: torch.stack([(z_t * q).sum(-1).mean(-1) for q in own]),
        EMPTY: both(fused([""] * len(texts))),
        TEXT: both(former.embed_text(former(None, *text_of(texts))[1])),
        WHITE: both(fused(texts, white)),
        SHUFFLED: both(fused([texts[i] for i in shuffled(range(len(texts)), 0)])),
    }
    assert list(found) == list(wanted)
    for row, scores in wanted.items():
        assert found[row].tolist() == rank(scores.numpy()), row
    assert len({tuple(ranks.tolist()) for ranks in found.values()}) == len(found)

    bare = composed.search(model, words, data, pool, None, args, Fingerprint())["original"]
    assert list(bare) == [COMPOSED, PICTURE, EMPTY, TEXT, WHITE, SHUFFLED]
    assert torch.equal(bare[COMPOSED], found[NO_CAPTIONS]) and torch.equal(bare[PICTURE], found[PICTURE])
    assert bare[TEXT].tolist() == rank(
        pictures_term(former.embed_text(former(None, *text_of(texts))[1])).numpy()
    )


# How it is judged


def test_figures_that_can_be_had_by_head():
    of = [Pool("dress", [*"ab"] * 50, [None] * 4, torch.eye(4, 100).bool())]
    of += [Pool("shirt", [*"ab"] * 100, [None] * 2, torch.eye(2, 200).bool())]
    found = {
        "dress": ranked(
            composed=[1, 10, 11, 51],
            picture=[1, 99, 99, 99],
            empty=[1, 1, 50, 99],
            text=[99] * 4,
            white=[50] * 4,
        ),
        "shirt": ranked(composed=[10, 50], picture=[1, 1], empty=[99, 99], text=[10, 99], white=[99, 99]),
    }
    result = judge(found, of)

    def figures(row: str, pool: str) -> list[float]:
        return [figure[0] for figure in result["recall"][row][pool]]

    assert figures(COMPOSED, "dress") == [50, 75, 62.5] and figures(COMPOSED, "shirt") == [50, 100, 75]
    assert figures(COMPOSED, "mean") == [50, 87.5, 68.75]  # of pools, not of queries
    assert figures("chance", "dress") == pytest.approx([10, 50, 30])
    assert figures("chance", "mean") == pytest.approx([7.5, 37.5, 22.5])
    assert figures(PICTURE, "mean")[0] == 62.5 > figures(EMPTY, "mean")[0] == 25
    assert result["controls"] == [PICTURE, TEXT]
    less = result["differences"]
    assert [f[0] for f in less[f"composed less {PICTURE}"]] == [-12.5, 25, 6.25]
    assert [f[0] for f in less[f"composed less {TEXT}"]] == [25, 62.5, 43.75]
    found["shirt"][EMPTY], found["shirt"][PICTURE] = found["shirt"][PICTURE], found["shirt"][EMPTY]
    found["shirt"][WHITE] = torch.tensor([10, 10])
    result = judge(found, of)
    assert result["controls"] == [EMPTY, WHITE] and f"composed less {WHITE}" in result["differences"]


def test_the_same_ranks_are_not_of_both_kinds_of_pools_nor_of_queries_whose_target_is_seen(
    world, weights, monkeypatch
):
    """Scores of all candidates, from which both kinds' ranks must come as if the others were not there."""
    data = FashionIQ(world / "fashioniq", "val")
    pool = max(pools.pools_of(data), key=lambda pool: len(pool.ids))
    pool = pool.of(ORIGINAL, torch.arange(len(pool.rows)) < 5)
    keep = torch.arange(len(pool.ids)) % 3 > 0
    keep |= pool.right.any(0)
    pool.kinds[VAL] = keep
    scores = torch.rand(len(pool.rows), len(pool.ids), generator=torch.Generator().manual_seed(0))
    for part in ("composed_scores", "image_to_image"):
        monkeypatch.setattr(composed, part, lambda *_: scores)
    model, words = load_unifashion("tiny", weights, draws=False), tokenizer("tiny", weights)
    args = Namespace(batch_size=50, quiet=True, seed=0)
    found = composed.search(model, words, data, pool, None, args, Fingerprint())
    for kind, of in ((ORIGINAL, torch.ones_like(keep)), (VAL, keep)):
        best = torch.where(pool.right, scores, -1).amax(1)
        wanted = 1 + ((scores >= best[:, None]) & ~pool.right & of).sum(1)
        assert found[kind][COMPOSED].tolist() == wanted.tolist()
    assert found[VAL][COMPOSED].tolist() != found[ORIGINAL][COMPOSED].tolist()

    results = judge_all({pool.name: found}, [pool], {pool.rows[0].target})
    assert list(results) == [ORIGINAL, VAL, f"{ORIGINAL}{composed.UNSEEN}", f"{VAL}{composed.UNSEEN}"]
    asked = torch.tensor([row.target != pool.rows[0].target for row in pool.rows])
    for kind in (ORIGINAL, VAL):
        for name, of in ((kind, asked | True), (f"{kind}{composed.UNSEEN}", asked)):
            hit = 100 * (found[kind][COMPOSED][of] <= 10).double().mean().item()
            assert results[name]["recall"][COMPOSED]["mean"][0][0] == pytest.approx(hit, abs=1e-4)
        lucky = [results[name]["recall"]["chance"]["mean"][0][0] for name in (ORIGINAL, VAL)]
        assert lucky[0] < lucky[1]  # among fewer it is easier
    every = {row.target for row in pool.rows}
    assert list(judge_all({pool.name: found}, [pool], every)) == [ORIGINAL, VAL]


def test_intervals_have_the_width_of_theory_and_those_of_differences_know_the_pairs():
    n = 400
    of = [Pool("all", [""] * n, [None] * n, torch.eye(n).bool())]
    hit = [1 if i < 0.6 * n else 99 for i in range(n)]
    worse = [1 if i < 0.5 * n else 99 for i in range(n)]
    result = judge(
        {"all": ranked(composed=hit, picture=worse, empty=[99] * n, text=worse, white=[99] * n)}, of
    )
    figure, low, high = result["recall"][COMPOSED]["mean"][0]
    half = 196 * np.sqrt(0.6 * 0.4 / n)
    assert figure == 60 and abs(low - (60 - half)) < 1 and abs(high - (60 + half)) < 1
    figure, low, high = result["differences"][f"composed less {TEXT}"][0]
    half = 196 * np.sqrt(0.1 * 0.9 / n)  # who hits with the control hits with the model, too
    assert figure == 10 and abs(low - (10 - half)) < 1 and abs(high - (10 + half)) < 1


# The command


def test_the_command_prints_what_a_reader_needs_and_repeats(command, weights, tmp_path):
    printed = command("--out", tmp_path / "figures.json")
    report = dict(re.findall(r"^(\S.*?) {2,}(.*)$", printed, re.MULTILINE))
    assert report["command"].startswith("python -m eval.composed --data toy=")
    assert report["candidates"] == "{'all': 30}" and report["split"] == "test"
    assert report["reference"].startswith("stays in the pool") and report["captions"].startswith("none")
    model = load_unifashion("tiny", weights, draws=False)
    assert report["qformer sha256"] == qformer_hash(model)
    for row in (COMPOSED, PICTURE, EMPTY, TEXT, WHITE, SHUFFLED, "chance"):
        assert len(re.findall(rf"^{row}  .*\d", printed, re.MULTILINE)) == 1, row
    assert NO_CAPTIONS not in printed and "UniFashion, Table 4" not in printed and "drawn pictures" in printed
    saved = json.loads((tmp_path / "figures.json").read_text())
    assert saved["recall"][COMPOSED]["all"] == saved["recall"][COMPOSED]["mean"] and saved["leak"] == {}
    assert figures_of(command("--batch-size", "5")) == figures_of(printed)
    assert qformer_hash(model) in command("--dtype", "bf16", "--split", "val")


def test_captions_are_checked_used_and_told(command, world, tmp_path):
    names = [path.stem for path in (world / "fashioniq/images").iterdir()]
    rows = [
        caption(f"images/{name}.png", f"dress {name[-1]}") | {"model": "ours 1a2b"} for name in sorted(names)
    ]
    printed = command("--captions", write(tmp_path / "c.jsonl", rows), "--out", tmp_path / "figures.json")
    assert re.search(r"^captions by +ours 1a2b$", printed, re.MULTILINE)
    assert re.search(r"^leaks +none found\. all: \d+ queries, 30 candidates", printed, re.MULTILINE)
    assert re.search(r"^captions cut at 12 tokens +0 of 30$", printed, re.MULTILINE)
    for row in (COMPOSED, NO_CAPTIONS, NO_IMAGES):
        assert re.search(rf"^{row}  .*\d", printed, re.MULTILINE)
    assert json.loads((tmp_path / "figures.json").read_text())["leak"]["all"]["reasons"] == []


def test_captions_that_leak_are_refused_before_any_work_unless_allowed(command, world, tmp_path, monkeypatch):
    rows = [row | {"text_guidance": "is red"} for row in known_captions(world)]
    flags = ("--captions", write(tmp_path / "c.jsonl", rows))
    printed = command(*flags, "--allow-leaky-captions")
    assert re.search(r"^leaks +LEAKY, and allowed: all: 30 of 30 have a text_guidance", printed, re.MULTILINE)
    monkeypatch.setattr(composed, "load", lambda *_: pytest.fail("work was begun"))
    with pytest.raises(UserError, match="text_guidance"):
        command(*flags)


def test_fashioniq_itself_is_set_beside_the_paper(command, world):
    printed = command("--data", f"fashioniq={world / 'fashioniq'}")
    assert "\nThese pictures are drawn: they say nothing about photographs" in printed
    assert re.search(r"^toyfashion +\{'version': 1", printed, re.MULTILINE)
    assert re.search(r"^split +val$", printed, re.MULTILINE)
    for kind in CATEGORIES:
        assert f"{kind} R@10" in printed
    assert re.search(r"^UniFashion, Table 4 +58\.93 +76\.93 +67\.93$", printed, re.MULTILINE)
    assert re.search(r"^the same, w/o captions +55\.27 +74\.80 +65\.04$", printed, re.MULTILINE)
    told = re.findall(rf"^{COMPOSED}  (.*)$", printed, re.MULTILINE)
    assert len(told) == 2 and all(len(row.split("]")) == 4 * 3 + 1 for row in told)  # of each kind of pool
    assert re.search(r"^original pools$.*^VAL pools$", printed, re.MULTILINE | re.DOTALL)


def test_missing_queries_or_pictures_are_told_before_any_work(command, world, tmp_path, monkeypatch):
    monkeypatch.setattr(composed, "load", lambda *_: pytest.fail("work was begun"))
    folder = Path(shutil.copytree(world / "fashioniq", tmp_path / "fashioniq"))
    with pytest.raises(
        UserError, match=r"dress has \d+ queries and \d+ pictures, not 2017 and 3817, and of others"
    ):
        command("--data", f"fashioniq={folder}")
    monkeypatch.setattr(pools, "WHOLE", {})
    gone = FashionIQ(folder, "val").pools["toptee"][1]
    (folder / f"images/{gone}.png").unlink()
    with pytest.raises(UserError, match=rf"lacks 1 of \d+ pictures, images/{gone}.png for one"):
        command("--data", f"fashioniq={folder}")


@pytest.mark.parametrize(
    ("flags", "told"),
    {
        "--batch-size 0": "--batch-size must be at least 1",
        "--seed -1": "--seed 0 or more",
        "--out no/folder.json": "no/folder.json cannot be written",
        "--out .": ". cannot be written",
        "--data vitonhd": "unknown data set 'vitonhd'",
        "--data fashioniq --split test": "Fashion-IQ's test has no published targets",
        "--captions no.jsonl": "no.jsonl cannot be read",
        "--captions": "--captions: expected at least one argument",
        "--split train": "--split: invalid choice: 'train'",
    }.items(),
)
def test_wrong_input_is_refused_before_any_work(command, flags, told, monkeypatch):
    monkeypatch.setattr(composed, "load", lambda *_: pytest.fail("work was begun"))
    with pytest.raises(UserError, match=re.escape(told)):
        command(*flags.split())


def test_the_figures_are_kept_though_nobody_reads_what_is_printed(command, tmp_path, monkeypatch):
    def unread(*_, **__):
        raise BrokenPipeError

    monkeypatch.setattr(composed, "print", unread, raising=False)
    with pytest.raises(BrokenPipeError):
        command("--out", tmp_path / "out.json")
    assert json.loads((tmp_path / "out.json").read_text())["recall"]


@pytest.mark.skipif(not SAMPLES.is_dir(), reason="needs the sample annotations: set UNIFASHION_SAMPLES")
@pytest.mark.parametrize("guided", [True, False])
def test_the_released_captions_are_refused_also_without_their_guidance(command, tmp_path, guided):
    files = []
    for kind in CATEGORIES:
        rows = json.loads((SAMPLES / f"fashioniq_cap/next_llava.val.{kind}.caption.json").read_text())
        rows = rows if guided else [{k: row[k] for k in ("image", "caption")} for row in rows]
        files.append(tmp_path / f"next_llava.val.{kind}.caption.json")
        files[-1].write_text(json.dumps(rows))
    with pytest.raises(UserError, match="written with the queries' texts at hand") as refusal:
        command("--data", f"fashioniq={SAMPLES / 'fashioniq'}", "--captions", *files)
    assert ("2017 of 3817 have a text_guidance" in str(refusal.value)) == guided


@pytest.mark.skipif(not SAMPLES.is_dir(), reason="needs the sample annotations: set UNIFASHION_SAMPLES")
def test_fashioniqs_own_pools_have_the_published_sizes_and_143_of_its_targets_are_seen(tmp_path):
    data, gold = FashionIQ(SAMPLES / "fashioniq", "val", pictures=False), GOLD["fashioniq_sizes"]
    pools.check_whole(data)
    del data.pools["shirt"][0]
    with pytest.raises(UserError, match="shirt has 2038 queries and 6345 pictures, not 2038 and 6346"):
        pools.check_whole(data)
    data = FashionIQ(SAMPLES / "fashioniq", "val", pictures=False)
    for pool in pools.pools_of(data):
        of, k = gold[pool.name], pool.kinds
        assert len(pool.rows) == of["triplets"]
        assert int(k[ORIGINAL].sum()) == of["original_split_candidates"]
        assert int(k[VAL].sum()) == of["VAL_split_candidates(union of reference and target)"]
        for kind, split in ((ORIGINAL, "original"), (VAL, "VAL")):
            narrow = pool.of(kind, torch.ones(len(pool.rows), dtype=torch.bool))
            for at in (10, 50):
                lucky = report.chance(narrow.right.sum(1), len(narrow.ids), at)
                assert lucky == pytest.approx(of[f"chance_R@{at}_{split}_%"], abs=1e-9)
    train = {"seen.fashioniq": seen.hashes(seen.items(FashionIQ(SAMPLES / "fashioniq", "train", False))[1])}
    for record, says in ((train, "the model's record"), ({}, "the train split here")):
        save_file({"x": torch.ones(1), **record}, tmp_path / "model.safetensors")
        found, told = pools.seen_targets(data, tmp_path / "model.safetensors")
        of = {c: sum(row.target in found for row in data.rows if row.category == c) for c in CATEGORIES}
        assert len(found) == 143 and of == {"dress": 0, "shirt": 72, "toptee": 71} and told.startswith(says)


def test_the_notes_recall_is_had_through_the_evaluations_own_functions():
    """As pools of one category: the golden's scores, ranked as `search` does, and judged."""
    rng = np.random.RandomState(7)
    for shape in ((60, 16), (180, 16), (10, 10), (10, 10), (10, 10)):
        rng.randn(*shape)
    scores, target = torch.from_numpy(rng.randn(40, 200)), 7 * torch.arange(40) % 200
    scores[torch.arange(40), target] += 1.5
    assert scores.sum().item() == pytest.approx(GOLD["fiq"]["checksum"] + 0, abs=1e-6)
    pool = Pool("all", [*map(str, range(200))], [None] * 40, target[:, None] == torch.arange(200))
    places = composed.ranks(scores, pool.right)
    rows = (COMPOSED, PICTURE, EMPTY, TEXT, WHITE)
    result = judge({"all": dict.fromkeys(rows, places)}, [pool])["recall"][COMPOSED]["all"]
    assert {"R@10": result[0][0], "R@50": result[1][0]} == GOLD["fiq"]["result"]


# Helpers


def small_data() -> SimpleNamespace:
    rows = [
        Triplet("dress", "a", "b", ("is red.", "has a bow")),
        Triplet("dress", "c", "a", ("is longer", "is blue?")),
        Triplet("shirt", "d", "e", ("is green", "")),
    ]
    return SimpleNamespace(root="data", rows=rows, pools={"dress": ["a", "b", "c"], "shirt": ["d", "e"]})


def ranked(**of: list[int]) -> dict[str, torch.Tensor]:
    names = {"composed": COMPOSED, "picture": PICTURE, "empty": EMPTY, "text": TEXT, "white": WHITE}
    return {names[row]: torch.tensor(ranks) for row, ranks in of.items()}


def caption(image: str, text: str) -> dict:
    return {"image": image, "caption": text}


def known_captions(world: Path) -> list[dict]:
    data = FashionIQCap(world / "fashioniq", "test")
    return [caption(row["image"], row["caption"]) for _, row in data.rows]


def write(path: Path, rows: list[dict]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def figures_of(printed: str) -> str:
    return printed.split("\n\n", 1)[1]


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("composed") / "toy"
    return world_of(folder, "fashioniq", "fashioniq/captions", train=3, val=30, test=30, workers=2)


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
        composed.main([str(x) for x in given])
        return capsys.readouterr().out

    return run
