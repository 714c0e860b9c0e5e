"""Reading ``per_layer_config`` that a stranger may have written: every key known, all plausible."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from lit_prune.decoder import FAMILIES, KINDS
from lit_prune.decoder.families import family_name
from lit_prune.errors import ArtifactError
from lit_prune.saving.experts import count_field

if TYPE_CHECKING:
    from collections.abc import Mapping

    from lit_prune.decoder import Family

_LARGEST = 2**31
_HEADS = ("num_attention_heads", "num_key_value_heads")
_WIDTHS = ("intermediate_size", "num_experts")
_SIZES = (*_HEADS, *_WIDTHS)
_LISTS = {
    "skip": KINDS,
    "constants": KINDS,
    "biases": (
        *("qkv_proj", "q_proj", "k_proj", "v_proj", "o_proj"),
        *("gate_up_proj", "gate_proj", "up_proj", "down_proj"),
    ),
}


def check_layers(raw: Mapping[str, Any]) -> None:
    """Refuse what `Layout.per_layer_config` would not write; the weights decide about sizes.

    Raises:
        ArtifactError: If a key is missing or unknown, or a value has the wrong type or contradicts
            another.
    """
    layers, count = raw["per_layer_config"], raw.get("num_hidden_layers")
    if not isinstance(layers, dict) or not isinstance(count, int) or isinstance(count, bool):
        raise ArtifactError(
            "config.json: per_layer_config must be an object and num_hidden_layers a number."
        )
    digits = len(str(count - 1))
    if sorted(layers) != [f"{i:0{digits}}" for i in range(len(layers))] or len(layers) != count:
        raise ArtifactError(
            f"config.json: per_layer_config must name each of {count} layers once, got "
            f"{sorted(layers)[:8]!r:.80}."
        )
    family = FAMILIES[family_name(raw.get("model_type"))]
    for name, entry in layers.items():
        _check_layer(f"per_layer_config[{name}]", entry, family)
        _check_experts(f"per_layer_config[{name}]", entry, raw)
    if all("attention" in entry.get("skip", ()) for entry in layers.values()):
        raise ArtifactError("config.json: per_layer_config must leave an attention in some layer.")
    for key in meaningless(family):
        if raw.get(key) != 0 or isinstance(raw.get(key), bool):
            raise ArtifactError(
                f"config.json: {key} must be 0 beside per_layer_config, got {raw.get(key)!r:.40}."
            )
    for key in ("biases", "constants"):
        if raw.get(key) != []:
            raise ArtifactError(f"config.json: {key} must be [] beside per_layer_config.")


def meaningless(family: Family) -> tuple[str, ...]:
    """Return the widths that are 0 beside ``per_layer_config``, where layers have their own.

    Of a family whose layers all have experts ``intermediate_size`` is the width of an expert.
    """
    experts, count = family.experts, count_field(family)
    if experts is None or count is None:
        return (*_HEADS, "intermediate_size")
    plain = () if experts.plain_layers is None else ("intermediate_size",)
    return (*_HEADS, *plain, count)


def _check_experts(where: str, entry: Mapping[str, Any], raw: Mapping[str, Any]) -> None:
    least = raw.get("num_experts_per_tok", 1)
    if "num_experts" in entry and (not isinstance(least, int) or entry["num_experts"] < least):
        raise ArtifactError(
            f"config.json: {where}.num_experts is {entry['num_experts']}, each token is routed to "
            f"{least!r:.40}."
        )


def _check_layer(where: str, entry: object, family: Family) -> None:
    if not isinstance(entry, dict) or not set(entry) <= {*_SIZES, *_LISTS}:
        got = sorted(entry)[:8] if isinstance(entry, dict) else type(entry).__name__
        raise ArtifactError(
            f"config.json: {where} may have the keys {sorted({*_SIZES, *_LISTS})}, got {got}."
        )
    for key, known in _LISTS.items():
        found = entry.get(key, [])
        if not isinstance(found, list) or found != [name for name in known if name in found]:
            raise ArtifactError(f"config.json: {where}.{key} must be some of {known}, in order.")
    skip = entry.get("skip", [])
    mixture = "num_experts" in entry and family.experts is not None
    width = "num_experts" if mixture else "intermediate_size"
    wanted = {*(() if "attention" in skip else _HEADS), *(() if "mlp" in skip else (width,))}
    if set(entry) & set(_SIZES) != wanted or not set(entry.get("constants", [])) <= set(skip):
        raise ArtifactError(f"config.json: {where} contradicts its skip {skip}: {sorted(entry)}.")
    for key in wanted:
        value = entry[key]
        if not isinstance(value, int) or isinstance(value, bool) or not 0 < value < _LARGEST:
            raise ArtifactError(
                f"config.json: {where}.{key} must be a positive 32-bit integer, got {value!r:.40}."
            )
    if "attention" not in skip and entry["num_attention_heads"] % entry["num_key_value_heads"]:
        raise ArtifactError(
            f"config.json: {where} has {entry['num_attention_heads']} heads on "
            f"{entry['num_key_value_heads']} KV heads."
        )
