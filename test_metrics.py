"""metrics.py against closed forms, loops, and the libraries it must agree with (test-only: scipy,
torchmetrics, torch-fidelity).
"""

import math

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

import metrics
from runtime import Runtime, generator

ALONE = Runtime(torch.device("cpu"))


def pictures(n: int, size: int, seed: int = 0) -> Tensor:
    return torch.randint(0, 256, (n, 3, size, size), generator=generator(seed, "pictures"), dtype=torch.uint8)


def rows(n: int, d: int, seed: int = 0, shift: float = 0.0) -> Tensor:
    draw = generator(seed, "rows")
    return torch.randn(n, d, generator=draw) @ torch.randn(d, d, generator=draw) / d**0.5 + shift


def gaussian(a: Tensor, parts: tuple[int, ...] = ()) -> metrics.Gaussian:
    moments = metrics.Moments(a.shape[1], ALONE.device)
    for part in a.split(parts or len(a)):
        moments.add(part)
    return moments.fit(ALONE)


# ------------------------------------------------------------------------------------------------------------
# PSNR and SSIM.


def test_psnr_closed_form():
    x = pictures(3, 16) // 2
    x_hat = x.clone()
    x_hat[0] += 1                    # MSE 1 / 255^2
    x_hat[1, :, :, :8] += 2          # half of the pixels off by 2: MSE 2 / 255^2
    expected = torch.tensor([20 * math.log10(255), 20 * math.log10(255) - 10 * math.log10(2), 100.0])
    torch.testing.assert_close(metrics.psnr(x_hat, x).float(), expected)


def noisy(x: Tensor) -> Tensor:
    noise = 20 * torch.randn(x.shape, generator=generator(0, "noise"))
    return (x + noise).round().clamp(0, 255).to(torch.uint8)


@pytest.mark.parametrize("convention", ["reflect", "vavae"])
def test_ssim_agrees_with_torchmetrics(convention):
    oracle = pytest.importorskip("torchmetrics.functional.image").structural_similarity_index_measure
    x = torch.nn.functional.avg_pool2d(pictures(3, 66).float(), 3, 1).to(torch.uint8)
    x_hat = noisy(x)
    low, scale, span = (-1, 127.5, (-1.0, 1.0)) if convention == "vavae" else (0, 255, 1.0)
    pair = (image.double() / scale + low for image in (x_hat, x))
    expected = oracle(*pair, data_range=span, reduction="none")
    torch.testing.assert_close(metrics.ssim(x_hat, x, convention), expected, rtol=1e-6, atol=1e-9)


def test_ssim_valid_is_a_loop_over_windows():
    x = pictures(1, 12)
    x_hat = noisy(x)
    weight = np.exp(-np.arange(-5, 6) ** 2 / 4.5)
    weight = np.outer(weight, weight) / weight.sum() ** 2
    values = []
    for c in range(3):
        for i in range(2):
            for j in range(2):
                a, b = (image[0, c, i:i + 11, j:j + 11].double().numpy() / 255 for image in (x_hat, x))
                mean_a, mean_b = (weight * a).sum(), (weight * b).sum()
                variance_a = (weight * (a - mean_a) ** 2).sum()
                variance_b = (weight * (b - mean_b) ** 2).sum()
                covariance = (weight * (a - mean_a) * (b - mean_b)).sum()
                values.append((2 * mean_a * mean_b + 1e-4) * (2 * covariance + 9e-4)
                              / (mean_a**2 + mean_b**2 + 1e-4) / (variance_a + variance_b + 9e-4))
    assert metrics.ssim(x_hat, x, "valid").item() == pytest.approx(np.mean(values), rel=1e-9)
    assert metrics.ssim(x, x, "valid").item() == pytest.approx(1)


# ------------------------------------------------------------------------------------------------------------
# Moments and the Frechet distance.


def test_moments_stream():
    a = rows(500, 20, shift=100.0)
    found = gaussian(a, (1, 199, 300))
    np.testing.assert_allclose(found.mean, a.double().mean(0), rtol=1e-12)
    np.testing.assert_allclose(found.cov, np.cov(a.double().numpy(), rowvar=False), rtol=0, atol=1e-10)
    assert found.n == 500


def test_frechet_of_diagonal_gaussians():
    """Commuting covariances: sum (m - n)^2 + sum (s - t)^2 of the standard deviations."""
    m, n, s, t = torch.rand(4, 10, generator=generator(0, "diagonal"), dtype=torch.float64)
    a, b = metrics.Gaussian(99, m, s.square().diag()), metrics.Gaussian(99, n, t.square().diag())
    expected = ((m - n).square() + (s - t).square()).sum().item()
    assert metrics.frechet_distance(a, b) == pytest.approx(expected, rel=1e-10)
    assert metrics.frechet_distance(b, a) == pytest.approx(expected, rel=1e-10)
    assert metrics.frechet_distance(a, a) == pytest.approx(0, abs=1e-8)


def test_frechet_agrees_with_sqrtm():
    linalg = pytest.importorskip("scipy.linalg")
    a, b = gaussian(rows(400, 50)), gaussian(rows(300, 50, 1, 0.2))
    root = linalg.sqrtm(a.cov.numpy() @ b.cov.numpy()).real
    traces = (a.cov + b.cov).trace() - 2 * root.trace()
    expected = (a.mean - b.mean).square().sum() + traces
    assert metrics.frechet_distance(a, b) == pytest.approx(expected.item(), rel=1e-6)


def test_frechet_with_fewer_rows_than_dimensions():
    """n < d on one side and on both, against the nuclear norm of A B^T of the centred rows, by SVD."""
    low, high, other = rows(20, 60), rows(200, 60, 1), rows(30, 60, 2)
    for a, b in ((low, high), (high, low), (low, other)):
        first, second = gaussian(a), gaussian(b)
        u, v = ((x.double() - x.double().mean(0)).numpy() / (len(x) - 1) ** 0.5 for x in (a, b))
        overlap = np.linalg.svd(u @ v.T, compute_uv=False).sum()
        expected = (first.mean - second.mean).square().sum() + (u**2).sum() + (v**2).sum() - 2 * overlap
        assert metrics.frechet_distance(first, second) == pytest.approx(expected.item(), rel=1e-5)
        assert (first.factor is None) == (len(a) > 60)   # the n x n form is what was used
    assert metrics.frechet_distance(first, gaussian(low)) == pytest.approx(0, abs=1e-5)


def test_frechet_with_a_dead_feature():
    a, b = rows(200, 8), rows(300, 8, 1)
    a[:, 3] = b[:, 3] = 1.5
    rest = [i for i in range(8) if i != 3]
    expected = metrics.frechet_distance(gaussian(a[:, rest]), gaussian(b[:, rest]))
    assert metrics.frechet_distance(gaussian(a), gaussian(b)) == pytest.approx(expected, rel=1e-6)


# ------------------------------------------------------------------------------------------------------------
# Inception Score and KID.


def test_inception_score_extremes():
    assert metrics.inception_score(torch.zeros(50, 7)) == pytest.approx(1)
    assert metrics.inception_score(1e3 * torch.eye(10).repeat(5, 1)) == pytest.approx(10)   # p underflows


def test_inception_score_and_file_order():
    """Sorted by class, each of ADM's chunks holds few classes; ours depend on the order by chance only."""
    classes = torch.arange(20).repeat_interleave(100)
    logits = 4 * torch.eye(20)[classes] + torch.randn(2000, 20, generator=generator(0, "logits"))
    mixed = logits[torch.randperm(2000, generator=generator(0, "mixed"))]
    adm, adm_mixed = (metrics.inception_score(a, 200, shuffle=False) for a in (logits, mixed))
    ours, ours_mixed = (metrics.inception_score(a, 200) for a in (logits, mixed))
    whole, whole_mixed = (metrics.inception_score(a, 2000) for a in (logits, mixed))
    assert adm < 0.5 * adm_mixed
    assert ours == pytest.approx(ours_mixed, rel=0.03)
    assert whole == pytest.approx(whole_mixed, rel=1e-12)


def test_inception_score_chunks():
    """ADM's rule: chunks in file order, a smaller last one counts as much as the others."""
    logits = torch.randn(25, 5, generator=generator(0, "chunks"), dtype=torch.float64)
    scores = []
    for part in (logits[:10], logits[10:20], logits[20:]):
        p = part.softmax(1)
        scores.append((p * (p / p.mean(0)).log()).sum(1).mean().exp().item())
    assert metrics.inception_score(logits, 10, shuffle=False) == pytest.approx(sum(scores) / 3, rel=1e-10)


def test_kernel_distance_is_unbiased_mmd():
    """Loops over pairs of different rows; with all rows in it there is but one subset."""
    u, v = rows(12, 6).double(), rows(12, 6, 1, 0.3).double()

    def kernel(x: Tensor, y: Tensor) -> float:
        return (x @ y / 6 + 1).item() ** 3

    pairs = [(i, j) for i in range(12) for j in range(12) if i != j]
    within = sum(kernel(a[i], a[j]) for a in (u, v) for i, j in pairs) / len(pairs)
    between = sum(kernel(x, y) for x in u for y in v) / 144
    mean, std = metrics.kernel_distance(u, v)
    assert (mean, std) == (pytest.approx(within - 2 * between, rel=1e-10), 0)


def test_kernel_distance_agrees_with_torch_fidelity():
    fidelity = pytest.importorskip("torch_fidelity.metric_kid")
    u, v = rows(60, 16).abs(), rows(60, 16, 1, 0.3).abs()
    theirs = fidelity.kid_features_to_metric(u, v, kid_subsets=2, kid_subset_size=60, verbose=False)
    expected = theirs["kernel_inception_distance_mean"]
    assert metrics.kernel_distance(u, v)[0] == pytest.approx(expected, rel=1e-4)
    mean, std = metrics.kernel_distance(u, v, subsets=50, size=30)
    assert 0 < abs(mean - expected) < std


# ------------------------------------------------------------------------------------------------------------
# Precision, recall, density, coverage.


def loops(real: Tensor, fake: Tensor) -> dict[str, float]:
    def distance(x: Tensor, y: Tensor) -> float:
        return (x.double() - y.double()).square().sum().sqrt().item()

    def radius(a: Tensor, i: int, k: int) -> float:
        return sorted(distance(a[i], a[j]) for j in range(len(a)) if j != i)[k - 1]

    real3, real5 = ([radius(real, i, k) for i in range(len(real))] for k in (3, 5))
    fake3 = [radius(fake, i, 3) for i in range(len(fake))]
    between = [[distance(f, r) for r in real] for f in fake]
    N, M = range(len(real)), range(len(fake))
    return {"precision": np.mean([any(between[i][j] <= real3[j] for j in N) for i in M]),
            "recall": np.mean([any(between[i][j] <= fake3[i] for i in M) for j in N]),
            "density": sum(between[i][j] < real5[j] for i in M for j in N) / (5 * len(fake)),
            "coverage": np.mean([any(between[i][j] < real5[j] for i in M) for j in N])}


@pytest.mark.parametrize("block", [7, 4096])
def test_manifold_metrics_are_loops(block):
    real, fake = rows(23, 4), rows(30, 4, 1, 0.8)
    expected = loops(real, fake)
    assert all(0 < value < 1 for value in expected.values())
    assert metrics.manifold_metrics(real, fake, block) == pytest.approx(expected)


def test_manifold_metrics_agree_with_torch_fidelity():
    fidelity = pytest.importorskip("torch_fidelity.metric_prc")
    real, fake = rows(90, 5), rows(110, 5, 1, 0.8)
    options = dict(prc_neighborhood=3, prc_batch_size=50, save_cpu_ram=False, verbose=False)
    theirs = fidelity.prc_features_to_metric(fake, real, **options)
    ours = metrics.manifold_metrics(real, fake)
    assert 0 < theirs["precision"] < 1 and 0 < theirs["recall"] < 1
    for name in ("precision", "recall"):
        assert ours[name] == pytest.approx(theirs[name])


def test_manifold_metrics_extremes():
    a = rows(20, 4)
    same, far = metrics.manifold_metrics(a, a), metrics.manifold_metrics(a, a + 1000)
    assert (same["precision"], same["recall"], same["coverage"]) == (1, 1, 1)
    assert set(far.values()) == {0}


def test_latent_summary_by_hand():
    """Channel 0: means -1, 1, -1, 1 (deviation sqrt 4/3), sigma^2 1; channel 1 twice and four times that."""
    mean = torch.tensor([[[-1.0, 1.0], [-2.0, 2.0]], [[-1.0, 1.0], [-2.0, 2.0]]])               # [2, 2, 2]
    logvar = torch.tensor([1.0, 4.0]).log()[None, :, None].expand_as(mean).clone()
    z = torch.full_like(mean, -7.0)
    found = metrics.latent_summary(mean, logvar, z, learned=True)
    spread = (4 / 3) ** 0.5
    assert found["spread_by_channel"] == [round(spread, 4), round(2 * spread, 4)]
    assert found["max_z"] == 7 and found["at_clamp"] == 0
    expected = {"spread": 1.5 * spread, "sigma2": 2.5, "sigma2_geometric": 2.0, "sigma2_p01": 1.0,
                "sigma2_p99": 4.0, "relative_noise": 0.75 ** 0.5}
    for key, value in expected.items():
        assert_close(found[key], value, rtol=1e-5, atol=0)
    logvar[0, 0] = 20.0
    assert metrics.latent_summary(mean, logvar, z, learned=True)["at_clamp"] == 0.25
    assert "sigma2" not in metrics.latent_summary(mean, logvar, z, learned=False)
