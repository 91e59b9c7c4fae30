"""lorakit's attention stands in for transformers' own, however a model calls it."""

from __future__ import annotations

import inspect

import torch
import transformers

from lorakit.models.attention import BY_ROW
from lorakit.models.gpu_attention import pytorchs


def test_the_tensors_have_the_names_by_which_some_models_pass_them() -> None:
    functions = transformers.AttentionInterface()
    theirs = list(inspect.signature(pytorchs).parameters)[:5]
    for name in (BY_ROW, "sdpa"):
        assert list(inspect.signature(functions[name]).parameters)[:5] == theirs


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
