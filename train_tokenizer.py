"""Train a tokenizer x -> z -> x_hat with the VE loss or one of its baselines (Sec. 4 of the paper).

    laptop       python train_tokenizer.py                      # VE on built-in shapes, minutes on a CPU
    one GPU      python train_tokenizer.py --preset vavae-f16d32 --data imagenet
    eight GPUs   torchrun --nproc_per_node=8 train_tokenizer.py --preset vavae-f16d32 --data imagenet

--loss ve     L_rec + lambda1 / (sigma^2 + delta) + lambda2 exp(|z| - tau)      Eqs. 9-11; --variance-form
--loss kl     L_rec + beta KL                                                   Eq. 1
--loss sigma  L_rec + w |mean|^2, the noise fixed in advance                    sigma-VAE
--loss none   L_rec, no noise at all

A run that was killed goes on from --out's checkpoint.pt when the command is repeated, to the same numbers.
"""

import argparse
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torchvision.utils import make_grid, save_image
from tqdm import tqdm

import data
import features
import losses
import metrics
import models
import runtime
from runtime import InputError, Runtime

# ------------------------------------------------------------------------------------------------------------
# Knobs.  A preset is a row of defaults; any flag overrides it.  The learning rate is the paper's 2.5e-5 at
# batch 64 for the f16 tokenizers and is never scaled behind your back.  The discriminator's start counts
# *batches*: VA-VAE's "5001" counts the steps of two optimisers.  The alignment's weight and margins are those
# of its third stage, which the paper "mainly" follows.

PAPER = dict(size=256, batch=64, lr=2.5e-5, perceptual_weight=1.0, disc_weight=0.5, align_weight=0.0)
VAVAE = PAPER | dict(model="f16d32", align_weight=0.1)
PRESETS: dict[str, dict[str, Any]] = {
    "demo": dict(model="vit-demo", size=32, batch=32, lr=1e-3, steps=1500, perceptual_weight=0.0,
                 disc_weight=0.0, align_weight=0.0),
    "ldm-f16d16": PAPER | dict(model="f16d16", steps=200_182),   # 10 epochs of ImageNet
    "vavae-f16d32": VAVAE | dict(steps=320_292),   # 16 epochs
    "vavae-f16d32-finetune": VAVAE | dict(steps=100_091, disc_start=0, ve_warmup=1000),   # 5 epochs
}
VARIANCE_FORMS: dict[str, Callable[[Tensor, float], Tensor]] = {   # of --loss ve, on logvar and delta
    "inverse": lambda logvar, delta: losses.inverse_variance(logvar, delta),
    "negative": lambda logvar, delta: losses.negative_variance(logvar),
    "log": lambda logvar, delta: losses.log_entropy(logvar),
}
FREE = {"steps", "log_every", "save_every", "image_every", "workers", "device", "out", "smoke", "eval_images"}
SMOKE = dict(steps=4, batch=4, log_every=1, save_every=2, image_every=4, eval_images=8, stats_images=8,
             workers=0, out=Path("runs/smoke/tokenizer"))


def parse(argv: list[str] | None) -> argparse.Namespace:
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0],
                                formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    p.add_argument("--preset", choices=PRESETS, default="demo",
                   help="defaults for model, size, batch, lr, steps (epochs of ImageNet), LPIPS, "
                   "discriminator and alignment")
    p.add_argument("--data", default="shapes", help="'shapes', 'cifar10', or a folder of class folders")
    p.add_argument("--size", type=int, help="image side in pixels")
    p.add_argument("--model", choices=models.AUTOENCODERS, help="row of models.AUTOENCODERS")
    p.add_argument("--latent-norm", action="store_true",
                   help="ViT: divide the mean of each token by its RMS over the channels, as GAE does")
    p.add_argument("--standardize-mean", action="store_true",
                   help="batch statistics give every channel of the mean unit deviation: ve then leaves "
                   "Eq. 10 out, lambda2 and tau with it")
    p.add_argument("--export", type=Path, metavar="FILE",
                   help="train nothing: write the run in --out as a VA-VAE checkpoint, for LightningDiT")
    p.add_argument("--out", type=Path, default=Path("runs/tokenizer"), help="folder of checkpoint and log")
    g = p.add_argument_group("loss (weights are for sums over C*H*W, averaged over the batch)")
    g.add_argument("--loss", choices=["ve", "kl", "sigma", "none"], default="ve", help="what acts on z")
    g.add_argument("--variance-form", choices=VARIANCE_FORMS, default="inverse", help="ve: what expands "
                   "sigma: 1 / (sigma^2 + delta), or Analyze 2's -sigma^2 or -log sigma^2")
    g.add_argument("--lambda1", type=float, default=0.1, help="ve: weight of that form, Eq. 9")
    g.add_argument("--lambda2", type=float, default=1e-6, help="ve: weight of exp(|z| - tau), Eq. 10")
    g.add_argument("--tau", type=float, default=1.0, help="ve: tau of Eq. 10")
    g.add_argument("--delta", type=float, default=1e-6, help="ve: delta of Eq. 9, below any sigma^2 wanted")
    g.add_argument("--kl-weight", type=float, default=1e-6, help="kl: beta of Eq. 1")
    g.add_argument("--sigma", type=float, default=0.2, help="sigma: standard deviation of the noise")
    g.add_argument("--sigma-mode", choices=["fixed", "gaussian"], default="gaussian",
                   help="sigma: one scale for all, or one scale per image, |N(0, sigma/0.8)|")
    g.add_argument("--mean-weight", type=float, default=0.24,
                   help="sigma: weight of |mean|^2 (LatentLM's 0.01 of means is 0.24 of sums for f16d32)")
    g.add_argument("--perceptual-weight", type=float, help="weight of N_x * LPIPS; 0 needs no VGG weights")
    g.add_argument("--disc-weight", type=float, help="weight of the adversarial loss; 0: no discriminator")
    g.add_argument("--disc-start", type=int, default=2501, help="batches before the autoencoder hears of it")
    g.add_argument("--disc-warmup", type=int, default=0, help="batches the discriminator learns before that")
    g.add_argument("--disc-adaptive", action=argparse.BooleanOptionalAction, default=True,
                   help="scale it to the reconstruction's gradient at the decoder's last layer; otherwise by "
                   "C*H*W, which makes 0.5 the constant weight of GAE")
    g.add_argument("--align-weight", type=float, help="weight of VA-VAE's alignment to --teacher, relative "
                   "to the reconstruction's gradient at the encoder's last layer; 0 needs no teacher")
    g.add_argument("--align-margins", type=float, nargs=2, default=(0.25, 0.5), metavar=("MDMS", "MCOS"),
                   help="what its distance-matrix and cosine losses forgive")
    g.add_argument("--teacher", default="dinov2_vitl14", help="dinov2_vits14, _vitb14 or _vitl14, a file of "
                   "their weights, or module:function: [B, 3, H, W] in [-1, 1] -> [B, D, h, w] as the latent")
    g.add_argument("--teacher-normalize", action=argparse.BooleanOptionalAction, default=False,
                   help="give DINOv2 ImageNet's mean and deviation, which VA-VAE's training left out")
    g.add_argument("--reduction", choices=["sum", "mean"], default="sum",
                   help="mean divides the whole objective by C*H*W: the same gradients, scaled")
    g = p.add_argument_group("optimisation (AdamW, betas 0.5 and 0.9, constant rate after a linear warm-up)")
    g.add_argument("--steps", type=int, help="optimiser steps in all")
    g.add_argument("--batch", type=int, help="images per step, over all processes")
    g.add_argument("--lr", type=float, help="learning rate, used as it is unless --scale-lr")
    g.add_argument("--scale-lr", action="store_true", help="multiply it by --batch over the preset's batch")
    g.add_argument("--warmup", type=int, default=100, help="steps of linear warm-up")
    g.add_argument("--weight-decay", type=float, default=0.0, help="of AdamW; the paper does not state it")
    g.add_argument("--clip", type=float, default=1.0, help="largest gradient norm, of objective / (C*H*W)")
    g.add_argument("--accumulate", type=int, default=1, help="parts in which a process takes its batch")
    g.add_argument("--init", type=Path, help="start from this checkpoint, ours or VA-VAE's or LDM's")
    g.add_argument("--init-sigma", type=float, help="with --init: set every posterior's sigma to this value")
    g.add_argument("--ve-warmup", type=int, default=0, help="steps over which lambda1 grows from 0")
    g.add_argument("--recompute-decoder", action="store_true",
                   help="keep no activations of the decoder's levels: less memory, a second forward")
    g.add_argument("--compile", action="store_true", help="torch.compile encoder and decoder")
    g = runtime.add_running_flags(p, image_every=500)
    g.add_argument("--eval-images", type=int, default=256, help="held-out images for these metrics")
    g.add_argument("--stats-images", type=int, default=2000, help="images for the latent's mean and std")
    first, _ = p.parse_known_args(argv)
    p.set_defaults(**PRESETS[first.preset] | (SMOKE if first.smoke else {}))
    return p.parse_args(argv)


# ------------------------------------------------------------------------------------------------------------
# The objective, Eq. 1 or Eq. 11, as a module so that DDP sees one forward.  Terms come back unweighted, and
# the weights are named beside them, so the log shows what the optimiser added up.


class Objective(nn.Module):
    """forward(x, eps, scale) -> (terms, moments, x_hat); terms: every loss of the batch, [] each,
    unweighted.
    """

    def __init__(self, autoencoder: models.Tokenizer, args: argparse.Namespace, rt: Runtime) -> None:
        super().__init__()
        self.autoencoder, self.autocast = autoencoder, lambda: rt.autocast(args.precision)
        self.loss, self.delta, self.tau = args.loss, args.delta, args.tau
        self.form, self.standardized = VARIANCE_FORMS[args.variance_form], args.standardize_mean
        self.posterior = dict(loss=args.loss, sigma=args.sigma, sigma_mode=args.sigma_mode)
        self.weights = {"rec": 1.0, "lpips": args.perceptual_weight, "var": args.lambda1, "reg": args.lambda2,
                        "kl": args.kl_weight, "mean": args.mean_weight}
        # In a list, LPIPS is no submodule: it enters neither checkpoint, nor .train(), nor DDP.
        self.lpips = [losses.load_lpips().to(rt.device)] if args.perceptual_weight else []
        self.teacher, self.margins = None, args.align_margins
        if args.align_weight:
            self.teacher, width = open_teacher(autoencoder, args, rt)
            self.projection = nn.Conv2d(autoencoder.channels, width, 1, bias=False).to(rt.device)

    def forward(self, x: Tensor, eps: Tensor, scale: Tensor) -> tuple[dict[str, Tensor], Tensor, Tensor]:
        with self.autocast():
            moments = self.autoencoder.encode(x)
        z = losses.sample_posterior(moments, eps, scale, **self.posterior)
        with self.autocast():
            x_hat = self.autoencoder.decode(z)
        mean, logvar = losses.split_moments(moments)
        terms = self.reconstruction(x_hat, x)
        if self.teacher:
            terms["align"] = self.alignment(x, z)
        if self.loss == "ve":
            terms["var"] = self.form(logvar, self.delta)
            if not self.standardized:
                terms["reg"] = losses.exponential_magnitude(z, self.tau)
        elif self.loss == "kl":
            terms["kl"] = losses.kl_divergence(mean, logvar)
        elif self.loss == "sigma":
            terms["mean"] = losses.square_magnitude(mean)
        return terms, moments.detach(), x_hat

    def reconstruction(self, x_hat: Tensor, x: Tensor) -> dict[str, Tensor]:
        terms = {"rec": losses.absolute_error(x_hat, x)}
        if self.lpips:
            terms["lpips"] = losses.perceptual_error(self.lpips[0], x_hat, x)
        return terms

    def alignment(self, x: Tensor, z: Tensor) -> Tensor:
        """VA-VAE's L_mdms + L_mcos of the projected sample z, which the decoder takes unprojected."""
        with torch.no_grad(), self.autocast():
            target = self.teacher(x).float()
        projected = self.projection(z)
        return (losses.marginal_distance_matrix(projected, target, self.margins[0])
                + losses.marginal_cosine(projected, target, self.margins[1]))


def open_teacher(autoencoder: models.Tokenizer, args: argparse.Namespace,
                 rt: Runtime) -> tuple[Callable[[Tensor], Tensor], int]:
    """--teacher as a function (no submodule, like LPIPS), and the width of its features."""
    side = args.size // autoencoder.stride
    teacher = features.load_teacher(args.teacher, side, args.teacher_normalize)
    if isinstance(teacher, nn.Module):
        teacher = teacher.eval().requires_grad_(False).to(rt.device).__call__
    with torch.no_grad():
        shape = list(teacher(torch.zeros(1, 3, args.size, args.size, device=rt.device)).shape)
    if len(shape) != 4 or shape[2:] != [side, side]:
        raise InputError(f"--teacher {args.teacher} gives {shape} for one image: [1, D, {side}, {side}], the "
                         "grid of the latent, is needed")
    return teacher, shape[1]


class Adversary:
    """VQGAN's discriminator with its optimiser.  `fool` is the autoencoder's side, `learn` the
    discriminator's.

    Real and reconstructed images pass separately: together they would share BatchNorm's statistics, which
    belong to one process's part of a batch.
    """

    class Both(nn.Module):
        """forward(x, x_hat) -> logits of both, in one forward for DDP."""

        def __init__(self, net: nn.Module) -> None:
            super().__init__()
            self.net = net

        def forward(self, x: Tensor, x_hat: Tensor) -> tuple[Tensor, Tensor]:
            return self.net(x).float(), self.net(x_hat).float()

    def __init__(self, args: argparse.Namespace, rt: Runtime) -> None:
        self.args, self.rt = args, rt
        self.net = models.PatchGAN().to(rt.device, memory_format=torch.channels_last)
        self.both = rt.wrap(self.Both(self.net))
        self.optimizer = torch.optim.AdamW(self.net.parameters(), lr=args.lr, betas=(0.5, 0.9),
                                           weight_decay=args.weight_decay, fused=True)

    def fool(self, x_hat: Tensor) -> Tensor:
        """-E D(x_hat); no gradient reaches the discriminator."""
        self.net.requires_grad_(False)
        with self.rt.autocast(self.args.precision):
            return losses.hinge_generator(self.net(x_hat).float())

    def state(self) -> dict[str, Any]:
        return {"discriminator": self.net.state_dict(), "disc_optimizer": self.optimizer.state_dict()}

    def learn(self, pairs: list[tuple[Tensor, Tensor]], lr: float) -> dict[str, Tensor]:
        """One step on the (x, x_hat) parts of a batch.  Returns: its loss and both mean logits."""
        self.net.requires_grad_(True)
        self.optimizer.param_groups[0]["lr"] = lr
        self.optimizer.zero_grad(set_to_none=True)
        rows = []
        for n, (x, x_hat) in enumerate(pairs):
            with runtime.sync_gradients(self.both, n + 1 == len(pairs)):
                with self.rt.autocast(self.args.precision):
                    real, fake = self.both(x, x_hat)
                loss = losses.hinge_discriminator(real, fake)
                (loss / len(pairs)).backward()
            rows.append(torch.stack([loss, real.mean(), fake.mean()]).detach())
        self.optimizer.step()
        return dict(zip(("disc", "logits_real", "logits_fake"), torch.stack(rows).mean(0)))


def balance(reference: Tensor, loss: Tensor, layer: nn.Parameter, scale: float, maximum: float) -> Tensor:
    """scale times the ratio of both losses' gradients at `layer`, over all ranks: VQGAN's adaptive weight."""
    gradients = [runtime.all_reduce_mean(torch.autograd.grad(a, layer, retain_graph=True)[0])
                 for a in (reference, loss)]
    return scale * losses.adaptive_weight(*gradients, maximum=maximum)


def step_gradients(step_module: nn.Module, objective: Objective, adversary: Adversary | None,
                   parts: list[tuple[Tensor, ...]], step: int, factor: float,
                   args: argparse.Namespace) -> tuple[dict[str, Tensor], Tensor, list[tuple[Tensor, Tensor]]]:
    """Gradients of one batch, added up over its parts.  Returns: terms averaged (and each once more as the
    optimiser sees it, NAME_weighted), moments, (x, x_hat) per part.
    """
    rows, moments, pairs = [], [], []
    weights = objective.weights | {"var": args.lambda1 * min(1.0, (step + 1) / max(1, args.ve_warmup))}
    autoencoder = objective.autoencoder
    for n, (x, eps, scale) in enumerate(parts):
        with runtime.sync_gradients(step_module, n + 1 == len(parts)):
            terms, m, x_hat = step_module(x, eps, scale)
            # The reference is the reconstruction alone: neither KL nor VE enters the adaptive weights.
            reference = losses.weighted_sum({k: terms[k] for k in ("rec", "lpips") if k in terms}, weights)
            adaptive = {}
            if "align" in terms:
                adaptive["align"] = (autoencoder.encoder_last_layer, args.align_weight, 1e8)
            if adversary is not None and step >= args.disc_start:
                terms["adv"] = adversary.fool(x_hat)
                weights["adv"] = torch.full_like(terms["adv"], args.disc_weight * x[0].numel())
                if args.disc_adaptive:
                    adaptive["adv"] = (autoencoder.last_layer, args.disc_weight, 1e4)
            for name, (layer, base, maximum) in adaptive.items():
                weights[name] = balance(reference, terms[name], layer, base, maximum)
            total = losses.weighted_sum(terms, weights)
            (total * (factor / len(parts))).backward()
        row = {k: v.detach() for k, v in terms.items()}
        row |= {f"{k}_weighted": weights[k] * v for k, v in row.items()}
        row |= {f"{k}_weight": weights[k] for k in ("align", "adv") if k in terms}
        row |= {f"{k}_at_max": (weights[k] >= base * maximum).float()
                for k, (_, base, maximum) in adaptive.items()}
        rows.append(row)
        moments.append(m)
        pairs.append((x, x_hat.detach()))
    return {k: torch.stack([row[k] for row in rows]).mean() for k in rows[0]}, torch.cat(moments), pairs


def noise(rt: Runtime, args: argparse.Namespace, shape: tuple[int, ...], step: int) -> tuple[Tensor, Tensor]:
    """eps [b, C, h, w] and the sigma-VAE's scale [b] of one step: a function of seed and step alone."""
    return (runtime.global_randn(shape, rt, args.seed, "eps", step),
            runtime.global_randn(shape[:1], rt, args.seed, "scale", step))


# ------------------------------------------------------------------------------------------------------------
# How well held-out images decode, and whether sigma is where Eq. 14 wants it.


@torch.no_grad()
def evaluate(objective: Objective, held_out: Tensor, args: argparse.Namespace, rt: Runtime) -> dict[str, Any]:
    """PSNR of held-out images through the posterior's mean and through a sample, the latent's summary, a
    picture, and for VE the balance ratio

        R = ( L_rec(sample) - L_rec(mean) ) / ( lambda1 sum 1 / (sigma^2 + delta) )

    1 at the equilibrium of Eq. 14 where Eq. 8 holds; up to 2 where L_rec grows like sigma; far below 1 while
    sigma is still growing.
    """
    objective.eval()
    moments, zs, decoded, error = [], [], [], torch.zeros(2)
    for i, x in enumerate(held_out.split(args.batch)):
        x = x.to(rt.device)
        with rt.autocast(args.precision):
            m = objective.autoencoder.encode(x)
        draws = runtime.generator(args.seed, "held-out", i, device=rt.device)
        eps = torch.randn(m[:, ::2].shape, generator=draws, device=rt.device)
        scale = torch.randn(len(x), generator=draws, device=rt.device)
        z = losses.sample_posterior(m, eps, scale, **objective.posterior)
        with rt.autocast(args.precision):
            pair = [objective.autoencoder.decode(latent) for latent in (losses.split_moments(m)[0], z)]
        error += torch.stack([len(x) * losses.weighted_sum(objective.reconstruction(x_hat, x),
                                                           objective.weights) for x_hat in pair]).cpu()
        moments.append(m.cpu())
        zs.append(z.cpu())
        decoded.append(torch.stack(pair).cpu())
    objective.train()
    moments, z, (from_mean, from_sample) = torch.cat(moments), torch.cat(zs), torch.cat(decoded, 1)
    mean, logvar = losses.split_moments(moments)
    scores = {"psnr_mean": metrics.psnr(data.to_uint8(from_mean), data.to_uint8(held_out)).mean().item(),
              "psnr_sample": metrics.psnr(data.to_uint8(from_sample), data.to_uint8(held_out)).mean().item()}
    if args.loss == "ve" and args.lambda1 and args.variance_form == "inverse":
        cost = (error[1] - error[0]) / len(held_out)
        scores["balance"] = (cost / (args.lambda1 * losses.inverse_variance(logvar, args.delta))).item()
    return scores | metrics.latent_summary(mean, logvar, z, args.loss in ("ve", "kl")) | {
        "picture": picture(held_out, from_mean, from_sample, moments, args.loss)}


def picture(x: Tensor, from_mean: Tensor, from_sample: Tensor, moments: Tensor, loss: str,
            n: int = 12) -> Tensor:
    """Rows: input, decoded mean, decoded sample and, where sigma is learned, its map (bright = wide).  [3,
    H, W].
    """
    rows = [x[:n], from_mean[:n], from_sample[:n]]
    if loss in ("ve", "kl"):
        log_sigma = losses.split_moments(moments[:n])[1].mean(1, keepdim=True)
        log_sigma = nn.functional.interpolate(log_sigma, size=x.shape[-2:])
        low, high = log_sigma.min(), log_sigma.max()
        rows.append((2 * (log_sigma - low) / (high - low).clamp(min=1e-6) - 1).expand(-1, 3, -1, -1))
    return make_grid(torch.cat(rows).clamp(-1, 1) / 2 + 0.5, nrow=min(n, len(x)), padding=2)


@torch.no_grad()
def latent_statistics(objective: Objective, dataset: Any, args: argparse.Namespace,
                      rt: Runtime) -> tuple[Tensor, Tensor]:
    """Mean and deviation of the sampled z per channel, over --stats-images training images: [C], [C]."""
    objective.eval()
    total = torch.zeros(3, objective.autoencoder.channels, dtype=torch.float64, device=rt.device)
    batch = max(1, args.batch // rt.world)
    for b in data.once(dataset, batch, rt.rank, rt.world, limit=args.stats_images, device=rt.device):
        x = b["x"]
        with rt.autocast(args.precision):
            m = objective.autoencoder.encode(x)
        shape = (len(x), objective.autoencoder.channels, *m.shape[2:])
        draws = [runtime.generator(args.seed, "statistics", n) for n in b["index"].tolist()]
        eps = torch.stack([torch.randn(shape[1:], generator=g) for g in draws]).to(rt.device)
        scale = torch.stack([torch.randn((), generator=g) for g in draws]).to(rt.device)
        z = losses.sample_posterior(m, eps, scale, **objective.posterior)
        z = z.double().transpose(0, 1).flatten(1)
        total += torch.stack([torch.full_like(total[0], z.shape[1]), z.sum(1), z.square().sum(1)])
    objective.train()
    n, s, s2 = runtime.all_reduce_sum(total)
    mean = s / n
    return mean.float().cpu(), (s2 / n - mean.square()).sqrt().float().cpu()


# ------------------------------------------------------------------------------------------------------------
# The loop.


def check(args: argparse.Namespace, autoencoder: models.Tokenizer, rt: Runtime) -> None:
    if args.size % autoencoder.stride:
        nearest = max(1, round(args.size / autoencoder.stride)) * autoencoder.stride
        raise InputError(f"--size {args.size} is not a multiple of {autoencoder.stride}, the stride of "
                         f"--model {args.model}; use {nearest}")
    if args.size != autoencoder.config.get("image_size", args.size):
        raise InputError(f"--model {args.model} has learned positions for {autoencoder.config['image_size']} "
                         f"pixels; --size {args.size} needs a convolutional model")
    if args.batch % rt.world:
        raise InputError(f"--batch {args.batch} does not divide over {rt.world} processes")
    for name in ("batch", "steps", "log_every", "save_every", "image_every", "eval_images", "stats_images"):
        if getattr(args, name) < 1:
            raise InputError(f"--{name.replace('_', '-')} must be at least 1, got {getattr(args, name)}")
    local = args.batch // rt.world
    if args.accumulate < 1 or local % args.accumulate:
        raise InputError(f"--accumulate {args.accumulate} does not divide the {local} images of a process")
    if args.disc_weight and args.size < 32:
        raise InputError(f"--size {args.size} is too small for the discriminator: 32, or --disc-weight 0")
    if args.preset == "vavae-f16d32-finetune" and args.init is None:
        raise InputError(f"--preset {args.preset} starts from a published checkpoint: give it with --init")
    if args.init_sigma is not None and (args.init is None or args.init_sigma <= 0):
        raise InputError("--init-sigma takes a positive sigma, and needs --init")
    if args.init_sigma is not None and not isinstance(autoencoder, models.Autoencoder):
        raise InputError(f"--init-sigma is for convolutional tokenizers, --model {args.model} is none")
    if args.delta <= 0:
        raise InputError(f"--delta must be positive, got {args.delta}")


def initialise(objective: Objective, adversary: Adversary | None, args: argparse.Namespace) -> None:
    """--init: weights from a checkpoint, with its discriminator and projection where it holds them;
    --init-sigma on top.

    A beta-VAE's sigma^2 of 1e-8 would answer Eq. 9 with a gradient of 1e7 per element: set sigma, or ramp
    lambda1.
    """
    autoencoder = objective.autoencoder
    with runtime.input_errors():
        source, state = models.load_autoencoder(args.init, autoencoder.config)
        autoencoder.load_state_dict(source.state_dict())
        prefix, published = "loss.discriminator.", state.get("state_dict", state)
        found = state.get("discriminator") or {k.removeprefix(prefix): v for k, v in published.items()
                                               if k.startswith(prefix)}
        if adversary is not None and found:
            models.load_strict(adversary.net, found, args.init)
        projection = state.get("projection", published.get("linear_proj.weight"))
        if objective.teacher and projection is not None:
            models.load_strict(objective.projection, {"weight": projection}, args.init)
    if args.init_sigma is not None:
        with torch.no_grad():
            autoencoder.quant_conv.weight[autoencoder.channels:] = 0
            autoencoder.quant_conv.bias[autoencoder.channels:] = 2 * math.log(args.init_sigma)


def resume(path: Path, objective: Objective, optimizer: torch.optim.Optimizer,
           adversary: Adversary | None, args: argparse.Namespace) -> int:
    """Load the run in `path` if there is one.  Returns the number of steps already done."""
    if not path.exists():
        return 0
    with runtime.input_errors():
        state = models.read_kind(path, "tokenizer")
    runtime.check_config(state["config"], runtime.plain(args), FREE, path)
    objective.autoencoder.load_state_dict(state["model"])
    if objective.teacher:
        objective.projection.load_state_dict({"weight": state["projection"]})
    optimizer.load_state_dict(state["optimizer"])
    if adversary is not None:
        adversary.net.load_state_dict(state["discriminator"])
        adversary.optimizer.load_state_dict(state["disc_optimizer"])
    return state["step"]


def export(args: argparse.Namespace) -> None:
    """--export: the run in --out with VA-VAE's names, and LightningDiT's latents_stats.pt beside it."""
    with runtime.input_errors():
        state = models.read_kind(args.out / "checkpoint.pt", "tokenizer")
    if state["model_config"].get("arch") == "vit":
        raise InputError(f"{args.out} holds a ViT tokenizer: VA-VAE's form is for convolutional ones")
    if "standardize_mean" in state["model_config"]:
        raise InputError(f"{args.out} holds a tokenizer with a standardised mean: VA-VAE's form has none")
    tensors = dict(state["model"])
    tensors |= {f"loss.discriminator.{k}": v for k, v in state.get("discriminator", {}).items()}
    tensors |= {"linear_proj.weight": state["projection"]} if "projection" in state else {}
    runtime.save_atomic({"state_dict": tensors}, args.export)
    statistics = args.export.with_name("latents_stats.pt")
    runtime.save_atomic({k: state[f"latent_{k}"].view(1, -1, 1, 1) for k in ("mean", "std")}, statistics)
    print(f"wrote {args.export} and {statistics}")


@runtime.command
def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    if args.export:
        return export(args)
    rt = runtime.start(args.device)
    train_set = data.open_dataset(args.data, args.size, "train", args.seed)
    held_out_set = data.open_dataset(args.data, args.size, "val", args.seed)
    torch.manual_seed(args.seed)   # the same initial weights on every rank
    config = models.AUTOENCODERS[args.model]
    if args.latent_norm and "latent_norm" not in config:
        raise InputError(f"--latent-norm is for ViT tokenizers, --model {args.model} is none")
    if args.standardize_mean and (args.latent_norm or rt.world > 1):
        raise InputError("--standardize-mean excludes --latent-norm, and takes its statistics from the batch "
                         "of one process: leave that out, or start one")
    chosen = {k: True for k in ("latent_norm", "standardize_mean") if getattr(args, k)}
    autoencoder = models.build_autoencoder(config | chosen)
    autoencoder.to(rt.device, memory_format=torch.channels_last)   # convolutions: 15 % faster on a CPU
    check(args, autoencoder, rt)
    autoencoder.decoder.recompute = args.recompute_decoder
    if args.compile:
        autoencoder.encoder.compile()
        autoencoder.decoder.compile()
    with runtime.input_errors():
        objective = Objective(autoencoder, args, rt)
    rate = args.lr * (args.batch / PRESETS[args.preset]["batch"] if args.scale_lr else 1)
    parameters = list(objective.parameters())
    optimizer = torch.optim.AdamW(parameters, lr=rate, betas=(0.5, 0.9),
                                  weight_decay=args.weight_decay, fused=True)
    checkpoint = args.out / "checkpoint.pt"
    adversary = Adversary(args, rt) if args.disc_weight else None
    if args.init and not checkpoint.exists():
        initialise(objective, adversary, args)
    done = resume(checkpoint, objective, optimizer, adversary, args)
    if done >= args.steps:
        rt.print(f"{checkpoint} already has {done} steps; raise --steps to go on")
        return
    log = runtime.Log(args.out / "log.jsonl", runtime.plain(args), rt, done)
    count = sum(p.numel() for p in autoencoder.parameters())
    rt.print(f"{args.model}: {count / 1e6:.1f} M parameters, {args.loss} on {args.data} at {args.size} px, "
             f"batch {args.batch}, lr {rate:g}, {rt.world} process(es) on {runtime.device_name(rt.device)}"
             + (f", resumed at step {done}" if done else ""))

    step_module = rt.wrap(objective)
    values = 3 * args.size ** 2                                   # N_x: C*H*W of an image
    scale = 1 / values if args.reduction == "mean" else 1.0
    side = args.size // autoencoder.stride
    shape = (args.batch // rt.world, autoencoder.channels, side, side)
    held_out = torch.cat([b["x"] for b in data.once(held_out_set, args.batch, limit=args.eval_images)])
    loader = data.batches(train_set, args.batch, args.seed, done, rt.rank, rt.world, args.workers,
                          device=rt.device)
    finite = runtime.FiniteCheck(rt.device)
    skipped, began = 0, time.monotonic()
    bar = tqdm(range(done, args.steps), "tokenizer", args.steps, initial=done, disable=not rt.is_main)
    for step in bar:
        batch = next(loader)
        skipped += runtime.report_skipped(batch["skipped"])
        x = batch["x"].contiguous(memory_format=torch.channels_last)
        lr = optimizer.param_groups[0]["lr"] = rate * min(1.0, (step + 1) / max(1, args.warmup))
        optimizer.zero_grad(set_to_none=True)
        eps, scales = noise(rt, args, shape, step)
        parts = list(zip(*(a.chunk(args.accumulate) for a in (x, eps, scales))))
        terms, moments, pairs = step_gradients(step_module, objective, adversary, parts, step, scale, args)
        # --clip is stated per pixel value, so it means the same under both reductions.
        norm = nn.utils.clip_grad_norm_(parameters, args.clip * values * scale) / (values * scale)
        optimizer.step()
        if adversary is not None and step >= args.disc_start - args.disc_warmup:
            terms |= adversary.learn(pairs, lr)
        finite.add(step, terms | {"gradient norm": norm})

        last = step + 1 == args.steps
        if (step + 1) % args.log_every == 0 or last:
            finite.flush()
            terms = runtime.mean_over_ranks(terms)
            mean, logvar = losses.split_moments(moments)
            z = losses.sample_posterior(moments, eps, scales, **objective.posterior)
            log.write(step=step + 1, **terms, grad_norm=norm, skipped=skipped, lr=lr,
                      seconds=time.monotonic() - began, memory_gib=runtime.peak_memory(rt.device),
                      **metrics.latent_summary(mean, logvar, z, args.loss in ("ve", "kl")))
            bar.set_postfix(rec=f"{terms['rec'].item() / values:.4f}")
        if ((step + 1) % args.image_every == 0 or last) and rt.is_main:
            scores = evaluate(objective, held_out, args, rt)
            (args.out / "images").mkdir(parents=True, exist_ok=True)
            save_image(scores.pop("picture"), args.out / "images" / f"{step + 1:07d}.png")
            log.write(step=step + 1, held_out=scores)
        if (step + 1) % args.save_every == 0 or last:
            finite.flush()
            runtime.check_same_on_all_ranks(autoencoder)
            latent_mean, latent_std = latent_statistics(objective, train_set, args, rt)
            if rt.is_main:
                runtime.save_atomic({
                    "kind": "tokenizer", "config": runtime.plain(args), "model_config": autoencoder.config,
                    "step": step + 1, "model": autoencoder.state_dict(), "optimizer": optimizer.state_dict(),
                    "latent_mean": latent_mean, "latent_std": latent_std,
                    **({"projection": objective.projection.weight.detach()} if objective.teacher else {}),
                    **(adversary.state() if adversary else {})}, checkpoint)
            runtime.barrier()
    rt.print(f"wrote {checkpoint}; held out: " + ", ".join(f"{k} {v:.4g}" for k, v in scores.items()
                                                                  if isinstance(v, float))
             if rt.is_main else "")


if __name__ == "__main__":
    main()
