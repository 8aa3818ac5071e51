"""EVA-CLIP ViT against LAVIS' own numbers (golden `eva_vit`) and transformers' Blip2VisionModel, tiny and random."""

import pytest
import torch
from torch import Tensor, nn
from transformers import Blip2VisionConfig, Blip2VisionModel

from tests import goldens
from tests.faults import plant
from tests.parity import assert_parity, randomise, swap
from tests.published import published
from unifashion import vit
from unifashion.config import FULL
from unifashion.vit import ViT, ViTConfig
from weights.qformer import VITS
from weights.rename import Table, load_into, load_layout, under
from weights.vit import VIT


def test_every_block_equals_lavis():
    golden, model = lavis()
    x = model["vit"](golden.inputs["image"])
    assert_parity(x, golden.outputs["vit"])
    assert_parity(model["ln_vision"](x), golden.outputs["features"])
    x = embed(model["vit"], golden.inputs["image"])
    for i, block in enumerate(model["vit"].blocks):
        x = block(x)
        assert_parity(x, golden.outputs[f"block_{i}"])


def test_output_equals_transformers():
    theirs, ours = transformers_pair()
    image = torch.randn(2, 3, 42, 42, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    hidden = theirs.encoder(theirs.embeddings(image)).last_hidden_state  # before their post_layernorm
    assert_parity(ours(image), hidden)


def test_the_full_model_is_the_published_file():
    with torch.device("meta"):
        model = ViT(FULL.vit)
    load_into(model, published("lavis_eva_vit_g"), VIT)
    assert len(model.state_dict()) == 511
    assert sum(p.numel() for p in model.parameters()) == 985_894_528


def test_a_40th_block_and_a_head_are_left_out_if_the_file_has_them():
    with torch.device("meta"):
        model = ViT(FULL.vit)
    file = published("lavis_eva_vit_g")
    block = {
        name.replace("38", "39"): tensor for name, tensor in file.items() if name.startswith("blocks.38.")
    }
    head = {
        name: torch.empty(1408, device="meta")
        for name in ("norm.weight", "norm.bias", "head.weight", "head.bias")
    }
    load_into(model, file | block | head, VIT)
    assert len(model.blocks) == 39


def test_the_image_is_unchanged():
    golden, model = lavis()
    image = golden.inputs["image"].clone()
    model["vit"](image)
    assert torch.equal(image, golden.inputs["image"])


CODE_FAULTS = {
    "eps of norm1 x10": ("Block", "self.norm1 = nn.LayerNorm(cfg.dim, eps=1e-6)", "self.norm1 = nn.LayerNorm(cfg.dim, eps=1e-5)"),
    "eps of norm2 x10": ("Block", "self.norm2 = nn.LayerNorm(cfg.dim, eps=1e-6)", "self.norm2 = nn.LayerNorm(cfg.dim, eps=1e-5)"),
    "tanh GELU": ("Block", 'approximate="none"', 'approximate="tanh"'),
    "q_bias dropped": ("Attention.forward", "[self.q_bias, ", "[0 * self.q_bias, "),
    "v_bias dropped": ("Attention.forward", ", self.v_bias]", ", 0 * self.v_bias]"),
    "heads before q, k, v": ("Attention.forward", "(three h d)", "(h three d)"),
    "patches column by column": ("ViT.forward", "b d y x -> b (y x) d", "b d y x -> b (x y) d"),
    "no position for the class token": ("ViT.forward", "x], dim=1) + self.pos_embed", "x + self.pos_embed[:, 1:]], dim=1)"),
}  # fmt: skip

TABLE_FAULTS = {
    "swapped norms": ("norm1", "norm2"),
    "swapped q_bias and v_bias": ("q_bias", "v_bias"),
}


@pytest.mark.parametrize("fault", CODE_FAULTS)
def test_parity_notices(fault: str, monkeypatch: pytest.MonkeyPatch):
    plant(monkeypatch, vit, *CODE_FAULTS[fault])
    golden, model = lavis()
    with pytest.raises(AssertionError, match="max difference"):
        assert_parity(model["vit"](golden.inputs["image"]), golden.outputs["vit"])


@pytest.mark.parametrize("fault", TABLE_FAULTS)
def test_parity_notices_in_the_table(fault: str):
    golden, model = lavis(swap(VIT, *TABLE_FAULTS[fault]))
    with pytest.raises(AssertionError, match="max difference"):
        assert_parity(model["vit"](golden.inputs["image"]), golden.outputs["vit"])


# helpers


def lavis(table: Table = VIT) -> tuple[goldens.Golden, nn.ModuleDict]:
    golden = goldens.load("eva_vit")
    c = golden.config
    cfg = ViTConfig(
        image_size=tuple(c["img_size"]),
        patch_size=c["patch_size"],
        dim=c["embed_dim"],
        depth=c["depth"],
        heads=c["num_heads"],
        mlp_dim=int(c["embed_dim"] * c["mlp_ratio"]),
    )
    model = nn.ModuleDict({"vit": vit.ViT(cfg), "ln_vision": nn.LayerNorm(cfg.dim, eps=1e-5)}).double()
    load_into(model, golden.weights, under("visual_encoder.", "vit.", table) | {"ln_vision.*": "ln_vision.*"})
    return golden, model


def transformers_pair() -> tuple[Blip2VisionModel, ViT]:
    theirs = Blip2VisionModel(
        Blip2VisionConfig(
            hidden_size=40,
            intermediate_size=56,
            num_hidden_layers=3,
            num_attention_heads=5,
            image_size=42,
            patch_size=14,
        )
    )
    randomise(theirs, seed=0)
    without_key_bias(theirs)
    ours = ViT(ViTConfig(image_size=(42, 42), patch_size=14, dim=40, depth=3, heads=5, mlp_dim=56)).double()
    load_layout(ours, {f"vision_model.{name}": x for name, x in theirs.state_dict().items()}, VITS)
    return theirs, ours


def without_key_bias(theirs: nn.Module) -> None:
    """Of their fused bias the keys' third must be 0 to be EVA's model."""
    for name, x in theirs.state_dict().items():
        if name.endswith("qkv.bias"):
            x.chunk(3)[1].zero_()


def embed(model: ViT, image: Tensor) -> Tensor:
    """What the first block reads."""
    seen = []
    hook = model.blocks[0].register_forward_pre_hook(lambda block, args: seen.append(args[0]))
    model(image)
    hook.remove()
    return seen[0]
