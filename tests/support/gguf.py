"""GGUF files read back by the package gguf, and small random models of the families it is for."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
import transformers
from tokenizers import Tokenizer

from tests.support.models import byte_tokenizer

SIZES: dict[str, Any] = {
    "vocab_size": 300,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
GEMMA: dict[str, Any] = {
    **SIZES,
    "head_dim": 16,
    "query_pre_attn_scalar": 16,
    "sliding_window": 16,
}
CONFIGS: dict[str, Callable[[], transformers.PretrainedConfig]] = {
    "llama": lambda: transformers.LlamaConfig(**SIZES, attention_bias=True),
    "llama tied": lambda: transformers.LlamaConfig(**SIZES, tie_word_embeddings=True),
    "llama wide heads": lambda: transformers.LlamaConfig(**SIZES, head_dim=32),
    "mistral": lambda: transformers.MistralConfig(**SIZES, sliding_window=64),
    "qwen2": lambda: transformers.Qwen2Config(**SIZES),
    "qwen3": lambda: transformers.Qwen3Config(**SIZES, head_dim=32),
    "gemma": lambda: transformers.GemmaConfig(**SIZES, head_dim=16),
    "gemma2": lambda: transformers.Gemma2Config(**GEMMA),
    "gemma3": lambda: transformers.Gemma3TextConfig(**{**GEMMA, "num_hidden_layers": 7}),
    "phi": lambda: transformers.PhiConfig(**{**SIZES, "num_key_value_heads": 4}),
    "phi3": lambda: transformers.Phi3Config(**SIZES),
    "gpt2": lambda: transformers.GPT2Config(
        vocab_size=300, n_positions=128, n_embd=64, n_layer=2, n_head=4, n_inner=96
    ),
}


def save_random(kind: str, folder: Path, dtype: torch.dtype = torch.float32) -> Any:
    """Write a random model of a kind, and a byte tokenizer, into a folder; return the model."""
    torch.manual_seed(0)
    model: Any = transformers.AutoModelForCausalLM.from_config(CONFIGS[kind]())
    offset = 0.0 if kind.startswith("gemma") else 1.0  # of norms, which Gemma adds itself
    for name, parameter in model.named_parameters():
        is_norm = ("norm" in name or "ln_" in name) and name.endswith("weight")
        parameter.data = torch.randn_like(parameter) * 0.2 + (offset if is_norm else 0.0)
    model.to(dtype).save_pretrained(folder)
    merging_tokenizer().save_pretrained(folder)
    return model


def merging_tokenizer() -> Any:
    """Return the byte tokenizer with tokens of two and three letters: llama.cpp wants merges."""
    plain = byte_tokenizer()
    parts = json.loads(plain.backend_tokenizer.to_str())
    for left, right in (("t", "h"), ("th", "e"), ("Ġ", "a")):
        parts["model"]["vocab"][left + right] = len(parts["model"]["vocab"])
        parts["model"]["merges"].append([left, right])
    inner = Tokenizer.from_str(json.dumps(parts))
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=inner, bos_token="<s>", eos_token="</s>", pad_token="<pad>"
    )


def fields_of(path: Path) -> dict[str, Any]:
    """Return the fields of a GGUF file, by key."""
    reader = gguf.GGUFReader(path)
    return {key: field.contents() for key, field in reader.fields.items()}


def tensors_of(path: Path) -> dict[str, np.ndarray[Any, Any]]:
    """Return the tensors of a GGUF file as float32, in numpy's order of dimensions."""
    return {
        tensor.name: gguf.quants.dequantize(tensor.data, tensor.tensor_type).reshape(
            tuple(int(size) for size in reversed(tensor.shape))
        )
        for tensor in gguf.GGUFReader(path).tensors
    }


def formats_of(path: Path) -> dict[str, str]:
    """Return the number format of each tensor of a GGUF file."""
    return {tensor.name: tensor.tensor_type.name for tensor in gguf.GGUFReader(path).tensors}


def rotary_pairs_side_by_side(weight: Any, heads: int) -> Any:
    """Return rows of q or k as llama.cpp has them: i and i + d/2 of a head are neighbours."""
    size = len(weight) // heads
    order = [
        head * size + half * (size // 2) + place
        for head in range(heads)
        for place in range(size // 2)
        for half in range(2)
    ]
    return weight[order]
