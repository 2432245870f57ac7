"""The runtime: the command line, random streams, files, the averaged weights,
the log, and what two processes do together."""

import errno
import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import runtime
import torch
from runtime import InputError, Runtime
from torch import nn
from torch.testing import assert_close

CPU = torch.device("cpu")


# ------------------------------------------------------------------------------
# The command line.


def test_input_error_becomes_one_line_and_exit_status_2(capsys):
    @runtime.command
    def main() -> None:
        raise InputError("--size 30 is wrong; use 32")

    with pytest.raises(SystemExit) as stop:
        main()
    line, = capsys.readouterr().err.splitlines()
    assert stop.value.code == 2
    assert line == "test_runtime.py: error: --size 30 is wrong; use 32"


def test_a_bug_keeps_its_traceback():
    @runtime.command
    def main() -> None:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        main()


def said_by(action, capsys) -> tuple[int, str]:
    """Status and the one line on stderr of a command that does `action`."""
    with pytest.raises(SystemExit) as stop:
        runtime.command(action)()
    line, = capsys.readouterr().err.splitlines()
    return stop.value.code, line


def raiser(error: BaseException):
    def main() -> None:
        raise error
    main.__module__ = __name__
    return main


@pytest.mark.parametrize("error, status, said", [
    (OSError(errno.ENOSPC, "No space left on device", "a.pt"), 2, "a.pt: No space left on device"),
    (MemoryError(), 2, "out of memory"),
    (RuntimeError("DefaultCPUAllocator: can't allocate memory"), 2, "out of memory"),
    (RuntimeError("[../gloo/transport/tcp/pair.cc:1] closed by peer"), 2, "another process"),
    (OSError("Caught OSError in worker.\nTraceback\nOSError: read"), 2, "a file: OSError: read")])
def test_what_the_machine_refuses_becomes_one_line(error, status, said, capsys):
    code, line = said_by(raiser(error), capsys)
    assert code == status and said in line


def test_other_runtime_errors_keep_their_traceback():
    with pytest.raises(RuntimeError, match="shapes"):
        runtime.command(raiser(RuntimeError("shapes do not fit")))()


# ------------------------------------------------------------------------------
# Signals.


@pytest.mark.parametrize("number, status", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_ends_a_stage_in_one_line(number, status, capsys):
    def main() -> None:
        signal.raise_signal(number)
        raise AssertionError("went on")

    def other(*_) -> None:
        pass

    before = signal.signal(number, other)
    try:
        code, line = said_by(main, capsys)
        assert code == status and line.endswith("stopped; the same command goes on")
        assert signal.getsignal(number) is other
    finally:
        signal.signal(number, before)


def test_a_signal_that_a_library_turns_into_an_error_is_still_a_signal(capsys):
    @runtime.command
    def main():
        try:
            signal.raise_signal(signal.SIGTERM)
        except BaseException:
            raise ValueError("Invalid bounding box") from None   # as matplotlib's does

    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 143
    assert capsys.readouterr().err.endswith("stopped; the same command goes on\n")


def test_a_signal_at_the_end_does_not_hide_the_line(capsys, monkeypatch):
    monkeypatch.setattr(runtime, "finish", lambda: signal.raise_signal(signal.SIGTERM))
    code, line = said_by(raiser(InputError("--size 30 is wrong")), capsys)
    assert code == 2 and line.endswith("--size 30 is wrong")


def test_a_training_finishes_its_step(capsys):
    seen = []

    def main() -> None:
        for step in runtime.steps("test", 3, 10, Runtime(CPU)):
            if step == 5:
                signal.raise_signal(signal.SIGTERM)
                signal.raise_signal(signal.SIGTERM)   # at once: torchrun's echo of the first
            seen.append(step)
            if runtime.stop_asked():
                raise runtime.Stopped(f"stopped at step {step}")

    with pytest.raises(SystemExit) as stop:
        runtime.command(main)()
    assert stop.value.code == 143 and seen == [3, 4, 5]
    assert capsys.readouterr().err.endswith("stopped at step 5\n")


def test_a_signal_that_comes_while_processes_agree_is_not_lost(monkeypatch):
    monkeypatch.setattr(runtime.dist, "is_initialized", lambda: True)
    monkeypatch.setattr(runtime.dist, "all_reduce", lambda *_: signal.raise_signal(signal.SIGINT))
    with runtime.signals.caught():
        runtime.signals.waits = True
        assert not runtime.stop_asked()
        monkeypatch.setattr(runtime.dist, "all_reduce", lambda *_: None)
        assert runtime.stop_asked() and runtime.signals.received == signal.SIGINT


STUBBORN = """
import multiprocessing, time
import runtime

@runtime.command
def main():
    child = multiprocessing.get_context("fork").Process(target=time.sleep, args=(60,))
    child.start()
    for step in runtime.steps("test", 0, 1, runtime.Runtime("cpu")):
        print(child.pid, flush=True)
        time.sleep(60)

main()
"""


def test_the_signal_of_another_process_and_the_own_one_are_one(monkeypatch):
    """torchrun's agent has died: each process finds out by itself, within half a second.
    The second signal must not end the process while it saves."""
    monkeypatch.setattr(runtime.dist, "is_initialized", lambda: True)
    monkeypatch.setattr(runtime.dist, "all_reduce", lambda number, _: number.fill_(signal.SIGTERM))
    monkeypatch.setattr(os, "_exit", lambda status: pytest.fail("it ended at once"))
    with runtime.signals.caught():
        runtime.signals.waits = True
        assert runtime.stop_asked()
        signal.raise_signal(signal.SIGTERM)
        assert runtime.signals.received == signal.SIGTERM


def test_a_second_signal_ends_everything_at_once():
    process = subprocess.Popen([sys.executable, "-c", STUBBORN], stdout=subprocess.PIPE,
                               stderr=subprocess.DEVNULL, cwd=Path(runtime.__file__).parent)
    child = int(process.stdout.readline())
    process.send_signal(signal.SIGINT)
    time.sleep(1.2)
    assert process.poll() is None
    process.send_signal(signal.SIGTERM)
    assert process.wait(10) == 143
    assert gone(child, within=5)


LATE = """
import atexit
import signal
import runtime

@runtime.command
def main():
    atexit.register(signal.raise_signal, signal.SIGINT)
    signal.raise_signal(signal.SIGTERM)

main()
"""


def test_a_signal_that_comes_while_the_interpreter_ends_changes_nothing(tmp_path):
    (tmp_path / "late.py").write_text(LATE)
    ended = subprocess.run(
        [sys.executable, tmp_path / "late.py"], capture_output=True, text=True,
        env={**os.environ, "PYTHONPATH": str(Path(runtime.__file__).parent)})
    assert ended.returncode == 143 and ended.stderr.count("\n") == 1


def running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().split(") ")[1][0] != "Z"
    except OSError:
        return False


def gone(pid: int, within: float) -> bool:
    until = time.monotonic() + within
    while running(pid) and time.monotonic() < until:
        time.sleep(0.1)
    return not running(pid)


@pytest.mark.parametrize("orphaned", [True, False])
def test_a_process_ends_with_its_parent(orphaned):
    # The parent must live until the child has looked at it: it waits for its line.
    code = """
import os, time, runtime
ready, other = os.pipe()
if not os.fork():
    runtime.end_with_parent()
    print(os.getpid(), flush=True)
    os.write(other, b"x")
    time.sleep(60)
os.read(ready, 1)
os._exit(0) if %r else time.sleep(60)
""" % orphaned
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE,
                               cwd=Path(runtime.__file__).parent)
    child = int(process.stdout.readline())
    try:
        assert gone(child, within=10 if orphaned else 2) == orphaned
    finally:
        process.kill()
        if running(child):
            os.kill(child, signal.SIGKILL)


METHODS = """
import multiprocessing, time
import runtime

def work():
    runtime.helper()
    time.sleep(1.5)

if __name__ == "__main__":
    for method in ("fork", "spawn", "forkserver"):
        process = multiprocessing.get_context(method).Process(target=work)
        process.start()
        process.join()
        print(method, process.exitcode, flush=True)
"""


def test_a_helper_works_as_long_as_its_parent_lives(tmp_path):
    # The parent of a process of forkserver is the server, for the system.
    (tmp_path / "methods.py").write_text(METHODS)
    run = subprocess.run([sys.executable, tmp_path / "methods.py"], capture_output=True, text=True,
                         env=os.environ | {"PYTHONPATH": str(Path(runtime.__file__).parent)})
    assert run.stdout.splitlines() == ["fork 0", "spawn 0", "forkserver 0"]


# ------------------------------------------------------------------------------
# Flags.


PRESETS = {"demo": {"steps": 10, "lr": 0.1, "warmup": 5}, "paper": {"steps": 900, "lr": 0.2}}


def parse(*argv: str):
    parser = runtime.Parser("A stage that\ntrains.\n\nMore about it.")
    parser.add_argument("--preset", choices=PRESETS, default="demo")
    parser.add_argument("--steps", type=runtime.positive_int, help="of the optimiser")
    parser.add_argument("--lr", type=runtime.positive, help="its rate")
    runtime.add_running_flags(parser)
    return parser.parse(argv, PRESETS, {"steps": 2})


@pytest.mark.parametrize("argv, steps, lr", [
    ("", 10, 0.1), ("--preset paper", 900, 0.2), ("--smoke", 2, 0.1),
    ("--smoke --preset=paper", 2, 0.2), ("--preset paper --smoke --steps 7", 7, 0.2)])
def test_flags_override_smoke_and_smoke_overrides_the_preset(argv, steps, lr):
    args = parse(*argv.split())
    assert (args.steps, args.lr) == (steps, lr)
    # A constant that is no flag belongs to its own preset alone.
    assert getattr(args, "warmup", None) == (None if "paper" in argv else 5)


@pytest.mark.parametrize("argv, said", [
    ("--steps 0", "--steps: 0 is not a whole number from 1"),
    ("--steps 1.5", "1.5 is not"), ("--steps many", "many is not"),
    ("--lr nan", "nan is not"), ("--preset x", "'x'"), ("--st 3", "--st"),
    ("--preset", "--preset")])
def test_a_wrong_flag_ends_in_one_line(argv, said, capsys):
    with pytest.raises(SystemExit) as stop:
        parse(*argv.split())
    line, = capsys.readouterr().err.splitlines()
    assert stop.value.code == 2 and said in line


def test_help_shows_the_numbers_of_the_chosen_preset(capsys):
    with pytest.raises(SystemExit):
        parse("--preset", "paper", "--help")
    said = capsys.readouterr().out
    assert "A stage that\ntrains." in said and "More about it" not in said
    assert "(default: 900)" in said and "(default: 0.2)" in said


def test_the_ranges_of_numbers():
    # The edges of each range, first those inside and then those outside.
    edges = {
        runtime.positive_int: ("1 7", "0 -1 2.0"), runtime.natural_int: ("0 7", "-1 0.5"),
        runtime.positive: ("1e-9 3", "0 -1 inf"), runtime.fraction: ("0 0.999", "1 -0.1"),
        runtime.non_negative: ("0 2.5", "-1e-9 inf nan"), runtime.finite: ("-3 0", "inf nan x"),
        runtime.share: ("0 1", "-0.1 1.1 nan"), runtime.seed: ("0 9223372036854775807",
                                                               "-1 9223372036854775808 1.5")}
    for kind, (inside, outside) in edges.items():
        assert [kind(text) for text in inside.split()] == [eval(text) for text in inside.split()]
        for text in outside.split():
            with pytest.raises(runtime.argparse.ArgumentTypeError, match=text):
                kind(text)


def test_a_run_is_resumed_only_by_its_own_command():
    old = {"lr": 0.1, "steps": 10, "loss": "ve"}
    runtime.check_same_command(old, old | {"steps": 20, "new": 1}, {"steps"}, "run")
    with pytest.raises(InputError, match=r"--loss ve \(now kl\)"):
        runtime.check_same_command(old, old | {"loss": "kl"}, {"steps"}, "run")


def test_changed_images_are_refused_or_accepted_by_a_flag():
    old = {"lr": 0.1, "data_sha256": "a", "accept_data": False}
    new = old | {"data_sha256": "b"}
    runtime.check_same_command({"lr": 0.1}, new, set(), "run")   # begun before it was noted
    with pytest.raises(InputError, match="images have changed since run was begun.*--accept-data"):
        runtime.check_same_command(old, new, set(), "run")
    runtime.check_same_command(old, new | {"accept_data": True}, set(), "run")


def test_unknown_and_absent_devices_are_refused():
    with pytest.raises(InputError, match="choose one of"):
        runtime.start("abacus")
    if not torch.cuda.is_available():
        with pytest.raises(InputError, match="CUDA card"):
            runtime.start("cuda")


@pytest.mark.parametrize("device, chosen, expected", [
    ("cpu", None, False), ("cpu", True, True), ("cpu", False, False),
    ("cuda", None, True), ("cuda", True, True), ("cuda", False, False)])
def test_compiling_is_the_default_on_cuda_alone(monkeypatch, device, chosen, expected):
    compiled = []
    monkeypatch.setattr(nn.Module, "compile", lambda net, dynamic: compiled.append((net, dynamic)))
    nets = nn.Linear(1, 1), nn.Linear(2, 2)
    assert Runtime(torch.device(device)).compile(chosen, *nets) is expected
    assert compiled == ([(net, False) for net in nets] if expected else [])


def test_more_than_eight_shapes_of_one_class_are_compiled():
    """PyTorch's own limit is eight graphs for one function.  forward is one for all."""
    class Net(nn.Module):
        def __init__(self, n):
            super().__init__()
            self.layer = nn.Linear(n, 1)

        def forward(self, x):
            return self.layer(x)

    nets, seen = [Net(n) for n in range(1, 12)], []
    Runtime(CPU).compile(True)

    def backend(graph, inputs):
        seen.append(1)
        return graph.forward

    for n, net in enumerate(nets, 1):
        net.compile(backend=backend, dynamic=False)
        net(torch.ones(1, n))
    assert len(seen) == 11


@pytest.mark.parametrize("room, given, expected", [
    (84, (None, None), (1, False)), (84, (4, None), (4, False)), (84, (None, True), (1, True)),
    (83, (None, None), (2, False)), (42, (None, False), (2, False)),
    (6, (None, None), (4, True)),      # not one image, without recomputing
    (6, (None, False), (12, False)), (6, (12, None), (12, True)),
    (1, (None, None), (12, True))])    # not at all: the last way is tried
def test_the_parts_of_a_batch_fit_the_memory(monkeypatch, room, given, expected):
    """12 images, of which 7 GiB are kept or 2, and 10^9 numbers, which want 18 bytes each."""
    free = int((room * 2**30 + 18e9) * 1.1) + 2 * 2**30 + 1
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (free, 0))
    sizes = 12, (7 * 2**30, 2 * 2**30), 10**9
    assert runtime.fit(Runtime(torch.device("cuda")), *sizes, *given) == expected
    parts, again = given
    assert runtime.fit(Runtime(CPU), *sizes, *given) == (parts or 1, bool(again))


# ------------------------------------------------------------------------------
# Random streams.


def draw(*stream: int | str, seed: int = 0) -> list[float]:
    return torch.randn(4, generator=runtime.generator(seed, *stream)).tolist()


def test_streams_are_reproducible_and_distinct():
    assert draw("eps", 7) == draw("eps", 7)
    others = [draw("eps", 8), draw("t", 7), draw("eps", 7, seed=1), draw("eps", "7"), draw("eps7")]
    assert all(draw("eps", 7) != other for other in others)
    # Whoever changes the streams changes every published run.
    assert runtime.generator(0, "eps", 7).initial_seed() == 7357432837809664868


def test_two_ranks_share_out_the_draw_of_one():
    one, pair = Runtime(CPU), [Runtime(CPU, rank, 2) for rank in (0, 1)]
    whole = runtime.global_randn((6, 3), one, 0, "eps", 5)
    parts = [runtime.global_randn((3, 3), rt, 0, "eps", 5) for rt in pair]
    assert_close(torch.stack(parts, 1).flatten(0, 1), whole, rtol=0, atol=0)
    whole = runtime.global_rand(6, one, 0, "t", 5)
    parts = [runtime.global_rand(3, rt, 0, "t", 5) for rt in pair]
    assert_close(torch.stack(parts, 1).flatten(), whole, rtol=0, atol=0)


# ------------------------------------------------------------------------------
# Files.


def test_a_file_appears_whole_and_only_at_the_end(tmp_path):
    path = tmp_path / "new/folder/value.json"
    with runtime.atomic(path) as temporary:
        temporary.write_text("[1]")
        assert not path.exists() and temporary.suffix == ".json"
        assert str(os.getpid()) in temporary.name
    runtime.write_json(path, {"a": 1})
    assert path.read_text() == '{\n "a": 1\n}\n' and os.listdir(path.parent) == ["value.json"]


def test_a_write_that_fails_half_way_leaves_the_old_file_alone(tmp_path):
    path = tmp_path / "value.json"
    runtime.write_json(path, 1)
    with pytest.raises(KeyboardInterrupt), runtime.atomic(path) as temporary:
        temporary.write_text("half")
        raise KeyboardInterrupt
    assert path.read_text() == "1\n" and os.listdir(tmp_path) == ["value.json"]


def test_a_killed_process_leaves_the_old_file(tmp_path):
    path = tmp_path / "value.json"
    runtime.write_json(path, 1)
    if os.fork() == 0:
        with runtime.atomic(path) as temporary:
            temporary.write_text("half")
            os.kill(os.getpid(), signal.SIGKILL)
    assert os.waitstatus_to_exitcode(os.wait()[1]) == -signal.SIGKILL
    assert path.read_text() == "1\n"
    runtime.write_json(path, 2)
    assert path.read_text() == "2\n"


def test_what_the_disk_refuses_names_the_file(tmp_path):
    (tmp_path / "file").touch()
    for path in (tmp_path / "file/below.json", tmp_path / "folder"):
        (tmp_path / "folder").mkdir(exist_ok=True)
        with pytest.raises(InputError, match=f"{path} cannot be written"):
            runtime.write_json(path, 1)
    with pytest.raises(InputError, match="No space left"), runtime.atomic(tmp_path / "a"):
        raise OSError(errno.ENOSPC, "No space left on device")
    assert sorted(os.listdir(tmp_path)) == ["file", "folder"]


@pytest.mark.parametrize("content", [b"", b"[1]", b"{", b"\xff\xfe", b"[" * 10_000, b"NaN", None])
def test_json_that_is_damaged_is_one_line(tmp_path, content):
    path = tmp_path / "a.json"
    os.mkfifo(path) if content is None else path.write_bytes(content)
    with pytest.raises(InputError, match=str(path)):
        runtime.read_json(path)


OTHER = """
import runtime, sys
from pathlib import Path
try:
    runtime.lock(Path(sys.argv[1]), shared=len(sys.argv) > 2)
    print("has it")
except runtime.InputError as error:
    print(error)
"""


def other(folder, *shared) -> str:
    return subprocess.run([sys.executable, "-c", OTHER, folder, *shared], capture_output=True,
                          text=True, cwd=Path(runtime.__file__).parent).stdout.strip()


def test_a_folder_belongs_to_one_process_at_a_time(tmp_path):
    folder, left = tmp_path / "run", tmp_path / "run/.123-unfinished-checkpoint.pt"
    folder.mkdir()
    left.touch()
    rt = Runtime(CPU)
    runtime.claim(rt, folder)
    runtime.claim(rt, folder)          # a second time by the same process
    assert not left.exists()           # of a process that was killed
    assert f"{folder} is in use by process {os.getpid()} on" in other(folder)
    runtime.lock(folder, shared=True)
    assert other(folder, "shared") == "has it" and "in use" in other(folder)
    assert (folder / ".lock").exists()   # the other reader has left it to this one
    (folder / "file").touch()
    runtime.finish()
    assert os.listdir(folder) == ["file"]
    assert other(folder) == "has it"


def test_only_what_killed_writers_left_is_removed(tmp_path):
    """Not what a run in a folder inside is writing now, nor files of the user."""
    gone, kept = [".7-unfinished-a.pt", "images/.7-unfinished-1.png"], [
        ".2024-01-diary.txt", "images/.7-notes", "inner/.7-unfinished-checkpoint.pt", "inner/.lock"]
    for name in gone + kept:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    runtime.claim(Runtime(CPU), tmp_path)
    runtime.finish()
    found = {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file()}
    assert found == {*kept}


def test_a_folder_that_received_nothing_goes_away_again(tmp_path):
    (tmp_path / "before").mkdir()
    for name in ("before", "empty", "full"):
        runtime.claim(Runtime(CPU), tmp_path / name)
    (tmp_path / "full/checkpoint.pt").touch()
    runtime.finish()
    assert sorted(os.listdir(tmp_path)) == ["before", "full"]
    assert os.listdir(tmp_path / "full") == ["checkpoint.pt"]


def test_claims_refuse_what_cannot_be_written(tmp_path):
    (tmp_path / "file").touch()
    for folder, *files in ([tmp_path / "file"], [tmp_path / "a", tmp_path / "file/x.json"],
                           [tmp_path / "a", tmp_path]):
        with pytest.raises(InputError, match="cannot be written to .*: choose another"):
            runtime.claim(Runtime(CPU), folder, *files)
    runtime.finish()
    assert os.listdir(tmp_path) == ["file"]


def test_sha256(tmp_path):
    (tmp_path / "abc").write_bytes(b"abc")   # the first example of FIPS 180-2
    assert runtime.file_sha256(tmp_path / "abc").startswith("ba7816bf8f01cfea414140de5dae2223")


# ------------------------------------------------------------------------------
# The learning rate, the averaged weights, and the watch over the numbers.


def test_learning_rate():
    # 20 steps: 4 of warm-up, 8 constant, and the last 0.4 * 20 = 8 fall to 0, which
    # step 20 would reach.
    rates = [runtime.learning_rate(step, 20, 2.0, 4, 0.4) for step in range(20)]
    expected = [0.5, 1.0, 1.5, 2.0] + 8 * [2.0] + [2.0 * k / 8 for k in range(8, 0, -1)]
    assert rates == pytest.approx(expected)
    assert runtime.learning_rate(0, 20, 2.0, 0) == runtime.learning_rate(19, 20, 2.0, 0) == 2.0


def test_ema_follows_its_formula_and_leaves_frozen_parameters_alone():
    model = nn.Linear(1, 1)
    model.bias.requires_grad_(False)
    ema = runtime.Ema(model, 0.5)
    expected, bias = model.weight.item(), model.bias.item()
    for n in range(11):
        model.weight.data.fill_(n + 1)
        model.bias.data.fill_(n + 1)
        ema.update()
        decay = min(0.5, (1 + n) / (10 + n))          # 0.1, 2/11, ... reaches 0.5 at n = 8
        expected = decay * expected + (1 - decay) * (n + 1)
    assert_close(ema.model.weight.item(), expected)
    assert ema.model.bias.item() == bias and not ema.model.weight.requires_grad


def test_finite_check_names_the_first_bad_term():
    check = runtime.FiniteCheck(CPU)
    check.add(0, {"rec": torch.tensor(1.0), "var": torch.tensor(2.0)})
    bad = {"rec": torch.tensor(1.0), "var": torch.tensor(math.nan), "reg": torch.tensor(math.inf)}
    with pytest.raises(InputError, match="step 3: var is nan"):
        check.add(3, bad)


def test_a_waiting_finite_check_catches_up_on_flush():
    check = runtime.FiniteCheck(torch.device("cuda"))
    check.add(0, {"rec": torch.tensor(math.inf)})
    check.add(1, {"rec": torch.tensor(1.0)})
    with pytest.raises(InputError, match="step 0: rec is inf"):
        check.flush()


# ------------------------------------------------------------------------------
# The log.


def test_log_begins_with_the_command_and_resumes_without_duplicates(tmp_path):
    path = tmp_path / "log.jsonl"
    log = runtime.Log(path, {"lr": 0.1}, Runtime(CPU))
    for step in (10, 20, 30):
        log.write(step=step, rec=torch.tensor(float(step)), by_t=torch.zeros(2))
    with open(path, "a") as file:
        file.write('{"step": 40, "re')   # the process died here; its checkpoint is of step 20
    log = runtime.Log(path, {"lr": 0.1}, Runtime(CPU), resumed_step=20)
    log.write(step=30, rec=1.0)
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert lines[0]["config"] == {"lr": 0.1} and {"command", "versions", "date"} <= set(lines[0])
    seen = [(line["step"], line["rec"]) for line in lines[1:]]
    assert seen == [(10, 10.0), (20, 20.0), (30, 1.0)]
    runtime.Log(path, {"lr": 0.2}, Runtime(CPU))      # a new run begins a new file
    assert len(path.read_text().splitlines()) == 1


def test_what_stands_beside_a_number():
    found = runtime.provenance(CPU)
    assert found["command"].startswith("python ") and found["device"].startswith("cpu ")
    assert found["versions"]["torch"] == torch.__version__
    assert found["date"] == time.strftime("%Y-%m-%d")


def test_a_resumed_log_has_its_first_line_and_what_has_changed(tmp_path):
    path = tmp_path / "log.jsonl"
    log = runtime.Log(path, {"lr": 0.1, "steps": 4}, Runtime(CPU))
    log.write(step=2, rec=1.0)
    path.write_bytes(b"\xff\n" + path.read_bytes().split(b"\n", 1)[1])   # its head is lost
    runtime.Log(path, {"lr": 0.1, "steps": 4}, Runtime(CPU), resumed_step=2)
    runtime.Log(path, {"lr": 0.1, "steps": 8, "data": "x"}, Runtime(CPU), resumed_step=2)
    first, *lines = map(json.loads, path.read_text().splitlines())
    assert first["config"] == {"lr": 0.1, "steps": 4}
    assert lines == [{"step": 2, "rec": 1.0}, {"step": 2, "changed": {"steps": 8}}]


@pytest.mark.parametrize("line", ["", "{", "[1]", "1", "null", "[" * 99_999, '{"a": 1}',
                                  '{"step": "one"}', '{"step": null}', '{"step": [1]}'])
def test_a_line_that_is_no_step_is_dropped(line):
    assert runtime.step_of(line) == math.inf
    assert runtime.step_of('{"step": 3}') == 3 and runtime.step_of('{"config": {}}') == -1


def test_only_rank_0_logs(tmp_path):
    runtime.Log(tmp_path / "log.jsonl", {}, Runtime(CPU, rank=1, world=2)).write(step=1)
    assert not (tmp_path / "log.jsonl").exists()


# ------------------------------------------------------------------------------
# Two processes.


def test_a_batch_in_parts_is_the_batch():
    x, y = torch.arange(10.0).view(5, 2), torch.arange(5)
    parts = list(runtime.micro_batches([nn.Linear(2, 1)], 3, x, y))
    assert [len(part[0]) for part in parts] == [2, 2, 1]
    for whole, *pieces in zip((x, y), *parts, strict=True):
        assert_close(torch.cat(pieces), whole)


def threads() -> set[str]:
    """The names of this process's threads; none where there is no /proc."""
    return {path.read_text().strip() for path in Path("/proc/self/task").glob("*/comm")}


def two_processes(rank: int, folder: str) -> None:
    os.environ["RANK"] = str(rank)
    rt = runtime.start("cpu")
    # Rank 0 has the rows 0, 1, 2 and rank 1 has 10, 11.
    rows = torch.arange(3 - rank).float()[:, None] + 10 * rank
    gathered = runtime.gather_rows(rows, rt)
    total = runtime.all_reduce_sum(torch.tensor([1.0 + rank]))
    mean = runtime.mean_over_ranks({"a": torch.tensor(1.0 + rank)})["a"]

    # The gradient of the mean of w * x over x = 0, 1, 2, 3, of which rank 0 has 0 and 1.
    model = nn.Linear(1, 1, bias=False)
    nn.init.constant_(model.weight, 1.0)
    wrapped, gradients = rt.wrap(model), []
    for x, in runtime.micro_batches(wrapped, 2, torch.tensor([[0.0], [1.0]]) + 2 * rank):
        (wrapped(x).sum() / 2).backward()
        gradients.append(model.weight.grad.item())

    if rank:   # a signal that one process got is known to all
        runtime.signals.received = signal.SIGTERM
    stops = runtime.stop_asked(), runtime.signals.received
    runtime.signals.received = 0

    def refuse() -> None:
        raise InputError("no")

    try:
        runtime.on_main(rt, refuse)
    except (InputError, SystemExit) as error:
        refused = type(error).__name__

    runtime.check_same_on_all_ranks(model)
    model.weight.data += rank
    drift = "unnoticed"
    try:
        runtime.check_same_on_all_ranks(model)
    except RuntimeError:
        drift = "noticed"
    # A stage's DDP is gone when its main has returned, and then the group goes, with
    # its threads.  Left alive, they now and then abort the process at its very end.
    del wrapped
    runtime.barrier()
    runtime.finish()
    left = sum("gloo" in name for name in threads())
    torch.save((gathered, total, mean, gradients, stops, left, refused, drift),
               f"{folder}/{rank}.pt")


def test_gather_reduce_accumulate_and_drift_with_two_processes(tmp_path, monkeypatch):
    # A store at a free port, as torchrun's agent has one.
    store = torch.distributed.TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
    for name, value in {"MASTER_ADDR": "localhost", "MASTER_PORT": store.port,
                        "WORLD_SIZE": 2, "TORCHELASTIC_USE_AGENT_STORE": True}.items():
        monkeypatch.setenv(name, str(value))
    torch.multiprocessing.spawn(two_processes, (str(tmp_path),), nprocs=2)
    results = [torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1)]
    for gathered, total, mean, gradients, stops, left, _, _ in results:
        assert left == 0
        assert stops == (True, signal.SIGTERM)
        assert gathered.flatten().tolist() == [0, 1, 2, 10, 11]
        assert total.item() == 3 and mean.item() == 1.5 and gradients[1] == 1.5
    assert [gradients[0] for *_, gradients, _, _, _, _ in results] == [0, 1]     # not averaged yet
    assert [refused for *_, refused, _ in results] == ["InputError", "SystemExit"]
    assert results[1][-1] == "noticed"


def test_processes_take_turns(tmp_path, monkeypatch):
    fcntl = pytest.importorskip("fcntl")
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    with runtime.turn(tmp_path / "new"), runtime.turn(tmp_path / "other"):
        for path in tmp_path.glob("turn-*"):
            with open(path) as file, pytest.raises(BlockingIOError):
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    paths = [*tmp_path.iterdir()]
    assert len(paths) == 2 and not any(path.is_dir() for path in paths)
    with open(paths[0]) as file:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "missing"))
    with runtime.turn(tmp_path):   # where no file can be opened, nobody waits
        pass


def test_a_world_of_one_needs_no_process_group():
    rows = torch.ones(2, 2)
    assert runtime.gather_rows(rows, Runtime(CPU)) is rows and runtime.all_reduce_sum(rows) is rows
    assert runtime.mean_over_ranks({"a": torch.tensor(2.0)})["a"] == 2
