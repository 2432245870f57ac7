"""README.md, RESULTS.md and results/: links lead somewhere, and commands parse.

A number whose command no longer works has to leave.
"""

import importlib
import json
import re
import shlex
from pathlib import Path

import pytest

import runtime
from runtime import InputError
from studies import costs

PAGES = {name: Path(name).read_text() for name in ("README.md", "RESULTS.md")}
STAGES = "train_tokenizer", "train_dit", "sample", "evaluate"


def recorded(value: object) -> list[str]:
    """The strings in a JSON file that are commands."""
    if isinstance(value, str):
        return [value] if value.startswith("python ") else []
    values = value.values() if isinstance(value, dict) else value
    nested = isinstance(value, dict | list)
    return [c for v in values for c in recorded(v)] if nested else []


def commands() -> set[str]:
    """All commands of the stages that have flags."""
    found = [c for path in Path("results").rglob("*.json")
             for c in recorded(json.loads(path.read_text()))]
    for text in PAGES.values():
        text = text.replace("\\\n", " ")
        found += re.findall(r"^((?:python|torchrun) .*)$", text, re.M)
        inline = re.findall(r"`([^`]+)`", re.sub(r"(?s)```.*?```", "", text))
        found += [" ".join(c.split()) for c in inline]
    return {c.split(" #")[0] for c in found
            if re.search(rf"\b({'|'.join(STAGES)})\.py .*--", c)}


COMMANDS = commands()


def test_every_command_parses(tmp_path, monkeypatch):
    """As if the files that they name were there."""
    monkeypatch.setattr(runtime, "regular", Path)
    monkeypatch.chdir(tmp_path)
    Path("runs/tokenizer").mkdir(parents=True)
    Path("runs/tokenizer/checkpoint.pt").touch()
    checked = sorted(COMMANDS)
    assert len(checked) > 50
    for command in checked:
        words = shlex.split(command)
        stage = next(i for i, word in enumerate(words) if word[:-3] in STAGES)
        module = importlib.import_module(words[stage][:-3])
        try:
            module.parse(words[stage + 1:])
        except (SystemExit, InputError):
            pytest.fail(f"{command} does not parse")


def test_commands_can_be_pasted():
    """There is nothing in them that a shell would take for something else."""
    for command in COMMANDS:
        assert not re.search(r"[$…<>*|]", command), command


def anchors(page: str) -> set[str]:
    headings = re.findall(r"^#+ (.*)$", PAGES[page], re.M)
    return {re.sub(r"[^\w\- ]", "", h.lower()).replace(" ", "-") for h in headings}


def test_links_lead_somewhere():
    for page, text in PAGES.items():
        links = re.findall(r"\]\(([^)]+)\)", text)
        assert len(links) > 20
        for link in links:
            path, _, anchor = link.partition("#")
            if not path.startswith("https://"):
                assert Path(path or page).exists(), link
                assert not anchor or anchor in anchors(path or page), link


def test_the_readme_stays_short():
    assert len(PAGES["README.md"].splitlines()) <= 200


def test_costs_are_quoted_as_they_were_computed():
    """Every row of results/costs.json is in RESULTS.md, and some are in README.md."""
    for row in json.loads(Path("results/costs.json").read_text())["presets"]:
        cells = costs.cells(row)
        assert f"| {' | '.join(cells.values())} |" in PAGES["RESULTS.md"]
        quoted = [line for line in PAGES["README.md"].splitlines()
                  if line.startswith("| transformer:" if "dit" in row["stage"] else "| tokenizer:")
                  and f"`{row['preset']}`" in line]
        for line in quoted:
            memory, hours = cells["memory per GPU [GiB]"], cells["hours"]
            names, _, gib, time = line.strip("| ").split(" | ")
            place = names.split("`")[1::2].index(row["preset"])
            assert memory in re.split(r"[,;] ", gib)[min(place, gib.count(","))]
            assert hours in re.split(", ", time)[min(place, time.count(","))]
