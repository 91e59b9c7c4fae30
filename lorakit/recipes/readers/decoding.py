"""Decode documents that do not always declare their encoding, above all old Japanese ones."""

from __future__ import annotations

import codecs
import re

from lorakit.errors import LorakitError

_ESCAPE = re.compile(rb"\x1b(?:\$[@B]|\([BJI]|\$\([D])")
_DECLARATION = re.compile(rb"(?:charset|encoding)\s*=\s*[\"']?([\w.:-]+)", re.IGNORECASE)
_KANA = re.compile("[ぁ-んァ-ヶー、。]")
_HALF_WIDTH = re.compile("[\uff61-\uff9f]")
# Python's codecs that no document is written in; some take time that grows with the square.
_NO_ENCODINGS = frozenset({"idna", "punycode", "raw-unicode-escape", "undefined", "unicode-escape"})
# What files that declare these are really written in: supersets with the vendors' characters.
_SUPERSETS = {"shift_jis": "cp932", "gb2312": "gb18030", "gbk": "gb18030", "big5": "big5hkscs"}
_ALIASES = {"windows-31j": "cp932", "x-sjis": "cp932", "x-euc-jp": "euc_jp"}  # unknown to Python


def declared_encoding(content: bytes) -> str | None:
    """Return the encoding that a page or an XML file names at its beginning."""
    match = _DECLARATION.search(content[:2048])
    return match[1].decode("ascii", "replace") if match else None


def decoded(content: bytes, name: str, declared: str | None = None) -> str:
    """Return the text of a file in UTF-8, ISO-2022-JP, EUC-JP or Shift_JIS.

    `declared`, the encoding that the file itself names, is tried first. Raises LorakitError if the
    file is in none of them.
    """
    escaped = ["iso2022_jp_ext"] if _ESCAPE.search(content) and content.isascii() else []
    for encoding in (*escaped, *([declared] if declared else []), "utf-8-sig"):
        text = _try(content, encoding)
        if text is not None:
            return text
    texts = [text for legacy in ("euc_jp", "cp932") if (text := _try(content, legacy)) is not None]
    if not texts:
        raise LorakitError(
            f"{name}: not UTF-8, EUC-JP, Shift_JIS or ISO-2022-JP; save the file as UTF-8"
        )
    return max(texts, key=_japanese_likeness)


def codec_of(declared: str) -> str | None:
    """Return Python's name of the encoding that a file declares, None where it is none."""
    try:
        codec = codecs.lookup(_ALIASES.get(declared.lower(), declared))
    except (LookupError, ValueError):
        return None
    if not codec._is_text_encoding or codec.name in _NO_ENCODINGS:
        return None
    return _SUPERSETS.get(codec.name, codec.name)


def _try(content: bytes, encoding: str) -> str | None:
    """Return the decoded text, None where the bytes are not in this encoding."""
    codec = codec_of(encoding)
    if codec is None:
        return None
    try:
        return content.decode(codec)
    except UnicodeDecodeError:
        return None


def _japanese_likeness(text: str) -> int:
    """Return how much a text looks like Japanese.

    Japanese has kana and full stops; decoded wrongly, it shows half-width kana instead.
    """
    return len(_KANA.findall(text)) - 2 * len(_HALF_WIDTH.findall(text))
