"""How fast: a training step of the tokenizer, one of the diffusion transformer, and guided sampling.

    laptop       python benchmark.py                              # the demo DiT, in seconds
                 python benchmark.py tokenizer --size 128 --repeats 3
                 python benchmark.py sampling --steps 10 --repeats 3
    one GPU      python benchmark.py tokenizer --batch 16 --repeats 30 --warmup 5 --json speed.json
                 python benchmark.py dit --model XL --batch 64 --repeats 30 --warmup 5 --compile
                 python benchmark.py sampling --batch 64

Seconds of one machine mean little on another, so every time stands beside another of the same run: FLOP/s
beside the largest rate at which the machine multiplies matrices, our DiT beside the same network in plain
PyTorch, guidance in an interval beside guidance at every step, bf16 beside fp32.  The rivals take turns, and
a ratio is the median over rounds of the ratio within a round: a busy machine slows both sides.

A step is forward, backward and optimiser on a batch that is already there: no loader, no log, no clipping.
"""

import argparse
import copy
import gc
import json
import math
import multiprocessing
import os
import resource
import statistics
import sys
import time
import warnings
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import lpips
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

import losses
import models
import runtime
import sample
from runtime import InputError, Runtime

# ------------------------------------------------------------------------------------------------------------
# Knobs.  The sampler is the paper's: 250 Euler steps, guidance 1.7 in [0.21, 1]; shift 0.3 is LightningDiT's.

GUIDANCE, INTERVAL, SHIFT = 1.7, (0.21, 1.0), 0.3
SMOKE = {"tokenizer": dict(model="demo", size=32), "dit": dict(model="demo"),
         "sampling": dict(model="demo", steps=8)}


def parse(argv: list[str] | None) -> argparse.Namespace:
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    commands = p.add_subparsers(dest="benchmark", metavar="tokenizer | dit | sampling", required=True)
    for name, table, model in (("tokenizer", models.AUTOENCODERS, "f16d32"), ("dit", models.DITS, "B"),
                               ("sampling", models.DITS, "B")):
        g = commands.add_parser(name, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
        g.add_argument("--model", choices=table, default=model, help="size of the network")
        g.add_argument("--batch", type=int, default=1, help="images at a time")
        g.add_argument("--warmup", type=int, default=1, help="rounds that are not timed")
        g.add_argument("--repeats", type=int, default=5, help="timed rounds; the median is reported")
        g.add_argument("--compile", action="store_true", help="torch.compile our network as its stage does")
        g.add_argument("--device", default="auto", help="auto, cpu, cuda or mps")
        g.add_argument("--json", type=Path, metavar="FILE", help="write what is printed to this file, too")
        g.add_argument("--smoke", action="store_true", help="tiny sizes, in seconds")
        if name == "tokenizer":
            g.add_argument("--size", type=int, default=256, help="image side in pixels")
        if name == "sampling":   # which has both precisions in every run
            g.add_argument("--steps", type=int, default=250, help="Euler steps")
        else:
            g.add_argument("--precision", choices=["auto", "fp32", "bf16"], default="auto",
                           help="autocast of the networks; auto is bf16 on CUDA")
        if argv and argv[0] == name and "--smoke" in argv:
            g.set_defaults(**SMOKE[name] | dict(warmup=0, repeats=2))
    return p.parse_args(argv or ["dit", "--model", "demo", "--batch", "16"])


def check(args: argparse.Namespace, rt: Runtime) -> None:
    if rt.world > 1:
        raise InputError("this measures one process: start it without torchrun")
    for name, least in (("batch", 1), ("repeats", 1), ("warmup", 0), ("steps", 1), ("size", 32)):
        if getattr(args, name, least) < least:   # PatchGAN needs 32 pixels
            raise InputError(f"--{name} must be at least {least}, got {getattr(args, name)}")
    if args.json and args.json.is_dir():
        raise InputError(f"--json {args.json} is a folder; name a file in it")
    if args.benchmark == "tokenizer":
        with torch.device("meta"):
            autoencoder = models.build_autoencoder(models.AUTOENCODERS[args.model])
        only = autoencoder.config.get("image_size", args.size)
        if args.size != only or args.size % autoencoder.stride:
            needed = f"{only} pixels" if args.size != only else f"a multiple of {autoencoder.stride} pixels"
            raise InputError(f"--size {args.size} does not fit --model {args.model}, which takes {needed}")


# ------------------------------------------------------------------------------------------------------------
# Measuring.  FLOP are counted, a multiply-add as two, on one eager step.


def interleave(arms: dict[str, Callable[[], Any]], args: argparse.Namespace,
               rt: Runtime) -> dict[str, list[float]]:
    """Seconds of each arm in --repeats rounds, after --warmup untimed ones; a round runs every arm once."""
    def now() -> float:
        if rt.device.type != "cpu":
            torch.accelerator.synchronize(rt.device)
        return time.perf_counter()

    seconds: dict[str, list[float]] = {name: [] for name in arms}
    for n in tqdm(range(args.warmup + args.repeats), "rounds"):
        for name, arm in arms.items():
            begin = now()
            arm()
            if n >= args.warmup:
                seconds[name].append(now() - begin)
    return seconds


def spread(values: list[float]) -> dict[str, float]:
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def ratio(slow: list[float], fast: list[float]) -> dict[str, float]:
    """How many times longer `slow` takes than `fast`, round by round."""
    return spread([a / b for a, b in zip(slow, fast)])


def count_flop(step: Callable[[], Any]) -> int:
    """FLOP of the matrix products, convolutions and attention that `step` runs, backward passes included."""
    with FlopCounterMode(display=False) as counter:
        step()
    return counter.get_total_flops()


def measure(arms: dict[str, Callable[[], Any]], flop: dict[str, float], args: argparse.Namespace,
            rt: Runtime) -> tuple[dict[str, list[float]], dict[str, Any]]:
    """Time training steps beside n x n matrix products in the precision of the networks.

    flop: of each arm, per image.  Returns: seconds as of `interleave`; the report's matrix rate and arms.
    """
    options = dict(device=rt.device, dtype=torch.bfloat16 if args.precision == "bf16" else torch.float32)
    products = {f"matmul {n}": partial(torch.matmul, *torch.randn(2, n, n, **options))
                for n in ((512, 1024, 2048) if rt.device.type == "cpu" else (2048, 4096, 8192))}
    seconds = interleave(arms | products, args, rt)
    middle = {name: statistics.median(times) for name, times in seconds.items()}
    rate = max(2 * int(name.split()[1]) ** 3 / middle[name] for name in products) / 1e9
    achieved = {name: flop[name] * args.batch / middle[name] / 1e9 for name in arms}
    return seconds, {"matrix_gflop_per_second": rate, "arms": {
        name: {"seconds_per_step": spread(seconds[name]), "images_per_second": args.batch / middle[name],
               "gflop_per_second": achieved[name], "share_of_matrix_rate": achieved[name] / rate}
        for name in arms}}


# ------------------------------------------------------------------------------------------------------------
# The tokenizer's step: L1 and VE (Eq. 11) alone, with PatchGAN under its adaptive weight, with LPIPS, with
# both.  The weights are those of train_tokenizer.py; a test holds the gradients against that stage's.


def random_lpips() -> nn.Module:
    """LPIPS with random weights: as fast as the trained one, and nothing is downloaded."""
    with torch.device("meta"), warnings.catch_warnings():
        warnings.simplefilter("ignore")   # and on "meta" VGG's classifier, half a gigabyte, is never made
        net = lpips.LPIPS(net="vgg", pretrained=False, pnet_rand=True, verbose=False)
    for module in net.modules():
        for name, p in module.named_parameters(recurse=False):
            setattr(module, name, nn.Parameter(torch.randn(p.shape) * math.sqrt(2 / p[0].numel())))
    return net.eval().requires_grad_(False)


class TokenizerStep:
    """step(gan, lpips): one optimiser step of the autoencoder and, with gan, one of the discriminator.

    gan, lpips at construction: which of the two networks are built at all.
    """

    def __init__(self, args: argparse.Namespace, rt: Runtime, gan: bool, lpips: bool) -> None:
        torch.manual_seed(0)
        layout = dict(device=rt.device, memory_format=torch.channels_last)
        self.autocast = lambda: rt.autocast(args.precision)
        self.net = models.build_autoencoder(models.AUTOENCODERS[args.model]).to(**layout)
        self.discriminator = models.PatchGAN().to(**layout) if gan else None
        self.lpips = random_lpips().to(rt.device) if lpips else None
        self.optimizer, self.disc_optimizer = (
            torch.optim.AdamW(net.parameters(), lr=2.5e-5, betas=(0.5, 0.9), weight_decay=0.0, fused=True)
            if net is not None else None for net in (self.net, self.discriminator))
        side = args.size // self.net.stride
        self.x = (2 * torch.rand(args.batch, 3, args.size, args.size) - 1).to(**layout)
        self.eps = torch.randn(args.batch, self.net.channels, side, side).to(rt.device)

    def compile(self) -> None:
        self.net.encoder.compile()
        self.net.decoder.compile()

    def __call__(self, gan: bool, lpips: bool) -> None:
        self.optimizer.zero_grad(set_to_none=True)
        with self.autocast():
            moments = self.net.encode(self.x)
        mean, logvar = losses.split_moments(moments)
        z = losses.reparameterize(mean, logvar, self.eps)
        with self.autocast():
            x_hat = self.net.decode(z)
        rec = losses.absolute_error(x_hat, self.x)
        if lpips:
            rec = rec + losses.perceptual_error(self.lpips, x_hat, self.x)
        total = rec + 0.1 * losses.inverse_variance(logvar) + 1e-6 * losses.exponential_magnitude(z)
        if gan:
            self.discriminator.requires_grad_(False)
            with self.autocast():
                fooling = losses.hinge_generator(self.discriminator(x_hat).float())
            gradients = [torch.autograd.grad(term, self.net.last_layer, retain_graph=True)[0]
                         for term in (rec, fooling)]
            total = total + 0.5 * losses.adaptive_weight(*gradients) * fooling
        total.backward()
        self.optimizer.step()
        if gan:
            self.discriminator.requires_grad_(True)
            self.disc_optimizer.zero_grad(set_to_none=True)
            with self.autocast():
                logits = [self.discriminator(image).float() for image in (self.x, x_hat.detach())]
            losses.hinge_discriminator(*logits).backward()
            self.disc_optimizer.step()


ARMS = {"alone": (False, False), "gan": (True, False), "lpips": (False, True), "gan+lpips": (True, True)}


def peak_memory(args: argparse.Namespace, threads: int, gan: bool, lpips: bool) -> float:
    """MiB by which the peak grows while one arm is built and takes two steps; the second has AdamW's moments.

    CUDA: of what the allocator holds.  CPU: of the resident set; its peak never falls, so this runs once in a
    process, and uncompiled, since the compiler lives there as well.
    """
    torch.set_num_threads(threads)
    rt = runtime.start(args.device)
    if rt.device.type == "cuda":
        gc.collect()
        torch.cuda.reset_peak_memory_stats()
        peak = torch.cuda.max_memory_allocated
    else:
        def peak() -> int:
            unit = 1 if sys.platform == "darwin" else 1024
            return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit

        # A small step first: the code that it loads would else count as growth.
        small = argparse.Namespace(**vars(args) | dict(model="demo", size=32, batch=1))
        TokenizerStep(small, rt, False, False)(False, False)
    before = peak()
    step = TokenizerStep(args, rt, gan, lpips)
    if args.compile and rt.device.type == "cuda":
        step.compile()
    for _ in range(2):
        step(gan, lpips)
    return (peak() - before) / 2 ** 20


def peak_memories(args: argparse.Namespace, rt: Runtime) -> dict[str, float | None]:
    """peak_memory of each arm, None on a device that does not count; on the CPU each in a fresh process."""
    threads = torch.get_num_threads()
    if rt.device.type != "cpu":
        cuda = rt.device.type == "cuda"
        return {name: peak_memory(args, threads, *arm) if cuda else None for name, arm in ARMS.items()}
    # Not "spawn": on Linux a process that is executed anew begins with its parent's largest resident set.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["benchmark"])
    with ProcessPoolExecutor(1, context, max_tasks_per_child=1) as pool:
        return {name: pool.submit(peak_memory, args, threads, *arm).result() for name, arm in ARMS.items()}


def tokenizer(args: argparse.Namespace, rt: Runtime) -> dict[str, Any]:
    peaks = peak_memories(args, rt)   # first: on CUDA nothing else may come and go meanwhile
    step = TokenizerStep(args, rt, gan=True, lpips=True)
    arms = {name: partial(step, *arm) for name, arm in ARMS.items()}
    flop = {name: count_flop(arm) / args.batch for name, arm in arms.items()}
    if args.compile:
        step.compile()
    seconds, report = measure(arms, flop, args, rt)
    for name, row in report["arms"].items():
        row |= {"gflop_per_image": flop[name] / 1e9, "peak_memory_mib": peaks[name],
                "time_over_alone": ratio(seconds[name], seconds["alone"])}
    memory = {"cuda": "growth of the allocated bytes' peak",
              "cpu": "growth of the resident set's peak, uncompiled, each arm in a process of its own"}
    return {"parameters": sum(p.numel() for p in step.net.parameters()), "lpips_weights": "random",
            "peak_memory": memory.get(rt.device.type, "not measured"), **report}


# ------------------------------------------------------------------------------------------------------------
# The diffusion transformer's step, and its plain twin: the same network, as one writes it first.


class PlainNorm(nn.Module):
    """RMSNorm, four elementwise operations.  [B, N, D]"""

    def __init__(self, norm: nn.RMSNorm) -> None:
        super().__init__()
        self.weight = norm.weight

    def forward(self, h: Tensor) -> Tensor:
        return h / torch.sqrt(h.pow(2).mean(-1, keepdim=True) + 1e-6) * self.weight


class PlainAttention(nn.Module):
    """softmax(q k^T / sqrt(d)) v with the matrix of scores in memory.  [B, N, D]"""

    def __init__(self, attention: models.Attention) -> None:
        super().__init__()
        self.heads, self.qkv, self.proj = attention.heads, attention.qkv, attention.proj

    def forward(self, h: Tensor, rope: nn.Module) -> Tensor:
        B, N, D = h.shape
        q, k, v = self.qkv(h).reshape(B, N, 3, self.heads, D // self.heads).permute(2, 0, 3, 1, 4)
        scores = rope(q) @ rope(k).transpose(-2, -1) / math.sqrt(D // self.heads)
        return self.proj((scores.softmax(-1) @ v).transpose(1, 2).reshape(B, N, D))


class PlainSwiGLU(nn.Module):
    """w3(silu(w1(h)) * w2(h)).  [B, N, D]"""

    def __init__(self, mlp: models.SwiGLU) -> None:
        super().__init__()
        self.w1, self.w2, self.w3 = copy.deepcopy(mlp.w12), copy.deepcopy(mlp.w12), mlp.w3
        for half, linear in enumerate((self.w1, self.w2)):
            for name, p in mlp.w12.named_parameters():
                setattr(linear, name, nn.Parameter(p.detach().chunk(2)[half].clone()))

    def forward(self, h: Tensor) -> Tensor:
        return self.w3(nn.functional.silu(self.w1(h)) * self.w2(h))


PLAIN = {nn.RMSNorm: PlainNorm, models.Attention: PlainAttention, models.SwiGLU: PlainSwiGLU}


def plain_twin(dit: models.DiT) -> models.DiT:
    """A copy of a LightningDiT without QK-norm, with the same weights and the parts of PLAIN."""
    twin = copy.deepcopy(dit)
    for module in list(twin.modules()):
        for name, child in module.named_children():
            if type(child) in PLAIN:
                setattr(module, name, PLAIN[type(child)](child))
    return twin


def dit_macs(config: dict[str, Any]) -> int:
    """Multiply-adds of one image's forward pass through a LightningDiT of N tokens, width D, hidden width H.

        depth ( N (4 D^2 + 3 D H) + 2 N^2 D + 6 D^2 ) + 2 N p^2 C D + 2 D^2 + 256 D + D^2

    attention and SwiGLU, scores and mixing, adaLN; then both ends of the network, and the embedding of t.
    Training costs 6 FLOP for each: 2 forward, 4 backward.
    """
    D, p = config["width"], config["patch"]
    N, H = (config["input_size"] // p) ** 2, 8 * D // 3
    block = N * (4 * D * D + 3 * D * H) + 2 * N * N * D + 6 * D * D
    return config["depth"] * block + 2 * N * p * p * config["in_channels"] * D + 3 * D * D + 256 * D


def draws(config: dict[str, Any], batch: int, device: torch.device) -> tuple[Tensor, ...]:
    """z, eps [B, C, h, w], t [B] and y [B] of one batch."""
    shape = (batch, config["in_channels"], config["input_size"], config["input_size"])
    return (torch.randn(shape, device=device), torch.randn(shape, device=device),
            torch.randn(batch, device=device).sigmoid(),
            torch.randint(config["num_classes"], (batch,), device=device))


@torch.no_grad()
def plain_average(average: nn.Module, net: nn.Module) -> None:
    """The EMA, one parameter after another."""
    for mean, p in zip(average.parameters(), net.parameters()):
        mean.mul_(0.9999).add_(p, alpha=0.0001)


def dit_step(net: models.DiT, average: Callable[[], None], fused: bool, args: argparse.Namespace,
             rt: Runtime) -> Callable[[], None]:
    """A step of Eq. 4 and the cosine term, always on one batch: forward, backward, AdamW and `average`."""
    z, eps, t, y = draws(net.config, args.batch, rt.device)
    v, x_t = losses.velocity(z, eps), losses.interpolate(z, eps, t)
    optimizer = torch.optim.AdamW([p for p in net.parameters() if p.requires_grad], lr=2e-4,
                                  betas=(0.9, 0.95), weight_decay=0.0, fused=fused, foreach=False)

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        with rt.autocast(args.precision):
            v_hat = net(x_t, t, y)
        (losses.flow_matching(v_hat, v) + losses.cosine_velocity(v_hat, v)).backward()
        optimizer.step()
        average()

    return step


def dit(args: argparse.Namespace, rt: Runtime) -> dict[str, Any]:
    torch.manual_seed(0)
    net = models.build_dit(models.DITS[args.model]).to(rt.device)
    twin = plain_twin(net)
    arms = {"ours": dit_step(net, runtime.Ema(net, 0.9999).update, True, args, rt),
            "plain": dit_step(twin, partial(plain_average, copy.deepcopy(twin), twin), False, args, rt)}
    counted = {name: count_flop(step) / args.batch for name, step in arms.items()}
    for block in net.blocks if args.compile else ():
        block.compile()
    flop = 6.0 * dit_macs(net.config)
    seconds, report = measure(arms, dict.fromkeys(arms, flop), args, rt)
    for name, row in report["arms"].items():
        row["gflop_per_image_counted"] = counted[name] / 1e9
    return {"parameters": sum(p.numel() for p in net.parameters()), "gflop_per_image": flop / 1e9,
            "counted_over_closed_form": counted["ours"] / flop,
            "speedup_over_plain": ratio(seconds["plain"], seconds["ours"]), **report}


# ------------------------------------------------------------------------------------------------------------
# Guided sampling, latents only: the unconditional branch inside the interval against at every step, and the
# network in bf16 against fp32 (which is TF32 on CUDA, as in sample.py).


def sampling(args: argparse.Namespace, rt: Runtime) -> dict[str, Any]:
    torch.manual_seed(0)
    net = models.build_dit(models.DITS[args.model]).to(rt.device).eval().requires_grad_(False)
    noise, _, _, y = draws(net.config, args.batch, rt.device)
    rows: dict[str, int] = {}

    def arm(name: str, interval: tuple[float, float], precision: str) -> None:
        rows[name] = 0

        def network(x: Tensor, t: Tensor, y: Tensor) -> Tensor:
            rows[name] += len(x)
            with rt.autocast(precision):
                return net(x, t, y)

        field = sample.guided_velocity(network, y, net.config["num_classes"], GUIDANCE, interval)
        losses.euler(field, noise, args.steps, SHIFT)

    if args.compile:
        net.compile()
    arms = {f"{name} {precision}": partial(arm, f"{name} {precision}", interval, precision)
            for precision in ("fp32", "bf16")
            for name, interval in (("interval", INTERVAL), ("both", (0.0, 1.0)))}
    seconds = interleave(arms, args, rt)
    return {"guidance": GUIDANCE, "interval": list(INTERVAL), "shift": SHIFT,
            "arms": {name: {"seconds": spread(times), "evaluations_per_image": rows[name] / args.batch,
                            "images_per_second": args.batch / statistics.median(times)}
                     for name, times in seconds.items()},
            "interval_speedup": {"by_evaluations": rows["both fp32"] / rows["interval fp32"],
                                 **{p: ratio(seconds[f"both {p}"], seconds[f"interval {p}"])
                                    for p in ("fp32", "bf16")}},
            "bf16_speedup": {name: ratio(seconds[f"{name} fp32"], seconds[f"{name} bf16"])
                             for name in ("interval", "both")}}


# ------------------------------------------------------------------------------------------------------------
# One JSON object, printed and, with --json, written.


@runtime.command
def main(argv: list[str] | None = None) -> None:
    args = parse(sys.argv[1:] if argv is None else argv)
    rt = runtime.start(args.device)
    check(args, rt)
    if getattr(args, "precision", None) == "auto":
        args.precision = "bf16" if rt.device.type == "cuda" else "fp32"
    if args.json:   # before the work, not after
        with runtime.input_errors():
            args.json.parent.mkdir(parents=True, exist_ok=True)
    numbers = {"tokenizer": tokenizer, "dit": dit, "sampling": sampling}[args.benchmark](args, rt)
    numbers = json.loads(json.dumps(numbers), parse_float=lambda digits: float(f"{float(digits):.5g}"))
    report = json.dumps({"command": runtime.command_line(), "config": runtime.plain(args),
                         "versions": runtime.versions(), "device": runtime.device_name(rt.device),
                         "threads": torch.get_num_threads(), "date": time.strftime("%Y-%m-%d"),
                         "float32_matmul": torch.get_float32_matmul_precision(), **numbers}, indent=1)
    print(report)
    if args.json:
        temporary = args.json.with_name(f".{args.json.name}.tmp")
        temporary.write_text(report + "\n")
        os.replace(temporary, args.json)


if __name__ == "__main__":
    main()
