"""The networks at full size, in float32, against transformers and diffusers on the same random numbers, through the tables.

    python -m pytest -m full -s tests/test_full_size.py

takes a quarter of an hour, 8 GB of memory and 8 GB of disk on two cores, and prints the largest difference relative to the largest
output. Small and in float64 the same comparisons are exact (test_vit.py and the others); here is what only full size could show.
"""

import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from PIL import Image
from torch import Tensor, nn
from transformers import (
    Blip2Config,
    Blip2ForImageTextRetrieval,
    CLIPConfig,
    CLIPModel,
    LlamaConfig,
    LlamaForCausalLM,
)

from tests import standin
from unifashion import llama
from unifashion.blocks import UNetConfig
from unifashion.clip import CLIP, L14, L14_336
from unifashion.config import FULL
from unifashion.qformer import QFormer
from unifashion.unet import UNet
from unifashion.vae import VAE
from unifashion.vit import ViT
from weights.clip import CLIPS
from weights.llama import llamas
from weights.qformer import QFORMERS, VITS
from weights.rename import Checkpoint, Layouts, load_layout
from weights.unet import UNETS
from weights.vae import VAES

pytestmark = [pytest.mark.full, pytest.mark.usefixtures("no_gradients")]
LIMIT = 1e-5
ROOT = Path(__file__).parent.parent


@pytest.fixture
def no_gradients():
    with torch.no_grad():
        yield


def test_vit_and_qformer_equal_transformers():
    theirs = blank(
        lambda: Blip2ForImageTextRetrieval(
            Blip2Config(
                qformer_config={"vocab_size": 30523, "use_qformer_text_input": True},
                image_text_hidden_size=256,
                num_query_tokens=32,
            )
        )
    )
    for name, x in theirs.state_dict().items():
        if name.endswith("qkv.bias"):
            x.chunk(3)[1].zero_()  # EVA-CLIP's keys have none
    theirs.vision_model.post_layernorm.eps = 1e-5  # ln_vision
    # as Hugging Face's file has it: without the buffers that its class makes again
    file = {k: x for k, x in theirs.state_dict().items() if "position_ids" not in k}
    eye, former = same(lambda: ViT(FULL.vit), file, VITS), same(lambda: QFormer(FULL.qformer), file, QFORMERS)
    image, ids = (
        noise(2, 3, 224, 224),
        torch.randint(1, 30522, (2, 64), generator=torch.Generator().manual_seed(2)),
    )
    mask = torch.arange(64) < torch.tensor([64, 20])[:, None]
    seen = former.ln_vision(eye(image))
    out = theirs(pixel_values=image, input_ids=ids, attention_mask=mask, use_image_text_matching_head=True)
    close("ViT-g, with ln_vision", seen, out.vision_model_output.last_hidden_state)
    z, text = former(seen, ids, mask)
    both = out.text_model_output.last_hidden_state
    close("Q-Former, its queries beside a text", z, both[:, :32])
    close("Q-Former, that text", text[mask], both[:, 32:][mask])
    close("Q-Former, match", former.itm_head(z).mean(1), out.logits_per_image)
    out = theirs(pixel_values=image, input_ids=ids, attention_mask=mask, use_image_text_matching_head=False)
    close("Q-Former, embeddings of a picture", former.embed_image(former(seen)[0]), out.image_embeds)
    close("Q-Former, embedding of a text", former.embed_text(former(ids=ids, mask=mask)[1]), out.text_embeds)


def test_vae_equals_diffusers():
    theirs = blank(
        lambda: AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            block_out_channels=(128, 256, 512, 512),
            layers_per_block=2,
            latent_channels=4,
        )
    )
    ours = same(lambda: VAE(FULL.vae), theirs.state_dict(), VAES)
    image, latent = noise(1, 3, 512, 384), noise(1, 4, 64, 48)
    close("VAE, encoder", ours.moments(image)[0], theirs.encode(image).latent_dist.mean)
    close("VAE, decoder", ours.decode(latent * FULL.vae.scale), theirs.decode(latent).sample)


@pytest.mark.parametrize("channels", [4, 9, 13])
def test_unet_equals_diffusers(channels: int):
    """With 13 these are the 686 tensors that StableVITON's shares with it; the rest is in no other library."""
    theirs = blank(
        lambda: UNet2DConditionModel(
            in_channels=channels,
            block_out_channels=(320, 640, 1280, 1280),
            layers_per_block=2,
            cross_attention_dim=768,
            attention_head_dim=8,  # the number of heads, in spite of its name
            down_block_types=("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
            up_block_types=("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3,
        )
    )
    ours = same(lambda: UNet(UNetConfig(in_channels=channels)), theirs.state_dict(), UNETS)
    x, context, t = noise(2, channels, 64, 48), noise(2, 32, 768), torch.tensor([981, 3])
    close(f"U-Net, {channels} channels", ours(x, t, ours.context(context)), theirs(x, t, context).sample)


def test_llama_of_full_width_equals_transformers():
    config = LlamaConfig(
        vocab_size=32000,
        hidden_size=4096,
        intermediate_size=11008,
        num_hidden_layers=2,
        num_attention_heads=32,
        rms_norm_eps=1e-5,
        max_position_embeddings=4096,
    )
    theirs = blank(lambda: LlamaForCausalLM(config))
    cfg = llama.LlamaConfig(depth=2)
    ours = same(lambda: llama.Llama(cfg), theirs.state_dict(), llamas(cfg.vocab_size))
    ids = torch.randint(3, 32000, (2, 100), generator=torch.Generator().manual_seed(2))
    close("Llama, 2 layers of 32", ours.logits(ours(ours.embed(ids))), theirs(input_ids=ids).logits)


@pytest.mark.parametrize(("name", "cfg"), [("L/14", L14), ("L/14-336", L14_336)])
def test_clip_equals_transformers(name: str, cfg):
    config = CLIPConfig(
        vision_config={
            "hidden_size": 1024,
            "intermediate_size": 4096,
            "num_hidden_layers": 24,
            "num_attention_heads": 16,
            "image_size": cfg.image.image_size,
            "patch_size": 14,
        },
        text_config={
            "hidden_size": 768,
            "intermediate_size": 3072,
            "num_hidden_layers": 12,
            "num_attention_heads": 12,
        },
        projection_dim=768,
    )
    theirs = blank(lambda: CLIPModel(config))
    ours = same(lambda: CLIP(cfg), theirs.state_dict(), CLIPS)
    image = noise(2, 3, cfg.image.image_size, cfg.image.image_size)
    out = theirs.vision_model(image, output_hidden_states=True)
    close(f"CLIP {name}, before the last block", ours.image(image, skip_last=1), out.hidden_states[-2])
    close(f"CLIP {name}, class token", ours.image.pooled(image), out.pooler_output)


def blank(make) -> nn.Module:
    """On the meta device, and then every number random, as in `parity.randomise`, but in float32: 1 billion of them."""
    with torch.device("meta"):
        module = make()
    module.to_empty(device="cpu").float().eval()
    generator = torch.Generator().manual_seed(0)
    for _, x in module.named_buffers():
        if not x.is_floating_point():  # position_ids
            x.copy_(torch.arange(x.numel()).view_as(x))
    for name, x in module.state_dict().items():
        if not x.is_floating_point():
            continue
        x.normal_(generator=generator)
        owner, _, leaf = name.rpartition(".")
        if x.ndim > 1 and leaf == "weight" and not isinstance(module.get_submodule(owner), nn.Embedding):
            x.div_(x[0].numel() ** 0.5)
        elif x.ndim > 1:
            x.mul_(0.45)
        elif leaf == "weight":
            x.mul_(0.25).add_(1)
        else:
            x.mul_(0.2)
    for part in module.modules():  # tables that are computed, and of which no file holds a number
        if hasattr(part, "inv_freq"):
            part.inv_freq.copy_(10000 ** (-torch.arange(0, 128, 2) / 128))
    return module


def same(make, file: Checkpoint, layouts: Layouts) -> nn.Module:
    """Our module with the very tensors of theirs."""
    with torch.device("meta"):
        module = make()
    load_layout(module, dict(file), layouts)
    return module.eval()


def noise(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1))


def close(what: str, ours: Tensor, theirs: Tensor) -> None:
    assert ours.shape == theirs.shape and theirs.std() > 1e-2, what
    relative = ((ours - theirs).abs().max() / theirs.abs().max()).item()
    print(f"\n{what:40} {relative:.1e}", end="")
    assert relative <= LIMIT, f"{what}: {relative:.1e}"


# Loading: StableVITON's file of 7.4 GB, as published but for its numbers, and a photograph of VITON-HD


def test_stableviton_draws_from_its_file_in_5_gb(tmp_path: Path):
    """bfloat16, box mask, null pose. Told, too, not tested: how long loading takes beside reading the file once, both uncached."""
    person, cloth = sample("photos/person/00034_00.jpg"), sample("photos/garment/048769_1.jpg")
    name, container = standin.FILES["stableviton_VITONHD"]
    file = Path(os.environ.get("UNIFASHION_STANDIN", tmp_path)) / name
    if not file.exists():
        standin.write(standin.standin("stableviton_VITONHD"), file, container)
    forget(file)
    start = time.perf_counter()
    with open(file, "rb", buffering=0) as stream:
        while stream.read(1 << 24):
            pass
    read = time.perf_counter() - start
    forget(file)
    out = tmp_path / "out.png"
    words = [sys.executable, "infer.py", "tryon", "--model", "stableviton", "--weights", str(file.parent)]
    words += ["--person", str(person), "--cloth", str(cloth), "--box", "150,250,620,760", "--dtype", "bf16"]
    words += ["--steps", "2", "--json", "--quiet", "--out", str(out)]
    process = subprocess.Popen(words, stdout=subprocess.PIPE, text=True, cwd=ROOT)
    most = 0
    while process.poll() is None:
        most = max(most, anonymous(process.pid))
        time.sleep(0.1)
    told = json.loads(process.stdout.read())
    assert process.returncode == 0 and Image.open(out).size == Image.open(person).size
    print(
        f"\n{file.stat().st_size / 1e9:.1f} GB: read in {read:.0f} s, loaded in {told['seconds_loading']} s;",
        end=" ",
    )
    print(f"2 steps in {told['seconds_sampling']} s; {most / 1e9:.2f} GB of anonymous memory", end="")
    assert most < 5e9


def anonymous(pid: int) -> int:
    """Bytes of memory that no file holds."""
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return 0
    found = re.search(r"RssAnon:\s+(\d+) kB", status)
    return int(found[1]) * 1024 if found else 0


def forget(file: Path) -> None:
    """The next reader reads it from the disk."""
    with open(file, "rb") as stream:
        os.fsync(stream.fileno())
        os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def sample(name: str) -> Path:
    folder = os.environ.get("UNIFASHION_SAMPLES")
    if not folder or not (Path(folder) / name).is_file():
        pytest.skip(f"UNIFASHION_SAMPLES names no folder with {name}")
    return Path(folder) / name
