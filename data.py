"""Images and cached latents in, batches out.

    dataset = open_dataset("shapes", size=32, split="train")
    for batch in batches(dataset, batch=64): batch["x"], batch["y"]   # endless
    for batch in once(dataset, batch=64): ...                 # every image once

A diffusion transformer trains on latents, which a frozen tokenizer makes once:

    latents = cache_latents("runs/latents", dataset, posterior, key, batch=64)
    for batch in latent_batches(latents, 64, seed=0): batch["mean"], batch["std"]

Images are uint8 where they are stored, and x is float32 in [-1, 1].  The order of
an epoch, the crops and the flips are functions of the seed and the position in
the run.  So they do not depend on the number of processes, and a run that is
resumed goes on with the images that it would have seen.
"""

import functools
import hashlib
import itertools
import json
import math
import os
import shutil
import signal
import sys
import warnings
import zipfile
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torchvision
from numpy import ndarray
from PIL import Image, ImageDraw
from torch import Tensor
from tqdm import tqdm

import checkpoints
import runtime
from runtime import InputError
from shapes import SHAPES, Shapes, hash_bits, uniform  # noqa: F401

Device = torch.device | str

# ------------------------------------------------------------------------------
# Pixels.  Every stage writes and scores images through this one rounding, so
# that a PNG, an .npz and a metric agree to the last grey level.


def to_uint8(x: Tensor) -> Tensor:
    """round(127.5 (x + 1)), clamped to 0..255.  NaN, which would be black, is refused."""
    x = x.float()
    if not x.sum().isfinite():   # 60 times as fast as to look at every number
        raise InputError("an image holds NaN or infinity: use --precision fp32, or "
                         "train its network again")
    return (x + 1).mul_(127.5).round_().clamp_(0, 255).to(torch.uint8)


def from_uint8(pixels: Tensor) -> Tensor:
    """pixels / 127.5 - 1, which `to_uint8` undoes exactly."""
    return pixels.float().div_(127.5).sub_(1)


def save_rows(path: str | Path, rows: dict[str, Any]) -> None:
    """A PNG with a row of images, uint8 [n, H, W, 3], beside each name.

    Small images are enlarged, so that their pixels can be seen.
    """
    size = next(iter(rows.values())).shape[1]
    side, most = size * max(1, 64 // size), max(map(len, rows.values()))
    grid = Image.new("RGB", (110 + most * side, len(rows) * side), "white")
    for row, (name, images) in enumerate(rows.items()):
        ImageDraw.Draw(grid).text((4, side * row + side // 2 - 6), name, "black")
        for column, image in enumerate(images):
            tile = Image.fromarray(np.asarray(image)).resize((side, side), Image.Resampling.NEAREST)
            grid.paste(tile, (110 + side * column, side * row))
    with runtime.atomic(path) as temporary:
        grid.save(temporary)


def save_samples(path: Path, parts: list[Path], shape: tuple[int, ...], labels: Tensor) -> None:
    """As np.savez, part by part: 50,000 images may be more than the memory holds."""
    header = {"descr": "|u1", "fortran_order": False, "shape": shape}
    with runtime.atomic(path) as file, zipfile.ZipFile(file, "w") as archive:
        with archive.open("arr_0.npy", "w", force_zip64=True) as array:
            np.lib.format.write_array_header_1_0(array, header)
            for part in parts:
                array.write(np.load(part).data)
        with archive.open("arr_1.npy", "w", force_zip64=True) as array:
            np.save(array, labels.numpy())


# ------------------------------------------------------------------------------
# Pictures have the interface of Shapes.  Their read() gives uint8 [3, s, s] for
# each index, or None for a file that is no image.  A place (across, down) in
# [0, 1) is where the crop lies.

CENTRE = (0.499999, 0.499999)   # int(CENTRE * (r + 1)) is r // 2
# Pillow goes by the content of a file, and would run Ghostscript on an EPS.
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF")
ENDINGS = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff")
PIXELS, ASPECT = 64_000_000, 50   # at most: pixels, and long side / short side


@contextmanager
def picture(path):
    """An image whose header alone has been read.  Other files raise any exception.

    Every image file is opened here.  Pillow's warnings about it are not shown.
    """
    with (warnings.catch_warnings(action="ignore"),
          Image.open(runtime.regular(path), formats=FORMATS) as image):
        short, long = sorted(image.size)
        if not 0 < long <= ASPECT * short or short * long > PIXELS:
            raise InputError(f"{path} has {short} x {long} pixels: crop it")
        yield image


def adm_crop(image: Image.Image, size: int, place: tuple = CENTRE) -> Image.Image:
    """The crop of ADM (Dhariwal and Nichol 2021), which published FIDs refer to.

    Halve the image with a box filter while its short side has 2 * size pixels or
    more, make that side `size` with a bicubic filter, and crop.
    """
    if image.size == (size, size):
        return image
    while min(image.size) >= 2 * size:
        half = image.width // 2, image.height // 2
        image = image.resize(half, Image.Resampling.BOX)
    scale = size / min(image.size)
    width, height = round(image.width * scale), round(image.height * scale)
    image = image.resize((width, height), Image.Resampling.BICUBIC)
    left, top = (int(p * (n - size + 1)) for p, n in zip(place, (width, height)))
    return image.crop((left, top, left + size, top + size))


class Pictures:
    """Images of an array, uint8 [N, H, W, 3], with the classes `targets` [N]."""
    note = ""

    def __init__(self, name, size, split, classes, targets, pixels=None):
        self.name, self.size, self.split = name, size, split
        self.classes, self.targets, self.pixels = classes, targets, pixels

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        image, = self.read([index], [CENTRE])
        if image is None:
            raise InputError(f"{self.name_of(index)} cannot be read: remove it")
        return image, int(self.targets[index])

    def labels(self, indices: ndarray) -> Tensor:
        return torch.from_numpy(self.targets[indices])

    def read(self, indices: ndarray, places: ndarray) -> Iterator[Tensor | None]:
        for index, place in zip(indices, places, strict=True):
            try:
                image = self.open_image(index)
                if isinstance(image, Image.Image):
                    image = adm_crop(image, self.size, place)
                image = torch.from_numpy(np.array(image)).permute(2, 0, 1)
            except Exception:   # Pillow raises anything from MemoryError to SyntaxError
                image = None
            yield image

    def open_image(self, index):
        """An image, or the pixels [s, s, 3] of one that needs no crop."""
        return Image.fromarray(self.pixels[index])

    def name_of(self, index: int) -> str:
        return f"image {index} of {self.name}"


class Cifar10(Pictures):
    """CIFAR-10 in `root`, or downloaded there; its 10_000 test images are val."""

    def __init__(self, size: int, split: str, root: str) -> None:
        try:
            with runtime.turn(Path(root)):   # one process downloads it for all
                cifar = torchvision.datasets.CIFAR10(root, split == "train", download=True)
        except Exception as error:   # from URLError to a tar file that ends too early
            reason = " ".join(str(error).split())
            raise InputError(f"cifar10 is not in {root} and cannot be downloaded "
                             f"({reason}): put it there") from None
        targets = np.array(cifar.targets)
        super().__init__("cifar10", size, split, cifar.classes, targets, cifar.data)


class Folder(Pictures):
    """Files of a folder; ignored: names of what else is there, by kind."""

    def __init__(self, name, size, split, folder, classes, files, targets):
        super().__init__(name, size, split, classes, np.array(targets))
        self.folder = folder
        # One array: a million Python strings would be copied into every worker.
        self.files = np.array([os.fsencode(file) for file in files])

    def open_image(self, index):
        with picture(self.name_of(index)) as image:
            if image.mode.startswith("I;16") or (image.mode, image.format) == ("I", "PNG"):
                # These have 16 bits, which Pillow would clip.
                image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
            if image.mode in ("I", "F"):
                raise InputError(f"{self.name_of(index)} does not say what white is")
            image.load()   # which convert() also does, but it always makes a copy
            return image if image.mode == "RGB" else image.convert("RGB")

    def name_of(self, index: int) -> str:
        return os.path.join(self.folder, os.fsdecode(self.files[index]))


class ArraySamples(Pictures):
    """arr_0 of an .npz, uint8 [N, S, S, 3], in which samples are kept."""

    def __init__(self, path: str) -> None:
        array = open_array(path, "arr_0")
        kind, shape = array.dtype, list(array.shape)
        if kind != np.uint8 or len(shape) != 4 or shape[1:] != [max(1, shape[1])] * 2 + [3]:
            raise InputError(f"{path}: arr_0 must be uint8 [N, S, S, 3], not {kind} {shape}")
        targets = np.zeros(len(array), dtype=int)
        super().__init__(path, shape[1], "", [""], targets, array)

    def open_image(self, index):
        return self.pixels[index]


def open_array(path: str | Path, key: str) -> ndarray:
    """One array of an .npz, as `read_npz` reads it."""
    found = read_npz(path, key)
    if key not in found:
        raise InputError(f"{path} has no {key}, only {found['names'][:3]}: name another file")
    return found[key]


def read_npz(path: str | Path, *keys: str) -> dict:
    """Those of these arrays that an .npz has, and the names of all as "names".

    An array is memory-mapped unless it is compressed.  Nothing is unpickled.
    """
    path = runtime.regular(path)
    try:
        with zipfile.ZipFile(path) as archive:
            names = [name.removesuffix(".npy") for name in archive.namelist()]
            return {"names": names} | {
                key: read_member(path, archive, archive.getinfo(f"{key}.npy"))
                for key in keys if key in names}
    except Exception as error:   # zipfile, zlib and NumPy raise a dozen types
        reason = " ".join(str(error).split()) or type(error).__name__
        raise InputError(f"{path} is no .npz file, or damaged ({reason}): make it again, "
                         "or copy it again") from None


def read_member(path, archive, entry):
    with archive.open(entry) as member:
        np.lib.format.read_magic(member)   # plain arrays are of version 1.0
        shape, fortran, kind = np.lib.format.read_array_header_1_0(member)
        begin, size = member.tell(), math.prod(shape) * kind.itemsize
        if kind.hasobject or entry.file_size != begin + size:
            raise ValueError(f"{entry.filename} is not {kind} {shape}, as it says")
        if entry.compress_type != zipfile.ZIP_STORED:
            return np.ndarray(shape, kind, member.read(), order="CF"[fortran])
        while member.read(2**20):   # up to the end, where the checksum is compared
            pass
    # An entry has 30 bytes.  The last 4 are the lengths of a name and of an extra
    # field; these come next, and then the array.
    raw = np.memmap(path, np.uint8, "r")
    lengths = raw[entry.header_offset + 26:][:4].view("<u2")
    begin += entry.header_offset + 30 + int(lengths.sum())
    return np.ndarray(shape, kind, raw[begin:], order="CF"[fortran])


# ------------------------------------------------------------------------------
# Opening by name.

Dataset = Shapes | Pictures


def open_dataset(name: str, size: int, split: str, seed: int = 0,
                 root: str = "runs/data") -> Dataset:
    """The images `name` at size x size pixels; split is "train" or "val".

    name: "shapes", which `seed` varies; "cifar10", kept in `root`; or a folder.
    A folder has a folder of JPEG, PNG, WebP, BMP, GIF or TIFF images for each class, or
    images, which are one class.  Or it has train/ and one of HELD_OUT, each of them like
    that.  If train/ has classes and val/ is flat, as in ImageNet, the labels of val/ are -1.
    Without one of HELD_OUT the split val is the same as train, as stderr then says.
    How a camera was held (EXIF) is ignored, as by the codes behind published FIDs.
    """
    if name == "shapes":
        return Shapes(size, split, seed)
    if name == "cifar10":
        return Cifar10(size, split, root)
    if not os.path.isdir(name):
        raise InputError(f"data '{name}' is neither shapes nor cifar10 nor a folder")
    dataset = open_folder(name, size, split)
    if dataset.note and os.environ.get("RANK", "0") == "0":
        print(dataset.note, file=sys.stderr)
    return dataset


HELD_OUT = ("val", "valid", "validation", "test")   # the first that is there


def open_folder(name, size, split):
    parts, loose, others = listing(name)
    held_out = [part for part in HELD_OUT if part in parts]
    home = folder = name
    beside, folders = [], []   # images and folders that are ignored
    if parts and ({*parts} <= {"train", *HELD_OUT} or held_out and "train" in parts):
        if "train" not in parts:
            raise InputError(f"{name} has no train/: add it, or give {name}/{parts[0]}")
        beside, folders = loose, [p for p in parts if p not in ("train", *held_out[:1])]
        home = folder = os.path.join(name, "train")
        if split == "val" and held_out:
            folder = os.path.join(name, held_out[0])
        parts, loose, more = listing(folder)
        others = others + more
    classes = listing(home)[0] or [os.path.basename(os.path.abspath(name))]
    if {*parts} - {*classes}:
        raise InputError(f"{folder} must have a folder for each class ({classes[0]}, "
                         f"...), and has {parts[:3]}")
    files, targets = loose, [-1 if len(classes) > 1 else 0] * len(loose)
    if parts:
        beside, files, targets = beside + loose, [], []
    for part in parts:
        inner, images, more = listing(os.path.join(folder, part))
        files += [os.path.join(part, image) for image in images]
        targets += [classes.index(part)] * len(images)
        folders, others = folders + inner, others + more
    if not files:
        raise InputError(f"{folder} has no {' '.join(ENDINGS)}, neither in itself "
                         f"nor in its folders {parts[:3]}")
    dataset = Folder(name, size, split, folder, classes, files, targets)
    dataset.ignored = {"files of other formats": others, "folders": folders,
                       "images beside the folders": beside}
    if split == "val" and folder == home:
        dataset.note = f"{name} has no val/ or test/: val is the same as train"
    return dataset


def listing(folder):
    """Names of the folders, of the images and of the other files; hidden ones not."""
    names = [], [], []
    for entry in sorted(os.scandir(folder), key=lambda entry: entry.name):
        if entry.name[0] != ".":
            image = entry.name.lower().endswith(ENDINGS)
            # A link may lead nowhere, which is_dir() would not bear.
            inner = os.path.isdir(entry.path) if entry.is_symlink() else entry.is_dir()
            names[0 if inner else 1 if image else 2].append(entry.name)
    return names


def summary(dataset: Dataset) -> str:
    """One line: how many images and classes, and what in a folder was ignored."""
    place = getattr(dataset, "folder", dataset.name)
    kinds = f"{len(dataset.classes)} class{'es' * (len(dataset.classes) > 1)}"
    if dataset.labels([0]) < 0:
        kinds = "no labels"
    ignored = "".join(f"; ignored {len(names)} {kind} ({', '.join(names[:3])})"
                      for kind, names in getattr(dataset, "ignored", {}).items() if names)
    return f"{place} ({dataset.split}): {len(dataset):,} images, {kinds}{ignored}"


def open_images(source: str, size: int | None = None, split: str = "train",
                seed: int = 0) -> Dataset:
    """Images to be scored: the array of an .npz, or what `open_dataset` opens.

    Without `size` a folder keeps its own, and the built-in sets have 32 pixels.
    """
    if source.endswith(".npz"):
        return ArraySamples(source)
    known = 32 if source in ("shapes", "cifar10") else 0
    dataset = open_dataset(source, size or known, split, seed)
    dataset.size = dataset.size or common_side(dataset)
    return dataset


def common_side(folder):
    """The one side of all images in a folder that can be read; they must be squares."""
    sizes = set()
    for index in range(len(folder)):
        with suppress(Exception), picture(folder.name_of(index)) as image:
            sizes.add(image.size)
    width, height = min(sizes, default=(0, 1))
    if len(sizes) > 1 or width != height:
        raise InputError(f"{folder.name} must hold squares of one size, and holds "
                         f"{sorted(sizes)[:3] or 'none'}: give the --size of a crop")
    return width


def read_masks(folder, images, index):
    """Objects [n, H, W] in [0, 1] of these images, cropped as they are."""
    if isinstance(images, Shapes):
        return images.render_batch(index)[2]
    found = []
    for file in map(Path, map(images.name_of, index)):
        path = folder / file.relative_to(images.folder).with_suffix(".png")
        try:
            with picture(path) as mask, picture(file) as image:
                sizes = mask.size, image.size
                black = mask.convert("L").point([0] + [255] * 255)
        except Exception:   # Pillow raises anything
            raise InputError(f"{path} is no mask: every image needs a .png") from None
        if sizes[0] != sizes[1]:
            raise InputError(f"{path} has {sizes[0]} pixels, and its image {sizes[1]}: give a"
                             " mask of the image's size")
        crop = adm_crop(black, images.size).tobytes()
        found.append(torch.frombuffer(bytearray(crop), dtype=torch.uint8) / 255)
    return torch.stack(found).unflatten(1, (images.size, images.size))


# ------------------------------------------------------------------------------
# Batches.  Position p of a run is image p % n of epoch p // n.  Batch k has the
# positions from k * batch up to (k + 1) * batch, across the borders of epochs,
# and a rank takes every world-th of them.  A plan says for each batch which images
# it has, and at which positions they are.


def epoch_order(n, seed, epoch):
    """The permutation of range(n) in which an epoch visits the images."""
    key = hash_bits(hash_bits(seed % 2**63, 1), epoch)
    return np.argsort(hash_bits(key, np.arange(n)), kind="stable")


def batches(dataset: Dataset, batch: int, seed: int = 0, start: int = 0,
            rank: int = 0, world: int = 1, workers: int = 0, augment: bool = True,
            device: Device = "cpu") -> Iterator[dict]:
    """Endless batches from number `start` on, of `batch` images on all ranks.

    Yields x [b, 3, s, s] in [-1, 1], pixels (x as uint8) and y [b] on `device`,
    index [b], and skipped, the names of images that cannot be read.  Others of the
    batch take their places, so that b is always batch / world.
    augment: crop at random, and mirror one half of the images.
    """
    plan = training_plan(len(dataset), batch, seed, start, rank, world)
    return load(Reader(dataset, seed, augment, whole=True), plan, workers, device)


def once(dataset: Dataset, batch: int, rank: int = 0, world: int = 1,
         workers: int = 0, limit: int | None = None,
         device: Device = "cpu", x: bool = True) -> Iterator[dict]:
    """Every image once over all ranks, cropped at the centre; else as `batches`.

    Images that cannot be read are left out.
    limit: only so many images, spread evenly over the data set.  x: False spares it.
    """
    n = len(dataset)
    count = min(limit or n, n)
    mine = (np.arange(count) * n // count)[rank::world]
    return load(Reader(dataset), in_batches(mine, batch), workers, device, x)


def in_batches(indices, batch):
    parts = [indices[i:i + batch] for i in range(0, len(indices), batch)]
    return zip(parts, parts)


def training_plan(n, batch, seed, start, rank, world):
    order = functools.lru_cache(2)(lambda epoch: epoch_order(n, seed, epoch))
    for k in itertools.count(start):
        positions = np.arange(k * batch + rank, (k + 1) * batch, world)
        epochs, places = np.divmod(positions, n)
        parts = [order(epoch)[places[epochs == epoch]] for epoch in np.unique(epochs)]
        yield np.concatenate(parts), positions


class Reader:
    """Reads the images that an entry of a plan names.

    whole: images of the batch take the places of those that cannot be read.
    """

    def __init__(self, dataset, seed=0, augment=False, whole=False):
        self.dataset, self.seed, self.augment, self.whole = dataset, seed, augment, whole

    def __getitem__(self, entry):
        indices, positions = entry   # of the plan
        u = uniform(self.seed, 2, positions, 3).astype(float)
        places = u[:, :2] if self.augment else [CENTRE] * len(u)
        size, kept = self.dataset.size, np.empty(len(u), dtype=bool)
        mirrored = self.augment & (u[:, 2] < 0.5)
        pixels = np.empty((len(u), 3, size, size), np.uint8)   # NumPy is quick to transpose
        for row, image in enumerate(self.dataset.read(indices, places)):
            kept[row] = image is not None
            if kept[row]:
                pixels[row] = image.flip(2) if mirrored[row] else image
        rows = np.flatnonzero(kept)
        if self.whole and len(rows):
            rows = np.resize(rows, len(kept))   # from the first one on, once more
        pixels = torch.from_numpy(pixels if kept.all() else pixels[rows])
        return {"pixels": pixels, "y": self.dataset.labels(indices[rows]),
                "index": torch.from_numpy(indices[rows]),
                "skipped": [self.dataset.name_of(index) for index in indices[~kept]]}


def load(reader, plan, workers, device, x=True):
    """Yield the batches of a plan, read by `workers` processes."""
    parts = map(reader.__getitem__, plan)
    if workers > 0:
        # Without this generator it would draw from the global one.
        parts = iter(torch.utils.data.DataLoader(
            reader, batch_size=None, sampler=plan, num_workers=workers,
            pin_memory=torch.device(device).type == "cuda",
            generator=torch.Generator(), worker_init_fn=runtime.helper))
        # Of a process that is killed, PyTorch would tell wherever this one is then.
        with suppress(ValueError, AttributeError):   # in a thread, and on Windows
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    try:
        for part in parts:
            if not len(part["y"]):
                raise InputError(f"{part['skipped'][0]} cannot be read, nor can any other "
                                 "image of its batch: remove them, or mend the disk")
            pixels, y = (part[key].to(device, non_blocking=True) for key in ("pixels", "y"))
            yield part | {"pixels": pixels, "y": y} | ({"x": from_uint8(pixels)} if x else {})
    except (RuntimeError, ConnectionError, EOFError) as error:
        if isinstance(error, RuntimeError) and "DataLoader worker (pid" not in str(error):
            raise
        raise InputError("a process that reads images was killed: fewer --workers need "
                         "less memory") from None
    finally:
        del parts   # and so the other processes


# ------------------------------------------------------------------------------
# Latents.  A frozen tokenizer always gives the same posterior to an image.  So the
# diffusion transformer reads its mean and deviation from the disk and draws a new
# z at every visit.  The mirror image of an image has a posterior of its own.


class LatentSet:
    """Latents of images and of their mirror images, memory-mapped.

    parts: pairs of arrays [n, 1 or 2, C, h, w], of images and of mirror images,
    which hold mean and std, or one draw of z.  dtype: of these numbers, as NumPy
    knows no bfloat16.  labels: of the rows of all parts; -1 leaves a row out.
    sums: `channel_sums` of all.  skipped: names of the images that were left out.
    sha256: a hash of all that the latents depend on.
    """

    def __init__(self, parts, labels, classes, dtype, sums, skipped, sha256=""):
        self.sha256 = sha256
        self.parts, self.labels, self.classes = parts, labels, classes
        self.dtype, self.sums, self.skipped = dtype, sums, skipped
        self.starts = np.cumsum([0] + [len(images) for images, _ in parts[:-1]])
        self.rows = np.flatnonzero(labels >= 0)
        self.shape = parts[0][0].shape[2:]

    def __len__(self) -> int:
        return len(self.rows)

    def read(self, rows: ndarray, flipped: ndarray) -> Tensor:
        """[b, 1 or 2, C, h, w] as it is stored."""
        part = np.searchsorted(self.starts, rows, "right") - 1
        where = zip(part, flipped.astype(int), rows - self.starts[part])
        latents = np.stack([self.parts[p][side][row] for p, side, row in where])
        return torch.from_numpy(latents).view(self.dtype)

    def statistics(self, latent: str) -> tuple[Tensor, Tensor]:
        """Mean [C] and standard deviation [C] over images and positions.

        latent: "mean", or "sample" for z, whose variance is Var[mean] + E[std^2].
        """
        count, mean, square, noise = self.sums
        variance = square / count - (mean / count) ** 2
        if latent == "sample":
            variance = variance + noise / count
        return (mean / count).float(), variance.clamp(min=0).sqrt().float()


def channel_sums(latents):
    """How many numbers, and the sums of mean, mean^2 and std^2: float64 [4, C]."""
    values = latents.double().flatten(0, -5)   # [n, 1 or 2, C, h, w]
    mean, std = values[:, 0], values[:, 1:]
    total, square = mean.sum((0, 2, 3)), mean.square().sum((0, 2, 3))
    count = torch.full_like(total, mean[:, 0].numel())
    return torch.stack([count, total, square, std.square().sum((0, 1, 3, 4))])


def latent_batches(latents: LatentSet, batch: int, seed: int, start: int = 0,
                   rank: int = 0, world: int = 1,
                   device: Device = "cpu") -> Iterator[dict]:
    """Endless batches in the order and with the flips of `batches`.

    Yields mean and std [b, C, h, w] in float32 and y [b] on `device`, index [b],
    and flipped [b].  std is 0 where the latents have none.
    """
    plan = training_plan(len(latents), batch, seed, start, rank, world)
    cuda = torch.device(device).type == "cuda"

    def read(entry):
        rows = latents.rows[entry[0]]
        flipped = uniform(seed, 2, entry[1], 3)[:, 2] < 0.5
        z = latents.read(rows, flipped)
        y, index, flipped = map(torch.from_numpy, (latents.labels[rows], rows, flipped))
        return z.pin_memory() if cuda else z, y, index, flipped

    with ThreadPoolExecutor(4) as pool:   # four batches are read ahead
        ahead = deque(pool.submit(read, entry) for entry in itertools.islice(plan, 4))
        while True:
            z, y, index, flipped = ahead.popleft().result()
            ahead.append(pool.submit(read, next(plan)))
            z = z.to(device, non_blocking=True).float()
            std = z[:, 1] if z.shape[1] == 2 else torch.zeros_like(z[:, 0])
            yield {"mean": z[:, 0], "std": std, "y": y.to(device), "index": index,
                   "flipped": flipped}


# ------------------------------------------------------------------------------
# The cache of latents.  The name of its folder has a hash of all that the latents
# depend on, so that a wrong cache is never found, and one of the images' times.
# For every chunk of images it has a file [image, mirrored or not, mean or std, C,
# h, w] in fp16, and a .json that is written after it.  Chunks that are missing or
# damaged, as after a run that was killed, are made by the next run, whatever its
# number of processes.  One run makes a cache, and many may read it.  Whoever makes
# one deletes the others but those used last, and but those that somebody reads.

CHUNK, KEPT = 1024, 4   # images in a file, and caches in a folder


def fingerprint(dataset: Dataset) -> str:
    """A hash of the images, wherever they lie, and after "-" one of their files' times.

    It takes the content of an array, but opens no file of a folder: of these it
    takes the names and the sizes, and the times of modification.
    """
    facts = (dataset.size, dataset.split, len(dataset), dataset.classes,
             getattr(dataset, "seed", None))
    content, times = hashlib.sha256(repr(facts).encode()), hashlib.sha256()
    if isinstance(dataset, Cifar10):
        content.update(dataset.pixels.tobytes() + dataset.targets.tobytes())
    if isinstance(dataset, ArraySamples):
        content.update(runtime.file_sha256(dataset.name).encode())
    for index, file in enumerate(getattr(dataset, "files", [])):
        try:
            status = os.stat(dataset.name_of(index))
            size, changed = status.st_size, status.st_mtime_ns
        except OSError:   # a link to nothing: one more unreadable image
            size, changed = -1, 0
        content.update(b"%b\0%d\0" % (file, size))
        times.update(b"%d\0" % changed)
    return f"{content.hexdigest()}-{times.hexdigest()[:8]}"


def cache_latents(folder: str | Path, dataset: Dataset, encode: Callable,
                  key: dict[str, str], batch: int, rank: int = 0, world: int = 1,
                  workers: int = 0, device: Device = "cpu",
                  accept: bool = False) -> LatentSet:
    """The latents of all images from `folder`; those that are missing are made.

    encode: x [b, 3, H, W] -> mean, std [b, C, h, w]; b is at most `batch`.
    key: what latents depend on besides the images, as {"tokenizer": its sha256}.
    accept: take those of images that differ in nothing but the times of the files.
    All processes call this.  fp16 has steps of 0.004 at |z| = 5, which is little
    beside the noise of the paper's tokenizers, whose deviation is 0.24.
    """
    labels = dataset.labels(np.arange(len(dataset))).numpy().copy()
    if labels.min() < 0:
        raise InputError(f"{dataset.name} has no labels: lay its images into one folder "
                         "per class")
    content, times = fingerprint(dataset).split("-")
    key = {**key, "data": content, "dtype": "fp16", "chunk": CHUNK}
    digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()
    chunks = [images for images, _ in in_batches(np.arange(len(dataset)), CHUNK)]
    home = find_cache(Path(folder) / f"{dataset.split}-{digest[:16]}-{times}",
                      chunks, accept, rank)
    runtime.on_main(runtime.Runtime(torch.device(device), rank, world),
                    lambda: lock_cache(home, chunks))
    todo = [images for images in chunks[rank::world] if not open_chunk(home, images)]
    for images in tqdm(todo, "latents", unit="chunk", disable=rank > 0 or not todo):
        plan = in_batches(images, batch)
        write_chunk(home, images, load(Reader(dataset), plan, workers, device), encode)
    runtime.barrier()
    parts = [open_chunk(home, images) for images in chunks]
    if not all(parts) or len({latents.shape[1:] for latents, *_ in parts}) > 1:
        raise InputError(f"{home} is damaged: delete it")
    if rank == 0:
        share_cache(home)
    latents, skipped, sums = zip(*parts)
    labels[sum(skipped, [])] = -1
    return LatentSet([(array[:, 0], array[:, 1]) for array in latents], labels,
                     dataset.classes, torch.float16, sum(sums),
                     [dataset.name_of(image) for image in sum(skipped, [])],
                     f"{digest}-{home.name[-8:]}")


def find_cache(home, chunks, accept, rank):
    """`home`, or with `accept` the newest that differs from it in times alone."""
    others = sorted(home.parent.glob(f"{home.name[:-8]}*"), key=os.path.getmtime)
    whole = [other for other in others if is_whole(other, chunks)]
    if home in whole or not whole:
        return home
    if not accept and rank == 0:
        print(f"the times of the image files are not those of {whole[-1]}: latents are "
              "made anew; --accept-data would take the old ones", file=sys.stderr)
    return whole[-1] if accept else home


def is_whole(home, chunks):
    return all(open_chunk(home, images) for images in chunks)


def lock_cache(home, chunks):
    """For others to read as well, or to make it alone."""
    if is_whole(home, chunks):
        return share_cache(home)
    runtime.lock(home)
    os.utime(home)
    caches = home.parent.glob(f"*-{16 * '[0-9a-f]'}-{8 * '[0-9a-f]'}")
    for old in sorted(caches, key=os.path.getmtime)[:-KEPT]:
        with suppress(InputError, OSError):   # somebody reads it
            runtime.lock(old)
            shutil.rmtree(old)
            print(f"deleted {old}: the {KEPT} caches used last are kept", file=sys.stderr)


def share_cache(home):
    with suppress(OSError):   # on a disk that is only read
        runtime.lock(home, shared=True)
        os.utime(home)   # the time of its last use


def open_chunk(home, images):
    """Latents, images that were skipped and sums; None if missing or damaged."""
    file = home / f"{images[0]:08d}.npy"
    try:
        mark = runtime.read_json(file.with_suffix(".json"))
        skipped, sums = [*mark["skipped"]], torch.tensor(mark["sums"], dtype=torch.float64)
        latents = np.asarray(np.load(runtime.regular(file), mmap_mode="r"))
        shape = len(images), 2, 2, *latents.shape[3:]
        fits = (latents.shape == shape and latents.ndim == 6 and latents.dtype == np.float16
                and sums.shape == (4, shape[3]) and sums.isfinite().all()
                and {*skipped} <= {*images.tolist()})
    except Exception:   # of json, PyTorch or NumPy
        return None
    return (latents, skipped, sums) if fits else None


@torch.no_grad()
def write_chunk(home, images, parts, encode):
    """Encode the images of one chunk, write their latents, and then the .json."""
    file, blocks, seen = home / f"{images[0]:08d}.npy", [], []
    for part in parts:
        both = [torch.stack(encode(x), 1) for x in (part["x"], part["x"].flip(3))]
        blocks.append(torch.stack(both, 1).half().cpu())
        seen += part["index"].tolist()
    latents = torch.cat(blocks)
    if not latents.isfinite().all():
        raise InputError(f"images {images[0]} to {images[-1]} have latents beyond fp16: "
                         "the tokenizer is broken")
    whole = latents.new_zeros(len(images), *latents.shape[1:])
    whole[torch.tensor(seen) - images[0]] = latents
    with runtime.atomic(file) as temporary:
        with open(temporary, "wb+") as opened:   # NumPy's own would hide a full disk
            np.save(opened, whole.numpy())
    runtime.write_json(file.with_suffix(".json"), {
        "skipped": sorted({*images.tolist()} - {*seen}),
        "sums": channel_sums(latents).tolist()})


# ------------------------------------------------------------------------------
# The latents of LightningDiT's extract_features.py, in its own files.


def open_lightningdit_latents(folder: str | Path, channels: int) -> LatentSet:
    """*.safetensors with latents, latents_flip [n, C, h, w] and labels [n].

    Each latent is one draw of z.  latents_stats.pt has their mean and std.  InputError
    unless C is `channels`, as of the tokenizer.
    """
    files, stats = sorted(Path(folder).glob("*.safetensors")), Path(folder) / "latents_stats.pt"
    parts, labels, kinds = [], [], set()
    for path in files:
        tensors = checkpoints.read_safetensors(path)
        try:
            (images, dtype), (mirrored, other), (y, number) = (
                tensors[name] for name in ("latents", "latents_flip", "labels"))
        except KeyError as error:
            raise InputError(f"{path} has no {error}: is it LightningDiT's?") from None
        kinds |= {(images.shape[1:], dtype), (mirrored.shape[1:], other)}
        if (len(kinds) > 1 or images.ndim != 4 or len(images) != len(mirrored)
                or y.shape != images.shape[:1] or number.is_floating_point
                or not 0 <= y.min(initial=0) <= y.max(initial=0) < 10**6):
            raise InputError(f"{path}: latents and latents_flip must be [n, C, h, w] of "
                             "one kind, and labels [n] numbers from 0 on")
        parts.append((images[:, None], mirrored[:, None]))
        labels.append(y)
    if not sum(map(len, labels)):
        raise InputError(f"{folder} has no *.safetensors: give a folder of latents")
    if images.shape[1] != channels:
        raise InputError(f"{folder} has {images.shape[1]} channels, but the tokenizer {channels}")
    given = checkpoints.read(stats)
    try:
        mean, std = (given[key].double().view(images.shape[1]) for key in ("mean", "std"))
        known = mean.isfinite().all() and std.isfinite().all() and std.min() > 0
    except (KeyError, AttributeError, RuntimeError):
        known = False
    if not known:
        raise InputError(f"{stats} has no mean and std of {images.shape[1]} channels")
    one, zero = torch.ones_like(mean), torch.zeros_like(mean)
    sums = torch.stack([one, mean, mean**2 + std**2, zero])
    labels = np.concatenate(labels).astype(np.int64)
    classes = [str(label) for label in range(labels.max() + 1)]
    facts = [(p.name, p.stat().st_size, p.stat().st_mtime_ns) for p in (*files, stats)]
    digest = hashlib.sha256(repr(facts).encode()).hexdigest()
    return LatentSet(parts, labels, classes, dtype, sums, [], digest)
