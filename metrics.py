"""Metrics as pure functions: no networks, no files, no loops over data.

    two images   psnr, ssim (for LPIPS, which is a network, see frozen.py)
    two sets     frechet_distance, kernel_distance, manifold_metrics
    one set      inception_score, recognised
    latents      latent_summary, principal_colours, sigma_map, linear_probe,
                 nearest_neighbours
"""

import functools
import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from losses import LOGVAR_RANGE
from runtime import all_reduce_sum, generator

# -----------------------------------------------------------------------------
# One number for each image of a pair: from uint8 [B, 3, H, W] twice to [B].


def float64(a: Tensor) -> Tensor:   # on the CPU where the device has none
    return (a.cpu() if a.device.type == "mps" else a).double()


def psnr(x_hat: Tensor, x: Tensor) -> Tensor:
    """10 log10(1 / MSE) in dB, of values in [0, 1]; 100 dB is the most."""
    error = (float64(x_hat) - float64(x)).flatten(1) / 255
    return -10 * error.square().mean(1).clamp(min=1e-10).log10()


def ssim(x_hat: Tensor, x: Tensor, low: float = 0.0) -> Tensor:
    """Structural similarity (Wang et al. 2004); 1 for equal images.

    The window is a Gaussian of deviation 1.5, 11 pixels wide; borders are
    reflected.  Values count in [low, 1]: VA-VAE and LightningDiT take
    low = -1, which gives smaller numbers.  H and W must be at least 11.
    """
    if len(x) > 4:   # more would need memory far beyond the caches
        return torch.cat([ssim(*pair, low) for pair in zip(x_hat.split(4), x.split(4))])
    span = 1 - low
    a, b = (float64(image) / 255 * span + low for image in (x_hat, x))
    a, b = (F.pad(image, [5] * 4, mode="reflect") for image in (a, b))
    offset = torch.arange(-5, 6, device=a.device)
    window = (-offset.square() / 4.5).double().softmax(0)
    maps = torch.cat([a, b, a * a, b * b, a * b], 1)
    kernel = window.expand(maps.shape[1], 1, 1, 11)
    maps = F.conv2d(maps, kernel, groups=len(kernel))
    maps = F.conv2d(maps, kernel.mT, groups=len(kernel))
    mean_a, mean_b, aa, bb, ab = maps.chunk(5, 1)
    c1, c2 = (0.01 * span) ** 2, (0.03 * span) ** 2
    squares, product = mean_a**2 + mean_b**2, mean_a * mean_b
    luminance = (2 * product + c1) / (squares + c1)
    contrast = (2 * (ab - product) + c2) / (aa + bb - squares + c2)
    return (luminance * contrast).flatten(1).mean(1)


# -----------------------------------------------------------------------------
# The Frechet distance (Heusel et al. 2017) of Gaussians fitted to features
# needs the trace of (A B)^(1/2) for two covariances.  With A = R R^T, that is
# the sum of the roots of the eigenvalues of the symmetric R^T B R.


@dataclass
class Gaussian:
    """Mean [d] and covariance [d, d] of n rows."""
    n: int
    mean: Tensor
    cov: Tensor

    @functools.cached_property
    def root(self) -> Tensor:
        """R with R R^T = cov: Cholesky's, which costs least, where there is one."""
        root, failed = torch.linalg.cholesky_ex(self.cov)
        if failed:   # a feature never changes, or there are too few rows
            values, vectors = torch.linalg.eigh(self.cov)
            root = vectors * values.clamp(min=0).sqrt()
        return root


class Moments:
    """Mean and unbiased covariance of rows [b, d] that stream past."""
    products = torch.zeros(0, 0)

    def add(self, rows: Tensor) -> None:
        rows = F.pad(float64(rows), (0, 1), value=1.0)   # ones count and sum
        if not len(self.products):
            self.products = rows.new_zeros(2 * rows.shape[1:])
        for i in range(0, len(self.products), 256):   # blocks from the diagonal on
            self.products[i:i + 256, i:].addmm_(rows[:, i:i + 256].T, rows[:, i:])

    def fit(self) -> Gaussian:
        """The Gaussian of the rows of all processes."""
        total = all_reduce_sum(self.products.clone())
        n, mean = round(total[-1, -1].item()), total[:-1, -1] / total[-1, -1]
        cov = total[:-1, :-1].addr_(mean, mean, alpha=-n).triu().div_(n - 1)
        return Gaussian(n, mean, cov + cov.triu(1).T)


def frechet_distance(a: Gaussian, b: Gaussian) -> float:
    """|mean_a - mean_b|^2 + Tr A + Tr B - 2 Tr (A B)^(1/2), at least 0."""
    inner = a.root.T @ b.cov @ a.root
    values = torch.linalg.eigvalsh((inner + inner.T) / 2).clamp(min=0)
    spread = a.cov.trace() + b.cov.trace() - 2 * values.sqrt().sum()
    return ((a.mean - b.mean).square().sum() + spread).clamp(min=0).item()


# -----------------------------------------------------------------------------
# Metrics that see images one by one: what a classifier says, the Inception
# Score (Salimans et al. 2016), KID (Binkowski et al. 2018), precision and
# recall (Kynkaanniemi et al. 2019), density and coverage (Naeem et al. 2020).


def recognised(probabilities: Tensor, labels: Tensor,
               confidence: float = 0.9) -> float:
    """Share of images whose label has at least this probability, of [N, K]."""
    sure = probabilities.gather(1, labels[:, None]) >= confidence
    return sure.float().mean().item()


def inception_score(logits: Tensor, chunk: int = 5000) -> float:
    """exp of the mean KL( p(y|x) || p(y) ), averaged over chunks.

    The images are shuffled first: chunks of a file sorted by class would
    hold few classes.  logits: [N, classes] of Inception without its bias.
    """
    draw, scores = generator(0, "inception score"), []
    order = torch.randperm(len(logits), generator=draw)
    for part in logits[order].split(chunk):
        log_p = float64(part).log_softmax(1)
        log_marginal = log_p.logsumexp(0) - math.log(len(part))
        kl = (log_p.exp() * (log_p - log_marginal)).sum(1)
        scores.append(kl.mean().exp().item())
    return sum(scores) / len(scores)


def kernel_distance(real: Tensor, fake: Tensor, subsets: int = 100,
                    size: int = 1000) -> float:
    """KID: the unbiased squared MMD of subsets, with kernel (u.v / d + 1)^3.

    Unlike FID, it has the same mean for any N and M of [N, d] and [M, d].
    """
    draw, d, total = generator(0, "kid"), real.shape[1], 0.0
    n = min(size, len(real), len(fake))
    for _ in range(subsets):
        rows: list = [a[torch.randperm(len(a), generator=draw)[:n]] for a in (real, fake)]
        if real.device.type == "cpu":   # of u u^T, NumPy computes but one half
            rows = [a.numpy() for a in rows]
        u, v = rows
        uu, vv, uv = (float64((torch.as_tensor(p @ q.T) / d + 1) ** 3)
                      for p, q in ((u, u), (v, v), (u, v)))
        within = uu.sum() - uu.trace() + vv.sum() - vv.trace()
        total += (within / (n * (n - 1)) - 2 * uv.mean()).item()
    return total / subsets


def manifold_metrics(real: Tensor, fake: Tensor) -> dict[str, float]:
    """How far two sets cover each other: [N, d] and [M, d], 6 rows or more.

    An image's ball reaches to its k-th nearest neighbour in its own set.
        precision  share of fakes within the ball of a real image, k = 3
        recall     share of real images within the ball of a fake, k = 3
        density    real balls around a fake, divided by k, k = 5
        coverage   share of real balls that hold a fake, k = 5
    ADM's evaluator takes distances in fp16.  Its ties make precision and recall
    0.002 to 0.003 larger than these.
    """
    fake, real = fake - real.mean(0), real - real.mean(0)   # for the rounding
    real_near, fake_near = (torch.cat([   # each row itself, and its nearest 5
        torch.cdist(part, rows).topk(6, largest=False).values
        for part in rows.split(1024)]) for rows in (real, fake))
    precise, dense = 0.0, 0.0
    recalled = covered = torch.zeros((), dtype=torch.bool, device=real.device)
    for part, near in zip(fake.split(1024), fake_near.split(1024)):
        distances = torch.cdist(part, real)
        within = distances < real_near[:, 5]
        precise += (distances <= real_near[:, 3]).any(1).sum().item()
        recalled = recalled | (distances <= near[:, 3:4]).any(0)
        dense += within.sum().item()
        covered = covered | within.any(0)
    return {"precision": precise / len(fake),
            "recall": recalled.float().mean().item(),
            "density": dense / (5 * len(fake)),
            "coverage": covered.float().mean().item()}


# -----------------------------------------------------------------------------
# What a latent looks like, for the log and the picture of a tokenizer's training.


def principal_colours(z: Tensor) -> Tensor:
    """The three principal components of a latent's channels, as colours in [-1, 1].

    [B, C, h, w] -> [B, 3, h, w].  All images share the components, and a scale on
    which 98 % of the values lie within the range.  Figure 8 of DGAE shows such maps.
    """
    rows = float64(z.movedim(1, -1).flatten(0, -2))
    rows = F.pad(rows - rows.mean(0), (0, max(0, 3 - rows.shape[1])))
    found = rows @ torch.linalg.eigh(rows.T @ rows).eigenvectors[:, -3:].flip(1)
    low, high = found.quantile(torch.tensor([0.01, 0.99], dtype=found.dtype), dim=0)
    found = 2 * (found - low) / (high - low).clamp(min=1e-12) - 1
    return found.clamp(-1, 1).float().unflatten(0, (len(z), *z.shape[2:])).movedim(-1, 1)


def sigma_map(logvar: Tensor, size: tuple[int, int]) -> tuple[float, float, Tensor]:
    """The lowest and the highest sigma, and images [B, 3, *size] of its logarithm."""
    a = F.interpolate(logvar.mean(1, keepdim=True), size=size) / 2
    low, high = a.min(), a.max()
    scaled = 2 * (a - low) / (high - low).clamp(min=1e-6) - 1
    return low.exp().item(), high.exp().item(), scaled.expand(-1, 3, -1, -1)


def latent_summary(mean: Tensor, logvar: Tensor, z: Tensor,
                   learned: bool) -> dict[str, float]:
    """Numbers from mean, logvar and z [B, C, *space].

        spread          deviation of the mean, averaged over channels
        max_z           largest |z|, on which Eq. 10 acts
        sigma2          mean of sigma^2; sigma2_p50: its median
        at_clamp        share of logvar at a border of its range
        relative_noise  root of mean sigma^2 / spread^2 over channels

    The last three are left out unless sigma is learned.
    """
    spread = mean.transpose(0, 1).flatten(1).std(1)
    summary = {"spread": spread.mean(), "max_z": z.abs().max()}
    if learned:
        var = logvar.exp()
        noise = var.transpose(0, 1).flatten(1).mean(1).sqrt() / spread
        border = (logvar <= LOGVAR_RANGE[0]) | (logvar >= LOGVAR_RANGE[1])
        summary |= {"sigma2": var.mean(), "sigma2_p50": var.median(),
                    "at_clamp": border.float().mean(),
                    "relative_noise": noise.square().mean().sqrt()}
    return {name: value.item() for name, value in summary.items()}


# -----------------------------------------------------------------------------
# What a latent says about the class of its image.  Rows are [N, d]: latents with
# all positions in a row, or averaged over positions.


def linear_probe(rows: Tensor, y: Tensor, test: Tensor, test_y: Tensor, seed: int = 0,
                 epochs: int = 100, batch: int = 2048, lr: float = 0.008) -> float:
    """Share of test rows whose class a linear classifier of the rows finds.

    It is trained as in GAE (appendix I), by SGD with a constant rate.  That there is no
    momentum and no weight decay, and that rows are divided by their common deviation,
    is our choice.
    The probe of latents.py, which is not compared with GAE's, is fitted to the end.
    """
    mean, std = rows.mean(0), rows.std()
    rows, test = (rows - mean) / std, (test - mean) / std
    net = torch.nn.Linear(rows.shape[1], int(y.max()) + 1, device=rows.device)
    torch.nn.init.zeros_(net.weight), torch.nn.init.zeros_(net.bias)
    optimizer, draws = torch.optim.SGD(net.parameters(), lr), generator(seed, "probe")
    for _ in range(epochs):
        for part in torch.randperm(len(rows), generator=draws).split(batch):
            optimizer.zero_grad()
            F.cross_entropy(net(rows[part]), y[part]).backward()
            optimizer.step()
    return (net(test).argmax(1) == test_y).float().mean().item()


def nearest_neighbours(rows: Tensor, y: Tensor, test: Tensor, test_y: Tensor,
                       k: int = 20, temperature: float = 0.07) -> float:
    """Share of test rows whose class their k nearest rows vote for.

    A neighbour's vote is exp(cosine / temperature), as in DINO (Caron et al. 2021).
    """
    mean, right = rows.mean(0), 0
    rows, classes = F.normalize(rows - mean), int(y.max()) + 1
    for part, truth in zip(test.split(1024), test_y.split(1024)):
        cosine, near = (F.normalize(part - mean) @ rows.T).topk(min(k, len(rows)))
        votes = F.one_hot(y[near], classes) * (cosine / temperature).exp()[..., None]
        right += (votes.sum(1).argmax(1) == truth).sum().item()
    return right / len(test)
