"""Telling the encoding of a Japanese text from its bytes."""

from __future__ import annotations

import re

from lorakit.errors import LorakitError

_ESCAPE = re.compile(rb"\x1b(?:\$[@B]|\([BJI]|\$\([D])")
_KANA = re.compile("[ぁ-んァ-ヶー、。]")
_HALF_WIDTH = re.compile("[\uff61-\uff9f]")


def decoded(content: bytes, name: str, declared: str | None = None) -> str:
    """Return the text of a file in UTF-8, ISO-2022-JP, EUC-JP or Shift_JIS.

    `declared` is the encoding that the file itself names; it is tried first. Raises LorakitError
    where it is none of them.
    """
    first = ["iso2022_jp_ext"] if _ESCAPE.search(content) and content.isascii() else []
    for encoding in (*first, *([declared] if declared else []), "utf-8-sig"):
        text = _try(content, encoding)
        if text is not None:
            return text
    found = [text for each in ("euc_jp", "cp932") if (text := _try(content, each)) is not None]
    if not found:
        raise LorakitError(
            f"{name}: not UTF-8, EUC-JP, Shift_JIS or ISO-2022-JP; save the file as UTF-8"
        )
    return max(found, key=_likeness)


def _try(content: bytes, encoding: str) -> str | None:
    try:
        return content.decode(encoding)
    except (UnicodeDecodeError, LookupError):
        return None


def _likeness(text: str) -> int:
    """Japanese has kana and stops; the wrong one of two encodings shows half-width kana instead."""
    return len(_KANA.findall(text)) - 2 * len(_HALF_WIDTH.findall(text))
