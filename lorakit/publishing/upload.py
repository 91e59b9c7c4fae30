"""A publication to the Hugging Face hub, by huggingface_hub's own client.

HF_TOKEN, HF_HOME, HF_ENDPOINT and HF_HUB_OFFLINE work as everywhere; the token is read by that
client alone. What an interrupted upload sent stays on the hub without being shown there: the commit
comes last, and the next try sends only the rest.
"""

from __future__ import annotations

import contextlib
import glob
import warnings
from collections.abc import Iterator
from typing import TYPE_CHECKING

from lorakit.errors import LorakitError
from lorakit.files import explain
from lorakit.foreign_text import printable
from lorakit.publishing.page import has_metadata
from lorakit.reach import network_errors

if TYPE_CHECKING:
    from huggingface_hub import HfApi

    from lorakit.publishing.publication import Publication
    from lorakit.reporting import Reporter
    from lorakit.settings import PushSettings

# What to do about an answer of the hub's, by its status.
REMEDIES = {
    400: "mend it as the hub says",
    401: "log in with `hf auth login`, or set HF_TOKEN to a token that may write",
    402: "see the plan of the account on its page",
    403: "use a token that may write there",
    404: "check the name, and that the token may write there",
    409: "another commit came first or the name is taken; look at its page and try again",
    412: "another commit came first; look at its page and try again",
    413: "leave the large files to Git LFS, or upload fewer",
    429: "it asks for fewer requests; try again later",
}


def is_offline() -> bool:
    """Return whether HF_HUB_OFFLINE keeps everything from the network."""
    from huggingface_hub import constants

    return bool(constants.HF_HUB_OFFLINE)


def hub_address() -> str:
    """Return the address of the hub, of $HF_ENDPOINT where it is set."""
    from huggingface_hub import constants

    return str(constants.ENDPOINT)


def upload(
    publication: Publication, repo: str, *, settings: PushSettings, reporter: Reporter
) -> str:
    """Upload a publication to the repository `owner/name`, made where missing; return its URL.

    The page is checked by the hub before anything is made there, and is then put into the folder.
    Raises LorakitError for whatever the hub refuses, and where it cannot be reached.
    """
    from huggingface_hub import HfApi

    api = HfApi(library_name="lorakit")
    with _errors_explained(repo), _remarks_noted(reporter):
        _validate(publication)
        api.create_repo(repo, private=settings.private or None, exist_ok=True)
        if settings.private:
            _refuse_public(api, repo)
        if settings.revision is not None:
            api.create_branch(repo, branch=settings.revision, exist_ok=True)
        publication.write_page()
        commit = api.upload_folder(
            repo_id=repo,
            folder_path=publication.folder,
            commit_message=settings.commit_message or f"Upload {publication.kind} by lorakit",
            revision=settings.revision,
            allow_patterns=[glob.escape(name) for name in publication.files],
        )
    return str(commit.commit_url)


def _validate(publication: Publication) -> None:
    """Have the hub check the page's metadata, before there is a repository."""
    if publication.page is not None and has_metadata(publication.page):
        from huggingface_hub import ModelCard

        ModelCard(publication.page).validate()


def _refuse_public(api: HfApi, repo: str) -> None:
    """Raise LorakitError where a repository that is to be private was public before.

    The hub passes over --private for one that exists.
    """
    if not api.model_info(repo).private:
        raise LorakitError(
            f"{repo} is there already, and public; make it private on its page, or leave --private "
            "out"
        )


@contextlib.contextmanager
def _remarks_noted(reporter: Reporter) -> Iterator[None]:
    """Make notes of the hub's remarks on a page, which come as warnings; drop other warnings."""
    with warnings.catch_warnings(record=True) as remarks:
        warnings.simplefilter("always")
        yield
    for remark in remarks:
        if remark.category is UserWarning:
            reporter.note(f"Warning: {printable(' '.join(str(remark.message).split()))}")


@contextlib.contextmanager
def _errors_explained(repo: str) -> Iterator[None]:
    """Turn what huggingface_hub raises inside the block into a LorakitError about `repo`.

    An error while a large file is sent is wrapped in a RuntimeError.
    """
    try:
        yield
    except LorakitError:
        raise
    except _errors() as error:
        cause = error.__cause__ if isinstance(error, RuntimeError) and error.__cause__ else error
        raise LorakitError(f"cannot push to {repo}: {_explain(cause)}") from None


def _errors() -> tuple[type[Exception], ...]:
    return (*network_errors(), ValueError, RuntimeError)


def _explain(error: BaseException) -> str:
    """Return what an error means, and what to do: by the hub's status where there is one."""
    from huggingface_hub import errors

    said = printable(" ".join(str(error).split()))
    if isinstance(error, errors.HfHubHTTPError):
        status = error.response.status_code
        answer = printable(" ".join((error.server_message or "").split()))
        remedy = REMEDIES.get(status, "try again later; what was sent is not sent again")
        return f"{hub_address()} answers {status}{answer and f' ({answer})'}; {remedy}"
    if isinstance(error, errors.HFValidationError):
        return f"that is no name of the hub's ({said}); choose another"
    if isinstance(error, ValueError):  # the hub's verdict on the page, or on a large file
        return f"the hub does not take it ({said}); mend the folder"
    if isinstance(error, OSError) and error.filename:
        return f"{error.filename}: {explain(error)}; check the folder"
    return (
        f"{hub_address()} cannot be reached ({said or type(error).__name__}); try again, and what "
        "was sent is not sent again"
    )
