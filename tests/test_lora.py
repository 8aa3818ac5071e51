"""LoRA against PEFT's numbers: golden `lora`, PEFT of today on transformers' Llama, and a folder that it saved."""

import json
from pathlib import Path

import peft
import pytest
import torch
import torch.nn.functional as F
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from tests import goldens
from tests.faults import plant
from tests.parity import assert_parity, randomise, swap
from tests.test_llama import WIDENED, empty, read
from unifashion import UserError, lora
from unifashion.llama import Llama, generate
from unifashion.lora import LoRAConfig, adapter_state, inject, load_adapter, merge, unmerge
from weights.llama import LLAMA
from weights.lora import PEFT, load_peft
from weights.rename import Table, load_into, rename

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`"),  # of PEFT to transformers
]

TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
PLACES = ["attn.q", "attn.k", "attn.v", "attn.o", "mlp.gate", "mlp.up", "mlp.down"]

# PEFT's numbers. But for `rope64` theirs are with cosines and sines in float32, which moves logits of 3 by 1e-6


def test_logits_and_merged_matrices_equal_peft():
    golden, model = base()
    ids = golden.inputs["ids"]
    before = read(model, ids)
    assert_parity(before, golden.outputs["logits_base"], atol=1e-5)
    inject(model, LoRAConfig(golden.config["r"], golden.config["lora_alpha"], dropout=0.0))
    assert torch.equal(read(model, ids), before)
    load_adapter(model, rename(adapter(golden), PEFT))
    assert_parity(read(model, ids), golden.outputs["logits_lora_rope64"], atol=1e-12)

    weights = {name: x.clone() for name, x in model.state_dict().items()}
    merge(model)
    assert_parity(read(model, ids), golden.outputs["logits_lora_rope64"], atol=1e-12)
    assert_parity(read(model, ids), golden.outputs["logits_merged"], atol=1e-5)
    merged = {
        name.removeprefix("merged/"): x for name, x in golden.outputs.items() if name.startswith("merged/")
    }
    assert len(merged) == 4
    for name, x in rename({k: golden.weights[k] for k in base_weights(golden)} | merged, LLAMA).items():
        if any(torch.equal(x, y) for y in merged.values()):
            assert_parity(model.state_dict()[name], x, atol=1e-14)
    unmerge(model)
    for name, x in model.state_dict().items():
        assert (x - weights[name]).abs().max() < 1e-14, name


def test_logits_equal_todays_peft():
    theirs, ours, ids = pair()
    logits = theirs(input_ids=ids).logits
    assert_parity(read(ours, ids), logits)
    merge(ours)
    assert_parity(read(ours, ids), logits)
    assert_parity(read(ours, ids), theirs.merge_and_unload()(input_ids=ids).logits)


def test_the_same_matrices_are_adapted_as_todays_peft_does():
    theirs, ours, _ = pair()
    names = peft.get_peft_model_state_dict(theirs)
    tensors = rename(names, PEFT)
    assert {name: x.shape for name, x in tensors.items()} == {
        name: x.shape for name, x in adapter_state(ours).items()
    }
    adapted = [name for name, m in ours.named_modules() if isinstance(m, lora.LoRALinear)]
    assert sorted(adapted) == sorted(f"layers.{i}.{place}" for i in range(2) for place in PLACES)
    # PEFT's own "all-linear" means the same: all but lm_head
    everywhere = peft.get_peft_model(transformer(), peft.LoraConfig(r=3, target_modules="all-linear"))
    assert peft.get_peft_model_state_dict(everywhere).keys() == names.keys()


def test_gradients_equal_todays_pefts_and_reach_the_adapter_alone():
    theirs, ours, ids = pair()
    ours.requires_grad_(False)
    for name, x in ours.named_parameters():
        x.requires_grad_("lora_" in name)
    for logits in (theirs(input_ids=ids).logits, read(ours, ids)):
        F.cross_entropy(logits.flatten(0, 1), ids.flatten()).backward()
    reached = {name: x.grad for name, x in ours.named_parameters() if x.grad is not None}
    assert reached.keys() == adapter_state(ours).keys()
    wanted = {
        name.replace(".default", ""): x.grad for name, x in theirs.named_parameters() if x.grad is not None
    }
    for name, gradient in rename(wanted, PEFT).items():
        assert gradient.abs().max() > 1e-6
        assert (reached[name] - gradient).abs().max() < 1e-12, name


# a folder of PEFT's


@pytest.mark.parametrize("safe", [True, False])
def test_a_saved_folder_gives_the_same_logits(tmp_path: Path, safe: bool):
    theirs, ours, ids = pair()
    folder = save(theirs, tmp_path, safe)
    fresh = plain()
    load_peft(fresh, folder)
    assert_parity(read(fresh, ids), read(ours, ids), atol=1e-12)
    a = fresh.layers[0].attn.q
    assert a.lora_a.shape == (3, 40) and a.scale == 6 / 3 and a.dropout == 0.25


def test_a_folder_saved_with_whole_paths_will_do(tmp_path: Path):
    theirs = peft.get_peft_model(
        transformer(), peft.LoraConfig(r=3, lora_alpha=6, target_modules="all-linear")
    )
    randomise(theirs, seed=4)
    fresh, ids = plain(theirs), torch.arange(12).view(2, 6)
    load_peft(fresh, save(theirs, tmp_path))
    assert_parity(read(fresh, ids), theirs(input_ids=ids).logits)


@pytest.mark.parametrize(
    ("said", "message"),
    [
        ({"bias": "all"}, "bias is 'all'"),
        ({"use_rslora": True}, "use_rslora is True"),
        ({"use_dora": True}, "use_dora is True"),
        ({"modules_to_save": ["lm_head"]}, r"modules_to_save is \['lm_head'\]"),
        ({"fan_in_fan_out": True}, "fan_in_fan_out is True"),
        ({"rank_pattern": {"q_proj": 4}}, r"rank_pattern is \{'q_proj': 4\}"),
        ({"alpha_pattern": {"q_proj": 4}}, r"alpha_pattern is \{'q_proj': 4\}"),
        ({"layers_to_transform": [0]}, r"layers_to_transform is \[0\]"),
        ({"lora_bias": True}, "lora_bias is True"),
        ({"of_a_later_peft": 0.5}, "of_a_later_peft is 0.5"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights is 'pissa'"),
        ({"peft_type": "IA3"}, "peft_type is 'IA3'"),
        ({"target_modules": TARGETS[:-1]}, r"target_modules is \['q_proj',"),
        ({"target_modules": [*TARGETS, "lm_head"]}, r"target_modules is \['q_proj',"),
        ({"target_modules": "all-linear"}, "target_modules is 'all-linear'"),
        ({"r": 0}, "rank 0 must be at least 1"),
        ({"r": None}, "missing, damaged, or not PEFT's"),
    ],
)
def test_another_kind_of_lora_is_refused_in_one_line(tmp_path: Path, said: dict, message: str):
    folder = save(pair()[0], tmp_path)
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | said))
    fresh = plain()
    with pytest.raises(UserError, match=message) as error:
        load_peft(fresh, folder)
    assert str(error.value).startswith(str(path)) and "\n" not in str(error.value)
    assert not adapter_state(fresh)


@pytest.mark.parametrize("content", [None, "{", "[]", "{}"])
def test_a_config_that_is_missing_or_damaged_is_one_line(tmp_path: Path, content: str | None):
    path = save(pair()[0], tmp_path) / "adapter_config.json"
    path.unlink()
    if content is not None:
        path.write_text(content)
    with pytest.raises(UserError, match="adapter_config.json: missing, damaged, or not PEFT's") as error:
        load_peft(plain(), tmp_path)
    assert "\n" not in str(error.value)


def test_matrices_that_are_missing_or_damaged_are_one_line(tmp_path: Path):
    path = save(pair()[0], tmp_path) / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(UserError, match="adapter_model.safetensors: damaged"):
        load_peft(plain(), tmp_path)
    path.unlink()
    with pytest.raises(UserError, match="adapter_model.bin: no such file"):
        load_peft(plain(), tmp_path)


Q = "base_model.model.model.layers.1.self_attn.q_proj.lora_A.weight"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({Q: None}, r"layers\.1\.attn\.q\.lora_a is missing \(1 such\)"),
        (
            {Q.replace("layers.1", "layers.2"): torch.zeros(3, 40)},
            r"layers\.2\.attn\.q\.lora_a is no matrix of this",
        ),
        ({"base_model.model.lm_head.lora_A.weight": torch.zeros(3, 40)}, r"lm_head\.lora_A\.weight: no row"),
        ({Q: torch.zeros(4, 40)}, r"layers\.1\.attn\.q\.lora_a: shape \(4, 40\), wanted \(3, 40\)"),
    ],
)
def test_other_matrices_are_refused_in_one_line(tmp_path: Path, change: dict, message: str):
    path = save(pair()[0], tmp_path) / "adapter_model.safetensors"
    tensors = load_file(path) | change
    save_file({name: x for name, x in tensors.items() if x is not None}, path)
    with pytest.raises(UserError, match=message) as error:
        load_peft(plain(), tmp_path)
    assert str(error.value).startswith(str(path)) and "\n" not in str(error.value)


# what follows from it


def test_the_adapters_state_is_a_and_b_of_all_linear_layers():
    ours = pair()[1]
    state = adapter_state(ours)
    assert sorted(state) == sorted(f"layers.{i}.{p}.lora_{m}" for i in range(2) for p in PLACES for m in "ab")
    assert state["layers.1.mlp.down.lora_a"].shape == (3, 56)
    assert state["layers.1.mlp.down.lora_b"].shape == (40, 3)
    before = plain().state_dict()
    assert {k: v.shape for k, v in ours.state_dict().items() if k not in state} == {
        k: v.shape for k, v in before.items()
    }
    merge(ours)
    assert adapter_state(ours).keys() == state.keys()
    assert adapter_state(plain()) == {}


def test_an_adapter_goes_from_one_model_into_another():
    _, ours, ids = pair()
    fresh = plain()
    inject(fresh, LoRAConfig(3, 6))
    load_adapter(fresh, adapter_state(ours))
    assert torch.equal(read(fresh, ids), read(ours, ids))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"layers.0.mlp.up.lora_b": None}, r"layers\.0\.mlp\.up\.lora_b is missing \(1 such\)"),
        ({"lm_head.lora_a": torch.zeros(3, 40)}, r"lm_head\.lora_a is no matrix of this adapter \(1 such\)"),
        ({"layers.0.mlp.up.weight": torch.zeros(56, 40)}, r"layers\.0\.mlp\.up\.weight is no matrix"),
        (
            {"layers.0.mlp.up.lora_b": torch.zeros(3, 56)},
            r"mlp\.up\.lora_b: shape \(3, 56\), wanted \(56, 3\)",
        ),
    ],
)
def test_an_adapter_that_does_not_fit_is_one_line_and_changes_nothing(change: dict, message: str):
    _, ours, ids = pair()
    before = read(ours, ids)
    tensors = {name: 1 + x for name, x in adapter_state(ours).items()} | change
    with pytest.raises(UserError, match=message) as error:
        load_adapter(ours, {name: x for name, x in tensors.items() if x is not None})
    assert "\n" not in str(error.value)
    assert torch.equal(read(ours, ids), before)


def test_injecting_starts_from_zero_and_keeps_names_values_and_what_is_frozen():
    ours, ids = plain().requires_grad_(False), torch.arange(12).view(2, 6)
    before, tensors = read(ours, ids), {name: x.data_ptr() for name, x in ours.named_parameters()}
    inject(ours, LoRAConfig(3, 6))
    assert torch.equal(read(ours, ids), before)
    assert {name: x.data_ptr() for name, x in ours.named_parameters() if not x.requires_grad} == tensors
    assert {name for name, x in ours.named_parameters() if x.requires_grad} == adapter_state(ours).keys()
    for name, x in adapter_state(ours).items():
        if name.endswith("lora_b"):
            assert not x.any()
        else:  # PEFT's: uniform within 1 / sqrt(in)
            bound = x.shape[1] ** -0.5
            assert 0.8 * bound < x.abs().max() <= bound and abs(x.mean()) < 0.2 * bound
    assert isinstance(ours.lm_head, nn.Linear)


@pytest.mark.parametrize("training", [True, False])
def test_dropout_acts_in_training_and_on_the_adapters_path_alone(training: bool):
    linear = nn.Linear(64, 8, bias=False).double().train(training)
    adapted = lora.LoRALinear(linear, LoRAConfig(rank=2, alpha=4, dropout=0.5))
    assert adapted.training == training  # as the layer that it replaces
    x = torch.randn(500, 64, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    adapted.lora_b.data.zero_()
    assert torch.equal(adapted(x), linear(x))  # nothing is dropped before W
    adapted.lora_b.data.normal_(generator=torch.Generator().manual_seed(1))
    exact = linear(x) + 2.0 * x @ adapted.lora_a.T @ adapted.lora_b.T
    assert torch.allclose(adapted(x), exact, atol=1e-12) == (not training)
    if training:  # right on average: what is left is scaled up
        off = torch.stack([adapted(x) - exact for _ in range(200)]).mean(0)
        assert off.abs().max() < 0.6 * (adapted(x) - exact).abs().max()
        assert off.mean().abs() < 0.01 * exact.std()
    merge(adapted)
    assert torch.allclose(adapted(x), exact, atol=1e-12)  # merged there is no path of its own to drop from


def test_an_evaluated_model_does_not_drop_after_injection():
    ours, ids = plain(), torch.arange(12).view(2, 6)
    inject(ours, LoRAConfig(3, 6, dropout=0.9))
    load_adapter(ours, adapter_state(pair()[1]))
    assert torch.equal(read(ours, ids), read(ours, ids))


def test_a_bfloat16_base_learns_in_float32_under_autocast():
    _, reference, ids = pair()
    ours = plain().bfloat16().requires_grad_(False)
    inject(ours, LoRAConfig(3, 6, dropout=0.0))
    load_adapter(ours, adapter_state(reference))
    assert {x.dtype for x in adapter_state(ours).values()} == {torch.float32}
    assert ours.layers[0].attn.q.weight.dtype == torch.bfloat16
    with torch.autocast("cpu", torch.bfloat16):
        logits = read(ours, ids)
        loss = F.cross_entropy(logits.flatten(0, 1), ids.flatten())
    loss.backward()
    assert_parity(logits, read(reference, ids), atol=0.5)  # of 4; bfloat16 has 3 digits
    gradients = {name: x.grad for name, x in ours.named_parameters() if x.grad is not None}
    assert gradients.keys() == adapter_state(ours).keys()
    assert all(x.dtype == torch.float32 and x.isfinite().all() and x.any() for x in gradients.values())


def test_before_it_is_merged_a_bfloat16_llm_writes_without_autocast():
    ours = plain().bfloat16().eval()
    inject(ours, LoRAConfig(3, 6))
    load_adapter(ours, adapter_state(pair()[1]))
    written = generate(ours, ours.embed(torch.arange(3, 9)[None]), torch.ones(1, 6, dtype=torch.bool), 3, 2)
    assert written.shape == (1, 3)


def test_merging_rounds_a_bfloat16_base_once():
    ours = plain().bfloat16()
    inject(ours, LoRAConfig(3, 6))
    load_adapter(ours, adapter_state(pair()[1]))
    m = ours.layers[1].mlp.down
    exact = m.weight.float() + 2.0 * m.lora_b @ m.lora_a
    merge(ours)
    assert m.weight.dtype == torch.bfloat16 and torch.equal(m.weight, exact.bfloat16())


def test_nothing_is_injected_merged_or_unmerged_twice():
    ours = pair()[1]
    with pytest.raises(ValueError, match="LoRA is not merged"):
        unmerge(ours)
    with pytest.raises(ValueError, match="LoRA is there already"):
        inject(ours, LoRAConfig(3, 6))
    merge(ours)
    with pytest.raises(ValueError, match="LoRA is merged already"):
        merge(ours)


def test_an_adapter_is_not_loaded_beneath_a_merged_one():
    ours = pair()[1]
    merge(ours)
    with pytest.raises(ValueError, match="merged"):
        load_adapter(ours, adapter_state(ours))


def test_bounds_of_the_config():
    for wrong in ({"rank": 0}, {"dropout": 1.0}, {"dropout": -0.1}):
        with pytest.raises(ValueError, match="must be at least 1, dropout"):
            LoRAConfig(**wrong)
    with pytest.raises(ValueError, match="with a bias"):
        lora.LoRALinear(nn.Linear(3, 3), LoRAConfig())


# faults

CODE_FAULTS = {
    "alpha ignored": ("LoRALinear", "cfg.alpha / cfg.rank", "1.0"),
    "scale upside down": ("LoRALinear", "cfg.alpha / cfg.rank", "cfg.rank / cfg.alpha"),
    "scale of rsLoRA": ("LoRALinear", "cfg.alpha / cfg.rank", "cfg.alpha / cfg.rank**0.5"),
    "frozen weight not added": ("LoRALinear.forward", "return y + self.scale", "return y * 0 + self.scale"),
    "A alone with its dropout": ("LoRALinear.forward", "F.dropout(x, self.dropout, self.training)", "F.dropout(x, 0.1, True)"),
}  # fmt: skip

MERGE_FAULTS = {
    "merged without the scale": ("_add", "sign * m.scale * product", "sign * product"),
    "merged and still added": ("LoRALinear.forward", "if self.merged:", "if False:"),
    "unmerged by adding": ("_add", "+ sign * m.scale", "+ m.scale"),
}

TABLE_FAULTS = {
    "q and k swapped": ("attn.q", "attn.k"),
    "k and v swapped": ("attn.k", "attn.v"),
    "gate and up swapped": ("mlp.gate", "mlp.up"),
}


@pytest.mark.parametrize("fault", CODE_FAULTS)
def test_parity_notices(fault: str, monkeypatch: pytest.MonkeyPatch):
    plant(monkeypatch, lora, *CODE_FAULTS[fault])
    golden, model = adapted()
    with pytest.raises(AssertionError, match="max difference"):
        assert_parity(read(model, golden.inputs["ids"]), golden.outputs["logits_lora_rope64"])


@pytest.mark.parametrize("fault", MERGE_FAULTS)
def test_parity_notices_in_merging(fault: str, monkeypatch: pytest.MonkeyPatch):
    plant(monkeypatch, lora, *MERGE_FAULTS[fault])
    golden, model = adapted()
    merge(model)
    with pytest.raises(AssertionError, match="max difference"):
        assert_parity(read(model, golden.inputs["ids"]), golden.outputs["logits_lora_rope64"])
        unmerge(model)
        assert_parity(read(model, golden.inputs["ids"]), golden.outputs["logits_lora_rope64"])


@pytest.mark.parametrize("fault", TABLE_FAULTS)
def test_parity_notices_in_the_table(fault: str):
    golden, model = adapted(swap(PEFT, *TABLE_FAULTS[fault]))
    with pytest.raises(AssertionError, match="max difference"):
        assert_parity(read(model, golden.inputs["ids"]), golden.outputs["logits_lora_rope64"])


def test_loading_notices_a_and_b_swapped():
    with pytest.raises(UserError, match=r"lora_[ab]: shape"):
        adapted(swap(PEFT, "lora_a", "lora_b"))


def test_loading_notices_an_adapted_lm_head(monkeypatch: pytest.MonkeyPatch):
    plant(
        monkeypatch,
        lora,
        "inject",
        "llama.layers.named_modules() if isinstance(m, nn.Linear)]\n    for",
        "llama.layers.named_modules() if isinstance(m, nn.Linear)]\n    llama.lm_head = LoRALinear(llama.lm_head, cfg)\n    for",
    )
    with pytest.raises(UserError, match=r"lm_head\.lora_a is missing \(2 such\)"):
        adapted()


# helpers


def base_weights(golden: goldens.Golden) -> dict[str, Tensor]:
    return {name: x for name, x in golden.weights.items() if "lora_" not in name}


def adapter(golden: goldens.Golden) -> dict[str, Tensor]:
    return {name: x for name, x in golden.weights.items() if "lora_" in name}


def base() -> tuple[goldens.Golden, Llama]:
    golden = goldens.load("lora")
    model = empty(golden.config)
    load_into(model, base_weights(golden), LLAMA)
    return golden, model


def adapted(table: Table = PEFT) -> tuple[goldens.Golden, Llama]:
    golden, model = base()
    lora.inject(model, LoRAConfig(golden.config["r"], golden.config["lora_alpha"], dropout=0.0))
    load_adapter(model, rename(adapter(golden), table))
    return golden, model


def transformer() -> transformers.LlamaForCausalLM:
    cfg = transformers.LlamaConfig(
        vocab_size=31,
        hidden_size=40,
        intermediate_size=56,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=96,
        rms_norm_eps=1e-5,
        rope_parameters={"rope_type": "default", "rope_theta": 500.0},
    )
    return WIDENED.LlamaForCausalLM(cfg)


def peft_of() -> peft.PeftModel:
    """rank 3, alpha 6; what it adds is random, as everything else is."""
    cfg = peft.LoraConfig(r=3, lora_alpha=6, lora_dropout=0.25, target_modules=TARGETS, task_type="CAUSAL_LM")
    return randomise(peft.get_peft_model(transformer(), cfg), seed=3)


def plain(theirs: peft.PeftModel | None = None) -> Llama:
    """Ours without LoRA, with the frozen weights of `theirs`."""
    theirs = theirs or peft_of()
    frozen = {
        name.removeprefix("base_model.model.").replace(".base_layer", ""): x
        for name, x in theirs.state_dict().items()
        if "lora_" not in name
    }
    ours = empty(theirs.config.to_dict() | {"rope_theta": 500.0})
    load_into(ours, {name: x.clone() for name, x in frozen.items()}, LLAMA)
    return ours


def pair() -> tuple[peft.PeftModel, Llama, Tensor]:
    theirs = peft_of()
    ours = plain(theirs)
    inject(ours, LoRAConfig(3, 6, dropout=0.25))
    load_adapter(ours, rename(peft.get_peft_model_state_dict(theirs), PEFT))
    ids = torch.randint(0, 31, (2, 9), generator=torch.Generator().manual_seed(0))
    return theirs, ours.eval(), ids


def save(theirs: peft.PeftModel, folder: Path, safe: bool = True) -> Path:
    theirs.save_pretrained(folder)
    if not safe:
        path = folder / "adapter_model.safetensors"
        torch.save(load_file(path), path.with_suffix(".bin"))
        path.unlink()
    return folder
