"""The options of `find-boundary`, grouped by the way of --by that reads them, and their check."""

from __future__ import annotations

import click

from lorakit.commands import _options
from lorakit.commands._types import Boundaries, MetricName
from lorakit.settings import BoundarySettings

search = _options.together(
    _options.field_option(
        BoundarySettings,
        "by",
        click.Choice(["evaluation", "probability"]),
        "Score greedy outputs, or read the probability of the completion after every layer.",
    ),
    click.option(
        "--boundaries",
        type=Boundaries(),
        metavar="K",
        help="Those to try: 8-31. [default: all]",
    ),
    _options.field_option(
        BoundarySettings, "sample", click.IntRange(min=1), "Records drawn at random from --data."
    ),
)

evaluation = _options.together(
    _options.field_option(
        BoundarySettings,
        "metric",
        MetricName(),
        "What scores the outputs, as in `score`.",
        metavar="METRIC",
    ),
    _options.lang,
    _options.decoding,
    click.option(
        "--predictions", metavar="FILE", help="Write the outputs of every boundary, 0 too (JSONL)."
    ),
)

probability = _options.together(
    _options.field_option(
        BoundarySettings,
        "tokens",
        click.IntRange(min=1),
        "By probability: how many positions of the completion are read.",
    ),
    click.option(
        "--compare",
        type=Boundaries(),
        default=BoundarySettings.compare,
        metavar="K",
        help="By probability: boundaries whose curves are compared with the whole adapter's: "
        "10,20,25.",
    ),
)


def check_options(boundary: BoundarySettings, predictions: str | None) -> None:
    """Raise a usage error for an option that --by does not read."""
    if boundary.by == "evaluation" and boundary.compare:
        raise click.UsageError("--compare is for --by probability only.")
    if boundary.by == "probability" and predictions:
        raise click.UsageError("--predictions is for --by evaluation only.")
