"""Removing whole pieces one after the other, each time the one whose loss is measured least."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from lit_prune.allocation import require_met
from lit_prune.decoder import all_kept

if TYPE_CHECKING:
    from collections.abc import Sequence

    from lit_prune.decoder import SubBlock
    from lit_prune.methods.decision import Case

# Sub-blocks that leave together: both halves of a block, or one half.
Piece = tuple["SubBlock", ...]
# A deviation of all methods that remove whole pieces.
PASSED_OVER = (
    "A piece after whose removal the ratio could no longer be met within its tolerance is passed "
    "over, and so is the last attention."
)
# Where pieces differ in size (a model that was pruned before), their sums grow too many.
_MOST_STATES = 4096


def blocks_of(case: Case) -> list[Piece]:
    """Return every block that may be removed, as the sub-blocks that it has."""
    pieces: list[Piece] = []
    for block in case.spec.blocks:
        piece = tuple((block.index, part.kind) for part in block.sub_blocks)
        if piece and all(0 in case.budget.allowed[place] for place in piece):
            pieces.append(piece)
    return pieces


def sub_blocks_of(case: Case) -> list[Piece]:
    """Return every attention and MLP that may be removed."""
    return [(place,) for place, allowed in case.budget.allowed.items() if 0 in allowed]


def remove_in_order(case: Case, pieces: Sequence[Piece]) -> dict[SubBlock, int]:
    """Remove pieces in the given order until the ratio is met.

    Pieces after which the ratio could no longer be met are passed over (where pieces differ in
    size, the published rule "until the ratio is reached" would overshoot).

    Raises:
        BudgetError: If that does not meet it.
    """
    counts, left = all_kept(case.spec), list(pieces)
    while (piece := next(iter(_fitting(case, counts, left)), None)) is not None:
        left.remove(piece)
        counts |= dict.fromkeys(piece, 0)
    require_met(case.budget, counts)
    return counts


def remove_by_loss(
    case: Case, pieces: Sequence[Piece], counts: dict[SubBlock, int], kept: dict[SubBlock, Any]
) -> tuple[dict[SubBlock, int], list[dict[str, Any]]]:
    """Remove, step by step, the piece without which the calibration text costs least.

    Args:
        case: What to decide; its judge measures every draft.
        pieces: What may go.
        counts: Kept units to start from.
        kept: The units themselves.

    Returns:
        Counts, and a record of each step.
    """
    counts, kept, left = dict(counts), dict(kept), list(pieces)
    steps: list[dict[str, Any]] = []
    while fitting := _fitting(case, counts, left):
        losses = [
            case.judge({**kept, **dict.fromkeys(piece, ())}, "calibrate") for piece in fitting
        ]
        loss, piece = min(zip(losses, fitting, strict=True))
        left.remove(piece)
        counts |= dict.fromkeys(piece, 0)
        kept |= dict.fromkeys(piece, ())
        names = [f"layer {layer} {kind}" for layer, kind in piece]
        steps.append({"removed": names, "mean_nll_on_calibrate_text": loss})
    return counts, steps


def _fitting(case: Case, counts: dict[SubBlock, int], pieces: Sequence[Piece]) -> list[Piece]:
    """Return the pieces after whose removal the ratio can still be met; none once it is met."""
    budget = case.budget
    here = abs(budget.deficit(counts))
    if budget.met_by(counts) and all(
        abs(budget.deficit({**counts, **dict.fromkeys(piece, 0)})) >= here for piece in pieces
    ):
        return []
    sizes = {piece: _size(case, counts, piece) for piece in pieces}
    fitting = []
    for piece in pieces:
        after = {**counts, **dict.fromkeys(piece, 0)}
        attentions = {place for place, count in after.items() if count and place[1] == "attention"}
        if not attentions or budget.deficit(after) < -budget.tolerance:
            continue  # a model without attention cannot keep a cache
        others = [other for other in pieces if other != piece]
        if _reaches(
            [(sizes[other], not attentions.isdisjoint(other)) for other in others],
            budget.deficit(after),
            budget.tolerance,
            attends=not attentions <= {place for other in others for place in other},
        ):
            fitting.append(piece)
    return fitting


def _size(case: Case, counts: dict[SubBlock, int], piece: Piece) -> int:
    return case.budget.removed({**counts, **dict.fromkeys(piece, 0)}) - case.budget.removed(counts)


def _reaches(
    pieces: list[tuple[int, bool]], missing: float, tolerance: float, *, attends: bool
) -> bool:
    """Whether some of the pieces add up to what is missing, and leave an attention.

    Args:
        pieces: Size of each, and whether an attention goes with it.
        missing: Parameters to remove.
        tolerance: Parameters by which they may miss it.
        attends: Whether an attention stays in any case.
    """
    states = {(0, attends)}
    for size, attention in pieces:
        states = {(total, left or attention) for total, left in states} | {
            (total + size, left) for total, left in states if total + size <= missing + tolerance
        }
        if len(states) > _MOST_STATES:  # of totals that are nearly equal, one stays
            near = {
                (total // max(tolerance / 16, 1), left): (total, left) for total, left in states
            }
            states = set(near.values())
    return any(left and abs(total - missing) <= tolerance for total, left in states)
