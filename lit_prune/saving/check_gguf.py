"""The fresh process of `verify_saved` for ``gguf``: ``python check_gguf.py DIRECTORY REFERENCE``.

Reads the file back; runs it where llama-cpp-python is installed. Exit status 3: there was nothing
to run it with.
"""

from __future__ import annotations

import hashlib
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from gguf import GGUFReader
from safetensors import safe_open

from lit_prune.saving.check import Different
from lit_prune.saving.verify import ONLY_READ

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

# Largest difference of logits as a fraction of the largest logit. The graphs sum in other orders,
# and llama.cpp rounds what meets a weight of 16 bits to the type of that weight.
_CLOSE = {torch.float32: 1e-4, torch.float16: 0.1, torch.bfloat16: 0.2}
_F32 = 0  # ggml's number for it


def read_back(path: Path, digest: str) -> str:
    """Compare every weight with what was to be written.

    Raises:
        Different: If one differs.
    """
    whole, count = hashlib.sha256(), 0
    for tensor in sorted(GGUFReader(path).tensors, key=lambda tensor: tensor.name):
        if tensor.name == "rope_freqs.weight":  # made while writing
            continue
        whole.update(f"{tensor.name} {tensor.tensor_type.name} ".encode())
        whole.update(tensor.data.tobytes())
        count += 1
    if whole.hexdigest() != digest:
        raise Different("the weights in the file are not those that were to be written.")
    return f"{count} tensors read back, equal bit for bit"


def compare(llama: Any, about: dict[str, Any], wanted: Tensor, ids: Tensor) -> str:  # noqa: ANN401 - untyped upstream
    """Say how close logits and tokens are.

    Raises:
        Different: If they are not close enough.
    """
    worst = 0.0
    for row, logits in zip(ids.tolist(), wanted, strict=True):
        llama.reset()
        llama.eval(row)
        got = torch.from_numpy(llama.scores[: len(row)].copy())
        if got.shape != logits.shape:
            raise Different(f"logits are {tuple(got.shape)}, were {tuple(logits.shape)}.")
        difference = float((got.double() - logits.double()).abs().max())
        worst = max(worst, difference) if difference == difference else float("nan")
    allowed = _CLOSE[wanted.dtype] * float(wanted.double().abs().max())
    if not worst <= allowed:
        raise Different(
            f"llama.cpp: logits differ by up to {worst:.3g}, allowed is {allowed:.3g} "
            f"({wanted.dtype})."
        )
    for text, expected in about["texts"].items():
        found = llama.tokenize(text.encode(), add_bos=False, special=False)
        if found != expected:
            raise Different(
                f"llama.cpp cuts {text!r:.40} into {found}, the tokenizer into {expected}. Save "
                "without tokenizer=…: then the file takes token ids."
            )
    texts = ", tokens of sample texts equal" if about["texts"] else ""
    return f"llama.cpp: logits close (largest difference {worst:.3g}, allowed {allowed:.3g}){texts}"


def check(directory: Path, reference: Path) -> tuple[int, str]:
    """Return exit status and what was compared, in words.

    Raises:
        Different: If anything differs.
    """
    with safe_open(reference, framework="pt") as file:
        wanted, ids = file.get_tensor("logits"), file.get_tensor("ids")
        about = json.loads(file.metadata()["lit_prune"])
    path = directory / about["file"]
    words = f"fresh process, {read_back(path, about['digest'])}; "
    try:
        from llama_cpp import Llama
    except ImportError:
        return ONLY_READ, words + "not run: llama-cpp-python is not installed"
    llama = Llama(
        str(path), n_ctx=64, n_gpu_layers=0, n_threads=1, logits_all=True, type_k=_F32, type_v=_F32,
        flash_attn=False, verbose=False,
    )  # fmt: skip
    return 0, words + compare(llama, about, wanted, ids)


def main(arguments: Sequence[str]) -> int:
    """Print what was compared, or on standard error what differs; return the exit status."""
    try:
        status, words = check(Path(arguments[0]), Path(arguments[1]))
    except (Different, OSError, ValueError, RuntimeError) as error:
        sys.stderr.write(" ".join(f"{error}".split()) + "\n")
        return 1
    sys.stdout.write(words + "\n")
    return status


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
