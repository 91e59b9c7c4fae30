"""`lorakit build-dataset`: raw data to records."""

from __future__ import annotations

from dataclasses import asdict

import click

from lorakit.commands import _options, _recipe_options
from lorakit.errors import LorakitError
from lorakit.files import STDIO, input_name
from lorakit.recipes.request import SPLITS, Request, plain_split
from lorakit.recipes.table import RECIPES


@click.command("build-dataset", epilog=_recipe_options.EPILOG)
@_recipe_options.recipe
@click.argument("sources", nargs=-1, metavar="[SOURCE]...")
@_recipe_options.request
@click.option(
    "--on-error",
    type=click.Choice(["stop", "skip"]),
    default="stop",
    show_default=True,
    help="What to do at a malformed row; skipped ones are counted.",
)
@click.option("--show", is_flag=True, help="Print one record; without SOURCE of a sample row.")
@_options.output(STDIO, "the records")
@_options.resume
@_options.quiet
@_options.settings(request=Request)
def build_dataset(
    recipe: str,
    sources: tuple[str, ...],
    on_error: str,
    show: bool,
    output: str,
    resume: bool,
    quiet: bool,
    request: Request,
) -> None:
    """Turn raw data into records: lines of JSON with id, prompt and completion, or messages.

    SOURCE is a file, folder or archive of the data set, compressed or not, as it was downloaded
    (stdin by default), or a task of microworld. RECIPE hf://owner/name[:config][@revision] reads a
    data set of the hub. What is written as `document` is the span of the prompt that --truncate of
    other commands may shorten.

    \b
    lorakit build-dataset scitldr SciTLDR-A --split train --sample 50 -o train.jsonl
    lorakit build-dataset csv a.csv --template 'Summarize: {{text}}' --completion ' {{summary}}'
    lorakit build-dataset chat hf://HuggingFaceH4/ultrachat_200k --split train_sft -o train.jsonl
    lorakit build-dataset mimic --show
    """
    _options.check_stdin(*sources, *request.overlap, *request.drop_overlap)
    _options.check_resume(resume, output)
    if recipe.startswith(_recipe_options.HUB):
        recipe, sources = "hf", (recipe, *sources)
    if plain_split(request.split) not in SPLITS and not RECIPES[recipe].any_split:
        raise click.BadParameter(
            f"{recipe} has no split {request.split!r}; choose one of {', '.join(SPLITS)}.",
            param_hint="'--split'",
        )
    from itertools import islice

    from lorakit.commands._progress import TerminalReporter
    from lorakit.recipes import table
    from lorakit.recipes.request import Tally
    from lorakit.records.jsonl import skip_written, write_records
    from lorakit.runs.resume import continuing, run_key

    reporter = TerminalReporter(quiet=quiet)
    key = run_key(recipe, sources, asdict(request), on_error, show)
    with (
        reporter.bytes_read(sources) as advance,
        continuing(output, key, resume=resume, writer="build-dataset", survives_errors=False) as (
            stream,
            done,
        ),
    ):
        tally = Tally(skip=on_error == "skip", say=reporter.note, advance=advance)
        records = table.build_dataset(recipe, sources, request, tally)
        if show:
            records = (
                islice(records, 1) if sources else iter([table.sample_record(recipe, request)])
            )
        if done:
            reporter.note(f"going on after {len(done)} records; the source is read again")
        fields = skip_written(records, done)
        count = len(done) + write_records(fields, stream)
        for line in tally.lines() if not show else ():
            reporter.note(line)
        if not count:
            raise LorakitError(
                f"{_names(sources)} gave no records; check the recipe, --split and the filters"
            )
    if request.sample is not None and count < request.sample:
        reporter.note(f"only {count} records for --sample {request.sample}.")


def _names(sources: tuple[str, ...]) -> str:
    """Return how a message names the sources."""
    return ", ".join(map(input_name, sources or (STDIO,)))
