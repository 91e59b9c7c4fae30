"""Which method `merge` is asked for, and which of its options belong to that method.

To add a method without data: a line in static.METHODS. One that trains: a line in TRAINED.
"""

from __future__ import annotations

from collections.abc import Sequence

import click

from lorakit.merging.methods import METHODS

TRAINED = {
    "adaptive": "train jointly on --data, pruning at every step (the default with --data)",
    "lorahub": "weights found on --data without gradients, for A and for B",
}
HELP = {**TRAINED, **{name: method.help for name, method in METHODS.items()}}
EPILOG = "\b\nMethods:\n" + "\n".join(f"  {name:<15}  {text}" for name, text in HELP.items())

_STATIC = ("density", "rank", "weights")  # what no method that trains takes
_SHARED = ("method", "output", "portable", "quiet")
_LORAHUB = (
    *("data", "log", "model", "revision", "trust_remote_code", "device", "dtype", "chat"),
    *("max_length", "truncate", "micro_batch_tokens"),
)


def choose_method(
    method: str | None, data: str | None, rank: int | None, adapters: Sequence[str]
) -> str:
    """Return the method: the one named, adaptive with --data, or svd for one adapter and --rank.

    Raises a usage error that lists the methods where none of the three is given.
    """
    if method is None and data is None and rank is not None and len(adapters) == 1:
        return "svd"
    if data is None and (method is None or method in TRAINED):
        listed = ", ".join(f"{name} ({text})" for name, text in HELP.items())
        other = "" if method else " or '--method'"
        raise click.UsageError(f"Missing option '--data'{other}. Methods: {listed}.")
    return method or "adaptive"


def check_options(method: str) -> None:
    """Raise a usage error for an option on the command line that the method does not read."""
    given = _given(click.get_current_context())
    others = given & {*_STATIC} if method == "adaptive" else given - {*_SHARED, *_read(method)}
    for name in sorted(others):
        takers = [each for each in HELP if each != "adaptive" and name in _read(each)]
        takers = takers if name in _STATIC else ["adaptive", *takers]
        raise click.UsageError(
            f"--{name.replace('_', '-')} does not belong to --method {method}, "
            f"but to {', '.join(takers)}."
        )


def _read(method: str) -> Sequence[str]:
    """Return the options that are read by a method other than adaptive, which reads all but few."""
    return _LORAHUB if method == "lorahub" else METHODS[method].settings


def _given(context: click.Context) -> set[str]:
    """Return the names of the options that stand on the command line."""
    default = click.core.ParameterSource.DEFAULT
    options = (p.name for p in context.command.params if isinstance(p, click.Option) and p.name)
    return {name for name in options if context.get_parameter_source(name) not in (default, None)}


def check_weights(weights: Sequence[float] | None, adapters: Sequence[str]) -> None:
    """Raise a usage error where there is not one weight for each adapter."""
    if weights is not None and len(weights) != len(adapters):
        raise click.UsageError(f"--weights has {len(weights)} for {len(adapters)} adapters.")
