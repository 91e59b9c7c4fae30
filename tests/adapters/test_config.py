"""PEFT's configs: peft's own matching, scales and initialisations are the oracles."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from peft.tuners.tuners_utils import check_target_module_exists
from peft.utils.other import get_pattern_key

from lorakit.adapters.config import (
    alpha_of,
    check_config,
    config_text,
    parse_config,
    rank_of,
    scale_of,
)
from lorakit.adapters.config_keys import FORMER, HARMLESS_INITS, KEPT, REFUSED
from lorakit.adapters.targets import is_targeted
from lorakit.errors import LorakitError

MODULES = [
    "model.layers.0.self_attn.q_proj",
    "model.layers.1.self_attn.q_proj",
    "model.layers.1.self_attn.v_proj",
    "model.layers.11.self_attn.q_proj",
    "model.layers.1.mlp.experts.0.w1",
    "model.layers.0.mlp.experts.1.w1",
    "model.layers.1.mlp.down_proj",
    "transformer.h.1.attn.c_attn",
    "layers.1.q_proj",
    "encoder.blocks.1.q_proj",
    "q_proj",
    "my_q_proj",
    "lm_head",
]

PATTERNS: dict[str, dict[str, int]] = {
    "none": {},
    "last part": {"q_proj": 4},
    "first that fits": {"layers.1.self_attn.q_proj": 4, "q_proj": 2},
    "order says which": {"q_proj": 2, "layers.1.self_attn.q_proj": 4},
    "anchored": {"^model.layers.1.self_attn.q_proj": 4},
    "full name": {"model.layers.1.self_attn.q_proj": 4},
    "regular expression": {r"layers\.(0|11)\..*": 4},
    "choice without brackets": {"q_proj|v_proj": 4},
    "part of a name": {"proj": 4},
}


@pytest.mark.parametrize("pattern", PATTERNS.values(), ids=PATTERNS.keys())
@pytest.mark.parametrize("module", MODULES)
def test_ranks_and_alphas_are_found_as_peft_finds_them(
    pattern: dict[str, int], module: str
) -> None:
    config = {"r": 8, "lora_alpha": 32, "rank_pattern": pattern, "alpha_pattern": pattern}
    key = get_pattern_key(list(pattern), module)
    assert rank_of(config, module) == pattern.get(key, 8)
    assert alpha_of(config, module) == pattern.get(key, 32)


def test_the_scale_is_that_of_a_peft_layer() -> None:
    for fields in ({}, {"use_rslora": True}, {"rank_pattern": {"0": 3}, "alpha_pattern": {"0": 5}}):
        config: dict[str, Any] = {"r": 7, "lora_alpha": 3, "target_modules": ["0", "1"], **fields}
        model = peft.LoraModel(_net(), peft.LoraConfig(**config), "default")
        for name in ("0", "1"):
            layer: Any = model.model.get_submodule(name)
            assert scale_of(config, name) == layer.scaling["default"]


def test_the_defaults_are_pefts() -> None:
    config = peft.LoraConfig()
    assert rank_of({}, "x") == config.r
    assert scale_of({}, "x") == config.lora_alpha / config.r


TARGETS: dict[str, dict[str, Any]] = {
    "last part": {"target_modules": ["q_proj"]},
    "several": {"target_modules": ["q_proj", "w1", "c_attn"]},
    "two parts": {"target_modules": ["self_attn.q_proj"]},
    "full name": {"target_modules": ["model.layers.1.self_attn.q_proj"]},
    "none": {"target_modules": []},
    "regular expression": {"target_modules": r".*\.1\..*_proj"},
    "one layer": {"target_modules": ["q_proj", "w1"], "layers_to_transform": 1},
    "layer 0": {"target_modules": ["q_proj", "w1"], "layers_to_transform": 0},
    "layers": {"target_modules": ["q_proj", "w1"], "layers_to_transform": [1, 11]},
    "no layers are all": {"target_modules": ["q_proj"], "layers_to_transform": []},
    "full name in no layer": {
        "target_modules": ["model.layers.1.self_attn.q_proj"],
        "layers_to_transform": [0],
    },
    "layers pattern": {
        "target_modules": ["q_proj"],
        "layers_to_transform": [1],
        "layers_pattern": "layers",
    },
    "layers patterns": {
        "target_modules": ["q_proj"],
        "layers_to_transform": [1],
        "layers_pattern": ["h", "blocks"],
    },
    "layers pattern with a choice": {
        "target_modules": ["q_proj"],
        "layers_to_transform": [1],
        "layers_pattern": "model|layers",
    },
    "no layers pattern": {
        "target_modules": ["q_proj"],
        "layers_to_transform": [1],
        "layers_pattern": [],
    },
    "excluded": {"target_modules": ["q_proj", "v_proj"], "exclude_modules": ["v_proj"]},
    "excluded full": {
        "target_modules": ["q_proj"],
        "exclude_modules": ["model.layers.1.self_attn.q_proj"],
    },
    "excluded regular expression": {
        "target_modules": ["q_proj"],
        "exclude_modules": r"model\.layers\.1\..*",
    },
    "nothing excluded": {"target_modules": ["q_proj"], "exclude_modules": []},
}


@pytest.mark.parametrize("config", TARGETS.values(), ids=TARGETS.keys())
@pytest.mark.parametrize("module", MODULES)
def test_modules_are_targeted_as_peft_targets_them(config: dict[str, Any], module: str) -> None:
    check_config({"peft_type": "LORA", **config}, "x")
    theirs = check_target_module_exists(peft.LoraConfig(**config), module)
    assert is_targeted(config, module) == bool(theirs)


@pytest.mark.parametrize("targets", [None, "all-linear", "ALL-LINEAR"])
def test_targets_that_depend_on_the_model_take_any_module(targets: str | None) -> None:
    assert all(is_targeted({"target_modules": targets}, module) for module in MODULES)


def test_every_field_of_pefts_config_is_either_kept_or_refused() -> None:
    fields = {field.name for field in dataclasses.fields(peft.LoraConfig)} - {"runtime_config"}
    assert fields <= {*KEPT, *REFUSED}
    assert {*KEPT, *REFUSED} - {*FORMER} - fields == set()
    assert not {*KEPT} & {*REFUSED}


def test_pefts_own_config_is_kept_as_it_is() -> None:
    config = _as_json(peft.LoraConfig(target_modules=["a"], task_type="CAUSAL_LM"))
    assert check_config(config, "x") == config


REFUSALS: dict[str, tuple[dict[str, Any], str]] = {
    **{f"{key} is set": ({key: [1]}, key) for key in REFUSED},
    **{
        f"init {name}": ({"init_lora_weights": name}, f"init_lora_weights '{name}' changed")
        for name in ("pissa", "pissa_niter_4", "olora", "corda", "loftq", "lora_ga", "new_init")
    },
    "bias all": ({"bias": "all"}, "bias is 'all'"),
    "bias null": ({"bias": None}, "bias is null"),
    "IA3": ({"peft_type": "IA3"}, "peft_type is 'IA3'"),
    "peft_type a list": ({"peft_type": ["LORA"]}, "peft_type"),
    "no peft_type": ({"peft_type": None}, "no peft_type"),
    "unknown key": ({"use_new_lora": True}, "'use_new_lora' is not known"),
    "r zero": ({"r": 0}, "r is 0; it must be a positive integer"),
    "r negative": ({"r": -1}, "r is -1"),
    "r a boolean": ({"r": True}, "r is true"),
    "r a float": ({"r": 8.0}, "r is 8.0"),
    "r null": ({"r": None}, "r is null"),
    "alpha a text": ({"lora_alpha": "16"}, "lora_alpha is .16.; it must be a number"),
    "alpha null": ({"lora_alpha": None}, "lora_alpha is null"),
    "alpha NaN": ({"lora_alpha": math.nan}, "lora_alpha holds a number that is not finite"),
    "alpha infinite": ({"lora_alpha": math.inf}, "lora_alpha holds a number"),
    "alpha too large": ({"lora_alpha": 10**400}, "lora_alpha holds a number"),
    "dropout too large": ({"lora_dropout": 2}, "lora_dropout is 2"),
    "targets a number": ({"target_modules": 3}, "target_modules is 3; it must be a list"),
    "targets zero": ({"target_modules": 0}, "target_modules is 0"),
    "targets of numbers": ({"target_modules": [3]}, "target_modules is .3."),
    "targets no regex": (
        {"target_modules": "(q"},
        "target_modules holds '.q', which is no regular",
    ),
    "excluded no regex": ({"exclude_modules": "*"}, "exclude_modules holds"),
    "rank pattern a list": ({"rank_pattern": []}, "rank_pattern is"),
    "rank pattern of texts": ({"rank_pattern": {"q": "8"}}, "rank_pattern is"),
    "rank pattern of zero": ({"rank_pattern": {"q": 0}}, "rank_pattern is"),
    "rank pattern no regex": ({"rank_pattern": {"q[": 8}}, "rank_pattern holds 'q.', which is no"),
    "rank pattern too large": ({"rank_pattern": {"a{99999999999}": 8}}, "rank_pattern holds"),
    "alpha pattern NaN": ({"alpha_pattern": {"q": math.nan}}, "alpha_pattern holds a number"),
    "alpha pattern no regex": ({"alpha_pattern": {"*": 8}}, "alpha_pattern holds"),
    "rslora a number": ({"use_rslora": 1}, "use_rslora is 1; it must be true or false"),
    "layers a text": ({"layers_to_transform": "1"}, "layers_to_transform is"),
    "layers negative": ({"layers_to_transform": [-1]}, "layers_to_transform is"),
    "layers of booleans": ({"layers_to_transform": [True]}, "layers_to_transform is"),
    "layers with a regex": (
        {"target_modules": "q", "layers_to_transform": [1]},
        "layers_to_transform needs target_modules to be a list",
    ),
    "pattern without layers": ({"layers_pattern": "h"}, "layers_pattern needs"),
    "pattern no regex": (
        {"layers_pattern": "(", "layers_to_transform": [1]},
        "layers_pattern holds",
    ),
    "base a number": ({"base_model_name_or_path": 3}, "base_model_name_or_path is 3"),
    "init a number": ({"init_lora_weights": 3}, "init_lora_weights is 3"),
}


@pytest.mark.parametrize(("fields", "message"), REFUSALS.values(), ids=REFUSALS.keys())
def test_what_cannot_be_kept_is_refused_naming_key_and_file(
    fields: dict[str, Any], message: str
) -> None:
    config = {"peft_type": "LORA", "r": 8, "lora_alpha": 16, **fields}
    with pytest.raises(LorakitError, match=message) as caught:
        parse_config(json.dumps(config), "dir/adapter_config.json")
    assert str(caught.value).startswith("dir/adapter_config.json")
    assert "; " in str(caught.value)
    assert str(caught.value).isprintable()


NOT_CONFIGS = {
    "not JSON": (b"{", "is not JSON"),
    "empty": (b"", "is not JSON"),
    "byte order mark": (b"\xef\xbb\xbf{}", "BOM"),
    "not UTF-8": (b'{"a": "\xff"}', "is not JSON"),
    "key twice": (b'{"r": 8, "r": 4}', "'r' stands in it twice"),
    "nested too deeply": (b"[" * 100_000, "nested too deeply"),
    "a list": (b"[]", "is not a JSON object"),
    "null": (b"null", "is not a JSON object"),
    "MLX": (b'{"fine_tune_type": "lora", "lora_parameters": {}}', "MLX"),
    "half a surrogate pair": (b'{"peft_type": "LORA", "r": 8, "revision": "\\ud800"}', "not JSON"),
}


@pytest.mark.parametrize(("text", "message"), NOT_CONFIGS.values(), ids=NOT_CONFIGS.keys())
def test_what_is_no_config_is_refused_in_one_line(text: bytes, message: str) -> None:
    with pytest.raises(LorakitError, match=message) as caught:
        parse_config(text, "adapter_config.json")
    assert str(caught.value).isprintable()


HARMLESS: dict[str, dict[str, Any]] = {
    **{key: {key: None} for key in REFUSED},
    **{f"init {name}": {"init_lora_weights": name} for name in HARMLESS_INITS},
    "init true": {"init_lora_weights": True},
    "init false": {"init_lora_weights": False},
    "learning rates": {"lora_plus_lr_ratio": 8},
    "unknown but unset": {"use_new_lora": False, "new_config": None, "new_list": []},
    "no patterns": {"rank_pattern": None, "alpha_pattern": None},
    "runtime": {"runtime_config": {"ephemeral_gpu_offload": False}},
    "no biases": {"lora_bias": False},
    "eva": {"init_lora_weights": "eva", "eva_config": {"rho": 2.0}},
}


@pytest.mark.parametrize("fields", HARMLESS.values(), ids=HARMLESS.keys())
def test_what_only_training_reads_is_let_through(fields: dict[str, Any]) -> None:
    config = check_config({"peft_type": "LORA", "r": 8, "lora_alpha": 16, **fields}, "x")
    assert scale_of(config, "q_proj") == 2
    assert set(config) <= {*KEPT, *REFUSED}


@pytest.mark.parametrize("name", [True, "gaussian", "orthogonal", "mica"])
def test_the_inits_let_through_change_nothing_at_first(name: bool | str) -> None:
    before, after = _initialised(name)
    assert torch.equal(before.base, after.base)
    assert torch.allclose(before.output, after.output, atol=1e-5)


@pytest.mark.parametrize("name", ["pissa", "olora"])
def test_the_inits_refused_do_change_the_base(name: str) -> None:
    before, after = _initialised(name)
    assert not torch.allclose(before.base, after.base)


def test_equal_configs_are_equal_texts() -> None:
    one = {"target_modules": ["b", "a"], "layers_to_transform": [10, 9], "r": 8}
    two = {"r": 8, "layers_to_transform": [9, 10], "target_modules": {"a", "b"}}
    assert config_text(one) == config_text(two)
    assert json.loads(config_text(one))["layers_to_transform"] == [9, 10]
    assert list(json.loads(config_text(one))) == ["layers_to_transform", "r", "target_modules"]


def test_the_order_of_patterns_is_kept_since_the_first_that_fits_counts() -> None:
    config = {
        "rank_pattern": {"q_proj": 2, "layers.1.self_attn.q_proj": 4},
        "layers_pattern": ["h", "blocks"],
    }
    again = json.loads(config_text(config))
    assert list(again["rank_pattern"]) == list(config["rank_pattern"])
    assert again["layers_pattern"] == config["layers_pattern"]


def test_the_text_is_what_peft_writes(tmp_path: Path) -> None:
    config = peft.LoraConfig(target_modules=["a"], rank_pattern={"a": 4}, revision="é")
    config.save_pretrained(str(tmp_path))
    text = (tmp_path / "adapter_config.json").read_text()
    assert config_text(json.loads(text)) == text


def test_what_is_written_is_to_peft_what_was_read(tmp_path: Path) -> None:
    config = peft.LoraConfig(
        r=4,
        lora_alpha=3,
        target_modules=["q_proj", "v_proj", "a"],
        exclude_modules=["z", "b"],
        layers_to_transform=[3, 1],
        layers_pattern=["h", "b"],
        rank_pattern={"z": 1, "b": 2},
        task_type="CAUSAL_LM",
    )
    (tmp_path / "adapter_config.json").write_text(config_text(_as_json(config)))
    again = peft.LoraConfig.from_pretrained(str(tmp_path))
    assert _as_json(again) == {**_as_json(config), "layers_to_transform": [1, 3]}


@dataclasses.dataclass(frozen=True)
class _State:
    base: torch.Tensor
    output: torch.Tensor


def _net() -> torch.nn.Sequential:
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.Linear(8, 8))


def _initialised(name: bool | str) -> tuple[_State, _State]:
    net, inputs = _net(), torch.ones(1, 8)
    base: Any = net[0].weight
    before = _State(base.detach().clone(), net(inputs).detach())
    config = peft.LoraConfig(r=4, target_modules=["0"], init_lora_weights=name)  # type: ignore[arg-type]
    model = peft.LoraModel(net, config, "default")
    layer: Any = model.model.get_submodule("0")
    return before, _State(layer.base_layer.weight.detach(), model(inputs).detach())


def _as_json(config: peft.LoraConfig) -> Mapping[str, Any]:
    fields = config.to_dict()  # type: ignore[no-untyped-call]
    as_lists = {k: sorted(v) if isinstance(v, set) else v for k, v in fields.items()}
    loaded: Mapping[str, Any] = json.loads(json.dumps(as_lists))
    return loaded
