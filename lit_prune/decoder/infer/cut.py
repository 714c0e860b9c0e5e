"""Whether a layer computes the same of what is left when units, or a sub-block, were cut."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from lit_prune.decoder.constant import ConstantOutput
from lit_prune.decoder.infer.trial import same
from lit_prune.decoder.layer_config import numbers_for
from lit_prune.decoder.projections import Projection, kept_lines, rows_by_role

if TYPE_CHECKING:
    from collections.abc import Mapping

    from lit_prune.decoder.family import Family, HeadCount
    from lit_prune.decoder.infer.stream import StreamFound
    from lit_prune.decoder.infer.trial import Trial
    from lit_prune.decoder.spec import SubBlockKind


def same_when_cut(
    trial: Trial,
    family: Family,
    kind: SubBlockKind,
    sizes: tuple[int, int, int],
    counts: Mapping[str, HeadCount] | None = None,
) -> bool:
    """Cut the first unit from a copy of the layer, and compare what the others hand on.

    Args:
        trial: The layer.
        family: Where the projections of the sub-block are.
        kind: Which sub-block.
        sizes: Head dim, KV groups, query heads per group; of an MLP 1, channels, 1.
        counts: Attributes of an attention to set to what is left, with what each counts.

    Returns:
        Whether it runs, and its output projection reads the same numbers of the units that stay.

    Example:
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> from lit_prune.decoder import Family
        >>> from lit_prune.decoder.infer.outside import watch
        >>> config = LlamaConfig(hidden_size=16, intermediate_size=24, num_hidden_layers=1,
        ...                      vocab_size=32, num_attention_heads=4, num_key_value_heads=2)
        >>> trial, llama = watch(LlamaForCausalLM(config)).trial(0), Family(model_type="")
        >>> [same_when_cut(trial, llama, "attention", (width, 2, 2)) for width in (4, 2)]
        [True, False]
    """
    width, units, shared = sizes
    kept = list(range(1, units))  # all but the first: an offset would show
    columns = torch.arange(units * shared * width).reshape(units, -1)[kept].flatten()
    layer = copy.deepcopy(trial.layer)
    for path, found in rows_by_role(family, kind, units, width, shared).items():
        lines = kept_lines(torch.cat(found, 1), kept)
        _cut(layer.get_submodule(path), lines, family.transposed, rows=True)
    _cut(layer.get_submodule(family.output(kind)), columns, family.transposed, rows=False)
    if counts:
        attention: Any = layer.get_submodule(family.attention)
        left = numbers_for(
            counts, getattr(attention, "config", None),
            head_dim=width, groups=len(kept), queries=shared,
        )  # fmt: skip
        for name, value in left.items():
            setattr(attention, name, value)
    try:
        after = trial.run(layer=layer)[family.output(kind)].entered
    except (RuntimeError, ValueError, TypeError, IndexError):  # its shapes do not fit: an answer
        return False
    before = trial.calls[family.output(kind)].entered
    if before is None or after is None:
        return False
    return same(after, trial.by_token(before)[..., columns.to(before.device)])


def refuse_standing_in(trial: Trial, stream: StreamFound) -> None:
    """Take out one sub-block, then the other: the layer must add what the other one writes.

    Raises:
        UnsupportedModelError: If it does not, or does not run.
    """
    for found, other in ((stream.attention, stream.mlp), (stream.mlp, stream.attention)):
        layer = copy.deepcopy(trial.layer)
        outside = {*found.inputs, found.norm, found.post_norm} - {other.norm, None}
        for path in outside:
            if path is not None and not path.startswith(f"{found.path}."):
                layer.set_submodule(path, nn.Identity())
        pair = found is stream.attention
        constant = ConstantOutput(None, returns_weights=pair, adds_residual=found.adds_residual)
        layer.set_submodule(found.path, constant)
        try:
            calls = trial.run(layer=layer)
        except (RuntimeError, ValueError, TypeError, IndexError) as error:
            raise trial.refusal(
                f"does not run with a constant in the place of {found.path}: "
                f"{type(error).__name__}, {error}"
            ) from error
        written = calls[other.post_norm or other.output].output.reshape(trial.hidden.shape)
        if not same(calls[""].output, trial.hidden + stream.scale * written):
            raise trial.refusal(f"adds more than {other.path} writes where {found.path} is gone")


def _cut(module: Any, lines: torch.Tensor, transposed: bool, *, rows: bool) -> None:  # noqa: ANN401
    projection = Projection(module, transposed)
    index = lines.to(module.weight.device)
    dim = projection.dim(rows=rows)
    module.weight = nn.Parameter(module.weight.detach().index_select(dim, index))
    if rows and module.bias is not None:
        module.bias = nn.Parameter(module.bias.detach()[index])
    setattr(module, projection.size_names()[not rows], len(lines))
