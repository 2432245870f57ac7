"""Evaluation: every number beside the protocol that makes it comparable.

    python evaluate.py                                    # scores what the default runs left
    python evaluate.py reconstruction --tokenizer a/checkpoint.pt b/checkpoint.pt --data DIR --size 256
    python evaluate.py generation --samples SAMPLES.npz --reference VIRTUAL_imagenet256_labeled.npz
    python evaluate.py reference --data DIR --size 256    # statistics of a folder, in the layout of ADM's
    python evaluate.py inspect FILE                       # explains a sample file, a reference, a checkpoint
    python evaluate.py benchmark                          # speed, beside scipy and torch-fidelity
    torchrun --nproc_per_node 8 evaluate.py generation ...

The protocol is that of the ADM evaluator (Dhariwal and Nichol 2021), on which the paper's gFID, sFID, IS,
precision and recall rest; other features than its Inception give FD-<features>, never FID.  The decoder's
noise curve (PSNR, SSIM, LPIPS and rFID with noise added to the latent, as in Fig. 4 of the Geometric
Autoencoder) measures directly what Variance Expansion promises.
"""

import argparse
import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

import data
import features
import losses
import metrics
import models
import runtime
from features import Features, FeatureSet
from runtime import InputError, Runtime

# ------------------------------------------------------------------------------------------------------------
# Knobs.  They may stand before or after the sub-command.

DEFAULTS = dict(command=None, smoke=False, features="auto", inception_weights=None, append=None, limit=None,
                out=Path("runs/evaluation"), batch=64, workers=2, device="auto", seed=0, size=None,
                tokenizer=[Path("runs/tokenizer/checkpoint.pt")], data=None, split="val", latent="mean",
                ssim="reflect", lpips="auto", relative=[0.1, 0.2, 0.5, 1.0], absolute=[0.1, 0.2, 0.5, 1.0],
                samples="runs/samples/samples.npz", reference=None, validation=None, is_order="shuffled",
                file=None)
BARE_LIMIT = 5000   # without a sub-command: minutes on a CPU


def parse(argv: list[str] | None) -> argparse.Namespace:
    shared = argparse.ArgumentParser(add_help=False, argument_default=argparse.SUPPRESS)
    add = shared.add_argument
    add("--features", help="auto (default: the first there are weights for, and says so), inception, "
        "efficientnet-lite0, random, or module:function mapping uint8 [B, 3, H, W] to [B, d]")
    add("--inception-weights", type=Path, help="file of the FID Inception (default: in torch's hub folder)")
    add("--out", type=Path, help="folder of results and cache (default: runs/evaluation)")
    add("--append", type=Path, help="JSON file that collects the rows of many runs (default: none)")
    add("--limit", type=int, help="images of a data set, evenly spread (default: all; without COMMAND 5000)")
    add("--batch", type=int, help="images per process at a time (default: 64)")
    add("--workers", type=int, help="loader processes per process (default: 2)")
    add("--device", help="auto, cpu, cuda or mps (default: auto)")
    add("--seed", type=int, help="of posterior samples and of the noise added to latents (default: 0)")
    add("--size", type=int, help="pixels: images of folders are cropped as ADM does (default: as they are)")
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0], parents=[shared],
                                argument_default=argparse.SUPPRESS)
    p.add_argument("--smoke", action="store_true", help="all of it in seconds, on generated data, on the CPU")
    p.add_argument("--tokenizer", type=Path, nargs=1, help="one checkpoint (default: in runs/tokenizer)")
    p.add_argument("--samples", help=".npz of sample.py (default: runs/samples/samples.npz)")
    commands = p.add_subparsers(dest="command", metavar="COMMAND")

    def command(name: str, text: str) -> Callable[..., Any]:
        options = dict(parents=[shared], argument_default=argparse.SUPPRESS, help=text)
        return commands.add_parser(name, **options).add_argument

    add = command("reconstruction", "rFID, PSNR, SSIM, LPIPS of tokenizers, and their noise curves")
    add("--tokenizer", type=Path, nargs="+", help="checkpoints (default: runs/tokenizer/checkpoint.pt)")
    add("--data", help="shapes, cifar10 or a folder (default: what the tokenizer was trained on)")
    add("--split", choices=["train", "val"], help="part of the data set (default: val)")
    add("--latent", choices=["mean", "sample"], help="decode the posterior's mean or a draw (default: mean)")
    add("--ssim", choices=["reflect", "valid", "vavae"], help="convention of metrics.ssim (default: reflect)")
    add("--lpips", choices=["auto", "on", "off"], help="auto (default): if VGG's weights are there")
    add("--relative", type=float, nargs="*", help="noise, in stds of each channel (default: 0.1 0.2 0.5 1)")
    add("--absolute", type=float, nargs="*", help="noise, as standard deviation (default: 0.1 0.2 0.5 1)")
    add = command("generation", "FID, sFID, IS, KID, precision, recall, density, coverage of samples")
    add("--samples", help=".npz with arr_0, or a folder of images (default: runs/samples/samples.npz)")
    add("--reference", help=".npz of ADM, of `reference` or of samples; a folder, shapes or cifar10 "
        "(default: the training images that samples.json names)")
    add("--validation", help="held-out images: adds their own distance, and the ratio to it")
    add("--is-order", choices=["shuffled", "file"], help="chunks of IS; ADM: file (default: shuffled)")
    add = command("reference", "write a reference file from images")
    add("--data", required=True, help="shapes, cifar10 or a folder")
    add("--split", choices=["train", "val"], help="part of the data set (default: val)")
    add("--file", type=Path, help="what to write (default: reference.npz in --out)")
    command("inspect", "explain a file")("file", type=Path)
    command("benchmark", "time the Frechet distance and the feature pass")
    return p.parse_args(argv, argparse.Namespace(**DEFAULTS))


# ------------------------------------------------------------------------------------------------------------
# Reconstruction, and the decoder's noise curve: what the latent is decoded to with noise added, in units of
# each channel's spread and absolute.  All levels share one noise per image, so that a curve is smooth.


def open_tokenizer(path: Path, args: argparse.Namespace) -> tuple[models.Tokenizer, dict[str, Any], Any]:
    """The autoencoder, its checkpoint with all of "config" that is read here, the images to reconstruct."""
    with runtime.input_errors():
        autoencoder, checkpoint = models.load_autoencoder(path)
    config = dict(data=None, size=None, seed=0, loss="ve", sigma=0.0, sigma_mode="fixed")
    config |= checkpoint.get("config", {})
    source, size = args.data or config["data"], args.size or config["size"]
    if source is None or size is None:
        raise InputError(f"{path} does not say what it was trained on: give --data and --size")
    if size < 16 or size % autoencoder.stride:
        raise InputError(f"--size {size} must be a multiple of {autoencoder.stride}, and 16 or more for SSIM")
    if args.latent == "mean":
        config["loss"] = "none"
    images = data.open_dataset(source, size, args.split, config["seed"])
    return autoencoder, checkpoint | {"config": config}, images


def load_lpips(choice: str, device: torch.device) -> Callable[[Tensor, Tensor], Tensor] | None:
    """LPIPS of uint8 pairs, [B], or None; `auto` takes it where VGG's weights lie, and downloads nothing."""
    weights = Path(torch.hub.get_dir()) / "checkpoints" / "vgg16-397923af.pth"
    if choice == "off" or (choice == "auto" and not weights.is_file()):
        return None
    with runtime.input_errors():
        net = losses.load_lpips().to(device)
    return lambda x_hat, x: net(data.from_uint8(x_hat), data.from_uint8(x)).flatten()


def draw_noise(indices: Tensor, shape: tuple[int, ...], seed: int, device: torch.device) -> list[Tensor]:
    """eps and scale of the posterior, the curve's noise: functions of the image alone, not of its batch."""
    draws = [runtime.generator(seed, "evaluate", i) for i in indices.tolist()]
    return [torch.stack([torch.randn(s, generator=g) for g in draws]).to(device) for s in (shape, (), shape)]


@torch.no_grad()
def reconstruct(path: Path, args: argparse.Namespace, rt: Runtime) -> dict[str, Any]:
    autoencoder, checkpoint, images = open_tokenizer(path, args)
    autoencoder, config = autoencoder.to(rt.device), checkpoint["config"]
    net = features.load_features(args.features, images.size, rt.device, args.inception_weights)
    lpips = load_lpips(args.lpips, rt.device)
    relative = args.relative if "latent_std" in checkpoint else []   # published files do not say
    levels = [("none", 0.0), *(("relative", a) for a in relative), *(("absolute", a) for a in args.absolute)]
    spread = checkpoint.get("latent_std", torch.ones(1)).to(rt.device)[:, None, None]
    sums, moments = torch.zeros(len(levels), 4, dtype=torch.float64, device=metrics.wide(rt.device)), []
    for part in features.every_image(images, args.batch, args.workers, args.limit, rt):
        h = autoencoder.encode(part["x"])
        shape = (autoencoder.channels, *h.shape[2:])
        eps, scale, noise = draw_noise(part["index"], shape, args.seed, rt.device)
        z = losses.sample_posterior(h, eps, scale, config["loss"], config["sigma"], config["sigma_mode"])
        wanted = net(part["pixels"])[0]
        moments = moments or [metrics.Moments(wanted.shape[1], rt.device) for _ in range(len(levels) + 1)]
        moments[-1].add(wanted)
        for k, (kind, level) in enumerate(levels):
            std = level * spread if kind == "relative" else level
            x_hat = data.to_uint8(autoencoder.decode(z + std * noise))
            moments[k].add(net(x_hat)[0])
            sums[k] += pair_sums(x_hat, part["pixels"], lpips, args.ssim)
    *fakes, real = (m.fit(rt) for m in moments)
    warn_few(real.n, real, net)
    curve = []
    for (kind, level), (n, *row), fake in zip(levels, runtime.all_reduce_sum(sums).tolist(), fakes):
        point = {"noise": kind, "level": level} | {k: v / n for k, v in zip(("PSNR", "SSIM", "LPIPS"), row)}
        point |= {net.label("rFID"): metrics.frechet_distance(real, fake)}
        curve.append(point if lpips else point | {"LPIPS": None})
    protocol = {"features": net.name or "Inception", "preprocessing": net.preprocessing,
                "weights_sha256": net.weights, "images": real.n, "size": images.size,
                "data": f"{images.name} {images.split}", "data_sha256": features.fingerprint(images),
                "tokenizer_sha256": runtime.file_sha256(path), "latent": args.latent,
                "quantisation": "round to uint8", "ssim": args.ssim, "lpips": "vgg v0.1" if lpips else
                "n/a (off)" if args.lpips == "off" else "n/a (weights missing)"}
    scores = {k: v for k, v in curve[0].items() if k not in ("noise", "level")}
    result = {"evaluation": "reconstruction", "of": str(path), "metrics": scores}
    return result | {"protocol": protocol, "curve": curve}


def pair_sums(x_hat: Tensor, x: Tensor, lpips: Callable | None, convention: str) -> Tensor:
    """[4] float64: the number of pairs, and the sums of their PSNR, SSIM and LPIPS."""
    psnr, ssim = metrics.psnr(x_hat, x), metrics.ssim(x_hat, x, convention)
    distance = metrics.float64(lpips(x_hat, x)) if lpips else torch.zeros_like(psnr)
    return torch.stack([torch.ones_like(psnr), psnr, ssim, distance]).sum(1)


def warn_few(n: int, gaussian: metrics.Gaussian, net: Features) -> None:
    if n < len(gaussian.mean) and os.environ.get("RANK", "0") == "0":
        print(f"warning: {n} images for {len(gaussian.mean)} features: {net.label('FID')} is biased upwards "
              f"and comparable at equal counts only; {net.label('KID')} is not", file=sys.stderr)


# ------------------------------------------------------------------------------------------------------------
# Generation.  The Gaussians see all images; precision, recall and the like as many of the reference's as
# ADM's files hold.


def generate(args: argparse.Namespace, rt: Runtime) -> dict[str, Any]:
    """On rank 0 the scores; on the others nothing."""
    samples = features.open_images(args.samples, args.size)
    size, crop, seed = samples.size, args.size, 0
    reference, validation = args.reference, args.validation
    if reference is None:   # sample.py says what its model was trained on
        beside = Path(args.samples).with_suffix(".json")
        settings = json.loads(beside.read_text()) if beside.is_file() else {}
        if not settings.get("data"):   # samples of others, or from a published DiT
            raise InputError(f"give --reference: no {beside} says what was trained on")
        reference, seed, crop = settings["data"], settings.get("data_seed", 0), size
        same = data.open_dataset(reference, size, "val", seed).note   # nothing is held out
        validation = validation or (None if same else reference)
    images = features.open_reference(reference, size, crop, "train", seed)
    others = features.open_reference(validation, size, crop, "val", seed) if validation else None
    net = features.load_features(args.features, size, rt.device, args.inception_weights)
    cache, reading = args.out / "cache", (rt, args.batch, args.workers, args.limit)
    fake = features.extract(samples, net, *reading)
    real = features.reference_features(reference, images, net, cache, *reading)
    held = features.reference_features(validation, others, net, cache, *reading) if validation else None
    if not rt.is_main:
        return {}
    warn_few(fake.count, fake.gaussians[0], net)
    protocol = {"features": net.name or "Inception", "preprocessing": net.preprocessing,
                "weights_sha256": net.weights, "images": fake.count, "size": size,
                "labels": label_mode(args.samples), "samples_sha256": fake.sha256, "quantisation": "stored",
                "reference": reference, "reference_images": real.count or "not stored (ADM: training set)",
                "reference_rows": 0 if real.rows is None else len(real.rows), "reference_sha256": real.sha256,
                "held_out": validation, "held_out_images": held and held.count,
                "neighbours": "k = 3 for precision and recall, 5 for density and coverage",
                "is_order": None if net.head is None else args.is_order}
    scores = score(fake, real, held, net, args.is_order == "shuffled", rt.device)
    return {"evaluation": "generation", "of": args.samples, "metrics": scores, "protocol": protocol}


def score(fake: FeatureSet, real: FeatureSet, held: FeatureSet | None, net: Features, shuffle: bool,
          device: torch.device) -> dict[str, float]:
    for a, b in zip(fake.gaussians, real.gaussians):
        if len(a.mean) != len(b.mean):
            raise InputError(f"{real.name} is of {len(b.mean)} features, {net.name or 'Inception'} "
                             f"has {len(a.mean)}: give a reference of the same features")
    scores = {net.label(name): metrics.frechet_distance(b, a)
              for name, a, b in zip(("FID", "sFID"), fake.gaussians, real.gaussians)}
    if net.head is not None:
        scores["IS"] = metrics.inception_score(fake.rows.to(device) @ net.head.T, shuffle=shuffle)
    if real.rows is not None and min(len(real.rows), len(fake.rows)) > 5:
        rows = real.rows.to(device), fake.rows.to(device)
        scores[net.label("KID")], scores[net.label("KID") + " std"] = metrics.kernel_distance(*rows)
        scores |= {net.label(name): value for name, value in metrics.manifold_metrics(*rows).items()}
    if held is not None:
        name = net.label("FID")
        scores[f"{name} held-out"] = floor = metrics.frechet_distance(real.gaussians[0], held.gaussians[0])
        scores |= {f"{name} / held-out": scores[name] / floor} if floor > 0 else {}
    return scores


def label_mode(path: str) -> str:
    """Balanced or random classes, by arr_1 of a sample file: on ImageNet it changes FID by about 0.1."""
    if not path.endswith(".npz"):
        return "not stored"
    with features.open_npz(path) as archive:
        if "arr_1" not in archive.files:
            return "not stored"
        counts = np.bincount(archive["arr_1"].astype(int).ravel())
    return "balanced" if counts.max() - counts.min() <= 1 else "random"


# ------------------------------------------------------------------------------------------------------------
# Reference files, and what is in a file.


def write_reference(args: argparse.Namespace, rt: Runtime) -> None:
    """An .npz of ADM's keys: mu, sigma (mu_s, sigma_s) of all images, arr_0 with up to 10,000 of them."""
    images = features.open_images(args.data, args.size, args.split)
    path = args.file or args.out / "reference.npz"
    net = features.load_features(args.features, images.size, rt.device, args.inception_weights)
    found = features.extract(images, net, rt, args.batch, args.workers, args.limit, keep_all=False)
    if not rt.is_main:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    kept, place, end = features.kept_rows(found.count), 0, 0
    stored, temporary = path.with_name(f".{path.name}.arr_0"), path.with_name(f".{path.name}.tmp")
    pixels = np.lib.format.open_memmap(stored, "w+", np.uint8, (int(kept.sum()), images.size, images.size, 3))
    alone = Runtime(torch.device("cpu"))
    for part in features.every_image(images, args.batch, args.workers, args.limit, alone):
        chosen = part["pixels"][kept[place:place + len(part["x"])]].permute(0, 2, 3, 1)
        pixels[end:end + len(chosen)] = chosen.numpy()
        place, end = place + len(part["x"]), end + len(chosen)
    moments = {key + suffix: value.cpu().numpy() for g, suffix in zip(found.gaussians, ("", "_s"))
               for key, value in (("mu", g.mean), ("sigma", g.cov))}
    with open(temporary, "wb") as file:
        np.savez(file, arr_0=pixels, n_images=found.count, features=net.name, preprocessing=net.preprocessing,
                 source_sha256=found.sha256, **moments)
    stored.unlink()
    os.replace(temporary, path)
    print(f"wrote {path}: statistics of {found.count} images of {args.data}, and {end} of the images")


MEANING = {"arr_0": "images", "arr_1": "labels", "mu": "mean of the pool features", "sigma": "covariance",
           "mu_s": "mean of sFID's spatial features", "sigma_s": "covariance", "mu_clip": "not used here",
           "sigma_clip": "not used here", "n_images": "images behind mu", "features": "'' is FID's own"}


def inspect(path: Path) -> None:
    """What a file or folder holds and what it can be used for."""
    if path.is_dir():
        print(f"{path}: a folder of square RGB images of {features.folder_size(str(path))} pixels")
        return
    if path.suffix == ".npz":
        with features.open_npz(path) as archive:
            keys = archive.files
            for key in keys:
                array = features.map_array(str(path), key) if key == "arr_0" else archive[key]
                text = repr(array.item()) if array.ndim == 0 else f"{array.dtype} {list(array.shape)}"
                print(f"{key:14} {text:30} {MEANING.get(key, '')}")
        if "mu" in keys:
            print("a reference, for FD and" + (" sFID," if "mu_s" in keys else "")
                  + (" KID, precision, recall, density, coverage" if "arr_0" in keys else
                     " nothing else: without arr_0 there is no KID, precision or recall"))
        else:
            print(f"samples, labels {label_mode(str(path))}: for --samples, or for --reference as they are")
    else:
        for key, value in runtime.load_file(path).items():
            tensors = [v for v in value.values() if torch.is_tensor(v)] if isinstance(value, dict) else []
            numbers = f"{sum(t.numel() for t in tensors):,} numbers"
            print(f"{key:14} {numbers if tensors else str(value)[:200]}")
    print(f"sha256 {runtime.file_sha256(path)}")


# ------------------------------------------------------------------------------------------------------------
# Results: one JSON object each, one table, one plot of the noise curves.


def report(rows: list[dict[str, Any]], args: argparse.Namespace, rt: Runtime) -> None:
    about = {"command": runtime.command_line(), "date": time.strftime("%Y-%m-%d"), "seed": args.seed,
             "versions": runtime.versions(), "device": runtime.device_name(rt.device), "processes": rt.world}
    rows = [row | about for row in rows]
    lines = [("evaluation", "metric", "value")]
    for row in rows:
        what = f"{row['evaluation']} of {row['of']}"
        lines += [(what, name, row["protocol"][name.lower()] if value is None else f"{value:.6g}")
                  for name, value in row["metrics"].items()]
        for point in row.get("curve", [])[1:]:
            noise = f"  noise {point['level']:g}" + (" x spread" if point["noise"] == "relative" else "")
            known = {k: v for k, v in point.items() if k not in ("noise", "level") and v is not None}
            lines.append((noise, ", ".join(known), ", ".join(f"{value:.4g}" for value in known.values())))
    widths = [max(len(line[i]) for line in lines) for i in range(2)]
    previous = None
    for what, name, value in lines:
        print(f"{what if what != previous else '':{widths[0]}}  {name:{widths[1]}}  {value}")
        previous = what
    for row in rows:
        print(f"\nprotocol of {row['evaluation']} of {row['of']}: "
              + "; ".join(f"{k} {str(v)[:12] if k.endswith('sha256') else v}"
                          for k, v in row["protocol"].items() if v not in (None, "")))
    collect(rows, args.out / "results.json", [])
    if args.append:
        collect(rows, args.append, None)
    if any(len(row.get("curve", [])) > 1 for row in rows):
        plot([row for row in rows if "curve" in row], args.out / "noise_curve.png")
    print(f"\nwrote {args.out / 'results.json'}")


def collect(rows: list[dict[str, Any]], path: Path, old: list | None) -> None:
    """A JSON list of `old` (None: what the file holds) and `rows`, replaced in one step."""
    try:
        old = json.loads(path.read_text()) if old is None and path.exists() else old or []
    except json.JSONDecodeError as error:
        raise InputError(f"{path} is no JSON list ({error}): repair it, or choose another --append") from None
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(json.dumps(old + rows, indent=1, default=str) + "\n")
    os.replace(temporary, path)


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    """A row of panels for each metric, a column for each kind of noise, a line for each tokenizer."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    units = {"relative": "noise / std of the channel", "absolute": "noise"}
    units = {k: v for k, v in units.items() if any(p["noise"] == k for row in rows for p in row["curve"])}
    names = [k for k, v in rows[0]["curve"][0].items() if k not in ("noise", "level") and v is not None]
    size = 4.2 * len(units), 2.6 * len(names)
    figure, axes = plt.subplots(len(names), len(units), figsize=size, squeeze=False)
    for i, name in enumerate(names):
        for axis, (kind, unit) in zip(axes[i], units.items()):
            for row in rows:
                points = [p for p in row["curve"] if p["noise"] in ("none", kind)]
                axis.plot([p["level"] for p in points], [p[name] for p in points], "o-", ms=3,
                          label=Path(row["of"]).parent.name or row["of"])
            axis.set(xlabel=unit, ylabel=name)
            axis.grid(alpha=0.3)
    axes[0, 0].legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=150)
    plt.close(figure)


# ------------------------------------------------------------------------------------------------------------
# Speed, beside the usual tools in the same run.


def seconds(function: Callable[[], Any]) -> tuple[float, Any]:
    begin, result = time.perf_counter(), function()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - begin, result


def benchmark_frechet(rt: Runtime, d: int = 2048) -> None:
    draw, gaussians = runtime.generator(0, "benchmark"), []
    for shift in (0.0, 0.1):
        moments = metrics.Moments(d, rt.device)
        mixing = torch.randn(d, d, generator=draw) * torch.linspace(1, 0.01, d) / d**0.5
        moments.add((torch.randn(3 * d, d, generator=draw) @ mixing + shift).to(rt.device))
        gaussians.append(moments.fit(rt))
    mine, value = seconds(lambda: metrics.frechet_distance(*gaussians))
    cached, _ = seconds(lambda: metrics.frechet_distance(*gaussians))
    rt.print(f"Frechet distance, {d} dimensions: {value:.10g} in {mine:.2f} s, {cached:.2f} s if cached")
    try:
        import scipy.linalg
        from torch_fidelity.metric_fid import fid_statistics_to_metric as fidelity
    except ImportError as error:
        return rt.print(f"  {error}: not compared")
    one, two = ({"mu": g.mean.cpu().numpy(), "sigma": g.cov.cpu().numpy()} for g in gaussians)
    other, root = seconds(lambda: scipy.linalg.sqrtm(one["sigma"] @ two["sigma"]))
    rest = ((one["mu"] - two["mu"]) ** 2).sum() + np.trace(one["sigma"] + two["sigma"])
    value = rest - 2 * root.real.trace()
    rt.print(f"  scipy.linalg.sqrtm: {value:.10g} in {other:.2f} s, {other / mine:.1f} x")
    other, result = seconds(lambda: fidelity(one, two, verbose=False))
    rt.print(f"  torch-fidelity: {sum(result.values()):.10g} in {other:.2f} s, {other / mine:.1f} x")


def benchmark_features(args: argparse.Namespace, rt: Runtime) -> None:
    """A pass over 256-pixel images as `generation` makes it, with random weights; then the other network."""
    torch.manual_seed(0)
    network, spent = features.FidInception().eval().requires_grad_(False).to(rt.device), []
    count = args.limit or (4096 if rt.device.type == "cuda" else 48)

    def timed(pixels: Tensor) -> Any:
        elapsed, outputs = seconds(lambda: network(pixels))
        spent.append(elapsed)
        return outputs

    images, net = data.open_dataset("shapes", 256, "val"), Features("random Inception", "", timed)
    path = args.out / "benchmark.npz"
    np.savez(path, arr_0=torch.stack([images[i][0] for i in range(count)]).permute(0, 2, 3, 1).numpy())
    samples = features.open_images(str(path))
    features.extract(samples, net, rt, args.batch)   # warm up
    spent.clear()
    whole, _ = seconds(lambda: features.extract(samples, net, rt, args.batch))
    share = 100 * sum(spent) / whole
    rt.print(f"features: {count / whole:.2f} images/s; {share:.1f} % of the time in the network")
    try:
        from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
    except ImportError as error:
        return rt.print(f"  {error}: not compared")
    torch.save(network.state_dict(), args.out / "benchmark.pth")
    theirs = FeatureExtractorInceptionV3("", ["2048"], str(args.out / "benchmark.pth")).to(rt.device)
    batches = [part["pixels"] for part in features.every_image(samples, args.batch, 0, None, rt)]
    theirs(batches[0])
    with torch.inference_mode():
        other, _ = seconds(lambda: [theirs(pixels) for pixels in batches])
    rt.print(f"  torch-fidelity's network alone: {count / other:.2f} images/s")


# ------------------------------------------------------------------------------------------------------------


def smoke(args: argparse.Namespace) -> None:
    """What the default runs would have left, in miniature, where the smoke runs of other stages have not."""
    args.out, args.features, args.device, args.workers = Path("runs/smoke/evaluation"), "random", "cpu", 0
    args.limit, args.relative, args.absolute, args.lpips = 16, [0.5], [0.5], "off"
    tokenizer, samples = Path("runs/smoke/tokenizer/checkpoint.pt"), Path("runs/smoke/samples/samples.npz")
    args.tokenizer, args.samples = [tokenizer], str(samples)
    if not tokenizer.exists():
        torch.manual_seed(0)
        autoencoder = models.build_autoencoder(models.AUTOENCODERS["demo"])
        C = autoencoder.channels
        runtime.save_atomic({"kind": "tokenizer", "model_config": autoencoder.config, "step": 0,
                             "model": autoencoder.state_dict(), "latent_mean": torch.zeros(C),
                             "latent_std": torch.ones(C), "config": dict(data="shapes", size=32)}, tokenizer)
    if not samples.exists():
        samples.parent.mkdir(parents=True, exist_ok=True)
        pixels = torch.stack([data.open_dataset("shapes", 32, "val")[i][0] for i in range(16)])
        np.savez(samples, arr_0=pixels.permute(0, 2, 3, 1).numpy(), arr_1=np.arange(16) % 10)
        samples.with_suffix(".json").write_text(json.dumps({"data": "shapes", "size": 32}))


def default(args: argparse.Namespace, rt: Runtime) -> list[dict[str, Any]]:
    """Reconstruction and generation, of whichever the default runs have left."""
    args.limit = args.limit or BARE_LIMIT
    jobs = {str(args.tokenizer[0]): lambda: reconstruct(args.tokenizer[0], args, rt),
            args.samples: lambda: generate(args, rt)}
    missing = [path for path in jobs if not Path(path).exists()]
    if len(missing) == len(jobs):
        raise InputError("nothing to score: run train_tokenizer.py, train_dit.py and sample.py, or say what "
                         "to score (python evaluate.py --help)")
    for path in missing:
        rt.print(f"there is no {path}: not scored")
    return [job() for path, job in jobs.items() if path not in missing]


@runtime.command
def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    if args.command == "inspect":
        return inspect(args.file)
    if args.smoke:
        smoke(args)
    if args.features == "auto" and args.command != "benchmark":
        args.features = features.choose(args.inception_weights)
    rt = runtime.start(args.device)
    torch.set_float32_matmul_precision("highest")   # TF32 changes features as much as tokenizers do
    torch.backends.cudnn.allow_tf32 = False
    args.out.mkdir(parents=True, exist_ok=True)
    if args.command == "benchmark":
        rt.print(f"{runtime.device_name(rt.device)}, {runtime.versions()}")
        benchmark_frechet(rt)
        return benchmark_features(args, rt)
    if args.command == "reference":
        return write_reference(args, rt)
    if args.command == "reconstruction":
        rows = [reconstruct(path, args, rt) for path in args.tokenizer]
    else:
        rows = [generate(args, rt)] if args.command == "generation" else default(args, rt)
    if rt.is_main:
        report(rows, args, rt)
    runtime.barrier()


if __name__ == "__main__":
    main()
