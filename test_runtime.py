"""The runtime: errors, random streams, checkpoints, EMA, finite check, log, and collectives of two
processes.
"""

import json
import math

import pytest
import torch
from torch import nn
from torch.testing import assert_close

import runtime
from runtime import InputError, Runtime

CPU = torch.device("cpu")


# ------------------------------------------------------------------------------------------------------------
# Errors.


def test_input_error_becomes_one_line_and_exit_status_2(capsys):
    @runtime.command
    def main() -> None:
        raise InputError("--size 30 is wrong; use 32")

    with pytest.raises(SystemExit) as stop:
        main()
    assert stop.value.code == 2
    assert capsys.readouterr().err.splitlines() == ["test_runtime.py: error: --size 30 is wrong; use 32"]


def test_a_bug_keeps_its_traceback():
    @runtime.command
    def main() -> None:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        main()


def test_unknown_and_absent_devices_are_refused():
    with pytest.raises(InputError, match="choose one of"):
        runtime.start("abacus")
    if not torch.cuda.is_available():
        with pytest.raises(InputError, match="no CUDA card"):
            runtime.start("cuda")


# ------------------------------------------------------------------------------------------------------------
# Random streams.


def draw(*stream: int | str, seed: int = 0) -> list[float]:
    return torch.randn(4, generator=runtime.generator(seed, *stream)).tolist()


def test_streams_are_reproducible_and_distinct():
    assert draw("eps", 7) == draw("eps", 7)
    others = [draw("eps", 8), draw("t", 7), draw("eps", 7, seed=1), draw("eps", "7"), draw("eps7")]
    assert all(draw("eps", 7) != other for other in others)


def test_two_ranks_share_out_the_draw_of_one():
    one = Runtime(CPU)
    pair = [Runtime(CPU, rank, 2) for rank in (0, 1)]
    whole = runtime.global_randn((6, 3), one, 0, "eps", 5)
    parts = [runtime.global_randn((3, 3), rt, 0, "eps", 5) for rt in pair]
    assert_close(torch.stack(parts, 1).flatten(0, 1), whole, rtol=0, atol=0)
    whole = runtime.global_rand(6, one, 0, "t", 5)
    assert_close(torch.stack([runtime.global_rand(3, rt, 0, "t", 5) for rt in pair], 1).flatten(), whole,
                 rtol=0, atol=0)


# ------------------------------------------------------------------------------------------------------------
# Checkpoints.


def test_a_write_that_fails_half_way_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "checkpoint.pt"
    runtime.save_atomic({"step": 1}, path)

    def half(state, file):
        file.write(b"PK half")
        raise OSError("disk full")

    monkeypatch.setattr(torch, "save", half)
    with pytest.raises(OSError):
        runtime.save_atomic({"step": 2}, path)
    assert runtime.load_file(path) == {"step": 1}


def test_missing_and_damaged_files_are_named_in_one_line(tmp_path):
    with pytest.raises(InputError, match="no such file; train one first"):
        runtime.load_file(tmp_path / "none.pt", "train one first")
    (tmp_path / "bad.pt").write_bytes(b"not a checkpoint")
    with pytest.raises(InputError, match="bad.pt") as error:
        runtime.load_file(tmp_path / "bad.pt")
    assert "\n" not in str(error.value)


def test_a_run_is_resumed_only_by_its_own_command():
    old = {"lr": 0.1, "steps": 10, "loss": "ve"}
    runtime.check_config(old, {"lr": 0.1, "steps": 20, "loss": "ve"}, {"steps"}, "run")
    with pytest.raises(InputError, match=r"--loss ve \(now kl\)"):
        runtime.check_config(old, {"lr": 0.1, "steps": 10, "loss": "kl"}, {"steps"}, "run")


# ------------------------------------------------------------------------------------------------------------
# EMA and the finite check.


def test_ema_follows_its_formula_and_leaves_frozen_parameters_alone():
    model = nn.Linear(1, 1)
    model.bias.requires_grad_(False)
    ema = runtime.Ema(model, 0.5)
    expected = model.weight.item()
    for n, value in enumerate([1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0, 9.0, 10.0, 11.0]):
        model.weight.data.fill_(value)
        model.bias.data.fill_(value)
        ema.update()
        decay = min(0.5, (1 + n) / (10 + n))          # 0.1, 2/11, ... reaches 0.5 at n = 8
        expected = decay * expected + (1 - decay) * value
    assert_close(ema.model.weight.item(), expected)
    assert ema.model.bias.item() != 11.0 and not ema.model.weight.requires_grad


def test_finite_check_names_the_first_bad_term():
    check = runtime.FiniteCheck(CPU)
    check.add(0, {"rec": torch.tensor(1.0), "var": torch.tensor(2.0)})
    with pytest.raises(InputError, match="step 3: var is nan"):
        check.add(3, {"rec": torch.tensor(1.0), "var": torch.tensor(math.nan), "reg": torch.tensor(math.inf)})


def test_a_lagging_finite_check_catches_up_on_flush():
    check = runtime.FiniteCheck(CPU)
    check.lag = 2
    check.add(0, {"rec": torch.tensor(math.inf)})
    check.add(1, {"rec": torch.tensor(1.0)})
    with pytest.raises(InputError, match="step 0: rec is inf"):
        check.flush()


# ------------------------------------------------------------------------------------------------------------
# The log.


def test_log_begins_with_the_command_and_resumes_without_duplicates(tmp_path):
    path = tmp_path / "log.jsonl"
    log = runtime.Log(path, {"lr": 0.1}, Runtime(CPU))
    for step in (10, 20, 30):
        log.write(step=step, rec=torch.tensor(float(step)))
    with open(path, "a") as file:
        file.write('{"step": 40, "re')                 # the process died here; its checkpoint is of step 20
    log = runtime.Log(path, {"lr": 0.1}, Runtime(CPU), resumed_step=20)
    log.write(step=30, rec=1.0)
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert lines[0]["config"] == {"lr": 0.1} and {"command", "versions", "date"} <= set(lines[0])
    assert [(line["step"], line["rec"]) for line in lines[1:]] == [(10, 10.0), (20, 20.0), (30, 1.0)]


def test_only_rank_0_logs(tmp_path):
    runtime.Log(tmp_path / "log.jsonl", {}, Runtime(CPU, rank=1, world=2)).write(step=1)
    assert not (tmp_path / "log.jsonl").exists()


# ------------------------------------------------------------------------------------------------------------
# Two processes.


def two_processes(rank: int, folder: str) -> None:
    where = f"file://{folder}/rendezvous"
    torch.distributed.init_process_group("gloo", init_method=where, rank=rank, world_size=2)
    rt = Runtime(CPU, rank, 2)
    rows = torch.arange(3 - rank).float()[:, None] + 10 * rank          # rank 0: 0 1 2, rank 1: 10 11
    gathered = runtime.gather_rows(rows, rt)
    total = runtime.all_reduce_sum(torch.tensor([1.0 + rank]))
    mean = runtime.mean_over_ranks({"a": torch.tensor(1.0 + rank)})["a"]
    model = nn.Linear(2, 2)
    nn.init.constant_(model.weight, 1.0)
    nn.init.constant_(model.bias, 0.0)
    runtime.check_same_on_all_ranks(model)
    model.bias.data += rank
    drift = "unnoticed"
    try:
        runtime.check_same_on_all_ranks(model)
    except RuntimeError:
        drift = "noticed"
    torch.save((gathered, total, mean, drift), f"{folder}/{rank}.pt")
    runtime.finish()


def test_gather_reduce_and_drift_with_two_processes(tmp_path):
    torch.multiprocessing.spawn(two_processes, (str(tmp_path),), nprocs=2)
    results = [torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1)]
    for gathered, total, mean, _ in results:
        assert gathered.flatten().tolist() == [0, 1, 2, 10, 11] and total.item() == 3 and mean.item() == 1.5
    assert results[1][3] == "noticed"


def test_a_world_of_one_needs_no_process_group():
    rows = torch.ones(2, 2)
    assert runtime.gather_rows(rows, Runtime(CPU)) is rows and runtime.all_reduce_sum(rows) is rows
