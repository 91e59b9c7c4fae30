"""Whole models as GGUF: read back by gguf, tensor by tensor, against the exact dense sums."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
import transformers
from click.testing import CliRunner, Result

from lorakit.adapters.adapter import Adapter
from lorakit.adapters.storage import load_adapter, save_adapter
from lorakit.cli import lorakit
from lorakit.errors import LorakitError
from lorakit.export.model_folder import open_model_folder
from lorakit.gguf.model import fuse_gguf
from lorakit.reporting import Silent
from lorakit.settings import ModelSettings
from tests.gguf.test_adapter import random_adapter
from tests.support.gguf import (
    CONFIGS,
    fields_of,
    formats_of,
    rotary_pairs_side_by_side,
    save_random,
    tensors_of,
)

NORM_PLUS_ONE = ("gemma", "gemma2", "gemma3")
PERMUTED = ("llama", "llama tied", "llama wide heads", "mistral")
ADAPTED = [kind for kind in CONFIGS if kind != "llama tied"]


class Notes(Silent):
    """A reporter that keeps its notes."""

    def __init__(self) -> None:
        self.texts: list[str] = []

    def note(self, text: str) -> None:
        self.texts.append(text)


def write(folder: Path, output: Path, adapter: Adapter | None = None, **options: Any) -> Path:
    settings = {"dtype": "float32", "trust_remote_code": False, "reporter": Silent(), **options}
    fuse_gguf(adapter, open_model_folder(ModelSettings(), str(folder)), str(output), **settings)
    return output


def expected_tensors(kind: str, model: Any, adapter: Adapter | None) -> dict[str, Any]:
    """Return what llama.cpp is to have of a model, by its names: float64, in its order of rows."""
    changes = {f"{m.name}.weight": m.delta() for m in adapter.modules()} if adapter else {}
    names = _names(kind, model.config)
    expected = {}
    for name, parameter in model.named_parameters():
        value = parameter.detach().double().numpy()
        if kind == "gpt2" and value.ndim == 2 and ".h." in name:
            value = value.T
        value = value + changes.get(name, 0.0)
        if kind in NORM_PLUS_ONE and "norm" in name:
            value = value + 1
        for part, heads in (("q_proj", 4), ("k_proj", 2)):
            if kind in PERMUTED and part in name:
                value = rotary_pairs_side_by_side(value, heads)
        expected[names[name]] = value
    return expected


def _names(kind: str, config: Any) -> dict[str, str]:
    """Return gguf's own names of a model's parameters."""
    architectures = {"phi": "phi2", "mistral": "llama", "gemma3_text": "gemma3"}
    name = architectures.get(config.model_type, config.model_type)
    arch = next(arch for arch, text in gguf.MODEL_ARCH_NAMES.items() if text == name)
    table = gguf.get_tensor_name_map(arch, config.num_hidden_layers)
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config)
    return {
        parameter: str(table.get_name(parameter, (".weight", ".bias")))
        for parameter, _ in model.named_parameters()
    }


@pytest.mark.parametrize("kind", CONFIGS)
def test_a_base_is_written_value_by_value(kind: str, tmp_path: Path) -> None:
    model = save_random(kind, tmp_path / "base")
    written = tensors_of(write(tmp_path / "base", tmp_path / "base.gguf"))
    expected = expected_tensors(kind, model, None)
    assert written.keys() == expected.keys()
    for name, value in expected.items():
        np.testing.assert_allclose(written[name], value, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("kind", ADAPTED)
def test_an_adapter_is_summed_into_the_weights(kind: str, tmp_path: Path) -> None:
    model, adapter = save_random(kind, tmp_path / "base"), random_adapter(kind)
    written = tensors_of(write(tmp_path / "base", tmp_path / "fused.gguf", adapter))
    expected = expected_tensors(kind, model, adapter)
    assert written.keys() == expected.keys()
    for name, value in expected.items():
        np.testing.assert_allclose(written[name], value, rtol=1e-5, atol=1e-5)


STEPS = {
    "float16": 2.0**-11,
    "bfloat16": 2.0**-8,
    "q8_0": 1 / 254 + 2.0**-11,
}  # its scale is float16


@pytest.mark.parametrize("dtype", STEPS)
def test_a_format_rounds_matrices_once_and_leaves_vectors_exact(dtype: str, tmp_path: Path) -> None:
    model, adapter = save_random("llama", tmp_path / "base"), random_adapter("llama")
    path = write(tmp_path / "base", tmp_path / "fused.gguf", adapter, dtype=dtype)
    formats = formats_of(path)
    for name, value in expected_tensors("llama", model, adapter).items():
        stored = tensors_of(path)[name]
        if value.ndim == 1:
            assert formats[name] == "F32"
            np.testing.assert_allclose(stored, value, rtol=1e-6)
            continue
        short = {"float16": "F16", "bfloat16": "BF16", "q8_0": "Q8_0"}
        assert formats[name] == short[dtype]
        largest = value if dtype != "q8_0" else np.abs(value.reshape(-1, 32)).max(1).repeat(32)
        bound = STEPS[dtype] * np.abs(largest).reshape(value.shape) * 1.01 + 1e-7
        assert (np.abs(stored - value) <= bound).all(), name
    codes = {"float16": 1, "bfloat16": 32, "q8_0": 7}
    assert fields_of(path)["general.file_type"] == codes[dtype]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_without_a_format_each_matrix_keeps_its_own(dtype: torch.dtype, tmp_path: Path) -> None:
    model = save_random("qwen2", tmp_path / "base", dtype)
    path = write(tmp_path / "base", tmp_path / "base.gguf", dtype=None)
    names = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}
    assert formats_of(path)["blk.0.ffn_up.weight"] == names[dtype]
    weight = model.state_dict()["model.layers.0.mlp.up_proj.weight"].float().numpy()
    assert np.array_equal(tensors_of(path)["blk.0.ffn_up.weight"], weight)


def test_rows_that_q8_0_cannot_cut_into_blocks_are_float16(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    narrow = CONFIGS["llama"]()
    narrow.intermediate_size = 40
    monkeypatch.setitem(CONFIGS, "narrow", lambda: narrow)
    save_random("narrow", tmp_path / "base")
    formats = formats_of(write(tmp_path / "base", tmp_path / "a.gguf", dtype="q8_0"))
    assert formats["blk.0.ffn_down.weight"] == "F16"
    assert formats["blk.0.ffn_up.weight"] == "Q8_0"


def test_the_fields_tell_shape_tokens_and_history(tmp_path: Path) -> None:
    save_random("mistral", tmp_path / "base")
    (tmp_path / "base" / "README.md").write_text("---\nlicense: apache-2.0\ntags: [a]\n---\n")
    fields = fields_of(write(tmp_path / "base", tmp_path / "a.gguf", random_adapter("mistral")))
    assert fields["general.architecture"] == "llama"
    assert fields["general.license"] == "apache-2.0"
    assert fields["general.base_model.0.name"] == "base"
    assert json.loads(fields["lorakit.header"])["history"] == [{"command": "train-adapter"}]
    shape = {
        "block_count": 2,
        "context_length": 64,
        "embedding_length": 64,
        "feed_forward_length": 96,
        "attention.head_count": 4,
        "attention.head_count_kv": 2,
        "rope.dimension_count": 16,
        "vocab_size": 300,
    }
    assert {key: fields[f"llama.{key}"] for key in shape} == shape
    assert len(fields["tokenizer.ggml.tokens"]) == 300


def test_a_window_that_llama_cpp_has_not_ends_the_context_with_a_note(tmp_path: Path) -> None:
    notes = Notes()
    save_random("mistral", tmp_path / "base")
    write(tmp_path / "base", tmp_path / "a.gguf", reporter=notes)
    assert any("no sliding window for llama" in text for text in notes.texts)
    notes.texts.clear()
    save_random("gemma2", tmp_path / "gemma")
    write(tmp_path / "gemma", tmp_path / "b.gguf", reporter=notes)
    assert not [text for text in notes.texts if "sliding" in text]


def edit_config(folder: Path, **fields: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 2.0, "attention_factor": 1.5}
REFUSED: dict[str, tuple[str, dict[str, Any], str]] = {
    "activation": ("llama", {"hidden_act": "relu"}, "hidden_act is 'relu'"),
    "scores": ("gemma2", {"query_pre_attn_scalar": 99}, "query_pre_attn_scalar is 99"),
    "layers": ("gemma2", {"layer_types": ["full_attention"] * 2}, "layer_types is"),
    "norms of q and k": ("phi", {"qk_layernorm": True}, "qk_layernorm is True"),
    "yarn": ("llama", {"rope_parameters": YARN}, "scaled by yarn with attention_factor"),
    "dynamic": (
        "llama",
        {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}},
        "scaled by dynamic",
    ),
    "quantised": ("llama", {"quantization_config": {"quant_method": "gptq"}}, "is quantised"),
}


@pytest.mark.parametrize(("kind", "fields", "message"), REFUSED.values(), ids=REFUSED.keys())
def test_what_llama_cpp_computes_otherwise_is_refused_by_its_key(
    kind: str, fields: dict[str, Any], message: str, tmp_path: Path
) -> None:
    save_random(kind, tmp_path / "base")
    edit_config(tmp_path / "base", **fields)
    with pytest.raises(LorakitError, match=message):
        write(tmp_path / "base", tmp_path / "a.gguf")
    assert not (tmp_path / "a.gguf").exists()


def test_a_disk_without_room_is_an_error_that_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_random("llama", tmp_path / "base")
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: usage)
    with pytest.raises(LorakitError, match=r"needs \d+\.\d\d KiB, and 1000 B are free"):
        write(tmp_path / "base", tmp_path / "a.gguf")
    assert [path.name for path in tmp_path.iterdir()] == ["base"]


def test_a_disk_that_fills_up_is_an_error_that_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def write_half(writer: gguf.GGUFWriter, tensor: object) -> None:
        raise OSError("16384 requested and 1000 written")  # as numpy does

    save_random("llama", tmp_path / "base")
    monkeypatch.setattr(gguf.GGUFWriter, "write_tensor_data", write_half)
    with pytest.raises(LorakitError, match="has room for a part of it only; choose another -o"):
        write(tmp_path / "base", tmp_path / "a.gguf")
    assert [path.name for path in tmp_path.iterdir()] == ["base"]


def test_what_float16_cannot_hold_is_an_error_that_leaves_the_old_file(tmp_path: Path) -> None:
    model = save_random("llama", tmp_path / "base")
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[0, 0] = 1e6
    model.save_pretrained(tmp_path / "base")
    (tmp_path / "a.gguf").write_bytes(b"old")
    with pytest.raises(LorakitError, match=r"blk\.1\.ffn_up\.weight is beyond F16"):
        write(tmp_path / "base", tmp_path / "a.gguf", dtype="float16")
    assert (tmp_path / "a.gguf").read_bytes() == b"old"


# — The command —


def run(*arguments: str | Path) -> Result:
    return CliRunner().invoke(lorakit, ["fuse", *map(str, arguments)])


def test_the_command_writes_the_file_and_says_how_it_is_served(tmp_path: Path) -> None:
    save_random("llama", tmp_path / "base")
    save_adapter(random_adapter("llama"), str(tmp_path / "a.safetensors"))
    options = ("--to", "gguf", "--model", tmp_path / "base")
    output = tmp_path / "a.gguf"
    done = run(tmp_path / "a.safetensors", *options, "--dtype", "bf16", "-o", output)
    assert done.exit_code == 0, done.stderr
    assert f"llama-server -m {output}\n" in done.stderr
    assert f"Modelfile: FROM {output}\n" in done.stderr
    adapter = load_adapter(str(tmp_path / "a.safetensors"))
    write(tmp_path / "base", tmp_path / "b.gguf", adapter, dtype="bfloat16")
    assert output.read_bytes() == (tmp_path / "b.gguf").read_bytes()
    assert run("--base-only", *options, "-o", tmp_path / "base.gguf").exit_code == 0
    write(tmp_path / "base", tmp_path / "c.gguf", dtype=None)
    assert (tmp_path / "base.gguf").read_bytes() == (tmp_path / "c.gguf").read_bytes()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--dtype", "q8_0", "-o", "x"], "q8_0 needs --to gguf"),
        (["--to", "gguf", "--resume", "-o", "x.gguf"], "--resume is read by --to folder alone"),
        (["--to", "gguf", "--no-check", "-o", "x.gguf"], "--check is read by --to folder alone"),
        (["--to", "gguf", "--base-only", "-o", "x.gguf"], "--base-only takes no ADAPTER"),
    ],
)
def test_options_of_another_form_are_usage_errors(arguments: list[str], message: str) -> None:
    done = run("a.safetensors", *arguments)
    assert done.exit_code == 2
    assert message in done.stderr


def test_a_file_of_another_kind_is_refused() -> None:
    done = run("a.safetensors", "--to", "gguf", "-o", "model/")
    assert done.exit_code == 1
    assert "end -o in .gguf" in str(done.exception)
