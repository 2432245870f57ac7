"""Metrics against closed forms, loops, and the libraries they must agree with."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close

import metrics
from runtime import generator


def pictures(n, size):
    draw = generator(0, "pictures")
    return torch.randint(0, 256, (n, 3, size, size), generator=draw, dtype=torch.uint8)


def rows(n, d, seed=0, shift=0.0):
    draw = generator(seed, "rows")
    mixed = torch.randn(n, d, generator=draw) @ torch.randn(d, d, generator=draw)
    return mixed / d**0.5 + shift


def gaussian(a, *parts):
    moments = metrics.Moments()
    for part in a.split(parts or len(a)):
        moments.add(part)
    return moments.fit()


# ------------------------------------------------------------------------------
# Pairs of images.


def test_psnr_closed_form():
    x = pictures(3, 16) // 2
    x_hat = x.clone()
    x_hat[0] += 1              # MSE 1 / 255^2: 20 log10(255) dB
    x_hat[1, :, :, :8] += 2    # half of the pixels off by 2: MSE 2 / 255^2
    one = 20 * math.log10(255)
    expected = torch.tensor([one, one - 10 * math.log10(2), 100.0])
    assert_close(metrics.psnr(x_hat, x).float(), expected)


@pytest.mark.parametrize("low", [0, -1])
def test_ssim_is_that_of_torchmetrics(low):
    package = pytest.importorskip("torchmetrics.functional.image")
    x = F.avg_pool2d(pictures(5, 66).float(), 3, 1).to(torch.uint8)
    noise = 20 * torch.randn(x.shape, generator=generator(0, "noise"))
    x_hat = (x + noise).round().clamp(0, 255).to(torch.uint8)
    pair = (a.double() / 255 * (1 - low) + low for a in (x_hat, x))
    expected = package.structural_similarity_index_measure(
        *pair, data_range=(float(low), 1.0) if low else 1.0, reduction="none")
    assert_close(metrics.ssim(x_hat, x, low), expected, rtol=1e-6, atol=1e-9)
    assert_close(metrics.ssim(x, x, low).float(), torch.ones(5))


# ------------------------------------------------------------------------------
# The Frechet distance.


def test_moments_are_those_of_all_parts():
    a = rows(500, 20, shift=100.0)
    found = gaussian(a, 1, 199, 300)
    np.testing.assert_allclose(found.mean, a.double().mean(0), rtol=1e-12)
    np.testing.assert_allclose(found.cov, np.cov(a.double().T), rtol=0, atol=1e-10)
    assert found.n == 500


def test_moments_in_several_blocks():
    """More features than the 256 that are multiplied at a time, and a sum that goes on."""
    a, moments = rows(700, 600, shift=3.0), metrics.Moments()
    for n, part in enumerate(a.split(350), 1):
        moments.add(part)
        found, expected = moments.fit(), np.cov(a[:350 * n].double().T)
        np.testing.assert_allclose(found.cov, expected, rtol=0, atol=1e-11)
        assert_close(found.cov, found.cov.T, rtol=0, atol=0)


def test_frechet_of_diagonal_gaussians():
    """Covariances that commute: sum (m - n)^2 + sum (s - t)^2, s and t deviations."""
    m, n, s, t = torch.rand(4, 10, generator=generator(0), dtype=torch.float64)
    a = metrics.Gaussian(99, m, s.square().diag())
    b = metrics.Gaussian(99, n, t.square().diag())
    expected = ((m - n).square() + (s - t).square()).sum().item()
    assert metrics.frechet_distance(a, b) == pytest.approx(expected, rel=1e-10)
    assert metrics.frechet_distance(b, a) == pytest.approx(expected, rel=1e-10)
    assert metrics.frechet_distance(a, a) == pytest.approx(0, abs=1e-8)


def test_frechet_is_that_of_scipy():
    linalg = pytest.importorskip("scipy.linalg")
    a, b = gaussian(rows(400, 50)), gaussian(rows(300, 50, 1, 0.2))
    root = linalg.sqrtm(a.cov.numpy() @ b.cov.numpy()).real
    expected = (a.mean - b.mean).square().sum() + (a.cov + b.cov).trace()
    expected -= 2 * root.trace()
    assert metrics.frechet_distance(a, b) == pytest.approx(expected.item(), rel=1e-6)


def test_frechet_with_fewer_rows_than_features():
    """The overlap is the nuclear norm of U V^T, U and V the centred rows."""
    low, high, other = rows(20, 60), rows(200, 60, 1), rows(30, 60, 2)
    for a, b in ((low, high), (high, low), (low, other)):
        u, v = ((x.double() - x.double().mean(0)).numpy() / (len(x) - 1) ** 0.5
                for x in (a, b))
        overlap = np.linalg.svd(u @ v.T, compute_uv=False).sum()
        shift = (a.double().mean(0) - b.double().mean(0)).square().sum().item()
        expected = shift + (u**2).sum() + (v**2).sum() - 2 * overlap
        found = metrics.frechet_distance(gaussian(a), gaussian(b))
        assert found == pytest.approx(expected, rel=1e-5)


# ------------------------------------------------------------------------------
# Metrics that see images one by one.


def test_recognised_closed_form():
    """Of four images the first and the last show their class; 0.89 is too little."""
    probabilities = torch.tensor([[0.95, 0.05], [0.95, 0.05], [0.11, 0.89], [0.1, 0.9]])
    labels = torch.tensor([0, 1, 1, 1])
    assert metrics.recognised(probabilities, labels) == 0.5
    assert metrics.recognised(probabilities, labels, confidence=0.8) == 0.75


def test_inception_score_extremes():
    assert metrics.inception_score(torch.zeros(50, 7)) == pytest.approx(1)
    sure = 1e3 * torch.eye(10).repeat(5, 1)   # probabilities underflow
    assert metrics.inception_score(sure) == pytest.approx(10)


def test_inception_score_of_a_file_sorted_by_class():
    """Chunks in file order would hold two of the twenty classes: a score of 2."""
    classes = torch.arange(20).repeat_interleave(100)
    noise = torch.randn(2000, 20, generator=generator(0, "logits"))
    logits = 4 * torch.eye(20)[classes] + noise
    mixed = logits[torch.randperm(2000, generator=generator(0, "mixed"))]
    by_chunk, whole = (metrics.inception_score(logits, n) for n in (200, 2000))
    assert by_chunk == pytest.approx(metrics.inception_score(mixed, 200), rel=0.03)
    p = logits.double().softmax(1)
    expected = (p * (p / p.mean(0)).log()).sum(1).mean().exp().item()
    assert whole == pytest.approx(expected, rel=1e-10) and by_chunk > 0.8 * whole


def test_kernel_distance_is_the_unbiased_mmd():
    """With as many rows as a subset has, it is a mean over pairs, none with itself."""
    u, v = rows(12, 6).double(), rows(12, 6, 1, 0.3).double()

    def kernel(x, y):
        return (x @ y / 6 + 1).item() ** 3

    pairs = [(i, j) for i in range(12) for j in range(12) if i != j]
    within = sum(kernel(a[i], a[j]) for a in (u, v) for i, j in pairs) / len(pairs)
    between = sum(kernel(x, y) for x in u for y in v) / 144
    expected = within - 2 * between
    assert metrics.kernel_distance(u, v) == pytest.approx(expected, rel=1e-10)
    few, many = (metrics.kernel_distance(u, v, subsets=n, size=5) for n in (1, 1000))
    assert few != pytest.approx(expected, rel=0.2) and many == pytest.approx(expected, rel=0.2)


@pytest.mark.parametrize("n, m, size", [(40, 15, 1000), (15, 40, 1000), (40, 15, 7)])
def test_kernel_distance_of_sets_of_other_sizes(n, m, size):
    """Rows u and v: k(u, u) + k(v, v) - 2 k(u, v) in any subset that is no larger than a set.

    With d = 2, u.u = 2, v.v = 8 and u.v = 0 it is 2^3 + 5^3 - 2 * 1^3 = 131.
    """
    real, fake = torch.tensor([[1.0, 1.0]]), torch.tensor([[2.0, -2.0]])
    found = metrics.kernel_distance(real.repeat(n, 1), fake.repeat(m, 1), size=size)
    assert found == pytest.approx(131)


def test_kernel_distance_is_that_of_torch_fidelity():
    fidelity = pytest.importorskip("torch_fidelity.metric_kid")
    u, v = rows(60, 16).abs(), rows(60, 16, 1, 0.3).abs()
    theirs = fidelity.kid_features_to_metric(
        u, v, kid_subsets=2, kid_subset_size=60, verbose=False)
    expected = theirs["kernel_inception_distance_mean"]
    assert metrics.kernel_distance(u, v) == pytest.approx(expected, rel=1e-4)
    found = metrics.kernel_distance(u, v, subsets=200, size=30)
    assert found != expected and found == pytest.approx(expected, rel=0.2)


def loops(real, fake):
    def radius(a, i, k):
        return sorted((a[i] - a[j]).norm() for j in range(len(a)) if j != i)[k - 1]

    N, M = range(len(real)), range(len(fake))
    real3, real5 = ([radius(real, i, k) for i in N] for k in (3, 5))
    fake3 = [radius(fake, i, 3) for i in M]
    between = [[(f - r).norm() for r in real] for f in fake]
    inside = [[between[i][j] < real5[j] for j in N] for i in M]
    return {
        "precision": np.mean([any(between[i][j] <= real3[j] for j in N) for i in M]),
        "recall": np.mean([any(between[i][j] <= fake3[i] for i in M) for j in N]),
        "density": np.sum(inside) / (5 * len(fake)),
        "coverage": np.mean([any(inside[i][j] for i in M) for j in N])}


def test_manifold_metrics_are_loops():
    real, fake = rows(23, 4), rows(30, 4, 1, 0.8)
    expected = loops(real.double(), fake.double())
    assert all(0 < value < 1 for value in expected.values())
    assert metrics.manifold_metrics(real, fake) == pytest.approx(expected)


def test_precision_and_recall_are_those_of_torch_fidelity():
    """With more rows than the 1024 that are compared at a time."""
    fidelity = pytest.importorskip("torch_fidelity.metric_prc")
    real, fake = rows(1100, 5), rows(1200, 5, 1, 0.8)
    theirs = fidelity.prc_features_to_metric(
        fake, real, prc_neighborhood=3, prc_batch_size=500, save_cpu_ram=False,
        verbose=False)
    found = metrics.manifold_metrics(real, fake)
    for name in ("precision", "recall"):
        assert 0 < theirs[name] < 1
        assert found[name] == pytest.approx(theirs[name], abs=2e-3)


# ------------------------------------------------------------------------------
# Latents.


def test_latent_summary_by_hand():
    """Means -1, 1, -1, 1 deviate by sqrt(4/3) in channel 0, and by twice that in 1.

    sigma^2 is 0.5 or 1.5 in channel 0, and 16 in channel 1.  Over the spread^2 that is
    1 / (4/3) = 0.75 and 16 / (16/3) = 3 on average: the root of their mean is 1.875^0.5.
    """
    mean = torch.tensor([[-1.0, 1.0], [-2.0, 2.0]]).expand(2, 2, 2)
    logvar = torch.tensor([[0.5, 1.5], [16.0, 16.0]]).log().expand(2, 2, 2).clone()
    found = metrics.latent_summary(mean, logvar, torch.full_like(mean, -7.0), True)
    expected = {"spread": 1.5 * (4 / 3) ** 0.5, "max_z": 7.0, "sigma2": 8.5,
                "sigma2_p50": 1.5, "at_clamp": 0.0, "relative_noise": 1.875**0.5}
    assert found == pytest.approx(expected, rel=1e-5)
    logvar[0, 0], logvar[1, 0, 0] = 20.0, -30.0
    assert metrics.latent_summary(mean, logvar, mean, True)["at_clamp"] == 3 / 8
    assert {*metrics.latent_summary(mean, logvar, mean, False)} == {"spread", "max_z"}


def test_principal_colours_are_the_largest_components():
    """A latent whose third channel varies most, then the first, then the fifth."""
    z = torch.randn(4, 3, 3, 6, generator=generator(0, "latent"))
    z = z * torch.tensor([3.0, 0.1, 9.0, 0.1, 1.0, 0.1])
    z = z.movedim(-1, 1)
    found = metrics.principal_colours(z)
    assert found.shape == (4, 3, 3, 3) and found.abs().max() <= 1
    for colour, channel in enumerate((2, 0, 4)):
        pair = torch.stack([found[:, colour].flatten(), z[:, channel].flatten()]).double()
        assert torch.corrcoef(pair)[0, 1].abs() > 0.9
    assert metrics.principal_colours(z[:, :2]).shape == (4, 3, 3, 3)


def test_a_probe_and_neighbours_find_classes_that_are_apart():
    """Two Gaussians at distance 2 a: the best classifier is right Phi(a) of the time,
    which is 0.841 at a = 1.  Without a distance it guesses."""
    for apart, share in ((1.0, 0.841), (0.0, 0.5)):
        y = torch.arange(4000) % 2
        x = torch.randn(4000, 8, generator=generator(0, "classes"))
        x[:, 0] += apart * (2 * y - 1)
        args = x[:2000], y[:2000], x[2000:], y[2000:]
        assert metrics.linear_probe(*args, batch=50) == pytest.approx(share, abs=0.04)
        assert metrics.nearest_neighbours(*args) == pytest.approx(share, abs=0.08)


def test_neighbours_vote_by_their_cosine():
    """Of the two nearest, one is at cosine 0.99 and one at 0.5; the mean is 0."""
    angle = torch.tensor([0.1, 1.0, 0.1 + math.pi, 1.0 + math.pi])
    x, y = torch.stack([angle.cos(), angle.sin()], 1), torch.tensor([1, 0, 1, 0])
    test = torch.tensor([[1.0, 0.0], [math.cos(0.8), math.sin(0.8)]])
    assert metrics.nearest_neighbours(x, y, test, torch.tensor([1, 0]), k=2) == 1
    assert metrics.nearest_neighbours(x, y, test, torch.tensor([0, 1]), k=2) == 0
