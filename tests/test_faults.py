"""The campaign of faults: a small selection of every group, and its own eyes.

All of it is `python -m studies.faults`, which takes 20 minutes."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from studies.faults import bench, flags
from studies.faults.bench import Broken

ROOT = Path(__file__).parent.parent
linux = pytest.mark.skipif(not Path("/proc/self/cwd").exists(), reason="it needs Linux's /proc")

# ------------------------------------------------------------------------------
# A selection of the cases, in new processes: no fork of this one.


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    out = tmp_path_factory.mktemp("faults") / "faults.json"
    command = [sys.executable, "-m", "studies.faults", "--count", "3", "--seed", "1", "--case",
               "^(tokenizer|transformer|samples|two (tok|tra|sam))", "--out", str(out)]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert run.returncode in (0, 1), run.stderr
    return json.loads(out.read_text())["groups"]


@linux
@pytest.mark.parametrize(
    "group", ["kills", "signals", "disk", "pictures", "files", "flags", "pairs"])
def test_promises_are_kept(results, group):
    row = results[group]
    assert row["not"] == []
    assert row["as promised"] == row["cases"] == 3 - row["left out"]


# ------------------------------------------------------------------------------
# The campaign sees what differs.


def test_equal_runs_are_equal_and_others_are_not(tmp_path):
    def run(name, weight, loss, date):
        folder = tmp_path / name / "run"
        folder.mkdir(parents=True)
        # Channels last, as a training leaves it: equal values in another order.
        weight = torch.full((2, 3, 1, 1), weight).to(memory_format=torch.channels_last)
        torch.save({"model": {"w": weight}, "step": 4}, folder / "checkpoint.pt")
        lines = [{"date": date, "config": {}}, {"step": 4, "rec": loss}]
        (folder / "log.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\n")
        np.savez(folder / "samples.npz", arr_0=np.arange(3))
        return bench.contents(tmp_path / name, "run")

    first = run("a", 1.0, 0.5, "Monday")
    bench.same(run("b", 1.0, 0.5, "Tuesday"), first)
    with pytest.raises(Broken, match=r"checkpoint.pt differs in \['model'\]"):
        bench.same(run("c", 1.0 + 2**-23, 0.5, "Monday"), first)
    with pytest.raises(Broken, match="log.jsonl differs from line 2 on"):
        bench.same(run("d", 1.0, 0.25, "Monday"), first)
    with pytest.raises(Broken, match="unexpected"):
        bench.same(first | {"run/more.png": ""}, first)
    (tmp_path / "a/run/checkpoint.pt").write_bytes(b"text")
    with pytest.raises(Broken, match="checkpoint.pt is damaged"):
        bench.contents(tmp_path / "a", "run")


def test_temporary_files_are_found(tmp_path):
    (tmp_path / "run/images").mkdir(parents=True)
    (tmp_path / "run/checkpoint.pt").touch()
    bench.nothing_left(tmp_path)
    (tmp_path / "run/images/.123-unfinished-0000004.png").touch()
    with pytest.raises(Broken, match="123-unfinished-0000004"):
        bench.nothing_left(tmp_path)


@linux
def test_processes_that_are_left_are_found(tmp_path):
    # A session of its own does not hide it, nor does another parent.
    script = "import os, time; os.fork() or os.setsid(); time.sleep(60)"
    run = subprocess.Popen([sys.executable, "-c", script], cwd=tmp_path)
    bench.wait_for(lambda: len(bench.family(tmp_path)) == 2, FakeRun(tmp_path))
    run.kill()
    run.wait()
    with pytest.raises(Broken, match="1 processes are left"):
        bench.nobody_left(tmp_path, within=0.2)
    bench.nobody_left(tmp_path)   # it has killed what it found


class FakeRun:
    running, pid = True, 0

    def __init__(self, folder):
        self.folder = folder


class Ended(bench.Run):
    """A run that has ended, with this status and these words."""

    def __init__(self, status, said):
        self.status, self.text, self.script = status, said, "sample.py"

    said = property(lambda self: self.text)


BARS = "samples:  50%|█████     | 1/2 [00:00<00:00, 9.1it/s]\rread: 3it [00:01, 2.1it/s]\r"


def test_one_line_beside_a_bar_is_a_refusal():
    line = "sample.py: error: run/x.npz cannot be written [32, 3]: mend that"
    assert Ended(2, f"{BARS}\n{line}\n").refused("run/x.npz") == line
    for status, said in ((1, line), (2, ""), (2, f"{line}\nwarning"), (2, f"x{line}"),
                         (2, "sample.py: error: no name"), (2, f"{line} {'x' * 999}")):
        with pytest.raises(Broken):
            Ended(status, said).refused("run/x.npz")


def test_a_traceback_is_not_a_good_end():
    Ended(0, BARS).went_well()
    for status, said in ((0, "Traceback (most recent call last):"), (-9, ""), (2, "")):
        with pytest.raises(Broken):
            Ended(status, said).went_well()


def test_operations_on_files_are_seen_in_their_order(tmp_path, monkeypatch):
    # Opening to read is none, nor is what happens elsewhere.  A hook stays in this
    # process, but it looks at this folder alone.
    here, seen = tmp_path / "here", []
    here.mkdir()
    bench.watch_files(here, lambda event, path: seen.append(f"{event} {Path(path).name}"))
    (here / "run").mkdir()
    (here / "run/x").write_text("1")
    (here / "run/x").read_text()
    os.replace(here / "run/x", here / "run/y")
    (tmp_path / "elsewhere").touch()
    monkeypatch.chdir(here)
    os.remove("run/y")
    assert seen == ["os.mkdir run", "open x", "os.rename x", "os.remove y"]


def test_numeric_flags_are_found_by_themselves():
    found = dict(flags.numeric_flags(bench.SAMPLE))
    assert found["--interval"] == 2 and found["--count"] == 1 and "--out" not in found
    assert {"--lr", "--tau", "--seed"} <= dict(flags.numeric_flags(bench.TOKENIZER)).keys()


def test_numbers_that_are_not_finite_are_found(tmp_path):
    (tmp_path / "run").mkdir()
    torch.save({"model": {"w": torch.ones(2)}}, tmp_path / "run/checkpoint.pt")
    flags.all_finite(tmp_path)
    torch.save({"model": {"w": torch.tensor([1, torch.nan])}}, tmp_path / "run/checkpoint.pt")
    with pytest.raises(Broken, match="model w is not finite"):
        flags.all_finite(tmp_path)


def test_a_hostile_pickle_would_leave_a_trace(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save(bench.Hostile(), "bad.pt")
    bench.nothing_ran(tmp_path)
    torch.load("bad.pt", weights_only=False)
    with pytest.raises(Broken, match="executed"):
        bench.nothing_ran(tmp_path)
