"""Data: the shapes, the ADM crop against a slow oracle, the order of batches, files
that cannot be read, arrays of an .npz, and the cache of latents."""

import itertools
import json
import os
import shutil
import signal
import struct
from pathlib import Path

import data
import numpy as np
import pytest
import torch
from PIL import Image
from runtime import InputError
from torch import Tensor
from torch.nn.functional import avg_pool2d, conv2d
from torch.testing import assert_close

EXACT = {"rtol": 0, "atol": 0}


def noise(height, width, seed: int = 0) -> Image.Image:
    """Smooth in one direction, noisy in the other: a shift, a flip or a filter shows."""
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3))
    pixels[..., 0] = np.arange(width)[None] % 256
    return Image.fromarray(pixels.astype(np.uint8))


def make_folder(root: Path, counts: dict[str, int], size=(8, 8)) -> str:
    """Pictures of size = height, width: so many in each folder."""
    for folder, count in counts.items():
        (root / folder).mkdir(parents=True)
        for i in range(count):
            noise(*size, seed=i + 100 * len(folder)).save(root / folder / f"{i:03}.png")
    return str(root)


def opened(root: Path, counts: dict[str, int], size=(8, 8)) -> data.Folder:
    return data.open_dataset(make_folder(root, counts, size), 8, "train")


def first(iterator, count: int) -> list[dict]:
    return list(itertools.islice(iterator, count))


def assert_same(a: dict, b: dict) -> None:
    assert a.keys() == b.keys() and a["skipped"] == b["skipped"]
    for key in ("x", "y", "index", "pixels"):
        assert_close(a[key], b[key], **EXACT)


def one_line(function, *args, **keywords) -> str:
    with pytest.raises(InputError) as error:
        function(*args, **keywords)
    assert "\n" not in str(error.value)
    return str(error.value)


# ------------------------------------------------------------------------------
# Pixels and the hash.


def test_rounding_to_bytes():
    # 127.5 (x + 1) is 0 at -1, 255 at 1, 127.5 at 0 (to even: 128), 102 at -0.2, and
    # 191.25 at 0.5.
    x = torch.tensor([-1, 1, 0, -0.2, 0.5, 0.502, 1.5, -7, float("inf")])
    assert data.to_uint8(x).tolist() == [0, 255, 128, 102, 191, 192, 255, 0, 255]
    every = torch.arange(256, dtype=torch.uint8)
    assert_close(data.to_uint8(data.from_uint8(every)), every, **EXACT)


def test_hash_is_splitmix64():
    # The first outputs of its authors' C code from the state 1234567.
    expected = [6457827717110365317, 3203168211198807973,
                9817491932198370423, 4593380528125082431]
    assert data.hash_bits(1234567, np.arange(4)).tolist() == expected


def test_order_crops_and_flips_are_those_of_every_earlier_run():
    # Recorded.  Whoever changes these numbers changes what every seed stands for.
    assert data.epoch_order(11, 5, 2).tolist() == [6, 10, 9, 0, 2, 8, 7, 3, 5, 4, 1]
    places = [[0.11923635005950928, 0.23973113298416138, 0.8888645768165588],
              [0.29234427213668823, 0.10346269607543945, 0.2926766276359558]]
    assert data.uniform(7, 2, np.array([0, 123456]), 3).tolist() == places


# ------------------------------------------------------------------------------
# Shapes.


def test_shapes_are_a_function_of_seed_split_and_index():
    dataset, index = data.open_dataset("shapes", 32, "train", seed=3), [5, 900, 7, 123_456_789]
    images, labels, masks = dataset.render_batch(index)
    for i, n in enumerate(index):
        image, label = data.Shapes(32, "train", 3)[n]
        assert_close(image, images[i], **EXACT)
        assert label == labels[i] == dataset.labels([n])[0] and isinstance(label, int)
    assert images.shape == (4, 3, 32, 32) and images.dtype == torch.uint8
    for other in dataset[6], data.Shapes(32, "train", 4)[5], data.Shapes(32, "val", 3)[5]:
        assert (other[0].int() - images[0].int()).abs().float().mean() > 5
    count = torch.bincount(dataset.labels(np.arange(20_000)), minlength=10)
    assert (count - 2_000).abs().max() < 5 * 2_000 ** 0.5


def test_shapes_are_the_same_scene_at_any_resolution():
    small, labels, small_mask = data.Shapes(32, "train").render_batch(range(40))
    large, large_labels, large_mask = data.Shapes(64, "train").render_batch(range(40))
    assert_close(labels, large_labels)
    assert (avg_pool2d(large.float(), 2) - small.float()).abs().mean() < 2   # of 255
    # 0.0027 is measured, and 0.0053 with an edge that is twice as soft.
    assert (avg_pool2d(large_mask, 2) - small_mask).abs().mean() < 0.004
    assert (small[1:].float() - small[:-1].float()).abs().mean() > 40   # another scene


def test_a_mask_is_where_the_shape_is():
    # Ground and shape differ in lightness by 0.15 or more: 0.3 less the shading.  So
    # do the means inside and outside of the mask, but not with another image's mask.
    images, _, masks = data.Shapes(32, "train").render_batch(range(200))
    assert masks.min() == 0 and masks.max() == 1 and masks.shape == (200, 32, 32)
    assert (masks.mean((1, 2)) > 0.03).all() and (masks.mean((1, 2)) < 0.5).all()

    def contrast(masks: Tensor) -> Tensor:
        grey = images.float().mean(1)
        inside, outside = ((grey * part).sum((1, 2)) / part.sum((1, 2))
                           for part in (masks, 1 - masks))
        return (inside - outside).abs()

    assert contrast(masks).min() > 255 * 0.15
    assert contrast(masks).mean() > 2 * contrast(masks.roll(1, 0)).mean()
    assert contrast(masks).mean() > 1.5 * contrast(masks.roll(10, 2)).mean()


# ------------------------------------------------------------------------------
# Crops.


def halved_rows(pixels: np.ndarray) -> np.ndarray:
    """Half as many rows: rounded means of the rows whose centres lie in each."""
    n, m = len(pixels), len(pixels) // 2
    rows = [[k for k in range(n) if i * n <= (k + 0.5) * m < (i + 1) * n]
            for i in range(m)]
    return np.stack([np.floor(np.mean(pixels[row], axis=0) + 0.5) for row in rows])


def oracle_crop(image: Image.Image, size: int) -> np.ndarray:
    """The ADM centre crop from its description, by index arithmetic."""
    pixels = np.asarray(image).astype(float)
    while min(pixels.shape[:2]) >= 2 * size:
        pixels = halved_rows(halved_rows(pixels.swapaxes(0, 1)).swapaxes(0, 1))
    h, w = pixels.shape[:2]
    ratio = size / min(h, w)
    resized = np.asarray(Image.fromarray(pixels.astype(np.uint8)).resize(
        (round(w * ratio), round(h * ratio)), resample=Image.Resampling.BICUBIC))
    top, left = (resized.shape[0] - size) // 2, (resized.shape[1] - size) // 2
    return resized[top:top + size, left:left + size]


@pytest.mark.parametrize("height, width", [
    (8, 8), (8, 11), (13, 9), (32, 48), (40, 38), (5, 7), (8, 801)])
def test_centre_crop_against_the_oracle(height, width):
    image = noise(height, width)
    ours = np.asarray(data.adm_crop(image, 8))
    assert ours.shape == (8, 8, 3)
    np.testing.assert_array_equal(ours, oracle_crop(image, 8))


def test_crops_and_flips_are_drawn_for_each_position(tmp_path):
    dataset = opened(tmp_path, {"a": 1}, size=(8, 12))
    image = np.array(Image.open(tmp_path / "a/000.png"))
    image = torch.from_numpy(image).permute(2, 0, 1)
    windows = [image[:, :, i:i + 8] for i in range(5)]
    windows += [window.flip(2) for window in windows]
    seen = [next(i for i, window in enumerate(windows) if (window == pixels).all())
            for batch in first(data.batches(dataset, 16, seed=3), 15)
            for pixels in batch["pixels"]]
    u = data.uniform(3, 2, np.arange(240), 3)   # across, down, mirrored
    assert seen == [int(5 * across) + 5 * (side < 0.5) for across, _, side in u]
    assert {*seen} == {*range(10)}
    assert 80 < sum(i >= 5 for i in seen) < 160   # within 5 deviations of 120
    centre = next(data.batches(dataset, 1, augment=False))["pixels"][0]
    assert_close(centre, windows[2], **EXACT)


# ------------------------------------------------------------------------------
# The order of batches.


@pytest.fixture
def eleven(tmp_path) -> data.Folder:
    return opened(tmp_path, {"a": 5, "bb": 6}, size=(8, 11))


def test_an_epoch_visits_every_image_once(eleven):
    # 12 batches of 4 are 48 positions: 4 epochs of 11 images, and 4 images of a fifth.
    parts = first(data.batches(eleven, 4, seed=5), 12)
    seen = torch.cat([part["index"] for part in parts]).tolist()
    epochs = [seen[i:i + 11] for i in range(0, 44, 11)]
    assert all(sorted(epoch) == list(range(11)) for epoch in epochs)
    assert epochs[0] != epochs[1] and epochs[0] != list(range(11))
    assert len({*seen[44:]}) == 4
    assert next(data.batches(eleven, 11, seed=6))["index"].tolist() != epochs[0]
    large = next(data.batches(eleven, 25))   # 25 = 2 * 11 + 3
    assert sorted(torch.bincount(large["index"]).tolist()) == 8 * [2] + 3 * [3]
    assert large["y"].tolist() == [int(index >= 5) for index in large["index"]]
    assert_close(data.to_uint8(large["x"]), large["pixels"], **EXACT)


def test_two_ranks_see_what_one_sees(eleven):
    whole = first(data.batches(eleven, 6, seed=2), 5)
    parts = [first(data.batches(eleven, 6, 2, rank=rank, world=2), 5)
             for rank in range(2)]
    for k, batch in enumerate(whole):
        for rank, key in itertools.product(range(2), ("x", "y", "index")):
            assert_close(parts[rank][k][key], batch[key][rank::2], **EXACT)
    assert "multiple" in one_line(next, data.batches(eleven, 5, world=2))


@pytest.mark.parametrize("name", ["folder", "shapes"])
def test_workers_change_nothing(eleven, name):
    dataset = eleven if name == "folder" else data.Shapes(16, "train")
    state = torch.get_rng_state()
    alone, helped = (first(data.batches(dataset, 4, workers=n), 6) for n in (0, 2))
    for a, b in zip(alone, helped, strict=True):
        assert_same(a, b)
    assert_close(torch.get_rng_state(), state, **EXACT)


def test_resume_is_the_tail_of_an_uninterrupted_run(eleven):
    whole = first(data.batches(eleven, 4, seed=9), 9)
    tail = first(data.batches(eleven, 4, seed=9, start=4), 5)
    for a, b in zip(whole[4:], tail, strict=True):
        assert_same(a, b)


@pytest.mark.parametrize("world, workers", [(1, 0), (3, 0), (3, 2), (20, 0)])
def test_once_covers_exactly(eleven, world, workers):
    seen = []
    for rank in range(world):
        parts = list(data.once(eleven, 4, rank, world, workers))
        assert all(len(part["index"]) == 4 for part in parts[:-1])
        for part in parts:
            for x, index, y in zip(part["pixels"], part["index"], part["y"]):
                image, label = eleven[int(index)]
                assert_close(x, image, **EXACT)
                assert y == label
                seen.append(int(index))
    assert sorted(seen) == list(range(11))


def test_once_with_a_limit(eleven):
    limited = [int(i) for part in data.once(eleven, 2, limit=4) for i in part["index"]]
    assert limited == [0, 2, 5, 8]   # floor(k * 11 / 4)
    assert sum(len(part["y"]) for part in data.once(eleven, 4, limit=50)) == 11


# ------------------------------------------------------------------------------
# Files that are not what they seem.


def damage(root: Path) -> set[str]:
    """Four files that cannot be read, among them the first and the last one."""
    noise(64, 64).save(root / "bb/zzz.jpg")
    whole = (root / "bb/zzz.jpg").read_bytes()
    (root / "bb/zzz.jpg").write_bytes(whole[:len(whole) // 2])
    (root / "a/000.png").write_bytes(b"")
    (root / "a/003.png").write_bytes(b"this is a page of text, not an image\n" * 20)
    noise(8, 8).save(root / "bb/004.png", "GIF")   # a format that was not asked for
    names = "a/000.png", "a/003.png", "bb/004.png", "bb/zzz.jpg"
    return {str(root / name) for name in names}


@pytest.mark.parametrize("workers", [0, 2])
def test_unreadable_files_are_named_and_left_out(tmp_path, workers):
    make_folder(tmp_path, {"a": 5, "bb": 6})
    bad, dataset = damage(tmp_path), data.open_dataset(str(tmp_path), 8, "train")
    readable = [1, 2, 4, 5, 6, 7, 8, 10]
    for parts in (first(data.batches(dataset, 6, workers=workers), 2),   # 12 files: one epoch
                  list(data.once(dataset, 4, workers=workers))):
        assert sorted(name for part in parts for name in part["skipped"]) == sorted(bad)
        assert sorted(int(i) for part in parts for i in part["index"]) == readable
        for part in parts:
            assert len({len(part[key]) for key in ("x", "y", "index", "pixels")}) == 1
            assert part["y"].tolist() == [int(index >= 5) for index in part["index"]]
    # Those that are left are cropped and flipped as if no file had been damaged.
    make_folder(tmp_path / "whole", {"a": 5, "bb": 7})
    whole = data.open_dataset(str(tmp_path / "whole"), 8, "train")
    for a, b in first(zip(data.batches(dataset, 6), data.batches(whole, 6)), 2):
        kept = torch.isin(b["index"], a["index"])
        assert_close(a["x"], b["x"][kept], **EXACT)


def test_a_disk_that_goes_away_ends_in_one_line(tmp_path):
    dataset = opened(tmp_path, {"a": 3})
    for file in (tmp_path / "a").iterdir():
        file.unlink()
    for workers in (0, 1):
        assert "a/00" in one_line(next, data.batches(dataset, 2, workers=workers))
    assert "000.png" in one_line(dataset.__getitem__, 0)


@pytest.mark.parametrize("mode, ending", [
    ("L", "png"), ("P", "png"), ("I;16", "png"), ("CMYK", "jpg"), ("RGBA", "webp")])
def test_every_mode_is_read_as_rgb(tmp_path, mode, ending):
    # The left half is a dark red and the right one a light green.
    pixels = np.zeros((16, 16, 3), dtype=np.uint8)
    pixels[:, :8], pixels[:, 8:] = (120, 10, 20), (160, 240, 170)
    image = Image.fromarray(pixels)
    if mode == "I;16":
        image = Image.fromarray(np.asarray(image.convert("L")).astype(np.uint16) * 257)
    else:
        image = image.quantize(4) if mode == "P" else image.convert(mode)
    options = {} if ending == "png" else {"quality": 95}
    image.save(tmp_path / f"image.{ending}", **options)
    seen, _ = data.open_dataset(str(tmp_path), 16, "train")[0]
    expected = pixels.transpose(2, 0, 1).astype(float)
    if mode in ("L", "I;16"):
        weights = np.array([0.299, 0.587, 0.114])
        expected[:] = np.tensordot(weights, expected, 1)
    difference = abs(seen.numpy() - expected)
    assert difference[:, :, :6].max() < 14 and difference[:, :, 10:].max() < 14


# ------------------------------------------------------------------------------
# Opening by name.


def refusal(name, split: str = "train", **keywords) -> str:
    return one_line(data.open_dataset, name, 8, split, **keywords)


def test_what_is_not_a_data_set(tmp_path):
    assert "neither shapes nor cifar10 nor a folder" in refusal("imagnet")
    (tmp_path / "empty").mkdir()
    assert ".webp" in refusal(str(tmp_path / "empty"))
    (tmp_path / "arrays/a").mkdir(parents=True)
    np.save(tmp_path / "arrays/a/0.npy", np.zeros(3))
    assert "['a']" in refusal(str(tmp_path / "arrays"))
    make_folder(tmp_path / "deep", {"images/a": 1})
    assert "['images']" in refusal(str(tmp_path / "deep"))


def test_train_and_val_folders(tmp_path, capsys):
    counts = {"train/b": 2, "train/a": 1, "train/.cache": 3, "val/b": 3}
    root = make_folder(tmp_path, counts)
    train, val = (data.open_dataset(root, 8, split) for split in ("train", "val"))
    assert train.classes == val.classes == ["a", "b"]
    assert train.labels([0, 1, 2]).tolist() == [0, 1, 1]
    assert val.labels([0, 1, 2]).tolist() == [1, 1, 1]
    assert val.note == "" and capsys.readouterr().err == ""
    make_folder(tmp_path, {"val/zebra": 1})
    assert "zebra" in refusal(root, split="val")
    os.rename(tmp_path / "val", tmp_path / "test")
    os.rename(tmp_path / "train", tmp_path / "elsewhere")
    (tmp_path / "elsewhere").rename(tmp_path.parent / "elsewhere")
    assert "no train/" in refusal(root)


def test_without_a_val_folder_val_is_train_and_says_so(tmp_path, capsys):
    root = make_folder(tmp_path, {"b": 2, "a": 1, "train": 1})   # a class of this name
    train = data.open_dataset(root, 8, "train")
    assert train.classes == ["a", "b", "train"] and len(train) == 4
    assert capsys.readouterr().err == ""
    val = data.open_dataset(root, 8, "val")
    assert len(val) == 4 and val.note and val.note in capsys.readouterr().err


def test_loose_images_and_given_classes(tmp_path):
    root = make_folder(tmp_path, {"faces": 3}, size=(5, 6))
    flat = data.open_dataset(root + "/faces", 8, "train")
    assert flat.classes == ["faces"] and len(flat) == 3 and flat[2][1] == 0
    assert flat[0][0].shape == (3, 8, 8)   # it was smaller
    given = data.open_dataset(root, 8, "train", classes=["cats", "faces"])
    assert given.classes == ["cats", "faces"] and given[0][1] == 1
    assert "faces" in refusal(root, classes=["cats", "dogs"])
    assert "and has none" in refusal(root + "/faces", classes=["cats", "dogs"])


def test_cifar10(tmp_path, monkeypatch):
    class Fake:
        classes, targets = ["plane", "car"], [0, 1, 1, 0]

        def __init__(self, root: str, train: bool, download: bool) -> None:
            if "away" in root:
                raise OSError("no route\nto host")
            self.data = np.full((4, 32, 32, 3), 7 if train else 9, dtype=np.uint8)

    monkeypatch.setattr(data.torchvision.datasets, "CIFAR10", Fake)
    assert "no route to host" in refusal("cifar10", root="away")
    for split, value in (("train", 7), ("val", 9)):
        image, label = data.open_dataset("cifar10", 16, split)[1]
        assert image.shape == (3, 16, 16) and (image == value).all() and label == 1


# ------------------------------------------------------------------------------
# Images to be scored.


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
@pytest.mark.parametrize("order", ["C", "F"])
def test_arrays_of_an_npz(save, order, tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (7, 8, 8, 3), dtype=np.uint8)
    array = np.asarray(pixels, order=order)
    save(tmp_path / "samples.npz", other=np.zeros(3), arr_0=array)
    images = data.open_images(str(tmp_path / "samples.npz"))
    assert (len(images), images.size) == (7, 8)
    assert isinstance(images.pixels, np.memmap) == (save is np.savez)
    seen = torch.cat([part["pixels"] for part in data.once(images, 3)])
    np.testing.assert_array_equal(seen.permute(0, 2, 3, 1).numpy(), pixels)


@pytest.mark.parametrize("kind, reason", [
    ("truncated", "no .npz"), ("text", "no .npz"), ("missing", "No such file"),
    ("no arr_0", "arr_0"), ("float", "float32"), ("grey", "[2, 8, 8]"),
    ("wide", "[2, 8, 6, 3]")])
def test_an_npz_without_images_ends_in_one_line(kind, reason, tmp_path):
    path, good = tmp_path / "samples.npz", np.zeros((2, 8, 8, 3), dtype=np.uint8)
    bad = {"float": good.astype(np.float32), "grey": good[..., 0],
           "wide": good[:, :, :6]}
    np.savez(path, **{"images" if kind == "no arr_0" else "arr_0": bad.get(kind, good)})
    if kind == "truncated":
        path.write_bytes(path.read_bytes()[:-200])
    if kind == "text":
        path.write_text("arr_0")
    if kind == "missing":
        path.unlink()
    said = one_line(data.open_images, str(path))
    assert reason in said and str(path) in said


@pytest.mark.parametrize("kind, reason", [
    ("mixed", "(16, 16)"), ("empty", "none"), ("wide", "(16, 8)"), ("broken", "extra.png")])
def test_a_folder_of_samples_is_taken_as_it_is(kind, reason, tmp_path):
    folder = make_folder(tmp_path, {"a": 0 if kind == "empty" else 3})
    if kind != "empty":
        assert data.open_images(folder).size == 8 and len(data.open_images(folder)) == 3
    if kind in ("mixed", "wide"):
        image = Image.new("RGB", (16, 16 if kind == "mixed" else 8))
        image.save(tmp_path / "a/extra.png")
    if kind == "broken":
        (tmp_path / "a/extra.png").write_bytes(b"not a picture")
    assert reason in one_line(data.open_images, folder)
    if kind in ("mixed", "wide"):
        assert len(data.open_images(folder, 8)) == 4   # but all can be cropped to one size


# ------------------------------------------------------------------------------
# Latents.  The tokenizer of these tests is one fixed convolution to mean and
# deviation, 2 x 2 x 2 of 8 x 8 pixels.  Its kernel is not symmetric, so that a
# mirrored latent is not the latent of the mirror image.  Caches are hidden folders,
# which are no classes.

WEIGHT = torch.randn(4, 3, 4, 4, generator=torch.Generator().manual_seed(1)) / 4
KEY = {"tokenizer": "a" * 64}


class Encoder:
    """encode() with a count of the images it has seen, of which `limit` are allowed."""

    def __init__(self, limit: float = float("inf"), scale: float = 1.0) -> None:
        self.seen, self.limit, self.scale = 0, limit, scale

    def __call__(self, x: Tensor) -> tuple[Tensor, Tensor]:
        assert x.dtype == torch.float32 and x.shape[1:] == (3, 8, 8)
        self.seen += len(x)
        assert self.seen <= self.limit
        mean, std = conv2d(x, self.scale * WEIGHT, stride=4).chunk(2, 1)
        return mean, 0.1 + 0.3 * std.sigmoid()


@pytest.fixture
def chunks_of_three(monkeypatch) -> None:
    monkeypatch.setattr(data, "CHUNK", 3)


def direct(dataset: data.Folder, index: int, flipped: bool) -> tuple:
    """Mean and deviation [C, h, w] of one image as dataset[index] reads it."""
    x = dataset[index][0].float() / 127.5 - 1
    mean, std = Encoder()(x[None].flip(3) if flipped else x[None])
    return mean[0], std[0]


def contents(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.rglob("*") if file.is_file()}


@pytest.mark.parametrize("workers", [0, 2])
def test_cached_latents_are_those_of_the_images(eleven, tmp_path,
                                                workers, chunks_of_three):
    latents = data.cache_latents(tmp_path / ".cache", eleven, Encoder(), KEY, 2,
                                 workers=workers)
    assert len(latents) == 11 and tuple(latents.shape) == (2, 2, 2)
    assert latents.skipped == [] and latents.classes == ["a", "bb"]
    seen = set()
    for batch in first(data.latent_batches(latents, 4, seed=3), 20):
        assert batch["mean"].dtype == batch["std"].dtype == torch.float32
        assert batch["y"].dtype == batch["index"].dtype == torch.int64
        for mean, std, y, index, flipped in zip(*batch.values(), strict=True):
            expected = direct(eleven, int(index), bool(flipped))
            assert_close((mean, std), expected, rtol=1.01 * 2**-11, atol=1e-6)
            assert y == int(index >= 5)
            seen.add((int(index), bool(flipped)))
    assert len(seen) == 22   # 80 draws of 22: all have been compared


def test_statistics_are_exact(eleven, tmp_path, chunks_of_three):
    latents = data.cache_latents(tmp_path / ".cache", eleven, Encoder(), KEY, 2)
    both = [direct(eleven, index, flipped) for index in range(11)
            for flipped in (False, True)]
    mean, std = (torch.stack(part).half().double() for part in zip(*both))   # [22, C, h, w]
    centre = torch.stack([mean[:, c].mean() for c in range(2)])
    spread = torch.stack([(mean[:, c] - centre[c]).square().mean() for c in range(2)])
    noise = torch.stack([std[:, c].square().mean() for c in range(2)])
    assert (noise > 0.02 * spread).all()   # else the answers would be the same
    for latent, variance in (("mean", spread), ("sample", spread + noise)):
        expected = centre.float(), variance.sqrt().float()
        assert_close(latents.statistics(latent), expected, rtol=1e-4, atol=1e-6)


def test_latent_batches_are_those_of_the_images(tmp_path):
    dataset = opened(tmp_path / "images", {"a": 5, "b": 6})
    latents = data.cache_latents(tmp_path / ".cache", dataset, Encoder(), KEY, 4)
    whole = first(data.latent_batches(latents, 4, seed=5), 12)
    for ours, images in zip(whole, data.batches(dataset, 4, seed=5), strict=False):
        for key in ("index", "y"):
            assert_close(ours[key], images[key], **EXACT)
        expected = Encoder()(images["x"])
        assert_close((ours["mean"], ours["std"]), expected, rtol=1e-3, atol=1e-6)
    half = [first(data.latent_batches(latents, 4, 5, 7, rank, 2), 5)
            for rank in range(2)]
    for k, batch in enumerate(whole[7:]):
        for rank, (name, value) in itertools.product(range(2), batch.items()):
            assert_close(half[rank][k][name], value[rank::2], **EXACT)


def test_a_finished_cache_is_only_opened(eleven, tmp_path):
    cache, encoder = tmp_path / ".cache", Encoder()
    data.cache_latents(cache, eleven, encoder, KEY, 4)
    before = contents(cache)
    assert encoder.seen == 2 * 11 and sorted(before) == ["00000000.json", "00000000.npy"]
    for path in (*cache.rglob("*"), cache):
        path.chmod(0o555 if path.is_dir() else 0o444)
    try:
        again = data.cache_latents(cache, eleven, Encoder(limit=0), KEY, 4)
        assert len(next(data.latent_batches(again, 4, seed=0))["mean"]) == 4
    finally:
        for path in (cache, *cache.rglob("*")):
            path.chmod(0o755)
    assert contents(cache) == before


def of_two(rank: int, folder: str, images: str, barrier, limit: int) -> None:
    """One process of two; rank 1 is killed when it has encoded `limit` images."""
    class Fatal(Encoder):
        def __call__(self, x: Tensor) -> tuple[Tensor, Tensor]:
            if rank == 1 and self.seen >= limit:
                os.kill(os.getpid(), signal.SIGKILL)
            return super().__call__(x)

    dataset = data.open_dataset(images, 8, "train")
    latents = data.cache_latents(folder, dataset, Fatal(), KEY, 2, rank, 2,
                                 barrier=lambda: barrier.wait(20))
    assert len(latents) == 11


@pytest.mark.parametrize("then", [1, 2])
def test_a_killed_run_goes_on_with_any_number_of_processes(
        eleven, tmp_path, then, chunks_of_three):
    # Chunks of 3, 3, 3 and 2 images, of which rank 1 has the second and the fourth.
    # It sees 6 images of the second, with the mirror images, and 2 of the fourth.
    data.cache_latents(tmp_path / ".whole", eleven, Encoder(), KEY, 2)
    context = torch.multiprocessing.get_context("fork")

    def run(limit: int) -> list[int]:
        barrier = context.Barrier(2)
        flags = str(tmp_path / ".cache"), eleven.folder, barrier, limit
        processes = [context.Process(target=of_two, args=(rank, *flags))
                     for rank in range(2)]
        for process in processes:
            process.start()
        processes[1].join(30)
        if processes[1].exitcode:
            barrier.abort()
        processes[0].join(30)
        return [process.exitcode for process in processes]

    assert run(8) == [1, -signal.SIGKILL]
    files = sorted(file.name for file in (tmp_path / ".cache").rglob("*.json"))
    assert files == ["00000000.json", "00000003.json", "00000006.json"]
    if then == 1:
        encoder = Encoder()
        data.cache_latents(tmp_path / ".cache", eleven, encoder, KEY, 2)
        assert encoder.seen == 4
    else:
        assert run(1000) == [0, 0]
    assert contents(tmp_path / ".cache") == contents(tmp_path / ".whole")


def test_a_mark_follows_its_latents(eleven, tmp_path, monkeypatch,
                                    chunks_of_three):
    replace, renamed = os.replace, []

    def seen_replace(source: Path, target: Path) -> None:
        renamed.append(target.name)
        replace(source, target)

    monkeypatch.setattr(os, "replace", seen_replace)
    data.cache_latents(tmp_path / ".cache", eleven, Encoder(), KEY, 2)
    assert renamed == [f"{start:08d}.{kind}" for start in (0, 3, 6, 9)
                       for kind in ("npy", "json")]


def test_other_images_or_another_tokenizer_are_another_cache(
        eleven, tmp_path):
    cache, encoder, key = tmp_path / ".cache", Encoder(), dict(KEY)
    changes = [
        lambda: None, lambda: key.update(tokenizer="b" * 64),
        lambda: noise(8, 11, seed=77).save(eleven.name_of(4)),
        lambda: os.utime(eleven.name_of(4), (1, 1)),
        lambda: (tmp_path / "a/000.png").rename(tmp_path / "a/0000.png")]
    for number, change in enumerate(changes, 1):
        change()
        for _ in range(2):   # the second time it is there
            dataset = data.open_dataset(str(tmp_path), 8, "train")
            data.cache_latents(cache, dataset, encoder, key, 4)
            assert encoder.seen == 22 * number and len(list(cache.iterdir())) == number
    for name in ("a", "bb"):   # copytree keeps the times
        shutil.copytree(tmp_path / name, tmp_path / "copy" / name)
    moved, large = (data.open_dataset(str(tmp_path / "copy"), size, "train")
                    for size in (8, 16))
    data.cache_latents(cache, moved, Encoder(limit=0), key, 4)
    others = [large, data.Shapes(16, "train", 0), data.Shapes(16, "train", 1),
              data.Shapes(32, "train", 0), data.Shapes(16, "val", 0)]
    for value, target in ((0, 0), (1, 0), (0, 1)):
        cifar = data.Cifar10.__new__(data.Cifar10)
        pixels = np.full((2, 32, 32, 3), value, np.uint8)
        data.Pictures.__init__(cifar, "cifar10", 32, "train", ["plane", "car"],
                               np.array([target, 1]), pixels)
        others.append(cifar)
    for value in (0, 1):
        np.savez(tmp_path / f"{value}.npz", np.full((2, 8, 8, 3), value, np.uint8))
        others.append(data.open_images(str(tmp_path / f"{value}.npz")))
    assert len({*map(data.fingerprint, (moved, *others))}) == 11


def test_unreadable_images_have_no_latents(tmp_path, monkeypatch):
    make_folder(tmp_path / "images", {"a": 5, "bb": 6})
    bad = damage(tmp_path / "images")
    monkeypatch.setattr(data, "CHUNK", 5)
    dataset = data.open_dataset(str(tmp_path / "images"), 8, "train")
    latents = data.cache_latents(tmp_path / ".cache", dataset, Encoder(), KEY, 3)
    assert sorted(latents.skipped) == sorted(bad) and len(latents) == 8
    parts = first(data.latent_batches(latents, 4, seed=0), 4)
    seen = torch.cat([part["index"] for part in parts]).tolist()
    assert sorted(seen) == sorted(2 * [1, 2, 4, 5, 6, 7, 8, 10])
    for part in parts:
        assert part["y"].tolist() == [int(index >= 5) for index in part["index"]]
        for mean, index, flipped in zip(part["mean"], part["index"], part["flipped"]):
            expected, _ = direct(dataset, int(index), bool(flipped))
            assert_close(mean, expected, rtol=1e-3, atol=1e-6)
    mean = [direct(dataset, index, flipped)[0] for index in seen[:8]
            for flipped in (False, True)]
    expected = torch.stack(mean).half().double().mean((0, 2, 3)).float()
    assert_close(latents.statistics("mean")[0], expected, rtol=1e-4, atol=1e-6)


def test_no_room_and_no_numbers_end_in_one_line(eleven, tmp_path,
                                                monkeypatch):
    cache, key = tmp_path / ".cache", {"tokenizer": "b" * 64}
    said = one_line(data.cache_latents, cache, eleven, Encoder(scale=1e6), key, 4)
    assert "beyond fp16" in said and not contents(cache)

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    said = one_line(data.cache_latents, cache, eleven, Encoder(), KEY, 4)
    assert "No space left" in said and not contents(cache)
    monkeypatch.undo()
    assert len(data.cache_latents(cache, eleven, Encoder(), KEY, 4)) == 11


# ------------------------------------------------------------------------------
# LightningDiT's latents.


def write_shard(path: Path, tensors: dict[str, Tensor]) -> None:
    """The layout of safetensors: the length of the header, the header, the bytes."""
    names = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16",
             torch.int64: "I64"}
    header, body = {"__metadata__": {"total_size": "5"}}, b""
    for name, tensor in tensors.items():
        raw = tensor.contiguous().view(torch.uint8).numpy().tobytes()
        header[name] = {"dtype": names[tensor.dtype], "shape": list(tensor.shape),
                        "data_offsets": [len(body), len(body) + len(raw)]}
        body += raw
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    path.write_bytes(struct.pack("<Q", len(text)) + text + body)


def shard(n: int, seed: int, dtype=torch.float32) -> dict[str, Tensor]:
    draws = torch.Generator().manual_seed(seed)
    latents, flip = (torch.randn(n, 2, 3, 3, generator=draws).mul(3).add(seed).to(dtype)
                     for _ in range(2))
    return {"labels": torch.arange(n) % 4, "latents": latents, "latents_flip": flip}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_latents_of_lightningdit(tmp_path, dtype: torch.dtype):
    shards = [shard(5, 0, dtype), shard(2, 1, dtype), shard(6, 2, dtype)]
    for i, tensors in enumerate(shards):
        write_shard(tmp_path / f"latents_rank00_shard00{i}.safetensors", tensors)
    whole = {key: torch.cat([tensors[key] for tensors in shards]) for key in shards[0]}
    stored = {"mean": torch.randn(1, 2, 1, 1), "std": torch.rand(1, 2, 1, 1) + 0.1}
    torch.save(stored, tmp_path / "latents_stats.pt")
    latents = data.open_lightningdit_latents(tmp_path)
    assert len(latents) == 13 and tuple(latents.shape) == (2, 3, 3)
    assert latents.classes == ["0", "1", "2", "3"]
    seen = []
    for batch in first(data.latent_batches(latents, 4, seed=2), 13):
        flipped, index = batch["flipped"][:, None, None, None], batch["index"]
        expected = torch.where(flipped, whole["latents_flip"][index],
                               whole["latents"][index])
        assert_close(batch["mean"], expected.float(), **EXACT)
        assert_close(batch["y"], whole["labels"][index], **EXACT)
        assert_close(batch["std"], torch.zeros_like(batch["mean"]), **EXACT)
        seen += index.tolist()
    assert all(sorted(seen[i:i + 13]) == list(range(13)) for i in range(0, 52, 13))
    for latent in ("mean", "sample"):
        expected = stored["mean"].flatten(), stored["std"].flatten()
        assert_close(latents.statistics(latent), expected, rtol=1e-6, atol=0)


GOOD = shard(4, 0)
WRONG = {
    "absent": {k: v for k, v in GOOD.items() if k != "latents_flip"},
    "labels": GOOD | {"labels": torch.arange(3)},
    "negative": GOOD | {"labels": torch.arange(4) - 1},
    "real": GOOD | {"labels": torch.rand(4)},
    "flat": GOOD | {k: torch.zeros(4, 18) for k in ("latents", "latents_flip")},
    "flip": GOOD | {"latents_flip": GOOD["latents_flip"][:, :1]},
    "bf16": shard(4, 0, torch.bfloat16),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_shards_end_in_one_line(tmp_path, name):
    write_shard(tmp_path / "latents_rank00_shard000.safetensors", shard(4, 1))
    write_shard(tmp_path / "latents_rank00_shard001.safetensors", WRONG[name])
    assert "shard001" in one_line(data.open_lightningdit_latents, tmp_path)


def test_no_shards_and_other_statistics_end_in_one_line(tmp_path):
    assert "no *.safetensors" in one_line(data.open_lightningdit_latents, tmp_path)
    write_shard(tmp_path / "latents_rank00_shard000.safetensors", shard(4, 1))
    assert "latents_stats.pt" in one_line(data.open_lightningdit_latents, tmp_path)
    three = torch.ones(1, 3, 1, 1)
    for stored in ({"mean": three, "std": three}, {"mu": 0}):
        torch.save(stored, tmp_path / "latents_stats.pt")
        assert "latents_stats.pt" in one_line(data.open_lightningdit_latents, tmp_path)
