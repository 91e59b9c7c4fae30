"""Recipes of documents: LaTeX papers, J-STAGE metadata, news pages, and XML of strangers."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

from lorakit.errors import LorakitError
from lorakit.recipes.latex import expanded, group_end, macros_of, to_text
from lorakit.recipes.readers.decoding import decoded
from tests.support.building import built, save, tallied


def article_of(record: dict[str, Any]) -> str:
    return str(record["prompt"].split(": ", 1)[1].rpartition("\nTitle:")[0])


# — LaTeX —

PAPER = r"""
% \jtitle{古い題}
\documentclass{jnlp}
\newcommand{\sys}{提案\textbf{システム}}
\newcommand{\twice}[2][二]{#1回の#2}
\def\pair#1#2{#1と#2}
\jtitle[短い題]{{\sys}による\\ 要約\thanks{謝辞{入れ子}}}
\etitle{Summarization by a System}
\jabstract{%
本稿では\sys を提案する．% 注釈 }
\vspace{-2mm}

\pair{単語}{文}を\twice{評価}し，精度は95\%であった~\cite[p.~3]{a,b}．
図\ref{fig:a}に LSTM と
BERT の結果を\footnote{脚注}示す．$\alpha$は{\it 係数}である．\vskip 3mm plus 1pt
\twice[三]{検証}した（\citep{c}）．
}
\eabstract{We propose a system \cite{a}.}
\begin{document}\maketitle 本文\end{document}
"""
ABSTRACT = (
    "本稿では提案システムを提案する．単語と文を二回の評価し，精度は95%であった．"
    "図にLSTM とBERT の結果を示す．αは係数である．三回の検証した．"
)


def test_a_paper_gives_its_japanese_title_and_abstract_as_text(tmp_path: Path) -> None:
    (record,) = built("latex", save(tmp_path / "V01N01-01.tex", PAPER))
    assert record["completion"] == " 提案システムによる要約"
    assert article_of(record).replace(" ", "") == ABSTRACT.replace(" ", "")
    assert record["id"] == "V01N01-01.tex"


def test_the_language_chooses_the_fields_and_the_papers(tmp_path: Path) -> None:
    save(tmp_path / "a.tex", PAPER)
    save(tmp_path / "b.tex", r"\title{On X}\begin{abstract}We study X.\end{abstract}")
    records, tally = tallied("latex", tmp_path, lang="ja")
    assert [record["id"] for record in records] == ["a.tex"]
    assert tally.removed == {"a paper that is not in the language ja": 1}
    assert [record["completion"] for record in built("latex", tmp_path, lang="en")] == [
        " Summarization by a System",
        " On X",
    ]
    assert len(built("latex", tmp_path)) == 2


@pytest.mark.parametrize(
    "encoding", ["utf-8", "utf-8-sig", "euc_jp", "shift_jis", "cp932", "iso2022_jp"]
)
@pytest.mark.parametrize("line_end", ["\n", "\r\n", "\r"])
def test_old_encodings_and_line_ends_are_read(encoding: str, line_end: str, tmp_path: Path) -> None:
    text = "\\title{機械翻訳の研究}\n\\begin{abstract}\nカナと漢字、仮名。\n\\end{abstract}\n"
    path = save(tmp_path / "a.tex", text.replace("\n", line_end).encode(encoding))
    (record,) = built("latex", path)
    assert (article_of(record), record["completion"]) == (
        "カナと漢字、仮名。",
        " 機械翻訳の研究",
    )


def test_bytes_of_no_known_encoding_are_an_error() -> None:
    with pytest.raises(LorakitError, match=r"^a\.tex: not UTF-8, EUC-JP, .*; save"):
        decoded(b"\xff\xfe\x00\x81", "a.tex")


@pytest.mark.parametrize(
    ("fragment", "text"),
    [
        (r"a\cite{b} c", "a c"),
        (r"a\,b\hspace*{1cm}c\label{x}", "a b c"),
        (r"50\% of \textbf{\emph{all}}", "50% of all"),
        (r"{\bf 太字}と{\em 強調}", "太字と強調"),
        ("日本語の\n改行", "日本語の改行"),
        ("an English\nline", "an English line"),
        (r"\begin{itemize}\item a\end{itemize}", "* a"),
        (r"G\"odel \'e", "Gödel é"),
        (r"\unknown{x} y", "x y"),
        (r"a\vskip -1.5zw b\kern\parindent c", "a b c"),
        (r"unclosed {brace", "unclosed brace"),
        ("", ""),
    ],
)
def test_latex_becomes_text(fragment: str, text: str) -> None:
    assert to_text(fragment, "x").replace("\u2009", " ") == text


def test_what_the_parser_trips_over_is_one_error_and_prints_nothing(capfd: Any) -> None:
    with pytest.raises(LorakitError, match=r"^x: LaTeX that cannot be read \(\w+\); mend"):
        to_text(r"\begin#1\verb", "x")
    to_text(r"\frac", "x")
    assert capfd.readouterr() == ("", "")


def test_macros_are_expanded_with_their_arguments() -> None:
    macros = macros_of(
        r"\newcommand\a{A}\renewcommand{\b}[2][x]{#1-#2}\def\c#1{<#1>}\newcommand{\cite}{no}"
        r"\newcommand{\jtitle}[1]{no}\newcommand{\open}{",
        "x",
    )
    assert set(macros) == {"a", "b", "c"}
    assert expanded(r"\a \b{y} \b[z]{\a} \c w \ab \c", macros, "x") == r"Ax-y z-A<w> \ab <>"


@pytest.mark.parametrize(
    "definitions",
    [
        r"\newcommand{\x}{\x\x}",
        r"\def\x{\y\y\y\y\y\y\y\y}\def\y{\x\x\x\x\x\x\x\x}",
        "".join(
            rf"\def\{c}{{{(chr(92) + d) * 10}}}"
            for c, d in zip("xabcdefgh", "abcdefghi", strict=True)
        ),
    ],
    ids=["itself", "each other", "a tower"],
)
def test_macros_without_end_are_an_error_soon(definitions: str) -> None:
    with pytest.raises(LorakitError, match=r"p\.tex: macros that grow without end; "):
        expanded(r"\x" * 3, macros_of(definitions, "p.tex"), "p.tex")


def test_a_macro_that_is_itself_ends() -> None:
    assert expanded(r"\x", macros_of(r"\def\x{\x}", "p"), "p") == r"\x"


def test_braces_that_do_not_close_or_nest_too_deeply_are_errors(tmp_path: Path) -> None:
    with pytest.raises(LorakitError, match=r"the braces of \\jtitle do not close"):
        built("latex", save(tmp_path / "a.tex", r"\jtitle{x \jabstract{y}"))
    assert group_end(r"{\{{}\}}x", 0) == 8
    deep = "{" * 20_000 + "}" * 20_000
    with pytest.raises(LorakitError, match="nested too deeply"):
        built("latex", save(tmp_path / "b.tex", rf"\title{{{deep}}}\jabstract{{y}}"))


# — J-STAGE —

JATS = """<?xml version="1.0" encoding="UTF-8"?>
<!DOCTYPE article PUBLIC "-//NLM//DTD JATS v1.1//EN" "http://none.invalid/JATS.dtd">
<article xmlns:xlink="http://www.w3.org/1999/xlink" xml:lang="ja"><front><article-meta>
<article-id pub-id-type="doi">10.1/{n}</article-id>
<title-group><article-title>急性腹症の<italic>1</italic>例</article-title>
<trans-title-group xml:lang="en"><trans-title>A case&nbsp;of pain</trans-title></trans-title-group>
</title-group>
<abstract><title>抄録</title><p>症例は60歳の男性。</p><p>腹痛で受診した。</p></abstract>
<trans-abstract xml:lang="en"><p>A man of 60 came.</p></trans-abstract>
</article-meta></front>
<back><ref-list><ref><article-title>他の論文</article-title></ref></ref-list></back></article>"""


def test_jats_gives_the_titles_and_abstracts_of_each_language(tmp_path: Path) -> None:
    path = save(tmp_path / "a.xml", JATS)
    (record,) = built("jstage", path)
    assert (record["id"], record["completion"]) == ("10.1/{n}", " 急性腹症の1例")
    assert article_of(record) == "症例は60歳の男性。 腹痛で受診した。"
    (record,) = built("jstage", path, lang="en")
    assert (article_of(record), record["completion"]) == ("A man of 60 came.", " A case of pain")
    records, tally = tallied("jstage", path, lang="zh")
    assert (records, tally.removed) == ([], {"an article without title and abstract in zh": 1})


def test_dublin_core_records_are_read_one_by_one(tmp_path: Path) -> None:
    record = (
        "<record><metadata><oai_dc:dc><dc:identifier>i{}</dc:identifier>"
        '<dc:title xml:lang="ja">題名の{}</dc:title><dc:title xml:lang="en">T</dc:title>'
        '<dc:description xml:lang="ja">要旨の{}</dc:description></oai_dc:dc></metadata></record>'
    )
    rows = "".join(record.format(number, number, number) for number in range(500))
    path = save(tmp_path / "a.xml", f"<OAI-PMH><ListRecords>{rows}</ListRecords></OAI-PMH>")
    records = built("jstage", path)
    assert [record["id"] for record in records] == [f"i{number}" for number in range(500)]
    assert (article_of(records[7]), records[7]["completion"]) == ("要旨の7", " 題名の7")


PAGE = """<!DOCTYPE html><html><head><meta charset="{charset}">
<meta name="citation_title" content="肺炎の1例"/><META NAME="citation_doi" CONTENT="10.1/x">
<meta name="citation_abstract" content="&lt;p&gt;症例は&lt;b&gt;女性&lt;/b&gt;。&lt;/p&gt;">
</head><body><p>x</body></html>"""


@pytest.mark.parametrize("charset", ["utf-8", "euc-jp", "shift_jis"])
def test_a_page_gives_what_its_meta_tags_say(charset: str, tmp_path: Path) -> None:
    path = save(tmp_path / "a.html", PAGE.format(charset=charset).encode(charset))
    (record,) = built("jstage", path)
    assert (record["id"], record["completion"]) == ("10.1/x", " 肺炎の1例")
    assert article_of(record) == "症例は女性。"


def test_an_article_without_an_abstract_is_counted(tmp_path: Path) -> None:
    path = save(tmp_path / "a.xml", "<article><article-title>題の</article-title></article>")
    records, tally = tallied("jstage", path)
    assert (records, tally.removed) == ([], {"an article without title and abstract": 1})


LAUGHS = "".join(f'<!ENTITY l{n} "{f"&l{n - 1};" * 10}">' for n in range(1, 10))
HOSTILE = {
    "entity bomb": f'<!DOCTYPE a [<!ENTITY l0 "ha">{LAUGHS}]><article>&l9;</article>',
    "external entity": '<!DOCTYPE a [<!ENTITY x SYSTEM "file:///etc/passwd">]><article>&x;</article>',
    "parameter entity": '<!DOCTYPE a [<!ENTITY % x SYSTEM "file:///etc/passwd">%x;]><article/>',
    "undefined entity": "<article><title>&nothing;</title></article>",
    "deep": "<article>" + "<b>" * 5000,
    "cut short": "<article><title>x",
    "not XML": "<article",
    "empty": "",
}


@pytest.mark.parametrize("name", HOSTILE)
@pytest.mark.parametrize("recipe", ["jstage", "wmt"])
def test_hostile_xml_is_an_error_that_names_the_file(
    name: str, recipe: str, tmp_path: Path
) -> None:
    content = HOSTILE[name] if recipe == "jstage" else HOSTILE[name].replace("article", "doc")
    if recipe == "wmt" and name == "empty":
        return
    with pytest.raises(LorakitError, match=r"a\.xml.*; "):
        built(recipe, save(tmp_path / "a.xml", content))


def test_a_broken_file_among_many_is_skipped_and_counted(tmp_path: Path) -> None:
    save(tmp_path / "a.xml", JATS)
    save(tmp_path / "b.xml", "<article><title>x")
    save(tmp_path / "c.xml", JATS)
    records, tally = tallied("jstage", tmp_path)
    assert (len(records), tally.skipped) == (2, 1)
    with pytest.raises(LorakitError, match=r"b\.xml:1: not XML"):
        built("jstage", tmp_path)


def test_documents_of_one_name_in_several_folders_have_ids_of_their_own(tmp_path: Path) -> None:
    for folder in ("a", "b"):
        save(tmp_path / folder / "main.tex", PAPER)
    assert [record["id"] for record in built("latex", tmp_path)] == ["a/main.tex", "b/main.tex"]


# — news —

NEWS = """<html lang="ja"><head><title>株が上昇 - ニュース</title>
<meta property="og:url" content="https://news.example/1"></head><body>
<header><ul><li>ここは見出しではないメニュー</li></ul></header>
<nav><ul><li>国内のニュースを見る</li><li>海外のニュースを見る</li></ul></nav>
<main><article><h1>株が上昇</h1><div class="share-bar"><ul><li>この記事を共有する</li></ul></div>
{highlights}
<p>東京株式市場で月曜日、株価が二パーセント上昇した。輸出関連の企業が上昇を主導したと市場関係者は話している。</p>
<p>円は主要な通貨に対して下落し、輸出企業の採算が改善するとの期待が広がった。取引量は今年最大となった。</p>
<ul><li>本文の後にある関連する一覧の項目</li></ul>
</article></main><footer><p>著作権は当社にあります。無断で転載することを禁じます。</p></footer></body></html>"""
LIST = "<ul class='points'><li>株価が二パーセント上昇した</li><li> 輸出企業が <b>主導</b></li></ul>"


def test_highlights_are_the_list_between_heading_and_text(tmp_path: Path) -> None:
    (record,) = built("news-html", save(tmp_path / "a.html", NEWS.format(highlights=LIST)))
    assert record["completion"] == " 株が上昇\n株価が二パーセント上昇した\n輸出企業が 主導"
    assert (record["id"], record["title"]) == ("https://news.example/1", "株が上昇")
    article = record["prompt"].split("Article: ")[1]
    assert article.startswith("東京株式市場で月曜日、")
    assert "取引量は今年最大" in article
    assert not [other for other in ("著作権", "国内の", "共有", "主導</b>") if other in article]
    assert "輸出企業が 主導" not in article


@pytest.mark.parametrize(
    "selector", ["ul.points", "ul.points > li", "main .points, .points li", "UL.points"]
)
def test_a_selector_names_the_highlights(selector: str, tmp_path: Path) -> None:
    page = NEWS.format(highlights="").replace("</article>", f"{LIST}</article>")
    path = save(tmp_path / "a.html", page)
    (record,) = built("news-html", path, highlights=selector)
    assert record["completion"] == " 株が上昇\n株価が二パーセント上昇した\n輸出企業が 主導"


@pytest.mark.parametrize(
    "highlights",
    [
        "",
        "<ul><li>短い</li></ul>",
        "<ul><li><a href='/a'>この項目はリンクだけでできている</a></li></ul>",
        "<ul>" + "<li>項目が多すぎる一覧は目次である</li>" * 9 + "</ul>",
        "<p>本文がここから始まっているので、この後に来る一覧は要点ではないものと見なされる。</p>"
        + LIST,
    ],
    ids=["none", "short", "links", "many", "after the text"],
)
def test_a_page_without_highlights_is_counted(highlights: str, tmp_path: Path) -> None:
    path = save(tmp_path / "a.html", NEWS.format(highlights=highlights))
    records, tally = tallied("news-html", path)
    assert (records, tally.removed) == ([], {"a page without highlights": 1})


def test_a_bad_selector_is_an_error(tmp_path: Path) -> None:
    path = save(tmp_path / "a.html", NEWS)
    with pytest.raises(LorakitError, match=r"--highlights 'ul\[': .*; mend the selector"):
        built("news-html", path, highlights="ul[")


@pytest.mark.parametrize(
    "page",
    [
        "",
        " ",
        "<!DOCTYPE html [<!ENTITY x SYSTEM 'file:///etc/passwd'>]><h1>t</h1><p>&x;</p>",
        "<div>" * 50_000,
        "<?xml version='1.0' encoding='utf-8'?><html><body><h1>t</h1></body></html>",
        "\x00\x01<li>",
    ],
    ids=["empty", "blank", "external entity", "deep", "XHTML", "control characters"],
)
def test_a_hostile_page_ends_as_an_error_or_is_counted(page: str, tmp_path: Path) -> None:
    records, tally = tallied("news-html", save(tmp_path / "a.html", page))
    assert records == []
    assert tally.skipped + sum(tally.removed.values()) == 1


@pytest.mark.parametrize(
    ("recipe", "module", "extra"),
    [("latex", "pylatexenc", "latex"), ("news-html", "trafilatura", "html")],
)
def test_a_missing_parser_is_named_with_its_extra(
    recipe: str, module: str, extra: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lorakit.recipes import latex

    latex._converter.cache_clear()
    monkeypatch.setitem(sys.modules, module, None)
    page = save(tmp_path / "a.html", NEWS.format(highlights=LIST))
    source = save(tmp_path / "a.tex", PAPER) if recipe == "latex" else page
    with pytest.raises(LorakitError, match=rf"pip install 'lorakit\[{extra}\]'"):
        built(recipe, source)
