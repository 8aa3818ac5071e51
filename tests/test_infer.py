"""`infer.py tryon` against its promises: the pixels outside the mask, training's own inputs, seeds, what is told."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw, ImageOps

import infer
import unifashion.tryon
from tests.parity import randomise
from tests.rooms import ROOT, SMALL, command, ellipse, furnish, lines, photo, pixels, tryon, write_weights
from unifashion import objectives
from unifashion.config import PRESETS, TINY
from unifashion.diffusion import SAMPLERS
from unifashion.model import UniFashion
from unifashion.preprocess import CLIP_MEAN, CLIP_STD, read_image
from unifashion.samples import CONDITIONS, Scenes
from unifashion.tryon import draw, encode, person_tensors, read_inputs
from weights import load

# What is promised about the picture


@pytest.mark.parametrize("size", [(96, 128), (30, 40), (200, 90), (31, 170), (401, 399)], ids=str)
def test_only_what_the_mask_shows_white_is_repainted_at_the_persons_own_size(
    room: Path, size: tuple[int, int]
):
    person, mask = photo(room / "p.png", size, 1), ellipse(room / "m.png", size)
    assert tryon(room, "--person", "p.png", "--mask", "m.png") == 0
    drawn, repaint = pixels(room / "out.png"), np.array(mask) == 255
    assert drawn.shape == (size[1], size[0], 3)
    assert np.array_equal(drawn[~repaint], np.array(person)[~repaint])
    assert (drawn[repaint] != np.array(person)[repaint]).any(-1).mean() > 0.9


def test_what_is_drawn_lies_where_it_belongs_whatever_the_aspect_ratio(
    room: Path, monkeypatch: pytest.MonkeyPatch
):
    """With a network that draws the pose that it is given, and the person for a pose, the result is the person again, blurred by the smaller size."""
    monkeypatch.setattr(unifashion.tryon, "draw", lambda model, inputs, args: list(inputs["pose"]))
    for size in [(90, 120), (240, 100), (100, 300)]:
        person = Image.linear_gradient("L").resize(size).convert("RGB")
        ImageDraw.Draw(person).rectangle((0, 0, size[0] // 2, size[1]), fill="red")
        person.save(room / "p.png")
        box = f"2,2,{size[0] - 2},{size[1] - 2}"
        assert tryon(room, "--person", "p.png", "--pose", "p.png", "--box", box) == 0
        away = np.abs(pixels(room / "out.png").astype(int) - np.array(person))
        assert away.mean() < 4, size  # flipped or shifted by a tenth, it is 10 and more


def test_a_photograph_is_turned_upright_as_its_exif_says(room: Path):
    upright = photo(room / "upright.png", (90, 120), 1)
    exif = Image.Exif()
    exif[0x0112] = 6  # turn right by a quarter to see it upright
    upright.rotate(90, expand=True).save(room / "turned.png", exif=exif)
    assert (
        tryon(room, "--person", "upright.png", out="a.png")
        == tryon(room, "--person", "turned.png", out="b.png")
        == 0
    )
    assert (room / "a.png").read_bytes() == (room / "b.png").read_bytes()


@pytest.mark.parametrize(
    "name", ["cmyk.jpg", "deep.png", "palette.png", "clear.png", "moving.gif", "grey.png"]
)
def test_every_kind_of_picture_simply_works(room: Path, name: str):
    base = photo(room / "base.png", (60, 80), 4)
    deep = Image.fromarray(np.array(base.convert("L")).astype(np.uint16) * 257)
    clear = base.copy()
    clear.putalpha(Image.linear_gradient("L").resize(base.size))
    kinds = {
        "cmyk.jpg": base.convert("CMYK"),
        "deep.png": deep,
        "palette.png": base.quantize(16),
        "clear.png": clear,
        "moving.gif": base,
        "grey.png": base.convert("L"),
    }
    more = {"save_all": True, "append_images": [Image.new("RGB", base.size)]} if name == "moving.gif" else {}
    kinds[name].save(room / name, **more)
    assert tryon(room, "--person", name, "--cloth", name, "--box", "10,10,50,70") == 0
    drawn, shown = pixels(room / "out.png"), np.array(read_image(room / name))
    kept = np.ones(drawn.shape[:2], bool)
    kept[10:70, 10:50] = False
    assert np.array_equal(drawn[kept], shown[kept])


def test_the_colour_profile_of_the_person_stays_unless_it_is_no_rgb(room: Path):
    for space, kept in ((b"RGB ", True), (b"CMYK", False)):
        profile = b"\0" * 16 + space + b"\0" * 112
        photo(room / "p.png", (60, 80), 1).save(room / "p.png", icc_profile=profile)
        assert tryon(room, "--person", "p.png") == 0
        assert (Image.open(room / "out.png").info.get("icc_profile") == profile) is kept
    glass = Image.open(room / "p.png").convert("RGBA")
    glass.putalpha(100)
    glass.save(room / "glass.png", icc_profile=b"\0" * 16 + b"RGB " + b"\0" * 112)
    assert tryon(room, "--person", "glass.png") == 0
    assert Image.open(room / "out.png").info["icc_profile"][16:20] == b"RGB "


def test_a_mask_of_another_size_is_brought_to_the_persons(room: Path):
    photo(room / "p.png", (90, 120), 1)
    mask = Image.new("L", (180, 240))
    mask.paste(255, (40, 60, 120, 200))
    mask.save(room / "m.png")
    assert tryon(room, "--person", "p.png", "--mask", "m.png", out="mask.png") == 0
    assert tryon(room, "--person", "p.png", "--box", "20,30,60,100", out="box.png") == 0
    assert np.array_equal(pixels(room / "mask.png"), pixels(room / "box.png"))


# What is promised about the way to it


@pytest.mark.parametrize("size", [(96, 128), (70, 90), (200, 120), (401, 701)], ids=str)
def test_nothing_under_the_mask_reaches_the_network(size: tuple[int, int]):
    """Not even from its edge, where resizing mixes pixels."""
    person, mask = Image.effect_noise(size, 90).convert("RGB"), Image.new("L", size)
    ImageDraw.Draw(mask).ellipse((20, 15, 55, 77), fill=255)
    other = Image.composite(Image.new("RGB", size, "red"), person, mask)
    given, same = (person_tensors(p, mask, None, TINY) for p in (person, other))
    assert given.keys() == {"agnostic", "keep"} and all(torch.equal(given[k], same[k]) for k in given)
    beside = other.copy()
    beside.putpixel((0, 0), (255, 0, 255))
    assert not torch.equal(person_tensors(beside, mask, None, TINY)["agnostic"], given["agnostic"])


@pytest.mark.parametrize("condition", CONDITIONS)
@pytest.mark.parametrize("posed", [True, False], ids=["pose", "no pose"])
def test_the_network_reads_what_it_read_in_training(
    room: Path, model: UniFashion, condition: str, posed: bool
):
    size = (96, 128)
    item = {name: photo(room / f"{name}.png", size, i) for i, name in enumerate(("person", "cloth", "pose"))}
    item |= {"mask": ellipse(room / "mask.png", size), "sketch": lines(room / "sketch.png", size)}
    item["text"] = "A red: dress (red)!"  # cleaned alike on both ways
    words = load.tokenizer("tiny", room / "weights")
    scenes = Scenes({"mgd": [item]}, model.cfg, words)
    batch = objectives.encode_tryon(model, torch.utils.data.default_collate([scenes[0]]))

    argv = ["tryon", "--person", "p", "--out", "o"]
    garment, _, text = condition.partition("+")
    argv += [f"--{garment}", str(room / f"{garment}.png")]
    argv += ["--text", item["text"]] if text else []
    argv += ["--pose", str(room / "pose.png")] if posed else []
    inputs = read_inputs(infer.parse(argv), item["person"], item["mask"], model.cfg, words, [])
    scene, context, hint = encode(model, inputs)

    wanted = model.scene(batch["agnostic"], batch["keep"], batch["pose"] if posed else None)
    torch.testing.assert_close(scene, wanted, atol=1e-5, rtol=0)
    drawn, reads = (torch.tensor([name in condition]) for name in ("sketch", "text"))
    z = objectives.z_of_condition(model, batch, drawn.long(), reads)
    torch.testing.assert_close(context, model.image_adapter(z), atol=1e-5, rtol=0)
    torch.testing.assert_close(hint, batch["hints"][:, int(drawn)], atol=1e-5, rtol=0)


@pytest.mark.parametrize(("kind", "around"), [("cloth", 1.0), ("sketch", -1.0)])
def test_a_garment_of_any_shape_is_shown_whole_on_white_and_a_sketch_on_black(
    room: Path, model: UniFashion, kind: str, around: float
):
    level = {"cloth": 128, "sketch": 64}[kind]
    wide = Image.new("RGB", (300, 100), (level, level, level))
    wide.putpixel((0, 0), (0, 0, 0))  # without any line it were no sketch
    wide.save(room / "wide.png")
    args = infer.parse(["tryon", "--person", "p", f"--{kind}", str(room / "wide.png"), "--out", "o"])
    person, mask = photo(room / "p.png", (48, 64), 1), ellipse(room / "m.png", (48, 64))
    inputs = read_inputs(args, person, mask, model.cfg, None, [])
    hint, square = inputs["hint"][0], (inputs["picture"][0] * CLIP_STD + CLIP_MEAN) * 2 - 1
    for picture, padding in ((hint, 22), (square, 8)):  # rows above and below the garment's 16, and 9
        assert torch.all((picture[:, :padding] - around).abs() < 1e-5)
        assert torch.all((picture[:, -padding:] - around).abs() < 1e-5)
        middle = picture[:, picture.shape[1] // 2 - 3 : picture.shape[1] // 2 + 3]
        assert torch.all((middle - (level / 127.5 - 1)).abs() < 0.01)


def test_what_is_padded_is_kept_and_has_no_pose(room: Path, model: UniFashion):
    person, mask = photo(room / "square.png", (48, 48), 1), ellipse(room / "m.png", (48, 48))
    clear = Image.new("RGBA", (96, 96), (255, 255, 255, 0))
    clear.paste((0, 200, 0, 255), (30, 30, 60, 60))
    clear.save(room / "pose.png")
    args = infer.parse(["tryon", "--person", "p", "--cloth", "cloth.png", "--out", "o", "--pose", "pose.png"])
    inputs = read_inputs(args, person, mask, model.cfg, None, [])
    for end in (0, -1):  # 8 rows were padded on either side, 2 of the latent's
        assert torch.all(inputs["keep"][0, :, end] == 1)
        assert torch.all(inputs["agnostic"][0, :, 7 * end] == 1)
        assert torch.all(inputs["pose"][0, :, 7 * end] == -1)
    assert inputs["keep"][0, 0, 8, 6] == 0 and inputs["pose"][0, 1, 30, 22] > 0.5
    assert torch.all(inputs["pose"][0, :, 10:14] == -1)  # transparent is black, as such pictures are

    Image.new("RGB", (203, 200), "white").save(room / "pose.png")  # of nearly the same shape
    pose = read_inputs(args, person, mask, model.cfg, None, [])["pose"][0]
    assert torch.all(pose[:, 7] == -1) and torch.all(pose[:, 8] == 1)


def test_a_sketch_drawn_dark_on_white_is_inverted_and_the_user_told(
    room: Path, capsys: pytest.CaptureFixture
):
    bright = lines(room / "bright.png", (90, 120))
    ImageOps.invert(bright).save(room / "dark.png")
    assert tryon(room, "--sketch", "bright.png", out="a.png", quiet=False) == 0
    assert "inverted" not in capsys.readouterr().err
    assert tryon(room, "--sketch", "dark.png", out="b.png", quiet=False) == 0
    assert "note: dark.png is dark on white: inverted" in capsys.readouterr().err
    assert (room / "a.png").read_bytes() == (room / "b.png").read_bytes()


@pytest.mark.parametrize("line", [20, 235])
def test_a_sketch_on_glass_shows_its_lines_whether_they_are_dark_or_bright(
    room: Path, model: UniFashion, line: int
):
    drawn = lines(room / "opaque.png", (90, 120))
    glass = Image.new("RGBA", drawn.size, (line, line, line, 0))
    glass.putalpha(drawn)
    glass.save(room / "glass.png")
    person, mask = photo(room / "p.png", (48, 64), 1), ellipse(room / "m.png", (48, 64))
    hints = []
    for name in ("opaque", "glass"):
        args = infer.parse(["tryon", "--person", "p", "--sketch", str(room / f"{name}.png"), "--out", "o"])
        hints.append(read_inputs(args, person, mask, model.cfg, None, [])["hint"])
    torch.testing.assert_close(*hints, atol=2 * 20 / 255 + 0.01, rtol=0)


FLAGS = {
    "another cloth": ("--cloth", "cloth2.png"),
    "a sketch": ("--sketch", "sketch.png"),
    "a text": ("--text", "a red dress"),
    "a pose": ("--pose", "pose.png"),
    "a seed": ("--seed", "-7"),
    "a sampler": ("--sampler", "ddim"),
    "the other sampler": ("--sampler", "dpm++"),
    "steps": ("--steps", "3"),
    "guidance": ("--guidance", "7.5"),
    "no guidance": ("--guidance", "1"),
    "a type": ("--dtype", "bf16"),
}


@pytest.mark.slow
def test_every_flag_reaches_the_network(room: Path):
    photo(room / "cloth2.png", (60, 80), 9)
    photo(room / "pose.png", (90, 120), 9)
    lines(room / "sketch.png", (60, 80))
    assert tryon(room, out="plain.png") == 0
    for name, flag in FLAGS.items():
        assert tryon(room, *flag, out="flag.png") == 0
        assert not np.array_equal(pixels(room / "plain.png"), pixels(room / "flag.png")), name


def test_every_preset_and_sampler_there_is_can_be_asked_for():
    for flag, names in (("--preset", PRESETS), ("--sampler", SAMPLERS)):
        for name in names:
            infer.parse(["tryon", "--person", "p", "--cloth", "c", "--out", "o", flag, name])


def test_words_that_tiny_never_read_are_told(room: Path, capsys: pytest.CaptureFixture):
    assert tryon(room, "--text", "a red zebra-dress", out="zebra.png", quiet=False) == 0
    assert "tiny does not know the words" in (told := capsys.readouterr().err) and "zebra-dress" in told
    known = [w for w in load.tokenizer("tiny", room / "weights").tokens if w.isalpha() and len(w) > 2][:2]
    assert tryon(room, "--text", "-".join(known), out="known.png", quiet=False) == 0
    assert "does not know" not in capsys.readouterr().err


def test_a_text_that_is_too_long_is_cut_and_the_user_told(room: Path, capsys: pytest.CaptureFixture):
    assert tryon(room, "--text", "red dress " * 5000, out="long.png", quiet=False) == 0
    assert "note: --text is too long: the model reads its first 10 tokens" in capsys.readouterr().err
    assert tryon(room, "--text", "red dress " * 5, out="cut.png", quiet=False) == 0
    assert "too long" not in capsys.readouterr().err
    assert (room / "long.png").read_bytes() == (room / "cut.png").read_bytes()
    assert tryon(room, "--text", "red dress " + "!" * 40, quiet=False) == 0  # cleaned before it is counted
    assert "too long" not in capsys.readouterr().err


def test_a_reader_that_has_left_ends_the_command_without_a_traceback():
    code = "import infer; infer.parse = lambda _: type('', (), {'run': lambda _: print('all')}); exit(infer.main([]))"
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "cwd": Path(infer.__file__).parent}
    env = os.environ | {"PYTHONUNBUFFERED": ""}  # set, it would hide that all is written at the end
    reading = subprocess.Popen([sys.executable, "-c", code], env=env, **pipes)
    reading.stdout.close()
    assert (reading.stderr.read(), reading.wait()) == (b"", 141)


# Seeds and several results


def test_the_same_seed_gives_the_same_bytes_and_another_does_not(room: Path):
    for out, seed in (("a.png", "3"), ("b.png", "3"), ("c.png", "4")):
        assert tryon(room, "--seed", seed, out=out) == 0
    assert (room / "a.png").read_bytes() == (room / "b.png").read_bytes() != (room / "c.png").read_bytes()


def test_several_results_are_numbered_files_of_different_noise(room: Path):
    before = {path.name for path in room.iterdir()}
    assert tryon(room, "--num", "3") == 0
    names = ["out.png", "out-1.png", "out-2.png"]
    assert {path.name for path in room.iterdir()} - before == set(names)
    assert len({(room / name).read_bytes() for name in names}) == 3


def test_how_many_results_are_asked_for_does_not_change_the_first(room: Path, model: UniFashion):
    args = infer.parse(
        ["tryon", "--person", "p.png", "--cloth", str(room / "cloth.png"), "--out", "o.png", "--quiet"]
    )
    args.steps, args.guidance = 4, 2.0
    person, mask = photo(room / "p.png", (48, 64), 1), ellipse(room / "m.png", (48, 64))
    inputs = read_inputs(args, person, mask, model.cfg, None, [])
    (alone,) = draw(model, inputs, args)
    args.num = 3
    first, *others = draw(model, inputs, args)
    assert (first - alone).abs().max() < 1e-4
    assert all((other - alone).abs().max() > 0.1 for other in others)


# What is told


def test_what_was_used_is_told(room: Path, capsys: pytest.CaptureFixture):
    assert tryon(room, "--seed", "5", preset=None, quiet=False) == 0
    told = capsys.readouterr()
    assert f"note: preset tiny: {room}/weights holds no trained full model" in told.err
    assert "note: no --mask and no --box: the torso box 10,32,80,104 is repainted" in told.err
    assert "2/2" in told.err  # the progress bar
    said = dict(line.split(maxsplit=1) for line in told.out.replace("seconds ", "seconds_").splitlines())
    assert {**said, "seconds_loading": "", "seconds_sampling": ""} == {
        "out": "out.png",
        "weights": f"{room}/weights",
        "mask": "torso box 10,32,80,104",
        "model": "unifashion",
        "preset": "tiny",
        "device": "cpu",
        "dtype": "fp32",
        "compile": "False",
        "seed": "5",
        "sampler": "plms",
        "steps": "2",
        "guidance": str(SMALL.guidance),
        "seconds_loading": "",
        "seconds_sampling": "",
    }
    assert all(float(said[f"seconds_{part}"]) >= 0 for part in ("loading", "sampling"))


def test_json_is_one_object_on_stdout_and_quiet_silences_the_rest(room: Path, capsys: pytest.CaptureFixture):
    ellipse(room / "m.png", (90, 120))
    assert tryon(room, "--json", "--num", "2", "--mask", "m.png", "--guidance", "3") == 0
    told = capsys.readouterr()
    assert told.err == ""
    used = json.loads(told.out)
    assert used["out"] == ["out.png", "out-1.png"] and used["mask"] == "m.png" and used["guidance"] == 3.0
    assert used["notes"] == []
    assert tryon(room) == 0
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize("own", [None, "active"])
def test_threads_are_told_to_sleep_while_they_wait_before_torch_is_loaded_unless_the_user_says_otherwise(own):
    script = "import os, runpy, sys, contextlib\nsys.argv = ['infer.py', '--help']\n"
    script += "with contextlib.suppress(SystemExit): runpy.run_path('infer.py', run_name='__main__')\n"
    script += "print(os.environ['OMP_WAIT_POLICY'], 'torch' in sys.modules)"
    env = {k: v for k, v in os.environ.items() if k != "OMP_WAIT_POLICY"} | (
        {"OMP_WAIT_POLICY": own} if own else {}
    )
    root = Path(infer.__file__).parent
    ran = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=env, cwd=root)
    assert ran.stdout.splitlines()[-1] == f"{own or 'passive'} False", ran.stderr


def test_compiled_it_draws_the_same_and_says_what_that_took(
    room: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
):
    assert tryon(room) == 0
    plain = (room / "out.png").read_bytes()
    asked = []
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(room))
    monkeypatch.setenv("HOME", str(room))
    monkeypatch.setattr(torch, "compile", lambda f, **how: (asked.append(f.__qualname__), f)[1])
    capsys.readouterr()
    assert tryon(room, "--compile", quiet=False) == 0
    told = capsys.readouterr()
    assert asked == ["Denoiser.network", "VAE.decode"] and told.err.count("note: compiled the ") == 2
    assert "compile           True" in told.out
    assert (room / "out.png").read_bytes() == plain


def test_help_answers_without_torch():
    asked = subprocess.run(
        [sys.executable, "-X", "importtime", "infer.py", "tryon", "--help"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert asked.returncode == 0 and "--person" in asked.stdout
    assert "argparse" in asked.stderr and "torch" not in asked.stderr and "numpy" not in asked.stderr


def test_the_command_itself_draws_a_picture_with_the_tiny_preset(tmp_path: Path):
    write_weights(tmp_path, TINY)
    photo(tmp_path / "p.png", (90, 120), 1)
    ran = command("--weights", tmp_path, "--person", tmp_path / "p.png", "--cloth", tmp_path / "p.png",
                  "--steps", "2", "--device", "cpu", "--preset", "tiny", "--out", tmp_path / "out.png")  # fmt: skip
    assert (ran.returncode, ran.stdout.split()[:2]) == (0, ["out", str(tmp_path / "out.png")]), ran.stderr
    assert pixels(tmp_path / "out.png").shape == (120, 90, 3)


# Ctrl-C


def test_stopping_leaves_nothing_behind(
    room: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
):
    def stop(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    def half_write(self: Image.Image, path: Path, *_: object) -> None:
        Path(path).write_bytes(b"half")
        raise KeyboardInterrupt

    before = sorted(room.iterdir())
    for owner, name, fault in ((SAMPLERS, "plms", stop), (Image.Image, "save", half_write)):
        with monkeypatch.context() as patch:
            patch.setitem(owner, name, fault) if owner is SAMPLERS else patch.setattr(owner, name, fault)
            assert tryon(room) == 130
        assert capsys.readouterr().err == "infer.py: stopped\n"
        assert sorted(room.iterdir()) == before


# helpers


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_weights(tmp_path_factory.mktemp("weights"), SMALL)


@pytest.fixture
def room(tmp_path: Path, written: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    return furnish(tmp_path, written, monkeypatch)


@pytest.fixture(scope="module")
def model() -> UniFashion:
    torch.manual_seed(0)
    return randomise(UniFashion(SMALL), 0).float().requires_grad_(False)
