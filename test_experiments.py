"""The experiments: the table of arms, an arm end to end, what is not done twice, and the measurements.

The arms here run the real stages on the built-in shapes, in this process for speed; one runs as processes.
"""

import importlib
import json
import math
import subprocess
import threading
from pathlib import Path

import pytest
import torch
from torch.testing import assert_close

import experiments
import models
import runtime

STAGES = ("train_tokenizer", "train_dit", "evaluate", "sample", "evaluate", "experiments")
ARM = "VE 0.1 seed 0"


@pytest.fixture(autouse=True)
def one_thread(monkeypatch):
    torch.set_num_threads(1)


@pytest.fixture
def ran(monkeypatch) -> list[str]:
    """The stages that ran, in this process instead of one of their own."""
    names: list[str] = []

    def execute(stage: str, flags: list[str], held: int) -> str:
        names.append(stage)
        try:
            importlib.import_module(stage).main(flags)
        except SystemExit:
            return "it failed"
        return ""

    monkeypatch.setattr(experiments, "execute", execute)
    return names


def smoke(folder: Path, *flags: str) -> None:
    experiments.main(["--smoke", "--device", "cpu", "--jobs", "1", "--out", str(folder / "runs"), "--results",
                      str(folder / "results"), *flags])


def result(folder: Path, name: str = "ve-0.1-seed-0") -> dict:
    return json.loads((folder / "results" / "arms" / f"{name}.json").read_text())


def plan(arm: experiments.Arm, **recipe: object) -> experiments.Plan:
    return experiments.Plan(arm, experiments.RECIPE | recipe, "cifar10_subset", Path("runs"), "cpu")


# ------------------------------------------------------------------------------------------------------------
# The table.


def test_every_question_has_arms_and_no_two_arms_are_alike():
    arms = experiments.table_of_arms()
    assert {n for arm in arms for n in arm.questions} == set(experiments.QUESTIONS) == set(range(1, 10))
    assert len({arm.key for arm in arms}) == len(arms)
    assert len({experiments.result_path(Path(), arm) for arm in arms}) == len(arms)
    assert len({experiments.digest(plan(arm).settings()) for arm in arms}) == len(arms)
    for arm in arms:
        if {1, 2, 8} & set(arm.questions):
            assert sum(other.name == arm.name for other in arms) == 3, arm.name
    kl = [arm.tokenizer[-1] for arm in arms if arm.family == "KL" and 1 in arm.questions and arm.seed == 0]
    assert sorted(map(float, kl)) == [1e-6, 1e-4, 1e-2, 0.1, 0.5, 1, 2, 8]   # the paper's Table 2


def test_the_stages_take_every_arm_s_flags():
    """Each arm's commands parse, and mean what the arm says."""
    for arm in experiments.table_of_arms(1):
        for stage, flags, _ in plan(arm).stages([50, 250]):
            if stage != "experiments":
                args = importlib.import_module(stage).parse(flags)
            if stage == "train_tokenizer":
                assert (args.loss == "kl") == arm.family.startswith("KL") and args.steps == 1000
                assert args.loss != "ve" or args.lambda2 != 1e-6 or "lambda2" not in arm.name
            if stage == "train_dit":
                assert (args.optimizer == "adamw") == ("AdamW" in arm.name) and args.precision == "bf16"
                assert args.lr == (float(arm.name.split()[-1]) if 9 in arm.questions and arm.lr else 4e-3)
            if stage == "sample":
                assert args.steps in (50, 250) and args.guidance == 1 and args.count == 1000


def test_two_dits_share_one_tokenizer_and_a_setting_makes_another():
    arms = {arm.key: arm for arm in experiments.table_of_arms(1)}
    a, b = (plan(arms[key]) for key in (ARM, "VE Muon 1e-3 seed 0"))
    assert a.folder("tokenizer") == b.folder("tokenizer") and a.folder("dit") != b.folder("dit")
    c = plan(arms[ARM], dit_steps=3)
    assert c.folder("tokenizer") == a.folder("tokenizer") and c.folder("dit") != a.folder("dit")
    d = plan(arms[ARM], count=3)
    assert d.folder("dit") == a.folder("dit") and d.folder("scores") != a.folder("scores")
    elsewhere = experiments.replace(a, data="somewhere/else/cifar10_subset")
    assert elsewhere.settings() == a.settings()


# ------------------------------------------------------------------------------------------------------------
# One tiny arm.


def test_an_arm_end_to_end_then_nothing_then_only_what_changed(tmp_path, ran, monkeypatch, capsys):
    smoke(tmp_path)
    assert tuple(ran) == STAGES and len(list((tmp_path / "results").glob("question*"))) == 18
    monkeypatch.setattr(experiments, "draw", lambda results: None)   # which takes longer than the stages
    numbers = result(tmp_path)["numbers"]
    assert set(numbers["generation"]) == {"2"} and numbers["generation"]["2"]["fd"] > 0
    for key in ("sigma2", "psnr", "psnr_0.2", "rfd", "flow_loss", "equilibrium_slope", "trace_slope",
                "dit_tflop", "sampler_error", "tokenizer_seconds", "relative_noise"):
        assert math.isfinite(numbers[key]), key
    assert len(result(tmp_path)["commands"]) == len(STAGES)
    smoke(tmp_path)                              # done: not one stage
    assert tuple(ran) == STAGES
    ran.clear()
    smoke(tmp_path, "--euler", "2", "3")         # more steps: nothing is trained
    assert ran == ["sample", "evaluate"] and set(result(tmp_path)["numbers"]["generation"]) == {"2", "3"}
    ran.clear()
    smoke(tmp_path, "--count", "12")             # other samples: nothing is trained
    assert tuple(ran) == STAGES[2:]
    ran.clear()
    smoke(tmp_path, "--scale", "0.5")            # other trainings
    assert tuple(ran) == STAGES
    capsys.readouterr()
    smoke(tmp_path, "--scale", "0.5", "--list")
    listed = capsys.readouterr().out.splitlines()
    assert listed[1].startswith(ARM) and listed[1].endswith("yes") and len(listed) == 3


def test_a_killed_run_goes_on_where_it_was(tmp_path, ran, monkeypatch):
    execute = experiments.execute

    def killed(stage: str, flags: list[str], held: int) -> str:
        if stage == "train_dit":
            raise KeyboardInterrupt
        return execute(stage, flags, held)

    monkeypatch.setattr(experiments, "execute", killed)
    monkeypatch.setattr(experiments, "draw", lambda results: None)
    with pytest.raises(KeyboardInterrupt):
        smoke(tmp_path)
    assert ran == ["train_tokenizer"] and not (tmp_path / "results").exists()
    checkpoint, = (tmp_path / "runs" / "tokenizer").glob("*/checkpoint.pt")
    before = checkpoint.stat().st_mtime_ns
    monkeypatch.setattr(experiments, "execute", execute)
    ran.clear()
    smoke(tmp_path)
    assert tuple(ran) == STAGES[1:] and checkpoint.stat().st_mtime_ns == before


def test_a_failed_stage_stops_its_arm_and_no_other(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(experiments, "execute", lambda _, flags, held: "its last words" * ("kl" in flags))
    monkeypatch.setattr(experiments, "collect", lambda plan, euler: {"settings_hash": plan.arm.name})
    arms = [arm for arm in experiments.table_of_arms(1) if arm.name in ("KL 1e-4", "VE 0.3", "VE tau 2")]
    plans = [experiments.replace(plan(arm), out=tmp_path / "runs") for arm in arms]
    monkeypatch.setattr(Path, "touch", lambda self: None)
    failures = experiments.run_all(plans, tmp_path, [2], jobs=2)
    assert failures == {"KL 1e-4 seed 0": "train_tokenizer: its last words"}
    assert sorted(p.stem for p in (tmp_path / "arms").glob("*.json")) == ["ve-0.3-seed-0", "ve-tau-2-seed-0"]
    assert "KL 1e-4 seed 0 stopped: train_tokenizer: its last words" in capsys.readouterr().err


def test_a_stage_is_a_process_of_one_thread_whose_last_line_is_kept(tmp_path, monkeypatch):
    monkeypatch.setattr(experiments, "HERE", tmp_path)
    (tmp_path / "stage.py").write_text("import os, sys\nprint('a bar 1 %\\r 99 %\\rits last words', "
                                       "os.environ['OMP_NUM_THREADS'], file=sys.stderr)\n"
                                       "os.fstat(int(sys.argv[2]))\nsys.exit(int(sys.argv[1]))")
    with (tmp_path / "lock").open("w") as held:
        fd = held.fileno()
        assert experiments.execute("stage", ["0", str(fd)], fd) == ""
        assert experiments.execute("stage", ["2", str(fd)], fd) == "its last words 1"


def test_a_stage_that_outlived_its_run_is_waited_for(tmp_path):
    """The stage holds the lock after the run that took it is gone; the next run starts when it has ended."""
    with experiments.lock(tmp_path / "locks" / "a.lock", print) as held:
        stage = subprocess.Popen(["sleep", "60"], pass_fds=[held])
    said, taken = [], threading.Event()

    def another_run() -> None:
        with experiments.lock(tmp_path / "locks" / "a.lock", said.append):
            taken.set()

    thread = threading.Thread(target=another_run)
    thread.start()
    early = taken.wait(1.5)
    stage.kill()
    stage.wait()
    thread.join(20)
    assert not early and taken.is_set() and said == ["a: waiting for a stage of another or a killed run"]


# ------------------------------------------------------------------------------------------------------------
# Tables and figures from files that no stage has written.


def write_arms(folder: Path, values: dict[str, dict]) -> None:
    (folder / "arms").mkdir(parents=True)
    for arm in experiments.table_of_arms():
        if arm.key in values:
            numbers = {"generation": {"50": {"fd": values[arm.key].pop("fd")}}} | values[arm.key]
            run = {"arm": arm.name, "seed": arm.seed, "numbers": numbers, "recipe": experiments.RECIPE,
                   "features": "Test", "hardware": "none", "date": "today", "versions": {"torch": "2"},
                   "curves": {}}
            experiments.result_path(folder, arm).write_text(json.dumps(run))


def test_tables_and_figures_are_drawn_from_the_json_alone(tmp_path):
    write_arms(tmp_path, {"KL 1e-6 seed 0": dict(fd=400.0, psnr=30.0, sigma2=1e-6, flow_loss=0.8),
                          "KL 1e-2 seed 0": dict(fd=380.0, psnr=29.0, sigma2=1e-2, flow_loss=0.9),
                          "KL 1e-2 seed 1": dict(fd=384.0, psnr=29.0, sigma2=1e-2, flow_loss=0.9),
                          "VE 0.1 seed 0": dict(fd=300.0, psnr=23.0, sigma2=10.0, flow_loss=1.1),
                          "VE 0.01 seed 0": dict(fd=340.0, psnr=27.0, sigma2=0.1, flow_loss=1.1),
                          "log-entropy 0.03 seed 0": dict(fd=350.0, psnr=28.0, sigma2=10**-0.5),
                          "negative variance 0.01 seed 0": dict(fd=330.0, psnr=26.0, sigma2=50.0)})
    experiments.main(["--draw", "--results", str(tmp_path)])
    tables = {n: (tmp_path / f"question{n}.md").read_text() for n in experiments.QUESTIONS}
    assert all((tmp_path / f"question{n}.png").stat().st_size > 5000 for n in tables)
    # mean 382, deviation sqrt((2^2 + 2^2) / 1) = 2.83
    assert "| KL 1e-2 | 2 | 0.01 ± 0 | 29 ± 0 | 0.9 ± 0 | 382 ± 2.8 |" in tables[1]
    # on seed 0, which both ran: 300 / 380 - 1 = -21.1 %
    assert "* best of VE: VE 0.1, FD 300 (n = 1), -21.1 % against KL 1e-2, 1 seed" in tables[1]
    assert "Not run: VE 0.001, VE 0.0001, KL 1e-4, KL 0.1, KL 0.5, KL 1, KL 2, KL 8." in tables[1]
    # 10^-0.5 is a quarter of the way from 0.1 to 10 in the logarithm: 340 - 40 / 4 and 27 - 4 / 4
    negative, log_entropy = tables[4].split("\n* at sigma² ")[1:]
    assert log_entropy.startswith("0.316: log-entropy 0.03 FD 350, PSNR 28 dB; between VE 0.01 and VE 0.1 "
                                  "FD 330, PSNR 26 dB")
    assert negative == "50: negative variance 0.01 FD 330, PSNR 26 dB; no two arms of VE enclose it"
    assert "**" not in tables[1]


def rows_of(**distances: list[float]) -> dict[str, dict]:
    return {name: {"name": name, "runs": [{"seed": seed, "numbers": {"generation": {"50": {"fd": fd}}}}
                                          for seed, fd in enumerate(fds)]} for name, fds in distances.items()}


def test_arms_are_compared_seed_by_seed():
    """50 / 100 and 120 / 200: -50 and -40 %, mean -45, deviation 7.1; the ratio of the means is -43 %."""
    rows = rows_of(a=[50.0, 120.0], b=[100.0, 200.0, 7.0], c=[])
    assert experiments.against(rows["a"], rows["b"]) == ", -45.0 ± 7.1 % against b, 2 seeds"
    assert experiments.against(rows["b"], rows["b"]) == "" == experiments.against(rows["c"], rows["b"])


def test_optimisers_are_compared_on_their_own_tokenizer(tmp_path):
    write_arms(tmp_path, {"KL 1e-6 seed 0": dict(fd=200.0), "VE 0.1 seed 0": dict(fd=100.0),
                          "VE AdamW 1e-3 seed 0": dict(fd=110.0), "KL Muon 1e-3 seed 0": dict(fd=190.0)})
    experiments.main(["--draw", "--results", str(tmp_path)])
    table = (tmp_path / "question9.md").read_text()
    assert "* VE AdamW 1e-3: FD 110, +10.0 % against VE 0.1, 1 seed" in table
    assert "* KL Muon 1e-3: FD 190, -5.0 % against KL 1e-6, 1 seed" in table


def test_arms_of_different_sizes_are_called_incomparable(tmp_path):
    write_arms(tmp_path, {"KL 1e-6 seed 0": dict(fd=4.0, psnr=3.0, sigma2=1.0), ARM: dict(
        fd=3.0, psnr=2.0, sigma2=1.0)})
    path = tmp_path / "arms" / "ve-0.1-seed-0.json"
    run = json.loads(path.read_text())
    path.write_text(json.dumps(run | {"recipe": run["recipe"] | {"dit_steps": 9}}))
    experiments.main(["--draw", "--results", str(tmp_path)])
    assert "**Arms of different sizes: not comparable.**" in (tmp_path / "question1.md").read_text()


def test_what_goes_with_distance_is_ranked():
    rows = [dict(flow_loss=(f, 0), rfd=(-f, 0), fd=(d, 0), psnr=(30, 0), sampler_over_sigma=(s, 0))
            | {"psnr_0.5": (p, 0)} for f, d, p, s in ((1, 10, 20, 9), (2, 20, 22, 1), (5, 90, 21, 2))]
    found = "\n".join(experiments.explanations(rows))
    # ranks of FD 0 1 2; flow loss 0 1 2; PSNR lost 10 8 9: 2 0 1; error 9 1 2: 2 0 1
    assert "flow loss: 1.00 (3 arms)" in found and "reconstruction FD: -1.00" in found
    assert "costs: -0.50" in found and "sigma: -0.50" in found
    assert experiments.explanations(rows[:2]) == []


# ------------------------------------------------------------------------------------------------------------
# The measurements, on decoders whose answer is known.


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_hutchinson_of_a_linear_decoder():
    """decode(z) = A z: T_i = sum_k A_ki^2, exactly for one probe where each row of A has one element."""
    a = torch.randn(2, 3, 4, 4, generator=generator())
    assert_close(experiments.hutchinson(lambda z: a * z, torch.zeros_like(a), 1, generator(1)), a.square())
    matrix = torch.randn(40, 6, generator=generator())
    found = experiments.hutchinson(lambda z: z @ matrix.T, torch.zeros(1, 6), 4000, generator(1))
    assert_close(found[0], matrix.square().sum(0), rtol=0.1, atol=0)


def test_slope_of_the_real_loss_and_its_equilibrium_on_a_linear_decoder():
    """x_hat = a z, |x_hat - x| with residual r: E|r + a sigma eps|, whose derivative by sigma^2 is a^2 times
    the density of the error at 0, phi(r / (a sigma)) a / sigma.  At r = 0 Eq. 14's lambda1 = T sigma^4 gives
    sigma = (lambda1 sqrt(2 pi) / a)^(1/3): slope -1/4 on T, -1/6 on Eq. 7's a^2.
    """
    a = torch.logspace(-1, 1, 256).expand(40, 256).reshape(40, 1, 16, 16)
    std = (0.1 * math.sqrt(2 * math.pi) / a) ** (1 / 3)
    for residual in (0.7, 0.0):
        x, r = torch.zeros_like(a), residual * a * std
        slope = experiments.loss_slope(lambda z, r=r: a * z + r, x, 0 * a, std, 200, generator())
        expected = a / std * math.exp(-residual ** 2 / 2) / math.sqrt(2 * math.pi)
        assert_close(slope.mean(0), expected[0], rtol=0.06, atol=0)
    found = experiments.equilibrium(std.flatten(), slope.flatten(), a.square().flatten(), 0.1)
    assert_close(found["equilibrium_slope"], -0.25, rtol=0.02, atol=0)
    assert_close(found["equilibrium_ratio"], 1.0, rtol=0.02, atol=0)
    assert_close(found["trace_slope"], -1 / 6, rtol=1e-4, atol=0)
    assert_close(found["trace_correlation"], -1.0, rtol=1e-4, atol=0)
    assert found["scatter"] < 1e-3 and len(found["points"]["log_t"]) == 500
    twice = experiments.equilibrium(std.flatten() * 2, slope.flatten(), a.square().flatten(), 0.1)
    assert_close(twice["equilibrium_ratio"], 16 * found["equilibrium_ratio"], rtol=1e-3, atol=0)


def test_perturbation_is_measured_in_the_posterior_s_sigma():
    fine = torch.randn(50, 2, 4, 4, generator=generator())
    error = torch.randn(fine.shape, generator=generator(1)) * torch.tensor([0.1, 0.3])[:, None, None]
    found = experiments.perturbation(fine + error, fine, torch.tensor([0.1, 0.1]))
    rms = math.sqrt((0.01 + 0.09) / 2)
    assert_close(found["sampler_error"], rms, rtol=0.05, atol=0)
    assert_close(found["sampler_over_sigma"], rms / 0.1, rtol=0.05, atol=0)
    # N(0, 1) is outside one deviation with probability 0.3173, N(0, 3) with 0.7389
    assert_close(found["sampler_outside"], (0.3173 + 0.7389) / 2, rtol=0.05, atol=0)


def test_measuring_a_dit_whose_flow_is_known(tmp_path, monkeypatch):
    """v = -x integrates to x (1 - 1/N)^N: the error against 8 N steps is the difference of both factors."""
    import train_dit
    import train_tokenizer
    train_tokenizer.main(["--smoke", "--device", "cpu", "--out", str(tmp_path / "t")])
    train_dit.main(["--smoke", "--device", "cpu", "--tokenizer", str(tmp_path / "t/checkpoint.pt"), "--out",
                    str(tmp_path / "d")])
    monkeypatch.setattr(models.DiT, "forward", lambda self, x, t, y: -x)
    experiments.main(["--measure", str(tmp_path / "d/checkpoint.pt"), str(tmp_path / "m.json"), "--count",
                      "4", "--euler", "5", "--device", "cpu"])
    found = json.loads((tmp_path / "m.json").read_text())
    draws = runtime.generator(0, "measure")
    for _ in range(32):
        torch.randn(4, 8, 8, 8, generator=draws)
    for _ in range(16):
        torch.randint(0, 2, (4, 3, 32, 32), generator=draws)
    noise = torch.randn(4, 8, 8, 8, generator=draws)
    factor = abs((1 - 1 / 5) ** 5 - (1 - 1 / 40) ** 40)
    assert_close(found["sampler_error"], factor * noise.square().mean().sqrt().item(), rtol=1e-4, atol=0)


def test_muon_s_arithmetic_is_counted(monkeypatch):
    """5 iterations of 4 A^2 B + 2 A^3 on the parts [A, B] of each block's matrices, A <= B."""
    dit = models.build_dit(models.DITS["demo"])
    tokenizer = models.build_autoencoder(models.AUTOENCODERS["vit-demo"])
    monkeypatch.setattr(models, "load_dit", lambda path: (dit, {"latent_shape": [8, 8, 8]}))
    monkeypatch.setattr(models, "load_autoencoder", lambda path: (tokenizer, {}))
    arms = {arm.key: arm for arm in experiments.table_of_arms(1)}
    muon, adamw = (experiments.arithmetic(plan(arms[key])) for key in (ARM, "VE AdamW 1e-3 seed 0"))
    # width 128, 6 blocks: qkv 3 and proj 1 of 128 x 128; SwiGLU w12 2 and w3 1 of 341 x 128
    step = 6 * 5 * (4 * (4 * 128**3 + 2 * 128**3) + 3 * (4 * 128**2 * 341 + 2 * 128**3))
    assert_close(muon["dit_tflop"] - adamw["dit_tflop"], 600 * step / 1e12, rtol=1e-6, atol=0)
    assert muon["tokenizer_tflop"] == adamw["tokenizer_tflop"]
    linear = sum(p.numel() for name, p in dit.named_parameters() if p.ndim == 2 and "blocks" in name
                 and "adaLN" not in name)
    assert adamw["dit_tflop"] > 6 * linear * 64 * 32 * 600 / 1e12   # and attention, and the rest


# ------------------------------------------------------------------------------------------------------------
# Bad input.


@pytest.mark.parametrize("flags, message", [
    (["--only", "VE 7"], "--only VE 7: no arm or question"),
    (["--data", "no/such/folder"], "--data no/such/folder: no folder with train/"),
    (["--scale", "0"], "--scale must be positive"),
    (["--jobs", "0"], "--jobs must be positive"),
    (["--euler", "0"], "--euler takes numbers of steps"),
    (["--draw"], "holds no results"),
    (["--measure", "no/such/file.pt", "out.json"], "no/such/file.pt is not a file"),
])
def test_bad_input_is_one_line_and_exit_2(tmp_path, monkeypatch, capsys, flags, message):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stop:
        experiments.main(flags)
    error = capsys.readouterr().err.strip().splitlines()
    assert stop.value.code == 2 and len(error) == 1 and message in error[0]
    assert not list(tmp_path.iterdir())
