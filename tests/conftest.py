"""Settings for the whole suite, made before anything imports torch or transformers."""

import gc
import importlib.util
import os

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["MPLBACKEND"] = "Agg"

import pytest
import torch

from lit_prune.decoder import FAMILIES

# Tiny models: one thread is faster than a pool, and sums come in one order on every machine.
torch.set_num_threads(1)


def pytest_collection_modifyitems(items):
    missing = {}
    if not torch.cuda.is_available():
        missing["gpu"] = "needs a CUDA device"
    if importlib.util.find_spec("llama_cpp") is None:
        missing["gguf"] = "needs llama-cpp-python: make gguf-test"
    for item in items:
        for marker in missing.keys() & item.keywords.keys():
            item.add_marker(pytest.mark.skip(reason=missing[marker]))


def pytest_collection_finish():
    """Let the garbage collector, which Lightning calls in every run, pass over what is imported."""
    gc.freeze()


@pytest.fixture
def registry():
    """The families; what a test does to them is undone."""
    before = dict(FAMILIES)
    yield FAMILIES
    FAMILIES.clear()
    FAMILIES.update(before)


# ---- model fixtures (the builders are in tests/models.py) ----
