"""Sampling end to end: per-sample seeds, guidance and its interval, labels, files, two processes, bad
input.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from torch.testing import assert_close

import losses
import runtime
import sample
import train_dit
import train_tokenizer
from test_train_tokenizer import one_thread  # noqa: F401

HERE = Path(__file__).parent


@pytest.fixture(scope="module")
def dit(tmp_path_factory) -> Path:
    """A DiT of a few steps (its output layer starts at zero) in the latents of a tokenizer of four."""
    out = tmp_path_factory.mktemp("stages")
    train_tokenizer.main(["--smoke", "--out", str(out / "tokenizer")])
    train_dit.main(["--smoke", "--warmup", "1", "--tokenizer", str(out / "tokenizer/checkpoint.pt"),
                    "--out", str(out / "dit")])
    return out / "dit" / "checkpoint.pt"


def draw(dit: Path, out: Path, *flags: str) -> tuple[np.ndarray, np.ndarray]:
    sample.main(["--smoke", "--dit", str(dit), "--out", str(out), *flags])
    with np.load(out / "samples.npz") as file:
        return file["arr_0"], file["arr_1"]


# ------------------------------------------------------------------------------------------------------------
# The guided field.


def counting_network(calls: list[int]):
    """v = label + x, null label 10: conditional and unconditional answers are known exactly."""
    def network(x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        calls.append(len(x))
        return x + y.float().view(-1, 1, 1, 1)
    return network


def test_guidance_extrapolates_all_channels_from_the_unconditional_answer():
    """v_u + w (v_c - v_u) with v_c = x + 3, v_u = x + 10, w = 2 is x - 4, in every channel."""
    x, y = torch.randn(2, 5, 4, 4), torch.tensor([3, 3])
    field = sample.guided_velocity(counting_network([]), y, 10, 2.0, (0.0, 1.0))
    assert_close(field(x, 0.5), x - 4)


def test_the_unconditional_branch_is_computed_only_inside_the_interval():
    """Of 20 steps at t = 0, 0.05, ..., 0.95 the 11 with 0.25 <= t <= 0.75 take two branches."""
    calls = []
    y = torch.zeros(3, dtype=torch.long)
    field = sample.guided_velocity(counting_network(calls), y, 10, 2.0, (0.25, 0.75))
    losses.euler(field, torch.zeros(3, 1, 2, 2), 20)
    assert calls == [3] * 5 + [6] * 11 + [3] * 4


def test_scale_one_never_computes_the_unconditional_branch():
    calls = []
    y = torch.zeros(3, dtype=torch.long)
    field = sample.guided_velocity(counting_network(calls), y, 10, 1.0, (0.0, 1.0))
    losses.euler(field, torch.zeros(3, 1, 2, 2), 4)
    assert calls == [3] * 4


# ------------------------------------------------------------------------------------------------------------
# Labels, noise, files.


def test_labels():
    assert sample.make_labels(7, 3, "balanced", 0).tolist() == [0, 1, 2, 0, 1, 2, 0]
    y = sample.make_labels(30_000, 3, "random", 0)
    assert torch.equal(y, sample.make_labels(30_000, 3, "random", 0))
    assert not torch.equal(y, sample.make_labels(30_000, 3, "random", 1))
    assert_close(torch.bincount(y).float() / 30_000, torch.full((3,), 1 / 3), rtol=0, atol=0.02)


def test_noise_belongs_to_the_image():
    a, b = sample.noise_of([3, 1234], [2, 4, 4], 0), sample.noise_of([1234], [2, 4, 4], 0)
    assert torch.equal(a[1], b[0]) and not torch.equal(a[0], a[1])
    assert not torch.equal(b, sample.noise_of([1234], [2, 4, 4], 1))


def test_smoke_writes_what_the_adm_evaluator_reads(dit, tmp_path):
    images, labels = draw(dit, tmp_path)
    assert images.dtype == np.uint8 and images.shape == (5, 32, 32, 3) and labels.tolist() == [0, 1, 2, 3, 4]
    assert len({image.tobytes() for image in images}) == 5
    with Image.open(tmp_path / "grid.png") as grid:
        assert grid.size[0] > 5 * 32
    settings = json.loads((tmp_path / "samples.json").read_text())
    assert settings["steps"] == 2 and settings["data"] == "shapes" and settings["size"] == 32


def test_image_i_is_the_same_for_any_batch_size(dit, tmp_path):
    """To one grey level: another batch size may sum in another order."""
    a, _ = draw(dit, tmp_path / "a", "--batch", "5", "--guidance", "1.5")
    b, _ = draw(dit, tmp_path / "b", "--batch", "2", "--guidance", "1.5")
    c, _ = draw(dit, tmp_path / "c", "--count", "3", "--guidance", "1.5")
    assert np.abs(a.astype(int) - b).max() <= 1 and np.abs(a[:3].astype(int) - c).max() <= 1


def test_two_processes_draw_the_images_of_one(dit, tmp_path):
    one, labels = draw(dit, tmp_path / "one")
    run = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2",
           str(HERE / "sample.py"), "--smoke", "--dit", str(dit), "--out", str(tmp_path / "two")]
    done = subprocess.run(run, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    with np.load(tmp_path / "two" / "samples.npz") as file:
        assert file["arr_0"].shape == one.shape and file["arr_1"].tolist() == labels.tolist()
        assert np.abs(one.astype(int) - file["arr_0"]).max() <= 1
    assert sorted(p.name for p in (tmp_path / "two").iterdir()) == ["grid.png", "samples.json", "samples.npz"]


def test_guidance_and_weights_change_the_images(dit, tmp_path):
    plain, _ = draw(dit, tmp_path / "a")
    guided, _ = draw(dit, tmp_path / "b", "--guidance", "30")
    outside, _ = draw(dit, tmp_path / "c", "--guidance", "30", "--interval", "0.9", "1")
    last, _ = draw(dit, tmp_path / "d", "--weights", "model")
    assert not np.array_equal(plain, guided) and not np.array_equal(plain, last)
    assert np.array_equal(plain, outside)          # two steps, at t = 0 and 0.5: never inside


@pytest.mark.parametrize("flags, message", [
    (["--dit", "no/such/file.pt"], "no/such/file.pt"),
    (["--count", "0"], "--count must be at least 1"),
    (["--interval", "0.8", "0.2"], "--interval takes 0 <= LO <= HI <= 1"),
    (["--shift", "0"], "--shift must be positive"),
    (["--tokenizer", "no/such/tokenizer.pt"], "no/such/tokenizer.pt"),
])
def test_bad_input_is_one_line_and_exit_2(dit, tmp_path, capsys, flags, message):
    with pytest.raises(SystemExit) as stop:
        draw(dit, tmp_path / "out", *flags)
    error = capsys.readouterr().err.strip().splitlines()
    assert stop.value.code == 2 and len(error) == 1 and message in error[0]
    assert not (tmp_path / "out").exists()


def test_the_wrong_tokenizer_is_refused(dit, tmp_path, capsys):
    train_tokenizer.main(["--smoke", "--seed", "1", "--out", str(tmp_path)])
    with pytest.raises(SystemExit):
        draw(dit, tmp_path / "out", "--tokenizer", str(tmp_path / "checkpoint.pt"))
    assert "is not the tokenizer that" in capsys.readouterr().err


def test_noise_comes_from_the_sample_stream_alone():
    expected = torch.randn([2, 2], generator=runtime.generator(7, "sample", 5))
    assert torch.equal(sample.noise_of([5], [2, 2], 7)[0], expected)
