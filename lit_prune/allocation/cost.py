"""What a selection of unit counts costs, in the resource that the budget is expressed in."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from lit_prune.config import RESOURCES
from lit_prune.decoder import constant_bytes, shared_bytes, spec_for, unit_prices
from lit_prune.errors import CalibrationError

if TYPE_CHECKING:
    from collections.abc import Mapping

    import numpy.typing as npt
    from transformers import PreTrainedModel

    from lit_prune.config import PruningConfig, Resource
    from lit_prune.decoder import DecoderSpec, SubBlock


@dataclass(frozen=True, slots=True, kw_only=True)
class Cost:
    """One resource, added up over sub-blocks. Whole numbers, so that sums are exact in any order.

    Attributes:
        resource: What is counted: parameters, FLOPs for one token, bytes of cache for one token,
            bytes of weights, or nanoseconds.
        kept: What each sub-block costs when it keeps 0, 1, … all of its units; never falling.
        shared: What a layer costs beside its two sub-blocks, by index, while one of them stays.
        bias: What each bias that compensation adds costs.
        constant: What no plan can change (constants that an earlier pruning left).
        notes: What the report has to say about it.
    """

    resource: Resource
    kept: Mapping[SubBlock, tuple[int, ...]]
    shared: Mapping[int, int] = field(default_factory=dict)
    bias: int = 0
    constant: int = 0
    notes: tuple[str, ...] = ()

    @property
    def words(self) -> str:
        """The resource as people read it."""
        return RESOURCES[self.resource]

    @property
    def total(self) -> int:
        """What the decoder layers cost as they are: what a ratio is a fraction of."""
        kept = sum(costs[-1] for costs in self.kept.values())
        return self.constant + kept + sum(self.shared.values())

    def of(self, counts: Mapping[SubBlock, int], new_biases: int = 0) -> int:
        """Return what is left of it when each sub-block keeps ``counts`` units."""
        kept = sum(costs[counts[place]] for place, costs in self.kept.items())
        shared = 0
        if self.shared:
            stay = {layer for (layer, _), count in counts.items() if count}
            shared = sum(self.shared.get(layer, 0) for layer in stay)
        return self.constant + kept + shared + self.bias * new_biases


def cost_of(
    model: PreTrainedModel,
    config: PruningConfig,
    latency: Mapping[SubBlock, npt.ArrayLike] | None = None,
) -> Cost:
    """Return what sub-blocks of ``model`` cost in the resource that ``config.budget`` names.

    Args:
        model: The dense model; only its shapes and dtypes are read.
        config: The request.
        latency: Measured times of each sub-block, for a budget in latency; as in `latency_cost`.

    Raises:
        CalibrationError: If the budget is in latency and nothing was measured.

    Example:
        >>> from lit_prune.config import PruningConfig
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> model = LlamaForCausalLM(LlamaConfig(
        ...     hidden_size=8, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2,
        ...     num_key_value_heads=2, vocab_size=10))
        >>> cost = cost_of(model, PruningConfig(pruning_ratio=0.3, budget="kv_cache_bytes"))
        >>> cost.total, cost.kept[0, "attention"], set(cost.kept[0, "mlp"])
        (128, (0, 32, 64), {0})
    """
    spec, resource = spec_for(model), config.budget
    if resource == "parameters":
        return parameter_cost(spec)
    if resource == "latency":
        if latency is None:
            raise CalibrationError(
                "calibration has no latency table, which budget='latency' needs: it was made for "
                "another request. Calibrate again with this budget."
            )
        return latency_cost(spec, latency)
    longest = getattr(model.config, "max_position_embeddings", None)
    prices = unit_prices(model, resource, context_length=config.prompt_tokens(longest))
    kept = {
        (index, part.kind): _linear(
            part.num_units, prices[index, part.kind].unit, prices[index, part.kind].fixed
        )
        for index, part in spec.sub_blocks
    }
    return Cost(
        resource=resource,
        kept=kept,
        shared=shared_bytes(model) if resource == "weight_bytes" else {},
        bias=max(price.bias for price in prices.values()),
        constant=constant_bytes(model) if resource == "weight_bytes" else 0,
    )


def parameter_cost(spec: DecoderSpec) -> Cost:
    """Return what sub-blocks cost in parameters."""
    kept = {
        (index, part.kind): _linear(part.num_units, part.unit_parameters, part.fixed_parameters)
        for index, part in spec.sub_blocks
    }
    return Cost(
        resource="parameters",
        kept=kept,
        shared={b.index: b.shared_parameters for b in spec.blocks if b.shared_parameters},
        bias=spec.hidden_size,
        constant=sum(block.constant_parameters for block in spec.blocks),
    )


def latency_cost(spec: DecoderSpec, measured: Mapping[SubBlock, npt.ArrayLike]) -> Cost:
    """Return what sub-blocks cost in nanoseconds, from what was measured of some of their counts.

    Between two measured counts the time is interpolated, below the first it is the first's.
    Measured times are noisy, and may fall where units are added: the nearest rising ones (isotonic
    regression, least squares) take their place.

    Args:
        spec: The decoder.
        measured: For each sub-block, rows of (kept units, seconds), ascending by units.

    Raises:
        CalibrationError: If a sub-block was not measured, or its times cannot be times.

    Example:
        >>> from lit_prune.decoder.spec import BlockSpec, DecoderSpec, MlpSpec
        >>> sizes = {"unit_parameters": 6, "fixed_parameters": 2, "output_bias": True}
        >>> mlp = MlpSpec(name="mlp", num_channels=8, **sizes)
        >>> blocks = (BlockSpec(index=0, name="0", attention=None, mlp=mlp),)
        >>> spec = DecoderSpec(model_type="t", hidden_size=2, blocks=blocks, total_parameters=60,
        ...                    fingerprint="")
        >>> cost = latency_cost(spec, {(0, "mlp"): [(2, 2e-6), (6, 4e-6), (8, 3e-6)]})
        >>> cost.kept[0, "mlp"]
        (0, 2000, 2000, 2375, 2750, 3125, 3500, 3500, 3500)
        >>> cost.notes
        ('latency: measured times of 1 sub-blocks fell where units were added, by up to 25 %; ...',)
    """
    # slow to import, and few budgets are in latency
    from sklearn.isotonic import isotonic_regression

    kept: dict[SubBlock, tuple[int, ...]] = {}
    falls = []
    for index, part in spec.sub_blocks:
        table = np.asarray(measured.get((index, part.kind), ()), dtype=np.float64)
        _check_ladder(table, f"layer {index} {part.kind}")
        units, seconds = table.T
        rising = isotonic_regression(seconds)
        every = np.interp(np.arange(1, part.num_units + 1), units, rising)
        nanoseconds = np.maximum(np.rint(every * 1e9), 1).astype(np.int64)
        kept[index, part.kind] = (0, *nanoseconds.tolist())
        falls.append(float((1 - seconds / np.maximum.accumulate(seconds)).max()))
    notes = []
    if any(falls):
        notes.append(
            f"latency: measured times of {sum(fall > 0 for fall in falls)} sub-blocks fell where "
            f"units were added, by up to {100 * max(falls):.0f} %; the nearest rising times "
            "(isotonic regression) are used"
        )
    return Cost(resource="latency", kept=kept, notes=tuple(notes))


def _check_ladder(table: npt.NDArray[np.float64], name: str) -> None:
    good = table.ndim == 2 and table.shape[-1] == 2 and len(table) > 0
    if not (good and np.isfinite(table).all() and (table > 0).all() and _ascends(table[:, 0])):
        raise CalibrationError(
            f"the latency table of {name} is {table.tolist()}; expected rows of (kept units, "
            "seconds), positive and ascending by units. Calibrate again."
        )


def _ascends(units: npt.NDArray[np.float64]) -> bool:
    return bool((np.diff(units) > 0).all())


def _linear(num_units: int, unit: int, fixed: int) -> tuple[int, ...]:
    return (0, *(fixed + unit * count for count in range(1, num_units + 1)))
