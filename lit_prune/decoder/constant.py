"""What stands in for a removed sub-block: a constant, or nothing, added to the residual stream."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn


class ConstantOutput(nn.Module):
    """Output of a removed attention or MLP: its mean as a bias, or zero.

    The surrounding decoder layer computes ``residual + output``. A zero-dimensional zero (or a
    ``[hidden_size]`` bias) broadcasts there, so a removed sub-block costs one addition, and the
    layer's own code stays as it is.

    Args:
        bias: Constant output, ``[hidden_size]``, or None for zero.
        returns_weights: True in place of attention, which returns ``(output, attention_weights)``.
        adds_residual: True where a sub-block is handed the residual, as second argument, and
            returns it with its output added.
        whole: True where the layer adds to the output in place: a tensor of its own is returned.
    """

    bias: nn.Parameter | None
    stands_for_removed = True

    def __init__(
        self,
        bias: nn.Parameter | None,
        *,
        returns_weights: bool,
        adds_residual: bool = False,
        whole: bool = False,
    ) -> None:
        super().__init__()
        self.register_parameter("bias", bias)
        self.returns_weights, self.adds_residual = returns_weights, adds_residual
        self.whole = whole

    def forward(
        self, hidden_states: Tensor, *args: Any, **kwargs: Any
    ) -> Tensor | tuple[Tensor, None]:
        """Return the constant, whatever comes in."""
        output: Tensor = hidden_states.new_zeros(()) if self.bias is None else self.bias
        if self.adds_residual:
            output = output + (args[0] if args else kwargs["residual"])
        if self.whole:
            output = output.expand_as(hidden_states).clone()
        return (output, None) if self.returns_weights else output


def is_constant(module: nn.Module) -> bool:
    """Return whether a module stands in for a removed sub-block.

    The model files that travel with saved models cannot import `ConstantOutput`: theirs carries the
    same mark.

    Example:
        >>> is_constant(ConstantOutput(None, returns_weights=False)), is_constant(nn.Identity())
        (True, False)
    """
    return getattr(module, "stands_for_removed", False) is True
