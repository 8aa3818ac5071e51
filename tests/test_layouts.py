"""Every published checkpoint that a table reads: its names and shapes at full size, in its container, and against its twins.

No original is at hand. What stands in for them has their names, types, shapes and containers (tests/manifests, standin.py);
rules that were written down apart from our tables (`REWRITES`) turn one layout of a network into another.
"""

import random
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from eval.metrics.inception import InceptionV3
from tests.parity import swap
from tests.published import MANIFESTS, published
from tests.standin import FILES, standin, write
from unifashion import UserError
from unifashion.blocks import UNetConfig
from unifashion.clip import B16, CLIP, L14, L14_336, ImageConfig
from unifashion.config import FULL
from unifashion.exemplar import ExemplarConfig
from unifashion.llama import Llama
from unifashion.llava import LLAVA_7B, LLaVA
from unifashion.qformer import QFormer
from unifashion.stableviton import PUBLISHED, StableVITON, StableVITONConfig
from unifashion.unet import UNet
from unifashion.vae import VAE, VAEConfig
from unifashion.vit import ViT
from weights import exemplar
from weights.clip import CLIPS
from weights.containers import read_checkpoint, read_folder
from weights.exemplar import load_published
from weights.inception import INCEPTION
from weights.llama import llamas, without_appended
from weights.llava import HF, ORIGINAL, llavas
from weights.qformer import QFORMERS, VITS
from weights.rename import Checkpoint, Layout, Layouts, blank, layout_of, load_layout, rename
from weights.unet import UNETS
from weights.vae import VAES


def unet(channels: int) -> Callable[[], UNet]:
    return lambda: UNet(UNetConfig(in_channels=channels))


def image_encoder() -> nn.Module:
    model = StableVITON(PUBLISHED["paint-by-example"])
    parts = nn.ModuleDict({"image": model.image, "exemplar": model.exemplar})
    parts.register_parameter("null_context", model.null_context)
    return parts


def without_tower() -> nn.Module:
    model = LLaVA(LLAVA_7B)
    return nn.ModuleDict({"projector": model.projector, "llama": model.llama})


def with_convs(file: Checkpoint) -> Checkpoint:
    with torch.device("meta"):
        return exemplar.as_ours(file, blank(stableviton))


def stableviton() -> StableVITON:
    return StableVITON(PUBLISHED["stableviton"])


INCEPTIONS: Layouts = {"Conv2d_1a_3x3.conv.weight": Layout(INCEPTION)}
ROWS = FULL.llama.vocab_size
STABLEVITONS: Layouts = {"learnable_vector": Layout(exemplar.STABLEVITON, with_convs)}
# manifest -> what reads it: a module of full size, and the layouts it is read by
READ: dict[str, list[tuple[Callable[[], nn.Module], Layouts]]] = {
    "lavis_eva_vit_g": [(lambda: ViT(FULL.vit), VITS)],
    "lavis_blip2_pretrained": [(lambda: QFormer(FULL.qformer), QFORMERS)],
    "hf_blip2_itm_vit_g": [(lambda: ViT(FULL.vit), VITS), (lambda: QFormer(FULL.qformer), QFORMERS)],
    "lavis_blip2_stage1_model_in_memory": [(lambda: ViT(FULL.vit), VITS), (lambda: QFormer(FULL.qformer), QFORMERS)],
    "sd_v1_4_diffusers_unet": [(unet(4), UNETS)],
    "pbe_diffusers_unet": [(unet(9), UNETS)],
    "stableviton_VITONHD_VAE_finetuning": [(lambda: VAE(FULL.vae), VAES)],
    "sd_v1_4_diffusers_vae": [(lambda: VAE(FULL.vae), VAES)],
    "sd_v1_diffusers_vae_newnames": [(lambda: VAE(FULL.vae), VAES)],
    "pbe_diffusers_vae": [(lambda: VAE(FULL.vae), VAES)],
    "hf_clip_vit_l14": [(lambda: CLIP(L14), CLIPS)],
    "hf_clip_vit_l14_336": [(lambda: CLIP(L14_336), CLIPS)],
    "hf_clip_vit_b16": [(lambda: CLIP(B16), CLIPS)],
    "openai_clip_vit_l14": [(lambda: CLIP(L14), CLIPS)],
    "openai_clip_vit_b16": [(lambda: CLIP(B16), CLIPS)],
    "open_clip_vit_l14": [(lambda: CLIP(L14), CLIPS)],
    "open_clip_vit_b16": [(lambda: CLIP(B16), CLIPS)],
    "vicuna_7b_v1_5": [(lambda: Llama(FULL.llama), llamas(ROWS))],
    "llava_v1_5_7b_liuhaotian": [(lambda: Llama(FULL.llama), llamas(ROWS)), (without_tower, {"lm_head.weight": Layout(ORIGINAL)})],
    "llava_1_5_7b_hf": [(lambda: Llama(FULL.llama), llamas(ROWS)), (lambda: LLaVA(LLAVA_7B), llavas(ROWS))],
    "llava_1_5_7b_hf_transformers5_names": [(lambda: Llama(FULL.llama), llamas(ROWS)), (lambda: LLaVA(LLAVA_7B), llavas(ROWS))],
    "stableviton_VITONHD": [(stableviton, STABLEVITONS)],
    "stableviton_VITONHD_PBE_pose": [(stableviton, STABLEVITONS)],
    "pbe_model_ckpt_compvis": [
        (lambda: StableVITON(PUBLISHED["paint-by-example"]), {"learnable_vector": Layout(exemplar.PAINT_BY_EXAMPLE, exemplar.unfused)})
    ],
    "pbe_diffusers_image_encoder": [(image_encoder, {"uncond_vector": Layout(exemplar.DIFFUSERS)})],
    "pt_inception_2015_12_05": [(InceptionV3, INCEPTIONS)],
    "torch_fidelity_inception_2015_12_05": [(InceptionV3, INCEPTIONS)],
}  # fmt: skip
IGNORED = re.compile(
    r"(^|\.)(position_ids|inv_freq|num_batches_tracked)$|^loss\.|^Qformer\.cls\.|^query_proj\."
)
SMALL = {  # sizes of small stand-ins; 257 and 577 positions are those of 2 by 2 patches
    1408: 24, 4224: 72, 6144: 40, 30523: 37, 512: 20, 257: 5, 577: 5, 197: 5, 768: 12, 2304: 36, 3072: 48, 1536: 60, 256: 8,
    320: 32, 640: 64, 960: 96, 1280: 128, 1920: 192, 2560: 256, 5120: 40, 10240: 80, 1024: 16, 4096: 44, 49408: 51, 2048: 26,
    32000: 40, 32064: 104, 11008: 36,
}  # fmt: skip
CASES = [(name, i) for name, readers in READ.items() for i in range(len(readers))]


# names and shapes, at full size


@pytest.mark.parametrize(("name", "i"), CASES)
def test_a_network_of_full_size_is_filled_from_the_published_names(name: str, i: int):
    fill(name, i, published(name))


@pytest.mark.parametrize(("name", "i"), CASES)
def test_a_single_fault_of_a_file_is_an_error_that_names_it(name: str, i: int):
    whole = published(name)
    layout = layout_of(whole, READ[name][i][1])
    used = [key for key in whole if reads(layout, key)]
    assert len(used) > 85
    for key in random.Random(name).sample(used, 1):
        part = re.escape(key)
        file = {k: x for k, x in whole.items() if k != key}
        with pytest.raises(UserError, match=part):
            fill(name, i, file)
        with pytest.raises(UserError, match=part):
            fill(name, i, whole | {key: torch.empty(*whole[key].shape, 3, device="meta")})
        with pytest.raises(UserError, match=part):
            fill(name, i, whole | {f"{key}_": whole[key]})
    with pytest.raises(UserError, match=r"^a\.stray\.name: no row of the table names it$"):
        fill(name, i, whole | {"a.stray.name": torch.empty(2, device="meta")})


@pytest.mark.full
@pytest.mark.parametrize(("name", "i"), CASES)
def test_whatever_is_missing_is_named(name: str, i: int):
    """A tensor of every kind, layer numbers aside."""
    whole = published(name)
    layout = layout_of(whole, READ[name][i][1])
    kinds = {re.sub(r"\d+", "#", key): key for key in whole if reads(layout, key)}
    for key in kinds.values():
        with pytest.raises(UserError, match=re.escape(key)):
            fill(name, i, {k: x for k, x in whole.items() if k != key})


def reads(layout: Layout, key: str) -> bool:
    """Whether the table reads tensor `key`: not if a row leaves it out."""
    left = [row for row, ours in layout.table.items() if ours is None]
    rows = [re.escape(row).replace(r"\#", r"\d+").replace(r"\*", ".+") for row in left]
    names = key, f"{key}[q]"  # of a fused projection, its thirds
    return not any(re.fullmatch(row, name) for row in rows for name in names)


def fill(name: str, i: int, file: Checkpoint) -> None:
    make, layouts = READ[name][i]
    load_layout(blank(make), file, layouts)


# containers


@pytest.mark.parametrize("name", READ)
def test_a_stand_in_in_its_published_container_loads(name: str, tmp_path: Path):
    tensors, (file, container) = standin(name, SMALL), FILES[name]
    path = tmp_path / file
    write(tensors, path, container)
    read = read_folder(path.parent) if "*" in file else read_checkpoint(path)
    assert {k: x.dtype for k, x in read.items() if k in tensors} == {k: x.dtype for k, x in tensors.items()}
    for _, layouts in READ[name]:
        ours, theirs = loaded(read, layouts), loaded(tensors, layouts)
        assert ours.keys() == theirs.keys()
        # but for what StableVITON's file has not, and ours has zeros for
        assert all(x.is_meta or torch.equal(x, theirs[k]) for k, x in ours.items())


# one network in two layouts: a part, how it is read, a file, and what the file's numbers are under the other's names


def hugging_face_blip2(lavis: Checkpoint) -> Checkpoint:
    rules = [
        (r"^visual_encoder\.cls_token$", "vision_model.embeddings.class_embedding"),
        (r"^visual_encoder\.pos_embed$", "vision_model.embeddings.position_embedding"),
        (r"^visual_encoder\.patch_embed\.proj\.", "vision_model.embeddings.patch_embedding."),
        (r"^visual_encoder\.blocks\.", "vision_model.encoder.layers."),
        (r"^(vision_model.*)\.norm([12])\.", r"\1.layer_norm\2."),
        (r"\.attn\.qkv\.", ".self_attn.qkv."),
        (r"\.attn\.proj\.", ".self_attn.projection."),
        (r"^ln_vision\.", "vision_model.post_layernorm."),
        (r"^Qformer\.bert\.embeddings\.LayerNorm\.", "qformer.layernorm."),
        (r"^Qformer\.bert\.embeddings\.", "embeddings."),
        (r"^Qformer\.bert\.", "qformer."),
        (r"attention\.self\.", "attention.attention."),
        (r"^(vision|text)_proj\.", r"\1_projection."),
    ]
    file = rewrite(lavis, rules)
    for q in [name for name in file if name.endswith("attn.q_bias")]:
        v, stem = q.replace("q_bias", "v_bias"), q.removesuffix(".attn.q_bias")
        bias = torch.cat([file[q], torch.zeros_like(file[q]), file[v]])
        file = {k: x for k, x in file.items() if k not in (q, v)} | {f"{stem}.self_attn.qkv.bias": bias}
    return {name: x for name, x in file.items() if name != "temp"}


def diffusers_unet(compvis: Checkpoint) -> Checkpoint:
    def place(match: re.Match) -> str:
        side, n, j, rest = match[1], int(match[2]), int(match[3]), match[4]
        if side == "input" and n == 0:
            return f"conv_in.{rest}"
        level, k = divmod(n - (side == "input"), 3)
        part = "down_blocks" if side == "input" else "up_blocks"
        if rest.startswith("op."):
            return f"{part}.{level}.downsamplers.0.conv.{rest.removeprefix('op.')}"
        if side == "output" and rest.startswith("conv."):
            return f"{part}.{level}.upsamplers.0.{rest}"
        return f"{part}.{level}.{('resnets', 'attentions')[j]}.{k}.{rest}"

    file = {
        re.sub(r"^(input|output)_blocks\.(\d+)\.(\d)\.(.+)", place, name): x for name, x in compvis.items()
    }
    rules = [
        (r"^time_embed\.0\.", "time_embedding.linear_1."),
        (r"^time_embed\.2\.", "time_embedding.linear_2."),
        (r"^out\.0\.", "conv_norm_out."),
        (r"^out\.2\.", "conv_out."),
        (r"^middle_block\.0\.", "mid_block.resnets.0."),
        (r"^middle_block\.1\.", "mid_block.attentions.0."),
        (r"^middle_block\.2\.", "mid_block.resnets.1."),
        (r"\.in_layers\.0\.", ".norm1."),
        (r"\.in_layers\.2\.", ".conv1."),
        (r"\.emb_layers\.1\.", ".time_emb_proj."),
        (r"\.out_layers\.0\.", ".norm2."),
        (r"\.out_layers\.3\.", ".conv2."),
        (r"\.skip_connection\.", ".conv_shortcut."),
    ]
    return rewrite(file, rules)


def diffusers_vae(compvis: Checkpoint) -> Checkpoint:
    rules = [
        (r"^encoder\.down\.(\d)\.block\.", r"encoder.down_blocks.\1.resnets."),
        (r"^encoder\.down\.(\d)\.downsample\.", r"encoder.down_blocks.\1.downsamplers.0."),
        *[(rf"^decoder\.up\.{i}\.block\.", f"decoder.up_blocks.{3 - i}.resnets.") for i in range(4)],
        *[(rf"^decoder\.up\.{i}\.upsample\.", f"decoder.up_blocks.{3 - i}.upsamplers.0.") for i in range(4)],
        (r"\.mid\.block_1\.", ".mid_block.resnets.0."),
        (r"\.mid\.block_2\.", ".mid_block.resnets.1."),
        (r"\.mid\.attn_1\.norm\.", ".mid_block.attentions.0.group_norm."),
        (r"\.mid\.attn_1\.([qkv])\.", r".mid_block.attentions.0.to_\1."),
        (r"\.mid\.attn_1\.proj_out\.", ".mid_block.attentions.0.to_out.0."),
        (r"\.nin_shortcut\.", ".conv_shortcut."),
        (r"^(encoder|decoder)\.norm_out\.", r"\1.conv_norm_out."),
    ]
    file = rewrite(compvis, rules)
    return {k: x[:, :, 0, 0] if "attentions.0" in k and x.ndim == 4 else x for k, x in file.items()}


def old_diffusers_vae(compvis: Checkpoint) -> Checkpoint:
    old = [("to_q", "query"), ("to_k", "key"), ("to_v", "value"), (r"to_out\.0", "proj_attn")]
    return rewrite(diffusers_vae(compvis), [(rf"\.{new}\.", f".{name}.") for new, name in old])


def hugging_face_clip(openai: Checkpoint) -> Checkpoint:
    file: Checkpoint = {}
    for name, x in openai.items():
        if name in ("visual.proj", "text_projection"):
            file[{"visual.proj": "visual_projection.weight"}.get(name, f"{name}.weight")] = x.T.contiguous()
        elif "in_proj_" in name:
            for part, third in zip("qkv", x.chunk(3), strict=True):
                file[name.replace("attn.in_proj_", f"self_attn.{part}_proj.")] = third
        else:
            file[name] = x
    rules = [
        (r"^visual\.class_embedding$", "vision_model.embeddings.class_embedding"),
        (r"^visual\.positional_embedding$", "vision_model.embeddings.position_embedding.weight"),
        (r"^visual\.conv1\.", "vision_model.embeddings.patch_embedding."),
        (r"^visual\.ln_pre\.", "vision_model.pre_layrnorm."),
        (r"^visual\.ln_post\.", "vision_model.post_layernorm."),
        (r"^positional_embedding$", "text_model.embeddings.position_embedding.weight"),
        (r"^token_embedding\.", "text_model.embeddings.token_embedding."),
        (r"^ln_final\.", "text_model.final_layer_norm."),
        (r"^visual\.transformer\.resblocks\.", "vision_model.encoder.layers."),
        (r"^transformer\.resblocks\.", "text_model.encoder.layers."),
        (r"\.ln_([12])\.", r".layer_norm\1."),
        (r"\.c_fc\.", ".fc1."),
        (r"\.c_proj\.", ".fc2."),
        (r"\.attn\.out_proj\.", ".self_attn.out_proj."),
    ]
    return rewrite(file, rules)


def llava_hf_llm(liuhaotian: Checkpoint) -> Checkpoint:
    """Its LLM: with 64 rows more, which are never trained."""
    file = {k: x for k, x in liuhaotian.items() if "mm_projector" not in k}
    more = ("model.embed_tokens.weight", "lm_head.weight")
    file |= {name: torch.cat([file[name], torch.ones(64, file[name].shape[1]).half()]) for name in more}
    return rewrite(file, [(r"^model\.", "language_model.model."), (r"^lm_head\.", "language_model.lm_head.")])


def transformers_5(disk: Checkpoint) -> Checkpoint:
    rules = [
        (r"^language_model\.lm_head", "lm_head"),
        (r"^language_model\.model", "model.language_model"),
        (r"^vision_tower\.vision_model", "model.vision_tower"),
        (r"^multi_modal_projector", "model.multi_modal_projector"),
    ]
    return rewrite(disk, rules)


def transformers_4_52(disk: Checkpoint) -> Checkpoint:
    return rewrite(transformers_5(disk), [(r"^model\.vision_tower", "model.vision_tower.vision_model")])


def rewrite(file: Checkpoint, rules: list[tuple[str, str | Callable]]) -> Checkpoint:
    for pattern, by in rules:
        file = {re.sub(pattern, by, name): x for name, x in file.items()}
    return file


def llava_hf_5_llm(liuhaotian: Checkpoint) -> Checkpoint:
    return transformers_5(llava_hf_llm(liuhaotian))


def liuhaotian(disk: Checkpoint) -> Checkpoint:
    """Without the image tower, and without the rows that were appended."""
    file = {
        k: x[:40] if k.endswith(("embed_tokens.weight", "lm_head.weight")) else x for k, x in disk.items()
    }
    rules = [
        (r"^language_model\.model", "model"),
        (r"^language_model\.lm_head", "lm_head"),
        (r"^multi_modal_projector\.linear_(\d)", lambda m: f"model.mm_projector.{2 * int(m[1]) - 2}"),
    ]
    return rewrite({k: x for k, x in file.items() if not k.startswith("vision_tower.")}, rules)


# LLaVA but for its image tower, which the original keeps in CLIP's own file
TOWERLESS: Layouts = {
    "vision_tower.vision_model.embeddings.class_embedding": Layout(
        {row: None if ours and ours.startswith("image.") else ours for row, ours in HF.items()},
        partial(without_appended, 40),
    ),
    "model.mm_projector.0.weight": Layout(ORIGINAL),
}

COMPVIS_UNET, COMPVIS_VAE = "model.diffusion_model.", "first_stage_model."
# part: the layouts, the manifest of one file and what of it is the part's, how it is rewritten, the manifest of the other
TWINS = {
    "ViT, LAVIS and Hugging Face": (VITS, "lavis_blip2_stage1_model_in_memory", "", hugging_face_blip2, "hf_blip2_itm_vit_g"),
    "Q-Former, LAVIS and Hugging Face": (QFORMERS, "lavis_blip2_stage1_model_in_memory", "", hugging_face_blip2, "hf_blip2_itm_vit_g"),
    "ViT alone and in UniFashion's .pt": (VITS, "lavis_blip2_stage1_model_in_memory", "visual_encoder.", dict, "lavis_eva_vit_g"),
    "U-Net of SD, CompVis and diffusers": (UNETS, "sd_v1_4_compvis", COMPVIS_UNET, diffusers_unet, "sd_v1_4_diffusers_unet"),
    "U-Net of Paint-by-Example, CompVis and diffusers": (UNETS, "pbe_model_ckpt_compvis", COMPVIS_UNET, diffusers_unet, "pbe_diffusers_unet"),
    "VAE, CompVis and diffusers": (VAES, "stableviton_VITONHD_VAE_finetuning", "", diffusers_vae, "sd_v1_diffusers_vae_newnames"),
    "VAE, CompVis and old diffusers": (VAES, "sd_v1_4_compvis", "first_stage_model.", old_diffusers_vae, "sd_v1_4_diffusers_vae"),
    "CLIP L/14, OpenAI and Hugging Face": (CLIPS, "openai_clip_vit_l14", "", hugging_face_clip, "hf_clip_vit_l14"),
    "CLIP B/16, OpenAI and Hugging Face": (CLIPS, "open_clip_vit_b16", "", hugging_face_clip, "hf_clip_vit_b16"),
    "LLM, Vicuna's names and llava-hf's": (llamas(40), "llava_v1_5_7b_liuhaotian", "", llava_hf_llm, ""),
    "LLM, Vicuna's names and transformers 5's": (llamas(40), "llava_v1_5_7b_liuhaotian", "", llava_hf_5_llm, ""),
    "LLaVA, llava-hf and liuhaotian": (TOWERLESS, "llava_1_5_7b_hf", "", liuhaotian, ""),
    "LLaVA, llava-hf and transformers 5": (llavas(40), "llava_1_5_7b_hf", "", transformers_5, "llava_1_5_7b_hf_transformers5_names"),
    "LLaVA, llava-hf and transformers 4.52": (llavas(40), "llava_1_5_7b_hf", "", transformers_4_52, ""),
}  # fmt: skip
# Two of our names of one shape, which a table may exchange and no shape tells
EXCHANGED = {
    "ViT, LAVIS and Hugging Face": [("norm1", "norm2"), ("q_bias", "v_bias")],
    "Q-Former, LAVIS and Hugging Face": [
        ("query_mlp.norm", "text_mlp.norm"),
        ("vision_proj", "text_proj"),
        ("attn.q", "attn.k"),
    ],
    "U-Net of SD, CompVis and diffusers": [
        ("attn1.q", "attn1.k"),
        ("norm1", "norm3"),
        ("middle_in", "middle_out"),
    ],
    "VAE, CompVis and diffusers": [("1.q", "1.k"), ("middle.0", "middle.2")],
    "VAE, CompVis and old diffusers": [("1.v", "1.out")],
    "CLIP L/14, OpenAI and Hugging Face": [
        ("norm1", "norm2"),
        ("norm_pre", "norm_post"),
        ("attn.q", "attn.v"),
    ],
    "LLM, Vicuna's names and llava-hf's": [
        ("attn_norm", "mlp_norm"),
        ("mlp.gate", "mlp.up"),
        ("attn.q", "attn.o"),
    ],
    "LLM, Vicuna's names and transformers 5's": [("embed", "lm_head"), ("mlp.gate", "mlp.up")],
    "LLaVA, llava-hf and liuhaotian": [("embed", "lm_head"), ("mlp.gate", "mlp.up")],
    "LLaVA, llava-hf and transformers 5": [("attn_norm", "mlp_norm"), ("image.norm_pre", "image.norm_post")],
}


@pytest.mark.parametrize("part", TWINS)
def test_two_layouts_of_a_network_give_the_same_numbers_bit_for_bit(part: str):
    layouts, one, other = twins(part)
    assert differences(loaded(one, layouts), loaded(other, layouts)) == []


@pytest.mark.parametrize("part", EXCHANGED)
def test_a_row_that_exchanges_two_tensors_of_one_shape_is_named(part: str):
    layouts, one, other = twins(part)
    for ours, theirs in EXCHANGED[part]:
        name, layout = next((n, x) for n, x in layouts.items() if n in other)
        wrong = {name: Layout(swap(layout.table, ours, theirs), layout.transform)}
        found = differences(loaded(one, layouts), loaded(other, wrong))
        assert found and all(ours in name or theirs in name for name in found)


def test_a_port_whose_keys_have_a_bias_is_refused_and_its_temperature_is_blip2s():
    file = standin("hf_blip2_itm_vit_g", SMALL)
    assert loaded(file, QFORMERS)["temp"].item() == pytest.approx(0.07)
    name = "vision_model.encoder.layers.7.self_attn.qkv.bias"
    n = len(file[name]) // 3
    file[name][n] = 1e-6
    with pytest.raises(UserError, match=rf"^{name}: its keys have a bias"):
        loaded(file, VITS)


def twins(part: str) -> tuple[Layouts, Checkpoint, Checkpoint]:
    layouts, manifest, under, turn, other = TWINS[part]
    one = {k.removeprefix(under): x for k, x in standin(manifest, SMALL).items() if k.startswith(under)}
    two = turn({k: x.clone() for k, x in one.items() if not IGNORED.search(k)})
    if other:  # the rules, too, come to the published names
        names = {k: shape(x) for k, x in standin(other, SMALL).items() if not IGNORED.search(k)}
        assert {k: shape(x) for k, x in two.items()} == names
    return layouts, one, two


def shape(x: Tensor) -> tuple[int, ...]:
    return tuple(x.shape)


def loaded(file: Checkpoint, layouts: Layouts) -> Checkpoint:
    table, transform = layout_of(file, layouts)
    return rename(transform(file), table)


def differences(one: Checkpoint, other: Checkpoint) -> list[str]:
    """Our names that are in one only, or whose numbers differ in a bit; the temperature that the port lacks aside."""
    names = sorted((one.keys() | other.keys()) - {"temp"})
    return [
        k
        for k in names
        if k not in one or k not in other or not torch.equal(one[k].float(), other[k].float())
    ]


# whole models


def diffusers_image_encoder(compvis: Checkpoint) -> Checkpoint:
    file: Checkpoint = {}
    for name, x in compvis.items():
        if ".attn.c_qkv." in name:
            for part, third in zip("qkv", x.chunk(3), strict=True):
                file[name.replace("attn.c_qkv", f"attn1.to_{part}")] = third.clone()
        elif name.startswith(("cond_stage_model.", "proj_out.")) or name == "learnable_vector":
            file[name] = x
    rules = [
        (r"^cond_stage_model\.transformer\.", "model."),
        (r"^cond_stage_model\.final_ln\.", "final_layer_norm."),
        (r"^learnable_vector$", "uncond_vector"),
        (r"^cond_stage_model\.mapper\.resblocks\.", "mapper.blocks."),
        (r"\.ln_1\.", ".norm1."),
        (r"\.ln_2\.", ".norm3."),
        (r"\.attn\.c_proj\.", ".attn1.to_out.0."),
        (r"\.mlp\.c_fc\.", ".ff.net.0.proj."),
        (r"\.mlp\.c_proj\.", ".ff.net.2."),
    ]
    return rewrite(file, rules)


WHOLE = {  # sizes of a small Paint-by-Example that is a network, too
    320: 32, 640: 64, 960: 96, 1280: 128, 1920: 192, 2560: 256, 5120: 512, 10240: 1024, 768: 24, 1024: 32, 3072: 96,
    4096: 128, 257: 5, 128: 32, 256: 64, 512: 128,
}  # fmt: skip
WHOLE_CONFIG = StableVITONConfig(
    image=ImageConfig(image_size=28, dim=32, heads=4, mlp_dim=128),
    exemplar=ExemplarConfig(32, 5, 24),
    vae=VAEConfig(channels=32),
    unet=UNetConfig(9, channels=32, heads=4, context_dim=24),
    picture=(64, 64),
    dresses=False,
)


def test_both_editions_of_paint_by_example_are_one_model_bit_for_bit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setitem(PUBLISHED, "paint-by-example", WHOLE_CONFIG)
    file = standin("pbe_model_ckpt_compvis", WHOLE)
    unet = {k.removeprefix(COMPVIS_UNET): x for k, x in file.items() if k.startswith(COMPVIS_UNET)}
    vae = {k.removeprefix(COMPVIS_VAE): x for k, x in file.items() if k.startswith(COMPVIS_VAE)}
    parts = {
        "pbe_diffusers_unet": diffusers_unet(unet),
        "pbe_diffusers_vae": old_diffusers_vae(vae)
        if "query" in "".join(published("pbe_diffusers_vae"))
        else diffusers_vae(vae),
        "pbe_diffusers_image_encoder": diffusers_image_encoder(file),
    }
    write(file, tmp_path / "compvis" / FILES["pbe_model_ckpt_compvis"][0], "lightning")
    for name, tensors in parts.items():
        assert tensors.keys() == published(name).keys()
        write(tensors, tmp_path / "diffusers" / FILES[name][0], FILES[name][1])
    one, other = (
        load_published("paint-by-example", tmp_path / x).state_dict() for x in ("compvis", "diffusers")
    )
    assert len(one) > 1000 and differences(one, other) == []


# all of them

READ_IN_PARTS = {  # by the tests of the components, its U-Net and its VAE
    "sd_v1_4_compvis": "no command needs the whole",
}
NOT_NEEDED = {
    "hf_blip2_opt_2_7b": "a later stage of BLIP-2 without the text half of the Q-Former: nothing can start from it",
    "llama2_7b_meta_consolidated": "Llama 2 itself, not the Vicuna of the paper; gated",
    "llava_v1_5_7b_mm_projector_bin": "the same four tensors are in the shards beside it",
    "sd_v1_4_diffusers_text_encoder": "no prompt goes through it: what Stable Diffusion is told here comes from the Q-Former or from a picture",
}


def test_every_manifest_is_read_or_not_needed_for_a_reason():
    names = {path.stem for path in MANIFESTS.glob("*.txt")}
    assert len(names) == 32
    assert names == READ.keys() | READ_IN_PARTS.keys() | NOT_NEEDED.keys()
    assert names - FILES.keys() <= NOT_NEEDED.keys()
