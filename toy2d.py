"""A toy in two dimensions: why a latent with more variance generates better.

Figures 1 and 2 of "Taming Sampling Perturbations with Variance Expansion Loss for
Latent Diffusion Models" (Li et al.), as its supplement C describes them.  With a
weak KL term a tokenizer reconstructs a tree almost perfectly, and yet generates
worse than with the Variance Expansion loss (VE).  A third figure, which is ours,
shows why: with the exact flow in place of the learned one, KL is the better of the two.

    python toy2d.py                      # 70 seconds on two cores
    python toy2d.py --seeds 0 1 2 3 4    # mean and deviation over five seeds
    python toy2d.py --preset paper       # the sizes of supplement C, for a GPU
    python toy2d.py --smoke              # every line of it, in seconds

An arm is a tokenizer and the flow that learns its latents.  Each arm is one file
under --out, and the same command again trains only the arms that are missing.
"""

import functools
import hashlib
import math
import statistics
import time
from collections import namedtuple
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import runtime  # before torch: it sets how threads wait
import numpy as np
import torch
from matplotlib import pyplot as plt
from matplotlib.patches import Ellipse
from torch import Tensor, nn
from tqdm import tqdm

import checkpoints
import flow
import losses
from runtime import InputError

# ------------------------------------------------------------------------------
# The data, Eqs. 20 and 21: class A of the toy in "Guiding a Diffusion Model with
# a Bad Version of Itself" (Karras et al. 2024).  A branch is a row of Gaussians.
# It splits in two, six times, and its children are shorter, thinner and less
# likely.  The numbers and the order of the random draws are theirs.

# phi [K], mu [K, 2] and Sigma [K, 2, 2] of Eq. 20, in float64.
Mixture = namedtuple("Mixture", "weight mean covariance")


def fractal() -> Mixture:
    """1016 Gaussians, with mean 0 and standard deviation 0.5 along each axis."""
    draws = np.random.RandomState(2)
    weight, mean, covariance = [], [], []
    branches = [(0, np.zeros(2), math.pi / 4, 0)]
    while branches:
        level, foot, angle, side = branches.pop()
        if level > 0:
            angle += side * 0.7 ** (level - 1) * (1 + 0.2 * draws.randn())
        if level > 6:   # its angle was drawn only to keep their order
            continue
        length = 0.292 * 0.8 ** level * (1 + 0.2 * draws.randn())
        along = np.array([math.cos(angle), math.sin(angle)])
        across = np.array([-along[1], along[0]])
        weight += 8 * [length * 0.5 ** level]
        mean += [foot + along * length * k for k in np.linspace(0.07, 0.93, 8)]
        covariance += 8 * [np.outer(along, along) * (0.06 * length) ** 2
                           + np.outer(across, across) * (0.012 * 0.8 ** level) ** 2]
        tip = foot + along * length
        branches += [(level + 1, tip, angle, side) for side in (-1, 1)]
    w, m, c = (torch.from_numpy(np.array(a)) for a in (weight, mean, covariance))
    w = w / w.sum()
    m = m - w @ m
    scale = 0.5 / (w @ (m.square() + c.diagonal(dim1=1, dim2=2))).sqrt()
    return Mixture(w, m * scale, c * scale.outer(scale))


TREE = fractal()


def log_terms(mixture: Mixture, x: Tensor):
    """Yield log phi_i N(x; mu_i, Sigma_i), Eq. 21: [N, K], some rows at a time.

    It is a polynomial in x = (a, b), and so all of it is one matrix product, in the
    precision of x.  In a thin Gaussian large terms cancel, which wants float64.
    """
    (aa, ab), (_, bb) = mixture.covariance.movedim(0, -1)
    determinant = aa * bb - ab * ab
    aa, ab, bb = bb / determinant, -ab / determinant, aa / determinant   # the inverse
    a, b = mixture.mean.T
    linear = torch.stack([aa * a + ab * b, ab * a + bb * b])
    constant = (mixture.weight / (2 * math.pi * determinant.sqrt())).log()
    constant = constant - (linear * mixture.mean.T).sum(0) / 2
    coefficients = torch.stack([-aa / 2, -ab, -bb / 2, *linear, constant]).to(x.dtype)
    for part in x.split(max(1, 2 ** 19 // len(constant))):
        a, b = part.unbind(1)
        powers = torch.stack([a * a, a * b, b * b, a, b, torch.ones_like(a)], 1)
        yield powers @ coefficients


def log_density(x: Tensor) -> Tensor:
    """log p(x) of the tree, Eq. 20.  [N, 2] -> [N]."""
    return torch.cat([part.logsumexp(1) for part in log_terms(TREE, x.double())])


def sample(n: int, draws: torch.Generator) -> Tensor:
    """n points of the tree, [n, 2] in float32, on the generator's device."""
    weight, mean, covariance = (part.to(draws.device) for part in TREE)
    u = torch.rand(n, dtype=torch.float64, generator=draws, device=draws.device)
    i = torch.searchsorted(weight.cumsum(0), u).clamp(max=len(weight) - 1)
    root = torch.linalg.cholesky(covariance).float()[i]
    eps = torch.randn(n, 2, 1, generator=draws, device=draws.device)
    return mean.float()[i] + (root @ eps)[..., 0]


# ------------------------------------------------------------------------------
# The arms.  The first and the last have the weights of supplement C.  Among the
# KL weights of studies/toy_sweep.py 0.03 generated best, and 0.1 is strong enough
# to harm the reconstruction, as in Figure 2.


@dataclass(frozen=True)
class Arm:
    name: str
    loss: str               # "kl" or "ve"
    weight: float           # of the KL term, or lambda1
    lambda2: float = 0.0    # of Eq. 10
    seed: int = 0           # of initial weights, data and noise


ARMS = (Arm("KL 1e-3", "kl", 1e-3), Arm("KL 0.03", "kl", 0.03),
        Arm("KL 0.1", "kl", 0.1), Arm("VE 1e-2", "ve", 1e-2, lambda2=1e-6))

# "paper" is supplement C, and was never run here.  "small" is for two cores.  So
# few steps would end in noise without a learning rate that cools down at the end
# and without an average (ema) of the flow's weights.
PRESETS = {
    "paper": dict(width=512, tokenizer_batch=4096, tokenizer_steps=200_000,
                  flow_batch=4096, flow_steps=200_000, lr=1e-3, lr_constant=512,
                  cooldown=0.0, ema=0.0, points=20_000),
    "small": dict(width=64, tokenizer_batch=256, tokenizer_steps=8_000,
                  flow_batch=256, flow_steps=4_000, lr=4e-3, lr_constant=1_000,
                  cooldown=0.3, ema=0.999, points=20_000)}
SMOKE = dict(width=16, tokenizer_steps=60, flow_steps=60, points=500)
STEPS = 20   # of Eq. 31
CPU = torch.device("cpu")


class Model(nn.Module):
    """The networks of an arm, Eqs. 24, 25 and 30, and their losses.

    The flow learns the sample z of Eq. 5, centred and divided by its spread, so
    that the flow losses of a narrow and of a wide latent can be compared.
    """

    def __init__(self, arm: Arm, width: int) -> None:
        super().__init__()
        self.arm = arm
        self.encoder = self.mlp("encoder", 2, *7 * [width], 4)
        self.decoder = self.mlp("decoder", 2, *7 * [width], 2)
        self.flow = self.mlp("flow", 3, *7 * [width], 2)
        self.register_buffer("centre", torch.zeros(2))
        self.register_buffer("spread", torch.ones(2))

    def mlp(self, name: str, *sizes: int) -> nn.Sequential:
        """A ReLU network with He's initial weights."""
        draws, layers = runtime.generator(self.arm.seed, name), []
        for linear in map(nn.Linear, sizes[:-1], sizes[1:]):
            nn.init.kaiming_normal_(linear.weight, nonlinearity="relu", generator=draws)
            nn.init.zeros_(linear.bias)
            layers += [linear, nn.ReLU(inplace=True)]
        return nn.Sequential(*layers[:-1])

    def tokenizer_loss(self, x: Tensor, eps: Tensor, *_) -> Tensor:
        """Eq. 1 or Eq. 11, with the unsquared norm of Eq. 26."""
        mean, logvar = losses.split_moments(self.encoder(x))
        z = losses.reparameterize(mean, logvar, eps)
        rec = losses.euclidean_error(self.decoder(z), x)
        if self.arm.loss == "kl":
            return rec + self.arm.weight * losses.kl_divergence(mean, logvar)
        return (rec + self.arm.weight * losses.inverse_variance(logvar)
                + self.arm.lambda2 * losses.exponential_magnitude(z))

    def latent(self, x: Tensor, eps: Tensor) -> Tensor:
        mean, logvar = losses.split_moments(self.encoder(x))
        return (losses.reparameterize(mean, logvar, eps) - self.centre) / self.spread

    def decode(self, z: Tensor) -> Tensor:
        """The points of latents that are in the flow's units."""
        return self.decoder(z * self.spread + self.centre)

    def velocity(self, z_t: Tensor, t: Tensor | float) -> Tensor:
        t = torch.as_tensor(t, device=z_t.device).expand(len(z_t))
        return self.flow(torch.cat([z_t, t[:, None]], 1))

    def flow_loss(self, x: Tensor, eps: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """Eq. 29, a sum over the two dimensions."""
        with torch.no_grad():
            z = self.latent(x, eps)
        v_hat = self.velocity(flow.interpolate(z, noise, t), t)
        return 2 * flow.flow_matching(v_hat, flow.velocity(z, noise))


# ------------------------------------------------------------------------------
# Training: the tokenizer to its end, and then the flow on its latents.  Arms of
# one seed see the same data and the same noise.


def batches(seed: int, stage: str, batch: int, steps: int, device: torch.device):
    """Yield x, eps and the flow's noise [B, 2] and t [B] for each step."""
    chunk = min(steps, 100)   # steps whose numbers are drawn at once, for speed
    for step in range(steps):
        if step % chunk == 0:
            draws = runtime.generator(seed, stage, step, device=device)
            x = sample(chunk * batch, draws)
            noise = torch.randn(2, *x.shape, generator=draws, device=device)
            t = torch.rand(len(x), generator=draws, device=device)
            parts = [values.chunk(chunk) for values in (x, *noise, t)]
        yield [values[step % chunk] for values in parts]


def descend(model: Model, stage: str, network: nn.Module, loss, recipe: dict,
            after_step=lambda: None) -> None:
    """Adam with the learning rate of Karras et al., which may cool down at the end."""
    device, steps = model.centre.device, recipe[f"{stage}_steps"]
    data = batches(model.arm.seed, stage, recipe[f"{stage}_batch"], steps, device)
    cuda = device.type == "cuda"
    compiled = torch.compile(loss, mode="reduce-overhead") if cuda else loss
    optimizer = torch.optim.Adam(network.parameters(), fused=True)
    for step, batch in enumerate(data):
        if cuda:
            torch.compiler.cudagraph_mark_step_begin()
        lr = runtime.learning_rate(step, steps, recipe["lr"], 0, recipe["cooldown"])
        lr /= math.sqrt(max(step / recipe["lr_constant"], 1))
        optimizer.param_groups[0]["lr"] = lr
        optimizer.zero_grad(set_to_none=True)
        compiled(*batch).backward()
        optimizer.step()
        after_step()


def train_tokenizer(model: Model, recipe: dict) -> None:
    """The first stage, and then the centre and the spread of its latents."""
    tokenizer = nn.ModuleList([model.encoder, model.decoder])
    descend(model, "tokenizer", tokenizer, model.tokenizer_loss, recipe)
    tokenizer.requires_grad_(False)

    device = model.centre.device
    x, eps, *_ = next(batches(model.arm.seed, "units", recipe["points"], 1, device))
    z = model.latent(x, eps)
    model.centre, model.spread = z.mean(0), z.std(0)


def train_flow(model: Model, recipe: dict) -> None:
    """The second stage.  Its result is the average of the network's weights."""
    ema = runtime.Ema(model.flow, recipe["ema"])
    descend(model, "flow", model.flow, model.flow_loss, recipe, ema.update)
    model.flow = ema.model


# ------------------------------------------------------------------------------
# The flow without a network.  The latents of M points are a mixture of their M
# posteriors, and with noise they still are a mixture of Gaussians (Eq. 22).  Its score
# is known (Eq. 23), and so is the velocity that Eq. 29 looks for.  Its samples show the
# tokenizer and the Euler steps, without a network's error.


def exact_velocity(z_t: Tensor, t: float, mean: Tensor, std: Tensor) -> Tensor:
    """E[z - eps | z_t], the minimum of Eq. 29.  mean, std: [M, 2].  t is below 1.

    Within one Gaussian, E[z | z_t] is linear in z_t = t z + (1 - t) eps.  These lines
    are averaged by each Gaussian's probability at z_t.
    """
    mean, variance = mean.double(), std.double().square()
    weight = torch.full_like(mean[:, 0], 1 / len(mean))
    noisy = t ** 2 * variance + (1 - t) ** 2
    slope = t * variance / noisy
    lines = torch.cat([mean - slope * t * mean, slope], 1).to(z_t.dtype)
    mixture = Mixture(weight, t * mean, noisy.diag_embed())
    parts = [part.softmax(1) @ lines for part in log_terms(mixture, z_t)]
    constant, slope = torch.cat(parts).chunk(2, 1)
    return (constant + slope * z_t - z_t) / (1 - t)


def flow_error(learned: Tensor, exact: Tensor) -> float:
    """e: how far a flow's samples are from the exact flow's, [N, 2] both.

    Both start from the same noise.  Errors that are normal, with deviation e along
    each axis, have the median length sqrt(2 log 2) e.  The few samples that arrive
    on another branch, however far away, do not move a median.
    """
    distance = torch.linalg.vector_norm(learned - exact, dim=1)
    return distance.median().item() / math.sqrt(2 * math.log(2))


# ------------------------------------------------------------------------------
# Numbers.  A point is invalid where the true density is below the 0.1 % quantile
# of real data.  Coverage is the share of the 1016 Gaussians from which some
# valid sample most likely came.


@functools.cache
def threshold() -> float:
    real = sample(100_000, runtime.generator(0, "threshold"))
    return torch.quantile(log_density(real), 1e-3).item()


def is_valid(x: Tensor) -> Tensor:
    """[N, 2] -> [N].  A point that is not finite is not valid."""
    return log_density(x) >= threshold()


@torch.no_grad()
def evaluate(model: Model, n: int) -> dict[str, dict]:
    """The points that are drawn, which of them are valid, and the numbers."""
    x, eps, noise, t = next(batches(model.arm.seed, "evaluate", n, 1, CPU))
    mean, logvar = losses.split_moments(model.encoder(x))
    std, z = (logvar / 2).exp(), losses.reparameterize(mean, logvar, eps)
    posteriors = (mean - model.centre) / model.spread, std / model.spread

    learned = flow.euler(model.velocity, noise, STEPS)
    exact = flow.euler(lambda *at: exact_velocity(*at, *posteriors), noise[:2000], STEPS)
    decoded = {"rec": model.decoder(mean), "z": model.decoder(z),
               "sample": model.decode(learned), "exact": model.decode(exact)}
    valid = {key: is_valid(value) for key, value in decoded.items()}
    invalid = {key: 100 * (~v).double().mean().item() for key, v in valid.items()}
    origins = [part.argmax(1) for part in
               log_terms(TREE, decoded["sample"][valid["sample"]].double())]
    return {
        "points": decoded | {"x": x, "mean": mean, "std": std, "z": z},
        "valid": valid,
        "numbers": {
            "invalid [%]": invalid["sample"],
            "invalid, exact flow [%]": invalid["exact"],
            "invalid D(z) [%]": invalid["z"],
            "invalid D(mean) [%]": invalid["rec"],
            "coverage [%]": 100 * len(torch.cat(origins).unique()) / len(TREE.weight),
            "error of D(mean)": losses.euclidean_error(decoded["rec"], x).item(),
            "error of D(z)": losses.euclidean_error(decoded["z"], x).item(),
            "flow loss": model.flow_loss(x, eps, noise, t).item(),
            "sigma / spread [%]": 100 * (std / z.std(0)).mean().item(),
            "e / spread [%]": 100 * flow_error(learned[:len(exact)], exact),
            "spread": z.std(0).mean().item()}}


# ------------------------------------------------------------------------------
# Figures 1 and 2.  Every row is an arm, and the latents of all rows have one scale.
# Blue and orange are Okabe and Ito's, which the colour-blind can tell apart.
# The third figure is ours; the paper's Figure 3 shows ImageNet.  It tells who loses
# the data: the decoder alone, or the steps of the exact flow before it, or the error
# of the flow's network.


def draw(arms: list[dict], title: str, path: Path) -> None:
    figure, axes = plt.subplots(len(arms), 4, figsize=(15, 4.3 * len(arms)),
                                layout="constrained")
    figure.suptitle(f"{title}\nGrey: the data.  Orange: what lies outside of the data."
                    "  Ellipses: one sigma around some means.")
    reach = max(arm["points"]["z"].abs().max().item() for arm in arms)
    for row, arm in zip(axes, arms):
        points, number = arm["points"], arm["numbers"]
        titles = {
            "rec": f"{arm['arm']['name']}: reconstructions\nerror {number['error of D(mean)']:.4f}",
            "sample": f"samples of the flow\n{number['invalid [%]']:.1f} % outside",
            "exact": f"the exact flow's samples\n{number['invalid, exact flow [%]']:.1f} % outside",
            "z": f"latents, spread {number['spread']:.1f}\n"
                 f"sigma is {number['sigma / spread [%]']:.1f} % of it"}
        for ax, (key, title) in zip(row, titles.items()):
            symbol, half = ("z", reach) if key == "z" else ("x", 1.6)
            shown, valid = points[key][:3000], arm["valid"][key][:3000]
            if key != "z":
                ax.plot(*points["x"].T, ".", ms=2.5, mew=0, color="#E2E2E2", zorder=0)
            ax.scatter(*shown.T, s=np.where(valid, 2, 5),
                       c=np.where(valid, "#0072B2", "#D55E00"), linewidths=0)
            ax.set(title=title, xlabel=f"${symbol}_1$", ylabel=f"${symbol}_2$",
                   xlim=(-half, half), ylim=(-half, half), box_aspect=1)
        for mean, std in zip(points["mean"][:40], points["std"][:40]):
            ax.add_patch(Ellipse(mean, *(2 * std), fill=False))
    runtime.save_figure(figure, path, dpi=72)


def draw_mechanism(numbers: dict[str, dict[str, list[float]]], path: Path) -> None:
    figure, ax = plt.subplots(figsize=(9, 4.6), layout="constrained")
    for shift, colour, key, label in (
            (-0.27, "#BBBBBB", "invalid D(z) [%]", "real latents"),
            (0, "#0072B2", "invalid, exact flow [%]", "samples of the exact flow"),
            (0.27, "#D55E00", "invalid [%]", "samples of the learned flow")):
        values = [arm[key] for arm in numbers.values()]
        places = shift + np.arange(len(values))
        ax.bar(places, np.mean(values, 1), 0.25, color=colour, label=label)
        ax.plot(places, values, "k.", ms=4)
    ax.set_xticks(range(len(numbers)), [
        f"{name}\nsigma {np.mean(arm['sigma / spread [%]']):.1f} %, "
        f"e {np.mean(arm['e / spread [%]']):.1f} %" for name, arm in numbers.items()])
    ax.set(ylabel="decoded outside of the data [%]", title="What the decoder has paid in "
           "advance, and what the flow's error e adds.  Dots are seeds.")
    ax.legend(frameon=False)
    runtime.save_figure(figure, path, dpi=72)


# ------------------------------------------------------------------------------
# On a CPU each arm has a process with one thread, because a second thread gains
# nothing on matrices of this size.  The name of its file holds a digest of its
# settings, so that an arm with other settings is never mistaken for it.


def measure(arm: Arm, recipe: dict, device: torch.device, kind: type[Model] = Model) -> dict:
    model = kind(arm, recipe["width"]).to(device)
    train_tokenizer(model, recipe)
    train_flow(model, recipe)
    return evaluate(model.cpu(), recipe["points"]) | {"model": model.state_dict()}


def run_arm(job: tuple) -> None:
    torch.set_num_threads(1)
    (arm, recipe, device, work, path), begin = job, time.time()
    done = work(arm, recipe, device)
    checkpoints.save(done | {"arm": asdict(arm), "seconds": time.time() - begin}, path)


def read_arm(path: Path, arm: Arm) -> dict:
    found = checkpoints.read(path)
    if found.get("arm") != asdict(arm):
        raise InputError(f"{path} is not the file of this arm: remove it")
    return found


def run(arms: list[Arm], recipe: dict, device: torch.device, folder: Path,
        work=measure) -> list[dict]:
    """Train the arms that have no file yet, and read all of them.

    work: (arm, recipe, device) -> what is to be kept of an arm, a dict.
    """
    jobs, paths = [], []
    for arm in arms:
        digest = hashlib.blake2b(repr((arm, recipe)).encode(), digest_size=4).hexdigest()
        paths.append(folder / f"{arm.name}, seed {arm.seed}, {digest}.pt")
        if paths[-1].exists():
            read_arm(paths[-1], arm)   # a damaged file is named before the work
        else:
            jobs.append((arm, recipe, device, work, paths[-1]))
    count = min(torch.get_num_threads(), len(jobs)) if device == CPU else 1
    done = runtime.in_processes(count, run_arm, jobs) if count > 1 else map(run_arm, jobs)
    list(tqdm(done, "arms", len(jobs), disable=None))
    return [read_arm(path, arm) for path, arm in zip(paths, arms)]


@runtime.command
def main(argv: list[str] | None = None) -> dict:
    parser = runtime.Parser(__doc__)
    add = parser.add_argument
    add("--preset", choices=list(PRESETS), default="small", help="sizes of everything")
    add("--smoke", action="store_true", help="a few steps of everything, in seconds")
    add("--seeds", type=runtime.seed, nargs="+", default=[0], help="the arms are run for each")
    add("--device", choices=["auto", "cpu", "cuda"], default="auto", help="where to train")
    add("--out", type=Path, default=Path("runs/toy2d"), help="folder of arms and figures")
    add("--json", type=Path, help="file of the numbers, if not OUT/toy2d.json")
    args, begin = parser.parse(argv), time.time()
    path = args.json or args.out / "toy2d.json"
    rt = runtime.start(args.device)
    runtime.claim(rt, args.out, path)
    runtime.exact_products()   # TF32 is coarser than the error of KL
    recipe = PRESETS[args.preset] | (SMOKE if args.smoke else {})
    arms = [replace(arm, seed=seed) for seed in args.seeds for arm in ARMS]
    results = run(arms, recipe, rt.device, args.out / "arms")

    numbers = {}
    for k, arm in enumerate(ARMS):
        print(f"\n{arm.name}")
        mine = [result["numbers"] for result in results[k::len(ARMS)]]
        numbers[arm.name] = {key: [m[key] for m in mine] for key in mine[0]}
        for key, values in numbers[arm.name].items():
            # The deviation is that of a sample, with n - 1.
            spread = f" ± {statistics.stdev(values):.2g}" if len(values) > 1 else ""
            print(f"    {key:24}{statistics.mean(values):.4g}{spread}")
    runtime.write_json(path, {
        **runtime.provenance(rt.device),
        "training_seconds": sum(result["seconds"] for result in results),
        "recipe": recipe, "seeds": args.seeds, "arms": numbers})
    kl, good_kl, strong_kl, ve = results[:len(ARMS)]
    draw([kl, ve], "With a weak KL term the flow's error leaves the data.  With VE the "
         "branches have collapsed to centre lines, and the flow's error adds little.",
         args.out / "toy2d_figure1.png")
    draw([good_kl, strong_kl, ve], "Stronger KL terms collapse the branches as VE does, "
         "or further.", args.out / "toy2d_figure2.png")
    draw_mechanism(numbers, args.out / "toy2d_figure3.png")
    print(f"\n{time.time() - begin:.0f} s.  See {args.out} and {path}.")
    return numbers


if __name__ == "__main__":
    main()
