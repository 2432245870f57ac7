"""Does a card compute what a CPU computes, and how fast?  Nothing is downloaded.

    one card or more   python -m studies.gpu                   # eight minutes, by estimate
                       python -m studies.gpu --only tokenizer sampling
    laptop             python -m studies.gpu --smoke           # every line, tiny, on the CPU

The checks come first, and each states the difference it allows.  Then every rate
stands beside that of matrix products in the same run.  results/gpu/NAME.json and
NAME.png are named after the card; a part that runs again replaces its old numbers.
"""

import copy
import functools
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext, redirect_stderr, redirect_stdout
from dataclasses import dataclass, replace
from functools import partial, partialmethod
from io import StringIO
from pathlib import Path
from typing import Any
from unittest import mock

import runtime  # before torch, because it says how idle threads wait

import numpy as np
import torch
from matplotlib import pyplot as plt
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import checkpoints
import evaluate
import flow
import frozen
import losses
import models
import sample
import toy2d
import train_dit
import train_tokenizer
from objectives import blocks_of
from runtime import InputError, Runtime
from studies import benchmark

# ------------------------------------------------------------------------------
# What is measured, on a card and with --smoke.


@dataclass(frozen=True)
class Sizes:
    """small: rows of models whose values are compared, transformers with two narrow blocks.
    images: of a tokenizer's step, as the paper has them on each card.
    transformers: rows of models.DITS, and the images of a step on one card.
    guided: the transformers that sample, `at_once` images in `euler` steps.
    toy: the iterations between which it is timed; recipe: what its preset has otherwise.
    """
    small: tuple[str, ...] = ("demo", "vit-demo", "dgae-demo", "B", "DiT-B")
    tokenizers: tuple[str, ...] = ("f16d16", "f16d32")
    size: int = 256
    images: int = 8
    transformers: tuple[tuple[str, int], ...] = (("B", 128), ("L", 128), ("XL", 192))
    guided: tuple[str, ...] = ("B", "XL")
    at_once: int = 100
    euler: int = 10
    toy: tuple[int, int] = (300, 1300)
    recipe: tuple[tuple[str, int], ...] = ()
    repeats: int = 5


TINY = Sizes(("demo", "B"), ("demo",), 32, 1, (("demo", 2),), ("demo",), 2, 4, (1, 2), (
    ("width", 16), ("tokenizer_batch", 16), ("flow_batch", 16), ("points", 16)), 1)
CPU = torch.device("cpu")

# Relative differences that are allowed: of values in fp32, whose sums have another
# order; of what follows some steps of a training; and of values in bfloat16, which
# rounds every number by up to 0.4 %.
FP32, STEPS, NUMBERS, BF16 = 1e-4, 2e-3, 2e-2, 1e-1


@dataclass(frozen=True)
class Run:
    """The device and the sizes of all parts, and a folder for what the stages write."""
    rt: Runtime
    sizes: Sizes
    folder: Path

    def bench(self, model: str, batch: int, compiled: bool) -> benchmark.Bench:
        return benchmark.Bench(self.rt, model, batch, "auto", compiled, self.sizes.repeats)


Row = dict[str, Any]


def check(name: str, difference: float, bound: float) -> Row:
    return {"check": name, "difference": difference, "bound": bound,
            "passed": difference <= bound}   # a NaN is not


def difference(a: Tensor, b: Tensor) -> float:
    """|a - b| / |b|, of all numbers together; NaN where there are none."""
    a, b = a.double().cpu(), b.double().cpu()
    return ((a - b).norm() / b.norm().clamp(min=1e-30)).item() if len(b) else float("nan")


def farthest(a: Tensor, b: Tensor) -> float:
    """The largest |a - b| / |b| of a number, of which some are a thousand times others."""
    a, b = a.double().cpu(), b.double().cpu()
    return ((a - b).abs() / b.abs().clamp(min=1e-3)).max().item()


@contextmanager
def exact() -> Iterator[None]:
    """float32 is float32, without the shorter TF32, and stages cannot change it."""
    before = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    runtime.exact_products()
    try:
        with mock.patch.object(torch, "set_float32_matmul_precision"):
            yield
    finally:
        torch.set_float32_matmul_precision(before[0])
        torch.backends.cudnn.allow_tf32 = before[1]


@functools.cache
def lpips() -> nn.Module:
    """With random weights, which are as fast as trained ones."""
    torch.manual_seed(0)
    net = frozen.lpips.LPIPS(pretrained=False, pnet_rand=True, net="vgg", verbose=False)
    return net.eval().requires_grad_(False)


# ------------------------------------------------------------------------------
# Values: the losses and the networks, with their gradients, on the card and on the CPU.


def loss_values(device: torch.device, dtype: torch.dtype) -> Tensor:
    """Every loss of random [4, 8, 16, 16] numbers."""
    draws = torch.randn(3, 4, 8, 16, 16, generator=runtime.generator(0, "losses"))
    a, b, c = draws.to(device, dtype)
    values = [loss(a, b) for loss in (
        losses.absolute_error, losses.squared_error, losses.kl_divergence,
        losses.hinge_discriminator, losses.marginal_cosine, losses.marginal_distance_matrix,
        flow.flow_matching, flow.cosine_velocity)]
    values += [loss(c) for loss in (
        losses.inverse_variance, losses.exponential_magnitude, losses.log_entropy,
        losses.negative_variance, losses.square_magnitude, losses.hinge_generator)]
    return torch.stack(values)


def networks(small: tuple[str, ...]) -> dict[str, tuple[nn.Module, list[Tensor]]]:
    """These rows of models, and two more, and what they get."""
    draws = runtime.generator(0, "inputs")
    latents = dict(depth=2, width=128, heads=4, in_channels=8, input_size=8, num_classes=10)
    x, noise = torch.randn(2, 4, 3, 32, 32, generator=draws)
    eps = torch.randn(4, 8, 8, 8, generator=draws)
    t, y = torch.rand(4, generator=draws), torch.arange(4)
    torch.manual_seed(0)
    found: dict[str, tuple[nn.Module, list[Tensor]]] = {}
    for row in small:
        if row in models.AUTOENCODERS:
            config = models.AUTOENCODERS[row] | dict(noise="learned", sigma=0.0)
            more = [noise, t] if "dgae" in row else []
            found[row] = models.build_tokenizer(config), [x, eps, t, *more]
        else:
            found[row] = models.build_dit(models.DITS[row] | latents), [eps, t, y]
    found |= {"discriminator": (models.PatchGAN(), [x]), "LPIPS": (lpips(), [x, noise])}
    for net, _ in found.values():
        for p in net.parameters():   # without those that begin as zero
            if p.ndim > 1 and not p.any():
                nn.init.normal_(p, std=0.02)
    return found


def answers(net: nn.Module, inputs: list[Tensor], rt: Runtime, precision: str,
            compiled: bool = False) -> Tensor:
    """All outputs, and the gradient of their mean square at all parameters and images."""
    net = copy.deepcopy(net).to(rt.device)
    rt.compile(compiled, *(blocks_of(net) or getattr(net, "blocks", [net])))
    inputs = [a.to(rt.device) for a in inputs]
    inputs[0] = inputs[0].clone().requires_grad_()
    with rt.autocast(precision):
        found = net(*inputs)
    outputs = [a.float() for a in (found if isinstance(found, tuple) else [found])]
    learned = [p for p in (inputs[0], *net.parameters()) if p.requires_grad]
    gradients = torch.autograd.grad(sum(a.square().mean() for a in outputs), learned,
                                    allow_unused=True)
    pull = torch.cat([a.flatten() for a in gradients if a is not None])
    return torch.cat([(a / a.norm()).flatten().cpu() for a in (*outputs, pull)]).detach()


def values(run: Run) -> list[Row]:
    here, rows = Runtime(CPU), []
    with exact():
        expected = loss_values(CPU, torch.float64)
        found = loss_values(run.rt.device, torch.float32).double().cpu()
        worst = ((found - expected) / expected).abs().max().item()
        rows.append(check("losses, fp32, against the CPU's float64", worst, FP32))
        for name, (net, inputs) in networks(run.sizes.small).items():
            eager = answers(net, inputs, run.rt, "fp32")
            for what, bound, other in (
                    ("fp32, against the CPU", FP32, (here, "fp32")),
                    ("bf16, against fp32", BF16, (run.rt, "bf16")),
                    ("compiled, against eager", FP32, (run.rt, "fp32", True))):
                # LPIPS is always in fp32, and DGAE's many blocks would compile for minutes.
                if (name, other[1:]) not in (("LPIPS", ("bf16",)), ("dgae-demo", ("fp32", True))):
                    found = answers(net, inputs, *other)
                    rows.append(check(f"{name}, {what}", difference(found, eager), bound))
    return rows


# ------------------------------------------------------------------------------
# Stages: a few steps of each on the card and on the CPU, from the same noise; and a
# training that goes on.  All of them learn the built-in images.


def on_cpu(draw: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Noise that does not depend on the device."""
    def drawn(shape: Any, rt: Runtime, *stream: Any) -> Tensor:
        return draw(shape, replace(rt, device=CPU), *stream).to(rt.device)
    return drawn


@contextmanager
def comparable() -> Iterator[None]:
    """The same noise everywhere, LPIPS without its file, and nothing compiled."""
    with ExitStack() as stack:
        for name in ("global_randn", "global_rand"):
            stack.enter_context(mock.patch.object(runtime, name, on_cpu(getattr(runtime, name))))
        stack.enter_context(mock.patch.object(frozen, "load_lpips", lambda: copy.deepcopy(lpips())))
        stack.enter_context(mock.patch.object(nn.Module, "compile", lambda *_, **__: None))
        stack.enter_context(exact())
        yield


def stage(main: Callable[[list[str]], Any], *flags: Any) -> None:
    """Run a stage quietly; what it says is shown if it fails."""
    said = StringIO()
    try:
        with redirect_stdout(said), redirect_stderr(said):
            main([str(flag) for flag in flags])
    except BaseException:
        print(said.getvalue(), file=sys.stderr)
        raise
    finally:
        runtime.signals.waits = False   # a stage ends with it set, for its own last lines


def dit_flags(run: Run, out: str, steps: int) -> list[Any]:
    return ["--smoke", "--preset", "small", "--precision", "fp32",
            "--tokenizer", run.folder / "cpu/tokenizer/checkpoint.pt", "--steps", steps,
            "--cache", run.folder / "latents", "--save-every", 100, "--out", run.folder / out]


def logged(folder: Path) -> Tensor:
    """The numbers of every line of a log, but for the memory."""
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()[1:]]
    return torch.tensor([v for line in lines for k, v in line.items()
                         if isinstance(v, float) and k != "memory_gib"])


def four_stages(run: Run, device: torch.device) -> dict[str, Tensor]:
    """What each stage has written.  All but the first go on from the CPU's files."""
    kind, home = device.type, run.folder / device.type
    given = run.folder / "cpu"
    stage(train_tokenizer.main, "--smoke", "--preset", "small", "--model", "demo", "--steps", 2,
          "--batch", 4, "--precision", "fp32", "--device", kind, "--out", home / "tokenizer",
          "--perceptual-weight", 1, "--disc-weight", 0.5, "--disc-start", 0)
    stage(train_dit.main, *dit_flags(run, f"{kind}/dit", 2), "--device", kind)
    stage(sample.main, "--smoke", "--precision", "fp32", "--device", kind, "--seed", 1,
          "--dit", given / "dit/checkpoint.pt", "--out", home / "samples")
    stage(evaluate.main, "--smoke", "--device", kind,
          "--tokenizer", given / "tokenizer/checkpoint.pt", "--out", home / "evaluation")
    scores = json.loads((home / "evaluation/results.json").read_text())
    return {"train_tokenizer.py": logged(home / "tokenizer"), "train_dit.py": logged(home / "dit"),
            "sample.py": torch.from_numpy(np.load(home / "samples/samples.npz")["arr_0"]).float(),
            "evaluate.py": torch.tensor([v for row in scores for v in row["metrics"].values()])}


def learned(folder: Path) -> Tensor:
    """The averages of a transformer's gradients, which are as exact as these."""
    state = checkpoints.read(folder / "checkpoint.pt", "dit", resume=True)
    rows = state["optimizers"][0]["state"].values()
    return torch.cat([row["exp_avg"].flatten() for row in rows])


def stages(run: Run) -> list[Row]:
    device = run.rt.device
    with comparable():
        expected, found = four_stages(run, CPU), four_stages(run, device)
        rows = []
        for name, numbers in expected.items():
            of_a_log = name.startswith("train")
            measure, bound = (farthest, NUMBERS) if of_a_log else (difference, STEPS)
            rows.append(check(f"{name}, fp32, against the CPU", measure(found[name], numbers),
                              bound))
        for name, steps in (("whole", 4), ("again", 4), ("parts", 2), ("parts", 4)):
            stage(train_dit.main, *dit_flags(run, name, steps), "--device", device.type)
    whole, again, parts = (learned(run.folder / name) for name in ("whole", "again", "parts"))
    # Some of a card's sums have no fixed order, so that two whole runs differ as well.
    bound = 0.0 if device.type == "cpu" else max(FP32, 4 * difference(again, whole))
    return rows + [check("train_dit.py, resumed after 2 of 4 steps", difference(parts, whole),
                         bound)]


def processes(run: Run) -> list[Row]:
    """torchrun on all cards.  After a checkpoint its first process is killed, and one
    process alone goes on."""
    count = torch.cuda.device_count() or 1
    out, kind = run.folder / "killed", run.rt.device.type
    with comparable():
        if not (run.folder / "cpu/tokenizer").exists():
            four_stages(run, CPU)
    flags = ["--batch", 8 * count, "--save-every", 2, "--no-compile", "--device", kind]
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone",
               f"--nproc_per_node={count}", "train_dit.py", *dit_flags(run, "killed", 10**6)]
    with subprocess.Popen([*map(str, command + flags)], cwd=runtime.HERE, text=True,
                          stdout=subprocess.DEVNULL, stderr=subprocess.PIPE) as job:
        end = time.monotonic() + 120
        while job.poll() is None and time.monotonic() < end:
            if (out / "checkpoint.pt").exists():   # torchrun ends the other processes
                owner = re.search(r"process (\d+)", (out / ".lock").read_text())
                os.kill(int(owner[1]), signal.SIGKILL)   # type: ignore[index]
                break
            time.sleep(0.05)
        else:
            job.terminate()
        _, said = job.communicate(timeout=120)
    if not (out / "checkpoint.pt").exists():
        raise InputError("torchrun has made no checkpoint: " + said.strip().split("\n")[-1])
    done = checkpoints.read(out / "checkpoint.pt")["step"] + 2
    for name in ("killed", "alone"):
        stage(train_dit.main, *dit_flags(run, name, done), *flags)
    return [check(f"train_dit.py, by {count} processes, killed, and resumed by one",
                  difference(learned(out), learned(run.folder / "alone")), STEPS)]


# ------------------------------------------------------------------------------
# Rates.  `share` is that of the largest rate of matrix products in the same precision.


def measured(bench: benchmark.Bench, arms: benchmark.Arms, flop: dict[str, float],
             name: str, count: bool = False) -> list[Row]:
    """Images a second, the share, and the peak memory of each arm.

    count: its FLOP are not known yet, and are counted.
    """
    memory = {}
    for arm, step in arms.items():
        if bench.rt.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(bench.rt.device)
        with FlopCounterMode(display=False) if count else nullcontext() as counter:
            step()
        if count:
            flop[arm] = counter.get_total_flops()
        memory[arm] = runtime.peak_memory(bench.rt.device)
    found = bench.shares(arms, flop)
    return [{"case": f"{name} {arm}".strip(), "compiled": bench.compiled, "images": bench.batch,
             "seconds": row["seconds"], "images_per_second": bench.batch / row["seconds"],
             "share": row["share_of_matrix_rate"], "memory_gib": memory[arm],
             "matrix_tflop_per_second": found["matrix_gflop_per_second"] / 1e3}
            for arm, row in found["arms"].items()]


def tokenizer(run: Run) -> list[Row]:
    """A step of Eq. 11 alone, with a discriminator, with LPIPS, and with both."""
    rows, flop = [], {}
    for model in run.sizes.tokenizers:
        for compiled in (False, True):
            bench = run.bench(model, run.sizes.images, compiled)
            others = models.PatchGAN(), copy.deepcopy(lpips())
            with mock.patch.object(models, "PatchGAN", lambda: others[0]), \
                    mock.patch.object(frozen.lpips, "LPIPS", lambda **_: others[1]):
                net, step = benchmark.tokenizer_step(bench, run.sizes.size)
            arms = {name: partial(step, "GAN" in name, "LPIPS" in name)
                    for name in ("", "GAN", "LPIPS", "GAN + LPIPS")}
            run.rt.compile(compiled, *blocks_of(net), *others)
            rows += measured(bench, arms, flop, model, count=not compiled)
    return rows


def transformer(run: Run) -> list[Row]:
    """A step of train_dit.py, with its clipping, its optimisers and its average."""
    rows = []
    for model, images in run.sizes.transformers:
        net, (z, eps, t, y) = benchmark.build_dit(run.bench(model, images, False))
        kept = runtime.kept_of_latent(net.config, "bf16")
        numbers = sum(p.numel() for p in net.parameters())
        parts, _ = runtime.fit(run.rt, images, kept, numbers, None, False)
        z, eps, t, y = (a[:images // parts] for a in (z, eps, t, y))
        x_t, v = flow.interpolate(z, eps, t), flow.velocity(z, eps)
        for kind, compiled in (("adamw", False), ("adamw", True), ("muon", True)):
            bench = run.bench(model, images // parts, compiled)
            learner = train_dit.Learner(net, kind, 1e-4, [0.9, 0.95], 0.9999)
            run.rt.compile(compiled and kind == "adamw", *net.blocks)

            def step() -> None:
                with bench.autocast():
                    v_hat = net(x_t, t, y)
                (flow.flow_matching(v_hat, v) + flow.cosine_velocity(v_hat, v)).backward()
                nn.utils.clip_grad_norm_(net.parameters(), 1.0)
                learner.step(1e-4)

            flop = {kind: 6.0 * benchmark.multiply_adds(net.config) * bench.batch}
            rows += measured(bench, {kind: step}, flop, model)
            del learner
    return rows


def sampling(run: Run) -> list[Row]:
    """Euler's steps with guidance in the paper's interval, and everywhere."""
    rows, steps = [], run.sizes.euler
    for model in run.sizes.guided:
        net, (_, noise, _, y) = benchmark.build_dit(run.bench(model, run.sizes.at_once, False))
        for compiled in (False, True):
            bench = run.bench(model, run.sizes.at_once, compiled)
            run.rt.compile(compiled, *net.blocks)
            seen: list[int] = []

            def network(x: Tensor, t: Tensor, y: Tensor) -> Tensor:
                seen.append(len(x))
                with bench.autocast():
                    return net(x, t, y)

            arms, flop = {}, {}
            for name, interval in (("inside", benchmark.INTERVAL), ("everywhere", (0.0, 1.0))):
                field = flow.guided_velocity(network, y, benchmark.CLASSES, benchmark.GUIDANCE,
                                             interval)
                arms[name] = partial(flow.euler, field, noise, steps, benchmark.SHIFT)
                seen.clear()
                arms[name]()
                flop[name] = 2.0 * benchmark.multiply_adds(net.config) * sum(seen)
            found = measured(bench, arms, flop, f"{model} sampling")
            rows += [row | {"images_per_second": row["images_per_second"] * steps / 250}
                     for row in found]   # in the paper's 250 steps
    return rows


def toy(run: Run) -> list[Row]:
    """Minutes of an arm of the toy's paper preset, from some of its iterations."""
    recipe, (first, last) = toy2d.PRESETS["paper"] | dict(run.sizes.recipe), run.sizes.toy
    few = recipe | dict(tokenizer_steps=last + 1, flow_steps=last + 1)
    model = toy2d.Model(toy2d.ARMS[-1], recipe["width"]).to(run.rt.device)
    batches, rows = toy2d.batches, []
    for name, train in (("tokenizer", toy2d.train_tokenizer), ("flow", toy2d.train_flow)):
        seen: list[float] = []

        def timed(*given: Any) -> Iterator[Any]:
            for step, batch in enumerate(batches(*given)):
                if step in (first, last):
                    seen.append(run.bench("", 0, False).now())
                yield batch

        with mock.patch.object(toy2d, "batches", timed):
            train(model, few)
        minutes = (seen[1] - seen[0]) / (last - first) * recipe[f"{name}_steps"] / 60
        rows.append({"case": f"toy {name}", "minutes": minutes})
    return rows


PARTS: dict[str, Callable[[Run], list[Row]]] = {
    "values": values, "stages": stages, "processes": processes, "tokenizer": tokenizer,
    "transformer": transformer, "sampling": sampling, "toy": toy}


# ------------------------------------------------------------------------------
# The page.  A row of the paper takes its FLOP, which studies/costs.py has counted, at
# the share of the nearest case.  Reading images, and processes that talk, are left out.

TABLES = [   # row of the paper, preset, its share of the preset's steps, case
    ("1: LDM f16d16, 10 epochs", "ldm-f16d16", 1, "f16d16 GAN + LPIPS"),
    ("1: VA-VAE f16d32, 16 epochs", "vavae-f16d32", 1, "f16d32 GAN + LPIPS"),
    ("1: VA-VAE f16d32, 50 epochs", "vavae-f16d32", 50 / 16, "f16d32 GAN + LPIPS"),
    ("1: DiT-B", "dit-b", 1, "B adamw"),
    ("1: LightningDiT-B, 80 epochs", "lightningdit-b", 1, "B adamw"),
    ("1: LightningDiT-B, 160 epochs", "lightningdit-b-plus", 1, "B adamw"),
    ("2: a tokenizer, 5 epochs", "ldm-f16d16", 5 / 10, "f16d32 GAN + LPIPS"),
    ("3: LightningDiT-XL, 530 epochs", "lightningdit-xl-sota", 1, "XL muon"),
    ("4: VA-VAE, fine-tuned", "vavae-f16d32-finetune", 1, "f16d32 GAN + LPIPS")]


def hours(rates: list[Row]) -> list[Row]:
    """Of the rows of the paper whose case was measured."""
    costs = {row["preset"]: row for row in runtime.read_json(
        runtime.HERE / "results/costs.json")["presets"]}
    speed = {row["case"]: row["share"] * row["matrix_tflop_per_second"] * 1e12
             for row in rates if row.get("compiled")}
    found = [{"row": name, "gpus": costs[preset]["gpus"],
              "hours": part * costs[preset]["flop"] / costs[preset]["gpus"] / speed[case] / 3600}
             for name, preset, part, case in TABLES if case in speed]
    return found + [{"row": f"50,000 images of {row['case']}", "gpus": 8,
                     "hours": 50_000 / 8 / row["images_per_second"] / 3600}
                    for row in rates if row.get("compiled") and "sampling" in row["case"]]


def table(rows: list[Row]) -> None:
    """Markdown, with a column for each key."""
    def text(value: Any) -> str:
        return f"{value:.3g}" if isinstance(value, float) else str(value)

    for n, row in enumerate(rows):
        if n == 0 or rows[n - 1].keys() != row.keys():
            print("\n| " + " | ".join(row) + " |\n" + "|---" * len(row) + "|")
        print("| " + " | ".join(map(text, row.values())) + " |", flush=True)


def draw(path: Path, device: str, rates: list[Row]) -> None:
    """The share of each case, eager and compiled."""
    cases = [*dict.fromkeys(row["case"] for row in rates if "share" in row)]
    figure, axes = plt.subplots(figsize=(7, 1 + 0.3 * max(1, len(cases))), layout="constrained")
    for compiled, shift, colour in ((False, -0.2, "silver"), (True, 0.2, "tab:blue")):
        shares = {row["case"]: row["share"] for row in rates if row.get("compiled") is compiled}
        axes.barh([cases.index(case) + shift for case in shares], [*shares.values()], 0.4,
                  color=colour, label="compiled" if compiled else "eager")
    axes.set(yticks=range(len(cases)), yticklabels=cases, title=device,
             xlabel="share of the rate of matrix products, measured in the same run")
    axes.invert_yaxis()
    axes.legend()
    runtime.save_figure(figure, path, dpi=150)


@runtime.command
def main(argv: list[str] | None = None) -> None:
    p = runtime.Parser(__doc__)
    p.add_argument("--only", nargs="+", choices=PARTS, default=[*PARTS], help="parts")
    p.add_argument("--out", type=Path, default=Path("results/gpu"), help="folder")
    p.add_argument("--smoke", action="store_true", help="every line, tiny, on the CPU")
    args = p.parse(argv, smoke=dict(out=Path("runs/smoke/gpu")))
    if not args.smoke and not torch.cuda.is_available():
        raise InputError("PyTorch sees no CUDA card here: --smoke runs every line on the CPU")
    rt = runtime.start("cpu" if args.smoke else "cuda")
    runtime.claim(rt, args.out)
    device = runtime.device_name(rt.device)
    path = args.out / (re.sub("[^a-z0-9]+", "-", device.lower()).strip("-") + ".json")
    parts = runtime.read_json(path)["parts"] if path.exists() else {}
    warnings.filterwarnings("ignore", module="torchvision")   # of what lpips calls
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        if args.smoke:   # a compiler for the CPU would take minutes
            stack.enter_context(mock.patch.object(
                nn.Module, "compile", partialmethod(nn.Module.compile, backend="eager")))
        run = Run(rt, TINY if args.smoke else Sizes(), Path(folder))
        for name in args.only:
            begin = time.monotonic()
            rows = PARTS[name](run)
            table(rows)
            print(f"{name} took {time.monotonic() - begin:.0f} s")
            parts[name] = {"date": time.strftime("%Y-%m-%d"), "rows": rows}
            rates = [row for part in parts.values() for row in part["rows"] if "case" in row]
            runtime.write_json(path, {
                "command": "python -m studies.gpu", "device": device,
                "cards": torch.cuda.device_count(),
                "versions": runtime.versions() | {"cuda": torch.version.cuda},
                "parts": parts, "hours": hours(rates)})
    table(hours(rates))
    draw(path.with_suffix(".png"), device, rates)
    print(f"wrote {path} and {path.with_suffix('.png')}")
    failed = [row["check"] for part in parts.values() for row in part["rows"]
              if not row.get("passed", True)]
    if failed:
        raise InputError(f"{len(failed)} check(s) failed: {'; '.join(failed)}")


if __name__ == "__main__":
    main()
