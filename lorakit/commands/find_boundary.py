"""`lorakit find-boundary`: an adapter and records to one record per boundary, the best marked."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, TypedDict

import click

from lorakit.commands import _boundary_options, _dry_run, _options
from lorakit.files import STDIO
from lorakit.reach import check_model
from lorakit.runs.processes import is_first_process
from lorakit.settings import (
    LOSS,
    BoundarySettings,
    DryRunSettings,
    GenerationSettings,
    ModelSettings,
)

if TYPE_CHECKING:
    from collections.abc import Sequence

    from lorakit.boundary.records import BoundaryRecord
    from lorakit.commands._progress import TerminalReporter
    from lorakit.models.sharing import Team
    from lorakit.runs.resume import SavedValues


class _Search(TypedDict):
    """What every way of searching is called with, beside base, adapter and data."""

    settings: BoundarySettings
    generation: GenerationSettings
    reporter: TerminalReporter
    saved: SavedValues
    team: Team


@click.command("find-boundary")
@click.argument("adapter", default=STDIO)
@_options.data
@_boundary_options.search
@_boundary_options.evaluation
@_boundary_options.probability
@_options.model
@_options.max_length
@_options.truncate
@_options.seed
@_options.plot("the score or the probabilities by boundary")
@_options.output(STDIO, "the records")
@_options.resume
@_options.quiet
@_dry_run.options
@_options.settings(
    model=ModelSettings,
    boundary=BoundarySettings,
    generation=GenerationSettings,
    dry_run=DryRunSettings,
)
def find_boundary(
    adapter: str,
    data: str,
    predictions: str | None,
    plot: str | None,
    output: str,
    resume: bool,
    quiet: bool,
    model: ModelSettings,
    boundary: BoundarySettings,
    generation: GenerationSettings,
    dry_run: DryRunSettings,
) -> None:
    """Find the layer above which an adapter's LoRA can be dropped.

    At boundary k the bottom k layers keep their LoRA. By evaluation, every boundary's greedy
    outputs on a sample of --data are scored; the best score wins, of equal ones the smaller
    boundary. The base model's score is each record's `baseline`. --metric loss measures the mean
    loss of the completions' tokens instead, at half a pass a boundary. By probability, one record
    tells how probable the completion's first tokens are after k layers; the best is the knee of the
    mean: the boundary farthest below the straight line from the first to the last (Kneedle's rule),
    the last where none is below. ADAPTER may be `-`, which is the default.

    \b
    lorakit find-boundary merged.safetensors --data val.jsonl |
        lorakit strip-layers merged.safetensors --boundary - -o final.safetensors
    """
    _options.check_stdin(adapter, data)
    _options.check_resume(resume, output)
    _boundary_options.check_options(boundary, predictions)
    _dry_run.check_options(dry_run)
    from lorakit.commands._plots import check_plot, plot_boundaries, plot_probabilities

    if plot:
        check_plot(plot)
    check_model(model.model, model.revision)
    if dry_run.dry_run:
        _plan(adapter, data, model, boundary, generation, quiet, dry_run)
        return
    from lorakit.adapters.storage import load_adapter
    from lorakit.boundary.evaluate import evaluate
    from lorakit.boundary.loss import evaluate_loss
    from lorakit.boundary.probability import read_probabilities
    from lorakit.commands._opening import open_base_and_adapters
    from lorakit.commands._progress import TerminalReporter
    from lorakit.files import open_text_output
    from lorakit.models.sharing import new_team
    from lorakit.records.jsonl import write_records
    from lorakit.runs.resume import SavedValues, completing, path_beside, run_key
    from lorakit.runs.sole_writer import refuse_second_writer, sole_writer

    reporter = TerminalReporter(quiet=quiet)
    refuse_second_writer(output, writes=is_first_process())
    base, (loaded,) = open_base_and_adapters(
        model,
        [load_adapter(adapter, plain=False)],
        generation.device,
        generation.dtype,
        reporter.note,
        training=False,
    )
    team = new_team(base.device.type)
    key = run_key(asdict(boundary), asdict(generation), base.record, loaded.sha256)
    side = path_beside(output, "resume")
    with (
        sole_writer(output, writes=team.is_first),
        SavedValues(
            side, resume=resume, writer="find-boundary", writes=team.is_first, key=key
        ) as saved,
    ):
        saved.values = team.from_first(saved.values)
        if len(saved):
            reporter.note("going on with what the killed run has computed")
        search = _Search(
            settings=boundary, generation=generation, reporter=reporter, saved=saved, team=team
        )
        rows: Sequence[BoundaryRecord]
        if boundary.by == "probability":
            rows = read_probabilities(base, loaded, data, **search)
        elif boundary.metric == LOSS:
            rows = evaluate_loss(base, loaded, data, **search).as_records()
        else:
            scores = evaluate(base, loaded, data, predictions=predictions, **search)
            rows = scores.as_records()
        if not team.is_first:
            return
        if plot:
            draw = plot_boundaries if boundary.by == "evaluation" else plot_probabilities
            draw(rows, output=plot)
        _sketch(rows, reporter)
        with completing(output, saved.delete), open_text_output(output) as stream:
            write_records(rows, stream)


def _plan(
    source: str,
    data: str,
    model: ModelSettings,
    boundary: BoundarySettings,
    generation: GenerationSettings,
    quiet: bool,
    dry_run: DryRunSettings,
) -> None:
    """Say what the search would do."""
    from lorakit.adapters.storage import load_adapter
    from lorakit.boundary.plan import plan_boundary
    from lorakit.commands._progress import TerminalReporter

    reporter = TerminalReporter(quiet=quiet)
    adapter = load_adapter(source)
    skeleton, load = _dry_run.open_bases(dry_run, model, [adapter], generation, reporter.note)
    rows = plan_boundary(
        skeleton, adapter, data, settings=boundary, generation=generation, load=load
    )
    _dry_run.show(rows, dry_run.layout)


def _sketch(rows: Sequence[BoundaryRecord], reporter: TerminalReporter) -> None:
    """Show the score of every boundary as a curve in text, where stderr is a terminal.

    Of several factors it is the curve of the best one's.
    """
    from lorakit.commands._plots import sketch

    best = next(row for row in rows if row["best"])
    shown = [row for row in rows if row.get("factor") == best.get("factor")]
    boundaries = [row["boundary"] for row in shown]
    reporter.sketch(sketch(boundaries, [row["score"] for row in shown], best["boundary"]))
