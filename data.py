"""Images and cached latents in, batches out: procedural shapes, CIFAR-10, or a directory of class folders.

The order of an epoch, the crops and the flips are pure functions of (seed, position): a run sees the same
images whatever the number of processes and workers, and resumed at step k it continues exactly.  Images are
uint8 in storage and in transit; `x` is float32 in [-1, 1].

    dataset = open_dataset("shapes", size=32, split="train")
    for batch in batches(dataset, batch=64): batch["x"], batch["y"]         # endless, shuffled, augmented
    for batch in once(dataset, batch=64): ...                               # every image once, centre crop

The diffusion transformer trains on latents, which a frozen tokenizer has encoded once and for all:

    latents = cache_latents("runs/latents", dataset, encode, {"tokenizer": sha256}, batch=64)
    for batch in latent_batches(latents, batch=64, seed=0): batch["mean"], batch["std"], batch["y"]
"""

import hashlib
import io
import itertools
import json
import math
import os
import shutil
import sys
import tempfile
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
import torchvision
from numpy import ndarray
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from runtime import InputError

Batch = dict[str, Tensor | list[str]]

# ------------------------------------------------------------------------------------------------------------
# Pixels.  Every stage writes and scores images through this one rounding, so that a PNG, an .npz and a metric
# agree to the last grey level.


def to_uint8(x: Tensor) -> Tensor:
    """round(127.5 * (x + 1)), clamped to 0..255.  x: float in [-1, 1], any shape.  Returns: uint8."""
    return (127.5 * (x.float() + 1)).round().clamp(0, 255).to(torch.uint8)


def from_uint8(pixels: Tensor) -> Tensor:
    """pixels / 127.5 - 1, float32 in [-1, 1]; `to_uint8` undoes it exactly."""
    return pixels.float().div(127.5).sub(1)


# ------------------------------------------------------------------------------------------------------------
# Randomness without state: a 64-bit hash (the finaliser of SplitMix64, Steele et al. 2014) of seed, stream
# and counter.  It is vectorised over counters, and leaves no generator to send to a worker or to restore.


def hash_bits(key: int | ndarray, counter: int | ndarray) -> ndarray:
    """64 pseudo-random bits for each (key, counter), which broadcast.  Returns: uint64."""
    key, counter = np.atleast_1d(key).astype(np.uint64), np.atleast_1d(counter).astype(np.uint64)
    z = key + 0x9E3779B97F4A7C15 * (counter + 1)
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9
    z = (z ^ (z >> 27)) * 0x94D049BB133111EB
    return z ^ (z >> 31)


def uniform(seed: int, stream: int, counter: ndarray, count: int) -> ndarray:
    """`count` numbers in [0, 1) for each counter, pure in (seed, stream, counter): [b, count]."""
    keys = hash_bits(hash_bits(seed % 2**63, stream), counter)
    return (hash_bits(keys[:, None], np.arange(count)) >> 40).astype(np.float32) / 2**24


def epoch_order(n: int, seed: int, epoch: int) -> ndarray:
    """The permutation of range(n) in which training visits the images of one epoch."""
    return np.argsort(hash_bits(hash_bits(hash_bits(seed % 2**63, 1), epoch), np.arange(n)), kind="stable")


# ------------------------------------------------------------------------------------------------------------
# The built-in data set: a textured shape on a textured ground among smaller shapes.  Everything is a signed
# distance (negative inside) on [-1, 1]^2, y down, drawn with an edge of about one pixel, so that a scene is
# the same picture at any resolution.  A shape fills about the unit disc.


def norm(x: ndarray, y: ndarray) -> ndarray:
    return np.sqrt(x * x + y * y)


def either(a: ndarray, b: ndarray) -> ndarray:
    """Inside exactly one of two."""
    return np.maximum(np.minimum(a, -b), np.minimum(-a, b))


def stripes(x: ndarray, period: ndarray) -> ndarray:
    return abs(x - period * np.rint(x / period)) - period / 4


def star(x: ndarray, y: ndarray) -> ndarray:
    """A pentagram: the points outside at most one of five half-planes, hence the second largest distance."""
    angles = np.arange(5, dtype=np.float32) * 2 * np.pi / 5
    return np.partition([np.sin(a) * x + np.cos(a) * y for a in angles], 3, axis=0)[3] - 0.33


SHAPES: dict[str, Callable[..., ndarray]] = {
    "disc": lambda x, y: norm(x, y) - 0.9,
    "square": lambda x, y: np.maximum(abs(x), abs(y)) - 0.78,
    "triangle": lambda x, y: np.maximum(0.866 * abs(x) - 0.5 * y, y) - 0.52,
    "star": star,
    "ring": lambda x, y: abs(norm(x, y) - 0.7) - 0.23,
    "cross": lambda x, y: np.maximum(np.minimum(abs(x), abs(y)) - 0.3, np.maximum(abs(x), abs(y)) - 0.95),
    "heart": lambda x, y: np.minimum((abs(x) + abs(y - 0.1)) / 1.41, norm(abs(x) - 0.41, y + 0.31)) - 0.58,
    "crescent": lambda x, y: np.maximum(norm(x, y) - 0.95, 0.78 - norm(x - 0.5, y)),
    "hourglass": lambda x, y: np.maximum(abs(y) - 0.85, 0.75 * (abs(x) - 0.9 * abs(y)) - 0.08),
    "bars": lambda x, y: np.maximum(abs(y) - 0.85, abs(x - 0.64 * np.clip(np.rint(x / 0.64), -1, 1)) - 0.19),
}
# A texture is the softness of its edge (0: one pixel) and a distance, from coordinates, period and phase.
TEXTURES: dict[str, tuple[float, Callable[..., ndarray]]] = {
    "gradient": (1.4, lambda x, y, p, w: x),
    "noise": (2.0, lambda x, y, p, w: sum(np.cos((m * x + n * y) / (p + 0.2) + q * w)
                                          for m, n, q in ((1, 4, 1), (3, -2, 2), (5, 3, 3)))),
    "stripes": (0, lambda x, y, p, w: stripes(x + w, p)),
    "checks": (0, lambda x, y, p, w: either(stripes(x + w, p), stripes(y, p))),
    "dots": (0, lambda x, y, p, w: norm(stripes(x + w, p) + p / 4, stripes(y, p) + p / 4) - 0.33 * p),
    "rings": (0, lambda x, y, p, w: stripes(norm(x + np.sin(w), y + np.cos(w)), p)),
}


def by_kind(kind: ndarray, functions: list[Callable[..., ndarray]], *parts: ndarray) -> ndarray:
    """functions[kind[i]] of the i-th row of every part, each function called once.  Returns: [b, s, s]."""
    out = np.empty(np.broadcast_shapes(*(part.shape for part in parts)), dtype=np.float32)
    for k in np.unique(kind):
        out[kind.ravel() == k] = functions[k](*(part[kind.ravel() == k] for part in parts))
    return out


def render_scenes(u: ndarray, size: int) -> tuple[ndarray, ndarray, ndarray]:
    """One scene for each row of u, back to front: ground, three shapes, the foreground, a glassy shape.

    u: [b, 80] in [0, 1), used from left to right, the label first.
    Returns: images uint8 [b, 3, size, size], labels int64 [b], foreground coverage [b, size, size] in [0, 1].
    """
    columns = iter(u.T[:, :, None, None])
    line = (np.arange(size, dtype=np.float32) + 0.5) * (2 / size) - 1
    edge = np.float32(3 / size)                                                 # one and a half pixels
    x, y = line[None, None, :], line[None, :, None]

    def draw(low: float = 0, high: float = 1) -> ndarray:                       # [b, 1, 1]
        return low + (high - low) * next(columns)

    def pick(table: dict) -> ndarray:
        return draw(0, len(table)).astype(int)

    def turned(x: ndarray, y: ndarray, angle: ndarray) -> tuple[ndarray, ndarray]:
        return np.cos(angle) * x + np.sin(angle) * y, np.cos(angle) * y - np.sin(angle) * x

    def coverage(distance: ndarray, softness: ndarray) -> ndarray:              # smoothstep
        t = np.clip(0.5 - distance / np.maximum(softness, edge), 0, 1)
        return t * t * (3 - 2 * t)

    def shape(kind: ndarray, radius: ndarray, reach: float) -> ndarray:
        a, b = turned(x - draw(-reach, reach), y - draw(-reach, reach), draw(-0.6, 0.6))
        return coverage(radius * by_kind(kind, [*SHAPES.values()], a / radius, b / radius), edge)[:, None]

    def colour(lightness: ndarray, hue: ndarray, chroma: float) -> ndarray:     # [b, 3, 1, 1]
        thirds = np.arange(3, dtype=np.float32)[:, None, None] / 3
        return lightness[:, None] + chroma * np.cos(2 * np.pi * (hue[:, None] + thirds))

    def paint(lightness: ndarray, hue: ndarray) -> ndarray:                     # [b, 3, s, s]
        kind, contrast = pick(TEXTURES), draw(0.14, 0.24)
        softness, patterns = zip(*TEXTURES.values(), strict=True)
        distance = by_kind(kind, patterns, *turned(x, y, draw(0, 6.28)), draw(0.4, 0.8), draw(0, 6.28))
        dark = colour(lightness - contrast, hue, 0.2)
        light = colour(lightness + contrast, hue + draw(-0.15, 0.15), 0.2)
        return dark + (light - dark) * coverage(distance, np.float32(softness)[kind])[:, None]

    def small(image: ndarray, radius: ndarray, opacity: ndarray) -> ndarray:
        top = colour(draw(0.2, 0.8), draw(), 0.3)
        return image + opacity[:, None] * shape(pick(SHAPES), radius, 0.95) * (top - image)

    labels, ground, hue = pick(SHAPES), draw(0.25, 0.75), draw()
    front = ground + np.copysign(draw(0.25, 0.4), 0.5 - ground)
    image = paint(ground, hue)
    for _ in range(3):
        image = small(image, draw(0.12, 0.32), draw(0.6, 1))
    foreground = shape(labels, draw(0.45, 0.7), 0.3)
    image = image + foreground * (paint(front, hue + draw(0.3, 0.7)) - image)
    image = small(image, draw(0.12, 0.24), draw(0.35, 0.6))
    return (255 * np.clip(image, 0, 1) + 0.5).astype(np.uint8), labels.ravel(), foreground[:, 0]


# ------------------------------------------------------------------------------------------------------------
# Data sets.  Each has len(), .name, .size, .split, .classes, .note, .labels(indices), dataset[i] -> (uint8
# [3, s, s], label), and read(indices, places): a uint8 [3, s, s] each, or None where a file is unreadable.  A
# place is (across, down) in [0, 1); CENTRE is just below one half: of a margin r, r // 2 is before the crop.

CENTRE = np.full((1, 2), 0.499999)
ENDINGS = (".jpg", ".jpeg", ".png", ".webp")


class Shapes:
    """An endless set of scenes, each a function of (seed, split, index); the label is the foreground's shape.

    The length is nominal (100_000 train, 2_000 val): any index >= 0 can be rendered.
    """

    name, classes, note = "shapes", list(SHAPES), ""

    def __init__(self, size: int, split: str, seed: int = 0) -> None:
        self.size, self.split, self.seed = size, split, seed

    def __len__(self) -> int:
        return 100_000 if self.split == "train" else 2_000

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.render(index)[:2]

    def render(self, index: int) -> tuple[Tensor, int, Tensor]:
        """image uint8 [3, s, s], label, foreground coverage [s, s] in [0, 1] (under the glassy shape)."""
        images, labels, masks = self.render_batch([index])
        return images[0], int(labels[0]), masks[0]

    def render_batch(self, indices: list[int] | ndarray) -> tuple[Tensor, Tensor, Tensor]:
        """images uint8 [b, 3, s, s], labels [b], masks [b, s, s]; rendered in pieces that fit a CPU cache."""
        u, piece = self.numbers(indices, 80), max(1, 2**16 // self.size**2)
        parts = [render_scenes(u[i:i + piece], self.size) for i in range(0, len(u), piece)]
        return tuple(torch.from_numpy(np.concatenate(part)) for part in zip(*parts, strict=True))

    def numbers(self, indices: list[int] | ndarray, count: int) -> ndarray:
        return uniform(self.seed, 10 if self.split == "train" else 11, np.asarray(indices), count)

    def labels(self, indices: list[int] | ndarray) -> Tensor:
        return torch.from_numpy((self.numbers(indices, 1)[:, 0] * len(SHAPES)).astype(int))

    def read(self, indices: ndarray, places: ndarray) -> list[Tensor | None]:
        return list(self.render_batch(indices)[0])


class Pictures:
    """Labelled Pillow images: what CIFAR-10 and a folder share.  Subclasses define open_image(index)."""

    note = ""

    def __init__(self, name: str, size: int, split: str, classes: list[str], targets: ndarray) -> None:
        self.name, self.size, self.split, self.classes, self.targets = name, size, split, classes, targets

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        image, = self.read([index], CENTRE)
        if image is None:
            raise InputError(f"{self.name_of(index)} cannot be read as an image: replace or remove it")
        return image, int(self.targets[index])

    def labels(self, indices: list[int] | ndarray) -> Tensor:
        return torch.from_numpy(self.targets[indices])

    def read(self, indices: list[int] | ndarray, places: ndarray) -> list[Tensor | None]:
        images = []
        for index, place in zip(indices, places, strict=True):
            try:
                image = self.open_image(index)
            except Exception:                   # Pillow's decoders raise anything from OSError to SyntaxError
                images.append(None)
            else:
                pixels = torch.from_numpy(np.array(adm_crop(image, self.size, *place)))
                images.append(pixels.permute(2, 0, 1).contiguous())
        return images


class Cifar10(Pictures):
    """CIFAR-10 by torchvision, in `root` or downloaded there; its 10_000 test images are val."""

    def __init__(self, size: int, split: str, root: str) -> None:
        source = torchvision.datasets.CIFAR10
        target = os.path.join(root, source.base_folder)
        try:
            if not os.path.isdir(target):
                os.makedirs(root, exist_ok=True)
                with tempfile.TemporaryDirectory(dir=root) as fresh:            # nothing is left half-written
                    source(fresh, download=True)
                    if not os.path.isdir(target):                               # another rank can be faster
                        shutil.move(os.path.join(fresh, source.base_folder), root)
            data = source(root, train=split == "train")
        except Exception as error:              # from URLError to a tar file that ends too early
            reason = " ".join(f"{type(error).__name__}: {error}".split())
            raise InputError(f"cifar10 was neither found in {root} nor downloaded ({reason}): put an intact "
                             f"{source.base_folder}/ there, or give shapes or a directory") from None
        super().__init__("cifar10", size, split, data.classes, np.array(data.targets))
        self.pixels = data.data

    def open_image(self, index: int) -> Image.Image:
        return Image.fromarray(self.pixels[index])


class Folder(Pictures):
    """Images in class folders, sorted by class and by name; `open_dataset` says which folders."""

    def __init__(self, name: str, size: int, split: str, folder: str, files: dict[str, list[str]]) -> None:
        targets = np.repeat(np.arange(len(files)), [len(part) for part in files.values()])
        super().__init__(name, size, split, list(files), targets)
        self.folder = folder
        # One array of bytes: a million Python strings would be copied, page by page, into every worker.
        self.files = np.array([os.fsencode(file) for part in files.values() for file in part])

    def open_image(self, index: int) -> Image.Image:
        with Image.open(self.name_of(index)) as image:
            if image.mode.startswith("I;16"):                                   # Pillow would clip, not scale
                image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
            return image.convert("RGBA" if image.mode == "P" else "RGB").convert("RGB")

    def name_of(self, index: int) -> str:
        return os.path.join(self.folder, os.fsdecode(self.files[index]))


def adm_crop(image: Image.Image, size: int, across: float = 0.499999, down: float = 0.499999) -> Image.Image:
    """A size x size crop as in ADM (Dhariwal and Nichol 2021), whose statistics published FIDs refer to.

    Halve with a box filter while the short side is at least 2 * size; bring it to `size` with a bicubic one
    (also upwards); crop, by default at the centre.  An image that is size x size comes back unchanged.
    """
    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = size / min(image.size)
    image = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.BICUBIC)
    left, top = int(across * (image.width - size + 1)), int(down * (image.height - size + 1))
    return image.crop((left, top, left + size, top + size))


# ------------------------------------------------------------------------------------------------------------
# Opening by name.  What can be wrong with a directory is found here, before anything else has started.

Dataset = Shapes | Cifar10 | Folder


def open_dataset(name: str, size: int, split: str, seed: int = 0, classes: list[str] | None = None,
                 root: str = "runs/data") -> Dataset:
    """The data set `name`, at size x size pixels; split: "train" or "val".

    name: "shapes"; "cifar10" (in `root`, or downloaded there); or a directory with one folder of JPEG, PNG or
    WebP images per class, or with train/ and val/ (or test/) holding these.  The classes are the sorted
    folder names, of train/ where there is one, unless `classes` gives them; loose images are one class.
    Images become RGB; transparency is dropped and the EXIF orientation ignored, as in ADM and torchvision.

    Without a val/ or test/ folder, "val" is the very same images as "train": nothing is held out unasked.
    `dataset.note` then says so, and is printed to stderr (rank 0).  seed: for "shapes".  Raises: InputError.
    """
    if split not in ("train", "val"):
        raise InputError(f"split '{split}' is unknown: give train or val")
    if size <= 0:
        raise InputError(f"image size {size} must be positive")
    if name == "shapes":
        return Shapes(size, split, seed)
    if name == "cifar10":
        return Cifar10(size, split, root)
    if not os.path.isdir(name):
        problem = "is not a directory" if os.path.exists(name) else "does not exist"
        raise InputError(f"data '{name}' {problem}: give shapes, cifar10 or a directory of class folders")
    try:
        dataset = open_folder(name, size, split, classes)
    except OSError as error:
        raise InputError(f"data '{name}' cannot be listed ({error}): check its permissions") from None
    if dataset.note and os.environ.get("RANK", "0") == "0":
        print(dataset.note, file=sys.stderr)
    return dataset


def open_folder(name: str, size: int, split: str, classes: list[str] | None) -> Folder:
    parts = [part for part in ("train", "val", "test") if part in subfolders(name)]
    if len(parts) < len(subfolders(name)) and not any(subfolders(os.path.join(name, part)) for part in parts):
        parts = []                              # a class that happens to be called "train"
    wanted = ["train"] if split == "train" else ["val", "test", "train"]
    part = next((part for part in wanted if part in parts), "")
    if parts and not part:
        raise InputError(f"{name} has no train/: add it, or give {os.path.join(name, parts[0])} as the data")
    folder, home = os.path.join(name, part), os.path.join(name, "train" if "train" in parts else part)
    present = subfolders(folder)
    classes = classes or subfolders(home) or [os.path.basename(os.path.abspath(name))]
    strange = [c for c in present if c not in classes]
    if strange or (not present and len(classes) > 1):
        problem = f"folder '{strange[0]}' is not a class" if strange else "there are no class folders"
        raise InputError(f"{folder}: {problem}; sort its images into {len(classes)} folders {classes[0]}, ..")
    files = {classes[0]: images_in(folder)}
    if present:
        files = {c: [os.path.join(c, file) for file in images_in(os.path.join(folder, c))]
                 if c in present else [] for c in classes}
    dataset = Folder(name, size, split, folder, files)
    if len(dataset) == 0:
        where = f"directly in its folders ({present[0]}, ..)" if present else "in it"
        raise InputError(f"{folder}: no {' '.join(ENDINGS)} files {where}; give a folder of class folders")
    if all(dataset.read([i], CENTRE) == [None] for i in range(len(dataset))):
        raise InputError(f"{dataset.name_of(0)} cannot be read, nor any other of {len(dataset)} images; "
                         "copy or unpack them again")
    if split == "val" and part in ("train", ""):
        dataset.note = f"{name} has no val or test folder: 'val' is the same {len(dataset)} images as 'train'"
    return dataset


def subfolders(folder: str) -> list[str]:
    return sorted(e.name for e in os.scandir(folder) if e.is_dir() and not e.name.startswith("."))


def images_in(folder: str) -> list[str]:
    return sorted(e.name for e in os.scandir(folder) if e.name.lower().endswith(ENDINGS) and e.name[0] != ".")


# ------------------------------------------------------------------------------------------------------------
# Batches.  Position p of a training run is image p % n of epoch p // n.  Global batch k is the positions from
# k * batch up to (k + 1) * batch, across the borders of epochs; a rank takes every world-th of them.


def batches(dataset: Dataset, batch: int, seed: int = 0, start: int = 0, rank: int = 0, world: int = 1,
            workers: int = 0, augment: bool = True, device: torch.device | str = "cpu") -> Iterator[Batch]:
    """Endless training batches, from global batch `start` on; `batch` counts the images of all ranks.

    Yields {"x": float32 [batch / world, 3, s, s] in [-1, 1], "y": int64, "index": int64, "pixels": x as uint8
    on the CPU, "skipped": list[str]}, x and y on `device`.  augment: random crop and horizontal flip, or else
    the centre crop.  An unreadable file is named in "skipped"; the next readable image takes its place.
    Raises: InputError.
    """
    check_batch(batch, world)
    plan = training_plan(len(dataset), batch, seed, start, rank, world)
    return load(Reader(dataset, seed, augment, refill=True), plan, workers, device)


def once(dataset: Dataset, batch: int, rank: int = 0, world: int = 1, workers: int = 0,
         limit: int | None = None, device: torch.device | str = "cpu") -> Iterator[Batch]:
    """Every image once over all ranks, centre crop, at most `batch` images at a time in each process.

    limit: only so many images, spread evenly over the data set (and so over its sorted classes).  Unreadable
    files are left out and named in "skipped".  Yields dicts as `batches` does, not equally many on all ranks.
    """
    if batch <= 0 or (limit is not None and limit <= 0):
        raise InputError(f"batch size {batch} and limit {limit} must be positive")
    count = min(limit or len(dataset), len(dataset))
    mine = (np.arange(count) * len(dataset) // count)[rank::world]
    plan = ((mine[i:i + batch], mine[i:i + batch]) for i in range(0, len(mine), batch))
    return without_empty(load(Reader(dataset, 0, augment=False, refill=False), plan, workers, device))


def check_batch(batch: int, world: int) -> None:
    if batch <= 0 or batch % world:
        raise InputError(f"batch size {batch} must be a positive multiple of the {world} processes")


def training_plan(n: int, batch: int, seed: int, start: int, rank: int, world: int
                  ) -> Iterator[tuple[ndarray, ndarray]]:
    """(indices, positions) of one rank's share of global batches start, start + 1, ..."""
    epoch, order = -1, np.empty(0, dtype=int)
    for k in itertools.count(start):
        positions = np.arange(k * batch + rank, (k + 1) * batch, world)
        indices = np.empty_like(positions)
        for e in np.unique(positions // n):
            if e != epoch:
                epoch, order = e, epoch_order(n, seed, e)
            here = positions // n == e
            indices[here] = order[positions[here] % n]
        yield indices, positions


class Reader:
    """(indices, positions) to one batch of uint8 pixels; this is what runs in a worker."""

    def __init__(self, dataset: Dataset, seed: int, augment: bool, refill: bool) -> None:
        self.dataset, self.seed, self.augment, self.refill = dataset, seed, augment, refill

    def __getitem__(self, entry: tuple[ndarray, ndarray]) -> dict:
        indices, skipped, n, size = entry[0].copy(), [], len(self.dataset), self.dataset.size
        u = uniform(self.seed, 2, entry[1], 3).astype(float)
        places = u[:, :2] if self.augment else np.repeat(CENTRE, len(u), 0)
        images = self.dataset.read(indices, places)
        for slot in range(len(images)):
            while images[slot] is None and len(skipped) < 1000:
                skipped.append(self.dataset.name_of(indices[slot]))
                if not self.refill:
                    break
                indices[slot] = (indices[slot] + 1) % n
                images[slot], = self.dataset.read(indices[[slot]], places[[slot]])
        kept = [slot for slot, image in enumerate(images) if image is not None]
        indices, images = indices[kept], [images[slot] for slot in kept]
        pixels = torch.stack(images) if kept else torch.empty(0, 3, size, size, dtype=torch.uint8)
        if self.augment:
            flip = torch.from_numpy(u[kept, 2] < 0.5)
            pixels[flip] = pixels[flip].flip(3)
        return {"pixels": pixels, "y": self.dataset.labels(indices), "index": torch.from_numpy(indices),
                "skipped": skipped}


def load(reader: Reader, plan: Iterable, workers: int, device: torch.device | str) -> Iterator[Batch]:
    """Read in `workers` processes (0: in this one) and convert on `device`; bytes are what travels."""
    cuda, raw_batches = torch.device(device).type == "cuda", map(reader.__getitem__, plan)
    if workers > 0:                             # without a generator it would draw a seed from the training's
        raw_batches = torch.utils.data.DataLoader(reader, batch_size=None, sampler=plan, num_workers=workers,
                                                  pin_memory=cuda, generator=torch.Generator())
    for raw in raw_batches:
        if reader.refill and len(raw["skipped"]) >= 1000:
            raise InputError(f"1000 images cannot be read, the last {raw['skipped'][-1]}: is the disk there?")
        pixels, y = (raw[key].pin_memory() if cuda and workers == 0 else raw[key] for key in ("pixels", "y"))
        x = from_uint8(pixels.to(device, non_blocking=True))
        yield {**raw, "x": x, "y": y.to(device, non_blocking=True)}


def without_empty(parts: Iterator[Batch]) -> Iterator[Batch]:
    """Merge a batch without one readable image into its neighbour, so that no name is lost."""
    held = next(parts, None)
    for part in parts:
        if len(part["y"]) and len(held["y"]):
            yield held
            held = part
        else:
            held = {**(part if len(part["y"]) else held), "skipped": held["skipped"] + part["skipped"]}
    if held is not None:
        yield held


# ------------------------------------------------------------------------------------------------------------
# Latents.  A frozen tokenizer's answer to an image never changes, so the diffusion transformer reads it from
# disk: the posterior's mean and deviation (every visit draws a fresh z) of each image and of its mirror
# image, which is not the mirrored latent.

# NumPy's and PyTorch's type of what a cache and a safetensors file store; NumPy sees bfloat16 as int16.
STORED = {"fp16": (np.float16, torch.float16), "bf16": (np.int16, torch.bfloat16),
          "F16": (np.float16, torch.float16), "BF16": (np.int16, torch.bfloat16),
          "F32": (np.float32, torch.float32), "I32": (np.int32, torch.int32), "I64": (np.int64, torch.int64)}
CHUNK = 512                                     # images that are encoded, written and marked as done together


class LatentSet:
    """Posterior means and deviations of every image and its mirror image, memory-mapped.

    len(): images.  shape: (C, h, w).  skipped: names of the unreadable images that were left out.
    parts: pairs of arrays [n, 1 or 2, C, h, w], of images and of mirror images: mean and deviation, or one
    draw.  labels: of each row of all parts, -1 where it is left out.  dtype: of the numbers in them.
    sums: see `channel_sums`; None: to be computed.  given: statistics that came with the latents.
    """

    def __init__(self, parts: list[tuple[ndarray, ndarray]], labels: ndarray, classes: list[str],
                 dtype: torch.dtype, skipped: list[str], sums: ndarray | None = None,
                 given: tuple[Tensor, Tensor] | None = None) -> None:
        self.parts, self.labels, self.classes, self.dtype = parts, labels, classes, dtype
        self.skipped, self.sums, self.given = skipped, sums, given
        self.starts = np.cumsum([0] + [len(plain) for plain, _ in parts[:-1]])
        self.rows = np.flatnonzero(labels >= 0)
        self.shape = tuple(parts[0][0].shape[2:])

    def __len__(self) -> int:
        return len(self.rows)

    def statistics(self, latent: str) -> tuple[Tensor, Tensor]:
        """Mean [C] and standard deviation [C] over all images, mirror images and positions, fp32.

        latent: "mean", or "sample" for z = mean + std * eps, of variance Var[mean] + E[std^2].
        """
        if self.given:
            return self.given
        if self.sums is None:
            views = tqdm([view for part in self.parts for view in part], desc="statistics",
                         disable=os.environ.get("RANK", "0") != "0")
            self.sums = sum(channel_sums(torch.from_numpy(view[i:i + CHUNK].copy()).view(self.dtype))
                            for view in views for i in range(0, len(view), CHUNK))
        count, first, second, noise = torch.tensor(self.sums)
        variance = second / count - (first / count) ** 2 + (noise / count if latent == "sample" else 0)
        return (first / count).float(), variance.clamp(min=0).sqrt().float()

    def read(self, rows: ndarray, flipped: ndarray, pin: bool) -> Tensor:
        """Mean and, where there is one, deviation, as stored: [b, 1 or 2, C, h, w].  pin: for a CUDA copy."""
        raw = torch.empty(len(rows), *self.parts[0][0].shape[1:], dtype=self.dtype, pin_memory=pin)
        slots = (raw.view(torch.int16) if self.dtype == torch.bfloat16 else raw).numpy()
        part = np.searchsorted(self.starts, rows, "right") - 1
        for slot, p, flip, row in zip(slots, part, flipped, rows - self.starts[part], strict=True):
            slot[...] = self.parts[p][int(flip)][row]
        return raw


def channel_sums(latents: Tensor) -> ndarray:
    """How many numbers, and the sums of mean, mean^2 and std^2.  [..., 1 or 2, C, h, w] -> float64 [4, C]."""
    values = latents.double().flatten(0, -5)
    mean, variance = values[:, 0], values[:, 1:].square()
    first, second = mean.sum((0, 2, 3)), mean.square().sum((0, 2, 3))
    count = torch.full_like(first, mean[:, 0].numel())
    return torch.stack([count, first, second, variance.sum((0, 1, 3, 4))]).numpy()


def latent_batches(latents: LatentSet, batch: int, seed: int, start: int = 0, rank: int = 0, world: int = 1,
                   device: torch.device | str = "cpu") -> Iterator[dict[str, Tensor]]:
    """Endless training batches, in the order and with the flips of `batches`; threads read four ahead.

    Yields {"mean", "std": float32 [batch / world, C, h, w], "y": int64} on `device`, {"index": int64 (of the
    image in its data set), "flipped": bool} on the CPU.  std is 0 where there is none.  Raises: InputError.
    """
    check_batch(batch, world)
    pin = torch.device(device).type == "cuda"
    plan = training_plan(len(latents), batch, seed, start, rank, world)

    def read(entry: tuple[ndarray, ndarray]) -> tuple[Tensor, ...]:
        rows, flipped = latents.rows[entry[0]], uniform(seed, 2, entry[1], 3)[:, 2] < 0.5
        y = torch.from_numpy(latents.labels[rows])
        return (latents.read(rows, flipped, pin), y.pin_memory() if pin else y, torch.from_numpy(rows),
                torch.from_numpy(flipped))

    def generate() -> Iterator[dict[str, Tensor]]:
        with ThreadPoolExecutor(4) as pool:
            ahead = deque(pool.submit(read, entry) for entry in itertools.islice(plan, 4))
            while True:
                raw, y, index, flipped = ahead.popleft().result()
                ahead.append(pool.submit(read, next(plan)))
                z = raw.to(device, non_blocking=True).float()
                yield {"mean": z[:, 0], "std": z[:, 1] if z.shape[1] == 2 else torch.zeros_like(z[:, 0]),
                       "y": y.to(device, non_blocking=True), "index": index, "flipped": flipped}

    return generate()


# ------------------------------------------------------------------------------------------------------------
# Writing the cache.  Its name is a hash of everything it depends on, so a wrong one is never found.  It is
# latents.npy [image, mirror image?, mean or std, C, h, w], labels.npy and, written last, cache.json.  Until
# then chunks/ says which chunks have reached the disk, so that a killed run goes on with any number of ranks.


def fingerprint(dataset: Dataset) -> str:
    """A hash of what the images are, wherever they lie; no file of a folder is opened.

    Shapes: size, split, length, seed.  CIFAR-10: size, pixels, labels.  A folder: size, classes, and names
    in the folder, sizes and times of modification of its files.
    """
    facts = (dataset.size, dataset.split, len(dataset), dataset.classes, getattr(dataset, "seed", None))
    digest = hashlib.sha256(repr(facts).encode())
    if isinstance(dataset, Cifar10):
        digest.update(dataset.pixels.tobytes() + dataset.targets.tobytes())
    for index, file in enumerate(dataset.files if isinstance(dataset, Folder) else []):
        try:
            status = os.stat(dataset.name_of(index))
            digest.update(b"%b\0%d\0%d\0" % (file, status.st_size, status.st_mtime_ns))
        except OSError:                         # a link to nowhere is one more unreadable image
            digest.update(b"%b\0\0\0" % file)
    return digest.hexdigest()


def cache_latents(folder: str | Path, dataset: Dataset, encode: Callable[[Tensor], tuple[Tensor, Tensor]],
                  key: dict[str, str], batch: int, rank: int = 0, world: int = 1, workers: int = 0,
                  device: torch.device | str = "cpu", barrier: Callable[[], None] = lambda: None,
                  dtype: str = "fp16") -> LatentSet:
    """The latents of every image of `dataset`; what `folder` does not hold yet is encoded first.

    encode: x [b, 3, H, W] in [-1, 1] on `device` -> mean, std [b, C, h, w].  It gets the centre crops and
    their mirror images, `batch` at a time.  key: what the latents depend on besides the data, as
    {"tokenizer": its hash}.  A folder holds one cache per split: one with another key is removed, with a
    line on stderr, when its successor begins.  All ranks call this; barrier waits for them.

    dtype: fp16 has steps of 0.004 at |z| = 5, against a deviation of 0.24 in the paper, and ends at 65504;
    bf16 has steps of 0.03 and no end.  Raises: InputError, for one when the disk is full.
    """
    key = {**key, "data": fingerprint(dataset), "dtype": dtype}
    name = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:16]
    home = Path(folder) / f"{dataset.split}-{name}"
    if not (home / "cache.json").exists():
        try:
            if rank == 0 and not (home / "latents.npy").exists():
                mean, _ = encode(torch.zeros(1, 3, dataset.size, dataset.size, device=device))
                allocate(home, dataset, mean.shape[1:], STORED[dtype][0])
            barrier()
            encode_chunks(home, dataset, encode, batch, rank, world, workers, device, STORED[dtype][1])
            barrier()
            if rank == 0:
                finish_cache(home, dataset, key)
            barrier()
        except OSError as error:
            raise InputError(f"the latents cannot be written to {home} ({error}): make room there and give "
                             "the same command again") from None
    try:
        info = json.loads((home / "cache.json").read_text())
        array = np.asarray(np.load(home / "latents.npy", mmap_mode="r"))        # np.memmap is slow to index
        labels = np.load(home / "labels.npy")
    except (OSError, ValueError, EOFError) as error:
        raise InputError(f"{home} is damaged ({error}): remove it to encode the images again") from None
    return LatentSet([(array[:, 0], array[:, 1])], labels, info["classes"], STORED[dtype][1], info["skipped"],
                     np.array(info["sums"]))


def allocate(home: Path, dataset: Dataset, shape: tuple[int, int, int], dtype: type) -> None:
    """Make an empty latents.npy if there is room, and remove the split's caches with other keys."""
    home.parent.mkdir(parents=True, exist_ok=True)
    others = [old for old in home.parent.glob(f"{dataset.split}-" + 16 * "[0-9a-f]") if old != home]
    shape = (len(dataset), 2, 2, *shape)
    need, free = 2 * math.prod(shape), shutil.disk_usage(home.parent).free
    free += sum(file.stat().st_blocks * 512 for old in others for file in old.rglob("*"))
    if need > free:
        raise InputError(f"the latents of {len(dataset)} images need {need} bytes in {home.parent}, which "
                         f"has {free}: make room, or choose another folder")
    for old in others:
        print(f"removing {old}, the latents of another tokenizer or of other data", file=sys.stderr)
        shutil.rmtree(old)
    (home / "chunks").mkdir(parents=True, exist_ok=True)
    np.lib.format.open_memmap(home / "latents.tmp", "w+", dtype, shape)
    os.replace(home / "latents.tmp", home / "latents.npy")


def chunks_of(home: Path, n: int) -> list[tuple[int, int, Path]]:
    """First image, last + 1, and the file that says that this chunk has been written."""
    spans = [(start, min(start + CHUNK, n)) for start in range(0, n, CHUNK)]
    return [(start, stop, home / "chunks" / f"{start}-{stop}.json") for start, stop in spans]


@torch.no_grad()
def encode_chunks(home: Path, dataset: Dataset, encode: Callable, batch: int, rank: int, world: int,
                  workers: int, device: torch.device | str, dtype: torch.dtype) -> None:
    """Encode, write and mark every world-th chunk, unless it is marked already."""
    # One with unreadable images is tried again: the disk may have been away when the last run ended.
    todo = [chunk for chunk in chunks_of(home, len(dataset))[rank::world]
            if not chunk[2].exists() or json.loads(chunk[2].read_text())["unreadable"]]
    plan = (np.arange(i, min(i + batch, stop)) for start, stop, _ in todo for i in range(start, stop, batch))
    loader = load(Reader(dataset, 0, augment=False, refill=False), ((i, i) for i in plan), workers, device)
    array = np.load(home / "latents.npy", mmap_mode="r")
    with (open(home / "latents.npy", "r+b") as file,
          tqdm(total=sum(stop - start for start, stop, _ in todo), desc="latents", disable=rank > 0) as bar):
        for start, stop, mark in todo:
            block, seen = torch.zeros(stop - start, *array.shape[1:], dtype=dtype), []
            for part in itertools.islice(loader, -(-(stop - start) // batch)):
                seen += (part["index"] - start).tolist()
                if len(part["x"]):
                    block[part["index"] - start] = encode_both(encode, part, dtype)
                bar.update(len(part["index"]) + len(part["skipped"]))
            unreadable = sorted({*range(stop - start)} - {*seen})
            if len(unreadable) > CHUNK // 2 or len(unreadable) == len(dataset):
                raise InputError(f"{len(unreadable)} of the {stop - start} images from "
                                 f"{dataset.name_of(start)} on cannot be read: is the disk there?")
            file.seek(array.offset + start * array.strides[0])      # through a map, a full disk is a SIGBUS
            file.write(block.view(torch.int16).numpy())
            file.flush()
            os.fsync(file.fileno())
            write_whole(mark, {"unreadable": [start + i for i in unreadable],
                               "sums": channel_sums(block[seen]).tolist()})


def encode_both(encode: Callable[[Tensor], tuple[Tensor, Tensor]], part: Batch, dtype: torch.dtype) -> Tensor:
    """[b, 2, 2, C, h, w]: of image and mirror image, mean and deviation."""
    exact = torch.stack([torch.stack(encode(x), 1) for x in (part["x"], part["x"].flip(3))], 1)
    stored = exact.to(dtype).cpu()
    if not stored.isfinite().all():
        raise InputError(f"latents of images {part['index'][0]} to {part['index'][-1]} reach "
                         f"{exact.abs().max():.4g}, which {dtype} does not hold: look at the tokenizer")
    return stored


def finish_cache(home: Path, dataset: Dataset, key: dict[str, str]) -> None:
    marks = [json.loads(mark.read_text()) for _, _, mark in chunks_of(home, len(dataset))]
    unreadable = [index for mark in marks for index in mark["unreadable"]]
    labels = dataset.labels(np.arange(len(dataset))).numpy().copy()
    labels[unreadable] = -1
    buffer = io.BytesIO()
    np.save(buffer, labels)
    write_whole(home / "labels.npy", buffer.getvalue())
    write_whole(home / "cache.json", {
        "key": key, "classes": dataset.classes, "skipped": [dataset.name_of(index) for index in unreadable],
        "sums": sum(np.array(mark["sums"]) for mark in marks).tolist()})
    shutil.rmtree(home / "chunks")


def write_whole(path: Path, content: bytes | dict) -> None:
    """Bytes, or a dict as JSON: after a crash the file is not there, or it is whole."""
    with open(path.with_suffix(".tmp"), "wb") as file:
        file.write(content if isinstance(content, bytes) else json.dumps(content).encode())
        file.flush()
        os.fsync(file.fileno())
    os.replace(path.with_suffix(".tmp"), path)


# ------------------------------------------------------------------------------------------------------------
# Latents of LightningDiT's extract_features.py, in its own files.


def open_lightningdit_latents(folder: str | Path) -> LatentSet:
    """*.safetensors with `latents`, `latents_flip` [n, C, h, w] and `labels` [n]; each is one draw of z.

    `statistics` returns what latents_stats.pt beside them says ({"mean", "std"}: [1, C, 1, 1]), if it is
    there.  The classes are "0", "1", .. up to the highest label.  The few images that its processes encode
    twice, to have equally many each, cannot be told from others.  Raises: InputError.
    """
    parts, labels, kinds = [], [], set()
    for path in sorted(Path(folder).glob("*.safetensors")):
        tensors = read_safetensors(path)
        absent = {"latents", "latents_flip", "labels"} - {*tensors}
        if absent:
            raise InputError(f"{path} has no tensor '{min(absent)}': give LightningDiT's latents")
        (plain, dtype), (mirrored, other), (y, _) = (
            tensors[name] for name in ("latents", "latents_flip", "labels"))
        if plain.ndim != 4 or plain.shape != mirrored.shape or dtype != other or y.shape != plain.shape[:1]:
            raise InputError(f"{path}: latents {plain.shape} {dtype}, latents_flip {mirrored.shape} {other} "
                             f"and labels {y.shape} do not go together")
        kinds.add((plain.shape[1:], dtype))
        parts.append((plain[:, None], mirrored[:, None]))
        labels.append(y)
    if not sum(map(len, labels)):
        raise InputError(f"{folder} holds no latents: give the folder of latents_rank00_shard000.safetensors")
    labels, channels = np.concatenate(labels), plain.shape[1]
    if len(kinds) > 1 or not dtype.is_floating_point or labels.dtype.kind != "i" or labels.min() < 0:
        raise InputError(f"{folder}: latents must be floats of one shape and type, not {kinds}, and labels "
                         f"integers from 0, not {labels.dtype} from {labels.min()}")
    given, path = None, Path(folder) / "latents_stats.pt"
    if path.exists():
        try:
            stored = torch.load(path, map_location="cpu", weights_only=True)
            given = tuple(stored[name].float().reshape(channels) for name in ("mean", "std"))
        except Exception as error:              # torch raises half a dozen types for a damaged file
            raise InputError(f"{path} holds no mean and std of {channels} channels "
                             f"({str(error).splitlines()[0]}): without it they are computed") from None
    classes = [str(i) for i in range(labels.max() + 1)]
    return LatentSet(parts, labels.astype(np.int64), classes, dtype, [], given=given)


def read_safetensors(path: Path) -> dict[str, tuple[ndarray, torch.dtype]]:
    """A safetensors file's tensors, memory-mapped.  Layout: length of the header (8 bytes), header, data."""
    try:
        raw = np.memmap(path, np.uint8, "r")
        begin = 8 + int.from_bytes(raw[:8].tobytes(), "little")
        header, tensors = json.loads(raw[8:begin].tobytes()), {}
        for name, entry in header.items():
            if name != "__metadata__":
                kind, dtype = STORED[entry["dtype"]]
                first, last = (begin + offset for offset in entry["data_offsets"])
                tensors[name] = np.asarray(raw[first:last]).view(kind).reshape(entry["shape"]), dtype
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise InputError(f"{path} cannot be read as safetensors ({error}): copy it again") from None
    return tensors
