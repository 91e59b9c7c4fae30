"""`lorakit build-dataset`: raw data to records."""

from __future__ import annotations

import click

from lorakit import options
from lorakit.files import STDIO
from lorakit.recipes import RECIPES, Request
from lorakit.recipes.rows import SPLITS

_LIST = "\n".join(f"  {name:<12}{recipe.help}" for name, recipe in RECIPES.items())


@click.command("build-dataset", epilog=f"\b\nRecipes:\n{_LIST}")
@click.argument("recipe", type=click.Choice(list(RECIPES)), metavar="RECIPE")
@click.argument("sources", nargs=-1, metavar="[SOURCE]...")
@click.option("--split", type=click.Choice(SPLITS), default=Request.split, show_default=True)
@options.lang
@click.option("--sample", type=click.IntRange(min=1), metavar="N", help="Draw N records.")
@options.seed
@click.option("--template", metavar="TEXT", help="The prompt, with {{field}} for a row's fields.")
@click.option(
    "--completion", metavar="TEXT", help="The completion, likewise; joined to the prompt as is."
)
@options.output(STDIO, "the records")
@options.quiet
def build_dataset(
    recipe: str,
    sources: tuple[str, ...],
    split: str,
    lang: str,
    sample: int | None,
    seed: int,
    template: str | None,
    completion: str | None,
    output: str,
    quiet: bool,
) -> None:
    """Turn raw data into records: lines of JSON with id, prompt and completion.

    SOURCE is a file or a folder of the data set (jsonl, csv: stdin by default), or a task of
    microworld.

    \b
    lorakit build-dataset scitldr SciTLDR-A --split train --sample 50 -o train.jsonl
    lorakit build-dataset csv a.csv --template 'Summarize: {{text}}' --completion ' {{summary}}'
    """
    options.one_pipe(*sources)
    from lorakit import recipes
    from lorakit.files import open_text_output
    from lorakit.records import write_records

    request = Request(split, lang, seed, sample, template, completion)
    with open_text_output(output) as stream:
        count = write_records(recipes.build_dataset(recipe, sources, request), stream)
    if sample is not None and count < sample and not quiet:
        click.echo(f"Note: only {count} records for --sample {sample}.", err=True)
