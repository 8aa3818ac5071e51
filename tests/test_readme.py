"""The README's commands against what they promise: each bash block runs here, as written but for places and lengths."""

import re
import shlex
import shutil
from pathlib import Path

import pytest

import eval.captioning
import eval.generation
import infer
import train_phase1
import train_phase2
from unifashion.data import toy
from unifashion.data.texts import named
from weights.load import load_unifashion
from weights.tiny import pretrain

ROOT = Path(__file__).parent.parent
BLOCKS = {
    lines[0].removeprefix("# "): lines[1:]
    for lines in (
        block.strip().splitlines()
        for block in re.findall(r"```bash\n(.*?)```", (ROOT / "README.md").read_text(), re.S)
    )
}


def test_every_block_is_run_by_a_test_or_by_ci():
    assert BLOCKS.keys() == {"try-on", "tests", "use", "train (hours)"}  # .ci/run runs "tests"


@pytest.mark.parametrize("line", [*BLOCKS["try-on"], *BLOCKS["use"]])
def test_a_command_makes_its_picture_or_its_caption(line, tmp_path, monkeypatch, capsys):
    *_, command, arguments = re.split(r"(?:^|&& )\.venv/bin/python (\S+)", line)
    assert command == "infer.py"
    monkeypatch.chdir(ROOT)
    words = shlex.split(arguments)
    if "--out" not in words:
        assert infer.main([*words, "--quiet"]) == 0
        return check_caption(capsys.readouterr().out)
    out = tmp_path / words[words.index("--out") + 1]
    words[words.index("--out") + 1] = str(out)
    assert infer.main([*words, "--quiet"]) == 0
    assert out.exists()


def check_caption(told: str) -> None:
    """Of docs/cloth.png, in the short style."""
    assert named(told, "fashion200k")["colour"], told


@pytest.mark.slow
def test_the_training_commands_follow_one_another(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").mkdir()
    toy.ensure("data/toy", train=24, val=2, test=2, workers=1, quiet=True)
    *lines, ship, generation, captioning = BLOCKS["train (hours)"][1:]
    for line in lines:
        script, arguments = re.fullmatch(r"\.venv/bin/python (\S+) (.*)", line).groups()
        main = {"train_phase1.py": train_phase1.main, "train_phase2.py": train_phase2.main}[script]
        main([*shlex.split(arguments), "--steps", "1", "--batch-size", "4", "--workers", "0"])
    shutil.copytree(pretrain.HERE, tmp_path / "tiny")
    monkeypatch.setattr(pretrain, "HERE", tmp_path / "tiny")
    pretrain.main(shlex.split(ship.removeprefix(".venv/bin/python -m weights.tiny.pretrain ")))
    load_unifashion("tiny", tmp_path / "tiny")
    load_unifashion("tiny", tmp_path / "tiny", draws=False, writes=True)
    for line, module in ((generation, eval.generation), (captioning, eval.captioning)):
        arguments = line.removeprefix(f".venv/bin/python -m {module.__name__} ")
        module.main([*shlex.split(arguments), "--samples", "2", "--quiet"])
