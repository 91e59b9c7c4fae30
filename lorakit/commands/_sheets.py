"""What `judge` does with sheets for human raters, and which of its options go together."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import click

from lorakit.settings import SheetSettings

# What `judge` cannot do without, by what it is asked to do, and what else it then reads.
_NEEDS = {
    "": ("PREDICTIONS", "--endpoint", "--judge-model"),
    "--export-sheet": ("PREDICTIONS",),
    "--import-sheet": ("--sheet-key",),
}
_READS = {
    "": ("--against", "--template", "--resume", "--ratings", "--output"),
    "--export-sheet": ("--against", "--sample", "--seed"),
    "--import-sheet": ("--ratings", "--output"),
}


def check_mode(modes: Mapping[str, bool], present: Mapping[str, bool]) -> None:
    """Raise a usage error for two modes at once, and for what one lacks or does not read.

    `modes` says which of the options that choose a mode are present; none: language models judge.
    """
    chosen = [name for name, is_chosen in modes.items() if is_chosen]
    if len(chosen) > 1:
        raise click.UsageError(f"{' and '.join(chosen)} cannot be given together.")
    mode = chosen[0] if chosen else ""
    for name, is_present in present.items():
        if name in _NEEDS[mode] and not is_present:
            kind = "option" if name.startswith("-") else "argument"
            raise click.UsageError(f"Missing {kind} '{name}'{f' with {mode}' if mode else ''}.")
        if is_present and name not in _takes(mode):
            needs = " or ".join(other for other in _READS if name in _takes(other))
            raise click.UsageError(
                f"{mode} does not read {name}." if mode else f"{name} needs {needs}."
            )


def _takes(mode: str) -> tuple[str, ...]:
    return (*_NEEDS[mode], *_READS[mode])


def export_to_sheet(
    predictions: Sequence[str],
    sheet: str,
    against: str | None,
    settings: SheetSettings,
    *,
    quiet: bool,
) -> None:
    """Write the sheet and its key, and say where they are."""
    from lorakit.commands._progress import TerminalReporter
    from lorakit.files import is_stream
    from lorakit.judging.sheets import export_sheet, key_path

    if is_stream(sheet):
        raise click.UsageError("--export-sheet needs a file: its key goes beside it.")
    if len(set(predictions)) < len(predictions):
        raise click.UsageError("A file of PREDICTIONS is given twice.")
    key = export_sheet(predictions, sheet, against=against, settings=settings)
    TerminalReporter(quiet=quiet).note(
        f"wrote {len(key.items)} rows to {sheet}; keep {key_path(sheet)} from the raters"
    )


def import_sheets(sheets: Sequence[str], key: str, ratings: str | None, output: str) -> None:
    """Write the summaries of rated sheets."""
    from lorakit.judging.rated_sheets import write_rated_summaries

    if len(set(sheets)) < len(sheets):
        raise click.UsageError("An --import-sheet is given twice: each is another rater's.")
    write_rated_summaries(sheets, key, ratings=ratings, output=output)
