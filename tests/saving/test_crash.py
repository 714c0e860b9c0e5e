"""F39: crash, full disk, targets in the way, two writers."""

import errno
import os
import random
import shutil
import signal
import time
from collections import namedtuple
from pathlib import Path

import pytest
import torch

from lit_prune.errors import ArtifactError
from lit_prune.saving import load_pruned, prepared, save, save_pruned, staging
from lit_prune.saving.files import sha256_of
from lit_prune.saving.manifest import Manifest
from lit_prune.saving.weights import digest_of
from tests.saving.cases import listing, logits, pruned


def test_f39_the_short_file_is_named(saved):
    path = saved / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(ArtifactError, match=r"model\.safetensors is short"):
        load_pruned(saved)


def test_f39_the_altered_file_is_named(saved):
    raw = bytearray((saved / "model.safetensors").read_bytes())
    raw[-1] ^= 1
    (saved / "model.safetensors").write_bytes(raw)
    with pytest.raises(ArtifactError, match=r"model\.safetensors was altered"):
        load_pruned(saved)


def test_f39_directory_without_manifest_is_refused(saved):
    (saved / "MANIFEST.json").unlink()
    with pytest.raises(ArtifactError, match=r"no MANIFEST\.json"):
        load_pruned(saved)
    with pytest.raises(ArtifactError, match="not a directory"):
        load_pruned(saved / "nothing")


STEPS = ["write_weights", "write_json", "write_generation_config", "model_card", "verify_saved"]


@pytest.mark.parametrize(
    ("overwrite", "error"),
    [
        (False, RuntimeError()),
        (True, OSError(errno.ENOSPC, "No space left")),
        (True, KeyboardInterrupt()),
    ],
)
@pytest.mark.parametrize("step", [*STEPS, "sync", "rename", "manifest"])
def test_f39_crash_at_any_step_leaves_the_target_as_it_was(
    step, overwrite, error, tmp_path, monkeypatch
):
    target = tmp_path / "saved"
    if overwrite:
        save_pruned(pruned(), target, verify=False)
        old = sha256_of(target / "MANIFEST.json")
    model = pruned(seed=1)
    before = digest_of(model)

    def crash(*_args, **_options):
        raise error

    owners = {"sync": staging, "rename": Path, "manifest": Manifest}
    owner = owners.get(step, prepared if step in ("write_weights", "write_json") else save)
    with monkeypatch.context() as patched:
        if step == "rename":
            real = Path.rename
            patched.setattr(Path, step, lambda s, t: crash() if ".tmp-" in s.name else real(s, t))
        else:
            patched.setattr(owner, "write" if step == "manifest" else step, crash)
        typed = ArtifactError if isinstance(error, OSError) else type(error)
        with pytest.raises(typed):
            save_pruned(model, target, overwrite=overwrite, verify=step == "verify_saved")
    assert listing(tmp_path) == (["saved"] if overwrite else [])
    assert digest_of(model) == before
    if overwrite:
        assert sha256_of(target / "MANIFEST.json") == old
        load_pruned(target)
    save_pruned(model, target, overwrite=overwrite, verify=False)  # and now it works
    assert torch.equal(logits(load_pruned(target)), logits(model))


def test_f39_full_disk_is_noticed_before_any_work(tmp_path, monkeypatch):
    usage = namedtuple("Usage", "total used free")(10**12, 10**12, 1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda _path: usage)
    with pytest.raises(ArtifactError, match="MB free"):
        save_pruned(pruned(), tmp_path / "saved")
    assert listing(tmp_path) == []


def test_f39_directory_that_cannot_be_written_is_a_typed_error(tmp_path, monkeypatch):
    real = Path.mkdir

    def refuse(self, *args, **options):  # root, who runs CI, may write everywhere
        if ".tmp-" in self.name:
            raise PermissionError(errno.EACCES, "Permission denied", str(self))
        real(self, *args, **options)

    monkeypatch.setattr(Path, "mkdir", refuse)
    with pytest.raises(ArtifactError, match="cannot be written"):
        save_pruned(pruned(), tmp_path / "saved")
    assert listing(tmp_path) == []


def test_f39_parent_that_is_a_file_is_a_typed_error(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(ArtifactError, match="is no directory"):
        save_pruned(pruned(), tmp_path / "file/saved")


def test_f39_existing_target_is_refused(saved):
    manifest = sha256_of(saved / "MANIFEST.json")
    with pytest.raises(ArtifactError, match="overwrite=True"):
        save_pruned(pruned(), saved)
    assert sha256_of(saved / "MANIFEST.json") == manifest


def test_f39_target_that_is_a_file_is_refused(tmp_path):
    (tmp_path / "saved").write_text("mine")
    with pytest.raises(ArtifactError, match="not a directory"):
        save_pruned(pruned(), tmp_path / "saved", overwrite=True)
    assert (tmp_path / "saved").read_text() == "mine"


def test_f39_overwrite_replaces_everything_that_was_saved(saved):
    model = pruned(kind="uniform")
    model.pruning_record = None
    save_pruned(model, saved, overwrite=True, verify=False, max_shard_bytes=20_000)
    assert "plan.json" not in listing(saved)
    assert "model.safetensors" not in listing(saved)  # no stale single file beside the shards
    assert torch.equal(logits(load_pruned(saved)), logits(model))
    save_pruned(model, saved, overwrite=True, verify=False)
    assert "model.safetensors.index.json" not in listing(saved)  # P21
    assert listing(saved.parent) == ["saved"]


def test_f39_overwrite_deletes_nothing_that_it_did_not_write(saved, tmp_path):
    (saved / "notes.txt").write_text("mine")
    with pytest.raises(ArtifactError, match=r"notes\.txt"):
        save_pruned(pruned(), saved, overwrite=True)
    home = tmp_path / "home"
    home.mkdir()
    (home / "thesis.tex").write_text("mine")
    with pytest.raises(ArtifactError, match="not written by save_pruned"):
        save_pruned(pruned(), home, overwrite=True)
    assert (saved / "notes.txt").exists()
    assert (home / "thesis.tex").exists()


def test_f39_two_writers_the_loser_gets_a_typed_error(tmp_path, monkeypatch):
    winner, loser = pruned(seed=1), pruned(seed=2)
    real = prepared.write_weights

    def meanwhile(*args):
        real(*args)
        monkeypatch.setattr(os, "getpid", lambda: 1)  # another process
        monkeypatch.setattr(prepared, "write_weights", real)
        save_pruned(winner, tmp_path / "saved", verify=False)

    monkeypatch.setattr(prepared, "write_weights", meanwhile)
    with pytest.raises(ArtifactError, match="appeared while it was being saved"):
        save_pruned(loser, tmp_path / "saved", verify=False)
    assert listing(tmp_path) == ["saved"]
    assert torch.equal(logits(load_pruned(tmp_path / "saved")), logits(winner))


def test_f39_leftover_of_a_killed_process_is_not_mixed_in(tmp_path):
    stale = tmp_path / f".saved.tmp-{os.getpid()}"
    stale.mkdir()
    (stale / "model.safetensors").write_text("half")
    with pytest.raises(ArtifactError, match="delete that directory"):
        save_pruned(pruned(), tmp_path / "saved")
    assert listing(tmp_path) == [stale.name]


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_f39_writer_killed_at_random_moments_leaves_an_old_or_a_new_directory(tmp_path):
    target = tmp_path / "saved"
    old, new = pruned(kind="uneven"), pruned(kind="uniform_mean", seed=1)
    wanted = {
        digest_of(old),
        digest_of(load_pruned(save_pruned(new, tmp_path / "n", verify=False))),
    }
    chance, seen = random.Random(0), []
    for _ in range(10):
        shutil.rmtree(target, ignore_errors=True)
        save_pruned(old, target, verify=False)
        if not (child := os.fork()):
            torch.set_num_threads(1)
            save_pruned(new, target, overwrite=True, verify=False)
            os._exit(0)
        time.sleep(chance.uniform(0, 0.1))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        kept = target if target.exists() else tmp_path / f".saved.old-{child}"
        seen.append(digest_of(load_pruned(kept)))
        for rest in tmp_path.glob(".saved.*"):
            shutil.rmtree(rest)
    assert set(seen) <= wanted
