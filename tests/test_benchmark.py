"""The benchmark's arithmetic, its steps, and its reports.  Nothing is timed."""

import json

import pytest
import torch
from torch import nn
from torch.testing import assert_close

import frozen
import models
from runtime import Runtime
from studies import benchmark

CPU = Runtime(torch.device("cpu"))


def bench(model: str = "demo", **changes) -> benchmark.Bench:
    settings = dict(batch=2, precision="fp32", compiled=False, repeats=1)
    return benchmark.Bench(CPU, model, **settings | changes)


def test_the_rivals_take_turns_and_the_first_round_is_not_timed():
    order = []
    arms = {name: lambda name=name: order.append(name) for name in "ab"}
    seconds = bench(repeats=2).rounds(arms)
    assert order == list("ababab")
    assert [len(times) for times in seconds.values()] == [2, 2]


def test_a_ratio_is_the_median_over_rounds():
    """The second round was ten times slower for both: of 3, 2 and 5."""
    found = benchmark.ratio([3.0, 20.0, 5.0], [1.0, 10.0, 1.0])
    assert found == {"median": 3.0, "min": 2.0, "max": 5.0}


def test_a_share_is_flop_over_time_over_the_matrix_rate(monkeypatch):
    """4 s for 2 x 8e9 FLOP are 4 GFLOP/s; 2 x 2048^3 in 2 s are 8.59 GFLOP/s."""
    times = {"a": [4.0], "b": [8.0], "512": [2.0], "1024": [2.0], "2048": [2.0]}
    monkeypatch.setattr(benchmark.Bench, "rounds", lambda self, arms: times)
    found = bench().shares({"a": None, "b": None}, {"a": 16e9, "b": 16e9})
    assert found["arms"]["a"]["gflop_per_image"] == 8
    rate = 2 * 2048**3 / 2 / 1e9
    assert_close(found["arms"]["a"]["share_of_matrix_rate"], 4 / rate)
    assert found["arms"]["b"]["time_over_first"]["median"] == 2


@pytest.mark.parametrize("patch, side", [(1, 4), (2, 8)])
def test_multiply_adds_are_those_of_the_layers(patch, side):
    """A linear layer takes in x out for each row, a patch as many as its map.

    The scores of attention and their mixing take N^2 D each in a block.
    """
    row = models.DITS["demo"] | dict(
        depth=2, width=64, patch=patch, in_channels=8, input_size=side,
        num_classes=10)
    net, counted = models.build_dit(row), []

    def count(layer: nn.Module, _, out: torch.Tensor) -> None:
        per_output = layer.weight[0].numel()
        counted.append(out.numel() * per_output)

    for layer in net.modules():
        if isinstance(layer, nn.Linear | nn.Conv2d):
            layer.register_forward_hook(count)
    net(torch.zeros(1, 8, side, side), torch.zeros(1), torch.zeros(1).long())
    tokens = (side // patch) ** 2
    expected = sum(counted) + 2 * 2 * tokens**2 * 64
    assert benchmark.multiply_adds(row) == expected


def test_the_published_sizes_cost_what_is_published():
    """GMAC of a forward pass at 256 tokens."""
    latents = dict(in_channels=32, input_size=16)
    macs = [benchmark.multiply_adds(models.DITS[name] | latents) / 1e9
            for name in ("S", "B", "L", "XL")]
    assert_close(macs, [6.06, 23.0, 80.7, 118.6], rtol=2e-3, atol=0)


def test_the_tokenizer_s_step_trains_both_networks_when_asked(monkeypatch):
    def distance(**_) -> nn.Module:
        return nn.PairwiseDistance()

    judges, build = [], models.PatchGAN
    monkeypatch.setattr(frozen.lpips, "LPIPS", distance)
    monkeypatch.setattr(models, "PatchGAN", lambda: judges.append(build()) or judges[0])
    net, step = benchmark.tokenizer_step(bench(), 32)

    def moved(*arm: bool) -> tuple[bool, bool]:
        before = [net.last_layer.clone(), next(judges[0].parameters()).clone()]
        step(*arm)
        after = [net.last_layer, next(judges[0].parameters())]
        return tuple(not torch.equal(*pair) for pair in zip(before, after))

    assert moved(False, True) == (True, False)
    assert moved(True, False) == (True, True)
    assert torch.isfinite(net.last_layer).all()


def test_the_paper_s_interval_saves_a_quarter(monkeypatch):
    """t = 0.3 u / (1 - 0.7 u) is below 0.21 for u < 0.21 / 0.447 = 0.4698.

    So 118 of 250 steps need one branch, and 132 need two.
    """
    monkeypatch.setattr(models.DiT, "forward", lambda self, x, t, y: x)
    found = benchmark.sampling(bench(), 250)["evaluations_per_image"]
    assert found == {"inside": 132 * 2 + 118, "everywhere": 500}


@pytest.mark.parametrize("what, keys", [
    ("tokenizer", {"matrix_gflop_per_second", "arms"}),
    ("dit", {"matrix_gflop_per_second", "arms"}),
    ("sampling", {"evaluations_per_image", "interval_speedup"}),
    ("metrics", {".npz", "PNG", "JPEG", "JPEG 1.5 times as large", "inception",
                 "efficientnet", "SSIM", "moments", "KID", "frechet", "peers"}),
])
def test_smoke_prints_one_json_object(capsys, what, keys):
    benchmark.main([what, "--smoke", "--device", "cpu"])
    out, said = capsys.readouterr()
    found = json.loads(out)
    assert keys | {"settings", "device", "versions", "date"} <= set(found)
    if what == "tokenizer":
        flop = [arm["gflop_per_image"] for arm in found["arms"].values()]
        assert flop[0] < min(flop[1:3]) and max(flop[1:3]) < flop[3]
    if what == "metrics":
        bounds = {"frechet": 1e-4, "inception": 1e-5, "efficientnet": 1e-4, "SSIM": 1e-4,
                  "moments": 1e-12, "KID": 1e-4}
        for row in keys - {"peers"}:   # the pixels are equal
            assert "ours" not in found[row]
            for name, arm in found[row].items():
                assert arm["difference"] <= bounds.get(row, 0)
                assert f"| {row}, {name} |" in said


@pytest.mark.parametrize("flags, message", [
    (["dit", "--model", "f16d32"], "--model f16d32: choose one of demo"),
    (["sampling", "--steps", "0"], "0 is not a whole number"),
    (["metrics"], "scipy is not installed"),
])
def test_bad_input_is_one_line_and_exit_2(capsys, monkeypatch, flags, message):
    monkeypatch.setattr(benchmark.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SystemExit) as stop:
        benchmark.main(flags)
    error = capsys.readouterr().err.strip().splitlines()
    assert stop.value.code == 2 and len(error) == 1 and message in error[0]
