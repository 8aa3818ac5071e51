"""`python -m weights.verify` and `weights.convert`, on stand-ins in the containers of the originals."""

import os
import shutil
import subprocess
import sys
import warnings
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from tests.published import published
from tests.standin import FILES as STANDINS
from tests.standin import standin, write
from unifashion import lora
from unifashion.config import FULL
from unifashion.model import UniFashion
from unifashion.qformer import QFormerConfig
from unifashion.runs import learned_state, part_of
from unifashion.vae import VAEConfig
from unifashion.vit import ViTConfig
from weights import convert, inception, verify
from weights.containers import read_checkpoint
from weights.files import FILES, USES, source_of
from weights.load import sha256
from weights.rename import Layout, blank

ROOT = Path(verify.__file__).parent.parent
DIMS = {1408: 24, 4224: 72, 6144: 40, 30523: 37, 512: 20, 257: 5, 768: 12, 3072: 28, 256: 8}
SMALL = replace(
    FULL,
    vit=ViTConfig(image_size=(28, 28), dim=24, heads=4, mlp_dim=40),
    qformer=QFormerConfig(37, 20, 16, dim=12, heads=4, mlp_dim=28, vision_dim=24, embed_dim=8),
)
EVA, BLIP2 = "eva_vit_g.pth", "blip2_pretrained.pth"
INCEPTION = "pt_inception-2015-12-05-6726825d.pth"


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """BLIP-2, of a small model that stands for the one of full size, and its vocabulary; the sizes told are theirs."""
    monkeypatch.setattr(verify, "FULL", SMALL)
    for name, manifest in ((EVA, "lavis_eva_vit_g"), (BLIP2, "lavis_blip2_pretrained")):
        write(standin(manifest, DIMS), tmp_path / name, STANDINS[manifest][1])
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *(f"w{i}" for i in range(31))]
    (tmp_path / "bert_vocab.txt").write_text("\n".join(words) + "\n")
    for name in (EVA, BLIP2, "bert_vocab.txt"):
        path = tmp_path / name
        monkeypatch.setitem(FILES, name, FILES[name]._replace(size=path.stat().st_size, sha256=sha256(path)))
    return tmp_path


def told(folder: Path, capsys: pytest.CaptureFixture) -> tuple[int, dict[str, str]]:
    """-> exit code, and of each file and each use what is said."""
    code = verify.main([str(folder)])
    lines = capsys.readouterr().out.splitlines()
    names = [*FILES, *USES]
    return code, {
        n: line.removeprefix(n).strip() for n in names for line in lines if line.startswith(f"{n} ")
    }


def test_what_is_there_is_good_and_opens_the_commands_it_is_enough_for(folder: Path, capsys):
    code, lines = told(folder, capsys)
    assert code == 0 and lines.keys() == {*FILES, *USES}
    for name in (EVA, BLIP2, "bert_vocab.txt"):
        assert lines[name].startswith("good ") and "sha256 as published" in lines[name]
    assert "fits (float16)" in lines[EVA] and "fits (float32, int64)" in lines[BLIP2]
    assert lines["VITONHD.ckpt"].startswith("missing ") and "rlawjdghek" in lines["VITONHD.ckpt"]
    assert lines["infer.py index, search --model blip2"] == "ready"
    assert lines["infer.py tryon --model stableviton"] == "needs VITONHD.ckpt (10.2 GB)"


def test_search_alone_is_a_small_download(tmp_path: Path, capsys):
    """What README says: 2.8 GB."""
    code, lines = told(tmp_path, capsys)
    assert code == 0
    assert lines["infer.py index, search --model blip2"].endswith("bert_vocab.txt (2.8 GB)")


def test_no_number_is_loaded(folder: Path, capsys, monkeypatch):
    seen: list[bool] = []
    real = verify.load_layout
    monkeypatch.setattr(
        verify,
        "load_layout",
        lambda m, file, *x: (seen.extend(t.is_meta for t in file.values()), real(m, file, *x)),
    )
    assert told(folder, capsys)[0] == 0
    assert len(seen) > 500 and all(seen)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda path: path.write_bytes(path.read_bytes()[:-100]), "damaged, cut short, or not a checkpoint"),
        (lambda path: path.write_bytes(flipped(path.read_bytes())), "its sha256 is not the published one"),
        (lambda path: path.write_text("<!doctype html>"), "is a web page, not a checkpoint"),
        (lambda path: path.write_bytes(b""), "is empty: the download did not begin"),
    ],
    ids=["cut short", "one bit", "a page", "empty"],
)
def test_a_file_that_is_not_the_published_one_is_told(folder: Path, capsys, spoil, message: str):
    spoil(folder / BLIP2)
    code, lines = told(folder, capsys)
    assert code == 2 and lines[BLIP2].startswith("NOT GOOD ") and message in lines[BLIP2]
    assert lines["infer.py index, search --model blip2"] == f"takes {BLIP2}, which is not good"
    assert lines[EVA].startswith("good ")


def flipped(content: bytes) -> bytes:
    """One bit of a number is another."""
    middle = len(content) // 2
    return content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]


def test_a_bit_is_told_where_no_sha256_is_published(folder: Path, capsys, monkeypatch):
    monkeypatch.setitem(FILES, BLIP2, FILES[BLIP2]._replace(sha256=""))
    assert told(folder, capsys)[0] == 0
    (folder / BLIP2).write_bytes(flipped((folder / BLIP2).read_bytes()))
    code, lines = told(folder, capsys)
    assert code == 2 and "is not what its checksum says" in lines[BLIP2]


def test_another_edition_is_good_and_told(folder: Path, capsys, monkeypatch):
    monkeypatch.setitem(FILES, BLIP2, FILES[BLIP2]._replace(size=10))
    code, lines = told(folder, capsys)
    assert code == 0 and lines[BLIP2].endswith("another edition than the published one of 10 bytes")


def test_what_may_not_be_read_is_told(folder: Path, capsys, monkeypatch):
    def forbidden(path):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(verify, "sha256", forbidden)
    code, lines = told(folder, capsys)
    assert code == 2 and "Permission denied" in lines[EVA]


def test_a_name_or_a_shape_that_has_no_place_is_named(folder: Path, capsys, monkeypatch):
    monkeypatch.setitem(FILES, BLIP2, FILES[BLIP2]._replace(exact=False, sha256=""))
    tensors = standin("lavis_blip2_pretrained", DIMS)
    for changed, message in (
        ({**tensors, "a.stray": torch.ones(1)}, "a.stray: no row of the table names it"),
        ({k: x for k, x in tensors.items() if k != "itm_head.bias"}, "lacks itm_head.bias"),
        (
            {**tensors, "itm_head.bias": torch.ones(3)},
            "itm_head.bias: shape (3,) in the file, (2,) in the model",
        ),
        (
            {**tensors, "itm_head.bias": torch.ones(2, dtype=torch.int8)},
            "itm_head.bias: torch.int8 in the file",
        ),
    ):
        write(changed, folder / BLIP2, "model")
        code, lines = told(folder, capsys)
        assert code == 2 and message in lines[BLIP2]


# Of each file its manifests (for folders of several: by folder), and tensors of each of its parts
WHOLE = {
    EVA: ("lavis_eva_vit_g", ["blocks.38.attn.q_bias"]),
    BLIP2: ("lavis_blip2_pretrained", ["ln_vision.bias", "Qformer.bert.encoder.layer.6.crossattention.self.key.weight"]),
    "blip2-itm-vit-g/": ("hf_blip2_itm_vit_g", ["vision_model.post_layernorm.weight", "itm_head.bias"]),
    "tuned_clip_best.pt": ("lavis_blip2_stage1_model_in_memory", ["visual_encoder.pos_embed", "itm_head.bias"]),
    "llava-1.5-7b-hf/": ("llava_1_5_7b_hf", ["multi_modal_projector.linear_2.weight", "language_model.lm_head.weight"]),
    "llava-v1.5-7b/": ("llava_v1_5_7b_liuhaotian", ["model.mm_projector.0.weight", "lm_head.weight"]),
    "clip-vit-large-patch14-336/": ("hf_clip_vit_l14_336", ["vision_model.pre_layrnorm.weight"]),
    "vicuna-7b-v1.5/": ("vicuna_7b_v1_5", ["model.norm.weight"]),
    "VITONHD.ckpt": ("stableviton_VITONHD", ["proj_out.bias", "learnable_vector", "control_model.time_embed.0.weight"]),
    "VITONHD_PBE_pose.ckpt": ("stableviton_VITONHD_PBE_pose", ["first_stage_model.encoder.conv_in.weight"]),
    "VITONHD_VAE_finetuning.ckpt": ("stableviton_VITONHD_VAE_finetuning", ["post_quant_conv.bias"]),
    "paint-by-example/": ("pbe_model_ckpt_compvis", ["proj_out.weight", "first_stage_model.encoder.conv_in.weight"]),
    "clip-vit-large-patch14/": ("hf_clip_vit_l14", ["logit_scale", "text_model.final_layer_norm.weight"]),
}  # fmt: skip


@pytest.mark.parametrize("name", WHOLE)
def test_what_was_published_is_good_at_full_size_and_no_part_of_it_may_be_missing(
    tmp_path: Path, monkeypatch, name: str
):
    manifest, parts = WHOLE[name]
    file = published(manifest)
    monkeypatch.setattr(verify, "opened", lambda path: file)
    monkeypatch.setattr(verify, "pieces", lambda path: set())  # test_a_tokenizer_of_another_size, below
    monkeypatch.setattr(verify, "read_checkpoint", lambda path: {"c.warp_zero_convs.0.weight": torch.ones(1)})
    if name.endswith("/"):
        (tmp_path / name).mkdir()
        for empty in ("pytorch_model.bin", "model.safetensors", "model.ckpt", "merges.txt"):
            (tmp_path / name / empty).touch()
    else:
        (tmp_path / name).touch()
    good, line = verify.look(tmp_path, name)
    assert good and "fits (" in line
    for part in parts:
        tensor = file.pop(part)
        good, line = verify.look(tmp_path, name)
        assert good is False and f"lacks {part}" in line
        file[part] = tensor
    for part, other in ((parts[0], torch.empty(7)), ("a.stray", torch.empty(1))):
        file[part], before = other, file.get(part)
        good, line = verify.look(tmp_path, name)
        assert good is False and part in line
        file[part] = before


def test_every_file_is_tested_here():
    elsewhere = {"bert_vocab.txt", INCEPTION, "unifashion/"}
    assert WHOLE.keys() | elsewhere == verify.CHECKS.keys() == FILES.keys()


def test_diffusers_paint_by_example_is_good_at_full_size_and_no_part_of_it_may_be_missing(
    tmp_path: Path, monkeypatch
):
    parts = {"unet": "conv_norm_out.bias", "vae": "post_quant_conv.bias", "image_encoder": "uncond_vector"}
    files = {part: published(f"pbe_diffusers_{part}") for part in parts}
    monkeypatch.setattr(verify, "opened", lambda path: files[path.name])
    monkeypatch.setattr(verify.exemplar, "read_folder", lambda path: files[path.name])
    for part in parts:
        (tmp_path / "paint-by-example" / part).mkdir(parents=True)
    assert verify.look(tmp_path, "paint-by-example/")[0]
    for part, lost in parts.items():
        tensor = files[part].pop(lost)
        good, line = verify.look(tmp_path, "paint-by-example/")
        assert good is False and f"lacks {lost}" in line
        files[part][lost] = tensor


@pytest.mark.parametrize("name", ["vicuna-7b-v1.5/", "llava-v1.5-7b/", "llava-1.5-7b-hf/"])
def test_a_tokenizer_of_another_size_is_told(tmp_path: Path, monkeypatch, name: str):
    file = published(WHOLE[name][0])
    monkeypatch.setattr(verify, "opened", lambda path: file)
    (tmp_path / name).mkdir()
    good, line = verify.look(tmp_path, name)
    assert good is False and "tokenizer.model is missing" in line
    shutil.copy(ROOT / "weights/tiny/llama_tokenizer.model", tmp_path / name / "tokenizer.model")
    good, line = verify.look(tmp_path, name)
    assert good is False and "tokenizer.model has 1024 pieces, not 32000" in line


@pytest.fixture
def trained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, torch.Tensor]:
    """What is in unifashion/model.safetensors."""
    (tmp_path / "unifashion").mkdir()
    (tmp_path / "unifashion/model.safetensors").touch()
    model = blank(lambda: UniFashion(FULL, True, True))
    with torch.device("meta"):
        lora.inject(model.llama, FULL.lora)
    public = ("vit", "vae", "llama")
    file = learned_state(model, ["lora", *(name for name, _ in model.named_children() if name not in public)])
    file["null_context"] = model.null_context
    monkeypatch.setattr(verify, "opened", lambda path: file)
    return file


def test_a_trained_model_is_good_at_full_size_and_no_part_of_it_may_be_missing(tmp_path: Path, trained):
    good, line = verify.look(tmp_path, "unifashion/")
    assert good and "fits (float32)" in line
    matrix = next(name for name in trained if name.endswith("lora_a"))
    for name in ("unet.conv_out.bias", "text_adapter.weight", "null_context", matrix):
        for other in (None, torch.empty(7)):
            tensor = trained.pop(name)
            trained |= {name: other} if other is not None else {}
            good, line = verify.look(tmp_path, "unifashion/")
            assert good is False and name.removeprefix("llama.") in line
            trained[name] = tensor
    for part in ("text_adapter", "style_adapter", "lora"):
        apart = {name: trained.pop(name) for name in list(trained) if part_of(name) == part}
        good, line = verify.look(tmp_path, "unifashion/")
        assert apart and good is False and f"holds no {part}: its training is not finished" in line
        trained |= apart


def test_words_of_another_number_are_told(folder: Path, capsys, monkeypatch):
    monkeypatch.setitem(FILES, "bert_vocab.txt", FILES["bert_vocab.txt"]._replace(exact=False, sha256=""))
    path = folder / "bert_vocab.txt"
    path.write_text(path.read_text() + "more\n")
    code, lines = told(folder, capsys)
    assert code == 2 and "bert_vocab.txt has 38 pieces, not 37" in lines["bert_vocab.txt"]


def test_diffusers_folders_are_good_only_together(folder: Path, capsys, monkeypatch):
    published = replace(verify.PUBLISHED["paint-by-example"], vae=VAEConfig(channels=32))
    monkeypatch.setitem(verify.PUBLISHED, "paint-by-example", published)
    monkeypatch.setattr(
        verify, "UNETS", {"conv_in.weight": Layout({"*": None})}
    )  # at full size: as if it were read
    monkeypatch.setattr(verify, "UNet", lambda cfg: torch.nn.Identity())
    monkeypatch.setattr(verify.exemplar, "load_image_encoder", lambda *parts: None)
    write(
        {"conv_in.weight": torch.ones(1)}, folder / "paint-by-example/unet/diffusion_pytorch_model.bin", "zip"
    )
    code, lines = told(folder, capsys)
    assert code == 2 and "paint-by-example/vae is missing: get " in lines["paint-by-example/"]
    name, dims = "pbe_diffusers_vae", {128: 32, 256: 64, 512: 128}
    write(standin(name, dims), folder / STANDINS[name][0], STANDINS[name][1])
    code, lines = told(folder, capsys)
    assert code == 2 and "paint-by-example/image_encoder is missing: get " in lines["paint-by-example/"]
    (folder / "paint-by-example/image_encoder").mkdir()
    code, lines = told(folder, capsys)
    assert code == 0 and lines["paint-by-example/"].startswith("good ")
    (folder / "paint-by-example/vae/diffusion_pytorch_model.bin").write_bytes(b"")
    code, lines = told(folder, capsys)
    assert code == 2 and "is empty: the download did not begin" in lines["paint-by-example/"]


@pytest.mark.parametrize(
    "name", ["clip-vit-large-patch14/", "llava-1.5-7b-hf/", "unifashion/", "vicuna-7b-v1.5/"]
)
def test_an_empty_folder_is_not_good(folder: Path, capsys, name: str):
    (folder / name).mkdir()
    code, lines = told(folder, capsys)
    assert code == 2 and lines[name].startswith("NOT GOOD ")


def test_inception_is_good_under_either_name_and_converted(folder: Path, capsys, monkeypatch):
    counted = [k for k in published("torch_fidelity_inception_2015_12_05") if not k.startswith("fc.")]
    for name in ("pt_inception_2015_12_05", "torch_fidelity_inception_2015_12_05"):
        file, container = STANDINS[name]
        write(standin_of_ones(name), folder / file, container)
        code, lines = told(folder, capsys)
        assert code == 2 and "not as many numbers" in lines[INCEPTION]
        monkeypatch.setattr(inception, "NUMBERS", len(counted))  # one each
        code, lines = told(folder, capsys)
        assert code == 0 and lines[INCEPTION].startswith("good ")
        convert.convert(folder / file)
        (folder / file).unlink()
        code, lines = told(folder, capsys)
        assert code == 0 and lines["FID and KID of eval.generation"] == "ready"
        (folder / file).with_suffix(".safetensors").unlink()
        monkeypatch.setattr(inception, "NUMBERS", 21_820_000)


def standin_of_ones(name: str) -> dict[str, torch.Tensor]:
    return {k: torch.ones(1, dtype=x.dtype) for k, x in published(name).items()}


def test_the_first_that_is_there_decides_as_when_it_is_loaded():
    blip2 = USES["infer.py index, search --model blip2"]
    there = {EVA: False, BLIP2: True, "blip2-itm-vit-g/": True, "bert_vocab.txt": True}
    assert verify.state(blip2, there) == f"takes {EVA}, which is not good"
    del there[EVA]
    assert verify.state(blip2, there) == "ready"
    assert verify.state(blip2, {"tuned_clip_best.pt": True, "bert_vocab.txt": True}) == "ready"
    train = USES["training of all of UniFashion"]
    there |= {"vicuna-7b-v1.5/": True, "VITONHD.ckpt": True, "VITONHD_VAE_finetuning.ckpt": False}
    assert verify.state(train, there) == "takes VITONHD_VAE_finetuning.ckpt, which is not good"


@pytest.mark.parametrize(
    ("name", "message"), [(EVA, "a folder, not a file"), ("unifashion/", "a file, not a folder")]
)
def test_a_folder_in_the_place_of_a_file_is_told(tmp_path: Path, capsys, name: str, message: str):
    if name.endswith("/"):
        (tmp_path / name.rstrip("/")).write_bytes(b"x")
    else:
        (tmp_path / name).mkdir()
    code, lines = told(tmp_path, capsys)
    assert code == 2 and lines[name] == f"NOT GOOD     {message}"


def test_what_stableviton_starts_from_is_told_under_its_name(tmp_path: Path, capsys, monkeypatch):
    monkeypatch.setattr(verify, "whole", lambda name, path: set())
    weight = "model.diffusion_model.warp_zero_convs.0.weight"
    for fill, good in ((torch.zeros, False), (torch.ones, True)):
        torch.save({"state_dict": {weight: fill(2)}}, tmp_path / "VITONHD.ckpt")
        code, lines = told(tmp_path, capsys)
        assert (code == 0) is good and (
            "its garment encoder is untrained" in lines["VITONHD.ckpt"]
        ) is not good


def test_a_folder_that_may_not_be_read_is_one_line(folder: Path, capsys, monkeypatch):
    (folder / "vicuna-7b-v1.5").mkdir()
    allowed = verify.main([str(folder)])
    told = capsys.readouterr().out
    assert allowed == 2 and "vicuna-7b-v1.5 holds no weights" in told
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path) == folder)
    verify.main([str(folder)])
    assert "vicuna-7b-v1.5: Permission denied" in capsys.readouterr().out
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    assert verify.main([str(folder)]) == 2
    assert capsys.readouterr().err == f"weights.verify: {folder}: Permission denied\n"


def test_a_folder_that_is_none_is_one_line(tmp_path: Path, capsys):
    assert verify.main([str(tmp_path / "none")]) == 2
    assert capsys.readouterr().err == f"weights.verify: {tmp_path}/none: there is no such folder of weights\n"


def test_every_file_of_a_use_is_known_with_its_source():
    for sets in USES.values():
        for name in {name for files in sets for name in files}:
            assert source_of(name.rstrip("/")).startswith("get ")
    assert source_of("unifashion/model.safetensors").startswith("get it by train_phase1.py")


def test_the_readme_lists_the_same_files():
    rows = [
        [cell.strip().strip("`") for cell in line.strip("|").split("|")]
        for line in (Path(verify.__file__).parent / "README.md").read_text(encoding="utf-8").splitlines()
        if line.startswith("| `")
    ]
    listed = {row[0]: row[1:] for row in rows if len(row) == 5}
    assert [*listed] == [*FILES]
    for name, known in FILES.items():
        source, size, licence, digest = listed[name]
        assert (source, licence) == (known.source, known.licence)
        assert digest == (known.sha256 or ("not published" if known.size else "-"))
        about = known.size / (1e9 if known.size >= 1e9 else 1e6)
        unit = "GB" if known.size >= 1e9 else "MB"
        assert size in (f"{known.size:,}", f"{about:.2f} {unit}", f"{about:.0f} {unit}", "-")


# convert


def test_a_converted_file_has_the_same_numbers_and_is_good(folder: Path, capsys):
    before = {name: read_checkpoint(folder / name) for name in (EVA, BLIP2)}
    digests = {name: sha256(folder / name) for name in before}
    assert convert.main([str(folder / name) for name in before]) == 0
    assert capsys.readouterr().out.splitlines() == [
        str(folder / name.replace(".pth", ".safetensors")) for name in before
    ]
    for name, tensors in before.items():
        path = (folder / name).with_suffix(".safetensors")
        read = read_checkpoint(path)
        assert read.keys() == tensors.keys()
        assert all(torch.equal(read[k], x) and read[k].dtype == x.dtype for k, x in tensors.items())
        with safe_open(path, "pt") as file:
            metadata = file.metadata()
        assert metadata.pop("numbers") == convert.sha256_of(tensors)
        assert metadata == {"format": "pt", "source": name, "sha256": digests[name]}
        (folder / name).unlink()
    code, lines = told(folder, capsys)
    assert code == 0 and lines["infer.py index, search --model blip2"] == "ready"
    assert lines[BLIP2].endswith("as it was converted from the published file")


def test_what_was_damaged_after_it_was_converted_is_told(folder: Path, capsys):
    path = convert.convert(folder / BLIP2)
    (folder / BLIP2).unlink()
    path.write_bytes(flipped(path.read_bytes()))
    code, lines = told(folder, capsys)
    assert code == 2 and "damaged: its numbers are not those that were converted" in lines[BLIP2]


def test_a_shard_that_was_damaged_after_it_was_converted_is_told(tmp_path: Path, capsys, monkeypatch):
    monkeypatch.setitem(verify.CHECKS, "vicuna-7b-v1.5/", lambda path: set())
    folder = tmp_path / "vicuna-7b-v1.5"
    folder.mkdir()
    for i in (1, 2):
        torch.save({f"x{i}": torch.arange(1000.0)}, folder / f"pytorch_model-0000{i}-of-00002.bin")
        path = convert.convert(folder / f"pytorch_model-0000{i}-of-00002.bin")
        path.with_suffix(".bin").unlink()
    code, lines = told(tmp_path, capsys)
    assert code == 0 and "as it was converted" in lines["vicuna-7b-v1.5/"]
    path.write_bytes(flipped(path.read_bytes()))
    code, lines = told(tmp_path, capsys)
    assert code == 2 and f"{path}: damaged: its numbers are not" in lines["vicuna-7b-v1.5/"]


@pytest.mark.parametrize(
    "odd",
    [
        lambda: torch.ones(3, dtype=torch.complex128),
        lambda: torch.quantize_per_tensor(torch.ones(3), 0.1, 0, torch.quint8),
        lambda: torch.eye(3).to_sparse(),
        lambda: torch.empty(3, device="meta"),
    ],
    ids=["complex", "quantised", "sparse", "meta"],
)
def test_a_tensor_that_safetensors_does_not_hold_is_one_line(tmp_path: Path, capsys, odd):
    with warnings.catch_warnings(action="ignore"):
        torch.save({"a": torch.ones(2), "b": odd()}, tmp_path / "odd.pth")
    assert convert.main([str(tmp_path / "odd.pth")]) == 2
    assert "odd.pth: b is a tensor of a kind that safetensors does not hold\n" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["odd.pth"]


def test_a_tensor_that_is_not_contiguous_is_converted(tmp_path: Path):
    w = torch.arange(6.0).view(2, 3)
    torch.save({"a": w.t(), "b": torch.ones(2, 5)[:, ::2]}, tmp_path / "strided.pth")
    read = read_checkpoint(convert.convert(tmp_path / "strided.pth"))
    assert torch.equal(read["a"], w.t()) and torch.equal(read["b"], torch.ones(2, 3))


def test_what_was_converted_is_not_converted_again(folder: Path, capsys):
    (folder / "none.pth").unlink(missing_ok=True)
    first = convert.convert(folder / EVA)
    before = first.stat().st_mtime_ns
    (folder / f".{BLIP2.replace('.pth', '.safetensors')}.part").mkdir()  # of one that was killed
    assert convert.main([str(folder / name) for name in (EVA, "none.pth", BLIP2)]) == 2
    out = capsys.readouterr()
    assert out.out.splitlines() == [str(first), str(folder / "blip2_pretrained.safetensors")]
    assert "none.pth: no such file" in out.err
    assert first.stat().st_mtime_ns == before and not [*folder.glob(".*")]


def test_a_tensor_and_its_transpose_in_one_place_are_converted(tmp_path: Path):
    w = torch.arange(6.0).view(2, 3)
    torch.save({"a": w, "b": w.t()}, tmp_path / "tied.pth")
    read = read_checkpoint(convert.convert(tmp_path / "tied.pth"))
    assert torch.equal(read["a"], w) and torch.equal(read["b"], w.t())


@pytest.mark.parametrize("known", [True, False])
def test_a_damaged_file_is_not_made_a_clean_one(folder: Path, capsys, monkeypatch, known: bool):
    if not known:
        monkeypatch.setitem(FILES, BLIP2, FILES[BLIP2]._replace(sha256=""))
    (folder / BLIP2).write_bytes(flipped((folder / BLIP2).read_bytes()))
    assert convert.main([str(folder / BLIP2)]) == 2
    message = "its sha256 is not the published one" if known else "is not what its checksum says"
    assert message in capsys.readouterr().err and not [*folder.glob("*.safetensors")]


@pytest.mark.parametrize(
    "name", ["stableviton_VITONHD_VAE_finetuning", "openai_clip_vit_b16", "open_clip_vit_b16"]
)
def test_every_container_is_converted(name: str, tmp_path: Path, capsys):
    file, container = STANDINS[name]
    dims = {768: 12, 3072: 48, 2304: 36, 512: 20, 2048: 26, 1536: 60, 49408: 51, 128: 8, 256: 16, 64: 4}
    write(standin(name, dims), tmp_path / file, container)
    before = read_checkpoint(tmp_path / file)
    assert convert.main([str(tmp_path / file)]) == 0
    read = read_checkpoint((tmp_path / file).with_suffix(".safetensors"))
    assert read.keys() == before.keys() and all(torch.equal(read[k], x) for k, x in before.items())


def test_tied_tensors_are_written_twice(folder: Path):
    """BERT's language head is its word embeddings: one place in memory, which safetensors does not take."""
    one, other = "Qformer.cls.predictions.decoder.weight", "Qformer.bert.embeddings.word_embeddings.weight"
    before = read_checkpoint(folder / BLIP2)
    assert before[one].data_ptr() == before[other].data_ptr()
    read = read_checkpoint(convert.convert(folder / BLIP2))
    assert torch.equal(read[one], read[other]) and read[one].data_ptr() != read[other].data_ptr()


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("none.pth", "none.pth: no such file"),
        ("page.pth", "page.pth: is a web page, not a checkpoint"),
        ("cut.pth", "cut.pth: damaged, cut short, or not a checkpoint"),
        ("done.safetensors", "done.safetensors: is safetensors already"),
        ("twice.pth", "twice.safetensors is there already, and not made of twice.pth: move it"),
    ],
)
def test_what_cannot_be_converted_is_one_line_and_leaves_nothing(
    folder: Path, capsys, name: str, message: str
):
    (folder / "page.pth").write_text("<html>")
    (folder / "cut.pth").write_bytes((folder / BLIP2).read_bytes()[:-3000])
    (folder / "done.safetensors").write_bytes(b"x")
    shutil.copy(folder / BLIP2, folder / "twice.pth")
    (folder / "twice.safetensors").write_bytes(b"x")
    before = sorted(folder.rglob("*"))
    assert convert.main([str(folder / name)]) == 2
    out = capsys.readouterr()
    assert out.err.startswith("weights.convert: ") and message in out.err and out.err.count("\n") == 1
    assert out.out == "" and sorted(folder.rglob("*")) == before


def test_a_full_disk_is_one_line_and_leaves_nothing(folder: Path):
    before = sorted(folder.rglob("*"))
    code = f"""
import resource, sys
from weights import convert
resource.setrlimit(resource.RLIMIT_FSIZE, (9000, 9000))
import signal; signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
sys.exit(convert.main([{str(folder / BLIP2)!r}]))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 2 and "cannot be written: " in done.stderr and done.stderr.count("\n") == 1
    assert sorted(folder.rglob("*")) == before


def test_a_converted_file_may_be_read_by_whom_the_original_might(folder: Path):
    (folder / BLIP2).chmod(0o640)
    assert convert.convert(folder / BLIP2).stat().st_mode & 0o777 == 0o640
