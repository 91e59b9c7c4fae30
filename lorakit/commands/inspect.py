"""`lorakit inspect`: an adapter to a description of it."""

from __future__ import annotations

import sys

import click


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
def inspect(adapter: str, layout: str) -> None:
    """Show what is in an adapter: config, layers, blocks and history.

    ADAPTER is a file, a PEFT folder, `-` or hf://owner/name[@revision]. `norm` is the Frobenius
    norm of the change ΔW of the weights, `zeros` the share of parameters that are exactly zero.
    """
    from lorakit.adapter import load_adapter
    from lorakit.files import STDIO, open_text_output
    from lorakit.inspection import inspect_adapter, write_table
    from lorakit.records import write_records

    record = inspect_adapter(load_adapter(adapter))
    if layout == "auto":
        layout = "table" if sys.stdout.isatty() else "json"
    with open_text_output(STDIO) as stream:
        if layout == "table":
            write_table(record, stream)
        else:
            write_records([record], stream)
