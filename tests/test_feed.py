"""From a data set to batches: order, what is held out, the cache, samples that cannot be read, random numbers."""

import shutil
from functools import partial
from pathlib import Path

import pytest
import torch
from torch.utils.data import Dataset, Subset

from tests.small_runs import MINI, assert_same, learned, load_public, run
from unifashion import UserError, feed, objectives, parallel, samples
from unifashion.training import BatchRNG
from weights.load import llm_tokenizer, tokenizer

pytestmark = pytest.mark.usefixtures("one_thread")

# Order


def test_every_sample_is_seen_once_an_epoch_whatever_the_start():
    order = list(feed.batch_order(10, 3, seed=1, start=0, stop=6))
    assert len({i for batch in order[:3] for i in batch}) == 9
    assert order[4:] == list(feed.batch_order(10, 3, seed=1, start=4, stop=6))
    assert order[:3] != order[3:6]
    assert order != list(feed.batch_order(10, 3, seed=2, start=0, stop=6))


def test_a_data_set_smaller_than_a_batch_is_refused():
    with pytest.raises(UserError, match="has 3 samples, fewer than one batch of 4"):
        next(feed.batch_order(3, 4, 0, 0, 1))


def test_held_out_products_are_whole():
    names = [f"p{i // 3}" for i in range(300)]
    kept, held = feed.held_out(names, every=10)
    assert held and not {names[i] for i in kept} & {names[i] for i in held}
    assert sorted(kept + held) == list(range(300))
    again = feed.held_out(names[::-1], every=10)[
        1
    ]  # whether a product is held out does not depend on the others
    assert {names[i] for i in held} == {names[::-1][i] for i in again}


def test_of_a_very_small_data_set_two_products_are_held_out():
    names = ["a", "b", "c", "c", "d"]
    assert feed.held_out(names, every=10**9) == ([0, 1], [2, 3, 4])


# The cache


@pytest.mark.parametrize("task", ["tryon", "cir", "caption"])
def test_the_cache_changes_nothing_but_float16_rounding(task, place):
    part, encode = task_of(task, place)
    order = [[3, 1], [0, 3], [17, 2]]  # 17: of the next group
    plain, cached = (list(feed.batches(part, iter(order), encode, cache)) for cache in (None, {}))
    for a, b in zip(plain, cached, strict=True):
        assert a.keys() == b.keys()
        for k in a:
            assert a[k].dtype == b[k].dtype
            torch.testing.assert_close(a[k], b[k], atol=4e-3, rtol=2e-3)
    features = plain[0]["features"] if task != "caption" else plain[0]["z"]
    assert not torch.allclose(features[0], features[1], atol=1e-3)  # samples are told apart
    assert torch.equal(cached[0]["index"], torch.tensor([3, 1]))


def test_what_is_cached_is_read_once_in_groups_that_do_not_depend_on_the_order(place):
    """A resumed run, which starts elsewhere, computes the same bits: a network's output may depend on its batch."""
    part, encode = task_of("cir", place)
    reads, encoded = [], []

    class Noted(Dataset):
        def __len__(self) -> int:
            return len(part)

        def __getitem__(self, i: int) -> dict:
            reads.append(i)
            return part[i]

    def noted(batch: dict) -> dict:
        encoded.append(batch["index"].tolist())
        return encode(batch)

    list(feed.batches(Noted(), iter([[20, 3], [3, 1], [18, 20]]), noted, {}))
    assert encoded == [list(range(16)), list(range(16, 32))] and len(reads) == len(set(reads)) == 32
    encoded.clear()
    list(feed.batches(Noted(), iter([[18, 20]]), noted, {}))
    assert encoded == [list(range(16, 32))]


def test_processes_that_read_for_the_cache_read_what_one_would(place):
    part, encode = task_of("cir", place)
    order = [[20, 3], [3, 1], [18, 20], [40, 2]]
    one, two = (list(feed.batches(part, iter(order), encode, {}, workers)) for workers in (0, 2))
    assert len(two) == 4
    for a, b in zip(one, two, strict=True):
        assert_same(a, b)
    cache: dict = {}
    again = [list(feed.batches(part, iter(order), encode, cache, workers)) for workers in (2, 0)]
    assert_same(again[0][-1], again[1][-1])  # known already, and one's own groups go on after another's
    more = list(feed.batches(part, iter([[3, 47]]), encode, cache, 2))
    assert more[0]["index"].tolist() == [3, 47]


def test_what_float16_cannot_hold_is_told(place):
    part, encode = task_of("cir", place)
    large = lambda batch: {**encode(batch), "features": torch.full((len(batch["index"]), 2), 1e5)}  # noqa: E731
    with pytest.raises(UserError, match="features is too large for the cache's float16: leave --cache out"):
        next(feed.batches(part, iter([[0, 1]]), large, {}))


@pytest.mark.parametrize(("steps", "cached"), [(2, False), pytest.param(60, True, marks=pytest.mark.slow)])
def test_samples_are_kept_where_they_come_again(steps, cached, place, monkeypatch):
    keeps = []
    batches = feed.batches
    monkeypatch.setattr(feed, "batches", lambda *args: (keeps.append(args[3] is not None), batches(*args))[1])
    monkeypatch.setattr(feed, "GROUP", 4)
    run("2 tryon", place, "run", steps, "--cache")
    assert keeps[0] is cached and all(keeps[1:])  # first what is learned from, then what is held out


def test_what_is_looked_at_on_the_cpu_stays_there(place):
    part, encode = task_of("tryon", place)
    batch = next(
        feed.stream(
            part, iter([[0, 1]]), lambda b: {"z": b["pictures"], "odds": b["odds"]}, torch.device("meta")
        )
    )
    assert batch["z"].device.type == "meta" and batch["odds"].device.type == "cpu"


# What cannot be read


class Shelf(Dataset):
    """n samples, of which some are broken."""

    def __init__(self, n: int, broken: set[int]) -> None:
        self.n, self.broken = n, broken

    def __len__(self) -> int:
        return self.n

    def __getitem__(self, i: int) -> dict[str, torch.Tensor]:
        if i in self.broken:
            raise UserError(f"{i}.jpg: cannot be read as an image")
        return {"x": torch.tensor(float(i))}


def test_in_place_of_a_broken_sample_comes_the_next_and_it_is_named_once(tmp_path):
    sound, log = (
        feed.Readable(Shelf(300, {5, 6, 299}), tmp_path / "run/skipped.txt", False),
        tmp_path / "run/skipped.txt",
    )
    for _ in range(2):
        found = [sound[i] for i in range(300)]
        assert all(item is not None and item["x"] == item["index"] for item in found)
        at = [int(item["index"]) for item in found]
        assert at[5] == at[6] == at[7] == 7 and at[299] == 0
        assert at[:5] + at[7:299] == [*range(5), *range(7, 299)]
    assert log.read_text().splitlines() == [f"{i}\t{i}.jpg: cannot be read as an image" for i in (5, 6, 299)]


def test_what_is_held_out_takes_no_one_else_s_place(tmp_path):
    sound = feed.Readable(Shelf(300, {20}), tmp_path / "skipped.txt", False, [5, 20, 7])
    assert [int(sound[i]["index"]) for i in range(3)] == [5, 7, 7] and len(sound) == 3
    assert (tmp_path / "skipped.txt").read_text().startswith("20\t")


def test_more_than_one_in_a_hundred_stop_the_run_unless_that_is_allowed(tmp_path):
    broken = set(range(10, 14))  # of 300
    sound = feed.Readable(Shelf(300, broken), tmp_path / "skipped.txt", False)
    assert int(sound[13]["index"]) == 14 and int(sound[12]["index"]) == 14 and int(sound[11]["index"]) == 14
    with pytest.raises(UserError, match=r"4 of 300 samples .* more than 1 % .say --allow-missing.*: 10.jpg"):
        sound[10]
    with open(tmp_path / "skipped.txt", "a") as log:
        log.write("10\tof a network that was away\n")  # known for another reason: it counts once
    with pytest.raises(UserError, match=f"4 of 300 .*{tmp_path}/skipped.txt names all"):
        sound[11]
    # the log is what another process that reads knows of the first
    with pytest.raises(UserError, match="4 of 300"):
        feed.Readable(Shelf(300, broken), tmp_path / "skipped.txt", False)[10]
    allowed = feed.Readable(Shelf(300, set(range(100))), tmp_path / "other.txt", True)
    assert int(allowed[0]["index"]) == 100 and len((tmp_path / "other.txt").read_text().splitlines()) == 100
    with pytest.raises(UserError, match="not one sample can be read"):
        feed.Readable(Shelf(3, {0, 1, 2}), tmp_path / "none.txt", True)[0]


def test_only_what_the_user_can_mend_is_skipped(tmp_path):
    class Buggy(Shelf):
        def __getitem__(self, i: int) -> dict:
            return {"x": torch.zeros(2)[5]}

    with pytest.raises(IndexError):
        feed.Readable(Buggy(3, set()), tmp_path / "skipped.txt", True)[0]
    assert not (tmp_path / "skipped.txt").exists()


@pytest.mark.parametrize("workers", ["0", "2"])
def test_a_run_goes_on_without_one_broken_picture_and_names_it(workers, place, monkeypatch):
    """Allowed, since of so few it is more than one in a hundred; the replaced sample is the next one's double."""
    broken = break_pictures(place, "toy/fashion200k/women/**/*_0.jpeg", 1)
    data = ["--data", f"fashion200k={place / 'broken/toy/fashion200k'}", "--batch-size", "8"]
    run("1 align", place, "run", 8, *data, "--workers", workers, "--allow-missing")
    told = (place / "run/skipped.txt").read_text().splitlines()
    assert len(told) == 1 and str(broken[0]) in told[0] and "cannot be read as an image" in told[0]
    with pytest.raises(UserError, match="1 of 36 samples are missing or broken, more than 1 %") as error:
        run("1 align", place, "strict", 8, *data)
    assert str(broken[0]) in str(error.value)
    run("1 align", place, "run2", 8, *data, "--workers", workers, "--allow-missing")
    assert_same(learned(place / "run"), learned(place / "run2"))
    shutil.copy(next(p for p in broken[0].parent.glob("*.jpeg") if p != broken[0]), broken[0])
    run("1 align", place, "run", 9, *data, "--workers", workers, "--resume", "--steps", "9")
    assert not (place / "run/skipped.txt").exists()  # it was mended, and counts no more


def test_missing_pictures_are_counted_before_anything_is_trained(place, capsys):
    gone = break_pictures(place, "toy/fashion200k/women/**/*_0.jpeg", 2)
    for path in gone:
        path.unlink()
    data = ["--data", f"fashion200k={place / 'broken/toy/fashion200k'}"]
    with pytest.raises(
        UserError, match="2 of 36 samples are missing or broken.*lacks women/.*_0.jpeg"
    ) as error:
        run("1 align", place, "run", 1, *data)
    assert not (place / "run").exists()
    assert "github.com/xthan/fashion-200k" in str(error.value)  # where to get it
    run("1 align", place, "run", 8, *data, "--allow-missing")
    assert len((place / "run/skipped.txt").read_text().splitlines()) <= 2
    assert "fashion200k: 2 of 36 samples are left out, " in capsys.readouterr().err


def test_what_has_no_caption_counts_as_missing_and_as_one_that_should_be_there(place):
    shutil.copytree((place / "toy").resolve(), place / "broken/toy")
    (label,) = (place / "broken/toy/fashion200k/labels").glob("top_train_*")
    label.write_text(f"women/a/1/1_0.jpeg\t0.9\t\n{label.read_text()}")
    with pytest.raises(
        UserError, match="1 of 37 samples are missing or broken.*lacks a caption of women/a/1/1_0"
    ):
        run("1 align", place, "run", 1, "--data", f"fashion200k={place / 'broken/toy/fashion200k'}")


# BatchRNG


def test_what_is_drawn_depends_on_what_for_seed_and_step_alone():
    same = [BatchRNG("cir", 0, 7, 3).normal(2, 2) for _ in range(2)]
    assert torch.equal(*same)
    for other in (("tryon", 0, 7), ("cir", 1, 7), ("cir", 0, 8)):
        assert not torch.equal(BatchRNG(*other, 3).normal(2, 2), same[0])


@pytest.mark.parametrize("world", [2, 3])
def test_processes_draw_together_what_one_would_and_each_has_its_own_share(world, monkeypatch):
    def drawn(b: int, rank: int) -> list[torch.Tensor]:
        rng = BatchRNG("tryon", 5, 11, b)
        odds = torch.tensor([[0.3, 0.1, 0.5, 0.1], [0.0, 0.0, 0.0, 1.0]]).repeat(6, 1)[
            rank * b : rank * b + b
        ]
        return [rng.normal(2, 3), rng.timesteps(1000), rng.keep(0.3), rng.categorical(odds), rng.normal(4)]

    whole = drawn(12, 0)
    assert [x.shape[0] for x in whole] == [12] * 5
    monkeypatch.setattr(parallel, "world", lambda: world)
    shares = []
    for rank in range(world):
        monkeypatch.setattr(parallel, "rank", lambda rank=rank: rank)
        shares.append(drawn(12 // world, rank))
    for i, x in enumerate(whole):
        assert torch.equal(torch.cat([share[i] for share in shares]), x)


@pytest.mark.parametrize("cached", [False, True])
def test_processes_read_together_the_batches_of_one_and_each_its_own_share(cached, monkeypatch):
    order = list(feed.batch_order(40, 6, 0, 0, 4))
    encode = lambda batch: batch  # noqa: E731

    def read() -> list[list[float]]:
        batches = feed.batches(Shelf(40, set()), iter(order), encode, {} if cached else None)
        return [batch["x"].tolist() for batch in batches]

    whole = read()
    assert whole == [[float(i) for i in batch] for batch in order]
    monkeypatch.setattr(parallel, "world", lambda: 3)
    shares = []
    for rank in range(3):
        monkeypatch.setattr(parallel, "rank", lambda rank=rank: rank)
        shares.append(read())
    for i, batch in enumerate(whole):
        assert [x for share in shares for x in share[i]] == batch
        assert all(len(share[i]) == 2 for share in shares)


def test_a_batch_that_does_not_divide_among_the_processes_is_refused(place, monkeypatch):
    monkeypatch.setattr(parallel, "world", lambda: 3)
    assert parallel.share(6) == 2
    with pytest.raises(UserError, match="a batch of 4 does not divide among 3 processes"):
        run("1 align", place, "run", 1)
    assert not (place / "run").exists()


def test_a_full_disk_is_told_by_who_reads(tmp_path, monkeypatch):
    (tmp_path / "skipped.txt").mkdir()  # as unwritable
    sound = feed.Readable(Shelf(300, {5}), tmp_path / "skipped.txt", False)
    with pytest.raises(UserError, match="skipped.txt cannot be written"):
        sound[5]


# Helpers


def task_of(task: str, place: Path) -> tuple[Dataset, partial]:
    """Samples with their indices, and the frozen half, over a random model."""
    model = load_public(place, True, False).eval()
    words, data = tokenizer("tiny", place / "weights"), [f"toy={place / 'toy'}"]
    if task == "tryon":
        part = samples.Scenes(samples.open_data(data, samples.PERSONS), MINI, words)
        part, encode = Subset(part, [i % 12 for i in range(36)]), objectives.encode_tryon
    elif task == "cir":
        opened = samples.open_data(data, samples.COMPOSED)
        part, encode = samples.Triplets(opened, MINI, words, None, ("itg",)), objectives.encode_composed
    else:
        opened = samples.open_data(data, samples.TEXTS)
        part = samples.Answers(opened, MINI, llm_tokenizer("tiny", place / "weights"))
        encode = objectives.encode_z
    return feed.Readable(part, place / "skipped.txt", False), partial(encode, model)


def break_pictures(place: Path, pattern: str, n: int) -> list[Path]:
    """Cut n of the toy's pictures short, in a copy at place/broken -> their paths."""
    shutil.copytree((place / "toy").resolve(), place / "broken/toy")
    paths = sorted((place / "broken").glob(pattern))[:n]
    assert len(paths) == n
    for path in paths:
        path.write_bytes(path.read_bytes()[:200])
    return paths
