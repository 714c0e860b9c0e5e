"""Joint allocation where what one sub-block frees depends on others: exact all the same.

A sub-block that goes whole leaves a constant, and the survivor before it takes it into its bias
(`lit_prune.decoder.remainder` is the rule): into one that is there anyway, or into a new one, which
costs. What the halves of a layer share leaves when both do. So sizes do not simply add up.

Each choice is therefore split by what it assumes of the others ("no constant comes here", "the
other half goes, too"). Under its assumption its size is exact, and sizes add up: `joint_search`
finds the best selection, assumptions unchecked. Where they hold, nothing that fits is better. Where
one does not, no selection that fits contains both the choice and what contradicts it: the search is
branched, without the one and without the other, best bound first.
"""

from __future__ import annotations

import heapq
import math
from dataclasses import dataclass
from itertools import count
from typing import TYPE_CHECKING

from lit_prune.allocation.joint import Level, joint_search
from lit_prune.decoder import LEADING, SubBlock, all_kept
from lit_prune.errors import BudgetError

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence

    from lit_prune.allocation.budget import Budget

    # Kept counts of the sub-blocks that one place of the search decides.
    Choice = Mapping[SubBlock, int]
    # (place of the search, option there) that may not be chosen.
    Banned = frozenset[tuple[int, int]]

_TIE = 1e-9
# Searches for one window, each a branch: some minutes where each takes a while.
_MOST_SEARCHES = 2048


@dataclass(frozen=True, slots=True)
class Allocation:
    """What the search chose.

    Attributes:
        counts: Kept units of every sub-block.
        cost: Sum of the chosen costs.
        optimal: Whether no selection inside the window costs less (to 1e-9, relative): proven.
        bound: What any selection inside the window costs at least; ``cost`` itself if ``optimal``.
        nodes: Nodes that all searches together expanded.
    """

    counts: dict[SubBlock, int]
    cost: float
    optimal: bool
    bound: float
    nodes: int


@dataclass(frozen=True, slots=True)
class _Option:
    """A choice, and what its size assumes of the others.

    Attributes:
        choice: Kept counts.
        freed: What it frees then.
        event: Groups of sub-blocks; it happens where all of a group go whole.
        happens: Whether it does, for this size.
    """

    choice: Choice
    freed: int
    event: tuple[tuple[SubBlock, ...], ...] = ()
    happens: bool = False

    def holds(self, counts: Choice) -> bool:
        """Return whether what is assumed is so."""
        return self.happens == any(_all_gone(group, counts) for group in self.event)


def coupled_search(
    budget: Budget,
    damage: Mapping[SubBlock, Sequence[float]],
    *,
    slack: float,
    node_limit: int,
) -> Allocation | None:
    """Choose what every sub-block keeps, of least total damage within the window.

    Args:
        budget: Target, sizes and what may be kept.
        damage: Predicted damage of removing 0, 1, … all units of each sub-block.
        slack: By how much the removal may miss its target, in the unit of the budget.
        node_limit: Nodes to expand, of all searches together, before the best allocation so far is
            returned with ``optimal=False``; as for `joint_search`.

    Returns:
        None if nothing fits.

    Raises:
        BudgetError: If no selection was found within ``node_limit``.
    """
    whole, bias = all_kept(budget.spec), budget.bias
    options = [[*_options(budget, of_place)] for of_place in _choices(budget)]
    if bias and not budget.spec.blocks[LEADING[0]].constant_parameters:
        # with nothing before them, constants need a place of their own
        options.append([*_biased(budget, {}, 0, None)])
    levels = [[_level(option, damage, whole, bias) for option in place] for place in options]
    raised = bias * len(options)  # so that no size is negative
    # something goes, or there was nothing to ask for
    low, high = max(math.ceil(budget.target - slack), 1), math.floor(budget.target + slack)
    if high < low:
        return None
    attentions = sum(part.kind == "attention" for _, part in budget.spec.sub_blocks)
    todo: list[tuple[float, int, Banned]] = [(0.0, 0, frozenset())]
    best: tuple[float, dict[SubBlock, int]] = (math.inf, {})
    given_up, nodes, numbers = math.inf, 0, count(1)
    for _ in range(_MOST_SEARCHES):
        if not todo or todo[0][0] >= best[0] * (1 - _TIE) or nodes >= node_limit:
            break
        least, _, banned = heapq.heappop(todo)
        open_ = [
            [i for i in range(len(place)) if (at, i) not in banned]
            for at, place in enumerate(options)
        ]
        if not all(open_):
            continue
        try:
            found = joint_search(
                [[place[i] for i in left] for place, left in zip(levels, open_, strict=True)],
                minimum=low + raised,
                maximum=high + raised,
                attention_limit=max(attentions - 1, 0) if attentions else None,
                node_limit=node_limit - nodes,
            )
        except BudgetError:
            given_up, nodes = min(given_up, least), node_limit
            continue
        if found is None:
            continue
        nodes, least = nodes + found.nodes, max(least, found.bound)
        chosen = [left[i] for left, i in zip(open_, found.chosen, strict=True)]
        counts = dict(whole)
        for place, i in zip(options, chosen, strict=True):
            counts |= place[i].choice
        fits = low <= budget.removed(counts) <= high
        if fits and found.cost < best[0]:
            best = found.cost, counts
        branches = _branches(options, chosen, counts)
        for branch in branches:
            heapq.heappush(todo, (least, next(numbers), banned | branch))
        if not branches and not (fits and found.optimal):
            given_up = min(given_up, least)
    cost, counts = best
    bound = min(given_up, *(entry[0] for entry in todo), cost)
    if cost == math.inf:
        if bound == math.inf:
            return None
        raise BudgetError(f"no selection that fits was found in {nodes:,} search nodes.")
    optimal = bound >= cost * (1 - _TIE)
    return Allocation(counts, cost, optimal, cost if optimal else bound, nodes)


def _choices(budget: Budget) -> list[list[Choice]]:
    """Return what each place of the search may keep: sub-blocks, or blocks that go whole."""
    granularities, allowed = budget.config.granularities, budget.allowed
    if "sub_block" in granularities or "block" not in granularities:
        return [[{place: kept} for kept in reversed(allowed[place])] for place in allowed]
    choices: list[list[Choice]] = []
    for block in budget.spec.blocks:
        combined: list[Choice] = [{}]
        for part in block.sub_blocks:
            place: SubBlock = (block.index, part.kind)
            combined = [{**c, place: kept} for c in combined for kept in reversed(allowed[place])]
        if block.sub_blocks:
            choices += [[c for c in combined if all(c.values()) or not any(c.values())]]
    return choices


def _options(budget: Budget, choices: Sequence[Choice]) -> Iterator[_Option]:
    """Split choices by what they assume."""
    parts = {(index, part.kind): part for index, part in budget.spec.sub_blocks}
    bias = budget.bias
    for choice in choices:
        freed = sum(budget.cost.kept[p][-1] - budget.cost.kept[p][n] for p, n in choice.items())
        cut = [place for place, kept in choice.items() if 0 < kept < parts[place].num_units]
        new = [p for p in cut if parts[p].takes_constant and not parts[p].output_bias]
        freed -= bias * len(new)
        last = max(choice)  # of a layer the last that stays takes what comes
        if not choice[last]:
            yield from _shared(budget, choice, freed)
        elif bias and last not in new and not parts[last].output_bias:
            yield from _biased(budget, choice, freed, last)
        else:
            yield _Option(choice, freed)


def _shared(budget: Budget, choice: Choice, freed: int) -> Iterator[_Option]:
    """Yield what goes whole, with and without what a layer has beside its halves."""
    layer = min(choice)[0]
    halves = [place for place in budget.cost.kept if place[0] == layer]
    others = tuple(place for place in halves if place not in choice)
    shared = budget.cost.shared.get(layer, 0)
    if not others:
        yield _Option(choice, freed + shared)
    elif not shared or min(choice) != min(halves):  # it is counted with the first half
        yield _Option(choice, freed)
    else:
        yield _Option(choice, freed + shared, (others,), happens=True)
        yield _Option(choice, freed, (others,), happens=False)


def _biased(
    budget: Budget, choice: Choice, freed: int, place: SubBlock | None
) -> Iterator[_Option]:
    """Yield what has no bias of its own (None: what stands before everything), with and without."""
    event = _constants_to(budget, place)
    yield _Option(choice, freed, event, happens=False)
    if event:
        yield _Option(choice, freed - budget.bias, event, happens=True)


def _constants_to(budget: Budget, place: SubBlock | None) -> tuple[tuple[SubBlock, ...], ...]:
    """Return which sub-blocks, gone whole, leave a constant to one that stays."""
    if budget.config.removed_mean != "add":
        return ()
    leaves = {(index, part.kind): part.takes_constant for index, part in budget.spec.sub_blocks}
    places = [*leaves]
    after = places if place is None else places[places.index(place) + 1 :]
    if budget.spec.parallel:
        beside = tuple(p for p in places if place and p[0] == place[0] and p != place)
        rest = [p for p in after if p not in beside]
        following = tuple(p for p in rest if p[0] == rest[0][0])
        groups = [beside] if beside else []
        if following and not set(beside) & set(after):
            groups.append(following)
        return tuple(groups)
    run: list[SubBlock] = []
    for follower in after:
        run.append(follower)
        if leaves[follower]:
            return (tuple(run),)
    return ()


def _level(
    option: _Option, damage: Mapping[SubBlock, Sequence[float]], whole: Choice, raised: int
) -> Level:
    choice = option.choice
    return Level(
        size=option.freed + raised,
        cost=sum(float(damage[place][whole[place] - kept]) for place, kept in choice.items()),
        attention=sum(kind == "attention" and not kept for (_, kind), kept in choice.items()),
    )


def _branches(
    options: Sequence[Sequence[_Option]], chosen: Sequence[int], counts: Choice
) -> list[Banned]:
    """Return what to leave out, one or the other, where assumptions do not hold.

    Every selection whose assumptions hold is still there after one of them: it has none of the
    options that are wrong here, or what contradicts one of them is otherwise.
    """
    home = {place: at for at, of in enumerate(options) for place in of[0].choice}

    def without(group: Iterable[SubBlock], *, gone: bool) -> Banned:
        return frozenset(
            (home[place], i)
            for place in group
            for i, option in enumerate(options[home[place]])
            if (option.choice[place] == 0) == gone
        )

    wrong, others = [], []
    for at, i in enumerate(chosen):
        option = options[at][i]
        if option.holds(counts):
            continue
        wrong.append((at, i))
        if option.happens:  # let it happen
            others += [without(group, gone=False) for group in option.event]
        else:  # keep it from happening
            group = next(group for group in option.event if _all_gone(group, counts))
            others += [without([place], gone=True) for place in group]
    return [frozenset(wrong), *others] if wrong else []


def _all_gone(group: Iterable[SubBlock], counts: Choice) -> bool:
    return not any(counts[place] for place in group)
