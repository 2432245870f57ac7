"""Scores of tokenizers and samples whose answer is known.  Bad input: test_bad_input.py."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

import checkpoints
import data
import evaluate
import metrics
import frozen
import models
import runtime

ROOT = Path(__file__).parents[1]
FD = "FD-tiny:patches"
TINY = "--features", "tiny:patches", "--workers", "0", "--device", "cpu"


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    """Every test in a folder of its own, with features that take no time."""
    (tmp_path / "tiny.py").write_text(
        "from torch.nn.functional import avg_pool2d\n"
        "def patches(x): return avg_pool2d(x / 255, x.shape[3] // 4).flatten(1)\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))


def run(*flags, features=TINY):
    evaluate.main([*map(str, flags), *features])
    return json.loads(Path("runs/evaluation/results.json").read_text())


def samples(path, n, size=32, seed=0, **arrays):
    draw = runtime.generator(seed, "samples")
    pixels = torch.randint(0, 256, (n, size, size, 3), generator=draw, dtype=torch.uint8)
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    np.savez(path, arr_0=pixels.numpy(), **arrays)
    return pixels


def tokenizer(path, **entries):
    torch.manual_seed(0)
    row = dict(ch=32, ch_mult=(1, 1, 1), noise="learned", sigma=0.0)
    network = models.build_tokenizer(models.AUTOENCODERS["demo"] | row)
    checkpoints.save({"kind": "tokenizer", "model_config": network.config, "step": 0,
                      "model": network.state_dict(), **entries}, path)


TRAINED = dict(config=dict(data="shapes", size=16, seed=0), latent_mean=torch.zeros(8),
               latent_std=torch.full((8,), 2.0))


def folder(path, pixels):
    Path(path).mkdir(parents=True)
    for i, image in enumerate(pixels):
        Image.fromarray(np.asarray(image)).save(f"{path}/{i:03}.png")


# ------------------------------------------------------------------------------
# A tokenizer that decodes exactly: z is the image itself, the noise is the error.


class Identity(torch.nn.Module):
    def posterior(self, x):
        return 0.2 * x, torch.zeros_like(x)

    def decode(self, z, images):
        return z


class Painted(data.Shapes):
    """Grey images whose first column has the value of their label."""

    def __len__(self):
        return 100_000 if self.split == "train" else 60

    def read(self, indices, places):
        images = torch.full((len(indices), 3, 32, 32), 128, dtype=torch.uint8)
        images[:, :, :, 0] = self.labels(indices)[:, None, None].to(torch.uint8)
        return list(images)


@pytest.fixture
def painted(monkeypatch):
    """Shapes that a judge knows by their first pixel, and an exact tokenizer."""
    file = {"config": dict(data="shapes", size=32, seed=0),
            "latent_std": torch.tensor([0.5, 1.0, 1.5])}
    Path("checkpoint.pt").touch()
    monkeypatch.setattr(checkpoints, "load_tokenizer", lambda path, steps: (Identity(), file))
    monkeypatch.setattr(data, "open_dataset", lambda name, size, split, seed=0: Painted(
        size, split, seed))

    def judge(*args):
        def network(x):
            seen = F.one_hot(x[:, 0, 0, 0].long().clamp(max=10), 11).float()
            return torch.cat([seen, x.float().mean((2, 3))], 1),
        return frozen.Features("Shapes", "", network, head=lambda rows: 50 * rows[:, :10])
    monkeypatch.setattr(frozen, "load_features", judge)


def noise_psnr(std):
    """Decoded images are 0.2 x, which is 0 for grey 128, plus noise of this std.

    Rounding to 1 / 255 of a range of 2 adds a variance of (2 / 255)^2 / 12.
    """
    mse = (torch.tensor(std) ** 2).mean().item() + (2 / 255) ** 2 / 12
    return -10 * math.log10(mse / 4)


def test_noise_curve_in_closed_form(painted, monkeypatch):
    monkeypatch.setattr(Painted, "read", lambda self, indices, places: list(
        torch.full((len(indices), 3, 32, 32), 128, dtype=torch.uint8)))
    row, = run("--tokenizer", "checkpoint.pt", "--batch", 7)
    curve = {(point["noise"], point["level"]): point for point in row["curve"]}
    assert [*curve] == [("none", 0), *(("absolute", a) for a in (0.1, 0.2, 0.5, 1.0)),
                        *(("relative", a) for a in (0.1, 0.2, 0.5, 1.0))]
    assert row["metrics"]["PSNR"] == curve["none", 0]["PSNR"] > 45
    for level in (0.1, 0.2):
        found = (curve[kind, level]["PSNR"] for kind in ("absolute", "relative"))
        stds = [level], [0.5 * level, level, 1.5 * level]
        assert [*found] == pytest.approx([*map(noise_psnr, stds)], abs=0.1)
    assert curve["absolute", 0.1]["SSIM"] > curve["absolute", 0.2]["SSIM"]
    assert Path("runs/evaluation/noise_curve.png").stat().st_size > 1000


def test_one_process_computes_the_probe(painted, monkeypatch):
    monkeypatch.setattr(evaluate, "probe_latents", lambda *_: {"linear probe": 1.0})
    for rank in range(2):
        read = evaluate.Reader(runtime.Runtime(torch.device("cpu"), rank, 2), 8, 0, 16)
        row = evaluate.score_tokenizer(
            "checkpoint.pt", None, None, "auto", 0, [], None, 5, False, read)
        assert ("linear probe" in row["metrics"]) == (rank == 0)


def test_recognised_in_closed_form(painted, capsys):
    """Three of eight samples show their label; real images always do.

    The exact tokenizer turns v into 0.2 v + 102, which no class has.
    """
    shown, asked = np.arange(8), np.array([0, 1, 2, 0, 0, 0, 0, 0])
    pixels = np.full((8, 32, 32, 3), 128, dtype=np.uint8)
    pixels[:, :, 0] = shown[:, None, None]
    for name, arrays in (("labelled.npz", dict(arr_1=asked)), ("silent.npz", {})):
        np.savez(name, arr_0=pixels, **arrays)
        Path(name).with_suffix(".json").write_text('{"data": "shapes", "size": 32}')
    flags = "--samples", "labelled.npz", "--tokenizer", "checkpoint.pt", "--limit", 50
    decoded, row = (row["metrics"] for row in run(*flags))
    assert (decoded["recognised"], decoded["recognised of real images"]) == (0, 1)
    assert (row["recognised"], row["recognised of real images"]) == (0.375, 1)
    table = capsys.readouterr().out
    assert [line.split() for line in table.splitlines() if "recognised" in line][-1] == [
        "recognised", "0.375", "1", "higher", "↑"]
    row, = run("--samples", "silent.npz", "--limit", 50)
    assert "recognised" not in row["metrics"]
    # Of 8 images, 5 are spread evenly: 0, 1, 3, 4 and 6, of which 0 and 1 show it.
    row, = run("--samples", "labelled.npz", "--limit", 5)
    assert row["metrics"]["recognised"] == pytest.approx(0.4)
    # Labels of other images than shapes mean something else to the judge.
    Path("labelled.json").write_text('{"data": "a folder", "size": 32}')
    row, = run("--samples", "labelled.npz", "--limit", 50)
    assert "recognised" not in row["metrics"]


# ------------------------------------------------------------------------------
# Samples, references, and real images.


def test_real_images_are_as_many_as_samples(monkeypatch):
    """And what stands beside the samples is what real images get in their place."""
    samples("s.npz", 24)
    Path("s.json").write_text(json.dumps({"data": "shapes", "data_seed": 3}))
    row, = run("--samples", "s.npz", "--limit", 100)
    assert row["protocol"]["reference_images"] == 100
    assert row["protocol"]["held_out_images"] == row["protocol"]["images"] == 24
    held_out = data.open_dataset("shapes", 32, "val", 3)
    real = [part["x"] for part in data.once(held_out, 24, limit=24)]
    pixels = data.to_uint8(real[0]).permute(0, 2, 3, 1).numpy()
    np.savez("real.npz", arr_0=pixels)
    Path("real.json").write_text(Path("s.json").read_text())
    other, = run("--samples", "real.npz", "--limit", 100)
    floor = {k.removesuffix(" of real images"): v for k, v in row["metrics"].items()
             if k.endswith(" of real images")}
    assert {FD, "KD-tiny:patches", "recall-tiny:patches"} < {*floor}
    found = {k: v for k, v in other["metrics"].items() if k in floor}
    assert found == pytest.approx(floor, rel=1e-5)


def test_one_held_out_image_gives_no_floor():
    folder("set/train/a", samples("a.npz", 6))
    folder("set/val/a", samples("b.npz", 1))
    row, = run("--samples", "a.npz", "--reference", "set")
    assert row["protocol"]["held_out_images"] == 1
    assert FD in row["metrics"] and not any("real images" in name for name in row["metrics"])


def test_the_settings_of_the_sampler_stand_beside_the_scores():
    samples("s.npz", 24)
    Path("s.json").write_text(json.dumps(
        {"data": "shapes", "data_seed": 3, "steps": 25, "labels": "random", "out": "x"}))
    row, = run("--samples", "s.npz", "--limit", 30)
    assert row["protocol"]["sampling"] == {"steps": 25, "labels": "random"}
    assert row["protocol"]["reference_sha256"]


def test_tokenizers_with_different_metrics_are_drawn_together(painted, monkeypatch):
    """The judge speaks of the first alone, and results are there before the figure."""
    rows = [{"of": f"{name}/t.pt", "curve": [
        {"noise": kind, "level": level, "PSNR": 20.0, **more}
        for kind, level in (("none", 0), ("absolute", 0.1), ("relative", 0.1))]}
        for name, more in (("a", {"recognised": 0.5}), ("b", {}))]
    evaluate.plot(rows[::-1], Path("curve.png"))
    assert Path("curve.png").stat().st_size > 1000
    monkeypatch.setattr(evaluate, "plot", lambda *given: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        run("--tokenizer", "checkpoint.pt", "--limit", 8)
    assert Path("runs/evaluation/results.json").stat().st_size > 100


def test_equal_sets_and_folders():
    """A folder of loose images, one with train/ and val/, and an .npz are alike."""
    pixels = samples("a.npz", 12)
    folder("loose", pixels)
    folder("set/train", pixels)
    folder("set/val", pixels)
    left = Path("runs/evaluation/cache/.123-unfinished-features.pt")   # by a killed process
    left.parent.mkdir(parents=True)
    left.touch()
    same, = run("--samples", "loose", "--reference", "set")
    for name in (FD, f"{FD} of real images"):
        assert same["metrics"][name] == pytest.approx(0, abs=1e-6)
    assert same["metrics"]["precision-tiny:patches"] == 1
    assert not left.exists()
    samples("b.npz", 14, seed=1)
    rows = [run("--samples", "b.npz", "--reference", name)[0]["metrics"]
            for name in ("a.npz", "set")]
    assert rows[0][FD] > 1e-3
    assert rows[0] == pytest.approx({k: rows[1][k] for k in rows[0]}, rel=1e-6)


def test_a_reference_file_has_the_statistics_of_its_images():
    folder("set", samples("a.npz", 14))
    samples("b.npz", 12, seed=1)
    evaluate.main(["--write-reference", "files/a.npz", "--data", "set", *TINY])
    found, = run("--samples", "b.npz", "--reference", "files/a.npz")
    expected, = run("--samples", "b.npz", "--reference", "set")
    assert found["metrics"] == {FD: pytest.approx(expected["metrics"][FD])}
    assert os.listdir("files") == ["a.npz"]


def test_files_of_adm():
    """mu and sigma hold for the Inception, which names no features; arr_0 for others."""
    pixels = samples("adm.npz", 14, mu=np.zeros(3, np.float32), sigma=np.eye(3))
    read = evaluate.Reader(runtime.Runtime(torch.device("cpu")), 8, 0, None)

    def network(x):
        return x.float().mean((2, 3)),

    named, other = (frozen.Features(name, "", network) for name in ("", "other"))
    found = evaluate.read_reference("adm.npz", 32, named, read)
    (_, mean, cov), = found["gaussians"]
    assert mean.tolist() == [0, 0, 0] and torch.equal(cov, torch.eye(3).double())
    means = pixels.double().mean((1, 2))
    torch.testing.assert_close(found["rows"].double(), means)
    (_, mean, cov), = evaluate.read_reference("adm.npz", 32, other, read)["gaussians"]
    np.testing.assert_allclose(mean, means.mean(0), rtol=1e-6)
    np.testing.assert_allclose(cov, np.cov(means.T), rtol=1e-5)


def test_references_are_remembered(monkeypatch):
    """Until any of their files changes, wherever it is among them."""
    folder("set", samples("a.npz", 40))
    images, seen = data.open_images("set"), []
    read = evaluate.Reader(runtime.Runtime(torch.device("cpu")), 8, 0, None)

    def network(x):
        seen.append(len(x))
        return x.float().mean((2, 3)),

    def rows(name="counted", **options):
        net = frozen.Features(name, "", network)
        return evaluate.cached(data.open_images("set"), net, read, Path("cache"))["rows"]

    first, second = rows(), rows()
    assert sum(seen) == 40 and torch.equal(first, second)
    Image.new("RGB", (32, 32)).save("set/037.png")
    assert rows()[37].tolist() == [0, 0, 0] and sum(seen) == 80
    rows("others"), rows("own:function"), rows("own:function")
    assert sum(seen) == 200
    monkeypatch.setattr(evaluate, "ROWS", 10)
    few = evaluate.extract(images, frozen.Features("", "", network), read, 40, few=True)
    assert torch.equal(few["rows"], rows()[::4]) and few["gaussians"][0][0] == 40


def test_a_damaged_memory_of_a_reference_is_made_again():
    folder("set", samples("a.npz", 6))
    net = frozen.Features("means", "", lambda x: (x.float().mean((2, 3)),))
    read = evaluate.Reader(runtime.Runtime(torch.device("cpu")), 8, 0, None)

    def rows():
        return evaluate.cached(data.open_images("set"), net, read, Path("cache"))["rows"]

    first, (file,) = rows(), Path("cache").iterdir()
    whole = file.read_bytes()
    for damaged in (b"", b"text", whole[:-100]):
        file.write_bytes(damaged)
        assert torch.equal(rows(), first)
    for foreign in ({"rows": torch.zeros(6, 3)}, first):
        checkpoints.save(foreign, file)
        assert torch.equal(rows(), first)
    checkpoints.save(checkpoints.read(file) | {"rows": first + 1}, file)
    assert torch.equal(rows(), first + 1)   # it is read, if it is whole


# ------------------------------------------------------------------------------
# The whole stage.


def test_two_processes_give_the_numbers_of_one():
    """9 samples, 15 images: nothing divides by two processes and batches of two."""
    tokenizer("runs/tokenizer/checkpoint.pt", **TRAINED)
    samples("runs/samples/samples.npz", 9, 16)
    Path("runs/samples/samples.json").write_text('{"data": "shapes"}')
    flags = [*TINY, "--limit", "15", "--batch", "2"]
    env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": f"{ROOT}:{Path.cwd()}"}
    subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone",
         "--nproc_per_node", "2", str(ROOT / "evaluate.py"), *flags, "--out", "two"],
        env=env, check=True, capture_output=True, timeout=300)
    two, one = json.loads(Path("two/results.json").read_text()), run(*flags, features=())
    assert [row["evaluation"] for row in one] == ["reconstruction", "generation"]
    for a, b in zip(one, two):
        assert (a["processes"], b["processes"]) == (1, 2)
        assert a["protocol"] == b["protocol"]
        for p, q in zip([a["metrics"], *a.get("curve", [])],
                        [b["metrics"], *b.get("curve", [])]):
            assert p.pop("noise", 0) == q.pop("noise", 0)
            # Another batch may round a decoded value to the next grey level.
            assert p == pytest.approx(q, rel=2e-3 if "PSNR" in p else 1e-5)


def test_smoke_scores_what_the_other_smoke_runs_left(capsys):
    """With the judge; five samples are too few for KID and precision."""
    tokenizer("runs/smoke/tokenizer/checkpoint.pt", **TRAINED)
    samples("runs/smoke/samples/samples.npz", 5, arr_1=np.arange(5))
    Path("runs/smoke/samples/samples.json").write_text('{"data": "shapes"}')
    evaluate.main(["--smoke"])
    rows = json.loads(Path("runs/smoke/evaluation/results.json").read_text())
    assert {*rows[0]["metrics"]} == {
        "PSNR", "SSIM", "recognised", "rFD-Shapes", "recognised of real images"}
    assert {"FD-Shapes", "FD-Shapes of real images", "recognised"} < {*rows[1]["metrics"]}
    for key in ("features", "weights_sha256", "preprocessing", "images", "size"):
        assert all(row["protocol"][key] for row in rows), key
    assert "FID" not in capsys.readouterr().out


def test_a_published_tokenizer_needs_data_and_size(capsys):
    tokenizer("published.pt")
    with pytest.raises(SystemExit):
        run("--tokenizer", "published.pt")
    assert "give --data and --size" in capsys.readouterr().err
    flags = "--data", "shapes", "--size", 16, "--limit", 4
    row, = run("--tokenizer", "published.pt", *flags)
    assert {point["noise"] for point in row["curve"]} == {"none", "absolute", "relative"}


def test_pictures_in_pictures_and_latents_out():
    """Equal to the tokenizer's own; the ends of an interpolation are images."""
    tokenizer("t.pt", **TRAINED)
    folder("set/train/b", samples("a.npz", 3, 16))
    folder("set/train/a", samples("a.npz", 2, 16, seed=1))
    os.rename("set/train/b/002.png", "set/train/b/c.jpg")   # Pillow looks inside
    flags = "--tokenizer", "t.pt", "--data", "set", "--write-images"
    evaluate.main([*flags, "out", *TINY])
    net, _ = checkpoints.load_tokenizer("t.pt")
    images = data.open_dataset("set", 16, "train")
    x = torch.stack([image for image, _ in images])
    with torch.no_grad():
        mean, logvar = net.posterior(data.from_uint8(x))
        x_hat = net.decode(mean)
    names = ["a/000.png", "a/001.png", "b/000.png", "b/001.png", "b/c.png"]
    files = sorted(str(path.relative_to("out/reconstructions"))
                   for path in Path("out/reconstructions").rglob("*.png"))
    with np.load("out/latents.npz") as file:
        assert file["names"].tolist() == names == files
        np.testing.assert_allclose(file["mean"], mean, atol=1e-5)
        np.testing.assert_allclose(file["std"], (0.5 * logvar).exp(), rtol=1e-4)
    for name, expected in zip(names, data.to_uint8(x_hat)):
        found = np.asarray(Image.open(f"out/reconstructions/{name}")).astype(int)
        assert np.abs(found - expected.permute(1, 2, 0).numpy()).max() <= 1
    strip = np.asarray(Image.open("out/interpolations.png")).astype(int)   # 2 between tiles
    assert strip.shape == (4 * 18 + 2, 8 * 18 + 2, 3)
    for row, column, index in ((0, 0, 0), (0, 7, 1), (3, 0, 3), (3, 7, 4)):
        tile = strip[2 + 18 * row:, 2 + 18 * column:][:16, :16]
        assert np.abs(tile - data.to_uint8(x_hat)[index].permute(1, 2, 0).numpy()).max() <= 1
    middle = net.decode(mean[:1] + (mean[1:2] - mean[:1]) * 3 / 7).detach()
    middle = data.to_uint8(middle)[0].permute(1, 2, 0).numpy()
    assert np.abs(strip[2:18, 2 + 54:][:, :16] - middle).max() <= 1
    assert sorted(os.listdir("out")) == [
        "interpolations.png", "latents.npz", "latents.png", "reconstructions"]
    shown = np.asarray(Image.open("out/latents.png")).astype(int)[2:18, 2:18]
    colours = metrics.principal_colours(mean)[0].permute(1, 2, 0).numpy()
    large = colours.repeat(net.stride, 0).repeat(net.stride, 1)
    assert np.abs(shown - 127.5 * (large + 1)).max() <= 2

    folder("alone", x[:1].permute(0, 2, 3, 1))
    Image.open("alone/000.png").save("alone/000.jpg")   # the same name but for its end
    evaluate.main([*flags[:3], "alone", "--write-images", "other", "--size", "16", *TINY])
    assert sorted(os.listdir("other/reconstructions")) == ["000.jpg.png", "000.png.png"]
    evaluate.main([*flags[:3], "shapes", "--write-images", "one", "--limit", "1", *TINY])
    assert sorted(os.listdir("one")) == ["latents.npz", "latents.png", "reconstructions"]
