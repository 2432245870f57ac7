"""What the studies share: how they run the stages, and read what these have written."""

import hashlib
import json
import os
import re
import shlex
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import runtime  # before torch, which it tells how threads wait

import checkpoints
from runtime import InputError

# ------------------------------------------------------------------------------
# Running.  Some disks leave an empty file when the power fails, and it counts as
# missing.

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


def digest(value: Any) -> str:
    text = json.dumps(value, sort_keys=True).encode()
    return hashlib.blake2b(text, digest_size=4).hexdigest()


def slug(text: str) -> str:
    return re.sub(r"[^a-z0-9.]+", "-", text.lower()).strip("-")


# ------------------------------------------------------------------------------
# An arm, and what it leaves.


@dataclass(frozen=True)
class Arm:
    """Arms of one family differ in one value.  The flags are of the tokenizer's training."""
    family: str
    value: str
    tokenizer: str
    seed: int = 0

    @property
    def name(self) -> str:
        return f"{self.family} {self.value}"

    @property
    def key(self) -> str:
        return f"{self.name} seed {self.seed}"


# ------------------------------------------------------------------------------
# From an arm to commands.  The name of a folder holds a digest of all that decides
# what is in it, so that changed settings lead to another folder.


@dataclass(frozen=True)
class Plan:
    arm: Arm
    recipe: dict[str, Any]
    data: str
    out: Path
    device: str
    training: str = ""   # flags of both trainings that change only how fast they are

    def settings(self) -> dict[str, str]:
        """All that decides the numbers.  The data go by the folder's name."""
        r, arm = self.recipe, self.arm
        common = f"--batch {r['batch']} --seed {arm.seed}"
        trainings = ", ".join(map(str, r["trainings"]))
        return {
            "tokenizer": f"--preset {r['preset']} --data {shlex.quote(Path(self.data).name)} "
                         f"--steps {r['tokenizer_steps']} {common} {arm.tokenizer}",
            "dit": f"--preset {r['preset']}{r['network']} --precision {r['precision']} "
                   f"--steps {r['dit_steps']} {common} --optimizer {r['optimizer']} "
                   f"--lr {r['lr']}",
            "scores": f"{r['tokenizer_steps']} steps of tokenizers, {trainings} times "
                      f"{r['dit_steps']} of transformers, {r['count']} samples by "
                      f"{r['euler']} Euler steps, edition {r['edition']} of the code"}

    def folder(self, stage: str) -> Path:
        settings = self.settings()
        names = list(settings)
        so_far = [settings[name] for name in names[:names.index(stage) + 1]]
        name = self.arm.tokenizer if stage == "tokenizer" else self.arm.name
        return self.out / stage / f"{slug(name)}-{digest(so_far)}"

    def looks(self) -> dict[int, Path]:
        """The copy of the transformer that is kept after each training."""
        unit, folder = self.recipe["dit_steps"], self.folder("dit")
        return {training: folder / f"{training * unit}.pt"
                for training in self.recipe["trainings"]}

    def stages(self) -> list[tuple[str, Path]]:
        """Commands, each with the file that says that it has been done."""
        r, settings = self.recipe, self.settings()
        folders = {stage: self.folder(stage) for stage in settings}
        tokenizer, dit, scores = (shlex.quote(str(folders[stage])) for stage in settings)
        common = f"--device {self.device}" + " --smoke" * r["smoke"]
        data = f"--data {shlex.quote(self.data)} --workers 0"
        training = common + self.training
        trained, samples = f"{tokenizer}/checkpoint.pt", folders["scores"] / "samples"
        return [
            (f"train_tokenizer.py {settings['tokenizer']} {data} {training}"
             f" --out {tokenizer}", folders["tokenizer"] / "trained"),
            *((f"train_dit.py {settings['dit']} {data} {training} --out {dit}"
               f" --tokenizer {trained} --cache {tokenizer}/latents --steps {copy.stem}", copy)
              for copy in self.looks().values()),
            (f"sample.py --preset plain --dit {dit}/checkpoint.pt --out {scores}/samples"
             f" --count {r['count']} --steps {r['euler']} --batch {r['batch']}"
             f" --seed {self.arm.seed} --precision {r['precision']} {common}",
             samples / "samples.json"),
            (f"evaluate.py --tokenizer {trained} --limit {r['count']} {common}"
             f" --workers 0 --noise --out {scores}/tokenizer",
             folders["scores"] / "tokenizer/results.json"),
            (f"evaluate.py --samples {scores}/samples/samples.npz {common}"
             f" --limit {r['count']} --workers 0 --out {scores}/samples", samples / "results.json")]


def result_path(results: Path, arm: Arm) -> Path:
    return results / "arms" / f"{slug(arm.key)}.json"


def is_done(plan: Plan, results: Path) -> bool:
    path = result_path(results, plan.arm)
    return is_filled(path) and runtime.read_json(path).get("settings") == plan.settings()


def run_stages(plan: Plan, run: Callable[[str], str], say: Callable[[str], None]) -> None:
    """The stages of an arm that are not done.  run: `execute`, or another that does the same."""
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
        stage = command.split()[0]
        say(f"{plan.arm.key}: {stage}")
        if problem := run(command):
            raise InputError(f"{plan.arm.key}, {stage}: {problem}; the same command "
                             "goes on from here")
        if done.suffix == ".pt":
            keep(done)
        elif not is_filled(done):   # a training writes no file of its own at its end
            runtime.write_json(done, {"command": command})


def keep(copy: Path) -> None:
    """Copy the checkpoint beside it, without what only a training needs."""
    state = checkpoints.read(copy.with_name("checkpoint.pt"), "dit")
    if state["step"] != int(copy.stem):
        raise InputError(f"{copy.parent} has gone on to {state['step']} steps, and {copy.name} "
                         "is not there: remove this folder, and give the same command again")
    checkpoints.save(state | {"optimizers": []}, copy)


# ------------------------------------------------------------------------------
# Reading.


def is_number(value: Any) -> bool:
    """Whether it can be drawn.  NaN and infinity cannot."""
    return isinstance(value, (int, float)) and abs(value) < 1e300


def read_log(run: Path) -> list[dict[str, Any]]:
    """The lines about steps.  `run` is the folder of a training, or its log.jsonl.

    A half line is left out, because somebody may be writing it.
    """
    path, lines = run / "log.jsonl" if run.is_dir() else run, []
    for text in runtime.regular(path).read_text(errors="replace").splitlines():
        try:
            line = json.loads(text)
        except (ValueError, RecursionError):
            continue
        if isinstance(line, dict) and is_number(line.get("step")):
            lines.append(line)
    if not lines:
        raise InputError(f"{path} has no logged steps: wait for the first, or name the "
                         "folder of a training")
    return lines


def read_scores(path: Path) -> list[dict[str, Any]]:
    """The rows of evaluate.py's results.json."""
    try:
        rows = json.loads(runtime.regular(path).read_text())
    except (ValueError, RecursionError):
        rows = None
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise InputError(f"{path} is damaged or not of evaluate.py: remove it, and give "
                         "the same command again")
    return rows


def collect(plan: Plan) -> dict[str, Any]:
    """What the arm is, how it was made, and the numbers that its stages have left."""
    tokenizer, _, scores = map(plan.folder, plan.settings())
    try:
        numbers = [row["held_out"] for row in read_log(tokenizer) if "held_out" in row][-1]
        for part in "tokenizer", "samples":
            row, = read_scores(scores / part / "results.json")
            numbers |= {name.split("-")[0].lower().replace("id", "d"): value
                        for name, value in row["metrics"].items() if "real images" not in name
                        and (part, name) != ("tokenizer", "recognised")}   # of samples only
        features = row["protocol"]["features"]
    except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
        raise InputError(f"{plan.arm.key}: a log or a score is damaged or not of this arm "
                         f"({error!r}): remove {tokenizer} and {scores}, and give the same "
                         "command again") from None
    return {"arm": plan.arm.name, "family": plan.arm.family, "value": plan.arm.value,
            "seed": plan.arm.seed, "settings": plan.settings(), "features": features,
            "versions": runtime.versions(), "date": time.strftime("%F"), "numbers": numbers,
            "hardware": runtime.device_name(runtime.start(plan.device).device)}
