"""The losses of a tokenizer, as pure functions of tensors.

The Variance Expansion loss of "Taming Sampling Perturbations with Variance
Expansion Loss for Latent Diffusion Models" (Li et al.) comes first, then what
it replaces, then what it joins.  Nothing here needs the rest of the project:

    moments = encoder(x)                               # [B, 2C, H, W]
    mean, logvar = split_moments(moments)
    z = reparameterize(mean, logvar, torch.randn_like(mean))
    loss = (absolute_error(decoder(z), x)              # Eq. 11
            + 0.1 * inverse_variance(logvar)
            + 1e-6 * exponential_magnitude(z))
    loss.backward()

The paper's X_0 is x here, an image in [-1, 1], its mu is mean, its sigma^2 is
exp(logvar), and its Z_0 is z.  lambda1 and lambda2 are weights in Eq. 11.

What holds for every function unless it says otherwise:

* Tensors are [B, C, H, W], or [B, 2] in the two-dimensional toy.
* A loss is summed over C, H and W and averaged over B, as in LDM and VA-VAE.
  The paper's lambda1 = 0.1 and sigma^2 = 0.06 fit together only with sums.
* Gradients flow to every argument.  Nothing depends on batch statistics.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def sum_per_image(a: Tensor) -> Tensor:
    """Sum over everything but the batch: [B, ...] -> [B]."""
    return a.flatten(1).sum(1)


# ------------------------------------------------------------------------------
# The posterior of Eq. 5 is a Gaussian with one mean and one variance for every
# number of the latent.  The encoder emits both as one tensor.  They stay in
# float32: near |z| = 5 the steps of bfloat16 are 0.03, and sigma is 0.24.

LOGVAR_RANGE = (-30.0, 20.0)


def split_moments(moments: Tensor) -> tuple[Tensor, Tensor]:
    """Split the encoder's output into mean and log sigma^2.

    moments [B, 2C, H, W] -> mean, logvar [B, C, H, W] in float32.  logvar is
    clamped to [-30, 20] as in LDM, and has no gradient outside.
    """
    mean, logvar = moments.float().chunk(2, dim=1)
    return mean, logvar.clamp(*LOGVAR_RANGE)


def reparameterize(mean: Tensor, logvar: Tensor, eps: Tensor) -> Tensor:
    """Draw the latent of Eq. 5: z = mean + sigma * eps, with eps ~ N(0, I)."""
    return mean + torch.exp(0.5 * logvar) * eps


# ------------------------------------------------------------------------------
# Variance Expansion, Eqs. 9 and 10.  A decoder D answers a small noise on the
# latent linearly, D(mu + sigma eps) = D(mu) + J sigma eps (Eq. 6), so that the
# reconstruction error grows by sigma^2 T(mu), T = E |J eps|^2 (Eqs. 7 and 8).
# Its pull on sigma is 2 sigma T (Eq. 12), and a term that expands sigma must
# balance it (Eq. 13).  The inverse variance does so at
#
#     sigma^4 = lambda1 / T(mu)                                        (Eq. 14)
#
# as the minimum of Eq. 15: latents to which the decoder is deaf become wide,
# and sensitive ones stay narrow.  Eq. 7 has one T for a whole latent.  Here every
# value of it has its own sigma, and so the T of Eq. 14 is an entry of diag(J^T J).
# Eq. 9 does not bound the latent's scale, and a larger mean makes any sigma
# relatively small.  Eq. 10 stops that.


def inverse_variance(logvar: Tensor, delta: float = 1e-6) -> Tensor:
    """Expand the variance, Eq. 9: sum of 1 / (sigma^2 + delta).

    It is computed as sigmoid(log delta - logvar) / delta, which can neither
    overflow nor cancel.  Its pull on log sigma^2 grows as sigma shrinks,
    until sigma^2 = delta, and weakens below.  It still wins there as long as
    lambda1 / delta^2 exceeds T.  ValueError unless delta > 0.
    """
    if delta <= 0:
        raise ValueError(f"delta must be positive, got {delta}")
    term = torch.sigmoid(math.log(delta) - logvar) / delta
    return sum_per_image(term).mean()


def exponential_magnitude(z: Tensor, tau: float = 1.0,
                          linear_from: float = 20.0) -> Tensor:
    """Penalise large latents, Eq. 10: sum of exp(|z| - tau).

    Its argument is the sample z of Eq. 5, which holds sigma as well as the mean.
    Where |z| - tau exceeds `linear_from`, the exponential goes on as its own
    tangent, so that value and gradient stay finite.

    exp(|z| - tau) = exp(-tau) exp(|z|), so tau is a factor on lambda2 and not a
    threshold.  With the paper's lambda2 = 1e-6 and tau = 1 the term is a soft
    wall near |z| = 13.
    """
    u = z.abs() - tau
    tangent = 1 + F.relu(u - linear_from)
    return sum_per_image(torch.exp(u.clamp(max=linear_from)) * tangent).mean()


# ------------------------------------------------------------------------------
# What Eq. 9 is compared with: the KL term of Eq. 1, which it replaces, and the
# two other forms that "Analyze 2" of the paper considers and rejects.


def kl_divergence(mean: Tensor, logvar: Tensor) -> Tensor:
    """Divergence from the prior, Eq. 1: KL(N(mean, sigma^2) || N(0, I)).

        1/2 sum ( mean^2 + sigma^2 - log sigma^2 - 1 )
    """
    terms = mean.square() + logvar.exp() - logvar - 1
    return 0.5 * sum_per_image(terms).mean()


def negative_variance(logvar: Tensor) -> Tensor:
    """Form (i) of Analyze 2: -sum sigma^2.

    It has no equilibrium with Eq. 8, and no pull where sigma is 0.
    """
    return -sum_per_image(logvar.exp()).mean()


def log_entropy(logvar: Tensor) -> Tensor:
    """Form (ii) of Analyze 2: -sum log sigma^2, the entropy up to a factor.

    Its equilibrium with Eq. 8 is sigma^2 = weight / T.  The paper prints it
    without the minus, which would shrink the variance.
    """
    return -sum_per_image(logvar).mean()


def square_magnitude(mean: Tensor) -> Tensor:
    """Hold the scale of a latent whose noise is fixed: sum of mean^2.

    A sigma-VAE (LatentLM, Sun et al. 2024) needs it, because a growing mean
    makes a fixed noise relatively small.
    """
    return sum_per_image(mean.square()).mean()


# ------------------------------------------------------------------------------
# The reconstruction error L_rec.  Images take the absolute error and LPIPS, as
# in LDM and VA-VAE.  Eqs. 7-15 argue with the squared error, and the toy takes
# the norm of Eq. 26.


def absolute_error(x_hat: Tensor, x: Tensor) -> Tensor:
    """Sum of |x_hat - x|, the pixel term of LDM and VA-VAE."""
    return sum_per_image((x_hat - x).abs()).mean()


def squared_error(x_hat: Tensor, x: Tensor) -> Tensor:
    """Sum of (x_hat - x)^2, Eq. 7."""
    return sum_per_image((x_hat - x).square()).mean()


def euclidean_error(x_hat: Tensor, x: Tensor) -> Tensor:
    """Norm of each sample's whole error, not squared, Eq. 26."""
    return torch.linalg.vector_norm((x_hat - x).flatten(1), dim=1).mean()


def perceptual_error(lpips: nn.Module, x_hat: Tensor, x: Tensor) -> Tensor:
    """LPIPS (Zhang et al. 2018) times the number C * H * W of pixel values.

    LDM adds an image's LPIPS to each of its pixel errors and then sums, which is
    the same.

    lpips: from frozen.load_lpips.  Images are [B, 3, H, W] in [-1, 1].
    """
    lpips.eval()  # it holds dropout, which a caller's .train() would switch on
    return lpips(x_hat.float(), x.float()).mean() * x[0].numel()


# ------------------------------------------------------------------------------
# The adversarial loss of VQGAN (Esser et al. 2021), which LDM and VA-VAE add to
# the reconstruction.  Logits have any shape, and are averaged over all of it.


def hinge_discriminator(real: Tensor, fake: Tensor) -> Tensor:
    """What the discriminator minimises, from its logits on x and x_hat.

    1/2 ( E max(0, 1 - D(x)) + E max(0, 1 + D(x_hat)) )
    """
    return 0.5 * (F.relu(1 - real).mean() + F.relu(1 + fake).mean())


def hinge_generator(fake: Tensor) -> Tensor:
    """What the tokenizer minimises: -E D(x_hat)."""
    return -fake.mean()


def adaptive_weight(reference: Tensor, other: Tensor, eps: float = 1e-4,
                    maximum: float = 1e4) -> Tensor:
    """Weight that makes a loss pull as hard as the reconstruction does.

    |reference| / (|other| + eps), at most `maximum`, where both arguments are
    gradients at one parameter.  VQGAN takes the decoder's last layer for the
    adversarial loss.  VA-VAE takes the encoder's for its alignment, with a
    maximum of 1e8.  No gradient flows through the weight.
    """
    ratio = reference.float().norm() / (other.float().norm() + eps)
    return ratio.clamp(max=maximum).detach()


# ------------------------------------------------------------------------------
# VA-VAE (Yao et al. 2025) aligns the latent with the features of a vision
# foundation model, both [B, D, h, w]: with the features themselves, after a
# learned projection of z to their width, and with the similarities among them.
# Both losses are means over positions, and forgive errors up to a margin.


def marginal_cosine(z: Tensor, target: Tensor, margin: float = 0.5) -> Tensor:
    """Mean of max(0, 1 - margin - cos(z, target)) over all positions."""
    cosine = F.cosine_similarity(z, target, dim=1)
    return F.relu(1 - margin - cosine).mean()


def marginal_distance_matrix(z: Tensor, target: Tensor,
                             margin: float = 0.25) -> Tensor:
    """Mean of max(0, |cos(z_i, z_j) - cos(f_i, f_j)| - margin), f the target.

    i and j run over all pairs of positions in one image.
    """

    def similarity(a: Tensor) -> Tensor:
        unit = F.normalize(a.flatten(2), dim=1)  # [B, D, N]
        return unit.mT @ unit

    difference = similarity(z) - similarity(target)
    return F.relu(difference.abs() - margin).mean()
