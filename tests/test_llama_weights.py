"""The published Llamas, by name and shape, and folders of shards as they are published."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from tests.published import published
from unifashion import UserError
from unifashion.config import FULL
from unifashion.llama import Llama, LlamaConfig
from weights.containers import read_folder, shards_of
from weights.llama import LLAMA, LLAVA_HF, LLAVA_HF_5, llamas
from weights.rename import blank, layout_of, load_layout, rename

CFG = LlamaConfig(vocab_size=31, dim=16, depth=2, heads=2, mlp_dim=24, context=32)
PUBLISHED = {
    "vicuna_7b_v1_5": LLAMA,
    "llava_v1_5_7b_liuhaotian": LLAMA,
    "llava_1_5_7b_hf": LLAVA_HF,
    "llava_1_5_7b_hf_transformers5_names": LLAVA_HF_5,
}

# the published files


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_full_model_is_the_published_one(name: str):
    model = blank(lambda: Llama(LlamaConfig()))
    assert LlamaConfig() == FULL.llama
    load_layout(model, published(name), llamas(32000))
    assert sum(x.numel() for x in model.parameters()) == 6_738_415_616
    assert len(model.state_dict()) == 3 + 9 * 32  # no buffers: its tables are computed


def test_what_is_left_out_of_the_published_files_is_known_by_name():
    left = {name: set(published(name)) - set(rename_back(name)) for name in PUBLISHED}
    speeds = {f"model.layers.{i}.self_attn.rotary_emb.inv_freq" for i in range(32)}
    projector = {f"model.mm_projector.{i}.{x}" for i in (0, 2) for x in ("weight", "bias")}
    assert left["vicuna_7b_v1_5"] == speeds
    assert left["llava_v1_5_7b_liuhaotian"] == speeds | projector
    assert {name.split(".")[0] for name in left["llava_1_5_7b_hf"]} == {
        "vision_tower",
        "multi_modal_projector",
    }
    assert {name.rpartition("_tower.")[0] for name in left["llava_1_5_7b_hf_transformers5_names"]} >= {
        "model.vision"
    }
    assert len(left["llava_1_5_7b_hf"]) == len(left["llava_1_5_7b_hf_transformers5_names"]) == 391 + 4


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_names_in_a_file_tell_which_edition_it_is(name: str):
    assert layout_of(published(name), llamas(32000)).table is PUBLISHED[name]


def test_rows_that_llava_hf_appended_are_cut(tmp_path: Path, capsys: pytest.CaptureFixture):
    model = tiny()
    tensors = {f"language_model.{name}": x for name, x in original(model).items()}
    for name in ("language_model.model.embed_tokens.weight", "language_model.lm_head.weight"):
        tensors[name] = torch.cat([tensors[name], torch.full((64, 16), torch.nan)])
    tensors |= {"vision_tower.x": torch.ones(1), "multi_modal_projector.linear_1.bias": torch.ones(1)}
    save_file(tensors, tmp_path / "model.safetensors")
    assert_same(load(tmp_path), model)
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("rows", [30, 32, 94, 96])
def test_other_vocabularies_are_refused_in_one_line(tmp_path: Path, rows: int):
    tensors = original(tiny()) | {"model.embed_tokens.weight": torch.zeros(rows, 16)}
    save_file(tensors, tmp_path / "model.safetensors")
    refused(
        tmp_path, rf"model\.embed_tokens\.weight: shape \({rows}, 16\) in the file, \(31, 16\) in the model"
    )


# shards


@pytest.mark.parametrize("ending", ["safetensors", "bin"])
@pytest.mark.parametrize("n", [1, 2, 3])
def test_shards_are_read_back_exactly(tmp_path: Path, ending: str, n: int):
    model = tiny()
    write(tmp_path, original(model), ending, n)
    # what else lies there: an index, a tokenizer, LLaVA's projector, what other tools wrote
    for name in ("model.safetensors.index.json", "tokenizer.model", "mm_projector.bin", "training_args.bin"):
        (tmp_path / name).write_bytes(b"not looked at")
    assert_same(load(tmp_path), model)


def test_one_file_without_a_number_will_do(tmp_path: Path):
    model = tiny()
    torch.save(original(model), tmp_path / "pytorch_model.bin")
    assert_same(load(tmp_path), model)


def test_safetensors_come_before_pickles(tmp_path: Path):
    write(tmp_path, original(tiny()), "safetensors", 2)
    (tmp_path / "pytorch_model-00001-of-00002.bin").write_bytes(b"not looked at")
    assert [path.suffix for path in shards_of(tmp_path)] == [".safetensors"] * 2


def test_half_precision_is_cast_to_what_is_asked_for(tmp_path: Path):
    model = tiny()
    write(tmp_path, {name: x.half() for name, x in original(model).items()}, "bin", 2)
    fresh = meta()
    load_layout(fresh, read_folder(tmp_path), llamas(31), dtype=torch.bfloat16)
    for name, x in fresh.state_dict().items():
        assert torch.equal(x, model.state_dict()[name].half().bfloat16()), name


@pytest.mark.parametrize("ending", ["safetensors", "bin"])
@pytest.mark.parametrize("lost", [0, 1, 2])
def test_a_missing_shard_is_named(tmp_path: Path, ending: str, lost: int):
    paths = write(tmp_path, original(tiny()), ending, 3)
    paths[lost].unlink()
    refused(tmp_path, f"^{paths[lost]} is missing$")


@pytest.mark.parametrize("ending", ["safetensors", "bin"])
def test_a_damaged_shard_is_named(tmp_path: Path, ending: str):
    path = write(tmp_path, original(tiny()), ending, 2)[1]
    path.write_bytes(path.read_bytes()[:-300])
    refused(tmp_path, f"^{path}: damaged, cut short, or not a checkpoint")


def test_a_tensor_in_two_shards_is_named(tmp_path: Path):
    paths = write(tmp_path, original(tiny()), "safetensors", 2)
    save_file({"model.norm.weight": torch.ones(16)}, paths[0])
    save_file({"model.norm.weight": torch.zeros(16)}, paths[1])
    refused(tmp_path, f"^{paths[1]}: model.norm.weight is in an earlier file, too$")


def test_a_place_without_weights_is_named(tmp_path: Path):
    (tmp_path / "mm_projector.bin").touch()
    refused(tmp_path, f"^{tmp_path} holds no weights: neither model")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model.layers.0.self_attn.q_proj.bias": torch.ones(16)}, r"^model\.layers\.0\.self_attn\.q_proj\.bias: no row"),
        ({"model.layers.2.mlp.up_proj.weight": torch.ones(24, 16)}, r"^model\.layers\.2\.mlp\.up_proj\.weight: the model has no such"),
        ({"vision_tower.x": torch.ones(1)}, r"^vision_tower\.x: no row"),
        ({"model.layers.1.mlp.up_proj.weight": None}, r"lacks model\.layers\.1\.mlp\.up_proj\.weight, for layers\.1\.mlp\.up\.weight \(24, 16\)$"),
        ({"lm_head.weight": None}, r"lacks lm_head\.weight, for lm_head\.weight"),
        ({"model.layers.1.mlp.up_proj.weight": torch.ones(16, 24)}, r"up_proj\.weight: shape \(16, 24\) in the file"),
        ({"model.norm.weight": torch.ones(16, dtype=torch.int8)}, r"^model\.norm\.weight: torch\.int8 in the file"),
    ],
)  # fmt: skip
def test_a_tensor_too_many_too_few_or_of_another_kind_is_named(tmp_path: Path, change: dict, message: str):
    tensors = {name: x for name, x in (original(tiny()) | change).items() if x is not None}
    write(tmp_path, tensors, "safetensors", 2)
    refused(tmp_path, message)


def test_a_file_of_another_network_is_refused_in_one_line(tmp_path: Path):
    tensors = {name.replace("model.", "transformer."): x for name, x in original(tiny()).items()}
    write(tmp_path, tensors, "safetensors", 2)
    refused(tmp_path, r"^its names \(.*\) are of no layout that is known here: none of model\.embed_tokens")


# helpers


def tiny() -> Llama:
    torch.manual_seed(0)
    return Llama(CFG)


def meta() -> Llama:
    return blank(lambda: Llama(CFG))


def original(model: Llama) -> dict[str, Tensor]:
    """In Hugging Face's layout, with what Vicuna's files hold beside."""
    theirs = {ours: row for row, ours in LLAMA.items() if ours}
    out = {}
    for name, x in model.state_dict().items():
        number = next((part for part in name.split(".") if part.isdecimal()), "")
        out[theirs[name.replace(f".{number}.", ".#.")].replace("#", number)] = x
    return out | {f"model.layers.{i}.self_attn.rotary_emb.inv_freq": torch.ones(4) for i in range(CFG.depth)}


def rename_back(name: str) -> list[str]:
    """The original names that the table takes."""
    checkpoint = published(name)
    taken = {id(x) for x in rename(checkpoint, PUBLISHED[name]).values()}
    return [original for original, x in checkpoint.items() if id(x) in taken]


def write(folder: Path, tensors: dict[str, Tensor], ending: str, n: int) -> list[Path]:
    names, stem = list(tensors), {"safetensors": "model", "bin": "pytorch_model"}[ending]
    paths = [folder / f"{stem}-{i + 1:05}-of-{n:05}.{ending}" for i in range(n)]
    for i, path in enumerate(paths):
        part = {name: tensors[name].contiguous() for name in names[i::n]}
        save_file(part, path) if ending == "safetensors" else torch.save(part, path)
    return paths


def load(folder: Path) -> Llama:
    model = meta()
    load_layout(model, read_folder(folder), llamas(CFG.vocab_size))
    return model


def assert_same(ours: Llama, theirs: Llama) -> None:
    wanted = theirs.state_dict()
    assert ours.state_dict().keys() == wanted.keys()
    assert all(torch.equal(x, wanted[name]) for name, x in ours.state_dict().items())


def refused(folder: Path, message: str) -> None:
    with pytest.raises(UserError, match=message) as error:
        load(folder)
    assert "\n" not in str(error.value)
