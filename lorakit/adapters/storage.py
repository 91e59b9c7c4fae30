"""Read, check and write adapters: single files, PEFT folders, pipes and the hub.

Only what can be written again exactly is read: anything else in a file is an error that names it
and is never dropped silently. The bytes are in safetensors.py, the config in config.py, lorakit's
own header in history.py, the hub in hub.py.
"""

from __future__ import annotations

import contextlib
import functools
import os
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import BinaryIO

from lorakit.adapters.adapter import Adapter
from lorakit.adapters.card import CARD_FILE, card_text, is_adapter_card
from lorakit.adapters.config import Config, config_text, parse_config, rank_of
from lorakit.adapters.foreign import SAFETENSORS_FILE, refuse_folder, refuse_tensor
from lorakit.adapters.history import header_text, parse_header
from lorakit.adapters.names import (
    Factor,
    lora_name,
    lora_parts,
    magnitude_module,
    module_names,
    whole_name,
)
from lorakit.adapters.safetensors import read_tensors, write_tensors
from lorakit.adapters.targets import check_matching, targeting
from lorakit.adapters.tensors import FLOATS, Tensor
from lorakit.adapters.whole import check_kept, check_plain
from lorakit.errors import LorakitError
from lorakit.files import (
    STDIO,
    atomic_path,
    cannot_write,
    explain,
    is_stream,
    made_folders,
    names_folder,
    open_input,
    refuse_terminal,
)
from lorakit.foreign_text import quote

CONFIG_FILE = "adapter_config.json"
TENSOR_FILE = SAFETENSORS_FILE
HUB = "hf://"
_LONGEST_NAME = 500  # characters of a tensor's


def load_adapter(
    source: str, *, check_values: bool = True, plain: bool = True, any_init: bool = False
) -> Adapter:
    """Return the adapter in a file, a PEFT folder, `-` (stdin) or `hf://owner/name[@revision]`.

    A tensor file is read with the adapter_config.json beside it if it has PEFT's name or no config
    of its own. If the two configs differ the folder's applies, as in PEFT, since that is the one
    people edit. Raises LorakitError for anything that cannot be written again exactly, and for
    values that are not finite; with `check_values` false, the latter only once the hash is
    computed. With `plain`, adapters that hold more than A and B, which only some commands take,
    are refused by name; and so are, but for `any_init`, those whose initialisation changed the
    base, so that they do not stand for a change of it.
    """
    adapter = _open(source, any_init)
    if plain:
        check_plain(adapter)
    if check_values:
        _ = adapter.sha256  # reads every value
    return adapter


def _open(source: str, any_init: bool) -> Adapter:
    if source == STDIO:
        return _load(open_input(STDIO).read(), "stdin", None, any_init)
    if source.startswith(HUB):
        from lorakit.hub import fetch_adapter

        return _load_folder(fetch_adapter(source, CONFIG_FILE, TENSOR_FILE), source, any_init)
    path = Path(source)
    if path.is_dir():
        return _load_folder(path, source or ".", any_init)
    sibling = path.parent / CONFIG_FILE
    return _load(path, source, sibling if sibling.is_file() else None, any_init)


def _load_folder(folder: Path, name: str, any_init: bool) -> Adapter:
    tensors, config = folder / TENSOR_FILE, folder / CONFIG_FILE
    files = {path.name for path in folder.iterdir()} if folder.is_dir() else set()
    if TENSOR_FILE not in files:
        if CONFIG_FILE in files:
            parse_config(
                _read(config), str(config), any_init=any_init
            )  # its errors are more telling
        refuse_folder(files, name)
    return _load(tensors, name, config if CONFIG_FILE in files else None, any_init)


def _read(path: Path) -> bytes:
    with open_input(str(path)) as stream:
        return stream.read()


def _load(source: bytes | Path, name: str, config_file: Path | None, any_init: bool) -> Adapter:
    """Return the adapter in bytes or in a tensor file, with its own config or `config_file`."""
    tensors, metadata = read_tensors(source, name)
    has_pefts_name = isinstance(source, Path) and source.name == TENSOR_FILE
    if not has_pefts_name and "adapter_config" in metadata:
        config_file = None
    return build_adapter(tensors, metadata, config_file, name, any_init=any_init)


def build_adapter(
    tensors: Mapping[str, Tensor],
    metadata: Mapping[str, str],
    config_file: Path | None,
    name: str,
    *,
    any_init: bool = False,
) -> Adapter:
    """Return an adapter with the config in a file or, without one, in the metadata; all checked.

    Values are not looked at. Raises LorakitError for what could not be written again exactly.
    """
    _check_names(tensors, name)  # its errors are more telling than the config's
    if config_file is not None:
        config = parse_config(_read(config_file), str(config_file), any_init=any_init)
    elif "adapter_config" in metadata:
        where = f"{name}: its adapter_config"
        config = parse_config(metadata["adapter_config"], where, any_init=any_init)
    else:
        raise LorakitError(f"{name} has no config; put PEFT's {CONFIG_FILE} beside it")
    return check_adapter(tensors, config, metadata, name)


def check_adapter(
    tensors: Mapping[str, Tensor], config: Config, metadata: Mapping[str, str], name: str
) -> Adapter:
    """Return an adapter with this config and the header in the metadata; tensors are checked.

    Raises LorakitError for what could not be written again exactly.
    """
    _check_names(tensors, name)
    _check_tensors(tensors, config, name)
    ranks = {module: tensors[lora_name(module, "A")].shape[0] for module in module_names(tensors)}
    header = parse_header(metadata.get("lorakit", "{}"), ranks, name)
    return Adapter(tensors, config, header, name)


def _check_names(tensors: Mapping[str, Tensor], name: str) -> None:
    """Raise LorakitError for a tensor that no adapter holds and for one without its other factor.

    Whether the config has the others, magnitudes and whole weights, is for check_kept.
    """
    if not tensors:
        raise LorakitError(f"{name} holds no tensors; check what wrote it")
    for key in sorted(tensors):
        if len(key) > _LONGEST_NAME:
            raise LorakitError(
                f"{name}: tensor {quote(key)} has a name of {len(key)} characters, which no model "
                "gives a module; check what wrote it"
            )
        parts = lora_parts(key)
        if parts is None:
            if magnitude_module(key) is None and whole_name(key) is None:
                refuse_tensor(key, name)
            continue
        module, factor = parts
        other: Factor = "B" if factor == "A" else "A"
        if lora_name(module, other) not in tensors:
            raise LorakitError(f"{name}: tensor {quote(key)} has no {other}; take a new copy")


def _check_tensors(tensors: Mapping[str, Tensor], config: Config, name: str) -> None:
    check_kept(tensors, config, name)
    for key in sorted(tensors):
        _check_tensor(key, tensors[key], name)
    modules = module_names(tensors)
    check_matching(config, modules, name)
    is_target = targeting(config)
    for module in modules:
        _check_module(module, tensors, config, name)
        if not is_target(module):
            raise LorakitError(
                f"{name}: tensor {quote(lora_name(module, 'A'))} is not targeted by the config, "
                "and PEFT would drop it; mend target_modules"
            )


def _check_tensor(key: str, tensor: Tensor, name: str) -> None:
    where = f"{name}: tensor {quote(key)}"
    if tensor.dtype not in FLOATS:
        raise LorakitError(f"{where} is {tensor.dtype}; cast it to float32, float16 or bfloat16")
    if lora_parts(key) and len(tensor.shape) != 2:
        raise LorakitError(
            f"{where} has {len(tensor.shape)} dimensions; lorakit reads LoRA on linear layers only"
        )


def _check_module(module: str, tensors: Mapping[str, Tensor], config: Config, name: str) -> None:
    """Raise LorakitError for a module whose tensors and config disagree."""
    key_a, key_b = lora_name(module, "A"), lora_name(module, "B")
    a, b, rank = tensors[key_a].shape, tensors[key_b].shape, rank_of(config, module)
    if a[0] != rank or b[1] != rank:
        raise LorakitError(
            f"{name}: {quote(module)} has A of shape {a} and B of shape {b}, but the config gives "
            f"it rank {rank}; mend r or rank_pattern"
        )
    if 0 in a + b:
        raise LorakitError(f"{name}: {quote(module)} has A of shape {a}, B of {b}; check them")


def save_adapter(
    adapter: Adapter, output: str, *, late: Callable[[], Adapter] | None = None
) -> str:
    """Write `adapter` as one file, to stdout (`-`) or as a PEFT folder; return `output`.

    A folder is an `output` that ends in a slash, has no suffix or exists as one; it gets a model
    card, unless a README.md of other content is there. Files are replaced whole. In a folder the
    old config is deleted before the new tensors are put in place, so that a run that is killed in
    between never leaves one adapter's tensors beside another's config; the tensor file holds its
    own config in its header. `late` returns the adapter once more, with a complete header
    of the same length: it is called while the tensors are on their way to a file, or before
    anything is written to a pipe.
    """
    if output == STDIO:
        refuse_terminal("an adapter")
    if output != STDIO and names_folder(output):
        _save_folder(adapter, Path(output), late)
    elif is_stream(output):
        _write_stream(late() if late else adapter, output)
    else:
        with atomic_path(output) as side, open(side, "wb") as stream:
            _write(adapter, stream, late)
    return output


def _write(adapter: Adapter, stream: BinaryIO, late: Callable[[], Adapter] | None = None) -> None:
    """Write the adapter's bytes and, if there is a `late`, its final metadata at the end."""

    def metadata_of(late: Callable[[], Adapter]) -> dict[str, str]:
        stream.flush()
        os.fsync(stream.fileno())  # the disk works while the header is completed
        return _metadata(late())

    at_last = functools.partial(metadata_of, late) if late else None
    write_tensors(adapter.tensors, _metadata(adapter), stream, late=at_last)
    stream.flush()


def _metadata(adapter: Adapter) -> dict[str, str]:
    metadata = {"adapter_config": config_text(adapter.config), "format": "pt"}
    if adapter.header:
        metadata["lorakit"] = header_text(adapter.header)
    return metadata


def _write_stream(adapter: Adapter, output: str) -> None:
    try:
        with contextlib.ExitStack() as stack:
            to_stdout = output == STDIO
            stream = sys.stdout.buffer if to_stdout else stack.enter_context(open(output, "wb"))
            _write(adapter, stream)
    except BrokenPipeError:  # the reader closed the pipe, which is no error of the output
        raise
    except OSError as error:
        raise LorakitError(f"cannot write {output}: {explain(error)}; choose another -o") from error


def _save_folder(adapter: Adapter, folder: Path, late: Callable[[], Adapter] | None) -> None:
    config = folder / CONFIG_FILE
    text = (config_text(adapter.config) + "\n").encode()
    complete: Callable[[], Adapter] = functools.cache(late) if late else lambda: adapter
    with made_folders(folder, folder), contextlib.ExitStack() as sides:
        card_side = _enter_card(folder / CARD_FILE, sides)
        config_side = sides.enter_context(atomic_path(config))
        tensor_side = sides.enter_context(atomic_path(folder / TENSOR_FILE))
        _fill(config_side, text, config)
        with open(tensor_side, "wb") as stream:
            _write(adapter, stream, complete if late else None)
            os.fsync(stream.fileno())
        if card_side is not None:
            _fill(card_side, card_text(complete()).encode(), folder / CARD_FILE)
        if config.is_file() and config.read_bytes() != text:
            config.unlink()


def _fill(side: Path, content: bytes, final: Path) -> None:
    """Write a side file whole; the error names the file that it stands for."""
    try:
        side.write_bytes(content)
    except OSError as error:
        raise cannot_write(final, error) from error


def _enter_card(card: Path, sides: contextlib.ExitStack) -> Path | None:
    """Return the side file of a folder's card; None where a page of the user's stands there."""
    if card.exists():
        old = _read(card).decode("utf-8", errors="replace")
        if not is_adapter_card(old.replace("\r\n", "\n")):
            return None
    return sides.enter_context(atomic_path(card))
