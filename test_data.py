"""data.py: the shapes, the ADM crop against a slow oracle, the order of batches, damaged files, and
the cache of latents."""

import io
import itertools
import json
import os
import pathlib
import shutil
import signal
import struct
import tarfile
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from PIL import Image
from torch.testing import assert_close

import data
from runtime import InputError

SUBSET = pathlib.Path(__file__).parent / "../shared/data/cifar10_subset.tar.gz"


def noise(height: int, width: int, seed: int = 0) -> Image.Image:
    """Smooth in one direction, noisy in the other: an image in which a shift, a flip or a filter shows."""
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3))
    pixels[..., 0] = np.arange(width)[None] % 256
    return Image.fromarray(pixels.astype(np.uint8))


def make_folder(root: pathlib.Path, counts: dict[str, int], size: tuple[int, int] = (8, 8)) -> str:
    for folder, count in counts.items():
        (root / folder).mkdir(parents=True)
        for i in range(count):
            noise(*size, seed=i + 100 * len(folder)).save(root / folder / f"{i:03}.png")
    return str(root)


def first(iterator, count: int) -> list[dict]:
    return list(itertools.islice(iterator, count))


def assert_same(a: dict, b: dict) -> None:
    assert a.keys() == b.keys() and a["skipped"] == b["skipped"]
    for key in ("x", "y", "index", "pixels"):
        assert_close(a[key], b[key], rtol=0, atol=0)


# ------------------------------------------------------------------------------------------------------------
# Pixels.


def test_rounding_to_bytes():
    # 127.5 * (x + 1): -1 -> 0, 1 -> 255, 0 -> 127.5 (to even: 128), -0.2 -> 102, 0.5 -> 191.25; then clamped.
    x = torch.tensor([-1, 1, 0, -0.2, 0.5, 0.502, 1.5, -7, float("inf")])
    assert data.to_uint8(x).tolist() == [0, 255, 128, 102, 191, 192, 255, 0, 255]
    assert data.to_uint8(x).dtype == torch.uint8


def test_bytes_survive_the_round_trip():
    every = torch.arange(256, dtype=torch.uint8)
    x = data.from_uint8(every)
    assert x.dtype == torch.float32 and x[0] == -1 and x[-1] == 1
    assert_close(data.to_uint8(x), every, rtol=0, atol=0)


# ------------------------------------------------------------------------------------------------------------
# Shapes.


def test_hash_is_splitmix64():
    # The first outputs of SplitMix64 from state 1234567, as its authors' C code prints them.
    expected = [6457827717110365317, 3203168211198807973, 9817491932198370423, 4593380528125082431]
    assert data.hash_bits(1234567, np.arange(4)).tolist() == expected


def test_shapes_are_a_function_of_seed_split_and_index():
    dataset = data.open_dataset("shapes", 32, "train", seed=3)
    together, labels, masks = dataset.render_batch([5, 900, 7, 123_456_789])
    for i, index in enumerate([5, 900, 7, 123_456_789]):
        image, label, mask = data.open_dataset("shapes", 32, "train", seed=3).render(index)
        assert_close(image, together[i], rtol=0, atol=0)
        assert_close(mask, masks[i], rtol=0, atol=0)
        assert label == labels[i] == dataset.labels([index])[0]
    image, label = dataset[5]
    assert image.shape == (3, 32, 32) and image.dtype == torch.uint8 and isinstance(label, int)
    assert_close(image, together[0], rtol=0, atol=0)
    others = dataset.render(6), data.Shapes(32, "train", 4).render(5), data.Shapes(32, "val", 3).render(5)
    for other in others:
        assert (other[0].int() - image.int()).abs().float().mean() > 5
    assert len(dataset) == 100_000 and len(data.Shapes(32, "val")) == 2_000 and len(dataset.classes) == 10


def test_shapes_are_the_same_scene_at_any_resolution():
    index = list(range(40))
    small, labels, small_mask = data.Shapes(32, "train").render_batch(index)
    large, large_labels, large_mask = data.Shapes(64, "train").render_batch(index)
    assert_close(labels, large_labels)
    difference = torch.nn.functional.avg_pool2d(large.float(), 2) - small.float()
    assert difference.abs().mean() < 4                   # of 255; another scene differs by about 70
    assert (torch.nn.functional.avg_pool2d(large_mask, 2) - small_mask).abs().mean() < 0.01
    assert (small[1:].float() - small[:-1].float()).abs().mean() > 40


def test_shapes_classes_are_balanced():
    labels = data.Shapes(32, "train").labels(np.arange(20_000))
    count = torch.bincount(labels, minlength=10)
    assert (count - 2_000).abs().max() < 5 * 2_000 ** 0.5


def test_mask_is_where_the_foreground_is():
    # Ground and foreground are at least 0.25 apart in lightness, so the means inside and outside of a scene's
    # mask differ; a mask of another scene, or moved by a third of the image, separates less.
    images, _, masks = data.Shapes(32, "train").render_batch(range(200))
    assert masks.min() == 0 and masks.max() == 1 and masks.shape == (200, 32, 32)
    assert (masks.mean((1, 2)) > 0.03).all() and (masks.mean((1, 2)) < 0.5).all()

    def contrast(masks: torch.Tensor) -> torch.Tensor:
        grey = images.float().mean(1)
        inside = (grey * masks).sum((1, 2)) / masks.sum((1, 2))
        return (inside - (grey * (1 - masks)).sum((1, 2)) / (1 - masks).sum((1, 2))).abs()

    assert contrast(masks).mean() > 50
    assert contrast(masks).mean() > 2 * contrast(masks.roll(1, 0)).mean()
    assert contrast(masks).mean() > 1.5 * contrast(masks.roll(10, 2)).mean()


def test_shape_distances_are_recognisable_areas():
    # Areas with closed forms: disc pi r^2, square (2 h)^2, ring pi (R^2 - r^2), pentagram by its five tips.
    line = (np.arange(400, dtype=np.float32) + 0.5) / 200 - 1
    x, y = 1.2 * line[None, None, :], 1.2 * line[None, :, None]
    area = {name: 2.4 ** 2 * (distance(x, y) < 0).mean() for name, distance in data.SHAPES.items()}
    tan, r = np.tan(np.pi / 5), 0.33
    pentagram = 5 * r * r * tan * (1 + np.tan(2 * np.pi / 5) * tan)          # pentagon + five triangles
    expected = {"disc": np.pi * 0.81, "square": 1.56 ** 2, "ring": np.pi * (0.93 ** 2 - 0.47 ** 2),
                "cross": 4 * 0.3 * (2 * 0.95) - 0.36, "star": pentagram}
    for name, value in expected.items():
        assert area[name] == pytest.approx(value, rel=0.02), name
    assert all(0.5 < value < 3 for value in area.values())


# ------------------------------------------------------------------------------------------------------------
# Crops.


def halved_rows(pixels: np.ndarray) -> np.ndarray:
    """Half as many rows, each the rounded mean of the rows whose centres are within its own extent."""
    n, m = len(pixels), len(pixels) // 2
    rows = [[k for k in range(n) if i * n <= (k + 0.5) * m < (i + 1) * n] for i in range(m)]
    return np.stack([np.floor(np.mean([pixels[k] for k in row], axis=0) + 0.5) for row in rows])


def oracle_crop(image: Image.Image, size: int) -> np.ndarray:
    """The ADM centre crop from its description, halvings and crop by index arithmetic; width first."""
    pixels = np.asarray(image).astype(float)
    while min(pixels.shape[:2]) >= 2 * size:
        pixels = halved_rows(halved_rows(pixels.swapaxes(0, 1)).swapaxes(0, 1))
    h, w = pixels.shape[:2]
    ratio = size / min(h, w)
    resized = np.asarray(Image.fromarray(pixels.astype(np.uint8)).resize(
        (round(w * ratio), round(h * ratio)), resample=Image.Resampling.BICUBIC))
    top, left = (resized.shape[0] - size) // 2, (resized.shape[1] - size) // 2
    return resized[top:top + size, left:left + size]


@pytest.mark.parametrize("height, width", [(8, 8), (8, 11), (13, 9), (32, 48), (40, 38), (5, 7), (8, 801)])
def test_centre_crop_against_the_oracle(height: int, width: int):
    image = noise(height, width)
    ours = np.asarray(data.adm_crop(image, 8))
    assert ours.shape == (8, 8, 3)
    np.testing.assert_array_equal(ours, oracle_crop(image, 8))


def test_image_of_the_right_size_is_only_flipped(tmp_path: pathlib.Path):
    dataset = data.open_dataset(make_folder(tmp_path, {"a": 12}), 8, "train")
    plain = torch.stack([dataset[i][0] for i in range(12)])
    flips = []
    for batch in first(data.batches(dataset, 12, seed=1), 20):
        for pixels, index in zip(batch["pixels"], batch["index"], strict=True):
            flips.append(bool((pixels == plain[index].flip(2)).all()))
            assert flips[-1] or (pixels == plain[index]).all()
    assert 80 < sum(flips) < 160                          # of 240, p = 0.5: within 5 standard deviations


def test_training_crops_reach_every_position(tmp_path: pathlib.Path):
    dataset = data.open_dataset(make_folder(tmp_path, {"a": 1}, size=(8, 12)), 8, "train")
    image = torch.from_numpy(np.array(Image.open(tmp_path / "a/000.png"))).permute(2, 0, 1)
    windows = [image[:, :, i:i + 8] for i in range(5)]
    windows += [window.flip(2) for window in windows]
    seen = {next(i for i, window in enumerate(windows) if (window == pixels).all())
            for batch in first(data.batches(dataset, 16), 10) for pixels in batch["pixels"]}
    assert seen == set(range(10))
    centre = next(data.batches(dataset, 1, augment=False))["pixels"][0]
    assert_close(centre, windows[2], rtol=0, atol=0)


# ------------------------------------------------------------------------------------------------------------
# The order of batches.


@pytest.fixture
def eleven(tmp_path: pathlib.Path) -> data.Folder:
    return data.open_dataset(make_folder(tmp_path, {"a": 5, "bb": 6}, size=(8, 11)), 8, "train")


def test_an_epoch_visits_every_image_once(eleven: data.Folder):
    # 12 batches of 4 are 48 positions: epochs 0 to 3 of 11 images, and 4 images of epoch 4.
    seen = torch.cat([batch["index"] for batch in first(data.batches(eleven, 4, seed=5), 12)]).tolist()
    epochs = [seen[i:i + 11] for i in range(0, 44, 11)]
    for epoch in epochs:
        assert sorted(epoch) == list(range(11))
    assert epochs[0] != epochs[1] and epochs[0] != list(range(11))
    assert len(set(seen[44:])) == 4
    other = torch.cat([batch["index"] for batch in first(data.batches(eleven, 11, seed=6), 1)]).tolist()
    assert other != epochs[0]


def test_a_batch_may_be_larger_than_the_data_set(eleven: data.Folder):
    batch = next(data.batches(eleven, 25))
    assert sorted(torch.bincount(batch["index"]).tolist()) == 8 * [2] + 3 * [3]           # 25 = 2 * 11 + 3


def test_two_ranks_see_what_one_sees(eleven: data.Folder):
    whole = first(data.batches(eleven, 6, seed=2), 5)
    parts = [first(data.batches(eleven, 6, seed=2, rank=rank, world=2), 5) for rank in range(2)]
    for k, batch in enumerate(whole):
        for rank in range(2):
            for key in ("x", "y", "index"):
                assert_close(parts[rank][k][key], batch[key][rank::2], rtol=0, atol=0)


@pytest.mark.parametrize("name", ["folder", "shapes"])
def test_workers_change_nothing(eleven: data.Folder, name: str):
    dataset = eleven if name == "folder" else data.Shapes(16, "train")
    state = torch.get_rng_state()
    alone, helped = (first(data.batches(dataset, 4, workers=workers), 6) for workers in (0, 2))
    for a, b in zip(alone, helped, strict=True):
        assert_same(a, b)
    assert_close(torch.get_rng_state(), state, rtol=0, atol=0)


def test_resume_is_the_tail_of_an_uninterrupted_run(eleven: data.Folder):
    whole = first(data.batches(eleven, 4, seed=9), 9)
    for a, b in zip(whole[4:], first(data.batches(eleven, 4, seed=9, start=4), 5), strict=True):
        assert_same(a, b)


def test_batch_contents(eleven: data.Folder):
    batch = next(data.batches(eleven, 4))
    x = batch["x"]
    assert x.shape == (4, 3, 8, 8) and x.dtype == torch.float32 and x.is_contiguous()
    assert x.abs().max() <= 1 and batch["skipped"] == []
    assert batch["y"].dtype == batch["index"].dtype == torch.int64
    assert_close(data.to_uint8(x), batch["pixels"], rtol=0, atol=0)
    assert batch["y"].tolist() == [int(index >= 5) for index in batch["index"]]


@pytest.mark.parametrize("batch, world", [(5, 2), (0, 1), (-4, 2)])
def test_batch_must_divide(eleven: data.Folder, batch: int, world: int):
    with pytest.raises(InputError, match="multiple"):
        data.batches(eleven, batch, world=world)


@pytest.mark.parametrize("world, workers", [(1, 0), (2, 0), (3, 0), (1, 2), (3, 2)])
def test_once_covers_exactly(eleven: data.Folder, world: int, workers: int):
    seen = []
    for rank in range(world):
        parts = list(data.once(eleven, 4, rank, world, workers))
        assert all(len(part["index"]) == 4 for part in parts[:-1])
        for part in parts:
            for x, index, y in zip(part["pixels"], part["index"], part["y"], strict=True):
                image, label = eleven[int(index)]
                assert_close(x, image, rtol=0, atol=0)
                assert y == label
                seen.append(int(index))
    assert sorted(seen) == list(range(11))


def test_once_with_more_ranks_than_images_and_with_a_limit(eleven: data.Folder):
    assert [len(list(data.once(eleven, 4, rank, 20))) for rank in (0, 10, 11, 19)] == [1, 1, 0, 0]
    limited = [int(i) for part in data.once(eleven, 2, limit=4) for i in part["index"]]
    assert limited == [0, 2, 5, 8]                        # floor(k * 11 / 4)
    assert sum(len(part["y"]) for part in data.once(eleven, 4, limit=50)) == 11
    with pytest.raises(InputError):
        data.once(eleven, 4, limit=0)


# ------------------------------------------------------------------------------------------------------------
# Files that are not what they seem.


def damage(root: pathlib.Path) -> set[str]:
    """Three files that cannot be read, among them the first and the last of the folder."""
    whole = io.BytesIO()
    noise(64, 64).save(whole, "JPEG")
    (root / "a/000.png").write_bytes(b"")
    (root / "a/003.png").write_bytes(b"this is a page of text, not an image\n" * 20)
    (root / "bb/zzz.jpg").write_bytes(whole.getvalue()[:len(whole.getvalue()) // 2])
    return {str(root / name) for name in ("a/000.png", "a/003.png", "bb/zzz.jpg")}


@pytest.mark.parametrize("workers", [0, 2])
def test_unreadable_files_are_named_and_replaced(tmp_path: pathlib.Path, workers: int):
    make_folder(tmp_path, {"a": 5, "bb": 6})
    bad = damage(tmp_path)
    dataset = data.open_dataset(str(tmp_path), 8, "train")
    assert len(dataset) == 12
    epoch = first(data.batches(dataset, 4, workers=workers), 3)
    assert [len(batch["x"]) for batch in epoch] == [4, 4, 4]
    assert {name for batch in epoch for name in batch["skipped"]} == bad
    # 0 -> 1 and 3 -> 4; the last, 11, goes round to 0, which is unreadable too, so to 1.
    index = torch.cat([batch["index"] for batch in epoch]).tolist()
    assert sorted(index) == [1, 1, 1, 2, 4, 4, 5, 6, 7, 8, 9, 10]
    for batch in epoch:
        assert batch["y"].tolist() == [int(index >= 5) for index in batch["index"]]


@pytest.mark.parametrize("size", [1, 4, 11])
def test_once_leaves_unreadable_files_out(tmp_path: pathlib.Path, size: int):
    make_folder(tmp_path, {"a": 5, "bb": 6})
    bad = damage(tmp_path)
    parts = list(data.once(data.open_dataset(str(tmp_path), 8, "train"), size))
    assert [int(i) for part in parts for i in part["index"]] == [1, 2, 4, 5, 6, 7, 8, 9, 10]
    assert sorted(name for part in parts for name in part["skipped"]) == sorted(bad)
    assert all(len(part["x"]) == len(part["y"]) == len(part["index"]) > 0 for part in parts)


def test_a_disk_that_goes_away_ends_in_one_line(tmp_path: pathlib.Path):
    dataset = data.open_dataset(make_folder(tmp_path, {"a": 3}), 8, "train")
    for file in (tmp_path / "a").iterdir():
        file.unlink()
    for workers in (0, 1):
        with pytest.raises(InputError) as error:
            next(data.batches(dataset, 2, workers=workers))
        assert "\n" not in str(error.value) and "a/00" in str(error.value)
    with pytest.raises(InputError, match="000.png"):
        dataset[0]


@pytest.mark.parametrize("mode, ending", [
    ("RGBA", "png"), ("L", "png"), ("L", "jpg"), ("P", "png"), ("LA", "png"), ("1", "png"), ("I;16", "png"),
    ("CMYK", "jpg"), ("RGB", "webp"), ("RGBA", "webp"), ("RGB", "JPEG")])
def test_every_mode_is_read_as_rgb(tmp_path: pathlib.Path, mode: str, ending: str):
    # A left half of dark red and a right half of light green, as far as the mode can tell them apart.
    (tmp_path / "a").mkdir()
    pixels = np.zeros((16, 16, 3), dtype=np.uint8)
    pixels[:, :8], pixels[:, 8:] = (120, 10, 20), (160, 240, 170)
    image = Image.fromarray(pixels)
    grey = mode in ("L", "LA", "I;16")
    if mode == "I;16":
        image = Image.fromarray(np.asarray(image.convert("L")).astype(np.uint16) * 257)
    elif mode == "P":
        image = image.quantize(4)
    else:
        image = image.convert(mode, dither=Image.Dither.NONE) if mode == "1" else image.convert(mode)
    keywords = {"quality": 95} if ending != "png" else {"transparency": b"\x00\x80"} if mode == "P" else {}
    image.save(tmp_path / "a" / f"image.{ending}", **keywords)
    seen, _ = data.open_dataset(str(tmp_path), 16, "train")[0]
    expected = torch.from_numpy(pixels).permute(2, 0, 1).float()
    if grey:
        expected = (expected * torch.tensor([0.299, 0.587, 0.114])[:, None, None]).sum(0).expand(3, 16, 16)
    if mode == "1":
        expected = torch.where(torch.arange(16) < 8, 0.0, 255.0).expand(3, 16, 16)
    assert seen.shape == (3, 16, 16) and seen.dtype == torch.uint8
    difference = (seen.float() - expected).abs()
    assert difference[:, :, :6].max() < 14 and difference[:, :, 10:].max() < 14      # off the JPEG edge


# ------------------------------------------------------------------------------------------------------------
# Opening by name.


def one_line(name: str, size: int = 8, split: str = "train", **keywords) -> str:
    with pytest.raises(InputError) as error:
        data.open_dataset(name, size, split, **keywords)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_what_is_not_a_data_set(tmp_path: pathlib.Path):
    assert "does not exist" in one_line(str(tmp_path / "nowhere"))
    assert "does not exist" in one_line("imagnet") and "shapes, cifar10" in one_line("imagnet")
    (tmp_path / "archive.tar").write_bytes(b"x")
    assert "not a directory" in one_line(str(tmp_path / "archive.tar"))
    (tmp_path / "empty").mkdir()
    assert ".webp" in one_line(str(tmp_path / "empty"))
    (tmp_path / "hollow/a").mkdir(parents=True)
    assert "(a, ..)" in one_line(str(tmp_path / "hollow"))
    (tmp_path / "arrays/a").mkdir(parents=True)
    np.save(tmp_path / "arrays/a/0.npy", np.zeros(3))
    (tmp_path / "arrays/a/0.gif").write_bytes(b"GIF89a")
    assert ".jpeg" in one_line(str(tmp_path / "arrays"))
    make_folder(tmp_path / "deep", {"images/a": 1})
    assert "directly" in one_line(str(tmp_path / "deep"))
    (tmp_path / "damaged/a").mkdir(parents=True)
    (tmp_path / "damaged/a/0.png").write_bytes(b"\x89PNG\r\n\x1a\n no more")
    assert "cannot be read" in one_line(str(tmp_path / "damaged"))
    assert "positive" in one_line("shapes", size=0)
    assert "split 'test'" in one_line("shapes", split="test")


def test_train_and_val_folders(tmp_path: pathlib.Path, capsys: pytest.CaptureFixture):
    root = make_folder(tmp_path, {"train/b": 2, "train/a": 1, "train/.cache": 3, "val/b": 3})
    train, val = (data.open_dataset(root, 8, split) for split in ("train", "val"))
    assert train.classes == val.classes == ["a", "b"] and (len(train), len(val)) == (3, 3)
    assert train.labels([0, 1, 2]).tolist() == [0, 1, 1] and val.labels([0, 1, 2]).tolist() == [1, 1, 1]
    assert val.note == "" and capsys.readouterr().err == ""
    make_folder(tmp_path, {"val/zebra": 1})
    assert "zebra" in one_line(root, split="val")
    os.rename(tmp_path / "train", tmp_path / "elsewhere")
    assert "no train/" in one_line(root)


def test_without_a_val_folder_val_is_train_and_says_so(tmp_path: pathlib.Path, capsys: pytest.CaptureFixture):
    root = make_folder(tmp_path, {"b": 2, "a": 1, "train": 1})          # a class that is called train
    train = data.open_dataset(root, 8, "train")
    assert train.classes == ["a", "b", "train"] and len(train) == 4 and capsys.readouterr().err == ""
    val = data.open_dataset(root, 8, "val")
    assert len(val) == 4 and "same 4 images" in val.note and val.note in capsys.readouterr().err


def test_loose_images_and_given_classes(tmp_path: pathlib.Path):
    root = make_folder(tmp_path, {"faces": 3})
    flat = data.open_dataset(root + "/faces", 8, "train")
    assert flat.classes == ["faces"] and len(flat) == 3 and flat[2][1] == 0
    given = data.open_dataset(root, 8, "train", classes=["cats", "faces"])
    assert given.classes == ["cats", "faces"] and given[0][1] == 1
    assert "faces" in one_line(root, classes=["cats", "dogs"])
    assert "no class folders" in one_line(root + "/faces", classes=["cats", "dogs"])


def test_small_images_are_enlarged(tmp_path: pathlib.Path):
    dataset = data.open_dataset(make_folder(tmp_path, {"a": 1}, size=(5, 6)), 16, "train")
    assert dataset[0][0].shape == (3, 16, 16)


def test_cifar10(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch):
    class Offline:
        base_folder, classes = "cifar-10-batches-py", ["plane", "car"]

        def __init__(self, root: str, train: bool = True, download: bool = False) -> None:
            if download:
                raise OSError("no route\nto host")
            self.data = np.full((4, 32, 32, 3), 7 if train else 9, dtype=np.uint8)
            self.targets = [0, 1, 1, 0]

    monkeypatch.setattr(data.torchvision.datasets, "CIFAR10", Offline)
    root = tmp_path / "data"
    assert "OSError: no route to host" in one_line("cifar10", size=32, root=str(root))
    assert list(root.iterdir()) == []                     # nothing half-written
    (root / "cifar-10-batches-py").mkdir()
    for split, value in (("train", 7), ("val", 9)):
        dataset = data.open_dataset("cifar10", 16, split, root=str(root))
        image, label = dataset[1]
        assert image.shape == (3, 16, 16) and (image == value).all() and label == 1 and len(dataset) == 4


def test_cifar10_subset_from_its_archive(tmp_path: pathlib.Path):
    if not SUBSET.exists():
        pytest.skip(f"{SUBSET.name} is not there")
    with tarfile.open(SUBSET) as archive:
        for member in itertools.islice(archive, 12):
            archive.extract(member, tmp_path, filter="data")
    dataset = data.open_dataset(str(tmp_path / "cifar10_subset"), 32, "train")
    assert dataset.classes == ["airplane"] and len(dataset) == 12 and dataset.note == ""
    for index in range(12):
        with Image.open(dataset.name_of(index)) as image:
            expected = torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1)
        assert_close(dataset[index][0], expected, rtol=0, atol=0)


# ------------------------------------------------------------------------------------------------------------
# Latents.  The tokenizer of these tests is one fixed convolution to mean and deviation, 2 x 2 x 2 of 8 x 8
# pixels; its kernel is not symmetric, so a mirrored latent differs from the latent of the mirror image.
# Caches are hidden folders: the images' folder, where they lie, would take others for classes.

WEIGHT = torch.randn(4, 3, 4, 4, generator=torch.Generator().manual_seed(1)) / 4
KEY = {"tokenizer": "a" * 64}


class Encoder:
    """encode() with a count of the images it has seen; it fails where `limit` is reached."""

    def __init__(self, limit: float = float("inf"), scale: float = 1.0) -> None:
        self.seen, self.limit, self.scale = 0, limit, scale

    def __call__(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        assert x.dtype == torch.float32 and x.shape[1:] == (3, 8, 8) and x.abs().max() <= 1
        self.seen += len(x)
        if self.seen > self.limit:
            raise KeyboardInterrupt
        mean, std = torch.nn.functional.conv2d(x, self.scale * WEIGHT, stride=4).chunk(2, 1)
        return mean, 0.1 + 0.3 * std.sigmoid()


@pytest.fixture
def chunks_of_three(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(data, "CHUNK", 3)


def direct(dataset: data.Folder, index: int, flipped: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and deviation [C, h, w] of one image as dataset[index] reads it."""
    x = dataset[index][0].float() / 127.5 - 1
    mean, std = Encoder()(x[None, :, :, torch.arange(7, -1, -1) if flipped else torch.arange(8)])
    return mean[0], std[0]


def contents(folder: pathlib.Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.rglob("*") if file.is_file()}


@pytest.mark.parametrize("dtype, step", [("fp16", 2**-11), ("bf16", 2**-8)])
@pytest.mark.parametrize("workers", [0, 2])
def test_cached_latents_are_those_of_the_images(eleven: data.Folder, tmp_path: pathlib.Path, dtype: str,
                                                step: float, workers: int, chunks_of_three: None):
    latents = data.cache_latents(tmp_path / ".cache", eleven, Encoder(), KEY, 2, workers=workers, dtype=dtype)
    assert len(latents) == 11 and latents.shape == (2, 2, 2) and latents.skipped == []
    assert latents.classes == ["a", "bb"]
    seen = set()
    for batch in first(data.latent_batches(latents, 4, seed=3), 20):
        assert batch["mean"].dtype == batch["std"].dtype == torch.float32
        assert batch["y"].dtype == batch["index"].dtype == torch.int64
        for mean, std, y, index, flipped in zip(*batch.values(), strict=True):
            expected = direct(eleven, int(index), bool(flipped))
            assert_close((mean, std), expected, rtol=1.01 * step, atol=1e-6)
            assert y == int(index >= 5)
            seen.add((int(index), bool(flipped)))
    assert len(seen) == 22                                # 80 draws of 22: all of them have been compared


def test_statistics_are_exact(eleven: data.Folder, tmp_path: pathlib.Path, chunks_of_three: None):
    latents = data.cache_latents(tmp_path / ".cache", eleven, Encoder(), KEY, 2)
    both = [direct(eleven, index, flipped) for index in range(11) for flipped in (False, True)]
    mean, std = (torch.stack(part).half().double() for part in zip(*both, strict=True))      # [22, C, h, w]
    centre = torch.stack([mean[:, c].mean() for c in range(2)])
    spread = torch.stack([(mean[:, c] - centre[c]).square().mean() for c in range(2)])
    noise = torch.stack([std[:, c].square().mean() for c in range(2)])
    assert (noise > 0.02 * spread).all()                   # else the two answers could not be told apart
    assert_close(latents.statistics("mean"), (centre.float(), spread.sqrt().float()), rtol=1e-4, atol=1e-6)
    sample = latents.statistics("sample")
    assert_close(sample, (centre.float(), (spread + noise).sqrt().float()), rtol=1e-4, atol=1e-6)
    latents.sums = None                                   # from the file instead of from the encoding
    assert_close(latents.statistics("sample"), sample, rtol=1e-6, atol=0)


def test_latent_batches_follow_the_plan_of_the_images(eleven: data.Folder, tmp_path: pathlib.Path):
    latents = data.cache_latents(tmp_path / ".cache", eleven, Encoder(), KEY, 4)
    whole = first(data.latent_batches(latents, 4, seed=5), 12)
    seen = torch.cat([batch["index"] for batch in whole]).tolist()
    for epoch in range(4):
        assert sorted(seen[11 * epoch:11 * epoch + 11]) == list(range(11))
    for ours, images in zip(whole, data.batches(eleven, 4, seed=5), strict=False):
        assert_close((ours["index"], ours["y"]), (images["index"], images["y"]), rtol=0, atol=0)
    half = [first(data.latent_batches(latents, 4, 5, start=7, rank=rank, world=2), 5) for rank in range(2)]
    for k, batch in enumerate(whole[7:]):
        for rank in range(2):
            for name, value in batch.items():
                assert_close(half[rank][k][name], value[rank::2], rtol=0, atol=0)
    with pytest.raises(InputError, match="multiple"):
        data.latent_batches(latents, 5, seed=0, world=2)


def test_flips_are_those_of_the_images(tmp_path: pathlib.Path):
    dataset = data.open_dataset(make_folder(tmp_path / "images", {"a": 12}), 8, "train")
    latents = data.cache_latents(tmp_path / ".cache", dataset, Encoder(), KEY, 12)
    flips = 0
    for ours, images in first(zip(data.latent_batches(latents, 12, 1), data.batches(dataset, 12, 1)), 10):
        mean, std = Encoder()(images["x"])
        assert_close((ours["mean"], ours["std"]), (mean, std), rtol=1e-3, atol=1e-6)
        flips += int(ours["flipped"].sum())
    assert 35 < flips < 85                                # of 120, p = 0.5: within 4.5 standard deviations


def test_a_finished_cache_is_only_opened(eleven: data.Folder, tmp_path: pathlib.Path):
    cache = tmp_path / ".cache"
    encoder = Encoder()
    data.cache_latents(cache, eleven, encoder, KEY, 4)
    assert encoder.seen == 2 * 11 + 1                     # both flips, and one image to learn the shape
    before = contents(cache)
    assert sorted(before) == ["cache.json", "labels.npy", "latents.npy"]
    for path in (*cache.rglob("*"), cache):
        path.chmod(0o555 if path.is_dir() else 0o444)
    try:
        again = data.cache_latents(cache, eleven, Encoder(limit=0), KEY, 4)
        assert len(next(data.latent_batches(again, 4, seed=0))["mean"]) == 4
    finally:
        for path in (cache, *cache.rglob("*")):
            path.chmod(0o755)
    assert contents(cache) == before


@pytest.mark.parametrize("limit, worlds", [(9, (1, 1)), (9, (2, 1)), (9, (1, 3)), (6, (4, 2))])
def test_an_interrupted_run_goes_on_with_any_number_of_ranks(
        eleven: data.Folder, tmp_path: pathlib.Path, chunks_of_three: None, limit: int,
        worlds: tuple[int, int]):
    data.cache_latents(tmp_path / ".whole", eleven, Encoder(), KEY, 2)

    def start(world: int, limit: float) -> list[Encoder]:
        """Every rank a thread; one that fails breaks the barrier, as torchrun ends the others."""
        barrier, encoders = threading.Barrier(world, timeout=30), [Encoder(limit) for _ in range(world)]

        def rank_of(rank: int) -> None:
            try:
                data.cache_latents(tmp_path / ".cache", eleven, encoders[rank], KEY, 2, rank, world,
                                   barrier=barrier.wait)
            except KeyboardInterrupt:
                barrier.abort()
            except threading.BrokenBarrierError:
                pass

        with ThreadPoolExecutor(world) as pool:
            list(pool.map(rank_of, range(world)))
        return encoders

    # Chunks of 3, 3, 3 and 2 images: the encoder sees 6, 6, 6 and 4, and rank 0 one more, for the shape.
    start(worlds[0], limit)
    home, = (tmp_path / ".cache").iterdir()
    done = [tuple(map(int, mark.stem.split("-"))) for mark in (home / "chunks").glob("*.json")]
    assert 0 < len(done) < 4
    encoders = start(worlds[1], limit=float("inf"))
    assert sum(e.seen for e in encoders) == 2 * (11 - sum(stop - start for start, stop in done))
    assert contents(tmp_path / ".cache") == contents(tmp_path / ".whole")


def test_a_mark_follows_its_data(eleven: data.Folder, tmp_path: pathlib.Path, chunks_of_three: None,
                                 monkeypatch: pytest.MonkeyPatch):
    fsync, replace, synced, marked = os.fsync, os.replace, [], []

    def seen_fsync(descriptor: int) -> None:
        synced.append(os.fstat(descriptor).st_ino)
        fsync(descriptor)

    def seen_replace(source: pathlib.Path, target: pathlib.Path) -> None:
        if target.parent.name == "chunks":
            array = target.parent.parent / "latents.npy"
            assert array.stat().st_ino in synced
            start, stop = map(int, target.stem.split("-"))
            assert (np.load(array)[start:stop] != 0).all()
            marked.append((start, stop))
            synced.clear()
        replace(source, target)

    monkeypatch.setattr(os, "fsync", seen_fsync)
    monkeypatch.setattr(os, "replace", seen_replace)
    data.cache_latents(tmp_path / ".cache", eleven, Encoder(), KEY, 2)
    assert marked == [(0, 3), (3, 6), (6, 9), (9, 11)]


def killed(rank: int, folder: str, images: str, barrier, limit: int) -> None:
    """One process of two; rank 1 is killed without notice when it has encoded `limit` images."""
    class Fatal(Encoder):
        def __call__(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            if rank == 1 and self.seen >= limit:
                os.kill(os.getpid(), signal.SIGKILL)
            return super().__call__(x)

    data.CHUNK = 3
    dataset = data.open_dataset(images, 8, "train")
    latents = data.cache_latents(folder, dataset, Fatal(), KEY, 2, rank, 2, barrier=lambda: barrier.wait(20))
    assert len(latents) == 11


def test_two_processes_one_of_them_killed(eleven: data.Folder, tmp_path: pathlib.Path, chunks_of_three: None):
    data.cache_latents(tmp_path / ".whole", eleven, Encoder(), KEY, 2)
    context = torch.multiprocessing.get_context("fork")
    for limit, codes in ((8, [1, -signal.SIGKILL]), (1000, [0, 0])):
        barrier = context.Barrier(2)
        flags = str(tmp_path / ".cache"), eleven.folder, barrier, limit
        processes = [context.Process(target=killed, args=(rank, *flags)) for rank in range(2)]
        for process in processes:
            process.start()
        processes[1].join(30)
        if codes[1]:
            barrier.abort()
        processes[0].join(30)
        assert [process.exitcode for process in processes] == codes
    assert contents(tmp_path / ".cache") == contents(tmp_path / ".whole")


def test_other_data_or_another_tokenizer_is_another_cache(eleven: data.Folder, tmp_path: pathlib.Path,
                                                          capsys: pytest.CaptureFixture):
    cache, encoder, flags = tmp_path / ".cache", Encoder(), {"key": KEY, "dtype": "bf16", "batch": 4}
    data.cache_latents(cache, eleven, encoder, **flags)
    (cache / "train-notes").mkdir()                       # not ours
    changes = {
        "dtype": lambda: flags.update(dtype="fp16"),
        "tokenizer": lambda: flags.update(key={"tokenizer": "b" * 64}),
        "file": lambda: noise(8, 11, seed=77).save(eleven.name_of(4)),
        "time": lambda: os.utime(eleven.name_of(4), (1, 1)),
    }
    for name, change in changes.items():
        change()
        seen, (old,) = encoder.seen, cache.glob("train-????????????????")
        for _ in range(2):                                # the second time it is there
            latents = data.cache_latents(cache, eleven, encoder, **flags)
            assert encoder.seen == seen + 23, name
        assert str(old) in capsys.readouterr().err and not old.exists() and len([*cache.iterdir()]) == 2
    batch = next(itertools.dropwhile(lambda b: 4 not in b["index"], data.latent_batches(latents, 1, seed=0)))
    assert_close(batch["mean"][0], direct(eleven, 4, bool(batch["flipped"]))[0], rtol=1e-3, atol=1e-6)
    assert (cache / "train-notes").is_dir()
    val = data.open_dataset(eleven.folder, 8, "val")
    data.cache_latents(cache, val, encoder, **flags)
    assert len(list(cache.glob("train-*"))) == 2          # the splits live side by side


def test_fingerprints(eleven: data.Folder, tmp_path: pathlib.Path):
    for name in ("a", "bb"):                              # copytree keeps the times
        shutil.copytree(tmp_path / name, tmp_path / "elsewhere" / name)
    moved = data.open_dataset(str(tmp_path / "elsewhere"), 8, "train")
    same = data.fingerprint(eleven)
    assert data.fingerprint(moved) == same
    (tmp_path / "elsewhere/a/000.png").rename(tmp_path / "elsewhere/a/0000.png")     # still the first
    renamed = data.open_dataset(str(tmp_path / "elsewhere"), 8, "train")
    larger = data.open_dataset(str(tmp_path / "elsewhere"), 16, "train")
    os.utime(eleven.name_of(10), (1, 1))
    assert len({same, *map(data.fingerprint, (renamed, larger, eleven))}) == 4
    shapes = [data.Shapes(16, "train", 0), data.Shapes(16, "train", 1), data.Shapes(32, "train", 0),
              data.Shapes(16, "val", 0)]
    assert len({data.fingerprint(dataset) for dataset in shapes}) == 4
    assert data.fingerprint(data.Shapes(16, "train", 0)) == data.fingerprint(shapes[0])
    cifar = data.Cifar10.__new__(data.Cifar10)
    data.Pictures.__init__(cifar, "cifar10", 32, "train", ["plane", "car"], np.array([0, 1]))
    prints = set()
    for value, target in ((0, 0), (1, 0), (0, 1)):
        cifar.pixels, cifar.targets = np.full((2, 32, 32, 3), value, np.uint8), np.array([target, 1])
        prints.add(data.fingerprint(cifar))
    assert len(prints) == 3


def test_unreadable_images_have_no_latents(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch):
    make_folder(tmp_path / "images", {"a": 5, "bb": 6})
    bad = damage(tmp_path / "images")
    (tmp_path / "images/a/001.png").unlink()
    (tmp_path / "images/a/001.png").symlink_to("nowhere")
    bad.add(str(tmp_path / "images/a/001.png"))
    monkeypatch.setattr(data, "CHUNK", 4)                 # the first chunk: 0, 1 and 3 are bad
    dataset = data.open_dataset(str(tmp_path / "images"), 8, "train")
    with pytest.raises(InputError, match="3 of the 4 images from .*000.png on cannot be read"):
        data.cache_latents(tmp_path / ".cache", dataset, Encoder(), KEY, 2)
    monkeypatch.setattr(data, "CHUNK", 6)
    latents = data.cache_latents(tmp_path / ".cache", dataset, Encoder(), KEY, 1)
    assert set(latents.skipped) == bad and len(latents.skipped) == 4 and len(latents) == 8
    seen = torch.cat([batch["index"] for batch in first(data.latent_batches(latents, 4, seed=0), 4)]).tolist()
    assert sorted(seen) == sorted(2 * [2, 4, 5, 6, 7, 8, 9, 10])
    mean = torch.stack([direct(dataset, i, f)[0] for i in seen[:8] for f in (False, True)]).half().double()
    assert_close(latents.statistics("mean")[0], mean.mean((0, 2, 3)).float(), rtol=1e-4, atol=1e-6)
    for batch in first(data.latent_batches(latents, 4, seed=0), 4):
        assert batch["y"].tolist() == [int(index >= 5) for index in batch["index"]]


def test_a_disk_that_comes_back_is_read_again(eleven: data.Folder, tmp_path: pathlib.Path,
                                              chunks_of_three: None):
    """The disk goes away at image 2: chunk 0 loses one image, chunk 1 all of them, and the run ends."""
    data.cache_latents(tmp_path / ".whole", eleven, Encoder(), KEY, 1)
    folders = [(tmp_path / name, tmp_path / f"{name} is away") for name in ("a", "bb")]

    class Away(Encoder):
        def __call__(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            if self.seen == 3:                            # the shape, and image 0 with its mirror image
                for here, away in folders:
                    here.rename(away)
            return super().__call__(x)

    with pytest.raises(InputError, match="3 of the 3 images from .*003.png on cannot be read: is the disk"):
        data.cache_latents(tmp_path / ".cache", eleven, Away(), KEY, 1)
    for here, away in folders:
        away.rename(here)
    latents = data.cache_latents(tmp_path / ".cache", eleven, Encoder(), KEY, 1)
    assert len(latents) == 11 and latents.skipped == []
    assert contents(tmp_path / ".cache") == contents(tmp_path / ".whole")


def test_no_room_and_no_numbers_end_in_one_line(eleven: data.Folder, tmp_path: pathlib.Path,
                                                monkeypatch: pytest.MonkeyPatch):
    cache = tmp_path / ".cache"
    data.cache_latents(cache, eleven, Encoder(), KEY, 4)
    before = contents(cache)
    used = sum(file.stat().st_blocks * 512 for file in cache.glob("*/*"))
    need = 11 * 2 * 2 * 8 * 2                             # images, flips, mean and std, C h w, bytes
    fake = shutil.disk_usage(tmp_path)._replace(free=need - used - 1)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: fake)
    other = {"tokenizer": "b" * 64}
    with pytest.raises(InputError, match=f"need {need} bytes in .*cache, which has {need - 1}: ") as error:
        data.cache_latents(cache, eleven, Encoder(), other, 4)
    assert "\n" not in str(error.value) and contents(cache) == before     # the old one is still there
    monkeypatch.undo()
    with pytest.raises(InputError, match="images 0 to 3 reach .*e.*float16 does not hold"):
        data.cache_latents(cache, eleven, Encoder(scale=1e6), other, 4)
    data.cache_latents(cache, eleven, Encoder(scale=1e6), other, 4, dtype="bf16")

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(InputError, match="cannot be written to .*No space left") as error:
        data.cache_latents(cache, eleven, Encoder(), KEY, 4)
    assert "\n" not in str(error.value)
    monkeypatch.undo()
    home, = cache.iterdir()
    data.cache_latents(cache, eleven, Encoder(), KEY, 4)
    assert contents(cache) == before
    (home / "labels.npy").write_bytes(b"")
    with pytest.raises(InputError, match="damaged"):
        data.cache_latents(cache, eleven, Encoder(), KEY, 4)


# ------------------------------------------------------------------------------------------------------------
# LightningDiT's shards.


def write_shard(path: pathlib.Path, tensors: dict[str, torch.Tensor]) -> None:
    """The safetensors layout: uint64 length of the header, header as JSON, all the bytes."""
    names = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.int64: "I64"}
    header, body = {"__metadata__": {"total_size": "5", "dtype": "torch.float32", "device": "cpu"}}, b""
    for name, tensor in tensors.items():
        raw = tensor.contiguous().view(torch.uint8).numpy().tobytes()
        header[name] = {"dtype": names[tensor.dtype], "shape": list(tensor.shape),
                        "data_offsets": [len(body), len(body) + len(raw)]}
        body += raw
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    path.write_bytes(struct.pack("<Q", len(text)) + text + body)


def shard(n: int, seed: int, dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    draws = torch.Generator().manual_seed(seed)
    latents, flip = (torch.randn(n, 2, 3, 3, generator=draws).mul(3).add(seed).to(dtype) for _ in range(2))
    return {"labels": torch.arange(n) % 4, "latents": latents, "latents_flip": flip}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_shards_of_lightningdit(tmp_path: pathlib.Path, dtype: torch.dtype):
    shards = {"rank00_shard000": shard(5, 0, dtype), "rank00_shard001": shard(2, 1, dtype),
              "rank01_shard000": shard(6, 2, dtype)}
    for name, tensors in shards.items():
        write_shard(tmp_path / f"latents_{name}.safetensors", tensors)
    whole = {key: torch.cat([tensors[key] for tensors in shards.values()]) for key in shard(1, 0)}
    latents = data.open_lightningdit_latents(tmp_path)
    assert len(latents) == 13 and latents.shape == (2, 3, 3) and latents.classes == ["0", "1", "2", "3"]
    seen = []
    for batch in first(data.latent_batches(latents, 4, seed=2), 13):
        expected = torch.where(batch["flipped"][:, None, None, None], whole["latents_flip"][batch["index"]],
                               whole["latents"][batch["index"]]).float()
        assert_close(batch["mean"], expected, rtol=0, atol=0)
        assert_close(batch["y"], whole["labels"][batch["index"]], rtol=0, atol=0)
        assert batch["std"].shape == batch["mean"].shape and batch["std"].abs().max() == 0
        seen += batch["index"].tolist()
    assert all(sorted(seen[i:i + 13]) == list(range(13)) for i in range(0, 52, 13))
    both = torch.cat([whole["latents"], whole["latents_flip"]]).double()
    exact = (both.mean((0, 2, 3)).float(), both.transpose(0, 1).flatten(1).std(1, correction=0).float())
    for latent in ("mean", "sample"):
        assert_close(latents.statistics(latent), exact, rtol=1e-6, atol=1e-6)
    stored = {"mean": torch.randn(1, 2, 1, 1), "std": torch.rand(1, 2, 1, 1)}
    torch.save(stored, tmp_path / "latents_stats.pt")
    mean, std = data.open_lightningdit_latents(tmp_path).statistics("sample")
    assert_close((mean, std), (stored["mean"].flatten(), stored["std"].flatten()), rtol=0, atol=0)


def test_our_shards_are_those_of_the_safetensors_package(tmp_path: pathlib.Path):
    package = pytest.importorskip("safetensors.torch")
    tensors = shard(5, 0, torch.bfloat16)
    write_shard(tmp_path / "ours.safetensors", tensors)
    package.save_file(tensors, tmp_path / "theirs.safetensors", metadata={"total_size": "5"})
    assert_close(package.load_file(tmp_path / "ours.safetensors"), tensors, rtol=0, atol=0)
    for name, (array, dtype) in data.read_safetensors(tmp_path / "theirs.safetensors").items():
        assert_close(torch.from_numpy(array.copy()).view(dtype), tensors[name], rtol=0, atol=0)


def wrong_shards() -> dict[str, tuple[dict[str, torch.Tensor], str]]:
    good = shard(4, 0)
    return {
        "absent": ({k: v for k, v in good.items() if k != "latents_flip"}, "no tensor 'latents_flip'"),
        "labels": (good | {"labels": torch.arange(3)}, "do not go together"),
        "flat": (good | {k: torch.zeros(4, 18) for k in ("latents", "latents_flip")}, "do not go together"),
        "flip": (good | {"latents_flip": good["latents_flip"][:, :1]}, "do not go together"),
        "half": (good | {"latents_flip": good["latents_flip"].half()}, "do not go together"),
        "other": ({k: v[..., :2] if k != "labels" else v for k, v in good.items()}, "one shape and type"),
        "bf16": (shard(4, 0, torch.bfloat16), "one shape and type"),
        "negative": (good | {"labels": torch.arange(4) - 1}, "from -1"),
        "real": (good | {"labels": torch.rand(4)}, "not float64"),
    }


@pytest.mark.parametrize("name", wrong_shards())
def test_wrong_shards_end_in_one_line(tmp_path: pathlib.Path, name: str):
    tensors, message = wrong_shards()[name]
    write_shard(tmp_path / "latents_rank00_shard000.safetensors", shard(4, 1))
    write_shard(tmp_path / "latents_rank00_shard001.safetensors", tensors)
    with pytest.raises(InputError, match=message) as error:
        data.open_lightningdit_latents(tmp_path)
    assert "\n" not in str(error.value)


def test_damaged_shards_end_in_one_line(tmp_path: pathlib.Path):
    path = tmp_path / "latents_rank00_shard000.safetensors"
    with pytest.raises(InputError, match="no latents"):
        data.open_lightningdit_latents(tmp_path)
    write_shard(path, shard(4, 1))
    whole = path.read_bytes()
    for piece in (whole[:-1], whole[:200], whole[:5], b"", b"version https://git-lfs\n" * 9,
                  whole.replace(b'"F32"', b'"F8_"'), whole.replace(b"data_offsets", b"data_Offsets")):
        path.write_bytes(piece)
        with pytest.raises(InputError, match="cannot be read as safetensors") as error:
            data.open_lightningdit_latents(tmp_path)
        assert "\n" not in str(error.value)
    path.write_bytes(whole)
    torch.save(dict.fromkeys(("mean", "std"), torch.ones(1, 3, 1, 1)), tmp_path / "latents_stats.pt")
    with pytest.raises(InputError, match="no mean and std of 2 channels"):
        data.open_lightningdit_latents(tmp_path)
    (tmp_path / "latents_stats.pt").write_bytes(b"nothing")
    with pytest.raises(InputError, match="no mean and std of 2 channels"):
        data.open_lightningdit_latents(tmp_path)
