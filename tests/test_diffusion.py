"""Schedule, loss and samplers against CompVis (golden case plms) and against diffusers' schedulers, all in float64."""

from collections.abc import Callable, Iterator

import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler, DPMSolverMultistepScheduler, PNDMScheduler
from diffusers.schedulers import (
    scheduling_ddim,
    scheduling_ddpm,
    scheduling_dpmsolver_multistep,
    scheduling_pndm,
)
from torch import Tensor

from tests.faults import plant
from tests.goldens import load
from unifashion import diffusion

GOLDEN = load("plms")
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # diffusers'
ATOL = 1e-10  # measured: 7e-15 on latents of up to 7


@pytest.mark.parametrize("run", ["plms50", "plms25", "plms50_cfg", "plms25_cfg"])
def test_plms_equals_the_original_after_every_step(run):
    assert plms_error(run) < ATOL


@pytest.mark.parametrize("run", ["ddim50", "ddim25", "ddim50_cfg", "ddim25_cfg"])
def test_ddim_equals_the_original_after_every_step(run):
    assert trajectory_error(diffusion.ddim, run) < ATOL


def test_the_last_prediction_of_x0_equals_the_original():
    x = GOLDEN.outputs["ddim50"][-2]
    assert_close(diffusion.predict_x0(x, eps(x, 1), 1), GOLDEN.outputs["ddim50_pred_x0_last"])


PLMS_FAULTS = {
    "the second Euler evaluation stays in the history": (
        "plms",
        "slope = (e + eps(ddim_step(x, e, t, t - stride), t - stride)) / 2",
        "second = eps(ddim_step(x, e, t, t - stride), t - stride); slope = (e + second) / 2; history = [second, e]",
    ),
    "the history keeps averaged slopes": (
        "plms",
        "        x = ddim_step(x, slope, t, t - stride)",
        "        history[0] = slope; x = ddim_step(x, slope, t, t - stride)",
    ),
    "no Euler evaluation in the first step": (
        "plms",
        "slope = (e + eps(ddim_step(x, e, t, t - stride), t - stride)) / 2",
        "slope = e",
    ),
    "the second step uses the third's coefficients": (
        "ADAMS_BASHFORTH",
        "(3 / 2, -1 / 2)",
        "(23 / 12, -16 / 12)",
    ),
    "one coefficient of the fourth order is wrong": ("ADAMS_BASHFORTH", "37 / 24", "36 / 24"),
    "the last step ends at alpha 1": (
        "ddim_step",
        "ALPHAS[max(t_next, 0)]",
        "ALPHAS[t_next] if t_next >= 0 else 1.0",
    ),
    "timesteps start at 0": ("timesteps", "i * (TIMESTEPS // steps) + 1", "i * (TIMESTEPS // steps)"),
    "guidance scales the conditional prediction": (
        "guided",
        "unconditional + scale * (conditional - unconditional)",
        "conditional + scale * (conditional - unconditional)",
    ),
}


@pytest.mark.parametrize("fault", PLMS_FAULTS)
def test_plms_parity_notices(fault, monkeypatch):
    plant(monkeypatch, diffusion, *PLMS_FAULTS[fault])
    assert plms_error("plms50_cfg") > 1000 * ATOL


SCHEDULE = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}


class Float64Torch:
    """`torch` in which float32 is float64: diffusers' schedulers round to float32 inside, whatever they are given."""

    float32 = torch.float64

    def __getattr__(self, name: str):
        return getattr(torch, name)


@pytest.fixture(autouse=True)
def diffusers_in_float64(monkeypatch):
    for module in (scheduling_ddim, scheduling_ddpm, scheduling_dpmsolver_multistep, scheduling_pndm):
        monkeypatch.setattr(module, "torch", Float64Torch())


@pytest.mark.parametrize("steps", [50, 30, 7, 2])
def test_plms_equals_diffusers_pndm(steps):
    theirs = PNDMScheduler(**SCHEDULE, skip_prk_steps=True, set_alpha_to_one=False, steps_offset=1)
    # diffusers gives a latent after each network call; ours after each step, the first of which takes two
    assert_close(run(diffusion.plms, steps), diffusers_run(theirs, steps)[1:])


@pytest.mark.parametrize("steps", [50, 30, 7, 2])
def test_ddim_equals_diffusers(steps):
    theirs = DDIMScheduler(**SCHEDULE, clip_sample=False, set_alpha_to_one=False, steps_offset=1)
    assert_close(run(diffusion.ddim, steps), diffusers_run(theirs, steps))


@pytest.mark.parametrize("steps", [25, 14, 3, 2])
def test_dpm_solver_pp_equals_diffusers(steps):
    assert dpm_error(steps) < ATOL


DPM_FAULTS = {
    "always first order": ("if x0_before is not None:", "if False:"),
    "the ratio of the steps upside down": ("r = (lam - lambda_before) / h", "r = h / (lam - lambda_before)"),
    "no expm1": ("math.expm1(-h)", "math.exp(-h)"),
    "even steps from 981": (
        "zip(grid, [*grid[1:], None]",
        "zip(timesteps(steps), [*timesteps(steps)[1:], None]",
    ),
}


@pytest.mark.parametrize("fault", DPM_FAULTS)
def test_dpm_solver_pp_parity_notices(fault, monkeypatch):
    plant(monkeypatch, diffusion, "dpm_solver_pp", *DPM_FAULTS[fault])
    assert dpm_error(25) > 1000 * ATOL


@pytest.mark.parametrize("t", [0, 1, 500, 999])
def test_a_ddpm_step_equals_diffusers(t):
    theirs = DDPMScheduler(**SCHEDULE, variance_type="fixed_small", clip_sample=False)
    x, e = GOLDEN.inputs["x_T"], GOLDEN.inputs["noise"]
    wanted = theirs.step(e, t, x, generator=torch.Generator().manual_seed(0)).prev_sample
    noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(0), dtype=x.dtype)
    assert_close(diffusion.ddpm_step(x, e, t, noise), wanted)


def test_the_schedule_equals_the_original():
    assert_close(
        diffusion.alphas_cumprod(torch.device("cpu")), GOLDEN.outputs["sched_alphas_cumprod"], atol=1e-15
    )
    assert diffusion.alphas_cumprod(torch.device("cpu")).tolist() == diffusion.ALPHAS
    assert len(diffusion.ALPHAS) == diffusion.TIMESTEPS == 1000


def test_the_variance_of_a_ddpm_step_is_the_originals_posterior_variance():
    zero, one = torch.zeros(1, dtype=torch.float64), torch.ones(1, dtype=torch.float64)
    steps = [diffusion.ddpm_step(zero, zero, t, one) for t in range(1000)]  # only the noise term is left
    assert_close(torch.cat(steps).square(), GOLDEN.outputs["sched_posterior_variance"], atol=1e-14)


def test_q_sample_equals_the_original():
    i = GOLDEN.inputs
    assert_close(diffusion.q_sample(i["x0"], i["t"], i["noise"]), GOLDEN.outputs["q_sample"], atol=1e-12)


def test_the_loss_equals_the_original():
    x, t, noise = GOLDEN.outputs["q_sample"], GOLDEN.inputs["t"], GOLDEN.inputs["noise"]
    loss = diffusion.eps_loss(eps(x, t[:, None, None, None].double()), noise)
    assert_close(loss, GOLDEN.outputs["loss_per_sample"], atol=1e-12)
    assert_close(loss.mean(), GOLDEN.outputs["ddpm_loss"], atol=1e-12)


def test_the_loss_of_a_bf16_prediction_is_summed_in_float32():
    predicted, noise = torch.randn(2, 4, 64, 48).bfloat16(), torch.randn(2, 4, 64, 48)
    loss = diffusion.eps_loss(predicted, noise)
    assert loss.dtype == torch.float32
    assert_close(loss, (predicted.double() - noise.double()).square().mean((1, 2, 3)).float(), atol=1e-6)


def test_the_loss_is_in_float32_even_where_the_noise_is_not():
    noise = torch.randn(2, 4, 8, 8).bfloat16()
    loss = diffusion.eps_loss(noise * 1.001, noise)
    assert loss.dtype == torch.float32


def test_every_step_count_gives_exactly_that_many_steps():
    for steps in range(2, 501):
        ts = diffusion.timesteps(steps)
        assert len(ts) == len(set(ts)) == steps
        assert ts == sorted(ts, reverse=True) and ts[-1] == 1 and ts[0] <= 999


@pytest.mark.parametrize("steps", [s for s in range(2, 501) if 1000 % s == 0])
def test_timesteps_equal_the_originals_list_where_the_count_divides_1000(steps):
    assert diffusion.timesteps(steps) == [t + 1 for t in range(0, 1000, 1000 // steps)][::-1]


@pytest.mark.parametrize("sampler", diffusion.SAMPLERS)
@pytest.mark.parametrize("steps", [-1, 0, 1, 501])
def test_other_step_counts_are_refused(sampler, steps):
    with pytest.raises(ValueError, match="2 to 500"):
        next(diffusion.SAMPLERS[sampler](eps, GOLDEN.inputs["x_T"], steps))


@pytest.mark.parametrize(("sampler", "wanted"), [("plms", 51), ("ddim", 50), ("dpm++", 50)])
def test_fifty_steps_call_the_network(sampler, wanted):
    calls, counted = counter()
    latents = list(diffusion.SAMPLERS[sampler](counted, GOLDEN.inputs["x_T"], 50))
    assert len(latents) == 50 and len(calls) == wanted


@pytest.mark.parametrize(("sampler", "wanted"), [("plms", 4), ("ddim", 3), ("dpm++", 3)])
def test_a_caller_who_stops_after_three_steps_pays_for_three(sampler, wanted):
    calls, counted = counter()
    latents = diffusion.SAMPLERS[sampler](counted, GOLDEN.inputs["x_T"], 50)
    assert calls == []  # nothing runs before the first latent is asked for
    for _ in range(3):
        next(latents)
    latents.close()
    assert len(calls) == wanted


@pytest.mark.parametrize("sampler", diffusion.SAMPLERS)
def test_a_latent_once_given_is_not_changed_by_later_steps(sampler):
    x = GOLDEN.inputs["x_T"].clone()
    latents, copies = [], []
    for latent in diffusion.SAMPLERS[sampler](eps, x, 7):
        latents.append(latent)
        copies.append(latent.clone())
    assert torch.equal(x, GOLDEN.inputs["x_T"])
    assert all(torch.equal(a, b) for a, b in zip(latents, copies, strict=True))


def test_guidance_of_one_is_the_conditional_and_of_zero_the_unconditional_prediction():
    a, b = GOLDEN.inputs["x0"], GOLDEN.inputs["noise"]
    assert_close(diffusion.guided(a, b, 1.0), a)
    assert torch.equal(diffusion.guided(a, b, 0.0), b)


def eps(x: Tensor, t: Tensor | int, cond: str = "cond") -> Tensor:
    """The golden's stand-in for a network."""
    c = GOLDEN.config
    return c["a"] * x + c["b"] * torch.sin(3 * x + t / 100) + c["c"] * GOLDEN.inputs[cond]


def eps_cfg(x: Tensor, t: int) -> Tensor:
    return diffusion.guided(eps(x, t), eps(x, t, "uncond"), GOLDEN.config["scale"])


def run(sampler: Callable[..., Iterator[Tensor]], steps: int, network: diffusion.Eps = eps) -> Tensor:
    return torch.stack(list(sampler(network, GOLDEN.inputs["x_T"], steps)))


def trajectory_error(sampler: Callable[..., Iterator[Tensor]], name: str) -> float:
    """Largest difference to golden trajectory `name`, such as ddim50_cfg, over all its steps."""
    wanted = GOLDEN.outputs[name][1:]  # entry 0 is x_T
    got = run(sampler, len(wanted), eps_cfg if name.endswith("cfg") else eps)
    return (got - wanted).abs().max().item()


def plms_error(name: str) -> float:
    return trajectory_error(diffusion.plms, name)


def dpm_error(steps: int) -> float:
    wanted = diffusers_run(DPMSolverMultistepScheduler(**SCHEDULE), steps)
    return (run(diffusion.dpm_solver_pp, steps) - wanted).abs().max().item()


def diffusers_run(scheduler, steps: int) -> Tensor:
    scheduler.set_timesteps(steps)
    if isinstance(scheduler, DPMSolverMultistepScheduler):  # numpy has rounded its sigmas to float32
        a = scheduler.alphas_cumprod[scheduler.timesteps]
        scheduler.sigmas = torch.cat([((1 - a) / a).sqrt(), torch.zeros(1, dtype=torch.float64)])
    x, latents = GOLDEN.inputs["x_T"], []
    for t in scheduler.timesteps.tolist():
        x = scheduler.step(eps(x, t), t, x).prev_sample
        latents.append(x)
    return torch.stack(latents)


def counter() -> tuple[list[int], diffusion.Eps]:
    calls: list[int] = []

    def counted(x: Tensor, t: int) -> Tensor:
        calls.append(t)
        return eps(x, t)

    return calls, counted


def assert_close(got: Tensor, wanted: Tensor, atol: float = ATOL) -> None:
    assert got.shape == wanted.shape
    torch.testing.assert_close(got, wanted, atol=atol, rtol=0)
