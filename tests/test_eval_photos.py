"""FID, KID and CLIP-S of VITON-HD and MGD, on drawn pictures in their layouts, with random networks through the real loaders."""

import json
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from eval import folders, generation, photos, realism
from eval.metrics import fid as measures
from eval.metrics.clip_score import clip_s, pair_scores
from eval.metrics.inception import InceptionV3
from eval.photos import PAIRINGS, Asked, others, read_asked
from eval.sampling import read, through_vae
from tests import test_clip, test_inception
from tests.merges import write_merges
from tests.small_draws import write_weights
from tests.worlds import world_of
from unifashion import UserError
from unifashion.data.mgd import MGD
from unifashion.data.vitonhd import VITONHD
from unifashion.preprocess import paste
from weights.clip import load_clip
from weights.inception import FILES, load_inception
from weights.load import load_unifashion
from weights.rename import blank

N = 6
OUTPUTS = ["outputs, with repaint", "outputs, without repaint"]
SHARED = [
    "persons unchanged",
    "persons through the VAE, with repaint",
    "persons through the VAE, without repaint",
    "two halves of the persons",
]
pytestmark = pytest.mark.usefixtures("one_thread")


# The report


def test_every_figure_of_a_design_is_that_of_its_pictures(command, data, tmp_path, clip):
    report = command("mgd", "--keep", str(tmp_path / "made"))
    assert list(report["results"]) == list(PAIRINGS) and report["not measured"] == {}
    for pairing, rows in report["results"].items():
        assert list(rows) == [*OUTPUTS, "garments shuffled", "texts shuffled", *SHARED]
        items, made = MGD(data, "test", paired=pairing == "paired"), tmp_path / "made" / pairing
        people = [items[i]["person"] for i in range(N)]
        real = features_of(people)
        raw = [Image.open(made / "{}_{}.png".format(*pair)) for pair in items.pairs]
        with_own = [
            Image.fromarray(paste(*(np.asarray(x) for x in (person, picture, items[i]["mask"]))))
            for i, (person, picture) in enumerate(zip(people, raw, strict=True))
        ]
        texts = [items[i]["text"] for i in range(N)]
        for name, pictures in zip(OUTPUTS, (with_own, raw), strict=True):
            row, found = rows[name], features_of(pictures)
            pairs = [1000 * x for x in measures.kid_of_pairs(found, real, quiet=True)]
            subsets = [1000 * x for x in measures.kid_subsets(found, real, 100, 3, quiet=True)]
            assert row["FID"] == [pytest.approx(measures.fid(found, real, quiet=True), abs=1e-4)]
            assert row["KID x1000"] == [pytest.approx(1000 * measures.kid(found, real, quiet=True), abs=1e-3)]
            assert row["KID x1000, pairs"] == pytest.approx(pairs, abs=1e-3)
            assert row["KID x1000, subsets"] == pytest.approx(subsets, abs=1e-3)
            value, low, high = row["CLIP-S"]
            assert value == pytest.approx(clip_s(pair_scores(*clip, pictures, texts, quiet=True)), abs=1e-3)
            assert low <= value <= high
        assert rows["persons unchanged"]["FID"] == [0] and rows["persons unchanged"]["KID x1000, pairs"] == [
            0,
            0,
            0,
        ]
        same = clip_s(pair_scores(*clip, people, texts, quiet=True))
        assert rows["persons unchanged"]["CLIP-S"][0] == pytest.approx(same, abs=1e-3)
        assert set(rows["texts shuffled"]) == {"CLIP-S"}
        assert (
            rows[OUTPUTS[0]]["CLIP-S"][0] > 1
            and rows[OUTPUTS[0]]["CLIP-S"] != rows["texts shuffled"]["CLIP-S"]
        )
        assert rows["two halves of the persons"]["FID"] == [pytest.approx(measures.fid_floor(real), abs=1e-4)]
        assert rows[SHARED[1]]["FID"] != rows[SHARED[2]]["FID"]
    paired, unpaired = report["results"].values()
    assert paired[OUTPUTS[0]]["FID"] != unpaired[OUTPUTS[0]]["FID"]
    assert paired["garments shuffled"]["FID"] == unpaired["garments shuffled"]["FID"]  # the same pictures,
    assert paired["garments shuffled"]["CLIP-S"] != unpaired["garments shuffled"]["CLIP-S"]  # other texts


def test_the_report_holds_what_a_reader_needs(command, data, tmp_path, capsys):
    elsewhere = shutil.copytree(data, tmp_path / "photographs")  # beside no toy.json
    report = command(
        "vitonhd", "--keep", str(tmp_path / "made"), "--seed", "3", "--guidance", "2", at=elsewhere
    )
    out, err = capsys.readouterr()
    assert report["command"].startswith("python -m eval.generation --data vitonhd=")
    assert report["seed"] == 3 and report["pairs"] == f"{N} of {N}" and report["split"] == "test"
    assert report["setting"] == "ddim 2, guidance 2; from cloth and DensePose"
    for k in ("qformer sha256", "model sha256", "pairs sha256", "inception sha256", "data sha256"):
        assert len(report[k]) == 64 and report[k] in out
    assert report["verdict"].startswith("unknown: ") and report["verdict"] in out
    assert "toyfashion" not in report and report["paper, unpaired"]["UniFashion"] == [8.42, 0.67]
    for rows in report["results"].values():  # no text, no CLIP-S
        assert list(rows) == [*OUTPUTS, "garments shuffled", *SHARED]
        assert all("CLIP-S" not in row for row in rows.values())
    paired, unpaired = out.split("\nunpaired ")
    assert "Table 3" not in paired
    assert re.search(r"StableVITON, Table 3 +8\.23 +0\.49 +-\n", unpaired)
    assert f"reference: all {N} persons of test" in out and "subsets of 3, seed 2020" in out
    assert "protocol of the paper: unpaired" in out and "Drawn" not in out
    assert f"FID of {N} and {N} pictures is biased upwards" in err


def test_drawn_pictures_are_not_held_against_the_papers(command, tmp_path, capsys):
    report = command("mgd", "--keep", str(tmp_path / "made"), "--samples", "5")
    out = capsys.readouterr().out
    assert report["toyfashion"]["version"] == 1 and report["paper, unpaired"] == {}
    assert "Drawn pictures" in out and "Table 3" not in out and f"the first 5 of {N} persons" in out
    assert len(list((tmp_path / "made" / "paired").iterdir())) == 5


@pytest.mark.parametrize("lacking", ["FID, KID", "CLIP-S"])
def test_what_cannot_be_measured_is_told_and_the_rest_is_measured(
    lacking, command, tmp_path, monkeypatch, capsys
):
    name = {"FID, KID": "INCEPTION", "CLIP-S": "CLIP_L14"}[lacking]
    monkeypatch.setattr(realism, name, tmp_path / "nothing")
    report = command("mgd", "--keep", str(tmp_path / "made"))
    assert list(report["not measured"]) == [lacking]
    told = re.search(f"^{lacking}: not measured: {tmp_path}/nothing/.* is missing: .*get .*https://", capsys.readouterr().out, re.M)  # fmt: skip
    assert told
    rows = report["results"]["unpaired"]
    assert ("FID" in rows[OUTPUTS[0]]) == (lacking == "CLIP-S")
    assert ("CLIP-S" in rows[OUTPUTS[0]]) == (lacking != "CLIP-S")


@pytest.mark.parametrize(
    ("name", "told"), [("vitonhd", "pt_inception"), ("mgd", "pt_inception.*; .*clip-vit")]
)
def test_nothing_is_made_if_nothing_can_be_measured(name, told, command, tmp_path, monkeypatch):
    monkeypatch.setattr(realism, "INCEPTION", tmp_path / "nothing")
    monkeypatch.setattr(realism, "CLIP_L14", tmp_path / "nothing")
    with pytest.raises(UserError, match=f"nothing can be measured: .*{told}"):
        command(name, "--keep", str(tmp_path / "made"))
    assert not (tmp_path / "made").exists()


# Made once


def test_a_run_that_was_stopped_goes_on_and_ends_with_the_same_pictures(command, kept, tmp_path, monkeypatch):
    draw, calls = photos.draw, []

    def stopped(*args):
        calls.append(args)
        if len(calls) == 4:  # batches of 4 of 6 pictures: in the second batch of the second setting
            raise KeyboardInterrupt
        return draw(*args)

    monkeypatch.setattr(photos, "draw", stopped)
    with pytest.raises(KeyboardInterrupt):
        command("vitonhd", "--keep", str(tmp_path / "made"))
    assert len([name for name in contents(tmp_path / "made") if name.endswith("png")]) == N + 4
    lost = files(tmp_path / "made" / "unpaired")[1]  # one of a batch: it is made again as a whole
    lost.rename(lost.with_name(f".{lost.name}.tmp"))  # as a kill leaves it
    calls[:] = [None] * 10
    command("vitonhd", "--keep", str(tmp_path / "made"))
    assert len(calls) == 14  # the two batches of unpaired, and shuffled's two
    assert contents(tmp_path / "made") == contents(kept)


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        ("--seed 1", "seed 0, not 1"),
        ("--steps 3 --sampler plms", "sampler ddim, not plms; steps 2, not 3"),
        ("--batch-size 3", "batch size 4, not 3"),
        ("--samples 5", "pairs sha256 "),
    ],
)
def test_a_folder_of_other_pictures_is_not_added_to(flags, told, command, kept):
    before = contents(kept)
    with pytest.raises(UserError, match=f"{kept} was begun with {told}.* name another --keep"):
        command("vitonhd", "--keep", str(kept), *flags.split())
    assert contents(kept) == before


def test_a_folder_of_anything_else_is_left_alone(command, tmp_path):
    folder = tmp_path / "mine"
    folder.mkdir()
    (folder / "diary.txt").write_text("private")
    with pytest.raises(UserError, match=f"{folder} is not empty, and holds no pictures of this command"):
        command("vitonhd", "--keep", str(folder))
    with pytest.raises(UserError, match="diary.txt is a file"):
        command("vitonhd", "--keep", str(folder / "diary.txt"))
    assert contents(folder) == {"diary.txt": b"private"}


def test_two_runs_do_not_share_a_folder(tmp_path):
    (tmp_path / "made").mkdir()
    code = (
        "import fcntl, sys, time; file = open(sys.argv[1], 'w'); fcntl.lockf(file, fcntl.LOCK_EX);"
        "print('held', flush=True); time.sleep(60)"
    )
    other = subprocess.Popen([sys.executable, "-c", code, tmp_path / "made/lock"], stdout=subprocess.PIPE)
    try:
        other.stdout.readline()
        with pytest.raises(UserError, match="made is in use by another process: name another --keep"):
            folders.begin(tmp_path / "made", {"seed": 0})
    finally:
        other.kill()
        other.wait()


@pytest.mark.slow
def test_a_killed_run_goes_on(world, weights, networks, tmp_path):
    """With the shipped weights, since another process reads them: killed at several moments, then left to end."""
    code = (
        f"import sys; sys.path.insert(0, {str(Path(folders.__file__).parent.parent)!r})\n"
        "from pathlib import Path; from eval import generation, realism; from eval.metrics import fid\n"
        f"realism.INCEPTION = Path({str(networks)!r}); fid.SIDE = 79\n"
        f"generation.main('--data vitonhd={world}/vitonhd --steps 8 --batch-size 2 --device cpu --quiet --keep'.split() + [sys.argv[1]])\n"
    )

    def start(folder: str) -> subprocess.Popen:
        return subprocess.Popen([sys.executable, "-c", code, tmp_path / folder], stdout=subprocess.DEVNULL)

    assert start("whole").wait() == 0
    for made in (1, 5, 11, 16):
        process = start("killed")
        while process.poll() is None and len(list((tmp_path / "killed").rglob("*.png"))) < made:
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
    assert start("killed").wait() == 0
    assert contents(tmp_path / "killed") == contents(tmp_path / "whole")


# Pictures that are there


def test_pictures_of_any_model_are_measured_by_the_same_rules(command, data, kept, tmp_path):
    """Ours under other names and in another format get our figures; smaller ones are enlarged before their repaint."""
    ours = command("vitonhd", "--keep", str(kept))
    of = {}
    for pairing in PAIRINGS:
        (tmp_path / "theirs" / pairing).mkdir(parents=True)
        for person, cloth in VITONHD(data, "test", paired=pairing == "paired").pairs:
            Image.open(kept / pairing / f"{person}_{cloth}.png").save(
                tmp_path / "theirs" / pairing / f"{person}.bmp"
            )
    theirs = command("vitonhd", "--generated", str(tmp_path / "theirs"))
    assert theirs["made with"].startswith("unknown") and "qformer sha256" not in theirs
    assert theirs["verdict"] == "unknown: of the model that made it nothing is known"
    for pairing in PAIRINGS:
        of = theirs["results"][pairing]
        assert list(of) == [
            *OUTPUTS,
            SHARED[0],
            SHARED[3],
        ]  # controls that a model would have to make are not there
        assert all(of[row] == ours["results"][pairing][row] for row in of)
    again = command("vitonhd", "--generated", str(kept))
    assert again["made with"]["sampler"] == "ddim" and len(again["made with"]["model sha256"]) == 64

    shutil.rmtree(tmp_path / "theirs" / "paired")
    for file in (tmp_path / "theirs" / "unpaired").iterdir():
        Image.open(file).resize((48, 64)).save(file)
    small = command("vitonhd", "--generated", str(tmp_path / "theirs"))["results"]
    assert list(small) == ["unpaired"]
    a, b = (x["unpaired"][OUTPUTS[1]]["FID"] for x in (small, theirs["results"]))
    assert a != b


@pytest.mark.parametrize(
    ("spoil", "told"),
    [
        (lambda f: files(f)[2].unlink(), "holds 5 pictures for 6 pairs; missing: {2}$"),
        (lambda f: shutil.copy(files(f)[0], f / "more.png"), "holds 7 pictures for 6 pairs; of no pair: more.png$"),
        (lambda f: files(f)[1].rename(f / "x.png"), "holds 6 pictures for 6 pairs; missing: {1}; of no pair: x.png$"),
        (lambda f: files(f)[3].write_bytes(b"no picture"), "{3}.png: not an image"),
        (lambda f: files(f)[3].write_bytes(files(f)[3].read_bytes()[:-200]), "{3}.png: cannot be read as an image"),
        (lambda f: Image.new("RGB", (64, 64)).save(files(f)[4]), r"{4}.png: \(64, 64\) pixels do not fit a person of \(96, 128\)$"),
        (lambda f: [x.unlink() for x in files(f)], "no folder of pictures"),
        (lambda f: f.rename(f.with_name("elsewhere")), "has neither paired/ nor unpaired/ in it"),
    ],
)  # fmt: skip
def test_spoiled_folders_are_named(spoil, told, command, kept, tmp_path):
    folder = tmp_path / "spoiled"
    shutil.copytree(kept / "unpaired", folder / "unpaired")
    names = [file.stem for file in files(folder / "unpaired")]
    spoil(folder / "unpaired")
    with pytest.raises(
        UserError, match=told if "{" not in told else re.sub(r"\{(\d)\}", lambda m: names[int(m[1])], told)
    ):
        command("vitonhd", "--generated", str(folder))


# What is asked for


def test_shuffled_garments_are_asked_for_by_neither_setting(data):
    asked = read_asked("vitonhd", data, "test", None)
    orders = [others(asked, seed).of for seed in range(10)]
    assert orders[3] == others(asked, 3).of and len(set(map(tuple, orders))) > 3
    for seed in range(10):
        pairs = others(asked, seed).pairs
        assert sorted(cloth for _, cloth in pairs) == sorted(cloth for _, cloth in asked["unpaired"].pairs)
        for pair, paired, unpaired in zip(pairs, asked["paired"].pairs, asked["unpaired"].pairs, strict=True):
            assert pair[0] == paired[0] == unpaired[0] and pair[1] not in (paired[1], unpaired[1])
    with pytest.raises(UserError, match="2 persons have too few garments"):
        others({k: Asked(x.data, [0, 1]) for k, x in asked.items()}, 0)


PHOTOS = ["image/{}.jpg", "agnostic-mask/{}_mask.png", "image-densepose/{}.jpg", "cloth/{}.jpg"]


@pytest.mark.parametrize(
    ("name", "file"), [*(("vitonhd", file) for file in PHOTOS), *(("mgd", file) for file in [*PHOTOS, "cloth-sketch/{}.png"])]
)  # fmt: skip
def test_incomplete_data_give_no_figure(name, file, data, command, tmp_path, capsys):
    folder = shutil.copytree(data, tmp_path / "data")
    gone = folder / "test" / file.format(VITONHD(data, "test").pairs[2][0])
    gone.unlink()
    with pytest.raises(
        UserError, match=f"lacks files of 1 of {N} paired pairs, test/.*{gone.name} for one: it must"
    ):
        command(name, "--keep", str(tmp_path / "made"), at=folder)
    assert not (tmp_path / "made").exists() and capsys.readouterr().out == ""


def test_a_broken_person_is_told_before_anything_is_made(data, command, tmp_path, monkeypatch):
    folder = shutil.copytree(data, tmp_path / "data")
    names = [person for person, _ in VITONHD(data, "test").pairs]
    for name in names[1:3]:
        (folder / "test" / "image" / f"{name}.jpg").write_bytes(b"no picture")
    monkeypatch.setattr(photos, "make", lambda *_: pytest.fail("work was begun"))
    with pytest.raises(UserError, match=f"{names[1]}.jpg: not an image.*; .*{names[2]}.jpg: not an image"):
        command("vitonhd", "--keep", str(tmp_path / "made"), at=folder)


def test_a_single_pair_and_dress_code_are_refused(data, command, tmp_path, monkeypatch):
    monkeypatch.setattr(photos, "PAIRS", 1)
    folder = shutil.copytree(data, tmp_path / "data")
    pairs = folder / "test_pairs.txt"
    pairs.write_text(pairs.read_text().splitlines()[0] + "\n")
    with pytest.raises(UserError, match="FID needs 2 pictures or more on each side, there are 1 and 1"):
        command("vitonhd", "--keep", str(tmp_path / "made"), at=folder)
    (folder / "upper_body").mkdir()
    with pytest.raises(UserError, match="is Dress Code: only MGD's annotations of VITON-HD are evaluated"):
        command("mgd", "--keep", str(tmp_path / "made"), at=folder)


@pytest.mark.parametrize(
    ("flags", "told"),
    {
        "": "vitonhd wants --keep FOLDER",
        "--keep a --generated b": "vitonhd wants --keep FOLDER",
        "--keep a --grid ddim:2": "--grid, --guidances and --sheet are of toy",
        "--keep a --guidances 1,2": "--grid, --guidances and --sheet are of toy",
        "--keep a --sheet a.png": "--grid, --guidances and --sheet are of toy",
        "--keep a --seed -1": "--seed must be 0 or more",
        "--keep a --samples 1": "--samples must be at least 2",
        "--keep a --steps 1": "ddim 1, guidance 2.5: wanted plms or ddim or dpm",
    }.items(),
)
def test_flags_that_cannot_be_are_refused_before_any_work(flags, told, command, monkeypatch):
    monkeypatch.setattr(photos, "read_asked", lambda *_: pytest.fail("work was begun"))
    with pytest.raises(UserError, match=told):
        command("vitonhd", *flags.split())


# What is drawn


def test_persons_of_other_shapes_come_back_in_their_own(weights):
    model = load_unifashion("tiny", weights)
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (100, 100, 3), dtype=np.uint8))
    item = {"person": picture, "pose": picture, "cloth": picture, "mask": Image.new("L", picture.size, 255)}
    given = read([item], 0, 0, "cloth", model.cfg)
    assert given.canvas.size == (100, 133) and given.canvas.box == (0, 16, 100, 116) and given.text is None
    (back,) = through_vae(model, [picture])
    assert back.shape == (100, 100, 3)


# Helpers


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    return world_of(tmp_path_factory.mktemp("photos") / "toy", train=2, val=2, test=N, workers=1)


@pytest.fixture(scope="module")
def data(world) -> Path:
    return world / "vitonhd"


@pytest.fixture(scope="module")
def weights(tmp_path_factory) -> Iterator[Path]:
    patch = pytest.MonkeyPatch()
    yield write_weights(tmp_path_factory.mktemp("weights"), patch)
    patch.undo()


@pytest.fixture(scope="module")
def networks(tmp_path_factory) -> Path:
    """Inception's and a small CLIP's published files, with random numbers."""
    folder = tmp_path_factory.mktemp("networks")
    torch.save({k: v.float() for k, v in test_inception.weights().items()}, folder / FILES[0])
    tensors = test_clip.pair()[0].float().state_dict()
    tensors["text_projection.weight"] *= -1  # by chance the cosines were below 0, and CLIP-S 0
    save_file(tensors, folder / "model.safetensors")
    write_merges(folder / "merges.txt")
    return folder


@pytest.fixture(autouse=True)
def small(networks, monkeypatch) -> None:
    """Pictures for Inception of 79 pixels, 14 times faster than 299."""
    monkeypatch.setattr(measures, "SIDE", 79)
    monkeypatch.setattr(
        photos, "PAIRS", N
    )  # of VITON-HD's own 2,032, where a copy lies outside its ToyFashion
    monkeypatch.setattr(realism, "INCEPTION", networks)
    monkeypatch.setattr(realism, "CLIP_L14", networks)
    monkeypatch.setattr(realism, "load_clip", partial(load_clip, cfg=test_clip.SMALL))


@pytest.fixture
def clip(networks):
    return load_clip(networks, test_clip.SMALL)


@pytest.fixture
def command(data, weights, tmp_path) -> Callable[..., dict]:
    """Run the command with 2 steps -> its JSON."""

    def run(name: str, *flags: str, at: Path = data) -> dict:
        out = tmp_path / "report.json"
        few = f"--data {name}={at} --weights {weights} --sampler ddim --steps 2 --batch-size 4 --device cpu --quiet"
        generation.main([*few.split(), "--out", str(out), *flags])
        return json.loads(out.read_text())

    return run


@pytest.fixture
def kept(command, tmp_path_factory, data) -> Path:
    """Pictures of VITON-HD, made once for all tests that ask for them; no test changes them."""
    folder = tmp_path_factory.getbasetemp() / "kept"
    if not folder.exists():
        command("vitonhd", "--keep", str(folder))
    return folder


def features_of(pictures: list[Image.Image]) -> np.ndarray:
    network = blank(InceptionV3)
    load_inception(network, realism.INCEPTION)
    return measures.features(pictures, network, quiet=True)


def files(folder: Path) -> list[Path]:
    return sorted(folder.iterdir())


def contents(folder: Path) -> dict[str, bytes]:
    """Every file but the lock and what kills leave."""
    every = [path for path in folder.rglob("*") if path.is_file()]
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(every)
        if path.name != "lock" and path.name[0] != "."
    }


def test_a_list_of_pairs_that_was_cut_gets_no_figure(data, tmp_path, monkeypatch):
    """Of the original's layout outside a ToyFashion: another number of pairs than VITON-HD's 2,032 is another test."""
    monkeypatch.setattr(photos, "PAIRS", 2032)
    shutil.copytree(data, tmp_path / "vitonhd")
    with pytest.raises(UserError, match=f"has {N} paired pairs in test, not 2032"):
        read_asked("vitonhd", tmp_path / "vitonhd", "test", None)
