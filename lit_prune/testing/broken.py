"""Decoders that are not what their entry says: whoever describes them must notice."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import nn

if TYPE_CHECKING:
    from lit_prune.decoder import DecoderParts


def add_parameter(parts: DecoderParts) -> None:
    """Give the last layer a parameter that no entry names."""
    parts.layers[-1].register_parameter("surprise", nn.Parameter(torch.zeros(1)))


def widen(parts: DecoderParts) -> None:
    """Give the last MLP a channel more than the others know, or the experts one more."""
    last = len(parts.layers) - 1
    if routed := parts.routed(last):
        module, name, packed = routed.owned[-1]
        setattr(module, name, nn.Parameter(torch.cat([packed, packed[:1]]).detach()))
        return
    output = parts.output(last, "mlp")
    wide = torch.cat([output.weight, output.weight[:, :1]], 1).detach()
    output.module.weight = nn.Parameter(output.oriented(wide).contiguous())
