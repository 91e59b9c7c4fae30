"""The `lorakit` header of an adapter: its blocks, its base model and how it came about.

It is JSON beside the tensors. Everything in it may be missing, as it is in adapters that other
programs wrote; what is there must have the type FIELDS gives it. A new field is one line there.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from typing import Any

from lorakit.adapters.foreign import quote
from lorakit.adapters.tensors import parse_json
from lorakit.errors import LorakitError

FORMAT = 1

_SLICE = {"offset": int, "rank": int, "scale": float}
FIELDS: Mapping[str, Any] = {
    "format": int,
    "base": {"name": str, "fingerprint": str, "revision": str, "local": bool},
    "chat": str,
    "chat_date": str,
    "blocks": [{"name": str, "sha256": str, "zeros": float, "modules": {"*": _SLICE}}],
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

_WORDS = {
    bool: "true or false",
    int: "an integer",
    float: "a number",
    str: "a text",
    list: "a list",
    dict: "an object",
}


def parse_header(text: str, ranks: Mapping[str, int], name: str) -> dict[str, Any]:
    """Return the header in `text`; `ranks` holds the rank of each of the adapter's modules.

    Raises LorakitError for what is not JSON, has a field of the wrong type, was written by a later
    lorakit, or names a block outside the adapter.
    """
    where = f"{name}: its lorakit header"
    try:
        header = parse_json(text)
        json.dumps(header, allow_nan=False)
    except ValueError as error:
        raise LorakitError(f"{where} is not JSON ({error}); take a new copy") from None
    _check(header, FIELDS, where)
    if (header.get("format") or FORMAT) > FORMAT:
        raise LorakitError(f"{where} has format {header['format']}; update lorakit to read it")
    _check_blocks(header.get("blocks") or [], ranks, where)
    checked: dict[str, Any] = header
    return checked


def header_text(header: Mapping[str, Any]) -> str:
    """Return the header as it is written: keys sorted, so that equal headers are equal texts."""
    return json.dumps(header, sort_keys=True, separators=(",", ":"))


def joined_history(headers: Iterable[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Return the entries of several headers' histories in order, each once."""
    joined: list[Mapping[str, Any]] = []
    for header in headers:
        joined += [entry for entry in header.get("history") or [] if entry not in joined]
    return joined


def _check(value: object, wanted: Any, where: str) -> None:
    """Check `value` against a type, a one-element list or an object of them ("*": any key)."""
    if value is None or wanted is None:
        return
    kind = wanted if isinstance(wanted, type) else type(wanted)
    kinds = (int, float) if kind is float else (kind,)
    if not isinstance(value, kinds) or (isinstance(value, bool) and kind is not bool):
        raise LorakitError(f"{where} is not {_WORDS[kind]}; take a new copy of the adapter")
    if isinstance(wanted, list) and isinstance(value, list):
        for index, item in enumerate(value):
            _check(item, wanted[0], f"{where}[{index}]")
    if isinstance(wanted, dict) and isinstance(value, dict):
        for key, item in value.items():
            _check(item, wanted.get(key, wanted.get("*")), f"{where}.{quote(key)[1:-1]}")


def _check_blocks(blocks: list[Any], ranks: Mapping[str, int], where: str) -> None:
    names = [block.get("name") for block in blocks if block]
    if twice := sorted({str(n) for n in names if n is not None and names.count(n) > 1}):
        raise LorakitError(f"{where} names two blocks {quote(twice[0])}; take a new copy")
    for block in blocks:
        for module, part in ((block or {}).get("modules") or {}).items():
            _check_slice(part or {}, ranks.get(module), f"{where}: block {quote(module)}")


def _check_slice(part: Mapping[str, Any], rank: int | None, where: str) -> None:
    first, length = part.get("offset") or 0, part.get("rank") or 0
    if rank is None or first < 0 or length < 0 or first + length > rank:
        raise LorakitError(f"{where} is outside the adapter; take a new copy of the adapter")
