"""The part of CIFAR-10 on which the experiments ran, made from the public files.

    python -m studies.cifar_subset --out cifar10_subset

It has the first 2,000 training images and the first 400 test images of each class,
in the order of these files, as JPEG of Pillow's quality 75:
train/CLASS/0000.jpg and val/CLASS/0000.jpg.
"""

import os
import tempfile
from pathlib import Path

import runtime  # before torch, because it says how idle threads wait

import numpy as np

import data
from runtime import InputError

COUNTS = {"train": 2000, "val": 400}  # images of each class


def write(images: data.Pictures, count: int, folder: Path) -> None:
    for label, name in enumerate(images.classes):
        (folder / name).mkdir(parents=True)
        for number, index in enumerate(np.flatnonzero(images.targets == label)[:count]):
            image = images.open_image(index)
            image.save(folder / name / f"{number:04d}.jpg", quality=75)


@runtime.command
def main(argv: list[str] | None = None) -> None:
    p = runtime.Parser(__doc__)
    p.add_argument("--cifar", default="runs/data",
                   help="where torchvision finds CIFAR-10, or downloads it to")
    p.add_argument("--out", type=Path, default=Path("cifar10_subset"), help="a new folder")
    args = p.parse(argv)
    if args.out.exists():
        raise InputError(f"{args.out} is there already: remove it, or choose another --out")
    args.out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=args.out.parent, prefix=".cifar-") as folder:
        for split, count in COUNTS.items():
            images = data.open_dataset("cifar10", 32, split, root=args.cifar)
            write(images, count, Path(folder) / "all" / split)
        os.rename(Path(folder) / "all", args.out)
    print(f"wrote {args.out}")


if __name__ == "__main__":
    main()
