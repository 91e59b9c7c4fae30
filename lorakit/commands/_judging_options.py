"""The options of `judge` that say who is asked and how, and their checks."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence

import click

from lorakit.commands import _options
from lorakit.commands._text_types import ServerUrl
from lorakit.settings import JudgeSettings


def _parse_request(
    context: click.Context, parameter: click.Parameter, value: str | None
) -> Mapping[str, object]:
    """Return the default fields of the request with those of a JSON object; null drops one."""
    try:
        fields = json.loads(value or "{}")
    except ValueError:
        fields = None
    if not isinstance(fields, dict):
        raise click.BadParameter(f"{value!r} is not a JSON object.")
    merged = {**JudgeSettings().request, **fields}
    return {name: item for name, item in merged.items() if item is not None}


panel = _options.together(
    click.option(
        "--endpoint",
        type=ServerUrl(),
        multiple=True,
        metavar="URL",
        help="Server up to and with /v1: one for all judges, or one for each, in order.",
    ),
    click.option(
        "--judge-model",
        multiple=True,
        metavar="NAME",
        help="Judge; may be repeated.",
    ),
    click.option(
        "--key-variable",
        multiple=True,
        default=["OPENAI_API_KEY"],
        show_default=True,
        metavar="NAME",
        help="Environment variable of the API key: one for all judges, or one for each.",
    ),
)

asking = _options.together(
    click.option(
        "--request",
        callback=_parse_request,
        metavar="JSON",
        help="Fields of the request; null drops one. "
        f"[default: {json.dumps(JudgeSettings().request)}]",
    ),
    _options.asking,
)


def check_judges(models: Sequence[str], options: Mapping[str, Sequence[str]]) -> None:
    """Raise a usage error for a judge named twice, and for options not set once or once a judge."""
    if len(set(models)) < len(models):
        raise click.UsageError("A --judge-model is given twice.")
    for name, values in options.items():
        if len(values) not in (1, len(models)):
            raise click.UsageError(f"Give {name} once, or once for each --judge-model.")
