"""The keys of a PEFT `adapter_config.json`: which are kept, of what type, and which are refused.

The keys are those of peft.LoraConfig. A key is either kept (KEPT: lorakit follows it exactly, or it
acts on training only) or refused if it is set (REFUSED: it changes the forward pass in a way that A
and B alone do not capture). A key of a later PEFT is one line in one of the two; a test compares
them with the installed PEFT.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

PLAIN = "train or export it as plain LoRA"


def _is_bool(value: object) -> bool:
    return isinstance(value, bool)


def _is_text(value: object) -> bool:
    return isinstance(value, str)


def _is_object(value: object) -> bool:
    return isinstance(value, dict)


def _is_rank(value: object) -> bool:
    return type(value) is int and value > 0


def _is_number(value: object) -> bool:
    return type(value) in (int, float)


def _is_share(value: object) -> bool:
    return type(value) in (int, float) and 0 <= value <= 1  # type: ignore[operator]


def _is_names(value: object) -> bool:
    return _is_text(value) or (isinstance(value, list) and all(map(_is_text, value)))


def _is_list_of_names(value: object) -> bool:
    return isinstance(value, list) and all(map(_is_text, value))


def _is_layers(value: object) -> bool:
    layers = value if isinstance(value, list) else [value]
    return all(type(x) is int and x >= 0 for x in layers)


def _is_ranks(value: object) -> bool:
    return isinstance(value, dict) and all(map(_is_rank, value.values()))


def _is_numbers(value: object) -> bool:
    return isinstance(value, dict) and all(map(_is_number, value.values()))


def _is_init(value: object) -> bool:
    return isinstance(value, bool | str)


def _is_anything(value: object) -> bool:
    return True


Check = tuple[Callable[[object], bool], str]  # whether a value has the type, and its name
_OBJECT: Check = (_is_object, "an object")
_TEXT: Check = (_is_text, "a text")
_BOOL: Check = (_is_bool, "true or false")
_NAMES: Check = (_is_names, "a list of names or a regular expression")
_ANY: Check = (_is_anything, "anything")

KEPT: Mapping[str, Check] = {
    "alpha_pattern": (_is_numbers, "an object of numbers"),
    "auto_mapping": _OBJECT,
    "base_model_name_or_path": _TEXT,
    "bias": _TEXT,
    "corda_config": _OBJECT,
    "ensure_weight_tying": _BOOL,
    "eva_config": _OBJECT,
    "exclude_modules": _NAMES,
    "fan_in_fan_out": _BOOL,
    "inference_mode": _BOOL,
    "init_lora_weights": (_is_init, "true, false or the name of an initialisation"),
    "layers_pattern": _NAMES,
    "layers_to_transform": (_is_layers, "a layer's number or a list of them"),
    "loftq_config": _OBJECT,
    "lora_alpha": (_is_number, "a number"),
    "lora_dropout": (_is_share, "a number from 0 to 1"),
    "lora_ga_config": _OBJECT,
    "megatron_core": _TEXT,
    "modules_to_save": (_is_list_of_names, "a list of names"),
    "peft_type": _TEXT,
    "peft_version": _TEXT,
    "qalora_group_size": _ANY,  # PEFT reads it only with use_qalora, which is refused
    "r": (_is_rank, "a positive integer"),
    "rank_pattern": (_is_ranks, "an object of positive integers"),
    "revision": _TEXT,
    "target_modules": _NAMES,
    "task_type": _TEXT,
    "use_dora": _BOOL,
    "use_rslora": _BOOL,
}

REFUSED: Mapping[str, str] = {
    "alora_invocation_tokens": "activated LoRA acts on some tokens only",
    "arrow_config": "Arrow routes between adapters",
    "enable_lora": "the merged layers of PEFT 0.2 hold several projections in one",
    "kasa_config": "KaSA changes the base weights",
    "layer_replication": "it builds a deeper base model",
    "lora_bias": "the adapter holds biases",
    "megatron_config": "Megatron's layers are split over devices",
    "monteclora_config": "MonteCLoRA samples its weights",
    "target_parameters": "LoRA on parameters that are no modules has another layout",
    "trainable_token_indices": "the adapter holds new embeddings",
    "use_bdlora": "BD-LoRA's factors are block-diagonal",
    "use_qalora": "QALoRA pools the inputs",
    "velora_config": "VeLoRA holds projections besides A and B",
}

# Set by trainers or old versions and not part of LoraConfig; PEFT drops them with a warning.
TRAINING_ONLY = ("lora_plus_lr_ratio", "loraplus_lr_ratio", "merge_weights", "runtime_config")

# In REFUSED but no longer part of LoraConfig, so not written when unset.
FORMER = ("enable_lora",)

# Initialisations that leave the base weights alone; pissa, olora, corda, loftq and lora_ga do not.
HARMLESS_INITS = ("eva", "gaussian", "mica", "orthogonal")

# Those that take their first B·A out of the base weights, as what they begin with: `convert` can
# undo them (initial.py). LoftQ quantises the base besides.
SUBTRACTED_INITS = ("pissa", "olora", "corda", "lora_ga")
