"""What writes the residual stream, fitted: output projections, on what they get behind a cut."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from torch import Tensor

from lit_prune.calibration import RegressionMoments, regression_of
from lit_prune.importance import affine_refit
from lit_prune.surgery import unit_columns

if TYPE_CHECKING:
    from collections.abc import Sequence

    from lit_prune.calibration import Side, TwoStreams
    from lit_prune.decoder import DecoderParts, SubBlock
    from lit_prune.surgery import Compensation


@dataclass(frozen=True, slots=True, eq=False)
class Written:
    """An output projection, fitted; `put` says where.

    Attributes:
        place: The sub-block.
        weight: ``[hidden_size, kept columns]``, float32; None where it stays as it is.
        constant: ``[hidden_size]``, float64; None where none is added.
        error: Of the choose side, as of `AffineRefit`.
        facts: What the plan records.
        refused: Whether the system could not be solved at some damping.
    """

    place: SubBlock
    weight: Tensor | None
    constant: Tensor | None
    error: float = 0.0
    facts: dict[str, float | None] = field(default_factory=dict)
    refused: bool = False

    @property
    def name(self) -> str:
        """Of the sub-block."""
        return name_of(self.place)

    def put(self, made: Compensation) -> list[str]:
        """Add it to what was made; return the name if it was refused."""
        if self.constant is not None:
            made.constants[self.place] = self.constant.cpu()
        made.weights.pop(self.place, None)
        made.facts.pop(self.name, None)
        if self.weight is not None:
            made.weights[self.place] = self.weight.cpu()
            made.facts[self.name] = self.facts
        return [self.name] * self.refused


def fit_output(
    parts: DecoderParts,
    place: SubBlock,
    kept: Sequence[int],
    text: dict[Side, list[TwoStreams]],
    dampings: Sequence[float],
    *,
    cut: bool,
    bias: bool,
) -> Written:
    """Fit what the kept columns are multiplied with, and the constant."""
    columns = unit_columns(kept, parts.unit_width(*place))
    moments = {side: _moments(parts, place, columns, batches) for side, batches in text.items()}
    inputs, target = moments["calibrate"].means
    if not len(columns):
        return Written(place, None, target)
    # about the means where a constant follows, else about zero
    centre = (inputs, target) if bias else None
    dense = parts.output(*place).weight.detach()
    found = affine_refit(
        moments["calibrate"].about(centre),
        moments["choose"].about(centre),
        dense[:, columns.to(dense.device)],
        dampings,
    )
    # float32 is what is kept, and every dtype below: the constant fits the rounded weights
    rounded = found.weight.float()
    return Written(
        place,
        rounded if cut or found.damping is not None else None,
        target - rounded.double() @ inputs if bias else None,
        found.error,
        {"damping": found.damping, "condition_number_at_most": found.condition},
        found.refused,
    )


def _moments(
    parts: DecoderParts, place: SubBlock, columns: Tensor, batches: list[TwoStreams]
) -> RegressionMoments:
    """Return moments of what the kept columns get and of the target."""
    bias = parts.output(*place).bias

    def pair(batch: TwoStreams) -> tuple[Tensor, Tensor]:
        inputs, target = batch.enters(parts, place)
        if len(columns) and bias is not None:  # it stays where it is
            target = target - bias
        return inputs[..., columns.to(inputs.device)], target

    return regression_of(batches, pair, name_of(place))


def name_of(place: SubBlock) -> str:
    """Return what plan and messages call a sub-block.

    Example:
        >>> name_of((3, "mlp"))
        'layer 3 mlp'
    """
    return f"layer {place[0]} {place[1]}"
