"""The experiments: the arms, what a look measures, one arm end to end, and the answers.

The stages run in this process here, because starting Python takes longer.
"""

import importlib
import json
import math
import os
import shlex
import signal
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import runtime
import scipy.stats
import torch
from PIL import Image
from torch.testing import assert_close

import checkpoints
import toy2d
import train_dit
import train_tokenizer
from runtime import InputError
from studies import answers, experiments, train_judge

STAGES = ["train_tokenizer", "train_dit", "train_dit", "sample", "evaluate", "evaluate"]
CASES = [(rung, arm) for rung in experiments.RUNGS
         for arm in experiments.table_of_arms(rung, [1, 2, 3, 0])]


def plan(arm: experiments.Arm = CASES[2][1], rung: str = "shapes", **recipe) -> experiments.Plan:
    return experiments.Plan(arm, experiments.RUNGS[rung] | recipe, "pictures", Path("runs"), "cpu")


def split(command: str) -> tuple[str, list[str]]:
    """The module and the flags of a command."""
    first, *flags = shlex.split(command)
    return first[:-3], flags


# ------------------------------------------------------------------------------
# The arms.


def test_the_arms_that_are_asked_for():
    keys = {rung: [arm.key for other, arm in CASES if other == rung]
            for rung in experiments.RUNGS}
    assert all(len(set(found)) == len(found) for found in keys.values())
    assert len(keys["photographs"]) == 3 * 6 and len(keys["shapes"]) == 3 * 10 + 5
    families = [key.split()[0] for key in keys["shapes"][:9]]
    assert [families.count(family) for family in ("KL", "VE", "sigma-VAE")] == [2, 4, 3]
    assert sum(key.endswith("seed 0") for key in keys["shapes"]) == 5
    assert len({plan(arm, rung).folder("scores") for rung, arm in CASES}) == len(CASES)


def test_the_stages_take_the_flags_of_every_arm(monkeypatch):
    monkeypatch.setattr(runtime, "regular", Path)   # their files are not there yet
    for rung, arm in CASES:
        steps, parsed = [], {}
        for command, _ in plan(arm, rung).stages():
            module, flags = split(command)
            parsed[module] = importlib.import_module(module).parse(flags)
            steps += [parsed[module].steps] if module == "train_dit" else []
        unit = plan(arm, rung).recipe["dit_steps"]
        assert steps == [unit, 2 * unit, 4 * unit, 8 * unit, 16 * unit, 32 * unit]
        tokenizer, dit = parsed["train_tokenizer"], parsed["train_dit"]
        assert (tokenizer.loss == "kl") == (arm.family == "KL")
        assert tokenizer.cooldown > 0   # so that it ends flat
        if rung == "shapes":   # three times as long as its preset
            demo = train_tokenizer.PRESETS["demo"]
            assert (tokenizer.steps, tokenizer.batch) == (3 * demo["steps"], demo["batch"])
        # A training that goes on has to have the rate that it would have had.
        assert dit.cooldown == 0 and "steps" in train_dit.FREE
        # So long a memory that its average is of the last tenth of any of these trainings.
        assert dit.ema > (1 + 32 * unit) / (10 + 32 * unit)
        assert dit.ema == 0.9999 and dit.ramp
        assert dit.model == ("shapes" if rung == "shapes" else "demo/2")
        assert parsed["sample"].count == parsed["evaluate"].limit == 2000


def test_equal_tokenizers_are_one_folder_and_changed_settings_another():
    a, longer, finer = plan(), plan(dit_steps=3), plan(euler=250)
    assert a.folder("tokenizer") != plan(replace(a.arm, seed=7)).folder("tokenizer")
    assert longer.folder("tokenizer") == a.folder("tokenizer")
    assert longer.folder("dit") != a.folder("dit") == finer.folder("dit")
    assert finer.folder("scores") != a.folder("scores")
    assert plan(trainings=(1, 64)).folder("dit") == a.folder("dit")
    assert replace(a, data="else/where/pictures").settings() == a.settings()


def test_trainings_may_be_compiled_and_nothing_else():
    fast = replace(plan(), training=" --compile")
    compiled = [command.split()[0] for command, _ in fast.stages() if " --compile" in command]
    assert compiled == ["train_tokenizer.py"] + 6 * ["train_dit.py"]
    assert fast.settings() == plan().settings()


def test_folders_may_have_spaces_in_their_names():
    spaced = replace(plan(), data="my pictures", out=Path("my runs"))
    for command, done in spaced.stages():
        _, flags = split(command)
        assert Path(flags[flags.index("--out") + 1]).is_relative_to("my runs")
        assert done.is_relative_to("my runs")
        if "--data" in flags:   # the last one counts
            assert flags[::-1][flags[::-1].index("--data") - 1] == "my pictures"


# ------------------------------------------------------------------------------
# One tiny arm.


def smoke(folder: Path, *flags: str) -> None:
    experiments.main(["--smoke", "--device", "cpu", "--out", f"{folder}/runs",
                      "--results", f"{folder}/results", *flags])


def test_an_arm_runs_once_and_goes_on_where_it_was_killed(tmp_path, monkeypatch, capsys):
    ran, looks = [], []

    def execute(command: str) -> str:
        module, flags = split(command)
        if not ran:   # the folder belongs to this command
            assert {path.parent for path in runtime.locks} == {tmp_path / "runs"}
        if module == "sample" and ran.count("sample") == 0:
            ran.append(module)
            return "killed"
        ran.append(module)
        importlib.import_module(module).main(flags)
        return ""

    def look(self, *ends):
        looks.append(ends)
        if len(looks) == 2:
            raise InputError("killed")
        return measured(self, *ends)

    measured = experiments.Bench.look
    monkeypatch.setattr(experiments, "execute", execute)
    monkeypatch.setattr(experiments.Bench, "look", look)
    with pytest.raises(SystemExit):
        smoke(tmp_path)
    assert "VE 1e-3 seed 1, sample.py: killed" in capsys.readouterr().err
    assert ran == STAGES[:4] and not any((tmp_path / "results/shapes").iterdir())
    # The power fails: what is empty is not done.
    trained, = tmp_path.glob("runs/tokenizer/*/trained")
    trained.write_text("")
    with pytest.raises(SystemExit):
        smoke(tmp_path)   # killed again, between two looks
    assert ran == STAGES[:4] + STAGES[:1] + STAGES[3:] and trained.stat().st_size > 0
    smoke(tmp_path)
    assert len(looks) == 3 and len(ran) == 8
    arm = tmp_path / "results/shapes/arms/ve-1e-3-seed-1.json"
    found = json.loads(arm.read_text())
    assert found["numbers"].keys() >= {"psnr", "rfd", "fd", "kd", "recognised", "sigma2"}
    assert [row["training"] for row in found["rows"]] == [1, 2]
    assert [row["starts"]["0.7"]["e"] > 0 for row in found["rows"]] == [True, False]
    assert [point["e"] for point in found["real"]["curve"]] == [*experiments.LEVELS]
    assert [step for step, _ in found["tokenizer"]] == [2, 4]
    assert all(row["starts"].keys() == {"0.7"} for row in found["rows"])
    assert {path.name for path in arm.parents[1].iterdir()} == {"arms", "law.md", "law.png"}
    smoke(tmp_path)   # it is done
    assert len(looks) == 3 and len(ran) == 8

    # What was looked at last is the end of a training that was never stopped.
    copy, = tmp_path.glob("runs/dit/*/8.pt")
    command = next(c for c, done in made_by(tmp_path).stages() if done.name == "8.pt")
    train_dit.main([*split(command)[1], "--out", f"{tmp_path}/whole"])
    whole = checkpoints.read(tmp_path / "whole/checkpoint.pt", "dit")
    kept = checkpoints.read(copy, "dit")
    assert kept["optimizers"] == [] and kept["step"] == whole["step"] == 8
    assert all(torch.equal(a, b) for a, b in zip(kept["ema"].values(), whole["ema"].values()))
    # A copy that is lost cannot be made from a training that went on.
    (copy.parent / "4.pt").unlink()
    arm.unlink()
    capsys.readouterr()
    with pytest.raises(SystemExit):
        smoke(tmp_path)
    assert "has gone on to 8 steps" in capsys.readouterr().err
    checkpoints.save(kept, copy.parent / "4.pt")
    scores, = tmp_path.glob("runs/scores/*/samples/results.json")
    row, = scores.parents[1].glob("look-2.json")
    for path, text, said in (
            (scores, '[{"metrics": {}}]', "is damaged or not of this arm (KeyError('protocol"),
            (scores, "[{", "results.json is damaged"), (row, "{", "look-2.json is damaged"),
            (arm, "[]", "ve-1e-3-seed-1.json is damaged")):
        before = path.read_text() if path.exists() else ""
        path.write_text(text)
        with pytest.raises(SystemExit) as stop:
            smoke(tmp_path)
        assert stop.value.code == 2 and said in capsys.readouterr().err.splitlines()[-1]
        path.write_text(before)
    smoke(tmp_path)
    again = json.loads(arm.read_text())
    assert len(looks) == 3 and again["rows"] == found["rows"]
    capsys.readouterr()
    smoke(tmp_path, "--list")
    assert capsys.readouterr().out.split()[-1] == "done"
    smoke(tmp_path, "--seeds", "2", "--list")
    assert "done" not in capsys.readouterr().out


def test_an_arm_that_fails_does_not_stop_the_others(tmp_path, monkeypatch, capsys):
    tried = []

    def run_arm(plan, results, say):
        tried.append(plan.arm.seed)
        if plan.arm.seed < 3:
            raise InputError(f"seed {plan.arm.seed} has failed")

    monkeypatch.setattr(experiments, "run_arm", run_arm)
    with pytest.raises(SystemExit) as stop:
        smoke(tmp_path, "--seeds", "1", "2", "3")
    told = capsys.readouterr()
    assert stop.value.code == 2 and tried == [1, 2, 3]
    assert "seed 1 has failed" in told.out
    assert told.err.splitlines()[-1].endswith("seed 2 has failed")


def made_by(folder: Path) -> experiments.Plan:
    """The plan of the smoke run."""
    recipe = experiments.RUNGS["shapes"] | experiments.SMOKE | dict(trainings=(1, 2))
    arm = next(arm for _, arm in CASES if arm.key == "VE 1e-3 seed 1")
    return experiments.Plan(arm, recipe, "shapes", folder / "runs", "cpu")


def test_a_failed_stage_gives_its_last_line(tmp_path, monkeypatch):
    stage = tmp_path / "stage.py"
    stage.write_text("import os, sys\nprint('1 %\\r9 %\\rlast words', "
                     "os.environ['OMP_NUM_THREADS'], file=sys.stderr)\n"
                     "sys.exit(int(sys.argv[1]))")
    assert experiments.execute(f"{stage} 0") == ""
    assert experiments.execute(f"{stage} 2") == "last words 1"
    stage.write_text("import os; os.kill(os.getpid(), 9)")
    assert experiments.execute(str(stage)) == "killed by signal 9"


SAVES = """
import pathlib, signal, sys, time
def save(*_):
    pathlib.Path("saved").touch()
    sys.exit()
signal.signal(signal.SIGTERM, save)
"""
ENDS = """
import pathlib, runtime, time
runtime.start("cpu")
"""
READY = """
pathlib.Path("ready").write_text(str(__import__("os").getpid()))
time.sleep(100)
"""


def wait_for(condition) -> bool:
    for _ in range(600):
        if condition():
            return True
        time.sleep(0.05)
    return False


def is_alive(pid: int) -> bool:
    """Nobody may have waited for it, and then it is a zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().split()[2] != "Z"
    except OSError:
        return False


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="has no /proc")
@pytest.mark.parametrize("number, stage", [
    (signal.SIGINT, SAVES), (signal.SIGTERM, SAVES), (signal.SIGKILL, ENDS)],
    ids=["SIGINT", "SIGTERM", "SIGKILL"])
def test_a_stage_ends_with_the_command(tmp_path, monkeypatch, number, stage):
    monkeypatch.setenv("PYTHONPATH", str(Path.cwd()))
    monkeypatch.chdir(tmp_path)
    Path("stage.py").write_text(stage + READY)
    command = os.fork()
    if command == 0:
        try:
            os.dup2(os.open("stderr", os.O_CREAT | os.O_WRONLY), 2)
            runtime.sys.stderr = os.fdopen(2, "w")
            runtime.command(experiments.execute)("stage.py")
        except SystemExit as stop:
            os._exit(stop.code)
        finally:
            os._exit(1)
    assert wait_for(lambda: Path("ready").exists() and Path("ready").read_text())
    os.kill(command, number)
    status = os.waitstatus_to_exitcode(os.waitpid(command, 0)[1])
    assert wait_for(lambda: not is_alive(int(Path("ready").read_text())))
    if number == signal.SIGKILL:
        assert status == -9
    else:
        assert status == 128 + number and Path("saved").exists()
        assert Path("stderr").read_text() == (
            "records.py: stopped; the same command goes on\n")


# ------------------------------------------------------------------------------
# What a look measures, in cases that can be worked out.


def test_e_is_that_of_the_toy():
    """Normal errors of deviation 0.3 have e = 0.3, in any number of dimensions."""
    g = runtime.generator(0, "errors")
    for shape in ((20_000, 2), (2_000, 4, 8, 8)):
        errors = 0.3 * torch.randn(shape, generator=g)
        assert_close(experiments.size(errors), 0.3, rtol=0.02, atol=0)
        if len(shape) == 2:
            assert_close(experiments.size(errors),
                         toy2d.flow_error(errors, torch.zeros_like(errors)))


def test_carry_takes_steps_of_the_same_length_from_any_time():
    times = []

    def velocity(x, t):
        times.append(t)
        return 2 * t * torch.ones_like(x)   # x = t^2

    end = experiments.carry(velocity, torch.full((1,), 0.25), 0.5, 10)
    assert_close(times, [0.5, 0.6, 0.7, 0.8, 0.9])
    assert_close(end, torch.tensor([0.25 + 0.2 * 3.5]))   # Euler: 0.1 * 2 * 3.5
    assert experiments.carry(velocity, end, 0.99, 10).shape == end.shape


def test_injected_noise_has_the_errors_covariance():
    g = runtime.generator(0, "covariance")
    errors = torch.randn(500, 2, 4, 4, generator=g)
    errors[:, 1] = 1 + 0.5 * errors[:, 0]
    noise = experiments.normal_like(errors, g)
    a, b = ((x.movedim(1, -1).flatten(0, -2).T @ x.movedim(1, -1).flatten(0, -2)) / 8000
            for x in (errors, noise))
    assert_close(a, b, rtol=0.05, atol=0.02)
    assert_close(noise.mean(), torch.tensor(0.0), rtol=0, atol=0.02)
    assert experiments.normal_like(torch.zeros_like(errors), g).abs().max() == 0


def test_distance_to_the_nearest_posterior():
    # From (0.2, 0.5) to N(0, diag(0.1, 0.5)^2) it is |(2, 1)| / sqrt 2, as toy_law has it but
    # for the mean over axes, and to a posterior of deviation 0.01 that is 0.5 away it is 35.
    mean, std = torch.tensor([[0.0, 0.0], [0.2, 1.0]]), torch.tensor([[0.1, 0.5], [0.01, 0.01]])
    found = experiments.distance_in_sigmas(torch.tensor([[0.2, 0.5]]), mean, std)
    assert_close(found, math.sqrt(5 / 2))
    assert_close(experiments.distance_in_sigmas(mean[1:], mean, std), 0.0, atol=1e-5, rtol=0)


class Oracle(experiments.Bench):
    """A tokenizer whose latent is the picture, twice as large; and 60 grey pictures."""

    def __init__(self, n: int = 60) -> None:
        self.seed, self.centre, self.spread = 0, torch.zeros(3), torch.full((3,), 2.0)
        self.tokenizer = SimpleNamespace(
            decode=lambda z: z / 2, posterior=lambda x: (2 * x, torch.full_like(x, -20.0)))
        self.net = Pooled()
        grey = torch.linspace(-0.4, 0.4, n)[:, None, None, None].expand(n, 3, 8, 8)
        self.pixels, self.y = experiments.data.to_uint8(grey), torch.zeros(n).long()
        self.mean, self.std = self.posterior(self.pixels)
        self.z, self.known = self.mean.clone(), (self.mean, self.std)
        self.reference = self.features(self.pixels)[0]


class Pooled:
    """Features: the mean of each colour."""
    name = "Test"

    def __call__(self, pixels):
        return pixels.float().mean((2, 3)) / 255,


class Towards:
    """A transformer that leads everything to `ends`, in straight lines."""
    config = dict(num_classes=10)

    def __init__(self, ends):
        self.ends = ends

    def __call__(self, x, t, y):
        return (self.ends - x) / (1 - t.view(-1, 1, 1, 1))


STARTS = 0.3, answers.START


def look(bench: Oracle, ends: torch.Tensor) -> dict:
    """At a transformer that leads to `ends`, where the longest training leads to z."""
    mine, last = (bench.ends(Towards(z), STARTS, 5, "fp32") for z in (ends, bench.z))
    return bench.look(mine, last)


def test_the_longest_training_does_no_harm():
    bench = Oracle()
    real, found = bench.real(), look(bench, bench.z)
    # To the last grey level; 100 dB is the most.
    assert real["psnr"] == 100 and real["square"] == 0
    assert real["fd"] == real["images"]["fd"] < 1e-9
    assert found["generated"]["fd"] < 1e-9 and found["generated"]["distance"] < 1
    for start in found["starts"].values():
        assert start["e"] < 1e-5 and start["from_z"] < 1e-5
        assert start["ends"]["fd"] < 1e-9 and start["injected"]["fd"] < 1e-9


def test_a_known_error_is_found():
    bench, g = Oracle(), runtime.generator(0, "error")
    error = 0.1 * torch.randn(bench.z.shape, generator=g)
    found = look(bench, bench.z + error)
    assert found["starts"].keys() == {"0.3", "0.7"}
    for start in found["starts"].values():
        assert_close([start["e"], start["from_z"]], [0.1, 0.1], rtol=0.02, atol=0)
        # The oracle's features are means of 64 pixels, and see an eighth of such noise.
        assert start["ends"]["fd"] < 1e-3 and start["injected"]["fd"] < 1e-3
    assert_close(found["generated"]["e"], 0.1, rtol=0.02, atol=0)
    assert found["generated"]["round_trip"] < 0.01   # this tokenizer gives back all but rounding
    # An error that all of the transformer's ends share is no normal noise of mean 0.
    shared = look(bench, bench.z + 0.2)["starts"]["0.7"]
    assert_close(shared["e"], 0.2, rtol=0.01, atol=0)
    assert shared["ends"]["fd"] > 10 * shared["injected"]["fd"]
    assert_close(shared["moved"]["fd"], shared["ends"]["fd"], rtol=0.01, atol=0)
    # What the longest training does wrong itself is not seen.
    same = bench.ends(Towards(bench.z + 0.2), STARTS, 5, "fp32")
    start = bench.look(same, same)["starts"]["0.7"]
    assert start["e"] == 0 and start["from_z"] > 0.19


def test_what_white_noise_costs():
    """Of 0.1 of the spread it is 0.1 in pictures, of a range of 2: 26.02 dB are left.

    That is a squared error of 0.05^2 = 0.0025, and elsewhere (e / 2)^2.
    """
    bench = Oracle()
    curve = bench.real()["curve"]
    assert [point["e"] for point in curve] == [*experiments.LEVELS]
    for point in curve[2:6]:   # less is rounded, and more leaves the range
        assert_close(point["lost"], 100 - 20 * math.log10(2 / point["e"]), rtol=0, atol=0.5)
        assert_close(point["added"], (point["e"] / 2) ** 2, rtol=0.05, atol=1e-6)
    assert [point["fd"] for point in curve] == sorted(point["fd"] for point in curve)


def test_sigma_is_that_of_the_median_channel():
    bench = Oracle()
    bench.std = torch.tensor([0.1, 0.2, 1.0])[:, None, None].expand(60, 3, 8, 8).clone()
    bench.std[:30, 1] = 0.1   # the root of (0.01 + 0.04) / 2
    real = bench.real()
    assert_close(real["sigma"], math.sqrt(0.025))
    assert_close(real["sigmas"], [0.1, math.sqrt(0.025), 1.0])


def test_a_latent_that_does_not_come_back_is_seen():
    """Errors of 3 spreads leave the range of pictures, and are lost on the way."""
    bench = Oracle()
    error = 3 * torch.ones_like(bench.z)
    found = look(bench, bench.z + error)["generated"]
    lost = bench.z + error - 1   # white is 2, which is 1 in units of the spread
    assert_close(found["round_trip"], experiments.size(lost), rtol=1e-3, atol=0)
    assert found["fd"] > 0.1


# ------------------------------------------------------------------------------
# The judgement.


def test_intervals_are_scipys():
    values = [-14.0, -11.0, -17.5]
    low, high = scipy.stats.t.interval(0.95, 2, sum(values) / 3, scipy.stats.sem(values))
    mean, half = answers.interval(values)
    assert_close([mean - half, mean + half], [low, high])


@pytest.mark.parametrize("m1, m2, total, said", [
    ([0.7, 0.8, 0.6], [-14, -15, -13], -12, "confirmed"),
    ([0.7, 0.8, 0.6], [-14, -15, -13], 3, "paid back as floor"),
    ([0.7, 0.84, 0.6], [-14, -15, -13], -12, "unresolved"),     # one seed is too much
    ([0.7, 0.8, 0.6], [-2, -30, -13], -12, "unresolved"),       # the interval holds 0
    ([0.7, 0.8, 0.6], [-8, -9, -8.5], -7, "paid back as floor"),
    ([0.9, 0.9, 0.9], [-8, -9, -8.5], -7, "refuted"),           # the interval excludes -10
    ([0.9, 0.9, 0.9], [-2, -15, -10], -7, "unresolved"),        # it holds -10
    ([1.1, 1.0, 1.3], [-14, -15, -13], -12, "refuted"),         # no decoder was more robust
    ([1.1, 0.9, 1.3], [-14, -15, -13], -12, "unresolved"),
    ([0.7], [-30], -30, "unresolved"),                          # one seed
])
def test_the_verdict(m1, m2, total, said):
    assert answers.verdict(m1, m2, len(m1) * [total]) == said


def with_rows(*e: float, **rest) -> dict:
    groups = ["level"] * (len(e) - 1) + ["last"]
    return {"rows": [{"group": group, "e": size} for group, size in zip(groups, e)]} | rest


def test_robustness_is_compared_at_one_error():
    """Losses are powers of e between points: KL's quadruples where e doubles, VE's doubles."""
    kl = with_rows(0.1, 0.05, 0.0, lost=[[0.01, 0.01], [0.1, 1.0], [1.0, 100.0]],
                   added=[[0.01, 1.0], [1.0, 1.0]])
    ve = with_rows(0.3, 0.15, 0.0, lost=[[0.01, 0.05], [0.1, 0.5], [1.0, 5.0]],
                   added=[[0.01, 3.0], [1.0, 3.0]])
    assert_close([answers.loss_at(e, kl, "lost") for e in (0.05, 0.2)], [0.25, 4.0])
    assert_close(answers.robustness(ve, kl, 0), 1.0 / 4.0)
    assert_close(answers.robustness(ve, kl, 1), 0.5 / 1.0)
    assert_close(answers.robustness(ve, kl, 2), 0.5 / 1.0)   # the last has no e of its own
    assert_close(answers.by_squares(ve, kl, 0), 3.0)


def test_harm_is_in_percent_of_the_samples_of_the_other():
    # KL: 50 - 10 = 40.  VE: 45 - 15 = 30, which is 10 less, and 20 % of 50.
    ve, kl = ({"rows": [row]} for row in (dict(fd=45.0, harm=30.0), dict(fd=50.0, harm=40.0)))
    assert answers.harm(ve, kl, 0) == -20 and answers.harm(kl, kl, 0) == 0
    assert_close(answers.total(ve, kl, 0), -10.0)


def test_the_scatter_is_drawn_over_tokenizers():
    """Two seeds of one tokenizer are never apart in the bootstrap."""
    def arm(name, seed, invalid):
        return {"arm": {"name": name, "seed": seed}, "floor": 0.0,
                "rows": [{"group": "level", "e": 0.1, "invalid": invalid}]}

    arms = [arm("a", 1, 0.0), arm("a", 2, 2.0), arm("b", 1, 0.0), arm("b", 2, 2.0)]
    groups = [*answers.by_name(arms).values()]
    found = answers.scatter_of(groups, lambda arm, row: row["e"])
    assert_close(found, [1.0, 1.0, 1.0])


def run_of(name: str, seed: int, fd: list[float], floor: float, e: list[float], slope: float):
    """The file of an arm.  Noise of e costs 100 slope e^2 dB, slope^2 e^2 of squared error,
    and 100 e points or FDs.

    The longest training is as the one before it.
    """
    def scored(fd):
        return {"fd": fd, "invalid": fd / 10}

    made = [{"training": 2**k, "generated": scored(f) | {
                 "e": error, "distance": 3.0, "round_trip": 0.2},
             "starts": {str(answers.START): {"e": error, "ends": scored(f),
                                             "injected": scored((f + floor) / 2),
                                             "moved": scored(f / 4 + 3 * floor / 4)}}}
            for k, (f, error) in enumerate(zip([*fd, fd[-1]], [*e, 0.0]))]
    curve = [{"e": size, "lost": 100 * slope * size**2,
              "added": (slope * size) ** 2, "fd": floor + 100 * size,
              "invalid": floor / 10 + 100 * size} for size in (0.01, 0.1, 1.0)]
    real = {"sigma": 0.1, "psnr": 30.0, **scored(floor), "distance": 1.5, "curve": curve,
            "round_trip": 0.1, "images": {"fd": 5.0, "invalid": 0.0}}
    family, value = name.split()
    return {"arm": name, "family": family, "value": value, "seed": seed, "features": "Test",
            "settings": {"scores": "a few steps"}, "hardware": "none", "date": "today",
            "versions": {"torch": "2"}, "real": real, "rows": made, "numbers": {}}


def write_arms(folder: Path, *runs: dict) -> None:
    for k, run in enumerate(runs):
        runtime.write_json(folder / f"shapes/arms/{k}.json", run)


def three_seeds() -> list[dict]:
    """KL's floor is 10 and VE's 30.  At first VE is better, and at last it is worse."""
    return [run for seed in (1, 2, 3) for run in (
        run_of("KL 1e-6", seed, [100.0 + seed, 20.0], 10.0, [0.4, 0.2], 8.0),
        run_of("VE 1e-3", seed, [60.0 + seed, 31.0], 30.0, [0.4, 0.2], 4.0),
        run_of("VE 1e-2", seed, [70.0, 30.5], 30.0, [0.4, 0.2], 2.0))]


def draw(folder: Path) -> str:
    experiments.main(["--draw", "--results", str(folder)])
    return (folder / "shapes/law.md").read_text()


def test_answers_are_drawn_from_the_files_alone(tmp_path):
    write_arms(tmp_path, *three_seeds())
    text = draw(tmp_path)
    # With KL 1e-6, 101 of which 10 are the floor, M2 is (31 - 91) / 101 = -59.4 %, then -58.8
    # and -58.3; the FD itself is 39.6 % less, then 39.2 and 38.8.  Later on it is -45 %.
    line, = [line for line in text.splitlines() if "**confirmed**" in line and "VE 1e-3" in line]
    assert "| 0.50 ± 0.00 (0.25 ± 0.00); -58.8 ± 1.4; -39.2 ± 1.0: **confirmed** |" in line
    assert "| 0.50 ± 0.00 (0.25 ± 0.00); -45.0 ± 0.0; 55.0 ± 0.0: **paid back as floor** |" in line
    # Noise of 0.01 costs 1 point and of 0.1 it costs 10, so that 5 are at 10^(4/9) % = 2.78 %.
    assert "| KL 1e-6 | 3 | 10.0 ± 0.0 | 2.8 ± 0.0 | 30.0 ± 0.0 | 10.0" in text
    # sigma is 0.1, and e is 0.4 and then 0.2.
    assert ("* 1x: best lambda1 1e-3, 1e-3, 1e-3, whose sigma is 0.2 ± 0.0 times e.\n"
            "* 2x: best lambda1 1e-2, 1e-2, 1e-2, whose sigma is 0.5 ± 0.0 times e.\n"
            "* 4x: best lambda1 1e-2, 1e-2, 1e-2.") in text
    # Between e = 0.2, where VE is worse by 1.1, and 0.4, where it is better by 4:
    # 0.2 + 0.2 * 1.1 / 5.1 = 24.31 %.
    assert "* VE 1e-3 crosses KL 1e-6 in 3 of 3 seeds, at e = 24.31 ± 0.00 %, 2.43" in text
    assert ("at t = 0.7 causes 50 ± 0 % of the loss that the errors cause, and the errors of "
            "other images cause 25 ± 0 %.") in text
    before = {path: path.read_bytes() for path in tmp_path.glob("shapes/law.*")}
    assert len(before) == 2
    draw(tmp_path)
    assert all(path.read_bytes() == old for path, old in before.items())


def test_the_seed_that_chose_a_weight_is_told_apart(tmp_path):
    tried = run_of("VE 1e-3", 0, [1.0, 1.0], 1.0, [0.4, 0.2], 4.0)
    write_arms(tmp_path, *three_seeds(), tried)
    text = draw(tmp_path)
    assert "| VE 1e-3 | 3 |" in text and "| VE 1e-3 at seed 0 | 1 |" in text
    write_arms(tmp_path, *three_seeds(), tried, *(
        run_of(name, 0, [9.0, fd], 1.0, [0.4, 0.2], 4.0)
        for name, fd in (("KL 1e-4", 3.0), ("KL 0.1", 2.0), ("KL 1", 4.0))))
    assert "best KL weight at seed 0, by FD after the longest training, is 0.1." in draw(tmp_path)


def test_one_arm_and_arms_without_a_pair_are_drawn(tmp_path):
    write_arms(tmp_path, run_of("VE 1e-3", 2, [60.0, 31.0], 30.0, [0.4, 0.2], 4.0))
    assert "| VE 1e-3 | 1 |  |  |  |" in draw(tmp_path)
    write_arms(tmp_path, run_of("VE 1e-3", 2, [60.0, 31.0], 30.0, [0.4, 0.2], 4.0),
               run_of("VE 1e-3", 1, [60.0, 31.0], 30.0, [0.4, 0.2], 4.0),
               run_of("KL 1e-6", 1, [90.0, 31.0], 10.0, [0.4, 0.2], 4.0))
    assert "**unresolved**" in draw(tmp_path)   # of the one pair
    assert "crosses KL 1e-6 in 1 of 1 seeds" in draw(tmp_path)


def test_photographs_are_judged_by_fd(tmp_path):
    write_arms(tmp_path, *three_seeds())
    (tmp_path / "shapes").rename(tmp_path / "photographs")
    experiments.main(["--draw", "--rung", "photographs", "--results", str(tmp_path)])
    text = (tmp_path / "photographs/law.md").read_text()
    assert text.startswith("# Photographs") and "recognised" not in text


def complaint(capsys, main, *flags: str) -> str:
    with pytest.raises(SystemExit) as stop:
        main(list(flags))
    line, = capsys.readouterr().err.splitlines()
    assert stop.value.code == 2
    return line


@pytest.mark.parametrize("change", [
    "", "[]", "{}", {"rows": []}, {"rows": 3}, {"real": {}}, {"seed": "0"}, {"arm": 3},
    {"settings": []}, {"versions": {}}, {"features": 3}, {"curve": [[1.0, 2.0], [3.0]]},
    {"curve": []}, {"curve": [{"e": 0.1, "lost": 3.0, "invalid": None}]},
    {"starts": {}}, {"generated": {"fd": float("nan")}}, {"injected": None},
    {"generated": {"fd": "3"}}, {"training": float("inf")}, {"settings": {"scores": "others"}},
])
def test_a_damaged_arm_is_named(tmp_path, capsys, change):
    runs = [run_of(name, 1, [3.0, 2.0], 1.0, [0.2, 0.1], 1.0) for name in ("KL 1e-6", "VE 1e-3")]
    write_arms(tmp_path, *runs)
    path = tmp_path / "shapes/arms/1.json"
    if isinstance(change, dict):
        key, value = next(iter(change.items()))
        place = runs[1] if key in runs[1] else runs[1]["rows"][1]
        place = {"curve": runs[1]["real"], "injected": place.get("starts", {}).get("0.7")
                 }.get(key, place)
        both = isinstance(value, dict) and key == "generated"
        place[key] = place[key] | value if both else value
    path.write_text(change if isinstance(change, str) else json.dumps(runs[1]))
    before = set(tmp_path.rglob("*"))
    said = complaint(capsys, experiments.main, "--draw", "--results", str(tmp_path))
    assert str(path) in said and ("remove it" in said or "of other sizes" in said)
    assert set(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("owner, name", [
    (answers.plt.Figure, "savefig"), (Path, "write_text")])
def test_a_full_disk_is_one_line(tmp_path, monkeypatch, capsys, owner, name):
    def full(*_, **__):
        raise OSError(28, "No space left on device")

    write_arms(tmp_path, *three_seeds()[:2])
    monkeypatch.setattr(owner, name, full)
    said = complaint(capsys, experiments.main, "--draw", "--results", str(tmp_path))
    assert "law." in said and "cannot be written (No space left" in said
    assert {path.name for path in (tmp_path / "shapes").iterdir()} <= {"arms", "law.md"}


@pytest.mark.parametrize("flags, message", [
    (["--only", "VE 7"], "--only VE 7: no arm has that name"),
    (["--data", "no/such/folder"], "--data no/such/folder is not a folder"),
    (["--rung", "toy"], "invalid choice: 'toy'"),
    (["--seeds", "1.5"], "1.5 is not a whole number"),
    (["--device", "abacus"], "choose one of auto, cpu"),
    (["--draw"], "holds no results"),
    (["--smoke", "--out", "file/x"], "file"), (["--smoke", "--results", "file/x"], "file"),
])
def test_bad_input_is_one_line_and_exit_2(
        tmp_path, monkeypatch, capsys, flags, message):
    monkeypatch.setattr(experiments, "execute", None)
    monkeypatch.chdir(tmp_path)
    Path("file").touch()
    assert message in complaint(capsys, experiments.main, *flags)
    assert not [path for path in Path().rglob("*") if path.is_file() and path.name != "file"]


def test_held_out_photographs_need_labels(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(experiments, "execute", None)
    for folder in ("train/a", "train/b", "val"):
        (tmp_path / "flat" / folder).mkdir(parents=True)
        Image.new("RGB", (32, 32)).save(tmp_path / "flat" / folder / "0.png")
    flags = "--rung", "photographs", "--data", f"{tmp_path}/flat", "--out", f"{tmp_path}/runs"
    assert "held-out images without labels" in complaint(capsys, experiments.main, *flags)
    assert [path.name for path in tmp_path.iterdir()] == ["flat"]


def test_the_judge_is_not_trained_in_vain(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(train_judge, "train", None)
    (tmp_path / "file").touch()
    for flags, message in ((["--out", f"{tmp_path}/file/judge.pt"], "file"),
                           (["--out", str(tmp_path)], "Is a folder"),
                           (["--seed", "-1"], "-1 is not a whole number from 0")):
        assert message in complaint(capsys, train_judge.main, *flags)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
