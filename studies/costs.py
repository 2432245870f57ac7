"""What would a training cost?  Every preset of both trainings, by counting alone.

    python -m studies.costs
    python -m studies.costs --only vavae-f16d32 lightningdit-b --gpus 4

A step of each preset runs on fake tensors, which have shapes and no numbers.  So
this needs no GPU, and it measures nothing: the hours follow from the number of
operations and from two rates that are assumed below.  Pictures, scores, reading
images, and the latents that are encoded before a transformer trains are left out.
"""

import argparse
import time
import warnings
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import runtime  # before torch, because it says how idle threads wait

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

import flow
import frozen
import losses
import models
import neighbours
import objectives
import train_dit
import train_tokenizer
from runtime import InputError

# ------------------------------------------------------------------------------
# What is assumed.  An H100 does 989e12 FLOP a second in bf16, and a training
# reaches a share of that.  A card of 80 GB has 79 GiB.

H100, TRANSFORMER, CONVOLUTION = 989e12, 0.40, 0.25
GIB = 2**30
CARD = 79 * GIB
GPUS = dict.fromkeys(["demo", "small", "photos", "photos-64", "photos-128", "photos-256",
                      "gae-demo", "dgae-demo"], 1) | {"lightningdit-xl-sota": 4}   # others: 8
# The preset whose latents a transformer learns, and the number of their classes.
LATENTS = {"demo": ("demo", 10), "small": ("small", 10), "photos": ("photos-256", 10),
           "gae": ("gae-d32", 1000)}
PAPER = "vavae-f16d32", 1000

# ------------------------------------------------------------------------------
# Counting.  PyTorch knows the FLOP of matrix products and convolutions.  To these
# come the products in attention: two of them forward and four backward.


def attention_flop(products: int) -> Any:
    def count(q: Tensor, k: Tensor, *args: Any, **kwargs: Any) -> int:   # [..., N, d]
        return 2 * products * q.numel() * k.shape[-2]
    return count


ATEN = torch.ops.aten
FORMULAS = flop_registry | {
    ATEN._scaled_dot_product_flash_attention_for_cpu: attention_flop(2),
    ATEN._scaled_dot_product_flash_attention_for_cpu_backward: attention_flop(4)}
CONVOLUTIONS = ATEN.convolution, ATEN.convolution_backward


class Counter(TorchDispatchMode):
    """FLOP, the bytes of all tensors that are alive, and the most there have been.

    operations: how many there were that are no views, each of them a kernel or more.
    """

    def __init__(self) -> None:
        super().__init__()
        self.sizes: dict[int, int] = {}
        self.alive = self.most = self.flop = self.convolution_flop = self.operations = 0

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result, kind = op(*args, **kwargs), op.overloadpacket
        self.operations += not op.is_view
        if kind in FORMULAS:
            flop = FORMULAS[kind](*args, **kwargs, out_val=result)
            self.flop += flop
            self.convolution_flop += flop * (kind in CONVOLUTIONS)
        for tensor in result if isinstance(result, tuple | list) else [result]:
            if isinstance(tensor, Tensor):
                self.add(tensor.untyped_storage())
        return result

    def add(self, storage: torch.UntypedStorage) -> None:
        if storage._cdata not in self.sizes:   # else a view, or changed in place
            self.sizes[storage._cdata] = storage.nbytes()
            self.alive += storage.nbytes()
            self.most = max(self.most, self.alive)
            weakref.finalize(storage, self.remove, storage._cdata)

    def remove(self, key: int) -> None:
        self.alive -= self.sizes.pop(key)


def as_on_cuda(net: nn.Module) -> nn.Module:
    """Let a network keep under a CPU's autocast what it would keep under CUDA's.

    There norms and resizing take float32, and an RMSNorm is one operation, which
    keeps as much as a LayerNorm.  Linear layers, convolutions and attention take
    and give bfloat16 on both.
    """
    for parent in list(net.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, nn.RMSNorm):
                shape, gain = child.normalized_shape, child.elementwise_affine
                parent.add_module(name, nn.LayerNorm(shape, 1e-6, gain, bias=False))
    for module in net.modules():
        if isinstance(module, nn.LayerNorm | nn.GroupNorm | nn.Upsample):
            module.register_forward_pre_hook(lambda _, inputs: (inputs[0].float(),))
    return net


def bf16() -> torch.autocast:
    return torch.autocast("cpu", torch.bfloat16)


# ------------------------------------------------------------------------------
# A step of each training, as its loop has it.  First it gives its networks, those
# that learn and the frozen ones, and then its losses, one after another.

Step = Iterator[Any]


def tokenizer_step(args: argparse.Namespace, images: int) -> Step:
    noise = "gaussian" if args.loss == "sigma" else "learned"
    row = models.AUTOENCODERS[args.model] | dict(noise=noise, sigma=args.sigma)
    net = as_on_cuda(models.build_tokenizer(row))
    net.decoder.recompute = args.recompute
    learning, others, side = [net], [], args.size // net.stride
    if args.perceptual_weight:
        lpips = frozen.lpips.LPIPS(pretrained=False, pnet_rand=True, net="vgg", verbose=False)
        others.append(lpips.requires_grad_(False))
    if args.align_weight:
        teacher = as_on_cuda(frozen.DinoV2(1024, 24, side))   # ViT-L/14
        others.append(teacher.requires_grad_(False))
        projection = nn.Conv2d(net.channels, 1024, 1, bias=False)
        learning.append(projection)
    if args.semantic_weight:
        demo = args.preset == "gae-demo"   # whose teacher looks at a judge's features
        features = (frozen.Convolutions(judge := frozen.ShapesJudge(), args.size, judge.body[:-1])
                    if demo else frozen.DinoV2(1024, 24, side, imagenet=True))
        narrow = neighbours.SemanticTeacher(96 if demo else 1024, side, net.channels, 4 >> demo)
        semantic = as_on_cuda(nn.Sequential(features, narrow))
        others.append(semantic.requires_grad_(False))
    if args.disc_weight:
        judge = models.PatchGAN()
        learning.append(judge)
    yield learning, others

    x = torch.zeros(images, 3, args.size, args.size)
    eps = torch.zeros(images, net.channels, side, side)
    draws = [eps, eps[:, 0, 0, 0], *([x, eps[:, 0, 0, 0]] if net.diffuses else [])]
    with bf16():
        mean, logvar, z, x_hat, *pair = net(x, *draws)
    rec = losses.squared_error(*pair) if pair else losses.absolute_error(x_hat, x)
    if args.perceptual_weight:
        rec = rec + losses.perceptual_error(lpips, x_hat, x)
    rec = objectives.at_image(rec, pair[0] if pair else x_hat)
    total = rec + losses.inverse_variance(logvar) + losses.exponential_magnitude(z)
    balanced = []
    if args.semantic_weight:
        with torch.no_grad(), bf16():
            target = narrow.encode(features(x))
        total = total + nn.functional.mse_loss(mean, target.float())
    if args.align_weight:
        with torch.no_grad(), bf16():
            features = teacher(x).float()
        pair = projection(z), features
        loss = losses.marginal_distance_matrix(*pair) + losses.marginal_cosine(*pair)
        balanced.append((loss, net.encoder_last_layer))
    if args.disc_weight:
        judge.requires_grad_(False)
        with bf16():
            loss = objectives.at_image(losses.hinge_generator(judge(x_hat).float()), x_hat)
        if args.disc_mode == "constant":
            total = total + loss
        else:
            balanced.append((loss, net.last_layer))
    for loss, layer in balanced:
        pulls = [torch.autograd.grad(a, layer, retain_graph=True)[0] for a in (rec, loss)]
        total = total + losses.adaptive_weight(*pulls) * loss
    yield total
    if args.disc_weight:
        judge.requires_grad_(True)
        with bf16():
            real, fake = judge(x).float(), judge(x_hat.detach()).float()
        yield losses.hinge_discriminator(real, fake)


def dit_step(args: argparse.Namespace, images: int) -> Step:
    preset, classes = LATENTS.get(args.preset, PAPER)
    source = train_tokenizer.PRESETS[preset]
    row = models.AUTOENCODERS[source["model"]]
    C, stride = row["z_channels"], row.get("patch") or 2 ** (len(row["ch_mult"]) - 1)
    side = source["size"] // stride
    net = as_on_cuda(models.build_dit(models.DITS[args.model] | dict(
        in_channels=C, input_size=side, num_classes=classes)))
    net.recompute = args.recompute
    yield [net], []

    z, eps = torch.zeros(2, images, C, side, side)
    t, y = torch.zeros(images), torch.zeros(images, dtype=torch.long)
    x_t, v = flow.interpolate(z, eps, t), flow.velocity(z, eps)
    with bf16():
        v_hat = net(x_t, t, y)
    yield flow.flow_matching(v_hat, v) + args.cosine_weight * flow.cosine_velocity(v_hat, v)


STEPS = {train_tokenizer: tokenizer_step, train_dit: dit_step}

# ------------------------------------------------------------------------------
# What a step takes, and what follows from it for a whole row.


def muon_flop(rows: int, columns: int) -> int:
    """Five Newton-Schulz steps on X [a, b] with a <= b: A = X X', A A, and (A + A A) X."""
    a, b = sorted((rows, columns))
    return 5 * (2 * a * a * b + 2 * a**3 + 2 * a * a * b)


def count_step(stage: Any, args: argparse.Namespace, images: int) -> dict[str, int]:
    """A step of so many images on one GPU: numbers, FLOP, and bytes.

    operations: of both passes, as they are without torch.compile.
    kept: what the forward pass leaves to the backward pass, with the weights in
    bfloat16.  most: all that there is at the worst moment.
    """
    with warnings.catch_warnings(action="ignore"), FakeTensorMode(), Counter() as counter:
        step = STEPS[stage](args, images)
        learning, others = next(step)
        weights, before = counter.alive, counter.operations
        loss = next(step)
        kept = counter.alive - weights
        loss.backward()
        for loss in step:   # the discriminator's
            loss.backward()
    numbers = sum(p.numel() for net in learning for p in net.parameters() if p.requires_grad)
    muon = []   # as train_dit.Learner chooses
    if vars(args).get("optimizer") == "muon":
        muon = [p for name, p in learning[0].blocks.named_parameters()
                if p.ndim == 2 and "adaLN" not in name]
    optimiser = 8 * numbers - 4 * sum(p.numel() for p in muon)
    average = 4 * numbers if "ema" in args else 0
    return {
        "parameters": numbers,
        "frozen_parameters": sum(p.numel() for net in others for p in net.parameters()),
        "flop": counter.flop, "convolution_flop": counter.convolution_flop,
        "operations": counter.operations - before,
        "muon_flop": sum(muon_flop(*p.shape) for p in muon),
        "weights": weights, "gradients": 4 * numbers, "optimiser": optimiser,
        "average": average, "kept": kept, "most": counter.most + optimiser + average}


def needed(step: dict[str, int]) -> float:
    """Bytes of a GPU's memory."""
    return runtime.LOST * step["most"] + runtime.OTHERS


def parts_that_fit(stage: Any, args: argparse.Namespace, images: int) -> int:
    """In how few parts a step fits the card, as runtime.fit finds it from its table."""
    return next(parts for parts in range(1, images + 1) if images % parts == 0
                and needed(count_step(stage, args, images // parts)) <= CARD)


def cost(stage: Any, preset: str, gpus: int | None = None) -> dict[str, Any]:
    """What a preset takes, with its batch shared out over the GPUs."""
    args = stage.parse(["--preset", preset])
    gpus = gpus or GPUS.get(preset, 8)
    images = max(1, args.batch // gpus)
    step = count_step(stage, args, images)
    products = step["flop"] - step["convolution_flop"] + step["muon_flop"]
    seconds = step["convolution_flop"] / CONVOLUTION / H100 + products / TRANSFORMER / H100
    return {
        "stage": stage.__name__, "preset": preset, "gpus": gpus, "images_per_gpu": images,
        "parameters": step["parameters"], "frozen_parameters": step["frozen_parameters"],
        "gflop_per_image": step["flop"] / images / 1e9, "steps": args.steps,
        "flop": (step["flop"] + step["muon_flop"]) * gpus * args.steps,
        "operations": step["operations"],
        "kept_mib_per_image": step["kept"] / images / 2**20,
        "gib": {name: step[name] / GIB for name in (
            "weights", "gradients", "optimiser", "average", "kept", "most")},
        "gib_per_gpu": needed(step) / GIB, "parts": parts_that_fit(stage, args, images),
        "hours": args.steps * seconds / 3600}


# ------------------------------------------------------------------------------
# The table, which RESULTS.md quotes, and the same as JSON.


def digits(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.2g}"


def cells(c: dict[str, Any]) -> dict[str, str]:
    return {
        "preset": f"`{c['stage']}.py --preset {c['preset']}`",
        "GPUs × images": f"{c['gpus']} × {c['images_per_gpu']}",
        "parameters [M]": f"{c['parameters'] / 1e6:.1f}",
        "GFLOP per image": digits(c["gflop_per_image"]),
        "FLOP in all": f"{c['flop']:.1e}".replace("e+", "e"),
        "operations": f"{c['operations']:,}",
        "kept per image [MiB]": digits(c["kept_mib_per_image"]),
        "memory per GPU [GiB]": f"{c['gib_per_gpu']:.0f}",
        "fits 80 GB": "yes" if c["parts"] == 1 else f"in {c['parts']} parts",
        "hours": digits(c["hours"]) if c["hours"] > 0.01 else "0"}


@runtime.command
def main(argv: list[str] | None = None) -> None:
    p = runtime.Parser(__doc__)
    p.add_argument("--only", nargs="+", metavar="PRESET", help="default: all")
    p.add_argument("--gpus", type=runtime.positive_int, metavar="N",
                   help="default: as many as the paper has, or 1")
    p.add_argument("--out", type=Path, default=Path("results/costs.json"), help="JSON")
    args = p.parse(argv)
    presets = [(stage, name) for stage in STEPS for name in stage.PRESETS]
    for name in set(args.only or []) - {name for _, name in presets}:
        raise InputError(f"--only {name} is no preset of train_tokenizer.py or train_dit.py")
    runtime.claim(runtime.start("cpu"), args.out.parent, args.out)
    costs = []
    for stage, name in presets:
        if not args.only or name in args.only:
            costs.append(cost(stage, name, args.gpus))
            row = cells(costs[-1])
            if len(costs) == 1:
                print("|", " | ".join(row), "|")
                print("|---" * len(row) + "|")
            print("|", " | ".join(row.values()), "|", flush=True)
    runtime.write_json(args.out, {
        "command": "python -m studies.costs", "versions": runtime.versions(),
        "date": time.strftime("%Y-%m-%d"), "assumed": {
            "flop_per_second": H100, "share_in_transformers": TRANSFORMER,
            "share_in_convolutions": CONVOLUTION, "memory_factor": runtime.LOST,
            "memory_of_others_gib": runtime.OTHERS / GIB, "memory_of_a_card_gib": CARD / GIB},
        "presets": costs})
    print(f"wrote {args.out}")


if __name__ == "__main__":
    main()
