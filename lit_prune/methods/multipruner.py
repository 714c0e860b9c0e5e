"""Preset ``multipruner``: by measured loss first sub-blocks, then channels, then KV groups.

References:
    Muñoz, Yuan & Jain, "MultiPruner: Balanced Structure Removal in Foundation Models", arXiv
    2501.09949, and its code (IntelLabs/Hardware-Aware-Automated-Machine-Learning, MultiPruner):
    ``--weight_reorder``, ``--pruning_distribution 44:52:4``, 1024 of 11008 channels a step.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch

from lit_prune.allocation import Ranking, settled
from lit_prune.decoder import DecoderParts, all_kept
from lit_prune.methods.decision import Decision, Method
from lit_prune.methods.removal import sub_blocks_of

if TYPE_CHECKING:
    from torch import Tensor

    from lit_prune.decoder import SubBlock, SubBlockKind
    from lit_prune.methods.decision import Case

# Shares of the ratio that are reached after sub-blocks, after channels, and after KV groups.
_SPLIT = (0.44, 0.96, 1.0)
# Fraction of an MLP that leaves in one step; steps of one stage, at most.
_STEP, _STEPS = 1024 / 11008, 64


def score(case: Case) -> dict[SubBlock, Tensor]:
    """Return the sum of ``|w|`` over the rows of q, k, v (or gate, up) that a unit owns.

    Rows of k and v count once for each query head that they serve.
    """
    parts, found = DecoderParts(case.model), {}
    for index, part in case.spec.sub_blocks:
        total = torch.zeros(part.num_units, dtype=torch.float64)
        for number, linear in enumerate(parts.inputs(index, part.kind)):
            rows = linear.weight.detach().double().abs().sum(1).cpu()
            shared = part.kind == "attention" and number > 0
            times = parts.head_shape(index)[1] if shared else 1
            total += times * rows.reshape(part.num_units, -1).sum(1)
        found[index, part.kind] = total
    return found


class Search:
    """Drafts that are judged, and the best of them so far.

    Attributes:
        counts: Kept units by ``(layer, kind)``.
        steps: What was done, and the loss then.
        judged: How many drafts were measured.
    """

    def __init__(self, case: Case, ranking: Ranking) -> None:
        self.case, self.ranking = case, ranking
        self.counts = all_kept(case.spec)
        self.steps: list[dict[str, Any]] = []
        self.judged = 0

    def missing(self, share: float) -> float:
        """Return the parameters that this share of the ratio still lacks."""
        return share * self.case.budget.target - self.case.budget.removed(self.counts)

    def take(self, options: list[tuple[SubBlock, int]]) -> bool:
        """Follow the option of least loss; False where none leaves the ratio within reach."""
        budget, kept = self.case.budget, self.kept()
        found = []
        for place, count in options:
            after = {**self.counts, place: count}
            attends = any(n for (_, kind), n in after.items() if kind == "attention")
            if attends and budget.deficit(after) >= -budget.tolerance:
                draft = {**kept, place: self.ranking.kept(place, count)}
                found.append((self.case.judge(draft, "calibrate"), place, count))
        self.judged += len(found)
        if not found:
            return False
        loss, place, count = min(found)
        self.counts[place] = count
        record = {"layer": place[0], "kind": place[1], "kept": count}
        self.steps.append({**record, "mean_nll_on_calibrate_text": loss})
        return True

    def kept(self) -> dict[SubBlock, tuple[int, ...]]:
        """Return the kept units: the highest-scored ones of each sub-block."""
        return {place: self.ranking.kept(place, count) for place, count in self.counts.items()}

    def narrow(self, kind: SubBlockKind, share: float) -> None:
        """Take units from one sub-block after the other until the share is reached."""
        sizes = {}
        for index, part in self.case.spec.sub_blocks:
            if part.kind == kind:
                usual = round(_STEP * part.num_units) if kind == "mlp" else 1
                needed = math.ceil(self.missing(share) / (_STEPS * part.unit_parameters))
                sizes[index, part.kind] = max(usual, needed, 1)
        while self.missing(share) > 0 and self.take(self.narrower(sizes)):
            pass

    def narrower(self, sizes: dict[SubBlock, int]) -> list[tuple[SubBlock, int]]:
        """Return the next count of each sub-block that is fewer by its size, or a little more."""
        options = []
        for place, size in sizes.items():
            allowed, most = self.case.budget.allowed[place], self.counts[place] - size
            if counts := [count for count in allowed if 0 < count <= most]:
                options.append((place, max(counts)))
        return options

    def finish(self) -> dict[SubBlock, int]:
        """Meet the ratio in the smallest steps of channels, by loss as before."""
        budget = self.case.budget
        smallest = {place: 1 for place in self.counts if place[1] == "mlp"}
        while not budget.met_by(self.counts) and self.take(self.narrower(smallest)):
            pass
        if budget.met_by(self.counts):
            return self.counts
        return settled(budget, self.counts, self.ranking)


def decide(case: Case) -> Decision:
    """Remove sub-blocks, channels and KV groups by measured loss, each for its share."""
    if not case.config.pruning_ratio:
        return Decision.whole(case.spec)
    scores = {place: found.numpy() for place, found in score(case).items()}
    ranking = Ranking(scores, dict.fromkeys(scores, 1))
    search = Search(case, ranking)
    pieces = [place for (place,) in sub_blocks_of(case)]
    while search.missing(_SPLIT[0]) > 0:
        if not search.take([(place, 0) for place in pieces if search.counts[place]]):
            break
    search.narrow("mlp", _SPLIT[1])
    search.narrow("attention", _SPLIT[2])
    counts = search.finish()
    return Decision.of(counts, ranking, {"judged": search.judged, "steps": search.steps})


METHOD = Method(
    name="multipruner",
    rule="by measured loss: first sub-blocks, then channels, then KV groups",
    source="Muñoz et al., MultiPruner, arXiv 2501.09949",
    decide=decide,
    granularities=("sub_block", "kv_group", "channel"),
    allocators=("greedy",),
    deviations=(
        "A step is never so long that the ratio would be overshot; what is left over when no step "
        "fits is met in the smallest steps of channels, by loss, too.",
        "A step takes 1024 / 11008 of an MLP's channels, or one KV group; more where a stage would "
        "need over 64 steps. Every step measures one draft for each layer (two, for sub-blocks).",
        "44:52:4 for every model; its code uses other splits (such as 30:70:0) for some.",
        "Losses are of the first search_tokens of the calibrate side; its code uses 256 samples of "
        "Alpaca for sub-blocks and 128 for widths. The ratio is of decoder parameters, not of all.",
    ),
)
