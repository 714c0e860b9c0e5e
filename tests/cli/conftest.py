"""The shell is called as a function: what it prints, and its exit status, are what users see."""

import importlib
import logging
from pathlib import Path
from types import SimpleNamespace

import pytest
from transformers import AutoTokenizer
from transformers.utils import logging as transformers_logging

from lit_prune.cli import main
from tests.models import tiny_model
from tests.recipes.conftest import SHIPPED

SOURCES = ("heapq", "textwrap", "calendar")
QUICK = ["--latency_prompt_tokens", "0"]
UNVERIFIED = ["--verify", "false"]  # else a fresh process starts, for seconds


@pytest.fixture(scope="session")
def model_directory(tmp_path_factory):
    """A random model with the shipped tokenizer."""
    folder = tmp_path_factory.mktemp("cli") / "tiny"
    tokenizer = AutoTokenizer.from_pretrained(SHIPPED)
    ids = {
        name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")
    }
    model = tiny_model(vocab_size=len(tokenizer), max_position_embeddings=64, **ids)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def text(tmp_path_factory):
    folder = tmp_path_factory.mktemp("text")
    for name in SOURCES:
        source = Path(importlib.import_module(name).__file__).read_text(encoding="utf-8")
        (folder / f"{name}.txt").write_text(source[:6000], encoding="utf-8")
    return folder


@pytest.fixture
def _loud():
    """A command quiets the libraries of its process, which is the tests' here."""
    logger, verbosity = logging.getLogger("lit_prune"), transformers_logging.get_verbosity()
    level = logger.level
    yield
    logger.setLevel(level)
    transformers_logging.set_verbosity(verbosity)
    transformers_logging.enable_progress_bar()


@pytest.fixture
def lit_prune(capsys, recwarn, _loud):
    """Run a command; return its status, and what it printed."""

    def run(*words):
        status = main([str(word) for word in words])
        printed = capsys.readouterr()
        return SimpleNamespace(status=status, out=printed.out, err=printed.err)

    return run


def refused(run, status, *words):
    """One line, the status, nothing on stdout; returns the line."""
    assert run.status == status, run.err
    lines = run.err.strip().splitlines()
    assert len(lines) == 1, run.err
    assert lines[0].startswith("lit-prune: error: ")
    assert not run.out
    for word in words:
        assert word in lines[0]
    return lines[0]
