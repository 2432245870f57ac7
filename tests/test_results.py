"""RESULTS.md and results/: their links lead somewhere, and their commands parse.

A number whose command no longer works has to leave.
"""

import importlib
import json
import re
import shlex
from pathlib import Path

import pytest

from runtime import InputError

TEXT = Path("RESULTS.md").read_text()
STAGES = "train_tokenizer", "train_dit", "sample", "evaluate"
FILLED = {"$T": "train_tokenizer.py --data DIR", "$D": "train_dit.py --data DIR",
          "β": "1", "…": "checkpoint.pt"}


def recorded(value: object) -> list[str]:
    """The strings in a JSON file that are commands."""
    if isinstance(value, str):
        return [value] if value.startswith("python ") else []
    values = value.values() if isinstance(value, dict) else value
    nested = isinstance(value, dict | list)
    return [c for v in values for c in recorded(v)] if nested else []


def commands() -> set[str]:
    """All commands of the stages, with their placeholders filled in."""
    found = [c for path in Path("results").rglob("*.json")
             for c in recorded(json.loads(path.read_text()))]
    text = TEXT.replace("\\\n", " ")
    fenced = re.findall(r"^((?:python|torchrun) .*)$", text, re.M)
    inline = re.findall(r"`([^`]+)`", re.sub(r"(?s)```.*?```", "", text))
    complete = set()
    for command in (*found, *fenced, *(" ".join(c.split()) for c in inline)):
        for short, long in FILLED.items():
            command = command.replace(short, long)
        if re.search(rf"\b({'|'.join(STAGES)})\.py .*--", command):
            complete.add(command.split(" #")[0])
    return complete


def test_every_command_parses():
    checked = sorted(commands())
    assert len(checked) > 40
    for command in checked:
        words = shlex.split(command)
        stage = next(i for i, word in enumerate(words) if word[:-3] in STAGES)
        module = importlib.import_module(words[stage][:-3])
        try:
            module.parse(words[stage + 1:])
        except (SystemExit, InputError):
            pytest.fail(f"{command} does not parse")


def test_links_lead_somewhere():
    headings = re.findall(r"^#+ (.*)$", TEXT, re.M)
    anchors = {"#" + re.sub(r"[^\w\- ]", "", h.lower()).replace(" ", "-")
               for h in headings}
    links = re.findall(r"\]\(([^)]+)\)", TEXT)
    assert len(links) > 20
    for link in links:
        assert link in anchors or Path(link).exists(), link
