"""Reading a saved model back: manifest, hashes, config, shapes, and only then memory."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from lit_prune.decoder import FAMILIES, fingerprint, text_view
from lit_prune.errors import ArtifactError, ConfigError, PlanMismatchError
from lit_prune.plan import PruningPlan
from lit_prune.record import PruningRecord
from lit_prune.report import PruningReport
from lit_prune.saving.buffers import restore_buffers
from lit_prune.saving.extras import GENERATION, read_generation_config
from lit_prune.saving.files import inside, parse_json, read_json, read_text
from lit_prune.saving.manifest import Manifest
from lit_prune.saving.prepared import CONFIG, GGUF_FILE
from lit_prune.saving.skeleton import build, family_named
from lit_prune.saving.weights import BUFFERS, DTYPES, read_shapes, read_tensors, tensors_of
from lit_prune.saving.wrapped import is_whole, load_whole

if TYPE_CHECKING:
    from transformers import PreTrainedModel

PLAN, REPORT = "plan.json", "report.json"


def load_pruned(
    directory: str | Path,
    *,
    device: str | torch.device = "cpu",
    dtype: torch.dtype | None = None,
) -> PreTrainedModel:
    """Load what `save_pruned` wrote: the same weights, bit for bit, in the same shapes.

    Only safetensors and JSON are read; no file of the directory is run, not even the model file
    that we put there for others: layers that differ are built by this package's own class. Every
    file is compared with the manifest, and every shape with the headers of the weights, before
    memory is allocated.

    Args:
        directory: What `save_pruned` returned.
        device: Where the weights go.
        dtype: Convert the weights; by default they stay as saved.

    Returns:
        The model in eval mode, trainable, with ``generation_config`` and ``pruning_record`` (None
        where the directory holds no plan). It can be pruned again; ``save_pretrained`` works too.

    Raises:
        ArtifactError: If something is missing, short, altered, contradictory, or wants code to be
            run.
        ConfigError: If ``dtype`` is not a floating one.
    """
    directory, device = Path(directory), torch.device(device)
    if dtype is not None and dtype not in DTYPES.values():
        raise ConfigError(f"dtype must be one of {sorted(DTYPES)} of torch, got {dtype!r}.")
    manifest = Manifest.read(directory)
    if GGUF_FILE in manifest.files:
        raise ArtifactError(
            f"{directory} holds {GGUF_FILE}, which llama.cpp reads: llama_cpp.Llama("
            f"'{directory / GGUF_FILE}'). load_pruned reads the other formats."
        )
    for name in (CONFIG, *(() if manifest.weights else ("model.safetensors",))):
        if name not in manifest.files:
            raise ArtifactError(
                f"{directory}: the manifest does not list {name}; save the model again."
            )
    manifest.check(directory)
    raw = read_json(inside(directory, CONFIG))
    if is_whole(raw):
        whole = load_whole(directory, raw, device, dtype)
        return _checked(whole, directory, manifest)
    weights = [inside(directory, name) for name in manifest.weights]
    # outside inference mode: parameters made inside could never be trained
    with torch.inference_mode(False), torch.no_grad():
        model = _empty(raw, read_shapes(weights))
        _refuse_other_architecture(model, directory, manifest)
        _fill(model, read_tensors(weights, device, dtype))
        buffers = [inside(directory, BUFFERS)] if BUFFERS in manifest.files else []
        read_shapes(buffers)
        restore_buffers(model, read_tensors(buffers, torch.device("cpu")), device)
    if dtype is not None:
        model.config.dtype = dtype
    model.config.name_or_path = str(directory)
    return _with_settings(model, directory, manifest)


def _with_settings(model: PreTrainedModel, directory: Path, manifest: Manifest) -> PreTrainedModel:
    """Put generation config and record on a model that is loaded."""
    if GENERATION in manifest.files:
        model.generation_config = read_generation_config(read_json(inside(directory, GENERATION)))
    model.pruning_record = _record(directory, manifest)  # type: ignore[assignment] # a plain attribute
    return model


def _checked(whole: PreTrainedModel, directory: Path, manifest: Manifest) -> PreTrainedModel:
    """Return a multimodal model with what lay beside it, if it is the one of the manifest."""
    _refuse_other_architecture(whole, directory, manifest)
    _with_settings(whole, directory, manifest)
    text_view(whole).pruning_record = whole.pruning_record
    return whole


def _refuse_other_architecture(model: PreTrainedModel, directory: Path, manifest: Manifest) -> None:
    if fingerprint(model) != manifest.architecture.get("fingerprint"):
        raise ArtifactError(
            f"{directory}: the manifest speaks of another architecture than config.json."
        )


def _empty(raw: dict[str, Any], found: dict[str, tuple[tuple[int, ...], str]]) -> PreTrainedModel:
    """Build the empty model, its size bounded by the tensors that are really there.

    Raises:
        ArtifactError: If config and weights contradict each other.
    """
    family = FAMILIES[family_named(raw)]
    prefix = re.escape(family.layers)
    layers = {m[1] for name in found if (m := re.match(rf"{prefix}\.(\d+)\.", name))}
    (said,) = family.in_config({"num_hidden_layers": None})
    if raw.get(said) != len(layers):
        raise ArtifactError(
            f"config.json speaks of {raw.get(said)!r:.40} layers, the weights hold {len(layers)}."
        )
    model = build(raw)
    wanted = tensors_of(model)[0]
    for name in sorted(wanted.keys() | found.keys()):
        expected = tuple(wanted[name].shape) if name in wanted else None
        got = found[name][0] if name in found else None
        if expected != got:
            raise ArtifactError(
                f"{name:.80}: config.json asks for {expected}, the weights hold {got}."
            )
    return model


def _fill(model: PreTrainedModel, tensors: dict[str, torch.Tensor]) -> None:
    ties = tensors_of(model)[1]
    aliases = {name: tensors[first] for name, first in ties.items()}
    model.load_state_dict({**tensors, **aliases}, strict=True, assign=True)
    model.tie_weights()
    if tensors_of(model)[1] != ties:
        raise ArtifactError(f"the ties {ties} could not be made again: please report this.")


def _record(directory: Path, manifest: Manifest) -> PruningRecord | None:
    report = None
    if REPORT in manifest.files:
        text = read_text(inside(directory, REPORT))
        parse_json(text, directory / REPORT)
        report = PruningReport.from_json(text)
    if PLAN not in manifest.files:
        return None
    try:
        plan = PruningPlan.from_json(read_text(inside(directory, PLAN)))
    except PlanMismatchError as error:
        raise ArtifactError(f"{directory / PLAN}: {error}") from error
    return PruningRecord(plan, report)
