"""The path, the losses, the integrators and guidance, against closed forms."""

import math

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

import flow


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# ------------------------------------------------------------------------------
# Training, Eqs. 4 and 27-29.


def test_the_path_runs_from_noise_to_data_with_constant_velocity():
    z, eps = randn(3, 2, 4, 4), randn(3, 2, 4, 4, seed=1)
    assert_close(flow.interpolate(z, eps, torch.zeros(3)), eps)
    assert_close(flow.interpolate(z, eps, torch.ones(3)), z)
    t = torch.tensor([0.1, 0.5, 0.9])
    moved = flow.interpolate(z, eps, t + 0.05) - flow.interpolate(z, eps, t)
    assert_close(moved, 0.05 * flow.velocity(z, eps))


def test_flow_matching_and_cosine_against_a_double_loop():
    v_hat, v = randn(2, 3, 2, 2), randn(2, 3, 2, 2, seed=1)
    square, cosine = [], []
    for b in range(2):
        pairs = zip(v_hat[b].flatten(), v[b].flatten())
        square.append(sum(float((p - q) ** 2) for p, q in pairs) / 12)
        for i in range(2):
            for j in range(2):
                p, q = v_hat[b, :, i, j].double(), v[b, :, i, j].double()
                cosine.append(1 - float(p @ q) / math.sqrt(float(p @ p) * float(q @ q)))
    assert_close(flow.flow_matching_per_sample(v_hat, v), torch.tensor(square))
    assert_close(flow.flow_matching(v_hat, v), torch.tensor(square).mean())
    assert_close(flow.cosine_velocity(v_hat, v), torch.tensor(cosine).mean())


def test_normalize_and_its_inverse():
    z, mean, std = randn(2, 3, 4, 4) * 5 + 2, randn(3), randn(3, seed=1).exp()
    there = flow.normalize(z, mean, std)
    assert_close(there[1, 2], (z[1, 2] - mean[2]) / std[2])
    assert_close(flow.denormalize(there, mean, std), z)


def test_the_time_shift_fixes_the_ends_and_moves_towards_the_noise():
    t = torch.linspace(0, 1, 11)
    shifted = flow.time_shift(t, 0.3)
    assert_close(shifted[[0, -1]], torch.tensor([0.0, 1.0]))
    assert (shifted[1:-1] < t[1:-1]).all()
    assert_close(flow.time_shift(shifted, 1 / 0.3), t)


# ------------------------------------------------------------------------------
# Sampling.  For data N(mean, std^2) the exact velocity is known, and its flow
# maps the noise eps to mean + std eps.


def gaussian_velocity(mean: float, std: float) -> flow.Velocity:
    """E[z - eps | x_t] where z ~ N(mean, std^2) and x_t = t z + (1 - t) eps.

    Var x_t = t^2 std^2 + (1 - t)^2 and Cov(z - eps, x_t) = t std^2 - (1 - t),
    so v = mean + Cov / Var (x_t - t mean).
    """

    def velocity(x: Tensor, t: float) -> Tensor:
        covariance, variance = t * std**2 - (1 - t), t**2 * std**2 + (1 - t) ** 2
        return mean + covariance / variance * (x - t * mean)

    return velocity


@pytest.mark.parametrize("shift", [1.0, 0.3])
@pytest.mark.parametrize("integrate, order", [(flow.euler, 1), (flow.heun, 2)])
def test_order_of_the_ode_integrators(integrate, order, shift):
    """Twice the steps divide the error by 2 to the order."""
    eps, mean, std = randn(1000, 2).double(), 3.0, 0.5
    errors = [
        integrate(gaussian_velocity(mean, std), eps, n, shift) - (mean + std * eps)
        for n in (50, 100, 200)
    ]
    errors = [error.abs().max().item() for error in errors]
    for coarse, fine in zip(errors, errors[1:]):
        assert coarse / fine == pytest.approx(2**order, rel=0.15)
    assert errors[2] < (0.05, 2e-3)[order - 1]


def moments_of_the_sde(steps: int, **options) -> tuple[float, float]:
    """Exact mean and variance of the SDE's end for data N(3, 0.25).

    With a Gaussian's velocity the end is affine in the `steps` independent
    noises: the start, and one for every step but the last.  Row 0 has none of
    them, which gives the mean.  Row j has a unit of noise j, which gives its
    weight.
    """
    units = torch.cat([torch.zeros(1, steps), torch.eye(steps)]).double()
    end = flow.euler_maruyama(
        gaussian_velocity(3.0, 0.5),
        units[:, :1],
        steps,
        noise_fn=lambda k: units[:, k + 1 : k + 2],
        **options,
    )[:, 0]
    return end[0].item(), (end[1:] - end[0]).square().sum().item()


@pytest.mark.parametrize("shift", [1.0, 0.3])
def test_the_sde_ends_in_the_data_with_weak_order_one(shift):
    errors = []
    for n in (200, 400, 800):
        mean, variance = moments_of_the_sde(n, shift=shift, last=1 / n)
        assert_close(mean, 3.0)
        errors.append(abs(variance - 0.25))
    for coarse, fine in zip(errors, errors[1:]):
        assert coarse / fine == pytest.approx(2, rel=0.15)
    assert errors[2] < 1e-3


def test_the_sde_by_hand():
    """v = 1 from x = 0 at t = 0, 0.6, 1, so last = 0.4, with the noise 2.

    At 0 the drift is v + t v - x = 1, so x = 0.6 + sqrt(2 * 1 * 0.6) * 2.
    At 0.6 it is 1 + 0.6 - x, and there is no noise.
    """
    end = flow.euler_maruyama(
        lambda x, t: torch.ones_like(x),
        torch.zeros(1),
        2,
        last=0.4,
        noise_fn=lambda k: torch.full((1,), 2.0),
    )
    x = 0.6 + 2 * 1.2**0.5
    assert_close(end, torch.tensor([x + 0.4 * (1.6 - x)]))


@pytest.mark.parametrize(
    "integrate, evaluations",
    [(flow.euler, 20), (flow.heun, 39), (flow.euler_maruyama, 20)],
)
@pytest.mark.parametrize("shift", [1.0, 0.3])
def test_evaluations_and_precision_of_every_integrator(integrate, evaluations, shift):
    """t = 1 is never asked for, and a bf16 velocity leaves the state in fp32."""
    times = []

    def field(x: Tensor, t: float) -> Tensor:
        assert x.dtype == torch.float32
        times.append(t)
        return torch.full_like(x, 2.0).bfloat16()

    options = {}
    if integrate is flow.euler_maruyama:
        options = {"noise_fn": lambda k: torch.ones(3).double()}
    end = integrate(field, torch.zeros(3), 20, shift, **options)
    assert len(times) == evaluations and max(times) < 1
    assert end.dtype == torch.float32
    if integrate is not flow.euler_maruyama:
        assert_close(end, torch.full((3,), 2.0))


def test_what_cannot_be_integrated_is_refused():
    field, x = (lambda x, t: x), torch.ones(1)
    for steps, shift in ((0, 1.0), (4, 0.0)):
        for integrate in (flow.euler, flow.heun):
            with pytest.raises(ValueError):
                integrate(field, x, steps, shift)
        with pytest.raises(ValueError):
            flow.euler_maruyama(field, x, steps, shift, noise_fn=lambda k: x)


# ------------------------------------------------------------------------------
# Guidance.


def network(x: Tensor, t: Tensor, y: Tensor) -> Tensor:
    """Tells label, time and row apart: y + t + x."""
    return x + (y + t)[:, None, None, None]


def test_guidance_by_hand():
    """With labels 2, 5 and null 10: weak + 3 (v - weak) = v + 2 (v - weak)."""
    x, y = randn(2, 4, 2, 2), torch.tensor([2, 5])
    v, weak = network(x, torch.full((2,), 0.5), y), network(
        x, torch.full((2,), 0.5), torch.tensor([10, 10])
    )
    field = flow.guided_velocity(network, y, 10, 3.0, (0.2, 0.8))
    assert_close(field(x, 0.5), v + 2 * (v - weak))
    assert_close(field(x, 0.1), network(x, torch.full((2,), 0.1), y))
    assert_close(field(x, 0.9), network(x, torch.full((2,), 0.9), y))
    some = flow.guided_velocity(network, y, 10, 3.0, (0.2, 0.8), channels=3)(x, 0.5)
    assert_close(some[:, :3], (v + 2 * (v - weak))[:, :3])
    assert_close(some[:, 3:], v[:, 3:])


def test_a_guide_takes_the_place_of_the_null_label():
    x, y = randn(2, 4, 2, 2), torch.tensor([2, 5])
    field = flow.guided_velocity(network, y, 10, 1.5, guide=lambda x, t, y: 2 * x)
    v = network(x, torch.full((2,), 0.5), y)
    assert_close(field(x, 0.5), 2 * x + 1.5 * (v - 2 * x))


def test_without_guidance_one_network_is_evaluated_once():
    rows = []

    def counting(x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        rows.append(len(x))
        return x

    x, y = randn(3, 1, 2, 2), torch.tensor([0, 1, 2])
    for scale, t in ((1.0, 0.5), (2.0, 0.1), (2.0, 0.5)):
        flow.guided_velocity(counting, y, 9, scale, (0.3, 1.0))(x, t)
    assert rows == [3, 3, 6]
