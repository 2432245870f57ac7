"""The transformer's stage: three steps against plain PyTorch, the sources of
latents, the optimisers, going on after an interruption, two processes, and wrong
input.  The networks are tiny, and the images have 8 x 8 pixels.
"""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.testing import assert_close

import checkpoints
import data
import flow
import models
import runtime
import train_dit

ROOT = Path(__file__).parents[1]
AUTOENCODER = dict(arch="conv", ch=8, ch_mult=(1, 2), num_res_blocks=1,
                   attn_resolutions=(), resolution=8, z_channels=4)


@pytest.fixture(autouse=True)
def small(monkeypatch):
    torch.set_num_threads(1)
    monkeypatch.setitem(models.DITS, "demo", models.DITS["demo"] | dict(
        depth=2, width=32, heads=2))


def make_tokenizer(path: Path, **changed) -> Path:
    """A checkpoint of a tokenizer that has seen nothing yet."""
    torch.manual_seed(0)
    net = models.build_tokenizer(AUTOENCODER | dict(noise="learned", sigma=0.0) | changed)
    with torch.no_grad():
        net.encode(torch.zeros(1, 3, 8, 8))
    checkpoints.save({
        "kind": "tokenizer", "config": dict(data="shapes", size=8, seed=0), "step": 0,
        "model_config": net.config, "model": net.state_dict(),
        "latent_mean": torch.zeros(4), "latent_std": torch.ones(4)}, path)
    return path


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory) -> Path:
    return make_tokenizer(tmp_path_factory.mktemp("tokenizer") / "tokenizer.pt")


def flags_of(tokenizer: Path, out: Path, *flags: str) -> list[str]:
    return ["--smoke", "--preset", "small", "--device", "cpu", "--tokenizer", str(tokenizer),
            "--out", str(out), "--cache", str(out.parent / "cache"), *flags]


def train(tokenizer: Path, out: Path, *flags: str) -> dict:
    train_dit.main(flags_of(tokenizer, out, *flags))
    return checkpoints.read(out / "checkpoint.pt", "dit")


def refused(capsys, *flags: str) -> str:
    """The one line on stderr in which the stage ends."""
    with pytest.raises(SystemExit) as stop:
        train_dit.main(["--smoke", "--preset", "small", "--device", "cpu", *flags])
    error = capsys.readouterr().err.strip().splitlines()
    assert stop.value.code == 2
    return error[-1]


def read_log(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]


def assert_same(a: object, b: object) -> None:
    """The same bits in nested containers of tensors."""
    assert type(a) is type(b)
    if isinstance(a, dict):
        assert a.keys() == b.keys()
        a, b = list(a.values()), list(b.values())
    if isinstance(a, list | tuple):
        assert len(a) == len(b)
        for left, right in zip(a, b):
            assert_same(left, right)
    else:
        assert torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


def test_smoke_writes_a_checkpoint_that_rebuilds_itself(tokenizer, tmp_path):
    state = train(tokenizer, tmp_path / "run")
    assert state["step"] == state["ema_updates"] == 4
    assert state["classes"] == list(data.SHAPES) and state["latent_shape"] == [4, 4, 4]
    assert state["config"]["data"] == "shapes"
    assert state["tokenizer"] == {
        "path": str(tokenizer), "sha256": runtime.file_sha256(tokenizer)}
    dit, _ = checkpoints.load_dit(tmp_path / "run/checkpoint.pt")
    v = dit(torch.zeros(2, 4, 4, 4), torch.tensor([0.2, 0.8]), torch.tensor([0, 10]))
    assert v.shape == (2, 4, 4, 4) and (tmp_path / "run/images/0000004.png").exists()
    lines = read_log(tmp_path / "run")
    assert [line.get("step") for line in lines] == [None, 1, 2, 3, 4]
    assert {"velocity", "by_t", "grad_norm", "lr"} <= lines[1].keys()


# ------------------------------------------------------------------------------
# Three steps, written out.  The flags are all different from what they are by
# default, and the smoke preset gets a warm-up of two steps and a cooldown.

FLAGS = ["--steps", "3", "--accumulate", "2", "--betas", "0.8", "0.9", "--clip", "0.5",
         "--ema", "0.3", "--cosine-weight", "0.7", "--label-dropout", "0.5", "--seed", "3",
         "--t-shift", "0.6", "--lr", "0.01"]
RATES = 0.005, 0.01, 0.01 * 2 / 3       # warm-up (k + 1) / 2, cooldown (3 - k) / 1.5


def plain_posteriors(path: Path, indices: torch.Tensor, flipped: torch.Tensor):
    """mean, std and label of shapes, or of their mirror images, as fp16 keeps them."""
    net, _ = checkpoints.load_tokenizer(path)
    pixels, y, _ = data.Shapes(8, "train").render_batch(indices.numpy())
    x = pixels / 127.5 - 1
    x = torch.where(flipped[:, None, None, None], x.flip(3), x)
    with torch.no_grad():
        mean, logvar = net.posterior(x)
    return mean.half().float(), logvar.exp().sqrt().half().float(), y


def plain_training(path: Path, optimizer: str, noise: str, uniform: bool, sampled: bool):
    def randn(*shape, stream, step, draw=torch.randn):
        return draw(*shape, generator=runtime.generator(3, stream, step))

    everything = torch.arange(64).repeat(2), torch.arange(128) >= 64
    mean, std, _ = plain_posteriors(path, *everything)
    channels = mean.transpose(0, 1).flatten(1)
    centre, spread = channels.mean(1), channels.var(1, unbiased=False)
    if sampled:
        spread = spread + std.square().mean((0, 2, 3))
    torch.manual_seed(3)
    dit = models.build_dit(models.DITS["demo"] | dict(
        in_channels=4, input_size=4, num_classes=10))
    ema = {name: p.detach().clone() for name, p in dit.named_parameters()}
    names = ["attn.qkv", "attn.proj", "mlp.w12", "mlp.w3"] if optimizer == "muon" else []
    hidden = [dit.get_parameter(f"blocks.{i}.{name}.weight") for i in (0, 1) for name in names]
    rest = [p for p in dit.parameters() if not any(p is q for q in hidden)]
    steppers = [torch.optim.AdamW(rest, lr=1, betas=(0.8, 0.9), weight_decay=0)]
    if hidden:
        steppers.append(torch.optim.Muon(hidden, lr=1, weight_decay=0,
                                         adjust_lr_fn="match_rms_adamw"))
    log = []
    for step, rate in enumerate(RATES):
        places = np.arange(4 * step, 4 * step + 4)
        order = torch.from_numpy(data.epoch_order(64, 3, 0)[places])
        flipped = torch.from_numpy(data.uniform(3, 2, places, 3)[:, 2] < 0.5)
        z, std, y = plain_posteriors(path, order, flipped)
        if sampled:
            scale = randn(4, stream="scale", step=step) if noise == "gaussian" else torch.ones(4)
            noise_of_z = randn(4, 4, 4, 4, stream="posterior", step=step)
            z = z + scale[:, None, None, None] * std * noise_of_z
        z = (z - centre[:, None, None]) / spread.sqrt()[:, None, None]
        eps = randn(4, 4, 4, 4, stream="eps", step=step)
        t = (randn(4, stream="t", step=step, draw=torch.rand) if uniform
             else 1 / (1 + torch.exp(-randn(4, stream="t", step=step))))
        t = 0.6 * t / (1 - 0.4 * t)
        y[randn(4, stream="labels", step=step, draw=torch.rand) < 0.5] = 10
        part = t[:, None, None, None]
        v, v_hat = z - eps, dit(part * z + (1 - part) * eps, t, y)
        cosine = (v * v_hat).sum(1) / (v.norm(dim=1) * v_hat.norm(dim=1).clamp(min=1e-8))
        for p in dit.parameters():
            p.grad = None
        velocity = (v - v_hat).square().mean()
        (velocity + 0.7 * (1 - cosine).mean()).backward()
        grads = [p.grad for p in dit.parameters() if p.grad is not None]
        norm = torch.cat([g.flatten() for g in grads]).norm().item()
        log.append((pytest.approx(rate), pytest.approx(velocity.item(), rel=1e-4),
                    pytest.approx(norm, rel=1e-3)))
        for g in grads:
            g.mul_(min(1, 0.5 / norm))
        for stepper in steppers:
            stepper.param_groups[0]["lr"] = rate
            stepper.step()
        for name, p in dit.named_parameters():
            ema[name] += (1 - min(0.3, (1 + step) / (10 + step))) * (p.detach() - ema[name])
    return dict(dit.named_parameters()), ema, log


@pytest.mark.parametrize("optimizer, noise, flags", [
    ("adamw", "learned", []),
    ("muon", "gaussian", ["--t", "uniform"]),
    ("adamw", "fixed", ["--latent", "mean"])])
def test_three_steps_are_those_written_out(tmp_path, monkeypatch, optimizer, noise, flags):
    monkeypatch.setitem(train_dit.SMOKE, "warmup", 2)
    monkeypatch.setitem(train_dit.SMOKE, "cooldown", 0.5)
    path = make_tokenizer(tmp_path / "tokenizer.pt", noise=noise, sigma=0.4)
    state = train(path, tmp_path / "run", "--optimizer", optimizer, *FLAGS, *flags)
    model, ema, log = plain_training(
        path, optimizer, noise, "uniform" in flags, "mean" not in flags)
    assert len(state["optimizers"]) == (2 if optimizer == "muon" else 1)
    for name, p in model.items():
        # Muon computes in bf16; a step of it moves a matrix by about 0.2 times the rate.
        tolerance = 2e-4 if optimizer == "muon" and name.startswith("blocks") else 2e-6
        for found, expected in ((state["model"], p.detach()), (state["ema"], ema[name])):
            assert (found[name] - expected).square().mean().sqrt() < tolerance, name
    keys = "lr", "velocity", "grad_norm"
    assert [tuple(line[k] for k in keys) for line in read_log(tmp_path / "run")[1:]] == log


# ------------------------------------------------------------------------------
# Where latents come from.


@pytest.fixture(scope="module")
def pictures(tmp_path_factory) -> Path:
    """24 shapes of 8 x 8 pixels as files, in two classes, and one broken file."""
    folder = tmp_path_factory.mktemp("pictures")
    images = data.Shapes(8, "train").render_batch(range(24))[0].permute(0, 2, 3, 1).numpy()
    for i, image in enumerate(images):
        (folder / "ab"[i % 2]).mkdir(exist_ok=True)
        Image.fromarray(image).save(folder / "ab"[i % 2] / f"{i:02d}.png")
    (folder / "a/broken.png").write_text("nothing")
    return folder


def test_images_are_encoded_once(tokenizer, pictures, tmp_path, monkeypatch, capsys):
    first = train(tokenizer, tmp_path / "first", "--data", str(pictures))
    assert first["classes"] == ["a", "b"] and first["config"]["data"] == str(pictures)
    assert "broken.png" in capsys.readouterr().err
    monkeypatch.setattr(models.Tokenizer, "posterior", None)
    second = train(tokenizer, tmp_path / "second", "--data", str(pictures))
    assert_same(first["model"], second["model"])
    with pytest.raises(TypeError):      # another tokenizer would have to encode them again
        train(make_tokenizer(tmp_path / "other.pt", noise="none"), tmp_path / "third",
              "--data", str(pictures))


def test_a_published_tokenizer_knows_neither_images_nor_statistics(pictures, tmp_path, capsys,
                                                                   monkeypatch):
    ours, published = make_tokenizer(tmp_path / "ours.pt"), tmp_path / "published.pt"
    checkpoints.save({"state_dict": checkpoints.read(ours)["model"]}, published)
    monkeypatch.setattr(models, "LDM_F16", AUTOENCODER)
    real = data.open_dataset
    monkeypatch.setattr(data, "open_dataset", lambda name, size, *more: real(
        name, {8: 8, 256: 8}[size], *more))
    found, expected = (train(path, tmp_path / path.stem, "--data", str(pictures))
                       for path in (published, ours))
    for key in ("model", "latent_mean", "latent_std"):
        assert_same(found[key], expected[key])
    assert "give --data" in refused(capsys, "--tokenizer", str(published))


def write_shard(path: Path, channels: int) -> None:
    """The safetensors format, by its specification."""
    draws, header, offset = np.random.default_rng(0), {}, 0
    arrays = {name: draws.normal(3, 2, (10, channels, 4, 4)).astype(np.float32)
              for name in ("latents", "latents_flip")} | {"labels": np.arange(10) % 3}
    for name, array in arrays.items():
        header[name] = {"dtype": {"f": "F32", "i": "I64"}[array.dtype.kind], "shape": array.shape,
                        "data_offsets": [offset, offset + array.nbytes]}
        offset += array.nbytes
    text = json.dumps(header).encode()
    path.parent.mkdir()
    checkpoints.save({name: torch.full((1, channels, 1, 1), value) for name, value in
                      (("mean", 3.0), ("std", 2.0))}, path.parent / "latents_stats.pt")
    path.write_bytes(len(text).to_bytes(8, "little") + text
                     + b"".join(array.tobytes() for array in arrays.values()))


def test_latents_of_lightningdit_are_learned_as_they_are(tokenizer, tmp_path, monkeypatch, capsys):
    write_shard(tmp_path / "shards/latents_rank00_shard000.safetensors", 4)
    seen, interpolate = [], flow.interpolate
    monkeypatch.setattr(flow, "interpolate",
                        lambda z, *more: seen.append(z) or interpolate(z, *more))
    state = train(tokenizer, tmp_path / "run", "--latents", str(tmp_path / "shards"))
    assert state["classes"] == ["0", "1", "2"]
    assert_close(state["latent_mean"], torch.full((4,), 3.0))
    assert_close(state["latent_std"], torch.full((4,), 2.0))
    z = 2 * seen[0] + 3
    shard = checkpoints.read(tmp_path / "shards/latents_rank00_shard000.safetensors")
    known = torch.cat([shard["latents"], shard["latents_flip"]])
    assert (z[:, None] - known).abs().amax((2, 3, 4)).min(1).values.max() < 1e-5
    write_shard(tmp_path / "other/latents_rank00_shard000.safetensors", 3)
    error = refused(capsys, "--tokenizer", str(tokenizer), "--latents", str(tmp_path / "other"))
    assert "has 3 channels" in error


# ------------------------------------------------------------------------------
# The log, and the optimisers.


def test_bins_count_every_sample_once():
    bins = train_dit.TimeBins(torch.device("cpu"))
    for t, error in ((0.0, 1.0), (0.05, 3.0), (0.95, 5.0), (1.0, 7.0)):
        bins.add(torch.tensor([t]), torch.tensor([error]))
    assert bins.read() == {"velocity": 4.0, "by_t": [2.0] + [None] * 8 + [6.0]}
    bins.add(torch.tensor([0.5]), torch.tensor([1.0]))
    assert bins.read()["velocity"] == 1.0


@pytest.mark.parametrize("row", ["demo", "DiT-B"])
def test_every_parameter_has_one_optimizer(row, monkeypatch):
    dit = models.build_dit(models.DITS[row] | dict(
        depth=2, width=32, heads=2, qk_norm=True, in_channels=4, input_size=4, num_classes=10))
    for kind in ("adamw", "muon"):
        learner = train_dit.Learner(dit, kind, 1e-3, [0.9, 0.95], 0.9)
        groups = [o.param_groups[0]["params"] for o in learner.optimizers]
        owned = [id(p) for group in groups for p in group]
        assert sorted(owned) == sorted(id(p) for p in dit.parameters() if p.requires_grad)
        assert all(o.param_groups[0]["weight_decay"] == 0 for o in learner.optimizers)
    names = {id(p): name for name, p in dit.named_parameters()}
    mlp = ("w12", "w3") if row == "demo" else ("fc1", "fc2")
    expected = {f"blocks.{i}.{name}.weight" for i in (0, 1)
                for name in ("attn.qkv", "attn.proj", *(f"mlp.{layer}" for layer in mlp))}
    assert {names[id(p)] for p in groups[1]} == expected


# ------------------------------------------------------------------------------
# Interruptions and processes.


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_an_interrupted_run_ends_with_the_same_bits(tokenizer, tmp_path, monkeypatch, optimizer):
    """It stops in its fourth step, after the checkpoint of the second."""
    monkeypatch.setitem(train_dit.SMOKE, "cooldown", 0.5)
    flags = ["--optimizer", optimizer]
    whole = train(tokenizer, tmp_path / "whole", *flags)
    step, steps = train_dit.Learner.step, []

    def interrupted(self, lr):
        steps.append(lr)
        if len(steps) == 4:
            raise KeyboardInterrupt
        step(self, lr)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(train_dit.Learner, "step", interrupted)
        train(tokenizer, tmp_path / "parts", *flags)
    assert checkpoints.read(tmp_path / "parts/checkpoint.pt")["step"] == 2
    parts = train(tokenizer, tmp_path / "parts", *flags)
    for key in ("step", "model", "ema", "ema_updates", "optimizers"):
        assert_same(whole[key], parts[key])
    assert read_log(tmp_path / "whole")[1:] == read_log(tmp_path / "parts")[1:]
    assert train(tokenizer, tmp_path / "parts", *flags)["step"] == 4      # and nothing is left


def test_two_processes_train_as_one(tokenizer, tmp_path):
    """To rounding, in the weights and in the log."""
    flags = ["--steps", "2", "--accumulate", "2", "--t", "uniform"]
    script = ("import models, train_dit\n"
              "models.DITS['demo'].update(depth=2, width=32, heads=2)\n"
              f"train_dit.main({flags_of(tokenizer, tmp_path / 'two', *flags)!r})")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        place = dict(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(free.getsockname()[1]),
                     WORLD_SIZE="2", OMP_NUM_THREADS="1", PYTHONPATH=str(ROOT))
    runs = [subprocess.Popen([sys.executable, "-c", script], stderr=subprocess.PIPE, text=True,
                             env=os.environ | place | {"RANK": rank, "LOCAL_RANK": rank})
            for rank in "01"]
    for run in runs:
        error = run.communicate()[1]
        assert run.returncode == 0, error[-2000:]
    one = train(tokenizer, tmp_path / "one", *flags)
    two = checkpoints.read(tmp_path / "two/checkpoint.pt")
    for key in ("model", "ema"):
        assert_close(one[key], two[key], rtol=0, atol=1e-5)
    logs = read_log(tmp_path / "one")[1:], read_log(tmp_path / "two")[1:]
    for left, right in zip(*logs):
        assert left["velocity"] == pytest.approx(right["velocity"], rel=1e-5)
        assert left["grad_norm"] == pytest.approx(right["grad_norm"], rel=1e-4)
        assert left["by_t"] == [b and pytest.approx(b, rel=1e-4) for b in right["by_t"]]


# ------------------------------------------------------------------------------
# Flags, and wrong input.


@pytest.mark.parametrize("preset, expected", [
    ("lightningdit-b", dict(model="B", optimizer="adamw", batch=1024, lr=2e-4, steps=100_080,
                            ema=0.9999, t="logit-normal", cosine_weight=1.0, cooldown=0.0)),
    ("lightningdit-b-plus", dict(model="B", batch=1024, lr=2e-4, steps=200_160)),
    ("dit-b", dict(model="DiT-B", optimizer="adamw", batch=1024, lr=2e-4, steps=100_080,
                   t="uniform", cosine_weight=0.0, cooldown=0.0)),
    ("lightningdit-xl-sota", dict(model="XL", optimizer="muon", batch=768, lr=1.8e-4,
                                  steps=884_040, ema=0.9999, cooldown=0.0))])
def test_presets_are_the_rows_of_the_paper(preset, expected):
    """Its epoch is 1,281,167 images: 1251 whole batches of 1024, 1668 of 768."""
    args = vars(train_dit.parse(["--preset", preset]))
    assert {key: args[key] for key in expected} == expected
    assert args["betas"] == [0.9, 0.95] and args["label_dropout"] == 0.1


def test_flags_reach_the_network(tokenizer, tmp_path, monkeypatch):
    compiled, recomputed, forward = [], [], models.DiT.forward

    def spy(self, *inputs):
        recomputed.append(self.recompute)
        return forward(self, *inputs)

    monkeypatch.setattr(models.Block, "compile", lambda self: compiled.append(self))
    monkeypatch.setattr(models.DiT, "forward", spy)
    monkeypatch.setitem(models.DITS, "SiT-S/2", models.DITS["SiT-S/2"] | dict(
        depth=2, width=32, heads=2))
    state = train(tokenizer, tmp_path / "run", "--compile", "--recompute", "--model", "SiT-S/2")
    assert len(compiled) == 2 and recomputed[0] is True
    assert state["model_config"]["family"] == "sit" and state["model_config"]["patch"] == 2


def test_another_tokenizer_under_the_same_name_is_refused(tokenizer, tmp_path, capsys):
    path = tmp_path / "tokenizer.pt"
    path.write_bytes(tokenizer.read_bytes())
    train(path, tmp_path / "run", "--steps", "2")
    make_tokenizer(path, noise="fixed", sigma=0.1)
    error = refused(capsys, *flags_of(path, tmp_path / "run"))
    assert "was begun with --tokenizer" in error


@pytest.mark.parametrize("flags, message", [
    (["--tokenizer", "no/such/file.pt"], "no/such/file.pt"),
    (["--data", "no/such/folder"], "no/such/folder"),
    (["--accumulate", "3"], "--batch 4 must be a multiple"),
    (["--latents", "no/such/folder"], "no/such/folder"),
    (["--ema", "1"], "--ema"), (["--t-shift", "0"], "--t-shift"), (["--batch", "0"], "--batch")])
def test_wrong_input_is_one_line(tokenizer, tmp_path, capsys, flags, message):
    with pytest.raises(SystemExit) as stop:
        train(tokenizer, tmp_path / "run", *flags)
    error = capsys.readouterr().err.strip().splitlines()
    assert stop.value.code == 2 and len(error) == 1 and message in error[0]
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("call, message", [(0, "gradient norm is nan"), (1, "loss is inf")])
def test_what_is_not_finite_is_named_and_not_saved(tokenizer, tmp_path, capsys, monkeypatch,
                                                   call, message):
    """In the first part of a batch, or in the second, whose loss is looked at."""
    calls = []

    def cosine(v_hat, v):
        calls.append(v)
        return (v_hat.square().sum() + 1) * (float("inf") if len(calls) == call + 1 else 1)

    monkeypatch.setattr(flow, "cosine_velocity", cosine)
    error = refused(capsys, *flags_of(tokenizer, tmp_path / "run", "--accumulate", "2"))
    assert f"step 0: {message}" in error and not (tmp_path / "run/checkpoint.pt").exists()
