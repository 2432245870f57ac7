"""What does each property of a latent space cost?  Nothing here needs a decoder.

    laptop   python -m studies.diffusability_benchmark                 # the paper's size
             python -m studies.diffusability_benchmark --count 5000    # a tenth of it
             python -m studies.diffusability_benchmark --smoke

The latents are synthetic: 50 of every class, smooth fields around the mean of the
class, 32 x 16 x 16.  It prints the seconds of each property, of all of them, and
the most memory that the process has held.
"""

import json
import resource
import sys
import time
from collections.abc import Callable
from typing import Any

import runtime  # before torch, which it tells how threads wait

import torch
from torch import Tensor
from tqdm import tqdm

import latents
from latents import Standardised

PER_CLASS = 50   # as in the validation set of ImageNet
SMOKE = dict(count=400, channels=4, side=4)


def synthetic(count: int, channels: int, side: int, noise: float) -> tuple[Tensor, Tensor]:
    """Latents [count, channels, side, side] and labels [count], made class by class."""
    order = torch.arange(side)[:, None] + torch.arange(side)
    root, down = 1 / (1 + order.float()), latents.dct_matrix(side).float()
    labels = torch.arange(count) // PER_CLASS
    raw = torch.empty(count, channels, side, side)
    for y in tqdm(range(int(labels[-1]) + 1), "synthetic latents", leave=False):
        g = runtime.generator(0, "synthetic", y)
        rows = raw[y * PER_CLASS:(y + 1) * PER_CLASS]
        z = torch.randn(rows.shape, generator=g) + torch.randn(rows.shape[1:], generator=g)
        rows[:] = down.T @ (root * z) @ down + noise * torch.randn(rows.shape, generator=g)
    return raw, labels


def jobs(z: Standardised, samples: Standardised, labels: Tensor, masks: Tensor,
         device: torch.device) -> dict[str, Callable[[], Any]]:
    """What is timed; the fit of the classes is kept for those after it."""
    classes: list[latents.ClassGaussian] = []

    def draw(*names: Any) -> torch.Generator:
        return runtime.generator(0, *names)

    def ambiguity() -> Any:
        draws = min(2000, max(100, 40_000 // len(classes)))
        return latents.label_ambiguity(classes, draws, draw("labels"))

    def layout() -> Any:
        vectors = latents.one_position(z, latents.POINTS, draw("t-SNE"))
        return latents.evenness(latents.density(latents.tsne(vectors)))

    def neighbours() -> Any:
        some = z.raw[:10_000]
        own = torch.arange(min(1000, len(some)))
        return latents.nearest(some[own], some, 10, own)

    def probe() -> Any:
        f = latents.pool(z)
        few = torch.arange(0, len(f), max(2, len(f) // 10_000))   # as in diffusability.py
        return latents.linear_probe(f[few], labels[few], f, labels)

    return {
        "VIV": lambda: classes.extend(latents.fit_classes(z, labels)),
        "VIV of samples": lambda: latents.mean_over(
            latents.fit_classes(samples, labels), latents.viv),
        "VIV, stationary": lambda: latents.mean_over(
            latents.fit_classes(z, labels, True), latents.viv),
        "VIV without labels": ambiguity,
        "rank of channels": lambda: latents.channel_covariance(z),
        "LNC": lambda: latents.neighbour_consistency(latents.pool(z), labels, [5, 10]),
        "LNC, foreground": lambda: latents.neighbour_consistency(
            latents.pool(z, masks), labels, [10]),
        "linear probe": probe,
        "LDS, CDS, RMSC": lambda: latents.spatial_structure(z),
        "LDS, CDS, RMSC, SRSS": lambda: latents.spatial_structure(z, masks),
        "SEC": lambda: latents.spectral_energy(z),
        "neighbours of iFID": neighbours,
        "neighbour spacing": lambda: latents.neighbour_spacing(
            latents.one_position(z, 10_000, draw("positions"))),
        "t-SNE and density": layout}


@torch.no_grad()
def measure(count: int, channels: int, side: int, device: torch.device) -> dict[str, Any]:
    raw, labels = synthetic(count, channels, side, 0.0)
    noisy = torch.randn(raw.shape, generator=runtime.generator(0, "noise")).mul_(0.2).add_(raw)
    masks = torch.rand(count, 1, side, generator=runtime.generator(0, "masks")) < 0.5
    masks = masks.expand(-1, side, -1)
    begin = time.perf_counter()
    z, samples = Standardised(raw, device), Standardised(noisy, device)
    seconds = {"statistics": time.perf_counter() - begin}
    for name, job in (bar := tqdm(jobs(z, samples, labels, masks, device).items(), "properties")):
        bar.set_postfix_str(name)
        begin = time.perf_counter()
        job()
        if device.type == "cuda":
            torch.cuda.synchronize()
        seconds[name] = time.perf_counter() - begin
    # Linux counts in KiB, and macOS in bytes.
    held = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2 ** (
        30 if sys.platform == "darwin" else 20)
    return {"seconds": {name: round(value, 3) for name, value in seconds.items()},
            "seconds of all": round(sum(seconds.values()), 1), "peak memory in GiB": round(held, 2)}


@runtime.command
def main(argv: list[str] | None = None) -> None:
    p = runtime.Parser(__doc__)
    add, number = p.add_argument, runtime.positive_int
    add("--count", type=number, default=50_000, help="latents, 50 of each class")
    add("--channels", type=number, default=32, help="channels of the latents")
    add("--side", type=number, default=16, help="positions along a side")
    add("--device", default="auto", help="auto, cpu, cuda or mps")
    add("--smoke", action="store_true", help="tiny latents, in seconds")
    args = p.parse(argv, smoke=SMOKE)
    if args.count < 2 * PER_CLASS or args.side < 2:
        raise runtime.InputError(f"it needs --count {2 * PER_CLASS} or more, and --side 2 or more")
    rt = runtime.start(args.device)
    print(json.dumps({
        "settings": runtime.plain(args), **runtime.provenance(rt.device),
        **measure(args.count, args.channels, args.side, rt.device)}, indent=1))


if __name__ == "__main__":
    main()
