"""What `push` uploads: the finished files of an adapter, a model or GGUF files, and nothing else.

It reads the folder and knows no network; upload.py sends what is listed here.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from lorakit.adapters.card import CARD_FILE, card_text
from lorakit.adapters.storage import CONFIG_FILE, TENSOR_FILE, load_adapter
from lorakit.errors import LorakitError
from lorakit.export.weight_files import open_weights
from lorakit.files import atomic_path, explain
from lorakit.foreign_text import parse_json
from lorakit.publishing.page import check_page, with_scores
from lorakit.reach import MODEL_CONFIG

_GGUF_START = b"GGUF"
_SHOWN_HIDDEN = (".gitattributes",)  # all other hidden files stay here

_UNFINISHED = "is of a run that was stopped; finish it with --resume, or delete it"
_PICKLE = "is a pickle, or may hold one; keep the weights in safetensors, and move it elsewhere"
_TRAINERS = "is a trainer's state, no part of what it trained; move it elsewhere"

# What is never uploaded, and why, by a pattern for a file's name. The first that fits applies.
REFUSED: Mapping[str, str] = {
    r".*\.part|.*\.resume|.*\.incomplete": _UNFINISHED,
    r"(optimizer|scheduler|scaler|rng_state|training_args|trainer_state)([._-].*)?": _TRAINERS,
    r".*\.(bin|pt|pth|pkl|pickle|ckpt|joblib|npy|npz)": _PICKLE,
}


@dataclass(frozen=True)
class Publication:
    """What is uploaded of a folder: `files` has the size of each in bytes, by its path there.

    `kind` is one of KINDS. `page` is the text of README.md, None where there is none; `rewrites`
    says that it is not yet what is in the folder.
    """

    folder: Path
    kind: str
    files: Mapping[str, int]
    page: str | None
    rewrites: bool

    @property
    def size(self) -> int:
        """All bytes together."""
        return sum(self.files.values())

    def rows(self) -> Iterator[dict[str, object]]:
        """Yield what --dry-run lists: path and size of each file, of the page its text, too."""
        for name, size in self.files.items():
            row: dict[str, object] = {"file": name, "bytes": size}
            yield {**row, "card": self.page} if name == CARD_FILE else row

    def write_page(self) -> None:
        """Put the page into the folder."""
        if self.rewrites and self.page is not None:
            with atomic_path(self.folder / CARD_FILE) as side:
                side.write_text(self.page, encoding="utf-8", newline="")


def open_publication(source: str, repo: str, scores: str | None = None) -> Publication:
    """Return what is uploaded of a folder to `repo`, with the scores in a file on its page.

    Nothing is written. An adapter without a README.md gets its card. Raises LorakitError for a
    folder of anything else, or with files that are unfinished, damaged or refused, and for a page
    that the hub would not take.
    """
    folder = Path(source)
    if not folder.exists():
        raise LorakitError(f"there is no folder {source}; check the path")
    if not folder.is_dir():
        raise LorakitError(
            f"{source} is no folder; lorakit convert {shlex.quote(source)} -o FOLDER/ makes one"
        )
    files = _files_of(folder)
    kind = _kind_of(files, source)
    KINDS[kind](folder, files, source)
    old = _read_page(folder)
    page = old
    if old is None and kind == "adapter":
        page = card_text(load_adapter(source, plain=False))
    if scores is not None:
        page = with_scores(page, repo.rpartition("/")[2], scores)
    if page is not None:
        check_page(page, str(folder / CARD_FILE))
        files = dict(sorted({**files, CARD_FILE: len(page.encode())}.items()))
    return Publication(folder, kind, files, page, rewrites=page != old)


def _files_of(folder: Path) -> dict[str, int]:
    """Return the sizes of a folder's files by their paths; hidden ones and lock files stay out.

    Raises LorakitError for one that must not be uploaded, hidden or not.
    """
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    for path in paths:
        _check_name(path)
    names = {path.relative_to(folder): path for path in paths}
    return {
        name.as_posix(): path.stat().st_size
        for name, path in names.items()
        if name.name in _SHOWN_HIDDEN or not any(part.startswith(".") for part in name.parts)
    }


def _check_name(path: Path) -> None:
    for pattern, reason in REFUSED.items():
        if re.fullmatch(pattern, path.name.lower()):
            raise LorakitError(f"{path} {reason}")


def _kind_of(files: Mapping[str, int], name: str) -> str:
    """Return which of KINDS the files are."""
    has_tensors = any(file.endswith(".safetensors") for file in files)
    kinds = {
        "adapter": CONFIG_FILE in files or TENSOR_FILE in files,
        "gguf": not has_tensors and any(file.endswith(".gguf") for file in files),
        "model": MODEL_CONFIG in files or any(map(_is_model_weights, files)),
    }
    present = [kind for kind, holds in kinds.items() if holds]
    if not present:
        raise LorakitError(
            f"{name} holds neither an adapter, nor a model, nor GGUF files; give a folder that "
            "lorakit wrote, or a PEFT folder"
        )
    if kinds["adapter"] and kinds["model"]:
        raise LorakitError(f"{name} holds an adapter and a model; put each into its own folder")
    return present[0]


def _is_model_weights(file: str) -> bool:
    return re.fullmatch(r"model.*\.safetensors", file) is not None


def _check_adapter(folder: Path, files: Mapping[str, int], name: str) -> None:
    """Raise LorakitError for an adapter that PEFT, or lorakit, could not load from the hub."""
    load_adapter(name, plain=False)
    if CONFIG_FILE not in files:
        raise LorakitError(
            f"{name} holds no {CONFIG_FILE}; run: lorakit convert {shlex.quote(name)} -o "
            f"{shlex.quote(name.rstrip('/') + '/')}"
        )


def _check_model(folder: Path, files: Mapping[str, int], name: str) -> None:
    """Raise LorakitError for a model without its config, or with weights missing or cut short."""
    if MODEL_CONFIG not in files:
        raise LorakitError(
            f"{name} holds no {MODEL_CONFIG}, which is written last; finish the fuse with --resume"
        )
    try:
        parse_json((folder / MODEL_CONFIG).read_text(encoding="utf-8"))
    except ValueError as error:
        path = folder / MODEL_CONFIG
        raise LorakitError(f"{path} is not JSON ({error}); take a new copy") from None
    open_weights(folder, name)


def _check_gguf(folder: Path, files: Mapping[str, int], name: str) -> None:
    """Raise LorakitError for a file that only bears GGUF's name."""
    for file in (file for file in files if file.endswith(".gguf")):
        with open(folder / file, "rb") as stream:
            if stream.read(len(_GGUF_START)) != _GGUF_START:
                raise LorakitError(f"{folder / file} is no GGUF file; write it again")


# What can be uploaded, and the check that it is whole.
KINDS = {"adapter": _check_adapter, "model": _check_model, "gguf": _check_gguf}


def _read_page(folder: Path) -> str | None:
    """Return the text of a folder's README.md, its line ends as they are."""
    path = folder / CARD_FILE
    if not path.is_file():
        return None
    try:
        return path.read_bytes().decode("utf-8")
    except OSError as error:
        raise LorakitError(f"cannot read {path}: {explain(error)}; check the path") from error
    except UnicodeDecodeError:
        raise LorakitError(f"{path} is not UTF-8; save it as UTF-8") from None
