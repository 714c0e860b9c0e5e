"""Depth-first branch and bound over whole blocks and sub-blocks (paper A, Eqs. 5-6), exact."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from lit_prune.allocation.bounds import CostBounds
from lit_prune.allocation.greedy import greedy
from lit_prune.allocation.reachable import nearest_totals
from lit_prune.allocation.search import Candidate, LayerOption, Selection, layer_options
from lit_prune.errors import BudgetError, ConfigError

if TYPE_CHECKING:
    from collections.abc import Sequence

# Costs nearer than this (relative) are ties: the order of a sum alone makes such a difference.
_TIE = 1e-12
# What was decided above a node, newest first: (option, what was decided above it).
_Path = tuple[LayerOption, "_Path"] | None


def depth_first(
    candidates: Sequence[Candidate],
    *,
    minimum: int,
    maximum: int | None = None,
    max_attention_removed: int | None = None,
    node_limit: int = 1_000_000,
) -> Selection:
    """Choose blocks and sub-blocks of least total cost whose size is within the given range.

    ``min_S sum_{s in S} TE_s  s.t.  minimum <= sum_{s in S} size_s <= maximum``, where from each
    layer S has nothing, the attention, the MLP, both, or the block. The paper names the depth-first
    search and its goal; Eqs. 5 and 6 themselves are RECONSTRUCTED (`method.md` 1.5).

    One layer is one level of the tree. A node is cut off when its bound (`CostBounds`) does not
    beat the best selection so far, which at first is the greedy one, or when the same size with as
    many attentions was reached at its level for no more cost: in real models many sizes are equal,
    and without the latter all their permutations would be tried. Equal costs: what is found first
    stays, in an order that depends on (cost, layer, kind) alone.

    Args:
        candidates: Blocks and sub-blocks with their costs (nats) and sizes (parameters).
        minimum: Parameters to free, at least. At or below 0, nothing is chosen.
        maximum: Parameters to free, at most. Default: no limit.
        max_attention_removed: Most layers that may lose their attention (a block counts). Default:
            no limit.
        node_limit: Nodes to expand before the best selection so far is returned with
            ``optimal=False``. A count and no clock, so that the result does not depend on the
            machine.

    Returns:
        The selection with its proof: never dearer than the greedy one.

    Raises:
        ConfigError: If ``maximum`` is below ``minimum``, or a layer offers the same kind twice.
        ScoreError: If a cost is negative or not finite; names the candidate.
        BudgetError: If no selection fits, naming the nearest sizes that can be freed; or if none
            was found within ``node_limit``.

    Example:
        >>> def block(layer, cost, size):
        ...     name = f"layer {layer}"
        ...     return Candidate(name=name, layer=layer, kind="block", cost=cost, size=size)
        >>> blocks = [block(0, 1.0, 10), block(1, 2.5, 20), block(2, 3.2, 25)]
        >>> [c.name for c in depth_first(blocks, minimum=25).chosen]
        ['layer 2']

    References:
        Yang et al., "Let LLM Tell What to Prune and How Much to Prune", ICML 2025, section 3.
        Martello and Toth, "Knapsack Problems" (1990), chapter 2, for branch and bound with
        dominance.
        We differ: bound, dominance and the limit on attention are ours.
    """
    layers = layer_options(candidates)
    if minimum <= 0:
        return Selection.of((), optimal=True)
    if maximum is not None and maximum < minimum:
        raise ConfigError(
            f"maximum must not be below minimum, got {maximum:,} and {minimum:,} parameters."
        )
    attention_limit = len(layers) if max_attention_removed is None else max_attention_removed
    bounds = CostBounds(layers, minimum=minimum, maximum=maximum, attention_limit=attention_limit)
    seed = greedy(
        candidates, minimum=minimum, maximum=maximum, max_attention_removed=attention_limit
    )
    chosen = list(seed.chosen) if seed else None
    # A selection must be cheaper than this by more than a tie.
    cutoff = seed.cost * (1 - _TIE) if seed else math.inf
    stack: list[tuple[float, int, int, float, int, _Path]] = [
        (bounds.completion(0, 0, 0), 0, 0, 0.0, 0, None)
    ]
    best_at: list[dict[tuple[int, int], float]] = [{} for _ in range(len(layers) + 1)]
    nodes = 0
    while stack:
        bound, level, size, cost, attention, path = stack[-1]
        if bound < cutoff and nodes == node_limit:
            break
        stack.pop()
        # Rounding in `cost` must not decide between permutations of the same choice, hence the tie.
        if bound >= cutoff or cost >= best_at[level].get((size, attention), math.inf) * (1 - _TIE):
            continue
        best_at[level][size, attention] = cost
        nodes += 1
        if size >= minimum:  # costs are not negative: nothing more is worth removing
            chosen, cutoff = _chosen(path), cost * (1 - _TIE)
            continue
        children = []
        for option in layers[level]:
            child = (level + 1, size + option.size, attention + option.attention)
            total = cost + option.cost
            bound = total + bounds.completion(*child)
            if bound < cutoff:
                children.append((bound, *child[:2], total, child[2], (option, path)))
        # The most promising last, to be popped first; equals stay in the order of the options.
        children.sort(key=lambda node: node[0])
        stack.extend(reversed(children))

    open_ = min((node[0] for node in stack), default=math.inf)
    if chosen is None:
        raise _no_selection(layers, minimum, maximum, attention_limit, nodes if stack else None)
    return Selection.of(chosen, optimal=open_ >= cutoff, bound=open_, nodes=nodes)


def _chosen(path: _Path) -> list[Candidate]:
    chosen: list[Candidate] = []
    while path is not None:
        option, path = path
        chosen.extend(option.chosen)
    return chosen


def _no_selection(
    layers: list[list[LayerOption]],
    minimum: int,
    maximum: int | None,
    attention_limit: int,
    nodes: int | None,
) -> BudgetError:
    top = sum(max(option.size for option in options) for options in layers)
    below, above = nearest_totals(
        [[(option.size, option.attention) for option in options] for options in layers],
        below=minimum - 1,
        above=top + 1 if maximum is None else maximum + 1,
        total=top,
        most=attention_limit,
    )
    wanted = f"at least {minimum:,}" if maximum is None else f"{minimum:,} to {maximum:,}"
    nearest = " and ".join(f"{size:,}" for size in (below, above) if size is not None)
    found = "frees" if nodes is None else f"was found within {nodes:,} search nodes that frees"
    return BudgetError(
        f"no selection of whole blocks and sub-blocks {found} {wanted} parameters, with at most "
        f"{attention_limit} layers without attention; the nearest sizes that can be freed are "
        f"{nearest}. Ask for one of these, widen the tolerance, or allow more granularities."
    )
