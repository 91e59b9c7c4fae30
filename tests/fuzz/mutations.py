"""How sound inputs become hostile ones: bytes, JSON values and texts, changed a few times each."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from typing import Any

from hypothesis import strategies as st

# Stand for what json.dumps would not write.
_HUGE, _TWICE = "@HUGE@", "@TWICE@"
NUMBERS: tuple[object, ...] = (
    *(0, -1, 1, 2**31, -(2**31), 2**63, -(2**63), 2**64, 10**400, 1e308, -1e308, 1e-320, 0.1),
    *(float("nan"), float("inf"), -float("inf"), True, False),
)
TEXTS: tuple[str, ...] = (
    *("", " ", "\0", "\n", "\r\n", "\x1b[31m", "\x85", "\u2028", "\ufeff", "\ud800", "\udfff"),
    *("a" * 3000, "猫" * 300, "٣", "-1", "1e999", "nan", "../../../etc/passwd", "%s{}{0}{{id}}"),
    *("{{prompt}}", "[Yes]", "(?i)(", "[", "a|b", ".*", "<s>", "</s>", "e\u0301", "\U0001f600"),
)
VALUES: tuple[object, ...] = (
    *NUMBERS,
    *TEXTS,
    *(None, [], {}, [[]], [None], [""], [0], {"": None}, {"a": {"b": []}}, [1, "a", None, {}]),
    *(_HUGE, [[[[[[[[[[]]]]]]]]]], ["q_proj"], [0, 0], [-1], {"q_proj": 2}),
)


def json_text(value: object) -> str:
    """Return a mutated value as JSON text, with numbers of 5,000 digits and keys that repeat."""
    text = json.dumps(value)
    return text.replace(f'"{_HUGE}"', "9" * 5000).replace(f'"{_TWICE}"', '"a": 1, "a"')


def _places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Return the path of every value inside a JSON value."""
    places = [path]
    items: Any = ()
    if isinstance(value, dict):
        items = value.items()
    elif isinstance(value, list):
        items = enumerate(value[:20])
    for key, inner in items:
        places += _places(inner, (*path, key))
    return places


def _changed(draw: st.DrawFn, value: Any) -> Any:
    """Return a copy of a JSON value with one change somewhere in it."""
    value = copy.deepcopy(value)
    path = draw(st.sampled_from(_places(value)))
    if not path:
        return draw(st.sampled_from(VALUES)) if draw(st.integers(0, 9)) == 0 else value
    inside = value
    for key in path[:-1]:
        inside = inside[key]
    kind = draw(st.sampled_from(("replace", "replace", "replace", "delete", "rename", "wrap")))
    if kind == "replace":
        inside[path[-1]] = copy.deepcopy(draw(st.sampled_from(VALUES)))
    elif kind == "wrap":
        inside[path[-1]] = [inside[path[-1]]]
    elif kind == "delete" or isinstance(inside, list):
        del inside[path[-1]]
    else:
        inside[draw(st.sampled_from((*TEXTS, _TWICE)))] = inside.pop(path[-1])
    return value


@st.composite
def mutated_json(draw: st.DrawFn, value: Any) -> Any:
    """Return a JSON value with one to three changes."""
    for _ in range(draw(st.integers(1, 3))):
        value = _changed(draw, value)
    return value


@st.composite
def mutated_bytes(draw: st.DrawFn, content: bytes) -> bytes:
    """Return bytes with one to four of them flipped, inserted, doubled or cut."""
    for _ in range(draw(st.integers(1, 4))):
        place = draw(st.integers(0, len(content)))
        length = draw(st.sampled_from((1, 1, 1, 2, 8, 100)))
        inserted = draw(st.sampled_from(_INSERTED) | st.binary(min_size=1, max_size=8))
        change: Callable[[bytes, int, int, bytes], bytes] = draw(st.sampled_from(_CHANGES))
        content = change(content, place, length, inserted)
    return content


_INSERTED = tuple(
    text.encode("utf-8", "surrogatepass")
    for text in (*TEXTS, '"', "{", "}", "[", ",", "\t", "<", "&", "]]>", "\\", "$", "%", "#")
)
_CHANGES: tuple[Callable[[bytes, int, int, bytes], bytes], ...] = (
    lambda data, at, length, new: data[:at] + new + data[at:],
    lambda data, at, length, new: data[:at] + new + data[at + len(new) :],
    lambda data, at, length, new: data[:at] + data[at + length :],
    lambda data, at, length, new: data[:at] + data[at : at + length] * 2 + data[at + length :],
    lambda data, at, length, new: data[:at],
    lambda data, at, length, new: (
        data[:at] + bytes(b ^ 255 for b in data[at : at + 1]) + data[at + 1 :]
    ),
)


@st.composite
def mutated_rows(draw: st.DrawFn, rows: list[Any]) -> bytes:
    """Return rows as lines of JSON, one of which is changed, then perhaps the bytes as well."""
    rows = list(rows)
    place = draw(st.integers(0, len(rows) - 1))
    rows[place] = draw(mutated_json(rows[place]))
    content = "".join(f"{json_text(row)}\n" for row in rows).encode()
    return draw(mutated_bytes(content)) if draw(st.integers(0, 4)) == 0 else content
