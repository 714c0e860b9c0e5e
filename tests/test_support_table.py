"""The README's table of families is what the registry and the contract say."""

import re
import tomllib
from pathlib import Path

import pytest

from lit_prune.decoder.families import FAMILIES
from lit_prune.testing import check_family
from tests.models import tiny_model
from tests.support_table import README, row, rows_of

ROOT = Path(__file__).resolve().parents[1]
TEXT = README.read_text(encoding="utf-8")
MAKE = "run: python -m tests.support_table"
PINNED = re.search(r"(?m)^transformers==(.+)$", (ROOT / ".ci/constraints.txt").read_text())[1]


def test_the_table_has_a_row_for_each_family():
    assert set(rows_of(TEXT)) == FAMILIES.keys(), MAKE


def test_the_table_is_of_the_newest_transformers_that_is_tested():
    assert f"passed its contract on transformers {PINNED}." in TEXT, MAKE


@pytest.mark.slow
@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_a_row_says_what_the_contract_finds(family):
    assert rows_of(TEXT)[family] == row(check_family(tiny_model(family))), MAKE


def test_ci_runs_the_contract_on_the_oldest_and_the_newest_transformers():
    lines = (ROOT / ".ci" / "jobs").read_text().splitlines()
    jobs = dict(line.split(": ", 1) for line in lines if line and not line.startswith("#"))
    wanted = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    oldest = next(re.match(r"transformers>=([\d.]+)", w)[1] for w in wanted if "transformers" in w)
    assert jobs["contract, oldest"].startswith(f"make contract TRANSFORMERS={oldest}")
    assert jobs["contract, newest"] == "make contract TRANSFORMERS=newest"
    targets = set(re.findall(r"(?m)^([a-z-]+):", (ROOT / "Makefile").read_text()))
    assert {
        command.split()[1] for command in jobs.values() if command.startswith("make")
    } <= targets
