"""The repository against its own ceilings: files readable in one sitting, a small tree, no weights in it."""

import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
CODE = ("*.py", "unifashion/**/*.py", "weights/**/*.py", "eval/**/*.py")


def test_every_file_can_be_read_in_one_sitting():
    assert longer_than(450, ROOT) == []


def test_the_tracked_tree_stays_small():
    assert sum(path.stat().st_size for path in tracked()) < 50e6


def test_no_original_checkpoint_is_tracked():
    assert [path.name for path in tracked() if path.suffix in (".ckpt", ".pth", ".bin", ".pt")] == []


def test_a_file_one_line_too_long_is_noticed(tmp_path):
    (tmp_path / "unifashion" / "data").mkdir(parents=True)
    (tmp_path / "unifashion" / "data" / "toy.py").write_text("pass\n" * 451)
    (tmp_path / "unifashion" / "model.py").write_text("pass\n" * 450)
    assert longer_than(450, tmp_path) == ["unifashion/data/toy.py: 451 lines"]


def longer_than(limit: int, root: Path) -> list[str]:
    lengths = {
        path.relative_to(root).as_posix(): len(path.read_text(encoding="utf-8").splitlines())
        for pattern in CODE
        for path in root.glob(pattern)
    }
    return [f"{path}: {length} lines" for path, length in lengths.items() if length > limit]


def tracked() -> list[Path]:
    try:
        names = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("not a git checkout")
    return [ROOT / name for name in names.decode().split("\0") if name and (ROOT / name).is_file()]
