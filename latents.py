"""What makes a latent space easy to diffuse: its properties, as pure functions.

    PERSPECTIVES                     every property, and what it means
    fit_classes, velocity            VIV and its parts
    semantics, spatial_structure     LNC, the linear probe; LDS, CDS, SRSS
    spectral_energy                  SEC
    nearest, slerp                   iFID
    uniformity, equivariance         density; turned, mirrored and scaled images
    trajectory, decoder_gain         paths of samples; what the decoder shows

The properties are those of "Diffusing in the Right Space" (Zhong et al. 2026,
arXiv 2606.03578).  Its equations are called Z1 to Z12 here, because the VE paper
has numbers of its own.

z are latents [N, C, h, w] in which every channel has mean 0 and deviation 1 over
images and positions, as a transformer sees them.  Either z is a tensor, or it
is a `Standardised`, which keeps what the tokenizer gave and standardises the
rows that are asked for.  S = h w, and d = C S.  Functions stream over images, so
that 50,000 latents of 32 x 16 x 16 need little more memory than they take.

The first function of a section, whose name is the perspective's, returns all of
its properties.  Each is a number, a pair of a number and what to hold beside it,
or the reason why there is none.  "choice" tells what was chosen where the paper is
silent, and "curve" has a name, that of x, x and y.  What needs more images raises InputError,
which says how many.  draw(names) gives a random generator of that name.
"""

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

import flow
from runtime import InputError

# ------------------------------------------------------------------------------
# The page: for each property the better direction, and a sentence.

PERSPECTIVES: dict[str, dict[str, tuple[str, str]]] = {
    "velocity": {
        "VIV": ("lower", "Variance of the velocity that no network can predict."),
        "VIV of samples": ("lower", "The same, of latents with the tokenizer's noise on them."),
        "VIV, logit-normal": ("lower", "VIV averaged over LightningDiT's training times."),
        "VIV without labels": ("lower", "VIV of a model that is not told the class."),
        "VIV, stationary": ("lower", "A check of VIV by the fit for classes of few images."),
        "compactness": ("lower", "Share of the variance that lies within classes."),
        "isotropy": ("lower", "1 if all directions vary alike; uneven spectra are easier."),
        "rank within classes": ("", "Number of channels that carry the variance in a class."),
        "rank of channels": ("", "Number of channels that carry the variance of all latents."),
        "straightness, Gaussian": ("higher", "Of exact paths to the classes' Gaussians."),
        "efficiency, Gaussian": ("higher", "Distance over length of these paths."),
    },
    "semantics": {
        "LNC, 5 neighbours": ("higher", "Share of nearest images that have the same label."),
        "LNC, 10 neighbours": ("higher", "The same with ten neighbours."),
        "LNC, foreground": ("higher", "The same with ten, from positions of the object alone."),
        "linear probe": ("higher", "Accuracy of a linear classifier; it should follow LNC."),
    },
    "spatial structure": {
        "LDS": ("higher", "Neighbouring positions are more alike than distant ones."),
        "CDS": ("higher", "How fast likeness falls with each step of distance."),
        "SRSS": ("higher", "The object is more like itself than like its background."),
        "RMSC": ("", "How much the positions of an image differ in direction."),
    },
    "smoothness": {
        "SEC 0.25": ("lower", "Energy beyond a quarter of the spatial frequencies."),
        "SEC 0.5": ("lower", "Energy beyond a half of the spatial frequencies."),
    },
    "continuity": {
        "rFD": ("lower", "Distance of reconstructions from the images: the iFD of no mixing."),
        "iFD, 1 of val": ("lower", "Decoded middles between held-out neighbours look real."),
        "iFD, 10 of val": ("lower", "The same with one of the ten nearest."),
        "iFD, 1 of train": ("lower", "The same with the nearest training latent."),
        "iFD, 10 of train": ("lower", "The same with one of the ten nearest, as published."),
    },
    "uniformity": {
        "neighbour spacing": ("lower", "How uneven the distances to near neighbours are."),
        "density CV": ("lower", "How uneven the density is, laid out by t-SNE."),
        "density Gini": ("lower", "The same as a Gini coefficient."),
        "density entropy": ("higher", "The same as an entropy; 1 is even."),
    },
    "equivariance": {
        "rotation error": ("lower", "Latents of turned images are not the turned latents."),
        "flip error": ("lower", "The same for mirrored images."),
        "scale error": ("lower", "The same for images at half and three quarters of the size."),
    },
    "decoder": {
        "PSNR": ("higher", "Reconstruction in dB."),
        "rFD at noise 0.3": ("lower", "rFD with noise of 0.3 spreads on the latent."),
        "slope of log rFD": ("lower", "How fast this noise makes it worse."),
        "noise that doubles rFD": ("higher", "The noise, in spreads, that the decoder bears."),
        "decoder gain": ("lower", "Square of pixel change per square of latent change, T(mu)."),
        "VIV seen": ("lower", "VIV with each direction weighted by what the decoder shows."),
        "noise / spread": ("", "The tokenizer's own noise over the spread of its latents."),
        "KL per number": ("", "Information in each number of the latent, in nats."),
        "active channels": ("", "Channels that vary more than their noise."),
    },
    "paths of the transformer": {
        "straightness": ("higher", "Mean cosine of successive steps of the sampler."),
        "efficiency": ("higher", "Distance over length of its paths."),
        "unevenness of steps": ("lower", "Deviation of its step lengths; 0 on straight lines."),
    },
}

Properties = dict[str, Any]
Draw = Callable[..., torch.Generator]
Function = Callable[[Tensor], Tensor]
CLASS_LEAST = 4          # images of a class, to fit its Gaussian
NEIGHBOURS = [5, 10]     # of LNC; the paper prints none, the released code seems to take 10
POINTS, LAYOUTS = 500, 4   # of t-SNE: vectors, and how often it is repeated

# ------------------------------------------------------------------------------
# Latents, standardised with one mean and one deviation per channel.  Whitening
# the channels would hide that some matter more, which is what is measured.


def chunks(z: "Latents", size: int = 256) -> Iterator[Tensor]:
    for start in range(0, len(z), size):
        yield z[start:start + size]


def channel_statistics(raw: Tensor) -> tuple[Tensor, Tensor]:
    """Mean [C] and unbiased deviation [C] of raw [N, C, h, w], in float32.

    InputError if a number is NaN or infinite.  A channel that never changes gets
    the deviation 1.
    """
    def total(of: Function) -> Tensor:
        return torch.stack([of(part.double()).sum((0, 2, 3)) for part in chunks(raw)]).sum(0)

    count = raw[:, 0].numel()
    mean = total(lambda part: part) / count
    if not mean.isfinite().all():
        raise InputError("latents are NaN or infinite: the tokenizer is broken, train it again")
    square = total(lambda part: (part - mean[:, None, None]).square())
    std = (square / max(1, count - 1)).sqrt()
    if not std.isfinite().all():
        raise InputError("latents are too large for float64: train the tokenizer again")
    return mean.float(), std.where(std > 0, 1.0).float()


class Standardised:
    """Rows of raw latents [N, C, h, w], standardised on `device` as they are asked for.

    They are so by their own statistics, or by those of `like`.
    """
    mean: Tensor
    std: Tensor

    def __init__(self, raw: Tensor, device: torch.device | str = "cpu",
                 like: "Standardised | None" = None) -> None:
        self.raw, self.device, self.shape = raw, device, raw.shape
        self.mean, self.std = (like.mean, like.std) if like else channel_statistics(raw)

    def __len__(self) -> int:
        return len(self.raw)

    def __getitem__(self, rows: slice | Tensor) -> Tensor:
        z = self.raw[rows].to(self.device).float()
        return flow.normalize(z, self.mean, self.std)


Latents = Tensor | Standardised


# ------------------------------------------------------------------------------
# VIV, the variance of the velocity that no network can predict.  Where paths
# cross, several velocities lead through one point x_t, and the best answer is
# their mean.  Z3: the latents of a class are a Gaussian whose covariance is a
# Kronecker product of one among positions and one among channels.  In its
# eigenvectors, a direction of variance lambda has (Z4)
#
#     Var(v | x_t) = lambda / D(t),    D(t) = (1 - t)^2 + t^2 lambda,
#
# and its integral over t is (pi / 2) sqrt(lambda) (Z5).  All values here are means
# over the d directions, as the flow loss is; the paper's Z5 is the sum.


def velocity(z: Latents, samples: Latents, labels: Tensor, classes: list["ClassGaussian"],
             draw: Draw) -> Properties:
    """VIV and what else follows from the classes, which are `fit_classes` of z.

    samples: the same latents with their noise.  labels: [N], -1 for none.
    """
    rows, (C, h, w), n = class_rows(labels), z.shape[1:], min(one.n for one in classes)
    full, how = full_fit(rows, z), "positions are taken as stationary, because classes are small"
    if full:
        factor = flip_flop_bias(n, C, h * w)
        how = f"flip-flop, which makes it too small by a factor of about {factor:.3f}"
    draws = min(2000, max(100, 40_000 // len(classes)))
    term, error = label_ambiguity(classes, draws, draw("labels"))
    x, times = torch.randn(16, C, h * w, generator=draw("paths")), torch.linspace(0, 1, 51)
    paths = [trajectory(gaussian_path(one, x, times.tolist())) for one in classes[:16]]
    straight, efficient = (torch.cat([p[i] for p in paths]).mean().item() for i in (0, 1))
    curve = torch.stack([viv_at(one.variances, times).cpu() for one in classes]).mean(0)
    value = mean_over(classes, viv)
    return {
        "VIV": value, "VIV of samples": mean_over(fit_classes(samples, labels), viv),
        "VIV, logit-normal": mean_over(classes, viv_logit_normal),
        "VIV without labels": (value + term, f"± {error:.2g}"),
        "VIV, stationary":
            mean_over(fit_classes(z, labels, True), viv) if full else "VIV is this already",
        "compactness": mean_over(classes, compactness),
        "isotropy": mean_over(classes, isotropy),
        "rank within classes": mean_over(classes, lambda v: effective_rank(v.sum(1))),
        "rank of channels": effective_rank(torch.linalg.eigvalsh(channel_covariance(z))),
        "straightness, Gaussian": straight, "efficiency, Gaussian": efficient,
        "choice": f"{len(rows)} classes of {n} images or more; {how}",
        "curve": ("variance of the velocity", "t", times.tolist(), curve.tolist())}


@dataclass
class ClassGaussian:
    """The Gaussian of n latents of a class.

    mean: [C, S].  channels [C, C] and space [S, S] have eigenvectors in their
    columns, and variances [C, S] are those of their products.
    """
    n: int
    mean: Tensor
    channels: Tensor
    space: Tensor
    variances: Tensor


def eigen(covariance: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues, at least 1e-8 of their mean, and eigenvectors."""
    values, vectors = torch.linalg.eigh(covariance)
    return values.clamp(min=1e-8 * values.mean().clamp(min=1e-300)), vectors


def fit_class(z: Tensor, stationary: bool = False, unbiased: bool = True,
              iterations: int = 5) -> ClassGaussian:
    """Fit Z3 to the latents z [n, C, h, w] of one class, in float64.

    Flip-flop (Dutilleul 1999): each of the two covariances is that of the data
    after the other one has been made white, in turns.  The product is scaled
    to the total variance, which has the denominator n - 1, or n if not unbiased.
    stationary: the covariance among positions is diagonal in the cosine
    transform, for classes with few images.
    It stops early when no variance changes by more than 1e-4 of their mean.
    """
    n, C, h, w = z.shape
    S, least = h * w, 2 if stationary else math.floor(flip_flop_least(C, h * w)) + 1
    if n < least:
        raise InputError(f"this fit needs {least} images of a class, and there are {n}")
    mean = z.double().mean(0)
    x = z.double() - mean
    total = x.square().sum() / (n - unbiased)
    values, space, before = torch.ones(S).to(x), torch.eye(S).to(x), None
    if stationary:
        space = torch.kron(dct_matrix(h), dct_matrix(w)).T.to(x)
        x = dct(x)
    x = x.flatten(2)
    for _ in range(iterations):
        white = x / values.sqrt() if stationary else x @ (space / values.sqrt())
        flat = white.transpose(0, 1).flatten(1)
        of_channels, channels = eigen(flat @ flat.T / (n * S - 1))
        white = (channels / of_channels.sqrt()).T @ x
        if stationary:
            values = white.square().sum((0, 1)) / (n * C - 1)
            values = values.clamp(min=1e-8 * values.mean().clamp(min=1e-300))
        else:
            flat = white.flatten(0, 1)
            values, space = eigen(flat.T @ flat / (n * C - 1))
        variances = torch.outer(of_channels, values)
        variances = variances * (total / variances.sum().clamp(min=1e-300))
        if before is not None and (variances - before).abs().max() <= 1e-4 * total / (C * S):
            break
        before = variances
    return ClassGaussian(n, mean.flatten(1), channels, space, variances)


def flip_flop_least(C: int, S: int) -> float:
    """The fit of both full covariances exists for more images than this."""
    return max(S / C, C / S) + 1


def flip_flop_bias(n: int, C: int, S: int) -> float:
    """The factor by which n images of a class make VIV too small, to first order.

    (1 - S / (8 n C)) (1 - C / (8 n S)).  It was found in simulations of white latents.
    """
    return (1 - S / (8 * n * C)) * (1 - C / (8 * n * S))


def viv(variances: Tensor) -> Tensor:
    """Z5 as a mean over directions: (pi / 2) mean sqrt(lambda).  [C, S] -> []."""
    return math.pi / 2 * variances.sqrt().mean()


def viv_at(variances: Tensor, t: Tensor) -> Tensor:
    """Z4 at the times t [T], as a mean over directions: [T]."""
    t = t.to(variances)[:, None]
    flat = variances.flatten()
    return (flat / ((1 - t).square() + t.square() * flat)).mean(1)


def logit_normal(nodes: int = 64) -> tuple[Tensor, Tensor]:
    """Times and weights of E f(t) for t = sigmoid(N(0, 1)), by Gauss and Hermite."""
    k = torch.arange(1, nodes, dtype=torch.float64).sqrt()
    x, vectors = torch.linalg.eigh(torch.diag(k, 1) + torch.diag(k, -1))
    return x.sigmoid(), vectors[0].square()


def viv_logit_normal(variances: Tensor) -> Tensor:
    """Z4 averaged over the times in which LightningDiT trains, logit-normal ones."""
    t, weights = logit_normal()
    return (viv_at(variances, t) * weights.to(variances)).sum()


def compactness(variances: Tensor) -> Tensor:
    """rho: the variance within the class, of which 1 is that of all latents."""
    return variances.mean()


def isotropy(variances: Tensor) -> Tensor:
    """phi = sum s / sqrt(d sum s^2), from 1 / sqrt(d) to 1, with s = sqrt(lambda).

    VIV = (pi / 2) sqrt(rho) phi, which is Z6: compact classes and uneven spectra
    make it small.
    """
    s = variances.sqrt()
    return s.sum() / (s.numel() * variances.sum()).sqrt()


def label_ambiguity(classes: list[ClassGaussian], draws: int,
                    generator: torch.Generator) -> tuple[float, float]:
    """What VIV gains without a label, and its standard error; means over directions.

    Without a label a latent is from any class, all of which are equally likely.  With
    the posterior gamma_k of a class at x_t, and the best velocity m_k within it, VIV
    is that within classes plus

        E sum_k gamma_k |m_k - m|^2,    m = sum_k gamma_k m_k,

    and only this term needs random draws (Rao and Blackwell).  Labels are
    ambiguous near the noise, so that times are drawn as t = u^2 from even u.
    """
    C, S = classes[0].mean.shape
    u = (torch.arange(draws) + torch.rand(draws, generator=generator)) / draws
    own = torch.randint(len(classes), (draws,), generator=generator).tolist()
    values = []
    for some in tqdm(torch.arange(draws).split(50), "labels", leave=False, delay=2):
        t = u[some].square().double()[:, None, None]
        xi = torch.randn(len(some), C, S, generator=generator).double()
        x = [turn_back(classes[own[i]], spread(classes[own[i]], at).sqrt() * row)
             + at * classes[own[i]].mean.cpu() for i, at, row in zip(some.tolist(), t, xi)]
        values.append(disagreement(classes, torch.stack(x), t))
    value = torch.cat(values) * 2 * u / (C * S)
    return value.mean().item(), (value.std() / math.sqrt(draws)).item()


def disagreement(classes: list[ClassGaussian], x: Tensor, t: Tensor) -> Tensor:
    """sum_k gamma_k |m_k - m|^2 at x [B, C, S] and t [B, 1, 1], in float64: [B]."""
    def parts(one: ClassGaussian, x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        return turn(one, x - t * one.mean.cpu()), spread(one, t)

    logits = []
    for one in classes:
        y, D = parts(one, x, t)
        logits.append(-0.5 * (y.square() / D + D.log()).sum((1, 2)))
    gamma = torch.stack(logits, 1).softmax(1)
    mean, square = torch.zeros_like(x), torch.zeros(len(x)).double()
    for one, weight in zip(classes, gamma.T):
        rows = (weight > 1e-9).nonzero()[:, 0]   # in many dimensions it is mostly one class
        y, D = parts(one, x[rows], t[rows])
        gain = (t[rows] * one.variances.cpu() - (1 - t[rows])) / D
        m = one.mean.cpu() + turn_back(one, gain * y)
        mean[rows] += weight[rows, None, None] * m
        square[rows] += weight[rows] * m.square().sum((1, 2))
    return square - mean.square().sum((1, 2))   # of float64, so that nothing is lost


def class_rows(labels: Tensor) -> list[Tensor]:
    """The rows of each class that has enough images; labels below 0 are none."""
    kinds, counts = labels[labels >= 0].unique(return_counts=True)
    largest = max(counts.tolist(), default=0)
    if largest < CLASS_LEAST:
        raise InputError(f"VIV needs {CLASS_LEAST} images of a class, and the largest class "
                         f"has {largest}")
    return [(labels == y).nonzero()[:, 0] for y in kinds[counts >= CLASS_LEAST]]


def full_fit(rows: list[Tensor], z: Latents) -> bool:
    """Whether the smallest class allows for full covariances among positions.

    With fewer images their bias would exceed 5 %.
    """
    n, C, S = min(map(len, rows)), z.shape[1], z.shape[2] * z.shape[3]
    return n > max(2.5 * max(S / C, C / S), flip_flop_least(C, S))


def fit_classes(z: Latents, labels: Tensor,
                stationary: bool | None = None) -> Iterator[ClassGaussian]:
    """The Gaussians of `class_rows`; the kind of fit is `full_fit`'s unless it is given."""
    rows = class_rows(labels)
    stationary = not full_fit(rows, z) if stationary is None else stationary
    for some in tqdm(rows, "classes", leave=False, delay=2, unit="class"):
        yield fit_class(z[some], stationary)


def mean_over(classes: Iterable[ClassGaussian], value: Callable[[Tensor], Any]) -> float:
    """The mean of a function of the variances over classes."""
    values = [float(value(one.variances)) for one in classes]
    return sum(values) / len(values)


def spread(one: ClassGaussian, t: Tensor) -> Tensor:
    """D(t) of Z4 for each direction: [..., C, S]."""
    return (1 - t).square() + t.square() * one.variances.cpu()


def turn(one: ClassGaussian, x: Tensor) -> Tensor:
    """x [..., C, S] in the eigenvectors of a class."""
    return one.channels.T.to(x) @ x @ one.space.to(x)


def turn_back(one: ClassGaussian, y: Tensor) -> Tensor:
    return one.channels.to(y) @ y @ one.space.T.to(y)


# ------------------------------------------------------------------------------
# Semantic separability.  An image is the mean of its latent over the positions
# of its foreground, or over all of them.


def semantics(z: Latents, labels: Tensor, masks: Tensor | None = None,
              train: Latents | None = None, train_labels: Tensor | None = None) -> Properties:
    """LNC with and without masks [N, h, w], and a probe of training latents [M, C, h, w]."""
    known = labels >= 0
    y, f = labels[known], pool(z)
    share = same_label_chance(y)
    if not 0 < share < 1:
        raise InputError("needs two classes, and two images of one of them")
    chance = f"chance {share:.3g}"
    lnc = neighbour_consistency(f[known], y, NEIGHBOURS)
    found: Properties = {f"LNC, {k} neighbours": (v, chance) for k, v in zip(NEIGHBOURS, lnc)}
    found["LNC, foreground"] = "there are no masks: give --masks"
    if masks is not None:
        rows = known & masks.flatten(1).any(1)
        value = neighbour_consistency(pool(z, masks)[rows], labels[rows], NEIGHBOURS[-1:])[0]
        found["LNC, foreground"] = value, chance
    found["linear probe"] = "needs labelled training images beside the held-out ones"
    if train is not None and train_labels is not None and (train_labels >= 0).all():
        found["linear probe"] = linear_probe(pool(train), train_labels, f[known], y)
    return found | {"choice": "cosine of means over positions, which are the object's if any "
                    "of their pixels is"}


def mask_grid(masks: Tensor, shape: tuple[int, int]) -> Tensor:
    """Masks [N, H, W] of an image, where above 0.5, to positions [N, h, w], bool.

    A position belongs to the foreground if any of its pixels does.
    """
    H, W = masks.shape[1:]
    if H % shape[0] or W % shape[1]:
        raise InputError(f"masks of {H} x {W} pixels do not fit latents of {shape[0]} x "
                         f"{shape[1]} positions")
    window = H // shape[0], W // shape[1]
    return F.max_pool2d((masks > 0.5).float()[:, None], window)[:, 0] > 0


def pool(z: Latents, masks: Tensor | None = None) -> Tensor:
    """Mean over the positions of the mask [N, h, w], or over all: [N, C]."""
    if masks is None:
        return torch.cat([part.mean((2, 3)) for part in chunks(z)])
    rows = []
    for part, mask in zip(chunks(z), chunks(masks.to(torch.float32))):
        mask = mask.to(part)[:, None]
        total = mask.sum((2, 3)).clamp(min=1)
        rows.append((part * mask).sum((2, 3)) / total)
    return torch.cat(rows)


def neighbour_consistency(f: Tensor, labels: Tensor, k: list[int]) -> list[float]:
    """LNC for each number of neighbours in k.  f: [N, C], labels: [N].

    The share of the k nearest other images, by cosine, that have the label of
    the image.  A chance of `same_label_chance` is what random latents get.
    """
    if len(f) <= max(k):
        raise InputError(f"{max(k)} neighbours need {max(k) + 1} images, and there are {len(f)}")
    unit, found = F.normalize(f.float(), dim=1), torch.zeros(max(k), device=f.device)
    labels = labels.to(f.device)
    for start in range(0, len(f), 1024):
        cosine = unit[start:start + 1024] @ unit.T
        rows = torch.arange(len(cosine), device=f.device)
        cosine[rows, start + rows] = -2.0   # an image is not its own neighbour
        near = cosine.topk(max(k), dim=1).indices
        found += (labels[near] == labels[start + rows, None]).float().sum(0)
    share = found.cumsum(0) / len(f)
    return [share[n - 1].item() / n for n in k]


def same_label_chance(labels: Tensor) -> float:
    """Mean over images of (n_y - 1) / (N - 1): the LNC of random latents."""
    counts = labels.unique(return_counts=True)[1].double()
    n = counts.sum()
    return (counts * (counts - 1)).sum().item() / max(1.0, (n * (n - 1)).item())


def linear_probe(f: Tensor, labels: Tensor, f_test: Tensor, labels_test: Tensor,
                 decay: float = 1e-4) -> float:
    """Accuracy on the test set of softmax regression, fitted by L-BFGS.

    f: [N, C], scaled to deviation 1.  decay: weight of |W|^2 / 2.
    """
    mean, std = f.mean(0), f.std(0).clamp(min=1e-6)
    a, b = ((rows - mean) / std for rows in (f.float(), f_test.float()))
    known, y = labels.to(f.device).unique(return_inverse=True)
    weight = torch.zeros(f.shape[1] + 1, len(known), device=f.device, requires_grad=True)
    optimizer = torch.optim.LBFGS([weight], max_iter=60, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        optimizer.zero_grad()
        value = F.cross_entropy(a @ weight[:-1] + weight[-1], y)
        value = value + decay / 2 * weight[:-1].square().sum()
        value.backward()
        return value

    with torch.enable_grad():
        optimizer.step(loss)
    seen = known[(b @ weight[:-1] + weight[-1]).argmax(1)]
    return (seen == labels_test.to(f.device)).float().mean().item()


# ------------------------------------------------------------------------------
# Spatial structure, as in iREPA (Singh et al. 2025).  G holds the cosines of all
# pairs of positions in an image, and distances among them are counted in steps
# along rows and columns.  iREPA's thresholds belong to 16 x 16 positions, and other
# grids take the same share of their side.


def space(z: Latents, masks: Tensor | None = None) -> Properties:
    """The means of `spatial_structure`."""
    far, reach = thresholds(min(z.shape[2:]))
    found: Properties = spatial_structure(z, masks)
    if not math.isfinite(found.setdefault("SRSS", math.nan)):
        found["SRSS"] = "needs masks in which object and background have a quarter each"
    return found | {"choice": f"far is {far} steps or more, and CDS goes up to {reach}"}


def thresholds(side: int) -> tuple[int, int]:
    """From how many steps on a pair is far, and over how many CDS reaches: 6 and 8 of 16."""
    return max(2, round(6 / 16 * side)), max(2, side // 2)


def steps_apart(h: int, w: int) -> Tensor:
    """Manhattan distances of all pairs of positions: [S, S]."""
    y = torch.arange(h).repeat_interleave(w)
    x = torch.arange(w).repeat(h)
    return (y[:, None] - y).abs() + (x[:, None] - x).abs()


def spatial_structure(z: Latents, masks: Tensor | None = None) -> dict[str, float]:
    """Means over images of four numbers; SRSS only with masks [N, h, w].

        LDS   mean G of direct neighbours - mean G of far pairs
        CDS   - slope of the mean G over the distance, from 1 to `reach`
        SRSS  mean G of a foreground position with its direct neighbours in the
              foreground - with far positions in the background
        RMSC  sqrt of the mean |u - mean u|^2 over the unit vectors u of positions

    Images count for SRSS that have a quarter of either kind of position.  It is
    NaN where there is none.
    """
    h, w = z.shape[2:]
    far, reach = thresholds(min(h, w))
    apart = steps_apart(h, w)
    if apart.max() < far:
        raise InputError(f"spatial structure needs latents of 2 x 2 positions, not {h} x {w}")
    reach = min(reach, int(apart.max()))
    columns = torch.stack([*(apart == k for k in range(1, reach + 1)), apart >= far])
    columns, counts = columns.flatten(1).T.float(), columns.sum((1, 2))
    steps = torch.arange(1, reach + 1) - (reach + 1) / 2
    slope = steps / steps.square().sum()
    sums, kept = torch.zeros(4, dtype=torch.float64), 0
    for start, part in zip(range(0, len(z), 64), chunks(z, 64)):
        unit = F.normalize(part.flatten(2), dim=1, eps=1e-8).mT
        G = unit @ unit.mT
        means = G.flatten(1) @ columns.to(G) / counts.to(G)
        offset = unit - unit.mean(1, keepdim=True)
        rmsc = offset.square().sum(2).mean(1).sqrt()
        sums[0] += (means[:, 0] - means[:, -1]).sum().item()
        sums[1] -= (means[:, :-1] @ slope.to(G)).sum().item()
        sums[3] += rmsc.sum().item()
        if masks is not None:
            scores = foreground_contrast(G, masks[start:start + 64].flatten(1), apart, far)
            kept += int(scores.isfinite().sum())
            sums[2] += scores.nansum().item()
    lds, cds, _, rmsc = (sums / len(z)).tolist()
    found = {"LDS": lds, "CDS": cds, "RMSC": rmsc}
    if masks is not None:
        found["SRSS"] = sums[2].item() / kept if kept else math.nan
    return found


def foreground_contrast(G: Tensor, front: Tensor, apart: Tensor, far: int,
                        share: float = 0.25) -> Tensor:
    """SRSS of each image, or NaN: G [B, S, S], front [B, S] bool, apart [S, S]."""
    front, apart = front.to(G.device), apart.to(G.device)
    fore, back = front.to(G), (~front).to(G)
    near, distant = (apart == 1).to(G), (apart >= far).to(G)
    inside = ((G * near) @ fore[:, :, None])[:, :, 0] / (fore @ near)
    across = ((G * distant) @ back[:, :, None])[:, :, 0] / (back @ distant)
    score = torch.where(front, inside - across, math.nan).nanmean(1)
    enough = torch.minimum(fore.mean(1), back.mean(1)) >= share
    return torch.where(enough, score, math.nan)


# ------------------------------------------------------------------------------
# Smoothness: the share of a latent's energy in high spatial frequencies (Z7-Z9).


def smoothness(z: Latents) -> Properties:
    """SEC at the two ratios of the released code."""
    energy, found = spectral_energy(z), {}
    for ratio in (0.25, 0.5):
        white = high_frequencies(torch.ones_like(energy), ratio)
        found[f"SEC {ratio}"] = high_frequencies(energy, ratio), f"white noise {white:.3f}"
    return found | {"choice": "the paper does not print its ratio, which seems to be 0.25"}


def dct_matrix(n: int) -> Tensor:
    """The orthonormal cosine transform DCT-II, in float64: [n, n]."""
    k, i = torch.arange(n, dtype=torch.float64)[:, None], torch.arange(n) + 0.5
    matrix = (math.pi * k * i / n).cos() * math.sqrt(2 / n)
    matrix[0] /= math.sqrt(2)
    return matrix


def dct(z: Tensor) -> Tensor:
    """Z7: the transform of every channel in both directions of space."""
    down, across = (dct_matrix(n).to(z) for n in z.shape[-2:])
    return down @ z @ across.T


def spectral_energy(z: Latents) -> Tensor:
    """Z8: mean square of the coefficients over images and channels, [h, w]."""
    sums = torch.stack([dct(part).square().double().sum((0, 1)) for part in chunks(z)])
    return sums.sum(0) / (z.shape[0] * z.shape[1])


def high_frequencies(energy: Tensor, ratio: float) -> float:
    """Z9, SEC: the share of energy [h, w] where u + v > ratio (h - 1 + w - 1).

    Lower is smoother, whatever the name says.  White noise of 16 x 16 positions
    has 0.859 at ratio 0.25, and 0.469 at 0.5.
    """
    h, w = energy.shape
    order = torch.arange(h, device=energy.device)[:, None] + torch.arange(w, device=energy.device)
    high = order > ratio * (h - 1 + w - 1)
    return (energy[high].sum() / energy.sum()).item()


# ------------------------------------------------------------------------------
# Continuity: iFID (Xu et al. 2026).  A latent is mixed with a neighbour, and the
# decoded mixtures are compared with real images.  Here latents are as the
# tokenizer gives them, without standardising, as in the released code.


def continuity(distance: Callable[[Tensor], float], z: Standardised, shown: Tensor,
               train: Tensor | None, draw: Draw) -> Properties:
    """iFID of the rows `shown` of z, with neighbours in z and in train [M, C, h, w].

    distance: raw latents to the FD of what they decode to from the images of `shown`.
    Neighbours are looked for among at most 10,000 latents.
    """
    raw, few = z.raw[shown], min(10_000, len(z))
    among = torch.cat([torch.arange(few) * len(z) // few, shown]).unique()
    sets = {"val": (z.raw[among], torch.searchsorted(among, shown)), "train": (train, None)}
    found: Properties = {"rFD": distance(raw)}
    for name, (others, rows) in sets.items():
        for k in (1, 10):
            if others is None:
                found[f"iFD, {k} of {name}"] = "needs training images beside the held-out ones"
                continue
            near = nearest(raw.to(z.device), others.to(z.device), k, rows).cpu()
            chosen = choose_neighbour(raw, others, near, draw(name, k))
            found[f"iFD, {k} of {name}"] = distance(slerp(raw, others[chosen], 0.5))
    return found | {"choice": f"mixtures of {len(raw)} latents, slerp to the middle, by cosine"}


def nearest(z: Tensor, others: Tensor, k: int, own: Tensor | None = None) -> Tensor:
    """The k rows of others [M, ...] with the largest cosine to z [N, ...]: [N, k].

    own: [N], the rows of others that are z itself, which are left out.
    """
    least = k if own is None else k + 1
    if len(others) < least:
        raise InputError(f"{k} neighbours need {least} images, and there are {len(others)}")
    lengths, found = others.flatten(1).norm(dim=1).clamp(min=1e-12), []
    for start in range(0, len(z), 512):
        cosine = z[start:start + 512].flatten(1) @ others.flatten(1).T / lengths
        if own is not None:
            rows = torch.arange(len(cosine), device=cosine.device)
            cosine[rows, own[start:start + 512].to(cosine.device)] = -math.inf
        found.append(cosine.topk(k, dim=1).indices)
    return torch.cat(found)


def choose_neighbour(z: Tensor, others: Tensor, near: Tensor,
                     generator: torch.Generator) -> Tensor:
    """One of the neighbours near [N, k] of each z, drawn by softmax(-MSE): its row, [N].

    The MSE is a mean over the latent, so that they are nearly equally likely.
    """
    gaps = torch.stack([(z - others[near[:, j]]).flatten(1).square().mean(1)
                        for j in range(near.shape[1])], 1)
    drawn = torch.multinomial((-gaps).softmax(1).cpu(), 1, generator=generator).to(near.device)
    return near.gather(1, drawn)[:, 0]


def slerp(a: Tensor, b: Tensor, alpha: float) -> Tensor:
    """Mix each a and b [N, ...] along the arc between them; alpha = 0 is a itself.

    (sin((1 - alpha) w) a + sin(alpha w) b) / sin w, with w the angle of the whole
    latents, whose lengths are kept.  Where sin w < 1e-6 the mixture is linear.
    """
    if alpha == 0:
        return a
    flat = a.flatten(1).double(), b.flatten(1).double()
    angle = F.cosine_similarity(*flat, dim=1).clamp(-1, 1).acos()
    sine = angle.sin()
    straight = sine < 1e-6
    sine = sine.where(~straight, 1.0)
    shape = -1, *[1] * (a.ndim - 1)
    first = torch.where(straight, 1 - alpha, ((1 - alpha) * angle).sin() / sine)
    second = torch.where(straight, alpha, (alpha * angle).sin() / sine)
    return first.view(shape).to(a) * a + second.view(shape).to(a) * b


# ------------------------------------------------------------------------------
# Uniformity, as in VA-VAE (Yao et al. 2025): vectors of single positions are
# laid out in the plane by t-SNE, and their density there is compared with an
# even one.  A disc that is filled evenly does not reach 0, because the density is
# estimated too low at its edge.


def uniformity(z: Latents, draw: Draw) -> Properties:
    """Without t-SNE on 10,000 vectors, and with it on fewer."""
    points = one_position(z, 10_000, draw("positions"))
    found: Properties = {"neighbour spacing": neighbour_spacing(points)}
    n, scores, even = min(POINTS, len(z)), [], []
    reason = f"t-SNE needs 90 images and 2 channels, and there are {n} and {z.shape[1]}"
    for k in range(LAYOUTS if n >= 90 and z.shape[1] > 1 else 0):
        vectors = one_position(z, n, draw("t-SNE", k))
        scores.append(evenness(density(tsne(vectors))))
        even.append(evenness(density(disc(n, draw("disc", k)))))
    for name in ("CV", "Gini", "entropy"):
        found[f"density {name}"] = reason
        if scores:
            of, disc_of = (torch.tensor([score[name] for score in some]) for some in (scores, even))
            error = of.std().item() / math.sqrt(LAYOUTS)
            beside = f"± {error:.1g}, even disc {disc_of.mean():.4g}"
            found[f"density {name}"] = of.mean().item(), beside
    return found | {"choice": f"t-SNE of {n} vectors, averaged over {LAYOUTS} draws"}


def one_position(z: Latents, count: int, generator: torch.Generator) -> Tensor:
    """One random position of each of `count` random images: [count, C]."""
    count = min(count, len(z))
    rows = torch.randperm(len(z), generator=generator)[:count].sort().values
    place = torch.randint(z.shape[2] * z.shape[3], (count,), generator=generator)
    parts = [z[index].flatten(2).cpu() for index in rows.split(256)]
    return torch.cat(parts)[torch.arange(count), :, place]


def neighbour_spacing(points: Tensor, k: int = 10) -> float:
    """Deviation over mean of the distance to the k-th neighbour; points [n, C].

    Without t-SNE: 0 would be perfectly even.
    """
    if len(points) <= k:
        raise InputError(f"the distance to neighbour {k} needs {k + 1} images, "
                         f"and there are {len(points)}")
    gaps = torch.cat([torch.cdist(part, points).topk(k + 1, largest=False).values[:, k]
                      for part in points.split(1024)])
    return (gaps.std() / gaps.mean()).item()


def density(points: Tensor) -> Tensor:
    """A Gaussian kernel estimate of points [n, 2] at themselves, up to a factor: [n].

    The kernel has the covariance of the points times n^(-1/3) (Scott's rule).
    """
    n = len(points)
    a = (points - points.mean(0)).double()
    root, failed = torch.linalg.cholesky_ex(torch.cov(a.T) * n ** (-1 / 3))
    if failed:
        raise InputError("the latents lie on a line, and have no density in the plane")
    a = torch.linalg.solve_triangular(root, a.T, upper=False).T
    return torch.cat([torch.exp(-torch.cdist(part, a).square() / 2).mean(1)
                      for part in a.split(1024)])


def evenness(p: Tensor) -> dict[str, float]:
    """Three numbers of densities p [n] > 0.

        CV       deviation / mean
        Gini     sum (2 i - n - 1) p_i / (n sum p), p sorted, i from 1 to n
        entropy  -sum q log q / log n, with q = p / sum p
    """
    n, q = len(p), p.sort().values / p.sum()
    rank = 2 * torch.arange(1, n + 1, device=p.device) - n - 1
    entropy = -(q * (q + 1e-10).log2()).sum() / math.log2(n)
    return {"CV": (p.std(correction=0) / p.mean()).item(),
            "Gini": (rank * q).sum().item() / n, "entropy": entropy.item()}


def disc(n: int, generator: torch.Generator) -> Tensor:
    """Points that fill a disc evenly, [n, 2]: the floor of `evenness`."""
    radius = torch.rand(n, generator=generator).sqrt()
    angle = 2 * math.pi * torch.rand(n, generator=generator)
    return torch.stack([radius * angle.cos(), radius * angle.sin()], 1)


def tsne(x: Tensor, perplexity: float = 30.0, steps: int = 500) -> Tensor:
    """Exact t-SNE (van der Maaten and Hinton 2008) of x [n, C] in the plane: [n, 2].

    It starts from the first two principal components.  Attraction is exaggerated
    12 times in the first half of the steps.
    """
    n = len(x)
    if n < 3 * perplexity:
        raise InputError(f"t-SNE of perplexity {perplexity:g} needs {math.ceil(3 * perplexity)} "
                         f"images, and there are {n}")
    gaps = torch.cdist(x.double(), x.double()).square()
    gaps.fill_diagonal_(math.inf)
    low, high = torch.zeros(n, 1).double(), torch.full((n, 1), math.inf).double()
    beta = (1 / gaps.min(1, keepdim=True).values.clamp(min=1e-12)).clamp(max=1e6)
    for _ in range(60):   # the width of each Gaussian, by bisection
        log_p = (-beta * gaps).log_softmax(1)
        p = log_p.exp()
        entropy = -(p * log_p.where(p > 0, 0.0)).sum(1, keepdim=True)
        wide = entropy > math.log(perplexity)
        low, high = beta.where(wide, low), high.where(wide, beta)
        beta = torch.where(high.isinf(), 2 * beta, (low + high) / 2)
    p = ((p + p.T) / (2 * n)).float()
    centred = (x - x.mean(0)).double()
    _, _, axes = torch.linalg.svd(centred, full_matrices=False)
    y = (centred @ axes[:2].T).float()
    y = 1e-4 * y / y[:, 0].std().clamp(min=1e-12)
    move, gains, rate = torch.zeros_like(y), torch.ones_like(y), max(n / 48, 50.0)
    for step in range(steps):
        early = step < steps // 2
        square = y.square().sum(1)
        kernel = torch.addmm(1 + square + square[:, None], y, y.T, alpha=-2).reciprocal_()
        kernel.fill_diagonal_(0)
        force = torch.add(12 * p if early else p, kernel, alpha=-1 / kernel.sum().item())
        force.mul_(kernel)
        gradient = 4 * (force.sum(1, keepdim=True) * y - force @ y)
        against = move * gradient < 0
        gains = torch.where(against, gains + 0.2, gains * 0.8).clamp(min=0.01)
        move = (0.5 if early else 0.8) * move - rate * gains * gradient
        y = y + move
        y = y - y.mean(0)
    return y


# ------------------------------------------------------------------------------
# Equivariance: is the latent of a moved image the moved latent?


def equivariance(encode: Function, x: Tensor, z: Tensor) -> Properties:
    """x: images [N, 3, H, W], z: their latents.  encode: images to standardised latents.

    Images are turned by 90, 180 and 270 degrees, mirrored, and shrunk to a half and
    to three quarters where that leaves whole positions.
    """
    h, w = z.shape[2:]

    def errors(moves: list[tuple[Callable, Callable]]) -> tuple[float, str]:
        pairs = [equivariance_error(encode(f(x)), g(z)) for f, g in moves]
        square, relative = (sum(column) / len(pairs) for column in zip(*pairs))
        return square, f"relative {relative:.3g}"

    def both(move: Callable) -> tuple[Callable, Callable]:
        return move, move

    turns = [both(lambda a, k=k: a.rot90(k, (2, 3))) for k in ((1, 2, 3) if h == w else (2,))]
    found: Properties = {"rotation error": errors(turns),
                         "flip error": errors([both(lambda a: a.flip(3))])}
    scales = [(lambda a, s=s: shrink(a, s, True), lambda a, s=s: shrink(a, s, False))
              for s in (0.5, 0.75) if h * s % 1 == 0 and w * s % 1 == 0]
    found["scale error"] = f"{h} x {w} positions have no half and no three quarters"
    try:
        found["scale error"] = errors(scales) if scales else found["scale error"]
    except InputError as reason:   # a ViT takes one size
        found["scale error"] = str(reason)
    return found | {"choice": "mean square of standardised latents, in which unrelated ones "
                    "have 2; quarter turns"}


def equivariance_error(of_moved: Tensor, moved: Tensor) -> tuple[float, float]:
    """The mean square of the difference, and the mean of |difference| / |moved|.

    Both are standardised latents [N, C, h, w]: those of moved images, and the
    latents of images, moved.  Unrelated ones have a mean square of 2.
    """
    difference = (of_moved - moved).flatten(1)
    length = moved.flatten(1).norm(dim=1).clamp(min=1e-12)
    return difference.square().mean().item(), (difference.norm(dim=1) / length).mean().item()


def shrink(a: Tensor, scale: float, antialias: bool) -> Tensor:
    """Images or latents [N, C, H, W] at `scale` of their size, bilinear."""
    size = [round(n * scale) for n in a.shape[2:]]
    return F.interpolate(a, size, mode="bilinear", antialias=antialias)


# ------------------------------------------------------------------------------
# The path of a sample from noise to latent, in M steps of equal time.


def paths(fields: Iterable[tuple[flow.Velocity, Tensor]], steps: int = 50) -> Properties:
    """Of Euler's integration; fields: pairs of a velocity and of noise [B, C, h, w]."""
    rows = [trajectory(recorded(field, x, steps)) for field, x in fields]
    straight, efficient, ratios = (torch.cat(parts, -1) for parts in zip(*rows))
    middle = [(i + 0.5) / steps for i in range(steps)]
    ratios = ratios.nanmean(1)
    return {"straightness": straight.mean().item(), "efficiency": efficient.mean().item(),
            "unevenness of steps": ratios.std().item(),
            "choice": f"{len(straight)} paths of {steps} Euler steps without guidance",
            "curve": ("length of steps", "t", middle, ratios.tolist())}


def fields(dit: Any, count: int, draw: Draw,
           device: torch.device) -> Iterator[tuple[flow.Velocity, Tensor]]:
    """The velocity of a DiT without guidance, and noise; classes take turns."""
    if dit is None:
        raise InputError("needs a transformer: give --dit")
    side, null = dit.config["input_size"], dit.config["num_classes"]
    for images in tqdm(torch.arange(count).split(64), "paths", leave=False):
        shape = dit.config["in_channels"], side, side
        x = torch.stack([torch.randn(shape, generator=draw("path", i)) for i in images.tolist()])
        field = flow.guided_velocity(dit, (images % null).to(device), null, scale=1.0)
        yield field, x.to(device)


def recorded(velocity_fn: flow.Velocity, x: Tensor, steps: int) -> list[Tensor]:
    """All states of Euler's integration from noise x: steps + 1 tensors of its shape."""
    states: list[Tensor] = []

    def record(x: Tensor, t: float) -> Tensor:
        states.append(x)
        return velocity_fn(x, t)

    end = flow.euler(record, x, steps)
    return [*states, end]


def trajectory(states: list[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """Of states x_0 ... x_M [B, ...]: straightness [B], efficiency [B], ratios [M, B].

        straightness  mean cosine of successive steps (Z10)
        efficiency    |x_M - x_0| / sum |step|, at most 1 (Z11)
        ratios        M |step| / |x_M - x_0|, which is 1 on the straight line

    A path that ends where it began has efficiency 0, and ratios that are NaN.
    """
    flat = torch.stack([x.flatten(1).float() for x in states])
    steps = flat.diff(dim=0)
    lengths = steps.norm(dim=2)
    whole = (flat[-1] - flat[0]).norm(dim=1)
    straight = F.cosine_similarity(steps[1:], steps[:-1], dim=2, eps=1e-12).mean(0)
    there = whole > 1e-6 * lengths.sum(0)
    efficiency = torch.where(there, whole / lengths.sum(0).clamp(min=1e-30), 0.0)
    ratios = torch.where(there, len(steps) * lengths / whole, math.nan)
    return straight, efficiency, ratios


def gaussian_path(one: ClassGaussian, x: Tensor, times: list[float]) -> list[Tensor]:
    """The exact path of noise x [B, C, S] to a class, in its eigenvectors, at times.

    x_t = t mean + sqrt(D(t)) x.  No network is needed for this.
    """
    mean = turn(one, one.mean).to(x)
    return [t * mean + spread(one, torch.tensor(t)).sqrt().to(x) * x for t in times]


# ------------------------------------------------------------------------------
# The decoder.  How much of an error in the latent does it show?  For a direction
# u of the latent it is |J u|^2, with the decoder's derivative J, in squares of pixel
# values in [-1, 1].

NOISE = [0.0, 0.05, 0.1, 0.2, 0.3, 0.5]   # over the spread of each channel
PROBES = 1000   # directions in which VIV is seen, of all classes together


def decoder(decode: Function, scores: Callable[[Tensor], tuple[float, float]], z: Standardised,
            shown: Tensor, variance: Tensor, kl: float,
            labels: Tensor, classes: list[ClassGaussian], draw: Draw) -> Properties:
    """How the decoder answers noise, and what of VIV it shows.

    scores: raw latents to the FD and the PSNR of what they decode to.  shown: rows
    of z.  variance [C] and kl are those of the posteriors.  classes: `fit_classes`
    of z and the labels, or none.
    """
    raw, std = z.raw[shown], z.std[:, None, None]
    eps = torch.randn(raw.shape, generator=draw("noise"))
    curve = [scores(raw + level * std * eps) for level in tqdm(NOISE, "noise", leave=False)]
    distances, psnr = map(list, zip(*curve))
    slope, doubles = noise_tolerance(NOISE, distances)
    square, few = z.std.double().square(), min(256, len(shown))
    active = (square > 0.01 + variance).sum().item()

    def with_error(values: Tensor) -> tuple[float, str]:
        error = values.std().item() / math.sqrt(len(values))
        return values.mean().item(), f"± {error:.1g}"

    seen = viv_seen(decode, z, labels, classes, draw) if classes else None
    return {
        "PSNR": psnr[0], "rFD at noise 0.3": distances[NOISE.index(0.3)],
        "slope of log rFD": slope,
        "noise that doubles rFD": doubles if math.isfinite(doubles) else f"beyond {NOISE[-1]}",
        "decoder gain": with_error(gains(decode, z, shown[:few], eps[:few])),
        "VIV seen": "VIV is n/a" if seen is None else with_error(seen),
        "noise / spread": (variance / square).mean().sqrt().item(),
        "KL per number": kl if math.isfinite(kl) else "there is no noise",
        "active channels": (active, f"of {len(square)}"),
        "choice": "directions of standardised latents, finite differences of 0.01",
        "curve": ("rFD with noise on the latent", "noise / spread", NOISE, distances)}


def gains(decode: Function, z: Standardised, rows: Tensor, u: Tensor) -> Tensor:
    """`decoder_gain` at these rows of z, in directions u of standardised latents."""
    std = z.std[:, None, None]
    values = [decoder_gain(decode, z.raw[i].to(z.device), (std * v).to(z.device))
              for i, v in zip(rows.split(32), u.split(32))]
    return torch.cat(values).cpu()


def viv_seen(decode: Function, z: Standardised, labels: Tensor, classes: list[ClassGaussian],
             draw: Draw) -> Tensor:
    """VIV as the decoder shows it, for some images of each class: its mean is wanted."""
    found, each = [], max(1, PROBES // len(classes))
    for k, (rows, one) in enumerate(zip(class_rows(labels)[:PROBES], classes)):
        u = ambiguous_directions(one, len(rows[:each]), draw("seen", k)).cpu()
        found.append(gains(decode, z, rows[:each], u.unflatten(2, z.shape[2:])))
    return math.pi / 2 * torch.cat(found)


def decoder_gain(decode: Function, z: Tensor, directions: Tensor, step: float = 0.01) -> Tensor:
    """|J u|^2 / number of pixel values: [B], by a finite difference of length `step`.

    z, directions u: [B, C, h, w].  With u ~ N(0, I) its mean is T(mu) of the VE
    paper's Eq. 8, over the pixel values (Hutchinson).
    """
    change = decode(z + step * directions).double() - decode(z).double()
    return change.flatten(1).square().mean(1) / step**2


def ambiguous_directions(one: ClassGaussian, count: int, generator: torch.Generator) -> Tensor:
    """Random directions whose covariance is sum_i s_i u_i u_i^T: [count, C, S].

    s_i^2 and u_i are the variances and eigenvectors of a class.  So pi / 2 times
    the mean of their gain is the VIV that the decoder shows,
    (pi / 2) sum_i s_i |J u_i|^2.
    """
    xi = torch.randn(count, *one.variances.shape, generator=generator)
    xi = xi.to(one.variances)
    return turn_back(one, one.variances.pow(0.25) * xi).float()


def channel_covariance(z: Latents) -> Tensor:
    """Of standardised latents over images and positions: [C, C]."""
    flat = (part.transpose(0, 1).flatten(1).double() for part in chunks(z))
    total = torch.stack([rows @ rows.T for rows in flat]).sum(0)
    return total / (z.shape[0] * z.shape[2] * z.shape[3])


def effective_rank(variances: Tensor) -> float:
    """exp of the entropy of variances [C] over their sum: from 1 to C."""
    p = (variances / variances.sum()).clamp(min=1e-12)
    return (-(p * p.log()).sum()).exp().item()


def noise_tolerance(levels: list[float], distances: list[float]) -> tuple[float, float]:
    """From a noise curve: the slope of log distance, and the noise that doubles it.

    levels: noise over each channel's spread, from 0 on.  The slope is that of a
    line through those from 0.1 to 0.3.  The level between two points is found on
    the line between them, and is NaN if the distance never doubles.
    """
    points = [(a, math.log(max(d, 1e-12))) for a, d in zip(levels, distances)
              if 0.1 <= a <= 0.3]
    x, y = torch.tensor(points, dtype=torch.float64).T
    slope = ((x - x.mean()) * y).sum() / (x - x.mean()).square().sum()
    for (a, low), (b, high) in zip(zip(levels, distances), zip(levels[1:], distances[1:])):
        if high >= 2 * distances[0] > low:
            return slope.item(), a + (b - a) * (2 * distances[0] - low) / (high - low)
    return slope.item(), math.nan
