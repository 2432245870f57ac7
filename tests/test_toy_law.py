"""The study of the toy's law against closed forms, and as it is run."""

import json
import math
from pathlib import Path

import runtime  # before torch: it sets how threads wait
import pytest
import torch
from torch.testing import assert_close

import toy2d
from studies import toy_law
from studies.toy_sweep import SweepModel

TINY = toy_law.RECIPE | toy_law.SMOKE
TWO = toy_law.KL, toy_law.VE


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


# ------------------------------------------------------------------------------
# One tokenizer.


@pytest.fixture(scope="module")
def tokenizer() -> tuple[SweepModel, toy_law.Truth]:
    model = SweepModel(toy_law.VE, 8)
    toy2d.train_tokenizer(model, TINY)
    return model, toy_law.truth_of(model, "evaluate", 200, 50)


def test_the_exact_flow_has_no_error(tokenizer) -> None:
    model, truth = tokenizer
    exact = toy_law.carry(toy_law.scaled(model, truth, 0.0), truth.noise[:50])
    found = toy_law.measure(model, truth, exact)
    assert found["e"] == 0
    # Without an error that is injected, real latents remain as they are.
    assert found["injected"] == toy_law.invalid(model.decode(truth.z))


def test_a_scaled_error_lies_between_the_exact_and_the_learned_flow(tokenizer) -> None:
    model, truth = tokenizer
    ends = [toy_law.carry(toy_law.scaled(model, truth, kept), truth.noise[:50])
            for kept in (0.0, 1.0)]
    assert_close(ends[0], truth.exact)
    assert_close(ends[1], toy_law.carry(model.velocity, truth.noise[:50]), rtol=1e-4, atol=1e-4)
    middle = toy_law.carry(toy_law.scaled(model, truth, 0.01), truth.noise[:50])
    e = [toy_law.measure(model, truth, learned)["e"] for learned in (middle, ends[1])]
    assert 0 < e[0] < e[1]


def test_truth_is_in_the_units_of_the_flow(tokenizer) -> None:
    model, truth = tokenizer
    mean, logvar = model.encoder(truth.x).chunk(2, 1)
    assert_close(truth.mean * model.spread + model.centre, mean)
    assert_close(truth.std * model.spread, (logvar / 2).exp())
    eps = (truth.z - truth.mean) / truth.std
    assert eps.mean().abs() < 0.2 and 0.8 < eps.std() < 1.2


def test_distance_in_sigmas() -> None:
    # From (0.2, 0.5) to N(0, diag(0.1, 0.5)^2) it is |(2, 1)|, and to a posterior of
    # deviation 0.01 that is 0.5 away it is 50.
    mean, std = torch.tensor([[0.0, 0.0], [0.2, 1.0]]), torch.tensor([[0.1, 0.5], [0.01, 0.01]])
    truth = toy_law.Truth(None, mean, std, None, None, None)
    z = torch.tensor([[0.2, 0.5]])
    assert_close(toy_law.distance_in_sigmas(z, truth), math.sqrt(5))
    assert_close(toy_law.distance_in_sigmas(mean[1:], truth), 0.0, atol=1e-5, rtol=0)


def test_tolerance_of_a_decoder(monkeypatch: pytest.MonkeyPatch) -> None:
    # What leaves [-1, 1] is invalid.  A normal error around 0 does so in 5 % of all
    # cases if its deviation is 1 / 1.96.
    model, z = SweepModel(toy_law.VE, 4), torch.zeros(5000, 2)
    monkeypatch.setattr(model, "decode", lambda z: z)
    monkeypatch.setattr(toy_law, "invalid",
                        lambda x: 100 * (x[:, 0].abs() > 1).double().mean().item())
    found = toy_law.tolerance(model, toy_law.Truth(None, None, None, z, None, None))
    assert_close(found, 1 / 1.96, rtol=0.1, atol=0)


def test_a_look_is_the_end_of_a_shorter_training() -> None:
    recipe = TINY | dict(flow_steps=100)
    long, short = SweepModel(toy_law.VE, 8), SweepModel(toy_law.VE, 8)
    first, last = toy_law.train_and_look(long, 4, recipe, [1.0, 2.0])
    end, = toy_law.train_and_look(short, 4, recipe, [1.0])
    for a, b, c in zip(first.parameters(), end.parameters(), last.parameters()):
        assert torch.equal(a, b) and not torch.equal(a, c)


# ------------------------------------------------------------------------------
# The judgement.


def test_interval_is_student_s() -> None:
    # Of 1, 2, 3 the deviation is 1, and the quantile at 2 degrees of freedom 4.3027.
    mean, half = toy_law.interval([1.0, 2.0, 3.0])
    assert_close([mean, half], [2.0, 4.302653 / math.sqrt(3)])
    assert toy_law.interval([5.0]) == (5.0, None)
    assert toy_law.shown([1.0, 2.0, 3.0]) == "2.0 ± 2.5" and toy_law.shown([5.0]) == "5.0"


def rows(lost: list[float], e: list[float]) -> list[dict]:
    kept = [*[1.0] * (len(e) - 1), 0.0]
    return [{"group": "level", "training": 2.0 ** k, "kept": share, "e": error, "invalid": loss,
             "injected": loss / 2, "distance": 1.0}
            for k, (loss, error, share) in enumerate(zip(lost, e, kept))]


E = [0.1, 0.05, 0.02, 0.0]


def test_crossing_of_straight_lines() -> None:
    # KL loses 100 e, and VE 4 always: they are level at e = 0.04.
    kl = rows([100 * e for e in E], E)
    assert_close(toy_law.crossing(kl, rows([4.0] * 4, E)), 0.04)
    # VE's flow errs three times as much: e is the mean of both, 0.08.
    assert_close(toy_law.crossing(kl, rows([4.0] * 4, [3 * e for e in E])), 0.08)
    assert toy_law.crossing(kl, rows([11.0] * 4, E)) is None    # KL is always better
    assert toy_law.crossing(kl, rows([-1.0] * 4, E)) is None    # and never


def test_scatter_around_an_increasing_curve() -> None:
    # Of 1, 3, 2 the nearest increasing values are 1, 2.5, 2.5.
    assert_close(toy_law.scatter([0, 1, 2], [1, 3, 2]), math.sqrt(1 / 6))
    assert_close(toy_law.scatter([2, 0, 1], [2, 1, 3]), math.sqrt(1 / 6))
    assert toy_law.scatter([3, 1, 2], [9, 1, 4]) == 0
    assert_close(toy_law.scatter([0, 0], [1, 3]), 1.0)   # one curve has one value there
    assert_close(toy_law.scatter([0, 1, 2, 3], [3, 2, 1, 0]), math.sqrt(1.25))


def test_surprise_is_the_distance_from_the_others_curve() -> None:
    # The others' excess is 100 e / tolerance, and this arm's 3 more wherever e is not 0.
    others = [arm_of(toy_law.VE, 1, sigma, 0.0, lambda e, s: 100 * e / s) for sigma in (0.1, 0.2)]
    arm = arm_of(toy_law.KL, 1, 0.2, 0.0, lambda e, s: 100 * e / s + 3 * (e > 0))
    assert_close(toy_law.surprise(arm, others), math.sqrt(3 * 3 ** 2 / 4))


def arm_of(arm: toy2d.Arm, seed: int, sigma: float, floor: float, loss) -> dict:
    return {"arm": {"name": arm.name, "loss": arm.loss, "weight": arm.weight, "seed": seed},
            "sigma": sigma, "tolerance": sigma, "floor": floor,
            "rows": rows([floor + loss(e, sigma) for e in E], E)}


def test_judge_finds_the_law_where_it_holds() -> None:
    # The excess is 10 (e / sigma)^2: one curve of e / sigma, and not one of e.
    arms = [arm_of(arm, seed, sigma, floor, lambda e, sigma: 10 * (e / sigma) ** 2)
            for seed in (1, 2) for arm, sigma, floor in zip(TWO, (0.03, 0.06), (0.0, 5.0))]
    found = toy_law.judge(arms)
    assert_close(found["scatter"]["e / sigma"], [0.0] * 3, atol=1e-9, rtol=0)
    assert_close(found["scatter"]["e / tolerance"], [0.0] * 3, atol=1e-9, rtol=0)
    assert found["scatter"]["e"][0] > 1
    # 10 (e / 0.03)^2 = 5 + 10 (e / 0.06)^2 at e = 0.0245, or linearly between 0.02
    # and 0.05: the gap is 4.44 - 6.11 = -1.67 and 27.8 - 11.9 = 15.8.
    e = 0.02 + 0.03 * (5 - 10 / 3) / ((5 - 10 / 3) + (250 / 9 - 5 - 250 / 36))
    assert_close(found["crossings"][toy_law.VE.name], [e] * 2)
    # With the exact flow VE loses its floor of 5 more than KL.
    assert_close(found["gaps"][toy_law.VE.name][-1], [-5.0, -5.0])
    assert found["best"][0]["lambda1"] == [0.01, 0.01]
    # Half of all losses is injected: where the floor is 0, half is explained.
    assert_close(found["explained"][toy_law.KL.name], [0.5, 0.5])


def test_best_lambda1_falls_with_the_error() -> None:
    wide = toy2d.replace(toy_law.VE, name="VE 3e-2", weight=0.03)
    arms = [arm_of(toy_law.KL, 1, 0.01, 0.0, lambda e, _: 900 * e),
            arm_of(toy_law.VE, 1, 0.1, 2.0, lambda e, _: 200 * e),
            arm_of(wide, 1, 0.2, 8.0, lambda e, _: 10 * e)]
    assert [level["lambda1"] for level in toy_law.judge(arms)["best"]] == [
        [0.03], [0.03], [0.01], [0.01]]


# ------------------------------------------------------------------------------
# The command.


def run(out: Path, *flags: str) -> dict:
    return toy_law.main(["--smoke", "--seeds", "11", "--out", str(out), *flags])


def without_times(report: dict) -> dict:
    arms = [{k: v for k, v in arm.items() if k != "seconds"} for arm in report["arms"]]
    return report | {"arms": arms, "training_seconds": 0}


def test_smoke_runs_every_arm(tmp_path: Path, capsys: pytest.CaptureFixture,
                              monkeypatch: pytest.MonkeyPatch) -> None:
    report = run(tmp_path)
    names = [arm.name for arm in toy_law.TOKENIZERS + toy_law.ONCE]
    assert [arm["arm"]["name"] for arm in report["arms"]] == names
    assert json.loads((tmp_path / "toy_law.json").read_text()) == report
    for arm in report["arms"]:
        mine = toy_law.levels(arm)
        assert [row["training"] for row in mine] == TINY["trainings"] + 4 * [2.0]
        assert mine[-1]["kept"] == mine[-1]["e"] == 0 < mine[0]["e"]
        others = [(row["width"], row["training"]) for row in arm["rows"] if row not in mine]
        closer = [(8, 4), (8, 8), *[(w, t) for w in (4, 12) for t in (0.0625, 0.25, 1)]]
        assert others == (closer if (arm["arm"]["name"], 11) in toy_law.CLOSER else [])
    printed = capsys.readouterr().out
    assert all(f"| {name} |" in printed for name in names)

    # The table and the figure come from the JSON alone.
    monkeypatch.setattr(toy2d, "run", None)
    (tmp_path / "toy_law.png").rename(tmp_path / "first.png")
    again = toy_law.main(["--draw", "--out", str(tmp_path)])
    assert again == report and capsys.readouterr().out == printed
    assert (tmp_path / "toy_law.png").read_bytes() == (tmp_path / "first.png").read_bytes()


def test_a_study_that_was_stopped_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                          capsys: pytest.CaptureFixture) -> None:
    monkeypatch.setattr(toy_law, "TOKENIZERS", TWO)
    monkeypatch.setattr(toy_law, "ONCE", ())
    whole = run(tmp_path / "whole")
    study = toy_law.study

    def stopped(arm: toy2d.Arm, *rest) -> dict:
        if arm.name == TWO[1].name:
            raise runtime.Stopped("stopped; the same command goes on")
        return study(arm, *rest)

    monkeypatch.setattr(toy_law, "study", stopped)
    with pytest.raises(SystemExit):
        run(tmp_path / "parts")
    first, = (tmp_path / "parts").glob("arms/*.pt")
    kept = first.stat().st_mtime_ns
    monkeypatch.setattr(toy_law, "study", study)
    assert without_times(run(tmp_path / "parts")) == without_times(whole)
    assert first.stat().st_mtime_ns == kept


@pytest.mark.parametrize("text, said", [
    (None, "toy_law.json"), ("text", "is damaged"), ("{}", "is not what this study writes"),
    ('{"arms": [1]}', "is not what this study writes"),
    ('{"arms": []}', "is not what this study writes")])
def test_what_cannot_be_drawn_is_one_line(text: str | None, said: str, tmp_path: Path,
                                          capsys: pytest.CaptureFixture) -> None:
    if text is not None:
        (tmp_path / "toy_law.json").write_text(text)
    with pytest.raises(SystemExit) as stop:
        toy_law.main(["--draw", "--out", str(tmp_path)])
    line, = capsys.readouterr().err.splitlines()
    assert stop.value.code == 2 and said in line
    assert not (tmp_path / "toy_law.png").exists()
