"""`lorakit judge`: predictions to language models' verdicts on them, one line per file."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence

import click

from lorakit.commands import _options
from lorakit.files import STDIO
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
@_options.field_option(
    JudgeSettings, "concurrency", click.IntRange(min=1), "Questions asked at a time."
)
@_options.field_option(
    JudgeSettings,
    "timeout",
    click.FloatRange(min=0, min_open=True),
    "Seconds of silence after which a question is asked again.",
)
@_options.field_option(
    JudgeSettings, "retries", click.IntRange(min=0), "How often a question is asked again."
)
@click.option("--ratings", metavar="FILE", help="Where to write each record's answers (JSONL).")
@_options.output(STDIO, "the summary")
@_options.resume
@_options.quiet
@_options.settings(judging=JudgeSettings)
def judge(
    predictions: tuple[str, ...],
    endpoint: tuple[str, ...],
    judge_model: tuple[str, ...],
    key_variable: tuple[str, ...],
    against: str | None,
    template: str | None,
    ratings: str | None,
    output: str,
    resume: bool,
    quiet: bool,
    judging: JudgeSettings,
) -> None:
    """Let language models rate predictions from 0 to 10 (GPT-Score), or choose (--against).

    PREDICTIONS are JSONL files as `lorakit generate` writes them; they are sent to --endpoint, any
    OpenAI-compatible server. Answers that are no rating or choice are counted, never guessed at.

    \b
    lorakit judge test.jsonl --endpoint http://localhost:8000/v1 --judge-model my-judge
    """
    _options.check_stdin(*predictions, against)
    _options.check_resume(resume, output)
    if (ratings, output) == (STDIO, STDIO):
        raise click.UsageError("Only one of --ratings and -o can be stdout.")
    _check_judges(judge_model, {"--endpoint": endpoint, "--key-variable": key_variable})
    from lorakit.commands._progress import TerminalReporter
    from lorakit.judging.panel import open_panel, write_judgements

    write_judgements(
        predictions,
        open_panel(judge_model, endpoint, key_variable, judging),
        settings=judging,
        against=against,
        template=template,
        ratings=ratings,
        output=output,
        resume=resume,
        reporter=TerminalReporter(quiet=quiet),
    )


def _check_judges(models: Sequence[str], options: Mapping[str, Sequence[str]]) -> None:
    """Raise a usage error for a judge named twice, or options not given once or once a judge."""
    if len(set(models)) < len(models):
        raise click.UsageError("A --judge-model is given twice.")
    for name, values in options.items():
        if len(values) not in (1, len(models)):
            raise click.UsageError(f"Give {name} once, or once for each --judge-model.")
