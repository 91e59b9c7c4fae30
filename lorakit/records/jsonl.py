"""Records in files: lines of JSON, read and checked one by one, and written."""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import IO, TYPE_CHECKING

from lorakit.errors import LorakitError
from lorakit.files import input_name, reading
from lorakit.records.record import Record

if TYPE_CHECKING:  # importing it takes a third of the time that --help may take
    import jsonlines

_TEXT_FIELDS = ("prediction",)


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


def skip_written(
    records: Iterable[Mapping[str, object]], lines: Sequence[str]
) -> Iterator[Mapping[str, object]]:
    """Yield the records after those that an earlier run wrote as `lines`.

    Raises LorakitError where the records are not those that it wrote.
    """
    ours = iter(records)
    for number, line in enumerate(lines, 1):
        record = next(ours, None)
        if record is None or _dumps(dict(record)) != line.rstrip("\n"):
            raise LorakitError(
                f"record {number} is not the one that the killed run wrote; start afresh without "
                "--resume"
            )
    yield from ours


def _dumps(value: object) -> str:
    text = json.dumps(value, ensure_ascii=False)
    try:
        text.encode()
    except UnicodeEncodeError:  # half a surrogate pair: JSON can escape it, UTF-8 cannot hold it
        return json.dumps(value)
    return text
