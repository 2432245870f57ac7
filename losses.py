"""Every equation of "Taming Sampling Perturbations with Variance Expansion Loss for Latent Diffusion Models"
(Li et al.) that is trained or sampled, in the order of the paper, as pure functions of tensors.

    paper                here                              where
    X_0, X~              x, x_hat                          image in [-1, 1] (or a toy point), its
    reconstruction mu, sigma^2          mean, exp(logvar)                 split_moments, Eq. 5
    Z_0                  z                                 reparameterize, Eq. 5
    L_rec                absolute_error, ...               Eqs. 1, 7, 26
    KL                   kl_divergence                     Eq. 1
    L_var, delta         inverse_variance(logvar, delta)   Eq. 9
    L_reg, tau           exponential_magnitude(z, tau)     Eq. 10
    lambda1, lambda2     weights in weighted_sum           Eq. 11
    Z_t, v_theta         x_t, v_hat                        interpolate, velocity, flow_matching: Eqs. 4, 27-29
    t                    t                                 t = 1 at the data: supplement C and the released
    SiT
                                                           and LightningDiT weights; Sec. 5.1 has it reversed

The reduction.  Every tokenizer term sums over channels and space and averages over the batch, as LDM and
VA-VAE do. Only with sums on both sides do the paper's lambda1 = 0.1 and sigma^2 = 0.06 fit together: at the
equilibrium T / lambda1 = sigma^-4, where T is the slope of the *summed* reconstruction error per latent
element.  Dividing the whole objective by the number of pixels (`--reduction mean`) scales every gradient
alike; per-element means on both sides correspond to lambda1 * N_z / N_x.  Weights of Eqs. 9-11 quoted
anywhere in this project are for sums.

Shapes are [B, C, *space]: a latent image is [B, C, H, W], a point of the toy is [B, 2].
"""

import math
import warnings
from collections.abc import Callable

import lpips
import torch
import torch.nn.functional as F
from torch import Tensor, nn

# ------------------------------------------------------------------------------------------------------------
# The posterior q(z | x) = N(mean, diag exp(logvar)), Eq. 5.  The encoder emits both halves as one tensor.
# The latent stays in fp32 whatever autocast does outside: at |z| = 5 bf16 is spaced by 0.03, sigma is 0.24.

LOGVAR_RANGE = (-30.0, 20.0)


def split_moments(moments: Tensor) -> tuple[Tensor, Tensor]:
    """Halves of the encoder's output: mean, and log sigma^2 clamped to [-30, 20].

    moments: [B, 2C, *space].  Returns: mean, logvar, each [B, C, *space] in fp32.
    Gradient: to both; none to logvar outside the clamp (as in LDM).
    """
    mean, logvar = moments.float().chunk(2, dim=1)
    return mean, logvar.clamp(*LOGVAR_RANGE)


def reparameterize(mean: Tensor, logvar: Tensor, eps: Tensor) -> Tensor:
    """z = mean + exp(logvar / 2) * eps, Eq. 5.

    mean, logvar, eps: [B, C, *space], eps ~ N(0, I).  Returns: z [B, C, *space].  Gradient: to mean and
    logvar.
    """
    return mean + torch.exp(0.5 * logvar) * eps


def sigma_vae_sample(mean: Tensor, sigma: float, eps: Tensor, scale: Tensor | None = None) -> Tensor:
    """The baseline that fixes the noise instead of learning it: z = mean + s * eps.

        fixed     s = sigma                             (scale is None)
        Gaussian  s = sigma / 0.8 * scale, one per image, scale ~ N(0, 1); E|s| = sigma up to 0.3 %

    mean, eps: [B, C, *space]; scale: [B] or None.  Returns: z [B, C, *space].  Gradient: to mean only.
    Source: sigma-VAE of LatentLM (Sun et al. 2024), used by the Geometric Autoencoder with sigma = 0.2.
    """
    if scale is None:
        return mean + sigma * eps
    return mean + (sigma / 0.8) * scale.view(-1, *[1] * (mean.ndim - 1)) * eps


def sample_posterior(moments: Tensor, eps: Tensor, scale: Tensor, loss: str, sigma: float,
                     sigma_mode: str) -> Tensor:
    """The z that a decoder is trained on: for 've' and 'kl' Eq. 5, for 'sigma' as above, for 'none' the mean.

    moments: [B, 2C, *space]; eps: [B, C, *space]; scale: [B], used by sigma_mode 'gaussian', not by 'fixed'.
    Returns: z [B, C, *space] in fp32.
    """
    mean, logvar = split_moments(moments)
    if loss == "none":
        return mean
    if loss == "sigma":
        return sigma_vae_sample(mean, sigma, eps, scale if sigma_mode == "gaussian" else None)
    return reparameterize(mean, logvar, eps)


# ------------------------------------------------------------------------------------------------------------
# L_rec.  Images: L1 plus LPIPS, as in LDM and VA-VAE.  Eqs. 7-15 reason with the squared error, and the 2-D
# toy uses the unsquared norm (Eq. 26).


def _sum_per_sample(a: Tensor) -> Tensor:
    return a.flatten(1).sum(1)


def absolute_error(x_hat: Tensor, x: Tensor) -> Tensor:
    """sum |x_hat - x|, the pixel term of LDM and VA-VAE.

    x_hat, x: [B, C, *space].  Reduction: sum over C and space, mean over B.  Returns: [].
    Minimum 0 at x_hat = x.  Gradient: to both.  Batch statistics: none.
    """
    return _sum_per_sample((x_hat - x).abs()).mean()


def squared_error(x_hat: Tensor, x: Tensor) -> Tensor:
    """||x_hat - x||^2, Eq. 7.

    x_hat, x: [B, C, *space].  Reduction: sum over C and space, mean over B.  Returns: [].
    Minimum 0 at x_hat = x.  Gradient: to both.  Batch statistics: none.
    """
    return _sum_per_sample((x_hat - x).square()).mean()


def euclidean_error(x_hat: Tensor, x: Tensor) -> Tensor:
    """||x_hat - x||, Eq. 26: the norm of each sample's whole error, not squared.

    x_hat, x: [B, C, *space].  Reduction: norm over C and space, mean over B.  Returns: [].
    Minimum 0 at x_hat = x, where the subgradient 0 is taken.  Gradient: to both.  Batch statistics: none.
    """
    return torch.linalg.vector_norm((x_hat - x).flatten(1), dim=1).mean()


def perceptual_error(net: nn.Module, x_hat: Tensor, x: Tensor) -> Tensor:
    """N_x * LPIPS(x_hat, x) with VGG-16 features, on the scale of a sum over the N_x = C*H*W values of an
    image.

    LDM adds the LPIPS of an image to *every* element of |x_hat - x| before it sums, so that weight 1 puts
    LPIPS and the mean absolute error on the same footing.  Returns the same: mean over B of N_x * LPIPS.
    net: from load_lpips; x_hat, x: [B, 3, H, W] in [-1, 1], at least 16 pixels a side.  Returns: [].
    Minimum 0 at x_hat = x.  Gradient: to x_hat and x, none to the network.  Batch statistics: none.
    """
    net.eval()   # its heads hold dropout; a caller's .train() must not switch it on
    return net(x_hat.float(), x.float()).mean() * x[0].numel()


def load_lpips() -> nn.Module:
    """LPIPS (package `lpips`, VGG-16, heads v0.1): frozen and in eval mode, silent.

    Errors: FileNotFoundError, one line, when the VGG-16 weights are neither in the torch hub cache nor
    downloadable.
    """
    name = "vgg16-397923af.pth"
    folder = f"{torch.hub.get_dir()}/checkpoints"
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            net = lpips.LPIPS(net="vgg", verbose=False)
    except (OSError, RuntimeError) as error:   # no network, or a damaged file
        reason = str(error).splitlines()[0]
        raise FileNotFoundError(f"LPIPS needs torchvision's VGG-16 weights {name} ({reason}): put that file "
                                f"into {folder}, or use --perceptual-weight 0") from None
    return net.eval().requires_grad_(False)


# ------------------------------------------------------------------------------------------------------------
# The KL term the paper removes, Eq. 1.


def kl_divergence(mean: Tensor, logvar: Tensor) -> Tensor:
    """KL( N(mean, diag exp(logvar)) || N(0, I) ), Eq. 1.

        1/2 * sum ( mean^2 + exp(logvar) - logvar - 1 )

    mean, logvar: [B, C, *space].  Reduction: sum over C and space, mean over B.  Returns: [].
    Minimum 0 at mean = logvar = 0.  Gradient: to both.  Batch statistics: none.
    """
    return 0.5 * _sum_per_sample(mean.square() + logvar.exp() - logvar - 1).mean()


# ------------------------------------------------------------------------------------------------------------
# Variance Expansion, Eqs. 9 and 10.  Against a reconstruction error that grows like sigma^2 T (Eq. 8), the
# inverse variance settles at sigma^4 = lambda1 / T (Eq. 14): latents the decoder hardly feels become wide,
# sensitive ones stay narrow.  Nothing in it bounds the latent's scale, and scaling the mean up makes any
# sigma relatively small; the exponential penalty on the sample is what stops that.


def inverse_variance(logvar: Tensor, delta: float = 1e-6) -> Tensor:
    """L_var = sum 1 / (sigma^2 + delta), Eq. 9.

    Computed as sigmoid(log delta - logvar) / delta, which neither overflows nor cancels.  The pull on logvar,
    sigma^2 / (sigma^2 + delta)^2, grows as sigma shrinks until sigma^2 = delta and vanishes below: choose
    delta under the smallest variance that must be rescued (1e-6 from scratch, 1e-8 from a beta-VAE's
    weights).

    logvar: [B, C, *space]; delta > 0.  Reduction: sum over C and space, mean over B.  Returns: [].
    Infimum 0 at sigma = infinity; at most 1 / delta per element.  Gradient: to logvar, always towards wider.
    Batch statistics: none.  Errors: ValueError for delta <= 0.
    """
    if delta <= 0:
        raise ValueError(f"delta must be positive, got {delta}")
    return _sum_per_sample(torch.sigmoid(math.log(delta) - logvar)).mean() / delta


def negative_variance(logvar: Tensor) -> Tensor:
    """-sum sigma^2: candidate (i) of Analyze 2, which the paper rejects: no local equilibrium, no pull at
    sigma = 0.

    logvar: [B, C, *space].  Reduction: sum over C and space, mean over B.  Returns: [].
    Unbounded below.  Gradient: to logvar.  Batch statistics: none.
    """
    return -_sum_per_sample(logvar.exp()).mean()


def log_entropy(logvar: Tensor) -> Tensor:
    """-sum log sigma^2: candidate (ii) of Analyze 2, twice the Gaussian's negative entropy up to a constant.

    Its equilibrium with Eq. 8 is sigma^2 = weight / T.  (Analyze 2 writes log sigma^2; expanding needs the
    minus.)
    logvar: [B, C, *space].  Reduction: sum over C and space, mean over B.  Returns: [].
    Unbounded below.  Gradient: to logvar, -1 / B per element.  Batch statistics: none.
    """
    return -_sum_per_sample(logvar).mean()


def exponential_magnitude(z: Tensor, tau: float = 1.0, cap: float = 20.0) -> Tensor:
    """L_reg = sum exp(|z| - tau), Eq. 10, continued by its tangent where |z| - tau > cap.

        exp(u) for u = |z| - tau <= cap,   exp(cap) * (1 + u - cap) above

    The tangent keeps the gradient alive where a clamp would kill it, and the value finite.  Since exp(|z| -
    tau) = exp(-tau) exp(|z|), tau is a factor on the weight and no threshold: at lambda2 = 1e-6, tau = 1 the
    term is a soft wall near |z| = 13, which is past fp16's range: call it on an fp32 latent outside autocast.

    z: [B, C, *space], the *sample* of Eq. 5, so that it holds sigma as well as the mean.
    Reduction: sum over C and space, mean over B.  Returns: [].  Minimum exp(-tau) per element at z = 0.
    Gradient: to z.  Batch statistics: none.
    """
    u = z.abs() - tau
    return _sum_per_sample(torch.exp(u.clamp(max=cap)) * (1 + F.relu(u - cap))).mean()


def square_magnitude(mean: Tensor) -> Tensor:
    """sum mean^2: what holds the scale of a sigma-VAE, whose fixed noise a growing mean would escape.

    mean: [B, C, *space].  Reduction: sum over C and space, mean over B.  Returns: [].
    Minimum 0 at mean = 0.  Gradient: to mean.  Batch statistics: none.  Source: LatentLM.
    """
    return _sum_per_sample(mean.square()).mean()


# ------------------------------------------------------------------------------------------------------------
# VQGAN's adversarial loss, which LDM's and VA-VAE's tokenizers add to L_rec, balanced against it by the
# gradients of both at the decoder's last layer.


def hinge_discriminator(real: Tensor, fake: Tensor) -> Tensor:
    """1/2 ( E max(0, 1 - D(x)) + E max(0, 1 + D(x_hat)) ): what the discriminator minimises.

    real, fake: logits of any shape.  Reduction: mean over everything.  Returns: [].
    Minimum 0 where real >= 1 and fake <= -1.  Gradient: to both.  Batch statistics: none here, but
    PatchGAN's.
    """
    return 0.5 * (F.relu(1 - real).mean() + F.relu(1 + fake).mean())


def hinge_generator(fake: Tensor) -> Tensor:
    """-E D(x_hat): what the autoencoder minimises.  fake: logits of any shape, mean over everything -> []."""
    return -fake.mean()


def adaptive_weight(reference: Tensor, other: Tensor, eps: float = 1e-4, maximum: float = 1e4) -> Tensor:
    """||reference|| / (||other|| + eps), at most `maximum`: brings a second loss up to the reconstruction.

    reference, other: gradients of the two losses at one parameter, any equal shape.  Returns: [], no
    gradient. VQGAN and LDM: the adversarial loss at the decoder's last layer, maximum 1e4.  VA-VAE: the
    alignment at the encoder's last layer, maximum 1e8.  With summed losses the ratio is N_x times that of
    means and can sit on its maximum: the log says so.
    """
    ratio = reference.float().norm() / (other.float().norm() + eps)
    return ratio.clamp(max=maximum).detach()


# ------------------------------------------------------------------------------------------------------------
# VA-VAE's alignment of the latent with a vision foundation model: with its features f themselves, after a
# learned projection of z to their width, and with the similarities among them.  Both forgive up to a margin.


def marginal_cosine(projected: Tensor, teacher: Tensor, margin: float = 0.5) -> Tensor:
    """mean over positions of max(0, 1 - margin - cos(projected, teacher)): VA-VAE's L_mcos.

    projected, teacher: [B, D, h, w].  Reduction: mean over B, h, w.  Returns: [] in [0, 2 - margin].
    Minimum 0 where the cosine is at least 1 - margin.  Gradient: to both.  Batch statistics: none.
    """
    return F.relu(1 - margin - F.cosine_similarity(projected, teacher, dim=1)).mean()


def marginal_distance_matrix(projected: Tensor, teacher: Tensor, margin: float = 0.25) -> Tensor:
    """mean over pairs (i, j) of positions of max(0, |cos(z_i, z_j) - cos(f_i, f_j)| - margin): VA-VAE's
    L_mdms.

    projected z, teacher f: [B, D, h, w] (their widths may differ).  Reduction: mean over B and the (hw)^2
    pairs.  Returns: [] in [0, 2 - margin].  Minimum 0 where both similarities agree up to the margin.
    Gradient: to both.  Batch statistics: none.
    """
    def similarity(a: Tensor) -> Tensor:
        unit = F.normalize(a.flatten(2), dim=1)                                                 # [B, D, N]
        return unit.mT @ unit

    return F.relu((similarity(projected) - similarity(teacher)).abs() - margin).mean()


# ------------------------------------------------------------------------------------------------------------
# The objective.


def weighted_sum(terms: dict[str, Tensor], weights: dict[str, float]) -> Tensor:
    """sum_k weights[k] * terms[k]: Eq. 1 or Eq. 11, by name.  A term without a weight is a KeyError.

    Eq. 11 is weighted_sum({rec, var, reg}, {rec: 1, var: lambda1, reg: lambda2}).
    """
    return sum(weights[name] * term for name, term in terms.items())


# ------------------------------------------------------------------------------------------------------------
# Flow matching, Eqs. 4 and 27-29, with t = 1 at the data.


def interpolate(x: Tensor, eps: Tensor, t: Tensor) -> Tensor:
    """x_t = (1 - t) eps + t x, Eq. 27.  x, eps: [B, *rest]; t: [B] in [0, 1].  Returns: [B, *rest]."""
    t = t.view(-1, *[1] * (x.ndim - 1))
    return (1 - t) * eps + t * x


def velocity(x: Tensor, eps: Tensor) -> Tensor:
    """d x_t / dt = x - eps, Eq. 28.  x, eps: [B, *rest].  Returns: [B, *rest]."""
    return x - eps


def flow_matching_per_sample(v_hat: Tensor, v: Tensor) -> Tensor:
    """Mean over all but the batch of (v_hat - v)^2, for a loss binned by t.  [B, *rest] -> [B]."""
    return (v_hat.float() - v).square().flatten(1).mean(1)


def flow_matching(v_hat: Tensor, v: Tensor) -> Tensor:
    """E || v_hat - v ||^2 / d, Eqs. 4 and 29 divided by the dimension d of the latent.

    v_hat, v: [B, *rest].  Reduction: mean over everything.  Returns: [].
    Minimum over v_hat = E[v | x_t]: the conditional variance, not 0.  Gradient: to v_hat.  Batch statistics:
    none.
    """
    return flow_matching_per_sample(v_hat, v).mean()


def cosine_velocity(v_hat: Tensor, v: Tensor) -> Tensor:
    """mean over positions of 1 - cos(v_hat, v), the angle taken over the channels: LightningDiT's second
    term.

    v_hat, v: [B, C, *space].  Reduction: mean over B and space.  Returns: [] in [0, 2].
    Minimum 0 where the directions agree.  Gradient: to v_hat.  Batch statistics: none.
    """
    return (1 - F.cosine_similarity(v_hat.float(), v, dim=1)).mean()


def time_shift(t: Tensor, shift: float) -> Tensor:
    """f_s(t) = s t / (1 + (s - 1) t): fixes 0 and 1; s < 1 moves times towards the noise (t = 0).  f_s
    inverts f_1/s.

    t: in [0, 1]; shift > 0.  Returns: same shape.  Source: SD3, with its time reversed.  Errors: ValueError
    for shift <= 0.
    """
    if shift <= 0:
        raise ValueError(f"the time shift must be positive, got {shift}")
    return shift * t / (1 + (shift - 1) * t)


# ------------------------------------------------------------------------------------------------------------
# Integrators from noise at t = 0 to data at t = 1, Eqs. 30 and 31.  They share their first five arguments:
#     velocity_fn(x, t) -> v [B, *rest], t a Python float (no device synchronisation); x [B, *rest] the noise,
#     kept in its own precision; steps; shift of `time_grid`; record(t, x_t, x_t + (1 - t) v), called at every
#     time of the grid with the state and the data that one step to t = 1 would predict.

Velocity = Callable[[Tensor, float], Tensor]
Record = Callable[[float, Tensor, Tensor], None]


def time_grid(steps: int, shift: float = 1.0) -> list[float]:
    """The steps + 1 times of an integration from 0 to 1: time_shift(k / steps), k = 0..steps, Eq. 31 at shift
    1.

    Errors: ValueError for steps < 1 or shift <= 0.
    """
    if steps < 1:
        raise ValueError(f"an integration needs at least one step, got {steps}")
    return time_shift(torch.linspace(0, 1, steps + 1, dtype=torch.float64), shift).tolist()


@torch.no_grad()
def euler(velocity_fn: Velocity, x: Tensor, steps: int, shift: float = 1.0,
          record: Record | None = None) -> Tensor:
    """Integrate dx/dt = velocity_fn(x, t) from t = 0 to t = 1, Eqs. 30 and 31.

        x <- x + (t_{k+1} - t_k) velocity_fn(x, t_k),   exactly `steps` evaluations

    Returns: [B, *rest] at t = 1.  Global error: O(1 / steps).
    """
    times = time_grid(steps, shift)
    for t, t_next in zip(times[:-1], times[1:]):
        v = velocity_fn(x, t).to(x.dtype)
        if record:
            record(t, x, x + (1 - t) * v)
        x = x + (t_next - t) * v
    if record:
        record(1.0, x, x)
    return x


@torch.no_grad()
def heun(velocity_fn: Velocity, x: Tensor, steps: int, shift: float = 1.0,
         record: Record | None = None) -> Tensor:
    """As `euler`, with the velocity averaged over both ends of a step: second order.

        x' = x + h v(x, t_k),   x <- x + h/2 (v(x, t_k) + v(x', t_{k+1})),   h = t_{k+1} - t_k

    The last step is Euler's: it keeps the order, and t = 1, which training hardly sees, is never asked for.
    Exactly 2 steps - 1 evaluations.  Returns: [B, *rest] at t = 1.  Global error: O(1 / steps^2).
    """
    times = time_grid(steps, shift)
    for k, (t, t_next) in enumerate(zip(times[:-1], times[1:])):
        v = velocity_fn(x, t).to(x.dtype)
        if record:
            record(t, x, x + (1 - t) * v)
        if k + 1 < steps:
            v = (v + velocity_fn(x + (t_next - t) * v, t_next).to(x.dtype)) / 2
        x = x + (t_next - t) * v
    if record:
        record(1.0, x, x)
    return x


def sde_grid(steps: int, shift: float, start: float, last: float) -> list[float]:
    """`steps` times from `start` to 1 - `last`, equally spaced under the time shift, and 1.

    Errors: ValueError for steps < 1, shift <= 0, or a `last` outside (0, 1 - start).
    """
    if steps < 1 or not 0 < last < 1 - start:
        raise ValueError(f"an SDE needs a step, its last one below {1 - start:g}, not {steps} and {last}")
    if shift <= 0:
        raise ValueError(f"the time shift must be positive, got {shift}")
    ends = time_shift(torch.tensor([start, 1 - last], dtype=torch.float64), 1 / shift).tolist()
    return time_shift(torch.linspace(*ends, steps, dtype=torch.float64), shift).tolist() + [1.0]


@torch.no_grad()
def euler_maruyama(velocity_fn: Velocity, x: Tensor, steps: int, shift: float = 1.0,
                   record: Record | None = None, *, noise_fn: Callable[[int], Tensor],
                   diffusion: str = "sigma", last: float = 0.04) -> Tensor:
    """Integrate SiT's SDE, which has the marginals of the ODE for every w_t >= 0, with t = 1 at the data.

        dx = [v + w_t s] dt + sqrt(2 w_t) dW,   score s(x, t) = (t v - x) / (1 - t)

    diffusion   "sigma": w_t = 1 - t, or "sbdm": w_t = (1 - t) / t, which starts at t = 0.01 instead of 0
                (from SiT's 1e-5 the first step throws the state to |x| = 2000)
    noise_fn    step k = 0 .. steps - 2 -> N(0, I) of x's shape
    last        length of the last step, which follows the drift without noise: 0.04 in SiT, 0.004 in GAE.
                It starts at the last time of the grid whatever the shift

    Exactly `steps` evaluations.  Returns: [B, *rest] at t = 1.  Weak error: O(1 / steps + last^2).
    Source: SiT (2401.08740) and its code.  Errors: ValueError, of `sde_grid` too.
    """
    if diffusion not in ("sigma", "sbdm"):
        raise ValueError(f'diffusion is "sigma" or "sbdm", not "{diffusion}"')
    times = sde_grid(steps, shift, 0.01 if diffusion == "sbdm" else 0.0, last)
    for k, (t, t_next) in enumerate(zip(times[:-1], times[1:])):
        v, h = velocity_fn(x, t).to(x.dtype), t_next - t
        if record:
            record(t, x, x + (1 - t) * v)
        rate = 1 / t if diffusion == "sbdm" else 1.0                        # w_t / (1 - t)
        x = x + h * (v + rate * (t * v - x))
        if k + 1 < steps:
            x = x + math.sqrt(2 * rate * (1 - t) * h) * noise_fn(k).to(x)
    if record:
        record(1.0, x, x)
    return x
