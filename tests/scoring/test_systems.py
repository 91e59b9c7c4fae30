"""`lorakit score`: files in, one line per file out."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from lorakit.commands.score import score
from lorakit.errors import LorakitError
from lorakit.scoring.metrics import METRICS

TEXT_METRICS = [name for name, metric in METRICS.items() if metric.decides]
GOOD = {"id": "1", "prediction": "the cat sat", "references": ["the cat sat", "a dog"]}
HALF = {"id": "2", "prediction": "yes", "completion": "no", "more": [1]}


def write(path: Path, *records: Mapping[str, object]) -> str:
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return str(path)


def run(*arguments: str, stdin: str | None = None) -> Result:
    return CliRunner().invoke(score, arguments, input=stdin)


def lines_of(result: Result) -> list[dict[str, Any]]:
    assert result.exception is None, result.exception
    return [json.loads(line) for line in result.stdout.splitlines()]


def error_of(result: Result) -> str:
    assert isinstance(result.exception, LorakitError)
    assert result.stdout == ""
    return str(result.exception)


def test_each_file_gives_one_flat_line_in_the_order_named(tmp_path: Path) -> None:
    first, second = write(tmp_path / "b.jsonl", GOOD, HALF), write(tmp_path / "a.jsonl", GOOD)
    lines = lines_of(run(first, second, "--metric", "rougeL,em"))
    assert [line["file"] for line in lines] == [first, second]
    assert [line["count"] for line in lines] == [2, 1]
    assert [(line["rougeL"], line["em"]) for line in lines] == [(50, 50), (100, 100)]
    fields = ["file", "count", "lang", "rougeL", "em", "signatures"]
    assert list(lines[0]) == [*fields, "significance"]
    assert list(lines[0]["signatures"]) == ["rougeL", "em"]
    assert "nrefs:var|" in lines[0]["signatures"]["em"]
    (alone,) = lines_of(run(first, "--metric", "rougeL,em"))
    assert list(alone) == fields
    assert alone == {name: lines[0][name] for name in fields}


def test_the_default_metric_is_rouge_l(tmp_path: Path) -> None:
    (line,) = lines_of(run(write(tmp_path / "a.jsonl", GOOD)))
    assert set(line) == {"file", "count", "lang", "rougeL", "signatures"}


def test_the_completion_is_the_reference_where_none_is_listed(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", {**HALF, "prediction": "no"}, {**HALF, "references": None})
    (line,) = lines_of(run(path, "--metric", "em"))
    assert line["em"] == 50


def test_metrics_may_be_repeated_and_listed_and_count_once(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", GOOD)
    (line,) = lines_of(run(path, "--metric", "em, f1", "--metric", "bleu,em"))
    assert list(line["signatures"]) == ["em", "f1", "bleu"]


def test_every_metric_can_be_asked_for_at_once(tmp_path: Path) -> None:
    (line,) = lines_of(
        run(write(tmp_path / "a.jsonl", GOOD, HALF), "--metric", ",".join(TEXT_METRICS))
    )
    assert list(line["signatures"]) == TEXT_METRICS
    assert all(0 <= line[name] <= 100 for name in TEXT_METRICS)


def test_values_are_written_in_full(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", GOOD, HALF, HALF)
    (line,) = lines_of(run(path, "--metric", "em"))
    assert line["em"] == 100 / 3


def test_a_dash_reads_stdin() -> None:
    (line,) = lines_of(run("-", stdin=json.dumps(GOOD) + "\n\n"))
    assert (line["file"], line["count"]) == ("-", 1)


def test_the_output_file_is_written_as_json_and_nothing_else_said(tmp_path: Path) -> None:
    target = tmp_path / "scores.jsonl"
    result = run(write(tmp_path / "a.jsonl", GOOD), "-o", str(target))
    assert (result.exit_code, result.output) == (0, "")
    assert json.loads(target.read_text(encoding="utf-8"))["rougeL"] == 100


def test_the_same_input_gives_the_same_bytes(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", GOOD, HALF)
    arguments = (path, "--metric", ",".join(TEXT_METRICS))
    assert run(*arguments).stdout_bytes == run(*arguments).stdout_bytes


def test_the_table_has_a_row_per_file_and_each_signature_once(tmp_path: Path) -> None:
    odd = write(tmp_path / "[bold]x:smile:.jsonl", GOOD, HALF)
    result = run(odd, odd, "--metric", "em,rougeL", "--format", "table")
    header, *rows, interval, em, rouge = result.stdout.splitlines()
    assert header.split() == ["file", "count", "em", "rougeL"]
    assert [row.split() for row in rows] == [[odd, "2", "50.00", "±50.00", "50.00", "±50.00"]] * 2
    assert interval == "±: half the 95 % bootstrap interval over examples (10000 trials, seed 0)"
    assert em.startswith("em: nrefs:var|refs:max|norm:squad")
    assert rouge.startswith("rougeL: nrefs:var|")
    assert "\x1b" not in result.stdout


def test_a_terminal_gets_the_table() -> None:
    pty = pytest.importorskip("pty", reason="needs a Unix terminal")
    main, side = pty.openpty()
    command = [sys.executable, "-c", "from lorakit.commands.score import score; score()", "-"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=side, env=environment()) as child:
        child.communicate(json.dumps(GOOD).encode())
    os.close(side)
    shown = os.read(main, 10_000).decode()
    os.close(main)
    assert "100.00" in shown
    assert "{" not in shown


def environment() -> dict[str, str]:
    root = str(Path(__file__).resolve().parents[2])
    return {**os.environ, "PYTHONPATH": root, "TERM": "xterm", "COLUMNS": "100"}


# — several systems —

RIGHT = [{"id": str(n), "prediction": f"w{n}", "completion": f"w{n}"} for n in range(12)]
WRONG = [{**record, "prediction": "no"} for record in RIGHT]


def test_a_baseline_gives_differences_and_p_values_to_every_other_system(tmp_path: Path) -> None:
    right, wrong = write(tmp_path / "r.jsonl", *RIGHT), write(tmp_path / "w.jsonl", *WRONG)
    lines = lines_of(run(wrong, right, "--baseline", wrong, "--metric", "em", "--trials", "999"))
    significance = [line["significance"] for line in lines]
    assert significance[0] == {
        "trials": 999,
        "seed": 0,
        "intervals": {"em": [0, 0]},
        "baseline": wrong,
    }
    p = significance[1].pop("p_values")["em"]
    same = {"trials": 999, "seed": 0, "baseline": wrong}
    all_of_it = {name: {"em": [100, 100]} for name in ("intervals", "difference_intervals")}
    assert significance[1] == {**same, **all_of_it, "differences": {"em": 100}}
    assert 1 / 1000 <= p < 0.01  # 2 of 4096 ways to swap differ as much


def test_a_baseline_that_is_not_among_the_files_is_scored_first(tmp_path: Path) -> None:
    right, wrong = write(tmp_path / "r.jsonl", *RIGHT), write(tmp_path / "w.jsonl", *WRONG)
    lines = lines_of(run(right, "--baseline", wrong, "--metric", "em"))
    assert [line["file"] for line in lines] == [wrong, right]
    assert lines == lines_of(run(wrong, right, "--baseline", wrong, "--metric", "em"))


def test_a_system_of_several_files_is_one_line_with_the_mean_of_its_runs(tmp_path: Path) -> None:
    right, wrong = write(tmp_path / "r.jsonl", *RIGHT), write(tmp_path / "w.jsonl", *WRONG)
    seeds = f"both={right},{wrong}"
    lines = lines_of(run("--system", seeds, wrong, "--baseline", wrong, "--metric", "em"))
    assert [line.get("system", line.get("file")) for line in lines] == [wrong, "both"]
    both = lines[1]
    assert list(both)[:5] == ["system", "files", "count", "lang", "em"]
    assert (both["files"], both["count"], both["em"]) == ([right, wrong], 12, 50)
    assert both["runs"] == {"em": [100, 0]}
    assert both["significance"]["intervals"] == {"em": [50, 50]}
    assert both["significance"]["differences"] == {"em": 50}
    assert both["significance"]["p_values"]["em"] < 0.01


def test_the_baseline_may_be_a_system_and_may_come_from_a_pipe(tmp_path: Path) -> None:
    right, wrong = write(tmp_path / "r.jsonl", *RIGHT), write(tmp_path / "w.jsonl", *WRONG)
    stdin = Path(wrong).read_text()
    named = run(right, "--system", "base=-", "--baseline", "base", "--metric", "em", stdin=stdin)
    piped = run(right, "-", "--baseline", "-", "--metric", "em", stdin=stdin)
    for result in (named, piped):
        assert lines_of(result)[0]["significance"]["differences"] == {"em": 100}
    assert lines_of(named)[1]["files"] == ["-"]
    assert lines_of(run(right, "--baseline", wrong, "--metric", "em"))[1]["em"] == 100


def test_a_star_marks_what_differs_from_the_baseline(tmp_path: Path) -> None:
    right, wrong = write(tmp_path / "r.jsonl", *RIGHT), write(tmp_path / "w.jsonl", *WRONG)
    nearly = write(tmp_path / "n.jsonl", *WRONG[:-1], RIGHT[-1])
    arguments = ("--system", f"right={right}", "--baseline", wrong, "--format", "table")
    result = run(wrong, nearly, *arguments, "--metric", "em", "--seed", "5", "--trials", "2000")
    header, base, near, best, interval, star, _ = result.stdout.splitlines()
    assert header.split() == ["system", "count", "em"]
    assert base.split() == [wrong, "12", "0.00", "±0.00"]
    assert near.split() == [nearly, "12", "8.33", "±12.50"]
    assert best.split() == ["right", "12", "100.00", "±0.00*"]
    assert interval.endswith("(2000 trials, seed 5)")
    assert star == f"*: p < 0.05 against {wrong}, paired approximate randomization"


@pytest.mark.parametrize(
    ("records", "message"),
    [
        pytest.param(RIGHT[:-1], r"r.jsonl:12: there is no such record in .*b.jsonl", id="fewer"),
        pytest.param(
            [*RIGHT, GOOD], r"b.jsonl:13: there is no such record in .*r.jsonl", id="more"
        ),
        pytest.param([RIGHT[1], RIGHT[0]], r"b.jsonl:1: the id '1' is '0' at .*r.jsonl:1", id="id"),
        pytest.param(
            [RIGHT[0], {**RIGHT[1], "completion": "x"}],
            r"b.jsonl:2: the references are not those at .*r.jsonl:2",
            id="references",
        ),
    ],
)
@pytest.mark.parametrize("layout", ["baseline", "system"])
def test_records_that_do_not_line_up_are_refused_by_file_and_line(
    records: list[dict[str, object]], message: str, layout: str, tmp_path: Path
) -> None:
    right, bad = write(tmp_path / "r.jsonl", *RIGHT), write(tmp_path / "b.jsonl", *records)
    arguments = (
        [bad, "--baseline", right] if layout == "baseline" else ["--system", f"s={right},{bad}"]
    )
    error = error_of(run(*arguments))
    assert re.search(message, error)
    assert error.endswith("; compare predictions for the same records in the same order")


def test_records_without_an_id_line_up_by_their_references(tmp_path: Path) -> None:
    bare = [{name: record[name] for name in ("prediction", "completion")} for record in RIGHT]
    files = write(tmp_path / "r.jsonl", *RIGHT), write(tmp_path / "b.jsonl", *bare)
    lines = lines_of(run(*files, "--baseline", files[0], "--metric", "em"))
    assert lines[1]["significance"]["p_values"] == {"em": 1}


def test_numbers_of_runs_that_cannot_be_paired_are_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "r.jsonl", *RIGHT)
    systems = ["--system", f"a={path},{path}", "--system", f"b={path},{path},{path}"]
    error = error_of(run(*systems, "--baseline", "a"))
    assert error.startswith("b has 3 runs and the baseline a 2; ")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--system", "a"), "is not of the form NAME=FILE,FILE,…"),
        (("--system", "a=b,"), "is not of the form NAME=FILE,FILE,…"),
        (("--system", "=b"), "is not of the form NAME=FILE,FILE,…"),
        (("--system", "a=b", "--system", "a=c"), "the name 'a' is given twice"),
        (("a", "--system", "a=b"), "--system a has the name of a file"),
        (("a", "--baseline", "a"), "--baseline needs another system"),
        (("--baseline", "a"), "--baseline needs another system"),
        (("-", "--system", "a=-"), "stdin can be read only once"),
        (("-", "--trials", "0"), "--trials"),
        ((), "Missing argument 'PREDICTIONS...' or --system"),
    ],
)
def test_systems_that_say_nothing_clear_are_usage_errors(
    arguments: tuple[str, ...], message: str
) -> None:
    result = run(*arguments, stdin="")
    assert result.exit_code == 2
    assert message in result.stderr


# — what is wrong —


@pytest.mark.parametrize("value", ["rouge", "rougeL,", "", "rougeL,nope"])
def test_an_unknown_metric_is_a_usage_error_that_lists_the_choices(value: str) -> None:
    result = run("-", "--metric", value, stdin="")
    assert result.exit_code == 2
    assert f"is not one of {', '.join(METRICS)}." in result.stderr


@pytest.mark.parametrize(
    "arguments", [(), ("-", "-"), ("-", "--lang", "fr"), ("-", "--format", "csv")]
)
def test_wrong_usage_exits_with_2(arguments: tuple[str, ...]) -> None:
    assert run(*arguments, stdin="").exit_code == 2


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "a.jsonl holds no records; "),
        ("\n\n", "a.jsonl holds no records; "),
        ('{"prediction": "x", "completion": "y"}\n{"completion": "y"}\n', "a.jsonl:2: .*generate"),
        ('{"prediction": "x", "prompt": "y"}\n', "a.jsonl:1: .*neither 'references' nor 'compl"),
        ('{"prediction": "x", "references": []}\n', "a.jsonl:1: 'references'"),
        ('{"prediction": null, "completion": "y"}\n', "a.jsonl:1: 'prediction' is not a text"),
        ("not json\n", "a.jsonl:1: not JSON"),
    ],
    ids=["empty", "blank", "not generated", "no reference", "none listed", "null", "not JSON"],
)
def test_a_bad_file_is_an_error_that_names_file_and_line(
    content: str, message: str, tmp_path: Path
) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(content, encoding="utf-8")
    error = error_of(run(str(path)))
    assert re.search(message, error)
    assert "; " in error


def test_a_bad_file_leaves_the_old_output_as_it_was(tmp_path: Path) -> None:
    target = tmp_path / "scores.jsonl"
    target.write_text("old")
    good, bad = write(tmp_path / "a.jsonl", GOOD), write(tmp_path / "b.jsonl", {"prompt": "x"})
    error_of(run(good, bad, "-o", str(target)))
    assert target.read_text() == "old"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.jsonl", "b.jsonl", target.name]


def test_stdin_without_records_and_a_missing_file_are_errors(tmp_path: Path) -> None:
    assert error_of(run("-", stdin="")).startswith("stdin holds no records; ")
    assert "cannot read" in error_of(run(str(tmp_path / "none.jsonl")))


# — warnings —

JAPANESE = {"prediction": "猫が座った", "references": ["猫が椅子に座った", "ねこがすわった"]}
CHINESE = {"prediction": "猫坐下了", "completion": "猫坐在椅子上"}
RUSSIAN = {"prediction": "кот сидит", "completion": "кот сел"}


@pytest.mark.parametrize(
    ("record", "arguments", "remedy"),
    [
        pytest.param(JAPANESE, ("--metric", "rougeL"), "use --lang ja", id="Japanese as English"),
        pytest.param(JAPANESE, ("--metric", "f1"), "use --lang ja", id="Japanese words"),
        pytest.param(JAPANESE, ("--lang", "zh"), "use --lang ja", id="Japanese as Chinese"),
        pytest.param(CHINESE, ("--metric", "bleu"), "use --lang zh", id="Chinese as English"),
        pytest.param(RUSSIAN, (), "use --metric chrf", id="Russian"),
        pytest.param(GOOD, ("--metric", "gsm8k"), "no number", id="no numbers"),
        pytest.param(JAPANESE, ("--lang", "ja"), None, id="Japanese as such"),
        pytest.param(CHINESE, ("--lang", "zh"), None, id="Chinese as such"),
        pytest.param(JAPANESE, ("--metric", "chrf"), None, id="characters need no words"),
        pytest.param(RUSSIAN, ("--metric", "em,f1"), None, id="Russian words"),
        pytest.param(GOOD, (), None, id="English"),
    ],
)
def test_a_metric_that_cannot_work_is_warned_of_once_with_the_remedy(
    record: dict[str, object], arguments: tuple[str, ...], remedy: str | None, tmp_path: Path
) -> None:
    path = write(tmp_path / "a.jsonl", record)
    result = run(path, path, *arguments)
    assert len(lines_of(result)) == 2
    if remedy is None:
        assert result.stderr == ""
    else:
        (line,) = result.stderr.splitlines()
        assert line.startswith("Warning: ")
        assert remedy in line
    assert run(path, "-q", *arguments).stderr == ""


# — the process —


def test_importing_the_command_imports_nothing_heavy() -> None:
    code = (
        "import sys, lorakit.commands.score\n"
        "heavy = 'torch transformers numpy rich rouge_score sacrebleu fugashi scipy'.split()\n"
        "print([name for name in heavy if name in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment()
    )
    assert done.stdout == "[]\n"


def test_scoring_imports_neither_torch_nor_transformers() -> None:
    code = (
        "import sys\nfrom lorakit.commands.score import score\n"
        f"score(['-', '--metric', {','.join(TEXT_METRICS)!r}], standalone_mode=False)\n"
        "print([name for name in ('torch', 'transformers') if name in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code],
        input=json.dumps({**GOOD, "references": ["the cat sat 3"]}),
        capture_output=True,
        text=True,
        check=True,
        env=environment(),
    )
    assert done.stdout.splitlines()[1:] == ["[]"]
    assert done.stderr == ""


def test_the_help_lists_every_metric() -> None:
    text = run("--help").output
    assert all(f"{name} " in text and metric.help in text for name, metric in METRICS.items())


def grouped(*rows: tuple[str, str, str]) -> list[dict[str, str]]:
    return [{"completion": c, "prediction": p, "type": kind} for c, p, kind in rows]


def test_groups_have_the_scores_of_files_that_hold_only_them(tmp_path: Path) -> None:
    rows = grouped(("a b", "a b", "x"), ("c", "d", "y"), ("e f", "e g", "x"))
    whole = write(tmp_path / "all.jsonl", *rows)
    names = ("rougeL", "bleu", "em")
    lines = lines_of(run(whole, "--group-by", "type", "--metric", ",".join(names)))
    assert [line.get("group") for line in lines] == [None, {"type": "x"}, {"type": "y"}]
    for line, members in zip(lines, (rows, [rows[0], rows[2]], [rows[1]]), strict=True):
        path = write(tmp_path / "some.jsonl", *members)
        (alone,) = lines_of(run(path, "--metric", ",".join(names)))
        assert line["count"] == len(members)
        assert [line[name] for name in names] == [alone[name] for name in names]


def test_groups_are_compared_with_the_baseline_one_by_one(tmp_path: Path) -> None:
    first = write(tmp_path / "a.jsonl", *grouped(("a", "a", "x"), ("c", "d", "y")))
    other = write(tmp_path / "b.jsonl", *grouped(("a", "b", "x"), ("c", "d", "y")))
    lines = lines_of(run(first, "--baseline", other, "--group-by", "type", "--metric", "em"))
    differences = [line["significance"].get("differences", {}).get("em") for line in lines]
    assert differences == [None, 50, None, 100, None, 0]


@pytest.mark.parametrize("kinds", [("y", "y"), ("y", "x"), ("x", ["x"])], ids=str)
def test_groups_that_the_baseline_does_not_have_are_one_line(
    kinds: tuple[Any, Any], tmp_path: Path
) -> None:
    rows = grouped(("a", "a", "x"), ("c", "d", "y"))
    first = write(tmp_path / "a.jsonl", *rows)
    others = [{**row, "type": kind} for row, kind in zip(rows, kinds, strict=True)]
    other = write(tmp_path / "b.jsonl", *others)
    error = error_of(run(first, "--baseline", other, "--group-by", "type", "--metric", "em"))
    assert 'the group "' in error
    assert f"{first}:" in error
    assert f"{other}:" in error
    assert error.endswith("; give --group-by a field that all files agree on")
    apart = lines_of(run(first, other, "--group-by", "type", "--metric", "em"))
    assert len(apart) > 2


def test_a_record_without_the_field_of_the_groups_is_named(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", *grouped(("a", "a", "x")), GOOD)
    assert f"{path}:2: the record has no field 'type'" in error_of(run(path, "--group-by", "type"))


def test_the_share_of_outputs_that_contain_the_baselines(tmp_path: Path) -> None:
    """Of four outputs two contain the baseline's; of the two with a lower F1 one does."""
    base = [("b", "b"), ("c d", "c d"), ("e", "x"), ("f", "f")]
    ours = [("b", "it is b"), ("c d", "c"), ("e", "e"), ("f", "f")]
    paths = [
        write(tmp_path / name, *({"completion": c, "prediction": p} for c, p in rows))
        for name, rows in (("base.jsonl", base), ("ours.jsonl", ours))
    ]
    metrics = "contains-baseline,contains-baseline-worse"
    lines = lines_of(run(paths[1], "--baseline", paths[0], "--metric", metrics))
    assert [line["contains-baseline"] for line in lines] == [100, 50]
    assert [line["contains-baseline-worse"] for line in lines] == [0, 50]


def test_comparing_with_the_baseline_needs_one(tmp_path: Path) -> None:
    result = run(write(tmp_path / "a.jsonl", GOOD), "--metric", "contains-baseline")
    assert result.exit_code == 2
    assert "needs --baseline" in result.stderr


def test_the_best_value_of_a_column_is_that_of_a_metric_with_a_direction(tmp_path: Path) -> None:
    from lorakit.scoring.systems import System, score_systems
    from lorakit.scoring.table import _best_values

    paths = write(tmp_path / "a.jsonl", GOOD), write(tmp_path / "b.jsonl", {**GOOD, **HALF})
    systems = [System((path,)) for path in paths]
    scored = score_systems(systems, metrics=["em", "length", "words-beyond-label"])
    assert _best_values(scored) == [100, None, None]


def test_two_systems_lengths_are_compared_in_words(tmp_path: Path) -> None:
    rows = [{**GOOD, "prediction": "one two three"}, {**GOOD, "prediction": "one"}]
    ours, theirs = write(tmp_path / "a.jsonl", *rows), write(tmp_path / "b.jsonl", GOOD, GOOD)
    _, line = lines_of(run(ours, theirs, "--baseline", theirs, "--metric", "length"))[::-1]
    assert line["length"] == 2
    assert line["significance"]["differences"] == {"length": -1}
    assert 0 < line["significance"]["p_values"]["length"] <= 1
