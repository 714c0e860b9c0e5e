"""Compensation by the conditional mean: kept columns take over what they can tell of the cut."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from torch import Tensor

from lit_prune.decoder import DecoderParts, SubBlock, spec_for
from lit_prune.importance import conditional_mean, damped, output_error
from lit_prune.surgery.compensation import Compensation, mean_compensation, unit_columns

if TYPE_CHECKING:
    from collections.abc import Mapping

    from transformers import PreTrainedModel

    from lit_prune.plan import PruningPlan

# Multiples of the requested damping that are tried on held-out text.
_DAMPING_FACTORS = (0.01, 0.1, 1.0, 10.0, 100.0)


def least_squares_compensation(
    model: PreTrainedModel,
    plan: PruningPlan,
    units: Mapping[SubBlock, tuple[Tensor, Tensor]],
    covariances: Mapping[SubBlock, Tensor],
    held_out: Mapping[SubBlock, Tensor] | None = None,
    *,
    damping: float = 0.01,
    removed_mean: Literal["add", "drop"] = "add",
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

    Raises:
        ScoreError: If a covariance cannot be inverted.

    References:
        Hassibi & Stork, "Second order derivatives for network pruning", NeurIPS 1992 (the update);
        GRAIL, arXiv 2602.23795 (the same from the Gram matrix, towards zero; ours is centred and
        ridged towards the original weights).
    """
    mean = mean_compensation(model, plan, units, removed_mean=removed_mean)
    spec, parts = spec_for(model), DecoderParts(model)
    constants, weights = dict(mean.constants), {}
    fell_back = []
    for index, part in spec.sub_blocks:
        place: SubBlock = (index, part.kind)
        layer = plan.layers[index]
        kept = layer.kv_groups if part.kind == "attention" else layer.channels
        if not kept or len(kept) == part.num_units:
            continue
        device = parts.output(*place).weight.device
        weight = parts.output(*place).weight.detach().double()
        columns = unit_columns(kept, part.unit_width).to(device)
        other = None if held_out is None else held_out[place].to(device)
        best = _best(weight, columns, covariances[place].to(device), other, damping)
        if best is None:
            fell_back.append(place)
            continue
        means = units[place][0].to(device)
        # float32 is what is kept, and every dtype below: the constant fits the rounded weights
        weights[place] = best.float().cpu()
        constants[place] = (weight @ means - best.float().double() @ means[columns]).cpu()
    notes = ()
    if fell_back:
        names = ", ".join(f"layer {index} {kind}" for index, kind in fell_back)
        notes = (
            f"{len(fell_back)} sub-blocks keep the mean alone, which was no worse on held-out "
            f"text than least squares: {names}",
        )
    return Compensation(constants, plan.digest, mean.weights_digest, weights, notes)


def _best(
    weight: Tensor, columns: Tensor, covariance: Tensor, held_out: Tensor | None, damping: float
) -> Tensor | None:
    """Return the weights of least held-out error, ``[out, kept]``; None where the mean is best."""
    if held_out is None:
        return conditional_mean(damped(covariance, damping), weight, columns)
    best, least = None, output_error(held_out, weight, weight[:, columns], columns)
    for factor in _DAMPING_FACTORS:
        new = conditional_mean(damped(covariance, damping * factor), weight, columns)
        error = output_error(held_out, weight, new, columns)
        if error < least:
            best, least = new, error
    return best
