"""Numbers that no flag takes.  Every numeric flag of every stage is found by itself.

nan, inf, 1e400 and text are always refused: one line, exit status 2, promptly, and
nothing is left behind.  0 and -1 are refused or make sense: then the run ends
well, and every number that it saves is finite.
"""

import argparse
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest.mock import patch

import runtime  # before torch

import torch

from studies.faults.bench import (
    DIT, EVALUATE, PROMPTLY, SAMPLE, TOKENIZER, TOY, Bench, Broken, Case, Run, Work, content,
    nobody_left, nothing_left)

NEVER = "nan", "inf", "1e400", "text", ""
SOMETIMES = "0", "-1"
MAY_BE_NEGATIVE = "--tau"


def cases(bench: Bench) -> list[Case]:
    found = []
    for work in (TOKENIZER, DIT, SAMPLE, EVALUATE, TOY):
        for flag, count in numeric_flags(work):
            for value in (*NEVER, *SOMETIMES):
                argv = f"{flag} " + " ".join([value or "''"] * count)
                found.append(Case(f"{work.name}, {argv}", given(work, argv, value)))
        for argv in NONSENSE:
            found.append(Case(f"{work.name}, {argv}", given(work, argv, "")))
    return found


class Found(Exception):
    """Carries the parser of a stage out of it."""


def numeric_flags(work: Work) -> Iterator[tuple[str, int]]:
    """The flags that take numbers, and how many each takes."""
    def stop(parser: argparse.ArgumentParser, *_: Any) -> None:
        raise Found(parser)

    try:
        with patch.object(runtime.Parser, "parse_args", stop):
            work.stage.main([])
    except Found as found:
        parser, = found.args
    for action in parser._actions:
        if action.option_strings and not action.choices and action.type:
            try:
                number = action.type("1")
            except (ValueError, argparse.ArgumentTypeError):
                number = action.type("0.5")   # of a number below 1
            if isinstance(number, (int, float)):
                count = action.nargs if isinstance(action.nargs, int) else 1
                yield action.option_strings[0], count


# Flags that do not exist, are cut short, or lack their value.
NONSENSE = "--nonsense 1", "--see 1", "--out", "--device tpu", "--device", "words"


def given(work: Work, argv: str, value: str) -> Callable:
    def action(folder: Path) -> None:
        before = sorted(folder.rglob("*"))
        run = Run(folder, work.stage, f"{work.argv} {argv}", work.before)
        sometimes = value == "0" or value == "-1" and argv.split()[0] in MAY_BE_NEGATIVE
        run.wait()
        nobody_left(folder)
        if sometimes and run.status == 0:
            run.went_well()
            nothing_left(folder)
            return all_finite(folder)
        run.refused()
        if run.seconds > PROMPTLY:
            raise Broken(f"it took {run.seconds:.0f} s to say so")
        if more := sorted({*folder.rglob("*")} - {*before}):
            raise Broken(f"left behind: {[str(path.relative_to(folder)) for path in more]}")
    return action


def all_finite(folder: Path) -> None:
    """In checkpoints and in logs."""
    def check(value: Any, name: str) -> None:
        if isinstance(value, dict):
            for key, inner in value.items():
                check(inner, f"{name} {key}")
        elif isinstance(value, (list, tuple)):
            for inner in value:
                check(inner, name)
        elif isinstance(value, (float, torch.Tensor)):
            if not torch.as_tensor(value).isfinite().all():
                raise Broken(f"{name} is not finite")

    for path in folder.glob("run/**/*"):
        if path.suffix == ".pt":
            check(torch.load(path, weights_only=True), path.name)
        elif path.suffix in (".json", ".jsonl"):
            check(content(path), path.name)
