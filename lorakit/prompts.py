"""Prompts: the wordings of the papers, and the template language in which users write their own.

A template is a text with `{{name}}` where a field of the raw row goes; `{{answers.text[0]}}` goes
into a field, and `{{#name}}…{{/name}}` is left out where the field is missing or empty. To add a
prompt, add a line to PROMPTS. The wordings are those of the adaptive-merge paper's Appendix B
(Table 6) where it has the data set; the line breaks, which its text form lost, are ours. This file
knows nothing of where the rows come from.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping
from typing import NamedTuple

from lorakit.errors import LorakitError

_TITLE = (
    "Read the following Abstract of a scientific paper and create an appropriate title that "
    "reflects the content. Please only output the Japanese title.\n"
    "Abstract: {{article}}\n"
    "Title:"
)
_DIALOGUE = "Summarize the following dialogue.\nDialogue: {{dialogue}}\nSummary:"

PROMPTS: dict[str, str] = {
    # Table 6
    "xlsum": (
        "Summarize the following Article in no more than three sentence.\n"
        "Article: {{article}}\n"
        "Summary:"
    ),
    "wikilingua": (
        "Summarize the following How-to Guide and write a one-sentence summary for each step:\n"
        "How-to Guide: {{article}}\n"
        "Summary:"
    ),
    "news-html": (
        "Summarize the following article in three sentences.\nArticle: {{article}}\nSummary:"
    ),
    "latex": _TITLE,
    "jstage": _TITLE,
    "mimic": "Summarize the following radiology report.\nFindings: {{article}}\nImpression:",
    "scitldr": (
        "Write a TLDR by summarizing the following scientific paper in one sentence based on its "
        "Key Sections (Abstract, Introduction, and Conclusion).\n"
        "Key Sections: {{article}}\n"
        "TLDR:"
    ),
    # ours: the boundary-layer paper does not print its prompts
    "hotpotqa": (
        "Answer the question from the paragraphs.\n{{paragraphs}}\nQuestion: {{question}}\nAnswer:"
    ),
    "gsm8k": "Question: {{question}}\nAnswer:",
    "samsum": _DIALOGUE,
    "dialogsum": _DIALOGUE,
    "wmt": (
        "Translate from {{source_language}} to {{target_language}}.\n"
        "{{source_language}}: {{source}}\n"
        "{{target_language}}:"
    ),
    "ecommerce": (
        "Does the response fit the dialogue? Answer Yes or No.\n"
        "Dialogue:\n{{dialogue}}\n"
        "Response: {{response}}\n"
        "Answer:"
    ),
    "jemhopqa": "Answer the question in Japanese.\nQuestion: {{question}}\nAnswer:",
    "jawikinews": "Write a headline for the article.\nArticle: {{article}}\nHeadline:",
}

# What judges are asked, by the name that --template takes. `dialogue-summary` is the boundary-layer
# paper's wording (Tables 8 and 9, for SAMSum); `general` is our adaptation of it to any task.
RATING_PROMPTS: dict[str, str] = {
    "general": (
        "Here is the given input: {{prompt}}\n"
        "Here is the ground truth: {{reference}}\n"
        "Here is the predicted output: {{prediction}}\n"
        "- The aim of this prediction is to be the output that the input asks for.\n"
        "- Please rate the prediction based on its accuracy, completeness and fluency. The scores "
        "should be integers ranging from 0 to 10.\n"
        "- Please give the score number directly without any explanation or introduction."
    ),
    "dialogue-summary": (
        "Here is the given dialogue history: {{prompt}}\n"
        "Here is the ground truth: {{reference}}\n"
        "Here is the predicted output: {{prediction}}\n"
        "- The aim of this prediction is to generate a summary of the provided historical "
        "dialogue.\n"
        "- Please rate the summary based on its level of abstraction and fluency in summarizing "
        "the historical dialogue. The scores should be integers ranging from 0 to 10.\n"
        "- Please give the score number directly without any explanation or introduction."
    ),
}
PREFERENCE_PROMPTS: dict[str, str] = {
    "general": (
        "Here is the given input: {{prompt}}\n"
        "Here are two generated responses:\n"
        "A. {{a}}\n"
        "B. {{b}}\n"
        "- The aim of these responses is to be the output that the input asks for.\n"
        "- Please choose the better response like a human based on four aspects: fluency, "
        "accuracy, readability, and completeness.\n"
        "- Please output only “A” or “B” directly without any explanation or introduction."
    ),
    "dialogue-summary": (
        "Here is the given dialogue history: {{prompt}}\n"
        "Here are two generated responses:\n"
        "A. {{a}}\n"
        "B. {{b}}\n"
        "- The aim of these responses is to generate a summary of the provided historical "
        "dialogue.\n"
        "- Please choose the better response like a human based on four aspects: fluency, "
        "accuracy, readability, and completeness.\n"
        "- Please output only “A” or “B” directly without any explanation or introduction."
    ),
}

_TAG = re.compile(
    r"\{\{\s*#\s*(?P<optional>[^{}]+?)\s*\}\}(?P<part>.*?)\{\{\s*/\s*(?P=optional)\s*\}\}"
    r"|\{\{\s*(?P<name>[^{}]+?)\s*\}\}",
    re.DOTALL,
)
_STEP = re.compile(r"\[(?P<index>-?\d+)\]|\.?(?P<key>[^.\[\]]+)")


class Prompt(NamedTuple):
    """What the model reads (`prefix`) and what it should write next; nothing goes between them."""

    prefix: str
    completion: str


class Substitution(NamedTuple):
    """A field's text in a filled template: its name there and its span in characters."""

    name: str
    start: int
    end: int


class _NoFieldError(LookupError):
    """A name that a row has no field for; the text says which names there are, or is empty."""


def fields_of(template: str) -> list[str]:
    """Return the field names in a template, as they stand there, in order of appearance."""
    names: list[str] = []
    for match in _TAG.finditer(template):
        names += (
            [match["name"]] if match["name"] else [match["optional"], *fields_of(match["part"])]
        )
    return names


def field_of(name: str, row: Collection[str]) -> str:
    """Return the row's field that a template's name reaches into: `messages[0].content`'s first."""
    return name if name in row else re.split(r"[.\[]", name, maxsplit=1)[0]


def unescaped(template: str) -> str:
    r"""Return a template as typed in a shell: its `\n` become line breaks, its `\\n` stay `\n`."""
    return re.sub(r"\\(\\?)n", lambda match: "\\n" if match[1] else "\n", template)


def fill(template: str, row: Mapping[str, object], where: str) -> str:
    """Return the template with every `{{name}}` replaced by the row's field of that name.

    Raises LorakitError naming `where` if the row lacks a field (the message lists those it has), or
    if a field is neither a text nor a number.
    """
    return "".join(text for _, text in _pieces(template, row, where))


def fill_with_spans(
    template: str, row: Mapping[str, object], where: str
) -> tuple[str, list[Substitution]]:
    """Return what `fill` does, and where in it each field's text stands."""
    texts: list[str] = []
    substitutions: list[Substitution] = []
    end = 0
    for name, text in _pieces(template, row, where):
        start, end = end, end + len(text)
        texts.append(text)
        if name:
            substitutions.append(Substitution(name, start, end))
    return "".join(texts), substitutions


def _pieces(template: str, row: Mapping[str, object], where: str) -> Iterator[tuple[str, str]]:
    """Yield the pieces of a filled template: a field's name and text, or "" and the text between.

    An optional part contributes its own pieces where its field is there and not empty.
    """
    position = 0
    for match in _TAG.finditer(template):
        yield "", template[position : match.start()]
        position = match.end()
        if match["name"]:
            yield match["name"], _text_of(match["name"], row, where)
        elif _is_filled(match["optional"], row):
            yield from _pieces(match["part"], row, where)
    yield "", template[position:]


def _is_filled(name: str, row: Mapping[str, object]) -> bool:
    """Return whether a field is there and holds something besides spaces."""
    try:
        value = _value(name, row)
    except _NoFieldError:
        return False
    if isinstance(value, str):
        return bool(value.strip())
    return value is not None and value is not False and value not in ([], {})


def _text_of(name: str, row: Mapping[str, object], where: str) -> str:
    """Return the text or number that a template's name stands for; LorakitError if none."""
    try:
        value = _value(name, row)
    except _NoFieldError as error:
        raise LorakitError(f"{where}: no field {name!r}; {_remedy(name, row, error)}") from None
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        within = _names_within(name, value)
        other = f"one of {within}" if within else "another"
        raise LorakitError(f"{where}: field {name!r} is not a text; use {other} in the template")
    return str(value)


def _remedy(name: str, row: Mapping[str, object], error: _NoFieldError) -> str:
    if name[0] in "#/":
        return f"an optional part of a template is written {{{{#{name[1:]}}}}}…{{{{/{name[1:]}}}}}"
    names = str(error) or ", ".join(row) or "none"
    return f"name one of those there are in the template: {names}"


def _value(name: str, row: Mapping[str, object]) -> object:
    """Return what a name stands for: the field of just that name, else one reached by its path.

    Raises _NoFieldError.
    """
    if name in row:
        return row[name]
    position, value = 0, None
    for step in _STEP.finditer(name):
        inside: object = value if position else row
        if step.start() != position:
            raise _NoFieldError("")
        try:
            value = _step_into(inside, step)
        except (LookupError, TypeError):
            raise _NoFieldError(_names_within(name[:position], inside)) from None
        position = step.end()
    if position != len(name):
        raise _NoFieldError("")
    return value


def _step_into(value: object, step: re.Match[str]) -> object:
    """Return an object's field or a list's item; LookupError or TypeError if there is none."""
    if step["index"] and isinstance(value, list):
        return value[int(step["index"])]
    if step["key"] and isinstance(value, Mapping):
        return value[step["key"]]
    raise TypeError


def _names_within(name: str, value: object) -> str:
    """Return the names that reach into a value, itself named by `name`; empty where there are none.

    A text has only its own name.
    """
    if isinstance(value, Mapping) and name:
        return ", ".join(f"{name}.{key}" for key in value)
    if isinstance(value, list) and value:
        return f"{name}[0]" + (f" to {name}[{len(value) - 1}]" if len(value) > 1 else "")
    return name if isinstance(value, str) else ""
