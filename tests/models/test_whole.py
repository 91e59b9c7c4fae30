"""All of an adapter on a base: PEFT's logits while it is on, the own weights afterwards."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch

from lorakit.adapters.storage import load_adapter
from lorakit.errors import LorakitError
from lorakit.models.base import Base
from lorakit.models.lora import attach
from lorakit.models.whole import attached
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
