"""J-STAGE: titles from abstracts, in the metadata of journal articles.

The adaptive-merge paper takes its medical papers, case reports, from there. Metadata come as XML
(JATS and similar formats, OAI-PMH's Dublin Core) or as the meta tags of an article's page. Both
have texts in several languages, of which --lang chooses one (by default Japanese, else any other).
"""

from __future__ import annotations

import html
import re
from collections.abc import Iterator, Sequence
from html.parser import HTMLParser
from typing import TYPE_CHECKING

from lorakit.recipes.filters import is_japanese
from lorakit.recipes.readers.decoding import declared_encoding, decoded
from lorakit.recipes.readers.rows import converted, id_of, until_damage
from lorakit.recipes.readers.sources import Part, parts
from lorakit.recipes.readers.xmltrees import elements, text_in
from lorakit.recipes.request import Request, Tally, UnwantedError
from lorakit.records.record import Record

if TYPE_CHECKING:
    from xml.etree.ElementTree import Element

_FILES = ("*.xml", "*.html", "*.htm")
_ARTICLES = frozenset({"article", "entry", "record", "item"})
_IGNORED = frozenset({"ref-list", "back", "body", "sub-article", "response", "related-article"})
_TITLES = ("article-title", "trans-title", "article_title", "title")
_ABSTRACTS = ("abstract", "trans-abstract", "description")
_ABSTRACT_HEADINGS = ("抄録", "要旨", "要約", "abstract", "summary")
_META_TITLES = ("citation_title", "dc.title", "dcterms.title")
_META_ABSTRACTS = ("citation_abstract", "dc.description", "dcterms.abstract", "abstract")
_IDS = ("article-id", "identifier", "doi", "citation_doi", "dc.identifier")


def jstage_rows(sources: Sequence[str], request: Request, tally: Tally) -> Iterator[Record]:
    """Yield rows with `article` (the abstract) and `title` of journal articles.

    A source is an XML file of any number of articles, an article's page, or a folder or archive of
    them. Articles without a title or an abstract in the language are removed and counted. An
    article:

        <article xml:lang="ja"><front><article-meta>
          <article-id pub-id-type="doi">10.1234/jjem.31.5</article-id>
          <title-group><article-title>急性腹症の1例</article-title>
            <trans-title-group xml:lang="en"><trans-title>A case</trans-title></trans-title-group>
          </title-group>
          <abstract><p>症例は60歳の男性。腹痛を主訴に当院を受診した。</p></abstract>
        </article-meta></front></article>
    """
    for part in parts(sources, tally, _FILES):
        rows = _page(part) if _is_page(part) else _xml(part)
        rows = until_damage(rows, tally)
        yield from converted(rows, lambda row: _in_language(row, request.lang), tally)


def _is_page(part: Part) -> bool:
    """Return whether a file is an HTML page rather than XML."""
    head = part.stream.peek(4096)[:4096].lower()
    return re.search(rb"<(?:html|meta|!doctype html)[\s>]", head) is not None


def _xml(part: Part) -> Iterator[Record]:
    """Yield the titles and abstracts of the articles in an XML file, in every language."""
    for where, article in elements(part, _ARTICLES, _IGNORED):
        language = article.get("xml:lang", "")
        fields = {
            "id": next((text_in(element) for name in _IDS for element in article.iter(name)), ""),
            "titles": _texts(article, _TITLES, language),
            "abstracts": _texts(article, _ABSTRACTS, language),
        }
        yield Record(fields, where)


def _texts(article: Element, names: Sequence[str], language: str) -> list[tuple[str, str]]:
    """Return the language and the text of every element with one of these names.

    An element that names no language has the language of the elements around it.
    """
    texts: list[tuple[str, str]] = []

    def visit(element: Element, language: str) -> None:
        language = element.get("xml:lang", language)
        if element.tag in names:
            children = [child for child in element if child.tag in ("ja", "en")]
            if children:
                texts.extend((child.tag, _plain(text_in(child))) for child in children)
            else:
                texts.append((language, _plain(" ".join(_paragraphs(element)) or text_in(element))))
            return
        for child in element:
            visit(child, language)

    visit(article, language)
    return texts


def _paragraphs(element: Element) -> list[str]:
    """Return the headings and paragraphs of an abstract, without the heading "Abstract"."""
    paragraphs: list[str] = []
    for child in element:
        if child.tag == "sec":
            paragraphs += _paragraphs(child)
        elif child.tag in ("p", "title") and text_in(child).lower() not in _ABSTRACT_HEADINGS:
            paragraphs.append(text_in(child))
    return paragraphs


class _MetaTags(HTMLParser):
    """Collects the meta tags of a page: name, language and content."""

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.tags: list[tuple[str, str, str]] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag == "meta":
            values = {name: value or "" for name, value in attrs}
            language = values.get("xml:lang") or values.get("lang") or ""
            name = values.get("name", values.get("property", "")).lower()
            self.tags.append((name, language, values.get("content", "")))


def _page(part: Part) -> Iterator[Record]:
    """Yield the titles and abstracts in the meta tags of one page, in every language."""
    content = part.whole()
    meta = _MetaTags()
    meta.feed(decoded(content, part.name, declared_encoding(content)))

    def named(*names: str) -> list[tuple[str, str]]:
        return [(lang, _plain(text)) for name, lang, text in meta.tags if name in names]

    ids = [text for _, text in named(*_IDS)]
    fields = {"id": next(iter(ids), part.inside), "titles": named(*_META_TITLES)}
    yield Record({**fields, "abstracts": named(*_META_ABSTRACTS)}, part.name)


def _plain(text: str) -> str:
    """Return a text without the escaped tags that some metadata contain."""
    return " ".join(html.unescape(re.sub(r"</?[a-zA-Z][^<>]{0,200}>", "", text)).split())


def _in_language(row: Record, lang: str | None) -> Record:
    """Return the row with the title and abstract in a language; UnwantedError if it has none."""
    for language in [lang] if lang else ["ja", None]:
        title = _first_in(row.fields["titles"], language)
        abstract = _first_in(row.fields["abstracts"], language)
        if title and abstract:
            fields = {"id": id_of(row, "id"), "article": abstract, "title": title}
            return Record(fields, row.where)
    raise UnwantedError(f"an article without title and abstract{f' in {lang}' if lang else ''}")


def _first_in(texts: Sequence[tuple[str, str]], lang: str | None) -> str:
    """Return the first text in a language: the one it is marked with, else judged by its kana."""
    for mark, text in texts:
        language = mark.lower()[:2] or ("ja" if is_japanese(text) else "en")
        if text and lang in (None, language):
            return text
    return ""
