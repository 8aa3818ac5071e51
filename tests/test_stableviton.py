"""StableVITON and Paint-by-Example against the original's noise (golden stableviton); their whole files; `infer.py tryon --model`."""

import argparse
import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

import infer
from tests import goldens
from tests.faults import plant
from tests.parity import assert_parity, randomise
from tests.published import published
from tests.rooms import ellipse, photo, pixels
from tests.test_garment import golden_table
from tests.test_load import original
from tests.test_unet import golden_table as unet_table
from unifashion import UserError, blocks, denoiser, flags, preprocess
from unifashion.blocks import UNetConfig, zero
from unifashion.clip import ImageConfig
from unifashion.diffusion import SAMPLERS
from unifashion.exemplar import ExemplarConfig
from unifashion.stableviton import PUBLISHED, StableVITON, StableVITONConfig
from unifashion.tryon import draw, encode, pasted, read_inputs
from unifashion.vae import VAEConfig
from weights import exemplar as loading
from weights.exemplar import FILES, PAINT_BY_EXAMPLE, STABLEVITON, load_published, unfused
from weights.garment import with_control_convs
from weights.rename import blank, load_into

SMALL = StableVITONConfig(
    image=ImageConfig(image_size=28, patch_size=7, dim=32, depth=2, heads=4, mlp_dim=56),
    exemplar=ExemplarConfig(dim=32, depth=2, context_dim=40),
    vae=VAEConfig(channels=32, channel_mult=(1, 1, 2), res_blocks=1),
    unet=UNetConfig(channels=32, channel_mult=(1, 2, 2), attention_levels=(0, 1), heads=4, context_dim=40),
    picture=(64, 48),
)
SMALLS = {
    "stableviton": SMALL,
    "paint-by-example": replace(SMALL, dresses=False, unet=replace(SMALL.unet, in_channels=9), guidance=5.0),
}
pytestmark = pytest.mark.usefixtures("one_thread")
TABLES = {"stableviton": STABLEVITON, "paint-by-example": PAINT_BY_EXAMPLE}
POSITION_IDS = "cond_stage_model.transformer.vision_model.embeddings.position_ids"

# The networks and their files


@pytest.mark.parametrize("given", ["eps", "eps_uncond"])
def test_the_predicted_noise_equals_the_original(given: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(blocks, "timestep_embedding", golden_table)
    golden, model = golden_model()
    scene, hint, t = (golden.inputs[name] for name in ("first_stage_cond", "hint", "t"))
    context = model.exemplar.proj(golden.inputs["c"])
    assert_parity(context, golden.outputs["context"])
    if given == "eps_uncond":
        context = model.null_context.expand_as(context)
    assert_parity(model.predict_noise(golden.inputs["z_t"], t, scene, context, hint), golden.outputs[given])


def test_guidance_is_away_from_the_learnable_vector_and_the_garment_stays(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(blocks, "timestep_embedding", golden_table)
    golden, model = golden_model()
    asked: list[Tensor] = []

    def once(eps: Callable[[Tensor, int], Tensor], x: Tensor, steps: int) -> Iterator[Tensor]:
        asked.append(eps(x, golden.inputs["t"][0].item()))
        yield x

    monkeypatch.setitem(SAMPLERS, "plms", once)
    given = [
        x[:1] for x in (golden.inputs["first_stage_cond"], golden.outputs["context"], golden.inputs["hint"])
    ]
    list(model.sample(golden.inputs["z_t"][:1], *given, 2, "plms", 5.0))
    eps, uncond = golden.outputs["eps"][:1], golden.outputs["eps_uncond"][:1]
    assert_parity(asked[0], uncond + 5 * (eps - uncond))


CODE_FAULTS = {
    "scene before latent": ("predict_noise", "torch.cat([x, scene], dim=1)", "torch.cat([scene, x], dim=1)"),
    "the garment encoder without context": ("predict_noise", "self.garment.context(context) if hint is not None else []\n        out", "self.garment.context(0 * context) if hint is not None else []\n        out"),
    "the U-Net without context": ("predict_noise", "self.unet.context(context)\n", "self.unet.context(0 * context)\n"),
    "zeros for the null vector": ("sample", "self.null_context.expand_as(context)", "0 * context"),
    "the hint is nulled, too": ("sample", "torch.cat([hint, hint])", "torch.cat([hint, 0 * hint])"),
    "the scene is nulled, too": ("sample", "torch.cat([scene, scene])", "torch.cat([scene, 0 * scene])"),
}  # fmt: skip


@pytest.mark.parametrize("fault", CODE_FAULTS)
def test_parity_notices(fault: str, monkeypatch: pytest.MonkeyPatch):
    target, old, new = CODE_FAULTS[fault]
    monkeypatch.setattr(blocks, "timestep_embedding", golden_table)
    plant(monkeypatch, denoiser, f"Denoiser.{target}", old, new)
    with pytest.raises(AssertionError, match="max difference"):
        if target == "sample":
            test_guidance_is_away_from_the_learnable_vector_and_the_garment_stays(monkeypatch)
        else:
            test_the_predicted_noise_equals_the_original("eps", monkeypatch)


def test_a_paint_by_example_made_of_three_goldens_equals_them_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(blocks, "timestep_embedding", unet_table)
    encoder, unet, vae = (goldens.load(name) for name in ("pbe_image_encoder", "unet9", "vae"))
    unet_cfg = UNetConfig(
        9, channels=64, channel_mult=(1, 1, 1), attention_levels=(0, 1), res_blocks=1, heads=4, context_dim=24
    )
    cfg = StableVITONConfig(
        dresses=False,
        image=ImageConfig(image_size=28, patch_size=7, dim=40, depth=3, heads=5, mlp_dim=72),
        exemplar=ExemplarConfig(dim=40, depth=2, context_dim=24),
        vae=VAEConfig(channels=32, channel_mult=(1, 2, 2), res_blocks=1),
        unet=unet_cfg,
        picture=(48, 32),
    )
    # all its levels have one width: no res block of the encoder has a shortcut
    table = {row: ours for row, ours in PAINT_BY_EXAMPLE.items() if "input_blocks.#.0.skip" not in row}
    file = encoder.weights | {f"model.diffusion_model.{name}": x for name, x in unet.weights.items()}
    file |= {f"first_stage_model.{name}": x for name, x in vae.weights.items()}
    torch.save({"state_dict": file}, tmp_path / "model.ckpt")
    monkeypatch.setitem(PUBLISHED, "paint-by-example", cfg)
    monkeypatch.setitem(FILES, "paint-by-example", ("model.ckpt", table))
    model = load_published("paint-by-example", tmp_path, dtype=torch.float64)

    assert_parity(model.context(model.see(encoder.inputs["pixel_values"])), encoder.outputs["context"])
    z, agnostic, keep = unet.inputs["x"].split([4, 4, 1], dim=1)
    scene, context = model.scene(agnostic, keep), unet.inputs["context"]
    assert_parity(model.predict_noise(z, unet.inputs["t"], scene, context), unet.outputs["eps"])
    assert_parity(model.vae.decode(vae.inputs["z"] * 0.18215), vae.outputs["decoded"])


@pytest.mark.parametrize(
    ("file", "name", "tensors", "parameters"),
    [  # StableVITON's file less the 20 numbers of lastzc
        ("stableviton_VITONHD", "stableviton", 1957, 1_838_680_959 - 20),
        ("stableviton_VITONHD_PBE_pose", "stableviton", 1958, 1_838_680_959 - 20),
        ("pbe_model_ckpt_compvis", "paint-by-example", 1403, 1_310_140_139),
    ],
)
def test_the_full_model_is_the_published_file(file: str, name: str, tensors: int, parameters: int):
    checkpoint, model = published(file), full(name)
    assert len(checkpoint) == tensors
    fill(model, checkpoint, name)
    ours = sum(p.numel() for p in model.garment.control_convs.parameters()) if model.cfg.dresses else 0
    assert sum(p.numel() for p in model.parameters()) - ours == parameters
    # Editions differ in these numbers alone: transformers once kept them with the weights.
    checkpoint.pop(POSITION_IDS, None)
    fill(full(name), checkpoint, name)
    fill(full(name), {**checkpoint, POSITION_IDS: torch.arange(257)[None]}, name)
    checkpoint.popitem()
    with pytest.raises(UserError):
        fill(full(name), checkpoint, name)


def test_neither_file_is_taken_for_the_other():
    for file, name in (
        ("stableviton_VITONHD", "paint-by-example"),
        ("pbe_model_ckpt_compvis", "stableviton"),
    ):
        with pytest.raises(UserError):
            fill(full(name), published(file), name)


def test_full_is_the_published_network_also_in_what_shows_in_no_shape():
    for cfg in PUBLISHED.values():
        assert (cfg.prediction, cfg.vae.scale, cfg.picture, cfg.unet.heads) == ("eps", 0.18215, (512, 384), 8)
        assert (cfg.image.heads, cfg.image.image_size, cfg.exemplar.depth) == (16, 224, 5)
    assert [cfg.guidance for cfg in PUBLISHED.values()] == [1.0, 5.0]
    assert [(c.dresses, c.unet.in_channels) for c in PUBLISHED.values()] == [(True, 13), (False, 9)]


def test_parts_that_do_not_fit_are_refused():
    for name, wrong in {
        "in_channels": {"dresses": False},
        "exemplar.dim": {"exemplar": ExemplarConfig(33, 2, 40)},
        "exemplar.context_dim": {"exemplar": ExemplarConfig(32, 2, 41)},
        "prediction": {"prediction": "x"},
        "does not divide": {"picture": (65, 48)},
    }.items():
        with pytest.raises(ValueError, match=name):
            replace(SMALL, **wrong)


@pytest.mark.parametrize("name", SMALLS)
def test_the_file_gives_the_model_it_was_made_from(name: str, room: Path, sources: dict[str, StableVITON]):
    model = load_published(name, room / "files")
    theirs = sources[name].state_dict()
    assert model.state_dict().keys() == theirs.keys()
    assert all(torch.equal(x, theirs[key]) for key, x in model.state_dict().items())
    assert not model.training and not any(p.requires_grad for p in model.parameters())
    half = load_published(name, room / "files", "cpu", torch.bfloat16)
    assert {x.dtype for x in half.state_dict().values()} == {half.dtype} == {torch.bfloat16}


def test_nothing_of_the_file_is_copied_where_no_cast_is_asked_for(
    room: Path, monkeypatch: pytest.MonkeyPatch
):
    read: list[dict[str, Tensor]] = []
    real = loading.read_checkpoint
    monkeypatch.setattr(loading, "read_checkpoint", lambda path: read.append(real(path)) or dict(read[0]))
    model = load_published("paint-by-example", room / "files")
    mapped = {x.untyped_storage().data_ptr() for x in read[0].values()}
    assert all(p.untyped_storage().data_ptr() in mapped for p in model.parameters())


def test_a_file_that_is_missing_damaged_or_another_is_one_line(room: Path):
    files = room / "other"
    (files / "paint-by-example").mkdir(parents=True)
    for name, (file, _) in FILES.items():
        with pytest.raises(
            UserError, match=rf"^{files / file} is missing: get .* of https://huggingface.co/\S+"
        ):
            load_published(name, files)
        whole = (room / "files" / file).read_bytes()
        (files / file).write_bytes(whole[: len(whole) // 2])
        with pytest.raises(UserError, match=rf"^{files / file}: damaged, [^\n]*$"):
            load_published(name, files)
        (files / file).write_bytes((room / "files" / FILES[other(name)][0]).read_bytes())
        with pytest.raises(UserError, match=rf"^{files / file} is not {name}: [^\n]*$"):
            load_published(name, files)


@pytest.mark.parametrize("name", SMALLS)
@pytest.mark.parametrize(
    "key", ["learnable_vector", "proj_out.bias", "cond_stage_model.mapper.resblocks.1.attn.c_qkv.bias"]
)
def test_a_file_that_lacks_a_tensor_or_has_one_too_many_is_refused(
    name: str, key: str, sources: dict[str, StableVITON]
):
    file = as_published(sources[name])
    with pytest.raises(UserError):
        fill(StableVITON(SMALLS[name]), {k: v for k, v in file.items() if k != key}, name)
    with pytest.raises(UserError):
        fill(StableVITON(SMALLS[name]), file | {f"{key}_2": torch.ones(3)}, name)


def test_the_file_that_stableviton_starts_from_is_not_taken_for_stableviton(
    room: Path, sources: dict[str, StableVITON]
):
    start = StableVITON(SMALL)
    start.load_state_dict(sources["stableviton"].state_dict())
    start.garment.zero_convs.apply(zero)
    (room / "start").mkdir()
    write(start, room / "start" / "VITONHD.ckpt")
    with pytest.raises(UserError, match="VITONHD.ckpt is not stableviton: its garment encoder is untrained"):
        load_published("stableviton", room / "start")


# What the networks read


def test_paint_by_examples_network_reads_no_pose(sources: dict[str, StableVITON]):
    agnostic, keep, pose = (torch.full((2, c, 8, 8), float(i)) for i, c in ((1, 4), (2, 1), (3, 4)))
    scene = sources["paint-by-example"].scene(agnostic, keep, pose)
    assert scene[0, :, 0, 0].tolist() == [1] * 4 + [2]
    scene = sources["stableviton"].scene(agnostic, keep, pose)
    assert scene[0, :, 0, 0].tolist() == [1] * 4 + [2] + [3] * 4


@pytest.mark.parametrize("posed", [True, False], ids=["pose", "no pose"])
def test_stableviton_reads_the_cloth_twice_and_the_pose_or_none(
    room: Path, sources: dict[str, StableVITON], posed: bool
):
    model, person = sources["stableviton"], photo(room / "p.png", (90, 120), 1)
    args = parse("stableviton", *(["--pose", "pose.png"] if posed else []))
    notes: list[str] = []
    inputs = read_inputs(args, person, ellipse(room / "m.png", (90, 120)), SMALL, None, notes)
    scene, context, hint = encode(model, inputs)
    pixels = preprocess.unet_image(preprocess.read_image(room / "cloth.png"), SMALL.picture)
    assert torch.equal(hint, model.vae.encode(pixels[None]))
    square = preprocess.squashed_pixels(pixels, 28)
    assert torch.equal(context, model.exemplar(model.image.pooled(square[None])))
    assert (context.shape, scene.shape) == ((1, 1, 40), (1, 9, 16, 12))
    pose = preprocess.unet_image(preprocess.read_image(room / "pose.png"), SMALL.picture)
    assert torch.equal(scene[:, 5:], model.vae.encode(pose[None]) * posed)
    assert len(notes) == (not posed)


def test_paint_by_example_reads_the_cloth_squashed_and_no_hint(room: Path, sources: dict[str, StableVITON]):
    model, person = sources["paint-by-example"], photo(room / "p.png", (90, 120), 1)
    cloth = photo(room / "wide.png", (90, 40), 5)
    args, notes = parse("paint-by-example", "--cloth", "wide.png"), []
    inputs = read_inputs(args, person, ellipse(room / "m.png", (90, 120)), model.cfg, None, notes)
    scene, context, hint = encode(model, inputs)
    square = preprocess.squashed_image(cloth, 28)
    assert torch.equal(context, model.exemplar(model.image.pooled(square[None])))
    assert scene.shape == (1, 5, 16, 12) and hint is None and notes == []


# The command


@pytest.mark.parametrize("name", SMALLS)
def test_the_command_draws_the_picture_that_the_models_file_holds(
    name: str, room: Path, sources: dict[str, StableVITON], capsys: pytest.CaptureFixture
):
    mask = ellipse(room / "m.png", (90, 120))
    posed = ["--pose", "pose.png"] if name == "stableviton" else []
    assert tryon(name, "--mask", "m.png", "--json", *posed) == 0
    used = json.loads(capsys.readouterr().out)
    assert (used["model"], used["preset"], used["guidance"]) == (name, "full", SMALLS[name].guidance)
    assert used["notes"] == [] and used["weights"] == "files"

    person, drawn = preprocess.read_image("person.png"), pixels(room / "out.png")
    repaint = np.array(mask) == 255
    assert np.array_equal(drawn[~repaint], np.array(person)[~repaint])
    args = parse(name, "--mask", "m.png", *posed)
    args.guidance = SMALLS[name].guidance
    inputs = read_inputs(args, person, mask, SMALLS[name], None, [])
    (picture,) = draw(sources[name], inputs, args)
    canvas, box = preprocess.pad_to_ratio(person, 3 / 4)
    theirs = pasted(picture, person, mask, box, canvas.size)
    assert np.array_equal(drawn, np.array(theirs)) and (drawn[repaint] != np.array(person)[repaint]).any()


@pytest.mark.parametrize(
    ("name", "flags"),
    [
        ("stableviton", ["--cloth pose.png", "--pose pose.png", "--guidance 3", "--dtype bf16"]),
        ("paint-by-example", ["--cloth pose.png", "--guidance 1", "--seed 1"]),
    ],
)
def test_every_flag_reaches_the_network(name: str, flags: list[str], room: Path):
    assert tryon(name, "--quiet", out="plain.png") == 0
    for flag in flags:
        assert tryon(name, "--quiet", *flag.split()) == 0
        assert not np.array_equal(pixels(room / "plain.png"), pixels(room / "out.png")), flag


def test_a_missing_pose_is_told_and_no_preset_is(room: Path, capsys: pytest.CaptureFixture):
    assert tryon("stableviton") == 0
    told = capsys.readouterr().err
    assert "note: no --pose: in training StableVITON always had one" in told and "preset" not in told


BAD = {
    "a sketch": (["--sketch", "cloth.png"], "reads photos of garments only: --cloth, no --sketch and no --text"),
    "a text": (["--cloth", "cloth.png", "--text", "red"], "reads photos of garments only"),
    "an empty text": (["--cloth", "cloth.png", "--text", ""], "reads photos of garments only"),
    "the tiny preset": (["--cloth", "cloth.png", "--preset", "tiny"], "has no preset tiny: it was published in one size"),
    "no garment": ([], "one of the arguments --cloth --sketch is required"),
    "a cloth that is not there": (["--cloth", "gone.png"], "gone.png: no such file"),
    "no weights": (["--cloth", "cloth.png", "--weights", "empty"], "is missing: get "),
    "no folder of weights": (["--cloth", "cloth.png", "--weights", "gone"], "gone: there is no such folder of weights"),
    "endless guidance": (["--cloth", "cloth.png", "--guidance", "1e38"], "--guidance is too high"),
}  # fmt: skip


@pytest.mark.parametrize("name", SMALLS)
@pytest.mark.parametrize("wrong", BAD)
def test_bad_input_is_one_line_that_says_what(
    name: str, wrong: str, room: Path, capsys: pytest.CaptureFixture
):
    given, message = BAD[wrong]
    (room / "empty").mkdir()
    refused(room, capsys, name, given, message)


def test_paint_by_example_refuses_a_pose(room: Path, capsys: pytest.CaptureFixture):
    given = ["--cloth", "cloth.png", "--pose", "pose.png"]
    refused(room, capsys, "paint-by-example", given, "--model paint-by-example reads no --pose")


def test_what_can_be_asked_for_is_published_and_has_a_file():
    assert PUBLISHED.keys() == FILES.keys() == SMALLS.keys()
    for name in ("unifashion", *PUBLISHED):
        flags.check_tryon(
            infer.parse(["tryon", "--person", "p", "--cloth", "c", "--out", "o", "--model", name])
        )


# helpers


@pytest.fixture(scope="module")
def sources() -> dict[str, StableVITON]:
    """The models that the files hold."""
    models = {
        name: randomise(StableVITON(cfg), 0).float().requires_grad_(False) for name, cfg in SMALLS.items()
    }
    models["stableviton"].garment.control_convs.apply(zero)  # in no public file
    return models


@pytest.fixture(scope="module")
def written(sources: dict[str, StableVITON], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("files")
    (folder / "paint-by-example").mkdir()
    for name, model in sources.items():
        write(model, folder / FILES[name][0])
    return folder


@pytest.fixture
def room(tmp_path: Path, written: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder to stand in, with pictures and `files`; the published models are small until the test ends."""
    for name, cfg in SMALLS.items():
        monkeypatch.setitem(PUBLISHED, name, cfg)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "files").symlink_to(written)
    photo(tmp_path / "person.png", (90, 120), 1)
    photo(tmp_path / "cloth.png", (60, 80), 2)
    photo(tmp_path / "pose.png", (90, 120), 3)
    return tmp_path


def as_published(model: StableVITON) -> dict[str, Tensor]:
    """Our tensors under the names of the original, and what the table leaves out."""
    name = "stableviton" if model.cfg.dresses else "paint-by-example"
    tensors = original(model.state_dict(), TABLES[name])
    tensors = {key: x for key, x in tensors.items() if not key.startswith("control_convs.")}
    for key in [key.removesuffix("[q]") for key in tensors if key.endswith("[q]")]:
        tensors[key] = torch.cat([tensors.pop(f"{key}[{part}]") for part in "qkv"])
    for key in [key for key in tensors if key.startswith("model.diffusion_model.output_blocks.2.2.conv")]:
        tensors[key.replace("2.2.conv", "2.1.conv")] = tensors.pop(key)  # the coarsest level has no attention
    return tensors | {"betas": torch.ones(1000), POSITION_IDS: torch.arange(model.cfg.image.tokens)[None]}


def write(model: StableVITON, path: Path) -> None:
    moments = {"state": [torch.zeros(7)]}  # of the optimizer, which both published files have too
    torch.save({"state_dict": as_published(model), "optimizer_states": [moments], "epoch": 3}, path)


def full(name: str) -> StableVITON:
    return blank(lambda: StableVITON(PUBLISHED[name]))


def fill(model: StableVITON, checkpoint: dict[str, Tensor], name: str) -> None:
    """As `load_published` does it."""
    checkpoint = unfused(checkpoint)
    if model.cfg.dresses:
        checkpoint = with_control_convs(checkpoint, model.garment)
    load_into(model, checkpoint, TABLES[name])


def golden_model() -> tuple[goldens.Golden, StableVITON]:
    """The golden's networks, its projection and null vector by the table of the whole file; the rest of it random."""
    golden = goldens.load("stableviton")
    cfg = StableVITONConfig(
        image=ImageConfig(image_size=28, patch_size=14, dim=1024, depth=1, heads=16, mlp_dim=8),
        exemplar=ExemplarConfig(dim=1024, depth=1, context_dim=24),
        vae=VAEConfig(channels=32, channel_mult=(1, 2), res_blocks=1),
        unet=UNetConfig(13, channels=32, channel_mult=(1, 2, 2, 2), heads=4, context_dim=24),
        picture=(48, 32),
    )
    model = StableVITON(cfg).double()
    rest = {key: x for key, x in as_published(model).items() if key not in golden.weights}
    assert all(key.startswith(("first_stage_model.", "cond_stage_model.", "betas")) for key in rest)
    fill(model, rest | golden.weights, "stableviton")
    return golden, model.requires_grad_(False)


def parse(name: str, *given: str) -> argparse.Namespace:
    cloth = [] if "--cloth" in given or "--sketch" in given else ["--cloth", "cloth.png"]
    argv = ["--model", name, "--person", "person.png", "--out", "out.png", "--steps", "2", "--quiet"]
    return infer.parse(["tryon", *argv, *cloth, *given])


def tryon(name: str, *given: str, out: str = "out.png") -> int:
    """Run the command in the room with 2 steps."""
    cloth = [] if "--cloth" in given else ["--cloth", "cloth.png"]
    argv = ["--model", name, "--person", "person.png", "--out", out, "--steps", "2", "--weights", "files"]
    return infer.main(["tryon", *argv, "--device", "cpu", *cloth, *given])


def refused(room: Path, capsys: pytest.CaptureFixture, name: str, given: list[str], message: str) -> None:
    before = sorted(room.iterdir())
    argv = ["--model", name, "--person", "person.png", "--out", "out.png", "--steps", "2", "--quiet"]
    weights = [] if "--weights" in given else ["--weights", "files"]
    assert infer.main(["tryon", *argv, *weights, "--device", "cpu", *given]) == 2
    told = capsys.readouterr()
    assert told.out == "" and told.err.startswith("infer.py: ") and told.err.count("\n") == 1
    assert message in told.err
    assert sorted(room.iterdir()) == before


def other(name: str) -> str:
    return next(n for n in FILES if n != name)
