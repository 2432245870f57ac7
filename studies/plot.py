"""Draw the logs of runs side by side, also while the runs go on.

    python -m studies.plot runs/tokenizer
    python -m studies.plot runs/ve runs/kl --out ve-kl.png
    python -m studies.plot runs/ve runs/kl --keys sigma2 held_out.psnr_mean
    python -m studies.plot runs/dit --keys velocity by_t

Each quantity has a panel, and each run a line in it.  Without --keys every
number of the logs is drawn.
"""

from pathlib import Path
from typing import Any

import runtime  # before torch, which it tells how threads wait

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from runtime import InputError
from studies.records import is_number, read_log

# ------------------------------------------------------------------------------
# A log is a header, then one JSON object for every logged step.  An object may
# hold another one, such as the scores of held-out images.

Curves = dict[str, tuple[list[float], list[Any]]]  # name -> steps, values


def flatten(line: dict[str, Any]) -> dict[str, Any]:
    """{"held_out": {"psnr": 24}} becomes {"held_out.psnr": 24}."""
    flat = {}
    for key, value in line.items():
        inner = value.items() if isinstance(value, dict) else ()
        flat |= {f"{key}.{name}": entry for name, entry in inner} or {key: value}
    return flat


def read_curves(run: Path) -> Curves:
    """All numbers, and all lists of numbers, that a run has logged."""
    curves: Curves = {}
    for line in read_log(run):
        step = line.pop("step")
        line.pop("changed", None)  # settings, with which the run has gone on
        for key, value in flatten(line).items():
            entries = value if isinstance(value, list) else [value]
            steps, values = curves.get(key, ([], []))
            alike = not values or isinstance(values[0], list) == isinstance(value, list)
            if alike and any(map(is_number, entries)):
                entries = [v if is_number(v) else None for v in entries]
                steps.append(step)
                values.append(entries if isinstance(value, list) else value)
                curves[key] = steps, values
    return curves


def choose_keys(runs: dict[str, Curves], wanted: list[str] | None) -> list[str]:
    """The wanted names, or those of all numbers that any run has logged."""
    present = {k: v for curves in runs.values() for k, v in curves.items()}
    for key in wanted or ():
        if key not in present:
            known = ", ".join(present)
            raise InputError(f"--keys {key} is in no log; they have {known}")
    numbers = [
        key for key, (_, values) in present.items()
        if not isinstance(values[0], list)
    ]
    if not present:
        raise InputError("the logs hold no numbers: name the folders of trainings")
    return wanted or numbers or list(present)


# ------------------------------------------------------------------------------
# Drawing.  What is positive and spans decades gets a logarithmic axis.


def draw_panel(axis: plt.Axes, key: str, runs: dict[str, Curves]) -> None:
    """A list, such as the loss by t, is drawn as it was at the last step."""
    numbers: list[float] = []
    for i, (name, curves) in enumerate(runs.items()):
        if key not in curves:
            continue
        steps, values = curves[key]
        if isinstance(values[-1], list):
            steps, values = list(range(len(values[-1]))), values[-1]
        marker = "." if len(steps) < 12 else None
        axis.plot(steps, values, f"C{i}", label=name, lw=1.2, marker=marker)
        numbers += [v for v in values if v is not None]
    if min(numbers) > 0 and max(numbers) > 20 * min(numbers):
        axis.set_yscale("log")
    axis.set_title(key, fontsize=9)
    axis.tick_params(labelsize=7)
    axis.grid(alpha=0.3)


def draw(runs: dict[str, Curves], keys: list[str], path: Path) -> None:
    """Write the figure.  The ending of `path` says its format."""
    columns = min(4, len(keys))
    rows = -(-len(keys) // columns)
    figure, axes = plt.subplots(
        rows, columns, figsize=(3.4 * columns, 2.5 * rows), squeeze=False,
        layout="constrained",
    )
    for axis, key in zip(axes.flat, keys):
        draw_panel(axis, key, runs)
    for axis in axes.flat[len(keys):]:
        axis.axis("off")
    legend = {}
    for axis in axes.flat:
        lines, names = axis.get_legend_handles_labels()
        legend |= dict(zip(names, lines))
    figure.legend(
        legend.values(), legend.keys(), loc="outside lower center", ncols=4,
        fontsize=8,
    )
    try:
        runtime.save_figure(figure, path, dpi=110)
    except ValueError as error:  # an ending that matplotlib does not know
        reason = " ".join(str(error).split())
        raise InputError(f"--out {path}: {reason}") from None


@runtime.command
def main(argv: list[str] | None = None) -> None:
    p = runtime.Parser(__doc__)
    p.add_argument("runs", nargs="+", type=Path, help="folders of trainings")
    p.add_argument("--keys", nargs="+", help="names in the log; default: all")
    p.add_argument(
        "--out", type=Path, default=Path("runs/curves.png"), help="figure"
    )
    args = p.parse(argv)
    names = [str(run.parent if run.name == "log.jsonl" else run) for run in args.runs]
    short = [Path(name).name for name in names]
    if len(set(short)) == len(short):
        names = short
    runs = {name: read_curves(run) for name, run in zip(names, args.runs)}
    draw(runs, choose_keys(runs, args.keys), args.out)
    print(f"wrote {args.out}")


if __name__ == "__main__":
    main()
