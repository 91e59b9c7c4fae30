"""`lorakit judge`: predictions to what language models think of them, one line per file."""

from __future__ import annotations

import json
from typing import Any

import click

from lorakit.commands import _options as options
from lorakit.files import STDIO
from lorakit.settings import JudgeSettings


def _parse_request(
    context: click.Context, parameter: click.Parameter, value: str | None
) -> dict[str, Any]:
    try:
        given = json.loads(value or "{}")
    except ValueError:
        given = None
    if not isinstance(given, dict):
        raise click.BadParameter(f"{value!r} is not a JSON object.")
    merged = {**JudgeSettings().request, **given}
    return {name: item for name, item in merged.items() if item is not None}


@click.command()
@click.argument("predictions", nargs=-1, required=True)
@click.option(
    "--endpoint",
    multiple=True,
    required=True,
    metavar="URL",
    help="Server up to and with /v1: one for all judges, or one for each, in order.",
)
@click.option(
    "--judge-model", multiple=True, required=True, metavar="NAME", help="Judge; may be repeated."
)
@click.option(
    "--key-variable",
    multiple=True,
    default=["OPENAI_API_KEY"],
    show_default=True,
    metavar="NAME",
    help="Environment variable of the API key: one for all judges, or one for each.",
)
@click.option("--against", metavar="FILE", help="Predictions of a baseline: choose, do not rate.")
@click.option(
    "--template",
    metavar="TEXT",
    help="general, dialogue-summary or a text with {{prediction}}; {{a}}, {{b}} with --against.",
)
@click.option(
    "--request",
    callback=_parse_request,
    metavar="JSON",
    help=f"Fields of the request; null drops one. [default: {json.dumps(JudgeSettings().request)}]",
)
@click.option(
    "--concurrency",
    type=click.IntRange(min=1),
    default=JudgeSettings.concurrency,
    show_default=True,
    help="Questions asked at a time.",
)
@click.option(
    "--timeout",
    type=click.FloatRange(min=0, min_open=True),
    default=JudgeSettings.timeout,
    show_default=True,
    help="Seconds of silence after which a question is asked again.",
)
@click.option(
    "--retries",
    type=click.IntRange(min=0),
    default=JudgeSettings.retries,
    show_default=True,
    help="How often a question is asked again.",
)
@click.option("--ratings", metavar="FILE", help="Where to write each record's answers (JSONL).")
@options.output(STDIO, "the summary")
@click.option("--resume", is_flag=True, help="Go on where a killed run stopped; needs -o.")
@options.quiet
def judge(
    predictions: tuple[str, ...],
    endpoint: tuple[str, ...],
    judge_model: tuple[str, ...],
    key_variable: tuple[str, ...],
    against: str | None,
    template: str | None,
    ratings: str | None,
    output: str,
    quiet: bool,
    resume: bool,
    **given: Any,
) -> None:
    """Let language models rate predictions from 0 to 10 (GPT-Score), or choose (--against).

    PREDICTIONS are JSONL files as `lorakit generate` writes them; they are sent to --endpoint, any
    OpenAI-compatible server. Answers that are no rating or choice are counted, never guessed at.

    \b
    lorakit judge test.jsonl --endpoint http://localhost:8000/v1 --judge-model my-judge
    """
    options.one_pipe(*predictions, against)
    if resume and output == STDIO:
        raise click.UsageError("--resume needs -o FILE: a pipe keeps nothing to go on from.")
    if (ratings, output) == (STDIO, STDIO):
        raise click.UsageError("Only one of --ratings and -o can be stdout.")
    if len(set(judge_model)) < len(judge_model):
        raise click.UsageError("A --judge-model is given twice.")
    for name, values in (("--endpoint", endpoint), ("--key-variable", key_variable)):
        if len(values) not in (1, len(judge_model)):
            raise click.UsageError(f"Give {name} once, or once for each --judge-model.")
    from lorakit.commands._progress import Notes
    from lorakit.judging.panel import open_panel, write_judgements

    settings = options.settings_of(JudgeSettings, given)
    write_judgements(
        predictions,
        open_panel(judge_model, endpoint, key_variable, settings),
        settings=settings,
        against=against,
        template=template,
        ratings=ratings,
        output=output,
        resume=resume,
        notes=Notes(quiet=quiet),
    )
