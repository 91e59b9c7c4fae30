"""The model card of an adapter's folder: what it is, how it was made, and how to load it.

Everything on it comes from the adapter's config and header, so that equal adapters have equal
cards. It holds no paths and no time stamps.
"""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Iterator, Mapping, Sequence
from pathlib import PurePath

from lorakit.adapters.adapter import Adapter
from lorakit.adapters.base_model import base_name
from lorakit.adapters.config import alpha_of
from lorakit.adapters.history import (
    Header,
    HistoryEntry,
    base_fields,
    header_text,
    learned_weights,
    weight_line,
)
from lorakit.adapters.names import last_part
from lorakit.foreign_text import printable
from lorakit.reach import TINY

CARD_FILE = "README.md"
TAG = "lorakit"  # by which a page is known as one of ours
RELATIONS = ("adapter", "finetune", "merge", "quantized")  # to the base, as the hub defines them

_HUB_ID = re.compile(r"[\w-][\w.-]*(/[\w.-]+)?")
_PEFTS = re.compile(r"\A---\n(.*\n)*?library_name: peft\n(.*\n)*?---\n")

# Settings of an entry that no option of its command sets: they are results.
_RESULTS = {"lorahub": ("weights",)}


def card_text(adapter: Adapter) -> str:
    """Return the card of an adapter, as Markdown with YAML front matter."""
    parts = [_front_matter(adapter, "peft", "adapter"), _summary(adapter)]
    header: Header = json.loads(header_text(adapter.header))  # in the order of a file
    history = [entry for entry in header.get("history") or [] if entry]
    if history:
        parts.append("## How it was made\n\n" + "\n\n".join(map(_step, history)))
    parts.append(_loading(adapter))
    return "\n\n".join(parts) + "\n"


def model_card_text(adapter: Adapter, relation: str = "finetune") -> str:
    """Return the card of a model that an adapter was fused into, with the adapter's history.

    `relation`, to the base, is one of RELATIONS.
    """
    base = _shown_base(adapter)
    matter = _front_matter(adapter, "transformers", relation)
    title = f"# {base} with a LoRA adapter fused into it" if base else "# A model with fused LoRA"
    summary = _summary(adapter).partition("\n\n")[2]
    parts = [matter, f"{title}\n\n{summary}\n- adapter: SHA-256 {_code(adapter.sha256)}"]
    header: Header = json.loads(header_text(adapter.header))
    history = [entry for entry in header.get("history") or [] if entry]
    if history:
        steps = "\n\n".join(map(_step, history))
        parts.append(f"## How the adapter was made\n\n{steps}")
    return "\n\n".join(parts) + "\n"


def is_adapter_card(text: str) -> bool:
    """Return whether a README.md is the card of an adapter, by lorakit or by PEFT."""
    return _PEFTS.match(text) is not None


def _front_matter(adapter: Adapter, library: str, relation: str) -> str:
    """Return what the hub reads; a base that is a folder has no name there, and so no relation."""
    lines = ["---"]
    if name := _hub_name(adapter):
        lines.append(f"base_model: {json.dumps(name)}")
        lines.append(f"base_model_relation: {relation}")
        if revision := base_fields(adapter.header).get("revision"):
            lines.append(f"base_model_revision: {json.dumps(revision)}")
    lines += [f"library_name: {library}", "pipeline_tag: text-generation"]
    return "\n".join([*lines, "tags:", "- lora", f"- {TAG}", "---"])


def _hub_name(adapter: Adapter) -> str | None:
    """Return the hub id of the base, None for a folder, for tiny and where no base is recorded."""
    name = base_name(adapter)
    is_local = base_fields(adapter.header).get("local")
    if not name or is_local or name == TINY or not _HUB_ID.fullmatch(name):
        return None
    return name


def _shown_base(adapter: Adapter) -> str | None:
    """Return the base as people read it: the hub id, or the last part of a folder's path."""
    name = base_name(adapter)
    return name and printable(_hub_name(adapter) or PurePath(name).name or name)


def _summary(adapter: Adapter) -> str:
    base, revision = _shown_base(adapter), base_fields(adapter.header).get("revision")
    modules = adapter.modules()
    ranks = sorted({module.rank for module in modules})
    alphas = sorted({alpha_of(adapter.config, module.name) for module in modules})
    targets = sorted({last_part(module.name) for module in modules})
    rows = {
        "base model": base and _code(base),
        "revision": revision and _code(revision),
        "rank": _listed(ranks),
        "alpha": _listed(alphas),
        "modules": ", ".join(map(_code, targets)),
        "replaced whole": ", ".join(map(_code, adapter.whole)),
        "DoRA": "with a magnitude for every module" if adapter.is_dora else None,
        "chat template": adapter.header.get("chat"),
    }
    lines = [f"- {name}: {value}" for name, value in rows.items() if value]
    title = f"# LoRA adapter of {base}" if base else "# LoRA adapter"
    return "\n".join([title, "", *lines])


def _code(text: str) -> str:
    """Return a text as Markdown code; back ticks in it become apostrophes."""
    return f"`{printable(text).replace('`', chr(39))}`"


def _listed(numbers: Sequence[float]) -> str:
    return ", ".join(f"{number:g}" for number in numbers)


def _step(entry: HistoryEntry) -> str:
    """Return one command of the history: its line, what went into it, and its scores."""
    lines = [f"```sh\n{command_line(entry)}\n```", ""]
    for name, sha256 in (entry.get("parents") or {}).items():
        lines.append(f"- parent {_code(name)}: SHA-256 {_code(sha256)}")
    hashes = {"data": entry.get("data"), "val": entry.get("val")}
    lines += [f"- `--{name}`: SHA-256 {_code(value)}" for name, value in hashes.items() if value]
    lines += [f"- {line}" for line in _scores(entry)]
    versions = entry.get("versions") or {}
    if versions:
        listed = ", ".join(f"{name} {version}" for name, version in sorted(versions.items()))
        lines.append(f"- versions: {printable(listed)}")
    return "\n".join(lines).rstrip()


def command_line(entry: HistoryEntry) -> str:
    """Return the command of a history's entry as a shell line.

    Adapters bear their short names, and files of records the name of their option in capitals:

        lorakit merge xs wl --data DATA --prune-ratio 0.1
    """
    settings = entry.get("settings") or {}
    words = ["lorakit", str(entry.get("command")), *(entry.get("parents") or {})]
    words += [word for name in ("data", "val") if entry.get(name) for word in _file_option(name)]
    results = _RESULTS.get(str(settings.get("method")), ())
    for name, value in settings.items():
        if name not in results:
            words += _option(name, value)
    return printable(shlex.join(words))


def _file_option(name: str) -> tuple[str, str]:
    return f"--{name}", name.upper()


def _option(name: str, value: object) -> list[str]:
    """Return the words that give a setting; none for null and false, which are not written."""
    option = f"--{name.replace('_', '-')}"
    if value is None or value is False or value == []:
        return []
    if value is True:
        return [option]
    if isinstance(value, Mapping):
        return [option, json.dumps(value, ensure_ascii=False, sort_keys=True)]
    if isinstance(value, list | tuple):
        return [option, ",".join(map(_written, value))]
    return [option, _written(value)]


def _written(value: object) -> str:
    return f"{value:g}" if isinstance(value, float) and value.is_integer() else str(value)


def _scores(entry: HistoryEntry) -> Iterator[str]:
    """Yield a line for everything that a search, or lorahub, tried, and for learned weights."""
    search = entry.get("search") or {}
    tried = search.get("tried")
    for trial in tried if isinstance(tried, list) else ():
        if isinstance(trial, Mapping):
            values = {k: v for k, v in trial.items() if k not in ("best", "stopped")}
            marks = [name for name in ("best", "stopped") if trial.get(name)]
            yield printable(", ".join([*_fields(values), *marks]))
    test = search.get("test")
    if isinstance(test, Mapping):
        yield printable("test of the best: " + ", ".join(_fields(test)))
    best = entry.get("best") or {}
    if best:
        yield printable("best: " + ", ".join(_fields(best)))
    if weights := learned_weights(entry):
        yield printable(weight_line(weights))


def _fields(values: Mapping[str, object]) -> Iterator[str]:
    for name, value in values.items():
        items = value if isinstance(value, list | tuple) else [value]
        numbers = [f"{item:.6g}" if isinstance(item, float) else str(item) for item in items]
        yield f"{name.replace('_', ' ')} {' '.join(numbers)}"


def _loading(adapter: Adapter) -> str:
    base = json.dumps(_hub_name(adapter) or "BASE", ensure_ascii=False)
    revision = base_fields(adapter.header).get("revision") if _hub_name(adapter) else None
    pinned = f", revision={json.dumps(revision)}" if revision else ""
    return f"""## How to load it

In PEFT:

```python
from peft import PeftModel
from transformers import AutoModelForCausalLM

base = AutoModelForCausalLM.from_pretrained({base}{pinned})
model = PeftModel.from_pretrained(base, "FOLDER")
```

By [lorakit](https://github.com/lorakit/lorakit):

```sh
lorakit generate FOLDER --data RECORDS
```"""
