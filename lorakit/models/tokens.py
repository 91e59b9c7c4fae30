"""From records to tokens: prompt and completion as one string, and which of its tokens are learnt.

It works with any fast tokenizer and loads none; base.py does that. Conversations are put into one
text by chat.py.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

from lorakit.errors import LorakitError
from lorakit.foreign_text import check_encodable, quote
from lorakit.models.chat import Chat, Tokenizer
from lorakit.records.completions import OPEN
from lorakit.records.few_shot import plain_prompt, shown_text, shown_turns
from lorakit.records.record import Record


@dataclass(frozen=True)
class Example:
    """A record in tokens: `ids`, of which those from `start` on are learnt.

    `where` is the place the record was read from, `cut` the number of tokens that its prompt lost
    to fit the context. `opens_reasoning` says that the prompt ends inside a block of reasoning.
    """

    ids: tuple[int, ...]
    start: int
    where: str
    cut: int = 0
    opens_reasoning: bool = False

    @property
    def targets(self) -> int:
        """The number of tokens that are learnt: the completion's and the end token."""
        return len(self.ids) - self.start


@dataclass(frozen=True)
class Encoder:
    """Turns records into tokens for one model.

    `ends` are the ids of the end tokens, the tokenizer's own first, `limit` the longest sequence in
    tokens; `chat` applies the tokenizer's template, None joins the texts as written. `cut` says
    what `truncate` shortens: `auto` the record's document, and of a record without one the middle.
    `embedded` is how many tokens the model, which messages call `model`, has an embedding for.
    """

    tokenizer: Tokenizer
    ends: tuple[int, ...]
    limit: int
    chat: Chat | None = None
    truncate: bool = False
    cut: str = "auto"
    embedded: int = sys.maxsize
    model: str = "the model"

    def example(self, record: Record) -> Example:
        """Encode prompt, completion and end token, together at most `limit` tokens.

        The completion's tokens are those that end inside the completion. Raises LorakitError naming
        the record if it is too long and must not, or cannot, be cut.
        """
        return self._fit(record, self._encode_both, 0)

    def prompt(self, record: Record, room: int, shots: Sequence[Record] = ()) -> Example:
        """Encode the prompt alone, after examples, so that `room` more tokens fit after it.

        Only the record's own prompt is ever cut. Raises LorakitError as `example` does.
        """
        encode = functools.partial(self._encode_prompt, shots=shots)
        return self._fit(record, encode, room, "show fewer --shots, " if shots else "")

    def _fit(
        self, record: Record, encode: Callable[[Record], Example], room: int, first_remedy: str = ""
    ) -> Example:
        """Encode a record, its prompt shortened until it fits with `room` more tokens."""
        whole = encode(record)
        self._check_embedded(whole)
        example, over = whole, len(whole.ids) + room - self.limit
        if over <= 0:
            return whole
        parts = _shrinking_parts(record, self.cut) if self.truncate else ()
        for part in parts:
            offsets = self._offsets(part.text)
            removed = 0
            while over > 0 and removed < len(offsets):
                removed = min(len(offsets), removed + over)
                shorter = _shortened(part.text, offsets, removed, part.cut)
                example = encode(part.record_with(shorter))
                over = len(example.ids) + room - self.limit
        if over > 0:
            raise self._too_long(record, len(whole.ids), room, first_remedy)
        return replace(example, cut=len(whole.ids) - len(example.ids))

    def _check_embedded(self, example: Example) -> None:
        """Raise LorakitError naming the model where a token is beyond its embedding."""
        if (token := max(example.ids)) >= self.embedded:
            text = quote(str(self.tokenizer.convert_ids_to_tokens(token)))
            raise LorakitError(
                f"{example.where}: the tokenizer of {self.model} gives token {token}, {text}, and "
                f"the model embeds {self.embedded}; give the model its own tokenizer"
            )

    def _offsets(self, text: str) -> list[tuple[int, int]]:
        """Return where each token of a text begins and ends."""
        encoded = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        return list(encoded["offset_mapping"])

    def _too_long(self, record: Record, length: int, room: int, first_remedy: str) -> LorakitError:
        what = f"the prompt's {length} tokens and {room} new ones" if room else f"{length} tokens"
        remedy = "give --truncate to cut the prompt, or shorten the record"
        if self.truncate:
            remedy = "there is nothing left to cut; allow more tokens or shorten the record"
        return LorakitError(
            f"{record.where}: {what} exceed the {self.limit} of the context or --max-length; "
            f"{first_remedy}{remedy}"
        )

    def _encode_prompt(self, record: Record, shots: Sequence[Record]) -> Example:
        if self.chat is None:
            text = shown_text(shots, record)
        else:
            text = self.chat.prompt(shown_turns(shots, record.conversation), record.where)
        ids = self._never_empty(self._tokens(text, record.where)[0])
        opens = self.chat is not None and text.rstrip().endswith(OPEN)
        return Example(ids, len(ids), record.where, opens_reasoning=opens)

    def _encode_both(self, record: Record) -> Example:
        """Encode prompt and completion as one string, however long, and the end token."""
        if self.chat is None:
            prompt = plain_prompt(record)
            text = prompt + record.completion
        else:
            prompt, text = self.chat.answered(record.conversation, record.completion, record.where)
        ids, token_ends = self._tokens(text, record.where)
        start = next((i for i, end in enumerate(token_ends) if end > len(prompt)), len(ids))
        answer, end = ids[start:], self.ends[0]
        if self.chat is not None:  # what the template writes after its end token is never generated
            place = next((i for i, token in enumerate(answer) if token in self.ends), None)
            if place is not None:
                answer, end = answer[:place], answer[place]
        before = self._never_empty(ids[:start])
        return Example((*before, *answer, end), len(before), record.where)

    def _never_empty(self, ids: tuple[int, ...]) -> tuple[int, ...]:
        """Return the tokens or, if there are none, the token that begins a text."""
        begin = self.tokenizer.bos_token_id
        return ids or (self.ends[0] if begin is None else begin,)

    def _tokens(self, text: str, where: str) -> tuple[tuple[int, ...], list[int]]:
        """Return the ids of a text and where in it each ends (0 for special tokens)."""
        check_encodable(text, where)
        encoded = self.tokenizer(
            text,
            add_special_tokens=self.chat is None,
            return_offsets_mapping=True,
            truncation=False,
        )
        ids, ends = tuple(encoded["input_ids"]), [end for _, end in encoded["offset_mapping"]]
        while ids and ids[-1] == self.ends[0] and ends[-1] == 0:  # added by the tokenizer itself
            ids, ends = ids[:-1], ends[:-1]
        return ids, ends


@dataclass(frozen=True)
class _Part:
    """The part of a record's prompt that `--truncate` shortens, at its start, middle or end."""

    text: str
    cut: str
    record_with: Callable[[str], Record]


def _shrinking_parts(record: Record, cut: str) -> Iterator[_Part]:
    """Yield what may be shortened: the document, then, if that does not do, all of the prompt.

    Of a conversation it is the longest user turn.
    """
    if record.turns is not None:
        yield _longest_turn(record, "middle" if cut == "auto" else cut)
        return
    head, tail = record.prompt, ""
    if cut == "auto" and record.document is not None:
        start, end = record.document
        head, tail = record.prompt[:start], record.prompt[end:]
        yield _Part(
            record.prompt[start:end],
            "end",
            lambda text: record.with_field("prompt", head + text + tail),
        )
    yield _Part(
        head + tail,
        "middle" if cut == "auto" else cut,
        lambda text: record.with_field("prompt", text),
    )


def _longest_turn(record: Record, cut: str) -> _Part:
    field = "messages" if "messages" in record.fields else "prompt"
    messages = list(record.fields[field])
    count = len(record.turns or ())
    lengths = {
        number: len(message["content"])
        for number, message in enumerate(messages[:count])
        if message["role"] == "user"
    }
    longest = max(lengths, key=lambda number: lengths[number]) if lengths else 0

    def record_with(text: str) -> Record:
        shorter = {**messages[longest], "content": text}
        return record.with_field(field, [*messages[:longest], shorter, *messages[longest + 1 :]])

    return _Part(messages[longest]["content"], cut, record_with)


def _shortened(text: str, offsets: list[tuple[int, int]], count: int, cut: str) -> str:
    """Return the text without `count` of its tokens, taken from its start, middle or end."""
    left = len(offsets) - count
    first = {"start": 0, "middle": (left + 1) // 2, "end": left}[cut]  # of those that go
    if not count:
        return text
    return text[: offsets[first][0]] + text[offsets[first + count - 1][1] :]


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
