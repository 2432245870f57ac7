"""The 2-D toy of "Taming Sampling Perturbations with Variance Expansion Loss", Figs. 1 and 2, supplement C.

A tokenizer with the better reconstruction and the lower diffusion loss that generates worse: a fractal of
1016 Gaussians whose density is known exactly, a latent that can be looked at, and the losses of losses.py.

    python toy2d.py                               # KL against VE, Figures 1-4, minutes on two cores
    python toy2d.py --seeds 0 1 2 3 4             # mean and standard deviation over five seeds
    python toy2d.py --sweep                       # forms, weights, sigma-VAE, normalised latent: one table
    python toy2d.py --preset paper --seeds 0 1 2  # the sizes of supplement C; one GPU
    python toy2d.py --smoke                       # every line of it, in seconds

Each arm (a loss, its weights, a seed) is one file under --out.  The same command again computes only the
missing ones, then draws and prints from the files.
"""

import argparse
import hashlib
import json
import math
import re
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib
import torch
from matplotlib import pyplot as plt
from torch import Tensor, nn
from tqdm import tqdm

import losses
import runtime

# ------------------------------------------------------------------------------------------------------------
# The data: a tree of anisotropic Gaussians, Eqs. 20-23, after Karras et al. (2024).  A branch is 8 Gaussians
# in a row; it splits in two 6 times, each child shorter, thinner and half as likely per unit of length.


class Mixture(NamedTuple):
    """phi, mu and Sigma of Eq. 20: weight [K] (sums to 1), mean [K, 2], covariance [K, 2, 2], all float64."""
    weight: Tensor
    mean: Tensor
    covariance: Tensor


def fractal(seed: int = 2, splits: int = 6, per_branch: int = 8) -> Mixture:
    """(2^(splits+1) - 1) * per_branch Gaussians with mean 0 and standard deviation 0.5 per axis.

    Level l: length 0.8^l (1 +- 20 %), thickness 0.055 * 0.8^l, turn 0.95 * 0.75^l radians (1 +- 20 %).
    """
    noise = torch.randn(2 ** (splits + 2), generator=runtime.generator(seed, "fractal"), dtype=torch.float64)
    jitter = iter((1 + 0.2 * noise).tolist())
    weight, mean, covariance = [], [], []
    branches = [(0, torch.zeros(2, dtype=torch.float64), math.pi / 2)]   # level, foot, direction
    for level, foot, angle in branches:                                  # the list grows while we walk it
        length = 0.8 ** level * next(jitter)
        along = torch.tensor([math.cos(angle), math.sin(angle)], dtype=torch.float64)
        across = along.flip(0) * torch.tensor([-1.0, 1.0])
        for k in range(per_branch):
            weight.append(length * 0.5 ** level)
            mean.append(foot + along * length * (k + 0.5) / per_branch)
            covariance.append((0.08 * length) ** 2 * along.outer(along)
                              + (0.055 * 0.8 ** level) ** 2 * across.outer(across))
        if level < splits:
            for side in (-1, 1):
                turn = side * 0.95 * 0.75 ** level * next(jitter)
                branches.append((level + 1, foot + along * length, angle + turn))
    w = torch.tensor(weight, dtype=torch.float64)
    w, m, c = w / w.sum(), torch.stack(mean), torch.stack(covariance)
    m = m - w @ m
    scale = 0.5 / (w @ (m.square() + c.diagonal(dim1=1, dim2=2))).sqrt()
    return Mixture(w, m * scale, c * scale.outer(scale))


def smooth(mixture: Mixture, sigma: float) -> Mixture:
    """The mixture convolved with N(0, sigma^2 I): Sigma_i + sigma^2 I, Eq. 22."""
    return mixture._replace(covariance=mixture.covariance + sigma ** 2 * torch.eye(2, dtype=torch.float64))


def component_log_density(mixture: Mixture, x: Tensor) -> Tensor:
    """log phi_i N(x; mu_i, Sigma_i), Eq. 21, for every point and component.  x: [N, 2] -> [N, K].

    A quadratic form in two dimensions has six coefficients, so all N x K of them are one matrix product with
    (x1^2, x1 x2, x2^2, x1, x2, 1).  float64: at a tip's precision of 3e4 its terms cancel.
    """
    precision = torch.linalg.inv(mixture.covariance)
    linear = (precision @ mixture.mean[..., None])[..., 0]
    constant = (mixture.weight.log() - math.log(2 * math.pi) - 0.5 * torch.logdet(mixture.covariance)
                - 0.5 * (linear * mixture.mean).sum(1))
    coefficients = torch.stack([-0.5 * precision[:, 0, 0], -precision[:, 0, 1], -0.5 * precision[:, 1, 1],
                                linear[:, 0], linear[:, 1], constant])
    x1, x2 = x.double().unbind(1)
    return torch.stack([x1 * x1, x1 * x2, x2 * x2, x1, x2, torch.ones_like(x1)], 1) @ coefficients


def log_density(mixture: Mixture, x: Tensor, chunk: int = 1024) -> Tensor:
    """log p(x), Eq. 20.  x: [N, 2] -> [N] float64; `chunk` points at a time bound the memory (8 MB)."""
    return torch.cat([component_log_density(mixture, part).logsumexp(1) for part in x.split(chunk)])


def score(mixture: Mixture, x: Tensor, chunk: int = 1024) -> Tensor:
    """grad_x log p(x) = sum_i r_i(x) Sigma_i^-1 (mu_i - x), Eq. 23, r_i the posterior share of component i.

    x: [N, 2] -> [N, 2] float64.  With noise: score(smooth(mixture, sigma), x).
    """
    precision = torch.linalg.inv(mixture.covariance)
    linear = (precision @ mixture.mean[..., None])[..., 0]
    parts = []
    for part in x.double().split(chunk):
        r = component_log_density(mixture, part).softmax(1)
        parts.append(r @ linear - ((r @ precision.flatten(1)).view(-1, 2, 2) @ part[..., None])[..., 0])
    return torch.cat(parts)


def sample(mixture: Mixture, n: int, generator: torch.Generator) -> Tensor:
    """n exact draws, [n, 2] float32, on the generator's device: a component by inverse CDF, its Gaussian."""
    device = generator.device
    cumulative = mixture.weight.cumsum(0).to(device)
    u = torch.rand(n, dtype=torch.float64, generator=generator, device=device)
    i = torch.searchsorted(cumulative, u).clamp(max=len(cumulative) - 1)
    root = torch.linalg.cholesky(mixture.covariance).float().to(device)[i]
    eps = torch.randn(n, 2, 1, generator=generator, device=device)
    return mixture.mean.float().to(device)[i] + (root @ eps)[..., 0]


# ------------------------------------------------------------------------------------------------------------
# The arms.  What the paper leaves open: here the flow learns the sample z, as latent diffusion does, in units
# of its standard deviation, so that the flow losses of two latents of different scale can be compared.


@dataclass(frozen=True)
class Arm:
    """One experiment: what presses on the variance and how hard, what holds the scale, what the flow sees."""
    name: str
    force: str                  # a key of FORCES
    weight: float               # of that term: the KL weight, or lambda1
    lambda2: float = 0.0        # weight of the exponential penalty, Eq. 10
    tau: float = 1.0            # its threshold
    sigma: float = 0.0          # of the fixed-sigma arms, in units of the standardised mean
    normalised: bool = False    # the mean is standardised per dimension: no lambda2, no tau
    flow_data: str = "sample"   # what the flow learns: the sample z of Eq. 5, or its "mean"
    flow_units: str = "std"     # the latent in units of its standard deviation, or "raw"
    seed: int = 0


def figure_arms(seed: int) -> list[Arm]:
    """Figures 1 and 2: KL at 1e-3 and VE at 1e-2 (supplement C), a KL so strong that it costs the
    reconstruction; and, for fairness, the KL weight that came out best in the sweep.
    """
    return [Arm("KL", "kl", 1e-3, seed=seed), Arm("KL 0.03", "kl", 3e-2, seed=seed),
            Arm("strong KL", "kl", 1e-1, seed=seed),
            Arm("VE", "inverse variance", 1e-2, lambda2=1e-6, seed=seed)]


def sweep_arms(seed: int) -> list[Arm]:
    """What Analyze 1 and 2 argue in words, one factor at a time around Figure 1's VE; then our own idea."""
    kl, *_, ve = arms = figure_arms(seed)
    arms += [replace(kl, name=f"KL {w:g}", weight=w) for w in (1e-6, 1e-5, 1e-4, 1e-2, 1.0)]
    arms += [replace(ve, name=f"VE lambda1={w:g}", weight=w) for w in (1e-4, 1e-3, 1e-1, 1.0)]
    arms += [replace(ve, name=f"VE lambda2={w:g}", lambda2=w) for w in (0.0, 1e-8, 1e-4, 1e-2, 1.0)]
    arms += [replace(ve, name=f"VE tau={t:g}", tau=t) for t in (0.0, 2.0, 4.0, 8.0, 16.0)]
    arms += [replace(ve, name=f"negative variance {w:g}", force="negative variance", weight=w)
             for w in (1e-3, 1e-2)]
    arms += [replace(ve, name=f"log-entropy {w:g}", force="log-entropy", weight=w)
             for w in (1e-3, 1e-2, 3e-2, 1e-1)]
    arms += [Arm(f"sigma-VAE {s:g}", "fixed sigma", 0.0, sigma=s, normalised=True, seed=seed)
             for s in (0.02, 0.05, 0.1, 0.15, 0.2, 0.4)]
    arms += [Arm(f"normalised VE {w:g}", "inverse variance", w, normalised=True, seed=seed)
             for w in (1e-6, 1e-5, 1e-4, 3e-4, 1e-3, 1e-2)]
    return arms + [replace(a, name=f"{a.name}, {label}", **{key: value}) for key, value, label in
                   (("flow_data", "mean", "flow on the mean"), ("flow_units", "raw", "raw latent"))
                   for a in (kl, ve)]


# ------------------------------------------------------------------------------------------------------------
# The networks, Eqs. 24 and 25: ReLU MLPs.  They are tiny, so several arms are trained as one stack: weights
# [A, in, out], one batched product per layer.  Arms of one seed share initial weights, data and noise and
# differ by their loss alone; no arm sees another.


class Mlp(nn.Module):
    """A stack of A MLPs, x: [A, N, in] -> [A, N, out], He initialisation from one generator per arm."""

    def __init__(self, sizes: list[int], generators: list[torch.Generator]) -> None:
        super().__init__()
        self.weight, self.bias = nn.ParameterList(), nn.ParameterList()
        for fan_in, fan_out in zip(sizes[:-1], sizes[1:]):
            w = torch.stack([torch.randn(fan_in, fan_out, generator=g) for g in generators])
            self.weight.append(w * math.sqrt(2 / fan_in))
            self.bias.append(torch.zeros(len(generators), 1, fan_out))

    def forward(self, x: Tensor) -> Tensor:
        for layer, (w, b) in enumerate(zip(self.weight, self.bias)):
            x = torch.baddbmm(b, torch.relu(x) if layer else x, w)
        return x


class Tokenizer(nn.Module):
    """Encoder and decoder of every arm in the stack.

    A normalised arm standardises its mean with running statistics, but lets the gradient through the batch's:
    raising the mean then buys no precision, and there is no scale left to penalise.
    """

    def __init__(self, arms: list[Arm], width: int, layers: int) -> None:
        super().__init__()
        hidden = [width] * (layers - 1)
        self.encoder = Mlp([2, *hidden, 4], [runtime.generator(a.seed, "encoder") for a in arms])
        self.decoder = Mlp([2, *hidden, 2], [runtime.generator(a.seed, "decoder") for a in arms])
        constants = {"normalised": [a.normalised for a in arms],
                     "on_mean": [a.flow_data == "mean" for a in arms],
                     "fixed": [a.force == "fixed sigma" for a in arms],
                     "fixed_logvar": [2 * math.log(a.sigma or 1.0) for a in arms]}
        for name, values in constants.items():
            self.register_buffer(name, torch.tensor(values).view(-1, 1, 1), persistent=False)
        self.register_buffer("mean", torch.zeros(len(arms), 1, 2))
        self.register_buffer("std", torch.ones(len(arms), 1, 2))

    def encode(self, x: Tensor, momentum: float = 0.0) -> tuple[Tensor, Tensor]:
        """x: [A, N, 2] -> mean, logvar, each [A, N, 2]; momentum > 0, in training, updates the statistics."""
        raw, logvar = (half.mT for half in losses.split_moments(self.encoder(x).mT))   # channels last here
        mean = (raw - self.mean) / self.std
        if momentum:
            centre, spread = raw.mean(1, keepdim=True), raw.std(1, keepdim=True) + 1e-6
            with torch.no_grad():
                self.mean.lerp_(centre, momentum)
                self.std.lerp_(spread, momentum)
            batch = (raw - centre) / spread
            mean = batch + ((raw - self.mean) / self.std - batch).detach()
        return torch.where(self.normalised, mean, raw), torch.where(self.fixed, self.fixed_logvar, logvar)

    def latent(self, x: Tensor, eps: Tensor) -> Tensor:
        """What each arm's flow learns: z of Eq. 5, or its mean.  x, eps: [A, N, 2] -> [A, N, 2]."""
        mean, logvar = self.encode(x)
        return torch.where(self.on_mean, mean, losses.reparameterize(mean, logvar, eps))


# ------------------------------------------------------------------------------------------------------------
# The two objectives, summed over the arms.  Everything in them is a function of losses.py on a slice [N, 2].

FORCES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {   # Eq. 1, Eq. 9, Analyze 2 (i) and (ii), sigma-VAE
    "kl": losses.kl_divergence,
    "inverse variance": lambda mean, logvar: losses.inverse_variance(logvar),
    "negative variance": lambda mean, logvar: losses.negative_variance(logvar),
    "log-entropy": lambda mean, logvar: losses.log_entropy(logvar),
    "fixed sigma": lambda mean, logvar: mean.new_zeros(()),
}


def tokenizer_loss(tokenizer: Tokenizer, arms: list[Arm], x: Tensor, eps: Tensor, base: Tensor,
                   t: Tensor) -> tuple[Tensor, Tensor]:
    """Eq. 1 or Eq. 11 with the unsquared norm of Eq. 26; and the unweighted terms [A, 3]."""
    mean, logvar = tokenizer.encode(x, momentum=0.01)
    z = losses.reparameterize(mean, logvar, eps)
    x_hat = tokenizer.decoder(z)
    total, rows = 0.0, []
    for a, arm in enumerate(arms):
        terms = {"rec": losses.euclidean_error(x_hat[a], x[a]),
                 "force": FORCES[arm.force](mean[a], logvar[a]),
                 "magnitude": losses.exponential_magnitude(z[a], arm.tau)}
        weights = {"rec": 1.0, "force": arm.weight, "magnitude": arm.lambda2}
        total = total + losses.weighted_sum(terms, weights)
        rows.append(torch.stack(list(terms.values())))
    return total, torch.stack(rows).detach()


def flow_loss(flow: nn.Module, tokenizer: Tokenizer, units: tuple[Tensor, Tensor], x: Tensor, eps: Tensor,
              base: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
    """Eq. 29 (the sum over the two dimensions) on (z - units[0]) / units[1]; and its value per arm [A, 1]."""
    with torch.no_grad():
        z = (tokenizer.latent(x, eps) - units[0]) / units[1]
        z_t = losses.interpolate(z.flatten(0, 1), base.flatten(0, 1), t.flatten()).view_as(z)
    v_hat, v = flow(torch.cat([z_t, t[..., None]], 2)), losses.velocity(z, base)
    per_arm = torch.stack([2 * losses.flow_matching(a, b) for a, b in zip(v_hat, v)])
    return per_arm.sum(), per_arm.detach()[:, None]


# ------------------------------------------------------------------------------------------------------------
# Training.  The recipe of supplement C; and one for two cores, smaller, with a higher learning rate that
# cools down and an average of the flow's weights, without which so few steps would end in noise.

PRESETS: dict[str, dict[str, Any]] = {
    "paper": {"width": 512, "layers": 8, "batch": 4096, "flow_batch": 4096, "steps": 200_000,
              "flow_steps": 200_000, "lr": 1e-3, "lr_constant": 512, "cooldown": 0.0, "ema": 0.0,
              "euler_steps": 20, "evaluate": 20_000},
    "small": {"width": 64, "layers": 8, "batch": 256, "flow_batch": 512, "steps": 12_000,
              "flow_steps": 4_000, "lr": 4e-3, "lr_constant": 1_000, "cooldown": 0.3, "ema": 0.999,
              "euler_steps": 20, "evaluate": 20_000},
    "smoke": {"width": 16, "layers": 8, "batch": 64, "flow_batch": 64, "steps": 60, "flow_steps": 60,
              "lr": 4e-3, "lr_constant": 20, "cooldown": 0.3, "ema": 0.9, "euler_steps": 20, "evaluate": 500},
}
CHUNK = 100   # steps whose random numbers are drawn, on the device, in one go


def learning_rate(step: int, steps: int, recipe: dict[str, Any]) -> float:
    """AutoGuidance's lr / sqrt(max(step / lr_constant, 1)), times a ramp to 0 over the cool-down."""
    ramp = min(1.0, (steps - step) / (recipe["cooldown"] * steps)) if recipe["cooldown"] else 1.0
    return recipe["lr"] * ramp / math.sqrt(max(step / recipe["lr_constant"], 1))


def draws(mixture: Mixture, seeds: list[int], stage: str, batch: int, steps: int,
          device: torch.device) -> Iterator[list[Tensor]]:
    """x, eps, base [A, B, 2] and t [A, B] of every step, a pure function of (seed, stage, step)."""
    for chunk in range(math.ceil(steps / CHUNK)):
        of_seed = {}
        for seed in set(seeds):
            g = runtime.generator(seed, stage, chunk, device=device)
            shape = (CHUNK, batch, 2)
            of_seed[seed] = (sample(mixture, CHUNK * batch, g).view(shape),
                             *torch.randn(2, *shape, generator=g, device=device),
                             torch.rand(CHUNK, batch, generator=g, device=device))
        for i in range(min(CHUNK, steps - chunk * CHUNK)):
            yield [torch.stack([of_seed[s][k][i] for s in seeds]) for k in range(4)]


def descend(loss: Callable[..., tuple[Tensor, Tensor]], model: nn.Module, batches: Iterator[list[Tensor]],
            steps: int, recipe: dict[str, Any], record: Callable[[int, Tensor], None],
            ema: runtime.Ema | None = None) -> None:
    """`steps` of Adam.  On CUDA, forward and backward are compiled CUDA graphs, the update is one kernel."""
    cuda = next(model.parameters()).is_cuda
    fused = torch.compile(loss, mode="reduce-overhead") if cuda else loss
    optimizer = torch.optim.Adam(model.parameters(), fused=True)
    for step, batch in enumerate(tqdm(batches, total=steps, leave=False)):
        if cuda:
            torch.compiler.cudagraph_mark_step_begin()
        optimizer.param_groups[0]["lr"] = learning_rate(step, steps, recipe)
        optimizer.zero_grad(set_to_none=True)
        total, terms = fused(*batch)
        total.backward()
        optimizer.step()
        if ema is not None:
            ema.update()
        if step % max(1, steps // 50) == 0 or step == steps - 1:
            record(step, terms)


def train(arms: list[Arm], recipe: dict[str, Any], mixture: Mixture, device: torch.device,
          log: runtime.Log) -> list[dict[str, Any]]:
    """Tokenizers to the end, then flows on the frozen tokenizers; one dict of plain tensors per arm."""
    seeds, begin = [a.seed for a in arms], time.time()
    batch, steps, flow_batch, flow_steps = (recipe[k] for k in ("batch", "steps", "flow_batch", "flow_steps"))

    def record(stage: str, *names: str) -> Callable[[int, Tensor], None]:
        return lambda step, terms: log.write(step=step, stage=stage, arms={
            f"{a.name}, seed {a.seed}": dict(zip(names, row)) for a, row in zip(arms, terms.tolist())})

    tokenizer = Tokenizer(arms, recipe["width"], recipe["layers"]).to(device)
    descend(lambda *data: tokenizer_loss(tokenizer, arms, *data), tokenizer,
            draws(mixture, seeds, "tokenizer", batch, steps, device), steps, recipe,
            record("tokenizer", "rec", "force", "magnitude"))
    tokenizer.requires_grad_(False)

    generators = [runtime.generator(s, "units", device=device) for s in seeds]
    x = torch.stack([sample(mixture, recipe["evaluate"], g) for g in generators])
    eps = torch.stack([torch.randn(x.shape[1:], generator=g, device=device) for g in generators])
    z = tokenizer.latent(x, eps)
    raw = torch.tensor([a.flow_units == "raw" for a in arms], device=device).view(-1, 1, 1)
    units = z.mean(1, keepdim=True).masked_fill(raw, 0), z.std(1, keepdim=True).masked_fill(raw, 1)

    flow = Mlp(flow_sizes(recipe), [runtime.generator(s, "flow") for s in seeds]).to(device)
    ema = runtime.Ema(flow, recipe["ema"])
    descend(lambda *data: flow_loss(flow, tokenizer, units, *data), flow,
            draws(mixture, seeds, "flow", flow_batch, flow_steps, device), flow_steps, recipe,
            record("flow", "flow"), ema)
    state = {"tokenizer": tokenizer.state_dict(), "flow": ema.state_dict(),
             "units": {"mean": units[0], "std": units[1]}}
    common = {"recipe": recipe, "seconds": (time.time() - begin) / len(arms)}
    return [{"arm": asdict(arm), **common} | {part: {k: v[a:a + 1].cpu().clone() for k, v in of_part.items()}
                                              for part, of_part in state.items()}
            for a, arm in enumerate(arms)]


def flow_sizes(recipe: dict[str, Any]) -> list[int]:
    """z_t and t in, the velocity out."""
    return [3, *[recipe["width"]] * (recipe["layers"] - 1), 2]


def load_networks(trained: dict[str, Any]) -> tuple[Tokenizer, Mlp]:
    """An arm's two networks, each a stack of one, rebuilt from its own file."""
    recipe = trained["recipe"]
    tokenizer = Tokenizer([Arm(**trained["arm"])], recipe["width"], recipe["layers"]).requires_grad_(False)
    tokenizer.load_state_dict(trained["tokenizer"])
    flow = Mlp(flow_sizes(recipe), [torch.Generator()]).requires_grad_(False)
    flow.load_state_dict(trained["flow"])
    return tokenizer, flow


# ------------------------------------------------------------------------------------------------------------
# Numbers.  A point is invalid where the true density is below the 0.1 % quantile of real data; a perfect
# generator scores 0.1 %.  All but the flow loss come from the arrays saved with the arm and drawn later.


class Reference(NamedTuple):
    """Real points x [N, 2], and the log-density under which a point counts as invalid."""
    mixture: Mixture
    x: Tensor
    threshold: float


def reference(mixture: Mixture, n: int) -> Reference:
    real = sample(mixture, max(5 * n, 10_000), runtime.generator(0, "reference"))
    return Reference(mixture, real[:n], torch.quantile(log_density(mixture, real), 1e-3).item())


def is_valid(ref: Reference, x: Tensor) -> Tensor:
    """[N, 2] -> [N] bool; a point that is not finite is not valid."""
    return log_density(ref.mixture, x) >= ref.threshold


def invalid_share(ref: Reference, x: Tensor) -> float:
    return 1 - is_valid(ref, x).double().mean().item()


def coverage(ref: Reference, x: Tensor) -> float:
    """Share of the 1016 components that are the likeliest origin of at least one valid point of x [N, 2]."""
    likeliest = torch.cat([component_log_density(ref.mixture, part).argmax(1) for part in x.split(1024)])
    return len(likeliest[is_valid(ref, x)].unique()) / len(ref.mixture.weight)


def sliced_wasserstein(a: Tensor, b: Tensor, directions: int = 128) -> float:
    """sqrt of the mean over directions of W2^2 between the projections.  a, b: [N, 2], equal N."""
    angle = torch.arange(directions) * (math.pi / directions)
    project = torch.stack([angle.cos(), angle.sin()])
    return ((a @ project).sort(0).values - (b @ project).sort(0).values).square().mean().sqrt().item()


COLUMNS = {"invalid_share": ("invalid", 100, " %"), "rec_mean": ("rec(mean)", 1, ""),
           "rec_sample": ("rec(z)", 1, ""), "flow_loss": ("flow loss", 1, ""),
           "log_density": ("log p", 1, ""), "coverage": ("coverage", 100, " %"),
           "sliced_w2": ("sliced W2", 1, ""), "sigma_relative": ("sigma / spread", 1, ""),
           "latent_spread": ("spread", 1, "")}   # metric: heading, factor, unit


def generation(samples: Tensor, ref: Reference) -> dict[str, float]:
    """Of samples [N, 2]: invalid share, mean log-density (cut at -100), coverage, sliced W2 to real data."""
    density = log_density(ref.mixture, samples).nan_to_num(nan=-100).clamp(min=-100)
    return {"invalid_share": invalid_share(ref, samples), "log_density": density.mean().item(),
            "coverage": coverage(ref, samples), "sliced_w2": sliced_wasserstein(samples, ref.x)}


def metrics(arrays: dict[str, Tensor], ref: Reference) -> dict[str, float]:
    """All that follows from the saved points; shares in [0, 1], errors and sliced W2 in units of the data."""
    sigma, spread = (arrays["logvar"] / 2).exp(), arrays["z"].std(0)
    return generation(arrays["samples"], ref) | {
        "rec_mean": losses.euclidean_error(arrays["x_hat_mean"], arrays["x"]).item(),
        "rec_sample": losses.euclidean_error(arrays["x_hat"], arrays["x"]).item(),
        "rec_invalid_share": invalid_share(ref, arrays["x_hat_mean"]),
        "sigma_relative": (sigma / spread).mean().item(), "latent_spread": spread.mean().item()}


@torch.no_grad()
def evaluate(trained: dict[str, Any], ref: Reference) -> dict[str, Any]:
    """The trained arm with "arrays" (points [N, 2], on the CPU) and "metrics"."""
    tokenizer, flow = load_networks(trained)
    n, centre, spread = len(ref.x), trained["units"]["mean"], trained["units"]["std"]
    g = runtime.generator(trained["arm"]["seed"], "evaluate")
    eps, base = torch.randn(2, 1, n, 2, generator=g)
    mean, logvar = tokenizer.encode(ref.x[None])
    z = losses.reparameterize(mean, logvar, eps)
    sample_z = losses.euler(lambda z, t: flow(torch.cat([z, torch.full_like(z[..., :1], t)], 2)), base,
                            trained["recipe"]["euler_steps"]) * spread + centre
    arrays = {"x": ref.x, "mean": mean[0], "logvar": logvar[0], "z": z[0], "x_hat": tokenizer.decoder(z)[0],
              "x_hat_mean": tokenizer.decoder(mean)[0], "sample_z": sample_z[0],
              "samples": tokenizer.decoder(sample_z)[0]}
    error = [flow_loss(flow, tokenizer, (centre, spread), ref.x[None], *torch.randn(2, 1, n, 2, generator=g),
                       torch.rand(1, n, generator=g))[0].item() for _ in range(10)]
    numbers = metrics(arrays, ref) | {"flow_loss": sum(error) / len(error)}
    return trained | {"arrays": arrays, "metrics": numbers}


def arm_path(folder: Path, arm: Arm, recipe: dict[str, Any]) -> Path:
    """One file per arm; the name holds a digest of its settings, so that other settings never reuse it."""
    digest = hashlib.blake2b(repr((asdict(arm), sorted(recipe.items()))).encode(), digest_size=4).hexdigest()
    return folder / f"{re.sub('[^a-z0-9.]+', '-', arm.name.lower()).strip('-')}-seed{arm.seed}-{digest}.pt"


def run(arms: list[Arm], recipe: dict[str, Any], folder: Path, stack: int, place: runtime.Runtime,
        ref: Reference) -> list[dict[str, Any]]:
    """Every arm, from its file if there is one, else trained `stack` at a time."""
    paths = {arm: arm_path(folder / "arms", arm, recipe) for arm in arms}
    missing = [arm for arm in arms if not paths[arm].exists()]
    log = runtime.Log(folder / "log.jsonl", {"recipe": recipe}, place,
                      resumed_step=math.inf if len(missing) < len(arms) else 0)
    for first in range(0, len(missing), stack):
        group = missing[first:first + stack]
        print(f"training {', '.join(f'{a.name} (seed {a.seed})' for a in group)}", flush=True)
        for arm, trained in zip(group, train(group, recipe, ref.mixture, place.device, log)):
            done = evaluate(trained, ref)
            runtime.save_atomic(done, paths[arm])
            log.write(stage="evaluate", arm=asdict(arm), seconds=done["seconds"], **done["metrics"])
    return [runtime.load_file(paths[arm]) for arm in arms]


def summarise(results: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """One row per arm name: its settings, and mean, standard deviation and values over the seeds."""
    rows = []
    for name in dict.fromkeys(r["arm"]["name"] for r in results):
        mine = [r for r in results if r["arm"]["name"] == name]
        row = {"arm": {k: v for k, v in mine[0]["arm"].items() if k != "seed"},
               "seeds": [r["arm"]["seed"] for r in mine], "metrics": {}}
        for key in mine[0]["metrics"]:
            values = torch.tensor([r["metrics"][key] for r in mine], dtype=torch.float64)
            row["metrics"][key] = {"mean": values.mean().item(), "std": values.std(correction=0).item(),
                                   "values": values.tolist()}
        rows.append(row)
    return rows


def table(rows: list[dict[str, Any]]) -> str:
    """The rows as markdown: mean, +- standard deviation where there are several seeds."""
    lines = ["| arm | weight | " + " | ".join(name for name, _, _ in COLUMNS.values()) + " |",
             "|---|" + "---|" * (len(COLUMNS) + 1)]
    for row in rows:
        cells = [row["arm"]["name"], f"{row['arm']['weight']:g}"]
        for key, (_, factor, unit) in COLUMNS.items():
            m = row["metrics"][key]
            spread = f" ± {factor * m['std']:.2g}" if len(row["seeds"]) > 1 else ""
            cells.append(f"{factor * m['mean']:.4g}{spread}{unit}")
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


# ------------------------------------------------------------------------------------------------------------
# Figure 3, the mechanism: does sigma follow the decoder's sensitivity as Eq. 14 says?


def sensitivity(decoder: nn.Module, z: Tensor) -> Tensor:
    """T(z) = tr(J J^T), J the decoder's Jacobian, Eq. 7.  z: [N, 2] -> [N]."""
    z = z.clone().requires_grad_()
    x_hat = decoder(z[None])[0]
    rows = [torch.autograd.grad(x_hat[:, k].sum(), z, retain_graph=True)[0] for k in range(x_hat.shape[1])]
    return torch.stack(rows).square().sum((0, 2))


def equilibrium(sensitivity: Tensor, weight: float, squared: bool) -> Tensor:
    """The sigma at which reconstruction and inverse variance balance; both dimensions share it.

    Squared error: d/dsigma (sigma^2 T + 2 lambda / sigma^2) = 0 gives sigma = (2 lambda / T)^(1/4), which is
    Eq. 14 for a latent of two dimensions: log sigma falls with log T at slope -1/4.

    Unsquared norm (Eq. 26), E||r + sigma J eps|| with residual r, has two limits.  Where the residual
    dominates it is ||r|| + sigma^2 T / (4 ||r||) for isotropic J: quadratic in sigma, slope -1/4 again.
    Where the noise dominates it is c sigma sqrt(T), c = E||J eps|| / sqrt(T) = sqrt(pi) / 2 for isotropic J
    (0.886; 0.798 for rank one), and c sqrt(T) = 4 lambda / sigma^3 gives sigma^3 = 4 lambda / (c sqrt(T)):
    slope -1/6.
    """
    if squared:
        return (2 * weight / sensitivity) ** 0.25
    return (4 * weight / (math.sqrt(math.pi) / 2 * sensitivity.sqrt())) ** (1 / 3)


def mechanism(trained: dict[str, Any], n: int = 4000, draws: int = 32) -> dict[str, Any]:
    """log10 T and log10 sigma at n points, the slope of their least-squares line and their correlation.

    T is (E sqrt(T))^2 over the posterior, as the unsquared norm weighs it; sigma is the two's geometric mean.
    """
    decoder = load_networks(trained)[0].decoder
    mean, logvar = trained["arrays"]["mean"][:n], trained["arrays"]["logvar"][:n]
    eps = torch.randn(draws, *mean.shape, generator=runtime.generator(trained["arm"]["seed"], "mechanism"))
    root = sum(sensitivity(decoder, losses.reparameterize(mean, logvar, e)).sqrt() for e in eps) / draws
    log_t, log_sigma = 2 * root.log10(), logvar.mean(1) / (2 * math.log(10))
    (tt, ts), (_, ss) = torch.cov(torch.stack([log_t, log_sigma])).tolist()
    return {"log_t": log_t, "log_sigma": log_sigma, "slope": ts / tt, "correlation": ts / math.sqrt(tt * ss)}


# ------------------------------------------------------------------------------------------------------------
# Figure 4: the decoder's answer to a perturbation of the latent, which is what a sampler's error is.

RELATIVE = torch.logspace(-3, 0, 19)   # its 13th is 0.1


@torch.no_grad()
def perturbation(trained: dict[str, Any], ref: Reference, n: int = 1000) -> dict[str, list[float]]:
    """Of mean + r n, n ~ N(0, I), r = RELATIVE * spread: mean ||D(mean + r n) - D(mean)||, invalid share."""
    decoder = load_networks(trained)[0].decoder
    mean, spread = trained["arrays"]["mean"][:n], trained["metrics"]["latent_spread"]
    noise = torch.randn(mean.shape, generator=runtime.generator(trained["arm"]["seed"], "perturbation"))
    moved = [decoder((mean + r * spread * noise)[None])[0] for r in RELATIVE.tolist()]
    still = decoder(mean[None])[0]
    return {"relative": RELATIVE.tolist(), "absolute": (RELATIVE * spread).tolist(),
            "displacement": [losses.euclidean_error(x, still).item() for x in moved],
            "invalid_share": [invalid_share(ref, x) for x in moved]}


# ------------------------------------------------------------------------------------------------------------
# Drawing, from the arms' files; captions print their metrics.  The colours are Okabe and Ito's, which the
# colour-blind can tell apart.

LINES = {"KL": ("#D55E00", "-"), "KL 0.03": ("#E69F00", "-."), "strong KL": ("#009E73", ":"),
         "VE": ("#0072B2", "--")}
VALID, INVALID, GROUND, EDGE = "#0072B2", "#D55E00", "#E2E2E2", "#8C8C8C"
POINTS = 6000   # drawn per panel


def caption(values: dict[str, float], *keys: str) -> str:
    """'invalid 5.90 %,   flow loss 3.021': metrics under the table's headings."""
    return ",   ".join(f"{name} {factor * values[key]:#.{4 if key == 'flow_loss' else 3}g}{unit}"
                       for key in keys for name, factor, unit in [COLUMNS[key]])


def canvas(rows: int, height: float, title: str, **spacing: float) -> tuple[plt.Figure, Any]:
    plt.rcParams.update({"font.size": 12.5, "axes.titlesize": 13.5, "axes.spines.top": False,
                         "axes.spines.right": False, "legend.frameon": False})
    figure, axes = plt.subplots(rows, 3, figsize=(13.5, height), squeeze=False)
    figure.subplots_adjust(**spacing)
    figure.suptitle(title, fontsize=16, y=0.985)
    return figure, axes


def scatter(ax: plt.Axes, points: Tensor, colour: Any, size: float = 2.0, cmap: str | None = None) -> Any:
    return ax.scatter(*points[:POINTS].T, s=size, c=colour, cmap=cmap, linewidths=0)


def panel(ax: plt.Axes, title: str, below: str, points: Tensor) -> None:
    """A square picture of where the points [N, 2] are, without axes; a title above, the numbers below."""
    low, high = points.amin(0), points.amax(0)
    (x, y), half = ((low + high) / 2).tolist(), 0.53 * (high - low).max().item()
    ax.set(title=title, xlabel=below, xticks=[], yticks=[], box_aspect=1, xlim=(x - half, x + half),
           ylim=(y - half, y + half))
    ax.spines[:].set_visible(False)


def by_validity(ax: plt.Axes, points: Tensor, valid: Tensor) -> None:
    """Valid points blue, invalid ones vermillion and on top."""
    points, valid = points[:POINTS], valid[:POINTS]
    scatter(ax, points[valid], VALID)
    scatter(ax, points[~valid], INVALID, 5.0)


def outline(axes: Any, ref: Reference, n: int = 250) -> None:
    """The region dense enough to be valid, in grey."""
    low, high = ref.x.amin(0) - 0.1, ref.x.amax(0) + 0.1
    u, v = torch.linspace(low[0], high[0], n), torch.linspace(low[1], high[1], n)
    density = log_density(ref.mixture, torch.cartesian_prod(u, v)).view(n, n).T
    field = [part.numpy() for part in (u, v, density)]
    for ax in axes:
        ax.contourf(*field, levels=[ref.threshold, 1e9], colors=[GROUND])
        ax.contour(*field, levels=[ref.threshold], colors=[EDGE], linewidths=0.6, linestyles="solid")


def point_figure(rows: list[dict[str, Any]], ref: Reference, title: str, by_origin: bool) -> plt.Figure:
    """Figures 1 and 2, one arm per row: reconstructions, samples, latent.

    Figure 1 colours by validity and shows the sampled latents over the data's; Figure 2, `by_origin`, colours
    reconstructions and latents by the direction of the data point from the tree's foot.
    """
    figure, axes = canvas(2, 10.3, title, left=0.01, right=0.99, top=0.905, bottom=0.05, hspace=0.25)
    outline(axes[:, :2].flat, ref)
    for ax, trained in zip(axes, rows):
        a, m, name = trained["arrays"], trained["metrics"], trained["arm"]["name"]
        valid = is_valid(ref, a["samples"])
        hue = torch.atan2(a["x"][:POINTS, 0], a["x"][:POINTS, 1] - ref.x[:, 1].min() + 0.2)
        by_validity(ax[1], a["samples"], valid)
        if by_origin:
            scatter(ax[0], a["x_hat_mean"], hue, cmap="viridis")
            scatter(ax[2], a["z"], hue, 3.0, "viridis")
        else:
            by_validity(ax[0], a["x_hat_mean"], is_valid(ref, a["x_hat_mean"]))
            scatter(ax[2], a["z"], "#B5B5B5", 4.0)
            by_validity(ax[2], a["sample_z"], valid)
        panel(ax[0], f"{name}: reconstructions", caption(m, "rec_mean", "rec_sample"), ref.x)
        panel(ax[1], f"{name}: samples, {trained['recipe']['euler_steps']} Euler steps",
              caption(m, "invalid_share", "log_density", "coverage"), ref.x)
        panel(ax[2], f"{name}: latents of the data" + ("" if by_origin else " (grey) and sampled"),
              caption(m, "flow_loss", "sigma_relative"), a["z"])
    return figure


def figure3(trained: dict[str, Any], found: dict[str, Any]) -> plt.Figure:
    """Sensitivity over the latent plane, the learned sigma beside it, and one against the other."""
    figure, (row,) = canvas(1, 5.2, "VE: sigma is small where the decoder is sensitive",
                           left=0.01, right=0.985, top=0.85, bottom=0.16, wspace=0.22)
    a, weight = trained["arrays"], trained["arm"]["weight"]
    low, high = a["mean"].amin(0) - 2, a["mean"].amax(0) + 2
    u, v = torch.linspace(low[0], high[0], 300), torch.linspace(low[1], high[1], 300)
    decoder = load_networks(trained)[0].decoder
    plane = sensitivity(decoder, torch.cartesian_prod(u, v)).view(300, 300).T.log10()
    bottom, top = torch.quantile(plane, torch.tensor([0.02, 0.98])).tolist()
    field = [part.numpy() for part in (u, v, plane)]
    image = row[0].pcolormesh(*field, cmap="viridis", vmin=bottom, vmax=top)
    figure.colorbar(image, ax=row[0], fraction=0.046, pad=0.03)
    scatter(row[0], a["mean"][:2000], "white", 1.0)
    points = scatter(row[1], a["mean"][:len(found["log_sigma"])], found["log_sigma"], 4.0, "cividis")
    figure.colorbar(points, ax=row[1], fraction=0.046, pad=0.03)
    panel(row[0], "log10 T, T = tr(J Jᵀ)", "the latent plane, means in white", a["mean"])
    panel(row[1], "log10 sigma, learned", caption(trained["metrics"], "sigma_relative"), a["mean"])
    scatter(row[2], torch.stack([found["log_t"], found["log_sigma"]], 1), "#A0A0A0", 5.0)
    t = torch.linspace(*torch.quantile(found["log_t"], torch.tensor([0.002, 0.998])).tolist(), 50)
    for squared, colour, style, label in ((False, "#D55E00", "-", "unsquared norm: slope -1/6"),
                                          (True, "#0072B2", "--", "squared error, Eq. 14: -1/4")):
        sigma = equilibrium(10 ** t, weight, squared)
        row[2].plot(t, sigma.log10(), style, color=colour, lw=2.5, label=label)
    row[2].legend(fontsize=11)
    row[2].set(title="log10 sigma: learned, and predicted", box_aspect=1,
               xlabel=f"log10 T\nfitted slope {found['slope']:.3f},   correlation {found['correlation']:.2f}")
    return figure


def figure4(curves: dict[str, dict[str, list[float]]]) -> plt.Figure:
    """Decoded displacement and invalid share against the size of a latent perturbation."""
    figure, (row,) = canvas(1, 5.2, "What an error in the latent does to the decoded point",
                           left=0.045, right=0.99, top=0.85, bottom=0.2, wspace=0.16)
    views = (("absolute", "displacement", 1, "latent units", "decoded displacement"),
             ("relative", "displacement", 1, "latent spread", "decoded displacement"),
             ("relative", "invalid_share", 100, "latent spread", "decoded outside the data [%]"))
    for ax, (x, y, factor, unit, title) in zip(row, views):
        for name, (colour, style) in LINES.items():
            heights = [factor * value for value in curves[name][y]]
            ax.plot(curves[name][x], heights, style, color=colour, lw=2.8, label=name)
        shown = {name: factor * curve[y][12] if x == "relative" else curve["absolute"][-1]
                 for name, curve in curves.items()}
        values = [f"{name}: {value:.2g}" for name, value in shown.items()]
        below = f"{'at 0.1' if x == 'relative' else 'spread'}    " + "    ".join(values[:2]) + "\n"
        below += "    ".join(values[2:])
        ax.set(xscale="log", yscale="log" if factor == 1 else "linear", title=title, box_aspect=0.9,
               xlabel=f"perturbation [{unit}]")
        ax.text(0.5, -0.19, below, transform=ax.transAxes, ha="center", va="top", fontsize=11.5)
        ax.grid(alpha=0.3)
    row[0].legend()
    return figure


def draw(results: list[dict[str, Any]], ref: Reference, folder: Path) -> dict[str, Any]:
    """Figures 1-4 of the first seed as PNG files; the numbers Figures 3 and 4 add to the arms' metrics."""
    matplotlib.use("Agg")
    by_name = {r["arm"]["name"]: r for r in results if r["arm"]["seed"] == results[0]["arm"]["seed"]}
    found, *more = [mechanism(r) for r in results if r["arm"]["name"] == "VE"]
    curves = {name: perturbation(r, ref) for name, r in by_name.items()}
    kl, strong, ve = (by_name[name] for name in ("KL", "strong KL", "VE"))
    figures = (point_figure([kl, ve], ref, "Weak KL, Variance Expansion (orange: outside the data)", False),
               point_figure([strong, ve], ref, "Strong KL, Variance Expansion", True),
               figure3(ve, found), figure4(curves))
    for number, figure in enumerate(figures, 1):
        figure.savefig(folder / f"toy2d_figure{number}.png", dpi=110)
        plt.close(figure)
    return {"figure3": {key: [seed[key] for seed in (found, *more)] for key in ("slope", "correlation")},
            "figure4": curves}


# ------------------------------------------------------------------------------------------------------------
# The command.


def arithmetic(recipe: dict[str, Any], arms: int, device: torch.device) -> tuple[float, float]:
    """Floating-point operations to train the arms, and those per second of one large product on this device.

    Forward costs 2 per weight and point, forward and backward 6; a flow step also encodes its batch.
    """
    sizes = flow_sizes(recipe)
    weights = sum(a * b for a, b in zip(sizes[:-1], sizes[1:]))
    points = 12 * recipe["batch"] * recipe["steps"] + 8 * recipe["flow_batch"] * recipe["flow_steps"]
    n = 8192 if device.type == "cuda" else 1024
    a = torch.ones(n, n, device=device)
    for _ in range(2):   # the first warms up
        begin = time.perf_counter()
        (a @ a)[0, 0].item()
    return arms * weights * points, 2 * n ** 3 / (time.perf_counter() - begin)


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="The 2-D toy: KL against Variance Expansion.",
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add = parser.add_argument
    add("--preset", choices=["small", "paper"], default="small", help="size of networks, batches and "
        "training; 'paper' is supplement C and wants a GPU")
    add("--smoke", action="store_true", help="every line in seconds, for a test; its numbers mean nothing")
    add("--sweep", action="store_true", help="the ablation table instead of the figures")
    add("--seeds", type=int, nargs="+", default=[0], metavar="N", help="seeds of weights, data and noise")
    add("--stack", type=int, default=4, help="arms trained at once; a killed run loses at most one stack")
    add("--threads", type=int, default=1, help="CPU threads; products this small gain little from a second, "
        "and one gives the same numbers on every machine")
    add("--device", default="auto", help="auto, cpu or cuda")
    add("--out", type=Path, default=Path("runs/toy2d"), help="folder for the arms, the figures and the log")
    add("--json", type=Path, help="file for the numbers, if not OUT/toy2d.json or OUT/toy2d_sweep.json")
    return parser.parse_args(argv)


@runtime.command
def main(argv: list[str] | None = None) -> dict[str, Any]:
    args, begin = parse(argv), time.time()
    if args.stack < 1:
        raise runtime.InputError(f"--stack {args.stack}: use at least 1, the number of arms trained at once")
    torch.set_num_threads(max(1, args.threads))
    place = runtime.start(args.device)
    torch.set_float32_matmul_precision("highest")   # TF32 is coarser than the KL arm's reconstruction
    recipe = PRESETS["smoke" if args.smoke else args.preset]
    ref = reference(fractal(), recipe["evaluate"])
    arms = [arm for seed in args.seeds for arm in (sweep_arms(seed) if args.sweep else figure_arms(seed))]
    results = run(arms, recipe, args.out, args.stack, place, ref)
    rows = summarise(results)
    print(table(rows))
    fresh = sample(ref.mixture, recipe["evaluate"], runtime.generator(1, "reference"))
    floor = generation(fresh, ref)
    print("Fresh real data instead of samples:", caption(floor, *floor))

    seconds = sum(r["seconds"] for r in results)
    report = {"command": runtime.command_line(), "device": runtime.device_name(place.device),
              "date": time.strftime("%Y-%m-%d"), "versions": runtime.versions(), "training_seconds": seconds,
              "recipe": recipe, "log_density_threshold": ref.threshold, "real_data": floor, "arms": rows}
    if not args.sweep:
        report |= draw(results, ref, args.out)
        slopes = ", ".join(f"{slope:.3f}" for slope in report["figure3"]["slope"])
        print(f"Figure 3: log sigma falls with log T at {slopes} "
              "(-0.167 for the unsquared norm, -0.25 for a squared error)")
    path = args.json or args.out / ("toy2d_sweep.json" if args.sweep else "toy2d.json")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(report, indent=1) + "\n")

    work, rate = arithmetic(recipe, len(arms), place.device)
    print(f"Training took {seconds:.0f} s for {len(arms)} arms; their arithmetic alone, {work / 1e12:.3g} "
          f"TFLOP at the {rate / 1e9:.0f} GFLOP/s of one large product, would take {work / rate:.0f} s.\n"
          f"This call took {time.time() - begin:.0f} s.  Arms and figures: {args.out}.  Numbers: {path}")
    return report


if __name__ == "__main__":
    main()
