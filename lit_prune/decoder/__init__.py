"""A causal language model seen as prunable units."""

from lit_prune.decoder.constant import ConstantOutput
from lit_prune.decoder.describe import fingerprint, spec_for
from lit_prune.decoder.experts import Experts, Routed
from lit_prune.decoder.families import FAMILIES, Family, family_of, register_family
from lit_prune.decoder.locate import find_causal_lm
from lit_prune.decoder.parts import DecoderParts
from lit_prune.decoder.prices import Price, constant_bytes, unit_prices
from lit_prune.decoder.quiet import quiet
from lit_prune.decoder.residual import LEADING, Remainder, SubBlock, all_kept, remainder
from lit_prune.decoder.spec import (
    KINDS,
    AttentionSpec,
    BlockSpec,
    DecoderSpec,
    ExpertsSpec,
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
    "Experts",
    "ExpertsSpec",
    "Family",
    "MlpSpec",
    "Price",
    "Remainder",
    "Routed",
    "SubBlock",
    "SubBlockKind",
    "all_kept",
    "constant_bytes",
    "family_of",
    "find_causal_lm",
    "fingerprint",
    "quiet",
    "register_family",
    "remainder",
    "spec_for",
    "unit_prices",
]
