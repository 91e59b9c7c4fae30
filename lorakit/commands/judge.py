"""`lorakit judge`: predictions to language models' verdicts on them, one line per file."""

from __future__ import annotations

import click

from lorakit.commands import _judging_options, _options
from lorakit.commands._sheets import check_mode, export_to_sheet, import_sheets
from lorakit.commands._types import Whole
from lorakit.files import STDIO
from lorakit.settings import JudgeSettings, SheetSettings


@click.command()
@click.argument("predictions", nargs=-1, metavar="[PREDICTIONS]...")
@_judging_options.panel
@click.option("--against", metavar="FILE", help="Predictions of a baseline: choose, do not rate.")
@click.option(
    "--template",
    metavar="TEXT",
    help="general, dialogue-summary or a text with {{prediction}}; {{a}}, {{b}} with --against.",
)
@_judging_options.asking
@click.option("--ratings", metavar="FILE", help="Where to write each record's answers (JSONL).")
@click.option(
    "--export-sheet",
    metavar="FILE",
    help="Ask nobody: write a blinded CSV sheet for human raters, its key beside it.",
)
@click.option(
    "--sample",
    type=Whole(1),
    metavar="N",
    help="Records of each file in the sheet. [default: all]",
)
@_options.seed
@click.option(
    "--import-sheet",
    multiple=True,
    metavar="FILE",
    help="Sum up a rated sheet; may be repeated, once for each rater.",
)
@click.option("--sheet-key", metavar="FILE", help="The sheet's key, NAME.key.json.")
@_options.output(STDIO, "the summary")
@_options.resume
@_options.quiet
@_options.settings(judging=JudgeSettings, sheets=SheetSettings)
def judge(
    predictions: tuple[str, ...],
    endpoint: tuple[str, ...],
    judge_model: tuple[str, ...],
    key_variable: tuple[str, ...],
    against: str | None,
    template: str | None,
    ratings: str | None,
    export_sheet: str | None,
    import_sheet: tuple[str, ...],
    sheet_key: str | None,
    output: str,
    resume: bool,
    quiet: bool,
    judging: JudgeSettings,
    sheets: SheetSettings,
) -> None:
    """Let language models rate predictions from 0 to 10 (GPT-Score), or choose (--against).

    PREDICTIONS are JSONL files as `lorakit generate` writes them; they are sent to --endpoint, any
    OpenAI-compatible server. Answers that are no rating or choice are counted, never guessed at.

    For human raters, --export-sheet writes a sheet that names no system, in an order drawn from
    --seed, and --import-sheet sums up what they wrote into its column `rating`: 0 to 10, or A, B
    or tie (--against).

    \b
    lorakit judge test.jsonl --endpoint http://localhost:8000/v1 --judge-model my-judge
    lorakit judge a.jsonl b.jsonl --export-sheet sheet.csv --sample 50
    lorakit judge --import-sheet one.csv --import-sheet two.csv --sheet-key sheet.key.json
    """
    check_mode(
        {"--export-sheet": bool(export_sheet), "--import-sheet": bool(import_sheet)},
        {
            "PREDICTIONS": bool(predictions),
            "--against": against is not None,
            "--endpoint": bool(endpoint),
            "--judge-model": bool(judge_model),
            "--template": template is not None,
            "--resume": resume,
            "--sample": sheets.sample is not None,
            "--seed": sheets.seed != SheetSettings.seed,
            "--sheet-key": sheet_key is not None,
            "--ratings": ratings is not None,
            "--output": output != STDIO,
        },
    )
    _options.check_stdin(*predictions, against, *import_sheet)
    _options.check_resume(resume, output)
    if (ratings, output) == (STDIO, STDIO):
        raise click.UsageError("Only one of --ratings and -o can be stdout.")
    if export_sheet is not None:
        export_to_sheet(predictions, export_sheet, against, sheets, quiet=quiet)
        return
    if sheet_key is not None:
        import_sheets(import_sheet, sheet_key, ratings, output)
        return
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
