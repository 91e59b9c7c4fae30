"""All of an adapter on a base: PEFT's logits while it is on, the own weights afterwards."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from lorakit.adapters.adapter import Adapter
from lorakit.adapters.storage import load_adapter
from lorakit.adapters.tensors import Tensor
from lorakit.errors import LorakitError
from lorakit.models.base import Base
from lorakit.models.lora import attach
from lorakit.models.whole import attached, check_whole_fits
from tests.support.peft_models import MORE_KINDS, logits, random_model, with_lora

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")


@pytest.mark.parametrize("kind", MORE_KINDS)
def test_the_logits_are_pefts_and_the_bases_weights_come_back(kind: str, tmp_path: Path) -> None:
    family, config = MORE_KINDS[kind]
    base = Base(random_model(family), None, "random", ())
    before = copy.deepcopy(base.model.state_dict())
    model = with_lora(copy.deepcopy(base.model), config)
    model.save_pretrained(tmp_path, save_embedding_layers=False)
    adapter = load_adapter(str(tmp_path), plain=False)
    for _ in range(2):
        with attached(base, adapter):
            torch.testing.assert_close(logits(base.model), logits(model), atol=1e-5, rtol=1e-5)
        after = {k.replace(".base_layer.", "."): v for k, v in base.model.state_dict().items()}
        assert all(torch.equal(after[key], tensor) for key, tensor in before.items())
    with pytest.raises(LorakitError, match="fuse it and go on with that model"):
        attach(base, adapter)


def adapter_of(kind: str, folder: Path) -> Adapter:
    family, config = MORE_KINDS[kind]
    model = with_lora(random_model(family), config)
    model.save_pretrained(folder, save_embedding_layers=False)
    return load_adapter(str(folder), plain=False)


def test_weights_that_do_not_fit_are_refused_by_name_and_shapes(tmp_path: Path) -> None:
    base = Base(random_model("llama"), None, "random", ())
    adapter = adapter_of("last norm", tmp_path)
    check_whole_fits(base, adapter)
    key = "base_model.model.model.norm.weight"
    longer = {**adapter.tensors, key: Tensor.from_array(np.ones(7))}
    with pytest.raises(LorakitError, match=r"norm.weight is 7, in random it is 32; give the base"):
        check_whole_fits(base, replace(adapter, tensors=longer))
    other = Base(random_model("gpt2"), None, "other", ())
    with pytest.raises(LorakitError, match=r"other has no weights model\.norm\.weight"):
        check_whole_fits(other, adapter)
    with pytest.raises(LorakitError, match=r"model\.norm\.weight whole, which --shard cannot"):
        check_whole_fits(replace(base, sharded=True), adapter)
