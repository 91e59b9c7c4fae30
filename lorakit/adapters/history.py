"""The `lorakit` header of an adapter: base model, blocks and the history of how it was made.

The header is JSON in the metadata of the tensor file. Any field may be missing or null, since other
programs write adapters too, and unknown fields are preserved. Known fields must have the type that
FIELDS gives them. Every header is read and written here; its blocks are in blocks.py. To add a
field, add a line to FIELDS and to the TypedDict.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any, TypedDict, cast

from lorakit.adapters.blocks import BlockFields, check_blocks
from lorakit.errors import LorakitError
from lorakit.foreign_text import parse_json, quote

FORMAT = 1


class BaseFields(TypedDict, total=False):
    """The base model of an adapter; `local` says that its name is a folder.

    `fingerprint` is a SHA-256 of what determines the shapes of its weights; `load_in`, 4bit or
    8bit, says how they were quantised for training.
    """

    name: str
    fingerprint: str
    revision: str
    local: bool
    load_in: str


class HistoryEntry(TypedDict, total=False):
    """One of the commands that made or changed the adapter.

    `parents` maps the names of the adapters it started from to their SHA-256; `data` and `val` are
    the SHA-256 of the files of records. `best` and `evaluations` (lorahub) and `search` (a choice
    among pruning settings) record what was tried, and the test between the best and no pruning,
    `weights` (learned-weights) what was learned, by block and module.
    """

    command: str
    versions: dict[str, str]
    settings: dict[str, Any]
    parents: dict[str, str]
    data: str
    val: str
    best: dict[str, object]
    evaluations: list[dict[str, object]]
    search: dict[str, object]
    weights: dict[str, dict[str, float]]


CHAT_FIELDS = ("chat", "chat_date", "system", "chat_args")


class Header(TypedDict, total=False):
    """What lorakit records in an adapter; `chat` is `on` or `off`, the history is oldest first.

    `chat_date` is the date that the chat template was filled in with, `system` the system turn of
    conversations without one, `chat_args` what else the template was given, by name.
    """

    format: int
    base: BaseFields
    chat: str
    chat_date: str
    system: str
    chat_args: dict[str, object]
    blocks: list[BlockFields]
    history: list[HistoryEntry]


# The kind of a value: a type, a list with the kind of its items, or a dict with the kinds of its
# values by key ("*" is any other key; None allows anything).
Kind = type | list["Kind"] | dict[str, "Kind | None"]

FIELDS: dict[str, Kind | None] = {
    "format": int,
    "base": {"name": str, "fingerprint": str, "revision": str, "local": bool, "load_in": str},
    "chat": str,
    "chat_date": str,
    "system": str,
    "chat_args": {"*": None},
    "blocks": [
        {
            "name": str,
            "sha256": str,
            "zeros": float,
            "reset": float,
            "modules": {"*": {"offset": int, "rank": int, "scale": float}},
        }
    ],
    "history": [
        {
            "command": str,
            "versions": {"*": str},
            "settings": {"*": None},
            "parents": {"*": str},
            "data": str,
            "val": str,
        }
    ],
}

_WORDS: Mapping[type, str] = {
    bool: "true or false",
    int: "an integer",
    float: "a number",
    str: "a text",
    list: "a list",
    dict: "an object",
}


def parse_header(text: str, ranks: Mapping[str, int], name: str) -> Header:
    """Return the header in `text`; `ranks` holds the rank of each of the adapter's modules.

    Raises LorakitError for what is not JSON, has a field of the wrong type, was written by a later
    lorakit, or names a block outside the adapter.
    """
    where = f"{name}: its lorakit header"
    try:
        value: object = parse_json(text)
        json.dumps(value, allow_nan=False)
    except ValueError as error:
        raise LorakitError(f"{where} is not JSON ({error}); take a new copy") from None
    _check(value, FIELDS, where)
    header = cast("Header", value or {})
    if (header.get("format") or FORMAT) > FORMAT:
        raise LorakitError(f"{where} has format {header['format']}; update lorakit to read it")
    check_blocks(header.get("blocks"), ranks, where)
    return header


def _check(value: object, kind: Kind | None, where: str) -> None:
    """Raise LorakitError if `value`, or a value in it, is neither null nor of the right kind."""
    if value is None or kind is None:
        return
    outer = kind if isinstance(kind, type) else type(kind)
    allowed = (int, float) if outer is float else (outer,)
    if not isinstance(value, allowed) or (isinstance(value, bool) and outer is not bool):
        raise LorakitError(f"{where} is not {_WORDS[outer]}; take a new copy of the adapter")
    if outer is float and isinstance(value, int | float) and abs(value) > sys.float_info.max:
        raise LorakitError(f"{where} is too large a number; take a new copy of the adapter")
    if isinstance(kind, list) and isinstance(value, list):
        for index, item in enumerate(value):
            _check(item, kind[0], f"{where}[{index}]")
    if isinstance(kind, dict) and isinstance(value, dict):
        for key, item in value.items():
            _check(item, kind.get(key, kind.get("*")), f"{where}.{quote(key)[1:-1]}")


def header_text(header: Header) -> str:
    """Return the header as JSON with sorted keys, so that equal headers give equal texts."""
    return json.dumps(header, sort_keys=True, separators=(",", ":"), allow_nan=False)


def new_entry(
    command: str,
    *,
    versions: Mapping[str, str],
    settings: Mapping[str, object],
    parents: Mapping[str, str] | None = None,
    hashes: Mapping[str, str] | None = None,
) -> HistoryEntry:
    """Return the history entry of a command.

    `hashes` maps `data` and `val` to the SHA-256 of those files of records.
    """
    entry: HistoryEntry = {
        "command": command,
        "versions": dict(versions),
        "settings": dict(settings),
    }
    if parents is not None:
        entry["parents"] = dict(parents)
    if hashes is not None:
        entry.update(cast("HistoryEntry", hashes))
    return entry


def new_header(
    entry: HistoryEntry,
    *,
    parents: Iterable[Header] = (),
    base: Mapping[str, object] | None = None,
    chat: Mapping[str, object] | None = None,
    blocks: Sequence[BlockFields] = (),
) -> Header:
    """Return the header of a new adapter.

    Its history is that of its parents, each entry once, and then `entry`. `chat` holds the fields
    of CHAT_FIELDS, as far as they are known.
    """
    header: Header = {"format": FORMAT, "history": [*_joined_history(parents), entry]}
    if base is not None:
        header["base"] = cast("BaseFields", base)
    if chat is not None:
        header.update(cast("Header", chat))
    if blocks:
        header["blocks"] = list(blocks)
    return header


def _joined_history(headers: Iterable[Header]) -> list[HistoryEntry]:
    """Return the entries of several headers' histories in order, without repetitions."""
    joined: list[HistoryEntry] = []
    for header in headers:
        joined += [entry for entry in header.get("history") or [] if entry not in joined]
    return joined


def weight_line(weights: Mapping[str, Mapping[str, float]]) -> str:
    """Return a line about the weights of blocks by module: their means, and from where to where.

    weights: xs 0.52 (0.31 to 0.77), wl 0.4
    """
    return "weights: " + ", ".join(_weights(name, weights[name].values()) for name in weights)


def _weights(name: str, weights: Collection[float]) -> str:
    mean = f"{name} {sum(weights) / max(1, len(weights)):.3g}"
    if len(weights) < 2:
        return mean
    return f"{mean} ({min(weights):.3g} to {max(weights):.3g})"


def learned_weights(entry: HistoryEntry) -> dict[str, dict[str, float]]:
    """Return the weights of a history entry, {} where there are none that are numbers by module."""
    weights = entry.get("weights")
    if not isinstance(weights, dict) or not all(isinstance(w, dict) for w in weights.values()):
        return {}
    numbers = [value for by_module in weights.values() for value in by_module.values()]
    return weights if all(isinstance(value, int | float) for value in numbers) else {}


def with_entry(header: Header, entry: HistoryEntry) -> Header:
    """Return the header with `entry` appended to its history."""
    history = [*(header.get("history") or []), entry]
    return cast("Header", {"format": FORMAT, **header, "history": history})


def with_parents(header: Header, parents: Mapping[str, str]) -> Header:
    """Return the header with other parents in the last entry of its history."""
    *earlier, last = header["history"]
    changed: HistoryEntry = {**last, "parents": dict(parents)}
    return {**header, "history": [*earlier, changed]}


def base_fields(header: Header) -> BaseFields:
    """Return what the header says about the base model, {} if nothing."""
    return header.get("base") or {}
