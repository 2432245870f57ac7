"""Stage 3: from noise to latents (Eqs. 30 and 31), and to images (Eq. 32).

    laptop      python sample.py
    one GPU     python sample.py --preset paper-1.70
    eight GPUs  torchrun --nproc_per_node=8 sample.py --preset paper-1.70
    published   python sample.py --preset lightningdit --dit lightningdit.pt
                    --tokenizer vavae.pt --latent-stats latents_stats.pt

The folder --out receives samples.npz (arr_0: images, uint8 [N, H, W, 3]; arr_1:
labels), samples.json with the settings, and grid.png.  Every image has its own
noise: number 7 is the same in any batch, and with any number of processes.  The
same command again goes on where it was interrupted.
"""

import argparse
import hashlib
import json
import shutil
from pathlib import Path

import runtime  # before torch: it says how idle threads wait

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

import checkpoints
import data
import flow
from runtime import InputError

# ------------------------------------------------------------------------------
# A preset is a row of defaults, which any flag overrides.  The paper guides by
# 1.70 for its best table (Sec. 5.3), and by 1.45 for the figures of supplement
# D.  It states neither a time shift nor how labels are drawn.  LightningDiT's
# protocol guides the first three channels only, as SiT's does, after 800 epochs or
# after 64.  GAE's numbers are from an SDE without guidance, and from the ODE with
# it, after 800 epochs or after 80; its SDE has another diffusion than SiT's.

PAPER = dict(count=50_000, steps=250, cfg_channels=0)
LIGHTNINGDIT = PAPER | dict(
    steps=249, shift=0.3, labels="random", cfg_channels=3, precision="fp32")
GAE = PAPER | dict(shift=0.4)
PRESETS = {
    "demo": dict(count=500, steps=25, guidance=3.0, cfg_channels=0),
    "plain": dict(count=1000, steps=50, cfg_channels=0),
    "paper-1.70": PAPER | dict(guidance=1.70, interval=[0.21, 1.0]),
    "paper-1.45": PAPER | dict(guidance=1.45, interval=[0.13, 1.0]),
    "lightningdit": LIGHTNINGDIT | dict(guidance=6.7, interval=[0.125, 1.0]),
    "lightningdit-64": LIGHTNINGDIT | dict(guidance=10.0, interval=[0.11, 1.0]),
    "lightningdit-plain": LIGHTNINGDIT,
    "gae": GAE | dict(guidance=3.3, interval=[0.3, 1.0]),
    "gae-80": GAE | dict(guidance=2.5, interval=[0.25, 1.0]),
    "gae-plain": GAE | dict(sampler="sde"),
}
SMOKE = dict(count=5, steps=2, at_once=3, dit=Path("runs/smoke/dit/checkpoint.pt"),
             out=Path("runs/smoke/samples"))


def parse(argv: list[str] | None) -> argparse.Namespace:
    p = runtime.Parser(__doc__)
    add, count = p.add_argument, runtime.positive_int
    add("--preset", choices=PRESETS, default="demo", help="row of defaults")
    add("--dit", type=Path, default=Path("runs/dit/checkpoint.pt"),
        help="checkpoint, ours or a published one")
    add("--tokenizer", type=Path, help="default: the one that the DiT names")
    add("--latent-stats", type=Path, help="mean and std, for a published DiT")
    add("--out", type=Path, default=Path("runs/samples"), help="folder")
    add("--count", type=count, help="images in all")
    add("--class", dest="classes", action="append", default=[], help="name or index; repeatable")
    add("--labels", choices=["balanced", "random"], default="balanced",
        help="classes equally often, or at random")
    add("--at-once", "--batch", type=count, default=100, help="images per process")
    add("--seed", type=runtime.seed, default=0, help="of the noise and of random labels")
    add("--sampler", choices=["euler", "heun", "sde"], default="euler",
        help="the ODE to first or second order, or SiT's SDE")
    add("--steps", type=count, help="steps from noise to data")
    add("--shift", type=runtime.positive, default=1.0, help="below 1: more steps near noise")
    add("--guidance", type=runtime.non_negative, default=1.0, help="scale; 1: none")
    add("--cfg-channels", type=runtime.natural_int, help="guide only the first ones; 0: all")
    add("--interval", type=runtime.share, nargs=2, default=[0.0, 1.0],
        help="times of guidance; t = 1 is the data")
    add("--decode-steps", type=count, help="of a diffusion decoder; default: its file's")
    add("--guide", type=Path, help="a weaker DiT to guide by, as in RAE")
    add("--device", default="auto", help="auto, cpu, cuda or mps")
    add("--precision", choices=["auto", "fp32", "bf16"], default="auto", help="auto: bf16 on CUDA")
    add("--compile", action=argparse.BooleanOptionalAction,
        help="torch.compile the transformer; default: on CUDA")
    add("--smoke", action="store_true", help="a few images in a few steps")
    args = p.parse(argv, PRESETS, SMOKE)
    if args.guide and args.guidance == 1:
        raise InputError("--guide does nothing at --guidance 1; RAE takes 1.42")
    if args.interval != sorted(args.interval):
        raise InputError("--interval takes its earlier time first")
    return args


# ------------------------------------------------------------------------------
# A checkpoint of ours names its tokenizer, and holds the statistics of its
# latents.  A published one needs --tokenizer, and --latent-stats too unless the
# tokenizer's file has them, as those of Stable Diffusion do.


class Networks:
    """The transformer `dit`, the `tokenizer` that decodes, and a `guide` or None.

    shape: [C, h, w] of the latents.  mean, std: [C].  null: the label of no class.
    data, label_dropout: of the DiT's training, as far as its file says so.
    """

    def __init__(self, dit: Path, tokenizer: Path | None, stats: Path | None,
                 guide: Path | None, decode_steps: int | None, device: torch.device) -> None:
        self.dit, origin = checkpoints.load_dit(dit)
        config = self.dit.config
        channels, side = config["in_channels"], config["input_size"]
        self.shape, self.null = [channels, side, side], config["num_classes"]
        self.classes = origin.get("classes") or [str(i) for i in range(self.null)]
        tokenizer = tokenizer or checkpoints.tokenizer_of(dit, origin)
        self.tokenizer, file = checkpoints.load_tokenizer(tokenizer, decode_steps)
        checkpoints.check_pair(dit, origin, tokenizer, self.tokenizer.channels)
        trained = origin.get("config", {}) if "kind" in origin else {}
        self.data, self.label_dropout = trained.get("data"), trained.get("label_dropout")
        self.data_seed = file.get("config", {}).get("seed", 0)
        self.mean, self.std = checkpoints.statistics(dit, origin, file, stats)
        self.guide = guide and checkpoints.load_guide(guide, dit, origin, file, stats).to(device)
        self.dit.to(device)
        self.tokenizer.to(device)
        files = [path for path in (dit, tokenizer, stats, guide) if path]
        self.sha256 = {str(path): runtime.file_sha256(path) for path in files}

    def find(self, wanted: list[str]) -> Tensor:
        """The labels of these names or indices of classes; without any, all labels."""
        known = {str(i): i for i in range(self.null)} | {c: i for i, c in enumerate(self.classes)}
        for name in set(wanted) - set(known):
            raise InputError(f"--class {name}: `python checkpoints.py show` lists the classes")
        return torch.tensor([known[name] for name in wanted] or range(self.null))

    @torch.no_grad()
    def decode(self, z: Tensor, images: list[int]) -> Tensor:
        """x_hat of these images on the CPU, a few at a time, to save memory."""
        return torch.cat([self.tokenizer.decode(z[i:i + 16], images[i:i + 16]).cpu()
                          for i in range(0, len(z), 16)])


# ------------------------------------------------------------------------------
# A run.  Each batch becomes a file, the processes share out those that are
# missing, and in the end one of them puts all together.


@runtime.command
def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    rt = runtime.start(args.device)
    runtime.claim(rt, args.out, args.out / "samples.npz")
    net = Networks(args.dit, args.tokenizer, args.latent_stats, args.guide,
                   args.decode_steps, rt.device)
    if args.guidance != 1 and not args.guide and net.label_dropout == 0:
        raise InputError(f"{args.dit} has learned with every label: use --guidance 1, or --guide")
    for dit in filter(None, [net.dit, net.guide]):
        rt.compile(args.compile, *dit.blocks)
    classes = net.find(args.classes)
    order = torch.arange(args.count) % len(classes)
    if args.labels == "random":
        order = torch.randint(len(classes), (args.count,),
                              generator=runtime.generator(args.seed, "sample labels"))
    labels = classes[order]

    # What decides what the images are.  A file counts by its hash.
    settings = runtime.plain(args) | {"device": rt.device.type, "sha256": net.sha256}
    others = "dit", "tokenizer", "latent_stats", "guide", "out", "compile"
    decisive = {k: v for k, v in settings.items() if k not in others}
    decisive["sha256"] = [*net.sha256.values()]
    digest = hashlib.sha256(json.dumps(decisive).encode()).hexdigest()
    npz, facts = args.out / "samples.npz", args.out / "samples.json"
    if npz.exists() and facts.exists() and runtime.read_json(facts).get("digest") == digest:
        return rt.print(f"{args.out} has these samples already")

    folder, size = args.out / f".parts-{digest[:16]}", net.shape[1] * net.tokenizer.stride
    parts = {folder / f"{images[0]:08d}.npy": images.tolist()
             for images in torch.arange(args.count).split(args.at_once)}
    missing = [part for part in parts if not part.exists()]
    runtime.barrier()  # everybody looks before anybody writes
    runtime.claim(rt, folder)
    bar = tqdm(desc="samples", total=args.count, unit="image", disable=not rt.is_main)
    bar.update(args.count - sum(len(parts[part]) for part in missing))
    for part in missing[rt.rank::rt.world]:
        images = parts[part]
        noise = runtime.noise_of(images, net.shape, args.seed, "sample").to(rt.device)
        y = labels[images].to(rt.device)
        velocity_fn = flow.guided_velocity(
            net.dit, y, net.null, args.guidance, args.interval, args.cfg_channels, net.guide)
        with rt.autocast(args.precision):
            # Eq. 30, by Euler's steps (Eq. 31) or by others.
            if args.sampler == "euler":
                z = flow.euler(velocity_fn, noise, args.steps, args.shift)
            elif args.sampler == "heun":
                z = flow.heun(velocity_fn, noise, args.steps, args.shift)
            else:
                z = flow.euler_maruyama(
                    velocity_fn, noise, args.steps, args.shift,
                    noise_fn=lambda k: runtime.noise_of(
                        images, net.shape, args.seed, "sample", "sde", k))
        z = flow.denormalize(z, net.mean, net.std)
        x_hat = net.decode(z, images)  # Eq. 32, in float32
        if not (z.isfinite().all() and x_hat.isfinite().all()):
            raise InputError(f"images {images[0]} to {images[-1]} are not finite: use "
                             "--precision fp32, or train the DiT again")
        # NumPy would hide a full disk from "wb".
        with runtime.atomic(part) as file, open(file, "wb+") as opened:
            np.save(opened, data.to_uint8(x_hat).permute(0, 2, 3, 1).numpy())
        bar.update(min(len(images) * rt.world, bar.total - bar.n))
    runtime.barrier()

    if rt.is_main:
        facts.unlink(missing_ok=True)  # it describes the images before these
        data.save_samples(npz, [*parts], (args.count, size, size, 3), labels)
        images = data.open_array(npz, "arr_0")
        data.save_rows(args.out / "grid.png", {
            net.classes[y]: images[(labels == y).numpy()][:8] for y in labels.unique()[:10]})
        for folder in args.out.glob(".parts-*"):
            shutil.rmtree(folder)
        runtime.write_json(facts, settings | {
            "digest": digest, "data": net.data, "data_seed": net.data_seed,
            "versions": runtime.versions()})
    rt.print(f"wrote {npz} and {args.out / 'grid.png'}")


if __name__ == "__main__":
    main()
