"""`--dry-run`: its options, what it opens, and how it is laid out, for four commands alike.

What is said comes from the library as rows, each of a section: models/plan.py and its likes. They
go to stdout as lines of JSON, or on a terminal as tables. Nothing is written and no lock is taken.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import IO, TYPE_CHECKING, Any

import click

from lorakit.commands import _options
from lorakit.files import STDIO, size
from lorakit.foreign_text import printable
from lorakit.runs.processes import is_first_process, leave_others, process_count
from lorakit.settings import DryRunSettings, GenerationSettings, ModelSettings, TrainingSettings

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

    from lorakit.adapters.adapter import Adapter
    from lorakit.models.base import Base
    from lorakit.models.lengths import Row
    from lorakit.models.skeleton import Skeleton

_BAR = 30  # the longest bar of a histogram, in characters
_WIDER_THAN_ANY_ROW = 10_000
_COLUMNS = ("records", "least", "median", "ninth_decile", "most", "mean")

options = _options.together(
    click.option(
        "--dry-run",
        is_flag=True,
        help="Only say what would be done, without loading weights: lengths, cuts, steps, memory.",
    ),
    click.option(
        "--measure", is_flag=True, help="With --dry-run: load the base and measure the time too."
    ),
    _options.layout("Of --dry-run: JSON lines or tables; auto: tables on a terminal."),
)


def check_options(settings: DryRunSettings) -> None:
    """Raise a usage error for an option that only --dry-run reads, without it."""
    written = _options.options_on_command_line()
    for name in ("measure", "layout"):
        if name in written and not settings.dry_run:
            raise click.UsageError(f"{written[name]} is for --dry-run only.")


def open_bases(
    dry_run: DryRunSettings,
    model: ModelSettings,
    adapters: Sequence[Adapter],
    settings: TrainingSettings | GenerationSettings,
    note: Callable[[str], None],
) -> tuple[Skeleton, Callable[[], Base] | None]:
    """Return the base without its weights and, to measure, the function that loads it.

    Of several processes the first goes on, as if it were the only one, and the others end here.
    """
    if process_count() > 1:
        if not is_first_process():
            click.get_current_context().exit()
        leave_others()
    from lorakit.commands._opening import open_base, open_skeleton

    training = isinstance(settings, TrainingSettings)
    device, dtype = settings.device, settings.dtype
    skeleton = open_skeleton(model, adapters, device, dtype, note, training=training)
    if not dry_run.measure:
        return skeleton, None
    return skeleton, lambda: open_base(
        model, adapters, device, dtype, lambda text: None, training=training
    )


def show(plan: Iterable[Row], layout: str) -> None:
    """Write the rows of a plan to stdout; those before an error come before it."""
    from lorakit.files import open_text_output
    from lorakit.records.jsonl import write_records

    with open_text_output(STDIO) as stream:
        if not _options.wants_table(layout, STDIO):
            write_records(plan, stream)
            return
        rows: list[Row] = []
        try:
            rows.extend(plan)  # as far as it gets
        finally:
            write_tables(rows, stream)


# — the layout of a terminal —


def write_tables(rows: Sequence[Mapping[str, Any]], stream: IO[str]) -> None:
    """Write the rows as tables, a section after the other; a narrow terminal wraps them."""
    from rich.console import Console

    console = Console(file=stream, width=_WIDER_THAN_ANY_ROW)
    for section in dict.fromkeys(row["section"] for row in rows):
        _LAYOUTS[section](console, [row for row in rows if row["section"] == section])


def _write_lengths(console: Console, rows: Sequence[Mapping[str, Any]]) -> None:
    """Write the quantiles of all lengths, then a histogram of each."""
    table = _table("tokens of", *(name.replace("_", " ") for name in _COLUMNS))
    for row in rows:
        table.add_row(row["of"], *(str(row.get(name, "")) for name in _COLUMNS))
    console.print(table)
    for row in rows:
        histogram = _table(row["of"], "records", "")
        histogram.columns[2].justify = "left"
        most = max((each["records"] for each in row["bins"]), default=0)
        for each in row["bins"]:
            bar = "█" * -(-_BAR * each["records"] // most)
            first, last = str(each["from"]), str(each["to"])
            span = first if first == last else f"{first}–{last}"
            histogram.add_row(span, str(each["records"]), bar)
        console.print()
        console.print(histogram)


def _write_cut(console: Console, rows: Sequence[Mapping[str, Any]]) -> None:
    """Write how many records are too long, and the longest."""
    for row in rows:
        limit = "the context" if row["limit"] is None else f"{row['limit']} tokens"
        text = f"{row['too_long']} of {row['records']} records exceed {limit}"
        if row["too_long"]:
            text += f" ({100 * row['share']:.1f} %)"
        if row["tokens_cut"]:
            text += f"; --truncate cuts {100 * row['tokens_cut']:.1f} % of all tokens"
        _write_lines(console, ["", text])
        longest = [f"  {each['where']}: {each['tokens']} tokens" for each in row["longest"]]
        _write_lines(console, longest)


def _write_fields(console: Console, rows: Sequence[Mapping[str, Any]]) -> None:
    """Write the fields of the rows, one a line."""
    table = _table(rows[0]["section"], "")
    for row in rows:
        for name, value in row.items():
            if name != "section" and value is not None:
                table.add_row(name.replace("_", " "), f"{value:,}")
    console.print()
    console.print(table)


def _write_amounts(console: Console, rows: Sequence[Mapping[str, Any]]) -> None:
    """Write what each row is of, how much, and its remark: memory, or time."""
    table = _table(rows[0]["section"], "", "")
    table.columns[2].justify = "left"
    for row in rows:
        amount = size(row["bytes"]) if "bytes" in row else duration(row["seconds"])
        table.add_row(row["of"], amount, printable(row["remark"]))
    console.print()
    console.print(table)


_LAYOUTS: dict[str, Callable[[Console, Sequence[Mapping[str, Any]]], None]] = {
    "lengths": _write_lengths,
    "cut": _write_cut,
    "steps": _write_fields,
    "work": _write_fields,
    "parameters": _write_fields,
    "memory": _write_amounts,
    "time": _write_amounts,
}


def _table(first: str, *others: str) -> Table:
    """Return a table without lines; all columns but the first hold numbers."""
    from rich.table import Table

    table = Table(first, box=None, pad_edge=False, header_style="bold")
    for name in others:
        table.add_column(name, justify="right", no_wrap=True)
    return table


def _write_lines(console: Console, lines: Iterable[str]) -> None:
    from rich.text import Text

    for line in lines:
        console.print(Text(printable(line)), soft_wrap=True)


def duration(seconds: float) -> str:
    """Return seconds as they are up to two minutes, then in minutes, from two hours on in hours."""
    if seconds < 120:
        return f"{seconds:.3g} s"
    return f"{seconds / 60:.1f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
