"""What the study of costs counts, against counts by hand and against the trainers."""

import json
import re

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import checkpoints
import frozen
import models
import runtime
import train_dit
import train_tokenizer
from studies import costs

@pytest.fixture
def tiny_dit(monkeypatch):
    """A row of one block: its presets "demo" of 16 x 4 x 4 latents and 10 classes."""
    row = models.LIGHTNINGDIT | dict(depth=1, width=64, heads=1)
    monkeypatch.setitem(models.DITS, "shapes", row)
    return train_dit.parse(["--preset", "demo"])


def test_a_tiny_transformer_is_counted_as_by_hand(tiny_dit):
    """Two images of N = 16 tokens, C = 16, D = 64, H = 8 D / 3 = 170, 10 classes.

    Multiply-adds of an image, forward:
        patches and last layer   2 N C D                =    32,768
        block, linear layers     N (4 D^2 + 3 D H)      =   784,384
        block, attention         2 N^2 D                =    32,768
        modulations, time        (6 + 2) D^2 + D^2 + 256 D = 53,248
    A forward pass takes 2 FLOP for each and a backward pass 4, but 2 for the first
    layers, whose inputs learn nothing: N C D + 256 D = 32,768 of them.

    Parameters:
        patches C D + D, time 256 D + D + D^2 + D, labels 11 D     22,400
        block: norms 2 D, qkv and proj 4 D^2 + 4 D,
               SwiGLU 3 D H + 2 H + D, modulation 6 D^2 + 6 D      74,772
        end: norm D, linear D C + C, modulation 2 D^2 + 2 D         9,424
    """
    step = costs.count_step(train_dit, tiny_dit, 2)
    forward = 32_768 + 784_384 + 32_768 + 53_248
    assert step["flop"] == 2 * (6 * forward - 2 * 32_768)
    assert step["convolution_flop"] == 2 * 4 * 16_384
    assert step["parameters"] == 22_400 + 74_772 + 9_424
    # AdamW has two more numbers for each, and the average one.
    assert step["optimiser"] == 2 * step["gradients"] == 2 * step["average"]
    assert step["gradients"] == 4 * step["parameters"]
    held = step["weights"] + step["kept"] + step["optimiser"] + step["average"]
    assert held <= step["most"] <= held + step["gradients"]
    # The table of positions and the rotations are no parameters that learn.
    assert step["weights"] == step["gradients"] + 4 * (16 * 64 + 2 * 16 * 64)


def kept_by(net, x):
    """The bytes that net() keeps of x [*x] until its backward pass."""
    with costs.FakeTensorMode(), costs.Counter() as counter:
        net = costs.as_on_cuda(net())
        x = torch.zeros(x)
        before = counter.alive
        with costs.bf16():
            y = net(x)
        return counter.alive - before


def test_operations_are_those_that_are_no_views():
    """A product with a bias, an activation and a product in place; two views count nothing."""
    net, x = nn.Linear(16, 32), torch.zeros(8, 16)
    with torch.no_grad(), costs.Counter() as counter:
        nn.functional.silu(net(x)).view(2, 4, 32).mT.mul_(2)
    assert counter.operations == 3


def test_kept_bytes_of_two_layers_are_counted_as_by_hand():
    """x [8, 16] -> 32 -> silu -> 4.  In bfloat16 there are x, what silu gets, what the
    last layer gets, its weight, and what it gives.  x learns nothing, so that the weight
    of the first layer is not needed.
    """
    kept = kept_by(lambda: nn.Sequential(nn.Linear(16, 32), nn.SiLU(), nn.Linear(32, 4)), (8, 16))
    assert kept == 2 * (8 * 16 + 8 * 32 + 8 * 32 + 32 * 4 + 8 * 4)


def test_kept_bytes_of_a_norm_are_those_of_cuda():
    """x [2, 8, 4, 4] -> conv -> group norm -> silu -> conv, 8 channels, V = 256 values.

    In bfloat16: x, what both convolutions give, what the second gets, and both
    weights.  In float32, as CUDA's autocast has it: what the norm gets and gives.
    A mean and a deviation for each of the 2 images and 2 groups.
    """
    def net():
        return nn.Sequential(nn.Conv2d(8, 8, 1, bias=False), nn.GroupNorm(2, 8), nn.SiLU(),
                             nn.Conv2d(8, 8, 1, bias=False))

    kept = kept_by(net, (2, 8, 4, 4))
    V = 2 * 8 * 16
    # What the first convolution gives is dropped once it is float32.
    assert kept == 2 * (V + V + V + 2 * 64) + 4 * (2 * V) + 4 * 2 * 2 * 2


def test_an_rms_norm_keeps_one_input():
    """x [8, 16] -> linear -> RMS norm -> linear, V = 128 values.

    In bfloat16: x, what the second layer gets, its weight, and what it gives.  In
    float32: what the norm gets, and a mean and a deviation for each of the 8 rows,
    which is one more than an RMSNorm has.
    """
    kept = kept_by(lambda: nn.Sequential(nn.Linear(16, 16, bias=False), nn.RMSNorm(16),
                                         nn.Linear(16, 16, bias=False)), (8, 16))
    V = 8 * 16
    assert kept == 2 * (V + V + 16 * 16 + V) + 4 * V + 4 * 2 * 8


@pytest.mark.parametrize("recompute", [False, True])
def test_recomputing_keeps_the_input_of_each_block(tiny_dit, monkeypatch, recompute):
    """Of depth 1 and 3: two blocks more keep 4 N D bytes each for an image, and little
    else, if the rest is computed again."""
    tiny_dit.recompute, kept, most = recompute, [], []
    for depth in (1, 3):
        monkeypatch.setitem(models.DITS["shapes"], "depth", depth)
        step = costs.count_step(train_dit, tiny_dit, 64)
        kept.append(step["kept"])
        most.append(step["most"] - step["optimiser"] - step["average"] - step["weights"])
    block, inputs = (kept[1] - kept[0]) / 2, 64 * 4 * 16 * 64
    if recompute:
        assert inputs <= block < 1.1 * inputs
        assert most[1] < 1.5 * most[0]
    else:
        assert block > 10 * inputs
        assert most[1] > 2 * most[0]


class Features(nn.Module):
    """In place of DINOv2 ViT-L/14: [B, 1024, side, side] of images of 32 pixels."""

    def __init__(self, *given: object, imagenet: bool = False) -> None:
        super().__init__()
        stride = 32 // given[-1]
        self.net = nn.Conv2d(3, 1024, stride, stride)

    def forward(self, x):
        return self.net(x).float()


class Distance(nn.Module):
    """In place of LPIPS."""

    def __init__(self, **_: object) -> None:
        super().__init__()
        self.net = nn.Conv2d(3, 5, 3).requires_grad_(False)

    def forward(self, x_hat, x):
        return (self.net(x_hat) - self.net(x)).square().mean((1, 2, 3))


@pytest.fixture
def flop_of_main(monkeypatch):
    """flop_of_main(stage, flags): the FLOP of the first of two steps of main()."""
    def run(stage, flags):
        marks = []

        def steps(name, done, total, rt):
            for step in range(done, total):
                marks.append((counter.flop, counter.convolution_flop))
                yield step

        monkeypatch.setattr(runtime, "steps", steps)
        with costs.Counter() as counter:
            stage.main([*flags, "--smoke", "--steps", "2", "--device", "cpu",
                        "--precision", "fp32"])
        return tuple(after - before for before, after in zip(*marks))
    return run


def test_a_tokenizer_s_step_is_the_trainer_s(tmp_path, monkeypatch, flop_of_main):
    """With all that a step may have."""
    flags = ["--preset", "small", "--model", "demo", "--perceptual-weight", "1",
             "--align-weight", "0.1", "--disc-weight", "0.5", "--disc-start", "0", "--recompute"]
    monkeypatch.setattr(frozen, "load_teacher", Features)
    monkeypatch.setattr(frozen, "load_lpips", Distance)
    monkeypatch.setattr(frozen, "DinoV2", Features)
    monkeypatch.setattr(frozen.lpips, "LPIPS", Distance)
    flop = flop_of_main(train_tokenizer, [*flags, "--out", str(tmp_path / "run")])
    args = train_tokenizer.parse([*flags, "--smoke"])
    step = costs.count_step(train_tokenizer, args, args.batch)
    assert flop == (step["flop"], step["convolution_flop"]) and flop[0] > 1e6
    state = checkpoints.read(tmp_path / "run/checkpoint.pt")
    learned = {f"{part} {name}": value.numel() for part in ("model", "projection", "discriminator")
               for name, value in state[part].items()
               if not re.search("running_|num_batches", name)}
    assert step["parameters"] == sum(learned.values())
    assert step["frozen_parameters"] == (3 * 1024 * 16 + 1024) + (3 * 5 * 9 + 5)


def test_a_transformer_s_step_is_the_trainer_s(tmp_path, tiny_dit, flop_of_main):
    tokenizer = models.build_tokenizer(models.AUTOENCODERS["vit-shapes"])
    file = tmp_path / "checkpoint.pt"
    checkpoints.save({"kind": "tokenizer", "config": {"data": "shapes", "size": 32, "seed": 0},
                      "model_config": tokenizer.config, "model": tokenizer.state_dict(),
                      "step": 1, "latent_mean": torch.zeros(16),
                      "latent_std": torch.ones(16)}, file)
    flags = ["--tokenizer", str(file), "--cache", str(tmp_path / "latents"), "--recompute"]
    flop = flop_of_main(train_dit, [*flags, "--out", str(tmp_path / "run")])
    args = train_dit.parse([*flags, "--smoke"])
    step = costs.count_step(train_dit, args, args.batch)
    assert flop == (step["flop"], step["convolution_flop"]) and flop[0] > 1e6


# ------------------------------------------------------------------------------
# From a step to a row.


def test_muon_s_flop_are_those_of_its_products():
    net = nn.Linear(10, 6, bias=False)
    optimizer = torch.optim.Muon(net.parameters(), lr=1e-3)
    net(torch.ones(1, 10)).sum().backward()
    with FlopCounterMode(display=False) as counter:
        optimizer.step()
    assert counter.get_total_flops() == costs.muon_flop(6, 10) == costs.muon_flop(10, 6)


def test_muon_has_one_number_for_each_of_its_parameters(tiny_dit):
    """Its matrices are qkv and proj, 4 D^2, and those of SwiGLU, 3 D H."""
    adamw = costs.count_step(train_dit, tiny_dit, 1)
    tiny_dit.optimizer = "muon"
    muon = costs.count_step(train_dit, tiny_dit, 1)
    assert adamw["optimiser"] - muon["optimiser"] == 4 * (4 * 64**2 + 3 * 64 * 170)
    assert adamw["muon_flop"] == 0
    shapes = (192, 64), (64, 64), (340, 64), (64, 170)
    assert muon["muon_flop"] == sum(costs.muon_flop(*shape) for shape in shapes)


def test_hours_follow_from_both_rates(tiny_dit, monkeypatch):
    """Of 3,300 steps on 2 GPUs with 16 of the 32 images each."""
    monkeypatch.setattr(costs, "H100", 1e9)
    monkeypatch.setattr(costs, "TRANSFORMER", 0.5)
    monkeypatch.setattr(costs, "CONVOLUTION", 0.1)
    row = costs.cost(train_dit, "demo", gpus=2)
    step = costs.count_step(train_dit, tiny_dit, 16)
    seconds = step["convolution_flop"] / 1e8 + (step["flop"] - step["convolution_flop"]) / 5e8
    assert row["hours"] == pytest.approx(3300 * seconds / 3600)
    assert row["flop"] == 3300 * 2 * step["flop"]
    assert row["gflop_per_image"] == pytest.approx(step["flop"] / 16e9)
    assert row["gib_per_gpu"] == pytest.approx(1.1 * step["most"] / 2**30 + 2)
    assert (row["images_per_gpu"], row["parts"]) == (16, 1)


def test_a_row_that_does_not_fit_says_in_how_many_parts_it_does(tiny_dit, monkeypatch):
    """On a card with room for 8 of 32 images."""
    monkeypatch.setattr(costs, "CARD", costs.needed(costs.count_step(train_dit, tiny_dit, 8)))
    row = costs.cost(train_dit, "demo")
    assert row["parts"] == 4
    assert costs.cells(row)["fits 80 GB"] == "in 4 parts"


# ------------------------------------------------------------------------------
# The tables by which a training chooses its parts hold what is counted here.


def grows(stage, args, images):
    """Bytes that an image adds to the worst moment of a step."""
    few, many = (costs.count_step(stage, args, n)["most"] for n in (images, 2 * images))
    return (many - few) / images


@pytest.mark.parametrize("preset", ["photos", "dit-b"])
@pytest.mark.parametrize("recompute", [False, True])
def test_a_transformer_keeps_what_the_table_says(preset, recompute):
    args = train_dit.parse(["--preset", preset])
    args.recompute = recompute
    config = models.DITS[args.model] | dict(input_size=16)
    table = runtime.kept_of_latent(config, "bf16")[recompute]
    counted = grows(train_dit, args, 32)
    assert counted <= table and (recompute or table < 1.05 * counted)


@pytest.mark.parametrize("preset, recompute", [
    ("photos-64", False), ("photos-64", True), ("ldm-f16d16", True), ("dgae-b", False)])
def test_a_tokenizer_keeps_what_the_table_says(preset, recompute):
    args = train_tokenizer.parse(["--preset", preset])
    args.recompute = recompute
    table = runtime.kept_of_image(args.model, args.size, "bf16")[recompute]
    counted = grows(train_tokenizer, args, 4)
    assert counted <= table and (recompute or table < 1.05 * counted)


def test_the_paper_s_largest_training_fits_in_the_parts_that_are_chosen(monkeypatch):
    """192 images of XL on 79 GiB, of which the driver has taken a half."""
    args = train_dit.parse(["--preset", "lightningdit-xl-sota"])
    config = models.DITS["XL"] | dict(input_size=16)
    half = costs.count_step(train_dit, args, 96)
    free = costs.CARD - 2**29 - half["gradients"]   # the weights are there
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (free, 0))
    card = runtime.Runtime(torch.device("cuda"))
    chosen = runtime.fit(card, 192, runtime.kept_of_latent(config, "bf16"), half["parameters"],
                         None, None)
    assert chosen == (2, False)
    assert costs.needed(half) <= costs.CARD


def test_the_paper_s_transformer_costs_what_is_published():
    """23.0 GMAC forward for B at 256 tokens, so 138 GFLOP in all; 130 M parameters."""
    step = costs.count_step(train_dit, train_dit.parse(["--preset", "lightningdit-b"]), 1)
    assert step["flop"] / 1e9 == pytest.approx(6 * 23.0, rel=2e-3)
    assert step["parameters"] / 1e6 == pytest.approx(130.4, rel=1e-3)


# ------------------------------------------------------------------------------
# The command.


def test_the_command_prints_a_table_and_writes_json(tmp_path, capsys):
    costs.main(["--only", "demo", "--out", str(tmp_path / "costs.json")])
    lines = capsys.readouterr().out.splitlines()
    found = json.loads((tmp_path / "costs.json").read_text())
    assert [row["stage"] for row in found["presets"]] == ["train_tokenizer", "train_dit"]
    assert found["assumed"]["share_in_convolutions"] == costs.CONVOLUTION
    table = [line for line in lines if line.startswith("|")]
    assert len(table) == 4 and len({line.count("|") for line in table}) == 1
    assert "train_dit.py --preset demo" in table[3]


@pytest.mark.parametrize("flags, message", [
    (["--only", "lightningdit"], "--only lightningdit is no preset"),
    (["--gpus", "0"], "--gpus: 0 is not a whole number"),
    (["--out", "/proc/none/costs.json"], "cannot be written to"),
])
def test_bad_input_is_one_line_and_exit_2(capsys, flags, message):
    with pytest.raises(SystemExit) as stop:
        costs.main(flags)
    error = capsys.readouterr().err.strip().splitlines()
    assert stop.value.code == 2 and len(error) == 1 and message in error[0]
