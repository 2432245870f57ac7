"""Does it hold?  The paper's claims at a size a small machine can run: nine questions, one table of arms.

    laptop       python experiments.py --list                   # the arms, their questions, their cost
                 python experiments.py --only "KL 1e-6" 5       # by name or question; then tables and figures
                 python experiments.py --scale 0.2 --seeds 1    # a fifth of the steps, one seed
    one GPU      python experiments.py --scale 4 --count 10000 --euler 50 250
    no training  python experiments.py --draw                   # redraws everything from the JSON alone

An arm is tokenizer -> DiT -> samples -> scores, each a stage of this repository in a process of its own.  The
stages resume, and a finished arm is one file in RESULTS/arms, so the same command after any interruption goes
on where it was.  Distances are in whatever features evaluate.py finds weights for, and are named after them.
"""

import argparse
import fcntl
import hashlib
import itertools
import json
import math
import os
import re
import shutil
import signal
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

import data
import losses
import models
import runtime
from runtime import InputError

HERE = Path(__file__).parent

# ------------------------------------------------------------------------------------------------------------
# The size of every arm, in one place; --scale multiplies both trainings.  A latent value of this tokenizer
# (stride 4, 8 channels) stands for 6 pixel values, f16d32's for 24: lambda1 = 0.1 costs more here, so lambda1
# is swept.  The mean's weight of the sigma-VAE is LatentLM's 0.01 of means, for 6 values.

RECIPE: dict[str, Any] = dict(
    model="vit-demo", tokenizer_steps=1000, tokenizer_batch=32,
    dit="demo", dit_steps=600, dit_batch=32, precision="bf16", optimizer="muon", lr="4e-3",
    count=1000, images=1000, measured=32, features="auto", smoke=False)
SMOKE = dict(tokenizer_steps=4, tokenizer_batch=4, dit_steps=4, dit_batch=4, precision="fp32", count=16,
             images=16, measured=4, features="random", smoke=True)
FINER = 8   # times the steps of the integration that question 6 takes for exact

# Seconds on one thread of a busy two-core x86-64 machine: for --list, until an arm is measured.
SECONDS = dict(tokenizer_step=0.14, dit_step=0.25, sample_step=0.0022, other=140)


@dataclass(frozen=True)
class Arm:
    """One tokenizer, one DiT, one seed for all stages.  `family` groups arms that differ in one setting."""
    name: str
    family: str
    questions: tuple[int, ...]
    tokenizer: tuple[str, ...]
    optimizer: str = ""   # of the DiT, and its rate; empty: the recipe's
    lr: str = ""
    seed: int = 0

    @property
    def key(self) -> str:
        return f"{self.name} seed {self.seed}"


def table_of_arms(seeds: int = 3) -> list[Arm]:
    """Every arm; those of questions 1, 2 and 8 with `seeds` seeds.  Seed 0 of all comes first, so that a run
    that is cut short has something to say to every question.
    """
    def arm(family: str, value: str, questions: tuple[int, ...], *flags: str, **dit: str) -> Arm:
        return Arm(f"{family} {value}", family, questions, flags, **dit)

    ve = ("--loss", "ve")
    arms = [arm("KL", "1e-6", (1, 6, 7, 9), "--loss", "kl", "--kl-weight", "1e-6"),
            arm("VE", "0.1", (1, 2, 3, 4, 5, 6, 7, 8, 9), *ve),
            arm("VE", "0.01", (1, 2, 3, 4, 5, 6, 7, 8), *ve, "--lambda1", "0.01"),
            arm("VE", "0.001", (1, 2, 3, 4, 5, 6, 7, 8), *ve, "--lambda1", "0.001"),
            arm("VE", "0.0001", (1, 2, 3, 4, 7, 8), *ve, "--lambda1", "0.0001")]
    arms += [arm("KL", w, (1, 6, 7) if w == "1e-2" else (1, 7), "--loss", "kl", "--kl-weight", w)
             for w in ("1e-4", "1e-2", "0.1", "0.5", "1", "2", "8")]
    fixed = ("--loss", "sigma", "--sigma-mode", "fixed")
    for sigma in ("0.1", "0.2", "0.5"):
        known = (2, 6, 7) if sigma == "0.2" else (2, 7)
        arms.append(arm("sigma-VAE", sigma, known, *fixed, "--sigma", sigma, "--mean-weight", "0.06"))
        arms.append(arm("sigma-VAE RMS", sigma, known, *fixed, "--sigma", sigma, "--mean-weight", "0",
                        "--latent-norm"))
    arms += [arm("VE standardised", w, (7, 8), *ve, "--standardize-mean", "--lambda1", w)
             for w in ("0.0003", "0.002")]   # those of VE 0.01 and 0.1 over the variance of their means
    arms += [arm("VE", w, (3, 4, 7), *ve, "--lambda1", w) for w in ("0.03", "0.3")]
    for flag, values in (("lambda2", ("0", "1e-8", "1e-4")), ("tau", ("0", "2", "3")),
                         ("delta", ("1e-8", "1e-4", "1e-2"))):
        arms += [arm(f"VE {flag}", value, (3,), *ve, f"--{flag}", value) for value in values]
    for name, form, weights in (("negative variance", "negative", ("0.003", "0.01", "0.03")),
                                ("log-entropy", "log", ("0.01", "0.03", "0.1"))):
        arms += [arm(name, w, (4,), *ve, "--variance-form", form, "--lambda1", w) for w in weights]
    for name, flags in (("VE", ve), ("KL", arms[0].tokenizer)):
        arms += [arm(f"{name} {title}", rate, (9,), *flags, optimizer=title.lower(), lr=rate)
                 for title, rate in (("AdamW", "1e-3"), ("AdamW", "2e-3"), ("Muon", "1e-3"))]
    repeated = [a for a in arms if {1, 2, 8} & set(a.questions)]
    return arms + [replace(a, seed=seed) for seed in range(1, seeds) for a in repeated]


# ------------------------------------------------------------------------------------------------------------
# From an arm to commands.  A folder is named by a digest of all that decides what is in it: equal tokenizers
# are one folder, trained once, and a changed setting is another folder, trained again.


def digest(value: Any) -> str:
    return hashlib.blake2b(json.dumps(value, sort_keys=True).encode(), digest_size=4).hexdigest()


def slug(text: str) -> str:
    return re.sub(r"[^a-z0-9.]+", "-", text.lower()).strip("-")


@dataclass(frozen=True)
class Plan:
    """An arm's settings, folders and commands under one recipe."""
    arm: Arm
    recipe: dict[str, Any]
    data: str
    out: Path
    device: str

    def training(self, stage: str) -> list[str]:
        """Flags that decide what the network of a stage is."""
        r = self.recipe
        flags = ["--model", r["model"], "--data", self.data, *self.arm.tokenizer]
        if stage == "dit":
            flags = ["--model", r["dit"], "--precision", r["precision"], "--optimizer",
                     self.arm.optimizer or r["optimizer"], "--lr", self.arm.lr or r["lr"]]
        return [*(["--smoke"] if r["smoke"] else []), "--steps", str(r[f"{stage}_steps"]),
                "--batch", str(r[f"{stage}_batch"]), "--seed", str(self.arm.seed), *flags]

    def settings(self) -> dict[str, Any]:
        """All that decides the arm's numbers but the number of Euler steps; the data by its folder's name."""
        portable = replace(self, data=Path(self.data).name)
        return {stage: portable.training(stage) for stage in ("tokenizer", "dit")} | {
            "scores": [self.recipe[k] for k in ("count", "images", "measured", "features")]}

    def folder(self, stage: str) -> Path:
        """Of "tokenizer", "dit" or "scores", under the digest of the settings so far."""
        so_far = list(self.settings().values())[:["tokenizer", "dit", "scores"].index(stage) + 1]
        name = " ".join(self.arm.tokenizer) if stage == "tokenizer" else self.arm.name
        return self.out / stage / f"{slug(name)}-seed{self.arm.seed}-{digest(so_far)}"

    def stages(self, euler: list[int]) -> list[tuple[str, list[str], Path]]:
        """(name, command, the file that says it is done) in order."""
        r, (tokenizer, dit, scores) = self.recipe, map(self.folder, ("tokenizer", "dit", "scores"))
        trained, common = tokenizer / "checkpoint.pt", ["--device", self.device]
        training = [*common, "--workers", "0", "--log-every", "10", "--image-every", "1000000"]
        scoring = [*common, "--workers", "0", "--features", r["features"], "--out", str(scores), "--append"]
        found = scores / "reconstruction.json"
        stages = [
            ("train_tokenizer", [*self.training("tokenizer"), *training, "--out", str(tokenizer)],
             tokenizer / "trained"),
            ("train_dit", [*self.training("dit"), *training, "--tokenizer", str(trained), "--cache",
                           str(tokenizer / "latents"), "--out", str(dit)], dit / "trained"),
            ("evaluate", ["reconstruction", "--tokenizer", str(trained), "--limit", str(r["images"]),
                          "--relative", "0.2", "0.5", "--absolute", *scoring, str(found)], found)]
        for steps in euler:
            samples, found = scores / f"samples-{steps}", scores / f"generation-{steps}.json"
            limit = ["--limit", str(r["images"])] if r["smoke"] else []
            stages += [
                ("sample", ["--dit", str(dit / "checkpoint.pt"), "--count", str(r["count"]), "--steps",
                            str(steps), "--batch", str(r["dit_batch"]), "--seed", str(self.arm.seed),
                            "--precision", r["precision"], *common, "--out", str(samples)],
                 samples / "samples.json"),
                ("evaluate", ["generation", "--samples", str(samples / "samples.npz"), *limit, *scoring,
                              str(found)], found)]
        if self.arm.seed == 0 and {5, 6} & set(self.arm.questions):
            found = scores / f"measured-{euler[0]}.json"
            stages.append(("experiments", ["--measure", str(dit / "checkpoint.pt"), str(found), "--euler",
                                           str(euler[0]), "--count", str(r["measured"]), *common], found))
        return stages


# ------------------------------------------------------------------------------------------------------------
# Question 5, Eq. 14.  With T_i = d E L_rec / d sigma_i^2 at the posterior, the derivative of the whole
# objective is zero where sigma_i^4 = lambda1 / T_i, whatever the reconstruction loss.  Eq. 7's T is that of
# the squared error, the diagonal of J^T J; L1's depends on sigma itself, so both are measured.


def hutchinson(decode: Callable[[Tensor], Tensor], z: Tensor, probes: int, g: torch.Generator) -> Tensor:
    """diag(J^T J), J = d decode(z) / dz: the mean of (J^T v)^2 over `probes` vectors v of random signs.

    z: [B, *shape].  Returns: the same shape; summed over it, tr(J J^T) of Eq. 7.
    """
    z = z.detach().requires_grad_()
    x_hat, total = decode(z), torch.zeros_like(z)
    for _ in range(probes):
        v = torch.randint(0, 2, x_hat.shape, generator=g).to(x_hat) * 2 - 1
        total += torch.autograd.grad(x_hat, z, v, retain_graph=True)[0].square()
    return total / probes


def loss_slope(decode: Callable[[Tensor], Tensor], x: Tensor, mean: Tensor, std: Tensor, draws: int,
               g: torch.Generator) -> Tensor:
    """T_i = d/d sigma_i^2 of E sum |decode(mean + sigma eps) - x| = E[ dL/dz_i eps_i ] / (2 sigma_i).

    Pairs eps, -eps cancel the gradient at the mean, which carries nothing but variance.  An element's
    estimate is noisy and unbiased: average elements before taking a logarithm.
    x: [B, 3, H, W]; mean, std: [B, C, h, w].  Returns: [B, C, h, w].
    """
    total = torch.zeros_like(mean)
    for _ in range(draws):
        eps = torch.randn(mean.shape, generator=g).to(mean)
        for signed in (eps, -eps):
            z = (mean + std * signed).detach().requires_grad_()
            total += torch.autograd.grad(len(x) * losses.absolute_error(decode(z), x), z)[0] * signed
    return total / (4 * draws * std)


def line(x: Tensor, y: Tensor) -> tuple[float, float]:
    """Slope of the least-squares line of y [N] on x [N], and their correlation."""
    (xx, xy), (_, yy) = torch.cov(torch.stack([x, y]).double()).tolist()
    return xy / xx, xy / math.sqrt(xx * yy)


def equilibrium(sigma: Tensor, slope: Tensor, trace: Tensor, lambda1: float,
                bins: int = 20) -> dict[str, Any]:
    """What Eq. 14 says of measured sigma, T of the real loss (loss_slope) and T of Eq. 7 (hutchinson), [N].

    T of the loss is averaged in `bins` equally full bins of sigma.  slope: of log sigma on log T, -1/4 at the
    equilibrium; ratio: geometric mean of sigma^4 T / lambda1 over the bins, 1 there; scatter: deviation of
    log10 sigma about its line on Eq. 7's log10 T, element by element.
    """
    parts = torch.argsort(sigma).chunk(min(bins, len(sigma)))
    s, t = (torch.stack([f(v[p].double()) for p in parts]) for f, v in
            ((lambda a: a.log10().mean(), sigma), (lambda a: a.mean(), slope)))
    kept = t > 0
    log_sigma, log_trace = sigma.double().log10(), trace.double().clamp(min=1e-12).log10()
    trace_slope, correlation = line(log_trace, log_sigma)
    few = torch.linspace(0, len(sigma) - 1, min(len(sigma), 500)).long()
    return {"equilibrium_slope": line(t[kept].log10(), s[kept])[0] if kept.sum() > 2 else None,
            "equilibrium_ratio": 10 ** (4 * s[kept] + t[kept].log10() - math.log10(lambda1)).mean().item(),
            "trace_slope": trace_slope, "trace_correlation": correlation,
            "scatter": (log_sigma - trace_slope * log_trace).std().item(), "lambda1": lambda1,
            "bins": {"log_sigma": s[kept].tolist(), "log_t": t[kept].log10().tolist()},
            "points": {"log_sigma": [round(v, 4) for v in log_sigma[few].tolist()],
                       "log_t": [round(v, 4) for v in log_trace[few].tolist()]}}


# ------------------------------------------------------------------------------------------------------------
# Question 6: what is left of the sampler's error, against what the decoder was trained to bear.


def perturbation(coarse: Tensor, fine: Tensor, sigma: Tensor) -> dict[str, float]:
    """Of latents [B, C, h, w] in units of their spread: the error's root mean square, its ratio to that of
    the posterior's sigma [C], and the share of elements whose error exceeds their channel's sigma.
    """
    error, wide = coarse - fine, sigma[:, None, None].to(coarse)
    rms = error.square().mean().sqrt().item()
    return {"sampler_error": rms, "sampler_over_sigma": rms / max(sigma.square().mean().sqrt().item(), 1e-12),
            "sampler_outside": (error.abs() > wide).double().mean().item()}


def measure(dit_path: Path, target: Path, n: int, steps: int, device: str) -> None:
    """Questions 5 and 6 of one arm, on n held-out images and n generated latents, to a JSON file."""
    place = runtime.start(device).device
    with runtime.input_errors():
        dit, checkpoint = models.load_dit(dit_path)
        tokenizer, source = models.load_autoencoder(checkpoint["tokenizer"]["path"])
    config, std = source["config"], checkpoint["latent_std"].to(place)
    tokenizer, dit = tokenizer.to(place).requires_grad_(False), dit.to(place).requires_grad_(False)
    images = data.open_dataset(config["data"], config["size"], "val", config["seed"])
    x = torch.cat([b["x"] for b in data.once(images, n, limit=n)]).to(place)
    mean, logvar = losses.split_moments(tokenizer.encode(x))
    sigma = torch.full_like(mean, config["sigma"]) if config["loss"] == "sigma" else (logvar / 2).exp()
    found, g = {}, runtime.generator(0, "measure")
    if config["loss"] == "ve" and config.get("variance_form", "inverse") == "inverse":
        slope = loss_slope(tokenizer.decode, x, mean, sigma, 32, g).flatten()
        trace = hutchinson(tokenizer.decode, mean, 16, g).flatten()
        found = equilibrium(sigma.flatten().cpu(), slope.cpu(), trace.cpu(), config["lambda1"])
    noise = torch.randn(n, *checkpoint["latent_shape"], generator=g).to(place)
    y = (torch.arange(n) % len(checkpoint["classes"])).to(place)

    def velocity(z: Tensor, t: float) -> Tensor:
        return dit(z, torch.full((n,), t, device=place), y)

    with torch.no_grad():
        coarse, fine = (losses.euler(velocity, noise, k) for k in (steps, FINER * steps))
        pictures = [tokenizer.decode(models.denormalize(z, checkpoint["latent_mean"], std)).clamp(-1, 1)
                    for z in (coarse, fine)]
    relative = sigma.square().mean((0, 2, 3)).sqrt() / std
    found |= perturbation(coarse, fine, relative)
    error = (pictures[0] - pictures[1]).square().mean().item() / 4
    found["sampler_psnr"] = -10 * math.log10(max(error, 1e-12))
    target.write_text(json.dumps(found) + "\n")


# ------------------------------------------------------------------------------------------------------------
# Running.  A worker takes a tokenizer with all its DiTs; its stages are processes of one thread each.

RUNNING: set[subprocess.Popen] = set()
STOPPED = threading.Event()


@contextmanager
def lock(path: Path, say: Callable[[str], None]) -> Iterator[int]:
    """Hold the lock of a tokenizer's folders; its descriptor goes to the stages, which hold it with us.  So a
    stage that outlived a killed run is waited for, and two runs side by side never write to one folder.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as file:
        for attempt in itertools.count():
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if attempt == 0:
                    say(f"{path.stem}: waiting for a stage of another or a killed run")
                if STOPPED.wait(1):
                    break   # no stage starts any more
        yield file.fileno()


def execute(stage: str, flags: list[str], held: int) -> str:
    """Run a stage to its end; `held`: the lock's descriptor.  Returns: "" or, if it failed, the last line it
    wrote to stderr.
    """
    process = subprocess.Popen([sys.executable, str(HERE / f"{stage}.py"), *flags], text=True,
                               stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
                               env=os.environ | {"OMP_NUM_THREADS": "1"}, pass_fds=[held])
    RUNNING.add(process)
    if STOPPED.is_set():   # since the caller looked
        process.terminate()
    _, errors = process.communicate()
    RUNNING.discard(process)
    if process.returncode == 0:
        return ""
    lines = [part.strip() for part in re.split(r"[\r\n]+", errors) if part.strip()]
    return lines[-1] if lines else f"exit status {process.returncode}"


def result_path(results: Path, arm: Arm) -> Path:
    return results / "arms" / f"{slug(arm.key)}.json"


def read_result(results: Path, arm: Arm) -> dict[str, Any]:
    path = result_path(results, arm)
    return json.loads(path.read_text()) if path.exists() else {}


def is_done(plan: Plan, results: Path, euler: list[int]) -> bool:
    """Whether the arm's file is there, of these settings and with these numbers of Euler steps."""
    found = read_result(results, plan.arm)
    return (found.get("settings_hash") == digest(plan.settings())
            and {str(n) for n in euler} <= set(found["numbers"]["generation"]))


def run_arm(plan: Plan, results: Path, euler: list[int], held: int, say: Callable[[str], None]) -> str:
    """The stages that are not done, then the arm's file.  Returns: "" or what went wrong."""
    link, cache = plan.folder("scores") / "cache", plan.out / "features"
    for folder in (link.parent, cache):
        folder.mkdir(parents=True, exist_ok=True)
    if not link.exists():   # the features of the reference are the same for every arm
        link.symlink_to(cache.resolve(), target_is_directory=True)
    for stage, flags, done in plan.stages(euler):
        if done.exists():
            continue
        if STOPPED.is_set():
            return "stopped"
        say(f"{plan.arm.key}: {stage} {flags[0] if stage == 'evaluate' else ''}")
        problem = execute(stage, flags, held)
        if problem:
            return f"{stage}: {problem}"
        if done.name == "trained":
            done.touch()
    path = result_path(results, plan.arm)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(json.dumps(collect(plan, euler), indent=1) + "\n")
    os.replace(temporary, path)
    return ""


def run_group(group: list[Plan], results: Path, euler: list[int],
              say: Callable[[str], None]) -> dict[str, str]:
    """All arms of one tokenizer; its cached latents (100 MB) go when they are through.  Returns: failures."""
    tokenizer = group[0].folder("tokenizer")
    with lock(group[0].out / "locks" / f"{tokenizer.name}.lock", say) as held:
        outcomes = {plan.arm.key: run_arm(plan, results, euler, held, say) for plan in group}
    failures = {key: problem for key, problem in outcomes.items() if problem}
    if not failures:
        shutil.rmtree(tokenizer / "latents", ignore_errors=True)
    return failures


def run_all(plans: list[Plan], results: Path, euler: list[int], jobs: int) -> dict[str, str]:
    """Every arm that is not done, `jobs` tokenizers side by side.  Returns: what failed, by arm, and why."""
    groups: dict[Path, list[Plan]] = {}
    for plan in plans:
        if not is_done(plan, results, euler):
            groups.setdefault(plan.folder("tokenizer"), []).append(plan)
    failures: dict[str, str] = {}
    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))   # as Ctrl-C: the stages end with it
    pool = ThreadPoolExecutor(jobs)
    try:
        with tqdm(total=sum(map(len, groups.values())), desc="arms", unit="arm") as bar:
            tasks = {pool.submit(run_group, group, results, euler, bar.write): group
                     for group in groups.values()}
            for task, group in tasks.items():
                failures |= task.result()
                bar.update(len(group))
    finally:
        STOPPED.set()
        for process in list(RUNNING):
            process.terminate()
        pool.shutdown(cancel_futures=True)
        signal.signal(signal.SIGTERM, before)
        STOPPED.clear()
    for key, problem in failures.items():
        print(f"{key} stopped: {problem}", file=sys.stderr)
    return failures


# ------------------------------------------------------------------------------------------------------------
# An arm's file, from what its stages left.


def read_log(folder: Path) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    head, *lines = [json.loads(text) for text in (folder / "log.jsonl").read_text().splitlines()]
    return head, lines


def seconds_per_step(lines: list[dict[str, Any]]) -> float:
    """Median over the logged steps, of which a resumed run's clock starts again."""
    if "seconds_per_step" in lines[0]:
        return statistics.median(row["seconds_per_step"] for row in lines)
    rows = [row for row in lines if "seconds" in row]
    rates = [(b["seconds"] - a["seconds"]) / (b["step"] - a["step"]) for a, b in zip(rows[:-1], rows[1:])]
    return statistics.median([rate for rate in rates if rate > 0] or [rows[0]["seconds"] / rows[0]["step"]])


def scores_of(path: Path) -> tuple[dict[str, float], dict[str, Any]]:
    """The last row that evaluate.py appended: its distances under plain names, and the whole of it."""
    row = json.loads(path.read_text())[-1]
    plain = {"FID": "fd", "FD": "fd", "KID": "kd", "KD": "kd", "rFID": "rfd", "rFD": "rfd"}
    return {plain[name.split("-")[0]]: value for name, value in row["metrics"].items()
            if name.split("-")[0] in plain and not name.endswith((" std", "held-out"))}, row


def arithmetic(plan: Plan) -> dict[str, float]:
    """TFLOP of both trainings: three forward passes a step and image, and Muon's iterations."""
    r, forward = plan.recipe, {}
    tokenizer, _ = models.load_autoencoder(plan.folder("tokenizer") / "checkpoint.pt")
    dit, checkpoint = models.load_dit(plan.folder("dit") / "checkpoint.pt")
    z = torch.zeros(1, *checkpoint["latent_shape"])
    image = torch.zeros(1, 3, *(tokenizer.stride * side for side in z.shape[2:]))
    for name, inputs in (("tokenizer", (image,)), ("dit", (z, torch.ones(1), torch.tensor([0])))):
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            {"tokenizer": tokenizer, "dit": dit}[name](*inputs)
        forward[name] = counter.get_total_flops()
    extra = 0.0
    if "muon" in plan.training("dit"):   # five iterations x x^T, its square, one product with x; parts [A, B]
        for name, p in dit.named_parameters():
            if re.fullmatch(r"blocks\.\d+\.(attn\.(qkv|proj)|mlp\.\w+)\.weight", name):
                parts = {"qkv": 3, "w12": 2}.get(name.split(".")[-2], 1)
                a, b = sorted((p.shape[0] // parts, p.shape[1]))
                extra += parts * 5 * (4 * a * a * b + 2 * a ** 3)
    steps = {k: 3 * forward[k] * r[f"{k}_batch"] + more for k, more in (("tokenizer", 0.0), ("dit", extra))}
    return {f"{k}_tflop": flop * r[f"{k}_steps"] / 1e12 for k, flop in steps.items()}


def collect(plan: Plan, euler: list[int]) -> dict[str, Any]:
    """What the arm is, how it was made, and its numbers."""
    folder = plan.folder("scores")
    (head, logged), (_, steps) = (read_log(plan.folder(stage)) for stage in ("tokenizer", "dit"))
    held_out = [row["held_out"] for row in logged if "held_out" in row][-1]
    late = [row["velocity"] for row in steps if row["step"] > 2 * steps[-1]["step"] / 3]
    rates = {"tokenizer": seconds_per_step(logged), "dit": seconds_per_step(steps)}
    scores, reconstruction = scores_of(folder / "reconstruction.json")
    numbers = {k: held_out.get(k) for k in ("sigma2", "relative_noise", "spread", "balance")}
    if "sigma" in plan.arm.tokenizer:
        sigma = float(plan.arm.tokenizer[plan.arm.tokenizer.index("--sigma") + 1])
        numbers |= {"sigma2": sigma ** 2, "relative_noise": sigma / held_out["spread"]}
    numbers |= {"psnr": reconstruction["metrics"]["PSNR"], "rfd": scores["rfd"],
                "flow_loss": statistics.mean(late)} | arithmetic(plan)
    numbers |= {f"{k}_seconds": rate * plan.recipe[f"{k}_steps"] for k, rate in rates.items()}
    rows = {path.stem.split("-")[1]: scores_of(path) for path in folder.glob("generation-*.json")}
    numbers["generation"] = {n: rows[n][0] for n in sorted(rows, key=int)}
    for point in reconstruction["curve"]:
        numbers[f"psnr_{point['level']:g}"] = point["PSNR"]
    measured = folder / f"measured-{euler[0]}.json"
    extra = json.loads(measured.read_text()) if measured.exists() else {}
    row = rows[str(euler[0])][1]
    commands = [" ".join(["python", f"{stage}.py", *flags]) for stage, flags, _ in plan.stages(euler)]
    return {"arm": plan.arm.name, "seed": plan.arm.seed, "settings": plan.settings(),
            "settings_hash": digest(plan.settings()), "recipe": plan.recipe, "commands": commands,
            "versions": runtime.versions(), "hardware": head["device"], "date": time.strftime("%Y-%m-%d"),
            "features": row["protocol"]["features"], "protocol": row["protocol"],
            "numbers": numbers | {k: v for k, v in extra.items() if k not in ("bins", "points")},
            "curves": {k: extra[k] for k in ("bins", "points") if k in extra}}


# ------------------------------------------------------------------------------------------------------------
# Tables and figures, from the arms' files alone: a row for each name, over its seeds.

COLUMNS = {"sigma2": "sigma²", "relative_noise": "noise / spread", "spread": "spread", "psnr": "PSNR [dB]",
           "psnr_0.2": "PSNR, noise 0.2", "psnr_0.5": "PSNR, noise 0.5", "rfd": "reconstruction FD",
           "flow_loss": "flow loss", "fd": "generation FD", "kd": "generation KD",
           "fd_250": "FD, 250 steps", "balance": "balance", "equilibrium_slope": "slope, T of the loss",
           "equilibrium_ratio": "sigma⁴ T / lambda1", "trace_slope": "slope, T of Eq. 7",
           "trace_correlation": "correlation", "scatter": "scatter [log10 sigma]",
           "sampler_error": "sampler's error / spread", "sampler_over_sigma": "error / sigma",
           "sampler_outside": "share outside sigma", "sampler_psnr": "PSNR of that error [dB]",
           "dit_seconds": "DiT [device-s]", "dit_tflop": "DiT [TFLOP]", "tokenizer_seconds": "tokenizer [s]",
           "tokenizer_tflop": "tokenizer [TFLOP]"}
USUAL = ("sigma2", "relative_noise", "psnr", "rfd", "flow_loss", "fd", "kd", "fd_250")


@dataclass(frozen=True)
class Question:
    """A title, the columns of the table, and the two that the figure sets against one another."""
    title: str
    columns: tuple[str, ...]
    x: str = "relative_noise"
    y: str = "fd"


QUESTIONS = {
    1: Question("Table 2: does VE beat the best KL weight?", USUAL, "sigma2"),
    2: Question("The missing baseline: noise of a fixed sigma, plain and on an RMS-normalised latent", USUAL),
    3: Question("Sensitivity to lambda1, lambda2, tau and delta", ("spread", "balance", *USUAL), "psnr"),
    4: Question("Forms of the variance term at equal mean sigma²", ("spread", *USUAL), "sigma2"),
    5: Question("Equilibrium: sigma against T, Eq. 14 (slope -1/4, ratio 1)",
                ("sigma2", "balance", "equilibrium_slope", "equilibrium_ratio", "trace_slope",
                 "trace_correlation", "scatter")),
    6: Question(f"The sampler's error (against {FINER} times finer steps) and what the decoder bears",
                ("relative_noise", "sampler_error", "sampler_over_sigma", "sampler_outside", "sampler_psnr",
                 "psnr", "psnr_0.2", "psnr_0.5", "rfd", "flow_loss", "fd")),
    7: Question("The trade: reconstruction given up, generation gained", ("psnr", "rfd", "fd", "kd"), "psnr"),
    8: Question("Beyond: VE on a standardised mean, without lambda2 and tau", USUAL),
    9: Question("Muon against AdamW for the DiT, and what an arm costs",
                ("flow_loss", "fd", "kd", "dit_seconds", "dit_tflop", "tokenizer_seconds", "tokenizer_tflop"),
                "flow_loss"),
}


def summarise(arms: list[Arm], found: dict[str, dict[str, Any]],
              columns: tuple[str, ...]) -> list[dict[str, Any]]:
    """One row per name: n seeds, and (mean, deviation, count) per column; n = 0: the arm was not run."""
    rows = []
    for name, family in dict.fromkeys((arm.name, arm.family) for arm in arms):
        mine = [found[arm.key] for arm in arms if arm.name == name and arm.key in found]
        row: dict[str, Any] = {"name": name, "family": family, "n": len(mine), "runs": mine}
        for column in columns:
            values = [v for v in (value_of(run["numbers"], column) for run in mine) if v is not None]
            if values:
                deviation = statistics.stdev(values) if len(values) > 1 else 0.0
                row[column] = statistics.mean(values), deviation, len(values)
        rows.append(row)
    return rows


def value_of(numbers: dict[str, Any], column: str) -> float | None:
    """A number by its column; fd and kd are of the first number of Euler steps, fd_250 of that one."""
    generation = numbers["generation"]
    if column in ("fd", "kd"):
        return next(iter(generation.values())).get(column)
    return generation.get("250", {}).get("fd") if column == "fd_250" else numbers.get(column)


def cell(row: dict[str, Any], column: str) -> str:
    if column not in row:
        return ""
    mean, deviation, count = row[column]   # questions 5 and 6 measure seed 0 alone
    return f"{mean:.4g}" + (f" ± {deviation:.2g}" if count > 1 else "")


def against(row: dict[str, Any], reference: dict[str, Any]) -> str:
    """Generation FD of a row over that of another on the seeds that both ran: a ratio for each seed, so
    that what a seed does to both (its data, noise and labels) cancels.
    """
    mine, other = ({run["seed"]: value_of(run["numbers"], "fd") for run in each["runs"]}
                   for each in (row, reference))
    shares = [100 * (mine[seed] / other[seed] - 1) for seed in mine if seed in other]
    if row is reference or not shares:
        return ""
    spread = f" ± {statistics.stdev(shares):.1f}" if len(shares) > 1 else ""
    seeds = f", {len(shares)} seeds" if len(shares) > 1 else ", 1 seed"
    return f", {statistics.mean(shares):+.1f}{spread} % against {reference['name']}{seeds}"


def verdict(rows: list[dict[str, Any]]) -> list[str]:
    """The best setting of each family by generation FD, chosen on the very seeds that are shown."""
    ran = [row for row in rows if "fd" in row]
    best = {family: min((r for r in ran if r["family"] == family), key=lambda r: r["fd"][0])
            for family in dict.fromkeys(row["family"] for row in ran)}
    reference = next(iter(best.values()), None)
    return [f"* best of {family}: {row['name']}, FD {cell(row, 'fd')} (n = {row['n']})"
            f"{against(row, reference)}" for family, row in best.items()]


def optimisers(rows: list[dict[str, Any]]) -> list[str]:
    """Each optimiser and rate of question 9 against the recipe's on the same tokenizer."""
    usual = {row["family"]: row for row in rows if "fd" in row and row["family"] in ("KL", "VE")}
    return [f"* {row['name']}: FD {cell(row, 'fd')}{against(row, usual[row['name'].split()[0]])}"
            for row in rows if "fd" in row and row["name"].split()[0] in usual]


def matched(row: dict[str, Any], others: list[dict[str, Any]]) -> str:
    """FD and PSNR of an arm beside those of another family at the same sigma², interpolated in log sigma²."""
    target, family = row["sigma2"][0], others[0]["family"]
    others = sorted((other for other in others if "sigma2" in other), key=lambda other: other["sigma2"][0])
    pair = next(((a, b) for a, b in zip(others, others[1:])
                 if a["sigma2"][0] <= target <= b["sigma2"][0] > a["sigma2"][0]), None)
    mine = f"* at sigma² {target:.3g}: {row['name']} FD {cell(row, 'fd')}, PSNR {cell(row, 'psnr')} dB; "
    if pair is None:
        return mine + f"no two arms of {family} enclose it"
    low, high = (math.log(other["sigma2"][0]) for other in pair)
    w = (math.log(target) - low) / (high - low)
    fd, psnr = ((1 - w) * pair[0][k][0] + w * pair[1][k][0] for k in ("fd", "psnr"))
    return mine + f"between {pair[0]['name']} and {pair[1]['name']} FD {fd:.4g}, PSNR {psnr:.4g} dB"


def explanations(rows: list[dict[str, Any]]) -> list[str]:
    """Rank correlation over the arms of generation FD with what might explain it."""
    candidates = {"the flow loss": lambda row: row["flow_loss"][0],
                  "the reconstruction FD": lambda row: row["rfd"][0],
                  "the PSNR that noise of half the spread costs": lambda r: r["psnr"][0] - r["psnr_0.5"][0],
                  "the sampler's error over sigma": lambda row: row["sampler_over_sigma"][0]}
    ran, lines = [row for row in rows if "sampler_over_sigma" in row], []
    for name, value in candidates.items() if len(ran) > 2 else ():
        pair = [[f(row) for row in ran] for f in (value, lambda row: row["fd"][0])]
        ranks = [[sorted(values).index(v) for v in values] for values in pair]
        lines.append(f"* rank correlation of FD with {name}: {statistics.correlation(*ranks):.2f} "
                     f"({len(ran)} arms)")
    return lines


def write_table(number: int, rows: list[dict[str, Any]], path: Path) -> None:
    question = QUESTIONS[number]
    shown = [c for c in question.columns if any(c in row for row in rows)] or question.columns[:1]
    heads = " | ".join(COLUMNS[c] for c in shown)
    lines = [f"# {number}. {question.title}", "", f"| arm | seeds | {heads} |",
             "|---|---|" + "---|" * len(shown)]
    lines += [f"| {row['name']} | {row['n']} | " + " | ".join(cell(row, c) for c in shown) + " |"
              for row in rows if row["n"]]
    left_out = [row["name"] for row in rows if not row["n"]]
    lines += ["", f"Not run: {', '.join(left_out)}."] if left_out else []
    say = {3: lambda rows: [], 5: lambda rows: [], 6: explanations, 9: optimisers}.get(number, verdict)
    lines += ["", *say(rows)]
    if number == 4:
        ve = [row for row in rows if row["family"] == "VE"]
        lines += [matched(row, ve) for row in rows if row["n"] and row["family"] != "VE"]
    runs = [run for row in rows for run in row["runs"]]
    sizes = {", ".join(f"{k} {v}" for k, v in run["recipe"].items() if k not in ("features", "smoke"))
             for run in runs}
    if len(sizes) > 1:
        lines += ["", "**Arms of different sizes: not comparable.**"]
    facts = {"size": sizes, "features of FD and KD": {run["features"] for run in runs},
             "Euler steps": {" and ".join(run["numbers"]["generation"]) for run in runs},
             "machine": {run["hardware"] for run in runs}, "date": {run["date"] for run in runs},
             "PyTorch": {run["versions"]["torch"] for run in runs}}
    lines += ["", *(f"{name}: {'; '.join(sorted(values))}  " for name, values in facts.items() if values),
              "mean ± standard deviation over the seeds; flow loss: mean of the last third of training"]
    path.write_text("\n".join(lines) + "\n")


def draw_points(axis: Any, rows: list[dict[str, Any]], question: Question) -> None:
    """One mark for each arm, a line through each family, bars of one standard deviation."""
    for family in dict.fromkeys(row["family"] for row in rows):
        mine = sorted((r for r in rows if r["family"] == family and question.x in r and question.y in r),
                      key=lambda r: r[question.x])
        if mine:
            (x, dx, _), (y, dy, _) = (zip(*(row[k] for row in mine)) for k in (question.x, question.y))
            axis.errorbar(x, y, dy, dx, fmt="o-", ms=5, lw=1.2, capsize=2, label=family)
        for row in mine:
            axis.annotate(row["name"].removeprefix(family).strip(), (row[question.x][0], row[question.y][0]),
                          xytext=(4, 4), textcoords="offset points", fontsize=7)
    wide = [row[question.x][0] for row in rows if question.x in row]
    if wide and min(wide) > 0 and max(wide) > 20 * min(wide):
        axis.set_xscale("log")
    axis.set(xlabel=COLUMNS[question.x], ylabel=COLUMNS[question.y])


def draw_equilibrium(axis: Any, rows: list[dict[str, Any]]) -> None:
    for i, row in enumerate(rows):
        for run in row["runs"]:
            if "bins" in run["curves"]:
                bins, points = run["curves"]["bins"], run["curves"]["points"]
                axis.plot(points["log_t"], points["log_sigma"], ".", ms=2, alpha=0.35, color=f"C{i}")
                axis.plot(bins["log_t"], bins["log_sigma"], "o-", ms=4, color=f"C{i}", label=row["name"])
                eq14 = [(math.log10(run["numbers"]["lambda1"]) - t) / 4 for t in bins["log_t"]]
                label = f"{row['name']}: (lambda1 / T)^(1/4)"
                axis.plot(bins["log_t"], eq14, "--", color=f"C{i}", label=label)
    axis.set(xlabel="log10 T (lines: of the loss, binned; dots: of Eq. 7, elements)", ylabel="log10 sigma")


def draw_robustness(axis: Any, rows: list[dict[str, Any]]) -> None:
    """The decoder's noise curve; a vertical line where the sampler's error is."""
    for i, row in enumerate(rows):
        numbers = [run["numbers"] for run in row["runs"] if "sampler_error" in run["numbers"]]
        for found in numbers[:1]:
            curve = sorted((float(k[5:]), v) for k, v in found.items() if k.startswith("psnr_"))
            axis.plot(*zip(*curve), "o-", ms=3, color=f"C{i}", label=row["name"])
            axis.axvline(found["sampler_error"], color=f"C{i}", ls=":", lw=1)
    axis.set(xlabel="noise / spread (dotted: the sampler's error)", ylabel="PSNR [dB]")


def draw(results: Path) -> None:
    """Every question's table and figure, from RESULTS/arms alone."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    read = [json.loads(path.read_text()) for path in sorted((results / "arms").glob("*.json"))]
    found = {f"{run['arm']} seed {run['seed']}": run for run in read}
    arms = table_of_arms(max(3, *(run["seed"] + 1 for run in read), 0))
    for number, question in QUESTIONS.items():
        columns = tuple(dict.fromkeys((*question.columns, question.x, question.y, "psnr", "sigma2")))
        rows = summarise([arm for arm in arms if number in arm.questions], found, columns)
        write_table(number, rows, results / f"question{number}.md")
        figure, axis = plt.subplots(figsize=(7.5, 5), layout="constrained")
        special = {5: draw_equilibrium, 6: draw_robustness}.get(number)
        special(axis, rows) if special else draw_points(axis, rows, question)
        if axis.get_legend_handles_labels()[0]:
            axis.legend(fontsize=8)
        else:
            axis.text(0.5, 0.5, "not run", ha="center", transform=axis.transAxes)
        axis.set_title(f"{number}. {question.title}", fontsize=10)
        axis.grid(alpha=0.3)
        figure.savefig(results / f"question{number}.png", dpi=110)
        plt.close(figure)
    print(f"{len(found)} arms: wrote question1 to question{len(QUESTIONS)} (.md, .png) in {results}")


# ------------------------------------------------------------------------------------------------------------
# The command.


def estimate(plan: Plan, done: dict[str, Any], euler: list[int]) -> float:
    """CPU-minutes: the trainings as measured if the arm is done, and SECONDS for the rest."""
    r = plan.recipe
    train = sum(done["numbers"][f"{k}_seconds"] if done else SECONDS[f"{k}_step"] * r[f"{k}_steps"]
                for k in ("tokenizer", "dit"))
    images = r["count"] * sum(euler) + (r["measured"] * (FINER + 1) * euler[0]
                                        if {5, 6} & set(plan.arm.questions) and not plan.arm.seed else 0)
    return (train + SECONDS["sample_step"] * images + SECONDS["other"]) / 60


def show_list(plans: list[Plan], results: Path, euler: list[int]) -> None:
    total, trained = 0.0, set()
    print(f"{'arm':32} {'questions':20} {'CPU-min':>8}  done")
    for plan in plans:
        done = is_done(plan, results, euler)
        minutes = estimate(plan, read_result(results, plan.arm) if done else {}, euler)
        if plan.folder("tokenizer") in trained and not done:
            minutes -= SECONDS["tokenizer_step"] * plan.recipe["tokenizer_steps"] / 60
        trained.add(plan.folder("tokenizer"))
        total += 0 if done else minutes
        print(f"{plan.arm.key:32} {' '.join(map(str, plan.arm.questions)):20} {minutes:8.1f}  "
              f"{'yes' if done else 'no'}")
    print(f"{len(plans)} arms, {total / 60:.1f} hours of one busy x86-64 core to go")


def select(arms: list[Arm], wanted: list[str] | None) -> list[Arm]:
    """The arms named (with or without their seed) or of a question's number; all without `wanted`."""
    known = {arm.name for arm in arms} | {arm.key for arm in arms} | {str(n) for n in QUESTIONS}
    for name in wanted or ():
        if name not in known:
            raise InputError(f"--only {name}: no arm or question of that name; see --list")
    return [a for a in arms if not wanted or {a.name, a.key, *map(str, a.questions)} & set(wanted)]


def fitting_jobs() -> int:
    """One process a core, and no more than memory holds at 1.5 GiB each; on one card, eight."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1.5 / 2**30
    return max(1, min(cores, int(memory), 8 if torch.cuda.is_available() else cores))


def parse(argv: list[str] | None) -> argparse.Namespace:
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0],
                                formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    p.add_argument("--list", action="store_true", help="print the arms and their cost, run nothing")
    p.add_argument("--draw", action="store_true", help="redraw tables and figures from the JSON, run nothing")
    p.add_argument("--smoke", action="store_true", help="one tiny arm end to end on the built-in shapes")
    p.add_argument("--only", nargs="+", metavar="NAME", help="arms by name, or questions by number")
    p.add_argument("--data", default="cifar10_subset",
                   help="folder with train/ and val/ of class folders, or cifar10, or shapes")
    p.add_argument("--scale", type=float, default=1.0, help="multiplies the steps of both trainings")
    p.add_argument("--count", type=int, help=f"images sampled; default: {RECIPE['count']}")
    p.add_argument("--euler", type=int, nargs="+", default=[50], metavar="N",
                   help="Euler steps, one set of samples each; add 250 for the paper's")
    p.add_argument("--seeds", type=int, default=3, help="seeds of questions 1, 2 and 8; the others have one")
    p.add_argument("--jobs", type=int, default=fitting_jobs(), help="processes side by side")
    p.add_argument("--device", default="auto", help="auto, cpu, cuda or mps")
    p.add_argument("--out", type=Path, default=Path("runs/experiments"), help="folder of the runs")
    p.add_argument("--results", type=Path, default=Path("results/experiments"),
                   help="folder of JSON, tables and figures")
    p.add_argument("--measure", type=Path, nargs=2, metavar=("DIT", "JSON"),
                   help="questions 5 and 6 of one DiT, on --count images; the arms call this themselves")
    if p.parse_known_args(argv)[0].smoke:
        home = Path("runs/smoke/experiments")
        p.set_defaults(data="shapes", only=["VE 0.1 seed 0"], euler=[2], out=home, results=home / "results")
    return p.parse_args(argv)


def make_recipe(args: argparse.Namespace) -> dict[str, Any]:
    recipe = RECIPE | (SMOKE if args.smoke else {}) | ({"count": args.count} if args.count else {})
    return recipe | {k: max(1, round(args.scale * recipe[k])) for k in ("tokenizer_steps", "dit_steps")}


def check(args: argparse.Namespace) -> None:
    for name in ("scale", "jobs", "seeds", "count"):
        value = getattr(args, name)
        if value is not None and value <= 0:
            raise InputError(f"--{name} must be positive, got {value}")
    if min(args.euler) < 1:
        raise InputError(f"--euler takes numbers of steps, 1 or more, got {min(args.euler)}")
    if args.draw and not list((args.results / "arms").glob("*.json")):
        raise InputError(f"{args.results}/arms holds no results: run some arms first, see --list")


@runtime.command
def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    check(args)
    if args.measure:
        return measure(*args.measure, args.count or RECIPE["measured"], args.euler[0], args.device)
    if args.draw:
        return draw(args.results)
    recipe = make_recipe(args)
    plans = [Plan(arm, recipe, args.data, args.out, args.device)
             for arm in select(table_of_arms(args.seeds), args.only)]
    if args.list:
        return show_list(plans, args.results, args.euler)
    if args.data not in ("shapes", "cifar10") and not Path(args.data, "train").is_dir():
        raise InputError(f"--data {args.data}: no folder with train/ and val/ of class folders in it; "
                         "--data cifar10 takes the whole of CIFAR-10, see the README")
    failures = run_all(plans, args.results, args.euler, args.jobs)
    if list((args.results / "arms").glob("*.json")):
        draw(args.results)
    if failures:
        raise InputError(f"{len(failures)} of {len(plans)} arms stopped; the same command tries them again")


if __name__ == "__main__":
    main()
