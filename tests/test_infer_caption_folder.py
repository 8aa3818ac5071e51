"""`infer.py caption` on folders, as Fashion-IQ's pictures are captioned: which are taken, which skipped, and what is read at all."""

import json
import shutil
import sys
from pathlib import Path

import pytest
import torch

import infer
from tests.rooms import photo, write_bad_files
from tests.test_infer_caption import CFG, digest, not_loaded, rows, stop_at, write_weights
from unifashion import UserError
from unifashion.caption import pictures_of
from unifashion.config import PRESETS
from unifashion.data.fashioniq import FashionIQ

pytestmark = pytest.mark.usefixtures("one_thread")
opened: list[str] | None = None  # while it is a list, every file that is opened


# Which pictures


def test_a_folder_is_its_own_pictures_by_name(tmp_path: Path):
    for name in ("b.png", "a.JPG", "10.jpeg", "9.webp", "c.gif"):
        (tmp_path / name).touch()
    for other in (".b.png", "._a.jpg", "list.txt", "cap.json", "png", "a.png.part"):
        (tmp_path / other).touch()
    for folder in ("deeper", "album.png"):
        (tmp_path / folder).mkdir()
        photo(tmp_path / folder / "d.png", (20, 20), 1)
    found = pictures_of([tmp_path])
    assert [path.name for path in found] == ["10.jpeg", "9.webp", "a.JPG", "b.png", "c.gif"]
    assert not any(found.values())


def test_files_and_folders_may_be_mixed_and_each_picture_is_taken_once(tmp_path: Path):
    for folder in ("x", "y"):
        (tmp_path / folder).mkdir()
        for name in ("1.png", "2.png"):
            (tmp_path / folder / name).touch()
    x, y = tmp_path / "x", tmp_path / "y"
    found = pictures_of([y / "2.png", x, y, x / "1.png"])
    expected = {y / "2.png": True, x / "1.png": True, x / "2.png": False, y / "1.png": False}
    assert found == expected and list(found) == list(expected)
    with pytest.raises(UserError, match="deep: not a file, and no folder of pictures"):
        (tmp_path / "deep" / "er").mkdir(parents=True)
        photo(tmp_path / "deep" / "er" / "a.png", (20, 20), 1)
        pictures_of([x, tmp_path / "deep"])


def test_a_folder_is_described_as_its_pictures_are(room: Path, capsys):
    one_by_one = {f"iq/images/{i}.png": caption(room, capsys, f"iq/images/{i}.png")[0] for i in range(5)}
    out, err = caption(room, capsys, "iq/images", quiet=False)
    assert out == "".join(f"{name}: {text}" for name, text in one_by_one.items()) and "skipped" not in err
    assert len(set(one_by_one.values())) == 5


def test_the_file_is_what_the_reader_of_fashioniq_takes(room: Path, capsys):
    caption(room, capsys, "iq/images", "--style", "fashioniq-cap", "--out", "iq/captions.jsonl")
    written = rows(room / "iq/captions.jsonl")
    assert [row["image"] for row in written] == [f"images/{i}.png" for i in range(5)]
    for row in written:  # where each caption is from
        assert row["sha256"] == digest(room / "iq" / row["image"]) and row["style"] == "fashioniq-cap"
        assert row["model"] == f"unifashion tiny {digest(room / 'weights/model.safetensors')[:12]}"
    data = FashionIQ(room / "iq", "val")
    told = {Path(row["image"]).stem: row["caption"] for row in written}
    assert data.captions == told and data[0]["caption"] == told["1"] and data.captioned == [0]


# Broken ones


def test_broken_pictures_of_a_folder_are_skipped_and_named(room: Path, capsys):
    spoil(room / "iq/images")
    whole = [f"iq/images/{i}.png" for i in range(5)]
    for flags in ((), ("--out", "out.jsonl")):
        out, err = caption(room, capsys, "iq/images", *flags, quiet=False)
        told = [line for line in err.replace("\r", "\n").splitlines() if line.startswith("skipped: ")]
        assert len(told) == 5 and "skipped: iq/images/empty.png: the file is empty" in told
        assert any("iq/images/gone.png: no such file" in line for line in told)  # a link to nothing
        assert any("iq/images/cut.jpg: cannot be read as an image" in line for line in told)
        assert "note: 5 of 10 pictures cannot be read and are skipped\n" in err
        assert flags or [line.split(": ")[0] for line in out.splitlines()] == whole
    assert [row["image"] for row in rows(room / "out.jsonl")] == whole and not (
        room / "out.jsonl.part"
    ).exists()


def test_what_is_skipped_is_told_even_to_those_who_want_no_notes(room: Path, capsys):
    spoil(room / "iq/images")
    out, err = caption(room, capsys, "iq/images", "--json")
    report = json.loads(out)
    assert len(report["captions"]) == 5 == len(report["skipped"]) == err.count("skipped: ") == err.count("\n")
    assert all(f"skipped: {why}\n" in err for why in report["skipped"])
    assert json.loads(caption(room, capsys, "a.png", "--json")[0])["skipped"] == []


def test_a_broken_picture_that_was_named_is_refused_although_its_folder_is_given_too(
    room: Path, capsys, monkeypatch
):
    not_loaded(monkeypatch)
    spoil(room / "iq/images")
    for argv in (["iq/images/cut.jpg", "iq/images"], ["iq/images", "iq/images/cut.jpg"]):
        out, err = caption(room, capsys, *argv, "--out", "out.jsonl", code=2)
        assert out == "" and err.startswith("infer.py: iq/images/cut.jpg: cannot be read as an image")
        assert err.count("\n") == 1 and not (room / "out.jsonl").exists()


def test_a_folder_of_broken_pictures_alone_is_refused(room: Path, capsys, monkeypatch):
    not_loaded(monkeypatch)
    (room / "bad").mkdir()
    (room / "bad/1.png").touch()
    (room / "bad/2.png").write_text("x")
    out, err = caption(room, capsys, "bad", code=2)
    assert out == "" and err.count("\n") == 1
    assert "bad/1.png: the file is empty; bad/2.png: not an image" in err
    (room / "none").mkdir()
    err = caption(room, capsys, "none", "a.png", code=2)[1]
    assert err == "infer.py: none: not a file, and no folder of pictures\n"


# Going on


def test_a_stopped_run_on_a_folder_goes_on_with_what_is_new_and_changed(room: Path, capsys, monkeypatch):
    spoil(room / "iq/images")
    monkeypatch.setattr(infer, "BATCH", 2)
    with monkeypatch.context() as patch:
        stop_at(patch, 2)
        caption(room, capsys, "iq/images", "--out", "out.jsonl", code=130)
    first = rows(room / "out.jsonl.part")
    assert [row["image"] for row in first] == ["iq/images/0.png", "iq/images/1.png"]
    photo(room / "iq/images/1.png", (30, 30), 99)
    photo(room / "iq/images/empty.png", (30, 30), 98)  # mended
    err = caption(room, capsys, "iq/images", "--out", "out.jsonl", quiet=False)[1]
    assert "note: 1 of 6 pictures have their caption in out.jsonl" in err
    assert "note: 4 of 10 pictures cannot be read" in err
    written = {row["image"]: row for row in rows(room / "out.jsonl")}
    assert (
        len(written) == 6
        and written["iq/images/0.png"] == first[0]
        and written["iq/images/1.png"] != first[1]
    )
    with monkeypatch.context() as patch:
        not_loaded(patch)
        caption(room, capsys, "iq/images", "--out", "out.jsonl")
    assert {row["image"]: row for row in rows(room / "out.jsonl")} == written


# From the image alone


def test_no_text_of_the_data_set_is_read(room: Path, capsys):
    """Of the folder of Fashion-IQ, with queries and captions beside the pictures and among them, pictures alone are opened."""
    global opened
    shutil.copy(room / "iq/captions/cap.dress.val.json", room / "iq/images/1.json")
    sys.addaudithook(note_opened)
    opened = []
    try:
        before = caption(room, capsys, "iq/images", "--style", "fashioniq-cap")[0]
    finally:
        seen, opened = opened, None
    of_data = {Path(path).name for path in seen if "iq/" in path}
    assert of_data == {f"{i}.png" for i in range(5)}
    for file in [*room.glob("iq/captions/*"), room / "iq/images/1.json"]:
        file.write_text(file.read_text().replace("red", "blue"))
    assert caption(room, capsys, "iq/images", "--style", "fashioniq-cap")[0] == before


# helpers


def note_opened(event: str, args: tuple) -> None:
    if opened is not None and event == "open":
        opened.append(str(args[0]))


def caption(room: Path, capsys, *argv: str, quiet: bool = True, code: int = 0) -> tuple[str, str]:
    """The command on the tiny preset -> what it printed on stdout and on stderr."""
    given = ["--weights", "weights", "--preset", "tiny", "--device", "cpu", "--max-tokens", "12"]
    capsys.readouterr()
    assert infer.main(["caption", *given, *["--quiet"] * quiet, "--image", *argv]) == code
    return tuple(capsys.readouterr())


def spoil(images: Path) -> None:
    """Among the pictures: empty.png, letter.png, cut.jpg, bomb.png, a link to nothing; and a folder that looks like one."""
    write_bad_files(images)
    (images / "whole.png").unlink()
    (images / "gone.png").symlink_to("nowhere.png")


@pytest.fixture(scope="module")
@torch.no_grad()
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_weights(tmp_path_factory.mktemp("weights"), CFG)


@pytest.fixture
def room(tmp_path: Path, written: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """To stand in: weights, a.png, and Fashion-IQ with five pictures and one query; the tiny preset is CFG until the test ends."""
    monkeypatch.setitem(PRESETS, "tiny", CFG)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "weights").symlink_to(written)
    photo(tmp_path / "a.png", (60, 80), 50)
    for folder in ("images", "captions", "image_splits"):
        (tmp_path / "iq" / folder).mkdir(parents=True)
    for i in range(5):
        photo(tmp_path / f"iq/images/{i}.png", (40 + 5 * i, 60), i)
    for name in ("dress", "shirt", "toptee"):
        query = {"target": "1", "candidate": "2", "captions": ["is red", "is a red dress"]}
        (tmp_path / f"iq/captions/cap.{name}.val.json").write_text(json.dumps([query] * (name == "dress")))
        (tmp_path / f"iq/image_splits/split.{name}.val.json").write_text(json.dumps(list("01234")))
    return tmp_path
