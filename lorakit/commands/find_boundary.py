"""`lorakit find-boundary`: an adapter and records to one record per boundary, the best marked."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from lorakit.commands import _options
from lorakit.commands._types import Boundaries, MetricName
from lorakit.files import STDIO
from lorakit.settings import BoundarySettings, GenerationSettings, ModelSettings

if TYPE_CHECKING:
    from collections.abc import Sequence

    from lorakit.boundary.records import BoundaryRecord
    from lorakit.commands._progress import TerminalReporter


@click.command("find-boundary")
@click.argument("adapter", default=STDIO)
@_options.data
@_options.field_option(
    BoundarySettings,
    "by",
    click.Choice(["evaluation", "probability"]),
    "Score greedy outputs, or read the probability of the completion after every layer.",
)
@click.option(
    "--boundaries",
    type=Boundaries(),
    metavar="K",
    help="Those to try: 8-31. [default: all]",
)
@_options.field_option(
    BoundarySettings, "sample", click.IntRange(min=1), "Records drawn at random from --data."
)
@_options.field_option(
    BoundarySettings,
    "metric",
    MetricName(),
    "What scores the outputs, as in `score`.",
    metavar="METRIC",
)
@_options.lang
@_options.decoding
@click.option(
    "--predictions", metavar="FILE", help="Write the outputs of every boundary, 0 too (JSONL)."
)
@_options.field_option(
    BoundarySettings,
    "tokens",
    click.IntRange(min=1),
    "By probability: how many positions of the completion are read.",
)
@click.option(
    "--compare",
    type=Boundaries(),
    default=BoundarySettings.compare,
    metavar="K",
    help="By probability: boundaries whose curves are compared with the whole adapter's: 10,20,25.",
)
@_options.model
@_options.max_length
@_options.truncate
@_options.seed
@_options.plot("the score or the probabilities by boundary")
@_options.output(STDIO, "the records")
@_options.quiet
@_options.settings(model=ModelSettings, boundary=BoundarySettings, generation=GenerationSettings)
def find_boundary(
    adapter: str,
    data: str,
    predictions: str | None,
    plot: str | None,
    output: str,
    quiet: bool,
    model: ModelSettings,
    boundary: BoundarySettings,
    generation: GenerationSettings,
) -> None:
    """Find the layer above which an adapter's LoRA can be dropped.

    At boundary k the bottom k layers keep their LoRA. By evaluation, every boundary's greedy
    outputs on a sample of --data are scored; the best score wins, of equal ones the smaller
    boundary. The base model's score is each record's `baseline`. By probability, one record tells
    how probable the completion's first tokens are after k layers; the best is the knee of the mean:
    the boundary farthest below the straight line from the first to the last (Kneedle's rule), the
    last where none is below. ADAPTER may be `-`, which is the default.

    \b
    lorakit find-boundary merged.safetensors --data val.jsonl |
        lorakit strip-layers merged.safetensors --boundary - -o final.safetensors
    """
    _options.check_stdin(adapter, data)
    _check_options(boundary, predictions)
    from lorakit.commands._plots import check_plot, plot_boundaries, plot_probabilities

    if plot:
        check_plot(plot)
    from lorakit.adapters.storage import load_adapter
    from lorakit.boundary.evaluate import evaluate
    from lorakit.boundary.probability import read_probabilities
    from lorakit.commands._opening import open_base
    from lorakit.commands._progress import TerminalReporter
    from lorakit.files import open_text_output
    from lorakit.records import write_records

    reporter = TerminalReporter(quiet=quiet)
    loaded = load_adapter(adapter)
    base = open_base(
        model, [loaded], generation.device, generation.dtype, reporter.note, training=False
    )
    rows: Sequence[BoundaryRecord]
    if boundary.by == "evaluation":
        rows = evaluate(
            base,
            loaded,
            data,
            settings=boundary,
            generation=generation,
            reporter=reporter,
            predictions=predictions,
        ).as_records()
    else:
        rows = read_probabilities(
            base, loaded, data, settings=boundary, generation=generation, reporter=reporter
        )
    if plot:
        draw = plot_boundaries if boundary.by == "evaluation" else plot_probabilities
        draw(rows, output=plot)
    _sketch(rows, reporter)
    with open_text_output(output) as stream:
        write_records(rows, stream)


def _check_options(boundary: BoundarySettings, predictions: str | None) -> None:
    """Raise a usage error for an option that --by does not read."""
    if boundary.by == "evaluation" and boundary.compare:
        raise click.UsageError("--compare is for --by probability only.")
    if boundary.by == "probability" and predictions:
        raise click.UsageError("--predictions is for --by evaluation only.")


def _sketch(rows: Sequence[BoundaryRecord], reporter: TerminalReporter) -> None:
    """Show the score of every boundary as a curve in text, where stderr is a terminal."""
    from lorakit.commands._plots import sketch

    boundaries = [row["boundary"] for row in rows]
    best = next(row["boundary"] for row in rows if row["best"])
    reporter.sketch(sketch(boundaries, [row["score"] for row in rows], best))
