"""Data: the shapes, the ADM crop against a slow oracle, the order of batches, files
that cannot be read, arrays of an .npz, and the cache of latents."""

import gc
import itertools
import json
import os
import shutil
import signal
import socket
import struct
import subprocess
import sys
import tarfile
import time
import warnings
import zipfile
import zlib
from collections import Counter
from pathlib import Path

import data
import numpy as np
import pytest
import runtime
import torch
from PIL import EpsImagePlugin, Image
from runtime import InputError
from studies import cifar_subset
from torch import Tensor
from torch.nn.functional import avg_pool2d, conv2d
from torch.testing import assert_close

EXACT = {"rtol": 0, "atol": 0}
FORK = torch.multiprocessing.get_context("fork")
SUBSET = Path(__file__).parents[1] / "../shared/data/cifar10_subset.tar.gz"


@pytest.fixture(autouse=True)
def locks_end_with_a_test():
    yield
    runtime.finish()


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
    x = torch.tensor([-1, 1, 0, -0.2, 0.5, 0.502, 1.5, -7])
    assert data.to_uint8(x).tolist() == [0, 255, 128, 102, 191, 192, 255, 0]
    every = torch.arange(256, dtype=torch.uint8)
    assert_close(data.to_uint8(data.from_uint8(every)), every, **EXACT)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_an_image_that_is_not_finite_is_no_image(value, dtype):
    x = torch.zeros(2, 3, 4, 4, dtype=dtype)
    assert (data.to_uint8(x) == 128).all()
    x[1, 2, 3, 3] = value
    assert "NaN or infinity" in one_line(data.to_uint8, x)


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


def test_once_without_x(eleven):
    for part, whole in zip(data.once(eleven, 4, x=False), data.once(eleven, 4), strict=True):
        assert "x" not in part and "x" in whole
        assert_same(part | {"x": whole["x"]}, whole)


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
    noise(8, 8).save(root / "bb/004.png", "PPM")   # a format that was not asked for
    names = "a/000.png", "a/003.png", "bb/004.png", "bb/zzz.jpg"
    return {str(root / name) for name in names}


@pytest.mark.parametrize("workers", [0, 2])
def test_unreadable_files_are_named_and_left_out(tmp_path, workers):
    make_folder(tmp_path, {"a": 5, "bb": 6})
    bad, dataset = damage(tmp_path), data.open_dataset(str(tmp_path), 8, "train")
    readable = [1, 2, 4, 5, 6, 7, 8, 10]
    training = first(data.batches(dataset, 6, workers=workers), 2)   # 12 files: one epoch
    for parts in (training, list(data.once(dataset, 4, workers=workers))):
        assert sorted(name for part in parts for name in part["skipped"]) == sorted(bad)
        seen = [index for part in parts
                for index in part["index"].tolist()[:len(part["index"]) - len(part["skipped"])
                                                    if parts is training else None]]
        assert sorted(seen) == readable
        for part in parts:
            assert len({len(part[key]) for key in ("x", "y", "index", "pixels")}) == 1
            assert part["y"].tolist() == [int(index >= 5) for index in part["index"]]
    for part in training:   # the first of a batch take the places of those that are lost
        count = len(part["skipped"])
        assert len(part["index"]) == 6 and count
        assert torch.equal(part["index"][6 - count:], part["index"][:count])
        assert torch.equal(part["x"][6 - count:], part["x"][:count])
    # Those that are left are cropped and flipped as if no file had been damaged.
    make_folder(tmp_path / "whole", {"a": 5, "bb": 7})
    whole = data.open_dataset(str(tmp_path / "whole"), 8, "train")
    for a, b in first(zip(data.batches(dataset, 6), data.batches(whole, 6)), 2):
        kept = torch.isin(b["index"], a["index"])
        assert_close(a["x"][:kept.sum()], b["x"][kept], **EXACT)


def png(width: int, height: int, *chunks: bytes) -> bytes:
    """A PNG of this size, and of colour, with these chunks."""
    head = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(chunk) - 4) + chunk + struct.pack(">I", zlib.crc32(chunk))
        for chunk in (head, *chunks, b"IEND"))


def snare(path: Path, kind: str) -> None:
    """What is named as an image, and would hang, fill the memory, or run a program."""
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "device":
        path.symlink_to("/dev/zero")
    elif kind == "socket":
        with socket.socket(socket.AF_UNIX) as server:
            here = os.getcwd()
            os.chdir(path.parent)   # as a socket's path may have 107 bytes at most
            server.bind(path.name)
            os.chdir(here)
    elif kind == "folder":
        path.symlink_to(path.parent)
    elif kind == "gone":
        path.symlink_to("nowhere")
    elif kind == "wide":
        Image.new("RGB", (8 * data.ASPECT + 1, 8)).save(path)
    elif kind == "tall":
        Image.new("1", (1, 2_000_000)).save(path)
    elif kind == "large":
        Image.new("1", (8001, 8000)).save(path)   # 64 million and 8000 pixels
    elif kind == "bomb":
        path.write_bytes(png(10_000, 10_000, b"IDAT"))   # of which Pillow warns
    elif kind == "huge":
        path.write_bytes(png(2**31 - 1, 2**31 - 1, b"IDAT"))   # which it refuses
    elif kind == "text":   # 100 MB of it
        packed = b"zTXtkey\0\0" + zlib.compress(bytes(100_000_000))
        path.write_bytes(png(8, 8, packed, b"IDAT" + zlib.compress(bytes(8 * 25))))


SNARES = ("pipe", "device", "socket", "gone", "wide", "tall", "large", "bomb", "huge", "text")


@pytest.mark.parametrize("kind", SNARES)
def test_an_image_that_would_hang_or_fill_the_memory_is_left_out(tmp_path, kind):
    folder = make_folder(tmp_path, {"a": 2})
    snare(tmp_path / "a/009.png", kind)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        for size in (8, None):   # without a size their headers are read first
            part, = data.once(data.open_images(folder, size), 4)
            assert part["index"].tolist() == [0, 1]
            assert part["skipped"] == [str(tmp_path / "a/009.png")]
    assert not said


def test_images_at_the_bounds_are_read(tmp_path, monkeypatch):
    monkeypatch.setattr(data, "PIXELS", 16 * 800)
    Image.new("RGB", (16, 16 * data.ASPECT)).save(tmp_path / "0.png")   # 12,800 pixels
    assert data.open_dataset(str(tmp_path), 8, "train")[0][0].shape == (3, 8, 8)
    monkeypatch.setattr(data, "PIXELS", 16 * 800 - 1)
    assert "0.png" in one_line(data.open_dataset(str(tmp_path), 8, "train").__getitem__, 0)


@pytest.mark.skipif(os.name == "nt", reason="a shell script stands for Ghostscript")
def test_an_eps_named_png_runs_nothing(tmp_path, monkeypatch):
    marker, program = tmp_path / "marker", tmp_path / "bin/gs"
    program.parent.mkdir()
    program.write_text(f"#!/bin/sh\ntouch {marker}\nexit 1\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(program.parent), prepend=os.pathsep)
    monkeypatch.setattr(EpsImagePlugin, "gs_binary", None)   # it is looked for once
    make_folder(tmp_path, {"images": 1}, size=(8, 8))
    eps = tmp_path / "images/009.png"
    noise(8, 8).save(eps, "EPS")
    with pytest.raises(subprocess.CalledProcessError), Image.open(eps) as image:
        image.load()
    assert marker.exists()   # the danger is real
    marker.unlink()
    for size in (8, None):
        part, = data.once(data.open_images(str(tmp_path / "images"), size), 4)
        assert part["skipped"] == [str(eps)]
    assert not marker.exists()


def test_a_reader_that_is_killed_ends_in_one_line(monkeypatch):
    read = torch.utils.data.dataloader._MultiProcessingDataLoaderIter._try_get_data
    monkeypatch.setattr(read, "__defaults__", (0.2,))   # seconds between looks, of 5
    monkeypatch.setattr(torch.utils.data._utils, "MP_STATUS_CHECK_INTERVAL", 0.2)
    parts = data.batches(data.Shapes(8, "train"), 1, workers=2)
    next(parts)
    torch.multiprocessing.active_children()[0].kill()
    time.sleep(0.5)   # nothing happens while this process has other things to do
    assert "--workers" in one_line(list, parts)
    gc.collect()   # ends the other reader


READS = """
import multiprocessing, sys, time
import data
parts = data.batches(data.open_dataset(sys.argv[1], 8, "train"), 4, workers=2)
next(parts)
print(*[child.pid for child in multiprocessing.active_children()], flush=True)
time.sleep(60)
"""


def alive(pid: int) -> bool:
    """Whether it runs; one that has ended and waits for its parent does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="there is no /proc here")
def test_readers_ignore_ctrl_c_and_end_with_their_parent(eleven):
    parent = subprocess.Popen(
        [sys.executable, "-c", READS, eleven.name], stdout=subprocess.PIPE, text=True,
        env=os.environ | {"PYTHONPATH": str(Path(data.__file__).parent)})
    try:
        readers = [int(pid) for pid in parent.stdout.readline().split()]
        assert len(readers) == 2 and all(map(alive, readers))
        assert {os.getpgid(reader) for reader in readers}.isdisjoint({os.getpgid(parent.pid)})
        for reader in readers:
            os.kill(reader, signal.SIGINT)
    finally:
        time.sleep(0.2)
        still = [*map(alive, readers)]
        parent.kill()
        parent.wait()
    assert all(still)
    for _ in range(30):
        time.sleep(0.1)
        if not any(map(alive, readers)):
            break
    assert not any(map(alive, readers))


def test_a_disk_that_goes_away_ends_in_one_line(tmp_path):
    dataset = opened(tmp_path, {"a": 3})
    for file in (tmp_path / "a").iterdir():
        file.unlink()
    for workers in (0, 1):
        assert "a/00" in one_line(next, data.batches(dataset, 2, workers=workers))
    assert "000.png" in one_line(dataset.__getitem__, 0)


@pytest.mark.parametrize("mode, ending", [
    ("L", "png"), ("P", "png"), ("I;16", "png"), ("CMYK", "jpg"), ("RGBA", "webp"),
    ("RGB", "bmp"), ("P", "gif"), ("CMYK", "tif"), ("I;16", "TIFF")])
def test_every_mode_is_read_as_rgb(tmp_path, mode, ending):
    # The left half is a dark red and the right one a light green.
    pixels = np.zeros((16, 16, 3), dtype=np.uint8)
    pixels[:, :8], pixels[:, 8:] = (120, 10, 20), (160, 240, 170)
    image = Image.fromarray(pixels)
    if mode == "I;16":
        image = Image.fromarray(np.asarray(image.convert("L")).astype(np.uint16) * 257)
    else:
        image = image.quantize(4) if mode == "P" else image.convert(mode)
    options = {"quality": 95} if ending in ("jpg", "webp") else {}
    image.save(tmp_path / f"image.{ending}", **options)
    seen, _ = data.open_dataset(str(tmp_path), 16, "train")[0]
    expected = pixels.transpose(2, 0, 1).astype(float)
    if mode in ("L", "I;16"):
        weights = np.array([0.299, 0.587, 0.114])
        expected[:] = np.tensordot(weights, expected, 1)
    difference = abs(seen.numpy() - expected)
    assert difference[:, :, :6].max() < 14 and difference[:, :, 10:].max() < 14


def test_the_first_frame_of_a_gif_and_no_picture_without_a_white(tmp_path):
    frames = [Image.new("L", (8, 8), level) for level in (50, 200)]
    frames[0].save(tmp_path / "a.gif", save_all=True, append_images=frames[1:])
    Image.fromarray(np.ones((8, 8), np.float32)).save(tmp_path / "b.tif")
    Image.fromarray(np.ones((8, 8), np.int32)).save(tmp_path / "c.tif")
    part, = data.once(data.open_dataset(str(tmp_path), 8, "train"), 4)
    assert part["index"].tolist() == [0] and (part["pixels"] == 50).all()
    assert [Path(name).name for name in part["skipped"]] == ["b.tif", "c.tif"]


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


def test_loose_images_are_one_class(tmp_path):
    root = make_folder(tmp_path, {"faces": 3}, size=(5, 6))
    flat = data.open_dataset(root + "/faces", 8, "train")
    assert flat.classes == ["faces"] and len(flat) == 3 and flat[2][1] == 0
    assert flat[0][0].shape == (3, 8, 8)   # it was smaller


@pytest.mark.parametrize("name", ["val", "valid", "validation", "test"])
def test_held_out_images_without_labels(tmp_path, name):
    """The layout of ImageNet: train/CLASS/*.JPEG and val/*.JPEG."""
    root = make_folder(tmp_path, {"train/a": 2, "train/b": 1, name: 3})
    held_out = data.open_dataset(root, 8, "val")
    assert held_out.classes == ["a", "b"] and held_out.note == ""
    part, = data.once(held_out, 4)
    assert part["y"].tolist() == [-1, -1, -1] and held_out[0][1] == -1
    assert_close(held_out[1][0], next(held_out.read([1], [data.CENTRE])), **EXACT)
    assert data.summary(held_out) == f"{root}/{name} (val): 3 images, no labels"
    said = one_line(data.cache_latents, tmp_path / ".cache", held_out, Encoder(0), KEY, 4)
    assert "no labels" in said and not (tmp_path / ".cache").exists()


def test_which_folder_is_held_out(tmp_path):
    counts = {"train/a": 1, "valid/a": 1, "test/a": 2, "notes": 1}
    root = make_folder(tmp_path, counts)
    assert len(data.open_dataset(root, 8, "val")) == 1
    assert data.open_dataset(root, 8, "train").classes == ["a"]   # notes is no class
    os.rename(tmp_path / "valid", tmp_path / "val")
    os.rename(tmp_path / "val/a/000.png", tmp_path / "val/a/007.png")
    assert "007.png" in data.open_dataset(root, 8, "val").name_of(0)
    plain = make_folder(tmp_path / "plain", {"test": 1, "b": 1})   # a class of this name
    val = data.open_dataset(plain, 8, "val")
    assert val.classes == ["b", "test"] and "val is the same" in val.note
    one = make_folder(tmp_path / "one", {"train": 2, "val": 1})   # no classes at all
    assert [data.open_dataset(one, 8, split).labels([0]).item()
            for split in ("train", "val")] == [0, 0]


def test_a_summary_says_what_is_there_and_what_is_ignored(tmp_path):
    root = make_folder(tmp_path, {"train/a": 2, "train/b": 1, "train/b/deep": 1,
                                  "val/a": 1, "test/a": 1, "raw": 1})
    for name in ("train/0.png", "train/1.png", "2.png", "train/a/x.heic", "val/y.txt", "z.md",
                 "train/.hidden"):
        (tmp_path / name).write_bytes(b"")
    train, val = (data.open_dataset(root, 8, split) for split in ("train", "val"))
    assert data.summary(train) == (
        f"{root}/train (train): 3 images, 2 classes; ignored 2 files of other formats "
        "(z.md, x.heic); ignored 3 folders (raw, test, deep); ignored 3 images beside "
        "the folders (2.png, 0.png, 1.png)")
    assert data.summary(val) == (
        f"{root}/val (val): 1 images, 2 classes; ignored 2 files of other formats "
        "(z.md, y.txt); ignored 2 folders (raw, test); ignored 1 images beside "
        "the folders (2.png)")
    flat = data.open_dataset(root + "/val/a", 8, "train")
    assert data.summary(flat) == f"{root}/val/a (train): 1 images, 1 class"
    shapes = data.open_dataset("shapes", 8, "val")
    assert data.summary(shapes) == "shapes (val): 2,000 images, 10 classes"


@pytest.fixture
def cifar(monkeypatch) -> None:
    """Two classes in turns, of which image i has the value i + 7 or, held out, i + 9."""
    class Fake:
        classes, targets = ["plane", "car"], [0, 1, 1, 0]

        def __init__(self, root: str, train: bool, download: bool) -> None:
            if "away" in root:
                raise OSError("no route\nto host")
            levels = np.arange(4, dtype=np.uint8) + (7 if train else 9)
            self.data = np.broadcast_to(levels[:, None, None, None], (4, 32, 32, 3))

    monkeypatch.setattr(data.torchvision.datasets, "CIFAR10", Fake)


def test_cifar10(cifar):
    assert "no route to host" in refusal("cifar10", root="away")
    for split, value in (("train", 8), ("val", 10)):
        image, label = data.open_dataset("cifar10", 16, split)[1]
        assert image.shape == (3, 16, 16) and (image == value).all() and label == 1


def test_the_subset_of_cifar10_is_the_first_images_of_each_class(
        cifar, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(cifar_subset, "COUNTS", {"train": 2, "val": 1})
    cifar_subset.main(["--out", str(tmp_path / "new/subset")])
    found = {str(file.relative_to(tmp_path / "new/subset")): np.asarray(Image.open(file))
             for file in (tmp_path / "new").rglob("*.jpg")}
    # JPEG of quality 75 keeps the level of a plain image.
    assert {name: {*image.flat} for name, image in found.items()} == {
        "train/plane/0000.jpg": {7}, "train/plane/0001.jpg": {10}, "train/car/0000.jpg": {8},
        "train/car/0001.jpg": {9}, "val/plane/0000.jpg": {9}, "val/car/0000.jpg": {10}}
    assert os.listdir(tmp_path / "new") == ["subset"]   # no temporary folder
    with pytest.raises(SystemExit) as stop:
        cifar_subset.main(["--out", str(tmp_path / "new/subset")])
    assert stop.value.code == 2 and "there already" in capsys.readouterr().err


@pytest.mark.skipif(not SUBSET.exists(), reason=f"{SUBSET} is not here")
def test_the_subset_has_the_jpeg_settings_of_ours(tmp_path):
    """What comes before the pixels: tables of quality 75, and the sampling of colour.

    Decoding and encoding again gives the same bytes for 3 of 5 images.
    """
    equal = []
    with tarfile.open(SUBSET) as archive:
        counts = Counter(name.split("/")[1] for name in archive.getnames())
        assert counts == {split: 10 * n for split, n in cifar_subset.COUNTS.items()}
        for entry in archive.getmembers()[:20]:
            theirs = archive.extractfile(entry).read()
            (tmp_path / "theirs.jpg").write_bytes(theirs)
            pixels = np.asarray(Image.open(tmp_path / "theirs.jpg"))[None]
            images = data.Pictures("", 32, "train", ["a"], np.zeros(1, int), pixels)
            cifar_subset.write(images, 1, tmp_path / entry.name)
            ours = (tmp_path / entry.name / "a/0000.jpg").read_bytes()
            scan = ours.index(b"\xff\xda")   # where the pixels begin
            assert ours[:scan] == theirs[:scan]
            equal.append(ours == theirs)
    assert sum(equal) > 5


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
    assert isinstance(images.pixels.base, np.memmap) == (save is np.savez)
    seen = torch.cat([part["pixels"] for part in data.once(images, 3)])
    np.testing.assert_array_equal(seen.permute(0, 2, 3, 1).numpy(), pixels)


@pytest.mark.parametrize("kind, reason", [
    ("truncated", "no .npz"), ("text", "no .npz"), ("missing", "not a file"),
    ("no arr_0", "arr_0"), ("float", "float32"), ("grey", "[2, 8, 8]"),
    ("wide", "[2, 8, 6, 3]"), ("none", "[2, 0, 0, 3]")])
def test_an_npz_without_images_ends_in_one_line(kind, reason, tmp_path):
    path, good = tmp_path / "samples.npz", np.zeros((2, 8, 8, 3), dtype=np.uint8)
    bad = {"float": good.astype(np.float32), "grey": good[..., 0],
           "wide": good[:, :, :6], "none": good[:, :0, :0]}
    np.savez(path, **{"images" if kind == "no arr_0" else "arr_0": bad.get(kind, good)})
    if kind == "truncated":
        path.write_bytes(path.read_bytes()[:-200])
    if kind == "text":
        path.write_text("arr_0")
    if kind == "missing":
        path.unlink()
    said = one_line(data.open_images, str(path))
    assert reason in said and str(path) in said


def member(shape: object, body: bytes = bytes(24), kind: str = "|u1") -> bytes:
    """The bytes of an .npy file that says that it has this shape."""
    text = f"{{'descr': '{kind}', 'fortran_order': False, 'shape': {shape}}}\n".encode()
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text)) + text + body


MEMBERS = {
    "negative": member((-1, 24)), "negative twice": member((-1, -24)),
    "absurd": member((2**40, 2**40)), "too large": member((25,)), "too small": member((23,)),
    "endless": member("(" * 5000), "no shape": member("'a'"), "real": member((2.5,)),
    "objects": member((3,), kind="|O"), "text": b"this is no array", "empty": b"",
    "half": member((24,))[:20], "version 2": b"\x93NUMPY\x02\x00" + bytes(30),
    "fields": member((24,), kind="|Q9"), "code": member("__import__('os').abort()")}


@pytest.mark.parametrize("method", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
@pytest.mark.parametrize("kind", [*MEMBERS, "good", "encrypted", "unknown method"])
def test_a_damaged_member_of_an_npz_ends_in_one_line(kind, method, tmp_path):
    path = tmp_path / "a.npz"
    with zipfile.ZipFile(path, "w", method) as archive:
        archive.writestr("arr_0.npy", MEMBERS.get(kind, member((24,))))
        archive.writestr("more.npy", member((200,), bytes(200)))
    raw = bytearray(path.read_bytes())
    if kind in ("encrypted", "unknown method"):   # flags, in the entry and in the list
        for mark, place in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):
            raw[raw.index(mark) + place + 2 * (kind != "encrypted")] |= 1
    path.write_bytes(raw)
    if kind == "good":
        assert data.read_npz(path, "arr_0")["arr_0"].tolist() == [0] * 24
        return
    if kind == "unknown method" and method == zipfile.ZIP_DEFLATED:
        raw[raw.index(b"PK\x03\x04") + 8] = raw[raw.index(b"PK\x01\x02") + 10] = 99
        path.write_bytes(raw)
    said = one_line(data.read_npz, path, "arr_0")
    assert str(path) in said and "no .npz" in said
    assert data.read_npz(path, "more")["names"] == ["arr_0", "more"]


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_read_npz_gives_what_is_there(save, tmp_path):
    arrays = {"mu": np.arange(3.0), "sigma": np.eye(3, order="F"), "features": np.array("judge"),
              "empty": np.zeros((0, 3))}
    save(tmp_path / "a.npz", **arrays)
    found = data.read_npz(str(tmp_path / "a.npz"), "mu", "features", "absent", "sigma", "empty")
    assert found.pop("names") == [*arrays] and found.keys() == arrays.keys()
    for key, array in found.items():
        np.testing.assert_array_equal(array, arrays[key])
    assert str(found["features"]) == "judge" and torch.tensor(found["mu"]).sum() == 3


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_any_byte_of_an_npz_may_flip(save, tmp_path):
    """It is found, or it is where nothing depends on it, such as a date."""
    draws, expected = np.random.default_rng(0), np.arange(3000) % 7
    save(tmp_path / "a.npz", arr_0=expected)
    whole, refused = (tmp_path / "a.npz").read_bytes(), 0
    for _ in range(200):
        raw = bytearray(whole)
        raw[draws.integers(len(raw))] ^= 1 << draws.integers(8)
        (tmp_path / "b.npz").write_bytes(raw)
        try:
            found = data.read_npz(tmp_path / "b.npz", "arr_0")
        except InputError:
            refused += 1
        else:
            assert "arr_0" not in found or (found["arr_0"] == expected).all()
    assert refused > 100
    for length in range(0, len(whole), len(whole) // 50):
        (tmp_path / "b.npz").write_bytes(whole[:length])
        one_line(data.read_npz, tmp_path / "b.npz", "arr_0")


def test_a_pipe_and_a_folder_are_no_npz(tmp_path):
    os.mkfifo(tmp_path / "a.npz")
    for path in (tmp_path / "a.npz", tmp_path):
        assert "not a file" in one_line(data.read_npz, path, "arr_0")


@pytest.mark.parametrize("kind, reason", [
    ("mixed", "(16, 16)"), ("empty", "has no .jpg"), ("wide", "(16, 8)"), ("broken", "")])
def test_a_folder_of_samples_is_taken_as_it_is(kind, reason, tmp_path):
    folder = make_folder(tmp_path, {"a": 0 if kind == "empty" else 3})
    if kind != "empty":
        assert data.open_images(folder).size == 8 and len(data.open_images(folder)) == 3
    if kind in ("mixed", "wide"):
        image = Image.new("RGB", (16, 16 if kind == "mixed" else 8))
        image.save(tmp_path / "a/extra.png")
    if kind == "broken":
        (tmp_path / "a/extra.png").write_bytes(b"not a picture")
        part, = data.once(data.open_images(folder), 4)
        assert len(part["y"]) == 3 and part["skipped"] == [str(tmp_path / "a/extra.png")]
        for file in (tmp_path / "a").glob("0*.png"):
            file.unlink()
        reason = "none"
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
    return {file.name: file.read_bytes() for file in folder.rglob("*")
            if file.is_file() and file.name != ".lock"}


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


def of_two(rank: int, folder: str, images: str, store: str, limit: int) -> None:
    """One process of two; rank 1 is killed when it has encoded `limit` images."""
    class Fatal(Encoder):
        def __call__(self, x: Tensor) -> tuple[Tensor, Tensor]:
            if rank == 1 and self.seen >= limit:
                os.kill(os.getpid(), signal.SIGKILL)
            return super().__call__(x)

    torch.set_num_threads(1)   # the parent's threads are not here
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    dataset = data.open_dataset(images, 8, "train")
    latents = data.cache_latents(folder, dataset, Fatal(), KEY, 2, rank, 2)
    assert len(latents) == 11
    runtime.finish()


@pytest.mark.parametrize("then", [1, 2])
def test_a_killed_run_goes_on_with_any_number_of_processes(
        eleven, tmp_path, then, chunks_of_three):
    # Chunks of 3, 3, 3 and 2 images, of which rank 1 has the second and the fourth.
    # It sees 6 images of the second, with the mirror images, and 2 of the fourth.
    data.cache_latents(tmp_path / ".whole", eleven, Encoder(), KEY, 2)

    def run(limit: int) -> list[int]:
        store = tmp_path / f".store{limit}"
        flags = str(tmp_path / ".cache"), eleven.folder, str(store), limit
        processes = [FORK.Process(target=of_two, args=(rank, *flags)) for rank in range(2)]
        for process in processes:
            process.start()
        for process in processes:
            process.join(30)
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
        eleven, tmp_path, monkeypatch):
    monkeypatch.setattr(data, "KEPT", 9)
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
    for value, target in ((0, 0), (1, 0), (0, 1)):   # of pixels, and of labels
        cifar = data.Cifar10.__new__(data.Cifar10)
        pixels = np.full((2, 32, 32, 3), value, np.uint8)
        data.Pictures.__init__(cifar, "cifar10", 32, "train", ["plane", "car"],
                               np.array([target, 1]), pixels)
        others.append(cifar)
    for value in (0, 1):
        np.savez(tmp_path / f"{value}.npz", np.full((2, 8, 8, 3), value, np.uint8))
        others.append(data.open_images(str(tmp_path / f"{value}.npz")))
    assert len({*map(data.fingerprint, (moved, *others))}) == 11


def copied(images: Path, target: Path) -> data.Folder:
    """The same images with new times, as `cp -r` makes them."""
    shutil.copytree(images, target, copy_function=shutil.copyfile)
    return data.open_dataset(str(target), 8, "train")


def test_new_times_are_said_or_accepted(tmp_path, capsys):
    first_times = opened(tmp_path / "images", {"a": 5, "bb": 6}, size=(8, 11))
    cache = tmp_path / "cache"
    old = data.cache_latents(cache, first_times, Encoder(), KEY, 4)
    others = [copied(tmp_path / "images", tmp_path / f"copy{i}") for i in range(3)]
    assert capsys.readouterr().err.count("--accept-data") == 0
    # Accepted, the old latents are taken, and are the same to a run that is resumed.
    taken = data.cache_latents(cache, others[0], Encoder(limit=0), KEY, 4, accept=True)
    assert taken.sha256 == old.sha256 and len(list(cache.iterdir())) == 1
    assert taken.labels.tolist() == old.labels.tolist()
    # Otherwise a line is said, and they are made.
    made = data.cache_latents(cache, others[0], Encoder(), KEY, 4)
    said = capsys.readouterr().err
    assert said.count("--accept-data would take") == 1 and str(cache / "train-") in said
    assert made.sha256 != old.sha256 and len(list(cache.iterdir())) == 2
    assert data.cache_latents(cache, others[0], Encoder(limit=0), KEY, 4).sha256 == made.sha256
    assert "--accept-data" not in capsys.readouterr().err   # as its own are there
    # The newest of two is accepted, and one that is not whole never.
    home, = (path for path in cache.iterdir() if path.name.endswith(made.sha256[-8:]))
    for sha256, seconds in ((made.sha256, 200), (old.sha256, 100)):
        path, = cache.glob(f"*{sha256[-8:]}")
        os.utime(path, (seconds, seconds))
    taken = data.cache_latents(cache, others[1], Encoder(limit=0), KEY, 4, accept=True)
    assert taken.sha256 == made.sha256
    (home / "00000000.json").unlink()
    taken = data.cache_latents(cache, others[1], Encoder(limit=0), KEY, 4, accept=True)
    assert taken.sha256 == old.sha256
    # Other images are other latents, whatever is accepted.
    noise(8, 12, seed=5).save(others[2].name_of(0), "BMP")
    encoder = Encoder()
    data.cache_latents(cache, others[2], encoder, KEY, 4, accept=True)
    assert encoder.seen == 22


def elsewhere(function, *args) -> str:
    """What InputError says in another process, or nothing."""
    ours, theirs = FORK.Pipe()

    def run() -> None:
        torch.set_num_threads(1)   # the parent's threads are not here
        runtime.locks.clear()      # nor are its locks
        try:
            function(*args)
            theirs.send("")
        except InputError as error:
            theirs.send(str(error))
        os._exit(0)

    process = FORK.Process(target=run)
    process.start()
    said = ours.recv() if ours.poll(20) else "it hangs"
    process.join(20)
    return said


def test_one_makes_a_cache_and_many_read_it(eleven, tmp_path):
    cache, asked = tmp_path / "cache", []

    class Slow(Encoder):
        def __call__(self, x: Tensor) -> tuple[Tensor, Tensor]:
            if not self.seen:
                asked.append(elsewhere(data.cache_latents, cache, eleven, Encoder(), KEY, 4))
            return super().__call__(x)

    data.cache_latents(cache, eleven, Slow(), KEY, 4)
    assert "in use by process" in asked[0] and str(os.getpid()) in asked[0]
    # From here on this process reads, to its end.
    reads = elsewhere, data.cache_latents, cache, eleven, Encoder(limit=0), KEY, 4
    assert reads[0](*reads[1:]) == ""
    home, = cache.iterdir()
    assert "in use" in elsewhere(runtime.lock, home)
    (home / "00000000.json").unlink()   # now it would have to be made
    assert "in use" in elsewhere(data.cache_latents, cache, eleven, Encoder(), KEY, 4)
    runtime.finish()
    assert elsewhere(data.cache_latents, cache, eleven, Encoder(), KEY, 4) == ""
    assert elsewhere(runtime.lock, home) == ""
    data.cache_latents(cache, eleven, Encoder(limit=0), KEY, 4)   # which is there already
    assert "in use" in elsewhere(runtime.lock, home) and reads[0](*reads[1:]) == ""


def test_the_four_caches_used_last_are_kept_and_those_in_use(eleven, tmp_path, capsys):
    cache, homes = tmp_path / "cache", []

    def use(number: int, encoder: Encoder) -> Path:
        key = {"tokenizer": str(number)}
        latents = data.cache_latents(cache, eleven, encoder, key, 4)
        home, = (path for path in cache.glob("train-*") if latents.sha256[:16] in path.name)
        assert home.stat().st_mtime > 1e9
        runtime.finish()
        os.utime(home, (number, number))   # the times of this test are not its clock's
        return home

    def left() -> list[int]:
        return [number for number, home in enumerate(homes) if home.exists()]

    (cache / "results").mkdir(parents=True)   # somebody's, and none of ours
    homes += [use(number, Encoder()) for number in range(4)]
    assert left() == [0, 1, 2, 3]
    runtime.finish()
    (homes[0] / ".lock").touch()   # which somebody left who was killed
    os.utime(homes[0], (0, 0))
    use(0, Encoder(limit=0))
    os.utime(homes[0], (9, 9))
    capsys.readouterr()
    homes.append(use(4, Encoder()))   # the second is deleted, as the first was used since
    assert left() == [0, 2, 3, 4]
    assert capsys.readouterr().err.count(f"deleted {homes[1]}: ") == 1
    ready, done = FORK.Event(), FORK.Event()
    reader = FORK.Process(target=hold, args=(homes[2], ready, done))
    reader.start()
    assert ready.wait(20)
    os.utime(homes[2], (2, 2))
    homes += [use(5, Encoder()), use(6, Encoder())]
    assert left() == [0, 2, 4, 5, 6]   # the third is read, and the fourth is deleted
    done.set()
    reader.join(20)
    (homes[2] / "00000000.json").unlink()   # as if it had been killed, and long ago
    (homes[2] / ".lock").touch()
    os.utime(homes[2], (2, 2))
    use(2, Encoder())
    assert left() == [0, 2, 5, 6] and (cache / "results").is_dir()


def hold(home: Path, ready, done) -> None:
    """Another process that reads a cache."""
    runtime.locks.clear()
    runtime.lock(home, shared=True)
    ready.set()
    done.wait(20)
    os._exit(0)


@pytest.mark.parametrize("kind", [
    "short", "empty", "no array", "array of objects", "other shape", "other numbers", "cut",
    "list", "foreign", "sums", "nan", "skipped", "binary", "folder"])
def test_a_damaged_chunk_is_made_again(eleven, tmp_path, kind, chunks_of_three):
    cache = tmp_path / "cache"
    data.cache_latents(cache, eleven, Encoder(), KEY, 2)
    before, (home,) = contents(cache), cache.iterdir()
    array, mark = home / "00000003.npy", home / "00000003.json"
    good = json.loads(mark.read_text())
    texts = {"cut": mark.read_text()[:20], "list": "[1]", "foreign": '{"a": 1}',
             "sums": json.dumps(good | {"sums": [1, 2]}),
             "nan": json.dumps(good | {"sums": [[float("nan")] * 2] * 4}),
             "skipped": json.dumps(good | {"skipped": [7]}), "binary": "\0\1"}
    arrays = {"other shape": np.load(array)[:2], "other numbers": np.load(array).astype(float),
              "array of objects": np.array([{}])}
    if kind in texts:
        mark.write_text(texts[kind])
    elif kind in arrays:
        np.save(array, arrays[kind], allow_pickle=True)
    elif kind == "folder":
        mark.unlink()
        mark.mkdir()
        assert "00000003.json" in one_line(data.cache_latents, cache, eleven, Encoder(), KEY, 2)
        return
    else:
        array.write_bytes({"short": array.read_bytes()[:-1], "empty": b"",
                           "no array": b"text"}[kind])
    encoder = Encoder()
    data.cache_latents(cache, eleven, encoder, KEY, 2)
    assert encoder.seen == 6 and contents(cache) == before


def test_chunks_of_two_kinds_or_none_end_in_one_line(
        eleven, tmp_path, chunks_of_three, monkeypatch):
    data.cache_latents(tmp_path / "cache", eleven, Encoder(), KEY, 2)
    home, = (tmp_path / "cache").iterdir()
    np.save(home / "00000003.npy", np.zeros((3, 2, 2, 2, 4, 4), np.float16))
    monkeypatch.setattr(data, "write_chunk", lambda *_: None)
    for _ in range(2):
        said = one_line(data.cache_latents, tmp_path / "cache", eleven, Encoder(), KEY, 2)
        assert str(home) in said and "delete it" in said
        (home / "00000003.npy").unlink(missing_ok=True)


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
    assert "beyond fp16" in said
    runtime.finish()   # as a stage does at its end
    assert not list(cache.iterdir())

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
    latents = data.open_lightningdit_latents(tmp_path, 2)
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
    "bf16 labels": GOOD | {"labels": torch.arange(4).to(torch.bfloat16)},
    "column": GOOD | {"labels": torch.arange(4)[:, None]},
    "absurd": GOOD | {"labels": torch.arange(4) + 2**60},
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_shards_end_in_one_line(tmp_path, name):
    write_shard(tmp_path / "latents_rank00_shard000.safetensors", shard(4, 1))
    write_shard(tmp_path / "latents_rank00_shard001.safetensors", WRONG[name])
    assert "shard001" in one_line(data.open_lightningdit_latents, tmp_path, 2)


def test_no_shards_and_other_statistics_end_in_one_line(tmp_path):
    assert "no *.safetensors" in one_line(data.open_lightningdit_latents, tmp_path, 2)
    write_shard(tmp_path / "latents_rank00_shard000.safetensors", shard(4, 1))
    assert "latents_stats.pt" in one_line(data.open_lightningdit_latents, tmp_path, 2)
    two, three = torch.ones(1, 2, 1, 1), torch.ones(1, 3, 1, 1)
    for stored in ({"mean": three, "std": three}, {"mu": 0}, {"mean": 0.0, "std": 1.0},
                   {"mean": two, "std": two * float("nan")}):
        torch.save(stored, tmp_path / "latents_stats.pt")
        assert "latents_stats.pt" in one_line(data.open_lightningdit_latents, tmp_path, 2)


def test_the_hash_of_lightningdit_latents_is_of_their_files(tmp_path):
    names = [tmp_path / f"latents_rank00_shard00{i}.safetensors" for i in range(2)]
    write_shard(names[0], shard(4, 1))
    write_shard(names[1], shard(3, 2))
    stats = {"mean": torch.zeros(1, 2, 1, 1), "std": torch.ones(1, 2, 1, 1)}
    torch.save(stats, tmp_path / "latents_stats.pt")
    hashes = [data.open_lightningdit_latents(tmp_path, 2).sha256]
    shutil.copytree(tmp_path, tmp_path / "copy")   # with the times
    assert data.open_lightningdit_latents(tmp_path / "copy", 2).sha256 == hashes[0]
    changes = [lambda: os.utime(names[1], (1, 1)), lambda: write_shard(names[0], shard(5, 1)),
               lambda: names[1].rename(tmp_path / "other.safetensors"),
               lambda: os.utime(tmp_path / "latents_stats.pt", (1, 1))]
    for change in changes:
        change()
        hashes.append(data.open_lightningdit_latents(tmp_path, 2).sha256)
    assert len({*hashes}) == 5 and len(hashes[0]) == 64


def test_a_picture_of_rows_has_names_and_enlarged_images(tmp_path):
    # 20 pixels are enlarged threefold; the names take the first 110 columns.
    images = torch.randint(256, (3, 20, 20, 3), dtype=torch.uint8)
    data.save_rows(tmp_path / "rows.png", {"first": images[:1], "second": images[1:].numpy()})
    found = np.asarray(Image.open(tmp_path / "rows.png"))
    assert found.shape == (120, 110 + 120, 3)
    assert (found[60::3, 110::3] == torch.cat([images[1], images[2]], 1).numpy()).all()
    assert (found[:60:3, 110:170:3] == images[0].numpy()).all()
    assert (found[:60, 170:] == 255).all() and (found[:60, :110] < 255).any()


def test_a_link_to_nothing_is_one_more_unreadable_image(tmp_path):
    for name in ("a", "b"):
        Image.new("RGB", (8, 8)).save(tmp_path / f"{name}.png")
    (tmp_path / "c.png").symlink_to(tmp_path / "c.png")
    dataset = data.open_dataset(str(tmp_path), 8, "train")
    before = data.fingerprint(dataset)
    batch, = data.once(dataset, 4)
    assert len(batch["x"]) == 2 and [Path(name).name for name in batch["skipped"]] == ["c.png"]
    (tmp_path / "c.png").unlink()
    Image.new("RGB", (8, 8)).save(tmp_path / "c.png")
    assert data.fingerprint(dataset) != before
