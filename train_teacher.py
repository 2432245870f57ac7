"""Before stage 1 of GAE: train the teacher that its latent learns from.

    laptop      python train_teacher.py
    eight GPUs  torchrun --nproc_per_node=8 train_teacher.py --preset gae-d32 --data DIR

A foundation model describes an image by many channels, 1024 for DINOv2-L, and a
latent has few.  The teacher f -> target -> f_hat learns which few restore the
features f best (Sec. 4.2 and Eq. 4 of GAE):

    minimise E [ 1 - cos(f_hat, f) ]

--out receives checkpoint.pt, which is the --teacher of `train_tokenizer.py --preset
gae-d32`, and log.jsonl.  After a crash the same command goes on from the checkpoint,
and on a CPU it ends with the same bits.
"""

import argparse
from pathlib import Path
from typing import Any

import runtime  # before torch, because it says how idle threads wait

import torch
from torch import Tensor, nn

import checkpoints
import data
import frozen
import neighbours
import objectives
from runtime import InputError

# ------------------------------------------------------------------------------
# A preset is a row of defaults, and any flag overrides it.  The grid is that of the
# latent: 256 pixels at 16 a position, or 32 at 8.  The settings of gae-d32 are those
# of the paper; its code has others as defaults, among them windows of 1 x 1, which
# do not fit the paper's number of parameters.

GAE = dict(features="dinov2_vitl14", size=256, grid=16, window=4, channels=32, batch=2048,
           lr=2e-4, steps=10_000, warmup=500, log_every=100)
PRESETS = {
    "demo": dict(features="judge", size=32, grid=4, window=2, channels=16, batch=64, lr=2e-3,
                 steps=500, warmup=25, log_every=50),
    "gae-d32": GAE,
    "gae-d64": GAE | dict(channels=64),
}
SMOKE = dict(steps=4, batch=4, log_every=1, save_every=2, workers=0,
             out=Path("runs/smoke/teacher"))
FREE = {"preset", "steps", "epochs", "save_every", "log_every", "workers", "device", "out", "smoke"}


def parse(argv: list[str] | None) -> argparse.Namespace:
    p = runtime.Parser(__doc__)
    count, add = runtime.positive_int, p.add_argument
    add("--preset", choices=PRESETS, default="demo", help="row of defaults")
    add("--data", default="shapes", help="shapes, cifar10, or a folder of class folders")
    add("--size", type=count, help="side of the images in pixels")
    add("--features", help="of what: judge, dinov2_vitl14, _vitb14, _vits14, a file of "
        "their weights, efficientnet-lite0, or module:function")
    add("--grid", type=count, help="positions per side of the latent")
    add("--channels", type=count, help="channels of the latent")
    add("--window", type=count, help="positions per side of what is mapped together")
    add("--out", type=Path, default=Path("runs/teacher"), help="folder of the run")
    add("--steps", type=count, help="optimiser steps in all")
    add("--batch", type=count, help="images in a step, over all processes")
    add("--lr", type=runtime.positive, help="learning rate of AdamW")
    runtime.add_running_flags(p)
    return p.parse(argv, PRESETS, SMOKE)


# ------------------------------------------------------------------------------
# A run.


@runtime.command
def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    rt = runtime.start(args.device)
    runtime.claim(rt, args.out)
    runtime.check_batch(args.batch, rt)
    train, val = (data.open_dataset(args.data, args.size, part, args.seed)
                  for part in ("train", "val"))
    rt.print(data.summary(train))
    if args.epochs:
        args.steps = runtime.steps_of(args.epochs, len(train), args.batch)

    network = frozen.load_teacher(args.features, args.grid, imagenet=True)
    if isinstance(network, nn.Module):
        network.to(rt.device)

    @torch.no_grad()
    def features(x: Tensor) -> Tensor:
        with rt.autocast(args.precision):
            return network(x).float()

    shape = features(torch.zeros(1, 3, args.size, args.size, device=rt.device)).shape
    if len(shape) != 4 or shape[2:] != (args.grid, args.grid):
        raise InputError(f"--features {args.features} gives {list(shape)} for one image: "
                         f"--grid needs [1, D, {args.grid}, {args.grid}]")
    torch.manual_seed(args.seed)   # the same weights in every process
    teacher = neighbours.SemanticTeacher(shape[1], args.grid, args.channels, args.window)
    learned = rt.wrap(teacher.to(rt.device))
    optimizer = torch.optim.AdamW(teacher.parameters(), lr=args.lr, betas=(0.9, 0.98),
                                  weight_decay=0.05, fused=True)
    checkpoint = args.out / "checkpoint.pt"
    config = runtime.plain(args) | {"data_sha256": data.fingerprint(train)}
    done = checkpoints.resume(checkpoint, "teacher", config, FREE, model=teacher,
                              optimizer=optimizer).get("step", 0)
    log = runtime.Log(args.out / "log.jsonl", config, rt, done)

    finite = runtime.FiniteCheck(rt.device)
    batches = data.batches(train, args.batch, args.seed, start=done, rank=rt.rank,
                           world=rt.world, workers=args.workers, device=rt.device)
    for step in runtime.steps("teacher", done, args.steps, rt):
        batch = next(batches)
        runtime.report_skipped(batch["skipped"])
        f = features(batch["x"])
        with rt.autocast(args.precision):
            f_hat = learned(f)
        loss = objectives.cosine_distance(f_hat.float(), f)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        lr = runtime.learning_rate(step, args.steps, args.lr, args.warmup, cosine=True)
        optimizer.param_groups[0]["lr"] = lr
        optimizer.step()
        finite.add(step, {"loss": loss})

        step += 1
        if step % args.log_every == 0 or step == args.steps:
            finite.flush()
            log.write(step=step, lr=lr, **runtime.mean_over_ranks({"loss": loss}),
                      memory_gib=runtime.peak_memory(rt.device))
        stop = runtime.stop_asked()
        if step % args.save_every == 0 or step == args.steps or stop:
            finite.flush()
            runtime.check_same_on_all_ranks(teacher)
            if rt.is_main:
                log.write(step=step, held_out={"loss": held_out(teacher, features, val)})
                state = {"kind": "teacher", "config": config, "step": step,
                         "model_config": teacher.config, "model": teacher.state_dict(),
                         "optimizer": optimizer.state_dict()}
                checkpoints.save(state, checkpoint)
            runtime.barrier()
        if stop:
            raise runtime.Stopped(f"stopped at step {step}; the same command goes on")
    rt.print(f"{checkpoint} has {max(done, args.steps)} steps")


@torch.no_grad()
def held_out(teacher: neighbours.SemanticTeacher, features: Any, val: data.Dataset) -> float:
    """The loss of 256 held-out images."""
    total, count, device = 0.0, 0, teacher.position.device
    for part in data.once(val, 32, limit=256, device=device):
        f = features(part["x"])
        total += objectives.cosine_distance(teacher(f), f).item() * len(f)
        count += len(f)
    return total / count


if __name__ == "__main__":
    main()
