"""A family of one's own: its entry is checked before it is taken into the registry."""

from __future__ import annotations

from dataclasses import replace
from typing import get_args

from lit_prune.config import Granularity
from lit_prune.decoder.families import FAMILIES, PRUNED, family_name
from lit_prune.decoder.family import Family
from lit_prune.errors import ConfigError, did_you_mean


def register_family(family: Family) -> None:
    """Make a family of one's own known, for this process.

    Check it with `lit_prune.testing.check_family` on a tiny model before it is relied on.

    Args:
        family: Where its parts are.

    Raises:
        ConfigError: If the model type is known already or has no name of its own, if the entry
            refuses a granularity that there is none of, names no norms, or one norm for two
            streams.

    Example:
        >>> register_family(Family(model_type="llama"))
        Traceback (most recent call last):
        lit_prune.errors.ConfigError: family 'llama' is known already...
    """
    name = family.model_type
    if not name or family_name(name) != name:
        raise ConfigError(
            f"model_type must be a name that does not begin with {PRUNED!r}: {name!r}."
        )
    if name in FAMILIES:
        raise ConfigError(
            f"family {name!r} is known already and is not overwritten. Give your config class a "
            "model_type of its own."
        )
    _check_entry(family)
    for option, changes in family.when.items():
        if unknown := sorted(set(changes) - set(Family.__dataclass_fields__)):
            raise ConfigError(
                f"family {name!r}, when {option!r}: there is no field {unknown[0]!r}"
                f"{did_you_mean(unknown[0], Family.__dataclass_fields__)}."
            )
        _check_entry(replace(family, **changes))
    FAMILIES[name] = family


def _check_entry(family: Family) -> None:
    """Refuse an entry that contradicts itself."""
    name = family.model_type
    if not family.separates:
        raise ConfigError(
            f"family {name!r} names no norm before or after a sub-block: the stream behind the "
            "attention is found by one."
        )
    if not family.parallel and family.attention_norm == family.mlp_norm is not None:
        raise ConfigError(
            f"family {name!r} names the norm {family.mlp_norm!r} for attention and MLP: where both "
            "read one norm, they read one stream. Say parallel=True."
        )
    known = get_args(Granularity)
    if unknown := sorted(set(family.refuses) - set(known)):
        raise ConfigError(
            f"family {name!r} refuses {unknown[0]!r}{did_you_mean(unknown[0], known)}; "
            f"granularities are {list(known)}."
        )
