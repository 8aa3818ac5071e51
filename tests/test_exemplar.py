"""The exemplar's encoder against Paint-by-Example (golden pbe_image_encoder) and diffusers; the published files; faults."""

from pathlib import Path

import pytest
import torch
from diffusers.pipelines.deprecated.paint_by_example.image_encoder import PaintByExampleImageEncoder
from torch import Tensor, nn
from transformers import CLIPVisionConfig

from tests import goldens
from tests.faults import plant
from tests.parity import assert_parity, randomise, swap
from tests.published import published
from unifashion import UserError, exemplar
from unifashion.clip import L14, ImageConfig, ImageTower
from unifashion.exemplar import Exemplar, ExemplarConfig
from weights import exemplar as loading
from weights import rename as engine
from weights.exemplar import DIFFUSERS, EXEMPLAR, load_image_encoder, unfused
from weights.rename import Table, load_into

GOLDEN = goldens.load("pbe_image_encoder")
PICTURE = GOLDEN.inputs["pixel_values"]
CONFIG = ImageConfig(image_size=28, patch_size=7, dim=40, depth=3, heads=5, mlp_dim=72)
# diffusers has (depth + 1) // 5 blocks behind CLIP's: two
THEIRS = ImageConfig(image_size=28, patch_size=14, dim=32, depth=9, heads=4, mlp_dim=56)

# parity


def test_every_output_equals_paint_by_examples():
    tower, ours, null = golden_parts()
    assert_parity(tower(PICTURE), GOLDEN.outputs["last_hidden"])
    assert_parity(tower(PICTURE, skip_last=1), GOLDEN.outputs["penultimate"])
    pooled = tower.pooled(PICTURE)
    assert_parity(pooled, GOLDEN.outputs["pooled"])
    assert_parity(ours.embed(pooled)[:, 0], GOLDEN.outputs["z"].reshape(2, -1))
    assert_parity(ours(pooled), GOLDEN.outputs["context"])
    assert_parity(null.expand(2, -1, -1), GOLDEN.outputs["uncond"])


def test_context_and_null_context_equal_diffusers(tmp_path: Path):
    theirs = diffusers(tmp_path)
    picture = torch.randn(2, 3, 28, 28, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    with torch.device("meta"):
        tower, ours = ImageTower(THEIRS), Exemplar(ExemplarConfig(32, 2, 24))
    null = load_image_encoder(tmp_path, tower, ours, torch.float64)
    context, uncond = theirs(picture, return_uncond_vector=True)
    assert_parity(ours(tower.pooled(picture)), context)
    assert_parity(null, uncond)


def test_one_token_has_no_use_for_queries_and_keys_and_two_would_have():
    tower, ours, _ = golden_parts()
    pooled = tower.pooled(PICTURE)
    before, pair = ours(pooled), ours.blocks[0](pooled[None])
    for block in ours.blocks:
        randomise(block.attn.q, 5)
        randomise(block.attn.k, 6)
    assert torch.equal(ours(pooled), before)
    assert (ours.blocks[0](pooled[None]) - pair).abs().max() > 1e-3


CODE_FAULTS = {
    "eps of norm1 x10": ("Block", "self.norm1 = nn.LayerNorm(dim, eps=1e-5)", "self.norm1 = nn.LayerNorm(dim, eps=1e-4)"),
    "eps of norm2 x10": ("Block", "self.norm2 = nn.LayerNorm(dim, eps=1e-5)", "self.norm2 = nn.LayerNorm(dim, eps=1e-4)"),
    "eps of the last norm x10": ("Exemplar", "self.norm = nn.LayerNorm(cfg.dim, eps=1e-5)", "self.norm = nn.LayerNorm(cfg.dim, eps=1e-4)"),
    "tanh GELU": ("MLP.forward", 'approximate="none"', 'approximate="tanh"'),
    "quick GELU": ("MLP.forward", 'F.gelu(self.fc1(x), approximate="none")', "(y := self.fc1(x)) * (1.702 * y).sigmoid()"),
    "bias of v dropped": ("Attention.forward", "self.v(x)", "F.linear(x, self.v.weight)"),
    "last bias of the MLP dropped": ("MLP.forward", "self.fc2(F", "F.linear(weight=self.fc2.weight, input=F"),
    "norms after, not before": ("Block.forward", "x + self.attn(self.norm1(x))", "self.norm1(x + self.attn(x))"),
    "no residual around the MLP": ("Block.forward", "return x + self.mlp", "return self.mlp"),
    "not normalised at the end": ("Exemplar.embed", "return self.norm(x)", "return x"),
}  # fmt: skip

TABLE_FAULTS = {
    "swapped norms": ("norm1", "norm2"),
    "swapped k and v": ("attn.k", "attn.v"),
    "swapped v and out": ("attn.v", "attn.out"),
    "swapped norms around the blocks": ("image.norm_post", "exemplar.norm"),
}


@pytest.mark.parametrize("fault", CODE_FAULTS)
def test_parity_notices(fault: str, monkeypatch: pytest.MonkeyPatch):
    plant(monkeypatch, exemplar, *CODE_FAULTS[fault])
    assert_noticed()


@pytest.mark.parametrize("fault", TABLE_FAULTS)
def test_parity_notices_in_the_table(fault: str):
    assert_noticed(swap(EXEMPLAR, *TABLE_FAULTS[fault]))


def test_parity_notices_thirds_in_another_order(monkeypatch: pytest.MonkeyPatch):
    plant(monkeypatch, engine, "thirds", 'zip("qkv"', 'zip("vkq"')
    monkeypatch.setattr(loading, "thirds", engine.thirds)
    assert_noticed()


@pytest.mark.parametrize("fault", [("norm1", "norm2"), ("attn.k", "attn.v")], ids=str)
def test_parity_notices_in_diffusers_table(
    fault: tuple[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(loading, "DIFFUSERS", swap(DIFFUSERS, *fault))
    with pytest.raises(AssertionError, match="max difference"):
        test_context_and_null_context_equal_diffusers(tmp_path)


# the published files


@pytest.mark.parametrize("name", loading.FILES)
def test_a_folder_in_the_place_of_the_file_is_one_line(tmp_path: Path, name: str):
    path = tmp_path / loading.FILES[name][0]
    path.mkdir(parents=True)
    with pytest.raises(UserError, match=rf"^{path} is a folder, not the file of this name$"):
        loading.load_published(name, tmp_path)


def test_the_full_parts_are_diffusers_published_file():
    with torch.device("meta"):
        parts = nn.ModuleDict({"image": ImageTower(L14.image), "exemplar": Exemplar(ExemplarConfig())})
        parts.register_parameter("null_context", nn.Parameter(torch.empty(1, 1, 768)))
    file = published("pbe_diffusers_image_encoder")
    load_into(parts, file, DIFFUSERS)
    assert sum(p.numel() for p in parts.parameters()) == 366_950_912
    assert len(file) == 477


def test_a_fused_projection_is_divided_without_a_copy_and_one_of_another_size_is_refused():
    name = "cond_stage_model.mapper.resblocks.0.attn.c_qkv"
    whole = {f"{name}.weight": torch.arange(12.0).view(6, 2), f"{name}.bias": torch.arange(6.0)}
    parts = unfused(whole)
    assert list(parts) == [f"{name}.{kind}[{part}]" for kind in ("weight", "bias") for part in "qkv"]
    assert torch.equal(parts[f"{name}.bias[k]"], torch.tensor([2.0, 3.0]))
    assert {x.untyped_storage().data_ptr() for x in parts.values()} == {
        x.untyped_storage().data_ptr() for x in whole.values()
    }
    with pytest.raises(UserError, match=r"c_qkv.bias: shape \(4,\) does not divide into q, k and v"):
        unfused({f"{name}.bias": torch.zeros(4)})


@pytest.mark.parametrize(
    "name", ["uncond_vector", "mapper.blocks.1.attn1.to_k.bias", "final_layer_norm.weight"]
)
def test_an_image_encoder_that_lacks_a_tensor_or_has_one_too_many_is_refused(name: str, tmp_path: Path):
    diffusers(tmp_path)
    path = tmp_path / "pytorch_model.bin"
    tensors = torch.load(path)
    for wrong in (tensors | {f"{name}_2": torch.ones(1)}, {k: v for k, v in tensors.items() if k != name}):
        torch.save(wrong, path)
        with pytest.raises(UserError, match="no row of the table|the model has no such layer|lacks"):
            load_image_encoder(tmp_path, ImageTower(THEIRS), Exemplar(ExemplarConfig(32, 2, 24)))


# helpers


def golden_parts(table: Table = EXEMPLAR) -> tuple[ImageTower, Exemplar, Tensor]:
    cfg = ExemplarConfig(dim=40, depth=GOLDEN.config["mapper_layers"], context_dim=24)
    parts = nn.ModuleDict({"image": ImageTower(CONFIG), "exemplar": exemplar.Exemplar(cfg)}).double()
    parts.register_parameter("null_context", nn.Parameter(torch.empty(1, 1, 24, dtype=torch.float64)))
    load_into(parts, unfused(GOLDEN.weights), table)
    return parts["image"], parts["exemplar"], parts.null_context


def assert_noticed(table: Table = EXEMPLAR) -> None:
    tower, ours, _ = golden_parts(table)
    with pytest.raises(AssertionError, match="max difference"):
        assert_parity(ours(tower.pooled(PICTURE)), GOLDEN.outputs["context"])


def diffusers(folder: Path) -> PaintByExampleImageEncoder:
    """Random, and its file as published: transformers has since left `vision_model.` out of the names, and position_ids."""
    config = CLIPVisionConfig(
        hidden_size=THEIRS.dim,
        intermediate_size=THEIRS.mlp_dim,
        num_hidden_layers=THEIRS.depth,
        num_attention_heads=THEIRS.heads,
        image_size=THEIRS.image_size,
        patch_size=THEIRS.patch_size,
        projection_dim=24,
    )
    theirs = randomise(PaintByExampleImageEncoder(config, proj_size=24), seed=0)
    tensors = {
        f"model.vision_model.{name.removeprefix('model.').removeprefix('vision_model.')}"
        if name.startswith("model.")
        else name: tensor
        for name, tensor in theirs.state_dict().items()
    }
    tensors["model.vision_model.embeddings.position_ids"] = torch.arange(THEIRS.tokens)[None]
    torch.save(tensors, folder / "pytorch_model.bin")
    return theirs
