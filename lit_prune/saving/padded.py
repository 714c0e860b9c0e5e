"""Format ``padded``: any plan in a stock class, the missing units put back as zeros.

It loads everywhere and computes the same; it saves none of the memory and time that pruning won in
the layers that are narrower than the widest. What that costs is stated.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from lit_prune.saving.body import Widths, body_of
from lit_prune.saving.carrier import can_pad_into, carry

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from lit_prune.saving.prepared import PreparedDirectory


def padded(model: PreTrainedModel) -> PreparedDirectory:
    """Prepare a model in the widths of its widest layer, or in those that its class insists on.

    A query or key head of zeros attends evenly to values of zeros, and meets columns of zeros in
    the output projection; a missing sub-block is one of zeros, with its constant as the bias.

    Raises:
        FormatError: If no class of transformers holds the biases.
    """
    body = body_of(model)
    return carry(model, body, Widths.of(body), "padded", padded=True)


def can_pad(model: PreTrainedModel) -> bool:
    """Return whether `padded` can hold a model, without making the zeros."""
    body = body_of(model)
    return can_pad_into(model, body, Widths.of(body))
