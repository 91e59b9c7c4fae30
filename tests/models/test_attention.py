"""lorakit's attention stands in for transformers' own, however a model calls it."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from lorakit.models import attention
from lorakit.models.attention import BY_ROW, attends_by_row, set_attention
from lorakit.models.gpu_attention import pytorchs
from tests.support import models
from tests.support.models import open_base, save_model

_SMALL: dict[str, Any] = {
    "vocab_size": models.VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_attention_heads": 4,
}
# Families of newer transformers that compute otherwise where the attention has another name.
ASKING: dict[str, Any] = {
    "Gemma4TextConfig": {
        **_SMALL,
        "num_hidden_layers": 6,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "layer_types": ["sliding_attention", "full_attention"] * 3,
        "sliding_window": 64,
        "num_kv_shared_layers": 2,
        "hidden_size_per_layer_input": 8,
        "vocab_size_per_layer_input": models.VOCABULARY,
    },
    "DeepseekV32Config": {
        **_SMALL,
        "num_hidden_layers": 2,
        "num_key_value_heads": 4,
        "moe_intermediate_size": 16,
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "n_group": 1,
        "topk_group": 1,
        "first_k_dense_replace": 1,
        "kv_lora_rank": 8,
        "q_lora_rank": 8,
        "qk_rope_head_dim": 8,
        "qk_nope_head_dim": 8,
        "v_head_dim": 8,
        "index_topk": 4,
        "index_n_heads": 2,
        "index_head_dim": 16,
    },
}


@pytest.mark.parametrize("name", ASKING)
def test_a_family_that_asks_for_the_attentions_name_finds_its_own(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = getattr(transformers, name, None)
    if config is None:
        pytest.skip(f"transformers {transformers.__version__} has no {name}")
    monkeypatch.setitem(models.FAMILIES, name, lambda: config(**ASKING[name]))
    folder = save_model(tmp_path, name)
    base = open_base(folder)
    plain = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    ids = torch.randint(3, models.VOCABULARY, (2, 12), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[0, :5] = 0
    with torch.no_grad():
        for rows in ({"input_ids": ids, "attention_mask": mask}, {"input_ids": ids[1:]}):
            expected = plain.eval()(**rows).logits[:, -4:]
            found = base.model(**rows, logits_to_keep=4).logits
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
        base.model.set_attn_implementation(BY_ROW)
        other = base.model(input_ids=ids[1:], logits_to_keep=4).logits
    close = torch.allclose(other, expected, rtol=1e-2, atol=1e-2)
    assert not close, "the name makes no difference any more"


@pytest.mark.parametrize(
    ("config", "by_row"),
    [
        (transformers.LlamaConfig, True),
        (transformers.Phi3Config, True),
        (transformers.FalconConfig, False),
    ],
)
def test_families_attend_row_by_row_on_a_cpu_but_for_those_that_ask(
    config: Any, by_row: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attention, "choose_kernels", lambda: None)
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config(pad_token_id=0))
    assert not attends_by_row(model, torch.device("cuda"))
    set_attention(model, torch.device("cuda"))
    assert model.config._attn_implementation == "sdpa"
    assert attends_by_row(model, torch.device("cpu")) == by_row
    set_attention(model, torch.device("cpu"))
    assert model.config._attn_implementation == (BY_ROW if by_row else "sdpa")


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
