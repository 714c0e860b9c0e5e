"""The reference for surgery: the dense model with units masked and the constants added."""

from __future__ import annotations

from contextlib import contextmanager
from functools import cache, partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from lit_prune.decoder import DecoderParts, head_of, spec_for
from lit_prune.surgery.compensation import compensated_inputs, mapped, unit_columns
from lit_prune.surgery.experts import route_past

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from torch.utils.hooks import RemovableHandle
    from transformers import PreTrainedModel

    from lit_prune.decoder import DecoderSpec
    from lit_prune.plan import PruningPlan
    from lit_prune.surgery.compensation import Compensation


@contextmanager
def masked(
    model: PreTrainedModel,
    plan: PruningPlan,
    compensation: Compensation | None = None,
    *,
    spec: DecoderSpec | None = None,
) -> Iterator[None]:
    """Make the dense model compute what the pruned one would, for the time of the ``with``.

    No weight is touched: projections compute with others for the time, or hooks zero what cut units
    feed to them; hooks let routers choose among the experts that stay, and add the constants.

    Args:
        model: The dense model that the plan was made for.
        plan: What stays.
        compensation: Constants for what was cut.
        spec: `spec_for` of the model, where it is known: many plans are tried on one model.
    """
    spec, parts = spec or spec_for(model), DecoderParts(model)
    plan.validate(spec)
    constants = compensation.constants if compensation else {}
    handles: list[RemovableHandle | Instead] = []
    try:
        for index, part in spec.sub_blocks:
            kept = plan.layers[index].kept(part.kind)
            if (routed := parts.routed(index, part.kind)) is not None:
                if not kept:
                    whole = parts.sub_block(index, part.kind)
                    handles.append(whole.register_forward_hook(_nothing))
                elif len(kept) < part.num_units:
                    handles.append(route_past(routed, kept))
                continue
            if kept:
                others = compensated_inputs(parts, (index, part.kind), kept, compensation)
                for module, weight in others.items():
                    bias: Any = module.bias
                    handles.append(Instead(module, _projection(weight, bias)))
            linear = parts.output(index, part.kind)
            like = linear.weight
            constant = constants.get((index, part.kind))
            if constant is not None:
                constant = constant.to(like.device, like.dtype)
            after = parts.post_norm_path(part.kind)
            if not kept and after is not None:  # it leaves too
                norm = parts.layers[index].get_submodule(after)
                handles.append(norm.register_forward_hook(partial(_replace, None)))
            elif not kept:
                handles.append(linear.module.register_forward_hook(partial(_replace, constant)))
            elif compensation is not None and (index, part.kind) in compensation.weights:
                columns = unit_columns(kept, part.unit_width).to(like.device)
                weight = partial(compensation.weights[index, part.kind].to, like.device, like.dtype)
                other = _projection(weight, linear.bias, columns, constant)
                handles.append(Instead(linear.module, other))
            elif len(kept) < part.num_units:
                mask = like.new_zeros(linear.in_features)
                mask[unit_columns(kept, part.unit_width)] = 1
                handles.append(linear.module.register_forward_pre_hook(partial(_mask, mask)))
                if constant is not None:
                    handles.append(linear.module.register_forward_hook(partial(_add, constant)))
        head_map = compensation.head_map if compensation else None
        if head_map is not None and head_map.ndim:
            head: Any = head_of(model)
            weight = partial(mapped, head.weight, head_map)
            handles.append(Instead(head, _projection(weight, head.bias)))
        elif head_map is not None:
            last: Any = parts.final_norm
            handles.append(Instead(last, partial(_scale, float(head_map), last.forward)))
        yield
    finally:
        for handle in reversed(handles):
            handle.remove()


def _nothing(_module: nn.Module, _args: object, output: Any) -> Any:  # noqa: ANN401 - tensor or tuple
    if isinstance(output, Tensor):
        return torch.zeros_like(output)
    return (torch.zeros_like(output[0]), *output[1:])


def _mask(mask: Tensor, _module: nn.Module, args: tuple[Tensor, ...]) -> Tensor:
    return args[0] * mask


def _add(constant: Tensor, _module: nn.Module, _args: object, output: Tensor) -> Tensor:
    return output + constant


def _scale(factor: float, forward: Callable[[Tensor], Tensor], hidden: Tensor) -> Tensor:
    return forward(hidden) * factor


def _projection(
    make: Callable[[], Tensor],
    bias: Tensor | None,
    columns: Tensor | None = None,
    constant: Tensor | None = None,
) -> Callable[[Tensor], Tensor]:
    """Return a linear map with weights that are made, or moved, when it first runs.

    Many stand ready where only one layer runs.
    """
    weight = cache(make)

    def forward(inputs: Tensor) -> Tensor:
        inputs = inputs if columns is None else inputs[..., columns]
        output = nn.functional.linear(inputs, weight(), bias)
        return output if constant is None else output + constant

    return forward


class Instead:
    """Another forward of a module until it is removed, as a handle; its hooks go on."""

    def __init__(self, module: Any, forward: Callable[..., Tensor]) -> None:  # noqa: ANN401 - gets an attribute
        self._module, self._before = module, vars(module).get("forward")
        module.forward = forward

    def remove(self) -> None:
        """Put back what was there."""
        if self._before is None:
            del self._module.forward
        else:
            self._module.forward = self._before


def _replace(constant: Tensor | None, _module: nn.Module, _args: object, output: Tensor) -> Tensor:
    # a tensor of its own: a layer may add to it in place
    return torch.zeros_like(output) if constant is None else constant.expand_as(output).clone()
