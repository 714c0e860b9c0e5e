"""From ``config.json`` to a model without weights: only classes of known families.

Nothing that the file says is run: a stock family is built by the class of transformers, a pruned
one (``pruned_llama`` …) by the class of this package, whatever file lies beside it.
"""

from __future__ import annotations

import json
from dataclasses import fields
from typing import TYPE_CHECKING, Any

import torch

from lit_prune.decoder import FAMILIES
from lit_prune.decoder.families import PRUNED, family_name
from lit_prune.decoder.head import Task, task_named
from lit_prune.errors import ArtifactError
from lit_prune.saving.layout_read import check_layers
from lit_prune.saving.models import HELD, auto_map, pruned_classes
from lit_prune.saving.weights import DTYPES

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_MAPPINGS: dict[Task, str] = {
    "next_token": "MODEL_FOR_CAUSAL_LM_MAPPING",
    "sequence": "MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING",
    "token": "MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING",
}
# Keys that make transformers fetch or run code, or build something else.
REFUSED = {
    "auto_map",
    "attn_implementation",
    "experts_implementation",
    "quantization_config",
    "num_labels",
}


def is_pruned(raw: dict[str, Any]) -> bool:
    """Return whether a ``config.json`` speaks of layers that differ."""
    return str(raw.get("model_type")).startswith(PRUNED)


def family_named(raw: dict[str, Any]) -> str:
    """Return the family of a ``config.json``.

    Raises:
        ArtifactError: If it is not one of `FAMILIES`, or the file wants code to be run.
    """
    name = raw.get("model_type")
    family = family_name(name)
    if not isinstance(name, str) or family not in FAMILIES:
        raise ArtifactError(
            f"config.json: model_type {name!r:.80} is none of {sorted(FAMILIES)} (or {PRUNED}…)."
        )
    if is_pruned(raw) and family not in HELD:
        raise ArtifactError(f"config.json: model_type {name!r:.80}: there is no such model file.")
    for key in sorted(REFUSED & set(raw)):
        # the one file that we write ourselves; it is not run here either
        if key == "auto_map" and is_pruned(raw) and raw[key] == auto_map(family, _task(raw)):
            continue
        raise ArtifactError(
            f"config.json sets {key}: it can make a library fetch or run code, or build another "
            "model. Refused."
        )
    return family


def build(raw: dict[str, Any]) -> PreTrainedModel:
    """Build the model that ``config.json`` describes on the meta device: every shape, no memory.

    Raises:
        ArtifactError: If the config describes no model.
    """
    family = family_named(raw)
    task = _task(raw)
    classes = pruned_classes if is_pruned(raw) else stock_classes
    config_class, model_class = classes(family, task)
    if model_class is None:
        raise ArtifactError(
            f"config.json: architectures {raw['architectures']!r:.80}: there is no such class of "
            f"model_type {raw['model_type']!r:.80}."
        )
    values = {k: v for k, v in raw.items() if k not in ("model_type", "auto_map")}
    if values.get("dtype") not in (None, *DTYPES):
        raise ArtifactError(
            f"config.json: dtype must be one of {sorted(DTYPES)}, got {values['dtype']!r:.40}."
        )
    known = {field.name for field in fields(config_class)} | {"head_dim", "output_attentions"}
    if is_pruned(raw):
        if "per_layer_config" not in raw:
            raise ArtifactError("config.json: per_layer_config is missing.")
        check_layers(raw)
        known.add("per_layer_config")
    inert = {k: v for k, v in values.items() if k not in known}
    if bad := sorted(
        k for k in inert if not k.isidentifier() or k.startswith("_") or hasattr(config_class, k)
    ):
        raise ArtifactError(
            f"config.json sets {bad[0]!r:.80}, which is no field of {config_class.__name__}."
        )
    try:
        config = config_class(**{k: v for k, v in values.items() if k in known})
        for key, value in inert.items():
            setattr(config, key, value)
        with torch.device("meta"):
            model: PreTrainedModel = model_class(config).eval()
        model.tie_weights()
    except (
        Exception
    ) as error:  # whatever transformers and torch raise on a config that means nothing
        raise ArtifactError(
            f"config.json describes no model: {type(error).__name__}: {error!s:.300}"
        ) from error
    return model


def as_read(raw: dict[str, Any]) -> dict[str, Any]:
    """Return what reading the file will give: text keys, lists for tuples.

    Raises:
        ArtifactError: If it is not JSON.
    """
    try:
        whole: dict[str, Any] = json.loads(json.dumps(raw, allow_nan=False))
    except (TypeError, ValueError) as error:
        raise ArtifactError(f"the config of this model is not JSON: {error}.") from error
    return whole


def stock_classes(family: str, task: Task = "next_token") -> tuple[Any, Any]:
    """Return config and model class of transformers for a family; None where it has no such."""
    import transformers

    config_class = transformers.CONFIG_MAPPING[family]
    mapping: Any = getattr(transformers, _MAPPINGS[task])
    return config_class, mapping.get(config_class, None)


def _task(raw: dict[str, Any]) -> Task:
    """Return what a ``config.json`` says that the head is for."""
    named = raw.get("architectures")
    first = named[0] if isinstance(named, list) and named else None
    return (task_named(first) if isinstance(first, str) else None) or "next_token"
