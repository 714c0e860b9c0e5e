"""One pass over the residual stream: how much each block turns it, what each sub-block reads."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from lit_prune.calibration.inputs import by_token
from lit_prune.decoder import DecoderParts, SubBlock, quiet
from lit_prune.ranks import ALONE

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from lit_prune.calibration.rows import RowSet
    from lit_prune.ranks import Ranks


def measure_residuals(
    model: PreTrainedModel, rows: RowSet, *, batch_tokens: int = 8192, ranks: Ranks = ALONE
) -> tuple[Tensor, dict[SubBlock, Tensor]]:
    """Measure what one forward over the calibrate side shows between the projections.

    Args:
        model: The language model, on the device where it shall run. It is left as it was.
        rows: The calibration text.
        batch_tokens: Tokens of one forward.
        ranks: Who shares the forwards; all have the same model and rows.

    Returns:
        Mean cosine similarity of each block's input and output over real tokens, ``[layers]``; and
        the second moment ``E[x_j ** 2]`` of what each sub-block's input projections read,
        ``[hidden_size]``. float64.
    """
    parts = DecoderParts(model)
    device = next(model.parameters()).device
    cosines = torch.zeros(len(parts.layers), dtype=torch.float64, device=device)
    squares = {place: cosines.new_zeros(parts.hidden_size) for place in parts.places()}
    mask = torch.zeros(0)
    entries: dict[int, Tensor] = {}

    def enter(
        layer: int, _module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        entries[layer] = args[0] if args else kwargs["hidden_states"]

    def leave(layer: int, _module: nn.Module, _args: object, output: Any) -> None:  # noqa: ANN401 - tensor or tuple
        after = output if isinstance(output, Tensor) else output[0]
        before = entries.pop(layer)
        cosine = nn.functional.cosine_similarity(before[mask].float(), after[mask].float(), dim=-1)
        cosines[layer] += cosine.double().sum()

    def read(place: SubBlock, _module: nn.Module, args: tuple[Tensor, ...]) -> None:
        squares[place] += by_token(args[0], mask)[mask].double().square().sum(0)

    handles = []
    try:
        for layer, block in enumerate(parts.layers):
            handles.append(block.register_forward_pre_hook(partial(enter, layer), with_kwargs=True))
            handles.append(block.register_forward_hook(partial(leave, layer)))
            handles += [
                _reader(parts, place).register_forward_pre_hook(partial(read, place))
                for place in squares
                if place[0] == layer
            ]
        with ranks.together(), quiet(model):
            for batch in ranks.share(rows.batches("calibrate", batch_tokens)):
                mask = batch.attention_mask.to(device)
                parts.model.base_model(**batch.model_inputs(device), use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    scale = 1 / max(rows.num_tokens("calibrate"), 1)
    inputs = {place: ranks.sum(x) * scale for place, x in squares.items()}
    return ranks.sum(cosines) * scale, inputs


def _reader(parts: DecoderParts, place: SubBlock) -> nn.Module:
    """Return the module that gets what a sub-block reads; of experts, where tokens have rows."""
    routed = parts.routed(*place)
    return parts.sub_block(*place) if routed else parts.input_modules(*place)[0].module
