"""A causal language model seen as prunable units."""

from lit_prune.decoder.calls import call_of
from lit_prune.decoder.constant import ConstantOutput
from lit_prune.decoder.describe import fingerprint, spec_for
from lit_prune.decoder.families import FAMILIES, family_of, register_family
from lit_prune.decoder.family import Family
from lit_prune.decoder.locate import find_causal_lm
from lit_prune.decoder.parts import DecoderParts
from lit_prune.decoder.prices import Price, constant_bytes, shared_bytes, unit_prices
from lit_prune.decoder.projections import Projection
from lit_prune.decoder.quiet import quiet
from lit_prune.decoder.residual import LEADING, Remainder, SubBlock, all_kept, remainder
from lit_prune.decoder.spec import (
    KINDS,
    AttentionSpec,
    BlockSpec,
    DecoderSpec,
    MlpSpec,
    SubBlockKind,
)

__all__ = [
    "FAMILIES",
    "KINDS",
    "LEADING",
    "AttentionSpec",
    "BlockSpec",
    "ConstantOutput",
    "DecoderParts",
    "DecoderSpec",
    "Family",
    "MlpSpec",
    "Price",
    "Projection",
    "Remainder",
    "SubBlock",
    "SubBlockKind",
    "all_kept",
    "call_of",
    "constant_bytes",
    "family_of",
    "find_causal_lm",
    "fingerprint",
    "quiet",
    "register_family",
    "remainder",
    "shared_bytes",
    "spec_for",
    "unit_prices",
]
