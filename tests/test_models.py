"""The networks against published outputs (../shared/golden), their sizes against
published counts, the noise of a latent against closed forms, and what holds by
construction.  No weights are needed: every parameter is drawn from a numpy
generator that its own name seeds.
"""

import json
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

import flow
import models
import neighbours
from runtime import InputError

GOLDEN = Path(__file__).parents[1] / "../shared/golden"
golden = pytest.mark.skipif(
    not GOLDEN.is_dir(), reason="the outputs of the published code, ../shared/golden, are not here")

SMALL = dict(arch="conv", ch=16, ch_mult=(1, 2), num_res_blocks=1, attn_resolutions=(4,),
             resolution=8, z_channels=4)
SMALL_VIT = dict(arch="vit", image_size=8, patch=2, depth=2, width=24, heads=2, z_channels=4,
                 latent_norm=False)
SMALL_DGAE = SMALL | dict(arch="dgae", unet_ch=8, unet_mult=(1, 2, 3), unet_blocks=2)
TINY = dict(depth=2, width=64, heads=2, input_size=8, num_classes=10)
LIGHTNINGDIT_TINY = TINY | dict(family="lightningdit", patch=1, in_channels=16)
SIT_TINY = TINY | dict(family="sit", patch=2, in_channels=4, learn_sigma=True)
DEMO_LATENTS = dict(in_channels=8, input_size=8, num_classes=10)
T, Y = torch.tensor([0.3, 0.8]), torch.tensor([3, 10])


def fill(name: str, shape: tuple[int, ...]) -> np.ndarray:
    w = np.random.default_rng(zlib.crc32(name.encode())).standard_normal(shape)
    if len(shape) <= 1:
        return (1 + 0.1 * w if name.endswith("weight") else 0.05 * w).astype("float32")
    return (w / np.sqrt(np.prod(shape[1:]))).astype("float32")


def arr(name: str, *shape: int, scale: float = 1.0) -> Tensor:
    w = np.random.default_rng(zlib.crc32(name.encode())).standard_normal(shape) * scale
    return torch.from_numpy(w.astype("float32"))


def filled(module: nn.Module) -> nn.Module:
    """In eval mode, with every parameter drawn; tables of positions stay."""
    state = {name: value if name.startswith(("pos_embed", "feat_rope"))
             else torch.from_numpy(fill(name, tuple(value.shape)))
             for name, value in module.state_dict().items()}
    module.load_state_dict(state, assign=True)
    return module.eval()


def tokenizer(config: dict = SMALL, **changed: object) -> models.Tokenizer:
    return filled(models.build_tokenizer(config | changed))


def shapes(module: nn.Module) -> dict[str, list[int]]:
    return {name: list(value.shape) for name, value in module.state_dict().items()}


def count(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def assert_golden(actual: Tensor, expected: np.ndarray) -> None:
    """To 1e-4 of the largest entry."""
    expected = torch.from_numpy(expected)
    assert_close(actual, expected, rtol=0, atol=1e-4 * expected.abs().max().item())


# ------------------------------------------------------------------------------
# The published implementations, on the same parameters and inputs.


@golden
@torch.no_grad()
def test_golden_vavae():
    with torch.device("meta"):   # which spares drawing 70 million numbers twice
        net = models.build_tokenizer(models.AUTOENCODERS["f16d32"])
    net, expected = filled(net), np.load(GOLDEN / "vavae_f16d32.npz")
    mean, logvar = net.posterior(arr("golden/image", 1, 3, 64, 64, scale=0.5).clamp(-1, 1))
    assert_golden(mean, expected["mean"])
    assert_golden(logvar, expected["logvar"])
    assert_golden(net.decode(arr("golden/latent", 1, 32, 4, 4)), expected["decoded"])


@golden
@pytest.mark.parametrize("file, build, config", [
    ("vavae_f16d32", models.build_tokenizer, models.AUTOENCODERS["f16d32"]),
    ("lightningdit_tiny", models.build_dit, LIGHTNINGDIT_TINY),
    ("sit_tiny", models.build_dit, SIT_TINY)])
def test_golden_names_and_shapes(file, build, config):
    with torch.device("meta"):
        net = build(config)
    assert shapes(net) == json.loads((GOLDEN / f"{file}_keys.json").read_text())


@golden
@pytest.mark.parametrize("file, config, noise", [
    ("lightningdit_tiny", LIGHTNINGDIT_TINY, "golden/xt_tiny"),
    ("sit_tiny", SIT_TINY, "golden/sit_xt_tiny")])
@torch.no_grad()
def test_golden_velocity(file, config, noise):
    x_t = arr(noise, 2, config["in_channels"], 8, 8)
    v_hat = filled(models.build_dit(config))(x_t, T, Y)
    assert_golden(v_hat, np.load(GOLDEN / f"{file}.npz")["velocity"])


@golden
def test_golden_samples():
    """The published grid of 10 points is 9 evaluations."""
    dit = filled(models.build_dit(LIGHTNINGDIT_TINY))
    expected = np.load(GOLDEN / "euler_tiny_shift0.npz")
    noise, y = arr("golden/noise_tiny", 2, 16, 8, 8), torch.tensor([3, 5])
    plain = flow.guided_velocity(dit, y, null=10, scale=1.0)
    guided = flow.guided_velocity(dit, y, null=10, scale=2.0, interval=(0.11, 1.0))
    assert_golden(flow.euler(plain, noise, 9), expected["plain"])
    assert_golden(flow.euler(guided, noise, 9), expected["cfg"])


# Our own outputs at demo size, written down when the golden values agreed, keep
# the same code in place where those are absent.


@torch.no_grad()
def test_pinned_autoencoder():
    net = tokenizer(models.AUTOENCODERS["demo"])
    moments = net.encode(arr("image", 1, 3, 32, 32, scale=0.5))[0, ::5, 3, 5]
    x_hat = net.decode(arr("latent", 1, 8, 8, 8))[0, :, 17, 4]
    expected = torch.tensor([0.088515, 0.256011, 0.797363, 0.966257])
    assert_close(moments, expected, rtol=1e-5, atol=1e-5)
    expected = torch.tensor([-0.349677, 2.151256, -1.838036])
    assert_close(x_hat, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("changed, expected", [
    (dict(), [1.571580, 0.192829, 0.066528, -1.632084]),
    (dict(qk_norm=True), [1.529612, 0.130446, 0.097036, -1.590749]),
    (dict(family="sit", patch=2, learn_sigma=True), [-0.586491, 1.407000, -0.029567, -1.870721])])
@torch.no_grad()
def test_pinned_velocity(changed, expected):
    dit = filled(models.build_dit(models.DITS["demo"] | DEMO_LATENTS | changed))
    v_hat = dit(arr("x_t", 2, 8, 8, 8), T, Y)
    chosen = v_hat[[0, 0, 1, 1], [0, 5, 2, 7], [1, 6, 3, 0], [2, 2, 7, 4]]
    assert_close(chosen, torch.tensor(expected), rtol=1e-5, atol=1e-5)


# ------------------------------------------------------------------------------
# Counts of parameters, on the meta device, where tensors need no memory.


def test_sizes_of_the_autoencoders_and_the_discriminator():
    """For the ViT, GAE's Table 13 states 310.38 and 309.36 million."""
    with torch.device("meta"):
        assert count(models.build_tokenizer(models.AUTOENCODERS["f16d32"])) == 69_836_067
        assert count(models.build_tokenizer(models.AUTOENCODERS["f16d16"])) == 69_610_963
        assert count(models.PatchGAN()) == 2_765_633
        net = models.build_tokenizer(models.AUTOENCODERS["vit-l"])
    assert (count(net.encoder), count(net.decoder)) == (310_378_496, 309_362_688)


def test_sizes_of_gae_and_its_teacher():
    """Table 13 of GAE states 310.38, 309.36 and 0.033 million for the autoencoder.

    It counts 316.95 for the teacher, of which DINOv2-L has 304.37, and 51.41 for the
    teacher's decoder, both without their tables of positions.
    """
    with torch.device("meta"):
        net = models.build_tokenizer(models.AUTOENCODERS["gae-d32"] | dict(
            noise="gaussian", sigma=0.2))
        teacher = neighbours.SemanticTeacher(1024, 16, 32)
    parts = net.encoder, net.decoder, net.adapter
    assert [round(count(part) / 1e6, 2) for part in parts] == [310.38, 309.36, 0.03]
    assert count(net.adapter) == 32_768
    assert round(304.37 + (count(teacher.attn) + count(teacher.patches)) / 1e6, 2) == 316.95
    assert round((count(teacher.expand) + count(teacher.decoder)) / 1e6, 2) == 51.41
    assert teacher.position.numel() == teacher.decoder_position.numel() == 256 * 1024


@pytest.mark.parametrize("row, decoder, total", [
    ("dgae-b", 122, 157), ("dgae-m", 276, 310), ("dgae-l", 491, 525)])
def test_sizes_of_dgae(row, decoder, total):
    """Millions, of which DGAE's Table 1 prints no decimals."""
    with torch.device("meta"):
        net = models.build_tokenizer(models.AUTOENCODERS[row])
    assert (count(net.decoder) // 10**6, count(net) // 10**6) == (decoder, total)


@pytest.mark.parametrize("row, millions", [
    ("S", 32.985), ("B", 130.556), ("L", 458.153), ("XL", 675.257), ("DiT-B", 130.525),
    ("SiT-S/2", 32.957), ("SiT-B/2", 130.500), ("SiT-L/2", 458.086), ("SiT-XL/2", 675.111)])
def test_sizes_of_the_transformers(row, millions):
    """On f16d32, and for SiT on the latents of Stable Diffusion, as published."""
    channels, side = (4, 32) if row.startswith("SiT") else (32, 16)
    latents = dict(in_channels=channels, input_size=side, num_classes=1000)
    with torch.device("meta"):
        dit = models.build_dit(models.DITS[row] | latents)
    assert round(count(dit) / 1e6, 3) == millions


# ------------------------------------------------------------------------------
# The tokenizer: the noise of its latent, and its interface.


@pytest.mark.parametrize("config", [SMALL, SMALL_VIT])
@pytest.mark.parametrize("noise, sigma, std, scaled", [
    ("fixed", 0.2, 0.2, False),      # sigma, whatever the scale
    ("gaussian", 0.2, 0.25, True),   # 0.2 / 0.8, times the scale of the image
    ("none", 0.0, 0.0, False)])
@torch.no_grad()
def test_noise_that_is_not_learned(config, noise, sigma, std, scaled):
    net = tokenizer(config, noise=noise, sigma=sigma)
    x, eps, scale = arr("x", 2, 3, 8, 8), arr("eps", 2, 4, 4, 4), torch.tensor([3.0, -1.0])
    mean, logvar, z, x_hat = net(x, eps, scale)
    learned, _ = tokenizer(config).posterior(x)
    assert_close(mean, learned, rtol=0, atol=0)
    assert_close((logvar / 2).exp(), torch.full_like(mean, std))
    assert_close(z[0], mean[0] + std * eps[0] * (3 if scaled else 1))
    assert_close(z[1], mean[1] + std * eps[1] * (-1 if scaled else 1))
    assert_close(x_hat, net.decode(z), rtol=0, atol=0)
    assert not net.learns_sigma and net.config["noise"] == noise


@pytest.mark.parametrize("config", [SMALL, SMALL_VIT])
@torch.no_grad()
def test_learned_noise_is_the_second_half_of_the_moments(config):
    """logvar is clamped to [-30, 20], and the scale of the image plays no part."""
    net = tokenizer(config)
    x, eps, scale = arr("x", 2, 3, 8, 8), arr("eps", 2, 4, 4, 4), torch.tensor([3.0, -1.0])
    expected = 40 * net.encode(x)[:, 4:]
    layer = getattr(net, "quant_conv", None) or net.adapter
    for parameter in layer.parameters():
        parameter[4:] *= 40
    mean, logvar, z, _ = net(x, eps, scale)
    assert (expected < -30).any() and (expected > 20).any()
    assert_close(logvar, expected.clamp(-30, 20), rtol=1e-4, atol=1e-4)
    assert_close(z, mean + (logvar / 2).exp() * eps)
    assert net.learns_sigma


@pytest.mark.parametrize("config", [SMALL, SMALL_VIT | dict(latent_norm=True)])
def test_every_parameter_of_a_tokenizer_gets_a_gradient(config):
    """Without one, DistributedDataParallel would wait for ever."""
    for noise in ("learned", "fixed"):
        net = tokenizer(config, noise=noise, sigma=0.2).train()
        x_hat = net(arr("x", 2, 3, 8, 8), arr("eps", 2, 4, 4, 4), torch.ones(2))[3]
        x_hat.square().sum().backward()
        assert all(p.grad is not None for p in net.parameters())


def test_what_a_tokenizer_says_about_itself():
    for row, stride, channels, last, encoder_last in [
            ("demo", 4, 8, "decoder.conv_out", "encoder.conv_out"),
            ("f16d32", 16, 32, "decoder.conv_out", "encoder.conv_out"),
            ("vit-demo", 4, 8, "decoder.linear", "adapter"),
            ("vit-l", 16, 32, "decoder.linear", "adapter")]:
        with torch.device("meta"):
            net = models.build_tokenizer(models.AUTOENCODERS[row])
            assert models.build_tokenizer(net.config).config == net.config
        assert (net.stride, net.channels) == (stride, channels)
        assert net.last_layer is net.get_parameter(f"{last}.weight")
        assert net.encoder_last_layer is net.get_parameter(f"{encoder_last}.weight")


# ------------------------------------------------------------------------------
# A decoder that is a diffusion model, and GAE's teacher.


class Field(nn.Module):
    """A velocity field in the place of the U-Net."""

    def __init__(self, velocity) -> None:
        super().__init__()
        self.velocity = velocity

    def forward(self, x_t, t, z):
        return self.velocity(x_t, t.view(-1, 1, 1, 1))


@torch.no_grad()
def test_a_decoder_that_knows_the_image_restores_it():
    """From any noise, x - x_t over what is left of the time leads to x, in any steps."""
    x, z = arr("image", 2, 3, 8, 8), torch.zeros(2, 4, 4, 4)
    for steps in (1, 2, 7):
        net = tokenizer(SMALL_DGAE, decode_steps=steps)
        net.decoder = Field(lambda x_t, t: (x - x_t) / (1 - t))
        assert_close(net.decode(z, [3, 8]), x, rtol=0, atol=1e-5)


@torch.no_grad()
def test_decoding_converges_with_the_first_order():
    """Images N(m, s^2) have the velocity m + (t s^2 - 1 + t) / var (x_t - t m), with
    var = (1 - t)^2 + t^2 s^2.  Its flow carries the noise n to m + s n."""
    m, s, errors = 0.5, 0.3, []
    for steps in (50, 100, 200):
        net, noise = tokenizer(SMALL_DGAE, decode_steps=steps), []
        net.decoder = Field(lambda x_t, t: noise.append(x_t) or m + (
            t * s**2 - 1 + t) / ((1 - t) ** 2 + t**2 * s**2) * (x_t - t * m))
        found = net.decode(torch.zeros(1, 4, 4, 4))
        errors.append((found - m - s * noise[0]).abs().max())
    assert 1.8 < errors[0] / errors[1] < 2.2 and 1.8 < errors[1] / errors[2] < 2.2


@torch.no_grad()
def test_a_decoded_image_does_not_depend_on_its_batch():
    net, z = tokenizer(SMALL_DGAE, decode_steps=3), arr("z", 4, 4, 4, 4)
    together, alone = net.decode(z, [5, 6, 7, 8]), net.decode(z[2:3], [7])
    assert_close(together[2:3], alone, rtol=0, atol=1e-5)
    assert not torch.allclose(net.decode(z[2:3], [6]), alone, atol=1e-2)
    same = net.decode(z[:1].expand(2, -1, -1, -1))
    assert torch.equal(same[0], same[1])


@torch.no_grad()
def test_a_step_of_a_diffusion_decoder():
    net = tokenizer(SMALL_DGAE)
    x, noise, t = arr("x", 2, 3, 8, 8), arr("noise", 2, 3, 8, 8), torch.tensor([0.25, 0.5])
    mean, _, z, x_hat, v_hat, v = net(x, arr("eps", 2, 4, 4, 4), torch.ones(2), noise, t)
    x_t = torch.stack([0.75 * noise[0] + 0.25 * x[0], 0.5 * noise[1] + 0.5 * x[1]])
    assert_close(v_hat, net.decoder(x_t, t, net.post_quant_conv(z)))
    assert_close(x_hat, x_t + torch.tensor([0.75, 0.5]).view(2, 1, 1, 1) * v_hat)
    assert torch.equal(v, x - noise)


@torch.no_grad()
def test_unet_against_plain_loops():
    """Two levels with one block each; the latent is enlarged to the nearest position."""
    net = filled(neighbours.UNet(8, (1, 2), 1, 4))
    x_t, t, z = arr("x_t", 2, 3, 8, 8), torch.tensor([0.3, 0.9]), arr("z", 2, 4, 4, 4)
    w = dict(net.state_dict())

    def conv(name, h, **options):
        return torch.conv2d(h, w[f"{name}.weight"], w[f"{name}.bias"], **options)

    def norm(name, h):
        groups = h.unflatten(1, (min(32, h.shape[1] // 4), -1))
        mean, var = groups.mean((2, 3, 4), True), groups.var((2, 3, 4), False, keepdim=True)
        h = ((groups - mean) / (var + 1e-6).sqrt()).flatten(1, 2)
        return h * w[f"{name}.weight"].view(-1, 1, 1) + w[f"{name}.bias"].view(-1, 1, 1)

    def silu(h):
        return h * h.sigmoid()

    def half(h):
        return (h[..., ::2, ::2] + h[..., 1::2, ::2] + h[..., ::2, 1::2] + h[..., 1::2, 1::2]) / 4

    def double(h):
        return h.repeat_interleave(2, 2).repeat_interleave(2, 3)

    def block(name, h, resize=lambda h: h):
        moved = silu(c) @ w[f"{name}.time.weight"].T + w[f"{name}.time.bias"]
        scale, shift = moved[:, :, None, None].tensor_split(2, 1)
        new = conv(f"{name}.conv1", resize(silu(norm(f"{name}.norm1", h))), padding=1)
        h = resize(h)
        new = norm(f"{name}.norm2", new) * (1 + scale) + shift
        skip = conv(f"{name}.nin_shortcut", h) if f"{name}.nin_shortcut.bias" in w else h
        return skip + conv(f"{name}.conv2", silu(new), padding=1)

    def attention(name, h):
        n = norm(f"{name}.norm", h)
        q, k, v = (conv(f"{name}.{part}", n).flatten(2) for part in "qkv")
        share = (q.mT @ k / 16**0.5).softmax(-1)
        return h + conv(f"{name}.proj_out", (v @ share.mT).view_as(h))

    rates = 10000.0 ** (-torch.arange(4) / 4)
    angle = 1000 * t[:, None] * rates
    c = torch.cat([angle.cos(), angle.sin()], 1) @ w["time.0.weight"].T + w["time.0.bias"]
    c = silu(c) @ w["time.2.weight"].T + w["time.2.bias"]
    first = conv("conv_in", torch.cat([x_t, double(z)], 1), padding=1)
    second = block("down.0", first)
    third = block("down.1", second, half)
    fourth = block("down.2", third)
    h = block("mid.1", attention("attn", block("mid.0", fourth)))
    h = block("up.1", torch.cat([block("up.0", torch.cat([h, fourth], 1)), third], 1))
    h = block("up.2", h, double)
    h = block("up.4", torch.cat([block("up.3", torch.cat([h, second], 1)), first], 1))
    expected = conv("conv_out", silu(norm("norm_out", h)), padding=1)
    assert_close(net(x_t, t, z), expected, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_the_teacher_against_plain_loops():
    """A grid of 4 x 4 in windows of 2 x 2; the rows of an unfolded window run over
    channels, then over its positions."""
    teacher = filled(neighbours.SemanticTeacher(8, 4, 3, window=2))
    f, w = arr("f", 2, 8, 4, 4), dict(teacher.state_dict())

    def rms(h):
        return h / (h.square().mean(-1, keepdim=True) + 1e-6).sqrt()

    tokens = rms(rms(f.flatten(2).mT) + w["position"])
    q, k, v = (tokens @ w["attn.qkv.weight"].T).tensor_split(3, -1)
    share = (rms(q) @ rms(k).mT / 8**0.5).softmax(-1)
    h = rms(share @ v @ w["attn.proj.weight"].T).view(2, 4, 4, 8)
    expected = torch.empty(2, 3, 4, 4)
    for i in (0, 2):
        for j in (0, 2):
            window = h[:, i:i + 2, j:j + 2].permute(0, 3, 1, 2).flatten(1)
            made = (window @ w["patches.weight"].T).view(2, 3, 2, 2)
            expected[:, :, i:i + 2, j:j + 2] = rms(made.movedim(1, -1)).movedim(-1, 1)
    assert_close(teacher.encode(f), expected, rtol=1e-4, atol=1e-5)
    assert teacher(f).shape == f.shape


@pytest.mark.parametrize("config, height, width", [
    (SMALL, 8, 9), (SMALL, 7, 8), (SMALL_VIT, 16, 16), (SMALL_VIT, 4, 16), (SMALL_VIT, 9, 8)])
def test_images_of_other_sizes_are_refused(config, height, width):
    """For the ViT, 4 x 16 has as many patches as 8 x 8, and 9 x 8 loses a row."""
    with pytest.raises(InputError, match=f"{height} x {width}"):
        models.build_tokenizer(config).encode(torch.zeros(1, 3, height, width))


@pytest.mark.parametrize("config", [SMALL, SMALL_VIT, SMALL_VIT | dict(latent_norm=True)])
@torch.no_grad()
def test_moments_stay_float32_under_autocast(config):
    """Rounded to bfloat16 at the end, they would be numbers that bfloat16 has."""
    net, x = tokenizer(config), arr("image", 2, 3, 8, 8)
    with torch.autocast("cpu", torch.bfloat16):
        moments = net.encode(x)
        x_hat = net.decode(moments[:, :4])
    assert moments.dtype == x_hat.dtype == torch.float32
    assert (moments != moments.bfloat16().float()).float().mean() > 0.9
    assert_close(moments, net.encode(x), rtol=0.05, atol=0.05)


@torch.no_grad()
def test_the_mean_colour_survives_the_norms():
    """In a group of one channel, a constant added to that channel would vanish."""
    norm, h = models.group_norm(16), arr("h", 1, 16, 4, 4)
    shift = torch.arange(16.0).reshape(1, 16, 1, 1)
    assert not torch.allclose(norm(h), norm(h + shift), atol=0.1)


def test_discriminator():
    """Layers named as in taming-transformers, and weights from N(0, 0.02^2)."""
    torch.manual_seed(0)
    net = models.PatchGAN()
    assert {name.split(".")[1] for name in shapes(net)} == set("0 2 3 5 6 8 9 11".split())
    assert net.main[5].weight.std().item() == pytest.approx(0.02, rel=0.01)
    assert net.main[9].weight.mean().item() == pytest.approx(1.0, abs=0.01)
    with torch.device("meta"):
        assert models.PatchGAN()(torch.empty(1, 3, 256, 256)).shape == (1, 1, 30, 30)


# ------------------------------------------------------------------------------
# The ViT autoencoder.


@torch.no_grad()
def test_vit_against_plain_loops():
    """GAE's network, with every patch, head and query by itself."""
    net = tokenizer(SMALL_VIT)
    w, D, p, grid = net.state_dict(), 24, 2, 4

    def rms(h: Tensor) -> Tensor:
        return h / (h.pow(2).mean(dim=-1, keepdim=True) + 1e-6).sqrt()

    def trunk(h: Tensor, name: str) -> Tensor:                     # [N, D] -> [N, out]
        h = h + w[f"{name}.pos_embed"][0]
        for block in (f"{name}.blocks.0", f"{name}.blocks.1"):
            q, k, v = (rms(h) @ w[f"{block}.attn.qkv.weight"].T).split(D, dim=1)
            mixed = torch.zeros_like(h)
            for head in (slice(0, 12), slice(12, 24)):
                for n in range(len(h)):
                    scores = rms(k[:, head]) @ rms(q[n, head]) / 12 ** 0.5
                    mixed[n, head] = scores.softmax(dim=0) @ v[:, head]
            h = h + mixed @ w[f"{block}.attn.proj.weight"].T
            a, b = (rms(h) @ w[f"{block}.mlp.w12.weight"].T).chunk(2, dim=1)
            h = h + (a * a.sigmoid() * b) @ w[f"{block}.mlp.w3.weight"].T
        return rms(h) @ w[f"{name}.linear.weight"].T

    x, z = arr("image", 1, 3, 8, 8), arr("latent", 1, 4, 4, 4)
    cells = [(i, j) for i in range(grid) for j in range(grid)]
    spans = [(slice(i * p, i * p + p), slice(j * p, j * p + p)) for i, j in cells]
    patches = torch.stack([x[0, :, rows, columns].flatten() for rows, columns in spans])
    tokens = trunk(patches @ w["encoder.embed.weight"].flatten(1).T, "encoder")
    moments = torch.zeros(2 * 4, grid, grid)
    for n, (i, j) in enumerate(cells):
        moments[:, i, j] = w["adapter.weight"] @ tokens[n]
    assert_close(net.encode(x)[0], moments, rtol=1e-4, atol=1e-4)

    latents = torch.stack([z[0, :, i, j] for i, j in cells])
    tokens = trunk(latents @ w["decoder.embed.weight"].flatten(1).T, "decoder")
    x_hat = torch.zeros(3, 8, 8)
    for n, (rows, columns) in enumerate(spans):
        x_hat[:, rows, columns] = tokens[n].reshape(p, p, 3).permute(2, 0, 1)
    assert_close(net.decode(z)[0], x_hat, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_latent_norm_divides_the_mean_by_its_rms():
    x = arr("image", 3, 3, 8, 8)
    mean, logvar = tokenizer(SMALL_VIT).encode(x).chunk(2, dim=1)
    unit, same = tokenizer(SMALL_VIT, latent_norm=True).encode(x).chunk(2, dim=1)
    rms = mean.square().mean(dim=1, keepdim=True).sqrt()
    assert_close(unit, mean / rms, rtol=1e-3, atol=1e-4)   # eps is beside rms^2
    assert_close(same, logvar, rtol=0, atol=0)
    assert (rms - 1).abs().max() > 0.1


# ------------------------------------------------------------------------------
# The transformer.


@pytest.mark.parametrize("config", [LIGHTNINGDIT_TINY, SIT_TINY])
@torch.no_grad()
def test_a_fresh_transformer_answers_zero(config):
    """Gates and head start at zero (adaLN-Zero)."""
    dit, h, c = models.build_dit(config), torch.randn(3, 16, 64), torch.randn(3, 64)
    x_t = torch.randn(3, config["in_channels"], 8, 8)
    v_hat = dit(x_t, torch.rand(3), torch.tensor([0, 5, 10]))
    assert_close(v_hat, torch.zeros_like(x_t), rtol=0, atol=0)
    assert_close(dit.blocks[0](h, c, nn.Identity()), h, rtol=0, atol=0)


@torch.no_grad()
def test_initialisation_of_the_transformer():
    """Xavier is uniform on +-sqrt(6 / (fan_in + fan_out)).

    The fused qkv counts as one matrix, and a patch has 4 x 2 x 2 numbers.
    """
    torch.manual_seed(0)
    dit = models.build_dit(SIT_TINY)
    qkv, patches = dit.blocks[1].attn.qkv.weight, dit.x_embedder.proj.weight
    for weight, fans in ((qkv, 64 + 3 * 64), (patches, 4 * 2 * 2 + 64)):
        assert 0.98 * (6 / fans) ** 0.5 < weight.abs().max() <= (6 / fans) ** 0.5
    for layer in (dit.t_embedder.mlp[0], dit.t_embedder.mlp[2], dit.y_embedder.embedding_table):
        assert layer.weight.std().item() == pytest.approx(0.02, rel=0.1)
    assert not any(m.bias.any() for m in dit.modules() if isinstance(m, (nn.Linear, nn.Conv2d)))


@torch.no_grad()
def test_rotary_scores_depend_on_relative_positions_only():
    """One query and one key at every position: <R_i q, R_j k> depends on i - j."""
    rope = models.Rope(head_width=16, size=6)
    q, k = arr("q", 16), arr("k", 16)

    def scores(q: Tensor, k: Tensor) -> Tensor:
        product = rope(q.expand(36, 16)) @ rope(k.expand(36, 16)).T
        return product.reshape(6, 6, 6, 6)             # row and column of q, then of k

    s = scores(q, k)
    assert_close(s[1:, :, 1:, :], s[:-1, :, :-1, :])
    assert_close(s[:, 1:, :, 1:], s[:, :-1, :, :-1])
    assert s[0, 0].std(dim=0).min() > 0.1 and s[0, 0].std(dim=1).min() > 0.1
    assert_close(rope(q.expand(36, 16)).norm(dim=1), q.norm().expand(36))
    half = scores(q * (torch.arange(16) < 8), k)       # this half turns with the row
    assert_close(half, half[:, :1, :, :1].expand(6, 6, 6, 6))


@pytest.mark.parametrize("tokens", [64, 300])
def test_attention_in_bfloat16_is_the_library_s_in_float32(tokens):
    """Weights near 1 / N that are rounded to 8 bits leave an error of 2^-8."""
    q, k, v = (arr(name, 2, 3, tokens, 16).bfloat16().requires_grad_() for name in "qkv")
    expected = nn.functional.scaled_dot_product_attention(q.float(), k.float(), v.float())
    h, toward = models.attend(q, k, v), arr("g", 2, 3, tokens, 16)
    assert h.dtype == torch.bfloat16
    assert_close(h.float(), expected, rtol=2e-2, atol=4e-3)
    found = torch.autograd.grad(h.float(), (q, k, v), toward)
    wanted = torch.autograd.grad(expected, (q, k, v), toward)
    for a, b in zip(found, wanted):
        assert_close(a.float(), b.float(), rtol=3e-2, atol=2e-2)


@pytest.mark.parametrize("config", [
    LIGHTNINGDIT_TINY, LIGHTNINGDIT_TINY | dict(qk_norm=True), SIT_TINY])
def test_every_trained_parameter_of_a_transformer_gets_a_gradient(config):
    dit = filled(models.build_dit(config)).train()
    x_t = arr("x_t", 2, config["in_channels"], 8, 8)
    dit(x_t, T, Y).square().sum().backward()
    assert [name for name, p in dit.named_parameters() if p.grad is None] == ["pos_embed"]
    assert not dit.pos_embed.requires_grad


def test_every_parameter_of_a_diffusion_decoder_gets_a_gradient():
    net, x = tokenizer(SMALL_DGAE).train(), arr("x", 2, 3, 8, 8)
    *_, v_hat, _ = net(x, arr("eps", 2, 4, 4, 4), torch.ones(2), arr("n", 2, 3, 8, 8), torch.rand(2))
    v_hat.square().sum().backward()
    assert all(p.grad is not None for p in net.parameters())


@pytest.mark.parametrize("which", ["conv", "vit", "dit", "dgae"])
def test_recompute_changes_no_gradient(which):
    gradients = []
    for recompute in (False, True):
        if which == "dit":
            net = filled(models.build_dit(LIGHTNINGDIT_TINY)).train()
            net.recompute = recompute
            output = net(arr("x_t", 2, 16, 8, 8), T, Y)
        elif which == "dgae":
            net = tokenizer(SMALL_DGAE).decoder.train()
            net.recompute = recompute
            output = net(arr("x_t", 2, 3, 8, 8), T, arr("z", 2, 4, 4, 4))
        else:
            net = tokenizer(SMALL if which == "conv" else SMALL_VIT).train()
            net.decoder.recompute = recompute
            output = net.decode(arr("z", 2, 4, 4, 4))
        output.square().sum().backward()
        gradients.append({name: p.grad for name, p in net.named_parameters() if p.grad is not None})
    assert_close(gradients[1], gradients[0], rtol=0, atol=0)


def test_impossible_configs_are_refused():
    with pytest.raises(KeyError, match="pink"):
        models.build_tokenizer(SMALL | dict(noise="pink"))
    with pytest.raises(ValueError, match='not "unet"'):
        models.build_dit(LIGHTNINGDIT_TINY | dict(family="unet"))
    with pytest.raises(InputError, match="side 8 do not divide into patches of side 3"):
        models.build_dit(LIGHTNINGDIT_TINY | dict(patch=3))
