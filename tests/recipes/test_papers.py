"""Recipes of the adaptive-merge paper's tasks in files of rows: XL-Sum, WikiLingua, MIMIC, SciTLDR.

Plus the other dialogue, translation and question sets in the forms that no shared sample has.
"""

from __future__ import annotations

import io
import json
import os
import pickle
import pickletools
from pathlib import Path
from typing import Any

import pytest

from lorakit.errors import LorakitError
from lorakit.recipes.filters import count_words, unspaced
from lorakit.recipes.mimic import sections_of
from tests.support.building import built, pairs, run, save, tallied


def lines(*rows: dict[str, Any]) -> str:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


# — XL-Sum —


def test_xlsum_keeps_the_articles_other_fields(tmp_path: Path) -> None:
    row = {"id": "1", "url": "u", "title": "t", "summary": " S. ", "text": "A\n\nB"}
    (record,) = built("xlsum", save(tmp_path / "english_val.jsonl", lines(row)))
    instruction = "Summarize the following Article in no more than three sentence."
    prompt = f"{instruction}\nArticle: A\n\nB\nSummary:"
    fields = {"id": "1", "prompt": prompt, "completion": " S.", "url": "u", "title": "t"}
    assert record == {**fields, "document": [73, 77]}


def test_empty_texts_are_counted_and_missing_ones_are_errors(tmp_path: Path) -> None:
    path = save(tmp_path / "a.jsonl", lines({"text": " ", "summary": "s"}, {"text": "t"}))
    records, tally = tallied("xlsum", path)
    assert (records, tally.skipped) == ([], 1)
    assert tally.removed == {"an empty text where the data set has one": 1}
    with pytest.raises(LorakitError, match=r"a\.jsonl:2: no field 'summary'; "):
        built("xlsum", path)


# — WikiLingua —

GUIDES = {
    "https://www.wikihow.com/Cut-a-Stem": {
        "Preparing": {"summary": "Take a knife. Wash it.", "document": "Choose one.\n Use soap."},
        "Cutting": {"summary": ["Cut.", "Wait."], "document": ["Away from you.", "An hour."]},
    },
    "https://www.wikihow.com/Rest": {"Resting": {"summary": "Sit.", "document": ""}},
}


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_wikilinguas_pickles_give_a_record_a_method(protocol: int, tmp_path: Path) -> None:
    path = save(tmp_path / "english.pkl", pickle.dumps(GUIDES, protocol))
    records, tally = tallied("wikilingua", path)
    assert [record["completion"] for record in records] == [
        " Take a knife. Wash it.",
        " Cut. Wait.",
    ]
    assert records[0]["id"] == "https://www.wikihow.com/Cut-a-Stem#Preparing"
    assert "How-to Guide: Choose one. Use soap.\n" in records[0]["prompt"]
    assert sum(tally.removed.values()) == 1


class Bomb:
    def __reduce__(self) -> Any:
        return os.system, ("touch exploded",)


class Stateful:
    def __init__(self) -> None:
        self.url = {"s": {"document": "d", "summary": "s"}}


@pytest.mark.parametrize(
    "content",
    [
        pytest.param(pickle.dumps(Bomb()), id="a call"),
        pytest.param(pickle.dumps({"u": {"s": {"document": Bomb(), "summary": "s"}}}), id="inside"),
        pytest.param(pickle.dumps(Bomb(), 0), id="a call, as text"),
        pytest.param(b"cos\nsystem\n(S'touch exploded'\ntR.", id="a name"),
        pytest.param(b"(S'touch exploded'\nios\nsystem\n.", id="an instance"),
        pytest.param(b"\x80\x02\x82\x01.", id="a registered extension"),
        pytest.param(b"\x80\x02X\x01\x00\x00\x00aQ.", id="a persistent id"),
        pytest.param(pickle.dumps(Stateful()), id="an object"),
        pytest.param(pickle.dumps({"u"}), id="a set"),
        pytest.param(pickle.dumps(["u"]), id="a list"),
        pytest.param(pickle.dumps({"u": {"s": "text"}}), id="too flat"),
        pytest.param(pickle.dumps({1: {}}), id="a number as key"),
        pytest.param(pickle.dumps(GUIDES)[:-20], id="cut short"),
        pytest.param(b"\x80\x04\x8e" + b"\xff" * 8, id="a huge length"),
        pytest.param(b"\x80\x05.", id="empty stack"),
        pytest.param(b"\x80\x63.", id="an unknown protocol"),
        pytest.param(b"", id="empty"),
    ],
)
def test_a_pickle_of_anything_else_is_refused_and_runs_nothing(
    content: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    path = save(tmp_path / "a.pkl", content)
    with pytest.raises(LorakitError, match=r"a\.pkl: .*; give WikiLingua's own"):
        built("wikilingua", path)
    assert not (tmp_path / "exploded").exists()


def test_the_pickles_of_the_tests_are_what_they_claim() -> None:
    names = {code.name for code, _, _ in pickletools.genops(pickle.dumps(Bomb()))}
    assert {"STACK_GLOBAL", "REDUCE"} <= names


def test_wikilinguas_gem_form_is_filtered_by_language(tmp_path: Path) -> None:
    row = {"gem_id": "g", "source": "S.", "target": "T.", "references": ["T.", "U."]}
    rows = [
        {**row, "source_language": "ja", "target_language": "ja"},
        {**row, "source_language": "ja", "target_language": "en"},
    ]
    path = save(tmp_path / "train.jsonl", lines(*rows))
    assert len(built("wikilingua", path)) == 2
    records, tally = tallied("wikilingua", path, lang="ja")
    assert records[0]["references"] == ["T.", "U."]
    assert (len(records), tally.removed) == (1, {"a guide in another language than --lang": 1})


@pytest.mark.parametrize("references", [5, "T."])
def test_wikilinguas_references_are_a_list(references: object, tmp_path: Path) -> None:
    path = save(tmp_path / "train.jsonl", lines({"source": "S.", "references": references}))
    with pytest.raises(LorakitError, match=r"train\.jsonl:1: 'references' is not a list; "):
        built("wikilingua", path)


def test_wikilinguas_hub_form_has_lists_side_by_side(tmp_path: Path) -> None:
    article = {"section_name": ["a", "b"], "document": ["D1", "D2"], "summary": ["S1", "S2"]}
    path = save(tmp_path / "train.jsonl", lines({"url": "u", "article": article}))
    assert [(r["id"], r["completion"]) for r in built("wikilingua", path)] == [
        ("u#a", " S1"),
        ("u#b", " S2"),
    ]


# — MIMIC —

REPORTS: dict[str, tuple[str, tuple[str, str]]] = {
    "plain": ("FINDINGS:  A b.\n\n IMPRESSION:  C.", ("A b.", "C.")),
    "no headings": ("The lungs are clear.", ("", "")),
    "findings only": ("FINDINGS: a", ("a", "")),
    "prose that ends in a heading's word": (
        "FINDINGS: in keeping with\n findings\n and in\n conclusion, clear.\nIMPRESSION: n",
        ("in keeping with findings and in conclusion, clear.", "n"),
    ),
    "sub-headings stay": ("FINDINGS:\n LUNGS: clear\n BONES: old\nIMPRESSION: n",
                          ("LUNGS: clear BONES: old", "n")),
    "qualified": ("CT OF THE CHEST FINDINGS: a\n\nCONCLUSION:\n1. b\n2. c", ("a", "1. b 2. c")),
    "mixed case": ("Chest CT Findings: a\nImpressions: b", ("a", "b")),
    "no colon": ("FINDINGS\n a\n\nIMPRESSION\n b", ("a", "b")),
    "one line": ("INDICATION: x FINDINGS: a b IMPRESSION: c", ("a b", "c")),
    "impression first": ("IMPRESSION: c\nFINDINGS: a b\nTECHNIQUE: x", ("a b", "c")),
    "rule": ("FINDINGS: a\nIMPRESSION: c\n______________\n DR. [**Name**]", ("a", "c")),
    "what follows": ("FINDINGS: a\nIMPRESSION: c\nRECOMMENDATION(S): x", ("a", "c")),
    "marks across lines": ("FINDINGS: seen at [**Hospital\n 12**]\nIMPRESSION: c",
                           ("seen at [**Hospital 12**]", "c")),
    "page break": (
        "FINDINGS: a\n  (Over)\n\n [**2101-1-1**] CT Clip # 1\n FINAL REPORT\n (Cont)\n b"
        "\nIMPRESSION: c",
        ("a b", "c"),
    ),
    "wet read": ("WET READ: IMPRESSION: wet\n FINAL REPORT *ABN!\n FINDINGS: a\n IMPRESSION: c",
                 ("a", "c")),
    "addendum": ("FINAL REPORT\nFINDINGS: a\nIMPRESSION: c\nFINAL REPORT\nADDENDUM: x", ("a", "c")),
    "provisional": ("PROVISIONAL FINDINGS IMPRESSION (PFI): q\n FINDINGS: a\n IMPRESSION: c",
                    ("a", "c")),
    "both in one": ("FINDINGS AND IMPRESSION: a", ("", "")),
    "CRLF": ("FINDINGS:\r\n a\r\nIMPRESSION:\r\n c\r\n", ("a", "c")),
}  # fmt: skip


@pytest.mark.parametrize("name", REPORTS)
def test_sections_are_found_under_the_headings_that_reports_have(name: str) -> None:
    report, sections = REPORTS[name]
    assert sections_of(report) == sections


@pytest.mark.parametrize("report", ["(Over)" * 5000, "FINAL REPORT\n" * 20000, " \t" * 20000])
def test_a_strange_report_takes_no_long_time(report: str) -> None:
    assert sections_of(report) == ("", "")


NOTES = """\ufeff"ROW_ID","SUBJECT_ID","CATEGORY","ISERROR","TEXT"\r
1,10,"Radiology",,"FINDINGS: a b c d\r
IMPRESSION: e ""f"" "\r
2,10,"Nursing",,"x"\r
3,10,"Radiology","1","FINDINGS: a b c\r
IMPRESSION: e"\r
4,10,"Radiology",,"FINDINGS: a b c\r
IMPRESSION: e f g"\r
5,10,"Radiology",,"IMPRESSION: e"\r
"""


def test_noteevents_is_filtered_and_every_removal_has_its_reason(tmp_path: Path) -> None:
    records, tally = tallied("mimic", save(tmp_path / "NOTEEVENTS.csv", NOTES))
    prompt = "Summarize the following radiology report.\nFindings: a b c d\nImpression:"
    fields = {"id": "1", "prompt": prompt, "completion": ' e "f"', "subject_id": "10"}
    assert records == [{**fields, "document": [52, 59]}]
    assert tally.removed == {
        "a note that is not of the category Radiology": 1,
        "a note that MIMIC marks as an error": 1,
        "findings of fewer words than 1.5 times the impression's": 1,
        "a report without findings": 1,
    }


@pytest.mark.parametrize(("ratio", "count"), [(0, 2), (1, 2), (1.01, 1), (2, 1), (2.1, 0)])
def test_the_ratio_is_the_users(ratio: float, count: int, tmp_path: Path) -> None:
    assert len(built("mimic", save(tmp_path / "n.csv", NOTES), min_ratio=ratio)) == count


def test_mimic_reads_columns_and_folders_of_reports(tmp_path: Path) -> None:
    table = save(tmp_path / "a.csv", "study_id,findings,impression\n7,a b c,d\n")
    assert built("mimic", table)[0]["id"] == "7"
    for name in ("s2.txt", "p1/s1.txt"):
        save(tmp_path / "reports" / name, "FINDINGS: a, b, c\nIMPRESSION: d")
    records = built("mimic", tmp_path / "reports")
    assert [record["id"] for record in records] == ["p1/s1.txt", "s2.txt"]


# — SciTLDR —


def test_scitldrs_full_text_may_be_sentences_by_section(tmp_path: Path) -> None:
    row = {"source": [["One.", "Two."], ["Three."]], "target": ["T"], "paper_id": "p"}
    (record,) = built("scitldr", save(tmp_path / "a.jsonl", lines(row)))
    assert "Key Sections: One. Two. Three.\n" in record["prompt"]


# — dialogues —

CHAT = {"id": "1", "dialogue": 'A: x, "y"\r\nB: z', "summary": "S"}
CSV = '\ufeffid,dialogue,summary\r\n1,"A: x, ""y""\r\nB: z",S\r\n'
EXPECTED = 'Summarize the following dialogue.\nDialogue: A: x, "y"\nB: z\nSummary:'


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("train.json", json.dumps([CHAT])),
        ("train.json", json.dumps([CHAT], indent=2)),
        ("train.jsonl", lines(CHAT)),
        ("train.csv", CSV),
    ],
)
def test_samsum_is_read_in_every_form(name: str, content: str, tmp_path: Path) -> None:
    save(tmp_path / name, content)
    for source in (tmp_path, tmp_path / name):
        assert pairs(built("samsum", source)) == [(EXPECTED, " S")]
    result = run("samsum", stdin=content)
    assert json.loads(result.stdout)["prompt"] == EXPECTED


def test_an_empty_dialogue_is_removed_and_counted(tmp_path: Path) -> None:
    path = save(tmp_path / "a.json", json.dumps([{**CHAT, "dialogue": ""}]))
    records, tally = tallied("samsum", path)
    assert (records, sum(tally.removed.values())) == ([], 1)


def test_ecommerce_asks_whether_a_response_fits(tmp_path: Path) -> None:
    path = save(tmp_path / "train.txt", "1\t有 现货 吗\t有 的 iPhone 12\n0\ta b\tc\n")
    first, second = built("ecommerce", path)
    assert first["prompt"].endswith("Dialogue:\n有现货吗\nResponse: 有的iPhone 12\nAnswer:")
    assert (first["completion"], second["completion"]) == (" Yes", " No")
    with pytest.raises(LorakitError, match=r"t\.txt:1: not a label"):
        built("ecommerce", save(tmp_path / "t.txt", "2\ta\tb\n"))


# — translations —

XML = """<?xml version='1.0' encoding='utf-8'?>
<dataset id="wmt"><collection id="general"><doc id="d1" origlang="en">
<src lang="en"><p><seg id="1">One &amp; <b>two</b>.</seg><seg id="2">Three.</seg></p></src>
<ref lang="zh" translator="A"><p><seg id="1">一。</seg><seg id="2">三。</seg></p></ref>
<ref lang="zh" translator="B"><p><seg id="1">壹。</seg></p></ref>
<ref lang="de" translator="A"><p><seg id="1">Eins.</seg></p></ref>
<hyp system="x" language="zh"><p><seg id="1">no</seg></p></hyp>
</doc></collection></dataset>"""


def test_wmts_xml_gives_every_reference_of_the_target(tmp_path: Path) -> None:
    first, second = built("wmt", save(tmp_path / "a.xml", XML))
    assert first["prompt"].endswith("English: One & two.\nChinese:")
    assert (first["id"], first["references"]) == ("d1:1", ["一。", "壹。"])
    assert (second["completion"], "references" in second) == (" 三。", False)
    records, tally = tallied("wmt", tmp_path / "a.xml", target="de")
    assert [record["completion"] for record in records] == [" Eins."]
    assert tally.removed == {"a segment without text on one side": 1}


def test_parallel_files_and_tables_of_pairs_are_read(tmp_path: Path) -> None:
    left = save(tmp_path / "t.en-ja.src.en", "One.\n\nTwo.\n")
    right = save(tmp_path / "t.en-ja.ref.refA.ja", "一。\n空\n二。\n")
    records, tally = tallied("wmt", left, right, target="ja")
    assert [record["id"] for record in records] == ["t.en-ja.src.en:1", "t.en-ja.src.en:3"]
    assert records[0]["prompt"] == "Translate from English to Japanese.\nEnglish: One.\nJapanese:"
    assert sum(tally.removed.values()) == 1
    assert built("wmt", tmp_path, target="ja") == records
    table = save(tmp_path / "t.tsv", "One.\t一。\tx\n")
    assert pairs(built("text-pairs", table)) == [("One.", " 一。")]
    records = built("text-pairs", left, right, template="{{target}}=", completion="{{source}}")
    assert pairs(records)[0] == ("一。=", "One.")


@pytest.mark.parametrize(("left", "right"), [("a\nb\n", "c\n"), ("a\n", "c\nd\n")])
def test_parallel_files_of_different_length_are_an_error(
    left: str, right: str, tmp_path: Path
) -> None:
    files = save(tmp_path / "one", left), save(tmp_path / "other", right)
    shorter = "other" if len(left) > len(right) else "one"
    with pytest.raises(LorakitError, match=rf":2: \S*{shorter} has no line for it; "):
        built("text-pairs", *files)


def test_hotpotqas_hub_form_is_the_same_to_it(tmp_path: Path) -> None:
    row = {"question": "Q", "answer": "A", "_id": "1"}
    listed = {**row, "context": [["T", ["One.", " Two."]], ["U", ["Three."]]]}
    columns = {"title": ["T", "U"], "sentences": [["One.", " Two."], ["Three."]]}
    by_columns = {**row, "context": columns}
    pairwise, columnwise = (
        built("hotpotqa", save(tmp_path / name, lines(fields)))
        for name, fields in (("a", listed), ("b", by_columns))
    )
    assert pairwise == columnwise
    assert "\nT: One. Two.\nU: Three.\nQuestion: Q\n" in pairwise[0]["prompt"]


@pytest.mark.parametrize("context", [5, {"title": 5, "sentences": [["One."]]}], ids=json.dumps)
def test_a_context_that_is_not_hotpotqas_is_an_error(context: object, tmp_path: Path) -> None:
    row = {"question": "Q", "answer": "A", "_id": "1", "context": context}
    with pytest.raises(LorakitError, match="'context' is not a list of titles"):
        built("hotpotqa", save(tmp_path / "c", lines(row)))


# — words —


@pytest.mark.parametrize(
    ("text", "words"), [("", 0), ("a b\nc", 3), ("三つ の字", 4), ("LoRA は a", 3), ("é b", 2)]
)
def test_words_are_counted_without_a_segmenter(text: str, words: int) -> None:
    assert count_words(text) == words


@pytest.mark.parametrize(
    ("text", "written"),
    [
        ("宮城 県 、 4 月", "宮城県、4月"),
        ("7 . 4 ( UTC + 9 )", "7.4(UTC+9)"),
        ("New York へ", "New Yorkへ"),
        ("文。  次 の 文。", "文。次の文。"),
    ],
)
def test_separated_words_are_joined_as_they_are_written(text: str, written: str) -> None:
    assert unspaced(text) == written


def test_a_large_table_is_streamed() -> None:
    """A pipe that never ends is read only as far as records are asked for."""
    from lorakit.recipes.readers.sources import Part
    from lorakit.recipes.readers.tables import table_in
    from lorakit.recipes.request import Tally

    class Endless(io.RawIOBase):
        read_so_far = 0

        def readable(self) -> bool:
            return True

        def readinto(self, buffer: Any) -> int:
            text = b"a,b\n" + b"1,2\n" * 1024
            Endless.read_so_far += len(text)
            buffer[: len(text)] = text
            return len(text)

    rows = table_in(Part("endless", io.BufferedReader(Endless(), 1 << 16)), Tally())
    assert [next(rows).fields["a"] for _ in range(100)] == ["1"] * 100
    assert Endless.read_so_far < 1 << 20


# — which file is which set —

HOTPOT = {"context": [["T", ["x"]]], "question": "q", "answer": "a"}


@pytest.mark.parametrize(
    ("recipe", "name", "split", "warns"),
    [
        ("hotpotqa", "hotpot_dev_distractor_v1.json", "validation", False),
        ("hotpotqa", "hotpot_dev_distractor_v1.json", "test", True),
        ("hotpotqa", "hotpot.json", "validation", True),
        ("hotpotqa", "hotpot.json", "train", False),
        ("gsm8k", "test.jsonl", "test", False),
        ("gsm8k", "test.jsonl", "validation", True),
        ("gsm8k", "latest.jsonl", "test", True),
        ("gsm8k", "test.jsonl", "train", False),
    ],
)
def test_a_file_that_may_be_validation_and_test_set_at_once_gets_a_warning(
    recipe: str, name: str, split: str, warns: bool, tmp_path: Path
) -> None:
    path = save(tmp_path / name, lines(HOTPOT))
    result = run(recipe, path, "--split", split)
    assert result.exit_code == 0
    warning = f"Warning: nothing in the name of {path} says {split}, and the papers' "
    assert result.stderr.startswith(warning) == warns
    assert ("--drop-overlap val.jsonl" in result.stderr) == warns


def test_a_folder_with_the_splits_own_file_gets_no_warning(tmp_path: Path) -> None:
    save(tmp_path / "test" / "test.jsonl", lines(HOTPOT))
    assert run("gsm8k", tmp_path / "test", "--split", "test").stderr == ""


def test_ecommerce_is_balanced_when_asked_for(tmp_path: Path) -> None:
    path = save(tmp_path / "t.txt", "".join(f"{n % 4 // 3}\ta {n}\tb {n}\n" for n in range(40)))
    result = run("ecommerce", path, "--balance", "--sample", 12)
    answers = [json.loads(line)["completion"] for line in result.stdout.splitlines()]
    assert (answers.count(" Yes"), answers.count(" No")) == (6, 6)
    assert result.stderr == "Note: balanced: 6 of each answer, of 30 No and 10 Yes.\n"
    assert result.stdout == run("ecommerce", path, "--balance", "--sample", 12).stdout


def test_only_ecommerce_is_balanced() -> None:
    result = run("jsonl", "--balance", stdin="{}")
    assert isinstance(result.exception, LorakitError)
    assert str(result.exception).startswith("jsonl has no --balance; ")
