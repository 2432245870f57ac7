"""Sample images: integrate the velocity field from noise to latents (Eqs. 30, 31), decode them (Eq. 32).

    laptop       python sample.py                                            # from what train_dit.py left
    one GPU      python sample.py --count 10000 --steps 250
    eight GPUs   torchrun --nproc_per_node=8 sample.py --count 50000 --steps 250 --guidance 1.7 --interval
    0.21 1

N steps are N evaluations of the network.  Guidance acts on all channels, and only while lo <= t <= hi with t
= 1 at the data; outside the interval the unconditional branch is not computed.  Image i starts from the noise
of (seed, i): it is the same picture for any batch size and any number of processes.

Writes samples.npz (arr_0 uint8 [N, H, W, 3] as the ADM evaluator reads it, arr_1 the labels), grid.png and
samples.json with the settings.
"""

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torchvision.utils import make_grid, save_image
from tqdm import tqdm

import data
import losses
import models
import runtime
from runtime import InputError, Runtime

# ------------------------------------------------------------------------------------------------------------
# Knobs.

SMOKE = dict(count=5, steps=2, batch=3, dit=Path("runs/smoke/dit/checkpoint.pt"),
             out=Path("runs/smoke/samples"))


def parse(argv: list[str] | None) -> argparse.Namespace:
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0],
                                formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    p.add_argument("--dit", type=Path, default=Path("runs/dit/checkpoint.pt"),
                   help="checkpoint of train_dit.py")
    p.add_argument("--tokenizer", type=Path, help="checkpoint that decodes; default: the one the DiT names")
    p.add_argument("--weights", choices=["ema", "model"], default="ema", help="averaged or last weights")
    p.add_argument("--out", type=Path, default=Path("runs/samples"), help="folder of samples.npz, grid.png")
    p.add_argument("--count", type=int, default=1000, help="images in all (the paper: 10,000 and 50,000)")
    p.add_argument("--steps", type=int, default=50, help="Euler steps = evaluations (the paper: 250)")
    p.add_argument("--shift", type=float, default=1.0, help="time shift; below 1: more steps near the noise")
    p.add_argument("--guidance", type=float, default=1.0, help="classifier-free guidance scale; 1 is none")
    p.add_argument("--interval", type=float, nargs=2, default=(0.0, 1.0), metavar=("LO", "HI"),
                   help="times at which guidance acts, t = 1 at the data (the paper: 0.21 1)")
    p.add_argument("--labels", choices=["balanced", "random"], default="balanced",
                   help="equal counts of every class in order of index, or drawn uniformly")
    p.add_argument("--batch", type=int, default=100, help="images per process at a time")
    p.add_argument("--seed", type=int, default=0, help="of noise and random labels")
    p.add_argument("--device", default="auto", help="auto, cpu, cuda or mps")
    p.add_argument("--precision", choices=["auto", "fp32", "bf16"], default="auto",
                   help="autocast of the networks; auto is bf16 on CUDA; the state is always fp32")
    p.add_argument("--smoke", action="store_true", help="a few images in a few steps")
    first, _ = p.parse_known_args(argv)
    p.set_defaults(**SMOKE if first.smoke else {})
    return p.parse_args(argv)


# ------------------------------------------------------------------------------------------------------------
# The guided velocity field, and the labels.


def guided_velocity(dit: Callable[[Tensor, Tensor, Tensor], Tensor], y: Tensor, null: int, scale: float,
                    interval: tuple[float, float]) -> Callable[[Tensor, float], Tensor]:
    """v_u + scale (v_c - v_u) while interval[0] <= t <= interval[1], v_c alone elsewhere or at scale 1.

    dit: (x [B, C, h, w], t [B], y [B]) -> v [B, C, h, w]; y: [B]; null: the label of v_u.
    Returns velocity_fn(x, t) for losses.euler; one evaluation of 2B rows where guidance acts, of B rows
    elsewhere.
    """
    lo, hi = interval
    nulls = torch.full_like(y, null)

    def velocity_fn(x: Tensor, t: float) -> Tensor:
        if scale == 1 or not lo <= t <= hi:
            return dit(x, x.new_full((len(x),), t), y)
        both = dit(torch.cat([x, x]), x.new_full((2 * len(x),), t), torch.cat([y, nulls]))
        conditional, unconditional = both.float().chunk(2)
        return unconditional + scale * (conditional - unconditional)

    return velocity_fn


def make_labels(count: int, classes: int, kind: str, seed: int) -> Tensor:
    """[count] labels: i mod classes (counts differ by at most one), or uniform draws of (seed)."""
    if kind == "balanced":
        return torch.arange(count) % classes
    return torch.randint(classes, (count,), generator=runtime.generator(seed, "sample labels"))


def noise_of(indices: list[int], shape: list[int], seed: int) -> Tensor:
    """[len(indices), *shape]: N(0, I) of image i from its own stream, drawn on the CPU for every device
    alike.
    """
    return torch.stack([torch.randn(shape, generator=runtime.generator(seed, "sample", i)) for i in indices])


# ------------------------------------------------------------------------------------------------------------
# Rank r makes images r, r + world, ...  No image is made twice, none is made to be thrown away.


@torch.no_grad()
def sample(dit: models.DiT, autoencoder: models.Tokenizer, checkpoint: dict, labels: Tensor,
           args: argparse.Namespace, rt: Runtime) -> np.ndarray:
    """This rank's images, uint8 [n, H, W, 3], for indices rank, rank + world, ..."""
    mine = list(range(rt.rank, args.count, rt.world))
    mean, std = checkpoint["latent_mean"].to(rt.device), checkpoint["latent_std"].to(rt.device)
    images = []

    def network(x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        with rt.autocast(args.precision):
            return dit(x, t, y)

    with tqdm(total=len(mine), disable=not rt.is_main, desc="samples", unit="image") as bar:
        for start in range(0, len(mine), args.batch):
            indices = mine[start:start + args.batch]
            z = noise_of(indices, checkpoint["latent_shape"], args.seed).to(rt.device)
            y = labels[indices].to(rt.device)
            field = guided_velocity(network, y, len(checkpoint["classes"]), args.guidance, args.interval)
            z = losses.euler(field, z, args.steps, args.shift)
            with rt.autocast(args.precision):
                x_hat = autoencoder.decode(models.denormalize(z, mean, std))
            images.append(data.to_uint8(x_hat).permute(0, 2, 3, 1).cpu().numpy())
            bar.update(len(indices))
    return np.concatenate(images) if images else np.empty((0,), np.uint8)


def collect(images: np.ndarray, args: argparse.Namespace, rt: Runtime) -> np.ndarray | None:
    """All images in order of index on rank 0, None elsewhere: through files, which hold 50,000 more
    easily.
    """
    if rt.world == 1:
        return images
    args.out.mkdir(parents=True, exist_ok=True)
    part = args.out / f".part{rt.rank}.npy"
    np.save(part, images)
    runtime.barrier()
    if not rt.is_main:
        return None
    parts = [np.load(args.out / f".part{r}.npy", mmap_mode="r") for r in range(rt.world)]
    everything = np.empty((args.count, *parts[0].shape[1:]), np.uint8)
    for r, rows in enumerate(parts):
        if len(rows):   # none where there are more processes than images
            everything[r::rt.world] = rows
        (args.out / f".part{r}.npy").unlink()
    return everything


def write(images: np.ndarray, labels: Tensor, settings: dict, args: argparse.Namespace, classes: int) -> None:
    """samples.npz, grid.png (up to ten classes, eight of each) and samples.json, each under its final name
    at once.
    """
    args.out.mkdir(parents=True, exist_ok=True)
    temporary = args.out / ".samples.tmp"
    with open(temporary, "wb") as file:
        np.savez(file, arr_0=images, arr_1=labels.numpy())
    temporary.replace(args.out / "samples.npz")
    (args.out / "samples.json").write_text(json.dumps(settings, indent=1) + "\n")
    shown = [i for c in range(min(classes, 10)) for i in (labels == c).nonzero()[:8, 0].tolist()]
    pictures = torch.from_numpy(images[shown or [0]]).permute(0, 3, 1, 2).float() / 255
    save_image(make_grid(pictures, nrow=8, padding=2), args.out / "grid.png")


def check(args: argparse.Namespace) -> None:
    for name in ("count", "steps", "batch"):
        if getattr(args, name) < 1:
            raise InputError(f"--{name} must be at least 1, got {getattr(args, name)}")
    if args.shift <= 0:
        raise InputError(f"--shift must be positive, got {args.shift}")
    lo, hi = args.interval
    if not 0 <= lo <= hi <= 1:
        raise InputError(f"--interval takes 0 <= LO <= HI <= 1, got {lo} {hi}")


@runtime.command
def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    check(args)
    rt = runtime.start(args.device)
    with runtime.input_errors():
        dit, checkpoint = models.load_dit(args.dit, args.weights)
        if "tokenizer" not in checkpoint:
            raise InputError(f"{args.dit} names no tokenizer; it is no checkpoint of train_dit.py")
        args.tokenizer = args.tokenizer or Path(checkpoint["tokenizer"]["path"])
        autoencoder, tokenizer = models.load_autoencoder(args.tokenizer)
    if runtime.file_sha256(args.tokenizer) != checkpoint["tokenizer"]["sha256"]:
        raise InputError(f"{args.tokenizer} is not the tokenizer that {args.dit} was trained with: give that "
                         "one with --tokenizer, or train the DiT again")
    dit.to(rt.device)
    autoencoder.to(rt.device)
    classes = checkpoint["classes"]
    labels = make_labels(args.count, len(classes), args.labels, args.seed)
    rt.print(f"{args.count} images of {len(classes)} classes, {args.steps} Euler steps, "
             f"guidance {args.guidance:g}, {rt.world} process(es) on {runtime.device_name(rt.device)}")
    begin = time.time()
    images = collect(sample(dit, autoencoder, checkpoint, labels, args, rt), args, rt)
    if images is not None:
        settings = {"command": runtime.command_line(), "dit": str(args.dit), "tokenizer": str(args.tokenizer),
                    "dit_steps": checkpoint["step"], "data": checkpoint["config"]["data"],
                    "size": tokenizer["config"]["size"], "data_seed": tokenizer["config"]["seed"],
                    "count": args.count, "steps": args.steps, "shift": args.shift, "guidance": args.guidance,
                    "interval": list(args.interval), "labels": args.labels, "seed": args.seed,
                    "weights": args.weights, "precision": args.precision, "versions": runtime.versions(),
                    "device": runtime.device_name(rt.device), "seconds": round(time.time() - begin, 1)}
        write(images, labels, settings, args, len(classes))
        print(f"wrote {args.out / 'samples.npz'} {images.shape} and {args.out / 'grid.png'}")
    runtime.barrier()


if __name__ == "__main__":
    main()
