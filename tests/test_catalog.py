"""A catalogue's files against damage and kills, and its search against a loop over all that is stored, in float64."""

import json
import os
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors import safe_open
from torch import Tensor

from tests.cases import others_slow
from tests.faults import plant
from unifashion import UserError, catalog, search
from unifashion.catalog import CHECKED, EMBEDDINGS, ITEMS, VERSION, Catalog, check_same, header, write
from unifashion.search import best

pytestmark = pytest.mark.usefixtures("one_thread")

KINDS = ("text", "picture", "both", "both, half the captions", "a query that is not rounded")
Query = tuple[Tensor, Tensor, Tensor | None, float]  # query, pictures, captions, w


# The first of a catalogue


@pytest.mark.parametrize("kind", others_slow(KINDS, "picture", "both, half the captions"))
def test_a_hundred_thousand_are_found_as_by_a_loop_in_float64(kind, monkeypatch):
    monkeypatch.setattr(search, "BLOCK", 2**18)
    assert_found(planted(kind, 100_000, 4, 16))


@pytest.mark.parametrize(
    "kind", [pytest.param(k, marks=pytest.mark.slow if "half" in k else pytest.mark.full) for k in KINDS]
)
def test_at_full_size_a_hundred_thousand_are_found_as_by_a_loop_in_float64(kind):
    assert_found(planted(kind, 100_000, 32, 256))


@pytest.mark.gpu
@pytest.mark.parametrize("kind", KINDS)
def test_a_gpu_finds_what_a_loop_in_float64_does(kind):
    assert_found(planted(kind, 100_000, 32, 256), partial(best, device=torch.device("cuda")))


def test_ties_are_found_in_the_order_in_which_they_stand(monkeypatch):
    """All alike, and across blocks."""
    query, one = unit(16).half(), unit(4, 16).half()
    images = one.expand(500, -1, -1).contiguous()
    monkeypatch.setattr(search, "BLOCK", 4 * 16 * 7)
    for asked in (query, unit(4, 16).half()):
        scores, rows = best(asked, images, 20)
        assert rows.tolist() == [*range(20)] and len(set(scores.tolist())) == 1
    images[333] = F.normalize(one.float() + query, dim=-1).half()
    assert best(query, images, 4)[1].tolist() == [333, 0, 1, 2]


FAULTS = {
    "the rough order": ("best", "order = exact.argsort", "order = rough[near].argsort"),
    "no room for the rough scores' errors": ("best", "- 2 * off", "- 0 * off"),
    "ties from behind": ("best", ".nonzero()[:, 0]", ".nonzero()[:, 0].flip(0)"),
    "in float32": ("_exact", "(images[some].double() * query)", "(images[some].float() * query.float())"),
    "a mean for the best": ("_exact", "products.amax(1)", "products.mean(1)"),
    "no captions": ("_exact", "scores + w * (captions[some]", "scores + 0 * (captions[some]"),
    "no captions, roughly": ("_rough", "found += w *", "found += 0 * w *"),
    "the last block left out": ("_rough", "range(0, n, size)", "range(0, n - size, size)"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_the_loop_notices(fault, monkeypatch):
    target, old, new = FAULTS[fault]
    monkeypatch.setattr(search, "BLOCK", 2**14)
    monkeypatch.setattr(
        torch, "empty", lambda *shape, **kw: torch.zeros(*shape, **kw)
    )  # what is left out is 0
    plant(monkeypatch, search, target, old, new)
    with pytest.raises((AssertionError, RuntimeError)):
        for kind in KINDS:
            assert_found(planted(kind, 3000, 4, 16), search.best, range(1, 150))


def test_how_many_are_asked_for_is_how_many_are_found_up_to_all():
    query, images = unit(16).half(), unit(30, 4, 16).half()
    all_scores, all_rows = best(query, images, 30)
    assert sorted(all_rows.tolist()) == [*range(30)] and (all_scores.diff() <= 0).all()
    for top in (1, 7, 29, 31, 10**9):
        scores, rows = best(query, images, top)
        assert torch.equal(rows, all_rows[:top]) and torch.equal(scores, all_scores[:top])
    for top, some in ((0, images), (5, images[:0])):
        assert [len(x) for x in best(query, some, top)] == [0, 0]


def test_scores_of_rounded_vectors_are_exact():
    """Whatever the order in which they are summed: backwards, and as whole numbers."""
    query, images = unit(256).half(), unit(40, 8, 256).half()
    scores, rows = best(query, images, 40)
    flipped, same = best(query.flip(0), images.flip(-1), 40)
    assert torch.equal(scores, flipped) and torch.equal(rows, same)
    whole = [[round(x * 2**24) for x in row] for row in images[rows[0]].tolist()]
    asked = [round(x * 2**24) for x in query.tolist()]
    top = max(sum(a * b for a, b in zip(asked, row, strict=True)) for row in whole)
    assert scores[0].item() == top / 2**48


def test_vectors_that_are_not_of_unit_length_are_no_catalogues():
    with pytest.raises(RuntimeError, match="off by more"):
        best(unit(16).half(), 1000 * unit(50, 4, 16).half(), 5)


def test_only_a_block_at_a_time_is_compared(monkeypatch):
    monkeypatch.setattr(search, "BLOCK", 1000 * 64)
    made, mv = [], torch.mv
    monkeypatch.setattr(torch, "mv", lambda *a: made.append(mv(*a)) or made[-1])
    best(unit(16).half(), unit(20_000, 4, 16).half(), 5)
    assert [len(x) for x in made] == [4 * 1000] * 20


# The files


def test_what_was_written_is_read_and_by_safetensors_too(tmp_path):
    images, captions, items = fill(tmp_path, 20)
    found = Catalog(tmp_path)
    found.verify(quiet=True)
    assert torch.equal(found.images, images) and torch.equal(found.captions, captions) and len(found) == 20
    assert list(found.items()) == items == [found.item(i) for i in range(20)]
    assert found.about.items() >= {"catalogue": VERSION, "preset": "tiny", "qformer sha256": "abc"}.items()
    with safe_open(tmp_path / EMBEDDINGS, "pt") as file:
        assert sorted(file.keys()) == ["captions", "images"] and file.metadata() == found.about
        assert torch.equal(file.get_tensor("images"), images)
        assert torch.equal(file.get_tensor("captions"), captions)


def test_it_is_read_from_the_file_and_not_into_memory(tmp_path):
    fill(tmp_path, 20)
    found = Catalog(tmp_path)
    with open(tmp_path / EMBEDDINGS, "r+b") as file:
        file.seek(-2, os.SEEK_END)
        file.write(np.float16(0.5).tobytes())
    assert found.captions[-1, -1] == 0.5


def test_every_flipped_bit_is_found(tmp_path):
    fill(tmp_path, 3)
    file = tmp_path / EMBEDDINGS
    whole = file.read_bytes()
    Catalog(tmp_path).verify(quiet=True)
    for at in range(len(whole)):
        file.write_bytes(whole[:at] + bytes([whole[at] ^ 1 << at % 8]) + whole[at + 1 :])
        with pytest.raises(UserError) as told:
            Catalog(tmp_path).verify(quiet=True)
        assert "\n" not in str(told.value)
    file.write_bytes(whole)
    Catalog(tmp_path).verify(quiet=True)


@pytest.mark.parametrize("left", [0, 3, 8, 100, -100, -1, "one more"])
def test_a_file_of_another_length_is_refused_at_once(left, tmp_path):
    fill(tmp_path, 20)
    whole = (tmp_path / EMBEDDINGS).read_bytes()
    (tmp_path / EMBEDDINGS).write_bytes(whole + b"x" if left == "one more" else whole[:left])
    with pytest.raises(UserError, match="damaged, or no catalogue's"):
        Catalog(tmp_path)


@pytest.mark.parametrize("shape", [[8.0, 16, 64], [-8, -16, 64], [8, 16, 2**70]])
def test_a_header_whose_shape_is_none_is_refused(shape, tmp_path):
    fill(tmp_path, 2)
    raw = header(Catalog(tmp_path).about, {"images": shape})
    (tmp_path / EMBEDDINGS).write_bytes(raw + bytes(2 * 8 * 16 * 64))
    with pytest.raises(UserError, match="damaged, or no catalogue's"):
        Catalog(tmp_path)


EDITS = {
    "a line less": lambda lines: lines[1:],
    "a line more": lambda lines: [*lines, lines[0]],
    "another order": lambda lines: lines[::-1],
    "another name": lambda lines: [lines[0].replace(b"0.png", b"9.png"), *lines[1:]],
    "cut short": lambda lines: [*lines[:-1], lines[-1][:-3]],
    "nothing": lambda _: [],
    "removed": None,
}


@pytest.mark.parametrize("edit", EDITS)
def test_items_that_were_edited_are_refused(edit, tmp_path):
    fill(tmp_path, 5)
    lines = (tmp_path / ITEMS).read_bytes().splitlines(keepends=True)
    (tmp_path / ITEMS).unlink()
    if EDITS[edit]:
        (tmp_path / ITEMS).write_bytes(b"".join(EDITS[edit](lines)))
    with pytest.raises(UserError, match="items.jsonl is .*not the one that was written with"):
        Catalog(tmp_path)


def test_files_of_two_catalogues_do_not_go_together(tmp_path):
    for name, n in (("a", 5), ("b", 6)):
        (tmp_path / name).mkdir()
        fill(tmp_path / name, n)
    os.replace(tmp_path / "b" / ITEMS, tmp_path / "a" / ITEMS)
    with pytest.raises(UserError, match="not the one"):
        Catalog(tmp_path / "a")


@pytest.mark.parametrize(
    ("made", "told"),
    [
        (None, "there is no embeddings.safetensors in it; infer.py index makes one"),
        ("items.part", "its indexing has not come to its end"),
        ("no pictures", "a catalogue of no pictures"),
        ("version", "a catalogue of another version"),
        ("a folder", "there is no embeddings.safetensors in it"),
        ("another's", "damaged, or no catalogue's"),
    ],
)
def test_what_is_no_catalogue_is_told(made, told, tmp_path):
    if made == "items.part":
        (tmp_path / made).touch()
    if made in ("no pictures", "version"):
        fill(tmp_path, 0 if made == "no pictures" else 3, version="2" if made == "version" else VERSION)
    if made == "a folder":
        (tmp_path / EMBEDDINGS).mkdir()
    if made == "another's":
        from safetensors.torch import save_file

        save_file({"images": torch.zeros(3, 4, 16).half()}, tmp_path / EMBEDDINGS)
    with pytest.raises(UserError, match=told):
        Catalog(tmp_path)
    with pytest.raises(UserError, match="is no catalogue"):
        Catalog(tmp_path / "nowhere")


def test_another_model_is_named(tmp_path):
    fill(tmp_path, 2)
    about = Catalog(tmp_path).about
    check_same(tmp_path, about, {"preset": "tiny", "qformer sha256": "abc"}, "do that")
    with pytest.raises(UserError, match="was made with qformer sha256 abc, not abd: do that"):
        check_same(tmp_path, about, {"preset": "tiny", "qformer sha256": "abd"}, "do that")
    with pytest.raises(UserError, match="was made with captions none, not fashiongen"):
        check_same(tmp_path, about, {"captions": "fashiongen"}, "do that")


def test_all_of_a_file_is_read_only_when_it_has_changed(tmp_path, monkeypatch):
    fill(tmp_path, 20)
    found = Catalog(tmp_path)
    found.verify(quiet=True)
    with monkeypatch.context() as patch:
        patch.setattr(catalog.hashlib, "sha256", lambda *_: pytest.fail("read it"))
        found.verify(quiet=True)
    file = tmp_path / EMBEDDINGS
    times = file.stat()
    with open(file, "r+b") as opened:
        opened.seek(-7, os.SEEK_END)
        opened.write(b"!")
    os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns))  # and hides it
    with pytest.raises(UserError, match="damaged, or was edited"):
        Catalog(tmp_path).verify(quiet=True)
    for nonsense in ("", "[", "7", "null", "[" * 100_000):
        (tmp_path / CHECKED).write_text(nonsense)
        with pytest.raises(UserError, match="damaged, or was edited"):
            Catalog(tmp_path).verify(quiet=True)


@pytest.mark.parametrize("at", [0, 1])
def test_killed_between_two_renames_one_of_two_catalogues_is_whole(at, tmp_path, monkeypatch):
    _, _, old = fill(tmp_path, 5)
    replace, done = os.replace, []

    def killed(*names: Path) -> None:
        if len(done) == at:
            raise KeyboardInterrupt
        done.append(replace(*names))

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(catalog.os, "replace", killed)
        fill(tmp_path, 8)
    found = Catalog(tmp_path)
    found.verify(quiet=True)
    assert len(found) == (8 if at else 5) == len(list(found.items()))
    assert list(found.items())[:5] == old and found.item(len(found) - 1)["path"] == f"{len(found) - 1}.png"


def test_what_was_opened_stays_though_another_takes_its_place(tmp_path):
    """A search loads a model in between, which takes a while."""
    images, _, items = fill(tmp_path, 5)
    found = Catalog(tmp_path)
    found.verify(quiet=True)
    fill(tmp_path, 8, first=3)
    assert [found.item(i) for i in range(5)] == list(found.items()) == items
    assert torch.equal(found.images, images)
    assert len(Catalog(tmp_path)) == 8 and Catalog(tmp_path).item(0)["path"] == "3.png"


def test_what_changes_between_two_looks_is_not_called_damaged(tmp_path, monkeypatch):
    fill(tmp_path, 5)
    found = Catalog(tmp_path)
    fill(tmp_path, 8)
    with pytest.raises(UserError, match="brought up to date while it was read: try again"):
        found.verify(quiet=True)
    read_header = Catalog._read_header

    def slowly(*args: object) -> object:
        read = read_header(*args)
        fill(tmp_path, 6)
        return read

    monkeypatch.setattr(Catalog, "_read_header", slowly)
    with pytest.raises(UserError, match="brought up to date while it was read: try again"):
        Catalog(tmp_path)


# Helpers


def unit(*shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(sum(shape))
    return F.normalize(torch.randn(*shape, generator=generator), dim=-1)


def planted(kind: str, n: int, q: int, d: int) -> Query:
    """Random unit vectors, and among them, near the top: the same again and again, and such as differ in a last bit."""
    images, captions = unit(n, q, d).half(), unit(n, d).half()
    query = unit(q, d) if kind == "picture" else unit(d)
    query = query if "not rounded" in kind else query.half()
    w = 0.5 if "half" in kind else 1.0
    given = (query, images, captions if "both" in kind else None, w)
    order = brute(given)[1]
    for i, row in enumerate((n - 1, 0, n // 2, n // 3, 7, 5)):  # in this order, which is not that of the ties
        images[row], captions[row] = images[order[2]], captions[order[2]]
        if i % 2:  # the least that half precision can tell, far less than it tells of a score
            best_of_queries = (images[row].double() * query.double()).sum(-1).argmax()
            images[row, best_of_queries].view(torch.int16)[images[row, best_of_queries].abs().argmin()] += 1
    return given


def brute(given: Query) -> tuple[list[float], list[int]]:
    query, images, captions, w = given
    asked, scores = query.double().numpy(), []
    for i in range(len(images)):
        rows = images[i].numpy().astype(np.float64)
        if query.ndim == 2:
            scores.append((rows * asked).sum(1).mean())
        else:
            scores.append((rows * asked).sum(1).max())
            if captions is not None:
                scores[-1] += w * (captions[i].numpy().astype(np.float64) * asked).sum()
    order = sorted(range(len(scores)), key=lambda i: (-scores[i], i))
    return [scores[i] for i in order], order


def assert_found(given: Query, best: Callable = best, tops: Iterable[int] = (1, 3, 10, 100)) -> None:
    query, images, captions, w = given
    scores, order = brute(given)
    assert any(a == b for a, b in zip(scores[:9], scores[1:10], strict=True)), "no tie was planted"
    assert any(0 < a - b < 1e-5 for a, b in zip(scores[:9], scores[1:10], strict=True)), (
        "nothing that is near"
    )
    for top in tops:
        found, rows = best(query, images, top, captions, w)
        assert rows.tolist() == order[:top]
        assert np.allclose(found, scores[:top], atol=1e-15, rtol=0)


def fill(folder: Path, n: int, version: str = VERSION, first: int = 0) -> tuple[Tensor, Tensor, list[dict]]:
    """A catalogue of n random pictures, the first of which has this number."""
    images, captions = unit(n, 4, 16).half(), unit(n, 16).half()
    numbers = range(first, first + n)
    items = [{"path": f"{i}.png", "sha256": f"{i:064x}", "caption": "a dress"} for i in numbers]
    about = {"catalogue": version, "preset": "tiny", "qformer sha256": "abc", "captions": ""}
    shapes = {"images": [n, 4, 16], "captions": [n, 16]}
    pieces = [images[: n // 2].numpy(), images[n // 2 :].numpy(), captions.numpy()]
    write(folder, about, shapes, pieces, items)
    assert [json.loads(line) for line in (folder / ITEMS).read_text().splitlines()] == items
    return images, captions, items
