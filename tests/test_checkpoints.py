"""Our files rebuild their network, published ones load as they are, exports load
as published ones, and any other file is refused in one line."""

import argparse
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

import checkpoints
import models
from runtime import InputError
from test_models import (
    DEMO_LATENTS, GOLDEN, LIGHTNINGDIT_TINY, SMALL, SMALL_VIT, T, Y, arr, assert_golden, filled,
    golden, tokenizer)

LIGHTNINGDIT = models.DITS["demo"] | DEMO_LATENTS
SIT = LIGHTNINGDIT | dict(family="sit", patch=2)


def transformer(config: dict = LIGHTNINGDIT) -> models.DiT:
    return filled(models.build_dit(config))


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> None:
    assert_close(dict(a), dict(b), rtol=0, atol=0)


def write_tokenizer(path: Path, config: dict = SMALL, **changed: object) -> dict:
    """A checkpoint of ours, with a discriminator and a projection."""
    net = tokenizer(config, **changed)
    state = {"kind": "tokenizer", "config": {"loss": "ve"}, "model_config": net.config, "step": 7,
             "model": net.state_dict(), "discriminator": {"main.0.bias": arr("bias", 64)},
             "projection": {"weight": arr("projection", 6, 4, 1, 1)},
             "latent_mean": arr("mean", 4), "latent_std": arr("std", 4).exp()}
    checkpoints.save(state, path)
    return state


def write_dit(path: Path, config: dict = LIGHTNINGDIT) -> dict:
    """A checkpoint of ours whose averaged weights are those of a fresh network."""
    net, ema = transformer(config), models.build_dit(config)
    state = {"kind": "dit", "config": {}, "model_config": net.config, "step": 9,
             "model": net.state_dict(), "ema": ema.state_dict(), "ema_updates": 9,
             "optimizers": [torch.optim.AdamW(net.parameters()).state_dict()],
             "classes": ["circle", "square"], "latent_mean": arr("mean", 8),
             "latent_std": arr("std", 8).exp(), "latent_shape": (8, 8, 8)}
    checkpoints.save(state, path)
    return state


def write_safetensors(path: Path, state: dict[str, Tensor]) -> None:
    """The length of the header, the header, the bytes: by the format's definition."""
    names = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.int64: "I64"}
    header, data = {"__metadata__": {"format": "pt"}}, b""
    for name, value in state.items():
        raw = value.contiguous().flatten().view(torch.uint8).numpy().tobytes()
        header[name] = {"dtype": names[value.dtype], "shape": list(value.shape),
                        "data_offsets": [len(data), len(data) + len(raw)]}
        data += raw
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)


def refusal(load, *args) -> str:
    with pytest.raises(InputError) as error:
        load(*args)
    assert "\n" not in str(error.value)
    return str(error.value)


# ------------------------------------------------------------------------------
# Ours.


@pytest.mark.parametrize("config", [SMALL, SMALL_VIT, SMALL | dict(noise="gaussian", sigma=0.2)])
@torch.no_grad()
def test_a_tokenizer_rebuilds_itself(tmp_path, config):
    state = write_tokenizer(tmp_path / "checkpoint.pt", config)
    net, file = checkpoints.load_tokenizer(tmp_path / "checkpoint.pt")
    assert net.config == state["model_config"] and file["step"] == 7 and not net.training
    same(net.state_dict(), state["model"])
    draws = arr("x", 2, 3, 8, 8), arr("eps", 2, 4, 4, 4), torch.tensor([0.5, -2.0])
    for found, expected in zip(net(*draws), tokenizer(config)(*draws)):
        assert_close(found, expected, rtol=0, atol=0)


def test_a_transformer_rebuilds_itself_with_its_averaged_weights(tmp_path):
    state = write_dit(tmp_path / "checkpoint.pt")
    net, file = checkpoints.load_dit(tmp_path / "checkpoint.pt")
    assert net.config == state["model_config"] and file["classes"] == ["circle", "square"]
    same(net.state_dict(), state["ema"])


# ------------------------------------------------------------------------------
# Published files.


@pytest.mark.parametrize("form", ["bare", "state_dict", "safetensors"])
def test_a_published_tokenizer_loads(tmp_path, form):
    """Without its losses and the foundation model that accompany it."""
    state = tokenizer(SMALL).state_dict()
    company = {"loss.logvar": torch.zeros(1), "foundation_model.model.cls_token": torch.zeros(1, 8),
               "linear_proj.weight": arr("projection", 8, 4, 1, 1),
               "loss.discriminator.main.0.bias": arr("bias", 64)}
    path = tmp_path / f"vavae.{'safetensors' if form == 'safetensors' else 'pt'}"
    if form == "safetensors":
        write_safetensors(path, state | company)
    else:
        torch.save({"state_dict": state | company, "epoch": 3} if form == "state_dict"
                   else state | company, path)
    net, file = checkpoints.load_tokenizer(path, SMALL)
    same(net.state_dict(), state)
    assert net.learns_sigma and net.config == file["model_config"] and "latent_mean" not in file
    parts = checkpoints.read_tokenizer_parts(path)
    same(parts["model"], state)
    same(parts["projection"], {"weight": company["linear_proj.weight"]})
    same(parts["discriminator"], {"main.0.bias": company["loss.discriminator.main.0.bias"]})


@pytest.mark.parametrize("size", ["f16d16", "f16d32"])
def test_a_published_tokenizer_tells_its_channels(size):
    with torch.device("meta"):
        state = models.build_tokenizer(models.AUTOENCODERS[size]).state_dict()
    file = checkpoints.from_vavae(state, Path("vavae.pt"))
    assert file["model_config"] == models.AUTOENCODERS[size]


@pytest.mark.parametrize("form", ["ema", "model", "bare", "safetensors"])
def test_a_published_transformer_loads(tmp_path, form):
    """In LightningDiT's training files the names in `model` begin with `module.`."""
    state, path = transformer().state_dict(), tmp_path / "dit.pt"
    module = {f"module.{name}": value for name, value in state.items()}
    other = models.build_dit(LIGHTNINGDIT).state_dict()
    extras = {"opt": {"state": {}}, "args": argparse.Namespace(model="LightningDiT")}
    if form == "safetensors":
        path = path.with_suffix(".safetensors")
        write_safetensors(path, state)
    else:
        torch.save({"ema": {"model": other, "ema": state} | extras,
                    "model": {"model": module} | extras, "bare": state}[form], path)
    net, file = checkpoints.load_dit(path)
    same(net.state_dict(), state)
    assert net.config == file["model_config"] == models.build_dit(LIGHTNINGDIT).config


@pytest.mark.parametrize("row", [row for row in models.DITS if row != "demo"])
def test_a_published_transformer_tells_its_config(row):
    latents = dict(in_channels=4, input_size=32, num_classes=1000)
    sigma = [False, True] if models.DITS[row]["family"] == "sit" else [False]
    for learn_sigma in sigma:
        with torch.device("meta"):
            dit = models.build_dit(models.DITS[row] | latents | dict(learn_sigma=learn_sigma))
        file = checkpoints.from_dit(dict(dit.state_dict()), Path("dit.pt"))
        assert file["model_config"] == dit.config


@golden
@torch.no_grad()
def test_golden_file_of_lightningdit(tmp_path, monkeypatch):
    """The published names, in a file, give the published velocity."""
    monkeypatch.setitem(models.DITS, "tiny", dict(depth=2, width=64, heads=2))
    names = json.loads((GOLDEN / "lightningdit_tiny_keys.json").read_text())
    state = transformer(LIGHTNINGDIT_TINY).state_dict()
    torch.save({"ema": {name: state[name].reshape(shape) for name, shape in names.items()}},
               tmp_path / "dit.pt")
    net, _ = checkpoints.load_dit(tmp_path / "dit.pt")
    expected = np.load(GOLDEN / "lightningdit_tiny.npz")["velocity"]
    assert_golden(net(arr("golden/xt_tiny", 2, 16, 8, 8), T, Y), expected)


def test_safetensors_are_those_of_the_package(tmp_path):
    package = pytest.importorskip("safetensors.torch")
    state = {"a": arr("a", 2, 3), "b": arr("b", 5).bfloat16(), "c": arr("c", 4).half(),
             "n": torch.tensor(3)}
    package.save_file(state, tmp_path / "theirs.safetensors", metadata={"format": "pt"})
    same(checkpoints.read(tmp_path / "theirs.safetensors"), state)
    write_safetensors(tmp_path / "ours.safetensors", state)
    same(package.load_file(tmp_path / "ours.safetensors"), state)


# ------------------------------------------------------------------------------
# Exports.


def exported(run: Path, form: str) -> Path:
    file = run.parent / "exported" / "weights.pt"
    checkpoints.main(["export", str(run), "--to", form, str(file)])
    return file


def assert_statistics(file: Path, state: dict) -> None:
    """What LightningDiT reads beside the weights: [1, C, 1, 1]."""
    found = torch.load(file.with_name("latents_stats.pt"), weights_only=True)
    assert {*found} == {"mean", "std"} and found["std"].shape[2:] == (1, 1)
    assert_close(found["mean"].flatten(), state["latent_mean"], rtol=0, atol=0)
    assert_close(found["std"].flatten(), state["latent_std"], rtol=0, atol=0)


def test_export_of_a_tokenizer_and_back(tmp_path):
    state = write_tokenizer(tmp_path / "run/checkpoint.pt")
    file = exported(tmp_path / "run", "vavae")
    parts = checkpoints.read_tokenizer_parts(file)
    assert {*torch.load(file, weights_only=True)} == {"state_dict"}
    for name in ("model", "discriminator", "projection"):
        same(parts[name], state[name])
    assert_statistics(file, state)


@pytest.mark.parametrize("noise, std", [("fixed", 0.2), ("gaussian", 0.25), ("none", 1e-6)])
@torch.no_grad()
def test_export_makes_other_noise_a_constant_log_variance(tmp_path, noise, std):
    write_tokenizer(tmp_path / "checkpoint.pt", noise=noise, sigma=0.2)
    net, _ = checkpoints.load_tokenizer(exported(tmp_path / "checkpoint.pt", "vavae"), SMALL)
    mean, logvar = net.posterior(arr("x", 1, 3, 8, 8))
    assert_close((logvar / 2).exp(), torch.full_like(logvar, std), rtol=1e-4, atol=0)
    assert_close(mean, tokenizer(SMALL).posterior(arr("x", 1, 3, 8, 8))[0], rtol=0, atol=0)


@pytest.mark.parametrize("form, config", [
    ("lightningdit", LIGHTNINGDIT), ("sit", SIT), ("sit", SIT | dict(learn_sigma=True))])
@torch.no_grad()
def test_export_of_a_transformer_and_back(tmp_path, form, config):
    """SiT's network has twice the channels; the first half is the velocity."""
    state = write_dit(tmp_path / "checkpoint.pt", config)
    file = exported(tmp_path / "checkpoint.pt", form)
    container = torch.load(file, weights_only=True)
    assert {*container} == {"model", "ema"}
    assert_statistics(file, state)
    torch.save(container["model"], tmp_path / "model.pt")
    net, _ = checkpoints.load_dit(tmp_path / "model.pt")
    assert net.config["learn_sigma"] == (form == "sit")
    inputs = arr("x_t", 2, 8, 8, 8), T, Y
    assert_close(net(*inputs), transformer(config)(*inputs))


def test_show_names_every_entry(tmp_path, capsys):
    state = write_dit(tmp_path / "checkpoint.pt")
    checkpoints.main(["show", str(tmp_path)])
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[1:]] == list(state)
    assert len(lines[0].split()[-1]) == 64                       # the sha256
    numbers = sum(value.numel() for value in state["model"].values())
    assert f"model          {len(state['model'])} tensors, {numbers:,} numbers" in lines
    assert "classes        ['circle', 'square']" in lines
    with pytest.raises(SystemExit):
        checkpoints.main(["show", str(tmp_path / "nothing.pt")])
    assert capsys.readouterr().err.endswith("nothing.pt is not a file: give a checkpoint\n")


# ------------------------------------------------------------------------------
# Refusals.


def test_files_that_are_no_checkpoint(tmp_path):
    path, load = tmp_path / "checkpoint.pt", checkpoints.load_tokenizer
    assert "is not a file" in refusal(load, path) and "is not a file" in refusal(load, tmp_path)
    path.write_bytes(b"<html>not found</html>")
    assert f"{path} is damaged" in refusal(load, path)
    torch.save({"model": torch.zeros(1000)}, path)
    path.write_bytes(path.read_bytes()[:700])
    assert "damaged" in refusal(load, path)
    for content in ({"model": nn.Linear(2, 2)}, [1, 2]):   # the first could run code
        torch.save(content, path)
        assert "no dict of tensors" in refusal(load, path)
    broken = tmp_path / "broken.safetensors"
    write_safetensors(broken, {"a": arr("a", 100)})
    broken.write_bytes(broken.read_bytes()[:-8])
    assert "damaged" in refusal(load, broken)


def test_a_wrong_kind_and_an_older_version(tmp_path):
    ours, dit = tmp_path / "tokenizer.pt", tmp_path / "dit.pt"
    state, _ = write_tokenizer(ours), write_dit(dit)
    assert 'holds a "dit", not a "tokenizer"' in refusal(checkpoints.load_tokenizer, dit)
    assert 'holds a "tokenizer", not a "dit"' in refusal(checkpoints.load_dit, ours)
    del state["model_config"]["noise"]
    checkpoints.save(state, ours)
    for read in (checkpoints.load_tokenizer, checkpoints.read, checkpoints.read_tokenizer_parts):
        assert "older version: train it again" in refusal(read, ours)


def test_tensors_that_do_not_fit(tmp_path):
    state = tokenizer(SMALL).state_dict()
    del state["decoder.mid.attn_1.q.bias"]
    state["encoder.mid.attn_2.q.bias"] = torch.zeros(3)
    state["quant_conv.weight"] = torch.zeros(8, 7, 1, 1)
    torch.save(state, tmp_path / "vavae.pt")
    message = refusal(checkpoints.load_tokenizer, tmp_path / "vavae.pt", SMALL)
    for name in ("decoder.mid.attn_1.q.bias", "encoder.mid.attn_2.q.bias", "quant_conv.weight"):
        assert name in message


def test_transformers_that_are_not_known(tmp_path):
    path, state = tmp_path / "dit.pt", dict(transformer().state_dict())
    torch.save({k: v for k, v in state.items() if "rope" not in k}, path)
    assert "freqs_cos" in refusal(checkpoints.load_dit, path)    # use_rope: false
    torch.save(transformer(LIGHTNINGDIT_TINY).state_dict(), path)
    assert "(2, 64) is not known" in refusal(checkpoints.load_dit, path)
    torch.save(tokenizer(SMALL).state_dict(), path)
    assert "'x_embedder.proj.weight' is not known" in refusal(checkpoints.load_dit, path)


@pytest.mark.parametrize("arguments, message", [
    (["tokenizer.pt", "--to", "lightningdit", "out.pt"], 'holds a "tokenizer", not a "dit"'),
    (["vit.pt", "--to", "vavae", "out.pt"], "holds a ViT"),
    (["dit.pt", "--to", "sit", "out.pt"], "only --to lightningdit"),
    (["bare.pt", "--to", "lightningdit", "out.pt"], "published file already"),
    (["dit.pt", "--to", "png", "out.pt"], "give --to vavae"),
    (["dit.pt"], "give --to vavae")])
def test_exports_that_are_refused(tmp_path, monkeypatch, capsys, arguments, message):
    monkeypatch.chdir(tmp_path)
    write_tokenizer(Path("tokenizer.pt"))
    write_tokenizer(Path("vit.pt"), SMALL_VIT)
    write_dit(Path("dit.pt"))
    torch.save(transformer().state_dict(), "bare.pt")
    with pytest.raises(SystemExit) as stop:
        checkpoints.main(["export", *arguments])
    error = capsys.readouterr().err.strip().splitlines()
    assert stop.value.code == 2 and len(error) == 1 and message in error[0]
    assert not Path("out.pt").exists()
