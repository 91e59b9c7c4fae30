"""`lorakit compare`: the predictions of two systems side by side."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

import click

from lorakit.commands import _options
from lorakit.commands._embedding import bertscore_options, open_embedder
from lorakit.commands._types import Whole
from lorakit.files import STDIO
from lorakit.scoring.metrics import METRICS

if TYPE_CHECKING:
    from lorakit.scoring.contrast import Contrast, Where


@click.command()
@click.argument("a")
@click.argument("b")
@click.option(
    "--where",
    type=click.Choice(["worse", "better", "differs"]),
    default="differs",
    show_default=True,
    help="Records where B scores lower than A, or higher, or predicts another text.",
)
@click.option(
    "--metric",
    default="rougeL",
    show_default=True,
    metavar="NAME",
    help="What scores each record; a metric of `score`.",
)
@_options.lang
@bertscore_options
@click.option("--n", type=Whole(1), metavar="N", help="Only the first N of them.")
@click.option(
    "--html",
    metavar="FILE",
    help="Write a page with the differing words marked, and nothing to stdout.",
)
@click.option(
    "--format",
    "layout",
    type=click.Choice(["auto", "table", "json"]),
    default="auto",
    show_default=True,
    help="JSON lines or two columns; auto: columns on a terminal.",
)
@_options.output("-", "the records")
def compare(
    a: str,
    b: str,
    where: Where,
    metric: str,
    lang: str,
    bertscore_model: str | None,
    bertscore_layer: int | None,
    n: int | None,
    html: str | None,
    layout: str,
    output: str,
) -> None:
    """Show where two systems' predictions differ, side by side.

    A and B are JSONL files of predictions for the same records; one may be `-`. The largest
    differences by --metric come first. A line of JSON holds id, prompt, references, prediction_a,
    prediction_b, score_a, score_b and the difference, B minus A; on a terminal, and in the page
    that --html writes, the words that differ are marked. With --html, -o FILE writes both.

    \b
    lorakit compare zero-shot.jsonl merged.jsonl --where worse --n 5
    """
    _options.check_stdin(a, b)
    from lorakit.scoring.contrast import contrast_metrics, contrast_systems

    if metric not in contrast_metrics(where):
        raise click.UsageError(
            f"--metric {metric} with --where {where}: choose from "
            f"{', '.join(contrast_metrics(where))}."
        )
    embeds = METRICS[metric].needs == "model"
    contrasts = contrast_systems(
        a,
        b,
        where=where,
        metric=metric,
        lang=lang,
        embedder=open_embedder(lang, bertscore_model, bertscore_layer) if embeds else None,
    )[:n]
    if html is not None:
        _write_page(contrasts, html, names=(a, b), metric=metric, where=where, lang=lang)
    if html is None or output != STDIO:
        _write_contrasts(contrasts, layout, output, names=(a, b), lang=lang)


def _write_page(
    contrasts: Sequence[Contrast],
    path: str,
    *,
    names: tuple[str, str],
    metric: str,
    where: Where,
    lang: str,
) -> None:
    from lorakit.files import open_text_output
    from lorakit.scoring.contrast_page import write_contrast_page

    with open_text_output(path) as stream:
        write_contrast_page(contrasts, stream, names=names, metric=metric, where=where, lang=lang)


def _write_contrasts(
    contrasts: Sequence[Contrast], layout: str, output: str, *, names: tuple[str, str], lang: str
) -> None:
    """Write columns, or lines of JSON, to `output`; `auto` is columns on a terminal."""
    from lorakit.files import open_text_output
    from lorakit.records.jsonl import write_records
    from lorakit.scoring.contrast_table import write_contrast_table

    if layout == "auto":
        layout = "table" if output == STDIO and sys.stdout.isatty() else "json"
    with open_text_output(output) as stream:
        if layout == "table":
            write_contrast_table(contrasts, stream, names=names, lang=lang)
        else:
            write_records((contrast.as_record() for contrast in contrasts), stream)
