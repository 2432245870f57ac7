"""What every weight of the toy does, and how VE works: its Figures 4 and 5.

    python -m studies.toy_sweep            # 16 arms, seven minutes on two cores
    python -m studies.toy_sweep --smoke    # every line of it, in seconds

The arms of toy2d.py at the same seed are read from --out, if they are there.
The sweep varies one setting at a time around them, with one seed.  Over the five
seeds of toy2d.py the share of invalid samples deviates by 0.5 points for VE, and by
2.5 for KL at 1e-3.
"""

import functools
import math
from dataclasses import dataclass, replace
from pathlib import Path

import runtime  # before torch: it sets how threads wait
import torch
from matplotlib import pyplot as plt
from torch import Tensor, nn

import losses
import toy2d
from toy2d import Arm

# ------------------------------------------------------------------------------
# The settings.  tau is not among them: it is a factor on lambda2 (see Eq. 10 in
# losses.py).


@dataclass(frozen=True)
class SweepArm(Arm):
    """An arm with one of the losses below, or with a flow on the mean."""
    sigma: float = 0.0           # of "fixed sigma"
    flow_on_mean: bool = False


KL, GOOD_KL, STRONG_KL, VE = toy2d.ARMS


def sweep(seed: int) -> list[Arm]:
    """All arms, those of the toy first."""
    arms = list(toy2d.ARMS)
    arms += [Arm(f"KL {w:g}", "kl", w) for w in (1e-5, 1e-4, 1e-2, 1.0)]
    arms += [replace(VE, name=f"VE lambda1={w:g}", weight=w) for w in (1e-3, 1e-1)]
    arms += [replace(VE, name=f"VE lambda2={w:g}", lambda2=w) for w in (0.0, 1e-2)]
    arms += [SweepArm("negative variance 1e-3", "negative variance", 1e-3, 1e-6),
             SweepArm("log-entropy 1e-2", "log-entropy", 1e-2, 1e-6),
             SweepArm("fixed sigma 0.15", "fixed sigma", 0.015, sigma=0.15),
             SweepArm("VE, flow on the mean", "ve", VE.weight, VE.lambda2,
                      flow_on_mean=True)]
    return [replace(arm, seed=seed) for arm in arms]


class FixedSigma(nn.Module):
    """Put a constant in the place of the variance that an encoder emits."""

    def __init__(self, sigma: float) -> None:
        super().__init__()
        self.logvar = 2 * math.log(sigma)

    def forward(self, moments: Tensor) -> Tensor:
        mean = moments[:, :2]
        return torch.cat([mean, torch.full_like(mean, self.logvar)], 1)


class SweepModel(toy2d.Model):
    def __init__(self, arm: Arm, width: int) -> None:
        super().__init__(arm, width)
        if arm.loss == "fixed sigma":
            self.encoder.append(FixedSigma(arm.sigma))

    def tokenizer_loss(self, x: Tensor, eps: Tensor, *_) -> Tensor:
        """Analyze 2 (i) and (ii) in the place of Eq. 9, or a sigma-VAE.

        The sigma-VAE is Eq. 1 with a fixed sigma.  Its weight of 0.015 on the
        squared mean is that of a KL term of weight 0.03.
        """
        arm = self.arm
        if arm.loss in ("kl", "ve"):
            return super().tokenizer_loss(x, eps)
        mean, logvar = losses.split_moments(self.encoder(x))
        z = losses.reparameterize(mean, logvar, eps)
        rec = losses.euclidean_error(self.decoder(z), x)
        if arm.loss == "fixed sigma":
            return rec + arm.weight * losses.square_magnitude(mean)
        if arm.loss == "negative variance":
            expansion = losses.negative_variance(logvar)
        else:
            expansion = losses.log_entropy(logvar)
        return (rec + arm.weight * expansion
                + arm.lambda2 * losses.exponential_magnitude(z))

    def latent(self, x: Tensor, eps: Tensor) -> Tensor:
        on_mean = getattr(self.arm, "flow_on_mean", False)
        return super().latent(x, torch.zeros_like(eps) if on_mean else eps)


# ------------------------------------------------------------------------------
# Figure 4 asks whether sigma follows the decoder's sensitivity T.  Eq. 14 is for a
# squared error.  The toy's error is an unsquared norm (Eq. 26), and where the
# noise dominates it, it grows as c sigma sqrt(T).  Against 2 lambda1 / sigma^2,
# the inverse variance of two dimensions, the balance is then
#
#     c sqrt(T) = 4 lambda1 / sigma^3,
#
# so that log sigma falls with log T at a slope of -1/6 instead of -1/4.


def sensitivity(decoder: nn.Module, z: Tensor) -> Tensor:
    """T(z) = tr(J J^T) of Eq. 7, J being the decoder's Jacobian.  [N, 2] -> [N]."""
    jacobian = torch.func.vmap(torch.func.jacrev(decoder))(z)
    return jacobian.square().sum((1, 2))


def equilibrium(t: Tensor, lambda1: float, squared: bool) -> Tensor:
    """The sigma that both dimensions share where the two forces balance.

    squared: sigma^4 = 2 lambda1 / T, which is Eq. 14 for half of T in each of two
    dimensions.  Otherwise c = E|J eps| / sqrt(T) is sqrt(pi) / 2 for a J that is
    isotropic.
    """
    if squared:
        return (2 * lambda1 / t) ** (1 / 4)
    c = math.sqrt(math.pi) / 2
    return (4 * lambda1 / (c * t.sqrt())) ** (1 / 3)


def decoder_of(result: dict) -> nn.Module:
    """The decoder of an arm from its file."""
    width = result["model"]["decoder.0.bias"].shape[0]
    model = toy2d.Model(Arm(**result["arm"]), width)
    model.load_state_dict(result["model"])
    return model.decoder.requires_grad_(False)


def mechanism(ve: dict, n: int = 4000) -> dict:
    """T at n means, the sigma there, and the line through their logarithms.

    sigma is the geometric mean of the two dimensions.
    """
    mean, std = ve["points"]["mean"][:n], ve["points"]["std"][:n]
    t, sigma = sensitivity(decoder_of(ve), mean), std.log().mean(1).exp()
    (tt, ts), (_, ss) = torch.cov(torch.stack([t.log(), sigma.log()])).tolist()
    return {"mean": mean, "t": t, "sigma": sigma, "slope": ts / tt,
            "correlation": ts / math.sqrt(tt * ss)}


def figure4(found: dict, lambda1: float) -> plt.Figure:
    """T and sigma over the latent plane, and one against the other."""
    figure, axes = plt.subplots(1, 3, figsize=(15, 4.6), layout="constrained")
    figure.suptitle("VE: sigma is small where the decoder is sensitive")
    for ax, key, name, cmap in ((axes[0], "t", "sensitivity T", "viridis"),
                                (axes[1], "sigma", "sigma", "cividis")):
        values = found[key].log10()
        low, high = values.quantile(torch.tensor([0.02, 0.98])).tolist()
        dots = ax.scatter(*found["mean"].T, s=3, c=values, cmap=cmap,
                          vmin=low, vmax=high, linewidths=0)
        bar = figure.colorbar(dots, ax=ax, label=f"$\\log_{{10}}$ of {name}")
        bar.locator = plt.MaxNLocator(5)
        ax.set(title=f"{name} at the means", xlabel="$z_1$", ylabel="$z_2$",
               box_aspect=1)
    ax, log_t, log_sigma = axes[2], found["t"].log10(), found["sigma"].log10()
    ax.plot(log_t, log_sigma, ".", ms=2, color="#A0A0A0")
    ends = log_t.quantile(torch.tensor([0.01, 0.99]))
    low, high = ends.tolist()
    for squared, colour, style, label in (
            (False, "#D55E00", "-", "unsquared norm: slope -1/6"),
            (True, "#0072B2", "--", "squared error, Eq. 14: -1/4")):
        predicted = equilibrium(10 ** ends, lambda1, squared).log10()
        ax.plot(ends, predicted, style, color=colour, lw=2.5, label=label)
    ax.legend(frameon=False)
    ax.set(title=f"slope {found['slope']:.3f}, correlation "
           f"{found['correlation']:.2f}", xlabel="$\\log_{10}$ T",
           ylabel="$\\log_{10}$ sigma", box_aspect=1,
           xlim=(low - 0.3, high + 0.3))
    return figure


# ------------------------------------------------------------------------------
# Figure 5: the decoder's answer to a perturbation of the latent, which is what an
# error of the flow amounts to.

STYLES = (("#D55E00", "-"), ("#E69F00", "-."), ("#009E73", ":"), ("#0072B2", "--"))
RELATIVE = torch.logspace(-3, 0, 19)   # sizes in units of the latent's spread


@torch.no_grad()
def perturbation(result: dict, n: int = 1000) -> dict[str, list[float]]:
    """Of mean + r n with n ~ N(0, I): how far the decoded point moves, E
    |D(mean + r n) - D(mean)|, and how often it is invalid, in percent.
    """
    decoder, mean = decoder_of(result), result["points"]["mean"][:n]
    spread = result["points"]["z"].std(0).mean().item()
    draws = runtime.generator(result["arm"]["seed"], "perturbation")
    noise = spread * torch.randn(mean.shape, generator=draws)
    moved = [decoder(mean + r * noise) for r in RELATIVE.tolist()]
    return {"size": (spread * RELATIVE).tolist(),
            "moved": [losses.euclidean_error(x, decoder(mean)).item() for x in moved],
            "invalid": [100 * (~toy2d.is_valid(x)).float().mean().item()
                        for x in moved]}


def figure5(curves: dict[str, dict[str, list[float]]]) -> plt.Figure:
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.6),
                                         layout="constrained")
    figure.suptitle("What an error in the latent does to the decoded point")
    for (name, curve), (colour, style) in zip(curves.items(), STYLES):
        line = {"color": colour, "ls": style, "lw": 2.5, "label": name}
        left.loglog(curve["size"], curve["moved"], **line)
        right.semilogx(RELATIVE, curve["invalid"], **line)
    left.set(xlabel="perturbation [latent units]", ylabel="decoded displacement")
    right.set(xlabel="perturbation [spread of the latent]",
              ylabel="decoded outside of the data [%]")
    left.legend(frameon=False)
    for ax in (left, right):
        ax.grid(alpha=0.3)
    return figure


# ------------------------------------------------------------------------------
# The command.


def table(results: list[dict]) -> str:
    """Markdown, one row for each arm."""
    keys = list(results[0]["numbers"])
    lines = ["| arm | " + " | ".join(keys) + " |", "|---" * (len(keys) + 1) + "|"]
    for result in results:
        cells = [f"{value:.4g}" for value in result["numbers"].values()]
        lines.append(f"| {result['arm']['name']} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


@runtime.command
def main(argv: list[str] | None = None) -> dict:
    parser = runtime.Parser(__doc__)
    add = parser.add_argument
    add("--smoke", action="store_true", help="a few steps of everything, in seconds")
    add("--seed", type=runtime.seed, default=0, help="of all arms")
    add("--out", type=Path, default=Path("runs/toy2d"), help="folder of arms and figures")
    add("--json", type=Path, help="file of the numbers, if not OUT/toy2d_sweep.json")
    args = parser.parse(argv)
    path = args.json or args.out / "toy2d_sweep.json"
    runtime.claim(runtime.start("cpu"), args.out, path)

    recipe = toy2d.PRESETS["small"] | (toy2d.SMOKE if args.smoke else {})
    measure = functools.partial(toy2d.measure, kind=SweepModel)
    arms = sweep(args.seed)
    results = toy2d.run(arms, recipe, toy2d.CPU, args.out / "arms", measure)
    print(table(results))
    found = mechanism(results[3])
    curves = {r["arm"]["name"]: perturbation(r) for r in results[:4]}
    figures = figure4(found, VE.weight), figure5(curves)
    for number, figure in enumerate(figures, 4):
        runtime.save_figure(figure, args.out / f"toy2d_figure{number}.png", dpi=72)
    report = {
        **runtime.provenance(toy2d.CPU), "command": "python -m studies.toy_sweep",
        "seed": args.seed, "recipe": recipe,
        "training_seconds": sum(result["seconds"] for result in results),
        "arms": {r["arm"]["name"]: r["numbers"] for r in results},
        "figure4": {key: found[key] for key in ("slope", "correlation")},
        "figure5": {"relative": RELATIVE.tolist()} | curves}
    runtime.write_json(path, report)
    print(f"Figures 4 and 5 are in {args.out}, and the numbers in {path}.")
    return report


if __name__ == "__main__":
    main()
