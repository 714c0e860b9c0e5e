"""What a request may remove, and whether its ratio can be reached: known before any scoring."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from lit_prune.allocation.alike import alike_choice
from lit_prune.allocation.cost import Cost, parameter_cost
from lit_prune.allocation.exact import ReachableTotals
from lit_prune.allocation.uniform import uniform_choice, uniform_choices
from lit_prune.decoder import AttentionSpec, SubBlock, all_kept, remainder
from lit_prune.errors import BudgetError, ConfigError, UnsupportedModelError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from lit_prune.config import PruningConfig
    from lit_prune.decoder import DecoderSpec
    from lit_prune.decoder.spec import SubBlockSpec

_FAVOURITE_MULTIPLES = (64, 32, 16, 8, 4, 2)


@dataclass(frozen=True, slots=True)
class Budget:
    """A request against one model.

    Attributes:
        spec: The decoder.
        config: The request, as far as the model's family allows it.
        channel_multiple: Kept channel counts are multiples of it, or all.
        allowed: Unit counts that each sub-block may keep, ascending; 0 where it may be removed
            whole.
        cost: What unit counts cost in the resource of the request.
        notes: What the model's family made of the request, in words.
    """

    spec: DecoderSpec
    config: PruningConfig
    channel_multiple: int
    allowed: dict[SubBlock, tuple[int, ...]]
    cost: Cost
    notes: tuple[str, ...] = ()

    @property
    def target(self) -> float:
        """How much to remove, in the unit of `cost`."""
        return self.config.ratio * self.cost.total

    @property
    def tolerance(self) -> float:
        """By how much the removal may miss its target."""
        return self.config.ratio_tolerance * self.cost.total

    @property
    def bias(self) -> int:
        """What a new bias costs; 0 where compensation adds none."""
        return self.cost.bias if self.config.adds_constants else 0

    def constants(self, counts: Mapping[SubBlock, int]) -> set[SubBlock]:
        """Return the sub-blocks whose cut units leave a constant behind."""
        if not self.config.adds_constants:
            return set()
        parts = {(index, part.kind): part for index, part in self.spec.sub_blocks}
        cut = {
            place
            for place, count in counts.items()
            if count < parts[place].num_units and parts[place].takes_constant
        }
        return {place for place in cut if counts[place] or self.config.removed_mean == "add"}

    def removed(self, counts: Mapping[SubBlock, int]) -> int:
        """Return how much leaves, less the biases that compensation adds. Exact."""
        biases = 0
        if self.cost.bias:
            biases = remainder(self.spec, counts, self.constants(counts)).new_biases
        return self.cost.total - self.cost.of(counts, biases)

    def achieved(self, counts: Mapping[SubBlock, int]) -> float:
        """Return what leaves as a fraction."""
        return self.removed(counts) / self.cost.total

    def removed_parameters(self, counts: Mapping[SubBlock, int]) -> int:
        """Return the parameters that leave, whatever the budget is expressed in."""
        left = remainder(self.spec, counts, self.constants(counts))
        return self.spec.decoder_parameters - left.num_parameters

    def deficit(self, counts: Mapping[SubBlock, int]) -> float:
        """Return how much too little is removed (negative: too much)."""
        return self.target - self.removed(counts)

    def met_by(self, counts: Mapping[SubBlock, int]) -> bool:
        """Return whether the ratio is met within its tolerance."""
        return abs(self.deficit(counts)) <= self.tolerance

    def nearest(self, place: SubBlock, wanted: float) -> int:
        """Return the allowed count above zero that is nearest, the larger of two."""
        # Around 1e-9 of a unit is rounding of `wanted`, not a preference.
        return min(
            (count for count in self.allowed[place] if count),
            key=lambda count: (round(abs(count - wanted), 9), -count),
        )

    def at_most(self, place: SubBlock, cut: float) -> int:
        """Return the smallest allowed count above zero that cuts at most ``cut`` units."""
        units = max(self.allowed[place])
        return min(count for count in self.allowed[place] if count and count >= units - cut)


def make_budget(spec: DecoderSpec, config: PruningConfig, cost: Cost | None = None) -> Budget:
    """Turn a request into a budget, or refuse it.

    Args:
        spec: The model.
        config: The request.
        cost: What unit counts cost in the resource of the request (`cost_of`); None: parameters.

    Raises:
        UnsupportedModelError: If the family can lose nothing of what the request allows.
        ConfigError: If a protected layer does not exist, or everything is protected.
        BudgetError: If the ratio cannot be reached; names what can.

    Example:
        >>> from lit_prune.config import PruningConfig
        >>> from lit_prune.decoder.spec import BlockSpec, DecoderSpec, MlpSpec
        >>> sizes = {"unit_parameters": 6, "fixed_parameters": 2, "output_bias": True}
        >>> mlp = MlpSpec(name="mlp", num_channels=8, **sizes)
        >>> blocks = (BlockSpec(index=0, name="0", attention=None, mlp=mlp),)
        >>> spec = DecoderSpec(model_type="t", hidden_size=2, blocks=blocks, total_parameters=60,
        ...                    fingerprint="")
        >>> make_budget(spec, PruningConfig(pruning_ratio=0.3, granularities=["block"]))
        Traceback (most recent call last):
        lit_prune.errors.BudgetError: pruning_ratio 0.3 of the decoder parameters cannot be...
    """
    config, notes = within_family(spec, config)
    check_layers(spec, config)
    cost = cost or parameter_cost(spec)
    if cost.resource != config.budget:
        raise ConfigError(f"budget is {config.budget!r}, the cost is of {cost.resource!r}.")
    multiple = config.channel_multiple or _auto_multiple(spec, config, cost)
    budget = Budget(spec, config, multiple, _allowed(spec, config, multiple), cost, notes)
    if config.pruning_ratio:
        _refuse_unreachable(budget)
    return budget


def within_family(
    spec: DecoderSpec, config: PruningConfig
) -> tuple[PruningConfig, tuple[str, ...]]:
    """Leave out of a request what the model's family cannot lose exactly.

    Returns:
        The request that is left, and what the report says about the rest.

    Raises:
        UnsupportedModelError: If nothing is left.
    """
    refused = {g: why for g, why in spec.refused if g in config.granularities}
    left = tuple(g for g in config.granularities if g not in refused)
    notes = [
        f"granularity {g!r} was left out: {spec.model_type} models cannot lose it exactly, as {why}"
        for g, why in refused.items()
    ]
    if not left:
        raise UnsupportedModelError(
            f"granularities {list(config.granularities)}: {spec.model_type} models cannot lose "
            f"them exactly, as {next(iter(refused.values()))}. Allow others."
        )
    if config.add_biases is None:
        config = replace(
            config, add_biases=spec.keeps_biases or config.compensation != "sequential"
        )
    if not spec.keeps_biases and config.compensation not in (None, "none"):
        notes.append(_without_biases(spec, config))
    whole = {"block", "sub_block"} & set(left)
    if not spec.removed_constants and config.adds_constants and config.removed_mean == "add":
        config = replace(config, removed_mean="drop")
        if whole:
            notes.append(
                "no constant stands in for a sub-block that goes whole (removed_mean 'drop'): in "
                f"{spec.model_type} models {spec.why_no_constants}"
            )
    if spec.has_experts and "expert" in left and config.compensation not in (None, "none"):
        notes.append(
            f"compensation {config.compensation!r} does not reach experts: tokens of those that "
            "leave are routed to the next best that stay, and no weight or bias is fitted there"
        )
    return replace(config, granularities=left) if refused else config, tuple(notes)


def _without_biases(spec: DecoderSpec, config: PruningConfig) -> str:
    """Say what follows for a family whose saved models can hold no output biases."""
    none = f"no format of save_pruned holds biases of {spec.model_type} models"
    if not config.add_biases:
        return f"{none}: weights alone were fitted (add_biases=True adds biases nevertheless)"
    if config.compensation == "sequential":
        return f"{none}: as they are added, the pruned model cannot be saved"
    return (
        f"compensation {config.compensation!r} is a bias, and {none}: the pruned model cannot be "
        "saved; compensation 'sequential' does without"
    )


def check_layers(spec: DecoderSpec, config: PruningConfig) -> None:
    """Refuse protected layers that do not exist, or that leave nothing to remove.

    Raises:
        ConfigError: Names them.
    """
    count = len(spec.blocks)
    if wrong := [layer for layer in config.protected_layers if not 0 <= layer < count]:
        raise ConfigError(
            f"protected_layers has {wrong[0]}, the model's layers are 0 … {count - 1}"
            + (f"; for the last layer write {count - 1}." if wrong[0] < 0 else ".")
        )
    if config.pruning_ratio and set(config.protected_layers) >= set(range(count)):
        raise ConfigError(
            f"protected_layers protects all {count} layers: nothing could be removed."
        )


def _auto_multiple(spec: DecoderSpec, config: PruningConfig, cost: Cost) -> int:
    """Return the largest hardware-friendly multiple whose step is fine enough for the ratio."""
    mlps = [
        cost.kept[index, part.kind] for index, part in spec.sub_blocks if part.unit == "channel"
    ]
    if not mlps:
        return config.tensor_parallel
    channels = min(len(costs) - 1 for costs in mlps)
    # what one channel costs, on average: measured times rise in steps
    step = max((costs[-1] - costs[1]) / max(len(costs) - 2, 1) for costs in mlps) * (
        len(mlps) if config.allocator in ("uniform", "uniform_widths") else 1
    )
    for multiple in _FAVOURITE_MULTIPLES:
        even = multiple % config.tensor_parallel == 0
        fine = step * multiple <= config.ratio_tolerance * cost.total
        if even and multiple <= channels // 4 and fine:
            return multiple
    return config.tensor_parallel


def _allowed(
    spec: DecoderSpec, config: PruningConfig, multiple: int
) -> dict[SubBlock, tuple[int, ...]]:
    allowed: dict[SubBlock, tuple[int, ...]] = {}
    degree = config.tensor_parallel
    whole = {"block", "sub_block"} & set(config.granularities) and config.allocator != "uniform"
    for index, part in spec.sub_blocks:
        if not _spreads(part, part.num_units, degree):
            raise ConfigError(
                f"tensor_parallel {degree} does not divide the {part.num_units} "
                f"{'KV groups' if part.kind == 'attention' else 'channels'} of layer {index} "
                f"{part.kind}: even the dense model cannot be spread so."
            )
        counts = {part.num_units}
        if index not in config.protected_layers:
            if part.kind == "attention" and "kv_group" in config.granularities:
                fewer = range(config.min_kv_groups, part.num_units)
                counts.update(count for count in fewer if _spreads(part, count, degree))
            if part.unit == "channel" and "channel" in config.granularities:
                counts.update(range(multiple, part.num_units, multiple))
            if part.unit == "expert" and "expert" in config.granularities:
                counts.update(range(part.least_units, part.num_units))
            if whole:
                counts.add(0)
        allowed[index, part.kind] = tuple(sorted(counts))
    return allowed


def _spreads(part: SubBlockSpec, count: int, degree: int) -> bool:
    """Return whether so many units can be spread evenly over devices."""
    if part.unit == "expert":  # what is spread is the width of every expert
        return True
    if not isinstance(part, AttentionSpec):
        return count % degree == 0
    copied = degree % count == 0  # each KV head to several devices
    return (count * part.queries_per_group) % degree == 0 and (copied or count % degree == 0)


def _refuse_unreachable(budget: Budget) -> None:
    """Refuse a ratio that no choice of counts can meet, naming the nearest that can be met."""
    total = budget.cost.total
    if not total:
        raise BudgetError(f"the model has no {budget.cost.words}: nothing could be removed.")
    if budget.config.allocator == "uniform_widths":
        alike_choice(budget, {place: [0.0] * (n + 1) for place, n in all_kept(budget.spec).items()})
        return
    if budget.config.allocator == "uniform":
        found = [uniform_choice(budget)]
    else:
        totals = ReachableTotals(budget)
        nearest = [x for x in totals.nearest(budget.target) if x is not None]
        found = [totals.counts(x, all_kept(budget.spec)) for x in nearest]
    if any(budget.met_by(counts) and counts != all_kept(budget.spec) for counts in found):
        return
    if budget.config.allocator == "uniform":
        most = max(budget.removed(counts) for _, counts in uniform_choices(budget))
    else:
        most = totals.most()
    near = " and ".join(f"{budget.achieved(counts):.4f}" for counts in found) or "0"
    raise BudgetError(
        f"pruning_ratio {budget.config.ratio:g} of the {budget.cost.words} cannot be "
        f"reached within {budget.config.ratio_tolerance * 100:g} percentage points by allocator "
        f"{budget.config.allocator!r} with granularities {list(budget.config.granularities)}, "
        f"channel_multiple {budget.channel_multiple}, min_kv_groups "
        f"{budget.config.min_kv_groups} and {len(budget.config.protected_layers)} protected "
        f"layer(s): the reachable ratios lie in [0, {max(most, 0) / total:.4f}], the nearest are "
        f"{near}. Allow more granularities, a smaller channel_multiple, or ask for one of these."
    )
