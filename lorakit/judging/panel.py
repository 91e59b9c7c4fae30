"""A panel of judges over files of predictions: `judge` from its inputs to its outputs."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from lorakit.files import check_output, is_stream, open_text_output
from lorakit.judging.asking import ask_all
from lorakit.judging.client import Endpoint, check_key, check_url
from lorakit.judging.questions import (
    Answer,
    Item,
    cautions,
    choose_template,
    preference_items,
    preference_summary,
    rating_items,
    rating_summary,
)
from lorakit.records import load_records, write_records
from lorakit.resume import FoundValues, hidden_beside, run_key
from lorakit.settings import JudgeSettings
from lorakit.versions import version_of

Panel = Mapping[str, Endpoint]  # by the judge's model name


class Notes(Protocol):
    """Whoever passes notes and progress on to the user."""

    def note(self, text: str) -> None: ...
    def tracked(self, items: Iterable[Any], what: str) -> Iterator[Any]: ...


@dataclass(frozen=True)
class Question:
    """One prompt to one judge."""

    model: str
    prompt: str

    def body(self, settings: JudgeSettings) -> dict[str, Any]:
        """Return the chat-completions request."""
        messages = [{"role": "user", "content": self.prompt}]
        return {**settings.request, "model": self.model, "messages": messages}


def open_panel(
    models: Sequence[str],
    urls: Sequence[str],
    variables: Sequence[str],
    settings: JudgeSettings,
) -> Panel:
    """Return each judge's endpoint; one URL or key variable serves all, else each has its own.

    Keys come from the environment; a variable that is not set means no key, as local servers have.
    """
    count = len(models)
    urls = [check_url(url) for url in urls] * (count if len(urls) == 1 else 1)
    names = list(variables) * (count if len(variables) == 1 else 1)
    keys = [check_key(os.environ.get(name), name) for name in names]
    return {
        model: Endpoint(url, key, settings.timeout, settings.retries)
        for model, url, key in zip(models, urls, keys, strict=True)
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
    notes: Notes,
) -> None:
    """Judge every file and write a summary for each to `output`, the answers to `ratings`.

    All files are read, and the outputs tried, before the first question is asked. Raises
    LorakitError naming file and line, or the endpoint.
    """
    for path in (output, ratings):
        if path is not None:
            check_output(path)
    name, text = choose_template(template, preference=against is not None)
    files = _items(paths, against, text)
    side = None if is_stream(output) else hidden_beside(output, "answers.part")
    with FoundValues(side, resume=resume, writer="judge") as answers:
        _ask(files, panel, settings, answers, notes)

        def answer(judge: str, prompt: str) -> str:
            return str(answers.known[_key(Question(judge, prompt), panel, settings)])

        signature = _signature(panel, name, text, settings)
        summaries, rows = [], []
        for path, items in zip(paths, files, strict=True):
            summary, told = _summarise(path, against, items, list(panel), answer)
            summaries.append({**summary, "signature": signature})
            rows += told
            for line in cautions(summary, told):
                notes.note(line)
        if ratings is not None:
            with open_text_output(ratings) as stream:
                write_records(rows, stream)
        with open_text_output(output) as stream:
            write_records(summaries, stream)


def _summarise(
    path: str, against: str | None, items: Sequence[Item], judges: Sequence[str], answer: Answer
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Return the summary of a file and the lines of its records, each naming the files."""
    count = rating_summary if against is None else preference_summary
    numbers, told = count(items, judges, answer)
    head = {"file": path, **({} if against is None else {"against": against})}
    return {**head, "count": len(items), **numbers}, [{**head, **row} for row in told]


def _items(paths: Sequence[str], against: str | None, template: str) -> list[list[Item]]:
    if against is None:
        return [rating_items(path, template) for path in paths]
    others, _ = load_records(against, "prediction")
    return [preference_items(path, others, template) for path in paths]


def _ask(
    files: Sequence[Sequence[Item]],
    panel: Panel,
    settings: JudgeSettings,
    answers: FoundValues,
    notes: Notes,
) -> None:
    """Ask what is not answered yet; the same question to the same judge is asked once."""
    every = (
        Question(model, prompt)
        for items in files
        for item in items
        for prompt in item.prompts
        for model in panel
    )
    keyed = {_key(question, panel, settings): question for question in every}
    done = len(keyed.keys() & answers.known.keys())
    if done:
        notes.note(f"going on after {done} of {len(keyed)} answers")
    left = [(key, question) for key, question in keyed.items() if key not in answers.known]

    def ask(item: tuple[str, Question]) -> str:
        return panel[item[1].model].ask(item[1].body(settings))

    made = ask_all(left, ask, concurrency=settings.concurrency)
    for (key, _), text in notes.tracked(made, "judging"):
        answers.add(key, text)


def _key(question: Question, panel: Panel, settings: JudgeSettings) -> str:
    return run_key(panel[question.model].url, question.body(settings))


def _signature(panel: Panel, name: str, text: str, settings: JudgeSettings) -> str:
    """Return all that the numbers depend on besides the data, in sacrebleu's manner."""
    prompt = name if name != "own" else f"own-{run_key(text)[:12]}"
    request = "".join(f"|{field}:{settings.request[field]}" for field in sorted(settings.request))
    return f"judges:{'+'.join(panel)}|template:{prompt}{request}|version:lorakit-" + version_of(
        "lorakit"
    )
