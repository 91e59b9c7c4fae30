"""`lorakit find-boundary`: an adapter and records to one record for each boundary, one the best."""

from __future__ import annotations

from typing import Any

import click

from lorakit.commands import _options as options
from lorakit.commands._types import Boundaries, MetricName
from lorakit.files import STDIO
from lorakit.settings import BoundarySettings, GenerationSettings


@click.command("find-boundary")
@click.argument("adapter", default=STDIO)
@options.data
@click.option(
    "--by",
    type=click.Choice(["evaluation", "probability"]),
    default=BoundarySettings.by,
    show_default=True,
    help="Score greedy outputs, or read the probability of the completion after every layer.",
)
@click.option(
    "--boundaries",
    type=Boundaries(),
    metavar="K",
    help="Those to try: 8-31. [default: all]",
)
@click.option(
    "--sample",
    type=click.IntRange(min=1),
    default=BoundarySettings.sample,
    show_default=True,
    help="Records drawn at random from --data.",
)
@click.option(
    "--metric",
    type=MetricName(),
    default=BoundarySettings.metric,
    show_default=True,
    metavar="METRIC",
    help="What scores the outputs, as in `score`.",
)
@options.lang
@options.decoding
@click.option(
    "--predictions", metavar="FILE", help="Write the outputs of every boundary, 0 too (JSONL)."
)
@click.option(
    "--tokens",
    type=click.IntRange(min=1),
    default=BoundarySettings.tokens,
    show_default=True,
    help="By probability: how many positions of the completion are read.",
)
@click.option(
    "--compare",
    type=Boundaries(),
    default=BoundarySettings.compare,
    metavar="K",
    help="By probability: boundaries whose curves are compared with the whole adapter's: 10,20,25.",
)
@options.model
@options.max_length
@options.truncate
@options.seed
@options.plot("the score or the probabilities by boundary")
@options.output(STDIO, "the records")
@options.quiet
def find_boundary(
    adapter: str, data: str, predictions: str | None, plot: str | None, output: str, **given: Any
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
    options.one_pipe(adapter, data)
    _check(given, predictions)
    from lorakit.files import open_text_output
    from lorakit.records import write_records

    if plot:
        from lorakit.commands._plots import check_plot

        check_plot(plot)
    rows = _find(adapter, data, predictions, plot, given)
    with open_text_output(output) as stream:
        write_records(rows, stream)


def _check(given: dict[str, Any], predictions: str | None) -> None:
    if given["by"] == "evaluation" and given["compare"]:
        raise click.UsageError("--compare is for --by probability only.")
    if given["by"] == "probability" and predictions:
        raise click.UsageError("--predictions is for --by evaluation only.")


def _find(
    source: str, data: str, predictions: str | None, plot: str | None, given: dict[str, Any]
) -> list[dict[str, Any]]:
    from lorakit.adapters.storage import load_adapter
    from lorakit.boundary.evaluate import evaluate
    from lorakit.boundary.knee import sketch
    from lorakit.boundary.probability import read_probabilities
    from lorakit.commands._opening import open_base
    from lorakit.commands._plots import plot_boundaries, plot_probabilities
    from lorakit.commands._progress import Notes

    notes = Notes(quiet=given["quiet"])
    settings = options.settings_of(BoundarySettings, given)
    generation = options.settings_of(GenerationSettings, given)
    adapter = load_adapter(source)
    base = open_base(
        given, [adapter], generation.device, generation.dtype, notes.note, training=False
    )
    told: dict[str, Any] = {"settings": settings, "generation": generation, "notes": notes}
    if settings.by == "evaluation":
        rows = evaluate(base, adapter, data, predictions=predictions, **told).as_records()
    else:
        rows = read_probabilities(base, adapter, data, **told)
    if plot:
        draw = plot_boundaries if settings.by == "evaluation" else plot_probabilities
        draw(rows, output=plot)
    best = next(row["boundary"] for row in rows if row["best"])
    scores = [row["score"] for row in rows]
    notes.sketch(sketch([row["boundary"] for row in rows], scores, best))
    return rows
