import shutil
from pathlib import Path

import pytest

from lit_prune.saving import save_pruned
from tests.saving.cases import pruned


@pytest.fixture(scope="session")
def template(tmp_path_factory):
    path = tmp_path_factory.mktemp("template") / "saved"
    return save_pruned(pruned(kind="no_first_attention_mean", tie=True), path, verify=False)


@pytest.fixture
def saved(template, tmp_path):
    """A fresh copy of a saved model, to be damaged."""
    return Path(shutil.copytree(template, tmp_path / "saved"))
