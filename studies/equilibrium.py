"""Is sigma where Eq. 14 wants it, and does the decoder bear the sampler's error?

    python -m studies.equilibrium runs/dit/checkpoint.pt measured.json

Both are measured on a transformer and on the tokenizer that it names.  Eq. 14
is about held-out images: the trained loss is stationary in sigma where

    sigma^4 = lambda1 / T,   T = d E L_rec / d sigma^2,

whatever L_rec is.  Eq. 7's T is another one: the diagonal of J^T J, which is
that of the squared error.  The first T says whether training has converged in
sigma, and the second whether sigma follows the decoder as the paper describes.

The sampler's error is the difference of generated latents from those of eight
times as many Euler steps.  The paper holds that it harms where it exceeds sigma.
"""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import runtime  # before torch, which it tells how threads wait

import torch
from torch import Tensor

import checkpoints
import data
import flow
import losses
import models
from runtime import InputError

Decoder = Callable[[Tensor], Tensor]
FINER = 8  # times the Euler steps of the integration that is taken for exact

# ------------------------------------------------------------------------------
# The two sensitivities T of every number of the latent, [B, C, h, w].


def squared_error_slope(
    decode: Decoder, z: Tensor, probes: int, g: torch.Generator
) -> Tensor:
    """Eq. 7's T: diag(J^T J) with J = d decode(z) / dz.

    It is the mean of (J^T v)^2 over vectors v of random signs (Hutchinson).
    """
    z = z.detach().requires_grad_()
    x_hat, total = decode(z), torch.zeros_like(z)
    for _ in range(probes):
        v = torch.randint(0, 2, x_hat.shape, generator=g).to(x_hat) * 2 - 1
        (pull,) = torch.autograd.grad(x_hat, z, v, retain_graph=True)
        total += pull.square()
    return total / probes


def trained_loss_slope(
    decode: Decoder, x: Tensor, mean: Tensor, std: Tensor, draws: int,
    g: torch.Generator,
) -> Tensor:
    """d / d sigma^2 of E |decode(mean + sigma eps) - x|.

    It is E[dL/dz eps] / (2 sigma), unbiased and noisy: average it before taking
    a logarithm.  Pairs eps and -eps cancel the gradient at the mean.
    """
    total = torch.zeros_like(mean)
    for _ in range(draws):
        eps = torch.randn(mean.shape, generator=g).to(mean)
        for signed in (eps, -eps):
            z = (mean + std * signed).detach().requires_grad_()
            loss = len(x) * losses.absolute_error(decode(z), x)
            total += torch.autograd.grad(loss, z)[0] * signed
    return total / (4 * draws * std)


# ------------------------------------------------------------------------------
# Eq. 14 is a straight line of log sigma on log T.


def slope_of(y: Tensor, x: Tensor) -> float | None:
    """The least-squares slope of y [N] on x [N], if x varies."""
    (xx, xy), _ = torch.cov(torch.stack([x, y]).double()).tolist()
    return xy / xx if xx > 0 else None


def equilibrium(
    sigma: Tensor, trained: Tensor, squared: Tensor, lambda1: float,
    bins: int = 20,
) -> dict[str, Any]:
    """What Eq. 14 says of sigma and the two kinds of T, all [N].

    equilibrium_slope  of log sigma on log T of the trained loss, which is
                       averaged in equally full bins of sigma; in theory -1/4
    equilibrium_ratio  geometric mean of sigma^4 T / lambda1 there; in theory 1
    trace_slope        of log sigma on log T of Eq. 7, number by number
    """
    parts = torch.argsort(sigma).chunk(bins)
    log_sigma = torch.stack([sigma[p].log10().mean() for p in parts])
    t = torch.stack([trained[p].mean() for p in parts])
    log_sigma, log_t = log_sigma[t > 0], t[t > 0].log10()
    log_ratio = (4 * log_sigma + log_t - math.log10(lambda1)).mean().item()
    of_all, of_trace = sigma.log10(), squared.clamp(min=1e-12).log10()
    few = torch.linspace(0, len(sigma) - 1, min(len(sigma), 500)).long()
    rounded = [[round(v, 4) for v in a[few].tolist()] for a in (of_all, of_trace)]
    return {
        "equilibrium_slope": slope_of(log_sigma, log_t) if len(log_t) > 2 else None,
        "equilibrium_ratio": 10**log_ratio if len(log_t) else None,
        "trace_slope": slope_of(of_all, of_trace),
        "bins": {"log_sigma": log_sigma.tolist(), "log_t": log_t.tolist()},
        "points": {"log_sigma": rounded[0], "log_t": rounded[1]},
    }


def measure_equilibrium(
    tokenizer: models.Tokenizer, config: dict[str, Any], lambda1: float, n: int
) -> tuple[dict[str, Any], Tensor]:
    """Eq. 14 on n held-out images, for the VE loss, and the mean sigma^2 [C]."""
    place = next(tokenizer.parameters()).device
    images = data.open_dataset(
        config["data"], config["size"], "val", config["seed"])
    x = torch.cat([part["x"] for part in data.once(images, n, limit=n)]).to(place)
    mean, logvar = tokenizer.posterior(x)
    sigma, g, found = torch.exp(0.5 * logvar), runtime.generator(0, "slopes"), {}
    if config["loss"] == "ve":
        pair = (trained_loss_slope(tokenizer.decode, x, mean, sigma, 32, g),
                squared_error_slope(tokenizer.decode, mean, 16, g))
        flat = (a.flatten().cpu() for a in (sigma, *pair))
        found = equilibrium(*flat, lambda1)
    return found, logvar.exp().mean((0, 2, 3))


# ------------------------------------------------------------------------------
# The sampler's error, in the latent and in the picture.


def perturbation(coarse: Tensor, fine: Tensor, sigma: Tensor) -> dict[str, float | None]:
    """Latents [B, C, h, w] and sigma [C], in units of the latent's spread."""
    error = coarse - fine
    rms, wide = error.square().mean().sqrt().item(), sigma.square().mean().sqrt().item()
    return {
        "sampler_error": rms,
        "sampler_over_sigma": rms / wide if wide > 0 else None,
        "sampler_outside": (error.abs() > sigma[:, None, None]).double().mean().item(),
    }


@torch.no_grad()
def measure_sampler(
    dit: models.DiT, tokenizer: models.Tokenizer, mean: Tensor, std: Tensor,
    sigma2: Tensor, n: int, steps: int,
) -> dict[str, float]:
    """The error of `steps` Euler steps, on n generated latents.

    mean, std: of the latents that the transformer has learned, [C].
    """
    C, side, classes = (
        dit.config[key] for key in ("in_channels", "input_size", "num_classes"))
    g = runtime.generator(0, "sampler")
    noise = torch.randn(n, C, side, side, generator=g).to(std.device)
    y = (torch.arange(n) % classes).to(std.device)
    field = flow.guided_velocity(dit, y, null=classes, scale=1.0)
    coarse, fine = (flow.euler(field, noise, k) for k in (steps, FINER * steps))
    pictures = [tokenizer.decode(flow.denormalize(z, mean, std)).clamp(-1, 1)
                for z in (coarse, fine)]
    error = (pictures[0] - pictures[1]).square().mean().item() / 4
    psnr = -10 * math.log10(max(error, 1e-12))
    return perturbation(coarse, fine, sigma2.sqrt() / std) | {"sampler_psnr": psnr}


@runtime.command
def main(argv: list[str] | None = None) -> None:
    p = runtime.Parser(__doc__)
    add, count = p.add_argument, runtime.positive_int
    add("dit", type=Path, help="checkpoint of train_dit.py")
    add("out", type=Path, help="JSON file of what is found")
    add("--tokenizer", type=Path, help="its tokenizer, if that is elsewhere now")
    add("--count", type=count, default=32, help="images, and generated latents")
    add("--steps", type=count, default=50, help="Euler steps of the sampler")
    add("--device", default="auto", help="auto, cpu, cuda or mps")
    args = p.parse(argv)
    rt = runtime.start(args.device)
    runtime.claim(rt, args.out.parent, args.out)
    place = rt.device
    dit, checkpoint = checkpoints.load_dit(args.dit)
    if "latent_mean" not in checkpoint:
        raise InputError(f"{args.dit} is a published file: give one of train_dit.py")
    path = args.tokenizer or checkpoints.tokenizer_of(args.dit, checkpoint)
    tokenizer, source = checkpoints.load_tokenizer(path)
    if "config" not in source:
        raise InputError(f"{path} does not name its images: give one of train_tokenizer.py")
    dit, tokenizer = (net.to(place).requires_grad_(False) for net in (dit, tokenizer))
    config, moved = source["config"], source.get("lambda1")   # by --target-noise
    lambda1 = moved["log_lambda1"].exp().item() if moved else config["lambda1"]
    other = tokenizer.diffuses or config.get("perceptual_weight") or not lambda1
    if config["loss"] == "ve" and other:
        raise InputError(f"{path}: Eq. 14 is measured for the L1 error, a decoder of one step "
                         "and a lambda1 above 0")
    found, sigma2 = measure_equilibrium(tokenizer, config, lambda1, args.count)
    mean, std = (checkpoint[f"latent_{key}"].to(place) for key in ("mean", "std"))
    found |= measure_sampler(dit, tokenizer, mean, std, sigma2, args.count, args.steps)
    found["lambda1"] = lambda1
    runtime.write_json(args.out, found)


if __name__ == "__main__":
    main()
