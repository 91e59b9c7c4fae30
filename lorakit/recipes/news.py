"""News pages: articles and the bulleted highlights above them.

As in the adaptive-merge paper's Bloomberg set (Appendix A.1), the highlights, joined with the
title, are the summary, and the full text without them is the article. trafilatura removes the
boilerplate.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from functools import partial
from typing import TYPE_CHECKING

from lorakit.errors import LorakitError, check_packages
from lorakit.recipes.readers.decoding import declared_encoding, decoded
from lorakit.recipes.readers.rows import converted
from lorakit.recipes.readers.sources import Part, parts
from lorakit.recipes.request import Request, Tally, UnwantedError
from lorakit.records.record import Record

if TYPE_CHECKING:
    from lxml.html import HtmlElement

_MOST_ITEMS = 8
_SHORTEST_ITEM = 8  # characters
_SHORTEST_PARAGRAPH = 40
_ASIDE = frozenset({"nav", "footer", "aside", "form", "figure", "table", "button"})
_FURNITURE = (
    r"(?:^|[\s_-])(?:nav|menu|bread-?crumbs?|share|social|tags?|related|footer|toc)(?:$|[\s_-])"
)

_CONTROLS = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\ufffe\uffff]")


def news_rows(sources: Sequence[str], request: Request, tally: Tally) -> Iterator[Record]:
    """Yield rows with `article`, `summary` (title and highlights, a line each), `title`, `url`.

    A source is a page, or a folder or archive of pages. The highlights are the items that the CSS
    selector of --highlights finds or, without one, the first list between the heading and the first
    paragraph. Pages without highlights or text are removed and counted. A page:

        <html><head><title>Markets rise - Daily News</title></head><body>
        <nav><ul><li><a href="/">Home page</a></li><li><a href="/w">The world</a></li></ul></nav>
        <article><h1>Markets rise</h1>
        <ul><li>Shares rose by two percent on Monday</li><li>Exporters gained most</li></ul>
        <p>Shares rose by two percent on Monday in the busiest session of the year so far.</p>
        <p>Exporters gained most as the currency fell against all of its larger rivals.</p>
        </article></body></html>
    """
    check_packages("the recipe news-html", "trafilatura", "lxml", extra="html")
    if request.highlights:
        check_packages("--highlights", "cssselect", extra="html")
    for part in parts(sources, tally, ("*.html", "*.htm", "*.xhtml")):
        row = Record({}, part.name)
        yield from converted([row], partial(_page, part, request.highlights), tally)


def _page(part: Part, selector: str | None, _: Record) -> Record:
    """Return the row of one page; UnwantedError if it has no highlights or no text."""
    tree = _tree(part)
    title = _title(tree)
    items = _selected_highlights(tree, selector) if selector else _listed_highlights(tree)
    highlights = [text for item in items if (text := _text(item))]
    if not highlights:
        raise UnwantedError("a page without highlights")
    headings = [element for element in tree.iter("h1") if _text(element) == title]
    menus = [element for element in tree.iter("ul", "ol") if _is_furniture(element)]
    for element in (*items, *headings, *menus):  # the summary must not stand in its article
        if element.getparent() is not None:
            element.drop_tree()
    article = _body(tree, part.name)
    if not article:
        raise UnwantedError("a page without the text of an article")
    url = _meta(tree, "og:url")
    fields = {"id": url or part.inside, "article": article, "url": url}
    summary = "\n".join([title, *highlights] if title else highlights)
    return Record({**fields, "summary": summary, "title": title}, part.name)


def _tree(part: Part) -> HtmlElement:
    """Return the parsed page, without reading a DTD or entities or fetching anything."""
    from lxml import etree, html

    content = part.whole()
    text = decoded(content, part.name, declared_encoding(content))
    text = re.sub(r"^\s*<\?xml[^>]*\?>", "", text)
    parser = html.HTMLParser(no_network=True, huge_tree=False)
    try:
        return _without_controls_(html.document_fromstring(text, parser=parser))
    except (etree.ParserError, ValueError) as error:
        raise LorakitError(f"{part.name}: no page ({error}); check the file") from error


def _text(element: HtmlElement) -> str:
    """Return the text of an element, spaces folded."""
    return " ".join(str(element.text_content()).split())


def _meta(tree: HtmlElement, name: str) -> str:
    """Return the content of the first meta tag with this name; empty if there is none."""
    contents = tree.xpath("//meta[@property=$name or @name=$name]/@content", name=name)
    return " ".join(str(contents[0]).split()) if contents else ""


def _title(tree: HtmlElement) -> str:
    """Return the first heading, since other titles often end with the newspaper's name."""
    headings = [text for element in tree.iter("h1") if (text := _text(element))]
    if headings:
        return headings[0]
    return _meta(tree, "og:title") or next((_text(element) for element in tree.iter("title")), "")


def _without_controls_(tree: HtmlElement) -> HtmlElement:
    """Put spaces for control characters in a tree: lxml reads them but moves no text with them."""
    for element in tree.iter():
        for place in ("text", "tail"):
            text = getattr(element, place)
            if isinstance(text, str) and _CONTROLS.search(text):
                setattr(element, place, _CONTROLS.sub(" ", text))
    return tree


def _selected_highlights(tree: HtmlElement, selector: str) -> list[HtmlElement]:
    """Return the elements that a CSS selector matches; for a list, its items."""
    from cssselect import SelectorError
    from lxml.cssselect import CSSSelector

    try:
        elements = CSSSelector(selector, translator="html")(tree)
    except SelectorError as error:
        raise LorakitError(f"--highlights {selector!r}: {error}; mend the selector") from error
    items = [item for element in elements for item in (element.findall("li") or [element])]
    return [item for item in dict.fromkeys(items) if not _inside(item, items)]


def _inside(element: HtmlElement, others: Sequence[HtmlElement]) -> bool:
    """Return whether an element lies within one of the others."""
    ancestors = set(element.iterancestors())
    return any(other in ancestors for other in others)


def _listed_highlights(tree: HtmlElement) -> list[HtmlElement]:
    """Return the items of the first list of sentences between the heading and the body."""
    started = not any(True for _ in tree.iter("h1"))
    for element in tree.iter("h1", "ul", "ol", "p"):
        if element.tag == "h1":
            started = True
        elif not started or _is_furniture(element):
            continue
        elif element.tag == "p":
            if len(_text(element)) >= _SHORTEST_PARAGRAPH and not _in_list_item(element):
                return []
        elif _is_highlights(element):
            return list(element.findall("li"))
    return []


def _in_list_item(element: HtmlElement) -> bool:
    return any(ancestor.tag == "li" for ancestor in element.iterancestors())


def _is_highlights(element: HtmlElement) -> bool:
    """Return whether a list has few items, each of them a sentence rather than a link."""
    items = element.findall("li")
    if not 1 <= len(items) <= _MOST_ITEMS or element.xpath(".//ul|.//ol"):
        return False
    linked = sum(len(_text(link)) for link in element.iter("a"))
    texts = [_text(item) for item in items]
    return all(len(text) >= _SHORTEST_ITEM for text in texts) and 2 * linked < sum(map(len, texts))


def _is_furniture(element: HtmlElement) -> bool:
    """Return whether an element is part of a page's navigation, not of its article."""
    for box in (element, *element.iterancestors()):
        names = f"{box.get('class', '')} {box.get('id', '')} {box.get('role', '')}".lower()
        if box.tag in _ASIDE or (box.tag == "header" and not box.xpath(".//h1")):
            return True
        if box.tag not in ("body", "html") and re.search(_FURNITURE, names):
            return True
    return False


def _body(tree: HtmlElement, where: str) -> str:
    """Return the text of the article, one paragraph a line."""
    import logging

    import trafilatura

    logging.getLogger("trafilatura").setLevel(logging.CRITICAL)  # it prints what it cannot read
    try:
        text = trafilatura.extract(
            tree, include_comments=False, include_tables=False, deduplicate=False
        )
    except RecursionError:
        raise LorakitError(f"{where}: elements nested too deeply; check the file") from None
    return str(text or "").strip()
