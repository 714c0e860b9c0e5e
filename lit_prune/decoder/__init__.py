"""A causal language model seen as prunable units."""

from lit_prune.decoder.calls import call_of
from lit_prune.decoder.constant import ConstantOutput
from lit_prune.decoder.describe import fingerprint, spec_for
from lit_prune.decoder.experts import Experts, Routed
from lit_prune.decoder.families import FAMILIES, family_of
from lit_prune.decoder.family import Family
from lit_prune.decoder.head import (
    IGNORED_LABEL,
    Task,
    after_head,
    auto_class,
    head_alone_says_it,
    head_of,
    is_tied,
    logits_of,
    placed_labels,
    read_at,
    scaled_norm,
    task_of,
)
from lit_prune.decoder.infer import infer_family
from lit_prune.decoder.locate import find_causal_lm
from lit_prune.decoder.parts import DecoderParts
from lit_prune.decoder.prices import Price, constant_bytes, shared_bytes, unit_prices
from lit_prune.decoder.projections import Projection, is_plain
from lit_prune.decoder.quiet import quiet
from lit_prune.decoder.registering import register_family
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
from lit_prune.decoder.wrapper import media_tokens, text_view, whole_of

__all__ = [
    "FAMILIES",
    "IGNORED_LABEL",
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
    "Projection",
    "Remainder",
    "Routed",
    "SubBlock",
    "SubBlockKind",
    "Task",
    "after_head",
    "all_kept",
    "auto_class",
    "call_of",
    "constant_bytes",
    "family_of",
    "find_causal_lm",
    "fingerprint",
    "head_alone_says_it",
    "head_of",
    "infer_family",
    "is_plain",
    "is_tied",
    "logits_of",
    "media_tokens",
    "placed_labels",
    "quiet",
    "read_at",
    "register_family",
    "remainder",
    "scaled_norm",
    "shared_bytes",
    "spec_for",
    "task_of",
    "text_view",
    "unit_prices",
    "whole_of",
]
