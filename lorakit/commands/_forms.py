"""How `convert` writes an adapter, by the program that is to read it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from lorakit.errors import LorakitError
from lorakit.files import is_stream, names_folder

if TYPE_CHECKING:
    from lorakit.adapters.adapter import Adapter
    from lorakit.settings import ModelSettings

    Note = Callable[[str], None]


class Form(NamedTuple):
    """A way to write an adapter: whether an output's name fits, the writing, and how it is served.

    `save` is given the base that the user names; `serving` returns lines about a written output.
    """

    check_output: Callable[[str], None]
    save: Callable[[Adapter, str, ModelSettings, Note], None]
    serving: Callable[[str], Sequence[str]] = lambda output: ()


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
    from lorakit.adapters.serving import vllm_command
    from lorakit.adapters.storage import save_adapter

    portable = make_portable(adapter)
    vllm_command(portable, output)  # raises an error for a rank beyond vLLM's
    save_adapter(portable, output)


def _vllm_lines(output: str) -> list[str]:
    from lorakit.adapters.serving import serving_note

    line = serving_note(output)
    return [line] if line else []


def _save_gguf(adapter: Adapter, output: str, model: ModelSettings, note: Note) -> None:
    from lorakit.adapters.whole import check_plain
    from lorakit.gguf.adapter import convert_to_gguf

    check_plain(adapter, "llama.cpp", "--to gguf -o fused.gguf")
    convert_to_gguf(adapter, output, model, note)


def _gguf_lines(output: str) -> list[str]:
    from lorakit.gguf.serving import adapter_lines

    return adapter_lines(output)


def _check_file_or_folder(output: str) -> None:
    """Raise LorakitError for a name that is neither that of safetensors nor of a folder."""
    if not (is_stream(output) or names_folder(output) or output.endswith(".safetensors")):
        raise LorakitError(
            f"convert writes no {Path(output).suffix} files; end -o in .safetensors or, for a "
            "folder, in /"
        )


def _folder_for(program: str) -> Callable[[str], None]:
    """Return the check that a name is a folder's, which the program reads alone."""

    def check(output: str) -> None:
        if is_stream(output) or not names_folder(output):
            raise LorakitError(f"{program} reads folders, and {output} is none; end -o in /")

    return check


def _check_gguf(output: str) -> None:
    from lorakit.gguf.file import check_gguf_output

    check_gguf_output(output)


FORMS = {
    "peft": Form(_check_file_or_folder, _save_peft),
    "mlx": Form(_folder_for("MLX"), _save_mlx),
    "vllm": Form(_folder_for("vLLM"), _save_vllm, _vllm_lines),
    "gguf": Form(_check_gguf, _save_gguf, _gguf_lines),
}
