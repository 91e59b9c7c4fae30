"""Whether a base model can be had at all: asked before anything heavy is imported or downloaded.

A folder and what is in the hub's cache need no network. For anything else the hub is asked once,
for seconds: its libraries try again for a minute where it cannot be reached. HF_HUB_OFFLINE,
HF_ENDPOINT, HF_TOKEN and HF_HOME act as everywhere.
"""

from __future__ import annotations

import glob
import os
import re
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import cast

from lorakit.errors import LorakitError

WAIT = 2.0  # seconds for the hub's answer
TINY = "tiny"  # the model in the package
MODEL_CONFIG = "config.json"

_HUB_ID = re.compile(r"[\w-][\w.-]*(/[\w.-]+)?", re.ASCII)
_REMEDY = (
    "give a folder with config.json, tokenizer.json and safetensors weights, or a hub id that can "
    "be reached"
)


def check_model(name: str | None, revision: str | None = None) -> None:
    """Raise LorakitError, within seconds, for a base that is neither here nor on the hub.

    No name means a default, which is not looked for.
    """
    if not name or name == TINY or is_folder(name):
        return
    _check_name(name)
    if is_cached(name, revision):
        return
    if reason := _refusal(name, revision):
        raise _cannot_load(name, f"there is no such folder here, and {reason}")


def is_only_cached(name: str, revision: str | None = None) -> bool:
    """Return whether a base must be read from the cache, since the hub cannot be reached."""
    if name == TINY or is_folder(name) or not _HUB_ID.fullmatch(name):
        return False
    return is_cached(name, revision) and _refusal(name, revision) is not None


def is_cached(name: str, revision: str | None = None) -> bool:
    """Return whether a model's config is in the hub's cache."""
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        found = try_to_load_from_cache(name, MODEL_CONFIG, revision=revision)
    except HFValidationError:
        return False
    return isinstance(found, str)


def cached_models() -> list[str]:
    """Return the hub ids of the models in the hub's cache, sorted, without its library."""
    folders = _cache().glob("models--*/snapshots/*/config.json")
    names = {path.parents[2].name.removeprefix("models--").replace("--", "/") for path in folders}
    return sorted(names)


def config_paths(name: str) -> list[Path]:
    """Return the config.json of a base that is here: in a folder, the package or the cache."""
    if name == TINY:
        return [Path(__file__).parent / TINY / MODEL_CONFIG]
    if is_folder(name):
        return [Path(os.path.expanduser(name)) / MODEL_CONFIG]
    folder = f"models--{name.replace('/', '--')}"
    return sorted(_cache().glob(f"{glob.escape(folder)}/snapshots/*/config.json"))


def _cache() -> Path:
    """Return the folder of the hub's cache, as the hub's library finds it."""
    caches = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    home = os.environ.get("HF_HOME") or os.path.join(caches, "huggingface")
    return Path(os.path.expanduser(os.environ.get("HF_HUB_CACHE") or os.path.join(home, "hub")))


def is_folder(name: str) -> bool:
    """Return whether a base is named by a folder that is here."""
    return os.path.isdir(os.path.expanduser(name))


def _check_name(name: str) -> None:
    """Raise LorakitError for a file, and for a path at which nothing is."""
    if name.lower().endswith(".gguf"):
        raise LorakitError(
            f"cannot load the model {name}: lorakit reads no GGUF; give the folder or hub id of "
            "the model that it was made from, in safetensors"
        )
    if os.path.isfile(os.path.expanduser(name)):
        raise _cannot_load(name, "it is a file")
    if not _HUB_ID.fullmatch(name):
        raise _cannot_load(name, "there is no such folder")


def _cannot_load(name: str, reason: str) -> LorakitError:
    alike = _alike(name)
    hint = f" (did you mean {alike}?)" if alike else ""
    return LorakitError(f"cannot load the model {name}: {reason}{hint}; {_REMEDY}")


def _alike(name: str) -> str | None:
    """Return the model here whose name is most like this one, if any is."""
    from difflib import get_close_matches

    matches = get_close_matches(name, [TINY, *cached_models(), *_folders_beside(name)], 1, 0.75)
    return matches[0] if matches else None


def _folders_beside(name: str) -> Iterator[str]:
    """Yield the folders of models beside the one that was named."""
    parent = os.path.dirname(name.rstrip("/"))
    for config in Path(os.path.expanduser(parent or ".")).glob("*/config.json"):
        yield os.path.join(parent, config.parent.name)


def _refusal(name: str, revision: str | None) -> str | None:
    """Return why the hub does not give a model, None where it does.

    The question is asked in a thread, since looking up the hub's address may hang by itself.
    """
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        return "it is not in the cache (HF_HUB_OFFLINE is set)"
    answers: list[str | None] = []
    question = threading.Thread(target=lambda: answers.append(_ask(name, revision)), daemon=True)
    question.start()
    question.join(WAIT)
    return answers[0] if answers else f"{constants.ENDPOINT} does not answer"


def _ask(name: str, revision: str | None) -> str | None:
    """Ask the hub for a model's config, once; return why it does not have it, None if it does."""
    from huggingface_hub import constants, errors, get_hf_file_metadata, hf_hub_url

    try:
        get_hf_file_metadata(hf_hub_url(name, MODEL_CONFIG, revision=revision), timeout=WAIT)
    except errors.GatedRepoError:
        return "it is gated: ask for access on its page and log in with `hf auth login`"
    except errors.RepositoryNotFoundError:
        return f"{constants.ENDPOINT} has none of this name, or a private one"
    except errors.RevisionNotFoundError:
        return f"it has no revision {revision}"
    except errors.RemoteEntryNotFoundError:
        return "it has no config.json"
    except errors.HfHubHTTPError as error:
        return f"{constants.ENDPOINT} answers {error.response.status_code}"
    except network_errors() as error:
        return f"{constants.ENDPOINT} cannot be reached ({type(error).__name__})"
    return None


def network_errors() -> tuple[type[Exception], ...]:
    """Return what an HTTP request may raise: which library makes it depends on the hub's."""
    from huggingface_hub import errors

    return OSError, cast("type[Exception]", errors.HfHubHTTPError.__bases__[0])
