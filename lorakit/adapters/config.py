"""What a PEFT `adapter_config.json` means: rank and scale of a module, which modules it targets.

Which keys there may be is in config_keys.py; here is what they say of a module, as PEFT reads them,
and how a config is written. It imports no PEFT; the tests compare the two.
"""

from __future__ import annotations

import functools
import json
import math
import re
import warnings
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from lorakit.adapters.config_keys import FORMER, HARMLESS_INITS, KEPT, PLAIN, REFUSED, TRAINING_ONLY
from lorakit.adapters.foreign import quote
from lorakit.adapters.names import layer_of, natural_key
from lorakit.adapters.tensors import parse_json
from lorakit.errors import LorakitError

Config = Mapping[str, Any]

DEFAULT_RANK = 8  # PEFT's, for a config that leaves r or lora_alpha out
DEFAULT_ALPHA = 8
ALL_LINEAR = "all-linear"
SETS = ("exclude_modules", "layers_to_transform", "target_modules")  # lists without order


def parse_config(text: bytes | str, name: str) -> dict[str, Any]:
    """Return the config in `text`, checked by check_config; `name` is the file for messages."""
    try:
        value = parse_json(text if isinstance(text, str) else text.decode("utf-8"))
    except ValueError as error:
        raise LorakitError(f"{name} is not JSON ({error}); mend it or take a new copy") from None
    if not isinstance(value, dict):
        raise LorakitError(f"{name} is not a JSON object; give PEFT's adapter_config.json")
    return check_config(value, name)


def check_config(config: Config, name: str) -> dict[str, Any]:
    """Return `config` without the keys PEFT does not know; LorakitError names key and file.

    Of those, the ones that are unset or in TRAINING_ONLY go, as PEFT drops them too; any other
    could change what the adapter computes, and is refused.
    """
    _check_kind(config, name)
    for key, value in config.items():
        if key in KEPT:
            _check_value(key, value, name)
        elif key in REFUSED and value:
            raise LorakitError(f"{name}: {key} is set, and {REFUSED[key]}; {PLAIN}")
        elif key not in TRAINING_ONLY and value:
            raise LorakitError(f"{name}: {quote(key)} is not known to lorakit; {PLAIN}")
    _check_meaning(config, name)
    known = {key: value for key, value in config.items() if key in {*KEPT, *REFUSED} - {*FORMER}}
    return {**known, **{key: {} for key in _PATTERNS if known.get(key, {}) is None}}


_PATTERNS = ("alpha_pattern", "rank_pattern")
_LARGEST = 1e38  # of float32, in which the numbers are used; neither NaN nor infinity is below
_NEVER_NULL = ("bias", "lora_alpha", "lora_dropout", "r")


def _check_kind(config: Config, name: str) -> None:
    if "peft_type" not in config and ("fine_tune_type" in config or "lora_parameters" in config):
        raise LorakitError(f"{name} is an MLX adapter's; export the adapter to PEFT's format")
    kind = config.get("peft_type")
    if kind is None:
        raise LorakitError(f"{name} has no peft_type; give PEFT's adapter_config.json")
    if kind != "LORA":
        raise LorakitError(f"{name}: peft_type is {quote(str(kind))}, not 'LORA'; {PLAIN}")


def _check_value(key: str, value: object, name: str) -> None:
    check, wanted = KEPT[key]
    if value is None and key not in _NEVER_NULL:
        return
    if not check(value):
        raise LorakitError(f"{name}: {key} is {_shown(value)}; it must be {wanted}")
    if not _all_finite(value):
        raise LorakitError(f"{name}: {key} holds a number that is not finite; mend it")


def _shown(value: object) -> str:
    return quote(json.dumps(value))[1:-1]


def _all_finite(value: object) -> bool:
    if isinstance(value, dict):
        return all(map(_all_finite, value.values()))
    if isinstance(value, list):
        return all(map(_all_finite, value))
    return not isinstance(value, int | float) or abs(value) < _LARGEST


def _check_meaning(config: Config, name: str) -> None:
    if config.get("bias", "none") != "none":
        raise LorakitError(f"{name}: bias is {quote(config['bias'])}, not 'none'; {PLAIN}")
    init = config.get("init_lora_weights")
    if isinstance(init, str) and init.lower() not in HARMLESS_INITS:
        raise LorakitError(
            f"{name}: init_lora_weights {quote(init)} changed the base weights; convert the "
            "adapter by PEFT's save_pretrained(path_initial_model_for_weight_conversion=...)"
        )
    _check_targets(config, name)
    for key in _PATTERNS:
        for pattern in config.get(key) or {}:
            _check_regex(f"(.*\\.)?({pattern})$", pattern, f"{name}: {key}")


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
    for part in _layer_patterns(config):
        _check_regex(f"(?:^|.*?\\.){part}\\.(?P<idx>\\d+)\\.", part, f"{name}: layers_pattern")


def _check_regex(regex: str, shown: str, where: str) -> None:
    try:
        _compile(regex)
    except (re.error, OverflowError, RecursionError) as error:
        raise LorakitError(
            f"{where} holds {quote(shown)}, which is no regular expression ({error}); mend it"
        ) from None


@functools.cache
def _compile(regex: str) -> re.Pattern[str]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        return re.compile(regex)


def rank_of(config: Config, module: str) -> int:
    """Return the rank the config gives `module`: the first rank_pattern that fits, else r."""
    return int(_by_pattern(config, "rank_pattern", module, config.get("r", DEFAULT_RANK)))


def alpha_of(config: Config, module: str) -> float:
    """Return the alpha of `module`: the first alpha_pattern that fits, else lora_alpha."""
    default = config.get("lora_alpha", DEFAULT_ALPHA)
    return float(_by_pattern(config, "alpha_pattern", module, default))


def scale_of(config: Config, module: str) -> float:
    """Return s of ΔW = s·B·A for `module`: alpha/r, or alpha/√r under rslora."""
    rank = rank_of(config, module)
    return alpha_of(config, module) / (math.sqrt(rank) if config.get("use_rslora") else rank)


def _by_pattern(config: Config, key: str, module: str, default: Any) -> Any:
    pattern = pattern_of(config, key, module)
    return default if pattern is None else config[key][pattern]


def pattern_of(config: Config, key: str, module: str) -> str | None:
    """Return the pattern of `rank_pattern` or `alpha_pattern` (`key`) that counts for `module`."""
    patterns: Mapping[str, Any] = config.get(key) or {}
    fits = (part for part in patterns if _compile(f"(.*\\.)?({part})$").match(module))
    return next(fits, None)


def is_targeted(config: Config, module: str) -> bool:
    """Return whether PEFT would give `module` a LoRA under this config.

    `all-linear` and null (the family's own modules) depend on the model; here they take any module.
    Which targeted modules a model has cannot be known without it: PEFT leaves one without tensors
    at its initialisation, harmless unless init_lora_weights is false, where it would be random.
    """
    if _is_excluded(config, module):
        return False
    targets = config.get("target_modules")
    if targets is None:
        return True
    if isinstance(targets, str):
        return targets.lower() == ALL_LINEAR or bool(_compile(targets).fullmatch(module))
    if module in targets:  # a whole name passes by layers_to_transform
        return True
    return module.endswith(tuple(f".{x}" for x in targets)) and _in_layers(config, module)


def _is_excluded(config: Config, module: str) -> bool:
    excluded = config.get("exclude_modules") or []
    if isinstance(excluded, str):
        return bool(_compile(excluded).fullmatch(module))
    return module in excluded or module.endswith(tuple(f".{x}" for x in excluded))


def _in_layers(config: Config, module: str) -> bool:
    layers = config.get("layers_to_transform")
    if layers is None or layers == []:  # PEFT: an empty list means all layers
        return True
    index = _peft_layer(config, module)
    return index is not None and index in (layers if isinstance(layers, list) else [layers])


def _peft_layer(config: Config, module: str) -> int | None:
    parts = _layer_patterns(config)
    regexes = [f"(?:^|.*?\\.){part}\\.(?P<idx>\\d+)\\." for part in parts]
    for regex in regexes or [r".*?\.[^.]*\.(?P<idx>\d+)\."]:
        if match := _compile(regex).match(module):
            return int(match["idx"]) if match["idx"] else None
    return None


def _layer_patterns(config: Config) -> list[str]:
    patterns = config.get("layers_pattern") or []
    return [patterns] if isinstance(patterns, str) else list(patterns)


def config_text(config: Config) -> str:
    """Return the config as PEFT writes it, indented by two, and equal ones as equal texts.

    Keys are sorted, and so are the lists that are sets (SETS). The patterns keep their order, since
    the first that fits a module counts; so does layers_pattern.
    """
    ordered = {key: _ordered(key, config[key]) for key in sorted(config)}
    return json.dumps(ordered, indent=2, ensure_ascii=True)


def _ordered(key: str, value: Any) -> Any:
    if key in SETS and isinstance(value, list | tuple | set | frozenset):
        return sorted(set(value))
    if isinstance(value, dict) and key not in _PATTERNS:
        return {inner: _ordered(inner, value[inner]) for inner in sorted(value)}
    return value


def peft_config(
    ranks: Mapping[str, int],
    *,
    base: str | None,
    dropout: float = 0.0,
    alpha: float | None = None,
    transposed: bool = False,
    there: Iterable[str] = (),
) -> dict[str, Any]:
    """Return the config under which PEFT builds exactly these modules, with these ranks.

    The scale is alpha/rank where one alpha is given, else 1. `there` are all projections of the
    base: where naming the modules by their last part selects no other, that short form is used.
    """
    modules = sorted(ranks, key=natural_key)
    most = max(set(ranks.values()), key=lambda rank: (list(ranks.values()).count(rank), rank))
    other = {name: ranks[name] for name in modules if ranks[name] != most}
    targets, layers = short_targets(modules, there)
    return {
        "alpha_pattern": dict(other) if alpha is None else {},
        "base_model_name_or_path": base,
        "bias": "none",
        "fan_in_fan_out": transposed,
        "inference_mode": True,
        "init_lora_weights": True,
        "layers_pattern": None,
        "layers_to_transform": layers,
        "lora_alpha": most if alpha is None else alpha,
        "lora_dropout": dropout,
        "modules_to_save": None,
        "peft_type": "LORA",
        "r": most,
        "rank_pattern": other,
        "revision": None,
        "target_modules": targets,
        "task_type": "CAUSAL_LM",
        "use_rslora": False,
    }


def short_targets(
    modules: Sequence[str], there: Iterable[str]
) -> tuple[list[str], list[int] | None]:
    """Return PEFT's target_modules and layers_to_transform that select exactly `modules`.

    Last parts of names (and the layers, where not all of them are meant) if they select no other
    projection of `there`; else the full names.
    """
    there = list(there)
    lasts = sorted({name.rsplit(".", 1)[-1] for name in modules})
    named = {name for name in there if name.rsplit(".", 1)[-1] in lasts}
    if named == set(modules):
        return lasts, None
    layers = sorted({layer for name in modules if (layer := layer_of(name)) is not None})
    if {name for name in named if layer_of(name) in layers} == set(modules):
        return lasts, layers
    return list(modules), None
