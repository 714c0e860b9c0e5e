"""The check in a fresh process, for real: each takes seconds."""

import json
import sys

import pytest
import torch

from lit_prune.errors import ArtifactError
from lit_prune.saving import check, load_pruned, save, save_pruned, verify
from lit_prune.saving.weights import digest_of, write_tensors
from tests.saving.cases import listing, logits, pruned


def test_saved_model_is_compared_in_a_fresh_process(tmp_path, monkeypatch):
    # nothing in the current directory may shadow a package
    (tmp_path / "torch.py").write_text("raise SystemExit('shadowed')")
    monkeypatch.chdir(tmp_path)
    model = pruned("qwen3", "shorter", tie=True)
    path = save_pruned(model, "saved")
    manifest = json.loads((path / "MANIFEST.json").read_text())
    assert manifest["verified"] is True
    assert manifest["verification"].count("logits equal bit for bit") == 2  # ours, plain
    assert torch.equal(logits(load_pruned(path)), logits(model))


def test_f40_difference_is_found_and_nothing_is_saved(tmp_path, monkeypatch):
    model, real = pruned(kind="no_first_attention_mean"), save.write_weights

    def corrupt(folder, tensors, size):
        real(
            folder,
            {k: v + 1e-7 if k.endswith("down_proj.bias") else v for k, v in tensors.items()},
            size,
        )

    monkeypatch.setattr(save, "write_weights", corrupt)
    before = digest_of(model)
    with pytest.raises(ArtifactError, match="weights, shapes, dtypes or ties differ"):
        save_pruned(model, tmp_path / "saved")
    assert listing(tmp_path) == []
    assert digest_of(model) == before


def test_process_that_cannot_start_is_a_typed_error(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "executable", str(tmp_path / "no-python"))
    with pytest.raises(ArtifactError, match="verify=False saves without"):
        save_pruned(pruned(), tmp_path / "saved")
    assert listing(tmp_path) == []


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_policy_of_the_check(dtype, tmp_path):
    """The child's comparison, in this process: bits on the CPU, closeness from elsewhere."""
    model = pruned(kind="uniform").to(dtype)
    path = save_pruned(model, tmp_path / "saved", verify=False)
    wanted = verify.logits_of(model, verify.random_ids(64))
    about = {
        "digest": digest_of(model),
        "on_cpu": True,
        "attention": "sdpa",
        "matmul_precision": torch.get_float32_matmul_precision(),
        "package": str(verify.ROOT),
        "stock": True,
    }

    def compare(logits, **changes):
        reference = tmp_path / "reference.safetensors"
        write_tensors(reference, {"logits": logits}, {"lit_prune": json.dumps(about | changes)})
        return check.check(path, reference)

    plain = "equal bit for bit" if dtype == torch.float32 else "close"
    assert f"plain transformers: logits {plain}" in compare(wanted)
    nudged = wanted.clone()
    nudged[0, 0, 0] += 2**-6 * nudged[0, 0, 0]
    with pytest.raises(ArtifactError, match="logits differ"):
        compare(nudged)
    assert "logits close" in compare(nudged, on_cpu=False)
    with pytest.raises(ArtifactError, match="logits differ"):
        compare(wanted * 2, on_cpu=False)
    with pytest.raises(ArtifactError, match="weights"):
        compare(wanted, digest="0")
    with pytest.raises(ArtifactError, match="runs lit_prune from"):
        compare(wanted, package="/elsewhere")


def test_main_says_what_differs(tmp_path, capsys):
    path = save_pruned(pruned(), tmp_path / "saved", verify=False)
    (path / "config.json").unlink()
    reference = tmp_path / "reference.safetensors"
    about = {"package": str(verify.ROOT), "matmul_precision": torch.get_float32_matmul_precision()}
    write_tensors(reference, {"logits": torch.zeros(1)}, {"lit_prune": json.dumps(about)})
    assert check.main([str(path), str(reference)]) == 1
    assert "config.json is missing" in capsys.readouterr().err
