"""The encodings that Japanese and Chinese files declare, in XML and in pages."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest

from lorakit.errors import LorakitError
from lorakit.recipes.readers.decoding import decoded
from lorakit.recipes.readers.sources import Part
from lorakit.recipes.readers.xmltrees import elements, text_in
from tests.support.program import run

TEXTS = {
    "EUC-JP": "日本語の要約です。",
    "euc-jp": "ひらがなと漢字",
    "Shift_JIS": "表の能力①",  # the second byte of the first is a backslash; ① is Microsoft's
    "Windows-31J": "髙橋",
    "ISO-2022-JP": "日本語",
    "GB2312": "摘要镕",  # the last is of GBK only, as in many files that declare GB2312
    "GB18030": "𠀀摘要",
    "Big5": "摘要許功蓋",
    "EUC-KR": "한국어",
    "UTF-8": "日本語é",
    "UTF-16": "日本語",
    "ISO-8859-1": "é",
    "windows-1252": "“é”",
}

# What files that declare these are really written in.
WRITTEN_IN = {"Shift_JIS": "cp932", "Windows-31J": "cp932", "GB2312": "gb18030"}


def part(content: bytes) -> Part:
    return Part("a.xml", io.BufferedReader(io.BytesIO(content)))


def xml(encoding: str, text: str, padding: int = 0) -> bytes:
    body = f'<?xml version="1.0" encoding="{encoding}"?>\n<d>{" " * padding}<p>{text}</p></d>'
    return body.encode(WRITTEN_IN.get(encoding, encoding))


@pytest.mark.parametrize("padding", [0, 65536 - 58, 65536 - 57, 65536 - 56])
@pytest.mark.parametrize("encoding", TEXTS)
def test_xml_is_read_in_the_encoding_it_declares(encoding: str, padding: int) -> None:
    ((where, element),) = elements(part(xml(encoding, TEXTS[encoding], padding)), frozenset({"p"}))
    assert (where, text_in(element)) == ("a.xml:2", TEXTS[encoding])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (xml("UTF-8", "é").replace(b"UTF-8", b"klingon"), "a.xml: declares the encoding 'klingon'"),
        (xml("UTF-8", "é").replace(b"UTF-8", b"undefined"), "the encoding 'undefined', which"),
        (xml("UTF-8", "é").replace(b"UTF-8", b"punycode"), "the encoding 'punycode', which"),
        (xml("UTF-8", "é").replace(b"UTF-8", b"hex"), "the encoding 'hex', which"),
        (xml("EUC-JP", "日本")[:-12], "a.xml:2: not XML"),
        (xml("UTF-8", "日").replace(b"UTF-8", b"EUC-JP"), "a.xml:2: not in the encoding euc_jp"),
        (b"<d>\n\n<p>\xff</p></d>", "a.xml:3: not in the encoding utf-8"),
    ],
    ids=["unknown", "undefined", "punycode", "no-text", "cut", "wrong", "undeclared"],
)
def test_xml_in_no_encoding_or_another_is_an_error_in_one_line(
    content: bytes, message: str
) -> None:
    with pytest.raises(LorakitError, match=message):
        list(elements(part(content), frozenset({"p"})))


@pytest.mark.parametrize("charset", ["undefined", "punycode", "idna", "unicode_escape", "klingon"])
def test_a_page_that_declares_no_encoding_of_documents_is_read_as_utf_8(charset: str) -> None:
    content = f'<meta charset="{charset}"><p>日本語 \\u0041</p>'.encode()
    assert decoded(content, "page", charset) == content.decode()


@pytest.mark.parametrize("encoding", ["EUC-JP", "Shift_JIS", "GB2312", "Big5"])
def test_translations_in_an_old_encoding_become_records(encoding: str, tmp_path: Path) -> None:
    text = TEXTS[encoding]
    content = (
        f'<?xml version="1.0" encoding="{encoding}"?><dataset id="wmt"><doc id="d">'
        f'<src lang="en"><p><seg id="1">A summary.</seg></p></src>'
        f'<ref lang="zh" translator="A"><p><seg id="1">{text}</seg></p></ref></doc></dataset>'
    )
    path = tmp_path / "wmt.xml"
    path.write_bytes(content.encode(WRITTEN_IN.get(encoding, encoding)))
    done = run("build-dataset", "wmt", str(path))
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["completion"].strip() == text
