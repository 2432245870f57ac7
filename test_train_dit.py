"""The DiT's stage end to end: smoke, the objective, resume after SIGKILL, two processes, and bad input."""

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch.testing import assert_close

import losses
import models
import train_dit
import train_tokenizer
from runtime import Runtime
from test_train_tokenizer import (  # noqa: F401  (one_thread is a fixture)
    ENVIRONMENT, assert_same, kill_after_first_checkpoint, one_thread, read_log, update_difference)

HERE = Path(__file__).parent


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory) -> Path:
    """A VE tokenizer of four steps."""
    out = tmp_path_factory.mktemp("tokenizer")
    train_tokenizer.main(["--smoke", "--out", str(out)])
    return out / "checkpoint.pt"


def flags_of(tokenizer: Path, out: Path, *flags: str) -> list[str]:
    return ["--smoke", "--warmup", "1", "--tokenizer", str(tokenizer), "--out", str(out), *flags]


def train(tokenizer: Path, out: Path, *flags: str) -> dict:
    train_dit.main(flags_of(tokenizer, out, *flags))
    return torch.load(out / "checkpoint.pt", weights_only=True)


def test_smoke_writes_a_checkpoint_that_rebuilds_itself(tokenizer, tmp_path):
    state = train(tokenizer, tmp_path)
    assert state["step"] == state["ema_updates"] == 4 and len(state["classes"]) == 10
    assert state["latent_shape"] == [8, 8, 8] and state["tokenizer"]["path"] == str(tokenizer)
    dit, _ = models.load_dit(tmp_path / "checkpoint.pt")
    v = dit(torch.zeros(2, 8, 8, 8), torch.tensor([0.2, 0.8]), torch.tensor([0, 10]))
    assert v.shape == (2, 8, 8, 8) and (tmp_path / "images" / "0000004.png").stat().st_size > 0
    line = read_log(tmp_path)[1]
    assert {"velocity", "cosine", "grad_norm", "by_t"} <= set(line) and len(line["by_t"]) == 10


def test_the_objective_is_equation_4_on_the_path_of_equation_27(tokenizer):
    """With a network that always answers 1/2 the loss is mean (1/2 - (z - eps))^2: its sign counts."""
    args = SimpleNamespace(precision="fp32", cosine_weight=1.0)
    seen = []

    class Half(torch.nn.Module):
        def forward(self, x_t, t, y):
            seen.append((x_t, t, y))
            return torch.full_like(x_t, 0.5)

    objective = train_dit.Objective(Half(), args, Runtime(torch.device("cpu")))
    z, eps, t = torch.randn(4, 2, 3, 3), torch.randn(4, 2, 3, 3), torch.tensor([0.0, 0.25, 0.5, 1.0])
    terms, per_sample = objective(z, eps, t, torch.arange(4))
    v = z - eps
    assert_close(terms["velocity"], (0.5 - v).square().mean())
    assert_close(per_sample, (0.5 - v).square().mean((1, 2, 3)))
    cosine = v.sum(1) / (2 ** 0.5 * v.square().sum(1).sqrt())          # with (1/2, 1/2), of norm 1 / sqrt 2
    assert_close(terms["cosine"], (1 - cosine).mean())
    x_t = seen[0][0]
    assert_close(x_t[0], eps[0])
    assert_close(x_t[1], 0.75 * eps[1] + 0.25 * z[1])
    assert_close(x_t[3], z[3])


def test_latents_are_normalised_and_decode_inverts(tokenizer):
    latents = train_dit.Latents(tokenizer, "mean", "fp32", Runtime(torch.device("cpu")))
    x = torch.rand(4, 3, 32, 32) * 2 - 1
    eps = torch.zeros(4, *latents.shape)
    z = latents.encode(x, eps, torch.zeros(4))
    with torch.no_grad():
        mean, logvar = losses.split_moments(latents.autoencoder.encode(x))
        assert_close(z, (mean - latents.mean[:, None, None]) / latents.std[:, None, None])
        assert_close(latents.decode(z), latents.autoencoder.decode(mean))
    sampled = train_dit.Latents(tokenizer, "sample", "fp32", Runtime(torch.device("cpu")))
    moved = sampled.encode(x, torch.ones_like(eps), torch.zeros(4)) - z
    assert_close(moved, (logvar / 2).exp() / latents.std[:, None, None])


def test_times_are_logit_normal_or_uniform():
    rt = Runtime(torch.device("cpu"))
    t = train_dit.draw_times(20_000, "logit-normal", rt, 0, 0)
    normal = torch.special.logit(t.double())
    assert abs(normal.mean()) < 0.03 and abs(normal.std() - 1) < 0.03
    t = train_dit.draw_times(20_000, "uniform", rt, 0, 0)
    levels = torch.tensor([0.1, 0.5, 0.9])
    assert_close(torch.quantile(t, levels), levels, rtol=0, atol=0.02)


def test_labels_are_dropped_at_the_stated_rate(tokenizer, tmp_path, monkeypatch):
    seen = []
    forward = models.DiT.forward

    def spy(self, x_t, t, y):
        if self.training:
            seen.append(y)
        return forward(self, x_t, t, y)

    monkeypatch.setattr(models.DiT, "forward", spy)
    train(tokenizer, tmp_path, "--batch", "64", "--label-dropout", "0.5")
    y = torch.cat(seen)
    assert 0.35 < (y == 10).float().mean() < 0.65 and (y[y != 10] < 10).all()


def test_loss_bins_count_every_sample_once():
    bins = train_dit.TimeBins(torch.device("cpu"))
    bins.add(torch.tensor([0.0, 0.05, 0.95, 1.0]), torch.tensor([1.0, 3.0, 5.0, 7.0]))
    assert bins.read() == [2.0] + [None] * 8 + [6.0]
    assert bins.read() == [None] * 10


def test_two_plus_two_steps_are_four(tokenizer, tmp_path):
    whole = train(tokenizer, tmp_path / "whole")
    train(tokenizer, tmp_path / "parts", "--steps", "2")
    parts = train(tokenizer, tmp_path / "parts")
    for key in ("model", "ema", "optimizer", "ema_updates"):
        assert_same(whole[key], parts[key])


def test_killed_with_sigkill_the_same_command_ends_bit_identical(tokenizer, tmp_path):
    flags = ["--steps", "40", "--save-every", "3", "--image-every", "40"]
    whole = train(tokenizer, tmp_path / "whole", *flags)
    out = tmp_path / "killed"
    run = [sys.executable, str(HERE / "train_dit.py"), *flags_of(tokenizer, out, *flags)]
    kill_after_first_checkpoint(run, out, steps=40)
    resumed = train(tokenizer, out, *flags)
    for key in ("model", "ema", "optimizer"):
        assert_same(whole[key], resumed[key])


def test_two_processes_train_as_one(tokenizer, tmp_path):
    """Gradient and terms of the first step to rounding, then the updates as vectors (see
    test_train_tokenizer).
    """
    flags = ["--steps", "3", "--save-every", "3"]
    torch.manual_seed(0)
    start = models.build_dit(models.DITS["demo"]).state_dict()
    one = train(tokenizer, tmp_path / "one", *flags)
    run = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2",
           str(HERE / "train_dit.py"), *flags_of(tokenizer, tmp_path / "two", *flags)]
    done = subprocess.run(run, env=ENVIRONMENT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    two = torch.load(tmp_path / "two" / "checkpoint.pt", weights_only=True)
    first = [read_log(tmp_path / name)[1] for name in ("one", "two")]
    for key in ("velocity", "cosine", "grad_norm"):
        assert_close(first[0][key], first[1][key], rtol=1e-5, atol=0)
    for left, right in zip(first[0]["by_t"], first[1]["by_t"]):
        assert left == right or abs(left - right) < 1e-4
    assert update_difference(one["model"], two["model"], start) < 0.05


def test_another_tokenizer_under_the_same_name_is_refused(tokenizer, tmp_path, capsys):
    copy = tmp_path / "tokenizer.pt"
    copy.write_bytes(tokenizer.read_bytes())
    train(copy, tmp_path / "run", "--steps", "2")
    state = torch.load(copy, weights_only=True)
    state["latent_mean"] += 1
    torch.save(state, copy)
    with pytest.raises(SystemExit) as stop:
        train(copy, tmp_path / "run")
    assert stop.value.code == 2 and "it has changed since" in capsys.readouterr().err


@pytest.mark.parametrize("flags, message", [
    (["--tokenizer", "no/such/file.pt"], "no/such/file.pt"),
    (["--data", "no/such/folder"], "no/such/folder"),
    (["--batch", "0"], "--batch must be at least 1"),
    (["--ema", "1"], "--ema must be in [0, 1)"),
])
def test_bad_input_is_one_line_and_exit_2(tokenizer, tmp_path, capsys, flags, message):
    with pytest.raises(SystemExit) as stop:
        train(tokenizer, tmp_path / "run", *flags)
    error = capsys.readouterr().err.strip().splitlines()
    assert stop.value.code == 2 and len(error) == 1 and message in error[0]
    assert not (tmp_path / "run").exists()


def test_a_dit_is_no_tokenizer(tokenizer, tmp_path, capsys):
    train(tokenizer, tmp_path / "dit")
    with pytest.raises(SystemExit):
        train(tmp_path / "dit" / "checkpoint.pt", tmp_path / "run")
    assert '"dit" checkpoint where a "tokenizer"' in capsys.readouterr().err


def test_a_non_finite_step_is_named_and_nothing_is_saved(tokenizer, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("losses.cosine_velocity", lambda v_hat, v: v_hat.sum() * float("inf"))
    with pytest.raises(SystemExit) as stop:
        train(tokenizer, tmp_path)
    assert stop.value.code == 2 and "cosine is" in capsys.readouterr().err
    assert not (tmp_path / "checkpoint.pt").exists() and json.loads((tmp_path / "log.jsonl").read_text())
