"""PEFT's LoRA of a Llama, a folder as `save_pretrained` writes it -> the A and B of `unifashion.lora`."""

import json
from pathlib import Path

from unifashion import UserError
from unifashion.llama import Llama
from unifashion.lora import LoRAConfig, inject, load_adapter
from weights.containers import read_checkpoint
from weights.rename import Table, rename, under

# fmt: off
MATRICES: Table = {
    # original        ours
    "lora_A.weight":  "lora_a",
    "lora_B.weight":  "lora_b",
}

LAYER: Table = {
    **under("self_attn.q_proj.",  "attn.q.",    MATRICES),
    **under("self_attn.k_proj.",  "attn.k.",    MATRICES),
    **under("self_attn.v_proj.",  "attn.v.",    MATRICES),
    **under("self_attn.o_proj.",  "attn.o.",    MATRICES),
    **under("mlp.gate_proj.",     "mlp.gate.",  MATRICES),
    **under("mlp.up_proj.",       "mlp.up.",    MATRICES),
    **under("mlp.down_proj.",     "mlp.down.",  MATRICES),
}

PEFT: Table = under("base_model.model.model.layers.#.", "layers.#.", LAYER)

# What adapter_config.json may say without changing what is computed; whatever else it says must be off.
NOTES = {
    "auto_mapping", "base_model_name_or_path", "inference_mode", "megatron_core", "peft_version", "qalora_group_size",
    "revision", "task_type",
}
# fmt: on
OFF = (None, False, "none", [], {})


def load_peft(llama: Llama, folder: Path) -> None:
    """
    Give `llama`, which has no LoRA yet, the one in `folder`: its rank, alpha, dropout and matrices.

    Raises UserError, in one line that names the file, for a file that is missing or damaged, for a kind of LoRA that ours
    is not, and unless names and shapes are `llama`'s (of wrong shapes `llama` keeps an untrained LoRA).
    """
    cfg = _config(folder / "adapter_config.json")
    path = folder / "adapter_model.safetensors"
    path = path if path.exists() else path.with_suffix(".bin")
    checkpoint = read_checkpoint(path)
    try:
        tensors = rename(checkpoint, PEFT)
        inject(llama, cfg)
        load_adapter(llama, tensors)
    except UserError as error:
        raise UserError(f"{path}: {error}") from None


def _config(path: Path) -> LoRAConfig:
    try:
        said = json.loads(path.read_text())
        cfg = LoRAConfig(int(said.pop("r")), float(said.pop("lora_alpha")), float(said.pop("lora_dropout")))
        targets = {name.rpartition(".")[2] for name in said["target_modules"]}  # each may have its whole path
    except Exception as error:  # what is no JSON, or another JSON, fails in a dozen ways
        reason = f"{type(error).__name__}: {error}"
        raise UserError(f"{path}: missing, damaged, or not PEFT's ({reason})") from None
    fine = {
        "peft_type": said.get("peft_type") == "LORA",
        "target_modules": targets == {row.split(".")[1] for row in LAYER},
        "init_lora_weights": said.get("init_lora_weights", True) in (True, False, "gaussian"),  # not PiSSA
    } | dict.fromkeys(NOTES, True)
    if odd := [name for name, value in said.items() if not fine.get(name, value in OFF)]:
        what = f"{odd[0]} is {said[odd[0]]!r}"
        raise UserError(f"{path}: {what}: not the LoRA of all linear layers but lm_head that is known here")
    return cfg
