"""Stage 1: train a tokenizer x -> z -> x_hat with the VE loss (Sec. 4).

    laptop      python train_tokenizer.py
    one GPU     python train_tokenizer.py --preset vavae-f16d32 --data DIR
    eight GPUs  torchrun --nproc_per_node=8 train_tokenizer.py --preset vavae-f16d32 --data DIR

--loss names the objective: "ve" is Eq. 11, "kl" is Eq. 1, "sigma" has the given
noise of sigma-VAE and GAE, "none" has no noise, and the last two are the forms of
Eq. 9 that Analyze 2 rejects.  Their formulas stand in the loop of `main`.
--target-noise finds lambda1 while it trains, and --regularizer adds what other papers
do to make the latent easier to diffuse; see objectives.py.

--out receives checkpoint.pt, log.jsonl and images/.  After a crash the same
command goes on from the checkpoint, and on a CPU it ends with the same bits.
"""

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import runtime  # before torch, because it says how idle threads wait

import torch
from torch import Tensor, nn

import checkpoints
import data
import metrics
import models
import objectives
from losses import (exponential_magnitude, inverse_variance, kl_divergence, log_entropy,
                    negative_variance, square_magnitude)
from runtime import InputError, Runtime

# ------------------------------------------------------------------------------
# A preset is a row of defaults, and any flag overrides it.  "small" is for
# photographs of 32 pixels on a CPU.  Those with a size are for one GPU; their models,
# f8d8 and f16d32, have 24 pixel values for each latent value, as the paper's best.
# The paper trains at 2.5e-5 with batches of 64 and "mainly" follows the third stage of
# VA-VAE.  The discriminator starts at batch 2,501, as VA-VAE's 5,001 counts the steps
# of two optimisers.  RESULTS.md has what the papers of GAE and DGAE leave open.

ALL = dict(
    perceptual_weight=0.0, disc_weight=0.0, align_weight=0.0, semantic_weight=0.0, ve_warmup=0,
    # These have no flags: AdamW's betas, as in LDM and VA-VAE, and its weight decay,
    # of which the paper states none; the steps of warm-up; the share of the steps over
    # which the rate falls to 0 at the end, or whether it falls as a cosine; the steps
    # between lines of the log; and the number of held-out images.
    betas=[0.5, 0.9], weight_decay=0.0, warmup=100, cooldown=0.0, cosine=False,
    log_every=50, val_images=256)
PAPER = ALL | dict(lambda1=0.1, size=256, batch=64, lr=2.5e-5, save_every=5000,
                   perceptual_weight=1.0, disc_weight=0.5)
PHOTOS = ALL | dict(model="f8d8", lambda1=0.1, lr=1e-4, steps=100_000, save_every=5000,
                    perceptual_weight=1.0)
VAVAE = PAPER | dict(model="f16d32", align_weight=0.1)
DEMO = ALL | dict(model="vit-shapes", lambda1=1e-3, size=32, batch=16, lr=3e-3,
                  steps=2300, cooldown=0.8)
GAE_NOISE = dict(loss="sigma", sigma=0.2, mean_weight=0.0, semantic_weight=1.0,
                 teacher="runs/teacher/checkpoint.pt")
GAE = PAPER | GAE_NOISE | dict(
    model="gae-d32", batch=1024, lr=2e-4, steps=250_000, warmup=8000, cosine=True,
    betas=[0.9, 0.98], weight_decay=0.05, disc_mode="constant", disc_start=5001)
DGAE = ALL | dict(
    loss="kl", lambda1=0.1, size=256, batch=96, lr=1e-4, steps=500_000, warmup=10_000,
    cosine=True, betas=[0.9, 0.95], weight_decay=0.1, perceptual_weight=0.5, save_every=5000)
PRESETS = {
    "demo": DEMO,
    "small": ALL | dict(model="vit-demo", lambda1=0.1, size=32, batch=32, lr=1e-3,
                        steps=1500),
    "photos-64": PHOTOS | dict(size=64, batch=64),
    "photos-128": PHOTOS | dict(size=128, batch=32),
    "photos-256": PHOTOS | dict(model="f16d32", size=256, batch=16),
    "ldm-f16d16": PAPER | dict(model="f16d16", steps=200_182),    # 10 epochs
    "vavae-f16d32": VAVAE | dict(steps=320_292),                  # 16 epochs
    "vavae-f16d32-finetune": VAVAE | dict(steps=100_091, disc_start=0,
                                          ve_warmup=1000),        # 5 epochs
    "gae-demo": DEMO | GAE_NOISE | dict(model="gae-demo", semantic_weight=0.1),
    "gae-d32": GAE,                                               # 200 epochs
    "gae-d64": GAE | dict(model="gae-d64"),
    "dgae-demo": DEMO | dict(model="dgae-demo", val_images=64),
    "dgae-b": DGAE | dict(model="dgae-b"),
    "dgae-m": DGAE | dict(model="dgae-m"),
    "dgae-l": DGAE | dict(model="dgae-l"),
}
SMOKE = dict(steps=4, batch=4, log_every=1, save_every=2, val_images=8,
             workers=0, out=Path("runs/smoke/tokenizer"))
# A run may be resumed with other values of these.
FREE = {"steps", "epochs", "save_every", "log_every", "workers", "device", "out", "smoke",
        "compile", "recompute", "accumulate"}
LOSSES = "ve", "kl", "sigma", "none", "log-entropy", "negative-variance"
ANALYZE2 = {"log-entropy": log_entropy, "negative-variance": negative_variance}


def parse(argv: list[str] | None) -> argparse.Namespace:
    p = runtime.Parser(__doc__)
    count, natural = runtime.positive_int, runtime.natural_int
    weight, positive = runtime.non_negative, runtime.positive
    add = p.add_argument
    add("--preset", choices=PRESETS, default="demo", help="row of defaults")
    add("--data", default="shapes", help="shapes, cifar10, or a folder of class folders")
    add("--size", type=count, help="side of the images in pixels")
    add("--model", choices=models.AUTOENCODERS, help="row of models.AUTOENCODERS")
    add("--init", type=Path, help="start from these weights: ours, VA-VAE's or LDM's")
    add("--out", type=Path, default=Path("runs/tokenizer"), help="folder of the run")

    add = p.add_argument_group("objective (sums over C, H, W)").add_argument
    add("--loss", choices=LOSSES, default="ve", help="what acts on the latent")
    add("--lambda1", type=weight, help="weight of Eq. 9")
    add("--target-noise", type=positive, help="ve: move lambda1, from --lambda1 on, until "
        "the noise is this share of the spread in the median channel, such as 0.1")
    add("--lambda2", type=weight, default=1e-6, help="weight of Eq. 10")
    add("--tau", type=runtime.finite, default=1.0, help="tau of Eq. 10")
    add("--delta", type=positive, default=1e-6, help="delta of Eq. 9")
    add("--ve-warmup", type=natural, help="steps over which lambda1 grows from 0")
    add("--kl-weight", type=weight, default=1e-6, help="kl: beta of Eq. 1")
    add("--sigma", type=positive, default=0.2, help="sigma: deviation of the noise")
    add("--sigma-mode", choices=["fixed", "gaussian"], default="gaussian",
        help="sigma: one deviation for all images, or N(0, sigma / 0.8) for each")
    add("--mean-weight", type=weight, default=0.24, help="sigma: weight of mean^2; "
        "0.24 of sums is LatentLM's 0.01 of means for f16d32")
    add("--perceptual-weight", type=weight, help="weight of LPIPS")
    add("--disc-weight", type=weight, help="weight of the adversarial loss, relative "
        "to L_rec's gradient at the decoder's last layer; 0 for none")
    add("--disc-start", type=natural, default=2501, help="step at which it begins")
    add("--align-weight", type=weight, help="weight of VA-VAE's alignment, relative "
        "to L_rec's gradient at the encoder's last layer; 0 for none")
    add("--semantic-weight", type=weight, help="weight of GAE's loss on the latent, "
        "relative to L_rec's mean over pixel values; 0 for none")
    add("--semantic-at", choices=["latent", "pre", "post"], default="latent",
        help="where it acts: the mean, the features before it, or a map of it")
    add("--teacher", default="dinov2_vitl14", help="what these two and repa learn from: this, "
        "_vitb14, _vits14, a file of their weights, judge, efficientnet-lite0, "
        "module:function, or, for the latent of GAE, a file of train_teacher.py")
    add("--disc-mode", choices=["adaptive", "constant"], default="adaptive",
        help="constant: --disc-weight is relative to L_rec's mean over pixel values")

    add("--regularizer", choices=objectives.REGULARIZERS, help="what else makes the "
        "latent easier to diffuse, at its published strength; repa needs --teacher")

    add = p.add_argument_group("optimisation (AdamW)").add_argument
    add("--steps", type=count, help="optimiser steps in all")
    add("--batch", type=count, help="images in a step, over all processes")
    add("--lr", type=positive, help="learning rate")
    add("--clip", type=positive, default=1.0, help="largest gradient norm, per pixel")
    runtime.add_card_flags(p)
    runtime.add_running_flags(p)
    args = p.parse(argv, PRESETS, SMOKE)
    if args.smoke and args.teacher == GAE_NOISE["teacher"]:
        args.teacher = "runs/smoke/teacher/checkpoint.pt"
    return args


# ------------------------------------------------------------------------------
# How well held-out images decode, and whether sigma is where Eq. 14 wants it.


@torch.no_grad()
def validate(tokenizer: models.Tokenizer, images: Tensor, seed: int,
             rec_of: Callable[[Tensor, Tensor], Tensor], picture: Path, delta: float
             ) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Scores of held-out images [N, 3, H, W], and the statistics of their z.

    The picture has four rows: inputs, what is decoded from the posterior's mean and
    from a sample, and the latent's three principal components as colours.  Where sigma
    is learned, a fifth shows it on a logarithmic scale, and `noise_cost` is what the
    sample's noise adds to L_rec, over the L_var of Eq. 9.  At the equilibrium of
    Eq. 14 it equals lambda1, except for a diffusion decoder, which trains on another L_rec.
    """
    tokenizer.eval()
    rows, cost = [], 0.0
    device = next(tokenizer.parameters()).device
    for k, x in enumerate(images.to(device).split(32)):
        mean, logvar = tokenizer.posterior(x)
        draws = runtime.generator(seed, "held-out", k, device=device)
        eps = torch.randn(mean.shape, generator=draws, device=device)
        scale = torch.randn(len(x), generator=draws, device=device)
        z = tokenizer.sample(mean, torch.exp(0.5 * logvar), eps, scale)
        numbers = range(32 * k, 32 * k + len(x))
        pair = tokenizer.decode(mean, numbers), tokenizer.decode(z, numbers)
        of_mean, of_sample = (rec_of(x_hat, x).item() for x_hat in pair)
        cost += (of_sample - of_mean) * len(x) / len(images)
        rows.append([a.cpu() for a in (mean, logvar, z, *pair)])
    tokenizer.train()
    mean, logvar, z, *pair = (torch.cat(column) for column in zip(*rows))
    scores = metrics.latent_summary(mean, logvar, z, tokenizer.learns_sigma)
    for name, x_hat in zip(("psnr_mean", "psnr_sample"), pair):
        psnr = metrics.psnr(data.to_uint8(x_hat), data.to_uint8(images))
        scores[name] = psnr.mean().item()
    colours = metrics.principal_colours(mean[:12])
    rows = dict(zip(("held-out images", "D(mean)", "D(z)"), (images, *pair)))
    rows["latent"] = nn.functional.interpolate(colours, images.shape[-2:])
    if tokenizer.learns_sigma:
        scores["noise_cost"] = cost / inverse_variance(logvar, delta).item()
        low, high, shown = metrics.sigma_map(logvar[:12], images.shape[-2:])
        rows[f"sigma, from\n{low:.2g} (black)\nto {high:.2g}"] = shown
    data.save_rows(picture, {name: data.to_uint8(a[:12]).permute(0, 2, 3, 1)
                             for name, a in rows.items()})
    std, mean = torch.std_mean(z.transpose(0, 1).flatten(1), dim=1)
    return scores, {"latent_mean": mean, "latent_std": std}


# ------------------------------------------------------------------------------
# A run begins with random weights, with those of --init, or where it stopped.


def build(args: argparse.Namespace, rt: Runtime) -> models.Tokenizer:
    """The tokenizer, which knows its noise; or InputError if flags do not fit together."""
    torch.manual_seed(args.seed)   # the same weights in every process
    noise = {"sigma": args.sigma_mode, "none": "none"}.get(args.loss, "learned")
    sigma = args.sigma if args.loss == "sigma" else 0.0
    row = models.AUTOENCODERS[args.model]
    tokenizer = models.build_tokenizer(row | dict(noise=noise, sigma=sigma))
    size, stride = row.get("image_size", args.size), tokenizer.stride
    if args.size != size or args.size % stride:
        needed = row.get("image_size", f"a multiple of {stride}")
        raise InputError(f"--model {args.model} cannot take --size {args.size}: it needs {needed}")
    if args.preset.endswith("finetune") and args.init is None:
        raise InputError(f"--preset {args.preset} needs a published --init")
    return tokenizer.to(rt.device, memory_format=torch.channels_last)


# ------------------------------------------------------------------------------
# A run.  The noise of a step is drawn here: in training no network draws any.


def noise(tokenizer: models.Tokenizer, x: Tensor, seed: int, step: int,
          rt: Runtime) -> list[Tensor]:
    """eps of Eq. 5 [b, C, h, w], and the scale [b] that a sigma-VAE may need.

    For a diffusion decoder also the noise of its image, and the time.
    """
    side, b = x.shape[-1] // tokenizer.stride, len(x)
    shape = b, tokenizer.channels, side, side
    draws = [runtime.global_randn(shape, rt, seed, "eps", step),
             runtime.global_randn((b,), rt, seed, "scale", step)]
    if tokenizer.diffuses:
        draws += [runtime.global_randn((b, *x.shape[1:]), rt, seed, "decoder", step),
                  runtime.global_rand(b, rt, seed, "decoder's time", step)]
    return draws


@runtime.command
def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    rt = runtime.start(args.device)
    runtime.claim(rt, args.out)
    runtime.check_batch(args.batch, rt, args.accumulate)
    train = data.open_dataset(args.data, args.size, "train", args.seed)
    rt.print(data.summary(train))
    if args.epochs:
        args.steps = runtime.steps_of(args.epochs, len(train), args.batch)
    val = data.open_dataset(args.data, args.size, "val", args.seed)
    val = data.once(val, args.batch, limit=args.val_images)
    val = torch.cat([part["x"] for part in val])

    tokenizer = build(args, rt)
    network = rt.wrap(tokenizer)
    expansion = objectives.Lambda1(args, rt)
    reconstruction = objectives.Reconstruction(args.perceptual_weight, rt.device)
    others = objectives.others_of(args, tokenizer, rt)
    route = objectives.route_of(args, tokenizer, rt)
    parts, parameters = {"model": tokenizer}, list(tokenizer.parameters())
    for other in [*others, route, expansion]:
        parts |= other.parts
        parameters += other.parameters
    parts["optimizer"] = optimizer = objectives.adamw(parameters, args)
    args.accumulate, args.recompute = runtime.fit(
        rt, args.batch // rt.world, runtime.kept_of_image(args.model, args.size, args.precision),
        sum(p.numel() for p in parameters), args.accumulate, args.recompute)
    tokenizer.decoder.recompute = args.recompute
    judges = reconstruction.networks + [other.net for other in others if other.name == "adv"]
    args.compile = rt.compile(args.compile, *objectives.blocks_of(tokenizer), *judges)
    checkpoint = args.out / "checkpoint.pt"
    config = runtime.plain(args) | {"data_sha256": data.fingerprint(train)}
    done = checkpoints.resume(checkpoint, "tokenizer", config, FREE, **parts).get("step", 0)
    if args.init and not done:
        checkpoints.begin_from(args.init, parts, args.disc_start)
    log = runtime.Log(args.out / "log.jsonl", config, rt, done)

    finite = runtime.FiniteCheck(rt.device)
    networks = [network] + [other.network for other in [*others, route]]
    batches = data.batches(train, args.batch, args.seed, start=done, rank=rt.rank,
                           world=rt.world, workers=args.workers, device=rt.device)
    for step in runtime.steps("tokenizer", done, args.steps, rt):
        batch = next(batches)
        runtime.report_skipped(batch["skipped"])
        x = batch["x"].contiguous(memory_format=torch.channels_last)
        # The encoder's input and the decoder's target: x, unless a regulariser changes them.
        seen, target = route.begin(x, step)
        draws = noise(tokenizer, x, args.seed, step, rt)
        lambda1 = expansion.at(step)

        optimizer.zero_grad(set_to_none=True)
        rows = x, seen, target, *draws
        for x, seen, target, *draws in runtime.micro_batches(networks, args.accumulate, *rows):
            with rt.autocast(args.precision):
                mean, logvar, z, x_hat, *velocities = network(seen, *draws)

            # Eq. 11, or one of the objectives with which it is compared.  Only a diffusion
            # decoder has velocities.
            rec = reconstruction(x_hat, target, *velocities)
            if args.loss == "ve":
                total = (rec + lambda1 * inverse_variance(logvar, args.delta)
                         + args.lambda2 * exponential_magnitude(z, args.tau))
            elif args.loss == "kl":
                total = rec + args.kl_weight * kl_divergence(mean, logvar)
            elif args.loss == "sigma":
                total = rec + args.mean_weight * square_magnitude(mean)
            elif args.loss == "none":
                total = rec
            else:
                total = (rec + lambda1 * ANALYZE2[args.loss](logvar)
                         + args.lambda2 * exponential_magnitude(z, args.tau))
            terms = {"rec": rec}

            # The other losses, each weighted against L_rec.
            for other in others:
                if step >= other.start:
                    loss = other.loss(x, mean, z, target, x_hat)
                    weight = objectives.balance(rec, loss, other, target[0].numel())
                    total = total + weight * loss
                    terms |= {other.name: loss, f"{other.name}_weight": weight}
            (total / args.accumulate).backward()
            expansion.see(step, mean, logvar)

        lr = runtime.learning_rate(step, args.steps, args.lr, args.warmup,
                                   args.cooldown, args.cosine)
        optimizer.param_groups[0]["lr"] = lr
        # The bound is for each pixel value, so that one --clip serves all sizes.
        norm = nn.utils.clip_grad_norm_(parameters, args.clip * x[0].numel())
        optimizer.step()
        for other in others:
            if step >= other.start:
                other.learn(lr)
        terms |= {"total": total, "grad_norm": norm / x[0].numel()}
        expansion.step()
        if args.target_noise:
            terms["lambda1"] = lambda1
        finite.add(step, terms)

        step += 1
        if step % args.log_every == 0 or step == args.steps:
            finite.flush()
            log.write(   # losses of the batch's last part, and the latent of rank 0
                step=step,
                lr=lr,
                **runtime.mean_over_ranks(terms),
                **metrics.latent_summary(mean, logvar, z, tokenizer.learns_sigma),
                memory_gib=runtime.peak_memory(rt.device),
            )
        stop = runtime.stop_asked()
        if step % args.save_every == 0 or step == args.steps or stop:
            finite.flush()
            runtime.check_same_on_all_ranks(tokenizer)
            if rt.is_main:
                scores, statistics = validate(
                    tokenizer, val, args.seed, reconstruction,
                    picture=args.out / f"images/{step:07d}.png", delta=args.delta)
                if args.loss == "ve" and lambda1 and not tokenizer.diffuses:
                    scores["balance"] = scores["noise_cost"] / float(lambda1)   # 1: Eq. 14
                log.write(step=step, held_out=scores)
                state = {name: part.state_dict() for name, part in parts.items()}
                state |= statistics | {"kind": "tokenizer", "config": config, "step": step,
                                       "model_config": tokenizer.config}
                checkpoints.save(state, checkpoint)
            runtime.barrier()
        if stop:
            raise runtime.Stopped(f"stopped at step {step}; the same command goes on")
    rt.print(f"{checkpoint} has {max(done, args.steps)} steps")


if __name__ == "__main__":
    main()
