"""data.py: the shapes, the ADM crop against a slow oracle, the order of batches, and damaged files."""

import io
import itertools
import os
import pathlib
import tarfile

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
