"""How llama.cpp and Ollama are told of the files that lorakit writes for them."""

from __future__ import annotations

import shlex

from lorakit.files import is_stream


def adapter_lines(output: str) -> list[str]:
    """Return how an adapter in GGUF is served beside its base; nothing for a pipe."""
    if is_stream(output):
        return []
    return [
        f"to serve it: llama-server -m BASE.gguf --lora {shlex.quote(output)}",
        "in an Ollama Modelfile: FROM ./BASE.gguf",
        f"and on the line below it: ADAPTER {_as_path(output)}",
    ]


def model_lines(output: str) -> list[str]:
    """Return how a model in GGUF is served; nothing for a pipe."""
    if is_stream(output):
        return []
    return [
        f"to serve it: llama-server -m {shlex.quote(output)}",
        f"in an Ollama Modelfile: FROM {_as_path(output)}",
    ]


def _as_path(output: str) -> str:
    """Return a file name as a Modelfile has it, in which a bare one would be a model's."""
    return output if output.startswith(("/", "./", "../", "~")) else f"./{output}"
