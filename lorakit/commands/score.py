"""`lorakit score`: predictions to numbers, one line per file or system."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

import click

from lorakit.commands import _options
from lorakit.commands._systems import parse_systems, systems_of
from lorakit.files import STDIO
from lorakit.scoring.metrics import METRICS
from lorakit.settings import SignificanceSettings

if TYPE_CHECKING:
    from lorakit.scoring.bertscore import Embedder
    from lorakit.scoring.systems import SystemScores

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


@click.command(epilog=_METRIC_LIST)
@click.argument("predictions", nargs=-1, metavar="[PREDICTIONS]...")
@click.option(
    "--metric",
    multiple=True,
    default=["rougeL"],
    show_default=True,
    callback=_parse_metrics,
    metavar="NAME[,NAME…]",
    help="What to compute; may be repeated.",
)
@_options.lang
@click.option(
    "--system",
    multiple=True,
    callback=parse_systems,
    metavar="NAME=FILE[,FILE…]",
    help="The runs (seeds) of one system: one line, the mean of their values; may be repeated.",
)
@click.option(
    "--group-by",
    metavar="FIELD",
    help="Also score the records of each value of a field of theirs: a line each.",
)
@click.option(
    "--baseline",
    metavar="FILE|NAME",
    help="Compare every other system with this one: p-values.",
)
@_options.field_option(
    SignificanceSettings,
    "trials",
    click.IntRange(min=1),
    "Trials of the randomization test and of the bootstrap.",
)
@_options.seed
@click.option(
    "--bertscore-model",
    metavar="NAME",
    help="bertscore's model: a folder or hub id. [default: roberta-large, or one for --lang]",
)
@click.option(
    "--bertscore-layer",
    type=click.IntRange(min=0),
    metavar="N",
    help="Whose output it takes. [default: the one tuned for the model, or its last]",
)
@click.option(
    "--format",
    "layout",
    type=click.Choice(["auto", "table", "json"]),
    default="auto",
    show_default=True,
    help="JSON lines or a table; auto: a table on a terminal.",
)
@_options.output("-", "the scores")
@_options.quiet
@_options.settings(significance=SignificanceSettings)
def score(
    predictions: Sequence[str],
    metric: Sequence[str],
    lang: str,
    system: Sequence[tuple[str, tuple[str, ...]]],
    group_by: str | None,
    baseline: str | None,
    bertscore_model: str | None,
    bertscore_layer: int | None,
    layout: str,
    output: str,
    quiet: bool,
    significance: SignificanceSettings,
) -> None:
    """Score records that hold a prediction: one line per file or --system.

    PREDICTIONS are JSONL files as `lorakit generate` writes them; `-` is stdin. A prediction is
    compared with the record's references, or with its completion where it has none. JSON lines
    hold values in full, the table two decimals, both with the signature of every metric.

    Several files get 95 % bootstrap intervals. With --baseline, every other system also gets its
    difference, the interval of that, and a two-sided p-value by paired approximate randomization
    (a star in the table: p < 0.05), not corrected for the number of comparisons; all files must
    hold the same records in the same order. Both draw examples, never runs: a trial draws or swaps
    an example in all runs of a system at once, run 1 with run 1 of the baseline and so on, or each
    with the only one.
    """
    from lorakit.scoring.systems import score_systems

    if baseline is None and any(METRICS[name].needs == "baseline" for name in metric):
        raise click.UsageError("--metric contains-baseline needs --baseline.")
    systems = systems_of(predictions, system, baseline)
    several = baseline is not None or sum(len(system.files) for system in systems) > 1
    embeds = any(METRICS[name].needs == "model" for name in metric)
    rows = score_systems(
        systems,
        metrics=metric,
        lang=lang,
        baseline=baseline,
        settings=significance if several else None,
        embedder=_open_embedder(lang, bertscore_model, bertscore_layer) if embeds else None,
        group_by=group_by,
    )
    if not quiet:
        for line in dict.fromkeys(line for row in rows for line in row.cautions):
            click.echo(f"Warning: {line}", err=True)
    _write_scores(rows, layout, output)


def _open_embedder(lang: str, model: str | None, layer: int | None) -> Embedder:
    """Load bertscore's model, once it is clear that its library is there."""
    from lorakit.scoring.bertscore import check_libraries

    check_libraries()
    from lorakit.models.text_encoder import open_embedder

    return open_embedder(lang, model, layer)


def _write_scores(rows: Sequence[SystemScores], layout: str, output: str) -> None:
    """Write a table, or lines of JSON, to `output`; `auto` is a table on a terminal."""
    from lorakit.files import open_text_output
    from lorakit.records import write_records
    from lorakit.scoring.table import write_score_table

    if layout == "auto":
        layout = "table" if output == STDIO and sys.stdout.isatty() else "json"
    with open_text_output(output) as stream:
        if layout == "table":
            write_score_table(rows, stream)
        else:
            write_records((row.as_record() for row in rows), stream)
