"""`lorakit build-dataset`: raw data to records."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from lorakit.commands import _options
from lorakit.files import STDIO
from lorakit.recipes.request import SPLITS, Request
from lorakit.recipes.table import RECIPES

HUB = "hf://"
_RECIPE_LIST = "\n".join(f"  {name:<12}{recipe.help}" for name, recipe in RECIPES.items())

if TYPE_CHECKING:
    Choice = click.Choice[str]
else:
    Choice = click.Choice  # not generic before click 8.2


class RecipeName(Choice):
    """A name in RECIPES, or the address of a data set on the hub."""

    def convert(self, value: str, param: click.Parameter | None, ctx: click.Context | None) -> str:
        if value.startswith(HUB):
            return value
        return super().convert(value, param, ctx)


@click.command("build-dataset", epilog=f"\b\nRecipes:\n{_RECIPE_LIST}")
@click.argument("recipe", type=RecipeName(list(RECIPES)), metavar="RECIPE")
@click.argument("sources", nargs=-1, metavar="[SOURCE]...")
@click.option("--split", type=click.Choice(SPLITS), default=Request.split, show_default=True)
@click.option(
    "--lang",
    type=click.Choice(["en", "ja", "zh"]),
    help="Take texts of this language. [default: what there is; of microworld, en]",
)
@click.option("--sample", type=click.IntRange(min=1), metavar="N", help="Draw N records.")
@_options.seed
@click.option("--template", metavar="TEXT", help="The prompt, with {{field}} for a row's fields.")
@click.option(
    "--completion", metavar="TEXT", help="The completion, likewise; joined to the prompt as is."
)
@click.option("--min-words", type=click.IntRange(min=1), metavar="N", help="Drop shorter prompts.")
@click.option("--max-words", type=click.IntRange(min=1), metavar="N", help="Drop longer prompts.")
@click.option(
    "--min-ratio",
    type=click.FloatRange(min=0),
    metavar="R",
    help="mimic: words of findings for each of the impression, at least. [default: 1.5]",
)
@click.option("--highlights", metavar="CSS", help="news-html: where the highlights stand.")
@click.option("--source", metavar="LANG", help="wmt: language to translate from. [default: en]")
@click.option("--target", metavar="LANG", help="wmt: language to translate to. [default: zh]")
@click.option(
    "--overlap", multiple=True, metavar="FILE", help="Count prompts that stand in these records."
)
@click.option("--drop-overlap", multiple=True, metavar="FILE", help="Remove such prompts.")
@click.option(
    "--on-error",
    type=click.Choice(["stop", "skip"]),
    default="stop",
    show_default=True,
    help="What to do at a malformed row; skipped ones are counted.",
)
@click.option("--show", is_flag=True, help="Print one record; without SOURCE of a sample row.")
@_options.output(STDIO, "the records")
@_options.quiet
@_options.settings(request=Request)
def build_dataset(
    recipe: str,
    sources: tuple[str, ...],
    on_error: str,
    show: bool,
    output: str,
    quiet: bool,
    request: Request,
) -> None:
    """Turn raw data into records: lines of JSON with id, prompt and completion.

    SOURCE is a file, folder or archive of the data set, compressed or not, as it was downloaded
    (stdin by default), or a task of microworld. RECIPE hf://owner/name[:config][@revision] reads a
    data set of the hub.

    \b
    lorakit build-dataset scitldr SciTLDR-A --split train --sample 50 -o train.jsonl
    lorakit build-dataset csv a.csv --template 'Summarize: {{text}}' --completion ' {{summary}}'
    lorakit build-dataset mimic --show
    """
    _options.one_pipe(*sources, *request.overlap, *request.drop_overlap)
    if recipe.startswith(HUB):
        recipe, sources = "hf", (recipe, *sources)
    from itertools import islice

    from lorakit.commands._progress import TerminalReporter
    from lorakit.files import open_text_output
    from lorakit.recipes import table
    from lorakit.recipes.request import Tally
    from lorakit.records import write_records

    reporter = TerminalReporter(quiet=quiet)
    with reporter.bytes_read(sources) as advance, open_text_output(output) as stream:
        tally = Tally(skip=on_error == "skip", say=reporter.note, advance=advance)
        records = table.build_dataset(recipe, sources, request, tally)
        if show:
            records = (
                islice(records, 1) if sources else iter([table.sample_record(recipe, request)])
            )
        count = write_records(records, stream)
    for line in tally.lines() if not show else ():
        reporter.note(line)
    if request.sample is not None and count < request.sample:
        reporter.note(f"only {count} records for --sample {request.sample}.")
