"""Sample images: integrate the velocity field from noise to latents (Eqs. 30, 31), decode them (Eq. 32).

    laptop       python sample.py                                            # from what train_dit.py left
    one GPU      python sample.py --count 10000 --steps 250 --compile
    eight GPUs   torchrun --nproc_per_node=8 sample.py --preset paper-1.70
    published    python sample.py --dit lightningdit.pt --tokenizer vavae.pt --latent-stats latents_stats.pt
                 --steps 249 --shift 0.3 --guidance 6.7 --interval 0.125 1 --cfg-channels 3

Guidance acts only while lo <= t <= hi with t = 1 at the data; outside one network alone is evaluated.  Noise
belongs to (seed, image, step): image i is the same picture for any batch size and any number of processes.

Writes samples.npz (arr_0 uint8 [N, H, W, 3] as the ADM evaluator reads it, arr_1 the labels), grid.png and
samples.json with the settings.  Killed at any moment, the same command goes on where it stopped, with any
number of processes, and ends with the same file.  Finished samples of other settings are replaced.
"""

import argparse
import itertools
import json
import time
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torchvision.utils import make_grid, save_image
from tqdm import tqdm

import data
import losses
import models
import runtime
from runtime import InputError, Runtime

# ------------------------------------------------------------------------------------------------------------
# Knobs.  A preset is a row of defaults; any flag overrides it.  The paper guides twice: for its best table
# (Sec. 5.3), and for the figures of supplement D.  It states neither a time shift nor how labels were drawn.

PRESETS: dict[str, dict[str, Any]] = {
    "plain": dict(count=1000, steps=50, guidance=1.0, interval=[0.0, 1.0]),
    "paper-1.70": dict(count=50_000, steps=250, guidance=1.70, interval=[0.21, 1.0]),
    "paper-1.45": dict(count=50_000, steps=250, guidance=1.45, interval=[0.13, 1.0]),
}
SMOKE = dict(count=5, steps=2, batch=3, dit=Path("runs/smoke/dit/checkpoint.pt"),
             out=Path("runs/smoke/samples"))
# What may differ when a run is resumed; files are compared by content.
FILES = ("dit", "tokenizer", "latent_stats", "guide")
FREE = {*FILES, "preset", "out", "trajectory", "device", "compile", "smoke"}


def parse(argv: list[str] | None) -> argparse.Namespace:
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0],
                                formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    p.add_argument("--preset", choices=PRESETS, default="plain",
                   help="defaults for count, steps, guidance, interval")
    p.add_argument("--dit", type=Path, default=Path("runs/dit/checkpoint.pt"),
                   help="checkpoint of train_dit.py, or a published LightningDiT or SiT")
    p.add_argument("--tokenizer", type=Path, help="checkpoint that decodes; default: the one the DiT names")
    p.add_argument("--latent-stats", type=Path,
                   help="for a published DiT: file of the latents' mean and std, [1, C, 1, 1] each")
    p.add_argument("--weights", choices=["ema", "model"], default="ema", help="averaged or last weights")
    p.add_argument("--out", type=Path, default=Path("runs/samples"), help="folder of samples.npz, grid.png")
    p.add_argument("--count", type=int, help="images in all")
    p.add_argument("--labels", choices=["balanced", "random"], default="balanced",
                   help="equal counts of every class in order of index, or drawn uniformly")
    p.add_argument("--batch", type=int, default=100, help="images per process at a time")
    p.add_argument("--seed", type=int, default=0, help="of noise and random labels")
    p.add_argument("--trajectory", type=int, default=0, metavar="N",
                   help="draw the paths of the first N images too: strip.png, trajectory.npz; 0 draws none")
    g = p.add_argument_group("integration")
    g.add_argument("--sampler", choices=["euler", "heun", "sde"], default="euler",
                   help="the ODE in first or second order, or SiT's SDE by Euler-Maruyama")
    g.add_argument("--steps", type=int, help="steps = evaluations of the velocity; heun: 2 steps - 1")
    g.add_argument("--shift", type=float, default=1.0, help="time shift; below 1: more steps near the noise")
    g.add_argument("--diffusion", choices=["sigma", "sbdm"], default="sigma",
                   help="w_t of the SDE: 1 - t or (1 - t) / t")
    g.add_argument("--last-step", type=float, default=0.04, help="length of the SDE's noiseless last step")
    g = p.add_argument_group("guidance")
    g.add_argument("--guidance", type=float, help="guidance scale; 1 is none")
    g.add_argument("--interval", type=float, nargs=2, metavar=("LO", "HI"),
                   help="times at which guidance acts, t = 1 at the data")
    g.add_argument("--cfg-channels", type=int, default=0, metavar="N",
                   help="guide the first N channels only: 3 for LightningDiT's published numbers; 0: all")
    g.add_argument("--guide", type=Path, help="autoguidance: checkpoint of a weaker DiT on the same latents, "
                   "with labels, in place of the unconditional branch")
    g = p.add_argument_group("running")
    g.add_argument("--device", default="auto", help="auto, cpu, cuda or mps")
    g.add_argument("--precision", choices=["auto", "fp32", "bf16"], default="auto",
                   help="autocast of the networks; auto is bf16 on CUDA; the state is always fp32")
    g.add_argument("--compile", action="store_true", help="torch.compile the transformer")
    g.add_argument("--smoke", action="store_true", help="a few images in a few steps")
    first, _ = p.parse_known_args(argv)
    p.set_defaults(**PRESETS[first.preset] | (SMOKE if first.smoke else {}))
    return p.parse_args(argv)


def check(args: argparse.Namespace) -> None:
    for name in ("count", "steps", "batch"):
        if getattr(args, name) < 1:
            raise InputError(f"--{name} must be at least 1, got {getattr(args, name)}")
    if args.shift <= 0:
        raise InputError(f"--shift must be positive, got {args.shift}")
    lo, hi = args.interval
    if not 0 <= lo <= hi <= 1:
        raise InputError(f"--interval takes 0 <= LO <= HI <= 1, got {lo} {hi}")
    if not 0 < args.last_step < 0.9:
        raise InputError(f"--last-step must be in (0, 0.9), got {args.last_step}")
    if args.guide and args.guidance == 1:
        raise InputError("--guide does nothing at --guidance 1; RAE guides with 1.42")
    if not 0 <= args.trajectory <= min(args.count, args.batch):
        raise InputError(f"--trajectory takes 0 to {min(args.count, args.batch)}, the smaller of --count and "
                         f"--batch, got {args.trajectory}")


# ------------------------------------------------------------------------------------------------------------
# The guided velocity field, the labels, the noise, and the integration from one to the other.

Network = Callable[[Tensor, Tensor, Tensor], Tensor]


def guided_velocity(dit: Network, y: Tensor, null: int, scale: float, interval: tuple[float, float],
                    channels: int = 0, guide: Network | None = None) -> losses.Velocity:
    """v_w + scale (v - v_w) while interval[0] <= t <= interval[1], v alone elsewhere or at scale 1.

    dit       (x [B, C, h, w], t [B], y [B]) -> v [B, C, h, w]
    guide     gives v_w from the same arguments; without one, v_w is the DiT's at the label `null`
    channels  how many are guided, the others take v, as in DiT's and LightningDiT's published code; 0: all

    Returns velocity_fn(x, t) for losses.euler and the others.  Where guidance acts, it costs an evaluation of
    2B rows, or of B rows by each network; elsewhere one of B rows.
    """
    lo, hi = interval

    def velocity_fn(x: Tensor, t: float) -> Tensor:
        times = x.new_full((len(x),), t)
        if scale == 1 or not lo <= t <= hi:
            return dit(x, times, y)
        if guide:
            v, weak = dit(x, times, y).float(), guide(x, times, y).float()
        else:
            labels = torch.cat([y, torch.full_like(y, null)])
            v, weak = dit(x.repeat(2, 1, 1, 1), times.repeat(2), labels).float().chunk(2)
        guided = weak + scale * (v - weak)
        return torch.cat([guided[:, :channels], v[:, channels:]], 1) if channels else guided

    return velocity_fn


def make_labels(count: int, classes: int, kind: str, seed: int) -> Tensor:
    """[count] labels: i mod classes (counts differ by at most one), or uniform draws of (seed)."""
    if kind == "balanced":
        return torch.arange(count) % classes
    return torch.randint(classes, (count,), generator=runtime.generator(seed, "sample labels"))


def noise_of(indices: list[int], shape: list[int], seed: int, *stream: int | str) -> Tensor:
    """[len(indices), *shape]: N(0, I) of image i from its own stream, drawn on the CPU for every device
    alike.  Without `stream` it is where the integration starts.
    """
    return torch.stack([torch.randn(shape, generator=runtime.generator(seed, "sample", i, *stream))
                        for i in indices])


def integrate(field: losses.Velocity, indices: list[int], shape: list[int], args: argparse.Namespace,
              device: torch.device, record: losses.Record | None = None) -> Tensor:
    """The latents [n, *shape] of these images, normalised, in fp32."""
    common = (field, noise_of(indices, shape, args.seed).to(device), args.steps, args.shift, record)
    if args.sampler == "sde":
        return losses.euler_maruyama(*common, diffusion=args.diffusion, last=args.last_step,
                                     noise_fn=lambda k: noise_of(indices, shape, args.seed, "sde", k))
    return losses.heun(*common) if args.sampler == "heun" else losses.euler(*common)


def evaluations(args: argparse.Namespace) -> dict[str, int]:
    """Of one image, by counting: of the velocity, and of networks (two where guidance acts)."""
    rows = []

    def network(x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        rows.append(len(x))
        return x

    field = guided_velocity(network, torch.zeros(1), 0, args.guidance, args.interval)
    integrate(field, [0], [1, 1, 1], args, torch.device("cpu"))
    return {"evaluations": len(rows), "network_evaluations": sum(rows)}


# ------------------------------------------------------------------------------------------------------------
# The networks.  A checkpoint of train_dit.py knows its tokenizer and the latents' statistics; to a published
# one both must be given.


def flags_of(checkpoint: dict) -> dict[str, Any]:
    """Of the training that wrote this checkpoint; none of a published file, whatever its config is."""
    return checkpoint["config"] if "kind" in checkpoint else {}


def open_tokenizer(checkpoint: dict, channels: int,
                   args: argparse.Namespace) -> tuple[models.Tokenizer, dict]:
    """The tokenizer of the DiT, and what is in its file.  Sets args.tokenizer where it was left out."""
    named = checkpoint.get("tokenizer")
    if not (named or args.tokenizer):
        raise InputError(f"{args.dit} names no tokenizer: give --tokenizer and --latent-stats for a "
                         "published DiT, or a checkpoint of train_dit.py")
    args.tokenizer = args.tokenizer or Path(named["path"])
    autoencoder, tokenizer = models.load_autoencoder(args.tokenizer)
    if named and runtime.file_sha256(args.tokenizer) != named["sha256"]:
        raise InputError(f"{args.tokenizer} is not the tokenizer that {args.dit} was trained with: give that "
                         "one with --tokenizer, or train the DiT again")
    if autoencoder.channels != channels:
        raise InputError(f"{args.tokenizer} has latents of {autoencoder.channels} channels, {args.dit} of "
                         f"{channels}")
    return autoencoder, tokenizer


def latent_statistics(checkpoint: dict, channels: int, args: argparse.Namespace) -> tuple[Tensor, Tensor]:
    """mean, std: [C] of the latents that the DiT was trained on, from its checkpoint or --latent-stats."""
    known = "latent_mean" in checkpoint
    if known == bool(args.latent_stats):
        raise InputError(f"{args.dit} holds the statistics of its latents: leave out --latent-stats" if known
                         else f"{args.dit} does not hold the statistics of its latents: give --latent-stats")
    if known:
        return checkpoint["latent_mean"], checkpoint["latent_std"]
    stats = models.read_checkpoint(args.latent_stats)
    mean, std = (torch.as_tensor(stats.get(key, [])).float().flatten() for key in ("mean", "std"))
    if not len(mean) == len(std) == channels or not (std > 0).all():
        raise InputError(f"{args.latent_stats} must hold mean and std, {channels} numbers each, std positive")
    return mean, std


def open_guide(dit: models.DiT, checkpoint: dict, args: argparse.Namespace) -> models.DiT:
    """--guide, a DiT on the same latents with the same classes."""
    guide, other = models.load_dit(args.guide, args.weights)
    for key in ("in_channels", "input_size", "num_classes"):
        if guide.config[key] != dit.config[key]:
            raise InputError(f"{args.guide} cannot guide {args.dit}: its {key} is {guide.config[key]}, not "
                             f"{dit.config[key]}")
    if other.get("tokenizer", {}).get("sha256") != checkpoint.get("tokenizer", {}).get("sha256"):
        raise InputError(f"{args.guide} cannot guide {args.dit}: it was trained with another tokenizer")
    return guide


class Sampler:
    """latents(indices) -> z [n, C, h, w], normalised; decode(z) -> uint8 [n, 3, H, W] on the CPU."""

    def __init__(self, args: argparse.Namespace, rt: Runtime) -> None:
        self.args, self.device = args, rt.device
        with runtime.input_errors():
            dit, checkpoint = models.load_dit(args.dit, args.weights)
            channels, side = dit.config["in_channels"], dit.config["input_size"]
            self.autoencoder, tokenizer = open_tokenizer(checkpoint, channels, args)
            mean, std = latent_statistics(checkpoint, channels, args)
            guide = open_guide(dit, checkpoint, args) if args.guide else None
        if not 0 <= args.cfg_channels <= channels:
            raise InputError(f"--cfg-channels takes 0 to {channels}, the channels of the latent, got "
                             f"{args.cfg_channels}")
        self.autoencoder.to(rt.device)
        self.mean, self.std = mean.to(rt.device), std.to(rt.device)
        self.shape, self.size = [channels, side, side], side * self.autoencoder.stride
        self.facts = {"dit_steps": checkpoint.get("step"), "data": flags_of(checkpoint).get("data"),
                      "data_seed": flags_of(tokenizer).get("seed", 0), "size": self.size}
        self.classes = dit.config["num_classes"]
        self.labels = make_labels(args.count, self.classes, args.labels, args.seed)
        self.autocast = lambda: rt.autocast(args.precision)
        self.dit, self.guide = self.network(dit), self.network(guide) if guide else None

    def network(self, dit: nn.Module) -> Network:
        dit.to(self.device)
        compiled = torch.compile(dit) if self.args.compile else dit

        def velocity(x: Tensor, t: Tensor, y: Tensor) -> Tensor:
            with self.autocast():
                return compiled(x, t, y)

        return velocity

    @torch.no_grad()
    def latents(self, indices: list[int], record: losses.Record | None = None) -> Tensor:
        args, y = self.args, self.labels[indices].to(self.device)
        field = guided_velocity(self.dit, y, self.classes, args.guidance, args.interval, args.cfg_channels,
                                self.guide)
        return integrate(field, indices, self.shape, args, self.device, record)

    @torch.no_grad()
    def decode(self, z: Tensor) -> Tensor:
        with self.autocast():
            x_hat = self.autoencoder.decode(models.denormalize(z.to(self.device), self.mean, self.std))
        return data.to_uint8(x_hat).cpu()


# ------------------------------------------------------------------------------------------------------------
# Parts.  Each batch of images is one file in --out's .parts, written at once, beside the settings that made
# it.  The processes share out the parts that are missing; when none is, they become samples.npz one by one.


@contextmanager
def atomic(path: Path) -> Iterator[Path]:
    """A temporary name to write to, renamed to `path` at the end."""
    temporary = path.with_name(f".{path.name}")
    yield temporary
    temporary.replace(path)


def settings_of(sampler: Sampler, args: argparse.Namespace) -> dict[str, Any]:
    """All that decides what the images are.  Two runs with equal settings make the same images."""
    files = {f"{name}_sha256": getattr(args, name) and runtime.file_sha256(getattr(args, name))
             for name in FILES}
    precision = "fp32" if isinstance(sampler.autocast(), nullcontext) else "bf16"
    return {k: v for k, v in runtime.plain(args).items() if k not in FREE} | files | {"precision": precision}


def read_json(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text()) if path.exists() else {}


def begin(settings: dict[str, Any], parts: Path, rt: Runtime) -> None:
    """The folder of parts with its settings, new or of an interrupted run.  InputError if those differ."""
    path = parts / "settings.json"
    if rt.is_main and not path.exists():
        with runtime.input_errors():
            parts.mkdir(parents=True, exist_ok=True)
        with atomic(path) as temporary:
            temporary.write_text(json.dumps(settings, indent=1) + "\n")
    runtime.barrier()
    runtime.check_config(read_json(path), settings, set(), parts)


def draw_parts(sampler: Sampler, parts: Path, args: argparse.Namespace, rt: Runtime) -> None:
    """This process's share of the parts that are not there yet, each named after its first image."""
    files = {start: parts / f"{start:08d}.npy" for start in range(0, args.count, args.batch)}
    missing = [start for start, file in files.items() if not file.exists()]
    runtime.barrier()   # everybody has looked before anybody writes
    rt.print(f"{len(missing)} of {len(files)} parts to draw")
    for start in tqdm(missing[rt.rank::rt.world], disable=not rt.is_main, desc="samples", unit="part"):
        images = sampler.decode(sampler.latents(list(range(start, min(start + args.batch, args.count)))))
        with atomic(files[start]) as temporary:
            np.save(temporary, images.permute(0, 2, 3, 1).contiguous().numpy())
    runtime.barrier()


def write_npz(path: Path, parts: list[Path], shape: tuple[int, ...], labels: Tensor) -> None:
    """What np.savez(path, arr_0=images, arr_1=labels) writes, one part in memory at a time."""
    header = {"descr": "|u1", "fortran_order": False, "shape": shape}
    with atomic(path) as temporary, zipfile.ZipFile(temporary, "w") as archive:
        with archive.open("arr_0.npy", "w", force_zip64=True) as file:
            np.lib.format.write_array_header_1_0(file, header)
            for part in parts:
                file.write(np.load(part).tobytes())
        with archive.open("arr_1.npy", "w") as file:
            np.lib.format.write_array(file, labels.numpy())


def finish(sampler: Sampler, parts: Path, facts: dict[str, Any], args: argparse.Namespace) -> None:
    """From the parts samples.npz, grid.png (up to ten classes, eight of each) and samples.json; no parts."""
    files, labels = sorted(parts.glob("0*.npy")), sampler.labels
    write_npz(args.out / "samples.npz", files, (args.count, sampler.size, sampler.size, 3), labels)
    shown = [i for c in range(min(sampler.classes, 10)) for i in (labels == c).nonzero()[:8, 0].tolist()]
    images = np.stack([np.load(files[i // args.batch], mmap_mode="r")[i % args.batch] for i in shown or [0]])
    with atomic(args.out / "grid.png") as temporary:
        save_image(make_grid(torch.from_numpy(images).permute(0, 3, 1, 2) / 255, nrow=8), temporary)
    with atomic(args.out / "samples.json") as temporary:
        temporary.write_text(json.dumps(facts, indent=1) + "\n")
    remove(parts)


def remove(parts: Path) -> None:
    """The settings last ("s" sorts behind digits), so that there are never parts without them."""
    for path in sorted(parts.glob("*")):
        path.unlink()
    parts.rmdir()


# ------------------------------------------------------------------------------------------------------------
# Paths from noise to data, at eleven times: the state x_t, and the data x_t + (1 - t) v that it promises.


def trajectory(sampler: Sampler, count: int, steps: int, out: Path) -> None:
    """trajectory.npz: times [K], latents and predictions [K, count, C, h, w] (normalised), labels [count].

    strip.png: two rows for each image, its decoded states and under them the decoded predictions.
    """
    kept, frames, step = {round(k * steps / 10) for k in range(11)}, [], itertools.count()

    def record(t: float, x: Tensor, predicted: Tensor) -> None:
        if next(step) in kept:
            frames.append((t, x.cpu(), predicted.cpu()))

    sampler.latents(list(range(count)), record)
    times, states, predictions = zip(*frames)
    with atomic(out / "trajectory.npz") as temporary:
        np.savez(temporary, times=np.array(times), latents=torch.stack(states).numpy(),
                 predictions=torch.stack(predictions).numpy(), labels=sampler.labels[:count].numpy())
    rows = torch.stack([torch.stack([sampler.decode(z) for z in row]) for row in (states, predictions)])
    pictures = rows.permute(2, 0, 1, 3, 4, 5).flatten(0, 2)                  # [count, 2, K, 3, H, W], flat
    with atomic(out / "strip.png") as temporary:
        save_image(make_grid(pictures / 255, nrow=len(times)), temporary)


@runtime.command
def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    check(args)
    rt = runtime.start(args.device)
    begun, sampler = time.time(), Sampler(args, rt)
    settings, parts, npz = settings_of(sampler, args), args.out / ".parts", args.out / "samples.npz"
    made = read_json(args.out / "samples.json") if npz.exists() else {}
    if settings == {name: made.get(name) for name in settings}:
        rt.print(f"{npz} is already there, made with these settings")
        if rt.is_main and read_json(parts / "settings.json") == settings:
            remove(parts)   # a kill came between the file and the cleaning up
    else:
        begin(settings, parts, rt)
        counts = evaluations(args)
        rt.print(f"{args.count} images of {sampler.classes} classes, {args.sampler} in {args.steps} steps, "
                 f"{counts['network_evaluations']} network evaluations each, guidance {args.guidance:g}, "
                 f"{rt.world} process(es) on {runtime.device_name(rt.device)}")
        draw_parts(sampler, parts, args, rt)
        if rt.is_main:
            finish(sampler, parts, runtime.plain(args) | settings | counts | sampler.facts | {
                "command": runtime.command_line(), "versions": runtime.versions(), "processes": rt.world,
                "device": runtime.device_name(rt.device), "seconds": round(time.time() - begun, 1)}, args)
            print(f"wrote {npz} and {args.out / 'grid.png'}")
    if args.trajectory and rt.is_main:
        trajectory(sampler, args.trajectory, args.steps, args.out)
        print(f"wrote {args.out / 'trajectory.npz'} and {args.out / 'strip.png'}")
    runtime.barrier()


if __name__ == "__main__":
    main()
