"""Stage 2: train a transformer on a tokenizer's latents by flow matching, Eq. 4.

    laptop      python train_dit.py
    one GPU     python train_dit.py --preset dit-b --data DIR
    eight GPUs  torchrun --nproc_per_node=8 train_dit.py --preset dit-b --data DIR

The tokenizer encodes every image once, into --cache, and each step draws new
latents from the stored posteriors.  The folder --out receives checkpoint.pt,
log.jsonl and images/.  The same command again goes on from the checkpoint, and
on a CPU it ends with the same bits.
"""

import argparse
from pathlib import Path

import runtime  # before torch: it says how idle threads wait

import torch
from torch import Tensor, nn

import checkpoints
import data
import flow
import models
from runtime import InputError, Runtime

# ------------------------------------------------------------------------------
# A preset is a row of defaults, which any flag overrides.  "small" is for
# photographs of 32 pixels on a CPU, and "photos" for one GPU.  The paper's rows
# are from Tables 1 and 3; what it calls DiT is trained as SiT, with uniform t and
# no cosine term.  An epoch has 1251 batches of 1024 images, or 1668 of 768.
#
# What has no flag: steps of linear warm-up, share of the steps over which the
# rate falls to 0 at the end, steps between lines of the log, steps of Euler
# behind a picture, how many of the endless shapes are encoded, and whether the
# average begins with a short memory.

COMMON = dict(warmup=100, cooldown=0.0, log_every=50, grid_steps=25, shapes=20_000, ramp=True)
BASE = COMMON | dict(
    model="B", steps=80 * 1251, batch=1024, lr=2e-4, ema=0.9999, ramp=False, save_every=5000)
PRESETS = {
    "demo": COMMON | dict(
        model="shapes", steps=3300, batch=32, lr=4e-3, cooldown=1.0, ema=0.995,
        latent="mean"),
    "small": COMMON | dict(model="demo", steps=3000, batch=32, lr=1e-3, ema=0.999),
    "photos": COMMON | dict(model="S", steps=100_000, batch=128, lr=2e-4, ema=0.9995,
                            save_every=5000),
    "lightningdit-b": BASE,
    "lightningdit-b-plus": BASE | dict(steps=160 * 1251),
    "dit-b": BASE | dict(model="DiT-B", t="uniform", cosine_weight=0.0),
    "lightningdit-xl-sota": BASE | dict(
        model="XL", optimizer="muon", steps=530 * 1668, batch=768, lr=1.8e-4),
    "gae": BASE | dict(model="XL", shift=0.7, latent="mean"),
}
SMOKE = dict(
    steps=4, batch=4, warmup=1, log_every=1, save_every=2, grid_steps=1, shapes=64,
    workers=0, tokenizer=Path("runs/smoke/tokenizer/checkpoint.pt"),
    cache=Path("runs/smoke/latents"), out=Path("runs/smoke/dit"))
# Flags that may change when a run goes on; LightningDiT changed its t on the way.
FREE = {
    "preset", "cache", "out", "steps", "epochs", "accumulate", "workers", "save_every",
    "log_every", "grid_steps", "smoke", "device", "recompute", "compile", "t", "shift"}


def parse(argv: list[str] | None) -> argparse.Namespace:
    p = runtime.Parser(__doc__)
    count, fraction = runtime.positive_int, runtime.fraction
    positive, non_negative = runtime.positive, runtime.non_negative
    add = p.add_argument
    add("--preset", choices=PRESETS, default="demo", help="row of defaults")
    add("--tokenizer", type=Path, default=Path("runs/tokenizer/checkpoint.pt"),
        help="checkpoint, ours or a published one")
    add("--data", help="shapes, cifar10 or a folder; default: the tokenizer's")
    add("--size", type=count, help="side of the images; default: the tokenizer's, or 256")
    add("--latents", type=Path, help="folder of LightningDiT's files, in place of --data")
    add("--cache", type=Path, default=Path("runs/latents"), help="folder of latents")
    add("--latent", choices=["sample", "mean"], default="sample",
        help="learn draws of z, or the posterior's mean")
    add("--model", choices=models.DITS, help="row of models.DITS")
    add("--init", type=Path, help="start from this DiT, ours or a published one, "
        "whose size takes the place of --model")
    add("--qk-norm", action="store_true", help="norm queries and keys, for long trainings")
    add("--out", type=Path, default=Path("runs/dit"), help="folder")

    add = p.add_argument_group("optimisation").add_argument
    add("--optimizer", choices=["adamw", "muon"], default="adamw",
        help="muon is for the blocks, with AdamW for the rest")
    add("--steps", type=count, help="optimiser steps in all")
    add("--batch", type=count, help="images per step, over all processes")
    add("--lr", type=positive, help="learning rate of both optimisers")
    add("--betas", type=fraction, nargs=2, default=[0.9, 0.95],
        help="of AdamW; the paper prints 0.95 0.999")
    add("--clip", type=positive, default=1.0, help="largest gradient norm")
    add("--ema", type=fraction, help="decay of the averaged weights")
    add("--t", choices=["logit-normal", "uniform"], default="logit-normal", help="how t is drawn")
    add("--shift", type=positive, default=1.0,
        help="below 1 towards the noise; RAE: sqrt(4096 / C h w)")
    add("--cosine-weight", type=non_negative, default=1.0, help="0 leaves Eq. 4")
    add("--label-dropout", type=fraction, default=0.1, help="share without a label")
    runtime.add_card_flags(p)
    runtime.add_running_flags(p)
    return p.parse(argv, PRESETS, SMOKE)


# ------------------------------------------------------------------------------
# From images to latents.  The cache holds the mean and the deviation of every
# posterior.  How z is drawn from them only the tokenizer knows.


def encode_images(name: str | None, size: int | None, shapes: int, cache: Path,
                  tokenizer: models.Tokenizer, origin: dict, sha256: str, workers: int,
                  accept: bool, rt: Runtime) -> data.LatentSet:
    """The latents of the images `name`: those in `cache`, or new ones.

    origin, sha256: the content of the tokenizer's file, and its hash.
    accept: also take cached latents of files whose dates have changed.
    """
    if name is None:
        raise InputError("the tokenizer's file names no images: give --data")
    known = dict(size=256, seed=0) | origin.get("config", {})
    dataset = data.open_dataset(name, size or known["size"], "train", known["seed"])
    if name == "shapes":
        dataset.length = shapes  # they have no end of their own
    rt.print(data.summary(dataset))

    def encode(x: Tensor):
        mean, logvar = tokenizer.posterior(x)
        return mean, torch.exp(0.5 * logvar)

    latents = data.cache_latents(
        cache, dataset, encode, {"tokenizer": sha256}, 64, rt.rank, rt.world, workers,
        rt.device, accept)
    runtime.report_skipped(latents.skipped if rt.is_main else [])
    return latents


class TimeBins:
    """The squared error since the last `read`, in ten bins of t."""

    def __init__(self, device: torch.device) -> None:
        kind = None if device.type == "mps" else torch.float64   # adds up to the same in any order
        self.sums = torch.zeros(2, 10, dtype=kind, device=device)

    def add(self, t: Tensor, errors: Tensor) -> None:
        index = (10 * t).long().clamp(max=9)
        self.sums.index_add_(1, index, torch.stack([errors, torch.ones_like(t)]).to(self.sums))

    def total(self) -> Tensor:
        return runtime.all_reduce_sum(self.sums.clone())

    def read(self) -> dict:
        errors, counts = self.total().tolist()
        self.sums.zero_()
        by_t = [e / n if n else None for e, n in zip(errors, counts)]
        return {"velocity": sum(errors) / sum(counts), "by_t": by_t}


def build(row: str, qk_norm: bool, init: Path | None, latents: data.LatentSet) -> models.DiT:
    """A network of this row, or that of `init` with embeddings for other classes."""
    needed = {"in_channels": latents.shape[0], "input_size": latents.shape[1],
              "num_classes": len(latents.classes)}
    if init is None:
        return models.build_dit(models.DITS[row] | needed | {"qk_norm": qk_norm})
    known, _ = checkpoints.load_dit(init)
    if qk_norm and not known.config["qk_norm"]:
        raise InputError(f"{init} has learned without --qk-norm: leave it out")
    if any(known.config[k] != needed[k] for k in ("in_channels", "input_size")):
        raise InputError(f"{init} was made for other latents than {[*latents.shape]}: give "
                         "its own tokenizer")
    dit, state = models.build_dit(known.config | needed), known.state_dict()
    if known.config["num_classes"] != needed["num_classes"]:
        name = "y_embedder.embedding_table.weight"   # its last row is for no class
        state[name] = torch.cat([dit.state_dict()[name][:-1], state[name][-1:]])
    dit.load_state_dict(state)
    return dit


# ------------------------------------------------------------------------------
# Muon (Jordan et al. 2024) takes the matrices of attention and MLP.  With
# "match_rms_adamw" its steps are as large as AdamW's, so that one rate fits both.
# Modulations stay with AdamW, because their gradients have a low rank.


class Learner:
    """All that a step changes: the network, its average, its optimisers, its errors."""

    def __init__(self, dit: models.DiT, kind: str, lr: float, betas: list[float],
                 decay: float, ramp: bool = True) -> None:
        self.dit, self.ema = dit, runtime.Ema(dit, decay, ramp)
        self.bins = TimeBins(next(dit.parameters()).device)
        matrices = [p for name, p in dit.blocks.named_parameters()
                    if kind == "muon" and p.ndim == 2 and "adaLN" not in name]
        chosen, common = set(matrices), dict(lr=lr, weight_decay=0)
        rest = [p for p in dit.parameters() if p.requires_grad and p not in chosen]
        self.optimizers = [torch.optim.AdamW(rest, betas=betas, fused=True, **common)]
        if matrices:
            self.optimizers.append(torch.optim.Muon(
                matrices, adjust_lr_fn="match_rms_adamw", **common))

    def step(self, lr: float) -> None:
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = lr
            optimizer.step()
            optimizer.zero_grad()
        self.ema.update()

    def resume(self, path: Path, config: dict, classes: list[str], is_main: bool) -> int:
        """Go on from the checkpoint, if there is one.  Returns its step."""
        state = checkpoints.resume(path, "dit", config, FREE, model=self.dit, ema=self.ema.model,
                                   optimizers=self.optimizers, errors_by_t=self.bins.sums)
        self.bins.sums *= is_main   # those of the file are of all processes
        self.ema.updates = state.get("ema_updates", 0)
        if state.get("classes", classes) != classes:
            raise InputError(f"{path} has other classes than the images have now: choose "
                             "another --out")
        return state.get("step", 0)


@torch.no_grad()
def save_picture(path: Path, dit: models.DiT, tokenizer: models.Tokenizer,
                 latents: data.LatentSet, mean: Tensor, std: Tensor, steps: int,
                 rt: Runtime) -> None:
    """Samples of ten classes in rows, from the same noise every time."""
    classes, shape = len(latents.classes), latents.shape
    y = torch.arange(min(classes, 10), device=rt.device).repeat_interleave(8)
    draws = runtime.generator(0, "picture", device=rt.device)
    noise = torch.randn(len(y), *shape, generator=draws, device=rt.device)
    velocity_fn = flow.guided_velocity(dit, y, null=classes, scale=1.0)
    z = flow.denormalize(flow.euler(velocity_fn, noise, steps), mean, std)
    x_hat = torch.cat([tokenizer.decode(part).cpu() for part in z.split(16)])
    rows = data.to_uint8(x_hat).permute(0, 2, 3, 1).split(8)
    data.save_rows(path, dict(zip(latents.classes, rows)))


# ------------------------------------------------------------------------------
# A run.


@runtime.command
def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    rt = runtime.start(args.device)
    runtime.claim(rt, args.out)
    runtime.check_batch(args.batch, rt, args.accumulate)

    # What is learned: the latents of a frozen tokenizer.
    tokenizer, origin = checkpoints.load_tokenizer(args.tokenizer)
    tokenizer.to(rt.device).requires_grad_(False)
    sha256 = runtime.file_sha256(args.tokenizer)
    if args.latents:
        latents = data.open_lightningdit_latents(args.latents, tokenizer.channels)
    else:
        args.data = args.data or origin.get("config", {}).get("data")
        latents = encode_images(args.data, args.size, args.shapes, args.cache, tokenizer, origin,
                                sha256, args.workers, args.accept_data, rt)
    mean, std = latents.statistics(args.latent)
    if args.epochs:
        args.steps = runtime.steps_of(args.epochs, len(latents), args.batch)

    # The network that learns them, new or as the checkpoint has it.
    torch.manual_seed(args.seed)  # the same initial weights in every process
    dit = build(args.model, args.qk_norm, args.init, latents).to(rt.device)
    numbers = sum(p.numel() for p in dit.parameters())
    args.accumulate, args.recompute = runtime.fit(
        rt, args.batch // rt.world, runtime.kept_of_latent(dit.config, args.precision), numbers,
        args.accumulate, args.recompute)
    dit.recompute = args.recompute
    learner = Learner(dit, args.optimizer, args.lr, args.betas, args.ema, args.ramp)
    args.compile = rt.compile(args.compile, *dit.blocks)
    checkpoint = args.out / "checkpoint.pt"
    config = runtime.plain(args) | {  # by content, not by name
        "tokenizer": sha256, "data_sha256": latents.sha256}
    done = learner.resume(checkpoint, config, latents.classes, rt.is_main)
    network = rt.wrap(dit)

    log = runtime.Log(args.out / "log.jsonl", config, rt, done)
    finite, bins = runtime.FiniteCheck(rt.device), learner.bins
    loader = data.latent_batches(
        latents, args.batch, args.seed, done, rt.rank, rt.world, rt.device)
    for step in runtime.steps("dit", done, args.steps, rt):
        # A batch of posteriors, and a latent from each of them.
        batch = next(loader)
        z = batch["mean"]
        if args.latent == "sample":
            eps = runtime.global_randn(z.shape, rt, args.seed, "posterior", step)
            scale = runtime.global_randn(z.shape[:1], rt, args.seed, "scale", step)
            z = tokenizer.sample(z, batch["std"], eps, scale)  # Eq. 5
        z = flow.normalize(z, mean, std)

        # Its noise, time and label.  Hiding some labels prepares for guidance.
        eps = runtime.global_randn(z.shape, rt, args.seed, "eps", step)
        if args.t == "uniform":
            t = runtime.global_rand(len(z), rt, args.seed, "t", step)
        else:
            t = runtime.global_randn(z.shape[:1], rt, args.seed, "t", step).sigmoid()
        t = flow.time_shift(t, args.shift)
        hidden = runtime.global_rand(len(z), rt, args.seed, "labels", step)
        y = torch.where(hidden < args.label_dropout, len(latents.classes), batch["y"])

        # The loss of Eqs. 4 and 29, with LightningDiT's second term.
        for z, eps, t, y in runtime.micro_batches(
                network, args.accumulate, z, eps, t, y):
            x_t = flow.interpolate(z, eps, t)  # Eq. 27
            v = flow.velocity(z, eps)  # Eq. 28
            with rt.autocast(args.precision):
                v_hat = network(x_t, t, y)
            loss = (flow.flow_matching(v_hat, v)
                    + args.cosine_weight * flow.cosine_velocity(v_hat, v))
            (loss / args.accumulate).backward()
            bins.add(t, flow.flow_matching_per_sample(v_hat.detach(), v))

        # The step.
        norm = nn.utils.clip_grad_norm_(dit.parameters(), args.clip)
        finite.add(step, {"loss": loss, "gradient norm": norm})
        lr = runtime.learning_rate(step, args.steps, args.lr, args.warmup, args.cooldown)
        learner.step(lr)
        done = step + 1

        if done % args.log_every == 0 or done == args.steps:
            finite.flush()
            log.write(step=done, **bins.read(), grad_norm=norm, lr=lr)
        stop = runtime.stop_asked()
        if done % args.save_every == 0 or done == args.steps or stop:
            finite.flush()
            runtime.check_same_on_all_ranks(dit)
            errors_by_t = bins.total()
            if rt.is_main:
                with rt.autocast(args.precision):
                    save_picture(
                        args.out / "images" / f"{done:07d}.png", learner.ema.model,
                        tokenizer, latents, mean, std, args.grid_steps, rt)
                checkpoints.save({
                    "kind": "dit", "config": config, "step": done,
                    "model_config": dit.config, "model": dit.state_dict(),
                    "ema": learner.ema.state_dict(), "ema_updates": learner.ema.updates,
                    "optimizers": [o.state_dict() for o in learner.optimizers],
                    "errors_by_t": errors_by_t,
                    "tokenizer": {"path": str(args.tokenizer), "sha256": sha256},
                    "classes": latents.classes, "latent_shape": [*latents.shape],
                    "latent_mean": mean, "latent_std": std,
                }, checkpoint)
            runtime.barrier()
        if stop:
            raise runtime.Stopped(f"stopped at step {done}; the same command goes on")
    rt.print(f"{checkpoint} has {done} steps")


if __name__ == "__main__":
    main()
