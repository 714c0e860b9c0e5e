"""The check in a fresh process, for real: each takes seconds."""

import json
import subprocess
import sys

import pytest
import torch

from lit_prune.errors import ArtifactError
from lit_prune.saving import check, load_pruned, prepared, save_pruned, verify
from lit_prune.saving.weights import digest_of, write_tensors
from tests.saving.cases import listing, logits, pruned


@pytest.mark.parametrize(
    ("family", "kind", "chosen", "words"),
    [
        (
            "qwen3",
            "shorter",
            "auto",
            "by plain transformers: logits equal bit for bit; load_pruned",
        ),
        (
            "qwen2",
            "leading_mean",
            "auto",
            "by the model file: logits equal bit for bit; load_pruned",
        ),
        pytest.param(
            *("mistral", "leading_mean", "padded", "by plain transformers: logits close"),
            marks=pytest.mark.slow,
        ),
    ],
)
def test_saved_model_is_compared_in_a_fresh_process(
    family, kind, chosen, words, tmp_path, monkeypatch
):
    # nothing in the current directory may shadow a package
    (tmp_path / "torch.py").write_text("raise SystemExit('shadowed')")
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("PYTHONDONTWRITEBYTECODE", raising=False)
    model = pruned(family, kind, tie=True)
    path = save_pruned(model, "saved", format=chosen)
    manifest = json.loads((path / "MANIFEST.json").read_text())
    assert manifest["verified"] is True
    assert words in manifest["verification"]
    assert not (path / "__pycache__").exists()
    torch.testing.assert_close(logits(load_pruned(path)), logits(model), rtol=0, atol=1e-4)


def test_f40_difference_is_found_and_nothing_is_saved(tmp_path, monkeypatch):
    model, real = pruned(kind="no_first_attention_mean"), prepared.write_weights

    def corrupt(folder, tensors, size):
        real(
            folder,
            {k: v + 1e-7 if k.endswith("down_proj.bias") else v for k, v in tensors.items()},
            size,
        )

    monkeypatch.setattr(prepared, "write_weights", corrupt)
    before = digest_of(model)
    with pytest.raises(ArtifactError, match="logits differ by up to"):
        save_pruned(model, tmp_path / "saved")
    assert listing(tmp_path) == []
    assert digest_of(model) == before


def test_process_that_cannot_start_is_a_typed_error(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "executable", str(tmp_path / "no-python"))
    with pytest.raises(ArtifactError, match="verify=False saves without"):
        save_pruned(pruned(), tmp_path / "saved")
    assert listing(tmp_path) == []


def about(model, **changes):
    return {
        "attention": "sdpa",
        "class": "LlamaForCausalLM",
        "auto": "AutoModelForCausalLM",
        "one_by_one": False,
        "code": None,
        "digest": digest_of(model),
        "matmul_precision": torch.get_float32_matmul_precision(),
        "on_cpu": True,
        "one_dtype": True,
        "package": str(verify.ROOT),
        "rounded": False,
        "routed": False,
        "verbatim": True,
        **changes,
    }


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_policy_of_the_comparison(dtype):
    """Bits on the CPU, closeness from elsewhere, where zeros were added or frequencies rounded."""
    model = pruned(kind="uniform").to(dtype)
    ids = verify.random_ids(64)
    wanted = verify.logits_of(model, ids)

    def compare(logits, *, exact=True, **changes):
        return check.compare(model, about(model, **changes), logits, ids, exact=exact)

    assert compare(wanted) == "logits equal bit for bit"
    nudged = wanted.clone()
    nudged[0, 0, 0] += 2**-6 * nudged[0, 0, 0]
    with pytest.raises(check.Different, match="logits differ"):
        compare(nudged)
    assert "logits close" in compare(nudged, on_cpu=False)
    assert "logits close" in compare(nudged, rounded=True, exact=False)
    with pytest.raises(check.Different, match="logits differ"):
        compare(wanted * 2, on_cpu=False)
    assert "logits close" in compare(
        wanted * (1 + 2**-7 if dtype != torch.float32 else 1 + 1e-6), exact=False
    )
    if dtype == torch.float32:
        with pytest.raises(check.Different, match="logits differ"):
            compare(nudged, exact=False)
    with pytest.raises(check.Different, match="logits are"):
        compare(wanted[:1])
    rerouted = wanted.clone()
    rerouted[0, :10] += 2 * wanted.abs().max()  # 10 of 48 tokens
    with pytest.raises(check.Different, match="logits differ"):
        compare(rerouted, on_cpu=False)
    assert "logits close" in compare(rerouted, on_cpu=False, routed=True)
    with pytest.raises(check.Different, match="logits differ"):
        compare(wanted * 2, on_cpu=False, routed=True)


def test_main_says_what_differs(tmp_path):
    path = save_pruned(pruned(kind="uniform"), tmp_path / "saved", verify=False)
    reference = tmp_path / "reference.safetensors"
    ids = verify.random_ids(64)
    tensors = {"logits": verify.logits_of(load_pruned(path), ids), "ids": ids}
    facts = about(load_pruned(path), package="/elsewhere")
    write_tensors(reference, tensors, {"lit_prune": json.dumps(facts)})
    command = [sys.executable, "-P", check.__file__, str(path), str(reference)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "not /elsewhere" in done.stderr.splitlines()[-1]
