"""Preset ``llm_pruner``: Taylor importance of coupled weights, without its LoRA recovery.

References:
    Ma et al., "LLM-Pruner: On the Structural Pruning of Large Language Models", NeurIPS 2023, and
    its code: ``--taylor param_first``, 10 samples, blocks 4 to 30 of 32, the same ratio in each.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

from lit_prune.allocation import Ranking, make_budget, require_met, uniform_choice
from lit_prune.calibration import TAYLOR_SCORES, Needs
from lit_prune.errors import BudgetError
from lit_prune.methods.decision import Decision, Method
from lit_prune.methods.scored import UNITS

if TYPE_CHECKING:
    from torch import Tensor

    from lit_prune.decoder import SubBlock
    from lit_prune.methods.decision import Case

# Of 32 layers the first 4 and the last 2 are left alone.
_FIRST, _LAST = 4 / 32, 2 / 32


def score(case: Case) -> dict[SubBlock, Tensor]:
    """Return the sum of ``|g * w|`` over all weights that leave with a unit."""
    assert case.calibration.taylor is not None  # noqa: S101 - `needs` asked for it
    column = TAYLOR_SCORES.index("element_first")
    return {place: scores[:, column] for place, scores in case.calibration.taylor.items()}


def decide(case: Case) -> Decision:
    """Remove the same fraction from every layer but the first and last ones."""
    if not case.config.pruning_ratio:
        return Decision.whole(case.spec)
    scores = {place: found.numpy() for place, found in score(case).items()}
    ranking = Ranking(scores, dict.fromkeys(scores, 1))
    layers = len(case.spec.blocks)
    ends = {*range(round(_FIRST * layers)), *range(layers - round(_LAST * layers), layers)}
    protected = tuple(sorted(ends | set(case.config.protected_layers)))
    try:
        config = replace(case.config, protected_layers=protected)
        counts = uniform_choice(make_budget(case.spec, config))
        require_met(case.budget, counts)
        trace: dict[str, Any] = {"left_alone": list(protected)}
    except BudgetError:
        counts = uniform_choice(case.budget)
        require_met(case.budget, counts)
        trace = {"left_alone": [], "why": "the ratio cannot be met without the outer layers"}
    return Decision.of(counts, ranking, trace)


METHOD = Method(
    name="llm_pruner",
    rule="units of least Taylor importance leave first: weight times gradient",
    source="Ma et al., LLM-Pruner, NeurIPS 2023 (element-wise Taylor, first order), no recovery",
    decide=decide,
    needs=lambda _config: Needs(taylor=True),
    granularities=UNITS,
    allocators=("uniform",),
    deviations=(
        "KV groups leave whole, also under grouped-query attention.",
        "Gradients are of the whole calibrate side, averaged over samples (its code: ten of "
        "BookCorpus).",
        "The layers left alone are the published 4 + 2 of 32, in proportion to the depth.",
    ),
)
