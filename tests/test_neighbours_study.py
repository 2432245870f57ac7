"""The study of GAE and DGAE: its commands are ones that the stages take, and its table
and figure are those of the files that an arm leaves.  No arm is trained here."""

import json
import shlex
from pathlib import Path

import pytest

import evaluate
import sample
import train_dit
import train_teacher
import train_tokenizer
from studies import neighbours

STAGES = {f"{stage.__name__}.py": stage for stage in (
    evaluate, sample, train_dit, train_teacher, train_tokenizer)}


@pytest.mark.parametrize("smoke, data", [(False, "shapes"), (True, "shapes"), (False, "photos")])
def test_every_command_is_one_that_a_stage_takes(tmp_path, monkeypatch, smoke, data):
    """A tokenizer is scored under the flags with which it was trained."""
    monkeypatch.setattr("runtime.regular", Path)   # the checkpoints are not there
    for name, arm in neighbours.ARMS.items():
        made = neighbours.commands(arm, 3, tmp_path / "arm", tmp_path / "teacher/checkpoint.pt",
                                   data, 500, True, smoke)
        ways = {path: shlex.split(command) for path, command in made.items()}
        parsed = {path: STAGES[words[0]].parse(words[1:]) for path, words in ways.items()}
        for path, args in parsed.items():
            assert path.parent == args.out, name
            assert args.seed == (3 if "evaluate" not in made[path] else 0)
        steps = [args.decode_steps for args in parsed.values() if hasattr(args, "probe")
                 and args.decode_steps and not args.probe]
        assert tuple(steps) == (arm.decode_steps if data == "shapes" else ())
        assert all(args.data == data for args in parsed.values() if "data" in args and args.data)
        assert ("generation" in {path.parent.name for path in made}) == arm.generates
        assert (tmp_path / "teacher/checkpoint.pt" in made) == (arm.question != "dgae")


def test_tokenizers_may_train_longer(tmp_path):
    made = neighbours.commands(neighbours.ARMS["DGAE, VE"], 1, tmp_path, tmp_path / "teacher.pt",
                               "shapes", 500, False, False, 6900)
    first = shlex.split(made[tmp_path / "tokenizer/checkpoint.pt"])
    assert train_tokenizer.parse(first[1:]).steps == 6900


def leave(folder: Path, psnr: float, steps: tuple[int, ...] = (), fd: str = "FD-Shapes") -> None:
    """The files of an arm that has been trained and scored."""
    curve = [{"noise": kind, "level": level, "PSNR": psnr - level}
             for kind, level in (("none", 0.0), ("absolute", 0.5), ("relative", 0.5))]
    row = {"metrics": {"PSNR": psnr, "recognised": 0.5, f"r{fd}": 2.0}, "curve": curve}
    for name in ("scores", *(f"scores-{k}" for k in steps)):
        (folder / name).mkdir(parents=True)
        (folder / name / "results.json").write_text(json.dumps([row]))
    (folder / "tokenizer").mkdir()
    (folder / "tokenizer/log.jsonl").write_text(
        '{"config": {}}\n{"step": 2, "held_out": {"sigma2": 0.25, "spread": 1.0}}\n')


def test_the_table_has_mean_and_deviation_over_seeds(tmp_path):
    """PSNR of 20 and 22 dB: the mean is 21, and the sample deviation the root of 2."""
    arm = neighbours.ARMS["DGAE, VE"]
    for seed, psnr in ((1, 20.0), (2, 22.0)):
        leave(tmp_path / str(seed), psnr, arm.decode_steps)
    found = {"DGAE, VE": {str(s): neighbours.numbers_of(arm, tmp_path / str(s)) for s in (1, 2)}}
    line = neighbours.table(found).splitlines()[2]
    assert line.startswith("| DGAE, VE | 2 | 0.25 ± 0 | 0.5 ± 0 | 21 ± 1 | 20.5 ± 1 | 0.5 ± 0 | 2 ± 0 |")
    assert [*found["DGAE, VE"]["1"]["decode_steps"]] == [1, 4, 10, 20, 50]
    neighbours.draw(json.loads(json.dumps(found)), tmp_path / "figure.png")
    assert (tmp_path / "figure.png").stat().st_size > 10_000


def test_deviations_have_one_digit():
    assert [neighbours.spread(v) for v in ([2.0], [400.0, 420.0], [0.5, 0.52])] == [
        "2", "410 ± 10", "0.51 ± 0.01"]


def test_the_distance_may_be_fid(tmp_path):
    leave(tmp_path, 20.0, fd="FID")
    (tmp_path / "generation").mkdir()
    (tmp_path / "generation/results.json").write_text(json.dumps(
        [{"metrics": {"FID of real images": 1.0, "FID": 3.0}}]))
    found = neighbours.numbers_of(neighbours.ARMS["GAE, VE"], tmp_path)
    assert found["rFD"] == 2 and found["generation"]["FD"] == 3


def test_dynamic_noise_is_that_of_the_command(tmp_path):
    """C = 0.2 is a deviation of 0.25, and the latent's spread is 2."""
    leave(tmp_path / "1", 20.0)
    (tmp_path / "1/tokenizer/log.jsonl").write_text(
        '{"config": {"sigma": 0.2}}\n{"step": 2, "held_out": {"spread": 2.0}}\n')
    found = neighbours.numbers_of(neighbours.ARMS["GAE, C = 0.1"], tmp_path / "1")
    assert found["sigma2"] == pytest.approx(0.0625)
    assert found["noise / spread"] == pytest.approx(0.125)


def test_differences_are_paired_by_seed():
    """Differences of 1, 2, 3: a mean of 2, and an interval of 4.303 / sqrt 3 = 2.48."""
    a, b = neighbours.PAIRS[0]
    rows = {a: {"1": 11.0, "2": 22.0, "3": 33.0, "4": 0.0}, b: {"3": 30.0, "2": 20.0, "1": 10.0}}
    results = {name: {seed: {"PSNR": value} for seed, value in column.items()}
               for name, column in rows.items()}
    assert neighbours.difference(results, a, b, "PSNR") == "PSNR: +2 ± 2.5"
    keys = dict.fromkeys(("PSNR under 0.5", "rFD"), 0.0)   # photographs have no judge
    for row in [row for column in results.values() for row in column.values()]:
        row |= keys | {"generation": {"recognised": row["PSNR"], "FD": 1.0}}
    said, = neighbours.differences(results).splitlines()
    assert said == (f"{a}, minus {b}: PSNR: +2 ± 2.5; PSNR under 0.5: +0 ± 0; rFD: +0 ± 0; "
                    "generation recognised: +2 ± 2.5; generation FD: +0 ± 0")


def test_without_a_finished_arm_there_is_one_line(tmp_path, capsys):
    with pytest.raises(SystemExit) as ended:
        neighbours.main(["--redraw", "--out", str(tmp_path / "no"),
                         "--results", str(tmp_path / "n.json")])
    assert ended.value.code == 2
    assert "no finished arm" in capsys.readouterr().err
