"""The checks of a card, every line of them on the CPU; and what torch.compile sees."""

import json
from functools import partialmethod

import pytest
import runtime
import torch
from torch import nn

import models
from studies import gpu


@pytest.fixture
def graphs(monkeypatch):
    """What compiled modules have been traced to, without the minutes of a compiler."""
    seen = []

    def backend(graph, inputs):
        seen.append(graph)
        return graph.forward

    monkeypatch.setattr(nn.Module, "compile", partialmethod(
        nn.Module.compile, backend=backend, fullgraph=True))   # a break is an error
    torch._dynamo.reset()
    return seen


def test_all_blocks_of_a_transformer_share_one_graph(graphs):
    """Ten blocks of each family, and also where they are computed twice."""
    row = models.DITS["demo"] | dict(depth=10, in_channels=4, input_size=4, num_classes=3)
    for config in (row, row | dict(family="sit")):
        net = models.build_dit(config)
        assert gpu.Runtime(gpu.CPU).compile(True, *net.blocks)
        net(torch.randn(2, 4, 4, 4), torch.rand(2), torch.arange(2)).sum().backward()
        assert len(graphs) == 1
        net.recompute = True
        net(torch.randn(2, 4, 4, 4), torch.rand(2), torch.arange(2)).sum().backward()
        assert len(graphs) == 1
        graphs.clear()


@pytest.mark.parametrize("name, count", [
    ("demo", None), ("vit-demo", 2), ("dgae-demo", None), ("discriminator", 1), ("LPIPS", 1)])
def test_no_graph_of_a_tokenizer_s_training_breaks(graphs, name, count):
    """Levels differ in their shapes, and each has a graph.  What the first block of a ViT
    gets lies transposed in memory, so that it has one of its own."""
    net, inputs = gpu.networks((name,) if "demo" in name else ())[name]
    blocks = gpu.blocks_of(net)
    assert gpu.Runtime(gpu.CPU).compile(True, *(blocks or [net]))
    with torch.autocast("cpu", torch.bfloat16):
        net(*inputs)
    assert 0 < len(graphs) <= len(blocks or [net])
    assert len(graphs) == (count or len(graphs))


def test_the_last_layers_are_outside_of_what_is_compiled():
    """Else a balanced loss would take a whole backward pass for one gradient."""
    for row in ("f16d32", "vit-shapes", "dgae-demo"):
        with torch.device("meta"):
            net = models.build_tokenizer(models.AUTOENCODERS[row] | dict(
                noise="learned", sigma=0.0))
        inside = {id(p) for block in gpu.blocks_of(net) for p in block.parameters()}
        assert not inside & {id(net.last_layer), id(net.encoder_last_layer)}
        assert len(inside) > 0.7 * len([*net.parameters()])


def test_smoke_runs_every_part(tmp_path, capsys):
    gpu.main(["--smoke", "--out", str(tmp_path)])
    found, = (json.loads(path.read_text()) for path in tmp_path.glob("*.json"))
    assert {*found["parts"]} == {*gpu.PARTS} and [*tmp_path.glob("*.png")]
    checks = {row["check"]: row for name in ("values", "stages", "processes")
              for row in found["parts"][name]["rows"]}
    assert all(row["passed"] for row in checks.values())
    assert checks["train_dit.py, resumed after 2 of 4 steps"]["difference"] == 0
    assert all(row["minutes"] > 0 for row in found["parts"]["toy"]["rows"])
    rates = [row for part in ("tokenizer", "transformer", "sampling")
             for row in found["parts"][part]["rows"]]
    assert len(rates) == 8 + 3 + 4 and min(row["share"] for row in rates) > 0
    assert "| check |" in capsys.readouterr().out


def test_checks_see_small_numbers_and_missing_ones():
    a, b = torch.tensor([600.0, 0.5]), torch.tensor([600.0, 1.0])
    assert gpu.farthest(a, b) == 0.5 and gpu.difference(a, b) < 1e-3
    empty = torch.tensor([])
    assert not gpu.check("", gpu.difference(empty, empty), 1.0)["passed"]


def test_after_a_stage_ctrl_c_ends_the_next_part():
    """And does not wait for it, as for a training's step."""
    gpu.stage(lambda flags: setattr(runtime.signals, "waits", True))
    assert not runtime.signals.waits


def test_a_part_that_runs_again_replaces_its_numbers_and_a_failure_is_named(
        tmp_path, monkeypatch, capsys):
    def part(number):
        return lambda run: [gpu.check("a sum", number, 0.5)]

    monkeypatch.setattr(gpu, "PARTS", {"values": part(float("nan")), "stages": part(0.0)})
    flags = ["--smoke", "--out", str(tmp_path)]
    with pytest.raises(SystemExit) as stop:
        gpu.main(flags)
    assert stop.value.code == 2 and "1 check(s) failed: a sum" in capsys.readouterr().err
    monkeypatch.setitem(gpu.PARTS, "values", part(0.5))
    gpu.main([*flags, "--only", "values"])
    found, = (json.loads(path.read_text()) for path in tmp_path.glob("*.json"))
    assert {*found["parts"]} == {"values", "stages"}


def test_hours_follow_from_the_share():
    """B at 10 % of 1 PFLOP/s: 1.4e19 FLOP on 8 cards; 50,000 images at 10 a second on 8."""
    def rate(case, compiled, **more):
        return {"case": case, "compiled": compiled, "matrix_tflop_per_second": 1e3, **more}

    rows = gpu.hours([rate("B adamw", False, share=0.9), rate("B adamw", True, share=0.1),
                      rate("XL sampling inside", True, share=1.0, images_per_second=10.0)])
    found = {row["row"]: row["hours"] for row in rows}
    costs = json.loads((gpu.runtime.HERE / "results/costs.json").read_text())["presets"]
    flop, = (row["flop"] for row in costs if row["preset"] == "lightningdit-b")
    assert found["1: LightningDiT-B, 80 epochs"] == pytest.approx(flop / 8 / 1e14 / 3600)
    assert found["50,000 images of XL sampling inside"] == pytest.approx(50_000 / 80 / 3600)
    assert len(found) == 4


def test_without_a_card_it_is_one_line_and_exit_2(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit) as stop:
        gpu.main([])
    error = capsys.readouterr().err.strip().splitlines()
    assert stop.value.code == 2 and len(error) == 1 and "--smoke" in error[0]
