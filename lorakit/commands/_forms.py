"""How `convert` writes an adapter, by the program that is to read it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from lorakit.errors import LorakitError
from lorakit.files import is_stream, names_folder

if TYPE_CHECKING:
    from lorakit.adapters.adapter import Adapter
    from lorakit.settings import ModelSettings

    Note = Callable[[str], None]


class Form(NamedTuple):
    """A way to write an adapter: whether an output's name fits, and the writing.

    `save` is given the base that the user names, and tells by notes how the output is used.
    """

    check_output: Callable[[str], None]
    save: Callable[[Adapter, str, ModelSettings, Note], None]


def _save_peft(adapter: Adapter, output: str, model: ModelSettings, note: Note) -> None:
    from lorakit.adapters.storage import save_adapter

    save_adapter(adapter, output)


def _save_mlx(adapter: Adapter, output: str, model: ModelSettings, note: Note) -> None:
    from lorakit.adapters.mlx import save_mlx
    from lorakit.adapters.whole import check_plain

    check_plain(adapter, "MLX")
    save_mlx(adapter, output)


def _save_vllm(adapter: Adapter, output: str, model: ModelSettings, note: Note) -> None:
    from lorakit.adapters.portable import make_portable
    from lorakit.adapters.serving import serving_note, vllm_command
    from lorakit.adapters.storage import save_adapter

    portable = make_portable(adapter)
    vllm_command(portable, output)  # raises an error for a rank beyond vLLM's
    save_adapter(portable, output)
    if line := serving_note(output):
        note(line)


def _save_gguf(adapter: Adapter, output: str, model: ModelSettings, note: Note) -> None:
    from lorakit.adapters.whole import check_plain
    from lorakit.gguf.adapter import convert_to_gguf

    check_plain(adapter, "llama.cpp", "--to gguf -o fused.gguf")
    convert_to_gguf(adapter, output, model, note)


def _check_file_or_folder(output: str) -> None:
    """Raise LorakitError for a name that is neither that of safetensors nor of a folder."""
    if not (is_stream(output) or names_folder(output) or output.endswith(".safetensors")):
        raise LorakitError(
            f"convert writes no {Path(output).suffix} files; end -o in .safetensors or, for a "
            "folder, in /"
        )


def _check_folder(output: str) -> None:
    """Raise LorakitError for a name that is not a folder's."""
    if is_stream(output) or not names_folder(output):
        raise LorakitError(f"MLX and vLLM read folders, and {output} is none; end -o in /")


def _check_gguf(output: str) -> None:
    from lorakit.gguf.file import check_gguf_output

    check_gguf_output(output)


FORMS = {
    "peft": Form(_check_file_or_folder, _save_peft),
    "mlx": Form(_check_folder, _save_mlx),
    "vllm": Form(_check_folder, _save_vllm),
    "gguf": Form(_check_gguf, _save_gguf),
}
