"""What reads the residual stream, fitted to what the stream has become behind a cut.

The input projections of a sub-block, and the head, were trained on the dense model's stream. In the
pruned model they get ``z`` in place of ``z_d``, which differ however well what writes the stream is
fitted. The best guess of one from the other is linear if both are Gaussian, ``E[z_d | z] = M z``,
and whatever reads ``z`` through weights ``W`` may as well read that guess: ``W M``. It costs no
parameter and no time.

References:
    Weights fitted on the compressed model's inputs to the dense model's outputs: GPTAQ and Qronos,
    for one quantised projection at a time; ``W M`` is the best for all that read ``z`` at once,
    whatever they make of it. We differ: ridged towards the identity, through zero, so that no bias
    is needed, the damping chosen on held-out text. Temperature scaling: Guo et al., "On Calibration
    of Modern Neural Networks", ICML 2017; ours is fitted to the dense model's distribution, not to
    labels.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lit_prune.calibration import regression_of
from lit_prune.decoder import (
    after_head,
    head_alone_says_it,
    head_of,
    is_plain,
    is_tied,
    scaled_norm,
    task_of,
)
from lit_prune.importance import AffineRefit, affine_refit

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from lit_prune.calibration import Side, TwoStreams
    from lit_prune.decoder import DecoderParts

# Temperatures tried, as factors of the logits: the least of a parabola through the best three.
_SCALES = tuple(math.exp(step / 8) for step in range(-8, 3))
# Tokens that one number is fitted to, and those whose logits are held at once.
_TOKENS, _LOGIT_TOKENS = 8192, 1024


def input_map(
    text: dict[Side, list[TwoStreams]],
    pair: Callable[[TwoStreams], tuple[Tensor, Tensor]],
    dampings: Sequence[float],
    where: str,
) -> AffineRefit:
    """Fit ``M``, which brings what is read in the pruned model to what is read in the dense one.

    ``M = I + (E[z_d z^T] - E[z z^T]) (E[z z^T] + lambda I)^-1``: ridge regression through zero,
    towards the identity; the damping of least error on the choose side, or the identity.

    Args:
        text: Both models on their way, by side.
        pair: What is read there, in the pruned and in the dense model, ``[batch, tokens, width]``.
        dampings: Fractions of the mean square of ``z`` to try.
        where: Where that is, for messages.

    Raises:
        CalibrationError: If a value is not finite.
    """
    fitted, other = (
        regression_of(text[side], pair, where).about() for side in ("calibrate", "choose")
    )
    identity = torch.eye(len(fitted[0]), dtype=fitted[0].dtype, device=fitted[0].device)
    return affine_refit(fitted, other, identity, dampings)


def head_map(
    parts: DecoderParts, text: dict[Side, list[TwoStreams]], dampings: Sequence[float]
) -> tuple[Tensor | None, dict[str, float | None]]:
    """Fit what the head reads, and how sure of itself it is.

    A head with weights of its own gets a map as input projections do. Then one factor of all logits
    is fitted, so that the pruned model's distribution over the next token is as near to the dense
    one's as it can be, in KL divergence: it knows less, and would be too sure. A head that shares
    its weights with the embeddings gets the factor alone. Classifiers keep their heads, and so do
    models of which we cannot tell what becomes of the logits.

    Args:
        parts: The dense model's parts.
        text: Both models behind their last layer, by side.
        dampings: As for `input_map`.

    Returns:
        ``[hidden_size, hidden_size]``, or of a tied head ``[]``, float32 on the CPU; None where
        nothing is better on the choose side. And what the plan records about it.

    Raises:
        CalibrationError: If a value is not finite.
    """
    head: Any = head_of(parts.model)
    tied = head is not None and is_tied(parts.model)
    if (
        head is None
        or task_of(parts.model) != "next_token"
        or head.weight.shape[1] != parts.hidden_size
        or not is_plain(head)
        or not head_alone_says_it(parts.model)
        or (tied and not scaled_norm(parts.final_norm, 1.0))
    ):
        return None, {}
    pair: Callable[[TwoStreams], tuple[Tensor, Tensor]] = lambda batch: batch.finals(parts)  # noqa: E731
    matrix: Tensor | None = None
    facts: dict[str, float | None] = {}
    if not tied:
        found = input_map(text, pair, dampings, "the head")
        facts = {"damping": found.damping, "condition_number_at_most": found.condition}
        matrix = None if found.damping is None else found.weight.float()
    scale = _scale(parts, text, matrix)
    facts["scale"] = scale
    if matrix is None and scale == 1.0:
        return None, facts
    if tied:
        return torch.tensor(scale), facts
    return scale * (torch.eye(parts.hidden_size) if matrix is None else matrix.cpu()), facts


def _scale(parts: DecoderParts, text: dict[Side, list[TwoStreams]], matrix: Tensor | None) -> float:
    """Return the factor of least divergence, 1 where it is no better on other text."""
    divergences = _divergences(parts, text["calibrate"], matrix, _SCALES)
    least = min(range(1, len(_SCALES) - 1), key=lambda i: float(divergences[i]))
    low, middle, high = (float(x) for x in divergences[least - 1 : least + 2])
    bend = low - 2 * middle + high
    step = (low - high) / (2 * bend) if bend > 0 else 0.0
    scale = math.exp(math.log(_SCALES[least]) + max(-1.0, min(1.0, step)) / 8)
    now, then = _divergences(parts, text["choose"], matrix, (1.0, scale))
    return scale if then < now else 1.0


@torch.no_grad()
def _divergences(
    parts: DecoderParts,
    batches: Sequence[TwoStreams],
    matrix: Tensor | None,
    scales: Sequence[float],
) -> Tensor:
    """Return the KL divergence from the dense model's distribution, with each factor."""
    head: Any = head_of(parts.model)
    total, seen = torch.zeros(len(scales), dtype=torch.float64), 0
    for batch in batches:
        pruned, dense = (x[batch.mask] for x in batch.finals(parts))
        if matrix is not None:
            pruned = pruned @ matrix.to(pruned).T
        for one, other in zip(dense.split(_LOGIT_TOKENS), pruned.split(_LOGIT_TOKENS), strict=True):
            wanted = after_head(head(one).float(), parts.model).log_softmax(-1)
            plain = head(other).float()
            bias = 0.0 if head.bias is None else head.bias.float()  # is not scaled
            for number, scale in enumerate(scales):
                said = after_head(bias + scale * (plain - bias), parts.model).log_softmax(-1)
                apart = (wanted.exp() * (wanted - said)).sum(-1)
                total[number] += float(apart.double().sum())
        seen += len(dense)
        if seen >= _TOKENS:
            break
    return total / seen
