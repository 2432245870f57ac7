"""When does variance expansion win?  The toy, from a poor flow to the exact one.

    python -m studies.toy_law           # resumable: three seeds, half an hour of a core
    python -m studies.toy_law --draw --json results/toy_law.json   # only draw again
    python -m studies.toy_law --smoke   # every line of it, in seconds

Let e be the error of the flow's network, in the units of the latent.  The law in
question says that the share of invalid samples grows with e, for a weak KL term
from a floor near zero, and that with VE it is flat, from a higher floor, until e
exceeds sigma.  Then the two would cross where e is about sigma, and all tokenizers
would lie on one curve of e / sigma.  RESULTS.md says what came of it: there is such a
curve, if sigma gives way to the error that the decoder tolerates.

An arm is a tokenizer.  One flow learns its latents, and is looked at on the way, from
1/16 to twice the training of toy2d.py, and up to eight times in two arms.  From twice
on its error is also scaled down, until the exact flow is left.  A finished arm is one
file under --out.
"""

import copy
import math
import statistics
from collections import namedtuple
from dataclasses import replace
from pathlib import Path

import runtime  # before torch: it sets how threads wait
import numpy as np
import torch
from matplotlib import pyplot as plt
from scipy import stats
from torch import Tensor

import flow
import losses
import toy2d
from runtime import InputError
from studies.toy_sweep import SweepArm, SweepModel
from toy2d import Arm

# ------------------------------------------------------------------------------
# The arms and the sizes.  The tokenizers are those of toy2d.py.  The flow has no
# cool-down, so that it can be looked at on its way.  Its averaged weights, which
# are those of about the last tenth of the training at any time, stand in for one.

KL, GOOD_KL, _, VE = toy2d.ARMS
TOKENIZERS = (
    KL, VE, replace(VE, name="VE 1e-3", weight=1e-3), GOOD_KL,
    replace(VE, name="VE 1e-4", weight=1e-4),
    SweepArm("fixed sigma 0.15", "fixed sigma", 0.015, sigma=0.15))
# The first seed also has more weights, and two of its arms have longer trainings and
# flows of other widths.
ONCE = (Arm("KL 1e-5", "kl", 1e-5), replace(VE, name="VE 3e-3", weight=3e-3),
        replace(VE, name="VE 3e-2", weight=3e-2))
CLOSER = (KL.name, 11), (VE.name, 11)

RECIPE = toy2d.PRESETS["small"] | dict(
    ema=0.9999, trainings=[2.0 ** k for k in range(-4, 2)], longer=[4.0, 8.0],
    other_widths=[16, 128], other_trainings=[0.0625, 0.25, 1.0],
    kept=[0.5, 0.25, 0.125],   # shares of the error that is left after `trainings`
    exact=2_000, samples=10_000)
SMOKE = dict(width=8, tokenizer_steps=20, flow_steps=16, points=200, exact=50,
             samples=100, other_widths=[4, 12])

# ------------------------------------------------------------------------------
# One tokenizer.  The flow's units are the spread of the latents.


# Of n held-out points: x [n, 2], the posteriors mean and std [n, 2], z drawn from
# them, and noise for the flows.  exact: where the exact flow carries its beginning.
Truth = namedtuple("Truth", "x mean std z noise exact")


@torch.no_grad()
def truth_of(model: toy2d.Model, stream: str, points: int, exact: int) -> Truth:
    x, eps, noise, _ = next(toy2d.batches(model.arm.seed, stream, points, 1, toy2d.CPU))
    mean, logvar = losses.split_moments(model.encoder(x))
    mean = (mean - model.centre) / model.spread
    std = (logvar / 2).exp() / model.spread
    carried = carry(lambda *at: toy2d.exact_velocity(*at, mean, std), noise[:exact])
    return Truth(x, mean, std, mean + std * eps, noise, carried)


def carry(velocity: flow.Velocity, noise: Tensor) -> Tensor:
    return flow.euler(velocity, noise, toy2d.STEPS)


def scaled(model: toy2d.Model, truth: Truth, kept: float) -> flow.Velocity:
    """A flow between the exact one (kept = 0) and the learned one (kept = 1)."""
    def velocity(z_t: Tensor, t: float) -> Tensor:
        exact = toy2d.exact_velocity(z_t, t, truth.mean, truth.std)
        return exact + kept * (model.velocity(z_t, t) - exact)
    return velocity


def invalid(x: Tensor) -> float:
    """In percent."""
    return 100 * (~toy2d.is_valid(x)).double().mean().item()


def distance_in_sigmas(z: Tensor, truth: Truth) -> float:
    """The median distance of z [N, 2] to the nearest posterior, in its sigmas.

    With weights that cancel the constant of Eq. 21, its logarithm is -d^2 / 2.
    """
    std = truth.std.double()
    posteriors = toy2d.Mixture(2 * math.pi * std.prod(1), truth.mean.double(),
                               std.square().diag_embed())
    nearest = [part.amax(1) for part in toy2d.log_terms(posteriors, z.double())]
    return (-2 * torch.cat(nearest)).clamp(min=0).sqrt().median().item()


@torch.no_grad()
def tolerance(model: toy2d.Model, truth: Truth, few: int = 5_000) -> float:
    """The normal error along each axis that adds 5 points to the invalid share.

    It is a property of the decoder alone: the error is added to real latents.
    """
    z, sizes = truth.z[:few], np.logspace(-4, 0, 33)
    noise = torch.randn(z.shape, generator=runtime.generator(model.arm.seed, "tolerance"))
    lost = [invalid(model.decode(z + float(size) * noise)) for size in sizes]
    rising = np.maximum.accumulate(lost)
    return math.exp(np.interp(invalid(model.decode(z)) + 5, rising, np.log(sizes)))


@torch.no_grad()
def measure(model: toy2d.Model, truth: Truth, learned: Tensor) -> dict:
    """What the samples of a flow are worth.  learned: [n, 2], from the first noises.

    e         of the flow against the exact one, see toy2d.flow_error
    distance  of its samples to the nearest posterior, in sigmas
    invalid   share of its decoded samples, in percent
    injected  the same of real latents, to which the flow's errors were added.  They
              are errors from other places, so that nothing but their size counts.
    """
    few = len(truth.exact)
    errors = learned[:few] - truth.exact
    spoilt = truth.z + errors.repeat(len(truth.z) // few, 1)
    return {"e": toy2d.flow_error(learned[:few], truth.exact),
            "distance": distance_in_sigmas(learned[:few], truth),
            "invalid": invalid(model.decode(learned)),
            "injected": invalid(model.decode(spoilt))}


def train_and_look(model: toy2d.Model, width: int, recipe: dict, trainings: list[float]) -> list:
    """Copies of one flow's averaged network, after each of these multiples of its steps."""
    model.flow = model.mlp("flow", 3, *7 * [width], 2)
    steps = [max(1, round(recipe["flow_steps"] * share)) for share in trainings]
    ema, copies = runtime.Ema(model.flow, recipe["ema"]), {}

    def look() -> None:
        ema.update()
        if ema.updates in steps:
            copies[ema.updates] = copy.deepcopy(ema.model)

    recipe = recipe | dict(flow_steps=steps[-1], cooldown=0.0)
    toy2d.descend(model, "flow", model.flow, model.flow_loss, recipe, look)
    return [copies[step] for step in steps]


def study(arm: Arm, recipe: dict, device: torch.device) -> dict:
    """All rows of a tokenizer, from its poorest flow to the exact one."""
    model = SweepModel(arm, recipe["width"])
    toy2d.train_tokenizer(model, recipe)
    truth = truth_of(model, "evaluate", recipe["points"], recipe["exact"])
    again = truth_of(model, "again", recipe["points"], 0)
    rows, flows = [], []

    def add(group: str, width: int, training: float, kept: float, learned: Tensor) -> None:
        row = {"group": group, "width": width, "training": training, "kept": kept}
        rows.append(row | measure(model, truth, learned))

    def train_and_add(group: str, width: int, trainings: list[float]) -> None:
        for training, network in zip(
                trainings, train_and_look(model, width, recipe, trainings)):
            model.flow = network
            flows.append(network)
            noise = truth.noise[:recipe["samples"]]
            longer = training > recipe["trainings"][-1]
            add("longer" if longer else group, width, training, 1.0,
                carry(model.velocity, noise))

    closer, common = (arm.name, arm.seed) in CLOSER, recipe["trainings"]
    train_and_add("level", recipe["width"], common + recipe["longer"] * closer)
    model.flow = flows[len(common) - 1]
    for kept in recipe["kept"]:
        learned = carry(scaled(model, truth, kept), truth.noise[:recipe["exact"]])
        add("level", recipe["width"], common[-1], kept, learned)
    add("level", recipe["width"], common[-1], 0.0, truth.exact)
    for width in recipe["other_widths"] * closer:
        train_and_add("width", width, recipe["other_trainings"])
    with torch.no_grad():
        rebuilt = model.decode(truth.mean)
        other = carry(lambda *at: toy2d.exact_velocity(*at, again.mean, again.std),
                      truth.noise[:recipe["exact"]])
        return {"model": model.state_dict(), "flows": [f.state_dict() for f in flows], "rows": rows,
                "sigma": truth.std.mean().item(), "spread": model.spread.mean().item(),
                "floor": invalid(model.decode(truth.z)), "floor of means": invalid(rebuilt),
                "tolerance": tolerance(model, truth),
                "error of D(mean)": losses.euclidean_error(rebuilt, truth.x).item(),
                "e of other points": toy2d.flow_error(other, truth.exact)}


# ------------------------------------------------------------------------------
# Judgement.  Intervals are Student's over seeds, and for the scatter a bootstrap's over
# tokenizers.  Tokenizers are compared at equal levels: the same training of the flow,
# or the same share of its error.


def interval(values: list[float]) -> tuple[float, float | None]:
    """The mean, and half the length of its 95 % interval if there are two values."""
    n = len(values)
    half = stats.t.ppf(0.975, n - 1) * statistics.stdev(values) / n ** 0.5 if n > 1 else None
    return statistics.mean(values), half


def levels(arm: dict) -> list[dict]:
    """The rows that all arms have, from the poorest flow to the exact one."""
    return [row for row in arm["rows"] if row["group"] == "level"]


def crossing(kl: list[dict], ve: list[dict]) -> float | None:
    """The error e at which two tokenizers lose equally many samples, seen from e = 0.

    kl, ve: rows of equal levels.  Between two levels all is linear, and e is the mean
    of the two flows' errors.  None if KL is not better at the exact flow, or not worse
    at any level.
    """
    gap = [a["invalid"] - b["invalid"] for a, b in zip(kl, ve)][::-1]
    e = [(a["e"] + b["e"]) / 2 for a, b in zip(kl, ve)][::-1]
    worse = next((k for k, value in enumerate(gap) if value >= 0), 0)
    if worse == 0:
        return None
    share = gap[worse - 1] / (gap[worse - 1] - gap[worse])
    return e[worse - 1] + share * (e[worse] - e[worse - 1])


def increasing(x: list[float], y: list[float]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The best increasing curve through points: x in order, its values there, and y.

    Pool adjacent violators.  Points of one x have one value.
    """
    order = np.lexsort((np.negative(y), x))
    pools: list[tuple] = []   # mean and size
    for k in order:
        pools.append((y[k], 1))
        while len(pools) > 1 and pools[-2][0] >= pools[-1][0]:
            (a, m), (b, n) = pools.pop(), pools.pop()
            pools.append(((a * m + b * n) / (m + n), m + n))
    return np.array(x)[order], np.repeat(*zip(*pools)), np.array(y)[order]


def scatter(x: list[float], y: list[float]) -> float:
    """RMS distance of y from the best increasing curve of x."""
    _, fitted, values = increasing(x, y)
    return float(np.sqrt(np.mean((fitted - values) ** 2)))


ABSCISSAE = {"e": lambda arm, row: row["e"],
             "e / sigma": lambda arm, row: row["e"] / arm["sigma"],
             "e / tolerance": lambda arm, row: row["e"] / arm["tolerance"],
             "distance in sigmas": lambda arm, row: row["distance"]}


def excess(arm: dict, row: dict) -> float:
    """What a flow adds to the invalid share of real latents, in points."""
    return row["invalid"] - arm["floor"]


def points_of(arms: list[dict], abscissa) -> tuple[list[float], list[float]]:
    """Abscissa and excess of all rows that are compared."""
    pairs = [(arm, row) for arm in arms for row in levels(arm)]
    return [abscissa(*pair) for pair in pairs], [excess(*pair) for pair in pairs]


def scatter_of(groups: list[list[dict]], abscissa, draws: int = 200) -> list[float]:
    """The scatter of all arms, and its 95 % interval by a bootstrap over groups of them."""
    def of(some: list[list[dict]]) -> float:
        return scatter(*points_of(sum(some, []), abscissa))

    chooser, n = np.random.default_rng(0), len(groups)
    again = [of([groups[k] for k in chooser.integers(n, size=n)]) for _ in range(draws)]
    return [of(groups), *map(float, np.quantile(again, (0.025, 0.975)))]


def surprise(arm: dict, others: list[dict]) -> float:
    """RMS distance of an arm's excess from the curve of e / tolerance of other arms."""
    x, curve, _ = increasing(*points_of(others, ABSCISSAE["e / tolerance"]))
    mine, added = points_of([arm], ABSCISSAE["e / tolerance"])
    return float(np.sqrt(np.mean((np.interp(mine, x, curve) - added) ** 2)))


def explained(arm: dict) -> float | None:
    """The excess with the errors injected, over the excess with the flows that made them."""
    learned = [row for row in levels(arm) if row["kept"] == 1]
    injected = sum(row["injected"] - arm["floor"] for row in learned)
    total = sum(excess(arm, row) for row in learned)
    return injected / total if total else None


def judge(arms: list[dict]) -> dict:
    """The numbers by which the law stands or falls.

    The innermost lists are over seeds.  Only the scatter has the ends of its interval.

    crossings  e where an arm's curve crosses that of the weak KL term, or None
    gaps       invalid samples of the weak KL term minus those of an arm, at each level
    explained  share of the excess that the injected errors cause
    surprise   of an arm for the curve of e / tolerance that the other arms make, in points
    scatter    of the excess around one increasing curve of an abscissa, in points
    best       the VE arm with the fewest invalid samples at each level: its e, its
               sigma and its lambda1
    """
    by_name: dict = {}
    for arm in arms:
        by_name.setdefault(arm["arm"]["name"], {})[arm["arm"]["seed"]] = arm
    seeds = list(by_name[KL.name])
    found: dict = {"crossings": {}, "gaps": {}, "explained": {}, "surprise": {}, "scatter": {},
                   "best": []}
    for name, mine in by_name.items():
        pairs = [(levels(by_name[KL.name][seed]), levels(mine[seed])) for seed in mine]
        found["crossings"][name] = [crossing(*pair) for pair in pairs]
        found["gaps"][name] = [
            [kl[k]["invalid"] - own[k]["invalid"] for kl, own in pairs]
            for k in range(len(pairs[0][0]))]
        found["explained"][name] = [explained(arm) for arm in mine.values()]
        found["surprise"][name] = [
            surprise(arm, [other for other in arms if other["arm"]["name"] != name])
            for arm in mine.values()]
    for key, abscissa in ABSCISSAE.items():
        found["scatter"][key] = scatter_of([[arm] for arm in arms], abscissa)
        if wide := [[arm] for arm in arms if arm["sigma"] > 0.03]:   # those that have not collapsed
            found["scatter"][f"{key} where sigma > 3 %"] = scatter_of(wide, abscissa)
    for k, row in enumerate(levels(arms[0])):
        best = [min((arm for arm in arms
                     if arm["arm"]["loss"] == "ve" and arm["arm"]["seed"] == seed),
                    key=lambda arm: levels(arm)[k]["invalid"]) for seed in seeds]
        found["best"].append({
            "level": title(row), "e": [levels(arm)[k]["e"] for arm in best],
            "sigma": [arm["sigma"] for arm in best],
            "lambda1": [arm["arm"]["weight"] for arm in best]})
    return found


def shown(values: list[float], digits: int = 1) -> str:
    mean, half = interval(values)
    return f"{mean:.{digits}f}" + (f" ± {half:.{digits}f}" if half is not None else "")


def title(row: dict) -> str:
    if row["kept"] == 0:
        return "exact"
    return f"{row['training']:g} x" if row["kept"] == 1 else f"{row['kept']:g} of its error"


def tables(arms: list[dict]) -> str:
    """Markdown: the share of invalid samples, and below it e, for every level."""
    names = dict.fromkeys(a["arm"]["name"] for a in sorted(arms, key=lambda a: a["sigma"]))
    heads = [title(row) for row in levels(arms[0])]
    lines = []
    for what, scale in (("invalid", 1), ("e", 100)):
        lines += [f"| {what} [%] | sigma [%] | real latents | " + " | ".join(heads) + " |",
                  "|---" * (len(heads) + 3) + "|"]
        for name in names:
            mine = [arm for arm in arms if arm["arm"]["name"] == name]
            cells = [shown([100 * arm["sigma"] for arm in mine]),
                     shown([arm["floor"] for arm in mine])]
            cells += [shown([scale * row[what] for row in rows])
                      for rows in zip(*(levels(arm) for arm in mine))]
            lines.append(f"| {name} | " + " | ".join(cells) + " |")
        lines.append("")
    return "\n".join(lines)


# ------------------------------------------------------------------------------
# The figure.  Its first panel is the law; the next two ask for one curve of all
# tokenizers; the last one shows where lambda1 is best.

COLOURS = {"kl": "Oranges", "ve": "Blues", "fixed sigma": "Greens"}
MARKERS = {"level": ".", "longer": "x", "width": "+"}


def mean_of(arms: list[dict], value) -> float:
    return statistics.mean(map(value, arms))


def draw(arms: list[dict], path: Path) -> None:
    """Lines are means over the seeds.  Single dots are the seeds."""
    figure, ((law, sigmas), (tolerances, weights)) = plt.subplots(
        2, 2, figsize=(14, 10.5), layout="constrained")
    least = 0.6 * min(row["e"] for arm in arms for row in levels(arm) if row["e"] > 0)
    by_name: dict = {}
    for arm in sorted(arms, key=lambda arm: arm["arm"]["weight"]):
        by_name.setdefault(arm["arm"]["name"], []).append(arm)
    by_loss = {loss: [name for name, mine in by_name.items() if mine[0]["arm"]["loss"] == loss]
               for loss in COLOURS}
    for loss, names in by_loss.items():
        for k, name in enumerate(names):
            mine = by_name[name]
            colour = plt.get_cmap(COLOURS[loss])(0.4 + 0.6 * (k + 1) / len(names))
            for group, marker in MARKERS.items():
                lists = [[row for row in arm["rows"] if row["group"] == group] for arm in mine]
                rows = list(zip(*filter(None, lists)))
                e = [max(least, mean_of(level, lambda row: row["e"])) for level in rows]
                lost = [mean_of(level, lambda row: row["invalid"]) for level in rows]
                law.plot(e, lost, marker, ls="-" if group == "level" else "", color=colour,
                         label=name if group == "level" else None)
            for arm in mine:
                added = [excess(arm, row) for row in levels(arm)]
                for ax, key in ((sigmas, "e / sigma"), (tolerances, "e / tolerance")):
                    ax.plot([ABSCISSAE[key](arm, row) for row in levels(arm)], added, ".",
                            color=colour)
    law.set(xlabel="e [spread of the latent]; leftmost: the exact flow",
            ylabel="samples outside of the data [%]",
            title="Crosses: longer trainings.  Pluses: flows of other widths")
    law.legend(frameon=False, fontsize=8)
    for ax, name in ((sigmas, "sigma"), (tolerances, "the decoder's tolerance")):
        ax.axvline(1, color="k", lw=0.6)
        ax.set(xlabel=f"e / {name}", ylabel="share outside, above that of real latents [%]",
               title=f"Is it one curve of e / {name}?")
    ve = [by_name[name] for name in by_loss["ve"]]
    for k, row in enumerate(levels(arms[0])):
        lost = [mean_of(mine, lambda arm: levels(arm)[k]["invalid"]) for mine in ve]
        lambda1, colour = [mine[0]["arm"]["weight"] for mine in ve], plt.get_cmap("viridis")(k / 10)
        e = statistics.mean(mean_of(mine, lambda arm: levels(arm)[k]["e"]) for mine in ve)
        weights.plot(lambda1, lost, ".-", color=colour, label=f"{title(row)}: e {100 * e:.1f} %")
        best = int(np.argmin(lost))
        weights.plot(lambda1[best], lost[best], "o", ms=9, color=colour)
    weights.set(xlabel="lambda1", ylabel="samples outside of the data [%]",
                title="The best lambda1 at each training of the flow")
    weights.legend(frameon=False, fontsize=8)
    for ax in (law, sigmas, tolerances, weights):
        ax.set_xscale("log")
        ax.grid(alpha=0.3)
    runtime.save_figure(figure, path, dpi=72)


# ------------------------------------------------------------------------------
# The command.


def show(arms: list[dict], path: Path) -> dict:
    """Print the tables and the judgement, draw the figure, and return the judgement."""
    try:
        found, sigma = judge(arms), {}
        for arm in arms:
            sigma.setdefault(arm["arm"]["name"], []).append(arm["sigma"])
        print(tables(arms))
        draw(arms, path)
    except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
        raise InputError(f"{path.with_suffix('.json')} is not what this study writes "
                         f"({error!r}): run it without --draw") from None
    for key, values in found["scatter"].items():
        value, low, high = values
        print(f"scatter around one curve of {key}: {value:.2f} ({low:.2f} to {high:.2f}) points")
    for name, values in found["surprise"].items():
        print(f"{name}: {shown(values, 2)} points from the curve of the other arms")
    for name, values in found["crossings"].items():
        if None not in values:
            ratios = [e / s for e, s in zip(values, sigma[name])]
            print(f"{name} crosses {KL.name} at e = {shown([100 * e for e in values], 2)} %, "
                  f"which is {shown(ratios, 2)} of its sigma")
    for level in found["best"]:
        print(f"{level['level']}: best lambda1 {level['lambda1']}")
    return found


@runtime.command
def main(argv: list[str] | None = None) -> dict:
    parser = runtime.Parser(__doc__)
    add = parser.add_argument
    add("--smoke", action="store_true", help="a few steps of everything, in seconds")
    add("--draw", action="store_true", help="only draw what the JSON holds")
    add("--seeds", type=runtime.seed, nargs="+", default=[11, 12, 13], help="of all arms")
    add("--out", type=Path, default=Path("runs/toy_law"), help="folder of finished arms")
    add("--json", type=Path, help="file of the numbers, if not OUT/toy_law.json; the figure "
        "lies beside it")
    args = parser.parse(argv)
    path = args.json or args.out / "toy_law.json"
    if args.draw:
        report = runtime.read_json(path)
        return report | {"law": show(report.get("arms"), path.with_suffix(".png"))}

    runtime.claim(runtime.start("cpu"), args.out, path)
    recipe = RECIPE | (SMOKE if args.smoke else {})
    first, *_ = args.seeds
    arms = [replace(arm, seed=seed) for arm in TOKENIZERS for seed in args.seeds]
    arms += [replace(arm, seed=first) for arm in ONCE]
    results = toy2d.run(arms, recipe, toy2d.CPU, args.out / "arms", study)
    for result in results:   # their weights stay in the arms' files
        del result["model"], result["flows"]
    seeds = " ".join(map(str, args.seeds))
    report = {
        **runtime.provenance(toy2d.CPU), "command": f"python -m studies.toy_law --seeds {seeds}",
        "seeds": args.seeds, "recipe": recipe,
        "training_seconds": sum(result["seconds"] for result in results), "arms": results}
    report["law"] = show(results, path.with_suffix(".png"))
    runtime.write_json(path, report)
    return report


if __name__ == "__main__":
    main()
