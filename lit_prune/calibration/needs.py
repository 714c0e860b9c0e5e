"""Which statistics a method asks for: what a calibration measures, and may be found to lack."""

from __future__ import annotations

from dataclasses import dataclass

from lit_prune.calibration.bypass import BypassKind


@dataclass(frozen=True, slots=True, kw_only=True)
class Needs:
    """Statistics beside the unit moments, which are always there.

    Attributes:
        bypasses: Kinds of units whose transfer entropy is asked for.
        changes: What each of these bypasses does to the final hidden state itself; measured with
            their transfer entropy.
        covariances: Covariance of the inputs of every output projection.
        curves: Damage curve of every sub-block (from its covariance).
        sensitivities: What the loss of each whole sub-block does to the model's output.
        taylor: Gradient scores of every unit (needs backward passes).
        residuals: What a pass over the residual stream shows: similarity of each block's input and
            output, second moments of each sub-block's input.
        latency: Measured seconds of every sub-block at several widths.

    Example:
        >>> Needs(covariances=True) | Needs(taylor=True)
        Needs(bypasses=(), changes=False, covariances=True, curves=False, ..., taylor=True, ...)
    """

    bypasses: tuple[BypassKind, ...] = ()
    changes: bool = False
    covariances: bool = False
    curves: bool = False
    sensitivities: bool = False
    taylor: bool = False
    residuals: bool = False
    latency: bool = False

    def __or__(self, other: Needs) -> Needs:
        """Return what either asks for."""
        return Needs(
            bypasses=(*self.bypasses, *(k for k in other.bypasses if k not in self.bypasses)),
            changes=self.changes or other.changes,
            covariances=self.covariances or other.covariances,
            curves=self.curves or other.curves,
            sensitivities=self.sensitivities or other.sensitivities,
            taylor=self.taylor or other.taylor,
            residuals=self.residuals or other.residuals,
            latency=self.latency or other.latency,
        )

    def __bool__(self) -> bool:
        """Whether anything is asked for that the validation loop does not collect."""
        return self != Needs()
