"""Curves of runs: what is read from a log, its panels, and bad input.  The page of
the demo, which reads the same logs."""

import json
import os
from pathlib import Path

import pytest
from PIL import Image

from runtime import InputError
from studies import demo, plot, records


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


def test_what_cannot_be_drawn_is_left_out(tmp_path):
    run = write_log(
        tmp_path / "a",
        {"step": 1, "rec": 3.0, "by_t": [None, None], "note": "text", "kl": [1.0]},
        {"step": "two", "rec": 5.0}, {"step": float("nan"), "rec": 5.0}, {"rec": 5.0},
        {"step": 2, "changed": {"lr": 0.1}},    # the run goes on with another lr
        {"step": 3, "rec": float("nan"), "kl": 2.0, "by_t": ["x", float("inf"), 2.0]},
        {"step": 4, "rec": 10**400, "held_out": {"psnr": None, "of": {"a": 1}}},
        tail="[1]\n" + 9999 * "[" + '\n{"step": 5, "rec": 2.0}\n',
    )
    with open(run / "log.jsonl", "ab") as file:
        file.write(bytes(range(128, 256)))
    assert plot.read_curves(run) == {
        "rec": ([1, 5], [3.0, 2.0]), "by_t": ([3], [[None, None, 2.0]]), "kl": ([1], [[1.0]])}


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


def complaint(capsys, main, *flags: str) -> str:
    with pytest.raises(SystemExit) as stop:
        main(list(flags))
    line, = capsys.readouterr().err.splitlines()
    assert stop.value.code == 2
    return line


@pytest.mark.parametrize("flags, message", [
    (["{}/nowhere"], "nowhere is not a file"),
    (["{}/pipe"], "pipe is not a file"),
    (["{}/empty"], "empty/log.jsonl has no logged steps"),
    (["{}/binary"], "binary has no logged steps"),
    (["{}/words"], "hold no numbers"),
    (["{}/run", "--keys", "psnr"], "--keys psnr is in no log"),
    (["{}/run", "--out", "{}/curves.xyz"], "xyz"),
    (["{}/formula", "--out", "{}/curves.png"], "--out {}/curves.png: "),
    (["{}/run", "--out", "{}/binary/curves.png"], "binary/curves.png cannot be written"),
])
def test_bad_input_is_one_line_and_exit_2(tmp_path, capsys, flags, message):
    write_log(tmp_path / "run", {"step": 1, "rec": 3.0})
    write_log(tmp_path / "empty")
    write_log(tmp_path / "words", {"step": 1, "rec": "three"})
    write_log(tmp_path / "formula", {"step": 1, "$\\frac{$": 3.0})
    (tmp_path / "binary").write_bytes(bytes(range(256)))
    os.mkfifo(tmp_path / "pipe")
    before = set(tmp_path.iterdir())
    said = complaint(capsys, plot.main, *(flag.format(tmp_path) for flag in flags))
    assert message.format(tmp_path) in said and set(tmp_path.iterdir()) == before


def test_a_full_disk_is_one_line(tmp_path, capsys, monkeypatch):
    def full(*_, **__):
        raise OSError(28, "No space left on device")

    run = write_log(tmp_path / "run", {"step": 1, "rec": 3.0})
    monkeypatch.setattr(plot.plt.Figure, "savefig", full)
    said = complaint(capsys, plot.main, str(run), "--out", f"{tmp_path}/curves.png")
    assert "curves.png cannot be written (No space left" in said
    assert list(tmp_path.iterdir()) == [run]


@pytest.mark.parametrize("text, rows", [
    ('[{"of": "a"}]', [{"of": "a"}]), ("", None), ("{}", None), ("[1]", None), ("[", None),
    (5000 * "[", None), (b"\x80", None)])
def test_scores_are_a_list_of_rows_or_damaged(tmp_path, text, rows):
    path = tmp_path / "results.json"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    if rows:
        assert records.read_scores(path) == rows
    else:
        with pytest.raises(InputError, match="results.json is damaged"):
            records.read_scores(path)


# ------------------------------------------------------------------------------
# The page of the demo.


def write_demo(folder: Path) -> None:
    """What the demo leaves, with numbers of KL that are those of VE plus 40."""
    for place, more in ((folder, 0), (folder / "kl", 40)):
        made = {"recognised": 0.25 + more / 100, "recognised of real images": 1.0,
                "FD-Shapes": 12.34 + more, "FD-Shapes of real images": 5.6}
        held_out = {"psnr_mean": 21.0 + more, "balance": 1.5, "relative_noise": 0.013 + more / 100}
        write_log(place / "tokenizer", {"step": 1, "held_out": held_out | {"psnr_mean": 1}},
                  {"step": 2, "held_out": held_out})
        (place / "evaluation").mkdir()
        (place / "evaluation/results.json").write_text(json.dumps([{"metrics": made}]))
    arms = {"KL 1e-3": {"invalid [%]": [19.87]}, "VE 1e-2": {"invalid [%]": [9.87]}}
    (folder / "toy2d").mkdir()
    (folder / "toy2d/toy2d.json").write_text(json.dumps({"arms": arms}))


def test_the_page_of_the_demo_has_the_last_numbers_of_both(tmp_path):
    write_demo(tmp_path)
    said = " ".join(demo.page(tmp_path).split())
    for numbers in ("19.9 % 9.9 %", "41.30 % 1.30 %", "61.0 dB 21.0 dB", "- 1.50", "65 % 25 %",
                    "100 % of real", "52.3 12.3", "have 5.6"):
        assert numbers in said


@pytest.mark.parametrize("name, text, message", [
    ("", "", "is not a folder: `make demo`"),
    ("toy2d/toy2d.json", "", "toy2d.json is damaged"),
    ("toy2d/toy2d.json", "{}", "is not what `make demo` leaves (KeyError('arms'))"),
    ("toy2d/toy2d.json", '{"arms": [1]}', "is not what `make demo` leaves"),
    ("tokenizer/log.jsonl", "\0\1", "log.jsonl has no logged steps"),
    ("tokenizer/log.jsonl", '{"step": 1}', "is not what `make demo` leaves"),
    ("evaluation/results.json", "[]", "is not what `make demo` leaves"),
    ("evaluation/results.json", "[1", "results.json is damaged"),
    ("kl/evaluation/results.json", '[{"of": 1}]', "is not what `make demo` leaves"),
    ("tokenizer/checkpoint.pt", "", "checkpoint.pt is"),
])
def test_a_damaged_demo_is_one_line(tmp_path, capsys, name, text, message):
    folder = tmp_path / "demo"
    if name:
        folder.mkdir()
        write_demo(folder)
        (folder / name).write_text(text)
    before = set(tmp_path.rglob("*"))
    assert message in complaint(capsys, demo.main, str(folder))
    assert set(tmp_path.rglob("*")) == before
