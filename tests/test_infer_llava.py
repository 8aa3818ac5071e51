"""`infer.py caption --model llava` on a small LLaVA in the published layout: what it is asked, whose captions are kept, what is refused."""

import json
import re
import shlex
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import infer
from tests.parity import randomise
from tests.rooms import BAD_FILES, photo, write_bad_files
from tests.test_infer_caption import KEYS, PICTURES, digest, left_behind, piece, rows, stop_at
from tests.test_infer_caption_folder import note_opened
from tests.test_llava import HF_FOLDER, ORIGINAL_FOLDER, SMALL, write_hf, write_original
from unifashion import UserError, llava
from unifashion.caption import read_keywords
from unifashion.clip import ImageConfig
from unifashion.data import keywords
from unifashion.llama import LlamaConfig
from unifashion.llava import LLaVA, LLaVAConfig
from unifashion.preprocess import llava_image, read_image
from unifashion.tokenizers import INSTRUCTIONS, SYSTEM, SentencePiece
from weights import llava as loading
from weights import load
from weights.llava import HF, llava_tokenizer, load_llava

pytestmark = pytest.mark.usefixtures("one_thread")

CFG = LLaVAConfig(
    ImageConfig(image_size=28, patch_size=7, dim=32, depth=3, heads=4, mlp_dim=56),
    LlamaConfig(1024, dim=32, depth=2, heads=2, mlp_dim=48, context=320),
)
WORDS = ("red", "long sleeve", "v-neck")
Run = Callable[..., tuple[str, str]]


# Whose caption


def test_pictures_get_the_captions_that_they_get_alone_in_order(run: Run, monkeypatch: pytest.MonkeyPatch):
    alone = {name: run(name)[0] for name in PICTURES}
    assert all(text.endswith("\n") and text.count("\n") == 1 and text.strip() for text in alone.values())
    assert len(set(alone.values())) == len(PICTURES)  # the picture matters
    order = ["d.png", "a.png", "c.png"]
    assert run(*order)[0] == "".join(f"{name}: {alone[name]}" for name in order)
    for flags in ((), ("--beams", "3"), ("--keywords", "words.txt")):
        together = captions(run, *PICTURES, *flags)
        with monkeypatch.context() as patch:
            patch.setattr(infer, "BATCH", 2)
            assert captions(run, *reversed(PICTURES), *flags) == together


@pytest.mark.parametrize("style", INSTRUCTIONS)
@pytest.mark.parametrize("listed", [False, True])
def test_the_caption_is_what_llava_finds_likeliest_after_the_question(
    run: Run, room: Path, style: str, listed: bool
):
    """Word for word, without a cache, from a picture and a prompt made here."""
    model, words = load_llava(room / "weights"), llava_tokenizer(room / "weights")
    question = INSTRUCTIONS[style]
    question += (
        " Use those of these words that match the picture, and leave out the others: red, long sleeve, v-neck."
        * listed
    )
    before = words.encode(f"{SYSTEM} USER: ")
    after = words.encode(f"\n{question} ASSISTANT:", bos=False)
    wanted = {}
    for name in PICTURES:
        seen = model.see(llava_image(read_image(room / name), 28)[None])
        ids: list[int] = []
        while len(ids) < 12 and words.eos not in ids:
            prompt = model.soft_prompt(seen, torch.tensor(before), torch.tensor([after + ids]))
            ids.append(model.llama.logits(model.llama(prompt))[0, -1].argmax().item())
        wanted[name] = words.decode(ids).strip()
    flags = ["--style", style] + ["--keywords", "words.txt"] * listed
    assert captions(run, *PICTURES, *flags) == wanted and all(wanted.values())


def test_captions_differ_with_the_style_and_the_key_words(run: Run):
    said = [tuple(captions(run, *PICTURES, "--style", style).values()) for style in INSTRUCTIONS]
    said.append(tuple(captions(run, *PICTURES, "--keywords", "words.txt").values()))
    assert len(set(said)) == 4


def test_liuhaotians_layout_says_the_same_under_its_own_name(run: Run, room: Path, source: LLaVA):
    ours = report(run, *PICTURES)["captions"]
    (room / "other").mkdir()
    write_original(source, room / "other", ".bin")
    theirs = report(run, *PICTURES, "--weights", "other")["captions"]
    assert [row["caption"] for row in theirs] == [row["caption"] for row in ours]
    assert {re.sub("[0-9a-f]{12}", "#", row["model"]) for row in theirs} == {f"{ORIGINAL_FOLDER} #"}


def test_nothing_of_unifashions_own_is_needed_or_read(run: Run, room: Path, monkeypatch: pytest.MonkeyPatch):
    assert sorted(path.name for path in (room / "weights").iterdir()) == [HF_FOLDER]
    for name in ("load_unifashion", "captioner", "llm_tokenizer", "learned_file"):
        monkeypatch.setattr(load, name, lambda *_, **__: pytest.fail("asked for UniFashion"))
    out, err = run("a.png", quiet=False)
    assert out.strip() and "preset" not in err and "tokens in" in err
    assert run("a.png", "--preset", "full")[0] == out


def test_some_captions_here_end_by_themselves(run: Run):
    """Or no test would see an end."""
    told = report(run, *PICTURES, "--max-tokens", "40")
    assert 0 < told["cut"] < 5 and told["tokens"] == sum(row["tokens"] for row in told["captions"])


def test_bf16_runs_on_a_cpu(run: Run):
    told = report(run, *PICTURES, "--dtype", "bf16")
    assert told["dtype"] == "bf16" and len({row["caption"] for row in told["captions"]}) > 1


# The file


def test_the_file_says_who_wrote_it(run: Run, room: Path):
    run(*PICTURES, "--out", "plain.jsonl")
    run(*PICTURES, "--out", "listed.jsonl", "--keywords", "words.txt", "--style", "fashioniq-cap")
    by = loading.llava_captioner(room / "weights")
    assert re.fullmatch(rf"{HF_FOLDER} [0-9a-f]{{12}}", by)
    for name, model, style in (
        ("plain.jsonl", by, "fashiongen"),
        ("listed.jsonl", loading.llava_captioner(room / "weights", WORDS), "fashioniq-cap"),
    ):
        written = rows(room / name)
        assert [row["image"] for row in written] == list(PICTURES)
        for row in written:
            assert list(row) == KEYS and row["sha256"] == digest(room / row["image"])
            assert (row["model"], row["style"]) == (model, style)
    assert report(run, "a.png", "--beams", "2")["captions"][0]["model"] == f"{by} beams 2"


def test_what_is_done_is_not_done_again(run: Run, room: Path, monkeypatch: pytest.MonkeyPatch):
    run("a.png", "b.png", "--out", "out.jsonl")
    before = (room / "out.jsonl").read_bytes()
    monkeypatch.setattr(loading, "load_llava", lambda *_: pytest.fail("loaded the weights"))
    err = run("a.png", "b.png", "--out", "out.jsonl", quiet=False)[1]
    assert "note: 2 of 2 pictures have their caption in out.jsonl\n" in err
    assert (room / "out.jsonl").read_bytes() == before


@pytest.mark.parametrize("flags", [[], ["--keywords", "words.txt"]])
def test_a_run_that_was_stopped_goes_on(
    run: Run, room: Path, monkeypatch: pytest.MonkeyPatch, flags: list[str]
):
    monkeypatch.setattr(infer, "BATCH", 2)
    run(*PICTURES, "--out", "whole.jsonl", *flags)
    with monkeypatch.context() as patch:
        stop_at(patch, 2)
        run(*PICTURES, "--out", "out.jsonl", *flags, code=130)
    assert rows(room / "out.jsonl.part") == rows(room / "whole.jsonl")[:2]
    err = run(*PICTURES, "--out", "out.jsonl", *flags, quiet=False)[1]
    assert "note: 2 of 5 pictures have their caption in out.jsonl\n" in err
    assert (room / "out.jsonl").read_bytes() == (room / "whole.jsonl").read_bytes()
    assert left_behind(room) == ["out.jsonl", "whole.jsonl", "words.txt"]


def test_captions_by_other_weights_or_other_words_are_not_mixed(run: Run, room: Path, source: LLaVA):
    run("a.png", "--out", "out.jsonl")
    told = "holds captions by llava-1.5-7b-hf"
    assert told in run("a.png", "--out", "out.jsonl", "--keywords", "words.txt", code=2)[1]
    run("a.png", "--out", "listed.jsonl", "--keywords", "words.txt")
    (room / "words.txt").write_text("red\t9\nlong sleeve\t1\nv-neck\n")  # counts are not read
    run("a.png", "--out", "listed.jsonl", "--keywords", "words.txt")
    (room / "words.txt").write_text("blue\n")
    assert told in run("a.png", "--out", "listed.jsonl", "--keywords", "words.txt", code=2)[1]
    (room / "other").mkdir()
    with torch.no_grad():
        tuned = LLaVA(CFG)
        tuned.load_state_dict({k: v * 1.01 for k, v in source.state_dict().items()})
    write_hf(tuned, room / "other", HF)
    assert told in run("a.png", "--out", "out.jsonl", "--weights", "other", code=2)[1]


def test_broken_pictures_of_a_folder_are_skipped_and_named(run: Run, room: Path):
    (room / "set").mkdir()
    write_bad_files(room / "set")
    photo(room / "set" / "good.png", (40, 60), 3)
    out, err = run("set", "--out", "out.jsonl")
    assert out == "" and all(
        f"skipped: set/{name}: {why}" in err for name, why in BAD_FILES.items() if name[0] in "elcb"
    )
    assert [row["image"] for row in rows(room / "out.jsonl")] == ["set/good.png", "set/whole.png"]


def test_of_the_data_set_pictures_and_the_key_words_alone_are_read(run: Run, room: Path):
    """The same of all pictures, and no query's: Fashion-IQ's own texts, beside the pictures and among them, are not opened."""
    import tests.test_infer_caption_folder as audit

    for name in ("images", "captions"):
        (room / "iq" / name).mkdir(parents=True)
    for i in range(3):
        photo(room / f"iq/images/{i}.png", (40, 60), i)
    query = json.dumps([{"target": "1", "candidate": "2", "captions": ["is red", "is longer"]}])
    for path in ("captions/cap.dress.val.json", "images/1.json", "images/1.txt"):
        (room / "iq" / path).write_text(query)
    sys.addaudithook(note_opened)
    audit.opened = []
    try:
        run("iq/images", "--keywords", "words.txt", "--out", "iq/captions.jsonl")
    finally:
        seen, audit.opened = audit.opened, None
    assert {path for path in seen if "iq/" in path and ".jsonl" not in path} == {
        f"iq/images/{i}.png" for i in range(3)
    }
    assert "words.txt" in seen
    for row in rows(room / "iq/captions.jsonl"):
        assert set(row) == set(KEYS)


# Key words


def test_a_list_of_key_words_is_read_as_it_is_written(tmp_path: Path):
    path = tmp_path / "words.txt"
    keywords.write([("black", 23), ("t-shirt", 7), ("long", 7)], path)
    assert path.read_text().splitlines()[0] == "black\t23"
    assert read_keywords(path) == ("black", "t-shirt", "long")
    path.write_bytes("\ufeffété\r\n\r\n  off the shoulder \nété\n3/4 sleeve\nwomen’s".encode())
    assert read_keywords(path) == ("été", "off the shoulder", "3/4 sleeve", "women’s")


NOT_WORDS = {
    "nothing": (b"", "there is no word in it"),
    "empty lines": (b"\n \n\t5\n", "there is no word in it"),
    "Latin-1": ("été\n".encode("latin-1"), "no text in UTF-8"),
    "a picture": (b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR\xff\xfe", "no text in UTF-8"),
    "zeros": (bytes(100), "line 1 is no word"),
    "JSON": (b'{"words": ["red"]}\n', "line 1 is no word"),
    "a special token": (b"red\nblue</s>\n", "line 2 is no word"),
    "an image": (b"red\n<image>\n", "line 2 is no word"),
    "a sentence": (b"red\n\nthe dress on the left has a longer skirt than the other\n", "line 3 is no word"),
    "punctuation": (b"red, blue\n", "line 1 is no word"),
    "a book": (b"word\n" * 20_000, "this is far too long for one"),
}


@pytest.mark.parametrize(("content", "message"), NOT_WORDS.values(), ids=NOT_WORDS)
def test_what_is_no_list_of_words_is_one_line(bad: Path, capsys, content: bytes, message: str):
    (bad / "words.txt").write_bytes(content)
    refused(
        bad,
        capsys,
        ["--keywords", "words.txt"],
        f"--keywords words.txt: {message}".replace(": this", ": a list of key words has a word a line, this"),
    )
    with pytest.raises(UserError, match=message):
        read_keywords(bad / "words.txt")


def test_more_words_than_the_llm_can_read_are_one_line(bad: Path, capsys):
    (bad / "words.txt").write_text("".join(f"word{i}\n" for i in range(300)))
    told = "300 key words are too many: the LLM reads 320 tokens at most, the picture's 16 included"
    refused(bad, capsys, ["--keywords", "words.txt"], told)


# Bad input

BAD = {
    "no such list": ("--keywords none.txt", "--keywords none.txt: no such file"),
    "a folder for a list": ("--keywords folder.png", "--keywords folder.png: not a file"),
    "a list of nothing": ("--keywords ''", "--keywords .: not a file"),
    "a list for UniFashion": ("--model unifashion --preset tiny --keywords words.txt", "--keywords is for --model llava"),
    "a tiny LLaVA": ("--preset tiny", "--model llava has no preset tiny: it was published in one size"),
    "an unknown style": ("--style vogue", "unknown caption style 'vogue': it is one of fashion200k, "),
    "no tokens": ("--max-tokens 0", "--max-tokens is 0, must be 1 to "),
    "tokens beyond the context": ("--max-tokens 300", "--max-tokens is 300, must be 1 to "),
    "too many beams": ("--beams 33", "--beams is 33, must be 1 to 32"),
    "no such folder of weights": ("--weights none", "none: there is no such folder of weights"),
    "a folder of other weights": ("--weights folder.png", f"folder.png/{HF_FOLDER} is missing: get model-0000{{1,2,3}}-of-00003.safetensors"),
    "a bad picture": ("--image a.png empty.png", "empty.png: the file is empty"),
    "an out path in no folder": ("--out nowhere/out.jsonl", "nowhere/out.jsonl cannot be written"),
    "an out path that is a picture": ("--out a.png", "a.png is no file of captions (line 1)"),
}  # fmt: skip


@pytest.mark.parametrize(("line", "message"), BAD.values(), ids=BAD)
def test_bad_input_is_one_line_that_says_what(bad: Path, capsys, line: str, message: str):
    refused(bad, capsys, shlex.split(line), message)


def test_the_most_tokens_there_may_be_is_told_and_works(run: Run):
    for flags in ([], ["--keywords", "words.txt"]):
        err = run("a.png", *flags, "--max-tokens", "1000", code=2)[1]
        most = int(err.partition("must be 1 to ")[2].partition(":")[0])
        assert 20 < most < CFG.llama.context
        run("a.png", *flags, "--max-tokens", str(most))
        run("a.png", *flags, "--max-tokens", str(most + 1), code=2)


def test_weights_that_are_missing_damaged_or_anothers_are_one_line(room: Path, capsys):
    shutil.copytree(room / "weights", room / "spare")
    place = room / "spare" / HF_FOLDER
    for name in ("tokenizer.model", "model-00002-of-00003.safetensors"):
        path, whole = place / name, (place / name).read_bytes()
        path.unlink()
        refused(room, capsys, ["--weights", "spare"], f"spare/{HF_FOLDER}/{name} is missing")
        path.write_bytes(whole[: len(whole) // 2])
        refused(room, capsys, ["--weights", "spare"], f"spare/{HF_FOLDER}/{name}")
        path.write_bytes(whole)
    path = place / "tokenizer.model"
    path.write_bytes(path.read_bytes() + piece("zzzq"))
    refused(
        room,
        capsys,
        ["--weights", "spare"],
        f"{path.relative_to(room)} does not fit {HF_FOLDER}: 1025 pieces",
    )


def test_numbers_that_overflow_are_told_and_nothing_is_written(room: Path, capsys, monkeypatch):
    monkeypatch.setattr(LLaVA, "see", lambda model, x: torch.full((len(x), 16, 32), torch.nan))
    refused(
        room, capsys, ["--out", "out.jsonl", "--quiet"], "the numbers overflow: a file of weights is damaged"
    )


# helpers


def captions(run: Run, *argv: str) -> dict[str, str]:
    return {row["image"]: row["caption"] for row in report(run, *argv)["captions"]}


def report(run: Run, *argv: str) -> dict:
    return json.loads(run(*argv, "--json")[0])


def refused(room: Path, capsys: pytest.CaptureFixture, argv: list[str], message: str) -> None:
    """The command exits with 2 after one line that holds `message`, and leaves the room as it was."""
    before = {path: path.stat().st_mtime_ns for path in room.rglob("*")}
    defaults = shlex.split("--model llava --weights weights --device cpu --max-tokens 12 --image a.png")
    capsys.readouterr()
    assert infer.main(["caption", *defaults, *argv]) == 2
    told = capsys.readouterr()
    lines = told.err.splitlines()
    assert told.out == "" and len(lines) == 1 and told.err.endswith("\n")
    assert lines[0].startswith("infer.py: ") and message in lines[0]
    assert {path: path.stat().st_mtime_ns for path in room.rglob("*")} == before


@pytest.fixture(scope="module")
@torch.no_grad()
def source(tmp_path_factory: pytest.TempPathFactory) -> LLaVA:
    """Random; its captions differ with the picture, and end."""
    folder = tmp_path_factory.mktemp("source")
    words = SentencePiece(load.FOLDERS["tiny"] / "llama_tokenizer.model")
    model = randomise(LLaVA(CFG), 0)
    # What tells pictures apart must be louder than what they have in common.
    pictures = [llava_image(photo(folder / "x.png", (60, 80), seed), 28) for seed in range(20)]
    seen = model.see(torch.stack(pictures))
    model.projector.fc2.weight *= 2 / seen.std((0, 1))[:, None]
    model.projector.fc2.bias.zero_()
    model.projector.fc2.bias -= model.see(torch.stack(pictures)).mean((0, 1))
    odd = [i for i in range(len(words)) if words.first.is_byte(i) or words.first.is_control(i)]
    model.llama.lm_head.weight[[*odd, words.unk]] *= 0.01  # never likeliest
    model.llama.lm_head.weight[words.eos] *= 150
    return model.half().float()


@pytest.fixture(scope="module")
def written(source: LLaVA, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("weights")
    write_hf(source, folder, HF)
    return folder


@pytest.fixture
def room(tmp_path: Path, written: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Pictures, a list of words and weights, to stand in; LLaVA is CFG until the test ends."""
    assert SMALL != CFG
    monkeypatch.setattr(llava, "LLAVA_7B", CFG)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "weights").symlink_to(written)
    (tmp_path / "words.txt").write_text("red\t23\nlong sleeve\t7\nv-neck\t2\n")
    for i, (name, size) in enumerate(PICTURES.items()):
        photo(tmp_path / name, size, i)
    return tmp_path


@pytest.fixture
def run(room: Path, capsys: pytest.CaptureFixture) -> Run:
    """The command on pictures of the room -> what it printed on stdout and on stderr."""

    def run(*argv: str, quiet: bool = True, code: int = 0) -> tuple[str, str]:
        given = ["--model", "llava", "--weights", "weights", "--device", "cpu", "--max-tokens", "12"]
        capsys.readouterr()
        assert infer.main(["caption", *given, *["--quiet"] * quiet, "--image", *argv]) == code
        return tuple(capsys.readouterr())

    return run


@pytest.fixture
def bad(room: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The room, with everything in it that can be wrong; and a loader of weights that must not be called."""
    monkeypatch.setattr(loading, "load_llava", lambda *_: pytest.fail("loaded the weights"))
    write_bad_files(room)
    return room
