"""Records: the lines of JSON that every command reads and writes.

A record is one JSON object with `id`, `prompt`, `completion`, optionally `references`, and any
other fields; those that this file does not know pass through untouched and in order. In place of
the two texts it may hold a conversation: `messages`, or `prompt` and `completion` as lists of turns
(TRL's form). It knows nothing of tokens or models.
"""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import IO, TYPE_CHECKING, Any

from lorakit.errors import LorakitError
from lorakit.files import input_name, reading

if TYPE_CHECKING:  # importing it takes a third of the time that --help may take
    import jsonlines

_TEXT_FIELDS = ("prediction",)
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


def read_records(path: str, *needed: str) -> Iterator[Record]:
    """Yield the records of a JSONL file (`-`: stdin), each checked to have the fields `needed`.

    Raises LorakitError naming file and line if a line is not JSON, is not an object, or has a field
    of the wrong type. Empty lines are skipped, as other JSONL readers do.
    """
    return _checked(_read(path), needed)


def read_objects(path: str) -> Iterator[Record]:
    """Yield the JSON objects of a JSONL file without checking their fields."""
    return _read(path)


def _read(path: str, on_line: Callable[[bytes], object] | None = None) -> Iterator[Record]:
    """Yield the objects of a file, passing every line of bytes to `on_line` first."""
    name = input_name(path)
    with reading(path) as stream:
        for number, line in enumerate(stream, 1):
            if on_line is not None:
                on_line(line)
            if line.strip():
                yield Record(parse_object(line, f"{name}:{number}"), f"{name}:{number}")


def _checked(records: Iterable[Record], needed: Sequence[str]) -> Iterator[Record]:
    """Yield the records; LorakitError at one that lacks a field or has one of the wrong type."""
    for record in records:
        _check(record)
        for field in needed:
            record.require(field)
        yield record


def load_records(path: str, *needed: str) -> tuple[list[Record], str]:
    """Return all records of a file and the SHA-256 of its bytes.

    Raises LorakitError as `read_records` does, and if the file holds no records.
    """
    import hashlib

    digest = hashlib.sha256()
    records = list(_checked(_read(path, digest.update), needed))
    if not records:
        raise LorakitError(f"{input_name(path)} holds no records; check what wrote it")
    return records, digest.hexdigest()


def parse_object(line: bytes, where: str) -> dict[str, object]:
    """Return the JSON object on a line; LorakitError naming `where` if it holds anything else."""
    import jsonlines

    try:
        reader = jsonlines.Reader([line.decode("utf-8-sig")], loads=_loads)
        return dict(reader.read(type=dict))
    except (jsonlines.InvalidLineError, UnicodeDecodeError) as error:
        raise LorakitError(f"{where}: {_reason(error)}; each line must be one record") from None


def _reason(error: jsonlines.InvalidLineError | UnicodeDecodeError) -> str:
    """Return why a line could not be parsed."""
    if isinstance(error, UnicodeDecodeError):
        return f"not UTF-8 text (byte {error.start + 1})"
    cause = error.__cause__
    if isinstance(cause, json.JSONDecodeError):
        return f"not JSON ({cause.msg} at column {cause.colno})"
    return f"not JSON ({cause})" if isinstance(cause, ValueError) else "not a JSON object"


def _loads(text: str | bytes) -> object:
    """Parse JSON by its standard; ValueError also where Python is laxer or gives up."""
    try:
        return json.loads(text, parse_constant=_refuse_constant, parse_float=_finite_number)
    except json.JSONDecodeError:
        raise
    except RecursionError:
        raise ValueError("nested too deeply") from None
    except ValueError as error:  # Python refuses to convert whole numbers of thousands of digits
        long = "digits" in str(error)
        raise ValueError("a number with too many digits" if long else str(error)) from None


def parse_json(text: str, start: int) -> tuple[object, int, str]:
    """Return the JSON value at `start`, where it ends, and an empty text.

    Where there is no value, return None, `start` and the reason instead.
    """
    try:
        value, end = _decoder().raw_decode(text, start)
    except json.JSONDecodeError as error:
        return None, start, f"not JSON ({error.msg})"
    except RecursionError:
        return None, start, "not JSON (nested too deeply)"
    except ValueError as error:
        return None, start, f"not JSON ({error})"
    return value, end, ""


@functools.cache
def _decoder() -> json.JSONDecoder:
    return json.JSONDecoder(parse_constant=_refuse_constant, parse_float=_finite_number)


def _refuse_constant(name: str) -> None:
    """Refuse NaN and Infinity, which Python would accept."""
    raise ValueError(f"{name} is no JSON value")


def _finite_number(text: str) -> float:
    """Parse a number with a fraction or exponent; ValueError for one that overflows."""
    number = float(text)
    if number in (math.inf, -math.inf):
        raise ValueError(f"{text} is too large a number")
    return number


def _check(record: Record) -> None:
    """Raise LorakitError if a field that lorakit reads has the wrong type."""
    for name in _TEXT_FIELDS:
        if name in record.fields and not isinstance(record.fields[name], str):
            raise LorakitError(f"{record.where}: {name!r} is not a text; write it as a JSON string")
    for name in ("prompt", "completion"):
        if not isinstance(record.fields.get(name, ""), str | list):
            raise LorakitError(f"{record.where}: {name!r} is not a text; write it as a JSON string")
    references = record.fields.get("references")
    if references is None:
        return
    is_list = isinstance(references, list) and bool(references)
    if not (is_list and all(isinstance(text, str) for text in references)):
        raise LorakitError(
            f"{record.where}: 'references' is not a list of texts; "
            "write it as a JSON array of one or more strings"
        )


def write_records(records: Iterable[Mapping[str, object]], stream: IO[str]) -> int:
    """Write records to a text stream, flushing after each line; return how many there were."""
    import jsonlines

    count = 0
    with jsonlines.Writer(stream, dumps=_dumps, flush=True) as writer:
        for fields in records:
            writer.write(dict(fields))
            count += 1
    return count


def _dumps(value: object) -> str:
    text = json.dumps(value, ensure_ascii=False)
    try:
        text.encode()
    except UnicodeEncodeError:  # half a surrogate pair: JSON can escape it, UTF-8 cannot hold it
        return json.dumps(value)
    return text
