"""Cut text into words and normalise it, language by language.

To add a language, write one function that returns the words of a text and one line in LANGUAGES,
which `--lang` and the tests read. This file knows nothing of metrics.
"""

from __future__ import annotations

import functools
import re
import string
import unicodedata
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from lorakit.errors import LorakitError
from lorakit.versions import version_of

if TYPE_CHECKING:
    import fugashi

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_ASCII_PUNCTUATION = frozenset(string.punctuation)


def _whitespace_words(text: str) -> list[str]:
    return text.split()


def _mecab_words(text: str) -> list[str]:
    """Return MeCab's surface forms as written, with punctuation but without white space.

    MeCab reads a C string in UTF-8, so NUL would end the text and half a surrogate pair stop it.
    """
    safe = text.replace("\0", " ").encode("utf-8", "replace").decode("utf-8")
    return [word for node in _mecab()(safe) if (word := node.surface.strip())]


@functools.cache
def _mecab() -> fugashi.GenericTagger:
    """Return the tagger on unidic-lite by name: fugashi alone would prefer a full UniDic."""
    import fugashi
    import unidic_lite  # type: ignore[import-untyped]

    folder = unidic_lite.DICDIR
    return fugashi.GenericTagger(f'-Owakati -r "{folder}/mecabrc" -d "{folder}"')


def _chinese_words(text: str) -> list[str]:
    """Return the tokens of sacrebleu's `zh`: one per Chinese character, else its 13a words."""
    return _chinese_tokenizer()(text).split()


@functools.cache
def _chinese_tokenizer() -> Callable[[str], str]:
    from sacrebleu.metrics.bleu import BLEU

    tokenizer: Callable[[str], str] = BLEU(tokenize="zh").tokenizer
    return tokenizer


@dataclass(frozen=True)
class Language:
    """A language: how to find its words, and whether it is written with spaces between them.

    `tokenizer` returns what signatures say of the tool that finds the words: its name and version.
    """

    name: str
    words: Callable[[str], list[str]]
    tokenizer: Callable[[], str]
    spaced: bool = True


LANGUAGES: dict[str, Language] = {
    "en": Language("English", _whitespace_words, lambda: "whitespace"),
    "ja": Language(
        "Japanese",
        _mecab_words,
        lambda: f"fugashi-{version_of('fugashi')}+unidic-lite-{version_of('unidic-lite')}",
        spaced=False,
    ),
    "zh": Language(
        "Chinese",
        _chinese_words,
        lambda: f"sacrebleu-{version_of('sacrebleu')}-zh",
        spaced=False,
    ),
}


def language(lang: str) -> Language:
    """Return the entry of LANGUAGES; raise LorakitError with the choices where there is none."""
    if lang not in LANGUAGES:
        raise LorakitError(f"unknown language {lang!r}; choose from {', '.join(LANGUAGES)}")
    return LANGUAGES[lang]


def words(text: str, *, lang: str) -> list[str]:
    """Return the words of a text: by spaces, by MeCab (ja) or by Chinese character (zh)."""
    return language(lang).words(text)


def normalise(text: str, *, lang: str, articles: bool = False, punctuation: bool = False) -> str:
    """Return the text as SQuAD compares it; `articles` and `punctuation` keep these in it.

    That is in lower case, without ASCII punctuation or a/an/the, and with single spaces. Languages
    without spaces have no articles to remove; there the text is first put into NFKC (full-width
    forms), and a space takes the place of punctuation of any script.
    """
    if language(lang).spaced:
        text = text.lower()
        if not punctuation:
            text = "".join(c for c in text if c not in _ASCII_PUNCTUATION)
        if not articles:
            text = _ARTICLES.sub(" ", text)
    else:
        text = unicodedata.normalize("NFKC", text).lower()
        if not punctuation:
            text = "".join(" " if _is_punctuation(c) else c for c in text)
    return " ".join(text.split())


def _is_punctuation(character: str) -> bool:
    return character in _ASCII_PUNCTUATION or unicodedata.category(character).startswith("P")


def script_of(texts: Iterable[str]) -> str:
    """Return the script of most letters: `ascii`, `ja` (a twentieth are kana), `zh` or `other`."""
    ascii_letters = kana = han = letters = 0
    for text in texts:
        for character in text:
            if character.isalpha():
                letters += 1
                ascii_letters += character.isascii()
                kana += "\u3040" <= character <= "\u30ff" or "\uff66" <= character <= "\uff9f"
                han += "\u3400" <= character <= "\u9fff"
    if 2 * ascii_letters >= letters:
        return "ascii"
    if 2 * (kana + han) <= letters:
        return "other"
    return "ja" if 20 * kana > kana + han else "zh"
