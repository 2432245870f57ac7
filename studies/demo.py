"""The last step of `make demo`: one page of numbers and one composed picture.

    python -m studies.demo runs/demo

It reads what the stages left in the folder, draws demo.png there, and prints
five numbers with a sentence each.
"""

from pathlib import Path
from typing import Any

import runtime  # before torch, because it says how idle threads wait

import matplotlib
import torch

import checkpoints
import data
from runtime import InputError
from studies.records import read_log, read_scores

matplotlib.use("Agg")
from matplotlib import pyplot as plt  # noqa: E402

COLUMNS = 10  # images in a row: one of each class


def rows_of(report: Any, name: str) -> dict[str, Any]:
    """The row of evaluate.py's results.json about `name`."""
    return next(row for row in report if row["evaluation"] == name)


@torch.no_grad()
def reconstructions(folder: Path) -> tuple[Any, Any, Any]:
    """Held-out images, one of each class; their reconstructions; their sigma.

    Images are uint8 [10, H, W, 3]; sigma is [10, h, w], averaged over channels.
    """
    tokenizer, state = checkpoints.load_tokenizer(folder / "tokenizer/checkpoint.pt")
    config = state["config"]
    held_out = data.open_dataset(config["data"], config["size"], "val", config["seed"])
    labels = held_out.labels(range(200)).tolist()
    images = torch.stack([held_out[labels.index(c)][0] for c in range(COLUMNS)])
    mean, logvar = tokenizer.posterior(data.from_uint8(images))
    x_hat = data.to_uint8(tokenizer.decode(mean))
    sigma = torch.exp(0.5 * logvar).mean(1)
    return images.permute(0, 2, 3, 1), x_hat.permute(0, 2, 3, 1), sigma


def draw(folder: Path) -> None:
    """demo.png: inputs, reconstructions, sigma maps, and rows of samples."""
    images, x_hat, sigma = reconstructions(folder)
    archive = data.read_npz(folder / "samples/samples.npz", "arr_0", "arr_1")
    samples, labels = archive["arr_0"], archive["arr_1"]
    classes = checkpoints.read(folder / "dit/checkpoint.pt", "dit")["classes"]
    generated = 4
    figure, axes = plt.subplots(
        3 + generated, COLUMNS, figsize=(COLUMNS + 1.6, 4.2 + generated),
        gridspec_kw=dict(wspace=0.04, hspace=0.04))
    names = ["held-out images", "reconstructed", "sigma of the latent"]
    names += ["samples"] + [""] * (generated - 1)
    for c in range(COLUMNS):
        of_class = samples[labels == c][:generated]
        for row, picture in enumerate([images[c], x_hat[c], sigma[c], *of_class]):
            shown = axes[row, c].imshow(
                picture, interpolation="nearest", cmap="cividis",
                vmin=sigma.min() if row == 2 else None,
                vmax=sigma.max() if row == 2 else None)
            if row == 2:
                scale = shown
        axes[0, c].set_title(classes[c], fontsize=11)
    for ax in axes.flat:
        ax.set(xticks=[], yticks=[])
        ax.spines[:].set_visible(False)
    for ax, name in zip(axes[:, 0], names):
        ax.set_ylabel(name, rotation=0, ha="right", va="center", fontsize=11)
    bar = figure.colorbar(scale, ax=axes[:3].ravel().tolist(), fraction=0.015, pad=0.01)
    bar.ax.tick_params(labelsize=9)
    bar.set_label("sigma", fontsize=10)
    # The samples below leave the room of the bar free as well.
    figure.colorbar(scale, ax=axes[3:].ravel().tolist(), fraction=0.015,
                    pad=0.01).ax.set_visible(False)
    with runtime.atomic(folder / "demo.png") as file:
        figure.savefig(file, dpi=90, bbox_inches="tight")
    plt.close(figure)


def page(folder: Path) -> str:
    """Five numbers with a sentence each, and where the pictures are."""
    toy = runtime.read_json(folder / "toy2d/toy2d.json")["arms"]
    kl, ve = (toy[name]["invalid [%]"][0] for name in ("KL 1e-3", "VE 1e-2"))
    log = read_log(folder / "tokenizer")
    held_out = [line for line in log if "held_out" in line][-1]["held_out"]
    report = read_scores(folder / "evaluation/results.json")
    rebuilt = rows_of(report, "reconstruction")["metrics"]
    made = rows_of(report, "generation")["metrics"]
    return f"""
What this was about: tokenizers whose latents are wide enough to forgive the
errors of the generative model that is trained on them.

toy, samples that left the data         {kl:.1f} % with KL, {ve:.1f} % with VE
    Lower is better.  VE should stay well below KL.
tokenizer, images from their latents    {held_out["psnr_mean"]:.1f} dB
    Higher is better.  Above 25 dB the shapes are clean.
tokenizer, balance of Eq. 14            {held_out["balance"]:.2f}
    1 is the equilibrium: sigma is as wide as lambda1 and the decoder allow.
samples that the judge recognises       {100 * made["recognised"]:.0f} %
    It recognises {100 * made["recognised of real images"]:.0f} % of real images and \
{100 * rebuilt["recognised"]:.0f} % of reconstructed ones.
samples, distance from real images      {made["FD-Shapes"]:.1f}
    Lower is better.  As many real images have {made["FD-Shapes of real images"]:.1f}.

the toy                {folder}/toy2d/toy2d_figure1.png
images and samples     {folder}/demo.png
more samples           {folder}/samples/grid.png
noise on the latent    {folder}/evaluation/noise_curve.png
"""


@runtime.command
def main(argv: list[str] | None = None) -> None:
    p = runtime.Parser(__doc__)
    p.add_argument("folder", type=Path, help="what the demo's stages wrote")
    folder = p.parse(argv).folder
    if not folder.is_dir():
        raise InputError(f"{folder} is not a folder: `make demo` fills runs/demo")
    runtime.claim(runtime.start("cpu"), folder, folder / "demo.png")
    try:
        said = page(folder)
        draw(folder)
    except (AttributeError, IndexError, KeyError, StopIteration, TypeError, ValueError) as error:
        raise InputError(f"{folder} is not what `make demo` leaves ({error!r}): remove it, "
                         "and give `make demo` again") from None
    print(said)


if __name__ == "__main__":
    main()
