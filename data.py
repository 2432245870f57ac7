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
import os
import struct
import sys
import zipfile
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
import torchvision
from numpy import ndarray
from PIL import Image
from torch import Tensor
from tqdm import tqdm

import checkpoints
import runtime
from runtime import InputError

Device = torch.device | str

# ------------------------------------------------------------------------------
# Pixels.  Every stage writes and scores images through this one rounding, so
# that a PNG, an .npz and a metric agree to the last grey level.


def to_uint8(x: Tensor) -> Tensor:
    """round(127.5 (x + 1)), clamped to 0..255."""
    return (127.5 * (x.float() + 1)).round().clamp(0, 255).to(torch.uint8)


def from_uint8(pixels: Tensor) -> Tensor:
    """pixels / 127.5 - 1, which `to_uint8` undoes exactly."""
    return pixels.float().div(127.5).sub(1)


# ------------------------------------------------------------------------------
# Random numbers without a state: a hash (the finaliser of SplitMix64, Steele et
# al. 2014) of a key and a counter.  There is no generator to send to a worker,
# nor one to restore.


def hash_bits(key, counter):
    """64 random bits for each (key, counter), which broadcast."""
    key = np.atleast_1d(key).astype(np.uint64)
    counter = np.atleast_1d(counter).astype(np.uint64)
    z = key + 0x9E3779B97F4A7C15 * (counter + 1)
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9
    z = (z ^ (z >> 27)) * 0x94D049BB133111EB
    return z ^ (z >> 31)


def uniform(seed, stream, counter, count):
    """`count` numbers in [0, 1) for each counter: [b, count]."""
    keys = hash_bits(hash_bits(seed % 2**63, stream), counter)
    bits = hash_bits(keys[:, None], np.arange(count))
    return (bits >> 40).astype(np.float32) / 2**24


def epoch_order(n, seed, epoch):
    """The permutation of range(n) in which an epoch visits the images."""
    key = hash_bits(hash_bits(seed % 2**63, 1), epoch)
    return np.argsort(hash_bits(key, np.arange(n)), kind="stable")


# ------------------------------------------------------------------------------
# The built-in data set: one coloured shape on a plain or softly shaded ground.
# A shape is a signed distance (negative inside) on [-1, 1]^2 with y down, and it
# fills about the unit disc.  Its edge is one and a half pixels wide, so that a
# scene is the same picture at any resolution.


def norm(x, y):
    return np.sqrt(x * x + y * y)


def star(x, y):
    """A pentagram: its points are outside at most one of five half-planes."""
    angles = np.arange(5, dtype=np.float32) * 2 * np.pi / 5
    sides = [np.sin(a) * x + np.cos(a) * y for a in angles]
    return np.partition(sides, 3, axis=0)[3] - 0.33


def cross(x, y):
    x, y = abs(x), abs(y)
    return np.maximum(np.minimum(x, y) - 0.3, np.maximum(x, y) - 0.95)


def heart(x, y):
    """A square on its corner, and a disc on each of its upper sides."""
    x = abs(x)
    return np.minimum((x + abs(y - 0.1)) / 1.41, norm(x - 0.41, y + 0.31)) - 0.58


def bars(x, y):
    middle = 0.64 * np.clip(np.rint(x / 0.64), -1, 1)
    return np.maximum(abs(y) - 0.85, abs(x - middle) - 0.19)


SHAPES = {
    "disc": lambda x, y: norm(x, y) - 0.9,
    "square": lambda x, y: np.maximum(abs(x), abs(y)) - 0.78,
    "triangle": lambda x, y: np.maximum(0.866 * abs(x) - 0.5 * y, y) - 0.52,
    "star": star,
    "ring": lambda x, y: abs(norm(x, y) - 0.7) - 0.23,
    "cross": cross,
    "heart": heart,
    "crescent": lambda x, y: np.maximum(norm(x, y) - 0.95, 0.78 - norm(x - 0.5, y)),
    "hourglass": lambda x, y: np.maximum(
        abs(y) - 0.85, 0.75 * (abs(x) - 0.9 * abs(y)) - 0.08),
    "bars": bars,
}


def colour(lightness, hue, chroma):
    """RGB of a hue in turns: [b, 1, 1, 1] each -> [b, 3, 1, 1]."""
    thirds = np.arange(3, dtype=np.float32)[:, None, None] / 3
    return lightness + chroma * np.cos(2 * np.pi * (hue + thirds))


def distances(labels, x, y):
    """The signed distance of row i to the shape of labels[i]: [b, s, s]."""
    out = np.empty(x.shape, dtype=np.float32)
    for label, distance in enumerate(SHAPES.values()):
        rows = labels == label
        out[rows] = distance(x[rows], y[rows])
    return out


NUMBERS = 11   # in [0, 1), of which a scene is made


def render_scenes(u, size):
    """One scene for each row of u [b, NUMBERS], whose first number is the label.

    Returns images uint8 [b, 3, size, size], labels int64 [b], and how much of
    each pixel the shape covers, [b, size, size] in [0, 1].
    """
    columns = iter(u.T[:, :, None, None])
    line = (np.arange(size, dtype=np.float32) + 0.5) * (2 / size) - 1
    x, y = line[None, None, :], line[None, :, None]

    def draw(low, high):   # [b, 1, 1]
        return low + (high - low) * next(columns)

    # The shape's own coordinates are those of the image, moved, turned and scaled.
    labels = draw(0, len(SHAPES)).astype(int).ravel()
    radius, angle = draw(0.6, 0.8), draw(-0.25, 0.25)
    dx, dy = x - draw(-0.15, 0.15), y - draw(-0.15, 0.15)
    cos, sin = np.cos(angle) / radius, np.sin(angle) / radius
    distance = radius * distances(labels, cos * dx + sin * dy, cos * dy - sin * dx)
    t = np.clip(0.5 - distance * (size / 3), 0, 1)
    mask = t * t * (3 - 2 * t)   # smoothstep

    # The ground is plain in one half of the images.  The shape differs from it in
    # lightness and in hue.
    ground, hue, direction = draw(0.2, 0.8), draw(0, 1), draw(0, 2 * np.pi)
    slope = np.maximum(draw(-0.15, 0.15), 0)
    shade = ground + slope * (np.cos(direction) * x + np.sin(direction) * y)
    front = ground + np.copysign(draw(0.3, 0.4), 0.5 - ground)
    below = colour(shade[:, None], hue[:, None], 0.12)
    above = colour(front[:, None], (hue + draw(0.3, 0.7))[:, None], 0.3)
    image = below + mask[:, None] * (above - below)
    return (255 * np.clip(image, 0, 1) + 0.5).astype(np.uint8), labels, mask


class Shapes:
    """Scenes, each of them a function of (seed, split, index), with their shapes.

    Any index >= 0 can be rendered; `length` says how many make an epoch.
    """

    name, classes, note = "shapes", list(SHAPES), ""

    def __init__(self, size: int, split: str, seed: int = 0) -> None:
        self.size, self.split, self.seed = size, split, seed
        self.length = 100_000 if split == "train" else 2_000

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        images, labels, _ = self.render_batch([index])
        return images[0], int(labels[0])

    def render_batch(self, indices: ndarray) -> tuple[Tensor, ...]:
        """images uint8 [b, 3, s, s], labels [b], masks [b, s, s] in [0, 1]."""
        u, s = self.numbers(indices, NUMBERS), self.size
        piece = max(1, 2**16 // s**2)   # so many images fit the cache of a CPU
        parts = [render_scenes(u[i:i + piece], s) for i in range(0, len(u), piece)]
        return tuple(torch.from_numpy(np.concatenate(part)) for part in zip(*parts))

    def numbers(self, indices, count):
        stream = 10 if self.split == "train" else 11
        return uniform(self.seed, stream, np.asarray(indices), count)

    def labels(self, indices: ndarray) -> Tensor:
        first = self.numbers(indices, 1)[:, 0]
        return torch.from_numpy((first * len(SHAPES)).astype(int))

    def read(self, indices: ndarray, places: ndarray) -> list[Tensor]:
        return list(self.render_batch(indices)[0])


# ------------------------------------------------------------------------------
# Pictures have the interface of Shapes.  Their read() gives uint8 [3, s, s] for
# each index, or None for a file that is no image.  A place (across, down) in
# [0, 1) is where the crop lies.

CENTRE = (0.499999, 0.499999)   # puts r // 2 of a margin of r pixels before the crop
FORMATS = ("JPEG", "PNG", "WEBP")
ENDINGS = (".jpg", ".jpeg", ".png", ".webp")


def adm_crop(image: Image.Image, size: int, place: tuple = CENTRE) -> Image.Image:
    """The crop of ADM (Dhariwal and Nichol 2021), which published FIDs refer to.

    Halve the image with a box filter while its short side has 2 * size pixels or
    more, make that side `size` with a bicubic filter, and crop.
    """
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

    def read(self, indices: ndarray, places: ndarray) -> list[Tensor | None]:
        images = []
        for index, place in zip(indices, places, strict=True):
            try:
                image = self.open_image(index)
            except Exception:   # Pillow raises anything from OSError to SyntaxError
                images.append(None)
            else:
                pixels = np.array(adm_crop(image, self.size, place))
                images.append(torch.from_numpy(pixels).permute(2, 0, 1).contiguous())
        return images

    def open_image(self, index):
        return Image.fromarray(self.pixels[index])


class Cifar10(Pictures):
    """CIFAR-10 in `root`, or downloaded there; its 10_000 test images are val."""

    def __init__(self, size: int, split: str, root: str) -> None:
        try:
            cifar = torchvision.datasets.CIFAR10(root, split == "train", download=True)
        except Exception as error:   # from URLError to a tar file that ends too early
            reason = " ".join(str(error).split())
            raise InputError(f"cifar10 is not in {root} and cannot be downloaded "
                             f"({reason}): put it there") from None
        targets = np.array(cifar.targets)
        super().__init__("cifar10", size, split, cifar.classes, targets, cifar.data)


class Folder(Pictures):
    """Files of a folder: {class: names relative to `folder`}."""

    def __init__(self, name, size, split, folder, files):
        counts = [len(part) for part in files.values()]
        targets = np.repeat(np.arange(len(files)), counts)
        super().__init__(name, size, split, list(files), targets)
        self.folder = folder
        # One array: a million Python strings would be copied into every worker.
        self.files = np.array([os.fsencode(f) for part in files.values() for f in part])

    def open_image(self, index):
        with Image.open(self.name_of(index), formats=FORMATS) as image:
            if image.mode.startswith("I;16"):   # of 16 bits, which Pillow would clip
                image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
            return image.convert("RGB")

    def name_of(self, index: int) -> str:
        return os.path.join(self.folder, os.fsdecode(self.files[index]))


class ArraySamples(Pictures):
    """arr_0 of an .npz, uint8 [N, S, S, 3], in which samples are kept."""

    def __init__(self, path: str) -> None:
        array = open_array(path, "arr_0")
        kind, shape = array.dtype, list(array.shape)
        if kind != np.uint8 or len(shape) != 4 or shape[2:] != [shape[1], 3]:
            raise InputError(f"{path}: arr_0 must be uint8 [N, S, S, 3], not {kind} {shape}")
        targets = np.zeros(len(array), dtype=int)
        super().__init__(path, shape[1], "", [""], targets, array)


def open_array(path, key):
    """One array of an .npz, memory-mapped unless the file is compressed."""
    try:
        with zipfile.ZipFile(path) as archive, open(path, "rb") as file:
            entry = archive.getinfo(f"{key}.npy")
            if entry.compress_type != zipfile.ZIP_STORED:
                return np.load(path)[key]
            # An entry has 30 bytes.  The last 4 are the lengths of a name and of
            # an extra field; these come next, and then the array.
            file.seek(entry.header_offset + 26)
            file.seek(sum(struct.unpack("<HH", file.read(4))), os.SEEK_CUR)
            np.lib.format.read_magic(file)
            shape, fortran, kind = np.lib.format.read_array_header_1_0(file)
            return np.memmap(file, kind, "r", file.tell(), shape, "CF"[fortran])
    except (OSError, ValueError, KeyError, zipfile.BadZipFile) as error:
        raise InputError(f"{path} is no .npz file with {key}: {error}") from None


# ------------------------------------------------------------------------------
# Opening by name.

Dataset = Shapes | Pictures


def open_dataset(name: str, size: int, split: str, seed: int = 0,
                 classes: list[str] | None = None,
                 root: str = "runs/data") -> Dataset:
    """The images `name` at size x size pixels; split is "train" or "val".

    name: "shapes", which `seed` varies; "cifar10", kept in `root`; or a folder.
    This has JPEG, PNG or WebP images in one folder per class, or they lie in it
    and are one class.  Or it has train/ and val/ (or test/), which are like that.
    Without val/ and test/ the split val is the same as train, as stderr then says.
    classes: the names of the classes, by default those of the folders, sorted.
    """
    if name == "shapes":
        return Shapes(size, split, seed)
    if name == "cifar10":
        return Cifar10(size, split, root)
    if not os.path.isdir(name):
        raise InputError(f"data '{name}' is neither shapes nor cifar10 nor a folder")
    dataset = open_folder(name, size, split, classes)
    if dataset.note and os.environ.get("RANK", "0") == "0":
        print(dataset.note, file=sys.stderr)
    return dataset


def open_folder(name, size, split, classes):
    home, parts = name, subfolders(name)
    if parts and {*parts} <= {"train", "val", "test"}:
        home = os.path.join(name, "train")
        if "train" not in parts:
            raise InputError(f"{name} has no train/: add it, or give {name}/{parts[0]}")
    held_out = [part for part in ("val", "test") if part in parts and home != name]
    folder = os.path.join(name, held_out[0]) if split == "val" and held_out else home
    present = subfolders(folder)
    classes = classes or subfolders(home) or [os.path.basename(os.path.abspath(name))]
    if {*present} - {*classes} or (len(classes) > 1 and not present):
        raise InputError(f"{folder} must have a folder for each class ({classes[0]}, "
                         f"...), and has {present[:3] or 'none'}")
    files = {c: images_in(folder, c if present else "") for c in classes}
    if not any(files.values()):
        raise InputError(f"{folder} has no {' '.join(ENDINGS)}, neither in itself "
                         f"nor in its folders {present[:3]}")
    dataset = Folder(name, size, split, folder, files)
    if split == "val" and not held_out:
        dataset.note = f"{name} has no val/ or test/: val is the same as train"
    return dataset


def subfolders(folder):
    return sorted(e.name for e in os.scandir(folder) if e.is_dir() and e.name[0] != ".")


def images_in(folder, part):
    path = os.path.join(folder, part)
    names = sorted(os.listdir(path)) if os.path.isdir(path) else []
    return [os.path.join(part, name) for name in names
            if name.lower().endswith(ENDINGS) and name[0] != "."]


def open_images(source: str, size: int | None = None, split: str = "train",
                seed: int = 0) -> Dataset:
    """Images to be scored: the array of an .npz, or what `open_dataset` opens.

    Without `size` a folder keeps its own, and the built-in sets have 32 pixels.
    """
    if source.endswith(".npz"):
        return ArraySamples(source)
    if size is None:
        size = 32 if source in ("shapes", "cifar10") else folder_size(source)
    return open_dataset(source, size, split, seed)


def folder_size(folder):
    """The one side of all images in a folder, which must be squares."""
    files = [file for file in Path(folder).rglob("*") if file.suffix.lower() in ENDINGS]
    try:
        sizes = {Image.open(file, formats=FORMATS).size for file in files}
    except OSError as error:
        raise InputError(f"{folder}: {error}: remove that file") from None
    width, height = min(sizes, default=(0, 1))
    if len(sizes) > 1 or width != height:
        raise InputError(f"{folder} must hold squares of one size, and holds "
                         f"{sorted(sizes)[:3] or 'none'}: give the --size of a crop")
    return width


# ------------------------------------------------------------------------------
# Batches.  Position p of a run is image p % n of epoch p // n.  Batch k has the
# positions from k * batch up to (k + 1) * batch, across the borders of epochs,
# and a rank takes every world-th of them.  A plan says for each batch which images
# it has, and at which positions they are.


def batches(dataset: Dataset, batch: int, seed: int = 0, start: int = 0,
            rank: int = 0, world: int = 1, workers: int = 0, augment: bool = True,
            device: Device = "cpu") -> Iterator[dict]:
    """Endless batches from number `start` on, of `batch` images on all ranks.

    Yields x [b, 3, s, s] in [-1, 1] and y [b] on `device`, index [b], pixels (x as
    uint8), and skipped, the names of images that cannot be read.  These are left
    out, so that b may be less than batch / world.
    augment: crop at random, and mirror one half of the images.
    """
    plan = training_plan(len(dataset), batch, seed, start, rank, world)
    return load(Reader(dataset, seed, augment), plan, workers, device)


def once(dataset: Dataset, batch: int, rank: int = 0, world: int = 1,
         workers: int = 0, limit: int | None = None,
         device: Device = "cpu") -> Iterator[dict]:
    """Every image once over all ranks, cropped at the centre; else as `batches`.

    limit: only so many images, spread evenly over the data set.
    """
    n = len(dataset)
    count = min(limit or n, n)
    mine = (np.arange(count) * n // count)[rank::world]
    return load(Reader(dataset), in_batches(mine, batch), workers, device)


def in_batches(indices, batch):
    parts = [indices[i:i + batch] for i in range(0, len(indices), batch)]
    return zip(parts, parts)


def training_plan(n, batch, seed, start, rank, world):
    if batch % world:
        raise InputError(f"--batch {batch} must be a multiple of {world} processes")
    order = functools.lru_cache(2)(lambda epoch: epoch_order(n, seed, epoch))
    for k in itertools.count(start):
        positions = np.arange(k * batch + rank, (k + 1) * batch, world)
        epochs, places = np.divmod(positions, n)
        parts = [order(epoch)[places[epochs == epoch]] for epoch in np.unique(epochs)]
        yield np.concatenate(parts), positions


class Reader:
    """Makes a batch of bytes from an entry of a plan, as a worker does it."""

    def __init__(self, dataset, seed=0, augment=False):
        self.dataset, self.seed, self.augment = dataset, seed, augment

    def __getitem__(self, entry):
        indices, positions = entry   # of the plan
        u = uniform(self.seed, 2, positions, 3).astype(float)
        places = u[:, :2] if self.augment else [CENTRE] * len(u)
        images = self.dataset.read(indices, places)
        kept = np.array([image is not None for image in images])
        size = self.dataset.size
        blank = torch.zeros(3, size, size, dtype=torch.uint8)
        pixels = torch.stack([blank if image is None else image for image in images])
        if self.augment:
            flipped = torch.from_numpy(u[:, 2] < 0.5)
            pixels[flipped] = pixels[flipped].flip(3)
        return {"pixels": pixels[kept], "y": self.dataset.labels(indices[kept]),
                "index": torch.from_numpy(indices[kept]),
                "skipped": [self.dataset.name_of(index) for index in indices[~kept]]}


def load(reader, plan, workers, device):
    """Read in other processes, if there are any; what travels is bytes."""
    parts = map(reader.__getitem__, plan)
    if workers > 0:
        # Without a generator of its own it would draw a number from the global one.
        parts = torch.utils.data.DataLoader(
            reader, batch_size=None, sampler=plan, num_workers=workers,
            pin_memory=torch.device(device).type == "cuda", generator=torch.Generator())
    for part in parts:
        if not len(part["y"]):
            raise InputError(f"{part['skipped'][0]} cannot be read, nor can any other "
                             "image of its batch: remove them, or mend the disk")
        pixels, y = (part[key].to(device, non_blocking=True) for key in ("pixels", "y"))
        yield part | {"x": from_uint8(pixels), "y": y}


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
# The cache of latents.  The name of its folder is a hash of all that the latents
# depend on, so that a wrong cache is never found.  For every chunk of images it
# has a file [image, mirrored or not, mean or std, C, h, w] in fp16, and a .json
# that is written after it.  After a run that was killed the next one makes the
# chunks that have no .json, whatever its number of processes.

CHUNK = 1024   # images


def fingerprint(dataset: Dataset) -> str:
    """A hash of what the images are, wherever they lie.

    It takes the content of an array, but opens no file of a folder: of these it
    takes the names, the sizes and the times of modification.
    """
    facts = (dataset.size, dataset.split, len(dataset), dataset.classes,
             getattr(dataset, "seed", None))
    digest = hashlib.sha256(repr(facts).encode())
    if isinstance(dataset, Cifar10):
        digest.update(dataset.pixels.tobytes() + dataset.targets.tobytes())
    if isinstance(dataset, ArraySamples):
        digest.update(runtime.file_sha256(dataset.name).encode())
    for index, file in enumerate(getattr(dataset, "files", [])):
        status = os.stat(dataset.name_of(index))
        digest.update(b"%b\0%d\0%d\0" % (file, status.st_size, status.st_mtime_ns))
    return digest.hexdigest()


def cache_latents(folder: str | Path, dataset: Dataset, encode: Callable,
                  key: dict[str, str], batch: int, rank: int = 0, world: int = 1,
                  workers: int = 0, device: Device = "cpu",
                  barrier: Callable = runtime.barrier) -> LatentSet:
    """The latents of all images from `folder`; those that are missing are made.

    encode: x [b, 3, H, W] -> mean, std [b, C, h, w]; b is at most `batch`.
    key: what latents depend on besides the images, as {"tokenizer": its sha256}.
    All processes call this.  fp16 has steps of 0.004 at |z| = 5, which is little
    beside the noise of the paper's tokenizers, whose deviation is 0.24.
    """
    try:
        key = {**key, "data": fingerprint(dataset), "dtype": "fp16", "chunk": CHUNK}
        digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()
        home, n = Path(folder) / f"{dataset.split}-{digest[:16]}", len(dataset)
        files = [home / f"{start:08d}.npy" for start in range(0, n, CHUNK)]
        todo = [f for f in files[rank::world] if not f.with_suffix(".json").exists()]
        for file in tqdm(todo, "latents", unit="chunk", disable=rank > 0):
            start = int(file.stem)
            images = np.arange(start, min(start + CHUNK, n))
            plan = in_batches(images, batch)
            parts = load(Reader(dataset), plan, workers, device)
            write_chunk(file, images, parts, encode)
        barrier()
        marks = [json.loads(file.with_suffix(".json").read_text()) for file in files]
        arrays = [np.asarray(np.load(file, mmap_mode="r")) for file in files]
    except OSError as error:
        raise InputError(f"latents cannot be kept in {folder} ({error}): mend that, "
                         "and give the same command again") from None
    skipped = [image for mark in marks for image in mark["skipped"]]
    labels = dataset.labels(np.arange(n)).numpy().copy()
    labels[skipped] = -1
    return LatentSet([(array[:, 0], array[:, 1]) for array in arrays], labels,
                     dataset.classes, torch.float16,
                     sum(torch.tensor(mark["sums"], dtype=float) for mark in marks),
                     [dataset.name_of(image) for image in skipped], digest)


@torch.no_grad()
def write_chunk(file, images, parts, encode):
    """Encode the images of one chunk, write their latents, and then the .json."""
    blocks, seen = [], []
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
        np.save(temporary, whole.numpy())
    runtime.write_json(file.with_suffix(".json"), {
        "skipped": sorted({*images.tolist()} - {*seen}),
        "sums": channel_sums(latents).tolist()})


# ------------------------------------------------------------------------------
# The latents of LightningDiT's extract_features.py, in its own files.


def open_lightningdit_latents(folder: str | Path) -> LatentSet:
    """*.safetensors with latents, latents_flip [n, C, h, w] and labels [n].

    Each latent is one draw of z.  latents_stats.pt has their mean and std.
    """
    parts, labels, kinds = [], [], set()
    for path in sorted(Path(folder).glob("*.safetensors")):
        tensors = checkpoints.read_safetensors(path)
        try:
            (images, dtype), (mirrored, other), (y, _) = (
                tensors[name] for name in ("latents", "latents_flip", "labels"))
        except KeyError as error:
            raise InputError(f"{path} has no {error}: is it LightningDiT's?") from None
        kinds |= {(images.shape[1:], dtype), (mirrored.shape[1:], other)}
        equal = len(kinds) == 1 and len(images) == len(mirrored) == len(y)
        if not equal or images.ndim != 4 or y.dtype.kind != "i" or y.min() < 0:
            raise InputError(f"{path}: latents and latents_flip must be [n, C, h, w] of "
                             "one kind, and labels [n] numbers from 0 on")
        parts.append((images[:, None], mirrored[:, None]))
        labels.append(y)
    if not parts:
        raise InputError(f"{folder} has no *.safetensors: give a folder of latents")
    stats = Path(folder) / "latents_stats.pt"
    given = checkpoints.read(stats)
    try:
        mean, std = (given[key].double().view(images.shape[1]) for key in ("mean", "std"))
    except (KeyError, RuntimeError):
        raise InputError(f"{stats} has no mean and std of {images.shape[1]} "
                         "channels") from None
    one, zero = torch.ones_like(mean), torch.zeros_like(mean)
    sums = torch.stack([one, mean, mean**2 + std**2, zero])
    labels = np.concatenate(labels).astype(np.int64)
    classes = [str(label) for label in range(labels.max() + 1)]
    return LatentSet(parts, labels, classes, dtype, sums, [])
