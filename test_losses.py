"""The losses against closed forms (worked out beside each test), independent oracles, and what the paper
says of them.
"""

import math

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

import losses


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# ------------------------------------------------------------------------------------------------------------
# The posterior, Eq. 5.


def test_moments_split_in_fp32_and_clamp():
    moments = torch.tensor([[[1.0], [2.0], [-40.0], [30.0]]], dtype=torch.bfloat16)     # [B=1, 2C=4, 1]
    mean, logvar = losses.split_moments(moments)
    assert mean.dtype == logvar.dtype == torch.float32
    assert_close(mean.flatten(), torch.tensor([1.0, 2.0]))
    assert_close(logvar.flatten(), torch.tensor([-30.0, 20.0]))


def test_reparameterize_is_the_torch_normal():
    mean, logvar, eps = randn(2, 3, 4), randn(2, 3, 4, seed=1), randn(2, 3, 4, seed=2)
    transform = torch.distributions.AffineTransform(mean, logvar.exp().sqrt())
    assert_close(losses.reparameterize(mean, logvar, eps), transform(eps))


def test_reparameterize_gradients():
    """dz/dmean = 1 and dz/dlogvar = sigma eps / 2."""
    mean, logvar, eps = randn(5).requires_grad_(), randn(5, seed=1).requires_grad_(), randn(5, seed=2)
    losses.reparameterize(mean, logvar, eps).sum().backward()
    assert_close(mean.grad, torch.ones(5))
    assert_close(logvar.grad, 0.5 * (0.5 * logvar.detach()).exp() * eps)


def test_sigma_vae_noise_is_fixed_or_scaled_per_image():
    mean, eps, scale = randn(3, 2, 4, 4), randn(3, 2, 4, 4, seed=1), torch.tensor([0.0, 1.0, -2.0])
    assert_close(losses.sigma_vae_sample(mean, 0.2, eps) - mean, 0.2 * eps)
    added = losses.sigma_vae_sample(mean, 0.2, eps, scale) - mean
    for image, s in enumerate([0.0, 0.25, -0.5]):            # 0.2 / 0.8 * scale
        assert_close(added[image], s * eps[image])


@pytest.mark.parametrize("loss", ["ve", "kl", "sigma", "none"])
def test_sample_posterior_draws_what_each_loss_trains_on(loss):
    moments, eps, scale = randn(2, 6, 2, 2), randn(2, 3, 2, 2, seed=1), randn(2, seed=2)
    mean, logvar = losses.split_moments(moments)
    expected = {"ve": mean + (logvar / 2).exp() * eps, "kl": mean + (logvar / 2).exp() * eps,
                "sigma": mean + 0.5 * eps, "none": mean}[loss]
    assert_close(losses.sample_posterior(moments, eps, scale, loss, 0.5, "fixed"), expected)


# ------------------------------------------------------------------------------------------------------------
# Reconstruction.


def test_reconstruction_errors_sum_over_the_image_and_average_over_the_batch():
    x = torch.zeros(2, 3, 2, 2)
    x_hat = torch.zeros(2, 3, 2, 2)
    x_hat[0] = 0.5       # 12 elements: sum |.| = 6, sum squares = 3, norm = sqrt 3; the second image is exact
    assert_close(losses.absolute_error(x_hat, x), torch.tensor(3.0))
    assert_close(losses.squared_error(x_hat, x), torch.tensor(1.5))
    assert_close(losses.euclidean_error(x_hat, x), torch.tensor(math.sqrt(3) / 2))


def test_euclidean_error_has_a_finite_gradient_at_zero_error():
    x_hat = torch.zeros(2, 2, requires_grad=True)
    losses.euclidean_error(x_hat, torch.zeros(2, 2)).backward()
    assert_close(x_hat.grad, torch.zeros(2, 2))


def test_perceptual_error_is_scaled_to_a_sum_and_never_in_train_mode(monkeypatch):
    class Net(torch.nn.Module):
        def forward(self, a: Tensor, b: Tensor) -> Tensor:
            assert not self.training and a.dtype == torch.float32
            return (a - b).abs().mean((1, 2, 3), keepdim=True)

    net = Net().train()
    x_hat, x = randn(2, 3, 4, 4).bfloat16(), randn(2, 3, 4, 4, seed=1)
    assert_close(losses.perceptual_error(net, x_hat, x), losses.absolute_error(x_hat.float(), x))


def test_missing_vgg_weights_are_one_clear_line(tmp_path, monkeypatch):
    def offline(*args, **kwargs):
        raise OSError("no network")

    monkeypatch.setattr(torch.hub, "_hub_dir", str(tmp_path))
    monkeypatch.setattr(torch.hub, "download_url_to_file", offline)
    with pytest.raises(FileNotFoundError) as error:
        losses.load_lpips()
    message = str(error.value)
    assert "vgg16-397923af.pth" in message and "--perceptual-weight 0" in message and "\n" not in message


def test_lpips_with_any_trunk_is_frozen_silent_and_zero_only_on_equal_images(tmp_path, monkeypatch, capsys):
    """A random VGG-16 file in the hub cache stands in for the real one: the loading path is the same."""
    import torchvision
    (tmp_path / "checkpoints").mkdir()
    with torch.device("meta"):
        shapes = torchvision.models.vgg16(weights=None).state_dict()
    weights = {k: randn(*v.shape) * 0.05 if k.startswith("features") else torch.zeros(1).expand(v.shape)
               for k, v in shapes.items()}
    torch.save(weights, tmp_path / "checkpoints" / "vgg16-397923af.pth")
    monkeypatch.setattr(torch.hub, "_hub_dir", str(tmp_path))
    net = losses.load_lpips()
    assert capsys.readouterr().out == "" and not net.training
    assert not any(p.requires_grad for p in net.parameters())
    x = randn(1, 3, 32, 32).clamp(-1, 1)
    net.train()
    a, b = losses.perceptual_error(net, -x, x), losses.perceptual_error(net, -x, x)
    assert_close(a, b)                                      # dropout in the heads would make them differ
    assert a > 0
    assert_close(losses.perceptual_error(net, x, x), torch.tensor(0.0))


# ------------------------------------------------------------------------------------------------------------
# KL, Eq. 1.


def test_kl_matches_torch_distributions():
    mean, logvar = randn(3, 4, 2, 2), randn(3, 4, 2, 2, seed=1)
    oracle = torch.distributions.kl_divergence(torch.distributions.Normal(mean, (0.5 * logvar).exp()),
                                               torch.distributions.Normal(0.0, 1.0))
    assert_close(losses.kl_divergence(mean, logvar), oracle.sum((1, 2, 3)).mean())


def test_kl_has_its_minimum_zero_at_the_prior():
    assert_close(losses.kl_divergence(torch.zeros(1, 2), torch.zeros(1, 2)), torch.tensor(0.0))
    for mean, logvar in ((0.1, 0.0), (0.0, 0.1), (0.0, -0.1)):
        assert losses.kl_divergence(torch.full((1, 2), mean), torch.full((1, 2), logvar)) > 0


# ------------------------------------------------------------------------------------------------------------
# Variance Expansion, Eqs. 9 and 10.


@pytest.mark.parametrize("delta", [1e-8, 1e-6, 1e-2])
def test_inverse_variance_is_equation_9(delta):
    """Against the literal 1 / (sigma^2 + delta) in float64, over the whole clamped range of logvar."""
    logvar = torch.linspace(-30, 20, 101)[None]
    oracle = (1 / (logvar.double().exp() + delta)).sum()
    assert_close(losses.inverse_variance(logvar, delta).double(), oracle, rtol=1e-5, atol=0)


def test_inverse_variance_sums_over_space_and_averages_over_the_batch():
    logvar = torch.zeros(4, 3, 2, 2)                                        # 12 elements of 1 / (1 + delta)
    assert_close(losses.inverse_variance(logvar, 1e-6), torch.tensor(12 / (1 + 1e-6)))


def test_inverse_variance_always_pushes_outwards_and_hardest_where_sigma_is_small():
    """d/dsigma = -2 sigma / (sigma^2 + delta)^2: negative everywhere, growing like sigma^-3 down to delta."""
    sigma = torch.tensor([[0.01, 0.1, 1.0, 10.0]], requires_grad=True)
    losses.inverse_variance(2 * sigma.log(), 1e-9).backward()
    assert (sigma.grad < 0).all()
    assert_close(sigma.grad, -2 * sigma.detach() ** -3, rtol=1e-4, atol=0)


def test_inverse_variance_pull_on_logvar_peaks_at_delta():
    """sigma^2 / (sigma^2 + delta)^2 is largest, 1 / (4 delta), at sigma^2 = delta and fades below it."""
    delta = 1e-4
    logvar = (math.log(delta) + torch.tensor([[-5.0, -0.1, 0.0, 0.1, 5.0]])).requires_grad_()
    losses.inverse_variance(logvar, delta).backward()
    pull = -logvar.grad[0]
    assert pull.argmax() == 2
    assert_close(pull[2], torch.tensor(1 / (4 * delta)))


@pytest.mark.parametrize("delta", [0.0, -1.0])
def test_inverse_variance_refuses_a_delta_that_is_not_positive(delta):
    with pytest.raises(ValueError, match="delta"):
        losses.inverse_variance(torch.zeros(1, 1), delta)


def test_the_other_candidates_of_analyze_2():
    logvar = randn(2, 3, 4)
    assert_close(losses.negative_variance(logvar), -logvar.exp().sum() / 2)
    assert_close(losses.log_entropy(logvar), -logvar.sum() / 2)
    # Candidate (ii) against the entropy of the Gaussian, H = 1/2 log(2 pi e sigma^2): it is -2 H up to a
    # constant.
    entropy = torch.distributions.Normal(0.0, (0.5 * logvar).exp()).entropy()
    constant = math.log(2 * math.pi * math.e) * 12
    assert_close(losses.log_entropy(logvar), -(2 * entropy).sum() / 2 + constant)


@pytest.mark.parametrize("tau", [0.0, 1.0, 3.0])
def test_exponential_magnitude_is_equation_10_below_the_cap(tau):
    z = torch.linspace(-20, 20, 81)[None]
    assert_close(losses.exponential_magnitude(z, tau).double(), (z.double().abs() - tau).exp().sum())


def test_exponential_magnitude_has_a_linear_tail_with_a_live_gradient():
    """Above the cap the value follows the tangent: e^cap (1 + u - cap), slope e^cap, at any |z|."""
    z = torch.tensor([[5.01, 8.0, -1000.0]], requires_grad=True)
    value = losses.exponential_magnitude(z, tau=1.0, cap=4.0)
    value.backward()
    top = math.exp(4)
    assert_close(value, torch.tensor(top * (1.01 + (1 + 3) + (1 + 995))))
    assert_close(z.grad[0].abs(), torch.tensor([top, top, top]))
    assert torch.isfinite(losses.exponential_magnitude(torch.full((1, 4), 1e9)))


def test_exponential_magnitude_pulls_towards_zero():
    z = randn(1, 100).mul(5).requires_grad_()
    losses.exponential_magnitude(z).backward()
    assert (z.grad.sign() == z.detach().sign()).all()


def test_gradients_by_finite_differences():
    logvar, z = randn(2, 3).double().requires_grad_(), randn(2, 3, seed=1).double().requires_grad_()
    assert torch.autograd.gradcheck(lambda a: losses.inverse_variance(a, 0.1), logvar)
    assert torch.autograd.gradcheck(lambda a: losses.exponential_magnitude(a, 1.0, cap=0.5), z)
    assert torch.autograd.gradcheck(losses.kl_divergence, (z, logvar))


def test_what_gets_no_gradient():
    """Eq. 9 acts on the variance alone, Eq. 10 on the sample: through it on mean and variance both."""
    mean, logvar = randn(2, 3).requires_grad_(), randn(2, 3, seed=1).requires_grad_()
    losses.inverse_variance(logvar).backward()
    assert mean.grad is None
    logvar.grad = None
    losses.exponential_magnitude(losses.reparameterize(mean, logvar, randn(2, 3, seed=2))).backward()
    assert (mean.grad != 0).all() and (logvar.grad != 0).all()


def test_square_magnitude():
    assert_close(losses.square_magnitude(torch.full((2, 3, 2), 2.0)), torch.tensor(24.0))


# ------------------------------------------------------------------------------------------------------------
# The equilibrium of Eq. 14, the collapse of Eq. 8, and the runaway that Eq. 10 prevents.


def settle(objective, steps: int = 2000, lr: float = 0.05) -> Tensor:
    """log sigma^2 that minimises objective(logvar), by Adam from sigma = 1."""
    logvar = torch.zeros(1, 4, requires_grad=True)
    optimizer = torch.optim.Adam([logvar], lr)
    for _ in range(steps):
        optimizer.zero_grad()
        objective(logvar).backward()
        optimizer.step()
    return logvar.detach()


def test_equilibrium_of_equation_14():
    """For a linear decoder with slopes a, E||a sigma eps||^2 = sigma^2 a^2: sigma^4 = lambda / T with T =
    a^2.
    """
    T, lam = torch.tensor([[0.1, 1.0, 10.0, 1000.0]]), 0.1
    logvar = settle(lambda v: losses.weighted_sum(
        {"rec": (v.exp() * T).sum(), "var": losses.inverse_variance(v, 1e-9)}, {"rec": 1.0, "var": lam}))
    assert_close(logvar.exp(), (lam / T).sqrt(), rtol=0.01, atol=0)


def test_equilibrium_of_the_log_entropy():
    """sigma^2 = weight / T."""
    T = torch.tensor([[0.1, 0.3, 1.0, 10.0]])
    logvar = settle(lambda v: (v.exp() * T).sum() + 0.1 * losses.log_entropy(v))
    assert_close(logvar.exp(), 0.1 / T, rtol=0.01, atol=0)


def test_variance_collapses_without_a_variance_term():
    """Eq. 8 alone: the gradient on sigma is 2 sigma T > 0 at any sigma, and training shrinks it without
    end.
    """
    first, second = (settle(lambda v: v.exp().sum(), steps) for steps in (500, 1000))
    assert (first < -4).all() and (second < first - 1).all()


def linear_autoencoder(lambda2: float) -> tuple[float, float]:
    """A scalar x ~ N(0, 1), z = a x + sigma eps, x_hat = z / a (the best decoder while sigma << a), under VE.

    E (x_hat - x)^2 = sigma^2 / a^2, so scaling a up makes any sigma free.  Returns: a, sigma^2 after
    training.
    """
    log_a, logvar = torch.zeros(1, 1, requires_grad=True), torch.zeros(1, 1, requires_grad=True)
    optimizer = torch.optim.Adam([log_a, logvar], 0.05)
    noise = torch.Generator().manual_seed(0)
    for _ in range(1500):
        x, eps = torch.randn(256, 1, generator=noise), torch.randn(256, 1, generator=noise)
        z = losses.reparameterize(log_a.exp() * x, logvar.expand(256, 1), eps)
        terms = {"rec": losses.squared_error(z / log_a.exp(), x), "var": losses.inverse_variance(logvar),
                 "reg": losses.exponential_magnitude(z)}
        optimizer.zero_grad()
        losses.weighted_sum(terms, {"rec": 1.0, "var": 0.1, "reg": lambda2}).backward()
        optimizer.step()
    return log_a.exp().item(), logvar.exp().item()


def test_magnitude_penalty_prevents_the_runaway():
    """Without Eq. 10 scale and variance grow as long as one trains; with it they stop at the soft wall."""
    a, sigma2 = linear_autoencoder(lambda2=0.0)
    assert a > 100 and sigma2 > 20
    a, sigma2 = linear_autoencoder(lambda2=1e-3)
    assert 1 < a < 5 and 0.1 < sigma2 < 5


def test_weighted_sum_is_linear_and_refuses_a_term_without_a_weight():
    terms = {"rec": torch.tensor(2.0), "var": torch.tensor(3.0)}
    assert_close(losses.weighted_sum(terms, {"rec": 1.0, "var": 0.1}), torch.tensor(2.3))
    with pytest.raises(KeyError):
        losses.weighted_sum(terms, {"rec": 1.0})


# ------------------------------------------------------------------------------------------------------------
# Flow matching, Eqs. 4 and 27-31.


def test_path_runs_from_noise_to_data_with_constant_velocity():
    x, eps = randn(3, 2, 4, 4), randn(3, 2, 4, 4, seed=1)
    assert_close(losses.interpolate(x, eps, torch.zeros(3)), eps)
    assert_close(losses.interpolate(x, eps, torch.ones(3)), x)
    t = torch.tensor([0.1, 0.5, 0.9])
    moved = losses.interpolate(x, eps, t + 0.05) - losses.interpolate(x, eps, t)
    assert_close(moved, 0.05 * losses.velocity(x, eps))


def test_flow_matching_and_cosine_against_a_double_loop():
    v_hat, v = randn(2, 3, 2, 2), randn(2, 3, 2, 2, seed=1)
    square, cosine = [], []
    for b in range(2):
        square.append(sum(float((p - q) ** 2) for p, q in zip(v_hat[b].flatten(), v[b].flatten())) / 12)
        for i in range(2):
            for j in range(2):
                p, q = v_hat[b, :, i, j].double(), v[b, :, i, j].double()
                cosine.append(1 - float(p @ q) / math.sqrt(float(p @ p) * float(q @ q)))
    assert_close(losses.flow_matching_per_sample(v_hat, v), torch.tensor(square))
    assert_close(losses.flow_matching(v_hat, v), torch.tensor(sum(square) / 2))
    assert_close(losses.cosine_velocity(v_hat, v), torch.tensor(sum(cosine) / 8, dtype=torch.float32))


def test_time_shift_fixes_the_ends_inverts_and_moves_towards_noise():
    t = torch.linspace(0, 1, 11)
    shifted = losses.time_shift(t, 0.3)
    assert_close(shifted[[0, -1]], torch.tensor([0.0, 1.0]))
    assert (shifted[1:-1] < t[1:-1]).all()
    assert_close(losses.time_shift(shifted, 1 / 0.3), t)
    with pytest.raises(ValueError):
        losses.time_shift(t, 0.0)


def gaussian_velocity(mean: float, std: float):
    """The exact E[x - eps | x_t] for data N(mean, std^2): jointly Gaussian, x_t = t x + (1 - t) eps.

    Var x_t = t^2 s^2 + (1-t)^2 and Cov(x - eps, x_t) = t s^2 - (1-t), so v = mean + Cov / Var * (x_t - t
    mean).
    """
    def field(x: Tensor, t: float) -> Tensor:
        slope = (t * std**2 - (1 - t)) / (t**2 * std**2 + (1 - t)**2)
        return mean + slope * (x - t * mean)
    return field


@pytest.mark.parametrize("shift", [1.0, 0.3])
def test_euler_transports_an_analytic_gaussian_with_first_order(shift):
    """The exact flow maps eps to mean + std eps; the error must halve when the steps double."""
    eps, mean, std = randn(1000, 2).double(), 3.0, 0.5
    exact = mean + std * eps
    errors = [(losses.euler(gaussian_velocity(mean, std), eps, n, shift) - exact).abs().max().item()
              for n in (50, 100, 200)]
    assert errors[0] < 0.2
    assert 1.7 < errors[0] / errors[1] < 2.3 and 1.7 < errors[1] / errors[2] < 2.3


def test_euler_of_n_steps_is_n_evaluations_ending_before_one():
    times = []

    def field(x: Tensor, t: float) -> Tensor:
        times.append(t)
        return torch.ones_like(x)

    end = losses.euler(field, torch.zeros(1), 20)
    assert_close(end, torch.ones(1))
    assert_close(torch.tensor(times), torch.arange(20) / 20)
    with pytest.raises(ValueError):
        losses.time_grid(0)


# ------------------------------------------------------------------------------------------------------------
# The adversarial loss.


def test_hinge_losses_by_hand():
    """Discriminator: 1/2 (mean of [0, 0.5] + mean of [0, 3]) = 0.875; generator: -(-2 + 2) / 2 = 0."""
    real, fake = torch.tensor([2.0, 0.5]), torch.tensor([-2.0, 2.0])
    assert_close(losses.hinge_discriminator(real, fake), torch.tensor(0.875))
    assert_close(losses.hinge_generator(fake), torch.tensor(0.0))


def test_adaptive_weight_is_the_clamped_ratio_of_norms_without_gradient():
    a, b = torch.tensor([3.0, 4.0], requires_grad=True), torch.tensor([0.0, 2.0], requires_grad=True)
    weight = losses.adaptive_weight(a, b)
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
                distances.append(max(0.0, abs(cosine(zs[i], zs[j]) - cosine(fs[i], fs[j])) - 0.25))
    assert_close(losses.marginal_cosine(z, f, 0.5), torch.tensor(sum(cosines) / len(cosines)).float())
    expected = torch.tensor(sum(distances) / len(distances)).float()
    assert_close(losses.marginal_distance_matrix(z, f, 0.25), expected)
    assert losses.marginal_cosine(f, 2 * f, 0.0) < 1e-6 and losses.marginal_distance_matrix(f, f, 0.0) < 1e-6


# ------------------------------------------------------------------------------------------------------------
# Heun and Euler-Maruyama, on the analytic Gaussian of `gaussian_velocity`.


@pytest.mark.parametrize("shift", [1.0, 0.3])
def test_heun_transports_an_analytic_gaussian_with_second_order(shift):
    """The exact flow maps eps to mean + std eps; the error must fall fourfold when the steps double."""
    eps, mean, std = randn(1000, 2).double(), 3.0, 0.5
    exact = mean + std * eps
    errors = [(losses.heun(gaussian_velocity(mean, std), eps, n, shift) - exact).abs().max().item()
              for n in (50, 100, 200)]
    assert errors[2] < 2e-3
    assert 3.4 < errors[0] / errors[1] < 4.6 and 3.4 < errors[1] / errors[2] < 4.6


def moments_of_the_sde(steps: int, mean: float, std: float, **options) -> tuple[float, float]:
    """Exact mean and variance of what euler_maruyama makes of N(0, 1) noises, without a single draw.

    With a Gaussian's velocity the result is affine in its `steps` independent noises (the start and one for
    every step but the last).  Row 0 has none of them: the mean.  Row j has a unit in one: its weight.
    """
    units = torch.cat([torch.zeros(1, steps), torch.eye(steps)]).double()
    end = losses.euler_maruyama(gaussian_velocity(mean, std), units[:, :1], steps,
                                noise_fn=lambda k: units[:, k + 1:k + 2], **options)[:, 0]
    return end[0].item(), (end[1:] - end[0]).square().sum().item()


@pytest.mark.parametrize("shift", [1.0, 0.3])
def test_the_sde_ends_in_the_data_with_weak_order_one(shift):
    """The mean is exact (every step keeps m_t = t m); the variance's error halves when the steps double."""
    errors = []
    for n in (200, 400, 800):
        m, variance = moments_of_the_sde(n, 3.0, 0.5, shift=shift, last=1 / n)
        assert_close(m, 3.0)
        errors.append(abs(variance - 0.25))
    assert errors[2] < 1e-3
    assert 1.7 < errors[0] / errors[1] < 2.3 and 1.7 < errors[1] / errors[2] < 2.3


def test_the_other_diffusion_ends_in_the_data_too():
    """1e-4 of the mean comes from starting at t = 0.01 in N(0, 1) instead of N(0.01 m, ...)."""
    m, variance = moments_of_the_sde(800, 3.0, 0.5, diffusion="sbdm", last=1 / 800)
    assert_close(torch.tensor([m, variance]), torch.tensor([3.0, 0.25]), rtol=0, atol=2e-4)


def test_what_the_last_step_leaves_out_is_of_second_order():
    """At 3200 steps the variance lacks what a last step without noise loses: a quarter for half of it."""
    lost = [0.25 - moments_of_the_sde(3200, 3.0, 0.5, last=last)[1] for last in (0.08, 0.04)]
    assert 0.004 < lost[1] < 0.006 and 3.4 < lost[0] / lost[1] < 4.6


def test_the_sde_takes_its_last_step_from_the_last_time_of_the_grid():
    """At any shift the last time is 1 - last: GAE's code assumes it and is wrong at a shift."""
    for shift in (1.0, 0.4):
        times = losses.sde_grid(10, shift, 0.0, 0.04)
        assert len(times) == 11 and times[0] == 0 and times[-1] == 1
        assert_close(times[-2], 0.96)
        assert all(a < b for a, b in zip(times, times[1:]))
    assert_close(losses.sde_grid(5, 1.0, 0.0, 0.2), [0.0, 0.2, 0.4, 0.6, 0.8, 1.0])
    assert_close(losses.sde_grid(5, 0.3, 0.01, 0.2)[0], 0.01)


def test_the_sde_by_hand():
    """v = 1 from x = 0 on the times t_0, 0.6, 1 (last = 0.4) with noise 2.

        sigma, t_0 = 0:    w = 1 and drift v + t v - x = 1, so x = 0.6 + sqrt(2 * 1 * 0.6) * 2
        then at 0.6:       x + 0.4 * (1 + 0.6 - x)
        sbdm, t_0 = 0.01:  w = 99 and drift 1 + 99 * 0.01 / 0.99 = 2: x = 0.59 * 2 + sqrt(2 * 99 * 0.59) * 2
        then at 0.6:       x + 0.4 * (1 + (0.6 - x) / 0.6)
    """
    def sde(diffusion: str) -> Tensor:
        return losses.euler_maruyama(lambda x, t: torch.ones_like(x), torch.zeros(1), 2, last=0.4,
                                     diffusion=diffusion, noise_fn=lambda k: torch.full((1,), 2.0))

    x = 0.6 + 2 * 1.2 ** 0.5
    assert_close(sde("sigma"), torch.tensor([x + 0.4 * (1.6 - x)]))
    x = 0.59 * 2 + 2 * (2 * 99 * 0.59) ** 0.5
    assert_close(sde("sbdm"), torch.tensor([x + 0.4 * (1 + (0.6 - x) / 0.6)]))


@pytest.mark.parametrize("integrator, evaluations", [(losses.euler, 20), (losses.heun, 39),
                                                     (losses.euler_maruyama, 20)])
def test_evaluations_and_record_of_every_integrator(integrator, evaluations):
    """`record` sees every time of the grid with the state there and the prediction x + (1 - t) v."""
    calls, seen = [], []

    def field(x: Tensor, t: float) -> Tensor:
        calls.append(t)
        return torch.full_like(x, 2.0)

    options = {"noise_fn": lambda k: torch.ones(3)} if integrator is losses.euler_maruyama else {}
    end = integrator(field, torch.zeros(3), 20, 0.5, lambda *a: seen.append(a), **options)
    assert len(calls) == evaluations and max(calls) < 1
    times = [t for t, _, _ in seen]
    assert len(times) == 21 and times == sorted(times) and times[-1] == 1
    assert torch.equal(seen[0][1], torch.zeros(3)) and torch.equal(seen[-1][1], end)
    for t, x, predicted in seen:
        assert_close(predicted, x + (1 - t) * 2)
    without = integrator(field, torch.zeros(3), 20, 0.5, **options)
    assert torch.equal(without, end)


def test_integrators_keep_the_precision_of_the_state():
    def field(x: Tensor, t: float) -> Tensor:
        assert x.dtype == torch.float32
        return x.bfloat16()

    for end in (losses.euler(field, torch.ones(2), 4), losses.heun(field, torch.ones(2), 4),
                losses.euler_maruyama(field, torch.ones(2), 4, noise_fn=lambda k: torch.ones(2).double())):
        assert end.dtype == torch.float32


def test_integrators_refuse_what_they_cannot_integrate():
    def sde(**options):
        return losses.euler_maruyama(lambda x, t: x, torch.ones(1), options.pop("steps", 4),
                                     noise_fn=lambda k: torch.zeros(1), **options)

    for options in (dict(steps=0), dict(last=0.0), dict(last=1.0), dict(diffusion="none"), dict(shift=0.0)):
        with pytest.raises(ValueError):
            sde(**options)
    with pytest.raises(ValueError):
        losses.heun(lambda x, t: x, torch.ones(1), 0)
