"""What a GGUF file says about a model's shape: widths, heads, norms, rotary positions.

The keys are gguf's own. llama.cpp computes each architecture in one way, so a config that asks for
another (its activation, scores scaled otherwise, layers in another order) is refused by its key.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping

import numpy as np

from lorakit.adapters.tensors import FloatArray
from lorakit.errors import LorakitError
from lorakit.gguf.file import Fields, Value
from lorakit.gguf.names import (
    Config,
    GgufNames,
    heads_of,
    key_heads_of,
    layers_of,
    width_of,
)

_ACTIVATIONS = {
    "silu": ("silu", "swish"),
    "gelu": ("gelu_new", "gelu_pytorch_tanh", "gelu_fast"),  # all by the same formula
}
_GEMMA_27B = {"GEMMA2": 46, "GEMMA3": 62}  # layers by which llama.cpp knows them
_WINDOWED = ("GEMMA2", "GEMMA3")  # of which llama.cpp computes the sliding window


def hyperparameters(names: GgufNames) -> Fields:
    """Return the fields of a model's shape, by the keys of its architecture.

    Raises LorakitError for what llama.cpp computes otherwise than the config says.
    """
    _check_sameness(names)
    config, family = names.config, names.family.architecture
    fields: dict[str, Value] = {
        "vocab_size": int(config["vocab_size"]),
        "context_length": context_of(names)[0],
        "embedding_length": width_of(config),
        "block_count": layers_of(config),
        "feed_forward_length": _inner_width(config),
        "attention.head_count": heads_of(config),
        "attention.head_count_kv": key_heads_of(config),
        **_norm(config),
    }
    if family != "GPT2":
        fields |= _rotary(names)
    if family not in ("GPT2", "PHI2"):
        fields["attention.key_length"] = fields["attention.value_length"] = _head_width(config)
    if family in _WINDOWED:
        fields["attention.sliding_window"] = int(config["sliding_window"])
    if family == "PHI3":
        fields["attention.sliding_window"] = int(config.get("sliding_window") or 0)
    for key in ("attn_logit_softcapping", "final_logit_softcapping"):
        if config.get(key):
            fields[key] = float(config[key])
    return {f"{names.architecture}.{key}": value for key, value in fields.items()}


def context_of(names: GgufNames) -> tuple[int, str | None]:
    """Return the longest context in tokens that llama.cpp computes alike, and a note on it.

    A sliding window that llama.cpp does not have is the end of it.
    """
    config = names.config
    length = int(config.get("n_positions") or config["max_position_embeddings"])
    window = config.get("sliding_window")
    uses = config.get("use_sliding_window", True) and names.family.architecture not in _WINDOWED
    if not window or not uses or window >= length:
        return length, None
    return int(window), (
        f"llama.cpp has no sliding window for {names.architecture}: the context is given as the "
        f"{window} tokens of the window, up to which both compute the same"
    )


def frequency_factors(names: GgufNames) -> dict[str, FloatArray]:
    """Return the tensors by which llama.cpp divides the rotary frequencies: none for most models.

    `rope_freqs.weight` for Llama 3's scaling, two tensors for short and for long contexts in Phi-3.
    """
    rope, config = _rope(names.config), names.config
    kind = rope.get("rope_type", "default")
    if kind == "llama3":
        return {"rope_freqs.weight": _llama3_factors(rope, _head_width(config))}
    if kind == "longrope":
        return {
            f"rope_factors_{which}.weight": np.asarray(rope[f"{which}_factor"], np.float32)
            for which in ("long", "short")
        }
    return {}


def _check_sameness(names: GgufNames) -> None:
    """Raise LorakitError for the first key of the config that llama.cpp would not follow."""
    for key, value, allowed in _conditions(names):
        if value not in allowed:
            raise LorakitError(
                f"{names.name}: {key} is {value!r}, and llama.cpp's {names.architecture} computes "
                f"it with {' or '.join(map(repr, allowed))}; serve it by another program"
            )
    _ROPES.get(str(_rope(names.config).get("rope_type", "default")), _no_rope)(names)


def _conditions(names: GgufNames) -> Iterator[tuple[str, object, tuple[object, ...]]]:
    """Yield keys of the config, their values, and those of llama.cpp."""
    config, family = names.config, names.family.architecture
    for key in ("hidden_activation", "activation_function", "hidden_act"):
        if config.get(key) is not None:
            yield key, config[key], _ACTIVATIONS[names.family.activation]
            break
    yield "qk_layernorm", config.get("qk_layernorm", False), (False, None)
    yield "use_bidirectional_attention", config.get("use_bidirectional_attention"), (False, None)
    for key in ("scale_attn_by_inverse_layer_idx", "add_cross_attention"):
        yield key, config.get(key, False), (False,)
    yield "scale_attn_weights", config.get("scale_attn_weights", True), (True,)
    if family in _WINDOWED:
        is_27b = layers_of(config) == _GEMMA_27B[family]
        width = width_of(config) // heads_of(config) if is_27b else _head_width(config)
        yield "query_pre_attn_scalar", config.get("query_pre_attn_scalar"), (width,)
        yield "layer_types", config.get("layer_types"), (_layer_types(family, layers_of(config)),)


def _layer_types(family: str, count: int) -> list[str]:
    """Return which layers have a sliding window in llama.cpp: all but every second, or sixth."""
    every = 2 if family == "GEMMA2" else 6
    kinds = ("sliding_attention", "full_attention")
    return [kinds[layer % every == every - 1] for layer in range(count)]


def _inner_width(config: Config) -> int:
    return int(config.get("n_inner") or config.get("intermediate_size") or 4 * width_of(config))


def _head_width(config: Config) -> int:
    return int(config.get("head_dim") or width_of(config) // heads_of(config))


def _norm(config: Config) -> dict[str, Value]:
    """Return the field of the norms' epsilon, of RMSNorm or LayerNorm."""
    if "rms_norm_eps" in config:
        return {"attention.layer_norm_rms_epsilon": float(config["rms_norm_eps"])}
    epsilon = config.get("layer_norm_eps", config.get("layer_norm_epsilon"))
    return {"attention.layer_norm_epsilon": float(epsilon or 1e-5)}


# — Rotary positions —


def _rope(config: Config) -> Mapping[str, object]:
    """Return the rotary parameters, of the layers with full attention where there are two kinds."""
    parameters = config.get("rope_parameters") or {}
    inner = parameters.get("full_attention", parameters)
    return inner if isinstance(inner, Mapping) else {}


def _number(rope: Mapping[str, object], key: str, default: float) -> float:
    value = rope.get(key)
    return float(value) if isinstance(value, int | float) else default


def _rotary(names: GgufNames) -> dict[str, Value]:
    """Return the fields of rotary positions: how many values of a head turn, how fast, scaled how.

    Gemma 3's layers with a window turn at a speed of their own.
    """
    config, rope = names.config, _rope(names.config)
    share = _number(rope, "partial_rotary_factor", 1.0)
    fields: dict[str, Value] = {
        "rope.dimension_count": int(share * _head_width(config)),
        "rope.freq_base": _number(rope, "rope_theta", 10_000.0),
    }
    local = (config.get("rope_parameters") or {}).get("sliding_attention")
    if isinstance(local, Mapping):
        fields["rope.freq_base_swa"] = _number(local, "rope_theta", 10_000.0)
    scaling = _ROPES[str(rope.get("rope_type", "default"))](names)
    return fields | {f"rope.scaling.{key}": value for key, value in scaling.items()}


def _plain(names: GgufNames) -> dict[str, Value]:
    return {}


def _linear(names: GgufNames) -> dict[str, Value]:
    return {"type": "linear", "factor": _number(_rope(names.config), "factor", 1.0)}


def _yarn(names: GgufNames) -> dict[str, Value]:
    rope = _rope(names.config)
    for key in ("attention_factor", "mscale", "mscale_all_dim"):
        if rope.get(key) is not None:
            raise _no_scaling(names, f"yarn with {key}")
    length = names.config["max_position_embeddings"]
    return {
        "type": "yarn",
        "factor": _number(rope, "factor", 1.0),
        "original_context_length": int(_number(rope, "original_max_position_embeddings", length)),
        "yarn_beta_fast": _number(rope, "beta_fast", 32.0),
        "yarn_beta_slow": _number(rope, "beta_slow", 1.0),
    }


def _longrope(names: GgufNames) -> dict[str, Value]:
    """Return the scaling of Phi-3; its attention factor is sqrt(1 + ln(factor) / ln(original))."""
    if names.family.architecture != "PHI3":
        raise _no_scaling(names, "longrope")
    rope, length = _rope(names.config), names.config["max_position_embeddings"]
    original = _number(rope, "original_max_position_embeddings", length)
    factor = length / original
    usual = math.sqrt(1 + math.log(factor) / math.log(original)) if factor > 1 else 1.0
    return {
        "original_context_length": int(original),
        "attn_factor": _number(rope, "attention_factor", usual),
    }


def _llama3_factors(rope: Mapping[str, object], width: int) -> FloatArray:
    """Return what Llama 3's scaling divides the frequency of each pair of values by.

    1 for short wave lengths, `factor` for long ones, and between the two a blend of the inverses.
    """
    base, factor = _number(rope, "rope_theta", 10_000.0), _number(rope, "factor", 8.0)
    low, high = _number(rope, "low_freq_factor", 1.0), _number(rope, "high_freq_factor", 4.0)
    original = _number(rope, "original_max_position_embeddings", 8192)
    waves = 2 * math.pi * base ** (np.arange(0, width, 2) / width)
    blend = np.clip((original / waves - low) / (high - low), 0, 1)
    return np.asarray(1 / ((1 - blend) / factor + blend), np.float32)


def _no_rope(names: GgufNames) -> dict[str, Value]:
    raise _no_scaling(names, str(_rope(names.config).get("rope_type")))


def _no_scaling(names: GgufNames, kind: str) -> LorakitError:
    return LorakitError(
        f"{names.name}: its rotary positions are scaled by {kind}, which llama.cpp's "
        f"{names.architecture} does not compute; serve it by another program"
    )


_ROPES: Mapping[str, Callable[[GgufNames], dict[str, Value]]] = {
    "default": _plain,
    "linear": _linear,
    "llama3": _plain,  # by tensors alone: frequency_factors
    "longrope": _longrope,
    "yarn": _yarn,
}
