"""Stage 1 end to end.

The first test is the definition of the training: `written_out` has all of it in
plain PyTorch, and main must arrive at the same weights.  Then come every flag,
the held-out images, resume, two processes, and bad input.
"""

import copy
import itertools
import json
import math
import os
import pkgutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import runtime  # before torch, because it says how idle threads wait

import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn
from torch.testing import assert_close

import checkpoints
import data
import losses
import models
import objectives
import train_tokenizer

SCRIPT = Path(train_tokenizer.__file__)
ONE_THREAD = {"OMP_NUM_THREADS": "1"}
CPU = runtime.Runtime(torch.device("cpu"))
TEACHER = """
import torch.nn.functional as F


def pooled(x):                       # [B, 3, 32, 32] -> [B, 12, 8, 8]
    return F.pixel_unshuffle(F.avg_pool2d(x, 2), 2)


def colours(x):
    return F.avg_pool2d(x, 4)


def coarse(x):
    return F.avg_pool2d(x, 8)


def target(x):                       # as many channels as the latent of GAE
    return F.avg_pool2d(x, 4).repeat(1, 11, 1, 1)[:, :32]


def target64(x):
    return F.avg_pool2d(x, 4).repeat(1, 22, 1, 1)[:, :64]


def target16(x):
    return target(x)[:, :16]
"""


class FakeLpips(nn.Module):
    """A distance of fixed random features, in place of LPIPS."""

    def __init__(self) -> None:
        super().__init__()
        draws = torch.Generator().manual_seed(0)
        self.register_buffer("weight", torch.randn(4, 3, 3, 3, generator=draws))

    def forward(self, a, b):
        difference = F.conv2d(a, self.weight).relu() - F.conv2d(b, self.weight).relu()
        return difference.square().mean((1, 2, 3), keepdim=True)


@pytest.fixture(autouse=True)
def stand_ins(tmp_path, monkeypatch):
    """One thread, a distance in place of LPIPS, and teachers that pool pixels."""
    torch.set_num_threads(1)
    monkeypatch.setattr("frozen.load_lpips", FakeLpips)
    (tmp_path / "my_teacher.py").write_text(TEACHER)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.delitem(sys.modules, "my_teacher", raising=False)


@pytest.fixture
def tiny(monkeypatch):
    """All tokenizers become tiny, with latents of 8 x 8 positions."""
    small = {"vit": dict(depth=1, width=16, heads=2, image_size=32, patch=4),
             "conv": dict(ch=8, ch_mult=(1, 1, 2), num_res_blocks=1, resolution=64)}
    small["dgae"] = small["conv"] | dict(
        unet_ch=8, unet_mult=(1, 2), unet_blocks=1, decode_steps=2)
    for name, row in [*models.AUTOENCODERS.items()]:
        monkeypatch.setitem(models.AUTOENCODERS, name, row | small[row["arch"]])


def train(out: Path, *flags: str) -> dict:
    """The checkpoint of a smoke run with these flags."""
    train_tokenizer.main(["--smoke", "--size", "32", "--device", "cpu", "--teacher",
                          "my_teacher:pooled", "--out", str(out), *flags])
    return torch.load(out / "checkpoint.pt", weights_only=True)


def read_log(out: Path) -> list[dict]:
    lines = (out / "log.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def logged(out: Path, step: int) -> dict:
    """What the log says of the loss at this step."""
    return next(line for line in read_log(out) if line.get("step") == step and "rec" in line)


def flags_of(**settings: object) -> list[str]:
    """lr=0.1 -> --lr 0.1"""
    pairs = [(f"--{name.replace('_', '-')}", str(value)) for name, value in settings.items()]
    return [word for pair in pairs for word in pair]


def same(a: object, b: object) -> bool:
    """Bitwise equality of nested containers of tensors."""
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    return torch.equal(a, b) if torch.is_tensor(a) else a == b


# ------------------------------------------------------------------------------
# The training, written out: nothing of train_tokenizer.py or losses.py is used.
# s has the settings, which are the flags with "_" for "-".

PIXELS = 3 * 32 * 32   # numbers of one image
STATISTICS = "running_mean", "running_var", "num_batches_tracked"   # of PatchGAN
# What a line of the log and a checkpoint have besides what is compared here.
SUMMARY = {"step", "memory_gib", "spread", "sigma2", "sigma2_p50", "at_clamp",
           "relative_noise"}
ABOUT = {"kind", "config", "model_config", "step", "latent_mean", "latent_std"}
DEFAULTS = dict(
    loss="ve", lambda1=0.1, lambda2=1e-6, tau=1.0, delta=1e-6, ve_warmup=0, kl_weight=1e-6,
    sigma=0.2, sigma_mode="gaussian", mean_weight=0.24, perceptual_weight=0.0,
    disc_weight=0.0, disc_start=2501, align_weight=0.0, batch=4, accumulate=1, lr=1e-3,
    steps=3, clip=1.0, warmup=100, cooldown=0.0, seed=0, cosine=False, betas=(0.5, 0.9),
    weight_decay=0.0, semantic_weight=0.0, semantic_at="latent", disc_mode="adaptive",
    teacher="my_teacher:pooled", regularizer=None, target_noise=None)
# The layers at which alignment and adversary are balanced with L_rec.
LAYERS = {"vit-shapes": ("adapter", "smooth.1"), "gae-demo": ("adapter", "smooth.1"),
          "vit-demo": ("adapter", "decoder.linear"), "gae-d32": ("adapter", "decoder.linear"),
          "gae-d64": ("adapter", "decoder.linear")}
LAYERS_OF_CONV = "encoder.conv_out", "decoder.conv_out"


def summed(a):
    """Over C, H and W, and averaged over the batch."""
    return a.sum((1, 2, 3)).mean()


def deviation(s, logvar, scale):
    """The deviation of the noise on the latent."""
    if s.loss == "none":
        return 0
    if s.loss != "sigma":
        return logvar.exp().sqrt()
    return s.sigma if s.sigma_mode == "fixed" else s.sigma / 0.8 * scale.view(-1, 1, 1, 1)


def latent_loss(s, lambda1, mean, logvar, z):
    """What the objective adds to L_rec."""
    variance = logvar.exp()
    magnitude = s.lambda2 * summed((z.abs() - s.tau).exp())
    if s.loss == "ve":
        return lambda1 * summed(1 / (variance + s.delta)) + magnitude
    if s.loss == "log-entropy":
        return lambda1 * summed(-logvar) + magnitude
    if s.loss == "negative-variance":
        return lambda1 * summed(-variance) + magnitude
    if s.loss == "kl":
        return s.kl_weight * summed((mean**2 + variance - logvar - 1) / 2)
    return s.mean_weight * summed(mean**2) if s.loss == "sigma" else 0


def alignment(a, b):
    """VA-VAE's distance of two maps [B, D, h, w]."""
    def similarities(a):
        unit = a.flatten(2) / a.flatten(2).norm(dim=1, keepdim=True)
        return unit.mT @ unit

    apart = (similarities(a) - similarities(b)).abs()
    cosine = (a * b).sum(1) / (a.norm(dim=1) * b.norm(dim=1))
    return (apart - 0.25).relu().mean() + (0.5 - cosine).relu().mean()


def moved(a, side, turns):
    """Resized, and turned by quarters to the left."""
    a = F.interpolate(a, (side, side), mode="bilinear")
    for _ in range(turns):
        a = a.transpose(2, 3).flip(2)
    return a


def correlation(mean):
    """0.75 - rho of LCR, or 0: a mean over the pairs of all windows."""
    std, centre = torch.std_mean(mean.detach(), dim=(0, 2, 3), correction=0, keepdim=True)
    a, found = (mean - centre) / (std + 1e-6), []
    for i, j in itertools.product(range(0, 8, 2), repeat=2):
        for window in a[:, :, i:i + 2, j:j + 2].flatten(2).mT:   # [4, C]
            found += [torch.corrcoef(window)[pair] for pair in itertools.combinations(range(4), 2)]
    return (0.75 - torch.stack(found).mean()).relu()


def route(s, step, x, token):
    """What the encoder sees, what x_hat should be, and what becomes of z."""
    draw = runtime.generator(s.seed, "regularizer", step)
    if s.regularizer == "eq":
        moves = torch.rand((), generator=draw) < 0.5
        side, turns = (int(torch.randint(*ends, (), generator=draw)) for ends in ((2, 8), (1, 4)))
        side, turns = 8 if s.model.startswith("vit") else side, turns
        if moves:
            return x, moved(x, 4 * side, turns), lambda z: moved(z, side, turns)
    if s.regularizer == "lmr":
        quarters = int(torch.tensor([0.7, 0.1, 0.1, 0.1]).multinomial(1, generator=draw))
        hidden = torch.randperm(64, generator=draw).view(8, 8) < 16 * quarters
        keep = 1 - hidden.float()
        return x, x, lambda z: keep * z + (1 - keep) * token["token"].view(-1, 1, 1)
    if s.regularizer == "mae":
        count = round(64 * (0.4 * torch.rand((), generator=draw).item() - 0.1))
        order = runtime.global_randn((len(x), 64), CPU, s.seed, "patches", step)
        seen = x.clone()
        for n in range(len(x)):
            for k in order[n].argsort()[:max(0, count)].tolist():
                seen[n, :, k // 8 * 4:k // 8 * 4 + 4, k % 8 * 4:k % 8 * 4 + 4] = 0
        return seen, x, lambda z: z
    return x, x, lambda z: z


def balance(rec, other, layer, maximum):
    """The weight at which `other` pulls at the layer as hard as `rec`."""
    a, b = (torch.autograd.grad(loss, layer.weight, retain_graph=True)[0].norm()
            for loss in (rec, other))
    return (a / (b + 1e-4)).clamp(max=maximum)


def networks(s, init=None):
    """What trains: networks and optimisers by their names in the checkpoint."""
    torch.manual_seed(s.seed)
    kinds = {"sigma": dict(noise="gaussian", sigma=s.sigma), "none": dict(noise="none")}
    given = kinds.get(s.loss, {})
    tokenizer = models.build_tokenizer(models.AUTOENCODERS[s.model] | given)
    tokenizer.load_state_dict(init or tokenizer.state_dict())
    trained = nn.ModuleDict({"model": tokenizer})
    if s.align_weight:
        trained["projection"] = nn.Conv2d(tokenizer.channels, 12, 1, bias=False)
    if s.regularizer == "repa":
        trained["repa_mlp"] = nn.Sequential(
            nn.Conv2d(tokenizer.channels, 24, 1), nn.SiLU(), nn.Conv2d(24, 24, 1), nn.SiLU(),
            nn.Conv2d(24, 12, 1))
    if s.regularizer == "lmr":
        trained["mask_token"] = nn.ParameterDict({"token": torch.randn(tokenizer.channels)})
    if s.target_noise:
        given = nn.Module()
        given.register_buffer("log_lambda1", torch.tensor(s.lambda1).log())
        trained["lambda1"] = given
    adamw = dict(betas=s.betas, weight_decay=s.weight_decay)
    optimizer = torch.optim.AdamW(trained.parameters(), **adamw)
    if not s.disc_weight:
        return dict(trained) | {"optimizer": optimizer}
    critic = models.PatchGAN()
    return dict(trained) | {
        "optimizer": optimizer, "discriminator": critic,
        "disc_optimizer": torch.optim.AdamW(critic.parameters(), **adamw)}


def written_out(s, parts):
    """Trains the parts, and returns the last line of the log."""
    tokenizer, projection, mlp, token, optimizer, critic, critic_optimizer = map(parts.get, (
        "model", "projection", "repa_mlp", "mask_token", "optimizer", "discriminator",
        "disc_optimizer"))
    layers = LAYERS.get(s.model, LAYERS_OF_CONV)
    latent_layer, image_layer = map(tokenizer.get_submodule, layers)
    parameters = optimizer.param_groups[0]["params"]
    images = data.batches(data.open_dataset("shapes", 32, "train", s.seed), s.batch, s.seed)
    for step in range(s.steps):
        x, shape = next(images)["x"], (s.batch, tokenizer.channels, 8, 8)
        eps = runtime.global_randn(shape, CPU, s.seed, "eps", step)
        scale = runtime.global_randn((s.batch,), CPU, s.seed, "scale", step)
        noise = runtime.global_randn((s.batch, 3, 32, 32), CPU, s.seed, "decoder", step)
        t = runtime.global_rand(s.batch, CPU, s.seed, "decoder's time", step)
        lambda1 = s.lambda1
        if s.target_noise:
            lambda1 = parts["lambda1"].log_lambda1.exp()
        lambda1 = lambda1 * min(1, (step + 1) / max(1, s.ve_warmup))
        optimizer.zero_grad()
        pairs, posteriors = [], []
        seen, target, change = route(s, step, x, token)
        rows = x, seen, target, eps, scale, noise, t.view(-1, 1, 1, 1)
        for x, seen, target, eps, scale, noise, t in zip(*(a.chunk(s.accumulate) for a in rows)):
            mean, logvar = tokenizer.encode(seen).tensor_split([tokenizer.channels], dim=1)
            z = mean + deviation(s, logvar, scale) * eps
            posteriors.append((mean.detach(), logvar.detach().exp()))
            if s.model.startswith("dgae"):   # one step of the decoder at a random time
                x_t = (1 - t) * noise + t * x
                v_hat = tokenizer.decoder(x_t, t.flatten(), tokenizer.post_quant_conv(change(z)))
                x_hat, rec = x_t + (1 - t) * v_hat, summed((v_hat - x + noise) ** 2)
            else:
                x_hat = tokenizer.decode(change(z))
                rec = summed((x_hat - target).abs())
            if s.perceptual_weight:
                rec = rec + s.perceptual_weight * PIXELS * FakeLpips()(x_hat, target).mean()
            loss = rec + latent_loss(s, lambda1, mean, logvar, z)
            log = {"rec": rec, "max_z": z.abs().max()}
            if s.align_weight:
                align = alignment(projection(z), sys.modules["my_teacher"].pooled(x))
                weight = s.align_weight * balance(rec, align, latent_layer, 1e8)
                loss = loss + weight * align
                log |= {"align": align, "align_weight": weight}
            if s.semantic_weight:
                wanted = getattr(sys.modules["my_teacher"], s.teacher.split(":")[1])(x)
                wanted = wanted / (wanted.square().mean(1, keepdim=True) + 1e-6).sqrt()
                semantic = (mean - wanted).square().mean()
                weight = s.semantic_weight * target[0].numel()
                loss = loss + weight * semantic
                log |= {"semantic": semantic, "semantic_weight": torch.tensor(weight)}
            if s.regularizer in ("lcr", "repa"):
                name, strength = s.regularizer, {"lcr": 0.002, "repa": 0.1}[s.regularizer]
                if name == "lcr":
                    other = correlation(mean)
                else:
                    wanted = sys.modules["my_teacher"].pooled(x)
                    other = 1 - F.cosine_similarity(mlp(z), wanted).mean()
                weight = strength * balance(rec, other, latent_layer, 1e8)
                loss = loss + weight * other
                log |= {name: other, f"{name}_weight": weight}
            if s.disc_weight and step >= s.disc_start:
                adv = -critic(x_hat).mean()
                if s.disc_mode == "constant":
                    weight = torch.tensor(s.disc_weight * PIXELS)
                else:
                    weight = s.disc_weight * balance(rec, adv, image_layer, 1e4)
                loss = loss + weight * adv
                log |= {"adv": adv, "adv_weight": weight}
                pairs.append((target, x_hat.detach()))
            (loss / s.accumulate).backward()

        rate = s.lr * min(1, (step + 1) / s.warmup)
        if s.cooldown:
            rate = min(rate, s.lr * (s.steps - step) / (s.steps * s.cooldown))
        optimizer.param_groups[0]["lr"] = rate
        norm = nn.utils.clip_grad_norm_(parameters, s.clip * PIXELS)
        optimizer.step()
        if s.target_noise:   # one fiftieth of what is missing from the logarithm
            means, variances = map(torch.cat, zip(*posteriors))
            share = variances.mean((0, 2, 3)) / means.var((0, 2, 3), correction=0)
            missing = math.log(s.target_noise**2) - share.quantile(0.5).log()
            if step >= s.ve_warmup:
                parts["lambda1"].log_lambda1 += 0.02 * missing.clamp(-1, 1)
            log["lambda1"] = lambda1
        if pairs:
            critic_optimizer.param_groups[0]["lr"] = rate
            critic_optimizer.zero_grad()
            for x, x_hat in pairs:
                hinge = ((1 - critic(x)).relu().mean() + (1 + critic(x_hat)).relu().mean()) / 2
                (hinge / s.accumulate).backward()
            critic_optimizer.step()
    return log | {"total": loss, "grad_norm": norm / PIXELS, "lr": torch.tensor(rate)}


def vector(tensors) -> torch.Tensor:
    return torch.cat([torch.zeros(0), *(a.flatten() for a in tensors)])


def moments(optimizer: dict, key: str = "exp_avg") -> torch.Tensor:
    """AdamW's average of the gradients, or with exp_avg_sq of their squares."""
    return vector(state[key] for state in optimizer["state"].values())


def parameters_of(network: dict) -> torch.Tensor:
    """All of them, but for the bias of an attention's keys.

    It has no effect on the softmax.  So its gradient is rounding alone, of which
    AdamW makes whole steps.
    """
    return vector(value for name, value in network.items()
                  if not name.endswith(("k.bias", *STATISTICS)))


def assert_main_does_the_same(out: Path, flags: list[str], settings: dict, init=None):
    """Moments of the gradients agree, and parameters, to a share of their way.

    Where one of PatchGAN's 100,000 LeakyReLUs is so near its kink that rounding
    moves it across, the gradient changes by some thousandths.
    """
    s = SimpleNamespace(**DEFAULTS | settings)
    share = 1e-2 if s.disc_weight and s.disc_start < s.steps else 1e-4
    found = train(out, *flags, "--steps", str(s.steps))
    parts = networks(s, init)
    start = copy.deepcopy({name: part.state_dict() for name, part in parts.items()})
    log, line = written_out(s, parts), logged(out, s.steps)
    assert line.keys() - log.keys() <= SUMMARY
    for name, value in log.items():
        near = dict(abs=share / 10) if name == "adv" else dict(rel=share / 10)
        assert line[name] == pytest.approx(value.item(), **near), name
    assert found.keys() == parts.keys() | ABOUT
    for name, part in parts.items():
        a, b = found[name], part.state_dict()
        if "optimizer" in name:
            for key in ("exp_avg", "exp_avg_sq"):
                u, v = moments(a, key), moments(b, key)
                assert (u - v).norm() <= share * v.norm(), (name, key)
        else:
            u, v, w = map(parameters_of, (a, b, start[name]))
            assert (u - v).norm() <= 5 * share * (v - w).norm(), name
            for key in b:
                if key.endswith(STATISTICS):
                    assert_close(a[key], b[key], rtol=1e-3, atol=1e-5)


GAN = dict(lr=2.5e-5, perceptual_weight=1.0, disc_weight=0.5)
GAE_NOISE = dict(loss="sigma", sigma=0.2, mean_weight=0.0, semantic_weight=1.0)
GAE = GAN | GAE_NOISE | dict(lr=2e-4, warmup=8000, betas=(0.9, 0.98), weight_decay=0.05,
                             disc_mode="constant")
DGAE = dict(loss="kl", lr=1e-4, warmup=10_000, betas=(0.9, 0.95), weight_decay=0.1,
            perceptual_weight=0.5)
PRESETS = {
    "demo": dict(model="vit-shapes", lambda1=1e-3, lr=3e-3, warmup=2, cooldown=0.8),
    "small": dict(model="vit-demo", lr=1e-3),
    "photos-64": dict(model="f8d8", lr=1e-4, perceptual_weight=1.0),
    "photos-128": dict(model="f8d8", lr=1e-4, perceptual_weight=1.0),
    "photos-256": dict(model="f16d32", lr=1e-4, perceptual_weight=1.0),
    "ldm-f16d16": GAN | dict(model="f16d16"),
    "vavae-f16d32": GAN | dict(model="f16d32", align_weight=0.1),
    "vavae-f16d32-finetune": GAN | dict(model="f16d32", align_weight=0.1, disc_start=0,
                                        ve_warmup=1000),
    "gae-demo": GAE_NOISE | dict(model="gae-demo", semantic_weight=0.1, lr=3e-3, warmup=2,
                                 cooldown=0.8, teacher="my_teacher:target16"),
    "gae-d32": GAE | dict(model="gae-d32", teacher="my_teacher:target"),
    "gae-d64": GAE | dict(model="gae-d64", teacher="my_teacher:target64"),
    "dgae-demo": dict(model="dgae-demo", lambda1=1e-3, lr=3e-3, warmup=2, cooldown=0.8)} | {
    f"dgae-{size}": DGAE | dict(model=f"dgae-{size}") for size in "bml"}


@pytest.mark.parametrize("preset", train_tokenizer.PRESETS)
def test_three_steps_of_a_preset_are_those_written_out(tmp_path, tiny, monkeypatch, preset):
    """The rate rises over 100 steps.  In the demo it does so over 2, and falls over
    the last 2.4 of the 3 steps: it is 1/2, 2 / 2.4 and 1 / 2.4 of the highest."""
    settings, flags, init = PRESETS[preset], ["--preset", preset], None
    if preset.endswith("demo"):
        monkeypatch.setitem(train_tokenizer.PRESETS[preset], "warmup", 2)
    if "teacher" in settings:
        flags += ["--teacher", settings["teacher"]]
    if preset.endswith("finetune"):
        torch.manual_seed(9)
        init = models.build_tokenizer(models.AUTOENCODERS["f16d32"]).state_dict()
        torch.save({"state_dict": init}, tmp_path / "published.pt")
        flags += ["--init", str(tmp_path / "published.pt"), "--disc-start", "1"]
        settings = settings | dict(disc_start=1)   # the file has no discriminator
    assert_main_does_the_same(tmp_path / "run", flags, settings, init)


LARGE = dict(lambda1=0.3, lambda2=0.02, tau=0.5, delta=0.05, clip=0.02, lr=1e-3)
EVERYTHING = LARGE | dict(perceptual_weight=0.7, disc_weight=0.5, disc_start=1,
                          align_weight=0.1, ve_warmup=2)


@pytest.mark.parametrize("settings", [
    LARGE | dict(loss="ve"),
    LARGE | dict(loss="kl", kl_weight=0.01),
    LARGE | dict(loss="sigma", sigma=0.4, mean_weight=0.05),
    LARGE | dict(loss="sigma", sigma=0.4, mean_weight=0.05, sigma_mode="fixed"),
    LARGE | dict(loss="none"),
    LARGE | dict(loss="log-entropy"),
    LARGE | dict(loss="negative-variance", ve_warmup=2),
    LARGE | dict(target_noise=0.9, batch=6, accumulate=3, ve_warmup=2),
    LARGE | dict(target_noise=1e-3),
    EVERYTHING | dict(disc_weight=0.0),
    EVERYTHING | dict(model="f16d32"),
    EVERYTHING | dict(model="vit-shapes", batch=6, accumulate=3, seed=3),
    LARGE | dict(model="dgae-demo", batch=6, accumulate=3, perceptual_weight=0.7),
    LARGE | dict(model="gae-demo", semantic_weight=0.3, teacher="my_teacher:target16",
                 disc_weight=0.5, disc_start=1, disc_mode="constant"),
    LARGE | dict(regularizer="eq", model="f16d32", loss="kl", semantic_weight=0.3,
                 teacher="my_teacher:target"),
    EVERYTHING | dict(regularizer="eq"),
    LARGE | dict(regularizer="lcr", model="f16d32"),
    LARGE | dict(regularizer="lmr", loss="sigma"),
    LARGE | dict(regularizer="lmr", model="dgae-demo", batch=6, accumulate=3),
    LARGE | dict(regularizer="mae", loss="none", batch=6, accumulate=3, align_weight=0.1),
    LARGE | dict(regularizer="repa"),
], ids=lambda s: " ".join(f"{k}={v}" for k, v in s.items() if EVERYTHING.get(k) != v))
def test_three_steps_with_other_flags_are_those_written_out(tmp_path, tiny, settings):
    """The gradient is clipped, and every weight is large enough to be noticed."""
    settings = dict(model="vit-demo") | settings
    assert_main_does_the_same(tmp_path / "run", flags_of(**settings), settings)


# ------------------------------------------------------------------------------
# Every flag.


def on_latent(state, out):
    """What the first step's loss has besides L_rec."""
    return logged(out, 1)["total"] - logged(out, 1)["rec"]


def way(state, out):
    """How far the weights are from their start."""
    torch.manual_seed(0)
    start = models.build_tokenizer(models.AUTOENCODERS["vit-shapes"]).state_dict()
    return (vector(state["model"].values()) - vector(start.values())).norm().item()


def pull(state, out):
    """How large the gradient is, after it was clipped."""
    return moments(state["optimizer"]).norm().item()


def of_log(name):
    return lambda state, out: logged(out, 1)[name]


# A flag, two of its values, other flags, what the runs differ in, and its ratio.
# It is proportional to a weight.  exp(-tau) is a factor of Eq. 10, and a large
# delta is the denominator of Eq. 9.  With a large sigma z is noise.  The first
# step of AdamW is the rate, whatever the gradient, whose bound counts per pixel.
RATIOS = [
    ("--size", "16", "32", "--model f16d32 --clip 1e-3", pull, 4),
    ("--lambda1", "1", "3", "--lambda2 0", on_latent, 3),
    ("--lambda2", "1", "3", "--lambda1 0", on_latent, 3),
    ("--tau", "1", "2", "--lambda1 0 --lambda2 1", on_latent, math.exp(-1)),
    ("--delta", "1e6", "2e6", "--lambda1 1e6 --lambda2 0", on_latent, 1 / 2),
    ("--ve-warmup", "0", "4", "--lambda1 1 --lambda2 0", on_latent, 1 / 4),
    ("--kl-weight", "1", "3", "--loss kl", on_latent, 3),
    ("--mean-weight", "1", "3", "--loss sigma", on_latent, 3),
    ("--sigma", "100", "300", "--loss sigma", of_log("max_z"), 3),
    ("--perceptual-weight", "1e6", "3e6", "", of_log("rec"), 3),
    ("--disc-weight", "0.1", "0.3", "--disc-start 0", of_log("adv_weight"), 3),
    ("--align-weight", "0.1", "0.3", "", of_log("align_weight"), 3),
    ("--semantic-weight", "0.1", "0.3", "--teacher my_teacher:target16",
     of_log("semantic_weight"), 3),
    ("--lr", "1e-3", "3e-3", "", way, 3),
    ("--clip", "1e-3", "3e-3", "", pull, 3),
]


@pytest.mark.parametrize("flag, first, second, others, measure, ratio", RATIOS,
                         ids=[row[0] for row in RATIOS])
def test_a_flag_multiplies(tmp_path, tiny, flag, first, second, others, measure, ratio):
    found = []
    for value in (first, second):
        flags = "--steps", "1", *others.split(), flag, value
        found.append(measure(train(tmp_path / value, *flags), tmp_path / value))
    assert found[1] == pytest.approx(ratio * found[0], rel=1e-2)


def pictures(state, out):
    return sorted(int(path.stem) for path in out.glob("images/*"))


def red_in_picture(state, out):
    colours = Image.open(next(out.glob("images/*"))).getcolors(2**24)
    return (255, 0, 0) in [colour for _, colour in colours]


def steps_with_adversary(state, out):
    return [line["step"] for line in read_log(out) if "adv" in line]


# Other flags, what is looked at, and what it is with them.
VALUES = [
    ("--steps 2", lambda state, out: state["step"], 2),
    ("--steps 5 --save-every 2", pictures, [2, 4, 5]),
    ("--steps 3 --disc-start 2 --disc-weight 1", steps_with_adversary, [3]),
    ("--align-weight 1 --teacher my_teacher:colours",
     lambda state, out: list(state["projection"]["weight"].shape), [3, 16, 1, 1]),
    # 0.1 of the 3072 numbers of an image
    ("--disc-weight 0.1 --disc-start 0 --disc-mode constant",
     lambda state, out: round(logged(out, 1)["adv_weight"], 3), 307.2),
    ("--semantic-weight 1 --semantic-at post --teacher my_teacher:pooled",
     lambda state, out: list(state["semantic_projection"]["weight"].shape), [12, 16, 1, 1]),
    ("--model f16d32", lambda state, out: state["model_config"]["z_channels"], 32),
    ("--loss sigma", lambda state, out: state["model_config"]["noise"], "gaussian"),
    ("--loss sigma --sigma-mode fixed",
     lambda state, out: state["model_config"]["noise"], "fixed"),
    ("--loss none", lambda state, out: state["model_config"]["noise"], "none"),
    ("--data red", red_in_picture, True),
    # It has one image, and a step sees 4.
    ("--data red --epochs 8", lambda state, out: state["step"], 2),
]


@pytest.mark.parametrize("flags, look, expected", VALUES, ids=[row[0] for row in VALUES])
def test_a_flag_sets(tmp_path, tiny, monkeypatch, flags, look, expected):
    monkeypatch.chdir(tmp_path)
    Path("red").mkdir()
    Image.new("RGB", (32, 32), "red").save("red/a.png")
    state = train(tmp_path / "run", *flags.split())
    assert look(state, tmp_path / "run") == expected


# Flags that leave every number as it is, and the function that they call more often.
UNSEEN = [("--save-every 1", "checkpoints.save"), ("--recompute", "models.checkpoint"),
          ("--workers 1", "torch.utils.data.DataLoader"),
          ("--compile", "torch.nn.Module.compile")]


@pytest.mark.parametrize("flag, function", UNSEEN, ids=[row[0] for row in UNSEEN])
def test_a_flag_changes_no_number(tmp_path, tiny, monkeypatch, flag, function):
    calls, real = [], pkgutil.resolve_name(function)

    def counted(*args, **kwargs):
        calls.append(1)
        if flag == "--compile":   # without the minute that a compiler takes
            kwargs["backend"] = "eager"
        return real(*args, **kwargs)

    monkeypatch.setattr(function, counted)
    before = train(tmp_path / "a")
    without = len(calls)
    after = train(tmp_path / "b", *flag.split())
    assert len(calls) > 2 * without
    del before["config"], after["config"]
    assert same(before, after)


def test_a_compiled_tokenizer_can_be_balanced(tmp_path, tiny, monkeypatch):
    """Which goes backwards twice.  The backend is the one that plans the way back."""
    real = nn.Module.compile
    monkeypatch.setattr(nn.Module, "compile", lambda net, **more: real(net, **more, backend="aot_eager"))
    flags = ["--align-weight", "1", "--steps", "1"]
    a, b = (moments(train(tmp_path / n, *flags, *more)["optimizer"])
            for n, more in (("a", []), ("b", ["--compile"])))
    assert (a - b).norm() < 1e-5 * a.norm()


def test_a_loss_is_left_behind_at_the_image():
    """The value and the gradient stay, also where the total takes a third of it."""
    w = torch.linspace(-1, 1, 12).view(1, 3, 2, 2).requires_grad_()
    for way in (lambda loss, x_hat: loss, objectives.at_image):
        x_hat = w.sin()
        loss = way(x_hat.pow(3).sum(), x_hat)
        # 3 sin^2 cos, once by itself and once in the total.
        alone, = torch.autograd.grad(loss, w, retain_graph=True)
        total, = torch.autograd.grad(loss / 3 + w.sum(), w)
        assert torch.allclose(alone, 3 * w.sin().square() * w.cos())
        assert torch.allclose(total, alone / 3 + 1)
        assert torch.allclose(loss, w.sin().pow(3).sum())


def test_accumulated_parts_are_the_whole_batch(tmp_path, tiny):
    """Where nothing depends on the batch, as balanced weights and PatchGAN do."""
    one, four = (moments(train(tmp_path / n, "--accumulate", n, "--steps", "1")["optimizer"])
                 for n in "14")
    assert (one - four).norm() < 1e-5 * one.norm()


def test_a_batch_has_as_many_images(tmp_path, tiny):
    """Without noise and at no rate, the error on 8 images is the mean over 4 and 4."""
    flags = ["--loss", "none", "--lr", "1e-30", "--steps", "2"]
    train(tmp_path / "4", *flags, "--batch", "4")
    train(tmp_path / "8", *flags, "--batch", "8")
    first, second = (logged(tmp_path / "4", step)["rec"] for step in (1, 2))
    assert logged(tmp_path / "8", 1)["rec"] == pytest.approx((first + second) / 2, rel=1e-5)
    assert first != pytest.approx(second, rel=1e-2)


def test_bf16_is_for_tokenizer_discriminator_and_teacher(tmp_path, tiny, monkeypatch):
    """In the one step.  Losses and held-out images are always in fp32."""
    import my_teacher
    seen = {}

    def watch(owner, name, label):
        real = getattr(owner, name)

        def watched(*args):
            seen.setdefault(label, []).append(torch.is_autocast_enabled("cpu"))
            return real(*args)
        monkeypatch.setattr(owner, name, watched)

    watch(models.VitAutoencoder, "decode", "decoder")
    watch(models.PatchGAN, "forward", "discriminator")
    watch(my_teacher, "pooled", "teacher")
    watch(losses, "marginal_cosine", "alignment")
    watch(losses, "perceptual_error", "perceptual error")
    train(tmp_path / "run", "--steps", "1", "--precision", "bf16", *flags_of(
        disc_weight=1, disc_start=0, align_weight=1, perceptual_weight=1))
    assert seen == {
        "decoder": [True, False, False],
        "discriminator": [True, True, True],      # for the tokenizer, and on a pair
        "teacher": [True, True],                  # the first is for its shape
        "alignment": [False],
        "perceptual error": [False, False, False]}


def test_a_smoke_run_needs_no_other_flag(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    train_tokenizer.main(["--smoke"])
    assert (tmp_path / "runs/smoke/tokenizer/checkpoint.pt").exists()


def test_no_flag_is_forgotten():
    """--preset and --init are in the first test, --precision above, --accept-data and
    --device below, and --out and --smoke everywhere.  log_every and val_images have
    no flag."""
    shown = {*DEFAULTS, "preset", "init", "precision", "accept_data", "device", "out",
             "smoke", "log_every", "val_images"}
    for flags, *_ in RATIOS + VALUES + UNSEEN:
        shown |= {word[2:].replace("-", "_") for word in flags.split() if word[:2] == "--"}
    assert shown == vars(train_tokenizer.parse([])).keys()


# ------------------------------------------------------------------------------
# Held-out images.


@pytest.mark.parametrize("loss, model, others", [
    ("ve", "vit-shapes", {}), ("kl", "vit-shapes", {}), ("sigma", "vit-shapes", {}),
    ("ve", "dgae-demo", {}), ("ve", "vit-shapes", {"regularizer": "eq"}),
    ("ve", "vit-shapes", {"regularizer": "lmr"})])
def test_held_out_images_are_scored_as_written_here(tmp_path, tiny, monkeypatch, loss, model,
                                                    others):
    """40 images, evenly spread over the 2,000 of val, get their noise 32 at a time.

    With seed 5 the last step moves the latent, or hides half of it; the held-out do not."""
    monkeypatch.setitem(train_tokenizer.SMOKE, "val_images", 40)
    monkeypatch.setitem(train_tokenizer.SMOKE, "log_every", 3)
    shown = {}
    monkeypatch.setattr(data, "save_rows", lambda path, rows: shown.update(rows))
    settings = others | dict(
        loss=loss, model=model, lambda1=0.3, sigma=0.4, perceptual_weight=0.7, seed=5)
    train(tmp_path, *flags_of(**settings))
    tokenizer, state = checkpoints.load_tokenizer(tmp_path / "checkpoint.pt")
    pixels = data.Shapes(32, "val", seed=5).render_batch(torch.arange(0, 2000, 50).numpy())[0]
    x, noise = pixels / 127.5 - 1, []
    for k, count in enumerate((32, 8)):
        draws = runtime.generator(5, "held-out", k)
        noise.append([torch.randn(count, tokenizer.channels, 8, 8, generator=draws),
                      torch.randn(count, generator=draws)])
    eps, scale = map(torch.cat, zip(*noise))
    with torch.no_grad():
        mean, logvar = tokenizer.posterior(x)
        z = mean + deviation(SimpleNamespace(**DEFAULTS | settings), logvar, scale) * eps
        of_mean, of_sample = (tokenizer.decode(a, range(40)) for a in (mean, z))

    def rec(x_hat):
        return summed((x_hat - x).abs()) + 0.7 * PIXELS * FakeLpips()(x_hat, x).mean()

    def psnr(x_hat):
        error = (data.to_uint8(x_hat).double() - pixels).square().mean((1, 2, 3))
        return (10 * (255**2 / error).log10()).mean()

    expected = {"psnr_mean": psnr(of_mean), "psnr_sample": psnr(of_sample),
                "max_z": z.abs().max()}
    if loss != "sigma":   # what the noise costs, over L_var
        cost = (rec(of_sample) - rec(of_mean)) / summed(1 / (logvar.exp() + 1e-6))
        expected |= {"noise_cost": cost}
    if loss == "ve" and model == "vit-shapes":      # over lambda1
        expected |= {"balance": cost / 0.3}
    *_, line = read_log(tmp_path)
    summary = SUMMARY - {"step", "memory_gib"}
    assert line["held_out"].keys() - summary == expected.keys()
    for name, value in expected.items():
        assert line["held_out"][name] == pytest.approx(value.item(), rel=1e-3), name
    assert_close(state["latent_mean"], z.mean((0, 2, 3)), rtol=1e-3, atol=1e-5)
    assert_close(state["latent_std"], z.transpose(0, 1).flatten(1).std(1), rtol=1e-3, atol=0)
    assert [line["step"] for line in read_log(tmp_path) if "rec" in line] == [3, 4]

    # The picture has a row for each of these, and one of sigma if it is learned.
    for name, images in zip(("held-out images", "D(mean)", "D(z)"), (x, of_mean, of_sample)):
        pixels = data.to_uint8(images[:12]).permute(0, 2, 3, 1)
        assert (shown[name].int() - pixels).abs().max() <= 1, name
    if loss != "sigma":
        a = logvar[:12].mean(1) / 2
        a = (a - a.min()) / (a.max() - a.min())
        *_, found = shown.values()
        assert_close(found[:, ::4, ::4, 0] / 255, a, rtol=0, atol=0.01)


# ------------------------------------------------------------------------------
# A run goes on where it stopped, or from other weights.

ALL_NETWORKS = flags_of(disc_weight=0.5, disc_start=1, align_weight=0.1, perceptual_weight=0.7)


GAE_FLAGS = ["--preset", "gae-demo", "--teacher", "my_teacher:target16"]


@pytest.mark.parametrize("flags", [
    ALL_NETWORKS, ["--preset", "dgae-demo"],
    ["--preset", "gae-demo", "--semantic-at", "post", "--teacher", "my_teacher:pooled"],
    [*GAE_FLAGS, "--disc-weight", "0.5", "--disc-mode", "constant", "--disc-start", "1"],
    ["--target-noise", "0.3"],
    *(["--regularizer", name] for name in objectives.REGULARIZERS)],
    ids=["all", "dgae", "gae after the latent", "gae", "target", *objectives.REGULARIZERS])
def test_two_plus_two_steps_are_four(tmp_path, tiny, flags):
    whole = train(tmp_path / "whole", *flags)
    train(tmp_path / "parts", *flags, "--steps", "2")
    parts = train(tmp_path / "parts", *flags)
    del whole["config"], parts["config"]
    assert same(whole, parts)
    for step in (1, 2, 3, 4):
        assert logged(tmp_path / "whole", step) == logged(tmp_path / "parts", step)


def test_after_a_sigkill_the_same_command_ends_with_the_same_bits(tmp_path):
    flags = ["--steps", "60", "--save-every", "4"]
    whole = train(tmp_path / "whole", *flags)
    out = tmp_path / "killed"
    command = [sys.executable, SCRIPT, "--smoke", "--size", "32", "--device", "cpu",
               "--teacher", "my_teacher:pooled", "--out", out, *flags]
    process = subprocess.Popen(command, env=os.environ | ONE_THREAD, stderr=subprocess.DEVNULL)
    while not (out / "checkpoint.pt").exists() and process.poll() is None:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert checkpoints.read(out / "checkpoint.pt")["step"] < 60, "killed too late"
    resumed = train(out, *flags)
    assert same(whole["model"], resumed["model"])
    assert same(whole["optimizer"], resumed["optimizer"])


@pytest.mark.parametrize("lambda1", [1e-4, 10.0])
def test_lambda1_settles_where_the_noise_is_the_wanted_share(lambda1):
    """sigma^4 = lambda1 / T, the place of Eq. 14, with a spread of 2: noise of 0.2 is
    10 %, and the lambda1 is 0.2^4 T = 0.08.  250 of 5,000 steps are one time constant."""
    keeper, sensitivity = objectives.NoiseTarget(0.1, lambda1, steps=5000), 50.0
    mean = torch.tensor([2.0, -2.0]).view(2, 1, 1, 1).expand(2, 3, 4, 4)
    for _ in range(5000):
        logvar = (keeper.lambda1 / sensitivity).log() / 2
        keeper.see(mean, logvar.expand_as(mean))
        keeper.step()
    assert keeper.lambda1.item() == pytest.approx(0.08, rel=0.01)


def test_a_channel_that_says_nothing_does_not_move_lambda1():
    """Of three channels one has no spread, and noise of 1.  The others have 10 %."""
    keeper = objectives.NoiseTarget(0.1, 0.5, steps=100)
    mean = torch.tensor([1.0, -1.0]).view(2, 1, 1, 1) * torch.tensor([1.0, 1, 0]).view(3, 1, 1)
    keeper.see(mean, torch.tensor([0.01, 0.01, 1]).log().view(1, 3, 1, 1).expand_as(mean))
    keeper.step()
    assert keeper.lambda1.item() == pytest.approx(0.5, rel=1e-4)


def test_a_finished_run_keeps_its_checkpoint(tmp_path, tiny):
    train(tmp_path)
    before = (tmp_path / "checkpoint.pt").stat().st_mtime_ns
    train(tmp_path)
    assert (tmp_path / "checkpoint.pt").stat().st_mtime_ns == before


def test_a_run_starts_from_its_own_exported_weights(tmp_path, tiny):
    flags = [*ALL_NETWORKS, "--model", "f16d32"]
    state = train(tmp_path / "a", *flags)
    exported = str(tmp_path / "published.pt")
    checkpoints.main(["export", str(tmp_path / "a"), "--to", "vavae", exported])
    again = train(tmp_path / "b", *flags, "--init", exported, "--lr", "1e-30")
    assert same(again["model"], state["model"])
    assert same(again["projection"], state["projection"])
    for name, value in state["discriminator"].items():
        if not name.endswith(STATISTICS):
            assert torch.equal(again["discriminator"][name], value)


def test_the_smoke_run_of_gae_takes_the_teacher_of_a_smoke_run():
    gae = ["--preset", "gae-demo"]
    assert train_tokenizer.parse(gae).teacher == "runs/teacher/checkpoint.pt"
    assert train_tokenizer.parse(gae + ["--smoke"]).teacher == "runs/smoke/teacher/checkpoint.pt"


def test_a_file_without_discriminator_says_so(tmp_path, tiny, capsys):
    """An untrained one must not judge from the first step on."""
    flags = [*ALL_NETWORKS, "--model", "f16d32"]
    train(tmp_path / "a", *flags, "--disc-weight", "0")
    start = flags + ["--init", str(tmp_path / "a/checkpoint.pt"), "--disc-start"]
    said = refusal(capsys, tmp_path / "b", *start, "0")
    assert "give --disc-start 2501" in said
    assert train(tmp_path / "b", *start, "1")["discriminator"]


# ------------------------------------------------------------------------------
# Two processes.


def train_by_two(out: Path, *flags: str) -> dict:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone",
               "--nproc_per_node=2", SCRIPT, "--smoke", "--size", "32", "--device", "cpu",
               "--teacher", "my_teacher:pooled", "--out", out, *flags]
    done = subprocess.run(command, env=os.environ | ONE_THREAD, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return torch.load(out / "checkpoint.pt", weights_only=True)


def test_two_processes_train_as_one(tmp_path):
    """The global batch, its noise and the pulls that are balanced are the same."""
    flags = ["--model", "vit-demo", "--align-weight", "0.1", "--steps", "3"]
    one, two = train(tmp_path / "one", *flags), train_by_two(tmp_path / "two", *flags)
    for step in (1, 2, 3):
        a, b = (logged(tmp_path / name, step) for name in ("one", "two"))
        for key in ("rec", "total", "grad_norm", "align", "align_weight"):
            assert a[key] == pytest.approx(b[key], rel=1e-4), (step, key)
    a, b = moments(one["optimizer"]), moments(two["optimizer"])
    assert (a - b).norm() < 1e-3 * a.norm()


@pytest.mark.parametrize("flags", [["--preset", "dgae-demo"],
                                   ["--preset", "gae-demo", "--semantic-at", "post",
                                    "--teacher", "my_teacher:coarse"],
                                   ["--regularizer", "lmr", "--accumulate", "2"]],
                         ids=["dgae", "gae", "lmr"])
def test_two_processes_train_a_neighbour_as_one(tmp_path, flags):
    """A masked latent's token learns from all images, and stays where nothing is hidden."""
    one, two = train(tmp_path / "one", *flags), train_by_two(tmp_path / "two", *flags)
    for step in (1, 2, 3, 4):
        a, b = (logged(tmp_path / name, step) for name in ("one", "two"))
        assert [a[key] for key in ("rec", "total", "grad_norm")] == pytest.approx(
            [b[key] for key in ("rec", "total", "grad_norm")], rel=1e-3), step
    a, b = moments(one["optimizer"]), moments(two["optimizer"])
    assert (a - b).norm() < 1e-3 * a.norm()
    a, b = (state["optimizer"]["state"] for state in (one, two))
    a, b = a[max(a)]["exp_avg"], b[max(b)]["exp_avg"]   # of a map of its own, or of the token
    assert (a - b).norm() < 1e-3 * a.norm()


def test_two_processes_keep_one_lambda1(tmp_path):
    flags = ["--target-noise", "4", "--model", "vit-demo"]   # within a factor of e^0.5
    one, two = train(tmp_path / "one", *flags), train_by_two(tmp_path / "two", *flags)
    assert_close(one["lambda1"], two["lambda1"], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["eq", "mae"])
def test_two_processes_change_their_images_as_one_does(name):
    """Each has every second image of the batch.  Seed 0 moves and hides in step 1."""
    args = train_tokenizer.parse(["--smoke", "--size", "32", "--regularizer", name])
    tokenizer = models.build_tokenizer(models.AUTOENCODERS["vit-shapes"])
    x = torch.rand(4, 3, 32, 32)
    whole = objectives.route_of(args, tokenizer, CPU).begin(x, 1)
    assert not torch.equal(whole[name == "eq"], x)
    for rank in range(2):
        half = runtime.Runtime(CPU.device, rank, 2)
        found = objectives.route_of(args, tokenizer, half).begin(x[rank::2], 1)
        assert torch.equal(found[0], whole[0][rank::2])
        assert torch.equal(found[1], whole[1][rank::2])


def test_two_processes_teach_one_discriminator(tmp_path):
    """It begins in the third step, until when two processes are as one.  Both split
    their images into parts, so that its batch normalisation sees one at a time."""
    flags = ["--model", "vit-demo", "--accumulate", "2", "--align-weight", "0.1",
             "--disc-weight", "0.5", "--disc-start", "2"]
    train(tmp_path / "one", *flags, "--steps", "2")
    two = train_by_two(tmp_path / "two", *flags, "--steps", "3")

    tokenizer, _ = checkpoints.load_tokenizer(tmp_path / "one/checkpoint.pt")
    settings = dict(model="vit-demo", align_weight=0.1, disc_weight=0.5)
    critic = networks(SimpleNamespace(**DEFAULTS | settings))["discriminator"]
    images = data.batches(data.open_dataset("shapes", 32, "train"), 4)
    x = [next(images)["x"] for _ in range(3)][2]
    mean, logvar = tokenizer.posterior(x)
    eps = runtime.global_randn(mean.shape, CPU, 0, "eps", 2)
    x_hat = tokenizer.decode(mean + logvar.exp().sqrt() * eps)

    # The last parts of the processes are the images 2 and 3.
    rec = summed((x_hat - x)[2:].abs())
    adv = -(critic(x_hat[2:3]) + critic(x_hat[3:])).mean() / 2
    weight = 0.5 * balance(rec, adv, tokenizer.decoder.linear, 1e4)
    line = logged(tmp_path / "two", 3)
    assert line["adv"] == pytest.approx(adv.item(), rel=1e-3, abs=1e-4)
    assert line["adv_weight"] == pytest.approx(weight.item(), rel=1e-2)
    pairs = zip(x.split(1), x_hat.detach().split(1))
    hinge = sum((1 - critic(a)).relu().mean() + (1 + critic(b)).relu().mean() for a, b in pairs)
    expected = 0.5 * vector(torch.autograd.grad(hinge / 2 / 4, list(critic.parameters())))
    found = moments(two["disc_optimizer"])
    assert (found - expected).norm() < 1e-2 * expected.norm()


# ------------------------------------------------------------------------------
# Bad input.


def refusal(capsys, out: Path, *flags: str) -> str:
    """The one line with which the command ends."""
    with pytest.raises(SystemExit) as stop:
        train(out, *flags)
    lines = capsys.readouterr().err.strip().splitlines()
    assert stop.value.code == 2 and "error: " in lines[-1]
    assert not any("Traceback" in line for line in lines)
    return lines[-1]


def test_a_number_that_is_not_finite_stops_the_run(tmp_path, tiny, capsys, monkeypatch):
    train(tmp_path, "--steps", "2")
    good = (tmp_path / "checkpoint.pt").read_bytes()
    monkeypatch.setattr(train_tokenizer, "inverse_variance",
                        lambda logvar, delta: logvar.sum() * float("nan"))
    assert "step 2: total is nan" in refusal(capsys, tmp_path)
    assert (tmp_path / "checkpoint.pt").read_bytes() == good


def test_unreadable_images_are_named_and_left_out(tmp_path, tiny, capsys):
    folder = tmp_path / "images/train/a"
    folder.mkdir(parents=True)
    for i in range(5):
        Image.effect_noise((32, 32), 50).convert("RGB").save(folder / f"{i}.png")
    (folder / "5.png").write_bytes((folder / "0.png").read_bytes()[:100])
    state = train(tmp_path / "run", "--data", str(tmp_path / "images"))
    assert state["step"] == 4 and "5.png" in capsys.readouterr().err


def test_another_loss_does_not_go_on_with_a_run(tmp_path, tiny, capsys):
    train(tmp_path, "--steps", "2")
    assert "--loss ve (now kl)" in refusal(capsys, tmp_path, "--loss", "kl")


def test_other_images_go_on_with_a_run_only_if_accepted(tmp_path, tiny, capsys):
    images, out = tmp_path / "images", tmp_path / "run"
    images.mkdir()
    for colour in ("red", "blue"):
        Image.new("RGB", (32, 32), colour).save(images / "a.png")
        if colour == "red":
            train(out, "--data", str(images), "--steps", "2")
    assert "--accept-data" in refusal(capsys, out, "--data", str(images))
    assert train(out, "--data", str(images), "--accept-data")["step"] == 4


@pytest.mark.parametrize("flags, message", [
    ("--size 30", "cannot take --size 30"),
    ("--model demo --size 30", "a multiple of 4"),
    ("--data no/such/folder", "no/such/folder"),
    ("--device gpu", "--device gpu"),
    ("--delta 0", "--delta"),
    ("--lambda1 -1", "--lambda1"),
    ("--steps 0", "--steps"),
    ("--lr nan", "--lr"),
    ("--accumulate 3", "--accumulate 3"),
    ("--init no/such/file.pt", "no/such/file.pt"),
    ("--preset vavae-f16d32-finetune --model demo", "--init"),
    ("--disc-weight 1 --model demo --size 16", "--disc-weight 0"),
    ("--align-weight 1 --model vit-demo --teacher my_teacher:coarse", "[1, D, 8, 8]"),
    ("--align-weight 1 --teacher my_teacher:none", "my_teacher:none"),
    ("--preset gae-demo --teacher runs/teacher/checkpoint.pt", "python train_teacher.py"),
    ("--preset gae-demo --teacher my_teacher:coarse", "latent has [1, 16, 4, 4]"),
    ("--preset gae-demo --semantic-at pre --teacher my_teacher:pooled", "pre has [1, 128, 4, 4]"),
    ("--preset gae-demo --semantic-at post --teacher dinov2_vitl14", "1.2 GB"),
    ("--model demo --semantic-weight 1 --semantic-at pre --teacher my_teacher:pooled",
     "needs a ViT"),
    ("--gan-weight 1", "--gan-weight"),
    ("--target-noise 0.1 --loss kl", "needs --loss ve"),
    ("--target-noise 0.1 --lambda1 0", "--lambda1 above 0"),
    ("--target-noise 0", "--target-noise"),
    ("--regularizer best", "--regularizer: invalid choice"),
    ("--regularizer eq --preset dgae-demo", "choose lcr, lmr or repa"),
    ("--regularizer eq --model demo --perceptual-weight 1", "needs --size 64"),
    ("--regularizer eq --model demo --disc-weight 1", "needs --size 128"),
    ("--regularizer lcr --model f16d32 --size 16", "has one position"),
    ("--regularizer mae --model demo", "needs a ViT, not --model demo"),
    ("--regularizer repa --teacher dinov2_vitl14", "1.2 GB"),
])
def test_bad_input_is_one_line(tmp_path, capsys, flags, message):
    assert message in refusal(capsys, tmp_path / "run", *flags.split())
    assert not (tmp_path / "run").exists()
