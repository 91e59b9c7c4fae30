"""Read the files of one split of a data set on the Hugging Face hub, or in its cache.

The data set's card names them (`configs`, `data_files`); where it does not, the files' names tell
the split. No code of a data set is ever run.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from fnmatch import fnmatch
from pathlib import Path

from lorakit.errors import LorakitError
from lorakit.hub import hub_errors_explained
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

    HF_HOME, HF_TOKEN and HF_HUB_OFFLINE work as usual. A row, as JSON:

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
        names = _files(folder, lambda name: any(fnmatch(name, pattern) for pattern in patterns))
    else:
        forms = [f"*{name}*{form[1:]}*" for name in _SPLITS[split] for form in _FORMS]
        folder = _fetch(repo, revision, forms, address)
        names = _by_name(folder, config, split, address)
    if not names:
        raise LorakitError(f"{address} has no files for --split {split}; look at its page")
    return [str(folder / name) for name in names]


def _fetch(repo: str, revision: str | None, patterns: list[str], address: str) -> Path:
    """Return a local folder that holds the files that match the patterns."""
    from huggingface_hub import snapshot_download

    with hub_errors_explained(address, revision):
        return Path(
            snapshot_download(repo, repo_type="dataset", revision=revision, allow_patterns=patterns)
        )


def _card_patterns(folder: Path, config: str | None, split: str, address: str) -> list[str]:
    """Return the card's patterns of a split; an empty list where the card names no files."""
    configs = _dicts_in(_card(folder / "README.md").get("configs"))
    named = {str(entry.get("config_name", "default")): entry for entry in configs}
    if not any("data_files" in entry for entry in configs):
        return []
    chosen = config or ("default" if "default" in named or len(named) > 1 else next(iter(named)))
    if chosen not in named:
        default = [name for name, entry in named.items() if entry.get("default")]
        if config or not default:
            what = f"no configuration {config}" if config else "several configurations"
            raise LorakitError(
                f"{address} has {what}; write hf://…:NAME with one of {', '.join(named)}"
            )
        chosen = default[0]
    return _patterns_of(named[chosen].get("data_files"), split)


def _patterns_of(data_files: object, split: str) -> list[str]:
    """Return the patterns of a split in one of the forms that `data_files` takes.

    A path without a split belongs to `train`.
    """
    entries = [data_files] if isinstance(data_files, str) else data_files
    patterns: list[str] = []
    for entry in entries if isinstance(entries, list) else ():
        if isinstance(entry, str):
            patterns += [entry] if split == "train" else []
        elif isinstance(entry, dict) and entry.get("split") in _SPLITS[split]:
            paths = entry.get("path")
            patterns += [str(path) for path in (paths if isinstance(paths, list) else [paths])]
    return patterns


def _card(path: Path) -> Mapping[str, object]:
    """Return the front matter of a data set's card; empty where it is missing or unreadable."""
    import yaml
    from huggingface_hub.repocard import metadata_load

    try:
        return metadata_load(path) or {}
    except (OSError, ValueError, RecursionError, yaml.YAMLError):
        return {}


def _dicts_in(value: object) -> list[dict[str, object]]:
    """Return the dicts in a list of a card; an empty list where it is not a list."""
    return [entry for entry in value if isinstance(entry, dict)] if isinstance(value, list) else []


def _by_name(folder: Path, config: str | None, split: str, address: str) -> list[str]:
    """Return the configuration's files whose names contain the split, in the first format met."""
    names = _files(folder, lambda name: bool(_words(name) & {*_SPLITS[split]}))
    if config:
        names = [name for name in names if config in Path(name).parts or config in _words(name)]
    for form in _FORMS:
        of_form = [name for name in names if matches(name, (form,))]
        configs = sorted({_configuration(name, split) for name in of_form})
        if len(configs) > 1:
            raise LorakitError(
                f"{address} has several configurations; "
                f"write hf://…:NAME with one of {', '.join(configs)}"
            )
        if of_form:
            return of_form
    return []


def _files(folder: Path, wanted: Callable[[str], bool]) -> list[str]:
    """Return the sorted names, relative to the folder, of the wanted files of rows."""
    names = (path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    return sorted(name for name in names if matches(name, _FORMS) and wanted(name))


def _words(name: str) -> set[str]:
    """Return the words of a file's name in lower case."""
    return set(re.split(r"[^A-Za-z0-9]+", name.lower()))


def _configuration(name: str, split: str) -> str:
    """Return the folders of a file, but for those named after the split or `data`."""
    ignored = {*_SPLITS[split], "data"}
    return "/".join(part for part in Path(name).parts[:-1] if part.lower() not in ignored)
