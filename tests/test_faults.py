"""Full disks, file-size limits and read-only folders at every write of every command.

A command that cannot write ends in one line that names the file, with exit 1; each old file is
whole or was replaced by the whole new one. What is left for `--resume` may stay beside it.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import pytest

from tests.support.endpoints import serving
from tests.support.in_process import Ended, file_size_limit, run_here
from tests.support.training_data import rows, save_rows
from tests.test_pipes import llama_adapter

OLD = b"what stood here before\n"
PAGE = 4096  # bytes: the unit in which a tmpfs gives out room
ROOM = 200  # pages

TRAINING = "--epochs 2 --dtype float32 --lr 1e-2 --data {records} --model {model}"
# Every command that writes files, with all that it can write: names in braces are INPUTS, {o} is
# the folder of the outputs.
COMMANDS = {
    "build-dataset": "build-dataset jsonl {records} -o {o}/r.jsonl",
    "train-adapter": f"train-adapter {TRAINING} -o {{o}}/t.safetensors --log {{o}}/t.log",
    "train-adapter to a folder": f"train-adapter {TRAINING} -o {{o}}/t/",
    "merge": "merge {a} {b} --method cat -o {o}/m.safetensors",
    "merge to a folder": "merge {a} {b} --method svd -o {o}/m/",
    "merge on data": f"merge {{a}} {{b}} {TRAINING} --prune-ratio 0,0.3 -o {{o}}/m.safetensors "
    "--log {o}/m.log --plot {o}/m.svg",
    "merge by lorahub": "merge {a} {b} --data {records} --model {model} --method lorahub "
    "-o {o}/m.safetensors --log {o}/m.log",
    "find-boundary": "find-boundary {a} --data {records} --model {model} --max-new-tokens 3 "
    "-o {o}/b.jsonl --predictions {o}/p.jsonl --plot {o}/b.svg",
    "find-boundary by probability": "find-boundary {a} --data {records} --model {model} "
    "--by probability -o {o}/b.jsonl --plot {o}/b.png",
    "strip-layers": "strip-layers {a} --boundary 2 -o {o}/s.safetensors",
    "strip-layers to a folder": "strip-layers {a} --boundary 2 -o {o}/s/",
    "scale-layers": "scale-layers {a} --from 1 --factor 0.5 -o {o}/s.safetensors",
    "generate": "generate {a} --data {records} --model {model} --max-new-tokens 3 -o {o}/g.jsonl",
    "generate with several": "generate {a} {b} --data {records} --model {model} "
    "--max-new-tokens 3 -o {o}/{{name}}.jsonl",
    "score": "score {p} {q} -o {o}/s.jsonl",
    "compare": "compare {p} {q} --where differs --html {o}/c.html -o {o}/c.jsonl",
    "judge": "judge {p} {q} --endpoint {url} --judge-model m --ratings {o}/r.jsonl -o {o}/j.jsonl",
    "judge's sheet": "judge {p} {q} --export-sheet {o}/s.csv",
    "judge's rated sheets": "judge --import-sheet {sheet} --sheet-key {key} "
    "--ratings {o}/r.jsonl -o {o}/j.jsonl",
    "convert": "convert {a} -o {o}/c.safetensors",
    "convert to a folder": "convert {a} -o {o}/c/",
    "inspect": "inspect {a} --importance --data {records} --model {model} --plot {o}/i.svg",
}


@pytest.fixture(scope="module")
def inputs(llama: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Mapping[str, str]]:
    """What the commands read, by the names in COMMANDS."""
    folder = tmp_path_factory.mktemp("inputs")
    p, q = (
        save_rows(folder / f"{name}.jsonl", [{**row, "prediction": row[field]} for row in rows(6)])
        for name, field in (("p", "completion"), ("q", "prompt"))
    )
    sheet = str(folder / "sheet.csv")  # whose last column, the rating, is empty
    with serving(lambda body, number: "8") as server:
        yield {
            "model": llama,
            "records": save_rows(folder / "records.jsonl", rows(6)),
            "a": llama_adapter(folder / "a.safetensors", 1),
            "b": llama_adapter(folder / "b.safetensors", 2),
            "p": p,
            "q": q,
            "sheet": rated_sheet(sheet, p, q),
            "key": sheet.replace(".csv", ".key.json"),
            "url": server.url,
        }


def rated_sheet(sheet: str, *predictions: str) -> str:
    """Export a sheet and rate every item of it 7; return its path."""
    run_here("judge", *predictions, "--export-sheet", sheet)
    unrated = Path(sheet).read_text("utf-8")
    assert unrated.count(',""\n') == 12
    Path(sheet).write_text(unrated.replace(',""\n', ',"7"\n'), "utf-8")
    return sheet


def run_into(folder: Path, name: str, inputs: Mapping[str, str]) -> Ended:
    return run_here(*COMMANDS[name].format(o=folder, **inputs).split())


def files_in(folder: Path) -> dict[str, bytes]:
    """Return the bytes of every file in a folder and those in it, by its path there."""
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): path.read_bytes() for path in paths}


def put_old_files(folder: Path, names: Mapping[str, bytes]) -> None:
    """Put other content under all the names that a command will write."""
    for name in names:
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(OLD)


def check_fault(ended: Ended, folder: Path, whole: Mapping[str, bytes]) -> None:
    """Check how a command ended that could not write all of its files `whole`."""
    assert ended.code == 1, ended.stderr
    (line,) = ended.errors
    assert "cannot write " in line
    assert str(folder) in line
    assert "; " in line
    left = files_in(folder)
    for name, content in whole.items():
        if not name.endswith(".log"):
            assert left[name] in (OLD, content), f"{name} is half-written"
    litter = {name for name in left if name.endswith(".part")} - for_resuming(left)
    assert not litter


def for_resuming(names: Mapping[str, bytes]) -> set[str]:
    """Return the side files that a resumed run goes on from."""
    return {name for name in names if re.fullmatch(r"\..*\.(answers|[0-9a-f]{12})\.part", name)}


@contextlib.contextmanager
def whole_outputs(
    name: str, inputs: Mapping[str, str], folder: Path
) -> Iterator[Mapping[str, bytes]]:
    """Yield what a command writes where nothing is in its way, and to a folder of that name."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    ended = run_into(folder, name, inputs)
    assert ended.code == 0, ended.stderr
    whole = files_in(folder)
    shutil.rmtree(folder)
    folder.mkdir()
    yield whole


@pytest.mark.parametrize("name", COMMANDS)
def test_a_file_size_limit_is_one_line_and_leaves_old_files_whole(
    name: str, inputs: Mapping[str, str], tmp_path: Path
) -> None:
    folder = tmp_path / "out"
    with whole_outputs(name, inputs, folder) as whole:
        for size in sorted({0, *(len(content) - 1 for content in whole.values())}):
            put_old_files(folder, whole)
            with file_size_limit(size):
                ended = run_into(folder, name, inputs)
            check_fault(ended, folder, whole)


@pytest.mark.parametrize("name", [name for name in COMMANDS if "to a folder" in name])
def test_the_file_of_a_folder_that_cannot_be_written_is_named(
    name: str, inputs: Mapping[str, str], tmp_path: Path
) -> None:
    folder = tmp_path / "out"
    order = ("adapter_config.json", "adapter_model.safetensors", "README.md")
    with whole_outputs(name, inputs, folder) as whole:
        sizes = {path.rpartition("/")[2]: len(content) for path, content in whole.items()}
        assert set(sizes) == set(order)
        for limit in (0, sizes["adapter_config.json"]):
            first = next(file for file in order if sizes[file] > limit)
            with file_size_limit(limit):
                ended = run_into(folder, name, inputs)
            assert f"/{first}: file too large" in ended.errors[0] or ".resume: " in ended.errors[0]


FULL = "/dev/full"
DEVICES = [
    pytest.param(name, match.start(), id=f"{name} {match[0]}")
    for name, line in COMMANDS.items()
    for match in re.finditer(
        r"(-o|--log|--predictions|--ratings|--html) \{o\}/[a-z.]+(?= |$)", line
    )
    if match[0].endswith((".jsonl", ".safetensors", ".log", ".html"))
]


@pytest.mark.skipif(not Path(FULL).exists(), reason="needs Linux's /dev/full")
@pytest.mark.parametrize(("name", "place"), DEVICES)
def test_a_full_device_in_place_of_any_output_is_one_line(
    name: str, place: int, inputs: Mapping[str, str], tmp_path: Path
) -> None:
    line = COMMANDS[name]
    line = line[:place] + re.sub(r"\{o\}/\S+", FULL, line[place:], count=1)
    ended = run_here(*line.format(o=tmp_path, **inputs).split())
    assert ended.code == 1, ended.stderr
    (error,) = ended.errors
    assert f"cannot write {FULL}: no space left on device; choose another" in error


# — a full disk —


@pytest.fixture(scope="module")
def disk(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The folder of a small file system of its own, which needs the right to mount one."""
    folder = tmp_path_factory.mktemp("disk")
    mount = ["mount", "-t", "tmpfs", "-o", f"size={ROOM * PAGE}", "lorakit-test", str(folder)]
    try:
        done = subprocess.run(mount, capture_output=True, check=False)
    except FileNotFoundError:
        pytest.skip("there is no mount command")
    if done.returncode:
        pytest.skip("mounting a file system needs root")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


@contextlib.contextmanager
def pages_left(disk: Path, pages: int) -> Iterator[None]:
    """Fill a disk up to so many pages while the block runs."""
    filler = disk / "filler"
    state = os.statvfs(disk)
    filler.write_bytes(bytes((state.f_bfree - pages) * state.f_bsize))
    assert os.statvfs(disk).f_bfree == pages
    try:
        yield
    finally:
        filler.unlink()


@pytest.mark.parametrize(
    "rooms",
    [
        pytest.param((0, 1, 2, 3, 4, 6, 9, 13, 20, 30, 45, 67, 100, 150), id="some"),
        pytest.param(tuple(range(150)), id="every", marks=pytest.mark.slow),
    ],
)
@pytest.mark.parametrize("name", COMMANDS)
def test_a_full_disk_is_one_line_and_leaves_old_files_whole(
    name: str, rooms: Sequence[int], inputs: Mapping[str, str], disk: Path
) -> None:
    folder = disk / "out"
    with whole_outputs(name, inputs, folder) as whole:
        for pages in rooms:
            put_old_files(folder, whole)
            with pages_left(disk, pages):
                ended = run_into(folder, name, inputs)
            if ended.code == 0:
                break
            check_fault(ended, folder, whole)
            shutil.rmtree(folder)
            folder.mkdir()
    assert ended.code == 0
    assert pages, "a disk without room was enough"


@pytest.mark.parametrize("name", COMMANDS)
def test_a_read_only_disk_is_one_line(name: str, inputs: Mapping[str, str], disk: Path) -> None:
    folder = disk / "out"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
    try:
        ended = run_into(folder, name, inputs)
    finally:
        subprocess.run(["mount", "-o", "remount,rw", str(disk)], check=True)
    check_fault(ended, folder, {})
    assert re.search("read-only file system|permission denied", ended.errors[0])
    assert not files_in(folder)


# — closed pipes —


# Those whose -o comes last and is one file: it becomes stdout.
TO_STDOUT = {
    name: re.sub(r"(--html \S+ )?-o \S+$", "-o -", line)
    for name, line in COMMANDS.items()
    if line.endswith((".jsonl", ".safetensors")) and "{{name}}" not in line
}


@pytest.mark.parametrize("name", TO_STDOUT)
def test_a_pipe_closed_by_its_reader_ends_quietly_with_141(
    name: str, inputs: Mapping[str, str], tmp_path: Path
) -> None:
    ended = run_here(*TO_STDOUT[name].format(o=tmp_path, **inputs).split(), reader_gone=True)
    assert ended.code == 141
    assert not ended.errors


CUT_SHORT = {
    "adapter": ("inspect -", "a"),
    "adapter to strip": ("strip-layers - --boundary 1 -o {o}/x.safetensors", "a"),
    "adapter to merge": ("merge - {b} --method cat -o {o}/x.safetensors", "a"),
    "records": ("build-dataset jsonl - -o {o}/x.jsonl", "records"),
    "records to generate": ("generate --model {model} --data - -o {o}/x.jsonl", "records"),
    "records to train on": ("train-adapter --model {model} --data - -o {o}/x/", "records"),
    "predictions": ("score - -o {o}/x.jsonl", "p"),
    "predictions to compare": ("compare - {q} -o {o}/x.jsonl", "p"),
}


@pytest.mark.parametrize(
    ("name", "share"),
    [pytest.param(name, 0.5, id=f"{name} halfway") for name in CUT_SHORT]
    + [pytest.param(name, 0.0, id=f"{name} at once") for name in CUT_SHORT if name != "records"],
)
def test_a_pipe_closed_by_its_writer_is_one_line_and_no_output(
    name: str, share: float, inputs: Mapping[str, str], tmp_path: Path
) -> None:
    line, source = CUT_SHORT[name]
    content = Path(inputs[source]).read_bytes()
    arguments = line.format(o=tmp_path, **inputs).split()
    ended = run_here(*arguments, stdin=content[: int(share * len(content))])
    assert ended.code == 1, ended.stderr
    assert re.search("stdin| - ", ended.errors[0])
    assert not files_in(tmp_path).keys() - for_resuming(files_in(tmp_path))
