"""The program: how it exits, and what it says when it fails."""

from __future__ import annotations

import importlib.metadata
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from lorakit.adapters.storage import save_adapter
from lorakit.cli import COMMANDS, load_command
from tests.support.adapters import tiny
from tests.support.program import ENVIRONMENT, PROGRAM, run, shell, wait_for

ROW = '{"prompt": "p", "completion": "c", "prediction": "c"}\n'
JUDGE = ("--endpoint", "http://127.0.0.1:1/v1", "--judge-model", "x")


def one_error(done: subprocess.CompletedProcess[str]) -> str:
    """Return the one line on stderr of a run that failed, without `Error: `."""
    assert done.stderr.count("\n") == 1, done.stderr
    assert done.stderr.startswith("Error: ")
    return done.stderr.removeprefix("Error: ").rstrip("\n")


# — bad data: 1 —


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("score", "none.jsonl"), "cannot read none.jsonl: no such file or directory; "),
        (("score", "."), "cannot read .: is a directory; "),
        (("score", "bad.jsonl"), "bad.jsonl:2: not JSON"),
        (("score", "row.jsonl", "-o", "none/out"), "cannot write none/out: no such file"),
        (("score", "row.jsonl", "-o", "."), "cannot write .: is a directory; "),
        (("build-dataset", "jsonl", "bad.jsonl", "-o", "out"), "bad.jsonl:2: not JSON"),
        (("build-dataset", "csv", "latin.csv"), "latin.csv:2: not UTF-8 text; "),
        (("build-dataset", "microworld", "nothing"), "unknown task 'nothing'; "),
        (("inspect", "none.safetensors"), "cannot read none.safetensors: "),
        (("inspect", "row.jsonl"), "row.jsonl"),
        (("inspect", "."), "; "),
        (("judge", "none.jsonl", *JUDGE), "cannot read none.jsonl: "),
        (("judge", "bad.jsonl", *JUDGE), "bad.jsonl:2: not JSON"),
        (("judge", "row.jsonl", *JUDGE), "cannot reach http://127.0.0.1:1/v1: "),
        (("judge", "row.jsonl", *JUDGE, "--template", "x"), "lacks {{prediction}}; "),
        (("judge", "row.jsonl", *JUDGE, "--ratings", "none/r"), "cannot write none/r: "),
        (("strip-layers", "none.safetensors", "--boundary", "1"), "cannot read none.safetensors: "),
        (("strip-layers", "a.safetensors", "--boundary", "0"), "use the base model"),
        (("strip-layers", "a.safetensors", "--keep", "5"), "no LoRA on the layers to keep; "),
        (("strip-layers", "a.safetensors", "--boundary", "none"), "cannot read none: "),
        (("strip-layers", "a.safetensors", "--boundary", "row.jsonl"), "row.jsonl:1: 'boundary' "),
        (("strip-layers", "a.safetensors", "--boundary", "bad.jsonl"), "bad.jsonl:1: 'boundary' "),
        (
            ("strip-layers", "a.safetensors", "--boundary", "1", "-o", "none/a.bin"),
            "cannot write no",
        ),
        (("strip-layers", "a.safetensors", "--boundary", "1", "-o", "row.jsonl/a"), "not a dir"),
        (("convert", "a.safetensors", "-o", "a.gguf"), "convert writes no .gguf files; "),
        (("convert", "none.safetensors", "-o", "a/"), "cannot read none.safetensors: "),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else None,
)
def test_bad_data_is_one_line_that_says_what_and_what_to_do_and_exits_with_1(
    arguments: tuple[str, ...], message: str, tmp_path: Path
) -> None:
    (tmp_path / "row.jsonl").write_text(ROW)
    (tmp_path / "bad.jsonl").write_text(ROW + "bad\n")
    (tmp_path / "latin.csv").write_bytes("prompt,completion\né,c\n".encode("latin-1"))
    save_adapter(tiny(), str(tmp_path / "a.safetensors"))
    before = sorted(tmp_path.iterdir())
    done = run(*arguments, cwd=tmp_path)
    line = one_error(done)
    assert done.returncode == 1
    assert message in line
    assert "; " in line
    assert sorted(tmp_path.iterdir()) == before


@pytest.mark.skipif(not Path("/proc/self/mem").exists(), reason="needs Linux's /proc")
@pytest.mark.parametrize(
    "arguments", [("score", "-"), ("build-dataset", "csv"), ("inspect", "-")], ids=repr
)
def test_a_stdin_that_cannot_be_read_is_an_error(arguments: tuple[str, ...]) -> None:
    with open("/proc/self/mem", "rb", buffering=0) as unreadable:
        done = run(*arguments, stdin=unreadable.fileno())
    assert done.returncode == 1
    assert "input/output error" in one_error(done)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs Linux's /dev/full")
@pytest.mark.parametrize(
    "arguments", [("score", "-"), ("build-dataset", "jsonl"), ("--help",)], ids=repr
)
def test_a_full_disk_is_an_error_and_not_silence(arguments: tuple[str, ...]) -> None:
    with open("/dev/full", "wb") as full:
        done = run(*arguments, stdin=ROW, stdout=full)
    assert done.returncode == 1
    assert "no space left on device" in one_error(done)


# — streams that are closed —


@pytest.mark.parametrize(
    ("script", "code"),
    [
        ("lorakit build-dataset jsonl row.jsonl >&-", 1),
        ("lorakit --help >&-", 1),
        ("lorakit build-dataset jsonl row.jsonl -o out >&-", 0),
        ("lorakit score - <&-", 1),
        ("lorakit build-dataset jsonl row.jsonl -o out <&-", 0),
        ("lorakit build-dataset jsonl row.jsonl --sample 2 -o out 2>&-", 0),
        ("lorakit score none.jsonl 2>&-", 1),
    ],
)
def test_a_closed_stream_matters_only_where_it_is_needed(
    script: str, code: int, tmp_path: Path
) -> None:
    (tmp_path / "row.jsonl").write_text(ROW)
    done = shell(script, tmp_path)
    assert done.returncode == code
    assert "Traceback" not in done.stderr
    if code == 1 and "2>&-" not in script:
        one_error(done)
    if "-o out" in script:
        assert json.loads((tmp_path / "out").read_text())["prompt"] == "p"


def test_a_pipe_closed_by_its_reader_ends_the_program_quietly_with_141() -> None:
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "wb") as closed:
        done = run("build-dataset", "jsonl", stdin=ROW, stdout=closed)
    assert (done.returncode, done.stderr) == (141, "")


# — Ctrl-C: 130 —


def test_ctrl_c_exits_with_130_and_leaves_the_old_file(tmp_path: Path) -> None:
    (tmp_path / "out").write_text("old")
    with subprocess.Popen(
        [PROGRAM, "build-dataset", "jsonl", "-o", "out"],
        stdin=subprocess.PIPE,
        stderr=subprocess.PIPE,
        cwd=tmp_path,
        env=ENVIRONMENT,
    ) as child:
        assert child.stdin is not None
        child.stdin.write(ROW.encode())
        child.stdin.flush()
        # a record that has reached the side file: the command is in the middle of its work
        wait_for(lambda: any(path.stat().st_size for path in tmp_path.glob(".out.*.part")))
        child.send_signal(signal.SIGINT)
        assert child.wait(30) == 130
        assert child.stderr is not None
        assert b"Traceback" not in child.stderr.read()
    assert (tmp_path / "out").read_text() == "old"
    left = sorted(path.suffix for path in tmp_path.iterdir())
    assert left == ["", ".part"]  # what --resume goes on from


# — wrong usage: 2 —

SERVED = ("--data", "x", "--endpoint", "http://x/v1", "--served-model", "m")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "Usage: "),
        (("nothing",), "No such command 'nothing'"),
        (("--nothing",), "No such option"),
        (("score",), "Missing argument"),
        (("score", "-", "-"), "stdin can be read only once"),
        (("judge", "a", "--endpoint", "x", *JUDGE[2:]), "--endpoint is no http(s) URL; give one"),
        (("judge", "a", "--endpoint", "http://[::1", *JUDGE[2:]), "--endpoint is no http(s) URL; "),
        (
            ("generate", "--data", "a", "--endpoint", "http://x:abc/v1", "--served-model", "m"),
            "--endpoint is no http(s) URL; ",
        ),
        (("score", "-", "--nothing"), "No such option"),
        (("build-dataset", "nothing"), "Invalid value for 'RECIPE'"),
        (("build-dataset", "jsonl", "-", "-"), "one stdin"),
        (("generate", "-", "--data", "-"), "one stdin"),
        (("generate",), "Missing option '--data'"),
        (("generate", "--data", "x", "--resume"), "--resume needs -o"),
        (("generate", "--data", "-", "--few-shot", "-"), "one stdin"),
        (("generate", "--data", "x", "--samples", "2"), "--samples needs --temperature"),
        (("generate", "--data", "x", "--shots", "2"), "--shots needs --few-shot FILE"),
        (("generate", "--data", "x", "--stop", ""), "an empty text would stop everything"),
        (("generate", "a", "b", "--data", "x"), "give -o '{name}.jsonl'"),
        (("generate", "a", "b", "--data", "x", "-o", "y"), "give -o '{name}.jsonl'"),
        (("generate", "a", "b", "--data", "-", "-o", "{name}"), "read --data several times"),
        (("generate", "--data", "x", "--served-model", "m"), "--served-model needs --endpoint"),
        (("generate", "--data", "x", "--retries", "0"), "--retries needs --endpoint"),
        (
            ("generate", "--data", "x", "--endpoint", "http://x/v1"),
            "Missing option '--served-model'",
        ),
        (
            ("generate", "a", *SERVED),
            "--endpoint takes no ADAPTER: have the server load it",
        ),
        (("generate", *SERVED, "--model", "m"), "--model is for a base that is loaded"),
        (("generate", *SERVED, "--truncate"), "--truncate is for a base that is loaded"),
        (("train-adapter", "--data", "-", "--val", "-"), "one stdin"),
        (("train-adapter", "--data", "x", "--layers", "5-1"), "runs backwards"),
        (("merge", "a", "-", "--data", "-"), "one stdin"),
        (("merge", "a", "b", "--data", "-", "--val", "-"), "one stdin"),
        (("merge", "-", "-", "--data", "x"), "one stdin"),
        (("merge", "--data", "x"), "Missing argument"),
        (("merge", "a", "b"), "Missing option '--data' or '--method'. Methods: adaptive ("),
        (("merge", "a", "b", "--rank", "4"), "Methods: adaptive (train jointly"),
        (("merge", "a", "--method", "adaptive"), "Missing option '--data'. Methods: "),
        (("merge", "a", "--data", "x", "--rank", "4"), "--rank does not belong to --method adap"),
        (
            ("merge", "a", "--method", "cat", "--rank", "4"),
            "--rank does not belong to --method cat",
        ),
        (
            ("merge", "a", "--method", "cat", "--density", "1"),
            "--density does not belong to --meth",
        ),
        (
            ("merge", "a", "--method", "svd", "--data", "x"),
            "--data does not belong to --method svd",
        ),
        (("merge", "a", "--method", "cat", "--prune-ratio", "0"), "--prune-ratio does not belong"),
        (
            ("merge", "a", "--method", "ties", "--seed", "0"),
            "--seed does not belong to --method ti",
        ),
        (("merge", "a", "--rank", "4", "--resume"), "--resume does not belong to --method svd"),
        (
            ("merge", "a", "b", "--method", "cat", "--weights", "1"),
            "--weights has 1 for 2 adapters",
        ),
        (("merge", "a", "--method", "cat", "--weights", "1,x"), "'x' is not a number"),
        (("merge", "a", "--method", "cat", "--weights", "nan"), "'nan' is not a number"),
        (("merge", "a", "--method", "ties", "--density", "0"), "0 < density ≤ 1"),
        (("merge", "-", "-", "--method", "cat"), "one stdin"),
        (("merge", "a", "--data", "x", "--prune-ratio", "1"), "0 ≤ ratio < 1"),
        (("merge", "a", "--data", "x", "--prune-ratio", "nan"), "is not a number"),
        (
            ("merge", "a", "--data", "x", "--unit", "module"),
            "--unit module needs one of --prune-ratio and --prune-threshold",
        ),
        (
            (
                *("merge", "a", "--data", "x", "--unit", "module"),
                *("--prune-ratio", "0.1", "--prune-threshold", "1"),
            ),
            "--unit module needs one of --prune-ratio and --prune-threshold",
        ),
        (
            (
                *("merge", "a", "--data", "x", "--unit", "module"),
                *("--prune-ratio", "0.1", "--group", "row"),
            ),
            "--unit module takes --group adapter or all, not row",
        ),
        (
            (
                *("merge", "a", "--data", "x", "--unit", "module"),
                *("--prune-threshold", "1", "--group", "all"),
            ),
            "--prune-threshold has none",
        ),
        (("merge", "a", "--data", "x", "--prune-every", "0"), "nor 'epoch'"),
        (
            ("merge", "a", "--data", "x", "--keep", "last", "--patience", "3"),
            "--patience has no effect with --keep last",
        ),
        (
            ("train-adapter", "--data", "x", "--keep", "last", "--patience", "3"),
            "--patience has no effect with --keep last",
        ),
        (("merge", "a", "--data", "x", "--prune-threshold", "1"), "is for --unit module only"),
        (("merge", "a", "--data", "x", "--plot", "a.png"), "--plot needs several ratios"),
        (("merge", "a", "--data", "x", "--metric", "em"), "--metric needs several ratios"),
        (("merge", "a", "--data", "x", "--select-by", "bertscore"), "is not one of loss, rouge1"),
        (
            ("find-boundary", "a", "--data", "x", "--metric", "lossy"),
            "'lossy' is not one of loss, rouge1",
        ),
        (
            ("merge", "a", "--data", "x", "--method", "lorahub", "--epochs", "3"),
            "--epochs does not belong to --method lorahub, but to adaptive, learned-weights",
        ),
        (
            ("merge", "a", "--data", "x", "--method", "learned-weights", "--prune-ratio", "0.1"),
            "--prune-ratio does not belong to --method learned-weights, but to adaptive.",
        ),
        (
            ("merge", "a", "--data", "x", "--method", "learned-weights", "--weights", "1"),
            "--weights does not belong to --method learned-weights, but to cat, linear",
        ),
        (("merge", "a", "b", "--method", "learned-weights"), "Missing option '--data'."),
        (
            ("merge", "a", "--method", "tsv", "--seed", "1"),
            "--seed does not belong to --method tsv, but to adaptive, learned-weights, dare-",
        ),
        (("merge", "a", "--method", "knots", "--density", "2"), "0 < density ≤ 1"),
        (("inspect",), "Missing argument"),
        (("judge", "-", "--endpoint", "http://x/v1"), "Missing option '--judge-model'"),
        (("judge", "-", "--judge-model", "x"), "Missing option '--endpoint'"),
        (("judge", "-", "-", *JUDGE), "one stdin"),
        (("judge", "-", "--against", "-", *JUDGE), "one stdin"),
        (("judge", "a", "--resume", *JUDGE), "--resume needs -o"),
        (("judge", "a", *JUDGE, "--judge-model", "x"), "given twice"),
        (("judge", "a", *JUDGE, *JUDGE[:2]), "Give --endpoint once, or once for each"),
        (("judge", "a", *JUDGE, "--request", "[]"), "is not a JSON object"),
        (("judge", "a", *JUDGE, "--ratings", "-"), "Only one of --ratings and -o"),
        (("strip-layers", "a"), "Give either --boundary or --keep"),
        (("strip-layers", "a", "--boundary", "1", "--keep", "0"), "Give either --boundary or"),
        (("strip-layers", "--boundary", "-"), "one stdin"),
        (("strip-layers", "-", "--boundary", "-"), "one stdin"),
        (("strip-layers", "a", "--boundary", "-1"), "-1 is below 0"),
        (("strip-layers", "a", "--keep", "3-1"), "runs backwards"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else None,
)
def test_wrong_usage_exits_with_2_and_shows_the_usage(
    arguments: tuple[str, ...], message: str, monkeypatch: pytest.MonkeyPatch, capfd: Any
) -> None:
    from lorakit.cli import main

    monkeypatch.setattr(sys, "argv", ["lorakit", *arguments])
    with pytest.raises(SystemExit) as left:
        main()
    out, err = capfd.readouterr()
    assert (left.value.code, out) == (2, "")
    assert message in err
    assert err.startswith("Usage: lorakit")
    assert "Traceback" not in err


# — what it says about itself —


def test_the_version_is_that_of_the_package() -> None:
    done = run("--version")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == importlib.metadata.version("lorakit") + "\n"


@pytest.mark.parametrize("flag", ["-h", "--help"])
def test_the_help_names_every_command_with_a_line_about_it(flag: str) -> None:
    done = run(flag)
    assert done.returncode == 0
    for name, command in ((name, load_command(name)) for name in COMMANDS):
        assert f"\n  {name} " in done.stdout
        assert command.help, name


def test_python_m_lorakit_is_the_same_program() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "lorakit", "score", "none"],
        capture_output=True,
        encoding="utf-8",
        check=False,
    )
    assert done.returncode == 1
    assert done.stderr == run("score", "none").stderr


def test_help_is_shown_in_a_locale_without_its_letters() -> None:
    ascii_only = {**ENVIRONMENT, "PYTHONIOENCODING": "ascii"}
    done = subprocess.run(
        [PROGRAM, "inspect", "--help"], capture_output=True, env=ascii_only, check=False
    )
    assert (done.returncode, done.stderr) == (0, b"")


def test_data_is_utf8_whatever_the_locale() -> None:
    ascii_only = {**ENVIRONMENT, "PYTHONIOENCODING": "ascii"}
    row = '{"id": "1", "prompt": "é日", "completion": "c"}\n'.encode()
    done = subprocess.run(
        [PROGRAM, "build-dataset", "jsonl"],
        input=row,
        capture_output=True,
        env=ascii_only,
        check=False,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, row, b"")


def test_data_alone_goes_to_stdout_and_notes_go_to_stderr(tmp_path: Path) -> None:
    done = run("build-dataset", "jsonl", "--sample", "9", stdin=ROW)
    assert [json.loads(line)["prompt"] for line in done.stdout.splitlines()] == ["p"]
    assert done.stderr == "Note: only 1 records for --sample 9.\n"
    path = save_adapter(tiny(), str(tmp_path / "a.safetensors"))
    done = run("inspect", path)
    assert json.loads(done.stdout)["adapter"] == path
    assert done.stderr == ""


@pytest.mark.parametrize("name", list(COMMANDS))
def test_the_list_of_commands_has_the_first_sentence_of_each(name: str) -> None:
    command = load_command(name)
    assert command.name == name
    assert COMMANDS[name] == command.get_short_help_str(limit=1000)


@pytest.mark.parametrize(
    ("typed", "meant"),
    [("mrege", "merge"), ("train", "train-adapter"), ("Score", "score"), ("inspct", "inspect")],
)
def test_a_mistyped_command_gets_a_suggestion(typed: str, meant: str) -> None:
    done = run(typed, "a", "--b")
    assert done.returncode == 2
    assert done.stderr.endswith(f"Error: No such command '{typed}'. Did you mean '{meant}'?\n")


def test_a_command_like_no_other_gets_none() -> None:
    assert run("xyz").stderr.endswith("Error: No such command 'xyz'.\n")
