"""`infer.py index` and `search` against their promises: what a catalogue holds, going on, what is found, what is refused."""

import contextlib
import fcntl
import json
import os
import random
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor

import infer
from tests.rooms import BAD_FILES, ROOT, photo, pixels, write_bad_files
from tests.test_infer_caption import CFG, digest, not_loaded, write_weights
from unifashion import catalog, indexing, search, sheets
from unifashion.catalog import EMBEDDINGS, ITEMS, LOCAL, Catalog
from unifashion.config import PRESETS
from unifashion.indexing import PART, PART_ITEMS
from unifashion.model import UniFashion
from unifashion.preprocess import qformer_image, read_image
from unifashion.tokenizers import WordPiece, blip_caption, build_vocab
from weights import load

pytestmark = pytest.mark.usefixtures("one_thread")

COMMON = ("--weights", "weights", "--preset", "tiny", "--device", "cpu")
PATHS = [  # of the room's pictures, in the order of their bytes
    "0.png", "A.png", "a b/deep/er/2.jpg", "a b/x.png", "a.png", "b.webp", "été.png", "シャツ.png"
]  # fmt: skip


# Which pictures


def test_a_catalogue_holds_the_pictures_of_a_tree_in_the_order_of_their_bytes(room: Path, capsys):
    for other in (".hidden.png", "list.txt", "a.png.part", "a b/.thumbs/a.png", ".git/a.png"):
        (room / "shop" / other).parent.mkdir(exist_ok=True)
        shutil.copy(room / "shop/a.png", room / "shop" / other)
    index(room, capsys)
    assert [row["path"] for row in rows(room)] == PATHS
    for row in rows(room):
        assert list(row) == ["path", "sha256"] and row["sha256"] == digest(room / "shop" / row["path"])


def test_each_real_folder_is_looked_into_once_whatever_leads_there(room: Path, capsys):
    shop = room / "shop"
    (shop / "a b/deep/loop").symlink_to("..")
    (shop / "self").symlink_to(".")
    (shop / "0 first").symlink_to("a b")  # before the real one by name
    (room / "elsewhere/more").mkdir(parents=True)
    photo(room / "elsewhere/more/m.png", (20, 20), 31)
    for name in ("one", "two"):
        (shop / name).symlink_to("../elsewhere")
    (room / "elsewhere/back").symlink_to(shop)
    (shop / "again.png").symlink_to("a.png")  # a file may have two names
    index(room, capsys)
    found = {row["path"] for row in rows(room)}
    assert found == {*PATHS, "one/more/m.png", "again.png"}


def test_any_name_a_file_can_have_is_kept_and_found(room: Path, capsys):
    names = [
        b"two words.png",
        "été’.png".encode(),
        b"\xff\xfe.png",
        b"line\nbreak.png",
        b"-x.png",
        b"\xe2.png",
    ]
    folder = room / "shop" / os.fsdecode(b"caf\xe9")
    folder.mkdir()
    for i, name in enumerate(names):
        photo(folder / os.fsdecode(name), (40, 40), 70 + i)
    index(room, capsys)
    raw = (room / "cat" / ITEMS).read_bytes()
    assert raw.isascii() and raw.count(b"\n") == 8 + 6
    kept = [os.fsencode(row["path"]) for row in rows(room)]
    assert kept == sorted(kept) and {b"caf\xe9/" + name for name in names} < {*kept}
    for i, name in enumerate(names):
        shutil.copy(folder / os.fsdecode(name), room / "query.png")
        sheet = ["--sheet", "sheet.png"] * (i % 2)
        (first, *_), err = find(room, capsys, "--image", "query.png", *sheet, quiet=False)
        assert os.fsencode(first["path"]) == b"caf\xe9/" + name and first["score"] > 0.999
        assert "grey" not in err
    out = run(capsys, "search", "--catalog", "cat", "--image", "query.png", "--top", "99")[0]
    assert out.count("\n") == 14
    (folder / os.fsdecode(b"\xff\xfe.png")).unlink()
    report = index(room, capsys)
    assert (report["dropped"], report["embedded"]) == (1, 0)


def test_broken_pictures_and_folders_are_skipped_and_named(room: Path, capsys, monkeypatch):
    write_bad_files(room / "shop/a b")
    (room / "shop/a b/whole.png").unlink()
    (room / "shop/gone.png").symlink_to("nowhere.png")
    for name in ("ring", "ring.png"):
        (room / "shop" / name).symlink_to(name)
    os.mkfifo(room / "shop/pipe.png")
    (room / "shop/locked").mkdir()
    photo(room / "shop/locked/l.png", (20, 20), 32)
    forbid(monkeypatch, "locked")
    out, err = run(capsys, "index", "--images", "shop", "--out", "cat", quiet=False)
    told = {line for line in err.replace("\r", "\n").splitlines() if line.startswith("skipped: ")}
    kinds = BAD_FILES.keys() - {"absent.png", "folder.png"}
    assert len(told) == len(kinds) + 5
    for kind in kinds:
        assert any(f"skipped: shop/a b/{kind}: {BAD_FILES[kind]}" in line for line in told)
    assert {"skipped: shop/gone.png: No such file or directory", "skipped: shop/pipe.png: not a file"} < told
    assert {f"skipped: shop/{x}: Too many levels of symbolic links" for x in ("ring", "ring.png")} < told
    assert "skipped: shop/locked: Permission denied" in told
    assert out == "" and err.endswith(f"8 pictures in cat: 8 new, 0 dropped; {len(told)} skipped\n")
    assert [row["path"] for row in rows(room)] == PATHS
    assert len(index(room, capsys)["skipped"]) == len(told)


def test_a_name_is_told_on_one_line_and_gives_the_terminal_no_orders(room: Path, capsys):
    name = "bad\n\x1b[31m\udcff é.png"
    (room / "shop" / name).write_text("x")
    _, err = run(capsys, "index", "--images", "shop", "--out", "cat", quiet=False)
    assert "skipped: " + r"shop/bad\n\x1b[31m\udcff é.png" + ": not an image in a known format\n" in err
    assert index(room, capsys)["skipped"] == [f"shop/{name}: not an image in a known format"]
    (room / "bad").mkdir()
    (room / "shop" / name).rename(room / "bad" / name)
    _, err = run(capsys, "index", "--images", "bad", "--out", "new", code=2)
    assert err.count("\n") == 1 and "\x1b" not in err and "none of its pictures can be read" in err


# What is kept of them


@torch.no_grad()
def test_each_row_is_what_the_model_says_of_the_picture_alone(room: Path, capsys):
    index(room, capsys)
    found, model = Catalog(room / "cat"), loaded(room)
    for i, row in enumerate(found.items()):
        wanted = search.image_embeddings(model, picture_of(room / "shop" / row["path"])[None])[0]
        assert torch.equal(found.images[i], wanted.half()), row["path"]
    assert found.captions is None and len({x.numpy().tobytes() for x in found.images}) == len(PATHS)


@torch.no_grad()
def test_captions_are_those_of_the_caption_command_and_are_kept_as_texts(room: Path, capsys):
    index(room, capsys, "--captions", "fashion200k")
    found, model = Catalog(room / "cat"), loaded(room)
    words = WordPiece(room / "weights/bert_vocab.txt")
    captions = [row["caption"] for row in found.items()]
    given = [str(Path("shop") / path) for path in PATHS]
    told = json.loads(run(capsys, "caption", "--style", "fashion200k", "--image", *given, "--json")[0])
    assert captions == [one["caption"] for one in told["captions"]] and len(set(captions)) > 4
    ids, mask = words.encode([blip_caption(text) for text in captions], CFG.qformer.max_text)
    assert torch.equal(found.captions, search.text_embeddings(model, ids, mask).half())
    assert found.about["captions"] == "fashion200k"
    assert found.about["captioner"] == f"unifashion tiny {digest(room / 'weights/model.safetensors')[:12]}"
    index(room, capsys, "--captions", out="default")
    assert Catalog(room / "default").about["captions"] == "fashiongen"


@torch.no_grad()
@pytest.mark.parametrize("writes", [False, True])
def test_a_picture_gets_the_same_bits_whatever_shares_its_batch(room: Path, writes: bool):
    folder = room / "weights"
    model = load.load_unifashion("tiny", folder, draws=False, writes=writes)
    words = WordPiece(folder / "bert_vocab.txt")
    llm = load.llm_tokenizer("tiny", folder) if writes else None
    pictures = [picture_of(room / "shop" / path) for path in PATHS]
    whole, captions = indexing.embed(model, pictures, words, llm, "fashiongen")
    dice = random.Random(0)
    for _ in range(8):
        some = dice.sample(range(len(PATHS)), dice.randint(1, len(PATHS)))
        records, texts = indexing.embed(model, [pictures[i] for i in some], words, llm, "fashiongen")
        assert np.array_equal(records, whole[some]) and texts == [captions[i] for i in some if captions]
    assert whole.dtype == np.float16 and whole.shape == (8, (3 + writes) * 8)


# Bringing up to date


@pytest.mark.parametrize("flags", [(), ("--captions",)], ids=["pictures", "captions"])
def test_a_catalogue_that_grew_and_shrank_is_one_made_at_once(room: Path, capsys, monkeypatch, flags):
    monkeypatch.setattr(indexing, "BATCH", 3)
    seen = spy(monkeypatch)
    shop = room / "shop"
    assert index(room, capsys, *flags)["embedded"] == 8 and seen == [3, 3, 2]
    first = (room / "cat" / EMBEDDINGS).read_bytes()

    seen.clear()
    report = index(room, capsys, *flags)
    assert (report["pictures"], report["new"], report["embedded"], report["dropped"]) == (8, 0, 0, 0)
    assert seen == [] and (room / "cat" / EMBEDDINGS).read_bytes() == first

    photo(shop / "a b/new.png", (50, 30), 90)  # new
    photo(shop / "A.png", (44, 44), 91)  # otherwise
    (shop / "0.png").unlink()  # gone
    (shop / "a.png").rename(shop / "z.png")  # elsewhere
    shutil.copy(shop / "b.webp", shop / "a b/copy.webp")  # twice
    os.utime(shop / "été.png", (1, 1))  # touched
    report = index(room, capsys, *flags)
    assert (report["pictures"], report["new"], report["embedded"], report["dropped"]) == (9, 4, 2, 2)
    assert seen == [2]
    index(room, capsys, *flags, out="fresh")
    assert_same(room / "cat", room / "fresh")
    assert (room / "cat" / EMBEDDINGS).read_bytes() != first
    assert left_behind(room / "cat") == {EMBEDDINGS, ITEMS, LOCAL, "checked.json"}
    assert left_behind(room / "fresh") == {EMBEDDINGS, ITEMS, LOCAL}


def test_what_has_not_changed_is_not_read(room: Path, capsys, monkeypatch):
    index(room, capsys)
    before = {path.name: path.stat().st_mtime_ns for path in (room / "cat").iterdir()}
    opened = []
    monkeypatch.setattr(hash_of := indexing.hashlib, "file_digest", spying(hash_of.file_digest, opened))
    assert index(room, capsys)["embedded"] == 0 and opened == []
    now = {path.name: path.stat().st_mtime_ns for path in (room / "cat").iterdir()}
    assert now[EMBEDDINGS] == before[EMBEDDINGS] and now[ITEMS] == before[ITEMS]
    # of the same size, and its time set back
    times = (room / "shop/0.png").stat()
    data = (room / "shop/0.png").read_bytes()
    Image.open(room / "shop/A.png").save(room / "shop/0.png")
    (room / "shop/0.png").write_bytes((room / "shop/0.png").read_bytes()[: len(data)].ljust(len(data), b"\0"))
    os.utime(room / "shop/0.png", ns=(times.st_atime_ns, times.st_mtime_ns))
    assert (room / "shop/0.png").stat().st_size == times.st_size
    report = index(room, capsys)
    assert len(opened) == 1 and report["embedded"] + len(report["skipped"]) == 1
    for damage in ("", "nonsense\n[", '{"images": "x"}\n{"path": 7}\n'):  # it only saves work
        (room / "cat" / LOCAL).write_text(damage)
        opened.clear()
        assert index(room, capsys)["embedded"] == 0 and len(opened) == 8


def test_a_picture_that_changes_while_it_is_read_is_left_for_the_next_run(room: Path, capsys, monkeypatch):
    def reading(path: Path) -> Image.Image:
        image = read_image(path)
        if path.name == "a.png":
            os.utime(path, (5, 5))
        return image

    with monkeypatch.context() as patch:
        patch.setattr(indexing, "read_image", reading)
        report = index(room, capsys)
    assert report["skipped"] == ["shop/a.png: changed while it was read"] and report["pictures"] == 7
    assert index(room, capsys)["embedded"] == 1
    index(room, capsys, out="fresh")
    assert_same(room / "cat", room / "fresh")


def test_a_picture_that_changed_since_it_was_listed_is_read_as_it_is_now(room: Path, capsys, monkeypatch):
    """Of many pictures the last is read hours after it was listed."""
    index(room, capsys)
    shop = room / "shop"
    photo(shop / "a.png", (50, 50), 80)
    under = indexing.pictures_under

    def listed(folder: Path) -> object:
        found = under(folder)
        photo(shop / "a.png", (50, 50), 81)
        return found

    with monkeypatch.context() as patch:
        patch.setattr(indexing, "pictures_under", listed)
        report = index(room, capsys)
    assert (report["pictures"], report["skipped"], report["embedded"]) == (8, [], 1)
    assert index(room, capsys)["embedded"] == 0
    index(room, capsys, out="fresh")
    assert_same(room / "cat", room / "fresh")


def test_pictures_of_another_folder_are_another_catalogues(room: Path, capsys):
    """The catalogue becomes that folder's."""
    index(room, capsys)
    (room / "other").mkdir()
    shutil.copy(room / "shop/a.png", room / "other/q.png")
    report = index(room, capsys, images="other")
    assert (report["pictures"], report["new"], report["embedded"], report["dropped"]) == (1, 1, 0, 8)
    index(room, capsys, images="other", out="fresh")
    assert_same(room / "cat", room / "fresh")


def test_a_catalogue_that_lost_its_pictures_is_left_alone(room: Path, capsys):
    index(room, capsys)
    before = contents(room / "cat")
    (room / "shop").rename(room / "away")
    refused(capsys, "index --images shop --out cat", "shop: no such folder")
    (room / "shop").mkdir()
    refused(capsys, "index --images shop --out cat", "shop: no pictures in it")
    (room / "shop/a.png").write_text("x")
    refused(
        capsys, "index --images shop --out cat", "none of its pictures can be read; shop/a.png: not an image"
    )
    refused(
        capsys, "index --images shop --out new", "none of its pictures can be read; shop/a.png: not an image"
    )
    assert contents(room / "cat").items() >= before.items() and not (room / "new").exists()


# Going on


def test_a_stopped_run_goes_on_where_it_was(room: Path, capsys, monkeypatch):
    monkeypatch.setattr(indexing, "BATCH", 3)
    index(room, capsys, "--captions", out="whole")
    with monkeypatch.context() as patch:
        stop_at_batch(patch, 2)
        run(capsys, "index", "--images", "shop", "--out", "cat", "--captions", code=130)
    assert left_behind(room / "cat") == {PART, PART_ITEMS}
    refused(capsys, "search --catalog cat --text dress", "its indexing has not come to its end")
    with open(room / "cat" / PART_ITEMS, "ab") as file, open(room / "cat" / PART, "ab") as vectors:
        file.write(b'{"path": "b.webp", "sha2')  # torn by a kill
        vectors.write(b"\1\2\3")
    seen = spy(monkeypatch)
    report = index(room, capsys, "--captions")
    assert seen == [3, 2] and (report["pictures"], report["new"], report["embedded"]) == (8, 8, 5)
    assert_same(room / "cat", room / "whole")
    assert left_behind(room / "cat") == {EMBEDDINGS, ITEMS, LOCAL}


def test_a_line_without_its_record_is_not_believed(room: Path, capsys, monkeypatch):
    monkeypatch.setattr(indexing, "BATCH", 3)
    index(room, capsys, out="whole")
    with monkeypatch.context() as patch:
        stop_at_batch(patch, 3)
        run(capsys, "index", "--images", "shop", "--out", "cat", code=130)
    os.truncate(room / "cat" / PART, (room / "cat" / PART).stat().st_size - 3)
    (room / "cat" / f"{EMBEDDINGS}.new").write_bytes(b"half")
    assert index(room, capsys)["embedded"] == 3
    assert_same(room / "cat", room / "whole")
    assert left_behind(room / "cat") == {EMBEDDINGS, ITEMS, LOCAL}


def test_killed_at_any_point_it_ends_as_if_it_had_not_been(room: Path, capsys, monkeypatch):
    """Of a catalogue that is made, and of one that is brought up to date."""
    monkeypatch.setattr(indexing, "BATCH", 3)
    index(room, capsys, out="old")
    photo(room / "shop/new.png", (50, 30), 90)
    (room / "shop/0.png").unlink()
    index(room, capsys, out="whole")
    for begun in ("nothing", "old"):
        with killed_at(10_000) as done:
            prepare(room, begun)
            index(room, capsys)
        assert len(done) >= 9
        for n in range(len(done)):
            prepare(room, begun)
            with killed_at(n), pytest.raises(Killed):
                index(room, capsys)
            if (room / "cat" / EMBEDDINGS).exists():  # the old or the new, whole
                found = Catalog(room / "cat")
                found.verify(quiet=True)
                paths = [item["path"] for item in found.items()]
                assert paths in ([*PATHS], [*PATHS[1:-2], "new.png", *PATHS[-2:]])
            index(room, capsys)
            assert_same(room / "cat", room / "whole")
            assert not left_behind(room / "cat") - {EMBEDDINGS, ITEMS, LOCAL, "checked.json"}, n


@pytest.mark.slow
def test_kill_9_at_random_moments_leaves_the_catalogue_of_an_undisturbed_run(tmp_path: Path):
    """1,000 pictures, with the shipped weights, as a command of its own."""
    for i in range(1000):
        folder = tmp_path / "shop" / f"{i % 7}"
        folder.mkdir(parents=True, exist_ok=True)
        photo(folder / f"{i}.png", (40 + i % 9, 60), i)
    command = [sys.executable, "infer.py", "index", "--preset", "tiny", "--device", "cpu", "--quiet", "--images", str(tmp_path / "shop"), "--out"]  # fmt: skip
    began = time.time()
    subprocess.run([*command, str(tmp_path / "whole")], cwd=ROOT, check=True)
    took, dice, kills, cat = time.time() - began, random.Random(5), 0, tmp_path / "cat"
    part = cat / PART_ITEMS
    while True:
        process = subprocess.Popen([*command, str(cat)], cwd=ROOT)
        before = part.stat().st_size if part.exists() else 0
        while process.poll() is None and not (part.exists() and part.stat().st_size > before):
            time.sleep(0.01)  # loading is no moment worth being killed at
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(dice.uniform(0, took / 8))
        if process.poll() is not None:
            break
        process.kill()
        process.wait()
        kills += 1
        print(f"killed with {part.read_bytes().count(10) - 1 if part.exists() else 'all'} of 1000 done")
    assert process.returncode == 0 and kills >= 3
    assert_same(cat, tmp_path / "whole")
    assert left_behind(cat) - {"checked.json"} == {EMBEDDINGS, ITEMS, LOCAL}


def test_two_runs_do_not_write_at_once(room: Path, capsys):
    index(room, capsys)
    folder = os.open(room / "cat", os.O_RDONLY)
    fcntl.flock(folder, fcntl.LOCK_EX)
    refused(capsys, "index --images shop --out cat", "cat is being written by another run")
    os.close(folder)
    index(room, capsys)


# What is found


@torch.no_grad()
def test_what_is_found_is_the_order_of_the_scores(room: Path, capsys):
    index(room, capsys, "--captions")
    index(room, capsys, out="plain")
    model, words = loaded(room), WordPiece(room / "weights/bert_vocab.txt")
    ids, mask = words.encode([blip_caption("a red dress")], CFG.qformer.max_text)
    picture = picture_of(room / "query.png")[None]
    text, seen, e_cls = (
        search.text_embeddings(model, ids, mask).half().float(),
        search.image_embeddings(model, picture).half().float(),
        search.composed_embeddings(model, model.see(picture), ids, mask).half().float(),
    )
    found = Catalog(room / "cat")
    wanted = {
        ("--text", "A red: dress!"): search.text_to_image(text, found.images),
        ("--image", "query.png"): search.image_to_image(seen, found.images),
        ("--image", "query.png", "--text", "a red dress"): search.composed_scores(
            e_cls, found.images, found.captions
        ),
    }
    orders = set()
    for asked, scores in wanted.items():
        told, _ = find(room, capsys, *asked)
        order = scores[0].argsort(descending=True)
        assert [one["path"] for one in told] == [PATHS[i] for i in order]
        assert [one["rank"] for one in told] == [*range(1, 9)]
        assert np.allclose([one["score"] for one in told], scores[0][order], atol=1e-6)
        assert all(one["caption"] == rows(room)[i]["caption"] for one, i in zip(told, order, strict=True))
        orders.add(tuple(order.tolist()))
        out = run(capsys, "search", "--catalog", "cat", "--top", "3", *asked)[0].splitlines()
        for line, one in zip(out, told, strict=False):
            assert line.split()[:2] == [str(one["rank"]), f"{one['score']:.4f}"] and one["path"] in line
            assert line.endswith(infer.plain(one["caption"]))
        assert len(out) == 3
    assert len(orders) == 3
    without = search.composed_scores(e_cls, found.images)[0]
    both = ("--image", "query.png", "--text", "a red dress")
    assert "no captions" not in find(room, capsys, *both, quiet=False)[1]
    told, err = find(room, capsys, *both, name="plain", quiet=False)
    assert "note: the catalogue has no captions: pictures alone are compared\n" in err
    assert [one["path"] for one in told] == [PATHS[i] for i in without.argsort(descending=True)]
    assert "caption" not in told[0]


def test_a_picture_finds_itself(room: Path, capsys):
    index(room, capsys)
    for path in PATHS:
        (first,), _ = find(room, capsys, "--image", f"shop/{path}", "--top", "1")
        assert first["path"] == path and first["score"] == pytest.approx(1, abs=1e-3)


def test_more_than_there_are_is_all_and_told(room: Path, capsys):
    index(room, capsys)
    told, err = find(room, capsys, "--text", "a red dress", "--top", "9", quiet=False)
    assert len(told) == 8 and "note: --top is 9, and there are 8 pictures: these are all\n" in err
    told, err = find(room, capsys, "--text", "a red dress", "--top", "8", quiet=False)
    assert len(told) == 8 and "--top" not in err


def test_a_text_that_is_too_long_is_cut_and_told(room: Path, capsys):
    index(room, capsys)
    short, err = find(room, capsys, "--text", "a red dress " * 3 + "a", quiet=False)
    assert "too long" not in err
    long, err = find(room, capsys, "--text", "a red dress " * 30, quiet=False)
    assert "note: --text is too long: the model reads its first 10 tokens\n" in err
    assert long == short != find(room, capsys, "--text", "a red dress")[0]
    odd, err = find(room, capsys, "--text", "a purple dress", quiet=False)
    assert "note: tiny does not know the words purple\n" in err


def test_json_is_one_object_on_stdout_and_the_rest_on_stderr(room: Path, capsys):
    out, err = run(capsys, "index", "--images", "shop", "--out", "cat", "--json", quiet=False)
    report = json.loads(out)
    assert out.isascii() and (report["pictures"], report["catalog"], report["skipped"]) == (8, "cat", [])
    assert report["qformer sha256"] == search.qformer_hash(loaded(room)) and "indexing" in err
    out, err = run(capsys, "search", "--catalog", "cat", "--text", "red", "--json", quiet=False)
    report = json.loads(out)
    assert out.isascii() and out.count("\n") == 1 and "note: " in err
    assert (report["pictures"], report["text"], report["image"]) == (8, "red", None)
    assert report["images"] == str(room / "shop") and report["seconds"] >= 0
    assert list(report["found"][0]) == ["rank", "score", "path", "sha256"]
    assert run(capsys, "search", "--catalog", "cat", "--text", "red", "--json")[1] == ""
    assert run(capsys, "index", "--images", "shop", "--out", "cat") == ("", "")


def test_it_reads_nothing_but_the_catalogue(room: Path, capsys):
    """The pictures may be gone, and the catalogue elsewhere, where nothing can be written."""
    index(room, capsys)
    wanted, _ = find(room, capsys, "--text", "a red dress")
    (room / "cat").rename(room / "moved")
    shutil.rmtree(room / "shop")
    for name in (LOCAL, "checked.json"):
        (room / "moved" / name).unlink()
    assert find(room, capsys, "--text", "a red dress", name="moved")[0] == wanted


# The sheet


def test_the_sheet_shows_what_was_asked_for_and_what_was_found(room: Path, capsys, monkeypatch):
    index(room, capsys)
    drawn = []
    monkeypatch.setattr(catalog, "found_sheet", lambda *a: drawn.append(a) or sheets.found_sheet(*a))
    asked = ("--image", "query.png", "--text", "a red dress", "--top", "7", "--sheet", "s.png")
    told, err = find(room, capsys, *asked, quiet=False)
    (((text, picture), shown),) = drawn
    assert text == "looked for: a red dress" and picture.tobytes() == read_image("query.png").tobytes()
    for one, (caption, image) in zip(told, shown, strict=True):
        assert caption == f"{one['rank']}   {one['score']:.4f}\n{one['path']}"
        assert image.tobytes() == sheets.shrunk(read_image(room / "shop" / one["path"])).tobytes()
        assert max(image.size) < 200  # a hundred photographs as they are would be gigabytes
    assert pixels(room / "s.png").shape == (2 * 240, 6 * 200, 3)
    assert err.endswith("note: s.png shows what was found\n") and "grey" not in err


def test_pictures_that_are_gone_are_grey_and_named(room: Path, capsys):
    index(room, capsys)
    asked = ("--text", "a red dress", "--top", "8", "--sheet", "s.png")
    told, _ = find(room, capsys, *asked)
    whole = pixels(room / "s.png")
    (room / "shop" / told[0]["path"]).unlink()
    again, err = find(room, capsys, *asked, quiet=False)
    assert again == told
    assert (
        f"note: shop/{told[0]['path']}: no such file; the sheet shows a grey box\n".replace(
            "shop/", f"{room}/shop/"
        )
        in err
    )
    less = pixels(room / "s.png")
    assert (less[6:194, 206:394] == 211).all() and not (whole[6:194, 206:394] == 211).all()
    assert np.array_equal(less[:, 400:], whole[:, 400:])
    (room / "cat" / LOCAL).unlink()
    _, err = find(room, capsys, *asked, quiet=False)
    assert err.count("where the pictures lie is not known: index them again; the sheet shows a grey box") == 8


def test_a_sheet_has_room_for_a_hundred(room: Path, capsys, monkeypatch):
    monkeypatch.setattr(catalog, "SHOWN", 3)
    index(room, capsys)
    told, err = find(room, capsys, "--text", "red", "--sheet", "s.png", quiet=False)
    assert len(told) == 8 and "note: s.png shows the first 3 of what was found\n" in err
    assert pixels(room / "s.png").shape == (240, 4 * 200, 3)


def test_the_thinnest_strip_has_its_place_on_a_sheet(room: Path, capsys):
    photo(room / "shop/strip.png", (3, 900), 40)
    photo(room / "query.png", (900, 2), 41)
    index(room, capsys)
    _, err = find(room, capsys, "--image", "query.png", "--sheet", "s.png", quiet=False)
    assert pixels(room / "s.png").shape == (2 * 240, 6 * 200, 3) and "grey" not in err
    for size, shown in (((900, 2), (188, 1)), ((3, 4), (141, 188))):
        assert sheets.shrunk(Image.new("RGB", size)).size == shown


def test_captions_of_a_sheet_are_drawn_in_any_script():
    font = sheets.ImageFont.load_default(14)
    assert sheets._fitting("dress-e\u0301.png", font, 200) in ("dress-é.png", "dress-e.png")
    assert sheets._fitting("シャツ\udcff\n.png", font, 200) == "?????.png"
    long = sheets._fitting("m" * 300, font, 200)
    assert long.startswith("...m") and font.getlength(long) <= 200
    assert sheets._fitting(f"a folder/{'m' * 300}/seen.png", font, 200).endswith("/seen.png")
    blank = np.array(sheets.found_sheet(("", None), [("", None)]))
    lettered = np.array(sheets.found_sheet(("", None), [("1 0.5\nシャツ.png", None)]))
    below = (lettered != blank).any(-1).nonzero()
    assert below[0].min() >= 200 and below[1].min() >= 200 and len(below[0]) > 50


def test_a_text_that_is_looked_for_is_shown_whole_where_there_is_room():
    font = sheets.ImageFont.load_default(14)
    text = "looked for a dress with long sleeves and a collar of " + "m" * 40
    lines = sheets._wrapped(text, font, 188, 12)
    assert "".join(lines).replace(" ", "") == text.replace(" ", "") and len(lines) > 3
    assert all(font.getlength(line) <= 188 for line in lines) and lines[0].startswith("looked for a dress")
    assert len(cut := sheets._wrapped(text, font, 188, 2)) == 2 and cut[1].endswith("...")
    assert font.getlength(cut[1]) <= 188 and sheets._wrapped("", font, 188, 2) == [""]
    blank, told = (np.array(sheets.found_sheet((x, None), [("", None)])) for x in ("", text))
    at = (told != blank).any(-1).nonzero()
    assert (
        at[0].min() < 30 and at[0].max() < 200 and at[1].max() < 200
    )  # in the box that a picture would fill


# Bad input


INDEX = "index --images shop --out cat"
FIND = "search --catalog cat --text dress"
BAD = {
    "no folder of pictures": ("index --out cat", "required: --images"),
    "no out": ("index --images shop", "required: --out"),
    "a folder that is not there": ("index --images nowhere --out new", "nowhere: no such folder"),
    "a file for a folder": ("index --images query.png --out new", "query.png: not a folder"),
    "a folder without pictures": ("index --images weights --out new", "weights: no pictures in it"),
    "out in no folder": ("index --images shop --out no/where", "no/where cannot be written: --out wants"),
    "out in a file": ("index --images shop --out query.png/x", "query.png/x cannot be written"),
    "out is a file": ("index --images shop --out query.png", "query.png cannot be written: Not a directory"),
    "out is a folder of other things": ("index --images shop --out shop", "shop is a folder of other things"),
    "out is a folder with a file named like one of ours": ("index --images shop --out mine", "mine is a folder of other things"),
    "out is nothing": ("index --images shop --out ''", ". is a folder of other things"),
    "out is too long": (f"index --images shop --out {'o' * 300}", "File name too long"),
    "pictures' folder is too long": (f"index --images {'o' * 300} --out new", "no such folder"),
    "an unknown style": (INDEX + " --captions vogue", "unknown caption style 'vogue'"),
    "captions, where there were none": (INDEX + " --captions", "cat was made with captions none, not fashiongen"),
    "none, where there were captions": ("index --images shop --out told", "told was made with captions fashiongen, not none"),
    "another style": ("index --images shop --out told --captions fashion200k", "told was made with captions fashiongen, not fashion200k"),
    "another precision": (INDEX + " --dtype bf16", "cat was made with dtype fp32, not bf16"),
    "another model": (INDEX + " --weights other", "cat was made with qformer sha256"),
    "part of another model": ("index --images shop --out part --weights other", "part was made with qformer sha256"),
    "part that is damaged": ("index --images shop --out torn", "torn/items.part is damaged"),
    "part that lacks a stamp": ("index --images shop --out 'no stamp'", "no stamp/items.part is damaged"),
    "part that lacks a hash": ("index --images shop --out 'no sha256'", "no sha256/items.part is damaged"),
    "a catalogue that is damaged": ("index --images shop --out spoilt", "spoilt/embeddings.safetensors is damaged"),
    "nothing to look for": ("search --catalog cat", "say what is looked for: --text, --image, or both"),
    "no catalogue": ("search --text dress", "required: --catalog"),
    "no such catalogue": ("search --catalog nowhere --text dress", "nowhere is no catalogue: there is no"),
    "a name that is too long": (f"search --catalog {'o' * 300} --text dress", "is no catalogue: there is no"),
    "a picture's that is too long": (f"search --catalog cat --image {'o' * 300} --sheet query.png", "no such file"),
    "a folder that is none": ("search --catalog shop --text dress", "shop is no catalogue: there is no"),
    "one that is not done": ("search --catalog part --text dress", "its indexing has not come to its end"),
    "one that is damaged": ("search --catalog spoilt --text dress", "spoilt/embeddings.safetensors is damaged"),
    "one that is another model's": (FIND + " --weights other", "cat was made with qformer sha256"),
    "an empty text": ("search --catalog cat --text ''", "--text is empty"),
    "a text of nothing": ("search --catalog cat --text '  (.)! '", "--text is empty"),
    "an empty text with a picture": ("search --catalog cat --image query.png --text ''", "--text is empty"),
    "no such picture": ("search --catalog cat --image nowhere.png", "nowhere.png: no such file"),
    "no picture": ("search --catalog cat --image weights/model.safetensors", "not an image in a known format"),
    "a top of none": (FIND + " --top 0", "--top is 0, must be at least 1"),
    "a top of less": (FIND + " --top -4", "--top is -4, must be at least 1"),
    "a top in words": (FIND + " --top many", "argument --top: invalid int value: 'many'"),
    "a sheet that is no PNG": (FIND + " --sheet s.jpg", "give a name that ends in .png"),
    "a sheet in no folder": (FIND + " --sheet no/s.png", "there is no folder no"),
    "a sheet over the picture": ("search --catalog cat --image query.png --sheet query.png", "query.png is the picture that is looked for"),
    "a flag of another command": (FIND + " --beams 3", "unrecognized arguments: --beams 3"),
}  # fmt: skip


@pytest.mark.parametrize(("line", "message"), BAD.values(), ids=BAD)
def test_bad_input_is_one_line_that_says_what(bad: Path, capsys, line: str, message: str):
    before = contents(bad)
    refused(capsys, line, message)
    changed = {k for k in before.keys() | contents(bad).keys() if before.get(k) != contents(bad).get(k)}
    assert all(Path(name).name == "checked.json" for name in changed)


def test_what_is_wrong_is_told_before_a_model_is_loaded(bad: Path, capsys, monkeypatch):
    not_loaded(monkeypatch)
    for name, (line, message) in BAD.items():
        later = (
            "part of",
            "a catalogue that is",
            "where there",
            "another",
            "part that",
            "one that is another",
        )
        if not any(word in name for word in later):
            refused(capsys, line, message)


def test_numbers_that_overflow_are_told_and_nothing_is_written(room: Path, capsys, monkeypatch):
    index(room, capsys)
    broken = lambda model, x: torch.full((len(x), 2, model.cfg.vit.dim), torch.nan)  # noqa: E731
    monkeypatch.setattr(UniFashion, "see", broken)
    told = "the numbers overflow: a file of weights is damaged"
    refused(capsys, "index --images shop --out new", told)
    refused(capsys, "search --catalog cat --image query.png", told)
    assert not (room / "new").exists()


def test_a_disk_that_is_full_is_told(room: Path, capsys, monkeypatch):
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(indexing.os, "fsync", full)
    refused(capsys, "index --images shop --out cat", "cat cannot be written: No space left on device")
    assert left_behind(room / "cat") == {PART}


def test_what_a_full_disk_does_not_hold_is_not_left_there(room: Path, capsys, monkeypatch):
    """Of a new catalogue: what was embedded stays, for the next run, and the old catalogue."""
    index(room, capsys)
    photo(room / "shop/new.png", (50, 30), 90)
    fsync = os.fsync

    def full(file: int) -> None:
        if os.readlink(f"/proc/self/fd/{file}").endswith(f"{EMBEDDINGS}.new"):
            raise OSError(28, "No space left on device")
        fsync(file)

    with monkeypatch.context() as patch:
        patch.setattr(catalog.os, "fsync", full)
        refused(capsys, "index --images shop --out cat", "cat cannot be written: No space left on device")
    assert left_behind(room / "cat") - {"checked.json"} == {EMBEDDINGS, ITEMS, LOCAL, PART, PART_ITEMS}
    assert len(find(room, capsys, "--text", "red")[0]) == 8
    assert index(room, capsys)["embedded"] == 0 and len(find(room, capsys, "--text", "red")[0]) == 9


@pytest.mark.parametrize("command", ["index", "search"])
def test_help_answers_without_torch(command: str):
    asked = subprocess.run(
        [sys.executable, "-X", "importtime", "infer.py", command, "--help"],
        cwd=ROOT, capture_output=True, text=True,
    )  # fmt: skip
    assert asked.returncode == 0 and "usage" in asked.stdout
    assert "argparse" in asked.stderr and "torch" not in asked.stderr and "numpy" not in asked.stderr


# Helpers


class Killed(BaseException):
    pass


@contextlib.contextmanager
def killed_at(n: int) -> Iterator[list[str]]:
    """Within, the n-th thing that is done to files is the last, and of a file that is written half is there. -> all so far."""
    done: list[str] = []

    def counted(name: str, do: Callable) -> Callable:
        def doing(*args: object, **kw: object) -> object:
            done.append(name)
            if len(done) == n + 1:
                if name == "fsync":
                    os.ftruncate(args[0], os.fstat(args[0]).st_size // 2)
                raise Killed
            return do(*args, **kw)

        return doing

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", counted("fsync", os.fsync))
        patch.setattr(os, "replace", counted("replace", os.replace))
        patch.setattr(Path, "unlink", counted("unlink", Path.unlink))
        patch.setattr(indexing.Part, "__len__", lambda part: len(part.items))
        yield done


def prepare(room: Path, begun: str) -> None:
    shutil.rmtree(room / "cat", ignore_errors=True)
    if begun == "old":
        shutil.copytree(room / "old", room / "cat")


def spying(do: Callable, calls: list) -> Callable:
    return lambda *args, **kw: (calls.append(args), do(*args, **kw))[1]


def spy(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many pictures each batch has."""
    sizes, embed = [], indexing.embed
    monkeypatch.setattr(
        indexing,
        "embed",
        lambda model, pictures, **kw: (sizes.append(len(pictures)), embed(model, pictures, **kw))[1],
    )
    return sizes


def stop_at_batch(monkeypatch: pytest.MonkeyPatch, n: int) -> None:
    embed, calls = indexing.embed, []

    def stop(*args: object, **kw: object) -> object:
        calls.append(args)
        if len(calls) == n:
            raise KeyboardInterrupt
        return embed(*args, **kw)

    monkeypatch.setattr(indexing, "embed", stop)


def forbid(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """A folder that cannot be read, even by root, who runs tests."""
    scandir = os.scandir

    def forbidden(path: str) -> Iterator[os.DirEntry]:
        if Path(path).name == name:
            raise PermissionError(13, "Permission denied")
        return scandir(path)

    monkeypatch.setattr(indexing.os, "scandir", forbidden)


def run(capsys, *argv: str, quiet: bool = True, code: int = 0) -> tuple[str, str]:
    capsys.readouterr()
    command, *rest = argv
    assert infer.main([command, *COMMON, *["--quiet"] * quiet, *rest]) == code, capsys.readouterr()
    return tuple(capsys.readouterr())


def index(room: Path, capsys, *flags: str, images: str = "shop", out: str = "cat") -> dict:
    return json.loads(run(capsys, "index", "--images", images, "--out", out, "--json", *flags)[0])


def find(room: Path, capsys, *asked: str, name: str = "cat", quiet: bool = True) -> tuple[list[dict], str]:
    out, err = run(capsys, "search", "--catalog", name, "--json", *asked, quiet=quiet)
    return json.loads(out)["found"], err


def refused(capsys, line: str, message: str) -> None:
    command, *rest = shlex.split(line)
    capsys.readouterr()
    assert infer.main([command, *COMMON, "--quiet", *rest]) == 2
    told = capsys.readouterr()
    assert told.out == "" and told.err.startswith("infer.py: ") and message in told.err
    assert told.err.count("\n") == 1 and told.err.endswith("\n")


def rows(room: Path) -> list[dict]:
    return [json.loads(line) for line in (room / "cat" / ITEMS).read_text().splitlines()]


def assert_same(one: Path, other: Path) -> None:
    for name in (EMBEDDINGS, ITEMS):
        assert (one / name).read_bytes() == (other / name).read_bytes(), name


def left_behind(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def contents(folder: Path) -> dict[str, bytes]:
    files = (path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def loaded(room: Path) -> UniFashion:
    return load.load_unifashion("tiny", room / "weights", draws=False)


def picture_of(path: Path) -> Tensor:
    return qformer_image(read_image(path), CFG.vit.image_size[0])


@pytest.fixture(scope="module")
@torch.no_grad()
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = write_weights(tmp_path_factory.mktemp("weights"), CFG)
    (folder / "bert_vocab.txt").write_text("\n".join(build_vocab(["a red dress"])) + "\n")
    return folder


@pytest.fixture
def room(tmp_path: Path, written: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    return furnish(tmp_path, written, monkeypatch)


def furnish(room: Path, weights: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """To stand in: weights, a shop of pictures in folders, and one to look for; the tiny preset is CFG until the test ends."""
    monkeypatch.setitem(PRESETS, "tiny", CFG)
    monkeypatch.chdir(room)
    (room / "weights").symlink_to(weights)
    for i, path in enumerate(PATHS):
        (room / "shop" / path).parent.mkdir(parents=True, exist_ok=True)
        photo(room / "shop" / path, (40 + 5 * i, 60), i)
    photo(room / "query.png", (33, 44), 99)
    return room


@pytest.fixture(scope="module")
def ruins(tmp_path_factory: pytest.TempPathFactory, written: Path) -> Path:
    """Beside a shop: catalogues of which all but `cat` and `told` are bad, and the weights of another model."""
    place = tmp_path_factory.mktemp("ruins")
    with pytest.MonkeyPatch.context() as patch:
        furnish(place, written, patch)
        assert infer.main(["index", *COMMON, "--quiet", "--images", "shop", "--out", "cat"]) == 0
        assert (
            infer.main(["index", *COMMON, "--quiet", "--images", "shop", "--out", "told", "--captions"]) == 0
        )
        patch.setattr(indexing, "BATCH", 3)
        stop_at_batch(patch, 2)
        assert infer.main(["index", *COMMON, "--quiet", "--images", "shop", "--out", "part"]) == 130
    shutil.copytree(place / "weights", place / "other")
    state = load.read_checkpoint(place / "other/model.safetensors")
    state["qformer.query_tokens"] = state["qformer.query_tokens"] + 1
    save_file(state, place / "other/model.safetensors")
    shutil.copytree(place / "part", place / "torn")
    (place / "torn" / PART_ITEMS).write_bytes(b'{"preset"\n')
    for k in ("stamp", "sha256"):
        lines = [json.loads(line) for line in (place / "part" / PART_ITEMS).read_text().splitlines()]
        del lines[2][k]
        shutil.copytree(place / "part", place / f"no {k}")
        (place / f"no {k}" / PART_ITEMS).write_text("".join(json.dumps(line) + "\n" for line in lines))
    shutil.copytree(place / "cat", place / "spoilt")
    data = bytearray((place / "spoilt" / EMBEDDINGS).read_bytes())
    data[-5] ^= 1
    (place / "spoilt" / EMBEDDINGS).write_bytes(data)
    (place / "mine").mkdir()
    (place / "mine" / ITEMS).write_text("not a catalogue's")
    return place


@pytest.fixture
def bad(tmp_path: Path, ruins: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setitem(PRESETS, "tiny", CFG)
    monkeypatch.chdir(shutil.copytree(ruins, tmp_path / "bad", symlinks=True))
    return tmp_path / "bad"
