"""Key words: whose captions are read, which word is whose root, what is counted, and the file and picture of them."""

import json
import os
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from unifashion import UserError
from unifashion.data import keywords
from unifashion.data.keywords import draw, key_words, root, words

SAMPLES = Path(os.environ.get("UNIFASHION_SAMPLES", "/nonexistent"), "fashioniq")
CATEGORIES = ("dress", "shirt", "toptee")


# Roots


@pytest.mark.parametrize(
    ("form", "expected"),
    {
        "longer": "long", "longest": "long", "wider": "wide", "shinier": "shiny", "bigger": "big", "sheer": "sheer",
        "darker": "dark", "sheerer": "sheer", "flower": "flower", "shoulder": "shoulder", "sweater": "sweater",
        "sleeves": "sleeve", "dresses": "dress", "dress": "dress", "flies": "fly", "pies": "pie", "ties": "tie", "boxes": "box",
        "sleeveless": "sleeveless", "pants": "pants", "women": "woman", "plus": "plus",
        "striped": "stripe", "patterned": "pattern", "dotted": "dot", "fitted": "fitted", "red": "red", "checked": "checked",
        "coloring": "color", "revealing": "revealing", "ring": "ring", "greyer": "grey", "gray": "grey", "colours": "color",
    }.items(),
)  # fmt: skip
def test_a_word_has_the_root_that_a_reader_gives_it(form: str, expected: str):
    known = "long wide shiny big sheer dark fly box stripe pattern dot color color color color grey should sweat flow re"
    seldom = "fit check reveal"  # less often than fitted, checked, revealing
    counts = Counter(known.split() * 5 + seldom.split() * 2)
    counts.update(form.split() * 4)
    assert root(form, counts) == expected


def test_a_comparative_without_its_plain_word_stays_as_it_is():
    assert dict(key_words(["is taller", "is longer", "long"])) == {"taller": 1, "long": 2}
    assert dict(key_words(["she is sheer"])) == {"sheer": 1}


def test_shirts_and_necks_of_a_letter_are_words():
    text = "A T-shirt, t shirt and tshirts; V neck, v-necked, vneck or V neckline (u-neck): it's 3/4 sleeved"
    assert words(text)[:3] == ["t-shirt", "t-shirt", "and"]
    found = dict(key_words([text, "neck", "sleeve"]))
    assert found == {"t-shirt": 1, "v-neck": 1, "u-neck": 1, "sleeve": 2, "neck": 1}
    assert words("Women's LONG-sleeved  dress\n") == ["women", "long", "sleeved", "dress"]


# Counts


def test_captions_are_counted_and_not_words_and_in_any_form():
    captions = [
        "is longer, long and LONG",
        "has long sleeves",
        "sleeve",
        "The sleeves are less dark",
        "darker",
    ]
    assert key_words(captions) == [("sleeve", 3), ("dark", 2), ("long", 2)]


def test_words_of_grammar_and_comparison_are_left_out():
    captions = ["is more red than the other one", "has no less", "it is not different but slightly better", "is exactly the same"]  # fmt: skip
    assert key_words(captions) == [("red", 1)]


def test_no_order_of_captions_matters():
    captions = ["striped", "stripes", "stripe and dots", "dotted", "fitted", "fit", "fitted"]
    found = key_words(captions)
    assert dict(key_words(["fit fits", "fitted", "fitted"])) == {"fit": 1, "fitted": 2}
    assert dict(key_words(["colour", "colour", "colouring", "others"])) == {"color": 3}
    assert found == [("stripe", 3), ("dot", 2), ("fitted", 2), ("fit", 1)] == key_words(captions[::-1])


# The command


def test_training_captions_alone_are_read_and_those_of_all_categories(root_folder: Path, capsys):
    assert run(root_folder) == 0
    assert read(root_folder / "k.txt") == {"sleeve": 4, "dark": 3, "red": 1, "blue": 1, "green": 1}
    assert "5 words of 6 captions, from sleeve to red" in capsys.readouterr().out
    assert run(root_folder, "--category", "shirt") == 0
    assert read(root_folder / "k.txt") == {"sleeve": 1, "dark": 1, "blue": 1}


def test_the_file_has_a_word_and_its_count_a_line_most_frequent_first(root_folder: Path):
    assert run(root_folder, "--top", "2") == 0
    assert (root_folder / "k.txt").read_text() == "sleeve\t4\ndark\t3\n"
    assert not list(root_folder.glob(".*"))


def test_the_picture_shows_every_word_and_frequent_ones_larger(root_folder: Path):
    assert run(root_folder, "--picture", "p.png") == 0
    with Image.open(root_folder / "p.png") as picture:
        whole = np.array(picture)
    assert whole.shape == (600, 960, 3)
    inked = (
        draw([("sleeve", 4)]),
        draw([("sleeve", 4), ("sleeve", 1)]),
        draw([("sleeve", 4), ("sleeve", 4)]),
    )
    one, small, equal = (int((np.array(x) != 255).any(-1).sum()) for x in inked)
    assert (
        one * 1.15 < small < one * 1.4 and one * 1.7 < equal
    )  # a quarter of the count, a quarter of the area
    assert one < (whole != 255).any(-1).sum()


def test_words_do_not_cover_each_other_and_stay_in_the_picture(monkeypatch: pytest.MonkeyPatch):
    places, real = [], keywords.free_place
    monkeypatch.setattr(keywords, "free_place", lambda *args: places.append(real(*args)) or places[-1])
    draw([(f"word{'x' * (i % 9)}", 100 - i) for i in range(60)])
    last = places[-60:]
    assert all(min(a, b) >= 0 and c <= 960 and d <= 600 for a, b, c, d in last)
    for i, (a, b, c, d) in enumerate(last):
        assert all(c <= e or g <= a or d <= f or h <= b for e, f, g, h in last[i + 1 :])


def test_far_too_many_words_are_told():
    with pytest.raises(UserError, match="300 words are too many for a picture"):
        draw([("sleeveless", 1)] * 300, size=(300, 90))


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--top", "0"], "--top is 0, must be 1 or more"),
        (["--category", "hat"], "invalid choice: 'hat'"),
        (["--data", "nowhere"], "nowhere/captions lacks cap.dress.train.json, cap.shirt.train.json"),
        (["--out", "nowhere/k.txt"], "--out nowhere/k.txt: must be a file in a folder that exists"),
        (["--out", "."], "--out .: must be a file in a folder that exists"),
        (["--picture", "p.jpg"], "p.jpg: pictures are written as PNG"),
        (["--picture", "nowhere/p.png"], "there is no folder nowhere"),
    ],
)
def test_bad_input_is_one_line_and_nothing_is_written(
    root_folder: Path, capsys, argv: list[str], message: str
):
    before = sorted(root_folder.rglob("*"))
    assert run(root_folder, *argv) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("keywords: ") and message in err and err.count("\n") == 1
    assert sorted(root_folder.rglob("*")) == before


def test_damaged_and_empty_captions_are_named(root_folder: Path, capsys):
    file = root_folder / "captions/cap.shirt.train.json"
    whole = file.read_text()
    for content, message in (
        (whole[:-20], "not whole JSON"),
        (whole.replace('"captions"', '"texts"'), "row 0"),
        ("{}", "not a list"),
    ):
        file.write_text(content)
        assert run(root_folder) == 2 and not (root_folder / "k.txt").exists()
        err = capsys.readouterr().err
        assert "cap.shirt.train.json" in err and message in err
    write(file, [["is more", "is less"]])
    assert run(root_folder, "--category", "shirt") == 2
    assert "no captions with a word" in capsys.readouterr().err


@pytest.mark.skipif(not SAMPLES.is_dir(), reason="needs the sample annotations: set UNIFASHION_SAMPLES")
def test_the_key_words_of_fashioniq_are_the_papers(tmp_path: Path):
    out = tmp_path / "k.txt"
    assert keywords.main(["--data", str(SAMPLES), "--out", str(out)]) == 0
    found = read(out)
    assert [*found][0] == "sleeve" and len(found) == 40
    assert {
        "color",
        "sleeve",
        "pattern",
        "long",
        "short",
        "dark",
        "light",
        "black",
        "floral",
        "revealing",
    } < {*found}
    assert not {"longer", "darker", "sleeves", "is", "has", "more", "less", "shoulders", "striped", "colored"} & {*found}  # fmt: skip
    # Of so many captions: 6058 say "sleeves", 825 "sleeve", 773 "sleeved", 49 "long-sleeved" and the like
    assert 6058 < found["sleeve"] < 6058 + 825 + 773 + 200 and 3058 < found["long"] < 3058 + 1481 + 200
    assert (
        keywords.main(["--data", str(SAMPLES), "--out", str(out), "--category", "dress", "--top", "400"]) == 0
    )
    assert {"lace", "knee", "halter"} < read(out).keys()


# helpers


def write(file: Path, captions: list[list[str]]) -> None:
    file.write_text(
        json.dumps([{"target": f"t{i}", "candidate": f"c{i}", "captions": x} for i, x in enumerate(captions)])
    )


@pytest.fixture
def root_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "captions").mkdir()
    texts = {
        "dress": ["has red sleeves", "is darker"],
        "shirt": ["has sleeves", "is dark blue"],
        "toptee": ["a sleeve, dark", "green sleeve"],
    }
    for name, captions in texts.items():
        write(tmp_path / f"captions/cap.{name}.train.json", [captions])
        for split in ("val", "test"):
            write(tmp_path / f"captions/cap.{name}.{split}.json", [["is purple", "is purple"]] * 9)
    return tmp_path


def run(folder: Path, *argv: str) -> int:
    given = ["--data", str(folder)] * ("--data" not in argv) + ["--out", "k.txt"] * ("--out" not in argv)
    return keywords.main([*given, *argv])


def read(file: Path) -> dict[str, int]:
    return {word: int(count) for word, count in (line.split("\t") for line in file.read_text().splitlines())}
