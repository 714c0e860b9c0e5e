"""Preset ``two_ssp``: first MLP channels everywhere alike, then whole attentions by measured loss.

References:
    Sandri et al., "2SSP: A Two-Stage Framework for Structured Pruning of LLMs", arXiv 2501.17771,
    and its code: channels of least L2 norm of the down projection's input; the number of attentions
    is ``round(L * s ** (P_mlp / P_attention / 1.5))``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from lit_prune.allocation import Ranking, require_met
from lit_prune.decoder import all_kept
from lit_prune.errors import BudgetError
from lit_prune.methods.decision import Decision, Method
from lit_prune.methods.removal import sub_blocks_of

if TYPE_CHECKING:
    from lit_prune.decoder import SubBlock
    from lit_prune.methods.decision import Case


def decide(case: Case) -> Decision:
    """Choose how many attentions, cut channels for the rest, then find which attentions."""
    spec, budget = case.spec, case.budget
    scores = {}
    for index, part in spec.sub_blocks:
        mean, variance = case.calibration.units[index, part.kind]
        norms = (variance + mean.square()).sqrt()
        scores[index, part.kind] = norms.reshape(part.num_units, -1).sum(1).numpy()
    ranking = Ranking(scores, dict.fromkeys(scores, 1))
    whole = all_kept(spec)
    if not case.config.pruning_ratio:
        return Decision.of(whole, ranking)
    attentions = [piece[0] for piece in sub_blocks_of(case) if piece[0][1] == "attention"]
    sizes = {"attention": 0, "mlp": 0}
    for _, part in spec.sub_blocks:
        sizes[part.kind] += part.num_parameters
    exponent = sizes["mlp"] / max(sizes["attention"], 1) / 1.5
    # the last attention stays: without one there is no cache to count positions by
    every = sum(kind == "attention" for _, kind in whole)
    most = max(min(len(attentions), every - 1), 0)
    wanted = min(round(len(spec.blocks) * case.config.ratio**exponent), most)
    # any attentions of equal size free the same parameters: the first ones stand for them here
    while True:
        counts = {**whole, **dict.fromkeys(attentions[:wanted], 0)}
        counts = _cut_channels(case, counts)
        if budget.met_by(counts) or wanted >= most:
            break
        wanted += 1  # the channels alone do not reach the ratio
    counts |= {place: whole[place] for place in attentions}
    kept = {place: ranking.kept(place, count) for place, count in counts.items()}
    steps = []
    for _ in range(wanted):
        losses = [(case.judge({**kept, place: ()}, "calibrate"), place) for place in attentions]
        loss, place = min(losses)
        attentions.remove(place)
        kept[place], counts[place] = (), 0
        steps.append({"removed": f"layer {place[0]} attention", "mean_nll_on_calibrate_text": loss})
    require_met(budget, counts)
    return Decision(kept, {"steps": steps})


def _cut_channels(case: Case, counts: dict[SubBlock, int]) -> dict[SubBlock, int]:
    """Keep the same share of channels in every MLP, as near to the budget as counts allow."""
    budget = case.budget
    mlps = [place for place in counts if place[1] == "mlp" and len(budget.allowed[place]) > 1]
    if not mlps:
        raise BudgetError("there is no MLP whose channels may be removed.")
    widest = max(mlps, key=lambda place: max(budget.allowed[place]))
    drafts = []
    for kept in (count for count in budget.allowed[widest] if count):
        share = kept / max(budget.allowed[widest])
        draft = dict(counts)
        for place in mlps:
            wish = share * max(budget.allowed[place])
            draft[place] = min((c for c in budget.allowed[place] if c), key=lambda c: abs(c - wish))
        drafts.append(draft)
    return min(drafts, key=lambda draft: abs(budget.deficit(draft)))


METHOD = Method(
    name="two_ssp",
    rule="first channels of least norm, alike in all layers, then whole attentions by "
    "measured loss",
    source="Sandri et al., 2SSP, arXiv 2501.17771",
    decide=decide,
    granularities=("sub_block", "channel"),
    allocators=("greedy",),
    deviations=(
        "The norm is over all tokens at once; its code averages the norms of samples.",
        "Losses are of the first search_tokens of the calibrate side; its code uses one sample.",
    ),
)
