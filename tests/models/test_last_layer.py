"""The last layer at the tokens that count, against all of it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from lorakit.models import last_layer
from lorakit.models.architecture import activation_checkpointing, decoder_layers
from lorakit.models.base import Base
from lorakit.models.batches import pack, target_logits
from lorakit.models.last_layer import last_layer_at, leaves_out
from lorakit.models.lora import factors, inject, pick_modules
from lorakit.models.reading import Reader
from lorakit.models.tokens import Example
from tests.support.models import FAMILIES, open_base, save_model

ROWS = [Example(tuple(range(5, 5 + length)), length - 6, "") for length in (60, 50, 40)]
TARGETS = 3 * 6


def computed(base: Base, part: str = "mlp") -> list[int]:
    """Return a list that gets the number of tokens of which a part of the last layer computes."""
    counts: list[int] = []
    layers = decoder_layers(base.model)
    assert layers
    module = layers[-1].get_submodule(part)
    linear = next(m for m in module.modules() if isinstance(m, torch.nn.Linear))
    linear.register_forward_pre_hook(lambda module, inputs: counts.append(inputs[0].shape[1]))
    return counts


def all_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(last_layer, "_LARGEST_STEP", 1 << 20)


def trained(base: Base, targets: list[str]) -> list[torch.nn.Parameter]:
    """Put LoRA that changes the base on it, and return what is trained."""
    torch.manual_seed(0)
    layers = inject(base, dict.fromkeys(pick_modules(base, targets, None), 4), alpha=8)
    parameters = [weight for layer in layers.values() for weight in factors(layer)]
    for parameter in parameters:
        torch.nn.init.normal_(parameter, std=0.1)
        parameter.requires_grad_(True)
    return parameters


@pytest.mark.parametrize("family", ["llama", "qwen2", "mistral", "phi", "phi3"])
def test_gradients_are_those_of_the_whole_layer(
    family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = open_base(save_model(tmp_path, family))
    names = ["qkv_proj"] if family == "phi3" else ["q_proj", "v_proj"]
    parameters, counts, found = trained(base, names), computed(base), []
    for _ in range(2):
        logits = target_logits(base.model, pack(ROWS, base.device))
        found.append([logits, *torch.autograd.grad(logits.square().sum(), parameters)])
        all_tokens(monkeypatch)
    assert counts == [TARGETS, sum(len(row.ids) - 1 for row in ROWS)]
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("targets", [["down_proj"], ["gate_proj", "q_proj"]])
def test_an_mlp_with_lora_reads_all_tokens(targets: list[str], llama: str) -> None:
    base = open_base(llama)
    trained(base, targets)
    counts, before = computed(base), computed(base, "self_attn.o_proj")
    target_logits(base.model, pack(ROWS, base.device))
    assert counts == before == [sum(len(row.ids) - 1 for row in ROWS)]


def test_a_projection_with_lora_reads_all_tokens_and_the_mlp_those_that_count(llama: str) -> None:
    base = open_base(llama)
    trained(base, ["o_proj"])
    counts, before = computed(base), computed(base, "self_attn.o_proj")
    target_logits(base.model, pack(ROWS, base.device))
    assert counts == [TARGETS]
    assert before == [sum(len(row.ids) - 1 for row in ROWS)]


def test_with_checkpointing_all_tokens_are_computed_twice(llama: str) -> None:
    base = open_base(llama)
    parameters, counts = trained(base, ["q_proj"]), computed(base)
    with activation_checkpointing(base.model):
        logits = target_logits(base.model, pack(ROWS, base.device))
        torch.autograd.grad(logits.sum(), parameters)
    assert counts == [sum(len(row.ids) - 1 for row in ROWS)] * 2


@pytest.mark.parametrize("family", FAMILIES)
def test_prompts_are_read_as_by_the_whole_layer(
    family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = open_base(save_model(tmp_path, family))
    counts = [] if family == "gpt2" else computed(base)  # whose layers are Conv1D
    prompts = [[7 + (3 * place + row) % 50 for place in range(66 + row)] for row in range(3)]
    logits: list[torch.Tensor] = []
    tokens: list[list[list[int]]] = []
    for _ in range(2):
        with torch.inference_mode():
            reader = Reader(base.model, 3, 80, logits.append)
            tokens.append(reader.extend(prompts, [0] * 3, 0, 1))
            tokens.append(reader.extend([[9], [8, 7], [9]], [66, 67, 68], 0, 2))
            fanned = Reader(base.model, 3, 80, logits.append)
            tokens.append(fanned.fan_out([*prompts[0], *range(8)], [1], 0, 3))
        all_tokens(monkeypatch)
    torch.testing.assert_close(logits[:3], logits[3:], rtol=1e-4, atol=1e-4)
    assert tokens[:3] == tokens[3:]
    assert all(few < whole for few, whole in zip(counts[:3:2], counts[3::2], strict=True))


def test_what_does_not_return_a_tensor_reads_all_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    part, x = torch.nn.Linear(4, 4).requires_grad_(False), torch.ones(1, 70, 4)
    monkeypatch.setattr(part, "forward", lambda x: (x, "where tokens go"))
    monkeypatch.setattr(last_layer, "_parts", lambda model: [part])
    with last_layer_at(None, torch.tensor([3]), 70):
        given, _ = part(x)
    assert torch.equal(given, x)


def test_few_tokens_and_those_that_mostly_count_are_all_computed(llama: str) -> None:
    assert leaves_out(1, 65)
    assert not leaves_out(1, 64)
    assert leaves_out(50, 100)
    assert not leaves_out(51, 100)
    base = open_base(llama)
    counts, ids = computed(base), torch.arange(5, 75)[None]
    with torch.no_grad():
        for first in (36, 60):
            with last_layer_at(base.model, torch.arange(first, 70), 70):
                base.model(input_ids=ids)
        base.model(input_ids=ids)
    assert counts == [34, 10, 70]
