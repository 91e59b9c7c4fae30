"""Which version of a package is installed, as headers and signatures state it."""

from __future__ import annotations

import functools


@functools.cache
def version_of(package: str) -> str:
    """Return the installed version of a package; `source` where it runs without being installed."""
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version(package)
    except PackageNotFoundError:
        return "source"
