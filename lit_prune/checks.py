"""Values of a request: is it an integer, a number, one of a list; each refused by name."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import fields
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin

from lit_prune.errors import ConfigError, did_you_mean


def check_choice(name: str, value: object, hint: object) -> None:
    """Refuse what is not in the list of texts that a type hint names, if it names one.

    Raises:
        ConfigError: Names the list.

    Example:
        >>> check_choice("side", "left", Literal["left", "right"] | None)
        >>> check_choice("side", "up", Literal["left", "right"])
        Traceback (most recent call last):
        lit_prune.errors.ConfigError: side must be one of ['left', 'right'], got 'up'.
    """
    known = _choices(hint)
    if known and value not in known:
        raise ConfigError(f"{name} must be one of {known}, got {value!r}.")


def check_integer(name: str, value: object, least: int) -> None:
    """Refuse what is no integer, or below ``least``.

    Raises:
        ConfigError: Names both.
    """
    if not is_integer(value) or value < least:  # type: ignore[operator] # an integer here
        raise ConfigError(f"{name} must be an integer of at least {least}, got {value!r}.")


def check_integers(
    name: str, what: str, values: Sequence[object], least: int | None = None
) -> None:
    """Refuse a list that holds anything but integers, or one that is too small.

    Raises:
        ConfigError: Says what the list is of.
    """
    for value in values:
        if not is_integer(value) or (least is not None and value < least):  # type: ignore[operator] # an integer here
            of_what = what if least is None else f"{what}, at least {least}"
            raise ConfigError(f"{name} must be {of_what}, got {list(values)}.")


def check_number(name: str, value: object, *, above_zero: bool) -> None:
    """Refuse what is no finite number, or negative, or 0 where that has no meaning.

    Raises:
        ConfigError: Says what is expected.
    """
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not number or not math.isfinite(value) or value < 0 or (above_zero and not value):  # type: ignore[arg-type,operator] # a number here
        least = "above 0" if above_zero else "at least 0"
        raise ConfigError(f"{name} must be a number {least}, got {value!r}.")


def is_integer(value: object) -> bool:
    """Return whether a value is an integer; truth values are none."""
    return isinstance(value, int) and not isinstance(value, bool)


def _choices(hint: object) -> list[Any]:
    """Return what a field may be, where that is a list of texts (or None); else nothing."""
    optional = get_origin(hint) in (Union, UnionType)
    literal = next((part for part in get_args(hint) if get_origin(part) is Literal), hint)
    if get_origin(literal) is not Literal or (literal is not hint and not optional):
        return []
    return [*get_args(literal), None] if optional else [*get_args(literal)]


def refuse_unknown(options: Mapping[str, object], of: type[Any]) -> None:
    """Refuse keywords that are no field of a data class.

    Raises:
        ConfigError: Names the first unknown key and the nearest known one.
    """
    known = {field.name for field in fields(of)}
    if unknown := sorted(set(options) - known):
        hint = did_you_mean(unknown[0], known) or f". Known: {sorted(known)}."
        raise ConfigError(f"unknown option {unknown[0]!r}{hint}")
