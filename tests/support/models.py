"""Tiny random models of the families lorakit is tested on, with a tokenizer of their own."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors

from lorakit.models.base import Base
from lorakit.models.loading import load_base

VOCABULARY = 300
CONTEXT = 128
LAYERS = 3
_SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": CONTEXT,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
FAMILIES: dict[str, Callable[[], transformers.PretrainedConfig]] = {
    "llama": lambda: transformers.LlamaConfig(**_SIZES),
    "qwen2": lambda: transformers.Qwen2Config(**_SIZES),
    "mistral": lambda: transformers.MistralConfig(**_SIZES, sliding_window=64),
    "gemma2": lambda: transformers.Gemma2Config(**_SIZES, head_dim=8, final_logit_softcapping=5.0),
    "phi": lambda: transformers.PhiConfig(**{**_SIZES, "num_key_value_heads": 4}),
    "phi3": lambda: transformers.Phi3Config(**_SIZES),
    "gpt2": lambda: transformers.GPT2Config(
        vocab_size=VOCABULARY,
        n_positions=CONTEXT,
        n_embd=32,
        n_layer=LAYERS,
        n_head=4,
        bos_token_id=1,
        eos_token_id=2,
    ),
}


def save_model(folder: Path, family: str = "llama", seed: int = 0) -> str:
    """Write a random model of a family and a byte tokenizer into a folder; return its path."""
    torch.manual_seed(seed)
    model = transformers.AutoModelForCausalLM.from_config(FAMILIES[family]())
    with torch.no_grad():  # an untrained model prefers no token: spread its logits
        for parameter in model.parameters():
            parameter.mul_(2.0)
    model.save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return str(folder)


def open_base(name: str, dtype: torch.dtype = torch.float32) -> Base:
    """Load a base on the CPU."""
    return load_base(name, device=torch.device("cpu"), dtype=dtype)


def byte_tokenizer() -> transformers.PreTrainedTokenizerFast:
    """Return a tokenizer with a token per byte, which needs no training and encodes any text."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    special = ["<pad>", "<s>", "</s>"]
    vocabulary = {token: place for place, token in enumerate([*special, *letters])}
    tokenizer = Tokenizer(models.BPE(vocabulary, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 1)]
    )
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>"
    )
