"""Format ``stock``: a directory that plain transformers loads, with nothing of ours installed."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lit_prune.decoder.layout import ExpertsLayout
from lit_prune.errors import FormatError
from lit_prune.saving.body import Widths, body_of
from lit_prune.saving.carrier import carry

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from lit_prune.saving.body import Body
    from lit_prune.saving.prepared import PreparedDirectory


def stock(model: PreTrainedModel) -> PreparedDirectory:
    """Prepare a model whose layers are alike: in its own class, or in one that holds its biases.

    Depth is free: empty layers leave, and a constant in place of the first ones moves into the
    embeddings (or, where they are tied to the head, stays as a layer of zeros with a bias).

    Raises:
        FormatError: If layers differ, or no class of transformers holds what is needed.
    """
    body = body_of(model)
    _refuse_differences(body)
    return carry(model, body, Widths.of(body), "stock", padded=False)


def _refuse_differences(body: Body) -> None:
    first: dict[str, tuple[int, int]] = {}
    for index, layer in body.layers.items():
        if index in body.shells:
            continue
        sizes = {
            "num_key_value_heads": getattr(layer.attention, "kv_groups", None),
            "intermediate_size": getattr(layer.mlp, "channels", None),
        }
        if isinstance(layer.mlp, ExpertsLayout):
            del sizes["intermediate_size"]
            sizes["num_experts"] = layer.mlp.experts
        for key, size in sizes.items():
            if size is None:
                part = "attention" if key == "num_key_value_heads" else "MLP"
                raise _refused(f"layer {index} has no {part}, a stock class builds one everywhere")
            where, wanted = first.setdefault(key, (index, size))
            if size != wanted:
                raise _refused(
                    f"layer {index} has {key} {size} and layer {where} has {wanted}, a stock class "
                    "has one for all layers"
                )


def _refused(reason: str) -> FormatError:
    return FormatError("stock", reason)
