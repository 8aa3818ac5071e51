"""The published files: where each is from, how large, under what licence, and what it is for. weights/README.md tells it."""

from pathlib import Path
from typing import NamedTuple

LAVIS = "https://storage.googleapis.com/sfr-vision-language-research/LAVIS/models/BLIP2"
HUB = "https://huggingface.co"


class File(NamedTuple):
    source: str  # what to get, and from where
    size: int  # in bytes, of all the files in a folder
    licence: str
    sha256: str = ""
    exact: bool = True  # whether the size is known to the byte


# Name in weights/files, with a / behind a folder's
FILES = {
    "eva_vit_g.pth": File(
        f"{LAVIS}/eva_vit_g.pth",
        2_025_249_237,
        "none stated",
        "99d2bb36c6b52c94fe6e2e12373afb27de57ae81378c3d8c53bf0e83b0f4275f",
    ),
    "blip2_pretrained.pth": File(
        f"{LAVIS}/blip2_pretrained.pth",
        746_998_955,
        "BSD-3",
        "f31f96e4a97ce9ac7a140ea1961b8a871822ae1cd0a23f0f1122fbefd70db9f0",
    ),
    "bert_vocab.txt": File(
        f"vocab.txt of {HUB}/bert-base-uncased, saved under this name",
        231_508,
        "Apache-2.0",
        "07eced375cec144d27c900241f3e339478dec958f92fddbc551f295c992038a3",
    ),
    "blip2-itm-vit-g/": File(
        f"model.safetensors of {HUB}/Salesforce/blip2-itm-vit-g", 4_690_000_000, "MIT", exact=False
    ),
    "llava-1.5-7b-hf/": File(
        f"model-0000{{1,2,3}}-of-00003.safetensors and tokenizer.model of {HUB}/llava-hf/llava-1.5-7b-hf",
        14_130_000_000,
        "Llama 2",
        exact=False,
    ),
    "llava-v1.5-7b/": File(
        f"pytorch_model-0000{{1,2}}-of-00002.bin and tokenizer.model of {HUB}/liuhaotian/llava-v1.5-7b",
        13_520_000_000,
        "Llama 2",
        exact=False,
    ),
    "clip-vit-large-patch14-336/": File(
        f"pytorch_model.bin of {HUB}/openai/clip-vit-large-patch14-336", 1_710_000_000, "MIT", exact=False
    ),
    "vicuna-7b-v1.5/": File(
        f"pytorch_model-0000{{1,2}}-of-00002.bin and tokenizer.model of {HUB}/lmsys/vicuna-7b-v1.5",
        13_480_000_000,
        "Llama 2",
        exact=False,
    ),
    "VITONHD.ckpt": File(
        f"ckpts/VITONHD.ckpt of {HUB}/rlawjdghek/StableVITON",
        10_198_120_487,
        "CC BY-NC-SA 4.0",
        "d4e44bc58b68f289cd7c1660e06a0db5f6fcb5786c037c9e8217eea45a75688f",
    ),
    "VITONHD_PBE_pose.ckpt": File(
        f"ckpts/VITONHD_PBE_pose.ckpt of {HUB}/rlawjdghek/StableVITON",
        7_360_000_000,
        "CC BY-NC-SA 4.0",
        exact=False,
    ),
    "VITONHD_VAE_finetuning.ckpt": File(
        f"ckpts/VITONHD_VAE_finetuning.ckpt of {HUB}/rlawjdghek/StableVITON",
        790_000_000,
        "CC BY-NC-SA 4.0",
        exact=False,
    ),
    "paint-by-example/": File(
        f"model.safetensors (refs/pr/3), or model.ckpt (12.6 GB), or unet/, vae/ and image_encoder/, of {HUB}/Fantasy-Studio/Paint-by-Example",
        5_240_000_000,
        "OpenRAIL-M",
        exact=False,
    ),
    "clip-vit-large-patch14/": File(
        f"model.safetensors and merges.txt of {HUB}/openai/clip-vit-large-patch14",
        1_711_065_159,
        "MIT",
        exact=False,
    ),
    "pt_inception-2015-12-05-6726825d.pth": File(
        "https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/pt_inception-2015-12-05-6726825d.pth",
        95_600_000,
        "Apache-2.0",
        exact=False,
    ),
    "tuned_clip_best.pt": File(
        f"what the official scripts save; {HUB}/UniFashion/UniFashion is said to have it: not seen", 0, "that of what it came from", exact=False
    ),
    "unifashion/": File(
        "it by train_phase1.py and train_phase2.py: copy RUN/best/model.safetensors there", 0, "that of what it came from", exact=False
    ),
}  # fmt: skip

BLIP2 = ("eva_vit_g.pth", "blip2_pretrained.pth", "bert_vocab.txt")
BLIP2_PORT = ("blip2-itm-vit-g/", "bert_vocab.txt")
BLIP2_TUNED = ("tuned_clip_best.pt", "bert_vocab.txt")
# What the files are for: any of these sets will do, and the first that is there is taken, good or not
USES = {
    "infer.py index, search --model blip2": (BLIP2, BLIP2_PORT, BLIP2_TUNED),
    "infer.py caption --model llava": (
        ("llava-1.5-7b-hf/",),
        ("llava-v1.5-7b/", "clip-vit-large-patch14-336/"),
    ),
    "infer.py tryon --model stableviton": (("VITONHD.ckpt",),),
    "infer.py tryon --model paint-by-example": (("paint-by-example/",),),
    "training of all of UniFashion": tuple(
        (*blip2, llm, tryon, *vae)
        for blip2 in (BLIP2, BLIP2_PORT, BLIP2_TUNED)
        for vae in (("VITONHD_VAE_finetuning.ckpt",), ())
        for tryon in ("VITONHD_PBE_pose.ckpt", "VITONHD.ckpt")
        for llm in ("vicuna-7b-v1.5/", "llava-v1.5-7b/", "llava-1.5-7b-hf/")
    ),
    "CLIP-S of eval.generation": (("clip-vit-large-patch14/",),),
    "FID and KID of eval.generation": (("pt_inception-2015-12-05-6726825d.pth",),),
}


def find(folder: Path, *names: str) -> Path | None:
    """The first of `names` that is in `folder`, or what `weights.convert` has made of it; None if none is."""
    for name in names:
        for path in (folder / name, (folder / name).with_suffix(".safetensors")):
            if path.exists():
                return path
    return None


def source_of(name: str) -> str:
    """What to do for `name`, a file or a folder in weights/files, or a file in a folder there."""
    known = FILES.get(name) or FILES[f"{name.split('/')[0]}/"]
    return f"get {known.source}"
