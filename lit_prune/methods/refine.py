"""Predicted damage corrected by what a plan's neighbours really do; then plan again."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from lit_prune.decoder import all_kept

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from torch import Tensor

    from lit_prune.allocation import Ranking
    from lit_prune.decoder import SubBlock
    from lit_prune.methods.decision import Case

    Counts = Mapping[SubBlock, int]
    Damage = Mapping[SubBlock, Tensor]

# A neighbour differs in this share of a sub-block's units.
_STEP = 0.125
# One measurement changes a curve's scale by at most this factor.
_MOST = 8.0
# How far a round follows its measurements: all the way, and half (on a logarithmic scale).
_TRUST = (1.0, 0.5)


def refine(
    case: Case,
    damage: Damage,
    counts: dict[SubBlock, int],
    ranking: Ranking,
    allocate: Callable[[Damage], dict[SubBlock, int]],
) -> tuple[dict[SubBlock, int], list[dict[str, Any]]]:
    """Improve an allocation by KL divergences to the dense model, measured on the choose side.

    The curves predict what each sub-block costs alone, in an otherwise whole model. In each round
    one neighbour of the present plan is judged for every sub-block (a few units more or fewer
    there); the measured difference, over the predicted one, rescales that sub-block's curve, and
    the exact search runs again: so all exchanges between sub-blocks are weighed at once. A new plan
    is taken only where its own divergence is lower, compensated as it will be: where that takes a
    fit behind the pruned prefix, two of them a round, and one before the first.

    Args:
        case: What to decide; ``verify_rounds`` of its request is the most rounds.
        damage: Predicted damage of removing 0, 1, … all units.
        counts: The plan that the prediction gives.
        ranking: In which order units leave.
        allocate: The search, from damage to counts.

    Returns:
        The best counts found, and a record of each round.
    """
    whole = all_kept(case.spec)

    def judge(draft: Counts, *, fitted: bool = False) -> float:
        kept = {place: ranking.kept(place, count) for place, count in draft.items()}
        return case.diverges(kept, fitted=fitted)

    best, least = dict(counts), judge(counts, fitted=True)
    scaled = dict(damage)
    rounds = [{"kl_on_choose_text": least}]
    for _ in range(case.config.verify_rounds):
        here, slopes = judge(best), {}
        for place, count in best.items():
            other = _neighbour(case, place, count)
            curve = scaled[place]
            predicted = float(curve[whole[place] - other] - curve[whole[place] - count])
            if other == count or not predicted:
                continue
            slope = (judge({**best, place: other}) - here) / predicted
            if math.isfinite(slope):
                slopes[place] = min(max(slope, 1 / _MOST), _MOST)
        found = []
        for trust in _TRUST:
            draft = {p: curve * slopes.get(p, 1.0) ** trust for p, curve in scaled.items()}
            try_counts = allocate(draft)
            found.append((judge(try_counts, fitted=True), trust, try_counts, draft))
        kl, trust, try_counts, draft = min(found, key=lambda item: item[:2])
        rounds.append({"kl_on_choose_text": kl, "trust": trust})
        if not kl < least:
            break
        best, least, scaled = try_counts, kl, draft
    return best, rounds


def _neighbour(case: Case, place: SubBlock, count: int) -> int:
    """Return an allowed count one step away: more units where some are gone, else fewer."""
    allowed = case.budget.allowed[place]
    units = max(allowed)
    step = max(1, round(_STEP * units))
    wanted = count + step if count < units else count - step
    others = [c for c in allowed if (c > count) == (wanted > count) and c != count]
    return min(others, key=lambda c: (abs(c - wanted), c), default=count)
