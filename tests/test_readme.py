"""The README's commands against what they promise: each bash block runs here, as written but for places and lengths."""

import re
import shlex
import shutil
from pathlib import Path

import pytest

import infer
import train_phase1
import train_phase2
from unifashion.data import toy
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
def test_a_try_on_command_makes_its_picture(line, tmp_path, monkeypatch):
    *_, command, arguments = re.split(r"(?:^|&& )\.venv/bin/python (\S+)", line)
    assert command == "infer.py"
    monkeypatch.chdir(ROOT)
    words = shlex.split(arguments)
    out = tmp_path / words[words.index("--out") + 1]
    words[words.index("--out") + 1] = str(out)
    assert infer.main([*words, "--quiet"]) == 0
    assert out.exists()


@pytest.mark.slow
def test_the_training_commands_follow_one_another(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").mkdir()
    toy.ensure("data/toy", train=24, val=2, test=2, workers=1, quiet=True)
    *lines, ship = BLOCKS["train (hours)"][1:]
    for line in lines:
        script, arguments = re.fullmatch(r"\.venv/bin/python (\S+) (.*)", line).groups()
        main = {"train_phase1.py": train_phase1.main, "train_phase2.py": train_phase2.main}[script]
        main([*shlex.split(arguments), "--steps", "1", "--batch-size", "4", "--workers", "0"])
    shutil.copytree(pretrain.HERE, tmp_path / "tiny")
    monkeypatch.setattr(pretrain, "HERE", tmp_path / "tiny")
    pretrain.main(shlex.split(ship.removeprefix(".venv/bin/python -m weights.tiny.pretrain ")))
    load_unifashion("tiny", tmp_path / "tiny")
