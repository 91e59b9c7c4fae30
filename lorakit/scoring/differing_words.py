"""Mark the words in which two texts differ. This file knows nothing of records and colours."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from difflib import SequenceMatcher
from itertools import groupby

from lorakit.scoring.languages import words


@dataclass(frozen=True)
class Passage:
    """A part of a text whose words all stand in the other text, too, or all do not."""

    text: str
    differs: bool


def mark_differing_words(
    text: str, other: str, *, lang: str
) -> tuple[list[Passage], list[Passage]]:
    """Return the passages of both texts; those of a text, joined, are that text to the letter.

    Words are the language's. Those of the longest common runs are the same (difflib), all others
    differ; white space between two words that differ belongs to them.
    """
    ours, theirs = _pieces(text, lang), _pieces(other, lang)
    matcher = SequenceMatcher(None, _words(ours), _words(theirs), autojunk=False)
    same = matcher.get_matching_blocks()
    return (
        _passages(ours, {block.a + n for block in same for n in range(block.size)}),
        _passages(theirs, {block.b + n for block in same for n in range(block.size)}),
    )


@dataclass(frozen=True)
class _Piece:
    """A word and the white space before it; at the end of a text the word may be empty."""

    space: str
    word: str


def _pieces(text: str, lang: str) -> list[_Piece]:
    """Return a text cut before the white space in front of each word.

    Where what finds the words changes the text (MeCab reads no NUL), words are what stands between
    spaces.
    """
    listed = words(text, lang=lang)
    if "".join(listed) != "".join(text.split()):
        listed = text.split()
    pieces, start = [], 0
    for word in (word for part in listed for word in part.split()):
        place = text.index(word, start)
        pieces.append(_Piece(text[start:place], word))
        start = place + len(word)
    return [*pieces, _Piece(text[start:], "")] if text[start:] else pieces


def _words(pieces: Iterable[_Piece]) -> list[str]:
    return [piece.word for piece in pieces if piece.word]


def _passages(pieces: Sequence[_Piece], same: set[int]) -> list[Passage]:
    """Return the pieces as passages; `same` holds the numbers of the words that do not differ."""
    marked: list[tuple[str, bool]] = []
    differed = False
    for number, piece in enumerate(pieces):
        differs = bool(piece.word) and number not in same
        marked.append((piece.space, differs and differed))
        marked.append((piece.word, differs))
        differed = differs
    runs = groupby((part for part in marked if part[0]), key=lambda part: part[1])
    return [Passage("".join(text for text, _ in run), differs) for differs, run in runs]
