"""Does variance expansion help its neighbours, GAE and DGAE?  Three questions in small.

    python -m studies.neighbours                      # train what is missing, then the table
    python -m studies.neighbours --only gae --seeds 0
    python -m studies.neighbours --redraw             # the table and figure of what is there

1. On GAE's normalised latent: variance that is learned by Eq. 9, against dynamic noise.
2. With DGAE's decoder: is variance cheaper when the decoder is a diffusion model?
3. GAE's noise C, against the reconstruction from a noised latent (its Figure 4).

An arm is a tokenizer with its settings, and a seed.  Each is trained and scored by the
stages themselves, one after the other on one thread, on the built-in shapes.  What is
done is not done again, and a run that was stopped goes on.
"""

import argparse
import shlex
import statistics
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import runtime  # before torch, which it tells how threads wait

from runtime import InputError
from studies.experiments import execute
from studies.records import read_log, read_scores

# ------------------------------------------------------------------------------
# The arms.  lambda1 of each was chosen once, on a seed that is not used here, so that
# the mean of sigma^2 is about that of the noise with which it is compared: (C / 0.8)^2
# for dynamic noise, and for the two decoders that of each other.


@dataclass
class Arm:
    """tokenizer: its flags.  decode_steps: with how many it is scored, if with several."""
    question: str
    tokenizer: str
    generates: bool = False
    decode_steps: tuple[int, ...] = ()


ARMS = {
    "GAE, dynamic noise C = 0.2": Arm("gae", "--preset gae-demo", True),
    "GAE, VE": Arm("gae", "--preset gae-demo --loss ve --lambda2 0 --lambda1 0.003", True),
    "DGAE, VE": Arm("dgae", "--preset dgae-demo", True, (1, 4, 10, 20, 50)),
    "one step, VE": Arm("dgae", "--preset dgae-demo --model demo", True),
    "GAE, C = 0.05": Arm("noise", "--preset gae-demo --sigma 0.05"),
    "GAE, C = 0.1": Arm("noise", "--preset gae-demo --sigma 0.1"),
    "GAE, C = 0.4": Arm("noise", "--preset gae-demo --sigma 0.4"),
}
# About half of the demo's steps.  The rate falls to 0 in them, so that every run ends flat.
TOKENIZER, DIT = "--steps 1000", "--steps 1500"


def commands(arm: Arm, seed: int, folder: Path, teacher: Path, count: int, generate: bool,
             smoke: bool) -> dict[Path, str]:
    """What each file is made by, in order.  count: of the images in a score."""
    seeded = f"--seed {seed} --workers 0"
    first, second, probe = (f"{seeded} --smoke",) * 2 + ("40",) if smoke else (
        f"{seeded} {TOKENIZER}", f"{seeded} {DIT}", "5000")
    tokenizer, made, teach = folder / "tokenizer/checkpoint.pt", {}, ""
    if arm.question != "dgae":
        shown = f"{seeded} --smoke" if smoke else seeded
        made[teacher] = f"train_teacher.py {shown} --out {teacher.parent}"
        teach = f"--teacher {teacher}"
    made[tokenizer] = f"train_tokenizer.py {first} {arm.tokenizer} {teach} --out {tokenizer.parent}"
    score = f"evaluate.py --tokenizer {tokenizer} --limit {count} --workers 0 --out {folder}"
    made[folder / "scores/results.json"] = f"{score}/scores --noise 0.2 0.5 --probe {probe}"
    if arm.decode_steps:
        made[folder / "scores/results.json"] += " --decode-steps 10"
    for steps in arm.decode_steps:   # of fewer images, because 50 steps of a U-Net take time
        made[folder / f"scores-{steps}/results.json"] = (
            f"{score}/scores-{steps} --noise --decode-steps {steps} --limit {count * 2 // 5}")
    if arm.generates and generate:
        dit, samples = folder / "dit/checkpoint.pt", folder / "samples/samples.npz"
        made[dit] = (f"train_dit.py {second} --tokenizer {tokenizer} --out {dit.parent} "
                     f"--cache {folder}/latents")
        made[samples] = f"sample.py --dit {dit} --seed {seed} --out {samples.parent}"
        if smoke:
            made[samples] += " --smoke --count 16"
        made[folder / "generation/results.json"] = (
            f"evaluate.py --samples {samples} --limit {count} --workers 0 --out {folder}/generation")
    return made


# ------------------------------------------------------------------------------
# From the files of an arm to its numbers.


def numbers_of(arm: Arm, folder: Path) -> dict[str, Any]:
    """The scores of an arm; those of other decode steps, and the curve over noise."""
    held_out = next(line["held_out"] for line in reversed(read_log(folder / "tokenizer"))
                    if "held_out" in line)
    found = {name: held_out[name] for name in ("sigma2", "spread", "relative_noise")
             if name in held_out}
    row = read_scores(folder / "scores/results.json")[0]
    found |= row["metrics"] | {"curve": row["curve"]}
    if arm.decode_steps:
        found["decode_steps"] = {
            steps: read_scores(folder / f"scores-{steps}/results.json")[0]["metrics"]
            for steps in arm.decode_steps}
    if (folder / "generation/results.json").exists():
        row = read_scores(folder / "generation/results.json")[-1]
        found["generation"] = row["metrics"]
    return found


def spread(values: list[float]) -> str:
    """Mean and sample deviation over seeds."""
    deviation = statistics.stdev(values) if len(values) > 1 else float("nan")
    return f"{statistics.mean(values):.3g} ± {deviation:.1g}"


def table(results: dict[str, dict[str, Any]]) -> str:
    """Markdown, one row for each arm that has results."""
    columns = {"sigma^2": "sigma2", "PSNR": "PSNR", "recognised": "recognised",
               "rFD": "rFD-Shapes", "linear probe": "linear probe, flat"}
    lines = ["| arm | seeds | " + " | ".join(columns) + " | generated: recognised | FD |",
             "|---" * (len(columns) + 4) + "|"]
    for name, seeds in results.items():
        cells = []
        for key in columns.values():
            values = [row[key] for row in seeds.values() if key in row]
            cells.append(spread(values) if values else "")
        for key in ("recognised", "FD-Shapes"):
            values = [row["generation"][key] for row in seeds.values() if "generation" in row]
            cells.append(spread(values) if values else "")
        lines.append(f"| {name} | {len(seeds)} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def draw(results: dict[str, dict[str, Any]], path: Path) -> None:
    """PSNR against the noise on the latent, and against the steps of DGAE's decoder."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4))
    for name, seeds in results.items():
        curves = [[p for p in row["curve"] if p["noise"] in ("none", "absolute")]
                  for row in seeds.values()]
        levels = [p["level"] for p in curves[0]]
        left.plot(levels, [statistics.mean(p["PSNR"] for p in column)
                           for column in zip(*curves)], "o-", label=name)
        steps = [row["decode_steps"] for row in seeds.values() if "decode_steps" in row]
        if steps:
            counts, other = sorted(steps[0], key=int), right.twinx()
            for metric, ax, style in (("PSNR", right, "C0o-"), ("rFD-Shapes", other, "C1s--")):
                ax.plot([int(k) for k in counts],
                        [statistics.mean(row[k][metric] for row in steps) for k in counts], style)
                ax.set_ylabel(f"{metric} ({'dashed' if '--' in style else 'solid'})")
            right.set(xscale="log", xticks=[int(k) for k in counts], xticklabels=counts)
            right.minorticks_off()
    left.set(xlabel="deviation of the noise on the latent", ylabel="PSNR (dB)")
    right.set(xlabel="Euler steps of DGAE's decoder")
    left.legend(fontsize=7, loc="upper left", bbox_to_anchor=(0, -0.18), ncols=2)
    figure.tight_layout()
    with runtime.atomic(path) as temporary:
        figure.savefig(temporary, dpi=130)
    plt.close(figure)


# ------------------------------------------------------------------------------


def parse(argv: list[str] | None) -> argparse.Namespace:
    p = runtime.Parser(__doc__)
    add = p.add_argument
    add("--only", nargs="+", choices=["gae", "dgae", "noise"], default=["gae", "dgae", "noise"],
        help="the questions")
    add("--seeds", type=runtime.seed, nargs="+", default=[1, 2, 3], help="one run for each")
    add("--count", type=runtime.positive_int, default=500, help="images in each score")
    add("--out", type=Path, default=Path("runs/neighbours"), help="folder of the runs")
    add("--results", type=Path, default=Path("results/neighbours.json"), help="file")
    add("--generate", action="store_true", help="also train transformers, and score samples")
    add("--redraw", action="store_true", help="train nothing")
    add("--smoke", action="store_true", help="a few steps of everything")
    return p.parse(argv, smoke=dict(seeds=[0], count=16, out=Path("runs/smoke/neighbours"),
                                    results=Path("runs/smoke/neighbours/neighbours.json")))


@runtime.command
def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    runtime.claim(runtime.Runtime("cpu"), args.results.parent, args.results)
    chosen = {name: arm for name, arm in ARMS.items() if arm.question in args.only}
    results: dict[str, dict[str, Any]] = {}
    for seed in args.seeds:   # all arms of a seed first: a part of the list is paired
        for name, arm in chosen.items():
            slug = "".join(c if c.isalnum() or c == "." else "-" for c in name)
            folder = args.out / f"{slug}/{seed}"
            made = commands(arm, seed, folder, args.out / f"teacher/{seed}/checkpoint.pt",
                            args.count, args.generate, args.smoke)
            scored = all(path.exists() for path in made if path.suffix == ".json")
            for path, command in made.items():
                if args.redraw or scored or path.exists() and path.suffix == ".json":
                    continue
                print(command, flush=True)
                if said := execute(command):
                    raise InputError(f"{command.split()[0]} has failed: {said}")
            if all(path.exists() for path in made):
                results.setdefault(name, {})[str(seed)] = numbers_of(arm, folder)
            if results:
                runtime.write_json(args.results, {
                    "command": runtime.command_line(), "date": time.strftime("%F"),
                    "versions": runtime.versions(), "arms": {
                        key: shlex.split(ARMS[key].tokenizer) for key in results},
                    "results": results})
    if not results:
        raise InputError(f"{args.out} has no finished arm yet: leave out --redraw")
    draw(results, args.results.with_suffix(".png"))
    print(table(results))


if __name__ == "__main__":
    main()
