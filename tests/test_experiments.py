"""The experiments: the arms, one of them end to end, and the answers.

The stages run in this process here, because starting Python takes longer.
"""

import importlib
import json
import os
import shlex
import signal
import time
from dataclasses import replace
from pathlib import Path

import pytest
import runtime
import torch
from torch.testing import assert_close

from runtime import InputError
from studies import answers, experiments, train_judge

ARM = "VE 0.1 seed 0"
STAGES = ["train_tokenizer", "train_dit", "sample", "evaluate", "evaluate",
          "studies.equilibrium"]
ARMS = {arm.key: arm for arm in experiments.table_of_arms()}


def plan(key: str, **recipe) -> experiments.Plan:
    return experiments.Plan(ARMS[key], experiments.RECIPE | recipe,
                            "cifar10_subset", Path("runs"), "cpu")


def split(command: str) -> tuple[str, list[str]]:
    """The module and the flags of a command."""
    first, *flags = shlex.split(command)
    return (flags.pop(0), flags) if first == "-m" else (first[:-3], flags)


# ------------------------------------------------------------------------------
# The arms.


def test_every_question_has_arms_and_no_two_arms_are_alike():
    asked = {n for arm in ARMS.values() for n in arm.questions}
    assert asked == set(answers.QUESTIONS)
    assert len(ARMS) == len(experiments.table_of_arms())
    for alike in (lambda key: plan(key).folder("scores"),
                  lambda key: experiments.result_path(Path(), ARMS[key])):
        assert len(set(map(alike, ARMS))) == len(ARMS)
    weights = [float(arm.value) for arm in ARMS.values()
               if arm.family == "KL" and arm.seed == 0]
    assert sorted(weights) == [1e-6, 1e-4, 1e-2, 0.1, 0.5, 1, 2, 8]   # Table 2's


def test_the_stages_take_the_flags_of_every_arm(monkeypatch):
    monkeypatch.setattr(runtime, "regular", Path)   # their files are not there yet
    for key, arm in ARMS.items():
        parsed = {}
        for command, _ in plan(key).stages():
            module, flags = split(command)
            if not module.startswith("studies"):
                parsed[module] = importlib.import_module(module).parse(flags)
        tokenizer, dit = parsed["train_tokenizer"], parsed["train_dit"]
        assert (tokenizer.loss == "kl") == arm.family.startswith("KL")
        assert (dit.optimizer == "adamw") == ("AdamW" in key)
        if arm.family == "VE lambda2":
            assert (tokenizer.lambda1, tokenizer.lambda2) == (0.1, float(arm.value))
        if "AdamW" in key or "Muon" in key:
            assert dit.lr == float(arm.value)
        assert parsed["sample"].steps == 50 and parsed["sample"].count == 1000


def test_equal_tokenizers_are_one_folder_and_changed_settings_another():
    a, b = plan(ARM), plan("VE Muon 1e-3 seed 0")
    assert a.folder("tokenizer") == b.folder("tokenizer")
    assert a.folder("dit") != b.folder("dit")
    assert a.folder("tokenizer") != plan("VE 0.1 seed 1").folder("tokenizer")
    longer, finer = plan(ARM, dit_steps=3), plan(ARM, euler=250)
    assert longer.folder("tokenizer") == a.folder("tokenizer")
    assert longer.folder("dit") != a.folder("dit") == finer.folder("dit")
    assert finer.folder("scores") != a.folder("scores")
    assert replace(a, data="else/where/cifar10_subset").settings() == a.settings()


def test_folders_may_have_spaces_in_their_names():
    spaced = replace(plan(ARM), data="my pictures", out=Path("my runs"))
    for command, done in spaced.stages():
        _, flags = split(command)
        assert Path(flags[flags.index("--out") + 1] if "--out" in flags else flags[1]
                    ).is_relative_to("my runs") and done.is_relative_to("my runs")
        if "--data" in flags:   # the last one counts
            assert flags[::-1][flags[::-1].index("--data") - 1] == "my pictures"


# ------------------------------------------------------------------------------
# One tiny arm.


def only_questions(monkeypatch, *numbers: int) -> None:
    """Every figure takes a fifth of a second."""
    chosen = {n: answers.QUESTIONS[n] for n in numbers}
    monkeypatch.setattr(answers, "QUESTIONS", chosen)


def smoke(folder: Path, *flags: str) -> None:
    experiments.main(["--smoke", "--device", "cpu", "--out", f"{folder}/runs",
                      "--results", f"{folder}/results", *flags])


def test_an_arm_runs_once_and_goes_on_where_it_was_killed(
        tmp_path, monkeypatch, capsys):
    ran = []

    def execute(command: str) -> str:
        module, flags = split(command)
        if not ran:   # the folders belong to this command
            assert {path.parent for path in runtime.locks} == {
                tmp_path / "runs", tmp_path / "results"}
        if module == "sample" and ran.count("sample") == 0:
            ran.append(module)
            return "killed"
        ran.append(module)
        importlib.import_module(module).main(flags)
        return ""

    only_questions(monkeypatch, 5)
    monkeypatch.setattr(experiments, "execute", execute)
    with pytest.raises(SystemExit):
        smoke(tmp_path)
    assert "VE 0.1 seed 0, sample.py: killed" in capsys.readouterr().err
    assert ran == STAGES[:3] and not (tmp_path / "results").exists()
    # The power fails: what is empty is not done.
    trained, = tmp_path.glob("runs/dit/*/trained")
    trained.write_text("")
    smoke(tmp_path)
    assert ran == STAGES[:3] + STAGES[1:] and trained.stat().st_size > 0
    found = json.loads((tmp_path / "results/arms/ve-0.1-seed-0.json").read_text())
    assert set(found["numbers"]) >= {
        "sigma2", "relative_noise", "psnr", "psnr_0.2", "rfd", "flow_loss", "fd",
        "kd", "trace_slope", "sampler_error", "lambda1"}
    assert (tmp_path / "results/question5.png").exists()
    smoke(tmp_path)   # it is done
    assert len(ran) == 8
    arm, = tmp_path.glob("results/arms/*.json")
    measured, = tmp_path.glob("runs/scores/*/measured.json")
    for path in (arm, measured):
        path.write_text("")
    smoke(tmp_path)
    assert ran[8:] == ["studies.equilibrium"]
    assert json.loads(arm.read_text())["numbers"] == found["numbers"]
    arm.unlink()
    scores = measured.parent / "samples/results.json"
    for path, text, said in (
            (scores, '[{"metrics": {}}]', "is damaged or not of this arm (KeyError('protocol"),
            (scores, "[{", "results.json is damaged"),
            (measured, "{", "measured.json is damaged"),
            (arm, "[]", "ve-0.1-seed-0.json is damaged")):
        whole = path.read_text() if path.exists() else ""
        path.write_text(text)
        capsys.readouterr()
        with pytest.raises(SystemExit) as stop:
            smoke(tmp_path)
        assert stop.value.code == 2 and said in capsys.readouterr().err.splitlines()[-1]
        path.write_text(whole)
    smoke(tmp_path)
    assert len(ran) == 9
    capsys.readouterr()
    smoke(tmp_path, "--list")
    assert capsys.readouterr().out.split()[-1] == "done"
    smoke(tmp_path, "--count", "12", "--list")
    assert "done" not in capsys.readouterr().out


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
            "experiments.py: stopped; the same command goes on\n")


# ------------------------------------------------------------------------------
# Tables and figures, from files that no stage has written.


def write_arms(folder: Path, values: dict[str, dict]) -> None:
    (folder / "arms").mkdir(parents=True)
    for key, numbers in values.items():
        arm = ARMS[f"{key} seed 0"] if "seed" not in key else ARMS[key]
        run = {"arm": arm.name, "seed": arm.seed, "numbers": numbers,
               "settings": plan(arm.key).settings(), "features": "Test",
               "hardware": "none", "date": "today", "versions": {"torch": "2"},
               "curves": {}}
        experiments.result_path(folder, arm).write_text(json.dumps(run))


def table(folder: Path, number: int) -> str:
    return (folder / f"question{number}.md").read_text()


def test_answers_are_drawn_from_the_files_alone(tmp_path, monkeypatch):
    write_arms(tmp_path, {
        "KL 1e-6": dict(fd=400.0, psnr=30.0, sigma2=1e-6),
        "KL 1e-2": dict(fd=380.0, psnr=29.0, sigma2=1e-2),
        "KL 1e-2 seed 1": dict(fd=384.0, psnr=29.0, sigma2=1e-2),
        "VE 0.1": dict(fd=300.0, psnr=23.0, sigma2=10.0),
        "VE AdamW 1e-3": dict(fd=330.0), "KL Muon 1e-3": dict(fd=360.0)})
    experiments.main(["--draw", "--results", str(tmp_path)])
    # The mean is 382, and the deviation sqrt((2^2 + 2^2) / 1) = 2.83.
    assert "| KL 1e-2 | 2 | 0.01 ± 0 | 29 ± 0 | 382 ± 2.8 |" in table(tmp_path, 1)
    # On seed 0, which both have run, 300 / 380 - 1 = -21.1 %.
    assert ("* best of VE: VE 0.1, FD 300 (n = 1), -21.1 % against KL 1e-2, 1 seed"
            in table(tmp_path, 1))
    assert "Not run: VE 0.01, VE 0.001, VE 0.0001, KL 1e-4," in table(tmp_path, 1)
    assert "+10.0 % against VE 0.1, 1 seed" in table(tmp_path, 8)
    assert "-10.0 % against KL 1e-6, 1 seed" in table(tmp_path, 8)
    before = {path: path.read_bytes() for path in tmp_path.glob("question*")}
    assert len(before) == 16
    only_questions(monkeypatch, 1, 8)
    experiments.main(["--draw", "--results", str(tmp_path)])
    assert all(path.read_bytes() == old for path, old in before.items())


def test_arms_of_another_edition_are_called_incomparable(tmp_path, monkeypatch):
    only_questions(monkeypatch, 1)
    write_arms(tmp_path, {"KL 1e-6": dict(fd=4.0), "VE 0.1": dict(fd=3.0)})
    path = tmp_path / "arms/ve-0.1-seed-0.json"
    run = json.loads(path.read_text())
    run["settings"] = plan(ARM, edition=1).settings()
    path.write_text(json.dumps(run))
    experiments.main(["--draw", "--results", str(tmp_path)])
    assert "editions: not comparable.**" in table(tmp_path, 1)


def row(name: str, *distances: float) -> answers.Row:
    runs = [{"seed": n, "numbers": {"fd": fd}} for n, fd in enumerate(distances)]
    return answers.Row(name, name, runs)


def test_rows_are_compared_seed_by_seed():
    """-50 and -40 %: mean -45, deviation 7.1.  The ratio of means is -43 %."""
    a, b = row("a", 50.0, 120.0), row("b", 100.0, 200.0, 7.0)
    assert answers.against(a, b) == ", -45.0 ± 7.1 % against b, 2 seeds"
    assert answers.against(b, b) == "" == answers.against(row("c"), b)


def test_least_squares_against_a_line_with_known_errors():
    """y = 1 + 2 x with errors +-0.5 that are orthogonal to 1 and x.

    The rest is 4 * 0.25 = 1, of a variance around the mean of 4 * 5 + 1.  The
    error of the slope is sqrt(1 / (4 - 2) / 5), so t = 2 / sqrt(0.1) = 6.32.
    """
    x = torch.tensor([0.0, 1.0, 2.0, 3.0], dtype=torch.float64)
    y = 1 + 2 * x + torch.tensor([0.5, -0.5, -0.5, 0.5])
    r2, t = answers.regress(y, x)
    assert_close([r2, t], [20 / 21, 2 / 0.1**0.5])


def test_what_explains_the_distance_is_told_for_enough_runs():
    numbers = [dict(fd=2.0 * n, rfd=float(n), flow_loss=n % 2, psnr=30.0,
                    **{"psnr_0.5": 20.0 + n % 3}) for n in range(6)]
    runs = [{"arm": "VE 0.1", "numbers": n} for n in numbers]
    said = answers.explained(runs + [{"arm": "VE AdamW 1e-3", "numbers": {}}])
    assert "Over 6 runs" in said[0] and "explains 100 % of the variance" in said[0]
    assert answers.explained(runs[:4]) == []


def test_runs_that_are_alike_or_incomplete_are_no_reason_to_fail():
    alike = dict(fd=2.0, rfd=1.0, flow_loss=1.0, psnr=30.0, **{"psnr_0.5": 20.0})
    runs = [{"arm": "VE 0.1", "numbers": numbers}
            for numbers in [*5 * [alike], {"fd": 2.0}, alike | {"rfd": None}]]
    assert "Over 5 runs" in answers.explained(runs)[0]


def complaint(capsys, main, *flags: str) -> str:
    with pytest.raises(SystemExit) as stop:
        main(list(flags))
    line, = capsys.readouterr().err.splitlines()
    assert stop.value.code == 2
    return line


@pytest.mark.parametrize("change", [
    "", "[]", "{}", {"numbers": {}}, {"numbers": {"fd": "3"}}, {"numbers": {"fd": float("inf")}},
    {"numbers": {"fd": 3.0, "psnr": float("nan")}}, {"arm": None}, {"seed": "0"},
    {"settings": []}, {"versions": {}}, {"features": 3}, {"curves": {"bins": {}}},
    {"curves": {"bins": {"log_t": [1.0], "log_sigma": [1.0]},
                "points": {"log_t": [1.0], "log_sigma": []}},
     "numbers": {"fd": 3.0, "lambda1": 0.1}},
])
def test_a_damaged_arm_is_named(tmp_path, capsys, change):
    write_arms(tmp_path, {"KL 1e-6": dict(fd=4.0), "VE 0.1": dict(fd=3.0)})
    path = tmp_path / "arms/ve-0.1-seed-0.json"
    run = json.loads(path.read_text())
    path.write_text(change if isinstance(change, str) else json.dumps(run | change))
    before = set(tmp_path.rglob("*"))
    said = complaint(capsys, experiments.main, "--draw", "--results", str(tmp_path))
    assert str(path) in said and "remove it" in said
    assert set(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("owner, name", [
    (answers.plt.Figure, "savefig"), (Path, "write_text")])
def test_a_full_disk_is_one_line(tmp_path, monkeypatch, capsys, owner, name):
    def full(*_, **__):
        raise OSError(28, "No space left on device")

    only_questions(monkeypatch, 1)
    write_arms(tmp_path, {"KL 1e-6": dict(fd=4.0)})
    monkeypatch.setattr(owner, name, full)
    said = complaint(capsys, experiments.main, "--draw", "--results", str(tmp_path))
    assert "question1." in said and "cannot be written (No space left" in said
    assert {path.name for path in tmp_path.iterdir()} <= {"arms", "question1.md"}


@pytest.mark.parametrize("flags, message", [
    (["--only", "VE 7"], "--only VE 7: no arm or question"),
    (["--data", "no/such/folder"], "--data no/such/folder is not a folder"),
    *((["--scale", value], f"{value} is not a finite number above 0")
      for value in ("0", "nan", "inf", "-1")),
    (["--count", "0"], "0 is not a whole number"), (["--euler", "-1"], "-1 is not a whole"),
    (["--seeds", "1.5"], "1.5 is not a whole number"),
    (["--device", "abacus", "--data", "shapes"], "choose one of auto, cpu"),
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


def test_the_judge_is_not_trained_in_vain(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(train_judge, "train", None)
    (tmp_path / "file").touch()
    for flags, message in ((["--out", f"{tmp_path}/file/judge.pt"], "file"),
                           (["--out", str(tmp_path)], "Is a folder"),
                           (["--seed", "-1"], "-1 is not a whole number from 0")):
        assert message in complaint(capsys, train_judge.main, *flags)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
