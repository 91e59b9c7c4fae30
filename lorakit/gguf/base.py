"""What a GGUF file needs to know of a base beside its weights: its config, name and licence.

The config is read as JSON, without torch or transformers, so that an adapter is converted in a
second. The fields are those of the format's own table (general.*).
"""

from __future__ import annotations

import re
from pathlib import Path, PurePath

from lorakit.adapters.adapter import Adapter
from lorakit.adapters.card import CARD_FILE
from lorakit.adapters.history import header_text
from lorakit.errors import LorakitError
from lorakit.files import explain
from lorakit.foreign_text import parse_json
from lorakit.gguf.file import Value
from lorakit.gguf.names import Config
from lorakit.hub import fetch_model_file
from lorakit.reach import MODEL_CONFIG, TINY, check_model, config_paths, is_folder

HISTORY_KEY = "lorakit.header"  # lorakit's own header, as JSON
_LICENCE = re.compile(r"\A---\n(?:(?!---).*\n)*?license: *([\w.-]+) *\n")


def read_config(name: str, revision: str | None) -> Config:
    """Return the config.json of a base: of a folder, of tiny, or of one on the hub.

    Raises LorakitError for a base that cannot be had, and for a config that is no JSON object.
    """
    check_model(name, revision)
    is_here = name == TINY or is_folder(name)
    path = config_paths(name)[0] if is_here else fetch_model_file(name, MODEL_CONFIG, revision)
    try:
        config = parse_json(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise LorakitError(f"cannot read {path}: {explain(error)}; check --model") from None
    except ValueError as error:
        raise LorakitError(f"{path} is not JSON ({error}); take a new copy of {name}") from None
    if not isinstance(config, dict):
        raise LorakitError(f"{path} is no JSON object; take a new copy of {name}")
    return config


def base_name_fields(name: str) -> dict[str, Value]:
    """Return the fields that name a file's base, with its page where `name` is a hub id.

    Folders are named by their last part: no file holds a path.
    """
    fields: dict[str, Value] = {"general.base_model.count": 1}
    owner, _, model = name.partition("/")
    if name != TINY and not is_folder(name) and model:
        fields["general.base_model.0.name"] = model
        fields["general.base_model.0.organization"] = owner
        fields["general.base_model.0.repo_url"] = f"https://huggingface.co/{name}"
    else:
        fields["general.base_model.0.name"] = PurePath(name).name or name
    return fields


def header_fields(adapter: Adapter | None) -> dict[str, Value]:
    """Return the field that holds lorakit's header, with the history; {} where there is none."""
    if adapter is None or not adapter.header:
        return {}
    return {HISTORY_KEY: header_text(adapter.header)}


def licence_of(folder: Path) -> str:
    """Return the licence that the card in a model's folder names, or nothing."""
    card = folder / CARD_FILE
    if not card.is_file():
        return ""
    match = _LICENCE.match(card.read_text(encoding="utf-8", errors="replace"))
    return match[1] if match else ""
