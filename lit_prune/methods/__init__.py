"""One paper a file, each a combination of the parts under one name; and the registry of presets."""

from __future__ import annotations

from collections.abc import Callable

from lit_prune.errors import ConfigError, did_you_mean
from lit_prune.methods import paper
from lit_prune.methods.decision import Decision, Judge, Scores, entropy_scores, plan_of

PRESETS: dict[str, Callable[..., Decision]] = {"paper": paper.decide}


def preset(name: str) -> Callable[..., Decision]:
    """Return the method of this name.

    Raises:
        ConfigError: If there is none; names the nearest.
    """
    if name not in PRESETS:
        raise ConfigError(
            f"preset {name!r} is not known{did_you_mean(name, PRESETS)}; known are "
            f"{sorted(PRESETS)}."
        )
    return PRESETS[name]


__all__ = ["PRESETS", "Decision", "Judge", "Scores", "entropy_scores", "plan_of", "preset"]
