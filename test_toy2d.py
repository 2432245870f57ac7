"""The toy against closed forms and independent oracles: distribution, mechanism, stack, numbers, command."""

import json
import math
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from scipy.stats import multivariate_normal
from torch import Tensor
from torch.testing import assert_close

import losses
import runtime
import toy2d

MIXTURE = toy2d.fractal()
SMOKE = toy2d.PRESETS["smoke"]


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """As the command does: more threads only wait for each other on matrices of this size."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def grid(half: float, n: int) -> tuple[Tensor, float]:
    """n x n points over [-half, half]^2 and the area of a cell."""
    axis = torch.linspace(-half, half, n, dtype=torch.float64)
    return torch.cartesian_prod(axis, axis), float(axis[1] - axis[0]) ** 2


# ------------------------------------------------------------------------------------------------------------
# The distribution, Eqs. 20-23.


def test_fractal_has_1016_components_mean_0_and_std_half() -> None:
    w, m, c = MIXTURE
    assert w.shape == (1016,) and m.shape == (1016, 2) and c.shape == (1016, 2, 2)
    assert_close(w.sum(), torch.ones((), dtype=torch.float64))
    assert (torch.linalg.eigvalsh(c) > 0).all()
    # E[x] = sum w mu;  Var[x] = sum w (mu^2 + diag Sigma) - E[x]^2
    assert_close(w @ m, torch.zeros(2, dtype=torch.float64), atol=1e-12, rtol=0)
    variance = sum(wi * (mi.square() + ci.diag()) for wi, mi, ci in zip(w, m, c))
    assert_close(variance.sqrt(), torch.full((2,), 0.5, dtype=torch.float64))
    assert torch.equal(toy2d.fractal().mean, m) and not torch.equal(toy2d.fractal(seed=3).mean, m)


def test_density_against_scipy() -> None:
    x = torch.cat([toy2d.sample(MIXTURE, 6, rng()), torch.tensor([[0.0, 0.5], [1.5, -1.5]])])
    expected = sum(w.item() * multivariate_normal(m.numpy(), c.numpy()).pdf(x.numpy())
                   for w, m, c in zip(*MIXTURE))
    assert_close(toy2d.log_density(MIXTURE, x).exp(), torch.from_numpy(expected), rtol=1e-7, atol=1e-300)
    assert_close(toy2d.log_density(MIXTURE, x, chunk=3), toy2d.log_density(MIXTURE, x))


def test_density_integrates_to_one() -> None:
    # Smoothed by 0.03, no component is narrower than two cells of this grid: the trapezoid rule is exact.
    wide = toy2d.smooth(MIXTURE, 0.03)
    points, area = grid(2.2, 300)
    assert_close(toy2d.log_density(wide, points).exp().sum().item() * area, 1.0, rtol=1e-5, atol=0)
    # The tips themselves are narrower, so p is integrated by importance: E_q[p / q] = 1 for q = p smoothed.
    near = toy2d.smooth(MIXTURE, 0.02)
    x = toy2d.sample(near, 20_000, rng())
    ratio = (toy2d.log_density(MIXTURE, x) - toy2d.log_density(near, x)).exp()
    assert abs(ratio.mean().item() - 1) < 4 * ratio.std().item() / math.sqrt(len(x))
    assert ratio.std().item() < 3   # so that the line above says something: 4 standard errors are under 9 %


def test_score_against_autograd_and_finite_differences() -> None:
    x = toy2d.sample(MIXTURE, 40, rng()).double() + 0.05
    for mixture in (MIXTURE, toy2d.smooth(MIXTURE, 0.1)):
        score = toy2d.score(mixture, x, chunk=7)
        leaf = x.clone().requires_grad_()
        gradient, = torch.autograd.grad(toy2d.log_density(mixture, leaf).sum(), leaf)
        assert_close(score, gradient, rtol=1e-7, atol=1e-6)
        h = 1e-6
        for axis in torch.eye(2, dtype=torch.float64):
            up, down = (toy2d.log_density(mixture, x + side * h * axis) for side in (1, -1))
            assert_close((score * axis).sum(1), (up - down) / (2 * h), rtol=1e-4, atol=1e-2)


def test_smoothed_density_is_the_convolution() -> None:
    # (p * N(0, 0.1^2)) * N(0, 0.06^2) by a 2-D Riemann sum of 0.01 cells, against p * N(0, 0.1^2 + 0.06^2).
    once, both = toy2d.smooth(MIXTURE, 0.1), toy2d.smooth(MIXTURE, math.sqrt(0.1 ** 2 + 0.06 ** 2))
    shifts, area = grid(0.4, 81)
    kernel = torch.exp(-shifts.square().sum(1) / (2 * 0.06 ** 2)) / (2 * math.pi * 0.06 ** 2) * area
    x = toy2d.sample(MIXTURE, 4, rng()).double()
    convolved = torch.stack([kernel @ toy2d.log_density(once, point - shifts).exp() for point in x])
    assert_close(toy2d.log_density(both, x).exp(), convolved, rtol=1e-6, atol=0)


def test_sample_has_the_moments_of_the_mixture() -> None:
    x = toy2d.sample(MIXTURE, 200_000, rng())
    assert_close(x.mean(0), torch.zeros(2), atol=0.005, rtol=0)
    assert_close(x.std(0), torch.full((2,), 0.5), atol=0.005, rtol=0)
    # One tilted Gaussian: a transposed Cholesky factor would show in the covariance.
    c = torch.tensor([[[1.0, 0.8], [0.8, 2.0]]], dtype=torch.float64)
    one = toy2d.Mixture(torch.ones(1).double(), torch.tensor([[3.0, -1.0]]).double(), c)
    y = toy2d.sample(one, 200_000, rng())
    assert_close(y.T.cov().double(), c[0], atol=0.02, rtol=0)
    assert_close(y.mean(0).double(), one.mean[0], atol=0.02, rtol=0)
    # Component frequencies: the trunk (first 8 components) against its weight.
    likeliest = toy2d.component_log_density(MIXTURE, x[:20_000]).argmax(1)
    assert abs((likeliest < 8).double().mean().item() - MIXTURE.weight[:8].sum().item()) < 0.015


# ------------------------------------------------------------------------------------------------------------
# The sampler, Eqs. 30 and 31, on a flow that is known: data N(m, s^2), for which
# v(x, t) = m + (t s^2 - (1 - t)) / (t^2 s^2 + (1 - t)^2) (x - t m) carries x_0 to m + s x_0.


def test_euler_on_an_analytic_gaussian_flow() -> None:
    m, s, times = torch.tensor([0.7, -1.2], dtype=torch.float64), 0.4, []
    x0 = torch.randn(500, 2, generator=rng(), dtype=torch.float64)

    def velocity(x: Tensor, t: float) -> Tensor:
        times.append(t)
        return m + (t * s ** 2 - (1 - t)) / (t ** 2 * s ** 2 + (1 - t) ** 2) * (x - t * m)

    error = {n: (losses.euler(velocity, x0, n) - (m + s * x0)).abs().max().item() for n in (20, 1000, 2000)}
    assert error[2000] < 2e-3 and 1.9 < error[1000] / error[2000] < 2.1   # first order
    assert error[20] < 0.2                                                # the toy's 20 steps
    assert_close(times[:20], [k / 20 for k in range(20)])                 # explicit: v where a step begins


# ------------------------------------------------------------------------------------------------------------
# The mechanism.  Decoder D(z) = w z, squared error: E (w sigma eps)^2 = sigma^2 T with T = w^2, and eps = +-1
# gives that expectation exactly.

GAINS = torch.tensor([[0.3], [1.0], [2.0], [5.0]])


def settle(weight: float, steps: int) -> tuple[Tensor, list[Tensor]]:
    """log sigma^2 [4, 1] after `steps` of Adam on the error of GAINS * z + weight * Eq. 9, and its path."""
    mean, logvar = torch.zeros(4, 1), torch.zeros(4, 1, requires_grad=True)
    optimizer, path = torch.optim.Adam([logvar], lr=0.02), []
    for _ in range(steps):
        z = [losses.reparameterize(mean, logvar, sign * torch.ones(4, 1)) for sign in (1, -1)]
        terms = {"rec": sum(losses.squared_error(GAINS * side, GAINS * mean) for side in z) / 2,
                 "force": losses.inverse_variance(logvar)}
        optimizer.zero_grad()
        losses.weighted_sum(terms, {"rec": 1.0, "force": weight}).backward()
        optimizer.step()
        path.append(logvar.detach().clone())
    return logvar.detach(), path


def test_equilibrium_of_eq_14() -> None:
    logvar, _ = settle(weight=1e-2, steps=1500)
    assert_close(logvar.exp(), (1e-2 / GAINS.square()).sqrt(), rtol=0.01, atol=0)   # sigma^4 = lambda / T


def test_variance_collapses_without_the_expansion() -> None:
    logvar, path = settle(weight=0.0, steps=800)
    assert all((b < a).all() for a, b in zip(path[:-1], path[1:]))   # every step of Eq. 8 lowers sigma
    assert (logvar < -4).all() and (logvar < path[400] - 0.5).all()   # and it has not stopped


@pytest.mark.parametrize("squared", [True, False])
def test_equilibrium_minimises_the_objective(squared: bool) -> None:
    # Isotropic J = s I in two dimensions: T = 2 s^2, E||s sigma eps||^2 = 2 (s sigma)^2, and ||eps|| is
    # Rayleigh with mean sqrt(pi / 2).  Eq. 9 sums over both dimensions.
    sigma, s, weight = torch.logspace(-2, 1, 20_001, dtype=torch.float64), 0.2, 1e-2
    rec = 2 * (s * sigma) ** 2 if squared else s * sigma * math.sqrt(math.pi / 2)
    best = sigma[(rec + weight * 2 / sigma ** 2).argmin()]
    t = torch.tensor(2 * s ** 2, dtype=torch.float64)
    assert_close(toy2d.equilibrium(t, weight, squared), best, rtol=1e-3, atol=0)
    slope = (toy2d.equilibrium(64 * t, weight, squared) / best).log() / math.log(64)
    assert_close(slope.item(), -1 / 4 if squared else -1 / 6, rtol=1e-3, atol=0)


def test_sensitivity_is_the_trace_of_the_jacobian() -> None:
    decoder = toy2d.Mlp([2, 8, 8, 2], [rng()])
    z = torch.randn(5, 2, generator=rng(1))
    for point, t in zip(z, toy2d.sensitivity(decoder, z)):
        j = torch.autograd.functional.jacobian(lambda p: decoder(p.view(1, 1, 2))[0, 0], point)
        assert_close(t, (j @ j.T).trace())


def test_scale_runs_away_without_the_penalty_and_not_with_it() -> None:
    # x_hat = b (a x + sigma eps): a -> infinity with b = 1 / a makes any sigma harmless.
    x, eps = torch.randn(2, 64, 1, generator=rng())

    def gain(lambda2: float) -> list[float]:
        a, b, logvar = (torch.tensor(v, requires_grad=True) for v in (1.0, 1.0, -2.0))
        optimizer, path = torch.optim.Adam([a, b, logvar], lr=0.03), []
        for _ in range(1200):
            spread = logvar.expand(64, 1)
            z = losses.reparameterize(a * x, spread, eps)
            terms = {"rec": losses.squared_error(b * z, x), "force": losses.inverse_variance(spread),
                     "magnitude": losses.exponential_magnitude(z, tau=1.0)}
            optimizer.zero_grad()
            losses.weighted_sum(terms, {"rec": 1.0, "force": 1.0, "magnitude": lambda2}).backward()
            optimizer.step()
            path.append(a.item())
        return path

    free, held = gain(0.0), gain(1e-3)
    assert free[599] < free[899] / 1.1 < free[1199] / 1.2   # still growing
    assert abs(held[1199] / held[599] - 1) < 0.03           # settled
    assert free[1199] > 2 * held[1199]


def test_normalised_latent_has_no_scale() -> None:
    arm = toy2d.Arm("n", "inverse variance", 1e-3, normalised=True)
    x = toy2d.sample(MIXTURE, 400, rng())[None]
    tokenizer = toy2d.Tokenizer([arm], 16, 8)
    before, logvar = tokenizer.encode(x, momentum=1.0)   # momentum 1: the running statistics are the batch's
    assert_close(before.mean(1), torch.zeros(1, 2), atol=1e-4, rtol=0)
    assert_close(before.std(1), torch.ones(1, 2), atol=1e-3, rtol=0)
    last = tokenizer.encoder.weight[-1]
    with torch.no_grad():
        last[..., :2] *= 10
    after, _ = tokenizer.encode(x, momentum=1.0)
    assert_close(after, before, atol=1e-3, rtol=1e-3)
    (after.pow(3).sum() / 400).backward()   # of any function of the latent, no gradient is along the weight
    along = (last.grad[..., :2] * last[..., :2]).sum().abs()
    assert along < 1e-3 * last.grad[..., :2].norm() * last[..., :2].norm()


# ------------------------------------------------------------------------------------------------------------
# The stack and the schedule.


def short_run(arms: list[toy2d.Arm], folder: Path) -> list[dict]:
    log = runtime.Log(folder / "log.jsonl", {}, runtime.start("cpu"))
    recipe = {**SMOKE, "steps": 6, "flow_steps": 6}
    return toy2d.train(arms, recipe, MIXTURE, torch.device("cpu"), log)


def test_a_stack_equals_each_arm_alone(tmp_path: Path) -> None:
    kl, *_, ve = toy2d.figure_arms(0)
    arms = kl, ve, toy2d.Arm("n", "inverse variance", 1e-4, normalised=True, flow_data="mean", seed=1)
    together = short_run(list(arms), tmp_path)
    for arm, stacked in zip(arms, together):
        alone, = short_run([arm], tmp_path)
        assert stacked["arm"] == alone["arm"]
        for part in ("tokenizer", "flow", "units"):
            assert_close(stacked[part], alone[part], rtol=1e-3, atol=1e-4)
    first, second = (trained["tokenizer"]["decoder.weight.0"] for trained in together[:2])
    assert (first - second).abs().max() > 1e-3   # and the losses do differ


def test_arms_of_one_seed_see_the_same_data() -> None:
    x, eps, base, t = next(toy2d.draws(MIXTURE, [0, 0, 1], "tokenizer", 8, 5, torch.device("cpu")))
    assert x.shape == eps.shape == base.shape == (3, 8, 2) and t.shape == (3, 8)
    for values in (x, eps, base, t):
        assert torch.equal(values[0], values[1]) and not torch.equal(values[0], values[2])
    assert not torch.equal(eps, base)


def test_fixed_sigma_and_flow_data() -> None:
    arms = [toy2d.Arm("s", "fixed sigma", 0.0, sigma=0.1, normalised=True), toy2d.Arm("k", "kl", 1e-3),
            toy2d.Arm("m", "kl", 1e-3, flow_data="mean")]
    tokenizer = toy2d.Tokenizer(arms, 16, 8)
    x = toy2d.sample(MIXTURE, 50, rng()).expand(3, 50, 2)
    eps = torch.randn(3, 50, 2, generator=rng())
    mean, logvar = tokenizer.encode(x)
    assert_close(logvar[0].exp(), torch.full((50, 2), 0.01))
    z = tokenizer.latent(x, eps)
    assert_close(z[0], losses.sigma_vae_sample(mean[0], 0.1, eps[0]))   # the sigma-VAE of losses.py
    assert_close(z[1], mean[1] + (logvar[1] / 2).exp() * eps[1])
    assert_close(z[2], mean[2])


def test_objectives_are_the_paper_s_sums() -> None:
    kl, *_, ve = toy2d.figure_arms(0)
    tokenizer = toy2d.Tokenizer([kl, ve], 16, 8)
    x, eps, base, t = next(toy2d.draws(MIXTURE, [0, 0], "tokenizer", 8, 1, torch.device("cpu")))
    total, terms = toy2d.tokenizer_loss(tokenizer, [kl, ve], x, eps, base, t)
    mean, logvar = tokenizer.encode(x)
    sigma2 = logvar.exp()
    z = mean + sigma2.sqrt() * eps
    rec = (tokenizer.decoder(z) - x).norm(dim=2).mean(1)
    prior = 0.5 * (mean[0] ** 2 + sigma2[0] - logvar[0] - 1).sum(1).mean()
    expansion = (1 / (sigma2[1] + 1e-6)).sum(1).mean()
    wall = torch.exp(z[1].abs() - 1).sum(1).mean()
    assert_close(total, rec.sum() + 1e-3 * prior + 1e-2 * expansion + 1e-6 * wall)
    assert_close(terms[:, 0], rec.detach())
    flow = toy2d.Mlp(toy2d.flow_sizes(SMOKE), [rng(), rng()])
    units = torch.zeros(2, 1, 2), torch.tensor([1.0, 2.0]).view(2, 1, 1).expand(2, 1, 2)
    _, per_arm = toy2d.flow_loss(flow, tokenizer, units, x, eps, base, t)
    data = torch.stack([z[0], z[1] / 2])
    z_t = t[..., None] * data + (1 - t[..., None]) * base
    v_hat = flow(torch.cat([z_t, t[..., None]], 2))
    expected = (v_hat - (data - base)).square().sum(2).mean(1)   # Eq. 29: the sum over both dimensions
    assert_close(per_arm[:, 0], expected.detach())


def test_the_compiled_step_has_no_graph_break() -> None:
    # What CUDA runs as one graph, traced here without a compiler: the same loss, gradient and statistics.
    arms = [toy2d.figure_arms(0)[0], toy2d.Arm("n", "inverse variance", 1e-3, 1e-6, normalised=True)]
    batch = next(toy2d.draws(MIXTURE, [0, 0], "tokenizer", 8, 1, torch.device("cpu")))
    found = []
    for wrap in (lambda loss: loss, lambda loss: torch.compile(loss, backend="aot_eager", fullgraph=True)):
        tokenizer = toy2d.Tokenizer(arms, 8, 4)
        total, _ = wrap(lambda *data: toy2d.tokenizer_loss(tokenizer, arms, *data))(*batch)
        total.backward()
        found.append([total.detach(), *(p.grad for p in tokenizer.parameters()), *tokenizer.buffers()])
    assert_close(found[0], found[1])


def test_paper_preset_is_supplement_c() -> None:
    paper = toy2d.PRESETS["paper"]
    assert (paper["width"], paper["layers"], paper["batch"], paper["steps"]) == (512, 8, 4096, 200_000)
    assert (paper["flow_batch"], paper["flow_steps"], paper["lr"]) == (4096, 200_000, 1e-3)
    assert paper["euler_steps"] == 20 and paper["ema"] == paper["cooldown"] == 0
    assert len(toy2d.Mlp([2, *[4] * (paper["layers"] - 1), 4], [rng()]).weight) == 8
    assert toy2d.learning_rate(0, 200_000, paper) == toy2d.learning_rate(512, 200_000, paper) == 1e-3
    assert_close(toy2d.learning_rate(512 * 16, 200_000, paper), 1e-3 / 4)   # 1 / sqrt
    small = toy2d.PRESETS["small"]
    assert_close(toy2d.learning_rate(4000, 12_000, small), 4e-3 / 2)        # before the cool-down
    assert_close(toy2d.learning_rate(10_200, 12_000, small), 4e-3 / 2 / math.sqrt(10.2))   # half-way down it
    kl, *_, ve = toy2d.figure_arms(0)
    assert (kl.weight, ve.weight, ve.lambda2, ve.tau) == (1e-3, 1e-2, 1e-6, 1.0)


def test_sweep_has_no_two_arms_alike() -> None:
    arms = toy2d.sweep_arms(0)
    assert len({a.name for a in arms}) == len(arms)
    assert len({toy2d.replace(a, name="") for a in arms}) == len(arms)
    assert {a.force for a in arms} == set(toy2d.FORCES)
    paths = {toy2d.arm_path(Path(), a, SMOKE) for a in arms}
    assert len(paths | {toy2d.arm_path(Path(), arms[0], {**SMOKE, "lr": 1.0})}) == len(arms) + 1


# ------------------------------------------------------------------------------------------------------------
# Numbers.


def test_metrics_on_real_data_and_on_rubbish() -> None:
    ref = toy2d.reference(MIXTURE, 4000)
    real = toy2d.sample(MIXTURE, 4000, rng(5))
    assert toy2d.invalid_share(ref, real) < 0.004                       # 0.1 % by definition, 4 of 4000
    assert toy2d.invalid_share(ref, torch.full((4, 2), 9.0)) == 1
    assert toy2d.invalid_share(ref, torch.tensor([[math.nan, 0.0], [0.0, 0.0]])) == 0.5 + 0.5 * (
        toy2d.log_density(MIXTURE, torch.zeros(1, 2)).item() < ref.threshold)
    assert toy2d.sliced_wasserstein(real, ref.x) < 0.05
    # A shift by (a, b) moves every projection by a cos + b sin: the mean of its square is (a^2 + b^2) / 2.
    shifted = toy2d.sliced_wasserstein(real, real + torch.tensor([0.3, 0.4]))
    assert_close(shifted, math.sqrt(0.125), rtol=1e-3, atol=0)
    assert toy2d.coverage(ref, real) > 0.5
    assert_close(toy2d.coverage(ref, MIXTURE.mean[:1].float().repeat(10, 1)), 1 / 1016)


def test_slope_of_figure_3_is_recovered(monkeypatch: pytest.MonkeyPatch) -> None:
    # A tokenizer whose sigma is 0.05 T^(-1/4) of its own decoder, exactly.
    arm = toy2d.figure_arms(0)[-1]
    tokenizer = toy2d.Tokenizer([arm], 16, 8)
    mean = torch.randn(300, 2, generator=rng()) * 3
    t = toy2d.sensitivity(tokenizer.decoder, mean)
    trained = {"arm": toy2d.asdict(arm), "recipe": SMOKE, "tokenizer": tokenizer.state_dict(),
               "flow": toy2d.Mlp(toy2d.flow_sizes(SMOKE), [rng()]).state_dict(),
               "arrays": {"mean": mean, "logvar": (2 * torch.log(0.05 * t ** -0.25))[:, None].expand(300, 2)}}
    monkeypatch.setattr(losses, "reparameterize", lambda mean, logvar, eps: mean)   # T at the mean itself
    found = toy2d.mechanism(trained, draws=1)
    assert_close(found["slope"], -0.25, rtol=1e-3, atol=0)
    assert_close(found["correlation"], -1.0, rtol=1e-3, atol=0)


# ------------------------------------------------------------------------------------------------------------
# The command.


@pytest.fixture(scope="module")
def smoke(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict]:
    out = tmp_path_factory.mktemp("toy")
    return out, toy2d.main(["--smoke", "--device", "cpu", "--out", str(out)])


NO_FIGURES = {"figure3": {"slope": [0.0], "correlation": [0.0]}}   # for runs whose pictures nobody looks at


def load(out: Path) -> dict[str, dict]:
    return {t["arm"]["name"]: t for t in map(runtime.load_file, out.glob("arms/*.pt"))}


def test_smoke_writes_figures_numbers_and_log(smoke: tuple[Path, dict]) -> None:
    out, report = smoke
    assert sorted(p.name for p in out.glob("*.png")) == [f"toy2d_figure{n}.png" for n in (1, 2, 3, 4)]
    assert json.loads((out / "toy2d.json").read_text()) == json.loads(json.dumps(report))
    lines = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    assert {"command", "config", "versions"} <= set(lines[0])
    assert {line["stage"] for line in lines[1:]} == {"tokenizer", "flow", "evaluate"}
    assert all(set(a) == {"rec", "force", "magnitude"} for line in lines[1:] if line["stage"] == "tokenizer"
               for a in line["arms"].values())
    assert not list(out.glob("**/*.tmp"))


def test_printed_numbers_come_from_the_saved_run(smoke: tuple[Path, dict]) -> None:
    out, report = smoke
    ref = toy2d.reference(MIXTURE, SMOKE["evaluate"])
    trained = load(out)
    for row in report["arms"]:
        one = trained[row["arm"]["name"]]
        # The arrays that are drawn give the metrics; the file's networks give the arrays and the flow loss.
        networks = {k: one[k] for k in ("arm", "recipe", "tokenizer", "flow", "units")}
        again = toy2d.evaluate(networks, ref)
        assert again["metrics"] == one["metrics"]
        for key, value in toy2d.metrics(one["arrays"], ref).items():
            assert row["metrics"][key]["mean"] == value
        points = one["arrays"]["samples"].numpy()
        density = sum(w.item() * multivariate_normal(m.numpy(), c.numpy()).pdf(points)
                      for w, m, c in zip(*MIXTURE))
        by_hand = float((density < math.exp(ref.threshold)).mean())
        assert_close(row["metrics"]["invalid_share"]["mean"], by_hand)
        shown = toy2d.caption(one["metrics"], "invalid_share", "flow_loss")
        flow = row["metrics"]["flow_loss"]["mean"]
        assert shown == f"invalid {100 * by_hand:#.3g} %,   flow loss {flow:#.4g}"
        assert f"{100 * by_hand:.4g} %" in toy2d.table(report["arms"])


def test_same_command_twice_gives_the_same_numbers(smoke: tuple[Path, dict], tmp_path: Path,
                                                   monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(toy2d, "draw", lambda *_: NO_FIGURES)
    again = toy2d.main(["--smoke", "--device", "cpu", "--out", str(tmp_path)])
    assert again["arms"] == smoke[1]["arms"]


def test_only_missing_arms_are_trained(smoke: tuple[Path, dict], monkeypatch: pytest.MonkeyPatch) -> None:
    out, report = smoke
    monkeypatch.setattr(toy2d, "draw", lambda *_: NO_FIGURES)
    gone = next(out.glob("arms/ve-*.pt"))
    gone.unlink()
    kept = {p: p.stat().st_mtime_ns for p in out.glob("arms/*.pt")}
    names: list[str] = []
    train = toy2d.train
    monkeypatch.setattr(toy2d, "train",
                        lambda arms, *rest: names.extend(a.name for a in arms) or train(arms, *rest))
    again = toy2d.main(["--smoke", "--device", "cpu", "--out", str(out)])
    assert names == ["VE"] and gone.exists()
    assert {p: p.stat().st_mtime_ns for p in kept} == kept
    for old, new in zip(report["arms"], again["arms"]):   # in another stack: equal but for rounding
        old, new = (row["metrics"]["rec_mean"]["mean"] for row in (old, new))
        assert_close(new, old, rtol=0.05, atol=0)


def test_seeds_are_averaged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(toy2d, "draw", lambda *_: NO_FIGURES)
    report = toy2d.main(["--smoke", "--device", "cpu", "--seeds", "3", "5", "--out", str(tmp_path), "--json",
                         str(tmp_path / "deep" / "numbers.json")])
    assert (tmp_path / "deep" / "numbers.json").exists()
    for row in report["arms"]:
        assert row["seeds"] == [3, 5]
        a, b = row["metrics"]["flow_loss"]["values"]
        assert a != b
        assert_close(row["metrics"]["flow_loss"]["mean"], (a + b) / 2)
        assert_close(row["metrics"]["flow_loss"]["std"], abs(a - b) / 2)


def test_sweep_trains_every_arm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                capsys: pytest.CaptureFixture) -> None:
    monkeypatch.setitem(toy2d.PRESETS, "smoke", {**SMOKE, "steps": 4, "flow_steps": 4, "evaluate": 100})
    report = toy2d.main(["--smoke", "--device", "cpu", "--sweep", "--stack", "50", "--out", str(tmp_path)])
    assert [row["arm"]["name"] for row in report["arms"]] == [a.name for a in toy2d.sweep_arms(0)]
    printed = capsys.readouterr().out
    assert all(f"| {a.name} |" in printed for a in toy2d.sweep_arms(0))
    assert (tmp_path / "toy2d_sweep.json").exists() and not list(tmp_path.glob("*.png"))


def test_wrong_input_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit) as stop:
        toy2d.main(["--stack", "0", "--out", str(tmp_path / "new")])
    assert stop.value.code == 2 and not (tmp_path / "new").exists()
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "--stack 0" in error
