"""What stands on a decoder, and what it says: the next token, or a class of a text or of a token.

The one place that knows; whoever needs logits, the head itself or a label's position asks here.
"""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any, Literal

import torch

if TYPE_CHECKING:
    from torch import Tensor, nn
    from transformers import PreTrainedConfig

Task = Literal["next_token", "sequence", "token"]
# End of a class name → what its head is for.
TASKS: dict[str, Task] = {
    "ForCausalLM": "next_token",
    "LMHeadModel": "next_token",
    "ForSequenceClassification": "sequence",
    "ForTokenClassification": "token",
}
# Of the classifiers; transformers names it by one of these.
_HEADS = ("score", "classifier")
IGNORED_LABEL = -100
# Fields of the config that say what becomes of logits, each with the value of "nothing": a factor,
# a divisor, and what they stay below.
AFTER_THE_HEAD = {"logit_scale": None, "logits_scaling": 1.0, "final_logit_softcapping": None}


def task_named(class_name: str) -> Task | None:
    """Return what the head of a class is for; None where it has none that is known.

    Example:
        >>> task_named("LlamaForSequenceClassification"), task_named("LlamaModel")
        ('sequence', None)
    """
    return next((task for end, task in TASKS.items() if class_name.endswith(end)), None)


def task_of(model: nn.Module) -> Task:
    """Return what the head of ``model`` is for; a class that says nothing predicts tokens."""
    return task_named(type(model).__name__) or "next_token"


def auto_class(class_name: str) -> str:
    """Return the name of the class of transformers that loads models of another.

    Example:
        >>> auto_class("LlamaForTokenClassification"), auto_class("LlamaModel")
        ('AutoModelForTokenClassification', 'AutoModelForCausalLM')
    """
    if class_name.endswith("ForConditionalGeneration"):  # multimodal: see `text_view`
        return "AutoModelForImageTextToText"
    wanted = task_named(class_name) or "next_token"
    return next(f"AutoModel{end}" for end, task in TASKS.items() if task == wanted)


def head_of(model: nn.Module) -> nn.Module | None:
    """Return the layer that turns the final hidden state into logits; None where there is none."""
    whole: Any = model
    if task_of(model) == "next_token":
        embeddings: nn.Module | None = whole.get_output_embeddings()
        return embeddings
    head: nn.Module = next(getattr(model, name) for name in _HEADS if hasattr(model, name))
    return head


def after_head(logits: Tensor, model: nn.Module) -> Tensor:
    """Return what a model that predicts tokens makes of what its head returns.

    Some scale it (Cohere, Granite), some bend it softly below a cap (Gemma 2). Of a classifier it
    comes back as it is.

    Args:
        logits: What the head returns, ``[..., outputs]``.
        model: The whole, for its config.

    Example:
        >>> from types import SimpleNamespace
        >>> granite = SimpleNamespace(config=SimpleNamespace(logits_scaling=2.0))
        >>> after_head(torch.tensor([1.0, 4.0]), granite)
        tensor([0.5000, 2.0000])
    """
    if task_of(model) != "next_token":
        return logits
    scale, divisor, cap = (
        getattr(model.config, name, none) for name, none in AFTER_THE_HEAD.items()
    )
    factor = (scale or 1.0) / (divisor or 1.0)
    if factor != 1.0:
        logits = logits * factor
    return logits if cap is None else torch.tanh(logits / cap) * cap


def is_tied(model: nn.Module) -> bool:
    """Return whether the head's weights are those of the embeddings: what one has the other has."""
    whole: Any = model
    head: Any = head_of(model)
    return head is not None and head.weight is whole.get_input_embeddings().weight


def scaled_norm(norm: nn.Module, scale: float) -> dict[str, Tensor]:
    """Return parameters, by name, under which a norm returns ``scale`` times what it does now.

    Gemma's multiply with one more than their weight. Empty where a norm has no weight.

    Example:
        >>> norm = torch.nn.RMSNorm(2)
        >>> scaled_norm(norm, 0.5)["weight"]
        tensor([0.5000, 0.5000])
    """
    own = {name: parameter.detach() for name, parameter in norm.named_parameters()}
    if "weight" not in own:
        return {}
    bare: Any = copy.copy(norm)  # shares all but what it is given here
    vars(bare)["_parameters"] = {name: torch.zeros_like(value) for name, value in own.items()}
    probe = torch.arange(len(own["weight"])).to(own["weight"])
    with torch.no_grad():  # the class's forward: hooks are the user's
        left = type(norm).forward(bare, probe.reshape(1, 1, -1))
    more = 1.0 if bool(left.any()) else 0.0
    exact = {name: x.to(torch.promote_types(x.dtype, torch.float32)) for name, x in own.items()}
    return {
        name: scale * (value + more) - more if name == "weight" else scale * value
        for name, value in exact.items()
    }


def head_alone_says_it(model: nn.Module) -> bool:
    """Return whether `after_head` of the head, on the final state, is what the model returns.

    A class of one's own may do more to its logits than any of transformers does.
    """
    whole: Any = model
    embeddings: Any = whole.get_input_embeddings()
    ids = torch.arange(min(8, len(embeddings.weight)), device=embeddings.weight.device)[None]
    with torch.no_grad():
        hidden = whole.base_model(input_ids=ids, use_cache=False).last_hidden_state
        head: Any = head_of(model)
        said, wanted = after_head(head(hidden), model), logits_of(model, input_ids=ids)
    apart = (said.float() - wanted.float()).abs().max()
    # of one forward, twice: the same operations but for a cast or two
    return bool(apart <= 0.02 * wanted.float().abs().max())


def logits_of(model: nn.Module, **inputs: Any) -> Tensor:
    """Return what the head says at every token, ``[batch, tokens, outputs]``; no cache is filled.

    A classifier of texts returns the logits of one token only, and of a batch none at all where no
    padding token is named: here its head is asked of all.
    """
    run: Any = model
    if task_of(model) == "next_token":
        logits: Tensor = run(**inputs, use_cache=False).logits
        return logits
    head: Any = head_of(model)
    said: Tensor = head(run.base_model(**inputs, use_cache=False).last_hidden_state)
    return said


def read_at(ids: Tensor, mask: Tensor, config: PreTrainedConfig) -> Tensor:
    """Return the column at which a classifier of texts reads each row, ``[batch]``.

    As in transformers the last token that is not the padding token, of those that are real: a text
    that ends with it, where it is the end-of-text token too, is read before it.

    Args:
        ids: ``[batch, tokens]``.
        mask: Real tokens, ``[batch, tokens]``, bool.
        config: Names the padding token, or none.

    Example:
        >>> from types import SimpleNamespace
        >>> ids = torch.tensor([[5, 6, 0, 0], [0, 0, 7, 8]])
        >>> read_at(ids, ids != 0, SimpleNamespace(pad_token_id=0))
        tensor([1, 3])
    """
    pad = getattr(config, "pad_token_id", None)
    readable = mask if pad is None else mask & (ids != pad)
    columns = torch.arange(ids.shape[1], device=ids.device)
    if not ids.shape[1]:
        return columns.new_zeros(len(ids))
    return (columns * readable).argmax(1)


def placed_labels(
    task: Task, labels: Tensor, ids: Tensor, mask: Tensor, config: PreTrainedConfig
) -> Tensor:
    """Put the labels of a classifier where its head is read, -100 elsewhere, ``[batch, tokens]``.

    Args:
        task: ``sequence``: one label for each row, ``[batch]``; ``token``: one for each token.
        labels: int64.
        ids: ``[batch, tokens]``.
        mask: Real tokens, ``[batch, tokens]``, bool.
        config: Of the model.
    """
    if task == "token":
        return labels.masked_fill(~mask, IGNORED_LABEL)
    at = read_at(ids, mask, config).unsqueeze(1)
    return torch.full_like(ids, IGNORED_LABEL).scatter(1, at, labels.reshape(-1, 1).to(ids.dtype))
