"""From ``config.json`` to a model without weights, and back: only classes of known families.

Two formats. ``stock``: the config of the class says it all, and plain transformers loads the
directory. Where it cannot (widths that differ by layer, biases that the class does not have,
removed sub-blocks), ``lit_prune``: ``model_type`` is one that plain transformers does not know,
`Layout` stands under the key ``lit_prune``, and ``hidden_size`` is a sentence, so that the stock
class, when named outright, refuses too instead of dropping what it does not expect.
"""

from __future__ import annotations

import json
from dataclasses import fields
from typing import TYPE_CHECKING, Any

import torch

from lit_prune.decoder import FAMILIES, DecoderParts
from lit_prune.errors import ArtifactError
from lit_prune.saving.difference import difference
from lit_prune.saving.layout import layout_of
from lit_prune.saving.layout_read import read_layout
from lit_prune.saving.shaping import shape_layers
from lit_prune.saving.weights import DTYPES, dtypes_of, tensors_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel

PREFIX = "lit_prune_"
KEY = "lit_prune"
_SENTENCE = "see lit_prune.hidden_size: the layers differ; load with lit_prune.load_pruned"
# Fields of which a stock config knows one value for all layers; the layout knows better.
_WIDTHS = ("num_attention_heads", "num_key_value_heads", "intermediate_size")
# Keys that make transformers fetch or run code, or build something else.
_REFUSED = {
    "auto_map",
    "attn_implementation",
    "experts_implementation",
    "quantization_config",
    "num_labels",
}


def describe(model: PreTrainedModel) -> tuple[dict[str, Any], PreTrainedModel]:
    """Return the content of ``config.json`` that rebuilds exactly this model, and what it rebuilds.

    Raises:
        ArtifactError: If the config cannot be written, or does not lead back to this model.
    """
    config_class, model_class = _classes(model.config.model_type)
    raw = {
        k: v
        for k, v in model.config.to_dict().items()
        if not k.startswith("_") and k != "model_type"
    }
    dtypes = dtypes_of(model)
    raw |= {
        "architectures": [model_class.__name__],
        "dtype": str(model.dtype).removeprefix("torch."),
        "tie_word_embeddings": bool(tensors_of(model)[1]),  # what is so, whatever the config says
        "num_hidden_layers": len(DecoderParts(model).layers),
    }
    try:
        raw = _as_read({"model_type": config_class.model_type, **raw})
    except (TypeError, ValueError) as error:
        raise ArtifactError(
            f"the config of {type(model).__name__} is not JSON: {error}."
        ) from error
    if len(dtypes) == 1:
        try:
            skeleton = build(raw)
            if difference(skeleton, model) is None:
                return raw, skeleton
        except ArtifactError:
            pass  # no stock config says this; the other format does, or the comparison below raises
    layout = layout_of(model)
    raw |= {
        "model_type": f"{PREFIX}{layout.family}",
        "architectures": [f"LitPrune{model_class.__name__}"],
        "hidden_size": _SENTENCE,
        KEY: layout.to_dict(),
    }
    raw = _as_read(raw)
    skeleton = build(raw)
    if (found := difference(skeleton, model)) is not None:
        raise ArtifactError(
            f"{type(model).__name__} cannot be described: rebuilt from its own config it differs "
            f"in {found}. Was a module replaced by hand?"
        )
    return raw, skeleton


def is_stock(raw: dict[str, Any]) -> bool:
    """Return whether plain transformers reads this config."""
    return KEY not in raw


def family_named(raw: dict[str, Any]) -> str:
    """Return the family of a ``config.json``.

    Raises:
        ArtifactError: If it is not one of `FAMILIES`, or the file wants code to be run.
    """
    for key in sorted(_REFUSED & set(raw)):
        raise ArtifactError(
            f"config.json sets {key}: it can make a library fetch or run code, or build another "
            "model. Refused."
        )
    name = raw.get("model_type")
    prefix = "" if is_stock(raw) else PREFIX
    family = next((known for known in FAMILIES if name == f"{prefix}{known}"), None)
    if family is None:
        raise ArtifactError(
            f"config.json: model_type {name!r:.80} is none of {sorted(FAMILIES)} (or {PREFIX}…)."
        )
    return family


def build(raw: dict[str, Any]) -> PreTrainedModel:
    """Build the model that ``config.json`` describes on the meta device: every shape, no memory.

    Raises:
        ArtifactError: If the config describes no model.
    """
    config_class, model_class = _classes(family_named(raw))
    layout = None if is_stock(raw) else read_layout(raw[KEY])
    values = {k: v for k, v in raw.items() if k not in ("model_type", KEY)}
    if values.get("dtype") not in (None, *DTYPES):
        raise ArtifactError(
            f"config.json: dtype must be one of {sorted(DTYPES)}, got {values['dtype']!r:.40}."
        )
    if layout is not None:
        if layout.family != config_class.model_type:
            raise ArtifactError(
                f"config.json names two families, {layout.family!r:.40} in lit_prune."
            )
        # the smallest legal model of the class; its layers are shaped below
        values |= dict.fromkeys(_WIDTHS, 1)
        values |= {
            "hidden_size": layout.hidden_size,
            "head_dim": layout.head_dim,
            "architectures": [model_class.__name__],
        }
        if values.get("num_hidden_layers") != len(layout.layers):
            raise ArtifactError(
                f"config.json: num_hidden_layers is {values.get('num_hidden_layers')!r:.40}, the "
                f"layout has {len(layout.layers)} layers."
            )
    known = {field.name for field in fields(config_class)} | {"head_dim", "output_attentions"}
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
        if layout is not None:
            shape_layers(model, layout)
            for key in _WIDTHS:
                setattr(config, key, raw[key])
        model.tie_weights()
    except (
        Exception
    ) as error:  # whatever transformers and torch raise on a config that means nothing
        raise ArtifactError(
            f"config.json describes no model: {type(error).__name__}: {error!s:.300}"
        ) from error
    return model


def _as_read(raw: dict[str, Any]) -> dict[str, Any]:
    """Return what reading the file will give: text keys, lists for tuples."""
    whole: dict[str, Any] = json.loads(json.dumps(raw, allow_nan=False))
    return whole


def _classes(family: str) -> tuple[Any, Any]:
    from transformers import CONFIG_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING

    if family not in FAMILIES:
        raise ArtifactError(
            f"{family!r:.80} is none of the families that can be saved: {sorted(FAMILIES)}."
        )
    config_class = CONFIG_MAPPING[family]
    return config_class, MODEL_FOR_CAUSAL_LM_MAPPING[config_class]
