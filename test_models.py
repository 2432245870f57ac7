"""The networks against the outputs of published implementations (../shared/golden, skipped where absent), a
few numbers of our own that pin the same code anywhere, exact parameter counts, and what must hold by
construction.

No weights are needed: every parameter is drawn from a numpy generator seeded by its own name.
"""

import argparse
import json
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

import losses
import models

GOLDEN = Path(__file__).parent / "../shared/golden"
golden = pytest.mark.skipif(not GOLDEN.is_dir(), reason="golden values of the published code are not here")

LIGHTNINGDIT_TINY = dict(family="lightningdit", depth=2, width=64, heads=2, input_size=8, patch=1,
                         in_channels=16, num_classes=10, qk_norm=False, learn_sigma=False)
SIT_TINY = LIGHTNINGDIT_TINY | dict(family="sit", patch=2, in_channels=4, learn_sigma=True)
SMALL = dict(ch=16, ch_mult=(1, 2), num_res_blocks=1, attn_resolutions=(4,), resolution=8, z_channels=4)
SMALL_VIT = dict(arch="vit", image_size=8, patch=2, depth=2, width=24, heads=2, z_channels=4,
                 latent_norm=False)


def fill(name: str, shape: tuple[int, ...]) -> np.ndarray:
    w = np.random.default_rng(zlib.crc32(name.encode())).standard_normal(shape)
    if len(shape) <= 1:
        return (1 + 0.1 * w if name.endswith("weight") else 0.05 * w).astype("float32")
    return (w / np.sqrt(np.prod(shape[1:]))).astype("float32")


def arr(name: str, *shape: int, scale: float = 1.0) -> Tensor:
    w = np.random.default_rng(zlib.crc32(name.encode())).standard_normal(shape) * scale
    return torch.from_numpy(w.astype("float32"))


def filled(module: nn.Module) -> nn.Module:
    """`module` in eval mode with every parameter drawn from its name; position tables keep their values."""
    state = {name: value if name.startswith(("pos_embed", "feat_rope"))
             else torch.from_numpy(fill(name, tuple(value.shape)))
             for name, value in module.state_dict().items()}
    module.load_state_dict(state, assign=True)
    return module.eval()


def shapes(module: nn.Module) -> dict[str, list[int]]:
    return {name: list(value.shape) for name, value in module.state_dict().items()}


def parameters(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def assert_golden(actual: Tensor, expected: np.ndarray) -> None:
    """1e-4 of the largest entry."""
    expected = torch.from_numpy(expected)
    assert_close(actual, expected, rtol=0, atol=1e-4 * expected.abs().max().item())


# ------------------------------------------------------------------------------------------------------------
# The published implementations, on the same parameters and inputs.


@golden
@torch.no_grad()
def test_golden_vavae_f16d32():
    with torch.device("meta"):                        # spares drawing 70 million numbers that are not used
        autoencoder = models.build_autoencoder(models.AUTOENCODERS["f16d32"])
    autoencoder = filled(autoencoder)
    expected = np.load(GOLDEN / "vavae_f16d32.npz")
    x = arr("golden/image", 1, 3, 64, 64, scale=0.5).clamp(-1, 1)
    mean, logvar = losses.split_moments(autoencoder.encode(x))
    assert_golden(mean, expected["mean"])
    assert_golden(logvar, expected["logvar"])
    assert_golden(autoencoder.decode(arr("golden/latent", 1, 32, 4, 4)), expected["decoded"])


@golden
def test_golden_keys_and_shapes():
    with torch.device("meta"):
        autoencoder = models.build_autoencoder(models.AUTOENCODERS["f16d32"])
        lightningdit, sit = models.build_dit(LIGHTNINGDIT_TINY), models.build_dit(SIT_TINY)
    keys = shapes(autoencoder)
    assert len(keys) == 342
    assert keys == json.loads((GOLDEN / "vavae_f16d32_keys.json").read_text())
    assert shapes(lightningdit) == json.loads((GOLDEN / "lightningdit_tiny_keys.json").read_text())
    assert shapes(sit) == json.loads((GOLDEN / "sit_tiny_keys.json").read_text())


@golden
@pytest.mark.parametrize("name, config, noise", [("lightningdit_tiny", LIGHTNINGDIT_TINY, "golden/xt_tiny"),
                                                 ("sit_tiny", SIT_TINY, "golden/sit_xt_tiny")])
@torch.no_grad()
def test_golden_velocity(name: str, config: dict, noise: str):
    dit = filled(models.build_dit(config))
    v_hat = dit(arr(noise, 2, config["in_channels"], 8, 8), torch.tensor([0.3, 0.8]), torch.tensor([3, 10]))
    assert_golden(v_hat, np.load(GOLDEN / f"{name}.npz")["velocity"])


@golden
def test_golden_euler():
    """The published grid of 10 points is 9 evaluations; guidance 2 on all channels, off while t < 0.11."""
    dit = filled(models.build_dit(LIGHTNINGDIT_TINY))
    noise, y, null = arr("golden/noise_tiny", 2, 16, 8, 8), torch.tensor([3, 5]), torch.tensor([10, 10])

    def plain(x: Tensor, t: float) -> Tensor:
        return dit(x, torch.full((2,), t), y)

    def guided(x: Tensor, t: float) -> Tensor:
        v = plain(x, t)
        if t < 0.11:
            return v
        v_null = dit(x, torch.full((2,), t), null)
        return v_null + 2.0 * (v - v_null)

    expected = np.load(GOLDEN / "euler_tiny_shift0.npz")
    assert_golden(losses.euler(plain, noise, 9), expected["plain"])
    assert_golden(losses.euler(guided, noise, 9), expected["cfg"])


# ------------------------------------------------------------------------------------------------------------
# Our own outputs at demo size, written down when the golden values above agreed: they hold the same code in
# place where those files are absent.  `demo` differs from the published networks only in its norms.


@torch.no_grad()
def test_pinned_autoencoder():
    autoencoder = filled(models.build_autoencoder(models.AUTOENCODERS["demo"]))
    moments = autoencoder.encode(arr("image", 1, 3, 32, 32, scale=0.5))
    x_hat = autoencoder.decode(arr("latent", 1, 8, 8, 8))
    expected = torch.tensor([0.088515, 0.256011, 0.797363, 0.966257])
    assert_close(moments[0, ::5, 3, 5], expected, rtol=1e-5, atol=1e-5)
    expected = torch.tensor([-0.349677, 2.151256, -1.838036])
    assert_close(x_hat[0, :, 17, 4], expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("changed, expected", [
    (dict(), [1.571580, 0.192829, 0.066528, -1.632084]),
    (dict(qk_norm=True), [1.529612, 0.130446, 0.097036, -1.590749]),
    (dict(family="sit", patch=2, learn_sigma=True), [-0.586491, 1.407000, -0.029567, -1.870721]),
    (dict(family="sit", qk_norm=True), [0.612464, 0.509098, 0.471330, -0.903229])])
@torch.no_grad()
def test_pinned_velocity(changed: dict, expected: list[float]):
    dit = filled(models.build_dit(models.DITS["demo"] | changed))
    v_hat = dit(arr("x_t", 2, 8, 8, 8), torch.tensor([0.3, 0.8]), torch.tensor([3, 10]))
    assert_close(v_hat[[0, 0, 1, 1], [0, 5, 2, 7], [1, 6, 3, 0], [2, 2, 7, 4]], torch.tensor(expected),
                 rtol=1e-5, atol=1e-5)


# ------------------------------------------------------------------------------------------------------------
# Parameter counts, on the meta device, where tensors have a shape and no memory.


def test_parameters_of_the_autoencoders_and_the_discriminator():
    with torch.device("meta"):
        assert parameters(models.build_autoencoder(models.AUTOENCODERS["f16d32"])) == 69_836_067
        assert parameters(models.build_autoencoder(models.AUTOENCODERS["f16d16"])) == 69_610_963
        assert parameters(models.PatchGAN()) == 2_765_633


@pytest.mark.parametrize("size, lightningdit, sit, sit_sigma", [        # in millions, as published
    ("S", 32.985, 32.957, 32.963), ("B", 130.556, 130.500, 130.512),
    ("L", 458.153, 458.086, 458.103), ("XL", 675.257, 675.111, 675.130)])
def test_parameters_of_the_transformers(size: str, lightningdit: float, sit: float, sit_sigma: float):
    """LightningDiT /1 on 32 channels; SiT /2 on the 4 channels and 32 x 32 positions of Stable Diffusion."""
    sd = dict(family="sit", patch=2, input_size=32, in_channels=4)
    with torch.device("meta"):
        dits = [models.build_dit(models.DITS[size] | changed)
                for changed in (dict(), sd, sd | dict(learn_sigma=True))]
        qk_norm = models.build_dit(models.DITS[size] | dict(qk_norm=True))
    assert [round(parameters(dit) / 1e6, 3) for dit in dits] == [lightningdit, sit, sit_sigma]
    depth, head = dits[0].config["depth"], dits[0].config["width"] // dits[0].config["heads"]
    assert parameters(qk_norm) - parameters(dits[0]) == depth * 2 * head


@pytest.mark.parametrize("size, encoder, decoder", [
    ("vit-s", 21_774_336, 21_639_168), ("vit-b", 86_310_912, 85_745_664),
    ("vit-l", 310_378_496, 309_362_688)])
def test_parameters_of_the_vit(size: str, encoder: int, decoder: int):
    """GAE's Table 13 states L: 310.38, 309.36 and 0.03 million, its adapter without our log-variance.

    S and B follow in the same way, with N = 16^2 tokens, width D, hidden width h and depth n:
        encoder  16^2 3 D + N D + n (4 D^2 + 3 D h) + D^2        decoder  32 D + N D + n (...) + 16^2 3 D
    where h = 1024, 2048, 2816 is 8/3 D rounded up to a multiple of 256.
    """
    with torch.device("meta"):
        vit = models.build_autoencoder(models.AUTOENCODERS[size])
    assert (parameters(vit.encoder), parameters(vit.decoder)) == (encoder, decoder)
    assert parameters(vit.adapter) == 2 * 32 * vit.config["width"]
    assert parameters(vit) == encoder + decoder + parameters(vit.adapter)
    assert not any("bias" in name or "norm" in name for name, _ in vit.named_parameters())


# ------------------------------------------------------------------------------------------------------------
# The autoencoder and its discriminator.


def test_autoencoder_shapes():
    for size, stride, channels in [("demo", 4, 8), ("f16d16", 16, 16), ("f16d32", 16, 32)]:
        with torch.device("meta"):
            autoencoder = models.build_autoencoder(models.AUTOENCODERS[size])
        assert (autoencoder.stride, autoencoder.channels) == (stride, channels)

    autoencoder = models.build_autoencoder(models.AUTOENCODERS["demo"])
    moments = autoencoder.encode(torch.zeros(2, 3, 64, 32))
    assert moments.shape == (2, 16, 16, 8)
    assert autoencoder.decode(moments[:, :8]).shape == (2, 3, 64, 32)
    named = dict(autoencoder.named_parameters())
    assert autoencoder.last_layer is named["decoder.conv_out.weight"]
    assert autoencoder.encoder_last_layer is named["encoder.conv_out.weight"]


def test_image_that_is_no_multiple_of_the_stride_is_refused():
    autoencoder = models.build_autoencoder(SMALL)
    with pytest.raises(ValueError, match="8 x 9 pixels .* multiples of 2"):
        autoencoder.encode(torch.zeros(1, 3, 8, 9))
    with pytest.raises(ValueError, match="7 x 8 pixels"):
        autoencoder.encode(torch.zeros(1, 3, 7, 8))


@pytest.mark.parametrize("config", [SMALL, SMALL_VIT, SMALL_VIT | dict(latent_norm=True)])
@torch.no_grad()
def test_moments_stay_float32_under_autocast(config: dict):
    """Rounding to bfloat16 at the last convolution would leave only numbers that bfloat16 has."""
    autoencoder = filled(models.build_autoencoder(config))
    x = arr("image", 2, 3, 8, 8)
    with torch.autocast("cpu", torch.bfloat16):
        moments = autoencoder.encode(x)
        x_hat = autoencoder.decode(moments[:, :4])
    assert moments.dtype == x_hat.dtype == torch.float32
    assert (moments != moments.bfloat16().float()).float().mean() > 0.9
    assert_close(moments, autoencoder.encode(x), rtol=0.05, atol=0.05)


@torch.no_grad()
def test_no_group_of_the_norms_is_a_single_channel():
    """With one channel in a group, a constant added to a channel vanishes, and with it the mean colour."""
    for config in models.AUTOENCODERS.values():
        with torch.device("meta"):
            norms = [m for m in models.build_autoencoder(config).modules() if isinstance(m, nn.GroupNorm)]
        assert all(norm.num_channels >= 4 * norm.num_groups for norm in norms)
    h = arr("h", 1, 16, 4, 4)
    shift = torch.arange(16.0).reshape(1, 16, 1, 1)
    assert not torch.allclose(models.group_norm(16)(h), models.group_norm(16)(h + shift), atol=0.1)


def test_discriminator():
    """The names of taming-transformers, 30 x 30 patches of a 256 x 256 image, weights N(0, 0.02)."""
    torch.manual_seed(0)
    discriminator = models.PatchGAN()
    assert {name.split(".")[1] for name in shapes(discriminator)} == set("0 2 3 5 6 8 9 11".split())
    assert shapes(discriminator)["main.8.weight"] == [512, 256, 4, 4]
    assert shapes(discriminator)["main.11.weight"] == [1, 512, 4, 4]
    assert "main.8.bias" not in shapes(discriminator)
    with torch.device("meta"):
        assert models.PatchGAN()(torch.empty(1, 3, 256, 256)).shape == (1, 1, 30, 30)
    assert discriminator(torch.zeros(2, 3, 32, 32)).shape == (2, 1, 2, 2)
    assert discriminator.main[5].weight.std().item() == pytest.approx(0.02, rel=0.01)
    assert discriminator.main[9].weight.mean().item() == pytest.approx(1.0, abs=0.01)
    assert discriminator.main[9].weight.std().item() == pytest.approx(0.02, rel=0.2)


# ------------------------------------------------------------------------------------------------------------
# The ViT autoencoder.


def test_vit_shapes():
    for size, stride, channels in [("vit-demo", 4, 8), ("vit-s", 16, 32), ("vit-l", 16, 32)]:
        with torch.device("meta"):
            vit = models.build_autoencoder(models.AUTOENCODERS[size])
        assert (vit.stride, vit.channels) == (stride, channels)

    vit = models.build_autoencoder(models.AUTOENCODERS["vit-demo"])
    moments = vit.encode(torch.zeros(2, 3, 32, 32))
    assert moments.shape == (2, 16, 8, 8)
    assert vit.decode(moments[:, :8]).shape == (2, 3, 32, 32)
    assert_close(vit(torch.ones(1, 3, 32, 32)), vit.decode(vit.encode(torch.ones(1, 3, 32, 32))[:, :8]))
    named = dict(vit.named_parameters())
    assert vit.last_layer is named["decoder.linear.weight"]
    assert vit.encoder_last_layer is named["adapter.weight"]


@torch.no_grad()
def test_vit_against_plain_loops():
    """GAE's network as reference/tokenizer.md words it, every patch, head and query by itself."""
    vit = filled(models.build_autoencoder(SMALL_VIT))
    w, D, p, grid = vit.state_dict(), 24, 2, 4

    def rms(h: Tensor) -> Tensor:
        return h / (h.pow(2).mean(dim=-1, keepdim=True) + 1e-6).sqrt()

    def trunk(h: Tensor, name: str) -> Tensor:                                            # [N, D] -> [N, out]
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
    patches = torch.stack([x[0, :, i * p:(i + 1) * p, j * p:(j + 1) * p].flatten() for i, j in cells])
    tokens = trunk(patches @ w["encoder.embed.weight"].flatten(1).T, "encoder") @ w["adapter.weight"].T
    moments = torch.zeros(2 * 4, grid, grid)
    for n, (i, j) in enumerate(cells):
        moments[:, i, j] = tokens[n]
    assert_close(vit.encode(x)[0], moments, rtol=1e-4, atol=1e-4)

    latents = torch.stack([z[0, :, i, j] for i, j in cells])
    tokens = trunk(latents @ w["decoder.embed.weight"].flatten(1).T, "decoder")
    x_hat = torch.zeros(3, 8, 8)
    for n, (i, j) in enumerate(cells):
        x_hat[:, i * p:(i + 1) * p, j * p:(j + 1) * p] = tokens[n].reshape(p, p, 3).permute(2, 0, 1)
    assert_close(vit.decode(z)[0], x_hat, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_unpatchify_against_a_double_loop():
    tokens = arr("tokens", 2, 3 * 4, 2 * 2 * 5)                              # 3 rows and 4 columns of patches
    pixels = models.unpatchify(tokens, 3, 4, 2)
    assert pixels.shape == (2, 5, 6, 8)
    for y in range(6):
        for x in range(8):
            token, inside = (y // 2) * 4 + x // 2, (y % 2) * 2 + x % 2
            assert_close(pixels[:, :, y, x], tokens[:, token, inside * 5:inside * 5 + 5], rtol=0, atol=0)


@torch.no_grad()
def test_latent_norm_puts_the_mean_on_a_sphere_and_leaves_the_log_variance():
    plain = filled(models.build_autoencoder(SMALL_VIT))
    normed = filled(models.build_autoencoder(SMALL_VIT | dict(latent_norm=True)))
    x = arr("image", 3, 3, 8, 8)
    mean, logvar = plain.encode(x).chunk(2, dim=1)
    unit, same = normed.encode(x).chunk(2, dim=1)
    assert_close(unit.square().mean(dim=1), torch.ones(3, 4, 4), rtol=1e-3, atol=0)      # eps is beside RMS^2
    assert_close(unit, mean / mean.square().mean(dim=1, keepdim=True).sqrt(), rtol=1e-3, atol=1e-4)
    assert_close(same, logvar, rtol=0, atol=0)
    assert (mean.square().mean(dim=1).sqrt() - 1).abs().max() > 0.1


@pytest.mark.parametrize("height, width", [(16, 16), (8, 10), (4, 16), (9, 8)])
def test_vit_refuses_other_sizes_in_one_line(height: int, width: int):
    """4 x 16 has as many patches as 8 x 8, and 9 x 8 would lose a row: neither may pass in silence."""
    vit = models.build_autoencoder(SMALL_VIT)
    with pytest.raises(ValueError, match=f"{height} x {width} does not fit .* for 8 x 8 only") as error:
        vit.encode(torch.zeros(1, 3, height, width))
    assert "\n" not in str(error.value)
    with pytest.raises(ValueError, match="2 x 8 does not fit .* for 4 x 4 only"):
        vit.decode(torch.zeros(1, 4, 2, 8))


@pytest.mark.parametrize("latent_norm", [False, True])
def test_every_parameter_of_the_vit_gets_a_gradient(latent_norm: bool):
    """From the reconstruction of a sample alone, the log-variance rows of the adapter included."""
    vit = filled(models.build_autoencoder(SMALL_VIT | dict(latent_norm=latent_norm))).train()
    z = losses.reparameterize(*losses.split_moments(vit.encode(arr("image", 2, 3, 8, 8))),
                              arr("eps", 2, 4, 4, 4))
    vit.decode(z).square().sum().backward()
    for name, parameter in vit.named_parameters():
        assert parameter.requires_grad and (parameter.grad.flatten(1).norm(dim=1) > 0).all(), name


@torch.no_grad()
def test_initialisation_of_the_vit():
    """Patches: Kaiming, sqrt(2 / fan_out), fan_out = 4^2 64.  Linears: uniform on +-1 / sqrt(fan_in)."""
    torch.manual_seed(0)
    vit = models.build_autoencoder(models.AUTOENCODERS["vit-demo"])
    assert vit.encoder.embed.weight.std().item() == pytest.approx((2 / (16 * 64)) ** 0.5, rel=0.05)
    for trunk in (vit.encoder, vit.decoder):
        assert trunk.pos_embed.std().item() == pytest.approx(0.02, rel=0.05)
        assert 0.98 / 8 < trunk.blocks[1].attn.qkv.weight.abs().max() <= 1 / 8
    assert 0.9 / 8 ** 0.5 < vit.decoder.embed.weight.abs().max() <= 1 / 8 ** 0.5           # 8 channels in


@pytest.mark.parametrize("changed, message", [
    (dict(arch="mlp"), '"conv" or "vit", not "mlp"'), (dict(patch=3), "of patch"),
    (dict(heads=5), "of heads")])
def test_impossible_vits_are_refused(changed: dict, message: str):
    with pytest.raises(ValueError, match=message):
        models.build_autoencoder(SMALL_VIT | changed)


def test_config_without_arch_is_convolutional():
    assert "arch" not in models.build_autoencoder(SMALL).config                    # as in older checkpoints
    assert type(models.build_autoencoder(SMALL)) is models.Autoencoder
    assert type(models.build_autoencoder(SMALL | dict(arch="conv"))) is models.Autoencoder
    assert type(models.build_autoencoder(SMALL_VIT)) is models.VitAutoencoder


# ------------------------------------------------------------------------------------------------------------
# The transformer.


@pytest.mark.parametrize("config", [LIGHTNINGDIT_TINY, SIT_TINY])
@torch.no_grad()
def test_fresh_transformer_answers_zero(config: dict):
    """adaLN-Zero: gates and head start at zero."""
    dit = models.build_dit(config)
    x_t = torch.randn(3, config["in_channels"], 8, 8)
    assert_close(dit(x_t, torch.rand(3), torch.tensor([0, 5, 10])), torch.zeros_like(x_t), rtol=0, atol=0)
    h, c = torch.randn(3, 16, 64), torch.randn(3, 64)
    assert_close(dit.blocks[0](h, c, nn.Identity()), h, rtol=0, atol=0)


@torch.no_grad()
def test_initialisation():
    """Xavier: uniform on +-sqrt(6 / (fan_in + fan_out)), the fused qkv counted as one matrix; N(0, 0.02)."""
    torch.manual_seed(0)
    dit = models.build_dit(SIT_TINY)
    bound = (6 / (64 + 3 * 64)) ** 0.5
    assert 0.98 * bound < dit.blocks[1].attn.qkv.weight.abs().max() <= bound
    bound = (6 / (4 * 2 * 2 + 64)) ** 0.5                                # 4 channels, patches of 2 x 2
    assert 0.98 * bound < dit.x_embedder.proj.weight.abs().max() <= bound
    for weight in (dit.t_embedder.mlp[0].weight, dit.t_embedder.mlp[2].weight,
                   dit.y_embedder.embedding_table.weight):
        assert weight.std().item() == pytest.approx(0.02, rel=0.1)
    assert not any(m.bias.any() for m in dit.modules() if isinstance(m, (nn.Linear, nn.Conv2d)))


@torch.no_grad()
def test_rotary_scores_depend_on_relative_positions_only():
    """One query and one key, put at every position: <R_i q, R_j k> is a function of i - j on both axes."""
    rope = models.Rope(head_width=16, size=6)
    q, k = arr("q", 16), arr("k", 16)

    def scores(q: Tensor, k: Tensor) -> Tensor:
        rotated_q, rotated_k = rope(q.expand(36, 16)), rope(k.expand(36, 16))
        return (rotated_q @ rotated_k.T).reshape(6, 6, 6, 6)           # row and column of q, then of k

    s = scores(q, k)
    assert_close(s[1:, :, 1:, :], s[:-1, :, :-1, :])
    assert_close(s[:, 1:, :, 1:], s[:, :-1, :, :-1])
    assert s[0, 0].std(dim=0).min() > 0.1 and s[0, 0].std(dim=1).min() > 0.1
    assert_close(rope(q.expand(36, 16)).norm(dim=1), q.norm().expand(36))
    assert_close(rope(q.expand(36, 16))[0], q)

    row_only = q * (torch.arange(16) < 8)                               # the first half turns with the row
    assert_close(scores(row_only, k), scores(row_only, k)[:, :1, :, :1].expand(6, 6, 6, 6))


@pytest.mark.parametrize("family", ["lightningdit", "sit"])
@torch.no_grad()
def test_qk_norm_forgets_the_scale_of_queries_and_keys(family: str):
    dit = filled(models.build_dit(LIGHTNINGDIT_TINY | dict(family=family, qk_norm=True)))
    inputs = arr("x_t", 2, 16, 8, 8), torch.tensor([0.3, 0.8]), torch.tensor([3, 10])
    v_hat = dit(*inputs)
    for block in dit.blocks:
        block.attn.qkv.weight[:128] *= 30
        block.attn.qkv.bias[:128] *= 30
    assert_close(dit(*inputs), v_hat, rtol=1e-3, atol=1e-3)


@torch.no_grad()
def test_queries_and_keys_keep_the_dtype_of_values(monkeypatch: pytest.MonkeyPatch):
    """The float32 tables of the rotation must not promote attention to float32."""
    seen, attend = [], models.attend

    def spy(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        seen.append((q.dtype, k.dtype, v.dtype))
        return attend(q, k, v)

    monkeypatch.setattr(models, "attend", spy)
    dit = filled(models.build_dit(LIGHTNINGDIT_TINY | dict(qk_norm=True)))
    with torch.autocast("cpu", torch.bfloat16):
        v_hat = dit(arr("x_t", 2, 16, 8, 8), torch.tensor([0.3, 0.8]), torch.tensor([3, 10]))
    assert seen == 2 * [(torch.bfloat16,) * 3]
    assert v_hat.dtype == torch.float32


@pytest.mark.parametrize("tokens", [64, 300])
def test_attention_in_bfloat16_is_the_library_s_in_float32(tokens: int):
    """Written out for few tokens on a CPU; weights 1 / N rounded to 8 bits leave an error of 2^-8."""
    q, k, v = (arr(name, 2, 3, tokens, 16).bfloat16().requires_grad_() for name in "qkv")
    expected = torch.nn.functional.scaled_dot_product_attention(q.float(), k.float(), v.float())
    h = models.attend(q, k, v)
    assert h.dtype == torch.bfloat16
    assert_close(h.float(), expected, rtol=2e-2, atol=4e-3)
    toward = arr("g", 2, 3, tokens, 16)
    for found, wanted in zip(torch.autograd.grad(h.float(), (q, k, v), toward),
                             torch.autograd.grad(expected, (q, k, v), toward)):
        assert_close(found.float(), wanted.float(), rtol=3e-2, atol=2e-2)


@pytest.mark.parametrize("config", [LIGHTNINGDIT_TINY, SIT_TINY, LIGHTNINGDIT_TINY | dict(qk_norm=True)])
def test_every_trained_parameter_gets_a_gradient(config: dict):
    """DistributedDataParallel waits for ever for the gradient of an unused parameter."""
    dit = filled(models.build_dit(config)).train()
    x_t = arr("x_t", 2, config["in_channels"], 8, 8)
    dit(x_t, torch.tensor([0.3, 0.8]), torch.tensor([3, 10])).square().sum().backward()
    assert [name for name, p in dit.named_parameters() if p.grad is None] == ["pos_embed"]
    assert not dit.pos_embed.requires_grad


@pytest.mark.parametrize("changed, message", [
    (dict(family="unet"), "family"), (dict(heads=3), "4 x heads"), (dict(patch=3), "of patch")])
def test_impossible_transformers_are_refused(changed: dict, message: str):
    with pytest.raises(ValueError, match=message):
        models.build_dit(LIGHTNINGDIT_TINY | changed)


def test_normalize_and_back():
    """Two channels, worked out: (5 - 1) / 2 = 2 and (5 + 1) / 3 = 2."""
    mean, std = torch.tensor([1.0, -1.0]), torch.tensor([2.0, 3.0])
    z = torch.full((1, 2, 2, 2), 5.0)
    assert_close(models.normalize(z, mean, std), torch.full((1, 2, 2, 2), 2.0))
    assert_close(models.denormalize(torch.full((1, 2, 2, 2), 2.0), mean, std), z)


# ------------------------------------------------------------------------------------------------------------
# Checkpoints: ours rebuild themselves, published ones load as they are, any other file is refused by name.


@pytest.mark.parametrize("config", [SMALL, SMALL_VIT, SMALL_VIT | dict(latent_norm=True)])
@torch.no_grad()
def test_tokenizer_checkpoint_rebuilds_its_model(tmp_path: Path, config: dict):
    original = filled(models.build_autoencoder(config))
    torch.save({"kind": "tokenizer", "model_config": original.config, "model": original.state_dict(),
                "latent_mean": torch.zeros(4), "step": 7}, tmp_path / "checkpoint.pt")
    loaded, checkpoint = models.load_autoencoder(tmp_path / "checkpoint.pt")
    assert type(loaded) is type(original) and loaded.config == original.config == config
    assert checkpoint["step"] == 7 and not loaded.training
    x = arr("image", 1, 3, 8, 8)
    assert_close(loaded(x), original(x), rtol=0, atol=0)


@torch.no_grad()
def test_dit_checkpoint_rebuilds_its_model(tmp_path: Path):
    original, average = filled(models.build_dit(SIT_TINY)), models.build_dit(SIT_TINY)
    torch.save({"kind": "dit", "model_config": original.config, "model": original.state_dict(),
                "ema": average.state_dict()}, tmp_path / "checkpoint.pt")
    inputs = arr("x_t", 2, 4, 8, 8), torch.tensor([0.3, 0.8]), torch.tensor([3, 10])
    loaded, _ = models.load_dit(tmp_path / "checkpoint.pt", weights="model")
    assert loaded.config == original.config and not loaded.training
    assert_close(loaded(*inputs), original(*inputs), rtol=0, atol=0)
    loaded, _ = models.load_dit(tmp_path / "checkpoint.pt")
    assert_close(loaded(*inputs), torch.zeros(2, 4, 8, 8), rtol=0, atol=0)         # the fresh one is the EMA


def published_tokenizer() -> dict[str, Tensor]:
    state = filled(models.build_autoencoder(SMALL)).state_dict()
    return state | {"loss.logvar": torch.zeros(1), "foundation_model.model.cls_token": torch.zeros(1, 1, 8),
                    "linear_proj.weight": torch.zeros(8, 4, 1, 1)}


@pytest.mark.parametrize("wrapped", [True, False])
@torch.no_grad()
def test_published_tokenizer_loads(tmp_path: Path, wrapped: bool):
    state = published_tokenizer()
    torch.save({"state_dict": state, "epoch": 3} if wrapped else state, tmp_path / "vavae.pt")
    loaded, checkpoint = models.load_autoencoder(tmp_path / "vavae.pt", config=SMALL)
    x = arr("image", 1, 3, 8, 8)
    assert_close(loaded(x), filled(models.build_autoencoder(SMALL))(x), rtol=0, atol=0)
    assert checkpoint["model_config"] == loaded.config and "latent_mean" not in checkpoint


def test_tokenizer_that_does_not_fit_is_refused_by_name(tmp_path: Path):
    state = published_tokenizer()
    del state["decoder.mid.attn_1.q.bias"]
    state["encoder.mid.attn_2.q.bias"] = torch.zeros(3)
    state["quant_conv.weight"] = torch.zeros(8, 7, 1, 1)
    torch.save({"state_dict": state}, tmp_path / "vavae.pt")
    with pytest.raises(ValueError) as error:
        models.load_autoencoder(tmp_path / "vavae.pt", config=SMALL)
    message = str(error.value)
    assert "1 missing: decoder.mid.attn_1.q.bias" in message
    assert "1 unexpected: encoder.mid.attn_2.q.bias" in message
    assert "1 of wrong shape: quant_conv.weight (8, 7, 1, 1) instead of (8, 8, 1, 1)" in message
    assert "\n" not in message and "foundation_model" not in message


@pytest.mark.parametrize("size", ["f16d16", "f16d32"])
def test_published_tokenizer_tells_its_size(size: str):
    with torch.device("meta"):
        state = models.build_autoencoder(models.AUTOENCODERS[size]).state_dict()
    assert models.published_autoencoder_config(state) == models.AUTOENCODERS[size]


@pytest.mark.parametrize("weights", ["ema", "model"])
@torch.no_grad()
def test_published_transformer_loads(tmp_path: Path, weights: str):
    """LightningDiT's container: `model` has `module.`, `ema` has not; both hold rotary tables, here bad."""
    config = models.DITS["demo"]
    original, other = filled(models.build_dit(config)), models.build_dit(config)
    container = {"model": other.state_dict(), "ema": other.state_dict()}
    container[weights] = original.state_dict() | {"feat_rope.freqs_cos": torch.zeros(64, 32)}
    container["model"] = {f"module.{name}": value for name, value in container["model"].items()}
    container |= {"opt": {"state": {}}, "args": argparse.Namespace(model="LightningDiT")}
    torch.save(container, tmp_path / "dit.pt")
    loaded, checkpoint = models.load_dit(tmp_path / "dit.pt", weights=weights)
    inputs = arr("x_t", 2, 8, 8, 8), torch.tensor([0.3, 0.8]), torch.tensor([3, 10])
    assert_close(loaded(*inputs), original(*inputs), rtol=0, atol=0)
    assert checkpoint["model_config"] == config


def test_bare_transformer_loads_and_a_wrong_one_is_refused(tmp_path: Path):
    state = filled(models.build_dit(SIT_TINY)).state_dict()
    torch.save(state, tmp_path / "sit.pt")
    loaded, _ = models.load_dit(tmp_path / "sit.pt", config=SIT_TINY)
    assert_close(loaded.state_dict(), state, rtol=0, atol=0)
    with pytest.raises(ValueError, match="2, 64.* is not known.*give its config"):
        models.load_dit(tmp_path / "sit.pt")
    with pytest.raises(ValueError, match="missing: blocks.0.norm1.weight.*unexpected.*wrong shape"):
        models.load_dit(tmp_path / "sit.pt", config=LIGHTNINGDIT_TINY)


@pytest.mark.parametrize("size", models.DITS)
def test_published_transformer_tells_its_config(size: str):
    for changed in (dict(), dict(qk_norm=True), dict(family="sit", patch=2, in_channels=4, learn_sigma=True)):
        with torch.device("meta"):
            dit = models.build_dit(models.DITS[size] | changed)
        assert models.published_dit_config(dit.state_dict(), "a file") == dit.config


def test_files_that_are_no_checkpoint_are_refused_in_one_line(tmp_path: Path):
    def message(path: Path, load=models.load_autoencoder, **options) -> str:
        with pytest.raises((ValueError, FileNotFoundError)) as error:
            load(path, **options)
        assert str(path) in str(error.value) and "\n" not in str(error.value)
        return str(error.value)

    path = tmp_path / "checkpoint.pt"
    assert "not a file" in message(path)
    assert "not a file" in message(tmp_path)
    path.write_bytes(b"<html>not found</html>")
    assert "damaged" in message(path)
    torch.save({"model": torch.zeros(1000)}, path)
    path.write_bytes(path.read_bytes()[:700])
    assert "damaged" in message(path)
    torch.save(nn.Linear(2, 2), path)                                  # a pickled module could run code
    assert "more than tensors" in message(path)
    torch.save([1, 2], path)
    assert "holds a list" in message(path)
    torch.save({"kind": "dit", "model": {}}, path)
    assert '"dit" checkpoint where a "tokenizer"' in message(path)
    assert 'no "ema" weights' in message(path, models.load_dit)
