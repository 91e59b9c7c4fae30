"""`lorakit score`: predictions to numbers, one line per file."""

from __future__ import annotations

import sys
from collections.abc import Sequence

import click

from lorakit import options
from lorakit.files import STDIO
from lorakit.metrics import METRICS

_METRIC_LIST = "\b\nMetrics, in percent:\n" + "\n".join(
    f"  {name:<10} {metric.help}" for name, metric in METRICS.items()
)


def _parse_metrics(
    context: click.Context, parameter: click.Parameter, values: Sequence[str]
) -> list[str]:
    names = [name.strip() for value in values for name in value.split(",")]
    for name in names:
        if name not in METRICS:
            raise click.BadParameter(f"{name!r} is not one of {', '.join(METRICS)}.")
    return list(dict.fromkeys(names))


def _parse_files(
    context: click.Context, parameter: click.Parameter, values: Sequence[str]
) -> Sequence[str]:
    if values.count(STDIO) > 1:
        raise click.BadParameter("`-` is given twice, but stdin can be read only once.")
    return values


@click.command(epilog=_METRIC_LIST)
@click.argument("predictions", nargs=-1, required=True, callback=_parse_files)
@click.option(
    "--metric",
    multiple=True,
    default=["rougeL"],
    show_default=True,
    callback=_parse_metrics,
    metavar="NAME[,NAME…]",
    help="What to compute; may be repeated.",
)
@options.lang
@click.option(
    "--format",
    "layout",
    type=click.Choice(["auto", "table", "json"]),
    default="auto",
    show_default=True,
    help="JSON lines or a table; auto: a table on a terminal.",
)
@options.output("-", "the scores")
@options.quiet
def score(
    predictions: Sequence[str],
    metric: Sequence[str],
    lang: str,
    layout: str,
    output: str,
    quiet: bool,
) -> None:
    """Score records that hold a prediction: one line per file.

    PREDICTIONS are JSONL files as `lorakit generate` writes them; `-` is stdin. A prediction is
    compared with the record's references, or with its completion where it has none. JSON lines
    hold values in full, the table two decimals, both with the signature of every metric.
    """
    from lorakit.files import open_text_output
    from lorakit.records import write_records
    from lorakit.scoring import score_file, write_table

    systems = [score_file(path, metrics=metric, lang=lang) for path in predictions]
    cautions = dict.fromkeys(line for system in systems for line in system.cautions)
    for line in () if quiet else cautions:
        click.echo(f"Warning: {line}", err=True)
    if layout == "auto":
        layout = "table" if output == STDIO and sys.stdout.isatty() else "json"
    with open_text_output(output) as stream:
        if layout == "table":
            write_table(systems, stream)
        else:
            write_records((system.as_record() for system in systems), stream)
