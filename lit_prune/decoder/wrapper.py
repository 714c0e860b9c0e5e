"""Multimodal models: the language model inside one, seen as a causal language model of its own.

The view shares every module and the config with what it is a view of, so what is done to it is done
there: the wrapper's own forward, images included, runs the pruned text model.
"""

from __future__ import annotations

import weakref
from typing import TYPE_CHECKING, Any

from lit_prune.decoder.head import AFTER_THE_HEAD
from lit_prune.errors import UnsupportedModelError

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedModel

# Model types whose class is a text model at ``model.language_model`` and a head on what it returns.
WRAPPERS = ("gemma3", "llava", "mistral3")
_END = "ForConditionalGeneration"
_MEDIA = ("image_token_id", "video_token_id", "audio_token_id")
# One view for each wrapper, so that "the model" stays the same object.
_views: weakref.WeakKeyDictionary[nn.Module, PreTrainedModel] = weakref.WeakKeyDictionary()
_wholes: weakref.WeakKeyDictionary[nn.Module, weakref.ref[PreTrainedModel]] = (
    weakref.WeakKeyDictionary()
)


def is_wrapper(module: nn.Module) -> bool:
    """Return whether a module is a multimodal model whose text part can be pruned."""
    model_type = getattr(getattr(module, "config", None), "model_type", None)
    return model_type in WRAPPERS and type(module).__name__.endswith(_END)


def text_view(model: PreTrainedModel) -> PreTrainedModel:
    """Return the language model inside a multimodal one; of any other model itself.

    Args:
        model: Any Hugging Face model.

    Returns:
        A ``…ForCausalLM`` around the same modules, the same object each time.

    Raises:
        UnsupportedModelError: If it would not compute what the wrapper computes of text.

    Example:
        >>> from transformers import (CLIPVisionConfig, LlamaConfig, LlavaConfig,
        ...                           LlavaForConditionalGeneration)
        >>> sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1,
        ...          "num_attention_heads": 1}
        >>> llava = LlavaForConditionalGeneration(LlavaConfig(
        ...     text_config=LlamaConfig(vocab_size=8, **sizes),
        ...     vision_config=CLIPVisionConfig(image_size=4, patch_size=2, **sizes)))
        >>> view = text_view(llava)
        >>> type(view).__name__, view.model is llava.model.language_model, whole_of(view) is llava
        ('LlamaForCausalLM', True, True)
    """
    if not is_wrapper(model):
        return model
    wrapper: Any = model
    text, head = wrapper.model.language_model, wrapper.lm_head
    known: Any = _views.get(model)
    if known is not None and known.model is text and known.lm_head is head:
        return text_view(known)  # known, and no wrapper
    _refuse_inexact(model, text.config)
    view = _around(text, head)
    view.training = model.training
    view.generation_config = wrapper.generation_config
    _views[model], _wholes[view] = view, weakref.ref(model)
    return view


def whole_of(model: PreTrainedModel) -> PreTrainedModel:
    """Return the multimodal model that ``model`` is a view of; any other model itself."""
    reference = _wholes.get(model)
    return (reference and reference()) or model


def media_tokens(model: PreTrainedModel) -> tuple[int, ...]:
    """Return the token ids that stand for parts of an image and the like."""
    config = whole_of(model).config
    if whole_of(model) is model:
        return ()
    found = (getattr(config, name, None) for name in _MEDIA)
    return tuple(token for token in found if isinstance(token, int))


def _around(text: Any, head: nn.Module) -> PreTrainedModel:  # noqa: ANN401 - untyped upstream
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, PreTrainedModel

    kind: Any = MODEL_FOR_CAUSAL_LM_MAPPING[type(text.config)]
    view: Any = kind.__new__(kind)
    PreTrainedModel.__init__(view, text.config)  # the parts are there: none is made
    view.model, view.lm_head, view.vocab_size = text, head, text.config.vocab_size
    made: PreTrainedModel = view
    return made


def _refuse_inexact(model: PreTrainedModel, config: Any) -> None:  # noqa: ANN401 - untyped upstream
    name = type(model).__name__
    if model.config.get_text_config() is not config:
        raise UnsupportedModelError(
            f"the text model of {name} has another config object than config.text_config: pruning "
            "could not keep the two alike. Build it from one config."
        )
    for option, none in AFTER_THE_HEAD.items():  # a wrapper does none of that
        value = getattr(config, option, none)
        if value not in (None, none):
            raise UnsupportedModelError(
                f"text_config.{option} is {value}, which a {config.model_type} model of text "
                f"applies to its logits and {name} does not: lit_prune would measure another model."
            )
