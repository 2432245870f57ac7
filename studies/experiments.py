"""When does variance expansion win?  Images, from a poor transformer to a good one.

    laptop   python -m studies.experiments --list       # the arms of the built-in shapes
             python -m studies.experiments --only "KL 1e-6" "VE 1e-3"
             python -m studies.experiments --draw       # tables and the figure
    one GPU  python -m studies.experiments --rung photographs --data DIR

This asks of images what studies/toy_law.py asks of the toy, in the same words.  An
arm is a tokenizer, trained to its end, and one transformer that is looked at after 1,
2, 4 ... 32 units of its training.  A look measures the error e of the transformer
against its last self, what such an error costs the decoder, and what samples are worth.

A finished arm is one JSON file under RESULTS/RUNG/arms, and all tables and figures are
drawn from these alone.  The same command goes on where an earlier one was stopped.  Two
may run side by side if they have other seeds and another --out.
"""

import functools
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import runtime  # before torch, which it tells how threads wait

import numpy as np
import torch
from scipy import stats
from torch import Tensor
from tqdm import tqdm

import checkpoints
import data
import flow
import frozen
import metrics
import models
from runtime import InputError
from studies import answers
from studies.records import (
    Arm, Plan, collect, execute, is_done, is_filled, read_log, result_path, run_stages)

# ------------------------------------------------------------------------------
# The sizes.  `edition` goes up when the code changes what an arm gives.  Trainings are
# in units of dit_steps.  The rate of the preset "small" is constant after its first 100
# steps, so that a longer training begins as a shorter one; its averaged weights stand in
# for a cool-down, as in the toy.  Without `starts`, the times at which real latents enter
# the sampler, there are no looks.  The tokenizers of shapes train three times as long as
# the demo's, which still gain at their end.  32 units are 51 epochs of 20,000 photographs.
# There the transformer sees 2 x 2 positions of the latent at a time, which costs a quarter.

RECIPE: dict[str, Any] = dict(
    edition=3, preset="small", tokenizer_steps=1000, dit_steps=600, batch=32, network="",
    precision="bf16", optimizer="muon", lr="4e-3", euler=50, count=1000, trainings=(1,),
    starts=(), smoke=False)
SMOKE = dict(tokenizer_steps=4, dit_steps=4, batch=4, precision="fp32", euler=2, count=16,
             smoke=True)
LADDER = RECIPE | dict(
    edition=4, trainings=(1, 2, 4, 8, 16, 32), starts=(answers.START,), euler=25, count=2000)
RUNGS = {
    "shapes": LADDER | dict(
        tokenizer_steps=6900, dit_steps=250, network=" --model shapes --ema 0.9999"),
    "photographs": LADDER | dict(
        tokenizer_steps=9000, dit_steps=250, batch=128, network=" --model demo/2 --ema 0.9999")}
# White noise of these sizes, as shares of the spread, is added to real latents.
LEVELS = 0.01, 0.02, 0.03, 0.05, 0.07, 0.1, 0.14, 0.2, 0.3, 0.5, 0.7, 1.0

# ------------------------------------------------------------------------------
# The arms: family, values, flags of the tokenizer.  A latent value stands for 12 pixel
# values, half of the paper's 24, so that the paper's lambda1 = 0.1 is 0.05 here.  The
# weight of the sigma-VAE's mean is LatentLM's.  GAE's noise and normalised latent come
# without its teacher.

NETWORK = "--preset demo --batch 16 --precision bf16"
KL, VE = "--loss kl --kl-weight {}", "--loss ve --lambda1 {}"
TARGET = "--loss ve --target-noise {}"
SIGMA = "--loss sigma --sigma-mode fixed --mean-weight 0.06 --sigma {}"
GAE = "--loss sigma --mean-weight 0 --model gae-demo --sigma {}"
DECLARED = {
    "shapes": [("KL", "1e-6 1e-3", KL), ("VE", "1e-3 1e-2 0.1 1", VE),
               ("sigma-VAE", "0.2 0.1 0.5", SIGMA), ("VE-target", "0.2", TARGET)],
    "photographs": [("KL", "1e-6 1e-2", KL), ("VE", "1e-2 0.1", VE),
                    ("sigma-VAE", "0.2", SIGMA), ("GAE", "0.2", GAE)]}
# The second KL weight of shapes is the best of these at seed 0, which is paired with
# nothing else; that of photographs was the best of three in older runs.
CANDIDATES = {"shapes": [("KL", "1e-4 1e-3 1e-2 0.1 1", KL)], "photographs": []}


def table_of_arms(rung: str, seeds: Sequence[int]) -> list[Arm]:
    """All arms of a seed before those of the next, so that a part of the list is paired."""
    return [Arm(family, value, f"{NETWORK} {flags.format(value)}", seed)
            for seed in seeds
            for family, values, flags in (DECLARED if seed else CANDIDATES)[rung]
            for value in values.split()]


# ------------------------------------------------------------------------------
# What a look is made of.  Latents are in the transformer's units, which are their spread.


def size(errors: Tensor) -> float:
    """e: the median length of errors [n, ...] over that of N(0, I), as in the toy."""
    lengths = errors.flatten(1).double().norm(dim=1)
    return lengths.median().item() / float(stats.chi.median(errors[0].numel()))


def carry(velocity: flow.Velocity, x_t: Tensor, t: float, steps: int) -> Tensor:
    """Integrate from t to 1, in steps that are about as long as `steps` from 0 would be."""
    count = max(1, round((1 - t) * steps))
    return flow.euler(lambda x, s: (1 - t) * velocity(x, t + (1 - t) * s), x_t, count)


def normal_like(errors: Tensor, g: torch.Generator) -> Tensor:
    """Normal noise [n, C, h, w] whose channels have the second moments of the errors'."""
    rows = errors.movedim(1, -1).double().cpu()
    moments = torch.cov(rows.flatten(0, -2).T, correction=0)
    mean = rows.flatten(0, -2).mean(0)
    root = metrics.Gaussian(len(rows), mean, moments + torch.outer(mean, mean)).root
    noise = torch.randn(rows.shape, generator=g, dtype=rows.dtype) @ root.T
    return noise.movedim(-1, 1).to(errors)


def distance_in_sigmas(z: Tensor, mean: Tensor, std: Tensor) -> float:
    """Median RMS distance of z [N, ...] to the nearest posterior [M, ...], in its sigmas.

    A collapsed sigma counts as a thousandth of the spread, or it alone would decide.
    """
    z, mean, std = (a.flatten(1).double() for a in (z, mean, std))
    weight = 1 / std.clamp(min=1e-3).square()
    square = z.square() @ weight.T - 2 * z @ (mean * weight).T + (mean.square() * weight).sum(1)
    return (square.amin(1).clamp(min=0) / z.shape[1]).sqrt().median().item()


class Bench:
    """A tokenizer, n held-out images with their latents, and n training images.

    z, mean, std   of the held-out images' posteriors
    known          mean and std of the training images' posteriors
    reference      the Gaussian of the training images' features, for FD
    """

    def __init__(self, tokenizer: Path, dit: Path, n: int, seed: int, device: torch.device):
        runtime.exact_products()
        self.tokenizer, origin = checkpoints.load_tokenizer(tokenizer)
        self.tokenizer.to(device)
        file, config, self.seed = checkpoints.read(dit, "dit"), origin["config"], seed
        self.centre, self.spread = (file[f"latent_{k}"].to(device) for k in ("mean", "std"))
        self.net = frozen.load_features("auto", config["data"], config["size"], device)
        found = {}
        for split in "train", "val":
            images = data.open_dataset(config["data"], config["size"], split, config["seed"])
            parts = [(part["pixels"], part["y"], *self.posterior(part["pixels"]))
                     for part in data.once(images, 64, limit=n, device=device)]
            found[split] = [torch.cat(column) for column in zip(*parts)]
        pixels, _, *self.known = found["train"]
        self.reference = self.features(pixels)[0]
        self.pixels, self.y, self.mean, self.std = found["val"]
        eps, scale = self.noise("z", self.mean), self.noise("scale", self.mean[:, 0, 0, 0])
        self.z = self.tokenizer.sample(self.mean, self.std, eps, scale)

    def noise(self, name: str, like: Tensor) -> Tensor:
        return torch.randn(like.shape, generator=runtime.generator(self.seed, name)).to(like)

    def posterior(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        mean, logvar = self.tokenizer.posterior(data.from_uint8(pixels))
        return (flow.normalize(mean, self.centre, self.spread),
                (logvar / 2).exp() / self.spread[:, None, None])

    def decode(self, z: Tensor) -> Tensor:
        """The pictures of latents, uint8."""
        parts = flow.denormalize(z, self.centre, self.spread).split(64)
        return torch.cat([data.to_uint8(self.tokenizer.decode(part)) for part in parts])

    def features(self, pixels: Tensor) -> tuple[metrics.Gaussian, Tensor]:
        moments, rows = metrics.Moments(), torch.cat([self.net(p)[0] for p in pixels.split(64)])
        moments.add(rows)
        return moments.fit(), rows

    def score(self, pixels: Tensor, y: Tensor) -> dict[str, float]:
        """FD; for shapes also the share in % in which the judge does not see y."""
        gaussian, rows = self.features(pixels)
        found = {"fd": metrics.frechet_distance(self.reference, gaussian)}
        if self.net.name == "Shapes":
            sure = metrics.recognised(self.net.head(rows).softmax(1), y)
            found["invalid"] = 100 * (1 - sure)
        return found

    def judge(self, z: Tensor, y: Tensor) -> dict[str, float]:
        """Scores, the error of a round trip through the picture, and how near real z are."""
        pixels = self.decode(z)
        return self.score(pixels, y) | {"round_trip": size(self.posterior(pixels)[0] - z),
                                        "distance": distance_in_sigmas(z, *self.known)}

    def real(self) -> dict[str, Any]:
        """Real latents, where a perfect transformer would end; and the images themselves.

        sigma   the root mean square of the noise in the median channel, because a channel
                that says nothing is all noise
        curve   what white noise on these latents costs, for each of LEVELS: the PSNR that
                is lost, the squared error of pixels that is added, and the scores
        """
        per_channel = self.std.square().mean((0, 2, 3)).sqrt()
        pixels, noise = self.decode(self.z), self.noise("white", self.z)
        psnr, square = self.fidelity(pixels)
        curve = []
        for level in LEVELS:
            noisy = self.decode(self.z + level * noise)
            lost, added = self.fidelity(noisy)
            curve.append({"e": level, "lost": psnr - lost, "added": added - square,
                          **self.score(noisy, self.y)})
        return {"sigma": per_channel.quantile(0.5).item(), "sigmas": per_channel.tolist(),
                "psnr": psnr, "square": square, **self.judge(self.z, self.y), "curve": curve,
                "images": self.score(self.pixels, self.y)}

    def fidelity(self, pixels: Tensor) -> tuple[float, float]:
        """Mean PSNR, and mean squared error, against the images in [0, 1]."""
        pairs = zip(pixels.split(64), self.pixels.split(64))
        square = [(a.float() - b.float()).div(255).square().mean().item() * len(a)
                  for a, b in pairs]
        return metrics.psnr(pixels, self.pixels).mean().item(), sum(square) / len(pixels)

    def ends(self, dit: models.DiT, starts: Sequence[float], steps: int,
             precision: str) -> dict[str, Tensor]:
        """Latents that a transformer makes: from noise, and from real ones noised to t.

        "generated", of classes in turn, and under each time t the ends of the real z.  All
        transformers of all arms of a seed start from the same noise.
        """
        null = dit.config["num_classes"]
        turns = torch.arange(len(self.z), device=self.z.device) % null

        def end(x_t: Tensor, labels: Tensor, t: float) -> Tensor:
            parts = zip(x_t.split(100), labels.split(100))
            with torch.autocast(self.z.device.type, torch.bfloat16, enabled=precision == "bf16"):
                return torch.cat([carry(flow.guided_velocity(dit, y, null, 1.0), part, t, steps)
                                  for part, y in parts])

        found = {"generated": end(self.noise("samples", self.z), turns, 0.0)}
        for t in starts:
            x_t = flow.interpolate(self.z, self.noise("starts", self.z), self.z.new_tensor([t]))
            found[str(t)] = end(x_t, self.y, t)
        return {"y": turns} | found

    def look(self, ends: dict[str, Tensor], last: dict[str, Tensor]) -> dict[str, Any]:
        """All that is measured of a transformer, from its ends and its last self's.

        Even a perfect flow does not lead a noised z back to it: what the noise has hidden,
        it finds anew.  So e is not the distance from z.  It is that from the ends of the
        same transformer after the longest training, whose own error is not known.

        generated  its samples, from noise, and their e
        starts     for each t: e; the distance from z; the scores of the ends; those of real
                   latents with normal noise like the errors; and with the errors of others
        """
        made, longest = (of["generated"].to(self.z) for of in (ends, last))
        found: dict[str, Any] = {"starts": {}, "generated": {
            "e": size(made - longest), **self.judge(made, ends["y"].to(self.y))}}
        for t in ends.keys() - {"generated", "y"}:
            reached = ends[t].to(self.z)
            errors = reached - last[t].to(self.z)
            noise = normal_like(errors, runtime.generator(self.seed, "injected"))
            found["starts"][t] = {
                "e": size(errors), "from_z": size(reached - self.z),
                "ends": self.score(self.decode(reached), self.y),
                "injected": self.score(self.decode(self.z + noise), self.y),
                "moved": self.score(self.decode(self.z + errors.roll(1, 0)), self.y)}
        return found


# ------------------------------------------------------------------------------
# Running.  What is done is not done again.


@torch.no_grad()
def look_at(plan: Plan, say: Callable[[str], None]) -> dict[str, Any]:
    """Real latents, and a row for each training.  Ends and looks have files of their own."""
    r, device, scores = plan.recipe, runtime.start(plan.device).device, plan.folder("scores")
    last = plan.looks()[r["trainings"][-1]]
    bench = functools.cache(lambda: Bench(
        plan.folder("tokenizer") / "checkpoint.pt", last, r["count"], plan.arm.seed, device))
    for training, copy in plan.looks().items():
        path = scores / f"ends-{training}.pt"
        if not is_filled(path):
            say(f"{plan.arm.key}: samples after {training} x {r['dit_steps']} steps")
            dit, _ = checkpoints.load_dit(copy)
            ends = bench().ends(dit.to(device), r["starts"], r["euler"], r["precision"])
            checkpoints.save({name: a.cpu().half() if a.is_floating_point() else a.cpu()
                              for name, a in ends.items()}, path)
    rows = []
    for training in (0, *r["trainings"]):
        path = scores / f"look-{training}.json"
        if not is_filled(path):
            say(f"{plan.arm.key}: a look at {training} x {r['dit_steps']} steps")
            ends, best = (checkpoints.read(scores / f"ends-{k or 1}.pt")
                          for k in (training, r["trainings"][-1]))
            row = bench().look(ends, best) if training else bench().real()
            runtime.write_json(path, {"training": training} | row)
        rows.append(runtime.read_json(path))
    held_out = [line for line in read_log(plan.folder("tokenizer")) if "held_out" in line]
    return {"real": rows[0], "rows": rows[1:],
            "tokenizer": [[line["step"], line["held_out"]["psnr_mean"]] for line in held_out]}


def run_arm(plan: Plan, results: Path, say: Callable[[str], None]) -> None:
    """The stages and looks that are not done, and the file of the arm."""
    run_stages(plan, execute, say)
    found = collect(plan) | (look_at(plan, say) if plan.recipe["starts"] else {})
    runtime.write_json(result_path(results, plan.arm), found)
    shutil.rmtree(plan.folder("tokenizer") / "latents", ignore_errors=True)   # 100 MB


@runtime.command
def main(argv: list[str] | None = None) -> None:
    p = runtime.Parser(__doc__)
    add = p.add_argument
    add("--list", action="store_true", help="print the arms, run nothing")
    add("--draw", action="store_true", help="redraw tables and the figure, run nothing")
    add("--rung", choices=RUNGS, default="shapes", help="the images, and the sizes of networks")
    add("--only", nargs="+", metavar="NAME", help="arms by name, with or without a seed")
    add("--seeds", type=runtime.seed, nargs="+", default=[0, 1, 2, 3],
        help="0: KL weights to choose from; others: all arms")
    add("--data", help="a folder, cifar10 or shapes; else shapes, or cifar10 for photographs")
    add("--device", default="auto", help="auto, cpu, cuda or mps")
    add("--compile", action="store_true", help="torch.compile the trainings, on a CPU as well")
    add("--out", type=Path, default=Path("runs/law"), help="folder of the runs")
    add("--results", type=Path, default=Path("results/law"), help="folder of what is found")
    add("--smoke", action="store_true", help="one tiny arm of shapes")
    args = p.parse(argv, smoke=dict(only=["VE 1e-3"], seeds=[1], out=Path("runs/smoke/law"),
                                    results=Path("runs/smoke/law/results")))
    results = args.results / args.rung
    if args.draw:
        return answers.draw(results, args.rung)
    recipe = RUNGS[args.rung] | (SMOKE | dict(trainings=(1, 2)) if args.smoke else {})
    source = args.data or ("shapes" if args.rung == "shapes" else "cifar10")
    training = " --compile" * args.compile
    plans = [Plan(arm, recipe, source, args.out, args.device, training)
             for arm in table_of_arms(args.rung, args.seeds)]
    known = {name for plan in plans for name in (plan.arm.name, plan.arm.key)}
    if unknown := set(args.only or ()) - known:
        raise InputError(f"--only {min(unknown)}: no arm has that name; see --list")
    plans = [plan for plan in plans
             if not args.only or {plan.arm.name, plan.arm.key} & {*args.only}]
    if args.list:
        for plan in plans:
            print(f"{plan.arm.key:24} {'done' if is_done(plan, results) else ''}")
        return
    if source not in ("shapes", "cifar10") and not Path(source).is_dir():
        raise InputError(f"--data {source} is not a folder: see RESULTS.md")
    if source not in ("shapes", "cifar10") and (
            data.open_dataset(source, 32, "val").labels(np.array([0])) < 0).any():
        raise InputError(f"--data {source} has held-out images without labels: a look needs them "
                         "in one folder for each class")
    rt = runtime.start(args.device)
    runtime.claim(rt, args.out, results / "law.md")
    failed = []   # the others are run all the same
    bar = tqdm([plan for plan in plans if not is_done(plan, results)], "arms")
    for plan in bar:
        try:
            run_arm(plan, results, bar.write)
        except InputError as error:
            failed.append(str(error))
            bar.write(failed[-1])
    if failed:
        raise InputError(failed[-1])
    answers.draw(results, args.rung)


if __name__ == "__main__":
    main()
