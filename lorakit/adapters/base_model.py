"""Choose the base model: the one named, the adapters' own, $LORAKIT_MODEL, or tiny."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from lorakit.adapters.adapter import Adapter
from lorakit.adapters.history import base_fields
from lorakit.errors import LorakitError
from lorakit.reach import TINY

_MODEL_VARIABLE = "LORAKIT_MODEL"


def choose_model(name: str | None, adapters: Sequence[Adapter] = ()) -> tuple[str, str | None]:
    """Return the name of the base model to use, and a note for the user if the choice needs one.

    It is `name` if that is set; else what the adapters were trained on; else $LORAKIT_MODEL; else
    tiny. Raises LorakitError if the adapters name a folder that does not exist and neither `name`
    nor $LORAKIT_MODEL is set.
    """
    if name:
        return name, _warning_of_other_bases(name, adapters)
    first = next((adapter for adapter in adapters if base_name(adapter)), None)
    recorded = base_name(first) if first else None
    if first and recorded and not _is_missing_folder(first, recorded):
        return recorded, _warning_of_other_bases(recorded, adapters)
    fallback = os.environ.get(_MODEL_VARIABLE)
    if fallback:
        return fallback, _warning_of_other_bases(fallback, adapters)
    if recorded:
        raise LorakitError(
            f"the adapter's base model {recorded} is not there; name it by --model FOLDER or "
            f"${_MODEL_VARIABLE}"
        )
    return TINY, "no --model given: using tiny, the model that ships with lorakit"


def base_name(adapter: Adapter) -> str | None:
    """Return the base model named in an adapter's header or, failing that, in PEFT's config."""
    configured: str | None = adapter.config.get("base_model_name_or_path")
    return base_fields(adapter.header).get("name") or configured


def base_revision(adapters: Sequence[Adapter], name: str) -> str | None:
    """Return the first revision of the base `name` that an adapter records, or None."""
    bases = [base_fields(adapter.header) for adapter in adapters]
    revisions = (base.get("revision") for base in bases if base.get("name") == name)
    return next((revision for revision in revisions if revision), None)


def check_fingerprint(adapters: Sequence[Adapter], name: str, fingerprint: str) -> str | None:
    """Return a warning if adapters record another fingerprint for the base `name`, else None."""
    recorded = {a.name: base_fields(a.header).get("fingerprint") for a in adapters}
    changed = [adapter for adapter, old in recorded.items() if old and old != fingerprint]
    if not changed:
        return None
    return f"Warning: {name} has another shape than the base of {', '.join(changed)}"


def _is_missing_folder(adapter: Adapter, name: str) -> bool:
    """Return whether the base, by its record or the look of its name, was a folder now gone."""
    looks_local = name.startswith((".", "/", "~")) or name.count("/") > 1 or name.endswith("/")
    is_local = bool(base_fields(adapter.header).get("local")) or looks_local
    return name != TINY and is_local and not Path(name).expanduser().is_dir()


def _warning_of_other_bases(name: str, adapters: Sequence[Adapter]) -> str | None:
    """Return a warning that lists the adapters trained on another base than `name`, or None."""
    others = [f"{a.name} ({base_name(a)})" for a in adapters if _differ(base_name(a), name)]
    return f"Warning: not trained on {name}: {', '.join(others)}" if others else None


def _differ(recorded: str | None, name: str) -> bool:
    return recorded is not None and recorded.rstrip("/") != name.rstrip("/")
