"""Joint allocation: one level for each sub-block, of least total cost within a window; exact."""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import chain
from typing import TYPE_CHECKING

import numpy as np

from lit_prune.allocation.joint_problem import Problem, best_multipliers
from lit_prune.allocation.joint_tables import SuffixTables
from lit_prune.errors import BudgetError, ConfigError, ScoreError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from lit_prune.allocation.joint_problem import Multipliers

# Costs nearer than this (relative) are ties.
_TIE = 1e-9
# Additions spent on the tables of a round, and numbers of 8 bytes in each of their two families: in
# the first round, which only looks for a selection; then; and where that turned out too coarse.
_FIRST_NODES = 1_000
_FIRST_WORK, _WORK = 1e8, 2e9
_FIRST_CELLS, _CELLS, _MOST_CELLS = 1 << 19, 1 << 22, 1 << 24
# The first target lies this part of the way from the Lagrangian bound to the best selection.
_FIRST_PART = 1 / 32
# What was decided above a node, newest first: (level, what was decided above it).
_Path = tuple[int, "_Path"] | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Level:
    """One of the things that can happen to a place.

    Attributes:
        size: Resource that it frees, for instance parameters; >= 0.
        cost: Predicted damage, nats, finite and >= 0.
        attention: Layers that lose their attention wholly by it: 0 or 1, more where a place stands
            for several layers.
    """

    size: int
    cost: float
    attention: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class JointSelection:
    """What the joint search chose.

    Attributes:
        chosen: Index of the chosen level, for each place.
        cost: Sum of the chosen costs, nats.
        size: Sum of the chosen sizes.
        optimal: Whether ``cost`` is proven the least possible (to 1e-9, relative).
        bound: Best proven lower bound on the least possible cost, nats; ``cost`` itself if
            ``optimal``.
        nodes: Nodes of the search tree that were expanded.
    """

    chosen: tuple[int, ...]
    cost: float
    size: int
    optimal: bool
    bound: float
    nodes: int


def joint_search(
    places: Sequence[Sequence[Level]],
    *,
    minimum: int,
    maximum: int,
    attention_limit: int | None = None,
    node_limit: int = 200_000,
) -> JointSelection | None:
    """Choose one level for each place, of least total cost and with a total size in the window.

    ``min sum_p cost[p, l_p]  s.t.  minimum <= sum_p size[p, l_p] <= maximum`` and ``sum_p
    attention[p, l_p] <= attention_limit``: a multiple-choice knapsack. Costs may be any function
    of the size, neither convex nor monotone.

    Depth-first branch and bound, one place for each level of the tree, in rounds. The Lagrangian
    bounds every selection that contains a given level; a round has a *target* and looks only at
    levels whose bound is below it. What it finds is therefore the optimum, and if it finds nothing,
    the target is a lower bound and the next one lies higher. Few levels are left in a round, so
    that its tables (`SuffixTables`) are fine, and often exact. A node is cut off when its bound
    does not beat the target or the best selection so far, or when the same size with as much
    attention was reached at its depth for no more cost.

    The result depends on the arguments alone. Of levels of a place with equal size and attention
    the cheapest is considered, the first of equally cheap ones; of selections with equal cost (to
    1e-9) what is found first stays.

    Args:
        places: For each place, its levels. "Nothing goes" is a level, too: it must be listed.
        minimum: Size to free, at least.
        maximum: Size to free, at most.
        attention_limit: Most layers that may lose their attention. Default: no limit.
        node_limit: Nodes to expand before the best selection so far is returned with
            ``optimal=False``. A count and no clock, so that the result does not depend on the
            machine; the default is about ten seconds.

    Returns:
        The selection with its proof; None if nothing fits.

    Raises:
        ConfigError: If ``maximum`` is below ``minimum``, a place has no level, or a size or
            attention is negative; names place and level.
        ScoreError: If a cost is negative or not finite; names place and level.
        BudgetError: If no selection was found within ``node_limit``.

    Example:
        >>> attention = [Level(size=0, cost=0.0), Level(size=40, cost=3.0, attention=1)]
        >>> mlp = [Level(size=10 * n, cost=0.1 * n**2) for n in range(6)]
        >>> found = joint_search([attention, mlp, mlp], minimum=80, maximum=85)
        >>> found.chosen, round(found.cost, 6), found.optimal
        ((0, 4, 4), 3.2, True)

    References:
        Sinha and Zoltners, "The Multiple-Choice Knapsack Problem", Operations Research 27 (1979).
        Pisinger, "A minimal algorithm for the multiple-choice knapsack problem", European Journal
        of Operational Research 83 (1995), for solving a core of few levels.
        We differ: a window instead of a capacity, a second constraint, targets, bounds by tables.
    """
    if maximum < minimum:
        raise ConfigError(f"maximum must not be below minimum, got {maximum:,} and {minimum:,}.")
    if not places:
        nothing = JointSelection(chosen=(), cost=0.0, size=0, optimal=True, bound=0.0, nodes=0)
        return nothing if minimum <= 0 <= maximum else None
    problem = _problem(places, minimum, maximum, attention_limit)
    if problem is None:
        return None
    prices = best_multipliers(problem)
    if prices.size_price < 0:  # the tables want the window's lower end to be the one that binds
        problem, prices = problem.mirrored(), prices.mirrored()
    search = _Search(node_limit)
    bound = search.rounds(problem, prices)
    if search.chosen is None:
        if bound == math.inf:
            return None
        raise BudgetError(
            f"no choice of levels was found within {search.nodes:,} search nodes that frees "
            f"{minimum:,} to {maximum:,}. Widen the tolerance or raise node_limit."
        )
    chosen = tuple(search.chosen[place] for place in range(len(places)))
    levels = [levels[i] for levels, i in zip(places, chosen, strict=True)]
    cost = math.fsum(level.cost for level in levels)
    optimal = bound >= search.cutoff
    return JointSelection(
        chosen=chosen,
        cost=cost,
        size=sum(level.size for level in levels),
        optimal=optimal,
        bound=cost if optimal else max(bound, 0.0),
        nodes=search.nodes,
    )


class _Search:
    """Depth-first search that takes its best selection along from one round to the next."""

    def __init__(self, node_limit: int) -> None:
        self.node_limit = node_limit
        self.nodes = 0
        self.chosen: dict[int, int] | None = None
        self.cutoff = math.inf  # a selection must be cheaper than this, by more than a tie

    def rounds(self, problem: Problem, prices: Multipliers) -> float:
        """Search until it is proven or the nodes are spent; return a lower bound, infinite if bare.

        A round that spends its share of the nodes is repeated with finer tables, and then with the
        next target: what one target cannot prove may still be found under another.
        """
        bounds = prices.bounds(problem)
        lagrangian = lower = float(bounds.min())
        target, part, cells, work = math.inf, _FIRST_PART, _FIRST_CELLS, _FIRST_WORK
        allowed = min(_FIRST_NODES, self.node_limit)
        while True:
            left = problem.keep(bounds < target)
            best, open_ = self.cutoff, math.inf
            if left is not None:
                open_ = self._round(left, prices.size_price, target, allowed, cells, work)
            lower = max(lower, min(open_, target, self.cutoff))
            if lower >= self.cutoff or lower == math.inf or self.nodes >= self.node_limit:
                return lower
            if work == _FIRST_WORK or self.cutoff < best:
                part, cells = _FIRST_PART, _CELLS
            elif open_ < target and cells < _MOST_CELLS:
                cells *= 2
            else:
                part, cells = 2 * part, _CELLS
            work = _WORK
            if self.cutoff < math.inf:
                target = min(lagrangian + part * (self.cutoff - lagrangian), self.cutoff)
            last = target >= self.cutoff and cells >= _MOST_CELLS
            remaining = self.node_limit - self.nodes
            allowed = self.nodes + (remaining if last else -(-remaining // 4))

    def _round(
        self, problem: Problem, price: float, target: float, allowed: int, cells: int, work: float
    ) -> float:
        """Search until nothing is open or ``allowed`` nodes are expanded; the least open bound."""
        # Large sizes first, fine ones last: what lacks then can still be met.
        span = np.maximum.reduceat(problem.size, problem.start)
        order = np.argsort(-span, kind="stable").tolist()
        tables = SuffixTables(problem, order, price=price, cells=cells, work=work)
        size, cost, attention = (
            np.split(array, problem.start[1:])
            for array in (problem.size, problem.cost, problem.attention)
        )
        stack: list[tuple[float, int, int, float, int, _Path]] = [(0.0, 0, 0, 0.0, 0, None)]
        best_at: list[dict[tuple[int, int], float]] = [{} for _ in range(len(order) + 1)]
        while stack:
            bound, depth, freed, spent, lost, path = stack[-1]
            cutoff = min(self.cutoff, target)
            if bound < cutoff and self.nodes >= allowed:
                break
            stack.pop()
            # Rounding in `spent` must not decide between permutations of the same choice.
            known = best_at[depth].get((freed, lost), math.inf) * (1 - 1e-12)
            if bound >= cutoff or spent >= known:
                continue
            best_at[depth][freed, lost] = spent
            if depth == len(order):
                self._take(problem, order, path)
                continue
            self.nodes += 1
            place = order[depth]
            sizes, costs, losses = freed + size[place], spent + cost[place], lost + attention[place]
            bounds = costs + tables.completion(depth + 1, sizes, losses)
            useful = np.flatnonzero(bounds < cutoff)
            # The most promising last, to be popped first; equals stay in the order of the levels.
            useful = useful[np.argsort(bounds[useful], kind="stable")][::-1]
            columns = (array[useful].tolist() for array in (bounds, sizes, costs, losses))
            stack.extend(
                (bound, depth + 1, freed, spent, lost, (level, path))
                for level, bound, freed, spent, lost in zip(useful.tolist(), *columns, strict=True)
            )
        return min((node[0] for node in stack), default=math.inf)

    def _take(self, problem: Problem, order: list[int], path: _Path) -> None:
        levels, start, places = {}, problem.start.tolist(), reversed(order)
        while path is not None:
            place, (level, path) = next(places), path
            levels[place] = start[place] + level
        self.chosen = {place: int(problem.index[level]) for place, level in levels.items()}
        self.cutoff = math.fsum(problem.cost[list(levels.values())]) * (1 - _TIE)


def _check(places: Sequence[Sequence[Level]]) -> None:
    for place, levels in enumerate(places):
        if not levels:
            raise ConfigError(f"place {place} has no level; list one that frees nothing.")
        for i, level in enumerate(levels):
            if not 0 <= level.cost < math.inf:  # also false for NaN
                raise ScoreError(
                    f"cost of level {i} of place {place} is {level.cost}; expected finite and >= 0 "
                    "(nats)."
                )
            if level.size < 0 or level.attention < 0:
                raise ConfigError(
                    f"level {i} of place {place}: expected a size and an attention >= 0, got "
                    f"{level.size} and {level.attention}."
                )


def _problem(
    places: Sequence[Sequence[Level]], minimum: int, maximum: int, attention_limit: int | None
) -> Problem | None:
    """Check the levels; drop copies and what fits no selection. None if a place is left bare."""
    _check(places)
    counts = [len(levels) for levels in places]
    place = np.repeat(np.arange(len(places)), counts)
    index = np.concatenate([np.arange(count) for count in counts])
    flat = list(chain.from_iterable(places))
    size = np.array([level.size for level in flat], dtype=np.int64)
    cost = np.array([level.cost for level in flat], dtype=np.float64)
    attention = np.array([level.attention for level in flat], dtype=np.int64)
    limit = int(attention.sum()) if attention_limit is None else attention_limit
    order = np.lexsort((index, cost, attention, size, place))
    keys = np.stack([place, size, attention])[:, order]
    first = np.append(True, (np.diff(keys) != 0).any(axis=0))
    index, cost = index[order], cost[order]
    return Problem(keys[0], index, keys[1], cost, keys[2], minimum, maximum, limit).keep(first)
