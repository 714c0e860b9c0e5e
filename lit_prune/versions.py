"""Which packages made a number, or wrote a directory."""

from __future__ import annotations

import platform
from functools import cache
from importlib.metadata import PackageNotFoundError, version


def versions_of(*packages: str) -> dict[str, str]:
    """Return the version of Python, and of each of these packages.

    Example:
        >>> sorted(versions_of("torch"))
        ['python', 'torch']
    """
    return {"python": platform.python_version(), **{name: _version(name) for name in packages}}


@cache
def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"
