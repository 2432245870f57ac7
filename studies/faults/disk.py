"""A disk that refuses: full, without permission, broken, or with a file in the way.

One line with the path and what to do, and exit status 2.  The last checkpoint is
whole and no temporary file is left.  When the disk is mended the same command
ends with the bits of an undisturbed run.

A disk is full in three ways: Python's operations on files fail from one of them
on, no file may be larger than a limit, or the folder is a small disk in memory
(Linux, as root).
"""

import errno
import os
import re
import resource
import subprocess
from collections.abc import Callable
from pathlib import Path

from studies.faults.bench import (
    DIT, EVALUATE, GAN, PLOT, PROMPTLY, SAMPLE, TOKENIZER, TOY, UNFINISHED, Bench, Broken, Case,
    Run, Skipped, Work, as_anybody, contents, nobody_left, nothing_left, same, watch_files)

STAGES = TOKENIZER, DIT, SAMPLE, EVALUATE, TOY
# Before how many operations on files each work finds the disk full, or broken
# once; and at how many sizes of a disk, and of its files.
PLACES = {TOKENIZER: (16, 12), DIT: (24, 16), SAMPLE: (16, 12), EVALUATE: (10, 8), TOY: (6, 4)}
SHARES = 0.0, 0.02, 0.1, 0.3, 0.5, 0.7, 0.85, 0.95


def cases(bench: Bench) -> list[Case]:
    found = []
    for work, (full, broken) in PLACES.items():
        for k in range(full):
            found.append(Case(f"{work.name}, the disk is full from operation {k} of {full} on",
                              fails_at(bench, work, k / full, errno.ENOSPC)))
        for k in range(broken):
            found.append(Case(f"{work.name}, the disk fails in operation {k} of {broken}",
                              fails_at(bench, work, k / broken, errno.EIO)))
    for work in (TOKENIZER, GAN, DIT, SAMPLE, EVALUATE, TOY, PLOT):
        for share in SHARES[::2] if work in (TOY, PLOT) else SHARES:
            found.append(Case(f"{work.name}, no file beyond {share:.0%} of the largest",
                              small_files(bench, work, share)))
            for name in work.writes:
                found.append(Case(f"{work.name}, {name} is a disk of {share:.0%} of the need",
                                  small_disk(bench, work, name, share)))
    for work in (*STAGES, PLOT):
        for name in work.writes:
            for title, prepare in WAYS.items():
                found.append(Case(f"{work.name}, {name} {title}",
                                  refuses(work, name, prepare)))
    for work, path, argv in IN_THE_WAY:
        for title, prepare in (("a folder", Path.mkdir), ("a file", Path.touch)):
            if (path[-1] == "/") == (title == "a file"):
                found.append(Case(f"{work.name}, {path} is {title}",
                                  in_the_way(work, path.rstrip("/"), argv, prepare)))
    return found


# ------------------------------------------------------------------------------
# What is promised.


def refused(bench: Bench, work: Work, folder: Path, runs: list[Run]) -> None:
    """One line, unless it did not need what was refused; and what is there is whole."""
    run, = runs
    run.wait()
    nobody_left(folder)
    if run.status == 0:
        run.went_well()
        same(contents(folder, *work.writes), bench.reference(work).contents)
        return
    line = run.refused()
    if not any(re.search(rf"\b{name}\b", line) for name in work.writes):
        raise Broken(f"the line does not say which file: {line}")
    nothing_left(folder, UNFINISHED)
    for path in folder.rglob("*"):
        if path.suffix in (".pt", ".json", ".npz") and not path.is_symlink():
            contents(folder, str(path.relative_to(folder)))   # raises if it is damaged


# ------------------------------------------------------------------------------
# Full, in three ways, and broken.


def fails_at(bench: Bench, work: Work, share: float, code: int) -> Callable:
    """Full: nothing is opened or made from then on.  Broken: one operation fails."""
    def action(folder: Path) -> None:
        number, done = 1 + int(share * bench.reference(work).operations), 0

        def fail(event: str, path: str) -> None:
            nonlocal done
            done += 1
            needs_space = event in ("open", "os.mkdir")
            removes = event in ("os.remove", "os.rmdir")
            if done >= number and needs_space if code == errno.ENOSPC else (
                    done == number and not removes):
                raise OSError(code, os.strerror(code), path)

        refused(bench, work, folder, work.begin(folder, [lambda: watch_files(folder, fail)]))
        bench.unharmed(work, folder)
    return action


def small_files(bench: Bench, work: Work, share: float) -> Callable:
    """A limit of the system, with which a write ends as on a full disk."""
    def action(folder: Path) -> None:
        largest = max(bench.reference(work).sizes.values())
        limit = max(16_384, int(share * largest))   # the bar on stderr is a file as well
        refused(bench, work, folder, work.begin(folder, [
            lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))]))
        bench.unharmed(work, folder)
    return action


def small_disk(bench: Bench, work: Work, name: str, share: float) -> Callable:
    def action(folder: Path) -> None:
        sizes = [size for path, size in bench.reference(work).sizes.items()
                 if path.startswith(f"{name}/")]
        mount(folder / name, f"size={max(4096, int(share * sum(sizes)))}")
        refused(bench, work, folder, work.begin(folder))
        mount(folder / name, "remount,size=1g")
        bench.unharmed(work, folder)
    return action


def mount(path: Path, options: str) -> None:
    path.mkdir(exist_ok=True)
    command = ["mount", "-t", "tmpfs", "-o", options, "faults", str(path)]
    try:
        subprocess.run(command, check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        raise Skipped("small disks: only root on Linux can mount them") from None


def unmount(folder: Path) -> None:
    """All that was mounted below a folder."""
    mounts = Path("/proc/mounts")
    for line in mounts.read_text().splitlines() if mounts.exists() else ():
        path = line.split()[1]
        if path.startswith(f"{folder}/"):
            subprocess.run(["umount", "-l", path], check=True)


# ------------------------------------------------------------------------------
# Folders that cannot be written to.


def closed(path: Path) -> None:
    path.mkdir()
    path.chmod(0o555)


def below_closed(path: Path) -> None:
    if path.name != "run":   # which could not be made either, and comes first
        path.with_name("run").mkdir(mode=0o777)
        path.with_name("run").chmod(0o777)
    path.parent.chmod(0o555)


def read_only(path: Path) -> None:
    mount(path, "ro")


WAYS = {"has no permission": closed, "cannot be made": below_closed,
        "is read-only": read_only, "is a file": Path.touch}


def refuses(work: Work, name: str, prepare: Callable[[Path], object]) -> Callable:
    """Refused before the work begins, and as it was before."""
    def action(folder: Path) -> None:
        prepare(folder / name)
        before = sorted(folder.rglob("*"))
        run, = work.begin(folder, [as_anybody])
        run.wait(PROMPTLY).refused(name)
        folder.chmod(0o755)
        if more := sorted({*folder.rglob("*")} - {*before}):
            raise Broken(f"left behind: {[str(path.relative_to(folder)) for path in more]}")
    return action


# What is in the way is a folder where a file is written, or (with a slash) a file
# where a folder is.
IN_THE_WAY = (
    (TOKENIZER, "run/checkpoint.pt", ""), (TOKENIZER, "run/log.jsonl", ""),
    (TOKENIZER, "run/images/", ""),
    (DIT, "run/checkpoint.pt", ""), (DIT, "run/log.jsonl", ""), (DIT, "run/images/", ""),
    (SAMPLE, "run/samples.npz", ""), (SAMPLE, "run/samples.json", ""),
    (SAMPLE, "run/grid.png", ""),
    (EVALUATE, "run/results.json", ""), (EVALUATE, "run/noise_curve.png", ""),
    (EVALUATE, "run/cache/", ""),
    (EVALUATE, "reference.npz", "--write-reference reference.npz --data shapes --limit 16"),
    (EVALUATE, "no/", "--write-reference no/reference.npz --data shapes --limit 16"),
    (TOY, "run/toy2d.json", ""), (TOY, "run/toy2d_figure1.png", ""), (TOY, "run/arms/", ""),
    (TOY, "numbers.json", "--json numbers.json"), (TOY, "no/", "--json no/numbers.json"))


def in_the_way(work: Work, path: str, argv: str, prepare: Callable[[Path], object]) -> Callable:
    def action(folder: Path) -> None:
        (folder / path).parent.mkdir(exist_ok=True)
        prepare(folder / path)
        run = Run(folder, work.stage, f"{work.argv} {argv}", work.before).wait()
        run.refused(Path(path).name)
        nothing_left(folder, UNFINISHED)
        if argv and (done := [*folder.glob("run/*")]):
            raise Broken(f"it has worked in vain: {done}")
    return action
