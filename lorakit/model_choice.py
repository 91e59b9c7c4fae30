"""Which base model is meant: the one named, the adapters' own, $LORAKIT_MODEL, or tiny."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from lorakit.adapter import Adapter
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
    recorded = next((name for name in map(base_name, adapters) if name), None)
    if recorded and not _is_missing_folder(recorded):
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


def _is_missing_folder(name: str) -> bool:
    looks_local = name.startswith((".", "/", "~")) or name.count("/") > 1 or name.endswith("/")
    return name != TINY and looks_local and not Path(name).expanduser().is_dir()


def _other_base(name: str, adapters: Sequence[Adapter]) -> str | None:
    other = [f"{a.name} ({base_name(a)})" for a in adapters if base_name(a) not in (None, name)]
    return f"Warning: not trained on {name}: {', '.join(other)}" if other else None
