"""Put files of predictions before a panel of judges: `judge` from its inputs to its outputs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from lorakit.files import check_output, hidden_path_beside, is_stream, open_text_output
from lorakit.judging.asking import ask_all
from lorakit.judging.opening import open_endpoint
from lorakit.judging.questions import (
    Answer,
    Item,
    Row,
    Summary,
    choose_template,
    malformed_warnings,
    preference_items,
    preference_summary,
    rating_items,
    rating_summary,
)
from lorakit.records.jsonl import load_records, write_records
from lorakit.reporting import Reporter
from lorakit.runs.resume import SavedValues, completing, run_key
from lorakit.runs.sole_writer import sole_writer
from lorakit.settings import JudgeSettings
from lorakit.versions import version_of

if TYPE_CHECKING:  # it imports the SDK
    from lorakit.judging.client import Endpoint

    Panel = Mapping[str, Endpoint]  # by the judge's model name


@dataclass(frozen=True)
class Question:
    """One prompt to one judge."""

    model: str
    prompt: str

    def body(self, settings: JudgeSettings) -> dict[str, object]:
        """Return the chat-completions request."""
        messages = [{"role": "user", "content": self.prompt}]
        return {**settings.request, "model": self.model, "messages": messages}


def open_panel(
    models: Sequence[str],
    urls: Sequence[str],
    variables: Sequence[str],
    settings: JudgeSettings,
) -> Panel:
    """Return each judge's endpoint; a single URL or key variable serves all judges.

    Keys come from the environment; a variable that is not set means no key, as local servers have.
    Raises LorakitError for an invalid URL or key, and where the extra `endpoint` is missing.
    """
    count = len(models)
    urls = list(urls) * (count if len(urls) == 1 else 1)
    names = list(variables) * (count if len(variables) == 1 else 1)
    return {
        model: open_endpoint("judge", url, name, settings)
        for model, url, name in zip(models, urls, names, strict=True)
    }


def write_judgements(
    paths: Sequence[str],
    panel: Panel,
    *,
    settings: JudgeSettings,
    against: str | None,
    template: str | None,
    ratings: str | None,
    output: str,
    resume: bool,
    reporter: Reporter,
) -> None:
    """Judge every file and write a summary for each to `output`, the answers to `ratings`.

    All files are read, and the outputs checked, before the first question is asked. Raises
    LorakitError naming file and line, or the endpoint.
    """
    for path in (output, ratings):
        if path is not None:
            check_output(path)
    name, text = choose_template(template, preference=against is not None)
    files = _items(paths, against, text)
    answers_path = None if is_stream(output) else hidden_path_beside(output, "answers.part")
    with (
        sole_writer(output),
        SavedValues(answers_path, resume=resume, writer="judge") as answers,
    ):
        _ask(files, panel, settings, answers, reporter)

        def answer(judge: str, prompt: str) -> str:
            return str(answers.values[_key(Question(judge, prompt), panel, settings)])

        signature = _signature(panel, name, text, settings)
        summaries: list[Mapping[str, object]] = []
        lines: list[Mapping[str, object]] = []
        for path, items in zip(paths, files, strict=True):
            compared = {"file": path} if against is None else {"file": path, "against": against}
            summary, rows = _summarise(items, list(panel), answer, preference=against is not None)
            summaries.append({**compared, "count": len(items), **summary, "signature": signature})
            lines += [{**compared, **row} for row in rows]
            for warning in malformed_warnings(path, summary, rows):
                reporter.note(warning)
        if ratings is not None:
            with open_text_output(ratings) as stream:
                write_records(lines, stream)
        with completing(output, answers.delete), open_text_output(output) as stream:
            write_records(summaries, stream)


def _summarise(
    items: Sequence[Item], judges: Sequence[str], answer: Answer, *, preference: bool
) -> tuple[Summary, Sequence[Row]]:
    """Return the summary of a file and a row for each of its records."""
    if preference:
        return preference_summary(items, judges, answer)
    return rating_summary(items, judges, answer)


def _items(paths: Sequence[str], against: str | None, template: str) -> list[list[Item]]:
    """Return the items of each file."""
    if against is None:
        return [rating_items(path, template) for path in paths]
    baseline, _ = load_records(against, "prediction")
    return [preference_items(path, baseline, template) for path in paths]


def _ask(
    files: Sequence[Sequence[Item]],
    panel: Panel,
    settings: JudgeSettings,
    answers: SavedValues,
    reporter: Reporter,
) -> None:
    """Ask the questions that have no answer yet, the same one to the same judge only once."""
    questions = (
        Question(model, prompt)
        for items in files
        for item in items
        for prompt in item.prompts
        for model in panel
    )
    by_key = {_key(question, panel, settings): question for question in questions}
    done = len(by_key.keys() & answers.values.keys())
    if done:
        reporter.note(f"going on after {done} of {len(by_key)} answers")
    left = [(key, question) for key, question in by_key.items() if key not in answers.values]

    def ask(entry: tuple[str, Question]) -> str:
        _, question = entry
        return panel[question.model].ask(question.body(settings))

    answered = ask_all(left, ask, concurrency=settings.concurrency)
    for (key, _), text in reporter.track(answered, "judging"):
        answers.add(key, text)


def _key(question: Question, panel: Panel, settings: JudgeSettings) -> str:
    """Return the key under which a question's answer is saved."""
    return run_key(panel[question.model].url, question.body(settings))


def _signature(panel: Panel, name: str, text: str, settings: JudgeSettings) -> str:
    """Return all that the numbers depend on besides the data, written as sacrebleu does."""
    prompt = name if name != "own" else f"own-{run_key(text)[:12]}"
    request = "".join(f"|{field}:{settings.request[field]}" for field in sorted(settings.request))
    version = version_of("lorakit")
    return f"judges:{'+'.join(panel)}|template:{prompt}{request}|version:lorakit-{version}"
