"""The wiring against its parts: what the U-Net's output means, and what guidance changes and leaves alone."""

from dataclasses import replace

import pytest
import torch

from tests.parity import randomise
from unifashion import diffusion, training
from unifashion.config import TINY
from unifashion.model import UniFashion

B = 2


def test_v_gives_back_the_noise():
    x0, noise, t = torch.randn(B, 4, 3, 2).double(), torch.randn(B, 4, 3, 2).double(), torch.tensor([5, 980])
    a = diffusion.alphas_cumprod()[t][:, None, None, None]
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


def test_q2i_of_v_is_the_error_of_v():
    model, *_ = random_model("v")
    t, noise, off = torch.tensor([5, 980]), torch.randn(B, 4, 3, 2).double(), torch.randn(B, 4, 3, 2).double()
    a = diffusion.alphas_cumprod()[t][:, None, None, None]
    error_of_v = off / a.sqrt()  # x_t is known, so eps off by `off` is v off by that
    torch.testing.assert_close(model.q2i(noise + off, noise, t), error_of_v.square().mean())


def test_each_loss_is_clipped_on_its_own():
    p = torch.nn.Parameter(torch.zeros(2))
    norms = training.backward_apart({"loud": 1e4 * p[0], "quiet": 0.1 * p[1]}, [p], 0.5)
    torch.testing.assert_close(norms, torch.tensor([1e4, 0.1]))
    torch.testing.assert_close(p.grad, torch.tensor([0.5, 0.05]))


def random_model(prediction: str) -> tuple:
    model = UniFashion(replace(TINY, prediction=prediction)).double().eval().requires_grad_(False)
    for part in (model.unet, model.garment):
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
