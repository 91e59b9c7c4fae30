"""Read the files of one split of a data set on the Hugging Face hub, or in its cache.

The data set's card names them (`configs`, `data_files`); where it does not, the files' names tell
the split. No code of a data set is ever run.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from fnmatch import fnmatch
from pathlib import Path

from lorakit.errors import LorakitError, check_packages
from lorakit.files import STDIO
from lorakit.hub import hub_errors_explained
from lorakit.recipes.readers.parquet import parquet_in
from lorakit.recipes.readers.saved import arrow_in, is_saved, saved_files
from lorakit.recipes.readers.sources import Part, matches, parts
from lorakit.recipes.readers.tables import rows_in
from lorakit.recipes.request import SPLITS, Request, Tally, split_aliases
from lorakit.records.record import Record

_ADDRESS = re.compile(
    r"hf://(?P<repo>[\w.-]+(?:/[\w.-]+)?)(?::(?P<config>[\w.-]+))?(?:@(?P<revision>[^@\s]+))?"
)
_FORMS = ("*.parquet", "*.jsonl", "*.json", "*.csv", "*.tsv")
_READERS: dict[str, Callable[[Part, Tally], Iterator[Record]]] = {
    ".parquet": parquet_in,
    ".arrow": arrow_in,
}


def hub_rows(sources: Sequence[str], request: Request, tally: Tally) -> Iterator[Record]:
    """Yield the rows of the split of hf://owner/name[:config][@revision].

    HF_HOME, HF_TOKEN and HF_HUB_OFFLINE act as everywhere. A source may also be the folder of a
    data set saved to disk, or a file of rows. A row, as JSON:

        {"id": "n1", "prompt": "Summarize: A long, long text.", "completion": " Short."}
    """
    if any(source.startswith("hf://") for source in sources):
        check_packages("reading data sets of the hub", "pyarrow", "yaml", extra="hub")
    for source in sources or (STDIO,):
        for part in _parts(source, request.split, tally):
            yield from _READERS.get(part.suffix, rows_in)(part, tally)


def _parts(source: str, split: str, tally: Tally) -> Iterator[Part]:
    """Yield the files of a source, as far as they are of the split."""
    if source.startswith("hf://"):
        return parts(split_paths(source, split), tally)
    if is_saved(source):
        return parts(saved_files(source, split), tally)
    if split not in SPLITS:
        name = "stdin" if source == STDIO else source
        raise LorakitError(f"{name} has no splits; leave out --split {split}")
    return parts([source], tally, (*_FORMS, "*.ndjson", "*.arrow"))


def split_paths(address: str, split: str) -> list[str]:
    """Return the local paths of a split's files, fetched where they are not in the cache."""
    match = _ADDRESS.fullmatch(address)
    if match is None:
        raise LorakitError(
            f"{address} is no data set's address; write hf://owner/name[:config][@revision]"
        )
    _check_word(split)
    repo, config, revision = match["repo"], match["config"], match["revision"]
    folder = _fetch(repo, revision, ["README.md"], address)
    card = _card(folder / "README.md")
    patterns = _card_patterns(card, config, split, address)
    if patterns:
        folder = _fetch(repo, revision, patterns, address)
        names = _files(folder, lambda name: any(fnmatch(name, pattern) for pattern in patterns))
    else:
        _check_split(split, _split_names(card, config), address)
        forms = [f"*{name}*{form[1:]}*" for name in split_aliases(split) for form in _FORMS]
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


def _card_patterns(
    card: Mapping[str, object], config: str | None, split: str, address: str
) -> list[str]:
    """Return the card's patterns of a split; an empty list where it has none for any."""
    named = _named(card.get("configs"))
    if not any("data_files" in entry for entry in named.values()):
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
    patterns = _patterns_of(named[chosen].get("data_files"), split)
    if not patterns:
        _check_split(split, _split_names(card, chosen), address)
    return patterns


def _check_split(split: str, names: Sequence[str], address: str) -> None:
    """Raise LorakitError if a card lists splits, `names`, but not this one."""
    if names and not {*names} & {*split_aliases(split)}:
        raise LorakitError(
            f"{address} has no split {split}; give --split with one of {', '.join(names)}"
        )


def _patterns_of(data_files: object, split: str) -> list[str]:
    """Return the patterns of a split in one of the forms that `data_files` takes.

    A path without a split belongs to `train`.
    """
    entries = [data_files] if isinstance(data_files, str) else data_files
    patterns: dict[str, list[str]] = {}
    for entry in entries if isinstance(entries, list) else ():
        if isinstance(entry, str):
            patterns.setdefault("train", []).append(entry)
        elif isinstance(entry, dict):
            paths = entry.get("path")
            texts = [str(path) for path in (paths if isinstance(paths, list) else [paths])]
            patterns.setdefault(str(entry.get("split")), []).extend(texts)
    return next((patterns[name] for name in split_aliases(split) if name in patterns), [])


def _split_names(card: Mapping[str, object], config: str | None) -> list[str]:
    """Return the names of the splits that a card lists for a configuration, or for all."""
    names: dict[str, None] = {}
    for field, key in (("configs", "data_files"), ("dataset_info", "splits")):
        for name, entry in _named(card.get(field)).items():
            if config in (None, name):
                splits = _dicts_in(entry.get(key))
                words = (split.get("split", split.get("name")) for split in splits)
                names.update(dict.fromkeys(str(word) for word in words if word))
    return list(names)


def _named(value: object) -> dict[str, dict[str, object]]:
    """Return the configurations of a card's field, by their names."""
    entries = _dicts_in([value] if isinstance(value, dict) else value)
    return {str(entry.get("config_name", "default")): entry for entry in entries}


def _check_word(split: str) -> None:
    """Raise LorakitError if a split's name would be a pattern of file names."""
    if not re.fullmatch(r"[\w.-]+", split):
        raise LorakitError(f"no split is called {split!r}; give a word of letters and digits")


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
    """Return the files of a configuration whose names say the split, of the first form there is."""
    names = _files(folder, lambda name: not config or config in (*Path(name).parts, *_words(name)))
    of_alias = ([name for name in names if _says(name, alias)] for alias in split_aliases(split))
    names = next(filter(None, of_alias), [])
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


def _says(name: str, alias: str) -> bool:
    """Return whether a file's name has one of a split's among its words, which may be several."""
    marked = "\0".join(["", *re.split(r"[^A-Za-z0-9]+", name.lower()), ""])
    return "\0".join(["", *re.split(r"[^A-Za-z0-9]+", alias.lower()), ""]) in marked


def _configuration(name: str, split: str) -> str:
    """Return the folders of a file, but for those named after the split or `data`."""
    ignored = {*split_aliases(split), "data"}
    return "/".join(part for part in Path(name).parts[:-1] if part.lower() not in ignored)
