"""What llama.cpp calls a model's architecture and tensors, and which rows it has in its own order.

The names come from the package gguf; what is written here is which of its architectures is meant,
and where llama.cpp's tensors are not transformers'. Nothing here knows files or torch.

llama.cpp turns pairs of neighbouring values in the attention of its architecture llama, where
transformers pairs each value of a head's lower half with one of the upper half. The rows of q and k
are stored in llama.cpp's order, head by head: rows 0 1 2 3 4 5 of a head become 0 3 1 4 2 5.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any  # values of a model's config

import numpy as np

from lorakit.adapters.tensors import FloatArray
from lorakit.errors import LorakitError, check_packages

if TYPE_CHECKING:
    from gguf import TensorNameMap

Config = Mapping[str, Any]  # a model's config.json, or what transformers makes of it
_PERMUTED = {".q_proj": "query", ".k_proj": "key"}
HEAD = "output.weight"  # llama.cpp's name of the output head
_SUFFIXES = (".weight", ".bias")
_MOST = 1 << 20  # of layers, heads or values; gguf makes names for as many layers as it is told


@dataclass(frozen=True)
class Family:
    """How llama.cpp takes the models of one `model_type`.

    `architecture` is its name in gguf's MODEL_ARCH; `norm_offset` is added to the weights of norms,
    and `ties_head` is whether the head is the embedding where the config does not say.
    """

    architecture: str
    permutes: bool = False
    norm_offset: float = 0.0
    ties_head: bool = False
    activation: str = "silu"


FAMILIES: Mapping[str, Family] = {
    "gemma": Family("GEMMA", norm_offset=1, ties_head=True, activation="gelu"),
    "gemma2": Family("GEMMA2", norm_offset=1, ties_head=True, activation="gelu"),
    "gemma3_text": Family("GEMMA3", norm_offset=1, ties_head=True, activation="gelu"),
    "gpt2": Family("GPT2", ties_head=True, activation="gelu"),
    "llama": Family("LLAMA", permutes=True),
    "mistral": Family("LLAMA", permutes=True),
    "phi": Family("PHI2", activation="gelu"),
    "phi3": Family("PHI3"),
    "qwen2": Family("QWEN2"),
    "qwen3": Family("QWEN3"),
}


@dataclass(frozen=True)
class GgufNames:
    """The names and orders that llama.cpp gives the tensors of one model, called `name`."""

    name: str
    config: Config
    family: Family
    table: TensorNameMap

    @property
    def architecture(self) -> str:
        """The architecture as it stands in files: `llama`."""
        import gguf

        return gguf.MODEL_ARCH_NAMES[gguf.MODEL_ARCH[self.family.architecture]]

    @property
    def ties_head(self) -> bool:
        """Whether the output head's weights are those of the input embedding."""
        return bool(self.config.get("tie_word_embeddings", self.family.ties_head))

    def tensor(self, parameter: str) -> str:
        """Return llama.cpp's name of a parameter: `blk.0.attn_q.weight`.

        Raises LorakitError for one that its architecture does not have.
        """
        if (name := self.table.get_name(parameter, _SUFFIXES)) is None:
            raise LorakitError(
                f"{self.name}: llama.cpp's {self.architecture} has no tensor for {parameter}; "
                "leave that module out, or serve the model by another program"
            )
        return name

    def in_order(self, parameter: str, rows: FloatArray) -> FloatArray:
        """Return a parameter's rows, along the first axis, in the order llama.cpp has them in.

        Raises LorakitError where they are not the rows of whole heads.
        """
        module = parameter.removesuffix(".weight").removesuffix(".bias")
        kind = next((kind for end, kind in _PERMUTED.items() if module.endswith(end)), None)
        if not self.family.permutes or kind is None:
            return rows
        heads = heads_of(self.config) if kind == "query" else key_heads_of(self.config)
        if len(rows) % (2 * heads):
            raise LorakitError(
                f"{self.name}: {module} has {len(rows)} rows for {heads} heads; check its config"
            )
        return interleaved(rows, heads)


def interleaved(rows: FloatArray, heads: int) -> FloatArray:
    """Return the rows of each head with those of its lower and upper half taking turns."""
    places = np.arange(len(rows)).reshape(heads, 2, -1).swapaxes(1, 2).reshape(-1)
    return rows[places]


def heads_of(config: Config) -> int:
    """Return the number of attention heads."""
    return int(config["n_head"] if "n_head" in config else config["num_attention_heads"])


def key_heads_of(config: Config) -> int:
    """Return the number of heads of keys and values."""
    return int(config.get("num_key_value_heads") or heads_of(config))


def layers_of(config: Config) -> int:
    """Return the number of decoder layers."""
    return int(config["n_layer"] if "n_layer" in config else config["num_hidden_layers"])


def width_of(config: Config) -> int:
    """Return how many values stand for a token between layers."""
    return int(config["n_embd"] if "n_embd" in config else config["hidden_size"])


def names_of(config: Config, name: str) -> GgufNames:
    """Return llama.cpp's names for the model `name` with this config.

    Raises LorakitError without the package gguf, for a family not in FAMILIES, and for a config
    that does not give its numbers of layers and heads and its width.
    """
    check_packages("GGUF", "gguf", extra="gguf")
    import gguf

    kind = str(config.get("model_type"))
    if kind not in FAMILIES:
        raise LorakitError(
            f"{name} is of the family {kind!r}, and GGUF is written for {', '.join(FAMILIES)}; "
            "convert it with llama.cpp's own scripts"
        )
    _check_counts(config, name)
    family = FAMILIES[kind]
    table = gguf.get_tensor_name_map(gguf.MODEL_ARCH[family.architecture], layers_of(config))
    return GgufNames(name, config, family, table)


def _check_counts(config: Config, name: str) -> None:
    """Raise LorakitError for a config whose layers, heads or width are no numbers of such."""
    try:
        counts = [count(config) for count in (layers_of, heads_of, key_heads_of, width_of)]
    except (KeyError, TypeError, ValueError):
        counts = [0]
    if not all(0 < count <= _MOST for count in counts):
        raise LorakitError(
            f"{name}: its config gives no number of layers or heads, or no width; take a new copy "
            "of config.json"
        )
