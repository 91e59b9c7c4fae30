"""Data sets on the Hugging Face hub, or in its cache: the files of one split, read as they are.

Which files these are is what the data set's card says (`configs`, `data_files`) or, where it says
nothing, what the files' names say. No code of a data set is ever run.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from lorakit.errors import LorakitError
from lorakit.hub import explained
from lorakit.recipes.readers.parquet import parquet_in
from lorakit.recipes.readers.sources import matches, parts
from lorakit.recipes.readers.tables import rows_in
from lorakit.recipes.request import Request, Tally
from lorakit.records import Record

_ADDRESS = re.compile(
    r"hf://(?P<repo>[\w.-]+(?:/[\w.-]+)?)(?::(?P<config>[\w.-]+))?(?:@(?P<revision>[^@\s]+))?"
)
_FORMS = ("*.parquet", "*.jsonl", "*.json", "*.csv", "*.tsv")
_SPLITS = {
    "train": ("train",),
    "validation": ("validation", "valid", "val", "dev"),
    "test": ("test",),
}


def hub_rows(sources: Sequence[str], request: Request, tally: Tally) -> Iterator[Record]:
    """Yield the rows of the split of hf://owner/name[:config][@revision].

    HF_HOME, HF_TOKEN and HF_HUB_OFFLINE act as everywhere. A row, as JSON:

        {"id": "n1", "prompt": "Summarize: A long, long text.", "completion": " Short."}
    """
    for address in sources:
        paths = split_paths(address, request.split) if address.startswith("hf://") else [address]
        for part in parts(paths, tally):
            is_parquet = part.suffix == ".parquet"
            yield from parquet_in(part, tally) if is_parquet else rows_in(part, tally)


def split_paths(address: str, split: str) -> list[str]:
    """Return the local paths of a split's files, fetched where they are not in the cache."""
    match = _ADDRESS.fullmatch(address)
    if match is None:
        raise LorakitError(
            f"{address} is no data set's address; write hf://owner/name[:config][@revision]"
        )
    repo, config, revision = match["repo"], match["config"], match["revision"]
    folder = _fetch(repo, revision, ["README.md"], address)
    patterns = _card_patterns(folder, config, split, address)
    if patterns:
        folder = _fetch(repo, revision, patterns, address)
        found = _files(folder, lambda name: any(fnmatch(name, pattern) for pattern in patterns))
    else:
        forms = [f"*{name}*{form[1:]}*" for name in _SPLITS[split] for form in _FORMS]
        folder = _fetch(repo, revision, forms, address)
        found = _by_name(folder, config, split, address)
    if not found:
        raise LorakitError(f"{address} has no files for --split {split}; look at its page")
    return [str(folder / name) for name in found]


def _fetch(repo: str, revision: str | None, patterns: list[str], address: str) -> Path:
    from huggingface_hub import snapshot_download

    with explained(address, revision):
        return Path(
            snapshot_download(repo, repo_type="dataset", revision=revision, allow_patterns=patterns)
        )


def _card_patterns(folder: Path, config: str | None, split: str, address: str) -> list[str]:
    """Return the patterns that the card has for a split; empty where it has none at all."""
    configs = [each for each in _card(folder).get("configs") or () if isinstance(each, dict)]
    named = {str(each.get("config_name", "default")): each for each in configs}
    if not any("data_files" in each for each in configs):
        return []
    chosen = config or ("default" if "default" in named or len(named) > 1 else next(iter(named)))
    if chosen not in named:
        default = [name for name, each in named.items() if each.get("default")]
        if config or not default:
            what = f"no configuration {config}" if config else "several configurations"
            raise LorakitError(
                f"{address} has {what}; write hf://…:NAME with one of {', '.join(named)}"
            )
        chosen = default[0]
    return _patterns_of(named[chosen].get("data_files"), split)


def _patterns_of(files: Any, split: str) -> list[str]:
    """Return the patterns of a split in one of the forms that `data_files` takes."""
    if isinstance(files, str):
        files = [files]
    found: list[str] = []
    for each in files if isinstance(files, list) else ():
        if isinstance(each, str):
            found += [each] if split == "train" else []
        elif isinstance(each, dict) and each.get("split") in _SPLITS[split]:
            paths = each.get("path")
            found += [str(path) for path in (paths if isinstance(paths, list) else [paths])]
    return found


def _card(folder: Path) -> dict[str, Any]:
    import yaml

    try:
        text = (folder / "README.md").read_text(encoding="utf-8")
        found = yaml.safe_load(text.split("---")[1]) if text.startswith("---") else {}
    except (OSError, UnicodeDecodeError, yaml.YAMLError):
        return {}
    return found if isinstance(found, dict) else {}


def _by_name(folder: Path, config: str | None, split: str, address: str) -> list[str]:
    """Return the files whose names tell the split, of the one configuration and of one form."""
    found = _files(folder, lambda name: bool(_words(name) & {*_SPLITS[split]}))
    if config:
        found = [name for name in found if config in Path(name).parts or config in _words(name)]
    for form in _FORMS:
        of_form = [name for name in found if matches(name, (form,))]
        groups = sorted({_group(name, split) for name in of_form})
        if len(groups) > 1:
            raise LorakitError(
                f"{address} has several configurations; "
                f"write hf://…:NAME with one of {', '.join(groups)}"
            )
        if of_form:
            return of_form
    return []


def _files(folder: Path, wanted: Any) -> list[str]:
    listed = (path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    return sorted(name for name in listed if matches(name, _FORMS) and wanted(name))


def _words(name: str) -> set[str]:
    return set(re.split(r"[^A-Za-z0-9]+", name.lower()))


def _group(name: str, split: str) -> str:
    """Return the folders of a file, but for those named after the split or `data`."""
    dull = {*_SPLITS[split], "data"}
    return "/".join(part for part in Path(name).parts[:-1] if part.lower() not in dull)
