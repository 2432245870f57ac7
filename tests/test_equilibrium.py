"""Eq. 14 and the sampler's error, on decoders whose answer is known."""

import json
import math

import pytest
import torch
from torch.testing import assert_close

import checkpoints
import models
import runtime
import train_dit
import train_tokenizer
from studies import equilibrium


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_the_slope_of_the_squared_error_is_the_diagonal_of_jtj():
    """decode(z) = A z: T_i = sum_k A_ki^2.

    One probe will do if A is diagonal.
    """
    a = torch.randn(2, 3, 4, 4, generator=generator())
    found = equilibrium.squared_error_slope(
        lambda z: a * z, torch.zeros_like(a), 1, generator(1))
    assert_close(found, a.square())
    matrix = torch.randn(40, 6, generator=generator())
    found = equilibrium.squared_error_slope(
        lambda z: z @ matrix.T, torch.zeros(1, 6), 4000, generator(1))
    assert_close(found[0], matrix.square().sum(0), rtol=0.1, atol=0)


def test_eq_14_holds_on_a_linear_decoder():
    """x_hat = a z, and a residual r: the loss is E|r + a sigma eps|.

    Its derivative by sigma^2 is phi(r / (a sigma)) a / sigma.  At r = 0, Eq. 14's
    lambda1 = T sigma^4 gives sigma = (lambda1 sqrt(2 pi) / a)^(1/3): a slope of
    -1/4 on this T, and of -1/6 on Eq. 7's a^2.
    """
    a = torch.logspace(-1, 1, 256).expand(40, 256).reshape(40, 1, 16, 16)
    std = (0.1 * math.sqrt(2 * math.pi) / a) ** (1 / 3)
    for residual in (0.7, 0.0):
        r = residual * a * std
        slope = equilibrium.trained_loss_slope(
            lambda z: a * z + r, 0 * a, 0 * a, std, 200, generator())
        phi = math.exp(-residual**2 / 2) / math.sqrt(2 * math.pi)
        assert_close(slope.mean(0), (a / std * phi)[0], rtol=0.06, atol=0)
    measured = std.flatten(), slope.flatten(), a.square().flatten()
    found = equilibrium.equilibrium(*measured, 0.1)
    assert_close(found["equilibrium_slope"], -0.25, rtol=0.02, atol=0)
    assert_close(found["equilibrium_ratio"], 1.0, rtol=0.02, atol=0)
    assert_close(found["trace_slope"], -1 / 6, rtol=1e-4, atol=0)
    assert len(found["points"]["log_t"]) == 500


def test_the_sampler_s_error_is_measured_in_sigma():
    fine = torch.randn(50, 2, 4, 4, generator=generator())
    error = torch.randn(fine.shape, generator=generator(1))
    error = error * torch.tensor([0.1, 0.3])[:, None, None]
    found = equilibrium.perturbation(fine + error, fine, torch.tensor([0.1, 0.1]))
    rms = math.sqrt((0.01 + 0.09) / 2)
    # N(0, 1) is outside one deviation with probability 0.3173, N(0, 3) with 0.7389.
    outside = (0.3173 + 0.7389) / 2
    assert_close([*found.values()], [rms, rms / 0.1, outside], rtol=0.05, atol=0)


def test_what_has_no_value_is_none():
    """A decoder that does not answer: every T is 0.  And a latent without noise."""
    sigma, zeros = torch.rand(100, generator=generator()) + 0.1, torch.zeros(100)
    found = equilibrium.equilibrium(sigma, zeros, zeros, 0.1)
    assert [found[key] for key in ("equilibrium_slope", "equilibrium_ratio", "trace_slope")
            ] == [None, None, None]
    z = torch.ones(1, 2, 4, 4)
    found = equilibrium.perturbation(z, 0 * z, torch.zeros(2))
    assert found == {"sampler_error": 1.0, "sampler_over_sigma": None, "sampler_outside": 1.0}


@pytest.mark.parametrize("dit, flags, message", [
    ({}, ["file/m.json"], "file"), ({}, ["."], "Is a folder"),
    ({}, ["m.json"], "dit.pt is a published file"),
    ({"latent_mean": 0}, ["m.json"], "dit.pt names no tokenizer"),
    ({"latent_mean": 0}, ["m.json", "--tokenizer", "vavae.pt"], "does not name its images")])
def test_bad_input_is_one_line_and_exit_2(tmp_path, monkeypatch, capsys, dit, flags, message):
    (tmp_path / "file").touch()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(checkpoints, "load_dit", lambda path: (None, dit))
    monkeypatch.setattr(checkpoints, "load_tokenizer", lambda path: (None, {}))
    with pytest.raises(SystemExit) as stop:
        equilibrium.main(["dit.pt", *flags])
    line, = capsys.readouterr().err.splitlines()
    assert stop.value.code == 2 and message in line
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_transformer_whose_flow_is_known(tmp_path, monkeypatch):
    """v = -x integrates to x (1 - 1/N)^N, so the error is a difference of two."""
    train_tokenizer.main(["--smoke", "--device", "cpu", "--out", f"{tmp_path}/t"])
    train_dit.main(["--smoke", "--device", "cpu", "--tokenizer",
                    f"{tmp_path}/t/checkpoint.pt", "--out", f"{tmp_path}/d",
                    "--cache", f"{tmp_path}/latents"])
    monkeypatch.setattr(models.DiT, "forward", lambda self, x, t, y: -x)
    equilibrium.main([f"{tmp_path}/d/checkpoint.pt", f"{tmp_path}/m.json",
                      "--count", "4", "--steps", "5", "--device", "cpu"])
    found = json.loads((tmp_path / "m.json").read_text())
    dit, _ = checkpoints.load_dit(tmp_path / "d/checkpoint.pt")
    C, side = dit.config["in_channels"], dit.config["input_size"]
    g = runtime.generator(0, "sampler")
    noise = torch.randn(4, C, side, side, generator=g)
    factor = abs((1 - 1 / 5) ** 5 - (1 - 1 / 40) ** 40)
    expected = factor * noise.square().mean().sqrt().item()
    assert_close(found["sampler_error"], expected, rtol=1e-4, atol=0)
    assert {"equilibrium_slope", "trace_slope", "lambda1"} <= set(found)


def test_a_lambda1_that_was_moved(tmp_path, monkeypatch):
    """--target-noise leaves it in the tokenizer's file."""
    train_tokenizer.main(["--smoke", "--device", "cpu", "--out", f"{tmp_path}/t",
                          "--target-noise", "0.1", "--steps", "40"])
    train_dit.main(["--smoke", "--device", "cpu", "--tokenizer",
                    f"{tmp_path}/t/checkpoint.pt", "--out", f"{tmp_path}/d",
                    "--cache", f"{tmp_path}/latents"])
    equilibrium.main([f"{tmp_path}/d/checkpoint.pt", f"{tmp_path}/m.json",
                      "--count", "4", "--steps", "2", "--device", "cpu"])
    file = checkpoints.read(tmp_path / "t/checkpoint.pt")
    found = json.loads((tmp_path / "m.json").read_text())["lambda1"]
    assert found == pytest.approx(file["lambda1"]["log_lambda1"].exp().item(), rel=1e-6)
    assert abs(found / file["config"]["lambda1"] - 1) > 0.1
    file["config"]["perceptual_weight"] = 1.0
    checkpoints.save(file, tmp_path / "t/checkpoint.pt")
    with pytest.raises(SystemExit):
        equilibrium.main([f"{tmp_path}/d/checkpoint.pt", f"{tmp_path}/m.json", "--tokenizer",
                          f"{tmp_path}/t/checkpoint.pt", "--device", "cpu"])
