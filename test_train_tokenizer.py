"""The tokenizer's stage end to end: every loss, resume after SIGKILL, two processes, the log, and bad
input.
"""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from torch.testing import assert_close

import losses
import models
import runtime
import train_tokenizer

HERE = Path(__file__).parent
TINY = ["--smoke", "--warmup", "1"]
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1"}


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)


def train(out: Path, *flags: str) -> dict:
    train_tokenizer.main([*TINY, "--out", str(out), *flags])
    return torch.load(out / "checkpoint.pt", weights_only=True)


def script(*command: str) -> list[str]:
    return [sys.executable, str(HERE / "train_tokenizer.py"), *TINY, *command]


def read_log(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]


def offline(*args, **kwargs):
    raise OSError("no network")


def kill_after_first_checkpoint(command: list[str], out: Path, steps: int) -> None:
    """Run `command`, SIGKILL it once --out holds a checkpoint, and make sure that it had not finished."""
    process = subprocess.Popen(command, env=ENVIRONMENT, stderr=subprocess.DEVNULL)
    deadline = time.time() + 120
    while not (out / "checkpoint.pt").exists() and process.poll() is None and time.time() < deadline:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert torch.load(out / "checkpoint.pt", weights_only=True)["step"] < steps, "it finished before the kill"


def assert_same(a: object, b: object) -> None:
    """Bitwise equality of nested containers of tensors."""
    if isinstance(a, dict):
        assert a.keys() == b.keys()
        for key in a:
            assert_same(a[key], b[key])
    elif isinstance(a, list | tuple):
        assert len(a) == len(b)
        for left, right in zip(a, b):
            assert_same(left, right)
    elif isinstance(a, torch.Tensor):
        assert torch.equal(a, b)
    else:
        assert a == b


def update_difference(a: dict, b: dict, start: dict) -> float:
    """|a - b| / |a - start| over all parameters: what rounding did, relative to what training did."""
    flat = [torch.cat([state[k].double().flatten() for k in start]) for state in (a, b, start)]
    return ((flat[0] - flat[1]).norm() / (flat[0] - flat[2]).norm()).item()


@pytest.mark.parametrize("model", ["demo", "vit-demo"])
@pytest.mark.parametrize("loss", ["ve", "kl", "sigma", "none"])
def test_smoke_for_every_loss_and_architecture(tmp_path, loss, model):
    state = train(tmp_path, "--loss", loss, "--model", model)
    assert state["step"] == 4 and (tmp_path / "images" / "0000004.png").stat().st_size > 0
    lines = read_log(tmp_path)
    terms = {"ve": {"var", "reg"}, "kl": {"kl"}, "sigma": {"mean"}, "none": set()}[loss]
    assert lines[0]["config"]["loss"] == loss
    assert {"rec", *terms} <= set(lines[1]) and not {"var", "reg", "kl", "mean"} - terms & set(lines[1])
    autoencoder, checkpoint = models.load_autoencoder(tmp_path / "checkpoint.pt")
    assert checkpoint["latent_std"].shape == (autoencoder.channels,) and (checkpoint["latent_std"] > 0).all()


def test_bare_smoke_needs_no_other_flag(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    train_tokenizer.main(["--smoke"])
    assert (tmp_path / "runs/smoke/tokenizer/checkpoint.pt").exists()


def test_latent_statistics_are_those_of_the_sampled_latent(tmp_path):
    """With --loss none the sample is the mean, so the stored statistics must be those of encoding by hand."""
    import data
    state = train(tmp_path, "--loss", "none")
    autoencoder, _ = models.load_autoencoder(tmp_path / "checkpoint.pt")
    x = torch.cat([b["x"] for b in data.once(data.open_dataset("shapes", 32, "train"), 8, limit=8)])
    with torch.no_grad():
        z = autoencoder.encode(x)[:, :autoencoder.channels].transpose(0, 1).flatten(1)
    assert_close(state["latent_mean"], z.mean(1), rtol=1e-4, atol=1e-5)
    assert_close(state["latent_std"], z.std(1, unbiased=False), rtol=1e-4, atol=1e-5)


def test_two_plus_two_steps_are_four(tmp_path):
    whole = train(tmp_path / "whole")
    train(tmp_path / "parts", "--steps", "2")
    parts = train(tmp_path / "parts")
    for key in ("model", "optimizer", "latent_mean", "latent_std", "step"):
        assert_same(whole[key], parts[key])
    machine = {"seconds", "memory_gib"}
    logs = [[{k: v for k, v in line.items() if k not in machine} for line in read_log(tmp_path / name)
             if "rec" in line] for name in ("whole", "parts")]
    assert logs[0] == logs[1] and len(logs[0]) == 4


def test_killed_with_sigkill_the_same_command_ends_bit_identical(tmp_path):
    flags = ["--steps", "40", "--save-every", "3", "--image-every", "40"]
    whole = train(tmp_path / "whole", *flags)
    out = tmp_path / "killed"
    kill_after_first_checkpoint(script("--out", str(out), *flags), out, steps=40)
    resumed = train(out, *flags)
    assert resumed["step"] == 40
    for key in ("model", "optimizer", "latent_mean", "latent_std"):
        assert_same(whole[key], resumed[key])


def test_a_finished_run_is_left_alone(tmp_path, capsys):
    train(tmp_path)
    before = (tmp_path / "checkpoint.pt").stat().st_mtime_ns
    train(tmp_path)
    assert (tmp_path / "checkpoint.pt").stat().st_mtime_ns == before
    assert "already has 4" in capsys.readouterr().out


def test_two_processes_train_as_one(tmp_path):
    """The same global batch and noise: only the order of the sums differs.

    Gradient and terms of the first step agree to rounding.  AdamW then divides by |gradient|, which turns the
    rounding of vanishing gradients into whole steps: afterwards the updates agree as vectors.
    """
    flags = ["--steps", "3", "--save-every", "3"]
    torch.manual_seed(0)
    start = models.build_autoencoder(models.AUTOENCODERS["vit-demo"]).state_dict()
    one = train(tmp_path / "one", *flags)
    run = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2",
           *script("--out", str(tmp_path / "two"), *flags)[1:]]
    done = subprocess.run(run, env=ENVIRONMENT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    two = torch.load(tmp_path / "two" / "checkpoint.pt", weights_only=True)
    first = [read_log(tmp_path / name)[1] for name in ("one", "two")]
    for key in ("rec", "var", "reg", "grad_norm"):
        assert_close(first[0][key], first[1][key], rtol=1e-5, atol=0)
    assert update_difference(one["model"], two["model"], start) < 0.05
    assert_close(one["latent_std"], two["latent_std"], rtol=1e-2, atol=1e-3)


def test_mean_reduction_trains_as_sum_reduction(tmp_path):
    """Dividing objective and clipping threshold alike changes AdamW's path by its epsilon only."""
    torch.manual_seed(0)
    start = models.build_autoencoder(models.AUTOENCODERS["vit-demo"]).state_dict()
    a, b = (train(tmp_path / r, "--reduction", r)["model"] for r in ("sum", "mean"))
    assert update_difference(a, b, start) < 0.05


def test_unreadable_files_are_counted_in_the_log(tmp_path):
    from PIL import Image
    folder = tmp_path / "images" / "train" / "a"
    folder.mkdir(parents=True)
    for i in range(4):
        Image.effect_noise((32, 32), 50).convert("RGB").save(folder / f"{i}.png")
    (folder / "broken.png").write_bytes((folder / "0.png").read_bytes()[:100])
    train(tmp_path / "run", "--data", str(tmp_path / "images"))
    last = [line for line in read_log(tmp_path / "run") if "rec" in line][-1]
    assert last["skipped"] >= 2                # 4 steps of 4 from an epoch of 5: three whole epochs


@pytest.mark.parametrize("flags, message", [
    (["--size", "30"], "--size 30 is not a multiple of 4, the stride of --model vit-demo; use 32"),
    (["--data", "no/such/folder"], "no/such/folder"),
    (["--delta", "0"], "--delta must be positive"),
    (["--steps", "0"], "--steps must be at least 1"),
    (["--perceptual-weight", "1"], "vgg16-397923af.pth"),
])
def test_bad_input_is_one_line_and_exit_2(tmp_path, monkeypatch, capsys, flags, message):
    monkeypatch.setattr(torch.hub, "_hub_dir", str(tmp_path))
    monkeypatch.setattr(torch.hub, "download_url_to_file", offline)
    with pytest.raises(SystemExit) as stop:
        train(tmp_path / "run", *flags)
    error = capsys.readouterr().err.strip().splitlines()
    assert stop.value.code == 2 and len(error) == 1 and message in error[0]
    assert not (tmp_path / "run").exists()


def test_resuming_with_another_loss_is_refused(tmp_path, capsys):
    train(tmp_path, "--steps", "2")
    with pytest.raises(SystemExit) as stop:
        train(tmp_path, "--loss", "kl")
    assert stop.value.code == 2 and "--loss ve (now kl)" in capsys.readouterr().err


def test_a_non_finite_step_stops_the_run_and_keeps_the_last_checkpoint(tmp_path, capsys):
    train(tmp_path, "--steps", "2")
    good = (tmp_path / "checkpoint.pt").read_bytes()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("losses.inverse_variance", lambda logvar, delta: logvar.sum() * float("nan"))
        with pytest.raises(SystemExit) as stop:
            train(tmp_path)
    assert stop.value.code == 2 and "step 2: var is nan" in capsys.readouterr().err
    assert (tmp_path / "checkpoint.pt").read_bytes() == good


# ------------------------------------------------------------------------------------------------------------
# Adversarial training.

CONV = ["--model", "demo"]
GAN = ["--disc-weight", "0.5", "--disc-start", "2"]


def adversarial_parts(**flags: object) -> tuple:
    """Arguments, objective, adversary and one batch, as `main` makes them."""
    argv = [*TINY, *GAN, *(f"--{k.replace('_', '-')}={v}" for k, v in flags.items())]
    args, rt = train_tokenizer.parse(argv), runtime.Runtime(torch.device("cpu"))
    torch.manual_seed(0)
    objective = train_tokenizer.Objective(models.build_autoencoder(models.AUTOENCODERS["vit-demo"]), args, rt)
    adversary = train_tokenizer.Adversary(args, rt)
    x = torch.rand(4, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1
    eps = torch.randn(4, 8, 8, 8, generator=torch.Generator().manual_seed(1))
    return args, objective, adversary, (x, eps, torch.zeros(4))


def test_the_discriminator_starts_when_told_and_the_autoencoder_hears_it_later(tmp_path):
    train(tmp_path, *GAN, "--disc-warmup", "1")
    lines = [line for line in read_log(tmp_path) if "rec" in line]
    assert [("disc" in line, "adv" in line) for line in lines] == [
        (False, False), (True, False), (True, True), (True, True)]


def test_no_adversarial_code_runs_without_a_weight(tmp_path, monkeypatch):
    monkeypatch.setattr(models, "PatchGAN", None)
    assert "discriminator" not in train(tmp_path, "--disc-weight", "0", "--disc-start", "0")


def test_adaptive_weight_is_the_ratio_of_explicit_last_layer_gradients():
    args, objective, adversary, batch = adversarial_parts()
    terms, *_ = train_tokenizer.step_gradients(objective, objective, adversary, [batch], 2, 1.0, args)
    layer = objective.autoencoder.last_layer
    norms = []
    for adversarial in (False, True):
        values, _, x_hat = objective(*batch)
        loss = -adversary.net(x_hat).mean() if adversarial else values["rec"]
        norms.append(torch.autograd.grad(loss, layer)[0].norm())
    assert_close(terms["adv_weight"], 0.5 * norms[0] / (norms[1] + 1e-4), rtol=1e-4, atol=0)


def test_constant_weight_is_in_units_of_a_mean_reconstruction():
    args, objective, adversary, batch = adversarial_parts()
    args.disc_adaptive = False
    terms, *_ = train_tokenizer.step_gradients(objective, objective, adversary, [batch], 2, 1.0, args)
    assert_close(terms["adv_weight"], torch.tensor(0.5 * 3 * 32 * 32))


def test_each_side_trains_its_own_network_only():
    args, objective, adversary, batch = adversarial_parts()
    *_, pairs = train_tokenizer.step_gradients(objective, objective, adversary, [batch], 2, 1.0, args)
    assert all(p.grad is not None for p in objective.autoencoder.parameters())
    assert all(p.grad is None for p in adversary.net.parameters())
    objective.zero_grad(set_to_none=True)
    before = [p.detach().clone() for p in adversary.net.parameters()]
    adversary.learn(pairs, 1e-3)
    assert all(p.grad is None for p in objective.autoencoder.parameters())
    assert all(not torch.equal(p, q) for p, q in zip(adversary.net.parameters(), before))


def test_the_adversarial_gradient_is_added_at_its_weight():
    """Gradient of the whole = gradient without D + weight * gradient of -E D(x_hat)."""
    args, objective, adversary, batch = adversarial_parts()
    layer = objective.autoencoder.last_layer
    terms, *_ = train_tokenizer.step_gradients(objective, objective, adversary, [batch], 2, 1.0, args)
    whole = layer.grad.clone()
    objective.zero_grad(set_to_none=True)
    train_tokenizer.step_gradients(objective, objective, None, [batch], 2, 1.0, args)
    _, _, x_hat = objective(*batch)
    fooling = torch.autograd.grad(losses.hinge_generator(adversary.net(x_hat)), layer)[0]
    assert_close(whole, layer.grad + terms["adv_weight"] * fooling, rtol=1e-4, atol=1e-3)


def test_accumulated_halves_are_the_whole_batch_for_both_optimisers():
    """Without BatchNorm's batch statistics (eval mode) and at a constant weight, halves must add up
    exactly.
    """
    args, objective, adversary, batch = adversarial_parts()
    args.disc_adaptive = False
    adversary.net.eval()
    gradients = []
    for k in (1, 2):
        objective.zero_grad(set_to_none=True)
        parts = list(zip(*(a.chunk(k) for a in batch)))
        *_, pairs = train_tokenizer.step_gradients(objective, objective, adversary, parts, 2, 1.0, args)
        adversary.learn(pairs, 0.0)
        nets = (objective.autoencoder, adversary.net)
        gradients.append([p.grad.clone() for net in nets for p in net.parameters()])
    for whole, halves in zip(*gradients):
        assert_close(whole, halves, rtol=1e-4, atol=1e-4 * whole.abs().max().item() + 1e-8)


def test_adversarial_run_resumes_bit_for_bit(tmp_path):
    whole = train(tmp_path / "whole", *GAN)
    train(tmp_path / "parts", *GAN, "--steps", "3")
    parts = train(tmp_path / "parts", *GAN)
    for key in ("model", "optimizer", "discriminator", "disc_optimizer"):
        assert_same(whole[key], parts[key])


def test_two_processes_train_adversarially_with_equal_parameters(tmp_path):
    """BatchNorm sees each rank's own half, so this is not one process's run; the ranks must agree with
    each other.
    """
    run = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2",
           *script("--out", str(tmp_path), *GAN, "--accumulate", "2")[1:]]
    done = subprocess.run(run, env=ENVIRONMENT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert {"adv", "adv_weight", "disc"} <= set(read_log(tmp_path)[-2])


# ------------------------------------------------------------------------------------------------------------
# Starting from a checkpoint, and writing one for others.


def test_export_and_init_close_the_circle(tmp_path):
    state = train(tmp_path / "a", *GAN, *CONV)
    train_tokenizer.main(["--out", str(tmp_path / "a"), "--export", str(tmp_path / "published.pt")])
    published = torch.load(tmp_path / "published.pt", weights_only=True)["state_dict"]
    assert {k for k in published if not k.startswith("loss.")} == set(state["model"])
    other = train(tmp_path / "b", *GAN, *CONV, "--init", str(tmp_path / "published.pt"), "--lr", "0")
    assert_same(other["model"], state["model"])
    learned = [k for k in state["discriminator"] if "running" not in k and "num_batches" not in k]
    for key in learned:
        assert_same(other["discriminator"][key], state["discriminator"][key])
    statistics = torch.load(tmp_path / "latents_stats.pt", weights_only=True)
    assert_same(statistics["mean"].flatten(), state["latent_mean"])


def test_a_vit_is_not_exported_in_a_form_it_does_not_fit(tmp_path, capsys):
    train(tmp_path)
    with pytest.raises(SystemExit) as stop:
        train_tokenizer.main(["--out", str(tmp_path), "--export", str(tmp_path / "published.pt")])
    assert stop.value.code == 2 and "ViT tokenizer" in capsys.readouterr().err
    assert not (tmp_path / "published.pt").exists()


def test_init_sigma_sets_every_posterior(tmp_path):
    train(tmp_path / "a", *CONV)
    flags = [*CONV, "--init", str(tmp_path / "a/checkpoint.pt"), "--init-sigma", "0.05", "--lr", "0"]
    train(tmp_path / "b", *flags)
    line = [line for line in read_log(tmp_path / "b") if "sigma2" in line][-1]
    assert_close(line["sigma2"], 0.05 ** 2, rtol=1e-4, atol=0)
    assert_close(line["sigma2_p99"], 0.05 ** 2, rtol=1e-4, atol=0)


def test_ve_warmup_ramps_the_force():
    """At lambda1 = 0.1 over 4 steps, step 0 weighs L_var 0.025: gradient on the log-variance a quarter of
    the full.
    """
    args, objective, _, batch = adversarial_parts()
    adapter = objective.autoencoder.adapter.weight
    gradients = {}
    for warmup in (0, 4):
        args.ve_warmup = warmup
        objective.zero_grad(set_to_none=True)
        objective.weights |= {"rec": 0.0, "reg": 0.0}
        train_tokenizer.step_gradients(objective, objective, None, [batch], 0, 1.0, args)
        gradients[warmup] = adapter.grad.clone()
    assert_close(gradients[4], gradients[0] / 4)


@pytest.mark.parametrize("flags, message", [
    (["--init", "no/such/file.pt"], "no/such/file.pt"),
    (["--init-sigma", "0.1"], "needs --init"),
    (["--init", "x.pt", "--init-sigma", "0.1"], "is for convolutional tokenizers"),
    (["--preset", "vavae-f16d32-finetune"], "give it with --init"),
    (["--accumulate", "3"], "--accumulate 3 does not divide the 4 images"),
    (["--disc-weight", "0.5", "--model", "demo", "--size", "16"], "too small for the discriminator"),
    (["--export", "x.pt"], "is not a file"),
    (["--latent-norm", "--model", "demo"], "--latent-norm is for ViT tokenizers"),
    (["--latent-norm", "--standardize-mean"], "--standardize-mean excludes --latent-norm"),
    (["--model", "vit-demo", "--size", "64"], "--model vit-demo has learned positions for 32 pixels"),
])
def test_more_bad_input(tmp_path, capsys, flags, message):
    with pytest.raises(SystemExit) as stop:
        train(tmp_path / "run", *flags)
    error = capsys.readouterr().err.strip().splitlines()
    assert stop.value.code == 2 and len(error) == 1 and message in error[0]


# ------------------------------------------------------------------------------------------------------------
# Alignment to a teacher, the balance ratio, and the optimiser's options.

TEACHER = """
import torch.nn.functional as F


def pooled(x):                       # [B, 3, 32, 32] -> [B, 12, 8, 8]
    return F.pixel_unshuffle(F.avg_pool2d(x, 2), 2)


def coarse(x):
    return F.avg_pool2d(x, 8)
"""


@pytest.fixture
def aligned(tmp_path, monkeypatch) -> list[str]:
    """Flags for a small teacher in a file of one's own."""
    (tmp_path / "my_teacher.py").write_text(TEACHER)
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(sys.modules, "my_teacher", raising=False)
    return ["--align-weight", "0.1", "--teacher", "my_teacher:pooled"]


def test_alignment_resumes_exports_and_starts_again(aligned, tmp_path):
    whole = train(tmp_path / "whole", *aligned, *CONV)
    train(tmp_path / "parts", *aligned, *CONV, "--steps", "2")
    parts = train(tmp_path / "parts", *aligned, *CONV)
    for key in ("model", "projection", "optimizer"):
        assert_same(whole[key], parts[key])
    line = read_log(tmp_path / "whole")[1]
    assert 0 < line["align"] < 4 and line["align_at_max"] == 0
    assert_close(line["align_weighted"], line["align"] * line["align_weight"])
    train_tokenizer.main(["--out", str(tmp_path / "whole"), "--export", str(tmp_path / "published.pt")])
    flags = [*aligned, *CONV, "--init", str(tmp_path / "published.pt"), "--lr", "0"]
    assert_same(train(tmp_path / "again", *flags)["projection"], whole["projection"])


def test_alignment_weight_and_gradient_against_explicit_ones(aligned):
    """Gradient of the whole = gradient without alignment + weight * gradient of the alignment."""
    args, objective, _, batch = adversarial_parts(align_weight=0.1, teacher="my_teacher:pooled")
    layer, projection = objective.autoencoder.encoder_last_layer, objective.projection.weight
    terms, *_ = train_tokenizer.step_gradients(objective, objective, None, [batch], 2, 1.0, args)
    whole, at_projection = layer.grad.clone(), projection.grad.clone()
    values, *_ = objective(*batch)
    rec, align = (torch.autograd.grad(values[k], layer, retain_graph=True)[0] for k in ("rec", "align"))
    assert_close(terms["align_weight"], 0.1 * rec.norm() / (align.norm() + 1e-4), rtol=1e-4, atol=0)
    direct = torch.autograd.grad(values["align"], projection, retain_graph=True)[0]
    assert_close(at_projection, terms["align_weight"] * direct, rtol=1e-3, atol=1e-4)
    other = torch.autograd.grad(values["rec"] + 0.1 * values["var"] + 1e-6 * values["reg"], layer)[0]
    assert_close(whole, other + terms["align_weight"] * align, rtol=1e-3, atol=1e-2)


def test_a_teacher_of_another_grid_or_without_weights_is_refused(aligned, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", offline)
    for teacher, message in (("my_teacher:coarse", "[1, 3, 4, 4] for one image: [1, D, 8, 8]"),
                             ("dinov2_vitl14", "needs dinov2_vitl14_pretrain.pth (no network)"),
                             ("no/such/file.pth", "no/such/file.pth is not a file")):
        with pytest.raises(SystemExit) as stop:
            train(tmp_path / "run", *aligned, "--teacher", teacher)
        error = capsys.readouterr().err.strip().splitlines()
        assert stop.value.code == 2 and len(error) == 1 and message in error[0]
    assert not (tmp_path / "run").exists()


def test_a_weight_at_its_maximum_is_reported():
    args, objective, adversary, batch = adversarial_parts()
    for silent in (False, True):
        if silent:
            adversary.fool = lambda x_hat: 0 * x_hat.sum()   # no gradient: the ratio is |reference| / 1e-4
        terms, *_ = train_tokenizer.step_gradients(objective, objective, adversary, [batch], 2, 1.0, args)
        assert terms["adv_at_max"] == float(silent)
    assert_close(terms["adv_weight"], torch.tensor(0.5e4))


def test_terms_are_logged_as_they_are_and_as_they_count(tmp_path):
    train(tmp_path, "--lambda1", "0.2", "--ve-warmup", "4")
    first = read_log(tmp_path)[1]
    assert_close(first["var_weighted"], 0.2 / 4 * first["var"])
    assert first["rec_weighted"] == first["rec"]
    assert first["seconds"] > 0 and 0.01 < first["memory_gib"] < 100


def test_balance_ratio_of_a_decoder_that_copies():
    """x_hat = z and x = mean: L_rec(mean) = 0, L_rec(sample) = sum |sigma eps|, over 0.1 sum 1 / sigma^2."""
    args, objective, *_ = adversarial_parts()
    sigma = 0.5

    class Copy(torch.nn.Module):
        def encode(self, x):
            return torch.cat([x, torch.full_like(x, 2 * torch.tensor(sigma).log())], 1)

        def decode(self, z):
            return z

    objective.autoencoder = Copy()
    x = torch.rand(4, 3, 8, 8) * 2 - 1
    scores = train_tokenizer.evaluate(objective, x, args, runtime.Runtime(torch.device("cpu")))
    eps = torch.randn(x.shape, generator=runtime.generator(0, "held-out", 0))
    expected = sigma * eps.abs().sum() / 4 / (0.1 * 3 * 8 * 8 / (sigma ** 2 + 1e-6))
    assert_close(torch.tensor(scores["balance"]), expected)
    assert scores["psnr_mean"] > 99 > 30 > scores["psnr_sample"]


@pytest.mark.parametrize("model", ["demo", "vit-demo"])
def test_a_recomputed_decoder_has_the_same_gradients(model):
    args, _, _, batch = adversarial_parts()
    torch.manual_seed(0)
    autoencoder = models.build_autoencoder(models.AUTOENCODERS[model])
    objective = train_tokenizer.Objective(autoencoder, args, runtime.Runtime(torch.device("cpu")))
    gradients = []
    for recompute in (False, True):
        calls = []
        hook = next(m for m in autoencoder.decoder.modules() if isinstance(m, models.Level | models.VitBlock)
                    ).register_forward_pre_hook(lambda *_, calls=calls: calls.append(1))
        autoencoder.decoder.recompute = recompute
        objective.zero_grad(set_to_none=True)
        train_tokenizer.step_gradients(objective, objective, None, [batch], 2, 1.0, args)
        gradients.append([p.grad.clone() for p in objective.parameters()])
        hook.remove()
        assert len(calls) == 1 + recompute
    for plain, again in zip(*gradients):
        assert_close(plain, again)


def test_the_rate_is_scaled_only_when_asked(tmp_path):
    """The demo's 1e-3 is for a batch of 32; the smoke run has 4."""
    for name, flags, rate in (("a", [], 1e-3), ("b", ["--scale-lr"], 1e-3 / 8)):
        train(tmp_path / name, *flags)
        assert_close(read_log(tmp_path / name)[-2]["lr"], rate)


@pytest.mark.parametrize("form, expected", [("inverse", lambda s2: (1 / (s2 + 1e-6))),
                                            ("negative", lambda s2: -s2), ("log", lambda s2: -s2.log())])
def test_the_form_of_the_variance_term_reaches_the_objective(form, expected):
    args, objective, _, batch = adversarial_parts(variance_form=form)
    terms, moments, _ = objective(*batch)
    assert_close(terms["var"], expected(moments[:, 8:].exp()).sum() / 4, rtol=1e-4, atol=0)
    scores = train_tokenizer.evaluate(objective, batch[0], args, runtime.Runtime(torch.device("cpu")))
    assert ("balance" in scores) == (form == "inverse")   # Eq. 14 is of the inverse


@pytest.mark.parametrize("model", ["demo", "vit-demo"])
def test_a_standardised_mean_has_no_scale_and_its_statistics_are_stored(tmp_path, model):
    state = train(tmp_path, "--standardize-mean", "--model", model)
    assert not {"reg", "reg_weighted"} & set(read_log(tmp_path)[1])
    autoencoder, _ = models.load_autoencoder(tmp_path / "checkpoint.pt")
    raw = models.build_autoencoder(models.AUTOENCODERS[model])
    raw.load_state_dict({k: v for k, v in state["model"].items() if "mean_norm" not in k})
    x = torch.rand(6, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    mean, logvar = raw.eval().encode(x).chunk(2, 1)
    kept = {k: state["model"][f"mean_norm.running_{k}"][:, None, None] for k in ("mean", "var")}
    assert (kept["mean"] != 0).all()
    expected = (mean - kept["mean"]) / (kept["var"] + 1e-5).sqrt()
    assert_close(autoencoder.encode(x), torch.cat([expected, logvar], 1), rtol=1e-4, atol=1e-5)
    autoencoder.train()
    last = autoencoder.adapter if model == "vit-demo" else autoencoder.quant_conv
    mean, _ = autoencoder.encode(x).chunk(2, 1)
    assert_close(mean.mean((0, 2, 3)), torch.zeros(8), rtol=0, atol=1e-4)
    assert_close(mean.var((0, 2, 3), unbiased=False), torch.ones(8), rtol=2e-3, atol=0)
    mean.pow(3).sum().backward()          # of any function of the mean, no gradient is along its weight
    weight, gradient = last.weight[:8].flatten(1), last.weight.grad[:8].flatten(1)
    assert gradient.norm() > 0
    assert ((gradient * weight).sum(1).abs() < 2e-3 * gradient.norm(dim=1) * weight.norm(dim=1)).all()


def test_standardised_runs_resume_bit_for_bit(tmp_path):
    whole = train(tmp_path / "whole", "--standardize-mean")
    train(tmp_path / "parts", "--standardize-mean", "--steps", "2")
    assert_same(train(tmp_path / "parts", "--standardize-mean")["model"], whole["model"])


def test_latent_norm_gives_every_token_a_mean_of_unit_rms(tmp_path):
    train(tmp_path, "--latent-norm")
    autoencoder, _ = models.load_autoencoder(tmp_path / "checkpoint.pt")
    mean, _ = losses.split_moments(autoencoder.encode(torch.rand(2, 3, 32, 32)))
    assert_close(mean.square().mean(1), torch.ones(2, 8, 8), rtol=1e-3, atol=0)
