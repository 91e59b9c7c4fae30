"""`lorakit judge`: predictions to language models' verdicts on them, one line per file."""

from __future__ import annotations

import click

from lorakit.commands import _judging_options, _options
from lorakit.files import STDIO
from lorakit.settings import JudgeSettings


@click.command()
@click.argument("predictions", nargs=-1, required=True)
@_judging_options.panel
@click.option("--against", metavar="FILE", help="Predictions of a baseline: choose, do not rate.")
@click.option(
    "--template",
    metavar="TEXT",
    help="general, dialogue-summary or a text with {{prediction}}; {{a}}, {{b}} with --against.",
)
@_judging_options.asking
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
    _judging_options.check_judges(
        judge_model, {"--endpoint": endpoint, "--key-variable": key_variable}
    )
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
