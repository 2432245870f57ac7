"""Sampling: against the integrators and guidance written out for every flag, going on
after an interruption, two processes, published files, and wrong input.  The networks
are tiny, and the images have 8 x 8 pixels.
"""

import json
import math
import os
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import checkpoints
import data
import models
import runtime
import sample
from test_train_dit import AUTOENCODER, TRANSFORMER, make_dit, make_tokenizer


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory) -> Path:
    """One whose pixels change much with the latent."""
    torch.set_num_threads(1)
    path = make_tokenizer(tmp_path_factory.mktemp("tokenizer") / "tokenizer.pt")
    file = checkpoints.read(path)
    file["model"]["decoder.conv_out.weight"] *= 8
    checkpoints.save(file, path)
    return path


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


def test_smoke_writes_samples_settings_and_a_grid(dit, tokenizer, tmp_path, monkeypatch):
    shown, save_rows = {}, data.save_rows
    monkeypatch.setattr(data, "save_rows", lambda path, rows: (
        shown.update(rows), save_rows(path, rows)))
    images = draw(dit, tmp_path)
    assert images.shape == (5, 8, 8, 3) and len({image.tobytes() for image in images}) == 5
    with np.load(tmp_path / "samples.npz") as file:
        assert file["arr_0"].dtype == np.uint8 and file["arr_1"].tolist() == [0, 1, 2, 3, 4]
    facts = json.loads((tmp_path / "samples.json").read_text())
    assert facts["steps"] == 2 and facts["data"] == "shapes" and facts["data_seed"] == 0
    assert facts["sha256"][str(tokenizer)] == runtime.file_sha256(tokenizer)
    assert {*os.listdir(tmp_path)} == {"grid.png", "samples.json", "samples.npz"}
    assert [*shown] == [f"class{i}" for i in range(5)]
    assert all(np.array_equal(row, images[i:i + 1]) for i, row in enumerate(shown.values()))


# ------------------------------------------------------------------------------
# The way from noise to pixels, written out in plain PyTorch.  A grid of three times
# t = k / 3 that is shifted by 0.5, to 0.5 t / (1 - 0.5 t), has the times 0, 0.2, 0.5, 1.

SETTINGS = dict(
    count=3, labels=[0, 1, 2], seed=5, sampler="euler", times=[0, 0.2, 0.5, 1], scale=3.0,
    low=0.1, high=0.4, channels=4, guide=None, mean=(0.0, 1.0, 2.0, 3.0), std=(1.0, 2.0, 3.0, 4.0))


@torch.no_grad()
def plain_sampling(decoder, **changed) -> np.ndarray:
    s = SimpleNamespace(**SETTINGS | changed)
    y, null = torch.tensor(s.labels), torch.full((s.count,), 10)

    def noise(*stream):
        return torch.stack([torch.randn(4, 4, 4, generator=runtime.generator(
            s.seed, "sample", i, *stream)) for i in range(s.count)])

    def velocity(z, t):
        times = torch.full((s.count,), t)
        v = s.net(z, times, y)
        if s.low <= t <= s.high:
            weak = s.guide(z, times, y) if s.guide else s.net(z, times, null)
            v[:, :s.channels] = (weak + s.scale * (v - weak))[:, :s.channels]
        return v

    z = noise()
    for k, (t, t_next) in enumerate(zip(s.times, s.times[1:])):
        step, last = t_next - t, t_next == 1
        v = velocity(z, t)
        if s.sampler == "heun" and not last:
            v = (v + velocity(z + step * v, t_next)) / 2
        if s.sampler == "sde":
            v = v + t * v - z                   # v + (1 - t) score
        z = z + step * v
        if s.sampler == "sde" and not last:
            z = z + math.sqrt(2 * (1 - t) * step) * noise("sde", k)
    mean, std = (torch.tensor(a).view(4, 1, 1) for a in (s.mean, s.std))
    x_hat = decoder.decode(z * std + mean)
    pixels = (127.5 * (x_hat + 1)).round().clamp(0, 255)
    return pixels.permute(0, 2, 3, 1).numpy().astype(int)


@pytest.fixture(scope="module")
def guide(tokenizer) -> Path:
    return make_dit(tokenizer.with_name("guide.pt"), tokenizer, seed=1)


# Of the SDE the last step is 0.04 long.  Without a shift it has the times 0, 0.48 and 0.96.
# Shifted, t = 0.96 was u = 0.96 / (0.5 + 0.48), and half of it goes to 0.25 u / (1 - 0.25 u).
U = 0.96 / 0.98
SDE = [0, 0.25 * U / (1 - 0.25 * U), 0.96, 1]

FLAGS = {   # and what they change
    "--at-once 3": {},
    "--preset plain --guidance 3": {},
    "--device cpu --precision fp32": {},
    "--seed 6": dict(seed=6),
    "--labels random": dict(labels=torch.randint(
        10, (3,), generator=runtime.generator(5, "sample labels")).tolist()),
    "--steps 2": dict(times=[0, 1 / 3, 1]),
    "--shift 1": dict(times=[0, 1 / 3, 2 / 3, 1]),
    "--sampler heun": dict(sampler="heun"),
    "--sampler heun --interval 0 1": dict(sampler="heun", low=0, high=1),
    "--sampler sde": dict(sampler="sde", times=SDE),
    "--sampler sde --shift 1 --interval 0.3 0.7": dict(
        sampler="sde", times=[0, 0.48, 0.96, 1], low=0.3, high=0.7),
    "--guidance 1": dict(scale=1),
    "--guidance 0": dict(scale=0),
    "--guidance 5": dict(scale=5),
    "--interval 0.4 0.6": dict(low=0.4, high=0.6),
    "--steps 2 --shift 1 --interval 0 0": dict(times=[0, 0.5, 1], low=0, high=0),
    "--steps 2 --shift 1 --interval 0.5 0.5": dict(times=[0, 0.5, 1], low=0.5, high=0.5),
    "--guide guide.pt": dict(guide="guide.pt"),
    "--preset lightningdit --labels balanced": dict(channels=3),
    "--preset lightningdit --labels balanced --cfg-channels 2": dict(channels=2),
    "--class class3 --class 7": dict(labels=[3, 7, 3]),
    "--class 4 --class 9 --labels random": dict(labels=[[4, 9][i] for i in torch.randint(
        2, (3,), generator=runtime.generator(5, "sample labels"))]),
    "--dit guide.pt": dict(net="guide.pt"),
    "--latent-stats stats.pt": dict(mean=(0.5, 0.5, 0.5, 0.5), std=(1.0, 1.0, 2.0, 2.0)),
    "--tokenizer copy.pt": {},
}


USUAL = ("--count 3 --at-once 2 --steps 3 --shift 0.5 --seed 5 --guidance 3 "
         "--interval 0.1 0.4").split()


@pytest.mark.parametrize("flags", FLAGS)
def test_images_are_those_written_out(dit, guide, tokenizer, tmp_path, monkeypatch, flags):
    """To one grey level, because the batches have other sizes.  Weights are the averaged ones."""
    monkeypatch.chdir(tokenizer.parent)
    checkpoints.save({"mean": torch.full((1, 4, 1, 1), 0.5),
                      "std": torch.tensor([1.0, 1.0, 2.0, 2.0])}, Path("stats.pt"))
    Path("copy.pt").write_bytes(tokenizer.read_bytes())
    net, other = (checkpoints.load_dit(path)[0] for path in (dit, guide))
    decoder, _ = checkpoints.load_tokenizer(tokenizer)
    changed = {k: other if v == "guide.pt" else v for k, v in FLAGS[flags].items()}
    usual, expected = plain_sampling(decoder, net=net), plain_sampling(
        decoder, **{"net": net} | changed)
    found = draw(dit, tmp_path, *USUAL, *flags.split())
    assert np.abs(found - expected).max() <= 1
    assert np.load(tmp_path / "samples.npz")["arr_1"].tolist() == changed.get("labels", [0, 1, 2])
    assert (np.abs(expected - usual).max() > 5) == bool(FLAGS[flags])


class PlainEuler:
    """A diffusion decoder, written out: three steps from the noise of each image."""

    def __init__(self, net) -> None:
        self.net = net

    def decode(self, z):
        x = torch.stack([torch.randn(3, 8, 8, generator=runtime.generator(0, "decoder", i))
                         for i in range(len(z))])
        for t in (0, 1 / 3, 2 / 3):
            x = x + self.net.decoder(x, torch.full((len(z),), t), self.net.post_quant_conv(z)) / 3
        return x


def test_a_diffusion_decoder_gives_every_image_its_own_noise(tmp_path):
    tokenizer = make_tokenizer(tmp_path / "dgae.pt", arch="dgae", unet_ch=8, unet_mult=(1, 2),
                               unet_blocks=1)
    file = checkpoints.read(tokenizer)
    draws = runtime.generator(0, "weights")
    for name, value in file["model"].items():
        if name.startswith("decoder."):   # some start at 0
            value += 0.5 * torch.randn(value.shape, generator=draws)
    checkpoints.save(file, tokenizer)
    dit = make_dit(tmp_path / "dit.pt", tokenizer)
    expected = plain_sampling(PlainEuler(checkpoints.load_tokenizer(tokenizer)[0]),
                              net=checkpoints.load_dit(dit)[0])
    found = draw(dit, tmp_path / "out", *USUAL, "--decode-steps", "3")
    assert np.abs(found - expected).max() <= 1
    assert np.abs(draw(dit, tmp_path / "out", *USUAL) - expected).max() > 5   # 20 steps


def test_images_are_decoded_a_few_at_a_time_by_their_numbers():
    seen, z = [], torch.randn(20, 1)
    decoder = SimpleNamespace(decode=lambda z, images: seen.append((len(z), images)) or z)
    found = sample.Networks.decode(SimpleNamespace(tokenizer=decoder), z, list(range(5, 25)))
    assert torch.equal(found, z)
    assert seen == [(16, list(range(5, 21))), (4, [21, 22, 23, 24])]


def test_every_flag_is_tested():
    """Those of the last line by other tests of this file."""
    args = vars(sample.parse([]))
    flags = {"--" + name.replace("_", "-").replace("classes", "class") for name in args}
    assert flags <= {*" ".join(FLAGS).split(), "--count", "--out", "--smoke", "--decode-steps",
                     "--compile"}


def test_compiled_blocks_make_the_same_images(dit, tmp_path, monkeypatch):
    """And count as the same settings."""
    seen = []
    monkeypatch.setattr(models.Block, "compile", lambda block, dynamic: seen.append(block))
    usual = draw(dit, tmp_path / "usual")
    assert not seen and np.array_equal(draw(dit, tmp_path / "run", "--compile"), usual)
    assert len(seen) == checkpoints.load_dit(dit)[0].config["depth"]
    digests = [json.loads((tmp_path / name / "samples.json").read_text())["digest"]
               for name in ("usual", "run")]
    assert digests[0] == digests[1]


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
    found = draw(Path(flags[1]), tmp_path / "out", "--preset", "lightningdit", *flags[2:],
                 *USUAL, "--labels", "balanced")
    expected = plain_sampling(
        checkpoints.load_tokenizer(tokenizer)[0], net=checkpoints.load_dit(dit)[0],
        mean=(0.0,) * 4, std=(1.0,) * 4, channels=3)
    assert np.abs(found - expected).max() <= 1 and expected.std() > 5
    assert json.loads((tmp_path / "out/samples.json").read_text())["data"] is None
    assert "give --tokenizer" in refused(capsys, *flags[:2])
    assert "give --latent-stats" in refused(capsys, *flags[:4])
    checkpoints.save({"mean": torch.zeros(3), "std": torch.ones(3)}, stats)
    assert "mean and std of 4 channels" in refused(capsys, *flags)


# ------------------------------------------------------------------------------
# Labels, and precision.


def test_labels_are_balanced_or_drawn(dit, tmp_path):
    """Classes come in turn, or with the numbers of a stream; images depend on their label."""
    drawn = torch.randint(10, (12,), generator=runtime.generator(0, "sample labels"))
    found = {}
    for kind, labels in (("balanced", [*range(10), 0, 1]), ("random", drawn.tolist())):
        images = draw(dit, tmp_path / kind, "--labels", kind, "--count", "12", "--batch", "5")
        assert np.load(tmp_path / kind / "samples.npz")["arr_1"].tolist() == labels
        found[kind] = images, np.array(labels)
    equal = found["balanced"][1] == found["random"][1]
    moved = np.abs(found["balanced"][0] - found["random"][0]).max((1, 2, 3))
    assert equal.any() and (moved[equal] <= 1).all() and (moved[~equal] > 1).all()


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

    def interrupted(self, z, images):
        decoded.append(z)
        if len(decoded) == 4:
            raise KeyboardInterrupt
        return decode(self, z, images)

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
          shift=0.3, precision="fp32", labels="random")),
    (["--preset", "lightningdit-64"],
     dict(count=50_000, steps=249, guidance=10.0, interval=[0.11, 1.0], cfg_channels=3,
          shift=0.3, precision="fp32", labels="random")),
    (["--preset", "lightningdit-plain"],
     dict(steps=249, guidance=1.0, shift=0.3, precision="fp32", labels="random")),
    (["--preset", "gae"], dict(steps=250, guidance=3.3, interval=[0.3, 1.0], shift=0.4,
                               labels="balanced", cfg_channels=0, sampler="euler")),
    (["--preset", "gae-80"], dict(guidance=2.5, interval=[0.25, 1.0], shift=0.4)),
    (["--preset", "gae-plain"], dict(guidance=1.0, shift=0.4, sampler="sde", steps=250))])
def test_presets_are_defaults(flags, expected):
    args = vars(sample.parse(flags))
    assert {key: args[key] for key in expected} == expected


def test_guidance_needs_an_embedding_that_was_trained(dit, guide, tmp_path, capsys):
    """That of no label is not, where every label was shown."""
    file = checkpoints.read(dit)
    checkpoints.save({k: v for k, v in file.items() if k != "config"}, dit.with_name("bare.pt"))
    draw(dit.with_name("bare.pt"), tmp_path / "bare", *USUAL)   # it does not say
    file["config"]["label_dropout"] = 0.0
    checkpoints.save(file, dit.with_name("labelled.pt"))
    start = ["--dit", str(dit.with_name("labelled.pt")), "--out", str(tmp_path / "out"), *USUAL]
    assert "use --guidance 1, or --guide" in refused(capsys, *start)
    for flags in (["--guidance", "1"], ["--guide", str(guide)]):
        draw(Path(start[1]), tmp_path / flags[0], *USUAL, *flags)


def test_files_that_do_not_belong_together_are_refused(dit, tokenizer, tmp_path, capsys):
    other = make_tokenizer(tmp_path / "tokenizer.pt", noise="none")
    start = ["--dit", str(dit), "--out", str(tmp_path / "out"), "--guidance", "2"]
    error = refused(capsys, *start, "--tokenizer", str(other))
    assert "is not the tokenizer of" in error
    for guide in (make_dit(tmp_path / "a.pt", other), make_dit(tmp_path / "b.pt", tokenizer,
                                                               num_classes=7)):
        assert "cannot guide" in refused(capsys, *start, "--guide", str(guide))
    scaled = checkpoints.read(dit)   # its latents are divided by other numbers
    scaled["latent_std"] = 2 * scaled["latent_std"]
    checkpoints.save(scaled, tmp_path / "c.pt")
    assert "cannot guide" in refused(capsys, *start, "--guide", str(tmp_path / "c.pt"))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("flags, message", [
    (["--dit", "no/such/file.pt"], "no/such/file.pt"),
    (["--tokenizer", "no/such/tokenizer.pt"], "no/such/tokenizer.pt"),
    (["--guide", "no/such/guide.pt", "--guidance", "2"], "no/such/guide.pt"),
    (["--guide", "no/such/guide.pt", "--guidance", "1"], "--guide does nothing at --guidance 1"),
    (["--interval", "0.8", "0.2"], "--interval"),
    (["--decode-steps", "3"], "decodes in one step"),
    (["--count", "0"], "--count"), (["--shift", "0"], "--shift")])
def test_wrong_input_is_one_line(dit, tmp_path, capsys, flags, message):
    start = ["--dit", str(dit), "--out", str(tmp_path / "out")]
    assert message in refused(capsys, *start, *flags) and not (tmp_path / "out").exists()


def test_what_is_not_finite_is_not_written(tokenizer, tmp_path, capsys):
    path = make_dit(tmp_path / "dit.pt", tokenizer)
    state = checkpoints.read(path)
    state["ema"]["final_layer.linear.bias"][3] = 3e38       # which the deviation multiplies by 4
    checkpoints.save(state, path)
    capsys.readouterr()
    with pytest.raises(SystemExit):
        draw(path, tmp_path / "out")
    assert "images 0 to 2 are not finite" in capsys.readouterr().err
    assert not list((tmp_path / "out").rglob("*.np*"))
