"""Which properties of latents predict generation, at the size of a small machine?

    laptop   python -m studies.diffusability_study --list     # the arms
             python -m studies.diffusability_study --data cifar10_subset
             python -m studies.diffusability_study --draw     # tables and figures
             python -m studies.diffusability_study --smoke

An arm is a tokenizer, a transformer that learns its latents for 20 epochs, samples,
scores, and the page of diffusability.py.  All arms have the same networks, seed
and number of steps, and differ in what acts on the latent.  A finished arm is one
JSON file in RESULTS/arms.  The tables and figures are drawn from these files alone:
how each property correlates with the distance of the samples from images, with
and without the reconstruction held fixed, and what pairs of properties explain.
The same command goes on where an earlier one was stopped.
"""

import functools
import itertools
import math
import shlex
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import runtime  # before torch, which it tells how threads wait

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

import frozen
import latents
from runtime import InputError
from studies import experiments, records
from studies.plot import plt
from studies.records import Arm, collect, execute, is_number, result_path, run_stages, slug

# ------------------------------------------------------------------------------
# The arms.  20 epochs of 20,000 images are 3,125 steps of 128.  A regulariser has its
# published strength, and acts once beside KL and once beside VE.  The transformer sees
# 2 x 2 positions of the latent at a time, which costs a quarter.

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
    ("LCR", "kl ve", f"{BESIDE} --regularizer lcr"),
    ("LMR", "kl ve", f"{BESIDE} --regularizer lmr"),
    ("MAE", "kl ve", f"{BESIDE} --regularizer mae"),
    ("REPA", "kl ve", f"{BESIDE} --regularizer repa --teacher {TEACHER}"),
]


def table_of_arms() -> list[Arm]:
    return [Arm(family, value, f"{NETWORK} {flags.format(value)}")
            for family, values, flags in DECLARED for value in values.split()]


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
    runtime.write_json(result_path(results, plan.arm),
                       collect(plan) | {"page": runtime.read_json(plan.page)})


# ------------------------------------------------------------------------------
# Statistics of few arms.  A family of arms is not independent, so that intervals
# are bootstrapped twice: over arms, and over whole families.


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


@dataclass
class Arms:
    """The arms that have been run, and for each property its values, [n]."""
    names: list[str]
    families: list[str]
    fd: Tensor
    rfd: Tensor
    properties: dict[str, Tensor]
    lacking: list[str]   # properties that some arm has not, or that never vary


def read_arms(results: Path) -> Arms:
    """Every finished arm.  A property that any of them lacks is left out."""
    runs = [(path, runtime.read_json(path)) for path in sorted(results.glob("arms/*.json"))]
    rows = []
    for path, run in runs:
        try:
            values = {name: row["value"] for name, row in run["page"]["properties"].items()}
            fd, rfd = run["numbers"]["fd"], run["numbers"]["rfd"]
            rows.append((run["arm"], run["family"], fd, rfd, values))
            fine = is_number(fd) and is_number(rfd)
        except (KeyError, TypeError, AttributeError):
            fine = False
        if not fine:
            raise InputError(f"{path} is damaged or not of this study: remove it")
    if len(rows) < 4:
        raise InputError(f"{results} has {len(rows)} finished arms, and correlations need 4")
    names, families, distances, reconstructions, found = map(list, zip(*rows))
    common = [name for name in found[0] if all(is_number(v.get(name)) for v in found)]
    table = {name: torch.tensor([float(v[name]) for v in found]) for name in common}
    table = {name: column for name, column in table.items() if column.std() > 0}
    lacking = [name for name in found[0] if name not in table]
    return Arms(names, families, torch.tensor(distances), torch.tensor(reconstructions), table,
                lacking)


def meaning(name: str) -> tuple[str, str]:
    """The perspective of a property, and the direction that should be better."""
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

        found.append({
            "property": name, "perspective": perspective, "r": r,
            "interval": interval(correlation, arms.names),
            "by families": interval(correlation, arms.families),
            "spearman": spearman(x, arms.fd), "given rFD": partial(x, arms.fd, arms.rfd),
            # A smaller distance is better, so that a property of which less is
            # better should rise with it.
            "as expected": "" if not better else
                "yes" if (r > 0) == (better == "lower") else "no"})
    return sorted(found, key=lambda row: -abs(row["r"]))


def advantage(arms: Arms, one: str, other: str) -> tuple[float, list[float]]:
    """By how much |r| of one property exceeds that of another, and its interval."""
    def difference(rows: Tensor) -> float:
        a, b = (abs(pearson(arms.properties[name][rows], arms.fd[rows])) for name in (one, other))
        return a - b
    return difference(torch.arange(len(arms.names))), interval(difference, arms.names)


CLAIMS = [
    ("VIV predicts best: r = 0.87", "VIV"),
    ("semantic separability is among the best three", "LNC, 10 neighbours"),
    ("spatial structure is among the best three", "SRSS"),
    ("without masks, by LDS", "LDS"),
    ("spectral energy predicts less well", "SEC 0.25"),
    ("iFID is less stable", "iFD, 10 of train"),
    ("uniformity is weak", "density CV"),
    ("equivariance is the weakest", "rotation error"),
    ("paths are straighter where generation is better", "straightness"),
    ("ours: VIV counted where the decoder sees it", "VIV seen"),
]


def write_tables(arms: Arms, rows: list[dict[str, Any]], results: Path) -> None:
    def span(pair: list[float]) -> str:
        return "[{:.2f}, {:.2f}]".format(*pair)

    n = len(arms.names)
    lines = [f"# What predicts the distance of samples, over {n} tokenizers", "",
             f"Families: {', '.join(dict.fromkeys(arms.families))}.  r is Pearson's, with the 95 %"
             " interval of a bootstrap over tokenizers, and of one over families.", "",
             "n/a for some tokenizer, or the same for all: "
             f"{', '.join(arms.lacking) or 'none'}.", "",
             "| property | perspective | r | 95 % | by families | Spearman | r given rFD |"
             " as expected |", "|" + "---|" * 8]
    for row in rows:
        lines.append(
            f"| {row['property']} | {row['perspective']} | {row['r']:.2f} |"
            f" {span(row['interval'])} | {span(row['by families'])} | {row['spearman']:.2f} |"
            f" {row['given rFD']:.2f} | {row['as expected']} |")
    lines += ["", "## The paper's claims", "", "| claim | property | r here | 95 % | rank |",
              "|---|---|---|---|---|"]
    order = {row["property"]: (k + 1, row) for k, row in enumerate(rows)}
    for claim, name in CLAIMS:
        found = "was not measured | | "
        if name in order:
            rank, row = order[name]
            found = f"{row['r']:.2f} | {span(row['interval'])} | {rank} of {len(rows)}"
        lines.append(f"| {claim} | {name} | {found} |")
    if {"VIV", "VIV seen"} <= arms.properties.keys():
        value, pair = advantage(arms, "VIV seen", "VIV")
        lines += ["", f"|r| of VIV seen exceeds that of VIV by {value:.2f}, 95 % {span(pair)}."]
    lines += ["", "## Two properties together", "",
              "R² of a linear fit, and where each family is predicted from the others.", "",
              "| properties | R² | family left out |", "|---|---|---|"]
    for (a, b), (inside, outside) in pairs(arms, rows)[:12]:
        lines.append(f"| {a}, {b} | {inside:.2f} | {outside:.2f} |")
    lines += ["", "## The tokenizers", "", "| tokenizer | FD | rFD | VIV | VIV seen |",
              "|---|---|---|---|---|"]
    blank = torch.full((n,), math.nan)
    columns = [arms.properties.get(name, blank) for name in ("VIV", "VIV seen")]
    for k in arms.fd.argsort().tolist():
        lines.append(f"| {arms.names[k]} | {arms.fd[k]:.1f} | {arms.rfd[k]:.1f} | "
                     + " | ".join(f"{column[k]:.4g}" for column in columns) + " |")
    with runtime.atomic(results / "correlations.md") as temporary:
        temporary.write_text("\n".join(lines) + "\n")


def pairs(arms: Arms, rows: list[dict[str, Any]]) -> list[tuple[tuple[str, str], Any]]:
    """Pairs of the best property of each perspective, the best fit first.

    The paper's own pair, SRSS and LNC, is among them where both were measured.
    """
    best = list({row["perspective"]: row["property"] for row in reversed(rows)}.values())
    chosen = {*itertools.combinations(sorted(best), 2)}
    own = ("LNC, 10 neighbours", "SRSS")
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
        save(figure, results / f"{slug(perspective)}.png")
    found = pairs(arms, rows)
    if found:
        (a, b), (inside, _) = found[0]
        figure, axis = plt.subplots(figsize=(6, 5), layout="constrained")
        x, y = arms.properties[a], arms.properties[b]
        axis.scatter(x, y, s=600 * arms.fd / arms.fd.max(), c=colours, alpha=0.6)
        for name, u, v in zip(arms.names, x.tolist(), y.tolist()):
            axis.annotate(name, (u, v), fontsize=7)
        axis.set(xlabel=a, ylabel=b, title=f"size: FD of samples; R² = {inside:.2f}")
        save(figure, results / "pair.png")
    return len(by) + bool(found)


def save(figure: Any, path: Path) -> None:
    with runtime.atomic(path) as temporary:
        figure.savefig(temporary, dpi=110)
    plt.close(figure)


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
    add("--only", nargs="+", metavar="NAME", help="arms by name")
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
    args = p.parse(argv, smoke=dict(data="shapes", only=["VE 1e-3"], out=smoke,
                                    results=smoke / "results"))
    if args.draw:
        return draw(args.results)
    recipe = RECIPE | (SMOKE if args.smoke else {})
    recipe["count"] = args.count or recipe["count"]
    for key in ("tokenizer_steps", "dit_steps"):
        recipe[key] = max(1, round(args.scale * recipe[key]))
    known = {arm.name: arm for arm in table_of_arms()}
    for name in args.only or ():
        if name not in known:
            raise InputError(f"--only {name}: no arm has that name; see --list")
    plans = [Plan(arm, recipe, args.data, args.out, args.device)
             for name, arm in known.items() if not args.only or name in args.only]
    if args.list:
        for plan in plans:
            print(f"{plan.arm.name:24} {'done' if records.is_done(plan, args.results) else ''}")
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
