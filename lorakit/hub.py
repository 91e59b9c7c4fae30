"""Fetch an adapter's files from the Hugging Face hub or its cache, and explain failures.

What others do with the hub can be stopped here too.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator
from pathlib import Path

from lorakit.errors import LorakitError

_ADDRESS = re.compile(r"hf://(?P<repo>[\w.-]+/[\w.-]+)(@(?P<revision>[^@\s]+))?")


def fetch_adapter(address: str, *files: str) -> Path:
    """Return a local folder that holds `files` of `hf://owner/name[@revision]`.

    All come from the commit of the first, so that they belong together. HF_HOME, HF_TOKEN and
    HF_HUB_OFFLINE work as usual. Raises LorakitError where a file cannot be fetched.
    """
    match = _ADDRESS.fullmatch(address)
    if match is None:
        raise LorakitError(f"{address} is no hub address; write hf://owner/name or …/name@revision")
    revision = match["revision"]
    for file in files:
        path = _fetch(match["repo"], file, revision, address)
        revision = path.parent.name
    return path.parent


def _fetch(repo: str, file: str, revision: str | None, address: str) -> Path:
    """Return the local path of one file of a repository."""
    from huggingface_hub import errors, hf_hub_download

    try:
        with hub_errors_explained(address, revision):
            return Path(hf_hub_download(repo, file, revision=revision))
    except errors.RemoteEntryNotFoundError:
        reason = f"it has no {file}; {_remedy(file, address)}"
    raise LorakitError(f"cannot fetch {address}: {reason}")


def fetch_model_file(name: str, file: str, revision: str | None) -> Path:
    """Return the local path of one file of a model on the hub, or in its cache.

    Raises LorakitError where it cannot be fetched.
    """
    from huggingface_hub import errors, hf_hub_download

    try:
        with hub_errors_explained(name, revision):
            return Path(hf_hub_download(name, file, revision=revision))
    except errors.RemoteEntryNotFoundError:
        raise LorakitError(f"cannot fetch {name}: it has no {file}; check its page") from None


def _remedy(file: str, address: str) -> str:
    """Return what to do where an adapter's repository lacks a file."""
    if file.endswith(".safetensors"):
        return f"if it has an adapter_model.bin, run: lorakit convert {address} -o FOLDER/"
    return "check on its page that it is a PEFT adapter"


@contextlib.contextmanager
def hub_errors_explained(address: str, revision: str | None) -> Iterator[None]:
    """Turn what huggingface_hub raises inside the block into a LorakitError about `address`.

    RemoteEntryNotFoundError (the repository has no such file) passes through, since only the caller
    knows what to advise.
    """
    from huggingface_hub import errors

    try:
        yield
    except errors.LocalEntryNotFoundError:
        reason = "it is neither cached nor within reach; go online, or check the address"
    except errors.RemoteEntryNotFoundError:
        raise
    except errors.GatedRepoError:
        reason = "it is gated; ask for access on its page and log in with `hf auth login`"
    except errors.RepositoryNotFoundError:
        reason = "there is no such repository, or it is private; check the name or log in"
    except errors.RevisionNotFoundError:
        reason = f"it has no revision {revision}; check what stands after the @"
    except (OSError, errors.HFValidationError) as error:
        reason = f"{str(error).splitlines()[0] if str(error) else type(error).__name__}; try again"
    else:
        return
    raise LorakitError(f"cannot fetch {address}: {reason}")


@contextlib.contextmanager
def hub_out_of_reach() -> Iterator[None]:
    """Let huggingface_hub ask nothing of the hub inside the block, as HF_HUB_OFFLINE does."""
    from huggingface_hub import constants

    before = constants.HF_HUB_OFFLINE
    constants.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = before
