"""Small random models with PEFT's own adapters on them, of every kind that PEFT writes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import peft
import torch
import transformers

SIZES: dict[str, Any] = {
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "vocab_size": 50,
}
MODELS: dict[str, Callable[[], transformers.PretrainedConfig]] = {
    "llama": lambda: transformers.LlamaConfig(**SIZES, intermediate_size=48),
    "gpt2": lambda: transformers.GPT2Config(n_embd=32, n_layer=3, n_head=4, vocab_size=50),
    "opt": lambda: transformers.OPTConfig(
        **SIZES, ffn_dim=48, word_embed_proj_dim=32, max_position_embeddings=64
    ),
    "bloom": lambda: transformers.BloomConfig(hidden_size=32, n_layer=3, n_head=4, vocab_size=50),
}
TOKENS = torch.tensor([[1, 5, 7, 9, 11, 3, 2, 4]])


def random_model(family: str) -> Any:
    torch.manual_seed(0)
    config = MODELS[family]()
    config.eos_token_id = config.bos_token_id = config.pad_token_id = None
    return transformers.AutoModelForCausalLM.from_config(config).eval()


def with_lora(base: Any, config: peft.LoraConfig | Mapping[str, Any]) -> Any:
    """Return PEFT's own adapter on `base`, its weights random, what it saves whole disturbed."""
    if not isinstance(config, peft.LoraConfig):
        config = peft.LoraConfig(**config)
    model = peft.get_peft_model(base, config).eval()
    torch.manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = torch.randn_like(parameter)
        elif "modules_to_save" in name:
            parameter.data += 0.1 * torch.randn_like(parameter)
    return model


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return torch.as_tensor(model(TOKENS).logits)


KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "plain": ("llama", {"target_modules": ["q_proj", "v_proj"]}),
    "conv1d": ("gpt2", {"target_modules": ["c_attn", "c_proj"], "fan_in_fan_out": True}),
    "rslora": ("llama", {"target_modules": ["q_proj"], "use_rslora": True, "r": 3}),
    "rank pattern": (
        "llama",
        {"target_modules": ["q_proj", "v_proj"], "rank_pattern": {"v_proj": 2, "1.*q_proj": 5}},
    ),
    "alpha pattern": (
        "llama",
        {"target_modules": ["q_proj", "v_proj"], "alpha_pattern": {"layers.1.*": 3}},
    ),
    "patterns under rslora": (
        "llama",
        {
            "target_modules": ["q_proj", "v_proj"],
            "rank_pattern": {"v_proj": 2},
            "alpha_pattern": {"q_proj": 5},
            "use_rslora": True,
        },
    ),
    "layers": ("llama", {"target_modules": ["q_proj"], "layers_to_transform": [0, 2]}),
    "one layer": ("llama", {"target_modules": ["q_proj"], "layers_to_transform": 1}),
    "layers of a family": (
        "gpt2",
        {
            "target_modules": ["c_attn"],
            "layers_to_transform": [1],
            "layers_pattern": "h",
            "fan_in_fan_out": True,
        },
    ),
    "all-linear": ("llama", {"target_modules": "all-linear"}),
    "the family's own": ("llama", {}),
    "regular expression": ("llama", {"target_modules": r".*\.[02]\..*(q|v)_proj"}),
    "excluded": (
        "llama",
        {"target_modules": ["q_proj", "v_proj"], "exclude_modules": r".*\.1\..*v_proj"},
    ),
    "gaussian": ("llama", {"target_modules": ["q_proj"], "init_lora_weights": "gaussian"}),
    "orthogonal": ("llama", {"target_modules": ["q_proj"], "init_lora_weights": "orthogonal"}),
    "mica": ("llama", {"target_modules": ["q_proj"], "init_lora_weights": "mica"}),
    "output head": ("llama", {"target_modules": ["q_proj", "lm_head"]}),
}

# What holds more than A and B.
_QV = {"target_modules": ["q_proj", "v_proj"], "r": 4, "lora_alpha": 6}
MORE_KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "head": ("llama", {**_QV, "modules_to_save": ["lm_head"]}),
    "last norm": ("llama", {**_QV, "modules_to_save": ["model.norm"]}),
    "norms": ("llama", {**_QV, "modules_to_save": ["input_layernorm"]}),
    "embedding and head": ("llama", {**_QV, "modules_to_save": ["embed_tokens", "lm_head"]}),
    "modules with biases": (
        "gpt2",
        {"target_modules": ["c_attn"], "modules_to_save": ["mlp"], "fan_in_fan_out": True},
    ),
    "DoRA": ("llama", {**_QV, "use_dora": True}),
    "DoRA under rslora": (
        "llama",
        {**_QV, "use_dora": True, "use_rslora": True, "rank_pattern": {"v_proj": 2}},
    ),
    "DoRA on Conv1D": (
        "gpt2",
        {"target_modules": ["c_attn", "c_proj"], "fan_in_fan_out": True, "use_dora": True},
    ),
    "DoRA and a head": ("llama", {**_QV, "use_dora": True, "modules_to_save": ["lm_head"]}),
}
