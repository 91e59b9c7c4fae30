"""Recipes: from raw data to records.

A recipe yields the raw rows of one data set and names the templates that turn a row into a prompt
and a completion. To add one, write a function that yields rows, with a sample row at the end of its
docstring, and add an entry to RECIPES. The table names functions by their module, which is imported
when the recipe is used: `--help` needs none of them. This file knows nothing of file formats.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

from lorakit.errors import LorakitError
from lorakit.prompts import PROMPTS, Prompt, fields_of, fill
from lorakit.recipes.request import Request, RowFunction, Tally
from lorakit.records import Record

_ALWAYS_KEPT = ("id", "references")


class Recipe(NamedTuple):
    """One data set: a line of help, its rows, and the templates of prompt and completion.

    `rows` names the function that yields them by its module in this folder: `news.news_rows`.
    `sample` is a file name for the row documented in that function, `options` are the fields of
    Request that only some recipes read. Where a recipe reads no text files, `shown_by` names the
    recipe that reads the sample instead.
    """

    help: str
    rows: str
    prompt: str = "{{prompt}}"
    completion: str = "{{completion}}"
    sample: str = "sample.jsonl"
    options: tuple[str, ...] = ()
    shown_by: str = ""

    @property
    def function(self) -> RowFunction:
        """The function that yields the rows; its module is imported now."""
        import importlib

        module, _, name = self.rows.rpartition(".")
        function: RowFunction = getattr(importlib.import_module(f"lorakit.recipes.{module}"), name)
        return function


RECIPES: dict[str, Recipe] = {
    "jsonl": Recipe(
        help="lines of JSON; --template names their fields",
        rows="readers.rows.json_rows",
    ),
    "csv": Recipe(
        help="CSV or TSV with a header line; likewise",
        rows="readers.tables.csv_rows",
        sample="a.csv",
    ),
    "parquet": Recipe(
        help="Parquet files; likewise",
        rows="readers.parquet.parquet_rows",
        shown_by="jsonl",
    ),
    "hf": Recipe(
        help="a data set of the hub, hf://…; likewise",
        rows="readers.hub_data.hub_rows",
        shown_by="jsonl",
    ),
    "text-pairs": Recipe(
        help="two files of lines, or a TSV file of pairs",
        rows="translations.text_pair_rows",
        prompt="{{source}}",
        completion=" {{target}}",
        sample="pairs.tsv",
    ),
    "xlsum": Recipe(
        help="XL-Sum: BBC articles and summaries",
        rows="articles.xlsum_rows",
        prompt=PROMPTS["xlsum"],
        completion=" {{summary}}",
    ),
    "wikilingua": Recipe(
        help="WikiLingua: how-to guides and step headings",
        rows="wikilingua.wikilingua_rows",
        prompt=PROMPTS["wikilingua"],
        completion=" {{summary}}",
    ),
    "scitldr": Recipe(
        help="SciTLDR: papers and TLDRs",
        rows="scitldr.scitldr_rows",
        prompt=PROMPTS["scitldr"],
        completion=" {{tldr}}",
    ),
    "mimic": Recipe(
        help="MIMIC-III: radiology findings and impressions",
        rows="mimic.mimic_rows",
        prompt=PROMPTS["mimic"],
        completion=" {{summary}}",
        sample="NOTEEVENTS.csv",
        options=("min_ratio",),
    ),
    "news-html": Recipe(
        help="news pages: articles, and titles with highlights",
        rows="news.news_rows",
        prompt=PROMPTS["news-html"],
        completion=" {{summary}}",
        sample="page.html",
        options=("highlights",),
    ),
    "latex": Recipe(
        help="papers in LaTeX: abstracts and titles",
        rows="latex.latex_rows",
        prompt=PROMPTS["latex"],
        completion=" {{title}}",
        sample="p.tex",
    ),
    "jstage": Recipe(
        help="J-STAGE: abstracts and titles, from metadata",
        rows="jstage.jstage_rows",
        prompt=PROMPTS["jstage"],
        completion=" {{title}}",
        sample="a.xml",
    ),
    "hotpotqa": Recipe(
        help="HotpotQA: questions over paragraphs",
        rows="questions.hotpotqa_rows",
        prompt=PROMPTS["hotpotqa"],
        completion=" {{answer}}",
    ),
    "gsm8k": Recipe(
        help="GSM8K: word problems and worked answers",
        rows="questions.gsm8k_rows",
        prompt=PROMPTS["gsm8k"],
        completion=" {{answer}}",
    ),
    "samsum": Recipe(
        help="SAMSum: chats and summaries",
        rows="dialogues.samsum_rows",
        prompt=PROMPTS["samsum"],
        completion=" {{summary}}",
    ),
    "dialogsum": Recipe(
        help="DialogSum: dialogues and summaries",
        rows="dialogues.dialogsum_rows",
        prompt=PROMPTS["dialogsum"],
        completion=" {{summary}}",
    ),
    "wmt": Recipe(
        help="WMT: segments and translations",
        rows="translations.wmt_rows",
        prompt=PROMPTS["wmt"],
        completion=" {{target}}",
        sample="pairs.tsv",
        options=("source", "target"),
    ),
    "ecommerce": Recipe(
        help="E-commerce: does a response fit, Yes or No",
        rows="dialogues.ecommerce_rows",
        prompt=PROMPTS["ecommerce"],
        completion=" {{answer}}",
        sample="t.txt",
    ),
    "jemhopqa": Recipe(
        help="JEMHopQA: Japanese multi-hop QA",
        rows="questions.jemhopqa_rows",
        prompt=PROMPTS["jemhopqa"],
        completion=" {{answer}}",
    ),
    "jawikinews": Recipe(
        help="Japanese Wikinews: articles and headlines",
        rows="articles.jawikinews_rows",
        prompt=PROMPTS["jawikinews"],
        completion=" {{headline}}",
        sample="n.tsv",
    ),
    "microworld": Recipe(
        help="a generated world; SOURCE is one of its tasks",
        rows="microworld.world.microworld_rows",
        sample="",
    ),
}


def build_dataset(
    recipe: str, sources: Sequence[str], request: Request | None = None, tally: Tally | None = None
) -> Iterator[dict[str, object]]:
    """Yield the records of a recipe: `id`, `prompt`, `completion`, and the row's other fields.

    Fields that went into the prompt or the completion are not repeated. `tally` counts the rows
    that did not become records. Raises LorakitError naming file and line if a row is malformed or
    lacks a field of the templates, unless the tally skips such rows.
    """
    from lorakit.recipes.filters import counting_overlaps, filtered
    from lorakit.recipes.readers.rows import converted

    request, tally = request or Request(), tally or Tally()
    entry = RECIPES[recipe]
    _check_options(recipe, entry, request)
    prompt = request.template or entry.prompt
    completion = request.completion or entry.completion
    rows = entry.function(sources, request, tally)
    records = converted(rows, lambda row: _record(row, prompt, completion), tally)
    records = filtered(records, request, tally)
    if request.sample is not None:
        from lorakit.recipes.samples import draw

        records = iter(draw(records, request.sample, request.seed))
    for record in counting_overlaps(records, request, tally):
        yield dict(record.fields)


def sample_record(recipe: str, request: Request) -> dict[str, object]:
    """Return the record that a recipe makes of the sample row in its documentation.

    Raises LorakitError if the request removes that row, by its language for example.
    """
    import tempfile

    from lorakit.recipes.samples import write_sample

    entry, tally = RECIPES[recipe], Tally()
    if not entry.sample:
        return next(build_dataset(recipe, ["title"], request))
    with tempfile.TemporaryDirectory() as folder:
        path = write_sample(entry.function, entry.sample, folder)
        record = next(build_dataset(entry.shown_by or recipe, [path], request, tally), None)
    if record is None:
        reasons = ", ".join(tally.removed)
        raise LorakitError(
            f"the sample row of {recipe} is left out ({reasons}); "
            "change the options, or name a SOURCE"
        )
    return record


def _check_options(name: str, recipe: Recipe, request: Request) -> None:
    """Raise LorakitError if the request sets an option that only other recipes read."""
    for option in sorted({option for entry in RECIPES.values() for option in entry.options}):
        if getattr(request, option) is not None and option not in recipe.options:
            names = [other for other, entry in RECIPES.items() if option in entry.options]
            raise LorakitError(
                f"{name} has no --{option.replace('_', '-')}; "
                f"leave it out, or take a recipe that has: {', '.join(names)}"
            )


def _record(row: Record, prompt: str, completion: str) -> Record:
    """Return the record that the two templates make of a row."""
    filled = Prompt(fill(prompt, row.fields, row.where), fill(completion, row.fields, row.where))
    used = {"prompt", "completion", *fields_of(prompt), *fields_of(completion)} - {*_ALWAYS_KEPT}
    rest = {name: value for name, value in row.fields.items() if name not in used and name != "id"}
    fields = {"id": row.id, "prompt": filled.prefix, "completion": filled.completion, **rest}
    return Record(fields, row.where)
