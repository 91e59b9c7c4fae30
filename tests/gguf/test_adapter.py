"""Adapters in llama.cpp's form, read back by gguf as dense changes of llama.cpp's weights."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner, Result

from lorakit.adapters.adapter import Adapter
from lorakit.adapters.config import check_config
from lorakit.adapters.names import lora_name
from lorakit.adapters.storage import save_adapter
from lorakit.adapters.tensors import Tensor
from lorakit.cli import lorakit
from lorakit.errors import LorakitError
from lorakit.gguf.adapter import save_gguf_adapter
from lorakit.gguf.serving import adapter_lines
from tests.support.adapters import run_python
from tests.support.gguf import (
    CONFIGS,
    fields_of,
    formats_of,
    rotary_pairs_side_by_side,
    tensors_of,
)
from tests.support.program import ENVIRONMENT

PROJECTIONS: dict[str, tuple[str, ...]] = {
    "llama": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.o_proj", "mlp.down_proj"),
    "llama wide heads": ("self_attn.q_proj", "self_attn.k_proj"),
    "mistral": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "qwen2": ("self_attn.q_proj", "self_attn.k_proj", "mlp.up_proj"),
    "qwen3": ("self_attn.q_proj", "self_attn.k_proj"),
    "gemma": ("self_attn.q_proj", "mlp.gate_proj"),
    "gemma2": ("self_attn.k_proj", "mlp.up_proj"),
    "gemma3": ("self_attn.q_proj",),
    "phi": ("self_attn.q_proj", "self_attn.dense", "mlp.fc1"),
    "phi3": ("self_attn.qkv_proj", "mlp.gate_up_proj"),
    "gpt2": ("attn.c_attn", "attn.c_proj", "mlp.c_fc"),
}
NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.dense": "attn_output",
    "self_attn.qkv_proj": "attn_qkv",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "mlp.gate_up_proj": "ffn_up",
    "mlp.fc1": "ffn_up",
    "attn.c_attn": "attn_qkv",
    "attn.c_proj": "attn_output",
    "mlp.c_fc": "ffn_up",
}
ROWS = {"attn_q": 64, "attn_k": 32, "attn_v": 32, "attn_output": 64, "ffn_down": 64}
ROWS |= {"attn_qkv": 128, "ffn_gate": 96, "ffn_up": 96}
OWN_ROWS = {"gpt2 attn_qkv": 192, "phi3 ffn_up": 192}
HEADS = {"self_attn.q_proj": 4, "self_attn.k_proj": 2}  # as tests.support.gguf has them
PERMUTED = ("llama", "llama wide heads", "mistral")


def config_of(kind: str) -> dict[str, Any]:
    """Return a config as its file has it, without what transformers does not write."""
    fields: dict[str, Any] = json.loads(CONFIGS[kind]().to_json_string())
    return fields


def random_adapter(kind: str, *, dtype: str = "F32", **config: Any) -> Adapter:
    """Return an adapter on two layers; values are such that float16 and bfloat16 hold them."""
    random = np.random.default_rng(0)
    prefix = "transformer.h" if kind == "gpt2" else "model.layers"
    settings = {"r": 4, "lora_alpha": 12, **config}
    tensors = {}
    for layer in range(2):
        for last in PROJECTIONS[kind]:
            name = f"{prefix}.{layer}.{last}"
            rank = settings.get("rank_pattern", {}).get(name, settings["r"])
            rows = OWN_ROWS.get(f"{kind} {NAMES[last]}", ROWS[NAMES[last]])
            rows *= 2 if kind in ("llama wide heads", "qwen3") else 1
            a = random.integers(-8, 8, size=(rank, 96 if "down" in last else 64)) / 8
            b = random.integers(-8, 8, size=(rows, rank)) / 8
            tensors[lora_name(name, "A")] = Tensor.from_array(a, dtype)
            tensors[lora_name(name, "B")] = Tensor.from_array(b, dtype)
    fields = {"peft_type": "LORA", "target_modules": sorted(PROJECTIONS[kind]), **settings}
    header: Any = {"format": 1, "history": [{"command": "train-adapter"}]}
    return Adapter(tensors, check_config(fields, "a"), header, "a")


def changes_of(path: Path) -> dict[str, Any]:
    """Return what llama.cpp adds to each weight, alpha/rank·B·A with the pair's own rank."""
    alpha, tensors = fields_of(path)["adapter.lora.alpha"], tensors_of(path)
    pairs = {name.removesuffix(".lora_a") for name in tensors if name.endswith(".lora_a")}
    assert len(tensors) == 2 * len(pairs)
    return {
        name: alpha
        / len(tensors[f"{name}.lora_a"])
        * (tensors[f"{name}.lora_b"].astype(float) @ tensors[f"{name}.lora_a"])
        for name in pairs
    }


def save(adapter: Adapter, path: Path, kind: str) -> Path:
    save_gguf_adapter(adapter, str(path), config=config_of(kind), base="owner/base")
    return path


@pytest.mark.parametrize("kind", PROJECTIONS)
def test_the_file_changes_the_weights_as_the_adapter_does(kind: str, tmp_path: Path) -> None:
    adapter = random_adapter(kind)
    changes = changes_of(save(adapter, tmp_path / "a.gguf", kind))
    assert len(changes) == len(adapter.modules())
    for module in adapter.modules():
        layer, last = module.layer, module.name.partition(f".{module.layer}.")[2]
        expected = module.delta()
        if kind in PERMUTED and last in HEADS:
            expected = rotary_pairs_side_by_side(expected, HEADS[last])
        changed = changes[f"blk.{layer}.{NAMES[last]}.weight"]
        np.testing.assert_allclose(changed, expected, rtol=1e-6, atol=1e-6)


SCALES: dict[str, dict[str, Any]] = {
    "alpha": {"lora_alpha": 7},
    "rslora": {"use_rslora": True},
    "ranks": {"rank_pattern": {"model.layers.1.self_attn.q_proj": 2}},
    "alphas": {"alpha_pattern": {"model.layers.0.self_attn.k_proj": 3}},
    "both, rslora": {
        "rank_pattern": {"model.layers.1.self_attn.q_proj": 7},
        "alpha_pattern": {"model.layers.0.self_attn.k_proj": 3},
        "use_rslora": True,
    },
}


@pytest.mark.parametrize("config", SCALES.values(), ids=SCALES.keys())
def test_scales_of_every_kind_are_kept(config: dict[str, Any], tmp_path: Path) -> None:
    adapter = random_adapter("qwen2", **config)
    changes = changes_of(save(adapter, tmp_path / "a.gguf", "qwen2"))
    for module in adapter.modules():
        last = module.name.partition(f".{module.layer}.")[2]
        changed = changes[f"blk.{module.layer}.{NAMES[last]}.weight"]
        np.testing.assert_allclose(changed, module.delta(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("dtype", "stored"), [("F32", "F32"), ("F16", "F16"), ("BF16", "F32")])
def test_values_keep_all_their_digits(dtype: str, stored: str, tmp_path: Path) -> None:
    adapter = random_adapter("qwen2", dtype=dtype)
    path = save(adapter, tmp_path / "a.gguf", "qwen2")
    assert set(formats_of(path).values()) == {stored}
    key = lora_name("model.layers.0.mlp.up_proj", "A")
    written = tensors_of(path)["blk.0.ffn_up.weight.lora_a"]
    assert np.array_equal(written, adapter.tensors[key].array())


def test_the_fields_are_llama_cpps_and_hold_base_and_history(tmp_path: Path) -> None:
    fields = fields_of(save(random_adapter("mistral"), tmp_path / "a.gguf", "mistral"))
    assert fields["general.type"] == "adapter"
    assert fields["adapter.type"] == "lora"
    assert fields["adapter.lora.alpha"] == 12
    assert fields["general.architecture"] == "llama"
    assert fields["general.base_model.0.name"] == "base"
    assert fields["general.base_model.0.repo_url"] == "https://huggingface.co/owner/base"
    assert json.loads(fields["lorakit.header"])["history"] == [{"command": "train-adapter"}]


def test_equal_adapters_give_equal_bytes(tmp_path: Path) -> None:
    paths = [save(random_adapter("llama"), tmp_path / f"{n}.gguf", "llama") for n in range(2)]
    assert paths[0].read_bytes() == paths[1].read_bytes()


def _with_module(adapter: Adapter, name: str) -> Adapter:
    """Return the adapter with a pair of its own moved to another module."""
    old = adapter.modules()[0].name
    tensors = {key.replace(old, name): tensor for key, tensor in adapter.tensors.items()}
    return Adapter(tensors, adapter.config, adapter.header, adapter.name)


@pytest.mark.parametrize(
    ("config", "module", "message"),
    [
        ({"model_type": "opt"}, None, "of the family 'opt', and GGUF is written for gemma"),
        ({"num_attention_heads": None}, None, "gives no number of layers or heads"),
        ({"num_attention_heads": 0}, None, "gives no number of layers or heads"),
        ({"num_key_value_heads": "x"}, None, "gives no number of layers or heads"),
        ({"num_hidden_layers": 10**9}, None, "gives no number of layers or heads"),
        ({"hidden_size": 128}, None, "is 64×96, and x is 128 wide; give the base"),
        ({"num_attention_heads": 3}, None, "has 64 rows for 3 heads"),
        ({"num_hidden_layers": 1}, None, "no tensor for model.layers.1"),
        ({}, "model.layers.0.self_attn.rotary", "llama has no tensor for model.layers.0.self_attn"),
        ({"tie_word_embeddings": True}, "lm_head", "shares with its embedding"),
    ],
    ids=[
        "family",
        "no heads",
        "zero heads",
        "no key heads",
        "too many layers",
        "width",
        "heads",
        "layers",
        "module",
        "tied head",
    ],
)
def test_what_llama_cpp_does_not_have_is_refused_by_name(
    config: dict[str, Any], module: str | None, message: str, tmp_path: Path
) -> None:
    adapter = random_adapter("llama")
    if module is not None:
        adapter = _with_module(adapter, module)
    with pytest.raises(LorakitError, match=message):
        save_gguf_adapter(
            adapter,
            str(tmp_path / "a.gguf"),
            config={**config_of("llama"), **config},
            base="x",
        )
    assert list(tmp_path.iterdir()) == []


# — The command —


def run(*arguments: str | Path) -> Result:
    return CliRunner().invoke(lorakit, ["convert", *map(str, arguments)])


@pytest.fixture
def files(tmp_path: Path) -> tuple[Path, Path]:
    """Return an adapter's file and the folder of its base, which holds a config alone."""
    base = tmp_path / "base"
    base.mkdir()
    (base / "config.json").write_text(json.dumps(config_of("llama")))
    save_adapter(random_adapter("llama"), str(tmp_path / "a.safetensors"))
    return tmp_path / "a.safetensors", base


def test_the_command_writes_the_file_and_says_how_it_is_served(
    files: tuple[Path, Path], tmp_path: Path
) -> None:
    output = tmp_path / "a.gguf"
    done = run(files[0], "--to", "gguf", "--model", files[1], "-o", output)
    assert done.exit_code == 0, done.stderr
    assert done.stdout == ""
    assert f"llama-server -m BASE.gguf --lora {output}\n" in done.stderr
    assert f"ADAPTER {output}\n" in done.stderr
    save_gguf_adapter(
        random_adapter("llama"),
        str(tmp_path / "b.gguf"),
        config=config_of("llama"),
        base=str(files[1]),
    )
    assert output.read_bytes() == (tmp_path / "b.gguf").read_bytes()
    piped = run(files[0], "--to", "gguf", "--model", files[1], "-o", "-", "-q")
    assert piped.stdout_bytes == output.read_bytes()


def test_a_name_with_spaces_is_quoted_for_the_shell() -> None:
    (line, *_) = adapter_lines("my adapter.gguf")
    assert line.endswith("--lora 'my adapter.gguf'")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no /dev/full")
def test_a_full_device_is_an_error_that_names_it(files: tuple[Path, Path]) -> None:
    done = run(files[0], "--to", "gguf", "--model", files[1], "-o", "/dev/full")
    assert str(done.exception).startswith("cannot write /dev/full: no space left on device;")


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["--to", "gguf", "-o", "a.safetensors"], 1, "end -o in .gguf"),
        (["--to", "gguf", "-o", "folder/"], 1, "end -o in .gguf"),
        (["--to", "peft", "-o", "a.gguf"], 1, "convert writes no .gguf files"),
        (["--model", "tiny", "-o", "b.safetensors"], 2, "--model is read by --to gguf alone"),
    ],
)
def test_names_and_options_of_another_form_are_refused(
    arguments: list[str], code: int, message: str, files: tuple[Path, Path]
) -> None:
    done = run(files[0], *arguments)
    assert done.exit_code == code
    assert message in (done.stderr + str(done.exception))


def test_a_base_without_a_config_is_an_error_that_names_its_path(
    files: tuple[Path, Path], tmp_path: Path
) -> None:
    (files[1] / "config.json").unlink()
    done = run(files[0], "--to", "gguf", "--model", files[1], "-o", tmp_path / "a.gguf")
    expected = f"cannot read {files[1]}/config.json: no such file or directory; check --model"
    assert str(done.exception) == expected


def test_converting_needs_no_model_library(files: tuple[Path, Path], tmp_path: Path) -> None:
    script = (
        "import sys; from lorakit.cli import main\ntry: main()\n"
        "finally: print([m for m in ('torch', 'transformers') if m in sys.modules])"
    )
    arguments = ["convert", str(files[0]), "--to", "gguf", "--model", str(files[1]), "-q"]
    done = subprocess.run(
        [sys.executable, "-c", script, *arguments, "-o", str(tmp_path / "a.gguf")],
        env=ENVIRONMENT,
        capture_output=True,
        encoding="utf-8",
        check=True,
    )
    assert done.stdout == "[]\n"


def test_a_base_in_the_hubs_cache_is_enough(files: tuple[Path, Path], tmp_path: Path) -> None:
    home = tmp_path / "hub" / "models--owner--base"
    snapshot = home / "snapshots" / ("a" * 40)
    snapshot.mkdir(parents=True)
    (snapshot / "config.json").write_text((files[1] / "config.json").read_text())
    (home / "refs").mkdir()
    (home / "refs" / "main").write_text("a" * 40)
    script = "import sys; from lorakit.cli import main; sys.argv[0] = 'lorakit'; main()"
    output = tmp_path / "a.gguf"
    options = ("--to", "gguf", "--model", "owner/base", "-o", str(output))
    done = run_python(script, "convert", str(files[0]), *options, HF_HOME=str(tmp_path))
    assert done.returncode == 0, done.stderr
    assert fields_of(output)["general.base_model.0.organization"] == "owner"
