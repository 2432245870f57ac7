"""The benchmark's arithmetic, its plain twin, its tokenizer step against the stage's, and its reports."""

import json
from argparse import Namespace

import pytest
import torch
from torch import nn
from torch.testing import assert_close

import benchmark
import losses
import models
import train_tokenizer
from runtime import Runtime
from test_train_tokenizer import one_thread  # noqa: F401  (a fixture)

CPU = Runtime(torch.device("cpu"))
HEADER = {"command", "config", "versions", "device", "threads", "date", "float32_matmul"}
SPREAD = {"median", "min", "max"}
TINY = models.DITS["demo"] | dict(depth=2, width=64, heads=4, input_size=4)


def awake(config: dict) -> models.DiT:
    """A DiT whose every parameter is random: at initialisation its output is zero."""
    torch.manual_seed(0)
    dit = models.build_dit(config)
    with torch.no_grad():
        for p in dit.parameters():
            p.add_(0.1 * torch.randn_like(p))
    return dit


def test_flop_of_a_linear_are_its_closed_form():
    """2 B n m for the product, as many for the weight's gradient and, where asked for, for the input's."""
    linear, x = nn.Linear(24, 40), torch.randn(8, 24)
    assert benchmark.count_flop(lambda: linear(x).sum().backward()) == 2 * 2 * 8 * 24 * 40
    x.requires_grad_()
    assert benchmark.count_flop(lambda: linear(x).sum().backward()) == 3 * 2 * 8 * 24 * 40


@pytest.mark.parametrize("config", [TINY, TINY | dict(patch=2, in_channels=3, depth=1)])
def test_flop_of_a_training_step_are_the_closed_form(config):
    """6 per multiply-add, less the gradients of the two inputs, latent and t, that nobody asks for.  Ours has
    attention's scores, N^2 D products in each block, once more: they are not kept for the backward pass.
    """
    D, p, C = config["width"], config["patch"], config["in_channels"]
    N = (config["input_size"] // p) ** 2
    expected = 3 * (6 * benchmark.dit_macs(config) - 2 * N * p * p * C * D - 2 * 256 * D)
    args = Namespace(batch=3, precision="fp32")
    ours = awake(config)
    twin = benchmark.plain_twin(ours)
    counted = [benchmark.count_flop(benchmark.dit_step(net, lambda: None, True, args, CPU))
               for net in (ours, twin)]
    assert counted[1] == expected
    assert counted[0] == expected + 3 * 2 * config["depth"] * N * N * D


def test_the_published_sizes_cost_what_is_published():
    """GMAC of a forward pass at 256 tokens, and GFLOP of training, per image."""
    macs = [benchmark.dit_macs(models.DITS[name]) / 1e9 for name in ("S", "B", "L", "XL")]
    assert_close(macs, [6.06, 23.0, 80.7, 118.6], rtol=2e-3, atol=0)
    assert abs(6 * macs[1] - 138) < 0.5


def test_the_plain_twin_is_the_same_function():
    dit = awake(TINY)
    twin = benchmark.plain_twin(dit)
    kinds = {type(module) for module in twin.modules()}
    assert not kinds & {nn.RMSNorm, models.Attention, models.SwiGLU}
    assert kinds >= {benchmark.PlainNorm, benchmark.PlainAttention, benchmark.PlainSwiGLU}
    x, t, y = torch.randn(3, 8, 4, 4), torch.tensor([0.0, 0.4, 1.0]), torch.tensor([0, 5, 10])
    out, twin_out = dit(x, t, y), twin(x, t, y)
    assert out.std() > 0.1
    assert_close(twin_out, out, rtol=0, atol=1e-4)
    out.square().mean().backward()
    twin_out.square().mean().backward()
    for name, p in dit.named_parameters():
        if p.grad is not None:
            parts = [twin.get_parameter(name.replace("w12", w)).grad for w in ("w1", "w2")]
            assert_close(torch.cat(parts) if "w12" in name else parts[0], p.grad, rtol=1e-3, atol=1e-5)
    owned = {p.data_ptr() for p in dit.parameters()}
    assert not owned & {p.data_ptr() for p in twin.parameters()}


def test_the_plain_average_is_the_ema():
    net, average = nn.Linear(3, 2), nn.Linear(3, 2)
    before = average.weight.detach().clone()
    benchmark.plain_average(average, net)
    assert_close(average.weight.detach(), 0.9999 * before + 0.0001 * net.weight.detach())


@pytest.mark.parametrize("arm", benchmark.ARMS)
def test_the_tokenizer_step_is_the_stages(arm):
    """Gradients of autoencoder and discriminator against train_tokenizer.py, from the same weights."""
    gan, lpips = benchmark.ARMS[arm]
    args = train_tokenizer.parse(["--model", "demo", "--batch", "2", "--precision", "fp32",
                                  "--disc-weight", "0.5", "--disc-start", "0"])
    step = benchmark.TokenizerStep(args, CPU, gan, lpips)
    torch.manual_seed(1)
    autoencoder = models.build_autoencoder(models.AUTOENCODERS["demo"])
    autoencoder.load_state_dict(step.net.state_dict())
    objective = train_tokenizer.Objective(autoencoder, args, CPU)
    if lpips:
        objective.lpips, objective.weights["lpips"] = [step.lpips], 1.0
    adversary = train_tokenizer.Adversary(args, CPU) if gan else None
    if gan:
        adversary.net.load_state_dict(step.discriminator.state_dict())
    part = (step.x, step.eps, torch.zeros(2))
    pairs = train_tokenizer.step_gradients(objective, objective, adversary, [part], 0, 1.0, args)[2]
    step(gan, lpips)
    expected = {name: p.grad for name, p in autoencoder.named_parameters()}
    if gan:
        adversary.learn(pairs, 1e-4)
        expected |= {f"d.{name}": p.grad for name, p in adversary.net.named_parameters()}
    found = {name: p.grad for name, p in step.net.named_parameters()}
    found |= {f"d.{name}": p.grad for name, p in step.discriminator.named_parameters()} if gan else {}
    assert found.keys() == expected.keys()
    for name in found:
        assert (found[name] - expected[name]).norm() <= 1e-3 * expected[name].norm() + 1e-6, name


def test_rounds_take_turns_and_warm_up_is_not_timed():
    order = []
    arms = {name: (lambda name=name: order.append(name)) for name in "ab"}
    seconds = benchmark.interleave(arms, Namespace(warmup=1, repeats=2), CPU)
    assert order == list("ababab") and [len(times) for times in seconds.values()] == [2, 2]


def test_a_ratio_is_the_median_over_rounds():
    """One round was ten times slower for both arms: of 3, 2 and 5, and not 5 / 1 of the medians."""
    assert benchmark.ratio([3.0, 20.0, 5.0], [1.0, 10.0, 1.0]) == {"median": 3.0, "min": 2.0, "max": 5.0}


def test_random_lpips_measures_a_distance():
    net = benchmark.random_lpips()
    torch.manual_seed(0)
    x = 2 * torch.rand(2, 3, 32, 32) - 1
    assert losses.perceptual_error(net, x, x) == 0
    assert torch.isfinite(losses.perceptual_error(net, x, -x)) and losses.perceptual_error(net, x, -x) != 0
    assert not any(p.requires_grad or p.is_meta for p in net.parameters())
    assert sum(p.numel() for p in net.net.parameters()) == 14_714_688   # VGG-16 without its classifier


def report(tmp_path, capsys, *flags: str) -> dict:
    path = tmp_path / "new" / "speed.json"
    benchmark.main([*flags, "--smoke", "--json", str(path)])
    found = json.loads(path.read_text())
    assert found == json.loads(capsys.readouterr().out) and HEADER <= set(found)
    assert [p.name for p in path.parent.iterdir()] == ["speed.json"]
    return found


def test_smoke_of_the_tokenizer(tmp_path, capsys):
    torch.ones(2 ** 27)   # 512 MiB that came and went here: no part of any arm's peak
    found = report(tmp_path, capsys, "tokenizer")
    assert list(found["arms"]) == ["alone", "gan", "lpips", "gan+lpips"]
    assert found["lpips_weights"] == "random" and found["config"]["precision"] == "fp32"
    flop, memory = ([row[key] for row in found["arms"].values()] for key in
                    ("gflop_per_image", "peak_memory_mib"))
    assert flop[0] < min(flop[1:3]) and max(flop[1:3]) < flop[3]
    # The 14.7 M weights of VGG-16 are 56 MiB, and AdamW holds 2.8 M weights of PatchGAN four times: 42 MiB.
    assert memory[2] - memory[0] > 56 and memory[1] - memory[0] > 42 and memory[3] - memory[0] > 98
    for row in found["arms"].values():
        assert set(row["seconds_per_step"]) == set(row["time_over_alone"]) == SPREAD
        share = row["gflop_per_image"] / row["seconds_per_step"]["median"] / found["matrix_gflop_per_second"]
        assert_close([row["share_of_matrix_rate"], row["images_per_second"]],
                     [share, 1 / row["seconds_per_step"]["median"]], rtol=1e-3, atol=0)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_smoke_of_the_dit(tmp_path, capsys, precision):
    found = report(tmp_path, capsys, "dit", "--precision", precision, "--batch", "2")
    assert list(found["arms"]) == ["ours", "plain"] and set(found["speedup_over_plain"]) == SPREAD
    assert abs(found["counted_over_closed_form"] - 1) < 0.03
    for row in found["arms"].values():
        assert abs(row["gflop_per_image_counted"] / found["gflop_per_image"] - 1) < 0.03
        assert_close(row["images_per_second"] * row["seconds_per_step"]["median"], 2.0, rtol=1e-3, atol=0)
        assert_close(row["gflop_per_second"], row["images_per_second"] * found["gflop_per_image"],
                     rtol=1e-3, atol=0)


def test_smoke_of_sampling(tmp_path, capsys):
    """At 8 steps and shift 0.3 the times 0, 0.041, 0.091, 0.153 lie below 0.21, and 0.231 does not."""
    found = report(tmp_path, capsys, "sampling", "--batch", "2")
    assert {name: row["evaluations_per_image"] for name, row in found["arms"].items()} == {
        "interval fp32": 12, "both fp32": 16, "interval bf16": 12, "both bf16": 16}
    assert set(found["interval_speedup"]) == {"by_evaluations", "fp32", "bf16"}
    assert_close(found["interval_speedup"]["by_evaluations"], 16 / 12, rtol=1e-4, atol=0)
    assert set(found["bf16_speedup"]) == {"interval", "both"}


def test_the_interval_of_the_paper_saves_a_quarter(monkeypatch):
    """t = 0.3 u / (1 - 0.7 u) < 0.21 for u < 0.21 / 0.447 = 0.4698: 118 of 250 steps need one branch only."""
    class Still(nn.Module):
        config = TINY

        def forward(self, x, t, y):
            return x

    monkeypatch.setattr(models, "build_dit", lambda config: Still())
    args = benchmark.parse(["sampling", "--warmup", "0", "--repeats", "1"])
    found = benchmark.sampling(args, CPU)
    assert found["arms"]["interval fp32"]["evaluations_per_image"] == 132 * 2 + 118
    assert found["interval_speedup"]["by_evaluations"] == 500 / 382 > 1.25


def test_without_flags_it_times_the_demo_transformer(capsys):
    args = benchmark.parse([])
    assert (args.benchmark, args.model, args.batch) == ("dit", "demo", 16)


@pytest.mark.parametrize("flags, message", [
    (["tokenizer", "--model", "no-such"], "invalid choice: 'no-such'"),
    (["dit", "--model", "f16d32"], "invalid choice: 'f16d32'"),
    (["tokenizer", "--size", "250"], "--size 250 does not fit --model f16d32, which takes a multiple of 16"),
    (["tokenizer", "--model", "vit-demo", "--size", "64"], "which takes 32 pixels"),
    (["tokenizer", "--size", "16"], "--size must be at least 32"),
    (["sampling", "--steps", "0"], "--steps must be at least 1"),
    (["dit", "--repeats", "0"], "--repeats must be at least 1"),
])
def test_bad_input_ends_with_one_line_and_exit_2(tmp_path, capsys, flags, message):
    with pytest.raises(SystemExit) as stop:
        benchmark.main([*flags, "--json", str(tmp_path / "new" / "speed.json")])
    assert stop.value.code == 2 and message in capsys.readouterr().err.strip().splitlines()[-1]
    assert not (tmp_path / "new").exists()


def test_a_folder_is_no_report(tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        benchmark.main(["dit", "--smoke", "--json", str(tmp_path)])
    assert stop.value.code == 2 and "is a folder" in capsys.readouterr().err


def test_one_process_only(capsys):
    with pytest.raises(benchmark.InputError, match="without torchrun"):
        benchmark.check(benchmark.parse(["dit"]), Runtime(torch.device("cpu"), world=2))
