"""The guard against captions that were written with the queries at hand: what it refuses, by which sign, and what it lets pass."""

import json
import math
import os
import random
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from eval import leaks
from eval.leaks import bm25_ranks, check, copied, own_file, surely, text_alone, words
from tests.cases import others_slow
from unifashion import UserError, training
from unifashion.data.texts import WORDS, choose, detailed, flat
from unifashion.data.world import COMBINATION, sample_garment

ROOT = Path(__file__).parent.parent
SAMPLES = Path(os.environ.get("UNIFASHION_SAMPLES", "/nonexistent"))
CATEGORIES = ("dress", "shirt", "toptee")
needs_samples = pytest.mark.skipif(
    not SAMPLES.is_dir(), reason="needs the sample annotations: set UNIFASHION_SAMPLES"
)
Case = tuple[list[dict], list[tuple[str, str]], list[str]]  # rows, queries, pool


# Captions that are honest


@pytest.mark.parametrize("told", [1, 2, 4])
@pytest.mark.parametrize("n", others_slow([200, 600, 2000], 200, 600))
def test_toyfashions_own_captions_pass_although_queries_speak_their_very_words(n: int, told: int):
    found = check(*toy(n, told))
    assert found.reasons == ()
    if told > 1 and n > 200:  # and far better than by chance: that alone is no leak
        assert found.recall10 > 5 * found.shuffled10 > 0 and found.found > 8


def test_captions_that_have_nothing_to_do_with_the_queries_pass():
    found = check(*prose(600))
    assert found.reasons == () and found.recall10 < 5 and found.copied == 0


def test_figures_are_the_same_whatever_the_order_of_the_rows():
    rows, queries, pool = toy(300, 2)
    assert check(rows[::-1], queries, pool) == check(rows, queries, pool)


# Signs


def test_one_text_guidance_is_enough():
    rows, queries, pool = toy(60, 2)
    assert refusal([rows[0] | {"text_guidance": "is red"}, *rows[1:]], queries, pool) == ["guided"]
    for empty in ("", "  \n", None):
        assert check([row | {"text_guidance": empty} for row in rows], queries, pool).guided == 0
    listed = [rows[0] | {"text_guidance": ["is red", "has dots"]}, *rows[1:]]
    assert refusal(listed, queries, pool) == ["guided"]
    elsewhere = {"image": "of another category", "caption": "a shirt", "text_guidance": "is red"}
    assert check([*rows, elsewhere], queries, pool).reasons == ()


def test_the_querys_text_in_the_targets_caption_is_found_and_copied():
    rows, queries, pool = prose(600)
    texts = {target: text for text, target in queries}
    leaky = [row | {"caption": f"{row['caption']} {texts.get(row['image'], '')}"} for row in rows]
    assert refusal(leaky, queries, pool) == ["found", "copied"]


def test_the_querys_words_in_another_order_are_found():
    rows, queries, pool = prose(600)
    texts = {target: text.split() for text, target in queries}

    def strewn(row: dict) -> str:
        """The query's words from the last to the first, each between two of the caption's."""
        own = row["caption"].split()
        told = texts.get(row["image"], [])[::-1]
        return " ".join([word for pair in zip(own, told, strict=False) for word in pair] + own[len(told) :])

    leaky = [row | {"caption": strewn(row)} for row in rows]
    assert refusal(leaky, queries, pool) == ["found"]


def test_a_copy_into_every_fifth_targets_caption_is_seen():
    rows, queries, pool = prose(600)
    texts = {target: text for text, target in queries[::5]}
    leaky = [row | {"caption": f"{row['caption']} {texts.get(row['image'], '')}"} for row in rows]
    assert refusal(leaky, queries, pool) == ["copied"]


def test_phrases_that_other_captions_have_too_are_no_copies():
    captions = [words(x) for x in ("a red dress with long sleeves", "a blue top with long sleeves", "a coat")]
    asks = [words(x) for x in ("with long sleeves", "is a red dress", "red a dress", "a coat", "a red")]
    assert copied(captions, asks, np.array([0, 0, 0, 2, 0])).tolist() == [False, True, False, False, False]
    assert copied(captions, asks[1:2], np.array([1])).tolist() == [False]
    twice = [words("big blue bow and a big blue bow"), []]
    assert copied(twice, [words("big blue bow")], np.array([0])).tolist() == [True]  # of one caption still


def test_captions_of_every_style_are_looked_at():
    rows, queries, pool = prose(600)
    second = [{"image": target, "caption": text, "style": "fashiongen"} for text, target in queries]
    assert refusal([*rows, *second], queries, pool) == ["found", "copied"]
    assert refusal([*second, *rows], queries, pool) == ["found", "copied"]


def test_an_image_may_be_named_by_its_path():
    rows, queries, pool = toy(250, 2)
    paths = [row | {"image": f"data/fashioniq/images/{row['image']}.png"} for row in rows]
    assert check(paths, queries, pool) == check(rows, queries, pool)


def test_captions_of_a_part_of_the_pool_are_judged_by_that_part():
    rows, queries, pool = prose(750)  # of which 500 are captioned
    leaky = [{"image": target, "caption": text} for text, target in queries]
    asked = [*queries, *((f"another thing {i}", f"silent{i}") for i in range(3000))]
    every = [*pool, *(target for _, target in asked[len(queries) :])]
    assert refusal(leaky, asked, every) == ["found", "copied"]
    assert check(leaky, asked, every, allow=True) == check(leaky, queries, pool, allow=True)
    assert "too few" in check(leaky[:100], asked, every, allow=True).figures()


def test_in_few_candidates_only_what_can_be_told_is_told():
    for n, signs in ((100, []), (300, ["found"]), (750, ["found", "copied"])):  # two thirds are captioned
        rows, queries, pool = prose(n)
        leaky = [{"image": target, "caption": text} for text, target in queries]
        assert refusal(leaky, queries, pool) == signs
        told = check(leaky, queries, pool, allow=True).figures()
        missing = [sign for sign in ("found", "copied") if sign not in signs]
        assert ("too few" in told) == (n < 750) and f"by {' or '.join(missing)})" * bool(missing) in told


def test_of_few_queries_even_all_are_not_much():
    assert [round(surely(np.array(x)), 1) for x in ([True], [True] * 10, [False])] == [20.7, 72.2, 0.0]
    p, n, z = 0.3, 200, 1.96  # Wilson's lower end solves p - low = z sqrt(low (1 - low) / n)
    low = surely(np.arange(n) < p * n) / 100
    assert math.isclose(p - low, z * math.sqrt(low * (1 - low) / n), rel_tol=1e-9)
    rows, queries, pool = prose(300)
    leaky = [{"image": target, "caption": text} for text, target in queries]
    for n, signs in ((2, []), (3, ["found"])):
        assert check(leaky, queries[:n], pool, allow=True).found == 100
        assert refusal(leaky, queries[:n], pool) == signs
    rows, queries, pool = prose(600)
    for n, signs in ((1, []), (4, ["copied"])):  # of 15
        texts = {target: f"{text} of very special words" for text, target in queries[:n]}
        asked = [(texts.get(target, text), target) for text, target in queries[:15]]
        leaky = [row | {"caption": f"{row['caption']} {texts.get(row['image'], '')}"} for row in rows]
        assert refusal(leaky, asked, pool) == signs


def test_what_any_query_would_find_is_not_found_by_its_text():
    rows, _, pool = prose(300)
    special = [rows[0] | {"caption": "a dress like no other"}, *rows[1:]]
    found = check(special, [("dress", pool[0])] * 50, pool)
    assert found.found == found.found_shuffled == 100 and found.reasons == ()


# Figures


def test_bm25_is_the_textbooks():
    captions = [words(x) for x in ("red dress", "a red red shirt with stripes", "a blue dress")]
    score = np.array([textbook("red dress", i, captions) for i in range(3)])
    assert score[0] > score[2] > 0 and len(set(score)) == 3
    order = np.argsort(-score).tolist()
    for i in range(3):
        (rank,) = bm25_ranks(captions, [words("red dress")], np.array([i]))
        assert rank.tolist() == [order.index(i)]
    rng = np.random.default_rng(0)
    captions = [list(map(str, rng.zipf(1.5, rng.integers(3, 30)) % 50)) for _ in range(40)]
    for _ in range(30):
        ask = list(map(str, rng.zipf(1.5, 5) % 50))
        score = np.array([textbook(" ".join(ask), i, captions) for i in range(40)])
        (ranks,) = bm25_ranks(captions, [ask] * 40, np.arange(40))
        assert ranks.tolist() == [(score >= score[i] - 1e-12).sum() - 1 for i in range(40)]


def test_the_text_alone_is_searched_by_its_content_words_each_once():
    pool = ["a", "b", "c"]
    rows = [{"image": f"images/{name}.png", "caption": text} for name, text in
            zip(pool, ["the red of the red", "it is with the and of", "red red dress"], strict=True)]  # fmt: skip
    assert text_alone(rows, [("is the red", "a")], pool) == (100, 100)
    many = [f"i{n}" for n in range(100)]
    rows = [{"image": name, "caption": f"the red dress{n // 20}"} for n, name in enumerate(many)]
    asked = [
        ("with the red dress1", "i20"),
        ("dress1 dress1 dress1 blue", "i30"),
        ("the", "i40"),
        ("dress9", "i7"),
    ]
    assert text_alone(rows, asked[:2], many) == (0, 100)  # ties of twenty are lost
    assert text_alone(rows, asked[2:], many) == (0, 0)
    assert text_alone([*rows[:20], *rows[21:]], asked[:1], many) == (0, 0)  # a target without a caption


def test_a_category_has_its_own_file_or_all_of_them():
    rows = [[caption("a")], [caption("b")], [caption("c")]]
    files = dict(zip(map(Path, ("x.dress.json", "x.shirt.json", "all.jsonl")), rows, strict=True))
    assert own_file(files, "shirt") == rows[1] and own_file(files, "toptee") == [r for of in rows for r in of]


def test_ties_are_lost():
    captions = [words("red dress")] * 30 + [words("blue dress")] * 30
    (ranks,) = bm25_ranks(captions, [words("red"), words("green")], np.array([0, 0]))
    assert ranks.tolist() == [29, 59]


def test_recalls_are_of_the_own_target_and_of_anothers():
    pool = [f"i{n}" for n in range(300)]
    rows = [{"image": name, "caption": f"unique{name} dress"} for name in pool]
    queries = [(f"unique{name} dress", name) for name in pool[:100]]
    found = check(rows, queries, pool, allow=True)
    assert (found.recall10, found.recall50, found.found) == (100, 100, 100)
    assert found.shuffled10 == found.shuffled50 == found.found_shuffled == 0  # nobody has the own
    assert (found.candidates, found.queries, found.copied) == (300, 100, 0)
    assert "R@10 100.0 R@50 100.0 (shuffled 0.0, 0.0)" in found.figures()


def test_a_refusal_is_one_line_with_its_figures_and_the_way_out():
    rows, queries, pool = prose(600)
    leaky = [{"image": t, "caption": text, "text_guidance": text} for text, t in queries] + rows
    with pytest.raises(UserError) as told:
        check(leaky, queries, pool)
    line = str(told.value)
    assert "\n" not in line and "--allow-leaky-captions" in line and "infer.py caption" in line
    allowed = check(leaky, queries, pool, allow=True)
    assert len(allowed.reasons) == 3 and all(reason in line for reason in allowed.reasons)
    assert f"{len(queries)} of 600 have a text_guidance" in line and f"{allowed.found:.1f} %" in line
    assert f"R@10 {allowed.recall10:.1f}" in line and f"{allowed.copied:.1f} %" in line


def test_captions_of_none_of_the_candidates_are_not_said_to_be_honest():
    rows, queries, pool = toy(50, 2)
    with pytest.raises(UserError, match="the captions are of none of the 50 candidates"):
        check([row | {"image": f"x{row['image']}"} for row in rows], queries, pool, allow=True)
    with pytest.raises(UserError, match="nothing to check"):
        check(rows, [("is red", "absent")], pool)
    assert check(rows[:30], queries, pool).candidates == 30  # some may be missing


def test_found_is_among_the_best_half_percent():
    pool = [f"i{n}" for n in range(600)]
    for alike, found in (
        (2, 100),
        (3, 100),
        (4, 0),
    ):  # of 600 the best three; of those that score as much it is the last
        rows = [{"image": name, "caption": f"dress{i // alike}"} for i, name in enumerate(pool)]
        queries = [(row["caption"], row["image"]) for row in rows]
        assert check(rows, queries, pool, allow=True).found == found


# The command


@pytest.mark.parametrize("form", ["json", "jsonl"])
def test_the_command_refuses_and_lets_pass(tmp_path: Path, capsys: pytest.CaptureFixture, form: str):
    rows, queries, pool = prose(600)
    write_fashioniq(tmp_path, queries, pool)
    assert run(tmp_path, write_rows(tmp_path / f"good.{form}", rows)) == 0
    out, err = capsys.readouterr()
    assert out.startswith("shirt: 400 queries, 600 candidates, 0 of them") and out.count("\n") == 3
    assert "\ntext alone, mean of 1: R@10 " in out
    assert out.endswith("\nno leak found\n") and err == ""

    bad = write_rows(tmp_path / f"bad.{form}", [{"image": t, "caption": text} for text, t in queries])
    assert run(tmp_path, bad) == 2
    out, err = capsys.readouterr()
    assert ": refused: shirt: by the query's text alone" in err and err.count("\n") == 1
    assert "400 candidates" in out and "found 99.2" in out
    assert run(tmp_path, bad, "--allow-leaky-captions") == 0
    assert capsys.readouterr() == (out + "they leak, and that is allowed\n", "")


def test_the_queries_of_a_test_split_are_checked_where_its_targets_are_known(tmp_path: Path, capsys):
    rows, queries, pool = prose(300)
    write_fashioniq(tmp_path, queries, pool, "test")
    bad = write_rows(tmp_path / "bad.jsonl", [{"image": t, "caption": text} for text, t in queries])
    assert run(tmp_path, bad, "--split", "test") == 2 and "refused: shirt" in capsys.readouterr().err
    file = tmp_path / "captions/cap.shirt.test.json"  # as published
    triplets = [{k: v for k, v in row.items() if k != "target"} for row in json.loads(file.read_text())]
    file.write_text(json.dumps(triplets))
    assert run(tmp_path, bad, "--split", "test") == 2 and "nothing to check" in capsys.readouterr().err


def test_files_that_cannot_be_used_are_one_line(tmp_path: Path, capsys: pytest.CaptureFixture):
    rows, queries, pool = prose(20)
    write_fashioniq(tmp_path, queries, pool)
    other = write_rows(tmp_path / "other.json", [{"image": "x", "caption": "y"}])
    contents = {
        "torn.json": '[{"image": "a"',
        "torn.jsonl": '{"image": "a", "cap',
        "letter.txt": "Dear Sir",
        "bare.json": '[{"image": "a"}]',
        "numbers.json": "[1, 2]",
        "number.jsonl": '{"image": 1, "caption": "x"}',
        "empty.jsonl": "",
        "wordless.jsonl": "".join(json.dumps({"image": name, "caption": "!!!"}) + "\n" for name in pool),
    }
    for name, content in contents.items():
        (tmp_path / name).write_text(content)
    (tmp_path / "picture.png").write_bytes(b"\x89PNG\xff")
    for name in [*contents, "picture.png", "absent.json", other.name]:
        assert run(tmp_path, tmp_path / name) == 2
        out, err = capsys.readouterr()
        assert out == "" and err.count("\n") == 1
        assert name in err or name in (other.name, "empty.jsonl", "wordless.jsonl")
    for data in ("fashiongen=x", f"fashioniq={tmp_path / 'nowhere'}"):
        assert code("--captions", other, "--data", data) == 2


def test_who_reads_the_first_line_alone_sees_no_traceback(tmp_path: Path):
    rows, queries, pool = prose(20)
    write_fashioniq(tmp_path, queries, pool)
    file = write_rows(tmp_path / "good.json", rows)
    flags = ["--captions", str(file), "--data", f"fashioniq={tmp_path}"]
    command = [sys.executable, "-m", "eval.leaks", *flags]
    reading = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=ROOT)
    reading.stdout.close()
    assert (reading.stderr.read(), reading.wait()) == (b"", 141)


def test_what_is_written_at_the_very_end_misses_its_reader_no_less():
    """Less than a pipe's buffer holds is written when all is done."""
    code = "from unifashion import training\ntraining.run(lambda: print('all'))"
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "cwd": ROOT}
    env = os.environ | {"PYTHONUNBUFFERED": ""}  # set, it would hide that all is written at the end
    reading = subprocess.Popen([sys.executable, "-c", code], env=env, **pipes)
    reading.stdout.close()
    assert (reading.stderr.read(), reading.wait()) == (b"", 141)


def test_another_pipe_that_breaks_is_no_end_in_peace():
    def main() -> None:
        raise BrokenPipeError("a worker's")

    with pytest.raises(BrokenPipeError):
        training.run(main)


# Of real data


@needs_samples
@pytest.mark.parametrize("category", others_slow(CATEGORIES, "dress"))
def test_the_released_captions_are_refused_also_without_their_text_guidance(category: str):
    rows, queries, pool = released(category)
    assert refusal(rows, queries, pool) == ["guided", "found", "copied"]
    figures = check(rows, queries, pool, allow=True)
    assert figures.guided == figures.queries == len(queries)  # of every query's target
    assert 50 < figures.recall10 < 60 and figures.shuffled10 < 1
    bare = [{"image": row["image"], "caption": row["caption"]} for row in rows]
    assert refusal(bare, queries, pool) == ["found", "copied"]
    assert refusal([row | {"text_guidance": ""} for row in rows], queries, pool) == ["found", "copied"]


@pytest.mark.slow
@needs_samples
@pytest.mark.parametrize("category", CATEGORIES)
def test_the_released_captions_are_refused_also_when_they_are_edited(category: str):
    rows, queries, pool = released(category)
    rng = random.Random(0)

    def edited(edit) -> list[dict]:
        return [{"image": row["image"], "caption": " ".join(edit(words(row["caption"])))} for row in rows]

    assert refusal(edited(lambda x: [w for w in x if rng.random() > 0.2]), queries, pool) == [
        "found",
        "copied",
    ]
    assert "copied" in refusal(edited(lambda x: [w for w in x if rng.random() > 0.4]), queries, pool)
    assert refusal(edited(lambda x: rng.sample(x, len(x))), queries, pool) == ["found"]
    targets = {target for _, target in queries}
    clean = [row["caption"] for row in rows if row["image"] not in targets]
    few = [
        {"image": r["image"], "caption": r["caption"] if i % 3 == 0 or r["image"] not in targets else rng.choice(clean)}
        for i, r in enumerate(rows)
    ]  # fmt: skip
    assert refusal(few, queries, pool) == ["copied"]


@needs_samples
@pytest.mark.parametrize("category", CATEGORIES)
def test_two_people_who_describe_one_garment_pass(category: str):
    """The second annotator's text as the target's caption, the first one's as the query: as near as honest ones can come."""
    texts = {s: json.loads((SAMPLES / f"fashioniq/captions/cap.{category}.{s}.json").read_text()) for s in ("train", "val")}  # fmt: skip
    rows = [{"image": row["target"], "caption": row["captions"][1]} for s in texts for row in texts[s]]
    queries = [(row["captions"][0], row["target"]) for row in texts["val"]]
    figures = check(rows, queries, [row["image"] for row in rows])
    assert figures.reasons == () and figures.recall10 > 10 * figures.shuffled10


@needs_samples
def test_the_command_refuses_the_released_files(capsys: pytest.CaptureFixture):
    files = [str(SAMPLES / f"fashioniq_cap/next_llava.val.{name}.caption.json") for name in CATEGORIES]
    assert code("--captions", *files, "--data", f"fashioniq={SAMPLES / 'fashioniq'}") == 2
    out, err = capsys.readouterr()
    assert [line.split(":")[0] for line in out.splitlines()] == [*CATEGORIES, "text alone, mean of 3"]
    ten, fifty = map(float, re.search(r"mean of 3: R@10 (\S+) R@50 (\S+) ", out).groups())
    assert abs(ten - 55.30) <= 0.05 and abs(fifty - 67.99) <= 0.05  # notes/upstream.md 4.3
    assert err.count("\n") == 1 and all(f"{name}: " in err for name in CATEGORIES)
    assert code("--captions", files[1], "--data", f"fashioniq={SAMPLES / 'fashioniq'}") == 2
    told = capsys.readouterr().out.splitlines()
    assert told[0].startswith("shirt: 2038 queries, 6346 candidates, 2038 of them with text_guidance")


# helpers


def caption(image: str) -> dict:
    return {"image": image, "caption": "red"}


def refusal(rows: list[dict], queries: list[tuple[str, str]], pool: list[str]) -> list[str]:
    """The signs by which the captions are refused."""
    try:
        assert check(rows, queries, pool).reasons == ()
        return []
    except UserError as refused:
        marks = {"guided": "have a text_guidance", "found": "BM25", "copied": "words in a row"}
        return [sign for sign, mark in marks.items() if mark in str(refused)]


def toy(n: int, told: int) -> Case:
    """Garments, all of them targets, with queries that tell so many of their attributes in the phrases of the captions."""
    rng = np.random.default_rng(n + told)
    garments = [sample_garment(rng, "test") for _ in range(n)]
    rows = [{"image": f"g{i}", "caption": detailed(g, rng)} for i, g in enumerate(garments)]

    def phrase(g, attribute: str) -> str:
        return "has " + choose(rng, flat(WORDS["fashioniq-cap"][attribute][getattr(g, attribute)]))

    queries = [
        (" and ".join(phrase(g, COMBINATION[k]) for k in rng.permutation(len(COMBINATION))[:told]), f"g{i}")
        for i, g in enumerate(garments)
    ]
    return rows, queries, [row["image"] for row in rows]


def prose(n: int) -> Case:
    """Captions of 25 words and queries of 6 for the first two thirds of them, independent of each other."""
    rng = np.random.default_rng(n)

    def text(length: int) -> str:
        return " ".join(f"w{i % 300}" for i in rng.zipf(1.3, length))

    pool = [f"p{i}" for i in range(n)]
    rows = [{"image": name, "caption": text(25)} for name in pool]
    return rows, [(text(6), name) for name in pool[: n * 2 // 3]], pool


def textbook(query: str, i: int, captions: list[list[str]]) -> float:
    """Robertson and Zaragoza's BM25 with Lucene's idf, word by word."""
    mean = sum(map(len, captions)) / len(captions)
    score = 0.0
    for word in words(query):
        n = sum(word in caption for caption in captions)
        f = captions[i].count(word)
        idf = math.log(1 + (len(captions) - n + 0.5) / (n + 0.5))
        score += idf * f * 2.2 / (f + 1.2 * (0.25 + 0.75 * len(captions[i]) / mean))
    return score


def released(category: str) -> Case:
    def read(path: str):
        return json.loads((SAMPLES / path).read_text())

    texts = read(f"fashioniq/captions/cap.{category}.val.json")
    return (
        read(f"fashioniq_cap/next_llava.val.{category}.caption.json"),
        [(" and ".join(row["captions"]), row["target"]) for row in texts],
        read(f"fashioniq/image_splits/split.{category}.val.json"),
    )


def write_fashioniq(root: Path, queries: list[tuple[str, str]], pool: list[str], split: str = "val") -> None:
    """Its annotations, all of them shirts."""
    for folder in ("captions", "image_splits"):
        (root / folder).mkdir()
    for name in CATEGORIES:
        triplets = [
            {"target": target, "candidate": pool[-1], "captions": [text, ""]}
            for text, target in (queries if name == "shirt" else [])
        ]
        (root / f"captions/cap.{name}.{split}.json").write_text(json.dumps(triplets))
        ids = pool if name == "shirt" else [f"{name}1"]
        (root / f"image_splits/split.{name}.{split}.json").write_text(json.dumps(ids))


def write_rows(path: Path, rows: list[dict]) -> Path:
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    path.write_text(json.dumps(rows, indent=1) if path.suffix == ".json" else lines)
    return path


def run(root: Path, *argv: object) -> int:
    return code("--data", f"fashioniq={root}", "--captions", *argv)


def code(*argv: object) -> int:
    """As the command: complaints on stderr, and the exit code."""
    try:
        training.run(lambda: leaks.main([*map(str, argv)]))
    except SystemExit as ended:
        return ended.code
    return 0
