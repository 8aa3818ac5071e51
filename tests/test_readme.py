"""The README's commands against what they promise: each bash block runs here, as written but for places and lengths."""

import importlib
import json
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import eval.leaks
import infer
import train_phase1
import train_phase2
from eval import miniature, realism
from tests import test_inception
from unifashion.data import keywords, toy
from unifashion.data.texts import named
from weights import verify
from weights.inception import FILES
from weights.load import FOLDERS, LEARNED, load_unifashion
from weights.tiny import pretrain

ROOT = Path(__file__).parent.parent
BLOCKS = {
    lines[0].removeprefix("# "): lines[1:]
    for lines in (
        block.strip().splitlines()
        for block in re.findall(r"```bash\n(.*?)```", (ROOT / "README.md").read_text(), re.S)
    )
}


TRAINS = {"train_phase1.py": train_phase1, "train_phase2.py": train_phase2}


def test_every_block_is_run_by_a_test_or_by_ci():
    by_tests = {"try-on", "use", "train (hours)", "several processes (hours)", "annotate (needs Fashion-IQ)"}
    by_tests |= {"day one (needs public weights)"}
    by_tests |= {"evaluate (needs the data sets, and a full model)", "miniature (hours)"}
    assert BLOCKS.keys() == {*by_tests, "tests"}  # .ci/run runs "tests"


@pytest.mark.parametrize("line", [*BLOCKS["try-on"], *BLOCKS["use"]])
def test_a_command_makes_its_picture_or_its_caption(line, tmp_path, monkeypatch, capsys):
    *_, command, arguments = re.split(r"(?:^|&& )\.venv/bin/python (\S+)", line)
    assert command == "infer.py"
    monkeypatch.chdir(ROOT)
    words = shlex.split(arguments)
    if words[0] == "search":
        return check_search(words, tmp_path, capsys)
    if "--out" not in words:
        assert infer.main([*words, "--quiet"]) == 0
        return check_caption(capsys.readouterr().out)
    out = tmp_path / words[words.index("--out") + 1]
    words[words.index("--out") + 1] = str(out)
    assert infer.main([*words, "--quiet"]) == 0
    assert out.exists()


@pytest.mark.parametrize("line", BLOCKS["day one (needs public weights)"])
def test_a_command_of_day_one_says_which_file_it_needs(line, tmp_path, monkeypatch, capsys):
    """On stand-ins they run in test_infer_blip2.py, test_infer_llava.py and test_stableviton.py; the files are not here."""
    monkeypatch.chdir(ROOT)
    _, *words = shlex.split(line)
    if words[0] == "-m":
        assert words == ["-m", "weights.verify"] and verify.main([str(tmp_path)]) == 0
        return
    for flag in ("--out", "--catalog"):
        if flag in words:
            words[words.index(flag) + 1] = str(tmp_path / "out.png")
    assert infer.main([*words[1:], "--weights", str(tmp_path)]) == 2
    told = capsys.readouterr().err
    assert told.count("\n") == 1
    needs = " is no catalogue" if words[1] == "search" else " is missing: get "
    assert needs in told and not [*tmp_path.iterdir()]


def check_search(words: list[str], folder: Path, capsys: pytest.CaptureFixture) -> None:
    """In the catalogue of the command above: the shirt by its description, the sweater by how it differs from the shirt."""
    index = next(shlex.split(line) for line in BLOCKS["use"] if " index " in line)[2:]
    for given in (index, words):
        for flag in ("--out", "--catalog", "--sheet"):
            if flag in given:
                given[given.index(flag) + 1] = str(folder / given[given.index(flag) + 1])
    assert infer.main([*index, "--quiet"]) == 0
    assert infer.main([*words, "--quiet"]) == 0
    first, _ = capsys.readouterr().out.split("\n", 1)
    assert first.endswith("sweater.png" if "--image" in words else "cloth.png")
    assert "--sheet" not in words or (folder / "found.png").exists()


def check_caption(told: str) -> None:
    """Of docs/cloth.png, in the short style."""
    assert named(told, "fashion200k")["colour"], told


def short(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every stage and task has one step, and batches of four."""
    for module in TRAINS.values():
        tiny = {part: {**of, "steps": 1, "batch_size": 4} for part, of in module.DEFAULTS["tiny"].items()}
        monkeypatch.setitem(module.DEFAULTS, "tiny", tiny)


@pytest.mark.slow
def test_the_training_commands_follow_one_another(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    short(monkeypatch)
    (tmp_path / "data").mkdir()
    toy.ensure("data/toy", train=24, val=4, test=4, workers=1, quiet=True)
    installs, draws, *lines = BLOCKS["train (hours)"]
    assert "pip install" in installs and "unifashion.data.toy" in draws
    for line in lines:
        if script := re.fullmatch(r"\.venv/bin/python (train_phase[12]\.py) (.*)", line):
            TRAINS[script[1]].main([*shlex.split(script[2]), "--workers", "0"])
            continue
        module, arguments = re.fullmatch(r"\.venv/bin/python -m (\S+) (.*)", line).groups()
        if module == "unifashion.data.toy":
            out = shlex.split(arguments)[1]
            toy.ensure(out, seed=1, train=0, val=0, test=4, workers=1, quiet=True)
            continue
        if module == "weights.tiny.pretrain":
            shutil.copytree(pretrain.HERE, tmp_path / "tiny")
            monkeypatch.setattr(pretrain, "HERE", tmp_path / "tiny")
            pretrain.main(shlex.split(arguments))
            load_unifashion("tiny", tmp_path / "tiny")
            load_unifashion("tiny", tmp_path / "tiny", draws=False, writes=True)
            continue
        few = ["--samples", "2"] if module in ("eval.captioning", "eval.generation") else []
        few += ["--judge-steps", "2"] if module == "eval.generation" else []
        weights = ["--weights", str(tmp_path / "tiny")]
        importlib.import_module(module).main([*shlex.split(arguments), *few, *weights, "--quiet"])


@pytest.mark.slow
def test_several_processes_train_as_the_commands_say(tmp_path):
    toy.ensure(tmp_path / "data/toy", train=24, val=2, test=2, workers=1, quiet=True)
    init = tmp_path / "runs/phase1/generate/last"
    init.mkdir(parents=True)
    shutil.copy(FOLDERS["tiny"] / LEARNED["tiny"], init)
    (tmp_path / "short.py").write_text(
        f"import sys; sys.path.insert(0, {str(ROOT)!r})\n"
        "import train_phase2; from unifashion import training\n"
        "for of in train_phase2.DEFAULTS['tiny'].values(): of.update(steps=1, batch_size=4)\n"
        "training.run(train_phase2.main)\n"
    )
    for line in BLOCKS["several processes (hours)"]:
        arguments = re.fullmatch(r"\.venv/bin/torchrun (.*)", line)[1].replace("train_phase2.py", "short.py")
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", *shlex.split(arguments)]
        done = subprocess.run([*command, "--workers", "0"], cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        out = tmp_path / arguments.split("--out ")[1].split()[0]
        assert (out / "last/model.safetensors").exists()


@pytest.mark.slow
def test_the_commands_that_annotate_make_their_files(tmp_path, monkeypatch, capsys):
    """On ToyFashion's Fashion-IQ in the original's place."""
    monkeypatch.chdir(tmp_path)
    toy.ensure(tmp_path / "toy", train=12, val=20, test=4, workers=1, quiet=True)
    (tmp_path / "data").mkdir()
    shutil.copytree("toy/fashioniq", "data/fashioniq")
    mine, caption, guard = (
        shlex.split(line.partition("python ")[2]) for line in BLOCKS["annotate (needs Fashion-IQ)"]
    )
    assert mine[:2] == ["-m", "unifashion.data.keywords"] and keywords.main(mine[2:]) == 0
    assert Path("keywords.txt").read_text().split() and Path("keywords.png").exists()
    assert infer.main([*caption[1:], "--quiet"]) == 0
    pictures = list(Path("data/fashioniq/images").iterdir())
    assert len(Path("data/fashioniq/captions.jsonl").read_text().splitlines()) == len(pictures)
    assert guard[:2] == ["-m", "eval.leaks"]
    eval.leaks.main(guard[2:])


@pytest.mark.slow
def test_the_evaluations_write_their_reports(tmp_path, monkeypatch, capsys):
    """On ToyFashion in the places of the originals, with the tiny model and an Inception of random numbers; CLIP is missing."""
    monkeypatch.chdir(tmp_path)
    toy.ensure(tmp_path / "toy", train=12, val=20, test=6, workers=1, quiet=True)
    (tmp_path / "data").mkdir()
    for name in ("fashiongen", "fashioniq", "vitonhd"):
        (tmp_path / "data" / name).symlink_to(tmp_path / "toy" / name)
    (tmp_path / "data/mgd").symlink_to(tmp_path / "toy/vitonhd")
    files = (tmp_path / "data/fashioniq").glob("next_llava.val.*.json")
    captions = [row for file in files for row in json.loads(file.read_text())]
    lines = [json.dumps({"image": row["image"], "caption": row["caption"]}) for row in captions]
    (tmp_path / "data/fashioniq/captions.jsonl").write_text("\n".join(lines))
    torch.save({k: v.float() for k, v in test_inception.weights().items()}, tmp_path / FILES[0])
    monkeypatch.setattr(realism, "INCEPTION", tmp_path)
    for line in BLOCKS["evaluate (needs the data sets, and a full model)"]:
        module, arguments = re.fullmatch(r"\.venv/bin/python -m (\S+) --preset full (.*)", line).groups()
        few = ["--steps", "2"] if module == "eval.generation" else []
        few += ["--split", "val"] if "captioning" in module else []
        words = [*shlex.split(arguments), *few, "--preset", "tiny", "--quiet"]
        importlib.import_module(module).main(words)
        report = json.loads((tmp_path / words[words.index("--out") + 1]).read_text())
        assert {"command", "commit", "seed", "data sha256", "qformer sha256", "verdict"} <= report.keys()
        printed = capsys.readouterr().out
        assert re.search("^verdict +", printed, re.MULTILINE) and "protocol" in printed


def test_the_miniature_is_said_as_it_is_run():
    [line] = BLOCKS["miniature (hours)"]
    words = shlex.split(line.removeprefix(".venv/bin/python -m eval.miniature "))
    args = miniature.parse(words)  # tests/test_miniature.py runs it
    assert args.seeds == miniature.SEEDS and args.jobs == 2
