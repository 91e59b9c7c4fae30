"""From records to tokens: prompt and completion as one string, and which of its tokens are learnt.

Any fast tokenizer will do; base.py loads them.
"""

from __future__ import annotations

import datetime
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any

from lorakit.errors import LorakitError
from lorakit.records import Record

Tokenizer = Any  # transformers.PreTrainedTokenizerFast

# The date that chat templates get when they ask for today's, so that a run does not depend on the
# day. A macro put before the template shadows the function of that name, which reads the clock.
CHAT_DATE = datetime.date(2025, 1, 1)
_DATED = "".join(
    [
        "{% macro strftime_now(format) %}{{ format",
        *(f"|replace('%{code}', '{CHAT_DATE:%{code}}')" for code in "dmYyBbAaHMSjI"),
        "}}{% endmacro %}{{ '' }}",
    ]
)


@dataclass(frozen=True)
class Example:
    """A record in tokens: `ids`, of which those from `start` on are learnt.

    `where` says where the record was read from, `cut` how many tokens its prompt lost to fit the
    context.
    """

    ids: tuple[int, ...]
    start: int
    where: str
    cut: int = 0

    @property
    def targets(self) -> int:
        """The number of tokens that are learnt: the completion's and the end token."""
        return len(self.ids) - self.start


@dataclass(frozen=True)
class Encoder:
    """Turns records into tokens for one model.

    `end` is the end token's id, `limit` the longest sequence in tokens, `chat` whether the
    tokenizer's chat template is applied, `truncate` whether long prompts are cut.
    """

    tokenizer: Tokenizer
    end: int
    limit: int
    chat: bool = False
    truncate: bool = False

    def example(self, record: Record) -> Example:
        """Encode prompt, completion and end token, together at most `limit` tokens.

        The completion's tokens are those that end inside the completion. Raises LorakitError naming
        the record if it is too long and must not, or cannot, be cut.
        """
        return self._fit(record, self._encode_both, 0)

    def prompt(self, record: Record, room: int) -> Example:
        """Encode the prompt alone, so that `room` more tokens fit after it.

        Raises LorakitError as `example` does.
        """
        return self._fit(record, self._encode_prompt, room)

    def _fit(self, record: Record, encode: Callable[[Record], Example], room: int) -> Example:
        """Encode a record, cutting the end of its prompt until `room` more tokens fit."""
        whole = encode(record)
        example, text, over = whole, record.prompt, len(whole.ids) + room - self.limit
        while over > 0:
            if not self.truncate or not text:
                raise self._too_long(record, len(whole.ids), room)
            text = self._without_last(text, over)
            example = encode(record.with_field("prompt", text))
            over = len(example.ids) + room - self.limit
        return replace(example, cut=len(whole.ids) - len(example.ids))

    def _without_last(self, text: str, count: int) -> str:
        """Return the text without its last `count` tokens."""
        offsets = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        starts = [start for start, _ in offsets["offset_mapping"]]
        return text[: starts[-count]] if count < len(starts) else ""

    def _too_long(self, record: Record, length: int, room: int) -> LorakitError:
        what = f"the prompt's {length} tokens and {room} new ones" if room else f"{length} tokens"
        remedy = "give --truncate to cut the prompt's end, or shorten the record"
        if self.truncate:
            remedy = "there is no prompt left to cut; allow more tokens or shorten the record"
        return LorakitError(
            f"{record.where}: {what} exceed the {self.limit} of the context or --max-length; "
            f"{remedy}"
        )

    def _encode_prompt(self, record: Record) -> Example:
        text = self._render(record.prompt, None, record.where) if self.chat else record.prompt
        ids = self._never_empty(self._tokens(text)[0])
        return Example(ids, len(ids), record.where)

    def _encode_both(self, record: Record) -> Example:
        """Encode prompt and completion as one string, however long, and the end token."""
        if self.chat:
            prompt = self._render(record.prompt, None, record.where)
            text = self._render(record.prompt, record.completion, record.where)
            if not text.startswith(prompt):
                raise LorakitError(
                    f"{record.where}: the chat template writes the prompt otherwise when an answer "
                    "follows; train with --chat off"
                )
        else:
            prompt, text = record.prompt, record.prompt + record.completion
        ids, ends = self._tokens(text)
        start = next((i for i, end in enumerate(ends) if end > len(prompt)), len(ids))
        answer = ids[start:]
        if self.chat and self.end in answer:  # drop what the template writes after the end token
            answer = answer[: answer.index(self.end)]
        before = self._never_empty(ids[:start])
        return Example((*before, *answer, self.end), len(before), record.where)

    def _never_empty(self, ids: tuple[int, ...]) -> tuple[int, ...]:
        """Return the tokens or, if there are none, the token that begins a text."""
        begin = self.tokenizer.bos_token_id
        return ids or (self.end if begin is None else begin,)

    def _tokens(self, text: str) -> tuple[tuple[int, ...], list[int]]:
        """Return the ids of a text and where in it each ends (0 for special tokens)."""
        encoded = self.tokenizer(
            text, add_special_tokens=not self.chat, return_offsets_mapping=True, truncation=False
        )
        ids, ends = tuple(encoded["input_ids"]), [end for _, end in encoded["offset_mapping"]]
        while ids and ids[-1] == self.end and ends[-1] == 0:  # added by the tokenizer itself
            ids, ends = ids[:-1], ends[:-1]
        return ids, ends

    def _render(self, prompt: str, answer: str | None, where: str) -> str:
        """Return the chat as the template writes it; without an answer, up to where one begins."""
        import jinja2

        turns = [{"role": "user", "content": prompt}]
        if answer is not None:
            turns.append({"role": "assistant", "content": answer})
        try:
            return str(
                self.tokenizer.apply_chat_template(
                    turns,
                    chat_template=_DATED + self.tokenizer.get_chat_template(),
                    tokenize=False,
                    add_generation_prompt=answer is None,
                )
            )
        except (ValueError, TypeError, ImportError, jinja2.TemplateError) as error:
            raise LorakitError(
                f"{where}: the model's chat template cannot be applied ({error}); use --chat off"
            ) from error


@dataclass
class CutTally:
    """Counts the records, and the tokens of those that `--truncate` cut, for a note.

    `cut` is the number of records cut, `tokens` what they had and `lost` what they lost.
    """

    records: int = 0
    cut: int = 0
    lost: int = 0
    tokens: int = 0

    def add(self, example: Example) -> Example:
        """Count an example and return it."""
        self.records += 1
        if example.cut:
            self.cut += 1
            self.lost += example.cut
            self.tokens += len(example.ids) + example.cut
        return example

    @property
    def note(self) -> str | None:
        """A line on how many records were cut and by how much; None if none was."""
        if not self.cut:
            return None
        return (
            f"{self.cut} of {self.records} records were too long: --truncate cut "
            f"{100 * self.lost / self.tokens:.1f} % of their tokens"
        )


def encode_all(
    records: Iterable[Record], encode: Callable[[Record], Example], note: Callable[[str], None]
) -> list[Example]:
    """Encode the records in order; if `--truncate` cut any, call `note` with a line about it."""
    tally = CutTally()
    examples = [tally.add(encode(record)) for record in records]
    if tally.note:
        note(tally.note)
    return examples
