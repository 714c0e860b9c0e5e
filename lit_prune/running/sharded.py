"""Sharded parameters are not cut in place: a whole copy on rank 0 is pruned, the module stays.

How a run goes on from there: the pruned copy is saved (`EntropyPruningCallback.save_pruned`), or
the plan is applied to the whole model in ``configure_model``, before it is sharded.
"""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

import torch

from lit_prune.decoder import whole_of
from lit_prune.errors import UnsupportedModelError
from lit_prune.running.loops import is_a

if TYPE_CHECKING:
    from lightning.pytorch import Trainer
    from torch import Tensor
    from transformers import PreTrainedModel

    from lit_prune.ranks import Ranks

_SHARDED = ("FSDPStrategy", "ModelParallelStrategy", "DeepSpeedStrategy")

STAYS_DENSE = (
    "the parameters in training are sharded, so a whole copy of the model was pruned on rank 0 and "
    "the module stays dense: save_pruned(...) saves the copy. To train it on, load what was saved, "
    "or apply_plan(model, 'plan.json', 'compensation.safetensors') to the trained dense weights, "
    "in configure_model before fully_shard"
)


def is_sharded(trainer: Trainer) -> bool:
    """Return whether no process holds the whole parameters."""
    return is_a(trainer.strategy, *_SHARDED)


def whole_copy(model: PreTrainedModel, ranks: Ranks) -> PreTrainedModel | None:
    """Gather a sharded model into a plain one on rank 0, in the memory of its CPU.

    Run with FSDP2 on two CPU processes; with FSDP's first version and with DeepSpeed, never.

    Args:
        model: Sharded; it is left as it was.
        ranks: All must call this.

    Returns:
        None on the other ranks.
    """
    if whole_of(model) is not model:
        raise UnsupportedModelError(
            f"{type(whole_of(model)).__name__} is multimodal and its parameters are sharded: prune "
            "it after the run, on one device, by lit_prune.prune(...)."
        )
    weights = _gathered(model)
    if not ranks.is_first:
        return None
    # `fully_shard` puts a class of its own before the model's
    kind: type[PreTrainedModel] = next(
        kind for kind in type(model).__mro__ if kind.__module__.startswith("transformers.")
    )
    dtype = next(iter(weights.values())).dtype
    with torch.inference_mode(False):  # else what comes of it could never be trained
        whole: PreTrainedModel = kind.from_pretrained(
            None, config=copy.deepcopy(model.config), state_dict=weights, dtype=dtype
        )
    whole.train(model.training)
    return whole


def _gathered(model: PreTrainedModel) -> dict[str, Tensor]:
    """Return the whole weights, on rank 0; call it on all."""
    if any(hasattr(parameter, "ds_id") for parameter in model.parameters()):
        from deepspeed.zero import GatheredParameters

        with GatheredParameters([*model.parameters()]):
            return {name: x.detach().cpu().clone() for name, x in model.state_dict().items()}
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    found: Any = get_model_state_dict(model, options=options)
    return dict(found)
