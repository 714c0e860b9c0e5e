"""Preset ``osscar``: per sub-block the kept units of least squared error, by elimination and swaps.

References:
    Meng et al., "OSSCAR: One-Shot Structured Pruning in Vision and Language Models with
    Combinatorial Optimization", ICML 2024, and its code (mazumder-lab/OSSCAR, ``prune_algo.py``):
    backward elimination, local search, least squares.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from lit_prune.allocation import require_met, uniform_choice
from lit_prune.calibration import Needs
from lit_prune.decoder import DecoderParts, all_kept
from lit_prune.importance import conditional_mean, damped, output_error
from lit_prune.importance.columns import columns_of
from lit_prune.importance.pivot import exchanged
from lit_prune.methods.decision import Decision, Method

if TYPE_CHECKING:
    from torch import Tensor

    from lit_prune.methods.decision import Case

# Exchanges in one sub-block, and units of each side that are paired, at most.
_SWAPS, _CANDIDATES = 100, 256


def squared_error(covariance: Tensor, weight: Tensor, kept: Tensor, unit_width: int) -> float:
    """Return the expected squared output error with these units kept and compensated."""
    columns = columns_of(kept, unit_width)
    new = conditional_mean(covariance, weight, columns)
    return output_error(covariance, weight, new, columns)


def decide(case: Case) -> Decision:
    """Cut the same fraction everywhere; which units, each sub-block decides by its own error."""
    whole = Decision.whole(case.spec)
    if not case.config.pruning_ratio:
        return whole
    calibration, parts, units = case.calibration, DecoderParts(case.model), all_kept(case.spec)
    assert calibration.curves is not None  # noqa: S101 - `needs` asked for it
    assert calibration.covariances is not None  # noqa: S101 - and for this
    counts = uniform_choice(case.budget)
    require_met(case.budget, counts)
    kept, exchanges = dict(whole.kept), []
    for index, part in case.spec.sub_blocks:
        place = (index, part.kind)
        if counts[place] == units[place]:
            continue
        weight = parts.output(*place).weight.detach().double()
        covariance = damped(calibration.covariances[place].to(weight.device), case.config.damping)
        order = calibration.curves[place][1:, 0].long().to(weight.device)
        first = order[len(order) - counts[place] :].sort().values
        best, swaps = exchanged(
            covariance, weight, first, part.unit_width, max_swaps=_SWAPS, candidates=_CANDIDATES
        )
        before, after = (
            squared_error(covariance, weight, chosen, part.unit_width) for chosen in (first, best)
        )
        if after > before:  # rounding: what was gained is smaller than what can be told
            best, after, swaps = first, before, 0
        kept[place] = tuple(best.tolist())
        exchanges.append(
            {"layer": index, "kind": part.kind, "swaps": swaps, "error": [before, after]}
        )
    return Decision(kept, {"allocator": case.config.allocator, "exchanges": exchanges})


METHOD = Method(
    name="osscar",
    rule="the units that stay reproduce the output of their sub-block best, by "
    "elimination and swaps",
    source="Meng et al., OSSCAR, ICML 2024",
    decide=decide,
    needs=lambda _config: Needs(covariances=True, curves=True),
    options=("damping",),
    granularities=("kv_group", "channel"),
    allocators=("uniform",),
    compensation="least_squares",
    deviations=(
        "One unit leaves at a time (its code: several between updates), and one pair is swapped at "
        "a time, the best of 256 by 256 candidates, 100 pairs at most (its code exchanges 5 heads "
        "or 10 channels at once, for 30 rounds at most).",
        "Moments are about the mean, the rest is a bias; the damping counts as noise.",
        "Covariances are of the dense model in one pass; the paper collects them behind the layers "
        "that were already pruned.",
        "KV groups leave whole; published for OPT, which has no grouped queries and no gate.",
    ),
)
