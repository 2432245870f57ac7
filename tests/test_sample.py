"""Sampling: against Euler with guidance written out, the noise of every image, going
on after an interruption, two processes, published files, and wrong input.  The
networks are tiny, and the images have 8 x 8 pixels.
"""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import checkpoints
import data
import flow
import models
import runtime
import sample
from test_train_dit import AUTOENCODER, make_tokenizer

TRANSFORMER = dict(depth=2, width=32, heads=2, in_channels=4, input_size=4, num_classes=10)


def make_dit(path: Path, tokenizer: Path, seed: int = 0, **changed) -> Path:
    """A checkpoint of a network none of whose parameters is zero."""
    torch.manual_seed(seed)
    net = models.build_dit(models.DITS["demo"] | TRANSFORMER | changed)
    for p in net.parameters():
        if p.requires_grad:
            torch.nn.init.normal_(p, std=0.3)
    checkpoints.save({
        "kind": "dit", "step": 7, "config": {"data": "shapes"}, "model_config": net.config,
        "model": {name: 0 * value for name, value in net.state_dict().items()},
        "ema": net.state_dict(), "classes": [f"class {i}" for i in range(10)],
        "tokenizer": {"path": str(tokenizer), "sha256": runtime.file_sha256(tokenizer)},
        "latent_mean": torch.arange(4.0), "latent_std": torch.arange(1.0, 5.0)}, path)
    return path


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory) -> Path:
    torch.set_num_threads(1)
    return make_tokenizer(tmp_path_factory.mktemp("tokenizer") / "tokenizer.pt")


@pytest.fixture(scope="module")
def dit(tokenizer) -> Path:
    return make_dit(tokenizer.with_name("dit.pt"), tokenizer)


def draw(dit: Path, out: Path, *flags: str) -> np.ndarray:
    sample.main(["--smoke", "--device", "cpu", "--dit", str(dit), "--out", str(out), *flags])
    with np.load(out / "samples.npz") as file:
        return file["arr_0"].astype(int)


def refused(capsys, *flags: str) -> str:
    """The one line on stderr in which the stage ends."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        sample.main(["--smoke", "--device", "cpu", *flags])
    error = capsys.readouterr().err.strip().splitlines()
    assert stop.value.code == 2 and len(error) == 1
    return error[0]


def test_smoke_writes_samples_settings_and_a_grid(dit, tokenizer, tmp_path):
    images = draw(dit, tmp_path)
    assert images.shape == (5, 8, 8, 3) and len({image.tobytes() for image in images}) == 5
    with np.load(tmp_path / "samples.npz") as file:
        assert file["arr_0"].dtype == np.uint8 and file["arr_1"].tolist() == [0, 1, 2, 3, 4]
    facts = json.loads((tmp_path / "samples.json").read_text())
    assert facts["steps"] == 2 and facts["data"] == "shapes" and facts["data_seed"] == 0
    assert facts["sha256"][str(tokenizer)] == runtime.file_sha256(tokenizer)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["grid.png", "samples.json", "samples.npz"]
    with Image.open(tmp_path / "grid.png") as grid:      # 8 pixels are enlarged to 64
        assert np.array_equal(np.asarray(grid)[64:128:8, 80:144:8], images[1])


# ------------------------------------------------------------------------------
# The integration, written out: guidance at half of the steps, and a time shift.


@torch.no_grad()
def plain_sampling(dit, tokenizer, mean, std, scale, channels=None, guide=None):
    """Three steps of Euler at t = k / 3, shifted by 0.5, for the labels 0, 1 and 2."""
    y, null = torch.arange(3), torch.full((3,), 10)
    draws = [runtime.generator(5, "sample", i) for i in range(3)]
    z = torch.stack([torch.randn(4, 4, 4, generator=draw) for draw in draws])
    times = [0.5 * k / 3 / (1 - 0.5 * k / 3) for k in range(4)]         # 0, 0.2, 0.5, 1
    for t, t_next in zip(times, times[1:]):
        v = dit(z, torch.full((3,), t), y)
        if 0.1 <= t <= 0.4:
            weak = (guide or dit)(z, torch.full((3,), t), y if guide else null)
            v[:, :channels] = weak[:, :channels] + scale * (v - weak)[:, :channels]
        z = z + (t_next - t) * v
    x_hat = tokenizer.decode(z * std[:, None, None] + mean[:, None, None])
    return data.to_uint8(x_hat).permute(0, 2, 3, 1).numpy().astype(int)


FLAGS = ["--count", "3", "--batch", "2", "--steps", "3", "--shift", "0.5", "--seed", "5",
         "--guidance", "3", "--interval", "0.1", "0.4"]


@pytest.mark.parametrize("guided", [False, True])
def test_sampling_is_euler_with_guidance_written_out(dit, tokenizer, tmp_path, guided):
    """The weights are the averaged ones, and the guide keeps the labels."""
    other = make_dit(tmp_path / "guide.pt", tokenizer, seed=1)
    nets = [checkpoints.load_dit(path)[0] for path in (dit, other)]
    decoder, _ = checkpoints.load_tokenizer(tokenizer)
    found = draw(dit, tmp_path / "out", *FLAGS, *(["--guide", str(other)] if guided else []))
    expected = plain_sampling(nets[0], decoder, torch.arange(4.0), torch.arange(1.0, 5.0), 3,
                              guide=nets[1] if guided else None)
    assert np.abs(found - expected).max() <= 1 and expected.std() > 5
    without = draw(dit, tmp_path / "without", *FLAGS, "--guidance", "1")
    assert np.abs(found - without).max() > 5


def test_published_files_need_a_tokenizer_and_statistics(dit, tokenizer, tmp_path, monkeypatch,
                                                         capsys):
    """Their protocol guides the first three channels only."""
    monkeypatch.setattr(models, "LDM_F16", AUTOENCODER)
    monkeypatch.setitem(models.DITS, "tiny", models.DITS["demo"] | TRANSFORMER)
    state, stats = checkpoints.read(dit)["ema"], tmp_path / "latents_stats.pt"
    checkpoints.save({"model": {}, "ema": {f"module.{k}": v for k, v in state.items()},
                      "config": {"data": {"data_path": "theirs"}}}, tmp_path / "lightningdit.pt")
    checkpoints.save({"state_dict": checkpoints.read(tokenizer)["model"]}, tmp_path / "vavae.pt")
    checkpoints.save({"mean": torch.zeros(1, 4, 1, 1), "std": torch.ones(1, 4, 1, 1)}, stats)
    flags = ["--dit", str(tmp_path / "lightningdit.pt"), "--tokenizer", str(tmp_path / "vavae.pt"),
             "--latent-stats", str(stats)]
    found = draw(Path(flags[1]), tmp_path / "out", "--preset", "lightningdit", *flags[2:], *FLAGS)
    nets = checkpoints.load_dit(dit)[0], checkpoints.load_tokenizer(tokenizer)[0]
    expected = plain_sampling(*nets, torch.zeros(4), torch.ones(4), 3, channels=3)
    assert np.abs(found - expected).max() <= 1 and expected.std() > 5
    assert json.loads((tmp_path / "out/samples.json").read_text())["data"] is None
    assert "give --tokenizer" in refused(capsys, *flags[:2])
    assert "give --latent-stats" in refused(capsys, *flags[:4])
    checkpoints.save({"mean": torch.zeros(3), "std": torch.ones(3)}, stats)
    assert "mean and std of 4 channels" in refused(capsys, *flags)


# ------------------------------------------------------------------------------
# Every image has its own noise.


@pytest.mark.parametrize("sampler", ["euler", "heun", "sde"])
def test_image_i_is_the_same_in_any_batch(dit, tmp_path, sampler):
    """To one grey level, because sums over another batch may round otherwise."""
    flags = ["--guidance", "1.5", "--sampler", sampler, "--steps", "3"]
    whole = draw(dit, tmp_path / "a", "--batch", "5", *flags)
    parts = draw(dit, tmp_path / "b", "--batch", "2", *flags)
    fewer = draw(dit, tmp_path / "c", "--count", "3", *flags)
    assert np.abs(whole - parts).max() <= 1 and np.abs(whole[:3] - fewer).max() <= 1


def test_the_samplers_are_those_of_flow(dit, tmp_path, monkeypatch):
    """They differ, and the SDE's noise belongs to the image and to the step."""
    images = [draw(dit, tmp_path / name, "--sampler", name) for name in ("euler", "heun", "sde")]
    assert len({array.tobytes() for array in images}) == 3
    seen = []

    def spy(velocity_fn, x, steps, shift, *, noise_fn):
        seen.append(noise_fn(4))
        return x

    monkeypatch.setattr(flow, "euler_maruyama", spy)
    draw(dit, tmp_path / "spy", "--sampler", "sde", "--seed", "7")
    expected = torch.randn(4, 4, 4, generator=runtime.generator(7, "sample", 3, "sde", 4))
    assert torch.equal(seen[1][0], expected)             # the second batch begins with image 3


def test_labels_are_balanced_or_drawn(dit, tmp_path):
    labels = {}
    for kind, count in (("balanced", 12), ("random", 200)):
        draw(dit, tmp_path / kind, "--labels", kind, "--count", str(count), "--batch", "200",
             "--steps", "1")
        labels[kind] = np.load(tmp_path / kind / "samples.npz")["arr_1"]
    assert labels["balanced"].tolist() == [*range(10), 0, 1]
    counts = np.bincount(labels["random"], minlength=10)
    assert counts.sum() == 200 and 5 < counts.min() < 20 < counts.max() < 40


def test_the_state_stays_fp32_where_the_networks_run_in_bf16(dit, tmp_path, monkeypatch):
    seen, forward = [], models.DiT.forward

    def spy(self, x_t, t, y):
        seen.append((x_t.dtype, t.dtype, torch.is_autocast_enabled("cpu")))
        return forward(self, x_t, t, y).bfloat16()

    monkeypatch.setattr(models.DiT, "forward", spy)
    draw(dit, tmp_path, "--precision", "bf16", "--guidance", "2", "--batch", "5")
    assert seen == [(torch.float32, torch.float32, True)] * 2


# ------------------------------------------------------------------------------
# Interruptions, and many processes.


def test_an_interrupted_run_draws_only_what_is_missing(dit, tmp_path, monkeypatch, capsys):
    flags = ["--batch", "1"]
    whole = draw(dit, tmp_path / "whole", *flags)
    decode, decoded = models.Autoencoder.decode, []

    def interrupted(self, z):
        decoded.append(z)
        if len(decoded) == 4:
            raise KeyboardInterrupt
        return decode(self, z)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(models.Autoencoder, "decode", interrupted)
        draw(dit, tmp_path / "out", *flags)
    parts = sorted((tmp_path / "out").glob(".parts-*/*.npy"))
    assert [part.name for part in parts] == [f"{i:08d}.npy" for i in range(3)]
    marked = np.full((1, 8, 8, 3), 7, np.uint8)
    np.save(parts[1], marked)                   # which a second run must not draw again
    images = draw(dit, tmp_path / "out", *flags)
    assert np.array_equal(images[1:2], marked)
    assert np.array_equal(np.delete(images, 1, 0), np.delete(whole, 1, 0))
    assert not list((tmp_path / "out").glob(".parts-*"))

    monkeypatch.setattr(models.Autoencoder, "decode", None)
    capsys.readouterr()
    draw(dit, tmp_path / "out", *flags)
    assert "already" in capsys.readouterr().out


def test_other_settings_or_files_make_other_images(dit, tokenizer, tmp_path):
    path = tmp_path / "dit.pt"
    path.write_bytes(dit.read_bytes())
    first = draw(path, tmp_path / "out")
    other = draw(path, tmp_path / "out", "--seed", "1")
    make_dit(path, tokenizer, seed=2)
    again = draw(path, tmp_path / "out", "--seed", "1")          # the same command
    assert not np.array_equal(first, other) and not np.array_equal(other, again)


def test_two_processes_share_the_parts(dit, tmp_path, monkeypatch):
    """Two parts, and the second process first: it leaves the end to the other one."""
    whole = draw(dit, tmp_path / "whole")
    start = ["--smoke", "--dit", str(dit), "--out", str(tmp_path / "out")]
    for rank in (1, 0):
        place = runtime.Runtime(torch.device("cpu"), rank, world=2)
        monkeypatch.setattr(runtime, "start", lambda device: place)
        sample.main(start)
        assert len(list((tmp_path / "out").glob(".parts-*/*.npy"))) == rank
    assert np.array_equal(np.load(tmp_path / "out/samples.npz")["arr_0"], whole)


# ------------------------------------------------------------------------------
# Flags, and wrong input.


@pytest.mark.parametrize("flags, expected", [
    ([], dict(count=500, steps=25, guidance=3.0, interval=[0.0, 1.0], cfg_channels=0)),
    (["--preset", "plain"], dict(count=1000, steps=50, guidance=1.0, cfg_channels=0)),
    (["--preset", "paper-1.70", "--count", "7"],
     dict(count=7, steps=250, guidance=1.70, interval=[0.21, 1.0], cfg_channels=0)),
    (["--preset", "paper-1.45"],
     dict(count=50_000, steps=250, guidance=1.45, interval=[0.13, 1.0], cfg_channels=0)),
    (["--preset", "lightningdit"],
     dict(count=50_000, steps=249, guidance=6.7, interval=[0.125, 1.0], cfg_channels=3,
          shift=0.3, precision="fp32"))])
def test_presets_are_defaults(flags, expected):
    args = vars(sample.parse(flags))
    assert {key: args[key] for key in expected} == expected


def test_files_that_do_not_belong_together_are_refused(dit, tokenizer, tmp_path, capsys):
    other = make_tokenizer(tmp_path / "tokenizer.pt", noise="none")
    start = ["--dit", str(dit), "--out", str(tmp_path / "out"), "--guidance", "2"]
    error = refused(capsys, *start, "--tokenizer", str(other))
    assert "is not the tokenizer of" in error
    for guide in (make_dit(tmp_path / "a.pt", other), make_dit(tmp_path / "b.pt", tokenizer,
                                                               num_classes=7)):
        assert "cannot guide" in refused(capsys, *start, "--guide", str(guide))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("flags, message", [
    (["--dit", "no/such/file.pt"], "no/such/file.pt"),
    (["--tokenizer", "no/such/tokenizer.pt"], "no/such/tokenizer.pt"),
    (["--guide", "no/such/guide.pt", "--guidance", "2"], "no/such/guide.pt"),
    (["--guide", "no/such/guide.pt", "--guidance", "1"], "--guide does nothing at --guidance 1"),
    (["--interval", "0.8", "0.2"], "--interval"),
    (["--count", "0"], "--count"), (["--shift", "0"], "--shift")])
def test_wrong_input_is_one_line(dit, tmp_path, capsys, flags, message):
    start = ["--dit", str(dit), "--out", str(tmp_path / "out")]
    assert message in refused(capsys, *start, *flags) and not (tmp_path / "out").exists()


def test_what_is_not_finite_is_not_written(tokenizer, tmp_path, capsys):
    path = make_dit(tmp_path / "dit.pt", tokenizer)
    state = checkpoints.read(path)
    state["ema"]["final_layer.linear.bias"][0] = float("nan")
    checkpoints.save(state, path)
    capsys.readouterr()
    with pytest.raises(SystemExit):
        draw(path, tmp_path / "out")
    assert "images 0 to 2 are not finite" in capsys.readouterr().err
    assert not list((tmp_path / "out").rglob("*.np*"))
