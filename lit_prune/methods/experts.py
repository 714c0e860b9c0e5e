"""Which requests have a rule for mixtures of experts."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lit_prune.decoder import DecoderParts, spec_for
from lit_prune.errors import ConfigError, UnsupportedModelError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from lit_prune.config import PruningConfig
    from lit_prune.methods.decision import Method

_WHOLE = {"block", "sub_block"}


def has_rule(method: Method) -> bool:
    """Return whether a method can prune a model with experts.

    One that scores units must score experts too; one that removes whole blocks need not.
    """
    return "expert" in method.granularities or set(method.granularities) <= _WHOLE


def refuse_without_rule(model: PreTrainedModel, method: Method, config: PruningConfig) -> None:
    """Refuse to prune a mixture of experts by what was never defined for one.

    Args:
        model: Any model; one without experts passes.
        method: The preset.
        config: The request, resolved by it.

    Raises:
        UnsupportedModelError: If the method, or a statistic that it reads, has no rule for experts.
        ConfigError: If layers would keep different numbers of experts, and the model's own loss
            cannot count that.
    """
    if not spec_for(model).has_experts:
        return
    from lit_prune.methods import PRESETS

    name = model.config.model_type
    if not has_rule(method):
        known = [other.name for other in PRESETS.values() if has_rule(other)]
        raise UnsupportedModelError(
            f"preset {method.name!r} has no rule for experts, and {name!r} models have them. "
            f"Presets that have one: {', '.join(known)}."
        )
    if method.all_needs(config).taylor:
        raise UnsupportedModelError(
            f"unit_score {config.unit_score!r} has no rule for experts, and {name!r} models have "
            "them. Leave it out."
        )
    if config.budget == "latency":
        raise UnsupportedModelError(
            f"budget 'latency' has no table for experts, and {name!r} models have them: how long "
            "they take depends on where tokens are routed. Take 'parameters', 'weight_bytes' or "
            "'flops'."
        )
    experts = DecoderParts(model).family.experts
    balanced = getattr(model.config, "output_router_logits", False)
    if balanced and "expert" in config.granularities and config.allocator != "uniform_widths":
        raise ConfigError(
            "config.output_router_logits is set: the load-balancing loss of transformers wants one "
            f"number of experts ({experts and experts.count}) for all layers. Prune with "
            "allocator='uniform_widths', or set config.output_router_logits = False before."
        )
