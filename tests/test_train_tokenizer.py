"""Stage 1 end to end: three steps by hand, resume, two processes, bad input."""

import copy
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import runtime  # before torch, because it says how idle threads wait

import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn
from torch.testing import assert_close

import checkpoints
import data
import models
import train_tokenizer

SCRIPT = Path(train_tokenizer.__file__)
ONE_THREAD = {"OMP_NUM_THREADS": "1"}
CPU = runtime.Runtime(torch.device("cpu"))
TEACHER = """
import torch.nn.functional as F


def pooled(x):                       # [B, 3, 32, 32] -> [B, 12, 8, 8]
    return F.pixel_unshuffle(F.avg_pool2d(x, 2), 2)


def coarse(x):
    return F.avg_pool2d(x, 8)
"""


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)


@pytest.fixture
def everything(tmp_path, monkeypatch) -> list[str]:
    """Flags that switch LPIPS, the adversary and the alignment on."""
    (tmp_path / "my_teacher.py").write_text(TEACHER)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.delitem(sys.modules, "my_teacher", raising=False)
    monkeypatch.setattr("frozen.load_lpips", FakeLpips)
    return ["--disc-weight", "0.5", "--disc-start", "1", "--align-weight", "0.1",
            "--teacher", "my_teacher:pooled", "--perceptual-weight", "0.7"]


class FakeLpips(nn.Module):
    """A distance of fixed random features, in place of LPIPS."""

    def __init__(self) -> None:
        super().__init__()
        draws = torch.Generator().manual_seed(0)
        self.register_buffer("weight", torch.randn(4, 3, 3, 3, generator=draws))

    def forward(self, a, b):
        difference = F.conv2d(a, self.weight).relu() - F.conv2d(b, self.weight).relu()
        return difference.square().mean((1, 2, 3), keepdim=True)


def train(out: Path, *flags: str) -> dict:
    train_tokenizer.main(["--smoke", "--model", "vit-demo", "--size", "32",
                          "--precision", "fp32", "--out", str(out), *flags])
    return torch.load(out / "checkpoint.pt", weights_only=True)


def refusal(capsys, out: Path, *flags: str) -> str:
    """The one line with which the command ends."""
    with pytest.raises(SystemExit) as stop:
        train(out, *flags)
    lines = capsys.readouterr().err.strip().splitlines()
    assert stop.value.code == 2 and "error: " in lines[-1]
    assert not any("Traceback" in line for line in lines)
    return lines[-1]


def read_log(out: Path) -> list[dict]:
    lines = (out / "log.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def same(a: object, b: object) -> bool:
    """Bitwise equality of nested containers of tensors."""
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    return torch.equal(a, b) if torch.is_tensor(a) else a == b


@pytest.mark.parametrize("model", ["demo", "vit-demo"])
@pytest.mark.parametrize("loss", train_tokenizer.LOSSES)
def test_smoke_of_every_loss_and_architecture(tmp_path, loss, model):
    state = train(tmp_path, "--loss", loss, "--model", model)
    assert state["step"] == 4 and (tmp_path / "images/0000004.png").exists()
    tokenizer, checkpoint = checkpoints.load_tokenizer(tmp_path / "checkpoint.pt")
    assert tokenizer.learns_sigma == (loss not in ("sigma", "none"))
    assert (checkpoint["latent_std"] > 0).all()
    assert read_log(tmp_path)[-1]["held_out"]["psnr_mean"] > 0


def test_bare_smoke_needs_no_other_flag(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    train_tokenizer.main(["--smoke"])
    assert (tmp_path / "runs/smoke/tokenizer/checkpoint.pt").exists()


# ------------------------------------------------------------------------------
# Three steps of main are three steps written out here, in plain PyTorch.


def penalty(loss: str, mean, logvar, z):
    """What acts on the latent, without losses.py."""
    def total(a):
        return a.sum((1, 2, 3)).mean()

    variance = logvar.exp()
    magnitude = 0.02 * total((z.abs() - 0.5).exp())
    return {
        "ve": lambda: 0.3 * total(1 / (variance + 1e-3)) + magnitude,
        "kl": lambda: 0.01 * total(mean**2 + variance - logvar - 1) / 2,
        "sigma": lambda: 0.05 * total(mean**2),
        "none": lambda: 0.0,
        "log-entropy": lambda: 0.3 * total(-logvar) + magnitude,
        "negative-variance": lambda: 0.3 * total(-variance) + magnitude,
    }[loss]()


@pytest.mark.parametrize("loss, extra", [
    *((loss, False) for loss in train_tokenizer.LOSSES), ("ve", True), ("kl", True)])
def test_three_steps_are_those_written_by_hand(tmp_path, loss, extra, everything):
    """lr 1e-3 rises over 100 steps, lambda1 over 2; the gradient is clipped."""
    flags = ["--loss", loss, "--lambda1", "0.3", "--lambda2", "0.02", "--tau", "0.5",
             "--delta", "1e-3", "--kl-weight", "0.01", "--sigma", "0.4",
             "--mean-weight", "0.05", "--steps", "3", "--clip", "0.02", "--lr", "1e-3"]
    found = train(tmp_path / "run", *flags, *(everything if extra else []))

    torch.manual_seed(0)
    tokenizer = models.build_tokenizer(models.AUTOENCODERS["vit-demo"])
    parameters = list(tokenizer.parameters())
    if extra:
        import my_teacher
        projection = nn.Conv2d(tokenizer.channels, 12, 1, bias=False)
        parameters += projection.parameters()
        critic, lpips = models.PatchGAN(), FakeLpips()
        critic_optimizer = torch.optim.AdamW(critic.parameters(), betas=(0.5, 0.9),
                                             weight_decay=0, fused=True)
    optimizer = torch.optim.AdamW(parameters, betas=(0.5, 0.9), weight_decay=0, fused=True)
    starts = {"model": copy.deepcopy(tokenizer.state_dict())}
    if extra:
        starts |= {"projection": copy.deepcopy(projection.state_dict()),
                   "discriminator": copy.deepcopy(critic.state_dict())}
    images = data.batches(data.open_dataset("shapes", 32, "train", 0), 4, seed=0)
    for step in range(3):
        x = next(images)["x"]
        mean, logvar = tokenizer.posterior(x)
        eps = runtime.global_randn(mean.shape, CPU, 0, "eps", step)
        scale = runtime.global_randn((4,), CPU, 0, "scale", step).view(4, 1, 1, 1)
        std = {"sigma": 0.4 / 0.8 * scale, "none": 0}.get(loss, logvar.exp().sqrt())
        z = mean + std * eps
        x_hat = tokenizer.decode(z)
        rec = (x_hat - x).abs().sum((1, 2, 3)).mean()
        if extra:
            rec = rec + 0.7 * lpips(x_hat, x).mean() * 3 * 32 * 32
        total = rec + penalty(loss, mean, logvar, z)

        def weight(other, layer, base, maximum):
            a, b = (torch.autograd.grad(term, layer, retain_graph=True)[0].norm()
                    for term in (rec, other))
            return base * min(float(a / (b + 1e-4)), maximum)

        if extra:
            p, f = projection(z), my_teacher.pooled(x)
            def gram(a):
                unit = F.normalize(a.flatten(2), dim=1)
                return unit.mT @ unit
            align = ((gram(p) - gram(f)).abs() - 0.25).relu().mean()
            align = align + (1 - 0.5 - F.cosine_similarity(p, f)).relu().mean()
            layer = tokenizer.encoder_last_layer
            total = total + weight(align, layer, 0.1, 1e8) * align
        if extra and step >= 1:
            adv = -critic(x_hat).mean()
            total = total + weight(adv, tokenizer.last_layer, 0.5, 1e4) * adv
        optimizer.zero_grad()
        total.backward()
        rate = 1e-3 * (step + 1) / 100
        optimizer.param_groups[0]["lr"] = rate
        nn.utils.clip_grad_norm_(parameters, 0.02 * 3 * 32 * 32)
        optimizer.step()
        if extra and step >= 1:
            # The pass for the tokenizer has moved the running statistics once.
            critic_optimizer.param_groups[0]["lr"] = rate
            critic_optimizer.zero_grad()
            real, fake = critic(x), critic(x_hat.detach())
            ((1 - real).relu().mean() / 2 + (1 + fake).relu().mean() / 2).backward()
            critic_optimizer.step()

    trained = {"model": tokenizer}
    if extra:
        trained |= {"projection": projection, "discriminator": critic}
    for part, module in trained.items():
        names = [name for name, _ in module.named_parameters()]
        a, b, start = (torch.cat([state[name].flatten() for name in names]) for state in
                       (found[part], module.state_dict(), starts[part]))
        assert (a - b).norm() < 0.02 * (b - start).norm()


def test_lambda1_grows_over_its_warm_up(tmp_path):
    """With the same data and weights, total - rec of step 1 is L_var's share."""
    shares = []
    for warmup in ("0", "4"):
        train(tmp_path / warmup, "--ve-warmup", warmup, "--lambda2", "0")
        line = read_log(tmp_path / warmup)[1]
        shares.append(line["total"] - line["rec"])
    assert shares[1] == pytest.approx(shares[0] / 4, rel=1e-2)


def test_accumulated_parts_are_the_whole_batch(tmp_path):
    first = [train(tmp_path / n, "--accumulate", n, "--steps", "1") for n in "14"]
    logs = [read_log(tmp_path / n)[1]["grad_norm"] for n in "14"]
    assert logs[0] == pytest.approx(logs[1], rel=1e-5)
    for name, value in first[0]["model"].items():
        assert_close(first[1]["model"][name], value, rtol=1e-4, atol=1e-5)


# ------------------------------------------------------------------------------
# A run goes on where it stopped.


@pytest.mark.parametrize("extra", [False, True])
def test_two_plus_two_steps_are_four(tmp_path, everything, extra):
    flags = everything if extra else []
    whole = train(tmp_path / "whole", *flags)
    train(tmp_path / "parts", *flags, "--steps", "2")
    parts = train(tmp_path / "parts", *flags)
    del whole["config"], parts["config"]
    assert same(whole, parts)
    logs = [[line for line in read_log(tmp_path / name) if "rec" in line]
            for name in ("whole", "parts")]
    for line in logs[0] + logs[1]:
        del line["memory_gib"]
    assert logs[0] == logs[1] and len(logs[0]) == 4


def test_after_a_sigkill_the_same_command_ends_with_the_same_bits(tmp_path):
    flags = ["--steps", "60", "--save-every", "4"]
    whole = train(tmp_path / "whole", *flags)
    out = tmp_path / "killed"
    command = [sys.executable, SCRIPT, "--smoke", "--model", "vit-demo",
               "--size", "32", "--precision", "fp32", "--out", out, *flags]
    process = subprocess.Popen(command, env=os.environ | ONE_THREAD, stderr=subprocess.DEVNULL)
    while not (out / "checkpoint.pt").exists() and process.poll() is None:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert checkpoints.read(out / "checkpoint.pt")["step"] < 60, "killed too late"
    resumed = train(out, *flags)
    assert same(whole["model"], resumed["model"])
    assert same(whole["optimizer"], resumed["optimizer"])


def test_a_finished_run_keeps_its_checkpoint(tmp_path):
    train(tmp_path)
    before = (tmp_path / "checkpoint.pt").stat().st_mtime_ns
    train(tmp_path)
    assert (tmp_path / "checkpoint.pt").stat().st_mtime_ns == before


def test_a_number_that_is_not_finite_stops_the_run(tmp_path, capsys, monkeypatch):
    train(tmp_path, "--steps", "2")
    good = (tmp_path / "checkpoint.pt").read_bytes()
    monkeypatch.setattr(train_tokenizer, "inverse_variance",
                        lambda logvar, delta: logvar.sum() * float("nan"))
    assert "step 2: total is nan" in refusal(capsys, tmp_path)
    assert (tmp_path / "checkpoint.pt").read_bytes() == good


# ------------------------------------------------------------------------------
# Two processes.


def test_two_processes_train_as_one(tmp_path):
    """The global batch and its noise are the same, so that the first gradient
    agrees to rounding.  AdamW divides by the gradient's size and makes whole
    steps of the rounding of vanishing gradients; the updates agree as vectors."""
    flags = ["--steps", "3", "--save-every", "3"]
    one = train(tmp_path / "one", *flags)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone",
               "--nproc_per_node=2", SCRIPT, "--smoke", "--model", "vit-demo",
               "--size", "32", "--precision", "fp32", "--out", tmp_path / "two", *flags]
    done = subprocess.run(command, env=os.environ | ONE_THREAD, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    two = torch.load(tmp_path / "two/checkpoint.pt", weights_only=True)
    first = [read_log(tmp_path / name)[1] for name in ("one", "two")]
    for key in ("rec", "total", "grad_norm"):
        assert first[0][key] == pytest.approx(first[1][key], rel=1e-5)
    torch.manual_seed(0)
    start = models.build_tokenizer(models.AUTOENCODERS["vit-demo"]).state_dict()
    flat = [torch.cat([state[name].flatten() for name in start])
            for state in (one["model"], two["model"], start)]
    assert (flat[0] - flat[1]).norm() < 0.05 * (flat[0] - flat[2]).norm()


def test_two_processes_agree_with_adversary_and_alignment(tmp_path, everything):
    """The batch normalisation of each process sees its own half of the batch, so
    this is not the run of one process.  The trainer itself compares the weights."""
    flags = everything[:-2]   # LPIPS is replaced in this process only
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone",
               "--nproc_per_node=2", SCRIPT, "--smoke", "--model", "vit-demo",
               "--size", "32", "--out", tmp_path / "two", "--accumulate", "2", *flags]
    done = subprocess.run(command, env=os.environ | ONE_THREAD, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert {"adv", "adv_weight", "align"} <= {*read_log(tmp_path / "two")[-2]}


# ------------------------------------------------------------------------------
# Other weights, held-out images, and bad input.


def test_a_run_starts_from_its_own_exported_weights(tmp_path, everything):
    flags = [*everything, "--model", "demo"]
    state = train(tmp_path / "a", *flags)
    exported = str(tmp_path / "published.pt")
    checkpoints.main(["export", str(tmp_path / "a"), "--to", "vavae", exported])
    again = train(tmp_path / "b", *flags, "--init", exported, "--lr", "1e-30")
    assert same(again["model"], state["model"])
    assert same(again["projection"], state["projection"])
    for name, value in state["discriminator"].items():
        if "running" not in name and "num_batches" not in name:
            assert torch.equal(again["discriminator"][name], value)


def test_scores_of_a_decoder_that_copies(tmp_path):
    """x_hat = z and mean = x: rec(mean) = 0 and rec(sample) = sum |sigma eps|,
    so the noise costs that over sum 1 / sigma^2."""
    class Copy(nn.Module):
        learns_sigma = True

        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.zeros(1))

        def sample(self, mean, std, eps, scale):
            return mean + std * eps

        def posterior(self, x):
            return x, torch.full_like(x, 2 * torch.tensor(0.5).log())

        def decode(self, z):
            return z

    x = torch.rand(4, 3, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1
    scores, statistics = train_tokenizer.validate(
        Copy(), x, 0, lambda a, b: (a - b).abs().sum() / len(a), tmp_path / "a.png")
    eps = torch.randn(x.shape, generator=runtime.generator(0, "held-out", 0))
    expected = 0.5 * eps.abs().sum() / 4 / (3 * 16 * 16 / (0.5**2 + 1e-6))
    assert scores["noise_cost"] == pytest.approx(expected.item(), rel=1e-5)
    assert scores["psnr_mean"] > 99 > 30 > scores["psnr_sample"]
    z = (x + 0.5 * eps).transpose(0, 1).flatten(1)
    assert_close(statistics["latent_mean"], z.mean(1))
    assert_close(statistics["latent_std"], z.std(1))
    assert Image.open(tmp_path / "a.png").size[1] == 4 * (16 + 2) + 2


def test_unreadable_images_are_named_and_left_out(tmp_path, capsys):
    folder = tmp_path / "images/train/a"
    folder.mkdir(parents=True)
    for i in range(5):
        Image.effect_noise((32, 32), 50).convert("RGB").save(folder / f"{i}.png")
    (folder / "5.png").write_bytes((folder / "0.png").read_bytes()[:100])
    state = train(tmp_path / "run", "--data", str(tmp_path / "images"))
    assert state["step"] == 4 and "5.png" in capsys.readouterr().err


def test_another_loss_does_not_go_on_with_a_run(tmp_path, capsys):
    train(tmp_path, "--steps", "2")
    assert "--loss ve (now kl)" in refusal(capsys, tmp_path, "--loss", "kl")


@pytest.mark.parametrize("flags, message", [
    (["--size", "30"], "cannot take --size 30"),
    (["--model", "demo", "--size", "30"], "a multiple of 4"),
    (["--data", "no/such/folder"], "no/such/folder"),
    (["--delta", "0"], "--delta"),
    (["--lambda1", "-1"], "--lambda1"),
    (["--steps", "0"], "--steps"),
    (["--lr", "nan"], "--lr"),
    (["--accumulate", "3"], "--accumulate 3"),
    (["--init", "no/such/file.pt"], "no/such/file.pt"),
    (["--preset", "vavae-f16d32-finetune", "--model", "demo"], "--init"),
    (["--disc-weight", "1", "--model", "demo", "--size", "16"], "--disc-weight 0"),
    (["--align-weight", "1", "--teacher", "my_teacher:coarse"], "[1, D, 8, 8]"),
    (["--align-weight", "1", "--teacher", "my_teacher:none"], "my_teacher:none"),
    (["--gan-weight", "1"], "--gan-weight"),
])
def test_bad_input_is_one_line(tmp_path, capsys, everything, flags, message):
    assert message in refusal(capsys, tmp_path / "run", *flags)
    assert not (tmp_path / "run").exists()
