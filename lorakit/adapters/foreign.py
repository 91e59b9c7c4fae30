"""Detect files that look like an adapter but that lorakit cannot read, and say what to do instead.

Files of other formats are recognised by their first bytes, folders by the files in them, and other
kinds of adapter by their tensors' names. To detect another one, add a line to BYTES or TENSORS.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import NoReturn

from lorakit.errors import LorakitError
from lorakit.files import open_input
from lorakit.foreign_text import quote

PICKLE_FILE = "adapter_model.bin"
SAFETENSORS_FILE = "adapter_model.safetensors"

_PICKLE = rb"PK\x03\x04|\x80[\x02-\x05]"

# What a file is and what to do about it, by a pattern for its first bytes.
BYTES: Mapping[bytes, str] = {
    rb"version https://git-lfs": "is a Git LFS pointer, not the file; fetch it with git lfs pull",
    rb"\s*<(!doctype|html|\?xml)": "is a web page; download the file itself, not its page",
    rb"\s*\{": "is JSON, not safetensors; give the adapter's folder or its tensor file",
    rb"GGUF": "is a GGUF file; give the PEFT adapter it was made from",
    rb"\x93NUMPY": "is a NumPy file; give a PEFT adapter",
}

# What a tensor that is neither A nor B of a module is, and what to do about it, by a pattern for
# its name. The first pattern that occurs in the name applies, so the general ones come last.
TENSORS: Mapping[str, str] = {
    r"\n": "holds a line break; rename it",
    r"lora_magnitude_vector": "belongs to DoRA, and the config has no use_dora; set it",
    r"lora_embedding_[AB]": "is LoRA on an embedding; train without it in target_modules",
    r"lora_[AB]\.bias$": "is a bias (lora_bias); train with lora_bias=False",
    r"lora_[AB]\.[^.]+\.weight$": "has the adapter's name in its own; write it by save_pretrained",
    r"(^|\.)lora_[ab]$": "is MLX's (transposed); run lorakit convert on its folder",
    r"lora_(up|down|unet|te\d*)": "is named as kohya's are; convert the adapter to PEFT's format",
    r"^(unet\.|text_encoder|transformer\.(single_)?transformer_blocks)": (
        "is named as diffusers' are; lorakit reads adapters of language models"
    ),
    r"lora_[AB]\.weight$": (
        "does not begin with base_model.model.; write it by PEFT's save_pretrained"
    ),
    r"^base_model\.model\..*\.bias$": "is a bias; train with bias='none'",
    r"^base_model\.model\.(.*\.)?(base_layer|embed\w*|wte|wpe|lm_head)\.weight$": (
        "is a copy of the base's own that PEFT would drop; save with save_embedding_layers=False"
    ),
    r"^base_model\.model\.": (
        "is no LoRA factor, nor of a module in modules_to_save; mend the config"
    ),
    r"": "is no part of a LoRA adapter; give a PEFT adapter",
}


def refuse_other_bytes(first_bytes: bytes, name: str) -> None:
    """Raise LorakitError if `first_bytes` of the file `name` are those of another format."""
    if not first_bytes:
        raise LorakitError(f"{name} is empty; check what wrote it")
    if re.match(_PICKLE, first_bytes):
        raise LorakitError(f"{name} is a pickle, which lorakit does not read; {_conversion(name)}")
    for pattern, reason in BYTES.items():
        if re.match(pattern, first_bytes, re.IGNORECASE):
            raise LorakitError(f"{name} {reason}")


def refuse_folder(files: Iterable[str], name: str) -> NoReturn:
    """Raise LorakitError for the folder `name`, whose `files` lack adapter_model.safetensors."""
    files = list(files)
    if any(re.fullmatch(r"adapter_model.*(-of-\d+\..*|\.index\.json)", file) for file in files):
        raise LorakitError(f"{name} is sharded; join the shards into one adapter_model.safetensors")
    if PICKLE_FILE in files:
        raise LorakitError(
            f"{name} holds only the pickle {PICKLE_FILE}, which lorakit does not read; "
            + _conversion(name)
        )
    raise LorakitError(f"{name} holds no adapter_model.safetensors; give a PEFT folder or its file")


def refuse_tensor(key: str, name: str) -> NoReturn:
    """Raise LorakitError for a tensor `key` of file `name` that is neither A nor B of a module."""
    reason = next(why for pattern, why in TENSORS.items() if re.search(pattern, key))
    raise LorakitError(f"{name}: tensor {quote(key)} {reason}")


def find_pickle(source: str) -> Path | None:
    """Return the pickle that `source` is, or that its folder holds in place of safetensors.

    A safetensors file may begin like one: its first 8 bytes are a number. The next is a brace.
    """
    path = Path(source)
    if path.is_dir():
        pickle = path / PICKLE_FILE
        return pickle if pickle.is_file() and not (path / SAFETENSORS_FILE).exists() else None
    if not path.is_file():
        return None
    with open_input(source) as stream:
        start = stream.read(9)
    return path if re.match(_PICKLE, start) and start[8:] != b"{" else None


def _conversion(name: str) -> str:
    """Return the advice how to convert the pickle, or the folder with one, to safetensors."""
    path = Path(name)
    if name == "stdin":
        return "give the folder it lies in to: lorakit convert FOLDER -o FOLDER/"
    output = f"{name.rstrip('/')}/" if path.is_dir() else str(path.with_suffix(".safetensors"))
    return f"run: lorakit convert {shlex.quote(name)} -o {shlex.quote(output)}"
