"""`infer.py caption` against its promises: whose caption is printed where, what the file keeps, and what is refused."""

import fcntl
import hashlib
import io
import json
import os
import shlex
import shutil
import signal
import struct
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

import infer
import unifashion.caption
from tests.parity import randomise
from tests.rooms import BAD_FILES, ROOT, SMALL, photo, write_bad_files
from unifashion import UserError, lora, runs
from unifashion.caption import Caption, CaptionFile
from unifashion.config import PRESETS, TINY, UniFashionConfig
from unifashion.llama import LlamaConfig
from unifashion.lora import LoRAConfig
from unifashion.model import UniFashion
from unifashion.preprocess import qformer_image, read_image
from unifashion.tokenizers import INSTRUCTIONS, SentencePiece, prompt
from weights import load

pytestmark = pytest.mark.usefixtures("one_thread")

CFG = replace(
    SMALL,
    llama=LlamaConfig(vocab_size=1024, dim=32, depth=2, heads=2, mlp_dim=48, context=192),
    lora=LoRAConfig(rank=2, alpha=4.0, dropout=0.0),
)
PICTURES = {"a.png": (60, 80), "b.png": (90, 120), "c.png": (80, 40), "d.png": (33, 70), "e.png": (64, 64)}
KEYS = ["image", "style", "model", "sha256", "caption", "tokens", "whole"]
WORDS = "llama_tokenizer.model"
Run = Callable[..., tuple[str, str]]


# Whose caption


def test_compiled_it_writes_the_same(run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    asked = []
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setattr(torch, "compile", lambda f, **how: (asked.append(f.__qualname__), f)[1])
    plain, _ = run("a.png", "d.png")
    assert not asked
    compiled, err = run("a.png", "d.png", "--compile")
    assert compiled == plain and asked == ["Llama.step"] and "note: compiled the LLM's step in " in err


def test_one_picture_prints_just_its_caption_and_several_with_their_paths_in_order(run: Run):
    alone = {name: run(name)[0] for name in PICTURES}
    assert all(text.endswith("\n") and text.count("\n") == 1 and text.strip() for text in alone.values())
    assert len(set(alone.values())) == len(PICTURES)  # the picture matters
    order = ["d.png", "a.png", "c.png"]
    assert run(*order)[0] == "".join(f"{name}: {alone[name]}" for name in order)


def test_a_caption_depends_neither_on_its_batch_nor_on_its_place(run: Run, monkeypatch: pytest.MonkeyPatch):
    for flags in ((), ("--beams", "3")):
        together = captions(run, *PICTURES, *flags)
        assert captions(run, *reversed(PICTURES), *flags) == together
        with monkeypatch.context() as patch:
            for size in (1, 2):
                patch.setattr(infer, "BATCH", size)
                assert captions(run, *PICTURES, *flags) == together


def test_beams_share_the_memory_of_a_batch(run: Run, monkeypatch: pytest.MonkeyPatch):
    write, sizes = unifashion.caption.write_captions, []
    monkeypatch.setattr(
        unifashion.caption, "write_captions", lambda *a: (sizes.append(len(a[2])), write(*a))[1]
    )
    monkeypatch.setattr(infer, "BATCH", 4)
    for beams, expected in ((1, [4, 1]), (2, [2, 2, 1]), (3, [1] * 5), (5, [1] * 5)):
        sizes.clear()
        captions(run, *PICTURES, "--beams", str(beams))
        assert sizes == expected


@pytest.mark.parametrize("style", INSTRUCTIONS)
def test_the_caption_is_what_the_llm_finds_likeliest_after_the_template(run: Run, room: Path, style: str):
    """Word for word, without a cache, from a picture and a prompt made here."""
    model, words = loaded(room)
    before, after = prompt(words, style)
    z = see(model, room / "b.png")
    ids: list[int] = []
    while len(ids) < 12 and words.eos not in ids:
        ids.append(next_logits(model, z, before, after + ids)[-1].argmax().item())
    wanted = words.decode(ids).strip()
    assert wanted and captions(run, "b.png", "--style", style) == {"b.png": wanted}
    assert captions(run, "b.png", "--style", style, "--beams", "1") == {"b.png": wanted}


def test_more_beams_find_captions_that_are_likelier(run: Run, room: Path, spy: list[dict]):
    model, words = loaded(room)
    before, after = prompt(words, "fashiongen")
    greedy = captions(run, *PICTURES)
    assert captions(run, *PICTURES, "--beams", "3") != greedy

    def score(ids: list[int], name: str) -> float:
        ids = ids[: ids.index(words.eos) + 1] if words.eos in ids else ids
        logits = next_logits(model, see(model, room / name), before, after + ids[:-1])[-len(ids) :]
        return logits.log_softmax(-1).gather(1, torch.tensor(ids)[:, None]).mean().item()

    one, three = (
        sum(score(row.tolist(), name) for row, name in zip(call["ids"], PICTURES, strict=True))
        for call in spy
    )
    assert three > one


def test_every_style_has_its_instruction_and_fashiongen_is_the_default(run: Run, room: Path, spy: list[dict]):
    words, said = SentencePiece(room / "weights" / WORDS), {}
    for style, instruction in INSTRUCTIONS.items():
        said[style] = run("a.png", "--style", style)[0]
        before, after = spy[-1]["before"].tolist(), spy[-1]["after"][0].tolist()
        assert words.decode(before) == "USER: <Img>" and before[0] == words.bos
        assert words.decode(after) == f"</Img>{instruction} Assistant:"
    assert len(set(said.values())) == 3
    assert run("a.png")[0] == said["fashiongen"]
    assert all(style in help_text() for style in INSTRUCTIONS)


def test_the_name_of_a_file_says_nothing_about_its_caption(run: Run, room: Path):
    names = ["red shirt.png", "blue dress, long sleeves.png", "no.jpg"]
    for name in names:
        shutil.copy(room / "a.png", room / name)
    assert set(captions(run, *names).values()) == set(captions(run, "a.png").values())


@pytest.mark.parametrize(
    "name", ["cmyk.jpg", "deep.png", "palette.png", "clear.png", "moving.gif", "grey.png", "turned.png"]
)
def test_every_kind_of_picture_is_described_as_its_plain_copy(run: Run, room: Path, name: str):
    base = photo(room / "base.png", (60, 80), 4)
    exif = Image.Exif()
    exif[0x0112] = 6  # turn right by a quarter to see it upright
    kinds = {
        "cmyk.jpg": base.convert("CMYK"),
        "deep.png": Image.fromarray(np.array(base.convert("L")).astype(np.uint16) * 257),
        "palette.png": base.quantize(16),
        "clear.png": base.copy(),
        "moving.gif": base,
        "grey.png": base.convert("L"),
        "turned.png": base.rotate(90, expand=True),
    }
    kinds["clear.png"].putalpha(Image.linear_gradient("L").resize(base.size))
    more = {"save_all": True, "append_images": [Image.new("RGB", base.size)]} if name == "moving.gif" else {}
    more |= {"exif": exif} if name == "turned.png" else {}
    kinds[name].save(room / name, **more)
    read_image(room / name).save(room / "plain.png")
    told = captions(run, name, "plain.png")
    assert told[name] == told["plain.png"] != ""
    if name == "turned.png":
        assert told[name] == captions(run, "base.png")["base.png"]


def test_numbers_that_overflow_are_told_and_nothing_is_written(room: Path, capsys, monkeypatch):
    monkeypatch.setattr(
        UniFashion, "see", lambda model, x: torch.full((len(x), 2, model.cfg.vit.dim), torch.nan)
    )
    argv = "caption --weights weights --preset tiny --device cpu --quiet --image a.png --out out.jsonl"
    assert infer.main(shlex.split(argv)) == 2
    told = "infer.py: the numbers overflow: a file of weights is damaged\n"
    assert capsys.readouterr() == ("", told) and left_behind(room) == []


def test_a_caption_is_counted_with_its_end_and_is_whole_where_it_has_one(run: Run, monkeypatch):
    def write(model, z, before, after, max_tokens, eos, beams):
        return torch.tensor([[7, 8, 9, eos, eos, eos], [7, 8, 9, 8, 9, eos], [7, 8, 9, 8, 9, 7]])

    monkeypatch.setattr(UniFashion, "write", write)
    told = json.loads(run("a.png", "b.png", "c.png", "--json")[0])
    assert [(row["tokens"], row["whole"]) for row in told["captions"]] == [(4, True), (6, True), (6, False)]
    assert (told["tokens"], told["cut"]) == (16, 1)


def test_a_picture_that_is_named_twice_is_described_once(run: Run, tmp_path: Path):
    alone = run("a.png")[0]
    assert run("a.png", "./a.png")[0] == alone
    run("a.png", "b.png", "a.png", "--out", "out.jsonl")
    assert [row["image"] for row in rows(tmp_path / "out.jsonl")] == ["a.png", "b.png"]


@pytest.mark.parametrize(
    "name", [b"two words.png", "été ’.png".encode(), b"\xff.png", b"line\nbreak.png", b"-x.png"]
)
def test_any_name_a_file_can_have_is_fine(run: Run, room: Path, name: bytes):
    path = os.fsdecode(name)
    shutil.copy(room / "a.png", room / path)
    alone = run("a.png")[0]
    shown = path.encode("utf-8", "backslashreplace").decode()
    # A name that begins with a minus is no flag behind "="
    assert run("b.png", flags=[f"--image={path}"])[0] == alone
    if name != b"-x.png":
        assert f"{shown}: {alone}" in run(path, "b.png")[0]
        assert list(captions(run, path)) == [path]
    for _ in range(2):
        run("b.png", "--out", "out.jsonl", flags=[f"--image={path}"])
        (row,) = rows(room / "out.jsonl")
        assert row["image"] == path and row["caption"] == alone.strip()
    if name != b"-x.png":
        (room / path).unlink()
        assert infer.main(["caption", "--weights", "weights", "--preset", "tiny", "--image", path]) == 2


def test_bf16_runs_on_a_cpu(run: Run):
    report = json.loads(run(*PICTURES, "--json", "--dtype", "bf16")[0])
    assert report["dtype"] == "bf16" and all(row["caption"] for row in report["captions"])
    assert len({row["caption"] for row in report["captions"]}) > 1


# What is told


def test_captions_go_to_stdout_and_all_else_to_stderr(run: Run, room: Path):
    out, err = run("a.png", "b.png", preset=None)
    assert [line.split(": ")[0] for line in out.splitlines()] == ["a.png", "b.png"]
    assert (
        "note: preset tiny: weights holds no trained full model, and tiny knows only drawn garments\n" in err
    )
    assert "2/2" in err  # the progress bar
    last = err.splitlines()[-1]
    tokens, seconds, speed = (float(last.split()[i]) for i in (0, 3, 5))
    assert last.startswith(f"{tokens:.0f} tokens in {seconds:.2f} s, {speed} a second")
    assert tokens > 2 and speed > 0
    assert run("a.png", "b.png", "--quiet", preset=None) == (out, "")
    assert run("a.png", "--out", "out.jsonl")[0] == ""
    assert run("a.png", "--out", "out.jsonl")[1].endswith("no new captions\n")
    assert run("c.png", "--out", "out.jsonl", "--quiet") == ("", "")


def test_json_is_one_object_on_stdout(run: Run, room: Path):
    out, err = run("b.png", "a.png", "--json", "--style", "fashion200k")
    assert out.count("\n") == 1 and out.isascii() and "tokens in" not in err
    report = json.loads(out)
    assert [list(row) for row in report["captions"]] == [KEYS] * 2
    for row, name in zip(report["captions"], ("b.png", "a.png"), strict=True):
        assert row["image"] == name and row["style"] == "fashion200k"
        assert row["model"] == "unifashion tiny " + digest(room / "weights" / "model.safetensors")[:12]
        assert row["sha256"] == digest(room / name)
    plain = run("b.png", "a.png", "--style", "fashion200k")[0]
    assert plain == "".join(f"{row['image']}: {row['caption']}\n" for row in report["captions"])
    assert report["tokens"] > 0 and report["seconds"] >= 0 and report["tokens_per_second"] > 0
    assert (report["device"], report["dtype"], report["notes"]) == ("cpu", "fp32", [])
    assert run("b.png", "--json", "--quiet")[1] == ""


def test_tokens_and_cut_captions_are_counted(run: Run, monkeypatch: pytest.MonkeyPatch):
    says(monkeypatch, Caption("one two", 3, True), Caption("three", 2, False), Caption("four", 2, False))
    report = json.loads(run("a.png", "b.png", "c.png", "--json")[0])
    assert (report["tokens"], report["cut"]) == (7, 2)
    says(monkeypatch, Caption("one two", 3, True), Caption("three", 2, False))
    assert "; 1 cut at --max-tokens 12\n" in run("a.png", "b.png")[1]
    says(monkeypatch, Caption("one two", 3, True))
    assert "cut" not in run("a.png")[1]


def test_one_token_is_a_caption_that_is_cut(run: Run, room: Path, spy: list[dict]):
    out, err = run("a.png", "b.png", "--max-tokens", "1")
    assert err.endswith("; 2 cut at --max-tokens 1\n") and "\n2 tokens in " in err.replace("\r", "\n")
    words = SentencePiece(room / "weights" / WORDS)
    for name, text in captions(run, "a.png", "b.png").items():
        (short,) = captions(run, name, "--max-tokens", "1").values()
        assert spy[-1]["ids"].shape == (1, 1) and words.decode(spy[-1]["ids"][0].tolist()) == short
        assert text.startswith(short)


def test_most_captions_here_end_by_themselves(run: Run):
    """Or no test would see an end."""
    report = json.loads(run(*PICTURES, "--json", "--max-tokens", "40")[0])
    assert 0 <= report["cut"] < 5 and 5 < report["tokens"] < 200


def test_a_caption_is_one_line_whatever_the_model_says(run: Run, room: Path, monkeypatch: pytest.MonkeyPatch):
    says(monkeypatch, Caption("a red\nshirt\r\n", 5, True), Caption("a\u2028b", 5, True))
    out, _ = run("a.png", "b.png", "--quiet")
    assert out.splitlines() == ["a.png: a red shirt", "b.png: a b"]


def test_help_answers_without_torch():
    asked = start("-X", "importtime", "infer.py", "caption", "--help")
    assert asked.returncode == 0 and "--style" in asked.stdout
    assert "argparse" in asked.stderr and "torch" not in asked.stderr and "numpy" not in asked.stderr


# The file


def test_the_file_has_a_line_for_each_picture(run: Run, room: Path):
    run(*PICTURES, "--out", "out.jsonl")
    text = (room / "out.jsonl").read_bytes()
    assert text.isascii() and text.endswith(b"\n") and text.count(b"\n") == len(PICTURES)
    report = json.loads(run(*PICTURES, "--json")[0])
    assert rows(room / "out.jsonl") == report["captions"]
    assert [list(row) for row in report["captions"]] == [KEYS] * len(PICTURES)
    assert left_behind(room) == ["out.jsonl"]


def test_what_is_done_is_not_done_again(run: Run, room: Path, monkeypatch: pytest.MonkeyPatch):
    first = json.loads(run("a.png", "b.png", "--out", "out.jsonl", "--json")[0])
    before = (room / "out.jsonl").read_bytes(), (room / "out.jsonl").stat().st_mtime_ns
    with monkeypatch.context() as patch:
        not_loaded(patch)
        out, err = run("a.png", "b.png", "--out", "out.jsonl")
        assert out == "" and "note: 2 of 2 pictures have their caption in out.jsonl\n" in err
        again = json.loads(run("b.png", "a.png", "--out", "out.jsonl", "--json")[0])
        assert again["captions"] == first["captions"][::-1] and again["tokens"] == 0
        assert run("a.png", "--out", "out.jsonl", "--quiet") == ("", "")
    assert ((room / "out.jsonl").read_bytes(), (room / "out.jsonl").stat().st_mtime_ns) == before
    assert left_behind(room) == ["out.jsonl"]


def test_only_pictures_that_changed_or_came_are_described_anew(run: Run, room: Path, spy: list[dict]):
    run("a.png", "b.png", "c.png", "--out", "out.jsonl")
    before = rows(room / "out.jsonl")
    photo(room / "b.png", (50, 50), 77)
    report = json.loads(run("a.png", "b.png", "c.png", "d.png", "--out", "out.jsonl", "--json")[0])
    assert [len(call["ids"]) for call in spy] == [3, 2]
    assert report["notes"] == ["2 of 4 pictures have their caption in out.jsonl"]
    after = rows(room / "out.jsonl")
    assert after == report["captions"] and [row["image"] for row in after] == [
        "a.png",
        "b.png",
        "c.png",
        "d.png",
    ]
    assert after[0] == before[0] and after[2] == before[2]
    assert after[1]["sha256"] == digest(room / "b.png") != before[1]["sha256"]
    assert after[1]["caption"] != before[1]["caption"]


def test_a_caption_that_was_cut_is_written_anew_where_more_tokens_are_allowed(run: Run, room: Path):
    run("a.png", "--out", "out.jsonl", "--max-tokens", "1")
    assert "1 of 1 pictures have" in run("a.png", "--out", "out.jsonl", "--max-tokens", "1")[1]
    run("a.png", "--out", "out.jsonl", "--max-tokens", "40")
    (row,) = map(json.loads, (room / "out.jsonl").read_text().splitlines())
    assert row["whole"] and row["tokens"] > 1


def test_captions_of_other_beams_are_another_models(run: Run):
    run("a.png", "--out", "out.jsonl")
    told = run("a.png", "--out", "out.jsonl", "--beams", "3", code=2)[1]
    assert "holds captions by unifashion tiny" in told and told.count("\n") == 1


def test_two_runs_at_once_do_not_write_over_one_another(room: Path):
    row = {"style": "s", "model": "m", "sha256": "0", "caption": "x", "tokens": 2, "whole": True}
    first, second = (CaptionFile(room / "both.jsonl", "m") for _ in "12")
    first.add([{"image": "a", **row}])
    with pytest.raises(UserError, match="both.jsonl is being written by another run"):
        second.add([{"image": "b", **row}])
    first.finish()
    first.lock.close()
    late = CaptionFile(room / "both.jsonl", "m")
    second.lock.close()
    second.lock = None
    second.add(
        [{"image": "b", **row}]
    )  # it began before the first had ended, and keeps what that has written
    second.finish()
    second.lock.close()
    assert late.rows.keys() < CaptionFile(room / "both.jsonl", "m").rows.keys() == {("a", "s"), ("b", "s")}


def test_another_style_stands_beside_the_first(run: Run, room: Path):
    run("a.png", "b.png", "--out", "out.jsonl")
    first = rows(room / "out.jsonl")
    out = run("a.png", "--out", "out.jsonl", "--style", "fashion200k", "--json")[0]
    both = rows(room / "out.jsonl")
    assert both[:2] == first and both[2:] == json.loads(out)["captions"]
    assert [(row["image"], row["style"]) for row in both] == [
        ("a.png", "fashiongen"),
        ("b.png", "fashiongen"),
        ("a.png", "fashion200k"),
    ]


def test_a_run_that_was_stopped_goes_on(
    run: Run, room: Path, monkeypatch: pytest.MonkeyPatch, spy: list[dict]
):
    monkeypatch.setattr(infer, "BATCH", 2)
    run(*PICTURES, "--out", "whole.jsonl")
    spy.clear()

    with monkeypatch.context() as patch:
        stop_at(patch, 2)
        _, err = run(*PICTURES, "--out", "out.jsonl", "--quiet", code=130)
    assert err == "infer.py: stopped\n"
    assert left_behind(room) == ["out.jsonl.part", "whole.jsonl"]
    part = room / "out.jsonl.part"
    assert rows(part) == rows(room / "whole.jsonl")[:2]
    with open(part, "a") as file:
        file.write('{"image": "c.png", "style": "fashiong')  # as a kill in the middle of writing leaves it

    _, err = run(*PICTURES, "--out", "out.jsonl")
    assert "note: 2 of 5 pictures have their caption in out.jsonl\n" in err
    assert [len(call["ids"]) for call in spy] == [2, 2, 1]
    assert (room / "out.jsonl").read_bytes() == (room / "whole.jsonl").read_bytes()
    assert left_behind(room) == ["out.jsonl", "whole.jsonl"]


def test_a_torn_line_is_not_glued_to_the_next(run: Run, room: Path, monkeypatch: pytest.MonkeyPatch):
    """Stopped, torn, gone on, and stopped again."""
    monkeypatch.setattr(infer, "BATCH", 1)
    run(*PICTURES, "--out", "whole.jsonl")
    whole = (room / "whole.jsonl").read_bytes().splitlines(keepends=True)
    part = room / "out.jsonl.part"
    part.write_bytes(whole[0] + whole[1][:-1])  # its end is there, but for the line's
    with monkeypatch.context() as patch:
        stop_at(patch, 3)
        run(*PICTURES, "--out", "out.jsonl", code=130)
    assert part.read_bytes() == b"".join(whole[:3])
    run(*PICTURES, "--out", "out.jsonl")
    assert (room / "out.jsonl").read_bytes() == b"".join(whole)


def test_a_run_that_was_killed_when_all_was_written_is_finished(
    run: Run, room: Path, monkeypatch: pytest.MonkeyPatch
):
    run("a.png", "b.png", "--out", "out.jsonl")
    whole = (room / "out.jsonl").read_bytes()
    (room / "out.jsonl").rename(room / "out.jsonl.part")
    not_loaded(monkeypatch)
    run("a.png", "b.png", "--out", "out.jsonl")
    assert (room / "out.jsonl").read_bytes() == whole and left_behind(room) == ["out.jsonl"]


def test_what_another_run_is_writing_is_not_finished_for_it(
    run: Run, room: Path, monkeypatch: pytest.MonkeyPatch
):
    run("a.png", "--out", "out.jsonl")
    (room / "out.jsonl").rename(room / "out.jsonl.part")
    before = (room / "out.jsonl.part").read_bytes()
    not_loaded(monkeypatch)
    with open(room / "out.jsonl.part", "ab") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        _, err = run("a.png", "--out", "out.jsonl", "--quiet", code=2)
    assert err == "infer.py: out.jsonl is being written by another run\n"
    assert (room / "out.jsonl.part").read_bytes() == before and not (room / "out.jsonl").exists()


def test_an_empty_caption_is_told(run: Run, room: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(unifashion.caption, "write_captions", lambda *_: [Caption("", 1, True)])
    _, err = run("a.png", "--out", "out.jsonl", "--quiet")
    assert err == "note: 1 of the captions are empty, that of a.png for one\n"


def test_a_picture_has_one_name_however_it_is_said(run: Run, room: Path, monkeypatch: pytest.MonkeyPatch):
    (room / "set").mkdir()
    run("a.png", "--out", "set/out.jsonl")
    before = (room / "set/out.jsonl").read_bytes()
    assert json.loads(before)["image"] == "../a.png"
    not_loaded(monkeypatch)
    run(str(room / "a.png"), "--out", str(room / "set/out.jsonl"))
    run("set/../a.png", "--out", "set/out.jsonl")
    assert (room / "set/out.jsonl").read_bytes() == before


def test_a_folder_that_vanishes_meanwhile_is_one_line(run: Run, room: Path, monkeypatch: pytest.MonkeyPatch):
    (room / "there").mkdir()

    def write_and_take_away(*_: object) -> list[Caption]:
        shutil.rmtree(room / "there")
        return [Caption("x", 1, True)]

    monkeypatch.setattr(unifashion.caption, "write_captions", write_and_take_away)
    _, err = run("a.png", "--out", "there/out.jsonl", "--quiet", code=2)
    assert err == "infer.py: there/out.jsonl cannot be written: No such file or directory\n"


def test_a_run_that_is_stopped_leaves_the_file_that_was_there(
    run: Run, room: Path, monkeypatch: pytest.MonkeyPatch
):
    run("a.png", "--out", "out.jsonl")
    before = (room / "out.jsonl").read_bytes()
    monkeypatch.setattr(infer, "BATCH", 1)
    with monkeypatch.context() as patch:
        stop_at(patch, 2)
        run("a.png", "b.png", "c.png", "--out", "out.jsonl", code=130)
    assert (room / "out.jsonl").read_bytes() == before
    run("a.png", "b.png", "c.png", "--out", "out.jsonl")
    assert (room / "out.jsonl").read_bytes().startswith(before)
    assert [row["image"] for row in rows(room / "out.jsonl")] == ["a.png", "b.png", "c.png"]


def test_a_picture_that_vanishes_meanwhile_leaves_what_is_done(
    run: Run, room: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(infer, "BATCH", 2)
    write = unifashion.caption.write_captions

    def write_and_take_away(*args: object) -> list[Caption]:
        (room / "c.png").unlink(missing_ok=True)
        return write(*args)

    monkeypatch.setattr(unifashion.caption, "write_captions", write_and_take_away)
    _, err = run(*PICTURES, "--out", "out.jsonl", "--quiet", code=2)
    assert err == "infer.py: c.png: no such file\n"
    assert [row["image"] for row in rows(room / "out.jsonl.part")] == ["a.png", "b.png"]


# The command itself


@pytest.mark.slow
def test_a_killed_command_goes_on_where_it_was(tiny: Path, tmp_path: Path):
    for i in range(48):
        photo(tmp_path / f"{i:02}.png", (30, 40), i)
    names = [str(tmp_path / f"{i:02}.png") for i in range(48)]
    flags = ["--weights", str(tiny), "--preset", "tiny", "--device", "cpu", "--quiet", "--max-tokens", "90"]
    whole, out, part = (tmp_path / name for name in ("whole.jsonl", "out.jsonl", "out.jsonl.part"))
    command = [sys.executable, "infer.py", "caption", *flags, "--out", str(out), "--image", *names]
    process = subprocess.Popen(command, cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"})
    while not (part.exists() and part.stat().st_size) and process.poll() is None:
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL and not out.exists()
    done = part.read_bytes().count(b"\n")
    assert done in (16, 32), done

    torch.set_num_threads(1)
    argv = ["caption", *flags, "--image", *names]
    assert infer.main([*argv, "--out", str(out)]) == 0 and not part.exists()
    assert infer.main([*argv, "--out", str(whole)]) == 0
    assert out.read_bytes() == whole.read_bytes()


@pytest.mark.slow
def test_a_terminal_that_is_not_utf8_is_no_reason_to_fail(tiny: Path, tmp_path: Path):
    names = [tmp_path / os.fsdecode(name) for name in ("robe d’été.png".encode(), b"\xff.png")]
    for i, name in enumerate(names):
        photo(name, (30, 40), i)
    script = """
import sys, infer, unifashion.caption as c, weights.load as l
l.load_unifashion = lambda *_, **__: None
c.write_captions = lambda model, words, pictures, *_: [c.Caption("d’été", 3, True) for _ in pictures]
assert infer.main(sys.argv[1:]) == 0
sys.exit(infer.main([*sys.argv[1:], sys.argv[-1] + "’"]))
"""
    flags = ["--weights", str(tiny), "--preset", "tiny", "--device", "cpu", "--quiet"]
    image, shown = ["--image", *map(str, names)], [ascii(str(name))[1:-1] for name in names]
    ran = start("-c", script, "caption", *flags, *image)
    assert ran.returncode == 2 and ran.stderr == f"infer.py: {shown[1]}\\u2019: no such file\n"
    assert ran.stdout == "".join(f"{name}: d\\u2019\\xe9t\\xe9\n" for name in shown)

    out = tmp_path / "out’.jsonl"
    ran = start("infer.py", "caption", *flags[:-1], *image, "--out", str(out), "--json")
    assert ran.returncode == 0, ran.stderr
    assert json.loads(ran.stdout)["captions"] == rows(out)
    assert [row["image"] for row in rows(out)] == [name.name for name in names]


# Bad input

NOT_CAPTIONS = {
    "a letter": b"Dear Sir or Madam\n",
    "JSON of another kind": b'{"loss": 1.5}\n',
    "a JSON list": b"[1, 2]\n",
    "a number": b"7\n",
    "JSON over several lines": b'{\n "image": "a.png"\n}\n',
    "a caption that is no text": b'{"image": "a", "style": "b", "model": "c", "sha256": "d", "caption": 7}\n',
    "a picture": b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR\xff\xfe",
    "zeros": bytes(100),
    "very many brackets": b"[" * 100_000,
    "Latin-1": '{"image": "é"}\n'.encode("latin-1"),
}
BAD = {
    "no picture": ("--style fashiongen", "required: --image"),
    "a flag without its pictures": ("--image", "argument --image: expected at least one argument"),
    "an unknown flag": ("OK --colour red", "unrecognized arguments: --colour red"),
    "half a flag": ("OK --max 5", "unrecognized arguments: --max 5"),
    "half another flag": ("OK --beam 5", "unrecognized arguments: --beam 5"),
    "a flag of tryon": ("OK --steps 5", "unrecognized arguments: --steps 5"),
    "an unknown style": (
        "OK --style vogue",
        "unknown caption style 'vogue': it is one of fashion200k, fashiongen, fashioniq-cap",
    ),
    "an empty style": ("OK --style ''", "unknown caption style ''"),
    "an unknown model": ("OK --model gpt", "argument --model: invalid choice: 'gpt'"),
    "an unknown preset": ("OK --preset huge", "argument --preset: invalid choice: 'huge'"),
    "an unknown device": ("OK --device tpu", "argument --device: invalid choice: 'tpu'"),
    "an unknown type": ("OK --dtype int8", "argument --dtype: invalid choice: 'int8'"),
    "no tokens": ("OK --max-tokens 0", "--max-tokens is 0, must be 1 to "),
    "less than no tokens": ("OK --max-tokens -3", "--max-tokens is -3, must be 1 to "),
    "tokens beyond the context": ("OK --max-tokens 193", "--max-tokens is 193, must be 1 to 1"),
    "tokens in words": ("OK --max-tokens many", "argument --max-tokens: invalid int value: 'many'"),
    "no beams": ("OK --beams 0", "--beams is 0, must be 1 to 32"),
    "too many beams": ("OK --beams 33", "--beams is 33, must be 1 to 32"),
    "half a beam": ("OK --beams 1.5", "argument --beams: invalid int value: '1.5'"),
    "no such folder of weights": ("OK --weights elsewhere", "elsewhere: there is no such folder of weights"),
    "a picture's path that is too long": (f"--image {'p' * 300}.png", "no such file"),
    "an out path in no folder": ("OK --out nowhere/out.jsonl", "nowhere/out.jsonl cannot be written: --out wants"),
    "an out path in a file": ("OK --out a.png/out.jsonl", "a.png/out.jsonl cannot be written: --out wants"),
    "an out path that is a folder": ("OK --out folder.png", "folder.png cannot be written: --out wants"),
    "an out path that is this folder": ("OK --out .", ". cannot be written: --out wants"),
    "an out path of nothing": ("OK --out ''", ". cannot be written: --out wants"),
    "an out path that is the root": ("OK --out /", "/ cannot be written: --out wants"),
    "an out path that is a device": ("OK --out /dev/null", "/dev/null cannot be written: --out wants"),
    "an out path that is too long": (f"OK --out {'o' * 300}.jsonl", "File name too long"),
    "an out path that is nearly too long": (f"OK --out {'o' * 248}.jsonl", "File name too long"),
    "an out path whose part is a folder": ("OK --out whole", "whole.part cannot be written: --out wants"),
    "an out path that is a picture": ("OK --out a.png", "a.png is no file of captions (line 1): give --out another name"),
}  # fmt: skip


@pytest.mark.parametrize(("line", "message"), BAD.values(), ids=BAD)
def test_bad_input_is_one_line_that_says_what(
    bad: Path, capsys: pytest.CaptureFixture, line: str, message: str
):
    words = shlex.split(line)
    refused(bad, capsys, ["--image", "a.png", *words[1:]] if words[0] == "OK" else words, message)


@pytest.mark.parametrize("kind", BAD_FILES)
def test_a_bad_picture_among_good_ones_is_named(bad: Path, capsys: pytest.CaptureFixture, kind: str):
    for flags in ((), ("--json", "--out", "out.jsonl"), ("--out", "begun.jsonl", "--quiet")):
        argv = ["--image", "a.png", kind, "b.png", *flags]
        refused(bad, capsys, argv, f"{kind}: {BAD_FILES[kind]}")


def test_all_bad_pictures_are_named_at_once(bad: Path, capsys: pytest.CaptureFixture):
    first, second = "absent.png", "empty.png"
    for kinds in ((first, second), (second, first)):
        argv = ["--image", kinds[0], "a.png", kinds[1], "--out", "out.jsonl"]
        refused(bad, capsys, argv, "; ".join(f"{kind}: {BAD_FILES[kind]}" for kind in kinds))


@pytest.mark.parametrize("content", NOT_CAPTIONS.values(), ids=NOT_CAPTIONS)
def test_a_file_that_is_no_captions_is_not_overwritten(
    bad: Path, capsys: pytest.CaptureFixture, content: bytes
):
    (bad / "out.jsonl").write_bytes(content)
    refused(
        bad, capsys, ["--image", "a.png", "--out", "out.jsonl"], "out.jsonl is no file of captions (line 1)"
    )
    (bad / "new.jsonl.part").write_bytes(content + b"\ntorn")
    refused(
        bad,
        capsys,
        ["--image", "a.png", "--out", "new.jsonl"],
        "new.jsonl.part is no file of captions (line 1)",
    )


def test_a_bad_line_is_named_by_its_number(bad: Path, capsys: pytest.CaptureFixture):
    (bad / "out.jsonl").write_text(ROW + "\n" + ROW[:-9] + "\n" + ROW)
    refused(
        bad, capsys, ["--image", "a.png", "--out", "out.jsonl"], "out.jsonl is no file of captions (line 3)"
    )


@pytest.mark.parametrize("name", ["out.jsonl", "out.jsonl.part"])
def test_captions_by_another_model_are_not_mixed_with_ours(
    bad: Path, capsys: pytest.CaptureFixture, name: str
):
    (bad / name).write_text(ROW)
    ours = "unifashion tiny " + digest(bad / "weights" / "model.safetensors")[:12]
    message = f"{name} holds captions by unifashion tiny 0123456789ab, not {ours}: give --out another name"
    refused(bad, capsys, ["--image", "a.png", "--out", "out.jsonl"], message)


def test_an_out_folder_that_cannot_be_written_to_is_refused(
    bad: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(
        "unifashion.caption.os.access", lambda path, mode: mode != os.W_OK
    )  # root may write anywhere
    refused(bad, capsys, ["--image", "a.png", "--out", "out.jsonl"], "out.jsonl cannot be written")


def test_the_most_tokens_there_may_be_is_told_and_works(run: Run, capsys: pytest.CaptureFixture):
    for style in INSTRUCTIONS:
        _, err = run("a.png", "--max-tokens", "1000", "--style", style, code=2)
        most = int(err.partition("must be 1 to ")[2].partition(":")[0])
        assert 100 < most < CFG.llama.context
        run("a.png", "--max-tokens", str(most), "--style", style)
        run("a.png", "--max-tokens", str(most), "--style", style, "--beams", "32")
        run("a.png", "--max-tokens", str(most + 1), "--style", style, code=2)


def test_a_default_number_of_tokens_is_within_every_presets_context():
    words = load.llm_tokenizer("tiny")
    default = infer.parse(["caption", "--image", "a.png"]).max_tokens
    for style in INSTRUCTIONS:
        unifashion.caption.check_search(TINY, words, style, default, beams=1)  # no complaint


def test_the_command_itself_exits_with_2_and_one_line(bad: Path):
    ran = start("infer.py", "caption", "--image", str(bad / "cut.jpg"), "--style", "vogue")
    assert (ran.returncode, ran.stdout) == (2, "")
    assert ran.stderr.startswith("infer.py: ") and ran.stderr.count("\n") == 1


@pytest.mark.parametrize("name", [WORDS, "llama.safetensors", "vit.safetensors", "model.safetensors"])
def test_weights_that_are_missing_cut_short_or_another_presets_are_one_line(
    room: Path, capsys: pytest.CaptureFixture, name: str
):
    path = spare(room) / name
    argv, whole = ["--image", "a.png", "--weights", "spare", "--out", "out.jsonl"], path.read_bytes()
    path.unlink()
    refused(room, capsys, argv, f"spare/{name} is missing: ")
    for part in (0, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:part])
        refused(room, capsys, argv, f"spare/{name}")
    if name == WORDS:
        path.write_bytes(whole + piece("zzzq"))
        refused(
            room, capsys, argv, f"spare/{name} does not fit the preset tiny: 1025 pieces, 1024 in the LLM"
        )
        path.write_bytes(b"\xff\xfe no tokenizer")
        refused(room, capsys, argv, f"spare/{name} is not a SentencePiece model, or damaged")
    else:
        tensors = load_file(room / "weights" / name)
        save_file({**tensors, min(tensors): torch.zeros(2, 2, 2, 2, 2)}, path)
        refused(room, capsys, argv, f"spare/{name} does not fit the preset tiny: ")


def test_a_wrong_tokenizer_is_told_before_weights_and_pictures_are_read(
    bad: Path, capsys: pytest.CaptureFixture
):
    path = spare(bad) / WORDS
    path.write_bytes(path.read_bytes() + piece("zzzq"))
    refused(bad, capsys, ["--image", "cut.jpg", "--weights", "spare"], f"spare/{WORDS} does not fit")


def test_an_llm_of_another_preset_is_told_by_name(room: Path, capsys: pytest.CaptureFixture):
    other = replace(CFG, llama=replace(CFG.llama, dim=64))
    state = UniFashion(other, draws=False, writes=True).llama.state_dict()
    save_file(state, spare(room) / "llama.safetensors")
    argv = ["--image", "a.png", "--weights", "spare"]
    refused(room, capsys, argv, "spare/llama.safetensors does not fit the preset tiny: embed.weight: shape")


@pytest.mark.parametrize("lacks", ["text_adapter", "lora", "qformer"])
def test_a_model_that_never_learned_to_write_is_told_by_name(
    room: Path, capsys: pytest.CaptureFixture, lacks: str
):
    path = spare(room) / "model.safetensors"
    kept = {k: v for k, v in load_file(path).items() if runs.part_of(k) != lacks}
    assert kept
    save_file(kept, path)
    argv = ["--image", "a.png", "--weights", "spare", "--out", "out.jsonl"]
    refused(room, capsys, argv, f"spare/model.safetensors holds no {lacks}: its training is not finished")


# helpers

ROW = '{"image": "a.png", "style": "fashiongen", "model": "unifashion tiny 0123456789ab", "sha256": "0", "caption": "x", "tokens": 2, "whole": true}\n'


def captions(run: Run, *argv: str) -> dict[str, str]:
    return {row["image"]: row["caption"] for row in json.loads(run(*argv, "--json")[0])["captions"]}


def rows(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def left_behind(room: Path) -> list[str]:
    return sorted(path.name for path in room.iterdir() if path.suffix not in (".png", ""))


def help_text() -> str:
    parser = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit):
        patch.setattr(sys, "stdout", parser)
        infer.parse(["caption", "--help"])
    return parser.getvalue()


def loaded(room: Path) -> tuple[UniFashion, SentencePiece]:
    folder = room / "weights"
    return load.load_unifashion("tiny", folder, draws=False, writes=True), load.llm_tokenizer("tiny", folder)


def see(model: UniFashion, path: Path) -> torch.Tensor:
    picture = qformer_image(read_image(path), model.cfg.vit.image_size[0])
    return model.qformer(model.see(picture[None]))[0]


def next_logits(model: UniFashion, z: torch.Tensor, before: list[int], after: list[int]) -> torch.Tensor:
    """(len(after)+1,vocab), of what follows the soft prompt and each token of `after`."""
    prompt = model.soft_prompt(z, torch.tensor(before), torch.tensor([after]))
    return model.llama.logits(model.llama(prompt))[0, -len(after) - 1 :]


def says(monkeypatch: pytest.MonkeyPatch, *said: Caption) -> None:
    monkeypatch.setattr(unifashion.caption, "write_captions", lambda *_: list(said))


def stop_at(monkeypatch: pytest.MonkeyPatch, batch: int) -> None:
    write, calls = unifashion.caption.write_captions, []

    def stop(*args: object) -> list[Caption]:
        calls.append(args)
        if len(calls) == batch:
            raise KeyboardInterrupt
        return write(*args)

    monkeypatch.setattr(unifashion.caption, "write_captions", stop)


def not_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(load, "load_unifashion", lambda *_, **__: pytest.fail("loaded the weights"))


def start(*argv: str) -> subprocess.CompletedProcess:
    """A Python at a terminal that knows ASCII alone."""
    env = os.environ | {"PYTHONIOENCODING": "ascii", "OMP_NUM_THREADS": "1"}
    return subprocess.run([sys.executable, *argv], cwd=ROOT, capture_output=True, text=True, env=env)


def spare(room: Path) -> Path:
    """A copy of the weights, to spoil."""
    if not (room / "spare").exists():
        shutil.copytree(room / "weights", room / "spare")
    return room / "spare"


def piece(text: str) -> bytes:
    """One more piece for a tokenizer.model: a protobuf message may be appended to."""
    body = b"\x0a" + bytes([len(text)]) + text.encode() + b"\x15" + struct.pack("<f", -1000)
    return b"\x0a" + bytes([len(body)]) + body


def refused(room: Path, capsys: pytest.CaptureFixture, argv: list[str], message: str) -> None:
    """The command exits with 2 after one line that holds `message`, and leaves the room as it was."""
    before = {path: path.stat().st_mtime_ns for path in room.rglob("*")}
    defaults = shlex.split("--weights weights --preset tiny --device cpu --max-tokens 12")
    assert infer.main(["caption", *defaults, *argv]) == 2
    told = capsys.readouterr()
    assert told.out == ""
    assert told.err.startswith("infer.py: ") and message in told.err
    assert told.err.count("\n") == 1 and told.err.endswith("\n")
    assert {path: path.stat().st_mtime_ns for path in room.rglob("*")} == before


def write_weights(folder: Path, cfg: UniFashionConfig) -> Path:
    """Random weights of the half that writes, in the files of the tiny preset -> folder. Captions differ, and end."""
    shutil.copy(load.FOLDERS["tiny"] / WORDS, folder / WORDS)
    words = SentencePiece(folder / WORDS)
    model = randomise(UniFashion(cfg, draws=False, writes=True), 0)
    # What tells pictures apart must be louder than what they have in common.
    pictures = [photo(folder / "x.png", (60, 80), seed) for seed in range(20)]
    pictures = torch.stack([qformer_image(picture, cfg.vit.image_size[0]) for picture in pictures])
    (folder / "x.png").unlink()
    z = model.qformer(model.see(pictures))[0]
    model.text_adapter.weight *= 2 / z.std((0, 1))
    model.text_adapter.bias.copy_(-model.text_adapter.weight @ z.mean((0, 1)))
    odd = [i for i in range(len(words)) if words.first.is_byte(i) or words.first.is_control(i)]
    model.llama.lm_head.weight[[*odd, words.unk]] *= 0.01  # never likeliest
    model.llama.lm_head.weight[words.eos] *= 300
    for part in ("vit", "llama"):
        save_file(getattr(model, part).float().state_dict(), folder / f"{part}.safetensors")
    lora.inject(model.llama, cfg.lora)
    for i, tensor in enumerate(lora.adapter_state(model.llama).values()):
        tensor.copy_(0.1 * torch.randn(tensor.shape, generator=torch.Generator().manual_seed(i)))
    learned = runs.learned_state(model.float(), ["qformer", "text_adapter", "lora"])
    save_file({k: v.contiguous() for k, v in learned.items()}, folder / "model.safetensors")
    return folder


@pytest.fixture(scope="module")
@torch.no_grad()
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_weights(tmp_path_factory.mktemp("weights"), CFG)


@pytest.fixture(scope="module")
@torch.no_grad()
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """For a command of its own, whose preset no test can change."""
    return write_weights(tmp_path_factory.mktemp("tiny"), TINY)


@pytest.fixture
def room(tmp_path: Path, written: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Pictures and weights, to stand in; the tiny preset is CFG until the test ends."""
    monkeypatch.setitem(PRESETS, "tiny", CFG)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "weights").symlink_to(written)
    for i, (name, size) in enumerate(PICTURES.items()):
        photo(tmp_path / name, size, i)
    return tmp_path


@pytest.fixture
def run(room: Path, capsys: pytest.CaptureFixture) -> Run:
    """The command on pictures of the room -> what it printed on stdout and on stderr."""

    def run(
        *argv: str, flags: list[str] | None = None, preset: str | None = "tiny", code: int = 0
    ) -> tuple[str, str]:
        given = ["--weights", "weights", "--device", "cpu", "--max-tokens", "12"]
        given += ["--preset", preset] if preset else []
        assert infer.main(["caption", *given, "--image", *argv, *(flags or [])]) == code
        return tuple(capsys.readouterr())

    return run


@pytest.fixture
def spy(monkeypatch: pytest.MonkeyPatch) -> list[dict]:
    """What the LLM was asked, and said, a batch each."""
    calls, write = [], UniFashion.write

    def spied(
        self: UniFashion, z: torch.Tensor, before: torch.Tensor, after: torch.Tensor, *rest: int
    ) -> torch.Tensor:
        ids = write(self, z, before, after, *rest)
        calls.append({"before": before, "after": after, "ids": ids})
        return ids

    monkeypatch.setattr(UniFashion, "write", spied)
    return calls


@pytest.fixture
def bad(room: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The room, with everything in it that can be wrong; and a loader of weights that must not be called."""
    not_loaded(monkeypatch)
    write_bad_files(room)
    (room / "whole.part").mkdir()
    (room / "begun.jsonl.part").write_text('{"image": "a.png", "sty')  # of a run that was killed
    return room
