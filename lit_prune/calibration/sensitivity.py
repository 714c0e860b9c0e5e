"""What the model's output loses when one whole sub-block becomes its mean."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from tqdm.auto import tqdm

from lit_prune.calibration.bypass import RecordedRun, Unit
from lit_prune.calibration.divergence import compare_heads
from lit_prune.decoder import (
    IGNORED_LABEL,
    DecoderParts,
    SubBlock,
    quiet,
    spec_for,
)
from lit_prune.ranks import ALONE

if TYPE_CHECKING:
    from collections.abc import Mapping

    from transformers import PreTrainedModel

    from lit_prune.calibration.rows import RowSet
    from lit_prune.ranks import Ranks

# What `measure_sensitivities` returns for each sub-block, in this order.
SENSITIVITIES = ("kl", "nll", "frobenius")


def measure_sensitivities(
    model: PreTrainedModel,
    rows: RowSet,
    means: Mapping[SubBlock, Tensor],
    *,
    max_tokens: int,
    batch_tokens: int = 8192,
    progress: bool = False,
    ranks: Ranks = ALONE,
) -> dict[SubBlock, Tensor]:
    """Replace each sub-block by its mean output, one at a time, and compare with the whole model.

    The mean stays in place, as compensation will leave it: what is measured is the loss of what a
    sub-block says about *this* token, not of a constant that costs nothing to keep. Where nothing
    may stay in place of a sub-block (`DecoderSpec.removed_constants`), nothing does.

    Args:
        model: The language model, on the device where it shall run. It is left as it was.
        rows: The calibration text; its calibrate side is used.
        means: Mean input of every output projection, by ``(layer, kind)``, ``[width]``.
        max_tokens: Tokens used, at most (but at least one sample). About half a forward and one
            head for each sub-block.
        batch_tokens: Tokens of one forward.
        progress: Show a bar (only on a terminal).
        ranks: Who shares the forwards; all have the same model, rows and means.

    Returns:
        For each sub-block, ``[3]``, float64: KL divergence of the next-token distribution from the
        whole model's (nats per token), increase of the negative log-likelihood (nats per token),
        mean squared Euclidean norm of the change of the final hidden state. Of a classifier the
        first two are of the distribution over classes, for each token that its head is read at and
        for each label (NaN where there is none).
    """
    parts = DecoderParts(model)
    device = next(model.parameters()).device
    totals = {place: torch.zeros(len(SENSITIVITIES), dtype=torch.float64) for place in means}
    constants: dict[SubBlock, Tensor | None] = dict.fromkeys(means)
    # what a norm follows, or experts come before, leaves nothing
    for (layer, kind), mean in means.items() if spec_for(model).removed_constants else ():
        linear = parts.output(layer, kind)
        stays = linear.weight.detach().double() @ mean.to(linear.weight.device)
        if linear.bias is not None:
            stays += linear.bias.detach().double()
        constants[layer, kind] = stays.to(linear.weight.dtype)
    scored = labelled = 0
    batches = list(rows.batches("calibrate", batch_tokens, max_tokens))
    seen = sum(int(batch.attention_mask.sum()) for batch in batches)
    mine = list(ranks.share(batches))
    bar = tqdm(
        total=len(mine) * len(means),
        desc="Measuring sensitivities",
        unit="forward",
        leave=False,
        disable=None if progress else True,
    )
    with ranks.together(), quiet(model), bar:
        for batch in mine:
            mask = batch.attention_mask.to(device)
            read, said = (x.to(device) for x in batch.read())
            labels = said[read]
            scored += len(labels)
            labelled += int((labels != IGNORED_LABEL).sum())
            run = RecordedRun(parts, batch.model_inputs(device))
            dense = parts.final_norm(run.output)
            for (layer, kind), constant in constants.items():
                hidden = parts.final_norm(run.without(Unit(layer, kind), constant))
                found = compare_heads(parts, dense[read], hidden[read], labels)
                change = (hidden - dense)[mask].double().square().sum()
                totals[layer, kind] += torch.tensor([*found, float(change)], dtype=torch.float64)
                bar.update()
    scored, labelled = ranks.sum(torch.tensor([scored, labelled])).tolist()
    unknown = math.nan if scored else 1
    counts = torch.tensor([max(scored, 1), labelled or unknown, max(seen, 1)], dtype=torch.float64)
    return {place: ranks.sum(total) / counts for place, total in totals.items()}
