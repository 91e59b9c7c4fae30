"""The command line by which vLLM serves an adapter beside its base.

vLLM reads PEFT folders, up to the rank that --max-lora-rank sets, which is one of VLLM_RANKS (its
config/lora.py).
"""

from __future__ import annotations

import shlex
from pathlib import Path

from lorakit.adapters.adapter import Adapter
from lorakit.adapters.base_model import base_name, base_revision
from lorakit.adapters.storage import load_adapter
from lorakit.errors import LorakitError
from lorakit.files import is_stream, names_folder
from lorakit.foreign_text import printable
from lorakit.reach import TINY

VLLM_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)


def vllm_command(adapter: Adapter, folder: str) -> str:
    """Return the shell line that serves an adapter in a folder, which bears the folder's name.

    A base that is not recorded is called BASE. Raises LorakitError for a rank beyond vLLM's.
    """
    name = base_name(adapter)
    base = name if name and name != TINY else "BASE"
    revision = base_revision([adapter], base)
    words = ["vllm", "serve", base, *(["--revision", revision] if revision else [])]
    words += ["--enable-lora", "--max-lora-rank", str(_max_rank(adapter))]
    served = Path(folder).resolve().name.replace("=", "-")  # NAME ends at the first =
    return printable(shlex.join([*words, "--lora-modules", f"{served}={folder}"]))


def _max_rank(adapter: Adapter) -> int:
    """Return the lowest rank that vLLM can be set to and that is enough for an adapter."""
    rank = max(module.rank for module in adapter.modules())
    for allowed in VLLM_RANKS:
        if rank <= allowed:
            return allowed
    raise LorakitError(
        f"{adapter.name} has rank {rank}, and vLLM takes {VLLM_RANKS[-1]} at most; refit it by "
        f"merge --rank {VLLM_RANKS[-1]}"
    )


def serving_note(output: str) -> str | None:
    """Return how vLLM serves the portable adapter that was written; None for one in a pipe."""
    if is_stream(output):
        return None
    if not names_folder(output):
        folder = f"{Path(output).with_suffix('')}/"
        words = ["lorakit", "convert", output, "--to", "vllm", "-o", folder]
        return f"vLLM reads folders: {printable(shlex.join(words))}"
    try:
        return f"to serve it: {vllm_command(load_adapter(output, check_values=False), output)}"
    except LorakitError as error:
        return f"Warning: {error}"
