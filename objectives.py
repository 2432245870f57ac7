"""What Eq. 11 leaves open, and what trains a tokenizer beside it.

Each of them brings a network, a frozen teacher or random draws.  They have a room of
their own so that the stage, `train_tokenizer.py`, shows its objective alone.

    Reconstruction        L_rec, which may hold LPIPS
    Alignment             VA-VAE: the latent learns from a teacher
    SemanticPreservation  GAE: the latent's mean learns from a teacher
    Adversary             VQGAN: a discriminator learns with the tokenizer
    Lambda1               the weight of Eq. 9, which NoiseTarget may find in training

--regularizer names one of those that "Diffusing in the Right Space" compares, at
its published strength, together with any --loss:

    eq     MovedLatent           EQ-VAE: the decoder must make the moved image of
                                 the moved latent
    lcr    LocalCorrelation      SSVAE: neighbouring positions become alike
    lmr    MaskedLatent          SSVAE: some positions become a learned token
    mae    MaskedImage           MAETok, DeTok: a ViT sees a part of the patches
    repa   RepresentationMatch   REPA: an MLP of the latent finds a teacher's features

Those that add a loss have a method `loss`, and `balance` finds its weight.  Those that
change the way from x to x_hat are a Route.  Held-out images meet neither.
"""

import argparse
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import runtime  # before torch, because it says how idle threads wait

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import frozen
import losses
import models
import neighbours
from runtime import InputError, Runtime

# The published strengths.  The weights of lcr and repa are relative to L_rec's
# gradient at the encoder's last layer.  lmr hides 0, 1, 2 or 3 quarters of the
# positions with these probabilities, and mae a share of the patches that is uniform
# in this range, and 0 where it is negative.
REGULARIZERS: dict[str, dict[str, Any]] = {
    "eq": dict(probability=0.5),
    "lcr": dict(weight=0.1 * 0.02, threshold=0.75),   # SSVAE: 0.1 w, and w = 0.02
    "lmr": dict(probabilities=[0.7, 0.1, 0.1, 0.1]),
    "mae": dict(least=-0.1, most=0.3),
    "repa": dict(weight=0.1),
}

# ------------------------------------------------------------------------------
# What the regularisers do to a latent or an image, as functions.  One is a loss.  The
# others change what the encoder sees or the decoder gets, and leave the losses as
# they are.  REPA (Yu et al. 2024) is the cosine distance of a network of z.


def cosine_distance(f_hat: Tensor, f: Tensor) -> Tensor:
    """Mean of 1 - cos(f_hat, f) over all positions, Eq. 4 of GAE up to the 1.

    GAE's code takes the squared error of vectors with a root mean square of 1,
    which is twice this.
    """
    return (1 - F.cosine_similarity(f_hat, f, dim=1)).mean()


def local_correlation(mean: Tensor) -> Tensor:
    """rho of SSVAE (Liu et al. 2025): how alike neighbouring positions are.

    The mean correlation, over channels, of the six pairs in each window of 2 x 2
    positions.  LCR is max(0, 0.75 - rho) of means that are standardised, channel by
    channel.  For unit vectors u the sum over pairs is (|sum of u|^2 - 4) / 2.

    mean: [B, C, h, w] with C, h and w at least 2; an odd last row or column is left
    out.  -> [], from -1/3 to 1.
    """
    u = F.normalize(mean - mean.mean(1, keepdim=True), dim=1, eps=1e-8)
    together = 4 * F.avg_pool2d(u, 2)
    return ((together.square().sum(1) - 4) / 12).mean()


def moved(a: Tensor, side: int, turns: int) -> Tensor:
    """EQ-VAE (Kouzelis et al. 2025): resize to side x side, and turn by quarters.

    The decoder must make the moved image of the moved latent.  A penalty on the
    distance of encode(moved x) and moved z itself would let the latent collapse.
    a: [B, C, H, H] -> [B, C, side, side]
    """
    if side != a.shape[-1]:
        a = F.interpolate(a, side, mode="bilinear")
    return a.rot90(turns, (2, 3))


def hide_positions(z: Tensor, token: Tensor, hidden: Tensor) -> Tensor:
    """LMR of SSVAE: a learned token [C] in place of z where hidden [h, w] is true.

    The decoder must make the whole image all the same.  z: [B, C, h, w]
    """
    return torch.where(hidden, token[:, None, None], z)


def hide_patches(x: Tensor, hidden: Tensor) -> Tensor:
    """Masking for a ViT (MAETok, DeTok): patches become grey, which is 0.

    Its embedding has no bias, so that a grey patch is a token of its position alone.
    The decoder must make the whole image all the same.
    x: [B, 3, H, W], hidden: [B, h, w], true for the patches to hide.
    """
    wide = F.interpolate(hidden[:, None].float(), x.shape[2:]).bool()
    return x.masked_fill(wide, 0.0)


# ------------------------------------------------------------------------------
# The reconstruction, and more losses where they have a weight.  Some of them bring a
# network of their own, which trains with the tokenizer.


class Reconstruction:
    """L_rec: the absolute error, plus LPIPS where it has a weight.

    With the velocity v of a diffusion decoder, which predicts v_hat, the squared
    error of the velocity takes the place of the absolute error.
    """

    def __init__(self, perceptual_weight: float, device: torch.device) -> None:
        self.weight = perceptual_weight
        if self.weight:
            self.lpips = frozen.load_lpips().to(device)
        self.networks = [self.lpips] if self.weight else []

    def __call__(self, x_hat: Tensor, x: Tensor, v_hat: Tensor | None = None,
                 v: Tensor | None = None) -> Tensor:
        if v_hat is None or v is None:
            rec, at = losses.absolute_error(x_hat, x), x_hat
        else:
            rec, at = losses.squared_error(v_hat, v), v_hat
        if self.weight:
            rec = rec + self.weight * losses.perceptual_error(self.lpips, x_hat, x)
        return at_image(rec, at) if rec.requires_grad else rec


class Alignment:
    """Draws the latent to the features of a frozen teacher."""

    name, start, maximum, constant = "align", 0, 1e8, False
    part, imagenet = "projection", False

    def __init__(self, args: argparse.Namespace, tokenizer: models.Tokenizer,
                 rt: Runtime) -> None:
        self.weight, self.layer = args.align_weight, tokenizer.encoder_last_layer
        self.autocast = lambda: rt.autocast(args.precision)
        side = args.size // tokenizer.stride
        self.teacher = frozen.load_teacher(args.teacher, side, imagenet=self.imagenet)
        if isinstance(self.teacher, nn.Module):
            self.teacher.to(rt.device)
        x = torch.zeros(1, 3, args.size, args.size, device=rt.device)
        grid, shape = tokenizer.posterior(x)[0].shape[2:], self.features(x).shape
        if len(shape) != 4 or shape[2:] != grid:
            raise InputError(f"--teacher {args.teacher} gives {list(shape)} for one "
                             f"image: the latent needs [1, D, {grid[0]}, {grid[1]}]")
        net = self.head(tokenizer.channels, shape[1]).to(rt.device)
        self.network, self.parts = rt.wrap(net), {self.part: net}
        self.parameters = list(net.parameters())

    def head(self, channels: int, features: int) -> nn.Module:
        return nn.Conv2d(channels, features, 1, bias=False)

    def learn(self, lr: float) -> None:
        """The head learns with the tokenizer, in its optimiser."""

    @torch.no_grad()
    def features(self, x: Tensor) -> Tensor:
        with self.autocast():
            return self.teacher(x).float()

    def loss(self, x: Tensor, mean: Tensor, z: Tensor, target: Tensor, x_hat: Tensor) -> Tensor:
        """L_mdms + L_mcos of the sample z, projected to the features' width."""
        pair = self.network(z), self.features(x)
        return losses.marginal_distance_matrix(*pair) + losses.marginal_cosine(*pair)


class SemanticPreservation:
    """Draws the latent to a teacher as GAE does, in one of three places (Figure 3 of GAE).

    latent   the mean, to the target of a trained teacher
    pre      the encoder's features, to those of a foundation model of this width
    post     a linear map of the mean, to such features
    """

    name, start, constant = "semantic", 0, True

    def __init__(self, args: argparse.Namespace, tokenizer: models.Tokenizer,
                 rt: Runtime) -> None:
        self.weight, self.place = args.semantic_weight, args.semantic_at
        self.autocast = lambda: rt.autocast(args.precision)
        side = args.size // tokenizer.stride
        if self.place == "latent" and ":" not in args.teacher:
            if not Path(args.teacher).exists():
                raise InputError(f"GAE needs a teacher, and {args.teacher} is not there: "
                                 "`python train_teacher.py` makes one; or --semantic-weight 0")
            self.teacher = frozen.Target(args.teacher, side)
        else:
            self.teacher = frozen.load_teacher(args.teacher, side, imagenet=True)
        if isinstance(self.teacher, nn.Module):
            self.teacher.to(rt.device)
        if self.place == "pre":
            tokenizer.encoder.register_forward_hook(self.keep)
        x = torch.zeros(1, 3, args.size, args.size, device=rt.device)
        with torch.no_grad():
            mean, target = tokenizer.posterior(x)[0], self.target(x)
        self.network, self.parts = nn.Identity(), {}
        if self.place == "post":
            net = nn.Conv2d(tokenizer.channels, target.shape[1], 1, bias=False).to(rt.device)
            self.network, self.parts = rt.wrap(net), {"semantic_projection": net}
        if self.place == "pre" and self.features.ndim != 3:
            raise InputError(f"--semantic-at pre needs a ViT, not --model {args.model}")
        found = self.found(mean).shape
        if found != target.shape:
            raise InputError(f"--teacher {args.teacher} gives {list(target.shape)} for one "
                             f"image, but {self.place} has {list(found)}")
        self.parameters = list(self.network.parameters())

    def keep(self, encoder: nn.Module, inputs: tuple, features: Tensor) -> None:
        self.features = features

    def learn(self, lr: float) -> None:
        """The linear map learns with the tokenizer, in its optimiser."""

    @torch.no_grad()
    def target(self, x: Tensor) -> Tensor:
        with self.autocast():
            target = self.teacher(x).float()
        return models.rms(target.movedim(1, -1)).movedim(-1, 1)

    def found(self, mean: Tensor) -> Tensor:
        """What is compared with the target: [B, D, h, w]."""
        if self.place == "pre":
            return models.rms(self.features.float()).mT.unflatten(2, mean.shape[2:])
        return self.network(mean)

    def loss(self, x: Tensor, mean: Tensor, z: Tensor, target: Tensor, x_hat: Tensor) -> Tensor:
        """Eq. 2 of GAE, a mean."""
        return F.mse_loss(self.found(mean), self.target(x))


class Adversary:
    """A discriminator, which learns to tell x from x_hat."""

    name, maximum = "adv", 1e4

    class Both(nn.Module):
        """Logits of x and x_hat.  Together they would share BatchNorm's statistics."""

        def __init__(self, net: nn.Module) -> None:
            super().__init__()
            self.net = net

        def forward(self, x: Tensor, x_hat: Tensor) -> tuple[Tensor, Tensor]:
            return self.net(x).float(), self.net(x_hat).float()

    def __init__(self, args: argparse.Namespace, tokenizer: models.Tokenizer,
                 rt: Runtime) -> None:
        if args.disc_weight and args.size < 32:
            raise InputError("the discriminator needs --size 32 or more, or --disc-weight 0")
        self.weight, self.layer = args.disc_weight, tokenizer.last_layer
        self.constant = args.disc_mode == "constant"
        self.start, self.autocast = args.disc_start, lambda: rt.autocast(args.precision)
        self.net = models.PatchGAN().to(rt.device, memory_format=torch.channels_last)
        self.network = rt.wrap(self.Both(self.net))
        self.optimizer = adamw(self.net.parameters(), args)
        self.parameters: list[Tensor] = []   # none that the tokenizer's optimiser trains
        self.parts = {"discriminator": self.net, "disc_optimizer": self.optimizer}
        self.pairs: list[tuple[Tensor, Tensor]] = []

    def loss(self, x: Tensor, mean: Tensor, z: Tensor, target: Tensor, x_hat: Tensor) -> Tensor:
        """What the tokenizer minimises.  The pair is kept to learn from."""
        self.pairs.append((target, x_hat.detach()))
        self.net.requires_grad_(False)
        with self.autocast():
            return at_image(losses.hinge_generator(self.net(x_hat).float()), x_hat)

    def learn(self, lr: float) -> None:
        """One step of the discriminator on the pairs of this batch."""
        self.net.requires_grad_(True)
        self.optimizer.param_groups[0]["lr"] = lr
        self.optimizer.zero_grad(set_to_none=True)
        parts, batch = len(self.pairs), map(torch.cat, zip(*self.pairs))
        for x, x_hat in runtime.micro_batches(self.network, parts, *batch):
            with self.autocast():
                real, fake = self.network(x, x_hat)
            (losses.hinge_discriminator(real, fake) / parts).backward()
        self.optimizer.step()
        self.pairs = []


class RepresentationMatch(Alignment):
    """REPA on the latent: an MLP finds the teacher's features at each position of z."""

    name, part, imagenet = "repa", "repa_mlp", True

    def __init__(self, args: argparse.Namespace, tokenizer: models.Tokenizer,
                 rt: Runtime) -> None:
        super().__init__(args, tokenizer, rt)
        self.weight = REGULARIZERS["repa"]["weight"]

    def head(self, channels: int, features: int) -> nn.Module:
        """2048 wide, as in REPA, for the features of DINOv2-L."""
        width = 2 * features
        return nn.Sequential(nn.Conv2d(channels, width, 1), nn.SiLU(),
                             nn.Conv2d(width, width, 1), nn.SiLU(),
                             nn.Conv2d(width, features, 1))

    def loss(self, x: Tensor, mean: Tensor, z: Tensor, target: Tensor, x_hat: Tensor) -> Tensor:
        return cosine_distance(self.network(z), self.features(x))


class LocalCorrelation:
    """SSVAE's LCR: neighbouring positions of the mean correlate over the channels.

    With --accumulate it looks at one part of the batch at a time: its channels are
    standardised over that part, on all processes, and rho is that part's mean.
    """

    name, start, maximum, constant = "lcr", 0, 1e8, False

    def __init__(self, args: argparse.Namespace, tokenizer: models.Tokenizer,
                 rt: Runtime) -> None:
        if args.size // tokenizer.stride < 2:
            raise InputError(f"--regularizer lcr compares neighbours, and --size {args.size} has "
                             "one position: choose a larger --size")
        self.weight, self.threshold = REGULARIZERS["lcr"].values()
        self.layer, self.network = tokenizer.encoder_last_layer, nn.Identity()
        self.parts: dict[str, Any] = {}
        self.parameters: list[Tensor] = []

    def learn(self, lr: float) -> None:
        """It has no network."""

    def loss(self, x: Tensor, mean: Tensor, z: Tensor, target: Tensor, x_hat: Tensor) -> Tensor:
        def average(a: Tensor) -> Tensor:
            return runtime.all_reduce_mean(a.detach().mean((0, 2, 3), keepdim=True))

        centred = mean - average(mean)
        rho = local_correlation(centred / (average(centred.square()).sqrt() + 1e-6))
        pulls = runtime.all_reduce_mean(rho.detach().clone()) < self.threshold
        return torch.where(pulls, self.threshold - rho, 0.0)


def adamw(parameters: Iterable[Tensor], args: argparse.Namespace) -> torch.optim.AdamW:
    return torch.optim.AdamW(parameters, lr=args.lr, betas=tuple(args.betas),
                             weight_decay=args.weight_decay, fused=True)


def at_image(loss: Tensor, x_hat: Tensor) -> Tensor:
    """A loss of this value and this gradient at x_hat, whose graph ends there.

    `balance` takes a gradient, and the total's follows.  With this, LPIPS and the
    discriminator are differentiated once, and their activations are freed.
    """
    pull, = torch.autograd.grad(loss, x_hat)
    return loss.detach() + (pull * (x_hat - x_hat.detach())).sum()


def balance(rec: Tensor, loss: Tensor, other: Any, values: int) -> Tensor:
    """The weight at which `loss` pulls as hard as L_rec, times its own weight.

    Both pulls are gradients at one layer, averaged over the processes.  L_rec is
    taken without KL or VE.  A constant weight is meant for a
    mean over pixel values.  L_rec is a sum over `values` of them, and so the weight is
    multiplied by their number.
    """
    if other.constant:
        return loss.new_full((), other.weight * values)
    pulls = [torch.autograd.grad(a, other.layer, retain_graph=True)[0]
             for a in (rec, loss)]
    pulls = [runtime.all_reduce_mean(pull) for pull in pulls]
    return other.weight * losses.adaptive_weight(*pulls, maximum=other.maximum)


def blocks_of(tokenizer: nn.Module) -> list[nn.Module]:
    """What is compiled.  The last layers stay outside.

    `balance` takes a gradient at these layers alone.  In one graph with others it
    would pay for theirs too.
    """
    kinds = models.Level, models.VitBlock, neighbours.TimeBlock
    return [module for module in tokenizer.modules() if isinstance(module, kinds)]


# ------------------------------------------------------------------------------
# The weight of Eq. 9: as given, or a lambda1 that nobody has to choose.


class Lambda1:
    """lambda1 at each step: it grows from 0 over --ve-warmup, and may then be moved."""

    def __init__(self, args: argparse.Namespace, rt: Runtime) -> None:
        self.given, self.warmup, self.keeper = args.lambda1, args.ve_warmup, None
        self.parts: dict[str, Any] = {}
        self.parameters: list[Tensor] = []
        if args.target_noise:
            if args.loss != "ve" or not args.lambda1:
                raise InputError("--target-noise moves lambda1: it needs --loss ve, and a "
                                 "--lambda1 above 0 to begin with")
            self.keeper = NoiseTarget(args.target_noise, args.lambda1, args.steps).to(rt.device)
            self.parts = {"lambda1": self.keeper}

    def at(self, step: int) -> Any:
        full = self.keeper.lambda1 if self.keeper else self.given
        return full * min(1, (step + 1) / max(1, self.warmup))

    def see(self, step: int, mean: Tensor, logvar: Tensor) -> None:
        if self.keeper and step >= self.warmup:
            self.keeper.see(mean, logvar)

    def step(self) -> None:
        if self.keeper and self.keeper.seen:   # the warm-up is over
            self.keeper.step()


class NoiseTarget(nn.Module):
    """Moves lambda1 until the latent's noise is the wanted share of its spread.

    The share is the root of sigma^2 / spread^2 in the median channel, because a channel
    that says nothing has no spread.  The log's `relative_noise` is a mean over channels.
    Where Eq. 14 holds, sigma^4 = lambda1 / T, and four
    times the lambda1 gives twice the sigma^2.  Each step therefore does

        log lambda1 += rate * clamp(log(target^2 / share^2), -1, 1)

    with a rate of 40 / steps, or 0.02 if that is less.  So lambda1 follows within a
    twentieth of the training.
    """

    def __init__(self, target: float, lambda1: float, steps: int) -> None:
        super().__init__()
        self.target, self.rate = target, min(0.02, 40 / steps)
        self.register_buffer("log_lambda1", torch.tensor(lambda1).log())
        self.seen: list[Tensor] = []

    @property
    def lambda1(self) -> Tensor:
        return self.log_lambda1.exp()

    @torch.no_grad()
    def see(self, mean: Tensor, logvar: Tensor) -> None:
        """A part of the batch, on this process."""
        rows = torch.stack([mean, mean.square(), logvar.exp()]).float()
        self.seen.append(rows.mean((1, 3, 4)))

    @torch.no_grad()
    def step(self) -> None:
        """Move lambda1, by the whole batch."""
        mean, square, var = runtime.all_reduce_mean(torch.stack(self.seen).mean(0))
        square_share = (var / (square - mean.square()).clamp(min=1e-12)).quantile(0.5)
        move = (2 * math.log(self.target) - square_share.log()).clamp(-1, 1)
        self.log_lambda1 += self.rate * move
        self.seen = []


# ------------------------------------------------------------------------------
# The way from an image to x_hat, which three of the regularisers change.  What they
# draw depends on seed and step alone, so that all processes draw the same.


class Route:
    """The encoder sees x, and the decoder makes x of z."""

    def __init__(self, args: argparse.Namespace, tokenizer: models.Tokenizer,
                 rt: Runtime) -> None:
        self.seed, self.rt, self.batch = args.seed, rt, args.batch
        self.stride, self.side = tokenizer.stride, args.size // tokenizer.stride
        self.network: nn.Module = nn.Identity()
        self.parts: dict[str, Any] = {}
        self.parameters: list[Tensor] = []

    def begin(self, x: Tensor, step: int) -> tuple[Tensor, Tensor]:
        """What the encoder sees of this rank's images x, and what the decoder must make."""
        return x, x

    def draw(self, step: int) -> torch.Generator:
        return runtime.generator(self.seed, "regularizer", step)


def entrance(tokenizer: models.Tokenizer) -> nn.Module:
    """The first module of the decoder that gets z.  It knows whether this is training."""
    return getattr(tokenizer, "post_quant_conv", tokenizer.decoder)


class MovedLatent(Route):
    """EQ-VAE: in half of the steps the decoder makes the moved image of the moved z.

    Both are resized to a quarter of their side or more, and turned by a quarter or
    more.  A ViT decodes one size alone, and only gets the turns.  EQ-VAE's code also
    shrinks some of the images that it does not move, and we do not.
    """

    def __init__(self, args: argparse.Namespace, tokenizer: models.Tokenizer,
                 rt: Runtime) -> None:
        super().__init__(args, tokenizer, rt)
        if tokenizer.diffuses:
            raise InputError("--regularizer eq cannot move the noise that a diffusion decoder "
                             "begins with: choose lcr, lmr or repa, or another --model")
        self.resizes = tokenizer.config["arch"] != "vit"
        least = 128 if args.disc_weight else 64 if args.perceptual_weight else 0
        if self.resizes and args.size < least:
            raise InputError(f"--regularizer eq makes images of a quarter of --size {args.size}, "
                             f"and LPIPS or the discriminator needs --size {least}")
        entrance(tokenizer).register_forward_pre_hook(self.enter)

    def begin(self, x: Tensor, step: int) -> tuple[Tensor, Tensor]:
        draw, least = self.draw(step), max(1, self.side // 4)
        moves = torch.rand((), generator=draw) < REGULARIZERS["eq"]["probability"]
        side = int(torch.randint(least, max(least + 1, self.side), (), generator=draw))
        turns = int(torch.randint(1, 4, (), generator=draw))
        self.side_now = side if moves and self.resizes else self.side
        self.turns = turns if moves else 0
        return x, moved(x, self.side_now * self.stride, self.turns)

    def enter(self, decoder: nn.Module, inputs: tuple[Tensor]) -> Tensor | None:
        return moved(*inputs, self.side_now, self.turns) if decoder.training else None


class MaskedLatent(Route):
    """SSVAE's LMR: some positions, the same in the whole batch, become a learned token."""

    class Token(nn.Module):
        def __init__(self, channels: int) -> None:
            super().__init__()
            self.token = nn.Parameter(torch.randn(channels))

        def forward(self, z: Tensor, hidden: Tensor) -> Tensor:
            return hide_positions(z, self.token, hidden)

    def __init__(self, args: argparse.Namespace, tokenizer: models.Tokenizer,
                 rt: Runtime) -> None:
        super().__init__(args, tokenizer, rt)
        net = self.Token(tokenizer.channels).to(rt.device)
        self.network, self.parts = rt.wrap(net), {"mask_token": net}
        self.parameters = list(net.parameters())
        entrance(tokenizer).register_forward_pre_hook(self.enter)

    def begin(self, x: Tensor, step: int) -> tuple[Tensor, Tensor]:
        draw, count = self.draw(step), self.side**2
        chances = torch.tensor(REGULARIZERS["lmr"]["probabilities"])
        quarters = int(torch.multinomial(chances, 1, generator=draw))
        hidden = torch.randperm(count, generator=draw) < round(quarters / 4 * count)
        self.hidden = hidden.view(self.side, self.side).to(x.device)
        return x, x

    def enter(self, decoder: nn.Module, inputs: tuple[Tensor]) -> Tensor | None:
        return self.network(*inputs, self.hidden) if decoder.training else None


class MaskedImage(Route):
    """MAETok, DeTok: the encoder sees a part of the patches, other ones in each image."""

    def __init__(self, args: argparse.Namespace, tokenizer: models.Tokenizer,
                 rt: Runtime) -> None:
        super().__init__(args, tokenizer, rt)
        if tokenizer.config["arch"] != "vit":
            raise InputError(f"--regularizer mae needs a ViT, not --model {args.model}")

    def begin(self, x: Tensor, step: int) -> tuple[Tensor, Tensor]:
        least, most = REGULARIZERS["mae"].values()
        share = least + (most - least) * torch.rand((), generator=self.draw(step)).item()
        shape = self.batch // self.rt.world, self.side**2
        order = runtime.global_randn(shape, self.rt, self.seed, "patches", step)
        hidden = order.argsort(1).argsort(1) < round(share * shape[1])
        return hide_patches(x, hidden.view(-1, self.side, self.side)), x


# ------------------------------------------------------------------------------
# What the flags ask for.


def others_of(args: argparse.Namespace, tokenizer: models.Tokenizer, rt: Runtime) -> list[Any]:
    """The losses that are balanced with L_rec."""
    kinds = [(Alignment, args.align_weight), (SemanticPreservation, args.semantic_weight),
             (Adversary, args.disc_weight), (LocalCorrelation, args.regularizer == "lcr"),
             (RepresentationMatch, args.regularizer == "repa")]
    return [kind(args, tokenizer, rt) for kind, wanted in kinds if wanted]


def route_of(args: argparse.Namespace, tokenizer: models.Tokenizer, rt: Runtime) -> Route:
    kinds = {"eq": MovedLatent, "lmr": MaskedLatent, "mae": MaskedImage}
    return kinds.get(args.regularizer, Route)(args, tokenizer, rt)
