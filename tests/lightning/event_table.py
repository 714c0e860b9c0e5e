"""The table "event -> what happens" in the README, made of the tests that show it.

A test says what it shows::

    @pytest.mark.event("Interruptions", "Ctrl-C", "the model stays dense and whole")

and ``python -m tests.lightning.event_table`` writes all of them into the README, by group.
"""

from __future__ import annotations

import ast
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
README = ROOT / "README.md"
BEGIN, END = "<!-- events: python -m tests.lightning.event_table -->\n", "<!-- events end -->"
GROUPS = (
    "Runs",
    "Checkpoints",
    "Neighbours",
    "Numbers",
    "Several processes",
    "Schedules",
    "Interruptions",
)


@dataclass(frozen=True)
class Event:
    group: str
    event: str
    happens: str
    test: str


def events(folder: Path = Path(__file__).parent) -> list[Event]:
    """Read the marks of all tests, in the order of groups, files and lines."""
    found = []
    for file in sorted(folder.glob("test_*.py")):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            for mark in getattr(node, "decorator_list", []):
                if isinstance(mark, ast.Call) and ast.unparse(mark.func) == "pytest.mark.event":
                    words = [ast.literal_eval(word) for word in mark.args]
                    found.append(Event(*words, f"{file.name}::{node.name}"))
    return sorted(found, key=lambda event: GROUPS.index(event.group))


def table(found: list[Event]) -> str:
    lines = ["| event | what happens | shown by |", "|---|---|---|"]
    for group in GROUPS:
        of_group = [event for event in found if event.group == group]
        lines += [f"| **{group}** | | |"] * bool(of_group)
        lines += [f"| {e.event} | {e.happens} | `{e.test.split('::')[1]}` |" for e in of_group]
    return "\n".join(lines) + "\n"


def with_table(text: str) -> str:
    """Return the README with today's table between its marks."""
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    return f"{before}{BEGIN}\n{table(events())}\n{END}{after}"


if __name__ == "__main__":
    README.write_text(with_table(README.read_text(encoding="utf-8")), encoding="utf-8")
