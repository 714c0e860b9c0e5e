"""Reading a layout that a stranger may have written: every key known, every value plausible."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from lit_prune.errors import ArtifactError
from lit_prune.saving.layout import (
    SCHEMA_VERSION,
    AttentionLayout,
    LayerLayout,
    Layout,
    MlpLayout,
    RemovedLayout,
)

if TYPE_CHECKING:
    from collections.abc import Mapping

_LARGEST = 2**31


def read_layout(raw: object) -> Layout:
    """Read what `Layout.to_dict` wrote; sizes are only plausible here, the weights decide.

    Raises:
        ArtifactError: If a key is missing or unknown, or a value has the wrong type or
            contradicts another.
    """
    whole = _object(raw, {"schema_version", "family", "hidden_size", "layers"}, "lit_prune")
    if whole["schema_version"] != SCHEMA_VERSION or isinstance(whole["schema_version"], bool):
        raise ArtifactError(
            f"config.json: lit_prune has schema_version {whole['schema_version']!r:.40}; this "
            f"version reads {SCHEMA_VERSION}."
        )
    if not isinstance(whole["layers"], list) or not isinstance(whole["family"], str):
        raise ArtifactError(
            "config.json: lit_prune.family must be text and lit_prune.layers a list."
        )
    layers = tuple(
        _layer(i, entry, len(whole["layers"])) for i, entry in enumerate(whole["layers"])
    )
    attentions = [x.attention for x in layers if isinstance(x.attention, AttentionLayout)]
    if len({a.head_dim for a in attentions}) != 1:
        raise ArtifactError(
            "config.json: lit_prune.layers must hold attentions, all with one head_dim."
        )
    if len({a.cache_slot for a in attentions}) != len(attentions):
        raise ArtifactError("config.json: two attentions share a cache_slot.")
    return Layout(whole["family"], _size(whole["hidden_size"], "hidden_size"), layers)


def _layer(index: int, raw: object, count: int) -> LayerLayout:
    where = f"lit_prune.layers[{index}]"
    layer = _object(raw, {"attention", "mlp"}, where)
    found: dict[str, Any] = {}
    for kind, keys in (
        ("attention", {"kv_groups", "queries_per_group", "head_dim", "cache_slot", "biases"}),
        ("mlp", {"channels", "biases"}),
    ):
        entry = layer[kind]
        if isinstance(entry, dict) and set(entry) == {"constant"}:
            if not isinstance(entry["constant"], bool):
                raise ArtifactError(f"config.json: {where}.{kind}.constant must be true or false.")
            found[kind] = RemovedLayout(entry["constant"])
            continue
        part = _object(entry, keys, f"{where}.{kind}")
        roles = (
            ("query", "key", "value", "output") if kind == "attention" else ("gate", "up", "output")
        )
        biases = part["biases"]
        if not isinstance(biases, list) or biases != [role for role in roles if role in biases]:
            raise ArtifactError(
                f"config.json: {where}.{kind}.biases must be some of {list(roles)}, in order."
            )
        sizes = {
            key: _size(part[key], f"{where}.{kind}.{key}")
            for key in keys - {"biases", "cache_slot"}
        }
        if kind == "mlp":
            found[kind] = MlpLayout(**sizes, biases=tuple(biases))
            continue
        slot = part["cache_slot"]
        if not isinstance(slot, int) or isinstance(slot, bool) or not 0 <= slot < count:
            raise ArtifactError(
                f"config.json: {where}.cache_slot must lie in [0, {count}), got {slot!r:.40}."
            )
        found[kind] = AttentionLayout(**sizes, cache_slot=slot, biases=tuple(biases))
    return LayerLayout(**found)


def _object(raw: object, keys: set[str], where: str) -> Mapping[str, Any]:
    if not isinstance(raw, dict) or set(raw) != keys:
        got = sorted(raw)[:8] if isinstance(raw, dict) else type(raw).__name__
        raise ArtifactError(f"config.json: {where} must have the keys {sorted(keys)}, got {got}.")
    return raw


def _size(value: object, where: str) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or not 0 < value < _LARGEST:
        raise ArtifactError(
            f"config.json: {where} must be a positive 32-bit integer, got {value!r:.40}."
        )
    return value
