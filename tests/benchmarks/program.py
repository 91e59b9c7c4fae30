"""The program around one benchmark: its options, and how its result is printed.

A benchmark is a module with `Options`, a frozen dataclass of what can be set, `SMOKE`, the smallest
of them, and `measure`, which takes Options and returns a Result, or several. It is run as

    python -m tests.benchmarks.NAME [--smoke] [--json] [--OPTION VALUE …]
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, field, fields, replace
from pathlib import Path
from typing import Any, TypeVar

from tests.benchmarks.result import BenchmarkError, Result
from tests.benchmarks.side import ROOT

OptionsT = TypeVar("OptionsT")


def option(default: Any, text: str, kind: type | None = None) -> Any:
    """Return a field of Options with its default and its help; `kind` where that is None."""
    return field(default=default, metadata={"help": text, "kind": kind or type(default)})


def data_folder(name: str) -> str:
    """Return the folder of a data set: in $DATA, else in shared/data beside the repository.

    Raises BenchmarkError where it is not there.
    """
    folder = Path(os.environ.get("DATA") or ROOT.parent / "shared" / "data") / name
    if not folder.is_dir():
        raise BenchmarkError(f"there is no {folder}; set $DATA to the folder that holds {name}")
    return str(folder)


def main(
    description: str | None,
    measure: Callable[[OptionsT], Result | Sequence[Result]],
    default: OptionsT,
    smoke: OptionsT,
) -> None:
    """Measure with the options of the command line, print each result, and exit."""
    options, as_json = _options(description or "", default, smoke)
    try:
        measured = measure(options)
    except BenchmarkError as error:
        sys.exit(f"Error: {error}")
    for result in results_of(measured):
        print(result.as_json() if as_json else result.as_text(), flush=True)


def results_of(measured: Result | Sequence[Result]) -> Sequence[Result]:
    """Return what a benchmark's `measure` returned as its results."""
    return [measured] if isinstance(measured, Result) else measured


def _options(description: str, default: OptionsT, smoke: OptionsT) -> tuple[OptionsT, bool]:
    """Return the options of the command line, and whether the result is printed as JSON."""
    parser = argparse.ArgumentParser(description=description.splitlines()[0])
    parser.add_argument("--smoke", action="store_true", help="the smallest sizes, to try the code")
    parser.add_argument("--json", action="store_true", help="print a line of JSON for each result")
    for entry in fields(default):  # type: ignore[arg-type]  # a dataclass, as the module says
        name, kind = f"--{entry.name.replace('_', '-')}", entry.metadata["kind"]
        shown = f"{entry.metadata['help']} (default {entry.default})"
        how: dict[str, Any] = {"action": "store_true"} if kind is bool else {"type": kind}
        parser.add_argument(name, dest=entry.name, default=None, help=shown, **how)
    values = vars(parser.parse_args())
    chosen = smoke if values.pop("smoke") else default
    as_json = bool(values.pop("json"))
    given = {name: value for name, value in values.items() if value is not None}
    return replace(chosen, **given), as_json  # type: ignore[type-var]


def as_arguments(options: Any) -> dict[str, object]:
    """Return options as they are sent to another process."""
    return dict(asdict(options))
