"""Recipes: from raw data to records.

A recipe yields the raw rows of one data set and names the templates that make a prompt and a
completion of a row. To add one: a function that yields rows, with a sample row at the end of its
docstring, and a line in RECIPES. The table names functions by their module, which is imported when
the recipe is used: `--help` needs none of them.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import TypeVar

from lorakit.errors import LorakitError
from lorakit.prompts import PROMPTS, Prompt, fields_of, fill
from lorakit.recipes.request import Recipe as Recipe
from lorakit.recipes.request import Request as Request
from lorakit.recipes.request import Tally as Tally
from lorakit.records import Record

_KEPT = ("id", "references")
_SPECIFIC = ("highlights", "min_ratio", "source", "target")  # options of Request for some recipes

T = TypeVar("T")


def _paper(
    name: str, text: str, rows: str, answer: str, sample: str = "sample.jsonl", *options: str
) -> Recipe:
    """Return a recipe with the prompt of its name, to which the row's `answer` is joined."""
    return Recipe(text, rows, PROMPTS[name], f" {{{{{answer}}}}}", sample, options)


RECIPES: dict[str, Recipe] = {
    "jsonl": Recipe("lines of JSON; --template names their fields", "readers.rows.json_rows"),
    "csv": Recipe(
        "CSV or TSV with a header line; likewise", "readers.tables.csv_rows", sample="a.csv"
    ),
    "parquet": Recipe("Parquet files; likewise", "readers.parquet.parquet_rows", shown_by="jsonl"),
    "hf": Recipe(
        "a data set of the hub, hf://…; likewise", "readers.hub_data.hub_rows", shown_by="jsonl"
    ),
    "text-pairs": Recipe(
        "two files of lines, or a TSV file of pairs",
        "translations.text_pair_rows",
        "{{source}}",
        " {{target}}",
        "pairs.tsv",
    ),
    "xlsum": _paper(
        "xlsum", "XL-Sum: BBC articles and summaries", "articles.xlsum_rows", "summary"
    ),
    "wikilingua": _paper(
        "wikilingua",
        "WikiLingua: how-to guides and step headings",
        "wikilingua.wikilingua_rows",
        "summary",
    ),
    "scitldr": _paper("scitldr", "SciTLDR: papers and TLDRs", "scitldr.scitldr_rows", "tldr"),
    "mimic": _paper(
        "mimic",
        "MIMIC-III: radiology findings and impressions",
        "mimic.mimic_rows",
        "summary",
        "NOTEEVENTS.csv",
        "min_ratio",
    ),
    "news-html": _paper(
        "news-html",
        "news pages: articles, and titles with highlights",
        "news.news_rows",
        "summary",
        "page.html",
        "highlights",
    ),
    "latex": _paper(
        "latex", "papers in LaTeX: abstracts and titles", "latex.latex_rows", "title", "p.tex"
    ),
    "jstage": _paper(
        "jstage",
        "J-STAGE: abstracts and titles, from metadata",
        "jstage.jstage_rows",
        "title",
        "a.xml",
    ),
    "hotpotqa": _paper(
        "hotpotqa", "HotpotQA: questions over paragraphs", "questions.hotpotqa_rows", "answer"
    ),
    "gsm8k": _paper(
        "gsm8k", "GSM8K: word problems and worked answers", "questions.gsm8k_rows", "answer"
    ),
    "samsum": _paper("samsum", "SAMSum: chats and summaries", "dialogues.samsum_rows", "summary"),
    "dialogsum": _paper(
        "dialogsum", "DialogSum: dialogues and summaries", "dialogues.dialogsum_rows", "summary"
    ),
    "wmt": _paper(
        "wmt",
        "WMT: segments and translations",
        "translations.wmt_rows",
        "target",
        "pairs.tsv",
        "source",
        "target",
    ),
    "ecommerce": _paper(
        "ecommerce",
        "E-commerce: does a response fit, Yes or No",
        "dialogues.ecommerce_rows",
        "answer",
        "t.txt",
    ),
    "jemhopqa": _paper(
        "jemhopqa", "JEMHopQA: Japanese multi-hop QA", "questions.jemhopqa_rows", "answer"
    ),
    "jawikinews": _paper(
        "jawikinews",
        "Japanese Wikinews: articles and headlines",
        "articles.jawikinews_rows",
        "headline",
        "n.tsv",
    ),
    "microworld": Recipe(
        "a generated world; SOURCE is one of its tasks",
        "microworld.world.microworld_rows",
        sample="",
    ),
}


def build_dataset(
    recipe: str, sources: Sequence[str], request: Request | None = None, tally: Tally | None = None
) -> Iterator[dict[str, object]]:
    """Yield the records of a recipe: `id`, `prompt`, `completion`, and the row's other fields.

    Fields that went into the prompt or the completion are not repeated. What became of the rows
    that are not among the records stands in `tally`. Raises LorakitError naming file and line for
    a row that is malformed or lacks a field of the templates, unless the tally skips those.
    """
    from lorakit.recipes.filters import filtered, noticed
    from lorakit.recipes.readers.rows import converted

    request, tally = request or Request(), tally or Tally()
    chosen = RECIPES[recipe]
    _check_options(recipe, chosen, request)
    prompt = request.template or chosen.prompt
    completion = request.completion or chosen.completion
    rows = chosen.function(sources, request, tally)
    made = converted(rows, lambda row: _record(row, prompt, completion), tally)
    kept = filtered((dict(record.fields) for record in made), request, tally)
    if request.sample is not None:
        kept = iter(draw(kept, request.sample, request.seed))
    yield from noticed(kept, request, tally)


def sample_record(recipe: str, request: Request) -> dict[str, object]:
    """Return the record that a recipe makes of the row in its documentation."""
    import tempfile

    from lorakit.recipes.samples import write_sample

    chosen = RECIPES[recipe]
    if not chosen.sample:
        return next(build_dataset(recipe, ["title"], request))
    with tempfile.TemporaryDirectory() as folder:
        path = write_sample(chosen.function, chosen.sample, folder)
        return next(build_dataset(chosen.shown_by or recipe, [path], request))


def _check_options(name: str, recipe: Recipe, request: Request) -> None:
    for option in _SPECIFIC:
        if getattr(request, option) is not None and option not in recipe.options:
            able = [each for each, other in RECIPES.items() if option in other.options]
            raise LorakitError(
                f"{name} has no --{option.replace('_', '-')}; "
                f"leave it out, or take a recipe that has: {', '.join(able)}"
            )


def _record(row: Record, prompt: str, completion: str) -> Record:
    made = Prompt(fill(prompt, row.fields, row.where), fill(completion, row.fields, row.where))
    used = {"prompt", "completion", *fields_of(prompt), *fields_of(completion)} - {*_KEPT}
    rest = {name: value for name, value in row.fields.items() if name not in used and name != "id"}
    fields = {"id": row.id, "prompt": made.prefix, "completion": made.completion, **rest}
    return Record(fields, row.where)


def draw(rows: Iterable[T], count: int, seed: int) -> list[T]:
    """Return `count` of the rows in their order: those whose hashed place under `seed` is least.

    The same draw on every machine, whatever else is installed, in memory of `count` rows; a larger
    draw under the same seed holds the smaller one.
    """
    import heapq

    numbered = enumerate(rows)

    least = heapq.nsmallest(count, numbered, key=lambda item: _lot(item[0], seed))
    return [row for _, row in sorted(least, key=lambda item: item[0])]


def _lot(place: int, seed: int) -> bytes:
    import hashlib

    return hashlib.sha256(f"{seed}:{place}".encode()).digest()
