"""The networks, and the tables of their sizes.

    Autoencoder           the convolutional tokenizer of LDM and VA-VAE
    VitAutoencoder        a tokenizer made of transformers, as in GAE
    PatchGAN              the discriminator that a tokenizer may train with
    DiT                   the diffusion transformer on their latents (Eq. 4)

Images x are [B, 3, H, W] in [-1, 1].  Latents z are [B, C, h, w] with
h = H / stride.  Random numbers come from the caller; only the initial weights
are drawn here.  The decoder of DGAE and the teacher of GAE are in neighbours.py.

    tokenizer = build_tokenizer(AUTOENCODERS["demo"])
    mean, logvar, z, x_hat = tokenizer(x, eps, scale)
    latents = dict(in_channels=8, input_size=8, num_classes=10)
    dit = build_dit(DITS["demo"] | latents)
    v_hat = dit(x_t, t, y)               # t = 1 at the data

Modules are named as in the published checkpoints, so that a published file
loads as it is (see checkpoints.py).  The names in the ViT are our own.
"""

import math
from collections import OrderedDict
from collections.abc import Sequence

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from losses import split_moments
from runtime import InputError

# ------------------------------------------------------------------------------
# Sizes of the tokenizers.  A config is a plain dict that is stored in the
# checkpoint and rebuilds the network by itself.  f16d32 is the tokenizer of the
# paper and of VA-VAE.  The ViT sizes are those of GAE's Table 8.  RESULTS.md tells
# how DGAE's were found.  Rows with "demo" or "shapes" are for images of 32 x 32
# pixels: the preset "demo" trains "vit-shapes", and "small" trains "vit-demo".

LDM_F16 = dict(arch="conv", ch=128, ch_mult=(1, 1, 2, 2, 4), num_res_blocks=2,
               attn_resolutions=(16,), resolution=256)
LDM_F8 = LDM_F16 | dict(ch_mult=(1, 2, 4, 4), attn_resolutions=())
VIT_F16D32 = dict(arch="vit", image_size=256, patch=16, z_channels=32, latent_norm=False)
VIT_L = VIT_F16D32 | dict(depth=24, width=1024, heads=16)
VIT_SHAPES = VIT_F16D32 | dict(
    depth=3, width=128, heads=2, image_size=32, patch=8, z_channels=16, smooth=8)
DGAE = LDM_F8 | dict(arch="dgae", z_channels=4, unet_mult=(1, 2, 2, 4, 4), unet_blocks=2)

AUTOENCODERS: dict[str, dict] = {
    "demo": dict(arch="conv", ch=16, ch_mult=(1, 2, 2), num_res_blocks=1,
                 attn_resolutions=(), resolution=32, z_channels=8),
    "f8d4": LDM_F8 | dict(z_channels=4),   # SD-VAE
    "f8d8": LDM_F8 | dict(z_channels=8),
    "f16d16": LDM_F16 | dict(z_channels=16),
    "f16d32": LDM_F16 | dict(z_channels=32),
    "vit-demo": VIT_F16D32 | dict(
        depth=3, width=64, heads=2, image_size=32, patch=4, z_channels=8),
    "vit-shapes": VIT_SHAPES,
    "vit-s": VIT_F16D32 | dict(depth=12, width=384, heads=6),
    "vit-b": VIT_F16D32 | dict(depth=12, width=768, heads=12),
    "vit-l": VIT_L,
    "gae-demo": VIT_SHAPES | dict(latent_norm=True),
    "gae-d32": VIT_L | dict(latent_norm=True),
    "gae-d64": VIT_L | dict(latent_norm=True, z_channels=64),
    "dgae-demo": DGAE | dict(
        ch=16, ch_mult=(1, 2, 2), num_res_blocks=1, resolution=32, z_channels=8,
        unet_ch=12, unet_mult=(1, 2), unet_blocks=2),
    "dgae-b": DGAE | dict(unet_ch=128),
    "dgae-m": DGAE | dict(unet_ch=192),
    "dgae-l": DGAE | dict(unet_ch=256),
}

# Sizes of the transformers.  The latents add in_channels, input_size and
# num_classes to a row.  "DiT-B" is the paper's "DiT": the network of DiT and
# SiT, with one token per latent position as in LightningDiT.  The SiT rows have
# patches of 2 x 2 positions, as published.  The preset "demo" trains "shapes", and the
# preset "small" trains "demo".

LIGHTNINGDIT = dict(family="lightningdit", patch=1)
SIT = dict(family="sit", patch=2)
SMALL = dict(depth=12, width=384, heads=6)
BASE = dict(depth=12, width=768, heads=12)
LARGE = dict(depth=24, width=1024, heads=16)
XLARGE = dict(depth=28, width=1152, heads=16)

DITS: dict[str, dict] = {
    "demo": LIGHTNINGDIT | dict(depth=6, width=128, heads=4),
    "demo/2": LIGHTNINGDIT | dict(depth=6, width=128, heads=4, patch=2),
    "shapes": LIGHTNINGDIT | dict(depth=4, width=128, heads=4),
    "S": LIGHTNINGDIT | SMALL,
    "B": LIGHTNINGDIT | BASE,
    "L": LIGHTNINGDIT | LARGE,
    "XL": LIGHTNINGDIT | XLARGE,
    "1p0B": LIGHTNINGDIT | dict(depth=24, width=1536, heads=24),
    "1p6B": LIGHTNINGDIT | dict(depth=28, width=1792, heads=28),
    "DiT-B": SIT | BASE | dict(patch=1),
    "SiT-S/2": SIT | SMALL,
    "SiT-B/2": SIT | BASE,
    "SiT-L/2": SIT | LARGE,
    "SiT-XL/2": SIT | XLARGE,
}

# ------------------------------------------------------------------------------
# Parts of the convolutional autoencoder: residual blocks with the norm in
# front, and attention with a single head at low resolution.

def named(**layers):
    """nn.Sequential whose layers have the names of the published files."""
    return nn.Sequential(OrderedDict(layers))

def group_norm(channels):
    """32 groups as published, or fewer, so that each has at least 4 channels.

    Groups of one channel would erase the mean colour of the image.
    """
    return nn.GroupNorm(min(32, channels // 4), channels, eps=1e-6)

class ResidualBlock(nn.Module):
    """h + conv(silu(norm(conv(silu(norm(h)))))).  [B, C, H, W]"""
    def __init__(self, c_in, c_out):
        super().__init__()
        self.norm1 = group_norm(c_in)
        self.conv1 = nn.Conv2d(c_in, c_out, 3, padding=1)
        self.norm2 = group_norm(c_out)
        self.conv2 = nn.Conv2d(c_out, c_out, 3, padding=1)
        if c_in != c_out:
            self.nin_shortcut = nn.Conv2d(c_in, c_out, 1)

    def forward(self, h):
        skip = self.nin_shortcut(h) if hasattr(self, "nin_shortcut") else h
        h = self.conv1(F.silu(self.norm1(h)))
        return skip + self.conv2(F.silu(self.norm2(h)))

class SpatialAttention(nn.Module):
    """h + proj(softmax(q k^T / sqrt(d)) v) over positions; d = C / heads.  [B, C, H, W]"""
    def __init__(self, channels, heads=1):
        super().__init__()
        self.heads = heads
        self.norm = group_norm(channels)
        self.q = nn.Conv2d(channels, channels, 1)
        self.k = nn.Conv2d(channels, channels, 1)
        self.v = nn.Conv2d(channels, channels, 1)
        self.proj_out = nn.Conv2d(channels, channels, 1)

    def forward(self, h):
        normed = self.norm(h)
        q, k, v = (f(normed).flatten(2).unflatten(1, (self.heads, -1)).mT.contiguous()
                   for f in (self.q, self.k, self.v))
        mixed = F.scaled_dot_product_attention(q, k, v)
        return h + self.proj_out(mixed.mT.reshape(h.shape))

class Level(nn.Module):
    """The blocks at one resolution, then the way to the next resolution."""
    def __init__(self, c_in, c_out, blocks, attention, down=False, up=False):
        super().__init__()
        self.block = nn.ModuleList(
            ResidualBlock(c_out if i else c_in, c_out) for i in range(blocks))
        self.attn = nn.ModuleList(
            SpatialAttention(c_out) if attention else nn.Identity()
            for _ in range(blocks))
        self.downsample, self.upsample = nn.Identity(), nn.Identity()
        if down:  # padded on the right and at the bottom only
            conv = nn.Conv2d(c_out, c_out, 3, stride=2)
            self.downsample = named(pad=nn.ZeroPad2d((0, 1, 0, 1)), conv=conv)
        if up:
            conv = nn.Conv2d(c_out, c_out, 3, padding=1)
            self.upsample = named(nearest=nn.Upsample(scale_factor=2.0), conv=conv)

    def forward(self, h):
        for block, attn in zip(self.block, self.attn):
            h = attn(block(h))
        return self.upsample(self.downsample(h))

def middle(channels):
    """Residual block, attention, residual block at the lowest resolution."""
    return named(
        block_1=ResidualBlock(channels, channels), attn_1=SpatialAttention(channels),
        block_2=ResidualBlock(channels, channels))

class Encoder(nn.Module):
    """x [B, 3, H, W] -> [B, 2C, h, w]"""
    def __init__(self, ch, width, attention, blocks, z_channels):
        super().__init__()
        last, c_in = len(width) - 1, [ch, *width]
        self.conv_in = nn.Conv2d(3, ch, 3, padding=1)
        self.down = nn.ModuleList(
            Level(c_in[i], width[i], blocks, attention[i], down=i < last)
            for i in range(len(width)))
        self.mid = middle(width[last])
        self.norm_out = group_norm(width[last])
        self.conv_out = nn.Conv2d(width[last], 2 * z_channels, 3, padding=1)

    def forward(self, x):
        h = self.conv_in(x)
        for level in self.down:
            h = level(h)
        return self.conv_out(F.silu(self.norm_out(self.mid(h))))

class Decoder(nn.Module):
    """z [B, C, h, w] -> x_hat [B, 3, H, W]

    As in the encoder, the first level is that of full resolution; here it runs
    last.  With recompute = True the levels keep no activations, and compute
    them again in the backward pass.
    """

    def __init__(self, width, attention, blocks, z_channels):
        super().__init__()
        last, c_in = len(width) - 1, [*width[1:], width[-1]]
        self.conv_in = nn.Conv2d(z_channels, width[last], 3, padding=1)
        self.mid = middle(width[last])
        self.up = nn.ModuleList(
            Level(c_in[i], width[i], blocks, attention[i], up=i > 0)
            for i in range(len(width)))
        self.norm_out = group_norm(width[0])
        self.conv_out = nn.Conv2d(width[0], 3, 3, padding=1)
        self.recompute = False

    def forward(self, z):
        h = self.mid(self.conv_in(z))
        for level in reversed(self.up):
            h = checkpoint(level, h, use_reentrant=False) if self.recompute else level(h)
        return self.conv_out(F.silu(self.norm_out(h)))

# ------------------------------------------------------------------------------
# The tokenizer.  The encoder gives the moments of q(z | x) = N(mean, std^2),
# the caller gives eps, and the decoder turns z = mean + std eps (Eq. 5) into
# x_hat.  The kind of noise is part of the tokenizer's config, and nothing
# outside of this class needs to ask for it.

class Tokenizer(nn.Module):
    """What all autoencoders share: the noise of the latent, and forward.

    noise   "learned"   the encoder predicts std, as VE and KL need it
            "fixed"     std = sigma everywhere: sigma-VAE (LatentLM)
            "gaussian"  std = s sigma / 0.8 with one s ~ N(0, 1) for each image,
                        so that |std| is about sigma on average (LatentLM, GAE)
            "none"      std = 0: a plain autoencoder

    A network adds encode(x), and decode(z, images): x_hat [B, 3, H, W], float32 and
    not clamped.  Only a diffusion decoder (`diffuses`) uses `images`, the numbers of the images.
    `config` rebuilds the network, `stride` is the number of pixels per latent
    position along each side, and `channels` is C.
    """

    def __init__(self, config: dict, stride: int) -> None:
        super().__init__()
        self.config, self.stride = config, stride
        noise, sigma = config["noise"], config["sigma"]
        std = {"learned": None, "fixed": sigma, "gaussian": sigma / 0.8, "none": 0.0}
        self.channels, self.fixed_std = config["z_channels"], std[noise]
        self.learns_sigma, self.diffuses = noise == "learned", False

    def posterior(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """mean and logvar = log std^2 of q(z | x): [B, C, h, w], float32.

        Where noise is not learned, logvar is constant, and -inf for "none".
        For "gaussian" it leaves out the scale s of the image.
        """
        moments = self.encode(x)
        if self.learns_sigma:
            return split_moments(moments)
        mean = moments[:, :self.channels].float()
        return mean, 2 * torch.full_like(mean, self.fixed_std).log()

    def sample(self, mean: Tensor, std: Tensor, eps: Tensor, scale: Tensor) -> Tensor:
        """z = mean + std eps, Eq. 5, for eps ~ N(0, I).  [B, C, h, w]

        scale [B] ~ N(0, 1) is the s of "gaussian"; no other noise uses it.
        """
        if self.config["noise"] == "gaussian":
            std = std * scale.view(-1, 1, 1, 1)
        return mean + std * eps

    def forward(self, x: Tensor, eps: Tensor, scale: Tensor) -> tuple[Tensor, ...]:
        """mean, logvar, z, x_hat: all that a training step needs."""
        mean, logvar = self.posterior(x)
        z = self.sample(mean, torch.exp(0.5 * logvar), eps, scale)
        return mean, logvar, z, self.decode(z)

class Autoencoder(Tokenizer):
    """The convolutional autoencoder of LDM and VA-VAE.

    ch, ch_mult       level i is ch * ch_mult[i] wide; the stride doubles from
                      each level to the next
    num_res_blocks    per level of the encoder; the decoder has one more
    attn_resolutions  the levels with attention, named by their size in an
                      image of `resolution` pixels
    z_channels        C, the channels of the latent
    noise, sigma      see Tokenizer
    decoder           a network in place of the usual decoder
    """

    def __init__(self, ch: int, ch_mult: tuple[int, ...], num_res_blocks: int,
                 attn_resolutions: tuple[int, ...], resolution: int, z_channels: int,
                 noise: str = "learned", sigma: float = 0.0,
                 decoder: nn.Module | None = None) -> None:
        super().__init__(dict(
            arch="conv", ch=ch, ch_mult=ch_mult, num_res_blocks=num_res_blocks,
            attn_resolutions=attn_resolutions, resolution=resolution,
            z_channels=z_channels, noise=noise, sigma=sigma), 2 ** (len(ch_mult) - 1))
        width = [ch * m for m in ch_mult]
        attention = [resolution // 2 ** i in attn_resolutions for i in range(len(width))]
        self.encoder = Encoder(ch, width, attention, num_res_blocks, z_channels)
        self.decoder = decoder or Decoder(width, attention, num_res_blocks + 1, z_channels)
        self.quant_conv = nn.Conv2d(2 * z_channels, 2 * z_channels, 1)
        self.post_quant_conv = nn.Conv2d(z_channels, z_channels, 1)

    @property
    def last_layer(self) -> nn.Parameter:
        """The weight where the adaptive GAN weight compares gradients."""
        return self.decoder.conv_out.weight

    @property
    def encoder_last_layer(self) -> nn.Parameter:
        """The weight where VA-VAE's adaptive weight compares gradients."""
        return self.encoder.conv_out.weight

    def encode(self, x: Tensor) -> Tensor:
        """Mean and log-variance, stacked: [B, 2C, h, w], float32 under autocast too."""
        H, W = x.shape[2:]
        if H % self.stride or W % self.stride:
            raise InputError(
                f"this tokenizer cannot encode images of {H} x {W} pixels: "
                f"choose a multiple of {self.stride}")
        h = self.encoder(x)
        with torch.autocast(h.device.type, enabled=False):
            return self.quant_conv(h.float())

    def decode(self, z: Tensor, images: Sequence[int] | None = None) -> Tensor:
        return self.decoder(self.post_quant_conv(z)).float()

# ------------------------------------------------------------------------------
# The discriminator of the tokenizer: the PatchGAN of pix2pix, as in
# taming-transformers.  Each logit judges a patch of 70 x 70 pixels.

class PatchGAN(nn.Module):
    """x [B, 3, H, W] in [-1, 1] -> logits [B, 1, h, w]; H and W at least 32.

    The inner layers use statistics of the batch, which real and reconstructed
    images would share if they were passed together.
    """

    def __init__(self):
        super().__init__()
        layers = [nn.Conv2d(3, 64, 4, 2, padding=1), nn.LeakyReLU(0.2, True)]
        for c_in, c_out, stride in ((64, 128, 2), (128, 256, 2), (256, 512, 1)):
            layers += [
                nn.Conv2d(c_in, c_out, 4, stride, padding=1, bias=False),
                nn.BatchNorm2d(c_out), nn.LeakyReLU(0.2, True)]
        self.main = nn.Sequential(*layers, nn.Conv2d(512, 1, 4, padding=1))
        for layer in self.main:
            if not isinstance(layer, nn.LeakyReLU):
                mean = 1.0 if isinstance(layer, nn.BatchNorm2d) else 0.0
                nn.init.normal_(layer.weight, mean, 0.02)

    def forward(self, x):
        return self.main(x)

# ------------------------------------------------------------------------------
# Positions and times of the diffusion transformer.  Both families add a frozen
# table of sines and cosines to the tokens.  LightningDiT also rotates queries
# and keys, so that attention depends on relative positions.

def angles(size, count):
    """i * 10000^(-k / count): row i < size, column k < count, in double."""
    position = torch.arange(size, dtype=torch.float64)
    k = torch.arange(count, dtype=torch.float64)
    return position[:, None] * 10000.0 ** (-k / count)

def sincos_table(width, size):
    """Frozen table of 2-D positions, row after row: [1, size*size, width].

    The first half of the channels encodes the column, the second the row.
    Each half is the sines, then the cosines, of its angles (MAE, DiT).
    """
    angle = angles(size, width // 4)
    axis = torch.cat([angle.sin(), angle.cos()], dim=1)
    column, row = axis.repeat(size, 1), axis.repeat_interleave(size, dim=0)
    return torch.cat([column, row], dim=1)[None].float()

class Rope(nn.Module):
    """Rotary embedding in two dimensions.  [B, heads, size*size, d]

        (a, b) -> (a cos - b sin, b cos + a sin)    for neighbours (a, b)

    The first half of the channels turns with the row, the second with the
    column (EVA-02, LightningDiT).
    """

    def __init__(self, head_width, size):
        super().__init__()
        angle = angles(size, head_width // 4).repeat_interleave(2, dim=1)
        column, row = angle.repeat(size, 1), angle.repeat_interleave(size, dim=0)
        angle = torch.cat([row, column], dim=1)
        self.register_buffer("freqs_cos", angle.cos().float())
        self.register_buffer("freqs_sin", angle.sin().float())

    def forward(self, q):
        a, b = q.unflatten(-1, (-1, 2)).unbind(-1)
        turned = torch.stack([-b, a], dim=-1).flatten(-2)
        return q * self.freqs_cos + turned * self.freqs_sin

def waves(t: Tensor, width: int) -> Tensor:
    """Cosines, then sines, of t / 10000^(2 k / width): [B] -> [B, width]"""
    k = torch.arange(width // 2, device=t.device, dtype=torch.float32)
    angle = t.float()[:, None] * torch.exp(-math.log(10000.0) / (width // 2) * k)
    return torch.cat([angle.cos(), angle.sin()], dim=1)

class TimestepEmbedder(nn.Module):
    """t [B] in [0, 1] -> [B, width]: 128 cosines, 128 sines, then an MLP.

    As published, t is not multiplied by 1000, so that most angles hardly change.
    """

    def __init__(self, width):
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(256, width), nn.SiLU(), nn.Linear(width, width))

    def forward(self, t):
        return self.mlp(waves(t, 256))

# ------------------------------------------------------------------------------
# One transformer block for both families, and the parts that the ViT
# autoencoder shares with it:
#     lightningdit   RMSNorm with gain, SwiGLU, rotary positions
#     sit            LayerNorm without gain and bias, GELU, no rotation
#     vit            RMSNorm without gain, SwiGLU, no rotation, no biases
# The condition c = time + label sets a shift, a scale and a gate in each block
# (adaLN-Zero).  The gates start at zero, so that each block starts as identity.

def token_norm(family, width):
    """The norm in front of attention, MLP and head."""
    if family == "sit":
        return nn.LayerNorm(width, eps=1e-6, elementwise_affine=False)
    return nn.RMSNorm(width, eps=1e-6, elementwise_affine=family == "lightningdit")

def modulate(h, shift, scale):
    """h (1 + scale) + shift"""
    return h * (1 + scale) + shift

def attend(q, k, v):
    """softmax(q k^T / sqrt(d)) v.  [B, heads, N, d]"""
    if v.device.type == "cpu" and v.dtype == torch.bfloat16 and v.shape[2] <= 128:
        # On a CPU PyTorch's attention takes 3 times as long in bfloat16, at 64 tokens.
        scores = q @ k.mT / math.sqrt(q.shape[-1])
        return scores.float().softmax(-1).to(v.dtype) @ v
    return F.scaled_dot_product_attention(q, k, v)

class Attention(nn.Module):
    """Self-attention; qk_norm norms q and k in each head.  [B, N, D]"""
    def __init__(self, family: str, width: int, heads: int, qk_norm: bool) -> None:
        super().__init__()
        bias, d = family != "vit", width // heads
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width, bias)
        norm = nn.LayerNorm if family == "sit" else lambda d: token_norm(family, d)   # timm's
        self.q_norm = norm(d) if qk_norm else nn.Identity()
        self.k_norm = norm(d) if qk_norm else nn.Identity()
        self.proj = nn.Linear(width, width, bias)

    def forward(self, h: Tensor, rope: nn.Module = nn.Identity()) -> Tensor:
        B, N, D = h.shape
        qkv = self.qkv(h).reshape(B, N, 3, self.heads, D // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        # Norm and rotation are in float32, and attention is not.
        q = rope(self.q_norm(q.float())).to(v.dtype)
        k = rope(self.k_norm(k.float())).to(v.dtype)
        return self.proj(attend(q, k, v).transpose(1, 2).reshape(B, N, D))

class SwiGLU(nn.Module):
    """w3(silu(a) * b) with (a, b) = w12(h).  [B, N, D]"""
    def __init__(self, width, hidden, bias=True):
        super().__init__()
        self.w12 = nn.Linear(width, 2 * hidden, bias)
        self.w3 = nn.Linear(hidden, width, bias)

    def forward(self, h):
        a, b = self.w12(h).chunk(2, dim=-1)
        return self.w3(F.silu(a) * b)

class Mlp(nn.Module):
    """fc2(gelu(fc1(h))).  `approximate` is "tanh" as in DiT, or "none"."""
    def __init__(self, width: int, approximate: str = "tanh") -> None:
        super().__init__()
        self.approximate = approximate
        self.fc1 = nn.Linear(width, 4 * width)
        self.fc2 = nn.Linear(4 * width, width)

    def forward(self, h: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(h), approximate=self.approximate))

class Block(nn.Module):
    """h += gate * f(modulate(norm(h), shift, scale)).  [B, N, D], c [B, D]

    f is attention the first time and the MLP the second.  A hidden width of
    8/3 D makes a SwiGLU as large as an MLP of ratio 4.
    """

    def __init__(self, family, width, heads, qk_norm):
        super().__init__()
        self.norm1 = token_norm(family, width)
        self.attn = Attention(family, width, heads, qk_norm)
        self.norm2 = token_norm(family, width)
        self.mlp = Mlp(width) if family == "sit" else SwiGLU(width, 8 * width // 3)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 6 * width))

    def forward(self, h, c, rope):
        parts = self.adaLN_modulation(c)[:, None].chunk(6, dim=-1)
        shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = parts
        h = h + gate_a * self.attn(modulate(self.norm1(h), shift_a, scale_a), rope)
        return h + gate_m * self.mlp(modulate(self.norm2(h), shift_m, scale_m))

class FinalLayer(nn.Module):
    """linear(modulate(norm(h), shift, scale)): [B, N, D] -> [B, N, out]"""
    def __init__(self, family, width, out):
        super().__init__()
        self.norm_final = token_norm(family, width)
        self.linear = nn.Linear(width, out)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 2 * width))

    def forward(self, h, c):
        shift, scale = self.adaLN_modulation(c)[:, None].chunk(2, dim=-1)
        return self.linear(modulate(self.norm_final(h), shift, scale))

def unpatchify(tokens, rows, columns, p):
    """[B, rows*columns, p*p*C] -> [B, C, rows*p, columns*p]"""
    pixels = tokens.unflatten(1, (rows, columns)).unflatten(3, (p, p, -1))
    return pixels.permute(0, 5, 1, 3, 2, 4).flatten(4, 5).flatten(2, 3)

# ------------------------------------------------------------------------------
# The tokenizer of GAE (Table 8 there): one transformer encodes patches, another
# decodes them, and a linear adapter makes the latent.  GAE's adapter gives only
# a mean.  Ours gives a log-variance too where sigma is learned, so that every loss
# of the paper trains it.

class VitBlock(nn.Module):
    """h += f(norm(h)) for f = attention, then for f = SwiGLU.  [B, N, D]"""
    def __init__(self, width, heads):
        super().__init__()
        # GAE rounds 8/3 D up to a multiple of 256; a narrow ViT has 3 D.
        unit = min(256, width)
        hidden = math.ceil(8 * width / (3 * unit)) * unit
        self.norm1 = token_norm("vit", width)
        self.attn = Attention("vit", width, heads, qk_norm=True)
        self.norm2 = token_norm("vit", width)
        self.mlp = SwiGLU(width, hidden, bias=False)

    def forward(self, h):
        h = h + self.attn(self.norm1(h))
        return h + self.mlp(self.norm2(h))

class VitTrunk(nn.Module):
    """linear(norm(blocks(embed(h) + position))), one token for each patch.

    [B, C, side, side] -> [B, N, c_out]; `recompute` is as in Decoder.
    """

    def __init__(self, c_in, side, patch, depth, width, heads, c_out):
        super().__init__()
        self.side, self.recompute = side, False
        self.embed = nn.Conv2d(c_in, width, patch, stride=patch, bias=False)
        self.pos_embed = nn.Parameter(0.02 * torch.randn(1, (side // patch) ** 2, width))
        self.blocks = nn.Sequential(*(VitBlock(width, heads) for _ in range(depth)))
        self.norm = token_norm("vit", width)
        self.linear = nn.Linear(width, c_out, bias=False)

    def forward(self, h):
        if h.shape[2:] != (self.side, self.side):
            raise InputError(
                f"{h.shape[2]} x {h.shape[3]} does not fit this ViT tokenizer: "
                f"it takes {self.side} x {self.side} only")
        h = self.embed(h).flatten(2).transpose(1, 2) + self.pos_embed
        for block in self.blocks:
            h = checkpoint(block, h, use_reentrant=False) if self.recompute else block(h)
        return self.linear(self.norm(h))

class VitAutoencoder(Tokenizer):
    """The ViT autoencoder of GAE, for square images of one size.

    image_size, patch    in pixels; the stride is patch
    depth, width, heads  of the encoder, and of the decoder
    z_channels           C, the channels of the latent
    latent_norm          divide the mean of each token by its RMS, as in GAE
    smooth               channels of a last 3 x 3 convolution, which hides the seams
                         between large patches; 0 for none, as in GAE
    noise, sigma         see Tokenizer
    """

    def __init__(self, image_size: int, patch: int, depth: int, width: int, heads: int,
                 z_channels: int, latent_norm: bool, smooth: int = 0,
                 noise: str = "learned", sigma: float = 0.0) -> None:
        super().__init__(dict(
            arch="vit", image_size=image_size, patch=patch, depth=depth, width=width,
            heads=heads, z_channels=z_channels, latent_norm=latent_norm, smooth=smooth,
            noise=noise, sigma=sigma), patch)
        size, self.grid = (depth, width, heads), image_size // patch
        self.encoder = VitTrunk(3, image_size, patch, *size, width)
        self.adapter = nn.Linear(width, (1 + self.learns_sigma) * z_channels, bias=False)
        self.decoder = VitTrunk(
            z_channels, self.grid, 1, *size, (smooth or 3) * patch * patch)
        self.smooth = nn.Identity()
        if smooth:
            self.smooth = nn.Sequential(nn.SiLU(), nn.Conv2d(smooth, 3, 3, padding=1))
        nn.init.kaiming_normal_(self.encoder.embed.weight, mode="fan_out")

    @property
    def last_layer(self) -> nn.Parameter:
        return self.smooth[1].weight if self.config["smooth"] else self.decoder.linear.weight

    @property
    def encoder_last_layer(self) -> nn.Parameter:
        return self.adapter.weight

    def encode(self, x: Tensor) -> Tensor:
        """[B, 2C, h, w] as in Autoencoder.encode, or the mean alone; always float32."""
        h = self.encoder(x)
        with torch.autocast(h.device.type, enabled=False):
            moments = self.adapter(h.float())
            if self.config["latent_norm"]:
                mean, logvar = moments.tensor_split([self.channels], dim=-1)
                moments = torch.cat([rms(mean), logvar], dim=-1)
            return moments.transpose(1, 2).unflatten(2, (self.grid, self.grid))

    def decode(self, z: Tensor, images: Sequence[int] | None = None) -> Tensor:
        pixels = unpatchify(self.decoder(z), self.grid, self.grid, self.stride)
        return self.smooth(pixels).float()

def rms(h: Tensor) -> Tensor:
    """Divide by the root mean square over the last dimension."""
    return F.rms_norm(h, h.shape[-1:], eps=1e-6)

# ------------------------------------------------------------------------------
# The diffusion transformer: a velocity field on normalised latents (Eq. 4).
# For classifier-free guidance, the training loop replaces some labels by the
# null label.

class DiT(nn.Module):
    """Velocity v_hat(x_t, t, y) for t in [0, 1], with t = 1 at the data.

    family        "lightningdit" or "sit" (see token_norm)
    input_size    side of the latent; patch: positions per side of a token
    in_channels   C, the channels of the latent
    num_classes   the number of labels, which is also the null label
    qk_norm       norm the queries and keys of each head
    learn_sigma   twice the output channels, as in the published SiT files; the
                  second half is never used

    `recompute` is as in Decoder, for the blocks.
    """

    def __init__(self, family: str, depth: int, width: int, heads: int, input_size: int,
                 patch: int, in_channels: int, num_classes: int, qk_norm: bool = False,
                 learn_sigma: bool = False) -> None:
        super().__init__()
        if family not in ("lightningdit", "sit"):
            raise ValueError(f'family is "lightningdit" or "sit", not "{family}"')
        if input_size % patch:
            raise InputError(
                f"latents of side {input_size} do not divide into patches of side "
                f"{patch}: choose another transformer, or another size of images")
        self.config = dict(
            family=family, depth=depth, width=width, heads=heads, input_size=input_size,
            patch=patch, in_channels=in_channels, num_classes=num_classes,
            qk_norm=qk_norm, learn_sigma=learn_sigma)
        grid, out = input_size // patch, in_channels * (2 if learn_sigma else 1)
        self.x_embedder = named(proj=nn.Conv2d(in_channels, width, patch, stride=patch))
        self.t_embedder = TimestepEmbedder(width)
        self.y_embedder = named(embedding_table=nn.Embedding(num_classes + 1, width))
        self.pos_embed = nn.Parameter(sincos_table(width, grid), requires_grad=False)
        self.feat_rope = Rope(width // heads, grid) if family == "lightningdit" else nn.Identity()
        self.blocks = nn.ModuleList(Block(family, width, heads, qk_norm) for _ in range(depth))
        self.final_layer = FinalLayer(family, width, patch * patch * out)
        self.recompute = False
        self.initialize()

    def initialize(self) -> None:
        """As in DiT: Xavier, and zero where the output must start at zero."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        nn.init.xavier_uniform_(self.x_embedder.proj.weight.data.flatten(1))
        nn.init.zeros_(self.x_embedder.proj.bias)
        nn.init.normal_(self.y_embedder.embedding_table.weight, std=0.02)
        nn.init.normal_(self.t_embedder.mlp[0].weight, std=0.02)
        nn.init.normal_(self.t_embedder.mlp[2].weight, std=0.02)
        for block in (*self.blocks, self.final_layer):
            nn.init.zeros_(block.adaLN_modulation[1].weight)
        nn.init.zeros_(self.final_layer.linear.weight)

    def forward(self, x_t: Tensor, t: Tensor, y: Tensor) -> Tensor:
        """v_hat [B, C, h, w], float32; x_t [B, C, h, w], t [B], y [B] long."""
        B, C, H, W = x_t.shape
        p = self.config["patch"]
        h = self.x_embedder(x_t).flatten(2).transpose(1, 2) + self.pos_embed
        c = self.t_embedder(t) + self.y_embedder(y)
        for block in self.blocks:
            if self.recompute:
                h = checkpoint(block, h, c, self.feat_rope, use_reentrant=False)
            else:
                h = block(h, c, self.feat_rope)
        return unpatchify(self.final_layer(h, c), H // p, W // p, p)[:, :C].float()

# ------------------------------------------------------------------------------
# A config of the tables above, or of a checkpoint, becomes a network.

def architecture(name: str) -> type[Tokenizer]:
    """The class that a tokenizer's config names as its `arch`."""
    if name == "dgae":   # made of the layers above, in a file of its own
        from neighbours import DiffusionAutoencoder
        return DiffusionAutoencoder
    return {"conv": Autoencoder, "vit": VitAutoencoder}[name]


def build_tokenizer(config: dict) -> Tokenizer:
    """The tokenizer of a config, e.g. AUTOENCODERS["f16d32"]."""
    sizes = {name: value for name, value in config.items() if name != "arch"}
    return architecture(config["arch"])(**sizes)


def build_dit(config: dict) -> DiT:
    """The transformer of a config: a row of DITS and what the latents add."""
    return DiT(**config)
