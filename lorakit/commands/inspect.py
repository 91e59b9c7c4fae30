"""`lorakit inspect`: an adapter to a description of it."""

from __future__ import annotations

import sys
from typing import Any

import click

from lorakit.commands import _options as options
from lorakit.settings import TrainingSettings


@click.command()
@click.argument("adapter")
@click.option(
    "--format",
    "layout",
    type=click.Choice(["auto", "table", "json"]),
    default="auto",
    show_default=True,
    help="One line of JSON or tables; auto: tables on a terminal.",
)
@click.option(
    "--importance", is_flag=True, help="Show how important each module is on --data instead."
)
@click.option("--data", metavar="FILE", help="Records (JSONL) for --importance; `-` is stdin.")
@options.plot("the importance by layer and module")
@options.model
@options.quiet
def inspect(
    adapter: str,
    layout: str,
    importance: bool,
    data: str | None,
    plot: str | None,
    quiet: bool,
    **given: Any,
) -> None:
    """Show what is in an adapter: config, layers, blocks and history.

    ADAPTER is a file, a PEFT folder, `-` or hf://owner/name[@revision]. `norm` is the Frobenius
    norm of the change ΔW of the weights, `zeros` the share of parameters that are exactly zero.
    With --importance: for every block at every projection the mean of |weight| · ‖input‖ over the
    records of --data, a line each; this runs the base model.
    """
    if importance != (data is not None) or (plot and not importance):
        raise click.UsageError(
            "--importance needs --data, and --data and --plot need --importance."
        )
    options.one_pipe(adapter, data)
    from lorakit.adapters.describe import inspect_adapter, write_table
    from lorakit.adapters.storage import load_adapter
    from lorakit.files import STDIO, open_text_output
    from lorakit.records import write_records

    if data is not None:
        rows = _importance(adapter, data, plot, quiet, given)
        with open_text_output(STDIO) as stream:
            write_records(rows, stream)
        return
    record = inspect_adapter(load_adapter(adapter))
    if layout == "auto":
        layout = "table" if sys.stdout.isatty() else "json"
    with open_text_output(STDIO) as stream:
        if layout == "table":
            write_table(record, stream)
        else:
            write_records([record], stream)


def _importance(
    source: str, data: str, plot: str | None, quiet: bool, given: dict[str, Any]
) -> list[dict[str, Any]]:
    from lorakit.adapters.storage import load_adapter
    from lorakit.commands._opening import open_base
    from lorakit.commands._plots import check_plot, plot_importance
    from lorakit.commands._progress import Notes
    from lorakit.merging.importance import measure_importance

    if plot:
        check_plot(plot)
    settings = options.settings_of(TrainingSettings, given)
    adapter = load_adapter(source)
    note = Notes(quiet=quiet).note
    base = open_base(given, [adapter], settings.device, settings.dtype, note, training=False)
    rows = measure_importance(base, adapter, data, settings=settings)
    if plot:
        plot_importance(rows, output=plot)
    return rows
