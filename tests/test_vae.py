"""Stable Diffusion's autoencoder against CompVis' own numbers (golden `vae`) and diffusers' AutoencoderKL."""

import pytest
import torch
from diffusers import AutoencoderKL
from torch import nn

from tests import goldens
from tests.faults import plant
from tests.parity import assert_parity, randomise, swap
from tests.published import published
from unifashion import vae
from unifashion.config import FULL
from unifashion.vae import VAE, VAEConfig, kl_divergence
from weights import vae as table
from weights.rename import Table, load_into, load_layout


def test_encoder_equals_compvis():
    golden, model = compvis()
    mean, logvar = model.moments(golden.inputs["image"])
    assert_parity(torch.cat([mean, logvar], dim=1), golden.outputs["moments"])
    assert_parity(torch.exp(0.5 * logvar), golden.outputs["std"])
    assert_parity(
        model.sample(*model.moments(golden.inputs["image"]), golden.inputs["noise"]), golden.outputs["latent"]
    )
    assert_parity(model.encode(golden.inputs["image"]) / 0.18215, golden.outputs["mean"])


def test_decoder_equals_compvis():
    golden, model = compvis()
    assert_parity(model.decode(0.18215 * golden.inputs["z"]), golden.outputs["decoded"])
    assert_parity(model.decode(model.encode(golden.inputs["image"])), golden.outputs["rec"])


def test_kl_divergence_equals_compvis():
    golden, model = compvis()
    assert_parity(kl_divergence(*model.moments(golden.inputs["image"])), golden.outputs["kl"], atol=1e-9)


def test_log_variances_are_clamped_as_in_compvis():
    golden, model = compvis()
    model.encoder = model.quant_conv = nn.Identity()
    moments, noise = golden.inputs["big_moments"], golden.inputs["big_noise"]
    mean, logvar = model.moments(moments)
    assert_parity(logvar, golden.outputs["big_logvar"])
    assert_parity(
        model.sample(*model.moments(moments), noise) / 0.18215, golden.outputs["big_sample"], atol=1e-9
    )
    torch.testing.assert_close(kl_divergence(mean, logvar), golden.outputs["big_kl"], rtol=1e-9, atol=0)


def test_both_halves_equal_diffusers():
    theirs, ours = diffusers_pair()
    generator = torch.Generator().manual_seed(1)
    image = torch.randn(2, 3, 16, 24, dtype=torch.float64, generator=generator)
    latent = torch.randn(2, 4, 2, 3, dtype=torch.float64, generator=generator)
    posterior = theirs.encode(image).latent_dist
    mean, logvar = ours.moments(image)
    assert_parity(mean, posterior.mean)
    assert_parity(logvar, posterior.logvar)
    assert_parity(ours.decode(latent * 0.18215), theirs.decode(latent).sample)


def test_the_full_model_is_the_published_file():
    with torch.device("meta"):
        model = VAE(FULL.vae)
    load_into(model, published("stableviton_VITONHD_VAE_finetuning"), table.VAE)
    assert len(model.state_dict()) == 248
    assert sum(p.numel() for p in model.parameters()) == 83_653_863


def test_the_inputs_are_unchanged():
    golden, model = compvis()
    image, noise, z = (golden.inputs[name] for name in ("image", "noise", "z"))
    before = [tensor.clone() for tensor in (image, noise, z)]
    model.decode(model.sample(*model.moments(image), noise) + z)
    model.decode(z)
    assert all(torch.equal(*pair) for pair in zip(before, (image, noise, z), strict=True))


CODE_FAULTS = {
    "PyTorch's eps": ("norm", "eps=1e-6", "eps=1e-5"),
    "symmetric padding": ("Downsample.forward", "(0, 1, 0, 1)", "(1, 1, 1, 1)"),
    "padding on the left and top": ("Downsample.forward", "(0, 1, 0, 1)", "(1, 0, 1, 0)"),
    "no residual around attention": ("Attention.forward", "return x + self.out(", "return self.out("),
    "attention before its norm": ("Attention.forward", "h = self.norm(x)", "h = x"),
    "rows and columns exchanged in attention": ("Attention.forward", "b 1 (y x) c -> b c y x\", y=", "b 1 (x y) c -> b c y x\", y="),
    "smooth upsampling": ("Upsample.forward", 'mode="nearest"', 'mode="bilinear"'),
    "shortcut after the norm": ("ResBlock.forward", "return self.shortcut(x) + h", "return self.shortcut(self.norm1(x)) + h"),
    "latents not scaled back": ("VAE.decode", "latent / self.cfg.scale", "latent"),
}  # fmt: skip

TABLE_FAULTS = {
    "norms of a res block swapped": ("middle.0.norm1", "middle.0.norm2"),
    "queries and keys swapped": ("middle.1.q", "middle.1.k"),
    "encoder's and decoder's attention swapped": ("encoder.middle.1", "decoder.middle.1"),
}


@pytest.mark.parametrize("fault", CODE_FAULTS)
def test_parity_notices(fault: str, monkeypatch: pytest.MonkeyPatch):
    plant(monkeypatch, vae, *CODE_FAULTS[fault])
    golden, model = compvis()
    with pytest.raises(AssertionError, match="max difference"):
        both_halves(model, golden)


@pytest.mark.parametrize("fault", TABLE_FAULTS)
def test_parity_notices_in_the_table(fault: str):
    golden, model = compvis(swap(table.VAE, *TABLE_FAULTS[fault]))
    with pytest.raises(AssertionError, match="max difference"):
        both_halves(model, golden)


def test_parity_notices_decoder_levels_in_another_order():
    golden, model = compvis()
    levels = model.decoder.levels  # 1 and 2 are of one width: their weights fit into each other
    levels[1], levels[2] = levels[2], levels[1]
    with pytest.raises(AssertionError, match="max difference"):
        both_halves(model, golden)


def test_parity_notices_a_decoder_that_walks_up_from_the_finest_level(monkeypatch: pytest.MonkeyPatch):
    plant(monkeypatch, vae, "Decoder.forward", "in reversed(self.levels)", "in self.levels")
    golden, model = compvis()
    with pytest.raises(RuntimeError, match="channels"):  # the widths do not even fit
        model.decode(golden.inputs["z"])


# helpers


def diffusers_pair() -> tuple[AutoencoderKL, VAE]:
    cfg = VAEConfig(channels=32, channel_mult=(1, 2, 3, 3), res_blocks=1)
    theirs = AutoencoderKL(
        block_out_channels=tuple(cfg.channels * m for m in cfg.channel_mult),
        layers_per_block=cfg.res_blocks,
        down_block_types=["DownEncoderBlock2D"] * 4,
        up_block_types=["UpDecoderBlock2D"] * 4,
        latent_channels=cfg.latent_channels,
    )
    randomise(theirs, seed=0)
    ours = VAE(cfg).double()
    load_layout(ours, theirs.state_dict(), table.VAES)
    return theirs, ours


def compvis(rows: Table = table.VAE) -> tuple[goldens.Golden, VAE]:
    golden = goldens.load("vae")
    c = golden.config
    cfg = VAEConfig(channels=c["ch"], channel_mult=tuple(c["ch_mult"]), res_blocks=c["num_res_blocks"])
    model = vae.VAE(cfg).double()
    load_into(model, golden.weights, rows)
    return golden, model


def both_halves(model: VAE, golden: goldens.Golden) -> None:
    assert_parity(model.encode(golden.inputs["image"]), golden.outputs["mean"] * 0.18215)
    assert_parity(model.decode(0.18215 * golden.inputs["z"]), golden.outputs["decoded"])
