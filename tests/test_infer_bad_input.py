"""Bad input of `infer.py tryon`: exit code 2, one line that says what, nothing written, no weights loaded for it."""

import shlex
import shutil
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

import infer
from tests.rooms import BAD_FILES, SMALL, command, ellipse, furnish, write_bad_files, write_weights
from weights import load

BAD = {
    "neither cloth nor sketch": ("--person person.png --out out.png", "one of the arguments --cloth --sketch is required"),
    "both cloth and sketch": ("OK --sketch cloth.png", "argument --sketch: not allowed with argument --cloth"),
    "a sketch without a line": ("--person person.png --out out.png --sketch white.png", "white.png: a sketch without a line"),
    "both mask and box": ("OK --mask mask.png --box 1,1,9,9", "not allowed with argument --mask"),
    "no person": ("--cloth cloth.png --out out.png", "required: --person"),
    "no out": ("--person person.png --cloth cloth.png", "required: --out"),
    "an unknown flag": ("OK --colour red", "unrecognized arguments: --colour red"),
    "half a flag": ("OK --sam ddim", "unrecognized arguments"),
    "a mask of another shape": ("OK --mask wide.png", "wide.png: a mask of 130x120 does not fit a picture of 90x120"),
    "a black mask": ("OK --mask black.png", "all black: nothing to repaint"),
    "a white mask": ("OK --mask white.png", "covers the whole picture"),
    "a pose of another shape": ("OK --pose wide.png", "wide.png: a pose of 130x120 does not fit a person of 90x120"),
    "a box with three numbers": ("OK --box 1,2,3", "argument --box: '1,2,3' is not four whole numbers x0,y0,x1,y1"),
    "a box of words": ("OK --box a,b,c,d", "is not four whole numbers"),
    "a box upside down": ("OK --box 10,60,50,20", "the box 10,60,50,20 is empty"),
    "a box without area": ("OK --box 10,20,10,60", "the box 10,20,10,60 is empty"),
    "a box outside": ("OK --box 10,20,91,60", "is not inside the picture of 90x120 pixels"),
    "a box beyond the left edge": ("OK --box=-1,20,50,60", "is not inside the picture"),
    "a box after a blank, beyond the left edge": ("OK --box -1,20,50,60", "is written --flag=-1"),
    "a box of everything": ("OK --box 0,0,90,120", "covers the whole picture"),
    "a text of nothing": ("OK --text ''", "--text is empty"),
    "a text of blanks": ("OK --text '  '", "--text is empty"),
    "a text of dots": ("OK --text '...'", "--text is empty"),
    "an unknown preset": ("OK --preset huge", "argument --preset: invalid choice: 'huge'"),
    "an unknown sampler": ("OK --sampler euler", "argument --sampler: invalid choice: 'euler'"),
    "an unknown model": ("OK --model sdxl", "argument --model: invalid choice: 'sdxl'"),
    "an unknown device": ("OK --device tpu", "argument --device: invalid choice: 'tpu'"),
    "an unknown type": ("OK --dtype int8", "argument --dtype: invalid choice: 'int8'"),
    "one step": ("OK --steps 1", "--steps is 1, must be 2 to 500"),
    "too many steps": ("OK --steps 501", "--steps is 501, must be 2 to 500"),
    "steps in words": ("OK --steps many", "argument --steps: invalid int value: 'many'"),
    "negative guidance": ("OK --guidance -1", "--guidance is -1.0, must be a number from 0 up"),
    "guidance that is no number": ("OK --guidance nan", "--guidance is nan"),
    "endless guidance": ("OK --guidance inf", "--guidance is inf"),
    "no results": ("OK --num 0", "--num is 0, must be 1 to 64"),
    "too many results": ("OK --num 65", "--num is 65, must be 1 to 64"),
    "an out path without suffix": ("OK --out result", "written as PNG"),
    "an out path of a jpeg": ("OK --out out.jpg", "written as PNG"),
    "an out path that is a folder": ("OK --out folder.png", "is a folder"),
    "an out path in no folder": ("OK --out nowhere/out.png", "there is no folder nowhere"),
    "a second out path that is a folder": ("OK --num 2 --out f.png", "f-1.png: is a folder"),
    "an out path that is too long": (f"OK --out {'o' * 300}.png", "File name too long"),
    "a person's path that is too long": (f"OK --person {'p' * 300}.png", "no such file"),
    "an out path that is an input": ("OK --out ./person.png", "person.png is an input and would be overwritten"),
    "no such folder of weights": ("OK --weights elsewhere", "elsewhere: there is no such folder of weights"),
}  # fmt: skip


@pytest.mark.parametrize("kind", BAD_FILES)
@pytest.mark.parametrize("flag", ["--person", "--cloth", "--sketch", "--mask", "--pose"])
def test_a_bad_file_is_one_line_that_names_it(bad: Path, capsys: pytest.CaptureFixture, flag: str, kind: str):
    cloth = [] if flag == "--sketch" else ["--cloth", "cloth.png"]
    refused(bad, capsys, [*cloth, flag, kind], f"{kind}: {BAD_FILES[kind]}")


@pytest.mark.parametrize(("line", "message"), BAD.values(), ids=BAD)
def test_bad_input_is_one_line_that_says_what(
    bad: Path, capsys: pytest.CaptureFixture, line: str, message: str
):
    words = shlex.split(line)
    if words[0] == "OK":
        refused(bad, capsys, ["--cloth", "cloth.png", *words[1:]], message)
    else:
        refused(bad, capsys, words, message, default=False)


def test_cuda_where_there_is_none_is_refused(
    bad: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    refused(bad, capsys, ["--cloth", "cloth.png", "--device", "cuda"], "no CUDA device")


def test_an_out_folder_that_cannot_be_written_to_is_refused(
    bad: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("unifashion.preprocess.os.access", lambda *_: False)  # root may write anywhere
    refused(bad, capsys, ["--cloth", "cloth.png"], "cannot be written to")


def test_no_command_or_an_unknown_one_is_refused(capsys: pytest.CaptureFixture):
    for argv, message in (([], "required: COMMAND"), (["fly"], "invalid choice: 'fly'")):
        assert infer.main(argv) == 2
        said = capsys.readouterr().err
        assert message in said and said.count("\n") == 1


def test_the_command_itself_exits_with_2_and_one_line(bad: Path):
    for argv in (["--cloth", "cloth.png"], ["--person", bad / "cut.jpg", "--cloth", bad / "cloth.png"]):
        ran = command(*argv, "--out", bad / "out.png")
        assert ran.returncode == 2 and ran.stdout == ""
        assert ran.stderr.startswith("infer.py: ") and ran.stderr.count("\n") == 1


@pytest.mark.parametrize(
    "name", ["vit.safetensors", "vae.safetensors", "model.safetensors", "bert_vocab.txt"]
)
def test_weights_that_are_missing_cut_short_or_another_presets_are_one_line(
    room: Path, capsys: pytest.CaptureFixture, name: str
):
    shutil.copytree(room / "weights", room / "copy")
    path, argv = room / "copy" / name, ["--cloth", "cloth.png", "--weights", "copy"]
    whole = path.read_bytes()
    path.unlink()
    refused(room, capsys, argv, f"copy/{name} is missing: it is part of the repository, where weights/tiny")
    path.write_bytes(b"\xff\xfe" if name == "bert_vocab.txt" else whole[: len(whole) // 2])
    refused(room, capsys, argv, f"copy/{name}")
    path.write_bytes(whole)
    if name == "bert_vocab.txt":
        path.write_bytes(whole + b"".join(b"word%d\n" % i for i in range(400)))
    else:
        tensors = load_file(path)
        save_file({**tensors, min(tensors): torch.zeros(2, 2, 2, 2, 2)}, path)
    refused(room, capsys, argv, f"copy/{name} does not fit the preset tiny: ")


def test_numbers_that_overflow_are_not_drawn(room: Path, capsys: pytest.CaptureFixture):
    refused(room, capsys, ["--cloth", "cloth.png", "--guidance", "1e38", "--quiet"], "--guidance is too high")


# helpers


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_weights(tmp_path_factory.mktemp("weights"), SMALL)


@pytest.fixture
def room(tmp_path: Path, written: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    return furnish(tmp_path, written, monkeypatch)


@pytest.fixture
def bad(room: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The room, with everything in it that can be wrong; and a loader of weights that must not be called."""
    monkeypatch.setattr(load, "load_unifashion", lambda *_: pytest.fail("loaded the weights before looking"))
    ellipse(room / "mask.png", (90, 120))
    for name, size, level in (("wide", (130, 120), 255), ("black", (90, 120), 0), ("white", (90, 120), 255)):
        Image.new("L", size, level).save(room / f"{name}.png")
    write_bad_files(room)
    (room / "f-1.png").mkdir()
    return room


def refused(
    room: Path, capsys: pytest.CaptureFixture, argv: list[str], message: str, default: bool = True
) -> None:
    """The command exits with 2 after one line that holds `message`, and leaves the room as it was."""
    before = {path: path.stat().st_mtime_ns for path in room.rglob("*")}
    if default:
        argv = [*shlex.split("--person person.png --out out.png --weights weights --steps 2"), *argv]
    assert infer.main(["tryon", *argv]) == 2
    told = capsys.readouterr()
    assert told.out == ""
    assert told.err.startswith("infer.py: ") and message in told.err
    assert told.err.count("\n") == 1 and told.err.endswith("\n")
    assert {path: path.stat().st_mtime_ns for path in room.rglob("*")} == before
