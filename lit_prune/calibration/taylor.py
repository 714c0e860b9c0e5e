"""Gradient scores of units: what a first- or second-order Taylor expansion says of their loss."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from lit_prune.decoder import (
    IGNORED_LABEL,
    DecoderParts,
    SubBlock,
    logits_of,
    quiet,
)
from lit_prune.errors import CalibrationError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from transformers import PreTrainedModel

    from lit_prune.calibration.rows import Row, RowSet

# Columns of what `measure_taylor` returns. "vector" adds the terms of a row (or column) of a weight
# with their signs before it takes the magnitude (coarse), "element" adds magnitudes (fine).
# The terms: g * w (first order), or g * w - w ** 2 * h / 2, h = E[g ** 2] over samples (mixed, the
# diagonal Fisher information in place of the Hessian).
TAYLOR_SCORES = ("vector_first", "element_first", "vector_mixed", "element_mixed")


def measure_taylor(
    model: PreTrainedModel, rows: RowSet, *, max_samples: int = 10, progress: bool = False
) -> dict[SubBlock, Tensor]:
    """Score every KV group and channel by the Taylor expansion of the loss in its weights.

    A unit's weights are its rows of q, k, v (or gate, up) and its columns of o (or down), and the
    biases of those rows.

    Args:
        model: The language model, on the device where it shall run, in a dtype that can be
            differentiated. It is left as it was; its gradients too.
        rows: The calibration text. Samples are taken from the calibrate side in canonical order.
        max_samples: Samples used, at most; one forward and backward each.
        progress: Show a bar (only on a terminal).

    Returns:
        `TAYLOR_SCORES` of every unit, by ``(layer, kind)``, ``[units, 4]``, float64.

    Raises:
        CalibrationError: If no sample has two tokens (of a classifier: a label), a gradient is not
            finite, or memory runs out.

    References:
        Ma et al., "LLM-Pruner: On the Structural Pruning of Large Language Models", NeurIPS 2023,
        Eqs. 3-5, and its code for "vectorize", "param_first" and "param_mix". Gradients are of the
        mean loss of a sample; we average over samples where its code adds.
    """
    parts = DecoderParts(model)
    device = next(model.parameters()).device
    samples = [row for row in rows.side("calibrate") if _has_loss(row)][:max_samples]
    if not samples:
        lacking = "a label" if rows.classifies else "two tokens"
        raise CalibrationError(f"no sample with {lacking} to take gradients on.")
    # in ascending order of layers; of each sub-block: inputs, then output
    owned = [(place, each) for place in parts.places() for each in _owned(parts, place)]
    flat = [each.parameter for _, each in owned]
    frozen = [p for p in flat if not p.requires_grad]
    bar = tqdm(samples, desc="Taylor scores", leave=False, disable=None if progress else True)
    try:
        for parameter in frozen:
            parameter.requires_grad_(True)
        with quiet(model), torch.inference_mode(False), torch.enable_grad():
            first = [torch.zeros_like(p, dtype=torch.float32) for p in flat]
            second = [torch.zeros_like(p, dtype=torch.float32) for p in flat]
            for number, row in enumerate(bar):
                loss = _loss(model, row, device)
                for i, gradient in enumerate(torch.autograd.grad(loss, flat)):
                    if not bool(torch.isfinite(gradient).all()):
                        raise CalibrationError(
                            f"gradient of a weight {list(flat[i].shape)} is not finite on sample "
                            f"{number}: look at the weights, or load the model in float32."
                        )
                    first[i] += gradient.float() / len(samples)
                    second[i] += gradient.float().square() / len(samples)
    except torch.OutOfMemoryError as error:
        raise CalibrationError(
            f"out of memory while taking gradients: {error}. This preset holds two float32 copies "
            "of the decoder and a whole backward pass; use another, or shorter samples. The model "
            "is unchanged."
        ) from error
    finally:
        for parameter in frozen:
            parameter.requires_grad_(False)
    found: dict[SubBlock, Tensor] = {}
    for (place, each), one, two in zip(owned, first, second, strict=True):
        scores = _reduced(each, one, two).cpu()
        found[place] = found[place] + scores if place in found else scores
    return found


class _Owned(NamedTuple):
    """A parameter whose lines along a dimension belong to units: ``[units, lines of a unit]``."""

    parameter: Tensor
    dim: int
    lines: Tensor


def _owned(parts: DecoderParts, place: SubBlock) -> Iterator[_Owned]:
    for each in parts.input_modules(*place):
        assert each.rows is not None  # noqa: S101 - units own rows of inputs
        yield _Owned(each.module.weight, each.dim(rows=True), each.rows)
        if each.module.bias is not None:
            yield _Owned(each.module.bias, 0, each.rows)
    output = parts.output(*place)
    columns = torch.arange(output.in_features).reshape(parts.units(*place), -1)
    yield _Owned(output.module.weight, output.dim(rows=False), columns)


def _has_loss(row: Row) -> bool:
    return len(row.ids) > 1 if row.labels is None else row.num_scored > 0


def _loss(model: PreTrainedModel, row: Row, device: torch.device) -> Tensor:
    """Return the mean loss of a sample: of its tokens, or of its labels."""
    ids = row.ids.to(device).clone().unsqueeze(0)
    if row.labels is None:
        loss: Tensor = model(input_ids=ids, labels=ids, use_cache=False).loss
        return loss
    logits = logits_of(model, input_ids=ids)[0].float()
    return nn.functional.cross_entropy(logits, row.labels.to(device), ignore_index=IGNORED_LABEL)


def _reduced(owned: _Owned, first: Tensor, second: Tensor) -> Tensor:
    """Return the four scores that one parameter adds to each unit, ``[units, 4]``."""
    w = owned.parameter.detach().float()
    linear = first * w
    columns = []
    for terms in (linear, linear - 0.5 * w.square() * second):
        lines = terms.movedim(owned.dim, 0).reshape(terms.shape[owned.dim], -1)
        columns += [lines.sum(1).abs(), lines.abs().sum(1)]
    scores = torch.stack(columns, 1).double()
    return scores[owned.lines.to(scores.device)].sum(1)
