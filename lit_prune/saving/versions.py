"""Which packages wrote a directory."""

from __future__ import annotations

import platform
from functools import cache
from importlib.metadata import PackageNotFoundError, version


def package_versions() -> dict[str, str]:
    """Return the versions of the packages that a saved model depends on."""
    packages = ("lit-prune", "torch", "transformers", "safetensors")
    return {"python": platform.python_version(), **{name: _version(name) for name in packages}}


@cache
def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "unknown"
