"""The built-in data set: one coloured shape on a plain or softly shaded ground.

    images, labels, masks = Shapes(size=32, split="train").render_batch(range(64))

Nothing is stored or downloaded: a scene is a function of the seed, the split and
the index.
"""

import numpy as np
import torch
from numpy import ndarray
from torch import Tensor

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


# ------------------------------------------------------------------------------
# Ten shapes.  Each is a signed distance (negative inside) on [-1, 1]^2 with y down,
# and fills about the unit disc.  Its edge is one and a half pixels wide, so that a
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
