"""Examples before a prompt: records whose answers show a model what is wanted.

Which records they are is decided here; how a model reads them is the business of models/tokens.py
and, for servers, of judging/served.py.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Sequence
from dataclasses import dataclass

from lorakit.errors import LorakitError
from lorakit.records.jsonl import load_records
from lorakit.records.record import Record, Turn

SEPARATOR = "\n\n"  # between examples that are texts


@dataclass(frozen=True)
class FewShot:
    """Records to show, in the order in which they are preferred, and how many (None: all).

    `sha256` is that of the file they come from.
    """

    examples: tuple[Record, ...] = ()
    shots: int | None = None
    sha256: str | None = None

    def before(self, record: Record) -> tuple[Record, ...]:
        """Return what is shown before a record: never itself, nor one with its id or prompt."""
        if not self.examples:
            return ()
        name, prompt = record.id, record.prompt
        others = (e for e in self.examples if e.id != name and e.prompt != prompt)
        return tuple(itertools.islice(others, self.shots))


NO_EXAMPLES = FewShot()


def load_few_shot(path: str | None, shots: int | None, seed: int) -> FewShot:
    """Return the examples in a file; without one none.

    Where `shots` are fewer than its records, which ones is drawn from the seed. Raises LorakitError
    naming file and line for a record without a prompt or a completion.
    """
    if path is None:
        return NO_EXAMPLES
    records, digest = load_records(path, "prompt", "completion")
    if shots is not None and shots < len(records):
        records = random.Random(seed).sample(records, len(records))
    return FewShot(tuple(records), shots, digest)


def shown_text(examples: Sequence[Record], record: Record) -> str:
    """Return the prompt of a record as a text, after the examples with their completions.

    Raises LorakitError for a conversation, which is no text without a chat template.
    """
    shown = [plain_prompt(example) + example.completion for example in examples]
    return SEPARATOR.join([*shown, plain_prompt(record)])


def plain_prompt(record: Record) -> str:
    """Return the prompt of a record for a model without a chat template."""
    if record.turns is not None:
        raise LorakitError(
            f"{record.where}: a conversation needs a chat template, and none is applied; take an "
            "instruct model and leave --chat off out, or write prompt and completion as texts"
        )
    return record.prompt


def shown_turns(examples: Sequence[Record], turns: Sequence[Turn]) -> tuple[Turn, ...]:
    """Return a conversation with examples as its earlier turns, after its system turn.

    The system turns of the examples themselves are left out.
    """
    if not examples:
        return tuple(turns)
    shown = [
        turn
        for example in examples
        for turn in (*example.conversation, Turn("assistant", example.completion.strip()))
        if turn.role != "system"
    ]
    system = [turn for turn in turns if turn.role == "system"]
    return (*system, *shown, *(turn for turn in turns if turn.role != "system"))
