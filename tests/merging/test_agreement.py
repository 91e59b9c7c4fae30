"""Whole weights in merges without data: kept where all adapters have them alike."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch

from lorakit.adapters.adapter import Adapter
from lorakit.adapters.storage import load_adapter, save_adapter
from lorakit.adapters.tensors import Tensor
from lorakit.errors import LorakitError
from lorakit.merging.agreement import common_whole
from lorakit.merging.static import merge_adapters
from lorakit.settings import StaticSettings
from tests.support.adapters import tiny
from tests.support.peft_models import logits, random_model, with_lora

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")
HEAD = "base_model.model.lm_head.weight"
ONES = Tensor.from_array(np.ones((5, 4)))


def with_head(head: Tensor | None, name: str) -> Adapter:
    adapter = tiny(modules_to_save=["lm_head"])
    tensors = {**adapter.tensors, **({} if head is None else {HEAD: head})}
    return replace(adapter, tensors=tensors, name=name)


def test_a_merge_of_adapters_with_one_head_is_their_sum_under_it(tmp_path: Path) -> None:
    base = random_model("llama")
    config = {"target_modules": ["q_proj", "v_proj"], "r": 4, "modules_to_save": ["lm_head"]}
    model = with_lora(copy.deepcopy(base), config)
    model.save_pretrained(tmp_path / "one", save_embedding_layers=False)
    one = load_adapter(str(tmp_path / "one"), plain=False)
    merged = merge_adapters(
        [one, replace(one, name="two")], "cat", settings=StaticSettings(weights=(0.25, 0.75))
    )
    save_adapter(merged, f"{tmp_path}/merged/")
    theirs: Any = peft.PeftModel.from_pretrained(base, str(tmp_path / "merged")).eval()
    torch.testing.assert_close(logits(theirs), logits(model), atol=1e-4, rtol=1e-4)


def test_the_number_format_of_a_head_is_no_difference() -> None:
    adapters = [with_head(ONES, "one"), with_head(Tensor.from_array(ONES.array(), "BF16"), "two")]
    assert common_whole(adapters, ()) == {HEAD: ONES}


REFUSED: dict[str, tuple[Adapter, str]] = {
    "another head": (
        with_head(Tensor.from_array(np.zeros((5, 4))), "two"),
        "one and two differ in 'lm_head.weight', which is held whole",
    ),
    "a head of another shape": (with_head(Tensor.from_array(np.ones((6, 4))), "two"), "differ in"),
    "no head": (with_head(None, "two"), "differ in"),
}


@pytest.mark.parametrize(("other", "message"), REFUSED.values(), ids=REFUSED.keys())
def test_adapters_that_differ_are_refused(other: Adapter, message: str) -> None:
    with pytest.raises(LorakitError, match=message):
        merge_adapters([with_head(ONES, "one"), other], "cat", settings=StaticSettings())


def test_lora_on_a_head_that_another_saves_is_refused() -> None:
    one = with_head(ONES, "one")
    assert common_whole([replace(one, config=tiny().config)], ["lm_head"]) == {
        "base_model.model.lm_head.base_layer.weight": ONES
    }
    with pytest.raises(LorakitError, match=r"one holds 'lm_head.weight' whole, and another has"):
        common_whole([one], ["lm_head"])
