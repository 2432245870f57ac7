"""Curves of runs: what is read from a log, its panels, and bad input."""

import json
from pathlib import Path

import pytest
from PIL import Image

from runtime import InputError
from studies import plot


def write_log(folder: Path, *lines: dict, tail: str = "") -> Path:
    folder.mkdir(parents=True)
    header = {"command": "python", "config": {"steps": 4}}
    text = "\n".join(json.dumps(line) for line in (header, *lines))
    (folder / "log.jsonl").write_text(text + "\n" + tail)
    return folder


def test_a_log_is_read_by_step_and_nested_scores_by_dotted_name(tmp_path):
    run = write_log(
        tmp_path / "a",
        {"step": 1, "rec": 3.0, "by_t": [1.0, None]},
        {"step": 2, "rec": 2.0, "held_out": {"psnr": 20.0}},
        tail='{"step": 3, "re',
    )
    curves = plot.read_curves(run)
    assert curves == {
        "rec": ([1, 2], [3.0, 2.0]),
        "by_t": ([1], [[1.0, None]]),
        "held_out.psnr": ([2], [20.0]),
    }
    assert plot.read_curves(run / "log.jsonl") == curves


def test_panels_are_all_numbers_or_those_asked_for():
    runs = {
        "a": {"rec": ([1], [3.0]), "by_t": ([1], [[1.0]])},
        "b": {"kl": ([1], [2.0])},
    }
    assert plot.choose_keys(runs, None) == ["rec", "kl"]
    assert plot.choose_keys(runs, ["by_t"]) == ["by_t"]
    with pytest.raises(InputError, match="psnr is in no log; they have rec"):
        plot.choose_keys(runs, ["psnr"])


def test_a_run_keeps_its_colour_and_decades_get_a_logarithmic_axis():
    figure, axes = plot.plt.subplots(1, 3)
    runs = {
        "a": {"rec": ([1, 2], [100.0, 1.0]), "by_t": ([5], [[0.5, None, 0.7]])},
        "b": {"rec": ([1, 2], [90.0, 80.0]), "kl": ([1], [2.0])},
    }
    for axis, key in zip(axes, ("rec", "by_t", "kl")):
        plot.draw_panel(axis, key, runs)
    rec, by_t, kl = (axis.lines for axis in axes)
    assert [list(line.get_ydata()) for line in rec] == [[100, 1], [90, 80]]
    assert list(by_t[0].get_xdata()) == [0, 1, 2]
    assert rec[1].get_color() == kl[0].get_color() != rec[0].get_color()
    assert [axis.get_yscale() for axis in axes] == ["log", "linear", "linear"]
    plot.plt.close(figure)


def test_two_runs_of_one_name_are_told_apart_by_their_folders(tmp_path, monkeypatch):
    runs = [
        write_log(tmp_path / name / "run", {"step": 1, "rec": 3.0})
        for name in "ab"
    ]
    shown = {}
    draw = plot.draw
    monkeypatch.setattr(plot, "draw", lambda r, *a: (shown.update(r), draw(r, *a)))
    plot.main([*map(str, runs), "--out", str(tmp_path / "new" / "curves.png")])
    assert list(shown) == list(map(str, runs))
    with Image.open(tmp_path / "new" / "curves.png") as figure:
        assert figure.size[0] > 300


@pytest.mark.parametrize("flags, message", [
    (["{}/nowhere"], "nowhere is not there"),
    (["{}/empty"], "has no logged steps yet"),
    (["{}/run", "--keys", "psnr"], "--keys psnr is in no log"),
    (["{}/run", "--out", "{}/curves.xyz"], "xyz"),
])
def test_bad_input_is_one_line_and_exit_2(tmp_path, capsys, flags, message):
    write_log(tmp_path / "run", {"step": 1, "rec": 3.0})
    write_log(tmp_path / "empty")
    with pytest.raises(SystemExit) as stop:
        plot.main([flag.format(tmp_path) for flag in flags])
    error = capsys.readouterr().err.strip().splitlines()
    assert stop.value.code == 2 and len(error) == 1 and message in error[0]
    assert not (tmp_path / "curves.xyz").exists()
