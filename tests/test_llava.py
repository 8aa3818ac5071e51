"""LLaVA-1.5 against transformers' numbers (golden `llava`), and its published files against the tables that read them."""

import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from tests import goldens
from tests.faults import plant
from tests.parity import assert_parity, randomise
from tests.published import published
from unifashion import UserError, llava
from unifashion.clip import CLIP, CLIPConfig, ImageConfig, TextConfig
from unifashion.llama import LlamaConfig
from unifashion.llava import LLAVA_7B, LLaVA, LLaVAConfig
from weights import load
from weights.clip import HF as CLIP_HF
from weights.llava import (
    FOLDERS,
    HF,
    HF_5,
    ORIGINAL,
    TOWER,
    TOWER_FOLDER,
    llava_captioner,
    llava_tokenizer,
    llavas,
    load_llava,
)
from weights.rename import Table, layout_of, load_into, load_layout, rename

pytestmark = pytest.mark.usefixtures("one_thread")

SMALL = LLaVAConfig(
    ImageConfig(image_size=28, patch_size=7, dim=32, depth=3, heads=4, mlp_dim=56),
    LlamaConfig(1024, dim=40, depth=2, heads=4, mlp_dim=48, context=256),  # of tiny's tokenizer
)
HF_FOLDER, ORIGINAL_FOLDER = FOLDERS

# parity


def test_patches_and_soft_tokens_equal_transformers():
    golden, model = transformers()
    picture = golden.inputs["pixel_values"]
    assert_parity(model.image(picture, skip_last=1), golden.outputs["vision_penultimate"])
    assert_parity(model.see(picture), golden.outputs["image_features"])


def test_a_pictures_place_in_the_prompt_equals_transformers():
    golden, model = transformers()
    for i, wanted in enumerate(own(golden, "merged_embeds")):
        assert_parity(embedded(golden, model, i), wanted)


def test_logits_of_every_prompt_equal_transformers():
    golden, model = transformers()
    for i, wanted in enumerate(own(golden, "logits_rope64")):
        assert_parity(model.llama.logits(model.llama(embedded(golden, model, i))), wanted)


def test_a_prompts_tokens_do_not_depend_on_the_other_pictures():
    golden, model = transformers()
    seen = model.see(golden.inputs["pixel_values"])
    before, after = around(golden, 1)
    together = model.soft_prompt(seen, before, after.expand(3, -1))
    assert_parity(together[1:2], embedded(golden, model, 1))


def test_what_is_written_is_what_the_logits_say():
    """Word for word, without a cache."""
    golden, model = transformers()
    before, after = around(golden, 2)
    seen = model.see(golden.inputs["pixel_values"])
    written = model.write(seen, before, after.expand(3, -1), 6, eos=-1)
    for i in range(3):
        ids: list[int] = []
        while len(ids) < 6:
            so_far = torch.cat([after, torch.tensor([ids], dtype=torch.int64)], 1)
            hidden = model.llama(model.soft_prompt(seen[i : i + 1], before, so_far))
            ids.append(model.llama.logits(hidden)[0, -1].argmax().item())
        assert written[i].tolist() == ids
    assert len({tuple(row) for row in written.tolist()}) == 3  # the picture matters


FAULTS = {
    "all of CLIP's blocks": ("LLaVA.see", "skip_last=1", "skip_last=0"),
    "two blocks less": ("LLaVA.see", "skip_last=1", "skip_last=2"),
    "the class token for the last patch": ("LLaVA.see", "[:, 1:]", "[:, :-1]"),
    "patches from the end": ("LLaVA.see", "[:, 1:]", "[:, 1:].flip(1)"),
    "patches column by column": ("LLaVA.see", "[:, 1:]", "[:, 1:].unflatten(1, (4, 4)).transpose(1, 2).flatten(1, 2)"),
    "tanh GELU": ("Projector.forward", "F.gelu(self.fc1(x))", 'F.gelu(self.fc1(x), approximate="tanh")'),
    "quick GELU": ("Projector.forward", "F.gelu(self.fc1(x))", "(lambda y: y * torch.sigmoid(1.702 * y))(self.fc1(x))"),
    "no GELU": ("Projector.forward", "F.gelu(self.fc1(x))", "self.fc1(x)"),
    "first bias dropped": ("Projector.forward", "self.fc1(x)", "F.linear(x, self.fc1.weight)"),
    "last bias dropped": ("Projector.forward", "self.fc2(", "F.linear(weight=self.fc2.weight, input="),
    "the picture before all words": ("LLaVA.soft_prompt", "words(before).expand(len(seen), -1, -1), seen,", "seen, words(before).expand(len(seen), -1, -1),"),
    "the picture behind all words": ("LLaVA.soft_prompt", "seen, words(after)]", "words(after), seen]"),
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_parity_notices(fault: str, monkeypatch: pytest.MonkeyPatch):
    plant(monkeypatch, llava, *FAULTS[fault])
    golden, model = transformers()
    with pytest.raises(AssertionError, match="max difference"):
        assert_parity(embedded(golden, model, 0), next(own(golden, "merged_embeds")))


def test_parity_notices_a_class_token_that_is_kept(monkeypatch: pytest.MonkeyPatch):
    plant(monkeypatch, llava, "LLaVA.see", "[:, 1:]", "[:, :]")
    golden, model = transformers()
    with pytest.raises(AssertionError, match=r"\(3, 17, 48\) is not \(3, 16, 48\)"):
        assert_parity(model.see(golden.inputs["pixel_values"]), golden.outputs["image_features"])


def test_parity_notices_swapped_biases_in_the_table():
    rows = {row: ours for row, ours in HF.items() if "projector" not in row}
    for i, j in ((1, 2), (2, 1)):
        rows |= {f"multi_modal_projector.linear_{i}.weight": f"projector.fc{i}.weight"}
        rows |= {f"multi_modal_projector.linear_{i}.bias": f"projector.fc{j}.bias"}
    golden, model = transformers(rows)
    with pytest.raises(AssertionError, match="max difference"):
        assert_parity(model.see(golden.inputs["pixel_values"]), golden.outputs["image_features"])


def test_swapped_layers_of_the_projector_do_not_load():
    rows = HF | {"multi_modal_projector.linear_1.*": "projector.fc2.*"}
    rows |= {"multi_modal_projector.linear_2.*": "projector.fc1.*"}
    with pytest.raises(UserError, match=r"linear_2\.weight: shape \(48, 48\) in the file, \(48, 36\) in the"):
        transformers(rows)


# the published files


@pytest.mark.parametrize(
    ("name", "table"), [("llava_1_5_7b_hf", HF), ("llava_1_5_7b_hf_transformers5_names", HF_5)]
)
def test_the_full_model_is_the_published_one(name: str, table: Table):
    file, model = published(name), meta()
    assert layout_of(file, llavas(32000)).table is table
    load_layout(model, file, llavas(32000))
    assert sum(x.numel() for x in model.parameters()) == 7_063_427_072 - 2 * 64 * 4096
    assert len(file) == len(model.state_dict()) == 686  # nothing is left out


def test_liuhaotians_model_is_the_published_one_with_clip_beside_it():
    file, model = published("llava_v1_5_7b_liuhaotian"), meta()
    rest = torch.nn.ModuleDict({"projector": model.projector, "llama": model.llama})
    load_into(rest, file, ORIGINAL)
    clip = published("hf_clip_vit_l14_336")
    load_into(model.image, clip, TOWER)
    assert sum(x.numel() for x in model.parameters()) == 7_063_427_072 - 2 * 64 * 4096
    left = set(file) - set(taken(file, ORIGINAL))
    assert left == {f"model.layers.{i}.self_attn.rotary_emb.inv_freq" for i in range(32)}
    left = set(clip) - set(taken(clip, TOWER)) - {"vision_model.embeddings.position_ids"}
    assert {name.split(".")[0] for name in left} == {
        "text_model", "visual_projection", "text_projection", "logit_scale"
    }  # fmt: skip


def test_the_tower_for_pictures_of_224_pixels_is_refused():
    with pytest.raises(
        UserError, match=r"position_embedding.weight: shape \(257, 1024\) in the file, \(577, 1024\)"
    ):
        load_into(meta().image, published("hf_clip_vit_l14"), TOWER)


@pytest.mark.parametrize("table", [HF, HF_5])
def test_a_tensor_that_no_row_names_is_refused(table: Table):
    with pytest.raises(UserError, match="no row of the table names it"):
        load_into(meta(), published("llava_v1_5_7b_liuhaotian"), table)


# folders


@pytest.mark.parametrize("kind", ["transformers 5", "liuhaotian", "liuhaotian, CLIP as a pickle"])
def test_the_same_network_in_another_layout_is_the_same_bit_for_bit(
    kind: str, source: LLaVA, files: Path, tmp_path: Path
):
    other = tmp_path / "other"
    other.mkdir()
    if kind == "transformers 5":
        write_hf(source, other, HF_5)
    else:
        write_original(source, other, ".bin" if "pickle" in kind else ".safetensors")
    for dtype in (torch.float32, torch.bfloat16):
        first, second = (load_llava(folder, dtype=dtype) for folder in (files, other))
        assert first.state_dict().keys() == source.state_dict().keys()
        for name, tensor in source.state_dict().items():
            assert torch.equal(first.state_dict()[name], tensor.to(dtype)), name
            assert torch.equal(second.state_dict()[name], tensor.to(dtype)), name
        assert not any(p.requires_grad for p in second.parameters()) and not second.training
    assert len(llava_tokenizer(other)) == 1024


def test_llava_hf_is_preferred_and_needs_no_clip(source: LLaVA, files: Path):
    write_original(source, files, ".bin")
    shutil.rmtree(files / TOWER_FOLDER)
    (files / ORIGINAL_FOLDER / "tokenizer.model").unlink()
    assert llava_captioner(files).startswith(f"{HF_FOLDER} ") and load_llava(files) and llava_tokenizer(files)


def test_what_is_missing_is_told_with_its_source(source: LLaVA, files: Path, tmp_path: Path):
    hub = "https://huggingface.co"
    empty = tmp_path / "empty"
    empty.mkdir()
    for run in (load_llava, llava_tokenizer, llava_captioner):
        refused(run, empty, rf"^{empty}/{HF_FOLDER} is missing: get .*tokenizer.model of {hub}/llava-hf/")
        refused(run, tmp_path / "none", "none: there is no such folder of weights$")
    write_original(source, empty, ".bin")
    (empty / TOWER_FOLDER / "pytorch_model.bin").unlink()
    for run in (load_llava, llava_tokenizer, llava_captioner):
        told = rf"^{empty}/{TOWER_FOLDER}/pytorch_model.bin is missing: {ORIGINAL_FOLDER} has no .* {hub}/openai/{TOWER_FOLDER}"
        refused(run, empty, told)
    (files / HF_FOLDER / "tokenizer.model").unlink()
    refused(llava_tokenizer, files, rf"^{files}/{HF_FOLDER}/tokenizer.model is missing: it is published")
    lost = files / HF_FOLDER / "model-00002-of-00003.safetensors"
    lost.unlink()
    for run in (load_llava, llava_captioner):
        refused(run, files, f"^{lost} is missing$")
    for path in files.glob("*/*"):
        path.unlink()
    refused(load_llava, files, rf"^{files}/{HF_FOLDER} holds no weights: ")


def test_a_damaged_or_different_file_is_one_line(source: LLaVA, files: Path, tmp_path: Path):
    path = files / HF_FOLDER / "model-00003-of-00003.safetensors"
    tensors = load_file(path)
    name = next(name for name in tensors if "norm" in name)
    place = f"{files}/{HF_FOLDER} is not the LLaVA-1.5-7B that was expected: "
    for changed, told in (
        (tensors | {name: torch.ones(3)}, f"^{place}{name}: shape "),
        (tensors | {"language_model.head.weight": torch.ones(3)}, rf"^{place}language_model\.head\.weight: "),
        ({k: v for k, v in tensors.items() if k != name}, f"^{place}the checkpoint lacks {name}, for "),
    ):
        save_file(changed, path)
        refused(load_llava, files, told)
    path.write_bytes(path.read_bytes()[:-8])
    refused(load_llava, files, f"^{path}: damaged")

    other = tmp_path / "other"
    other.mkdir()
    write_original(source, other, ".safetensors")
    tower = other / TOWER_FOLDER / "model.safetensors"
    save_file(load_file(tower) | {"vision_model.embeddings.class_embedding": torch.ones(3)}, tower)
    refused(
        load_llava, other, rf"^{tower} is not the CLIP that was expected: vision_model\.emb.*: shape \(3,\)"
    )
    words = other / ORIGINAL_FOLDER / "tokenizer.model"
    words.write_bytes(b"no tokenizer")
    refused(llava_tokenizer, other, f"^{words} is not a SentencePiece model, or damaged")


def test_a_tokenizer_of_another_size_is_refused(files: Path, monkeypatch: pytest.MonkeyPatch):
    other = replace(SMALL, llama=replace(SMALL.llama, vocab_size=1000))
    monkeypatch.setattr(llava, "LLAVA_7B", other)
    refused(llava_tokenizer, files, f"does not fit {HF_FOLDER}: 1024 pieces, 1000 in the LLM$")


# its name


def test_the_name_tells_weights_apart_and_not_where_they_are(source: LLaVA, files: Path, tmp_path: Path):
    name = llava_captioner(files)
    assert len(name) == len(HF_FOLDER) + 13
    shutil.copytree(files, tmp_path / "moved")
    assert llava_captioner(tmp_path / "moved") == name
    (files / HF_FOLDER / "README.md").write_text("not weights")
    assert llava_captioner(files) == name

    tuned = LLaVA(SMALL)
    tuned.load_state_dict({k: v * 1.001 for k, v in source.state_dict().items()})
    write_hf(tuned, files, HF)  # of the same names, shapes and sizes
    assert llava_captioner(files) != name
    original = tmp_path / "original"
    original.mkdir()
    write_original(source, original, ".safetensors")
    first = llava_captioner(original)
    assert first.startswith(f"{ORIGINAL_FOLDER} ")
    tower = original / TOWER_FOLDER / "model.safetensors"
    save_file({k: v * 1.001 for k, v in load_file(tower).items() if v.is_floating_point()}, tower)
    assert llava_captioner(original) != first


def test_the_name_tells_key_words_apart(files: Path):
    names = [llava_captioner(files, words) for words in ((), ("red",), ("red", "blue"), ("blue", "red"))]
    assert len(set(names)) == 4
    assert all(name.startswith(f"{names[0]} keywords ") for name in names[1:])
    assert not any("red" in name.split() for name in names)


# helpers


def transformers(table: Table = HF) -> tuple[goldens.Golden, LLaVA]:
    golden = goldens.load("llava")
    c, v = golden.config, golden.config["vision"]
    cfg = LLaVAConfig(
        ImageConfig(
            v["image_size"],
            v["patch_size"],
            v["hidden_size"],
            v["num_hidden_layers"],
            v["num_attention_heads"],
            v["intermediate_size"],
        ),
        LlamaConfig(
            c["vocab_size"],
            c["hidden_size"],
            c["num_hidden_layers"],
            c["num_attention_heads"],
            c["intermediate_size"],
            c["max_position_embeddings"],
            c["rms_norm_eps"],
            c["rope_theta"],
        ),
    )
    model = llava.LLaVA(cfg).double()
    load_into(model, golden.weights, table)
    assert cfg.patches == 16
    return golden, model


def around(golden: goldens.Golden, i: int) -> tuple[Tensor, Tensor]:
    """The ids before the i-th prompt's <image> and behind it, without padding."""
    at, end = golden.config["image_pos"][i], golden.config["lengths"][i]
    ids = golden.inputs["ids"][i]
    assert ids[at] == golden.config["image_token_index"]
    return ids[:at], ids[None, at + 1 : end]


def embedded(golden: goldens.Golden, model: LLaVA, i: int) -> Tensor:
    seen = model.see(golden.inputs["pixel_values"][i : i + 1])
    return model.soft_prompt(seen, *around(golden, i))


def own(golden: goldens.Golden, name: str):
    """Of each prompt what is not padding, (1,t,c)."""
    for row, mask in zip(golden.outputs[name], golden.outputs["merged_mask"].bool(), strict=True):
        yield row[mask][None]


def meta() -> LLaVA:
    with torch.device("meta"):
        return LLaVA(LLAVA_7B)


def taken(file: dict[str, Tensor], table: Table) -> list[str]:
    tensors = {id(x) for x in rename(file, table).values()}
    return [name for name, x in file.items() if id(x) in tensors]


def refused(run, folder: Path, message: str) -> None:
    with pytest.raises(UserError, match=message) as error:
        run(folder)
    assert "\n" not in str(error.value)


def original(state: dict[str, Tensor], table: Table) -> dict[str, Tensor]:
    """Our tensors under the names of the original: the table read from right to left."""
    return rename(state, {ours: row for row, ours in table.items() if ours})


def write_hf(model: LLaVA, folder: Path, table: Table) -> None:
    """As llava-hf publishes it: three shards, 64 rows more than there are pieces."""
    place = folder / HF_FOLDER
    place.mkdir(exist_ok=True)
    tensors = original(model.state_dict(), table)
    for name, tensor in tensors.items():
        if len(tensor) == model.cfg.llama.vocab_size:
            extra = torch.randn(64, tensor.shape[1], generator=torch.Generator().manual_seed(1))
            tensors[name] = torch.cat([tensor, extra])
    names = list(tensors)
    for i in range(3):
        shard = {name: tensors[name].half().contiguous() for name in names[i::3]}
        save_file(shard, place / f"model-{i + 1:05}-of-00003.safetensors")
    shutil.copy(load.FOLDERS["tiny"] / "llama_tokenizer.model", place / "tokenizer.model")


def write_original(model: LLaVA, folder: Path, tower: str) -> None:
    """As liuhaotian publishes it: two pickles, with the rotation's speeds in them; and OpenAI's CLIP, its text tower included."""
    place = folder / ORIGINAL_FOLDER
    place.mkdir(exist_ok=True)
    state = {k: v for k, v in model.state_dict().items() if not k.startswith("image.")}
    tensors = {name: tensor.half() for name, tensor in original(state, ORIGINAL).items()}
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(5)
    names = list(tensors)
    for i in range(2):
        shard = {name: tensors[name] for name in names[i::2]}
        torch.save(shard, place / f"pytorch_model-{i + 1:05}-of-00002.bin")
    torch.save({"not": "looked at"}, place / "mm_projector.bin")
    shutil.copy(load.FOLDERS["tiny"] / "llama_tokenizer.model", place / "tokenizer.model")

    text = TextConfig(30, 9, dim=24, depth=1, heads=3, mlp_dim=40)
    clip = CLIP(CLIPConfig(model.cfg.image, text, embed_dim=24))
    clip.image.load_state_dict(model.image.state_dict())
    tensors = original(clip.state_dict(), CLIP_HF)
    tensors["vision_model.embeddings.position_ids"] = torch.arange(17)[None]
    tensors["text_model.embeddings.position_ids"] = torch.arange(9)[None]
    (folder / TOWER_FOLDER).mkdir(exist_ok=True)
    if tower == ".bin":
        torch.save(tensors, folder / TOWER_FOLDER / "pytorch_model.bin")
    else:
        save_file(
            {k: v.contiguous() for k, v in tensors.items()}, folder / TOWER_FOLDER / "model.safetensors"
        )


@pytest.fixture(scope="module")
def source() -> LLaVA:
    """Of values that float16, in which LLaVA is published, has too."""
    return randomise(LLaVA(SMALL), 0).half().float()


@pytest.fixture
def files(source: LLaVA, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """weights/files of a user who has downloaded llava-hf; until the test ends LLaVA is SMALL."""
    monkeypatch.setattr(llava, "LLAVA_7B", SMALL)
    (tmp_path / "files").mkdir()
    write_hf(source, tmp_path / "files", HF)
    return tmp_path / "files"
