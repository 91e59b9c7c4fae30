"""The options of `find-boundary`, grouped by the way of --by that reads them, and their check."""

from __future__ import annotations

import click

from lorakit.commands import _options
from lorakit.commands._text_types import Boundaries, MetricName
from lorakit.commands._types import Factors, Whole
from lorakit.settings import LOSS, BoundarySettings

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
        BoundarySettings, "sample", Whole(1), "Records drawn at random from --data."
    ),
)

evaluation = _options.together(
    _options.field_option(
        BoundarySettings,
        "metric",
        MetricName(LOSS),
        "What scores the outputs, as in `score`; `loss` reads the completions and decodes nothing.",
        metavar="METRIC",
    ),
    _options.field_option(
        BoundarySettings,
        "rule",
        click.Choice(["best", "1se"]),
        "The best score, or the smallest boundary within one standard error of it.",
    ),
    _options.field_option(
        BoundarySettings,
        "keep",
        click.Choice(["bottom", "top", "random"]),
        "Which layers keep their LoRA: boundary K is K of them.",
    ),
    click.option(
        "--factors",
        type=Factors(),
        metavar="F",
        help="Multiply the upper layers' LoRA by each of these instead of dropping it: 0,0.25,0.5.",
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
        Whole(1),
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
    """Raise a usage error for an option that --by does not read, or two that exclude each other."""
    if boundary.by == "evaluation" and boundary.compare:
        raise click.UsageError("--compare is for --by probability only.")
    if boundary.by == "probability":
        _refuse_evaluation(boundary, predictions)
    if boundary.metric == LOSS and predictions:
        raise click.UsageError("--metric loss decodes nothing: leave --predictions out.")
    if boundary.factors is not None and boundary.keep != "bottom":
        raise click.UsageError("--factors scales what is above the bottom layers: no other --keep.")


def _refuse_evaluation(boundary: BoundarySettings, predictions: str | None) -> None:
    """Raise a usage error for an option that only --by evaluation reads."""
    written = {
        "--predictions": predictions is not None,
        "--metric loss": boundary.metric == LOSS,
        "--rule": boundary.rule != BoundarySettings.rule,
        "--keep": boundary.keep != BoundarySettings.keep,
        "--factors": boundary.factors is not None,
    }
    for option in (name for name, is_written in written.items() if is_written):
        raise click.UsageError(f"{option} is for --by evaluation only.")
