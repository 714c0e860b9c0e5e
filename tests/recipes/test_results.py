"""What the README shows of a comparison is what its stored cells say."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "recipes"))

import tables
from cells import Found

ROOT = Path(__file__).resolve().parents[2]
RESULTS = sorted((ROOT / "recipes" / "results").glob("*.json"))
README = (ROOT / "README.md").read_text(encoding="utf-8")


def rows(table):
    return {line.split(" | ")[0]: line for line in table.splitlines()}


def test_there_are_results():
    assert RESULTS


@pytest.mark.parametrize("path", RESULTS, ids=lambda path: path.stem)
def test_tables_of_the_readme_are_those_of_the_stored_cells(path):
    found = Found.read(path)
    assert tables.table(found) in README
    if found.dense["other_nll"]:
        of_other_text = rows(tables.table(found, "other_"))
        shown = [line for line in of_other_text.values() if line in README]
        assert of_other_text[f"| `{found.first}`"] in shown
        assert len(shown) > 5
