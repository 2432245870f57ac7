"""The DiT's stage end to end: smoke, sources of latents, the objective, Muon, resume after SIGKILL, two
processes and sharding, export, and bad input.
"""

import argparse
import json
import math
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from torch.testing import assert_close

import data
import losses
import models
import train_dit
import train_tokenizer
from runtime import Runtime
from test_train_tokenizer import (  # noqa: F401  (one_thread is a fixture)
    ENVIRONMENT, assert_same, kill_after_first_checkpoint, one_thread, read_log, update_difference)

HERE = Path(__file__).parent
ONE = Runtime(torch.device("cpu"))


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory) -> Path:
    """A VE tokenizer of four steps."""
    out = tmp_path_factory.mktemp("tokenizer")
    train_tokenizer.main(["--smoke", "--out", str(out)])
    return out / "checkpoint.pt"


def flags_of(tokenizer: Path, out: Path, *flags: str) -> list[str]:
    return ["--smoke", "--warmup", "1", "--tokenizer", str(tokenizer), "--out", str(out), *flags]


def train(tokenizer: Path, out: Path, *flags: str) -> dict:
    train_dit.main(flags_of(tokenizer, out, *flags))
    return torch.load(out / "checkpoint.pt", weights_only=True)


def test_smoke_writes_a_checkpoint_that_rebuilds_itself(tokenizer, tmp_path):
    state = train(tokenizer, tmp_path)
    assert state["step"] == state["ema_updates"] == 4 and len(state["classes"]) == 10
    assert state["latent_shape"] == [8, 8, 8] and state["tokenizer"]["path"] == str(tokenizer)
    dit, _ = models.load_dit(tmp_path / "checkpoint.pt")
    v = dit(torch.zeros(2, 8, 8, 8), torch.tensor([0.2, 0.8]), torch.tensor([0, 10]))
    assert v.shape == (2, 8, 8, 8) and (tmp_path / "images" / "0000004.png").stat().st_size > 0
    line = read_log(tmp_path)[1]
    assert {"velocity", "cosine", "grad_norm", "by_t"} <= set(line) and len(line["by_t"]) == 10


def test_the_objective_is_equation_4_on_the_path_of_equation_27(tokenizer):
    """With a network that always answers 1/2 the loss is mean (1/2 - (z - eps))^2: its sign counts."""
    args = SimpleNamespace(precision="fp32", cosine_weight=1.0)
    seen = []

    class Half(torch.nn.Module):
        def forward(self, x_t, t, y):
            seen.append((x_t, t, y))
            return torch.full_like(x_t, 0.5)

    objective = train_dit.Objective(Half(), args, Runtime(torch.device("cpu")))
    z, eps, t = torch.randn(4, 2, 3, 3), torch.randn(4, 2, 3, 3), torch.tensor([0.0, 0.25, 0.5, 1.0])
    terms, per_sample = objective(z, eps, t, torch.arange(4))
    v = z - eps
    assert_close(terms["velocity"], (0.5 - v).square().mean())
    assert_close(per_sample, (0.5 - v).square().mean((1, 2, 3)))
    cosine = v.sum(1) / (2 ** 0.5 * v.square().sum(1).sqrt())          # with (1/2, 1/2), of norm 1 / sqrt 2
    assert_close(terms["cosine"], (1 - cosine).mean())
    x_t = seen[0][0]
    assert_close(x_t[0], eps[0])
    assert_close(x_t[1], 0.75 * eps[1] + 0.25 * z[1])
    assert_close(x_t[3], z[3])


# ------------------------------------------------------------------------------------------------------------
# Latents: live, cached, or LightningDiT's.


@pytest.mark.parametrize("loss, mode", [("ve", ""), ("kl", ""), ("none", ""), ("sigma", "fixed"),
                                        ("sigma", "gaussian")])
def test_draws_are_those_the_decoder_was_trained_on(tokenizer, loss, mode):
    tok = train_dit.Tokenizer(tokenizer, "fp32", ONE)
    tok.config = posterior = {"loss": loss, "sigma": 0.3, "sigma_mode": mode}
    x, eps, scale = torch.rand(4, 3, 32, 32) * 2 - 1, torch.randn(4, 8, 8, 8), torch.randn(4)
    mean, std = tok.posterior(x)
    channel_mean, channel_std = torch.randn(8), torch.rand(8) + 0.5
    facts = dict(batches=None, classes=[], shape=(8, 8, 8), mean=channel_mean, std=channel_std)
    batch = {"mean": mean, "std": std}
    with torch.no_grad():
        moments = tok.autoencoder.encode(x)
    z = train_dit.Source(**facts, latent="sample", gaussian=tok.gaussian).draw(batch, eps, scale)
    z = z * channel_std[:, None, None] + channel_mean[:, None, None]
    assert_close(z, losses.sample_posterior(moments, eps, scale, **posterior), rtol=1e-4, atol=1e-5)
    z = train_dit.Source(**facts, latent="mean", gaussian=tok.gaussian).draw(batch, eps, scale)
    assert_close(z, (moments[:, :8] - channel_mean[:, None, None]) / channel_std[:, None, None])


@pytest.fixture(scope="module")
def pictures(tmp_path_factory) -> Path:
    """24 scenes of 32 x 32 pixels, in two classes."""
    folder = tmp_path_factory.mktemp("pictures")
    images = data.Shapes(32, "train").render_batch(range(24))[0].permute(0, 2, 3, 1).numpy()
    for i, image in enumerate(images):
        (folder / "ab"[i % 2]).mkdir(exist_ok=True)
        Image.fromarray(image).save(folder / "ab"[i % 2] / f"{i:02d}.png")
    return folder


def test_the_cache_yields_what_live_encoding_yields(tokenizer, pictures, tmp_path):
    """At 32 pixels there is one crop only; what is left is fp16's rounding.  The statistics by hand."""
    args = train_dit.parse(flags_of(tokenizer, tmp_path, "--data", str(pictures), "--batch", "8",
                                    "--cache", str(tmp_path / "cache")))
    tok = train_dit.Tokenizer(tokenizer, "fp32", ONE)
    cached = train_dit.open_source(args, tok, ONE)
    args.cache = None
    live = train_dit.open_source(args, tok, ONE)
    assert live.classes == cached.classes == ["a", "b"] and live.shape == cached.shape == (8, 8, 8)
    left, right = live.batches(3), cached.batches(3)
    for _ in range(4):
        a, b = next(left), next(right)
        assert a["index"].tolist() == b["index"].tolist() and a["y"].tolist() == b["y"].tolist()
        for key in ("mean", "std"):
            assert_close(a[key], b[key], rtol=1e-3, atol=2e-3)
    x = torch.cat([batch["x"] for batch in data.once(data.open_dataset(str(pictures), 32, "train"), 8)])
    mean, std = (a.transpose(0, 1).flatten(1) for a in tok.posterior(torch.cat([x, x.flip(3)])))
    assert_close(cached.mean, mean.mean(1), rtol=1e-3, atol=1e-3)
    assert_close(cached.std, (mean.var(1, unbiased=False) + std.square().mean(1)).sqrt(), rtol=1e-3, atol=0)


def test_training_from_the_cache_encodes_once(tokenizer, pictures, tmp_path, monkeypatch):
    flags = ["--data", str(pictures), "--cache", str(tmp_path / "cache")]
    first = train(tokenizer, tmp_path / "first", *flags)
    monkeypatch.setattr(train_dit.Tokenizer, "posterior", None)
    assert_same(train(tokenizer, tmp_path / "second", *flags)["model"], first["model"])
    assert first["classes"] == ["a", "b"] and first["tokenizer"]["path"] == str(tokenizer)


def test_a_published_tokenizer_needs_data_and_gets_its_statistics_from_the_cache(pictures, tmp_path, capsys,
                                                                                 monkeypatch):
    """The published form knows neither its data nor its latents' mean; a small network here."""
    train_tokenizer.main(["--smoke", "--model", "demo", "--loss", "kl", "--out", str(tmp_path / "ours")])
    published = tmp_path / "published.pt"
    train_tokenizer.main(["--out", str(tmp_path / "ours"), "--export", str(published)])
    monkeypatch.setattr(models, "published_autoencoder_config", lambda state: models.AUTOENCODERS["demo"])
    monkeypatch.setitem(train_dit.PUBLISHED, "size", 32)
    flags = ["--data", str(pictures), "--cache", str(tmp_path / "cache")]
    found = train(published, tmp_path / "run", *flags)
    expected = train(tmp_path / "ours" / "checkpoint.pt", tmp_path / "other", *flags)
    for key in ("model", "latent_mean", "latent_std"):
        assert_same(found[key], expected[key])
    for more, message in (([], "does not say what it was trained on: give --data"),
                          (["--data", "shapes"], "has no latent statistics")):
        with pytest.raises(SystemExit):
            train(published, tmp_path / "refused", *more)
        assert message in capsys.readouterr().err


def write_shard(path: Path, tensors: dict[str, np.ndarray]) -> None:
    """The safetensors format, by its specification."""
    header, offset = {}, 0
    for name, array in tensors.items():
        kind = {"float32": "F32", "int64": "I64"}[str(array.dtype)]
        header[name] = {"dtype": kind, "shape": array.shape, "data_offsets": [offset, offset + array.nbytes]}
        offset += array.nbytes
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + b"".join(a.tobytes() for a in tensors.values()))


@pytest.fixture
def shards(tmp_path) -> Path:
    folder = tmp_path / "shards"
    folder.mkdir()
    draws = np.random.default_rng(0)
    latents, mirrored = (draws.normal(3, 2, (10, 8, 8, 8)).astype(np.float32) for _ in range(2))
    write_shard(folder / "latents_rank00_shard000.safetensors",
                {"latents": latents, "latents_flip": mirrored, "labels": np.arange(10) % 3})
    return folder


def test_shards_of_lightningdit_need_no_tokenizer(tokenizer, shards, tmp_path):
    out = tmp_path / "run"
    train_dit.main(["--smoke", "--latents", str(shards), "--out", str(out)])
    state = torch.load(out / "checkpoint.pt", weights_only=True)
    assert "tokenizer" not in state and not (out / "images").exists()
    assert state["classes"] == ["0", "1", "2"]
    assert_close(state["latent_mean"], torch.full((8,), 3.0), rtol=0, atol=0.3)
    assert_close(state["latent_std"], torch.full((8,), 2.0), rtol=0, atol=0.3)
    state = train(tokenizer, tmp_path / "drawn", "--latents", str(shards))
    assert state["tokenizer"]["path"] == str(tokenizer)
    assert (tmp_path / "drawn" / "images" / "0000004.png").exists()


# ------------------------------------------------------------------------------------------------------------
# Times and labels.


@pytest.mark.parametrize("shift", [1.0, 0.3, 2.0])
def test_times_are_logit_normal_or_uniform_and_shifted(shift):
    """logit(s t / (1 + (s - 1) t)) = logit(t) + log s."""
    t = train_dit.draw_times(20_000, "logit-normal", shift, ONE, 0, 0)
    normal = torch.special.logit(t.double())
    assert abs(normal.mean() - math.log(shift)) < 0.03 and abs(normal.std() - 1) < 0.03
    t = train_dit.draw_times(20_000, "uniform", shift, ONE, 0, 0)
    levels = torch.tensor([0.1, 0.5, 0.9])
    odds = shift * levels / (1 - levels)
    assert_close(torch.quantile(t, levels), odds / (1 + odds), rtol=0, atol=0.02)


def test_the_automatic_shift_is_that_of_rae():
    """RAE: 1.414 for f16d32, 2 for f16d64, with t = 1 at the noise; the inverse with t = 1 at the data."""
    for channels, factor in ((16, 1.0), (32, 2 ** 0.5), (64, 2.0)):
        assert_close(train_dit.resolve_shift("auto", (channels, 16, 16)), 1 / factor)
    assert train_dit.resolve_shift(0.4, (32, 16, 16)) == 0.4


def test_labels_are_dropped_at_the_stated_rate(tokenizer, tmp_path, monkeypatch):
    seen = []
    forward = models.DiT.forward

    def spy(self, x_t, t, y):
        if self.training:
            seen.append(y)
        return forward(self, x_t, t, y)

    monkeypatch.setattr(models.DiT, "forward", spy)
    train(tokenizer, tmp_path, "--batch", "32", "--label-dropout", "0.5")
    y = torch.cat(seen)
    assert 0.35 < (y == 10).float().mean() < 0.65 and (y[y != 10] < 10).all()


def test_loss_bins_count_every_sample_once():
    bins = train_dit.TimeBins(torch.device("cpu"))
    bins.add(torch.tensor([0.0, 0.05, 0.95, 1.0]), torch.tensor([1.0, 3.0, 5.0, 7.0]))
    assert bins.read() == [2.0] + [None] * 8 + [6.0]
    assert bins.read() == [None] * 10


# ------------------------------------------------------------------------------------------------------------
# Muon.


def quintic(s: torch.Tensor) -> torch.Tensor:
    """What five Newton-Schulz steps make of singular values of Frobenius norm 1."""
    for _ in range(5):
        s = 3.4445 * s - 4.7750 * s ** 3 + 2.0315 * s ** 5
    return s


@pytest.mark.parametrize("shape", [(24, 24), (48, 16), (16, 48)])
def test_orthogonalization_against_the_svd(shape):
    """It keeps the singular vectors and maps the values by its polynomial; a stack is taken one by one."""
    U, _, Vh = torch.linalg.svd(torch.randn(2, *shape), full_matrices=False)
    g = U @ torch.diag_embed(torch.stack([torch.linspace(0.3, 1, U.shape[2]),
                                          torch.linspace(0.02, 1, U.shape[2])])) @ Vh
    found = train_dit.orthogonalize(g)
    for matrix, result in zip(g.double(), found.double()):
        U, S, Vh = torch.linalg.svd(matrix, full_matrices=False)
        assert_close(result, U @ torch.diag(quintic(S / S.norm())) @ Vh, rtol=1e-4, atol=1e-4)
        values = torch.linalg.svdvals(result)
        assert 0.6 < values.min() and values.max() < 1.2
        assert (result * (U @ Vh)).sum() / (result.norm() * (U @ Vh).norm()) > 0.95
    assert_close(train_dit.orthogonalize(g[0] * 1e-4), found[0], rtol=1e-4, atol=1e-5)


def steps_of(optimizer: type, shape: tuple[int, ...], **options) -> torch.Tensor:
    """A parameter that began at 1 after three steps on fixed random gradients."""
    p = torch.nn.Parameter(torch.ones(shape))
    made = optimizer([{"params": [p], **options.pop("group", {})}], lr=0.02, **options)
    for step in range(3):
        p.grad = torch.randn(shape, generator=torch.Generator().manual_seed(step))
        made.step()
    return p.detach()


@pytest.mark.parametrize("decay", [0.0, 0.5])
def test_muon_is_that_of_pytorch(decay):
    """PyTorch's rounds to bf16: 2 % of the whole update; decay alone would move a weight by 3 %."""
    ours = steps_of(train_dit.Muon, (48, 16), weight_decay=decay)
    theirs = steps_of(torch.optim.Muon, (48, 16), weight_decay=decay, adjust_lr_fn="match_rms_adamw")
    assert (ours - theirs).norm() < 0.02 * (theirs - 1).norm()


def test_an_update_of_muon_has_the_size_of_adamws():
    """Root mean square 0.2 lr; five steps of Newton-Schulz fall short of it by up to 15 %."""
    for shape in ((64, 64), (192, 64), (64, 170)):
        p = torch.nn.Parameter(torch.zeros(shape))
        p.grad = torch.randn(shape)
        train_dit.Muon([{"params": [p]}], lr=0.5, weight_decay=0).step()
        assert 0.85 < p.detach().square().mean().sqrt() / (0.2 * 0.5) < 1.1


def test_a_split_matrix_is_three_matrices():
    fused = torch.nn.Parameter(torch.randn(48, 16))
    single = [torch.nn.Parameter(part.clone()) for part in fused.detach().chunk(3)]
    groups = [{"params": [fused], "parts": 3}, {"params": single}]
    optimizer = train_dit.Muon(groups, lr=0.02, weight_decay=0.1)
    for _ in range(2):
        fused.grad = torch.randn(48, 16)
        for p, grad in zip(single, fused.grad.chunk(3)):
            p.grad = grad.clone()
        optimizer.step()
    assert_close(fused.detach(), torch.cat([p.detach() for p in single]))
    assert (steps_of(train_dit.Muon, (48, 16), weight_decay=0, group={"parts": 3})
            - steps_of(train_dit.Muon, (48, 16), weight_decay=0)).norm() > 0.05


@pytest.mark.parametrize("family", ["lightningdit", "sit"])
@pytest.mark.parametrize("split", [True, False])
def test_every_parameter_has_one_optimizer(family, split):
    dit = models.build_dit(models.DITS["demo"] | dict(family=family, qk_norm=True))
    args = argparse.Namespace(optimizer="muon", muon_split=split, lr=1e-3, weight_decay=0.0)
    adamw, muon = train_dit.make_optimizers(dit, args)
    owned = [p for o in (adamw, muon) for group in o.param_groups for p in group["params"]]
    assert len(owned) == len({id(p) for p in owned})
    assert {id(p) for p in owned} == {id(p) for p in dit.parameters() if p.requires_grad}
    names = {id(p): name for name, p in dit.named_parameters()}
    found = {names[id(p)]: group["parts"] for group in muon.param_groups for p in group["params"]}
    first, second = ("w12", "w3") if family == "lightningdit" else ("fc1", "fc2")
    block = {"attn.qkv": 3, "attn.proj": 1, f"mlp.{first}": 2 if first == "w12" else 1, f"mlp.{second}": 1}
    assert found == {f"blocks.{i}.{name}.weight": parts if split else 1
                     for i in range(6) for name, parts in block.items()}
    args.optimizer = "adamw"
    adamw, = train_dit.make_optimizers(dit, args)
    assert len(adamw.param_groups[0]["params"]) == len(owned)


# ------------------------------------------------------------------------------------------------------------
# The step: parts of a batch, recomputed activations, resuming, several processes.


def gradients(dit: models.DiT, accumulate: int) -> tuple[list[torch.Tensor], dict, torch.Tensor]:
    objective = train_dit.Objective(dit, SimpleNamespace(precision="fp32", cosine_weight=1.0), ONE)
    draws = torch.Generator().manual_seed(0)
    z, eps = torch.randn(2, 8, 8, 8, 8, generator=draws)
    batch = (z, eps, torch.rand(8, generator=draws), torch.arange(8))
    dit.zero_grad()
    parts = list(zip(*(a.chunk(accumulate) for a in batch)))
    terms, errors = train_dit.step_gradients(objective, objective.weights, parts)
    return [p.grad.clone() for p in dit.parameters() if p.requires_grad], terms, errors


@pytest.fixture
def dit() -> models.DiT:
    """A small one whose zeros have been filled, so that every gradient counts."""
    torch.manual_seed(0)
    net = models.build_dit(models.DITS["demo"] | dict(depth=2))
    for p in net.parameters():
        if p.requires_grad and not p.any():
            torch.nn.init.normal_(p, std=0.05)
    return net


def test_two_halves_of_a_batch_are_the_batch(dit):
    whole, halves = gradients(dit, 1), gradients(dit, 2)
    for a, b in zip(whole, halves):
        assert_close(a, b, rtol=1e-4, atol=1e-6)


def test_recomputed_activations_give_the_same_gradients(dit):
    kept = gradients(dit, 1)
    seen = []
    handle = dit.blocks[1].attn.register_forward_hook(lambda *_: seen.append(1))
    dit.recompute = True
    recomputed = gradients(dit, 1)
    handle.remove()
    assert len(seen) == 2
    for a, b in zip(kept, recomputed):
        assert_close(a, b, rtol=0, atol=0)


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_two_plus_two_steps_are_four(tokenizer, tmp_path, optimizer):
    flags = ["--optimizer", optimizer]
    whole = train(tokenizer, tmp_path / "whole", *flags)
    train(tokenizer, tmp_path / "parts", "--steps", "2", *flags)
    parts = train(tokenizer, tmp_path / "parts", *flags)
    has_momentum = "momentum_buffer" in whole["optimizer"]["state"]["blocks.0.attn.qkv.weight"]
    assert has_momentum == (optimizer == "muon")
    for key in ("model", "ema", "optimizer", "ema_updates"):
        assert_same(whole[key], parts[key])


def test_killed_with_sigkill_the_same_command_ends_bit_identical(tokenizer, tmp_path):
    flags = ["--steps", "40", "--save-every", "3", "--image-every", "40"]
    whole = train(tokenizer, tmp_path / "whole", *flags)
    out = tmp_path / "killed"
    run = [sys.executable, str(HERE / "train_dit.py"), *flags_of(tokenizer, out, *flags)]
    kill_after_first_checkpoint(run, out, steps=40)
    resumed = train(tokenizer, out, *flags)
    for key in ("model", "ema", "optimizer"):
        assert_same(whole[key], resumed[key])


def test_two_processes_train_as_one(tokenizer, tmp_path):
    """Gradient and terms of the first step to rounding, then the updates as vectors (see
    test_train_tokenizer).
    """
    flags = ["--steps", "3", "--save-every", "3"]
    torch.manual_seed(0)
    start = models.build_dit(models.DITS["demo"]).state_dict()
    one = train(tokenizer, tmp_path / "one", *flags)
    run = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2",
           str(HERE / "train_dit.py"), *flags_of(tokenizer, tmp_path / "two", *flags)]
    done = subprocess.run(run, env=ENVIRONMENT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    two = torch.load(tmp_path / "two" / "checkpoint.pt", weights_only=True)
    first = [read_log(tmp_path / name)[1] for name in ("one", "two")]
    for key in ("velocity", "cosine", "grad_norm"):
        assert_close(first[0][key], first[1][key], rtol=1e-5, atol=0)
    for left, right in zip(first[0]["by_t"], first[1]["by_t"]):
        assert left == right or abs(left - right) < 1e-4
    assert update_difference(one["model"], two["model"], start) < 0.05


def test_a_run_goes_on_sharded_and_unsharded(tokenizer, tmp_path):
    """Two steps of one process, two of two processes with FSDP2, one of one again, as five of one."""
    flags = ["--optimizer", "muon", "--accumulate", "2", "--precision", "fp32"]
    start = train(tokenizer, tmp_path / "parts", *flags, "--steps", "2")["model"]
    shutil.copytree(tmp_path / "parts", tmp_path / "whole")
    run = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2",
           str(HERE / "train_dit.py"), *flags_of(tokenizer, tmp_path / "parts", *flags), "--shard"]
    done = subprocess.run(run, env=ENVIRONMENT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    train(tokenizer, tmp_path / "whole", *flags)
    first = [read_log(tmp_path / name)[3] for name in ("parts", "whole")]
    assert first[0]["step"] == 3
    for key in ("velocity", "cosine", "grad_norm"):
        assert_close(first[0][key], first[1][key], rtol=1e-5, atol=0)
    parts, whole = (train(tokenizer, tmp_path / name, *flags, "--steps", "5") for name in ("parts", "whole"))
    for key in ("model", "ema"):
        assert update_difference(parts[key], whole[key], start) < 0.02
    for name, state in whole["optimizer"]["state"].items():
        for key, value in state.items():
            assert_close(parts["optimizer"]["state"][name][key], value, rtol=0,
                         atol=0.02 * value.abs().max().item())


def test_an_exported_run_is_a_published_checkpoint(tokenizer, tmp_path):
    state = train(tokenizer, tmp_path / "run")
    train_dit.main(["--export", str(tmp_path / "lightningdit.pt"), "--out", str(tmp_path / "run")])
    container = torch.load(tmp_path / "lightningdit.pt", weights_only=True)
    assert set(container) == {"model", "ema"} and "feat_rope.freqs_cos" in container["ema"]
    for weights in ("model", "ema"):
        dit, _ = models.load_dit(tmp_path / "lightningdit.pt", weights)
        assert dit.config == state["model_config"]
        assert_same(dict(dit.state_dict()), dict(state[weights]))
    statistics = torch.load(tmp_path / "latents_stats.pt", weights_only=True)
    assert_same(statistics["std"].flatten(), state["latent_std"])
    assert_same(statistics["mean"].flatten(), state["latent_mean"])


@pytest.mark.parametrize("preset, expected", [
    ("lightningdit-b", dict(model="B", family="lightningdit", optimizer="adamw", batch=1024, lr=2e-4,
                            steps=100_080, ema=0.9999, t="logit-normal", cosine_weight=1.0)),
    ("lightningdit-b-plus", dict(model="B", family="lightningdit", batch=1024, lr=2e-4, steps=200_160)),
    ("dit-b", dict(model="B", family="sit", optimizer="adamw", batch=1024, lr=2e-4, steps=100_080,
                   t="uniform", cosine_weight=0.0)),
    ("lightningdit-xl-sota", dict(model="XL", family="lightningdit", optimizer="muon", batch=768, lr=1.8e-4,
                                  steps=884_040, ema=0.9999, weight_decay=0.0)),
])
def test_presets_are_the_rows_of_the_paper(preset, expected):
    """An epoch is 1,281,167 images: 1251 whole batches of 1024, 1668 of 768."""
    args = vars(train_dit.parse(["--preset", preset]))
    assert {key: args[key] for key in expected} == expected


def test_flags_reach_the_network(tokenizer, tmp_path, monkeypatch):
    compiled = []
    monkeypatch.setattr(models.Block, "compile", lambda self: compiled.append(self))
    state = train(tokenizer, tmp_path, "--family", "sit", "--patch", "2", "--qk-norm", "--compile",
                  "--activation-checkpointing", "--t-shift", "auto")
    assert len(compiled) == 6 and state["config"]["t_shift"] == "auto"
    dit, _ = models.load_dit(tmp_path / "checkpoint.pt")
    assert dit.config["family"] == "sit" and dit.config["patch"] == 2 and dit.config["qk_norm"]


def test_another_tokenizer_under_the_same_name_is_refused(tokenizer, tmp_path, capsys):
    copy = tmp_path / "tokenizer.pt"
    copy.write_bytes(tokenizer.read_bytes())
    train(copy, tmp_path / "run", "--steps", "2")
    state = torch.load(copy, weights_only=True)
    state["latent_mean"] += 1
    torch.save(state, copy)
    with pytest.raises(SystemExit) as stop:
        train(copy, tmp_path / "run")
    assert stop.value.code == 2 and "it has changed since" in capsys.readouterr().err


@pytest.mark.parametrize("flags, message", [
    (["--tokenizer", "no/such/file.pt"], "no/such/file.pt"),
    (["--data", "no/such/folder"], "no/such/folder"),
    (["--batch", "0"], "--batch must be at least 1"),
    (["--ema", "1"], "--ema must be in [0, 1)"),
    (["--accumulate", "3"], "--accumulate 3 does not divide the 4 images"),
    (["--t-shift", "0"], "--t-shift must be positive"),
    (["--latents", "no/such/folder"], "no/such/folder"),
    (["--latents", "shards", "--data", "shapes"], "leave out --data"),
    (["--export", "lightningdit.pt"], "checkpoint.pt is not a file"),
])
def test_bad_input_is_one_line_and_exit_2(tokenizer, tmp_path, capsys, flags, message):
    with pytest.raises(SystemExit) as stop:
        train(tokenizer, tmp_path / "run", *flags)
    error = capsys.readouterr().err.strip().splitlines()
    assert stop.value.code == 2 and len(error) == 1 and message in error[0]
    assert not (tmp_path / "run").exists()


def test_a_checkpoint_of_an_older_version_is_refused_in_one_line(tokenizer, tmp_path, capsys):
    state = train(tokenizer, tmp_path, "--steps", "2")
    named = state["optimizer"]["state"]
    state["optimizer"]["state"] = dict(enumerate(named.values()))
    torch.save(state, tmp_path / "checkpoint.pt")
    with pytest.raises(SystemExit) as stop:
        train(tokenizer, tmp_path)
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert stop.value.code == 2 and "cannot be resumed" in error


def test_latents_of_other_channels_are_refused(tokenizer, tmp_path, capsys):
    write_shard(tmp_path / "latents_rank00_shard000.safetensors",
                {name: np.zeros((4, 3, 8, 8), np.float32) for name in ("latents", "latents_flip")}
                | {"labels": np.zeros(4, np.int64)})
    with pytest.raises(SystemExit) as stop:
        train(tokenizer, tmp_path / "run", "--latents", str(tmp_path))
    assert stop.value.code == 2 and "latents of 3 channels" in capsys.readouterr().err


def test_a_dit_is_no_tokenizer(tokenizer, tmp_path, capsys):
    train(tokenizer, tmp_path / "dit")
    with pytest.raises(SystemExit):
        train(tmp_path / "dit" / "checkpoint.pt", tmp_path / "run")
    assert '"dit" checkpoint where a "tokenizer"' in capsys.readouterr().err


def test_a_non_finite_step_is_named_and_nothing_is_saved(tokenizer, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("losses.cosine_velocity", lambda v_hat, v: v_hat.sum() * float("inf"))
    with pytest.raises(SystemExit) as stop:
        train(tokenizer, tmp_path)
    assert stop.value.code == 2 and "cosine is" in capsys.readouterr().err
    assert not (tmp_path / "checkpoint.pt").exists() and json.loads((tmp_path / "log.jsonl").read_text())
