"""The options that only `score` has, and the systems that it compares."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import click

from lorakit.commands import _options
from lorakit.commands._types import Whole
from lorakit.files import STDIO
from lorakit.scoring.metrics import METRICS
from lorakit.settings import SignificanceSettings

if TYPE_CHECKING:
    from lorakit.scoring.systems import System


EPILOG = "\b\nMetrics, in percent (length: in words):\n" + "\n".join(
    f"  {name:<10} {metric.help}" for name, metric in METRICS.items()
)


def _parse_metrics(
    context: click.Context, parameter: click.Parameter, values: Sequence[str]
) -> list[str]:
    """Return the names of all --metric NAME,NAME,…, each once."""
    names = [name.strip() for value in values for name in value.split(",")]
    for name in names:
        if name not in METRICS:
            raise click.BadParameter(f"{name!r} is not one of {', '.join(METRICS)}.")
    return list(dict.fromkeys(names))


def _parse_systems(
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


metric = click.option(
    "--metric",
    multiple=True,
    default=["rougeL"],
    show_default=True,
    callback=_parse_metrics,
    metavar="NAME[,NAME…]",
    help="What to compute; may be repeated.",
)

comparison = _options.together(
    click.option(
        "--system",
        multiple=True,
        callback=_parse_systems,
        metavar="NAME=FILE[,FILE…]",
        help="The runs (seeds) of one system: one line, the mean of their values; may be repeated.",
    ),
    click.option(
        "--group-by",
        metavar="FIELD",
        help="Also score the records of each value of a field of theirs: a line each.",
    ),
    click.option(
        "--baseline",
        metavar="FILE|NAME",
        help="Compare every other system with this one: p-values.",
    ),
    _options.field_option(
        SignificanceSettings,
        "trials",
        Whole(1),
        "Trials of the randomization test and of the bootstrap.",
    ),
)


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
