"""The wiring against its parts: what the U-Net's output means, and what guidance changes and leaves alone."""

from dataclasses import replace

import pytest
import torch

from tests.parity import randomise
from unifashion import diffusion, training
from unifashion.config import FULL, TINY
from unifashion.model import UniFashion, start_adapter

B = 2


def test_v_gives_back_the_noise():
    x0, noise, t = torch.randn(B, 4, 3, 2).double(), torch.randn(B, 4, 3, 2).double(), torch.tensor([5, 980])
    a = diffusion.alphas_cumprod(torch.device("cpu"))[t][:, None, None, None]
    v = a.sqrt() * noise - (1 - a).sqrt() * x0
    torch.testing.assert_close(diffusion.v_to_eps(v, diffusion.q_sample(x0, t, noise), a), noise)


@pytest.mark.parametrize("prediction", ["eps", "v"])
@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_sampling_is_the_trained_network_with_the_context_alone_guided(prediction, guidance):
    model, scene, context, hint, noise = random_model(prediction)

    def eps(x: torch.Tensor, t: int) -> torch.Tensor:
        at = torch.full((B,), t)
        conditional = model.predict_noise(x, at, scene, context, hint)
        unconditional = model.predict_noise(x, at, scene, model.null_context.expand_as(context), hint)
        return unconditional + guidance * (conditional - unconditional)

    with torch.no_grad():
        theirs = list(diffusion.plms(eps, noise, 3))
    ours = list(model.sample(noise, scene, context, hint, 3, "plms", guidance))
    torch.testing.assert_close(ours, theirs, atol=1e-9, rtol=1e-9)


def test_full_is_the_published_network_also_in_what_shows_in_no_shape():
    assert (FULL.vit.heads, FULL.qformer.heads, FULL.unet.heads) == (16, 12, 8)
    assert (FULL.qformer.max_text, FULL.qformer.queries, FULL.unet.groups, FULL.vae.groups) == (
        64,
        32,
        32,
        32,
    )
    assert (FULL.prediction, FULL.vae.scale, FULL.picture) == ("eps", 0.18215, (512, 384))
    assert FULL.unet.attention_levels == (0, 1, 2)


def test_what_the_qformer_sees_is_normalised_features():
    model = random_model("eps")[0]
    picture = torch.randn(B, 3, *TINY.vit.image_size).double()
    torch.testing.assert_close(model.see(picture), model.qformer.ln_vision(model.vit(picture)))
    assert (model.see(picture) - model.vit(picture)).abs().max() > 0.1


@torch.no_grad()
def test_the_style_starts_at_zero_and_then_reaches_unet_and_garment_encoder():
    fresh = UniFashion(TINY)
    assert not fresh.style(torch.randn(B, 5, TINY.unet.context_dim)).any()
    model, scene, context, hint, x = random_model("eps")
    t = torch.tensor([5, 980])
    style = model.style(context)
    torch.testing.assert_close(style, model.style(context.flip(1)))  # of all tokens alike
    assert (style - model.style(-context)).abs().max() > 0.1
    told = []
    for net in (model.unet, model.garment):
        for block in net.encoder.blocks[1:4:2]:
            block.register_forward_pre_hook(lambda _, given: told.append(given[1]))
    model.predict_noise(x, t, scene, context, hint)
    for emb, net in zip(told, (model.garment, model.garment, model.unet, model.unet), strict=True):
        torch.testing.assert_close(emb, net.time_embed(t) + style)


def test_in_bfloat16_guidance_is_counted_in_float32(monkeypatch):
    model, scene, context, hint, x = random_model("eps")
    seen = []
    real = diffusion.guided
    monkeypatch.setattr(
        "unifashion.denoiser.guided", lambda *given: (seen.append(given[0].dtype), real(*given))[1]
    )
    half = [v.bfloat16() for v in (scene, context, hint)]
    next(model.bfloat16().sample(x.float(), *half, steps=2, guidance=2.0))
    assert set(seen) == {torch.float32}


def test_q2i_of_v_is_the_error_of_v():
    model, *_ = random_model("v")
    t, noise, off = torch.tensor([5, 980]), torch.randn(B, 4, 3, 2).double(), torch.randn(B, 4, 3, 2).double()
    a = diffusion.alphas_cumprod(torch.device("cpu"))[t][:, None, None, None]
    error_of_v = off / a.sqrt()  # x_t is known, so eps off by `off` is v off by that
    torch.testing.assert_close(model.q2i(noise + off, noise, t), error_of_v.square().mean())


def test_the_network_reads_noisy_latent_agnostic_keep_and_pose_in_that_order():
    """StableVITON's order and sense; SD-inpainting's is another, and would load without a word."""
    model, *_, noise = random_model("eps")
    x, agnostic, keep, pose = (torch.full((B, c, 8, 8), float(i)) for i, c in enumerate((4, 4, 1, 4)))
    scene = model.scene(agnostic, keep, pose)
    assert scene.shape == (B, 9, 8, 8)
    assert (scene[:, :4] == 1).all() and (scene[:, 4] == 2).all() and (scene[:, 5:] == 3).all()
    assert (model.scene(agnostic, keep)[:, 5:] == 0).all()
    read = []
    model.unet.encoder.blocks[0].register_forward_pre_hook(lambda _, seen: read.append(seen[0]))
    context = torch.zeros(B, 5, TINY.unet.context_dim).double()
    model.predict_noise(x.double(), torch.tensor([5, 980]), scene.double(), context)
    assert read[0].mean((0, 2, 3)).tolist() == [0] * 4 + [1] * 4 + [2] + [3] * 4
    read.clear()
    next(model.sample(x.double(), scene.double(), context, steps=2))
    assert read[0].mean((0, 2, 3)).tolist() == [0] * 4 + [1] * 4 + [2] + [3] * 4


def test_a_hint_that_is_not_kept_is_no_hint_for_that_sample_only():
    model, scene, context, hint, x = random_model("v")
    t = torch.tensor([5, 980])
    with_, without = (model.predict_noise(x, t, scene, context, h) for h in (hint, None))
    dropped = model.predict_noise(x, t, scene, context, hint, torch.tensor([1.0, 0.0]).double())
    torch.testing.assert_close(dropped[0], with_[0])
    torch.testing.assert_close(dropped[1], without[1])
    assert (with_ - without).abs().amin(0).max() > 1e-3


def test_the_adapter_starts_with_what_tells_pictures_apart():
    torch.manual_seed(0)
    model, (q, dim) = UniFashion(TINY), (TINY.qformer.queries, TINY.qformer.dim)
    apart = torch.randn(500, 1, dim) * torch.logspace(
        0, -1, dim
    )  # the last direction: a hundredth of the variance
    z = (apart + 5 + torch.zeros(1, q, 1)).reshape(500, q, dim)
    start_adapter(model.image_adapter, z)
    out = model.image_adapter(z).detach().flatten(0, 1)
    torch.testing.assert_close(out.mean(0), torch.zeros(dim), atol=1e-3, rtol=0)
    spread = torch.linalg.eigvalsh(out.T @ out / len(out))
    assert spread.max() < 1.0 and spread.min() > 0.3  # was 1 : 100 and more
    start_adapter(
        model.image_adapter, z, floor=1e-4
    )  # variances from 1/19 to 5 times their mean: all are made one
    spread = torch.linalg.eigvalsh((out := model.image_adapter(z).detach().flatten(0, 1)).T @ out / len(out))
    assert spread.max() < 1.0 and spread.min() > 0.95
    start_adapter(model.image_adapter, z * 0 + 1)  # all the same: nothing is blown up, nothing is nan
    assert model.image_adapter(z * 0 + 1).abs().max() < 1e-2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_embeddings_are_float32_unit_vectors_whatever_the_networks_type(dtype):
    former = UniFashion(TINY).qformer.to(dtype)
    with torch.autocast("cpu", torch.bfloat16):
        z, text = (torch.randn(B, 5, TINY.qformer.dim).to(dtype) for _ in range(2))
        for unit in (former.embed_image(z), former.embed_text(text)):
            assert unit.dtype == torch.float32
            torch.testing.assert_close(unit.norm(dim=-1), torch.ones(unit.shape[:-1]), atol=1e-6, rtol=0)


def test_in_a_blank_scene_all_is_to_be_repainted():
    model, *_ = random_model("v")
    scene, (y, x) = model.blank_scene(3), TINY.picture
    assert (scene[:, 4] == 0).all() and (scene[:, 5:] == 0).all()  # 0 = repaint; no pose
    grey = model.vae.encode(torch.zeros(1, 3, y, x).double())
    torch.testing.assert_close(scene[:, :4], grey.expand(3, -1, -1, -1))


@pytest.mark.parametrize("t", [0, 10, 980])
def test_a_bfloat16_network_knows_its_noise(t):
    model, scene, context, hint, x = random_model("v")
    exact = model.predict_noise(x, torch.full((B,), t), scene, context)
    model = model.bfloat16()
    x, scene, context = x.bfloat16(), scene.bfloat16(), context.bfloat16()
    rounded = model.predict_noise(x, torch.full((B,), t), scene, context)
    assert rounded.dtype == torch.float32
    assert (rounded - exact).norm() / exact.norm() < 0.03


@pytest.mark.parametrize(
    ("wrong", "told"),
    [
        ({"vit": {"dim": 64}}, "vision_dim"),
        ({"vit": {"image_size": (128, 64)}}, "square"),
        ({"prediction": "x0"}, "eps or v"),
        ({"unet": {"in_channels": 9}}, "in_channels"),
        ({"unet": {"out_channels": 8}}, "out_channels"),
        ({"unet": {"attention_levels": (0, 9)}}, "4 levels"),
        ({"unet": {"heads": 5}}, "heads"),
        ({"picture": (128, 104)}, "does not divide"),
    ],
    ids=str,
)
def test_a_preset_whose_numbers_do_not_fit_is_refused(wrong, told):
    with pytest.raises(ValueError, match=told):
        replace(
            TINY,
            **{k: replace(getattr(TINY, k), **v) if isinstance(v, dict) else v for k, v in wrong.items()},
        )


def test_each_loss_is_clipped_on_its_own():
    p = torch.nn.Parameter(torch.zeros(2))
    norms = training.clipped_backward({"loud": 1e4 * p[0], "quiet": 0.1 * p[1]}, [p], 0.5)
    torch.testing.assert_close(norms, torch.tensor([1e4, 0.1]))
    torch.testing.assert_close(p.grad, torch.tensor([0.5, 0.05]))


def random_model(prediction: str) -> tuple:
    model = UniFashion(replace(TINY, prediction=prediction)).double().eval().requires_grad_(False)
    for part in (model.unet, model.garment, model.style_adapter):  # which is zero until trained
        randomise(part, 0)
    torch.nn.init.normal_(model.null_context)
    y, x = 8, 8
    shape = {
        "scene": (B, 9, y, x),
        "context": (B, 5, TINY.unet.context_dim),
        "hint": (B, 4, y, x),
        "noise": (B, 4, y, x),
    }
    made = torch.Generator().manual_seed(1)
    return model, *(torch.randn(s, generator=made, dtype=torch.float64) for s in shape.values())
