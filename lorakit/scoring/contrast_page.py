"""Write contrasts as one HTML page that loads nothing: no script, no font, no picture."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from html import escape
from typing import IO
from unicodedata import category

from lorakit.foreign_text import printable
from lorakit.scoring.contrast import Contrast, Where
from lorakit.scoring.differing_words import Passage, mark_differing_words

_STYLE = """
:root { color-scheme: light dark; --line: #ccc; --a: #ffd8d3; --b: #cdeccf; --ink: #111 }
@media (prefers-color-scheme: dark) {
  :root { --line: #555; --a: #6e2b26; --b: #1f5530; --ink: #fff }
}
body { font: 1rem/1.5 system-ui, sans-serif; max-width: 75rem; margin: 2rem auto; padding: 0 1rem }
article { border-top: 1px solid var(--line); padding: 1rem 0 }
h2 { font-size: 1rem; margin: 0 0 .5rem }
.text { white-space: pre-wrap; overflow-wrap: anywhere; unicode-bidi: plaintext }
.pair { display: grid; grid-template-columns: 1fr 1fr; gap: 1rem }
@media (max-width: 40rem) { .pair { grid-template-columns: 1fr } }
mark { color: var(--ink); text-decoration: underline }
.a mark { background: var(--a) }
.b mark { background: var(--b) }
dt { font-weight: bold }
dd { margin: 0 0 .5rem }
"""


def write_contrast_page(
    contrasts: Sequence[Contrast],
    stream: IO[str],
    *,
    names: tuple[str, str],
    metric: str,
    where: Where,
    lang: str = "en",
) -> None:
    """Write the page: an article for each contrast, with all of its texts, in order."""
    title = f"{names[0]} and {names[1]}"
    stream.write(
        f'<!DOCTYPE html>\n<html lang="{escape(lang)}">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width">\n'
        '<meta http-equiv="Content-Security-Policy" '
        "content=\"default-src 'none'; style-src 'unsafe-inline'\">\n"
        f"<title>{_safe(title)}</title>\n<style>{_STYLE}</style>\n</head>\n<body>\n"
        f"<h1>{_safe(title)}</h1>\n<p>{_what(where, len(contrasts), metric)}</p>\n"
    )
    for contrast in contrasts:
        stream.writelines(f"{line}\n" for line in _article(contrast, names, lang))
    stream.write("</body>\n</html>\n")


def _what(where: Where, count: int, metric: str) -> str:
    kind = "B differs from A" if where == "differs" else f"B is {where} than A"
    records = "1 record" if count == 1 else f"{count} records"
    return f"{records} where {kind}, the largest difference in {escape(metric)} first."


def _article(contrast: Contrast, names: tuple[str, str], lang: str) -> Iterator[str]:
    marked = mark_differing_words(contrast.prediction_a, contrast.prediction_b, lang=lang)
    scores = (contrast.score_a, contrast.score_b)
    yield f"<article>\n<h2>{_safe(contrast.id)} ({contrast.difference:+.2f})</h2>"
    if contrast.prompt is not None:
        prompt = f'<div class="text">{_safe(contrast.prompt)}</div>'
        yield f"<details>\n<summary>prompt</summary>\n{prompt}\n</details>"
    yield "<dl>"
    for reference in contrast.references:
        yield f'<dt>reference</dt>\n<dd class="text">{_safe(reference)}</dd>'
    yield '</dl>\n<div class="pair">'
    for letter, name, score, passages in zip("AB", names, scores, marked, strict=True):
        body = "".join(map(_marked, passages))
        yield f'<section class="{letter.lower()}">\n<h2>{letter}: {_safe(name)}, {score:.2f}</h2>'
        yield f'<div class="text">{body}</div>\n</section>'
    yield "</div>\n</article>"


def _marked(passage: Passage) -> str:
    text = _safe(passage.text)
    return f"<mark>{text}</mark>" if passage.differs else text


def _safe(text: str) -> str:
    """Return a text as HTML, which has no control characters, in UTF-8, no half surrogate pairs."""
    return escape("".join(printable(c) if _is_unfit(c) else c for c in text))


def _is_unfit(character: str) -> bool:
    return category(character) in ("Cc", "Cs") and character not in "\n\t"
