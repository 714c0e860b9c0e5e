"""After a surgery: the result computes what the masked dense model does."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lit_prune.decoder import logits_of, quiet
from lit_prune.errors import SurgeryError
from lit_prune.surgery.mask import masked

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from lit_prune.plan import PruningPlan
    from lit_prune.surgery.compensation import Compensation

# Largest difference of logits to the masked dense model, as a fraction of the largest logit.
# float32 sums in another order; half precision rounds every activation, and the rounding grows
# through the layers.
_TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4, torch.float16: 0.05, torch.bfloat16: 0.2}


def check_ids(model: PreTrainedModel) -> Tensor:
    """Return the random token ids that both are shown, ``[2, tokens]``."""
    vocabulary = model.config.vocab_size
    tokens = min(24, getattr(model.config, "max_position_embeddings", 24))
    ids = torch.randint(vocabulary, (2, tokens), generator=torch.Generator().manual_seed(0))
    return ids.to(next(model.parameters()).device)


def logits_at(model: PreTrainedModel, ids: Tensor) -> Tensor:
    """Return logits ``[batch, tokens, vocabulary]``, or of classes; the model keeps no trace."""
    with quiet(model):
        return logits_of(model, input_ids=ids)


def masked_logits(
    model: PreTrainedModel, plan: PruningPlan, compensation: Compensation | None, ids: Tensor
) -> Tensor | None:
    """Return the logits of the masked dense model; None where the dense one has no finite ones."""
    with masked(model, plan, compensation):
        wanted = logits_at(model, ids)
    if bool(torch.isfinite(wanted).all()):
        return wanted
    if not bool(torch.isfinite(logits_at(model, ids)).all()):
        return None  # calibration says so where it matters
    raise SurgeryError(
        f"the pruned model would not be finite: {int((~torch.isfinite(wanted)).sum())} of "
        f"{wanted.numel()} logits of {list(ids.shape)} random tokens are NaN or infinite "
        f"({wanted.dtype}), and the dense model's are finite. The model is unchanged. Do constants "
        "or weights of the compensation overflow? Use bfloat16 or float32, or another compensation."
    )


def compare(wanted: Tensor, got: Tensor, ids: Tensor, *, routed: bool = False) -> None:
    """Refuse logits that are not those of the masked dense model.

    Args:
        wanted: Of the masked dense model, ``[batch, tokens, vocabulary]``.
        got: Of the pruned one.
        ids: What both were shown.
        routed: Whether the model has experts. Rounding may then send a token to another of two
            equally good ones, which no tolerance covers: half of the tokens have to agree. Units
            that are wrong show in every token.

    Raises:
        SurgeryError: Says by how much they differ.
    """
    by_token = (wanted.float() - got.float()).abs().amax(-1)
    worst = float(by_token.median() if routed else by_token.max())
    scale = float(wanted.abs().max()) or 1.0
    dtype = wanted.dtype
    if not worst <= _TOLERANCE[dtype] * scale:
        raise SurgeryError(
            f"the pruned model does not compute what the plan says: logits of {list(ids.shape)} "
            f"random tokens differ by {worst:.3g} (largest logit {scale:.3g}, {dtype}) from the "
            "dense model with the same units masked. The model was put back as it was. Please "
            "report this with the model's config."
        )
