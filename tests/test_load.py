"""weights/load.py against a small model of FULL's shape, written out under the names and in the files of the originals."""

import copy
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import train_phase1
from tests.parity import assert_parity, randomise
from unifashion import UserError, lora, runs, training
from unifashion.blocks import UNetConfig, zero
from unifashion.config import PRESETS, UniFashionConfig
from unifashion.llama import LlamaConfig
from unifashion.lora import LoRAConfig
from unifashion.model import UniFashion
from unifashion.qformer import QFormerConfig
from unifashion.tokenizers import build_vocab
from unifashion.vae import VAEConfig
from unifashion.vit import ViTConfig
from weights import load
from weights.garment import STABLEVITON
from weights.llama import LLAMA, LLAVA_HF, LLAVA_HF_5
from weights.load import (
    FOLDERS,
    default_preset,
    frozen_hashes,
    llm_tokenizer,
    load_public,
    load_unifashion,
    tokenizer,
)
from weights.qformer import QFORMER
from weights.rename import Table, rename
from weights.vae import VAE
from weights.vit import VIT

SMALL = UniFashionConfig(
    vit=ViTConfig(image_size=(28, 28), patch_size=14, dim=32, depth=2, heads=4, mlp_dim=48),
    qformer=QFormerConfig(
        200, 16, 12, queries=3, dim=24, depth=2, heads=4, mlp_dim=40, vision_dim=32, embed_dim=8
    ),
    vae=VAEConfig(channels=32, channel_mult=(1, 2), res_blocks=1),
    unet=UNetConfig(channels=32, channel_mult=(1, 2, 2, 2), heads=4, context_dim=40),
    llama=LlamaConfig(1024, dim=32, depth=2, heads=4, mlp_dim=48, context=64),  # of tiny's tokenizer
    lora=LoRAConfig(rank=4, alpha=12.0),
    picture=(64, 48),
)
LEARNED = ("qformer", "image_adapter", "style_adapter", "null_context", "unet", "garment")
WRITES = ("text_adapter", "lora")
VICUNA, LLAVA = "vicuna-7b-v1.5", "llava-1.5-7b-hf"


@pytest.fixture(scope="module")
def source() -> UniFashion:
    """The model that the files hold; its ViT has values that float16, which the original is stored in, has too."""
    model = randomise(UniFashion(SMALL), 0).float()
    model.vit.half().float()
    for ours in (model.garment.control_convs, model.style_adapter):  # in no public file: they start at zero
        ours.apply(zero)
    return model


@pytest.fixture(scope="module")
def writer(source: UniFashion) -> UniFashion:
    """The half that writes, of the same ViT and Q-Former, with a LoRA that is not zero."""
    model = UniFashion(SMALL, draws=False, writes=True)
    lora.inject(model.llama, SMALL.lora)
    model = randomise(model, 2).float()
    model.vit, model.qformer = source.vit, source.qformer
    return model


@pytest.fixture(scope="module")
def originals(source: UniFashion, tmp_path_factory: pytest.TempPathFactory) -> Path:
    written = tmp_path_factory.mktemp("originals")
    write_originals(source, written)
    return written


@pytest.fixture
def folder(originals: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """weights/files of a user who has downloaded everything and trained nothing."""
    monkeypatch.setitem(PRESETS, "full", SMALL)
    return Path(shutil.copytree(originals, tmp_path / "files"))


def test_the_originals_give_the_model_they_were_made_from(source: UniFashion, folder: Path):
    model = load_public("full", folder)
    assert wrong_tensors(model, source) == ["image_adapter.bias", "image_adapter.weight"]
    assert model.image_adapter.weight.std() > 0.01  # random: no public file holds it
    model.image_adapter = source.image_adapter
    for ours, theirs in zip(outputs(model.eval()), outputs(source), strict=True):
        assert_parity(ours, theirs, atol=1e-6)


@pytest.mark.parametrize("kind", [load_public, load_unifashion])
def test_every_tensor_has_the_asked_type_and_is_somewhere(source: UniFashion, folder: Path, kind):
    write_learned(source, folder, LEARNED)
    model = kind("full", folder, "cpu", torch.bfloat16)
    assert {(t.dtype, t.device.type) for t in model.state_dict().values()} == {(torch.bfloat16, "cpu")}
    adapter = {"image_adapter.bias", "image_adapter.weight"}
    assert set(wrong_tensors(model, source)) == (adapter if kind is load_public else set())


def test_public_weights_can_be_trained_and_loaded_ones_are_frozen(source: UniFashion, folder: Path):
    write_learned(source, folder, LEARNED)
    assert all(p.requires_grad for p in load_public("full", folder).parameters())
    model = load_unifashion("full", folder)
    assert not any(p.requires_grad for p in model.parameters())
    assert not model.training


def test_the_fine_tuned_vae_is_preferred_to_the_one_inside(source: UniFashion, folder: Path):
    better = randomise(UniFashion(SMALL).vae, 5).float()
    file = original(better.state_dict(), VAE) | {"loss.logvar": torch.zeros(())}
    torch.save({"state_dict": file}, folder / "VITONHD_VAE_finetuning.ckpt")
    write_learned(source, folder, LEARNED)
    for model in (load_public("full", folder), load_unifashion("full", folder)):
        assert wrong_tensors(model.vae, better) == []


@pytest.mark.parametrize("kind", [load_public, load_unifashion])
def test_either_edition_of_stableviton_will_do_and_the_one_made_to_start_from_comes_first(
    source: UniFashion, folder: Path, kind
):
    write_learned(source, folder, LEARNED)
    (folder / "VITONHD.ckpt").write_bytes(b"is not opened while the other is there")
    assert wrong_tensors(kind("full", folder).vae, source.vae) == []
    (folder / "VITONHD_PBE_pose.ckpt").replace(folder / "VITONHD.ckpt")
    assert wrong_tensors(kind("full", folder).vae, source.vae) == []


def test_what_was_learned_comes_on_top_of_the_originals(source: UniFashion, folder: Path):
    learned = randomise(UniFashion(SMALL), 7).float()
    write_learned(learned, folder, LEARNED)
    model = load_unifashion("full", folder)
    assert {n.split(".")[0] for n in wrong_tensors(model, learned)} == {"vit", "vae"}
    assert {n.split(".")[0] for n in wrong_tensors(model, source)} == set(LEARNED)


def test_a_q_former_that_was_never_trained_is_the_public_one(source: UniFashion, folder: Path):
    learned = randomise(UniFashion(SMALL), 7).float()
    write_learned(learned, folder, LEARNED[1:])
    assert wrong_tensors(load_unifashion("full", folder).qformer, source.qformer) == []


def test_inference_reads_no_original_of_a_part_that_was_learned(source: UniFashion, folder: Path):
    write_learned(source, folder, LEARNED)
    (folder / "blip2_pretrained.pth").unlink()
    assert wrong_tensors(load_unifashion("full", folder), source) == []


@pytest.mark.parametrize(
    ("name", "where"),
    [
        ("eva_vit_g.pth", "https://storage.googleapis.com/sfr-vision-language-research/"),
        ("blip2_pretrained.pth", "https://storage.googleapis.com/sfr-vision-language-research/"),
        ("VITONHD_PBE_pose.ckpt", "https://huggingface.co/rlawjdghek/StableVITON"),
        ("bert_vocab.txt", "https://huggingface.co/bert-base-uncased"),
        ("unifashion/model.safetensors", "train_phase1.py"),
    ],
)
def test_a_missing_file_is_named_with_its_source_before_any_is_read(
    source: UniFashion, folder: Path, monkeypatch: pytest.MonkeyPatch, name: str, where: str
):
    write_learned(source, folder, LEARNED[1:])
    (folder / name).unlink()
    for reader in ("read_checkpoint", "load_stableviton"):
        monkeypatch.setattr(load, reader, lambda *_: pytest.fail("read a file"))
    run = {"bert_vocab.txt": tokenizer, "unifashion/model.safetensors": load_unifashion}.get(
        name, load_public
    )
    with pytest.raises(UserError, match=rf"^{folder}/{name} is missing: .*{where}"):
        run("full", folder)


def test_a_model_beside_a_file_it_was_not_trained_with_is_refused(tmp_path: Path):
    tiny = tmp_path / "tiny"
    shutil.copytree(FOLDERS["tiny"], tiny)
    load_unifashion("tiny", tiny)
    other = {k: v + 1 for k, v in load_file(tiny / "vae.safetensors").items()}
    save_file(other, tiny / "vae.safetensors")
    with pytest.raises(
        UserError, match=r"vae.safetensors is damaged, or not the one .*model.safetensors was trained with"
    ):
        load_unifashion("tiny", tiny)


def test_full_is_the_default_where_a_trained_full_model_is_and_what_it_lacks_is_told(
    source: UniFashion, folder: Path
):
    assert default_preset(folder) == "tiny"  # the originals alone draw nothing yet
    write_learned(source, folder, LEARNED)
    assert default_preset(folder) == "full"
    (folder / "blip2_pretrained.pth").unlink()  # its part was learned
    assert default_preset(folder) == "full" and load_unifashion("full", folder)
    (folder / "eva_vit_g.pth").unlink()
    with pytest.raises(UserError, match="eva_vit_g.pth"):
        load_unifashion(default_preset(folder), folder)


@pytest.mark.parametrize(
    ("name", "wrong"),
    [
        ("eva_vit_g.pth", "cls_token"),
        ("blip2_pretrained.pth", "temp"),
        ("VITONHD_PBE_pose.ckpt", "learnable_vector"),
    ],
)
def test_an_original_cut_short_or_of_other_sizes_is_one_line_that_names_it(
    folder: Path, name: str, wrong: str
):
    whole = (folder / name).read_bytes()
    (folder / name).write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match=rf"^{folder}/{name}: [^\n]+$"):
        load_public("full", folder)

    (folder / name).write_bytes(whole)
    content = torch.load(folder / name)
    tensors = content.get("model") or content.get("state_dict") or content
    tensors[wrong] = torch.ones(2)
    torch.save(content, folder / name)
    with pytest.raises(
        UserError, match=rf"^{folder}/{name} does not fit the preset full: {wrong}: shape [^\n]+$"
    ):
        load_public("full", folder)


def test_a_model_of_another_preset_or_half_trained_is_refused_by_name(source: UniFashion, folder: Path):
    path = folder / "unifashion" / "model.safetensors"
    for module in LEARNED[1:]:
        write_learned(source, folder, [m for m in LEARNED if m != module])
        with pytest.raises(UserError, match=rf"^{path} holds no {module}: its training is not finished$"):
            load_unifashion("full", folder)
    write_learned(source, folder, LEARNED)
    tensors = load_file(path)
    save_file({**tensors, "unet.conv_out.bias": torch.zeros(7)}, path)
    with pytest.raises(
        UserError, match=rf"^{path} does not fit the preset full: unet.conv_out.bias: shape \(7,\)"
    ):
        load_unifashion("full", folder)
    save_file({**tensors, "head.weight": torch.zeros(7)}, path)
    with pytest.raises(UserError, match=rf"^{path} does not fit the preset full: head.weight"):
        load_unifashion("full", folder)


@pytest.mark.parametrize(
    ("name", "table"),
    [(VICUNA, LLAMA), ("llava-v1.5-7b", LLAMA), (LLAVA, LLAVA_HF), (LLAVA, LLAVA_HF_5)],
)
def test_the_half_that_writes_is_made_from_its_own_files_alone(
    writer: UniFashion, folder: Path, name: str, table: Table
):
    write_llm(writer, folder / name, table)
    (folder / "VITONHD_PBE_pose.ckpt").unlink()
    model = load_public("full", folder, draws=False, writes=True)
    different = wrong_tensors(model, writer)
    assert {runs.part_of(n) for n in different} == {"text_adapter", "lora"}
    assert not any(tensor.any() for n, tensor in model.state_dict().items() if n.endswith("lora_b"))
    assert model.text_adapter.weight.std() > 0.01 and len(llm_tokenizer("full", folder)) == 1024
    write_learned(writer, folder, ("qformer", *WRITES))
    assert wrong_tensors(load_unifashion("full", folder, draws=False, writes=True), merged(writer)) == []


def test_vicuna_is_preferred_and_its_tokenizer_with_it(writer: UniFashion, folder: Path):
    write_llm(writer, folder / VICUNA, LLAMA)
    (folder / LLAVA).mkdir()  # empty: is not looked into
    assert (
        wrong_tensors(load_public("full", folder, draws=False, writes=True).llama.norm, writer.llama.norm)
        == []
    )
    assert len(llm_tokenizer("full", folder)) == 1024


def test_frozen_weights_of_the_llm_may_be_narrower_than_what_learns(writer: UniFashion, folder: Path):
    write_llm(writer, folder / VICUNA, LLAMA)
    model = load_public("full", folder, draws=False, writes=True, llm_dtype=torch.bfloat16)
    for name, tensor in model.state_dict().items():
        base = runs.part_of(name) == "llama"
        assert tensor.dtype == (torch.bfloat16 if base else torch.float32), name
    assert set(training.set_trainable(model, train_phase1.TRAINABLE["caption"])) == {
        name for name in model.state_dict() if runs.part_of(name) in WRITES
    }


def test_lora_is_merged_into_the_llm(writer: UniFashion, folder: Path):
    write_llm(writer, folder / VICUNA, LLAMA)
    write_learned(writer, folder, ("qformer", *WRITES))
    (folder / "VITONHD_PBE_pose.ckpt").unlink()
    (folder / "blip2_pretrained.pth").unlink()  # learned
    model = load_unifashion("full", folder, draws=False, writes=True)
    assert not model.training and not any(p.requires_grad for p in model.parameters())
    state, theirs = model.state_dict(), writer.state_dict()
    for name, tensor in theirs.items():
        if f"{name.removesuffix('weight')}lora_b" in theirs and name.endswith(".weight"):
            a, b = (theirs[name.removesuffix("weight") + x] for x in ("lora_a", "lora_b"))
            torch.testing.assert_close(state[name], tensor + 12.0 / 4 * b @ a, atol=1e-5, rtol=0)
            assert (state[name] - tensor).abs().max() > 0.1
        else:
            assert torch.equal(state[name], tensor), name
    z, ids = torch.randn(2, 3, 24, generator=training.seeded("z")), torch.arange(9)
    ours, apart = (m.predict_words(z, ids[:4], ids.expand(2, -1)) for m in (model, writer))
    assert_parity(ours, apart, atol=1e-4)


def test_each_half_is_loaded_alone_or_both(source: UniFashion, writer: UniFashion, folder: Path):
    write_learned([source, writer], folder, (*LEARNED, *WRITES))
    assert wrong_tensors(load_unifashion("full", folder), source) == []  # there is no LLM
    for load_one in (load_unifashion, load_public):
        with pytest.raises(
            UserError, match=rf"^{folder}/{VICUNA} is missing: get .*huggingface.co/lmsys/vicuna-7b-v1.5"
        ):
            load_one("full", folder, draws=False, writes=True)
    with pytest.raises(UserError, match=rf"^{folder}/{VICUNA} is missing: get .*tokenizer.model"):
        llm_tokenizer("full", folder)
    write_llm(writer, folder / VICUNA, LLAMA)
    both = load_unifashion("full", folder, writes=True)
    state = both.state_dict()
    for half in (source, merged(writer)):
        assert all(torch.equal(state[name], tensor) for name, tensor in half.state_dict().items())
    assert not any(p.requires_grad for p in both.parameters())


def test_what_cannot_write_yet_is_told_by_name(source: UniFashion, writer: UniFashion, folder: Path):
    write_llm(writer, folder / VICUNA, LLAMA)
    path = folder / "unifashion" / "model.safetensors"
    for lacks in WRITES:
        write_learned([source, writer], folder, [m for m in (*LEARNED, *WRITES) if m != lacks])
        with pytest.raises(UserError, match=rf"^{path} holds no {lacks}: its training is not finished$"):
            load_unifashion("full", folder, draws=False, writes=True)
        assert wrong_tensors(load_unifashion("full", folder), source) == []
    write_learned(writer, folder, ("qformer", *WRITES))
    with pytest.raises(UserError, match=rf"^{path} holds no image_adapter: its training is not finished$"):
        load_unifashion("full", folder)


@pytest.mark.parametrize("name", ["llama.layers.0.attn.q.lora_b", "text_adapter.bias"])
def test_weights_that_are_not_finite_are_refused(
    name: str, source: UniFashion, writer: UniFashion, folder: Path
):
    write_llm(writer, folder / VICUNA, LLAMA)
    write_learned([source, writer], folder, (*LEARNED, *WRITES))
    path = folder / "unifashion/model.safetensors"
    tensors = load_file(path)
    assert name in tensors
    tensors[name][..., 0] = float("nan")
    save_file(tensors, path)
    with pytest.raises(UserError, match=rf"^{path}: {name} is not finite: [^\n]*$"):
        load_unifashion("full", folder, draws=False, writes=True)


@pytest.mark.parametrize(
    ("name", "tensor", "told"),
    [
        ("layers.1.attn.k.lora_b", None, "is missing"),
        ("layers.0.mlp.up.lora_a", torch.zeros(8, 32), r": shape \(8, 32\), wanted \(4, 32\)"),
        ("layers.0.mlp.gone.lora_a", torch.zeros(4, 32), "is no matrix of this adapter"),
        ("layers.7.attn.q.lora_a", torch.zeros(4, 32), "is no matrix of this adapter"),
    ],
)
def test_a_lora_that_does_not_fit_is_one_line_that_names_the_tensor(
    writer: UniFashion, folder: Path, name: str, tensor: Tensor | None, told: str
):
    write_llm(writer, folder / VICUNA, LLAMA)
    write_learned(writer, folder, ("qformer", *WRITES))
    path = folder / "unifashion" / "model.safetensors"
    tensors = load_file(path)
    tensors.pop(f"llama.{name}", None)
    save_file(tensors if tensor is None else tensors | {f"llama.{name}": tensor}, path)
    with pytest.raises(UserError, match=rf"^{path} does not fit the preset full: {name}:? ?{told}[^\n]*$"):
        load_unifashion("full", folder, draws=False, writes=True)


def test_what_belongs_to_no_part_is_refused_by_the_half_that_writes_too(writer: UniFashion, folder: Path):
    write_llm(writer, folder / VICUNA, LLAMA)
    write_learned(writer, folder, ("qformer", *WRITES))
    path = folder / "unifashion" / "model.safetensors"
    tensors = load_file(path)
    for name, told in (("head.weight", "head.weight"), ("text_adapter.scale", "text_adapter.scale")):
        save_file(tensors | {name: torch.zeros(7)}, path)
        with pytest.raises(UserError, match=rf"^{path} does not fit the preset full: {told}: [^\n]+$"):
            load_unifashion("full", folder, draws=False, writes=True)
    save_file(tensors | {"text_adapter.weight": torch.zeros(32, 7)}, path)
    with pytest.raises(UserError, match=rf"^{path} does not fit the preset full: text_adapter.weight: shape"):
        load_unifashion("full", folder, draws=False, writes=True)


def test_shards_that_are_not_all_there_or_damaged_are_one_line(writer: UniFashion, folder: Path):
    llm = folder / VICUNA
    write_llm(writer, llm, LLAMA)
    second = llm / "pytorch_model-00002-of-00002.bin"
    whole = second.read_bytes()
    second.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match=rf"^{second}: [^\n]+$"):
        load_public("full", folder, draws=False, writes=True)
    second.unlink()
    with pytest.raises(UserError, match=rf"^{second} is missing$"):
        load_public("full", folder, draws=False, writes=True)
    shutil.rmtree(llm)
    llm.mkdir()
    with pytest.raises(UserError, match=rf"^{llm} holds no weights: [^\n]+$"):
        load_public("full", folder, draws=False, writes=True)


def test_a_tokenizer_must_be_there_and_have_a_row_for_each_piece(
    folder: Path, writer: UniFashion, monkeypatch: pytest.MonkeyPatch
):
    llm = folder / VICUNA
    write_llm(writer, llm, LLAMA)
    for rows in (1023, 1025):
        other = replace(SMALL, llama=replace(SMALL.llama, vocab_size=rows))
        monkeypatch.setitem(PRESETS, "full", other)
        with pytest.raises(
            UserError, match=rf"^{llm}/tokenizer.model does not fit the preset full: 1024 pieces, {rows} in"
        ):
            llm_tokenizer("full", folder)
    (llm / "tokenizer.model").unlink()
    with pytest.raises(
        UserError, match=rf"^{llm}/tokenizer.model is missing: it is published beside the weights$"
    ):
        llm_tokenizer("full", folder)
    assert len(llm_tokenizer("tiny")) == PRESETS["tiny"].llama.vocab_size
    (folder / "llama_tokenizer.model").write_bytes(b"no tokenizer")
    with pytest.raises(UserError, match="llama_tokenizer.model is not a SentencePiece model, or damaged$"):
        llm_tokenizer("tiny", folder)
    (folder / "llama_tokenizer.model").unlink()
    with pytest.raises(UserError, match="llama_tokenizer.model is missing: "):
        llm_tokenizer("tiny", folder)


@pytest.mark.parametrize("name", ["llama.safetensors", "llama_tokenizer.model"])
def test_a_tiny_model_beside_another_llm_or_tokenizer_than_it_was_trained_with_is_refused(
    tmp_path: Path, name: str
):
    tiny = Path(shutil.copytree(FOLDERS["tiny"], tmp_path / "tiny"))
    beside = frozen_hashes("tiny", tiny)
    assert set(beside) == {
        "vit.safetensors", "vae.safetensors", "llama.safetensors", "bert_vocab.txt", "llama_tokenizer.model"
    }  # fmt: skip
    save_file(load_file(tiny / "model.safetensors"), tiny / "model.safetensors", beside)
    load_unifashion("tiny", tiny)
    (tiny / name).write_bytes((tiny / name).read_bytes() + b"\0")
    with pytest.raises(UserError, match=rf"^{tiny}/{name} is damaged, or not the one .* was trained with"):
        load_unifashion("tiny", tiny)
    (tiny / name).unlink()  # what draws does without
    load_unifashion("tiny", tiny)


def test_a_vocabulary_must_fit_the_model(folder: Path):
    path, rows = folder / "bert_vocab.txt", SMALL.qformer.vocab_size
    pieces = path.read_text().split()
    pieces += [f"word{i}" for i in range(rows)]
    for count in (rows - 2, rows - 1, rows):  # without [DEC], which is always added
        path.write_text("\n".join(pieces[:count]) + "\n")
        if count == rows - 1:
            assert len(tokenizer("full", folder)) == rows
            continue
        with pytest.raises(
            UserError, match=rf"bert_vocab.txt does not fit the preset full: {count + 1} pieces, 200 in"
        ):
            tokenizer("full", folder)


def test_a_preset_or_folder_that_does_not_exist_is_one_line(tmp_path: Path):
    with pytest.raises(UserError, match="^unknown preset 'huge': it is one of full, tiny$"):
        load_public("huge")
    with pytest.raises(UserError, match=f"^{tmp_path}/nowhere: there is no such folder of weights$"):
        load_public("tiny", tmp_path / "nowhere")


# helpers


def original(state: dict[str, Tensor], table: Table) -> dict[str, Tensor]:
    """Our tensors under the names of the original: the table read from right to left."""
    backwards = {ours: row for row, ours in table.items() if ours}
    return rename(state, backwards)


def write_originals(model: UniFashion, folder: Path) -> None:
    """The files of weights/files as published: names, wrappers, containers, and what a table leaves out."""
    eva = {k: v.half() for k, v in original(model.vit.state_dict(), VIT).items()}
    eva |= {"blocks.39.norm1.weight": torch.ones(3), "head.weight": torch.ones(3)}
    blip2 = original(model.qformer.state_dict(), QFORMER) | {"Qformer.cls.predictions.bias": torch.ones(3)}
    parts = nn.ModuleDict({"unet": model.unet, "garment": model.garment, "vae": model.vae})
    tryon = original({**parts.state_dict(), "null_context": model.null_context.detach()}, STABLEVITON)
    tryon = {name: tensor for name, tensor in tryon.items() if not name.startswith("control_convs.")}
    for name in [n for n in tryon if n.startswith("model.diffusion_model.output_blocks.2.2.conv")]:
        tryon[name.replace("2.2.conv", "2.1.conv")] = tryon.pop(name)  # the coarsest level has no attention
    tryon |= {
        "betas": torch.ones(1000),
        "cond_stage_model.final_ln.weight": torch.ones(3),
        "lastzc.bias": torch.ones(4),
    }
    torch.save(eva, folder / "eva_vit_g.pth", _use_new_zipfile_serialization=False)
    torch.save({"model": blip2}, folder / "blip2_pretrained.pth")
    torch.save({"state_dict": tryon, "epoch": 1}, folder / "VITONHD_PBE_pose.ckpt")
    (folder / "bert_vocab.txt").write_text("\n".join(build_vocab(["a red dress"])) + "\n")


def write_llm(model: UniFashion, folder: Path, table: Table) -> None:
    """The LLM as published, in two shards: Vicuna's and LLaVA's .bin, or LLaVA's of transformers, with rows to spare."""
    folder.mkdir()
    base = {k: v for k, v in model.llama.state_dict().items() if "lora" not in k}
    tensors = original(base, table)
    if table is not LLAMA:
        for name, tensor in tensors.items():
            if len(tensor) == SMALL.llama.vocab_size:
                tensors[name] = torch.cat([tensor, torch.randn(64, tensor.shape[1])])
        tensors |= {
            row.replace("*", "a.weight"): torch.ones(3)
            for row, ours in table.items()
            if ours is None and "*" in row
        }
    elif folder.name == VICUNA:
        tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)
    else:
        tensors["model.mm_projector.0.weight"] = torch.ones(3)
    names = list(tensors)
    for i, some in enumerate((names[:7], names[7:]), start=1):
        shard = {name: tensors[name].contiguous() for name in some}
        if table is not LLAMA:
            save_file(shard, folder / f"model-{i:05}-of-00002.safetensors")
        else:
            torch.save(shard, folder / f"pytorch_model-{i:05}-of-00002.bin")
    shutil.copy(FOLDERS["tiny"] / "llama_tokenizer.model", folder / "tokenizer.model")


def write_learned(
    model: UniFashion | list[UniFashion], folder: Path, modules: list[str] | tuple[str, ...]
) -> None:
    (folder / "unifashion").mkdir(exist_ok=True)
    state: dict[str, Tensor] = {}
    for half in model if isinstance(model, list) else [model]:
        state |= {k: v for k, v in half.state_dict().items() if runs.part_of(k) in modules}
    save_file(state, folder / "unifashion" / "model.safetensors")


def merged(writer: UniFashion) -> UniFashion:
    model = copy.deepcopy(writer)
    lora.merge(model.llama)
    return model


def wrong_tensors(ours: nn.Module, theirs: nn.Module) -> list[str]:
    """Names of the tensors that differ, after the cast to the type of ours."""
    a, b = ours.state_dict(), theirs.state_dict()
    assert a.keys() == b.keys()
    return sorted(name for name in a if not torch.equal(a[name], b[name].to(a[name].dtype)))


@torch.no_grad()
def outputs(model: UniFashion) -> list[Tensor]:
    """Everything the model does for a try-on, in its order."""
    generator = torch.Generator().manual_seed(3)
    draw = lambda *shape: torch.randn(*shape, generator=generator)  # noqa: E731
    ids = torch.arange(5)[None]
    context = model.context(model.see(draw(1, 3, 28, 28)), ids, torch.ones_like(ids, dtype=torch.bool))
    agnostic, hint = model.vae.encode(draw(2, 3, 64, 48)).split(1)
    scene = model.scene(agnostic, draw(1, 1, *SMALL.latent), hint)
    *_, latent = model.sample(draw(1, 4, *SMALL.latent), scene, context, hint, 2, guidance=2.0)
    return [context, agnostic, latent, model.vae.decode(latent)]
