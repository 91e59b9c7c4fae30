"""Pairs of texts: WMT's translations, and any two files with corresponding lines."""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from lorakit.errors import LorakitError
from lorakit.recipes.readers.rows import converted, first_character, id_of, lines_in, until_damage
from lorakit.recipes.readers.sources import Part, parts
from lorakit.recipes.readers.xmltrees import elements, text_in
from lorakit.recipes.request import Request, Tally, UnwantedError
from lorakit.records.record import Record

if TYPE_CHECKING:
    from xml.etree.ElementTree import Element

_LANGUAGES = {
    "cs": "Czech",
    "de": "German",
    "en": "English",
    "es": "Spanish",
    "fr": "French",
    "he": "Hebrew",
    "hi": "Hindi",
    "is": "Icelandic",
    "ja": "Japanese",
    "ko": "Korean",
    "ru": "Russian",
    "uk": "Ukrainian",
    "zh": "Chinese",
}
_EMPTY_SIDE = "a segment without text on one side"


def wmt_rows(sources: Sequence[str], request: Request, tally: Tally) -> Iterator[Record]:
    """Yield WMT's segments with their translations (Kocmi et al., 2023), by default en to zh.

    Sources are two files with one segment a line, the source language's first; or a TSV file of
    pairs; or WMT's XML; or a folder with generaltest2023.en-zh.src.en and …ref.refA.zh. Pairs in a
    TSV file:

        They were glad.⇥他们很高兴。
    """
    source, target = request.source or "en", request.target or "zh"
    names = {
        "source_language": _LANGUAGES.get(source, source),
        "target_language": _LANGUAGES.get(target, target),
    }
    for row in converted(_segments(sources, source, target, tally), _pair, tally):
        yield Record({**row.fields, **names}, row.where)


def text_pair_rows(sources: Sequence[str], _: Request, tally: Tally) -> Iterator[Record]:
    """Yield the corresponding lines of two files, or the pairs of a TSV file.

    The templates name them {{source}} and {{target}}:

        A long, long text.⇥Short.
    """
    yield from converted(_aligned_lines(sources, tally), _pair, tally)


def _segments(sources: Sequence[str], source: str, target: str, tally: Tally) -> Iterator[Record]:
    """Yield WMT's pairs in whichever form the sources have."""
    if len(sources) == 1 and os.path.isdir(sources[0]):
        sources = _pair_in(sources[0], source, target)
    if len(sources) == 2:
        yield from _aligned_lines(sources, tally)
        return
    for part in parts(sources, tally, ("*.xml", "*.tsv")):
        if first_character(part) == b"<":
            yield from until_damage(_xml(part, source, target), tally)
        else:
            yield from _tsv(part, tally)


def _pair_in(folder: str, source: str, target: str) -> Sequence[str]:
    """Return the two parallel files of a folder, or the folder if it has no such pair."""
    names = sorted(os.listdir(folder))
    pair = f".{source}-{target}."
    left = [name for name in names if pair in name and f".src.{source}" in name]
    right = [name for name in names if pair in name and ".ref." in name and f".{target}" in name]
    if len(left) > 1 or len(right) > 1:
        several = " and ".join((left if len(left) > 1 else right)[:2])
        raise LorakitError(f"{folder} has {several}; name the two files")
    return [os.path.join(folder, name) for name in (*left, *right)] if left and right else [folder]


def _aligned_lines(sources: Sequence[str], tally: Tally) -> Iterator[Record]:
    """Yield the pairs of two files with corresponding lines; unless there are two, of TSV files."""
    if len(sources) != 2:
        for part in parts(sources, tally, ("*.tsv",)):
            yield from _tsv(part, tally)
        return
    left, right = (
        (line for part in parts([path], tally) for line in lines_in(part, tally))
        for path in sources
    )
    for left_line, right_line in itertools.zip_longest(left, right):
        if left_line is None or right_line is None:
            (where, _), shorter = (right_line, 0) if left_line is None else (left_line, 1)
            raise LorakitError(
                f"{where}: {sources[shorter]} has no line for it; give files of one length"
            )
        (where, source), (_, target) = left_line, right_line
        if source is not None and target is not None:
            yield Record({"source": source, "target": target}, where)


def _tsv(part: Part, tally: Tally) -> Iterator[Record]:
    """Yield the pairs of a file with a tab between the two texts of a line."""
    for where, line in lines_in(part, tally):
        cells = (line or "").split("\t")
        if len(cells) >= 2:
            yield Record({"source": cells[0], "target": cells[1]}, where)
        elif line:
            tally.reject(LorakitError(f"{where}: no tab between two texts; mend the row"))


def _pair(row: Record) -> Record:
    """Return the row of a pair with an id; UnwantedError if one side is empty."""
    source, target = str(row.fields["source"]).strip(), str(row.fields["target"]).strip()
    if not source or not target:
        raise UnwantedError(_EMPTY_SIDE)
    fields = {**row.fields, "source": source, "target": target}
    return Record({"id": id_of(row, "id"), **fields}, row.where)


def _xml(part: Part, source: str, target: str) -> Iterator[Record]:
    """Yield the segments of WMT's XML with every reference in the target language."""
    for where, document in elements(part, frozenset({"doc"}), frozenset({"hyp"})):
        sources = _source_segments(document, source)
        references = [_segments_of(side) for side in _sides(document, "ref", target)]
        name = document.get("id", "doc")
        for number, source_text in sources.items():
            targets = [segments[number] for segments in references if segments.get(number)]
            several = {"references": targets} if len(targets) > 1 else {}
            pair = {"source": source_text, "target": targets[0] if targets else ""}
            yield Record({"id": f"{name}:{number}", **pair, **several}, where)


def _sides(document: Element, kind: str, lang: str) -> list[Element]:
    """Return the <src> or <ref> elements in a language; old files leave the language out."""
    return [side for side in document.iter(kind) if side.get("lang", lang).split("_")[0] == lang]


def _source_segments(document: Element, lang: str) -> dict[str, str]:
    """Return the texts of a document's source segments by their ids."""
    sides = _sides(document, "src", lang)
    return _segments_of(sides[0]) if sides else {}


def _segments_of(side: Element) -> dict[str, str]:
    """Return the texts of a side's segments by their ids."""
    return {seg.get("id", ""): text_in(seg) for seg in side.iter("seg")}
