"""Stand-ins for the published checkpoints: their names, types, shapes and containers, with random numbers.

    python -m tests.standin stableviton_VITONHD --out weights/files          at full size: 7.4 GB
    python -m tests.standin stableviton_VITONHD --out weights/files --dims 320=32,640=64,1280=128

Nobody here has the originals (27 GB): what loads these loads them, as far as their manifests are right.
"""

import argparse
import json
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from tests.published import published

# manifest -> where its file belongs in weights/files, and how it was saved: "zip", flat, or within the entry that is named
FILES = {
    "lavis_eva_vit_g": ("eva_vit_g.pth", "legacy"),
    "lavis_blip2_pretrained": ("blip2_pretrained.pth", "model"),
    "hf_blip2_itm_vit_g": ("blip2-itm-vit-g/model.safetensors", "safetensors"),
    "lavis_blip2_stage1_model_in_memory": ("tuned_clip_best.pt", "Blip2QformerCirCls"),
    "vicuna_7b_v1_5": ("vicuna-7b-v1.5/pytorch_model-*-of-00002.bin", "zip"),
    "llava_v1_5_7b_liuhaotian": ("llava-v1.5-7b/pytorch_model-*-of-00002.bin", "zip"),
    "llava_1_5_7b_hf": ("llava-1.5-7b-hf/model-*-of-00003.safetensors", "safetensors"),
    "llava_1_5_7b_hf_transformers5_names": ("llava-1.5-7b-hf/model-*-of-00003.safetensors", "safetensors"),
    "sd_v1_4_compvis": ("sd-v1-4.ckpt", "lightning"),
    "sd_v1_4_diffusers_unet": ("stable-diffusion-v1-4/unet/diffusion_pytorch_model.safetensors", "safetensors"),
    "sd_v1_4_diffusers_vae": ("stable-diffusion-v1-4/vae/diffusion_pytorch_model.safetensors", "safetensors"),
    "sd_v1_diffusers_vae_newnames": ("stable-diffusion-v1-4/vae/diffusion_pytorch_model.safetensors", "safetensors"),
    "sd_v1_4_diffusers_text_encoder": ("stable-diffusion-v1-4/text_encoder/model.safetensors", "safetensors"),
    "pbe_model_ckpt_compvis": ("paint-by-example/model.ckpt", "lightning"),
    "pbe_diffusers_unet": ("paint-by-example/unet/diffusion_pytorch_model.bin", "zip"),
    "pbe_diffusers_vae": ("paint-by-example/vae/diffusion_pytorch_model.bin", "zip"),
    "pbe_diffusers_image_encoder": ("paint-by-example/image_encoder/pytorch_model.bin", "zip"),
    "stableviton_VITONHD": ("VITONHD.ckpt", "lightning"),
    "stableviton_VITONHD_PBE_pose": ("VITONHD_PBE_pose.ckpt", "zip"),
    "stableviton_VITONHD_VAE_finetuning": ("VITONHD_VAE_finetuning.ckpt", "lightning"),
    "hf_clip_vit_l14": ("clip-vit-large-patch14/model.safetensors", "safetensors"),
    "hf_clip_vit_l14_336": ("clip-vit-large-patch14-336/pytorch_model.bin", "zip"),
    "hf_clip_vit_b16": ("clip-vit-base-patch16/pytorch_model.bin", "zip"),
    "openai_clip_vit_l14": ("clip-vit-large-patch14/ViT-L-14.pt", "torchscript"),
    "openai_clip_vit_b16": ("clip-vit-base-patch16/ViT-B-16.pt", "torchscript"),
    "open_clip_vit_l14": ("clip-vit-large-patch14/open_clip_pytorch_model.bin", "zip"),
    "open_clip_vit_b16": ("clip-vit-base-patch16/open_clip_pytorch_model.bin", "zip"),
    "pt_inception_2015_12_05": ("pt_inception-2015-12-05-6726825d.pth", "zip"),
    "torch_fidelity_inception_2015_12_05": ("weights-inception-2015-12-05-6726825d.pth", "zip"),
}  # fmt: skip
# Two names for one tensor, as BERT's language head has them: saved once.
TIED = {
    "Qformer.cls.predictions.decoder.weight": "Qformer.bert.embeddings.word_embeddings.weight",
    "Qformer.cls.predictions.decoder.bias": "Qformer.cls.predictions.bias",
}


def standin(name: str, dims: dict[int, int] | None = None, seed: int = 0) -> dict[str, Tensor]:
    """{original name: random numbers} of manifest `name`; `dims` {size: size instead}, for a smaller one."""
    generator = torch.Generator().manual_seed(seed)
    tensors: dict[str, Tensor] = {}
    for key, x in published(name).items():
        shape = [(dims or {}).get(size, size) for size in x.shape]
        if TIED.get(key) in tensors:
            tensors[key] = tensors[TIED[key]]
        elif x.is_floating_point():
            fan = np.prod(shape[1:]) ** -0.5 if len(shape) > 1 else 0.2
            noise = torch.randn(shape, generator=generator) * fan + (len(shape) == 1 and "weight" in key)
            tensors[key] = _without_key_bias(key, noise).to(x.dtype)
        else:
            tensors[key] = torch.arange(int(np.prod(shape)), dtype=x.dtype).reshape(shape)
    return tensors


def _without_key_bias(key: str, x: Tensor) -> Tensor:
    """Hugging Face's ViT-g has one for the keys: EVA-CLIP's have none, so that it is zero."""
    if key.endswith("self_attn.qkv.bias"):
        x.chunk(3)[1].zero_()
    return x


def write(tensors: dict[str, Tensor], path: Path, container: str) -> None:
    """In the container that `FILES` names; a * in the name of `path` is the shard's number, and an index lies beside them."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if "*" in path.name:
        return _write_shards(tensors, path, container)
    if container == "safetensors":
        save_file(tensors, path, metadata={"format": "pt"})
    elif container == "torchscript":
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # OpenAI's were written in 2021
            torch.jit.save(torch.jit.script(_modules(tensors)), path)
    elif container == "lightning":
        with lightning() as callback:
            moments = {"step": 3, "exp_avg": torch.zeros(4), "exp_avg_sq": torch.zeros(4)}
            content = {
                "epoch": 1,
                "global_step": 3,
                "pytorch-lightning_version": "1.4.2",
                "state_dict": tensors,
                "callbacks": {callback: {"best_model_score": np.float32(0.5), "monitor": "loss"}},
                "optimizer_states": [{"state": {0: moments}, "param_groups": [{"lr": 1e-4, "params": [0]}]}],
                "lr_schedulers": [],
            }
            torch.save(content, path)
    else:
        content = tensors if container in ("zip", "legacy") else {container: tensors, "epoch": 9}
        torch.save(content, path, _use_new_zipfile_serialization=container != "legacy")


def _write_shards(tensors: dict[str, Tensor], path: Path, container: str) -> None:
    n = int(path.stem.rpartition("-")[2])
    names, index = list(tensors), {}
    for i in range(n):
        shard = path.with_name(path.name.replace("*", f"{i + 1:05}"))
        mine = names[i * len(names) // n : (i + 1) * len(names) // n]
        write({name: tensors[name] for name in mine}, shard, container)
        index |= dict.fromkeys(mine, shard.name)
    stem, _, ending = path.name.partition("-*")
    suffix = ending.rpartition(".")[2]
    (path.parent / f"{stem}.{suffix}.index.json").write_text(json.dumps({"weight_map": index}))


class _Blank(nn.Module):
    def forward(self) -> int:
        return 0


def _modules(tensors: dict[str, Tensor]) -> nn.Module:
    """A module with the tensors as its parameters, each in a module of its name."""
    root = _Blank()
    for name, x in tensors.items():
        *way, leaf = name.split(".")
        module = root
        for step in way:
            if not hasattr(module, step):
                module.add_module(step, _Blank())
            module = getattr(module, step)
        module.register_parameter(leaf, nn.Parameter(x, requires_grad=False))
    # three numbers that OpenAI keeps beside them
    for name in ("input_resolution", "context_length", "vocab_size"):
        root.register_buffer(name, torch.tensor(7))
    return root


@contextmanager
def lightning() -> Iterator[type]:
    """Within it pytorch_lightning's ModelCheckpoint, a class that its checkpoints name, can be pickled: the writer has Lightning."""
    name = "pytorch_lightning.callbacks.model_checkpoint"
    module = ModuleType(name)
    module.ModelCheckpoint = type("ModelCheckpoint", (), {"__module__": name})
    parts = ("pytorch_lightning", "pytorch_lightning.callbacks", name)
    sys.modules |= dict.fromkeys(parts, module)
    try:
        yield module.ModelCheckpoint
    finally:
        for part in parts:
            del sys.modules[part]


def main() -> None:
    parser = argparse.ArgumentParser(prog="tests.standin", description=__doc__.split("\n")[0])
    parser.add_argument("names", nargs="+", choices=FILES, metavar="NAME", help=", ".join(FILES))
    parser.add_argument("--out", type=Path, required=True, help="folder, such as weights/files")
    parser.add_argument("--dims", default="", help="size=size,...: a smaller one (default: full size)")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    dims = {int(a): int(b) for a, _, b in (pair.partition("=") for pair in args.dims.split(",") if pair)}
    for name in args.names:
        file, container = FILES[name]
        write(standin(name, dims, args.seed), args.out / file, container)
        print(args.out / file)


if __name__ == "__main__":
    main()
