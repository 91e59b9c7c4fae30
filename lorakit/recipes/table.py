"""Recipes: from raw data to records.

A recipe yields the raw rows of one data set and names the templates that turn a row into a prompt
and a completion. To add one, write a function that yields rows, with a sample row at the end of its
docstring, and add an entry to RECIPES. The table names functions by their module, which is imported
when the recipe is used: `--help` needs none of them. This file knows nothing of file formats.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import NamedTuple

from lorakit.errors import LorakitError
from lorakit.prompts import PROMPTS
from lorakit.recipes.request import SPLITS, Request, RowFunction, Tally, plain_split
from lorakit.recipes.templates import Templates


class Recipe(NamedTuple):
    """One data set: a line of help, its rows, and the templates of prompt and completion.

    `rows` names the function that yields them by its module in this folder: `news.news_rows`.
    `document` is the field of the prompt that may be shortened where the prompt is too long: the
    article, not the question. A recipe with no prompt yields records as they are to be written.
    `sample` is a file name for the row documented in that function, `options` are the fields of
    Request that only some recipes read. If its rows do not stand in text files, `shown_by` names
    the recipe that reads the sample instead. `any_split` says that its sources name their own
    splits.
    """

    help: str
    rows: str
    prompt: str = "{{prompt}}"
    completion: str = "{{completion}}"
    document: str = ""
    sample: str = "sample.jsonl"
    options: tuple[str, ...] = ()
    shown_by: str = ""
    any_split: bool = False

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
        help="a data set of the hub, hf://…, or saved to disk; likewise",
        rows="readers.hub_data.hub_rows",
        shown_by="jsonl",
        any_split=True,
    ),
    "chat": Recipe(
        help="conversations: messages, ShareGPT, Alpaca, TRL",
        rows="chat.chat_rows",
        prompt="",
        completion="",
        any_split=True,
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
        document="article",
    ),
    "wikilingua": Recipe(
        help="WikiLingua: how-to guides and step headings",
        rows="wikilingua.wikilingua_rows",
        prompt=PROMPTS["wikilingua"],
        completion=" {{summary}}",
        document="article",
    ),
    "scitldr": Recipe(
        help="SciTLDR: papers and TLDRs",
        rows="scitldr.scitldr_rows",
        prompt=PROMPTS["scitldr"],
        completion=" {{tldr}}",
        document="article",
    ),
    "mimic": Recipe(
        help="MIMIC-III: radiology findings and impressions",
        rows="mimic.mimic_rows",
        prompt=PROMPTS["mimic"],
        completion=" {{summary}}",
        document="article",
        sample="NOTEEVENTS.csv",
        options=("min_ratio",),
    ),
    "news-html": Recipe(
        help="news pages: articles, and titles with highlights",
        rows="news.news_rows",
        prompt=PROMPTS["news-html"],
        completion=" {{summary}}",
        document="article",
        sample="page.html",
        options=("highlights",),
    ),
    "latex": Recipe(
        help="papers in LaTeX: abstracts and titles",
        rows="latex.latex_rows",
        prompt=PROMPTS["latex"],
        completion=" {{title}}",
        document="article",
        sample="p.tex",
    ),
    "jstage": Recipe(
        help="J-STAGE: abstracts and titles, from metadata",
        rows="jstage.jstage_rows",
        prompt=PROMPTS["jstage"],
        completion=" {{title}}",
        document="article",
        sample="a.xml",
    ),
    "hotpotqa": Recipe(
        help="HotpotQA: questions over paragraphs",
        rows="questions.hotpotqa_rows",
        prompt=PROMPTS["hotpotqa"],
        completion=" {{answer}}",
        document="paragraphs",
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
        document="dialogue",
    ),
    "dialogsum": Recipe(
        help="DialogSum: dialogues and summaries",
        rows="dialogues.dialogsum_rows",
        prompt=PROMPTS["dialogsum"],
        completion=" {{summary}}",
        document="dialogue",
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
        document="dialogue",
        sample="t.txt",
        options=("balance",),
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
        document="article",
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

    Fields that went into the prompt or the completion are not repeated; `document` is the span of
    the prompt that may be shortened. Conversations have `messages` in place of prompt and
    completion. `tally` counts the rows that did not become records. Raises LorakitError naming file
    and line if a row is malformed or lacks a field of the templates, unless the tally skips such
    rows.
    """
    from lorakit.recipes.filters import counting_overlaps, filtered
    from lorakit.recipes.readers.rows import converted

    request, tally = request or Request(), tally or Tally()
    entry = RECIPES[recipe]
    if not entry.any_split:
        request = replace(request, split=plain_split(request.split))
    _check_options(recipe, entry, request)
    templates = Templates(entry.prompt, entry.completion, entry.document).asked_for_by(request)
    rows = entry.function(sources, request, tally)
    records = filtered(converted(rows, templates.record, tally), request, tally)
    if request.balance or request.sample is not None:
        from lorakit.recipes.samples import drawn

        records = drawn(records, request, tally)
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
    if request.split not in SPLITS and not recipe.any_split:
        raise LorakitError(
            f"{name} has no split {request.split}; choose one of {', '.join(SPLITS)}"
        )
    for option in sorted({option for entry in RECIPES.values() for option in entry.options}):
        if getattr(request, option) is not None and option not in recipe.options:
            names = [other for other, entry in RECIPES.items() if option in entry.options]
            raise LorakitError(
                f"{name} has no --{option.replace('_', '-')}; "
                f"leave it out, or take a recipe that has: {', '.join(names)}"
            )
