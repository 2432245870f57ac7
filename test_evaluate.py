"""evaluate.py end to end on a few images: a decoder with a closed form, two processes, and every kind of bad
input.
"""

import json
import math
import os
import subprocess
import sys
from argparse import Namespace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

import data
import evaluate
import losses
import metrics
import models
from runtime import InputError, Runtime, generator

ALONE = Runtime(torch.device("cpu"))
HERE = Path(__file__).parent


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    """Every test in a folder of its own, with no weights on this machine."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    monkeypatch.delenv("FID_INCEPTION_WEIGHTS", raising=False)


def run(*argv: object) -> list[dict]:
    evaluate.main([str(a) for a in argv])
    return json.loads(Path("runs/evaluation/results.json").read_text())


def samples(path: str, n: int, size: int = 32, seed: int = 0, labels: object = None) -> str:
    draw = generator(seed, "samples")
    pixels = torch.randint(0, 256, (n, size, size, 3), generator=draw, dtype=torch.uint8)
    more = {} if labels is None else {"arr_1": labels}
    np.savez(path, arr_0=pixels.numpy(), **more)
    return path


def tokenizer(path: str = "runs/tokenizer/checkpoint.pt", seed: int = 0) -> str:
    torch.manual_seed(seed)
    autoencoder = models.build_autoencoder(models.AUTOENCODERS["demo"] | {"ch": 32, "ch_mult": (1, 1, 1)})
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    torch.save({"kind": "tokenizer", "model_config": autoencoder.config, "model": autoencoder.state_dict(),
                "latent_mean": torch.zeros(8), "latent_std": torch.full((8,), 2.0), "step": 0,
                "config": {"data": "shapes", "size": 16, "seed": 0, "loss": "ve"}}, path)
    return path


def numbers(scores: dict) -> dict:
    return {k: v for k, v in scores.items() if isinstance(v, float)}


QUICK = ("--features", "random", "--workers", 0, "--device", "cpu")


# ------------------------------------------------------------------------------------------------------------
# The commands.


def test_smoke_runs_everything(capsys):
    evaluate.main(["--smoke"])
    rows = json.loads(Path("runs/smoke/evaluation/results.json").read_text())
    assert [row["evaluation"] for row in rows] == ["reconstruction", "generation"]
    assert Path("runs/smoke/evaluation/noise_curve.png").stat().st_size > 1000
    printed = capsys.readouterr().out
    assert "FD-RandConv held-out" in printed and "FID" not in printed.replace("FID Inception", "")
    for key in ("features", "images", "size", "data_sha256", "tokenizer_sha256", "ssim", "quantisation"):
        assert rows[0]["protocol"][key], key
    for key in ("images", "reference", "reference_sha256", "reference_images", "labels", "samples_sha256"):
        assert rows[1]["protocol"][key], key


def test_default_scores_what_is_there(capsys):
    with pytest.raises(SystemExit) as end:
        evaluate.main([])
    assert end.value.code == 2 and "nothing to score" in capsys.readouterr().err
    Path("mine").mkdir()
    samples("mine/samples.npz", 12, 16)
    Path("mine/samples.json").write_text(json.dumps({"data": "shapes", "size": 16}))
    row, = run(*QUICK, "--limit", 8, "--samples", "mine/samples.npz")
    assert "there is no runs/tokenizer/checkpoint.pt" in capsys.readouterr().out
    assert row["protocol"]["reference_images"] == row["protocol"]["held_out_images"] == 8
    distance, floor, ratio = (row["metrics"][f"FD-RandConv{x}"] for x in ("", " held-out", " / held-out"))
    assert ratio == pytest.approx(distance / floor) and floor > 0


def test_rows_are_collected():
    samples("a.npz", 12), samples("b.npz", 12, seed=1)
    for name in ("a.npz", "b.npz"):
        run("generation", "--samples", name, "--reference", "a.npz", *QUICK, "--append", "results/all.json")
    rows = json.loads(Path("results/all.json").read_text())
    assert [row["of"] for row in rows] == ["a.npz", "b.npz"]
    same, other = (row["metrics"] for row in rows)
    assert same["FD-RandConv"] == pytest.approx(0, abs=1e-6) and other["FD-RandConv"] > 1e-4
    assert same["precision-RandConv"] == same["recall-RandConv"] == same["coverage-RandConv"] == 1


def test_reference_file_stands_for_its_images(capsys):
    samples("a.npz", 14), samples("b.npz", 12, seed=1)
    evaluate.main(["reference", "--data", "a.npz", "--file", "files/a.npz", *map(str, QUICK)])
    first, second = (run("generation", "--samples", "b.npz", "--reference", name, *QUICK)[0]
                     for name in ("a.npz", "files/a.npz"))
    assert first["metrics"] == pytest.approx(second["metrics"])
    assert os.listdir("files") == ["a.npz"]
    capsys.readouterr()
    for path, text in (("files/a.npz", "a reference"), ("b.npz", "samples")):
        evaluate.main(["inspect", path])
        assert text in capsys.readouterr().out
    tokenizer()
    evaluate.main(["inspect", "runs/tokenizer/checkpoint.pt"])
    assert "latent_std" in capsys.readouterr().out


def test_folders_are_scored_as_files_are():
    """A folder of loose samples, a data set with class folders as reference and held-out images."""
    with np.load(samples("a.npz", 12)) as archive:
        pixels = archive["arr_0"]
    for i, image in enumerate(pixels):
        for folder in ("loose", f"set/train/{i % 2}", f"set/val/{i % 2}"):
            Path(folder).mkdir(parents=True, exist_ok=True)
            Image.fromarray(image).save(f"{folder}/{i:02}.png")
    folder, = run("generation", "--samples", "loose", "--reference", "set", "--validation", "set", *QUICK)
    array, = run("generation", "--samples", "a.npz", "--reference", "a.npz", *QUICK)
    same = {k: v for k, v in folder["metrics"].items() if "held-out" not in k}
    assert same == pytest.approx(array["metrics"], abs=1e-6)
    assert folder["metrics"]["FD-RandConv held-out"] == pytest.approx(0, abs=1e-6)


def test_label_mode_changes_the_protocol_only():
    samples("balanced.npz", 12, labels=np.arange(12) % 3)
    samples("random.npz", 12, labels=np.arange(12) // 7)
    samples("silent.npz", 12)
    rows = [run("generation", "--samples", f"{name}.npz", "--reference", "silent.npz", *QUICK)[0]
            for name in ("balanced", "random", "silent")]
    assert [row["protocol"]["labels"] for row in rows] == ["balanced", "random", "not stored"]
    assert rows[0]["metrics"] == rows[1]["metrics"] == rows[2]["metrics"]


def test_file_order_changes_nothing():
    samples("a.npz", 16), samples("b.npz", 15, seed=1)
    with np.load("b.npz") as archive:
        np.savez("c.npz", arr_0=archive["arr_0"][::-1])
    flags = ("--reference", "a.npz", *QUICK, "--batch", 4)
    first, second = (run("generation", "--samples", p, *flags)[0]["metrics"] for p in ("b.npz", "c.npz"))
    drawn = ("KD-RandConv", "KD-RandConv std")   # its subsets are by position
    assert {k: v for k, v in first.items() if k not in drawn} == pytest.approx(
        {k: v for k, v in second.items() if k not in drawn}, rel=1e-4)


# ------------------------------------------------------------------------------------------------------------
# A tokenizer that decodes exactly: z is the image itself, so that the noise is the error.


class Identity(torch.nn.Module):
    stride, channels = 1, 3

    def encode(self, x: Tensor) -> Tensor:
        return torch.cat([0.2 * x, torch.full_like(x, 2 * math.log(0.05))], 1)   # far from black and white

    def decode(self, z: Tensor) -> Tensor:
        return z


def identity(monkeypatch, images: Tensor, config: dict | None = None) -> None:
    class Grey(data.Shapes):
        def render_batch(self, indices):
            chosen = images[np.asarray(indices)]
            return chosen, torch.zeros(len(chosen), dtype=torch.long), chosen[:, 0]

        def __len__(self):
            return len(images)

    config = {"data": "shapes", "size": 32, "seed": 0, "loss": "ve"} | (config or {})
    checkpoint = {"config": config, "latent_std": torch.tensor([0.5, 1.0, 1.5])}
    monkeypatch.setattr(models, "load_autoencoder", lambda path: (Identity(), checkpoint))
    monkeypatch.setattr(data, "open_dataset", lambda *args: Grey(32, "val"))
    Path("checkpoint.pt").touch()


def noise_psnr(error: Tensor) -> float:
    """Values are rounded to 1 / 255 of a range of 2: an error of variance (2 / 255)^2 / 12 on top."""
    return -10 * math.log10((error.square().mean().item() + (2 / 255) ** 2 / 12) / 4)


def test_noise_curve_in_closed_form(monkeypatch):
    """On mid-grey images z = 0: the decoded image is the noise, and the MSE its variance."""
    identity(monkeypatch, torch.full((6, 3, 32, 32), 128, dtype=torch.uint8))
    row, = run("reconstruction", "--tokenizer", "checkpoint.pt", *QUICK, "--relative", 0.1,
               "--absolute", 0.1, 0.2)
    curve = row["curve"]
    assert [(p["noise"], p["level"]) for p in curve] == [
        ("none", 0), ("relative", 0.1), ("absolute", 0.1), ("absolute", 0.2)]
    assert row["metrics"] == {k: v for k, v in curve[0].items() if k not in ("noise", "level")}
    assert curve[0]["PSNR"] == pytest.approx(100, abs=55)
    relative = torch.tensor([0.05, 0.1, 0.15])            # 0.1 x latent_std
    for point, std in zip(curve[1:], (relative, torch.tensor([0.1]), torch.tensor([0.2]))):
        assert point["PSNR"] == pytest.approx(noise_psnr(std), abs=0.1)
    assert curve[2]["SSIM"] > curve[3]["SSIM"] and curve[2]["rFD-RandConv"] < curve[3]["rFD-RandConv"]


def test_posterior_sample_or_mean(monkeypatch):
    identity(monkeypatch, torch.full((6, 3, 32, 32), 128, dtype=torch.uint8))
    flags = ("--tokenizer", "checkpoint.pt", *QUICK, "--relative", "--absolute", "--batch", 4)
    mean, sample = (run("reconstruction", "--latent", latent, *flags)[0] for latent in ("mean", "sample"))
    assert sample["metrics"]["PSNR"] == pytest.approx(noise_psnr(torch.tensor([0.05])), abs=0.1)   # its sigma
    assert mean["metrics"]["PSNR"] > 45 and len(mean["curve"]) == 1
    identity(monkeypatch, torch.full((6, 3, 32, 32), 128, dtype=torch.uint8),
             {"loss": "sigma", "sigma": 0.3, "sigma_mode": "fixed"})
    sigma, = run("reconstruction", "--latent", "sample", *flags)
    assert sigma["metrics"]["PSNR"] == pytest.approx(noise_psnr(torch.tensor([0.3])), abs=0.1)


def test_several_tokenizers_share_a_plot():
    paths = [tokenizer("kl/checkpoint.pt"), tokenizer("ve/checkpoint.pt", 1)]
    rows = run("reconstruction", "--tokenizer", *paths, *QUICK, "--limit", 5, "--relative", 1, "--absolute")
    assert [row["of"] for row in rows] == paths
    assert Path("runs/evaluation/noise_curve.png").exists()


def test_scores_do_not_depend_on_the_batch():
    tokenizer()
    first, second = (run("reconstruction", *QUICK, "--limit", 7, "--batch", batch, "--latent", "sample")[0]
                     for batch in (2, 7))
    for a, b in zip(first["curve"], second["curve"]):
        assert numbers(a) == pytest.approx(numbers(b), rel=1e-4)


def test_lpips_is_a_mean_over_quantised_pairs(monkeypatch):
    lpips = pytest.importorskip("lpips")
    torch.manual_seed(0)
    net = lpips.LPIPS(net="squeeze", pnet_rand=True, verbose=False).eval()
    monkeypatch.setattr(losses, "load_lpips", lambda: net)
    for choice in ("auto", "off"):
        assert evaluate.load_lpips(choice, ALONE.device) is None
    ours, draw = evaluate.load_lpips("on", ALONE.device), generator(0, "pairs")
    x, x_hat = torch.randint(0, 256, (2, 3, 3, 32, 32), generator=draw, dtype=torch.uint8)
    with torch.no_grad():
        expected = [net(a[None] / 127.5 - 1, b[None] / 127.5 - 1).item() for a, b in zip(x_hat, x)]
        sums = evaluate.pair_sums(x_hat, x, ours, "reflect")
    torch.testing.assert_close(sums[3].item(), sum(expected), rtol=1e-5, atol=0)
    torch.testing.assert_close(sums[1].item(), metrics.psnr(x_hat, x).sum().item())
    assert sums[0] == 3


# ------------------------------------------------------------------------------------------------------------
# Two processes.


def test_two_processes_give_the_numbers_of_one():
    """15 samples, 9 and 7 images: nothing divides by 2, and ranks hold different numbers of batches."""
    tokenizer()
    Path("runs/samples").mkdir(parents=True)
    samples("runs/samples/samples.npz", 15, 16)
    Path("runs/samples/samples.json").write_text(json.dumps({"data": "shapes", "size": 16}))
    flags = [*map(str, QUICK), "--limit", "9", "--batch", "2"]
    env = dict(os.environ, OMP_NUM_THREADS="1", PYTHONPATH=str(HERE))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2",
               str(HERE / "evaluate.py"), *flags, "--out", "two"]
    subprocess.run(command, env=env, check=True, capture_output=True, timeout=300)
    two, one = json.loads(Path("two/results.json").read_text()), run(*flags)
    for a, b in zip(one, two):
        assert b["processes"] == 2 and a["processes"] == 1
        # Decoded images are rounded to 8 bits: another batch or number of threads may turn one level.
        tolerance = 1e-5 if a["evaluation"] == "generation" else 2e-3
        assert numbers(a["metrics"]) == pytest.approx(numbers(b["metrics"]), rel=tolerance)
        assert a["protocol"] == b["protocol"]
        for p, q in zip(a.get("curve", []), b.get("curve", [])):
            assert numbers(p) == pytest.approx(numbers(q), rel=tolerance)


# ------------------------------------------------------------------------------------------------------------
# Bad input: one line, status 2.


@pytest.mark.parametrize("argv, reason", [
    (["generation", "--samples", "none.npz", "--reference", "a.npz"], "none.npz: no such file"),
    (["generation", "--samples", "a.npz"], "give --reference"),
    (["generation", "--samples", "published.npz"], "give --reference: no published.json"),
    (["generation", "--samples", "a.npz", "--reference", "small.npz"], "16-pixel images, the samples"),
    (["generation", "--samples", "a.npz", "--reference", "cut.npz"], "cut.npz is truncated"),
    (["generation", "--samples", "a.npz", "--reference", "nan.npz"], "NaN"),
    (["generation", "--samples", "a.npz", "--reference", "wide.npz"], "of 65 features, RandConv has 64"),
    (["generation", "--samples", "a.npz", "--reference", "a.npz", "--features", "inception"], "sha256 67268"),
    (["generation", "--samples", "a.npz", "--reference", "a.npz", "--append", "cut.json"], "is no JSON list"),
    (["reconstruction", "--tokenizer", "none.pt"], "none.pt"),
    (["reconstruction", "--tokenizer", "a.npz"], "a.npz"),
    (["reconstruction", "--size", "18"], "multiple of 4"),
    (["reconstruction", "--data", "nowhere"], "nowhere"),
    (["reconstruction", "--lpips", "on"], "no VGG here"),
    (["reference", "--data", "nowhere"], "nowhere"),
    (["inspect", "none.npz"], "no such file")])
def test_bad_input(argv, reason, capsys, monkeypatch):
    def no_lpips() -> None:
        raise FileNotFoundError("no VGG here")

    monkeypatch.setattr(losses, "load_lpips", no_lpips)
    samples("a.npz", 6), samples("small.npz", 6, 16), tokenizer()
    Path("cut.npz").write_bytes(Path("a.npz").read_bytes()[:-100])
    Path("cut.json").write_text("[{")
    samples("published.npz", 6)
    Path("published.json").write_text('{"data": null}')
    np.savez("nan.npz", mu=np.full(64, np.nan), sigma=np.eye(64), features="RandConv")
    np.savez("wide.npz", mu=np.zeros(65), sigma=np.eye(65), features="RandConv")
    quick = [] if argv[0] == "inspect" else [str(a) for a in QUICK if a not in argv or a != "--features"]
    if "--features" in argv:
        quick.remove("random")
    with pytest.raises(SystemExit) as end:
        evaluate.main([argv[0], *quick, *argv[1:]])
    error = capsys.readouterr().err
    assert end.value.code == 2
    lines = [line for line in error.splitlines() if "error:" in line]
    assert len(lines) == 1 and reason in lines[0] and "Traceback" not in error


def test_few_images_warn(capsys):
    samples("a.npz", 10)
    run("generation", "--samples", "a.npz", "--reference", "a.npz", *QUICK)
    assert "10 images for 64 features" in capsys.readouterr().err


def test_statistics_alone_give_the_distance_alone():
    samples("a.npz", 10)
    np.savez("statistics.npz", mu=np.zeros(64), sigma=np.eye(64), features="RandConv")
    row, = run("generation", "--samples", "a.npz", "--reference", "statistics.npz", *QUICK)
    assert set(row["metrics"]) == {"FD-RandConv"}


def test_published_tokenizer_needs_data_and_size():
    checkpoint = torch.load(tokenizer(), weights_only=True)
    torch.save({k: checkpoint[k] for k in ("kind", "model_config", "model")}, "published.pt")
    args = Namespace(data=None, size=None, split="val", latent="mean")
    with pytest.raises(InputError, match="give --data and --size"):
        evaluate.open_tokenizer(Path("published.pt"), args)
    row, = run("reconstruction", "--tokenizer", "published.pt", "--data", "shapes", "--size", 16, *QUICK,
               "--limit", 4)
    assert {p["noise"] for p in row["curve"]} == {"none", "absolute"}
