"""The toy and its sweep against closed forms and independent oracles."""

import json
import math
import os
import shutil
import signal
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import runtime  # before torch: it sets how threads wait
import numpy as np
import pytest
import torch
from scipy.stats import multivariate_normal
from torch import Tensor
from torch.testing import assert_close

import flow
import losses
import toy2d
from studies import toy_sweep

SMOKE = toy2d.PRESETS["small"] | toy2d.SMOKE
TINY = SMOKE | dict(width=8, tokenizer_steps=3, flow_steps=3, points=60)
KL, VE = toy2d.ARMS[0], toy2d.ARMS[-1]


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """As the command has it; so `run` needs no other processes either."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def density(x: Tensor) -> np.ndarray:
    return sum(w * multivariate_normal(m, c).pdf(x.numpy())
               for w, m, c in zip(*(part.numpy() for part in toy2d.TREE)))


# ------------------------------------------------------------------------------
# The data.


def test_tree_has_mean_0_and_deviation_half() -> None:
    w, m, c = toy2d.TREE
    assert w.shape == (1016,) and m.shape == (1016, 2) and c.shape == (1016, 2, 2)
    assert_close(w.sum().item(), 1.0)
    # E[x] = sum w mu;  Var[x] = sum w (mu^2 + diag Sigma)
    assert_close(w @ m, torch.zeros(2).double(), atol=1e-12, rtol=0)
    variance = sum(wi * (mi.square() + ci.diag()) for wi, mi, ci in zip(w, m, c))
    assert_close(variance.sqrt(), torch.full((2,), 0.5).double())


def test_trunk_and_first_branch_are_karras_s() -> None:
    # The trunk points to 45 degrees and is 0.292 (1 + 0.2 g) long, its Gaussians
    # lie between 7 % and 93 % of it, 0.06 lengths long and 0.012 wide.  The first
    # child turns by 1 + 0.2 g and is 0.8 times as long before its own draw.
    g = np.random.RandomState(2).randn(3)
    w, m, c = (part.numpy() for part in toy2d.TREE)
    length = 0.292 * (1 + 0.2 * g[0])
    along = np.array([1, 1]) / math.sqrt(2)
    scale = (m[7] - m[0]) / (0.86 * length * along)
    outer = np.outer(along, along)
    shape = outer * (0.06 * length) ** 2 + (np.eye(2) - outer) * 0.012 ** 2
    np.testing.assert_allclose(c[0], shape * np.outer(scale, scale), rtol=1e-9)
    angle = math.pi / 4 + 1 + 0.2 * g[1]
    child = 0.292 * 0.8 * (1 + 0.2 * g[2])
    foot = m[0] / scale + 0.93 * length * along
    first = foot + 0.07 * child * np.array([math.cos(angle), math.sin(angle)])
    np.testing.assert_allclose(m[8] / scale, first, rtol=1e-9)
    assert_close(w[8] / w[0], child * 0.5 / length)


def test_density_against_scipy() -> None:
    x = torch.cat([toy2d.sample(6, rng()), torch.tensor([[0.0, 0.5], [1.5, -1.5]])])
    assert_close(toy2d.log_density(x).exp().numpy(), density(x), rtol=1e-7, atol=1e-300)
    many = toy2d.sample(2500, rng())   # more than one part of a million numbers
    apart = torch.cat([toy2d.log_density(part) for part in many.split(700)])
    assert_close(toy2d.log_density(many), apart)


def test_sample_has_the_moments_of_the_tree(monkeypatch: pytest.MonkeyPatch) -> None:
    x = toy2d.sample(200_000, rng())
    assert_close(x.mean(0), torch.zeros(2), atol=0.005, rtol=0)
    assert_close(x.std(0), torch.full((2,), 0.5), atol=0.005, rtol=0)
    # One tilted Gaussian: a transposed Cholesky factor would show in the covariance.
    c = torch.tensor([[[1.0, 0.8], [0.8, 2.0]]]).double()
    one = toy2d.Mixture(torch.ones(1).double(), torch.tensor([[3.0, -1.0]]).double(), c)
    monkeypatch.setattr(toy2d, "TREE", one)
    assert_close(toy2d.sample(200_000, rng()).T.cov().double(), c[0], atol=0.02, rtol=0)


# ------------------------------------------------------------------------------
# The exact flow.


def test_exact_velocity_of_one_gaussian() -> None:
    # For z ~ N(m, s^2): v = m + (t s^2 - (1 - t)) / (t^2 s^2 + (1 - t)^2) (x - t m).
    m, s = torch.tensor([[0.7, -1.2]]).double(), torch.tensor([[0.4, 2.0]]).double()
    x = torch.randn(50, 2, generator=rng()).double()
    for t in (0.0, 0.3, 0.95):
        slope = (t * s ** 2 - (1 - t)) / (t ** 2 * s ** 2 + (1 - t) ** 2)
        assert_close(toy2d.exact_velocity(x, t, m, s), m + slope * (x - t * m))
    # Its flow carries x_0 to m + s x_0; Euler's error is of first order.
    end = flow.euler(lambda *at: toy2d.exact_velocity(*at, m, s), x, 2000)
    assert_close(end, m + s * x, atol=1e-2, rtol=0)


def test_exact_velocity_against_quadrature() -> None:
    # Along the first axis two Gaussians, along the second one and the same, so that
    # the axes are independent.  E[z | z_t = x] is an integral over z of the prior
    # times N(x; t z, (1 - t)^2), and z - eps = (z - x) / (1 - t).
    mean = torch.tensor([[-1.0, 0.0], [1.5, 0.0]]).double()
    std = torch.tensor([[0.3, 1.0], [0.6, 1.0]]).double()
    z = torch.linspace(-8, 8, 40_001, dtype=torch.float64)
    prior = sum(torch.exp(-((z - m) / s) ** 2 / 2) / s for m, s in zip(mean[:, 0], std[:, 0]))
    x = torch.tensor([[-2.0, 0.4], [0.1, -1.0], [0.9, 0.0]]).double()
    for t in (0.0, 0.5, 0.95):
        weight = prior * torch.exp(-((x[:, :1] - t * z) / (1 - t)) ** 2 / 2)
        expected = ((weight @ z) / weight.sum(1) - x[:, 0]) / (1 - t)
        assert_close(toy2d.exact_velocity(x, t, mean, std)[:, 0], expected)


def test_samples_of_the_exact_flow_are_the_mixture_s() -> None:
    # Two of three posteriors are the same one, and so two thirds of the samples.
    mean = torch.tensor([[-1.0, 0.5], [-1.0, 0.5], [2.0, 0.5]]).double()
    std = torch.tensor([[0.2, 0.1], [0.2, 0.1], [0.4, 0.1]]).double()
    noise = torch.randn(20_000, 2, generator=rng()).double()
    z = flow.euler(lambda *at: toy2d.exact_velocity(*at, mean, std), noise, 200)
    right = z[:, 0] > 0.5
    assert_close(right.double().mean().item(), 1 / 3, atol=0.015, rtol=0)
    for part, k in ((z[~right], 0), (z[right], 2)):
        assert_close(part.mean(0), mean[k], atol=0.03, rtol=0)
        assert_close(part.std(0), std[k], atol=0, rtol=0.05)


def test_float32_is_enough_for_the_exact_flow() -> None:
    # Posteriors as thin as those of a weak KL term, and the steps of Eq. 31.
    mean, noise = (torch.randn(n, 2, generator=rng(n)) for n in (500, 300))
    std = torch.full_like(mean, 0.005)
    ends = [flow.euler(lambda *at: toy2d.exact_velocity(*at, mean, std), x, toy2d.STEPS)
            for x in (noise, noise.double())]
    assert ends[0].dtype == torch.float32
    assert toy2d.flow_error(ends[0].double(), ends[1]) < 1e-4


def test_flow_error() -> None:
    x, n = (torch.randn(100_000, 2, generator=rng(k)) for k in (0, 1))
    assert toy2d.flow_error(x, x) == 0
    # Normal errors have the median length that they are divided by.
    assert_close(toy2d.flow_error(x + 0.03 * n, x), 0.03, rtol=0.02, atol=0)
    # Two in a hundred samples on another branch change little.
    far = torch.where(torch.arange(len(x)) % 50 == 0, 2.0, 0.0)[:, None]
    assert_close(toy2d.flow_error(x + 0.03 * n + far, x), 0.03, rtol=0.05, atol=0)


def test_exact_velocity_against_monte_carlo() -> None:
    # E[z - eps | z_t = x]: draws of z weighed by the density of eps = (x - t z) / (1 - t).
    mean = torch.tensor([[-1.0, 0.0], [1.0, 0.5], [0.0, 2.0]]).double()
    std = torch.tensor([[0.2, 0.5], [0.4, 0.3], [1.0, 0.1]]).double()
    i = torch.randint(3, (400_000,), generator=rng())
    z = mean[i] + std[i] * torch.randn(len(i), 2, generator=rng(1)).double()
    x, t = torch.tensor([[0.3, 0.4], [-0.5, 1.0]]).double(), 0.6
    for point, v in zip(x, toy2d.exact_velocity(x, t, mean, std)):
        eps = (point - t * z) / (1 - t)
        weight = (-0.5 * eps.square().sum(1)).softmax(0)
        assert_close(v, weight @ (z - eps), atol=0.02, rtol=0)


# ------------------------------------------------------------------------------
# Objectives and training.


def test_objectives_are_the_paper_s_sums() -> None:
    x, eps, noise, t = next(toy2d.batches(0, "test", 8, 1, toy2d.CPU))
    for arm in (KL, VE):
        model = toy2d.Model(arm, 16)
        mean, logvar = model.encoder(x).chunk(2, 1)
        sigma2 = logvar.exp()
        z = mean + sigma2.sqrt() * eps
        rec = (model.decoder(z) - x).norm(dim=1).mean()
        prior = 0.5 * (mean ** 2 + sigma2 - logvar - 1).sum(1).mean()
        expansion = (1 / (sigma2 + 1e-6)).sum(1).mean()
        wall = torch.exp(z.abs() - 1).sum(1).mean()
        regular = 1e-3 * prior if arm is KL else 1e-2 * expansion + 1e-6 * wall
        assert_close(model.tokenizer_loss(x, eps), rec + regular)

        model.centre, model.spread = torch.tensor([1.0, 0.0]), torch.tensor([2.0, 3.0])
        z = (z - model.centre) / model.spread
        z_t = t[:, None] * z + (1 - t[:, None]) * noise
        v_hat = model.flow(torch.cat([z_t, t[:, None]], 1))
        expected = (v_hat - (z - noise)).square().sum(1).mean()   # Eq. 29
        assert_close(model.flow_loss(x, eps, noise, t), expected)


def test_learning_rate() -> None:
    # Under a constant gradient each step of Adam is as long as the learning rate.
    recipe = TINY | dict(tokenizer_steps=10, lr=0.1, lr_constant=2, cooldown=0.5)
    network = torch.nn.Linear(1, 1, bias=False)
    places = [network.weight.item()]
    toy2d.descend(toy2d.Model(KL, 4), "tokenizer", network,
                  lambda *_: network.weight.sum(), recipe,
                  lambda: places.append(network.weight.item()))
    expected = [0.1 * min(1, (10 - k) / 5) / math.sqrt(max(k / 2, 1)) for k in range(10)]
    assert_close([a - b for a, b in zip(places[:-1], places[1:])], expected,
                 rtol=1e-3, atol=0)


def test_arms_of_one_seed_see_the_same_data() -> None:
    def third(seed: int, stage: str) -> list[Tensor]:
        return list(toy2d.batches(seed, stage, 4, 5, toy2d.CPU))[2]

    first = third(0, "flow")
    assert [v.shape for v in first] == [(4, 2), (4, 2), (4, 2), (4,)]
    for again, other, elsewhere in zip(third(0, "flow"), third(1, "flow"), third(0, "x")):
        assert any(torch.equal(again, v) for v in first)
        assert not any(torch.equal(other, v) or torch.equal(elsewhere, v) for v in first)
    assert not torch.equal(first[1], first[2])


def test_the_compiled_losses_have_no_graph_break() -> None:
    # What CUDA runs as one graph, traced here and not compiled.
    batch = next(toy2d.batches(0, "test", 8, 1, toy2d.CPU))
    model = toy2d.Model(VE, 8)
    for loss in (model.tokenizer_loss, model.flow_loss):
        traced = torch.compile(loss, backend="eager", fullgraph=True)
        assert_close(traced(*batch), loss(*batch))


def test_paper_preset_is_supplement_c() -> None:
    paper = toy2d.PRESETS["paper"]
    assert (paper["width"], paper["lr"], paper["ema"], paper["cooldown"]) == (512, 1e-3, 0, 0)
    for stage in ("tokenizer", "flow"):
        assert (paper[f"{stage}_batch"], paper[f"{stage}_steps"]) == (4096, 200_000)
    linears = [m for m in toy2d.Model(VE, 4).decoder if isinstance(m, torch.nn.Linear)]
    assert len(linears) == 8
    assert (KL.weight, VE.weight, VE.lambda2) == (1e-3, 1e-2, 1e-6)


# ------------------------------------------------------------------------------
# Running.


@pytest.fixture(scope="module")
def smoke(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict]:
    out = tmp_path_factory.mktemp("toy")
    argv = ["--smoke", "--seeds", "3", "5", "--device", "cpu", "--out", str(out)]
    return out, toy2d.main(argv)


def arms(out: Path) -> dict[tuple[str, int], dict]:
    read = [torch.load(path, weights_only=True) for path in out.glob("arms/*.pt")]
    return {(arm["arm"]["name"], arm["arm"]["seed"]): arm for arm in read}


def test_smoke_writes_figures_and_numbers(smoke: tuple[Path, dict]) -> None:
    out, numbers = smoke
    assert {p.name for p in out.glob("*.*")} == {
        "toy2d_figure1.png", "toy2d_figure2.png", "toy2d_figure3.png", "toy2d.json"}
    assert json.loads((out / "toy2d.json").read_text())["arms"] == numbers
    trained = arms(out)
    assert len(trained) == 8
    for (name, seed), arm in trained.items():
        for key, value in arm["numbers"].items():
            assert numbers[name][key][[3, 5].index(seed)] == value


def test_numbers_follow_from_the_points(smoke: tuple[Path, dict]) -> None:
    arm = arms(smoke[0])["VE 1e-2", 5]
    points, numbers = arm["points"], arm["numbers"]
    model = toy2d.Model(VE, SMOKE["width"])
    model.load_state_dict(arm["model"])
    points["D(z)"] = model.decoder(points["z"]).detach()
    for key, name in (("sample", "invalid [%]"), ("exact", "invalid, exact flow [%]"),
                      ("D(z)", "invalid D(z) [%]")):
        outside = density(points[key]) < math.exp(toy2d.threshold())
        assert_close(numbers[name], 100 * outside.mean())
    error = (points["rec"] - points["x"]).norm(dim=1).mean().item()
    assert_close(numbers["error of D(mean)"], error)
    assert_close(numbers["spread"], points["z"].std(0).mean().item())


def test_deviation_is_that_of_a_sample(
        smoke: tuple[Path, dict], monkeypatch: pytest.MonkeyPatch,
        capsys: pytest.CaptureFixture) -> None:
    for name in ("draw", "draw_mechanism"):
        monkeypatch.setattr(toy2d, name, lambda *_: None)
    out, numbers = smoke
    toy2d.main(["--smoke", "--seeds", "3", "5", "--device", "cpu", "--out", str(out)])
    a, b = numbers["KL 1e-3"]["spread"]
    shown = f"{(a + b) / 2:.4g} ± {abs(a - b) / math.sqrt(2):.2g}"   # n - 1 = 1
    assert shown in capsys.readouterr().out


def test_valid_points() -> None:
    real = toy2d.sample(20_000, rng(5))
    assert 0.0002 < 1 - toy2d.is_valid(real).double().mean().item() < 0.002
    assert not toy2d.is_valid(torch.tensor([[9.0, 9.0], [math.nan, 0.0]])).any()


def test_an_arm_is_the_same_in_any_process(tmp_path: Path,
                                           monkeypatch: pytest.MonkeyPatch) -> None:
    here = toy2d.run([KL, VE], TINY, toy2d.CPU, tmp_path / "here")
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    there = toy2d.run([KL, VE], TINY, toy2d.CPU, tmp_path / "there")
    for a, b in zip(here, there):
        assert a["numbers"] == b["numbers"]
        assert all(torch.equal(v, b["model"][key]) for key, v in a["model"].items())


def test_only_missing_arms_are_trained(tmp_path: Path) -> None:
    two = [replace(KL, seed=1), replace(VE, seed=1)]
    first = toy2d.run(two, TINY, toy2d.CPU, tmp_path)
    path, = tmp_path.glob("VE*")
    path.unlink()
    kept = {p: p.stat().st_mtime_ns for p in tmp_path.glob("*.pt")}
    again = toy2d.run(two, TINY, toy2d.CPU, tmp_path)
    assert [a["numbers"] for a in again] == [a["numbers"] for a in first]
    assert {p: p.stat().st_mtime_ns for p in kept} == kept and path.exists()
    toy2d.run([replace(VE, seed=1, weight=1.0)], TINY, toy2d.CPU, tmp_path)
    assert len(list(tmp_path.glob("VE*"))) == 2   # other settings are another file


# ------------------------------------------------------------------------------
# What the user, the disk and the terminal may do to it.


def complaint(capsys: pytest.CaptureFixture, main: Callable, *flags: object) -> str:
    """The one line with which a command ends."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        main(["--smoke", *map(str, flags)])
    line, = capsys.readouterr().err.splitlines()
    assert stop.value.code == 2
    return line


@pytest.mark.parametrize("command", [toy2d, toy_sweep])
def test_wrong_flags_are_refused_before_the_training(
        command, tmp_path: Path, capsys: pytest.CaptureFixture,
        monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(toy2d, "run_arm", None)
    (tmp_path / "file").touch()
    for flags in (["--out", tmp_path / "file/x"],
                  ["--out", tmp_path / "out", "--json", tmp_path / "file/a.json"]):
        assert "file" in complaint(capsys, command.main, *flags)
    seed = "--seeds" if command is toy2d else "--seed"
    assert f"argument {seed}: -1 is not" in complaint(capsys, command.main, seed, "-1")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def damage(path: Path, other: Path, how: str) -> None:
    if how == "of another arm":
        shutil.copy(other, path)
    elif how == "a folder":
        path.unlink()
        path.mkdir()
    elif how in ("a list", "foreign"):
        torch.save([1] if how == "a list" else {"arm": torch.ones(2)}, path)
    else:
        kept = {"empty": 0, "truncated": 2000, "text": 0}[how]
        path.write_bytes(path.read_bytes()[:kept] + b"text" * (how == "text"))


@pytest.mark.parametrize("how", ["empty", "truncated", "text", "a list", "foreign",
                                 "of another arm", "a folder"])
def test_a_damaged_arm_is_named_before_the_training(
        how: str, tmp_path: Path, capsys: pytest.CaptureFixture,
        monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(toy2d, "SMOKE", TINY)
    toy2d.run([KL, VE], TINY, toy2d.CPU, tmp_path / "arms")
    ve, kl = sorted(tmp_path.glob("arms/*.pt"), reverse=True)
    damage(ve, kl, how)
    monkeypatch.setattr(toy2d, "run_arm", None)   # two arms are missing
    assert str(ve) in complaint(capsys, toy2d.main, "--device", "cpu", "--out", tmp_path)
    assert set(tmp_path.rglob("*")) == {ve.parent, ve, kl}


def full(*_, **__) -> None:
    raise OSError(28, "No space left on device")


@pytest.mark.parametrize("owner, name", [
    (torch, "save"), (toy2d.plt.Figure, "savefig"), (runtime.json, "dumps")])
def test_a_full_disk_is_one_line(
        owner, name: str, smoke: tuple[Path, dict], tmp_path: Path,
        capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    if name == "save":
        monkeypatch.setattr(toy2d, "SMOKE", TINY)
    else:
        shutil.copytree(smoke[0] / "arms", tmp_path / "arms")
    before = {*tmp_path.rglob("*"), tmp_path / "arms"}
    monkeypatch.setattr(owner, name, full)
    flags = "--seeds", "3", "5", "--device", "cpu", "--out", tmp_path
    assert "cannot be written (No space left" in complaint(capsys, toy2d.main, *flags)
    assert set(tmp_path.rglob("*")) - before <= {tmp_path / "toy2d.json"}


def in_a_fork(tmp_path: Path, action: Callable) -> int:
    """Begin this in a process, and a session, of its own; its stderr goes to a file."""
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            os.setsid()
            os.dup2(os.open(tmp_path / "stderr", os.O_CREAT | os.O_WRONLY), 2)
            runtime.sys.stderr = os.fdopen(2, "w")
            action()
            status = 0
        except SystemExit as stop:
            status = stop.code
        finally:
            os._exit(status)
    return pid


def wait_for(condition: Callable[[], bool], seconds: float) -> bool:
    end = time.monotonic() + seconds
    while not condition() and time.monotonic() < end:
        time.sleep(0.05)
    return condition()


def about(pid: int, fact: str) -> str:
    """A line of what Linux says of a process; a zombie has ended."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return "Z"
    return next(line.split()[1] for line in lines if line.startswith(fact))


def is_alive(pid: int) -> bool:
    return about(pid, "State:") != "Z"


def exit_status(pid: int, *others: int) -> int:
    """Of a process that ought to end now, and these others too; here all of them do."""
    everybody = pid, *others
    try:
        assert wait_for(lambda: not any(map(is_alive, everybody)), 30)
    finally:
        for process in filter(is_alive, everybody):
            os.kill(process, signal.SIGKILL)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


LONG = TINY | dict(tokenizer_steps=10**9)
needs_proc = pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="has no /proc")


def three_arms(folder: Path, event: Callable, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Prepare main to begin three endless arms in two processes, and then an event.

    Returns the file of the fourth arm, which is there already.  The ids of the
    processes will be in the file "pids".
    """
    monkeypatch.setattr(toy2d, "SMOKE", LONG)
    with monkeypatch.context() as untrained:
        untrained.setattr(toy2d, "train_tokenizer", lambda *_: None)
        untrained.setattr(toy2d, "train_flow", lambda *_: None)
        toy2d.run([KL], LONG, toy2d.CPU, folder / "arms")
    begun = runtime.as_completed

    def after_the_begin(arms: list) -> object:
        workers = runtime.multiprocessing.active_children()
        with runtime.atomic(folder / "pids") as temporary:
            temporary.write_text(" ".join(str(worker.pid) for worker in workers))
        event()
        return begun(arms)

    monkeypatch.setattr(runtime, "as_completed", after_the_begin)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    path, = folder.glob("arms/*.pt")
    return path


def begin(folder: Path) -> tuple[int, list[int]]:
    """The process of the command, and those of its arms."""
    pid = in_a_fork(folder, lambda: toy2d.main(
        ["--smoke", "--device", "cpu", "--out", str(folder)]))
    assert wait_for((folder / "pids").exists, 30)
    return pid, list(map(int, (folder / "pids").read_text().split()))


def signal_to_all(number: int) -> Callable:
    """As a terminal does it.  The processes import, and must not say so if it is Ctrl-C."""
    def event() -> None:
        for worker in runtime.multiprocessing.active_children():
            assert int(about(worker.pid, "SigBlk:"), 16) & 1 << signal.SIGINT - 1
        os.killpg(0, number)
    return event


@needs_proc
@pytest.mark.parametrize("event, status, said", [
    (signal_to_all(signal.SIGINT), 130, "stopped; the same command goes on"),
    (signal_to_all(signal.SIGTERM), 143, "stopped; the same command goes on"),
    (lambda: runtime.multiprocessing.active_children()[0].kill(), 2, "error: a process was")],
    ids=["SIGINT", "SIGTERM", "a killed process"])
def test_what_ends_it_ends_its_processes_and_is_one_line(
        event: Callable, status: int, said: str, tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch) -> None:
    path = three_arms(tmp_path, event, monkeypatch)
    kept = path.stat().st_mtime_ns
    pid, workers = begin(tmp_path)
    assert exit_status(pid, *workers) == status
    line, = (tmp_path / "stderr").read_text().splitlines()
    assert line.startswith(f"toy2d.py: {said}")
    assert len(workers) == 2
    assert set(tmp_path.rglob("*")) == {
        path.parent, path, tmp_path / "pids", tmp_path / "stderr"}
    assert path.stat().st_mtime_ns == kept


@needs_proc
@pytest.mark.parametrize("ready", [True, False])
def test_processes_end_when_the_command_is_killed(
        ready: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    three_arms(tmp_path, lambda: None, monkeypatch)
    pid, workers = begin(tmp_path)
    # They leave the session of the command when they are ready.
    begun = not ready or wait_for(lambda: all(os.getsid(w) == w for w in workers), 60)
    os.kill(pid, signal.SIGKILL)
    assert exit_status(pid, *workers) == -signal.SIGKILL and begun


# ------------------------------------------------------------------------------
# The sweep, and sigma's mechanism in Figure 4.


@pytest.mark.parametrize("squared", [True, False])
def test_equilibrium_minimises_the_objective(squared: bool) -> None:
    # Isotropic J = s I in two dimensions: T = 2 s^2, E|s sigma eps|^2 = 2 (s sigma)^2,
    # and |eps| is Rayleigh with mean sqrt(pi / 2).  Eq. 9 sums over both dimensions.
    sigma, s, weight = torch.logspace(-2, 1, 20_001).double(), 0.2, 1e-2
    rec = 2 * (s * sigma) ** 2 if squared else s * sigma * math.sqrt(math.pi / 2)
    best = sigma[(rec + weight * 2 / sigma ** 2).argmin()]
    t = torch.tensor(2 * s ** 2).double()
    found = toy_sweep.equilibrium(t, weight, squared)
    assert_close(found, best, rtol=1e-3, atol=0)
    slope = (toy_sweep.equilibrium(64 * t, weight, squared) / found).log() / math.log(64)
    assert_close(slope.item(), -1 / 4 if squared else -1 / 6)


def test_slope_of_figure_4_is_recovered() -> None:
    # A tokenizer whose sigma is 0.05 T^(-1/4) of its own decoder, exactly.
    model = toy2d.Model(VE, 32)
    mean = 3 * torch.randn(300, 2, generator=rng())
    jacobian = torch.autograd.functional.jacobian(
        lambda z: model.decoder(z).sum(0), mean)          # [2, 300, 2]
    t = jacobian.square().sum((0, 2))
    assert_close(toy_sweep.sensitivity(model.decoder, mean), t)
    std = (0.05 * t ** -0.25)[:, None].expand(300, 2)
    found = toy_sweep.mechanism({"arm": toy2d.asdict(VE), "model": model.state_dict(),
                                 "points": {"mean": mean, "std": std}})
    assert_close([found["slope"], found["correlation"]], [-0.25, -1.0], rtol=1e-3, atol=0)


def test_losses_of_the_sweep() -> None:
    x, eps, *_ = next(toy2d.batches(0, "test", 8, 1, toy2d.CPU))
    by_loss = {arm.loss: arm for arm in toy_sweep.sweep(0)}
    assert set(by_loss) == {"kl", "ve", "negative variance", "log-entropy", "fixed sigma"}
    for loss, arm in by_loss.items():
        model = toy_sweep.SweepModel(arm, 8)
        mean, logvar = losses.split_moments(model.encoder(x))
        z = mean + (logvar / 2).exp() * eps
        rec = (model.decoder(z) - x).norm(dim=1).mean()
        wall = 1e-6 * torch.exp(z.abs() - 1).sum(1).mean()
        if loss == "fixed sigma":
            assert_close(logvar.exp(), torch.full((8, 2), 0.15 ** 2))
            expected = rec + 0.015 * mean.square().sum(1).mean()
        elif loss == "negative variance":
            expected = rec + wall - 1e-3 * logvar.exp().sum(1).mean()
        elif loss == "log-entropy":
            expected = rec + wall - 1e-2 * logvar.sum(1).mean()
        else:
            expected = toy2d.Model(arm, 8).tokenizer_loss(x, eps)
        assert_close(model.tokenizer_loss(x, eps), expected)
    on_mean = toy_sweep.SweepModel(toy_sweep.sweep(0)[-1], 8)
    assert_close(on_mean.latent(x, eps), losses.split_moments(on_mean.encoder(x))[0])


def test_sweep_runs_every_arm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                              capsys: pytest.CaptureFixture) -> None:
    monkeypatch.setattr(toy2d, "SMOKE", TINY)
    report = toy_sweep.main(["--smoke", "--out", str(tmp_path)])
    names = [arm.name for arm in toy_sweep.sweep(0)]
    assert len(set(names)) == 16 and list(report["arms"]) == names
    assert len(list(tmp_path.glob("arms/*.pt"))) == 16
    printed = capsys.readouterr().out
    assert all(f"| {name} |" in printed for name in names)
    assert {p.name for p in tmp_path.glob("*.*")} == {
        "toy2d_figure4.png", "toy2d_figure5.png", "toy2d_sweep.json"}
    monkeypatch.setattr(toy2d.plt.Figure, "savefig", full)
    said = complaint(capsys, toy_sweep.main, "--out", tmp_path)
    assert "toy2d_figure4.png cannot be written (No space" in said
    assert len(list(tmp_path.iterdir())) == 4
