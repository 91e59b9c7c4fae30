"""`judge --export-sheet` and `--import-sheet`: blinded sheets, and what raters wrote in them."""

from __future__ import annotations

import csv
import io
import json
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from lorakit.errors import LorakitError
from lorakit.judging.rated_sheets import read_ratings
from lorakit.judging.sheets import export_sheet, key_path, load_key, safe_cell
from lorakit.settings import SheetSettings
from tests.support.program import run


def predictions(folder: Path, system: str, count: int = 4) -> str:
    rows = (
        {"id": f"r{n}", "prompt": f"p{n}", "completion": f"c{n}", "prediction": f"{system} {n}"}
        for n in range(count)
    )
    path = folder / f"{system}-system.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def cells_of(sheet: Path) -> list[dict[str, str]]:
    text = sheet.read_bytes().decode("utf-8-sig")
    return list(csv.DictReader(io.StringIO(text, newline="")))


def rate(
    sheet: Path, rated: Path, rating: Callable[[dict[str, str]], str], delimiter: str = ","
) -> str:
    """Write a copy of a sheet with ratings in it, as a spreadsheet would; return its path."""
    rows = cells_of(sheet)
    with rated.open("w", encoding="utf-8", newline="") as stream:
        writer = csv.DictWriter(stream, rows[0].keys(), delimiter=delimiter)
        writer.writeheader()
        writer.writerows({**row, "rating": rating(row)} for row in rows)
    return str(rated)


@pytest.fixture
def rated_sheet(tmp_path: Path) -> Path:
    """A sheet of two systems' predictions, with its key beside it."""
    sheet = tmp_path / "sheet.csv"
    paths = [predictions(tmp_path, system) for system in ("red", "blue")]
    export_sheet(paths, str(sheet), against=None, settings=SheetSettings())
    return sheet


# — the sheet —


def test_a_sheet_holds_every_prediction_once_and_names_no_system(tmp_path: Path) -> None:
    red, blue = predictions(tmp_path, "red"), predictions(tmp_path, "blue")
    sheet = tmp_path / "sheet.csv"
    done = run("judge", red, blue, "--export-sheet", str(sheet))
    assert (done.returncode, done.stdout) == (0, "")
    assert f"wrote 8 rows to {sheet}; keep {tmp_path / 'sheet.key.json'}" in done.stderr
    rows = cells_of(sheet)
    assert list(rows[0]) == ["item", "prompt", "reference", "output", "rating"]
    expected = {(f"p{n}", f"c{n}", f"{name} {n}") for n in range(4) for name in ("red", "blue")}
    assert {(row["prompt"], row["reference"], row["output"]) for row in rows} == expected
    assert len(rows) == len(expected)
    assert {row["rating"] for row in rows} == {""}
    assert "system" not in sheet.read_text("utf-8-sig")


def test_the_key_says_whose_every_row_is(rated_sheet: Path) -> None:
    key = load_key(key_path(str(rated_sheet)))
    for row, item in zip(cells_of(rated_sheet), key.items, strict=True):
        assert row["item"] == item.item
        assert row["output"].split()[0] in item.file
        assert item.id == f"r{row['output'].split()[1]}"
        assert item.first is None


def test_the_order_mixes_systems_and_follows_from_the_seed(tmp_path: Path) -> None:
    paths = [predictions(tmp_path, system, 20) for system in ("red", "blue")]

    def exported(seed: int) -> bytes:
        sheet = tmp_path / f"sheet-{seed}.csv"
        export_sheet(paths, str(sheet), against=None, settings=SheetSettings(seed=seed))
        return sheet.read_bytes()

    assert exported(1) == exported(1)
    assert exported(1) != exported(2)
    outputs = [row["output"].split()[0] for row in cells_of(tmp_path / "sheet-1.csv")]
    assert 5 <= outputs[:20].count("red") <= 15


def test_against_a_baseline_the_order_within_a_row_varies_too(tmp_path: Path) -> None:
    red, blue = predictions(tmp_path, "red", 40), predictions(tmp_path, "blue", 40)
    sheet = tmp_path / "sheet.csv"
    assert run("judge", red, "--against", blue, "--export-sheet", str(sheet)).returncode == 0
    key = load_key(key_path(str(sheet)))
    rows = cells_of(sheet)
    assert list(rows[0]) == ["item", "prompt", "reference", "a", "b", "rating"]
    for row, item in zip(rows, key.items, strict=True):
        names = [row["a"].split()[0], row["b"].split()[0]]
        assert names == (["red", "blue"] if item.first == "file" else ["blue", "red"])
    assert 10 <= Counter(item.first for item in key.items)["file"] <= 30


def test_a_sample_is_of_the_same_records_for_every_file(tmp_path: Path) -> None:
    paths = [predictions(tmp_path, system, 30) for system in ("red", "blue")]
    sheet = tmp_path / "sheet.csv"
    assert run("judge", *paths, "--export-sheet", str(sheet), "--sample", "5").returncode == 0
    by_system: dict[str, set[str]] = {}
    for row in cells_of(sheet):
        by_system.setdefault(row["output"].split()[0], set()).add(row["prompt"])
    assert by_system["red"] == by_system["blue"]
    assert len(by_system["red"]) == 5


def test_a_sample_of_more_records_than_there_are_is_all_of_them(tmp_path: Path) -> None:
    settings = SheetSettings(sample=99)
    sheet = str(tmp_path / "sheet.csv")
    key = export_sheet([predictions(tmp_path, "red")], sheet, against=None, settings=settings)
    assert len(key.items) == 4


@pytest.mark.parametrize(
    ("text", "cell"),
    [
        ("=1+1", "'=1+1"),
        ("+1", "'+1"),
        ("-1", "'-1"),
        ("@SUM(A1)", "'@SUM(A1)"),
        ("\t=1", "'\t=1"),
        ("\r=1", "'\r=1"),
        ("＝1", "'＝1"),
        ("a=1", "a=1"),
        ("", ""),
        ("half \ud83d", "half \\ud83d"),
        ("a\0b", "a\\x00b"),
    ],
)
def test_no_cell_begins_as_a_formula_does(text: str, cell: str) -> None:
    assert safe_cell(text) == cell


def test_texts_of_every_kind_come_through_a_sheet(tmp_path: Path) -> None:
    odd = 'line 1\nline 2, "quoted"; 猫\u3000\x1b[31m'
    row = {"prompt": odd, "references": ["=HYPERLINK()"], "prediction": "-1"}
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps(row) + "\n")
    sheet = tmp_path / "sheet.csv"
    export_sheet([str(path)], str(sheet), against=None, settings=SheetSettings())
    (cells,) = cells_of(sheet)
    assert (cells["prompt"], cells["reference"], cells["output"]) == (odd, "'=HYPERLINK()", "'-1")


# — what raters wrote —


def test_ratings_are_summed_up_by_file_with_the_agreement_of_the_raters(
    rated_sheet: Path, tmp_path: Path
) -> None:
    """The first gives red 8 and blue 2 throughout; the second one less to each of red's."""
    one = rate(
        rated_sheet, tmp_path / "one.csv", lambda row: "8" if "red" in row["output"] else "2"
    )
    two = rate(
        rated_sheet, tmp_path / "two.csv", lambda row: "7" if "red" in row["output"] else "2"
    )
    raters = ("--import-sheet", one, "--import-sheet", two)
    ratings = tmp_path / "ratings.jsonl"
    key = key_path(str(rated_sheet))
    done = run("judge", *raters, "--sheet-key", key, "--ratings", str(ratings))
    assert (done.returncode, done.stderr) == (0, "")
    red, blue = map(json.loads, done.stdout.splitlines())
    assert red.pop("signature").startswith(f"raters:{one}+{two}|sheet:")
    assert red == {
        "file": str(tmp_path / "red-system.jsonl"),
        "count": 4,
        "rating": 75,
        "judges": {one: {"rating": 80, "rated": 4}, two: {"rating": 70, "rated": 4}},
        # D_o = 1; D_e: of 8 · 7 ordered pairs of four 8s and four 7s, 2 · 16 differ, by 1
        "agreement": {"alpha": pytest.approx(1 - 56 / 32), "level": "interval", "same": 0},
    }
    assert blue["rating"] == 20
    assert blue["agreement"] == {"alpha": None, "level": "interval", "same": 100}
    lines = [json.loads(line) for line in ratings.read_text().splitlines()]
    assert len(lines) == 8
    assert {line["file"]: line["ratings"] for line in lines} == {
        str(tmp_path / "red-system.jsonl"): {one: 8, two: 7},
        str(tmp_path / "blue-system.jsonl"): {one: 2, two: 2},
    }


def test_choices_are_unblinded_whatever_the_order(tmp_path: Path) -> None:
    """The first rater prefers red, the second too but for ties at even numbers."""
    red, blue = predictions(tmp_path, "red"), predictions(tmp_path, "blue")
    sheet = tmp_path / "sheet.csv"
    key = export_sheet([red], str(sheet), against=blue, settings=SheetSettings())

    def prefer_red(row: dict[str, str]) -> str:
        return "A" if "red" in row["a"] else "b"

    def tie_at_even(row: dict[str, str]) -> str:
        return "Tie" if int(row["a"].split()[1]) % 2 == 0 else prefer_red(row)

    one = rate(sheet, tmp_path / "one.csv", prefer_red)
    two = rate(sheet, tmp_path / "two.csv", tie_at_even)
    raters = ("--import-sheet", one, "--import-sheet", two)
    done = run("judge", *raters, "--sheet-key", key_path(str(sheet)), "--ratings", "-", "-o", one)
    assert done.returncode == 0, done.stderr
    outcomes = {line["id"]: line["choices"] for line in map(json.loads, done.stdout.splitlines())}
    assert outcomes["r0"] == {one: "win", two: "tie"}
    assert outcomes["r1"] == {one: "win", two: "win"}
    summary = json.loads(Path(one).read_text())
    firsts = 100 * sum(item.first == "file" for item in key.items) / 4
    assert (summary["file"], summary["against"], summary["count"]) == (red, blue, 4)
    assert summary["preference"] == 87.5
    assert summary["judges"][one] == {
        "preference": 100,
        "wins": 4,
        "ties": 0,
        "losses": 0,
        "first": firsts,
    }
    assert summary["judges"][two]["ties"] == 2
    # D_o = 2 · 2 / 8; D_e: six wins and two ties, 2 · 12 of 56 ordered pairs differ
    assert summary["agreement"] == {
        "alpha": pytest.approx(1 - (4 / 8) / (24 / 56)),
        "level": "nominal",
        "same": 50,
    }


def test_one_rater_agrees_with_nobody(rated_sheet: Path, tmp_path: Path) -> None:
    rated = rate(rated_sheet, tmp_path / "one.csv", lambda row: "10")
    done = run("judge", "--import-sheet", rated, "--sheet-key", key_path(str(rated_sheet)))
    for line in map(json.loads, done.stdout.splitlines()):
        assert line["rating"] == 100
        assert "agreement" not in line


@pytest.mark.parametrize("delimiter", [",", ";", "\t"])
def test_sheets_are_read_in_every_form_that_spreadsheets_write(
    delimiter: str, rated_sheet: Path, tmp_path: Path
) -> None:
    path = rate(rated_sheet, tmp_path / "one.csv", lambda row: " 7 ", delimiter)
    header, *rows = Path(path).read_text().splitlines()
    empty = delimiter * header.count(delimiter)
    Path(path).write_text("\ufeff" + "\r\n".join([header, *reversed(rows), empty]) + "\r\n")
    key_file = key_path(str(rated_sheet))
    assert set(read_ratings(path, load_key(key_file), key_file).values()) == {"7"}


def edited(path: str, edit: Callable[[list[list[str]]], Sequence[list[str]]]) -> None:
    with open(path, encoding="utf-8", newline="") as stream:
        rows = edit(list(csv.reader(stream)))
    with open(path, "w", encoding="utf-8", newline="") as stream:
        csv.writer(stream).writerows(rows)


def cell(row: int, column: int, text: str) -> Callable[[list[list[str]]], list[list[str]]]:
    """Return an edit of one cell, by the number of its row in a spreadsheet."""

    def edit(rows: list[list[str]]) -> list[list[str]]:
        rows[row - 1][column] = text
        return rows

    return edit


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        pytest.param(
            cell(3, -1, ""), r", row 3: item i2-\w+ has no rating; write a whole", id="no"
        ),
        pytest.param(cell(4, -1, "11"), r", row 4: the rating '11' of item i3-\w+", id="too high"),
        pytest.param(
            cell(4, -1, "7.5"), r", row 4: the rating '7.5' of .*; write a", id="fraction"
        ),
        pytest.param(cell(4, -1, "\x1b"), r", row 4: the rating '\\x1b' of", id="an escape"),
        pytest.param(cell(9, 0, "i9-x"), r", row 9: the item 'i9-x' is not in .*; give", id="item"),
        pytest.param(
            lambda r: [*r, r[1]], r", row 10: a second row of item i1-\w+; keep", id="twice"
        ),
        pytest.param(
            lambda r: r[:-2], r": no row of item i7-\w+ \(2 of 8 items are m", id="missing"
        ),
        pytest.param(lambda r: r[1:], r", row 1: there is no one column 'item'; keep", id="header"),
        pytest.param(lambda r: [], r", row 1: there is no one column 'item'; keep", id="empty"),
        pytest.param(cell(1, -1, "score"), r", row 1: .* column 'rating'; keep", id="no column"),
        pytest.param(
            lambda r: [*r[:2], r[2][:2], *r[3:]], r", row 3: item i2-\w+ has no", id="short"
        ),
    ],
)
def test_what_is_wrong_in_a_sheet_is_said_with_file_row_and_remedy(
    edit: Callable[[list[list[str]]], Sequence[list[str]]],
    message: str,
    rated_sheet: Path,
    tmp_path: Path,
) -> None:
    path = rate(rated_sheet, tmp_path / "one.csv", lambda row: "7")
    edited(path, edit)
    key_file = key_path(str(rated_sheet))
    with pytest.raises(LorakitError, match=message) as caught:
        read_ratings(path, load_key(key_file), key_file)
    assert str(caught.value).startswith(path)
    assert str(caught.value).isprintable()


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"item,rating\n\xff,7\n", ": not UTF-8 text (byte 13); save it as CSV in UTF-8"),
        (b'item,rating\n"i1"x,7\n', ", row 2: not CSV ("),
    ],
)
def test_a_file_that_is_no_csv_in_utf_8_is_refused(
    data: bytes, message: str, rated_sheet: Path, tmp_path: Path
) -> None:
    path = tmp_path / "one.csv"
    path.write_bytes(data)
    done = run("judge", "--import-sheet", str(path), "--sheet-key", key_path(str(rated_sheet)))
    assert done.returncode == 1
    assert f"Error: {path}{message}" in done.stderr


def test_a_choice_that_is_none_is_refused(tmp_path: Path) -> None:
    red, blue = predictions(tmp_path, "red"), predictions(tmp_path, "blue")
    sheet = tmp_path / "sheet.csv"
    export_sheet([red], str(sheet), against=blue, settings=SheetSettings())
    path = rate(sheet, tmp_path / "one.csv", lambda row: "7")
    done = run("judge", "--import-sheet", path, "--sheet-key", key_path(str(sheet)))
    assert "row 2: the rating '7' of item i1-" in done.stderr
    assert "write A, B or tie" in done.stderr


def changed(key: dict[str, Any], **fields: object) -> str:
    return json.dumps({**key, **fields})


@pytest.mark.parametrize(
    "text_of",
    [
        pytest.param(lambda key: "x", id="no JSON"),
        pytest.param(lambda key: "[]", id="no object"),
        pytest.param(lambda key: "{}", id="another object"),
        pytest.param(lambda key: changed(key, files=["other"]), id="items of no file"),
        pytest.param(lambda key: changed(key, against="b.jsonl"), id="items of another kind"),
        pytest.param(lambda key: changed(key, items=[{"item": "i1"}]), id="half an item"),
        pytest.param(lambda key: changed(key, more=1), id="a field of another version"),
        pytest.param(
            lambda key: changed(key, items=[{**key["items"][0], "item": []}]), id="a list as a name"
        ),
    ],
)
def test_what_is_no_key_is_refused(
    text_of: Callable[[dict[str, Any]], str], rated_sheet: Path
) -> None:
    path = Path(key_path(str(rated_sheet)))
    path.write_text(text_of(json.loads(path.read_text())))
    with pytest.raises(LorakitError, match=r"is not the key of a sheet; give the \.key\.json"):
        load_key(str(path))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "Missing argument 'PREDICTIONS'."),
        (("--export-sheet", "s.csv"), "Missing argument 'PREDICTIONS' with --export-sheet."),
        (("--import-sheet", "s.csv"), "Missing option '--sheet-key' with --import-sheet."),
        (
            ("a", "--import-sheet", "s", "--sheet-key", "k"),
            "--import-sheet does not read PREDICTIONS.",
        ),
        (
            ("a", "--export-sheet", "s", "--endpoint", "http://u"),
            "--export-sheet does not read --endpoint.",
        ),
        (("a", "--export-sheet", "s", "-o", "x"), "--export-sheet does not read --output."),
        (("a", "--export-sheet", "s", "--import-sheet", "t"), "cannot be given together."),
        (("a", "--export-sheet", "-"), "--export-sheet needs a file: its key goes beside it."),
        (("a", "a", "--export-sheet", "s"), "A file of PREDICTIONS is given twice."),
        (("--import-sheet", "s") * 2 + ("--sheet-key", "k"), "An --import-sheet is given twice"),
    ],
)
def test_options_that_do_not_go_together_are_wrong_usage(
    arguments: tuple[str, ...], message: str, tmp_path: Path
) -> None:
    done = run("judge", *arguments, cwd=tmp_path)
    assert done.returncode == 2
    assert message in done.stderr


@pytest.mark.parametrize("option", ["--sample", "--seed", "--sheet-key"])
def test_options_of_sheets_need_one(option: str) -> None:
    asked = ("--endpoint", "http://x/v1", "--judge-model", "x")
    done = run("judge", "a", *asked, option, "1")
    assert done.returncode == 2
    needed = "--import-sheet" if option == "--sheet-key" else "--export-sheet"
    assert f"{option} needs {needed}." in done.stderr
