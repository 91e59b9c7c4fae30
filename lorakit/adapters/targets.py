"""Which modules a PEFT config selects, and how to write a config that selects exactly some modules.

Selection is spread over four keys (SELECTION): names or a regular expression, layers, and
exclusions. The configs of new, stripped and merged adapters are built here, with module names as
short as they can be without selecting another module.
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence

from lorakit.adapters.config import Config, cannot_match, layer_regexes, pattern_of
from lorakit.adapters.names import last_part, layer_of, natural_key
from lorakit.adapters.patterns import table_of
from lorakit.adapters.regexes import UnboundedError, match, matched

ALL_LINEAR = "all-linear"
SELECTION = ("exclude_modules", "layers_pattern", "layers_to_transform", "target_modules")
_CARRIED_OVER = ("auto_mapping", "revision", "task_type")  # by a merge, if its adapters agree
MOST_STEPS = 2_000_000  # of matching one config to all modules: some seconds
_ANY_LAYER = r".*?\.[^.]*\.(?P<idx>\d+)\."  # PEFT's, for a config without layers_pattern


# — Reading —


def is_targeted(config: Config, module: str) -> bool:
    """Return whether PEFT would give `module` a LoRA under this config.

    `all-linear` and null (the family's own modules) depend on the model; here they match any
    module. Which modules without tensors the config targets too cannot be known without the model:
    PEFT leaves them at their initialisation, which is harmless unless init_lora_weights is false
    and it is random.
    """
    return targeting(config)(module)


def targeting(config: Config) -> Callable[[str], bool]:
    """Return `is_targeted` for one config and many modules: lists of names become sets once."""
    targets = config.get("target_modules")
    is_excluded = _naming(config.get("exclude_modules") or [])
    depends = targets is None or (isinstance(targets, str) and targets.lower() == ALL_LINEAR)
    is_named = _naming(None if depends else targets)
    names = frozenset(targets) if isinstance(targets, list) else None

    def is_target(module: str) -> bool:
        if is_excluded(module) or not is_named(module):
            return False
        # a full name is matched whatever layers_to_transform says
        return names is None or module in names or _in_layers(config, module)

    return is_target


def _naming(value: str | Sequence[str] | None) -> Callable[[str], bool]:
    """Return the test of whether an expression, or a list of names, names a module; None: all."""
    if value is None:
        return lambda module: True
    if isinstance(value, str):
        return functools.partial(_matches_fully, value)
    names = frozenset(value)
    return lambda module: module in names or any(end in names for end in _ends(module))


def _matches_fully(regex: str, module: str) -> bool:
    return match(regex, module, full=True) is not None


def _ends(module: str) -> Iterator[str]:
    """Yield what follows each dot of a module's name."""
    return (module[dot.end() :] for dot in re.finditer(r"\.", module))


def _in_layers(config: Config, module: str) -> bool:
    """Return whether `module` is in a layer that layers_to_transform allows."""
    layers = config.get("layers_to_transform")
    if layers is None or layers == []:  # PEFT: an empty list means all layers
        return True
    index = _peft_layer(config, module)
    return index is not None and index in (layers if isinstance(layers, list) else [layers])


def _peft_layer(config: Config, module: str) -> int | None:
    """Return the layer that PEFT takes `module` to be in, by the config's layers_pattern."""
    for regex in layer_regexes(config).values() or [_ANY_LAYER]:
        if (place := match(regex, module)) is not None:
            return int(place.layer) if place.layer else None
    return None


def check_matching(config: Config, modules: Iterable[str], name: str) -> None:
    """Raise LorakitError where matching the config to the modules takes too long.

    All of its expressions are matched, once, so that what comes later only looks results up.
    """
    steps = 0
    keys = ("target_modules", "exclude_modules")
    expressions = [config[key] for key in keys if isinstance(config.get(key), str)]
    tables = [tuple(config.get(key) or ()) for key in ("rank_pattern", "alpha_pattern")]
    try:
        for module in modules:
            steps += sum(matched(regex, module, True)[1] for regex in expressions)
            steps += sum(matched(r, module, False)[1] for r in layer_regexes(config).values())
            steps += sum(table_of(patterns).first(module)[1] for patterns in tables if patterns)
            if steps > MOST_STEPS:
                raise UnboundedError(f"it takes more than {MOST_STEPS} steps")
    except UnboundedError as error:
        raise cannot_match(f"{name}: its config has regular expressions", error) from None


# — The config of a new adapter —


def peft_config(
    ranks: Mapping[str, int],
    *,
    base: str | None,
    dropout: float = 0.0,
    alpha: float | None = None,
    transposed: bool = False,
    projections: Iterable[str] = (),
) -> Config:
    """Return the config under which PEFT builds exactly these modules, with these ranks.

    The scale is alpha/rank if `alpha` is set, else 1. `projections` are all those of the base:
    modules are named by the last part of their names if that selects no other projection.
    """
    modules = sorted(ranks, key=natural_key)
    occurring = list(ranks.values())
    usual = max(set(occurring), key=lambda rank: (occurring.count(rank), rank))
    unusual = {name: ranks[name] for name in modules if ranks[name] != usual}
    targets, layers = short_targets(modules, projections)
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
    modules: Sequence[str], projections: Iterable[str]
) -> tuple[list[str], list[int] | None]:
    """Return PEFT's target_modules and layers_to_transform that select exactly `modules`.

    They are the last parts of the names (with the layers, unless all are meant) if these select no
    other of the base's `projections`; else the full names.
    """
    projections = list(projections)
    last_parts = sorted({last_part(name) for name in modules})
    selected = {name for name in projections if last_part(name) in last_parts}
    if selected == set(modules):
        return last_parts, None
    layers = sorted({layer for name in modules if (layer := layer_of(name)) is not None})
    if {name for name in selected if layer_of(name) in layers} == set(modules):
        return last_parts, layers
    return list(modules), None


# — The config of an adapter that lost some of its modules —


def stripped_config(config: Config, modules: Collection[str], remaining: Collection[str]) -> Config:
    """Return the config under which PEFT builds exactly the `remaining` modules, each as before.

    `modules` are all those of the adapter whose config is `config`. If a list of targets stays
    correct with `layers_to_transform` naming the layers, it stays; else the targets are the
    modules' full names.
    """
    if len(remaining) == len(modules):
        return dict(config)
    config = {**config, **_used_patterns(config, remaining)}
    short = _short_form(config, remaining)
    if short is not None:
        selected = set(filter(targeting(short), modules))
        if selected == set(remaining):
            return short
    return {
        **config,
        "target_modules": sorted(remaining),
        "layers_to_transform": None,
        "layers_pattern": None,
        "exclude_modules": None,
    }


def _used_patterns(config: Config, remaining: Collection[str]) -> dict[str, dict[str, float]]:
    """Return rank_pattern and alpha_pattern, if set, reduced to the patterns still in use."""
    used_patterns = {}
    for key in ("rank_pattern", "alpha_pattern"):
        if config.get(key):
            used = {pattern_of(config, key, name) for name in remaining}
            used_patterns[key] = {p: value for p, value in config[key].items() if p in used}
    return used_patterns


def _short_form(config: Config, remaining: Collection[str]) -> Config | None:
    """Return the config with its list of targets and the remaining layers, or None if unsafe.

    It is unsafe for full names, which PEFT matches in any layer, and for layers that differ.
    """
    targets = config.get("target_modules")
    parts: dict[int, set[str]] = {}  # the rest of the name after the layer, by layer
    for name in remaining:
        if (layer := layer_of(name)) is not None:
            parts.setdefault(layer, set()).add(name.partition(f".{layer}.")[2])
    alike = len({frozenset(inner) for inner in parts.values()}) == 1
    if (
        not isinstance(targets, list)
        or not alike
        or any(layer_of(part) in parts for part in targets)
    ):
        return None
    used = [part for part in targets if any(f".{name}".endswith(f".{part}") for name in remaining)]
    return {**config, "target_modules": used, "layers_to_transform": sorted(parts)}


# — The config of a merged adapter —


def merged_config(
    configs: Sequence[Config], ranks: Mapping[str, int], *, base: str | None
) -> Config:
    """Return the config, at scale 1, of modules of these ranks: all that `configs` select.

    Names stay as short as they were if the configs agree on SELECTION, or select by names alone.
    """
    config = peft_config(
        ranks,
        base=base,
        transposed=any(config.get("fan_in_fan_out") for config in configs),
    )
    carried_over = {key: configs[0].get(key) for key in _CARRIED_OVER if _agree(configs, key)}
    saved = {name for config in configs for name in config.get("modules_to_save") or ()}
    if saved:
        config = {**config, "modules_to_save": sorted(saved)}
    return {**config, **carried_over, **_joint_selection(configs)}


def _joint_selection(configs: Sequence[Config]) -> Config:
    """Return the keys of SELECTION for the modules of all configs; {} if full names are needed."""
    if all(_agree(configs, key) for key in SELECTION):
        return {key: configs[0].get(key) for key in SELECTION}
    targets = [config.get("target_modules") for config in configs]
    others = (config.get(key) for config in configs for key in SELECTION if key != "target_modules")
    if not any(others) and all(isinstance(names, list) for names in targets):
        return {"target_modules": sorted({name for names in targets for name in names or ()})}
    return {}


def _agree(configs: Sequence[Config], key: str) -> bool:
    """Return whether all configs have the same value of `key`, whatever the order of lists."""
    values = [config.get(key) for config in configs]
    texts = {json.dumps(sorted(v) if isinstance(v, list) else v, sort_keys=True) for v in values}
    return len(texts) == 1
