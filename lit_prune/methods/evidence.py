"""What a decision rested on, small enough to travel in the plan: sizes before, and prices."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from lit_prune.decoder import KINDS

if TYPE_CHECKING:
    from torch import Tensor

    from lit_prune.config import PruningConfig
    from lit_prune.decoder import DecoderSpec
    from lit_prune.methods.decision import Decision
    from lit_prune.methods.entropy import Scores

_POINTS = 16  # of a damage curve, beside its start
_DAMAGE_UNITS = {
    "kl": "nats per token",
    "nll": "nats per token",
    "transfer_entropy": "nats",
    "frobenius": "squared units of the final hidden state",
    "none": "squared units of the residual stream",
}


def sizes_of(spec: DecoderSpec) -> dict[str, list[int]]:
    """Return the units of every layer before pruning; 0 where there is no such sub-block.

    Example:
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> from lit_prune import spec_for
        >>> model = LlamaForCausalLM(LlamaConfig(
        ...     hidden_size=8, intermediate_size=12, num_hidden_layers=2, num_attention_heads=2,
        ...     vocab_size=8))
        >>> sizes_of(spec_for(model))
        {'attention': [2, 2], 'mlp': [12, 12]}
    """
    found: dict[str, list[int]] = {kind: [0] * len(spec.blocks) for kind in KINDS}
    for index, part in spec.sub_blocks:
        found[part.kind][index] = part.num_units
    return found


def prices_of(
    spec: DecoderSpec, decision: Decision, scores: Scores, config: PruningConfig
) -> dict[str, Any]:
    """Return what losing each part is predicted or measured to cost; JSON-able.

    Args:
        spec: The model before pruning.
        decision: What stays, with damage curves where the method predicts them.
        scores: Transfer entropies, where they were measured.
        config: The resolved request.

    Returns:
        Empty where nothing is known of whole parts. Else ``measure`` and ``unit`` in words,
        ``whole``: for ``attention``, ``mlp`` (and ``block``) the price of losing each layer's
        whole; for predicted damage also ``cut``: the price of what goes, and ``curves``: the price
        of at most 16 equal steps from none to all of a sub-block. None where a value is not known
        or not finite.
    """
    if decision.damage:
        return _predicted(spec, decision, _DAMAGE_UNITS[str(config.sensitivity)])
    if scores.transfer:
        whole: dict[str, list[float | None]] = {}
        for unit, value in scores.transfer.items():
            row = whole.setdefault(unit.kind, [None] * len(spec.blocks))
            row[unit.layer] = _finite(value)
        nats = "activation units" if config.estimator == "std_sum" else "nats"
        return {"measure": "transfer entropy", "unit": nats, "whole": whole}
    return {}


def _predicted(spec: DecoderSpec, decision: Decision, unit: str) -> dict[str, Any]:
    counts = decision.counts
    empty = [None] * len(spec.blocks)
    rows: dict[str, dict[str, list[Any]]] = {
        name: {kind: [*empty] for kind in KINDS} for name in ("whole", "cut", "curves")
    }
    for (layer, kind), curve in decision.damage.items():
        rows["whole"][kind][layer] = _finite(curve[-1])
        rows["cut"][kind][layer] = _finite(curve[len(curve) - 1 - counts[layer, kind]])
        rows["curves"][kind][layer] = _thinned(curve)
    return {"measure": "predicted damage", "unit": unit, **rows}


def _thinned(curve: Tensor) -> list[float | None]:
    last = len(curve) - 1
    steps = min(last, _POINTS)
    return [_finite(curve[round(step * last / steps)]) for step in range(steps + 1)]


def _finite(value: Tensor | float) -> float | None:
    """Return four significant digits: the plan is read by people and by pictures."""
    number = float(value)
    return float(f"{number:.4g}") if math.isfinite(number) else None
