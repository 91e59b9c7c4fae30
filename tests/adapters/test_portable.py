"""The encoding that PEFT, vLLM and llama.cpp read alike."""

from __future__ import annotations

import numpy as np
import pytest

from lorakit.adapters.adapter import Adapter, tensors_of
from lorakit.adapters.portable import make_portable
from lorakit.adapters.targets import peft_config
from tests.support.adapters import tiny


def two_ranks() -> Adapter:
    draw = np.random.default_rng(0)
    ranks = {"model.layers.0.q_proj": 2, "model.layers.1.q_proj": 5}
    factors = {
        name: (
            draw.normal(size=(rank, 4)).astype(np.float32),
            draw.normal(size=(3, rank)).astype(np.float32),
        )
        for name, rank in ranks.items()
    }
    config = {**peft_config(ranks, base=None, alpha=3), "use_rslora": True}
    return Adapter(tensors_of(factors), config, {"format": 1, "chat": "off"}, "two")


def test_three_readers_of_the_config_find_one_scale_and_one_rank() -> None:
    """PEFT reads patterns, vLLM r and lora_alpha, llama.cpp lora_alpha over the tensor's rank."""
    adapter = two_ranks()
    made = make_portable(adapter)
    config = made.config
    assert (config["r"], config["lora_alpha"], config["use_rslora"]) == (5, 5, False)
    assert config["rank_pattern"] == config["alpha_pattern"] == {}
    for module, before in zip(made.modules(), adapter.modules(), strict=True):
        vllm = config["lora_alpha"] / config["r"]
        llama_cpp = config["lora_alpha"] / module.tensor_a.shape[0]
        assert module.scale == vllm == llama_cpp == 1
        np.testing.assert_allclose(module.delta(), before.delta(), rtol=0, atol=1e-5)
        assert not module.a[before.rank :].any()
        assert not module.b[:, before.rank :].any()


def test_twice_is_once_and_the_header_stays() -> None:
    made = make_portable(two_ranks())
    again = make_portable(made)
    assert (again.sha256, again.header) == (made.sha256, two_ranks().header)


@pytest.mark.parametrize(("alpha", "dtype"), [(4, "BF16"), (3, "F32")])
def test_the_format_stays_where_it_holds_the_folded_scale(alpha: float, dtype: str) -> None:
    adapter = tiny(rank=2, dtype="BF16", lora_alpha=alpha)
    for module, before in zip(make_portable(adapter).modules(), adapter.modules(), strict=True):
        assert (module.tensor_a.dtype, module.tensor_b.dtype) == ("BF16", dtype)
        np.testing.assert_array_equal(module.delta(), before.delta())
