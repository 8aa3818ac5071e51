"""What a user would pick instead of ours: diffusers', transformers' and peft's networks, of the same sizes.

The one file outside of tests/ that imports them; a UserError says which is not installed (all are in requirements-test.txt).
Their weights are whatever `random_weights` in eval/workloads.py makes them.
"""

import importlib
from collections.abc import Callable
from functools import partial
from types import ModuleType

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from unifashion import UserError
from unifashion.blocks import UNetConfig
from unifashion.llama import LlamaConfig
from unifashion.lora import LoRAConfig
from unifashion.qformer import QFormerConfig
from unifashion.stableviton import StableVITONConfig
from unifashion.vae import VAEConfig
from unifashion.vit import ViTConfig


def library(name: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except ImportError:
        raise UserError(
            f"eval.speed compares with {name}, which is not installed: pip install -r requirements-test.txt"
        ) from None


def unet(cfg: UNetConfig) -> nn.Module:
    """UNet2DConditionModel as wide as `cfg`, with as many attention blocks."""
    attends = [level in cfg.attention_levels for level in range(len(cfg.widths))]
    return library("diffusers").UNet2DConditionModel(
        in_channels=cfg.in_channels,
        out_channels=cfg.out_channels,
        block_out_channels=tuple(cfg.widths),
        layers_per_block=cfg.res_blocks,
        norm_num_groups=cfg.groups,
        cross_attention_dim=cfg.context_dim,
        attention_head_dim=cfg.heads,  # the number of heads, in spite of its name
        down_block_types=tuple("CrossAttnDownBlock2D" if yes else "DownBlock2D" for yes in attends),
        up_block_types=tuple("CrossAttnUpBlock2D" if yes else "UpBlock2D" for yes in reversed(attends)),
    )


def vae(cfg: VAEConfig) -> nn.Module:
    n = len(cfg.channel_mult)
    return library("diffusers").AutoencoderKL(
        block_out_channels=tuple(cfg.channels * m for m in cfg.channel_mult),
        down_block_types=("DownEncoderBlock2D",) * n,
        up_block_types=("UpDecoderBlock2D",) * n,
        layers_per_block=cfg.res_blocks,
        latent_channels=cfg.latent_channels,
        norm_num_groups=cfg.groups,
        scaling_factor=cfg.scale,
    )


def image_encoder(cfg: StableVITONConfig) -> nn.Module:
    library("diffusers")
    module = library("diffusers.pipelines.deprecated.paint_by_example.image_encoder")
    like = library("transformers").CLIPVisionConfig(
        image_size=cfg.image.image_size,
        patch_size=cfg.image.patch_size,
        hidden_size=cfg.image.dim,
        num_hidden_layers=cfg.image.depth,
        num_attention_heads=cfg.image.heads,
        intermediate_size=cfg.image.mlp_dim,
        projection_dim=cfg.unet.context_dim,
    )
    return module.PaintByExampleImageEncoder(like)


def paint_by_example(
    cfg: StableVITONConfig, made: Callable[[Callable[[], nn.Module]], nn.Module]
) -> Callable:
    """The pipeline, whose parts `made` makes, without the checker of its results, which ours have not either."""
    diffusers = library("diffusers")
    side = cfg.image.image_size
    pipe = diffusers.PaintByExamplePipeline(
        vae=made(partial(vae, cfg.vae)),
        image_encoder=made(partial(image_encoder, cfg)),
        unet=made(partial(unet, cfg.unet)),
        scheduler=scheduler("plms"),
        safety_checker=None,
        feature_extractor=library("transformers").CLIPImageProcessor(
            size={"shortest_edge": side}, crop_size={"height": side, "width": side}
        ),
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def scheduler(sampler: str) -> object:
    """Paint-by-Example's for PLMS, 51 calls for 50 steps; for DPM-Solver++ the one that diffusers recommends."""
    diffusers = library("diffusers")
    betas = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
    if sampler == "plms":
        return diffusers.PNDMScheduler(**betas, skip_prk_steps=True, set_alpha_to_one=False, steps_offset=1)
    return diffusers.DPMSolverMultistepScheduler(**betas)


def llama(cfg: LlamaConfig) -> nn.Module:
    transformers = library("transformers")
    like = transformers.LlamaConfig(
        vocab_size=cfg.vocab_size,
        hidden_size=cfg.dim,
        intermediate_size=cfg.mlp_dim,
        num_hidden_layers=cfg.depth,
        num_attention_heads=cfg.heads,
        max_position_embeddings=cfg.context,
        rms_norm_eps=cfg.eps,
        attn_implementation="sdpa",
        pad_token_id=0,
        eos_token_id=None,  # it writes on to the last token
    )
    return transformers.LlamaForCausalLM(like)


def with_lora(net: nn.Module, cfg: LoRAConfig) -> nn.Module:
    like = library("peft").LoraConfig(
        r=cfg.rank,
        lora_alpha=cfg.alpha,
        lora_dropout=cfg.dropout,
        target_modules="all-linear",  # but the head
        task_type="CAUSAL_LM",
    )
    return library("peft").get_peft_model(net, like)


def blip2(vit: ViTConfig, qformer: QFormerConfig) -> nn.Module:
    transformers = library("transformers")
    like = transformers.Blip2Config(
        vision_config={
            "hidden_size": vit.dim,
            "intermediate_size": vit.mlp_dim,
            "num_hidden_layers": vit.depth,
            "num_attention_heads": vit.heads,
            "image_size": vit.image_size[0],
            "patch_size": vit.patch_size,
        },
        qformer_config={
            "vocab_size": qformer.vocab_size,
            "hidden_size": qformer.dim,
            "intermediate_size": qformer.mlp_dim,
            "num_hidden_layers": qformer.depth,
            "num_attention_heads": qformer.heads,
            "max_position_embeddings": qformer.max_positions,
            "encoder_hidden_size": vit.dim,
            "use_qformer_text_input": True,
        },
        image_text_hidden_size=qformer.embed_dim,
        num_query_tokens=qformer.queries,
    )
    return transformers.Blip2ForImageTextRetrieval(like)


def embed(net: nn.Module, pictures: Tensor) -> Tensor:
    """`blip2`'s unit vectors of pictures (b,3,y,x): (b,q,embed_dim), as its forward makes them."""
    seen = net.vision_model(pixel_values=pictures).last_hidden_state
    queries = net.query_tokens.expand(len(pictures), -1, -1)
    read = net.qformer(query_embeds=queries, query_length=queries.shape[1], encoder_hidden_states=seen)
    return F.normalize(net.vision_projection(read.last_hidden_state), dim=-1)


def generate(net: nn.Module, prompt: Tensor, tokens: int, **how: object) -> Tensor:
    """Greedily, from embeddings (b,t,dim) -> token ids (b,tokens). `how` goes to transformers' `generate`."""
    mask = torch.ones(prompt.shape[:2], dtype=torch.long, device=prompt.device)
    asked = {"max_new_tokens": tokens, "do_sample": False, "use_cache": True}
    return net.generate(inputs_embeds=prompt, attention_mask=mask, **asked, **how)
