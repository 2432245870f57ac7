"""The networks of two later tokenizers: DGAE's, and the teacher of GAE's.

    DiffusionAutoencoder  a tokenizer whose decoder is a diffusion model, as in DGAE
    SemanticTeacher       what the latent of GAE is drawn to

They are made of the layers of models.py.  Its tables have the sizes of the first, and
`models.build_tokenizer` builds it.  Those of the second are the presets of
train_teacher.py.  GAE's own tokenizer is `models.VitAutoencoder`.
"""

from collections.abc import Sequence

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import flow
from models import (
    Attention, Autoencoder, ResidualBlock, SpatialAttention, VitBlock, group_norm, rms, waves)
from runtime import InputError, noise_of

# ------------------------------------------------------------------------------
# The tokenizer of DGAE: its decoder is a diffusion model of the image, which gets
# the latent as its condition.  The network is the U-Net of ADM (Dhariwal and
# Nichol 2021).  It sees the noised image with the latent beside it, enlarged to
# the image's size, and predicts the velocity.  As in the rest of the project,
# t = 1 is the data.

class TimeBlock(ResidualBlock):
    """A ResidualBlock whose second norm is scaled and shifted by the time.

    scale: "half" or "double" the image's size, between the first norm and convolution.
    """

    def __init__(self, c_in, c_out, c_time, scale="same"):
        super().__init__(c_in, c_out)
        self.time = nn.Linear(c_time, 2 * c_out)
        self.resize = {"same": nn.Identity(), "half": nn.AvgPool2d(2),
                       "double": nn.Upsample(scale_factor=2.0)}[scale]
        nn.init.zeros_(self.conv2.weight)

    def forward(self, h, c):
        scale, shift = self.time(F.silu(c))[:, :, None, None].chunk(2, dim=1)
        new = self.conv1(self.resize(F.silu(self.norm1(h))))
        new = self.conv2(F.silu(self.norm2(new) * (1 + scale) + shift))
        skip = self.resize(h)
        return new + (self.nin_shortcut(skip) if hasattr(self, "nin_shortcut") else skip)

class UNet(nn.Module):
    """Velocity v_hat(x_t, t, z): [B, 3, H, W], [B], [B, C, h, w] -> [B, 3, H, W]

    ch, mult   level i is ch * mult[i] wide, and half as large as the one before
    blocks     per level on the way down; on the way up there is one more

    On the way up, a block sees what a block on the way down has computed at its
    resolution.  At the lowest there is attention.  `recompute` is as in Decoder.
    """

    def __init__(self, ch: int, mult: tuple[int, ...], blocks: int, z_channels: int) -> None:
        super().__init__()
        self.recompute, c, c_time, kept = False, ch, 4 * ch, [ch]
        self.down, self.up = nn.ModuleList(), nn.ModuleList()
        self.time = nn.Sequential(nn.Linear(ch, c_time), nn.SiLU(), nn.Linear(c_time, c_time))
        self.conv_in = nn.Conv2d(3 + z_channels, ch, 3, padding=1)
        for i, m in enumerate(mult):
            for k in range(blocks + (i > 0)):
                half = i > 0 and k == 0
                width = c if half else ch * m
                self.down.append(TimeBlock(c, width, c_time, "half" if half else "same"))
                kept.append(c := width)
        self.mid = nn.ModuleList([TimeBlock(c, c, c_time), TimeBlock(c, c, c_time)])
        self.attn = SpatialAttention(c, max(1, c // 64))
        for i, m in reversed([*enumerate(mult)]):
            for _ in range(blocks + 1):
                self.up.append(TimeBlock(c + kept.pop(), ch * m, c_time))
                c = ch * m
            if i:
                self.up.append(TimeBlock(c, c, c_time, "double"))
        self.norm_out = group_norm(c)
        self.conv_out = nn.Conv2d(c, 3, 3, padding=1)
        nn.init.zeros_(self.attn.proj_out.weight)
        nn.init.zeros_(self.conv_out.weight)

    def forward(self, x_t: Tensor, t: Tensor, z: Tensor) -> Tensor:
        def run(block: nn.Module, h: Tensor) -> Tensor:
            return checkpoint(block, h, c, use_reentrant=False) if self.recompute else block(h, c)

        c = self.time(waves(1000 * t, self.time[0].in_features))
        h = self.conv_in(torch.cat([x_t, F.interpolate(z, x_t.shape[2:])], dim=1))
        kept = [h]
        for block in self.down:
            kept.append(h := run(block, h))
        h = run(self.mid[1], self.attn(run(self.mid[0], h)))
        for block in self.up:
            if not isinstance(block.resize, nn.Upsample):
                h = torch.cat([h, kept.pop()], dim=1)
            h = run(block, h)
        return self.conv_out(F.silu(self.norm_out(h)))

class DiffusionAutoencoder(Autoencoder):
    """The autoencoder of DGAE: a convolutional encoder, and a U-Net that decodes.

    unet_ch, unet_mult, unet_blocks   see UNet
    decode_steps                      steps of Euler from noise to an image
    encoder                           the other arguments of Autoencoder

    The training takes one step at a random time, see `forward`.  DGAE does not say
    in how many steps it decodes; 20 is enough for DiTo, which is its relative.
    """

    def __init__(self, unet_ch: int, unet_mult: tuple[int, ...], unet_blocks: int,
                 z_channels: int, decode_steps: int = 20, **encoder) -> None:
        unet = UNet(unet_ch, unet_mult, unet_blocks, z_channels)
        super().__init__(z_channels=z_channels, decoder=unet, **encoder)
        self.config |= dict(
            arch="dgae", unet_ch=unet_ch, unet_mult=unet_mult, unet_blocks=unet_blocks,
            decode_steps=decode_steps)
        self.diffuses = True

    def forward(self, x: Tensor, eps: Tensor, scale: Tensor, noise: Tensor,
                t: Tensor) -> tuple[Tensor, ...]:
        """mean, logvar, z, and what the decoder says of x_t = (1 - t) noise + t x:

        x_hat = x_t + (1 - t) v_hat, v_hat itself, and the velocity x - noise that it
        should be.  noise [B, 3, H, W], t [B].
        """
        mean, logvar = self.posterior(x)
        z = self.sample(mean, torch.exp(0.5 * logvar), eps, scale)
        x_t = flow.interpolate(x, noise, t)
        v_hat = self.decoder(x_t, t, self.post_quant_conv(z)).float()
        x_hat = x_t + (1 - t).view(-1, 1, 1, 1) * v_hat
        return mean, logvar, z, x_hat, v_hat, flow.velocity(x, noise)

    def decode(self, z: Tensor, images: Sequence[int] | None = None) -> Tensor:
        """Integrate v_hat from noise to x_hat [B, 3, H, W].

        Each number of `images` names a stream of noise, so that an image does not
        depend on its batch.  Without numbers, all images start from the same noise.
        """
        B, _, h, w = z.shape
        shape = 3, h * self.stride, w * self.stride
        noise = noise_of(images or [0] * B, shape, 0, "decoder")
        condition = self.post_quant_conv(z)

        def velocity_fn(x_t: Tensor, t: float) -> Tensor:
            return self.decoder(x_t, x_t.new_full((B,), t), condition).float()

        return flow.euler(velocity_fn, noise.to(z.device), self.config["decode_steps"])


# ------------------------------------------------------------------------------
# The teacher of GAE (Liu et al. 2026), which is trained by train_teacher.py.


class SemanticTeacher(nn.Module):
    """GAE's teacher: what a foundation model says, in as few channels as the latent has.

    `encode` turns features f [B, D, side, side] of a frozen network into the
    target [B, C, side, side] of the latent's mean (Sec. 4.2 of GAE):

        target = rms(patches(rms(attention(rms(f) + position))))

    rms divides by the root mean square over channels.  `patches` is one linear map
    for each window of w x w positions.  `forward` decodes the target back to D
    channels with four transformer blocks, which only the teacher's training needs.
    """

    def __init__(self, features: int, side: int, z_channels: int, window: int = 4) -> None:
        super().__init__()
        if side % window:
            raise InputError(f"a grid of {side} x {side} does not divide into windows of "
                             f"{window} x {window}: choose another teacher or size")
        self.config = dict(features=features, side=side, z_channels=z_channels, window=window)
        heads, area = max(1, features // 64), window * window
        self.position = nn.Parameter(0.02 * torch.randn(1, side * side, features))
        self.attn = Attention("vit", features, heads, qk_norm=True)
        self.patches = nn.Linear(area * features, area * z_channels, bias=False)
        self.expand = nn.Linear(z_channels, features, bias=False)
        self.decoder_position = nn.Parameter(0.02 * torch.randn(1, side * side, features))
        self.decoder = nn.Sequential(*(VitBlock(features, heads) for _ in range(4)))

    def encode(self, f: Tensor) -> Tensor:
        side, w = self.config["side"], self.config["window"]
        tokens = rms(f.flatten(2).mT) + self.position
        h = rms(self.attn(rms(tokens))).mT.unflatten(2, (side, side))
        windows = F.unfold(h, w, stride=w).mT       # [B, windows, D w w]
        target = F.fold(self.patches(windows).mT, (side, side), w, stride=w)
        return rms(target.movedim(1, -1)).movedim(-1, 1)

    def forward(self, f: Tensor) -> Tensor:
        h = self.expand(self.encode(f).flatten(2).mT) + self.decoder_position
        return self.decoder(h).mT.unflatten(2, f.shape[2:])


def build_teacher(config: dict) -> SemanticTeacher:
    """The teacher of a config, as a checkpoint holds it."""
    return SemanticTeacher(**config)
