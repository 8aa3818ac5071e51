"""CLIP against OpenAI's own numbers (golden `clip`) and transformers' CLIPModel, every number random; its published files."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import CLIPConfig as TheirConfig
from transformers import CLIPModel

from tests import goldens
from tests.faults import plant
from tests.merges import PAIRS, VOCAB_SIZE, write_merges
from tests.parity import assert_parity, randomise, swap
from tests.published import published
from unifashion import UserError, clip
from unifashion.clip import B16, CLIP, L14, CLIPConfig, ImageConfig, ImageTower, TextConfig
from weights import clip as loading
from weights.clip import HF, HF_IMAGE, OPENAI, load_clip, unfused
from weights.rename import Layout, Table, load_into, under

SMALL = CLIPConfig(
    ImageConfig(image_size=28, patch_size=7, dim=32, depth=3, heads=4, mlp_dim=56),
    TextConfig(vocab_size=VOCAB_SIZE, max_positions=9, dim=24, depth=2, heads=3, mlp_dim=40),
    embed_dim=24,
)
EOT = VOCAB_SIZE - 1
IDS = torch.tensor(
    [
        [EOT - 1, 4, 7, 1, EOT, 0, 0, 0, 0],  # padded with zeros, as OpenAI does
        [EOT - 1, 5, 2, EOT, EOT, EOT, EOT, EOT, EOT],  # with ends, as Hugging Face does
        [EOT - 1, 9, 8, 7, 6, 5, 4, 3, EOT],
    ]
)
IMAGE = torch.randn(2, 3, 28, 28, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
FULL_SIZE = {  # manifest -> table, config, parameters. open_clip's files have OpenAI's names and shapes
    "hf_clip_vit_l14": (HF, L14, 427_616_513),
    "openai_clip_vit_l14": (OPENAI, L14, 427_616_513),
    "hf_clip_vit_b16": (HF, B16, 149_620_737),
    "openai_clip_vit_b16": (OPENAI, B16, 149_620_737),
}

# parity


def test_both_towers_equal_openais():
    golden, model = openai()
    image, ids = golden.inputs["image"], golden.inputs["text"]
    assert_parity(model.image(image), golden.outputs["visual_tokens"])
    assert_parity(model.text(ids), golden.outputs["text_hidden"])
    assert_parity(model.encode_image(image), golden.outputs["image_features"])
    assert_parity(model.encode_text(ids), golden.outputs["text_features"])
    assert_parity(model(image, ids), golden.outputs["logits_per_image"])


def test_both_towers_equal_transformers():
    theirs, ours = pair()
    image, text = theirs.vision_model(IMAGE), theirs.text_model(IDS)
    assert_parity(ours.image.pooled(IMAGE), image.pooler_output)
    assert_parity(ours.text(IDS), text.last_hidden_state)
    assert_parity(ours.text.pooled(IDS), text.pooler_output)
    assert_parity(ours.encode_image(IMAGE), theirs.visual_projection(image.pooler_output))
    assert_parity(ours.encode_text(IDS), theirs.text_projection(text.pooler_output))
    assert_parity(ours(IMAGE, IDS), theirs(input_ids=IDS, pixel_values=IMAGE).logits_per_image)


@pytest.mark.parametrize("skip_last", range(4))
def test_every_hidden_state_of_the_image_equals_transformers(skip_last: int):
    theirs, ours = pair()
    hidden = theirs.vision_model(IMAGE, output_hidden_states=True).hidden_states
    assert len(hidden) == 4
    assert_parity(ours.image(IMAGE, skip_last=skip_last), hidden[-1 - skip_last])


def test_an_image_tower_is_filled_alone_from_its_part_of_a_file():
    theirs, ours = pair()
    tower = ImageTower(SMALL.image).double()
    state = {f"vision_tower.{name}": x for name, x in theirs.state_dict().items() if "vision_model." in name}
    load_into(tower, state, under("vision_tower.vision_model.", "", HF_IMAGE))
    assert_parity(tower(IMAGE, skip_last=1), ours.image(IMAGE, skip_last=1))


def test_a_shorter_row_of_ids_gives_the_same_text():
    _, ours = pair()
    assert_parity(ours.encode_text(IDS[:2, :5]), ours.encode_text(IDS[:2]))


CODE_FAULTS = {
    "eps of norm1 x10": ("Block", "self.norm1 = nn.LayerNorm(dim, eps=1e-5)", "self.norm1 = nn.LayerNorm(dim, eps=1e-4)"),
    "eps of norm2 x10": ("Block", "self.norm2 = nn.LayerNorm(dim, eps=1e-5)", "self.norm2 = nn.LayerNorm(dim, eps=1e-4)"),
    "eps before the blocks x10": ("ImageTower", "self.norm_pre = nn.LayerNorm(cfg.dim, eps=1e-5)", "self.norm_pre = nn.LayerNorm(cfg.dim, eps=1e-4)"),
    "eps after the blocks x10": ("ImageTower", "self.norm_post = nn.LayerNorm(cfg.dim, eps=1e-5)", "self.norm_post = nn.LayerNorm(cfg.dim, eps=1e-4)"),
    "eps of the text's norm x10": ("TextTower", "self.norm = nn.LayerNorm(cfg.dim, eps=1e-5)", "self.norm = nn.LayerNorm(cfg.dim, eps=1e-4)"),
    "erf GELU": ("MLP.forward", "x * torch.sigmoid(1.702 * x)", "F.gelu(x)"),
    "tanh GELU": ("MLP.forward", "x * torch.sigmoid(1.702 * x)", 'F.gelu(x, approximate="tanh")'),
    "no causal mask": ("Attention.forward", "is_causal=self.causal", "is_causal=False"),
    "causal images": ("Attention.forward", "is_causal=self.causal", "is_causal=True"),
    "biases of q, k and v dropped": ("Attention.forward", "rearrange(p(x), ", "rearrange(F.linear(x, p.weight), "),
    "last bias of the MLP dropped": ("MLP.forward", "self.fc2(", "F.linear(weight=self.fc2.weight, input="),
    "heads interleaved": ("Attention.forward", '"b n (h d) -> b h n d"', '"b n (d h) -> b h n d"'),
    "patches column by column": ("ImageTower.forward", "b d y x -> b (y x) d", "b d y x -> b (x y) d"),
    "positions after the norm": ("ImageTower.forward", "self.norm_pre(x + self.pos_embed)", "self.norm_pre(x) + self.pos_embed"),
    "the mean of all tokens for the class token": ("ImageTower.pooled", "self(image)[:, 0]", "self(image).mean(1)"),
    "text pooled at its last position": ("TextTower.pooled", "ids.argmax(dim=1)", "torch.full((len(ids),), ids.shape[1] - 1)"),
    "text not normalised": ("TextTower.forward", "return self.norm(x)", "return x"),
    "logit_scale not exponentiated": ("CLIP.forward", "self.logit_scale.exp()", "self.logit_scale"),
}  # fmt: skip

TABLE_FAULTS = {
    "swapped norms": ("norm1", "norm2"),
    "swapped norms around the blocks": ("norm_pre", "norm_post"),
    "swapped q and k": ("attn.q", "attn.k"),
    "swapped k and v": ("attn.k", "attn.v"),
    "swapped v and out": ("attn.v", "attn.out"),
}


@pytest.mark.parametrize("fault", CODE_FAULTS)
def test_parity_notices(fault: str, monkeypatch: pytest.MonkeyPatch):
    plant(monkeypatch, clip, *CODE_FAULTS[fault])
    assert_noticed(*openai())


@pytest.mark.parametrize("fault", TABLE_FAULTS)
def test_parity_notices_in_the_table(fault: str):
    assert_noticed(*openai(swap(OPENAI, *TABLE_FAULTS[fault])))


def test_parity_notices_a_transposed_projection():  # in L/14 the text's is square: no shape would tell
    theirs, ours = pair()
    ours.text_proj.weight = torch.nn.Parameter(ours.text_proj.weight.T)
    with pytest.raises(AssertionError, match="max difference"):
        assert_parity(ours.encode_text(IDS), theirs.text_projection(theirs.text_model(IDS).pooler_output))


# the published files


@pytest.mark.parametrize("name", FULL_SIZE)
def test_the_full_model_is_the_published_file(name: str):
    table, cfg, parameters = FULL_SIZE[name]
    with torch.device("meta"):
        model = CLIP(cfg)
    file = published(name)
    load_into(model, unfused(file), table)
    assert sum(p.numel() for p in model.parameters()) == parameters
    assert len(file) == {L14: 446, B16: 302}[cfg] + (146 if cfg is L14 else 98) * (table is HF)


def test_numbers_beside_openais_tensors_are_left_out():
    with torch.device("meta"):
        model = CLIP(L14)
    numbers = dict.fromkeys(("input_resolution", "context_length", "vocab_size"), torch.tensor(224))
    load_into(model, unfused(published("openai_clip_vit_l14") | numbers), OPENAI)


def test_a_fused_tensor_of_another_size_is_refused():
    with pytest.raises(UserError, match=r"in_proj_bias: shape \(4,\) does not divide into q, k and v"):
        unfused({"transformer.resblocks.0.attn.in_proj_bias": torch.zeros(4)})


@pytest.mark.parametrize(
    "file", ["model.safetensors", "open_clip_model.safetensors", "open_clip_pytorch_model.bin"]
)
def test_a_folder_in_any_layout_gives_the_same_clip(file: str, folder: Path):
    theirs, ours = pair()
    path = folder / "model.safetensors"
    if file != path.name:
        path.unlink()
        (save_file if file.endswith("tensors") else torch.save)(fused(theirs.state_dict()), folder / file)
    model, tokenizer = load_clip(folder, SMALL, dtype=torch.float64)
    assert_parity(model.encode_image(IMAGE), ours.encode_image(IMAGE))
    assert_parity(model.encode_text(IDS), ours.encode_text(IDS))
    assert not any(p.requires_grad for p in model.parameters()) and not model.training
    assert len(tokenizer) == VOCAB_SIZE == 514 + len(PAIRS)
    assert model.encode_text(tokenizer.encode(["a red dress"], 9)).shape == (1, 24)


def test_a_square_projection_left_as_it_is_would_be_noticed(folder: Path, monkeypatch: pytest.MonkeyPatch):
    theirs, ours = pair()
    (folder / "model.safetensors").unlink()
    save_file(fused(theirs.state_dict()), folder / "open_clip_model.safetensors")
    plant(monkeypatch, loading, "unfused", "= tensor.T", '= tensor.T if name == "visual.proj" else tensor')
    monkeypatch.setitem(loading.CLIPS, "visual.proj", Layout(OPENAI, loading.unfused))
    model, _ = load_clip(folder, SMALL, dtype=torch.float64)
    assert_parity(model.encode_image(IMAGE), ours.encode_image(IMAGE))
    with pytest.raises(AssertionError, match="max difference"):
        assert_parity(model.encode_text(IDS), ours.encode_text(IDS))


def test_what_is_missing_is_told_with_its_source(tmp_path: Path, folder: Path):
    source = (
        "get model.safetensors and merges.txt of https://huggingface.co/openai/clip-vit-large-patch14 into"
    )
    with pytest.raises(UserError, match=f"model.safetensors is missing: {source} {tmp_path / 'none'}"):
        load_clip(tmp_path / "none")
    (folder / "merges.txt").unlink()
    with pytest.raises(UserError, match=f"merges.txt is missing: {source}"):
        load_clip(folder, SMALL)


def test_a_damaged_or_different_file_is_one_line(folder: Path):
    with pytest.raises(UserError, match="merges.txt is cut short"):
        load_clip(folder)  # L/14 wants 49408 pieces
    path = folder / "model.safetensors"
    other = CLIPConfig(SMALL.image, SMALL.text, embed_dim=25)
    with pytest.raises(
        UserError, match=f"{path} is not the CLIP that was expected: .*projection.weight: shape"
    ):
        load_clip(folder, other)
    path.write_bytes(path.read_bytes()[:-8])
    with pytest.raises(UserError, match=f"{path}: damaged"):
        load_clip(folder, SMALL)


def test_sizes_that_do_not_divide_are_refused():
    with pytest.raises(ValueError, match="patch_size"):
        ImageConfig(image_size=225)
    for config in (ImageConfig, TextConfig):
        with pytest.raises(ValueError, match="heads"):
            config(dim=100, heads=7)


# helpers


def openai(table: Table = OPENAI) -> tuple[goldens.Golden, CLIP]:
    golden = goldens.load("clip")
    c = golden.config
    cfg = CLIPConfig(
        ImageConfig(
            image_size=c["image_resolution"],
            patch_size=c["vision_patch_size"],
            dim=c["vision_width"],
            depth=c["vision_layers"],
            heads=c["vision_width"] // 64,
            mlp_dim=4 * c["vision_width"],
        ),
        TextConfig(
            vocab_size=c["vocab_size"],
            max_positions=c["context_length"],
            dim=c["transformer_width"],
            depth=c["transformer_layers"],
            heads=c["transformer_heads"],
            mlp_dim=4 * c["transformer_width"],
        ),
        embed_dim=c["embed_dim"],
    )
    model = clip.CLIP(cfg).double()
    load_into(model, unfused(golden.weights), table)
    return golden, model


def assert_noticed(golden: goldens.Golden, model: CLIP) -> None:
    with pytest.raises(AssertionError, match="max difference"):
        assert_parity(
            model(golden.inputs["image"], golden.inputs["text"]), golden.outputs["logits_per_image"]
        )


def pair() -> tuple[CLIPModel, CLIP]:
    i, t = SMALL.image, SMALL.text
    theirs = CLIPModel(
        TheirConfig(
            vision_config={
                "hidden_size": i.dim,
                "intermediate_size": i.mlp_dim,
                "num_hidden_layers": i.depth,
                "num_attention_heads": i.heads,
                "image_size": i.image_size,
                "patch_size": i.patch_size,
            },
            text_config={
                "vocab_size": t.vocab_size,
                "hidden_size": t.dim,
                "intermediate_size": t.mlp_dim,
                "num_hidden_layers": t.depth,
                "num_attention_heads": t.heads,
                "max_position_embeddings": t.max_positions,
                "bos_token_id": EOT - 1,
                "eos_token_id": EOT,
            },
            projection_dim=SMALL.embed_dim,
        )
    )
    randomise(theirs, seed=0)
    ours = CLIP(SMALL).double()
    load_into(ours, theirs.state_dict(), HF)
    return theirs, ours


def fused(theirs: dict[str, Tensor]) -> dict[str, Tensor]:
    """Hugging Face's tensors in OpenAI's layout."""
    places = [
        ("vision_model.embeddings.position_embedding.weight", "visual.positional_embedding"),
        ("vision_model.embeddings.patch_embedding", "visual.conv1"),
        ("vision_model.embeddings", "visual"),
        ("vision_model.pre_layrnorm", "visual.ln_pre"),
        ("vision_model.post_layernorm", "visual.ln_post"),
        ("vision_model.encoder.layers", "visual.transformer.resblocks"),
        ("text_model.embeddings.position_embedding.weight", "positional_embedding"),
        ("text_model.embeddings.", ""),
        ("text_model.final_layer_norm", "ln_final"),
        ("text_model.encoder.layers", "transformer.resblocks"),
        ("layer_norm", "ln_"),
        ("mlp.fc1", "mlp.c_fc"),
        ("mlp.fc2", "mlp.c_proj"),
        ("self_attn", "attn"),
        ("visual_projection.weight", "visual.proj"),
        ("text_projection.weight", "text_projection"),
    ]
    tensors, parts = {}, {}
    for name, tensor in theirs.items():
        for hf, openai_name in places:
            name = name.replace(hf, openai_name)
        if "_proj." in name and "attn.out" not in name and "mlp" not in name:
            owner, _, kind = name.rpartition(
                "."
            )  # state dicts of different versions order q, k and v differently
            parts.setdefault(f"{owner[: -len('q_proj')]}in_proj_{kind}", {})[owner[-len("q_proj")]] = tensor
        else:
            tensors[name] = tensor.T.contiguous() if name in ("visual.proj", "text_projection") else tensor
    return tensors | {name: torch.cat([part[x] for x in "qkv"]) for name, part in parts.items()}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """What Hugging Face's folder holds, position ids included, which their code no longer saves."""
    ids = {f"{part}_model.embeddings.position_ids": torch.arange(9)[None] for part in ("vision", "text")}
    save_file(pair()[0].state_dict() | ids, tmp_path / "model.safetensors")
    write_merges(tmp_path / "merges.txt")
    return tmp_path
