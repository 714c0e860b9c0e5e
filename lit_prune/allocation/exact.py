"""Every ratio that a request can reach, and the counts nearest to wished ones that reach it."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, NamedTuple

from lit_prune.decoder import LEADING

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from lit_prune.allocation.budget import Budget
    from lit_prune.decoder import SubBlock
    from lit_prune.decoder.spec import SubBlockSpec

# About a second of shifting big integers, and 100 MB of them; beyond, sizes are put into buckets.
_MOST_BIT_OPERATIONS = 4e10
_MOST_BITS = 8e8
_BUCKETS = 20_000


class _State(NamedTuple):
    """What the sub-blocks so far mean for the next one.

    Attributes:
        pays: A constant left behind now would need a new bias.
        attends: An attention has stayed.
        gone: The first sub-block of the same layer was removed.
    """

    pays: bool
    attends: bool
    gone: bool


class _Choice(NamedTuple):
    kept: int
    freed: int
    after: _State


class ReachableTotals:
    """All totals that allowed counts can remove of the budget's resource, new biases paid.

    One bit stands for one total, in units of the greatest common divisor of all sizes; one big
    integer for each state in which the sub-blocks so far may have left the decoder. Exact, unless
    that takes too long: then sizes are rounded to 1/20000 of the decoder, and what `counts` returns
    has to be counted again.

    Args:
        budget: The request against the model.
    """

    def __init__(self, budget: Budget) -> None:
        self._budget = budget
        self._places = [(index, part) for index, part in budget.spec.sub_blocks]
        cost = budget.cost
        self._bias = budget.bias
        first = budget.spec.blocks[LEADING[0]]
        self._start = _State(bool(self._bias) and not first.constant_parameters, False, False)
        sizes = {
            cost.kept[place][-1] - cost.kept[place][count]
            for place, allowed in budget.allowed.items()
            for count in allowed
        }
        self._unit = math.gcd(self._bias, *cost.shared.values(), *sizes) or 1
        bits = 8 * (cost.total // self._unit + 1)
        options = sum(len(allowed) for allowed in budget.allowed.values())
        if bits * options > _MOST_BIT_OPERATIONS or bits * len(self._places) > _MOST_BITS:
            self._unit = max(cost.total // _BUCKETS, 1)
        self._raise = -(-self._bias // self._unit)
        self._options = [self._distinct(index, part) for index, part in self._places]
        self._levels: list[dict[_State, int]] = [{self._start: 1}]
        for level in range(len(self._places)):
            row: dict[_State, int] = {}
            for before, reach in self._levels[-1].items():
                for choice in self._choices(level, before):
                    row[choice.after] = row.get(choice.after, 0) | reach << self._step(choice)
            self._levels.append(row)

    def nearest(self, target: float) -> tuple[int | None, int | None]:
        """Return the nearest reachable totals at or below and at or above ``target``, not 0."""
        reach, shift = self._final(), self._shift(len(self._places))
        low = reach & ((2 << math.floor(target / self._unit) + shift) - 1)
        low = low >> (shift + 1) << (shift + 1)  # something must be removed
        start = max(math.ceil(target / self._unit), 1)
        high = reach >> start + shift
        below = (low.bit_length() - 1 - shift) * self._unit if low else None
        above = ((high & -high).bit_length() - 1 + start) * self._unit if high else None
        return below, above

    def most(self) -> int:
        """Return the largest reachable total."""
        return (self._final().bit_length() - 1 - self._shift(len(self._places))) * self._unit

    def counts(self, total: int, wished: Mapping[SubBlock, int]) -> dict[SubBlock, int]:
        """Return counts that remove ``total``, each as near to ``wished`` as that allows.

        The last layers get their wish first.

        Args:
            total: A reachable total.
            wished: Kept units by ``(layer, kind)``.
        """
        counts = dict(wished)
        bit = total // self._unit + self._shift(len(self._places))
        after = {state for state, reach in self._ends() if reach >> bit & 1}
        for level in reversed(range(len(self._places))):
            place: SubBlock = (self._places[level][0], self._places[level][1].kind)
            found = [
                (abs(choice.kept - wished[place]), choice.kept, before, self._step(choice))
                for before, reach in self._levels[level].items()
                for choice in self._choices(level, before)
                if choice.after in after
                and self._step(choice) <= bit
                and reach >> bit - self._step(choice) & 1
            ]
            _, counts[place], before, step = min(found)
            after, bit = {before}, bit - step
        return counts

    def _distinct(self, index: int, part: SubBlockSpec) -> list[int]:
        """Return the allowed counts that fall on different bits."""
        allowed = self._budget.allowed[index, part.kind]
        costs = self._budget.cost.kept[index, part.kind]
        by_bit = {costs[count] // self._unit: count for count in allowed}
        return sorted({*by_bit.values(), min(allowed), max(allowed)})

    def _choices(self, level: int, before: _State) -> Iterator[_Choice]:
        """Yield what may happen to one sub-block; `remainder` is the rule that this follows."""
        (index, part), config, cost = self._places[level], self._budget.config, self._budget.cost
        costs, stands_in = cost.kept[index, part.kind], config.removed_mean == "add"
        # where halves cannot go alone, both sub-blocks of a layer go or both stay
        second = level > 0 and self._places[level - 1][0] == index
        together = second and "sub_block" not in config.granularities
        alone = second and before.gone
        # in a parallel layer the constant of the first half waits for what becomes of the second
        parallel = self._budget.spec.parallel
        waits = parallel and any(at == index for at, _ in self._places[level + 1 : level + 2])
        for count in self._options[level]:
            if together and before.gone != (count == 0):
                continue
            attends = before.attends or (bool(count) and part.kind == "attention")
            if not count:
                pays = before.pays and stands_in and not waits
                freed = costs[-1] - (self._bias if pays else 0)
                freed += cost.shared.get(index, 0) if alone else 0
                after = _State(before.pays and not pays, attends, not second)
            else:
                pays = bool(self._bias) and part.takes_constant and not part.output_bias
                receives = count < part.num_units or (parallel and alone and stands_in)
                freed = costs[-1] - costs[count] - (self._bias if pays and receives else 0)
                after = _State(pays and not receives, attends, False)
            yield _Choice(count, freed, after)

    def _ends(self) -> list[tuple[_State, int]]:
        needed = any(part.kind == "attention" for _, part in self._places)
        return [(s, reach) for s, reach in self._levels[-1].items() if s.attends or not needed]

    def _final(self) -> int:
        whole = 0
        for _, reach in self._ends():
            whole |= reach
        return whole

    def _shift(self, level: int) -> int:
        """Bits by which a level's totals are raised: each step may cost one bias."""
        return level * self._raise

    def _step(self, choice: _Choice) -> int:
        return (2 * choice.freed + self._unit) // (2 * self._unit) + self._raise
