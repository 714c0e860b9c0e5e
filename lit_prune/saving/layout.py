"""The shape of every decoder layer as data: what a stock config (one width for all) cannot say.

Written to ``config.json`` under the key ``lit_prune``; read back strictly.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from torch import nn

from lit_prune.decoder import KINDS, ConstantOutput, DecoderParts, Family, SubBlockKind

if TYPE_CHECKING:
    from transformers import PreTrainedModel

SCHEMA_VERSION = 1


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
        return next(
            x.attention.head_dim for x in self.layers if isinstance(x.attention, AttentionLayout)
        )

    def to_dict(self) -> dict[str, Any]:
        """Return JSON-able primitives; `read_layout` reads them back."""
        return {"schema_version": SCHEMA_VERSION, **asdict(self)}


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
    embedding: Any = model.get_input_embeddings()
    return Layout(parts.family.model_type, embedding.weight.shape[1], tuple(layers))


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
