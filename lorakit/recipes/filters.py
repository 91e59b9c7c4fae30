"""Filters over finished records: their length in words, duplicates, overlap with other files.

A word is a run of characters between spaces, but each Chinese or Japanese character counts alone:
the same number on every machine, without a segmenter. Prompts are compared by a 64-bit hash of
their text, spaces folded, so that a file of millions takes some sixty bytes of memory a record.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from typing import Any

from lorakit.recipes.request import Request, Tally
from lorakit.records import read_records

CJK = "\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\uff66-\uff9f"
_WORD = rf"[{CJK}]|[^\s{CJK}]+"
_LATIN = "A-Za-z0-9\u00c0-\u024f"
_KANA = "[\u3041-\u3096\u30a1-\u30fa]"

Fields = dict[str, Any]


def count_words(text: str) -> int:
    """Return the number of words of a text; a Chinese or Japanese character is one."""
    if text.isascii():
        return len(text.split())
    return len(re.findall(_WORD, text))


def is_japanese(text: str) -> bool:
    """Return whether a text has kana, which no other language writes."""
    return re.search(_KANA, text) is not None


def unspaced(text: str) -> str:
    """Return a text of separated words as it is written: spaces stay between Latin words alone."""
    return re.sub(rf"(?<![{_LATIN}])\s+|\s+(?![{_LATIN}])", "", text.strip())


def filtered(records: Iterable[Fields], request: Request, tally: Tally) -> Iterator[Fields]:
    """Yield the records that the request's limits keep; the others are counted."""
    least, most = request.min_words, request.max_words
    dropped = {path: prompts_of(path) for path in request.drop_overlap}
    for record in records:
        reason = _too_long_or_short(record, least, most) or _overlap(record, dropped)
        if reason:
            tally.remove(reason)
        else:
            yield record


def _too_long_or_short(record: Fields, least: int | None, most: int | None) -> str:
    if least is None and most is None:
        return ""
    count = count_words(record["prompt"])
    if least is not None and count < least:
        return f"a prompt of fewer than {least} words"
    return f"a prompt of more than {most} words" if most is not None and count > most else ""


def _overlap(record: Fields, others: dict[str, set[int]]) -> str:
    for path, prompts in others.items():
        if _key(record["prompt"]) in prompts:
            return f"a prompt that stands in {path}"
    return ""


def noticed(records: Iterable[Fields], request: Request, tally: Tally) -> Iterator[Fields]:
    """Yield the records as they are and count those that repeat a prompt or overlap a file."""
    seen: set[int] = set()
    others = {path: prompts_of(path) for path in request.overlap}
    for record in records:
        key = _key(record["prompt"])
        if key in seen:
            tally.noticed["prompts that an earlier record has"] += 1
        seen.add(key)
        for path, prompts in others.items():
            if key in prompts:
                tally.noticed[f"prompts that stand in {path}"] += 1
        yield record


def prompts_of(path: str) -> set[int]:
    """Return the hashes of the prompts of a file of records."""
    return {_key(record.prompt) for record in read_records(path, "prompt")}


def _key(prompt: str) -> int:
    import hashlib

    folded = " ".join(prompt.split()).encode("utf-8", "surrogatepass")
    return int.from_bytes(hashlib.blake2b(folded, digest_size=8).digest(), "big")
