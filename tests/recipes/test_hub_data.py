"""Parquet files, and data sets of the hub: from a cache made by hand."""

from __future__ import annotations

import datetime
import gzip
import io
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from lorakit.errors import LorakitError
from lorakit.recipes.readers.hub_data import _patterns_of
from tests.support.building import built, pairs, run, save
from tests.support.program import ENVIRONMENT

TEMPLATES = {"template": "{{q}}", "completion": "{{a}}"}
FLAGS = ("--template", "{{q}}", "--completion", "{{a}}")


def parquet_bytes(rows: list[dict[str, Any]]) -> bytes:
    buffer = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), buffer, row_group_size=100)
    return buffer.getvalue()


ROWS = [{"q": f"q{number}", "a": "é", "n": [number]} for number in range(1000)]


@pytest.mark.parametrize("form", ["file", "gz", "pipe", "folder"])
def test_parquet_is_read_from_files_folders_and_pipes(
    form: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    content = parquet_bytes(ROWS)
    if form == "pipe":
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(content)))
        made = built("parquet", **TEMPLATES)
    else:
        path = save(tmp_path / "a.parquet", gzip.compress(content) if form == "gz" else content)
        made = built("parquet", tmp_path if form == "folder" else path, **TEMPLATES)
    assert pairs(made) == [(f"q{number}", "é") for number in range(1000)]
    assert made[7]["n"] == [7]


def test_values_that_json_has_no_form_for_become_texts(tmp_path: Path) -> None:
    row = {"q": "q", "a": "a", "d": datetime.date(2020, 1, 2), "b": b"\xff", "f": float("nan")}
    path = save(tmp_path / "a.parquet", parquet_bytes([row]))
    (record,) = built("parquet", path, **TEMPLATES)
    assert (record["d"], record["b"], record["f"]) == ("2020-01-02", None, None)
    result = run("parquet", path, "--template", "{{q}}", "--completion", "{{a}}")
    assert json.loads(result.stdout)["d"] == "2020-01-02"


@pytest.mark.parametrize("content", [b"", b"PAR1 no", b"no parquet"], ids=repr)
def test_what_is_no_parquet_is_an_error(content: bytes, tmp_path: Path) -> None:
    with pytest.raises(LorakitError, match=r"a\.parquet: not Parquet \(.*\); "):
        built("parquet", save(tmp_path / "a.parquet", content), **TEMPLATES)


def test_a_columns_name_that_is_no_text_is_an_error(tmp_path: Path) -> None:
    content = parquet_bytes([{"question": "q", "a": "a"}])
    damaged = content.replace(b"\x08question", b"\x08q\x9cestion")
    assert damaged != content
    with pytest.raises(LorakitError, match=r"a\.parquet: not Parquet \(.*utf-8.*\); "):
        built("parquet", save(tmp_path / "a.parquet", damaged), **TEMPLATES)


def test_a_missing_parser_is_named_with_its_extra(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = save(tmp_path / "a.parquet", parquet_bytes(ROWS))
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(LorakitError, match=r"pip install 'lorakit\[parquet\]'"):
        built("parquet", path, **TEMPLATES)


# — the hub —

CARD = """---
configs:
- config_name: main
  data_files:
  - split: train
    path: main/train-*
  - split: test
    path: main/test-*
- config_name: socratic
  data_files:
  - split: train
    path: socratic/train-*
---
# Card
"""


CHAT_CARD = """---
configs:
- config_name: default
  data_files:
  - split: train_sft
    path: data/train_sft-*
  - split: train_gen
    path: data/train_gen-*
---
"""


def line(name: str) -> bytes:
    return f'{{"q": "{name}", "a": "x"}}\n'.encode()


def cached(home: Path, repo: str, files: dict[str, bytes], commit: str = "a" * 40) -> None:
    """Lay a data set's files into a cache as huggingface_hub does."""
    folder = home / "hub" / f"datasets--{repo.replace('/', '--')}"
    save(folder / "refs" / "main", commit)
    for name, content in files.items():
        save(folder / "snapshots" / commit / name, content)


@pytest.fixture
def home(tmp_path: Path) -> Path:
    cached(
        tmp_path,
        "owner/carded",
        {
            "README.md": CARD.encode(),
            "main/train-00000-of-00002.parquet": parquet_bytes([{"q": "m1", "a": "x"}]),
            "main/train-00001-of-00002.parquet": parquet_bytes([{"q": "m2", "a": "x"}]),
            "main/test-00000-of-00001.parquet": parquet_bytes([{"q": "t", "a": "x"}]),
            "socratic/train-00000-of-00001.parquet": parquet_bytes([{"q": "s", "a": "x"}]),
        },
    )
    cached(
        tmp_path,
        "owner/plain",
        {
            "README.md": b"no card",
            "train.jsonl": line("jsonl"),
            "train.csv": b"q,a\ncsv,x\n",
            "data/val.jsonl.gz": gzip.compress(line("val")),
            "constraint.jsonl": line("no"),
            "script.py": b"raise SystemExit",
        },
    )
    cached(
        tmp_path,
        "owner/chat",
        {
            "README.md": CHAT_CARD.encode(),
            "data/train_sft-00000-of-00001.parquet": parquet_bytes([{"q": "sft", "a": "x"}]),
            "data/train_gen-00000-of-00001.parquet": parquet_bytes([{"q": "gen", "a": "x"}]),
        },
    )
    cached(
        tmp_path,
        "owner/infos",
        {
            "README.md": b"---\ndataset_info:\n  splits:\n  - name: train_sft\n---\n",
            "data/train_sft.jsonl": line("sft"),
            "data/train_gen.jsonl": line("gen"),
        },
    )
    cached(
        tmp_path,
        "owner/folders",
        {"en/train.jsonl": line("en"), "ja/train.jsonl": line("ja")},
    )
    return tmp_path


def hub(home: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "lorakit", "build-dataset", *arguments, *FLAGS],
        capture_output=True,
        encoding="utf-8",
        env={**ENVIRONMENT, "HF_HOME": str(home), "HF_HUB_OFFLINE": "1"},
        check=False,
    )


@pytest.mark.parametrize(
    ("arguments", "prompts"),
    [
        (("hf://owner/carded:main",), ["m1", "m2"]),
        (("hf", "hf://owner/carded:main", "--split", "test"), ["t"]),
        (("hf://owner/carded:socratic@main",), ["s"]),
        (("hf://owner/plain",), ["jsonl"]),
        (("hf://owner/plain@" + "a" * 40, "--split", "validation"), ["val"]),
        (("hf://owner/plain", "--split", "dev"), ["val"]),
        (("hf://owner/folders:ja",), ["ja"]),
        (("hf://owner/chat", "--split", "train_gen"), ["gen"]),
        (("hf://owner/infos", "--split", "train_sft"), ["sft"]),
        (("hf://owner/plain", "--split", "constraint"), ["no"]),
    ],
    ids=lambda value: " ".join(value),
)
def test_a_data_set_of_the_hub_is_read_from_its_cache(
    arguments: tuple[str, ...], prompts: list[str], home: Path
) -> None:
    done = hub(home, *arguments)
    assert (done.returncode, done.stderr) == (0, "")
    assert [json.loads(line)["prompt"] for line in done.stdout.splitlines()] == prompts


@pytest.mark.parametrize(
    ("address", "split", "message"),
    [
        ("hf://owner/carded:socratic", "test", "has no split test; give --split with one of train"),
        ("hf://owner/plain", "train_sft", "has no files for --split train_sft; look at its page"),
        ("hf://owner/plain", "*", "no split is called '*'; give a word of letters and digits"),
    ],
)
def test_a_split_that_is_not_there_is_one_line(
    address: str, split: str, message: str, home: Path
) -> None:
    done = hub(home, address, "--split", split)
    assert (done.returncode, done.stderr.count("\n")) == (1, 1)
    assert message in done.stderr


def test_dashes_inside_a_card_do_not_end_it(tmp_path: Path) -> None:
    card = "---\nconfigs:\n- config_name: default\n  data_files: data/a---b.jsonl\n---\n# Card\n"
    rows = {"data/a---b.jsonl": line("dashes"), "train.jsonl": line("other")}
    cached(tmp_path, "owner/dashes", {"README.md": card.encode(), **rows})
    done = hub(tmp_path, "hf://owner/dashes")
    assert (done.returncode, done.stderr) == (0, "")
    assert json.loads(done.stdout)["prompt"] == "dashes"


@pytest.mark.parametrize(
    "card",
    [
        b"",
        b"---",
        b"---\nconfigs: [\n---\n",
        b"---\nconfigs: {a: b}\n---\n",
        b"---\nconfigs: 3\n---\n",
        b"---\n- a list\n---\n",
        b"---\ndate: 2020-99-99\n---\n",
        b"---\nconfigs: \xff\n---\n",
        b"---\nconfigs: " + b"[" * 10_000 + b"\n---\n",
    ],
    ids=lambda card: repr(card)[:30],
)
def test_a_broken_card_counts_as_none(card: bytes, tmp_path: Path) -> None:
    cached(tmp_path, "owner/broken", {"README.md": card, "train.jsonl": line("train")})
    done = hub(tmp_path, "hf://owner/broken")
    assert (done.returncode, done.stderr) == (0, "")
    assert json.loads(done.stdout)["prompt"] == "train"


@pytest.mark.parametrize(
    ("address", "message"),
    [
        ("hf://owner/none", "cannot fetch hf://owner/none: it is neither cached nor within reach"),
        (
            "hf://owner/carded",
            "has several configurations; write hf://…:NAME with one of main, soc",
        ),
        ("hf://owner/carded:x", "has no configuration x; "),
        ("hf://owner/folders", "has several configurations; write hf://…:NAME with one of en, ja"),
        ("hf://owner/plain:x", "has no files for --split train; "),
        (
            "hf://owner/chat",
            "hf://owner/chat has no split train; give --split with one of train_sft, train_gen\n",
        ),
        ("hf://owner/infos", "has no split train; give --split with one of train_sft\n"),
        ("hf://owner/plain@v9", "cannot fetch"),
        ("hf://a/b/c", "is no data set's address; "),
        ("hf://", "is no data set's address; "),
    ],
)
def test_what_cannot_be_had_is_one_line(address: str, message: str, home: Path) -> None:
    done = hub(home, address)
    assert done.returncode == 1
    assert done.stderr.count("\n") == 1
    assert message in done.stderr


@pytest.mark.parametrize(
    ("files", "patterns"),
    [
        ("data.csv", ["data.csv"]),
        (["a.csv", "b.csv"], ["a.csv", "b.csv"]),
        ([{"split": "train", "path": ["a", "b"]}, {"split": "test", "path": "c"}], ["a", "b"]),
        ([{"split": "test", "path": "c"}], []),
        (None, []),
    ],
)
def test_a_cards_data_files_come_in_several_forms(files: Any, patterns: list[str]) -> None:
    assert _patterns_of(files, "train") == patterns


@pytest.mark.parametrize(
    ("split", "patterns"),
    [("dev", ["d", "e"]), ("validation", ["v"]), ("val", ["v"]), ("test", [])],
)
def test_a_cards_split_of_that_very_name_goes_before_its_aliases(
    split: str, patterns: list[str]
) -> None:
    files = [{"split": "dev", "path": ["d", "e"]}, {"split": "validation", "path": "v"}]
    assert _patterns_of(files, split) == patterns
