"""Stage 4: score tokenizers and samples.

    laptop      python evaluate.py             # what the default runs left
    tokenizers  python evaluate.py --tokenizer a.pt b.pt --data DIR --size 256
    samples     python evaluate.py --samples samples.npz --reference DIR
    pictures    python evaluate.py --tokenizer a.pt --data DIR --write-images OUT
    eight GPUs  torchrun --nproc_per_node=8 evaluate.py ...

A tokenizer gets PSNR, SSIM, LPIPS and rFID of held-out images, and its noise
curve: the same with noise added to the latent.  Samples get the metrics of the
ADM evaluator.  With other features than Inception's, FID is called FD-<features>.

A distance from few images is too large.  So as many held-out real images are scored
beside the samples.  The folder --out receives results.json and noise_curve.png.
"""

import hashlib
import re
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import runtime  # before torch: it says how idle threads wait

import numpy as np
import torch
from PIL import Image
from torchvision.utils import save_image
from tqdm import tqdm

import checkpoints
import data
import frozen
import metrics
from runtime import InputError, Runtime

# ------------------------------------------------------------------------------
# What is fixed, and what has a flag.

ROWS = 10_000   # images for KID, precision and the like, as in ADM's references
TOKENIZER, SAMPLES = "tokenizer/checkpoint.pt", "samples/samples.npz"
SMOKE = dict(limit=16, workers=0, out=Path("runs/smoke/evaluation"))


def parse(argv):
    p = runtime.Parser(__doc__)
    add, count = p.add_argument, runtime.positive_int
    add("--tokenizer", nargs="+", default=[], help="checkpoints")
    add("--samples", help=".npz or folder of images; without this and"
        " --tokenizer, what the default runs left is scored")
    add("--reference", help="what samples are compared with: shapes, cifar10,"
        " a folder or an .npz of ADM's; else what their model was trained on")
    add("--data", help="shapes, cifar10 or a folder that has held-out images;"
        " else what the tokenizer was trained on, or the reference")
    add("--size", type=count, help="side in pixels; else that of training")
    add("--features", default="auto", help="auto, inception, judge,"
        " efficientnet-lite0 or module:function")
    add("--limit", type=count, help="most images of every set; else all")
    add("--out", type=Path, default=Path("runs/evaluation"), help="folder")
    add("--at-once", "--batch", type=count, default=64, help="images per process")
    add("--workers", type=runtime.natural_int, default=2, help="loaders per process")
    add("--device", default="auto", help="auto, cpu, cuda or mps")
    add("--seed", type=runtime.seed, default=0, help="of the noise on latents")
    add("--noise", type=runtime.positive, nargs="*", default=[0.1, 0.2, 0.5, 1.0],
        help="levels of the noise curve: deviations of noise on the latent, as they"
        " are and times each channel's spread; without any, no curve")
    add("--decode-steps", type=count, help="of diffusion decoders; else their files'")
    add("--as-vavae", action="store_true", help="score tokenizers as VA-VAE's script:"
        " from a draw of the posterior, and with the SSIM of values in [-1, 1]")
    add("--probe", type=count, help="also how well the latents of so many training"
        " images tell the class: a linear probe, and nearest neighbours")
    add("--write-reference", type=Path, metavar="FILE", help="only write the"
        " statistics of the training images of --data, as ADM does")
    add("--write-images", type=Path, metavar="DIR", help="only encode the"
        " training images of --data: reconstructions, latents, interpolations")
    add("--smoke", action="store_true", help="a few images of other smoke runs")
    args = p.parse(argv, smoke=SMOKE)
    if args.write_reference and args.write_images:
        raise InputError("--write-reference and --write-images take a command each")
    if args.write_reference:
        if not args.data or args.write_reference.suffix != ".npz":
            raise InputError("--write-reference takes a FILE.npz, and needs --data")
    elif args.write_images:
        if len(args.tokenizer) != 1 or not args.data:
            raise InputError("--write-images needs one --tokenizer, and --data")
        inner, outer = args.write_images.resolve(), Path(args.data).resolve()
        if inner.is_relative_to(outer) or outer.is_relative_to(inner):
            raise InputError("--write-images and --data must not lie in each other")
    elif not (args.tokenizer or args.samples):
        runs = Path("runs/smoke" if args.smoke else "runs")
        args.tokenizer = [*map(str, runs.glob(TOKENIZER))]
        args.samples = next(map(str, runs.glob(SAMPLES)), None)
        if not (args.tokenizer or args.samples):
            raise InputError(f"{runs} has neither {TOKENIZER} nor {SAMPLES}: run"
                             " the other stages first, or name what to score")
    for path in (*args.tokenizer, args.samples, args.reference, args.data):
        if path in args.tokenizer or str(path).endswith(".npz"):
            runtime.regular(path)
    return args


# ------------------------------------------------------------------------------
# The features of a set of images.  Every process takes its share, and no image
# is seen twice, so that any number of processes finds the same.


@dataclass
class Reader:
    """How images are read: at most `limit` of every set."""
    rt: Runtime
    batch: int
    workers: int
    limit: int | None

    def count(self, images):
        return min(self.limit or len(images), len(images))

    def __call__(self, images, count, least=2):
        """Batches of this process; the images are spread evenly over the set."""
        rt, batches = self.rt, -(-count // (self.batch * self.rt.world))
        if count < max(least, rt.world):
            raise InputError(f"{images.name} has {count} images, too few to compare")
        parts = data.once(images, self.batch, rt.rank, rt.world, self.workers,
                          count, rt.device, x=False)
        for part in tqdm(parts, images.name, batches, leave=False, unit="batch",
                         disable=not rt.is_main):
            for name in part["skipped"]:
                raise InputError(f"{name} cannot be read: replace or remove it")
            yield part


def extract(images, net, read, count, few=False):
    """Gaussians of all images as (n, mean, cov), rows [m, d] and labels [m].

    few: keep about ROWS of the rows, for memory.
    """
    moments, kept = [metrics.Moments(), metrics.Moments()], []
    for part in read(images, count):
        outputs, index = net(part["pixels"]), part["index"]
        for moment, output in zip(moments, outputs):
            moment.add(output)
        places = index * count // len(images)
        chosen = places % max(1, few * count // ROWS) == 0
        kept.append([a.cpu()[chosen] for a in (outputs[0], part["y"], index)])
    rows, labels, index = (
        runtime.gather_rows(torch.cat(a), read.rt) for a in zip(*kept))
    order, fits = index.argsort(), [m.fit() for m in moments[:len(outputs)]]
    return {"gaussians": [(fit.n, fit.mean.cpu(), fit.cov.cpu()) for fit in fits],
            "rows": rows[order], "labels": labels[order]}


def cached(images, net, read, folder):
    """What `extract` finds in a reference, or has found before."""
    count = read.count(images)
    key = repr((data.fingerprint(images), count, net.name, net.weights)).encode()
    path = folder / f"{hashlib.sha256(key).hexdigest()[:24]}.pt"
    if ":" not in net.name:   # the user's function may have changed
        with suppress(InputError):   # there is none, or it is damaged
            found = checkpoints.read(path)
            if {"gaussians", "rows", "labels"} <= {*found}:
                return found
    found = extract(images, net, read, count, few=True)
    if read.rt.is_main:
        checkpoints.save(found, path)
    return found


# ------------------------------------------------------------------------------
# Files of the ADM evaluator hold mu and sigma of all images, mu_s and sigma_s of
# sFID's features, and some of the images as arr_0.  Ours name their features.
# Files that do not are of the Inception.


def read_gaussian(path, file, end):
    """mu [d] and sigma [d, d], if they can be a mean and a covariance.

    Few images in float32 round to eigenvalues of about -1e-6 times the mean
    variance.  Below -1e-4 times it, sigma is no covariance.
    """
    mean, cov = (file.get(key + end, np.empty(0)) for key in ("mu", "sigma"))
    kinds, shape = {mean.dtype.kind, cov.dtype.kind}, (mean.size, mean.size)
    if kinds - {*"fiu"} or mean.ndim != 1 or cov.shape != shape or not mean.size:
        raise InputError(f"{path}: mu{end} must be numbers [d], and sigma{end} numbers"
                         f" [d, d], not {mean.shape} and {cov.shape}")
    mean, cov = (torch.from_numpy(a.astype(float)) for a in (mean, cov))
    if not (mean.isfinite().all() and cov.isfinite().all()):
        raise InputError(f"{path} holds NaN or infinity: write it again")
    slack = 1e-4 * cov.diagonal().mean()
    _, failed = torch.linalg.cholesky_ex(cov + slack * torch.eye(len(cov)))
    if failed or (cov - cov.T).abs().max() > slack:
        raise InputError(f"{path}: sigma{end} is no covariance: write it again")
    return None, mean, cov


def read_reference(path, size, net, read):
    """As `extract`, but with the statistics in the file if they are of `net`."""
    file = data.read_npz(path, "mu", "sigma", "mu_s", "sigma_s", "features")
    ends = ("", "_s") if str(file.get("features", "")) == net.name else ()
    stored = [read_gaussian(path, file, end) for end in ends if "mu" + end in file]
    if "arr_0" not in file["names"]:
        if not stored:
            raise InputError(f"{path} has neither images as arr_0 nor mu and sigma of"
                             f" {net.about()['features']}")
        return {"gaussians": stored, "rows": torch.empty(0)}
    images = data.ArraySamples(path)
    if images.size != size:
        raise InputError(f"{path} has {images.size} pixels a side, the samples {size}")
    found = extract(images, net, read, read.count(images))
    return found | {"gaussians": stored or found["gaussians"]}


def write_reference(path, source, size, choice, read):
    """The statistics alone, without arr_0."""
    images = data.open_images(source, size)
    net = frozen.load_features(choice, source, images.size, read.rt.device)
    found, arrays = extract(images, net, read, read.count(images), few=True), {}
    for (_, mean, cov), end in zip(found["gaussians"], ("", "_s")):
        arrays |= {"mu" + end: mean, "sigma" + end: cov}
    if read.rt.is_main:
        with runtime.atomic(path) as temporary:
            np.savez(temporary, **arrays, features=net.name)


# ------------------------------------------------------------------------------
# Reconstructions of held-out images from the posterior's mean, or from one draw of
# it as in VA-VAE's script, and the decoder's noise curve.  All of its points share
# one noise, so that it is smooth.


def spread_of(tokenizer, file, images, read):
    """Deviation [C, 1, 1] of the latents: as the file has it, or of up to 256 images."""
    if "latent_std" in file:
        return file["latent_std"].to(read.rt.device)[:, None, None]
    alone = Reader(Runtime(read.rt.device), read.batch, read.workers, min(256, read.limit or 256))
    z = [tokenizer.posterior(data.from_uint8(part["pixels"]))[0]
         for part in alone(images, alone.count(images))]
    return torch.cat(z).transpose(0, 1).flatten(1).std(1)[:, None, None]


@torch.no_grad()
def score_tokenizer(path, source, size, choice, seed, noise_levels, steps, probe, as_vavae, read):
    """The scores of a tokenizer.  Real images would have an rFID of 0."""
    device = read.rt.device
    tokenizer, file = checkpoints.load_tokenizer(path, steps)
    source, size, held_out = checkpoints.images_of(path, file, source, size)
    images = data.open_dataset(source, size, "val", held_out)
    net = frozen.load_features(choice, source, size, device)
    tokenizer.to(device)
    lpips = frozen.load_lpips().to(device) if frozen.find_weights("vgg") else None
    if lpips is None:
        read.rt.print(f"no LPIPS, because {frozen.hub_file(frozen.VGG)} is not there")
    if size < (least := 16 if lpips else 11):
        raise InputError(f"SSIM and LPIPS need {least} pixels a side, not {size}")
    judged = [*images.classes] == [*data.SHAPES]
    spread = spread_of(tokenizer, file, images, read) if noise_levels else 0
    levels = [("none", 0.0, 0.0), *(("absolute", a, a) for a in noise_levels),
              *(("relative", a, a * spread) for a in noise_levels)]
    moments = [metrics.Moments() for _ in (*levels, "real images")]
    sums, count = [Counter() for _ in moments], read.count(images)
    for part in read(images, count):
        x, index = part["pixels"], part["index"].tolist()
        z, logvar = tokenizer.posterior(data.from_uint8(x))
        noise = runtime.noise_of(index, z.shape[1:], seed, "evaluate").to(z)
        if as_vavae:
            own = runtime.noise_of(index, z.shape[1:], seed, "posterior").to(z)
            scale = runtime.noise_of(index, (), seed, "scale").to(z)
            z = tokenizer.sample(z, (logvar / 2).exp(), own, scale)
        decoded = (tokenizer.decode(z + std * noise, index) for *_, std in levels)
        for moment, total, x_hat in zip(moments, sums, [*map(data.to_uint8, decoded), x]):
            rows, y = net(x_hat)[0], part["y"] if judged else None
            moment.add(rows)
            total.update(pair_metrics(x_hat, x, y, rows, net, lpips, -1 if as_vavae else 0))
    means = torch.tensor([[*total.values()] for total in sums], device=device)
    means = runtime.all_reduce_sum(metrics.float64(means)) / count
    *fakes, real = (moment.fit() for moment in moments)
    curve = [{"noise": kind, "level": level, **dict(zip(sums[0], row)),
              net.label("rFID"): metrics.frechet_distance(real, fake)}
             for (kind, level, _), row, fake in zip(levels, means.tolist(), fakes)]
    scores = {k: v for k, v in curve[0].items() if k not in ("noise", "level")}
    if "recognised" in scores:
        scores["recognised of real images"] = means[-1, -1].item()
    if probe:
        train = data.open_dataset(source, size, "train", held_out)
        runtime.on_main(read.rt, lambda: scores.update(
            probe_latents(tokenizer, train, images, probe, read)))
    return {"evaluation": "reconstruction", "of": path, "metrics": scores,
            "curve": curve, "protocol": {
                **net.about(), "images": count, "size": size,
                "latent": "a draw" if as_vavae else "the mean",
                "ssim": "[-1, 1]" if as_vavae else "[0, 1]",
                "data": f"{source} {images.split}",
                "data_sha256": data.fingerprint(images),
                "tokenizer_sha256": runtime.file_sha256(path)}}


def probe_latents(tokenizer, train, val, count, read):
    """Top-1 accuracy of classes from the latent's mean, flat or averaged over positions."""
    if len(train.classes) < 2 or val.labels([0]) < 0:
        raise InputError("--probe needs images of several classes, in class folders")
    alone = Reader(Runtime(read.rt.device), read.batch, read.workers, count)
    sets = []
    for images in (train, val):
        found = [(tokenizer.posterior(data.from_uint8(part["pixels"]))[0], part["y"])
                 for part in alone(images, alone.count(images))]
        sets.append([torch.cat(column) for column in zip(*found)])
    (z, y), (test, test_y) = sets
    scores = {}
    for name, rows in (("flat", lambda a: a.flatten(1)), ("averaged", lambda a: a.mean((2, 3)))):
        few = min(2048, max(32, len(z) // 50))   # GAE's 2048 is for a million images
        with torch.enable_grad():
            scores[f"linear probe, {name}"] = metrics.linear_probe(
                rows(z), y, rows(test), test_y, batch=few)
        scores[f"neighbours, {name}"] = metrics.nearest_neighbours(rows(z), y, rows(test), test_y)
    return scores


def pair_metrics(x_hat, x, y, rows, net, lpips, low):
    """Sums over a batch; y: what the judge should see in x_hat, or None; low: of SSIM."""
    found = {"PSNR": metrics.psnr(x_hat, x), "SSIM": metrics.ssim(x_hat, x, low)}
    if lpips:
        found["LPIPS"] = lpips(data.from_uint8(x_hat), data.from_uint8(x))
    found = {name: values.sum().item() for name, values in found.items()}
    if net.name == "Shapes" and y is not None:
        found["recognised"] = len(y) * metrics.recognised(net.head(rows).softmax(1), y)
    return found


# ------------------------------------------------------------------------------
# A tokenizer as a tool: pictures in, pictures and latents out.


@torch.no_grad()
def write_images(out, path, source, size, steps, read):
    """Reconstructions and latents, also as pictures, and mixtures of the first five."""
    tokenizer, file = checkpoints.load_tokenizer(path, steps)
    source, size, _ = checkpoints.images_of(path, file, source, size)
    tokenizer.to(read.rt.device)
    images, found = data.open_images(source, size), []
    names = picture_names(images)
    for part in read(images, read.count(images), least=1):
        mean, logvar = tokenizer.posterior(data.from_uint8(part["pixels"]))
        index = part["index"].tolist()
        pixels = data.to_uint8(tokenizer.decode(mean, index)).permute(0, 2, 3, 1).cpu().numpy()
        for i, picture in zip(index, pixels):
            with runtime.atomic(out / "reconstructions" / names[i]) as temporary:
                Image.fromarray(picture).save(temporary)
        found.append([mean.cpu().numpy(), (logvar / 2).exp().cpu().numpy(), index])
    mean, std, index = map(np.concatenate, zip(*found))
    with runtime.atomic(out / "latents.npz") as temporary:
        np.savez(temporary, mean=mean, std=std, names=[names[i] for i in index])
    colours = metrics.principal_colours(torch.from_numpy(mean[:64]))
    with runtime.atomic(out / "latents.png") as temporary:
        save_image(torch.nn.functional.interpolate(colours, scale_factor=tokenizer.stride),
                   temporary, normalize=True, value_range=(-1, 1))
    if len(mean) > 1:
        z, share = torch.from_numpy(mean[:5]), torch.linspace(0, 1, 8)
        mixed = torch.lerp(z[:-1, None], z[1:, None], share[:, None, None, None])
        x_hat = torch.cat([tokenizer.decode(row.to(read.rt.device)) for row in mixed])
        with runtime.atomic(out / "interpolations.png") as temporary:
            save_image(x_hat, temporary, nrow=8, normalize=True, value_range=(-1, 1))
    print(f"wrote reconstructions, latents and interpolations of {len(mean)} images to {out}")


def picture_names(images):
    """Those of the files, but .png; or numbers."""
    if not hasattr(images, "folder"):
        return [f"{i:06d}.png" for i in range(len(images))]
    files = [images.name_of(i) for i in range(len(images))]
    files = [Path(file).relative_to(images.folder) for file in files]
    names = [str(file.with_suffix(".png")) for file in files]
    return names if len({*names}) == len(names) else [f"{file}.png" for file in files]


# ------------------------------------------------------------------------------
# Samples, and real images in their place.

# What sample.py notes of how they were made.
MADE_BY = ("sampler", "steps", "shift", "guidance", "interval", "cfg_channels", "labels",
           "seed", "precision")


def compare(fake, real, net, labels, device):
    """Metrics of a set of images; labels: what the judge should see, or None."""
    scores = {}
    for name, *pair in zip(("FID", "sFID"), real["gaussians"], fake["gaussians"]):
        pair = [metrics.Gaussian(*parts) for parts in pair]
        scores[net.label(name)] = metrics.frechet_distance(*pair)
    rows = real["rows"].to(device), fake["rows"].to(device)
    if min(map(len, rows)) > 5:
        found = {"KID": metrics.kernel_distance(*rows)} | metrics.manifold_metrics(*rows)
        scores |= {net.label(name): value for name, value in found.items()}
    if net.name == "":
        scores["IS"] = metrics.inception_score(net.head(rows[1]))
    if net.name == "Shapes" and labels is not None:
        labels = labels.to(device)
        scores["recognised"] = metrics.recognised(net.head(rows[1]).softmax(1), labels)
    return scores


def read_labels(path, count):
    """arr_1 of an .npz of samples: [count], or None if it has none."""
    labels = data.read_npz(path, "arr_1").get("arr_1") if path.endswith(".npz") else None
    if labels is not None and (labels.dtype.kind not in "iu" or labels.shape != (count,)):
        raise InputError(f"{path}: arr_1 must be whole numbers, one for each of its"
                         f" {count} images, not {labels.dtype} {list(labels.shape)}")
    return labels


def score_samples(path, reference, source, size, choice, cache, read):
    """The row of a file or folder of samples."""
    samples, beside = data.open_images(path, size), Path(f"{path.removesuffix('.npz')}.json")
    if size not in (None, samples.size):
        raise InputError(f"{path} has {samples.size} pixels a side: leave out --size")
    facts = runtime.read_json(beside) if beside.is_file() else {}
    made_of, seed = facts.get("data"), facts.get("data_seed", 0)
    if not isinstance(made_of, str | None) or not isinstance(seed, int):
        raise InputError(f"{beside} was not written by sample.py: remove it")
    reference = reference or made_of
    if not reference:
        raise InputError(f"{path} does not say what to compare with: give --reference")
    size, device, labels = samples.size, read.rt.device, read_labels(path, len(samples))
    if labels is not None:
        samples.targets = labels.astype(int)
    judged = labels is not None and (made_of or reference) == "shapes"
    if judged and not {*labels.tolist()} <= {*range(len(data.SHAPES))}:
        raise InputError(f"{path}: arr_1 has labels that are no shapes' ones")
    net = frozen.load_features(choice, reference, size, device)
    if reference.endswith(".npz"):
        real = read_reference(reference, size, net, read)
    else:
        train = data.open_dataset(reference, size, "train", seed)
        real, source = cached(train, net, read, cache), source or reference
    held_out = source and data.open_dataset(source, size, "val", seed)
    fake = extract(samples, net, read, read.count(samples))
    widths = [[len(mean) for _, mean, _ in found["gaussians"]] for found in (real, fake)]
    if widths[0] != widths[1][:len(widths[0])]:
        raise InputError(f"{reference} has statistics of {widths[0]} features, and"
                         f" {net.about()['features']} has {widths[1]}")
    labels = fake["labels"] if judged else None
    scores, count = compare(fake, real, net, labels, device), 0
    if held_out and not held_out.note:   # a note says that nothing is held out
        count = min(read.count(samples), len(held_out))
    if count >= max(2, read.rt.world):
        held = extract(held_out, net, read, count)
        labels = held["labels"] if [*held_out.classes] == [*data.SHAPES] else None
        floor = compare(held, real, net, labels, device)
        scores |= {f"{name} of real images": value for name, value in floor.items()}
    return {"evaluation": "generation", "of": path, "metrics": scores, "protocol": {
        **net.about(), "images": read.count(samples), "size": size,
        "reference": reference, "reference_images": real["gaussians"][0][0],
        "reference_sha256": runtime.file_sha256(reference) if reference.endswith(".npz")
        else data.fingerprint(train), "held_out_images": count,
        "sampling": {name: facts[name] for name in MADE_BY if name in facts}}}


# ------------------------------------------------------------------------------
# What is printed, and what is drawn.

HIGHER = "PSNR SSIM IS precision recall density coverage recognised linear neighbours".split()


def show(row):
    """A table; beside each number what real images get, and which way is better."""
    scores, protocol = row["metrics"], row["protocol"]
    where = protocol.get("data") or f"compared with {protocol['reference']}"
    print(f"\n{row['evaluation']} of {row['of']}: {protocol['images']} images, {where}")
    print(f"  {'':24} {'value':>10} {'real images':>14}   better")
    for name in scores:
        if not name.endswith(" of real images"):
            pair = [scores.get(key) for key in (name, f"{name} of real images")]
            value, real = ("" if v is None else f"{v:.4g}" for v in pair)
            better = "higher ↑" if re.split("[-, ]", name)[0] in HIGHER else "lower ↓"
            print(f"  {name:24} {value:>10} {real:>14}   {better}")


def plot(rows, path):
    """A column of panels for each metric, a row for each kind of noise."""
    from matplotlib.figure import Figure
    names = [*dict.fromkeys(name for row in rows for name in [*row["curve"][0]][2:])]
    kinds = {"absolute": "noise", "relative": "noise / spread of the latent"}
    figure = Figure((3 * len(names), 5), layout="tight")
    axes = figure.subplots(2, len(names))
    for line, (kind, unit) in zip(axes, kinds.items()):
        for ax, name in zip(line, names):
            for row in rows:
                points = [p for p in row["curve"] if p["noise"] in ("none", kind) and name in p]
                ax.plot([p["level"] for p in points], [p[name] for p in points],
                        "o-", label=Path(row["of"]).parent.name or row["of"])
            ax.set(xlabel=unit, ylabel=name)
    axes[0, 0].legend()
    runtime.save_figure(figure, path, dpi=150)


def report(rows, out, seed, rt):
    about = runtime.provenance(rt.device) | {"seed": seed, "processes": rt.world}
    for row in rows:
        show(row)
    written = out / "results.json"
    runtime.write_json(written, [row | about for row in rows])
    if curves := [row for row in rows if len(row.get("curve", [])) > 1]:
        plot(curves, out / "noise_curve.png")
        written = f"{written} and {out / 'noise_curve.png'}"
    print(f"\nwrote {written}")


@runtime.command
def main(argv=None):
    args = parse(argv)
    rt = runtime.start(args.device)
    runtime.exact_products()
    read = Reader(rt, args.at_once, args.workers, args.limit)
    if args.write_reference:
        runtime.claim(rt, args.write_reference.parent, args.write_reference)
        return write_reference(
            args.write_reference, args.data, args.size, args.features, read)
    if args.write_images:
        runtime.claim(rt, args.write_images)
        runtime.claim(rt, args.write_images / "reconstructions")
        alone = Reader(Runtime(rt.device), args.at_once, args.workers, args.limit)
        return rt.is_main and write_images(
            args.write_images, *args.tokenizer, args.data, args.size, args.decode_steps, alone)
    runtime.claim(rt, args.out, args.out / "results.json")
    runtime.claim(rt, args.out / "cache")
    rows = [
        score_tokenizer(path, args.data, args.size, args.features, args.seed,
                        args.noise, args.decode_steps, args.probe, args.as_vavae, read)
        for path in args.tokenizer]
    if args.samples:
        rows.append(score_samples(
            args.samples, args.reference, args.data, args.size, args.features,
            args.out / "cache", read))
    if rt.is_main:
        report(rows, args.out, args.seed, rt)


if __name__ == "__main__":
    main()
