"""Prompts: the wordings of the papers, and the template language in which users write their own.

A template is a text with `{{name}}` where a field of the raw row goes. To add a prompt, add a line
to PROMPTS. The wordings are those of the adaptive-merge paper's Appendix B (Table 6) where it has
the data set; the line breaks, lost in the paper's text form, are ours. This file knows nothing of
where the rows come from.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
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

_PLACEHOLDER = re.compile(r"\{\{\s*([^{}]+?)\s*\}\}")


class Prompt(NamedTuple):
    """What the model reads (`prefix`) and what it should write next; nothing goes between them."""

    prefix: str
    completion: str


def fields_of(template: str) -> list[str]:
    """Return the field names in a template, in order of appearance."""
    return _PLACEHOLDER.findall(template)


def fill(template: str, row: Mapping[str, object], where: str) -> str:
    """Return the template with every `{{name}}` replaced by the row's field of that name.

    Raises LorakitError naming `where` if the row lacks a field (the message lists those it has), or
    if a field is neither a text nor a number.
    """

    def text_for(match: re.Match[str]) -> str:
        name = match[1]
        if name not in row:
            names = ", ".join(row) or "none"
            raise LorakitError(
                f"{where}: no field {name!r}; name one of those there are in the template: {names}"
            )
        value = row[name]
        if isinstance(value, bool) or not isinstance(value, str | int | float):
            raise LorakitError(
                f"{where}: field {name!r} is not a text; use another in the template"
            )
        return str(value)

    return _PLACEHOLDER.sub(text_for, template)
