"""Text that other programs wrote: JSON parsed strictly, and names made safe to print."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lorakit.errors import LorakitError

if TYPE_CHECKING:
    from typing import Any

_LONGEST_NAME = 120  # characters of a name quoted in a message
_WIDE_SPACE = "\u3000"  # ordinary in Japanese and Chinese


def quote(name: str) -> str:
    """Return a name from a file in quotes, shortened and escaped so that it is safe to print."""
    short = name if len(name) <= _LONGEST_NAME else name[: _LONGEST_NAME - 1] + "…"
    return f"'{printable(short)}'"


def printable(text: str) -> str:
    """Return a text with every character escaped that could control the terminal."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def printable_lines(text: str) -> str:
    """Return a text of several lines with only its line breaks and wide spaces left as they are."""
    lines = text.replace("\r\n", "\n").expandtabs(4).split("\n")
    return "\n".join(_WIDE_SPACE.join(map(printable, line.split(_WIDE_SPACE))) for line in lines)


def check_encodable(text: str, where: str) -> None:
    """Raise LorakitError for a text with half a surrogate pair, which is no character."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        half = f"\\u{ord(text[error.start]):04x}"
        raise LorakitError(
            f"{where}: holds {half}, half a surrogate pair, which no tokenizer reads; remove it"
        ) from None


def parse_json(text: str) -> Any:
    """Parse JSON strictly.

    Also raises ValueError for a key that occurs twice, for nesting that is too deep and for text
    that UTF-8 cannot encode (half a surrogate pair), which could not be written again.
    """
    import json  # only here: `--help` prints names, and parses nothing

    try:
        value = json.loads(text, object_pairs_hook=_object_of_unique_keys)
        json.dumps(value, ensure_ascii=False).encode()
        return value
    except RecursionError:
        raise ValueError("nested too deeply") from None


def _object_of_unique_keys(pairs: list[tuple[str, object]]) -> dict[str, object]:
    fields: dict[str, object] = {}
    for key, value in pairs:
        if key in fields:
            raise ValueError(f"{quote(key)} stands in it twice")
        fields[key] = value
    return fields
