"""Scaling: PEFT with the upper layers' scale multiplied is the oracle."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch

from lorakit.adapters.adapter import Adapter, tensors_of
from lorakit.adapters.blocks import share_of_zeros
from lorakit.adapters.history import HistoryEntry, parse_header
from lorakit.adapters.names import layer_of, lora_name
from lorakit.adapters.storage import load_adapter, save_adapter
from lorakit.adapters.targets import peft_config
from lorakit.adapters.tensors import Tensor
from lorakit.boundary.scale import scale_layers, write_scaled
from lorakit.boundary.strip import write_stripped
from lorakit.errors import LorakitError
from lorakit.merging.importance import unstack
from lorakit.merging.stack import fold, stack
from tests.support.adapters import tiny
from tests.support.in_process import run_here
from tests.support.peft_models import KINDS, logits, random_model, with_lora
from tests.support.program import shell

torch.set_num_threads(1)

# PEFT's own use of a name transformers renamed. Any other warning is an error here.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")

QV = ["q_proj", "v_proj"]


def multiplied(model: Any, first: int, factor: float) -> Any:
    """Multiply the scale of PEFT's LoRA on every layer from `first` on; return the model."""
    for name, module in model.named_modules():
        layer = layer_of(name.removeprefix("base_model.model."))
        if hasattr(module, "lora_A") and layer is not None and layer >= first:
            module.scaling["default"] *= factor
    return model


def loaded_by_peft(base: Any, folder: Path) -> Any:
    return peft.PeftModel.from_pretrained(base, str(folder)).eval()


def adapter_of(model: Any, folder: Path) -> Adapter:
    model.save_pretrained(folder, save_embedding_layers=False)
    return load_adapter(str(folder))


@pytest.mark.parametrize(("first", "factor"), [(0, 0.5), (1, 2.0), (2, 0.3), (3, 7.0)])
@pytest.mark.parametrize(("family", "fields"), KINDS.values(), ids=KINDS.keys())
def test_peft_gives_the_logits_of_the_model_whose_upper_scales_are_multiplied(
    family: str, fields: dict[str, Any], first: int, factor: float, tmp_path: Path
) -> None:
    base = random_model(family)
    config = {"r": 4, "lora_alpha": 7, "task_type": "CAUSAL_LM", **fields}
    model = with_lora(copy.deepcopy(base), config)
    adapter = adapter_of(model, tmp_path / "whole")
    write_scaled(adapter, f"{tmp_path / 'out'}/", from_layer=first, factor=factor)
    whole = logits(model)
    expected = logits(multiplied(model, first, factor))
    assert torch.allclose(
        logits(loaded_by_peft(base, tmp_path / "out")), expected, rtol=1e-5, atol=1e-5
    )
    touched = any(m.layer is not None and m.layer >= first for m in adapter.modules())
    assert torch.equal(whole, expected) == (not touched)


@pytest.mark.parametrize("boundary", [1, 2])
def test_factor_0_gives_the_logits_of_the_stripped_adapter(boundary: int, tmp_path: Path) -> None:
    base = random_model("llama")
    model = with_lora(copy.deepcopy(base), {"target_modules": QV, "r": 3, "lora_alpha": 5})
    adapter = adapter_of(model, tmp_path / "whole")
    write_scaled(adapter, f"{tmp_path / 'scaled'}/", from_layer=boundary, factor=0)
    write_stripped(adapter, f"{tmp_path / 'stripped'}/", boundary=boundary)
    of_scaled = logits(loaded_by_peft(copy.deepcopy(base), tmp_path / "scaled"))
    assert torch.equal(of_scaled, logits(loaded_by_peft(base, tmp_path / "stripped")))


@pytest.mark.parametrize(("first", "factor"), [(0, 1), (1, 1), (2, 0.5)])
def test_at_factor_1_or_above_all_layers_the_adapter_is_itself(first: int, factor: float) -> None:
    adapter = tiny(layers=2, dtype="BF16", alpha_pattern={"layers.1.*": 3})
    scaled = scale_layers(adapter, from_layer=first, factor=factor)
    assert scaled.tensors == adapter.tensors
    assert scaled.config == adapter.config
    assert scaled.sha256 == adapter.sha256


@pytest.mark.parametrize("factor", [0.0, 0.25, 2.0])
@pytest.mark.parametrize("dtype", ["F32", "F16", "BF16"])
def test_a_power_of_two_is_exact_and_keeps_the_number_format(factor: float, dtype: str) -> None:
    adapter = tiny(layers=3, dtype=dtype)
    scaled = scale_layers(adapter, from_layer=1, factor=factor)
    for old, new in zip(adapter.modules(), scaled.modules(), strict=True):
        assert new.tensor_a is old.tensor_a
        assert new.tensor_b.dtype == dtype
        assert np.array_equal(new.b, old.b * (factor if old.layer else 1))
        assert (new.tensor_b is old.tensor_b) == (old.layer == 0)


@pytest.mark.parametrize(("dtype", "expected"), [("F32", "F32"), ("F16", "F32"), ("BF16", "F32")])
def test_another_product_is_rounded_once_to_float32(dtype: str, expected: str) -> None:
    adapter = tiny(layers=2, dtype=dtype)
    scaled = scale_layers(adapter, from_layer=1, factor=0.3)
    for old, new in zip(adapter.modules(), scaled.modules(), strict=True):
        assert new.tensor_b.dtype == (expected if old.layer else dtype)
        exact = old.b.astype(np.float64) * (0.3 if old.layer else 1)
        assert np.array_equal(new.b, exact.astype(np.float32))


def test_peft_reads_an_adapter_of_both_number_formats(tmp_path: Path) -> None:
    base = random_model("llama")
    model = with_lora(copy.deepcopy(base), {"target_modules": QV, "r": 3, "lora_alpha": 5})
    whole = adapter_of(model, tmp_path / "whole")
    halved = {key: Tensor.from_array(one.array(), "BF16") for key, one in whole.tensors.items()}
    adapter = Adapter(halved, whole.config)
    save_adapter(adapter, f"{tmp_path / 'half'}/")
    scaled = write_scaled(adapter, f"{tmp_path / 'scaled'}/", from_layer=1, factor=0.3)
    assert {tensor.dtype for tensor in scaled.tensors.values()} == {"BF16", "F32"}
    expected = multiplied(loaded_by_peft(copy.deepcopy(base), tmp_path / "half"), 1, 0.3)
    actual = logits(loaded_by_peft(copy.deepcopy(base), tmp_path / "scaled"))
    assert torch.allclose(actual, logits(expected), rtol=1e-5, atol=1e-5)


def test_what_lies_outside_the_layers_stays() -> None:
    head = {
        lora_name("lm_head", "A"): Tensor.from_array(np.ones((2, 4))),
        lora_name("lm_head", "B"): Tensor.from_array(np.ones((9, 2))),
    }
    adapter = Adapter({**tiny().tensors, **head}, tiny(target_modules=[*QV, "lm_head"]).config)
    scaled = scale_layers(adapter, from_layer=0, factor=0)
    assert {name for name, tensor in scaled.tensors.items() if tensor.array().any()} == {
        *head,
        *(lora_name(module.name, "A") for module in adapter.modules()),
    }


@pytest.mark.parametrize("factor", [0.5, 0.0])
def test_blocks_have_the_new_scales_and_shares_of_zeros(factor: float, tmp_path: Path) -> None:
    parts = [tiny(rank=2), tiny(rank=3, lora_alpha=9)]
    stacked = stack(parts)
    factors = fold(stacked.factors, stacked)
    blocks = [block.fields(share_of_zeros(block.pairs(factors))) for block in stacked.blocks]
    config = peft_config(stacked.ranks, base=None)
    merged = Adapter(tensors_of(factors), config, {"format": 1, "blocks": blocks}, "merged")
    scaled = scale_layers(merged, from_layer=1, factor=factor)
    new = {module.name: (module.a, module.b) for module in scaled.modules()}
    for block, old, part in zip(scaled.header["blocks"], blocks, stacked.blocks, strict=True):
        for name, place in block["modules"].items():
            share = factor if layer_of(name) == 1 else 1
            assert place == {**old["modules"][name], "scale": old["modules"][name]["scale"] * share}
        assert block["zeros"] == share_of_zeros(part.pairs(new))
    assert (scaled.header["blocks"][0]["zeros"] > blocks[0]["zeros"]) == (factor == 0)
    if factor:  # the blocks' own B come out as they were
        for name, (_, b) in unstack(merged).factors.items():
            np.testing.assert_allclose(unstack(scaled).factors[name][1], b, rtol=1e-6)


def test_a_header_of_another_program_is_scaled_as_far_as_it_goes() -> None:
    name = "model.layers.1.self_attn.q_proj"
    header: Any = {"blocks": [{"modules": {name: {"offset": 0, "rank": 2}}}, None]}
    scaled = scale_layers(Adapter(tiny().tensors, tiny().config, header), from_layer=1, factor=0)
    assert scaled.header["blocks"] == [{"modules": {name: {"offset": 0, "rank": 2}}, "zeros": 0.5}]


def test_the_history_goes_on_and_names_the_parent(tmp_path: Path) -> None:
    earlier: HistoryEntry = {"command": "merge", "settings": {"lr": 1.0}}
    adapter = Adapter(tiny().tensors, tiny().config, {"history": [earlier], "chat": "on"}, "d/m.st")
    write_scaled(adapter, str(tmp_path / "out.safetensors"), from_layer=1, factor=0.5)
    loaded = load_adapter(str(tmp_path / "out.safetensors"))
    assert loaded.header["chat"] == "on"
    first, entry = loaded.header["history"]
    assert first == earlier
    assert entry["command"] == "scale-layers"
    assert entry["settings"] == {"from": 1, "factor": 0.5}
    assert entry["parents"] == {"m": adapter.sha256}
    assert parse_header(json.dumps(loaded.header), {}, "x")


@pytest.mark.parametrize(
    ("first", "factor", "reason"),
    [
        (0, 0, "factor 0 from layer 0 on leaves no LoRA in tiny; use the base model"),
        (1, 1e39, r"model.layers.1.self_attn.q_proj times 1e\+39 is too large for float32; "),
    ],
)
def test_what_makes_no_adapter_is_refused(first: int, factor: float, reason: str) -> None:
    with pytest.raises(LorakitError, match=reason):
        scale_layers(tiny(), from_layer=first, factor=factor)


def test_layers_in_two_places_are_refused() -> None:
    tensors = dict(tiny().tensors)
    for factor in ("A", "B"):
        other = f"base_model.model.encoder.layers.0.self_attn.q_proj.lora_{factor}.weight"
        tensors[other] = tensors[other.replace("encoder", "model")]
    with pytest.raises(LorakitError, match=r"in 'encoder.layers' and in 'model.layers', so"):
        scale_layers(Adapter(tensors, tiny().config), from_layer=1, factor=0.5)


# — the command —

RECORDS = """{"boundary": 1, "factor": 0.0, "score": 30.0, "best": false}
{"boundary": 1, "factor": 0.5, "score": 40.0, "best": true}
"""
PLAIN = '{"boundary": 1, "score": 40.0, "best": true}\n'


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    save_adapter(tiny(layers=3), str(tmp_path / "a.safetensors"))
    (tmp_path / "found.jsonl").write_text(RECORDS)
    (tmp_path / "plain.jsonl").write_text(PLAIN)
    return tmp_path


def test_layer_and_factor_come_from_the_command_line_or_records_and_all_by_pipes(
    folder: Path,
) -> None:
    done = shell(
        "set -e\n"
        "lorakit scale-layers a.safetensors --from 1 --factor 0.5\n"
        "lorakit scale-layers a.safetensors -q --from found.jsonl -o b.safetensors\n"
        "lorakit scale-layers a.safetensors -q --from - -o c.safetensors <found.jsonl\n"
        "lorakit scale-layers a.safetensors -q --from plain.jsonl --factor 0.5 -o d.safetensors\n"
        "lorakit scale-layers -q --from 1 --factor 0.5 -o - <a.safetensors >piped\n"
        "lorakit scale-layers a.safetensors -q --from found.jsonl --factor 2 -o e.safetensors\n"
        "for name in b c d; do cmp scaled.safetensors $name.safetensors; done",
        folder,
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == "Note: scaled 4 of 6 modules by 0.5\nNote: wrote scaled.safetensors\n"
    scaled = load_adapter(str(folder / "scaled.safetensors"))
    assert load_adapter(str(folder / "piped")).sha256 == scaled.sha256
    twice = scale_layers(tiny(layers=3), from_layer=1, factor=2)
    assert load_adapter(str(folder / "e.safetensors")).sha256 == twice.sha256


@pytest.mark.parametrize(
    ("options", "notes"),
    [
        (("--from", "9", "--factor", "2"), ["no LoRA from layer 9 on: every tensor is kept"]),
        (
            ("--from", "2", "--factor", "0.3"),
            [
                "scaled 2 of 6 modules by 0.3",
                "B of 2 modules is float32 now, to hold the products",
            ],
        ),
    ],
    ids=lambda value: " ".join(value),
)
def test_scaling_says_what_it_did(
    options: tuple[str, ...], notes: list[str], tmp_path: Path
) -> None:
    save_adapter(tiny(layers=3, dtype="F16"), str(tmp_path / "a.safetensors"))
    done = run_here("scale-layers", "a.safetensors", *options, cwd=tmp_path)
    assert done.stderr.splitlines() == [
        f"Note: {line}" for line in [*notes, "wrote scaled.safetensors"]
    ]


@pytest.mark.parametrize(
    ("options", "code", "message"),
    [
        (("--from", "1"), 2, "Missing option '--factor': a layer's number names none."),
        (("--factor", "1"), 2, "Missing option '--from'"),
        (("--from", "-1", "--factor", "1"), 2, "-1 is below 0"),
        (("--from", "1", "--factor", "-0.5"), 2, "-0.5 is not in the range x>=0"),
        (("--from", "1", "--factor", "nan"), 2, "nan is not a finite number"),
        (("--from", "1", "--factor", "inf"), 2, "inf is not a finite number"),
        (("--from", "plain.jsonl"), 1, "plain.jsonl: the best record has no factor; give --factor"),
        (("--from", "none.jsonl"), 1, "cannot read none.jsonl"),
        (("--from", "word.jsonl"), 1, "word.jsonl:1: 'factor' is not a number from 0 on; "),
        (("--from", "top.jsonl"), 1, "top.jsonl:1: the best keeps layers that are not the bottom"),
        (("--from", "0", "--factor", "0"), 1, "leaves no LoRA in a.safetensors; use the base"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else None,
)
def test_what_cannot_be_scaled_is_an_error(
    options: tuple[str, ...], code: int, message: str, folder: Path
) -> None:
    best = json.loads(PLAIN)
    (folder / "word.jsonl").write_text(json.dumps({**best, "factor": "0.5"}))
    (folder / "top.jsonl").write_text(json.dumps({**best, "layers": [1, 2], "factor": 0.5}))
    done = run_here("scale-layers", "a.safetensors", *options, cwd=folder)
    assert done.code == code
    assert message in done.stderr
    assert not (folder / "scaled.safetensors").exists()


def test_one_stdin_is_not_two_inputs(folder: Path) -> None:
    done = run_here("scale-layers", "--from", "-", cwd=folder)
    assert done.code == 2
    assert "one stdin" in done.stderr
