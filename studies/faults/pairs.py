"""Two runs in one folder at once: the second says who holds it, and ends.

The first is stopped in the middle by SIGSTOP, so that it is there for sure when
the second comes.  Or both begin at the same moment, and one of them is first.
What the first leaves is what it leaves alone.  Readers may share a cache.
"""

import multiprocessing
import os
import signal
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from studies.faults.bench import (
    DIT, EVALUATE, PROMPTLY, SAMPLE, SMOKE, TOKENIZER, TOY, Bench, Broken, Case, Run, Work,
    contents, nobody_left, nothing_left, same, wait_for, watch_files)

OTHER_SEED = "--seed 7"
# The second's flags beside those of the first, and what both write.
PAIRS: dict[str, tuple[Work, str]] = {
    "two identical tokenizers": (TOKENIZER, ""),
    "two tokenizers of two seeds": (TOKENIZER, OTHER_SEED),
    "a tokenizer, and one with GAN": (TOKENIZER, "--disc-weight 0.5"),
    "two transformers in one folder": (DIT, ""),
    "two transformers of two seeds": (DIT, OTHER_SEED),
    "two samplings": (SAMPLE, ""),
    "two samplings of two seeds": (SAMPLE, OTHER_SEED),
    "two evaluations": (EVALUATE, ""),
    "two toys": (TOY, ""),
}


def cases(bench: Bench) -> list[Case]:
    found = []
    for name, (work, argv) in PAIRS.items():
        for share in (0.2, 0.6, 0.9):
            found.append(Case(f"{name}, the second after {share:.0%} of the files",
                              one_waits(bench, work, argv, share)))
        for attempt in range(1 if work is TOY else 4):
            found.append(Case(f"{name}, at the same moment, {attempt}",
                              race(bench, work, argv, 0.005 * attempt)))
    for attempt in range(3):
        found.append(Case(f"two transformers build one cache, {attempt}",
                          one_cache(bench, building=True, share=0.1 + 0.1 * attempt)))
        found.append(Case(f"two transformers read one cache, {attempt}",
                          one_cache(bench, building=False, share=0.7 + 0.1 * attempt)))
    return found + [
        Case("caches of two tokenizers lie side by side", two_tokenizers(bench)),
        Case("a cache in use is not deleted", five_tokenizers(bench)),
        Case("a stage reads the folder of a training that goes on", reader(bench)),
        Case("a run whose holder was killed is free", after_a_kill(bench))]


# ------------------------------------------------------------------------------


def stops_at(number: int, reached: Any) -> Callable[[str, str], None]:
    """Wait before operation `number` on files until somebody says SIGCONT."""
    done = 0

    def action(event: str, path: str) -> None:
        nonlocal done
        done += 1
        if done == number:
            reached.value = 1
            os.kill(os.getpid(), signal.SIGSTOP)
    return action


def begin_and_hold(bench: Bench, work: Work, folder: Path, share: float) -> Run:
    """Begin some work, and hold it before one of its operations on files."""
    reached = multiprocessing.Value("i")
    number = 2 + int(share * bench.reference(work).operations)   # after it has its lock
    run, = work.begin(folder, [lambda: watch_files(folder, stops_at(number, reached))])
    wait_for(lambda: reached.value, run)
    return run


def second(work: Work, argv: str, folder: Path) -> Run:
    return Run(folder, work.stage, f"{work.argv} {argv}", work.before)


def told_who(run: Run, holder: Run) -> None:
    """Ends promptly, with the number of the process that is first."""
    if run.wait().seconds > PROMPTLY:
        raise Broken(f"it took {run.seconds:.0f} s to say so")
    run.refused("in use by", str(holder.pid))


def undisturbed(bench: Bench, work: Work, folder: Path, run: Run) -> None:
    """The first ends, with what it would have left alone."""
    run.wait().went_well()
    nobody_left(folder)
    same(contents(folder, *work.writes), bench.reference(work).contents, "the first")
    nothing_left(folder)


def one_waits(bench: Bench, work: Work, argv: str, share: float) -> Callable:
    def action(folder: Path) -> None:
        first = begin_and_hold(bench, work, folder, share)
        try:
            told_who(second(work, argv, folder), first)
        finally:
            os.kill(first.pid, signal.SIGCONT)
        undisturbed(bench, work, folder, first)
    return action


def race(bench: Bench, work: Work, argv: str, delay: float) -> Callable:
    """One of them is first, whichever it is."""
    def action(folder: Path) -> None:
        bench.reference(work)
        a = second(work, "", folder)
        time.sleep(delay)
        b = second(work, argv, folder)
        while a.running and b.running:
            time.sleep(0.005)
        for run in sorted((a, b), key=lambda run: run.running):
            run.wait()
        if a.status == b.status == 0 and not argv:   # the second came after its end
            return undisturbed(bench, work, folder, a)
        winner, loser = (a, b) if a.status == 0 else (b, a)
        told_who(loser, winner)
        winner.went_well()
        if winner is a or not argv:
            undisturbed(bench, work, folder, winner)
    return action


# ------------------------------------------------------------------------------
# Caches of latents.


def transformer(out: str, more: str = "") -> Work:
    """A transformer with a folder of its own, on the common cache."""
    return replace(DIT, argv=DIT.argv.replace("--out run", f"--out {out} {more}"),
                   writes=(out, "cache"))


def one_cache(bench: Bench, building: bool, share: float) -> Callable:
    """While it is built it belongs to one.  When it is complete, all may read it."""
    def action(folder: Path) -> None:
        first = begin_and_hold(bench, DIT, folder, share)
        try:
            other = second(transformer("other"), "", folder)
            if building:
                told_who(other, first)
            else:
                other.wait().went_well()
        finally:
            os.kill(first.pid, signal.SIGCONT)
        undisturbed(bench, DIT, folder, first)
        second(transformer("other"), "", folder).wait().went_well()
        bench.clear(folder, replace(DIT, writes=("other",)))
        same(contents(folder, *DIT.writes), bench.reference(DIT).contents, "the first")
    return action


def tokenizers(folder: Path, count: int) -> list[str]:
    """Flags of transformers on so many tokenizers."""
    for seed in range(1, count):
        Run(folder, TOKENIZER.stage, f"{SMOKE} --steps 1 --out t{seed} --seed {seed}"
            ).wait().went_well()
    return ["", *(f"--tokenizer t{seed}/checkpoint.pt" for seed in range(1, count))]


def two_tokenizers(bench: Bench) -> Callable:
    """The second finds no fault, and the first still has its cache."""
    def action(folder: Path) -> None:
        _, flags = tokenizers(folder, 2)
        first = begin_and_hold(bench, DIT, folder, 0.7)
        try:
            second(transformer("other"), flags, folder).wait().went_well()
        finally:
            os.kill(first.pid, signal.SIGCONT)
        first.wait().went_well()
        kept = contents(folder, *DIT.writes)
        for name, value in bench.reference(DIT).contents.items():
            if kept.get(name) != value:
                raise Broken(f"the first has another {name}, or none")
        before = contents(folder, "cache")
        second(transformer("third"), flags, folder).wait().went_well()
        same(contents(folder, "cache"), before, "the cache of both")
    return action


def five_tokenizers(bench: Bench) -> Callable:
    """Only some caches are kept, but never at the cost of one that trains on it."""
    def action(folder: Path) -> None:
        flags = tokenizers(folder, 6)
        first = begin_and_hold(bench, DIT, folder, 0.8)
        try:
            for number, flag in enumerate(flags[1:]):
                second(transformer(f"run{number}"), flag, folder).wait().went_well()
        finally:
            os.kill(first.pid, signal.SIGCONT)
        first.wait().went_well()
        kept = contents(folder, *DIT.writes)
        for name, value in bench.reference(DIT).contents.items():
            if kept.get(name) != value:
                raise Broken(f"the first has another {name}, or none")
        if (count := len([*folder.glob("cache/*/")])) > 5:
            raise Broken(f"{count} caches are kept")
    return action


# ------------------------------------------------------------------------------


def reader(bench: Bench) -> Callable:
    """Samples are drawn with a transformer that still trains."""
    def action(folder: Path) -> None:
        first = begin_and_hold(bench, DIT, folder, 0.95)
        try:
            second(SAMPLE, "--dit run/checkpoint.pt --out samples", folder).wait().went_well()
        finally:
            os.kill(first.pid, signal.SIGCONT)
        undisturbed(bench, DIT, folder, first)
    return action


def after_a_kill(bench: Bench) -> Callable:
    """The lock goes with the process, although its file stays."""
    def action(folder: Path) -> None:
        first = begin_and_hold(bench, TOKENIZER, folder, 0.6)
        os.kill(first.pid, signal.SIGKILL)
        first.wait()
        bench.unharmed(TOKENIZER, folder)
    return action
