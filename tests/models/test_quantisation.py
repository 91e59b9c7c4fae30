"""Bases in 4 and 8 bits, quantised by bitsandbytes on a CPU as on a GPU: what lorakit does on them.

The oracles are PEFT's own forward and backward pass on the same layers, and the dense base whose
weights are what the 4-bit ones stand for.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
import transformers
from bitsandbytes.functional import dequantize_4bit

from lorakit.adapters.adapter import Adapter, tensors_of
from lorakit.adapters.storage import load_adapter, save_adapter
from lorakit.adapters.targets import peft_config
from lorakit.errors import LorakitError
from lorakit.models.base import Base
from lorakit.models.loading import load_base
from lorakit.models.lora import attach, factors, inject, pick_modules, projections
from lorakit.training.lora_step import fused_forward
from tests.support.in_process import run_here
from tests.support.models import open_base, save_model
from tests.support.program import run
from tests.support.training_data import rows, save_rows

CPU = torch.device("cpu")
KINDS = ("4bit", "8bit")
IDS = torch.arange(3, 40)[None]


def open_in(load_in: str, name: str = "tiny") -> Base:
    return load_base(name, device=CPU, dtype=torch.float32, load_in=load_in)


def done(*arguments: str) -> list[str]:
    """Run a command of lorakit, which has to succeed; return the lines on its stdout."""
    ended = run_here(*arguments)
    assert ended.code == 0, ended.stderr
    return ended.stdout.decode().splitlines()


def random_adapter(base: Base, rank: int = 4) -> Adapter:
    """Return an adapter of query and value that changes what a base computes."""
    draw = np.random.default_rng(0)
    shapes = projections(base.model)
    modules = pick_modules(base, ["q_proj", "v_proj"], None)
    pairs = {
        name: (
            draw.normal(size=(rank, shapes[name][1])).astype(np.float32),
            0.05 * draw.normal(size=(shapes[name][0], rank)).astype(np.float32),
        )
        for name in modules
    }
    config = peft_config(dict.fromkeys(modules, rank), base="tiny", alpha=8)
    return Adapter(tensors_of(pairs), config, {"format": 1}, "random")


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        of_ids: torch.Tensor = model(input_ids=IDS).logits
    return of_ids


@pytest.mark.parametrize(("load_in", "most"), [("4bit", 0.15), ("8bit", 0.27)])
def test_the_layers_take_the_bits_asked_for_and_keep_their_shapes(
    load_in: str, most: float
) -> None:
    whole, base = open_base("tiny"), open_in(load_in)
    sizes = [
        sum(weight.nbytes for weight in model.model.layers.parameters())
        for model in (whole.model, base.model)
    ]
    assert sizes[1] / sizes[0] < most
    assert projections(base.model) == projections(whole.model)
    assert base.record == {**whole.record, "load_in": load_in}
    assert base.fingerprint == whole.fingerprint
    assert base.packs


@pytest.mark.parametrize("load_in", KINDS)
def test_an_adapter_on_a_quantised_base_gives_the_logits_of_peft(
    load_in: str, tmp_path: Path
) -> None:
    base = open_in(load_in)
    plain = logits(base.model)
    adapter = random_adapter(base)
    save_adapter(adapter, f"{tmp_path}/")
    attach(base, adapter)
    model = peft.PeftModel.from_pretrained(open_in(load_in).model, tmp_path)
    assert (logits(base.model) - plain).abs().max() > 0.1
    torch.testing.assert_close(logits(base.model), logits(model))


def gradients(base: Base, *, fused: bool) -> torch.Tensor:
    """Return the gradient of a loss by LoRA that is trained on a base after it was validated."""
    torch.manual_seed(0)
    layers = inject(base, dict.fromkeys(pick_modules(base, ["q_proj", "v_proj"], None), 4))
    weights = [weight for layer in layers.values() for weight in factors(layer)]
    for weight in weights[1::2]:
        torch.nn.init.normal_(weight, std=0.1)
    logits(base.model)  # as before the first epoch: where layers may change what they hold
    with fused_forward(layers) if fused else contextlib.nullcontext():
        loss = -base.model(IDS, use_cache=False).logits.log_softmax(-1)[0, :, 5].mean()
        return torch.cat([grad.flatten() for grad in torch.autograd.grad(loss, weights)])


@pytest.mark.parametrize("load_in", KINDS)
def test_the_fused_step_on_quantised_layers_has_the_gradient_of_peft(load_in: str) -> None:
    fused, pefts = (gradients(open_in(load_in), fused=fused) for fused in (True, False))
    assert pefts.norm() > 0.1
    torch.testing.assert_close(fused, pefts, rtol=1e-4, atol=1e-6)


def test_the_gradient_on_4_bit_layers_is_that_on_the_weights_they_stand_for() -> None:
    base, dense = open_in("4bit"), open_base("tiny")
    for name, module in base.model.named_modules():
        if hasattr(module, "quant_state"):
            weight = dequantize_4bit(module.weight.data, module.weight.quant_state)
            dense.model.get_submodule(name).weight.data = weight
    expected = gradients(dense, fused=True)
    torch.testing.assert_close(gradients(base, fused=True), expected, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("load_in", KINDS)
def test_every_command_that_runs_a_base_runs_a_quantised_one(load_in: str, tmp_path: Path) -> None:
    data = save_rows(tmp_path / "data.jsonl", rows(6))
    base = ("--model", "tiny", "--load-in", load_in, "--device", "cpu", "-q")
    training = ("--data", data, "--epochs", "1", "--lr", "1e-2", *base)
    first, merged, short = (str(tmp_path / f"{name}.safetensors") for name in "abc")
    done("train-adapter", *training, "-o", first)
    done("merge", first, first, *training, "--prune-ratio", "0.5", "-o", merged)
    adapter = load_adapter(merged)
    assert adapter.header["base"]["load_in"] == load_in
    assert [0.45 < block["zeros"] <= 0.5 for block in adapter.header["blocks"]] == [True, True]

    outputs = tmp_path / "outputs.jsonl"
    evaluation = ("--boundaries", "4,8", "--max-new-tokens", "4", "--predictions", str(outputs))
    records = done("find-boundary", merged, "--data", data, *base, *evaluation)
    assert [json.loads(line)["boundary"] for line in records] == [4, 8]
    found = [json.loads(line) for line in outputs.read_text().splitlines()]
    done("strip-layers", merged, "--boundary", "4", "-o", short, "-q")
    lines = done("generate", short, "--data", data, *base, "--max-new-tokens", "4")
    assert [json.loads(line)["prediction"] for line in lines] == [
        row["prediction"] for row in found if row["boundary"] == 4
    ]


def test_a_base_that_was_quantised_before_is_loaded_as_it_is(llama: str, tmp_path: Path) -> None:
    now = open_in("4bit", llama)
    now.model.save_pretrained(tmp_path)
    now.tokenizer.save_pretrained(tmp_path)
    before = open_base(str(tmp_path))
    torch.testing.assert_close(logits(before.model), logits(now.model))
    assert before.load_in is None
    assert projections(before.model) == projections(now.model)
    attach(before, adapter := random_adapter(before))
    attach(now, adapter)
    torch.testing.assert_close(logits(before.model), logits(now.model))
    asked: dict[str, dict[str, Any]] = {
        "--load-in": {"load_in": "8bit"},
        "--shard": {"shard": True},
    }
    for option, arguments in asked.items():
        with pytest.raises(LorakitError, match=rf"quantised already \(bitsandbytes\).*{option}"):
            load_base(str(tmp_path), device=CPU, dtype=torch.float32, **arguments)


def test_transposed_projections_are_quantised_too(tmp_path: Path) -> None:
    folder = save_model(tmp_path, "gpt2")
    whole, base = open_base(folder), open_in("8bit", folder)
    assert projections(base.model) == projections(whole.model)
    off = (logits(base.model) - logits(whole.model)).abs().max()
    assert 0 < off < 0.1 * logits(whole.model).abs().max()


def test_without_bitsandbytes_the_extra_is_named(
    llama: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = open_in("4bit", llama)
    now.model.save_pretrained(tmp_path)
    now.tokenizer.save_pretrained(tmp_path)
    there = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *_: None if "bitsand" in name else there(name)
    )
    with pytest.raises(
        LorakitError,
        match=r"--load-in 4bit needs bitsandbytes; run: pip install '?lorakit\[quant\]",
    ):
        open_in("4bit", llama)
    with pytest.raises(
        LorakitError, match=r"the model .* needs bitsandbytes; run: pip install '?lorakit\[quant\]"
    ):
        open_base(str(tmp_path))


def test_a_device_that_cannot_compute_in_few_bits_is_an_error(llama: str) -> None:
    with pytest.raises(LorakitError, match=r"--load-in 8bit cannot compute on mps; give"):
        load_base(llama, device=torch.device("mps"), dtype=torch.float32, load_in="8bit")


def test_generation_on_a_quantised_base_is_that_of_transformers(tmp_path: Path) -> None:
    data = save_rows(tmp_path / "data.jsonl", rows(1))
    prompt = rows(1)[0]["prompt"]
    config = transformers.BitsAndBytesConfig(load_in_8bit=True)
    base = open_base("tiny")
    model: Any = transformers.AutoModelForCausalLM.from_pretrained(
        base.model.config.name_or_path, quantization_config=config, dtype=torch.float32
    )
    ids = torch.tensor([base.tokenizer(prompt)["input_ids"]])
    with torch.inference_mode():
        new = model.generate(ids, max_new_tokens=8, do_sample=False)[0, ids.shape[1] :]
    ended = run(
        *("generate", "--data", data, "--model", "tiny", "--load-in", "8bit", "--device", "cpu"),
        *("--max-new-tokens", "8", "-q"),
    )
    assert ended.stderr == ""
    expected = base.tokenizer.decode(new, skip_special_tokens=True).strip()
    assert json.loads(ended.stdout)["prediction"] == expected
