"""Random models of known shapes, in a folder or made on the device, and random adapters on them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers

from lorakit.adapters.adapter import Adapter, tensors_of
from lorakit.adapters.targets import peft_config
from lorakit.models.base import Base
from lorakit.models.loading import _prepare_
from lorakit.models.lora import pick_modules, projections

QUERY_AND_VALUE = ("q_proj", "v_proj")
PAD, BEGIN, END = 0, 1, 2  # the ids of the special tokens


@dataclass(frozen=True)
class Shape:
    """The sizes of a Llama; `spread` is the standard deviation of its random weights."""

    words: int
    width: int
    inner: int
    layers: int
    heads: int
    kv_heads: int
    context: int = 2048
    spread: float = 0.02
    tied: bool = False

    @property
    def config(self) -> transformers.LlamaConfig:
        return transformers.LlamaConfig(
            vocab_size=self.words,
            hidden_size=self.width,
            intermediate_size=self.inner,
            num_hidden_layers=self.layers,
            num_attention_heads=self.heads,
            num_key_value_heads=self.kv_heads,
            max_position_embeddings=self.context,
            initializer_range=self.spread,
            tie_word_embeddings=self.tied,
            bos_token_id=BEGIN,
            eos_token_id=END,
            pad_token_id=PAD,
        )

    @property
    def layer_weights(self) -> int:
        """The number of weights of one decoder layer that multiply a token."""
        return self.key_weights + 2 * self.width**2 + 3 * self.width * self.inner

    @property
    def key_weights(self) -> int:
        """The number of weights of one decoder layer that make keys and values."""
        return 2 * self.width * (self.width * self.kv_heads // self.heads)

    def training_flops(self, tokens: int, targets: int) -> float:
        """Return the multiplications and additions that no training step can do without.

        Forward, and backward to the activations only: 4 a weight and token; the head, and of the
        last layer all but keys and values, where a loss is due; attention and the adapters, which
        are small, left out.
        """
        whole = tokens * (self.layer_weights * (self.layers - 1) + self.key_weights)
        due = self.layer_weights - self.key_weights + self.width * self.words
        return 4.0 * (whole + targets * due)

    def reading_flops(self, tokens: int) -> float:
        """Return the multiplications and additions of a forward pass, with the head, over tokens.

        Attention and the adapters, which are small, are left out.
        """
        return 2.0 * tokens * (self.layer_weights * self.layers + self.width * self.words)


# name: words, width, inner, layers, heads, key and value heads
TRAINED = Shape(32_000, 512, 1376, 12, 8, 8)
SMOLLM2 = Shape(49_152, 576, 1536, 30, 9, 3, spread=0.05, tied=True)
LLAMA_8B = Shape(128_256, 4096, 14_336, 32, 32, 8, context=8192)
LLAMA_1B = Shape(4096, 1536, 4608, 32, 12, 12, spread=0.05)
SMALL = Shape(512, 64, 128, 4, 4, 2, spread=0.1)
SHAPES: dict[str, Shape] = {
    "trained": TRAINED,
    "smollm2": SMOLLM2,
    "8b": LLAMA_8B,
    "1b": LLAMA_1B,
    "small": SMALL,
}


def word_tokenizer(words: int) -> transformers.PreTrainedTokenizerFast:
    """Return a tokenizer whose tokens are w0, w1 … between spaces, so that text tells its ids."""
    special = {"<pad>": PAD, "<s>": BEGIN, "</s>": END}
    vocabulary = special | {f"w{number}": number for number in range(len(special), words)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>"
    )


def save_model(shape: Shape, folder: Path, tokenizer: Any = None) -> str:
    """Write a random model in float32 and its tokenizer into a folder; return its path."""
    torch.manual_seed(0)
    transformers.LlamaForCausalLM(shape.config).save_pretrained(folder)
    (tokenizer or word_tokenizer(shape.words)).save_pretrained(folder)
    return str(folder)


def random_base(shape: Shape, device: torch.device, dtype: torch.dtype) -> Base:
    """Return a random model that is made on the device and never written."""
    torch.manual_seed(0)
    with torch.device(device):
        model: Any = transformers.AutoModelForCausalLM.from_config(shape.config, dtype=dtype)
    _prepare_(model, device)
    return Base(model, word_tokenizer(shape.words), "random", (END,), dtype)


def random_adapter(
    base: Base,
    *,
    rank: int = 8,
    seed: int = 0,
    strength: float = 0.02,
    targets: Sequence[str] = QUERY_AND_VALUE,
) -> Adapter:
    """Return an adapter that changes what a random model writes, but not at every token."""
    draw = torch.Generator().manual_seed(seed)
    modules = pick_modules(base, targets, None)
    shapes = projections(base.model)
    factors = {
        name: (
            (torch.randn(rank, shapes[name][1], generator=draw) / shapes[name][1] ** 0.5).numpy(),
            (strength * torch.randn(shapes[name][0], rank, generator=draw)).numpy(),
        )
        for name in modules
    }
    config = peft_config(dict.fromkeys(modules, rank), base=base.name)
    return Adapter(tensors_of(factors), config)
