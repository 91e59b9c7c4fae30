"""The systems that `score` compares, from its files, --system and --baseline."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import click

from lorakit.files import STDIO

if TYPE_CHECKING:
    from lorakit.scoring.systems import System


def parse_systems(
    context: click.Context, parameter: click.Parameter, values: Sequence[str]
) -> list[tuple[str, tuple[str, ...]]]:
    """Return the name and the files of every --system NAME=FILE,FILE,…; names are unique."""
    systems = []
    for value in values:
        name, _, files = value.partition("=")
        paths = tuple(path.strip() for path in files.split(","))
        if not (name.strip() and all(paths)):
            raise click.BadParameter(f"{value!r} is not of the form NAME=FILE,FILE,…")
        systems.append((name.strip(), paths))
    names = [name for name, _ in systems]
    for name in names:
        if names.count(name) > 1:
            raise click.BadParameter(f"the name {name!r} is given twice.")
    return systems


def systems_of(
    predictions: Sequence[str],
    named: Sequence[tuple[str, tuple[str, ...]]],
    baseline: str | None,
) -> list[System]:
    """Return what is to be scored, in order: a baseline not among the rest, files, systems.

    Raises a usage error for names that are ambiguous, and for stdin given twice.
    """
    from lorakit.scoring.systems import System

    systems = [System((path,)) for path in predictions]
    systems += [System(files, name) for name, files in named]
    labels = [system.label for system in systems]
    for name, _ in named:
        if labels.count(name) > 1:
            raise click.UsageError(f"--system {name} has the name of a file; choose another.")
    if baseline is not None and baseline not in labels:
        systems.insert(0, System((baseline,)))
    if not systems:
        raise click.UsageError("Missing argument 'PREDICTIONS...' or --system.")
    if len(systems) == 1 and baseline is not None:
        raise click.UsageError("--baseline needs another system to compare with it.")
    if [path for system in systems for path in system.files].count(STDIO) > 1:
        raise click.UsageError("`-` is given twice, but stdin can be read only once.")
    return systems
