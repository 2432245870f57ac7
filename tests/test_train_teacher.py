"""The teacher of GAE end to end: its loss, resume, two processes, and its place as
the --teacher of a tokenizer.  The judge of the built-in shapes gives the features."""

import json
import os
import subprocess
import sys
from pathlib import Path

import runtime  # before torch, because it says how idle threads wait

import pytest
import torch
from torch.testing import assert_close

import checkpoints
import data
import frozen
import neighbours
import train_teacher
import train_tokenizer

SCRIPT = Path(train_teacher.__file__)


@pytest.fixture(autouse=True)
def one_thread(monkeypatch):
    torch.set_num_threads(1)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")


def train(out: Path, *flags: str) -> dict:
    train_teacher.main(["--smoke", "--device", "cpu", "--out", str(out), *flags])
    return torch.load(out / "checkpoint.pt", weights_only=True)


def refusal(capsys, out: Path, *flags: str) -> str:
    with pytest.raises(SystemExit) as ended:
        train(out, *flags)
    assert ended.value.code == 2
    return capsys.readouterr().err.strip().split("\n")[-1]


def log_of(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]


def same(a: object, b: object) -> bool:
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list):
        return len(a) == len(b) and all(map(same, a, b))
    return torch.equal(a, b) if torch.is_tensor(a) else a == b


def test_three_steps_are_those_written_out(tmp_path):
    """The rate falls from 2e-3 as half a cosine to a tenth; the warm-up is one step."""
    train_teacher.PRESETS["demo"]["warmup"], before = 1, train_teacher.PRESETS["demo"]["warmup"]
    try:
        found = train(tmp_path, "--steps", "3")
    finally:
        train_teacher.PRESETS["demo"]["warmup"] = before
    torch.manual_seed(0)
    teacher = neighbours.SemanticTeacher(96, 4, 16, window=2)
    optimizer = torch.optim.AdamW(teacher.parameters(), betas=(0.9, 0.98), weight_decay=0.05)
    judge = frozen.load_teacher("judge", 4)
    images = data.batches(data.open_dataset("shapes", 32, "train"), 4)
    lines = [line for line in log_of(tmp_path) if "loss" in line]
    for line, rate in zip(lines, (2e-3, 2e-3, 2e-3 * 0.55)):
        f = judge(next(images)["x"])
        f_hat = teacher(f)
        cosine = (f_hat * f).sum(1) / (f_hat.norm(dim=1) * f.norm(dim=1)).clamp(min=1e-8)
        loss = (1 - cosine).mean()
        assert line["loss"] == pytest.approx(loss.item(), rel=1e-5)
        assert line["lr"] == pytest.approx(rate)
        optimizer.zero_grad()
        loss.backward()
        optimizer.param_groups[0]["lr"] = rate
        optimizer.step()
    for name, value in teacher.state_dict().items():
        assert_close(found["model"][name], value, rtol=1e-3, atol=1e-5, msg=name)


def test_two_plus_two_steps_are_four(tmp_path):
    once = train(tmp_path / "once", "--steps", "4")
    train(tmp_path / "twice", "--steps", "4")
    for path in (tmp_path / "twice").glob("*"):
        path.unlink()
    with pytest.MonkeyPatch.context() as patch:   # a signal that comes during step 2
        asked = iter([False, True])
        patch.setattr(runtime, "stop_asked", lambda: next(asked))
        with pytest.raises(SystemExit):
            train(tmp_path / "twice", "--steps", "4")
    assert torch.load(tmp_path / "twice/checkpoint.pt", weights_only=True)["step"] == 2
    twice = train(tmp_path / "twice", "--steps", "4")
    assert same({**once, "config": 0}, {**twice, "config": 0})
    assert [line["step"] for line in log_of(tmp_path / "twice") if "loss" in line] == [1, 2, 3, 4]


def test_two_processes_train_as_one(tmp_path):
    one = train(tmp_path / "one")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone",
               "--nproc_per_node=2", SCRIPT, "--smoke", "--device", "cpu", "--out",
               tmp_path / "two"]
    done = subprocess.run(command, env=os.environ, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    two = torch.load(tmp_path / "two/checkpoint.pt", weights_only=True)
    for name, value in one["model"].items():
        assert_close(two["model"][name], value, rtol=1e-2, atol=1e-4, msg=name)


def test_its_target_teaches_a_tokenizer(tmp_path):
    """The target has a root mean square of 1 at every position, and no gradient."""
    train(tmp_path / "teacher")
    target = frozen.Target(str(tmp_path / "teacher/checkpoint.pt"), 4)
    x = data.Shapes(32, "val").render_batch(torch.arange(3).numpy())[0] / 127.5 - 1
    found = target(x)
    assert found.shape == (3, 16, 4, 4)
    assert_close(found.square().mean(1), torch.ones(3, 4, 4), rtol=1e-3, atol=0)
    assert not any(p.requires_grad for p in target.parameters())
    train_tokenizer.main(["--smoke", "--preset", "gae-demo", "--device", "cpu", "--teacher",
                          str(tmp_path / "teacher/checkpoint.pt"), "--out", str(tmp_path / "t")])
    *_, line = [line for line in log_of(tmp_path / "t") if "semantic" in line]
    assert line["semantic"] > 0 and line["semantic_weight"] == pytest.approx(307.2)
    net, file = checkpoints.load_tokenizer(tmp_path / "t/checkpoint.pt")
    assert net.config["noise"] == "gaussian" and net.config["latent_norm"]
    assert not any(name.startswith("semantic") for name in file)


@pytest.mark.parametrize("flags, message", [
    ("--grid 3", "does not divide into windows of 2 x 2"),
    ("--features dinov2_vitl14", "1.2 GB"),
    ("--features no.module:function", "no function of a module"),
    ("--features torch:zeros_like", "gives [1, 3, 32, 32] for one image"),
    ("--batch 0", "--batch"),
    ("--data no/such/folder", "no/such/folder"),
])
def test_bad_input_is_one_line(tmp_path, capsys, flags, message):
    assert message in refusal(capsys, tmp_path / "run", *flags.split())


def test_a_checkpoint_that_is_no_teacher(tmp_path, capsys):
    train(tmp_path / "teacher", "--channels", "8")
    flags = ["--smoke", "--preset", "gae-demo", "--device", "cpu", "--out", str(tmp_path / "t")]

    def tokenizer(teacher: Path, *others: str) -> str:
        with pytest.raises(SystemExit) as ended:
            train_tokenizer.main([*flags, "--teacher", str(teacher), *others])
        assert ended.value.code == 2
        return capsys.readouterr().err.strip().split("\n")[-1]

    assert "[1, 8, 4, 4]" in tokenizer(tmp_path / "teacher/checkpoint.pt")
    torch.save({"kind": "dit"}, tmp_path / "dit.pt")
    assert 'not a "teacher"' in tokenizer(tmp_path / "dit.pt")
    assert "8 x 8" in tokenizer(
        tmp_path / "teacher/checkpoint.pt", "--model", "vit-demo")
