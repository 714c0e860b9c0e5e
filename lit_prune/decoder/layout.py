"""The shape of every decoder layer as data: what one width for all layers cannot say."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import nn

from lit_prune.decoder.parts import DecoderParts
from lit_prune.decoder.spec import KINDS, SubBlockKind

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from lit_prune.decoder.family import Family


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
class ExpertsLayout:
    """A mixture of experts in the place of an MLP: how many there are."""

    experts: int

    @property
    def biases(self) -> tuple[str, ...]:
        """None that could hold a constant."""
        return ()


@dataclass(frozen=True, slots=True)
class RemovedLayout:
    """A removed sub-block; ``constant`` where its mean output stands in for it.

    ``output`` names the projection that would hold that constant, where the family calls it neither
    ``o_proj`` nor ``down_proj``.
    """

    constant: bool
    output: str | None = None


@dataclass(frozen=True, slots=True)
class LayerLayout:
    """One decoder layer."""

    attention: AttentionLayout | RemovedLayout
    mlp: MlpLayout | ExpertsLayout | RemovedLayout

    @property
    def biases(self) -> tuple[str, ...]:
        """Projections with a bias; the constant of a removed sub-block is that of its output.

        Example:
            >>> LayerLayout(RemovedLayout(constant=True), MlpLayout(8, ())).biases
            ('o_proj',)
        """
        names: tuple[str, ...] = ()
        for part, output in ((self.attention, "o_proj"), (self.mlp, "down_proj")):
            if not isinstance(part, RemovedLayout):
                names += part.biases
            elif part.constant:
                names += (part.output or output,)
        return names

    def to_config(self) -> dict[str, Any]:
        """Return the entry of ``per_layer_config``, in the schema of transformers and our keys.

        Example:
            >>> LayerLayout(RemovedLayout(constant=True), MlpLayout(8, ("down_proj",))).to_config()
            {'skip': ['attention'], 'constants': ['attention'], 'intermediate_size': 8,
             'biases': ['down_proj']}
        """
        parts = {"attention": self.attention, "mlp": self.mlp}
        removed = {k: part for k, part in parts.items() if isinstance(part, RemovedLayout)}
        entry: dict[str, Any] = {
            "skip": sorted(removed),
            "constants": sorted(kind for kind, part in removed.items() if part.constant),
        }
        biases: tuple[str, ...] = ()
        if isinstance(self.attention, AttentionLayout):
            groups = self.attention.kv_groups
            entry["num_attention_heads"] = groups * self.attention.queries_per_group
            entry["num_key_value_heads"] = groups
            biases += self.attention.biases
        if isinstance(self.mlp, MlpLayout):
            entry["intermediate_size"] = self.mlp.channels
            biases += self.mlp.biases
        if isinstance(self.mlp, ExpertsLayout):
            entry["num_experts"] = self.mlp.experts
        entry["biases"] = list(biases)
        return {key: value for key, value in entry.items() if value != []}


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
    def attentions(self) -> dict[int, AttentionLayout]:
        """The attentions that are there, by layer."""
        found = {index: layer.attention for index, layer in enumerate(self.layers)}
        return {i: part for i, part in found.items() if isinstance(part, AttentionLayout)}

    @property
    def mlps(self) -> dict[int, MlpLayout]:
        """The MLPs that are there, by layer."""
        found = {index: layer.mlp for index, layer in enumerate(self.layers)}
        return {i: part for i, part in found.items() if isinstance(part, MlpLayout)}

    def per_layer_config(self) -> dict[str, dict[str, Any]]:
        """Return what every layer holds, as ``config.json`` says it; keys sort as numbers."""
        digits = len(str(len(self.layers) - 1))
        return {f"{i:0{digits}}": layer.to_config() for i, layer in enumerate(self.layers)}


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


def projections(family: Family, kind: SubBlockKind) -> tuple[str, ...]:
    """Return the paths of the projections of a sub-block in its layer, the output last."""
    return (*family.inputs(kind), family.output(kind))


def _sub_block(
    parts: DecoderParts, index: int, kind: SubBlockKind
) -> AttentionLayout | MlpLayout | ExpertsLayout | RemovedLayout:
    module: Any = parts.sub_block(index, kind)
    if not parts.exists(index, kind):
        output = parts.family.output(kind).rpartition(".")[2]
        usual = output in ("o_proj", "down_proj")
        return RemovedLayout(module.bias is not None, None if usual else output)
    if (routed := parts.routed(index, kind)) is not None:
        return ExpertsLayout(routed.num_experts)
    linears: dict[str, nn.Module] = {
        path.rpartition(".")[2]: parts.layers[index].get_submodule(path)
        for path in projections(parts.family, kind)
    }
    biases = tuple(name for name, linear in linears.items() if linear.bias is not None)
    if kind == "mlp":
        return MlpLayout(parts.units(index, kind), biases)
    head_dim, queries_per_group = parts.head_shape(index)
    return AttentionLayout(
        kv_groups=parts.units(index, kind),
        queries_per_group=queries_per_group,
        head_dim=head_dim,
        cache_slot=int(module.layer_idx),
        biases=biases,
    )
