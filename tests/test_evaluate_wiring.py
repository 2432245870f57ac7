"""What evaluate.main compares with what: every number of results.json beside one that
is worked out here, from the same features.  The features are cheap, the sets small.
"""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn

import checkpoints
import data
import evaluate
import frozen
import metrics
import runtime
from test_train_dit import make_tokenizer

SIZE = 16


def corners(pixels):
    """The mean colours of four quarters: [B, 3, H, W] -> [B, 12]."""
    return F.avg_pool2d(pixels / 255, pixels.shape[3] // 2).flatten(1)


def stripes(pixels):
    """The mean colours of four horizontal stripes."""
    return F.adaptive_avg_pool2d(pixels / 255, (4, 1)).flatten(1)


def head(rows):
    """A classifier that is sure of something, and wrong about most images."""
    draw = torch.Generator().manual_seed(1)
    return (rows - 0.5) @ (60 * torch.randn(12, 10, generator=draw))


class Lpips(nn.Module):
    """In place of LPIPS, with its shape."""

    def forward(self, x_hat, x):
        return (x_hat - x).abs().mean((1, 2, 3), keepdim=True)


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    torch.set_num_threads(1)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(evaluate, "plot", lambda *given: None)
    monkeypatch.setattr(frozen, "load_lpips", Lpips)
    monkeypatch.setattr(frozen, "find_weights", lambda choice: Path(choice))


def use(monkeypatch, name: str) -> None:
    """Features that are taken for the FID Inception (""), which has two kinds of rows and
    logits, or for the judge of shapes ("Shapes"); others are named by --features."""
    if name in ("", "Shapes"):
        second = (stripes,) if name == "" else ()
        monkeypatch.setattr(frozen, "load_features", lambda *given: frozen.Features(
            name, "", lambda pixels: (corners(pixels), *(f(pixels) for f in second)), head=head))


def run(*flags) -> list[dict]:
    """The rows of results.json."""
    evaluate.main(["--features", f"{__name__}:corners", "--workers", "0", "--device", "cpu",
                   "--out", "found", *flags])
    return json.loads(Path("there" if "there" in flags else "found", "results.json").read_text())


def shapes(split: str, count: int, seed: int = 3, size: int = SIZE):
    """`count` images, spread evenly over the set, and their labels."""
    images = data.Shapes(size, split, seed)
    spread = np.arange(count) * len(images) // count
    return images.render_batch(spread)[:2]


def noise(count: int, seed: int = 0) -> torch.Tensor:
    """Images of random colours: [count, 3, H, W]."""
    draw = torch.Generator().manual_seed(seed)
    coarse = torch.randint(0, 256, (count, 3, 4, 4), generator=draw, dtype=torch.uint8)
    return coarse.repeat_interleave(4, 2).repeat_interleave(4, 3)


def save_folder(folder: str, pixels: torch.Tensor) -> torch.Tensor:
    Path(folder).mkdir(parents=True)
    for i, image in enumerate(pixels.permute(0, 2, 3, 1).numpy()):
        Image.fromarray(image).save(f"{folder}/{i:03}.png")
    return pixels


# ------------------------------------------------------------------------------
# Samples.  Beside each number stands that of real images that were held out.


def frechet(real, fake) -> float:
    """|m - n|^2 + Tr A + Tr B - 2 Tr (A B)^(1/2), by the eigenvalues of A B."""
    real, fake = real.double().numpy(), fake.double().numpy()
    A, B = np.cov(real.T), np.cov(fake.T)
    roots = np.sqrt(np.linalg.eigvals(A @ B).real.clip(0)).sum()
    return ((real.mean(0) - fake.mean(0)) ** 2).sum() + np.trace(A + B) - 2 * roots


def plain_scores(name, fake, labels, real, few=1, net=corners) -> dict:
    """few: only every few-th real image for what is not a Frechet distance."""
    end = f"-{name}" if name else ""
    rows, real_rows = net(fake), net(real)[::few]
    scores = {("FD" if name else "FID") + end: frechet(net(real), net(fake))}
    if name == "":
        scores["sFID"] = frechet(stripes(real), stripes(fake))
        p = head(rows).double().softmax(1)
        scores["IS"] = (p * (p.log() - p.mean(0).log())).sum(1).mean().exp().item()
    scores[("KD" if name else "KID") + end] = metrics.kernel_distance(real_rows, rows)
    for key, value in metrics.manifold_metrics(real_rows, rows).items():
        scores[key + end] = value
    if name == "Shapes":
        scores["recognised"] = share_recognised(fake, labels)
    return scores


def share_recognised(pixels, labels) -> float:
    """Of the images, the share whose label has a probability of at least 0.9."""
    p = head(corners(pixels)).softmax(1)
    share = sum(p[i, label].item() >= 0.9 for i, label in enumerate(labels)) / len(labels)
    assert 0 < share < 1
    return share


def with_floor(scores: dict, floor: dict) -> dict:
    return scores | {f"{name} of real images": value for name, value in floor.items()}


@pytest.mark.parametrize("rows, few", [(10_000, 1), (10, 4)])
@pytest.mark.parametrize("name", ["", "Shapes", f"{__name__}:corners"])
def test_scores_of_samples_are_those_worked_out(monkeypatch, name, rows, few):
    """24 samples, 40 training images, and 24 that were held out.  A reference keeps
    about ROWS of its rows, and the Gaussian of all of them."""
    use(monkeypatch, name)
    monkeypatch.setattr(evaluate, "ROWS", rows)
    fake, labels = noise(24), torch.arange(24) % 10
    np.savez("s.npz", arr_0=fake.permute(0, 2, 3, 1).numpy(), arr_1=labels.numpy())
    Path("s.json").write_text('{"data": "shapes", "data_seed": 3}')
    row, = run("--samples", "s.npz", "--limit", "40")
    (train, _), (held, shown) = shapes("train", 40), shapes("val", 24)
    expected = with_floor(plain_scores(name, fake, labels, train, few),
                          plain_scores(name, held, shown, train, few))
    assert row["metrics"] == pytest.approx(expected, rel=1e-4)
    assert row["protocol"]["reference_images"] == 40 and row["protocol"]["held_out_images"] == 24


SAMPLES = {   # flags, and which images are compared with which
    "--limit 15": dict(count=15, spread=15),
    "--at-once 7": {},
    "--workers 1": {},
    "--seed 9": {},
    "--size 16": {},
    "--out there": {},
    f"--features {__name__}:stripes": dict(net=stripes),
    "--reference shapes": {},
    "--reference other.npz": dict(real="other", held=None),
    "--reference other.npz --data shapes": dict(real="other"),
    "--reference other.npz --data split": dict(real="other", held="val"),
    "--reference split": dict(real="train", held="val"),
    "--reference split --data shapes": dict(real="train"),
    "--reference flat": dict(real="flat", held=None),
    "--data split": dict(held="val"),
}


@pytest.mark.parametrize("flags", SAMPLES)
def test_flags_choose_what_samples_are_compared_with(flags):
    fake = noise(24)
    np.savez("s.npz", arr_0=fake.permute(0, 2, 3, 1).numpy())
    Path("s.json").write_text('{"data": "shapes", "data_seed": 3}')
    sets = {"train": save_folder("split/train", noise(30, 1)),
            "val": save_folder("split/val", noise(24, 2)),
            "flat": save_folder("flat", noise(28, 3)), "other": noise(26, 4)}
    np.savez("other.npz", arr_0=sets["other"].permute(0, 2, 3, 1).numpy())

    def worked_out(count=24, spread=40, real="shapes", held="shapes", net=corners):
        name = f"{__name__}:{net.__name__}"
        real = sets[real] if real in sets else shapes("train", spread)[0]
        some = fake[np.arange(count) * 24 // count]
        scores = plain_scores(name, some, None, real, net=net)
        if held is None:
            return scores
        held = sets[held] if held in sets else shapes("val", count)[0]
        return with_floor(scores, plain_scores(name, held, None, real, net=net))

    expected = worked_out(**SAMPLES[flags])
    row, = run("--samples", "s.npz", "--limit", "40", *flags.split())
    assert row["metrics"] == pytest.approx(expected, rel=1e-4)
    assert (expected != pytest.approx(worked_out(), rel=1e-2)) == bool(SAMPLES[flags])


def test_samples_need_no_file():
    """A folder is compared with --reference, and shows no labels.  A crop has --size pixels."""
    fake, real = noise(20), noise(24, 1)
    save_folder("fake", fake)
    save_folder("real/train", real)
    name = f"{__name__}:corners"
    row, = run("--samples", "fake", "--reference", "real")
    assert row["metrics"] == pytest.approx(plain_scores(name, fake, None, real), rel=1e-4)
    # The middle of an image of 16 pixels, made 8 pixels wide, as in data.adm_crop.
    small, = run("--samples", "fake", "--reference", "real", "--size", "8")
    halves = [F.avg_pool2d(a.float(), 2).round().to(torch.uint8) for a in (fake, real)]
    expected = plain_scores(name, halves[0], None, halves[1])
    assert small["protocol"]["size"] == 8
    assert small["metrics"][f"FD-{name}"] == pytest.approx(expected[f"FD-{name}"], rel=1e-2)


def test_a_reference_is_written_of_training_images():
    """mu and sigma of their features, and the name of these, which are used again."""
    run_flags = ["--features", f"{__name__}:stripes", "--limit", "40"]
    evaluate.main(["--write-reference", "r.npz", "--data", "shapes", "--size", "16", "--workers",
                   "0", "--device", "cpu", *run_flags])
    rows = stripes(shapes("train", 40, seed=0)[0]).double().numpy()
    with np.load("r.npz") as file:
        assert {*file.files} == {"mu", "sigma", "features"}
        assert str(file["features"]) == f"{__name__}:stripes"
        np.testing.assert_allclose(file["mu"], rows.mean(0), rtol=1e-5)
        np.testing.assert_allclose(file["sigma"], np.cov(rows.T), rtol=1e-4, atol=1e-8)
    fake = noise(24)
    np.savez("s.npz", arr_0=fake.permute(0, 2, 3, 1).numpy())
    row, = run("--samples", "s.npz", "--reference", "r.npz", *run_flags)
    assert row["metrics"] == {f"FD-{__name__}:stripes": pytest.approx(
        frechet(torch.tensor(rows), stripes(fake)), rel=1e-4)}


def test_files_of_adm_have_statistics_of_more_images_than_they_hold(monkeypatch):
    """mu and sigma are for FID, mu_s and sigma_s for sFID, and arr_0 is for the rest."""
    use(monkeypatch, "")
    fake, kept, lost = noise(24), noise(26, 1), noise(40, 2)
    np.savez("s.npz", arr_0=fake.permute(0, 2, 3, 1).numpy())
    arrays = {name + end: f(net(lost).double().numpy().T) for net, end in (
        (corners, ""), (stripes, "_s")) for name, f in (
        ("mu", lambda rows: rows.mean(1)), ("sigma", np.cov))}
    np.savez("adm.npz", arr_0=kept.permute(0, 2, 3, 1).numpy(), **arrays)
    expected = plain_scores("", fake, None, kept) | {
        "FID": frechet(corners(lost), corners(fake)), "sFID": frechet(stripes(lost), stripes(fake))}
    row, = run("--samples", "s.npz", "--reference", "adm.npz")
    assert row["metrics"] == pytest.approx(expected, rel=1e-4)


# ------------------------------------------------------------------------------
# Tokenizers: reconstructions from the posterior's mean, and with noise on it.


@torch.no_grad()
def plain_curve(name, path, x, y, index, seed=0) -> list[dict]:
    """A point for each kind and level of noise, beside the metrics of real images."""
    tokenizer, file = checkpoints.load_tokenizer(path)
    mean, _ = tokenizer.posterior(x / 127.5 - 1)
    eps = torch.stack([torch.randn(mean.shape[1:], generator=runtime.generator(
        seed, "evaluate", int(i))) for i in index])
    spread, label = file["latent_std"].view(-1, 1, 1), f"rFD-{name}" if name else "rFID"
    levels = [("none", 0.0, 0.0), *(("absolute", a, a) for a in (0.1, 0.2, 0.5, 1.0)),
              *(("relative", a, a * spread) for a in (0.1, 0.2, 0.5, 1.0))]
    curve = []
    for kind, level, std in levels:
        x_hat = ((tokenizer.decode(mean + std * eps) + 1) * 127.5).round().clamp(0, 255)
        mse = ((x_hat - x) / 255).double().square().mean((1, 2, 3))
        x_hat = x_hat.to(torch.uint8)
        point = {"noise": kind, "level": level, "PSNR": (-10 * mse.log10()).mean().item(),
                 "SSIM": metrics.ssim(x_hat, x).mean().item(),
                 "LPIPS": ((x_hat - x.float()) / 127.5).abs().mean().item()}
        if name == "Shapes":
            point["recognised"] = share_recognised(x_hat, y)
        curve.append(point | {label: frechet(corners(x), corners(x_hat))})
    return curve


def close(point: dict, known: dict, tolerance: float) -> bool:
    return point["noise"] == known["noise"] and [*point.values()][1:] == pytest.approx(
        [*known.values()][1:], rel=tolerance, abs=1e-5)


@pytest.fixture
def tokenizers() -> list[str]:
    """Two of them; the latents of the second deviate less."""
    for seed, path in enumerate(("a.pt", "b.pt")):
        file = checkpoints.read(make_tokenizer(Path(path), noise=("learned", "none")[seed]))
        file["config"] = dict(data="shapes", size=SIZE, seed=3)
        file["latent_std"] = torch.tensor([0.5, 1.0, 1.5, 2.0]) / (1 + seed)
        file["model"]["decoder.conv_out.weight"] *= 8
        checkpoints.save(file, path)
    return ["a.pt", "b.pt"]


@pytest.mark.parametrize("name", ["", "Shapes", f"{__name__}:corners"])
def test_scores_of_tokenizers_are_those_worked_out(monkeypatch, tokenizers, name):
    use(monkeypatch, name)
    x, y = shapes("val", 30)
    rows = run("--tokenizer", *tokenizers, "--limit", "30")
    for row, path in zip(rows, tokenizers, strict=True):
        expected = plain_curve(name, path, x, y, np.arange(30) * 2000 // 30)
        for point, known in zip(row["curve"], expected, strict=True):
            assert [*point] == [*known] and close(point, known, 1e-3)
        scores = {k: v for k, v in expected[0].items() if k not in ("noise", "level")}
        if name == "Shapes":
            scores["recognised of real images"] = share_recognised(x, y)
        assert row["of"] == path and row["metrics"] == pytest.approx(scores, rel=1e-3)
    assert not close(rows[0]["curve"][5], rows[1]["curve"][5], 1e-2)


def test_scores_as_those_of_vavae(tokenizers):
    """One draw of the posterior, and the SSIM of values in [-1, 1]."""
    (x, _), index = shapes("val", 20), np.arange(20) * 2000 // 20
    mean_row, = run("--tokenizer", "a.pt", "--limit", "20", "--noise")
    row, = run("--tokenizer", "a.pt", "--limit", "20", "--noise", "--as-vavae")
    with torch.no_grad():
        tokenizer, _ = checkpoints.load_tokenizer("a.pt")
        mean, logvar = tokenizer.posterior(x / 127.5 - 1)
        eps = torch.stack([torch.randn(mean.shape[1:], generator=runtime.generator(
            0, "posterior", int(i))) for i in index])
        x_hat = data.to_uint8(tokenizer.decode(mean + (logvar / 2).exp() * eps))
    assert row["metrics"]["PSNR"] == pytest.approx(metrics.psnr(x_hat, x).mean().item(), rel=1e-4)
    ssim = metrics.ssim(x_hat, x, low=-1).mean().item()
    assert row["metrics"]["SSIM"] == pytest.approx(ssim, rel=1e-3)
    assert row["metrics"]["PSNR"] < mean_row["metrics"]["PSNR"] - 0.1
    assert (mean_row["protocol"]["latent"], row["protocol"]["latent"]) == ("the mean", "a draw")


def test_the_spread_of_a_file_without_statistics(tokenizers):
    """It is that of the latents of the images themselves."""
    file = checkpoints.read("a.pt")
    del file["latent_std"]
    checkpoints.save(file, "bare.pt")
    x = shapes("val", 30)[0]
    with torch.no_grad():
        mean, _ = checkpoints.load_tokenizer("a.pt")[0].posterior(x / 127.5 - 1)
    file["latent_std"] = mean.transpose(0, 1).flatten(1).std(1)
    checkpoints.save(file, "known.pt")
    bare, known = run("--tokenizer", "bare.pt", "known.pt", "--limit", "30")
    assert len(bare["curve"]) == len(known["curve"]) == 9
    assert all(close(a, b, 1e-3) for a, b in zip(bare["curve"], known["curve"]))


TOKENIZERS = {   # flags, and of which images and noise the curve is
    "--at-once 7": {},
    "--workers 1": {},
    "--limit 20": dict(count=20),
    "--seed 9": dict(seed=9),
    "--size 24": dict(size=24),
    "--data split": dict(data="split"),
}


@pytest.mark.parametrize("flags", TOKENIZERS)
def test_flags_choose_images_and_noise(tokenizers, flags):
    """Batches of another size may round a pixel to the next grey level."""
    save_folder("split/train", noise(30, 1))
    val, name = save_folder("split/val", noise(26, 2)), f"{__name__}:corners"

    def worked_out(count=30, seed=0, size=SIZE, data="shapes"):
        if data == "split":
            return plain_curve(name, "a.pt", val, None, range(26), seed)
        index = np.arange(count) * 2000 // count
        return plain_curve(name, "a.pt", shapes("val", count, size=size)[0], None, index, seed)

    row, = run("--tokenizer", "a.pt", "--limit", "30", *flags.split())
    expected, usual = worked_out(**TOKENIZERS[flags]), worked_out()
    for point, known in zip(row["curve"], expected, strict=True):
        assert close(point, known, 1e-2)
    same = [close(usual[i], expected[i], 1e-2) for i in (0, -1)]
    assert same == [not TOKENIZERS[flags] or "seed" in flags, not TOKENIZERS[flags]]


def test_levels_of_noise_are_chosen(tokenizers):
    usual, = run("--tokenizer", "a.pt", "--limit", "30")
    few, = run("--tokenizer", "a.pt", "--limit", "30", "--noise", "0.2", "1")
    none, = run("--tokenizer", "a.pt", "--limit", "30", "--noise")
    assert few["curve"] == [usual["curve"][i] for i in (0, 2, 4, 6, 8)]
    assert none["curve"] == usual["curve"][:1] and none["metrics"] == usual["metrics"]


@torch.no_grad()
def test_a_diffusion_decoder_is_scored_with_the_chosen_steps():
    path = make_tokenizer(Path("dgae.pt"), arch="dgae", unet_ch=8, unet_mult=(1, 2),
                          unet_blocks=1)
    file = checkpoints.read(path)
    file["model"]["decoder.conv_out.weight"] += 0.1   # it starts at 0
    checkpoints.save(file, path)
    net, _ = checkpoints.load_tokenizer(path)
    index = np.arange(20) * 2000 // 20
    x = shapes("val", 20, seed=0)[0]
    noise = torch.stack([torch.randn(3, SIZE, SIZE, generator=runtime.generator(
        0, "decoder", int(i))) for i in index])
    condition = net.post_quant_conv(net.posterior(x / 127.5 - 1)[0])
    for steps in (1, 2):
        x_hat = noise
        for k in range(steps):
            x_hat = x_hat + net.decoder(x_hat, torch.full((20,), k / steps), condition) / steps
        error = (data.to_uint8(x_hat).double() - x).square().mean((1, 2, 3)) / 255**2
        row, = run("--tokenizer", "dgae.pt", "--limit", "20", "--size", str(SIZE),
                   "--decode-steps", str(steps))
        assert row["metrics"]["PSNR"] == pytest.approx((-10 * error.log10()).mean().item(), rel=1e-3)


@torch.no_grad()
def test_what_latents_say_about_the_class(tokenizers, capsys):
    """Fitted to 60 training images, and asked about the held-out ones."""
    net, _ = checkpoints.load_tokenizer("a.pt")
    found = {}
    for split, count in (("train", 60), ("val", 60)):
        x, y = shapes(split, count)
        found[split] = net.posterior(x / 127.5 - 1)[0], y
    row, = run("--tokenizer", "a.pt", "--limit", "30", "--probe", "60")
    said = [line for line in capsys.readouterr().out.splitlines() if ", flat" in line]
    assert len(said) == 2 and all(line.endswith("higher ↑") for line in said)
    for name, rows_of in (("flat", lambda z: z.flatten(1)), ("averaged", lambda z: z.mean((2, 3)))):
        given = [rows_of(a) if a.ndim == 4 else a for pair in found.values() for a in pair]
        assert row["metrics"][f"neighbours, {name}"] == pytest.approx(
            metrics.nearest_neighbours(*given), abs=0.02)
        with torch.enable_grad():
            assert row["metrics"][f"linear probe, {name}"] == pytest.approx(
                metrics.linear_probe(*given, batch=32), abs=0.02)


def test_every_flag_is_tested():
    args = vars(evaluate.parse(["--samples", "a folder"]))
    flags = {"--" + name.replace("_", "-") for name in args}
    tested = " ".join([*SAMPLES, *TOKENIZERS]).split() + [
        "--tokenizer", "--samples", "--write-reference", "--write-images", "--device", "--smoke",
        "--decode-steps", "--probe", "--noise", "--as-vavae"]
    assert flags <= {*tested}
