"""`lorakit compare`: which records two systems differ in, and how that is shown."""

from __future__ import annotations

import io
import json
import os
import pty
import re
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lorakit.errors import LorakitError
from lorakit.scoring.contrast import Where, contrast_metrics, contrast_systems
from lorakit.scoring.contrast_page import write_contrast_page
from lorakit.scoring.differing_words import mark_differing_words
from lorakit.scoring.metrics import METRICS, score
from tests.support.program import ENVIRONMENT, PROGRAM, run

ROWS = [  # id, label, what A predicts, what B predicts
    ("same", "a b", "a b", "a b"),
    ("worse", "a b c d", "a b c d", "a b c x"),
    ("better", "a b", "x", "a"),
    ("much-worse", "a b", "a b", "x y"),
    ("other-text", "a b", "x y", "z"),
]


def write(path: Path, column: int) -> str:
    lines = (
        {"id": row[0], "prompt": f"ask {row[0]}", "completion": row[1], "prediction": row[column]}
        for row in ROWS
    )
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return str(path)


@pytest.fixture
def systems(tmp_path: Path) -> tuple[str, str]:
    return write(tmp_path / "a.jsonl", 2), write(tmp_path / "b.jsonl", 3)


@pytest.mark.parametrize(
    ("where", "ids"),
    [
        ("worse", ["much-worse", "worse"]),
        ("better", ["better"]),
        ("differs", ["much-worse", "better", "worse", "other-text"]),
    ],
)
def test_records_are_chosen_and_the_largest_differences_come_first(
    where: Where, ids: list[str], systems: tuple[str, str]
) -> None:
    contrasts = contrast_systems(*systems, where=where)
    assert [contrast.id for contrast in contrasts] == ids


def test_where_lower_is_better_worse_means_higher(
    systems: tuple[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from dataclasses import replace

    monkeypatch.setitem(METRICS, "distance", replace(METRICS["rougeL"], higher_is_better=False))
    contrasts = contrast_systems(*systems, where="worse", metric="distance")
    assert [contrast.id for contrast in contrasts] == ["better"]


OF_TEXTS_ALONE = {
    name for name in contrast_metrics("differs") if METRICS[name].needs == "texts"
} - {"words-beyond-label"}


@pytest.mark.parametrize("metric", sorted(OF_TEXTS_ALONE))
def test_a_records_scores_are_those_of_the_record_alone(
    metric: str, systems: tuple[str, str]
) -> None:
    """But for the metric whose labels are those of all records."""
    for contrast in contrast_systems(*systems, where="differs", metric=metric):
        for text, value in (
            (contrast.prediction_a, contrast.score_a),
            (contrast.prediction_b, contrast.score_b),
        ):
            assert score([text], [contrast.references], metric=metric).value == value


@pytest.mark.parametrize(
    ("where", "metric"), [("differs", "bleu"), ("differs", "chrf"), ("worse", "length")]
)
def test_a_metric_that_cannot_choose_records_is_refused(
    where: Where, metric: str, systems: tuple[str, str]
) -> None:
    with pytest.raises(LorakitError, match=f"'{metric}' cannot say where a record is {where}"):
        contrast_systems(*systems, where=where, metric=metric)
    done = run("compare", *systems, "--where", where, "--metric", metric)
    assert done.returncode == 2
    assert f"--metric {metric} with --where {where}: choose from rouge1, " in done.stderr


def test_files_of_other_records_are_refused_by_file_and_line(systems: tuple[str, str]) -> None:
    Path(systems[1]).write_text(Path(systems[1]).read_text().replace('"worse"', '"other"', 1))
    done = run("compare", *systems)
    assert done.returncode == 1
    assert f"{systems[1]}:2: the id 'other' is 'worse' at {systems[0]}:2; " in done.stderr


def test_a_pipe_gets_lines_of_json(systems: tuple[str, str]) -> None:
    done = run("compare", "-", systems[1], "--n", "1", stdin=Path(systems[0]).read_text())
    assert json.loads(done.stdout) == {
        "id": "much-worse",
        "prompt": "ask much-worse",
        "references": ["a b"],
        "prediction_a": "a b",
        "prediction_b": "x y",
        "score_a": 100,
        "score_b": 0,
        "difference": -100,
    }


def on_a_terminal(*arguments: str) -> str:
    """Return what the program writes to a terminal of 80 columns."""
    ours, theirs = pty.openpty()
    with subprocess.Popen(
        [PROGRAM, *arguments], stdout=theirs, env={**ENVIRONMENT, "TERM": "xterm-256color"}
    ) as process:
        os.close(theirs)
        parts = []
        try:
            while part := os.read(ours, 1 << 16):
                parts.append(part)
        except OSError:  # how Linux ends a terminal
            pass
        os.close(ours)
    assert process.returncode == 0
    return b"".join(parts).decode().replace("\r\n", "\n")


COLOURS = re.compile(r"\x1b\[[0-9;]*m")


def test_a_terminal_gets_two_columns_with_the_differing_words_marked(
    systems: tuple[str, str],
) -> None:
    printed = on_a_terminal("compare", *systems, "--where", "worse")
    lines = COLOURS.sub("", printed).splitlines()
    assert [line for line in lines if "→" in line] == [
        "much-worse  100.00 → 0.00 (-100.00)",
        "worse  100.00 → 75.00 (-25.00)",
    ]
    assert "reference: a b c d" in lines
    assert "ask worse" in lines
    assert any(re.fullmatch(r"a b c d +a b c x *", line) for line in lines)
    assert re.search(r"a b c \x1b\[[0-9;]+md\x1b\[0m +a b c \x1b\[[0-9;]+mx\x1b\[0m", printed)


def test_no_escape_sequence_of_a_text_reaches_the_terminal(tmp_path: Path) -> None:
    evil = "a\x1b]0;owned\x07\x1b[2J\u202eb"
    paths = []
    for name, text in (("a.jsonl", evil), ("b.jsonl", evil + " c")):
        row = {"id": evil, "prompt": evil, "references": [evil], "prediction": text}
        (tmp_path / name).write_text(json.dumps(row) + "\n")
        paths.append(str(tmp_path / name))
    printed = COLOURS.sub("", on_a_terminal("compare", *paths))
    assert printed.replace("\n", "").isprintable()
    assert "\\x1b]0;owned\\x07" in printed


class Page(HTMLParser):
    """Collects what a page shows and marks, and every address it would load."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.addresses: list[str | None] = []
        self.marked: list[str] = []
        self._open: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.addresses += [value for name, value in attrs if name in ("src", "href")]
        self._open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        while self._open and self._open.pop() != tag:
            pass

    def handle_data(self, data: str) -> None:
        if self._open and self._open[-1] == "mark":
            self.marked.append(data)


def test_the_page_marks_the_differing_words_and_loads_nothing(
    systems: tuple[str, str], tmp_path: Path
) -> None:
    path = tmp_path / "page.html"
    done = run("compare", *systems, "--where", "worse", "--html", str(path))
    assert (done.returncode, done.stdout) == (0, "")
    text = path.read_text()
    page = Page(text)
    assert page.marked == ["a b", "x y", "d", "x"]
    assert page.addresses == []
    assert not {"script", "link", "img"} & set(page.tags)
    assert "url(" not in text
    assert "prefers-color-scheme: dark" in text
    assert page.tags.count("article") == 2


def test_the_page_and_the_lines_are_both_written_where_o_names_a_file(
    systems: tuple[str, str], tmp_path: Path
) -> None:
    page, lines = tmp_path / "page.html", tmp_path / "lines.jsonl"
    done = run("compare", *systems, "--html", str(page), "-o", str(lines))
    assert (done.returncode, done.stdout) == (0, "")
    assert len(lines.read_text().splitlines()) == page.read_text().count("<article>") == 4


def test_the_texts_of_a_page_are_escaped(tmp_path: Path) -> None:
    evil = "<script>alert(1)</script>&amp;\"'\x1b[31m\ud83d"
    paths = []
    for name in ("a.jsonl", "b.jsonl"):
        row = {"id": evil, "prompt": evil, "references": [evil], "prediction": evil + name}
        (tmp_path / name).write_text(json.dumps(row) + "\n")
        paths.append(str(tmp_path / name))
    stream = io.StringIO()
    contrasts = contrast_systems(*paths, where="differs")
    names = ("<b>", "&")
    write_contrast_page(contrasts, stream, names=names, metric="rougeL", where="differs")
    page = stream.getvalue()
    page.encode()
    assert "script" not in Page(page).tags
    assert "\x1b" not in page
    assert "&lt;script&gt;alert(1)&lt;/script&gt;&amp;amp;" in page
    assert "A: &lt;b&gt;," in page


# — differing words —


@pytest.mark.parametrize(
    ("lang", "text", "other", "marked"),
    [
        pytest.param("en", "a b c", "a x c", ["b"], id="one word"),
        pytest.param("en", "a b c d", "a d", ["b c"], id="neighbours are one passage"),
        pytest.param("en", "a  b\n", "a b", [], id="white space does not differ"),
        pytest.param("en", "", "a", [], id="nothing"),
        pytest.param("en", "a", "", ["a"], id="all of it"),
        pytest.param("ja", "猫が椅子に座った。", "犬が椅子に座った。", ["猫"], id="Japanese"),
        pytest.param("zh", "我爱你", "我爱他", ["你"], id="Chinese"),
        pytest.param("ja", "猫が\0座る 犬", "犬", ["猫が\0座る"], id="what MeCab cannot read"),
    ],
)
def test_the_words_that_the_other_text_lacks_are_marked(
    lang: str, text: str, other: str, marked: list[str]
) -> None:
    ours, _ = mark_differing_words(text, other, lang=lang)
    assert [passage.text for passage in ours if passage.differs] == marked


@settings(max_examples=100, deadline=None)
@given(
    lang=st.sampled_from(["en", "ja", "zh"]),
    texts=st.tuples(*[st.text("ab &;猫が。\n\0\u3000\ud83d-\x1c", max_size=12)] * 2),
)
def test_passages_joined_are_the_text_and_equal_texts_differ_nowhere(
    lang: str, texts: tuple[str, str]
) -> None:
    for passages, text in zip(mark_differing_words(*texts, lang=lang), texts, strict=True):
        assert "".join(passage.text for passage in passages) == text
        assert all(passage.text for passage in passages)
    same, _ = mark_differing_words(texts[0], texts[0], lang=lang)
    assert not [passage for passage in same if passage.differs]
