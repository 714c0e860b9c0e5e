"""Before a saved model takes its place: is it the same one to a process that knows nothing else?

Policy: every weight, shape, dtype and tie must be equal bit for bit to what was to be written.
Logits of a few random tokens must be equal bit for bit to those of the model in memory where it is
on the CPU (both sides compute with one thread) and nothing was padded, and close otherwise: sums
run in another order. Of a mixture of experts half of the tokens must be close then.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

import torch

from lit_prune.decoder import family_of, quiet, task_of
from lit_prune.errors import ArtifactError
from lit_prune.saving.weights import BUFFERS, dtypes_of, write_tensors

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import Tensor
    from transformers import PreTrainedModel

    from lit_prune.saving.prepared import Prepared

ROOT = Path(__file__).resolve().parents[2]
_TIMEOUT_SECONDS = 3600
ONLY_READ = 3  # exit status of a check that could read the file, and had nothing to run it with
# Of a launcher around this process: the fresh one is alone, and off the network.
_NOT_INHERITED = (
    "RANK",
    "LOCAL_RANK",
    "WORLD_SIZE",
    "MASTER_ADDR",
    "MASTER_PORT",
    "ACCELERATE_USE_FSDP",
)


@dataclass(frozen=True, slots=True)
class Verification:
    """What a fresh process said.

    Attributes:
        compared: Whether it ran the saved model, and compared what came out.
        words: What was done.
    """

    compared: bool
    words: str


def verify_saved(model: PreTrainedModel, directory: Path, prepared: Prepared) -> Verification:
    """Load ``directory`` in a fresh process; compare with ``model``.

    Args:
        model: What was saved.
        directory: A complete directory of `save_pruned`.
        prepared: What the directory should hold.

    Returns:
        What was compared.

    Raises:
        ArtifactError: If anything differs, or the process cannot be started.
    """
    ids = random_ids(model.config.vocab_size)
    about = {
        "attention": getattr(model.config, "_attn_implementation", None),
        "matmul_precision": torch.get_float32_matmul_precision(),
        "on_cpu": next(model.parameters()).device.type == "cpu",
        "one_dtype": len(dtypes_of(model)) == 1,
        "package": str(ROOT),
        "routed": family_of(model).experts is not None,
        "rounded": (directory / BUFFERS).exists(),
        **prepared.facts(),
    }
    with TemporaryDirectory(prefix="lit_prune-") as folder:
        reference = Path(folder) / "reference.safetensors"
        write_tensors(
            reference,
            {"logits": logits_of(model, ids), "ids": ids},
            {"lit_prune": json.dumps(about)},
        )
        return _run(prepared.checker, directory, reference)


def random_ids(vocabulary: int) -> Tensor:
    """Return the token ids that both sides see, ``[2, 24]``."""
    generator = torch.Generator().manual_seed(0)
    return torch.randint(vocabulary, (2, 24), generator=generator, device="cpu")


def logits_of(model: PreTrainedModel, ids: Tensor) -> Tensor:
    """Return logits ``[batch, tokens, vocabulary]`` on the CPU; the model keeps no trace of it.

    Of a classifier of texts ``[batch, classes]``, one row at a time: it may name no padding token.
    """
    device = next(model.parameters()).device
    size = 1 if task_of(model) == "sequence" else len(ids)
    with one_thread(), quiet(model):
        parts = [model(input_ids=x, use_cache=False).logits for x in ids.to(device).split(size)]
    return torch.cat(parts).cpu()


@contextmanager
def one_thread() -> Iterator[None]:
    """Compute with one thread: sums of a thread pool depend on its size."""
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        yield
    finally:
        torch.set_num_threads(threads)


def _run(checker: str, directory: Path, reference: Path) -> Verification:
    environment = {k: v for k, v in os.environ.items() if k not in _NOT_INHERITED}
    environment |= {
        "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")])),
        "CUDA_VISIBLE_DEVICES": "",
        "HF_HUB_OFFLINE": "1",
    }
    # -P: nothing in the current directory may shadow a package; -B: no bytecode beside the model
    command = [
        sys.executable,
        "-P",
        "-B",
        str(Path(__file__).with_name(checker)),
        str(directory.resolve()),
        str(reference),
    ]
    remedy = "verify=False saves without this check."
    try:
        done = subprocess.run(
            command,
            env=environment,
            capture_output=True,
            text=True,
            timeout=_TIMEOUT_SECONDS,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise ArtifactError(
            f"the saved model could not be checked in a fresh process: {error}. {remedy}"
        ) from error
    if done.returncode not in (0, ONLY_READ):
        words = (done.stderr.strip() or done.stdout.strip()).splitlines()[-1:] or ["no message"]
        raise ArtifactError(
            "the saved model is not the one in memory, or cannot be loaded in a fresh process "
            f"(exit {done.returncode}): {words[0]} Nothing was saved. {remedy}"
        )
    return Verification(done.returncode == 0, done.stdout.strip().splitlines()[-1])
