"""Bad input for sampling, evaluation and the frozen networks.

Each case ends with status 2, with one line on stderr that says what is wrong, and
leaves no file behind.  Nothing waits for a pipe, and no file runs code.
"""

import os
import pickle
import resource
import signal
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import checkpoints
import evaluate
import frozen
import models
import runtime
import sample

AUTOENCODER = dict(arch="conv", ch=8, ch_mult=(1, 2), num_res_blocks=1, attn_resolutions=(),
                   resolution=16, z_channels=4, noise="learned", sigma=0.0)
TRANSFORMER = dict(depth=1, width=32, heads=2, in_channels=4, input_size=8, num_classes=3)
CLASSES = ["disc", "golden retriever", "2"]


class Hostile:
    """Leaves a mark where it is unpickled."""

    def __reduce__(self):
        return Path.touch, (Path("executed"),)


def save_tokenizer(path, broken=None):
    torch.manual_seed(0)
    net = models.build_tokenizer(AUTOENCODER)
    with torch.no_grad():
        net.encode(torch.zeros(1, 3, 16, 16))
        if broken:
            net.decoder.conv_out.weight[:] = broken
    checkpoints.save({
        "kind": "tokenizer", "config": dict(data="shapes", size=16, seed=0), "step": 1,
        "model_config": net.config, "model": net.state_dict(),
        "latent_mean": torch.zeros(4), "latent_std": torch.ones(4)}, path)


def save_dit(path, tokenizer, broken=None, **changed):
    torch.manual_seed(0)
    net = models.build_dit(models.DITS["demo"] | TRANSFORMER | changed)
    for p in net.parameters():
        if p.requires_grad:
            torch.nn.init.normal_(p, std=0.3)
    if broken:
        net.x_embedder.proj.bias.data[0] = broken
    checkpoints.save({
        "kind": "dit", "step": 1, "config": {"data": "shapes"}, "model_config": net.config,
        "model": net.state_dict(), "ema": net.state_dict(), "classes": CLASSES,
        "tokenizer": {"path": tokenizer, "sha256": runtime.file_sha256(tokenizer)},
        "latent_mean": torch.zeros(4), "latent_std": torch.ones(4)}, path)


def fill(home):
    """Every file that the cases name."""
    draw = np.random.default_rng(0)
    pixels = draw.integers(0, 256, (8, 16, 16, 3)).astype(np.uint8)
    for name, broken in (("t.pt", None), ("nan_t.pt", float("nan")), ("huge_t.pt", 3e38),
                         ("other_t.pt", 1.0)):
        save_tokenizer(name, broken)
    save_dit("d.pt", "t.pt")
    save_dit("huge_d.pt", "huge_t.pt")
    save_dit("nan_d.pt", "t.pt", broken=float("nan"))
    save_dit("guide.pt", "t.pt", num_classes=4)
    whole = Path("d.pt").read_bytes()
    Path("cut.pt").write_bytes(whole[:len(whole) // 2])
    Path("text.pt").write_text("weights")
    torch.save([1, 2], "list.pt")
    torch.save(torch.ones(3), "tensor.pt")
    torch.save({"weight": torch.ones(3)}, "foreign.pt")
    torch.save({"state_dict": [1, 2]}, "nested.pt")
    torch.save({"cls_token": torch.ones(64)}, "flat.pt")
    Path("hostile.pt").write_bytes(pickle.dumps({"model": Hostile()}, 2))
    for name, mean in (("three", torch.zeros(3)), ("nan", torch.full((4,), float("nan"))),
                       ("words", "0 0 0 0")):
        torch.save({"mean": mean, "std": torch.ones(4)}, f"stats_{name}.pt")

    def arrays(name, **found):
        np.savez(f"{name}.npz", **found)
    arrays("s", arr_0=pixels)
    arrays("foreign", arr_0=pixels)
    arrays("small", arr_0=pixels[:, :8, :8])
    arrays("one", arr_0=pixels[:1])
    arrays("grey", arr_0=pixels[..., :1])
    arrays("floats", arr_0=pixels / 255)
    arrays("none", other=pixels)
    arrays("objects", arr_0=np.array([Hostile()], dtype=object))
    arrays("few_labels", arr_0=pixels, arr_1=np.arange(5))
    arrays("eleven_labels", arr_0=pixels, arr_1=np.arange(3, 11))
    arrays("float_labels", arr_0=pixels, arr_1=np.arange(8) / 2)
    good = dict(mu=np.zeros(3), sigma=np.eye(3), features="colours:mean")
    for name, change in dict(
            no_sigma={"sigma": None}, text_mu={"mu": np.array(["a", "b", "c"])},
            objects_mu={"mu": np.array([Hostile()] * 3, dtype=object)},
            square_mu={"mu": np.eye(3)}, column_mu={"mu": np.zeros((3, 1))},
            wide_sigma={"sigma": np.ones((3, 4))},
            complex_sigma={"sigma": np.eye(3) * 1j}, nan_sigma={"sigma": np.eye(3) * np.nan},
            inf_mu={"mu": np.full(3, np.inf)},
            indefinite={"sigma": np.diag([1.0, 1.0, -0.01])},
            skew={"sigma": np.eye(3) + np.triu(np.full((3, 3), 0.1), 1)},
            four={"mu": np.zeros(4), "sigma": np.eye(4)}, 
            empty={"mu": np.zeros(0), "sigma": np.zeros((0, 0))},
            others={"features": "other"}).items():
        arrays(name, **{k: v for k, v in (good | change).items() if v is not None})
    whole = Path("s.npz").read_bytes()
    Path("cut.npz").write_bytes(whole[:-200])
    Path("text.npz").write_text("arr_0")
    Path("pickle.npz").write_bytes(pickle.dumps(Hostile()))
    for name in ("pipe.npz", "pipe.pt", "pipe.json"):
        os.mkfifo(name)
    for name, facts in (("foreign", '{"data": 3}'), ("small", "[1]"), ("one", "{"),
                        ("grey", '{"data": "shapes"}')):
        Path(f"{name}.json").write_text(facts)
    for name, facts in (("damaged", "{"), ("list", "[]"), ("binary", "\0\1")):
        Path(name).mkdir()
        Path(name, "samples.npz").touch()
        Path(name, "samples.json").write_text(facts)
    Path("piped").mkdir()
    Path("piped/samples.npz").touch()
    os.mkfifo("piped/samples.json")
    for name, images in (("pictures/train", pixels), ("pictures/val", pixels),
                         ("broken", pixels)):
        Path(name).mkdir(parents=True)
        for i, image in enumerate(images):
            Image.fromarray(image).save(f"{name}/{i}.png")
    Path("broken/3.png").write_bytes(Path("broken/2.png").read_bytes()[:100])
    Path("nothing").mkdir()
    Path("full/samples.npz").mkdir(parents=True)
    Path("full/results.json").mkdir()
    Path("file").write_text("here")
    Path("colours.py").write_text(
        "import torch\n"
        "def mean(x): return x.float().mean((2, 3)) / 255\n"
        "def nan(x): return mean(x) * float('nan')\n"
        "def flat(x): return mean(x).mean(1)\n"
        "def word(x): return 'features'\n"
        "number = 3\n")
    Path("untidy.py").write_text("def mean(x) return x\n")


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    torch.set_num_threads(1)
    home, before = tmp_path_factory.mktemp("home"), os.getcwd()
    os.chdir(home)
    fill(home)
    os.chdir(before)
    return home


@pytest.fixture(autouse=True)
def there(home, monkeypatch):
    """In that folder, with a time limit, and without weights of torch hub."""
    monkeypatch.chdir(home)
    monkeypatch.syspath_prepend(home)
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(home / "hub"))
    monkeypatch.setattr(sys, "argv", ["stage.py"])

    def hangs(*_):
        raise TimeoutError("hangs")
    before = signal.signal(signal.SIGALRM, hangs)
    signal.alarm(60)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


def listing(home):
    return {str(path): path.lstat().st_size for path in home.rglob("*")
            if "__pycache__" not in path.parts}


def refused(capsys, main, flags, reason):
    """Checks that main ends as promised."""
    home = Path.cwd()
    before = listing(home)
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        main(flags)
    error = capsys.readouterr().err
    lines = [line for line in error.replace("\r", "\n").split("\n")
             if line.strip() and "%|" not in line]   # what is no progress bar
    assert stop.value.code == 2, error
    assert len(lines) == 1 and "error: " in lines[0] and reason in lines[0], error
    assert listing(home) == before


# ------------------------------------------------------------------------------
# Sampling.


SAMPLE = """
--count 0                       | --count: 0 is not a whole number
--count -1                      | -1 is not
--count 1.5                     | 1.5 is not
--count nan                     | nan is not
--count many                    | many is not
--steps 0                       | --steps
--at-once 0                     | --at-once
--seed -1                       | --seed
--seed 9223372036854775808      | --seed
--seed x                        | --seed
--guidance nan                  | --guidance: nan is not a number from 0
--guidance inf                  | inf is not
--guidance 1e400                | 1e400 is not
--guidance -1                   | -1 is not
--cfg-scale -1                  | -1 is not
--num-sampling-steps 0          | --steps
--num-fid-samples 0             | --count
--per-proc-batch-size 0         | --at-once
--ckpt=nowhere.pt               | nowhere.pt
--interval -0.1 1               | --interval
--interval 0 1.1                | 1.1 is not a number from 0 to 1
--interval nan 1                | nan is not
--interval 0.8 0.2              | earlier time first
--interval 0.5                  | expected 2 arguments
--shift 0                       | --shift
--shift inf                     | --shift
--sampler rk4                   | invalid choice
--labels sorted                 | invalid choice
--precision fp8                 | invalid choice
--preset nobody                 | invalid choice
--device abacus                 | --device abacus
--cfg 4                         | unrecognized arguments: --cfg 4
--class 3                       | --class 3
--class=-1                      | --class -1
--class cat                     | --class cat
--class disc --class cat        | --class cat
--dit nowhere.pt                | nowhere.pt
--dit nothing                   | nothing is not a file
--dit pipe.pt                   | pipe.pt
--dit text.pt                   | text.pt
--dit cut.pt                    | cut.pt
--dit list.pt                   | list.pt
--dit tensor.pt                 | tensor.pt
--dit foreign.pt                | foreign.pt
--dit hostile.pt                | hostile.pt
--dit t.pt                      | "tokenizer"
--dit nan_d.pt                  | nan_d.pt
--dit huge_d.pt                 | images 0 to 2 are not finite
--tokenizer nowhere.pt          | nowhere.pt
--tokenizer d.pt                | "dit"
--tokenizer other_t.pt          | is not the tokenizer of
--latent-stats nowhere.pt       | nowhere.pt
--latent-stats pipe.pt          | pipe.pt
--latent-stats foreign.pt       | has no mean and std
--latent-stats stats_three.pt   | mean and std of 4 channels
--latent-stats stats_nan.pt     | mean and std of 4 channels
--latent-stats stats_words.pt   | mean and std of 4 channels
--guide d.pt --guidance 1       | --guide does nothing
--guide nowhere.pt --guidance 2 | nowhere.pt
--guide guide.pt --guidance 2   | cannot guide
--out file                      | file cannot be written to
--out file/out                  | cannot be written to
--out full                      | samples.npz cannot be written to
--out damaged                   | damaged/samples.json
--out list                      | list/samples.json
--out binary                    | binary/samples.json
--out piped                     | piped/samples.json
"""


def rows(table):
    found = [line.rsplit("|", 1) for line in table.strip().splitlines()]
    return [pytest.param(flags.split(), reason.strip(), id=" ".join(flags.split()))
            for flags, reason in found]


@pytest.mark.parametrize("flags, reason", rows(SAMPLE))
def test_sampling(flags, reason, capsys):
    start = ["--smoke", "--device", "cpu", "--dit", "d.pt", "--out", "out"]
    refused(capsys, sample.main, start + flags, reason)


@pytest.mark.parametrize("flags, labels", [
    ("--class 1", [1] * 5), ("--class golden~retriever", [1] * 5),
    ("--class 2", [2] * 5), ("--class 2 --class disc", [2, 0, 2, 0, 2])])
def test_classes_by_name_or_index(flags, labels, tmp_path):
    """Evenly, in the given order; and the grid has a row for each of them."""
    flags = [flag.replace("~", " ") for flag in flags.split()]
    sample.main(["--smoke", "--device", "cpu", "--dit", "d.pt", "--out", str(tmp_path), *flags])
    with np.load(tmp_path / "samples.npz") as file:
        assert file["arr_1"].tolist() == labels
    assert Image.open(tmp_path / "grid.png").height == 64 * len({*labels})


# ------------------------------------------------------------------------------
# Evaluation.

EVALUATE = """
                                                                | neither tokenizer/checkpoint.pt nor
--at-once 0                                                     | --at-once
--workers -1                                                    | --workers: -1 is not
--limit 0                                                       | --limit
--size 0                                                        | --size
--seed -1                                                       | --seed
--samples s.npz --device abacus                                 | --device abacus
--samp s.npz                                                    | unrecognized arguments
--samples nowhere.npz --reference s.npz                         | nowhere.npz
--samples pipe.npz --reference s.npz                            | pipe.npz is not a file
--samples text.npz --reference s.npz                            | text.npz
--samples cut.npz --reference s.npz                             | cut.npz
--samples pickle.npz --reference s.npz                          | pickle.npz
--samples objects.npz --reference s.npz                         | objects.npz
--samples grey.npz --reference s.npz                            | arr_0 must be uint8
--samples floats.npz --reference s.npz                          | arr_0 must be uint8
--samples none.npz --reference s.npz                            | none.npz
--samples one.npz --reference s.npz                             | one.json
--samples small.npz                                             | small.json
--samples foreign.npz                                           | foreign.json
--samples s.npz                                                 | give --reference
--samples few_labels.npz --reference s.npz                      | one for each of its 8 images
--samples eleven_labels.npz --reference shapes --features judge | no shapes' ones
--samples float_labels.npz --reference s.npz                    | whole numbers
--samples file --reference s.npz                                | file
--samples nothing --reference s.npz                             | nothing
--samples broken --reference s.npz                              | 3.png
--samples s.npz --reference nowhere                             | nowhere
--samples s.npz --reference pipe.npz                            | pipe.npz is not a file
--samples s.npz --reference cut.npz                             | cut.npz
--samples s.npz --reference text.npz                            | text.npz
--samples s.npz --reference none.npz                            | neither images as arr_0 nor mu
--samples s.npz --reference small.npz                           | 8 pixels a side
--samples s.npz --reference no_sigma.npz                        | sigma numbers [d, d]
--samples s.npz --reference text_mu.npz                         | mu must be numbers
--samples s.npz --reference objects_mu.npz                      | objects_mu.npz
--samples s.npz --reference column_mu.npz                       | mu must be numbers [d]
--samples s.npz --reference square_mu.npz                       | mu must be numbers [d]
--samples s.npz --reference wide_sigma.npz                      | sigma numbers [d, d]
--samples s.npz --reference complex_sigma.npz                   | sigma numbers [d, d]
--samples s.npz --reference empty.npz                           | mu must be numbers [d]
--samples s.npz --reference nan_sigma.npz                       | NaN
--samples s.npz --reference inf_mu.npz                          | infinity
--samples s.npz --reference indefinite.npz                      | sigma is no covariance
--samples s.npz --reference skew.npz                            | sigma is no covariance
--samples s.npz --reference four.npz                            | statistics of [4] features
--samples s.npz --reference others.npz                          | neither images as arr_0 nor mu
--samples s.npz --reference s.npz --features colours:nan        | NaN
--samples s.npz --reference s.npz --features colours:flat       | must give a tensor
--samples s.npz --reference s.npz --features colours:word       | must give a tensor
--samples s.npz --reference s.npz --features colours:number     | is a int: name a function
--samples s.npz --reference s.npz --features colours:nobody     | colours:nobody
--samples s.npz --reference s.npz --features nobody:mean        | nobody:mean
--samples s.npz --reference s.npz --features untidy:mean        | SyntaxError
--samples s.npz --reference s.npz --features :                  | no function
--samples s.npz --reference s.npz --features best               | --features best has no weights
--samples s.npz --reference s.npz --features inception          | has no weights here
--samples s.npz --reference s.npz --out file                    | file cannot be written to
--samples s.npz --reference s.npz --out full                    | results.json cannot be written to
--tokenizer nowhere.pt                                          | nowhere.pt
--tokenizer t.pt nowhere.pt                                     | nowhere.pt
--tokenizer pipe.pt                                             | pipe.pt is not a file
--tokenizer text.pt                                             | text.pt
--tokenizer s.npz                                               | s.npz
--tokenizer list.pt                                             | list.pt
--tokenizer hostile.pt                                          | hostile.pt
--tokenizer d.pt                                                | "dit"
--tokenizer nan_t.pt                                            | nan_t.pt
--tokenizer huge_t.pt                                           | NaN or infinity
--tokenizer t.pt --size 8                                       | need 11 pixels
--tokenizer t.pt --size 17                                      | multiple of 2
--tokenizer t.pt --data nowhere                                 | nowhere
--tokenizer t.pt --data-path=nowhere                            | nowhere
--tokenizer t.pt --data s.npz                                   | s.npz
--write-reference ref.npz                                       | needs --data
--write-reference ref --data pictures                           | FILE.npz
--write-reference file/ref.npz --data pictures --size 16        | cannot be written to
--write-reference broken/ref.npz --data nowhere                 | nowhere
--write-images new --data pictures                              | needs one --tokenizer
--write-images new --tokenizer t.pt                             | needs one --tokenizer, and --data
--write-images new --tokenizer t.pt --data nowhere              | nowhere
--tokenizer t.pt --data-path=nowhere                            | nowhere
--write-images new --tokenizer huge_t.pt --data pictures        | NaN or infinity
--write-images new --tokenizer t.pt --data broken               | 3.png
--write-images file --tokenizer t.pt --data pictures            | file cannot be written to
--write-images pictures/new --tokenizer t.pt --data pictures    | must not lie in
--write-images . --tokenizer t.pt --data pictures               | must not lie in
--write-images new --write-reference r.npz --data pictures      | take a command each
--samples s.npz --reference s.npz --size 99                     | leave out --size
"""


@pytest.mark.parametrize("flags, reason", rows(EVALUATE))
def test_evaluation(flags, reason, capsys):
    start = ["--features", "colours:mean", "--workers", "0", "--device", "cpu", "--limit", "8",
             "--out", "out"]
    refused(capsys, evaluate.main, start + flags, reason)


def test_a_covariance_of_few_images_in_float32_is_one():
    """3 images have a covariance of rank 2 in 8 dimensions."""
    few = np.random.default_rng(0).normal(size=(3, 8)).astype(np.float32)
    stored = {"mu": few.mean(0), "sigma": np.cov(few.T).astype(np.float32)}
    _, mean, cov = evaluate.read_gaussian("few.npz", stored, "")
    assert torch.linalg.eigvalsh(cov)[0] < 1e-6 and mean.dtype == torch.float64


# ------------------------------------------------------------------------------
# Weights of the frozen networks.


@runtime.command
def load_teacher(flags):
    frozen.load_teacher(flags[0], 2)


@runtime.command
def load_lpips(flags):
    frozen.load_lpips()


@runtime.command
def load_inception(flags):
    frozen.load_features("inception", "", 16, torch.device("cpu"))


@pytest.mark.parametrize("choice", [
    "nowhere", "text.pt", "cut.pt", "list.pt", "tensor.pt", "foreign.pt", "nested.pt", "flat.pt",
    "hostile.pt", "t.pt", "pipe.pt", "nothing", "colours:number", "untidy:mean"])
def test_teachers(choice, capsys):
    refused(capsys, load_teacher, [choice], choice)


@pytest.mark.parametrize("file", [
    "text.pt", "cut.pt", "list.pt", "foreign.pt", "hostile.pt", "t.pt", "pipe.pt"])
@pytest.mark.parametrize("load, name", [
    (load_inception, frozen.INCEPTION), (load_lpips, frozen.VGG)])
def test_weights_in_torch_hub(load, name, file, capsys, monkeypatch, tmp_path):
    def vgg(**_):   # as torchvision loads it, without its 138 million parameters
        state = torch.load(path, weights_only=False)
        raise RuntimeError(f"Error(s) in loading state_dict:\n {[*state]}")
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    monkeypatch.setattr(frozen.lpips, "LPIPS", vgg)
    path = tmp_path / "checkpoints" / name
    path.parent.mkdir()
    if file == "pipe.pt":
        os.mkfifo(path)
    else:
        path.write_bytes(Path(file).read_bytes())
    refused(capsys, load, [], name)


def test_a_download_that_stops_half_way(capsys, monkeypatch, tmp_path):
    """PyTorch compares the hash, and leaves nothing."""
    from torchvision.models import VGG16_Weights

    class Response:
        parts = [b"half of", b""]

        def __enter__(self):
            return self

        def __exit__(self, *_):
            pass

        def info(self):
            return {"Content-Length": "100"} and self

        def get_all(self, name):
            return ["100"]

        def read(self, *_):
            return self.parts.pop(0)

    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    monkeypatch.setattr(torch.hub, "urlopen", lambda request: Response())
    monkeypatch.setattr(frozen.lpips, "LPIPS", lambda **_: (
        VGG16_Weights.IMAGENET1K_V1.get_state_dict(progress=False, check_hash=True)))
    refused(capsys, load_lpips, [], "invalid hash value")
    assert os.listdir(tmp_path / "checkpoints") == []


# ------------------------------------------------------------------------------
# A full disk, in place of which no file may grow beyond a limit.


def disk_is_full(capsys, main, flags, limit):
    capsys.readouterr()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        with pytest.raises(SystemExit) as stop:
            main(flags)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    error = capsys.readouterr().err
    assert stop.value.code == 2 and "Traceback" not in error
    assert error.count("error: ") == 1 and error.count("cannot be written") == 1, error


@pytest.mark.parametrize("limit, left", [
    (300, []),                                                     # not even a part
    (2000, ["00000000.npy", "00000001.npy", "00000002.npy"]),     # the archive of 3
    (3200, ["00000000.npy", "00000001.npy", "00000002.npy"])])    # the picture
def test_sampling_on_a_full_disk(limit, left, capsys, tmp_path):
    """A part has 128 + 768 bytes, the archive 2,304 and some, the picture more."""
    flags = ["--smoke", "--device", "cpu", "--dit", "d.pt", "--out", str(tmp_path / "out"),
             "--count", "3", "--at-once", "1"]
    disk_is_full(capsys, sample.main, flags, limit)
    files = sorted(path.name for path in tmp_path.rglob("*") if path.is_file())
    assert files == (left + ["samples.npz"] if limit == 3200 else left)
    assert left or not (tmp_path / "out").exists()
    for part in tmp_path.rglob("*.npy"):
        assert np.load(part).shape == (1, 16, 16, 3)
    sample.main(flags)
    assert sorted(os.listdir(tmp_path / "out")) == ["grid.png", "samples.json", "samples.npz"]


@pytest.mark.parametrize("flags, limit", [
    ("--tokenizer t.pt", 4000),                                # the picture, after the numbers
    ("--samples s.npz --reference pictures", 300),             # the remembered features
    ("--tokenizer t.pt --data pictures --write-images", 300),
    ("--data pictures --size 16 --write-reference", 300)])
def test_evaluation_on_a_full_disk(flags, limit, capsys, tmp_path):
    out = str(tmp_path / "out")
    flags = [*flags.split(), out] if "write" in flags else [*flags.split(), "--out", out]
    if "--write-reference" in flags:
        flags[-1] += "/reference.npz"
    start = ["--features", "colours:mean", "--workers", "0", "--device", "cpu", "--limit", "4"]
    disk_is_full(capsys, evaluate.main, start + flags, limit)
    left = [path.name for path in tmp_path.rglob("*") if path.is_file()]
    assert left == (["results.json"] if limit == 4000 else [])
    evaluate.main(start + flags)
    assert not list(tmp_path.rglob(".*"))
