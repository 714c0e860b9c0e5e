"""The modules of a model, found through its family entry."""

from __future__ import annotations

import math
from functools import cached_property
from typing import TYPE_CHECKING

import torch
from torch import nn

from lit_prune.decoder.constant import ConstantOutput, is_constant
from lit_prune.decoder.experts import Experts, Routed
from lit_prune.decoder.families import family_of
from lit_prune.decoder.layer_config import numbers_for
from lit_prune.decoder.projections import Projection, rows_by_role
from lit_prune.decoder.spec import KINDS

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from lit_prune.decoder.family import Family
    from lit_prune.decoder.residual import SubBlock
    from lit_prune.decoder.spec import SubBlockKind


class DecoderParts:
    """Names of parts turned into modules of one model.

    Args:
        model: A supported causal language model.

    Raises:
        UnsupportedModelError: If its family is not known.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model
        self.family: Family = family_of(model)

    @cached_property
    def layers(self) -> nn.ModuleList:
        """The stack of decoder layers."""
        layers = self.model.get_submodule(self.family.layers)
        assert isinstance(layers, nn.ModuleList)  # noqa: S101 - narrows the type; a family entry says so
        return layers

    @property
    def final_norm(self) -> nn.Module:
        """The norm between the last layer and the head."""
        return self.model.get_submodule(self.family.final_norm)

    @property
    def hidden_size(self) -> int:
        """Width of the residual stream."""
        embeddings = self.model.get_input_embeddings()
        assert isinstance(embeddings, nn.Embedding)  # noqa: S101 - narrows the type
        return embeddings.weight.shape[1]

    def head_shape(self, layer: int) -> tuple[int, int]:
        """Return head dim and query heads per KV group, as the attention of a layer uses them."""
        attention, family = self.sub_block(layer, "attention"), self.family
        head_dim = int(getattr(attention, family.head_dim))
        if family.queries_per_group is not None:
            return head_dim, int(getattr(attention, family.queries_per_group))
        counts = {what: name for name, what in family.head_counts.items()}
        if not {"queries", "groups"} <= counts.keys():
            return head_dim, 1
        heads, groups = (getattr(attention, counts[what]) for what in ("queries", "groups"))
        return head_dim, int(heads) // int(groups)

    def unit_width(self, layer: int, kind: SubBlockKind) -> int:
        """Return how many columns of the output projection a unit owns."""
        return 1 if kind == "mlp" else math.prod(self.head_shape(layer))

    def units(self, layer: int, kind: SubBlockKind) -> int:
        """Return how many KV groups or channels the weights of a sub-block have, or experts."""
        if (routed := self.routed(layer, kind)) is not None:
            return routed.num_experts
        return self.output(layer, kind).in_features // self.unit_width(layer, kind)

    def sub_block_path(self, kind: SubBlockKind) -> str:
        """Return the path of a sub-block inside its layer."""
        return self.family.attention if kind == "attention" else self.family.mlp

    def norm_path(self, kind: SubBlockKind) -> str | None:
        """Return the path of the norm in front of a sub-block, inside its layer."""
        return self.family.attention_norm if kind == "attention" else self.family.mlp_norm

    def post_norm_path(self, kind: SubBlockKind) -> str | None:
        """Return the path of the norm over what a sub-block writes, inside its layer."""
        family = self.family
        return family.attention_post_norm if kind == "attention" else family.mlp_post_norm

    def shared_norm(self, layer: int) -> str | None:
        """Return the path of the norm that both sub-blocks of a layer read, where both are there.

        It leaves when both do.
        """
        norm = self.family.attention_norm
        both = norm == self.family.mlp_norm and all(self.exists(layer, kind) for kind in KINDS)
        return norm if both else None

    def norm_paths(self, layer: int, kind: SubBlockKind) -> tuple[str, ...]:
        """Return the paths of the norms that leave with a sub-block, inside its layer."""
        shared = self.shared_norm(layer)
        return tuple(path for path in self.family.norms(kind) if path != shared)

    @property
    def residual_scale(self) -> float:
        """What is multiplied with the output of a sub-block before it is added to the stream."""
        name = self.family.residual_scale
        return 1.0 if name is None else float(getattr(self.model.config, name))

    def head_counts(self, layer: int, groups: int) -> dict[str, object]:
        """Return what an attention's code reads, if it has ``groups`` KV groups, by attribute."""
        head_dim, queries = self.head_shape(layer)
        return numbers_for(
            self.family.head_counts, self.model.config,
            head_dim=head_dim, groups=groups, queries=queries,
        )  # fmt: skip

    def constant(self, layer: int, kind: SubBlockKind, bias: nn.Parameter | None) -> ConstantOutput:
        """Return what can stand in for a sub-block: a bias, or nothing."""
        return ConstantOutput(
            bias,
            returns_weights=self.returns_pair(layer, kind),
            adds_residual=self.family.adds_residual,
            whole=self.family.adds_in_place and kind == "mlp",
        )

    def per_head(self, layer: int) -> dict[str, nn.Parameter]:
        """Return the parameters of an attention with one number for each query head, by path."""
        block = self.layers[layer]
        return {path: block.get_parameter(path) for path in self.family.per_head}

    def per_layer(self, layer: int) -> tuple[object, ...]:
        """Return what the config says of one layer, beside the type of its attention."""
        lists = (getattr(self.model.config, name, None) for name in self.family.per_layer)
        return tuple(None if values is None else values[layer] for values in lists)

    def is_inside(self, layer: int, kind: SubBlockKind) -> bool:
        """Return whether the module of a sub-block holds its projections, so that it runs alone."""
        home = f"{self.sub_block_path(kind)}."
        paths = () if self.routed(layer, kind) else self.family.inputs(kind)
        return all(path.startswith(home) for path in (*paths, self.family.output(kind)))

    def sub_block(self, layer: int, kind: SubBlockKind) -> nn.Module:
        """Return the attention or MLP of a layer (a constant where it was removed)."""
        return self.layers[layer].get_submodule(self.sub_block_path(kind))

    def exists(self, layer: int, kind: SubBlockKind) -> bool:
        """Return whether the sub-block is there, not removed by an earlier pruning."""
        return not is_constant(self.sub_block(layer, kind))

    def experts_of(self, layer: int) -> Experts | None:
        """Return where the experts of a layer are; None where it has none, or a plain MLP."""
        experts = self.family.experts
        if experts is None or not self.exists(layer, "mlp"):
            return None
        return experts if experts.bank in dict(self.layers[layer].named_modules()) else None

    def routed(self, layer: int, kind: SubBlockKind = "mlp") -> Routed | None:
        """Return the experts of a sub-block; None where it has projections of its own."""
        experts = self.experts_of(layer) if kind == "mlp" else None
        if experts is None:
            return None
        block = self.layers[layer]
        return Routed(
            block.get_submodule(experts.router),
            block.get_submodule(experts.bank),
            tuple(block.get_submodule(path) for path in experts.others),
        )

    def returns_pair(self, layer: int, kind: SubBlockKind) -> bool:
        """Return whether a sub-block returns something beside its output, for the layer to drop."""
        experts = self.family.experts
        return kind == "attention" or (experts is not None and experts.returns_scores)

    def places(self) -> tuple[SubBlock, ...]:
        """Return every sub-block that is there, ``(layer, kind)``, in the order of the model."""
        return tuple(
            (layer, kind)
            for layer in range(len(self.layers))
            for kind in KINDS
            if self.exists(layer, kind)
        )

    def inputs(self, layer: int, kind: SubBlockKind) -> tuple[Projection, ...]:
        """Return the projections whose *rows* belong to units: q, k, v or gate, up (or up).

        Not of experts (`routed`), nor has `output` any there.

        Of a fused one, each its own rows.
        """
        rows = {path: list(found) for path, found in self._rows(layer, kind).items()}
        return tuple(
            self._projection(layer, path, rows[path].pop(0)) for path in self.family.roles(kind)
        )

    def input_modules(self, layer: int, kind: SubBlockKind) -> tuple[Projection, ...]:
        """Return the same, each module once: of a fused one, what a unit owns in all its roles."""
        return tuple(
            self._projection(layer, path, torch.cat(found, 1))
            for path, found in self._rows(layer, kind).items()
        )

    def output(self, layer: int, kind: SubBlockKind) -> Projection:
        """Return the projection whose *columns* belong to units: o or down."""
        return self._projection(layer, self.family.output(kind))

    def modules(self, layer: int, kind: SubBlockKind) -> tuple[nn.Module, ...]:
        """Return what leaves with a sub-block: its norms, itself, projections that lie outside."""
        inputs = () if self.routed(layer, kind) else self.family.inputs(kind)
        paths = (*self.norm_paths(layer, kind), self.sub_block_path(kind), *inputs)
        return tuple(self.layers[layer].get_submodule(path) for path in dict.fromkeys(paths))

    def output_name(self, layer: int, kind: SubBlockKind) -> str:
        """Return the full path of `output`, for messages."""
        return f"{self.family.layers}.{layer}.{self.family.output(kind)}"

    def cached_bytes(self, layer: int) -> int:
        """Return the bytes of keys and values that one token leaves in the cache of a layer."""
        _, *cached = self.inputs(layer, "attention")
        return sum(p.out_features * p.module.weight.element_size() for p in cached)

    def attended_keys(self, layer: int, context_length: int) -> int:
        """Return how many of ``context_length`` keys a token of this layer attends to."""
        module = self.sub_block(layer, "attention")
        # Qwen says per layer whether it slides (None: it does not), Mistral only in its config
        own = getattr(self.model.config, "sliding_window", None)
        window = getattr(module, "sliding_window", own)
        # Qwen2-MoE says 0 where it does not slide
        return min(context_length, int(window)) if window else context_length

    def _projection(self, layer: int, path: str, rows: torch.Tensor | None = None) -> Projection:
        module = self.layers[layer].get_submodule(path)
        return Projection(module, self.family.transposed, rows)

    def _rows(self, layer: int, kind: SubBlockKind) -> dict[str, tuple[torch.Tensor, ...]]:
        shape = self.head_shape(layer) if kind == "attention" else (1, 1)
        return rows_by_role(self.family, kind, self.units(layer, kind), *shape)
