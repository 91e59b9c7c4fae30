"""`lorakit score`: predictions to numbers, one line per file or system."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import click

from lorakit.commands import _options, _scoring_options
from lorakit.commands._embedding import bertscore_options, open_embedder
from lorakit.files import STDIO
from lorakit.foreign_text import printable
from lorakit.scoring.metrics import METRICS
from lorakit.settings import SignificanceSettings

if TYPE_CHECKING:
    from lorakit.scoring.systems import SystemScores


@click.command(epilog=_scoring_options.EPILOG)
@click.argument("predictions", nargs=-1, metavar="[PREDICTIONS]...")
@_scoring_options.metric
@_options.lang
@_scoring_options.comparison
@_options.seed
@bertscore_options
@_options.layout("JSON lines or a table; auto: a table on a terminal.")
@_options.output(STDIO, "the scores")
@_options.resume
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
    resume: bool,
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
    from lorakit.runs.resume import SavedValues, completing, path_beside
    from lorakit.runs.sole_writer import sole_writer
    from lorakit.scoring.systems import score_systems

    _options.check_resume(resume, output)
    if baseline is None and any(METRICS[name].needs == "baseline" for name in metric):
        raise click.UsageError("--metric contains-baseline… needs --baseline.")
    systems = _scoring_options.systems_of(predictions, system, baseline)
    resamples = baseline is not None or sum(len(system.files) for system in systems) > 1
    needs_model = any(METRICS[name].needs == "model" for name in metric)
    side = path_beside(output, "resume") if needs_model else None
    with sole_writer(output), SavedValues(side, resume=resume, writer="score") as saved:
        rows = score_systems(
            systems,
            metrics=metric,
            lang=lang,
            baseline=baseline,
            settings=significance if resamples else None,
            embedder=open_embedder(lang, bertscore_model, bertscore_layer) if needs_model else None,
            group_by=group_by,
            saved=saved,
        )
        if not quiet:
            for line in dict.fromkeys(line for row in rows for line in row.cautions):
                click.echo(f"Warning: {printable(line)}", err=True)
        with completing(output, saved.delete):
            _write_scores(rows, layout, output)


def _write_scores(rows: Sequence[SystemScores], layout: str, output: str) -> None:
    """Write the scores as a table or as lines of JSON."""
    from lorakit.files import open_text_output
    from lorakit.records.jsonl import write_records
    from lorakit.scoring.table import write_score_table

    with open_text_output(output) as stream:
        if _options.wants_table(layout, output):
            write_score_table(rows, stream)
        else:
            write_records((row.as_record() for row in rows), stream)
