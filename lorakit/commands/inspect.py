"""`lorakit inspect`: an adapter to a description of it."""

from __future__ import annotations

import click

from lorakit.commands import _options
from lorakit.files import STDIO
from lorakit.reach import check_model
from lorakit.runs.processes import is_first_process
from lorakit.settings import ModelSettings, TrainingSettings


@click.command()
@click.argument("adapter")
@_options.layout("One line of JSON or tables; auto: tables on a terminal.")
@click.option(
    "--importance", is_flag=True, help="Show how important each module is on --data instead."
)
@click.option("--data", metavar="FILE", help="Records (JSONL) for --importance; `-` is stdin.")
@click.option(
    "--spectrum",
    is_flag=True,
    help="Show each module's singular values, and the ranks that keep shares of ‖ΔW‖², instead.",
)
@_options.plot("the importance by layer and module, or the ranks by layer")
@_options.model
@_options.max_length
@_options.truncate
@_options.output(STDIO, "the description")
@click.option(
    "--resume", is_flag=True, help="Go on where a killed run of --importance stopped; needs -o."
)
@_options.quiet
@_options.settings(model=ModelSettings, training=TrainingSettings)
def inspect(
    adapter: str,
    layout: str,
    importance: bool,
    data: str | None,
    spectrum: bool,
    plot: str | None,
    output: str,
    resume: bool,
    quiet: bool,
    model: ModelSettings,
    training: TrainingSettings,
) -> None:
    """Show what is in an adapter: config, layers, blocks and history.

    ADAPTER is a file, a PEFT folder, `-` or hf://owner/name[@revision]. `norm` is the Frobenius
    norm of the change ΔW of the weights, `zeros` the share of parameters that are exactly zero.
    With --importance: for every block at every projection the mean of |weight| · root mean square
    of the input over the tokens of --data, times the adapter's scale, a line each; this runs the
    base model. `reset` is the share of parameters at the value that merge --prune-value set.
    With --spectrum: for every module the singular values of ΔW, and `ranks`, the lowest that keep
    0.5, 0.9, 0.95, 0.99 and all of ‖ΔW‖², a line each; no base model is needed.
    """
    if importance and spectrum:
        raise click.UsageError("Choose one of --importance and --spectrum.")
    if importance != (data is not None):
        raise click.UsageError("--importance needs --data, and --data needs --importance.")
    if plot and not (importance or spectrum):
        raise click.UsageError("--plot needs --importance or --spectrum.")
    _options.check_stdin(adapter, data)
    _options.check_resume(resume, output)
    if resume and not importance:
        raise click.UsageError("--resume is for --importance; all else is done at once.")
    if spectrum:
        _decompose(adapter, layout, plot, output)
        return
    if data is None:
        if is_first_process():
            _describe(adapter, layout, output)
        return
    _measure(
        adapter, data, plot, output, resume=resume, quiet=quiet, model=model, training=training
    )


def _describe(source: str, layout: str, output: str) -> None:
    """Write the description of an adapter."""
    from lorakit.adapters.describe import inspect_adapter, write_table
    from lorakit.adapters.storage import load_adapter
    from lorakit.files import open_text_output
    from lorakit.records.jsonl import write_records

    record = inspect_adapter(load_adapter(source, plain=False))
    with open_text_output(output) as stream:
        if _options.wants_table(layout, output):
            write_table(record, stream)
        else:
            write_records([record], stream)


def _decompose(source: str, layout: str, plot: str | None, output: str) -> None:
    """Write the singular values of an adapter's modules, and draw the ranks that they need."""
    from lorakit.commands._plots import check_plot, plot_lines

    if plot:
        check_plot(plot)
    from lorakit.adapters.storage import load_adapter
    from lorakit.files import open_text_output
    from lorakit.merging.spectrum import rank_rows, spectrum, write_ranks
    from lorakit.records.jsonl import write_records

    rows = list(spectrum(load_adapter(source)))
    if plot:
        plot_lines(rank_rows(rows), x="layer", y="rank", line="energy", output=plot)
    with open_text_output(output) as stream:
        if _options.wants_table(layout, output):
            write_ranks(rows, stream)
        else:
            write_records(rows, stream)


def _measure(
    source: str,
    data: str,
    plot: str | None,
    output: str,
    *,
    resume: bool,
    quiet: bool,
    model: ModelSettings,
    training: TrainingSettings,
) -> None:
    """Write the importance of an adapter's modules on the records, and draw it."""
    from lorakit.commands._plots import check_plot, plot_importance

    if plot:
        check_plot(plot)
    check_model(model.model, model.revision)
    from lorakit.adapters.storage import load_adapter
    from lorakit.commands._opening import open_base_and_adapters
    from lorakit.commands._progress import TerminalReporter
    from lorakit.files import open_text_output
    from lorakit.merging.importance import measure_importance
    from lorakit.records.jsonl import write_records
    from lorakit.runs.resume import completing, path_beside
    from lorakit.runs.sole_writer import sole_writer
    from lorakit.training.checkpoint import Checkpoint

    reporter = TerminalReporter(quiet=quiet)
    base, (adapter,) = open_base_and_adapters(
        model,
        [load_adapter(source, plain=False)],
        training.device,
        training.dtype,
        reporter.note,
        training=False,
    )
    with sole_writer(output, writes=is_first_process()):
        rows = measure_importance(
            base,
            adapter,
            data,
            settings=training,
            output=output,
            resume=resume,
            reporter=reporter,
        )
        if not is_first_process():
            return
        if plot:
            plot_importance(rows, output=plot)
        measured = Checkpoint(path_beside(output, "resume"), key="")
        with completing(output, measured.remove), open_text_output(output) as stream:
            write_records(rows, stream)
