"""The transformer's stage: three steps against plain PyTorch for every preset and
flag, the sources of latents, going on after an interruption, two processes, and
wrong input.  The networks are tiny, and the images have 8 x 8 pixels.
"""

import functools
import json
import os
import re
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
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
TRANSFORMER = dict(depth=2, width=32, heads=2, in_channels=4, input_size=4, num_classes=10)


@pytest.fixture(autouse=True)
def small(monkeypatch):
    torch.set_num_threads(1)
    monkeypatch.setitem(models.DITS, "demo", models.DITS["demo"] | dict(
        depth=2, width=32, heads=2))


def make_tokenizer(path: Path, seed: int = 0, **changed) -> Path:
    """A checkpoint of a tokenizer that has seen nothing yet."""
    torch.manual_seed(0)
    net = models.build_tokenizer(AUTOENCODER | dict(noise="learned", sigma=0.0) | changed)
    with torch.no_grad():
        net.encode(torch.zeros(1, 3, 8, 8))
    checkpoints.save({
        "kind": "tokenizer", "config": dict(data="shapes", size=8, seed=seed), "step": 0,
        "model_config": net.config, "model": net.state_dict(),
        "latent_mean": torch.zeros(4), "latent_std": torch.ones(4)}, path)
    return path


def make_dit(path: Path, tokenizer: Path, seed: int = 0, **changed) -> Path:
    """A checkpoint in which no weight is zero after averaging, and all are zero before."""
    torch.manual_seed(seed)
    net = models.build_dit(models.DITS["demo"] | TRANSFORMER | changed)
    for p in net.parameters():
        if p.requires_grad:
            torch.nn.init.normal_(p, std=0.3)
    classes = [f"class{i}" for i in range(net.config["num_classes"])]
    checkpoints.save({
        "kind": "dit", "step": 7, "config": {"data": "shapes"}, "model_config": net.config,
        "model": {name: 0 * value for name, value in net.state_dict().items()},
        "ema": net.state_dict(), "classes": classes,
        "tokenizer": {"path": str(tokenizer), "sha256": runtime.file_sha256(tokenizer)},
        "latent_mean": torch.arange(4.0), "latent_std": torch.arange(1.0, 5.0)}, path)
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
# Three steps, written out in plain PyTorch: the definition of the training.  There
# are 64 shapes, four in a batch.  No weight starts at zero, so that each of them
# has a gradient from the first step on.

SETTINGS = dict(
    steps=3, batch=4, seed=0, model="demo", latent="sample", noise="learned", muon=False,
    lr=0.1, warmup=100, cooldown=0.0, betas=(0.9, 0.95), clip=1.0, ema=0.999, ramp=True,
    uniform_t=False, shift=1.0, cosine=1.0, dropout=0.1, init=None, qk_norm=False)
MUON = r"blocks\.\d\.(attn\.qkv|attn\.proj|mlp\.w12|mlp\.w3|mlp\.fc1|mlp\.fc2)\.weight"


@functools.cache
def plain_training(path: Path, **changed) -> dict:
    """Weights at the start and at the end, their average, and the lines of the log."""
    s = SimpleNamespace(**SETTINGS | changed)
    rt = runtime.Runtime(torch.device("cpu"))
    tokenizer, _ = checkpoints.load_tokenizer(path)
    images = data.Shapes(8, "train", seed=1)
    images.length = 64

    def encode(x):
        mean, logvar = tokenizer.posterior(x)
        return mean, torch.exp(logvar / 2)

    # The latents' mean and deviation in each channel, over images and mirror images.
    latents = data.cache_latents(path.parent / "plain", images, encode, {"of": path.stem}, 64)
    both = [latents.read(np.arange(64), np.full(64, side)) for side in (0, 1)]
    mean, std = torch.cat(both).double().unbind(1)
    centre = mean.mean((0, 2, 3), keepdim=True)
    variance = (mean - centre).square().mean((0, 2, 3), keepdim=True)
    if s.latent == "sample":
        variance = variance + std.square().mean((0, 2, 3), keepdim=True)
    centre, spread = centre.float(), variance.sqrt().float()

    torch.manual_seed(s.seed)
    dit = models.build_dit(models.DITS[s.model] | dict(
        in_channels=4, input_size=4, num_classes=10, qk_norm=s.qk_norm))
    if s.init:
        dit, _ = checkpoints.load_dit(path.parent / s.init)
    weights = {name: p for name, p in dit.named_parameters() if p.requires_grad}
    ema = start = {name: p.detach().clone() for name, p in weights.items()}
    matrices = {name for name in weights if s.muon and re.fullmatch(MUON, name)}
    optimizers = [torch.optim.AdamW(
        [p for name, p in weights.items() if name not in matrices],
        betas=s.betas, eps=1e-8, weight_decay=0, fused=True)]
    if s.muon:
        optimizers.append(torch.optim.Muon(
            [weights[name] for name in sorted(matrices)], momentum=0.95, nesterov=True,
            ns_steps=5, weight_decay=0, adjust_lr_fn="match_rms_adamw"))

    log, batches = [], data.latent_batches(latents, s.batch, s.seed)
    for step in range(s.steps):
        batch = next(batches)
        z, std, y = batch["mean"], batch["std"], batch["y"]
        if s.latent == "sample":
            if s.noise == "gaussian":
                scale = runtime.global_randn((s.batch,), rt, s.seed, "scale", step)
                std = std * scale.view(-1, 1, 1, 1)
            z = z + std * runtime.global_randn(z.shape, rt, s.seed, "posterior", step)
        z = (z - centre) / spread
        eps = runtime.global_randn(z.shape, rt, s.seed, "eps", step)
        if s.uniform_t:
            t = runtime.global_rand(s.batch, rt, s.seed, "t", step)
        else:
            t = torch.sigmoid(runtime.global_randn((s.batch,), rt, s.seed, "t", step))
        t = s.shift * t / (1 + (s.shift - 1) * t)
        y[runtime.global_rand(s.batch, rt, s.seed, "labels", step) < s.dropout] = 10

        a = t.view(-1, 1, 1, 1)
        v, v_hat = z - eps, dit(a * z + (1 - a) * eps, t, y)
        errors = (v_hat - v).square().mean((1, 2, 3))
        loss = errors.mean() + s.cosine * (1 - F.cosine_similarity(v_hat, v, dim=1)).mean()
        gradients = torch.autograd.grad(loss, [*weights.values()])
        norm = torch.stack([g.norm() for g in gradients]).norm()
        rate = s.lr * min(1, (step + 1) / s.warmup)
        if s.cooldown:
            rate = min(rate, s.lr * (s.steps - step) / (s.cooldown * s.steps))
        for p, g in zip(weights.values(), gradients):
            p.grad = g * (s.clip / (norm + 1e-6)).clamp(max=1)
        for optimizer in optimizers:
            optimizer.param_groups[0]["lr"] = rate
            optimizer.step()
        decay = min(s.ema, (1 + step) / (10 + step)) if s.ramp else s.ema
        ema = {name: decay * ema[name] + (1 - decay) * p.detach() for name, p in weights.items()}
        by_t = [errors[(10 * t).long() == b] for b in range(10)]
        log.append({"lr": rate, "grad_norm": norm.item(), "velocity": errors.mean().item(),
                    "by_t": [e.mean().item() if len(e) else None for e in by_t]})
    return {"model": {name: p.detach() for name, p in weights.items()}, "ema": ema,
            "start": start, "statistics": (centre.flatten(), spread.flatten()), "log": log}


@pytest.fixture
def lively(monkeypatch):
    """Networks of two blocks in every row, whose weights start with a deviation of 0.2."""
    def initialize(dit):
        for p in dit.parameters():
            if p.requires_grad:
                torch.nn.init.normal_(p, std=0.2)

    monkeypatch.setattr(models.DiT, "initialize", initialize)
    for name, row in models.DITS.items():
        monkeypatch.setitem(models.DITS, name, row | dict(depth=2, width=32, heads=2))
    for name, row in train_dit.PRESETS.items():
        monkeypatch.setitem(train_dit.PRESETS, name, row | dict(
            shapes=64, log_every=1, grid_steps=2))


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    """A folder with a tokenizer of each kind, and with caches of their latents."""
    folder = tmp_path_factory.mktemp("home")
    for noise in ("learned", "fixed", "gaussian", "none"):
        make_tokenizer(folder / f"{noise}.pt", seed=1, noise=noise, sigma=0.4)
    make_dit(folder / "init.pt", folder / "learned.pt", family="sit")
    return folder


def three_steps(path: Path, out: Path, *flags: str) -> dict:
    train_dit.main([
        "--tokenizer", str(path), "--cache", str(path.parent / "cache"), "--out", str(out),
        "--steps", "3", "--batch", "4", "--workers", "0", "--device", "cpu", *flags])
    return checkpoints.read(out / "checkpoint.pt", "dit") | {"log": read_log(out)[1:]}


def difference(a: dict, b: dict, names: Iterable[str]) -> float:
    """Of these weights: the root of the mean square."""
    gaps = torch.cat([(a[name] - b[name]).flatten() for name in names])
    return gaps.square().mean().sqrt().item()


def check(found: dict, expected: dict, tolerance: float) -> None:
    """tolerance: as a share of what the steps have moved the weights.

    Muon moves its matrices a fifth as far as AdamW moves the rest.
    """
    matrices = {name for name in expected["start"] if re.fullmatch(MUON, name)}
    for key in ("model", "ema"):
        for names in (matrices, expected["start"].keys() - matrices):
            moved = difference(expected["start"], expected[key], names)
            assert difference(found[key], expected[key], names) < tolerance * moved, key
    assert all(o["param_groups"][0]["weight_decay"] == 0 for o in found["optimizers"])
    for key, known in zip(("latent_mean", "latent_std"), expected["statistics"]):
        assert_close(found[key], known, rtol=1e-6, atol=1e-6)
    for line, known in zip(found["log"], expected["log"], strict=True):
        assert line["by_t"] == [b and pytest.approx(b, rel=1e-3) for b in known["by_t"]]
        for key in ("lr", "velocity", "grad_norm"):
            assert line[key] == pytest.approx(known[key], rel=1e-3), key


# Where every sum is taken in the same order, the weights have the same bits.  Elsewhere
# rounding is amplified: by Muon, which computes in bf16, and by AdamW where a gradient is
# nothing but rounding, as that of the keys' biases in a SiT.
TOLERANCE = {"adamw": 1e-3, "sit": 1e-2, "muon": 0.1}


@pytest.mark.parametrize("preset, noise, kind, settings", [
    ("demo", "learned", "adamw", dict(model="shapes", lr=4e-3, cooldown=1.0, latent="mean")),
    ("small", "gaussian", "adamw", dict(lr=1e-3)),
    ("photos", "learned", "adamw", dict(model="S", lr=2e-4)),
    ("lightningdit-b", "learned", "adamw", dict(model="B", lr=2e-4, ramp=False)),
    ("lightningdit-b-plus", "none", "adamw", dict(model="B", lr=2e-4, ramp=False)),
    ("dit-b", "fixed", "sit", dict(
        model="DiT-B", lr=2e-4, ramp=False, uniform_t=True, cosine=0.0)),
    ("lightningdit-xl-sota", "learned", "muon", dict(
        model="XL", lr=1.8e-4, ramp=False, muon=True))])
def test_three_steps_of_a_preset(home, tmp_path, lively, monkeypatch, preset, noise, kind,
                                 settings):
    """Their warm-up is made two steps long, and the memory of the average as short."""
    monkeypatch.setitem(train_dit.PRESETS, preset, train_dit.PRESETS[preset] | {"warmup": 2})
    path = home / f"{noise}.pt"
    found = three_steps(path, tmp_path / "run", "--preset", preset, "--ema", "0.5")
    check(found, plain_training(path, noise=noise, warmup=2, ema=0.5, **settings), TOLERANCE[kind])


FLAGS = {   # and what they change in three steps of "small" with a rate of 0.1
    "--accumulate 2": {},
    "--steps 2": dict(steps=2),
    "--epochs 0.125": dict(steps=2),
    "--init init.pt": dict(init="init.pt"),
    "--batch 6 --accumulate 3": dict(batch=6),
    "--seed 3": dict(seed=3),
    "--model SiT-S/2": dict(model="SiT-S/2"),
    "--latent mean": dict(latent="mean"),
    "--qk-norm": dict(qk_norm=True),
    "--optimizer muon": dict(muon=True),
    "--optimizer muon --model DiT-B": dict(muon=True, model="DiT-B"),
    "--lr 0.2": dict(lr=0.2),
    "--betas 0.8 0.95": dict(betas=(0.8, 0.95)),
    "--betas 0.9 0.8": dict(betas=(0.9, 0.8)),
    "--clip 12": dict(clip=12),
    "--clip 1000": dict(clip=1000),
    "--ema 0.15": dict(ema=0.15),
    "--t uniform": dict(uniform_t=True),
    "--shift 0.6": dict(shift=0.6),
    "--cosine-weight 0": dict(cosine=0),
    "--cosine-weight 0.3": dict(cosine=0.3),
    "--label-dropout 0": dict(dropout=0),
    "--label-dropout 0.5": dict(dropout=0.5),
    "--label-dropout 0.9999": dict(dropout=0.9999),
}


@pytest.mark.parametrize("flags", FLAGS)
def test_three_steps_with_a_flag(home, tmp_path, lively, monkeypatch, flags):
    """The preset's warm-up of 100 steps is longer than the run."""
    monkeypatch.chdir(home)
    path, changed = home / "learned.pt", FLAGS[flags]
    found = three_steps(path, tmp_path / "run", "--preset", "small", "--lr", "0.1", *flags.split())
    kind = "muon" if "muon" in flags else "sit" if "SiT" in flags or "init" in flags else "adamw"
    usual, expected = plain_training(path), plain_training(path, **changed)
    check(found, expected, TOLERANCE[kind])
    if changed and not {"model", "init", "qk_norm"} & {*changed}:
        names = expected["ema"].keys()
        moved = difference(expected["start"], expected["ema"], names)
        assert difference(expected["ema"], usual["ema"], names) > 3 * TOLERANCE[kind] * moved


def test_a_transformer_for_other_classes_keeps_all_but_their_embeddings(home, tmp_path, lively):
    """Its last embedding, of no class, is kept too."""
    make_dit(tmp_path / "init.pt", home / "learned.pt", num_classes=7)
    state = three_steps(home / "learned.pt", tmp_path / "run", "--init", str(tmp_path / "init.pt"),
                        "--lr", "1e-12")
    known = checkpoints.read(tmp_path / "init.pt")["ema"]
    name = "y_embedder.embedding_table.weight"
    old, new = known.pop(name), state["model"].pop(name)
    assert_close(state["model"], known)
    assert new.shape == (11, 32) and torch.equal(new[10], old[7])
    assert (new[:7] - old[:7]).abs().mean() > 0.1


def test_norms_cannot_be_added_to_a_trained_transformer(home, tmp_path, capsys):
    with pytest.raises(SystemExit):
        train_dit.main(["--tokenizer", str(home / "learned.pt"), "--out", str(tmp_path / "run"),
                        "--init", str(home / "init.pt"), "--qk-norm"])
    assert "has learned without --qk-norm" in capsys.readouterr().err


def test_the_picture_shows_samples_of_the_average(home, tmp_path, lively, monkeypatch):
    """Ten classes in rows of eight, after two steps of Euler from one noise."""
    seen = {}
    monkeypatch.setattr(data, "save_rows", lambda path, rows: seen.update({path: rows}))
    three_steps(home / "learned.pt", tmp_path / "run", "--preset", "small", "--lr", "0.1")
    net, file = checkpoints.load_dit(tmp_path / "run/checkpoint.pt")     # the average
    decoder, _ = checkpoints.load_tokenizer(home / "learned.pt")
    z = torch.randn(80, 4, 4, 4, generator=runtime.generator(0, "picture"))
    with torch.no_grad():
        for t in (0.0, 0.5):
            z = z + 0.5 * net(z, torch.full((80,), t), torch.arange(80) // 8)
        mean, std = (file[name].view(4, 1, 1) for name in ("latent_mean", "latent_std"))
        expected = data.to_uint8(decoder.decode(z * std + mean)).permute(0, 2, 3, 1).float()
    rows = seen[tmp_path / "run/images/0000003.png"]
    assert [*rows] == file["classes"] == [*data.SHAPES] and expected.std() > 5
    assert (torch.cat([*rows.values()]).float() - expected).abs().max() <= 1


# ------------------------------------------------------------------------------
# Flags that change no number of a run, and the precision, which changes all of them.


def test_flags_that_change_no_number(home, tmp_path, lively, monkeypatch):
    seen, forward, loader = [], models.DiT.forward, torch.utils.data.DataLoader
    usual = three_steps(home / "learned.pt", tmp_path / "usual")
    monkeypatch.setattr(models.Block, "compile", lambda block, dynamic: seen.append("compiled"))
    monkeypatch.setattr(models.DiT, "forward", lambda dit, *inputs: (
        seen.append("recompute" if dit.recompute else "keep") or forward(dit, *inputs)))
    monkeypatch.setattr(torch.utils.data, "DataLoader", lambda *inputs, num_workers, **more: (
        seen.append(f"{num_workers} worker") or loader(*inputs, num_workers=1, **more)))
    found = three_steps(
        home / "learned.pt", tmp_path / "run", "--save-every", "1", "--recompute", "--compile",
        "--workers", "1", "--precision", "fp32", "--cache", str(tmp_path / "cache"))
    for key in ("model", "ema", "optimizers", "log"):
        assert_same(found[key], usual[key])
    assert seen.count("compiled") == 2 and seen.count("1 worker") == 1
    assert seen.count("recompute") == 3 + 3 * 2 and "keep" not in seen    # steps and pictures
    pictures = [{*os.listdir(tmp_path / name / "images")} for name in ("usual", "run")]
    assert pictures == [{"0000003.png"}, {"0000001.png", "0000002.png", "0000003.png"}]
    assert [*(tmp_path / "cache").glob("*/*.npy")]


def test_networks_run_in_the_precision_of_the_flag(home, tmp_path, lively, monkeypatch):
    """Latents are made in float32, once for all."""
    modes, forward, posterior = [], models.DiT.forward, models.Tokenizer.posterior
    monkeypatch.setattr(models.DiT, "forward", lambda *inputs: (
        modes.append(torch.is_autocast_enabled("cpu")) or forward(*inputs)))
    monkeypatch.setattr(models.Tokenizer, "posterior", lambda *inputs: (
        modes.append(torch.is_autocast_enabled("cpu")) or posterior(*inputs)))
    cache = "--cache", str(tmp_path / "cache")
    for precision, mode in (("bf16", True), ("auto", False), ("fp32", False)):
        three_steps(home / "learned.pt", tmp_path / precision, "--precision", precision, *cache)
        # One batch of images and its mirror images, three steps, and two for a picture.
        assert modes == (precision == "bf16") * [False, False] + [mode] * 5
        modes.clear()


@pytest.mark.parametrize("device, precision, kind", [
    ("cuda", "auto", torch.bfloat16), ("cuda", "bf16", torch.bfloat16), ("cuda", "fp32", None),
    ("cpu", "auto", None), ("cpu", "bf16", torch.bfloat16), ("cpu", "fp32", None)])
def test_auto_is_bf16_on_cuda(monkeypatch, device, precision, kind):
    chosen = []
    monkeypatch.setattr(torch, "autocast", lambda device_type, dtype: chosen.append(
        (device_type, dtype)))
    runtime.Runtime(torch.device(device)).autocast(precision)
    assert chosen == ([(device, kind)] if kind else [])


def test_every_flag_is_tested():
    """Those of the last line by other tests of this file."""
    flags = {"--" + name.replace("_", "-") for name in vars(train_dit.parse([]))
             if name not in train_dit.COMMON}
    tested = re.findall("--[a-z-]+", " ".join(FLAGS)) + [
        "--save-every", "--recompute", "--compile", "--workers", "--precision", "--cache",
        "--preset", "--tokenizer", "--data", "--size", "--accept-data", "--latents", "--out", "--device",
        "--smoke"]
    assert flags <= {*tested}


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
# The log.


def test_bins_count_every_sample_once():
    bins = train_dit.TimeBins(torch.device("cpu"))
    for t, error in ((0.0, 1.0), (0.05, 3.0), (0.95, 5.0), (1.0, 7.0)):
        bins.add(torch.tensor([t]), torch.tensor([error]))
    assert bins.read() == {"velocity": 4.0, "by_t": [2.0] + [None] * 8 + [6.0]}
    bins.add(torch.tensor([0.5]), torch.tensor([1.0]))
    assert bins.read()["velocity"] == 1.0


def test_the_errors_of_a_checkpoint_go_on_in_one_process_alone(tmp_path):
    """They are sums over all processes, and each of them reads the file."""
    def learner():
        sizes = dict(in_channels=4, input_size=4, num_classes=3)
        dit = models.build_dit(models.DITS["demo"] | sizes)
        return train_dit.Learner(dit, "adamw", 1e-3, [0.9, 0.95], 0.9)

    first, errors = learner(), torch.rand(2, 10).double()
    checkpoints.save({
        "kind": "dit", "config": {"lr": 1e-3}, "step": 7, "model_config": first.dit.config,
        "model": first.dit.state_dict(), "ema": first.ema.state_dict(), "ema_updates": 7,
        "optimizers": [o.state_dict() for o in first.optimizers], "errors_by_t": errors,
        "tokenizer": {}, "classes": ["a"], "latent_mean": torch.zeros(4),
        "latent_std": torch.ones(4)}, tmp_path / "c.pt")
    for is_main in (True, False):
        other = learner()
        assert other.resume(tmp_path / "c.pt", {"lr": 1e-3}, ["a"], is_main) == 7
        assert torch.equal(other.bins.sums, errors * is_main) and other.ema.updates == 7


# ------------------------------------------------------------------------------
# Interruptions and processes.


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_an_interrupted_run_ends_with_the_same_bits(tokenizer, tmp_path, monkeypatch, optimizer):
    """It stops in its fourth step, after the checkpoint of the second.

    The log's line about three steps begins before the checkpoint and ends after it.
    """
    monkeypatch.setitem(train_dit.SMOKE, "cooldown", 0.5)
    monkeypatch.setitem(train_dit.SMOKE, "log_every", 3)
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


@pytest.mark.parametrize("preset, model, steps, batch, ema", [
    ("demo", "shapes", 3300, 32, 0.995), ("small", "demo", 3000, 32, 0.999),
    ("photos", "S", 100_000, 128, 0.9995),
    ("lightningdit-b", "B", 100_080, 1024, 0.9999),
    ("lightningdit-b-plus", "B", 200_160, 1024, 0.9999),
    ("dit-b", "DiT-B", 100_080, 1024, 0.9999),
    ("lightningdit-xl-sota", "XL", 884_040, 768, 0.9999)])
def test_what_three_steps_do_not_show_of_a_preset(preset, model, steps, batch, ema):
    """An epoch of the paper is 1251 whole batches of 1024, or 1668 of 768."""
    args = train_dit.parse(["--preset", preset])
    assert (args.model, args.steps, args.batch, args.ema) == (model, steps, batch, ema)
    assert args.warmup == 100


def test_images_that_have_changed_are_refused_or_accepted(tokenizer, pictures, tmp_path, capsys):
    folder = shutil.copytree(pictures, tmp_path / "pictures")
    train(tokenizer, tmp_path / "run", "--data", str(folder), "--steps", "2")
    (folder / "b/01.png").unlink()
    flags = flags_of(tokenizer, tmp_path / "run", "--data", str(folder))
    assert "images have changed" in refused(capsys, *flags)
    assert train(tokenizer, tmp_path / "run", "--data", str(folder), "--accept-data")["step"] == 4
    for part in [*folder.glob("b"), *folder.glob("*/b")]:   # labels would change places
        part.rename(part.with_name("A"))
    flags = flags_of(tokenizer, tmp_path / "run", "--data", str(folder), "--accept-data")
    assert "has other classes" in refused(capsys, *flags)


def test_images_of_another_size(tokenizer, pictures, tmp_path):
    """A published tokenizer does not say for which size it is."""
    published = tmp_path / "published.pt"
    checkpoints.save({"state_dict": checkpoints.read(tokenizer)["model"]}, published)
    state = train(published, tmp_path / "run", "--data", str(pictures), "--size", "24")
    assert state["latent_shape"][1] == 24 // checkpoints.load_tokenizer(tokenizer)[0].stride


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
    (["--ema", "1"], "--ema"), (["--shift", "0"], "--shift"), (["--batch", "0"], "--batch")])
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
