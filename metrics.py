"""The metrics as pure functions of images or features: no networks, no files, no loops over data.

    two images   psnr, ssim                                              (LPIPS: losses.load_lpips)
    two sets     frechet_distance, kernel_distance, manifold_metrics
    one set      inception_score
    latents      latent_summary

Formulas and conventions are those of the ADM evaluator (Dhariwal and Nichol 2021) unless a docstring says
otherwise.  Images are uint8 [B, 3, H, W], features float [N, d].
"""

import math
import statistics
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from losses import LOGVAR_RANGE
from runtime import Runtime, all_reduce_sum, gather_rows, generator

# ------------------------------------------------------------------------------------------------------------
# One number for each image of a pair of uint8 batches, in float64: on the device, or on the CPU where it has
# none (Apple's).


def wide(device: torch.device) -> torch.device:
    return torch.device("cpu") if device.type == "mps" else device


def float64(a: Tensor) -> Tensor:
    return a.to(wide(a.device)).double()


def psnr(x_hat: Tensor, x: Tensor) -> Tensor:
    """10 log10(1 / MSE) in dB, over all RGB values in [0, 1]; MSE at least 1e-10, so at most 100 dB.

    x_hat, x: uint8 [B, 3, H, W].  Returns: [B] float64.  A table's PSNR is the mean of these, not of the MSE.
    """
    mse = (float64(x_hat) - float64(x)).div(255).square().flatten(1).mean(1)
    return -10 * mse.clamp(min=1e-10).log10()


def ssim(x_hat: Tensor, x: Tensor, convention: str = "reflect") -> Tensor:
    """Structural similarity (Wang et al. 2004), Gaussian window 11 wide, sigma 1.5; mean over pixels and RGB.

    convention: 'reflect'  values in [0, 1], borders reflected (torchmetrics since 1.4.3, RAE)
                'valid'    values in [0, 1], windows inside the image only (the original, older papers)
                'vavae'    values in [-1, 1], so range 2, borders reflected (VA-VAE, LightningDiT): lower
    x_hat, x: uint8 [B, 3, H, W], at least 11 pixels a side.  Returns: [B] float64, 1 for equal images.
    """
    low, span = (-1.0, 2.0) if convention == "vavae" else (0.0, 1.0)
    a, b = (float64(image) / 255 * span + low for image in (x_hat, x))
    if convention != "valid":
        a, b = (F.pad(image, [5] * 4, mode="reflect") for image in (a, b))
    window = torch.exp(-torch.arange(-5, 6, dtype=a.dtype, device=a.device).square() / (2 * 1.5**2))
    maps = torch.cat([a, b, a * a, b * b, a * b], 1)
    kernel = (window / window.sum()).expand(maps.shape[1], 1, 1, 11)
    maps = F.conv2d(F.conv2d(maps, kernel, groups=len(kernel)), kernel.mT, groups=len(kernel))
    mean_a, mean_b, aa, bb, ab = maps.chunk(5, 1)
    c1, c2 = (0.01 * span) ** 2, (0.03 * span) ** 2
    luminance = (2 * mean_a * mean_b + c1) / (mean_a**2 + mean_b**2 + c1)
    contrast = (2 * (ab - mean_a * mean_b) + c2) / (aa - mean_a**2 + bb - mean_b**2 + c2)
    return (luminance * contrast).flatten(1).mean(1)


# ------------------------------------------------------------------------------------------------------------
# Frechet distance (Heusel et al. 2017) between Gaussians fitted to features.  The trace of the root of S1 S2
# needs no matrix square root: with S1 = R R^T it is the sum of the roots of the eigenvalues of the
# symmetric R^T S2 R.


@dataclass
class Gaussian:
    """Mean [d] and covariance [d, d] of n rows; factor [d, r]: factor factor^T = cov, made when needed."""
    n: int
    mean: Tensor
    cov: Tensor
    factor: Tensor | None = None

    def root(self) -> Tensor:
        """Cholesky's factor where there is one, which costs little; else eigenvectors times roots."""
        if self.factor is None:
            self.factor, failed = torch.linalg.cholesky_ex(self.cov)
            if failed:   # singular: a feature that never changes, or too few rows
                values, vectors = torch.linalg.eigh(self.cov)
                kept = values > 0
                self.factor = vectors[:, kept] * values[kept].sqrt()
        return self.factor


class Moments:
    """Mean and unbiased covariance of rows that stream past, in float64; the rows too while fewer than d."""

    def __init__(self, dim: int, device: torch.device) -> None:
        self.sums = torch.zeros(dim + 1, dtype=torch.float64, device=wide(device))   # the last element counts
        self.outer = torch.zeros(dim, dim, dtype=torch.float64, device=wide(device))
        self.rows: list[Tensor] = []

    def add(self, rows: Tensor) -> None:
        """rows: [b, d], any floating type."""
        rows = float64(rows)
        self.sums[:-1] += rows.sum(0)
        self.sums[-1] += len(rows)
        self.outer.addmm_(rows.T, rows)
        self.rows = [*self.rows, rows] if sum(map(len, self.rows)) < len(self.outer) else self.rows

    def fit(self, runtime: Runtime) -> Gaussian:
        """The Gaussian of all processes' rows: exact, however many each has seen."""
        sums, outer, d = all_reduce_sum(self.sums), all_reduce_sum(self.outer), len(self.outer)
        n, factor = round(sums[-1].item()), None
        mean = sums[:-1] / n
        if n < d:
            rows = gather_rows(torch.cat([*self.rows, outer[:0]]), runtime)
            factor = (rows - mean).T / max(n - 1, 1) ** 0.5
        return Gaussian(n, mean, (outer - n * torch.outer(mean, mean)) / max(n - 1, 1), factor)


def frechet_distance(a: Gaussian, b: Gaussian) -> float:
    """|mean_a - mean_b|^2 + Tr S_a + Tr S_b - 2 Tr (S_a S_b)^(1/2).  Symmetric; 0 for equal Gaussians.

    Either factor will do: one that is there, and of two the narrower, so that n < d rows cost n x n.
    Rounding leaves 1e-10 of the traces at full rank, 1e-7 below it; a negative result of that size becomes 0.
    """
    if b.factor is not None and (a.factor is None or b.factor.shape[1] < a.factor.shape[1]):
        a, b = b, a
    root = a.root()
    inner = root.T @ b.cov @ root
    overlap = torch.linalg.eigvalsh((inner + inner.T) / 2).clamp(min=0).sqrt().sum()
    traces = a.cov.trace() + b.cov.trace()
    distance = (a.mean - b.mean).square().sum() + traces - 2 * overlap
    return 0.0 if -1e-6 * traces < distance < 0 else distance.item()


# ------------------------------------------------------------------------------------------------------------
# Metrics of single images' features: the Inception Score (Salimans et al. 2016), KID (Binkowski et al. 2018),
# precision and recall (Kynkaanniemi et al. 2019), density and coverage (Naeem et al. 2020).


def inception_score(logits: Tensor, chunk: int = 5000, shuffle: bool = True) -> float:
    """exp of the mean KL( p(y|x) || p(y) ), over chunks of 5000 images; mean over chunks.  In [1, classes].

    logits: [N, classes], of the Inception network without its bias.  ADM takes chunks in file order
    (shuffle=False): in a file sorted by class each holds few classes, and the score falls to a fraction.
    """
    if shuffle:
        order = torch.randperm(len(logits), generator=generator(0, "inception score"))
        logits = logits[order.to(logits.device)]
    scores = []
    for part in logits.split(chunk):
        log_p = float64(part).log_softmax(1)
        log_marginal = log_p.logsumexp(0) - math.log(len(part))
        scores.append((log_p.exp() * (log_p - log_marginal)).sum(1).mean().exp())
    return torch.stack(scores).mean().item()


def kernel_distance(real: Tensor, fake: Tensor, subsets: int = 100, size: int = 1000) -> tuple[float, float]:
    """KID: the unbiased squared MMD under the kernel (u.v / d + 1)^3.  Mean and std over random subsets.

    real, fake: [N, d], [M, d]; subsets of min(size, N, M) rows.  Unbiased at any size, hence the score to
    read below 10,000 images; may be slightly negative.
    """
    draw, d = generator(0, "kid"), real.shape[1]
    size, values = min(size, len(real), len(fake)), []
    for _ in range(1 if size == len(real) == len(fake) else subsets):   # all rows have but one subset
        u, v = (a[torch.randperm(len(a), generator=draw)[:size].to(a.device)] for a in (real, fake))
        uu, vv, uv = (float64((p @ q.T / d + 1) ** 3) for p, q in ((u, u), (v, v), (u, v)))
        within = uu.sum() - uu.trace() + vv.sum() - vv.trace()
        values.append((within / (size * (size - 1)) - 2 * uv.mean()).item())
    return statistics.fmean(values), statistics.pstdev(values)


def squared_distances(u: Tensor, v: Tensor) -> Tensor:
    """[n, d], [m, d] -> [n, m]."""
    return (u.square().sum(1)[:, None] - 2 * u @ v.T + v.square().sum(1)).clamp(min=0)


def neighbour_radii(rows: Tensor, ks: tuple[int, ...], block: int) -> list[Tensor]:
    """Squared distance of every row to its k-th nearest other row, for each k.  [N, d] -> [N] each."""
    radii = []
    for part in rows.split(block):
        nearest = part[:, :0]
        for other in rows.split(block):   # the row itself is among them, nearest of all: hence k + 1
            nearest = torch.cat([nearest, squared_distances(part, other)], 1)
            nearest = nearest.topk(min(max(ks) + 1, nearest.shape[1]), largest=False).values
        radii.append(nearest)
    return [torch.cat(radii)[:, k] for k in ks]


def manifold_metrics(real: Tensor, fake: Tensor, block: int = 4096) -> dict[str, float]:
    """Shares of images inside the other set's balls, each as wide as its centre's k-th neighbour is far.

        precision   fakes within a real ball, k = 3        density    real balls (k = 5) around a fake, over k
        recall      reals within a fake ball, k = 3        coverage   real balls (k = 5) that hold a fake

    real, fake: [N, d], [M, d], at least 6 rows.  All four depend on N and M.  Memory: a few blocks squared.
    """
    centre = real.mean(0)   # changes no distance, and loses fewer digits
    real, fake = real - centre, fake - centre
    (real3, real5), (fake3,) = neighbour_radii(real, (3, 5), block), neighbour_radii(fake, (3,), block)
    precise, recalled, covered = (torch.zeros(len(a), dtype=torch.bool, device=a.device)
                                  for a in (fake, real, real))
    inside = 0
    for i in range(0, len(fake), block):
        for j in range(0, len(real), block):
            rows, columns = slice(i, i + block), slice(j, j + block)
            distances = squared_distances(fake[rows], real[columns])
            precise[rows] |= (distances <= real3[columns]).any(1)
            recalled[columns] |= (distances <= fake3[rows, None]).any(0)
            within = distances < real5[columns]
            covered[columns] |= within.any(0)
            inside += within.sum().item()
    shares = {"precision": precise, "recall": recalled, "coverage": covered}
    return {name: share.float().mean().item() for name, share in shares.items()} | {
        "density": inside / (5 * len(fake))}


# ------------------------------------------------------------------------------------------------------------
# What a latent looks like.  For KL and VE sigma is learned; for the others it is 0 or given, and only the
# mean's spread is of interest.


def latent_summary(mean: Tensor, logvar: Tensor, z: Tensor, learned: bool) -> dict[str, Any]:
    """spread        deviation of the mean within each channel, over B and space: its average and, by channel,
                  all of them
    max_z         largest |z|, for lambda2
    sigma2        arithmetic mean of sigma^2, with its geometric mean and its 1, 50 and 99 % quantiles
    at_clamp      share of log sigma^2 on the border of its range, where it has no gradient
    relative_noise  root of mean sigma^2 over the mean's variance, averaged over channels

    mean, logvar, z: [B, C, *space].  learned: sigma is; otherwise the last three are left out.
    """
    spread = mean.transpose(0, 1).flatten(1).std(1)
    out = {"spread": spread.mean().item(), "spread_by_channel": [round(s, 4) for s in spread.tolist()],
           "max_z": z.abs().max().item()}
    if learned:
        var = logvar.exp()
        levels = torch.tensor([0.01, 0.5, 0.99], device=var.device)
        low, median, high = torch.quantile(var.flatten()[:1_000_000], levels).tolist()
        ratio = var.transpose(0, 1).flatten(1).mean(1) / spread.square().clamp(min=1e-12)
        border = (logvar <= LOGVAR_RANGE[0]) | (logvar >= LOGVAR_RANGE[1])
        out |= {"sigma2": var.mean().item(), "sigma2_geometric": logvar.mean().exp().item(),
                "sigma2_p01": low, "sigma2_p50": median, "sigma2_p99": high,
                "at_clamp": border.float().mean().item(), "relative_noise": ratio.mean().sqrt().item()}
    return out
