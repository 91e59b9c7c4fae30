"""Rows of a data set that the library `datasets` saved to disk: folders of Arrow files.

A folder with state.json holds one split; one with dataset_dict.json holds a folder for each.
pyarrow reads the files a batch at a time; `datasets` itself is not needed.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path

from lorakit.errors import LorakitError, missing_package
from lorakit.recipes.readers.parquet import plain_row
from lorakit.recipes.readers.sources import Part
from lorakit.recipes.request import Request, Tally, split_aliases
from lorakit.records.record import Record

_BATCH = 256


def is_saved(path: str) -> bool:
    """Return whether a path is the folder of a data set saved to disk."""
    folder = Path(path)
    if any((folder / name).is_file() for name in ("dataset_dict.json", "state.json")):
        return True
    return (folder / "dataset_info.json").is_file() and any(folder.glob("data-*.arrow"))


def saved_files(path: str, split: str) -> list[str]:
    """Return the Arrow files of a split; of a folder that holds only one, those there are.

    Raises LorakitError if the data set has no such split, listing those it has.
    """
    folder = Path(path)
    if (folder / "dataset_dict.json").is_file():
        names = sorted(child.name for child in folder.iterdir() if is_saved(str(child)))
        name = next((name for name in split_aliases(split) if name in names), None)
        if name is None:
            listed = ", ".join(names) or "none"
            raise LorakitError(f"{path} has no split {split}; give --split with one of {listed}")
        return _arrow_files(folder / name, _state(folder / name / "state.json"))
    state = _state(folder / "state.json")
    held = state.get("_split")
    if isinstance(held, str) and split != Request.split and held not in split_aliases(split):
        raise LorakitError(f"{path} holds the split {held} alone; leave out --split {split}")
    return _arrow_files(folder, state)


def _arrow_files(folder: Path, state: Mapping[str, object]) -> list[str]:
    """Return a split's files in their order: as its state.json lists them, else by name."""
    if any(state.get(name) for name in ("_indices_data_files", "_indices_files")):
        raise LorakitError(
            f"{folder} is a selection of rows by indices; save it again after flatten_indices()"
        )
    listed = state.get("_data_files")
    entries = listed if isinstance(listed, list) else []
    names = [str(entry["filename"]) for entry in entries if _names_file(entry)]
    paths = [folder / name for name in names] or sorted(folder.glob("data-*.arrow"))
    if not paths:
        raise LorakitError(f"{folder} has no data-*.arrow; save the data set again")
    return [str(path) for path in paths]


def _names_file(entry: object) -> bool:
    """Return whether an entry of state.json names a file of the folder itself."""
    name = entry.get("filename") if isinstance(entry, dict) else None
    return isinstance(name, str) and Path(name).name == name


def _state(path: Path) -> dict[str, object]:
    """Return what state.json holds; empty where there is none."""
    try:
        state = json.loads(path.read_bytes()) if path.is_file() else {}
    except (OSError, ValueError, RecursionError):
        raise LorakitError(f"{path}: not JSON; save the data set again") from None
    return state if isinstance(state, dict) else {}


def arrow_in(part: Part, tally: Tally) -> Iterator[Record]:
    """Yield the rows of one Arrow file; values that JSON cannot express become texts."""
    try:
        import pyarrow
    except ImportError:
        raise missing_package("reading Arrow files", "pyarrow", "parquet") from None
    number = 0
    try:
        with pyarrow.ipc.open_stream(part.stream) as reader:
            for batch in reader:
                for start in range(0, batch.num_rows, _BATCH):
                    for fields in batch.slice(start, _BATCH).to_pylist():
                        number += 1
                        yield Record(plain_row(fields), f"{part.name}: record {number}")
    except (pyarrow.ArrowException, OSError) as error:
        raise LorakitError(
            f"{part.name}: not Arrow ({str(error).splitlines()[0]}); check that it is whole"
        ) from error
