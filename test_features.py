"""features.py: networks against torch-fidelity and the EfficientNet package at equal weights (test-only),
files and folders good and bad, references and their cache.
"""

import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image
from torch import Tensor
from torch.testing import assert_close

import features
import metrics
from features import Features
from runtime import InputError, Runtime, generator

ALONE = Runtime(torch.device("cpu"))


def pictures(n: int, size: int, seed: int = 0) -> Tensor:
    return torch.randint(0, 256, (n, 3, size, size), generator=generator(seed, "pictures"), dtype=torch.uint8)


def write_npz(path: Path, pixels: Tensor, **more: object) -> str:
    np.savez(path, arr_0=pixels.permute(0, 2, 3, 1).numpy(), **more)
    return str(path)


def write_folder(path: Path, pixels: Tensor) -> str:
    path.mkdir()
    for i, image in enumerate(pixels):
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(path / f"{i:03}.png")
    return str(path)


def colours() -> Features:
    """A network small enough to check by hand: the mean of each channel."""
    return Features("colours", "mean", lambda images: images.float().mean((2, 3)))


# ------------------------------------------------------------------------------------------------------------
# The FID Inception.


@pytest.fixture(scope="module")
def inception() -> features.FidInception:
    torch.manual_seed(0)
    network = features.FidInception().eval().requires_grad_(False)
    for module in network.modules():   # with torch's initial weights the image hardly reaches the last layer
        if isinstance(module, torch.nn.Conv2d):
            torch.nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
        if isinstance(module, torch.nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.1)
            module.running_var.uniform_(0.5, 1.5)
    return network


def test_inception_sees_its_input(inception):
    """The weights above make the tests below sharp: one grey level more changes the features."""
    images = pictures(1, 64) // 2
    pool, other = (inception(images + k)[0] for k in (0, 1))
    assert (pool - other).norm() > 1e-3 * pool.norm()


@pytest.mark.parametrize("size", [32, 299, 400])
def test_inception_agrees_with_torch_fidelity(inception, size, tmp_path):
    fidelity = pytest.importorskip("torch_fidelity.feature_extractor_inceptionv3")
    torch.save(inception.state_dict(), tmp_path / "weights.pth")
    layers, images = ["2048", "logits_unbiased"], pictures(1, size)
    pool, logits = fidelity.FeatureExtractorInceptionV3("", layers, str(tmp_path / "weights.pth"))(images)
    ours, spatial = inception(images)
    assert spatial.shape == (1, 2023)
    assert (ours - pool).norm() < 1e-5 * pool.norm()
    assert (ours @ inception.fc.weight.T - logits).norm() < 1e-5 * logits.norm()


def test_torchvisions_pools_are_others(inception):
    plain = torchvision.models.Inception3(num_classes=1008, aux_logits=False, init_weights=False).eval()
    plain.load_state_dict(inception.state_dict())
    images = pictures(1, 299)
    with torch.no_grad():
        logits, ours = plain((images - 128) / 128), inception.fc(inception(images)[0])
    assert (logits - ours).norm() > 1e-3 * ours.norm()


def test_spatial_features_run_over_height_width_channel(inception):
    """mixed_6's 1x1 branch is caught by a hook; ADM's order is [h][w][c] of its first 7 channels."""
    caught = []
    hook = inception.Mixed_6d.branch1x1.register_forward_hook(lambda _, __, out: caught.append(out.clone()))
    spatial = inception(pictures(1, 40))[1]
    hook.remove()
    loops = [caught[0][0, c, h, w] for h in range(17) for w in range(17) for c in range(7)]
    torch.testing.assert_close(spatial[0], torch.stack(loops), rtol=0, atol=0)


@pytest.mark.parametrize("size", [5, 64, 299, 700])
def test_tf1_resize_is_a_scalar_loop(size):
    x = torch.rand(size, generator=generator(0, "line"))
    expected = []
    for i in range(299):
        position = i * size / 299
        low = int(position)
        high = min(low + 1, size - 1)
        expected.append(x[low].item() + (position - low) * (x[high] - x[low]).item())
    found = features.tf1_bilinear(size, x.device) @ x
    torch.testing.assert_close(found, torch.tensor(expected), rtol=0, atol=1e-6)


# ------------------------------------------------------------------------------------------------------------
# The other networks, and choosing.


def test_efficientnet_agrees_with_its_package(capsys):
    package = pytest.importorskip("efficientnet_lite_pytorch")
    theirs = package.EfficientNet.from_name("efficientnet-lite0").eval()
    if features.find_lite0() is None:
        pytest.skip("the weights' package is not installed")
    net = features.load_features("efficientnet-lite0", 256, ALONE.device)
    theirs.load_state_dict(torch.load(features.find_lite0(), weights_only=True))
    images = pictures(2, 224)
    with torch.no_grad():
        expected = theirs.extract_features((images.float() - 127) / 128).mean((2, 3))
    assert (net(images)[0] - expected).norm() < 1e-5 * expected.norm()
    assert net.label("FID") == "FD-EffLite0@224" and net.label("KID") == "KD-EffLite0@224"
    assert features.load_features("efficientnet-lite0", 32, ALONE.device).label("rFID") == "rFD-EffLite0@112"


def test_only_the_inception_is_called_fid():
    assert Features("", "", None).label("FID") == "FID"
    net = features.load_features("random", 32, ALONE.device)
    assert [net.label(m) for m in ("FID", "precision")] == ["FD-RandConv", "precision-RandConv"]
    again = features.load_features("random", 32, ALONE.device)
    torch.testing.assert_close(net(pictures(2, 32)), again(pictures(2, 32)), rtol=0, atol=0)


def test_auto_says_what_it_takes(monkeypatch, tmp_path, capsys):
    monkeypatch.delenv("FID_INCEPTION_WEIGHTS", raising=False)
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    monkeypatch.setattr(features, "find_lite0", lambda: None)
    assert features.choose(None) == "random" and "no weights" in capsys.readouterr().err
    monkeypatch.setattr(features, "find_lite0", lambda: tmp_path)
    assert features.choose(None) == "efficientnet-lite0" and "no Inception weights" in capsys.readouterr().err
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / features.FidInception.FILES[1]).touch()
    assert features.choose(None) == "inception"


def test_inception_weights_missing_or_damaged(monkeypatch, tmp_path):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    monkeypatch.delenv("FID_INCEPTION_WEIGHTS", raising=False)
    with pytest.raises(InputError) as error:
        features.load_features("inception", 32, ALONE.device)
    message = str(error.value)
    assert "\n" not in message and str(tmp_path) in message
    assert features.FidInception.FILES[0] in message and features.FidInception.SHA256 in message
    (tmp_path / "weights.pth").write_bytes(b"half a download")
    with pytest.raises(InputError, match="sha256"):
        features.load_features("inception", 32, ALONE.device, tmp_path / "weights.pth")


def test_a_function_of_ones_own(monkeypatch, tmp_path):
    (tmp_path / "mine.py").write_text(
        "def mean(x): return x.float().mean((2, 3))\ndef flat(x): return x.float().mean()\n"
        "def nan(x): return x.float().mean((2, 3)) * float('nan')\n")
    monkeypatch.chdir(tmp_path)
    images = pictures(2, 8)
    net = features.load_features("mine:mean", 8, ALONE.device)
    torch.testing.assert_close(net(images)[0], images.float().mean((2, 3)))
    assert net.label("FID") == "FD-mine:mean"
    for name, reason in (("mine:flat", "expected"), ("mine:nan", "NaN"), ("mine:none", "none"),
                         ("no:mean", "no"), ("best", "choose")):
        with pytest.raises(InputError, match=reason):
            features.load_features(name, 8, ALONE.device)(images)


# ------------------------------------------------------------------------------------------------------------
# Files and folders.


def read_all(images: object) -> Tensor:
    return torch.cat([part["pixels"] for part in features.every_image(images, 4, 0, None, ALONE)])


@pytest.mark.parametrize("kind", ["stored", "compressed", "fortran", "version 2"])
def test_arrays_of_an_npz(kind, tmp_path):
    pixels, path = pictures(7, 8), tmp_path / "samples.npz"
    array = pixels.permute(0, 2, 3, 1).numpy()
    if kind == "version 2":
        with zipfile.ZipFile(path, "w") as archive, archive.open("arr_0.npy", "w") as member:
            np.lib.format.write_array(member, array, version=(2, 0))
    else:
        save = np.savez_compressed if kind == "compressed" else np.savez
        save(path, other=np.zeros(3), arr_0=np.asfortranarray(array) if kind == "fortran" else array)
    images = features.open_images(str(path))
    assert (len(images), images.size) == (7, 8)
    assert isinstance(images.array, np.memmap)
    torch.testing.assert_close(read_all(images), pixels, rtol=0, atol=0)


@pytest.mark.parametrize("kind, reason", [
    ("truncated", "truncated"), ("text", "truncated or no .npz"), ("missing", "no such file"),
    ("no arr_0", "holds no arr_0"), ("float", "float32"), ("grey", r"\[2, 8, 8\]"),
    ("one channel", r"8, 8, 1\]")])
def test_bad_npz(kind, reason, tmp_path):
    path = tmp_path / "samples.npz"
    good = pictures(2, 8).permute(0, 2, 3, 1).numpy()
    bad = {"float": np.where(good > 9, good, np.nan).astype(np.float32), "grey": good[..., 0],
           "one channel": good[..., :1]}
    np.savez(path, **{"images" if kind == "no arr_0" else "arr_0": bad.get(kind, good)})
    if kind == "truncated":
        path.write_bytes(path.read_bytes()[:-200])
    if kind == "text":
        path.write_text("arr_0")
    if kind == "missing":
        path.unlink()
    with pytest.raises(InputError, match=reason) as error:
        features.open_images(str(path))
    assert str(path) in str(error.value) and "\n" not in str(error.value)


def test_folder_as_it_is(tmp_path):
    pixels = pictures(5, 8)
    images = features.open_images(write_folder(tmp_path / "samples", pixels))
    torch.testing.assert_close(read_all(images), pixels, rtol=0, atol=0)


@pytest.mark.parametrize("kind, reason", [
    ("mixed", "16 x 16, where 8 x 8"), ("grey", "mode L"), ("empty", "no images"), ("wide", "16 x 8"),
    ("broken", "cannot be read")])
def test_bad_folder(kind, reason, tmp_path):
    folder = write_folder(tmp_path / "samples", pictures(0 if kind == "empty" else 2, 8))
    extra = {"mixed": ("RGB", (16, 16)), "grey": ("L", (8, 8)), "wide": ("RGB", (16, 8))}
    if kind in extra:
        Image.new(*extra[kind]).save(tmp_path / "samples" / "extra.png")
    if kind == "broken":
        (tmp_path / "samples" / "extra.png").write_bytes(b"not a picture")
    with pytest.raises(InputError, match=reason):
        features.open_images(folder)


def test_a_file_broken_past_its_header_is_not_skipped(tmp_path):
    folder = write_folder(tmp_path / "samples", pictures(3, 64))
    path = tmp_path / "samples" / "001.png"
    path.write_bytes(path.read_bytes()[:2000])
    with pytest.raises(InputError, match="001.png"):
        features.extract(features.open_images(folder), colours(), ALONE)


def test_references_are_cropped_as_adm_does(tmp_path):
    """60 x 40 to 16: halved by boxes, across, then down, rounded each time; bicubic to 24 x 16; centre."""
    (tmp_path / "photos").mkdir()
    photo = Image.fromarray(pictures(1, 60)[0, :, :40].permute(1, 2, 0).numpy())   # 60 wide, 40 high
    photo.save(tmp_path / "photos" / "a.png")
    photo.save(tmp_path / "photos" / "b.png")
    found = read_all(features.open_images(str(tmp_path / "photos"), size=16))[0].permute(1, 2, 0).numpy()
    across = np.floor(np.asarray(photo, dtype=np.float64).reshape(40, 30, 2, 3).mean(2) + 0.5)
    halved = Image.fromarray(np.floor(across.reshape(20, 2, 30, 3).mean(1) + 0.5).astype(np.uint8))
    small = np.asarray(halved.resize((24, 16), Image.Resampling.BICUBIC))
    np.testing.assert_array_equal(found, small[:, 4:20])


# ------------------------------------------------------------------------------------------------------------
# Whole sets and references.


def test_extract_is_numpy(tmp_path):
    pixels = pictures(23, 8)
    images = features.open_images(write_npz(tmp_path / "a.npz", pixels))
    found = features.extract(images, colours(), ALONE, batch=5)
    rows = pixels.double().mean((2, 3))
    torch.testing.assert_close(found.rows.double(), rows, rtol=1e-6, atol=0)
    np.testing.assert_allclose(found.gaussians[0].cov, np.cov(rows.numpy(), rowvar=False), rtol=1e-5)
    assert found.count == 23


def test_references_keep_a_choice_of_rows(tmp_path, monkeypatch):
    monkeypatch.setattr(features, "KEPT_ROWS", 6)
    images = features.open_images(write_npz(tmp_path / "a.npz", pictures(23, 8)))
    whole = features.extract(images, colours(), ALONE, batch=5)
    some = features.extract(images, colours(), ALONE, batch=4, keep_all=False)
    torch.testing.assert_close(some.rows, whole.rows[features.kept_rows(23)], rtol=0, atol=0)
    assert len(some.rows) == 6 and some.count == 23
    torch.testing.assert_close(some.gaussians[0].cov, whole.gaussians[0].cov)


def reference(source: str, net: Features, cache: Path, size: int = 8,
              limit: int | None = None) -> features.FeatureSet:
    images = features.open_reference(source, size, None, "train")
    return features.reference_features(source, images, net, cache, ALONE, 4, 0, limit)


def test_reference_cache(tmp_path):
    calls = []

    def network(images: Tensor) -> Tensor:
        calls.append(len(images))
        return images.float().mean((2, 3))

    source, net = write_npz(tmp_path / "a.npz", pictures(9, 8)), Features("counted", "mean", network)
    first, second = (reference(source, net, tmp_path / "cache") for _ in range(2))
    assert sum(calls) == 9
    torch.testing.assert_close(first.rows, second.rows)
    factor = second.gaussians[0].factor
    torch.testing.assert_close(factor @ factor.T, first.gaussians[0].cov)
    write_npz(tmp_path / "a.npz", pictures(9, 8, seed=1))          # other images under the same name
    third = reference(source, net, tmp_path / "cache")
    assert sum(calls) == 18 and not torch.equal(first.rows, third.rows)
    reference(source, Features("counted", "median", network), tmp_path / "cache")
    assert sum(calls) == 27
    for limit in (4, 5, 5):
        reference("shapes", net, tmp_path / "cache", 32, limit)
    assert sum(calls) == 36


def test_fingerprints_are_of_the_content(tmp_path):
    folders = [write_folder(tmp_path / name, pictures(3, 8, seed)) for name, seed in zip("abc", (0, 0, 1))]
    one, same, other = (features.fingerprint(features.open_images(folder)) for folder in folders)
    assert one == same != other


def test_adm_reference(tmp_path):
    """mu and sigma are of the whole training set, arr_0 only for rows; they may be float32."""
    pixels, mean, cov = pictures(6, 8), np.arange(3, dtype=np.float32), np.eye(3)
    net = Features("", "mean", colours().network)   # named as the Inception, for ADM's files name nothing
    found = reference(write_npz(tmp_path / "adm.npz", pixels, mu=mean, sigma=cov), net, tmp_path / "cache")
    again = reference(str(tmp_path / "adm.npz"), net, tmp_path / "cache")
    for result in (found, again):
        np.testing.assert_allclose(result.gaussians[0].mean, mean)
        assert result.gaussians[0].mean.dtype == torch.float64 and result.count is None
        torch.testing.assert_close(result.rows, pixels.float().mean((2, 3)))
    other = reference(str(tmp_path / "adm.npz"), colours(), tmp_path / "cache")   # other features: from arr_0
    torch.testing.assert_close(other.gaussians[0].mean.float(), pixels.float().mean((0, 2, 3)))
    np.savez(tmp_path / "statistics.npz", mu=mean, sigma=cov)
    assert reference(str(tmp_path / "statistics.npz"), net, tmp_path / "cache").rows is None
    with pytest.raises(InputError, match="no images"):
        reference(str(tmp_path / "statistics.npz"), colours(), tmp_path / "cache")


def test_bad_references(tmp_path):
    net, mean, cov = Features("", "mean", colours().network), np.arange(3.0), np.eye(3)
    path = write_npz(tmp_path / "nan.npz", pictures(6, 8), mu=np.array([0, np.nan, 1]), sigma=cov)
    with pytest.raises(InputError, match="NaN"):
        reference(path, net, tmp_path)
    path = write_npz(tmp_path / "shape.npz", pictures(6, 8), mu=mean, sigma=cov[:2])
    with pytest.raises(InputError, match="sigma"):
        reference(path, net, tmp_path)
    with pytest.raises(InputError, match="8-pixel images, the samples have 16"):
        reference(write_npz(tmp_path / "small.npz", pictures(6, 8)), net, tmp_path, size=16)
    with pytest.raises(InputError, match="too few"):
        reference(write_npz(tmp_path / "one.npz", pictures(1, 8)), net, tmp_path)
    with pytest.raises(InputError, match="neither"):
        reference(str(tmp_path / "nowhere"), net, tmp_path)
    with pytest.raises(InputError, match="16-pixel images, the samples have 8"):
        reference(write_folder(tmp_path / "large", pictures(6, 16)), net, tmp_path)


def test_moments_of_both_layers_stay_apart(tmp_path):
    def network(images: Tensor) -> tuple[Tensor, Tensor]:
        return images.float().mean((2, 3)), images[:, 0, :2, 0].float()

    found = features.extract(features.open_images(write_npz(tmp_path / "a.npz", pictures(9, 8))),
                             Features("", "", network), ALONE)
    assert [len(g.mean) for g in found.gaussians] == [3, 2] and found.rows.shape == (9, 3)
    assert isinstance(found.gaussians[0], metrics.Gaussian)


# ------------------------------------------------------------------------------------------------------------
# The teacher.


@pytest.fixture(scope="module")
def dinov2_file(tmp_path_factory) -> Path:
    """Weights of DINOv2's smallest network, drawn at random."""
    draw = torch.Generator().manual_seed(0)
    state = features.DinoV2(384, 12, 16, False).state_dict()
    state = {k: torch.randn(v.shape, generator=draw) * (0.05 if v.ndim > 1 else 0.3) + (v.ndim == 1)
             for k, v in state.items()}
    path = tmp_path_factory.mktemp("teacher") / "dinov2_vits14_pretrain.pth"
    torch.save(state | {"mask_token": torch.zeros(1, 384)}, path)
    return path


def test_dinov2_is_timms(dinov2_file):
    timm = pytest.importorskip("timm")
    oracle = timm.create_model("vit_small_patch14_dinov2", pretrained=False, dynamic_img_size=True).eval()
    state = torch.load(dinov2_file, weights_only=True)
    oracle.load_state_dict({k: v for k, v in state.items() if k != "mask_token"})
    x = torch.rand(2, 3, 96, 96) * 2 - 1
    small = torch.nn.functional.interpolate(x, size=(84, 84), mode="bilinear")
    scaled = (small / 2 + 0.5 - torch.tensor([0.485, 0.456, 0.406])[:, None, None]
              ) / torch.tensor([0.229, 0.224, 0.225])[:, None, None]
    for normalize, given in ((False, small), (True, scaled)):
        teacher = features.load_teacher(str(dinov2_file), 6, normalize)
        with torch.no_grad():
            expected = oracle.forward_features(given)[:, 1:].mT.reshape(2, 384, 6, 6)
            assert_close(teacher(x), expected, rtol=1e-4, atol=1e-4)
    assert not any(p.requires_grad for p in teacher.parameters())


def test_the_teacher_inside_a_vavae_checkpoint_is_found(dinov2_file, tmp_path):
    state = {f"foundation_model.model.{k}": v for k, v in torch.load(dinov2_file, weights_only=True).items()}
    torch.save({"state_dict": state | {"encoder.conv_in.weight": torch.zeros(1)}}, tmp_path / "vavae.pt")
    x = torch.rand(1, 3, 32, 32)
    with torch.no_grad():
        assert_close(features.load_teacher(str(tmp_path / "vavae.pt"), 2)(x),
                     features.load_teacher(str(dinov2_file), 2)(x))


def test_a_file_that_is_no_dinov2_is_refused_in_one_line(dinov2_file, tmp_path):
    torch.save({"weight": torch.zeros(3)}, tmp_path / "other.pth")
    with pytest.raises(InputError, match="holds no DINOv2 of patch 14"):
        features.load_teacher(str(tmp_path / "other.pth"), 2)
    state = torch.load(dinov2_file, weights_only=True)
    del state["blocks.3.ls1.gamma"]
    torch.save(state, tmp_path / "damaged.pth")
    with pytest.raises(InputError, match="1 missing: blocks.3.ls1.gamma"):
        features.load_teacher(str(tmp_path / "damaged.pth"), 2)
