"""Noise schedule, training loss and samplers.

    training    x_t = sqrt(a_t) x_0 + sqrt(1 - a_t) eps,   L = |eps - eps_theta(x_t, t)|^2        Eq. 7
    sampling    `for x in plms(eps, x, steps): ...`: a generator gives the latent after every step, so that the caller
                can show progress, look at it, or stop

`eps(x, t)` takes a latent (b,c,y,x) and an integer timestep and returns the predicted noise; guidance and conditions are
the caller's. Coefficients are Python floats made in float64: no sampler waits for the device.
"""

import math
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

Eps = Callable[[Tensor, int], Tensor]

TIMESTEPS = 1000


def alphas_cumprod(device: torch.device) -> Tensor:
    """(1000,) float64, "linear" in CompVis and "scaled_linear" in diffusers: 0.99915 at t=0, 0.00466 at t=999."""
    # Made where they are used: a step of training that copied them to a GPU would wait for it.
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, TIMESTEPS, dtype=torch.float64, device=device) ** 2
    return torch.cumprod(1 - betas, dim=0)


ALPHAS: list[float] = alphas_cumprod(torch.device("cpu")).tolist()


def q_sample(x0: Tensor, t: Tensor, noise: Tensor) -> Tensor:
    """x0, noise (b,c,y,x), t (b,) int64 -> x_t, the latent with the noise of timestep t (forward process)."""
    a = alphas_cumprod(t.device)[t][:, None, None, None]
    return (a.sqrt() * x0 + (1 - a).sqrt() * noise).to(x0.dtype)


def eps_loss(predicted: Tensor, noise: Tensor) -> Tensor:
    """Eq. 7: the mean squared error of the noise, in float32 (or wider), over each sample: (b,)."""
    wide = torch.promote_types(noise.dtype, torch.float32)
    return (predicted.to(wide) - noise.to(wide)).square().flatten(1).mean(1)


def v_to_eps(v: Tensor, x: Tensor, a: Tensor | float) -> Tensor:
    """v = sqrt(a) eps - sqrt(1 - a) x_0 (arXiv 2202.00512) and x_t -> eps; a is a_t, a number or (b,1,1,1)."""
    return a**0.5 * v + (1 - a) ** 0.5 * x


def guided(conditional: Tensor, unconditional: Tensor, scale: float) -> Tensor:
    """Classifier-free guidance; scale 1 is the conditional prediction, 0 the unconditional one."""
    return unconditional + scale * (conditional - unconditional)


def timesteps(steps: int) -> list[int]:
    """
    Exactly `steps` timesteps, falling: 981, 961, ... 1 for 50 (the original's list where `steps` divides 1000).

    Raises ValueError unless 2 to 500. A sampler is a generator: it raises when the first latent is asked for.
    """
    if not 2 <= steps <= 500:
        raise ValueError(f"steps is {steps}, must be 2 to 500")
    return [i * (TIMESTEPS // steps) + 1 for i in reversed(range(steps))]


def predict_x0(x: Tensor, e: Tensor, t: int) -> Tensor:
    return (x - math.sqrt(1 - ALPHAS[t]) * e) / math.sqrt(ALPHAS[t])


def ddim_step(x: Tensor, e: Tensor, t: int, t_next: int) -> Tensor:
    """From t to t_next without new noise (eta 0); t_next < 0 is the end, which CompVis puts at a_0, not at 1."""
    a = ALPHAS[max(t_next, 0)]
    return math.sqrt(a) * predict_x0(x, e, t) + math.sqrt(1 - a) * e


def ddim(eps: Eps, x: Tensor, steps: int) -> Iterator[Tensor]:
    """DDIM (arXiv 2010.02502) with eta 0: `steps` network calls."""
    ts, stride = timesteps(steps), TIMESTEPS // steps
    for t in ts:
        x = ddim_step(x, eps(x, t), t, t - stride)
        yield x


# Adams-Bashforth: how much of the newest prediction, and of those before it, by how many there are.
ADAMS_BASHFORTH = {
    2: (3 / 2, -1 / 2),
    3: (23 / 12, -16 / 12, 5 / 12),
    4: (55 / 24, -59 / 24, 37 / 24, -9 / 24),
}


def plms(eps: Eps, x: Tensor, steps: int) -> Iterator[Tensor]:
    """PLMS (arXiv 2202.09778), the paper's sampler: steps + 1 network calls, the extra one in the first step."""
    ts, stride = timesteps(steps), TIMESTEPS // steps
    history: list[Tensor] = []  # newest first, raw predictions only
    for t in ts:
        e = eps(x, t)
        history = [e, *history[:3]]
        if len(history) == 1:  # pseudo improved Euler: the average of the slopes at both ends of the step
            slope = (e + eps(ddim_step(x, e, t, t - stride), t - stride)) / 2
        else:
            slope = sum(w * h for w, h in zip(ADAMS_BASHFORTH[len(history)], history, strict=True))
        x = ddim_step(x, slope, t, t - stride)
        yield x


def dpm_solver_pp(eps: Eps, x: Tensor, steps: int) -> Iterator[Tensor]:
    """DPM-Solver++(2M) (arXiv 2211.01095), on diffusers' timesteps: evenly from 999 down, the last step ends at x_0."""
    timesteps(steps)  # for its check
    grid = torch.linspace(0, TIMESTEPS - 1, steps + 1, dtype=torch.float64).round().int().tolist()[:0:-1]
    x0_before, lambda_before = None, 0.0
    for t, t_next in zip(grid, [*grid[1:], None], strict=True):
        x0 = predict_x0(x, eps(x, t), t)
        if t_next is None:
            yield x0
            return
        alpha, sigma, lam = _half_log_snr(t)
        alpha_next, sigma_next, lam_next = _half_log_snr(t_next)
        h = lam_next - lam
        d = x0
        if x0_before is not None:  # second order: extrapolate with the prediction before
            r = (lam - lambda_before) / h
            d = x0 + (x0 - x0_before) / (2 * r)
        x = (sigma_next / sigma) * x - alpha_next * math.expm1(-h) * d
        x0_before, lambda_before = x0, lam
        yield x


def _half_log_snr(t: int) -> tuple[float, float, float]:
    alpha, sigma = math.sqrt(ALPHAS[t]), math.sqrt(1 - ALPHAS[t])
    return alpha, sigma, math.log(alpha / sigma)


def ddpm_step(x: Tensor, e: Tensor, t: int, noise: Tensor) -> Tensor:
    """One ancestral step from t to t - 1 (arXiv 2006.11239, Eq. 6-7, 11); at t = 0 the noise is not used."""
    before = ALPHAS[t - 1] if t > 0 else 1.0
    beta = 1 - ALPHAS[t] / before
    mean = (
        math.sqrt(before) * beta / (1 - ALPHAS[t]) * predict_x0(x, e, t)
        + math.sqrt(1 - beta) * (1 - before) / (1 - ALPHAS[t]) * x
    )
    return mean + math.sqrt(beta * (1 - before) / (1 - ALPHAS[t])) * noise


SAMPLERS = {"plms": plms, "ddim": ddim, "dpm++": dpm_solver_pp}
