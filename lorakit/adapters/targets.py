"""Which modules a PEFT config selects, and configs that select exactly the modules they should.

Selection is spread over four keys (SELECTION): names or a regular expression, layers, and what is
excluded. The configs of new, stripped and merged adapters are made here, with names as short as
they can be without selecting another module.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable, Mapping, Sequence

from lorakit.adapters.config import Config, compile_regex, layer_regexes, pattern_of
from lorakit.adapters.names import last_part, layer_of, natural_key

ALL_LINEAR = "all-linear"
SELECTION = ("exclude_modules", "layers_pattern", "layers_to_transform", "target_modules")
_CARRIED_OVER = ("auto_mapping", "revision", "task_type")  # by a merge whose adapters agree on it
_ANY_LAYER = r".*?\.[^.]*\.(?P<idx>\d+)\."  # PEFT's, for a config without layers_pattern


# — Reading —


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
        return targets.lower() == ALL_LINEAR or bool(compile_regex(targets).fullmatch(module))
    if module in targets:  # a whole name passes by layers_to_transform
        return True
    return _ends_in_part(module, targets) and _in_layers(config, module)


def _is_excluded(config: Config, module: str) -> bool:
    excluded = config.get("exclude_modules") or []
    if isinstance(excluded, str):
        return bool(compile_regex(excluded).fullmatch(module))
    return module in excluded or _ends_in_part(module, excluded)


def _ends_in_part(module: str, parts: Iterable[str]) -> bool:
    return module.endswith(tuple(f".{part}" for part in parts))


def _in_layers(config: Config, module: str) -> bool:
    layers = config.get("layers_to_transform")
    if layers is None or layers == []:  # PEFT: an empty list means all layers
        return True
    index = _peft_layer(config, module)
    return index is not None and index in (layers if isinstance(layers, list) else [layers])


def _peft_layer(config: Config, module: str) -> int | None:
    """Return the layer that PEFT takes `module` to be in, by the config's layers_pattern."""
    for regex in layer_regexes(config).values() or [_ANY_LAYER]:
        if match := compile_regex(regex).match(module):
            return int(match["idx"]) if match["idx"] else None
    return None


# — The config of a new adapter —


def peft_config(
    ranks: Mapping[str, int],
    *,
    base: str | None,
    dropout: float = 0.0,
    alpha: float | None = None,
    transposed: bool = False,
    there: Iterable[str] = (),
) -> Config:
    """Return the config under which PEFT builds exactly these modules, with these ranks.

    The scale is alpha/rank where an alpha is given, else 1. `there` are all projections of the
    base: where naming the modules by their last part selects no other, that short form is used.
    """
    modules = sorted(ranks, key=natural_key)
    occurring = list(ranks.values())
    usual = max(set(occurring), key=lambda rank: (occurring.count(rank), rank))
    unusual = {name: ranks[name] for name in modules if ranks[name] != usual}
    targets, layers = short_targets(modules, there)
    return {
        "alpha_pattern": dict(unusual) if alpha is None else {},
        "base_model_name_or_path": base,
        "bias": "none",
        "fan_in_fan_out": transposed,
        "inference_mode": True,
        "init_lora_weights": True,
        "layers_pattern": None,
        "layers_to_transform": layers,
        "lora_alpha": usual if alpha is None else alpha,
        "lora_dropout": dropout,
        "modules_to_save": None,
        "peft_type": "LORA",
        "r": usual,
        "rank_pattern": unusual,
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
    last_parts = sorted({last_part(name) for name in modules})
    selected = {name for name in there if last_part(name) in last_parts}
    if selected == set(modules):
        return last_parts, None
    layers = sorted({layer for name in modules if (layer := layer_of(name)) is not None})
    if {name for name in selected if layer_of(name) in layers} == set(modules):
        return last_parts, layers
    return list(modules), None


# — The config of an adapter that lost some of its modules —


def stripped_config(config: Config, modules: Collection[str], kept: Collection[str]) -> Config:
    """Return the config under which PEFT builds exactly the modules `kept`, each as it was.

    `modules` are all that the adapter has, and `config` is its own. A list of targets stays and
    `layers_to_transform` names the layers, as far as that selects the modules to keep and no other;
    else the targets are the modules' full names.
    """
    if len(kept) == len(modules):
        return dict(config)
    config = {**config, **_used_patterns(config, kept)}
    short = _short_form(config, kept)
    if short is not None and {name for name in modules if is_targeted(short, name)} == set(kept):
        return short
    return {
        **config,
        "target_modules": sorted(kept),
        "layers_to_transform": None,
        "layers_pattern": None,
        "exclude_modules": None,
    }


def _used_patterns(config: Config, kept: Collection[str]) -> dict[str, dict[str, float]]:
    """Return rank_pattern and alpha_pattern, where set, with the patterns that still count."""
    used_patterns = {}
    for key in ("rank_pattern", "alpha_pattern"):
        if config.get(key):
            used = {pattern_of(config, key, name) for name in kept}
            used_patterns[key] = {p: value for p, value in config[key].items() if p in used}
    return used_patterns


def _short_form(config: Config, kept: Collection[str]) -> Config | None:
    """Return the config with its list of targets and the kept layers, or None where that may err.

    It may for full names, which PEFT takes in any layer, and for layers that are not alike.
    """
    targets = config.get("target_modules")
    parts: dict[int, set[str]] = {}  # the rest of the name after the layer, by layer
    for name in kept:
        if (layer := layer_of(name)) is not None:
            parts.setdefault(layer, set()).add(name.partition(f".{layer}.")[2])
    alike = len({frozenset(inner) for inner in parts.values()}) == 1
    if (
        not isinstance(targets, list)
        or not alike
        or any(layer_of(part) in parts for part in targets)
    ):
        return None
    used = [part for part in targets if any(f".{name}".endswith(f".{part}") for name in kept)]
    return {**config, "target_modules": used, "layers_to_transform": sorted(parts)}


# — The config of a merged adapter —


def merged_config(
    configs: Sequence[Config], ranks: Mapping[str, int], *, base: str | None
) -> Config:
    """Return the config of modules of these ranks at scale 1 that selects what `configs` select.

    Names stay as short as they were where the configs select alike, or by names alone.
    """
    config = peft_config(
        ranks,
        base=base,
        transposed=any(config.get("fan_in_fan_out") for config in configs),
    )
    carried_over = {key: configs[0].get(key) for key in _CARRIED_OVER if _agree(configs, key)}
    return {**config, **carried_over, **_joint_selection(configs)}


def _joint_selection(configs: Sequence[Config]) -> Config:
    """Return the keys of SELECTION for all the configs' modules; none where it takes full names."""
    if all(_agree(configs, key) for key in SELECTION):
        return {key: configs[0].get(key) for key in SELECTION}
    targets = [config.get("target_modules") for config in configs]
    others = (config.get(key) for config in configs for key in SELECTION if key != "target_modules")
    if not any(others) and all(isinstance(names, list) for names in targets):
        return {"target_modules": sorted({name for names in targets for name in names or ()})}
    return {}


def _agree(configs: Sequence[Config], key: str) -> bool:
    """Return whether the key has one value in all configs, the order of lists left aside."""
    values = [config.get(key) for config in configs]
    texts = {json.dumps(sorted(v) if isinstance(v, list) else v, sort_keys=True) for v in values}
    return len(texts) == 1
