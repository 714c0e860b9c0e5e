"""The shape of every decoder layer as data: what a stock config, with one width for all layers, cannot say.

Written to ``config.json`` under the key ``lit_prune``; read back strictly.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from torch import nn

from lit_prune.decoder import KINDS, ConstantOutput, DecoderParts, Family, SubBlockKind
from lit_prune.errors import ArtifactError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from transformers import PreTrainedModel

SCHEMA_VERSION = 1
_LARGEST = 2**31


@dataclass(frozen=True, slots=True)
class AttentionLayout:
    """An attention sub-block: its sizes, its slot in the KV cache, the projections with a bias."""

    kv_groups: int
    queries_per_group: int
    head_dim: int
    cache_slot: int
    biases: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class MlpLayout:
    """An MLP sub-block: its width, the projections with a bias."""

    channels: int
    biases: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class RemovedLayout:
    """A removed sub-block; ``constant`` where its mean output stands in for it."""

    constant: bool


@dataclass(frozen=True, slots=True)
class LayerLayout:
    """One decoder layer."""

    attention: AttentionLayout | RemovedLayout
    mlp: MlpLayout | RemovedLayout


@dataclass(frozen=True, slots=True)
class Layout:
    """Every decoder layer of a model.

    Attributes:
        family: Hugging Face model type of the stock class.
        hidden_size: Width of the residual stream.
        layers: In order.
    """

    family: str
    hidden_size: int
    layers: tuple[LayerLayout, ...]

    @property
    def head_dim(self) -> int:
        """Width of a head, the same in every layer."""
        return next(x.attention.head_dim for x in self.layers if isinstance(x.attention, AttentionLayout))

    def to_dict(self) -> dict[str, Any]:
        """Return JSON-able primitives."""
        return {"schema_version": SCHEMA_VERSION, **asdict(self)}

    @classmethod
    def from_dict(cls, raw: object) -> Layout:
        """Read what `to_dict` wrote; sizes are only plausible here, the weights decide.

        Raises:
            ArtifactError: If a key is missing or unknown, or a value has the wrong type or contradicts another.
        """
        whole = _object(raw, {"schema_version", "family", "hidden_size", "layers"}, "lit_prune")
        if whole["schema_version"] != SCHEMA_VERSION or isinstance(whole["schema_version"], bool):
            raise ArtifactError(
                f"config.json: lit_prune has schema_version {whole['schema_version']!r:.40}; this version reads "
                f"{SCHEMA_VERSION}."
            )
        if not isinstance(whole["layers"], list) or not isinstance(whole["family"], str):
            raise ArtifactError("config.json: lit_prune.family must be text and lit_prune.layers a list.")
        layers = tuple(_layer(i, entry, len(whole["layers"])) for i, entry in enumerate(whole["layers"]))
        attentions = [x.attention for x in layers if isinstance(x.attention, AttentionLayout)]
        if len({a.head_dim for a in attentions}) != 1:
            raise ArtifactError("config.json: lit_prune.layers must hold attentions, all with one head_dim.")
        if len({a.cache_slot for a in attentions}) != len(attentions):
            raise ArtifactError("config.json: two attentions share a cache_slot.")
        return cls(whole["family"], _size(whole["hidden_size"], "hidden_size"), layers)


def layout_of(model: PreTrainedModel) -> Layout:
    """Describe a model; works on the meta device too.

    Raises:
        UnsupportedModelError: If its family is not known.
    """
    parts = DecoderParts(model)
    layers = []
    for index in range(len(parts.layers)):
        found: dict[SubBlockKind, Any] = {kind: _sub_block(parts, index, kind) for kind in KINDS}
        layers.append(LayerLayout(**found))
    hidden_size = int(model.get_input_embeddings().weight.shape[1])
    return Layout(parts.family.model_type, hidden_size, tuple(layers))


def projections(family: Family, kind: SubBlockKind) -> dict[str, str]:
    """Return the projections of a sub-block: role → path in the layer."""
    if kind == "attention":
        return {
            "query": family.query,
            "key": family.key,
            "value": family.value,
            "output": family.attention_output,
        }
    return {"gate": family.gate, "up": family.up, "output": family.mlp_output}


def _sub_block(
    parts: DecoderParts, index: int, kind: SubBlockKind
) -> AttentionLayout | MlpLayout | RemovedLayout:
    module: Any = parts.sub_block(index, kind)
    if isinstance(module, ConstantOutput):
        return RemovedLayout(constant=module.bias is not None)
    linears: dict[str, nn.Module] = {
        role: parts.layers[index].get_submodule(path)
        for role, path in projections(parts.family, kind).items()
    }
    biases = tuple(role for role, linear in linears.items() if linear.bias is not None)
    if kind == "mlp":
        return MlpLayout(parts.output(index, kind).weight.shape[1], biases)
    head_dim = int(module.head_dim)
    return AttentionLayout(
        kv_groups=parts.inputs(index, kind)[1].weight.shape[0] // head_dim,
        queries_per_group=int(module.num_key_value_groups),
        head_dim=head_dim,
        cache_slot=int(module.layer_idx),
        biases=biases,
    )


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
        roles = ("query", "key", "value", "output") if kind == "attention" else ("gate", "up", "output")
        biases = part["biases"]
        if not isinstance(biases, list) or biases != [role for role in roles if role in biases]:
            raise ArtifactError(f"config.json: {where}.{kind}.biases must be some of {list(roles)}, in order.")
        sizes = {key: _size(part[key], f"{where}.{kind}.{key}") for key in keys - {"biases", "cache_slot"}}
        if kind == "mlp":
            found[kind] = MlpLayout(**sizes, biases=tuple(biases))
            continue
        slot = part["cache_slot"]
        if not isinstance(slot, int) or isinstance(slot, bool) or not 0 <= slot < count:
            raise ArtifactError(f"config.json: {where}.cache_slot must lie in [0, {count}), got {slot!r:.40}.")
        found[kind] = AttentionLayout(**sizes, cache_slot=slot, biases=tuple(biases))
    return LayerLayout(**found)


def _object(raw: object, keys: set[str], where: str) -> Mapping[str, Any]:
    if not isinstance(raw, dict) or set(raw) != keys:
        got = sorted(raw)[:8] if isinstance(raw, dict) else type(raw).__name__
        raise ArtifactError(f"config.json: {where} must have the keys {sorted(keys)}, got {got}.")
    return raw


def _size(value: object, where: str) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or not 0 < value < _LARGEST:
        raise ArtifactError(f"config.json: {where} must be a positive 32-bit integer, got {value!r:.40}.")
    return value
