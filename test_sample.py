"""Sampling end to end: per-sample seeds, guidance and its interval, every integrator, published files, resume
after SIGKILL, two processes, trajectories, and bad input.
"""

import json
import shutil
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from torch.testing import assert_close

import data
import features
import losses
import models
import runtime
import sample
import train_dit
import train_tokenizer
from test_models import GOLDEN, LIGHTNINGDIT_TINY, arr, assert_golden, filled, golden
from test_train_tokenizer import ENVIRONMENT, one_thread  # noqa: F401

HERE = Path(__file__).parent


@pytest.fixture(scope="module")
def dit(tmp_path_factory) -> Path:
    """A DiT of a few steps (its output layer starts at zero) in the latents of a tokenizer of four."""
    out = tmp_path_factory.mktemp("stages")
    train_tokenizer.main(["--smoke", "--out", str(out / "tokenizer")])
    train_dit.main(["--smoke", "--warmup", "1", "--tokenizer", str(out / "tokenizer/checkpoint.pt"),
                    "--out", str(out / "dit")])
    return out / "dit" / "checkpoint.pt"


def draw(dit: Path, out: Path, *flags: str) -> tuple[np.ndarray, np.ndarray]:
    sample.main(["--smoke", "--dit", str(dit), "--out", str(out), *flags])
    with np.load(out / "samples.npz") as file:
        return file["arr_0"], file["arr_1"]


# ------------------------------------------------------------------------------------------------------------
# The guided field.


def counting_network(calls: list[int]):
    """v = label + x, null label 10: conditional and unconditional answers are known exactly."""
    def network(x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        calls.append(len(x))
        return x + y.float().view(-1, 1, 1, 1)
    return network


def test_guidance_extrapolates_all_channels_from_the_unconditional_answer():
    """v_u + w (v_c - v_u) with v_c = x + 3, v_u = x + 10, w = 2 is x - 4, in every channel."""
    x, y = torch.randn(2, 5, 4, 4), torch.tensor([3, 3])
    field = sample.guided_velocity(counting_network([]), y, 10, 2.0, (0.0, 1.0))
    assert_close(field(x, 0.5), x - 4)


def test_the_unconditional_branch_is_computed_only_inside_the_interval():
    """Of 20 steps at t = 0, 0.05, ..., 0.95 the 11 with 0.25 <= t <= 0.75 take two branches."""
    calls = []
    y = torch.zeros(3, dtype=torch.long)
    field = sample.guided_velocity(counting_network(calls), y, 10, 2.0, (0.25, 0.75))
    losses.euler(field, torch.zeros(3, 1, 2, 2), 20)
    assert calls == [3] * 5 + [6] * 11 + [3] * 4


def test_scale_one_never_computes_the_unconditional_branch():
    calls = []
    y = torch.zeros(3, dtype=torch.long)
    field = sample.guided_velocity(counting_network(calls), y, 10, 1.0, (0.0, 1.0))
    losses.euler(field, torch.zeros(3, 1, 2, 2), 4)
    assert calls == [3] * 4


def test_guidance_of_the_first_channels_leaves_the_conditional_answer_in_the_others():
    x, y = torch.randn(2, 5, 4, 4), torch.tensor([3, 3])
    field = sample.guided_velocity(counting_network([]), y, 10, 2.0, (0.0, 1.0), channels=3)
    assert_close(field(x, 0.5), torch.cat([x[:, :3] - 4, x[:, 3:] + 3], 1))


def test_autoguidance_extrapolates_from_the_guide_with_labels_in_both():
    """v_g + w (v - v_g) with v = x + 3, v_g = 2 (x + 3), w = 3 is -(x + 3)."""
    x, y, strong, weak = torch.randn(2, 5, 4, 4), torch.tensor([3, 3]), [], []
    double = counting_network(weak)
    field = sample.guided_velocity(counting_network(strong), y, 10, 3.0, (0.4, 0.6),
                                   guide=lambda x, t, y: 2 * double(x, t, y))
    assert_close(field(x, 0.5), -(x + 3))
    assert_close(field(x, 0.3), x + 3)
    assert strong == [2, 2] and weak == [2]


@pytest.mark.parametrize("sampler, field, guided", [
    ("euler", 20, 11),        # at t = 0, 0.05, ..., 0.95: 11 are in [0.25, 0.75]
    ("heun", 39, 22),         # and the far ends of the 19 first steps at 0.05, ..., 0.95: 11 more
    ("sde", 20, 10),          # at k 0.96 / 19 = 0, 0.0505, ..., 0.96: k = 5 .. 14
])
def test_every_sampler_evaluates_as_often_as_it_says(sampler, field, guided):
    args = sample.parse(["--sampler", sampler, "--steps", "20", "--guidance", "2",
                         "--interval", "0.25", "0.75"])
    assert sample.evaluations(args) == {"evaluations": field, "network_evaluations": field + guided}
    for guide in (False, True):
        calls, others = [], []
        velocity = sample.guided_velocity(counting_network(calls), torch.zeros(3, dtype=torch.long), 10, 2.0,
                                          args.interval, guide=counting_network(others) if guide else None)
        sample.integrate(velocity, [0, 1, 2], [1, 2, 2], args, torch.device("cpu"))
        assert len(calls) == field and sum(calls) + sum(others) == 3 * (field + guided)


@golden
def test_golden_euler_end_states_through_the_guided_field():
    """9 evaluations of the published network; guidance 2 off while t < 0.11, so the first, at 0, is plain."""
    dit = filled(models.build_dit(LIGHTNINGDIT_TINY))
    noise, y = arr("golden/noise_tiny", 2, 16, 8, 8), torch.tensor([3, 5])
    expected = np.load(GOLDEN / "euler_tiny_shift0.npz")
    for scale, name in ((1.0, "plain"), (2.0, "cfg")):
        field = sample.guided_velocity(dit, y, 10, scale, (0.11, 1.0))
        assert_golden(losses.euler(field, noise, 9), expected[name])


# ------------------------------------------------------------------------------------------------------------
# Labels, noise, files.


def test_labels():
    assert sample.make_labels(7, 3, "balanced", 0).tolist() == [0, 1, 2, 0, 1, 2, 0]
    y = sample.make_labels(30_000, 3, "random", 0)
    assert torch.equal(y, sample.make_labels(30_000, 3, "random", 0))
    assert not torch.equal(y, sample.make_labels(30_000, 3, "random", 1))
    assert_close(torch.bincount(y).float() / 30_000, torch.full((3,), 1 / 3), rtol=0, atol=0.02)


def test_noise_belongs_to_the_image():
    a, b = sample.noise_of([3, 1234], [2, 4, 4], 0), sample.noise_of([1234], [2, 4, 4], 0)
    assert torch.equal(a[1], b[0]) and not torch.equal(a[0], a[1])
    assert not torch.equal(b, sample.noise_of([1234], [2, 4, 4], 1))


def test_noise_of_the_sde_belongs_to_image_and_step(monkeypatch):
    monkeypatch.setattr(losses, "euler_maruyama", lambda *a, noise_fn, **o: [noise_fn(k)[1] for k in (0, 1)])
    args = sample.parse(["--sampler", "sde", "--seed", "7"])
    for k, noise in enumerate(sample.integrate(None, [3, 5], [2, 2], args, torch.device("cpu"))):
        assert torch.equal(noise, torch.randn(2, 2, generator=runtime.generator(7, "sample", 5, "sde", k)))


def test_smoke_writes_what_the_adm_evaluator_reads(dit, tmp_path):
    images, labels = draw(dit, tmp_path)
    assert images.dtype == np.uint8 and images.shape == (5, 32, 32, 3) and labels.tolist() == [0, 1, 2, 3, 4]
    assert len({image.tobytes() for image in images}) == 5
    with Image.open(tmp_path / "grid.png") as grid:
        assert grid.size[0] > 5 * 32
    settings = json.loads((tmp_path / "samples.json").read_text())
    assert settings["steps"] == 2 and settings["data"] == "shapes" and settings["size"] == 32


@pytest.mark.parametrize("sampler", ["euler", "heun", "sde"])
def test_image_i_is_the_same_for_any_batch_size(dit, tmp_path, sampler):
    """To one grey level: another batch size may sum in another order."""
    flags = ["--guidance", "1.5", "--sampler", sampler]
    a, _ = draw(dit, tmp_path / "a", "--batch", "5", *flags)
    b, _ = draw(dit, tmp_path / "b", "--batch", "2", *flags)
    c, _ = draw(dit, tmp_path / "c", "--count", "3", *flags)
    assert np.abs(a.astype(int) - b).max() <= 1 and np.abs(a[:3].astype(int) - c).max() <= 1


def test_samplers_differ_and_heun_is_nearer_to_many_steps(dit, tmp_path):
    many, _ = draw(dit, tmp_path / "many", "--steps", "64")
    error = {}
    for name in ("euler", "heun", "sde"):
        few, _ = draw(dit, tmp_path / name, "--sampler", name, "--steps", "4")
        error[name] = np.abs(few.astype(int) - many).mean()
    assert 0 <= error["heun"] < error["euler"] < error["sde"]


@torch.no_grad()
def test_the_state_stays_fp32_and_the_network_runs_in_bf16(dit, tmp_path, monkeypatch):
    seen, forward = [], models.DiT.forward

    def spy(self, x_t, t, y):
        seen.append((x_t.dtype, t.dtype, torch.is_autocast_enabled("cpu")))
        return forward(self, x_t, t, y).bfloat16()

    monkeypatch.setattr(models.DiT, "forward", spy)
    args = sample.parse(["--smoke", "--dit", str(dit), "--precision", "bf16", "--guidance", "2"])
    sampler = sample.Sampler(args, runtime.start("cpu"))
    states = []
    assert sampler.latents([0, 1], lambda t, x, predicted: states.append(x)).dtype == torch.float32
    assert seen == [(torch.float32, torch.float32, True)] * 2
    assert len(states) == 3 and all(x.dtype == torch.float32 for x in states)


def test_compiled_without_a_graph_break_the_images_are_the_same(dit, tmp_path, monkeypatch):
    plain, _ = draw(dit, tmp_path / "a", "--guidance", "2", "--count", "3")
    calls = []
    traced = partial(torch.compile, backend="eager", fullgraph=True)       # what CUDA compiles, traced only
    monkeypatch.setattr(torch, "compile", lambda net: calls.append(net) or traced(net))
    compiled, _ = draw(dit, tmp_path / "b", "--guidance", "2", "--count", "3", "--compile")
    assert len(calls) == 1 and np.abs(plain.astype(int) - compiled).max() <= 1


def test_autoguidance_end_to_end(dit, tmp_path, capsys):
    """A network guiding itself changes nothing; another one does; one of other latents is refused."""
    plain, _ = draw(dit, tmp_path / "a")
    itself, _ = draw(dit, tmp_path / "b", "--guide", str(dit), "--guidance", "2")
    assert np.abs(plain.astype(int) - itself).max() <= 1
    checkpoint = torch.load(dit, weights_only=True)
    checkpoint["ema"]["final_layer.linear.bias"] += 1
    torch.save(checkpoint, tmp_path / "other.pt")
    other, _ = draw(dit, tmp_path / "c", "--guide", str(tmp_path / "other.pt"), "--guidance", "2")
    assert not np.array_equal(plain, other)
    settings = json.loads((tmp_path / "c" / "samples.json").read_text())
    assert settings["evaluations"] == 2 and settings["network_evaluations"] == 4
    checkpoint["tokenizer"]["sha256"] = "0"
    torch.save(checkpoint, tmp_path / "foreign.pt")
    small = models.build_dit(models.DITS["demo"] | dict(num_classes=7))
    torch.save({"kind": "dit", "model_config": small.config, "ema": small.state_dict()}, tmp_path / "7.pt")
    capsys.readouterr()
    for name, message in (("foreign.pt", "with another tokenizer"), ("7.pt", "num_classes is 7, not 10")):
        with pytest.raises(SystemExit):
            draw(dit, tmp_path / "d", "--guide", str(tmp_path / name), "--guidance", "2")
        error = capsys.readouterr().err.strip().splitlines()
        assert len(error) == 1 and message in error[0] and not (tmp_path / "d").exists()


# ------------------------------------------------------------------------------------------------------------
# Resume, and many processes.


def command(dit: Path, out: Path, *flags: str) -> list[str]:
    return [str(HERE / "sample.py"), "--smoke", "--dit", str(dit), "--out", str(out), *flags]


def kill_after_parts(run: list[str], out: Path, parts: int) -> None:
    """SIGKILL once `parts` parts are there, and make sure that it had not finished."""
    process = subprocess.Popen(run, env=ENVIRONMENT, stderr=subprocess.DEVNULL)
    deadline = time.time() + 120
    while len(list(out.glob(".parts/0*"))) < parts and process.poll() is None and time.time() < deadline:
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert list(out.glob(".parts/0*")) and not (out / "samples.npz").exists(), "it finished before the kill"


def test_killed_with_sigkill_the_same_command_ends_with_the_same_file(dit, tmp_path):
    """The killed run is finished once by one process and once by two, to the bytes of an unbroken one."""
    flags = ["--count", "41", "--batch", "2", "--steps", "12", "--sampler", "sde"]
    images, _ = draw(dit, tmp_path / "whole", *flags)
    one, two = tmp_path / "one", tmp_path / "two"
    kill_after_parts([sys.executable, *command(dit, one, *flags)], one, 3)
    shutil.copytree(one, two)
    with pytest.raises(SystemExit):
        draw(dit, one, *flags[:-1], "euler")                    # not with parts of another sampler
    before = {path.name: path.stat().st_mtime_ns for path in one.glob(".parts/0*")}
    draw(dit, one, *flags)
    run = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    done = subprocess.run(run + command(dit, two, *flags), env=ENVIRONMENT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert f"{21 - len(before)} of 21 parts to draw" in done.stdout
    for out in (one, two):
        assert (out / "samples.npz").read_bytes() == (tmp_path / "whole" / "samples.npz").read_bytes()
        assert sorted(p.name for p in out.iterdir()) == ["grid.png", "samples.json", "samples.npz"]
    assert images.shape == (41, 32, 32, 3) and len({image.tobytes() for image in images}) == 41


def interrupt(monkeypatch, after: int) -> None:
    """Let Sampler.decode fail after so many parts."""
    decode, calls = sample.Sampler.decode, []

    def failing(self, z):
        calls.append(len(z))
        if len(calls) > after:
            raise KeyboardInterrupt
        return decode(self, z)

    monkeypatch.setattr(sample.Sampler, "decode", failing)


def test_parts_that_are_there_are_not_drawn_again_nor_mixed_with_others(dit, tmp_path, monkeypatch, capsys):
    whole, _ = draw(dit, tmp_path / "whole", "--batch", "1")
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        interrupt(patch, 3)
        draw(dit, tmp_path / "out", "--batch", "1")
    assert sorted(p.name for p in (tmp_path / "out/.parts").glob("0*")) == [f"{i:08d}.npy" for i in range(3)]
    capsys.readouterr()
    for flags, message in ((["--steps", "3"], "--steps 2 (now 3)"), (["--batch", "5"], "--batch 1 (now 5)")):
        with pytest.raises(SystemExit) as stop:
            draw(dit, tmp_path / "out", "--batch", "1", *flags)
        error = capsys.readouterr().err.strip().splitlines()
        assert stop.value.code == 2 and len(error) == 1 and message in error[0]
    marked = np.full((1, 32, 32, 3), 7, np.uint8)
    np.save(tmp_path / "out/.parts/00000001.npy", marked)
    images, _ = draw(dit, tmp_path / "out", "--batch", "1")
    assert np.array_equal(images[1:2], marked) and np.array_equal(images[2:], whole[2:])
    assert not (tmp_path / "out/.parts").exists()


def test_finished_samples_are_not_drawn_again(dit, tmp_path, monkeypatch, capsys):
    first, _ = draw(dit, tmp_path)
    (tmp_path / ".parts").mkdir()                               # as after a kill in the last moment
    settings = json.loads((tmp_path / "samples.json").read_text())
    capsys.readouterr()
    with monkeypatch.context() as patch:
        interrupt(patch, 0)
        draw(dit, tmp_path)
    assert "already there" in capsys.readouterr().out
    (tmp_path / ".parts").rmdir()
    other, _ = draw(dit, tmp_path, "--seed", "1")
    assert not np.array_equal(first, other) and settings["seed"] == 0
    checkpoint = torch.load(dit, weights_only=True)
    checkpoint["ema"]["final_layer.linear.bias"] += 1
    torch.save(checkpoint, tmp_path / "dit.pt")
    again, _ = draw(tmp_path / "dit.pt", tmp_path, "--seed", "1")               # the same flags, another file
    assert not np.array_equal(other, again)


def test_the_file_is_what_numpy_would_write(dit, tmp_path):
    images, labels = draw(dit, tmp_path)
    np.savez(tmp_path / "numpy.npz", arr_0=images, arr_1=labels)
    with np.load(tmp_path / "numpy.npz") as file:
        assert file.files == ["arr_0", "arr_1"]
    assert abs((tmp_path / "numpy.npz").stat().st_size - (tmp_path / "samples.npz").stat().st_size) < 100
    assert np.array_equal(features.map_array(str(tmp_path / "samples.npz"), "arr_0"), images)


# ------------------------------------------------------------------------------------------------------------
# Trajectories, presets and published files.


def test_the_trajectory_ends_in_the_image(dit, tmp_path):
    """Eleven times from noise to latent; predictions are x + (1 - t) v, here recovered from Euler's steps."""
    images, labels = draw(dit, tmp_path, "--steps", "10", "--trajectory", "3")
    with np.load(tmp_path / "trajectory.npz") as file:
        times, latents, predictions = (torch.from_numpy(file[k]) for k in ("times", "latents", "predictions"))
        assert file["labels"].tolist() == labels[:3].tolist()
    assert latents.shape == predictions.shape == (11, 3, 8, 8, 8) and latents.dtype == torch.float32
    assert_close(times, torch.arange(11).double() / 10)
    assert torch.equal(latents[0], sample.noise_of([0, 1, 2], [8, 8, 8], 0))
    assert_close(predictions[:-1], latents[:-1] + (latents[1:] - latents[:-1]) * 10
                 * (1 - times[:-1]).float().view(-1, 1, 1, 1, 1), rtol=1e-4, atol=1e-4)
    args = sample.parse(["--smoke", "--dit", str(dit), "--steps", "10"])
    sampler = sample.Sampler(args, runtime.start("cpu"))
    assert_close(latents[-1], sampler.latents([0, 1, 2]), rtol=0, atol=0)
    decoded = sampler.decode(latents[-1]).permute(0, 2, 3, 1).numpy()
    assert np.abs(decoded.astype(int) - images[:3]).max() <= 1
    with Image.open(tmp_path / "strip.png") as strip:
        assert strip.size == (11 * 34 + 2, 6 * 34 + 2)
        pixels = np.asarray(strip)
    for i in range(3):                    # at t = 1 state and prediction are the image
        for row in (2 * i, 2 * i + 1):
            tile = pixels[34 * row + 2:34 * row + 34, 34 * 10 + 2:34 * 10 + 34]
            assert np.abs(tile.astype(int) - images[i]).max() <= 1


def test_trajectories_of_few_and_of_many_steps(dit, tmp_path):
    for steps, sampler, times in ((3, "heun", 4), (37, "sde", 11)):
        draw(dit, tmp_path, "--steps", str(steps), "--sampler", sampler, "--trajectory", "1", "--count", "1")
        with np.load(tmp_path / "trajectory.npz") as file:
            assert len(file["times"]) == times and file["times"][-1] == 1
            assert np.array_equal(file["latents"][-1], file["predictions"][-1])


def test_presets_are_defaults_that_flags_override():
    args = sample.parse(["--preset", "paper-1.70", "--count", "7"])
    assert (args.count, args.steps, args.guidance, args.interval) == (7, 250, 1.70, [0.21, 1.0])
    args = sample.parse(["--preset", "paper-1.45", "--interval", "0.2", "0.9"])
    assert (args.count, args.steps, args.guidance, args.interval) == (50_000, 250, 1.45, [0.2, 0.9])
    args = sample.parse([])
    assert (args.count, args.steps, args.guidance, args.interval) == (1000, 50, 1.0, [0.0, 1.0])


@pytest.fixture
def published(tmp_path, monkeypatch) -> list[str]:
    """A DiT, a tokenizer and statistics in the published layouts, the tokenizer smaller than f16."""
    small = dict(ch=16, ch_mult=(1, 2, 2), num_res_blocks=1, attn_resolutions=(16,), resolution=32)
    monkeypatch.setattr(models, "LDM_F16", small)
    state = filled(models.build_autoencoder(small | dict(z_channels=8))).state_dict()
    torch.save({"state_dict": state | {"loss.logvar": torch.zeros(1)}}, tmp_path / "vavae.pt")
    state = filled(models.build_dit(models.DITS["demo"])).state_dict()
    torch.save({"model": {f"module.{k}": v for k, v in state.items()}, "ema": state, "opt": {},
                "config": {"data": {"data_path": "/theirs"}}},
               tmp_path / "lightningdit.pt")
    torch.save({"mean": arr("mean", 1, 8, 1, 1), "std": arr("std", 1, 8, 1, 1).abs()},
               tmp_path / "latents_stats.pt")
    return ["--dit", str(tmp_path / "lightningdit.pt"), "--tokenizer", str(tmp_path / "vavae.pt"),
            "--latent-stats", str(tmp_path / "latents_stats.pt")]


@torch.no_grad()
def test_published_checkpoints(published, tmp_path):
    """Against integration and decoding by hand, guided on three channels from t = 0.5 on."""
    sample.main(["--smoke", *published, "--guidance", "4", "--interval", "0.5", "1", "--cfg-channels", "3",
                 "--out", str(tmp_path / "out")])
    dit, autoencoder = (filled(models.build_dit(models.DITS["demo"])),
                        filled(models.build_autoencoder(models.LDM_F16 | dict(z_channels=8))))
    y, null, half = torch.arange(5), torch.full((5,), 10), torch.full((5,), 0.5)
    x = sample.noise_of(list(range(5)), [8, 8, 8], 0)
    x = x + dit(x, torch.zeros(5), y) / 2
    v, v_null = dit(x, half, y), dit(x, half, null)
    v[:, :3] = v_null[:, :3] + 4 * (v[:, :3] - v_null[:, :3])
    z = x + v / 2
    x_hat = autoencoder.decode(z * arr("std", 1, 8, 1, 1).abs() + arr("mean", 1, 8, 1, 1))
    with np.load(tmp_path / "out/samples.npz") as file:
        expected = data.to_uint8(x_hat).permute(0, 2, 3, 1).numpy()
        assert np.abs(file["arr_0"].astype(int) - expected).max() <= 1 and expected.std() > 5
    settings = json.loads((tmp_path / "out/samples.json").read_text())
    assert settings["size"] == 32 and settings["data"] is None and settings["dit_steps"] is None


def test_published_files_that_do_not_fit_are_refused(published, dit, tmp_path, capsys):
    def refused(*flags: str) -> str:
        with pytest.raises(SystemExit) as stop:
            sample.main(["--smoke", "--out", str(tmp_path / "out"), *flags])
        error = capsys.readouterr().err.strip().splitlines()
        assert stop.value.code == 2 and len(error) == 1 and not (tmp_path / "out").exists()
        return error[0]

    assert "give --tokenizer and --latent-stats" in refused(*published[:2])
    assert "give --latent-stats" in refused(*published[:4])
    assert "no/such/stats.pt" in refused(*published[:4], "--latent-stats", "no/such/stats.pt")
    assert "leave out --latent-stats" in refused("--dit", str(dit), "--latent-stats", published[5])
    assert "is not the tokenizer that" in refused("--dit", str(dit), "--tokenizer", published[3])
    torch.save({"mean": torch.zeros(1, 4, 1, 1), "std": torch.ones(1, 4, 1, 1)}, tmp_path / "four.pt")
    assert "8 numbers each" in refused(*published[:4], "--latent-stats", str(tmp_path / "four.pt"))
    state = filled(models.build_autoencoder(models.LDM_F16 | dict(z_channels=4))).state_dict()
    torch.save({"state_dict": state}, tmp_path / "vavae.pt")
    assert "latents of 4 channels" in refused(*published)


def test_guidance_and_weights_change_the_images(dit, tmp_path):
    plain, _ = draw(dit, tmp_path / "a")
    guided, _ = draw(dit, tmp_path / "b", "--guidance", "30")
    outside, _ = draw(dit, tmp_path / "c", "--guidance", "30", "--interval", "0.9", "1")
    last, _ = draw(dit, tmp_path / "d", "--weights", "model")
    assert not np.array_equal(plain, guided) and not np.array_equal(plain, last)
    assert np.array_equal(plain, outside)          # two steps, at t = 0 and 0.5: never inside


@pytest.mark.parametrize("flags, message", [
    (["--dit", "no/such/file.pt"], "no/such/file.pt"),
    (["--count", "0"], "--count must be at least 1"),
    (["--interval", "0.8", "0.2"], "--interval takes 0 <= LO <= HI <= 1"),
    (["--shift", "0"], "--shift must be positive"),
    (["--last-step", "1"], "--last-step must be in (0, 0.9)"),
    (["--cfg-channels", "9"], "--cfg-channels takes 0 to 8"),
    (["--guide", "no/such/guide.pt", "--guidance", "2"], "no/such/guide.pt"),
    (["--guide", "no/such/guide.pt"], "--guide does nothing at --guidance 1"),
    (["--trajectory", "4"], "--trajectory takes 0 to 3"),
    (["--tokenizer", "no/such/tokenizer.pt"], "no/such/tokenizer.pt"),
])
def test_bad_input_is_one_line_and_exit_2(dit, tmp_path, capsys, flags, message):
    with pytest.raises(SystemExit) as stop:
        draw(dit, tmp_path / "out", *flags)
    error = capsys.readouterr().err.strip().splitlines()
    assert stop.value.code == 2 and len(error) == 1 and message in error[0]
    assert not (tmp_path / "out").exists()


def test_the_wrong_tokenizer_is_refused(dit, tmp_path, capsys):
    train_tokenizer.main(["--smoke", "--seed", "1", "--out", str(tmp_path)])
    with pytest.raises(SystemExit):
        draw(dit, tmp_path / "out", "--tokenizer", str(tmp_path / "checkpoint.pt"))
    assert "is not the tokenizer that" in capsys.readouterr().err


def test_noise_comes_from_the_sample_stream_alone():
    expected = torch.randn([2, 2], generator=runtime.generator(7, "sample", 5))
    assert torch.equal(sample.noise_of([5], [2, 2], 7)[0], expected)
