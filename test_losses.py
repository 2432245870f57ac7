"""What the paper says of its losses, as tests.

First come the claims: the variance collapses without Variance Expansion, with
it sigma^4 settles at lambda1 / T, and Eq. 10 stops the latent's scale.  Then
come the formulas, against closed forms and independent oracles.
"""

import math

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

import losses


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# ------------------------------------------------------------------------------
# The claims.  A linear decoder with slopes a answers the noise sigma eps with an
# error of sigma^2 a^2 on average, so T = a^2 in Eq. 8.


def settle(objective, steps: int = 2000) -> Tensor:
    """The log sigma^2 [1, 4] at which Adam arrives from sigma = 1."""
    logvar = torch.zeros(1, 4, requires_grad=True)
    optimizer = torch.optim.Adam([logvar], 0.05)
    for _ in range(steps):
        optimizer.zero_grad()
        objective(logvar).backward()
        optimizer.step()
    return logvar.detach()


def test_the_variance_collapses_under_the_reconstruction_alone():
    """Eq. 12: the pull on sigma is 2 sigma T > 0 everywhere, without an end."""
    first, second = (settle(lambda v: v.exp().sum(), n) for n in (500, 1000))
    assert (first < -4).all() and (second < first - 1).all()


def test_variance_expansion_settles_at_the_equilibrium_of_equation_14():
    """Eq. 15: sigma^2 T + lambda1 / sigma^2 is smallest at sigma^4 = lambda1 / T."""
    T, lambda1 = torch.tensor([[0.1, 1.0, 10.0, 1000.0]]), 0.1
    logvar = settle(
        lambda v: (v.exp() * T).sum() + lambda1 * losses.inverse_variance(v, 1e-9)
    )
    assert_close(logvar.exp().square(), lambda1 / T, rtol=0.01, atol=0)


def test_the_log_entropy_settles_at_another_equilibrium():
    """sigma^2 T - w log sigma^2 is smallest at sigma^2 = w / T."""
    T = torch.tensor([[0.1, 0.3, 1.0, 10.0]])
    logvar = settle(lambda v: (v.exp() * T).sum() + 0.1 * losses.log_entropy(v))
    assert_close(logvar.exp(), 0.1 / T, rtol=0.01, atol=0)


def test_negative_variance_has_no_equilibrium():
    """sigma^2 (T - w) only has a sign: it collapses below w and explodes above."""
    T = torch.tensor([[0.01, 0.05, 0.2, 1.0]])
    logvar = settle(lambda v: (v.exp() * T).sum() + 0.1 * losses.negative_variance(v))
    assert (logvar[0, :2] > 5).all() and (logvar[0, 2:] < -5).all()


def linear_autoencoder(lambda2: float) -> tuple[float, float]:
    """Train z = a x + sigma eps and x_hat = z / a on x ~ N(0, 1) by Eq. 11.

    The error is sigma^2 / a^2, so that a larger a makes any sigma free.
    Returns: a, sigma^2.
    """
    log_a = torch.zeros(1, 1, requires_grad=True)
    logvar = torch.zeros(1, 1, requires_grad=True)
    optimizer = torch.optim.Adam([log_a, logvar], 0.05)
    draws = torch.Generator().manual_seed(0)
    for _ in range(1500):
        x, eps = torch.randn(2, 256, 1, generator=draws)
        z = losses.reparameterize(log_a.exp() * x, logvar.expand(256, 1), eps)
        loss = (
            losses.squared_error(z / log_a.exp(), x)
            + 0.1 * losses.inverse_variance(logvar)
            + lambda2 * losses.exponential_magnitude(z)
        )
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return log_a.exp().item(), logvar.exp().item()


def test_the_magnitude_penalty_stops_the_scale():
    """Without Eq. 10 scale and variance grow as long as the training lasts."""
    a, variance = linear_autoencoder(lambda2=0.0)
    assert a > 100 and variance > 20
    a, variance = linear_autoencoder(lambda2=1e-3)
    assert 1 < a < 5 and 0.1 < variance < 5


# ------------------------------------------------------------------------------
# Eq. 5, the posterior.


def test_moments_are_split_in_float32_and_clamped():
    # [B, 2C, 1] with B = 1 and C = 2
    moments = torch.tensor([[[1.0], [2.0], [-40.0], [30.0]]], dtype=torch.bfloat16)
    mean, logvar = losses.split_moments(moments)
    assert mean.dtype == logvar.dtype == torch.float32
    assert mean.flatten().tolist() == [1, 2]
    assert logvar.flatten().tolist() == [-30, 20]


def test_reparameterize_is_an_affine_transform_of_the_noise():
    mean, logvar, eps = (randn(2, 3, 4, seed=k) for k in range(3))
    oracle = torch.distributions.AffineTransform(mean, logvar.exp().sqrt())
    assert_close(losses.reparameterize(mean, logvar, eps), oracle(eps))


# ------------------------------------------------------------------------------
# Eqs. 9 and 10.


@pytest.mark.parametrize("delta", [1e-8, 1e-6, 1e-2])
def test_inverse_variance_is_equation_9(delta):
    """Against the literal 1 / (sigma^2 + delta) in float64, over all of logvar."""
    logvar = torch.linspace(-30, 20, 101)[None]
    oracle = (1 / (logvar.double().exp() + delta)).sum()
    found = losses.inverse_variance(logvar, delta).double()
    assert_close(found, oracle, rtol=1e-5, atol=0)


def test_inverse_variance_pushes_hardest_where_sigma_is_small():
    """Its derivative in sigma is -2 / sigma^3 as long as sigma^2 >> delta."""
    sigma = torch.tensor([[0.01, 0.1, 1.0, 10.0]], requires_grad=True)
    losses.inverse_variance(2 * sigma.log(), 1e-9).backward()
    assert_close(sigma.grad, -2 * sigma.detach() ** -3, rtol=1e-4, atol=0)


def test_the_pull_on_logvar_peaks_at_delta():
    """sigma^2 / (sigma^2 + delta)^2 is at most 1 / (4 delta), at sigma^2 = delta."""
    delta, offsets = 1e-4, torch.tensor([[-5.0, -0.1, 0.0, 0.1, 5.0]])
    logvar = (math.log(delta) + offsets).requires_grad_()
    losses.inverse_variance(logvar, delta).backward()
    pull = -logvar.grad[0]
    assert pull.argmax() == 2
    assert_close(pull[2], torch.tensor(1 / (4 * delta)))


@pytest.mark.parametrize("delta", [0.0, -1.0])
def test_delta_must_be_positive(delta):
    with pytest.raises(ValueError, match="delta"):
        losses.inverse_variance(torch.zeros(1, 1), delta)


@pytest.mark.parametrize("tau", [0.0, 1.0, 3.0])
def test_exponential_magnitude_is_equation_10(tau):
    z = torch.linspace(-20, 20, 81)[None]
    oracle = (z.double().abs() - tau).exp().sum()
    assert_close(losses.exponential_magnitude(z, tau).double(), oracle)


def test_exponential_magnitude_goes_on_as_its_tangent():
    """From u = |z| - tau = 4 on it is e^4 (1 + u - 4), with the slope e^4."""
    z = torch.tensor([[5.01, 8.0, -1000.0]], requires_grad=True)
    value = losses.exponential_magnitude(z, tau=1.0, linear_from=4.0)
    value.backward()
    top = math.exp(4)
    assert_close(value, torch.tensor(top * (1.01 + (1 + 3) + (1 + 995))))
    assert_close(z.grad[0], torch.tensor([top, top, -top]))
    assert losses.exponential_magnitude(torch.full((1, 4), 1e9)).isfinite()


def test_who_gets_a_gradient():
    """Eq. 9 acts on the variance alone.  Eq. 10 acts on the sample, and through
    it on the mean and on the variance."""
    mean, logvar = randn(2, 3).requires_grad_(), randn(2, 3, seed=1).requires_grad_()
    losses.inverse_variance(logvar).backward()
    assert mean.grad is None and (logvar.grad < 0).all()
    logvar.grad = None
    z = losses.reparameterize(mean, logvar, randn(2, 3, seed=2))
    losses.exponential_magnitude(z).backward()
    assert (mean.grad != 0).all() and (logvar.grad != 0).all()


def test_gradients_by_finite_differences():
    logvar = randn(2, 3).double().requires_grad_()
    z = randn(2, 3, seed=1).double().requires_grad_()
    check = torch.autograd.gradcheck
    assert check(lambda a: losses.inverse_variance(a, 0.1), logvar)
    assert check(lambda a: losses.exponential_magnitude(a, 1.0, 0.5), z)
    assert check(losses.kl_divergence, (z, logvar))


# ------------------------------------------------------------------------------
# What Eq. 9 is compared with.


def test_kl_is_that_of_torch_distributions():
    mean, logvar = randn(3, 4, 2, 2), randn(3, 4, 2, 2, seed=1)
    posterior = torch.distributions.Normal(mean, (0.5 * logvar).exp())
    prior = torch.distributions.Normal(0.0, 1.0)
    oracle = torch.distributions.kl_divergence(posterior, prior).sum((1, 2, 3)).mean()
    assert_close(losses.kl_divergence(mean, logvar), oracle)


def test_the_other_forms_of_analyze_2():
    """-2 H = -log sigma^2 - log(2 pi e), with H the entropy of a Gaussian."""
    logvar = randn(2, 3, 4)
    assert_close(losses.negative_variance(logvar), -logvar.exp().sum() / 2)
    entropy = torch.distributions.Normal(0.0, (0.5 * logvar).exp()).entropy()
    constant = math.log(2 * math.pi * math.e) * 12
    oracle = -(2 * entropy).sum() / 2 + constant
    assert_close(losses.log_entropy(logvar), oracle)


# ------------------------------------------------------------------------------
# Sums over C, H, W and averages over B, for every term of an objective alike.


def test_every_term_is_a_sum_over_the_image_and_a_mean_over_the_batch():
    """One image of 12 values is all 0.5, the other three are 0."""
    a = torch.zeros(4, 3, 2, 2)
    a[0] = 0.5
    zero, one = torch.zeros_like(a), torch.ones(4, 3, 2, 2)
    found = [
        losses.absolute_error(a, zero),
        losses.squared_error(a, zero),
        losses.euclidean_error(a, zero),
        losses.square_magnitude(a),
        losses.inverse_variance(zero, 1e-6),
        losses.exponential_magnitude(one, 1.0),
        losses.kl_divergence(one, zero),
    ]
    expected = [12 * 0.5, 12 * 0.25, math.sqrt(3), 12 * 0.25]
    expected = [value / 4 for value in expected] + [12, 12, 6]
    assert_close(torch.stack(found), torch.tensor(expected))


def test_the_norm_of_equation_26_has_a_gradient_at_zero():
    x_hat = torch.zeros(2, 2, requires_grad=True)
    losses.euclidean_error(x_hat, torch.zeros(2, 2)).backward()
    assert_close(x_hat.grad, torch.zeros(2, 2))


def test_perceptual_error_is_scaled_to_a_sum_and_switches_dropout_off():
    class MeanError(torch.nn.Module):
        def forward(self, a: Tensor, b: Tensor) -> Tensor:
            assert not self.training and a.dtype == torch.float32
            return (a - b).abs().mean((1, 2, 3), keepdim=True)

    x_hat, x = randn(2, 3, 4, 4).bfloat16(), randn(2, 3, 4, 4, seed=1)
    found = losses.perceptual_error(MeanError().train(), x_hat, x)
    assert_close(found, losses.absolute_error(x_hat.float(), x))


# ------------------------------------------------------------------------------
# The adversarial loss and the alignment.


def test_hinge_losses_by_hand():
    """1/2 (mean of 0, 0.5 + mean of 0, 3) = 0.875, and -(-2 + 2) / 2 = 0."""
    real, fake = torch.tensor([2.0, 0.5]), torch.tensor([-2.0, 2.0])
    assert_close(losses.hinge_discriminator(real, fake), torch.tensor(0.875))
    assert_close(losses.hinge_generator(fake), torch.tensor(0.0))


def test_adaptive_weight_is_a_ratio_of_norms_with_a_maximum():
    a = torch.tensor([3.0, 4.0], requires_grad=True)
    weight = losses.adaptive_weight(a, torch.tensor([0.0, 2.0]))
    assert_close(weight, torch.tensor(5 / 2.0001))
    assert not weight.requires_grad
    assert losses.adaptive_weight(a, torch.zeros(2)) == 1e4


def test_alignment_losses_against_double_loops():
    z, f = randn(2, 4, 2, 3), randn(2, 4, 2, 3, seed=1)
    cosines, distances = [], []

    def cosine(p: Tensor, q: Tensor) -> float:
        return float(p.double() @ q.double() / (p.double().norm() * q.double().norm()))

    for b in range(2):
        zs, fs = z[b].flatten(1).T, f[b].flatten(1).T
        for i in range(6):
            cosines.append(max(0.0, 1 - 0.5 - cosine(zs[i], fs[i])))
            for j in range(6):
                difference = cosine(zs[i], zs[j]) - cosine(fs[i], fs[j])
                distances.append(max(0.0, abs(difference) - 0.25))
    assert_close(losses.marginal_cosine(z, f), torch.tensor(cosines).mean())
    found = losses.marginal_distance_matrix(z, f)
    assert_close(found, torch.tensor(distances).mean())
    assert losses.marginal_cosine(f, 2 * f, 0.0) < 1e-6
    assert losses.marginal_distance_matrix(f, 3 * f, 0.0) < 1e-6
