"""A file that appears whole, and may be read by whom the umask lets."""

import pytest
import torch
from safetensors.torch import save_file

from lit_prune import save_pruned
from lit_prune.errors import ArtifactError
from lit_prune.whole_file import refuse_file, whole_file
from tests.models import tiny_model


def mode(path):
    return path.stat().st_mode & 0o777


def test_a_block_that_fails_leaves_what_was_there(tmp_path):
    path = tmp_path / "plan.json"
    path.write_text("old")

    def interrupted():
        with whole_file(path) as beside:
            beside.write_text("ne")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert [x.name for x in tmp_path.iterdir()] == ["plan.json"]
    assert path.read_text() == "old"


def test_tensors_can_be_read_by_whom_the_umask_lets(tmp_path):
    (tmp_path / "usual").write_text("")
    with whole_file(tmp_path / "x.safetensors") as beside:
        save_file({"x": torch.zeros(2)}, beside)  # 0.8 makes files of mode 0600
    assert mode(tmp_path / "x.safetensors") == mode(tmp_path / "usual")
    saved = save_pruned(tiny_model(), tmp_path / "saved", verify=False)
    assert {mode(path) for path in saved.iterdir()} == {mode(tmp_path / "usual")}


def test_what_is_in_the_way_of_a_file_is_refused(tmp_path):
    (tmp_path / "there").write_text("mine")
    refuse_file(tmp_path / "new", overwrite=False)
    refuse_file(tmp_path / "there", overwrite=True)
    for path, words in (
        (tmp_path / "there", "exists"),
        (tmp_path, "is a directory"),
        (tmp_path / "there" / "x", "is no directory"),
    ):
        with pytest.raises(ArtifactError, match=words):
            refuse_file(path, overwrite=False)
