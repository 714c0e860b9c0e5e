"""What the searches choose from, and what they return: whole blocks and sub-blocks (Eqs. 5-6)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Literal, get_args

from lit_prune.errors import ConfigError, ScoreError

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

CandidateKind = Literal["block", "attention", "mlp"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidate:
    """A block or sub-block that may be removed as a whole.

    Attributes:
        name: For messages: "layer 3", "layer 3 attention", "layer 3 mlp".
        layer: Index of its decoder layer.
        kind: What goes. A block counts as losing its attention: where the attention is gone
            already, offer the rest as ``"mlp"``.
        cost: Transfer entropy, nats, finite and non-negative.
        size: Parameters that its removal frees.
    """

    name: str
    layer: int
    kind: CandidateKind
    cost: float
    size: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Selection:
    """What a search chose.

    Attributes:
        chosen: Ordered by (layer, kind).
        cost: Sum of the chosen costs, nats.
        size: Sum of the chosen sizes, parameters.
        optimal: Whether ``cost`` is proven the least possible (to 1e-12, relative).
        bound: Best proven lower bound on the least possible cost, nats; ``cost`` itself if
            ``optimal``.
        nodes: Nodes of the search tree that were expanded; 0 for the greedy solution.

    Example:
        >>> a = Candidate(name="layer 0 mlp", layer=0, kind="mlp", cost=0.5, size=10)
        >>> Selection.of([a], optimal=True).size
        10
    """

    chosen: tuple[Candidate, ...]
    cost: float
    size: int
    optimal: bool
    bound: float
    nodes: int

    @classmethod
    def of(
        cls,
        chosen: Iterable[Candidate],
        *,
        optimal: bool = False,
        bound: float = 0.0,
        nodes: int = 0,
    ) -> Selection:
        """Put ``chosen`` in order and add it up; a bound above the cost can only be rounding."""
        ordered = tuple(sorted(chosen, key=stable_order))
        cost = math.fsum(c.cost for c in ordered)
        return cls(
            chosen=ordered,
            cost=cost,
            size=sum(c.size for c in ordered),
            optimal=optimal,
            bound=cost if optimal else min(bound, cost),
            nodes=nodes,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerOption:
    """One of the things that can happen to a layer: nothing, a half, both halves, the block."""

    chosen: tuple[Candidate, ...]
    cost: float
    size: int
    attention: int  # 1 if the layer loses its attention


def stable_order(candidate: Candidate) -> tuple[int, str]:
    """Sort key (layer, kind), unique within checked candidates."""
    return candidate.layer, candidate.kind


def checked(candidates: Sequence[Candidate]) -> tuple[Candidate, ...]:
    """Return the candidates in (layer, kind) order, whatever order they came in.

    Raises:
        ScoreError: If a cost is negative or not finite; names the candidate.
        ConfigError: If a size is negative, a kind unknown, or a (layer, kind) occurs twice.
    """
    ordered = tuple(sorted(candidates, key=stable_order))
    for candidate in ordered:
        if not 0 <= candidate.cost < math.inf:  # also false for NaN
            raise ScoreError(
                f"cost of {candidate.name} is {candidate.cost}; expected finite and >= 0 (nats)."
            )
        if candidate.size < 0 or candidate.kind not in get_args(CandidateKind):
            raise ConfigError(
                f"{candidate.name}: expected a size >= 0 and a kind of {get_args(CandidateKind)}, "
                f"got {candidate.size} and {candidate.kind!r}."
            )
    for one, other in pairwise(ordered):
        if stable_order(one) == stable_order(other):
            raise ConfigError(
                f"{one.name} and {other.name} are the same {one.kind} of layer {one.layer}."
            )
    return ordered


def layer_options(candidates: Sequence[Candidate]) -> list[list[LayerOption]]:
    """For each layer that has candidates, what can happen to it; "nothing" comes first.

    Of options that free the same size and agree about the attention, only the cheapest is of use:
    removing a block and removing its two halves is the same edit with two measured costs.

    Example:
        >>> a = Candidate(name="a", layer=0, kind="attention", cost=1.0, size=4)
        >>> m = Candidate(name="m", layer=0, kind="mlp", cost=2.0, size=8)
        >>> b = Candidate(name="b", layer=0, kind="block", cost=2.5, size=12)
        >>> [[c.name for c in option.chosen] for option in layer_options([a, m, b])[0]]
        [[], ['a'], ['m'], ['b']]
    """
    by_layer: dict[int, dict[str, Candidate]] = {}
    for candidate in checked(candidates):
        by_layer.setdefault(candidate.layer, {})[candidate.kind] = candidate
    layers = []
    for parts in by_layer.values():
        kinds = (("attention",), ("mlp",), ("block",), ("attention", "mlp"))
        sets = [tuple(parts[k] for k in kind) for kind in kinds if all(k in parts for k in kind)]
        cheapest: dict[tuple[int, int], LayerOption] = {}
        for chosen in [(), *sets]:
            option = LayerOption(
                chosen=chosen,
                cost=math.fsum(c.cost for c in chosen),
                size=sum(c.size for c in chosen),
                attention=int(any(c.kind != "mlp" for c in chosen)),
            )
            key = (option.size, option.attention)
            if key not in cheapest or option.cost < cheapest[key].cost:
                cheapest[key] = option
        layers.append(list(cheapest.values()))
    return layers
