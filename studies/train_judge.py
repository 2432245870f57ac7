"""Train the judge of the built-in shapes: the network of FD-Shapes and *recognised*.

    python -m studies.train_judge          # writes studies/judge.pt, minutes of one core

The judge sees real shapes only.  They are blurred a little, noisy, brighter or
darker, so that it stays a fair judge of pictures that are not quite perfect.
"""

from pathlib import Path

import runtime  # before torch: it sets how threads wait
import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

import checkpoints
from data import Shapes
from frozen import ShapesJudge
from runtime import generator

STEPS, BATCH, LR = 1200, 64, 4e-3
CONFIDENCE = 0.9                                   # of a picture that is recognised


# ------------------------------------------------------------------------------
# Every picture of a batch gets its own mixture of the four blemishes below.


def blemish(pixels: Tensor, draws: torch.Generator) -> Tensor:
    """Blur, flip, change brightness and contrast, add noise: uint8 -> uint8."""
    def uniform(low: float, high: float) -> Tensor:
        u = torch.rand(len(pixels), 1, 1, 1, generator=draws)
        return low + (high - low) * u

    x = pixels.float() / 255
    soft = F.avg_pool2d(F.pad(x, (1, 1, 1, 1), mode="replicate"), 3, stride=1)
    x = x + uniform(0, 1) * (soft - x)
    x = torch.where(uniform(0, 1) < 0.5, x.flip(3), x)
    x = 0.5 + uniform(0.8, 1.2) * (x - 0.5) + uniform(-0.1, 0.1)
    x = x + uniform(0, 0.08) * torch.randn(x.shape, generator=draws)
    return (255 * x).round().clamp(0, 255).to(torch.uint8)


def train(seed: int) -> ShapesJudge:
    torch.manual_seed(seed)
    judge, shapes = ShapesJudge(), Shapes(ShapesJudge.SIZE, "train", seed)
    judge.to(memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(judge.parameters(), lr=LR, weight_decay=0.01)
    draws, bar = generator(seed, "judge"), tqdm(range(STEPS), "judge")
    for step in bar:
        images, labels, _ = shapes.render_batch(range(step * BATCH, (step + 1) * BATCH))
        _, logits = judge(blemish(images, draws))
        loss = F.cross_entropy(logits, labels)
        optimizer.param_groups[0]["lr"] = LR * min((step + 1) / 100, 1 - step / STEPS)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        if (step + 1) % 100 == 0:
            bar.set_postfix(loss=f"{loss.item():.4f}")
    return judge.eval()


# ------------------------------------------------------------------------------
# Held-out shapes say whether the judge can be trusted, and the file is small.


@torch.no_grad()
def report(judge: ShapesJudge, seed: int) -> None:
    """Print its accuracy and confidence on held-out shapes, clean and blemished."""
    images, labels, _ = Shapes(judge.SIZE, "val", seed).render_batch(range(2000))
    worn = blemish(images, generator(seed, "report"))
    for name, pixels in (("clean", images), ("blemished", worn)):
        _, logits = judge(pixels)
        confidence, guess = logits.softmax(1).max(1)
        right = guess == labels
        recognised = (right & (confidence >= CONFIDENCE)).float().mean()
        print(f"{name}: accuracy {right.float().mean():.2%}, "
              f"mean confidence {confidence.mean():.4f}, recognised {recognised:.2%}")
        for wrong in torch.nonzero(~right)[:5, 0].tolist():
            taken = Shapes.classes[guess[wrong]]
            print(f"    {Shapes.classes[labels[wrong]]} {wrong} is taken for {taken}")


def save(judge: ShapesJudge, path: Path) -> None:
    """Write its weights in half precision."""
    state = {name: value.half() if value.is_floating_point() else value
             for name, value in judge.state_dict().items()}
    checkpoints.save(state, path)
    parameters = sum(p.numel() for p in judge.parameters())
    print(f"wrote {path}: {parameters} parameters, {path.stat().st_size} bytes")


@runtime.command
def main(argv: list[str] | None = None) -> None:
    parser = runtime.Parser(__doc__)
    parser.add_argument("--out", type=Path, default=Path("studies/judge.pt"),
                        help="file of the weights")
    parser.add_argument("--seed", type=runtime.seed, default=0, help="of weights and images")
    args = parser.parse(argv)
    runtime.claim(runtime.start("cpu"), args.out.parent, args.out)
    judge = train(args.seed)
    report(judge, args.seed)
    save(judge, args.out)


if __name__ == "__main__":
    main()
