"""The pages of the documentation name what is there."""

import ast
import importlib
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PAGES = sorted((ROOT / ".docs").rglob("*.md"))
NAMED = [pytest.param(page, id=page.relative_to(ROOT / ".docs").as_posix()) for page in PAGES]


def blocks(page, language):
    return re.findall(rf"```{language}\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL)


@pytest.mark.parametrize("page", NAMED)
def test_python_blocks_parse_and_import_what_exists(page):
    for block in blocks(page, "python"):
        for node in ast.walk(ast.parse(block)):
            if isinstance(node, ast.ImportFrom) and node.module.startswith("lit_prune"):
                module = importlib.import_module(node.module)
                missing = [name.name for name in node.names if not hasattr(module, name.name)]
                assert not missing, f"{page}: {node.module} has no {missing}"


@pytest.mark.parametrize("page", NAMED)
def test_included_parts_of_the_readme_are_there(page):
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    for mark in re.findall(r':(?:start-after|end-before): "(.*)"', page.read_text("utf-8")):
        assert mark in readme, f"{page}: the README has no {mark!r}"


def test_every_page_is_in_the_index():
    index = (ROOT / ".docs" / "index.md").read_text(encoding="utf-8")
    listed = set(re.findall(r"(?m)^([a-z/-]+)$", index))
    pages = {page.relative_to(ROOT / ".docs").with_suffix("").as_posix() for page in PAGES}
    assert pages - {"index"} == listed & pages
    assert listed <= pages


def test_the_presets_that_are_shown_are_known():
    from lit_prune.methods import PRESETS

    shown = (ROOT / ".docs" / "presets.md").read_text(encoding="utf-8")
    assert PRESETS.keys() <= set(re.findall(r"`(\w+)`", shown))
