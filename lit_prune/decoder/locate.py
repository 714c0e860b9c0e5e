"""Finding the language model inside a user's module."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import nn

from lit_prune.decoder.families import FAMILIES, family_name, family_of, refuse_known_kind
from lit_prune.decoder.head import TASKS, task_named
from lit_prune.decoder.wrapper import is_wrapper, text_view
from lit_prune.errors import ConfigError, UnsupportedModelError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_CLASSES = " or ".join(f"…{end}" for end in TASKS)


def find_causal_lm(module: nn.Module, name: str | None = None) -> PreTrainedModel:
    """Return the one Hugging Face causal language model that ``module`` holds (or is).

    A classifier of texts or tokens on such a decoder counts as one. Of a multimodal model it is the
    language model inside (`text_view`).

    Args:
        module: Any module, a LightningModule for instance.
        name: Path of the language model inside ``module``, needed where there are several.

    Raises:
        ConfigError: If ``name`` does not exist, or there are several candidates and no ``name``.
        UnsupportedModelError: If there is none.

    Example:
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> lm = LlamaForCausalLM(LlamaConfig(hidden_size=8, intermediate_size=8, vocab_size=8,
        ...                                   num_hidden_layers=1, num_attention_heads=1))
        >>> find_causal_lm(nn.ModuleDict({"inside": lm})) is lm
        True
    """
    from transformers import PreTrainedModel

    if name is not None:
        try:
            found = module.get_submodule(name)
        except AttributeError as error:
            raise ConfigError(
                f"language_model={name!r}: {type(module).__name__} has no such sub-module."
            ) from error
        if not isinstance(found, PreTrainedModel):
            raise ConfigError(
                f"language_model={name!r} is a {type(found).__name__}, expected a Hugging Face "
                f"{_CLASSES}."
            )
        found = text_view(found)
        family_of(found)
        return found
    whole = {
        path: text_view(part)
        for path, part in module.named_modules()
        if isinstance(part, PreTrainedModel)
        and (is_wrapper(part) or task_named(type(part).__name__) is not None)
    }
    supported = {
        path: part
        for path, part in whole.items()
        if family_name(part.config.model_type) in FAMILIES
    }
    if len(supported) == 1:
        return next(iter(supported.values()))
    if supported:
        raise ConfigError(
            f"{type(module).__name__} holds {len(supported)} causal language models: "
            f"{sorted(supported)}. Name one with language_model=…"
        )
    if whole:
        family_of(next(iter(whole.values())))  # raises, and names the family
    others = [part for part in module.modules() if isinstance(part, PreTrainedModel)]
    for part in others:
        refuse_known_kind(part)
    names = sorted(type(part).__name__ for part in others) or "none"
    raise UnsupportedModelError(
        f"{type(module).__name__} holds no Hugging Face causal language model (found: {names}). "
        f"Supported: {_CLASSES} of {', '.join(sorted(FAMILIES))}."
    )
