"""Which base model is meant: the one named, the adapters' own, $LORAKIT_MODEL, or tiny."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from lorakit.adapters.adapter import Adapter
from lorakit.errors import LorakitError

TINY = "tiny"
_MODEL_VARIABLE = "LORAKIT_MODEL"


def choose_model(given: str | None, adapters: Sequence[Adapter] = ()) -> tuple[str, str | None]:
    """Return the base's name and a note on the choice, if one is due.

    The name given; else what the adapters were trained on; else $LORAKIT_MODEL; else tiny.
    Raises LorakitError when the adapters name a folder that is not there and nothing else is named.
    """
    if given:
        return given, _other_base(given, adapters)
    fallback = os.environ.get(_MODEL_VARIABLE)
    first = next((adapter for adapter in adapters if base_name(adapter)), None)
    recorded = base_name(first) if first else None
    if first and recorded and not _is_missing_folder(first, recorded):
        return recorded, _other_base(recorded, adapters)
    if fallback:
        return fallback, _other_base(fallback, adapters)
    if recorded:
        raise LorakitError(
            f"the adapter's base model {recorded} is not there; name it by --model FOLDER or "
            f"${_MODEL_VARIABLE}"
        )
    return TINY, "no --model given: using tiny, the model that ships with lorakit"


def base_name(adapter: Adapter) -> str | None:
    """Return the name of the base an adapter records, in lorakit's header or PEFT's config."""
    base = adapter.header.get("base") or {}
    return base.get("name") or adapter.config.get("base_model_name_or_path")


def base_revision(adapters: Sequence[Adapter], name: str) -> str | None:
    """Return the revision of the base `name` that the adapters were trained on, if they tell."""
    told = [adapter.header.get("base") or {} for adapter in adapters]
    found = (base.get("revision") for base in told if base.get("name") == name)
    return next((revision for revision in found if revision), None)


def check_fingerprint(adapters: Sequence[Adapter], name: str, fingerprint: str) -> str | None:
    """Return a warning where a base of the recorded name has another shape than recorded."""
    told = {adapter.name: adapter.header.get("base") or {} for adapter in adapters}
    other = [key for key, base in told.items() if base.get("fingerprint", "") != fingerprint]
    changed = [key for key in other if told[key].get("fingerprint")]
    if not changed:
        return None
    return f"Warning: {name} has another shape than the base of {', '.join(changed)}"


def _is_missing_folder(adapter: Adapter, name: str) -> bool:
    """Whether the base was a folder, as lorakit noted or as its name looks, that is not there."""
    told = adapter.header.get("base") or {}
    looks_local = name.startswith((".", "/", "~")) or name.count("/") > 1 or name.endswith("/")
    is_local = bool(told.get("local")) if told else looks_local
    return name != TINY and (is_local or looks_local) and not Path(name).expanduser().is_dir()


def _other_base(name: str, adapters: Sequence[Adapter]) -> str | None:
    other = [f"{a.name} ({base_name(a)})" for a in adapters if _differ(base_name(a), name)]
    return f"Warning: not trained on {name}: {', '.join(other)}" if other else None


def _differ(recorded: str | None, name: str) -> bool:
    return recorded is not None and recorded.rstrip("/") != name.rstrip("/")
