"""One paper a file, each a combination of the parts under one name; and the registry of presets."""

from __future__ import annotations

from lit_prune.errors import ConfigError, did_you_mean
from lit_prune.methods import (
    blockpruner,
    conditional,
    dsa,
    flap,
    layerdrop,
    llm_pruner,
    magnitude,
    multipruner,
    osscar,
    owl,
    paper,
    random,
    saap,
    shortgpt,
    sleb,
    slimgpt,
    two_ssp,
    wanda,
)
from lit_prune.methods.decision import Case, Decision, Judge, Kept, Method, plan_of
from lit_prune.methods.entropy import Scores, entropy_scores
from lit_prune.methods.evidence import prices_of, sizes_of
from lit_prune.methods.experts import refuse_without_rule

_METHODS = (
    conditional.METHOD,
    paper.METHOD,
    flap.METHOD,
    flap.METHOD_LS,
    wanda.METHOD,
    wanda.METHOD_LS,
    owl.METHOD,
    dsa.METHOD,
    osscar.METHOD,
    slimgpt.METHOD,
    llm_pruner.METHOD,
    saap.METHOD,
    multipruner.METHOD,
    two_ssp.METHOD,
    sleb.METHOD,
    blockpruner.METHOD,
    shortgpt.METHOD,
    layerdrop.METHOD,
    magnitude.METHOD,
    random.METHOD,
)
PRESETS: dict[str, Method] = {method.name: method for method in _METHODS}


def preset(name: str) -> Method:
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


__all__ = [
    "PRESETS",
    "Case",
    "Decision",
    "Judge",
    "Kept",
    "Method",
    "Scores",
    "entropy_scores",
    "plan_of",
    "preset",
    "prices_of",
    "refuse_without_rule",
    "sizes_of",
]
