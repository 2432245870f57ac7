"""Properties of latents against closed forms, loops, simulations and other libraries."""

import math

import pytest
import scipy.fft
import scipy.integrate
import scipy.stats
import torch
import torch.nn.functional as F
from torch.testing import assert_close

import flow
import latents
from latents import ClassGaussian, Standardised
from runtime import InputError, generator


def randn(*shape, seed=0, **kind):
    return torch.randn(*shape, generator=generator(seed, "latents"), **kind)


def draw(*names):
    return generator(0, *names)


def rotation(n, seed=0):
    return torch.linalg.qr(randn(n, n, seed=seed, dtype=torch.float64))[0]


def gaussian(variances, mean=None, seed=0):
    """A class with these variances [C, S] in random directions."""
    C, S = variances.shape
    mean = torch.zeros(C, S, dtype=torch.float64) if mean is None else mean
    return ClassGaussian(100, mean, rotation(C, seed), rotation(S, seed + 1), variances.double())


def sample(one, n, seed=0):
    xi = randn(n, *one.mean.shape, seed=seed, dtype=torch.float64)
    return one.mean + latents.turn_back(one, one.variances.sqrt() * xi)


# ------------------------------------------------------------------------------
# Standardising.


def test_statistics_are_those_of_all_images_and_positions():
    raw = 3 * randn(700, 5, 4, 3) + 100
    z = Standardised(raw)
    std, mean = torch.std_mean(raw.double(), (0, 2, 3))
    assert_close(z.mean, mean.float())
    assert_close(z.std, std.float())
    rows = (raw[[3, 1]] - z.mean[:, None, None]) / z.std[:, None, None]
    assert_close(z[torch.tensor([3, 1])], rows)
    assert z.shape == raw.shape and len(z) == 700
    raw[:, 2] = 7.0
    assert Standardised(raw)[:10][:, 2].abs().max() == 0   # it never changes
    raw[5, 1, 2, 2] = math.nan
    with pytest.raises(InputError, match="NaN or infinite"):
        Standardised(raw)


# ------------------------------------------------------------------------------
# VIV in closed form: the reference's unit values 1, 2 and 6.


@pytest.mark.parametrize("value", [1e-4, 0.05, 0.5, 1.0, 3.0])
def test_the_integral_of_z4_is_z5(value):
    """int lambda / ((1 - t)^2 + t^2 lambda) dt = (pi / 2) sqrt(lambda)."""
    variances = torch.tensor([[value]], dtype=torch.float64)

    def at(t):
        return latents.viv_at(variances, torch.tensor([t], dtype=torch.float64)).item()

    found, _ = scipy.integrate.quad(at, 0, 1, epsabs=1e-12, limit=500)
    assert found == pytest.approx(math.pi / 2 * math.sqrt(value), abs=1e-10)
    assert latents.viv(variances).item() == pytest.approx(found, abs=1e-10)


def test_equal_variances():
    one = torch.ones(3, 5, dtype=torch.float64)
    t = torch.tensor([0.0, 0.25, 0.5, 1.0], dtype=torch.float64)
    assert_close(latents.viv_at(one, t), 1 / ((1 - t) ** 2 + t**2))
    assert latents.viv(one).item() == pytest.approx(math.pi / 2)
    assert latents.viv(0.49 * one).item() == pytest.approx(math.pi / 2 * 0.7)


def test_z6_and_the_decomposition():
    """The sum is (pi / 2) sqrt(d (tau - d A)) with tau = sum lambda, A = Var s."""
    s = torch.rand(4, 6, generator=draw("s"), dtype=torch.float64)
    d, tau, spread = 24, s.square().sum(), s.var(correction=0)
    value = latents.viv(s.square())
    assert_close(d * value, math.pi / 2 * (d * (tau - d * spread)).sqrt())
    parts = latents.compactness(s.square()).sqrt() * latents.isotropy(s.square())
    assert_close(value, math.pi / 2 * parts)
    one = torch.zeros(4, 6, dtype=torch.float64)
    one[2, 3] = 5.0   # a single direction: (pi / 2) sqrt(tau) / d
    assert latents.viv(one).item() == pytest.approx(math.pi / 2 * math.sqrt(5) / d)
    assert latents.isotropy(one).item() == pytest.approx(1 / math.sqrt(d))


def test_logit_normal_times():
    """E f(sigmoid(N(0, 1))) by another quadrature; f = t has the mean 1/2."""
    t, weights = latents.logit_normal()
    assert weights.sum().item() == pytest.approx(1)
    assert (weights * t).sum().item() == pytest.approx(0.5)
    variances = torch.tensor([[0.04, 0.9]], dtype=torch.float64)

    def weighted(x):
        at = torch.tensor([1 / (1 + math.exp(-x))], dtype=torch.float64)
        return latents.viv_at(variances, at).item() * scipy.stats.norm.pdf(x)

    expected, _ = scipy.integrate.quad(weighted, -9, 9)
    assert latents.viv_logit_normal(variances).item() == pytest.approx(expected, rel=1e-6)


def test_viv_is_what_regression_leaves_of_a_gaussians_velocity():
    """The residual of v after the best linear function of x_t, at three times."""
    one = gaussian(torch.tensor([[0.1, 1.0, 0.4]]), torch.tensor([[1.0, -2.0, 0.5]]).double())
    n = 200_000
    x1, x0 = sample(one, n)[:, 0], randn(n, 3, seed=1, dtype=torch.float64)
    for t in (0.2, 0.5, 0.9):
        x_t = torch.cat([flow.interpolate(x1, x0, torch.full((n,), t).double()),
                         torch.ones(n, 1).double()], 1)
        v = flow.velocity(x1, x0)
        left = v - x_t @ torch.linalg.lstsq(x_t, v).solution
        expected = latents.viv_at(one.variances, torch.tensor([t])).item()
        assert left.square().mean().item() == pytest.approx(expected, rel=0.01)


# ------------------------------------------------------------------------------
# The fit of a class: unit values 3 to 5, and the bias with few images.


@pytest.mark.parametrize("n, expected", [(16, 1.414), (50, 1.523), (200, 1.558)])
def test_white_latents_and_the_small_sample_bias(n, expected):
    z = randn(n, 32, 16, 16)
    biased = latents.viv(latents.fit_class(z, unbiased=False).variances).item()
    assert biased == pytest.approx(expected, abs=0.015 if n == 16 else 0.003)
    found = latents.viv(latents.fit_class(z).variances).item()
    assert found == pytest.approx(biased * math.sqrt(n / (n - 1)), rel=1e-6)
    predicted = math.pi / 2 * latents.flip_flop_bias(n, 32, 256)
    assert found == pytest.approx(predicted, rel=0.02 if n == 16 else 0.003)


@pytest.mark.parametrize("n, expected", [(50, 1.076), (200, 1.097)])
def test_a_known_kronecker_product(n, expected):
    """Positions 0.6^distance, channels 1 / c: exactly VIV is 1.1071."""
    space = 0.6 ** latents.steps_apart(16, 16).double()
    channels = 1 / torch.arange(1, 33).double()
    channels *= 32 / channels.sum()
    exact = torch.outer(channels, torch.linalg.eigvalsh(space))
    assert latents.viv(exact).item() == pytest.approx(1.1071, abs=5e-5)
    z = channels.sqrt()[:, None] * randn(n, 32, 256, dtype=torch.float64)
    z = (z @ torch.linalg.cholesky(space).T).unflatten(2, (16, 16))
    found = latents.fit_class(z, unbiased=False)
    assert latents.viv(found.variances).item() == pytest.approx(expected, abs=0.003)
    assert_close(found.variances.sum(), (z - z.mean(0)).square().sum() / n)


def test_the_stationary_fit_needs_few_images():
    """Fields that are diagonal in the cosine transform: no bias with four images."""
    order = torch.arange(8)[:, None] + torch.arange(8)
    root = (1 + order.double()).rsqrt()
    down = latents.dct_matrix(8)
    channels = torch.arange(1, 17).double().rsqrt()
    exact = math.pi / 2 * channels.mean() * root.mean()
    values = []
    for seed in range(40):
        z = randn(4, 16, 8, 8, seed=seed, dtype=torch.float64)
        z = channels[:, None, None] * root * z
        fit = latents.fit_class(down.T @ z @ down, stationary=True)
        values.append(latents.viv(fit.variances).item())
    assert sum(values) / len(values) == pytest.approx(exact.item(), rel=0.02)


def test_what_does_not_change_viv():
    z = randn(40, 6, 4, 4) * torch.linspace(0.5, 2, 16).view(4, 4)
    value = latents.viv(latents.fit_class(z).variances)
    mixed = torch.einsum("dc,nchw->ndhw", rotation(6).float(), z)
    order = torch.randperm(16, generator=draw("order"))
    moved = z.flatten(2)[:, :, order].unflatten(2, (4, 4))
    for other, factor in ((mixed, 1), (moved, 1), (z + randn(6, 4, 4, seed=1), 1), (3 * z, 3)):
        found = latents.viv(latents.fit_class(other).variances)
        assert_close(found, factor * value, rtol=1e-4, atol=0)


def test_the_fit_finds_its_eigenvectors():
    """In them the latents have the fitted variances, and no covariance."""
    one = gaussian(torch.outer(torch.tensor([2.0, 0.5, 0.1]), torch.tensor([3.0, 1.0, 0.3, 0.1])))
    z = sample(one, 4000).unflatten(2, (2, 2))
    for stationary in (False, True):
        fit = latents.fit_class(z, stationary)
        y = latents.turn(fit, z.flatten(2) - fit.mean)
        assert_close(latents.turn_back(fit, y) + fit.mean, z.flatten(2))
        if not stationary:
            assert_close(y.var(0), fit.variances, rtol=0.1, atol=0.002)
            correlations = torch.corrcoef(y.flatten(1).T) - torch.eye(12)
            assert correlations.abs().max() < 0.08


def test_latents_along_one_direction():
    """VIV is (pi / 2) sqrt(tau) / d, but for the floor under eigenvalues."""
    z = randn(60, 1, 1, 1) * randn(1, 4, 3, 3, seed=1).sign()
    z[:, 1:] = 0
    fit = latents.fit_class(z)
    expected = math.pi / 2 * fit.variances.sum().sqrt() / 36
    assert latents.viv(fit.variances).item() == pytest.approx(expected.item(), rel=0.005)
    constant = latents.fit_class(torch.ones(60, 4, 3, 3))
    assert latents.viv(constant.variances).item() == 0


def test_too_few_images_are_refused():
    with pytest.raises(InputError, match="10 images of a class, and there are 9"):
        latents.fit_class(randn(9, 32, 16, 16))
    labels = torch.tensor([0, 0, 0, 1, -1, -1, -1, -1])
    with pytest.raises(InputError, match="needs 4 images of a class, and the largest class has 3"):
        latents.class_rows(labels)
    with pytest.raises(InputError, match="the largest class has 0"):
        latents.class_rows(torch.full((9,), -1))
    rows = latents.class_rows(torch.tensor([0, 1, 2, 2, 1, 2, 1, 2, 1, 5]))
    assert [r.tolist() for r in rows] == [[1, 4, 6, 8], [2, 3, 5, 7]]
    assert latents.full_fit([torch.zeros(21)], randn(1, 32, 16, 16))
    assert not latents.full_fit([torch.zeros(20)], randn(1, 32, 16, 16))


# ------------------------------------------------------------------------------
# Without labels: unit value 7, and the velocity itself.


def mixture():
    means = [[[3.0, 0.0]], [[-2.0, 1.0]], [[0.0, -2.0]]]
    variances = [[[0.2, 1.0]], [[0.5, 0.1]], [[0.3, 0.3]]]
    return [gaussian(torch.tensor(v), torch.tensor(m).double(), seed=k)
            for k, (m, v) in enumerate(zip(means, variances))]


def test_equal_classes_are_not_ambiguous():
    same = gaussian(torch.tensor([[0.2, 1.0]]))
    value, _ = latents.label_ambiguity([same] * 3, 200, draw("labels"))
    assert value == pytest.approx(0, abs=1e-12)


def test_viv_without_labels_is_the_variance_around_the_best_velocity():
    """E |v - E[v | x_t]|^2 with densities from SciPy, at random times."""
    classes, n, total = mixture(), 4000, 0.0
    value, error = latents.label_ambiguity(classes, 20_000, draw("labels"))
    value += latents.mean_over(classes, latents.viv)
    covariances = [k.space @ k.variances[0].diag() @ k.space.T for k in classes]
    eye = torch.eye(2).double()
    for i, t in enumerate((torch.arange(200) + 0.5).div(200).tolist()):
        own = torch.randint(3, (n,), generator=generator(i, "own"))
        drawn = torch.stack([sample(k, n, seed=i)[:, 0] for k in classes])
        x1 = drawn[own, torch.arange(n)]
        x0 = randn(n, 2, seed=1000 + i, dtype=torch.float64)
        x_t, v = (1 - t) * x0 + t * x1, x1 - x0
        best, weight = 0, 0
        for one, covariance in zip(classes, covariances):
            C = (1 - t) ** 2 * eye + t**2 * covariance
            normal = scipy.stats.multivariate_normal(t * one.mean[0].numpy(), C.numpy())
            p = torch.from_numpy(normal.pdf(x_t.numpy()))
            gain = (t * covariance - (1 - t) * eye) @ torch.linalg.inv(C)
            best = best + p[:, None] * (one.mean[0] + (x_t - t * one.mean[0]) @ gain.T)
            weight = weight + p[:, None]
        total += (v - best / weight).square().mean().item() / 200
    assert 0 < error < 0.02
    assert value == pytest.approx(total, rel=0.01)


# ------------------------------------------------------------------------------
# LNC and the linear probe.


def clusters(n=20, kinds=6, C=8, spread=0.01):
    centres = randn(kinds, C, seed=1)
    labels = torch.arange(kinds).repeat(n)
    return centres[labels] + spread * randn(n * kinds, C), labels


def test_neighbours_have_the_same_label_or_not():
    f, labels = clusters()
    assert latents.neighbour_consistency(f, labels, [5, 10]) == [1.0, 1.0]
    found = latents.neighbour_consistency(100 * f, labels, [19, 20])
    assert found == pytest.approx([1.0, 19 / 20])
    noise = randn(3000, 8)
    labels = torch.arange(3000) % 5
    found = latents.neighbour_consistency(noise, labels, [10])[0]
    chance = latents.same_label_chance(labels)
    assert chance == pytest.approx(599 / 2999)
    assert found == pytest.approx(chance, abs=0.01)
    twins = torch.cat([noise[:60], noise[:60]])
    found = latents.neighbour_consistency(twins, torch.arange(60).repeat(2), [1, 4])
    assert found == pytest.approx([1.0, 0.25])
    with pytest.raises(InputError, match="10 neighbours need 11 images, and there are 10"):
        latents.neighbour_consistency(noise[:10], labels[:10], [5, 10])


def test_only_the_object_counts_under_a_mask():
    z, masks = randn(9, 3, 4, 4), torch.zeros(9, 4, 4, dtype=torch.bool)
    masks[:, 1:3, :2] = True
    masks[4] = False
    found = latents.pool(z, masks)
    assert_close(found[0], z[0, :, 1:3, :2].mean((1, 2)))
    assert found[4].abs().max() == 0
    z[:, :, 0] += 9
    assert_close(latents.pool(z, masks), found)
    assert_close(latents.pool(z), z.mean((2, 3)))


def test_masks_of_pixels_become_masks_of_positions():
    masks = torch.zeros(1, 8, 8)
    masks[0, 3, 5] = 1.0
    expected = torch.zeros(1, 2, 2, dtype=torch.bool)
    expected[0, 0, 1] = True
    assert torch.equal(latents.mask_grid(masks, (2, 2)), expected)
    with pytest.raises(InputError, match="masks of 8 x 8 pixels do not fit latents of 3 x 3"):
        latents.mask_grid(masks, (3, 3))


def test_linear_probe():
    f, labels = clusters(spread=0.1)
    train, test = ((f[k:k + 60], 7 * labels[k:k + 60]) for k in (0, 60))
    assert latents.linear_probe(*train, *test) == 1.0
    noise = randn(4000, 4)
    labels = torch.arange(4000) % 4
    found = latents.linear_probe(noise[:2000], labels[:2000], noise[2000:], labels[2000:])
    assert found == pytest.approx(0.25, abs=0.04)


def test_semantics_says_what_is_missing():
    f, labels = clusters()
    z = f[:, :, None, None].expand(-1, -1, 4, 4)
    found = latents.semantics(z, labels)
    assert found["LNC, 10 neighbours"][0] == 1.0
    assert "give --masks" in found["LNC, foreground"] and "training" in found["linear probe"]
    masks = torch.ones(len(z), 4, 4, dtype=torch.bool)
    found = latents.semantics(z, labels, masks, z, labels)
    assert found["LNC, foreground"][0] == found["linear probe"] == 1.0
    for others in (torch.zeros(len(z)).long(), torch.arange(len(z)), -torch.ones(len(z)).long()):
        with pytest.raises(InputError, match="two classes, and two images of one of them"):
            latents.semantics(z, others)


# ------------------------------------------------------------------------------
# Spatial structure: the reference's unit values, and loops.


def test_a_map_of_two_halves():
    """Near pairs 464 / 480 alike; far pairs have 0.41561."""
    z = torch.zeros(1, 2, 16, 16)
    z[:, 0, :, :8], z[:, 1, :, 8:] = 3.0, 0.2
    left = torch.zeros(1, 16, 16, dtype=torch.bool)
    left[:, :, :8] = True
    found = latents.spatial_structure(z, left)
    assert found["LDS"] == pytest.approx(0.966667 - 0.415610, abs=2e-6)
    assert found["CDS"] == pytest.approx(0.049889, abs=1e-6)
    assert found["RMSC"] == pytest.approx(0.707107, abs=1e-6)
    assert found["SRSS"] == pytest.approx(1, abs=1e-6)


def test_a_map_that_turns():
    """Phase 2 pi x / 32: direct neighbours have (1 + cos(pi / 16)) / 2 = 0.990393."""
    phase = 2 * math.pi * torch.arange(16) / 32
    z = torch.stack([phase.cos(), phase.sin()])[None, :, None].expand(3, 2, 16, 16)
    found = latents.spatial_structure(z)
    assert found["LDS"] == pytest.approx(0.699607, abs=3e-6)
    assert found["CDS"] == pytest.approx(0.051100, abs=1e-6)
    weights = (1 + torch.rand(3, 1, 16, 16, generator=draw("w")))
    other = latents.spatial_structure(z * weights)
    assert other["LDS"] == pytest.approx(found["LDS"], abs=1e-6)
    constant = latents.spatial_structure(torch.ones(2, 5, 16, 16))
    assert all(value == pytest.approx(0, abs=3e-6) for value in constant.values())


def test_spatial_structure_is_what_loops_find():
    z, h, w = randn(70, 5, 8, 6), 8, 6
    masks = torch.rand(70, 8, 6, generator=draw("masks")) < 0.4
    masks[3] = False
    far, reach = latents.thresholds(6)
    assert (far, reach) == (2, 3)
    sums = {"LDS": [], "CDS": [], "SRSS": []}
    places = [(i, j) for i in range(h) for j in range(w)]
    for image, mask in zip(z[:5], masks[:5]):
        u = {p: F.normalize(image[:, p[0], p[1]], dim=0) for p in places}
        by = {}
        for p in places:
            for q in places:
                gap = abs(p[0] - q[0]) + abs(p[1] - q[1])
                by.setdefault(gap, []).append((u[p] @ u[q]).item())
        g = [sum(by[k]) / len(by[k]) for k in range(1, reach + 1)]
        distant = sum((by[k] for k in by if k >= far), [])
        sums["LDS"].append(g[0] - sum(distant) / len(distant))
        sums["CDS"].append(-scipy.stats.linregress([1, 2, 3], g).slope)
        front = [p for p in places if mask[p]]
        if len(front) < 12 or len(front) > 36:
            continue
        scores = []
        for p in front:
            near = [(u[p] @ u[q]).item() for q in front if abs(p[0] - q[0]) + abs(p[1] - q[1]) == 1]
            back = [(u[p] @ u[q]).item() for q in places if not mask[q]
                    and abs(p[0] - q[0]) + abs(p[1] - q[1]) >= far]
            if near and back:
                scores.append(sum(near) / len(near) - sum(back) / len(back))
        sums["SRSS"].append(sum(scores) / len(scores))
    assert 2 < len(sums["SRSS"]) < 5
    found = latents.spatial_structure(z[:5], masks[:5])
    for name, values in sums.items():
        assert found[name] == pytest.approx(sum(values) / len(values), abs=1e-5)
    for name in ("LDS", "CDS", "RMSC"):   # two batches
        parts = [latents.spatial_structure(z[:64])[name], latents.spatial_structure(z[64:])[name]]
        whole = latents.spatial_structure(z)[name]
        assert whole == pytest.approx((64 * parts[0] + 6 * parts[1]) / 70, abs=1e-6)


def test_thresholds_are_those_of_irepa_for_its_grid():
    assert latents.thresholds(16) == (6, 8)
    assert latents.thresholds(4) == (2, 2)
    assert "needs masks" in latents.space(randn(2, 3, 4, 4))["SRSS"]
    with pytest.raises(InputError, match="2 x 2 positions, not 1 x 1"):
        latents.spatial_structure(randn(2, 3, 1, 1))


# ------------------------------------------------------------------------------
# SEC: the reference's unit values.


def test_energy_by_frequency():
    white = latents.spectral_energy(randn(500, 8, 16, 16))
    assert latents.high_frequencies(white, 0.25) == pytest.approx(220 / 256, abs=0.003)
    assert latents.high_frequencies(white, 0.5) == pytest.approx(120 / 256, abs=0.005)
    even = torch.ones(16, 16)
    assert latents.high_frequencies(even, 0.25) == 220 / 256
    assert latents.high_frequencies(even, 0.5) == 120 / 256
    constant = latents.spectral_energy(torch.ones(2, 3, 16, 16))
    assert latents.high_frequencies(constant, 0.25) == pytest.approx(0, abs=1e-12)
    line = latents.dct_matrix(16)[15].float()
    checkers = latents.spectral_energy(torch.outer(line, line).expand(2, 3, 16, 16))
    assert latents.high_frequencies(checkers, 0.5) == pytest.approx(1)
    z = randn(10, 3, 8, 6)
    total = latents.spectral_energy(z).sum().item()
    assert total == pytest.approx(z.square().mean().item() * 48, rel=1e-5)
    expected = torch.from_numpy(scipy.fft.dctn(z.numpy(), axes=(2, 3), norm="ortho"))
    assert_close(latents.dct(z), expected)


# ------------------------------------------------------------------------------
# Neighbours and mixtures.


def test_neighbours_by_cosine():
    z, others = randn(30, 2, 3, 3), randn(600, 2, 3, 3, seed=1)
    cosine = F.cosine_similarity(z.flatten(1)[:, None], others.flatten(1), dim=2)
    expected = cosine.topk(3, dim=1).indices
    assert torch.equal(latents.nearest(z, others, 3), expected)
    own = torch.arange(5, 35)
    others[own] = z
    assert torch.equal(latents.nearest(z, others, 1)[:, 0], own)
    assert not (latents.nearest(z, others, 3, own) == own[:, None]).any()
    with pytest.raises(InputError, match="10 neighbours need 11 images, and there are 10"):
        latents.nearest(z, others[:10], 10, own)


def test_nearly_any_of_the_neighbours_is_chosen():
    z, others = randn(4000, 2, 2, 2), randn(20, 2, 2, 2, seed=1)
    near = latents.nearest(z, others, 10)
    chosen = latents.choose_neighbour(z, others, near, draw("choose"))
    assert (near == chosen[:, None]).any(1).all()
    gaps = ((z[:, None] - others[near]) ** 2).flatten(2).mean(2)
    expected = (-gaps).softmax(1).mean(0)
    assert_close((near == chosen[:, None]).float().mean(0), expected, rtol=0, atol=0.03)


def test_slerp():
    a, b = randn(6, 2, 3, 3), randn(6, 2, 3, 3, seed=1)
    assert latents.slerp(a, b, 0) is a
    assert_close(latents.slerp(a, b, 1.0), b)
    unit = [F.normalize(x.flatten(1), dim=1).view_as(x) for x in (a, b)]
    middle = latents.slerp(*unit, 0.5)
    assert_close(middle.flatten(1).norm(dim=1), torch.ones(6))
    assert_close(middle, F.normalize((unit[0] + unit[1]).flatten(1), dim=1).view_as(a))
    quarter = latents.slerp(*unit, 0.25)
    angles = [(u.flatten(1) * quarter.flatten(1)).sum(1).acos() for u in unit]
    assert_close(3 * angles[0], angles[1])
    assert_close(latents.slerp(a, 2 * a, 0.5), 1.5 * a)   # there is no arc


# ------------------------------------------------------------------------------
# Uniformity.


def test_density_is_scipys():
    points = (randn(300, 2) @ torch.tensor([[2.0, 0.0], [1.0, 0.5]])).double()
    expected = torch.from_numpy(scipy.stats.gaussian_kde(points.T.numpy())(points.T.numpy()))
    found = latents.density(points)
    assert_close(found / found.sum(), expected / expected.sum())


def test_evenness_of_known_densities():
    """A disc is the floor, and the reference has the numbers of a Gaussian."""
    found = latents.evenness(latents.density(latents.disc(4000, draw("disc"))))
    assert found["CV"] == pytest.approx(0.175, abs=0.015)
    assert found["Gini"] == pytest.approx(0.093, abs=0.008)
    assert found["entropy"] == pytest.approx(0.998, abs=0.0003)
    found = latents.evenness(latents.density(randn(4000, 2)))
    assert 0.52 < found["CV"] < 0.58 and found["Gini"] == pytest.approx(0.315, abs=0.02)
    assert 0.976 < found["entropy"] < 0.981
    even = latents.evenness(torch.full((50,), 0.3))
    assert even == pytest.approx({"CV": 0, "Gini": 0, "entropy": 1}, abs=1e-6)
    two = latents.evenness(torch.tensor([1.0, 3.0]))   # q = 1/4, 3/4
    assert two["CV"] == pytest.approx(0.5) and two["Gini"] == pytest.approx(0.25)
    assert two["entropy"] == pytest.approx(0.811278, abs=1e-5)


def test_neighbour_spacing_sees_clusters():
    even = torch.stack(torch.meshgrid(*[torch.arange(40.0)] * 2, indexing="ij"), 2).view(-1, 2)
    assert latents.neighbour_spacing(even) < 0.2
    crowded = torch.cat([randn(800, 2), 0.01 * randn(800, 2, seed=1)])
    assert latents.neighbour_spacing(crowded) > 0.8
    with pytest.raises(InputError, match="needs 11 images, and there are 10"):
        latents.neighbour_spacing(even[:10])


def test_tsne_keeps_neighbours_together():
    f, labels = clusters(n=50, kinds=4, spread=0.3)
    y = latents.tsne(f, perplexity=20, steps=300)
    near = torch.cdist(y, y).topk(11, largest=False).indices[:, 1:]
    assert (labels[near] == labels[:, None]).float().mean() > 0.97
    assert y.std() > 1
    assert torch.equal(y, latents.tsne(f, perplexity=20, steps=300))
    with pytest.raises(InputError, match="needs 90 images, and there are 80"):
        latents.tsne(f[:80])


def test_one_position_of_every_image():
    z = torch.arange(300.0).view(-1, 1, 1, 1) + torch.arange(4.0).view(2, 2) / 10
    found = latents.one_position(z, 100, draw("positions"))
    assert found.shape == (100, 1) and len(found.floor().unique()) == 100
    assert len((10 * (found - found.floor())).round().unique()) == 4
    small = latents.uniformity(z[:50], draw)
    assert "t-SNE needs 90 images and 2 channels, and there are 50 and 1" in small["density CV"]


# ------------------------------------------------------------------------------
# Equivariance.


def test_averages_of_patches_turn_with_the_image():
    x = torch.rand(4, 3, 32, 32, generator=draw("x"))

    def encode(x):
        return F.avg_pool2d(x, 4)

    found = latents.equivariance(encode, x, encode(x))
    assert found["rotation error"][0] == pytest.approx(0, abs=1e-12)
    assert found["flip error"][0] == pytest.approx(0, abs=1e-12)
    assert 0 < found["scale error"][0] < 0.01
    odd = latents.equivariance(encode, x[:, :, :20, :20], encode(x)[:, :, :5, :5])
    assert "no half" in odd["scale error"]

    def of_one_size(x):
        if x.shape[-1] != 32:
            raise InputError("takes 32 only")
        return encode(x)

    assert latents.equivariance(of_one_size, x, encode(x))["scale error"] == "takes 32 only"


def test_unrelated_latents_differ_by_two():
    square, relative = latents.equivariance_error(randn(500, 4, 4, 4), randn(500, 4, 4, 4, seed=1))
    assert square == pytest.approx(2, abs=0.05)
    assert relative == pytest.approx(math.sqrt(2), abs=0.03)
    a = randn(5, 4, 4, 4)
    assert latents.equivariance_error(a, a) == (0, 0)
    assert latents.equivariance_error(3 * a, 2 * a)[1] == pytest.approx(0.5)


# ------------------------------------------------------------------------------
# Paths: the reference's unit values, with a class Gaussian and no network.


def path_of(value, d=512, steps=50):
    one = gaussian(torch.full((1, d), value))
    x = randn(20, 1, d)
    return latents.trajectory(latents.gaussian_path(one, x, flow.time_grid(steps)))


def test_exact_paths_of_a_gaussian():
    """sqrt D falls and rises again: at 0.25 one of 49 pairs of steps turns back."""
    straight, efficient, ratios = path_of(0.25)
    assert_close(straight, torch.full((20,), 47 / 49), rtol=0, atol=1e-4)
    assert efficient.mean().item() == pytest.approx(0.826, abs=5e-4)
    straight, efficient, ratios = path_of(0.01)
    assert straight.mean().item() == pytest.approx(1) and efficient.min() > 0.999
    assert ratios.shape == (50, 20)
    _, efficient, ratios = path_of(1.0)   # they return
    assert efficient.abs().max() == 0 and ratios.isnan().all()


def test_steps_at_a_right_angle():
    states = [torch.tensor([[0.0, 0.0]]), torch.tensor([[1.0, 0.0]]), torch.tensor([[1.0, 1.0]])]
    straight, efficient, ratios = latents.trajectory(states)
    assert straight.item() == pytest.approx(0, abs=1e-7)
    assert efficient.item() == pytest.approx(math.sqrt(0.5))
    assert_close(ratios, torch.full((2, 1), math.sqrt(2)))


def test_recorded_states_are_eulers():
    """v = 2 - x has a class of one point: each path is straight."""
    x, field = randn(3, 2, 2, 2), lambda x, t: (2 - x) / (1 - t)
    states = latents.recorded(field, x, 10)
    assert len(states) == 11 and states[0] is x
    assert torch.equal(states[-1], flow.euler(field, x, 10))
    found = latents.paths([(field, x), (field, -x)], 10)
    assert found["straightness"] == pytest.approx(1, abs=1e-5)
    assert found["efficiency"] == pytest.approx(1, abs=1e-5)
    assert found["unevenness of steps"] == pytest.approx(0, abs=1e-4)


def test_the_path_of_a_gaussian_is_that_of_its_velocity():
    """Many Euler steps along m(x, t) of one class end where the closed form says."""
    one = gaussian(torch.tensor([[0.3, 2.0]]), torch.tensor([[1.0, -1.0]]).double())
    x = randn(5, 1, 2, dtype=torch.float64)

    def field(x, t):   # in the eigenvectors
        mean, D = latents.turn(one, one.mean), (1 - t) ** 2 + t**2 * one.variances
        return mean + (t * one.variances - (1 - t)) / D * (x - t * mean)

    found = flow.euler(field, x, 20_000)
    assert_close(found, latents.gaussian_path(one, x, [1.0])[0], rtol=1e-3, atol=1e-3)


# ------------------------------------------------------------------------------
# The decoder, of which a linear one has a known gain.


def linear_decoder(C, S, pixels):
    J = randn(pixels, C * S, seed=3)
    return J, lambda z: (z.flatten(1) @ J.T)[:, :, None, None]


def test_gain_of_a_linear_decoder():
    J, decode = linear_decoder(2, 4, 12)
    z = randn(4000, 2, 2, 2)
    found = latents.decoder_gain(decode, z, randn(4000, 2, 2, 2, seed=1)).mean()
    assert found.item() == pytest.approx((J.square().sum() / 12).item(), rel=0.05)


def test_viv_seen_counts_directions_by_their_gain():
    """(pi / 2) sum s_i |J u_i|^2 / pixels, with u_i = outer(channel, space)."""
    one = gaussian(torch.tensor([[1.0, 0.2, 0.1, 3.0], [0.5, 2.0, 0.0, 0.1]]))
    J, decode = linear_decoder(2, 4, 12)
    s, expected = one.variances.sqrt(), 0.0
    for i in range(2):
        for j in range(4):
            u = torch.outer(one.channels[:, i], one.space[:, j]).flatten()
            expected += s[i, j] * (J.double() @ u).square().sum() / 12
    u = latents.ambiguous_directions(one, 20_000, draw("seen"))
    found = latents.decoder_gain(decode, torch.zeros_like(u), u).mean()
    assert found.item() == pytest.approx(expected.item(), rel=0.03)


def test_rank_and_covariance_of_channels():
    assert latents.effective_rank(torch.ones(7)) == pytest.approx(7)
    assert latents.effective_rank(torch.tensor([1.0, 0, 0])) == pytest.approx(1, abs=1e-6)
    z = randn(600, 4, 3, 3)
    flat = z.transpose(0, 1).flatten(1).double()
    assert_close(latents.channel_covariance(z), flat @ flat.T / flat.shape[1])


def test_noise_tolerance():
    """Distances 5 exp(4 a) have slope 4 and double at log(2) / 4."""
    levels = [k / 100 for k in range(51)]
    slope, doubles = latents.noise_tolerance(levels, [5 * math.exp(4 * a) for a in levels])
    assert slope == pytest.approx(4) and doubles == pytest.approx(math.log(2) / 4, abs=1e-3)
    slope, doubles = latents.noise_tolerance(latents.NOISE, [5.0] * 6)
    assert slope == pytest.approx(0) and math.isnan(doubles)
