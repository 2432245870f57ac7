"""Will the latents of a tokenizer be easy to diffuse?  A page of their properties.

    laptop     python diffusability.py            # of the default run's tokenizer
    with DiT   python diffusability.py --tokenizer a.pt --dit dit.pt
    data       python diffusability.py --tokenizer a.pt --data DIR --masks MASKS
    several    python diffusability.py --compare a.pt b.pt page.json --out all.json

Nothing is trained.  Images that the tokenizer has not learned are encoded, and
latents.py computes what "Diffusing in the Right Space" (Zhong et al. 2026) and its
sources propose.  What cannot be computed is n/a, with the reason.  --out receives
the page as JSON.  --compare writes a figure beside it.
"""

import contextlib
import functools
import math
import time
from pathlib import Path

import runtime  # before torch: it says how idle threads wait

import torch
from tqdm import tqdm

import checkpoints
import data
import flow
import frozen
import latents
import metrics
from latents import Standardised
from runtime import InputError

# ------------------------------------------------------------------------------
# What is fixed, and what has a flag.

LEAST = 16            # images without which there is no page
REFERENCE = 10_000    # latents among which iFID looks for neighbours, at most
FEW = 256             # images that are moved, and paths
SMOKE = dict(limit=64, decode=16, workers=0, out=Path("runs/smoke/diffusability/page.json"),
             tokenizer=Path("runs/smoke/tokenizer/checkpoint.pt"))


def parse(argv):
    p = runtime.Parser(__doc__)
    add, count = p.add_argument, runtime.positive_int
    add("--tokenizer", type=Path, default=Path("runs/tokenizer/checkpoint.pt"),
        help="checkpoint, ours or a published one")
    add("--dit", type=Path, help="a transformer on its latents, whose paths are measured")
    add("--compare", nargs="+", type=Path, default=[], metavar="FILE",
        help="checkpoints of tokenizers, or pages (.json), side by side")
    add("--data", help="shapes, cifar10 or a folder; else what the tokenizer has learned")
    add("--masks", type=Path, help="folder with a .png for every held-out image, of its"
        " name and size; what is not black is the object; shapes have their own")
    add("--size", type=count, help="side in pixels; else that of training")
    add("--features", default="auto", help="network of rFD and iFD, as in evaluate.py")
    add("--limit", type=count, help="most images; else all that are held out")
    add("--decode", type=count, default=1000, help="images for what needs a network")
    add("--out", type=Path, default=Path("runs/diffusability/page.json"), help="a .json")
    add("--at-once", "--batch", type=count, default=64, help="images in a batch")
    add("--workers", type=runtime.natural_int, default=2, help="loaders")
    add("--device", default="auto", help="auto, cpu or cuda")
    add("--seed", type=runtime.seed, default=0, help="of every draw")
    add("--smoke", action="store_true", help="a few images of another smoke run")
    args = p.parse(argv, smoke=SMOKE)
    if args.out.suffix != ".json":
        raise InputError(f"--out {args.out} must end in .json")
    if args.compare and args.dit:
        raise InputError("--dit belongs to one --tokenizer: make its page, and compare pages")
    for path in args.compare:
        runtime.regular(path)
    return args


# ------------------------------------------------------------------------------
# From images to latents.


@torch.no_grad()
def encode(tokenizer, images, count, keep, masks, seed, batch, workers, device):
    """Tensors of `count` images spread over the set, with the pixels of `keep` of them."""
    if count < LEAST:
        raise InputError(f"{images.name} has {count} images to look at, and {LEAST} are needed")
    rows, pixels, begin = {}, [], 0
    shown = torch.arange(keep) * count // max(1, keep)
    parts = data.once(images, batch, workers=workers, limit=count, device=device)
    for part in tqdm(parts, f"{images.split} images", -(-count // batch), unit="batch"):
        for name in part["skipped"]:
            raise InputError(f"{name} cannot be read: replace or remove it")
        index, end = part["index"].tolist(), begin + len(part["index"])
        mean, logvar = tokenizer.posterior(part["x"])
        std = torch.exp(0.5 * logvar)
        eps = runtime.noise_of(index, mean.shape[1:], seed, "diffusability")
        scale = runtime.noise_of(index, (), seed, "scale")
        kl = 0.5 * (mean.square() + std.square() - logvar - 1)
        z = tokenizer.sample(mean, std, eps.to(mean), scale.to(mean))
        found = {"mean": mean, "sample": z, "labels": part["y"], "kl": kl.mean((1, 2, 3)),
                 "variance": std.square().mean((2, 3))}
        if masks:
            objects = data.read_masks(masks, images, index)
            found["masks"] = latents.mask_grid(objects, mean.shape[2:])
        for name, value in found.items():
            if name not in rows:
                rows[name] = torch.empty(count, *value.shape[1:], dtype=value.dtype)
            rows[name][begin:end] = value.cpu()
        pixels.append(part["pixels"].cpu()[torch.isin(torch.arange(begin, end), shown)])
        begin = end
    return rows | {"shown": shown, "pixels": torch.cat(pixels)}


OTHERS = ("the pages are of other images or features, and cannot be compared: make them with the"
          " same --data, --size, --limit and --decode, of tokenizers with one seed")


def load(path, source, size):
    """A tokenizer, and the images that it is measured on, held out and of training."""
    tokenizer, file = checkpoints.load_tokenizer(path)
    source, size, seed = checkpoints.images_of(path, file, source, size)
    return tokenizer, source, size, *(
        data.open_dataset(source, size, split, seed) for split in ("val", "train"))


def prepare(path, dit, source, masks, size, choice, limit, decode, seed, batch, workers, device):
    """The perspectives of a page, and where its numbers are from."""
    tokenizer, source, size, images, training = load(path, source, size)
    if masks and not hasattr(images, "folder"):
        raise InputError(f"--masks are for folders of images, not for {source}")
    network = None
    if dit:
        network, file = checkpoints.load_dit(dit)
        checkpoints.check_pair(dit, file, path, tokenizer.channels, size // tokenizer.stride)
        network.to(device)
    net = frozen.load_features(choice, source, size, device)
    tokenizer.to(device)
    masks = Path() if isinstance(images, data.Shapes) else masks
    count = min(limit or len(images), len(images))
    if decode < 2:
        raise InputError("--decode 1 leaves no distance: give 2 or more")
    common, train = (seed, batch, workers, device), {}
    val = encode(tokenizer, images, count, min(decode, count), masks, *common)
    z, samples = (Standardised(val[name], device) for name in ("mean", "sample"))
    if not images.note and len(training) >= LEAST:   # a note says that nothing is held out
        few = min(count, REFERENCE, len(training))
        train = encode(tokenizer, training, few, 0, None, *common)
    return perspectives(z, samples, val, train, tokenizer, net, network, seed, batch), {
        **net.about(), "data": f"{source} {images.split}", "size": size, "images": count,
        "decoded": len(val["shown"]), "data_sha256": data.fingerprint(images), "seed": seed,
        "tokenizer_sha256": runtime.file_sha256(path),
        "dit_sha256": dit and runtime.file_sha256(dit)}


# ------------------------------------------------------------------------------
# The perspectives.


def perspectives(z, samples, val, train, tokenizer, net, dit, seed, batch):
    """A function for each of latents.PERSPECTIVES, which returns its properties.

    val, train: what `encode` returns; without training images, train is {}.
    """
    labels, masks, shown, device = val["labels"], val.get("masks"), val["shown"], z.device
    variance, kl = val["variance"].double().mean(0), val["kl"].mean().item()
    classes = []   # `velocity`, which comes first, fills it for `decoder`
    draw = functools.partial(runtime.generator, seed, "diffusability")

    def latent(x):
        means = [tokenizer.posterior(part.to(device))[0] for part in x.split(batch)]
        return flow.normalize(torch.cat(means), z.mean, z.std)

    @functools.cache
    def real():
        moments = metrics.Moments()
        for x in val["pixels"].split(batch):
            moments.add(net(x.to(device))[0])
        return moments.fit()

    def scores(raw):
        """FD and PSNR of what latents decode to, against the images that are shown."""
        fake, psnr = metrics.Moments(), []
        pairs = zip(raw.split(batch), val["pixels"].split(batch))
        for pair in tqdm(pairs, "decode", -(-len(raw) // batch), leave=False, delay=2):
            part, x = (tensor.to(device) for tensor in pair)
            x_hat = data.to_uint8(tokenizer.decode(part))
            fake.add(net(x_hat)[0])
            psnr.append(metrics.psnr(x_hat, x).cpu())
        fd = metrics.frechet_distance(real(), fake.fit())
        return fd, torch.cat(psnr).mean().item()

    def velocity():
        classes.extend(latents.fit_classes(z, labels))
        return latents.velocity(z, samples, labels, classes, draw)

    def semantics():
        known = Standardised(train["mean"], device, like=z) if train else None
        return latents.semantics(z, labels, masks, known, train.get("labels"))

    functions = (
        velocity,
        semantics,
        lambda: latents.space(z, masks),
        lambda: latents.smoothness(z),
        lambda: latents.continuity(lambda raw: scores(raw)[0], z, shown, train.get("mean"), draw),
        lambda: latents.uniformity(z, draw),
        lambda: latents.equivariance(latent, data.from_uint8(val["pixels"][:FEW]), z[shown[:FEW]]),
        lambda: latents.decoder(
            tokenizer.decode, scores, z, shown, variance, kl, labels, classes, draw),
        lambda: latents.paths(latents.fields(dit, min(FEW, len(shown)), draw, device)))
    return dict(zip(latents.PERSPECTIVES, functions, strict=True))


@torch.no_grad()
def measure(functions, about):
    """A page: every property of latents.PERSPECTIVES, or the reason why it is n/a."""
    page = {"properties": {}, "curves": {}, "choices": {}, "protocol": about}
    for perspective, function in (bar := tqdm(functions.items(), "properties")):
        bar.set_postfix_str(perspective)
        names, begin = latents.PERSPECTIVES[perspective], time.perf_counter()
        try:
            found = function()
        except InputError as reason:
            found = dict.fromkeys(names, str(reason))
        seconds = round(time.perf_counter() - begin, 2)
        if "choice" in found:
            page["choices"][perspective] = found["choice"]
        if "curve" in found:
            name, *page["curves"][name] = found["curve"]
        for name, (better, meaning) in names.items():
            value, beside = found[name] if isinstance(found[name], tuple) else (found[name], "")
            if isinstance(value, str) or not math.isfinite(value):
                value, beside = None, value if isinstance(value, str) else f"it is {value}"
            page["properties"][name] = {
                "value": value, "beside": beside, "better": better, "meaning": meaning,
                "perspective": perspective, "seconds": seconds}
    return page


# ------------------------------------------------------------------------------
# What is printed, and what is drawn.

ARROWS = {"higher": "↑", "lower": "↓", "": " "}


def written(row):
    return "n/a" if row["value"] is None else f"{row['value']:.4g}"


def show(page):
    """Value, better direction and meaning; seconds stand beside a perspective's name."""
    about = page["protocol"]
    print(f"\n{page['of']}: {about['images']} images of {about['data']}, of which"
          f" {about['decoded']} are decoded")
    for perspective, names in latents.PERSPECTIVES.items():
        rows = {name: page["properties"][name] for name in names}
        print(f"\n{perspective} ({max(row['seconds'] for row in rows.values()):.1f} s)")
        for name, row in rows.items():
            text = row["meaning"] + f" ({row['beside']})" * bool(row["beside"])
            print(f"  {name:24} {written(row):>9} {ARROWS[row['better']]}  {text}")
    print("\nWhat the paper leaves open:")
    for perspective, choice in page["choices"].items():
        print(f"  {perspective}: {choice}")


def compare(pages):
    """A table with a column for each tokenizer."""
    names = names_of(pages)
    width = max(12, *map(len, names)) + 1
    print("\n" + " " * 29 + "".join(f"{name:>{width}}" for name in names))
    for name, first in pages[0]["properties"].items():
        cells = [written(page["properties"][name]) for page in pages]
        print(f"  {name:24} {ARROWS[first['better']]} " + "".join(f"{c:>{width}}" for c in cells))


def names_of(pages):
    """The folder of each checkpoint as far as these differ, or its whole path."""
    short = [Path(page["of"]).absolute().parent.name for page in pages]
    return short if len({*short}) == len(pages) else [page["of"] for page in pages]


def plot(pages, path):
    """The properties that have a better direction, over their mean, and the curves."""
    from matplotlib.figure import Figure
    names, curves = names_of(pages), pages[0]["curves"]
    rows = {f"{name} {ARROWS[row['better']]}": [p["properties"][name]["value"] for p in pages]
            for name, row in pages[0]["properties"].items() if row["better"]}
    rows = {name: row for name, row in rows.items() if None not in row and min(row) > 0}
    figure = Figure((4 + 3.5 * len(curves), 9), layout="constrained")
    axes = figure.subplots(1, 1 + len(curves), squeeze=False)
    for k, (name, page) in enumerate(zip(names, pages)):
        ratios = [row[k] * len(row) / sum(row) for row in rows.values()]
        axes[0, 0].plot(ratios, range(len(rows)), "o", label=name)
        for axis, curve in zip(axes[0, 1:], curves):
            label, *points = page["curves"].get(curve, ["", [], []])
            axis.plot(*points, f"C{k}")
            axis.set(title=curve, xlabel=label)
            if curve == "length of steps":   # dashed, what VIV is at these times
                _, t, variance = page["curves"].get("variance of the velocity", ["", [], [1]])
                mean = sum(variance) / len(variance)
                axis.plot(t, [v / mean for v in variance][:len(t)], f"C{k}--")
    axes[0, 0].set(xscale="log", xlabel="value / mean of all", yticks=range(len(rows)),
                   yticklabels=rows)
    axes[0, 0].invert_yaxis()
    axes[0, 0].legend()
    axes[0, 0].grid(alpha=0.3)
    runtime.save_figure(figure, path, dpi=110)


def read_page(path):
    """A page that was written before."""
    page, names = runtime.read_json(path), sum(map(list, latents.PERSPECTIVES.values()), [])
    with contextlib.suppress(AttributeError, KeyError, TypeError):
        if ([*page["properties"]] == names and {"of", "protocol"} <= page.keys()
                and all(len(curve) == 3 for curve in page["curves"].values())):
            return page
    raise InputError(f"{path} is no page of this version: make it again")


@runtime.command
def main(argv=None):
    args = parse(argv)
    rt = runtime.start(args.device)
    if rt.world > 1 or rt.device.type == "mps":   # which has no float64
        raise InputError("one process makes the page, on --device cpu or cuda")
    runtime.exact_products()
    figure = args.out.with_suffix(".png")
    runtime.claim(rt, args.out.parent, args.out, *[figure] * bool(args.compare))
    pages = {path: read_page(path) if path.suffix == ".json" else None
             for path in args.compare or [args.tokenizer]}
    images = {pages[path]["protocol"].get("data_sha256") if pages[path] else
              data.fingerprint(load(path, args.data, args.size)[3]) for path in args.compare}
    if len(images) > 1:   # before the first is measured
        raise InputError(OTHERS)
    for path in [path for path, page in pages.items() if not page]:
        pages[path] = {"of": str(path)} | measure(*prepare(
            path, args.dit, args.data, args.masks, args.size, args.features, args.limit,
            args.decode, args.seed, args.at_once, args.workers, rt.device))
        show(pages[path])
    about = runtime.provenance(rt.device)
    pages = [*pages.values()]
    if not args.compare:
        runtime.write_json(args.out, pages[0] | about)
        return print(f"\nwrote {args.out}")
    same = "data", "size", "images", "decoded", "features", "data_sha256"
    if len({str([page["protocol"].get(key) for key in same]) for page in pages}) > 1:
        raise InputError(OTHERS)
    compare(pages)
    plot(pages, figure)
    runtime.write_json(args.out, {"pages": pages} | about)
    print(f"\nwrote {args.out} and {figure}")


if __name__ == "__main__":
    main()
