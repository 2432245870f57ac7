"""Does it hold?  The paper's claims, asked at the size of a small machine.

    laptop   python -m studies.experiments --list      # the arms
             python -m studies.experiments --only "KL 1e-6" 5
             python -m studies.experiments --draw      # tables and figures
    one GPU  python -m studies.experiments --scale 4 --count 10000 --euler 250

An arm is a tokenizer, a transformer on its latents, samples, and their scores.
Each of these is a stage of this project, in a process of its own.  A finished
arm is one JSON file in RESULTS/arms, and all tables and figures are drawn from
these files alone.  The same command goes on where an earlier one was stopped.
"""

import hashlib
import json
import os
import re
import shlex
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import runtime  # before torch, which it tells how threads wait

from tqdm import tqdm

from runtime import InputError
from studies import answers
from studies.records import read_log, read_scores

# ------------------------------------------------------------------------------
# The size of every arm.  `edition` goes up when the code changes what an arm
# gives: arms of another edition are run again, and not compared with these.

RECIPE: dict[str, Any] = dict(
    edition=2, preset="small", tokenizer_steps=1000, dit_steps=600, batch=32,
    precision="bf16", optimizer="muon", lr="4e-3", euler=50, count=1000,
    measured=32, smoke=False)
SMOKE = dict(tokenizer_steps=4, dit_steps=4, batch=4, precision="fp32", euler=2,
             count=16, measured=4, smoke=True)


@dataclass(frozen=True)
class Arm:
    """Arms of one family differ in one value.  The flags are of training."""
    family: str
    value: str
    questions: tuple[int, ...]
    tokenizer: str
    dit: str = ""
    seed: int = 0

    @property
    def name(self) -> str:
        return f"{self.family} {self.value}"

    @property
    def key(self) -> str:
        return f"{self.name} seed {self.seed}"


# Family, values, questions, flags of the tokenizer, flags of the transformer.
# The demo tokenizer has 6 pixel values for each latent value, and f16d32 has 24.
# So the paper's lambda1 = 0.1 is large here, and LatentLM's 0.01 is 0.06 of sums.
KL, VE = "--loss kl --kl-weight {}", "--loss ve --lambda1 {}"
SIGMA = "--loss sigma --sigma-mode fixed --mean-weight 0.06 --sigma {}"
DECLARED = [
    ("KL", "1e-6", "1678", KL),
    ("VE", "0.1", "12345678", VE),
    ("VE", "0.01 0.001", "1234567", VE),
    ("VE", "0.0001", "12347", VE),
    ("KL", "1e-2", "167", KL),
    ("KL", "1e-4 0.1 0.5 1 2 8", "17", KL),
    ("sigma-VAE", "0.2", "267", SIGMA),
    ("sigma-VAE", "0.1 0.5", "27", SIGMA),
    ("VE", "0.03 0.3", "347", VE),
    ("VE lambda2", "0 1e-8 1e-4", "3", "--loss ve --lambda1 0.1 --lambda2 {}"),
    ("VE tau", "0 2 3", "3", "--loss ve --lambda1 0.1 --tau {}"),
    ("VE delta", "1e-8 1e-4 1e-2", "3", "--loss ve --lambda1 0.1 --delta {}"),
    ("negative variance", "0.003 0.01 0.03", "4",
     "--loss negative-variance --lambda1 {}"),
    ("log-entropy", "0.01 0.03 0.1", "4", "--loss log-entropy --lambda1 {}"),
    ("VE AdamW", "1e-3 2e-3", "8", "--loss ve --lambda1 0.1", "adamw"),
    ("VE Muon", "1e-3", "8", "--loss ve --lambda1 0.1", "muon"),
    ("KL AdamW", "1e-3 2e-3", "8", "--loss kl --kl-weight 1e-6", "adamw"),
    ("KL Muon", "1e-3", "8", "--loss kl --kl-weight 1e-6", "muon"),
]


def table_of_arms(seeds: int = 3) -> list[Arm]:
    """All arms with seed 0; then, for questions 1 and 2, those with others."""
    arms = []
    for family, values, questions, tokenizer, *dit in DECLARED:
        for value in values.split():
            own = f"--optimizer {dit[0]} --lr {value}" if dit else ""
            arms.append(Arm(family, value, tuple(map(int, questions)),
                            tokenizer.format(value), own))
    again = [arm for arm in arms if {1, 2} & set(arm.questions)]
    return arms + [replace(arm, seed=seed)
                   for seed in range(1, seeds) for arm in again]


# ------------------------------------------------------------------------------
# From an arm to commands.  The name of a folder holds a digest of all that
# decides what is in it, so that equal tokenizers are trained once, and changed
# settings lead to another folder.


def digest(value: Any) -> str:
    text = json.dumps(value, sort_keys=True).encode()
    return hashlib.blake2b(text, digest_size=4).hexdigest()


def slug(text: str) -> str:
    return re.sub(r"[^a-z0-9.]+", "-", text.lower()).strip("-")


@dataclass(frozen=True)
class Plan:
    arm: Arm
    recipe: dict[str, Any]
    data: str
    out: Path
    device: str

    def settings(self) -> dict[str, str]:
        """All that decides the numbers.  The data go by the folder's name."""
        r, arm = self.recipe, self.arm
        common = f"--batch {r['batch']} --seed {arm.seed}"
        optimizer = arm.dit or f"--optimizer {r['optimizer']} --lr {r['lr']}"
        return {
            "tokenizer": f"--preset {r['preset']} --data {shlex.quote(Path(self.data).name)} "
                         f"--steps {r['tokenizer_steps']} {common} {arm.tokenizer}",
            "dit": f"--preset {r['preset']} --precision {r['precision']} "
                   f"--steps {r['dit_steps']} {common} {optimizer}",
            "scores": f"{r['tokenizer_steps']} + {r['dit_steps']} steps of "
                      f"{r['batch']} images, {r['count']} samples by {r['euler']} "
                      f"Euler steps, edition {r['edition']} of the code"}

    def folder(self, stage: str) -> Path:
        settings = self.settings()
        names = list(settings)
        so_far = [settings[name] for name in names[:names.index(stage) + 1]]
        name = self.arm.tokenizer if stage == "tokenizer" else self.arm.name
        return self.out / stage / f"{slug(name)}-{digest(so_far)}"

    def stages(self) -> list[tuple[str, Path]]:
        """Commands, each with the file that says that it has been done."""
        r, settings = self.recipe, self.settings()
        folders = {stage: self.folder(stage) for stage in settings}
        tokenizer, dit, scores = (shlex.quote(str(folders[stage])) for stage in settings)
        common = f"--device {self.device}" + " --smoke" * r["smoke"]
        data = f"--data {shlex.quote(self.data)} --workers 0"
        trained = f"{tokenizer}/checkpoint.pt"
        commands = [
            (f"train_tokenizer.py {settings['tokenizer']} {data} {common}"
             f" --out {tokenizer}", folders["tokenizer"] / "trained"),
            (f"train_dit.py {settings['dit']} {data} {common} --out {dit}"
             f" --tokenizer {trained} --cache {tokenizer}/latents",
             folders["dit"] / "trained"),
            (f"sample.py --preset plain --dit {dit}/checkpoint.pt"
             f" --out {scores}/samples"
             f" --count {r['count']} --steps {r['euler']} --batch {r['batch']}"
             f" --seed {self.arm.seed} --precision {r['precision']} {common}",
             folders["scores"] / "samples/samples.json"),
            (f"evaluate.py --tokenizer {trained} --limit {r['count']} {common}"
             f" --workers 0 --out {scores}/tokenizer",
             folders["scores"] / "tokenizer/results.json"),
            (f"evaluate.py --samples {scores}/samples/samples.npz {common}"
             f" --workers 0 --out {scores}/samples",
             folders["scores"] / "samples/results.json")]
        if self.arm.seed == 0 and {5, 6} & set(self.arm.questions):
            commands.append(
                (f"-m studies.equilibrium {dit}/checkpoint.pt {scores}/measured.json"
                 f" --steps {r['euler']} --count {r['measured']} --device {self.device}",
                 folders["scores"] / "measured.json"))
        return commands


# ------------------------------------------------------------------------------
# Running.  What is done is not done again.  Some disks leave an empty file when the
# power fails, and it counts as missing.

# With this a stage watches its parent, as under torchrun, and ends when that is gone.
BOUND = {"TORCHELASTIC_RUN_ID": "experiments"}


def execute(command: str) -> str:
    """Run a stage on one thread.  Returns "", or the last line of its complaint.

    Ctrl-C does not reach the stage itself.  It is asked to stop, and saves its work.
    """
    stage = subprocess.Popen(
        [sys.executable, *shlex.split(command)], text=True, errors="replace",
        env=os.environ | BOUND | {"OMP_NUM_THREADS": "1"}, start_new_session=True,
        stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    try:
        _, said = stage.communicate()
    except BaseException:
        stage.terminate()
        with suppress(subprocess.TimeoutExpired):
            stage.communicate(timeout=8)
        stage.kill()
        raise
    if stage.returncode < 0:
        return f"killed by signal {-stage.returncode}"
    lines = re.split(r"[\r\n]+", said.strip())
    return "" if stage.returncode == 0 else lines[-1] or f"status {stage.returncode}"


def is_filled(path: Path) -> bool:
    return path.is_file() and path.stat().st_size > 0


def result_path(results: Path, arm: Arm) -> Path:
    return results / "arms" / f"{slug(arm.key)}.json"


def is_done(plan: Plan, results: Path) -> bool:
    path = result_path(results, plan.arm)
    return is_filled(path) and runtime.read_json(path).get("settings") == plan.settings()


def run_arm(plan: Plan, results: Path, say: Callable[[str], None]) -> None:
    """The stages that are not done, and the file of the arm."""
    # The features of the real images are the same for every arm.
    link, cache = plan.folder("scores") / "samples/cache", plan.out / "features"
    for folder in (link.parent, cache):
        folder.mkdir(parents=True, exist_ok=True)
    if not link.exists():
        link.unlink(missing_ok=True)   # it may lead nowhere
        link.symlink_to(cache.resolve())
    for command, done in plan.stages():
        if is_filled(done):
            continue
        stage = command.removeprefix("-m ").split()[0]
        say(f"{plan.arm.key}: {stage}")
        problem = execute(command)
        if problem:
            raise InputError(f"{plan.arm.key}, {stage}: {problem}; the same command "
                             "goes on from here")
        if not is_filled(done):   # a training writes no file of its own at its end
            runtime.write_json(done, {"command": command})
    runtime.write_json(result_path(results, plan.arm), collect(plan))
    shutil.rmtree(plan.folder("tokenizer") / "latents", ignore_errors=True)  # 100 MB


# ------------------------------------------------------------------------------
# The file of an arm, from what its stages have left.


def collect(plan: Plan) -> dict[str, Any]:
    """What the arm is, how it was made, and its numbers."""
    try:
        found = read_numbers(plan)
    except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
        folders = ", ".join(map(str, map(plan.folder, plan.settings())))
        raise InputError(f"{plan.arm.key}: a log or a score is damaged or not of this arm "
                         f"({error!r}): remove {folders}, and give the same command "
                         "again") from None
    return {"arm": plan.arm.name, "seed": plan.arm.seed, "settings": plan.settings(),
            "versions": runtime.versions(), "date": time.strftime("%Y-%m-%d"),
            "hardware": runtime.device_name(runtime.start(plan.device).device)} | found


def read_numbers(plan: Plan) -> dict[str, Any]:
    tokenizer, dit, scores = map(plan.folder, plan.settings())
    held_out = [row["held_out"] for row in read_log(tokenizer) if "held_out" in row][-1]
    losses = [row["velocity"] for row in read_log(dit) if "velocity" in row]
    numbers = {k: held_out.get(k) for k in ("sigma2", "relative_noise", "spread")}
    if plan.arm.family == "sigma-VAE":   # the same for every image
        sigma = float(plan.arm.value)
        numbers |= {"sigma2": sigma**2, "relative_noise": sigma / held_out["spread"]}
    late = losses[-max(1, len(losses) // 3):]
    numbers["flow_loss"] = statistics.mean(late)
    of = {"tokenizer": {"PSNR": "psnr", "rFD": "rfd", "rFID": "rfd"},
          "samples": {"FD": "fd", "FID": "fd", "KD": "kd", "KID": "kd"}}
    for part, names in of.items():
        row = read_scores(scores / part / "results.json")[0]
        for metric, value in row["metrics"].items():
            if metric.split("-")[0] in names and "real images" not in metric:
                numbers[names[metric.split("-")[0]]] = value
        for point in row.get("curve", ()):
            if point["noise"] == "relative":
                numbers[f"psnr_{point['level']:g}"] = point["PSNR"]
    measured = scores / "measured.json"
    extra = runtime.read_json(measured) if measured.exists() else {}
    curves = {k: extra.pop(k) for k in ("bins", "points") if k in extra}
    return {"features": row["protocol"]["features"], "numbers": numbers | extra,
            "curves": curves}


# ------------------------------------------------------------------------------


def select(arms: list[Arm], wanted: list[str] | None) -> list[Arm]:
    """The arms of these names, with or without a seed, or of these questions."""
    known = {key for arm in arms for key in (arm.name, arm.key)} | set(map(str, answers.QUESTIONS))
    for name in wanted or ():
        if name not in known:
            raise InputError(f"--only {name}: no arm or question has that name; see --list")
    return [arm for arm in arms if not wanted
            or {arm.name, arm.key, *map(str, arm.questions)} & set(wanted)]


@runtime.command
def main(argv: list[str] | None = None) -> None:
    p = runtime.Parser(__doc__)
    add, count = p.add_argument, runtime.positive_int
    add("--list", action="store_true", help="print the arms, run nothing")
    add("--draw", action="store_true", help="redraw tables and figures, run nothing")
    add("--only", nargs="+", metavar="NAME", help="arms by name, questions by number")
    add("--data", default="cifar10_subset", help="a folder, cifar10 or shapes")
    add("--scale", type=runtime.positive, default=1.0,
        help="factor on the steps of both trainings")
    add("--count", type=count, help="images that are sampled and reconstructed")
    add("--euler", type=count, help="Euler steps of the samples")
    add("--seeds", type=count, default=3, help="of questions 1 and 2; the rest has one")
    add("--device", default="auto", help="auto, cpu, cuda or mps")
    add("--out", type=Path, default=Path("runs/experiments"), help="folder of the runs")
    add("--results", type=Path, default=Path("results/experiments"),
        help="folder of JSON files, tables and figures")
    add("--smoke", action="store_true", help="one tiny arm of shapes")
    smoke = Path("runs/smoke/experiments")
    args = p.parse(argv, smoke=dict(data="shapes", only=["VE 0.1 seed 0"], out=smoke,
                                    results=smoke / "results"))
    if args.draw:
        return answers.draw(args.results, table_of_arms(1))
    recipe = RECIPE | (SMOKE if args.smoke else {})
    for key in ("count", "euler"):
        recipe[key] = getattr(args, key) or recipe[key]
    for key in ("tokenizer_steps", "dit_steps"):
        recipe[key] = max(1, round(args.scale * recipe[key]))
    plans = [Plan(arm, recipe, args.data, args.out, args.device)
             for arm in select(table_of_arms(args.seeds), args.only)]
    if args.list:
        for plan in plans:
            done = "done" if is_done(plan, args.results) else ""
            print(f"{plan.arm.key:34} {' '.join(map(str, plan.arm.questions)):18} {done}")
        return
    if args.data not in ("shapes", "cifar10") and not Path(args.data).is_dir():
        raise InputError(f"--data {args.data} is not a folder: see RESULTS.md")
    rt = runtime.start(args.device)
    runtime.claim(rt, args.out)
    runtime.claim(rt, args.results)
    bar = tqdm([plan for plan in plans if not is_done(plan, args.results)], "arms")
    for plan in bar:
        run_arm(plan, args.results, bar.write)
    answers.draw(args.results, table_of_arms(1))


if __name__ == "__main__":
    main()
