"""The last step of `make demo`: one page of numbers and one composed picture.

    python -m studies.demo runs

It reads what the stages left in the folder: a tokenizer with the VE loss, one with
KL in the folder kl, what was learned on each, and the toy.  It draws demo.png
there, and prints the numbers of both side by side.
"""

from pathlib import Path
from typing import Any

import runtime  # before torch, because it says how idle threads wait

import matplotlib
import numpy as np
import torch

import checkpoints
import data
from runtime import InputError
from studies.records import read_log, read_scores

matplotlib.use("Agg")
from matplotlib import pyplot as plt  # noqa: E402

COLUMNS = 10   # images in a row: one of each class
ROWS = 3       # of samples
FOLDERS = {"KL": "kl", "VE": "."}


@torch.no_grad()
def reconstructions(folder: Path) -> tuple[Any, Any, Any]:
    """Held-out images, one of each class; their reconstructions; their sigma.

    Images are uint8 [10, H, W, 3]; sigma is [10, h, w], in percent of the latent's
    spread, averaged over channels.
    """
    tokenizer, state = checkpoints.load_tokenizer(folder / "tokenizer/checkpoint.pt")
    config = state["config"]
    held_out = data.open_dataset(config["data"], config["size"], "val", config["seed"])
    labels = held_out.labels(np.arange(200)).tolist()
    images = torch.stack([held_out[labels.index(c)][0] for c in range(COLUMNS)])
    mean, logvar = tokenizer.posterior(data.from_uint8(images))
    x_hat = data.to_uint8(tokenizer.decode(mean))
    sigma = 100 * torch.exp(0.5 * logvar) / state["latent_std"][:, None, None]
    return images.permute(0, 2, 3, 1), x_hat.permute(0, 2, 3, 1), sigma.mean(1)


def samples(folder: Path) -> list[Any]:
    """Rows of samples, one of each class in a row."""
    with np.load(folder / "samples/samples.npz") as archive:
        images, labels = archive["arr_0"], archive["arr_1"]
    return [[images[labels == c][row] for c in range(COLUMNS)] for row in range(ROWS)]


def draw(folder: Path) -> None:
    """demo.png: inputs, and for KL and VE reconstructions, sigma maps and samples."""
    classes = checkpoints.read(folder / "dit/checkpoint.pt", "dit")["classes"]
    parts = {name: reconstructions(folder / place) for name, place in FOLDERS.items()}
    rows = [("held-out images", parts["VE"][0])]
    rows += [(f"{name}: reconstructed", part[1]) for name, part in parts.items()]
    rows += [(f"{name}: sigma", part[2]) for name, part in parts.items()]
    for name, place in FOLDERS.items():
        names = [f"{name}: samples"] + [""] * (ROWS - 1)
        rows += zip(names, samples(folder / place))
    figure, axes = plt.subplots(len(rows), COLUMNS, figsize=(COLUMNS + 2.4, len(rows) + 0.6),
                                gridspec_kw=dict(wspace=0.04, hspace=0.04))
    scale = matplotlib.colors.LogNorm(0.1, 100)
    for line, (name, pictures) in zip(axes, rows):
        for ax, picture in zip(line, pictures):
            shown = ax.imshow(picture, interpolation="nearest", cmap="cividis",
                              norm=scale if np.ndim(picture) == 2 else None)
            if np.ndim(picture) == 2:
                coloured = shown
            ax.set(xticks=[], yticks=[])
            ax.spines[:].set_visible(False)
        line[0].set_ylabel(name, rotation=0, ha="right", va="center", fontsize=11)
    for ax, name in zip(axes[0], classes):
        ax.set_title(name, fontsize=11)
    bar = figure.colorbar(coloured, ax=axes.ravel().tolist(), fraction=0.02, pad=0.01,
                          aspect=50)
    bar.set_label("sigma, in percent of the latent's spread", fontsize=10)
    runtime.save_figure(figure, folder / "demo.png", dpi=90, bbox_inches="tight")


def numbers(folder: Path) -> dict[str, float]:
    """What the logs and the scores say of one tokenizer and its samples."""
    log = read_log(folder / "tokenizer")
    held_out = [line for line in log if "held_out" in line][-1]["held_out"]
    made = read_scores(folder / "evaluation/results.json")[-1]["metrics"]
    return {
        "dB": held_out["psnr_mean"], "balance": held_out.get("balance", float("nan")),
        "sigma": 100 * held_out["relative_noise"],
        "recognised": 100 * made["recognised"], "FD": made["FD-Shapes"],
        "real": 100 * made["recognised of real images"],
        "floor": made["FD-Shapes of real images"]}


def page(folder: Path) -> str:
    """The numbers with a sentence each, and where the pictures are."""
    toy = runtime.read_json(folder / "toy2d/toy2d.json")["arms"]
    toy_kl, toy_ve = (toy[name]["invalid [%]"][0] for name in ("KL 1e-3", "VE 1e-2"))
    kl, ve = (numbers(folder / place) for place in FOLDERS.values())
    return f"""
What this was about: tokenizers whose latents are wide enough to forgive the
errors of the generative model that is trained on them.

                                              KL        VE
the toy: samples that left the data   {toy_kl:8.1f} % {toy_ve:7.1f} %
    Lower is better.  VE should stay well below KL.
shapes: sigma over the spread of z    {kl["sigma"]:8.2f} % {ve["sigma"]:7.2f} %
    KL lets the noise of the latent vanish, and VE holds it up.
shapes: images from their latents     {kl["dB"]:8.1f} dB {ve["dB"]:6.1f} dB
    Higher is better.  Above 25 dB the shapes are clean.
shapes: balance of Eq. 14             {"-":>8}   {ve["balance"]:7.2f}
    1 is the equilibrium: sigma is as wide as lambda1 and the decoder allow.
shapes: samples that are recognised   {kl["recognised"]:8.0f} % {ve["recognised"]:7.0f} %
    By a judge that recognises {ve["real"]:.0f} % of real images.
shapes: distance of the samples       {kl["FD"]:8.1f}   {ve["FD"]:7.1f}
    Lower is better.  As many real images have {ve["floor"]:.1f}.

the toy                {folder}/toy2d/toy2d_figure1.png
images and samples     {folder}/demo.png
more samples           {folder}/samples/grid.png, {folder}/kl/samples/grid.png
noise on the latent    {folder}/noise/noise_curve.png
properties of VE's     {folder}/diffusability.txt
"""


@runtime.command
def main(argv: list[str] | None = None) -> None:
    p = runtime.Parser(__doc__)
    p.add_argument("folder", type=Path, help="what the demo's stages wrote")
    folder = p.parse(argv).folder
    if not folder.is_dir():
        raise InputError(f"{folder} is not a folder: `make demo` fills runs")
    runtime.claim(runtime.start("cpu"), folder, folder / "demo.png")
    try:
        said = page(folder)
        draw(folder)
    except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
        raise InputError(f"{folder} is not what `make demo` leaves ({error!r}): remove it, "
                         "and give `make demo` again") from None
    print(said)


if __name__ == "__main__":
    main()
