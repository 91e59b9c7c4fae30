"""lorakit's attention stands in for transformers' own, however a model calls it."""

from __future__ import annotations

import inspect
from typing import Any

import torch
import transformers

from lorakit.models.attention import BY_ROW, _pytorchs, in_groups, set_attention
from tests.support.models import open_base


def test_the_tensors_have_the_names_by_which_some_models_pass_them() -> None:
    functions = transformers.AttentionInterface()
    theirs = list(inspect.signature(_pytorchs).parameters)[:5]
    for name in (BY_ROW, "sdpa"):
        assert list(inspect.signature(functions[name]).parameters)[:5] == theirs


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


def test_a_causal_mask_is_left_out_and_gives_the_same() -> None:
    torch.manual_seed(0)
    attend = transformers.AttentionInterface()[BY_ROW]
    module = torch.nn.Module()
    query, key, value = (torch.randn(1, 2, 9, 4) for _ in range(3))
    causal = torch.ones(1, 1, 9, 9).tril().bool()
    added = torch.zeros(1, 1, 9, 9).masked_fill(~causal, torch.finfo(torch.float32).min)
    outputs = [
        attend(module, query, key, value, attention_mask=mask)[0] for mask in (None, causal, added)
    ]
    assert torch.equal(outputs[0], outputs[1])
    assert torch.equal(outputs[0], outputs[2])
    shorter = added.clone()
    shorter[..., 8, 0] = torch.finfo(torch.float32).min
    assert not torch.equal(attend(module, query, key, value, shorter)[0], outputs[0])


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
