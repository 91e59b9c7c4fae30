"""Files: what is opened, and that what is written replaces the old file whole or not at all."""

from __future__ import annotations

import contextlib
import io
import os
import stat
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import IO

import pytest

from lorakit.errors import LorakitError
from lorakit.files import (
    atomic_path,
    check_output,
    hidden_path_beside,
    is_stream,
    open_input,
    open_text_output,
    reading,
    refuse_terminal,
    size,
)
from lorakit.runs.resume import OutputLines, continuing

KEY = "0123456789abcdef"


def names_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@contextlib.contextmanager
def writing_half(output: contextlib.AbstractContextManager[IO[str]], text: str) -> Iterator[None]:
    """Write a text into an output that is still open in the block."""
    with output as stream:
        stream.write(text)
        stream.flush()
        yield


def replace_stdout(monkeypatch: pytest.MonkeyPatch, target: io.BytesIO) -> None:
    # In another encoding and with other line ends than data has: neither may matter.
    stream = io.TextIOWrapper(target, encoding="ascii", newline="\r\n")
    monkeypatch.setattr(sys, "stdout", stream)


# — reading —


def test_a_file_is_read_as_bytes(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"\xff\r\n")
    with reading(str(tmp_path / "a")) as stream:
        assert stream.read() == b"\xff\r\n"


def unreadable(kind: str, folder: Path) -> Path:
    path = folder / "it"
    if kind == "a folder":
        path.mkdir()
    elif kind == "below a file":
        path.write_text("")
        return path / "below"
    elif kind == "a link to itself":
        path.symlink_to(path)
    elif kind == "not permitted":
        if os.geteuid() == 0:
            pytest.skip("root may read every file")
        path.write_text("")
        path.chmod(0)
    elif kind == "a name too long":
        return folder / ("x" * 300)
    return path


@pytest.mark.parametrize(
    "kind",
    ["missing", "a folder", "below a file", "a link to itself", "not permitted", "a name too long"],
)
def test_what_cannot_be_read_is_named_with_the_reason(kind: str, tmp_path: Path) -> None:
    path = str(unreadable(kind, tmp_path))
    with pytest.raises(LorakitError, match=r"^cannot read .*: [a-z ]+; check the path$") as caught:
        open_input(path)
    assert path in str(caught.value)


@pytest.mark.skipif(not Path("/proc/self/mem").exists(), reason="needs Linux's /proc")
def test_an_error_while_reading_is_named_too() -> None:
    with (
        pytest.raises(LorakitError, match=r"^cannot read /proc/self/mem: input/output error; "),
        reading("/proc/self/mem") as stream,
    ):
        stream.read(10)


# — writing —


@pytest.mark.parametrize("old", [None, "old"])
def test_a_file_is_replaced_when_the_block_ends_and_not_before(
    old: str | None, tmp_path: Path
) -> None:
    target = tmp_path / "out"
    if old is not None:
        target.write_text(old)
    with open_text_output(str(target)) as stream:
        stream.write("né\n")
        stream.flush()
        assert (target.read_text() if target.exists() else None) == old
        assert len(names_in(tmp_path)) == 1 + (old is not None)
    assert target.read_bytes() == "né\n".encode()
    assert names_in(tmp_path) == ["out"]


@pytest.mark.parametrize("error", [LorakitError("x"), KeyboardInterrupt(), ValueError()], ids=repr)
def test_a_failed_block_leaves_the_old_file_and_nothing_beside_it(
    error: BaseException, tmp_path: Path
) -> None:
    target = tmp_path / "out"
    target.write_text("old")
    with pytest.raises(type(error)), writing_half(open_text_output(str(target)), "half"):
        raise error
    assert target.read_text() == "old"
    assert names_in(tmp_path) == ["out"]


@pytest.mark.parametrize("there", [True, False], ids=["to a file", "to nothing"])
def test_a_link_is_followed_and_stays(there: bool, tmp_path: Path) -> None:
    folder, link = tmp_path / "folder", tmp_path / "link"
    folder.mkdir()
    if there:
        (folder / "target").write_text("old")
    link.symlink_to(Path("folder") / "target")
    with open_text_output(str(link)) as stream:
        stream.write("new")
    assert link.is_symlink()
    assert (folder / "target").read_text() == "new"
    assert names_in(tmp_path) == ["folder", "link"]
    assert names_in(folder) == ["target"]


def test_an_old_file_keeps_its_permissions_and_a_new_one_has_the_usual(tmp_path: Path) -> None:
    old, new = tmp_path / "old", tmp_path / "new"
    old.write_text("old")
    old.chmod(0o640)
    before = os.umask(0o027)
    try:
        for path in (old, new):
            with open_text_output(str(path)) as stream:
                stream.write("new")
        assert os.umask(0o027) == 0o027, "the mask was left changed"
    finally:
        os.umask(before)
    assert [stat.S_IMODE(path.stat().st_mode) for path in (old, new)] == [0o640, 0o640]


def unwritable(kind: str, folder: Path) -> Path:
    if kind == "a folder":
        return folder
    if kind == "in no folder":
        return folder / "none" / "out"
    if kind == "below a file":
        (folder / "file").write_text("")
        return folder / "file" / "out"
    if os.geteuid() == 0:
        pytest.skip("root may write into every folder")
    (folder / "locked").mkdir(mode=0o500)
    return folder / "locked" / "out"


UNWRITABLE = pytest.mark.parametrize(
    "kind", ["a folder", "in no folder", "below a file", "not permitted"]
)


@UNWRITABLE
def test_an_output_that_cannot_be_written_is_refused_before_the_work(
    kind: str, tmp_path: Path
) -> None:
    path = str(unwritable(kind, tmp_path))
    before = names_in(tmp_path)
    with pytest.raises(LorakitError, match=r"^cannot write .*; choose another -o$") as caught:
        check_output(path)
    assert path in str(caught.value)
    with pytest.raises(LorakitError, match=r"^cannot write"), open_text_output(path):
        pytest.fail("the work was begun")
    with (
        pytest.raises(LorakitError, match=r"^cannot write"),
        OutputLines(path, KEY, resume=False).writing(0),
    ):
        pytest.fail("the work was begun")
    assert names_in(tmp_path) == before


def test_an_output_that_can_be_written_is_left_as_it_is_by_the_check(tmp_path: Path) -> None:
    (tmp_path / "old").write_text("old")
    for path in (tmp_path / "old", tmp_path / "new", Path("-"), Path(os.devnull)):
        check_output(str(path))
    assert names_in(tmp_path) == ["old"]
    assert (tmp_path / "old").read_text() == "old"


def test_a_device_is_written_and_never_replaced() -> None:
    before = os.stat(os.devnull)
    with open_text_output(os.devnull) as stream:
        stream.write("lost")
    assert os.path.samestat(before, os.stat(os.devnull))
    assert stat.S_ISCHR(os.stat(os.devnull).st_mode)


def test_a_named_pipe_is_written_and_stays(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    heard: list[str] = []
    reader = threading.Thread(target=lambda: heard.append(pipe.read_text()))
    reader.start()
    with open_text_output(str(pipe)) as stream:
        stream.write("said")
    reader.join(10)
    assert heard == ["said"]
    assert names_in(tmp_path) == ["pipe"]


@pytest.mark.parametrize(
    ("name", "expected"), [("-", True), (os.devnull, True), (".", False), ("no such file", False)]
)
def test_streams_are_told_from_files(name: str, expected: bool) -> None:
    assert is_stream(name) is expected


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs Linux's /dev/full")
@pytest.mark.parametrize("where", ["-o", "stdout"])
def test_a_full_disk_is_an_error_that_says_so(where: str, monkeypatch: pytest.MonkeyPatch) -> None:
    path = "/dev/full"
    if where == "stdout":
        path = "-"
        monkeypatch.setattr(sys, "stdout", os.fdopen(os.open("/dev/full", os.O_WRONLY), "w"))
    with (
        pytest.raises(LorakitError, match=r"^cannot write .*: no space left on device; "),
        open_text_output(path) as stream,
    ):
        stream.write("x")
    if where == "stdout":
        with pytest.raises(OSError, match=r"No space left"):
            sys.stdout.close()


def test_stdout_gets_utf8_and_plain_line_ends_and_stays_open(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    target = io.BytesIO()
    replace_stdout(monkeypatch, target)
    for text in ("é日\n", "\u2028\n"):
        with open_text_output("-") as stream:
            stream.write(text)
    assert target.getvalue() == "é日\n\u2028\n".encode()


def test_a_closed_pipe_stays_a_broken_pipe_error(monkeypatch: pytest.MonkeyPatch) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    monkeypatch.setattr(sys, "stdout", os.fdopen(writer, "w"))
    with pytest.raises(BrokenPipeError), open_text_output("-") as stream:
        stream.write("x")
    with pytest.raises(BrokenPipeError):
        sys.stdout.close()


def test_bytes_are_refused_by_a_terminal_only(monkeypatch: pytest.MonkeyPatch) -> None:
    pty = pytest.importorskip("pty", reason="needs a Unix terminal")
    main, side = pty.openpty()
    with os.fdopen(main), os.fdopen(side, "w") as terminal:
        monkeypatch.setattr(sys, "stdout", terminal)
        with pytest.raises(LorakitError, match=r"^an adapter would go to the terminal; "):
            refuse_terminal("an adapter")
        replace_stdout(monkeypatch, io.BytesIO())
        refuse_terminal("an adapter")


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0 B"),
        (1023, "1023 B"),
        (1024, "1.00 KiB"),
        (3 << 29, "1.50 GiB"),
        (1 << 50, "1024.00 TiB"),
    ],
)
def test_bytes_are_in_the_largest_unit(count: int, text: str) -> None:
    assert size(count) == text


def test_a_side_file_is_synced_before_it_takes_the_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done: list[str] = []
    sync, replace = os.fsync, os.replace

    def told_sync(number: int) -> None:
        done.append("sync")
        sync(number)

    def told_replace(source: Path, target: Path) -> None:
        done.append("rename")
        replace(source, target)

    monkeypatch.setattr(os, "fsync", told_sync)
    monkeypatch.setattr(os, "replace", told_replace)
    with atomic_path(tmp_path / "out") as side:
        side.write_text("x")
    assert done == ["sync", "rename", "sync"]


# — resuming —


def leave_half(target: Path, key: str, text: str) -> None:
    """Write as a run that is killed in the middle."""
    output = OutputLines(str(target), key, resume=False).writing(0)
    with contextlib.suppress(KeyboardInterrupt), writing_half(output, text):
        raise KeyboardInterrupt


def test_a_killed_run_is_gone_on_from_after_its_last_whole_line(tmp_path: Path) -> None:
    target = tmp_path / "out"
    leave_half(target, KEY, "é 1\nline 2\nline 3\nli")
    assert not target.exists()
    part = OutputLines(str(target), KEY, resume=True)
    assert part.lines == ["é 1\n", "line 2\n", "line 3\n"]
    with part.writing(2) as stream:
        stream.write("again\n")
    assert target.read_text(encoding="utf-8") == "é 1\nline 2\nagain\n"
    assert names_in(tmp_path) == ["out"]


@pytest.mark.parametrize(
    "content",
    [
        b"\xff\xfe\n",
        b"PK\x03\x04\n",
        b"[[[[\n",
        b"1\n",
        b"null\n",
        b"[" * 100_000 + b"\n",
        b'{"a": ' + b"9" * 5000 + b"}\n",
        b'{"prompt": "x"}\n[]\n',
    ],
    ids=["not UTF-8", "zip", "cut", "number", "null", "deep", "digits", "a list among records"],
)
def test_a_side_file_of_anything_but_records_is_left_and_refused(
    tmp_path: Path, content: bytes
) -> None:
    output = str(tmp_path / "out")
    side = hidden_path_beside(output, f"{KEY[:12]}.part")
    side.write_bytes(content)
    with (
        pytest.raises(LorakitError, match=r"\.part is not what generate wrote; run without --resu"),
        continuing(output, KEY, resume=True),
    ):
        pytest.fail("the run went on")
    assert side.read_bytes() == content


def test_lines_end_at_line_feeds_alone(tmp_path: Path) -> None:
    lines = ['"\u2028\u2029\u0085"\n', '"\x0b\x0c\x1c\r"\n']
    leave_half(tmp_path / "out", KEY, "".join(lines))
    assert OutputLines(str(tmp_path / "out"), KEY, resume=True).lines == lines


@pytest.mark.parametrize(
    ("key", "resume"), [("another key!!", True), (KEY, False)], ids=["another run", "afresh"]
)
def test_what_another_run_left_is_not_gone_on_from(key: str, resume: bool, tmp_path: Path) -> None:
    leave_half(tmp_path / "out", KEY, "line 1\n")
    assert OutputLines(str(tmp_path / "out"), key, resume=resume).lines == []


def test_a_killed_run_leaves_the_old_output(tmp_path: Path) -> None:
    target = tmp_path / "out"
    target.write_text("old")
    leave_half(target, KEY, "new\n")
    assert target.read_text() == "old"
