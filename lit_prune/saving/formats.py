"""The formats that `save_pruned` can write, and which one it takes.

A new format is one file with a function ``model -> Prepared`` and one line in `FORMATS`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from lit_prune.decoder import whole_of
from lit_prune.decoder.families import family_name
from lit_prune.errors import ConfigError, FormatError, did_you_mean
from lit_prune.saving.carrier import TARGETS
from lit_prune.saving.gguf import gguf, require_gguf
from lit_prune.saving.heterogeneous import heterogeneous
from lit_prune.saving.models import HELD
from lit_prune.saving.padded import can_pad, padded
from lit_prune.saving.prepared import Prepared
from lit_prune.saving.stock import stock
from lit_prune.saving.wrapped import prepare_whole

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

FORMATS: dict[str, Callable[[Any], Prepared]] = {
    "stock": stock,
    "heterogeneous": heterogeneous,
    "padded": padded,
    "gguf": gguf,
}
# What ``auto`` tries, in order: these lose nothing and add (next to) nothing. Where a family has no
# model file, it goes on to ``padded``.
LOSSLESS = ("stock", "heterogeneous")


def prepare(
    model: PreTrainedModel, name: str, tokenizer: PreTrainedTokenizerBase | None = None
) -> tuple[Prepared, str]:
    """Return what is to be written, and why in this format, in words.

    Args:
        model: A causal language model of a supported family, or the view of one.
        name: A key of `FORMATS`, or ``auto``.
        tokenizer: What is saved beside it.

    Raises:
        ConfigError: If there is no such format.
        FormatError: If the format cannot hold the model; names what blocks it and the format that
            can.

    Example:
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> config = LlamaConfig(hidden_size=8, intermediate_size=8, num_hidden_layers=1,
        ...                      num_attention_heads=1, vocab_size=8)
        >>> prepare(LlamaForCausalLM(config), "auto")[1]
        'auto took stock: LlamaForCausalLM of plain transformers holds it'
    """
    refuse_format(name)
    if whole_of(model) is not model:
        whole = prepare_whole(model, name).with_tokenizer(tokenizer)
        return whole, f"{whole.class_name} of plain transformers holds it"
    if name != "auto":
        try:
            return FORMATS[name](model).with_tokenizer(tokenizer), f"{name} was asked for"
        except FormatError as error:
            raise FormatError(name, error.reason, instead=_instead(model, name)) from error
    refusals: list[str] = []
    for candidate in LOSSLESS:
        try:
            prepared = FORMATS[candidate](model)
        except FormatError as error:
            refusals.append(error.reason)
            continue
        because = "; ".join(refusals) or f"{prepared.class_name} of plain transformers holds it"
        return prepared.with_tokenizer(tokenizer), f"auto took {candidate}: {because}"
    if family_name(model.config.model_type) not in HELD and can_pad(model):
        because = f"auto took padded: {'; '.join(refusals)}"
        return padded(model).with_tokenizer(tokenizer), because
    raise FormatError("auto", "; ".join(refusals), instead=_instead(model, "auto"))


def refuse_format(name: str) -> None:
    """Refuse a format that cannot be written whatever the model, before any work.

    Args:
        name: A key of `FORMATS`, or ``auto``.

    Raises:
        ConfigError: If there is no such format, or a package is missing.
    """
    if name != "auto" and name not in FORMATS:
        known = ["auto", *FORMATS]
        raise ConfigError(
            f"format must be one of {known}, got {name!r}{did_you_mean(str(name), known)}."
        )
    if name == "gguf":
        require_gguf()


def _instead(model: PreTrainedModel, refused: str) -> str | None:
    """Name the formats that can hold what another cannot."""
    words = []
    if family_name(model.config.model_type) in HELD:
        try:
            heterogeneous(model)
            words.append("heterogeneous (exact)")
        except FormatError:  # a module was replaced by hand: no format holds it
            return None
    if can_pad(model):
        words.append("padded (with zeros)")
    elif family_name(model.config.model_type) in TARGETS.keys() - set(HELD):
        words.append("padded, of a model that was pruned with add_biases=False")
    return ", ".join(word for word in words if not word.startswith(f"{refused} ")) or None
