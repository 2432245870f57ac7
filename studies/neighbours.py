"""Does variance expansion help its neighbours, GAE and DGAE?  Three questions in small.

    python -m studies.neighbours                      # train what is missing, then the table
    python -m studies.neighbours --only gae --seeds 0
    python -m studies.neighbours --data cifar10_subset --out runs/neighbours-cifar
    python -m studies.neighbours --redraw             # the table and figure of what is there

1. On GAE's normalised latent: variance that is learned by Eq. 9, against dynamic noise.
2. With DGAE's decoder: is variance cheaper when the decoder is a diffusion model?
3. GAE's noise C, against the reconstruction from a noised latent (its Figure 4).

An arm is a tokenizer with its settings, and a seed.  Each is trained and scored by the
stages themselves, one after the other on one thread.  What is done is not done again,
and a run that was stopped goes on.
"""

import argparse
import json
import shlex
import statistics
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import runtime  # before torch, which it tells how threads wait

import scipy.stats

from runtime import InputError
from studies.records import execute, read_log, read_scores

# ------------------------------------------------------------------------------
# The arms.  Dynamic noise has a sigma^2 of (C / 0.8)^2, and VE stands beside it with
# about that and about twice that.  The sigma^2 of the two one-step decoders lies on
# both sides of DGAE's.  Their lambda1 was chosen once, from runs of other seeds.


@dataclass
class Arm:
    """tokenizer: its flags.  decode_steps: with how many it is scored, if with several."""
    question: str
    tokenizer: str
    generates: bool = False
    decode_steps: tuple[int, ...] = ()


ARMS = {
    "GAE, dynamic noise C = 0.2": Arm("gae", "--preset gae-demo", True),
    "GAE, VE": Arm("gae", "--preset gae-demo --loss ve --lambda2 0 --lambda1 0.0034", True),
    "GAE, VE, wider": Arm(
        "gae", "--preset gae-demo --loss ve --lambda2 0 --lambda1 0.007", True),
    "DGAE, VE": Arm("dgae", "--preset dgae-demo", False, (1, 4, 10, 20, 50)),
    "one step, VE": Arm("dgae", "--preset dgae-demo --model demo --lambda1 0.0006"),
    "one step, VE, wider": Arm("dgae", "--preset dgae-demo --model demo --lambda1 0.005"),
    "GAE, C = 0.05": Arm("noise", "--preset gae-demo --sigma 0.05"),
    "GAE, C = 0.1": Arm("noise", "--preset gae-demo --sigma 0.1"),
    "GAE, C = 0.4": Arm("noise", "--preset gae-demo --sigma 0.4"),
}
PAIRS = [("GAE, VE", "GAE, dynamic noise C = 0.2"), ("GAE, VE, wider", "GAE, C = 0.4"),
         ("DGAE, VE", "one step, VE"), ("DGAE, VE", "one step, VE, wider")]
WAYS = [("PSNR",), ("PSNR under 0.5",), ("recognised",), ("rFD",),
        ("generation", "recognised"), ("generation", "FD")]
# The presets' own steps for tokenizers, in which the rate falls to 0, so that every
# run ends flat; and about half of the demo's for transformers.
TOKENIZER, DIT = "--precision bf16", "--precision bf16 --steps 1500"


def commands(arm: Arm, seed: int, folder: Path, teacher: Path, data: str, count: int,
             generate: bool, smoke: bool, steps: int | None = None) -> dict[Path, str]:
    """What each file is made by, in order.  count: of the images in a score.

    steps: of the tokenizer, if not the preset's.
    """
    seeded = f"--seed {seed} --workers 0"
    first, second, probe = (f"{seeded} --smoke",) * 2 + ("40",) if smoke else (
        f"{seeded} {TOKENIZER}" + (f" --steps {steps}" if steps else ""), f"{seeded} {DIT}", "5000")
    tokenizer, made, teach = folder / "tokenizer/checkpoint.pt", {}, ""
    if arm.question != "dgae":
        shown = f"{seeded} --smoke" if smoke else seeded
        if data != "shapes":   # whose judge knows nothing of photographs
            shown += " --features efficientnet-lite0 --precision bf16"
        made[teacher] = f"train_teacher.py {shown} --data {data} --out {teacher.parent}"
        teach = f"--teacher {teacher}"
    made[tokenizer] = (f"train_tokenizer.py {first} --data {data} {arm.tokenizer} {teach} "
                       f"--out {tokenizer.parent}")
    score = f"evaluate.py --tokenizer {tokenizer} --limit {count} --workers 0 --out {folder}"
    made[folder / "scores/results.json"] = f"{score}/scores --noise 0.2 0.5 --probe {probe}"
    if arm.decode_steps:
        made[folder / "scores/results.json"] += " --decode-steps 10"
    # Of fewer images, because 50 steps of a U-Net take time.
    for euler in arm.decode_steps if data == "shapes" else ():
        made[folder / f"scores-{euler}/results.json"] = (
            f"{score}/scores-{euler} --noise --decode-steps {euler} --limit {count * 2 // 5}")
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
    found = {name: held_out[name] for name in ("sigma2", "spread") if name in held_out}
    if "sigma2" not in found:   # dynamic noise is not learned, and the log has its command only
        first = (folder / "tokenizer/log.jsonl").read_text().split("\n")[0]
        found["sigma2"] = (json.loads(first)["config"]["sigma"] / 0.8) ** 2
    found["noise / spread"] = held_out.get(   # of each channel, where the log has it
        "relative_noise", found["sigma2"] ** 0.5 / found["spread"])
    row = read_scores(folder / "scores/results.json")[0]
    found |= row["metrics"] | {"curve": row["curve"]}
    found["PSNR under 0.5"] = next(p["PSNR"] for p in row["curve"]
                                   if p["noise"] == "absolute" and p["level"] == 0.5)
    found["rFD"] = next(v for k, v in row["metrics"].items() if k.startswith(("rFD-", "rFID")))
    steps = [k for k in arm.decode_steps if (folder / f"scores-{k}/results.json").exists()]
    if steps:
        found["decode_steps"] = {
            k: read_scores(folder / f"scores-{k}/results.json")[0]["metrics"] for k in steps}
    if (folder / "generation/results.json").exists():
        row = read_scores(folder / "generation/results.json")[-1]
        found["generation"] = row["metrics"] | {"FD": next(
            v for k, v in row["metrics"].items()
            if k.startswith(("FD-", "FID")) and "real images" not in k)}
    return found


def spread(values: list[float]) -> str:
    """Mean and sample deviation over seeds; one value has none."""
    mean = f"{statistics.mean(values):.3g}"
    if len(values) == 1:
        return mean
    return f"{mean} ± {float(f'{statistics.stdev(values):.1g}'):g}"   # 12 is 10, and not 1e+01


def table(results: dict[str, dict[str, Any]]) -> str:
    """Markdown, one row for each arm that has results."""
    columns = {"sigma^2": "sigma2", "noise / spread": "noise / spread", "PSNR": "PSNR",
               "PSNR under noise of 0.5": "PSNR under 0.5", "recognised": "recognised",
               "rFD": "rFD", "linear probe": "linear probe, flat"}
    lines = ["| arm | seeds | " + " | ".join(columns) + " | generated: recognised | FD |",
             "|---" * (len(columns) + 4) + "|"]
    for name, seeds in results.items():
        cells = []
        for key in columns.values():
            values = [row[key] for row in seeds.values() if key in row]
            cells.append(spread(values) if values else "")
        for key in ("recognised", "FD"):
            values = [row["generation"][key] for row in seeds.values()
                      if key in row.get("generation", {})]
            cells.append(spread(values) if values else "")
        lines.append(f"| {name} | {len(seeds)} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def value(row: Any, *keys: str) -> Any:
    """The number under these keys, or None."""
    for key in keys:
        row = (row or {}).get(key)
    return row


def difference(results: dict[str, dict[str, Any]], a: str, b: str, *keys: str) -> str:
    """Mean of a - b over the seeds that both have, and its interval of 95 % (Student's t)."""
    pairs = [value(results[a][seed], *keys) - value(results[b][seed], *keys)
             for seed in results[a] if seed in results[b]]
    mean, half = statistics.mean(pairs), float("nan")
    if len(pairs) > 1:
        error = statistics.stdev(pairs) / len(pairs) ** 0.5
        half = error * scipy.stats.t.ppf(0.975, len(pairs) - 1)
    return f"{' '.join(keys)}: {mean:+.3g} ± {half:.2g}"


def differences(results: dict[str, dict[str, Any]]) -> str:
    """What the first two questions ask, a line for each pair of arms."""
    lines = []
    for a, b in PAIRS:
        if results.get(a, {}).keys() & results.get(b, {}).keys():
            found = [difference(results, a, b, *way) for way in WAYS if all(
                value(row, *way) is not None for name in (a, b)
                for row in results[name].values())]
            lines.append(f"{a}, minus {b}: " + "; ".join(found))
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
    runtime.save_figure(figure, path, dpi=130)


# ------------------------------------------------------------------------------


def parse(argv: list[str] | None) -> argparse.Namespace:
    p = runtime.Parser(__doc__)
    add = p.add_argument
    add("--only", nargs="+", choices=["gae", "dgae", "noise"], default=["gae", "dgae", "noise"],
        help="the questions")
    add("--data", default="shapes", help="shapes, cifar10, or a folder of class folders")
    add("--seeds", type=runtime.seed, nargs="+", default=[1, 2, 3], help="one run for each")
    add("--count", type=runtime.positive_int, default=500, help="images in each score")
    add("--steps", type=runtime.positive_int, help="of the tokenizers; else their presets'")
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
                            args.data, args.count, args.generate, args.smoke, args.steps)
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
    print(differences(results))


if __name__ == "__main__":
    main()
