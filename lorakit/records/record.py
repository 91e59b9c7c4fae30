"""A record: one line of JSON of those that every command reads and writes.

A record is one JSON object with `id`, `prompt`, `completion`, optionally `references`, and any
other fields; those that this file does not know pass through untouched and in order. In place of
the two texts it may hold a conversation: `messages`, or `prompt` and `completion` as lists of turns
(TRL's form). It knows nothing of tokens or models.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any  # of what a user's record holds

from lorakit.errors import LorakitError

ROLES = ("system", "user", "assistant")


@dataclass(frozen=True)
class Turn:
    """One message of a conversation; `role` is one of ROLES."""

    role: str
    content: str


@dataclass(frozen=True)
class Record:
    """One JSON object and the place it was read from (`file:line`), which error messages name."""

    fields: Mapping[str, Any]
    where: str

    @property
    def id(self) -> str:
        return str(self.fields["id"]) if "id" in self.fields else self.where

    @property
    def prompt(self) -> str:
        """The prompt as a text; of a conversation its turns, a lone user turn without its role."""
        turns = self.turns
        if turns is None:
            return self.text("prompt")
        if [turn.role for turn in turns] == ["user"]:
            return turns[0].content
        return "\n".join(f"{turn.role}: {turn.content}" for turn in turns)

    @property
    def completion(self) -> str:
        """The completion; of a conversation its last turn, which is the assistant's."""
        answer = self._answer
        return self.text("completion") if answer is None else answer

    @property
    def has_completion(self) -> bool:
        """Whether there is an answer to learn: a completion, or a last turn of the assistant."""
        if "messages" in self.fields:
            return self._turns("messages")[-1].role == "assistant"
        return "completion" in self.fields

    @property
    def turns(self) -> tuple[Turn, ...] | None:
        """The turns before the completion, or None where the record is no conversation."""
        if "messages" in self.fields:
            turns = self._turns("messages")
            return turns[:-1] if turns[-1].role == "assistant" else turns
        return self._turns("prompt") if isinstance(self.fields.get("prompt"), list) else None

    @property
    def conversation(self) -> tuple[Turn, ...]:
        """The turns before the completion; a prompt that is a text is one turn of the user."""
        turns = self.turns
        return (Turn("user", self.prompt),) if turns is None else turns

    @property
    def _answer(self) -> str | None:
        """The content of the turn that is to be learnt, or None where there is none."""
        if "messages" in self.fields:
            *_, last = self._turns("messages")
            if last.role != "assistant":
                raise LorakitError(
                    f"{self.where}: 'messages' ends in a {last.role} turn; the last one has to be "
                    "the assistant's, which is learnt or compared with"
                )
            return last.content
        if isinstance(self.fields.get("completion"), list):
            turns = self._turns("completion")
            if [turn.role for turn in turns] != ["assistant"]:
                raise LorakitError(
                    f"{self.where}: 'completion' is not one assistant turn; put earlier turns into "
                    "'prompt'"
                )
            return turns[0].content
        return None

    def _turns(self, field: str) -> tuple[Turn, ...]:
        """Return the turns that a field lists; LorakitError where it is not such a list."""
        value = self.fields[field]
        if not isinstance(value, list) or not value:
            raise self._malformed(field, "is not a list of turns")
        turns = []
        for number, message in enumerate(value, 1):
            role = message.get("role") if isinstance(message, dict) else None
            content = message.get("content") if isinstance(message, dict) else None
            if role not in ROLES:
                raise self._malformed(field, f"has no role {', '.join(ROLES)} in turn {number}")
            if not isinstance(content, str):
                raise self._malformed(field, f"has no text as the content of turn {number}")
            turns.append(Turn(role, content))
        return tuple(turns)

    def _malformed(self, field: str, what: str) -> LorakitError:
        example = '[{"role": "user", "content": "…"}, {"role": "assistant", "content": "…"}]'
        return LorakitError(f"{self.where}: {field!r} {what}; write it as {example}")

    @property
    def prediction(self) -> str:
        return self.text("prediction")

    @property
    def has_references(self) -> bool:
        """Whether there is any text to compare a prediction with."""
        return self.fields.get("references") is not None or self.has_completion

    @property
    def references(self) -> list[str]:
        """The texts a prediction is compared with: `references`, else the completion alone."""
        references = self.fields.get("references")
        return [self.completion] if references is None else list(references)

    @property
    def document(self) -> tuple[int, int] | None:
        """Where in the prompt the part lies that may be shortened, in characters; or None."""
        span = self.fields.get("document")
        if "prompt" not in self.fields or not isinstance(self.fields["prompt"], str):
            return None
        return _span(span, len(self.fields["prompt"]))

    def require(self, name: str) -> None:
        """Raise LorakitError where the record has no `prompt`, `completion` or `prediction`."""
        if name == "prompt":
            _ = self.prompt
        elif name == "completion":
            _ = self.completion
        else:
            self.text(name)

    def text(self, name: str) -> str:
        """Return the text of field `name`; LorakitError if the record does not have it."""
        if name not in self.fields:
            raise LorakitError(f"{self.where}: the record has no {name!r}; {_REMEDIES[name]}")
        return str(self.fields[name])

    def with_field(self, name: str, value: object) -> Record:
        """Return the record with one field added or replaced."""
        return Record({**self.fields, name: value}, self.where)


def _span(value: object, length: int) -> tuple[int, int] | None:
    """Return `[start, end]` where it lies in a text of this length, else None: another's field."""
    if not isinstance(value, list) or len(value) != 2:
        return None
    start, end = value
    if not (type(start) is int and type(end) is int and 0 <= start <= end <= length):
        return None
    return start, end


_REMEDIES = {
    "prompt": "every record needs the text the model is to go on from",
    "completion": "give the text the model should have written",
    "prediction": "run `lorakit generate` on it first",
}
