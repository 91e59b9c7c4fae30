"""Filters over finished records: their length in words, duplicates, overlap with other files.

A word is a run of characters between spaces, but each Chinese or Japanese character counts as one:
the same number on every machine, without a segmenter. Prompts are compared by a 64-bit hash of
their text, spaces folded, so that a file of millions takes about sixty bytes of memory a record.
This file knows nothing of where the records come from.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping

from lorakit.recipes.request import Request, Tally
from lorakit.records.jsonl import read_records
from lorakit.records.record import Record

_CJK = "\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\uff66-\uff9f"
_WORD = rf"[{_CJK}]|[^\s{_CJK}]+"
_LATIN = "A-Za-z0-9\u00c0-\u024f"
_KANA = "[\u3041-\u3096\u30a1-\u30fa]"


def count_words(text: str) -> int:
    """Return the number of words in a text; a Chinese or Japanese character counts as one."""
    if text.isascii():
        return len(text.split())
    return len(re.findall(_WORD, text))


def is_japanese(text: str) -> bool:
    """Return whether a text contains kana, which no other language uses."""
    return re.search(_KANA, text) is not None


def unspaced(text: str) -> str:
    """Return a segmented text as it is normally written, with spaces only between Latin words."""
    return re.sub(rf"(?<![{_LATIN}])\s+|\s+(?![{_LATIN}])", "", text.strip())


def filtered(records: Iterable[Record], request: Request, tally: Tally) -> Iterator[Record]:
    """Yield the records within the request's limits; count the others by the reason for removal."""
    hashes = {path: prompt_hashes(path) for path in request.drop_overlap}
    for record in records:
        prompt = prompt_text(record)
        reason = _length_reason(prompt, request) or _overlap_reason(prompt, hashes)
        if reason:
            tally.remove(reason)
        else:
            yield record


def _length_reason(prompt: str, request: Request) -> str:
    """Return why a prompt's length removes its record; empty if it does not."""
    least, most = request.min_words, request.max_words
    if least is None and most is None:
        return ""
    count = count_words(prompt)
    if least is not None and count < least:
        return f"a prompt of fewer than {least} words"
    return f"a prompt of more than {most} words" if most is not None and count > most else ""


def _overlap_reason(prompt: str, hashes: Mapping[str, set[int]]) -> str:
    """Return why a prompt removes its record: one of the files has it; empty if none does."""
    for path, hashes_in_file in hashes.items():
        if _hash(prompt) in hashes_in_file:
            return f"a prompt that stands in {path}"
    return ""


def counting_overlaps(
    records: Iterable[Record], request: Request, tally: Tally
) -> Iterator[Record]:
    """Yield the records unchanged, counting those that repeat a prompt or overlap with a file."""
    earlier: set[int] = set()
    hashes = {path: prompt_hashes(path) for path in request.overlap}
    for record in records:
        key = _hash(prompt_text(record))
        if key in earlier:
            tally.noticed["prompts that an earlier record has"] += 1
        earlier.add(key)
        for path, hashes_in_file in hashes.items():
            if key in hashes_in_file:
                tally.noticed[f"prompts that stand in {path}"] += 1
        yield record


def prompt_hashes(path: str) -> set[int]:
    """Return the hashes of all prompts in a file of records."""
    return {_hash(prompt_text(record)) for record in read_records(path)}


def prompt_text(record: Record) -> str:
    """Return a record's prompt or, of a conversation, its turns before the last, a line each."""
    turns = record.fields.get("messages")
    if "prompt" in record.fields or not isinstance(turns, list):
        return record.prompt
    return "\n".join(str(turn.get("content")) for turn in turns[:-1] if isinstance(turn, dict))


def _hash(prompt: str) -> int:
    import hashlib

    folded = " ".join(prompt.split()).encode("utf-8", "surrogatepass")
    return int.from_bytes(hashlib.blake2b(folded, digest_size=8).digest(), "big")
