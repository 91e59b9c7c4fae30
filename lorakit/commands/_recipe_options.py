"""The options of `build-dataset` that say what a recipe is to yield: the fields of Request."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from lorakit.commands import _options
from lorakit.commands._types import Real, Whole
from lorakit.recipes.request import Request
from lorakit.recipes.table import RECIPES

HUB = "hf://"
EPILOG = "\b\nRecipes:\n" + "\n".join(
    f"  {name:<12}{recipe.help}" for name, recipe in RECIPES.items()
)

if TYPE_CHECKING:
    Choice = click.Choice[str]
else:
    Choice = click.Choice  # not generic before click 8.2


class _RecipeName(Choice):
    """A name in RECIPES, or the address of a data set on the hub."""

    def convert(self, value: str, param: click.Parameter | None, ctx: click.Context | None) -> str:
        if value.startswith(HUB):
            return value
        return super().convert(value, param, ctx)


recipe = click.argument("recipe", type=_RecipeName(list(RECIPES)), metavar="RECIPE")

request = _options.together(
    click.option(
        "--split",
        metavar="NAME",
        default=Request.split,
        show_default=True,
        help="train, validation (val, dev), test; of hf:// and a saved data set, any name it has.",
    ),
    click.option(
        "--lang",
        type=click.Choice(["en", "ja", "zh"]),
        help="Take texts of this language. [default: what there is; of microworld, en]",
    ),
    click.option("--sample", type=Whole(1), metavar="N", help="Draw N records."),
    _options.seed,
    click.option(
        "--template",
        metavar="TEXT",
        help="The prompt: {{field}}, {{list[0].field}}, "
        "{{#field}}only if not empty{{/field}}, \\n.",
    ),
    click.option(
        "--completion", metavar="TEXT", help="The completion, likewise; joined to the prompt as is."
    ),
    click.option(
        "--document",
        metavar="FIELD",
        help="The template's field that may be cut. [default: the recipe's, or the longest]",
    ),
    click.option("--min-words", type=Whole(1), metavar="N", help="Drop shorter prompts."),
    click.option("--max-words", type=Whole(1), metavar="N", help="Drop longer prompts."),
    click.option(
        "--min-ratio",
        type=Real(min=0),
        metavar="R",
        help="mimic: words of findings for each of the impression, at least. [default: 1.5]",
    ),
    click.option("--highlights", metavar="CSS", help="news-html: where the highlights stand."),
    click.option("--source", metavar="LANG", help="wmt: language to translate from. [default: en]"),
    click.option("--target", metavar="LANG", help="wmt: language to translate to. [default: zh]"),
    click.option(
        "--balance", is_flag=True, default=None, help="ecommerce: equal numbers of Yes and No."
    ),
    click.option(
        "--overlap",
        multiple=True,
        metavar="FILE",
        help="Count prompts that stand in these records.",
    ),
    click.option("--drop-overlap", multiple=True, metavar="FILE", help="Remove such prompts."),
)
