"""`lorakit score`: predictions to numbers, one line per file or system."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

import click

from lorakit.commands import _options as options
from lorakit.commands._systems import parse_systems, systems_of
from lorakit.files import STDIO
from lorakit.scoring.metrics import METRICS
from lorakit.settings import SignificanceSettings

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
@options.lang
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
@click.option(
    "--trials",
    type=click.IntRange(min=1),
    default=SignificanceSettings.trials,
    show_default=True,
    help="Trials of the randomization test and of the bootstrap.",
)
@options.seed
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
@options.output("-", "the scores")
@options.quiet
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
    **given: Any,
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
    from lorakit.files import open_text_output
    from lorakit.records import write_records
    from lorakit.scoring.systems import score_systems
    from lorakit.scoring.table import write_score_table

    if baseline is None and any(METRICS[name].needs == "baseline" for name in metric):
        raise click.UsageError("--metric contains-baseline needs --baseline.")
    systems = systems_of(predictions, system, baseline)
    several = baseline is not None or sum(len(one.files) for one in systems) > 1
    settings = options.settings_of(SignificanceSettings, given) if several else None
    embedder = None
    if any(METRICS[name].needs == "model" for name in metric):
        from lorakit.scoring.bertscore import check_libraries

        check_libraries()
        from lorakit.models.text_encoder import open_embedder

        embedder = open_embedder(lang, bertscore_model, bertscore_layer)
    scored = score_systems(
        systems,
        metrics=metric,
        lang=lang,
        baseline=baseline,
        settings=settings,
        embedder=embedder,
        group_by=group_by,
    )
    cautions = dict.fromkeys(line for one in scored for line in one.cautions)
    for line in () if quiet else cautions:
        click.echo(f"Warning: {line}", err=True)
    if layout == "auto":
        layout = "table" if output == STDIO and sys.stdout.isatty() else "json"
    with open_text_output(output) as stream:
        if layout == "table":
            write_score_table(scored, stream)
        else:
            write_records((one.as_record() for one in scored), stream)
