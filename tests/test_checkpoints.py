"""Our files rebuild their network, published ones load as they are, exports load
as published ones, and any other file is refused in one line."""

import argparse
import json
import os
import pickle
import random
import resource
import shutil
import signal
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

import checkpoints
import models
import runtime
from runtime import InputError
from test_models import (
    DEMO_LATENTS, GOLDEN, LIGHTNINGDIT_TINY, SIT_TINY, SMALL, SMALL_VIT, T, Y, arr, assert_golden,
    filled, golden, tokenizer)

LIGHTNINGDIT = models.DITS["demo"] | DEMO_LATENTS
SIT = LIGHTNINGDIT | dict(family="sit", patch=2)
CASES = int(os.environ.get("CASES", 35))


def transformer(config: dict = LIGHTNINGDIT) -> models.DiT:
    return filled(models.build_dit(config))


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> None:
    assert_close(dict(a), dict(b), rtol=0, atol=0)


def write_tokenizer(path: Path, config: dict = SMALL, **changed: object) -> dict:
    """A checkpoint of ours, with a discriminator and a projection."""
    net = tokenizer(config, **changed)
    optimizer = step_once(torch.optim.AdamW(net.parameters(), lr=0, fused=True))
    state = {"kind": "tokenizer", "config": {"loss": "ve", "data": "shapes", "size": 8, "seed": 0},
             "optimizer": optimizer.state_dict(), "model_config": net.config, "step": 7,
             "model": net.state_dict(), "discriminator": {"main.0.bias": arr("bias", 64)},
             "projection": {"weight": arr("projection", 6, 4, 1, 1)},
             "latent_mean": arr("mean", 4), "latent_std": arr("std", 4).exp()}
    checkpoints.save(state, path)
    return state


def write_dit(path: Path, config: dict = LIGHTNINGDIT) -> dict:
    """A checkpoint of ours whose averaged weights are those of a fresh network."""
    net, ema = transformer(config), models.build_dit(config)
    channels = config["in_channels"]
    state = {"kind": "dit", "config": {"data": "shapes"}, "model_config": net.config, "step": 9,
             "model": net.state_dict(), "ema": ema.state_dict(), "ema_updates": 9,
             "optimizers": [step_once(o).state_dict() for o in optimizers(net)],
             "errors_by_t": arr("errors", 2, 10), "tokenizer": {"path": "t.pt", "sha256": "0"},
             "classes": [f"class {i}" for i in range(10)], "latent_mean": arr("mean", channels),
             "latent_std": arr("std", channels).exp(), "latent_shape": [channels, 8, 8]}
    checkpoints.save(state, path)
    return state


def optimizers(net: nn.Module) -> list[torch.optim.Optimizer]:
    """Muon of the matrices in the blocks, and AdamW of the rest, as in train_dit.py."""
    matrices = [p for name, p in net.named_parameters() if "mlp.w" in name and p.ndim == 2]
    rest = [p for p in net.parameters() if p.requires_grad and all(p is not m for m in matrices)]
    return [torch.optim.AdamW(rest, lr=0, fused=True),
            *(torch.optim.Muon(m, lr=0) for m in [matrices] if m)]


def step_once(optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
    for p in optimizer.param_groups[0]["params"]:
        p.grad = 1e-6 * torch.ones_like(p)
    optimizer.step()
    return optimizer


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
    assert net.config == state["model_config"] and file["classes"] == state["classes"]
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
    net, file = checkpoints.load_tokenizer(path)
    same(net.state_dict(), state)
    assert net.learns_sigma and net.config == file["model_config"] and "latent_mean" not in file
    # The level of attention is named by its size in an image of 256 pixels.
    assert net.config == SMALL | dict(attn_resolutions=(128,), resolution=256,
                                      noise="learned", sigma=0.0)
    parts = checkpoints.read_tokenizer_parts(path)
    same(parts["model"], state)
    same(parts["projection"], {"weight": company["linear_proj.weight"]})
    same(parts["discriminator"], {"main.0.bias": company["loss.discriminator.main.0.bias"]})


def gae_file(depth=2, width=128, side=4, patch=4, channels=6) -> dict:
    """Tensors with the names and shapes of GAE's autoencoder, of a small size."""
    shapes = {"foundation_encoder.patch_embed.weight": (width, 3, patch, patch),
              "foundation_encoder.pos_embed": (1, side**2, width),
              "foundation_encoder.proj_out.weight": (width, width),
              "adapter.model.weight": (channels, width),
              "decoder.z_proj.weight": (width, channels),
              "decoder.pos_embed": (1, side**2, width),
              "decoder.linear_out.weight": (3 * patch**2, width)}
    for trunk in ("foundation_encoder", "decoder"):
        for i in range(depth):
            for name, shape in (("attn.qkv", (3 * width, width)), ("attn.proj", (width, width)),
                                ("mlp.fc1", (384, width)), ("mlp.gate", (384, width)),
                                ("mlp.fc2", (width, 384))):
                shapes[f"{trunk}.blocks.{i}.{name}.weight"] = shape
    return {name: arr(name, *shape, scale=0.2) for name, shape in shapes.items()}


@torch.no_grad()
def test_a_published_gae_is_that_network(tmp_path):
    """Its forward pass, written out with its names; two heads of 64 channels."""
    w = gae_file()
    torch.save({"state_dict": w | {"loss.logvar": torch.zeros(1)}}, tmp_path / "gae.ckpt")
    net, file = checkpoints.load_tokenizer(tmp_path / "gae.ckpt")
    assert (net.config["noise"], net.config["latent_norm"]) == ("gaussian", True)
    assert net.config["depth"] == 2 and "latent_mean" not in file

    def rms(h):
        return h / (h.square().mean(-1, keepdim=True) + 1e-6).sqrt()

    def blocks(trunk, h):
        for i in range(2):
            part = {k: w[f"{trunk}.blocks.{i}.{k}.weight"].T for k in (
                "attn.qkv", "attn.proj", "mlp.fc1", "mlp.gate", "mlp.fc2")}
            q, k, v = (rms(h) @ part["attn.qkv"]).unflatten(2, (3, 2, 64)).permute(2, 0, 3, 1, 4)
            share = (rms(q) @ rms(k).mT / 8).softmax(-1)
            h = h + (share @ v).transpose(1, 2).flatten(2) @ part["attn.proj"]
            a = rms(h) @ part["mlp.fc1"]
            h = h + (a * a.sigmoid() * (rms(h) @ part["mlp.gate"])) @ part["mlp.fc2"]
        return rms(h)

    x = arr("x", 2, 3, 16, 16)
    h = torch.conv2d(x, w["foundation_encoder.patch_embed.weight"], stride=4).flatten(2).mT
    h = blocks("foundation_encoder", h + w["foundation_encoder.pos_embed"])
    mean = rms(h @ w["foundation_encoder.proj_out.weight"].T @ w["adapter.model.weight"].T)
    z = mean.mT.unflatten(2, (4, 4))
    assert_close(net.posterior(x)[0], z, rtol=1e-3, atol=1e-4)
    h = blocks("decoder", mean @ w["decoder.z_proj.weight"].T + w["decoder.pos_embed"])
    pixels = (h @ w["decoder.linear_out.weight"].T).view(2, 4, 4, 4, 4, 3)   # h w p1 p2 c
    expected = pixels.permute(0, 5, 1, 3, 2, 4).reshape(2, 3, 16, 16)
    assert_close(net.decode(z), expected, rtol=1e-3, atol=1e-3)


def test_a_gae_without_a_part_is_refused(tmp_path):
    state = gae_file()
    for name in ("adapter.model.weight", "decoder.blocks.1.mlp.gate.weight"):
        torch.save({k: v for k, v in state.items() if k != name}, tmp_path / "gae.ckpt")
        assert "no autoencoder of GAE" in refusal(checkpoints.load_tokenizer, tmp_path / "gae.ckpt")


@pytest.mark.parametrize("size, numbers, count", [
    ("f8d4", 83_653_863, 248), ("f16d16", 69_610_963, 342), ("f16d32", 69_836_067, 342)])
def test_a_published_tokenizer_tells_its_config(size, numbers, count):
    """The published counts; the latents of Stable Diffusion have a known scale."""
    with torch.device("meta"):
        state = models.build_tokenizer(models.AUTOENCODERS[size]).state_dict()
    assert sum(value.numel() for value in state.values()) == numbers and len(state) == count
    file = checkpoints.from_ldm(state, Path("vavae.pt"))
    assert file["model_config"] == models.AUTOENCODERS[size]
    assert ("latent_std" in file) == (size == "f8d4")
    if size == "f8d4":
        assert_close(0.18215 * file["latent_std"], torch.ones(4))
        assert_close(file["latent_mean"], torch.zeros(4))


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
def test_golden_file_of_lightningdit(tmp_path):
    """The published names, in a file, give the published velocity."""
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


# Names in LDM and in diffusers, from the documentation of both, and which level of
# a decoder of two levels is which.
DIFFUSERS = {
    "encoder.conv_in.bias": "encoder.conv_in.bias",
    "encoder.down.0.block.0.norm1.weight": "encoder.down_blocks.0.resnets.0.norm1.weight",
    "encoder.down.1.block.0.nin_shortcut.bias":
        "encoder.down_blocks.1.resnets.0.conv_shortcut.bias",
    "encoder.down.0.downsample.conv.bias": "encoder.down_blocks.0.downsamplers.0.conv.bias",
    "encoder.down.1.attn.0.norm.bias": "encoder.down_blocks.1.attentions.0.group_norm.bias",
    "encoder.mid.attn_1.q.weight": "encoder.mid_block.attentions.0.to_q.weight",
    "encoder.mid.attn_1.proj_out.bias": "encoder.mid_block.attentions.0.to_out.0.bias",
    "encoder.mid.block_2.conv2.weight": "encoder.mid_block.resnets.1.conv2.weight",
    "encoder.norm_out.weight": "encoder.conv_norm_out.weight",
    "decoder.up.1.upsample.conv.bias": "decoder.up_blocks.0.upsamplers.0.conv.bias",
    "decoder.up.0.block.1.conv1.bias": "decoder.up_blocks.1.resnets.1.conv1.bias",
    "decoder.up.1.attn.1.k.weight": "decoder.up_blocks.0.attentions.1.to_k.weight",
    "quant_conv.bias": "quant_conv.bias", "decoder.conv_out.weight": "decoder.conv_out.weight"}
# One number of groups for all norms, as diffusers has it: 32 channels, 8 groups.
EVEN = SMALL | dict(ch=32, ch_mult=(1, 1))


def lightning(path: Path, state: dict[str, Tensor], monkeypatch: pytest.MonkeyPatch) -> None:
    """What Lightning 1.x wrote: a class as a key, and objects of its own and others'."""
    names = {"ModelCheckpoint": object, "AttributeDict": dict, "DictConfig": object}
    module = types.ModuleType("pytorch_lightning.callbacks")
    for name, base in names.items():
        setattr(module, name, type(name, (base,), {"__module__": module.__name__}))
    for name in ("pytorch_lightning", module.__name__):
        monkeypatch.setitem(sys.modules, name, module)
    config = module.DictConfig()
    config.metadata = Path("here"), np.float32(3)
    torch.save({"state_dict": state, "epoch": 3, "pytorch-lightning_version": "1.4.2",
                "callbacks": {module.ModelCheckpoint: {"best_model_score": np.float64(0.3)}},
                "hyper_parameters": module.AttributeDict(lr=1e-4, config=config)}, path)
    for name in ("pytorch_lightning", module.__name__):
        monkeypatch.delitem(sys.modules, name)


@pytest.mark.parametrize("suffix", [".ckpt", ".pt", ".bin", ".safetensors"])
@pytest.mark.parametrize("form", ["ldm", "lightning", "first stage", "averaged", "half",
                                  "diffusers", "old diffusers"])
def test_forms_of_published_tokenizers(tmp_path, monkeypatch, form, suffix):
    state, path = dict(tokenizer(SMALL).state_dict()), tmp_path / f"file{suffix}"
    expected, written = dict(state), state
    if form == "first stage":
        written = {f"first_stage_model.{k}": v for k, v in state.items()} | {
            "model.diffusion_model.out.0.weight": torch.zeros(3), "betas": torch.zeros(9),
            "model_ema.diffusion_modelout0weight": torch.zeros(3)}
    elif form == "averaged":
        written = {k: 0 * v for k, v in state.items()} | {"model_ema.decay": torch.tensor(0.9)} | {
            f"model_ema.{k.replace('.', '')}": v for k, v in state.items()}
    elif form == "half":
        written = {k: v.half() for k, v in state.items()}
        expected = {k: v.float() for k, v in written.items()}
    elif "diffusers" in form:
        written = checkpoints.to_diffusers(
            write_tokenizer(tmp_path / "ours.pt", EVEN), tmp_path / "ours.pt")[0]
        (tmp_path / "config.json").write_text('{"norm_num_groups": 8}')
        expected = dict(tokenizer(EVEN).state_dict())
    if form == "old diffusers":
        for old, new in (("to_q", "query"), ("to_k", "key"), ("to_v", "value"),
                         ("to_out.0", "proj_attn")):
            written = {k.replace(old, new): v for k, v in written.items()}
    if suffix == ".safetensors":
        write_safetensors(path, written)
    elif form == "lightning":
        lightning(path, written, monkeypatch)
    else:
        torch.save(written, path)
    net, _ = checkpoints.load_tokenizer(path)
    same(net.state_dict(), expected)


def test_names_in_diffusers(tmp_path):
    found, config = checkpoints.to_diffusers(
        write_tokenizer(tmp_path / "a.pt", EVEN), tmp_path / "a.pt")
    state = tokenizer(EVEN).state_dict()
    assert len(found) == len(state)
    for ours, theirs in DIFFUSERS.items():
        if ours in state:      # equal widths need no shortcut
            assert_close(found[theirs].flatten(), state[ours].flatten(), rtol=0, atol=0)
    for ours, theirs in DIFFUSERS.items():
        assert checkpoints.rename(ours, checkpoints.NAMES, 2) == theirs
    assert found["encoder.mid_block.attentions.0.to_q.weight"].shape == (32, 32)   # linear
    assert config["norm_num_groups"] == 8 and config["block_out_channels"] == [32, 32]
    assert config["down_block_types"] == ["DownEncoderBlock2D", "AttnDownEncoderBlock2D"]
    assert config["up_block_types"] == ["AttnUpDecoderBlock2D", "UpDecoderBlock2D"]


def test_statistics_in_diffusers(tmp_path):
    """SDXL's autoencoder is that of Stable Diffusion 1, but its scale is another."""
    with torch.device("meta"):
        row = models.AUTOENCODERS["f8d4"]
        state = models.build_tokenizer(row).state_dict()
    state = {checkpoints.rename(k, checkpoints.NAMES, 4): v for k, v in state.items()}
    file, about = tmp_path / "model.safetensors", tmp_path / "config.json"
    assert_close(checkpoints.from_ldm(state, file)["latent_std"], torch.full((4,), 1 / 0.18215))
    about.write_text('{"scaling_factor": 0.5}')
    assert_close(checkpoints.from_ldm(state, file)["latent_std"], torch.full((4,), 2.0))
    about.write_text('{"scaling_factor": 1, "latents_mean": [1, 2, 3, 4], "latents_std": [5]}')
    assert checkpoints.from_ldm(state, file)["latent_mean"].tolist() == [1, 2, 3, 4]
    for broken in ('{"scaling_factor": "x"}', '{"scaling_factor": 0}', '{"latents_std": "x"}'):
        about.write_text(broken)
        refusal(checkpoints.from_ldm, state, file)


def test_norms_of_other_groups_are_refused(tmp_path):
    """LDM's norms have 32 groups, and those of 64 channels would here have 16."""
    state = tokenizer(SMALL | dict(ch=64)).state_dict()
    torch.save(state, tmp_path / "ldm.pt")
    assert "norms of 32 groups" in refusal(checkpoints.load_tokenizer, tmp_path / "ldm.pt")
    write_tokenizer(tmp_path / "ours.pt", EVEN)
    checkpoints.main(["export", str(tmp_path / "ours.pt"), "--to", "diffusers", str(tmp_path)])
    file = tmp_path / "diffusion_pytorch_model.safetensors"
    checkpoints.load_tokenizer(file)
    (tmp_path / "config.json").write_text('{"norm_num_groups": 32}')
    assert "norms of 32 groups" in refusal(checkpoints.load_tokenizer, file)


@pytest.mark.parametrize("config", [EVEN, EVEN | dict(noise="gaussian", sigma=0.2)])
@torch.no_grad()
def test_diffusers_loads_what_is_exported(tmp_path, config):
    """diffusers itself is the oracle; `make test` installs it."""
    diffusers = pytest.importorskip("diffusers")
    state = write_tokenizer(tmp_path / "run/checkpoint.pt", config)
    checkpoints.main(["export", str(tmp_path / "run"), "--to", "diffusers", str(tmp_path / "out")])
    theirs = diffusers.AutoencoderKL.from_pretrained(tmp_path / "out").eval()
    net, x, z = tokenizer(config), arr("x", 2, 3, 16, 16), arr("z", 2, 4, 8, 8)
    posterior, (mean, logvar) = theirs.encode(x).latent_dist, net.posterior(x)
    assert_close(posterior.mean, mean, rtol=1e-5, atol=1e-5)
    assert_close(posterior.logvar, logvar, rtol=1e-5, atol=1e-5)
    assert_close(theirs.decode(z).sample, net.decode(z), rtol=1e-5, atol=1e-5)
    assert_close(torch.tensor(theirs.config.latents_mean), state["latent_mean"])
    assert_close(torch.tensor(theirs.config.latents_std), state["latent_std"])
    theirs.save_pretrained(tmp_path / "again")
    back, file = checkpoints.load_tokenizer(tmp_path / "again/diffusion_pytorch_model.safetensors")
    assert_close(back.decode(z), net.decode(z), rtol=0, atol=0)
    for name in ("latent_mean", "latent_std"):
        assert_close(file[name], state[name])


# ------------------------------------------------------------------------------
# Exports.


def exported(run: Path, form: str) -> Path:
    file = run.parent / "exported" / "weights.pt"
    checkpoints.main(["export", str(run), "--to", form, str(file)])
    return file


def assert_statistics(file: Path, state: dict) -> None:
    """What LightningDiT reads beside its latents: [1, C, 1, 1]."""
    found = torch.load(file.with_name("weights-latents_stats.pt"), weights_only=True)
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
    net, _ = checkpoints.load_tokenizer(exported(tmp_path / "checkpoint.pt", "vavae"))
    mean, logvar = net.posterior(arr("x", 1, 3, 8, 8))
    assert_close((logvar / 2).exp(), torch.full_like(logvar, std), rtol=1e-4, atol=0)
    assert_close(mean, tokenizer(SMALL).posterior(arr("x", 1, 3, 8, 8))[0], rtol=0, atol=0)


@pytest.mark.parametrize("form, config", [
    ("lightningdit", LIGHTNINGDIT), ("sit", SIT), ("sit", SIT | dict(learn_sigma=True)),
    ("sit", SIT | dict(qk_norm=True)), ("lightningdit", LIGHTNINGDIT | dict(qk_norm=True))])
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
    assert net.config["qk_norm"] == config.get("qk_norm", False)
    inputs = arr("x_t", 2, 8, 8, 8), T, Y
    assert_close(net(*inputs), transformer(config)(*inputs))


def test_exports_keep_their_statistics_apart(tmp_path, capsys):
    one, two = write_tokenizer(tmp_path / "t.pt"), write_dit(tmp_path / "d.pt")
    for form, source, name in (("vavae", "t.pt", "vavae.pt"), ("lightningdit", "d.pt", "dit.pt")):
        checkpoints.main(["export", str(tmp_path / source), "--to", form, str(tmp_path / name)])
    for name, state in (("vavae", one), ("dit", two)):
        found = checkpoints.read(tmp_path / f"{name}-latents_stats.pt")
        assert_close(found["std"].flatten(), state["latent_std"], rtol=0, atol=0)
    assert "only this project builds it" in capsys.readouterr().out
    write_tokenizer(tmp_path / "full.pt", SMALL | dict(ch=128, ch_mult=(1,)))
    checkpoints.main(["export", str(tmp_path / "full.pt"), "--to", "vavae", str(tmp_path / "v.pt")])
    assert "only this project" not in capsys.readouterr().out


def test_a_transformer_finds_its_tokenizer(tmp_path, monkeypatch):
    """Beside itself, in the folder beside, where it was; and only the very same file."""
    monkeypatch.chdir(tmp_path)
    dit = Path("runs/dit/checkpoint.pt")
    state = write_dit(dit)
    assert "give --tokenizer" in refusal(checkpoints.tokenizer_of, dit, {})
    old = Path("elsewhere/tokenizer/checkpoint.pt")
    write_tokenizer(old)
    state["tokenizer"] = {"path": str(old), "sha256": runtime.file_sha256(old)}
    assert checkpoints.tokenizer_of(dit, state) == old
    beside = Path("runs/tokenizer/checkpoint.pt")
    beside.parent.mkdir()
    old.rename(beside)
    assert checkpoints.tokenizer_of(dit, state).samefile(beside)
    monkeypatch.chdir("runs/dit")                     # from wherever it is run
    dit, beside = Path("checkpoint.pt"), Path("../tokenizer/checkpoint.pt")
    assert checkpoints.tokenizer_of(dit, state).samefile(beside)
    for name in ("named.pt", "checkpoint.pt"):        # and the DiT is no tokenizer
        state["tokenizer"]["path"] = f"/nowhere/{name}"
        message = refusal(checkpoints.tokenizer_of, dit, state)
        assert f"nor at /nowhere/{name}: give --tokenizer" in message
    state["tokenizer"]["path"] = "/nowhere/named.pt"
    beside.rename("named.pt")
    assert checkpoints.tokenizer_of(dit, state).samefile("named.pt")
    write_tokenizer(Path("named.pt"), noise="none")
    assert "is not the tokenizer of checkpoint.pt" in refusal(
        checkpoints.tokenizer_of, dit, state)


def test_show_names_every_entry(tmp_path, capsys):
    state = write_dit(tmp_path / "checkpoint.pt")
    checkpoints.main(["show", str(tmp_path)])
    lines = capsys.readouterr().out.splitlines()
    named = [line for line in lines[1:] if line[0] != " "]
    assert [line.split()[0] for line in named] == list(state)
    assert len(lines[0].split()[-1]) == 64                       # the sha256
    numbers = sum(value.numel() for value in state["model"].values())
    assert f"model          {len(state['model'])} tensors, {numbers:,} numbers" in lines
    assert lines[lines.index("classes        10") + 4] == "             3 class 3"
    with pytest.raises(SystemExit):
        checkpoints.main(["show", str(tmp_path / "nothing.pt")])
    assert capsys.readouterr().err.endswith("nothing.pt is not a file: name one\n")


# ------------------------------------------------------------------------------
# Refusals.


def test_files_that_are_no_checkpoint(tmp_path):
    path, load = tmp_path / "checkpoint.pt", checkpoints.load_tokenizer
    assert "is not there" in refusal(load, path) and "is not a file" in refusal(load, tmp_path)
    path.write_bytes(b"<html>not found</html>")
    assert f"{path} is damaged" in refusal(load, path)
    torch.save({"model": torch.zeros(1000)}, path)
    path.write_bytes(path.read_bytes()[:700])
    assert "damaged" in refusal(load, path)
    for content in ([("kind", "tokenizer")], torch.zeros(4, 2), "text", nn.Linear(2, 2)):
        torch.save(content, path)
        assert "no dict of tensors" in refusal(load, path)
    broken = tmp_path / "broken.safetensors"
    write_safetensors(broken, {"a": arr("a", 100)})
    broken.write_bytes(broken.read_bytes()[:-8])
    assert "damaged" in refusal(load, broken)


def test_a_wrong_kind(tmp_path):
    ours, dit = tmp_path / "tokenizer.pt", tmp_path / "dit.pt"
    write_tokenizer(ours), write_dit(dit)
    assert 'holds a "dit", not a "tokenizer"' in refusal(checkpoints.load_tokenizer, dit)
    assert 'holds a "tokenizer", not a "dit"' in refusal(checkpoints.load_dit, ours)


def test_tensors_that_do_not_fit(tmp_path):
    state = tokenizer(SMALL).state_dict()
    del state["decoder.mid.attn_1.q.bias"]
    state["encoder.mid.attn_2.q.bias"] = torch.zeros(3)
    state["quant_conv.weight"] = torch.zeros(8, 7, 1, 1)
    torch.save(state, tmp_path / "vavae.pt")
    message = refusal(checkpoints.load_tokenizer, tmp_path / "vavae.pt")
    for name in ("decoder.mid.attn_1.q.bias", "encoder.mid.attn_2.q.bias", "quant_conv.weight"):
        assert name in message


def test_transformers_that_are_not_known(tmp_path):
    path, state = tmp_path / "dit.pt", dict(transformer().state_dict())
    torch.save({k: v for k, v in state.items() if "rope" not in k}, path)
    assert "use_rope: false" in refusal(checkpoints.load_dit, path)
    torch.save(transformer(SIT_TINY).state_dict(), path)
    assert "(2, 64) is not known" in refusal(checkpoints.load_dit, path)
    torch.save(tokenizer(SMALL).state_dict(), path)
    assert "'x_embedder.proj.weight' is not known" in refusal(checkpoints.load_dit, path)


@pytest.mark.parametrize("arguments, message", [
    (["tokenizer.pt", "--to", "lightningdit", "out.pt"], 'holds a "tokenizer", not a "dit"'),
    (["vit.pt", "--to", "vavae", "out.pt"], "holds a ViT"),
    (["tokenizer.pt", "--to", "vavae", "out.safetensors"], "such as vavae.pt"),
    (["tokenizer.pt", "--to", "vavae", "tokenizer.pt"], "name another file"),
    (["dgae.pt", "--to", "vavae", "out.pt"], "holds a U-Net"),
    (["dit.pt", "--to", "sit", "out.pt"], "only --to lightningdit"),
    (["bare.pt", "--to", "lightningdit", "out.pt"], "published file already"),
    (["dit.pt", "--to", "png", "out.pt"], "give --to vavae"),
    (["tokenizer.pt", "--to", "diffusers", "out.pt"], "one number for all"),
    (["vit.pt", "--to", "diffusers", "out.pt"], "holds a ViT"),
    (["dit.pt", "--to", "diffusers", "out.pt"], 'holds a "dit", not a "tokenizer"'),
    (["dit.pt"], "give --to vavae")])
def test_exports_that_are_refused(tmp_path, monkeypatch, capsys, arguments, message):
    monkeypatch.chdir(tmp_path)
    write_tokenizer(Path("tokenizer.pt"))
    write_tokenizer(Path("vit.pt"), SMALL_VIT)
    write_tokenizer(Path("dgae.pt"), SMALL | dict(
        arch="dgae", unet_ch=8, unet_mult=(1, 2), unet_blocks=1))
    write_dit(Path("dit.pt"))
    torch.save(transformer().state_dict(), "bare.pt")
    with pytest.raises(SystemExit) as stop:
        checkpoints.main(["export", *arguments])
    error = capsys.readouterr().err.strip().splitlines()
    assert stop.value.code == 2 and len(error) == 1 and message in error[0]
    assert not Path("out.pt").exists()


# ------------------------------------------------------------------------------
# Damage.  A file either loads and is what it was, or is refused in one line.


TINY_TOKENIZER = SMALL_VIT | dict(depth=1)     # which has few tensors


def outcome(path: Path, kind: str) -> list[Tensor]:
    """What a network of the file answers, and all that a run would go on with."""
    with torch.no_grad():
        if kind == "tokenizer":
            net, _ = checkpoints.load_tokenizer(path)
            answers = [*net(arr("x", 1, 3, 8, 8), arr("eps", 1, 4, 4, 4), torch.ones(1))]
        else:
            net, _ = checkpoints.load_dit(path)
            answers = [net(arr("x_t", 2, 16, 8, 8), T, Y)]
    state = checkpoints.read(path, kind, resume=True)
    if kind == "tokenizer":
        parts = {"model": tokenizer(TINY_TOKENIZER)}
        parts["optimizer"] = torch.optim.AdamW(parts["model"].parameters(), lr=0, fused=True)
        steppers = [parts["optimizer"]]
    else:
        nets = {name: transformer(LIGHTNINGDIT_TINY) for name in ("model", "ema")}
        parts = nets | {"errors_by_t": torch.zeros(2, 10)}
        parts["optimizers"] = steppers = optimizers(parts["model"])
    checkpoints.restore(state, path, **parts)
    moments = [value for optimizer in steppers for values in step_once(optimizer).state.values()
               for value in values.values()]
    return [*answers, *parts["model"].state_dict().values(), *moments,
            parts.get("errors_by_t", torch.zeros(1))]


def leaves(value: object) -> list:
    """All that nested containers hold, in order, and their keys."""
    if torch.is_tensor(value):
        return [value.numpy().tobytes()]
    value = [*value.items()] if isinstance(value, dict) else value
    return sum(map(leaves, value), []) if isinstance(value, (list, tuple)) else [value]


def flipped(raw: bytes, draw: random.Random) -> bytes:
    """Up to 64 bits, at random places or all near one."""
    raw, count = bytearray(raw), draw.choice([1, 8, 64])
    near = draw.randrange(len(raw))
    for _ in range(count):
        place = draw.choice([draw.randrange(len(raw)), (near + draw.randrange(64)) % len(raw)])
        raw[place] ^= 1 << draw.randrange(8)
    return bytes(raw)


@pytest.mark.parametrize("kind", ["tokenizer", "dit"])
@pytest.mark.parametrize("damage", ["flip", "cut"])
def test_a_damaged_checkpoint_is_refused_in_one_line(tmp_path, capfd, recwarn, kind, damage):
    path, draw = tmp_path / "checkpoint.pt", random.Random(7)
    write = {"tokenizer": write_tokenizer, "dit": write_dit}[kind]
    state = write(path, TINY_TOKENIZER if kind == "tokenizer" else LIGHTNINGDIT_TINY)
    raw, expected, refused = path.read_bytes(), outcome(path, kind), 0
    for _ in range(CASES):
        path.write_bytes(flipped(raw, draw) if damage == "flip"
                         else raw[:draw.randrange(len(raw))])
        try:
            found = outcome(path, kind)
        except InputError as error:
            assert "\n" not in str(error) and str(path) in str(error)
            refused += 1
        else:
            assert len(found) == len(expected)
            for a, b in zip(found, expected):
                assert torch.equal(a, b)
            if damage == "flip":   # what has another value of the right type cannot be seen
                assert leaves(checkpoints.read(path)) == leaves(state)
    assert refused > CASES / 2 and capfd.readouterr() == ("", "") and not recwarn.list


@pytest.mark.parametrize("name, value", [
    ("arch", "mlp"), ("arch", None), ("ch", "16"), ("ch", 16.0), ("ch", True), ("ch", -16),
    ("ch", 10**30), ("ch_mult", 2), ("ch_mult", (1, "2")), ("ch_mult", ()),
    ("ch_mult", (1, 2, 2)), ("attn_resolutions", None), ("z_channels", 5), ("noise", "loud"),
    ("noise", 3), ("sigma", "0.2"), ("other", 1), ("ch", ...), ("arch", ...)])
def test_configs_of_no_network(tmp_path, name, value):
    path = tmp_path / "checkpoint.pt"
    state = write_tokenizer(path, SMALL | dict(noise="fixed", sigma=0.2))
    config = {k: v for k, v in state["model_config"].items() if k != name}
    state["model_config"] = config if value is ... else config | {name: value}
    checkpoints.save(state, path)
    refusal(checkpoints.load_tokenizer, path)


@pytest.mark.parametrize("kind, name, value", [
    ("tokenizer", "latent_mean", [0.0] * 4), ("tokenizer", "step", "4"), ("dit", "classes", "a"),
    ("dit", "errors_by_t", torch.zeros(3, 10)), ("dit", "optimizers", [{}]),
    ("tokenizer", "optimizer.param_groups.0.params", [0])])
def test_entries_that_do_not_fit(tmp_path, kind, name, value):
    path = tmp_path / "checkpoint.pt"
    state = (write_tokenizer(path, TINY_TOKENIZER) if kind == "tokenizer"
             else write_dit(path, LIGHTNINGDIT_TINY))
    first, *others = name.split(".", 1)
    node, keys = state, [first, *(others[0].split(".") if first != "model" and others else others)]
    for key in keys[:-1]:
        node = node[int(key) if key.isdigit() else key]
    if value is ...:
        del node[keys[-1]]
    else:
        assert keys[-1] in node
        node[keys[-1]] = value
    checkpoints.save(state, path)
    refusal(outcome, path, kind)


@pytest.mark.parametrize("kind", ["tokenizer", "dit"])
def test_a_run_goes_on_with_what_it_had(tmp_path, kind):
    path = tmp_path / "checkpoint.pt"
    state = (write_tokenizer(path, TINY_TOKENIZER) if kind == "tokenizer"
             else write_dit(path, LIGHTNINGDIT_TINY))
    found = checkpoints.read(path, kind, resume=True)
    net = (models.build_tokenizer if kind == "tokenizer" else models.build_dit)(
        state["model_config"])
    parts = {"model": net}
    if kind == "tokenizer":
        parts["optimizer"] = torch.optim.AdamW(net.parameters(), lr=0, fused=True)
    else:
        parts |= {"optimizers": optimizers(net), "errors_by_t": torch.zeros(2, 10)}
    checkpoints.restore(found, path, **parts)
    same(net.state_dict(), state["model"])
    if kind == "tokenizer":
        assert leaves(parts["optimizer"].state_dict()) == leaves(state["optimizer"])
    else:
        same({"": parts["errors_by_t"]}, {"": state["errors_by_t"]})
        assert leaves([o.state_dict() for o in parts["optimizers"]]) == leaves(state["optimizers"])
    with pytest.raises(InputError, match="its disc_optimizer does not fit"):
        checkpoints.restore(found, path, disc_optimizer=torch.optim.AdamW(net.parameters()))
    for name in {*checkpoints.ENTRIES[kind]} - {"model_config", "model", "step"}:
        checkpoints.save({k: v for k, v in state.items() if k != name}, path)
        if name != "ema":
            checkpoints.read(path, kind)
        assert f": {name} missing" in refusal(checkpoints.read, path, kind, True)


def test_a_transformer_without_its_average_is_refused(tmp_path):
    path = tmp_path / "dit.pt"
    state = write_dit(path, LIGHTNINGDIT_TINY)
    for ema, said in ((None, "ema missing"), ({}, "does not fit")):
        checkpoints.save({k: v for k, v in (state | {"ema": ema}).items() if v is not None}, path)
        assert said in refusal(checkpoints.load_dit, path)


def test_a_start_from_nothing_is_refused(tmp_path):
    state = write_tokenizer(tmp_path / "a.pt", TINY_TOKENIZER)
    checkpoints.save(state | {"model": {}}, tmp_path / "a.pt")
    assert checkpoints.read_tokenizer_parts(tmp_path / "a.pt")["model"] == {}


def test_what_the_disk_refuses_is_one_line(tmp_path, monkeypatch):
    """PyTorch's writer raises RuntimeError.  The old file stays whole."""
    path, state = tmp_path / "checkpoint.pt", {"a": torch.zeros(30_000), "b": 1}
    checkpoints.save({"old": 1}, path)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        for limit in (0, 700, 60_000, 119_000):   # the whole has about 121,000 bytes
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
            assert f"{path} cannot be written (File too large)" in refusal(
                checkpoints.save, state, path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)
    assert checkpoints.read(path) == {"old": 1} and [*tmp_path.iterdir()] == [path]
    with pytest.raises((pickle.PicklingError, AttributeError)):     # a bug keeps its traceback
        checkpoints.save({"a": lambda: 1}, path)
    def broken(*_):
        raise RuntimeError("a bug")
    monkeypatch.setattr(torch, "save", broken)
    with pytest.raises(RuntimeError, match="a bug"):
        checkpoints.save(state, path)


def test_equal_states_are_equal_files(tmp_path):
    for name in ("a.pt", "b.pt"):
        checkpoints.save({"x": arr("x", 100), "n": 3}, tmp_path / name)
    assert (tmp_path / "a.pt").read_bytes() == (tmp_path / "b.pt").read_bytes()


def test_what_is_no_file_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "pipe.pt")
    os.mkfifo(tmp_path / "pipe.safetensors")
    for name in ("pipe.pt", "pipe.safetensors", "nothing.pt", ""):
        assert "is not a file" in refusal(checkpoints.read, tmp_path / name)
    assert "is not a file" in refusal(checkpoints.read_safetensors, tmp_path / "pipe.safetensors")


def test_numbers_that_are_not_finite_are_not_loaded(tmp_path):
    path, state = tmp_path / "dit.pt", dict(transformer().state_dict())
    for value in (torch.nan, torch.inf, -torch.inf):
        state["final_layer.linear.bias"] = torch.tensor([value, *[0.0] * 7])
        torch.save(state, path)
        assert "final_layer.linear.bias has NaN or infinite numbers" in refusal(
            checkpoints.load_dit, path)
    state["final_layer.linear.bias"] = torch.full((8,), 1e300, dtype=torch.float64)
    torch.save(state, path)
    assert "NaN or infinite" in refusal(checkpoints.load_dit, path)     # they are in float32


# A header, the data behind it, and what is wrong.
ROW = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}
NEXT = ROW | {"data_offsets": [8, 16]}


@pytest.mark.parametrize("header, data", [
    ({"a": ROW}, 7), ({"a": ROW}, 9), ({"a": ROW, "b": NEXT}, 8), ({"a": NEXT}, 16),
    ({"a": ROW, "b": ROW | {"data_offsets": [4, 12]}}, 12), ({"a": ROW, "b": ROW}, 8),
    ({"a": ROW | {"data_offsets": [8, 0]}}, 8), ({"a": ROW | {"data_offsets": [-8, 0]}}, 0),
    ({"a": ROW | {"data_offsets": [0.0, 8.0]}}, 8), ({"a": ROW | {"data_offsets": "08"}}, 8),
    ({"a": ROW | {"data_offsets": [0, 1 << 62]}}, 8), ({"a": ROW | {"shape": [3]}}, 8),
    ({"a": ROW | {"shape": [-1]}}, 8), ({"a": ROW | {"shape": [-1, -2]}}, 8),
    ({"a": ROW | {"shape": "2"}}, 8), ({"a": ROW | {"shape": None}}, 8),
    ({"a": ROW | {"dtype": "F31"}}, 8), ({"a": ROW | {"dtype": ["F32"]}}, 8),
    ({"a": {"dtype": "F32"}}, 8), ({"a": [0, 8]}, 8), ([], 0), ("a", 0), (3, 0),
    ('{"a": %s, "a": %s}' % (json.dumps(ROW), json.dumps(ROW)), 8),
    ('{"a": %s' % json.dumps(ROW), 8), ("[" * 100_000, 0), ("\xff\xfe", 0), ("", 0)])
def test_damaged_safetensors(tmp_path, header, data):
    path = tmp_path / "a.safetensors"
    text = (header if isinstance(header, str) else json.dumps(header)).encode("latin1")
    path.write_bytes(len(text).to_bytes(8, "little") + text + bytes(data))
    assert f"{path} is damaged" in refusal(checkpoints.read, path)


def test_absurd_lengths_of_safetensors(tmp_path):
    path, good = tmp_path / "a.safetensors", json.dumps({"a": ROW}).encode()
    for length in (0, 1, len(good) + 1, 1 << 40, (1 << 64) - 1):
        path.write_bytes(length.to_bytes(8, "little") + good + bytes(8))
        assert "damaged" in refusal(checkpoints.read, path)
    for raw in (b"", b"abc", bytes(8)):
        path.write_bytes(raw)
        assert "damaged" in refusal(checkpoints.read, path)
    path.write_bytes(len(good).to_bytes(8, "little") + good + bytes(8))
    same(checkpoints.read(path), {"a": torch.zeros(2)})


class Evil:
    """Its pickle runs a command where it is read."""
    def __init__(self, *call: object) -> None:
        self.call = call

    def __reduce__(self) -> tuple:
        return self.call[0], self.call[1:]


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("place", ["whole", "entry", "key", "tensors"])
def test_no_file_runs_code(tmp_path, legacy, place):
    mark = tmp_path / "mark"
    calls = [(os.system, f"touch {mark}"), (exec, f"open({str(mark)!r}, 'w')"),
             (eval, f"open({str(mark)!r}, 'w')"), (Path.touch, mark), (os.mkfifo, str(mark)),
             (torch.save, {}, str(mark)), (shutil.copy, __file__, str(mark))]
    for call in calls:
        evil = Evil(*call)
        state = {"whole": evil, "entry": {"state_dict": {}, "evil": evil}, "key": {evil: 1},
                 "tensors": {"state_dict": evil}}[place]
        path = tmp_path / "evil.pt"
        torch.save(state, path, _use_new_zipfile_serialization=not legacy)
        refusal(checkpoints.load_tokenizer, path)
        refusal(checkpoints.load_dit, path)
        path.write_bytes(pickle.dumps(state))
        refusal(checkpoints.load_tokenizer, path)
        assert not mark.exists()
        pickle.loads(path.read_bytes())     # which does what it says
        assert mark.exists()
        mark.unlink()


def test_a_file_that_is_not_there_names_the_stage_that_makes_it(tmp_path):
    for kind in ("tokenizer", "dit"):
        with pytest.raises(InputError, match=f"is not there: `python train_{kind}.py` makes one"):
            checkpoints.read(tmp_path / "checkpoint.pt", kind)
