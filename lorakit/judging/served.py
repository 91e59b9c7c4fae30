"""Predictions by a server's model: `generate --endpoint` between its two files.

The server applies its own chat template, so that records go to it as conversations; with
`--chat off` they go as plain texts. It knows no tokens and loads no model.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from lorakit.errors import LorakitError
from lorakit.judging.asking import ask_in_order
from lorakit.records.completions import Completion, completion_in, skip_done, with_completions
from lorakit.records.few_shot import NO_EXAMPLES, FewShot, shown_text, shown_turns
from lorakit.records.jsonl import read_records, write_records
from lorakit.records.record import Record, Turn
from lorakit.reporting import Reporter
from lorakit.runs.resume import continuing, run_key
from lorakit.settings import AskingSettings, GenerationSettings

if TYPE_CHECKING:  # it imports the SDK
    from lorakit.judging.client import Endpoint, Message

_SEEDS = 1 << 31  # servers differ in how large a seed they take


@dataclass(frozen=True)
class _Question:
    """One completion that is wanted for a record; `number` counts all of a run."""

    record: Record
    number: int


@dataclass(frozen=True)
class _Asker:
    """Puts records to one model of one server."""

    endpoint: Endpoint
    model: str
    settings: GenerationSettings
    few_shot: FewShot

    def ask(self, question: _Question) -> Completion:
        """Return what the model writes."""
        body, settings = self.body(question), self.settings
        if settings.chat == "off":
            return completion_in(self.endpoint.continuation(body), stop=settings.stop)
        return _completion(self.endpoint.message(body), settings)

    def body(self, question: _Question) -> dict[str, object]:
        """Return the request; what is not asked for is left to the server."""
        settings = self.settings
        optional: dict[str, object] = {
            "top_k": settings.top_k,
            "stop": list(settings.stop),
            "chat_template_kwargs": dict(settings.chat_args),
        }
        return {
            "model": self.model,
            **self._asked(question.record),
            "max_tokens": settings.max_new_tokens,
            "temperature": settings.temperature,
            "top_p": settings.top_p,
            "seed": (settings.seed * 1_000_003 + question.number) % _SEEDS,
            **{name: value for name, value in optional.items() if value},
        }

    def _asked(self, record: Record) -> dict[str, object]:
        """Return what stands in the request for a record: its turns, or with --chat off a text."""
        shown = self.few_shot.before(record)
        if self.settings.chat == "off":
            return {"prompt": shown_text(shown, record)}
        turns = shown_turns(shown, _with_system(record, self.settings))
        return {"messages": [{"role": turn.role, "content": turn.content} for turn in turns]}


def write_served_predictions(
    endpoint: Endpoint,
    model: str,
    data: str,
    *,
    settings: GenerationSettings,
    asking: AskingSettings,
    output: str,
    reporter: Reporter,
    resume: bool = False,
    few_shot: FewShot = NO_EXAMPLES,
) -> None:
    """Let a server's model complete every record of `data`; write them to `output` in their order.

    Raises LorakitError naming file and line for a record that cannot be used, or the endpoint; what
    was written until then stays beside the output for `resume`.
    """
    records = reporter.track(read_records(data, "prompt"), "generating")
    asker = _Asker(endpoint, model, settings, few_shot)
    key = run_key(endpoint.url, model, asdict(settings), few_shot.sha256)
    with continuing(output, key, resume=resume) as (stream, done):
        skip_done(records, done)
        if done:
            reporter.note(f"going on after {len(done)} records")
        completed = _completed(asker, records, len(done), asking.concurrency)
        if not write_records(completed, stream) + len(done):
            raise LorakitError(f"{data} holds no records; check what wrote it")


def _completed(
    asker: _Asker, records: Iterable[Record], first: int, concurrency: int
) -> Iterator[Mapping[str, Any]]:
    """Yield the fields of each record with its completions; `first` records came before these."""
    count = asker.settings.samples
    wanted = (record for record in records for _ in range(count))
    questions = (_Question(record, n) for n, record in enumerate(wanted, first * count))
    answered = ask_in_order(questions, asker.ask, concurrency=concurrency)
    while samples := list(itertools.islice(answered, count)):
        yield with_completions(samples[0][0].record, [answer for _, answer in samples]).fields


def _with_system(record: Record, settings: GenerationSettings) -> tuple[Turn, ...]:
    """Return a record's conversation; one without a system turn gets that of the settings."""
    turns = record.conversation
    if settings.system is None or any(turn.role == "system" for turn in turns):
        return turns
    return (Turn("system", settings.system), *turns)


def _completion(message: Message, settings: GenerationSettings) -> Completion:
    """Return the answer and the reasoning in a message, whichever way the server tells them."""
    if message.reasoning is None:
        return completion_in(message.text, stop=settings.stop, reasons=True)
    answer = completion_in(message.text, stop=settings.stop).prediction
    return Completion(answer, message.reasoning.strip())
