"""Recipes run as a user runs them: as scripts, in another process, on a tiny random model."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from tests.models import tiny_model

ROOT = Path(__file__).resolve().parents[2]
SHIPPED = ROOT / "checkpoints" / "python-4.8m"


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory):
    """A random model with the shipped tokenizer: it knows nothing, and everything is quick."""
    folder = tmp_path_factory.mktemp("checkpoint")
    tokenizer = AutoTokenizer.from_pretrained(SHIPPED)
    model = tiny_model(
        vocab_size=len(tokenizer),
        max_position_embeddings=512,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def run_recipe():
    def run(name, *arguments, cwd):
        command = [sys.executable, str(ROOT / "recipes" / name), *map(str, arguments)]
        found = subprocess.run(
            command,
            cwd=cwd,
            env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
            check=False,
        )
        assert found.returncode == 0, found.stdout + found.stderr
        return found.stdout

    return run
