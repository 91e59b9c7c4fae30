"""Completions: what a model wrote for a record, and what of it goes into which field.

What stands between the marks of reasoning is no part of the answer, and an answer ends before a
stop text. Written by a model that was loaded here or by a server's: this file knows neither.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from lorakit.errors import LorakitError
from lorakit.records.record import Record

OPEN, CLOSE = "<think>", "</think>"  # the reasoning marks of Qwen3, DeepSeek-R1, SmolLM3 and others
FIELDS = ("prediction", "reasoning", "predictions", "reasonings")


class Completion(NamedTuple):
    """What a model wrote: the answer, and the reasoning before it, None where it has none."""

    prediction: str
    reasoning: str | None = None


def with_completions(record: Record, completions: Sequence[Completion]) -> Record:
    """Return the record with the first completion in its fields, and all where there are several.

    `predictions` and `reasonings` are lists of one length; a completion without reasoning has null.
    """
    first = completions[0]
    record = record.with_field("prediction", first.prediction)
    if first.reasoning is not None:
        record = record.with_field("reasoning", first.reasoning)
    if len(completions) == 1:
        return record
    record = record.with_field("predictions", [sample.prediction for sample in completions])
    reasonings = [sample.reasoning for sample in completions]
    return record.with_field("reasonings", reasonings) if any(reasonings) else record


def completion_in(
    text: str, *, stop: Sequence[str] = (), reasons: bool = False, opened: bool = False
) -> Completion:
    """Return the answer in what a model wrote, without outer white space, and its reasoning.

    The answer ends before the first of the `stop` texts. `reasons` says that the model may write
    reasoning between marks, `opened` that the prompt has begun it.
    """
    answer, reasoning = _parts(text, reasons, opened)
    return Completion(until_stop(answer, stop).strip(), reasoning)


def stopped(text: str, *, stop: Sequence[str], reasons: bool = False, opened: bool = False) -> bool:
    """Return whether the answer in what a model has written so far holds a stop text."""
    answer, _ = _parts(text, reasons, opened)
    return any(texts in answer for texts in stop)


def _parts(text: str, reasons: bool, opened: bool) -> tuple[str, str | None]:
    """Return the answer and the reasoning; an answer without reasoning stays as it was written."""
    if reasons:
        answer, reasoning = split_reasoning(text, opened=opened)
        if reasoning is not None:
            return answer, reasoning
    return text, None


def until_stop(text: str, stop: Sequence[str]) -> str:
    """Return the text before the stop text that is complete first; the longest of several.

    With `abc` and `b`, the text `xabc` is cut to `xa`, as one is who reads it letter by letter.
    """
    places = [(place, texts) for texts in stop if (place := text.find(texts)) >= 0]
    if not places:
        return text
    return text[: min((place + len(texts), place) for place, texts in places)[1]]


def split_reasoning(text: str, *, opened: bool = False) -> tuple[str, str | None]:
    """Return the answer in what a model wrote, and the reasoning before it, None where it has none.

    `opened` says that the prompt has opened a block of reasoning. A block that was never closed
    leaves no answer.
    """
    before, closed, answer = text.rpartition(CLOSE)
    if closed:
        return answer.strip(), before.strip().removeprefix(OPEN).strip()
    start, mark, reasoning = text.partition(OPEN)
    if mark and not start.strip():
        return "", reasoning.strip()
    return ("", text.strip()) if opened else (text.strip(), None)


def skip_done(records: Iterator[Record], done: Sequence[str]) -> None:
    """Skip the records whose completions were written by an earlier run, as the lines `done`.

    Raises LorakitError where the data is not what that run had read.
    """
    ours = dict.fromkeys(FIELDS)
    for line in done:
        record = next(records, None)
        written = json.loads(line)
        if record is None or {**record.fields, **ours} != {**written, **ours}:
            where = record.where if record else "the end of --data"
            raise LorakitError(
                f"{where}: not the record that the killed run had read; generate afresh without "
                "--resume"
            )
