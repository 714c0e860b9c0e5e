"""How much to prune, as people say it: "6B" parameters, "8GB", 1.5 times faster, 5 % perplexity."""

from __future__ import annotations

import math
import re
from typing import TYPE_CHECKING

from lit_prune.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Mapping

# What a request may name, exactly one of them, with a value that would be read.
TARGETS = {
    "pruning_ratio": "0.3",
    "target_parameters": "'6B'",
    "target_bytes": "'8GB'",
    "target_speedup": "1.5",
    "max_perplexity_increase": "'5%'",
}
_COUNTS = {"": 1.0, "K": 1e3, "M": 1e6, "B": 1e9, "G": 1e9, "T": 1e12}
_BYTES = {f"{letter}B": 1000.0**power for power, letter in enumerate(("", "K", "M", "G", "T"))}
_BYTES |= {f"{letter}IB": 1024.0**power for power, letter in enumerate(("K", "M", "G", "T"), 1)}
_SUFFIXES: dict[str, dict[str, float]] = {
    "target_parameters": _COUNTS,
    "target_bytes": {"": 1.0, **_BYTES},
    "target_speedup": {"": 1.0, "X": 1.0},
    "max_perplexity_increase": {"": 1.0, "%": 0.01},
}
_NUMBER = re.compile(r"\s*([0-9._]+(?:[eE][+-]?[0-9]+)?)\s*([A-Za-z%×]*)\s*")


def the_target(given: Mapping[str, object]) -> str:
    """Return the one target that is given, with a value that can be meant.

    Args:
        given: Values by name; None is not given.

    Raises:
        ConfigError: If none or several are given, or the value cannot be meant.

    Example:
        >>> the_target({"pruning_ratio": None, "target_bytes": "8GB"})
        'target_bytes'
    """
    named = [name for name in TARGETS if given.get(name) is not None]
    examples = [f"{name}={value}" for name, value in TARGETS.items()]
    if not named:
        raise ConfigError(
            f"pruning_ratio is missing: say how much to prune, by exactly one of "
            f"{', '.join(examples)}."
        )
    if len(named) > 1:
        raise ConfigError(
            f"{' and '.join(named)} are two targets, and one decides: leave all but one out."
        )
    if named[0] == "pruning_ratio":
        _check_ratio(given["pruning_ratio"])
    else:
        amount_of(named[0], given[named[0]])
    return named[0]


def amount_of(target: str, value: object) -> float:
    """Return a target's value as a number.

    Args:
        target: Name of one of `TARGETS`, but not ``pruning_ratio``.
        value: A number, or text such as ``"6B"``, ``"8GB"``, ``"8GiB"``, ``"1.5x"``, ``"5%"``.

    Raises:
        ConfigError: If it cannot be read or meant.

    Example:
        >>> amount_of("target_parameters", "6.5B"), amount_of("target_bytes", "2GiB")
        (6500000000.0, 2147483648.0)
        >>> amount_of("max_perplexity_increase", "5%"), amount_of("target_speedup", 1.5)
        (0.05, 1.5)
    """
    number, least = _read(value, _SUFFIXES[target]), 1 if target == "target_speedup" else 0
    if number is None or not math.isfinite(number) or number <= least:
        hint = {
            "target_parameters": "parameters of the whole model",
            "target_bytes": "bytes of all weights",
            "target_speedup": "how many times faster, above 1",
            "max_perplexity_increase": "what perplexity may rise by, above 0",
        }[target]
        raise ConfigError(
            f"{target} is {value!r}; expected {hint}, as in {target}={TARGETS[target]}."
        )
    return number


def _read(value: object, suffixes: Mapping[str, float]) -> float | None:
    if isinstance(value, bool):
        return None
    if isinstance(value, (int, float)):
        return float(value)
    found = _NUMBER.fullmatch(value) if isinstance(value, str) else None
    suffix = "" if found is None else found[2].upper().replace("×", "X")
    if found is None or suffix not in suffixes:
        return None
    try:
        return float(found[1].replace("_", "")) * suffixes[suffix]
    except ValueError:
        return None


def _check_ratio(ratio: object) -> None:
    number = isinstance(ratio, (int, float)) and not isinstance(ratio, bool)
    if number and 0.0 <= ratio < 1.0:  # type: ignore[operator] # also false for NaN
        return
    hint = "to keep 80 % of them, pass 0.2"
    if number and 1.0 < ratio <= 100.0:  # type: ignore[operator]
        hint = f"for {ratio:g} % pass {ratio / 100:g}"  # type: ignore[operator]
    raise ConfigError(
        f"pruning_ratio must be a number in [0, 1), got {ratio!r}. It is the fraction of decoder "
        f"parameters that is removed: {hint}."
    )
