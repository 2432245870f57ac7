"""Curves of runs: what is read from a log, which panels there are, and bad input."""

import json
from pathlib import Path

import pytest
from PIL import Image

import plot
from runtime import InputError


def write_log(folder: Path, *lines: dict, tail: str = "") -> Path:
    folder.mkdir(parents=True)
    text = "\n".join(json.dumps(line) for line in ({"command": "python", "config": {"steps": 4}}, *lines))
    (folder / "log.jsonl").write_text(text + "\n" + tail)
    return folder


def test_curves_are_read_by_step_and_held_out_scores_by_dotted_name(tmp_path):
    run = write_log(tmp_path / "a", {"step": 1, "rec": 3.0, "by_t": [1.0, None]}, {"step": 2, "rec": 2.0},
                    {"step": 2, "held_out": {"psnr_mean": 20.0}}, tail='{"step": 3, "re')
    curves = plot.read_curves(run)
    assert curves == {"rec": ([1, 2], [3.0, 2.0]), "by_t": ([1], [[1.0, None]]),
                      "held_out.psnr_mean": ([2], [20.0])}
    assert plot.read_curves(run / "log.jsonl") == curves


def test_panels_are_all_numbers_or_those_asked_for(tmp_path):
    runs = {"a": {"rec": ([1], [3.0]), "by_t": ([1], [[1.0]])}, "b": {"kl": ([1], [2.0])}}
    assert plot.choose_keys(runs, None) == ["rec", "kl"]
    assert plot.choose_keys(runs, ["by_t"]) == ["by_t"]
    with pytest.raises(InputError, match="--keys psnr is in none of these logs; they have rec, by_t, kl"):
        plot.choose_keys(runs, ["psnr"])


def test_every_run_has_its_line_and_decades_a_log_axis():
    figure, axes = plot.plt.subplots(1, 2)
    runs = {"a": {"rec": ([1, 2], [100.0, 1.0]), "by_t": ([5], [[0.5, None, 0.7]])},
            "b": {"rec": ([1, 2], [90.0, 80.0])}}
    plot.draw_panel(axes[0], "rec", runs)
    plot.draw_panel(axes[1], "by_t", runs)
    assert [list(line.get_ydata()) for line in axes[0].lines] == [[100, 1], [90, 80]]
    assert axes[0].get_yscale() == "log" and axes[1].get_yscale() == "linear"
    assert list(axes[1].lines[0].get_xdata()) == [0, 1, 2]
    plot.plt.close(figure)


def test_a_run_has_one_colour_in_every_panel():
    figure, axes = plot.plt.subplots(1, 2)
    runs = {"a": {"kl": ([1], [1.0])}, "b": {"kl": ([1], [1.0]), "sigma2": ([1], [2.0])}}
    for axis, key in zip(axes, ("kl", "sigma2")):
        plot.draw_panel(axis, key, runs)
    assert axes[0].lines[1].get_color() == axes[1].lines[0].get_color() != axes[0].lines[0].get_color()
    plot.plt.close(figure)


def test_main_draws_two_runs(tmp_path, capsys):
    runs = [write_log(tmp_path / name / "tokenizer", {"step": 1, "rec": 3.0, "sigma2": 0.1}) for name in "ab"]
    plot.main([*map(str, runs), "--out", str(tmp_path / "curves.png")])
    with Image.open(tmp_path / "curves.png") as figure:
        assert figure.size[0] > 600
    assert "curves.png" in capsys.readouterr().out


@pytest.mark.parametrize("flags, message", [
    (["{}/nowhere"], "nowhere is not there"),
    (["{}/empty"], "has no logged steps yet"),
    (["{}/run", "--keys", "psnr"], "--keys psnr is in none"),
    (["{}/run", "--out", "{}/curves.xyz"], "xyz"),
])
def test_bad_input_is_one_line_and_exit_2(tmp_path, capsys, flags, message):
    write_log(tmp_path / "run", {"step": 1, "rec": 3.0})
    write_log(tmp_path / "empty")
    with pytest.raises(SystemExit) as stop:
        plot.main([flag.format(tmp_path) for flag in flags])
    error = capsys.readouterr().err.strip().splitlines()
    assert stop.value.code == 2 and len(error) == 1 and message in error[0]
