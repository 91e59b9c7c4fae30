"""Attention on a GPU: of packed rows and of heads that share keys; what a CPU can, it tries too."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from lorakit.models import gpu_attention, row_masks
from lorakit.models.attention import set_attention
from lorakit.models.base import Base
from lorakit.models.batches import can_pack, pack, target_logits
from lorakit.models.gpu_attention import in_groups
from lorakit.models.loading import load_base
from lorakit.models.lora import factors, inject, pick_modules
from lorakit.models.row_masks import RowMasks, make_masks
from lorakit.models.sharing import new_accelerator
from lorakit.models.tokens import Example
from lorakit.settings import TrainingSettings
from lorakit.training.trainer import Trainer
from tests.models.test_batches import WINDOWED, examples, losses_of
from tests.support import models
from tests.support.devices import DEVICES, here
from tests.support.models import open_base, save_model
from tests.support.training_data import Recorder

BFLOAT16 = torch.bfloat16


def test_heads_that_share_keys_give_the_same_without_copies_of_them() -> None:
    torch.manual_seed(0)
    attend = transformers.AttentionInterface()["sdpa"]
    module: Any = torch.nn.Module()
    module.num_key_value_groups = 3
    query = torch.randn(2, 6, 4, 8)
    key, value = torch.randn(2, 2, 2, 9, 8)
    mask = torch.zeros(2, 1, 4, 9).masked_fill(torch.rand(2, 1, 4, 9) < 0.3, -1e9)
    expected = attend(module, query, key, value, mask, scaling=0.5)[0]
    assert expected.shape == (2, 4, 6, 8)
    with in_groups():
        in_fewer = attend(module, query, key, value, mask, scaling=0.5)[0]
        alone = attend(module, query, key, value, None, scaling=0.5)[0]
    assert torch.allclose(in_fewer, expected, atol=1e-6)
    assert torch.equal(alone, attend(module, query, key, value, None, scaling=0.5)[0])


@pytest.mark.parametrize("family", ["llama", "gpt2", "phi3", *WINDOWED])
def test_packed_rows_have_the_loss_and_gradient_of_padded_ones(
    family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if family in WINDOWED:
        monkeypatch.setitem(models.FAMILIES, family, WINDOWED[family])
    name, results = save_model(tmp_path, family), []
    for packed in (True, False):
        base = open_base(name)
        base.model.set_attn_implementation("sdpa")  # as on a GPU
        losses = losses_of(base, 10_000, packed=packed)
        loss = float(losses.backward(examples(base, 8)))
        results.append((loss, [parameter.grad for parameter in losses.parameters]))
    (loss, gradients), (expected, others) = results
    assert loss == pytest.approx(expected, rel=1e-5)
    for one, other in zip(gradients, others, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("lengths", [(7, 6, 5), (40, 3, 2, 2)])
def test_rows_attend_as_each_alone_and_without_much_padding(
    lengths: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    module: Any = torch.nn.Module()
    module.num_key_value_groups = 3
    tokens = sum(lengths)
    query = torch.randn(1, 6, tokens, 8)
    key, value = torch.randn(2, 1, 2, tokens, 8)
    rows = RowMasks(list(lengths), [None] * len(lengths), torch.device("cpu"))
    sizes, attend = [], gpu_attention.pytorchs

    def noting(module: Any, query: torch.Tensor, *others: Any, **settings: Any) -> Any:
        sizes.append(query.shape[0] * query.shape[2])
        return attend(module, query, *others, **settings)

    monkeypatch.setattr(gpu_attention, "pytorchs", noting)
    together = transformers.AttentionInterface()["sdpa"](module, query, key, value, rows)[0]
    parts = (tensor.split(lengths, 2) for tensor in (query, key, value))
    alone = [attend(module, *part, None)[0] for part in zip(*parts, strict=True)]
    assert torch.allclose(together, torch.cat(alone, 1), atol=1e-6)
    assert max(sizes) <= 2 * tokens


def test_a_row_by_itself_has_no_mask_to_hold() -> None:
    with row_masks.packed([5]):
        rows = make_masks(
            batch_size=1, q_length=5, kv_length=5, device=torch.device("cpu"), local_size=None
        )
    assert isinstance(rows, RowMasks)
    assert rows.causal


@pytest.mark.gpu
@pytest.mark.parametrize("family", ["llama", "mistral", "phi3", "qwen2"])
def test_rows_of_several_lengths_attend_in_one_call(
    family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = load_base(save_model(tmp_path, family), device=here("cuda"), dtype=BFLOAT16)
    assert can_pack(base.model)
    packs = pack(examples(base, 7), base.device)
    assert gpu_attention._over_lengths(base.device), "torch has none, or the GPU is too old"
    together = target_logits(base.model, packs)
    monkeypatch.setattr(gpu_attention, "_over_lengths", lambda device: None)
    padded = target_logits(base.model, packs)
    torch.testing.assert_close(together, padded, rtol=0.05, atol=0.05)


def long_rows(base: Base, count: int, length: int) -> list[Example]:
    """Return rows of random tokens of length / 2 to length, of which the last ten are learnt."""
    draw, words = random.Random(0), len(base.model.get_input_embeddings().weight)
    sizes = [draw.randrange(length // 2, length) for _ in range(count)]
    return [
        Example(tuple(draw.randrange(words) for _ in range(size)), size - 10, "a row")
        for size in sizes
    ]


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("device", DEVICES)
def test_a_run_over_long_rows_in_bfloat16_repeats_its_bytes(
    device: str, packed: bool, llama: str
) -> None:
    results = []
    for _ in range(2):
        base = load_base(llama, device=here(device), dtype=BFLOAT16)
        torch.manual_seed(0)
        layers = inject(base, dict.fromkeys(pick_modules(base, ["q_proj", "v_proj"], None), 4))
        for layer in layers.values():
            torch.nn.init.normal_(factors(layer)[1], std=0.1)
        settings = TrainingSettings(lr=1e-2, epochs=1, batch_size=4, device=device)
        trainer = Trainer(base, layers, settings, accelerator=new_accelerator(device))
        trainer.losses.packed = packed
        batch = long_rows(base, 12, 40 if device == "cpu" else 400)
        trainer.begin(batch, batch[:4], Recorder())
        trainer.advance()
        results.append([weight.detach().cpu() for weight in trainer.parameters])
    assert all(torch.equal(one, other) for one, other in zip(*results, strict=True))
    assert not torch.are_deterministic_algorithms_enabled()


def test_on_a_gpu_cudnn_computes_no_attention(llama: str) -> None:
    base = open_base(llama)
    before = torch.backends.cuda.cudnn_sdp_enabled()
    try:
        torch.backends.cuda.enable_cudnn_sdp(True)
        set_attention(base.model, torch.device("cpu"))
        assert torch.backends.cuda.cudnn_sdp_enabled()
        set_attention(base.model, torch.device("cuda"))
        assert not torch.backends.cuda.cudnn_sdp_enabled()
    finally:
        torch.backends.cuda.enable_cudnn_sdp(before)
