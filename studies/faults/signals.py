"""SIGINT and SIGTERM: one line, exit status 130 or 143, nobody left, no step lost.

A signal comes to the parent alone, to all processes of its group (as a terminal
sends it), and more than once.  A training finishes its step and saves it.  Then
the command is given again, and ends with the bits of an undisturbed run.
"""

import multiprocessing
import os
import signal
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import runtime  # before torch

import torch

import checkpoints
from studies.faults.bench import (
    DIT, EVALUATE, GAN, LOADERS, PROMPTLY, SAMPLE, TOKENIZER, TORCHRUN, TOY, Bench, Broken, Case,
    Run, Work, contents, family, kill, nobody_left, nothing_left, shared, wait_for)

# Trainings that save nothing before their end, unless they are stopped.
STEPS = 6
LONG = [replace(work, argv=f"{work.argv} --steps {STEPS} --save-every {STEPS}")
        for work in (TOKENIZER, GAN, LOADERS, DIT)]
TOGETHER = [shared(LONG[0]), shared(LONG[3])]
OTHERS = SAMPLE, EVALUATE, TOY
KINDS = {"SIGINT": signal.SIGINT, "SIGTERM": signal.SIGTERM}
WAYS = "to the parent", "to the group", "to the group and again"


def cases(bench: Bench) -> list[Case]:
    found = []
    for name, number in KINDS.items():
        for way in WAYS:
            draws = bench.draws("signals", name, way)
            for work in LONG:
                step = draws.randrange(STEPS - 1)
                found.append(Case(f"{work.name}, {name} {way} in step {step}",
                                  in_training(bench, work, number, way, step)))
            for work in (*LONG, *OTHERS):
                share = draws.random()
                found.append(Case(f"{work.name}, {name} {way}, after {share:.0%} of its time",
                                  at_a_moment(bench, work, number, way, share)))
        for work in TOGETHER:
            found.append(Case(f"{work.name}, {name} to rank 0 alone in step 2",
                              in_training(bench, work, number, "to the parent", 2)))
            found.append(Case(f"{work.name}, {name} while they agree whether to stop",
                              while_agreeing(bench, work, number)))
        for work in LONG:
            found.append(Case(f"{work.name}, {name} twice while it saves",
                              twice(bench, work, number)))
        for work in (*LONG[:1], *LONG[3:], *OTHERS):
            found.append(Case(f"{work.name}, {name} to a new interpreter",
                              fresh(bench, work, number), slow=True))
        found.append(Case(f"toy, {name} to a pool of two processes",
                          pool(bench, number), slow=True))
        for work in (LONG[0], LONG[3]):
            for way in ("to the agent", "to the group"):
                found.append(Case(f"{work.name} under torchrun, {name} {way}",
                                  under_torchrun(bench, work, number, way), slow=True))
    for work in (LONG[0], LONG[3]):
        found.append(Case(f"{work.name} under torchrun, its agent is killed",
                          without_agent(bench, work), slow=True))
    return found


# ------------------------------------------------------------------------------
# What is promised.


def send(run: Run, number: int, way: str) -> None:
    """The signal, in one of the ways in which it comes."""
    whom = os.kill if way == "to the parent" else os.killpg
    whom(run.pid, number)
    if way.endswith("again"):   # within the second in which it counts once
        time.sleep(0.2)
        if run.running:
            whom(run.pid, number)


def stopped(run: Run, number: int, sent: float, before_begin: bool = False) -> str:
    """It has ended promptly, with its status and its line."""
    run.wait()
    if (seconds := time.monotonic() - sent) > PROMPTLY:
        raise Broken(f"went on for {seconds:.0f} s")
    nobody_left(run.folder)
    if before_begin and run.status == -number and not run.said:
        return ""   # before main had begun
    return run.refused("the same command goes on", status=(128 + number,))


def steps_of(folder: Path) -> list[int]:
    """The steps that the log tells of."""
    path = folder / "run/log.jsonl"
    lines = contents(folder, "run/log.jsonl").get("run/log.jsonl", []) if path.exists() else []
    return [line["step"] for line in lines if "lr" in line]


def no_step_lost(line: str, folder: Path) -> None:
    """The checkpoint has the step at which it stopped, and the log ends there."""
    if " at step " not in line:
        raise Broken(f"the line names no step: {line}")
    step = int(line.split(" at step ")[1].split(";")[0])
    saved = torch.load(folder / "run/checkpoint.pt", weights_only=True)["step"]
    if not saved == step == steps_of(folder)[-1]:
        raise Broken(f"{line}, but the checkpoint has step {saved} and the log ends at "
                     f"{steps_of(folder)[-1]}")


# ------------------------------------------------------------------------------
# When and how it comes.


def waits_in(step: int, reached: Any) -> None:
    """In this step say so, and wait for the signal."""
    rate = runtime.learning_rate

    def learning_rate(now: int, *rest: Any) -> float:
        if now == step:
            reached.value, end = 1, time.monotonic() + 20
            while not runtime.signals.received and time.monotonic() < end:
                time.sleep(0.01)
        return rate(now, *rest)

    runtime.learning_rate = learning_rate


def slow_end() -> None:
    """The end takes a moment, so that a repeated signal falls into it."""
    finish = runtime.finish

    def slowly() -> None:
        time.sleep(0.5)
        finish()

    runtime.finish = slowly


def in_training(bench: Bench, work: Work, number: int, way: str, step: int) -> Callable:
    """While it trains: the step is finished and saved."""
    def action(folder: Path) -> None:
        reached = multiprocessing.Value("i")
        again = [slow_end] if way.endswith("again") else []
        runs = work.begin(folder, [*again, lambda: waits_in(step, reached)])
        wait_for(lambda: reached.value, runs[0])
        sent = time.monotonic()
        send(runs[0], number, way)
        for run in runs:
            line = stopped(run, number, sent)
            if f" at step {step + 1};" not in line:
                raise Broken(f"in step {step} (of 0 to {STEPS - 1}): {line}")
            no_step_lost(line, folder)
        bench.as_undisturbed(work, folder)
    return action


def signals_itself(number: int) -> None:
    """The signal comes in the third reduction of what each process has received."""
    reduce, count = torch.distributed.all_reduce, 0

    def all_reduce(tensor: torch.Tensor, *rest: Any, **more: Any) -> Any:
        nonlocal count
        if tensor.ndim == 0 and not tensor.is_floating_point():
            count += 1
            if count == 3:
                os.kill(os.getpid(), number)
        return reduce(tensor, *rest, **more)

    torch.distributed.all_reduce = all_reduce


def while_agreeing(bench: Bench, work: Work, number: int) -> Callable:
    """It comes too late for this step, and counts in the next one."""
    def action(folder: Path) -> None:
        runs = work.begin(folder, [lambda: signals_itself(number)])
        for run in runs:
            no_step_lost(stopped(run, number, time.monotonic()), folder)
        bench.as_undisturbed(work, folder)
    return action


def at_a_moment(bench: Bench, work: Work, number: int, way: str, share: float) -> Callable:
    """At any moment: while it reads, encodes, trains, draws, writes."""
    def action(folder: Path) -> None:
        delay = share * bench.reference(work).seconds
        while True:   # until it is stopped before it has ended
            run, = work.begin(folder)
            time.sleep(max(0.0, run.begin + delay - time.monotonic()))
            sent = time.monotonic()
            if run.running:
                send(run, number, way)
            if run.wait().status != 0:
                break
            nobody_left(folder)   # it had ended, and what it did is whole
            bench.as_undisturbed(work, folder)
            bench.clear(folder, work)
            delay *= 0.8
        line = stopped(run, number, sent, before_begin=True)
        if " at step " in line:
            no_step_lost(line, folder)
        bench.as_undisturbed(work, folder)
    return action


def slow_disk() -> None:
    """A checkpoint takes half a minute to be written."""
    checkpoints.save = lambda *_: time.sleep(30)


def twice(bench: Bench, work: Work, number: int) -> Callable:
    """The first would wait for a slow disk.  The second does not."""
    def action(folder: Path) -> None:
        reached = multiprocessing.Value("i")
        run, = work.begin(folder, [slow_disk, lambda: waits_in(2, reached)])
        wait_for(lambda: reached.value, run)
        os.killpg(run.pid, number)
        time.sleep(1.3)
        sent = time.monotonic()
        if run.running:
            os.killpg(run.pid, number)
        run.wait(PROMPTLY)
        if run.status != 128 + number or "Traceback" in run.said or len(run.lines) > 1:
            raise Broken(f"ended with status {run.status}: {run.tail()}")
        if time.monotonic() - sent > 2:
            raise Broken(f"ended {time.monotonic() - sent:.1f} s after the second signal")
        nobody_left(folder)
        bench.as_undisturbed(work, folder)
    return action


def begin_fresh(folder: Path, work: Work, how: str = "", threads: int = 1) -> Run:
    return Run(folder, work.stage, work.argv, fresh=how,
               OMP_NUM_THREADS=str(threads))


def fresh(bench: Bench, work: Work, number: int) -> Callable:
    """First while it imports, which ends in silence, and then at its work."""
    def action(folder: Path) -> None:
        early = begin_fresh(folder, work)
        time.sleep(bench.draws(work.name, number).uniform(0.3, 2))
        os.killpg(early.pid, number)
        if early.wait().status not in (-number, 128 + number) or len(early.lines) > 1:
            raise Broken(f"while importing: ended with status {early.status}: {early.tail()}")
        run = begin_fresh(folder, work)
        wait_for(lambda: (folder / "run").exists(), run)
        time.sleep(0.1)
        sent = time.monotonic()
        os.killpg(run.pid, number)
        line = stopped(run, number, sent)
        if " at step " in line:
            no_step_lost(line, folder)
        begin_fresh(folder, work).wait().went_well()
        nothing_left(folder)
    return action


def pool(bench: Bench, number: int) -> Callable:
    """The toy's arms train in processes of their own, which end with it."""
    def action(folder: Path) -> None:
        run = begin_fresh(folder, TOY, threads=2)
        wait_for(lambda: len(family(folder)) > 2, run)
        time.sleep(3)
        sent = time.monotonic()
        os.kill(run.pid, number)
        stopped(run, number, sent)
        begin_fresh(folder, TOY, threads=2).wait().went_well()
        nothing_left(folder)
    return action


# ------------------------------------------------------------------------------
# Under torchrun.  Its agent prints lines of its own, so that ours are looked for
# in the files to which it sends what its processes say.

LOGS = TORCHRUN + " --redirects 3 --log-dir said"


def trains(folder: Path) -> bool:
    return len(steps_of(folder)) > 5


def under_torchrun(bench: Bench, work: Work, number: int, way: str) -> Callable:
    def action(folder: Path) -> None:
        work_of_two = replace(work, argv=work.argv.replace(f"--steps {STEPS}", "--steps 4000"))
        run = begin_fresh(folder, work_of_two, LOGS)
        wait_for(lambda: trains(folder), run)
        sent = time.monotonic()
        (os.kill if way == "to the agent" else os.killpg)(run.pid, number)
        run.wait(40)
        if (seconds := time.monotonic() - sent) > PROMPTLY:
            raise Broken(f"went on for {seconds:.0f} s")
        nobody_left(folder)
        said = [path.read_text() for path in sorted(folder.glob("said/**/stderr.log"))]
        ours = [line for text in said for line in text.splitlines()
                if line.startswith(run.script)]
        if any("Traceback" in text for text in said) or not ours:
            raise Broken(f"the processes say: {' | '.join(said)[-400:]}")
        no_step_lost(ours[0], folder)
    return action


def without_agent(bench: Bench, work: Work) -> Callable:
    """Its processes do not go on as orphans, and they save what they have."""
    def action(folder: Path) -> None:
        work_of_two = replace(work, argv=work.argv.replace(f"--steps {STEPS}", "--steps 4000"))
        run = begin_fresh(folder, work_of_two, LOGS)
        wait_for(lambda: trains(folder), run)
        kill([run.pid])
        run.wait()
        nobody_left(folder, within=5)
        saved = torch.load(folder / "run/checkpoint.pt", weights_only=True)["step"]
        if saved != steps_of(folder)[-1]:
            raise Broken(f"the checkpoint has step {saved}, the log {steps_of(folder)[-1]}")
    return action
