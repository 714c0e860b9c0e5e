"""What a request may remove from a model, and whether its ratio can be reached at all: known before any scoring."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from lit_prune.allocation.reachable import reachable_totals
from lit_prune.config import RATIO_TOLERANCE
from lit_prune.decoder import SubBlock, all_kept, remainder
from lit_prune.errors import BudgetError, ConfigError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from lit_prune.config import PruningConfig
    from lit_prune.decoder import DecoderSpec

_FAVOURITE_MULTIPLES = (64, 32, 16, 8, 4, 2, 1)


@dataclass(frozen=True, slots=True)
class Budget:
    """A request against one model, in parameters.

    Attributes:
        spec: The decoder.
        config: The request.
        channel_multiple: Kept channel counts are multiples of it, or all.
        allowed: Unit counts that each sub-block may keep, ascending; 0 where it may be removed whole.
    """

    spec: DecoderSpec
    config: PruningConfig
    channel_multiple: int
    allowed: dict[SubBlock, tuple[int, ...]]

    @property
    def target(self) -> float:
        """Parameters to remove."""
        return self.config.pruning_ratio * self.spec.decoder_parameters

    @property
    def tolerance(self) -> float:
        """Parameters by which the removal may miss its target."""
        return RATIO_TOLERANCE * self.spec.decoder_parameters

    def constants(self, counts: Mapping[SubBlock, int]) -> set[SubBlock]:
        """Return the sub-blocks whose cut units leave a constant behind."""
        if self.config.compensation == "none":
            return set()
        units = all_kept(self.spec)
        cut = {place for place, count in counts.items() if count < units[place]}
        return {place for place in cut if counts[place] or self.config.removed_mean == "add"}

    def removed(self, counts: Mapping[SubBlock, int]) -> int:
        """Return the parameters that leave, less the biases that compensation adds. Exact."""
        left = remainder(self.spec, counts, self.constants(counts))
        return self.spec.decoder_parameters - left.num_parameters

    def deficit(self, counts: Mapping[SubBlock, int]) -> float:
        """Return how many parameters too few are removed (negative: too many)."""
        return self.target - self.removed(counts)

    def met_by(self, counts: Mapping[SubBlock, int]) -> bool:
        """Return whether the ratio is met within its tolerance."""
        return abs(self.deficit(counts)) <= self.tolerance

    def at_most(self, place: SubBlock, cut: float) -> int:
        """Return the smallest allowed count above zero that cuts at most ``cut`` units."""
        units = max(self.allowed[place])
        return min(count for count in self.allowed[place] if count and count >= units - cut)


def make_budget(spec: DecoderSpec, config: PruningConfig) -> Budget:
    """Turn a request into a budget, or refuse it.

    Args:
        spec: The model.
        config: The request.

    Raises:
        ConfigError: If a protected layer does not exist, or everything is protected.
        BudgetError: If the ratio cannot be reached; names what can.

    Example:
        >>> from lit_prune.config import PruningConfig
        >>> from lit_prune.decoder.spec import BlockSpec, DecoderSpec, MlpSpec
        >>> mlp = MlpSpec(name="mlp", num_channels=8, unit_parameters=6, fixed_parameters=2, output_bias=True)
        >>> blocks = tuple(BlockSpec(index=i, name=str(i), attention=None, mlp=mlp) for i in range(2))
        >>> spec = DecoderSpec(model_type="t", hidden_size=2, blocks=blocks, total_parameters=100, fingerprint="")
        >>> make_budget(spec, PruningConfig(pruning_ratio=0.3, granularities=["block"]))
        Traceback (most recent call last):
        lit_prune.errors.BudgetError: pruning_ratio 0.3 cannot be reached within 0.5 percentage points...
    """
    _check_layers(spec, config)
    multiple = config.channel_multiple or _auto_multiple(spec, config)
    budget = Budget(spec, config, multiple, _allowed(spec, config, multiple))
    if config.pruning_ratio:
        _refuse_unreachable(budget)
    return budget


def _check_layers(spec: DecoderSpec, config: PruningConfig) -> None:
    count = len(spec.blocks)
    if wrong := [layer for layer in config.protected_layers if not 0 <= layer < count]:
        raise ConfigError(
            f"protected_layers has {wrong[0]}, the model's layers are 0 … {count - 1}"
            + (f"; for the last layer write {count - 1}." if wrong[0] < 0 else ".")
        )
    if config.pruning_ratio and set(config.protected_layers) >= set(range(count)):
        raise ConfigError(f"protected_layers protects all {count} layers: nothing could be removed.")


def _auto_multiple(spec: DecoderSpec, config: PruningConfig) -> int:
    """Return the largest hardware-friendly multiple whose step is fine enough for the ratio's tolerance."""
    mlps = [block.mlp for block in spec.blocks if block.mlp]
    if not mlps:
        return 1
    channels = min(mlp.num_channels for mlp in mlps)
    step = max(mlp.unit_parameters for mlp in mlps) * (len(mlps) if config.allocator == "uniform" else 1)
    for multiple in _FAVOURITE_MULTIPLES:
        if multiple <= channels // 4 and step * multiple <= RATIO_TOLERANCE * spec.decoder_parameters:
            return multiple
    return 1


def _allowed(spec: DecoderSpec, config: PruningConfig, multiple: int) -> dict[SubBlock, tuple[int, ...]]:
    allowed: dict[SubBlock, tuple[int, ...]] = {}
    whole = {"block", "sub_block"} & set(config.granularities) and config.allocator != "uniform"
    for index, part in spec.sub_blocks:
        counts = {part.num_units}
        if index not in config.protected_layers:
            if part.kind == "attention" and "kv_group" in config.granularities:
                counts.update(range(config.min_kv_groups, part.num_units))
            if part.kind == "mlp" and "channel" in config.granularities:
                counts.update(range(multiple, part.num_units, multiple))
            if whole:
                counts.add(0)
        allowed[index, part.kind] = tuple(sorted(counts))
    return allowed


def _refuse_unreachable(budget: Budget) -> None:
    """Refuse a ratio that no choice of counts can meet, naming the nearest that can be met."""
    spec, total = budget.spec, budget.spec.decoder_parameters
    joint = "sub_block" not in budget.config.granularities  # attention and MLP leave only together
    options, finest = [], 0
    for block in spec.blocks:
        per_part = []
        for part in block.sub_blocks:
            place: SubBlock = (block.index, part.kind)
            removed = {count: (part.num_units - count) * part.unit_parameters for count in budget.allowed[place]}
            if 0 in removed:
                removed[0] = part.num_parameters
            per_part.append(removed)
            steps = sorted(removed.values())
            if part.kind == "mlp" and len(steps) > 2:
                finest = max(finest, steps[1])
        sums = {0}
        for removed in per_part:
            sizes = {size for count, size in removed.items() if count or not joint}
            sums = {a + b for a in sums for b in sizes}
        if joint and per_part and all(0 in removed for removed in per_part):
            sums.add(sum(part.num_parameters for part in block.sub_blocks))
        options.append(sorted(sums))
    most = _most_removable(budget)
    if finest and finest <= 2 * budget.tolerance and budget.config.allocator != "uniform":
        if budget.target <= most + budget.tolerance:
            return
        below, above, near = most, None, False
    else:
        options = [[size for size in sizes if size <= most] for sizes in options]
        below, above, near = reachable_totals(options, round(budget.target), int(budget.tolerance), total)
        if above is not None and above > most:
            above = None
        near = any(x is not None and x and abs(x - budget.target) <= budget.tolerance for x in (below, above))
    if near:
        return
    nearest = " and ".join(f"{x / total:.4f}" for x in (below, above) if x is not None)
    raise BudgetError(
        f"pruning_ratio {budget.config.pruning_ratio:g} cannot be reached within "
        f"{RATIO_TOLERANCE * 100:g} percentage points with granularities {list(budget.config.granularities)}, "
        f"channel_multiple {budget.channel_multiple}, min_kv_groups {budget.config.min_kv_groups} and "
        f"{len(budget.config.protected_layers)} protected layer(s): the reachable ratios lie in [0, {most / total:.4f}], "
        f"the nearest are {nearest}. Allow more granularities, a smaller channel_multiple, or ask for one of these."
    )


def _most_removable(budget: Budget) -> int:
    counts = {place: min(allowed) for place, allowed in budget.allowed.items()}
    attentions = [place for place in counts if place[1] == "attention"]
    if attentions and not any(counts[place] for place in attentions):
        # the KV cache needs one attention: the one that costs least to keep
        units = {place: min(c for c in budget.allowed[place] if c) for place in attentions}
        specs = {(index, part.kind): part for index, part in budget.spec.sub_blocks}
        cheapest = min(attentions, key=lambda place: units[place] * specs[place].unit_parameters)
        counts[cheapest] = units[cheapest]
        if "sub_block" not in budget.config.granularities:
            mlp: SubBlock = (cheapest[0], "mlp")
            if mlp in counts:
                counts[mlp] = min(c for c in budget.allowed[mlp] if c)
    return budget.removed(counts)
