"""Pictures that are none, or that would stop, fill or take over the machine.

Each lies as bad.png among good ones.  A training names it and leaves it out, and
a score refuses it in one line, both promptly, and nothing is executed.
"""

import os
import struct
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image

from studies.faults.bench import (
    DIT, EVALUATE, PROMPTLY, TOKENIZER, Bench, Broken, Case, Run, Work, as_anybody,
    nobody_left, nothing_left, nothing_ran, watch_programs)


def cases(bench: Bench) -> list[Case]:
    found = [Case(f"{use}: {name}", with_picture(work, argv, refused, make))
             for use, (work, argv, refused) in USES.items() for name, make in BAD.items()]
    found += [Case(f"tokenizer: {name}", with_folder(TOKENIZER, "--data pictures", make))
              for name, make in FOLDERS.items()]
    found += [Case(f"samples to be scored: {name}", with_folder(
        EVALUATE, "--samples pictures --reference shapes", make))
        for name, make in FOLDERS.items()]
    return found


# How the folder is used, and whether a bad picture is refused.
USES: dict[str, tuple[Work, str, bool]] = {
    "tokenizer": (TOKENIZER, "--data pictures --size 32", False),
    "tokenizer with loaders": (TOKENIZER, "--data pictures --workers 1", False),
    "latents": (DIT, "--data pictures", False),
    "held-out images": (EVALUATE, "--data pictures --size 32", True),
    "samples to be scored": (EVALUATE, "--samples pictures --reference shapes", True),
    "reference": (EVALUATE, "--reference pictures", True),
}

# ------------------------------------------------------------------------------
# The pictures.


def chunk(name: bytes, content: bytes) -> bytes:
    return (struct.pack(">I", len(content)) + name + content
            + struct.pack(">I", zlib.crc32(name + content)))


def png(width: int, height: int, pixels: bytes | None = None, more: bytes = b"") -> bytes:
    """A black PNG of one bit a pixel, by hand, as no library would write it."""
    if pixels is None:
        packer = zlib.compressobj(1)
        row = bytes(1 + (width + 7) // 8)
        pixels = b"".join([*(packer.compress(row) for _ in range(height)), packer.flush()])
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0))
    return (b"\x89PNG\r\n\x1a\n" + header + more + chunk(b"IDAT", pixels) + chunk(b"IEND", b""))


def half(kind: str) -> Callable[[Path], object]:
    """A picture that ends in the middle."""
    def make(path: Path) -> None:
        noise = np.random.default_rng(0).integers(0, 256, (32, 32, 3), np.uint8)
        Image.fromarray(noise).save(path, format=kind)
        path.write_bytes(path.read_bytes()[:path.stat().st_size // 2])
    return make


def holds(content: bytes | str | Callable[[], bytes]) -> Callable[[Path], object]:
    def make(path: Path) -> None:
        found = content() if callable(content) else content
        path.write_bytes(found.encode() if isinstance(found, str) else found)
    return make


def without_permission(path: Path) -> None:
    path.write_bytes(png(32, 32))
    path.chmod(0)


POSTSCRIPT = """%!PS-Adobe-3.0 EPSF-3.0
%%BoundingBox: 0 0 32 32
%%EndComments
(executed) (w) file closefile
(%pipe%touch executed) (r) file closefile
showpage
%%EOF
"""
TEXTS = chunk(b"zTXt", b"Comment\0\0" + zlib.compress(bytes(300_000_000), 9))
BAD: dict[str, Callable[[Path], object]] = {
    "an EPS with a program": holds(POSTSCRIPT),
    "a PDF": holds("%PDF-1.4\n1 0 obj << /Type /Catalog >> endobj\n%%EOF\n"),
    "an SVG": holds("<svg xmlns='http://www.w3.org/2000/svg'><image href='/etc/passwd'/></svg>"),
    "a pipe": os.mkfifo,
    "a link to a device": lambda path: path.symlink_to("/dev/zero"),
    "a link to itself": lambda path: path.symlink_to(path.name),
    "a link to nothing": lambda path: path.symlink_to("nothing.png"),
    "an empty file": holds(b""),
    "text": holds("not a picture\n" * 99),
    "a PNG that ends early": half("PNG"),
    "a JPEG that ends early": half("JPEG"),
    "a WebP that ends early": half("WEBP"),
    "one pixel high": holds(lambda: png(2_000_000, 1)),
    "one pixel wide": holds(lambda: png(1, 2_000_000)),
    "144 megapixels": holds(lambda: png(12_000, 12_000)),
    "a decompression bomb": holds(lambda: png(30_000, 30_000)),
    "a bomb without its pixels": holds(lambda: png(60_000, 60_000, b"")),
    "2^31 - 1 pixels wide": holds(lambda: png(2**31 - 1, 2**31 - 1, b"")),
    "no pixels": holds(lambda: png(0, 0, b"")),
    "a PNG with other data": holds(lambda: png(32, 32, b"not compressed")),
    "without permission": without_permission,
}
# A comment of 300 MB is refused or left alone.  Either would do.
MAY_BE_READ = {"a comment of 300 MB": holds(lambda: png(32, 32, more=TEXTS))}


def good_pictures(folder: Path, count: int = 8) -> None:
    """Pictures of 32 pixels that all differ."""
    folder.mkdir(parents=True, exist_ok=True)
    noise = np.random.default_rng(1).integers(0, 256, (count, 32, 32, 3), np.uint8)
    for k, pixels in enumerate(noise):
        Image.fromarray(pixels).save(folder / f"{k}.png")


# ------------------------------------------------------------------------------
# What is promised.


def with_picture(work: Work, argv: str, refused: bool, make: Callable) -> Callable:
    def action(folder: Path) -> None:
        good_pictures(folder / "pictures")
        make(folder / "pictures/bad.png")
        run = try_it(work, argv, folder)
        if refused:
            run.refused("pictures", others="no val/")
            nothing_left(folder)
        else:
            run.went_well()
            if "bad.png" not in run.said:
                raise Broken(f"bad.png is not named: {run.tail()}")
            strange = [line for line in run.lines if "bad.png" not in line
                       and "no val/" not in line]
            if strange:
                raise Broken(f"other lines on stderr: {strange[:3]}")
    return action


def try_it(work: Work, argv: str, folder: Path) -> Run:
    """Run it, beside a Ghostscript that would leave a trace."""
    ghostscript = folder / "bin/gs"
    ghostscript.parent.mkdir()
    ghostscript.write_text("#!/bin/sh\ntouch executed\n")
    ghostscript.chmod(0o755)
    run = Run(folder, work.stage, f"{work.argv} {argv}",
              [*work.before, as_anybody, lambda: watch_programs(folder)],
              PATH=f"{ghostscript.parent}:{os.environ['PATH']}")
    run.wait(PROMPTLY)
    nobody_left(folder)
    nothing_ran(folder)
    return run


# Folders without any picture that could be read.
def only_bad(folder: Path) -> None:
    folder.mkdir()
    for k in range(12):
        (folder / f"{k}.png").write_text("not a picture")


def empty_classes(folder: Path) -> None:
    for name in ("cat", "dog"):
        (folder / name).mkdir(parents=True)


def no_training_images(folder: Path) -> None:
    good_pictures(folder / "val" / "cat")
    (folder / "train" / "cat").mkdir(parents=True)


FOLDERS: dict[str, Callable[[Path], object]] = {
    "no folder": lambda folder: None,
    "a folder that is a file": Path.touch,
    "a folder that is a pipe": os.mkfifo,
    "an empty folder": Path.mkdir,
    "a folder of empty folders": empty_classes,
    "a folder of bad pictures": only_bad,
    "a folder without training images": no_training_images,
}


def with_folder(work: Work, argv: str, make: Callable) -> Callable:
    def action(folder: Path) -> None:
        make(folder / "pictures")
        run = try_it(work, argv, folder)
        run.refused("pictures", others="no val/")
        nothing_left(folder)
        if (folder / "run").exists():
            raise Broken("the folder of the run is left behind")
    return action
