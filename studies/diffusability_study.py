"""Which properties of latents predict generation, at the size of a small machine?

    laptop   python -m studies.diffusability_study --list     # the arms
             python -m studies.diffusability_study --data cifar10_subset
             python -m studies.diffusability_study --draw     # tables and figures
             python -m studies.diffusability_study --smoke

An arm is a tokenizer, a transformer that learns its latents for 20 epochs, samples,
scores, and the page of diffusability.py.  All arms have the same networks, seed
and number of steps, and differ in what acts on the latent.  Two are repeated with
another seed, which says how much of a difference is chance.  A finished arm is one
JSON file in RESULTS/arms.  The tables and figures are drawn from these files alone:
how each property correlates with the distance of the samples from images, with
and without what the decoder alone loses held fixed, and what pairs of properties
explain.  The same command goes on where an earlier one was stopped.
"""

import contextlib
import functools
import itertools
import math
import shlex
import statistics
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import runtime  # before torch, which it tells how threads wait

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

import flow
import frozen
import latents
from runtime import InputError
from studies import experiments, records
from studies.plot import plt
from studies.records import Arm, collect, execute, is_number, result_path, run_stages, slug

# ------------------------------------------------------------------------------
# The arms.  20 epochs of 20,000 images are 3,125 steps of 128.  A regulariser has its
# published strength, and acts once beside KL and once beside VE.  The transformer sees
# 2 x 2 positions of the latent at a time, which costs a quarter.  "none 0" is KL 1e-6
# but for its first weights.

RECIPE: dict[str, Any] = experiments.RECIPE | dict(
    tokenizer_steps=2000, network=" --model demo/2", dit_steps=3125, batch=128, count=2000,
    euler=25, decode=1000)
NETWORK = "--batch 32 --precision bf16"   # of a tokenizer's training
SMOKE = experiments.SMOKE | dict(count=24, decode=16)
TEACHER = "studies.diffusability_study:teacher"
KL = "--loss kl --kl-weight 1e-6"
BESIDE = "--loss {} --kl-weight 1e-6 --lambda1 0.001"   # either takes its own weight
DECLARED = [
    ("KL", "1e-6 1e-2 0.1", "--loss kl --kl-weight {}"),
    ("VE", "1e-4 1e-3 1e-2 0.1", "--loss ve --lambda1 {}"),
    ("sigma-VAE", "0.1 0.2 0.4",
     "--loss sigma --sigma-mode fixed --mean-weight 0.06 --sigma {}"),
    ("none", "0", "--loss none"),
    ("alignment", "0.1 0.5", f"{KL} --align-weight {{}} --teacher {TEACHER}"),
    ("EQ", "kl ve", f"{BESIDE} --regularizer eq"),
    ("LCR", "kl", f"{BESIDE} --regularizer lcr"),
    ("LMR", "kl ve", f"{BESIDE} --regularizer lmr"),
    ("MAE", "kl ve", f"{BESIDE} --regularizer mae"),
    ("REPA", "kl ve", f"{BESIDE} --regularizer repa --teacher {TEACHER}"),
]


REPEATED = "KL 1e-6", "VE 1e-3"   # with seed 1


def table_of_arms() -> list[Arm]:
    arms = [Arm(family, value, f"{NETWORK} {flags.format(value)}")
            for family, values, flags in DECLARED for value in values.split()]
    return arms + [replace(arm, seed=1) for arm in arms if arm.name in REPEATED]


@functools.cache
def teacher_network() -> Any:
    path = frozen.weights_of("efficientnet-lite0", "--teacher")
    return frozen.load_network(frozen.efficientnet(128), path)


@torch.no_grad()
def teacher(x: Tensor) -> Tensor:
    """Features of EfficientNet-Lite0 at a sixteenth of its input: x -> [B, 112, h, w].

    The image is enlarged so that h is a quarter of its side, as in the demo's latents.
    """
    net = teacher_network().to(x.device)
    h = F.interpolate(x, scale_factor=4, mode="bicubic", antialias=True)
    h = net._swish(net._bn0(net._conv_stem(h * 127.5 / 128)))
    for block in net._blocks:
        wide = block(h)
        if wide.shape[-1] < x.shape[-1] // 4:   # the first block of the next resolution
            break
        h = wide
    return h


# ------------------------------------------------------------------------------
# Running.  The stages are those of studies/records.py, and then the page.


class Plan(records.Plan):
    def settings(self) -> dict[str, str]:
        found = super().settings()
        return found | {"scores": f"{found['scores']}, {self.recipe['decode']} decoded for a page"}

    def stages(self) -> list[tuple[str, Path]]:
        tokenizer, dit = (self.folder(stage) / "checkpoint.pt" for stage in ("tokenizer", "dit"))
        flags = ["--tokenizer", tokenizer, "--dit", dit, "--out", self.page, "--data", self.data,
                 "--decode", self.recipe["decode"], "--workers", 0, "--device", self.device,
                 *["--smoke"] * self.recipe["smoke"]]
        command = shlex.join(["diffusability.py", *map(str, flags)])
        return super().stages() + [(command, self.page)]

    @property
    def page(self) -> Path:
        return self.folder("scores") / "page.json"


def run_arm(plan: Plan, results: Path, say: Callable[[str], None]) -> None:
    """The stages that are not done, and the arm's file, with its page."""
    run_stages(plan, execute, say)
    path = plan.page.with_name("beside.json")
    if not records.is_filled(path):
        runtime.write_json(path, beside(plan))
    runtime.write_json(result_path(results, plan.arm), collect(plan) | {
        "page": runtime.read_json(plan.page), "beside": runtime.read_json(path)})


@torch.no_grad()
def beside(plan: Plan) -> dict[str, float]:
    """What a page has not.

    floor               FD of real latents, with their noise, decoded, as many as samples:
                        where a perfect transformer would be
    flow loss           the transformer's loss over the end of its training
    VIV seen of samples as the page's VIV seen, but of these latents and not of the means
    """
    tokenizer, dit = (plan.folder(stage) for stage in ("tokenizer", "dit"))
    device = runtime.start(plan.device).device
    bench = experiments.Bench(tokenizer / "checkpoint.pt", dit / "checkpoint.pt",
                              plan.recipe["count"], plan.arm.seed, device)
    z = latents.Standardised(flow.denormalize(bench.z, bench.centre, bench.spread).cpu(), device)
    labels, losses = bench.y.cpu(), [row["velocity"] for row in records.read_log(dit)]
    found = {"floor": bench.score(bench.decode(bench.z), bench.y)["fd"],
             "flow loss": statistics.mean(losses[-10:])}
    with contextlib.suppress(InputError):   # a class has too few images
        classes = [*latents.fit_classes(z, labels)]
        seen = latents.viv_seen(bench.tokenizer.decode, z, labels, classes,
                                lambda *names: runtime.generator(0, "study", *names))
        found["VIV seen of samples"] = seen.mean().item()
    return found


# ------------------------------------------------------------------------------
# Statistics of few arms.  A family of arms is not independent, so that intervals
# are bootstrapped twice: over arms, and over whole families.  Both are too narrow for
# 20 arms: where nothing correlates, one in ten to seven excludes 0.  So a threshold
# stands beside them, which the strongest of all properties passes by chance in 5 %.


def pearson(x: Tensor, y: Tensor) -> float:
    """Correlation of x and y [n]; NaN where either is constant."""
    a, b = x.double() - x.double().mean(), y.double() - y.double().mean()
    return (a @ b / (a.norm() * b.norm())).item()


def ranks(x: Tensor) -> Tensor:
    """Ranks of x [n]; equal values share the mean of theirs."""
    return ((x > x[:, None]).sum(0) + (x >= x[:, None]).sum(0)).double() / 2


def spearman(x: Tensor, y: Tensor) -> float:
    return pearson(ranks(x), ranks(y))


def without(x: Tensor, given: Tensor) -> Tensor:
    """What is left of x [n] after linear regression on `given` [n]."""
    basis = torch.stack([torch.ones_like(given), given], 1).double()
    return x.double() - basis @ torch.linalg.lstsq(basis, x.double()).solution


def partial(x: Tensor, y: Tensor, given: Tensor) -> float:
    """Correlation of x and y with `given` held fixed."""
    return pearson(without(x, given), without(y, given))


def interval(statistic: Callable[[Tensor], float], groups: list[str],
             draws: int = 2000) -> list[float]:
    """95 % of a statistic of rows, over bootstrapped rows; those of a group go together."""
    g = runtime.generator(0, "bootstrap")
    members = [torch.tensor([i for i, name in enumerate(groups) if name == kind])
               for kind in dict.fromkeys(groups)]
    found = []
    for _ in range(draws):
        drawn = torch.randint(len(members), (len(members),), generator=g).tolist()
        found.append(statistic(torch.cat([members[k] for k in drawn])))
    values = torch.tensor([v for v in found if math.isfinite(v)])
    if len(values) < draws / 2:
        return [math.nan, math.nan]
    return values.quantile(torch.tensor([0.025, 0.975])).tolist()


def threshold(columns: list[Tensor], y: Tensor, draws: int = 2000) -> float:
    """The |r| that the best of all columns exceeds in 5 % of the permutations of y."""
    g = runtime.generator(0, "permutation")
    x = torch.stack(columns).double()
    x = x - x.mean(1, keepdim=True)
    shuffled = torch.stack([y[torch.randperm(len(y), generator=g)] for _ in range(draws)]).double()
    shuffled = shuffled - shuffled.mean(1, keepdim=True)
    r = (x / x.norm(dim=1, keepdim=True)) @ (shuffled / shuffled.norm(dim=1, keepdim=True)).T
    return r.abs().amax(0).quantile(0.95).item()


def explained(columns: list[Tensor], y: Tensor, groups: list[str]) -> tuple[float, float]:
    """R^2 of linear regression of y on the columns, and with each group left out.

    The second one predicts the arms of a family from the others, and may be negative.
    """
    x = torch.stack([torch.ones_like(y), *columns], 1).double()
    x[:, 1:] = (x[:, 1:] - x[:, 1:].mean(0)) / x[:, 1:].std(0)
    y = y.double()
    total = (y - y.mean()).square().sum()
    inside = (y - x @ torch.linalg.lstsq(x, y, driver="gelsd").solution).square().sum()
    outside = torch.zeros_like(y)
    for kind in dict.fromkeys(groups):
        out = torch.tensor([name == kind for name in groups])
        fit = torch.linalg.lstsq(x[~out], y[~out], driver="gelsd").solution
        outside[out] = y[out] - x[out] @ fit
    return (1 - inside / total).item(), (1 - outside.square().sum() / total).item()


# ------------------------------------------------------------------------------
# Tables and figures, from the files of the arms.


# A tokenizer that reconstructs badly samples badly, whatever its latent is like.  One
# whose rFD is more than this many times the lowest is left out.
COMPARABLE = 2.0


@dataclass
class Arms:
    """The arms of seed 0 that reconstruct well enough, and the values of properties, [n].

    fd, floor   of the samples, and of real latents, decoded
    left out    the arms whose rFD is more than COMPARABLE times the lowest, with it
    near        the arms whose latent has nearly no noise: KL 1e-6, none, and what is beside it
    lacking     properties that some arm has not, or that never vary
    repeats     the FD and the floor of arms that have been run with two seeds
    made by     sizes, features, versions and dates
    """
    names: list[str]
    families: list[str]
    fd: Tensor
    floor: Tensor
    near: Tensor
    left_out: dict[str, float]
    properties: dict[str, Tensor]
    lacking: list[str]
    repeats: dict[str, list[tuple[float, float]]]
    made_by: list[str]


def read_arms(results: Path) -> Arms:
    """The finished arms.  A property that any of them lacks is left out."""
    rows, repeats, made_by, scores = [], {}, set(), {}
    for path in sorted(results.glob("arms/*.json")):
        run = runtime.read_json(path)
        try:
            values = {name: row["value"] for name, row in run["page"]["properties"].items()}
            values |= {name: run["beside"].get(name) for name in BESIDES}
            if is_number(values["rFD at noise 0.3"]) and is_number(values["rFD"]):
                values["rFD that noise 0.3 adds"] = values["rFD at noise 0.3"] - values["rFD"]
            fd, floor, seed = run["numbers"]["fd"], run["beside"]["floor"], run["seed"]
            trained = run["settings"]["tokenizer"]
            near = "--loss none" in trained or "--loss kl --kl-weight 1e-6" in trained
            made_by.add(f"{run['features']}, {run['hardware']}, {run['date']}, "
                        f"PyTorch {run['versions']['torch']}")
            scores.setdefault(run["settings"]["scores"], path)
            repeats.setdefault(run["arm"], []).append((fd, floor))
            if seed == 0:
                rows.append((run["arm"], run["family"], fd, floor, near, values))
            fine = is_number(fd) and is_number(floor) and is_number(values["rFD"])
        except (KeyError, TypeError, AttributeError):
            fine = False
        if not fine:
            raise InputError(f"{path} is damaged or not of this study: remove it")
    least = min((row[-1]["rFD"] for row in rows), default=0.0)
    left_out = {row[0]: row[-1]["rFD"] for row in rows if row[-1]["rFD"] > COMPARABLE * least}
    rows = [row for row in rows if row[0] not in left_out]
    if len(rows) < 4:
        raise InputError(f"{results} has {len(rows)} finished arms that reconstruct alike, and "
                         "correlations need 4")
    if len(scores) > 1:
        raise InputError("{} and {} are of other sizes: move one of them away".format(
            *scores.values()))
    names, families, distances, floors, near, found = map(list, zip(*rows))
    common = [name for name in found[0] if all(is_number(v.get(name)) for v in found)]
    table = {name: torch.tensor([float(v[name]) for v in found]) for name in common}
    table = {name: column for name, column in table.items() if column.std() > 0}
    lacking = [name for name in found[0] if name not in table]
    return Arms(names, families, torch.tensor(distances), torch.tensor(floors),
                torch.tensor(near), left_out, table, lacking,
                {name: pairs for name, pairs in repeats.items() if len(pairs) > 1},
                [*scores, *sorted(made_by)])


# Properties that are not the page's: their perspective, and the better direction.
BESIDES = {"flow loss": ("paths of the transformer", "lower"),
           "VIV seen of samples": ("decoder", "lower"),
           "rFD that noise 0.3 adds": ("decoder", "lower")}


def meaning(name: str) -> tuple[str, str]:
    """The perspective of a property, and the direction that should be better."""
    if name in BESIDES:
        return BESIDES[name]
    for perspective, rows in latents.PERSPECTIVES.items():
        if name in rows:
            return perspective, rows[name][0]
    return "", ""


def correlations(arms: Arms) -> list[dict[str, Any]]:
    """A row for each property, the strongest first."""
    found: list[dict[str, Any]] = []
    for name, x in arms.properties.items():
        perspective, better = meaning(name)
        r = pearson(x, arms.fd)

        def correlation(rows: Tensor, x: Tensor = x) -> float:
            return pearson(x[rows], arms.fd[rows])

        def controlled(rows: Tensor, x: Tensor = x) -> float:
            return partial(x[rows], arms.fd[rows], arms.floor[rows])

        low, high = interval(correlation, arms.names)
        # A smaller distance is better, so that a property of which less is better
        # should rise with it.
        wanted = "" if not better else "yes" if (r > 0) == (better == "lower") else "no"
        found.append({
            "property": name, "perspective": perspective, "better": better, "r": r,
            "interval": (low, high), "by families": interval(correlation, arms.families),
            "spearman": spearman(x, arms.fd),
            "near": pearson(x[arms.near], arms.fd[arms.near]) if arms.near.sum() > 3 else math.nan,
            "given floor": controlled(torch.arange(len(x))),
            "its interval": interval(controlled, arms.names),
            "as expected": wanted and ("undecided" if low <= 0 <= high else wanted)})
    return sorted(found, key=lambda row: -abs(row["r"]))


def advantage(arms: Arms, one: str, other: str) -> tuple[float, list[float]]:
    """By how much |r| of one property exceeds that of another, and its interval."""
    def difference(rows: Tensor) -> float:
        a, b = (abs(pearson(arms.properties[name][rows], arms.fd[rows])) for name in (one, other))
        return a - b
    return difference(torch.arange(len(arms.names))), interval(difference, arms.names)


# What the paper says of 43 tokenizers with SiT-B, uniform times and other features; and
# the property here that comes nearest.
CLAIMS = [
    ("velocity: VIV has r = 0.87, and is among the best", "VIV"),
    ("semantics: LNC is among the best", "LNC, 10 neighbours"),
    ("spatial structure: SRSS is among the best", "LDS"),
    ("smoothness: SEC predicts less well (better with LightningDiT)", "SEC 0.25"),
    ("continuity: iFID is less stable", "iFD, 10 of train"),
    ("uniformity is weak", "neighbour spacing"),
    ("equivariance is the weakest", "rotation error"),
    ("paths are straighter where generation is better", "straightness"),
]


def write_tables(arms: Arms, rows: list[dict[str, Any]], results: Path) -> None:
    def number(value: float) -> str:
        return f"{value:.2f}" if math.isfinite(value) else ""

    def span(pair: tuple[float, float]) -> str:
        return "[{:.2f}, {:.2f}]".format(*pair)

    n, by_name = len(arms.names), {row["property"]: row for row in rows}
    least = threshold([*arms.properties.values()], arms.fd)
    lines = [f"# What predicts the distance of samples, over {n} tokenizers", "",
             f"Families: {', '.join(dict.fromkeys(arms.families))}.  r is Pearson's, with the 95 %"
             " interval of a bootstrap over tokenizers, and of one over families.  The floor is"
             " the FD of real latents, decoded: r given floor is that of FD with the floor held"
             f" fixed.  r without noise is that of the {int(arms.near.sum())} tokenizers whose"
             " latent has nearly none.", "",
             f"If no property had to do with FD, the largest |r| of these {len(rows)} would exceed"
             f" {least:.2f} in 5 % of the cases.  FD and floor correlate by"
             f" {pearson(arms.fd, arms.floor):.2f}.", "",
             f"Left out, because their rFD is more than {COMPARABLE:g} times the lowest: "
             + (", ".join(f"{name} ({r:.0f})" for name, r in arms.left_out.items()) or "none")
             + ".", "",
             *(f"{name} with {len(pairs)} seeds: FD "
               f"{' and '.join(f'{fd:.1f}' for fd, _ in pairs)}, floor "
               f"{' and '.join(f'{floor:.1f}' for _, floor in pairs)}."
               for name, pairs in arms.repeats.items()), "",
             "n/a for some tokenizer, or the same for all: "
             f"{', '.join(arms.lacking) or 'none'}.", "",
             "| property | perspective | r | 95 % | by families | Spearman | r without noise |"
             " r given floor | 95 % | as expected |", "|" + "---|" * 10]
    for row in rows:
        lines.append(
            f"| {row['property']} | {row['perspective']} | {row['r']:.2f} |"
            f" {span(row['interval'])} | {span(row['by families'])} | {row['spearman']:.2f} |"
            f" {number(row['near'])} | {row['given floor']:.2f} | {span(row['its interval'])} |"
            f" {row['as expected']} |")
    lines += ["", "## The paper's claims", "",
              "| claim | property | r here | 95 % | r given floor | rank of the perspective |"
              " as expected |", "|---|---|---|---|---|---|---|"]
    ranks = {name: k + 1 for k, name in enumerate(best_of(rows))}
    for claim, name in CLAIMS:
        found = "was not measured | | | | "
        if row := by_name.get(name):
            rank = ranks.get(row["perspective"])
            found = (f"{row['r']:.2f} | {span(row['interval'])} | {row['given floor']:.2f} |"
                     f" {f'{rank} of {len(ranks)}' if rank else ''} | {row['as expected']}")
        lines.append(f"| {claim} | {name} | {found} |")
    for one, other in (("VIV seen", "VIV"), ("VIV seen of samples", "VIV of samples")):
        if {one, other} <= arms.properties.keys():
            value, pair = advantage(arms, one, other)
            lines += ["", f"|r| of {one} less |r| of {other}: {value:.2f}, 95 % {span(pair)}."]
    alone, outside = explained([arms.floor], arms.fd, arms.families)
    lines += ["", "## Two properties together", "",
              "R² of a linear fit, and where each family is predicted from the others.  The pairs"
              " were chosen on the same tokenizers.", "",
              "| properties | R² | family left out |", "|---|---|---|",
              f"| the floor alone | {alone:.2f} | {outside:.2f} |"]
    for (a, b), (inside, outside) in pairs(arms, rows)[:12]:
        lines.append(f"| {a}, {b} | {inside:.2f} | {outside:.2f} |")
    lines += ["", "## The tokenizers", "",
              "| tokenizer | FD | floor | FD - floor | flow loss | VIV | of samples | VIV seen |"
              " of samples |", "|" + "---|" * 9]
    blank = torch.full((n,), math.nan)
    columns = [arms.properties.get(name, blank) for name in (
        "flow loss", "VIV", "VIV of samples", "VIV seen", "VIV seen of samples")]
    for k in arms.fd.argsort().tolist():
        fd, floor = arms.fd[k], arms.floor[k]
        lines.append(f"| {arms.names[k]} | {fd:.1f} | {floor:.1f} | {fd - floor:.1f} | "
                     + " | ".join(f"{column[k]:.4g}" for column in columns) + " |")
    with runtime.atomic(results / "correlations.md") as temporary:
        temporary.write_text("\n".join([*lines, "", *arms.made_by, ""]))


def best_of(rows: list[dict[str, Any]]) -> dict[str, str]:
    """The property of each perspective that correlates most, the best perspective first.

    Only what is known before a transformer is trained, and has a better direction.  FD
    and PSNR of reconstructions are no property of the latent.
    """
    fit = [row for row in rows if row["better"] and row["property"] not in ("rFD", "PSNR")
           and row["perspective"] != "paths of the transformer"]
    best: dict[str, str] = {}
    for row in fit:   # from the strongest on
        best.setdefault(row["perspective"], row["property"])
    return best


def pairs(arms: Arms, rows: list[dict[str, Any]]) -> list[tuple[tuple[str, str], Any]]:
    """Pairs of the best property of each perspective, the best fit first.

    The paper's own pair is LNC and SRSS.  Without masks LDS takes the place of SRSS.
    """
    chosen = {*itertools.combinations(sorted(best_of(rows).values()), 2)}
    own = "LNC, 10 neighbours", "SRSS" if "SRSS" in arms.properties else "LDS"
    if all(name in arms.properties for name in own):
        chosen.add(own)
    fits = {pair: explained([arms.properties[name] for name in pair], arms.fd, arms.families)
            for pair in sorted(chosen)}
    return sorted(fits.items(), key=lambda item: -item[1][0])


def draw_figures(arms: Arms, rows: list[dict[str, Any]], results: Path) -> int:
    """One figure for each perspective, and one of the best pair."""
    kinds = list(dict.fromkeys(arms.families))
    colours = [f"C{kinds.index(family)}" for family in arms.families]
    by = {name: [row for row in rows if row["perspective"] == name]
          for name in latents.PERSPECTIVES}
    by = {name: some for name, some in by.items() if some}
    for perspective, some in by.items():
        columns = min(4, len(some))
        lines = -(-len(some) // columns)
        figure, axes = plt.subplots(lines, columns, figsize=(3.2 * columns, 2.8 * lines),
                                    squeeze=False, layout="constrained")
        for axis, row in zip(axes.flat, some):
            x = arms.properties[row["property"]]
            axis.scatter(x, arms.fd, c=colours, s=22)
            slope = row["r"] * arms.fd.std() / x.std()
            ends = torch.stack([x.min(), x.max()])
            axis.plot(ends, arms.fd.mean() + slope * (ends - x.mean()), "k-", lw=0.8)
            axis.set_title(f"{row['property']}: r = {row['r']:.2f}", fontsize=9)
            axis.tick_params(labelsize=7)
        for axis in axes.flat[len(some):]:
            axis.axis("off")
        marks = [plt.Line2D([], [], marker="o", ls="", color=f"C{k}") for k in range(len(kinds))]
        figure.legend(marks, kinds, loc="outside lower center", ncols=len(kinds), fontsize=8)
        figure.supylabel("FD of samples", fontsize=9)
        runtime.save_figure(figure, results / f"{slug(perspective)}.png", dpi=110)
    found = pairs(arms, rows)
    if found:
        (a, b), (inside, _) = found[0]
        figure, axis = plt.subplots(figsize=(6, 5), layout="constrained")
        x, y = arms.properties[a], arms.properties[b]
        size = (arms.fd - arms.fd.min()) / (arms.fd.max() - arms.fd.min())
        axis.scatter(x, y, s=30 + 570 * size, c=colours, alpha=0.6)
        for name, u, v in zip(arms.names, x.tolist(), y.tolist()):
            axis.annotate(name, (u, v), fontsize=7)
        axis.set(xlabel=a, ylabel=b, title=f"size: FD of samples; R² = {inside:.2f}")
        runtime.save_figure(figure, results / "pair.png", dpi=110)
    return len(by) + bool(found)


def draw(results: Path) -> None:
    arms = read_arms(results)
    runtime.lock(results)
    rows = correlations(arms)
    write_tables(arms, rows, results)
    count = draw_figures(arms, rows, results)
    print(f"wrote correlations.md and {count} figures of {len(arms.names)} arms to {results}")


# ------------------------------------------------------------------------------


@runtime.command
def main(argv: list[str] | None = None) -> None:
    p = runtime.Parser(__doc__)
    add, count = p.add_argument, runtime.positive_int
    add("--list", action="store_true", help="print the arms, run nothing")
    add("--draw", action="store_true", help="redraw tables and figures, run nothing")
    add("--only", nargs="+", metavar="NAME", help="arms by name, with or without a seed")
    add("--data", default="cifar10_subset", help="a folder, cifar10 or shapes")
    add("--scale", type=runtime.positive, default=1.0,
        help="factor on the steps of both trainings")
    add("--count", type=count, help="images that are sampled and reconstructed")
    add("--device", default="auto", help="auto, cpu, cuda or mps")
    add("--out", type=Path, default=Path("runs/diffusability"), help="folder of the runs")
    add("--results", type=Path, default=Path("results/diffusability"),
        help="folder of JSON files, tables and figures")
    add("--smoke", action="store_true", help="one tiny arm of shapes")
    smoke = Path("runs/smoke/diffusability-study")
    args = p.parse(argv, smoke=dict(data="shapes", only=["VE 1e-3 seed 0"], out=smoke,
                                    results=smoke / "results"))
    if args.draw:
        return draw(args.results)
    recipe = RECIPE | (SMOKE if args.smoke else {})
    recipe["count"] = args.count or recipe["count"]
    for key in ("tokenizer_steps", "dit_steps"):
        recipe[key] = max(1, round(args.scale * recipe[key]))
    arms = table_of_arms()
    if unknown := {*(args.only or ())} - {name for arm in arms for name in (arm.name, arm.key)}:
        raise InputError(f"--only {min(unknown)}: no arm has that name; see --list")
    plans = [Plan(arm, recipe, args.data, args.out, args.device) for arm in arms
             if not args.only or {arm.name, arm.key} & {*args.only}]
    if args.list:
        for plan in plans:
            print(f"{plan.arm.key:24} {'done' if records.is_done(plan, args.results) else ''}")
        return
    if args.data not in ("shapes", "cifar10") and not Path(args.data).is_dir():
        raise InputError(f"--data {args.data} is not a folder: see RESULTS.md")
    rt = runtime.start(args.device)
    runtime.claim(rt, args.out)
    runtime.claim(rt, args.results)
    bar = tqdm([plan for plan in plans if not records.is_done(plan, args.results)], "arms")
    for plan in bar:
        run_arm(plan, args.results, bar.write)
    if len([*args.results.glob("arms/*.json")]) >= 4:
        draw(args.results)


if __name__ == "__main__":
    main()
