"""Applying a plan: the only place that changes a model."""

from __future__ import annotations

from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from lit_prune.decoder import auto_class, spec_for, text_view
from lit_prune.plan import PruningPlan
from lit_prune.surgery.compare import check_ids, compare, logits_at, masked_logits
from lit_prune.surgery.compensation import Compensation
from lit_prune.surgery.slicing import stage

if TYPE_CHECKING:
    from collections.abc import Iterator

    from transformers import PreTrainedModel

    from lit_prune.surgery.edits import Replaced


def apply_plan(
    model: PreTrainedModel | str | Path,
    plan: PruningPlan | str | Path,
    compensation: Compensation | str | Path | None = None,
    *,
    verify: bool = True,
) -> PreTrainedModel:
    """Make ``model`` smaller, in place, all or nothing.

    With the base model and the paths of ``plan.json`` and ``compensation.safetensors`` it makes a
    pruned model again, for people who share plans and not weights.

    q/k/v/o and gate/up/down are sliced, removed sub-blocks become constants, removed blocks leave
    the stack; config, KV-cache slots and per-layer lists follow. dtype, device, ``requires_grad``,
    ties and hooks of what stays are kept. The result is compared with the dense model whose cut
    units are masked.

    Args:
        model: The model that the plan was made for, or the directory or hub name that transformers
            loads it from, in the dtype that the plan was made in.
        plan: What stays, or the path of a ``plan.json``.
        compensation: Constants for what was cut, made for this plan and these weights, or the path
            of a ``compensation.safetensors``.
        verify: Compare before declaring success.

    Returns:
        The model, now smaller.

    Raises:
        ArtifactError: If a file cannot be read, or is something else.
        PlanMismatchError: If plan or compensation belong to another model.
        SurgeryError: If the result is not what was planned. In every failure the model is
            bit-identical.

    Example:
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> from lit_prune.plan import LayerPlan, PruningPlan
        >>> config = LlamaConfig(hidden_size=16, intermediate_size=24, num_hidden_layers=2,
        ...                      num_attention_heads=4, num_key_value_heads=2, vocab_size=32)
        >>> model = LlamaForCausalLM(config).eval()
        >>> layers = (LayerPlan(0, (1,), tuple(range(8))), LayerPlan(1, (), ()))
        >>> model = apply_plan(model, PruningPlan(spec_for(model).fingerprint, layers))
        >>> model.config.num_hidden_layers, model.model.layers[0].mlp.down_proj
        (1, Linear(in_features=8, out_features=16, bias=False))
    """
    if isinstance(plan, str | Path):
        plan = PruningPlan.load(Path(plan))
    if isinstance(compensation, str | Path):
        compensation = Compensation.load(Path(compensation))
    dense = _loaded(model, plan) if isinstance(model, str | Path) else model
    with applied(text_view(dense), plan, compensation, verify=verify):
        return dense


def _loaded(name: str | Path, plan: PruningPlan) -> PreTrainedModel:
    import transformers

    config = transformers.AutoConfig.from_pretrained(name)
    auto: Any = getattr(transformers, auto_class(*(config.architectures or ("",))[:1]))
    dtype = plan.provenance.get("dtype", "auto")
    model: PreTrainedModel = auto.from_pretrained(name, dtype=dtype)
    return model.eval()  # type: ignore[no-any-return] # untyped upstream


@contextmanager
def applied(
    model: PreTrainedModel,
    plan: PruningPlan,
    compensation: Compensation | None = None,
    *,
    verify: bool = True,
) -> Iterator[tuple[Replaced, ...]]:
    """Apply a plan as `apply_plan` does, and take it back if what the ``with`` holds fails.

    Yields where every parameter that is new comes from, and which ones left. The dense weights are
    freed at its end.
    """
    before = list(model.parameters())
    spec = spec_for(model)
    plan.validate(spec)
    if compensation is not None:
        compensation.check(model, plan)
    # outside inference mode: parameters made inside `Trainer.validate` could never be trained
    with torch.inference_mode(False), torch.no_grad():
        ids = check_ids(model)
        wanted = masked_logits(model, plan, compensation, ids) if verify else None
        edits = stage(model, spec, plan, compensation)
        edits.commit()
    try:
        if wanted is not None:
            with torch.inference_mode(False), torch.no_grad():
                compare(wanted, logits_at(model, ids), ids, routed=spec.has_experts)
        yield edits.record(before, model.parameters())
    except BaseException:
        edits.rollback()
        raise


class _TakenBack(Exception):  # noqa: N818 - nothing is wrong
    """Ends a trial."""


@contextmanager
def tried(
    model: PreTrainedModel,
    plan: PruningPlan,
    compensation: Compensation | None = None,
    *,
    verify: bool = True,
) -> Iterator[tuple[Replaced, ...]]:
    """Apply a plan as `applied` does, and take it back in any case: the dense weights stay."""
    with suppress(_TakenBack), applied(model, plan, compensation, verify=verify) as replaced:
        yield replaced
        raise _TakenBack
