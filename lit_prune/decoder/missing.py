"""What a family entry names must be there: never a silent skip."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import nn

from lit_prune.decoder.constant import is_constant
from lit_prune.decoder.spec import KINDS
from lit_prune.errors import UnsupportedModelError

if TYPE_CHECKING:
    from lit_prune.decoder.parts import DecoderParts


def refuse_missing_parts(parts: DecoderParts) -> None:
    """Refuse a model that lacks what its family entry names.

    Raises:
        UnsupportedModelError: Names the first part that is not there.
    """
    family = parts.family

    def find(owner: nn.Module, path: str, where: str) -> nn.Module:
        try:
            return owner.get_submodule(path)
        except AttributeError as error:
            raise UnsupportedModelError(
                f"{where} has no module {path!r}, which the family entry of {family.model_type!r} "
                "names. Correct the entry (lit_prune.decoder.Family), or load the model with the "
                "class that the entry was written for."
            ) from error

    layers = find(parts.model, family.layers, type(parts.model).__name__)
    for path in filter(None, (family.final_norm, family.embedding_norm)):
        find(parts.model, path, type(parts.model).__name__)
    if not isinstance(layers, nn.ModuleList):
        raise UnsupportedModelError(
            f"{family.layers} is a {type(layers).__name__}, expected a torch.nn.ModuleList of "
            f"decoder layers; see the family entry of {family.model_type!r}."
        )
    _check_config(parts)
    for index, layer in enumerate(layers):
        where = f"{family.layers}.{index}"
        for kind in KINDS:
            module = find(layer, parts.sub_block_path(kind), where)
            for path in family.norms(kind):
                find(layer, path, where)
            if is_constant(module):
                continue
            if kind == "mlp" and (experts := parts.experts_of(index)):
                for path in (experts.router, *experts.others):
                    find(layer, path, where)
                _check_router(layer.get_submodule(experts.router), f"{where}.{experts.router}")
                continue
            chain = family.mlp_chain if kind == "mlp" else ()
            for path in (*chain, *family.inputs(kind), family.output(kind)):
                find(layer, path, where)
            if kind == "attention":
                _check_attention(parts, layer, module, where)


def _check_attention(
    parts: DecoderParts, layer: nn.Module, attention: nn.Module, where: str
) -> None:
    family = parts.family
    read = (family.head_dim, family.queries_per_group, *family.head_counts)
    for name in filter(None, read):
        found: Any = attention
        for part in name.split("."):
            found = getattr(found, part, None)
        if not isinstance(found, int):
            raise UnsupportedModelError(
                f"{where}.{family.attention} has no number {name!r}, which lit_prune reads of "
                f"{family.model_type!r} models: got {found!r}."
            )
    owned = dict(layer.named_parameters())
    named = (*family.attention_extras, *family.per_head)
    if missing := [name for name in named if name not in owned]:
        raise UnsupportedModelError(
            f"{where} has no parameter {missing[0]!r}, which the family entry of "
            f"{family.model_type!r} names as one of its attention's."
        )


def _check_router(router: nn.Module, where: str) -> None:
    top_k, owned = getattr(router, "top_k", None), dict(router.named_parameters())
    if not isinstance(top_k, int) or "weight" not in owned:
        raise UnsupportedModelError(
            f"{where} is a {type(router).__name__} with top_k {top_k!r} and parameters "
            f"{sorted(owned)}: lit_prune reads a number 'top_k' and a parameter 'weight' of a "
            "router (lit_prune.decoder.Experts)."
        )


def _check_config(parts: DecoderParts) -> None:
    family, config, count = parts.family, parts.model.config, len(parts.layers)
    scale = family.residual_scale
    if scale is not None and not isinstance(getattr(config, scale, None), int | float):
        raise UnsupportedModelError(
            f"config.{scale} is {getattr(config, scale, None)!r}, expected a number: the family "
            f"entry of {family.model_type!r} names it as what scales the residual."
        )
    for name in family.per_layer:
        values = getattr(config, name, None)
        if values is not None and len(values) != count:
            raise UnsupportedModelError(
                f"config.{name} has {len(values)} entries, the model {count} layers."
            )
