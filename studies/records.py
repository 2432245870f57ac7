"""Reads what the stages have written: the logs of trainings, and scores."""

import json
from pathlib import Path
from typing import Any

import runtime  # before torch, which it tells how threads wait

from runtime import InputError


def is_number(value: Any) -> bool:
    """Whether it can be drawn.  NaN and infinity cannot."""
    return isinstance(value, (int, float)) and abs(value) < 1e300


def read_log(run: Path) -> list[dict[str, Any]]:
    """The lines about steps.  `run` is the folder of a training, or its log.jsonl.

    A half line is left out, because somebody may be writing it.
    """
    path, lines = run / "log.jsonl" if run.is_dir() else run, []
    for text in runtime.regular(path).read_text(errors="replace").splitlines():
        try:
            line = json.loads(text)
        except (ValueError, RecursionError):
            continue
        if isinstance(line, dict) and is_number(line.get("step")):
            lines.append(line)
    if not lines:
        raise InputError(f"{path} has no logged steps: wait for the first, or name the "
                         "folder of a training")
    return lines


def read_scores(path: Path) -> list[dict[str, Any]]:
    """The rows of evaluate.py's results.json."""
    try:
        rows = json.loads(runtime.regular(path).read_text())
    except (ValueError, RecursionError):
        rows = None
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise InputError(f"{path} is damaged or not of evaluate.py: remove it, and give "
                         "the same command again")
    return rows
