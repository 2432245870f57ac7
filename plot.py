"""Draw the curves of runs from their log.jsonl, beside one another.

    python plot.py runs/tokenizer                                  # every quantity it has logged
    python plot.py runs/ve runs/kl --out ve-kl.png                 # several runs, one line each
    python plot.py runs/ve runs/kl --keys sigma2 held_out.psnr_mean
    python plot.py runs/dit --keys velocity by_t                   # a list is drawn as its last values

It reads what train_tokenizer.py and train_dit.py write, also while they run.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402

import runtime  # noqa: E402
from runtime import InputError  # noqa: E402

# ------------------------------------------------------------------------------------------------------------
# Reading.  A log is its header, then one object per logged step; "held_out" holds an object of its own.

Curves = dict[str, tuple[list[int], list[Any]]]   # key -> steps, values (numbers, or lists of numbers)


def flatten(line: dict[str, Any]) -> dict[str, Any]:
    """Nested objects become dotted keys: {"held_out": {"psnr_mean": 24}} -> {"held_out.psnr_mean": 24}."""
    flat = {}
    for key, value in line.items():
        inner = flatten(value).items() if isinstance(value, dict) else [("", value)]
        flat |= {f"{key}.{k}".rstrip("."): v for k, v in inner}
    return flat


def read_curves(run: Path) -> Curves:
    """Every logged quantity of a run, `run` being its folder or its log.jsonl.

    Errors: InputError, one line, where there is no log or nothing has been logged.
    """
    path = run / "log.jsonl" if run.is_dir() else run
    if not path.is_file():
        raise InputError(f"{path} is not there: give folders of train_tokenizer.py or train_dit.py")
    curves: Curves = {}
    for text in path.read_text().splitlines():
        try:
            line = flatten(json.loads(text))
        except json.JSONDecodeError:   # the half line of a process that is writing, or was killed
            continue
        step = line.pop("step", None)
        for key, value in line.items() if step is not None else ():
            if isinstance(value, int | float | list):
                steps, values = curves.setdefault(key, ([], []))
                steps.append(step)
                values.append(value)
    if not curves:
        raise InputError(f"{path} has no logged steps yet")
    return curves


# ------------------------------------------------------------------------------------------------------------
# Drawing: one panel per quantity, one line per run.  What spans decades and is positive gets a log axis.


def choose_keys(runs: dict[str, Curves], wanted: list[str] | None) -> list[str]:
    """The wanted keys, or all numbers that any run has logged.  Errors: InputError for a key no run has."""
    present = {key: value for curves in runs.values() for key, value in curves.items()}
    for key in wanted or ():
        if key not in present:
            raise InputError(f"--keys {key} is in none of these logs; they have {', '.join(present)}")
    return wanted or [key for key, (_, values) in present.items() if not isinstance(values[0], list)]


def draw_panel(axis: plt.Axes, key: str, runs: dict[str, Curves]) -> None:
    numbers: list[float] = []
    for i, (name, curves) in enumerate(runs.items()):
        if key in curves:
            steps, values = curves[key]
            if isinstance(values[-1], list):   # such as the loss by t, or the spread by channel
                steps, values = list(range(len(values[-1]))), values[-1]
            axis.plot(steps, values, f"C{i}", label=name, lw=1.2, marker="." if len(steps) < 12 else None)
            numbers += [v for v in values if v is not None]
    if min(numbers) > 0 and max(numbers) > 20 * min(numbers):
        axis.set_yscale("log")
    axis.set_title(key, fontsize=9)
    axis.tick_params(labelsize=7)
    axis.grid(alpha=0.3)


def draw(runs: dict[str, Curves], keys: list[str], path: Path) -> None:
    """The figure, written to `path` (its ending says the format)."""
    columns = min(4, len(keys))
    rows = -(-len(keys) // columns)
    figure, axes = plt.subplots(rows, columns, figsize=(3.4 * columns, 2.5 * rows), squeeze=False,
                                layout="constrained")
    for axis, key in zip(axes.flat, keys):
        draw_panel(axis, key, runs)
    for axis in axes.flat[len(keys):]:
        axis.axis("off")
    lines = {name: line for axis in axes.flat for line, name in zip(*axis.get_legend_handles_labels())}
    figure.legend(lines.values(), lines.keys(), loc="outside lower center", ncols=4, fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        figure.savefig(path, dpi=110)
    except ValueError as error:   # an ending that matplotlib does not know
        raise InputError(f"--out {path}: {error}") from None
    finally:
        plt.close(figure)


@runtime.command
def main(argv: list[str] | None = None) -> None:
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0],
                                formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    p.add_argument("runs", nargs="+", type=Path, help="folders of runs, or their log.jsonl")
    p.add_argument("--keys", nargs="+", help="what to draw, as named in the log; default: every number")
    p.add_argument("--out", type=Path, default=Path("runs/curves.png"), help="the figure")
    args = p.parse_args(argv)
    names = [run.parent.name if run.name == "log.jsonl" else run.name for run in args.runs]
    if len(set(names)) < len(names):   # the same name in two places
        names = [str(run) for run in args.runs]
    runs = {name: read_curves(run) for name, run in zip(names, args.runs)}
    draw(runs, choose_keys(runs, args.keys), args.out)
    print(f"wrote {args.out}")


if __name__ == "__main__":
    main()
