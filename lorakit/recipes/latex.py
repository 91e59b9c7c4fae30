r"""Journal papers in LaTeX: titles from abstracts.

The adaptive-merge paper takes its NLP papers from the LaTeX corpus of the Journal of Natural
Language Processing (Appendix A.2.1): the title is `\jtitle` or `\title`, the abstract `\jabstract`
or `abstract`, a macro or an environment. The author's own macros are expanded; pylatexenc then
turns the LaTeX into text, without citations, references and spacing.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import NamedTuple

from lorakit.errors import LorakitError, check_packages
from lorakit.recipes.filters import is_japanese
from lorakit.recipes.readers.decoding import decoded
from lorakit.recipes.readers.rows import converted
from lorakit.recipes.readers.sources import Part, parts
from lorakit.recipes.request import Request, Tally, UnwantedError
from lorakit.records.record import Record

_TITLES = {"ja": ("jtitle", "title"), "en": ("etitle", "title")}
_ABSTRACTS = {"ja": ("jabstract", "abstract"), "en": ("eabstract", "abstract")}
_COMMENT = r"(?<!\\)((?:\\\\)*)%[^\n]*(?:\n[ \t]*|$)"
# Runs are possessive (`*+`): one that was tried at every length would take quadratic time.
_DEFINITION = (
    r"\\(?:(?:re)?newcommand|providecommand|DeclareRobustCommand)\*?\s*+\{?\s*+\\([A-Za-z@]++)"
    r"\s*+\}?\s*+(?:\[([0-9])\])?\s*+(?:\[([^\]]{0,4096}+)\])?\s*+(?=\{)"
    r"|\\[gex]?def\s*+\\([A-Za-z@]++)\s*+((?:#[1-9])*+)\s*+(?=\{)"
)
_GLUE = (
    r"\\(?:[vh]skip|[vh]glue|kern)\s*+[-+]?[\d.]*+\s*+(?:true)?(?:\\[A-Za-z@]++|[A-Za-z]{1,2})"
    r"(?:\s*+(?:plus|minus)\s*+[-+]?[\d.]++\s*+(?:true)?[A-Za-z]{1,4})*"
)
_WIDE = "\u3000-\u30ff\u3400-\u9fff\uf900-\ufaff\uff00-\uffef"
_LARGEST = 1 << 18  # characters of an expanded field: macros that double themselves end here
_LARGEST_MACROS = 1 << 22  # characters of all bodies: definitions can lie within one another
_LARGEST_PAPER = 1 << 22
_PASSES = 20
_MACRO_USE = re.compile(r"\\([A-Za-z@]+)(?![A-Za-z@])[ \t]*")
_OPTION = re.compile(r"\s*+\[([^\]]{0,4096}+)\]")
_ARGUMENT = re.compile(r"\s*+(\\[A-Za-z@]+|\\.|[^\s])", re.S)
# What pylatexenc raises at LaTeX that it cannot read.
_PARSER_ERRORS = (AttributeError, IndexError, KeyError, TypeError, ValueError)

# Macros to remove, by the form of their arguments: * a star, [ optional, { required.
_REMOVED = {
    "*[[{": "cite citep citet citeA citeB citealp citealt citeauthor citeyear citeyearpar nocite",
    "*{": "vspace hspace ref pageref eqref label",
    "[{": "footnote footnotetext",
    "[": "footnotemark linebreak pagebreak",
    "{": "thanks index bibliographystyle bibliography input include pagestyle thispagestyle",
    "{{": "setlength addtolength setcounter",
    "": "noindent protect maketitle newpage clearpage smallskip medskip bigskip par",
}


class Macro(NamedTuple):
    """A user's macro: number of arguments, default of the first (None: required), and body."""

    arguments: int
    default: str | None
    body: str


def latex_rows(sources: Sequence[str], request: Request, tally: Tally) -> Iterator[Record]:
    r"""Yield rows with `article` (the abstract) and `title` of papers.

    A source is a LaTeX file in UTF-8, EUC-JP, Shift_JIS or ISO-2022-JP, or a folder or archive of
    them; --lang ja takes papers in Japanese only, --lang en English titles and abstracts. Files
    without a title and an abstract are removed and counted. A paper:

        \documentclass{jnlp}
        \newcommand{\model}[1]{モデル#1}
        \jtitle{\model{A}による機械翻訳\thanks{本研究は助成を受けた。}}
        \jabstract{% abstract
        本稿では，{\bf 機械翻訳}の手法\cite{a2020}を提案する．\vspace{2mm}
        実験の結果，\model{A}は精度が50\%向上した．
        }
        \begin{document}\maketitle\end{document}
    """
    check_packages("the recipe latex", "pylatexenc", extra="latex")
    for part in parts(sources, tally, ("*.tex", "*.ltx")):
        yield from converted([Record({}, part.name)], partial(_paper, part, request.lang), tally)


def _paper(part: Part, lang: str | None, _: Record) -> Record:
    """Return the row of one file; UnwantedError if it lacks a field or is in another language."""
    source = decoded(part.whole(), part.name).replace("\r\n", "\n").replace("\r", "\n")
    if len(source) > _LARGEST_PAPER:
        raise LorakitError(f"{part.name}: more than 4 Mi characters; this is no single paper")
    source = re.sub(_COMMENT, r"\1", source)
    macros = macros_of(source, part.name)
    language = lang if lang in _TITLES else "ja"
    title = _first_field(source, _TITLES[language], macros, part.name)
    abstract = _first_field(source, _ABSTRACTS[language], macros, part.name)
    if not title or not abstract:
        raise UnwantedError("a file without a title and an abstract")
    _check_language(title + abstract, lang)
    return Record({"id": part.inside, "article": abstract, "title": title}, part.name)


def _check_language(text: str, lang: str | None) -> None:
    """Raise UnwantedError for a text in another language than the one asked for."""
    if lang is not None and (lang == "ja") != is_japanese(text):
        raise UnwantedError(f"a paper that is not in the language {lang}")


def _first_field(source: str, names: Sequence[str], macros: dict[str, Macro], where: str) -> str:
    """Return the text of the first of these fields that has any, macro or environment."""
    size = 0
    for name in names:
        for content in _contents(source, name, where):
            size += len(content)
            if size > _LARGEST:
                raise LorakitError(f"{where}: \\{name} of more than 256 Ki characters; cut it")
            text = to_text(expanded(content, macros, where), where)
            if text:
                return text
    return ""


def _contents(source: str, name: str, where: str) -> Iterator[str]:
    """Yield the LaTeX in every macro, then in every environment, with this name."""
    for match in re.finditer(
        rf"\\{name}(?![A-Za-z@])\s*+(?:\[[^\]]{{0,4096}}+\]\s*)?(?=\{{)", source
    ):
        end = group_end(source, match.end())
        if end < 0:
            raise LorakitError(f"{where}: the braces of \\{name} do not close; mend the file")
        yield source[match.end() + 1 : end - 1]
    begin, finish, position = f"\\begin{{{name}}}", f"\\end{{{name}}}", 0
    while (start := source.find(begin, position)) >= 0:
        position = source.find(finish, start)
        if position < 0:
            return
        yield source[start + len(begin) : position]


def group_end(text: str, start: int) -> int:
    """Return the position after the group that opens at `start`; -1 if it does not close."""
    depth = 0
    for match in re.compile(r"\\.|[{}]", re.S).finditer(text, start):
        depth += {"{": 1, "}": -1}.get(match[0], 0)
        if depth == 0:
            return match.end()
    return -1


def _group_ends(text: str) -> dict[int, int]:
    """Return the position after each group, by the one where it opens, of those that close."""
    ends: dict[int, int] = {}
    opened: list[int] = []
    for match in re.finditer(r"\\.|[{}]", text, re.S):
        if match[0] == "{":
            opened.append(match.start())
        elif match[0] == "}" and opened:
            ends[opened.pop()] = match.end()
    return ends


def macros_of(source: str, where: str) -> dict[str, Macro]:
    r"""Return the macros that a paper defines by \newcommand and its variants or by \def.

    Raises LorakitError for bodies that are too long together, as nested ones can be.
    """
    macros: dict[str, Macro] = {}
    ends, size = _group_ends(source), 0
    for match in re.finditer(_DEFINITION, source):
        end = ends.get(match.end())
        if end is None:
            continue
        body = source[match.end() + 1 : end - 1]
        size += len(body)
        if size > _LARGEST_MACROS:
            raise LorakitError(f"{where}: macros of more than 4 Mi characters; define them plainly")
        if match[4]:
            macros[match[4]] = Macro(len(match[5]) // 2, None, body)
        else:
            macros[match[1]] = Macro(int(match[2] or 0), match[3], body)
    return {name: macro for name, macro in macros.items() if name not in _reserved_names()}


@functools.cache
def _reserved_names() -> frozenset[str]:
    """Return the names whose meaning is fixed here, however a paper defines them."""
    fields = [name for table in (_TITLES, _ABSTRACTS) for names in table.values() for name in names]
    return frozenset([*fields, *" ".join(_REMOVED.values()).split()])


def expanded(text: str, macros: dict[str, Macro], where: str) -> str:
    """Return a text with the user's macros expanded; LorakitError if they grow without end."""
    if not macros:
        return text
    for _ in range(_PASSES):
        before, text = text, _expanded_once(text, macros)
        if len(text) > _LARGEST:
            raise LorakitError(f"{where}: macros that grow without end; define them plainly")
        if text == before:
            break
    return text


def _expanded_once(text: str, macros: dict[str, Macro]) -> str:
    """Return a text with every macro replaced by its body; macros in the bodies stay.

    It ends early where the result is longer than _LARGEST.
    """
    ends = _group_ends(text)
    pieces: list[str] = []
    position = size = following = 0
    while size <= _LARGEST and (match := _MACRO_USE.search(text, following)):
        following = match.end()
        if match[1] in macros:
            body, following = _applied(macros[match[1]], text, following, ends)
            pieces += [text[position : match.start()], body]
            size += len(pieces[-2]) + len(body)
            position = following
    return "".join([*pieces, text[position:]])


def _applied(macro: Macro, text: str, position: int, ends: Mapping[int, int]) -> tuple[str, int]:
    """Return the body of a macro with its arguments, read from `position`, and where they end.

    `ends` are those of the text's groups. A body that would be longer than _LARGEST is cut there.
    """
    arguments: list[str] = []
    if macro.default is not None:
        option = _OPTION.match(text, position)
        arguments.append(option[1] if option else macro.default)
        position = option.end() if option else position
    while len(arguments) < macro.arguments:
        argument, position = _argument(text, position, ends)
        arguments.append(argument)
    pieces: list[str] = []
    size = 0
    for index, text_or_number in enumerate(re.split(r"#([1-9])", macro.body)):
        if index % 2 == 0:
            pieces.append(text_or_number)
        else:
            pieces += arguments[int(text_or_number) - 1 :][:1]
        size += len(pieces[-1]) if pieces else 0
        if size > _LARGEST:
            break
    return "".join(pieces), position


def _argument(text: str, position: int, ends: Mapping[int, int]) -> tuple[str, int]:
    """Return the group, macro or character at a position, and where it ends."""
    match = _ARGUMENT.match(text, position)
    if match is None:
        return "", len(text)
    if match[1] == "{" and (end := ends.get(match.start(1))) is not None:
        return text[match.start(1) + 1 : end - 1], end
    return match[1], match.end()


def to_text(fragment: str, where: str) -> str:
    """Return a piece of LaTeX as text in one line, without citations, references and spacing."""
    convert = _converter()
    try:
        text = convert(re.sub(_GLUE, " ", fragment))
    except RecursionError:
        raise LorakitError(f"{where}: braces nested too deeply; mend the file") from None
    except _PARSER_ERRORS as error:
        raise LorakitError(
            f"{where}: LaTeX that cannot be read ({type(error).__name__}); mend the file"
        ) from error
    return _tidied(text)


def _tidied(text: str) -> str:
    """Return a text with spaces folded, and with none after or between Japanese characters."""
    text = re.sub(rf"(?<=[{_WIDE}])[ \t]*\n\s*", "", text.strip())
    text = " ".join(text.split())
    text = re.sub(r"\(\s*\)|（\s*）|\[\s*\]", "", text)
    return re.sub(rf"(?<=[{_WIDE}]) +(?=[{_WIDE}])", "", text)


@functools.cache
def _converter() -> Callable[[str], str]:
    """Return pylatexenc's conversion of LaTeX to text, with our list of macros to remove."""
    import logging

    from pylatexenc import latex2text, latexwalker, macrospec

    logging.getLogger("pylatexenc").setLevel(logging.CRITICAL)  # it prints what it cannot read
    forms = [(name, form) for form, names in _REMOVED.items() for name in names.split()]
    syntax = latexwalker.get_default_latex_context_db()
    specs = [macrospec.std_macro(name, form) for name, form in forms]
    syntax.add_context_category("lorakit", prepend=True, macros=specs)
    meaning = latex2text.get_default_latex_context_db()
    empty = [latex2text.MacroTextSpec(name, simplify_repl=" ") for name, _ in forms]
    empty.append(latex2text.MacroTextSpec("\\", simplify_repl="\n"))
    meaning.add_context_category("lorakit", prepend=True, macros=empty)
    writer = latex2text.LatexNodes2Text(latex_context=meaning, math_mode="text")

    def convert(fragment: str) -> str:
        walker = latexwalker.LatexWalker(fragment, latex_context=syntax, tolerant_parsing=True)
        nodes, _, _ = walker.get_latex_nodes()
        return str(writer.nodelist_to_text(nodes))

    return convert
