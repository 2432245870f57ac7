"""SIGKILL at any moment: the same command goes on, and ends with the same bits.

A run is killed at a moment that is drawn, exactly before one of its operations on
files, or in the middle of a file.  Then its command is given again.  What it leaves
at the end is compared with an undisturbed run: tensors of checkpoints, lines of the
log, images, arrays.
"""

import resource
import signal
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from studies.faults.bench import (
    DIT, EVALUATE, GAN, LIMIT, LOADERS, PROMPTLY, SAMPLE, TOKENIZER, TORCHRUN, TOY, Bench,
    Broken, Case, Run, Work, contents, dies_at, family, kill, nobody_left, nothing_left, ranks_of,
    same, shared, wait_for, watch_files)

# How often each work is killed at a moment that is drawn, and before how many of
# its operations on files, which are spread over all of them.  WITHIN: after which
# shares of its largest file, which is then half written.
ALONE = ((TOKENIZER, 28, 24), (GAN, 24, 12), (LOADERS, 12, 0), (DIT, 36, 48),
         (SAMPLE, 24, 24), (EVALUATE, 20, 16), (TOY, 8, 12))
WITHIN = 0.02, 0.3, 0.6, 0.95
TOGETHER = ((shared(TOKENIZER), 14), (shared(GAN), 6), (shared(DIT), 14), (shared(SAMPLE), 10))
FRESH = (TOKENIZER, 3), (DIT, 3), (SAMPLE, 2), (EVALUATE, 2), (TOY, 3)


def cases(bench: Bench) -> list[Case]:
    found = []
    for work, moments, operations in ALONE:
        draws = bench.draws("kills", work.name)
        for share in (draws.random() for _ in range(moments)):
            found.append(Case(f"{work.name}, killed after {share:.1%} of its time",
                              at_a_moment(bench, work, share)))
        for k in range(operations):
            found.append(Case(f"{work.name}, killed before a file operation, {k} of {operations}",
                              before_an_operation(bench, work, k / operations)))
        for share in WITHIN[1:2] if work is TOY else WITHIN:
            found.append(Case(f"{work.name}, killed after {share:.0%} of its largest file",
                              within_a_file(bench, work, share)))
    for work, moments in TOGETHER:
        draws = bench.draws("kills", work.name)
        for k in range(moments):
            share, who = draws.random(), ("rank 0", "rank 1", "both")[k % 3]
            found.append(Case(f"{work.name}, {who} killed after {share:.1%}",
                              at_a_moment(bench, work, share, k % 3)))
    for work, moments in FRESH:
        draws = bench.draws("kills", "fresh", work.name)
        for share in (draws.random() for _ in range(moments)):
            found.append(Case(f"{work.name}, a new interpreter, killed after {share:.1%}",
                              fresh(bench, work, share), slow=True))
    for work in (TOKENIZER, DIT):
        for victim in ("the agent", "rank 0", "rank 1"):
            found.append(Case(f"{work.name} under torchrun, {victim} killed",
                              under_torchrun(bench, work, victim), slow=True))
    return found


def at_a_moment(bench: Bench, work: Work, share: float, victim: int = 0) -> Callable:
    """Killed after this share of its time.  victim: a rank, or 2 for both."""
    def action(folder: Path) -> None:
        delay = share * bench.reference(work).seconds
        while not kill_after(work, folder, delay, victim):
            delay *= 0.8   # it had ended before
            bench.clear(folder, work)
        bench.unharmed(work, folder)
    return action


def kill_after(work: Work, folder: Path, delay: float, victim: int) -> bool:
    """Whether it was killed before it had ended.  Those that are left end too."""
    runs = work.begin(folder)
    if work.ranks > 1:   # before they have met, torchrun's agent would end the others
        wait_for(lambda: (folder / "run").exists(), runs[0])
        delay = max(0.0, delay - (time.monotonic() - runs[0].begin))
    time.sleep(delay)
    killed = [runs[victim]] if victim < len(runs) else runs
    kill(run.pid for run in killed if run.running)
    for run in runs:
        run.wait(LIMIT if run in killed else PROMPTLY)
        if run not in killed and run.status != 0:
            run.refused("another process of this run has ended")
    nobody_left(folder)
    return any(run.status == -signal.SIGKILL for run in killed)


def before_an_operation(bench: Bench, work: Work, share: float) -> Callable:
    """Killed before the operation on files at this share of them."""
    def action(folder: Path) -> None:
        number = 1 + int(share * bench.reference(work).operations)
        run, = work.begin(folder, [lambda: watch_files(folder, dies_at(number))])
        if run.wait().status != -signal.SIGKILL:
            raise Broken(f"was not killed before operation {number}: {run.tail()}")
        nobody_left(folder)
        bench.unharmed(work, folder)
    return action


def within_a_file(bench: Bench, work: Work, share: float) -> Callable:
    """The system kills a process that writes beyond a limit, which it had set itself."""
    def action(folder: Path) -> None:
        limit = max(16_384, int(share * max(bench.reference(work).sizes.values())))

        def begin() -> None:
            signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
            resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

        run, = work.begin(folder, [begin])
        if run.wait().status != -signal.SIGXFSZ:
            raise Broken(f"was not killed after {limit} bytes, but {run.status}: {run.tail()}")
        nobody_left(folder)
        bench.unharmed(work, folder)
    return action


def fresh(bench: Bench, work: Work, share: float) -> Callable:
    """As a user has it: a new interpreter.  The toy has a pool of two processes."""
    def begin(folder: Path) -> Run:
        return Run(folder, work.stage, work.argv, fresh="",
                   OMP_NUM_THREADS="2" if work is TOY else "1")

    def action(folder: Path) -> None:
        undisturbed = folder / "undisturbed"
        undisturbed.mkdir()
        (undisturbed / "stock").symlink_to(bench.common / "stock")
        seconds = begin(undisturbed).wait().went_well().seconds
        run = begin(folder)
        time.sleep(share * seconds)
        kill([run.pid])
        run.wait()
        nobody_left(folder)
        begin(folder).wait().went_well()
        same(contents(folder, *work.writes), contents(undisturbed, *work.writes))
        nothing_left(folder)
    return action


def under_torchrun(bench: Bench, work: Work, victim: str) -> Callable:
    """Without its agent, or without the other, no process goes on for long."""
    # A new interpreter has chunks of the usual size in its cache.
    work = replace(shared(work), name=f"{work.name} under torchrun",
                   argv=f"{work.argv} --steps 20", before=())

    def begin(folder: Path) -> Run:
        return Run(folder, work.stage, work.argv, fresh=TORCHRUN)

    def action(folder: Path) -> None:
        run = begin(folder)
        wait_for(lambda: (folder / "run/checkpoint.pt").exists(), run)
        ranks = ranks_of(family(folder))
        kill([run.pid if victim == "the agent" else ranks[int(victim[-1])]])
        run.wait(40)   # torchrun itself waits for 30
        nobody_left(folder)
        begin(folder).wait().went_well()
        bench.as_reference(work, folder)
    return action
