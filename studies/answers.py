"""The answers of studies/experiments.py: a table and a figure for each question.

They are drawn from the JSON files of the arms alone, and hold what was not run
as well as what was.  `python -m studies.experiments --draw` calls this.
"""

import math
import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import runtime  # before torch, which it tells how threads wait

import torch
from torch import Tensor

from runtime import InputError
from studies.plot import plt
from studies.records import is_number

# ------------------------------------------------------------------------------
# The questions, with the columns of their tables.  The figure of a question sets
# the column x against the distance of the samples, fd.

USUAL = "sigma2 relative_noise psnr rfd flow_loss fd kd"
COLUMNS = {
    "sigma2": "sigma²", "relative_noise": "noise / spread", "spread": "spread",
    "psnr": "PSNR [dB]", "psnr_0.2": "PSNR, noise 0.2",
    "psnr_0.5": "PSNR, noise 0.5", "rfd": "reconstruction FD",
    "flow_loss": "flow loss", "fd": "generation FD", "kd": "generation KD",
    "equilibrium_slope": "slope, T of the loss",
    "equilibrium_ratio": "sigma⁴ T / lambda1", "trace_slope": "slope, T of Eq. 7",
    "sampler_error": "sampler's error / spread", "sampler_over_sigma": "error / sigma",
    "sampler_outside": "share outside sigma", "sampler_psnr": "PSNR of that error [dB]",
}


@dataclass(frozen=True)
class Question:
    title: str
    columns: str
    x: str = "relative_noise"


QUESTIONS = {
    1: Question("Table 2: does VE beat the best KL weight?", USUAL, "sigma2"),
    2: Question("The missing baseline: noise of a fixed sigma", USUAL),
    3: Question("Sensitivity to lambda1, lambda2, tau and delta", f"spread {USUAL}", "psnr"),
    4: Question("Forms of the variance term", f"spread {USUAL}", "sigma2"),
    5: Question("Equilibrium: sigma against T, Eq. 14 (slope -1/4, ratio 1)",
                "sigma2 equilibrium_slope equilibrium_ratio trace_slope"),
    6: Question("The sampler's error, and what the decoder bears",
                "relative_noise sampler_error sampler_over_sigma sampler_outside "
                "sampler_psnr psnr psnr_0.2 psnr_0.5 rfd flow_loss fd", "rfd"),
    7: Question("The trade: reconstruction given up, generation gained",
                "psnr rfd fd kd", "psnr"),
    8: Question("Muon against AdamW for the transformer", "flow_loss fd kd", "flow_loss"),
}


# ------------------------------------------------------------------------------
# The files of the arms.  What they hold is checked here, once.


def is_run(run: dict[str, Any]) -> bool:
    """Whether this is what studies/experiments.py says of an arm."""
    texts = [run["arm"], run["features"], run["hardware"], run["date"],
             run["settings"]["scores"], run["versions"]["torch"]]
    numbers, curves = run["numbers"], run["curves"]
    pairs = [[curve["log_t"], curve["log_sigma"]] for curve in curves.values()]
    return (
        all(isinstance(text, str) for text in texts)
        and all(v is None or is_number(v) for v in numbers.values())
        and isinstance(run["seed"], int) and is_number(numbers["fd"])
        and (not curves or curves.keys() == {"bins", "points"} and numbers["lambda1"] > 0)
        and all(len(t) == len(sigma) and all(map(is_number, t + sigma))
                for t, sigma in pairs))


def read_runs(results: Path) -> list[dict[str, Any]]:
    paths = sorted((results / "arms").glob("*.json"))
    if not paths:
        raise InputError(f"{results}/arms holds no results: run some arms")
    runs = [runtime.read_json(path) for path in paths]
    for path, run in zip(paths, runs):
        try:
            good = is_run(run)
        except (KeyError, TypeError, AttributeError):   # missing, or of another type
            good = False
        if not good:
            raise InputError(f"{path} is not the file of an arm: remove it")
    return runs


# ------------------------------------------------------------------------------
# A row of a table is one setting, over the seeds with which it was run.


@dataclass
class Row:
    name: str
    family: str
    runs: list[dict[str, Any]]

    def values(self, column: str) -> list[float]:
        found = [run["numbers"].get(column) for run in self.runs]
        return [value for value in found if value is not None]

    def mean(self, column: str) -> float:
        return statistics.mean(self.values(column))

    def deviation(self, column: str) -> float:
        values = self.values(column)
        return statistics.stdev(values) if len(values) > 1 else 0.0

    def cell(self, column: str) -> str:
        count = len(self.values(column))
        spread = f" ± {self.deviation(column):.2g}" if count > 1 else ""
        return f"{self.mean(column):.4g}{spread}" if count else ""


def against(row: Row, other: Row) -> str:
    """FD over that of another row, seed by seed, so that what is common cancels."""
    mine, theirs = ({run["seed"]: run["numbers"]["fd"] for run in r.runs}
                    for r in (row, other))
    shares = [100 * (mine[seed] / theirs[seed] - 1) for seed in mine if seed in theirs]
    if row is other or not shares:
        return ""
    spread = f" ± {statistics.stdev(shares):.1f}" if len(shares) > 1 else ""
    seeds = "1 seed" if len(shares) == 1 else f"{len(shares)} seeds"
    return f", {statistics.mean(shares):+.1f}{spread} % against {other.name}, {seeds}"


def best_of_families(rows: list[Row]) -> list[str]:
    """By FD, on the seeds that are shown.

    A family such as "KL AdamW" is compared with "KL", and others with the first.
    """
    best: dict[str, Row] = {}
    for row in rows:
        known = best.get(row.family)
        if row.runs and (not known or row.mean("fd") < known.mean("fd")):
            best[row.family] = row
    lines = []
    for family, row in best.items():
        usual = best.get(family.split()[0], row)
        other = next(iter(best.values())) if usual is row else usual
        lines.append(f"* best of {family}: {row.name}, FD {row.cell('fd')} "
                     f"(n = {len(row.runs)}){against(row, other)}")
    return lines


def explained(runs: list[dict[str, Any]]) -> list[str]:
    """What generation FD goes with, over all runs but question 8's own."""
    keys = "fd", "rfd", "flow_loss", "psnr", "psnr_0.5"
    runs = [[run["numbers"].get(key) for key in keys] for run in runs
            if not {"AdamW", "Muon"} & set(run["arm"].split())]
    runs = [numbers for numbers in runs if None not in numbers]
    if len(runs) < 5:
        return []
    fd, rfd, flow_loss, psnr, noisy = torch.tensor(runs, dtype=torch.float64).T
    alone, t = regress(fd, rfd)
    lines = [f"* Over {len(runs)} runs the reconstruction's FD explains "
             f"{100 * alone:.0f} % of the variance of the generation's FD (t = {t:.1f})."]
    for name, x in (("the flow loss", flow_loss),
                    ("the PSNR that noise of half the spread costs", psnr - noisy)):
        r2, t = regress(fd, rfd, x)
        lines.append(f"* With it, {name} explains "
                     f"{100 * (r2 - alone):.0f} % more (t = {t:.1f}).")
    return lines


def regress(y: Tensor, *xs: Tensor) -> tuple[float, float]:
    """Least squares of y [N] on xs [N] and 1: R^2, and t of the last slope."""
    A = torch.stack([torch.ones_like(y), *xs], 1)
    inverse = torch.linalg.pinv(A.T @ A)
    slopes = inverse @ A.T @ y
    rest = (y - A @ slopes).square().sum()
    error = (rest / (len(A) - A.shape[1]) * inverse[-1, -1]).sqrt()
    r2 = 1 - rest / (y - y.mean()).square().sum()
    return r2.item(), (slopes[-1] / error).item()


# ------------------------------------------------------------------------------
# Tables and figures, from the files of the arms alone.


def write_table(number: int, rows: list[Row], notes: list[str], path: Path) -> None:
    question, ran = QUESTIONS[number], [row for row in rows if row.runs]
    shown = [c for c in question.columns.split() if any(row.cell(c) for row in ran)]
    heads = " | ".join(COLUMNS[column] for column in shown)
    lines = [f"# {number}. {question.title}", "", f"| arm | seeds | {heads} |",
             "|---|---|" + "---|" * len(shown)]
    for row in ran:
        cells = " | ".join(row.cell(column) for column in shown)
        lines.append(f"| {row.name} | {len(row.runs)} | {cells} |")
    left_out = ", ".join(row.name for row in rows if not row.runs)
    lines += ["", f"Not run: {left_out}."] if left_out else []
    lines += ["", *notes] if notes else []
    runs = [run for row in rows for run in row.runs]
    facts = [{run["settings"]["scores"] for run in runs},
             {run["features"] for run in runs},
             {f"{run['hardware']}, {run['date']}, PyTorch {run['versions']['torch']}"
              for run in runs}]
    if len(facts[0]) > 1:
        lines += ["", "**Arms of different sizes or editions: not comparable.**"]
    lines += ["", "± is the standard deviation over seeds.  The flow loss is the mean "
              "of the last third of training.", *("; ".join(sorted(f)) for f in facts)]
    with runtime.atomic(path) as temporary:
        temporary.write_text("\n".join(lines) + "\n")


def draw_points(axis: Any, rows: list[Row], question: Question) -> None:
    """A mark for each name with bars of one deviation, and a line for a family."""
    x, y = question.x, "fd"
    ran = [row for row in rows if row.values(x) and row.values(y)]
    for family in dict.fromkeys(row.family for row in ran):
        mine = sorted((row for row in ran if row.family == family),
                      key=lambda row: row.mean(x))
        axis.errorbar(*([row.mean(c) for row in mine] for c in (x, y)),
                      *([row.deviation(c) for row in mine] for c in (y, x)),
                      fmt="o-", ms=5, lw=1.2, capsize=2, label=family)
        for row in mine:
            axis.annotate(row.name.removeprefix(family).strip(), (row.mean(x), row.mean(y)),
                          xytext=(4, 4), textcoords="offset points", fontsize=7)
    wide = [row.mean(x) for row in ran]
    if wide and min(wide) > 0 and max(wide) > 20 * min(wide):
        axis.set_xscale("log")
    axis.set(xlabel=COLUMNS[x], ylabel=COLUMNS[y])


def draw_equilibrium(axis: Any, rows: list[Row]) -> None:
    for i, row in enumerate(rows):
        for run in row.runs:
            if not run["curves"]:
                continue
            colour, (bins, points) = f"C{i}", (run["curves"][k] for k in ("bins", "points"))
            log_lambda = math.log10(run["numbers"]["lambda1"])
            axis.plot(points["log_t"], points["log_sigma"], ".", ms=2, alpha=0.35, color=colour)
            axis.plot(bins["log_t"], bins["log_sigma"], "o-", ms=4, color=colour, label=row.name)
            axis.plot(bins["log_t"], [(log_lambda - t) / 4 for t in bins["log_t"]], "--",
                      color=colour, label=f"{row.name}: (lambda1 / T)^(1/4)")
    axis.set(xlabel="log10 T (lines: of the loss, binned; dots: of Eq. 7)",
             ylabel="log10 sigma")


def draw(results: Path, arms: list[Any]) -> None:
    """All tables and figures.  `arms` are those that have been declared."""
    runs = read_runs(results)
    runtime.lock(results)
    for number, question in QUESTIONS.items():
        names = {arm.name: arm.family for arm in arms if number in arm.questions}
        rows = [Row(name, family, [run for run in runs if run["arm"] == name])
                for name, family in names.items()]
        notes = [] if number in (3, 5) else best_of_families(rows)
        write_table(number, rows, explained(runs) if number == 6 else notes,
                    results / f"question{number}.md")
        figure, axis = plt.subplots(figsize=(7.5, 5), layout="constrained")
        draw_equilibrium(axis, rows) if number == 5 else draw_points(axis, rows, question)
        if axis.get_legend_handles_labels()[0]:
            axis.legend(fontsize=8)
        axis.set_title(f"{number}. {question.title}", fontsize=10)
        axis.grid(alpha=0.3)
        with runtime.atomic(results / f"question{number}.png") as temporary:
            figure.savefig(temporary, dpi=110)
        plt.close(figure)
    print(f"wrote {len(QUESTIONS)} tables and figures of {len(runs)} runs to {results}")


