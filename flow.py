"""Flow matching: how the transformer learns, and how it is integrated.

    x_t = flow.interpolate(z, eps, t)                        # Eq. 27
    v = flow.velocity(z, eps)                                # Eq. 28
    loss = flow.flow_matching(dit(x_t, t, y), v)             # Eqs. 4 and 29
    z = flow.euler(velocity_fn, noise, steps=50)             # Eqs. 30 and 31

Everywhere t = 1 is the data and t = 0 the noise, as in supplement C and in the
released SiT and LightningDiT weights.  Section 5.1 of the paper writes it the
other way round.  Latents z, or points of the toy, are [B, ...], and so are eps,
x_t and v; t is [B].
"""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

# ------------------------------------------------------------------------------
# The transformer learns latents of zero mean and unit deviation in every
# channel.  Training normalises, and sampling must undo it.  Forgetting one of the two
# is the most common failure with VA-VAE's latents.


def normalize(z: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """(z - mean) / std per channel.  z: [B, C, h, w]; mean and std: [C]."""
    return (z - mean.to(z)[:, None, None]) / std.to(z)[:, None, None]


def denormalize(z: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """z * std + mean per channel, in front of the decoder."""
    return z * std.to(z)[:, None, None] + mean.to(z)[:, None, None]


# ------------------------------------------------------------------------------
# Training.  Eq. 2 names a path from data to noise in general, and Eq. 3 the
# loss of a network that predicts the noise.  The paper and this project take
# the straight path and predict its velocity, Eq. 4.


def interpolate(z: Tensor, eps: Tensor, t: Tensor) -> Tensor:
    """The point between noise and data, Eq. 27: x_t = (1 - t) eps + t z."""
    t = t.view(-1, *[1] * (z.ndim - 1))
    return (1 - t) * eps + t * z


def velocity(z: Tensor, eps: Tensor) -> Tensor:
    """The derivative of x_t in t, Eq. 28: v = z - eps."""
    return z - eps


def flow_matching_per_sample(v_hat: Tensor, v: Tensor) -> Tensor:
    """Mean of (v_hat - v)^2 over all but the batch: [B]."""
    return (v_hat.float() - v).square().flatten(1).mean(1)


def flow_matching(v_hat: Tensor, v: Tensor) -> Tensor:
    """E |v_hat - v|^2, Eqs. 4 and 29, divided by the dimension of the latent.

    Its minimum is not 0 but the variance of v given x_t.
    """
    return flow_matching_per_sample(v_hat, v).mean()


def cosine_velocity(v_hat: Tensor, v: Tensor) -> Tensor:
    """LightningDiT's second term: mean of 1 - cos(v_hat, v) over positions.

    The angle is taken over the channels of [B, C, h, w].
    """
    return (1 - F.cosine_similarity(v_hat.float(), v, dim=1)).mean()


def time_shift(t: Tensor, shift: float) -> Tensor:
    """Move times: shift * t / (1 + (shift - 1) t).

    It fixes 0 and 1, and a shift below 1 moves the rest towards the noise.  The
    source is SD3 (Esser et al. 2024), with time reversed.  ValueError unless
    shift > 0.
    """
    if shift <= 0:
        raise ValueError(f"the time shift must be positive, got {shift}")
    return shift * t / (1 + (shift - 1) * t)


# ------------------------------------------------------------------------------
# Sampling.  The integrators start from noise x at t = 0, call
# velocity_fn(x, t) with t as a Python number, and return the latent at t = 1.

Velocity = Callable[[Tensor, float], Tensor]


def time_grid(steps: int, shift: float = 1.0) -> list[float]:
    """The steps + 1 times of an integration: k / steps, then shifted."""
    if steps < 1:
        raise ValueError(f"an integration needs a step, got {steps}")
    times = torch.linspace(0, 1, steps + 1, dtype=torch.float64)
    return time_shift(times, shift).tolist()


@torch.no_grad()
def euler(velocity_fn: Velocity, x: Tensor, steps: int, shift: float = 1.0) -> Tensor:
    """Integrate the ODE of Eq. 30 by the steps of Eq. 31.

    x <- x + (t_{k+1} - t_k) v(x, t_k), with one evaluation in each step.
    """
    times = time_grid(steps, shift)
    for t, t_next in zip(times[:-1], times[1:]):
        x = x + (t_next - t) * velocity_fn(x, t).to(x.dtype)
    return x


@torch.no_grad()
def heun(velocity_fn: Velocity, x: Tensor, steps: int, shift: float = 1.0) -> Tensor:
    """Integrate to second order, with the velocity averaged over a step's ends.

    The last step is Euler's.  It keeps the order, and t = 1, which training
    hardly sees, is never asked for.  That makes 2 steps - 1 evaluations.
    """
    times = time_grid(steps, shift)
    for k, (t, t_next) in enumerate(zip(times[:-1], times[1:])):
        v = velocity_fn(x, t).to(x.dtype)
        if k + 1 < steps:
            ahead = x + (t_next - t) * v
            v = (v + velocity_fn(ahead, t_next).to(x.dtype)) / 2
        x = x + (t_next - t) * v
    return x


@torch.no_grad()
def euler_maruyama(velocity_fn: Velocity, x: Tensor, steps: int, shift: float = 1.0, *,
                   noise_fn: Callable[[int], Tensor], last: float = 0.04) -> Tensor:
    """Integrate SiT's SDE, whose marginals are those of the ODE.

        dx = [v + (1 - t) s] dt + sqrt(2 (1 - t)) dW,   s = (t v - x) / (1 - t)

    s is the score.  noise_fn(k) draws N(0, I) of x's shape for step k.  Each
    step takes one evaluation, and the last one, whose length is `last` at any
    shift, follows the drift without noise.  Source: SiT (Ma et al. 2024) with
    the diffusion "sigma".  ValueError unless steps >= 1 and shift > 0.
    """
    if steps < 1 or shift <= 0:
        raise ValueError(f"bad steps {steps} or time shift {shift}")
    start_of_last = torch.tensor(1 - last, dtype=torch.float64)
    end = time_shift(start_of_last, 1 / shift).item()
    grid = torch.linspace(0, end, steps, dtype=torch.float64)
    times = time_shift(grid, shift).tolist() + [1.0]
    for k, (t, t_next) in enumerate(zip(times[:-1], times[1:])):
        step = t_next - t
        v = velocity_fn(x, t).to(x.dtype)
        x = x + step * (v + (t * v - x))
        if k + 1 < steps:
            x = x + math.sqrt(2 * (1 - t) * step) * noise_fn(k).to(x)
    return x


# ------------------------------------------------------------------------------
# Guidance moves the velocity away from that of a weaker network: the same one
# without the label (Ho and Salimans 2022), or another one (Karras et al. 2024).

Network = Callable[[Tensor, Tensor, Tensor], Tensor]


def guided_velocity(dit: Network, y: Tensor, null: int, scale: float,
                    interval: tuple[float, float] = (0.0, 1.0), channels: int = 0,
                    guide: Network | None = None) -> Velocity:
    """weak + scale * (v - weak) while interval[0] <= t <= interval[1], else v.

    dit: (x [B, C, h, w], t [B], y [B]) -> v.  `weak` is the velocity of `guide`
    or, without one, of `dit` at the label `null`.  Only the first `channels`
    are guided, as in LightningDiT's published numbers; 0 means all of them.
    Outside the interval, and at scale 1, one network alone is evaluated.
    """
    low, high = interval

    def velocity_fn(x: Tensor, t: float) -> Tensor:
        times = x.new_full((len(x),), t)
        if scale == 1 or not low <= t <= high:
            return dit(x, times, y)
        if guide:
            v, weak = dit(x, times, y).float(), guide(x, times, y).float()
        else:
            both = torch.cat([x, x]), torch.cat([times, times])
            labels = torch.cat([y, torch.full_like(y, null)])
            v, weak = dit(*both, labels).float().chunk(2)
        guided = weak + scale * (v - weak)
        if channels:
            guided = torch.cat([guided[:, :channels], v[:, channels:]], 1)
        return guided

    return velocity_fn
