"""Sources: compressed files, archives, folders and pipes, and what is damaged in them."""

from __future__ import annotations

import bz2
import gzip
import io
import json
import lzma
import sys
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import zstandard

from lorakit.errors import LorakitError
from lorakit.recipes.readers.sources import parts
from lorakit.recipes.request import Tally
from tests.support.building import built, save

ROWS = "".join(f'{{"id": "{n}", "prompt": "p{n}", "completion": "c"}}\n' for n in range(3000))
IDS = [str(number) for number in range(3000)]

COMPRESS: dict[str, Callable[[bytes], bytes]] = {
    ".gz": gzip.compress,
    ".bz2": bz2.compress,
    ".xz": lzma.compress,
    ".zst": zstandard.ZstdCompressor().compress,
}


def zipped(*members: tuple[str, str | bytes]) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in members:
            archive.writestr(name, content)
    return buffer.getvalue()


def tarred(*members: tuple[str, str]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content.encode())
            archive.addfile(info, io.BytesIO(content.encode()))
    return buffer.getvalue()


FORMS: dict[str, bytes] = {
    **{ending: compress(ROWS.encode()) for ending, compress in COMPRESS.items()},
    "two gzip members": gzip.compress(ROWS[:100].encode()) + gzip.compress(ROWS[100:].encode()),
    "zip": zipped(("a/rows.jsonl", ROWS), ("__MACOSX/rows.jsonl", "x"), (".b.jsonl", "x")),
    "zip of gz": zipped(("rows.jsonl.gz", gzip.compress(ROWS.encode()))),
    "tar": tarred(("a/rows.jsonl", ROWS), ("a/README.md", "x")),
    "tar.gz": gzip.compress(tarred(("rows.jsonl", ROWS))),
}


@pytest.mark.parametrize("form", FORMS)
def test_a_compressed_file_is_known_by_its_bytes(form: str, tmp_path: Path) -> None:
    path = save(tmp_path / "rows", FORMS[form])
    assert [record["id"] for record in built("jsonl", path)] == IDS


@pytest.mark.parametrize("form", FORMS)
def test_a_compressed_file_is_read_from_a_pipe(form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(FORMS[form])))
    assert [record["id"] for record in built("jsonl")] == IDS


@pytest.mark.parametrize("form", [*COMPRESS, "tar.gz"])
def test_a_file_cut_short_is_an_error_that_names_it(form: str, tmp_path: Path) -> None:
    content = FORMS[form]
    path = save(tmp_path / "cut", content[: len(content) // 2])
    with pytest.raises(LorakitError, match=r"cut: damaged or cut short \(.*\); fetch it again"):
        built("jsonl", path)


@pytest.mark.parametrize(
    "content",
    [b"PK\x03\x04 no zip", FORMS["zip"][:500], b"\x1f\x8b no gzip"],
    ids=["no zip", "zip cut short", "no gzip"],
)
def test_a_damaged_archive_is_an_error(content: bytes, tmp_path: Path) -> None:
    with pytest.raises(LorakitError, match=r"; (unpack it|fetch it again)$"):
        built("jsonl", save(tmp_path / "a", content))


def test_an_encrypted_archive_is_an_error(tmp_path: Path) -> None:
    content = bytearray(zipped(("a.jsonl", ROWS)))
    content[6] |= 1  # the flag in the member's header, and in the directory's entry
    content[content.rfind(b"PK\x01\x02") + 8] |= 1
    with pytest.raises(LorakitError, match=r"encrypted.*; unpack it"):
        built("jsonl", save(tmp_path / "a.zip", bytes(content)))


def test_a_missing_parser_is_named_with_its_extra(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "zstandard", None)
    path = save(tmp_path / "a.zst", FORMS[".zst"])
    with pytest.raises(LorakitError, match=r"needs zstandard; run: pip install 'lorakit\[zst\]'"):
        built("jsonl", path)


def test_a_folder_gives_its_files_in_order_whatever_else_lies_there(tmp_path: Path) -> None:
    for name in ("b.jsonl", "a/z.jsonl.gz", ".hidden.jsonl", "README.md"):
        row = json.dumps({"id": name, "prompt": "p", "completion": "c"}).encode()
        save(tmp_path / name, gzip.compress(row) if name.endswith(".gz") else row)
    assert [record["id"] for record in built("jsonl", tmp_path)] == ["a/z.jsonl.gz", "b.jsonl"]


def test_a_folder_without_such_files_is_an_error(tmp_path: Path) -> None:
    save(tmp_path / "a.txt", "x")
    with pytest.raises(LorakitError, match=r"has no \*\.jsonl or .*; check the folder"):
        built("jsonl", tmp_path)


GSM = '{"question": "%s?", "answer": "#### 1"}\n'


@pytest.mark.parametrize("kind", ["folder", "zip", "tar"])
def test_the_split_chooses_a_file_of_a_folder_or_an_archive(kind: str, tmp_path: Path) -> None:
    members = [(f"grade/{split}.jsonl", GSM % split) for split in ("test", "train")]
    members.append(("grade/train_socratic.jsonl", "no"))
    if kind == "folder":
        for name, content in members:
            save(tmp_path / name, content)
    else:
        save(tmp_path / "grade", zipped(*members) if kind == "zip" else tarred(*members))
    for split in ("train", "test"):
        (record,) = built("gsm8k", tmp_path / "grade", split=split)
        assert record["prompt"] == f"Question: {split}?\nAnswer:"
    with pytest.raises(LorakitError, match=r"has no validation set, only train and test; "):
        built("gsm8k", tmp_path / "grade", split="validation")


def test_two_files_of_a_split_are_an_error_that_names_both(tmp_path: Path) -> None:
    save(tmp_path / "english_train.jsonl", "")
    save(tmp_path / "japanese_train.jsonl", "")
    with pytest.raises(LorakitError, match=r"english_train.* and .*japanese_train.*; name one"):
        built("xlsum", tmp_path)
    assert built("xlsum", tmp_path, lang="ja") == []


def test_bytes_are_counted_as_they_are_read(tmp_path: Path) -> None:
    path = save(tmp_path / "a.gz", FORMS[".gz"])
    read: list[int] = []
    for part in parts([str(path)], Tally(advance=read.append)):
        part.stream.read()
    assert sum(read) == path.stat().st_size


def test_a_document_that_is_too_large_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lorakit.recipes.readers.sources._LARGEST_WHOLE", 10)
    path = save(tmp_path / "a.tex", "x" * 11)
    with pytest.raises(LorakitError, match="larger than"):
        built("latex", path)


@pytest.mark.parametrize("recipe", ["jsonl", "csv", "jawikinews"])
def test_a_line_without_end_is_an_error_and_not_all_memory(
    recipe: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lorakit.recipes.readers.sources.LONGEST_LINE", 1000)
    monkeypatch.setattr("lorakit.recipes.readers.tables._LONGEST_CELL", 1000)
    path = save(tmp_path / "a.gz", gzip.compress(b"x" * 10_000_000))
    with pytest.raises(LorakitError, match=r"a\.gz:1: .*(more|larger) than"):
        built(recipe, path)


def test_zstandards_frames_are_read_one_after_the_other(tmp_path: Path) -> None:
    compress = zstandard.ZstdCompressor().compress
    halves = compress(ROWS[:1000].encode()) + compress(ROWS[1000:].encode())
    assert [record["id"] for record in built("jsonl", save(tmp_path / "a", halves))] == IDS
