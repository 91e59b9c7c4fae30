"""Read, check and write PEFT's `adapter_config.json`, and look up ranks and scales in it.

The allowed keys are in config_keys.py, which modules a config selects in targets.py. This follows
PEFT without importing it; the tests compare the two.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from typing import Any

from lorakit.adapters.config_keys import (
    FORMER,
    HARMLESS_INITS,
    KEPT,
    PLAIN,
    REFUSED,
    SUBTRACTED_INITS,
    TRAINING_ONLY,
)
from lorakit.adapters.patterns import check_patterns, is_name, peft_regex, table_of
from lorakit.adapters.regexes import UnboundedError, compiled
from lorakit.errors import LorakitError
from lorakit.foreign_text import parse_json, quote

# PEFT's config, as check_config returns it: the keys that lorakit reads have the types of KEPT.
Config = Mapping[str, Any]

DEFAULT_RANK = 8  # PEFT's, for a config that leaves r or lora_alpha out
DEFAULT_ALPHA = 8
SETS = ("exclude_modules", "layers_to_transform", "target_modules")  # lists without order

_PATTERNS = ("alpha_pattern", "rank_pattern")
_LARGEST = 1e38  # the numbers are used in float32; neither NaN nor infinity is below this
_MERGED = "PEFT's save_pretrained(path_initial_model_for_weight_conversion=...)"
_NEVER_NULL = ("bias", "lora_alpha", "lora_dropout", "r")


def parse_config(text: bytes | str, name: str, *, any_init: bool = False) -> Config:
    """Return the config in `text`, checked by check_config; messages call the file `name`."""
    try:
        value: object = parse_json(text if isinstance(text, str) else text.decode("utf-8"))
    except ValueError as error:
        raise LorakitError(f"{name} is not JSON ({error}); mend it or take a new copy") from None
    if not isinstance(value, dict):
        raise LorakitError(f"{name} is not a JSON object; give PEFT's adapter_config.json")
    return check_config(value, name, any_init=any_init)


def check_config(config: Mapping[str, object], name: str, *, any_init: bool = False) -> Config:
    """Return `config` without the keys that PEFT does not know.

    As in PEFT, unknown keys are dropped if they are unset or in TRAINING_ONLY. Any other could
    change what the adapter computes. Raises LorakitError naming the file and the key for such a
    key, for a key in REFUSED that is set, and for a value of the wrong type; and, but for
    `any_init`, for an initialisation that changed the base.
    """
    _check_kind(config, name)
    for key, value in config.items():
        if key in KEPT:
            _check_value(key, value, name)
        elif key in REFUSED and value:
            raise LorakitError(f"{name}: {key} is set, and {REFUSED[key]}; {PLAIN}")
        elif key not in TRAINING_ONLY and value:
            raise LorakitError(f"{name}: {quote(key)} is not known to lorakit; {PLAIN}")
    _check_meaning(config, name, any_init)
    known = {key: value for key, value in config.items() if key in {*KEPT, *REFUSED} - {*FORMER}}
    return {**known, **{key: {} for key in _PATTERNS if known.get(key, {}) is None}}


def _check_kind(config: Mapping[str, object], name: str) -> None:
    """Raise LorakitError for a config that is not of a LoRA in PEFT's format."""
    if "peft_type" not in config and ("fine_tune_type" in config or "lora_parameters" in config):
        raise LorakitError(f"{name} is an MLX adapter's; run lorakit convert on its folder")
    kind = config.get("peft_type")
    if kind is None:
        raise LorakitError(f"{name} has no peft_type; give PEFT's adapter_config.json")
    if kind != "LORA":
        raise LorakitError(f"{name}: peft_type is {quote(str(kind))}, not 'LORA'; {PLAIN}")


def _check_value(key: str, value: object, name: str) -> None:
    has_type, type_in_words = KEPT[key]
    if value is None and key not in _NEVER_NULL:
        return
    if not has_type(value):
        raise LorakitError(f"{name}: {key} is {_shown(value)}; it must be {type_in_words}")
    if not _all_finite(value):
        raise LorakitError(f"{name}: {key} holds a number that is not finite; mend it")


def _shown(value: object) -> str:
    """Return a value as JSON, shortened and escaped to be put in a message."""
    return quote(json.dumps(value))[1:-1]


def _all_finite(value: object) -> bool:
    if isinstance(value, dict):
        return all(map(_all_finite, value.values()))
    if isinstance(value, list):
        return all(map(_all_finite, value))
    return not isinstance(value, int | float) or abs(value) < _LARGEST


def _check_meaning(config: Config, name: str, any_init: bool) -> None:
    """Raise LorakitError for values of the right type that lorakit, or PEFT, cannot act on."""
    if config.get("bias", "none") != "none":
        raise LorakitError(f"{name}: bias is {quote(config['bias'])}, not 'none'; {PLAIN}")
    init = config.get("init_lora_weights")
    if isinstance(init, str) and init.lower() not in HARMLESS_INITS and not any_init:
        undone = init.lower().startswith(SUBTRACTED_INITS)
        advice = "lorakit convert --initial-adapter FOLDER" if undone else _MERGED
        raise LorakitError(
            f"{name}: init_lora_weights {quote(init)} changed the base weights; convert the "
            f"adapter by {advice}"
        )
    _check_targets(config, name)
    for key in _PATTERNS:
        patterns = list(config.get(key) or {})
        _check_count(patterns, f"{name}: {key}")
        for pattern in patterns:
            if not is_name(pattern):
                _check_regex(peft_regex(pattern), pattern, f"{name}: {key}")


def _check_targets(config: Config, name: str) -> None:
    targets, layers = config.get("target_modules"), config.get("layers_to_transform")
    pattern = config.get("layers_pattern")
    if isinstance(targets, str) and (layers is not None or pattern is not None):
        key = "layers_to_transform" if layers is not None else "layers_pattern"
        raise LorakitError(f"{name}: {key} needs target_modules to be a list; write the names out")
    if pattern and layers is None:
        raise LorakitError(f"{name}: layers_pattern needs layers_to_transform; set it or drop both")
    for key in ("target_modules", "exclude_modules"):
        if isinstance(config.get(key), str):
            _check_regex(config[key], config[key], f"{name}: {key}")
    regexes = layer_regexes(config)
    _check_count(list(regexes.values()), f"{name}: layers_pattern")
    for part, regex in regexes.items():
        _check_regex(regex, part, f"{name}: layers_pattern")


def _check_regex(regex: str, shown: str, where: str) -> None:
    try:
        compiled(regex)
    except UnboundedError as error:
        raise cannot_match(f"{where} holds {quote(shown)}", error) from None
    except (re.error, OverflowError, RecursionError, ValueError) as error:
        raise LorakitError(
            f"{where} holds {quote(shown)}, which is no regular expression ({error}); mend it"
        ) from None


def _check_count(expressions: list[str], where: str) -> None:
    try:
        check_patterns(expressions)
    except UnboundedError as error:
        raise cannot_match(f"{where} holds too much", error) from None


def cannot_match(what: str, error: UnboundedError) -> LorakitError:
    """Return the error for an expression that cannot be matched in bounded time."""
    return LorakitError(f"{what}, which lorakit cannot match: {error}; write the names out")


def rank_of(config: Config, module: str) -> int:
    """Return the rank of `module`: that of the first rank_pattern to match, else r."""
    return int(_by_pattern(config, "rank_pattern", module, config.get("r", DEFAULT_RANK)))


def alpha_of(config: Config, module: str) -> float:
    """Return the alpha of `module`: that of the first alpha_pattern to match, else lora_alpha."""
    default = config.get("lora_alpha", DEFAULT_ALPHA)
    return float(_by_pattern(config, "alpha_pattern", module, default))


def scale_of(config: Config, module: str) -> float:
    """Return s of ΔW = s·B·A for `module`: alpha/r, or alpha/√r under rslora."""
    rank = rank_of(config, module)
    return alpha_of(config, module) / (math.sqrt(rank) if config.get("use_rslora") else rank)


def _by_pattern(config: Config, key: str, module: str, default: float) -> float:
    pattern = pattern_of(config, key, module)
    return default if pattern is None else float(config[key][pattern])


def pattern_of(config: Config, key: str, module: str) -> str | None:
    """Return the pattern of `key` (rank_pattern or alpha_pattern) that applies to `module`."""
    patterns = tuple(config.get(key) or ())
    number, _ = table_of(patterns).first(module) if patterns else (None, 0)
    return None if number is None else patterns[number]


def layer_regexes(config: Config) -> dict[str, str]:
    """Return PEFT's regular expression for a layer's index, for each part of `layers_pattern`."""
    patterns = config.get("layers_pattern") or []
    parts = [patterns] if isinstance(patterns, str) else patterns
    return {part: f"(?:^|.*?\\.){part}\\.(?P<idx>\\d+)\\." for part in parts}


def config_text(config: Config) -> str:
    """Return the config as PEFT writes it, indented by two; equal configs give equal texts.

    Keys are sorted, and so are the lists that stand for sets (SETS). The patterns keep their order,
    since the first match applies; so does layers_pattern.
    """
    ordered = {key: _ordered(key, config[key]) for key in sorted(config)}
    return json.dumps(ordered, indent=2, ensure_ascii=True)


def _ordered(key: str, value: object) -> object:
    if key in SETS and isinstance(value, list | tuple | set | frozenset):
        return sorted(set(value))
    if isinstance(value, dict) and key not in _PATTERNS:
        return {inner: _ordered(inner, value[inner]) for inner in sorted(value)}
    return value
