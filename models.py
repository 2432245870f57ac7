"""Every network of the project, the tables of their sizes, and the loading of their checkpoints.

    Autoencoder     the convolutional tokenizer of latent diffusion (LDM KL-f16, VA-VAE f16d32)
    VitAutoencoder  a tokenizer of transformers with the same interface (GAE)
    PatchGAN        the discriminator that trains with either
    DiT             the diffusion transformer that learns their latents (LightningDiT, SiT)

Module names are those of the published checkpoints (the ViT's are ours), so that a downloaded file loads as
it is and a file of ours loads elsewhere.  Images x are [B, 3, H, W] in [-1, 1]; latents z are
[B, C, H/stride, W/stride].

    tokenizer = build_autoencoder(AUTOENCODERS["demo"])
    moments = tokenizer.encode(x)                     # mean and log-variance of Eq. (5), stacked on channels
    dit = build_dit(DITS["demo"] | {"num_classes": 10})
    v_hat = dit(x_t, t, y)                            # t = 1 at the data
    dit, checkpoint = load_dit("runs/dit/checkpoint.pt", weights="ema")
"""
import argparse
import math
from collections import OrderedDict
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint


# ------------------------------------------------------------------------------------------------------------
# Sizes.  A config is a plain dict, stored in the checkpoint: it alone rebuilds the network.  f16d32 is the
# tokenizer of the paper (69,836,067 parameters, 32 x 16 x 16 latents of a 256 x 256 image), and of VA-VAE;
# attn_resolutions count at an image of `resolution`: they choose levels, whatever the size of the image.
# The ViT sizes are those of GAE's Table 8; they take images of image_size pixels and no others.
# `demo` and `vit-demo` are for a CPU: 32 x 32 images, 8 x 8 x 8 latents, the same time per training step.

LDM_F16 = dict(ch=128, ch_mult=(1, 1, 2, 2, 4), num_res_blocks=2, attn_resolutions=(16,), resolution=256)
VIT_F16D32 = dict(arch="vit", image_size=256, patch=16, z_channels=32, latent_norm=False)

AUTOENCODERS: dict[str, dict] = {
    "demo": dict(ch=16, ch_mult=(1, 2, 2), num_res_blocks=1, attn_resolutions=(), resolution=32,
                 z_channels=8),
    "f16d16": LDM_F16 | dict(z_channels=16),
    "f16d32": LDM_F16 | dict(z_channels=32),
    "vit-demo": VIT_F16D32 | dict(depth=3, width=64, heads=2, image_size=32, patch=4, z_channels=8),
    "vit-s": VIT_F16D32 | dict(depth=12, width=384, heads=6),
    "vit-b": VIT_F16D32 | dict(depth=12, width=768, heads=12),
    "vit-l": VIT_F16D32 | dict(depth=24, width=1024, heads=16),
}

# The transformers see one token per latent position (patch 1) on 16 x 16 x 32 latents unless told otherwise;
# S to XL are the sizes of DiT and SiT, 1p0B and 1p6B those that LightningDiT adds.

DIT_F16D32 = dict(family="lightningdit", input_size=16, patch=1, in_channels=32, num_classes=1000,
                  qk_norm=False, learn_sigma=False)

DITS: dict[str, dict] = {
    "demo": DIT_F16D32 | dict(depth=6, width=128, heads=4, input_size=8, in_channels=8, num_classes=10),
    "S": DIT_F16D32 | dict(depth=12, width=384, heads=6),
    "B": DIT_F16D32 | dict(depth=12, width=768, heads=12),
    "L": DIT_F16D32 | dict(depth=24, width=1024, heads=16),
    "XL": DIT_F16D32 | dict(depth=28, width=1152, heads=16),
    "1p0B": DIT_F16D32 | dict(depth=24, width=1536, heads=24),
    "1p6B": DIT_F16D32 | dict(depth=28, width=1792, heads=28),
}


# ------------------------------------------------------------------------------------------------------------
# Parts of the convolutional autoencoder.  Pre-norm residual blocks, single-head attention at low resolution;
# the time embedding of the original is off and its dropout 0, so neither appears.

def group_norm(channels: int) -> nn.GroupNorm:
    """32 groups as published, from 128 channels on; below, four channels share a group.

    With one channel in a group the norm before the last convolution would erase the mean colour of the image.
    """
    return nn.GroupNorm(min(32, channels // 4), channels, eps=1e-6)


class ResidualBlock(nn.Module):
    """h + conv(silu(norm(conv(silu(norm(h)))))), a 1x1 shortcut where the width changes.  [B, C, H, W]"""

    def __init__(self, c_in: int, c_out: int) -> None:
        super().__init__()
        self.norm1 = group_norm(c_in)
        self.conv1 = nn.Conv2d(c_in, c_out, 3, padding=1)
        self.norm2 = group_norm(c_out)
        self.conv2 = nn.Conv2d(c_out, c_out, 3, padding=1)
        if c_in != c_out:
            self.nin_shortcut = nn.Conv2d(c_in, c_out, 1)

    def forward(self, h: Tensor) -> Tensor:
        skip = self.nin_shortcut(h) if hasattr(self, "nin_shortcut") else h
        h = self.conv1(F.silu(self.norm1(h)))
        return skip + self.conv2(F.silu(self.norm2(h)))


class SpatialAttention(nn.Module):
    """h + proj(softmax(q k^T / sqrt(C)) v) over all positions, one head of C channels.  [B, C, H, W]"""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = group_norm(channels)
        self.q = nn.Conv2d(channels, channels, 1)
        self.k = nn.Conv2d(channels, channels, 1)
        self.v = nn.Conv2d(channels, channels, 1)
        self.proj_out = nn.Conv2d(channels, channels, 1)

    def forward(self, h: Tensor) -> Tensor:
        B, C, H, W = h.shape
        normed = self.norm(h)
        q, k, v = (f(normed).reshape(B, 1, C, H * W).transpose(2, 3) for f in (self.q, self.k, self.v))
        mixed = F.scaled_dot_product_attention(q, k, v).transpose(2, 3).reshape(B, C, H, W)
        return h + self.proj_out(mixed)


class Downsample(nn.Module):
    """Stride-2 convolution, padded on the right and bottom only.  [B, C, H, W] -> [B, C, H/2, W/2]"""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, h: Tensor) -> Tensor:
        return self.conv(F.pad(h, (0, 1, 0, 1)))


class Upsample(nn.Module):
    """Nearest neighbour, then a convolution.  [B, C, H, W] -> [B, C, 2H, 2W]"""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, h: Tensor) -> Tensor:
        return self.conv(F.interpolate(h, scale_factor=2.0, mode="nearest"))


class Level(nn.Module):
    """All blocks at one resolution, attention after each where asked, then the way to the next resolution."""

    def __init__(self, c_in: int, c_out: int, blocks: int, attention: bool,
                 down: bool = False, up: bool = False) -> None:
        super().__init__()
        self.block = nn.ModuleList(ResidualBlock(c_in if i == 0 else c_out, c_out) for i in range(blocks))
        self.attn = nn.ModuleList(SpatialAttention(c_out) if attention else nn.Identity()
                                  for _ in range(blocks))
        self.downsample = Downsample(c_out) if down else nn.Identity()
        self.upsample = Upsample(c_out) if up else nn.Identity()

    def forward(self, h: Tensor) -> Tensor:
        for block, attn in zip(self.block, self.attn):
            h = attn(block(h))
        return self.upsample(self.downsample(h))


class Middle(nn.Module):
    """Residual block, attention, residual block at the lowest resolution."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.block_1 = ResidualBlock(channels, channels)
        self.attn_1 = SpatialAttention(channels)
        self.block_2 = ResidualBlock(channels, channels)

    def forward(self, h: Tensor) -> Tensor:
        return self.block_2(self.attn_1(self.block_1(h)))


class Encoder(nn.Module):
    """x [B, 3, H, W] -> [B, 2C, H/stride, W/stride]"""

    def __init__(self, ch: int, ch_mult: tuple[int, ...], num_res_blocks: int,
                 attn_resolutions: tuple[int, ...], resolution: int, z_channels: int) -> None:
        super().__init__()
        width = [ch * m for m in ch_mult]
        last = len(width) - 1
        self.conv_in = nn.Conv2d(3, ch, 3, padding=1)
        self.down = nn.ModuleList(
            Level(width[i - 1] if i > 0 else ch, width[i], num_res_blocks,
                  attention=resolution // 2 ** i in attn_resolutions, down=i < last)
            for i in range(len(width)))
        self.mid = Middle(width[last])
        self.norm_out = group_norm(width[last])
        self.conv_out = nn.Conv2d(width[last], 2 * z_channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv_in(x)
        for level in self.down:
            h = level(h)
        return self.conv_out(F.silu(self.norm_out(self.mid(h))))


class Decoder(nn.Module):
    """z [B, C, h, w] -> x_hat [B, 3, h*stride, w*stride].  Levels are stored full resolution first.

    recompute = True keeps no activations inside the levels and computes them again in the backward pass.
    """

    def __init__(self, ch: int, ch_mult: tuple[int, ...], num_res_blocks: int,
                 attn_resolutions: tuple[int, ...], resolution: int, z_channels: int) -> None:
        super().__init__()
        width = [ch * m for m in ch_mult]
        last = len(width) - 1
        self.conv_in = nn.Conv2d(z_channels, width[last], 3, padding=1)
        self.mid = Middle(width[last])
        self.up = nn.ModuleList(
            Level(width[min(i + 1, last)], width[i], num_res_blocks + 1,
                  attention=resolution // 2 ** i in attn_resolutions, up=i > 0)
            for i in range(len(width)))
        self.norm_out = group_norm(width[0])
        self.conv_out = nn.Conv2d(width[0], 3, 3, padding=1)
        self.recompute = False

    def forward(self, z: Tensor) -> Tensor:
        h = self.mid(self.conv_in(z))
        for level in reversed(self.up):
            h = checkpoint(level, h, use_reentrant=False) if self.recompute else level(h)
        return self.conv_out(F.silu(self.norm_out(h)))


# ------------------------------------------------------------------------------------------------------------
# The tokenizer.  The encoder gives the moments of q(z | x), the caller draws z (losses.reparameterize, Eq. 5)
# and the decoder answers with x_hat: nothing random happens in this file.

class Tokenizer(nn.Module):
    """What every autoencoder here offers: config, stride, channels, encode, decode, and the parameters
    last_layer and encoder_last_layer.  Autoencoder says what each of them is."""

    @property
    def channels(self) -> int:
        """C, the channels of the latent."""
        return self.config["z_channels"]

    def standardized(self, moments: Tensor) -> Tensor:
        """moments [B, 2C, h, w] with the mean divided into zero mean and unit deviation per channel, where
        the config has standardize_mean: by the batch's statistics in training, with the gradient through
        them, so that no scale is left for the mean to grow; by the running ones, which the file holds, in
        evaluation.
        """
        if "standardize_mean" not in self.config:
            return moments
        mean, logvar = moments.chunk(2, dim=1)
        return torch.cat([self.mean_norm(mean), logvar], dim=1)

    def forward(self, x: Tensor) -> Tensor:
        """decode(mean of encode(x)): the reconstruction without noise."""
        return self.decode(self.encode(x)[:, :self.channels])


class Autoencoder(Tokenizer):
    """The convolutional autoencoder of LDM and VA-VAE, rebuilt from its config (see AUTOENCODERS).

    ch, ch_mult       width of level i is ch * ch_mult[i]; the stride is 2 ** (levels - 1)
    num_res_blocks    per level of the encoder; the decoder has one more
    attn_resolutions  levels with attention, by their size when the image is `resolution` pixels wide
    z_channels        C, the channels of the latent
    standardize_mean  see Tokenizer.standardized; in the config only where it is True, as in no published file
    """

    def __init__(self, ch: int, ch_mult: tuple[int, ...], num_res_blocks: int,
                 attn_resolutions: tuple[int, ...], resolution: int, z_channels: int,
                 standardize_mean: bool = False) -> None:
        super().__init__()
        self.config = dict(ch=ch, ch_mult=tuple(ch_mult), num_res_blocks=num_res_blocks,
                           attn_resolutions=tuple(attn_resolutions), resolution=resolution,
                           z_channels=z_channels)
        self.encoder = Encoder(**self.config)
        self.decoder = Decoder(**self.config)
        self.quant_conv = nn.Conv2d(2 * z_channels, 2 * z_channels, 1)
        self.post_quant_conv = nn.Conv2d(z_channels, z_channels, 1)
        if standardize_mean:
            self.config["standardize_mean"] = True
            self.mean_norm = nn.BatchNorm2d(z_channels, affine=False)

    @property
    def stride(self) -> int:
        """Pixels per latent position, along each side."""
        return 2 ** (len(self.config["ch_mult"]) - 1)

    @property
    def last_layer(self) -> nn.Parameter:
        """The weight at which the adaptive GAN weight compares gradients."""
        return self.decoder.conv_out.weight

    @property
    def encoder_last_layer(self) -> nn.Parameter:
        """The weight at which VA-VAE's adaptive alignment weight compares gradients."""
        return self.encoder.conv_out.weight

    def encode(self, x: Tensor) -> Tensor:
        """Moments of q(z | x): x [B, 3, H, W] in [-1, 1] -> [B, 2C, H/stride, W/stride], always float32.

        The first C channels are the mean, the rest the log-variance (losses.split_moments clamps it).
        The 1x1 convolution that ends the encoder runs outside autocast: bfloat16 steps are 0.03 at |z| = 4,
        not small beside the sigma = 0.25 that the Variance Expansion loss reaches.
        Raises ValueError unless H and W are multiples of the stride.
        """
        B, _, H, W = x.shape
        if H % self.stride or W % self.stride:
            raise ValueError(f"an image of {H} x {W} pixels cannot be encoded: both sides must be multiples "
                             f"of {self.stride}, the stride of this tokenizer")
        h = self.encoder(x)
        with torch.autocast(h.device.type, enabled=False):
            return self.standardized(self.quant_conv(h.float()))

    def decode(self, z: Tensor) -> Tensor:
        """x_hat [B, 3, h*stride, w*stride], float32, not clamped, from z [B, C, h, w]."""
        return self.decoder(self.post_quant_conv(z)).float()


# ------------------------------------------------------------------------------------------------------------
# The discriminator of the tokenizer: pix2pix's PatchGAN as in taming-transformers.  Its logits judge
# overlapping patches of 70 x 70 pixels (30 x 30 of them on a 256 x 256 image).

class PatchGAN(nn.Module):
    """x [B, 3, H, W] in [-1, 1] -> logits [B, 1, h, w]; H and W at least 32.  2,765,633 parameters.

    Batch statistics in the three inner layers: a batch of one tiny image has none, and real and reconstructed
    images passed together would share them.
    """

    def __init__(self, ndf: int = 64, n_layers: int = 3) -> None:
        super().__init__()
        width = [ndf * min(2 ** i, 8) for i in range(n_layers + 1)]
        layers: list[nn.Module] = [nn.Conv2d(3, width[0], 4, stride=2, padding=1), nn.LeakyReLU(0.2, True)]
        for i in range(1, n_layers + 1):
            stride = 2 if i < n_layers else 1
            layers += [nn.Conv2d(width[i - 1], width[i], 4, stride=stride, padding=1, bias=False),
                       nn.BatchNorm2d(width[i]), nn.LeakyReLU(0.2, True)]
        self.main = nn.Sequential(*layers, nn.Conv2d(width[-1], 1, 4, padding=1))
        for module in self.main:
            if isinstance(module, nn.Conv2d):
                nn.init.normal_(module.weight, 0.0, 0.02)
            elif isinstance(module, nn.BatchNorm2d):
                nn.init.normal_(module.weight, 1.0, 0.02)

    def forward(self, x: Tensor) -> Tensor:
        return self.main(x)


# ------------------------------------------------------------------------------------------------------------
# Positions and times of the diffusion transformer.  Both families add a frozen sin-cos table to the tokens;
# LightningDiT also rotates queries and keys, so that attention sees relative positions.

def sincos_table(width: int, size: int) -> Tensor:
    """Frozen 2-D position table [1, size*size, width], rows of the grid one after another.

    The first half of the channels encodes the column, the second the row; each half is sin then cos of
    position * 10000^(-k/(width/4)), k = 0 .. width/4 - 1 (MAE, DiT).
    """
    omega = 10000.0 ** (-torch.arange(width // 4, dtype=torch.float64) / (width // 4))
    angle = torch.arange(size, dtype=torch.float64)[:, None] * omega
    axis = torch.cat([angle.sin(), angle.cos()], dim=1)                        # [size, width/2]
    column = axis[None, :, :].expand(size, size, -1)
    row = axis[:, None, :].expand(size, size, -1)
    return torch.cat([column, row], dim=2).reshape(1, size * size, width).float()


class Rope(nn.Module):
    """Rotary embedding in two dimensions (EVA-02, LightningDiT).  [B, heads, size*size, D] -> the same.

        (a, b) -> (a cos - b sin, b cos + a sin)    for neighbouring channels (a, b)

    with angle = position * 10000^(-2k/(D/2)); the first half of the channels turns with the row, the second
    with the column.  Scores between rotated queries and keys depend on differences of positions only.
    The tables are buffers because published files hold them; they are always computed, never loaded.
    """

    def __init__(self, head_width: int, size: int) -> None:
        super().__init__()
        omega = 10000.0 ** (-torch.arange(head_width // 4, dtype=torch.float64) / (head_width // 4))
        angle = torch.arange(size, dtype=torch.float64)[:, None] * omega.repeat_interleave(2)
        row = angle[:, None, :].expand(size, size, -1)                         # [size, size, D/2]
        column = angle[None, :, :].expand(size, size, -1)
        angle = torch.cat([row, column], dim=2).reshape(size * size, head_width)
        self.register_buffer("freqs_cos", angle.cos().float())
        self.register_buffer("freqs_sin", angle.sin().float())

    def forward(self, q: Tensor) -> Tensor:
        a, b = q.unflatten(-1, (-1, 2)).unbind(-1)
        turned = torch.stack([-b, a], dim=-1).flatten(-2)
        return q * self.freqs_cos + turned * self.freqs_sin


class TimestepEmbedder(nn.Module):
    """t [B] in [0, 1] -> [B, width]: cos and sin of t * 10000^(-i/128), i = 0 .. 127, then an MLP.

    t is not multiplied by 1000, so most of the frequencies are almost constant: as published.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(256, width), nn.SiLU(), nn.Linear(width, width))

    def forward(self, t: Tensor) -> Tensor:
        omega = torch.exp(-math.log(10000.0) / 128 * torch.arange(128, device=t.device, dtype=torch.float32))
        angle = t.float()[:, None] * omega
        return self.mlp(torch.cat([angle.cos(), angle.sin()], dim=1))


# ------------------------------------------------------------------------------------------------------------
# One transformer block for both families, and the parts that the ViT autoencoder shares with it.
#     lightningdit   RMSNorm with gain, SwiGLU, rotary positions
#     sit            LayerNorm without affine, GELU-tanh, no rotation
#     vit            RMSNorm without gain, SwiGLU, no rotation, no biases
# The condition c = time + label reaches it through adaLN-Zero: scale, shift and a gate that starts at zero.

def token_norm(family: str, width: int) -> nn.Module:
    """The norm in front of attention, MLP and head."""
    if family == "sit":
        return nn.LayerNorm(width, eps=1e-6, elementwise_affine=False)
    return nn.RMSNorm(width, eps=1e-6, elementwise_affine=family == "lightningdit")


def modulation(width: int, parts: int) -> nn.Sequential:
    """c [B, D] -> `parts` vectors of shift, scale or gate, concatenated: [B, parts * D]."""
    return nn.Sequential(nn.SiLU(), nn.Linear(width, parts * width))


def modulate(h: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """h (1 + scale) + shift"""
    return h * (1 + scale) + shift


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """softmax(q k^T / sqrt(d)) v, over the last two dimensions.  [B, heads, N, d]"""
    if v.device.type == "cpu" and v.dtype == torch.bfloat16 and v.shape[2] <= 128:
        # As written, 3 times as fast there, forward and backward, as the library at 64 tokens.
        weight = (q @ k.mT / math.sqrt(q.shape[-1])).float().softmax(-1)
        return weight.to(v.dtype) @ v
    return F.scaled_dot_product_attention(q, k, v)


class Attention(nn.Module):
    """Multi-head self-attention with optional QK-norm, then optional rotation, of q and k.  [B, N, D]"""

    def __init__(self, family: str, width: int, heads: int, qk_norm: bool) -> None:
        super().__init__()
        norm = nn.LayerNorm if family == "sit" else (lambda d: token_norm(family, d))
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width, bias=family != "vit")
        self.q_norm = norm(width // heads) if qk_norm else nn.Identity()
        self.k_norm = norm(width // heads) if qk_norm else nn.Identity()
        self.proj = nn.Linear(width, width, bias=family != "vit")

    def forward(self, h: Tensor, rope: nn.Module = nn.Identity()) -> Tensor:
        B, N, D = h.shape
        q, k, v = self.qkv(h).reshape(B, N, 3, self.heads, D // self.heads).permute(2, 0, 3, 1, 4)
        # Norm and rotation run in float32; without the way back a bfloat16 model would attend in float32.
        q = rope(self.q_norm(q.float())).to(v.dtype)
        k = rope(self.k_norm(k.float())).to(v.dtype)
        return self.proj(attend(q, k, v).transpose(1, 2).reshape(B, N, D))


class SwiGLU(nn.Module):
    """w3(silu(a) * b) with (a, b) = w12(h).  A hidden width of 8/3 D has the cost of an MLP of ratio 4."""

    def __init__(self, width: int, hidden: int, bias: bool = True) -> None:
        super().__init__()
        self.w12 = nn.Linear(width, 2 * hidden, bias)
        self.w3 = nn.Linear(hidden, width, bias)

    def forward(self, h: Tensor) -> Tensor:
        a, b = self.w12(h).chunk(2, dim=-1)
        return self.w3(F.silu(a) * b)


class Mlp(nn.Module):
    """fc2(gelu(fc1(h))), ratio 4.  approximate: "tanh" as in DiT, or "none"."""

    def __init__(self, width: int, approximate: str = "tanh") -> None:
        super().__init__()
        self.approximate = approximate
        self.fc1 = nn.Linear(width, 4 * width)
        self.fc2 = nn.Linear(4 * width, width)

    def forward(self, h: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(h), approximate=self.approximate))


class Block(nn.Module):
    """h += gate * f(modulate(norm(h), shift, scale)), f = attention, then f = MLP.  [B, N, D], c [B, D]"""

    def __init__(self, family: str, width: int, heads: int, qk_norm: bool) -> None:
        super().__init__()
        self.norm1 = token_norm(family, width)
        self.attn = Attention(family, width, heads, qk_norm)
        self.norm2 = token_norm(family, width)
        self.mlp = SwiGLU(width, 8 * width // 3) if family == "lightningdit" else Mlp(width)
        self.adaLN_modulation = modulation(width, 6)

    def forward(self, h: Tensor, c: Tensor, rope: nn.Module) -> Tensor:
        parts = self.adaLN_modulation(c)[:, None].chunk(6, dim=-1)
        shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = parts
        h = h + gate_a * self.attn(modulate(self.norm1(h), shift_a, scale_a), rope)
        return h + gate_m * self.mlp(modulate(self.norm2(h), shift_m, scale_m))


def unpatchify(tokens: Tensor, rows: int, columns: int, p: int) -> Tensor:
    """Tokens [B, rows*columns, p*p*C], row, column, channel in each -> pixels [B, C, rows*p, columns*p]."""
    pixels = tokens.unflatten(1, (rows, columns)).unflatten(3, (p, p, -1))
    return pixels.permute(0, 5, 1, 3, 2, 4).flatten(4, 5).flatten(2, 3)


class FinalLayer(nn.Module):
    """linear(modulate(norm(h), shift, scale)): [B, N, D] -> [B, N, out]"""

    def __init__(self, family: str, width: int, out: int) -> None:
        super().__init__()
        self.norm_final = token_norm(family, width)
        self.linear = nn.Linear(width, out)
        self.adaLN_modulation = modulation(width, 2)

    def forward(self, h: Tensor, c: Tensor) -> Tensor:
        shift, scale = self.adaLN_modulation(c)[:, None].chunk(2, dim=-1)
        return self.linear(modulate(self.norm_final(h), shift, scale))


# ------------------------------------------------------------------------------------------------------------
# The tokenizer of GAE (2603.10365, Table 8): a transformer over patches encodes, another decodes, a linear
# adapter makes the latent.  GAE's gives C numbers per patch; ours 2C, mean and log-variance, so that every
# loss of the paper trains it.

class VitBlock(nn.Module):
    """h += f(norm(h)), f = attention, then f = SwiGLU.  [B, N, D]"""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        unit = min(256, width)                  # GAE: 8/3 D rounded up to a multiple of 256; below 256, 3 D
        self.norm1 = token_norm("vit", width)
        self.attn = Attention("vit", width, heads, qk_norm=True)
        self.norm2 = token_norm("vit", width)
        self.mlp = SwiGLU(width, math.ceil(8 * width / (3 * unit)) * unit, bias=False)

    def forward(self, h: Tensor) -> Tensor:
        h = h + self.attn(self.norm1(h))
        return h + self.mlp(self.norm2(h))


class VitTrunk(nn.Module):
    """linear(norm(blocks(embed(h) + position))): [B, C, side, side] -> [B, N, out], one token per patch."""

    def __init__(self, channels: int, side: int, patch: int, depth: int, width: int, heads: int,
                 out: int) -> None:
        super().__init__()
        self.side = side
        self.embed = nn.Conv2d(channels, width, patch, stride=patch, bias=False)
        self.pos_embed = nn.Parameter(0.02 * torch.randn(1, (side // patch) ** 2, width))
        self.blocks = nn.Sequential(*(VitBlock(width, heads) for _ in range(depth)))
        self.norm = token_norm("vit", width)
        self.linear = nn.Linear(width, out, bias=False)
        self.recompute = False   # as in Decoder

    def forward(self, h: Tensor) -> Tensor:
        B, C, H, W = h.shape
        if (H, W) != (self.side, self.side):
            raise ValueError(f"an input of {H} x {W} does not fit this ViT tokenizer: its positions are "
                             f"learned for {self.side} x {self.side} only")
        h = self.embed(h).flatten(2).transpose(1, 2) + self.pos_embed
        for block in self.blocks:
            h = checkpoint(block, h, use_reentrant=False) if self.recompute else block(h)
        return self.linear(self.norm(h))


class VitAutoencoder(Tokenizer):
    """The ViT autoencoder of GAE, rebuilt from its config (see AUTOENCODERS).

    image_size           side of the images in pixels: encode and decode raise ValueError at any other size
    patch                pixels per token along each side, the stride
    depth, width, heads  of the encoder, and of the decoder
    z_channels           C, the channels of the latent
    latent_norm          divide the mean of each token by its RMS over the C channels, as GAE does
    standardize_mean     as in Autoencoder

    Initialisation of GAE: patches Kaiming by fan-out, positions N(0, 0.02^2), the rest as PyTorch does.
    """

    def __init__(self, image_size: int, patch: int, depth: int, width: int, heads: int, z_channels: int,
                 latent_norm: bool, standardize_mean: bool = False) -> None:
        super().__init__()
        if image_size % patch or width % heads:
            raise ValueError(f"image_size {image_size} must be a multiple of patch ({patch}), "
                             f"and width {width} of heads ({heads})")
        self.config = dict(arch="vit", image_size=image_size, patch=patch, depth=depth, width=width,
                           heads=heads, z_channels=z_channels, latent_norm=latent_norm)
        self.stride, self.grid = patch, image_size // patch
        self.encoder = VitTrunk(3, image_size, patch, depth, width, heads, out=width)
        self.adapter = nn.Linear(width, 2 * z_channels, bias=False)
        self.decoder = VitTrunk(z_channels, self.grid, 1, depth, width, heads, out=patch * patch * 3)
        nn.init.kaiming_normal_(self.encoder.embed.weight, mode="fan_out")
        if standardize_mean:
            self.config["standardize_mean"] = True
            self.mean_norm = nn.BatchNorm2d(z_channels, affine=False)

    @property
    def last_layer(self) -> nn.Parameter:
        return self.decoder.linear.weight

    @property
    def encoder_last_layer(self) -> nn.Parameter:
        return self.adapter.weight

    def encode(self, x: Tensor) -> Tensor:
        """x [B, 3, image_size, image_size] in [-1, 1] -> [B, 2C, h, w], float32 as in Autoencoder.encode."""
        h = self.encoder(x)
        with torch.autocast(h.device.type, enabled=False):
            mean, logvar = self.adapter(h.float()).chunk(2, dim=-1)
            if self.config["latent_norm"]:
                mean = F.rms_norm(mean, (self.channels,), eps=1e-6)
            moments = torch.cat([mean, logvar], dim=-1).transpose(1, 2)
            return self.standardized(moments.unflatten(2, (self.grid, self.grid)))

    def decode(self, z: Tensor) -> Tensor:
        """x_hat [B, 3, image_size, image_size], float32, not clamped, from z [B, C, h, w]."""
        return unpatchify(self.decoder(z), self.grid, self.grid, self.stride).float()


# ------------------------------------------------------------------------------------------------------------
# The diffusion transformer, a velocity field on normalised latents (Eq. 4): LightningDiT or SiT by config.
# Labels are dropped for classifier-free guidance by the training loop, which passes the null label.

class DiT(nn.Module):
    """Velocity v_hat(x_t, t, y), rebuilt from its config (see DITS).

    family        "lightningdit" or "sit" (which is also the network of DiT)
    depth, width, heads
    input_size    side of the latent, in positions; patch: positions per token, along each side
    in_channels   C, the channels of the latent
    num_classes   labels are 0 .. num_classes - 1, and num_classes is the null label
    qk_norm       norm of queries and keys in each head
    learn_sigma   twice the output channels, the second half never used: the published SiT and DiT files

    recompute = True keeps no activations inside the blocks and computes them again in the backward pass.
    """

    def __init__(self, family: str, depth: int, width: int, heads: int, input_size: int, patch: int,
                 in_channels: int, num_classes: int, qk_norm: bool, learn_sigma: bool) -> None:
        super().__init__()
        if family not in ("lightningdit", "sit"):
            raise ValueError(f'family is "lightningdit" or "sit", not "{family}"')
        if width % (4 * heads) or input_size % patch:
            raise ValueError(f"width {width} must be a multiple of 4 x heads ({heads}), "
                             f"and input_size {input_size} of patch ({patch})")
        self.config = dict(family=family, depth=depth, width=width, heads=heads, input_size=input_size,
                           patch=patch, in_channels=in_channels, num_classes=num_classes, qk_norm=qk_norm,
                           learn_sigma=learn_sigma)
        grid = input_size // patch
        self.out_channels = in_channels * (2 if learn_sigma else 1)
        embed = nn.Conv2d(in_channels, width, patch, stride=patch)
        self.x_embedder = nn.Sequential(OrderedDict(proj=embed))
        self.t_embedder = TimestepEmbedder(width)
        self.y_embedder = nn.Sequential(OrderedDict(embedding_table=nn.Embedding(num_classes + 1, width)))
        self.pos_embed = nn.Parameter(sincos_table(width, grid), requires_grad=False)
        self.feat_rope = Rope(width // heads, grid) if family == "lightningdit" else nn.Identity()
        self.blocks = nn.ModuleList(Block(family, width, heads, qk_norm) for _ in range(depth))
        self.final_layer = FinalLayer(family, width, patch * patch * self.out_channels)
        self.recompute = False
        self.initialize()

    def initialize(self) -> None:
        """Initialisation of DiT: Xavier everywhere, zero where the output would not start at zero."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        nn.init.xavier_uniform_(self.x_embedder.proj.weight.data.flatten(1))
        nn.init.zeros_(self.x_embedder.proj.bias)
        nn.init.normal_(self.y_embedder.embedding_table.weight, std=0.02)
        nn.init.normal_(self.t_embedder.mlp[0].weight, std=0.02)
        nn.init.normal_(self.t_embedder.mlp[2].weight, std=0.02)
        modulations = [block.adaLN_modulation[1] for block in self.blocks]
        for linear in modulations + [self.final_layer.adaLN_modulation[1], self.final_layer.linear]:
            nn.init.zeros_(linear.weight)
            nn.init.zeros_(linear.bias)

    def forward(self, x_t: Tensor, t: Tensor, y: Tensor) -> Tensor:
        """v_hat [B, C, h, w], float32, from x_t [B, C, h, w], t [B] in [0, 1] (1 = data) and y [B] long."""
        B, C, H, W = x_t.shape
        p = self.config["patch"]
        h = self.x_embedder(x_t).flatten(2).transpose(1, 2) + self.pos_embed                    # [B, N, D]
        c = self.t_embedder(t) + self.y_embedder(y)                                             # [B, D]
        for block in self.blocks:
            if self.recompute:   # nothing random happens inside, so no generator states are kept either
                h = checkpoint(block, h, c, self.feat_rope, use_reentrant=False, preserve_rng_state=False)
            else:
                h = block(h, c, self.feat_rope)
        return unpatchify(self.final_layer(h, c), H // p, W // p, p)[:, :C].float()


# ------------------------------------------------------------------------------------------------------------
# Latent statistics.  The transformer learns latents of zero mean and unit deviation in every channel, with
# statistics from the tokenizer's checkpoint.  Training, sampling and evaluation share these two lines:
# forgetting one of them is the most common failure with VA-VAE latents.

def normalize(z: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """(z - mean_c) / std_c.  z: [B, C, h, w] of the tokenizer; mean, std: [C].  Returns: [B, C, h, w]."""
    return (z - mean.to(z)[:, None, None]) / std.to(z)[:, None, None]


def denormalize(z: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """z std_c + mean_c, the inverse of `normalize`, in front of the decoder.  Shapes as there."""
    return z * std.to(z)[:, None, None] + mean.to(z)[:, None, None]


# ------------------------------------------------------------------------------------------------------------
# Build and load.  A checkpoint of ours names its config and rebuilds itself; the config of a published file
# is read off its tensors.  Either way every tensor must be there, and fit: nothing is skipped in silence.

def build_autoencoder(config: dict) -> Tokenizer:
    """The tokenizer of a config, e.g. AUTOENCODERS["f16d32"] or a checkpoint's "model_config".

    arch is "vit", or "conv", which a config need not say: those of older checkpoints do not.
    """
    sizes = dict(config)
    arch = sizes.pop("arch", "conv")
    if arch not in ("conv", "vit"):
        raise ValueError(f'arch is "conv" or "vit", not "{arch}"')
    return VitAutoencoder(**sizes) if arch == "vit" else Autoencoder(**sizes)


def build_dit(config: dict) -> DiT:
    """The transformer of a config, e.g. DITS["B"] | {"num_classes": 10} or a checkpoint's "model_config"."""
    return DiT(**config)


def load_strict(module: nn.Module, state: dict[str, Tensor], source: str | Path) -> None:
    """Fill `module` from `state`.  Raises ValueError naming what is missing, unexpected or of wrong shape."""
    wanted = {name: tuple(value.shape) for name, value in module.state_dict().items()}
    given = {name: tuple(value.shape) for name, value in state.items()}
    wrong = [f"{name} {given[name]} instead of {wanted[name]}"
             for name in wanted if name in given and given[name] != wanted[name]]
    differences = {"missing": [name for name in wanted if name not in given],
                   "unexpected": [name for name in given if name not in wanted],
                   "of wrong shape": wrong}
    found = [f"{len(names)} {kind}: " + ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
             for kind, names in differences.items() if names]
    if found:
        raise ValueError(f"{source} does not fit this {type(module).__name__} of {len(wanted)} tensors; "
                         + "; ".join(found))
    module.load_state_dict(state)


def read_checkpoint(path: str | Path) -> dict:
    """The dict in a file of torch.save, on the CPU, tensors and plain containers only.

    Raises FileNotFoundError, or ValueError for a file that is not such a dict.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"{path} is not a file: give the path of a checkpoint, such as checkpoint.pt")
    try:
        # Training files of DiT and SiT hold their command line as a Namespace: harmless, their only class.
        with torch.serialization.safe_globals([argparse.Namespace]):
            checkpoint = torch.load(path, weights_only=True, map_location="cpu")
    except Exception as error:
        raise ValueError(f"{path} cannot be read as a checkpoint ({type(error).__name__}): it is damaged or "
                         f"holds more than tensors; download it or train it again") from error
    if not isinstance(checkpoint, dict):
        raise ValueError(f"{path} holds a {type(checkpoint).__name__}, not the dict of a checkpoint")
    return checkpoint


def read_kind(path: str | Path, kind: str) -> dict:
    """`read_checkpoint`, refusing a checkpoint of ours that holds another kind of network."""
    checkpoint = read_checkpoint(path)
    if checkpoint.get("kind", kind) != kind:
        raise ValueError(f'{path} is a "{checkpoint["kind"]}" checkpoint where a "{kind}" one is needed')
    return checkpoint


def tensors(state: dict) -> dict[str, Tensor]:
    """The tensors of a state dict, without the `module.` that DistributedDataParallel puts before names."""
    return {name.removeprefix("module."): value for name, value in state.items() if torch.is_tensor(value)}


def published_autoencoder_config(state: dict[str, Tensor]) -> dict:
    """LDM's f16, like VA-VAE, with the number of channels that post_quant_conv has."""
    weight = state.get("post_quant_conv.weight")
    return AUTOENCODERS["f16d32"] if weight is None else LDM_F16 | dict(z_channels=len(weight))


def load_autoencoder(path: str | Path, config: dict | None = None) -> tuple[Tokenizer, dict]:
    """The tokenizer of a file, in eval mode on the CPU, and the dict in that file.

    path    a checkpoint of train_tokenizer.py, or a published LDM or VA-VAE file: tensors, bare or under
            `state_dict`, where losses, the foundation model and its projection may accompany the autoencoder
    config  only for published files that are not LDM's f16

    A published file has no `latent_mean` and `latent_std`; `model_config` is set in the returned dict.
    Raises FileNotFoundError, or ValueError when the file is damaged or a tensor is missing, extra, misshapen.
    """
    checkpoint = read_kind(path, "tokenizer")
    state = tensors(checkpoint.get("model", checkpoint.get("state_dict", checkpoint)))
    company = ("loss.", "foundation_model.", "linear_proj.")
    state = {name: value for name, value in state.items() if not name.startswith(company)}
    config = config or checkpoint.get("model_config") or published_autoencoder_config(state)
    autoencoder = build_autoencoder(config)
    load_strict(autoencoder, state, path)
    return autoencoder.eval(), checkpoint | {"model_config": autoencoder.config}


def published_dit_config(state: dict[str, Tensor], path: str | Path) -> dict:
    """The config implied by the shapes of a LightningDiT or SiT file.  Raises ValueError where none is."""
    try:
        width, channels, patch, _ = state["x_embedder.proj.weight"].shape
        depth = 1 + max(int(name.split(".")[1]) for name in state if name.startswith("blocks."))
        heads = {(size["depth"], size["width"]): size["heads"] for size in DITS.values()}[depth, width]
        return dict(family="lightningdit" if "blocks.0.mlp.w12.weight" in state else "sit",
                    depth=depth, width=width, heads=heads,
                    input_size=patch * math.isqrt(state["pos_embed"].shape[1]), patch=patch,
                    in_channels=channels, num_classes=len(state["y_embedder.embedding_table.weight"]) - 1,
                    qk_norm="blocks.0.attn.q_norm.weight" in state,
                    learn_sigma=len(state["final_layer.linear.bias"]) == 2 * channels * patch * patch)
    except (KeyError, ValueError) as error:
        raise ValueError(f"{path} is not a LightningDiT or SiT of a size in DITS ({error} is not known): "
                         f"give its config") from error


def load_dit(path: str | Path, weights: str = "ema", config: dict | None = None) -> tuple[DiT, dict]:
    """The transformer of a file, in eval mode on the CPU, and the dict in that file.

    path     a checkpoint of train_dit.py, or a published LightningDiT or SiT file: tensors, bare or in a
             container {model, ema, ...}, with or without `module.` before each name
    weights  "ema" or "model", where the file holds both
    config   only for published files of a size that is not in DITS

    Rotary tables in the file are ignored for our own.  A DiT file has the names of a SiT but predicts noise.
    Raises FileNotFoundError, or ValueError when the file is damaged or a tensor is missing, extra, misshapen.
    """
    checkpoint = read_kind(path, "dit")
    if weights not in checkpoint and ("model" in checkpoint or "ema" in checkpoint):
        raise ValueError(f'{path} holds no "{weights}" weights')
    state = tensors(checkpoint.get(weights, checkpoint))
    config = config or checkpoint.get("model_config") or published_dit_config(state, path)
    dit = build_dit(config)
    tables = {f"feat_rope.{name}": value for name, value in dit.feat_rope.named_buffers()}
    load_strict(dit, state | tables, path)
    return dit.eval(), checkpoint | {"model_config": dit.config}
