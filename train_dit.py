"""Train a diffusion transformer in the latent space of a tokenizer, by flow matching (Eq. 4).

    laptop       python train_dit.py                                         # on what train_tokenizer.py left
    one GPU      python train_dit.py --preset lightningdit-b --accumulate 8 --data imagenet
    eight GPUs   torchrun --nproc_per_node=8 train_dit.py --preset lightningdit-b --data imagenet
    the best     torchrun --nproc_per_node=4 train_dit.py --preset lightningdit-xl-sota --data imagenet

x_t = (1 - t) eps + t z with t = 1 at the data; the network predicts z - eps.  t is logit-normal, the loss the
squared error plus LightningDiT's cosine term, and a tenth of the labels is dropped for guidance.  Posteriors
are encoded once, into --cache; z is drawn anew in every step and normalised per channel.

Killed at any moment, the same command goes on from runs/dit/checkpoint.pt and ends with the same numbers.
"""

import argparse
import copy
import math
import re
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

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
# Knobs.  A preset is a row of defaults; any flag overrides it.  The paper's are from Tables 1 and 4, whose
# "DiT" is the vanilla network, trained as SiT with uniform t and the squared error alone.


def epochs(count: int, batch: int) -> int:
    """Steps of `count` epochs of ImageNet's 1,281,167 images, the incomplete batch of each dropped."""
    return count * (1_281_167 // batch)


LIGHTNINGDIT_B = dict(model="B", batch=1024, lr=2e-4, steps=epochs(80, 1024), ema=0.9999)
PRESETS: dict[str, dict[str, Any]] = {
    "demo": dict(model="demo", batch=32, lr=1e-3, steps=3000, ema=0.999),
    "lightningdit-b": LIGHTNINGDIT_B,
    "lightningdit-b-plus": LIGHTNINGDIT_B | dict(steps=epochs(160, 1024)),
    "dit-b": LIGHTNINGDIT_B | dict(family="sit", t="uniform", cosine_weight=0.0),
    "lightningdit-xl-sota": dict(model="XL", optimizer="muon", batch=768, lr=1.8e-4,
                                 steps=epochs(530, 768), ema=0.9999),
}
FREE = {"steps", "log_every", "save_every", "image_every", "grid_steps", "workers", "device", "out", "smoke",
        "accumulate", "activation_checkpointing", "compile", "shard", "export"}
SMOKE = dict(steps=4, batch=4, log_every=1, save_every=2, image_every=4, grid_steps=1, workers=0,
             out=Path("runs/smoke/dit"), cache=None)
BINS = 10     # of t, for the logged loss
ENCODE = 64   # images the tokenizer takes at a time


def shift(text: str) -> float | str:
    """The argument of --t-shift."""
    return text if text == "auto" else float(text)


def parse(argv: list[str] | None) -> argparse.Namespace:
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0],
                                formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    p.add_argument("--preset", choices=PRESETS, default="demo",
                   help="defaults for model, family, optimizer, batch, lr, steps, ema, t and cosine weight")
    p.add_argument("--tokenizer", type=Path, help="checkpoint of train_tokenizer.py; default: "
                   "runs/tokenizer/checkpoint.pt, with --latents none, and then no pictures")
    p.add_argument("--data", help="'shapes', 'cifar10' or a folder; default: the tokenizer's")
    p.add_argument("--latents", type=Path, metavar="DIR",
                   help="train on the latents_*.safetensors that LightningDiT extracted to DIR, on no images")
    p.add_argument("--cache", type=Path, default=Path("runs/latents"),
                   help="folder for the latents of --data, encoded once: centre crop and its mirror image")
    p.add_argument("--no-cache", dest="cache", action="store_const", const=None,
                   help="encode random crops in every step, as always for the endless 'shapes'")
    p.add_argument("--latent", choices=["sample", "mean"], default="sample",
                   help="what is learned: draws of z, as the decoder was trained, or the posterior's mean")
    p.add_argument("--model", choices=models.DITS, help="row of models.DITS")
    p.add_argument("--family", choices=["lightningdit", "sit"], default="lightningdit",
                   help="the kind of block; sit is the vanilla network of DiT and SiT")
    p.add_argument("--patch", type=int, choices=[1, 2], default=1, help="side of a token in latent positions")
    p.add_argument("--qk-norm", action=argparse.BooleanOptionalAction, default=False,
                   help="RMS-normalise queries and keys")
    p.add_argument("--out", type=Path, default=Path("runs/dit"), help="folder of checkpoint and log")
    p.add_argument("--export", type=Path, metavar="FILE",
                   help="train nothing: write the weights of the run in --out as a LightningDiT (or SiT) "
                   "checkpoint, and latents_stats.pt beside it")
    g = p.add_argument_group("optimisation (constant rate after a linear warm-up)")
    g.add_argument("--optimizer", choices=["adamw", "muon"], default="adamw",
                   help="AdamW with betas 0.9 and 0.95; or Muon for the blocks' matrices, AdamW for the rest")
    g.add_argument("--muon-split", action=argparse.BooleanOptionalAction, default=True,
                   help="muon: take q, k, v and SwiGLU's two inputs for matrices of their own")
    g.add_argument("--steps", type=int, help="optimiser steps in all")
    g.add_argument("--batch", type=int, help="images per step, over all processes")
    g.add_argument("--accumulate", type=int, default=1, help="parts in which a process takes its batch")
    g.add_argument("--lr", type=float, help="learning rate of both optimisers, used as it is")
    g.add_argument("--warmup", type=int, default=100, help="steps of linear warm-up")
    g.add_argument("--weight-decay", type=float, default=0.0, help="of both optimisers, decoupled")
    g.add_argument("--clip", type=float, default=1.0, help="largest gradient norm")
    g.add_argument("--ema", type=float, help="decay of the averaged weights, reached by a ramp")
    g.add_argument("--t", choices=["logit-normal", "uniform"], default="logit-normal", help="how t is drawn")
    g.add_argument("--t-shift", type=shift, default=1.0, help="then t -> s t / (1 + (s - 1) t), below 1 "
                   "towards the noise; auto: s = sqrt(4096 / d) for latents of d = C h w numbers, as RAE")
    g.add_argument("--cosine-weight", type=float, default=1.0, help="weight of 1 - cos(v_hat, v)")
    g.add_argument("--label-dropout", type=float, default=0.1, help="share of labels set to the null label")
    g = runtime.add_running_flags(p, image_every=1000)
    g.add_argument("--grid-steps", type=int, default=25, help="Euler steps of the sample grids")
    g.add_argument("--activation-checkpointing", action="store_true",
                   help="keep no activations of the blocks: less memory, a second forward")
    g.add_argument("--compile", action="store_true", help="torch.compile the blocks")
    g.add_argument("--shard", action="store_true",
                   help="FSDP2: spread parameters, gradients and optimisers over the processes")
    first, _ = p.parse_known_args(argv)
    p.set_defaults(**PRESETS[first.preset] | (SMOKE if first.smoke else {}))
    args = p.parse_args(argv)
    if not (args.tokenizer or args.latents):
        args.tokenizer = Path("runs/smoke" if args.smoke else "runs") / "tokenizer" / "checkpoint.pt"
    return args


# ------------------------------------------------------------------------------------------------------------
# Muon (Jordan et al. 2024): the momentum of a matrix, with all its singular values brought near one.


def orthogonalize(g: Tensor) -> Tensor:
    """About U V^T of g = U S V^T, in five Newton-Schulz steps x <- a x + (b x x^T + c (x x^T)^2) x.

    g: [..., A, B], each matrix on its own.  Singular values above 1e-3 of the Frobenius norm land in 0.68 to
    1.14: the coefficients trade exactness for a steep start.  bf16 on CUDA; some CPUs have none worth using.
    """
    x = g.to(torch.bfloat16 if g.is_cuda else torch.float32)
    x = x.mT if g.shape[-2] > g.shape[-1] else x
    x = x / torch.linalg.matrix_norm(x, keepdim=True).clamp(min=1e-7)
    for _ in range(5):
        gram = x @ x.mT
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    return x.mT if g.shape[-2] > g.shape[-1] else x


class Muon(torch.optim.Optimizer):
    """m <- mu m + (1 - mu) g;  W <- (1 - lr wd) W - 0.2 lr sqrt(max(A, B)) orthogonalize(mu m + (1 - mu) g)

    for matrices W [A, B]: torch.optim.Muon with adjust_lr_fn="match_rms_adamw", which gives an update the
    root mean square of AdamW's, 0.2 lr.  Ours also takes fused matrices, `parts` of them on top of each other
    (an entry of the parameter group), and sharded ones, which every process gathers and orthogonalises whole.
    """

    def __init__(self, groups: list[dict[str, Any]], lr: float, weight_decay: float,
                 momentum: float = 0.95) -> None:
        super().__init__(groups, dict(lr=lr, weight_decay=weight_decay, momentum=momentum, parts=1))

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                if not self.state[p]:
                    self.state[p]["momentum_buffer"] = torch.zeros_like(p)
                m = self.state[p]["momentum_buffer"].lerp_(p.grad, 1 - group["momentum"])
                g = runtime.whole(p.grad.lerp(m, group["momentum"])).unflatten(0, (group["parts"], -1))
                update = orthogonalize(g).flatten(0, 1).to(p.dtype)
                p.mul_(1 - group["lr"] * group["weight_decay"])
                p.add_(runtime.sharded_like(update, p), alpha=-0.2 * group["lr"] * max(g.shape[1:]) ** 0.5)


def make_optimizers(dit: models.DiT, args: argparse.Namespace) -> list[torch.optim.Optimizer]:
    """AdamW for all trainable parameters; or Muon for the matrices of attention and MLP, AdamW for the rest.

    adaLN stays with AdamW: it starts at zero, and its gradient has few directions, the rest is noise.
    """
    hidden = re.compile(r"blocks\.\d+\.(attn\.(qkv|proj)|mlp\.\w+)\.weight")
    groups: dict[int, list[Tensor]] = {0: []}   # 0: AdamW's
    for name, p in dit.named_parameters():
        parts = 0
        if args.optimizer == "muon" and hidden.fullmatch(name):
            parts = {"qkv": 3, "w12": 2}.get(name.split(".")[-2], 1) if args.muon_split else 1
        if p.requires_grad:
            groups.setdefault(parts, []).append(p)
    optimizers: list[torch.optim.Optimizer] = [torch.optim.AdamW(
        groups.pop(0), lr=args.lr, betas=(0.9, 0.95), weight_decay=args.weight_decay, fused=True)]
    if groups:
        optimizers.append(Muon([{"params": group, "parts": parts} for parts, group in groups.items()],
                               args.lr, args.weight_decay))
    return optimizers


# ------------------------------------------------------------------------------------------------------------
# From images to posteriors, to normalised latents, and back.  Encoded live or read from a cache, a latent is
# mean and deviation until the step draws it.  The statistics travel with the DiT; forgetting one of the two
# directions of the normalisation is this field's most common mistake.


# What a published file leaves unsaid: LDM's and VA-VAE's are KL tokenizers of 256 x 256 images.
PUBLISHED = dict(loss="kl", sigma=0.0, sigma_mode="fixed", size=256, seed=0, data=None)


class Tokenizer:
    """The frozen autoencoder of a file: posterior(x) -> mean, std of z [B, C, h, w]; decode(z) -> x_hat."""

    def __init__(self, path: Path, precision: str, rt: Runtime) -> None:
        with runtime.input_errors():
            self.autoencoder, self.checkpoint = models.load_autoencoder(path)
        self.autoencoder.requires_grad_(False).to(rt.device)
        self.autocast = lambda: rt.autocast(precision)
        self.name = {"path": str(path), "sha256": runtime.file_sha256(path)}
        self.config = self.checkpoint.get("config", PUBLISHED)

    @torch.no_grad()
    def posterior(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """mean and std with losses.sample_posterior = mean + std * eps, times the scale for 'gaussian'."""
        with self.autocast():
            moments = torch.cat([self.autoencoder.encode(part) for part in x.split(ENCODE)])
        mean, logvar = losses.split_moments(moments)
        loss, sigma = self.config["loss"], self.config["sigma"]
        if loss == "none":
            return mean, torch.zeros_like(mean)
        if loss == "sigma":
            return mean, torch.full_like(mean, sigma / 0.8 if self.gaussian else sigma)
        return mean, (0.5 * logvar).exp()

    @property
    def gaussian(self) -> bool:
        """One scale of the noise per image, N(0, 1), which is drawn with it."""
        return self.config["loss"] == "sigma" and self.config["sigma_mode"] == "gaussian"

    @torch.no_grad()
    def decode(self, z: Tensor) -> Tensor:
        with self.autocast():
            return self.autoencoder.decode(z)


@dataclass
class Source:
    """Endless batches {"mean", "std": [b, C, h, w], "y": [b], ..} from global batch `start` on, and what the
    network has to know of them: classes, shape [C, h, w], mean and std [C] of the z that `draw` makes.
    """
    batches: Callable[[int], Iterator[dict[str, Any]]]
    classes: list[str]
    shape: tuple[int, ...]
    mean: Tensor
    std: Tensor
    latent: str
    gaussian: bool = False

    def draw(self, batch: dict[str, Any], eps: Tensor, scale: Tensor) -> Tensor:
        """Normalised z: the mean, or mean + std eps, the latter times scale [b] if `gaussian`."""
        z = batch["mean"]
        if self.latent == "sample":
            z = z + batch["std"] * (scale.view(-1, 1, 1, 1) if self.gaussian else 1) * eps
        return models.normalize(z, self.mean, self.std)


def open_source(args: argparse.Namespace, tokenizer: Tokenizer | None, rt: Runtime) -> Source:
    """--latents as they are; or --data through the tokenizer, live or encoded once.  Sets args.data."""
    share = dict(rank=rt.rank, world=rt.world, device=rt.device)
    gaussian = False
    if args.latents:
        latents = data.open_lightningdit_latents(args.latents)
        if tokenizer and tokenizer.autoencoder.channels != latents.shape[0]:
            raise InputError(f"{args.latents} has latents of {latents.shape[0]} channels, "
                             f"{args.tokenizer} of {tokenizer.autoencoder.channels}")
    else:
        config, gaussian = tokenizer.config, tokenizer.gaussian
        args.data = args.data or config["data"]
        if args.data is None:
            raise InputError(f"{args.tokenizer} does not say what it was trained on: give --data")
        live = args.cache is None or args.data == "shapes"
        if live and "latent_mean" not in tokenizer.checkpoint:
            raise InputError(f"{args.tokenizer} has no latent statistics: give a folder of images as --data, "
                             "whose --cache will have them")
        dataset = data.open_dataset(args.data, config["size"], "train", config["seed"])
        if live:
            return live_source(dataset, tokenizer, args, rt)
        latents = data.cache_latents(args.cache, dataset, tokenizer.posterior,
                                     {"tokenizer": tokenizer.name["sha256"], "precision": args.precision},
                                     args.batch // rt.world,
                                     workers=args.workers, barrier=runtime.barrier, **share)
    runtime.report_skipped(latents.skipped if rt.is_main else [])
    statistics = [s.to(rt.device) for s in latents.statistics(args.latent)]
    return Source(lambda start: data.latent_batches(latents, args.batch, args.seed, start, **share),
                  latents.classes, latents.shape, *statistics, args.latent, gaussian)


def live_source(dataset: data.Dataset, tokenizer: Tokenizer, args: argparse.Namespace, rt: Runtime) -> Source:
    """Random crops, encoded in every step, with the statistics in the tokenizer's file."""
    def batches(start: int) -> Iterator[dict[str, Any]]:
        for batch in data.batches(dataset, args.batch, args.seed, start, rt.rank, rt.world, args.workers,
                                  device=rt.device):
            mean, std = tokenizer.posterior(batch["x"])
            yield batch | {"mean": mean, "std": std}

    side = dataset.size // tokenizer.autoencoder.stride
    statistics = [tokenizer.checkpoint[k].to(rt.device) for k in ("latent_mean", "latent_std")]
    return Source(batches, list(dataset.classes), (tokenizer.autoencoder.channels, side, side), *statistics,
                  args.latent, tokenizer.gaussian)


# ------------------------------------------------------------------------------------------------------------
# One step's random numbers, as a function of seed and step; then Eqs. 27, 28 and 4.


def resolve_shift(shift: float | str, shape: tuple[int, ...]) -> float:
    """--t-shift as a number.  RAE's sqrt(d / 4096) for t = 1 at the noise is its inverse, with t = 1 at the
    data: 1 / 1.414 for f16d32.  shape: [C, h, w], d = C h w.
    """
    return math.sqrt(4096 / math.prod(shape)) if shift == "auto" else shift


def draw_times(n: int, kind: str, shift: float, rt: Runtime, seed: int, step: int) -> Tensor:
    """t [n]: sigmoid of N(0, 1) (logit-normal), or uniform on [0, 1); then shifted."""
    if kind == "uniform":
        t = runtime.global_rand(n, rt, seed, "t", step)
    else:
        t = torch.sigmoid(runtime.global_randn((n,), rt, seed, "t", step))
    return losses.time_shift(t, shift)


class Objective(nn.Module):
    """forward(z, eps, t, y) -> terms: velocity (Eq. 4) and cosine, [] each, and the squared error per
    sample [B].
    """

    def __init__(self, dit: models.DiT, args: argparse.Namespace, rt: Runtime) -> None:
        super().__init__()
        self.dit, self.autocast = dit, lambda: rt.autocast(args.precision)
        self.weights = {"velocity": 1.0, "cosine": args.cosine_weight}

    def forward(self, z: Tensor, eps: Tensor, t: Tensor, y: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        v = losses.velocity(z, eps)
        with self.autocast():
            v_hat = self.dit(losses.interpolate(z, eps, t), t, y)
        per_sample = losses.flow_matching_per_sample(v_hat, v)
        terms = {"velocity": per_sample.mean()}
        if self.weights["cosine"]:
            terms["cosine"] = losses.cosine_velocity(v_hat, v)
        return terms, per_sample.detach()


def step_gradients(step_module: nn.Module, weights: dict[str, float],
                   parts: list[tuple[Tensor, ...]]) -> tuple[dict[str, Tensor], Tensor]:
    """Gradients of one batch, added up over its equal parts.  Returns: terms averaged, error per sample."""
    rows, errors = [], []
    for n, part in enumerate(parts):
        with runtime.sync_gradients(step_module, n + 1 == len(parts)):
            terms, per_sample = step_module(*part)
            (losses.weighted_sum(terms, weights) / len(parts)).backward()
        rows.append({k: v.detach() for k, v in terms.items()})
        errors.append(per_sample)
    return {k: torch.stack([row[k] for row in rows]).mean() for k in rows[0]}, torch.cat(errors)


class TimeBins:
    """The velocity loss averaged in BINS equal bins of t since the last read, on the device until then."""

    def __init__(self, device: torch.device) -> None:
        self.sums = torch.zeros(2, BINS, device=device)

    def add(self, t: Tensor, per_sample: Tensor) -> None:
        index = (t * BINS).long().clamp(max=BINS - 1)
        self.sums.index_add_(1, index, torch.stack([per_sample, torch.ones_like(per_sample)]))

    def read(self) -> list[float | None]:
        total, count = runtime.all_reduce_sum(self.sums).tolist()
        self.sums = torch.zeros_like(self.sums)
        return [round(s / n, 5) if n else None for s, n in zip(total, count)]


# ------------------------------------------------------------------------------------------------------------
# The loop.


def sample_grid(dit: models.DiT, source: Source, tokenizer: Tokenizer, args: argparse.Namespace, rt: Runtime,
                per_class: int = 8) -> Tensor:
    """A picture of the averaged network: one row for each of the first ten classes, the same noise every
    time.
    """
    rows = min(len(source.classes), 10)
    y = torch.arange(rows, device=rt.device).repeat_interleave(per_class)
    draws = runtime.generator(args.seed, "grid", device=rt.device)
    noise = torch.randn(len(y), *source.shape, generator=draws, device=rt.device)

    def velocity_fn(x: Tensor, t: float) -> Tensor:
        with rt.autocast(args.precision):
            return dit(x, torch.full((len(x),), t, device=rt.device), y)

    z = losses.euler(velocity_fn, noise, args.grid_steps)
    x_hat = tokenizer.decode(models.denormalize(z, source.mean, source.std)).cpu()
    return make_grid(x_hat.clamp(-1, 1) / 2 + 0.5, nrow=per_class, padding=2)


def check(args: argparse.Namespace, rt: Runtime) -> None:
    if args.batch % rt.world:
        raise InputError(f"--batch {args.batch} does not divide over {rt.world} processes")
    for name in ("batch", "steps", "log_every", "save_every", "image_every", "grid_steps"):
        if getattr(args, name) < 1:
            raise InputError(f"--{name.replace('_', '-')} must be at least 1, got {getattr(args, name)}")
    for name in ("ema", "label_dropout"):
        if not 0 <= getattr(args, name) < 1:
            raise InputError(f"--{name.replace('_', '-')} must be in [0, 1), got {getattr(args, name)}")
    local = args.batch // rt.world
    if args.accumulate < 1 or local % args.accumulate:
        raise InputError(f"--accumulate {args.accumulate} does not divide the {local} images of a process")
    if args.t_shift != "auto" and not args.t_shift > 0:
        raise InputError(f"--t-shift must be positive, or auto, got {args.t_shift}")
    if args.latents and args.data:
        raise InputError("--latents are encoded already: leave out --data")


def export(args: argparse.Namespace) -> None:
    """--export: the run in --out with the names of published files, and its latents_stats.pt beside it."""
    with runtime.input_errors():
        state = models.read_kind(args.out / "checkpoint.pt", "dit")
    statistics = args.export.with_name("latents_stats.pt")
    runtime.save_atomic({k: state[k] for k in ("model", "ema")}, args.export)
    runtime.save_atomic({k: state[f"latent_{k}"].view(1, -1, 1, 1) for k in ("mean", "std")}, statistics)
    print(f"wrote {args.export} and {statistics}")


def resume(path: Path, dit: models.DiT, ema: runtime.Ema, optimizers: list[torch.optim.Optimizer],
           args: argparse.Namespace, tokenizer: Tokenizer | None) -> int:
    """Load the run in `path` if there is one.  Returns the number of steps already done."""
    if not path.exists():
        return 0
    with runtime.input_errors():
        state = models.read_kind(path, "dit")
    runtime.check_config(state["config"], runtime.plain(args), FREE, path)
    if tokenizer and state["tokenizer"]["sha256"] != tokenizer.name["sha256"]:
        raise InputError(f"{path} was trained on another {args.tokenizer} (it has changed since); "
                         "choose another --out, or remove the old run")
    if any(isinstance(name, int) for name in state["optimizer"]["state"]):   # of before Muon and sharding
        raise InputError(f"{path} numbers its parameters as older versions did: it cannot be resumed; sample "
                         "from it, or choose another --out")
    runtime.load_training_state(dit, optimizers, state)
    ema.load_state_dict(state["ema"], state["ema_updates"])
    return state["step"]


@runtime.command
def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    if args.export:
        return export(args)
    rt = runtime.start(args.device)
    check(args, rt)
    tokenizer = Tokenizer(args.tokenizer, args.precision, rt) if args.tokenizer else None
    source = open_source(args, tokenizer, rt)
    t_shift = resolve_shift(args.t_shift, source.shape)
    classes = len(source.classes)
    torch.manual_seed(args.seed)   # the same initial weights on every rank
    with runtime.input_errors():
        dit = models.build_dit(models.DITS[args.model] | dict(
            family=args.family, patch=args.patch, qk_norm=args.qk_norm, num_classes=classes,
            in_channels=source.shape[0], input_size=source.shape[1])).to(rt.device)
    dit.recompute, average = args.activation_checkpointing, copy.deepcopy(dit)
    count = sum(p.numel() for p in dit.parameters())
    for block in dit.blocks if args.compile else ():
        block.compile()
    for network in (dit, average) if args.shard else ():
        rt.shard(network, network.blocks)
    ema = runtime.Ema(dit, args.ema, average)
    parameters = [p for p in dit.parameters() if p.requires_grad]
    optimizers = make_optimizers(dit, args)
    checkpoint = args.out / "checkpoint.pt"
    done = resume(checkpoint, dit, ema, optimizers, args, tokenizer)
    if done >= args.steps:
        rt.print(f"{checkpoint} already has {done} steps; raise --steps to go on")
        return
    log = runtime.Log(args.out / "log.jsonl", runtime.plain(args), rt, done)
    rt.print(f"{args.model}: {count / 1e6:.1f} M parameters on {args.latents or args.data}, latents "
             f"{'x'.join(map(str, source.shape))} of {args.tokenizer or 'LightningDiT'}, {args.optimizer}, "
             f"batch {args.batch}, lr {args.lr:g}, t {args.t} shifted by {t_shift:.4g}, "
             f"{rt.world} process(es) on {runtime.device_name(rt.device)}"
             + (f", resumed at step {done}" if done else ""))

    objective = Objective(dit, args, rt)
    step_module = objective if args.shard else rt.wrap(objective)
    local = args.batch // rt.world
    loader = source.batches(done)
    finite, bins, skipped = runtime.FiniteCheck(rt.device), TimeBins(rt.device), 0
    began, timed = time.perf_counter(), done
    bar = tqdm(range(done, args.steps), initial=done, total=args.steps, disable=not rt.is_main, desc="dit")
    for step in bar:
        batch = next(loader)
        skipped += runtime.report_skipped(batch.get("skipped", []))
        z = source.draw(batch, runtime.global_randn((local, *source.shape), rt, args.seed, "posterior", step),
                        runtime.global_randn((local,), rt, args.seed, "scale", step))
        eps = runtime.global_randn((local, *source.shape), rt, args.seed, "eps", step)
        t = draw_times(local, args.t, t_shift, rt, args.seed, step)
        dropped = runtime.global_rand(local, rt, args.seed, "labels", step) < args.label_dropout
        y = torch.where(dropped, classes, batch["y"])
        lr = args.lr * min(1.0, (step + 1) / max(1, args.warmup))
        for optimizer in optimizers:
            optimizer.zero_grad(set_to_none=True)
            for group in optimizer.param_groups:
                group["lr"] = lr
        parts = list(zip(*(a.chunk(args.accumulate) for a in (z, eps, t, y))))
        terms, per_sample = step_gradients(step_module, objective.weights, parts)
        norm = runtime.whole(nn.utils.clip_grad_norm_(parameters, args.clip))
        finite.add(step, terms | {"gradient norm": norm})
        for optimizer in optimizers:
            optimizer.step()
        ema.update()
        bins.add(t, per_sample)

        last = step + 1 == args.steps
        if (step + 1) % args.log_every == 0 or last:
            finite.flush()
            terms = runtime.mean_over_ranks(terms)
            seconds = (time.perf_counter() - began) / (step + 1 - timed)
            log.write(step=step + 1, **terms, grad_norm=norm, by_t=bins.read(), skipped=skipped, lr=lr,
                      seconds_per_step=seconds, images_per_second=args.batch / seconds)
            bar.set_postfix(v=f"{terms['velocity'].item():.4f}")
            began, timed = time.perf_counter(), step + 1
        if tokenizer and ((step + 1) % args.image_every == 0 or last) and (rt.is_main or args.shard):
            grid = sample_grid(ema.model, source, tokenizer, args, rt)
            (args.out / "images").mkdir(parents=True, exist_ok=True)
            if rt.is_main:
                save_image(grid, args.out / "images" / f"{step + 1:07d}.png")
        if (step + 1) % args.save_every == 0 or last:
            finite.flush()
            runtime.check_same_on_all_ranks(dit)
            state = runtime.training_state(dit, optimizers) | {
                "kind": "dit", "config": runtime.plain(args), "model_config": dit.config, "step": step + 1,
                "ema": ema.state_dict(), "ema_updates": ema.updates, "classes": source.classes,
                **({"tokenizer": tokenizer.name} if tokenizer else {}), "latent_mean": source.mean.cpu(),
                "latent_std": source.std.cpu(), "latent_shape": list(source.shape)}
            if rt.is_main:
                runtime.save_atomic(state, checkpoint)
            runtime.barrier()
    rt.print(f"wrote {checkpoint}")


if __name__ == "__main__":
    main()
