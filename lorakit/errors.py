"""The one error that users of lorakit see.

Whatever is wrong with a file, a record, an adapter or a setting is raised as LorakitError with one
line of text, `<what is wrong, where>; <what to do>`; lorakit.cli prints it and exits with 1.
"""

from __future__ import annotations


class LorakitError(Exception):
    """A problem the user can fix; the message says what is wrong, where, and what to do."""

    def __init__(self, message: str) -> None:
        super().__init__(" ".join(message.split()))


def check_packages(what: str, *packages: str, extra: str = "") -> None:
    """Raise LorakitError for the first package that is not installed; none is imported."""
    from importlib.util import find_spec

    for package in packages:
        if find_spec(package) is None:
            raise missing_package(what, package, extra)


def missing_package(what: str, package: str, extra: str = "") -> LorakitError:
    """Return the error for a missing package: of an extra, or one that lorakit always requires."""
    name = f"'lorakit[{extra}]'" if extra else "lorakit"
    return LorakitError(f"{what} needs {package}; run: pip install {name}")
