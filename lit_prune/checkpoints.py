"""Checkpoints of pruned models load into modules that build the dense one."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

from lit_prune.decoder import find_causal_lm, whole_of
from lit_prune.plan import PruningPlan
from lit_prune.record import PruningRecord
from lit_prune.surgery import take_structure

if TYPE_CHECKING:
    from torch import nn
    from torch.utils.hooks import RemovableHandle


def follow_checkpoints(module: nn.Module, language_model: str | None = None) -> RemovableHandle:
    """Let a module take the structure of what is loaded into it, just before it is loaded.

    Call it at the end of ``__init__`` of your LightningModule: then ``load_from_checkpoint`` of a
    pruned run works, and so does any ``load_state_dict``. With `EntropyPruningCallback` in the
    Trainer, ``trainer.fit(ckpt_path=...)`` needs no such call (list it before a WeightAveraging,
    which copies the module as it finds it).

    Args:
        module: Holds the language model, dense when it is built.
        language_model: Its path in ``module``, where there are several.

    Returns:
        A handle whose ``remove()`` ends it.

    Raises:
        PlanMismatchError: While loading, if the weights are those of another model; the module is
            unchanged.

    Example:
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> from torch import nn
        >>> def module(width):
        ...     config = LlamaConfig(hidden_size=8, intermediate_size=width, num_hidden_layers=1,
        ...                          num_attention_heads=2, vocab_size=8)
        ...     return nn.ModuleDict({"lm": LlamaForCausalLM(config).eval()})
        >>> dense, pruned = module(16), module(6)
        >>> handle = follow_checkpoints(dense)
        >>> dense.load_state_dict(pruned.state_dict())
        <All keys matched successfully>
    """
    handle: RemovableHandle = module.register_load_state_dict_pre_hook(
        partial(_take, language_model)
    )
    return handle


def _take(
    language_model: str | None,
    module: nn.Module,
    state_dict: dict[str, Any],
    prefix: str,
    *_: object,
) -> None:
    model = find_causal_lm(module, language_model)
    paths = {part: name for name, part in module.named_modules()}
    shapes: dict[str, tuple[int, ...]] = {}
    for child, part in model.named_children():  # of a view they lie apart in the module
        start = f"{prefix}{paths[part]}."
        shapes |= {
            f"{child}.{name.removeprefix(start)}": tuple(value.shape)
            for name, value in state_dict.items()
            if name.startswith(start)
        }
    if shapes:
        take_structure(model, shapes)


def remember_plan(
    module: nn.Module, language_model: str | None, checkpoint: dict[str, Any], callback: str
) -> PruningPlan | None:
    """Put the plan that a checkpoint carries on the model that took its structure.

    In every stage: Lightning itself restores the states of callbacks in a fit alone.

    Args:
        module: Holds the language model; the weights of the checkpoint are in it.
        language_model: Its path in ``module``, where there are several.
        checkpoint: As Lightning reads it.
        callback: Under which name the callback's state lies there.

    Returns:
        The plan; None where the checkpoint is of no pruned model.
    """
    text = checkpoint.get("callbacks", {}).get(callback, {}).get("plan", "")
    if not text:
        return None
    model, plan = find_causal_lm(module, language_model), PruningPlan.from_json(text)
    record = getattr(model, "pruning_record", None)
    if record is None or record.plan.digest != plan.digest:  # else it has its report, too
        for part in {model, whole_of(model)}:
            part.pruning_record = PruningRecord(plan)  # type: ignore[assignment]
    return plan
