"""Adapters: PEFT's own loading, logits and get_delta_weight are the oracles."""

from __future__ import annotations

import copy
import io
import json
import os
import re
import signal
import subprocess
import sys
import textwrap
import threading
import warnings
from collections.abc import Callable, Iterator, Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import safetensors.torch
import torch
import transformers

from lorakit.adapter import Adapter, load_adapter, lora_name, save_adapter
from lorakit.errors import LorakitError
from lorakit.tensorfile import Tensor, read_tensors, write_tensors

ROOT = Path(__file__).parent.parent
FOUND = ROOT.parent / "shared" / "adapters"
CONFIGS = sorted((FOUND / "configs").glob("*.json"))
needs_found = pytest.mark.skipif(not FOUND.is_dir(), reason="the adapters found are not here")

torch.set_num_threads(1)

SIZES = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "vocab_size": 50}
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


def with_lora(base: Any, config: Mapping[str, Any]) -> Any:
    """Return PEFT's own adapter on `base`, its B random."""
    model = peft.get_peft_model(base, peft.LoraConfig(**config)).eval()
    torch.manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = torch.randn_like(parameter)
    return model


def deltas(model: Any) -> dict[str, torch.Tensor]:
    """Return PEFT's ΔW (d_out, d_in) by module."""
    layers = {
        name.removeprefix("base_model.model."): layer
        for name, layer in model.named_modules()
        if hasattr(layer, "get_delta_weight")
    }
    return {
        name: layer.get_delta_weight("default").T
        if layer.fan_in_fan_out
        else layer.get_delta_weight("default")
        for name, layer in layers.items()
    }


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return torch.as_tensor(model(TOKENS).logits)


def check_same_deltas(adapter: Adapter, model: Any) -> None:
    theirs = deltas(model)
    ours = {module.name: module for module in adapter.modules()}
    assert set(ours) == set(theirs)
    for name, module in ours.items():
        expected = theirs[name].detach().double().numpy()
        assert module.shape == expected.shape
        assert np.allclose(module.delta(), expected, rtol=1e-5, atol=1e-5)
        assert module.norm() == pytest.approx(float(np.linalg.norm(module.delta())), rel=1e-9)


def tiny(rank: int = 2, layers: int = 2, dtype: str = "F32", **config: Any) -> Adapter:
    """Return an adapter of two projections a layer, 4 wide, with a lorakit header."""
    random = np.random.default_rng(0)
    tensors = {}
    for layer in range(layers):
        for last in ("q_proj", "v_proj"):
            name = f"model.layers.{layer}.self_attn.{last}"
            tensors[lora_name(name, "A")] = Tensor.from_array(random.normal(size=(rank, 4)), dtype)
            tensors[lora_name(name, "B")] = Tensor.from_array(random.normal(size=(4, rank)), dtype)
    fields = {"peft_type": "LORA", "r": rank, "lora_alpha": 4, "target_modules": ["q_proj"]}
    fields |= {"target_modules": ["v_proj", "q_proj"], **config}
    return Adapter(tensors, fields, {"format": 1, "chat": "off"}, "tiny")


def content(adapter: Adapter) -> dict[str, Any]:
    return {
        "config": json.loads(json.dumps(adapter.config, sort_keys=True)),
        "header": dict(adapter.header),
        "tensors": {k: (t.dtype, t.shape, bytes(t.data)) for k, t in adapter.tensors.items()},
    }


# ---- what is read is what PEFT reads

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


@pytest.mark.parametrize(("family", "fields"), KINDS.values(), ids=KINDS.keys())
def test_an_adapter_of_peft_keeps_its_deltas_and_its_logits(
    family: str, fields: dict[str, Any], tmp_path: Path
) -> None:
    config = {"r": 4, "lora_alpha": 7, "task_type": "CAUSAL_LM", **fields}
    base = random_model(family)
    model = with_lora(copy.deepcopy(base), config)
    model.save_pretrained(tmp_path / "theirs")
    adapter = load_adapter(str(tmp_path / "theirs"))
    check_same_deltas(adapter, model)
    save_adapter(adapter, str(tmp_path / "ours") + "/")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        again = peft.PeftModel.from_pretrained(base, str(tmp_path / "ours")).eval()
    assert torch.equal(logits(again), logits(model))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_half_precision_is_widened_exactly_and_kept(dtype: torch.dtype, tmp_path: Path) -> None:
    model = with_lora(random_model("llama"), {"r": 4, "target_modules": ["q_proj"]})
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = parameter.data.to(dtype)
    model.save_pretrained(tmp_path / "theirs")
    adapter = load_adapter(str(tmp_path / "theirs"))
    saved = safetensors.torch.load_file(tmp_path / "theirs" / "adapter_model.safetensors")
    for name, tensor in saved.items():
        assert np.array_equal(adapter.tensors[name].array(), tensor.float().numpy())
    save_adapter(adapter, str(tmp_path / "ours.safetensors"))
    again = safetensors.torch.load_file(tmp_path / "ours.safetensors")
    assert all(torch.equal(again[name], tensor) for name, tensor in saved.items())
    assert {tensor.dtype for tensor in again.values()} == {dtype}


def test_the_single_file_put_in_a_folder_loads_in_peft(tmp_path: Path) -> None:
    base = random_model("llama")
    model = with_lora(copy.deepcopy(base), {"r": 4, "target_modules": ["q_proj"]})
    model.save_pretrained(tmp_path / "theirs")
    single = tmp_path / "x.safetensors"
    save_adapter(load_adapter(str(tmp_path / "theirs")), str(single))
    folder = tmp_path / "ours"
    folder.mkdir()
    config = read_tensors(single, "x")[1]["adapter_config"]
    (folder / "adapter_config.json").write_text(config)
    single.rename(folder / "adapter_model.safetensors")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        again = peft.PeftModel.from_pretrained(base, str(folder)).eval()
    assert torch.equal(logits(again), logits(model))


# ---- the adapters found in public repositories


@needs_found
def test_the_gpt2_adapter_found_gives_the_logits_it_gives_through_peft(tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = transformers.GPT2Config(vocab_size=50, n_positions=16)
    base = transformers.GPT2LMHeadModel(config).eval()
    model: Any = peft.PeftModel.from_pretrained(base, str(FOUND / "huggingface__trl")).eval()
    expected = logits(model)
    adapter = load_adapter(str(FOUND / "huggingface__trl"))
    check_same_deltas(adapter, model)
    save_adapter(adapter, str(tmp_path / "ours") + "/")
    again: Any = peft.PeftModel.from_pretrained(model.unload(), str(tmp_path / "ours")).eval()
    assert torch.equal(logits(again), expected)


FOUND_REFUSED = {
    "huggingface__trl/nothing": "cannot read",
    "ml-explore__mlx-lm": "MLX",
    "ml-explore__mlx-lm/adapters.safetensors": "lora_a' is MLX's",
    "wyek1n__MLX-CLI": "MLX",
    "wyek1n__MLX-CLI/adapters.safetensors": "lora_a' is MLX's",
    "wyek1n__MLX-CLI/0000100_adapters.safetensors": "lora_a' is MLX's",
    "wujindou__BLOOM-LORA": "enable_lora is set",
    "wujindou__BLOOM-LORA/adapter_model.bin": "pickle.*torch.load",
    "peft-regression/ia3_mlp-0.6.1": "peft_type is 'IA3'",
    "peft-regression/lora_mlp-0.6.1": "pickle.*torch.load",
    "peft-regression/lora_mlp_modules_to_save-0.6.1": "modules_to_save is set",
    "peft-regression/lora_mlp-0.6.1/output.pt": "pickle",
}


@needs_found
@pytest.mark.parametrize(("path", "message"), FOUND_REFUSED.items())
def test_the_other_adapters_found_are_refused_in_one_line(path: str, message: str) -> None:
    with pytest.raises(LorakitError, match=message) as caught:
        load_adapter(str(FOUND / path))
    assert str(caught.value).isprintable()


def _family(config: Mapping[str, Any]) -> str:
    base = str(config["base_model_name_or_path"]).lower()
    return next((name for name in ("gpt2", "opt", "bloom") if name in base), "llama")


CONFIG_REFUSED = {"use_dora", "use_bdlora", "modules_to_save"}


@needs_found
@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem[-60:])
def test_the_configs_found_are_exact_or_refused(path: Path, tmp_path: Path) -> None:
    config = json.loads(path.read_text())
    refused = {key for key in CONFIG_REFUSED if config.get(key)}
    if str(config.get("init_lora_weights")).startswith("pissa"):
        refused.add("init_lora_weights")
    (tmp_path / "adapter_config.json").write_text(path.read_text())
    if refused:
        save_tensors(tiny().tensors, tmp_path / "adapter_model.safetensors")
        with pytest.raises(LorakitError, match=f"adapter_config.json: ({'|'.join(refused)}) "):
            load_adapter(str(tmp_path))
        return
    modules = config["target_modules"] or []
    if not {"lin0", "conv2d", "to_q"} & set(modules):
        check_config_is_exact(config, tmp_path)
        return
    save_tensors(tiny().tensors, tmp_path / "adapter_model.safetensors")
    with pytest.raises(LorakitError, match="rank|not targeted by the config"):
        load_adapter(str(tmp_path))


def check_config_is_exact(config: dict[str, Any], folder: Path) -> None:
    """Let PEFT build the adapter from the config; then only the tensors come from PEFT."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of keys this PEFT does not know, of fan_in_fan_out
        made = peft.LoraConfig.from_pretrained(str(folder))
    made.inference_mode = False
    model = with_lora(random_model(_family(config)), vars(made) | {"lora_dropout": 0.0})
    save_tensors(
        {
            name: Tensor.from_array(tensor.detach().numpy())
            for name, tensor in peft.get_peft_model_state_dict(model).items()
        },
        folder / "adapter_model.safetensors",
    )
    check_same_deltas(load_adapter(str(folder)), model)


def save_tensors(tensors: Mapping[str, Tensor], path: Path, **metadata: str) -> None:
    with open(path, "wb") as stream:
        write_tensors(tensors, metadata, stream)


@needs_found
def test_the_line_that_converts_a_pickle_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = FOUND / "peft-regression" / "lora_mlp-0.6.1"
    for name in ("adapter_config.json", "adapter_model.bin"):
        (tmp_path / name).write_bytes((source / name).read_bytes())
    with pytest.raises(LorakitError) as caught:
        load_adapter(str(tmp_path))
    monkeypatch.chdir(tmp_path)
    exec(str(caught.value).split("convert it in Python: ")[1], {})
    adapter = load_adapter(str(tmp_path))
    saved = torch.load("adapter_model.bin", weights_only=True)
    assert [module.name for module in adapter.modules()] == ["lin0"]
    a, b = (saved[lora_name("lin0", factor)] for factor in ("A", "B"))
    assert np.allclose(adapter.modules()[0].delta(), (b @ a).numpy(), atol=1e-6)


# ---- round trips


def test_file_folder_and_pipe_hold_the_same_adapter(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    adapter, single, folder = tiny(), tmp_path / "x.safetensors", tmp_path / "x"
    assert save_adapter(adapter, str(single)) == str(single)
    save_adapter(adapter, f"{folder}/")
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(single.read_bytes())))
    sources = [str(single), str(folder), str(folder / "adapter_model.safetensors"), "-"]
    for loaded in map(load_adapter, sources):
        assert content(loaded) == {**content(adapter), "config": content(loaded)["config"]}
        assert loaded.sha256 == adapter.sha256
    assert (folder / "adapter_model.safetensors").read_bytes() == single.read_bytes()


def test_a_file_written_again_has_the_same_bytes(tmp_path: Path) -> None:
    one, two = tmp_path / "one.safetensors", tmp_path / "two.safetensors"
    save_adapter(tiny(), str(one))
    save_adapter(load_adapter(str(one)), str(two))
    assert one.read_bytes() == two.read_bytes()


def test_an_adapter_can_replace_the_file_it_was_read_from(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    save_adapter(tiny(), str(path))
    before = path.read_bytes()
    save_adapter(load_adapter(str(path)), str(path))
    assert path.read_bytes() == before


def test_bytes_do_not_depend_on_the_hash_seed(tmp_path: Path) -> None:
    script = """
        import sys
        from lorakit.adapter import load_adapter, save_adapter, Adapter
        adapter = load_adapter(sys.argv[1])
        config = {**adapter.config, "target_modules": {"v_proj", "q_proj", "k_proj", "o_proj"}}
        save_adapter(Adapter(adapter.tensors, config, adapter.header), "-")
    """
    save_adapter(tiny(), str(tmp_path / "x"))
    found = {
        run_python(script, str(tmp_path / "x"), PYTHONHASHSEED=seed).stdout for seed in ("1", "2")
    }
    assert len(found) == 1


def test_the_hash_is_of_the_numbers_not_of_their_order_or_header() -> None:
    adapter = tiny()
    turned = Adapter(dict(reversed(adapter.tensors.items())), adapter.config, {}, "other")
    assert turned.sha256 == adapter.sha256
    assert tiny(lora_alpha=5).sha256 != adapter.sha256
    assert tiny(dtype="BF16").sha256 != adapter.sha256
    one, *_ = adapter.tensors
    changed = {**adapter.tensors, one: Tensor.from_array(np.zeros((2, 4)))}
    assert Adapter(changed, adapter.config).sha256 != adapter.sha256


def test_modules_come_by_layer_then_name_in_number_order() -> None:
    names = [module.name for module in tiny(layers=11).modules()]
    assert [int(name.split(".")[2]) for name in names] == sorted(2 * list(range(11)))
    assert names[:2] == ["model.layers.0.self_attn.q_proj", "model.layers.0.self_attn.v_proj"]
    assert [module.layer for module in tiny(layers=11).modules()][-1] == 10


def test_metadata_is_pefts_config_and_lorakits_header(tmp_path: Path) -> None:
    save_adapter(tiny(), str(tmp_path / "x"))
    metadata = read_tensors(tmp_path / "x", "x")[1]
    assert metadata["format"] == "pt"
    assert json.loads(metadata["adapter_config"])["target_modules"] == ["q_proj", "v_proj"]
    assert json.loads(metadata["lorakit"]) == {"format": 1, "chat": "off"}


def test_binary_never_goes_to_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    with pytest.raises(LorakitError, match="terminal"):
        save_adapter(tiny(), "-")


def test_a_device_is_written_to_and_not_replaced() -> None:
    save_adapter(tiny(), "/dev/null")
    assert Path("/dev/null").is_char_device()
    with pytest.raises(LorakitError, match="cannot write /dev/full: no space left"):
        save_adapter(tiny(), "/dev/full")


def test_a_place_that_cannot_be_written_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    for output in (tmp_path / "no" / "x", tmp_path / "file" / "x"):
        with pytest.raises(LorakitError, match="cannot write"):
            save_adapter(tiny(), str(output))
    with pytest.raises(LorakitError, match="cannot write"):
        save_adapter(tiny(), str(tmp_path / "file") + "/")


# ---- which config counts


def test_the_folders_config_counts_since_people_edit_it(tmp_path: Path) -> None:
    save_adapter(tiny(), str(tmp_path))
    config = tmp_path / "adapter_config.json"
    config.write_text(config.read_text().replace('"lora_alpha": 4', '"lora_alpha": 8'))
    assert load_adapter(str(tmp_path)).modules()[0].scale == 4
    assert load_adapter(str(tmp_path / "adapter_model.safetensors")).modules()[0].scale == 4


def test_a_file_with_a_config_of_its_own_ignores_another_adapters_beside_it(
    tmp_path: Path,
) -> None:
    save_adapter(tiny(rank=3), str(tmp_path))
    save_adapter(tiny(), str(tmp_path / "merged.safetensors"))
    assert load_adapter(str(tmp_path / "merged.safetensors")).modules()[0].rank == 2


def test_a_tensor_file_without_config_takes_the_one_beside_it(tmp_path: Path) -> None:
    save_adapter(tiny(), str(tmp_path))
    save_tensors(tiny().tensors, tmp_path / "adapters.safetensors")
    assert load_adapter(str(tmp_path / "adapters.safetensors")).sha256 == tiny().sha256


def test_a_folder_without_a_config_takes_the_tensor_files_own(tmp_path: Path) -> None:
    save_adapter(tiny(), str(tmp_path))
    (tmp_path / "adapter_config.json").unlink()
    assert load_adapter(str(tmp_path)).sha256 == tiny().sha256


def test_a_tensor_file_without_any_config_is_refused(tmp_path: Path) -> None:
    save_tensors(tiny().tensors, tmp_path / "x.safetensors")
    with pytest.raises(LorakitError, match="has no config; put PEFT's adapter_config.json beside"):
        load_adapter(str(tmp_path / "x.safetensors"))


# ---- what is refused

Q = "base_model.model.model.layers.0.self_attn.q_proj"
ONES = Tensor.from_array(np.ones((2, 4)))


def bad_value(value: float, dtype: str = "F32") -> Tensor:
    return Tensor.from_array(np.array([[1.0, 2, 3, 4], [5, value, 7, 8]]), dtype)


REFUSED: dict[str, tuple[dict[str, Tensor | None], str]] = {
    "A without B": ({f"{Q}.lora_B.weight": None}, r"q_proj.lora_A.weight' has no B"),
    "B without A": ({f"{Q}.lora_A.weight": None}, r"q_proj.lora_B.weight' has no A"),
    "DoRA": ({f"{Q}.lora_magnitude_vector": ONES}, "lora_magnitude_vector' belongs to DoRA"),
    "bias of B": ({f"{Q}.lora_B.bias": ONES}, "lora_B.bias' is a bias"),
    "bias": ({f"{Q}.bias": ONES}, "q_proj.bias' is a bias"),
    "whole module": ({"base_model.model.score.weight": ONES}, "score.weight' is no LoRA factor"),
    "embedding": ({"base_model.model.wte.lora_embedding_A": ONES}, "is LoRA on an embedding"),
    "adapter's name": ({f"{Q}.lora_A.default.weight": ONES}, "has the adapter's name"),
    "no prefix": ({"model.layers.0.q_proj.lora_A.weight": ONES}, "does not begin with base_model"),
    "MLX": ({"model.layers.0.q_proj.lora_a": ONES}, "is MLX's"),
    "kohya": ({"lora_unet_down_blocks_0.lora_down.weight": ONES}, "is named as kohya's"),
    "kohya's alpha": ({"lora_te1_text_model.alpha": ONES}, "is named as kohya's"),
    "diffusers": ({"unet.down_blocks.0.to_q.lora_A.weight": ONES}, "is named as diffusers'"),
    "diffusers' transformer": (
        {"transformer.transformer_blocks.0.attn.to_q.lora_A.weight": ONES},
        "is named as diffusers'",
    ),
    "a model": ({"model.embed_tokens.weight": ONES}, "is no part of a LoRA adapter"),
    "NaN": ({f"{Q}.lora_A.weight": bad_value(np.nan)}, "lora_A.weight' holds values that are not"),
    "infinity": ({f"{Q}.lora_A.weight": bad_value(-np.inf)}, "holds values that are not finite"),
    "bf16 NaN": ({f"{Q}.lora_A.weight": bad_value(np.nan, "BF16")}, "not finite"),
    "f16 infinity": ({f"{Q}.lora_A.weight": bad_value(1e9, "F16")}, "not finite"),
    "float64": (
        {f"{Q}.lora_A.weight": Tensor("F64", (2, 4), memoryview(bytes(64)))},
        "is F64; cast it to float32",
    ),
    "integers": (
        {f"{Q}.lora_A.weight": Tensor("I8", (2, 4), memoryview(bytes(8)))},
        "is I8; cast it",
    ),
    "fp8": ({f"{Q}.lora_A.weight": Tensor("F8_E4M3", (2, 4), memoryview(bytes(8)))}, "is F8_E4M3"),
    "convolution": (
        {f"{Q}.lora_A.weight": Tensor.from_array(np.ones((2, 4, 3, 3)))},
        "has 4 dimensions",
    ),
    "rank of A": (
        {f"{Q}.lora_A.weight": Tensor.from_array(np.ones((3, 4)))},
        r"A of shape \(3, 4\) and B of shape \(4, 2\), but the config gives it rank 2",
    ),
    "rank of both": (
        {
            f"{Q}.lora_A.weight": Tensor.from_array(np.ones((3, 4))),
            f"{Q}.lora_B.weight": Tensor.from_array(np.ones((4, 3))),
        },
        "but the config gives it rank 2",
    ),
    "no width": ({f"{Q}.lora_A.weight": Tensor.from_array(np.ones((2, 0)))}, "check them"),
    "not targeted": (
        {
            "base_model.model.lm_head.lora_A.weight": ONES,
            "base_model.model.lm_head.lora_B.weight": Tensor.from_array(np.ones((4, 2))),
        },
        "lm_head.lora_A.weight' is not targeted by the config",
    ),
    "line break": ({f"{Q}\n.lora_A.weight": ONES}, "is no LoRA factor"),
}


@pytest.mark.parametrize(("changes", "message"), REFUSED.values(), ids=REFUSED.keys())
def test_tensors_that_cannot_be_kept_are_refused_by_name(
    changes: dict[str, Tensor | None], message: str, tmp_path: Path
) -> None:
    adapter, path = tiny(), tmp_path / "x.safetensors"
    tensors = {k: t for k, t in {**adapter.tensors, **changes}.items() if t is not None}
    save_tensors(tensors, path, adapter_config=json.dumps(adapter.config))
    with pytest.raises(LorakitError, match=message) as caught:
        load_adapter(str(path))
    assert str(caught.value).startswith(f"{path}: ")
    assert "; " in str(caught.value)
    assert str(caught.value).isprintable()


def test_a_file_without_tensors_is_refused(tmp_path: Path) -> None:
    save_tensors({}, tmp_path / "x", adapter_config=json.dumps(tiny().config))
    with pytest.raises(LorakitError, match="holds no tensors"):
        load_adapter(str(tmp_path / "x"))


FOLDERS = {
    "empty": ([], "holds no adapter_model.safetensors"),
    "pickle only": (["adapter_model.bin"], "holds only the pickle.*save_file"),
    "sharded": (["adapter_model.safetensors.index.json"], "is sharded"),
    "shards": (["adapter_model-00001-of-00002.safetensors"], "is sharded"),
}


@pytest.mark.parametrize(("files", "message"), FOLDERS.values(), ids=FOLDERS.keys())
def test_folders_without_a_tensor_file_are_refused(
    files: list[str], message: str, tmp_path: Path
) -> None:
    for name in files:
        (tmp_path / name).write_bytes(b"")
    with pytest.raises(LorakitError, match=message) as caught:
        load_adapter(str(tmp_path))
    assert str(caught.value).isprintable()


HEADERS = {
    "not JSON": ("{", "is not JSON"),
    "NaN": ('{"settings": NaN}', "is not JSON"),
    "key twice": ('{"chat": "on", "chat": "off"}', "'chat' stands in it twice"),
    "a list": ("[]", "is not an object"),
    "later format": ('{"format": 2}', "has format 2; update lorakit"),
    "format a text": ('{"format": "1"}', r"header.format is not an integer"),
    "base a text": ('{"base": "tiny"}', r"header.base is not an object"),
    "chat a boolean": ('{"chat": true}', r"header.chat is not a text"),
    "blocks an object": ('{"blocks": {}}', r"header.blocks is not a list"),
    "block a text": ('{"blocks": ["xs"]}', r"header.blocks\[0\] is not an object"),
    "offset a text": (
        '{"blocks": [{"modules": {"q": {"offset": "0"}}}]}',
        r"header.blocks\[0\].modules.q.offset is not an integer",
    ),
    "blocks of one name": ('{"blocks": [{"name": "x"}, {"name": "x"}]}', "names two blocks 'x'"),
    "history a text": ('{"history": "merge"}', r"header.history is not a list"),
    "no such module": ('{"blocks": [{"modules": {"q": {}}}]}', "block 'q' is outside the adapter"),
    "beyond the rank": (
        '{"blocks": [{"modules": {"model.layers.0.self_attn.q_proj": {"offset": 1, "rank": 2}}}]}',
        "is outside the adapter",
    ),
}


@pytest.mark.parametrize(("header", "message"), HEADERS.values(), ids=HEADERS.keys())
def test_a_malformed_header_is_refused_in_one_line(
    header: str, message: str, tmp_path: Path
) -> None:
    adapter = tiny()
    save_tensors(
        adapter.tensors,
        tmp_path / "x",
        adapter_config=json.dumps(adapter.config),
        lorakit=header,
    )
    with pytest.raises(LorakitError, match=message) as caught:
        load_adapter(str(tmp_path / "x"))
    assert str(caught.value).isprintable()


@pytest.mark.parametrize("header", ["{}", '{"base": null, "blocks": [null], "new": [1]}'])
def test_a_header_may_lack_anything(header: str, tmp_path: Path) -> None:
    adapter = tiny()
    config = json.dumps(adapter.config)
    save_tensors(adapter.tensors, tmp_path / "x", adapter_config=config, lorakit=header)
    assert load_adapter(str(tmp_path / "x")).header == json.loads(header)


# ---- kills


def run_python(script: str, *arguments: str, **environment: str) -> Any:
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script), *arguments],
        capture_output=True,
        env={**os.environ, "PYTHONPATH": str(ROOT), **environment},
        check=False,
    )


KILLED = """
    import os, signal, sys
    from lorakit import adapter as library
    loaded = library.load_adapter(sys.argv[1])
    write, place = library.write_tensors, int(sys.argv[3])
    def half(tensors, metadata, stream):
        write(dict(list(tensors.items())[: len(tensors) // 2]), metadata, stream)
        stream.flush()
        os.kill(os.getpid(), signal.SIGKILL)
    if place == 0:
        library.write_tensors = half
    calls, replace = [], os.replace
    def counted(*paths):
        calls.append(paths)
        if len(calls) == place:
            os.kill(os.getpid(), signal.SIGKILL)
        replace(*paths)
    os.replace = counted
    library.save_adapter(loaded, sys.argv[2])
"""


@pytest.mark.parametrize("place", [0, 1], ids=["while writing", "before renaming"])
@pytest.mark.parametrize("old", [True, False], ids=["old file", "no file"])
def test_a_kill_leaves_the_old_file_or_none(place: int, old: bool, tmp_path: Path) -> None:
    source, output = tmp_path / "new.safetensors", tmp_path / "out.safetensors"
    save_adapter(tiny(), str(source))
    if old:
        save_adapter(tiny(rank=1), str(output))
        before = output.read_bytes()
    done = run_python(KILLED, str(source), str(output), str(place))
    assert done.returncode == -signal.SIGKILL
    assert output.exists() == old
    if old:
        assert output.read_bytes() == before


@pytest.mark.parametrize("place", [0, 1, 2], ids=["while writing", "before both", "between"])
def test_a_kill_leaves_no_folder_with_the_config_of_another(place: int, tmp_path: Path) -> None:
    source, output = tmp_path / "new.safetensors", tmp_path / "out"
    save_adapter(tiny(lora_alpha=8), str(source))
    save_adapter(tiny(), f"{output}/")
    done = run_python(KILLED, str(source), str(output), str(place))
    assert done.returncode == -signal.SIGKILL
    assert load_adapter(str(output)).sha256 in (tiny().sha256, tiny(lora_alpha=8).sha256)
    tensors, config = output / "adapter_model.safetensors", output / "adapter_config.json"
    own = read_tensors(tensors, "x")[1]["adapter_config"]
    assert not config.exists() or config.read_text().rstrip() == own


# ---- the hub


LOAD = """
    import sys
    from lorakit.adapter import load_adapter
    from lorakit.errors import LorakitError
    try:
        print(load_adapter(sys.argv[1]).sha256)
    except LorakitError as error:
        print("Error:", error)
"""


@pytest.fixture
def hub(tmp_path: Path) -> Path:
    """Return a HF_HOME whose cache holds owner/name, at main and at a tag."""
    repository = tmp_path / "hub" / "models--owner--name"
    for revision, commit, adapter in (("main", "a" * 40, tiny()), ("v1", "b" * 40, tiny(rank=3))):
        (repository / "refs").mkdir(parents=True, exist_ok=True)
        (repository / "refs" / revision).write_text(commit)
        snapshot, blobs = repository / "snapshots" / commit, repository / "blobs"
        blobs.mkdir(exist_ok=True)
        save_adapter(adapter, f"{snapshot}/")
        for file in list(snapshot.iterdir()):
            blob = blobs / f"{commit}-{file.name}"
            file.rename(blob)
            file.symlink_to(os.path.relpath(blob, snapshot))
    return tmp_path


@pytest.mark.parametrize(
    ("address", "rank"), [("hf://owner/name", 2), ("hf://owner/name@v1", 3)], ids=["main", "tag"]
)
def test_an_adapter_of_the_hub_is_read_from_its_cache(address: str, rank: int, hub: Path) -> None:
    done = run_python(LOAD, address, HF_HOME=str(hub), HF_HUB_OFFLINE="1")
    assert done.stdout.decode().strip() == tiny(rank=rank).sha256
    assert done.stderr == b""


def test_what_is_not_in_the_cache_is_refused_offline(hub: Path) -> None:
    done = run_python(LOAD, "hf://owner/other", HF_HOME=str(hub), HF_HUB_OFFLINE="1")
    assert re.fullmatch(rb"Error: cannot fetch hf://owner/other: .*; .*\n", done.stdout)
    assert done.stderr == b""


@pytest.mark.parametrize(
    "address", ["hf://", "hf://name", "hf://a/b/c", "hf://a/b@", "hf://a/b@c d"]
)
def test_an_address_that_is_none_is_refused(address: str) -> None:
    with pytest.raises(LorakitError, match="is no hub address"):
        load_adapter(address)


ANSWERS = {
    "missing/repo": (401, "RepoNotFound", b"there is no such repository"),
    "gated/repo": (403, "GatedRepo", b"it is gated"),
    "no/revision": (404, "RevisionNotFound", b"it has no revision v9"),
    "only/pickle": (404, "EntryNotFound", b"it has no adapter_config.json"),
    "broken/server": (501, "", b"cannot fetch"),
}


@pytest.fixture
def endpoint() -> Iterator[str]:
    """Serve ANSWERS, as the hub would give them, on this machine."""

    class Answer(BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            status, code, _ = ANSWERS["/".join(self.path.split("/")[1:3])]
            self.send_response(status)
            self.send_header("X-Error-Code", code)
            self.send_header("X-Repo-Commit", "a" * 40)
            self.send_header("Content-Length", "0")
            self.end_headers()

        do_GET = do_HEAD  # noqa: N815

        def log_message(self, format: str, *args: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Answer)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


@pytest.mark.parametrize("repo", ANSWERS)
def test_what_the_hub_refuses_becomes_one_line(repo: str, endpoint: str, tmp_path: Path) -> None:
    done = run_python(
        LOAD, f"hf://{repo}@v9", HF_HOME=str(tmp_path), HF_ENDPOINT=endpoint, HF_HUB_OFFLINE="0"
    )
    assert ANSWERS[repo][2] in done.stdout
    assert re.fullmatch(rb"Error: cannot fetch hf://[^\n]*: [^\n]*; [^\n]*\n", done.stdout)
    assert done.stderr == b""
