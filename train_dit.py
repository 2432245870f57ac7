"""Train a diffusion transformer in the latent space of a tokenizer, by flow matching (Eq. 4).

    laptop       python train_dit.py                                         # on what train_tokenizer.py left
    one GPU      python train_dit.py --tokenizer runs/tokenizer/checkpoint.pt --preset B
    eight GPUs   torchrun --nproc_per_node=8 train_dit.py --preset B

x_t = (1 - t) eps + t z with t = 1 at the data; the network predicts z - eps.  t is logit-normal, the loss is
the squared error plus LightningDiT's cosine term, and a tenth of the labels is dropped for guidance.  Latents
are encoded as they are needed and normalised per channel with the statistics in the tokenizer's file.

Killed at any moment, the same command goes on from runs/dit/checkpoint.pt and ends with the same numbers.
"""

import argparse
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torchvision.utils import make_grid, save_image
from tqdm import tqdm

import data
import losses
import models
import runtime
from runtime import InputError, Runtime

# ------------------------------------------------------------------------------------------------------------
# Knobs.  A preset is a row of defaults; any flag overrides it.  B and XL carry the paper's batch and rate.

PRESETS: dict[str, dict[str, Any]] = {
    "demo": dict(model="demo", batch=32, lr=1e-3, steps=3000, ema=0.999),
    "B": dict(model="B", batch=1024, lr=2e-4, steps=100_080, ema=0.9999),     # 80 epochs of ImageNet
    "XL": dict(model="XL", batch=768, lr=1.8e-4, steps=884_040, ema=0.9999),  # 530 epochs
}
FREE = {"steps", "log_every", "save_every", "image_every", "grid_steps", "workers", "device", "out", "smoke"}
SMOKE = dict(steps=4, batch=4, log_every=1, save_every=2, image_every=4, grid_steps=1, workers=0,
             out=Path("runs/smoke/dit"), tokenizer=Path("runs/smoke/tokenizer/checkpoint.pt"))
BINS = 10   # of t, for the logged loss


def parse(argv: list[str] | None) -> argparse.Namespace:
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0],
                                formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    p.add_argument("--preset", choices=PRESETS, default="demo",
                   help="defaults for model, batch, lr, steps, ema")
    p.add_argument("--tokenizer", type=Path, default=Path("runs/tokenizer/checkpoint.pt"),
                   help="checkpoint of train_tokenizer.py")
    p.add_argument("--data", help="'shapes', 'cifar10' or a folder; default: the tokenizer's")
    p.add_argument("--latent", choices=["sample", "mean"], default="sample",
                   help="what is learned: draws of z, as the decoder was trained, or the posterior's mean")
    p.add_argument("--model", choices=models.DITS, help="row of models.DITS")
    p.add_argument("--qk-norm", action=argparse.BooleanOptionalAction, default=False,
                   help="RMS-normalise queries and keys")
    p.add_argument("--out", type=Path, default=Path("runs/dit"), help="folder of checkpoint and log")
    g = p.add_argument_group("optimisation (AdamW, betas 0.9 and 0.95, constant rate after a linear warm-up)")
    g.add_argument("--steps", type=int, help="optimiser steps in all")
    g.add_argument("--batch", type=int, help="images per step, over all processes")
    g.add_argument("--lr", type=float, help="learning rate, used as it is")
    g.add_argument("--warmup", type=int, default=100, help="steps of linear warm-up")
    g.add_argument("--weight-decay", type=float, default=0.0, help="of AdamW")
    g.add_argument("--clip", type=float, default=1.0, help="largest gradient norm")
    g.add_argument("--ema", type=float, help="decay of the averaged weights, reached by a ramp")
    g.add_argument("--t", choices=["logit-normal", "uniform"], default="logit-normal", help="how t is drawn")
    g.add_argument("--cosine-weight", type=float, default=1.0, help="weight of 1 - cos(v_hat, v)")
    g.add_argument("--label-dropout", type=float, default=0.1, help="share of labels set to the null label")
    g = runtime.add_running_flags(p, image_every=1000)
    g.add_argument("--grid-steps", type=int, default=25, help="Euler steps of the sample grids")
    first, _ = p.parse_known_args(argv)
    p.set_defaults(**PRESETS[first.preset] | (SMOKE if first.smoke else {}))
    return p.parse_args(argv)


# ------------------------------------------------------------------------------------------------------------
# From images to normalised latents, and back.  The statistics travel with the tokenizer; forgetting one of
# the two directions is this field's most common mistake, so both are here, side by side.


class Latents:
    """The frozen tokenizer: encode(x, eps) -> normalised z [B, C, h, w]; decode(z) -> x_hat [B, 3, H, W]."""

    def __init__(self, path: Path, latent: str, precision: str, rt: Runtime) -> None:
        with runtime.input_errors():
            self.autoencoder, self.checkpoint = models.load_autoencoder(path)
        if "latent_mean" not in self.checkpoint:
            raise InputError(f"{path} has no latent statistics; it is no checkpoint of train_tokenizer.py")
        self.autoencoder.requires_grad_(False).to(rt.device)
        self.mean = self.checkpoint["latent_mean"].to(rt.device)
        self.std = self.checkpoint["latent_std"].to(rt.device)
        self.autocast, self.config = lambda: rt.autocast(precision), self.checkpoint["config"]
        self.posterior = {k: self.config[k] for k in ("loss", "sigma", "sigma_mode")}
        if latent == "mean":
            self.posterior["loss"] = "none"
        side = self.config["size"] // self.autoencoder.stride
        self.shape = (self.autoencoder.channels, side, side)

    @torch.no_grad()
    def encode(self, x: Tensor, eps: Tensor, scale: Tensor) -> Tensor:
        with self.autocast():
            moments = self.autoencoder.encode(x)
        z = losses.sample_posterior(moments, eps, scale, **self.posterior)
        return models.normalize(z, self.mean, self.std)

    @torch.no_grad()
    def decode(self, z: Tensor) -> Tensor:
        with self.autocast():
            return self.autoencoder.decode(models.denormalize(z, self.mean, self.std))


# ------------------------------------------------------------------------------------------------------------
# One step's random numbers, as a function of seed and step; then Eqs. 27, 28 and 4.


def draw_times(n: int, kind: str, rt: Runtime, seed: int, step: int) -> Tensor:
    """t [n]: sigmoid of N(0, 1) (logit-normal), or uniform on [0, 1)."""
    if kind == "uniform":
        return runtime.global_rand(n, rt, seed, "t", step)
    return torch.sigmoid(runtime.global_randn((n,), rt, seed, "t", step))


class Objective(nn.Module):
    """forward(z, eps, t, y) -> terms: velocity (Eq. 4) and cosine, [] each, and the squared error per
    sample [B].
    """

    def __init__(self, dit: models.DiT, args: argparse.Namespace, rt: Runtime) -> None:
        super().__init__()
        self.dit, self.autocast = dit, lambda: rt.autocast(args.precision)
        self.weights = {"velocity": 1.0, "cosine": args.cosine_weight}

    def forward(self, z: Tensor, eps: Tensor, t: Tensor, y: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        v = losses.velocity(z, eps)
        with self.autocast():
            v_hat = self.dit(losses.interpolate(z, eps, t), t, y)
        per_sample = losses.flow_matching_per_sample(v_hat, v)
        terms = {"velocity": per_sample.mean()}
        if self.weights["cosine"]:
            terms["cosine"] = losses.cosine_velocity(v_hat, v)
        return terms, per_sample.detach()


class TimeBins:
    """The velocity loss averaged in BINS equal bins of t since the last read, on the device until then."""

    def __init__(self, device: torch.device) -> None:
        self.sums = torch.zeros(2, BINS, device=device)

    def add(self, t: Tensor, per_sample: Tensor) -> None:
        index = (t * BINS).long().clamp(max=BINS - 1)
        self.sums.index_add_(1, index, torch.stack([per_sample, torch.ones_like(per_sample)]))

    def read(self) -> list[float | None]:
        total, count = runtime.all_reduce_sum(self.sums).tolist()
        self.sums = torch.zeros_like(self.sums)
        return [round(s / n, 5) if n else None for s, n in zip(total, count)]


# ------------------------------------------------------------------------------------------------------------
# The loop.


def sample_grid(dit: models.DiT, latents: Latents, classes: int, args: argparse.Namespace, rt: Runtime,
                per_class: int = 8) -> Tensor:
    """A picture of the averaged network: one row for each of the first ten classes, the same noise every
    time.
    """
    rows = min(classes, 10)
    y = torch.arange(rows, device=rt.device).repeat_interleave(per_class)
    draws = runtime.generator(args.seed, "grid", device=rt.device)
    noise = torch.randn(len(y), *latents.shape, generator=draws, device=rt.device)

    def velocity_fn(x: Tensor, t: float) -> Tensor:
        with rt.autocast(args.precision):
            return dit(x, torch.full((len(x),), t, device=rt.device), y)

    x_hat = latents.decode(losses.euler(velocity_fn, noise, args.grid_steps)).cpu()
    return make_grid(x_hat.clamp(-1, 1) / 2 + 0.5, nrow=per_class, padding=2)


def check(args: argparse.Namespace, rt: Runtime) -> None:
    if args.batch % rt.world:
        raise InputError(f"--batch {args.batch} does not divide over {rt.world} processes")
    for name in ("batch", "steps", "log_every", "save_every", "image_every", "grid_steps"):
        if getattr(args, name) < 1:
            raise InputError(f"--{name.replace('_', '-')} must be at least 1, got {getattr(args, name)}")
    for name in ("ema", "label_dropout"):
        if not 0 <= getattr(args, name) < 1:
            raise InputError(f"--{name.replace('_', '-')} must be in [0, 1), got {getattr(args, name)}")


def resume(path: Path, dit: models.DiT, ema: runtime.Ema, optimizer: torch.optim.Optimizer,
           args: argparse.Namespace, tokenizer_hash: str) -> int:
    """Load the run in `path` if there is one.  Returns the number of steps already done."""
    if not path.exists():
        return 0
    with runtime.input_errors():
        state = models.read_kind(path, "dit")
    runtime.check_config(state["config"], runtime.plain(args), FREE, path)
    if state["tokenizer"]["sha256"] != tokenizer_hash:
        raise InputError(f"{path} was trained on another {args.tokenizer} (it has changed since); "
                         "choose another --out, or remove the old run")
    dit.load_state_dict(state["model"])
    ema.load_state_dict(state["ema"], state["ema_updates"])
    optimizer.load_state_dict(state["optimizer"])
    return state["step"]


@runtime.command
def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    rt = runtime.start(args.device)
    check(args, rt)
    latents = Latents(args.tokenizer, args.latent, args.precision, rt)
    args.data = args.data or latents.config["data"]
    dataset = data.open_dataset(args.data, latents.config["size"], "train", latents.config["seed"])
    classes = len(dataset.classes)
    torch.manual_seed(args.seed)   # the same initial weights on every rank
    dit = models.build_dit(models.DITS[args.model] | dict(
        in_channels=latents.shape[0], input_size=latents.shape[1], num_classes=classes, qk_norm=args.qk_norm))
    dit.to(rt.device)
    ema = runtime.Ema(dit, args.ema)
    parameters = [p for p in dit.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=args.lr, betas=(0.9, 0.95), weight_decay=args.weight_decay,
                                  fused=True)
    checkpoint, tokenizer_hash = args.out / "checkpoint.pt", runtime.file_sha256(args.tokenizer)
    done = resume(checkpoint, dit, ema, optimizer, args, tokenizer_hash)
    if done >= args.steps:
        rt.print(f"{checkpoint} already has {done} steps; raise --steps to go on")
        return
    log = runtime.Log(args.out / "log.jsonl", runtime.plain(args), rt, done)
    count = sum(p.numel() for p in dit.parameters())
    rt.print(f"{args.model}: {count / 1e6:.1f} M parameters on {args.data}, latents "
             f"{'x'.join(map(str, latents.shape))} of {args.tokenizer}, batch {args.batch}, lr {args.lr:g}, "
             f"{rt.world} process(es) on {runtime.device_name(rt.device)}"
             + (f", resumed at step {done}" if done else ""))

    objective = Objective(dit, args, rt)
    step_module = rt.wrap(objective)
    local = args.batch // rt.world
    loader = data.batches(dataset, args.batch, args.seed, done, rt.rank, rt.world, args.workers,
                          device=rt.device)
    finite, bins, skipped = runtime.FiniteCheck(rt.device), TimeBins(rt.device), 0
    bar = tqdm(range(done, args.steps), initial=done, total=args.steps, disable=not rt.is_main, desc="dit")
    for step in bar:
        batch = next(loader)
        skipped += runtime.report_skipped(batch["skipped"])
        z = latents.encode(batch["x"],
                           runtime.global_randn((local, *latents.shape), rt, args.seed, "posterior", step),
                           runtime.global_randn((local,), rt, args.seed, "scale", step))
        eps = runtime.global_randn((local, *latents.shape), rt, args.seed, "eps", step)
        t = draw_times(local, args.t, rt, args.seed, step)
        dropped = runtime.global_rand(local, rt, args.seed, "labels", step) < args.label_dropout
        for group in optimizer.param_groups:
            group["lr"] = args.lr * min(1.0, (step + 1) / max(1, args.warmup))
        terms, per_sample = step_module(z, eps, t, torch.where(dropped, classes, batch["y"]))
        optimizer.zero_grad(set_to_none=True)
        losses.weighted_sum(terms, objective.weights).backward()
        norm = nn.utils.clip_grad_norm_(parameters, args.clip)
        finite.add(step, terms | {"gradient norm": norm})
        optimizer.step()
        ema.update()
        bins.add(t, per_sample)

        last = step + 1 == args.steps
        if (step + 1) % args.log_every == 0 or last:
            finite.flush()
            terms = runtime.mean_over_ranks(terms)
            log.write(step=step + 1, **terms, grad_norm=norm, by_t=bins.read(), skipped=skipped,
                      lr=optimizer.param_groups[0]["lr"])
            bar.set_postfix(v=f"{terms['velocity'].item():.4f}")
        if ((step + 1) % args.image_every == 0 or last) and rt.is_main:
            (args.out / "images").mkdir(parents=True, exist_ok=True)
            grid = sample_grid(ema.model, latents, classes, args, rt)
            save_image(grid, args.out / "images" / f"{step + 1:07d}.png")
        if (step + 1) % args.save_every == 0 or last:
            finite.flush()
            runtime.check_same_on_all_ranks(dit)
            if rt.is_main:
                runtime.save_atomic({
                    "kind": "dit", "config": runtime.plain(args), "model_config": dit.config,
                    "step": step + 1, "model": dit.state_dict(), "ema": ema.state_dict(),
                    "ema_updates": ema.updates, "optimizer": optimizer.state_dict(),
                    "classes": list(dataset.classes),
                    "tokenizer": {"path": str(args.tokenizer), "sha256": tokenizer_hash},
                    "latent_mean": latents.mean.cpu(), "latent_std": latents.std.cpu(),
                    "latent_shape": list(latents.shape)}, checkpoint)
            runtime.barrier()
    rt.print(f"wrote {checkpoint}")


if __name__ == "__main__":
    main()
