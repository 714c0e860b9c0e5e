"""Compensation by the conditional mean: kept columns take over what they can tell of the cut."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

from torch import Tensor

from lit_prune.decoder import DecoderParts, SubBlock, spec_for
from lit_prune.errors import ScoreError
from lit_prune.importance import condition_bound, conditional_mean, damped, output_error
from lit_prune.surgery.compensation import Compensation, mean_compensation, unit_columns

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from transformers import PreTrainedModel

    from lit_prune.plan import PruningPlan

# Multiples of the requested damping that are tried on held-out text.
DAMPING_FACTORS = (0.01, 0.1, 1.0, 10.0, 100.0)

# Solutions of one sub-block that are kept from draft to draft: a wide one is hundreds of megabytes.
_REMEMBERED = 3


def least_squares_compensation(
    model: PreTrainedModel,
    plan: PruningPlan,
    units: Mapping[SubBlock, tuple[Tensor, Tensor]],
    covariances: Mapping[SubBlock, Tensor],
    held_out: Mapping[SubBlock, Tensor] | None = None,
    *,
    damping: float = 0.01,
    removed_mean: Literal["add", "drop"] = "add",
    weights: str | None = None,
    solved: dict[SubBlock, dict[tuple[int, ...], Solved]] | None = None,
) -> Compensation:
    """Fold ``E[x_cut | x_kept]`` into the columns that stay, its constant part into the bias.

    ``W'_kept = W_kept + W_cut C_ck C_kk^-1`` with ``C`` the damped covariance of the projection's
    input, ``b = W E[x] - W'_kept E[x_kept]``. With everything kept this is the identity; with
    infinite damping, or nothing kept, it is `mean_compensation`.

    Args:
        model: The dense model that the plan was made for.
        plan: What stays.
        units: Mean and variance of the inputs of the output projections.
        covariances: Their covariances, ``[width, width]``.
        held_out: Second moments about the same means on other text. With them, each sub-block takes
            the damping of least error there, or the mean alone where that is no worse; without
            them, ``damping``.
        damping: As a fraction of the mean variance.
        removed_mean: ``drop`` leaves nothing in place of whole sub-blocks.
        weights: `weights_digest` of the model, where it is known.
        solved: Sub-blocks that were solved before, by what they keep; read and added to, the last
            few of each are kept. Drafts that differ in one sub-block then cost one solution.

    A covariance that cannot be inverted leaves the mean in its place, and says so in ``notes``.

    References:
        Hassibi & Stork, "Second order derivatives for network pruning", NeurIPS 1992 (the update);
        GRAIL, arXiv 2602.23795 (the same from the Gram matrix, towards zero; ours is centred and
        ridged towards the original weights).
    """
    mean = mean_compensation(model, plan, units, removed_mean=removed_mean, weights=weights)
    spec, parts = spec_for(model), DecoderParts(model)
    constants, folded = dict(mean.constants), {}
    chosen: dict[str, dict[str, float | None]] = {}
    refused: list[str] = []
    for index, part in spec.sub_blocks:
        place: SubBlock = (index, part.kind)
        kept = plan.layers[index].kept(part.kind)
        if not kept or len(kept) == part.num_units or not part.takes_constant:
            continue
        name = f"layer {index} {part.kind}"
        device = parts.output(*place).weight.device
        weight = parts.output(*place).weight.detach().double()
        columns = unit_columns(kept, part.unit_width).to(device)
        covariance = covariances[place].to(device)
        other = None if held_out is None else held_out[place].to(device)
        known = {} if solved is None else solved.setdefault(place, {})
        if kept not in known:
            known[kept] = _best(weight, columns, covariance, other, damping)
            if len(known) > _REMEMBERED:
                del known[next(iter(known))]
        found = known[kept]
        chosen[name] = {"damping": found.damping, "condition_number_at_most": found.condition}
        refused += [name] * found.refused
        if found.weight is not None:
            means = units[place][0].to(device)
            # float32 is what is kept, and every dtype below: the constant fits the rounded weights
            folded[place] = found.weight.float().cpu()
            rounded = found.weight.float().double()
            constants[place] = (weight @ means - rounded @ means[columns]).cpu()
    notes = fallback_notes(chosen, refused, judged=held_out is not None)
    return Compensation(
        constants, plan.digest, mean.weights_digest, weights=folded, facts=chosen, notes=notes
    )


def fallback_notes(
    chosen: Mapping[str, Mapping[str, float | None]],
    refused: Sequence[str],
    *,
    judged: bool = True,
) -> tuple[str, ...]:
    """Say which sub-blocks were not compensated as asked, and why.

    Args:
        chosen: What was chosen for each sub-block; ``damping`` None: the mean alone, unless what
            lies inside was fitted.
        refused: Sub-blocks with a system that could not be solved.
        judged: Whether held-out text chose.
    """
    alone = [
        name
        for name, facts in chosen.items()
        if facts["damping"] is None
        and "inner_steps" not in facts
        and (judged or name not in refused)
    ]
    notes = []
    if refused:
        notes.append(
            f"{len(refused)} sub-blocks have covariances that cannot be inverted at some damping "
            f"tried: {', '.join(refused)}"
        )
    if alone:
        notes.append(
            f"{len(alone)} sub-blocks keep the mean alone, which was no worse on held-out text "
            f"than least squares: {', '.join(alone)}"
        )
    return tuple(notes)


@dataclass(frozen=True, slots=True)
class Solved:
    """The choice for one sub-block: its weights and damping, or None for the mean alone."""

    weight: Tensor | None
    damping: float | None
    condition: float | None
    refused: bool


def _best(
    weight: Tensor, columns: Tensor, covariance: Tensor, held_out: Tensor | None, damping: float
) -> Solved:
    best, least, refused = Solved(None, None, None, False), math.inf, False
    if held_out is not None:
        least = output_error(held_out, weight, weight[:, columns], columns)
    for factor in (1.0,) if held_out is None else DAMPING_FACTORS:
        try:
            noisy = damped(covariance, damping * factor)
            new = conditional_mean(noisy, weight, columns)
        except ScoreError:  # ill-conditioned beyond float64: more damping, or the mean
            refused = True
            continue
        error = 0.0 if held_out is None else output_error(held_out, weight, new, columns)
        if error < least:
            least = error
            best = Solved(new, damping * factor, condition_bound(noisy, covariance), False)
    return replace(best, refused=refused)
