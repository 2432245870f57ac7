"""Stage 1: train a tokenizer x -> z -> x_hat with the VE loss (Sec. 4).

    laptop      python train_tokenizer.py
    one GPU     python train_tokenizer.py --preset vavae-f16d32 --data DIR
    eight GPUs  torchrun --nproc_per_node=8 train_tokenizer.py --preset vavae-f16d32 --data DIR

--loss names the objective.  L_rec is the absolute error plus LPIPS.  Every term
is summed over C, H, W and averaged over the batch.

    ve                  L_rec + lambda1 / (sigma^2 + delta)
                              + lambda2 exp(|z| - tau)           Eqs. 9-11
    kl                  L_rec + beta KL                          Eq. 1
    sigma               L_rec + w mean^2, the noise is given     sigma-VAE, GAE
    none                L_rec, there is no noise
    log-entropy         as ve, with -lambda1 log sigma^2         Analyze 2
    negative-variance   as ve, with -lambda1 sigma^2             Analyze 2

Where the decoder is a diffusion model (DGAE), L_rec is the squared error of its
velocity plus LPIPS.

--out receives checkpoint.pt, log.jsonl and images/.  After a crash the same
command goes on from the checkpoint, and ends with the same numbers.
"""

import argparse
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import runtime  # before torch, because it says how idle threads wait

import torch
from torch import Tensor, nn

import checkpoints
import data
import flow
import frozen
import losses
import metrics
import models
from losses import (exponential_magnitude, inverse_variance, kl_divergence, log_entropy,
                    negative_variance, square_magnitude)
from runtime import InputError, Runtime

# ------------------------------------------------------------------------------
# A preset is a row of defaults, and any flag overrides it.  "small" is for
# photographs of 32 pixels on a CPU, and those with a size are for one GPU; both of
# their models spend 24 pixel values on a latent value, as the paper's lambda1
# expects.  The paper trains at 2.5e-5 with batches of
# 64 and "mainly" follows the third stage of VA-VAE.  The discriminator starts at
# batch 2,501: VA-VAE's 5,001 counts the steps of two optimisers.
#
# GAE's paper gives the settings of its rows, but not the discriminator's rate.  Its
# losses are means where ours are sums; AdamW does not see the factor between them.
# DGAE does not print its weights: those of LPIPS and KL here are DiTo's and LDM's.

ALL = dict(
    perceptual_weight=0.0, disc_weight=0.0, align_weight=0.0, semantic_weight=0.0, ve_warmup=0,
    # These have no flags: AdamW's betas, as in LDM and VA-VAE, and its weight decay,
    # of which the paper states none; the steps in which the rate rises, the share of
    # the steps in which it falls to 0 at the end, or whether it falls as a cosine;
    # the steps between lines of the log, and the number of held-out images.
    betas=[0.5, 0.9], weight_decay=0.0, warmup=100, cooldown=0.0, cosine=False,
    log_every=50, val_images=256)
PAPER = ALL | dict(lambda1=0.1, size=256, batch=64, lr=2.5e-5, save_every=5000,
                   perceptual_weight=1.0, disc_weight=0.5)
PHOTOS = ALL | dict(model="f8d8", lambda1=0.1, lr=1e-4, steps=100_000, save_every=5000,
                    perceptual_weight=1.0)
VAVAE = PAPER | dict(model="f16d32", align_weight=0.1)
DEMO = ALL | dict(model="vit-shapes", lambda1=1e-3, size=32, batch=16, lr=3e-3,
                  steps=2300, cooldown=0.8)
GAE_NOISE = dict(loss="sigma", sigma=0.2, mean_weight=0.0, semantic_weight=1.0,
                 teacher="runs/teacher/checkpoint.pt")
GAE = PAPER | GAE_NOISE | dict(
    model="gae-d32", batch=1024, lr=2e-4, steps=250_000, warmup=8000, cosine=True,
    betas=[0.9, 0.98], weight_decay=0.05, disc_mode="constant", disc_start=5001)
DGAE = ALL | dict(
    loss="kl", lambda1=0.1, size=256, batch=96, lr=1e-4, steps=500_000, warmup=10_000,
    cosine=True, betas=[0.9, 0.95], weight_decay=0.1, perceptual_weight=0.5, save_every=5000)
PRESETS = {
    "demo": DEMO,
    "small": ALL | dict(model="vit-demo", lambda1=0.1, size=32, batch=32, lr=1e-3,
                        steps=1500),
    "photos-64": PHOTOS | dict(size=64, batch=64),
    "photos-128": PHOTOS | dict(size=128, batch=32),
    "photos-256": PHOTOS | dict(model="f16d32", size=256, batch=16),
    "ldm-f16d16": PAPER | dict(model="f16d16", steps=200_182),    # 10 epochs
    "vavae-f16d32": VAVAE | dict(steps=320_292),                  # 16 epochs
    "vavae-f16d32-finetune": VAVAE | dict(steps=100_091, disc_start=0,
                                          ve_warmup=1000),        # 5 epochs
    "gae-demo": DEMO | GAE_NOISE | dict(model="gae-demo", semantic_weight=0.1),
    "gae-d32": GAE,                                               # 200 epochs
    "gae-d64": GAE | dict(model="gae-d64"),
    "dgae-demo": DEMO | dict(model="dgae-demo", val_images=64),
    "dgae-b": DGAE | dict(model="dgae-b"),
    "dgae-m": DGAE | dict(model="dgae-m"),
    "dgae-l": DGAE | dict(model="dgae-l"),
}
SMOKE = dict(steps=4, batch=4, log_every=1, save_every=2, val_images=8,
             workers=0, out=Path("runs/smoke/tokenizer"))
# A run may go on with other values of these.
FREE = {"steps", "epochs", "save_every", "log_every", "workers", "device", "out", "smoke",
        "compile", "recompute"}
LOSSES = "ve", "kl", "sigma", "none", "log-entropy", "negative-variance"
ANALYZE2 = {"log-entropy": log_entropy, "negative-variance": negative_variance}


def parse(argv: list[str] | None) -> argparse.Namespace:
    p = runtime.Parser(__doc__)
    count, natural = runtime.positive_int, runtime.natural_int
    weight, positive = runtime.non_negative, runtime.positive
    add = p.add_argument
    add("--preset", choices=PRESETS, default="demo", help="row of defaults")
    add("--data", default="shapes", help="shapes, cifar10, or a folder of class folders")
    add("--size", type=count, help="side of the images in pixels")
    add("--model", choices=models.AUTOENCODERS, help="row of models.AUTOENCODERS")
    add("--init", type=Path, help="start from these weights: ours, VA-VAE's or LDM's")
    add("--out", type=Path, default=Path("runs/tokenizer"), help="folder of the run")

    add = p.add_argument_group("objective (sums over C, H, W)").add_argument
    add("--loss", choices=LOSSES, default="ve", help="what acts on the latent")
    add("--lambda1", type=weight, help="weight of Eq. 9")
    add("--lambda2", type=weight, default=1e-6, help="weight of Eq. 10")
    add("--tau", type=runtime.finite, default=1.0, help="tau of Eq. 10")
    add("--delta", type=positive, default=1e-6, help="delta of Eq. 9")
    add("--ve-warmup", type=natural, help="steps over which lambda1 grows from 0")
    add("--kl-weight", type=weight, default=1e-6, help="kl: beta of Eq. 1")
    add("--sigma", type=positive, default=0.2, help="sigma: deviation of the noise")
    add("--sigma-mode", choices=["fixed", "gaussian"], default="gaussian",
        help="sigma: one deviation for all images, or N(0, sigma / 0.8) for each")
    add("--mean-weight", type=weight, default=0.24, help="sigma: weight of mean^2; "
        "0.24 of sums is LatentLM's 0.01 of means for f16d32")
    add("--perceptual-weight", type=weight, help="weight of LPIPS")
    add("--disc-weight", type=weight, help="weight of the adversarial loss, relative "
        "to L_rec's gradient at the decoder's last layer; 0 for none")
    add("--disc-start", type=natural, default=2501, help="step at which it begins")
    add("--align-weight", type=weight, help="weight of VA-VAE's alignment, relative "
        "to L_rec's gradient at the encoder's last layer; 0 for none")
    add("--semantic-weight", type=weight, help="weight of GAE's loss on the latent, "
        "relative to L_rec's mean over pixel values; 0 for none")
    add("--semantic-at", choices=["latent", "pre", "post"], default="latent",
        help="where it acts: the mean, the features before it, or a map of it")
    add("--teacher", default="dinov2_vitl14", help="what these two learn from: this, "
        "_vitb14, _vits14, a file of their weights, judge, efficientnet-lite0, "
        "module:function, or, for the latent of GAE, a file of train_teacher.py")
    add("--disc-mode", choices=["adaptive", "constant"], default="adaptive",
        help="constant: --disc-weight is relative to L_rec's mean over pixel values")

    add = p.add_argument_group("optimisation (AdamW)").add_argument
    add("--steps", type=count, help="optimiser steps in all")
    add("--batch", type=count, help="images in a step, over all processes")
    add("--accumulate", type=count, default=1, help="parts of a process's batch")
    add("--lr", type=positive, help="learning rate")
    add("--clip", type=positive, default=1.0, help="largest gradient norm, per pixel")
    add("--recompute", action="store_true", help="decoder: less memory, more time")
    add("--compile", action="store_true", help="torch.compile the tokenizer")
    runtime.add_running_flags(p)
    return p.parse(argv, PRESETS, SMOKE)


# ------------------------------------------------------------------------------
# The reconstruction, and two more losses where they have a weight: VA-VAE's
# alignment and VQGAN's adversary.  Each of these brings a network of its own,
# which trains with the tokenizer.


class Reconstruction:
    """L_rec: the absolute error, plus LPIPS where it has a weight.

    With the velocity v of a diffusion decoder, which predicts v_hat, the squared
    error of the velocity takes the place of the absolute error.
    """

    def __init__(self, perceptual_weight: float, device: torch.device) -> None:
        self.weight = perceptual_weight
        if self.weight:
            self.lpips = frozen.load_lpips().to(device)

    def __call__(self, x_hat: Tensor, x: Tensor, v_hat: Tensor | None = None,
                 v: Tensor | None = None) -> Tensor:
        if v_hat is None or v is None:
            rec = losses.absolute_error(x_hat, x)
        else:
            rec = losses.squared_error(v_hat, v)
        if self.weight:
            rec = rec + self.weight * losses.perceptual_error(self.lpips, x_hat, x)
        return rec


class Alignment:
    """Draws the latent to the features of a frozen teacher."""

    name, start, maximum, constant = "align", 0, 1e8, False

    def __init__(self, args: argparse.Namespace, tokenizer: models.Tokenizer,
                 rt: Runtime) -> None:
        self.weight, self.layer = args.align_weight, tokenizer.encoder_last_layer
        self.autocast = lambda: rt.autocast(args.precision)
        self.teacher = frozen.load_teacher(args.teacher, args.size // tokenizer.stride)
        if isinstance(self.teacher, nn.Module):
            self.teacher.to(rt.device)
        x = torch.zeros(1, 3, args.size, args.size, device=rt.device)
        grid, shape = tokenizer.posterior(x)[0].shape[2:], self.features(x).shape
        if len(shape) != 4 or shape[2:] != grid:
            raise InputError(f"--teacher {args.teacher} gives {list(shape)} for one "
                             f"image: the latent needs [1, D, {grid[0]}, {grid[1]}]")
        net = nn.Conv2d(tokenizer.channels, shape[1], 1, bias=False).to(rt.device)
        self.network, self.parts = rt.wrap(net), {"projection": net}
        self.parameters = list(net.parameters())

    def learn(self, lr: float) -> None:
        """The projection learns with the tokenizer, in its optimiser."""

    @torch.no_grad()
    def features(self, x: Tensor) -> Tensor:
        with self.autocast():
            return self.teacher(x).float()

    def loss(self, x: Tensor, mean: Tensor, z: Tensor, x_hat: Tensor) -> Tensor:
        """L_mdms + L_mcos of the sample z, projected to the features' width."""
        pair = self.network(z), self.features(x)
        return losses.marginal_distance_matrix(*pair) + losses.marginal_cosine(*pair)


class SemanticPreservation:
    """Draws the latent to a teacher as GAE does, in one of three places (Figure 3).

    latent   the mean, to the target of a trained teacher
    pre      the encoder's features, to those of a foundation model of this width
    post     a linear map of the mean, to such features
    """

    name, start, constant = "semantic", 0, True

    def __init__(self, args: argparse.Namespace, tokenizer: models.Tokenizer,
                 rt: Runtime) -> None:
        self.weight, self.place = args.semantic_weight, args.semantic_at
        self.autocast = lambda: rt.autocast(args.precision)
        side = args.size // tokenizer.stride
        if self.place == "latent" and ":" not in args.teacher:
            if not Path(args.teacher).exists():
                raise InputError(f"GAE needs a teacher, and {args.teacher} is not there: "
                                 "`python train_teacher.py` makes one; or --semantic-weight 0")
            self.teacher = frozen.Target(args.teacher, side)
        else:
            self.teacher = frozen.load_teacher(args.teacher, side, imagenet=True)
        if isinstance(self.teacher, nn.Module):
            self.teacher.to(rt.device)
        if self.place == "pre":
            tokenizer.encoder.register_forward_hook(self.keep)
        x = torch.zeros(1, 3, args.size, args.size, device=rt.device)
        with torch.no_grad():
            mean, target = tokenizer.posterior(x)[0], self.target(x)
        self.network, self.parts = nn.Identity(), {}
        if self.place == "post":
            net = nn.Conv2d(tokenizer.channels, target.shape[1], 1, bias=False).to(rt.device)
            self.network, self.parts = rt.wrap(net), {"semantic_projection": net}
        if self.place == "pre" and self.features.ndim != 3:
            raise InputError(f"--semantic-at pre needs a ViT, not --model {args.model}")
        found = self.found(mean).shape
        if found != target.shape:
            raise InputError(f"--teacher {args.teacher} gives {list(target.shape)} for one "
                             f"image, but {self.place} has {list(found)}")
        self.parameters = list(self.network.parameters())

    def keep(self, encoder: nn.Module, inputs: tuple, features: Tensor) -> None:
        self.features = features

    def learn(self, lr: float) -> None:
        """The linear map learns with the tokenizer, in its optimiser."""

    @torch.no_grad()
    def target(self, x: Tensor) -> Tensor:
        with self.autocast():
            target = self.teacher(x).float()
        return models.rms(target.movedim(1, -1)).movedim(-1, 1)

    def found(self, mean: Tensor) -> Tensor:
        """What is compared with the target: [B, D, h, w]."""
        if self.place == "pre":
            return models.rms(self.features.float()).mT.unflatten(2, mean.shape[2:])
        return self.network(mean)

    def loss(self, x: Tensor, mean: Tensor, z: Tensor, x_hat: Tensor) -> Tensor:
        return losses.semantic_preservation(self.found(mean), self.target(x))


class Adversary:
    """A discriminator, which learns to tell x from x_hat."""

    name, maximum = "adv", 1e4

    class Both(nn.Module):
        """Logits of x and x_hat.  Together they would share BatchNorm's statistics."""

        def __init__(self, net: nn.Module) -> None:
            super().__init__()
            self.net = net

        def forward(self, x: Tensor, x_hat: Tensor) -> tuple[Tensor, Tensor]:
            return self.net(x).float(), self.net(x_hat).float()

    def __init__(self, args: argparse.Namespace, tokenizer: models.Tokenizer,
                 rt: Runtime) -> None:
        self.weight, self.layer = args.disc_weight, tokenizer.last_layer
        self.constant = args.disc_mode == "constant"
        self.start, self.autocast = args.disc_start, lambda: rt.autocast(args.precision)
        self.net = models.PatchGAN().to(rt.device, memory_format=torch.channels_last)
        self.network = rt.wrap(self.Both(self.net))
        self.optimizer = adamw(self.net.parameters(), args)
        self.parameters: list[Tensor] = []   # none that the tokenizer's optimiser trains
        self.parts = {"discriminator": self.net, "disc_optimizer": self.optimizer}
        self.pairs: list[tuple[Tensor, Tensor]] = []

    def loss(self, x: Tensor, mean: Tensor, z: Tensor, x_hat: Tensor) -> Tensor:
        """What the tokenizer minimises.  The pair is kept to learn from."""
        self.pairs.append((x, x_hat.detach()))
        self.net.requires_grad_(False)
        with self.autocast():
            return losses.hinge_generator(self.net(x_hat).float())

    def learn(self, lr: float) -> None:
        """One step of the discriminator on the pairs of this batch."""
        self.net.requires_grad_(True)
        self.optimizer.param_groups[0]["lr"] = lr
        self.optimizer.zero_grad(set_to_none=True)
        parts, batch = len(self.pairs), map(torch.cat, zip(*self.pairs))
        for x, x_hat in runtime.micro_batches(self.network, parts, *batch):
            with self.autocast():
                real, fake = self.network(x, x_hat)
            (losses.hinge_discriminator(real, fake) / parts).backward()
        self.optimizer.step()
        self.pairs = []


def adamw(parameters: Iterable[Tensor], args: argparse.Namespace) -> torch.optim.AdamW:
    return torch.optim.AdamW(parameters, lr=args.lr, betas=tuple(args.betas),
                             weight_decay=args.weight_decay, fused=True)


def balance(rec: Tensor, loss: Tensor, other: Any, values: int) -> Tensor:
    """The weight at which `loss` pulls as hard as L_rec, times its own weight.

    Both pulls are gradients at one layer, averaged over the processes.  Neither
    KL nor VE is part of the reference.  A constant weight counts beside the mean of
    L_rec over pixel values, and L_rec is the sum of so many `values`.
    """
    if other.constant:
        return loss.new_full((), other.weight * values)
    pulls = [torch.autograd.grad(a, other.layer, retain_graph=True)[0]
             for a in (rec, loss)]
    pulls = [runtime.all_reduce_mean(pull) for pull in pulls]
    return other.weight * losses.adaptive_weight(*pulls, maximum=other.maximum)


# ------------------------------------------------------------------------------
# How well held-out images decode, and whether sigma is where Eq. 14 wants it.


@torch.no_grad()
def validate(tokenizer: models.Tokenizer, images: Tensor, seed: int,
             rec_of: Callable[[Tensor, Tensor], Tensor], picture: Path
             ) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Scores of held-out images [N, 3, H, W], and the statistics of their z.

    The picture has five rows: inputs, what is decoded from the posterior's mean
    and from a sample, the latent's three principal components as colours, and sigma
    on a logarithmic scale.
    `noise_cost` is what the sample's noise adds to L_rec, over the L_var of
    Eq. 9.  At the equilibrium of Eq. 14 it equals lambda1.
    """
    tokenizer.eval()
    rows, cost = [], 0.0
    device = next(tokenizer.parameters()).device
    for k, x in enumerate(images.to(device).split(32)):
        mean, logvar = tokenizer.posterior(x)
        draws = runtime.generator(seed, "held-out", k, device=device)
        eps = torch.randn(mean.shape, generator=draws, device=device)
        scale = torch.randn(len(x), generator=draws, device=device)
        z = tokenizer.sample(mean, torch.exp(0.5 * logvar), eps, scale)
        numbers = range(32 * k, 32 * k + len(x))
        pair = tokenizer.decode(mean, numbers), tokenizer.decode(z, numbers)
        of_mean, of_sample = (rec_of(x_hat, x).item() for x_hat in pair)
        cost += (of_sample - of_mean) * len(x) / len(images)
        rows.append([a.cpu() for a in (mean, logvar, z, *pair)])
    tokenizer.train()
    mean, logvar, z, *pair = (torch.cat(column) for column in zip(*rows))
    scores = metrics.latent_summary(mean, logvar, z, tokenizer.learns_sigma)
    for name, x_hat in zip(("psnr_mean", "psnr_sample"), pair):
        psnr = metrics.psnr(data.to_uint8(x_hat), data.to_uint8(images))
        scores[name] = psnr.mean().item()
    colours = metrics.principal_colours(mean[:12])
    rows = dict(zip(("held-out images", "D(mean)", "D(z)"), (images, *pair)))
    rows["latent"] = nn.functional.interpolate(colours, images.shape[-2:])
    if tokenizer.learns_sigma:
        scores["noise_cost"] = cost / inverse_variance(logvar).item()
        low, high, shown = sigma_map(logvar[:12], images.shape[-2:])
        rows[f"sigma, from\n{low:.2g} (black)\nto {high:.2g}"] = shown
    data.save_rows(picture, {name: data.to_uint8(a[:12]).permute(0, 2, 3, 1)
                             for name, a in rows.items()})
    std, mean = torch.std_mean(z.transpose(0, 1).flatten(1), dim=1)
    return scores, {"latent_mean": mean, "latent_std": std}


def sigma_map(logvar: Tensor, size: tuple[int, int]) -> tuple[float, float, Tensor]:
    """The lowest and the highest sigma, and images [B, 3, *size] of its logarithm."""
    a = nn.functional.interpolate(logvar.mean(1, keepdim=True), size=size) / 2
    low, high = a.min(), a.max()
    scaled = 2 * (a - low) / (high - low).clamp(min=1e-6) - 1
    return low.exp().item(), high.exp().item(), scaled.expand(-1, 3, -1, -1)


# ------------------------------------------------------------------------------
# A run begins with random weights, with those of --init, or where it stopped.


def build(args: argparse.Namespace, rt: Runtime) -> models.Tokenizer:
    """The tokenizer, which knows itself what noise its latent carries."""
    torch.manual_seed(args.seed)   # the same weights in every process
    noise = {"sigma": args.sigma_mode, "none": "none"}.get(args.loss, "learned")
    sigma = args.sigma if args.loss == "sigma" else 0.0
    row = models.AUTOENCODERS[args.model]
    tokenizer = models.build_tokenizer(row | dict(noise=noise, sigma=sigma))
    size, stride = row.get("image_size", args.size), tokenizer.stride
    if args.size != size or args.size % stride:
        raise InputError(f"--model {args.model} cannot take --size {args.size}: it needs "
                         f"{size}, as a multiple of {stride}")
    if args.batch % (rt.world * args.accumulate):
        raise InputError(f"--batch {args.batch} does not divide over {rt.world} "
                         f"process(es) and --accumulate {args.accumulate}")
    if args.disc_weight and args.size < 32:
        raise InputError("the discriminator needs --size 32 or more, or --disc-weight 0")
    if args.preset.endswith("finetune") and args.init is None:
        raise InputError(f"--preset {args.preset} needs a published --init")
    tokenizer.decoder.recompute = args.recompute
    if args.compile:
        tokenizer.encoder.compile()
        tokenizer.decoder.compile()
    return tokenizer.to(rt.device, memory_format=torch.channels_last)


def restore(parts: dict[str, Any], checkpoint: Path, init: Path | None,
            settings: dict[str, Any]) -> int:
    """Fill the parts from the run's checkpoint, else from `init`, if there is one.

    The settings must be those of the checkpoint.  Returns the steps that are done.
    """
    if checkpoint.exists():
        state = checkpoints.read(checkpoint, "tokenizer", resume=True)
        runtime.check_same_command(state["config"], settings, FREE, checkpoint)
        checkpoints.restore(state, checkpoint, **parts)
        return state["step"]
    if init:
        found = checkpoints.read_tokenizer_parts(init)
        for name in parts.keys() & found.keys():
            checkpoints.load_strict(parts[name], found[name], init)
    return 0


# ------------------------------------------------------------------------------


def noise(tokenizer: models.Tokenizer, x: Tensor, batch: int, seed: int, step: int,
          rt: Runtime) -> list[Tensor]:
    """eps of Eq. 5 [b, C, h, w], and the scale [b] that a sigma-VAE may need.

    For a diffusion decoder also the noise of its image, and the time.
    """
    side, b = x.shape[-1] // tokenizer.stride, batch // rt.world
    shape = b, tokenizer.channels, side, side
    draws = [runtime.global_randn(shape, rt, seed, "eps", step),
             runtime.global_randn((b,), rt, seed, "scale", step)]
    if tokenizer.diffuses:
        draws += [runtime.global_randn((b, *x.shape[1:]), rt, seed, "decoder", step),
                  runtime.global_rand(b, rt, seed, "decoder's time", step)]
    return [draw[:len(x)] for draw in draws]   # unreadable images are left out


@runtime.command
def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    rt = runtime.start(args.device)
    runtime.claim(rt, args.out)
    train = data.open_dataset(args.data, args.size, "train", args.seed)
    rt.print(data.summary(train))
    if args.epochs:
        args.steps = runtime.steps_of(args.epochs, len(train), args.batch)
    val = data.open_dataset(args.data, args.size, "val", args.seed)
    val = data.once(val, args.batch, limit=args.val_images)
    val = torch.cat([part["x"] for part in val])

    tokenizer = build(args, rt)
    network = rt.wrap(tokenizer)
    reconstruction = Reconstruction(args.perceptual_weight, rt.device)
    others = []
    if args.align_weight:
        others.append(Alignment(args, tokenizer, rt))
    if args.semantic_weight:
        others.append(SemanticPreservation(args, tokenizer, rt))
    if args.disc_weight:
        others.append(Adversary(args, tokenizer, rt))
    parts, parameters = {"model": tokenizer}, list(tokenizer.parameters())
    for other in others:
        parts |= other.parts
        parameters += other.parameters
    parts["optimizer"] = optimizer = adamw(parameters, args)
    checkpoint = args.out / "checkpoint.pt"
    config = runtime.plain(args) | {"data_sha256": data.fingerprint(train)}
    done = restore(parts, checkpoint, args.init, config)
    log = runtime.Log(args.out / "log.jsonl", config, rt, done)

    finite = runtime.FiniteCheck(rt.device)
    networks = [network] + [other.network for other in others]
    batches = data.batches(
        train,
        args.batch,
        args.seed,
        start=done,
        rank=rt.rank,
        world=rt.world,
        workers=args.workers,
        device=rt.device,
    )
    for step in runtime.steps("tokenizer", done, args.steps, rt):
        batch = next(batches)
        runtime.report_skipped(batch["skipped"])
        x = batch["x"].contiguous(memory_format=torch.channels_last)
        draws = noise(tokenizer, x, args.batch, args.seed, step, rt)
        lambda1 = args.lambda1 * min(1, (step + 1) / max(1, args.ve_warmup))

        optimizer.zero_grad(set_to_none=True)
        for x, *draws in runtime.micro_batches(networks, args.accumulate, x, *draws):
            with rt.autocast(args.precision):
                mean, logvar, z, x_hat, *v_hat = network(x, *draws)

            # Eq. 11, or one of the objectives with which it is compared.
            rec = reconstruction(x_hat, x)
            if tokenizer.diffuses:
                rec = reconstruction(x_hat, x, *v_hat, flow.velocity(x, draws[2]))
            if args.loss == "ve":
                total = (rec + lambda1 * inverse_variance(logvar, args.delta)
                         + args.lambda2 * exponential_magnitude(z, args.tau))
            elif args.loss == "kl":
                total = rec + args.kl_weight * kl_divergence(mean, logvar)
            elif args.loss == "sigma":
                total = rec + args.mean_weight * square_magnitude(mean)
            elif args.loss == "none":
                total = rec
            else:
                total = (rec + lambda1 * ANALYZE2[args.loss](logvar)
                         + args.lambda2 * exponential_magnitude(z, args.tau))
            terms = {"rec": rec}

            # What else draws at the tokenizer is balanced with L_rec.
            for other in others:
                if step >= other.start:
                    loss = other.loss(x, mean, z, x_hat)
                    weight = balance(rec, loss, other, x[0].numel())
                    total = total + weight * loss
                    terms |= {other.name: loss, f"{other.name}_weight": weight}
            (total / args.accumulate).backward()

        lr = runtime.learning_rate(step, args.steps, args.lr, args.warmup,
                                   args.cooldown, args.cosine)
        optimizer.param_groups[0]["lr"] = lr
        # The bound counts per pixel value, so that it fits images of every size.
        norm = nn.utils.clip_grad_norm_(parameters, args.clip * x[0].numel())
        optimizer.step()
        for other in others:
            if step >= other.start:
                other.learn(lr)
        terms |= {"total": total, "grad_norm": norm / x[0].numel()}
        finite.add(step, terms)

        step += 1
        if step % args.log_every == 0 or step == args.steps:
            finite.flush()
            log.write(
                step=step,
                lr=lr,
                **runtime.mean_over_ranks(terms),
                **metrics.latent_summary(mean, logvar, z, tokenizer.learns_sigma),
                memory_gib=runtime.peak_memory(rt.device),
            )
        stop = runtime.stop_asked()
        if step % args.save_every == 0 or step == args.steps or stop:
            finite.flush()
            runtime.check_same_on_all_ranks(tokenizer)
            if rt.is_main:
                scores, statistics = validate(
                    tokenizer, val, args.seed, reconstruction,
                    picture=args.out / f"images/{step:07d}.png")
                if args.loss == "ve" and args.lambda1 and not tokenizer.diffuses:
                    scores["balance"] = scores["noise_cost"] / args.lambda1   # 1: Eq. 14
                log.write(step=step, held_out=scores)
                state = {name: part.state_dict() for name, part in parts.items()}
                state |= statistics | {
                    "kind": "tokenizer",
                    "config": config,
                    "model_config": tokenizer.config,
                    "step": step,
                }
                checkpoints.save(state, checkpoint)
            runtime.barrier()
        if stop:
            raise runtime.Stopped(f"stopped at step {step}; the same command goes on")
    rt.print(f"{checkpoint} has {args.steps} steps")


if __name__ == "__main__":
    main()
