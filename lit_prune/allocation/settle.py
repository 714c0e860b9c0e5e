"""Meeting the ratio exactly: the last parameters, unit by unit."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from lit_prune.allocation.exact import ReachableTotals
from lit_prune.decoder import all_kept
from lit_prune.errors import BudgetError, ScoreError

if TYPE_CHECKING:
    from collections.abc import Mapping

    import numpy.typing as npt

    from lit_prune.allocation.budget import Budget
    from lit_prune.decoder import SubBlock


class Ranking:
    """The order in which the units of each sub-block leave: lowest score first, ties by index.

    Args:
        scores: Score of each unit, by ``(layer, kind)``, finite; higher means keep.
        widths: Columns that one unit owns; a step is judged by its mean score for each column, so
            that KV groups (whose score sums over many columns) and channels can be compared.

    Raises:
        ScoreError: If a score is not finite; names the first one.
    """

    def __init__(
        self, scores: Mapping[SubBlock, npt.NDArray[np.float64]], widths: Mapping[SubBlock, int]
    ) -> None:
        self._order: dict[SubBlock, npt.NDArray[np.intp]] = {}
        self._sums: dict[SubBlock, npt.NDArray[np.float64]] = {}
        for place, values in scores.items():
            if not np.isfinite(values).all():
                unit = int(np.flatnonzero(~np.isfinite(values))[0])
                raise ScoreError(
                    f"score of unit {unit} of layer {place[0]} {place[1]} is {values[unit]}."
                )
            order = np.argsort(values, kind="stable")
            self._order[place] = order
            self._sums[place] = np.concatenate([[0.0], np.cumsum(values[order] / widths[place])])

    def kept(self, place: SubBlock, count: int) -> tuple[int, ...]:
        """Return the ``count`` highest-scored units, ascending by index."""
        order = self._order[place]
        return tuple(sorted(int(unit) for unit in order[len(order) - count :]))

    def step_score(self, place: SubBlock, more: int, fewer: int) -> float:
        """Return the mean score per column of the units between ``more`` and ``fewer`` kept."""
        units, sums = len(self._order[place]), self._sums[place]
        return float(sums[units - fewer] - sums[units - more]) / (more - fewer)


def settle(budget: Budget, counts: dict[SubBlock, int], ranking: Ranking) -> dict[SubBlock, int]:
    """Top up or trim until no single step comes nearer to the ratio.

    Too little removed: the lowest-scored channels of all layers leave, then KV groups. Too much:
    the highest-scored removed units of all layers come back, then units of sub-blocks that had been
    removed whole. One step goes from one allowed count of a sub-block to the next. How the paper
    closes the last deviation is not published: this is our reconstruction.

    Args:
        budget: Target and allowed counts.
        counts: Kept units by ``(layer, kind)``.
        ranking: In which order units leave.

    Returns:
        New counts; ``counts`` is not changed.
    """
    counts = dict(counts)
    deficit = budget.deficit(counts)
    for _ in range(sum(len(allowed) for allowed in budget.allowed.values())):
        for place, to in _steps(budget, counts, ranking, lower=deficit > 0):
            after = budget.deficit({**counts, place: to})
            if abs(after) < abs(deficit):
                counts[place], deficit = to, after
                break
        else:
            break
    return counts


def _steps(
    budget: Budget, counts: Mapping[SubBlock, int], ranking: Ranking, *, lower: bool
) -> list[tuple[SubBlock, int]]:
    """Return every possible step, the best first: where to, for which sub-block."""
    keyed = []
    for place, count in counts.items():
        to = _next(budget.allowed[place], count, lower=lower)
        if to is None or (count == 0 and not _may_reopen(budget, counts, place)):
            continue
        score = ranking.step_score(place, max(count, to), min(count, to))
        # removing: channels before KV groups; restoring: partial sub-blocks before reopened ones
        tier = int(place[1] == "attention") if lower else int(count == 0)
        keyed.append((tier, score if lower else -score, place, to))
    return [(place, to) for _, _, place, to in sorted(keyed)]


def meet(budget: Budget, counts: Mapping[SubBlock, int]) -> dict[SubBlock, int]:
    """Return counts that meet the ratio, as near to ``counts`` as a combination of steps allows.

    For requests so coarse that `settle` gets stuck. Where nothing meets the ratio, ``counts``.
    """
    totals = ReachableTotals(budget)
    for total in sorted(
        (x for x in totals.nearest(budget.target) if x is not None),
        key=lambda x: abs(x - budget.target),
    ):
        found = totals.counts(total, counts)
        if budget.met_by(found):
            return found
    return dict(counts)


def settled(
    budget: Budget, counts: Mapping[SubBlock, int], ranking: Ranking
) -> dict[SubBlock, int]:
    """Return the counts nearest to a draft that meet the ratio.

    Raises:
        BudgetError: If none was found.
    """
    found = settle(budget, dict(counts), ranking)
    if not budget.met_by(found):
        found = meet(budget, found)
    require_met(budget, found)
    return found


def require_met(budget: Budget, counts: Mapping[SubBlock, int]) -> None:
    """Refuse counts that do not meet the request.

    Raises:
        BudgetError: Names what they remove.
    """
    if not budget.met_by(counts) or counts == all_kept(budget.spec):
        raise BudgetError(
            f"pruning_ratio {budget.config.ratio:g} of the {budget.cost.words} was not "
            f"met: the nearest plan of allocator {budget.config.allocator!r} removes "
            f"{budget.achieved(counts):.4f} (channel_multiple {budget.channel_multiple}). Ask for "
            "that, allow more granularities, or set a smaller channel_multiple."
        )


def _next(allowed: tuple[int, ...], count: int, *, lower: bool) -> int | None:
    """Return the next allowed count; whole sub-blocks are the search's to remove, not a step's."""
    if lower:
        return max((c for c in allowed if 0 < c < count), default=None)
    return min((c for c in allowed if c > count), default=None)


def _may_reopen(budget: Budget, counts: Mapping[SubBlock, int], place: SubBlock) -> bool:
    """Without the sub-block granularity half of a removed block may not come back."""
    others = [count for other, count in counts.items() if other[0] == place[0] and other != place]
    return "sub_block" in budget.config.granularities or not others or all(others)
