"""The runtime: the command line, random streams, files, the averaged weights,
the log, and what two processes do together."""

import json
import math
import os
import signal

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
    ("--steps 0", "--steps: 0 is not a whole number of at least 1"),
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
    assert "A stage that trains." in said and "More about it" not in said
    assert "(default: 900)" in said and "(default: 0.2)" in said


def test_the_ranges_of_numbers():
    # The edges of each range, first those inside and then those outside.
    edges = {
        runtime.positive_int: ("1 7", "0 -1 2.0"), runtime.natural_int: ("0 7", "-1 0.5"),
        runtime.positive: ("1e-9 3", "0 -1 inf"), runtime.fraction: ("0 0.999", "1 -0.1"),
        runtime.non_negative: ("0 2.5", "-1e-9 inf nan")}
    for kind, (inside, outside) in edges.items():
        assert [kind(text) for text in inside.split()] == [float(text) for text in inside.split()]
        for text in outside.split():
            with pytest.raises(runtime.argparse.ArgumentTypeError, match=text):
                kind(text)


def test_a_run_is_resumed_only_by_its_own_command():
    old = {"lr": 0.1, "steps": 10, "loss": "ve"}
    runtime.check_same_command(old, old | {"steps": 20, "new": 1}, {"steps"}, "run")
    with pytest.raises(InputError, match=r"--loss ve \(now kl\)"):
        runtime.check_same_command(old, old | {"loss": "kl"}, {"steps"}, "run")


def test_unknown_and_absent_devices_are_refused():
    with pytest.raises(InputError, match="choose one of"):
        runtime.start("abacus")
    if not torch.cuda.is_available():
        with pytest.raises(InputError, match="CUDA card"):
            runtime.start("cuda")


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
    again = runtime.Ema(model, 0.5)
    again.load_state_dict(ema.state_dict(), ema.updates)
    ema.update()
    again.update()
    assert again.updates == 12 and again.model.weight.item() == ema.model.weight.item()


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


def two_processes(rank: int, folder: str) -> None:
    where = f"file://{folder}/rendezvous"
    torch.distributed.init_process_group("gloo", init_method=where, rank=rank, world_size=2)
    rt = Runtime(CPU, rank, 2)
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

    runtime.check_same_on_all_ranks(model)
    model.weight.data += rank
    drift = "unnoticed"
    try:
        runtime.check_same_on_all_ranks(model)
    except RuntimeError:
        drift = "noticed"
    torch.save((gathered, total, mean, gradients, drift), f"{folder}/{rank}.pt")
    # A stage's DDP is gone when its main has returned, and then the group goes.
    # Left alive, it would now and then abort the process at its very end.
    del wrapped
    runtime.barrier()
    runtime.finish()


def test_gather_reduce_accumulate_and_drift_with_two_processes(tmp_path):
    torch.multiprocessing.spawn(two_processes, (str(tmp_path),), nprocs=2)
    results = [torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1)]
    for gathered, total, mean, gradients, _ in results:
        assert gathered.flatten().tolist() == [0, 1, 2, 10, 11]
        assert total.item() == 3 and mean.item() == 1.5 and gradients[1] == 1.5
    assert [gradients[0] for *_, gradients, _ in results] == [0, 1]     # not averaged yet
    assert results[1][-1] == "noticed"


def test_a_world_of_one_needs_no_process_group():
    rows = torch.ones(2, 2)
    assert runtime.gather_rows(rows, Runtime(CPU)) is rows and runtime.all_reduce_sum(rows) is rows
    assert runtime.mean_over_ranks({"a": torch.tensor(2.0)})["a"] == 2
