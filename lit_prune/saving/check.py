"""``python -m lit_prune.saving.check DIRECTORY REFERENCE``: the fresh process of `verify_saved`."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from lit_prune.errors import ArtifactError, LitPruneError
from lit_prune.saving.load import load_pruned
from lit_prune.saving.verify import ROOT, logits_of, random_ids
from lit_prune.saving.weights import computed_buffers, digest_of

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor
    from transformers import PreTrainedModel

# Largest difference of logits, as a fraction of the largest logit, where bits cannot be equal. The
# weights are equal: what differs is the order of sums, and how a GPU multiplies float32 (TF32 keeps
# 10 bits).
_CLOSE = {torch.float64: 1e-9, torch.float32: 1e-2, torch.float16: 0.1, torch.bfloat16: 0.2}


def check(directory: Path, reference: Path) -> str:
    """Compare a saved directory with the reference; return what was compared, in words.

    Raises:
        ArtifactError: If anything differs.
    """
    from safetensors import safe_open

    with safe_open(reference, framework="pt") as file:
        wanted, about = file.get_tensor("logits"), json.loads(file.metadata()["lit_prune"])
    if str(ROOT) != about["package"]:
        raise ArtifactError(
            f"the fresh process runs lit_prune from {ROOT}, not from {about['package']}."
        )
    torch.set_float32_matmul_precision(about["matmul_precision"])
    torch.set_num_threads(1)
    model = load_pruned(directory)
    if digest_of(model) != about["digest"]:
        raise ArtifactError("weights, shapes, dtypes or ties differ after loading.")
    exact = about["on_cpu"] and about["attention"] in ("eager", "sdpa")
    words = ["weights equal bit for bit", _compare(model, about["attention"], wanted, exact=exact)]
    if about["stock"]:
        plain = _plain(directory)
        if digest_of(plain) != about["digest"]:
            raise ArtifactError("plain transformers loads other weights, dtypes or ties.")
        mine, its = computed_buffers(model), computed_buffers(plain)
        same = all(mine[k].dtype == its[k].dtype and torch.equal(mine[k], its[k]) for k in mine)
        words.append(
            "plain transformers: "
            + _compare(plain, about["attention"], wanted, exact=exact and same)
        )
    return "fresh process: " + ", ".join(words)


def _plain(directory: Path) -> PreTrainedModel:
    from transformers import AutoModelForCausalLM

    plain: PreTrainedModel = AutoModelForCausalLM.from_pretrained(directory, local_files_only=True)
    for parameter in plain.parameters():
        parameter.data = parameter.data.clone()  # aligned as torch aligns its own memory
    plain.tie_weights()
    return plain


def _compare(model: Any, attention: str | None, wanted: Tensor, *, exact: bool) -> str:  # noqa: ANN401
    if attention in ("eager", "sdpa"):
        model.set_attn_implementation(attention)
    got = logits_of(model, random_ids(model.config.vocab_size))
    if got.shape == wanted.shape and got.dtype == wanted.dtype and torch.equal(got, wanted):
        return "logits equal bit for bit"
    if got.shape != wanted.shape or got.dtype != wanted.dtype:
        raise ArtifactError(
            f"logits are {tuple(got.shape)} {got.dtype}, were {tuple(wanted.shape)} {wanted.dtype}."
        )
    if torch.equal(got.nan_to_num(), wanted.nan_to_num()):
        return "logits equal bit for bit (not all finite)"
    worst = float((got.double() - wanted.double()).abs().max())
    allowed = 0.0 if exact else _CLOSE[got.dtype] * float(wanted.double().abs().max())
    if not worst <= allowed:
        raise ArtifactError(
            f"logits differ by up to {worst:.3g}, allowed is {allowed:.3g} ({got.dtype})."
        )
    return f"logits close (largest difference {worst:.3g}, allowed {allowed:.3g})"


def main(arguments: Sequence[str]) -> int:
    """Print what was compared, or on standard error what differs; return the exit status."""
    try:
        sys.stdout.write(check(Path(arguments[0]), Path(arguments[1])) + "\n")
    except LitPruneError as error:
        sys.stderr.write(f"{error}\n")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
