"""METEOR against its jar (meteor.json: 15 pairs, four sets of matchers; captions.json), and the jar's ways to fail.

What asks the jar itself is skipped without Java and pycocoevalcap; a stand-in for `java` shows the rest.
"""

import json
import os
import sys
import time
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pytest

from eval.captions import as_released
from eval.metrics import meteor as module
from eval.metrics.meteor import counts, jar_folder, meteor, unbroken
from eval.metrics.ptb import ptb_words
from tests.faults import plant
from tests.goldens import GOLDEN
from unifashion import UserError

GOLD = json.loads((GOLDEN / "meteor.json").read_text())
CAPTIONS = json.loads((GOLDEN / "captions.json").read_text())
MATCHERS = ("exact", "exact_stem", "exact_stem_synonym", "full")
needs_jar = pytest.mark.skipif(jar_folder() is None, reason="needs Java and pycocoevalcap")


# The score


@pytest.mark.parametrize("matchers", MATCHERS)
def test_what_matches_scores_as_in_the_jar(matchers):
    same_as_the_jar(GOLD[matchers])


@pytest.mark.parametrize(
    ("target", "old", "new"),
    [
        ("ALPHA", "ALPHA, BETA, GAMMA, DELTA = 0.85", "ALPHA, BETA, GAMMA, DELTA = 0.9"),
        ("BETA", "0.85, 0.2,", "0.85, 3.0,"),
        ("GAMMA", "0.2, 0.6,", "0.2, 0.5,"),
        ("DELTA", "0.6, 0.75", "0.6, 0.5"),
        ("WORTH", "[1.0, 0.6, 0.8, 0.6]", "[1.0, 0.8, 0.6, 0.6]"),
        ("WORTH", "[1.0, 0.6, 0.8, 0.6]", "[1.0, 0.6, 0.8, 0.8]"),
        ("meteor", "ALPHA * p + (1 - ALPHA) * r", "ALPHA * r + (1 - ALPHA) * p"),
        ("meteor", "4, 2, 2)", "2, 2, 4).swapaxes(-1, -3)"),
        ("meteor", "21:].mean(-1)", "21:].sum(-1)"),
        ("meteor", "(words - functions)", "words"),
        ("unbroken", "(counted[:, 20] == 1) & ", ""),
        ("unbroken", " & (counted[:, 21:] == counted[:, :2]).all(1)", ""),
        ("unbroken", "whole[:, None] & ", "~whole[:, None] & "),
    ],
)
def test_a_wrong_line_is_noticed(target, old, new, monkeypatch):
    plant(monkeypatch, module, target, old, new)
    with pytest.raises((AssertionError, ValueError)):
        for matchers in MATCHERS:
            same_as_the_jar(GOLD[matchers])
        # Of two words in two chunks, all matched: the golden's pairs have none.
        assert module.unbroken(np.array([[2.0, 2, *[0] * 18, 2, 2, 2]]))[0, 20] == 2


def test_nothing_matched_scores_nothing():
    assert meteor(np.zeros(23)) == 0
    assert meteor(np.array([[3.0, 4, 1, 1, *[0] * 19], [0, 4, 0, 1, *[0] * 19]])).tolist() == [0, 0]


def test_many_sums_are_scored_at_once():
    each = unbroken(table(GOLD["full"]))
    draws = np.random.default_rng(0).integers(0, 3, (7, len(each)))
    one_by_one = [meteor(np.sum([each[i] * times for i, times in enumerate(row)], 0)) for row in draws]
    np.testing.assert_allclose(meteor(draws @ each), one_by_one, atol=1e-12)


# The jar


@needs_jar
def test_the_jar_finds_the_goldens_matches(asked):
    assert np.array_equal(asked["golden"], unbroken(table(GOLD["full"])))


@needs_jar
@pytest.mark.parametrize(
    ("name", "gold"),
    [
        ("one reference", CAPTIONS["coco"]),
        ("several", CAPTIONS["multi"]["coco"]),
        ("cut and swapped", CAPTIONS["unifashion_metric_py"]),
        ("cut", CAPTIONS["cut_to_100_chars_not_swapped"]),
        ("equal", CAPTIONS["identical"]),
    ],
)
def test_captions_score_as_in_pycocoevalcap(asked, name, gold):
    assert abs(meteor(asked[name].sum(0)) - gold["METEOR"]) < 1e-9
    if "METEOR_per" in gold:
        np.testing.assert_allclose(meteor(asked[name]), gold["METEOR_per"], atol=1e-9)


@needs_jar
def test_no_text_breaks_the_protocol(asked):
    scores = meteor(asked["strange"])
    assert scores[[2, 4]].tolist() == [1, 1] and scores[[0, 1]].tolist() == [0, 0]


@needs_jar
def test_a_thousand_pairs_do_not_block(asked):
    assert len(asked["many"]) == 1000 and (meteor(asked["many"]) == 1).all()


# A stand-in for Java


def test_without_java_or_the_package_nothing_is_measured(stand_in, monkeypatch, tmp_path):
    stand_in("print('1.0 ' * 23)")
    assert jar_folder() and counts([["a"]], [[["a"]]]) is not None
    (tmp_path / "pycocoevalcap" / "meteor" / "data" / "paraphrase-en.gz").unlink()
    assert jar_folder() is None and counts([["a"]], [[["a"]]]) is None
    stand_in("")
    monkeypatch.setenv("PATH", "")
    assert jar_folder() is None
    stand_in("")
    monkeypatch.setattr(sys, "path", [])
    module.importlib.invalidate_caches()
    assert jar_folder() is None


def test_nothing_but_the_packages_place_is_taken(stand_in):
    stand_in("", package="raise SystemExit('imported')")
    assert jar_folder().name == "meteor" and "pycocoevalcap" not in sys.modules


def test_what_java_is_asked(stand_in):
    stand_in(
        "import sys, os; lines = sys.stdin.read().splitlines()\n"
        "open('asked', 'w').write('\\n'.join([os.getcwd(), *sys.argv[1:], *lines]))\n"
        "print(*['1 ' * 23] * len(lines), sep='\\n')"
    )
    counts([["a", "|||", "b"], []], [[["c"], ["d|||", "e\n"]], [["f"]]])
    folder, *asked = (jar_folder() / "asked").read_text().splitlines()
    assert Path(folder) == jar_folder()
    assert "-Duser.language=en" in asked and "-Duser.country=US" in asked
    assert " ".join(asked[:-2]).endswith("-jar meteor-1.5.jar - - -stdio -l en -norm")
    assert asked[-2:] == ["SCORE ||| c ||| d e ||| a b", "SCORE ||| f ||| "]


@pytest.mark.parametrize(
    ("java", "said"),
    [
        ("import sys; sys.exit('Unable to access jarfile')", "code 1: Unable to access jarfile"),
        ("import sys; print('1 ' * 23); sys.exit(3)", "code 3: 1 1"),
        ("", "code 0: nothing said"),
        ("print('0,38 ' * 23)", "code 0: 0,38"),  # with another language's commas
        ("print('1 ' * 22)", "code 0"),
        ("print('1 ' * 23 + '\\n' + '1 ' * 23)", "code 0"),
        ("print('Error: specify SCORE or EVAL or SING')", "code 0: Error: specify SCORE"),
        ("import os; os.kill(os.getpid(), 9)", "code -9"),
    ],
)
def test_a_java_that_fails_is_told_in_one_line(stand_in, java, said):
    stand_in(java)
    with pytest.raises(UserError, match=f"^METEOR's jar failed, java ended with {said}") as error:
        counts([["a"] * 40000], [[["a"]]])  # more than a pipe holds, read or not
    assert "\n" not in str(error.value)


def test_a_java_that_hangs_is_ended(stand_in, tmp_path):
    stand_in(f"import os, time; open({str(tmp_path / 'pid')!r}, 'w').write(str(os.getpid())); time.sleep(60)")
    began = time.monotonic()
    with pytest.raises(UserError, match="^METEOR's jar has not finished 1 captions in 2 s$"):
        counts([["a"]], [[["a"]]], seconds=2)
    assert time.monotonic() - began < 30
    with pytest.raises(ProcessLookupError):
        os.kill(int((tmp_path / "pid").read_text()), 0)


def test_a_java_that_cannot_be_run_is_told(stand_in, tmp_path):
    stand_in("")
    (tmp_path / "bin" / "java").write_text("#!/no/such/interpreter\n")
    with pytest.raises(UserError, match="^METEOR's jar cannot be run: java: "):
        counts([["a"]], [[["a"]]])


# Helpers


def table(gold: dict) -> np.ndarray:
    return np.array([pair["stats"].split() for pair in gold["per"].values()], float)


def split(texts: Iterable[str]) -> list[list[str]]:
    return [text.split() for text in texts]


def same_as_the_jar(gold: dict) -> None:
    found = module.unbroken(table(gold))
    scores = [pair["score"] for pair in gold["per"].values()]
    np.testing.assert_allclose(module.meteor(found), scores, atol=1e-9)
    assert abs(module.meteor(found.sum(0)) - gold["aggregate"]) < 1e-9


@pytest.fixture(scope="module")
def asked() -> dict[str, np.ndarray]:
    """What the jar says of all that these tests ask, at once: it takes long to begin."""
    multi = CAPTIONS["multi"]
    captions, references = (
        [text for group in CAPTIONS[k].values() for text in group] for k in ("hyps", "refs")
    )
    swapped = as_released(captions, references)
    strange = [
        [],
        ["|||"],
        ["a", "|||", "b"],
        ["a||||b"],
        ["a\nb"],
        ["é", "’", "日本"],
        ["\x00", "\ud800"],
        ["EVAL"],
    ]
    many = [["long", "sleeve", f"t{i}", "dress", "in", "red"] * 8 for i in range(1000)]
    pairs = {
        "golden": (split(t[0] for t in GOLD["hyps"].values()), [split(t) for t in GOLD["refs"].values()]),
        "one reference": words(captions, [[text] for text in references]),
        "several": words([texts[0] for texts in multi["hyps"].values()], multi["refs"].values()),
        "cut and swapped": words(swapped[0], [[text] for text in swapped[1]]),
        "cut": words(swapped[1], [[text] for text in swapped[0]]),
        "equal": words(references, [[text] for text in references]),
        "strange": (strange, [[["a", "b"], [], ["|||"]]] * len(strange)),
        "many": (many, [[text] for text in many]),
    }
    found = counts(*(sum((pair[i] for pair in pairs.values()), []) for i in (0, 1)))
    ends = np.cumsum([len(pair[0]) for pair in pairs.values()])[:-1]
    return dict(zip(pairs, np.split(found, ends), strict=True))


def words(captions: Iterable[str], references: Iterable[Iterable[str]]) -> tuple[list, list]:
    return [ptb_words(text) for text in captions], [
        [ptb_words(text) for text in texts] for texts in references
    ]


@pytest.fixture
def stand_in(tmp_path, monkeypatch):
    """Make `java` this Python code, and a package pycocoevalcap of empty files, until the test ends."""
    for name in [name for name in sys.modules if name.split(".")[0] == "pycocoevalcap"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))

    def make(java: str, package: str = "") -> None:
        folder = tmp_path / "pycocoevalcap"
        (folder / "meteor" / "data").mkdir(parents=True, exist_ok=True)
        (folder / "__init__.py").write_text(package)
        for name in ("meteor-1.5.jar", "data/paraphrase-en.gz"):
            (folder / "meteor" / name).touch()
        (tmp_path / "bin").mkdir(exist_ok=True)
        (tmp_path / "bin" / "java").write_text(f"#!{sys.executable} -S\n{java}\n")
        (tmp_path / "bin" / "java").chmod(0o755)

    return make
