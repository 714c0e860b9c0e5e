"""From what people ask for to a ratio, as soon as it is known; and what cannot be, refused."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

from lit_prune.allocation.budget import check_layers, make_budget, within_family
from lit_prune.allocation.cost import cost_of
from lit_prune.amounts import amount_of
from lit_prune.decoder import DecoderParts, spec_for, whole_of
from lit_prune.errors import BudgetError

if TYPE_CHECKING:
    from collections.abc import Mapping

    import numpy.typing as npt
    from transformers import PreTrainedModel

    from lit_prune.config import PruningConfig, Resource
    from lit_prune.decoder import SubBlock

    Latency = Mapping[SubBlock, npt.ArrayLike]


def aimed(
    model: PreTrainedModel, config: PruningConfig, latency: Latency | None = None
) -> PruningConfig:
    """Return the request with its target turned into a ratio, where that is known by now.

    ``target_parameters`` and ``target_bytes`` count the whole model: what is not in its decoder
    layers stays, so that these have to lose all that is too much. They are met from below: the
    window of the ratio lies wholly at or under the target. A ``target_speedup`` needs the latency
    table, ``max_perplexity_increase`` a search: without, the request is returned as it is.

    Args:
        model: The dense model; only shapes and dtypes are read.
        config: The (resolved) request.
        latency: Measured times of each sub-block, as `cost_of` takes them.

    Raises:
        BudgetError: If the model is within the target as it is, or what is not in its decoder
            layers alone is beyond it.

    Example:
        >>> from lit_prune.config import PruningConfig
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> model = LlamaForCausalLM(LlamaConfig(
        ...     hidden_size=8, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2,
        ...     vocab_size=10))  # 1480 parameters, 1312 of them in decoder layers
        >>> aim = aimed(model, PruningConfig(target_parameters="1.2k"))
        >>> aim.target, round(aim.ratio, 4), aim.ratio_tolerance
        ('pruning_ratio', 0.2159, 0.0025)
    """
    asked, value = config.target, getattr(config, config.target)
    if asked == "target_speedup" and latency is not None:
        return replace(config, target_speedup=None, pruning_ratio=1 - 1 / amount_of(asked, value))
    if asked not in ("target_parameters", "target_bytes"):
        return config
    wanted, spec, budget = amount_of(asked, value), spec_for(model), config.budget
    whole, decoder = spec.total_parameters, spec.decoder_parameters
    if asked == "target_bytes":
        dtypes = {parameter.dtype for parameter in DecoderParts(model).layers.parameters()}
        # of one dtype, bytes are parameters, which every preset counts
        budget = "weight_bytes" if len(dtypes) > 1 else "parameters"
        whole = sum(parameter.nbytes for parameter in whole_of(model).parameters())
        decoder = sum(parameter.nbytes for parameter in DecoderParts(model).layers.parameters())
    return _met_from_below(config, asked, wanted, (whole, decoder), budget)


def _met_from_below(
    config: PruningConfig, asked: str, wanted: float, sizes: tuple[int, int], budget: Resource
) -> PruningConfig:
    whole, decoder = sizes
    what = {"target_parameters": "parameters", "target_bytes": "bytes of weights"}[asked]
    said = f"{asked} {getattr(config, asked)!r}"
    if wanted >= whole:
        raise BudgetError(
            f"{said}: the model has {whole:,} {what} as it is: nothing has to go. Ask for fewer."
        )
    tolerance = config.ratio_tolerance / 2
    ratio = (whole - wanted) / decoder + tolerance
    if ratio >= 1:
        raise BudgetError(
            f"{said}: embeddings, head and final norm alone have {whole - decoder:,} {what}, which "
            f"pruning leaves as they are, of {whole:,} in all. Ask for more than that."
        )
    options: dict[str, Any] = {asked: None, "pruning_ratio": ratio, "ratio_tolerance": tolerance}
    return replace(config, budget=budget, **options)


def refuse_impossible(
    model: PreTrainedModel, config: PruningConfig, latency: Latency | None = None
) -> None:
    """Refuse a (resolved) request that no plan can meet, as far as that is known before measuring.

    Everything is, but for a budget in latency: its ratios are known when its table was measured.
    What perplexity allows is found by a search, later.

    Args:
        model: The dense model.
        config: The request.
        latency: Measured times of each sub-block, once they are known.

    Raises:
        UnsupportedModelError: If the family can lose nothing of what the request allows.
        ConfigError: If a protected layer does not exist, or everything is protected.
        BudgetError: If the target cannot be reached; names what can.
    """
    spec = spec_for(model)
    if config.budget == "latency" and latency is None:
        within_family(spec, config)
        check_layers(spec, config)
        return
    aim = aimed(model, config, latency)
    try:
        make_budget(spec, aim, cost_of(model, aim, latency))
    except BudgetError as error:
        if config.target == aim.target:
            raise
        said = f"{config.target} {getattr(config, config.target)!r}"
        if config.target == "target_speedup":
            said += " of the decoder layers (a ratio r of their time is 1 / (1 - r) times as fast)"
        raise BudgetError(f"{said}: {error}") from error
