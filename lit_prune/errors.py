"""What can go wrong, by kind. Every error says what, where, got / expected, and what to do."""

from __future__ import annotations

from difflib import get_close_matches
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable


class LitPruneError(Exception):
    """Base of every error that lit_prune raises on purpose."""


class ConfigError(LitPruneError, ValueError):
    """A request that cannot be meant: a wrong value, an unknown option, a missing layer."""


class UnsupportedModelError(LitPruneError, NotImplementedError):
    """A model, or a state of a model, that lit_prune cannot prune exactly."""


class FormatError(ConfigError):
    """A format that cannot hold a model.

    Attributes:
        reason: What blocks it, a clause without the name of the format.

    Example:
        >>> print(FormatError("stock", "layer 2 has no MLP", instead="heterogeneous"))
        format 'stock' cannot hold this model: layer 2 has no MLP. These can: heterogeneous.
    """

    def __init__(self, name: str, reason: str, *, instead: str | None = None) -> None:
        self.reason = reason
        remedy = "" if instead is None else f" These can: {instead}."
        super().__init__(f"format {name!r} cannot hold this model: {reason}.{remedy}")


class CalibrationError(LitPruneError, RuntimeError):
    """Calibration text or activations that no statistic may be computed from."""


class ScoreError(LitPruneError, ValueError):
    """A score that must not reach ranking: not finite, or of the wrong shape."""


class BudgetError(LitPruneError, ValueError):
    """A pruning ratio that cannot be reached; names what can."""


class PlanMismatchError(LitPruneError, ValueError):
    """A plan (or compensation) that was made for another model."""


class SurgeryError(LitPruneError, RuntimeError):
    """Surgery that failed, or whose result is not what was planned. The model is unchanged."""


class ArtifactError(LitPruneError, OSError):
    """A file or directory that is missing, incomplete, hostile, or in the way."""


class ContractError(LitPruneError, AssertionError):
    """A decoder family that does not compute what its entry says; raised by `check_family`."""


class RankError(LitPruneError, RuntimeError):
    """A process of several that failed, ended, or holds something else than the others."""


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Return ``"; did you mean 'x'?"`` for the nearest known name, or an empty string.

    Example:
        >>> did_you_mean("pruning_ration", ["pruning_ratio", "preset"])
        "; did you mean 'pruning_ratio'?"
    """
    close = get_close_matches(name, list(known), n=1)
    return f"; did you mean {close[0]!r}?" if close else ""
